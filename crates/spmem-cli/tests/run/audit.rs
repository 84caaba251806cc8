//! What `spm audit` tells of programs that run under `spm`.

use std::process::{Command, Output};

use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use crate::harness::{Running, can_manage, spm_run, text, wait_until};

fn audit(pid: &str, options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_spm")).arg("audit").args(options).arg(pid).output().unwrap()
}

#[test]
fn an_audit_shows_what_a_run_has_copied_to_a_file_and_compressed() {
    if !can_manage() {
        println!("skipped: userfaultfd cannot be used here");
        return;
    }
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (config, node) = (directory.path().join("spm.toml"), directory.path().join("node2"));
    let table = format!("[[node]]\nid = 2\nkind = \"file\"\npath = {node:?}\ncapacity = \"8M\"\n");
    std::fs::write(&config, table).unwrap();
    let mut spm = spm_run(&["--config", config.to_str().unwrap(), "--sysram", "24M"]);
    let script = "echo $$; exec \"$0\" tour-load --mebibytes 64 --touch-ms 600000";
    spm.args(["sh", "-c", script, env!("CARGO_BIN_EXE_spm")]);
    let mut run = Running::start(spm);
    let pid = run.line();
    let (mut rows, mut may_look) = (Vec::new(), true);
    wait_until("pages are on both nodes", || {
        let output = audit(&pid, &["--json"]);
        may_look = !text(&output.stderr).contains("CAP_SYS_ADMIN");
        assert_eq!(output.status.code(), Some(if may_look { 0 } else { 2 }), "{output:?}");
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        rows.clone_from(found.as_array().unwrap());
        // With the first few pages, node 1 may have more frames than pages.
        rows.len() >= 2 && rows.iter().all(|row| row["pages"].as_u64() > Some(500)) || !may_look
    });
    if may_look {
        for (row, (node, kind)) in rows.iter().zip([(1, "compressed"), (2, "file")]) {
            assert_eq!((&row["pid"].to_string(), row["node"].as_u64()), (&pid, Some(node)), "{row}");
            let by = json!({ "kind": "run", "process": run.child.id(), "grant": node.to_string() });
            assert_eq!((row["kind"].as_str(), &row["by"]), (Some(kind), &by), "{row}");
            assert!(row["is_clean"] == true && row["wall"].is_null() && row["command"] == "spm", "{row}");
            let (pages, bytes) = (row["pages"].as_u64().unwrap(), row["bytes"].as_u64().unwrap());
            assert!((500..=16384).contains(&pages) && (1..=pages * 4096).contains(&bytes), "{row}");
        }
        assert!(rows[1]["bytes"].as_u64().unwrap() <= 8 << 20, "{}", rows[1]);

        let all = Command::new(env!("CARGO_BIN_EXE_spm")).args(["audit", "--all"]).output().unwrap();
        for table in [text(&audit(&pid, &[]).stdout), text(&all.stdout)] {
            let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            let of_it: Vec<_> = table.lines().map(words).filter(|words| words[0] == pid).collect();
            let nodes: Vec<_> = of_it.iter().map(|words| words[2..4].join(" ")).collect();
            assert_eq!(nodes, ["1 compressed", "2 file"], "{table}");
            let by = |words: &Vec<String>| format!("{}/{}", run.child.id(), words[2]);
            assert!(of_it.iter().all(|words| words[7..] == ["run", &by(words), "on", "purpose"]), "{table}");
        }
        let spm = run.child.id().to_string();
        assert_eq!(text(&audit(&spm, &["--json"]).stdout).trim(), "[]", "spm itself has nothing there");
    } else {
        println!("skipped: what others map cannot be opened here");
    }
    let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    assert_eq!(run.finish().1, Some(137));
}

#[test]
fn an_audit_finds_the_pages_of_a_process_whose_first_thread_has_ended() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("spm.toml");
    std::fs::write(&config, "[type]\nnode0 = \"spm\"\n").unwrap();
    // 60 is exit(2), of one thread.
    let script = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); \
                  ctypes.CDLL(None).syscall(60, 0)";
    let Ok(mut child) = Command::new("python3").args(["-c", script]).spawn() else {
        println!("skipped: there is no python3");
        return;
    };
    let pid = child.id().to_string();
    let state = || std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    wait_until("the first thread has ended", || state().contains("State:\tZ"));
    let output = audit(&pid, &["--json", "--config", config.to_str().unwrap()]);
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    if text(&output.stderr).contains("numa_maps") {
        println!("skipped: this kernel is without numa_maps");
        return;
    }
    let pages = |row: &Value| row["pages"].as_u64().unwrap();
    assert!(all.as_array().unwrap().iter().map(pages).sum::<u64>() > 100, "{all}");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}
