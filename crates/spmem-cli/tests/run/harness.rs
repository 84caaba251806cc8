//! Starting `spm`, waiting for what its command says, ending it.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Whether programs can be managed on this machine.
pub fn can_manage() -> bool {
    let output = Command::new(env!("CARGO_BIN_EXE_spm")).args(["run", "--", "true"]).output().unwrap();
    !String::from_utf8_lossy(&output.stderr).contains("refused")
}

/// `spm run` with `options`, or the same unmanaged where nothing can be managed. No signal is ignored in it, even where
/// the tests run under nohup(1).
pub fn spm_run(options: &[&str]) -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal", env!("CARGO_BIN_EXE_spm"), "run"]).args(options);
    if !can_manage() {
        command.arg("--best-effort");
    }
    command.arg("--");
    command
}

/// `spm run -- sh -c SCRIPT`.
pub fn spm_sh(script: &str) -> Command {
    let mut command = spm_run(&[]);
    command.args(["sh", "-c", script]);
    command
}

/// Exit status and both outputs of a command that ends by itself.
pub fn finish(mut command: Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A running `spm`, leader of a process group of its own, whose command talks on stdout.
pub struct Running {
    pub child: Child,
    lines: BufReader<ChildStdout>,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let mut child = command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The next line that the command says.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Everything that the command still says, and how `spm` ended.
    pub fn finish(mut self) -> (String, Option<i32>) {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).unwrap();
        let status = self.child.wait().unwrap();
        (rest, status.code())
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn kill(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    pub fn kill_group(&self, signal: Signal) {
        rustix::process::kill_process_group(self.pid(), signal).unwrap();
    }

    /// Waits until `spm` has stopped, and by which signal.
    pub fn wait_stopped(&self) -> Option<i32> {
        let mut stopped = None;
        wait_until("spm stops", || {
            let options = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG;
            stopped = rustix::process::waitid(WaitId::Pid(self.pid()), options).unwrap();
            stopped.is_some()
        });
        stopped.and_then(|status| status.stopping_signal())
    }
}

pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// State letter of a process; `None` when it is gone.
pub fn state(pid: &str) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}
