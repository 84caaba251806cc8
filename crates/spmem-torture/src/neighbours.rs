//! Memory that is not managed, beside memory that is: files, shared memory, code, huge reservations.

use crate::area::{Area, Ballast, State, check_zero};
use crate::harness::{Case, Ctx, Outcome, bail, ensure, skip};
use crate::model::PAGE;
use crate::process;
use crate::sys::{self, ANON, RW};

pub const CASES: &[Case] = &[
    Case::new("file-private", "a private file mapping: written pages keep, others show the file", |ctx| {
        file(ctx, libc::MAP_PRIVATE)
    }),
    Case::new("file-shared", "a shared file mapping writes through", |ctx| file(ctx, libc::MAP_SHARED)),
    Case::new("memfd-shared", "shared memory (memfd, anonymous) is one for parent and child", shared),
    Case::new("neighbour-mixed", "private, shared and file pages side by side in one 2 MiB", mixed),
    Case::new("grows-down", "a MAP_GROWSDOWN mapping grows under a cold top", grows_down),
    Case::new("jit", "code pages written, made executable, cold, run", jit),
    Case::new("own-uffd", "the program's own userfaultfd works or is refused clearly", own_uffd).warm(),
    Case::new("many-mappings", "twenty thousand mappings", many),
    Case::new("sparse", "a reservation of 64 GiB with pieces in use", sparse),
    Case::new("large-stride", "one page used in every 2 MiB", stride),
    Case::new("globals", "static data (.data and .bss) stays", globals),
];

fn file(ctx: &Ctx, kind: i32) -> Outcome {
    let pages = ctx.pages() / 2;
    let mut ballast = Ballast::new(ctx)?;
    let source = Area::filled(ctx.seed, pages)?;
    let fd = sys::temp_file(0)?;
    sys::write_full(fd, source.base, pages * PAGE)?;
    let base = sys::map_file(0, pages, RW, kind, fd)?;
    let mut mapped = Area { base, first: 0, seed: ctx.seed, writer: 0, model: source.model.clone() };
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        mapped.check_all("mapped file")?;
        mapped.writer = 1;
        mapped.scribble(&mut ctx.rng(round), 3);
        ballast.sweep()?;
        mapped.check_all("mapped file, written")?;
        source.check_all("memory the file was written from")?;
        if kind == libc::MAP_PRIVATE {
            // Dropping shows the file again.
            sys::advise(mapped.addr(pages / 2), pages / 4, libc::MADV_DONTNEED)?;
            for page in pages / 2..pages / 2 + pages / 4 {
                mapped.model[page] = source.model[page];
            }
            mapped.check_all("mapped file, a part dropped")?;
        } else {
            let mut bytes = [0u8; PAGE];
            for page in (0..pages).step_by(7) {
                // SAFETY: a page of our own.
                unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), PAGE, (page * PAGE) as i64) };
                let mut wanted = [0; PAGE];
                mapped.expected(page, &mut wanted);
                ensure!(bytes == wanted, "page {page} of a shared mapping did not reach the file");
            }
        }
    }
    sys::close(fd);
    Ok(())
}

fn shared(ctx: &Ctx) -> Outcome {
    let pages = ctx.pages() / 4;
    let mut ballast = Ballast::new(ctx)?;
    // SAFETY: a valid name.
    let fd = sys::ok("memfd_create", unsafe { libc::memfd_create(c"torture".as_ptr(), libc::MFD_CLOEXEC) }.into())?
        as i32;
    // SAFETY: no memory is involved.
    sys::ok("ftruncate", unsafe { libc::ftruncate(fd, (pages * PAGE) as i64) }.into())?;
    let bases = [
        sys::map_file(0, pages, RW, libc::MAP_SHARED, fd)?,
        sys::map(0, pages, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS)?,
    ];
    let mut areas = bases.map(|base| Area::at(base, ctx.seed, pages));
    let private = Area::filled(ctx.seed ^ 4, ctx.pages())?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let child = process::fork(|| {
            for area in &mut areas {
                area.check_all("shared memory in a child")?;
                area.write_all();
            }
            private.check_all("private memory beside shared memory")
        })?;
        process::succeed("child with shared memory", child)?;
        for area in &mut areas {
            for page in 0..pages {
                area.next(page, &mut [0; PAGE]);
            }
            area.check_all("shared memory written by a child")?;
        }
        private.check_all("private memory of the parent")?;
    }
    sys::close(fd);
    Ok(())
}

