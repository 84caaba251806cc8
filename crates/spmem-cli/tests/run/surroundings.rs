//! What the command finds around it is what `spm` found.

use crate::harness::{Running, finish, spm_run, spm_sh, text};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

#[test]
fn stdin_passes_through_byte_for_byte() {
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut spm = spm_run(&[]);
    spm.arg("cat").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = spm.spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let input = bytes.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&input).unwrap());
    let mut output = Vec::new();
    stdout.read_to_end(&mut output).unwrap();
    writer.join().unwrap();
    assert!(child.wait().unwrap().success());
    assert!(output == bytes, "{} bytes of {}", output.len(), bytes.len());
}

#[test]
fn spm_says_nothing_of_its_own_on_stdout() {
    let output = finish(spm_sh("echo out; echo err >&2"));
    assert_eq!(text(&output.stdout), "out\n");
}

#[test]
fn the_name_the_arguments_and_the_directory_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let mut spm = spm_sh("pwd; printf '%s|' \"$0\" \"$@\"");
    spm.args(["name", "", "a b", "*"]).current_dir(directory.path());
    let expected = format!("{}\nname||a b|*|", directory.path().canonicalize().unwrap().display());
    assert_eq!(text(&finish(spm).stdout), expected);
}

#[test]
fn the_command_shares_process_group_and_session() {
    let script = "cut -d' ' -f5,6 /proc/$$/stat; cut -d' ' -f5,6 /proc/$PPID/stat";
    let mut running = Running::start(spm_sh(script));
    let (own, parents) = (running.line(), running.line());
    assert_eq!(own, parents);
    assert!(own.starts_with(&format!("{} ", running.child.id())), "{own}");
    running.finish();
}

/// What `spm` was started with: `set_up` runs in a shell that then becomes spm.
fn under(set_up: &str, script: &str) -> String {
    let spm = spm_sh(script);
    let mut shell = shell();
    shell.arg(format!("{set_up}\nexec \"$@\"")).arg("sh");
    // Without the harness's env(1), which would undo what was set up.
    shell.args(spm.get_args().skip_while(|&argument| argument != env!("CARGO_BIN_EXE_spm")));
    text(&finish(shell).stdout)
}

/// `sh -c`, no signal ignored.
fn shell() -> Command {
    let mut shell = Command::new("env");
    shell.args(["--default-signal", "sh", "-c"]);
    shell
}

/// Lines of /proc/self/status of a process that `spm` started directly.
fn status_lines(set_up: &str, pattern: &str) -> String {
    under(set_up, &format!("exec grep -E '{pattern}' /proc/self/status"))
}

#[test]
fn ignored_signals_stay_ignored_and_others_default() {
    for ignored in ["", "HUP", "PIPE", "CHLD", "INT QUIT", "TERM USR1"] {
        let set_up = if ignored.is_empty() { String::new() } else { format!("trap '' {ignored}") };
        let mut bare = shell();
        bare.arg(format!("{set_up}\nexec sh -c 'exec grep -E SigIgn /proc/self/status'"));
        assert_eq!(status_lines(&set_up, "SigIgn"), text(&finish(bare).stdout), "{ignored}");
    }
}

#[test]
fn no_signal_is_blocked_that_was_not() {
    assert_eq!(status_lines("", "SigBlk").split_whitespace().last(), Some("0000000000000000"));
}

#[test]
fn limits_are_the_commands_own() {
    assert_eq!(under("ulimit -Sn 64", "ulimit -Sn").trim(), "64");
}

#[test]
fn too_few_descriptors_are_refused_before_anything_runs() {
    for (limit, words) in
        [("-n 38", "hard limit of open files is 38, spm needs 39"), ("-Sn 15", "is 15, the agent needs 16")]
    {
        let run = |options: &str| {
            let mut command = shell();
            let spm = env!("CARGO_BIN_EXE_spm");
            command.arg(format!("ulimit {limit}; exec {spm} run {options} -- echo ran"));
            finish(command)
        };
        let refused = run("");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(125) && refused.stdout.is_empty(), "{limit}: {refused:?}");
        assert!(said.contains(words) && said.contains("raise it"), "{limit}: {said}");
        assert_eq!(text(&run("--best-effort").stdout), "ran\n", "{limit}");
    }
    // A script whose subshells come and go: with the least there is, they are managed or told that they are not.
    let script = "for i in $(seq 12); do (echo $(echo ok)); done";
    assert_eq!(under("ulimit -n 39", script), "ok\n".repeat(12));
}

#[test]
fn no_descriptor_of_spms_own_reaches_the_command() {
    let mut bare = Command::new("sh");
    bare.args(["-c", "exec ls /proc/self/fd"]);
    assert_eq!(under("", "exec ls /proc/self/fd"), text(&finish(bare).stdout));
}

#[test]
fn closed_standard_descriptors_stay_closed() {
    assert_eq!(under("exec 0<&-", "[ -e /proc/$$/fd/0 ] && echo open || echo closed").trim(), "closed");
    assert_eq!(under("exec 2>&-", "[ -e /proc/$$/fd/2 ] && echo open || echo closed").trim(), "closed");
}

#[test]
fn more_processes_than_spm_has_descriptors_for_run_all_the_same() {
    let script = "for i in $(seq 40); do sh -c 'sleep 0.3; echo ok' & done; wait";
    assert_eq!(under("ulimit -n 64", script), "ok\n".repeat(40));
}

#[test]
fn what_was_preloaded_before_still_is() {
    let mut spm = spm_run(&[]);
    spm.args(["sh", "-c", "exit 6"]).env("LD_PRELOAD", "libc.so.6");
    assert_eq!(finish(spm).status.code(), Some(6));
}

#[test]
fn a_session_leader_runs_as_any_other() {
    let spm = spm_sh("exit 5");
    let mut command = Command::new("setsid");
    command.arg("--wait").arg(spm.get_program()).args(spm.get_args());
    command.process_group(0);
    assert_eq!(finish(command).status.code(), Some(5));
}

/// A pid namespace whose processes belong to a session outside: it has the number 0 there. `spm` is its first process
/// (as in a container that runs nothing else) or another.
#[test]
fn a_session_outside_the_pid_namespace_is_no_obstacle() {
    let spm = spm_sh("exit 5");
    for first_process in [&[][..], &["sh", "-c", "\"$@\"; exit $?", "sh"]] {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--mount-proc"]).args(first_process);
        command.arg(spm.get_program()).args(spm.get_args());
        let output = finish(command);
        if text(&output.stderr).contains("unshare: ") {
            eprintln!("SKIPPED: {}", text(&output.stderr).trim());
            return;
        }
        assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    }
}
