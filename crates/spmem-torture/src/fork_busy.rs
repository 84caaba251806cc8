//! Fork while other threads write, unmap, move and advise: the child sees one moment of it.

use crate::area::{Area, Ballast, check_zero};
use crate::harness::{Case, Ctx, Outcome, Res, all, ensure, join};
use crate::model::PAGE;
use crate::process;
use crate::sys::{self, RW};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub const CASES: &[Case] = &[
    Case::new("fork-while-writing", "a fork amid another thread's ordered stores sees a moment that was", writing),
    Case::new("fork-while-unmapping", "a fork amid munmap and mmap of cold ranges", |ctx| busy(ctx, unmapping)),
    Case::new("fork-while-remapping", "a fork amid mremap of cold ranges", |ctx| busy(ctx, remapping)),
    Case::new("fork-of-moving", "the child of a fork amid mremap has the range where it is, and whole", |ctx| {
        moving(ctx, || unsafe_fork(Kind::Announced))
    }),
    Case::new("raw-of-moving", "so has the child of a raw clone", |ctx| moving(ctx, || unsafe_fork(Kind::Raw))),
    Case::new("raw-beside-fork", "threads that fork, each in its own way, at the same time", beside),
    Case::new("fork-while-cloning", "a fork amid raw children that end at once, while pages come and go", |ctx| {
        busy(ctx, cloning)
    }),
    Case::new("fork-while-advising", "a fork amid MADV_DONTNEED of cold ranges", |ctx| busy(ctx, advising)),
    Case::new("fork-while-protecting", "a fork amid mprotect of cold ranges", |ctx| busy(ctx, protecting)),
    Case::new("fork-while-threading", "a fork amid threads that come and go", |ctx| busy(ctx, threading)),
];

/// The writer stores n to page 0, 1, 2 ... in turn, then n + 1. A child that sees n + 1 in a page must see it in all
/// pages before, and n or n + 1 after.
fn writing(ctx: &Ctx) -> Outcome {
    let pages = 512.min(ctx.pages());
    let base = sys::anon(pages)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let stop = AtomicBool::new(false);
    let cell = |page: usize| {
        // SAFETY: inside a mapping that stays; only used as an atomic.
        unsafe { AtomicU64::from_ptr((base + page * PAGE + 8 * (page % 512)) as *mut u64) }
    };
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for value in 1.. {
                for page in 0..pages {
                    cell(page).store(value, Ordering::Release);
                }
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            Ok(())
        });
        let outcome = (|| -> Outcome {
            for _ in ctx.rounds(2) {
                ballast.sweep()?;
                for _ in 0..10 {
                    let child = process::fork(|| {
                        let values: Vec<u64> = (0..pages).map(|page| cell(page).load(Ordering::Acquire)).collect();
                        let torn = values.windows(2).position(|pair| pair[1] > pair[0] || pair[1] + 1 < values[0]);
                        ensure!(
                            torn.is_none(),
                            "page {torn:?}: {:?} follow the first value {}",
                            torn.map(|at| &values[at..at + 2]),
                            values[0]
                        );
                        area.check_order("child of a writing process", (0..area.len()).step_by(61))
                    })?;
                    process::succeed("child of a writing process", child)?;
                }
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        all([outcome, join(writer)])
    })
}

/// One thread works on its own ranges, another forks; the child checks memory that nobody disturbs.
fn busy(ctx: &Ctx, work: fn(&Ctx, u64) -> Outcome) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages() / 2)?;
    let mut ballast = Ballast::new(ctx)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                work(ctx, round)?;
                round += 1;
            }
            ensure!(round > 0, "the busy thread never ran");
            Ok(())
        });
        let outcome = (|| -> Outcome {
            for _ in ctx.rounds(2) {
                ballast.sweep()?;
                for id in 1..=6u8 {
                    let child = process::fork(|| {
                        area.writer = id;
                        area.scribble(&mut ctx.rng(u64::from(id)), 9);
                        area.check_all("child of a busy process")
                    })?;
                    area.scribble(&mut ctx.rng(u64::from(id)), 9);
                    process::succeed("child of a busy process", child)?;
                }
                area.check_all("busy parent")?;
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        all([outcome, join(worker)])
    })
}

#[derive(Clone, Copy)]
enum Kind {
    Announced,
    Raw,
}

/// Makes a child; it must not allocate, since another thread may have been amid it.
fn unsafe_fork(kind: Kind) -> i32 {
    match kind {
        // SAFETY: the child only reads memory, makes system calls and ends.
        Kind::Announced => unsafe { libc::fork() },
        // SAFETY: as above; flags without CLONE_VM and no stack: like fork.
        Kind::Raw => unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as i32 },
    }
}

fn is_mapped(address: usize) -> bool {
    let mut one = 0_u8;
    // SAFETY: one page takes one byte.
    unsafe { libc::mincore(address as *mut _, PAGE, &raw mut one) == 0 }
}

