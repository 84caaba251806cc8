//! Which processes come under management. Skipped where userfaultfd cannot be used.

use crate::harness::{Running, can_manage, finish, spm_run, text};
use crate::programs::{static_sleeper, static_waiter};

/// Managed and unmanaged processes of `sh -c SCRIPT`; `None` and a remark where nothing can be managed.
fn counts(script: &str) -> Option<(u64, u64)> {
    if !can_manage() {
        println!("skipped: userfaultfd cannot be used here");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("report.json");
    let mut spm = spm_run(&["--json", file.to_str().unwrap()]);
    spm.args(["sh", "-c", script]);
    finish(spm);
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let count = |key: &str| report[key].as_u64().unwrap();
    Some((count("processes"), count("unmanaged_processes")))
}

#[test]
fn a_command_is_managed_and_its_exec_counts_once() {
    let Some(counts_alone) = counts("exit 0") else { return };
    assert_eq!(counts_alone, (1, 0));
    assert_eq!(counts("exec sh -c 'exec true'"), Some((1, 0)));
}

#[test]
fn children_by_fork_and_exec_are_managed() {
    let Some(all) = counts("sh -c 'exit 0'; (exit 0); :") else { return };
    assert_eq!(all, (3, 0));
}

#[test]
fn a_child_that_cannot_be_managed_runs_and_is_counted() {
    let directory = tempfile::tempdir().unwrap();
    let waiter = static_waiter(directory.path());
    // Long enough to be told from a program whose agent is late.
    let script = format!("{} & sleep 3; kill $!; wait", waiter.display());
    let Some((_, unmanaged)) = counts(&script) else { return };
    assert_eq!(unmanaged, 1);
}

/// A shell forks for the first and may vfork(2) for the second; no agent hears of that.
#[test]
fn a_child_that_cannot_be_managed_is_counted_once_however_it_was_started() {
    let directory = tempfile::tempdir().unwrap();
    let sleeper = static_sleeper(directory.path());
    for script in ["({} & wait); :", "{}; :"] {
        let Some((_, unmanaged)) = counts(&script.replace("{}", sleeper.to_str().unwrap())) else { return };
        assert_eq!(unmanaged, 1, "{script}");
    }
}

#[test]
fn a_child_under_another_user_is_managed() {
    if !rustix::process::getuid().is_root() {
        println!("skipped: needs root to become somebody else");
        return;
    }
    let Some(all) = counts("setpriv --reuid 65534 --clear-groups sh -c 'exit 0'; :") else { return };
    assert_eq!(all, (2, 0));
}

/// What three processes sort is more than node 1 holds: what does not fit stays in RAM, and nothing is lost (R18).
#[test]
fn processes_share_the_capacity_of_node_1_and_no_line_is_lost() {
    if !can_manage() {
        println!("skipped: userfaultfd cannot be used here");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (config, file) = (directory.path().join("spm.toml"), directory.path().join("report.json"));
    std::fs::write(&config, "[[node]]\nid = 1\nkind = \"compressed\"\ncapacity = \"4M\"\n").unwrap();
    let sort =
        |from: u32| format!("(seq {from} {} | LC_ALL=C sort -rS 64M | cksum > sum{from}) &", from + 500_000);
    let script = [1_000_000, 2_000_000, 3_000_000].map(sort).join(" ") + " wait; cat sum*";
    let run = |mut command: std::process::Command| {
        command.args(["sh", "-c", &script]).current_dir(directory.path());
        text(&finish(command).stdout)
    };
    let bare = run(std::process::Command::new("env"));
    let (config, file) = (config.to_str().unwrap(), file.to_str().unwrap());
    let spm = spm_run(&["--sysram", "16M", "--json", file, "--config", config]);
    assert_eq!(run(spm), bare);
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let used = report["nodes"][1]["used_bytes_peak"].as_u64().unwrap();
    assert!(report["refused_pages"]["node_full"].as_u64().unwrap() > 0, "{report}");
    // Each looks at what the others have stored a moment ago.
    assert!(used <= 8 << 20, "{used} bytes");
}

/// Some of these limits leave the agent too little: then the program runs without a budget.
#[test]
fn a_program_whose_data_are_limited_ends_as_it_would_alone() {
    if !can_manage() {
        println!("skipped: userfaultfd cannot be used here");
        return;
    }
    let ends = |script: &str| {
        let mut bare = std::process::Command::new("sh");
        bare.args(["-c", script]);
        let mut managed = spm_run(&["--sysram", "6M"]);
        managed.args(["sh", "-c", script]);
        assert_eq!(text(&finish(managed).stdout), text(&finish(bare).stdout), "{script}");
    };
    // The first takes its memory at once, the second after its agent has what it wants.
    ends(
        "for k in 28 32 36 40 44 48 52; do \
        (ulimit -d ${k}000; seq 300000 | LC_ALL=C timeout -s KILL 60 sort -rS 20M | cksum); done",
    );
    ends(
        "for k in 48 60 80 120 160; do (ulimit -d ${k}000; (sleep 0.5; seq 4000000) | tail -c 30M | cksum); done",
    );
}

/// The limit counts its agent's, and is that of a user who has no other process.
#[test]
fn a_program_that_may_start_no_thread_ends_as_it_would_alone_and_is_said_to_be_without_a_budget() {
    let user = 200_000 + std::process::id();
    let limited = format!(
        "(seq 4000000; sleep 0.5) | setpriv --reuid={user} --clear-groups prlimit --nproc=2 tail -c 20M | cksum"
    );
    let bare = std::process::Command::new("sh").args(["-c", &limited]).output().unwrap();
    if !can_manage() || !bare.stderr.is_empty() {
        println!("skipped: userfaultfd cannot be used here, or setpriv(1): {}", text(&bare.stderr));
        return;
    }
    let mut managed = spm_run(&["--sysram", "6M", "--report"]);
    managed.args(["sh", "-c", &limited]);
    let output = finish(managed);
    assert_eq!(text(&output.stdout), text(&bare.stdout));
    let remarks = text(&output.stderr);
    assert_eq!(remarks.matches("may start no thread").count(), 1, "{remarks}");
    assert!(remarks.contains("1 of its processes ran without a budget)"), "{remarks}");
}

#[test]
fn what_is_at_the_path_of_a_file_node_is_left_alone_and_two_runs_each_have_a_file() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (config, node) = (directory.path().join("spm.toml"), directory.path().join("node2"));
    let table = format!("[[node]]\nid = 2\nkind = \"file\"\npath = {node:?}\ncapacity = \"8M\"\n");
    std::fs::write(&config, table).unwrap();
    std::fs::write(&node, "somebody's").unwrap();
    let config = config.to_str().unwrap();
    let mut first = spm_run(&["--config", config]);
    first.args(["sh", "-c", "echo up; read line"]);
    let mut first = Running::start(first);
    assert_eq!(first.line(), "up");
    let mut second = spm_run(&["--config", config]);
    second.args(["echo", "both"]);
    let output = finish(second);
    assert_eq!(text(&output.stdout), "both\n", "{output:?}");
    assert_eq!(first.finish().1, Some(1), "read(1) of sh at the end of its input");
    let mut names: Vec<_> =
        std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(
        (names, std::fs::read(&node).unwrap()),
        (vec!["node2".into(), "spm.toml".into()], b"somebody's".to_vec())
    );
}
