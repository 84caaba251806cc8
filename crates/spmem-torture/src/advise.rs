//! madvise on cold ranges: what is dropped is zero, what is not dropped stays.

use crate::area::{Area, Ballast, State, check_zero};
use crate::harness::{Case, Ctx, Outcome, bail, ensure, threads};
use crate::model::PAGE;
use crate::process;
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("dontneed", "MADV_DONTNEED on cold pages leaves zeros, neighbours intact", dontneed),
    Case::new("dontneed-threads", "the same from four threads at once", dontneed_threads),
    Case::new("dontneed-jemalloc", "an allocator's purge and reuse loop", purge),
    Case::new("dontneed-shared-chunk", "threads that drop and fill pages of the same 2 MiB", shared_chunk),
    Case::new("dontneed-vector", "process_madvise drops a vector of pieces", vector),
    Case::new("madvise-free", "MADV_FREE: old or zero until written, then kept", lazy),
    Case::new("madvise-populate", "MADV_POPULATE_READ and _WRITE bring cold pages right", populate),
    Case::new("madvise-hints", "WILLNEED, COLD, PAGEOUT, RANDOM, SEQUENTIAL change no byte", hints),
    Case::new(
        "madvise-wipeonfork",
        "WIPEONFORK pages are zero in a child, DONTFORK pages absent, others right",
        wipe,
    ),
    Case::new("madvise-wipe-many", "300 WIPEONFORK pages apart are zero in a child", wipe_many),
    Case::new("madvise-wipe-vector", "process_madvise of oneself: wiped in a child, guarded", wipe_vector),
    Case::new("madvise-wipe-early", "WIPEONFORK given by a constructor", wipe_early),
    Case::new("madvise-wipe-bounds", "WIPEONFORK of 32 GiB and of memory nobody may read", wipe_bounds).warm(),
    Case::new(
        "madvise-guard-refused",
        "MADV_GUARD_INSTALL that the kernel refuses changes no byte",
        guard_refused,
    ),
    Case::new("madvise-guard", "guard pages refuse access; removed, they are zero and neighbours intact", guard),
];

fn dontneed(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        for _ in 0..80 {
            let from = rng.below(area.len());
            let to = (from + rng.between(1, 600)).min(area.len());
            sys::advise(area.addr(from), to - from, libc::MADV_DONTNEED)?;
            area.zeroed(from..to);
            match rng.below(3) {
                0 => check_zero("dropped pages", area.addr(from), to - from)?,
                1 => area.write(from),
                _ => {}
            }
        }
        if round % 2 == 0 {
            ballast.sweep()?;
        }
        area.check_all("after MADV_DONTNEED")?;
        area.scribble(&mut rng, 2);
    }
    Ok(())
}

fn dontneed_threads(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    ballast.during(|| {
        threads(4, |id| {
            let mut rng = ctx.rng(id as u64);
            let mut area = Area::filled(ctx.seed + id as u64, ctx.pages() / 4)?;
            for _ in ctx.rounds(3) {
                for _ in 0..30 {
                    let from = rng.below(area.len());
                    let to = (from + rng.between(1, 64)).min(area.len());
                    sys::advise(area.addr(from), to - from, libc::MADV_DONTNEED)?;
                    area.zeroed(from..to);
                    area.check(from)?;
                    area.write(rng.between(from, to));
                }
                area.check_all("range of a dropping thread")?;
                area.scribble(&mut rng, 3);
            }
            Ok(())
        })
    })
}

/// Runs of pages are used, checked, purged (dropped or lazily freed) and used again, several at a time.
fn purge(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    ballast.during(|| {
        threads(2, |id| {
            let mut rng = ctx.rng(id as u64);
            let mut arena = Area::new(ctx.seed + id as u64, ctx.pages() / 2)?;
            let run = 16;
            let mut is_used = vec![false; arena.len() / run];
            for _ in ctx.rounds(3) {
                for _ in 0..is_used.len() {
                    let at = rng.below(is_used.len());
                    let pages = at * run..(at + 1) * run;
                    arena.check_order("a run of an arena", pages.clone())?;
                    if is_used[at] {
                        sys::advise(arena.addr(pages.start), run, libc::MADV_DONTNEED)?;
                        arena.zeroed(pages);
                    } else {
                        pages.for_each(|page| arena.write(page));
                    }
                    is_used[at] = !is_used[at];
                }
                arena.check_all("an arena")?;
            }
            Ok(())
        })
    })
}

