//! fork(3) under a tracer, which stops it where no program could: the parent is killed at each step that it takes for its
//! child, or the child is held at its birth.
//!
//! Alone among the cases these know a name of spm's: that of the thread that serves a process's faults. Bare there is none.

use crate::area::{Area, Ballast, check_zero};
use crate::harness::{Case, Ctx, Outcome, Res, bail, ensure, skip};
use crate::model::PAGE;
use crate::process::{self, End};
use crate::sys;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

pub const CASES: &[Case] = &[
    Case::new(
        "fork-killed",
        "a child of fork(3) whose parent is killed at any step of it has its pages or ends, never zeros",
        killed,
    ),
    Case::new(
        "fork-nursed",
        "a child of fork(3) that is held at its birth is given nothing younger than itself",
        nursed,
    ),
    Case::new("fork-served", "a thread gets its cold pages while a child of fork(3) is held at its birth", served),
];

/// What a child checks before anything else of the program runs in it.
static CHECKED: AtomicPtr<Area> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn check_first() {
    // SAFETY: lives as long as the process that set it, of which this is a copy.
    let Some(area) = (unsafe { CHECKED.load(Relaxed).as_ref() }) else { return };
    let outcome = area.check_all("a child whose parent is killed, before fork(3) returns");
    if outcome.is_err() {
        process::leave(process::verdict(outcome));
    }
}

/// Handlers of fork(3) run in the order of their registration: none is before this one.
extern "C" fn be_first() {
    let is_asked = std::fs::read("/proc/self/cmdline")
        .is_ok_and(|text| text.split(|&byte| byte == 0).any(|word| word == b"fork-killed"));
    if is_asked {
        // SAFETY: the function stays as long as the process runs.
        unsafe { libc::pthread_atfork(None, None, Some(check_first)) };
    }
}

#[used]
#[unsafe(link_section = ".preinit_array")]
static BE_FIRST: extern "C" fn() = be_first;

/// How far a parent came.
#[derive(PartialEq, Eq)]
enum Step {
    /// It was killed at this step.
    Killed,
    /// fork(3) had returned before.
    Over,
}

fn killed(ctx: &Ctx) -> Outcome {
    // SAFETY: no memory is involved.
    sys::ok("prctl", unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }.into())?;
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages() / 8)?;
    ballast.sweep()?;
    ballast.sweep()?;
    let (mut right, mut ended, mut step) = (0, 0, 0);
    loop {
        step += 1;
        let is_over = kill_at(&mut area, step, &mut right, &mut ended)? == Step::Over;
        if is_over {
            break;
        }
    }
    crate::harness::report(&format!("{step} steps: {right} children were right, {ended} ended"));
    ensure!(right > 0, "no child lived");
    area.check_all("the grandparent of children whose parents were killed")
}

fn kill_at(area: &mut Area, step: usize, right: &mut usize, ended: &mut usize) -> Res<Step> {
    let (told, tell) = sys::pipe()?;
    let (go, let_go) = sys::pipe()?;
    let parent = process::fork(|| {
        CHECKED.store(&raw mut *area, Relaxed);
        let mut byte = [b'r'];
        sys::write_full(tell, byte.as_ptr() as usize, 1)?;
        sys::read_full(go, byte.as_mut_ptr() as usize, 1)?;
        process::fork(|| area.check_all("a child whose parent is killed"))?;
        sys::write_full(tell, byte.as_ptr() as usize, 1)?;
        loop {
            process::nap(1000);
        }
    })?;
    let mut byte = 0_u8;
    sys::read_full(told, (&raw mut byte) as usize, 1)?;
    let server = server_of(parent);
    if let Some(server) = server {
        seize(server, libc::PTRACE_O_TRACESYSGOOD)?;
        // SAFETY: stops the thread.
        sys::ok("PTRACE_INTERRUPT", unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, server, 0, 0) })?;
        wait_stopped(server)?;
    }
    sys::write_full(let_go, (&raw const byte) as usize, 1)?;
    let reached = follow(server, told, step)?;
    if reached == Step::Killed {
        // Whoever else can go on does.
        process::nap(3);
    }
    process::kill(parent, libc::SIGKILL)?;
    let mut status = 0;
    loop {
        // SAFETY: the status is ours.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) };
        if pid < 0 {
            break;
        }
        if libc::WIFSTOPPED(status) || pid == parent || Some(pid) == server {
            continue;
        }
        match process::end(status) {
            End::Exit(0) => *right += 1,
            End::Signal(libc::SIGABRT | libc::SIGBUS | libc::SIGSEGV) => *ended += 1,
            other => bail!("a child whose parent was killed at step {step} ended with {other:?}"),
        }
    }
    [told, tell, go, let_go].into_iter().for_each(sys::close);
    Ok(reached)
}

