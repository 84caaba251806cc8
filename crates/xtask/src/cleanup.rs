//! What must be undone before this process ends, however it ends.
//!
//! [`Undo`] is a guard that performs its [`Step`] when dropped. The steps are also kept in one list, because the
//! release profile aborts on panic (no destructor runs) and Ctrl-C ends the process: the panic hook and the signal
//! handler installed by [`install`] walk that list, newest first. One lock, held for list operations only.
//!
//! Known hole: SIGKILL of this process undoes nothing; what it leaves carries its process id in the name
//! (`spmem-xtask-PID` cgroup, and one zram device that is listed in /proc/swaps).

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};

use crate::process_tree;

static STEPS: Mutex<Vec<(u64, Step)>> = Mutex::new(Vec::new());
static NEXT: AtomicU64 = AtomicU64::new(0);
/// Set when the handler of signals has taken over: it alone undoes what is left, and then ends the process.
static IS_INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// How often a step that the kernel refuses for the moment (EBUSY) is tried, [`RETRY_PAUSE`] apart.
const RETRIES: usize = 50;
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// One thing to undo.
#[derive(Clone)]
pub(crate) enum Step {
    /// SIGKILL a process and its descendants.
    Kill(u32),
    /// `swapoff` a device.
    Swapoff(PathBuf),
    /// Write `1` to a file of /sys (zram's `reset`).
    WriteOne(PathBuf),
    /// Write a number to a file of /sys (zram's `hot_remove`).
    WriteNumber(PathBuf, u32),
    /// Remove an empty cgroup, once the processes in it are gone.
    RemoveCgroup(PathBuf),
    /// Remove a scratch directory with all in it.
    RemoveTree(PathBuf),
}

/// Performs its step when dropped, or when the process panics or is told to end, whichever is first.
pub(crate) struct Undo(u64);

impl Undo {
    /// Remembers `step`.
    pub(crate) fn new(step: Step) -> Self {
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        lock().push((id, step));
        Self(id)
    }

    /// Forgets the step: it has become unnecessary.
    pub(crate) fn forget(self) {
        lock().retain(|(id, _)| *id != self.0);
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        wait_if_interrupted();
        let step = {
            let mut steps = lock();
            steps.iter().position(|(id, _)| *id == self.0).map(|index| steps.remove(index).1)
        };
        if let Some(step) = step {
            perform(&step);
        }
    }
}

/// Makes panics and SIGINT, SIGTERM, SIGHUP undo what is left.
pub(crate) fn install() -> anyhow::Result<()> {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        undo_all();
    }));
    ctrlc::set_handler(|| {
        // SeqCst: with the lock of the list in between, no guard that is dropped later can miss it.
        IS_INTERRUPTED.store(true, Ordering::SeqCst);
        eprintln!("\nxtask: interrupted, cleaning up");
        undo_all();
        std::process::exit(130);
    })
    .context("cannot handle Ctrl-C")
}

/// Does not return once a signal has arrived: the process must not end before the handler is done.
pub(crate) fn wait_if_interrupted() {
    while IS_INTERRUPTED.load(Ordering::SeqCst) {
        sleep(RETRY_PAUSE);
    }
}

fn lock() -> std::sync::MutexGuard<'static, Vec<(u64, Step)>> {
    STEPS.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn undo_all() {
    loop {
        let newest = lock().pop();
        let Some((_, step)) = newest else { return };
        perform(&step);
    }
}

fn perform(step: &Step) {
    let outcome = match step {
        Step::Kill(pid) => {
            kill_tree(*pid);
            Ok(())
        }
        Step::Swapoff(device) => retry(|| swapoff(device)),
        Step::WriteOne(file) => retry(|| write(file, "1")),
        Step::WriteNumber(file, number) => retry(|| write(file, &number.to_string())),
        Step::RemoveCgroup(dir) => {
            kill_cgroup(dir);
            retry(|| fs::remove_dir(dir).with_context(|| format!("cannot remove {}", dir.display())))
        }
        Step::RemoveTree(dir) => match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        },
    };
    if let Err(error) = outcome {
        eprintln!("xtask: clean-up failed: {error:#}");
    }
}

fn retry(attempt: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<()> {
    for _ in 1..RETRIES {
        if attempt().is_ok() {
            return Ok(());
        }
        sleep(RETRY_PAUSE);
    }
    attempt()
}

fn swapoff(device: &PathBuf) -> anyhow::Result<()> {
    let output = Command::new("swapoff").arg(device).output().context("cannot run swapoff")?;
    let active = fs::read_to_string("/proc/swaps").unwrap_or_default().contains(&*device.to_string_lossy());
    anyhow::ensure!(!active, "swapoff {}: {}", device.display(), String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

fn write(file: &PathBuf, text: &str) -> anyhow::Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {text} to {}", file.display()))
}

fn kill_tree(root: u32) {
    for pid in process_tree::collect_pids(root) {
        kill(pid);
    }
}

fn kill_cgroup(dir: &std::path::Path) {
    for line in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
        if let Ok(pid) = line.parse() {
            kill(pid);
        }
    }
}

fn kill(pid: u32) {
    // Gone already is what we want; anything else shows when the next step is refused.
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
}
