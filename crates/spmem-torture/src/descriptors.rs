//! Descriptors, children and the other things a program counts: management adds and takes none.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, bail, ensure};
use crate::process::{self, End};
use crate::sys;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case::new("fd-census", "the program sees 0, 1, 2 and its own descriptors only", census),
    Case::new("fd-close-range", "close_range(3, ~0) leaves the memory whole", |ctx| in_child(ctx, close_range)),
    Case::new("fd-closefrom", "closing every number up to 4,096 leaves the memory whole", |ctx| {
        in_child(ctx, closefrom)
    }),
    Case::new("fd-close-all", "closing 0, 1, 2 as well leaves the memory whole", |ctx| in_child(ctx, close_all)),
    Case::new("fd-dup2-over", "dup2 over every low number leaves the memory whole", |ctx| {
        in_child(ctx, dup2_over)
    }),
    Case::new("fd-unshare", "unsharing the descriptor table leaves the memory whole", |ctx| {
        in_child(ctx, unshare)
    }),
    Case::new("fd-close-threads", "closing all descriptors while threads fault", |ctx| {
        in_child(ctx, close_with_threads)
    }),
    Case::new("fd-lowest", "new descriptors get the lowest free numbers", lowest),
    Case::new(
        "daemon",
        "a daemon (double fork, setsid, all closed) keeps its memory and reports by a file",
        daemon,
    ),
    Case::new("pipe-eof", "a pipe ends when its last writer in the program closes", eof),
    Case::new("wait-own", "waitpid(-1) returns own children only, SIGCHLD comes for these only", own_children),
    Case::new("proc-self", "limits, working directory, umask, name, nice and mask stay as they were", unchanged),
];

fn census(ctx: &Ctx) -> Outcome {
    let surprising = sys::surprising_descriptors();
    ensure!(surprising.is_empty(), "{surprising:?} are open at the start, expected none from 3 on");
    let before = sys::descriptors();
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        ensure!(sys::descriptors() == before, "open now: {:?}, expected {before:?}", sys::descriptors());
        let free = sys::free_descriptors(2);
        let (reader, writer) = sys::pipe()?;
        ensure!([reader, writer] == *free, "pipe() gave {reader} and {writer}, expected {free:?}");
        let with_pipe = sys::descriptors();
        let child = process::fork(|| {
            let open = sys::descriptors();
            ensure!(open == with_pipe, "open in a child: {open:?}, expected {with_pipe:?}");
            area.check_order("child that counts", (0..area.len()).step_by(5))
        })?;
        process::succeed("child that counts", child)?;
        sys::close(reader);
        sys::close(writer);
        let output = std::process::Command::new(std::env::current_exe()?).arg("@descriptors").output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(said.trim() == "[]", "open from 3 on in a program started by exec: {said}");
        area.check_all("after counting")?;
    }
    Ok(())
}

/// Forks, does `close` in the child, and lets the child verify its cold memory after that; the verdict is the status.
fn in_child(ctx: &Ctx, close: fn(&Area) -> Outcome) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(1) {
        ballast.sweep()?;
        let child = process::fork(|| {
            area.writer = 1;
            ballast.sweep()?;
            close(&area)?;
            for step in 0..3 {
                area.check_all("process that closed its descriptors")?;
                area.scribble(&mut ctx.rng(step), 3);
                ballast.sweep()?;
            }
            let inner = process::fork(|| area.check_all("child of a process that closed its descriptors"))?;
            process::succeed("child of a process that closed its descriptors", inner)
        })?;
        area.check_order("parent of a closing child", (0..area.len()).step_by(3))?;
        process::succeed("child that closed its descriptors", child)?;
        area.scribble(&mut ctx.rng(round), 3);
        area.check_all("parent, after the closing child")?;
    }
    // And the process itself, without a fork.
    ballast.sweep()?;
    close_range(&area)?;
    area.check_all("process that closed its descriptors itself")?;
    ballast.sweep()
}

fn close_range(_: &Area) -> Outcome {
    // SAFETY: no memory is involved.
    sys::ok("close_range", unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) }).map(drop)
}

fn closefrom(_: &Area) -> Outcome {
    (3..4096).for_each(sys::close);
    Ok(())
}

fn close_all(_: &Area) -> Outcome {
    (0..4096).for_each(sys::close);
    Ok(())
}

