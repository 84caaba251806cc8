//! Fork: both sides see the memory of that moment, and neither sees what the other writes later.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, ensure, threads};
use crate::process::{self, End};
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("fork-both", "child and parent write the same pages, each sees its own", both),
    Case::new("fork-cold", "a child sees pages that were away at the fork", cold),
    Case::new("fork-many", "five children at a time, each with its own writes", many),
    Case::new("fork-chain", "five generations, each writes and checks, then the ancestors check", chain),
    Case::new("fork-storm", "four threads fork at once, two hundred children each see the right bytes", storm),
    Case::new("fork-exits", "children end by _exit, exit, abort and a fault; the parent's pages stay", exits),
    Case::new("fork-orphans", "a grandchild whose parent is gone keeps its pages", orphans),
    Case::new(
        "fork-rewrite",
        "pages shared by a fork and rewritten after the child is gone leave and return right",
        rewrite,
    ),
    Case::new("fork-kill", "SIGKILL of a child in the middle of its faults harms nobody", kill),
    Case::new(
        "fork-namespaces",
        "a child forked after unshare(2) of network and mounts keeps its pages",
        namespaces,
    ),
    Case::new(
        "fork-without-counter",
        "children of a thread that may not read the processor's counter (PR_SET_TSC) keep their pages",
        without_counter,
    ),
    Case::new(
        "fork-pid-namespaces",
        "children forked into two pid namespaces, with the same number in both, keep their pages apart and are counted",
        pid_namespaces,
    ),
    Case::new("fork-works", "a child works for long on data of its own, cold and hot", works),
    Case::new(
        "fork-generations",
        "the address space of a descendant does not grow with the number of its ancestors",
        generations,
    ),
];

fn both(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let child = process::fork(|| {
            area.writer = 1;
            ballast.set_writer(1);
            area.check_order("child, at once", (0..area.len()).step_by(7))?;
            area.scribble(&mut rng, 2);
            ballast.sweep()?;
            area.check_all("child, after both wrote")
        })?;
        // The child drew from a copy of this generator: the same pages, other bytes.
        area.scribble(&mut rng, 2);
        area.check_order("parent, while the child lives", (0..area.len()).rev())?;
        ballast.sweep()?;
        area.check_all(&format!("parent, round {round}"))?;
        process::succeed("child that writes", child)?;
        area.check_all("parent, after the child")?;
    }
    Ok(())
}

/// The children's agent threads come from a thread that gets SIGSEGV when it reads the counter. Neither side looks at a
/// clock meanwhile.
fn without_counter(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let permit = |mode: libc::c_int| {
            // SAFETY: no memory is involved.
            sys::ok("prctl(PR_SET_TSC)", unsafe { libc::prctl(libc::PR_SET_TSC, mode) }.into())
        };
        permit(libc::PR_TSC_SIGSEGV)?;
        let child = process::fork(|| {
            area.writer = 1;
            ballast.set_writer(1);
            area.check_all("child, at once")?;
            area.scribble(&mut rng, 2);
            ballast.sweep()?;
            area.check_all("child, after it wrote and all left again")
        })?;
        area.scribble(&mut rng, 2);
        ballast.sweep()?;
        area.check_all("parent, while the child lives")?;
        process::succeed("child without the counter", child)?;
        permit(libc::PR_TSC_ENABLE)?;
        area.check_all(&format!("parent, round {round}"))?;
    }
    Ok(())
}

/// Abstract sockets belong to a network name space.
fn namespaces(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    // SAFETY: no memory is involved.
    if unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS | libc::CLONE_NEWUTS) } != 0 {
        crate::harness::skip!("unshare: {}", std::io::Error::last_os_error());
    }
    for _ in ctx.rounds(2) {
        let child = process::fork(|| {
            ballast.sweep()?;
            let grandchild = process::fork(|| area.check_all("grandchild in other name spaces"))?;
            process::succeed("grandchild in other name spaces", grandchild)?;
            area.check_all("child in other name spaces")
        })?;
        process::succeed("child in other name spaces", child)?;
        ballast.sweep()?;
        area.check_all("parent in other name spaces")?;
    }
    Ok(())
}

