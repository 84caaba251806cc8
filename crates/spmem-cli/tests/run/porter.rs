//! A run whose porter is stopped, and ended.

use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Running, can_manage, spm_run, wait_until};

/// It has the command line that it was forked with.
fn porter_of(word: &str) -> Option<Pid> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let mut numbers = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let number = numbers.find(|number| {
        let read = |name| std::fs::read_to_string(format!("/proc/{number}/{name}")).unwrap_or_default();
        read("comm").trim() == "spm-porter" && read("cmdline").contains(word)
    })?;
    Pid::from_raw(number.parse().unwrap())
}

#[test]
fn a_porter_that_is_stopped_or_ended_is_told_of_once_and_is_in_the_report() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (config, json, table, errors) = (path("spm.toml"), path("json"), path("table"), path("errors"));
    // This machine's own node stands in for a slower one.
    std::fs::write(&config, "[[node]]\nid = 2\nkind = \"numa\"\nnode = 0\n").unwrap();
    let plan = Command::new(env!("CARGO_BIN_EXE_spm")).args(["run", "--config", &config, "--", "true"]).output();
    if !can_manage() || !plan.unwrap().status.success() {
        println!("skipped: there are no nodes here, or nothing can be managed");
        return;
    }
    let mut spm = spm_run(&["--config", &config, "--json", &json, &format!("--report={table}")]);
    spm.args(["sh", "-c", "echo ready; read word; exit 0"]).stderr(std::fs::File::create(&errors).unwrap());
    let mut run = Running::start(spm);
    assert_eq!(run.line(), "ready");
    let porter = porter_of(&config).unwrap();
    let said = || std::fs::read_to_string(&errors).unwrap();
    kill_process(porter, Signal::STOP).unwrap();
    wait_until("a stopped porter is told of", || said().contains("is stopped"));
    kill_process(porter, Signal::CONT).unwrap();
    kill_process(porter, Signal::KILL).unwrap();
    wait_until("an ended porter is told of", || said().contains("has been ended"));
    assert_eq!(run.finish().1, Some(0));
    let number = format!("the porter (process {})", porter.as_raw_nonzero());
    assert_eq!(said().matches(&number).count(), 2, "{}", said());
    assert!(said().contains("node 2"), "{}", said());
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["porter"], "has_ended");
    let table = std::fs::read_to_string(&table).unwrap();
    assert!(table.contains("  porter     ended before the command"), "{table}");
}