/// In each run of four pages: private, shared, file, private again.
fn mixed(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let pages = ctx.pages();
    let base = sys::anon_huge(pages)?;
    let fd = sys::temp_file(0)?;
    // SAFETY: no memory is involved.
    sys::ok("ftruncate", unsafe { libc::ftruncate(fd, PAGE as i64) }.into())?;
    let mut area = Area::at(base, ctx.seed, pages);
    for page in (0..pages.min(8000)).step_by(4) {
        sys::map(area.addr(page + 1), 1, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED)?;
        sys::map_file(area.addr(page + 2), 1, RW, libc::MAP_PRIVATE | libc::MAP_FIXED, fd)?;
    }
    area.write_all();
    for round in ctx.rounds(3) {
        ballast.sweep()?;
        area.check_all("mappings of all kinds")?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    sys::close(fd);
    Ok(())
}

fn grows_down(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let pages = 2000;
    for round in ctx.rounds(2) {
        // Room below, for the kernel keeps a gap of 256 pages to the next mapping.
        let room = sys::map(0, pages + 512, libc::PROT_NONE, ANON)?;
        sys::unmap(room, pages + 512)?;
        let top = room + (pages + 511) * PAGE;
        let flags = ANON | libc::MAP_GROWSDOWN | libc::MAP_FIXED_NOREPLACE;
        sys::map(top, 1, RW, flags)?;
        let mut area = Area::at(top - (pages - 1) * PAGE, ctx.seed + round, pages);
        area.expect(0..pages - 1, State::Gone);
        for page in (0..pages).rev() {
            area.expect(page..page + 1, State::Known);
            area.check(page)?;
            area.write(page);
            if page % 500 == 0 {
                ballast.sweep()?;
            }
        }
        area.check_all("mapping that grew downward")?;
        sys::unmap(area.base, pages)?;
    }
    Ok(())
}

#[cfg(not(target_arch = "x86_64"))]
fn jit(_: &Ctx) -> Outcome {
    skip!("written for x86-64")
}

#[cfg(target_arch = "x86_64")]
fn jit(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let pages = ctx.pages() / 4;
    for (kind, round) in ctx.rounds(2).enumerate() {
        // Even: written, then made executable. Odd: writable and executable for good.
        let last = if kind % 2 == 0 { libc::PROT_READ | libc::PROT_EXEC } else { RW | libc::PROT_EXEC };
        let base = sys::map(0, pages, RW, ANON)?;
        for page in 0..pages {
            // mov eax, imm32; ret
            let value = (page as u32).wrapping_mul(2_654_435_761) ^ round as u32;
            let mut code = [0xb8, 0, 0, 0, 0, 0xc3];
            code[1..5].copy_from_slice(&value.to_le_bytes());
            // SAFETY: inside the page.
            unsafe {
                std::ptr::copy_nonoverlapping(code.as_ptr(), (base + page * PAGE + 128) as *mut u8, code.len())
            };
        }
        ballast.sweep()?;
        sys::protect(base, pages, last)?;
        ballast.sweep()?;
        for page in 0..pages {
            // SAFETY: a complete function lies there.
            let got = unsafe { std::mem::transmute::<usize, extern "C" fn() -> u32>(base + page * PAGE + 128)() };
            let wanted = (page as u32).wrapping_mul(2_654_435_761) ^ round as u32;
            ensure!(got == wanted, "code in page {page} gave {got:#x}, expected {wanted:#x}");
        }
        sys::unmap(base, pages)?;
    }
    Ok(())
}

/// The program registers a range of its own and serves it with zero pages; bytes it wrote before must stay. A
/// registration may be refused (EBUSY: the range is managed), never half done.
fn own_uffd(ctx: &Ctx) -> Outcome {
    const API: u64 = 0xc018_aa3f;
    const REGISTER: u64 = 0xc020_aa00;
    const UNREGISTER: u64 = 0x8010_aa01;
    const ZEROPAGE: u64 = 0xc020_aa04;
    let mut ballast = Ballast::new(ctx)?;
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as i32;
    if fd < 0 {
        skip!("userfaultfd: {}", std::io::Error::last_os_error());
    }
    let mut api = [0xaau64, 0, 0];
    // SAFETY: the structure has the kernel's layout.
    sys::ok("UFFDIO_API", unsafe { libc::ioctl(fd, API as _, api.as_mut_ptr()) }.into())?;
    let pages = ctx.pages() / 8;
    for round in ctx.rounds(2) {
        let mut area = Area::new(ctx.seed, pages)?;
        for page in 0..pages / 2 {
            area.write(page);
        }
        ballast.sweep()?;
        let mut register = [area.base as u64, (pages * PAGE) as u64, 1, 0];
        // SAFETY: as above.
        let result = unsafe { libc::ioctl(fd, REGISTER as _, register.as_mut_ptr()) };
        if result < 0 {
            ensure!(sys::errno() == libc::EBUSY, "UFFDIO_REGISTER: {}", std::io::Error::last_os_error());
            area.check_all("range whose registration was refused")?;
            continue;
        }
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let mut served = 0usize;
                while served < pages / 2 {
                    let mut message = [0u64; 4];
                    // SAFETY: one message of 32 bytes fits.
                    let got = unsafe { libc::read(fd, message.as_mut_ptr().cast(), 32) };
                    ensure!(
                        got == 32 && message[0] as u8 == 0x12,
                        "reading the descriptor gave {got}, event {:#x}",
                        message[0]
                    );
                    let mut zero = [message[2] & !4095, PAGE as u64, 0, 0];
                    // SAFETY: as above.
                    sys::ok(
                        "UFFDIO_ZEROPAGE",
                        unsafe { libc::ioctl(fd, ZEROPAGE as _, zero.as_mut_ptr()) }.into(),
                    )?;
                    served += 1;
                }
                Ok(())
            });
            let outcome = area.check_all("range under the program's own userfaultfd");
            crate::harness::all([outcome, crate::harness::join(server)])
        })?;
        let mut range = [area.base as u64, (pages * PAGE) as u64];
        // SAFETY: as above.
        sys::ok("UFFDIO_UNREGISTER", unsafe { libc::ioctl(fd, UNREGISTER as _, range.as_mut_ptr()) }.into())?;
        area.scribble(&mut ctx.rng(round), 2);
        ballast.sweep()?;
        area.check_all("range no longer under the program's own userfaultfd")?;
        sys::unmap(area.base, pages)?;
    }
    sys::close(fd);
    Ok(())
}