/// Seven processes in all (see the suite). Those that have the same number live at the same time. They share one budget, so it is little data.
fn pid_namespaces(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages() / 4)?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    let ((ready, is_ready), (gate, opener)) = (sys::pipe()?, sys::pipe()?);
    let mut parents = Vec::new();
    for id in [1, 2] {
        parents.push(process::fork(|| {
            sys::close(opener);
            // SAFETY: no memory is involved.
            if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
                crate::harness::skip!("unshare: {}", std::io::Error::last_os_error());
            }
            let child = process::fork(|| {
                ensure!(std::process::id() == 1, "the first process is number {}", std::process::id());
                sys::write_full(is_ready, c"r".as_ptr() as usize, 1)?;
                let mut byte = 0_u8;
                sys::read_full(gate, (&raw mut byte) as usize, 1)?;
                area.writer = id;
                area.scribble(&mut ctx.rng(id.into()), 3);
                ballast.sweep_part(id.into(), 8)?;
                let grandchild = process::fork(|| area.check_all("second process of a pid namespace"))?;
                process::succeed("second process of a pid namespace", grandchild)?;
                area.check_all("first process of a pid namespace")
            })?;
            sys::close(is_ready);
            process::succeed("first process of a pid namespace", child)
        })?);
    }
    sys::close(is_ready);
    let mut bytes = [0_u8; 2];
    sys::read_full(ready, bytes.as_mut_ptr() as usize, 2)?;
    sys::close(opener);
    parents.into_iter().try_for_each(|parent| process::succeed("parent of a pid namespace", parent))?;
    area.check_all("parent of two pid namespaces")
}

fn cold(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        ballast.sweep()?;
        let child = process::fork(|| area.check_all("child, pages cold at the fork"))?;
        process::succeed("child that reads", child)?;
        area.check_all("parent, after the child read")?;
        for page in (round as usize % 3..area.len()).step_by(3) {
            area.write(page);
        }
    }
    Ok(())
}

fn many(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages() / 2)?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(1) {
        ballast.sweep()?;
        let mut children = Vec::new();
        for id in 1..=5u8 {
            children.push(process::fork(|| {
                let mut rng = ctx.rng(u64::from(id));
                area.writer = id;
                area.scribble(&mut rng, 3);
                area.check_all("one of five children")?;
                area.scribble(&mut rng, 3);
                area.check_order("one of five children, again", (0..area.len()).rev())
            })?);
            area.scribble(&mut ctx.rng(100 + u64::from(id)), 8);
        }
        area.check_all("parent of five")?;
        children.into_iter().try_for_each(|child| process::succeed("one of five children", child))?;
        area.check_all("parent of five, after them")?;
    }
    Ok(())
}

fn generation(ctx: &Ctx, area: &mut Area, ballast: &mut Ballast, depth: u8) -> Outcome {
    area.writer = depth;
    ballast.set_writer(depth);
    area.check_all(&format!("generation {depth}, at its start"))?;
    area.scribble(&mut ctx.rng(u64::from(depth)), 4);
    if depth % 2 == 1 {
        ballast.sweep()?;
    }
    if depth < 5 {
        let child = process::fork(|| generation(ctx, area, ballast, depth + 1))?;
        area.scribble(&mut ctx.rng(50 + u64::from(depth)), 4);
        area.check_all(&format!("generation {depth}, while the next lives"))?;
        process::succeed("the next generation", child)?;
    }
    area.check_all(&format!("generation {depth}, at its end"))
}

fn chain(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages() / 2)?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(1) {
        ballast.sweep()?;
        generation(ctx, &mut area, &mut ballast, 0)?;
    }
    Ok(())
}

fn storm(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    ballast.sweep()?;
    for _ in ctx.rounds(1) {
        threads(4, |id| {
            let mut rng = ctx.rng(id as u64);
            for _ in 0..50 {
                let from = rng.below(area.len() - 64);
                let child = process::fork(|| area.check_order("child of a storm", from..from + 64))?;
                area.check_order("a forking thread", from..from + 64)?;
                process::succeed("child of a storm", child)?;
            }
            Ok(())
        })?;
        ballast.sweep()?;
        area.check_all("after the storm")?;
    }
    Ok(())
}

fn exits(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(1) {
        for way in 0..4u8 {
            ballast.sweep()?;
            let wanted =
                [End::Exit(7), End::Exit(0), End::Signal(libc::SIGABRT), End::Signal(libc::SIGSEGV)][way as usize];
            let child = process::fork(|| {
                area.writer = way + 1;
                area.scribble(&mut ctx.rng(9), 8);
                area.check_order("child about to end", (0..area.len()).step_by(3))?;
                // SAFETY: ends the process, in its own way.
                unsafe {
                    let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                    libc::setrlimit(libc::RLIMIT_CORE, &raw const limit);
                    match way {
                        0 => libc::_exit(7),
                        1 => libc::exit(0),
                        2 => libc::abort(),
                        _ => {
                            sys::default_signal(libc::SIGSEGV);
                            (8 as *mut u8).write_volatile(1);
                        }
                    }
                }
                Ok(())
            })?;
            area.check_order("parent, while a child ends", (0..area.len()).rev().step_by(3))?;
            process::ends("child with its own way to end", child, wanted)?;
            area.check_all("parent, after the child's end")?;
        }
    }
    Ok(())
}

