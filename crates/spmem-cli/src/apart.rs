//! Processes of `spm` that stand apart: forked before a program is started, nobody's child, without its files and terminal.
//!
//! The keeper of a wall (`wall::keeper`) and the porter of a run (`run::porter`).
#![allow(unsafe_code, reason = "fork, which rustix leaves to libc")]

use std::ffi::CStr;

use anyhow::Context;
use rustix::process::Pid;
use spmem_sys::fd::close_all_but;

/// Starts a process with that life; the caller must have one thread. `what` it is, for the error.
///
/// # Errors
/// The kernel gives no process.
pub fn start(what: &str, life: impl FnOnce()) -> anyhow::Result<()> {
    // SAFETY: this process has one thread, so the child may do whatever it could do.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).with_context(|| format!("no process for {what}")),
        0 => {
            // SAFETY: as above; the child in between ends at once, so that the other is nobody's child.
            if unsafe { libc::fork() } == 0 {
                life();
            }
            // SAFETY: ends the process without running what belongs to its parent.
            unsafe { libc::_exit(0) }
        }
        child => {
            let child = Pid::from_raw(child).context("a child without a number")?;
            match rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty()) {
                // Who inherits that SIGCHLD is ignored waits for the end all the same, and has no status (waitpid(2)).
                Ok(_) | Err(rustix::io::Errno::CHILD) => Ok(()),
                Err(error) => Err(error).with_context(|| format!("the start of {what} was lost")),
            }
        }
    }
}

/// First thing in such a life: a session of its own, and no descriptor but `kept`.
pub fn settle(name: &CStr, kept: &[i32]) {
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(name);
    let _ = rustix::process::chdir("/");
    let null = std::fs::File::options().read(true).write(true).open("/dev/null");
    if let Ok(null) = &null {
        let _ = rustix::stdio::dup2_stdin(null);
        let _ = rustix::stdio::dup2_stdout(null);
        let _ = rustix::stdio::dup2_stderr(null);
    }
    let mut kept: Vec<i32> = [0, 1, 2].into_iter().chain(kept.iter().copied()).collect();
    kept.sort_unstable();
    let _ = close_all_but(&kept);
    // What was closed behind its back is not to be closed again.
    std::mem::forget(null);
}
