//! madvise before a fork: what is wiped is zero in the child, what is kept from it is absent.

use crate::area::{Area, Ballast, State, check_zero};
use crate::harness::{Case, Ctx, Outcome, ensure};
use crate::model::PAGE;
use crate::process;
use crate::sys;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub const CASES: &[Case] = &[
    Case::new(
        "madvise-wipeonfork",
        "WIPEONFORK pages are zero in a child, DONTFORK pages absent, others right",
        wipe,
    ),
    Case::new("madvise-wipe-many", "300 WIPEONFORK pages apart are zero in a child", wipe_many),
    Case::new("madvise-wipe-vector", "process_madvise of oneself: wiped in a child, guarded", wipe_vector),
    Case::new("madvise-wipe-early", "WIPEONFORK given by a constructor", wipe_early),
    Case::new(
        "madvise-wipe-deep",
        "WIPEONFORK by a thread whose own stack is cold, while another faults",
        wipe_deep,
    ),
    Case::new("madvise-wipe-bounds", "WIPEONFORK of 32 GiB and of memory nobody may read", wipe_bounds).warm(),
];

fn wipe(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let third = area.len() / 3;
    for round in ctx.rounds(2) {
        sys::advise(area.base, third, libc::MADV_WIPEONFORK)?;
        sys::advise(area.addr(third), third, libc::MADV_DONTFORK)?;
        ballast.sweep()?;
        let child = process::fork(|| {
            check_zero("WIPEONFORK pages in a child", area.base, third)?;
            area.zeroed(0..third);
            area.expect(third..2 * third, State::Gone);
            area.check_all("other pages in a child")?;
            let mut there = 0u8;
            // SAFETY: asks the kernel whether the page is there.
            let error = unsafe { libc::mincore(area.addr(third) as *mut _, PAGE, &raw mut there) };
            ensure!(error < 0, "a DONTFORK page is mapped in the child");
            let base = match sys::map(area.addr(third), third, sys::RW, sys::ANON | libc::MAP_FIXED_NOREPLACE) {
                // Somebody else's new mapping took a part of the hole: it is not the parent's.
                Err(error) if error.to_string().contains("File exists") => return Ok(()),
                other => other?,
            };
            check_zero("mapped in the child where DONTFORK pages were", base, third)
        })?;
        area.check_all("parent")?;
        process::succeed("child with wiped pages", child)?;
        sys::advise(area.base, third, libc::MADV_KEEPONFORK)?;
        sys::advise(area.addr(third), third, libc::MADV_DOFORK)?;
        let child = process::fork(|| area.check_all("child without wiped pages"))?;
        process::succeed("child without wiped pages", child)?;
        area.scribble(&mut ctx.rng(round), 2);
    }
    Ok(())
}

/// What the calling thread's frames take of its stack before the call: more than what never leaves next to its control block.
const DEPTH: usize = 64 << 10;
/// More than is brought back without stopping reclaim.
const LONG_PAGES: usize = (3 << 20) / PAGE;

/// The call looks for pages that are away under the handler's lock, on a stack that reclaim takes away as any memory.
fn wipe_deep(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let wiped = Area::filled(ctx.seed ^ 1, LONG_PAGES)?;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| {
            let mut frame = [0_u8; DEPTH];
            std::hint::black_box(&mut frame);
            while !is_over.load(Ordering::Relaxed) {
                sys::advise(wiped.base, LONG_PAGES, libc::MADV_WIPEONFORK)?;
                std::thread::sleep(Duration::from_micros(100));
            }
            std::hint::black_box(&mut frame);
            wiped.check_all("WIPEONFORK pages, here")
        });
        let result = ctx.rounds(4).try_for_each(|round| {
            // Here and there: what leaves is single pages, then.
            let mut rng = ctx.rng(round);
            area.scribble(&mut rng, 4);
            (0..area.len()).try_for_each(|_| area.check(rng.below(area.len())))
        });
        let result = result.and_then(|()| area.check_all("beside a thread that calls madvise"));
        is_over.store(true, Ordering::Relaxed);
        result.and(caller.join().expect("a thread"))
    })
}

/// Every second page: no two ranges touch.
fn wipe_many(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 300;
    let mut area = Area::filled(ctx.seed, COUNT * 2)?;
    for page in (0..area.len()).step_by(2) {
        sys::advise(area.addr(page), 1, libc::MADV_WIPEONFORK)?;
    }
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        ballast.sweep()?;
        let child = process::fork(|| {
            for page in (0..area.len()).step_by(2) {
                check_zero("one of many WIPEONFORK pages", area.addr(page), 1)?;
                area.zeroed(page..page + 1);
            }
            area.check_all("between WIPEONFORK pages")
        })?;
        process::succeed("child with many wiped pages", child)?;
        area.check_all("parent of a child with many wiped pages")?;
        area.scribble(&mut ctx.rng(round), 2);
    }
    Ok(())
}

