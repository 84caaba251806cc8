//! madvise on cold ranges: what is dropped is zero, what is not dropped stays.

use crate::area::{Area, Ballast, State, check_zero};
use crate::harness::{Case, Ctx, Outcome, bail, ensure, threads};
use crate::model::PAGE;
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
