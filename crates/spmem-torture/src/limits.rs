//! Tight limits and fewer rights, set in the middle of the run.

use crate::area::{Area, Ballast};
use crate::exec;
use crate::harness::{Case, Ctx, Outcome, ensure, skip};
use crate::model::PAGE;
use crate::process;
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("limit-as", "a tight RLIMIT_AS: mappings beyond it fail, memory stays", |ctx| {
        limited(ctx, address_space)
    }),
    Case::new("limit-data", "a tight RLIMIT_DATA: growth fails, memory stays", |ctx| limited(ctx, data)),
    Case::new("limit-none-left", "children of a process that may map nothing more keep their pages", none_left),
    Case::new("limit-nofile", "RLIMIT_NOFILE 10 and 0", |ctx| limited(ctx, files)),
    Case::new("limit-stack", "a small RLIMIT_STACK, threads and recursion", |ctx| limited(ctx, stack)),
    Case::new("limit-nproc", "RLIMIT_NPROC 0 and RLIMIT_CORE 0", |ctx| limited(ctx, processes)),
    Case::new(
        "limit-threads",
        "a program that may start few threads keeps its pages, takes no more with time, and its children keep theirs",
        few_threads,
    ),
    Case::new("limit-fsize", "RLIMIT_FSIZE 0: memory needs no file", |ctx| limited(ctx, file_size)),
    Case::new("limit-memlock", "RLIMIT_MEMLOCK 0", |ctx| limited(ctx, memlock)),
    Case::new("rights-dropped", "setuid to nobody, then work, fork and threads", |ctx| limited(ctx, nobody)),
    Case::new("rights-dumpable", "PR_SET_DUMPABLE 0 and PR_SET_NO_NEW_PRIVS", |ctx| limited(ctx, not_dumpable)),
    Case::new("rights-chroot", "chroot to an empty directory without /proc", |ctx| limited(ctx, chroot)),
];

/// In a child: sets the limit while pages are away, then works: sweeps, forks, makes threads.
fn limited(ctx: &Ctx, limit: fn(&Ctx) -> Outcome) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(1) {
        ballast.sweep()?;
        let child = process::fork(|| {
            area.writer = 1;
            ballast.sweep()?;
            limit(ctx)?;
            for round in 0..3 {
                area.check_all("process under a limit")?;
                area.scribble(&mut ctx.rng(round), 3);
                ballast.sweep()?;
            }
            let inner = process::fork(|| area.check_all("child of a process under a limit"));
            if let Ok(inner) = inner {
                process::succeed("child of a process under a limit", inner)?;
            }
            area.check_all("process under a limit, at the end")
        })?;
        area.check_order("parent of a limited process", (0..area.len()).step_by(3))?;
        process::succeed("process under a limit", child)?;
    }
    Ok(())
}

fn set(what: libc::__rlimit_resource_t, value: u64) -> Outcome {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: the structure is ours.
    sys::ok("setrlimit", unsafe { libc::setrlimit(what, &raw const limit) }.into()).map(drop)
}

/// A field of /proc/self/status, bytes.
fn status_bytes(key: &str) -> u64 {
    let text = sys::slurp("/proc/self/status");
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or("");
    line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok()).unwrap_or(0) << 10
}

fn address_space(ctx: &Ctx) -> Outcome {
    set(libc::RLIMIT_AS, status_bytes("VmSize:") + (8 << 20))?;
    let beyond = sys::anon(64 << 8);
    ensure!(beyond.is_err(), "64 MiB were mapped beyond RLIMIT_AS");
    // What fits still works.
    let small = Area::filled(ctx.seed, 256)?;
    small.check_all("mapped under RLIMIT_AS")?;
    sys::unmap(small.base, small.len())
}

fn data(_: &Ctx) -> Outcome {
    set(libc::RLIMIT_DATA, status_bytes("VmData:") + (8 << 20))?;
    let beyond = sys::anon(64 << 8);
    ensure!(beyond.is_err(), "64 MiB were mapped beyond RLIMIT_DATA");
    Ok(())
}

/// What is mapped already may be more than the limit, too.
fn none_left(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    for (what, key) in [(libc::RLIMIT_AS, "VmSize:"), (libc::RLIMIT_DATA, "VmData:")] {
        for part in [2, 1] {
            let limited = process::fork(|| {
                set(what, status_bytes(key) / part)?;
                let child = process::fork(|| {
                    area.check_all("child of a process that may map nothing more")?;
                    let grandchild = process::fork(|| area.check_all("grandchild of such a process"))?;
                    process::succeed("grandchild of such a process", grandchild)
                })?;
                process::succeed("child of a process that may map nothing more", child)
            })?;
            process::succeed(&format!("process with a limit of {key} / {part}"), limited)?;
        }
    }
    area.check_all("parent of processes that may map nothing more")
}

/// Soft limits only: a process whose hard limit is 0 cannot be sent the descriptor that a fork brings (README, Limits).
fn files(_: &Ctx) -> Outcome {
    set_soft(libc::RLIMIT_NOFILE, 10)?;
    let (reader, writer) = sys::pipe()?;
    ensure!(reader < 10 && writer < 10, "pipe gave {reader}, {writer}");
    set_soft(libc::RLIMIT_NOFILE, 0)
}

