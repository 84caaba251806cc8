//! Threads that read and write while pages leave.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, all, ensure, join, threads};
use crate::model::{PAGE, Rng};
use crate::sys;
use std::io::Read;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};

pub const CASES: &[Case] = &[
    Case::new("threads-1", "one thread's pages keep every write", |ctx| disjoint(ctx, 1)),
    Case::new("threads-2", "two threads' disjoint pages keep every write", |ctx| disjoint(ctx, 2)),
    Case::new("threads-4", "four threads' disjoint pages keep every write", |ctx| disjoint(ctx, 4)),
    Case::new(
        "threads-interleaved",
        "threads that write neighbouring pages do not disturb each other",
        interleaved,
    ),
    Case::new("threads-shared", "atomic counters in cold pages lose no increment", shared),
    Case::new("threads-herd", "threads that fault on one page together all see it right", herd),
    Case::new("threads-crowd", "1100 threads that wait for cold pages at once all get theirs", crowd),
    Case::new("threads-monotonic", "no reader ever sees an older value than before", monotonic),
    Case::new("threads-race-write", "a write racing with eviction is never lost", race_write),
    Case::new("sweep-sequential", "pages swept in order keep their bytes", |ctx| sweep(ctx, false)),
    Case::new("sweep-random", "pages visited at random keep their bytes", |ctx| sweep(ctx, true)),
    Case::new("sweep-poke", "64-byte writes to cold pages keep the rest of the page", pokes),
    Case::new("sweep-clean", "pages only read keep their bytes over many rounds", clean),
];

fn disjoint(ctx: &Ctx, count: usize) -> Outcome {
    let areas = Area::filled(ctx.seed, ctx.pages() * 3)?.split(count);
    all(std::thread::scope(|scope| {
        let running: Vec<_> = areas
            .into_iter()
            .enumerate()
            .map(|(id, mut area)| {
                let mut rng = ctx.rng(id as u64);
                scope.spawn(move || {
                    for _ in ctx.rounds(2) {
                        area.check_all("own pages of a thread")?;
                        area.scribble(&mut rng, 3);
                        visits(&mut area, &mut rng)?;
                    }
                    area.check_all("own pages of a thread, at the end")
                })
            })
            .collect();
        running.into_iter().map(join).collect::<Vec<_>>()
    }))
}

fn visits(area: &mut Area, rng: &mut Rng) -> Outcome {
    for _ in 0..area.len() / 2 {
        let page = rng.below(area.len());
        match rng.below(4) {
            0 => area.write(page),
            1 => area.poke(page),
            _ => area.check(page)?,
        }
    }
    Ok(())
}

/// Thread `t` of 4 owns every fourth page: eviction batches and fault-around always hold pages of others.
fn interleaved(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 4;
    let pages = ctx.pages() * 3 / COUNT * COUNT;
    let base = sys::anon(pages)?;
    threads(COUNT, |id| {
        let mut mine: Vec<Area> = (id..pages)
            .step_by(COUNT)
            .map(|page| Area::at(base + page * PAGE, ctx.seed + page as u64, 1))
            .collect();
        let mut rng = ctx.rng(id as u64);
        for _ in ctx.rounds(2) {
            for area in &mut mine {
                area.check(0)?;
                if rng.one_in(2) {
                    area.poke(0);
                }
            }
        }
        mine.iter().try_for_each(|area| area.check(0))
    })
}

/// Address of one of the counters of a page.
fn counter<'a>(base: usize, page: usize, slot: usize) -> &'a AtomicU64 {
    // SAFETY: inside a mapping that is never unmapped, aligned, and only used as an atomic.
    unsafe { AtomicU64::from_ptr((base + page * PAGE + slot * 8) as *mut u64) }
}

fn shared(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 4;
    let pages = ctx.pages() * 2;
    let base = sys::anon(pages)?;
    let mut ballast = Ballast::of(ctx, ctx.pages())?;
    let added = AtomicU64::new(0);
    for _ in ctx.rounds(3) {
        threads(COUNT, |id| {
            let mut rng = ctx.rng(added.load(Relaxed) + id as u64);
            for _ in 0..pages / 2 {
                // All threads draw from the same few slots, so that pages are shared in fact.
                counter(base, rng.below(pages), rng.below(4) * 128).fetch_add(1, Relaxed);
            }
            added.fetch_add(pages as u64 / 2, Relaxed);
            Ok(())
        })?;
        ballast.sweep()?;
        let found: u64 =
            (0..pages).flat_map(|page| (0..512).map(move |slot| counter(base, page, slot).load(Relaxed))).sum();
        let wanted = added.load(Relaxed);
        ensure!(
            found == wanted,
            "counters add up to {found}, expected {wanted}: {} lost",
            wanted as i64 - found as i64
        );
    }
    Ok(())
}