/// Each of four threads owns every fourth page of the same chunks.
fn shared_chunk(ctx: &Ctx) -> Outcome {
    let pages = ctx.pages() / 4 * 4;
    let base = sys::anon(pages)?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.during(|| {
        threads(4, |id| {
            let mut rng = ctx.rng(id as u64);
            let mut mine: Vec<Area> = (id..pages)
                .step_by(4)
                .map(|page| Area::at(base + page * PAGE, ctx.seed + page as u64, 1))
                .collect();
            for _ in ctx.rounds(2) {
                for area in &mut mine {
                    area.check(0)?;
                    if rng.one_in(3) {
                        sys::advise(area.base, 1, libc::MADV_DONTNEED)?;
                        area.zeroed(0..1);
                    } else if rng.one_in(2) {
                        area.write(0);
                    }
                }
            }
            mine.iter().try_for_each(|area| area.check(0))
        })
    })
}

fn vector(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut rng = ctx.rng(0);
    // SAFETY: no memory is involved.
    let me = sys::ok("pidfd_open", unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) })?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let pieces: Vec<usize> = (0..200).map(|_| rng.below(area.len())).collect();
        let vector: Vec<libc::iovec> = pieces
            .iter()
            .map(|&page| libc::iovec { iov_base: area.addr(page) as *mut _, iov_len: PAGE })
            .collect();
        // SAFETY: the pieces are ours.
        let got = unsafe {
            libc::syscall(libc::SYS_process_madvise, me, vector.as_ptr(), vector.len(), libc::MADV_DONTNEED, 0)
        };
        if got < 0 && sys::errno() == libc::EINVAL {
            crate::harness::skip!("process_madvise does not take MADV_DONTNEED on this kernel");
        }
        ensure!(
            got as usize == vector.len() * PAGE,
            "process_madvise took {got} bytes of {}",
            vector.len() * PAGE
        );
        for page in pieces {
            area.zeroed(page..page + 1);
        }
        area.check_all("after process_madvise")?;
        area.scribble(&mut rng, 2);
    }
    sys::close(me as i32);
    Ok(())
}

fn lazy(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        for _ in 0..40 {
            let from = rng.below(area.len());
            let to = (from + rng.between(1, 600)).min(area.len());
            sys::advise(area.addr(from), to - from, libc::MADV_FREE)?;
            area.expect(from..to, State::Lazy);
            for page in (from..to).step_by(3) {
                area.write(page);
            }
        }
        ballast.sweep()?;
        area.check_all("after MADV_FREE")?;
        area.write_all();
        ballast.sweep()?;
        area.check_all("written after MADV_FREE")?;
    }
    Ok(())
}

fn populate(ctx: &Ctx) -> Outcome {
    const READ: i32 = 22;
    const WRITE: i32 = 23;
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut rng = ctx.rng(0);
    for round in ctx.rounds(2) {
        for advice in [READ, WRITE] {
            ballast.sweep()?;
            let from = rng.below(area.len() / 2);
            let pages = area.len() / 2;
            match sys::advise_raw(area.addr(from), pages, advice) {
                0 => {}
                libc::EINVAL => crate::harness::skip!("this kernel has no MADV_POPULATE"),
                error => bail!("MADV_POPULATE ({advice}): {}", std::io::Error::from_raw_os_error(error)),
            }
            area.check_all("populated range")?;
        }
        let drop = round as usize % area.len();
        sys::advise(area.base, drop, libc::MADV_DONTNEED)?;
        area.zeroed(0..drop);
        sys::advise(area.base, area.len(), WRITE)?;
        area.check_all("populated after a drop")?;
        area.scribble(&mut rng, 2);
    }
    let flags = sys::ANON | libc::MAP_POPULATE;
    let base = sys::map(0, ctx.pages(), sys::RW, flags)?;
    check_zero("MAP_POPULATE", base, ctx.pages())
}

