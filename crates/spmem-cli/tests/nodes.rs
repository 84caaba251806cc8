//! What `spm nodes` prints.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

fn nodes_of(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_spm")).arg("nodes").args(arguments).output().unwrap()
}

fn of_origin<'a>(nodes: &'a Value, origin: &str) -> Vec<&'a Value> {
    nodes.as_array().unwrap().iter().filter(|node| node["origin"] == origin).collect()
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_slice(&nodes_of(arguments).stdout).unwrap()
}

#[test]
fn json_is_an_array_with_sizes_in_bytes() {
    let nodes = json(&["--json"]);
    let (kernels, own) = (of_origin(&nodes, "kernel"), of_origin(&nodes, "spmem"));
    let documented = ["capacity", "class", "free", "guard", "node", "owner", "services", "type", "used"];
    for node in kernels.iter().chain(&own) {
        assert!(documented.iter().all(|&key| node.get(key).is_some()), "{node}");
        let [capacity, used, free] = ["capacity", "used", "free"].map(|key| node[key].as_u64().unwrap());
        assert_eq!(used + free, capacity);
    }
    for node in &kernels {
        assert_eq!((&node["type"], &node["guard"]), (&"sysram".into(), &Value::Null));
        // A node is as far from itself as SLIT says of every node.
        assert_eq!(node["distances"][node["node"].to_string()], 10);
        assert!(!node["class_reason"].as_str().unwrap().is_empty());
    }
    assert!(kernels.iter().any(|node| !node["cpus"].as_str().unwrap().is_empty()));
    assert_eq!(own.len(), 1);
    assert_eq!((&own[0]["node"], &own[0]["type"], &own[0]["guard"]), (&1.into(), &"spm".into(), &"hard".into()));
    assert_eq!((&own[0]["class"], &own[0]["owner"]), (&4.into(), &"cram".into()));
    assert!(own[0]["services"].as_array().unwrap().contains(&"write_fence".into()));
}

/// What a script of an earlier version looks at on a machine of one node.
#[test]
fn on_a_machine_of_one_node_the_first_is_ram_and_the_second_is_compressed() {
    let nodes = json(&["--json"]);
    if of_origin(&nodes, "kernel").len() != 1 || !of_origin(&nodes, "device").is_empty() {
        println!("skipped: this machine has several nodes");
        return;
    }
    assert_eq!((&nodes[0]["node"], &nodes[0]["type"]), (&0.into(), &"sysram".into()));
    assert_eq!((&nodes[1]["node"], &nodes[1]["type"]), (&1.into(), &"spm".into()));
    let table = String::from_utf8(nodes_of(&["-u"]).stdout).unwrap();
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(String::from_utf8(nodes_of(&["-v"]).stdout).unwrap().contains("class, and why"));
}

#[test]
fn a_machine_of_plain_ram_says_what_it_lacks_and_what_stands_in_for_it_but_not_in_json() {
    let nodes = json(&["--json"]);
    if of_origin(&nodes, "kernel").len() != 1 || nodes.as_array().unwrap().len() != 2 {
        println!("skipped: this machine has special memory");
        return;
    }
    let said = |arguments: &[&str]| String::from_utf8(nodes_of(arguments).stderr).unwrap();
    assert!(said(&["-u"]).starts_with("spm: this machine lacks special memory"), "{}", said(&["-u"]));
    assert_eq!(said(&["--json"]), "");
}

#[test]
fn human_sizes_are_text_and_the_table_has_a_line_for_each_node() {
    assert!(json(&["--json", "-u"])[0]["capacity"].as_str().unwrap().ends_with(['K', 'M', 'G', 'T']));
    let table = String::from_utf8(nodes_of(&["--human"]).stdout).unwrap();
    assert!(table.starts_with("node  type") && table.lines().count() >= 3);
}

#[test]
fn the_configuration_sets_the_capacity() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("spm.toml");
    std::fs::write(&file, "[[node]]\nid = 1\nkind = \"compressed\"\ncapacity = \"64M\"\n").unwrap();
    let nodes = json(&["--json", "--config", file.to_str().unwrap()]);
    assert_eq!(of_origin(&nodes, "spmem")[0]["capacity"], 64 << 20);
}

