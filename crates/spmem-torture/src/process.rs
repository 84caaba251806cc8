//! Children: made, watched, judged.

use crate::harness::{EXIT_SKIPPED, Failure, Outcome, Res, bail, report};
use crate::sys;

/// How a child ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// It exited with a status.
    Exit(i32),
    /// A signal killed it.
    Signal(i32),
}

/// Forks; the child runs `body`, reports what it found wrong and ends with `_exit`.
pub fn fork(body: impl FnOnce() -> Outcome) -> Res<i32> {
    // SAFETY: the child goes on in a copy of this program; glibc makes its allocator usable there.
    let pid = unsafe { libc::fork() };
    run_child("fork", pid, body)
}

/// What both sides of any kind of fork do next.
pub fn run_child(what: &str, pid: i32, body: impl FnOnce() -> Outcome) -> Res<i32> {
    match pid {
        0 => leave(verdict(body())),
        pid => Ok(sys::ok(what, pid.into())? as i32),
    }
}

/// Ends the process without handlers.
pub fn leave(status: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(status) }
}

/// Reports an outcome; gives the exit status for it.
pub fn verdict(outcome: Outcome) -> i32 {
    match outcome {
        Ok(()) => 0,
        Err(failure) => {
            report(&failure.to_string());
            if matches!(failure, Failure::Skipped(_)) { EXIT_SKIPPED } else { 1 }
        }
    }
}

/// Waits for a child.
pub fn wait(pid: i32) -> Res<End> {
    let mut status = 0;
    loop {
        // SAFETY: the status is ours.
        let got = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        if got == pid {
            return Ok(end(status));
        }
        if sys::errno() != libc::EINTR {
            bail!("waitpid({pid}) gave {got}: {}", std::io::Error::last_os_error());
        }
    }
}

/// Whether a child has not ended yet; it is still to be waited for.
pub fn is_running(pid: i32) -> Res<bool> {
    // SAFETY: a siginfo_t of zeros is one.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` is a siginfo_t.
    sys::ok("waitid", unsafe { libc::waitid(libc::P_PID, pid.cast_unsigned(), &raw mut info, flags) }.into())?;
    // SAFETY: waitid filled it in, or left zeros.
    Ok(unsafe { info.si_pid() } == 0)
}

/// Waits for any child; `None` when there is none.
pub fn wait_any() -> Option<End> {
    let mut status = 0;
    // SAFETY: the status is ours.
    (unsafe { libc::waitpid(-1, &raw mut status, 0) } > 0).then(|| end(status))
}

/// Reads a wait status.
pub fn end(status: i32) -> End {
    if libc::WIFSIGNALED(status) {
        End::Signal(libc::WTERMSIG(status))
    } else {
        End::Exit(libc::WEXITSTATUS(status))
    }
}

/// Waits for a child that must succeed.
pub fn succeed(what: &str, pid: i32) -> Outcome {
    match wait(pid)? {
        End::Exit(0) => Ok(()),
        End::Exit(EXIT_SKIPPED) => Err(Failure::Skipped(format!("{what}: skipped by the child"))),
        other => bail!("{what}: child {pid} ended with {other:?}"),
    }
}

/// Waits for a child that must end in a certain way.
pub fn ends(what: &str, pid: i32, wanted: End) -> Outcome {
    match wait(pid)? {
        end if end == wanted => Ok(()),
        other => bail!("{what}: child {pid} ended with {other:?}, expected {wanted:?}"),
    }
}

/// Sends a signal.
pub fn kill(pid: i32, signal: i32) -> Outcome {
    // SAFETY: no memory is involved.
    sys::ok("kill", unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// Sleeps.
pub fn nap(milliseconds: u64) {
    std::thread::sleep(std::time::Duration::from_millis(milliseconds));
}
