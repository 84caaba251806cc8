//! Whether an answer that stdout does not take is told from one that it takes.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::fs::File;
use std::process::{Command, Stdio};

fn spm(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spm"));
    command.args(arguments);
    command
}

#[test]
fn a_full_stdout_is_a_failure() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for (arguments, status) in [
        (&["--help"][..], 1),
        (&["--version"], 1),
        (&["run", "--help"], 125),
        (&["nodes"], 1),
        (&["explain", "--nodes", "0"], 2),
    ] {
        let output = spm(arguments).stdout(full()).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{arguments:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn a_closed_stdout_is_a_failure() {
    for arguments in ["--help", "nodes", "explain --nodes 0", "audit $$"] {
        let script = format!("'{}' {arguments} >&-", env!("CARGO_BIN_EXE_spm"));
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("Bad file descriptor"), "{arguments}: {said}");
    }
}

#[test]
fn a_reader_that_went_away_is_none() {
    let script = format!("{{ '{}' --help; echo $? >&2; }} | true", env!("CARGO_BIN_EXE_spm"));
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let status = String::from_utf8_lossy(&output.stderr);
    assert!(["0", "141"].contains(&status.trim()), "{status}");
}