#[test]
fn the_configuration_sets_the_class_and_a_name_that_nothing_has_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("spm.toml");
    std::fs::write(&file, "[class]\nnode0 = 3\nnode999 = 2\n").unwrap();
    let output = nodes_of(&["--json", "--config", file.to_str().unwrap()]);
    let nodes: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&nodes[0]["class"], &nodes[0]["class_reason"]), (&3.into(), &"configured".into()));
    let remarks = String::from_utf8(output.stderr).unwrap();
    assert!(remarks.contains("node999") && remarks.lines().count() == 1, "{remarks}");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn measuring_gives_figures_for_every_node_with_memory_and_no_bar_where_stderr_is_no_terminal() {
    let output = nodes_of(&["--json", "--measure"]);
    let nodes: Value = serde_json::from_slice(&output.stdout).unwrap();
    let remarks = String::from_utf8(output.stderr).unwrap();
    for node in of_origin(&nodes, "kernel") {
        let measured = &node["measured"];
        // Too little memory left is said.
        if measured.is_null() {
            assert!(remarks.contains(&format!("node {} is not measured", node["node"])), "{remarks}");
            continue;
        }
        assert!(measured["idle_latency_ns"].as_u64().unwrap() > 0, "{node}");
        assert!(measured["read_bandwidth_mib_s"].as_u64().unwrap() > 0, "{node}");
        assert!(measured["write_bandwidth_mib_s"].as_u64().unwrap() > 0, "{node}");
    }
    assert!(remarks.lines().all(|line| line.starts_with("spm: ")), "{remarks}");
}

#[test]
fn the_picture_is_written_and_one_that_cannot_be_is_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("nodes.svg");
    assert_eq!(nodes_of(&["--svg", file.to_str().unwrap()]).status.code(), Some(0));
    let picture = std::fs::read_to_string(&file).unwrap();
    assert!(picture.starts_with("<?xml") && picture.trim_end().ends_with("</svg>") && picture.contains("node 0"));
    let output = nodes_of(&["--svg", "/no/such/folder/nodes.svg"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("/no/such/folder/nodes.svg"));
}

#[test]
fn a_failure_is_status_1_and_a_wrong_command_line_2() {
    let output = nodes_of(&["--config", "/no/such/file"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    assert_eq!(nodes_of(&["--no-such-option"]).status.code(), Some(2));
}

#[test]
fn a_node_of_a_file_is_made_when_asked_for_and_shown_with_what_its_superblock_says() {
    let directory = tempfile::tempdir().unwrap();
    let (file, node) = (directory.path().join("spm.toml"), directory.path().join("node2"));
    let text = format!("[[node]]\nid = 2\nkind = \"file\"\npath = {node:?}\ncapacity = \"8M\"\nclass = 3\n");
    std::fs::write(&file, text).unwrap();
    let config = file.to_str().unwrap();
    let of_file =
        |nodes: &Value| of_origin(nodes, "spmem").into_iter().find(|node| node["node"] == 2).unwrap().clone();

    let output = nodes_of(&["--json", "--config", config]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stderr).unwrap().contains("--create"));
    let shown = of_file(&serde_json::from_slice(&output.stdout).unwrap());
    assert_eq!((&shown["capacity"], &shown["class"], &shown["guard"]), (&Value::Null, &3.into(), &"hard".into()));
    assert!(!node.exists(), "looking makes nothing");

    let shown = of_file(&json(&["--json", "--config", config, "--create"]));
    let [capacity, used, free] = ["capacity", "used", "free"].map(|key| shown[key].as_u64().unwrap());
    assert!(capacity > 7 << 20 && capacity < 8 << 20 && used == 0 && free == capacity, "{shown}");
    let made = std::fs::read(&node).unwrap();
    assert_eq!(made.len(), 8 << 20);

    // It is looked at, and made, once.
    assert_eq!(of_file(&json(&["--json", "--config", config, "--create"])), shown);
    assert_eq!(std::fs::read(&node).unwrap(), made);
    std::fs::write(&node, "something else").unwrap();
    let output = nodes_of(&["--json", "--config", config]);
    assert!(String::from_utf8(output.stderr).unwrap().contains("no node of spmem's"));
}

#[test]
fn a_pipe_or_a_loose_link_in_place_of_a_file_is_said_and_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let (file, pipe, link) =
        (directory.path().join("spm.toml"), directory.path().join("pipe"), directory.path().join("link"));
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    for (path, said) in [(&pipe, "no node of spmem's"), (&link, "a link to what is not there")] {
        std::fs::write(&file, format!("[[node]]\nid = 2\nkind = \"file\"\npath = {path:?}\ncapacity = \"8M\"\n"))
            .unwrap();
        let output = Command::new("timeout")
            .args(["20", env!("CARGO_BIN_EXE_spm"), "nodes", "--config", file.to_str().unwrap()])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8_lossy(&output.stderr).contains(said), "{output:?}");
    }
}

