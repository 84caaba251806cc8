use crate::harness::{can_manage, finish, text};
use crate::programs::static_program;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

fn spm(arguments: &[&str], program: &Path) -> Output {
    let mut spm = Command::new(env!("CARGO_BIN_EXE_spm"));
    spm.arg("run").args(arguments).arg(program);
    finish(spm)
}

#[test]
fn a_static_program_is_refused_with_reason_and_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let program = static_program(directory.path());
    let output = spm(&[], &program);
    let remark = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125));
    assert!(output.stdout.is_empty(), "it was not started");
    for part in ["refused", "static-program", "statically linked", "dynamically linked", "--best-effort"] {
        assert!(remark.contains(part), "{part}: {remark}");
    }
    assert_eq!(remark.lines().count(), 1, "{remark}");
}

#[test]
fn the_dynamic_loader_as_a_command_is_refused_as_what_it_is() {
    let loader = Path::new("/lib64/ld-linux-x86-64.so.2");
    if !loader.exists() {
        println!("skipped: no {} here", loader.display());
        return;
    }
    let mut spm = Command::new(env!("CARGO_BIN_EXE_spm"));
    spm.args(["run", "--"]).arg(loader).arg("/bin/true");
    let output = finish(spm);
    let remark = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{remark}");
    assert!(remark.contains("dynamic loader") && remark.contains("name the program itself"), "{remark}");
}

#[test]
fn a_program_built_with_the_address_sanitizer_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("program.c");
    std::fs::write(&source, "int main(void) { return 7; }\n").unwrap();
    for options in [&["-fsanitize=address"][..], &["-fsanitize=address", "-static-libasan"], &["-fsanitize=leak"]]
    {
        let program = directory.path().join("program");
        let built = Command::new("cc").args(options).arg("-o").arg(&program).arg(&source).output();
        if !built.is_ok_and(|output| output.status.success()) {
            println!("skipped: no C compiler that takes {options:?}");
            continue;
        }
        let output = spm(&[], &program);
        let remark = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{options:?}: {remark}");
        assert!(remark.contains("-fsanitize=address") && remark.contains("use a build without"), "{remark}");
        assert_eq!(spm(&["--best-effort"], &program).status.code(), Some(7), "{options:?}");
    }
}

#[test]
fn best_effort_runs_it_unmanaged_and_says_so_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let program = static_program(directory.path());
    let report = directory.path().join("report.json");
    let output = spm(&["--best-effort", "--json", report.to_str().unwrap()], &program);
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("static\n", Some(9)));
    let remark = text(&output.stderr);
    assert!(remark.contains("unmanaged") && remark.lines().count() == 1, "{remark}");
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!((&report["processes"], &report["unmanaged_processes"]), (&0.into(), &1.into()));
}

#[test]
fn a_script_for_a_static_interpreter_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let program = static_program(directory.path());
    let script = directory.path().join("script");
    std::fs::write(&script, format!("#!{}\n", program.display())).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = spm(&[], &script);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("static-program"));
}

#[test]
fn without_the_right_to_userfaultfd_the_reason_is_named() {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set=-all"]);
    // Where the binary lies, others may not look; a copy can be read by all.
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = directory.path().join("spm");
    std::fs::copy(env!("CARGO_BIN_EXE_spm"), &copy).unwrap();
    command.arg(&copy).args(["run", "--", "echo", "ran"]);
    if !rustix::process::getuid().is_root() || Command::new("setpriv").arg("--version").output().is_err() {
        println!("skipped: needs root and setpriv to give rights up");
        return;
    }
    let output = finish(command);
    let remark = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{remark}");
    assert!(remark.contains("root"), "{remark}");
}

#[test]
fn a_report_that_cannot_be_written_stops_the_run_before_it_starts() {
    for option in ["--json=/no/such/directory/report", "--report=/no/such/directory/report"] {
        let mut spm = Command::new(env!("CARGO_BIN_EXE_spm"));
        spm.args(["run", option, "--", "echo", "ran"]);
        let output = finish(spm);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(125), 0), "{option}");
        assert!(text(&output.stderr).contains("/no/such/directory/report"));
    }
}

#[test]
fn a_report_without_a_name_is_refused_whichever_it_is() {
    for option in ["--json=", "--report="] {
        let mut spm = Command::new(env!("CARGO_BIN_EXE_spm"));
        spm.args(["run", option, "--", "echo", "ran"]);
        let output = finish(spm);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(125), 0), "{option}");
        assert!(text(&output.stderr).contains("a value is required"), "{option}: {}", text(&output.stderr));
    }
}

#[test]
fn a_refused_run_leaves_the_last_report_alone() {
    let directory = tempfile::tempdir().unwrap();
    let program = static_program(directory.path());
    let report = directory.path().join("report.json");
    std::fs::write(&report, "the last").unwrap();
    assert_eq!(spm(&["--json", report.to_str().unwrap()], &program).status.code(), Some(125));
    assert_eq!(std::fs::read_to_string(&report).unwrap(), "the last");
}

#[test]
fn a_wrong_configuration_names_file_key_line_and_what_is_valid() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("spm.toml");
    std::fs::write(&file, "[run]\nsysram = \"1G\"\nbudget = 3\n").unwrap();
    let output = spm(&["--config", file.to_str().unwrap()], Path::new("true"));
    let remark = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125));
    for part in ["spm.toml", "line 3", "budget", "sysram", "best_effort"] {
        assert!(remark.contains(part), "{part}: {remark}");
    }
}

#[test]
fn what_can_be_managed_is_not_refused() {
    if !can_manage() {
        println!("skipped: userfaultfd cannot be used here");
        return;
    }
    assert_eq!(spm(&[], Path::new("true")).status.code(), Some(0));
}

#[test]
fn a_file_for_cold_pages_that_would_be_ram_is_refused() {
    if !Path::new("/dev/shm").exists() {
        println!("skipped: no /dev/shm here");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("spm.toml");
    std::fs::write(&config, "[[node]]\nid = 5\nkind = \"file\"\npath = \"/dev/shm/node5\"\ncapacity = \"8M\"\n")
        .unwrap();
    let output = spm(&["--config", config.to_str().unwrap()], Path::new("true"));
    let remark = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{remark}");
    for part in ["refused", "node 5", "/dev/shm", "is RAM", "a folder on a disk"] {
        assert!(remark.contains(part), "{part}: {remark}");
    }
}
