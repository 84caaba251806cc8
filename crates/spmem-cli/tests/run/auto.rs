//! Automatic budgets. Skipped where userfaultfd cannot be used.

use serde_json::Value;

use crate::harness::{can_manage, finish, spm_run, text};

#[test]
fn a_slow_down_is_for_an_automatic_budget_only() {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_spm"));
    command.args(["run", "--sysram", "64M", "--slowdown", "5%", "true"]);
    let output = finish(command);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("--slowdown is for --sysram auto"), "{}", text(&output.stderr));
}

#[test]
fn a_program_that_leaves_its_memory_alone_gives_it_back_and_gets_every_byte_again() {
    if !can_manage() {
        println!("skipped: userfaultfd cannot be used here");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (file, svg) = (directory.path().join("report.json"), directory.path().join("course.svg"));
    // 64 MiB of numbers are held while nothing happens, then compared.
    let script =
        "a=$(seq -f %015.0f 1 2000000); sleep 6; test \"$a\" = \"$(seq -f %015.0f 1 2000000)\" && echo same";
    let files = ["--json", file.to_str().unwrap(), "--svg", svg.to_str().unwrap()];
    let mut spm = spm_run(&[&["--sysram", "auto", "--slowdown", "50%"][..], &files].concat());
    spm.args(["bash", "-c", script]).env("LC_ALL", "C");
    let output = finish(spm);
    assert_eq!(text(&output.stdout), "same\n", "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let auto = &report["auto"];
    let (smallest, peak) =
        (auto["smallest_bytes"].as_u64().unwrap(), report["sysram_peak_bytes"].as_u64().unwrap());
    assert!(report["demoted_pages"].as_u64().unwrap() > 0, "{report}");
    assert!(smallest < peak / 10 * 9, "{report}");
    assert!(!auto["steps"].as_array().unwrap().is_empty(), "{report}");
    assert!(std::fs::read_to_string(&svg).unwrap().contains("</svg>"));
}
