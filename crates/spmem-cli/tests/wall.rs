//! `spm wall` on the machine at hand: exit status, what passes through, what is left behind. What the wall keeps out takes
//! several nodes: `cargo xtask vm-test --topology numa4`.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Where no cgroup can be made the wall is a policy alone: what is asked here holds there too.
fn wall(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spm"));
    command.args(["wall", "--best-effort"]).args(arguments);
    command
}

fn output(arguments: &[&str]) -> Output {
    wall(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_exit_status_is_the_commands_or_says_why_there_is_none() {
    let status = |arguments: &[&str]| output(arguments).status;
    assert_eq!(status(&["--", "sh", "-c", "exit 3"]).code(), Some(3));
    assert_eq!(status(&["--", "sh", "-c", "kill -TERM $$"]).signal(), Some(15));
    assert_eq!(status(&["--", "/nonexistent"]).code(), Some(127));
    assert_eq!(status(&["--", "/etc/passwd"]).code(), Some(126));
    assert_eq!(status(&["--guard", "soft", "--", "true"]).code(), Some(125));
    assert_eq!(status(&[]).code(), Some(125));
}

#[test]
fn a_node_that_cannot_be_given_is_refused_and_named() {
    for (arguments, said) in [
        (["--mems", "1000"], "there is no node 1000"),
        (["--mems", "0-x"], "expected a node number at byte 2"),
        (["--sysram", "none"], ""),
    ] {
        let output = output(&[arguments[0], arguments[1], "--", "true"]);
        let is_refused = output.status.code() == Some(125);
        assert_eq!(is_refused, !said.is_empty(), "{arguments:?}");
        assert!(text(&output.stderr).contains(said), "{}", text(&output.stderr));
    }
}

#[test]
fn the_command_is_the_process_that_was_started_and_keeps_what_it_inherits() {
    let child = wall(&["--", "sh", "-c", "echo $$; trap"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout).trim(), pid.to_string());
    // SIGPIPE is ignored here, as in every program of Rust's, and so it is there.
    let ignored = |text: &str| text.lines().find(|line| line.starts_with("SigIgn")).map(str::to_owned);
    let there = text_of_status(&["--", "cat", "/proc/self/status"]);
    let bare = Command::new("cat").arg("/proc/self/status").output().unwrap();
    assert_eq!(ignored(&there), ignored(&text(&bare.stdout)));
}

#[test]
fn a_wall_is_made_for_who_ignores_that_children_end() {
    let script = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])";
    let spm = env!("CARGO_BIN_EXE_spm");
    let Ok(output) = Command::new("python3").args(["-c", script, spm, "wall", "--", "echo", "done"]).output()
    else {
        println!("skipped: there is no python3");
        return;
    };
    assert_eq!(text(&output.stdout), "done\n", "{}", text(&output.stderr));
}

fn text_of_status(arguments: &[&str]) -> String {
    text(&output(arguments).stdout)
}

