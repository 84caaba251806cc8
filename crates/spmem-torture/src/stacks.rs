//! Stacks and thread-locals that get cold under a running thread.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Failure, Outcome, ensure};
use crate::model::mix;
use crate::process;
use crate::sys;
use std::cell::Cell;
use std::hint::black_box;
use std::sync::Barrier;

pub const CASES: &[Case] = &[
    Case::new("stack-main", "deep recursion on the first stack, its frames cold on the way back", main_stack),
    Case::new("stack-thread", "the same on threads' stacks of 64 MiB", thread_stack),
    Case::new("stack-many", "eighty threads asleep on cold stacks wake with their locals", many),
    Case::new("stack-grow", "a stack that grows again over what it left", regrow),
    Case::new("stack-fork", "a child by fork runs on its parent's cold stack", forked),
    Case::new("stack-locals", "thread-locals of sleeping threads stay", locals),
];

/// Frames of 8 KiB, each filled from its depth; at the bottom `act` runs; each frame is checked on the way back.
#[inline(never)]
fn recurse(depth: usize, key: u64, act: &mut dyn FnMut() -> Outcome) -> Outcome {
    let mut frame = [0u64; 1024];
    for (at, word) in frame.iter_mut().enumerate() {
        *word = if at % 3 == 0 { mix(key ^ (depth << 10 | at) as u64) } else { depth as u64 };
    }
    black_box(&mut frame);
    if depth == 0 {
        act()?
    } else {
        recurse(depth - 1, key, act)?
    }
    for (at, &word) in black_box(&frame).iter().enumerate() {
        let wanted = if at % 3 == 0 { mix(key ^ (depth << 10 | at) as u64) } else { depth as u64 };
        ensure!(
            word == wanted,
            "frame at depth {depth}, word {at} at {:#x}: expected {wanted:#x}, found {word:#x} (thread {})",
            &raw const frame[at] as usize,
            sys::gettid()
        );
    }
    Ok(())
}

fn main_stack(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::of(ctx, ctx.pages() * 3)?;
    for round in ctx.rounds(3) {
        recurse(750, round, &mut || ballast.sweep())?;
    }
    Ok(())
}

fn on_thread(bytes: usize, body: impl FnOnce() -> Outcome + Send) -> Outcome {
    std::thread::scope(|scope| {
        let handle = std::thread::Builder::new().stack_size(bytes).spawn_scoped(scope, body)?;
        crate::harness::join(handle)
    })
}

fn thread_stack(ctx: &Ctx) -> Outcome {
    let depth = (ctx.mib << 20) / 8400;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        let ballast = &mut ballast;
        on_thread((ctx.mib << 20) + (4 << 20), move || recurse(depth, round, &mut || ballast.sweep()))?;
    }
    Ok(())
}

fn many(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 80;
    let mut ballast = Ballast::of(ctx, ctx.pages() * 3)?;
    for round in ctx.rounds(1) {
        let (asleep, awake) = (Barrier::new(COUNT + 1), Barrier::new(COUNT + 1));
        std::thread::scope(|scope| {
            let (asleep, awake) = (&asleep, &awake);
            let running: Vec<_> = (0..COUNT)
                .map(|id| {
                    scope.spawn(move || {
                        recurse(10 + id % 7, round << 32 | id as u64, &mut || {
                            asleep.wait();
                            awake.wait();
                            Ok(())
                        })
                    })
                })
                .collect();
            asleep.wait();
            let outcome = ballast.sweep().and_then(|()| ballast.sweep());
            awake.wait();
            crate::harness::all(running.into_iter().map(crate::harness::join).chain([outcome]))
        })?;
    }
    Ok(())
}

fn regrow(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let ballast = &mut ballast;
    on_thread(64 << 20, move || {
        for round in ctx.rounds(2) {
            for depth in [900, 10, 500, 1500, 100] {
                recurse(depth, round, &mut || Ok(()))?;
                ballast.sweep()?;
            }
        }
        Ok(())
    })
}

fn forked(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let area = Area::filled(ctx.seed, ctx.pages() / 2)?;
    for round in ctx.rounds(1) {
        let mut child = 0;
        let mut is_child = false;
        let outcome = recurse(600, round, &mut || {
            ballast.sweep()?;
            // SAFETY: both sides return through the frames above.
            child = sys::ok("fork", unsafe { libc::fork() }.into())? as i32;
            is_child = child == 0;
            Ok(())
        });
        if is_child {
            process::leave(process::verdict(outcome.and_then(|()| area.check_all("child on its parent's stack"))));
        }
        outcome?;
        process::succeed("child on its parent's stack", child)?;
        // The same from a thread: the child has that thread's stack as its own.
        let (ballast, area) = (&mut ballast, &area);
        on_thread(16 << 20, move || {
            let mut pid = 0;
            let outcome = recurse(300, round, &mut || {
                ballast.sweep()?;
                // SAFETY: as above.
                pid = sys::ok("fork", unsafe { libc::fork() }.into())? as i32;
                Ok(())
            });
            if pid == 0 {
                process::leave(process::verdict(
                    outcome.and_then(|()| area.check_all("child on a thread's stack")),
                ));
            }
            outcome?;
            process::succeed("child on a thread's stack", pid)
        })?;
    }
    Ok(())
}

thread_local! {
    static LOCAL: Cell<[u64; 512]> = const { Cell::new([0; 512]) };
    static DROPPED: Dropped = const { Dropped(Cell::new(0)) };
}

/// Checks at the thread's end, when destructors of thread-locals run, that its value is still there.
struct Dropped(Cell<u64>);

impl Drop for Dropped {
    fn drop(&mut self) {
        if self.0.get() != 0xfeed_f00d {
            crate::harness::report(&format!("FAILED: a thread-local held {:#x} in its destructor", self.0.get()));
            process::leave(1);
        }
    }
}

fn locals(ctx: &Ctx) -> Outcome {
    const COUNT: u64 = 40;
    let mut ballast = Ballast::of(ctx, ctx.pages() * 3)?;
    for round in ctx.rounds(1) {
        let (asleep, awake) = (Barrier::new(COUNT as usize + 1), Barrier::new(COUNT as usize + 1));
        std::thread::scope(|scope| {
            let (asleep, awake) = (&asleep, &awake);
            let running: Vec<_> = (0..COUNT)
                .map(|id| {
                    scope.spawn(move || {
                        let key = round << 32 | id;
                        LOCAL.set(std::array::from_fn(|at| mix(key ^ at as u64)));
                        DROPPED.with(|dropped| dropped.0.set(0xfeed_f00d));
                        // SAFETY: errno is thread-local as well.
                        unsafe { *libc::__errno_location() = id as i32 + 1000 };
                        asleep.wait();
                        awake.wait();
                        let found = LOCAL.get();
                        let wrong = (0..512).find(|&at| found[at] != mix(key ^ at as u64));
                        wrong.map_or(Ok(()), |at| {
                            Err(Failure::Wrong(format!("thread-local word {at} of thread {id} differs")))
                        })
                    })
                })
                .collect();
            asleep.wait();
            let outcome = ballast.sweep().and_then(|()| ballast.sweep());
            awake.wait();
            crate::harness::all(running.into_iter().map(crate::harness::join).chain([outcome]))
        })?;
    }
    Ok(())
}