/// Lets the thread take `step` steps: system calls, each in two. Without one, waits until fork(3) is over.
fn follow(server: Option<i32>, told: i32, step: usize) -> Res<Step> {
    let is_told = || {
        let mut entry = libc::pollfd { fd: told, events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, ours.
        unsafe { libc::poll(&raw mut entry, 1, 0) == 1 }
    };
    for _ in 0..step {
        if let Some(server) = server {
            // SAFETY: lets it run to its next step.
            sys::ok("PTRACE_SYSCALL", unsafe { libc::ptrace(libc::PTRACE_SYSCALL, server, 0, 0) })?;
        }
        loop {
            let mut status = 0;
            // SAFETY: the status is ours.
            let has_stopped = server.is_some_and(|server| unsafe {
                libc::waitpid(server, &raw mut status, libc::WNOHANG | libc::__WALL) > 0
            });
            if has_stopped {
                ensure!(libc::WIFSTOPPED(status), "the server of a parent ended by itself: {status:#x}");
                break;
            }
            if is_told() {
                return Ok(Step::Over);
            }
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
    }
    Ok(Step::Killed)
}

/// The thread that serves the faults of a process.
fn server_of(pid: i32) -> Option<i32> {
    loop {
        let tasks: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/task"))
            .ok()?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        let is_server = |tid: &&i32| sys::slurp(&format!("/proc/{pid}/task/{tid}/comm")).trim() == "spm-fault";
        match tasks.iter().find(is_server) {
            Some(&tid) => return Some(tid),
            None if tasks.len() < 2 => return None,
            // It has yet to take its name.
            None => process::nap(1),
        }
    }
}

/// Traces a task, which goes on.
pub fn seize(tid: i32, options: i32) -> Outcome {
    // SAFETY: changes no memory.
    if unsafe { libc::ptrace(libc::PTRACE_SEIZE, tid, 0, options) } < 0 {
        skip!("PTRACE_SEIZE: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

/// Waits until a traced task stops; the status.
pub fn wait_stopped(tid: i32) -> Res<i32> {
    let mut status = 0;
    // SAFETY: the status is ours.
    let got = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
    ensure!(got == tid && libc::WIFSTOPPED(status), "a traced task did not stop: {got}, {status:#x}");
    Ok(status)
}

/// While a child is held, another thread of the parent touches pages for the first time, has ranges wiped in children, and
/// drives out what it can. A tracer reads the child meanwhile, a page at a time: one that was read once is there for good.
fn nursed(ctx: &Ctx) -> Outcome {
    const PAGES: usize = 1024;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let wiped = Area::filled(ctx.seed + 1, PAGES)?;
    let mut young = Area::new(ctx.seed + 2, PAGES)?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    let (told, tell) = sys::pipe()?;
    let own = std::process::id() as i32;
    let tracer = process::fork(|| {
        let child = hold_next(own, tell)?;
        let outcome = read_newborn(child, &area, &young);
        // SAFETY: lets the child go on.
        sys::ok("PTRACE_DETACH", unsafe { libc::ptrace(libc::PTRACE_DETACH, child, 0, 0) })?;
        outcome
    })?;
    sys::close(tell);
    let mut byte = 0_u8;
    // It traces; where it may not, it has ended.
    if sys::read_full(told, (&raw mut byte) as usize, 1)? == 1 {
        let base = young.base;
        std::thread::scope(|scope| {
            let busy = scope.spawn(|| {
                // The child is there, and held.
                let mut byte = 0_u8;
                sys::read_full(told, (&raw mut byte) as usize, 1)?;
                young.write_all();
                sys::advise(wiped.base, PAGES, libc::MADV_WIPEONFORK)?;
                ballast.sweep()
            });
            let child = process::fork(|| {
                check_zero("pages that the parent touched first after the fork", base, PAGES)?;
                area.check_all("a child that was held at its birth")
            });
            let child = child.and_then(|child| process::succeed("a child that was held at its birth", child));
            crate::harness::all([child, crate::harness::join(busy)])
        })?;
    }
    process::succeed("the tracer of a child", tracer)?;
    sys::close(told);
    for area in [&area, &wiped, &young] {
        area.check_all("the parent of a child that was held at its birth")?;
    }
    Ok(())
}

/// The tracer lets go of the child once a thread of the parent has got its pages. A thread that would wait for the child would do
/// so until the child has been given all its pages and runs without a server.
fn served(ctx: &Ctx) -> Outcome {
    /// On a busy machine a child may be given its pages because a thread was slow.
    const TRIES: usize = 20;
    const HAS_NO_SERVER: i32 = 3;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let own = std::process::id() as i32;
    for number in 0..TRIES {
        ballast.sweep()?;
        let (told, tell) = sys::pipe()?;
        let (go, let_go) = sys::pipe()?;
        let tracer = process::fork(|| {
            let child = hold_next(own, tell)?;
            let mut byte = 0_u8;
            sys::read_full(go, (&raw mut byte) as usize, 1)?;
            // SAFETY: lets the child go on.
            sys::ok("PTRACE_DETACH", unsafe { libc::ptrace(libc::PTRACE_DETACH, child, 0, 0) }).map(drop)
        })?;
        sys::close(tell);
        let mut byte = 0_u8;
        if sys::read_full(told, (&raw mut byte) as usize, 1)? == 0 {
            return process::succeed("the tracer of a child", tracer);
        }
        let pages = number * 64 % area.len()..(number * 64 + 64) % area.len();
        let end = std::thread::scope(|scope| {
            let busy = scope.spawn(|| {
                let mut byte = 0_u8;
                sys::read_full(told, (&raw mut byte) as usize, 1)?;
                // The forking thread has gone to wait for its child.
                process::nap(50);
                let outcome = area.check_order("a thread beside a fork", pages);
                sys::write_full(let_go, (&raw const byte) as usize, 1)?;
                outcome
            });
            let child = process::fork(|| {
                area.check_all("a child that was held at its birth")?;
                process::leave(if server_of(std::process::id() as i32).is_some() { 0 } else { HAS_NO_SERVER })
            });
            let end = child.and_then(process::wait);
            crate::harness::join(busy).and(end)
        })?;
        process::succeed("the tracer of a child", tracer)?;
        [told, go, let_go].into_iter().for_each(sys::close);
        area.check_all("the parent of a child that was held at its birth")?;
        match end {
            End::Exit(0) => return Ok(()),
            End::Exit(HAS_NO_SERVER) if server_of(own).is_none() => return Ok(()),
            End::Exit(HAS_NO_SERVER) => {}
            other => bail!("a child that was held at its birth ended with {other:?}"),
        }
    }
    bail!("in {TRIES} tries a thread waited until a child had got all its pages")
}

/// Traces `parent` and says so, keeps the next child that it forks from running, and says that.
fn hold_next(parent: i32, tell: i32) -> Res<i32> {
    seize(parent, libc::PTRACE_O_TRACEFORK)?;
    sys::write_full(tell, c"r".as_ptr() as usize, 1)?;
    let status = wait_stopped(parent)?;
    ensure!(status >> 8 == libc::SIGTRAP | libc::PTRACE_EVENT_FORK << 8, "the parent stopped with {status:#x}");
    let mut child: libc::c_ulong = 0;
    // SAFETY: writes one number of ours.
    let got = unsafe { libc::ptrace(libc::PTRACE_GETEVENTMSG, parent, 0, &raw mut child) };
    sys::ok("PTRACE_GETEVENTMSG", got)?;
    wait_stopped(child as i32)?;
    // SAFETY: lets the parent go on.
    sys::ok("PTRACE_DETACH", unsafe { libc::ptrace(libc::PTRACE_DETACH, parent, 0, 0) })?;
    sys::write_full(tell, c"h".as_ptr() as usize, 1)?;
    Ok(child as i32)
}

/// What a child has that has not run yet: what was there at the fork, and nothing of what was not.
fn read_newborn(child: i32, area: &Area, young: &Area) -> Outcome {
    let (mut found, mut wanted) = ([0_u8; PAGE], [0_u8; PAGE]);
    let pages = (0..young.len()).map(|page| (young, page)).chain((0..area.len()).map(|page| (area, page)));
    for (from, page) in pages {
        let here = libc::iovec { iov_base: found.as_mut_ptr().cast(), iov_len: PAGE };
        let there = libc::iovec { iov_base: from.addr(page) as *mut _, iov_len: PAGE };
        // SAFETY: writes to a page of ours.
        let got = unsafe { libc::process_vm_readv(child, &raw const here, 1, &raw const there, 1, 0) };
        ensure!(sys::ok("process_vm_readv of a newborn", got as i64)? == PAGE, "a page was read in part");
        from.expected(page, &mut wanted);
        let is_young = std::ptr::eq(from, young);
        if is_young {
            process::nap(1);
        }
        ensure!(found == wanted, "page {page} of a newborn (touched after the fork: {is_young}) is wrong");
    }
    Ok(())
}