#[test]
fn nothing_is_left_of_a_wall_when_its_last_process_has_ended() {
    let cgroup = text_of_status(&["--", "cat", "/proc/self/cgroup"]);
    let Some(line) = cgroup.lines().find(|line| line.contains("/spm-wall-hard-")) else {
        println!("skipped: no cgroup can be made here");
        return;
    };
    let path = line.rsplit(':').next().unwrap();
    let name = path.rsplit('/').next().unwrap();
    let is_there = || {
        let found = Command::new("find").args(["/sys/fs/cgroup", "-name", name]).output().unwrap();
        !found.stdout.is_empty()
    };
    let start = Instant::now();
    while is_there() {
        assert!(start.elapsed() < Duration::from_secs(10), "{name} is still there");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_reader_of_the_commands_output_sees_its_end_at_once() {
    let start = Instant::now();
    // A process of the wall's outlives the command.
    let output = output(&["--", "sh", "-c", "sleep 20 >/dev/null 2>&1 & echo done"]);
    assert_eq!(text(&output.stdout), "done\n");
    assert!(start.elapsed() < Duration::from_secs(15), "the keeper holds the pipe");
}

#[test]
fn a_file_whose_name_is_no_text_hides_nobody_from_an_audit() {
    let directory = tempfile::tempdir().unwrap();
    let name = directory.path().join(std::ffi::OsStr::from_bytes(b"\xff\xfe"));
    // By another process: a child that another test starts meanwhile would hold our descriptor, and the file stay busy.
    assert!(Command::new("cp").arg("/bin/sleep").arg(&name).status().unwrap().success());
    let mut program = Command::new(&name).arg("20").spawn().unwrap();
    let output =
        Command::new(env!("CARGO_BIN_EXE_spm")).args(["audit", &program.id().to_string()]).output().unwrap();
    program.kill().unwrap();
    program.wait().unwrap();
    assert!(!text(&output.stderr).contains("UTF-8"), "{}", text(&output.stderr));
}

#[test]
fn an_audit_of_a_machine_without_spm_nodes_is_clean() {
    let output = Command::new(env!("CARGO_BIN_EXE_spm")).args(["audit", "--json", "1"]).output().unwrap();
    match output.status.code() {
        Some(0) => assert_eq!(text(&output.stdout).trim(), "[]"),
        other => println!("skipped: status {other:?}, {}", text(&output.stderr)),
    }
    let strange = Command::new(env!("CARGO_BIN_EXE_spm")).args(["audit", "--all", "1"]).output().unwrap();
    assert_eq!(strange.status.code(), Some(2));
}

#[test]
fn an_audit_names_the_processes_that_are_gone_and_looks_at_the_others() {
    // Every page of this machine would be on an SPM node then.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("spm.toml");
    std::fs::write(&file, "[type]\nnode0 = \"spm\"\n").unwrap();
    let mut program = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = program.id().to_string();
    let audit = |numbers: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spm"));
        command.args(["audit", "--json", "--config"]).arg(&file).args(numbers).output().unwrap()
    };
    let (one, twice) = (audit(&[&pid]), audit(&["4194304", &pid, &pid]));
    program.kill().unwrap();
    program.wait().unwrap();
    assert!(text(&twice.stderr).contains("there is no process 4194304"), "{}", text(&twice.stderr));
    if !std::path::Path::new("/sys/devices/system/node/node0").exists() {
        println!("skipped: this kernel does not tell its nodes");
        return;
    }
    // How many pages it has may change: it has only just started.
    let pids = |output: &std::process::Output| {
        let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
        rows.iter().map(|row| row["pid"].to_string()).collect::<Vec<_>>()
    };
    assert_eq!((pids(&one), pids(&twice)), (vec![pid.clone()], vec![pid]));
    assert_eq!((one.status.code(), twice.status.code()), (Some(1), Some(1)));
    assert_eq!(audit(&["4194304"]).status.code(), Some(2));
}

#[test]
fn a_wall_that_keeps_nothing_out_says_so_and_a_node_that_is_not_there_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("spm.toml");
    std::fs::write(&file, "[type]\nnode1000 = \"spm\"\n").unwrap();
    let file = file.to_str().unwrap();
    let said = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_spm")).args(arguments).output().unwrap();
        text(&output.stderr)
    };
    let absent = "the configuration makes node1000 spm, but the kernel has no memory on such a node";
    for command in
        [&["wall", "--config", file, "--", "true"][..], &["audit", "--config", file], &["nodes", "--config", file]]
    {
        assert!(said(command).contains(absent), "{command:?}: {}", said(command));
    }
    if std::path::Path::new("/sys/devices/system/node/node1").exists() {
        println!("skipped: this machine has several nodes");
        return;
    }
    for command in [&["wall", "--", "true"][..], &["run", "--best-effort", "--guard", "hard", "--", "true"]] {
        assert!(said(command).contains("this wall keeps nothing out"), "{command:?}: {}", said(command));
    }
    assert!(!said(&["run", "--best-effort", "--", "true"]).contains("wall"));
}

/// The walls of this process number that are there.
fn walls_of(pid: u32) -> Vec<String> {
    let name = format!("spm-wall-*-{pid}");
    let found = Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-name", &name]).output().unwrap();
    text(&found.stdout).lines().map(str::to_owned).collect()
}

