//! Processes made without libc, many at a time, or by one that is killed at once.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, bail, ensure, threads};
use crate::process::{self, End};
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("raw-crowd", "ten threads that make raw children at once: each sees the cold pages", crowd),
    Case::new(
        "raw-orphan",
        "a raw child whose parent is killed at once sees its pages or SIGBUS, never zeros",
        |ctx| orphan(ctx, false),
    ),
    Case::new("raw-daemon", "a raw child whose parent exits at once sees its pages", daemon),
    Case::new("raw-orphan-chain", "the same of a raw child and of a raw child of it", |ctx| orphan(ctx, true)),
];

fn raw_clone() -> i32 {
    // SAFETY: flags without CLONE_VM and no stack: like fork.
    unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as i32 }
}

fn crowd(ctx: &Ctx) -> Outcome {
    const THREADS: usize = 10;
    const EACH: usize = 2;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(1) {
        ballast.sweep()?;
        threads(THREADS, |_| {
            let mut children = [0; EACH];
            for child in &mut children {
                *child =
                    process::run_child("raw clone", raw_clone(), || area.check_all("one of many raw children"))?;
            }
            children.into_iter().try_for_each(|child| process::succeed("one of many raw children", child))
        })?;
        area.check_all("parent of many raw children")?;
    }
    Ok(())
}

/// What a page of the child is allowed to be is what it was; who meets a lost one ends here.
extern "C" fn on_lost(_: i32) {
    process::leave(0);
}

fn orphan(ctx: &Ctx, has_child: bool) -> Outcome {
    // SAFETY: no memory is involved.
    sys::ok("prctl", unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }.into())?;
    for round in ctx.rounds(3) {
        let mut ends = [0; 2];
        // SAFETY: the array takes two descriptors.
        sys::ok("pipe", unsafe { libc::pipe(ends.as_mut_ptr()) }.into())?;
        let parent = process::fork(|| make_orphan(ctx, ends[1], has_child))?;
        let mut child = 0_i32;
        // SAFETY: reads a number into one of ours.
        let read = unsafe { libc::read(ends[0], (&raw mut child).cast(), 4) };
        ensure!(read == 4, "the parent-to-be of an orphan said nothing");
        // From when `spm` has the child, soon after its life began, to well into its being given pages.
        std::thread::sleep(std::time::Duration::from_micros((1 + round % 8) * 500));
        process::kill(parent, libc::SIGKILL)?;
        process::ends("the parent of an orphan", parent, End::Signal(libc::SIGKILL))?;
        look_at_end(process::wait(child)?)?;
        // What the child did not wait for because it met a lost page.
        while let Some(end) = process::wait_any() {
            look_at_end(end)?;
        }
        for end in ends {
            // SAFETY: ours.
            unsafe { libc::close(end) };
        }
    }
    Ok(())
}

/// The parent goes by _exit(2) and by exit(3) in turn, and unmaps nothing before: that would wait for the child.
fn daemon(ctx: &Ctx) -> Outcome {
    // SAFETY: no memory is involved.
    sys::ok("prctl", unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }.into())?;
    for does_return in ctx.rounds(2).flat_map(|_| [false, true]) {
        let parent = process::fork(|| {
            let area = Area::filled(ctx.seed, ctx.pages())?;
            let mut ballast = Ballast::new(ctx)?;
            ballast.sweep()?;
            process::run_child("raw clone", raw_clone(), || area.check_all("a daemon made by raw clone"))?;
            if does_return {
                // SAFETY: this process has nothing to do when it ends.
                unsafe { libc::exit(0) };
            }
            process::leave(0)
        })?;
        process::succeed("the parent of a daemon", parent)?;
        while let Some(end) = process::wait_any() {
            ensure!(end == End::Exit(0), "a daemon made by raw clone ended with {end:?}");
        }
    }
    Ok(())
}

fn look_at_end(end: End) -> Outcome {
    match end {
        End::Exit(0) | End::Signal(libc::SIGBUS) => Ok(()),
        other => bail!("an orphan by raw clone ended with {other:?}"),
    }
}

/// Makes a child by a raw system call that says its number, waits until its parent is dead and then looks at everything. With
/// `has_child` so does, at once, one that it makes itself.
fn make_orphan(ctx: &Ctx, out: i32, has_child: bool) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    // SAFETY: the handler makes one system call.
    unsafe { libc::signal(libc::SIGBUS, on_lost as *const () as usize) };
    // SAFETY: takes no pointer.
    let parent = unsafe { libc::syscall(libc::SYS_getpid) };
    let child = raw_clone();
    process::run_child("raw clone", child, || {
        let look = || area.check_all("a raw child of an orphan");
        let own_child = has_child.then(|| process::run_child("raw clone", raw_clone(), look)).transpose()?;
        // SAFETY: takes no pointer.
        let own = unsafe { libc::syscall(libc::SYS_getpid) } as i32;
        // SAFETY: writes a number of ours, on the stack.
        unsafe { libc::write(out, (&raw const own).cast(), 4) };
        // SAFETY: takes no pointer.
        while unsafe { libc::syscall(libc::SYS_getppid) } == parent {
            let pause = libc::timespec { tv_sec: 0, tv_nsec: 100_000 };
            // SAFETY: reads the time given.
            unsafe { libc::syscall(libc::SYS_nanosleep, &raw const pause, 0) };
        }
        area.check_all("an orphan by raw clone")?;
        own_child.map_or(Ok(()), |child| look_at_end(process::wait(child)?))
    })?;
    loop {
        process::nap(1000);
    }
}