fn hints(ctx: &Ctx) -> Outcome {
    const COLD: i32 = 20;
    const PAGEOUT: i32 = 21;
    let advices = [
        libc::MADV_WILLNEED,
        COLD,
        PAGEOUT,
        libc::MADV_RANDOM,
        libc::MADV_SEQUENTIAL,
        libc::MADV_NORMAL,
        libc::MADV_DONTDUMP,
        libc::MADV_DODUMP,
        libc::MADV_MERGEABLE,
        libc::MADV_UNMERGEABLE,
    ];
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut rng = ctx.rng(0);
    for _ in ctx.rounds(1) {
        for advice in advices {
            ballast.sweep()?;
            let from = rng.below(area.len() / 2);
            match sys::advise_raw(area.addr(from), area.len() / 2, advice) {
                0 | libc::EINVAL => {}
                error => bail!("madvise({advice}): {}", std::io::Error::from_raw_os_error(error)),
            }
            area.check_order(&format!("after madvise({advice})"), (0..area.len()).step_by(3))?;
            area.scribble(&mut rng, 4);
        }
        area.check_all("after hints")?;
    }
    Ok(())
}

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

fn guard(ctx: &Ctx) -> Outcome {
    const INSTALL: i32 = 102;
    const REMOVE: i32 = 103;
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut rng = ctx.rng(0);
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        for _ in 0..40 {
            let from = rng.below(area.len() - 20);
            match sys::advise_raw(area.addr(from), 20, INSTALL) {
                0 => area.expect(from..from + 20, State::Gone),
                libc::EINVAL => crate::harness::skip!("this kernel has no MADV_GUARD_INSTALL"),
                error => bail!("MADV_GUARD_INSTALL: {}", std::io::Error::from_raw_os_error(error)),
            }
        }
        ballast.sweep()?;
        area.check_all("around guard pages")?;
        let child = process::fork(|| {
            let page = (0..area.len()).find(|&page| area.model[page].state == State::Gone).unwrap_or(0);
            // SAFETY: the access must end this process.
            unsafe { ((area.addr(page) + 8) as *const u8).read_volatile() };
            Ok(())
        })?;
        process::ends("child that reads a guard page", child, process::End::Signal(libc::SIGSEGV))?;
        for page in 0..area.len() {
            if area.model[page].state == State::Gone {
                sys::advise(area.addr(page), 1, REMOVE)?;
                area.zeroed(page..page + 1);
            }
        }
        area.check_all("guard pages removed")?;
        area.scribble(&mut rng, 2);
    }
    Ok(())
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

/// A seccomp filter plays a kernel without guards.
fn guard_refused(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    ballast.sweep()?;
    let child = process::fork(|| {
        refuse_guards()?;
        ballast.sweep()?;
        let error = sys::advise_raw(area.base, area.len() / 2, 102);
        ensure!(error == libc::EINVAL, "MADV_GUARD_INSTALL gave error {error}");
        area.check_all("after guards were refused")
    })?;
    process::succeed("child whose guards are refused", child)?;
    area.check_all("parent of a child whose guards are refused")
}

fn refuse_guards() -> Outcome {
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |offset| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let unless = |value, skip| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skip, value);
    let give = |value| step(libc::BPF_RET | libc::BPF_K, 0, 0, value);
    // struct seccomp_data: the number at 0, the third argument at 32.
    let mut steps = [
        load(0),
        unless(libc::SYS_madvise as u32, 3),
        load(32),
        unless(102, 1),
        give(libc::SECCOMP_RET_ERRNO | libc::EINVAL as u32),
        give(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the program lives as long as the calls.
    unsafe {
        sys::ok("PR_SET_NO_NEW_PRIVS", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        sys::ok("PR_SET_SECCOMP", libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program).into())?;
    }
    Ok(())
}