fn orphans(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(1) {
        ballast.sweep()?;
        let (reader, writer) = sys::pipe()?;
        let child = process::fork(|| {
            process::fork(|| {
                sys::close(reader);
                process::nap(50);
                area.writer = 9;
                let outcome = area.check_all("grandchild without a parent").and_then(|()| {
                    area.scribble(&mut ctx.rng(3), 2);
                    ballast.sweep()?;
                    area.check_all("grandchild, after its own writes")
                });
                let good = process::verdict(outcome) == 0;
                sys::write_full(writer, (&raw const good) as usize, 1)
            })
            .map(drop)
        })?;
        process::succeed("child that leaves an orphan", child)?;
        sys::close(writer);
        area.scribble(&mut ctx.rng(3), 2);
        area.check_all("grandparent")?;
        let mut good = 0u8;
        let got = sys::read_full(reader, (&raw mut good) as usize, 1)?;
        sys::close(reader);
        ensure!(got == 1 && good == 1, "the grandchild's verdict: {got} bytes, value {good}");
    }
    Ok(())
}

fn rewrite(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(2) {
        let child = process::fork(|| area.check_all("child that only reads"))?;
        process::succeed("child that only reads", child)?;
        // Untouched since the fork: UFFDIO_MOVE answers EBUSY for these (LINUX-FACTS), another path is needed.
        ballast.sweep()?;
        area.check_all("never rewritten since the fork")?;
        for page in (0..area.len()).step_by(2) {
            area.write(page);
        }
        ballast.sweep()?;
        area.check_all("every second page rewritten since the fork")?;
    }
    Ok(())
}

fn kill(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    for round in ctx.rounds(4) {
        ballast.sweep()?;
        let child = process::fork(|| {
            area.writer = 1;
            loop {
                area.check_all("child that will be killed")?;
                area.scribble(&mut rng, 2);
                ballast.sweep()?;
            }
        })?;
        process::nap(round * 7 % 40);
        area.check_order("parent, before the kill", (0..area.len()).step_by(5))?;
        process::kill(child, libc::SIGKILL)?;
        area.check_all("parent, at the kill")?;
        process::ends("killed child", child, End::Signal(libc::SIGKILL))?;
        area.scribble(&mut rng, 3);
        ballast.sweep()?;
        area.check_all("parent, after the kill")?;
    }
    Ok(())
}

fn works(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    let child = process::fork(|| {
        let mut own = Area::filled(ctx.seed + 1, ctx.pages())?;
        let mut rng = ctx.rng(2);
        area.writer = 1;
        for _ in ctx.rounds(3) {
            own.scribble(&mut rng, 3);
            area.scribble(&mut rng, 3);
            own.check_all("the child's own memory")?;
            area.check_all("the child's inherited memory")?;
        }
        sys::unmap(area.base, area.len() / 2)?;
        own.check_all("the child's own memory, after it unmapped the inherited")
    })?;
    let mut rng = ctx.rng(3);
    for _ in ctx.rounds(3) {
        area.scribble(&mut rng, 3);
        ballast.sweep()?;
        area.check_all("the parent's memory")?;
    }
    process::succeed("working child", child)?;
    area.check_all("the parent's memory, at the end")
}

fn generations(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages() / 2)?;
    let mut ballast = Ballast::new(ctx)?;
    descend(&area, &mut ballast, &mut Vec::new())
}

/// `sizes`: what the address space of each ancestor took, pages.
fn descend(area: &Area, ballast: &mut Ballast, sizes: &mut Vec<usize>) -> Outcome {
    const DEPTH: usize = 8;
    // The first ones are not like their descendants: who forks for the first time makes lists for it.
    const FIRST: usize = 2;
    // The heap of an agent grows by a MiB.
    const MOST: usize = 3 * 256;
    ballast.sweep_part(sizes.len(), DEPTH)?;
    area.check_all(&format!("generation {}", sizes.len()))?;
    let statm = sys::slurp("/proc/self/statm");
    let size = statm.split(' ').next().and_then(|pages| pages.parse().ok());
    let Some(size) = size else { crate::harness::bail!("/proc/self/statm: {statm:?}") };
    sizes.push(size);
    if sizes.len() < DEPTH {
        let child = process::fork(|| descend(area, ballast, sizes))?;
        return process::succeed("the next generation", child);
    }
    let grown = size.saturating_sub(sizes[FIRST]);
    ensure!(grown <= MOST, "{grown} pages more than {} generations before: {sizes:?}", DEPTH - 1 - FIRST);
    Ok(())
}