/// The C library's process_madvise (glibc 2.36), which the linker may not know.
fn process_madvise(pieces: &[libc::iovec], advice: i32) -> Result<usize, i32> {
    type Call = unsafe extern "C" fn(i32, *const libc::iovec, usize, i32, u32) -> isize;
    // SAFETY: a valid name; the function has this type; the pieces are the caller's.
    unsafe {
        let found = libc::dlsym(libc::RTLD_DEFAULT, c"process_madvise".as_ptr());
        if found.is_null() {
            return Err(libc::ENOSYS);
        }
        let call: Call = std::mem::transmute(found);
        let me = libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) as i32;
        let got = call(me, pieces.as_ptr(), pieces.len(), advice, 0);
        let error = sys::errno();
        sys::close(me);
        usize::try_from(got).map_err(|_| error)
    }
}

fn wipe_vector(ctx: &Ctx) -> Outcome {
    const INSTALL: i32 = 102;
    const REMOVE: i32 = 103;
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let third = area.len() / 3;
    let piece = |page: usize, pages: usize| libc::iovec {
        iov_base: (area.base + page * PAGE) as *mut _,
        iov_len: pages * PAGE,
    };
    let (wiped, guarded) = ([piece(0, 8), piece(8, third - 8)], [piece(third, third)]);
    match process_madvise(&wiped, libc::MADV_WIPEONFORK) {
        Ok(got) => ensure!(got == third * PAGE, "process_madvise took {got} bytes of {}", third * PAGE),
        Err(error) => crate::harness::skip!("process_madvise(MADV_WIPEONFORK): error {error}"),
    }
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        ballast.sweep()?;
        if let Ok(got) = process_madvise(&guarded, INSTALL) {
            ensure!(got == third * PAGE, "process_madvise guarded {got} bytes of {}", third * PAGE);
            process_madvise(&guarded, REMOVE).ok();
            area.zeroed(third..2 * third);
        }
        let child = process::fork(|| {
            check_zero("pages wiped by process_madvise", area.base, third)?;
            area.zeroed(0..third);
            area.check_all("other pages in a child")
        })?;
        process::succeed("child with pages wiped by process_madvise", child)?;
        area.check_all("after process_madvise")?;
        area.scribble(&mut ctx.rng(round), 2);
        area.write_all();
    }
    Ok(())
}

/// Pages that the constructor below has set aside.
const EARLY_PAGES: usize = 64;
static EARLY: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// Runs before the constructors of all other objects.
extern "C" fn set_aside() {
    let is_asked = std::fs::read("/proc/self/cmdline")
        .is_ok_and(|text| text.split(|&byte| byte == 0).any(|word| word == b"madvise-wipe-early"));
    if !is_asked {
        return;
    }
    if let Ok(base) = sys::anon(EARLY_PAGES)
        && sys::advise(base, EARLY_PAGES, libc::MADV_WIPEONFORK).is_ok()
    {
        EARLY.store(base, std::sync::atomic::Ordering::Relaxed);
    }
}

#[used]
#[unsafe(link_section = ".preinit_array")]
static SET_ASIDE: extern "C" fn() = set_aside;

fn wipe_early(ctx: &Ctx) -> Outcome {
    let base = EARLY.load(std::sync::atomic::Ordering::Relaxed);
    ensure!(base != 0, "the constructor did not run");
    let mut area = Area::at(base, ctx.seed, EARLY_PAGES);
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(2) {
        area.write_all();
        ballast.sweep()?;
        ballast.sweep()?;
        let child = process::fork(|| check_zero("pages wiped early", base, EARLY_PAGES))?;
        process::succeed("child with pages wiped early", child)?;
        area.check_all("parent with pages wiped early")?;
    }
    Ok(())
}

fn wipe_bounds(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    let pages = 32 << 18;
    let (wide, none) = (sys::anon(pages)?, sys::map(0, 256, libc::PROT_NONE, sys::ANON)?);
    let start = std::time::Instant::now();
    sys::advise(wide, pages, libc::MADV_WIPEONFORK)?;
    let took = start.elapsed();
    ensure!(took.as_millis() < 2000, "MADV_WIPEONFORK of untouched memory took {took:?}");
    sys::advise(none, 256, libc::MADV_WIPEONFORK)?;
    ballast.sweep()?;
    sys::unmap(wide, pages)?;
    sys::unmap(none, 256)
}
