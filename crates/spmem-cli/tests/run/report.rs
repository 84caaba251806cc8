use crate::harness::{finish, spm_run, text};
use serde_json::Value;

fn report(options: &[&str], command: &[&str]) -> Value {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("report.json");
    let mut options = options.to_vec();
    options.extend(["--json", file.to_str().unwrap()]);
    let mut spm = spm_run(&options);
    spm.args(command);
    finish(spm);
    serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn the_json_has_exactly_the_documented_fields() {
    let report = report(&["--sysram", "512M"], &["sh", "-c", "exit 3"]);
    let mut expected = [
        "schema",
        "command",
        "exit_code",
        "elapsed_seconds",
        "sysram_limit_bytes",
        "sysram_peak_bytes",
        "overrun_peak_bytes",
        "processes",
        "unmanaged_processes",
        "demoted_pages",
        "promoted_pages",
        "rescued_pages",
        "same_filled_pages",
        "dense_pages",
        "recompressed_pages",
        "lost_pages",
        "refused_pages",
        "fault_us",
        "stall_seconds",
        "nodes",
    ];
    expected.sort_unstable();
    assert_eq!(keys(&report), expected);
    assert_eq!(
        keys(&report["refused_pages"]),
        ["incompressible", "node_full", "pinned", "protected", "shared_by_fork"]
    );
    assert_eq!(keys(&report["fault_us"]), ["max", "p50", "p99"]);
    assert_eq!(report["nodes"].as_array().unwrap().len(), 2);
    for node in report["nodes"].as_array().unwrap() {
        let expected = [
            "capacity_bytes",
            "class",
            "node",
            "pressure_peak",
            "ratio",
            "reserve_bytes_peak",
            "stored_bytes_peak",
            "type",
            "used_bytes_peak",
        ];
        assert_eq!(keys(node), expected);
    }
    assert_eq!(report["schema"], 1);
    assert_eq!(report["command"], serde_json::json!(["sh", "-c", "exit 3"]));
    assert_eq!(report["exit_code"], 3);
    assert_eq!(report["sysram_limit_bytes"], 512 << 20);
    assert_eq!((&report["nodes"][0]["type"], &report["nodes"][1]["type"]), (&"sysram".into(), &"spm".into()));
    assert_eq!((&report["nodes"][0]["class"], &report["nodes"][1]["class"]), (&1.into(), &4.into()));
}

#[test]
fn no_limit_is_null_and_a_share_is_of_the_machines_ram() {
    assert_eq!(report(&[], &["true"])["sysram_limit_bytes"], Value::Null);
    assert_eq!(report(&["--sysram", "max"], &["true"])["sysram_limit_bytes"], Value::Null);
    let quarter = report(&["--sysram", "25%"], &["true"]);
    let (limit, ram) = (&quarter["sysram_limit_bytes"], &quarter["nodes"][0]["capacity_bytes"]);
    assert_eq!(limit.as_u64().unwrap(), ram.as_u64().unwrap() / 100 * 25);
}

#[test]
fn a_signals_end_is_reported_as_the_exit_status_is() {
    assert_eq!(report(&[], &["sh", "-c", "kill -KILL $$"])["exit_code"], 137);
}

#[test]
fn the_command_line_wins_over_the_file_and_the_file_over_the_default() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("spm.toml");
    let text = "[run]\nsysram = \"64M\"\n[[node]]\nid = 1\nkind = \"compressed\"\ncapacity = \"1G\"\n";
    std::fs::write(&file, text).unwrap();
    let config = ["--config", file.to_str().unwrap()];
    let from_file = report(&config, &["true"]);
    assert_eq!(from_file["sysram_limit_bytes"], 64 << 20);
    assert_eq!(from_file["nodes"][1]["capacity_bytes"], 1 << 30);
    let both = report(&[config[0], config[1], "--sysram", "128M"], &["true"]);
    assert_eq!(both["sysram_limit_bytes"], 128 << 20);
}

#[test]
fn json_to_stdout_comes_after_what_the_command_wrote() {
    let mut spm = spm_run(&["--json", "-"]);
    spm.args(["echo", "first"]);
    let output = text(&finish(spm).stdout);
    let rest = output.strip_prefix("first\n").unwrap();
    assert_eq!(serde_json::from_str::<Value>(rest).unwrap()["schema"], 1);
}

#[test]
fn the_table_goes_to_stderr_or_into_the_file() {
    let mut spm = spm_run(&["--report"]);
    spm.args(["sh", "-c", "exit 2"]);
    let output = finish(spm);
    let remark = text(&output.stderr);
    assert!(output.stdout.is_empty());
    for part in ["exit status 2", "RAM", "processes", "node", "sysram", "spm"] {
        assert!(remark.contains(part), "{part}: {remark}");
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("table");
    std::fs::write(&file, "x".repeat(10_000)).unwrap();
    let mut spm = spm_run(&[&format!("--report={}", file.display())]);
    spm.arg("true");
    finish(spm);
    let table = std::fs::read_to_string(&file).unwrap();
    assert!(table.starts_with("spm: true: exit status 0") && !table.contains('x'.to_string().repeat(9).as_str()));
}

/// The shell redirects, so that `spm` and its command share the descriptor.
fn redirected(options: &str, redirection: &str) -> (String, Option<i32>, String) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("log");
    std::fs::write(&file, "before\n").unwrap();
    let mut sh = std::process::Command::new("sh");
    let rest = if crate::harness::can_manage() { "" } else { "--best-effort" };
    let line = format!("\"$0\" run {rest} {options} -- sh -c 'echo said; echo said >&2' {redirection}");
    sh.args(["-c", &line, env!("CARGO_BIN_EXE_spm")]).current_dir(directory.path());
    let output = finish(sh);
    let outputs = [output.stdout, output.stderr].concat();
    (std::fs::read_to_string(&file).unwrap(), output.status.code(), String::from_utf8_lossy(&outputs).into_owned())
}

#[test]
fn a_report_to_the_commands_own_output_cuts_nothing_off() {
    let (log, ..) = redirected("--json /dev/stdout", "> log");
    assert!(log.starts_with("said\n{") && log.ends_with("}\n"), "{log}");
    let (log, ..) = redirected("--json log", ">> log");
    assert!(log.starts_with("before\nsaid\n{"), "{log}");
    let (log, ..) = redirected("--report=/dev/stderr", "2>> log");
    assert!(log.starts_with("before\nsaid\nspm: "), "{log}");
}

#[test]
fn both_reports_in_one_file_are_refused_before_the_start() {
    let (log, code, said) = redirected("--json log --report=./log", "");
    assert_eq!((log.as_str(), code), ("before\n", Some(125)));
    assert!(said.contains("same file") && !said.contains("said"), "{said}");
}

#[test]
fn one_report_that_fails_leaves_the_other() {
    let (.., said) = redirected("--json /dev/full --report", "");
    assert!(said.contains("/dev/full cannot be written") && said.contains("exit status 0 after"), "{said}");
}
