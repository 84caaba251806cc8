//! The death of others: of the program that started this one, and of processes beside it (R22).

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, ensure};
use crate::process::{self, End};
use crate::sys;
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case::new(
        "orphan",
        "the program goes on when the one that started it is killed (needs --out, see the suite)",
        orphan,
    ),
    Case::new("supervisor-stopped", "a program whose supervisor is stopped, and continued, goes on", stopped),
    Case::new(
        "supervisor-stopped-fork",
        "while a fork waits for a stopped supervisor the other threads go on",
        stopped_in_fork,
    ),
    Case::new("siblings-killed", "siblings killed in the middle of their faults harm nobody", siblings),
    Case::new(
        "creator-killed",
        "a child that shares the memory of a killed process reads no wrong byte (it may be killed, too)",
        creator_killed,
    ),
    Case::new("sibling-leaves-late", "memory of a killed process does not appear in a new one", recycled),
];

/// Sends a signal to this process's parent if that is `spm`.
fn signal(signal: i32) {
    // SAFETY: no memory is involved.
    let parent = unsafe { libc::getppid() };
    if sys::slurp(&format!("/proc/{parent}/comm")).trim() == "spm" {
        // SAFETY: no memory is involved.
        unsafe { libc::kill(parent, signal) };
    }
}

/// One thread forks while `spm` is stopped; another, which lets `spm` go on only when it has seen all of its data, would
/// wait for ever if it had to wait for the fork.
fn stopped_in_fork(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        crate::harness::threads(2, |number| {
            if number == 0 {
                signal(libc::SIGSTOP);
                let child = process::fork(|| area.check_all("child made while the supervisor is stopped"))?;
                return process::succeed("child made while the supervisor is stopped", child);
            }
            process::nap(5 + round % 20);
            let outcome = area.check_all("thread beside a fork that waits");
            signal(libc::SIGCONT);
            outcome
        })?;
        area.scribble(&mut ctx.rng(round), 3);
        area.check_all("program that has forked")?;
    }
    Ok(())
}

/// Stops `spm`, which encodes for this process, at the worst of times, works without it, lets it go on, and works with it.
fn stopped(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        let outcome = crate::harness::threads(2, |number| {
            if number == 0 {
                process::nap(1 + round % 7);
                signal(libc::SIGSTOP);
                process::nap(150);
                return Ok(());
            }
            area.check_all("program whose supervisor is being stopped")
        })
        .and_then(|()| {
            ballast.sweep()?;
            area.scribble(&mut ctx.rng(round), 3);
            area.check_all("program whose supervisor is stopped")
        });
        signal(libc::SIGCONT);
        outcome?;
        ballast.sweep()?;
        area.check_all("program whose supervisor goes on")?;
    }
    Ok(())
}

/// Works until its parent changes (or, bare, for the time given), then for the time given again, forks and makes
/// threads meanwhile, and writes its verdict to `--out`.
fn orphan(ctx: &Ctx) -> Outcome {
    // SAFETY: no memory is involved.
    let parent = unsafe { libc::getppid() };
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let wait_until = Instant::now() + if ctx.out.is_some() { Duration::from_secs(60) } else { ctx.time };
    let mut until = None;
    let mut is_orphan = false;
    if let Some(out) = &ctx.out {
        std::fs::write(format!("{out}.ready"), std::process::id().to_string())?;
    }
    let outcome = (|| -> Outcome {
        for round in 0u64.. {
            ballast.sweep()?;
            area.check_all(if is_orphan {
                "program whose supervisor was killed"
            } else {
                "program with its supervisor"
            })?;
            area.scribble(&mut ctx.rng(round), 3);
            if is_orphan {
                let child = process::fork(|| area.check_all("child made after the supervisor was killed"))?;
                process::succeed("child made after the supervisor was killed", child)?;
                crate::harness::threads(2, |_| {
                    area.check_order("thread after the supervisor was killed", (0..area.len()).step_by(3))
                })?;
            }
            // SAFETY: no memory is involved.
            if !is_orphan && unsafe { libc::getppid() } != parent {
                is_orphan = true;
            }
            match until {
                None if is_orphan || Instant::now() > wait_until => until = Some(Instant::now() + ctx.time),
                Some(end) if Instant::now() > end => break,
                _ => {}
            }
        }
        Ok(())
    })();
    if let Some(out) = &ctx.out {
        let text = match &outcome {
            Ok(()) if is_orphan => "ok".to_string(),
            Ok(()) => "the parent never changed".to_string(),
            Err(failure) => failure.to_string(),
        };
        let draft = format!("{out}.draft");
        std::fs::write(&draft, text)?;
        std::fs::rename(&draft, out)?;
    }
    outcome
}