fn many(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let pages = ctx.pages().min(20_000);
    let base = sys::anon(pages * 2)?;
    let mut areas = Vec::new();
    for number in 0..pages {
        // Every second page has other rights: each page is a mapping.
        sys::protect(base + (number * 2 + 1) * PAGE, 1, libc::PROT_NONE)?;
        areas.push(Area::at(base + number * 2 * PAGE, ctx.seed + number as u64, 1));
    }
    for _ in ctx.rounds(3) {
        areas.iter_mut().for_each(|area| area.poke(0));
        ballast.sweep()?;
        areas.iter().try_for_each(|area| area.check(0))?;
    }
    let half = pages / 2;
    for number in 0..half {
        sys::unmap(base + number * 2 * PAGE, 1)?;
    }
    ballast.sweep()?;
    areas[half..].iter().try_for_each(|area| area.check(0))
}

fn sparse(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let total = 64usize << 18;
    let base = match sys::map(0, total, libc::PROT_NONE, ANON) {
        Ok(base) => base,
        Err(failure) => skip!("64 GiB of address space: {failure}"),
    };
    let mut rng = ctx.rng(0);
    let mut pieces: Vec<Area> = Vec::new();
    let mut held = 0;
    for _ in ctx.rounds(2) {
        while held < ctx.pages() {
            let len = rng.between(1, 300);
            let from = rng.below(total - len);
            let is_free = pieces
                .iter()
                .all(|p| base + (from + len) * PAGE <= p.base || base + from * PAGE >= p.addr(p.len()));
            if is_free {
                sys::protect(base + from * PAGE, len, RW)?;
                let mut piece = Area::at(base + from * PAGE, ctx.seed ^ from as u64, len);
                piece.write_all();
                held += len;
                pieces.push(piece);
            }
        }
        ballast.sweep()?;
        pieces.iter().try_for_each(|piece| piece.check_all("piece of a huge reservation"))?;
        for _ in 0..pieces.len() / 2 {
            let piece = pieces.swap_remove(rng.below(pieces.len()));
            sys::map(piece.base, piece.len(), libc::PROT_NONE, ANON | libc::MAP_FIXED)?;
            held -= piece.len();
        }
    }
    sys::unmap(base, total)
}