fn dup2_over(_: &Area) -> Outcome {
    // SAFETY: no memory is involved.
    unsafe {
        let null = sys::ok("open", libc::open(c"/dev/null".as_ptr(), libc::O_RDWR).into())? as i32;
        let mut limit: libc::rlimit = std::mem::zeroed();
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        for fd in 3..(limit.rlim_cur.min(1024) as i32) {
            if fd != null {
                libc::dup2(null, fd);
            }
        }
    }
    Ok(())
}

fn unshare(area: &Area) -> Outcome {
    // SAFETY: no memory is involved.
    sys::ok("unshare", unsafe { libc::unshare(libc::CLONE_FILES) }.into())?;
    closefrom(area)
}

fn close_with_threads(area: &Area) -> Outcome {
    crate::harness::threads(3, |id| {
        if id == 0 { closefrom(area) } else { area.check_all("thread beside one that closes all") }
    })
}

fn lowest(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(3) {
        ballast.sweep()?;
        let mut open = Vec::new();
        for wanted in sys::free_descriptors(50) {
            // SAFETY: no memory is involved.
            let fd = sys::ok("eventfd", unsafe { libc::eventfd(0, 0) }.into())? as i32;
            ensure!(fd == wanted, "a new descriptor is {fd}, expected {wanted}");
            open.push(fd);
        }
        open.into_iter().for_each(sys::close);
        area.check_order("between descriptors", (0..area.len()).step_by(3))?;
    }
    Ok(())
}

/// The daemon's own life, after the double fork; its verdict goes to `path`, first under another name.
fn live(ctx: &Ctx, area: &mut Area, ballast: &mut Ballast, path: &std::path::Path) -> ! {
    area.writer = 1;
    let outcome = (|| -> Outcome {
        close_all(area)?;
        // SAFETY: no memory is involved.
        unsafe {
            libc::alarm(300);
            for _ in 0..3 {
                libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
            }
            sys::ok("chdir", libc::chdir(c"/".as_ptr()).into())?;
        }
        let until = Instant::now() + ctx.time;
        for round in 0u64.. {
            area.check_all("daemon")?;
            area.scribble(&mut ctx.rng(round), 3);
            ballast.sweep()?;
            if round >= 2 && Instant::now() > until {
                break;
            }
        }
        Ok(())
    })();
    let text = outcome.err().map_or("ok".to_string(), |failure| failure.to_string());
    let draft = path.with_extension("draft");
    let is_written = std::fs::write(&draft, text).and_then(|()| std::fs::rename(&draft, path)).is_ok();
    process::leave(i32::from(!is_written))
}

fn daemon(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    let path = std::env::temp_dir().join(format!("spmem-torture-daemon-{}", std::process::id()));
    let path = ctx.out.as_ref().map_or(path, std::path::PathBuf::from);
    let _ = std::fs::remove_file(&path);
    let child = process::fork(|| {
        // SAFETY: no memory is involved.
        sys::ok("setsid", unsafe { libc::setsid() }.into())?;
        // SAFETY: the grandchild never returns from `live`.
        if sys::ok("fork", unsafe { libc::fork() }.into())? == 0 {
            live(ctx, &mut area, &mut ballast, &path);
        }
        Ok(())
    })?;
    process::succeed("first half of a double fork", child)?;
    let limit = Instant::now() + ctx.time * 10 + Duration::from_secs(60);
    while !path.exists() {
        ensure!(Instant::now() < limit, "no verdict of the daemon in {}", path.display());
        area.check_order("the daemon's ancestor", (0..area.len()).step_by(5))?;
        process::nap(20);
    }
    let verdict = sys::slurp(&path.to_string_lossy());
    if ctx.out.is_none() {
        let _ = std::fs::remove_file(&path);
    }
    ensure!(verdict == "ok", "the daemon says: {verdict}");
    Ok(())
}

fn readable(fd: i32, milliseconds: i32) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure of our own.
    unsafe { libc::poll(&raw mut poll, 1, milliseconds) > 0 }
}

