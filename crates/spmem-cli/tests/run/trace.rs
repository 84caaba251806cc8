//! `--trace`: what it says agrees with the report, and it can be run again. Skipped where userfaultfd cannot be used.

use crate::harness::{can_manage, finish, spm_run, text};
use spmem_core::units::Bytes;
use spmem_sim::program::{From, Record, Recording, run};

#[test]
fn a_trace_agrees_with_the_report_and_can_be_run_again() {
    if !can_manage() {
        println!("skipped: userfaultfd cannot be used here");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (trace, json) = (directory.path().join("run.trace"), directory.path().join("report.json"));
    let options = ["--sysram", "24M", "--trace", trace.to_str().unwrap(), "--json", json.to_str().unwrap()];
    let mut spm = spm_run(&options);
    spm.args([env!("CARGO_BIN_EXE_spm"), "tour-load", "--mebibytes", "64", "--touch-ms", "300"]);
    let output = finish(spm);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));

    let recording = Recording::read(&std::fs::read_to_string(&trace).unwrap()).unwrap();
    assert_eq!(recording.budget(), Some(Bytes::mib(24)));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let count = |key: &str| report[key].as_u64().unwrap();
    let came = |wanted: From| -> u64 {
        let pages = recording.records.iter().map(|record| match record {
            Record::Fault { pages, from, .. } if *from == wanted => *pages,
            _ => 0,
        });
        pages.sum()
    };
    let left = recording.records.iter().filter(|record| matches!(record, Record::Demote { .. })).count() as u64;
    assert!(count("demoted_pages") > 1000 && count("promoted_pages") > 1000, "{report}");
    // Pages that leave unchanged are no records; those of a machine too busy to write them are counted.
    let lost = recording.lost();
    assert!(left <= count("demoted_pages") && left + lost > 0);
    assert!(
        (count("promoted_pages").saturating_sub(32 * lost)..=count("promoted_pages")).contains(&came(From::Node))
    );
    assert!((count("rescued_pages").saturating_sub(lost)..=count("rescued_pages")).contains(&came(From::Holding)));

    let again = run(recording.setup(Bytes::mib(24))).unwrap();
    assert!(again.promoted > 0 && again.accesses >= came(From::Node), "{again:?}");
    let roomy = run(recording.setup(Bytes::mib(256))).unwrap();
    assert_eq!((roomy.promoted, roomy.accesses), (0, again.accesses));
}

#[test]
fn pages_that_leave_for_a_file_are_in_the_trace_and_come_back_in_a_replay() {
    if !can_manage() {
        println!("skipped: userfaultfd cannot be used here");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [trace, json, config, file] =
        ["run.trace", "report.json", "spmem.toml", "node2"].map(|name| directory.path().join(name));
    let table = format!("[[node]]\nid = 2\nkind = \"file\"\npath = {file:?}\ncapacity = \"64M\"\n");
    std::fs::write(&config, table).unwrap();
    let paths = [&config, &trace, &json].map(|path| path.to_str().unwrap());
    let mut spm = spm_run(&["--config", paths[0], "--sysram", "24M", "--trace", paths[1], "--json", paths[2]]);
    spm.args([env!("CARGO_BIN_EXE_spm"), "tour-load", "--mebibytes", "64", "--touch-ms", "300"]);
    let output = finish(spm);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));

    let recording = Recording::read(&std::fs::read_to_string(&trace).unwrap()).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let demoted = report["nodes"][2]["demoted_pages"].as_u64().unwrap_or_else(|| panic!("{report}"));
    let left = recording.records.iter().filter(|record| matches!(record, Record::Place { node: 2, .. })).count();
    assert!(demoted > 1000 && left as u64 <= demoted, "{left} of {demoted}");
    assert!(left as u64 + recording.lost() >= demoted, "{left} of {demoted}");
    let again = run(recording.setup(Bytes::mib(24))).unwrap();
    assert!(again.promoted > 0, "{again:?}");
}

#[test]
fn a_trace_that_cannot_be_written_is_refused_before_anything_starts() {
    let directory = tempfile::tempdir().unwrap();
    let mut spm = spm_run(&["--trace", directory.path().to_str().unwrap()]);
    spm.args(["echo", "started"]);
    let output = finish(spm);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(125), ""));
    assert!(text(&output.stderr).contains("the trace"), "{}", text(&output.stderr));
}