/// A wall around a program that stays; none where no cgroup can be made.
fn staying(arguments: &[&str]) -> Option<std::process::Child> {
    let mut child = wall(arguments).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut line = [0; 1];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
    if walls_of(child.id()).is_empty() {
        println!("skipped: no cgroup can be made here");
        child.kill().unwrap();
        child.wait().unwrap();
        return None;
    }
    Some(child)
}

fn wait_until_gone(pid: u32) {
    while !walls_of(pid).is_empty() {
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The keeper of the wall around a command with this word: it has the command line that it was forked with. The command may run before the
/// keeper has its name.
fn keeper_of(word: &str) -> String {
    loop {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let mut numbers = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let found = numbers.find(|number| {
            let read = |name| std::fs::read_to_string(format!("/proc/{number}/{name}")).unwrap_or_default();
            read("comm").trim() == "spm-keeper" && read("cmdline").contains(word)
        });
        match found {
            Some(number) => return number,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn kill(pid: &str) {
    assert!(Command::new("kill").args(["-KILL", pid]).status().unwrap().success());
}

#[test]
fn a_wall_whose_command_is_killed_goes_and_one_with_a_process_left_stays_until_that_is_gone_too() {
    let script = "sleep 1000 >/dev/null & echo $!; exec sleep 1000";
    let Some(mut child) = staying(&["--", "sh", "-c", script]) else { return };
    let pid = child.id();
    child.kill().unwrap();
    let procs = |path: &String| std::fs::read_to_string(format!("{path}/cgroup.procs")).unwrap();
    let inside: Vec<String> = walls_of(pid).iter().map(procs).collect();
    let last = inside.concat();
    let last = last.lines().find(|line| *line != pid.to_string()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    child.wait().unwrap();
    assert_eq!(walls_of(pid).len(), 1, "somebody lives there");
    kill(last);
    wait_until_gone(pid);
}

#[test]
fn what_a_killed_keeper_leaves_the_next_wall_removes() {
    let word = "1000.0625";
    let Some(mut child) = staying(&["--", "sh", "-c", &format!("echo; exec sleep {word}")]) else { return };
    kill(&keeper_of(word));
    child.kill().unwrap();
    child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(walls_of(child.id()).len(), 1, "nobody removes it");
    assert!(wall(&["--", "true"]).status().unwrap().success());
    wait_until_gone(child.id());
}

#[test]
fn a_wall_inside_a_wall_stands_below_it_and_both_go() {
    let spm = env!("CARGO_BIN_EXE_spm");
    let script = "cat /proc/self/cgroup; exec sleep 1000";
    let Some(mut child) = staying(&["--", spm, "wall", "--best-effort", "--", "sh", "-c", script]) else { return };
    let mut walls = walls_of(child.id());
    walls.sort();
    assert!(walls.len() == 2 && walls[1].starts_with(&walls[0]), "{walls:?}");
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until_gone(child.id());
}

#[test]
fn a_hundred_walls_at_once_leave_nothing() {
    let start = || wall(&["--", "sleep", "0.1"]).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let all: Vec<_> = (0..100).map(|_| start()).collect();
    let numbers: Vec<u32> = all.iter().map(std::process::Child::id).collect();
    for child in all {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    numbers.into_iter().for_each(wait_until_gone);
}

#[test]
fn a_file_that_is_called_like_a_doors_or_a_runs_makes_no_grant() {
    use spmem_sys::region::Region;
    if !std::path::Path::new("/sys/devices/system/node/node0").exists() {
        println!("skipped: this kernel does not tell its nodes");
        return;
    }
    // Every page of this machine would be on an SPM node then.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("spm.toml");
    std::fs::write(&file, "[type]\nnode0 = \"spm\"\n").unwrap();
    let names = [c"spmem-crossing", c"spmem-door", c"spmem-control"];
    let files = names.map(|name| Region::published(name, 1 << 20).unwrap());
    files.iter().for_each(|file| file.write(0, &[1; 1 << 20]).unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_spm"));
    command.args(["audit", "--json", "--config"]).arg(&file).arg(std::process::id().to_string());
    let output = command.output().unwrap();
    let found: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(found.iter().all(|one| one["by"].is_null() && one["is_clean"] == false), "{found:?}");
    assert!(found[0]["pages"].as_u64().unwrap() > 3 * 256, "{found:?}");
}