fn stride(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let chunks = ctx.pages().min(4096);
    let base = sys::anon(chunks * 512)?;
    let mut areas: Vec<Area> =
        (0..chunks).map(|n| Area::at(base + (n * 512 + n * 7 % 512) * PAGE, ctx.seed + n as u64, 1)).collect();
    for _ in ctx.rounds(3) {
        areas.iter_mut().for_each(|area| area.poke(0));
        ballast.sweep()?;
        areas.iter().try_for_each(|area| area.check(0))?;
        check_zero("page between the used ones", base + 511 * PAGE - PAGE, 1)?;
    }
    sys::unmap(base, chunks * 512)
}

const GLOBAL_PAGES: usize = 1024;
#[repr(align(4096))]
struct Global(std::cell::UnsafeCell<[u8; GLOBAL_PAGES * PAGE]>);
// SAFETY: only the one thread of the case `globals` touches it.
unsafe impl Sync for Global {}
static BSS: Global = Global(std::cell::UnsafeCell::new([0; GLOBAL_PAGES * PAGE]));
static mut DATA: [[u64; PAGE / 8]; 65] = [[0x6d6d_6d6d_6d6d_6d6d; PAGE / 8]; 65];

fn globals(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::of(ctx, ctx.pages() * 3)?;
    let mut area = Area::at(BSS.0.get() as usize, ctx.seed, GLOBAL_PAGES);
    let data = (&raw mut DATA as usize).next_multiple_of(PAGE);
    for round in ctx.rounds(3) {
        ballast.sweep()?;
        area.check_all("zero-initialised static data")?;
        area.scribble(&mut ctx.rng(round), 2);
        for page in 0..64usize {
            // SAFETY: inside the static.
            let bytes = unsafe { std::slice::from_raw_parts_mut((data + page * PAGE) as *mut u8, PAGE) };
            let wanted = if page % 2 == 0 { 0x6d } else { (round as u8).wrapping_add(0x6d) };
            if let Some(at) = bytes.iter().position(|&b| b != wanted) {
                bail!(
                    "initialised static data: byte {at} of page {page} is {:#x}, expected {wanted:#x}",
                    bytes[at]
                );
            }
            if page % 2 == 1 {
                bytes.fill((round as u8 + 1).wrapping_add(0x6d));
            }
        }
    }
    Ok(())
}
