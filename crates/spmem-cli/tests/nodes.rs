//! What `spm nodes` prints.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use serde_json::Value;
use std::process::{Command, Output};

fn nodes(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_spm")).arg("nodes").args(arguments).output().unwrap()
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_slice(&nodes(arguments).stdout).unwrap()
}

#[test]
fn json_is_an_array_with_sizes_in_bytes() {
    let nodes = json(&["--json"]);
    let nodes = nodes.as_array().unwrap();
    assert_eq!(nodes.len(), 2);
    let expected = ["capacity", "class", "free", "guard", "node", "owner", "services", "type", "used"];
    for node in nodes {
        let mut keys: Vec<_> = node.as_object().unwrap().keys().collect();
        keys.sort_unstable();
        assert_eq!(keys, expected);
        let [capacity, used, free] = ["capacity", "used", "free"].map(|key| node[key].as_u64().unwrap());
        assert_eq!(used + free, capacity);
    }
    assert_eq!(
        (&nodes[0]["node"], &nodes[0]["type"], &nodes[0]["guard"]),
        (&0.into(), &"sysram".into(), &Value::Null)
    );
    assert_eq!(
        (&nodes[1]["node"], &nodes[1]["type"], &nodes[1]["guard"]),
        (&1.into(), &"spm".into(), &"hard".into())
    );
    assert_eq!((&nodes[1]["class"], &nodes[1]["owner"]), (&4.into(), &"cram".into()));
    assert!(nodes[1]["services"].as_array().unwrap().contains(&"write_fence".into()));
}

#[test]
fn human_sizes_are_text_and_the_table_has_a_line_for_each_node() {
    assert!(json(&["--json", "-u"])[0]["capacity"].as_str().unwrap().ends_with(['K', 'M', 'G', 'T']));
    let table = String::from_utf8(nodes(&["--human"]).stdout).unwrap();
    assert_eq!(table.lines().count(), 3);
    assert!(table.starts_with("node  type"));
}

#[test]
fn the_configuration_sets_the_capacity() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("spm.toml");
    std::fs::write(&file, "[[node]]\nid = 1\nkind = \"compressed\"\ncapacity = \"64M\"\n").unwrap();
    assert_eq!(json(&["--json", "--config", file.to_str().unwrap()])[1]["capacity"], 64 << 20);
}

#[test]
fn a_failure_is_status_1_and_a_wrong_command_line_2() {
    let output = nodes(&["--config", "/no/such/file"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    assert_eq!(nodes(&["--no-such-option"]).status.code(), Some(2));
}