fn set_soft(what: libc::__rlimit_resource_t, soft: u64) -> Outcome {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is written by the call.
    sys::ok("getrlimit", unsafe { libc::getrlimit(what, &raw mut limit) }.into())?;
    limit.rlim_cur = soft;
    // SAFETY: the structure outlives the call.
    sys::ok("setrlimit", unsafe { libc::setrlimit(what, &raw const limit) }.into()).map(drop)
}

fn stack(ctx: &Ctx) -> Outcome {
    set(libc::RLIMIT_STACK, 256 << 10)?;
    let area = Area::filled(ctx.seed, 64)?;
    crate::harness::threads(4, |_| area.check_all("thread under a small RLIMIT_STACK"))?;
    sys::unmap(area.base, 64)
}

fn processes(_: &Ctx) -> Outcome {
    set(libc::RLIMIT_CORE, 0)?;
    set(libc::RLIMIT_NPROC, 0)
}

/// The limit is a user's, and counts threads of agents.
fn few_threads(ctx: &Ctx) -> Outcome {
    // SAFETY: no memory is involved.
    if unsafe { libc::getuid() } != 0 {
        skip!("not root");
    }
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    for (act, most) in [(exec::TWO_THREADS, 2), (exec::FEW_FOR_CHILDREN, 100)] {
        let limited = process::fork(|| {
            set(libc::RLIMIT_NPROC, most)?;
            // Who has no other process here.
            let user = 100_000 + std::process::id();
            // SAFETY: no memory is involved.
            unsafe {
                sys::ok("setgroups", libc::setgroups(0, std::ptr::null()).into())?;
                sys::ok("setgid", libc::setgid(user).into())?;
                sys::ok("setuid", libc::setuid(user).into())?;
            }
            exec::execute(&[act, &ctx.mib.to_string(), &ctx.seed.to_string()])
        })?;
        process::succeed(act, limited)?;
    }
    area.check_all("parent of programs that may start few threads")
}

/// A program whose agent cannot begin, and tries again and again.
pub fn work_with_two_threads(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let read = || {
        let maps = sys::slurp("/proc/self/maps");
        maps.lines().filter(|line| line.contains("spmem")).count()
    };
    // Its agent has tried by then.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let before = read();
    std::thread::sleep(std::time::Duration::from_millis(1000));
    let after = read();
    ensure!(before == after, "its agent had {before} mappings, and has {after}");
    let wait = || std::thread::sleep(std::time::Duration::from_millis(100));
    let started = [(); 2].map(|()| std::thread::Builder::new().spawn(wait).is_ok());
    ensure!(started != [true; 2], "it may start threads: the case proved nothing");
    area.check_all("program that may start two threads")
}

/// One whose children's agents may have no thread, one, two, and so on.
pub fn fork_with_few_threads(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for more in 1..6 {
        ballast.sweep()?;
        let threads = std::fs::read_dir("/proc/self/task")?.count() as u64;
        set_soft(libc::RLIMIT_NPROC, threads + more)?;
        let what = format!("child of a program that may start {more} threads");
        let child = process::fork(|| area.check_all(&what))?;
        process::succeed(&what, child)?;
    }
    area.check_all("program that may start few threads")
}

fn file_size(_: &Ctx) -> Outcome {
    set(libc::RLIMIT_FSIZE, 0)
}

fn memlock(_: &Ctx) -> Outcome {
    set(libc::RLIMIT_MEMLOCK, 0)
}

fn nobody(ctx: &Ctx) -> Outcome {
    // SAFETY: no memory is involved.
    unsafe {
        if libc::getuid() != 0 {
            skip!("not root");
        }
        sys::ok("setgroups", libc::setgroups(0, std::ptr::null()).into())?;
        sys::ok("setgid", libc::setgid(65534).into())?;
        sys::ok("setuid", libc::setuid(65534).into())?;
    }
    // New memory under the new user.
    let area = Area::filled(ctx.seed ^ 2, ctx.pages() / 2)?;
    crate::harness::threads(2, |_| area.check_all("thread of a process that dropped its rights"))?;
    sys::unmap(area.base, area.len())
}

fn not_dumpable(_: &Ctx) -> Outcome {
    // SAFETY: no memory is involved.
    unsafe {
        sys::ok("PR_SET_DUMPABLE", libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0).into())?;
        sys::ok("PR_SET_NO_NEW_PRIVS", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
    }
    Ok(())
}

fn chroot(ctx: &Ctx) -> Outcome {
    // SAFETY: no memory is involved.
    if unsafe { libc::getuid() } != 0 {
        skip!("not root");
    }
    let path = std::env::temp_dir().join(format!("spmem-torture-root-{}", std::process::id()));
    std::fs::create_dir_all(&path)?;
    let name = sys::cstring(&path.to_string_lossy());
    // SAFETY: a valid string; the directory is removed while it is our root.
    unsafe {
        sys::ok("chdir", libc::chdir(name.as_ptr()).into())?;
        libc::rmdir(name.as_ptr());
        sys::ok("chroot", libc::chroot(c".".as_ptr()).into())?;
    }
    ensure!(sys::slurp("/proc/self/status").is_empty(), "/proc is still there");
    let area = Area::filled(ctx.seed ^ 2, 64 * PAGE / PAGE)?;
    area.check_all("memory of a process in an empty root")
}