fn siblings(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages() / 2)?;
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    for round in ctx.rounds(3) {
        let mut children = Vec::new();
        for id in 1..=3u8 {
            children.push(process::fork(|| {
                area.writer = id;
                loop {
                    area.check_all("one of three siblings")?;
                    area.scribble(&mut ctx.rng(u64::from(id)), 2);
                    if id == 3 {
                        // The survivor: after a while it ends well.
                        if ctx.is_over() {
                            return Ok(());
                        }
                    }
                }
            })?);
        }
        ballast.sweep()?;
        process::nap(round * 3 % 20);
        for &child in &children[..2] {
            process::kill(child, libc::SIGKILL)?;
            process::ends("killed sibling", child, End::Signal(libc::SIGKILL))?;
            area.check_all("parent of killed siblings")?;
        }
        area.scribble(&mut rng, 3);
        if ctx.is_over() {
            process::succeed("surviving sibling", children[2])?;
        } else {
            process::kill(children[2], libc::SIGKILL)?;
            process::ends("last sibling", children[2], End::Signal(libc::SIGKILL))?;
        }
    }
    Ok(())
}

fn recycled(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(3) {
        let (reader, writer) = sys::pipe()?;
        let victim = process::fork(|| {
            let area = Area::filled(ctx.seed ^ 0xdead ^ round, ctx.pages())?;
            sys::write_full(writer, c"r".as_ptr() as usize, 1)?;
            loop {
                area.check_all("process that will be killed")?;
            }
        })?;
        sys::close(writer);
        let mut byte = 0u8;
        let got = sys::read_full(reader, (&raw mut byte) as usize, 1)?;
        sys::close(reader);
        ensure!(got == 1, "the victim ended before its time");
        ballast.sweep()?;
        process::kill(victim, libc::SIGKILL)?;
        process::ends("victim", victim, End::Signal(libc::SIGKILL))?;
        let child = process::fork(|| {
            let mut area = Area::new(ctx.seed, ctx.pages())?;
            area.check_all("fresh memory of a process made after another was killed")?;
            area.write_all();
            ballast.sweep()?;
            area.check_all("memory of a process made after another was killed")
        })?;
        process::succeed("process made after another was killed", child)?;
    }
    Ok(())
}

/// What the child of [`creator_killed`] looks at.
struct Shared {
    area: Area,
    verdict: i32,
}

extern "C" fn share(argument: *mut libc::c_void) -> i32 {
    process::nap(300);
    // SAFETY: the creator's stack frame, which stays as it was when the creator was killed.
    let shared = unsafe { &*argument.cast::<Shared>() };
    let is_right = (0..shared.area.len()).all(|page| shared.area.is_right(page));
    let byte = [if is_right { b'k' } else { b'w' }];
    // SAFETY: one byte of ours.
    unsafe { libc::write(shared.verdict, byte.as_ptr().cast(), 1) };
    0
}

/// What was compressed is lost with the process that served it: then the child must die of it and not read zeros.
fn creator_killed(ctx: &Ctx) -> Outcome {
    const STACK: usize = 64;
    let (verdict, to_us) = sys::pipe()?;
    let creator = process::fork(|| {
        let mut shared = Shared { area: Area::filled(ctx.seed, ctx.pages())?, verdict: to_us };
        Ballast::new(ctx)?.sweep()?;
        let top = sys::anon(STACK)? + STACK * 4096;
        let argument = (&raw mut shared).cast();
        // SAFETY: the child runs on a stack of its own, and this frame is left by nobody: the process is killed in it.
        let child = unsafe { libc::clone(share, top as *mut _, libc::CLONE_VM | libc::SIGCHLD, argument) };
        sys::ok("clone", child.into())?;
        process::kill(std::process::id() as i32, libc::SIGKILL)
    })?;
    sys::close(to_us);
    process::ends("creator", creator, End::Signal(libc::SIGKILL))?;
    let mut byte = 0_u8;
    // SAFETY: one byte of ours.
    let got = unsafe { libc::read(verdict, (&raw mut byte).cast(), 1) };
    sys::close(verdict);
    ensure!(got == 0 || byte == b'k', "the child that shares the memory of a killed process read wrong bytes");
    Ok(())
}
