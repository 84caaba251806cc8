//! Runs a program under a hard limit and accounts for everything it started.
//!
//! Each run has a process group, a working directory and a mark in its environment of its own; by any of these its
//! processes are found in /proc, daemons included. What is still there at the end (or at the limit) is described,
//! thread by thread, and killed, each by its id.
//!
//! Known hole: a daemon whose environment lies in a page that is away has none of the three (/proc/PID/environ cannot
//! be read then); the daemons of this suite carry an alarm.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

const MARK: &str = "SPMEM_TORTURE_MARK";
/// What of a failed program's output is shown, bytes.
const SHOWN: usize = 6000;
/// How long processes may still be there after the program's end.
const GRACE: Duration = Duration::from_secs(3);

/// How a program ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// With a status.
    Exit(i32),
    /// By a signal.
    Signal(i32),
    /// It did not: it was killed at its limit.
    Late,
}

/// What was seen of a run.
pub struct Watched {
    /// How it ended.
    pub end: End,
    /// What it printed.
    pub output: String,
    /// Processes that were still there, described.
    pub left_behind: String,
    took: Duration,
    command: String,
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.command)?;
        writeln!(f, "ended with {:?} after {:.1} s, saying:", self.end, self.took.as_secs_f64())?;
        let tail = &self.output.as_bytes()[self.output.len().saturating_sub(SHOWN)..];
        f.write_str(&String::from_utf8_lossy(tail))?;
        if !self.left_behind.is_empty() {
            write!(f, "\nstill there (and killed):\n{}", self.left_behind)?;
        }
        Ok(())
    }
}

/// Runs a program to its end or its limit.
pub fn run(command: Command, output: &Path, limit: Duration) -> Watched {
    let mut started = start(command, output);
    let deadline = Instant::now() + limit;
    while started.poll().is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let is_late = started.status.is_none();
    started.finish(is_late)
}

/// Starts a program in a process group of its own, with no descriptors but the standard ones.
pub fn start(mut command: Command, output: &Path) -> Started {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mark = format!("{MARK}={}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
    let place = output.parent().unwrap();
    let file = File::create(output).unwrap();
    let name = format!("{command:?}");
    command.env(MARK, &mark[MARK.len() + 1..]).process_group(0).current_dir(place);
    command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
    // SAFETY: one system call, which allocates nothing.
    unsafe {
        command.pre_exec(|| {
            libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
            Ok(())
        });
    }
    let child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
    let trace = Trace { mark, group: child.id() as i32, place: place.into() };
    Started { child, trace, output: output.into(), begun: Instant::now(), command: name, status: None }
}

/// A program at work.
pub struct Started {
    child: Child,
    trace: Trace,
    output: PathBuf,
    begun: Instant,
    command: String,
    status: Option<ExitStatus>,
}

impl Started {
    fn poll(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().unwrap();
        }
        self.status
    }

    /// Waits for a file to appear; false at the deadline.
    pub fn wait_for(&mut self, path: &Path, deadline: Instant) -> bool {
        while !path.exists() {
            if Instant::now() > deadline || (self.poll().is_some() && self.trace.processes().is_empty()) {
                return path.exists();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Kills the started program itself, not what it started.
    pub fn kill_leader(&mut self) {
        let _ = self.child.kill();
        self.status = self.child.wait().ok();
    }

    /// Describes and kills what is left.
    pub fn finish(mut self, is_late: bool) -> Watched {
        let patience = Instant::now() + if is_late { Duration::ZERO } else { GRACE };
        let mut left = self.trace.processes();
        while !left.is_empty() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(10));
            left = self.trace.processes();
        }
        let left_behind = left.iter().map(|&process| describe(process)).collect();
        // A killed process may have just forked: look again.
        while !left.is_empty() {
            for &process in &left {
                // SAFETY: these carry the mark of this run.
                unsafe { libc::kill(process, libc::SIGKILL) };
            }
            let _ = self.child.try_wait();
            std::thread::sleep(Duration::from_millis(10));
            left = self.trace.processes();
        }
        let status = self.status.unwrap_or_else(|| self.child.wait().unwrap());
        let end = match (is_late, status.code()) {
            (true, _) => End::Late,
            (_, Some(code)) => End::Exit(code),
            (_, None) => End::Signal(status.signal().unwrap_or(0)),
        };
        let bytes = fs::read(&self.output).unwrap_or_default();
        let output = String::from_utf8_lossy(&bytes).into_owned();
        Watched { end, output, left_behind, took: self.begun.elapsed(), command: self.command }
    }
}

/// By what the processes of a run are known.
struct Trace {
    mark: String,
    group: i32,
    place: PathBuf,
}

impl Trace {
    /// Processes of the run that are alive.
    fn processes(&self) -> Vec<i32> {
        let numbers = fs::read_dir("/proc").unwrap().flatten();
        let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers.filter(|&process| self.is_ours(process)).collect()
    }

    fn is_ours(&self, process: i32) -> bool {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        // After the name in parentheses: state, parent, group.
        let mut fields = stat.rsplit(')').next().unwrap_or("").split_whitespace();
        if matches!(fields.next(), None | Some("Z" | "X")) {
            return false;
        }
        if fields.nth(1).and_then(|group| group.parse().ok()) == Some(self.group) {
            return true;
        }
        if fs::read_link(format!("/proc/{process}/cwd")).is_ok_and(|path| path == self.place) {
            return true;
        }
        let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == self.mark.as_bytes())
    }
}

/// What a process is doing, thread by thread.
fn describe(process: i32) -> String {
    let read = |path: String| fs::read_to_string(path).unwrap_or_default();
    let command = read(format!("/proc/{process}/cmdline")).replace('\0', " ");
    let mut text = format!("process {process}: {command}\n");
    for thread in fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
        let thread = thread.path().display().to_string();
        let stat = read(format!("{thread}/stat"));
        let state = stat.rsplit(')').next().unwrap_or("").trim().chars().next().unwrap_or('?');
        let stack = read(format!("{thread}/stack"));
        let stack: Vec<&str> = stack.lines().take(6).map(|line| line.trim_start_matches("[<0>] ")).collect();
        text.push_str(&format!(
            "  {} {:?} state {state} in {:?} call {:?} stack {stack:?}\n",
            thread.rsplit('/').next().unwrap_or(""),
            read(format!("{thread}/comm")).trim(),
            read(format!("{thread}/wchan")),
            read(format!("{thread}/syscall")).trim(),
        ));
    }
    text
}