fn eof(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        // A child holds the writing end, then ends.
        let (reader, writer) = sys::pipe()?;
        let child = process::fork(|| {
            sys::close(reader);
            area.check_order("child with a pipe", (0..area.len()).step_by(9))?;
            sys::write_full(writer, area.addr(0), 10)
        })?;
        sys::close(writer);
        let mut bytes = [0u8; 64];
        process::succeed("child with a pipe", child)?;
        ensure!(readable(reader, 5000), "the child has gone, yet its pipe neither ends nor holds bytes");
        ensure!(
            sys::read_full(reader, bytes.as_mut_ptr() as usize, 10)? == 10,
            "the child's bytes did not arrive"
        );
        ensure!(readable(reader, 5000), "the child has gone, yet its pipe does not end");
        ensure!(sys::read_full(reader, bytes.as_mut_ptr() as usize, 1)? == 0, "more bytes than were written");
        sys::close(reader);
        // The same process: a copy keeps it open, closing the copy ends it; a new process meanwhile changes nothing.
        let (reader, writer) = sys::pipe()?;
        // SAFETY: no memory is involved.
        let copy = sys::ok("dup", unsafe { libc::dup(writer) }.into())? as i32;
        area.check_order("between closing", (0..area.len()).step_by(3))?;
        sys::close(writer);
        ensure!(!readable(reader, 0), "the pipe ended though a copy of its end is open");
        ballast.sweep()?;
        sys::close(copy);
        ensure!(readable(reader, 5000), "all writers are closed, yet the pipe does not end");
        sys::close(reader);
        // The other direction: writing without readers.
        let (reader, writer) = sys::pipe()?;
        ballast.sweep()?;
        sys::close(reader);
        // SAFETY: SIGPIPE is ignored by Rust's runtime: EPIPE.
        let put = unsafe { libc::write(writer, area.base as *const _, 1) };
        ensure!(put == -1 && sys::errno() == libc::EPIPE, "a write without readers gave {put}");
        sys::close(writer);
    }
    Ok(())
}

static CHILDREN: AtomicU32 = AtomicU32::new(0);

extern "C" fn child_ended(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    CHILDREN.fetch_add(1, Relaxed);
}

fn own_children(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    sys::on_signal(libc::SIGCHLD, child_ended, libc::SA_RESTART)?;
    let mut made = 0;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let mut status = 0;
        for options in [libc::WNOHANG, libc::WNOHANG | libc::__WALL] {
            // SAFETY: the status is ours.
            let got = unsafe { libc::waitpid(-1, &raw mut status, options) };
            ensure!(got == -1 && sys::errno() == libc::ECHILD, "waitpid(-1) gave {got} though no child was made");
        }
        ensure!(CHILDREN.load(Relaxed) == made, "{} SIGCHLD came, expected {made}", CHILDREN.load(Relaxed));
        for number in 0..5 {
            let child =
                process::fork(|| area.check_order("child that is waited for", (number..area.len()).step_by(11)))?;
            // SAFETY: as above.
            let got = unsafe { libc::waitpid(-1, &raw mut status, 0) };
            ensure!(
                got == child && process::end(status) == End::Exit(0),
                "waitpid(-1) gave {got} ({:?}), expected {child}",
                process::end(status)
            );
            made += 1;
        }
        ensure!(CHILDREN.load(Relaxed) == made, "{} SIGCHLD came, expected {made}", CHILDREN.load(Relaxed));
    }
    Ok(())
}

/// What a process can ask about itself, as text.
fn portrait() -> String {
    let status = sys::slurp("/proc/self/status");
    let kept = [
        "Name:",
        "Umask:",
        "TracerPid:",
        "Uid:",
        "Gid:",
        "SigQ:",
        "SigBlk:",
        "SigIgn:",
        "SigCgt:",
        "NoNewPrivs:",
        "Seccomp:",
    ];
    let lines: Vec<&str> =
        status.lines().filter(|line| kept.iter().any(|key| line.starts_with(key) && *key != "SigQ:")).collect();
    let cwd = std::env::current_dir().unwrap_or_default();
    // SAFETY: no memory is involved.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    format!("{}\n{}\nnice {nice}\n{}", lines.join("\n"), cwd.display(), sys::slurp("/proc/self/limits"))
}

fn unchanged(ctx: &Ctx) -> Outcome {
    let before = portrait();
    if !before.contains("TracerPid:\t0") {
        bail!("a tracer is attached: {before}");
    }
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        area.check_all("memory")?;
        let now = portrait();
        ensure!(now == before, "the process changed by itself: before {before}\nnow {now}");
    }
    Ok(())
}