fn herd(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 4;
    let area = Area::filled(ctx.seed, ctx.pages().min(4096))?;
    let mut ballast = Ballast::new(ctx)?;
    let barrier = Barrier::new(COUNT);
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        threads(COUNT, |_| {
            let mut outcome = Ok(());
            for page in (0..area.len()).step_by(5) {
                barrier.wait();
                outcome = outcome.and(area.check(page));
            }
            outcome
        })?;
        area.check_all("after the herd")?;
    }
    Ok(())
}

fn crowd(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 1100;
    const EACH: usize = 2;
    let area = Area::filled(ctx.seed, COUNT * EACH)?;
    // The stacks of so many threads keep these pages out, and are a thousand ranges for each sweep to look at: before them is soon enough.
    Ballast::of(ctx, ctx.pages())?.sweep()?;
    let ready = AtomicUsize::new(0);
    // Little stack is used, and who waits in the kernel uses none: what 1100 threads need at once is more than the budget.
    let (gate, opener) = std::io::pipe()?;
    let wait = |number: usize| {
        ready.fetch_add(1, Relaxed);
        let opened = (&gate).read(&mut [0]);
        ensure!(matches!(opened, Ok(0)), "the gate gave {opened:?}");
        for page in number * EACH..(number + 1) * EACH {
            // SAFETY: a word of the area, which nobody writes.
            unsafe { std::ptr::read_volatile(area.addr(page) as *const u64) };
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let wait = &wait;
        let start = |number| {
            let small = std::thread::Builder::new().stack_size(64 << 10);
            small.spawn_scoped(scope, move || wait(number)).expect("a thread of a crowd")
        };
        let crowd: Vec<_> = (0..COUNT).map(start).collect();
        while ready.load(Relaxed) < COUNT {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        drop(opener);
        all(crowd.into_iter().map(join))
    })?;
    area.check_all("a crowd's pages")
}

/// One thread raises a counter in each page; others must never see it fall: a stale copy that comes back would show.
fn monotonic(ctx: &Ctx) -> Outcome {
    let pages = ctx.pages().min(8192);
    let base = sys::anon(pages)?;
    let mut ballast = Ballast::new(ctx)?;
    let stop = AtomicBool::new(false);
    ballast.during(|| {
        threads(3, |id| {
            let mut seen = vec![0u64; pages];
            let mut rng = ctx.rng(id as u64);
            let mut round = 0u64;
            while !stop.load(Relaxed) || round < 2 {
                round += 1;
                for _ in 0..pages {
                    let page = rng.below(pages);
                    let cell = counter(base, page, 256);
                    let found = if id == 0 { cell.fetch_add(1, Relaxed) } else { cell.load(Relaxed) };
                    let right = if id == 0 { found == seen[page] } else { found >= seen[page] };
                    ensure!(
                        right,
                        "page {page} at {:#x}: value {found} after {} (thread {id})",
                        base + page * PAGE,
                        seen[page]
                    );
                    seen[page] = if id == 0 { found + 1 } else { found };
                }
                if ctx.is_over() {
                    stop.store(true, Relaxed);
                }
            }
            Ok(())
        })
    })
}

/// Each page gets one plain store after another with nothing between, while a sweeper drives it out: the window
/// between taking a page's bytes and dropping it is hit sooner or later.
fn race_write(ctx: &Ctx) -> Outcome {
    let pages = ctx.pages();
    let base = sys::anon(pages)?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.during(|| {
        threads(2, |id| {
            let mut wanted = vec![0u64; pages];
            let mut rng = ctx.rng(id as u64);
            for round in ctx.rounds(3) {
                for _ in 0..pages {
                    let page = rng.below(pages);
                    let cell = (base + page * PAGE + 64 + id * 8) as *mut u64;
                    // SAFETY: this thread's own word of a page that stays mapped.
                    let found = unsafe { cell.read_volatile() };
                    ensure!(
                        found == wanted[page],
                        "page {page}, word at {cell:?}: found {found}, expected {}",
                        wanted[page]
                    );
                    for step in 1..=20 {
                        wanted[page] = (round << 32 | page as u64) + step;
                        // SAFETY: as above.
                        unsafe { cell.write_volatile(wanted[page]) };
                    }
                }
            }
            Ok(())
        })
    })
}

fn sweep(ctx: &Ctx, is_random: bool) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages() * 3)?;
    let mut rng = ctx.rng(0);
    for round in ctx.rounds(3) {
        if is_random {
            visits(&mut area, &mut rng)?;
        } else if round % 2 == 0 {
            area.check_all("forward sweep")?;
        } else {
            area.check_order("backward sweep", (0..area.len()).rev())?;
        }
        for page in (0..area.len()).filter(|page| page % 4 == round as usize % 4) {
            area.write(page);
        }
    }
    area.check_all("last sweep")
}

fn pokes(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages() * 3)?;
    for _ in ctx.rounds(3) {
        for page in 0..area.len() {
            area.poke(page);
        }
    }
    area.check_all("after small writes")
}

fn clean(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages() * 3)?;
    for round in ctx.rounds(4) {
        area.check_all(&format!("read-only round {round}"))?;
    }
    Ok(())
}
