use crate::harness::{can_manage, finish, spm_run, spm_sh, text};
use std::os::unix::fs::PermissionsExt;

#[test]
fn the_exit_status_is_the_commands() {
    for code in [0, 1, 7, 125, 255] {
        assert_eq!(finish(spm_sh(&format!("exit {code}"))).status.code(), Some(code));
    }
}

#[test]
fn death_by_a_signal_is_128_plus_its_number() {
    for (name, number) in [("TERM", 15), ("KILL", 9), ("ABRT", 6), ("INT", 2), ("PIPE", 13)] {
        assert_eq!(finish(spm_sh(&format!("kill -{name} $$"))).status.code(), Some(128 + number), "{name}");
    }
}

#[test]
fn a_managed_command_that_sigsys_has_ended_is_named_and_no_other() {
    if !can_manage() {
        println!("skipped: userfaultfd cannot be used here");
        return;
    }
    let output = finish(spm_sh("kill -SYS $$"));
    let remark = text(&output.stderr);
    assert_eq!(output.status.code(), Some(128 + 31));
    assert!(remark.starts_with("spm: process ") && remark.contains(" (sh): SIGSYS has ended it"), "{remark}");
    assert_eq!(remark.lines().count(), 1, "{remark}");
    // So is a child that nobody has waited for yet.
    let output = finish(spm_sh("sh -c 'kill -SYS $$' & exec sleep 1"));
    let remark = text(&output.stderr);
    assert_eq!(remark.matches(" (sh): SIGSYS has ended it").count(), 1, "{remark}");
    assert_eq!(text(&finish(spm_sh("kill -TERM $$")).stderr), "");
}

#[test]
fn what_is_not_found_is_127_and_what_cannot_be_executed_126() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("data");
    std::fs::write(&file, "no program").unwrap();
    let orphan = directory.path().join("orphan");
    std::fs::write(&orphan, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&orphan, std::fs::Permissions::from_mode(0o755)).unwrap();
    let run = |command: &str| {
        let mut spm = spm_run(&[]);
        spm.arg(command);
        let output = finish(spm);
        let remark = text(&output.stderr);
        assert!(remark.starts_with("spm: ") && remark.contains(command), "{remark}");
        output.status.code()
    };
    assert_eq!(run("no-such-command-here"), Some(127));
    assert_eq!(run("./no/such/path"), Some(127));
    assert_eq!(run(orphan.to_str().unwrap()), Some(127));
    assert_eq!(run(file.to_str().unwrap()), Some(126));
    assert_eq!(run("/etc"), Some(126));
}

#[test]
fn a_wrong_command_line_is_125_for_run_and_says_how() {
    for arguments in [&["run"][..], &["run", "--no-such-option", "true"], &["run", "--sysram", "5X", "true"]] {
        let output = finish({
            let mut spm = std::process::Command::new(env!("CARGO_BIN_EXE_spm"));
            spm.args(arguments);
            spm
        });
        assert_eq!(output.status.code(), Some(125), "{arguments:?}");
        assert!(text(&output.stderr).contains("error:"), "{arguments:?}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn options_after_the_command_are_the_commands() {
    let mut spm = spm_run(&[]);
    spm.args(["printf", "%s.", "--json", "-u", "--", "--sysram"]);
    assert_eq!(text(&finish(spm).stdout), "--json.-u.--.--sysram.");
}

#[test]
fn a_script_without_an_interpreter_line_runs_in_the_shell() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("script");
    std::fs::write(&script, "echo \"shell $1\"\nexit 3\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut spm = spm_run(&[]);
    spm.arg(&script).arg("ran");
    let output = finish(spm);
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("shell ran\n", Some(3)));
}