#[test]
fn a_directory_in_place_of_a_file_is_said_and_left_alone() {
    let (directory, config, node) = file_node();
    std::fs::create_dir(&node).unwrap();
    for more in [&[][..], &["--create"]] {
        let output = nodes_of(&[&["--config", &config], more].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("node2 is a directory; the path of a file"), "{said}");
        assert_eq!(output.status.code(), Some(0));
    }
    assert_eq!(names_in(directory.path()), ["node2", "spm.toml"]);
}

/// A configuration with one node of 8 MiB in a folder of its own: the folder, the file, the node.
fn file_node() -> (tempfile::TempDir, String, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let (config, node) = (directory.path().join("spm.toml"), directory.path().join("node2"));
    std::fs::write(&config, format!("[[node]]\nid = 2\nkind = \"file\"\npath = {node:?}\ncapacity = \"8M\"\n"))
        .unwrap();
    let config = config.to_str().unwrap().to_owned();
    (directory, config, node)
}

fn names_in(directory: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn what_an_interrupted_create_leaves_has_no_name_and_the_next_one_begins_anew() {
    let (directory, config, node) = file_node();
    std::fs::write(directory.path().join(".node2.spm-create"), [7; 10_000]).unwrap();
    let shown = json(&["--json", "--config", &config, "--create"]);
    let shown = shown.as_array().unwrap().iter().find(|one| one["node"] == 2).unwrap();
    assert_eq!((&shown["used"], shown["capacity"].is_null()), (&0.into(), false), "{shown}");
    assert_eq!(names_in(directory.path()), ["node2", "spm.toml"]);
    assert_eq!(std::fs::metadata(node).unwrap().len(), 8 << 20);
}

#[test]
fn a_create_that_is_killed_anywhere_leaves_no_file_that_is_no_node() {
    let (directory, config, node) = file_node();
    for turn in 0..30 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_spm"))
            .args(["nodes", "--config", &config, "--create"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(turn));
        let _ = child.kill();
        child.wait().unwrap();
        if node.exists() {
            let output = nodes_of(&["--json", "--config", &config]);
            assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
            std::fs::remove_file(&node).unwrap();
        }
    }
    assert!(nodes_of(&["--config", &config, "--create"]).status.success());
    assert_eq!(names_in(directory.path()), ["node2", "spm.toml"]);
}

#[test]
fn a_file_that_was_begun_and_never_finished_is_finished_and_somebody_elses_is_left_alone() {
    let (_directory, config, node) = file_node();
    for len in [0, 8 << 20] {
        std::fs::File::create(&node).unwrap().set_len(len).unwrap();
        let output = nodes_of(&["--json", "--config", &config, "--create"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("it is finished now"), "{said}");
        let of_file = |output: &[u8]| {
            let nodes: Value = serde_json::from_slice(output).unwrap();
            nodes.as_array().unwrap().iter().find(|one| one["node"] == 2).unwrap().clone()
        };
        assert!(of_file(&output.stdout)["capacity"].is_u64());
        let again = nodes_of(&["--json", "--config", &config, "--create"]);
        assert_eq!((again.stderr.len(), of_file(&again.stdout)), (0, of_file(&output.stdout)));
    }
    let mut theirs = vec![0; 8 << 20];
    theirs[5 << 20] = 1;
    std::fs::write(&node, &theirs).unwrap();
    let said = String::from_utf8(nodes_of(&["--config", &config, "--create"]).stderr).unwrap();
    assert!(said.contains("it is left alone"), "{said}");
    assert!(std::fs::read(&node).unwrap() == theirs);
}

#[test]
fn a_verbose_list_says_which_source_of_heat_is_chosen_and_why_not_another() {
    let listed = json(&["--json", "-v"]);
    let heat = listed.as_array().unwrap().iter().find_map(|one| one["heat"].as_array()).unwrap();
    let sources: Vec<&str> = heat.iter().map(|one| one["source"].as_str().unwrap()).collect();
    assert_eq!(sources, ["rwp", "holding", "damon", "idle"]);
    let chosen = |asked| heat.iter().filter(move |one| one["asked"] == asked && one["is_chosen"] == true).count();
    assert_eq!(chosen("within a program"), 1);
    assert!(chosen("from outside") <= 1);
    assert!(heat.iter().all(|one| !one["reason"].as_str().unwrap().is_empty()));
    assert!(!json(&["--json"]).as_array().unwrap().iter().any(|one| one["heat"].is_array()));
    assert!(String::from_utf8(nodes_of(&["-v"]).stdout).unwrap().contains("holding"));
}

#[test]
fn a_source_of_heat_that_is_not_to_be_had_is_refused_with_what_would_work() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("spm.toml");
    let config = config.to_str().unwrap();
    let run = |source: &str, more: &[&str]| {
        std::fs::write(config, format!("[run]\nheat = \"{source}\"\n")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_spm"));
        command.args(["run", "--config", config]).args(more).args(["--", "true"]).output().unwrap()
    };
    // spm run does not use it yet, on any kernel.
    let refused = run("rwp", &[]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(125), "{said}");
    for part in ["[run]", "\"rwp\" cannot be had", "\"holding\" would work here"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let went_on = run("rwp", &["--best-effort"]);
    assert!(went_on.status.success());
    assert!(String::from_utf8(went_on.stderr).unwrap().contains("heat = \"auto\" in its place"));
}

#[test]
fn a_node_of_a_dax_device_is_listed_and_one_that_is_not_there_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("spm.toml");
    let text = "[[node]]\nid = 9\nkind = \"dax\"\npath = \"/dev/dax77.7\"\noverwrite = true\nclass = 3\n";
    std::fs::write(&file, text).unwrap();
    let config = file.to_str().unwrap();
    let output = nodes_of(&["--json", "--config", config]);
    assert_eq!(output.status.code(), Some(0));
    let nodes: Value = serde_json::from_slice(&output.stdout).unwrap();
    let line = of_origin(&nodes, "spmem").into_iter().find(|node| node["node"] == 9).unwrap().clone();
    assert_eq!((&line["capacity"], &line["class"], &line["owner"]), (&Value::Null, &3.into(), &"dax".into()));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("node 9: /dev/dax77.7: there is no such device"), "{said}");
    let explained =
        Command::new(env!("CARGO_BIN_EXE_spm")).args(["explain", "--here", "--config", config]).output();
    let said = String::from_utf8(explained.unwrap().stderr).unwrap();
    assert!(said.contains("node 9 of the configuration: /dev/dax77.7"), "{said}");
}

#[test]
fn a_source_of_heat_that_spm_run_would_refuse_here_is_not_chosen() {
    let spm = env!("CARGO_BIN_EXE_spm");
    // Another user, who may read this folder or not: a copy of the program that he may execute.
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("spm");
    std::fs::copy(spm, &copy).unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let as_user = |arguments: &[&str]| {
        Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all", "--"])
            .arg(&copy)
            .args(arguments)
            .output()
    };
    let Ok(refused) = as_user(&["run", "--", "true"]) else {
        println!("skipped: there is no setpriv");
        return;
    };
    let refused = String::from_utf8(refused.stderr).unwrap();
    if !refused.contains("refused: ") {
        println!("skipped: another user is not refused, or there is none: {refused}");
        return;
    }
    let nodes = as_user(&["nodes", "-v", "--json"]).unwrap();
    let nodes: Value = serde_json::from_slice(&nodes.stdout).unwrap();
    let heat = nodes.as_array().unwrap().iter().find_map(|group| group["heat"].as_array()).unwrap().clone();
    let holding = heat.iter().find(|line| line["source"] == "holding").unwrap();
    assert_eq!(holding["is_chosen"], false, "{holding}");
    let reason = holding["reason"].as_str().unwrap().strip_prefix("spm run would refuse: ").unwrap();
    assert!(refused.contains(reason), "{refused}: {reason}");
}