/// One thread moves a cold range to and fro, another forks; the child looks for it.
fn moving(ctx: &Ctx, make: impl Fn() -> i32) -> Outcome {
    let pages = 96.min(ctx.pages());
    // Far from where the kernel puts things: whatever came to the place that is free would be overwritten.
    let places = [1_usize << 44, 1 << 45];
    sys::map(places[0], pages, RW, sys::ANON | libc::MAP_FIXED_NOREPLACE)?;
    let mut range = Area::at(places[0], ctx.seed, pages);
    range.write_all();
    let area = Area::filled(ctx.seed ^ 1, ctx.pages() / 2)?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(4) {
        ballast.sweep()?;
        let stop = AtomicBool::new(false);
        let moves = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) || moves.load(Ordering::Relaxed) % 2 == 1 {
                    let at = moves.load(Ordering::Relaxed) as usize;
                    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                    sys::remap(places[at % 2], pages, pages, flags, places[(at + 1) % 2])?;
                    moves.fetch_add(1, Ordering::Relaxed);
                    // At times without a pause.
                    if (at / 64).is_multiple_of(2) {
                        std::thread::sleep(std::time::Duration::from_micros(at as u64 % 5 * 10));
                    }
                }
                Ok(())
            });
            let outcome = (|| -> Outcome {
                for _ in 0..8 {
                    let seen = moves.load(Ordering::Relaxed);
                    while moves.load(Ordering::Relaxed) == seen {
                        std::thread::yield_now();
                    }
                    let child = process::run_child("fork", make(), || {
                        let found: usize = places.iter().map(|&place| usize::from(is_mapped(place))).sum();
                        ensure!(found == 1, "the child of a fork amid mremap has the range {found} times");
                        range.base = if is_mapped(places[0]) { places[0] } else { places[1] };
                        range.check_all("range that was moved during a fork")?;
                        area.check_order("the rest of it", (0..area.len()).step_by(17))
                    })?;
                    process::succeed("child of a fork amid mremap", child)?;
                }
                Ok(())
            })();
            stop.store(true, Ordering::Relaxed);
            all([outcome, join(worker)])
        })?;
        range.check_all("range that was moved")?;
    }
    area.check_all("what was not moved")
}

/// Two threads make children at the same time: only one of the two kinds is announced to the agent.
fn beside(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        std::thread::scope(|scope| {
            let both = [Kind::Announced, Kind::Raw].map(|kind| {
                let area = &area;
                scope.spawn(move || {
                    for round in 0..8 {
                        let child = process::run_child("fork", unsafe_fork(kind), || {
                            area.check_order("child of one of two forks at once", (round..area.len()).step_by(5))
                        })?;
                        process::succeed("child of one of two forks at once", child)?;
                    }
                    Ok(())
                })
            });
            all(both.map(join))
        })?;
    }
    area.check_all("parent of forks at once")
}

fn piece(ctx: &Ctx, round: u64) -> Res<Area> {
    Area::filled(ctx.seed ^ (round << 20), ctx.pages() / 8)
}

fn unmapping(ctx: &Ctx, round: u64) -> Outcome {
    let area = piece(ctx, round)?;
    let half = area.len() / 2;
    sys::unmap(area.base, half)?;
    area.check_order("upper half, lower unmapped", half..area.len())?;
    sys::unmap(area.addr(half), area.len() - half)
}

fn remapping(ctx: &Ctx, round: u64) -> Outcome {
    let mut area = piece(ctx, round)?;
    let to = sys::map(0, area.len(), libc::PROT_NONE, sys::ANON)?;
    area.base = sys::remap(area.base, area.len(), area.len(), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to)?;
    area.check_all("moved range")?;
    sys::unmap(area.base, area.len())
}

/// Children that the agent may take for the one that was announced, gone before that one is made.
fn cloning(ctx: &Ctx, round: u64) -> Outcome {
    let area = piece(ctx, round)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let user = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                area.check_all("used while children come and go")?;
            }
            Ok(())
        });
        let outcome = (0..64).try_for_each(|number| {
            let (heard, told) = sys::pipe()?;
            let child = process::run_child("raw clone", unsafe_fork(Kind::Raw), || {
                // Every other one leaves a child of its own, which still has pages to be given.
                if number % 2 == 0 && unsafe_fork(Kind::Raw) == 0 {
                    let verdict = process::verdict(area.check_all("raw child of a child that has ended")) as u8;
                    // SAFETY: one byte of ours.
                    unsafe { libc::write(told, (&raw const verdict).cast(), 1) };
                }
                process::leave(0)
            })?;
            process::succeed("raw child that ends at once", child)?;
            // SAFETY: ours.
            unsafe { libc::close(told) };
            let mut verdict = 0_u8;
            // SAFETY: one byte of ours; nothing comes of one that left no child.
            let read = unsafe { libc::read(heard, (&raw mut verdict).cast(), 1) };
            // SAFETY: ours.
            unsafe { libc::close(heard) };
            ensure!(
                verdict == 0 && read == i64::from(number % 2 == 0) as isize,
                "{read} bytes, verdict {verdict}"
            );
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        all([outcome, join(user)])
    })?;
    sys::unmap(area.base, area.len())
}

fn advising(ctx: &Ctx, round: u64) -> Outcome {
    let area = piece(ctx, round)?;
    let half = area.len() / 2;
    sys::advise(area.base, half, libc::MADV_DONTNEED)?;
    check_zero("dropped half", area.base, half)?;
    area.check_order("kept half", half..area.len())?;
    sys::unmap(area.base, area.len())
}

fn protecting(ctx: &Ctx, round: u64) -> Outcome {
    let area = piece(ctx, round)?;
    sys::protect(area.base, area.len(), libc::PROT_NONE)?;
    sys::protect(area.base, area.len(), libc::PROT_READ)?;
    area.check_all("read-only range")?;
    sys::unmap(area.base, area.len())
}

fn threading(ctx: &Ctx, round: u64) -> Outcome {
    let area = Area::filled(ctx.seed ^ round, 64)?;
    crate::harness::threads(4, |_| area.check_all("seen by a short thread"))?;
    sys::unmap(area.base, area.len())
}
