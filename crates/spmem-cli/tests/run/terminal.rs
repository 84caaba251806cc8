//! The command at a terminal: a shell with job control on a pseudo-terminal, keys typed into it.

use crate::harness::{PATIENCE, spm_sh, wait_until};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::pty::OpenptFlags;
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

struct Terminal {
    /// The only descriptor of the terminal's other side; none once it has gone away.
    master: Option<Arc<File>>,
    screen: Arc<Mutex<String>>,
    shell: Child,
}

impl Terminal {
    /// A terminal whose session leader is `leader`.
    fn start(leader: &Command) -> Self {
        let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let name = rustix::pty::ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let open = || Stdio::from(File::options().read(true).write(true).open(&name).unwrap());
        // setsid(1) makes the terminal on its stdin the controlling one.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait"]).arg(leader.get_program()).args(leader.get_args());
        command.stdin(open()).stdout(open()).stderr(open());
        let shell = command.spawn().unwrap();
        drop(command);
        let screen = Arc::new(Mutex::new(String::new()));
        let master = Arc::new(File::from(master));
        let (reader, lines) = (Arc::downgrade(&master), Arc::clone(&screen));
        std::thread::spawn(move || {
            while let Some(master) = reader.upgrade() {
                let bytes = read_ready(&master);
                lines.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes));
            }
        });
        Self { master: Some(master), screen, shell }
    }

    fn shell() -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-i"]);
        let mut terminal = Self::start(&shell);
        terminal.keys("PS1=; PS2=; set -m; stty -echo; echo 'pro''mpt'\n");
        terminal.wait_for("prompt");
        terminal
    }

    fn keys(&mut self, keys: &str) {
        let mut master: &File = self.master.as_ref().unwrap();
        master.write_all(keys.as_bytes()).unwrap();
    }

    fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.screen.lock().unwrap().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} on the screen: {:?}", self.screen.lock().unwrap());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// The shell's words for `spm run -- sh -c SCRIPT`.
    fn spm(script: &str) -> String {
        let command = spm_sh(script);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| format!("'{}' ", word.to_str().unwrap())).collect()
    }
}

/// What comes from the terminal within a moment.
fn read_ready(mut master: &File) -> Vec<u8> {
    let moment = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
    let mut bytes = [0; 4096];
    match rustix::event::poll(&mut [PollFd::new(&master, PollFlags::IN)], Some(&moment)) {
        Ok(1) => {
            let len = master.read(&mut bytes).unwrap_or(0);
            bytes[..len].to_vec()
        }
        _ => Vec::new(),
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

#[test]
fn control_c_reaches_the_command_once() {
    let mut terminal = Terminal::shell();
    let script =
        "n=0; trap \"n=\\$((n+1)); echo got=\\$n\" INT; echo up; while [ $n -lt 2 ]; do sleep 0.1; done; exit 6";
    terminal.keys(&format!("{}; echo status=$?\n", Terminal::spm(script)));
    terminal.wait_for("up");
    std::thread::sleep(std::time::Duration::from_millis(100));
    terminal.keys("\x03");
    terminal.wait_for("got=1");
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(!terminal.screen.lock().unwrap().contains("got=2"), "once only");
    terminal.keys("\x03");
    terminal.wait_for("status=6");
}

#[test]
fn control_c_ends_a_command_that_does_not_mind_it() {
    let mut terminal = Terminal::shell();
    terminal.keys(&format!("{}; echo status=$?\n", Terminal::spm("echo up; exec sleep 60")));
    terminal.wait_for("up");
    terminal.keys("\x03");
    terminal.wait_for("status=130");
    terminal.keys("echo ali''ve\n");
    terminal.wait_for("alive");
}

#[test]
fn control_z_stops_the_job_and_fg_continues_it() {
    let mut terminal = Terminal::shell();
    terminal.keys(&format!("{}\n", Terminal::spm("echo up; read -r word; echo word=$word; exit 3")));
    terminal.wait_for("up");
    terminal.keys("\x1a");
    terminal.wait_for("Stopped");
    terminal.keys("echo ba''ck\n");
    terminal.wait_for("back");
    terminal.keys("fg\n");
    std::thread::sleep(std::time::Duration::from_millis(300));
    terminal.keys("hello\n");
    terminal.wait_for("word=hello");
    terminal.keys("echo status=$?\n");
    terminal.wait_for("status=3");
}

#[test]
fn a_job_in_the_background_stops_when_it_reads_the_terminal() {
    let mut terminal = Terminal::shell();
    terminal.keys(&format!("{} &\n", Terminal::spm("echo up; read -r word </dev/tty; echo word=$word")));
    terminal.wait_for("up");
    std::thread::sleep(std::time::Duration::from_millis(300));
    terminal.keys("jobs\n");
    terminal.wait_for("Stopped");
    terminal.keys("fg\n");
    std::thread::sleep(std::time::Duration::from_millis(300));
    terminal.keys("hello\n");
    terminal.wait_for("word=hello");
}

#[test]
fn a_terminal_that_goes_away_hangs_the_command_up() {
    // spm leads the session here, as in `xterm -e spm run ...`: the kernel tells it alone.
    let directory = tempfile::tempdir().unwrap();
    let mark = directory.path().join("hung-up");
    let script = format!("trap 'touch {}; exit 0' HUP; echo up; while :; do sleep 0.05; done", mark.display());
    let mut terminal = Terminal::start(&spm_sh(&script));
    terminal.wait_for("up");
    std::thread::sleep(std::time::Duration::from_millis(100));
    terminal.master = None;
    wait_until("the command hears of it", || mark.exists());
    assert_eq!(terminal.shell.wait().unwrap().code(), Some(0));
}
