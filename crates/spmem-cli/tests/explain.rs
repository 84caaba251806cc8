//! What `spm explain` answers.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use serde_json::Value;
use std::process::{Command, Output};

const MACHINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/explain/example.toml");

fn explain(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_spm")).arg("explain").args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json(arguments: &[&str]) -> (Value, Option<i32>) {
    let output = explain(&[arguments, &["--json"]].concat());
    (serde_json::from_slice(&output.stdout).unwrap(), output.status.code())
}

#[test]
fn the_status_tells_whether_anything_is_allowed() {
    assert_eq!(explain(&[]).status.code(), Some(0));
    assert_eq!(explain(&["--nodes", "1"]).status.code(), Some(1));
    assert_eq!(explain(&["--nodes", "1", "--grant", "cram"]).status.code(), Some(0));
    for wrong in [&["--nodes", "1-"][..], &["--domain", "/no"], &["--grant", "no"], &["--machine", "/no/file"]] {
        let output = explain(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{wrong:?}");
    }
    let endless = explain(&["--machine", "/dev/zero"]);
    let said = String::from_utf8(endless.stderr).unwrap();
    assert!(endless.status.code() == Some(2) && said.contains("longer than 1 MiB"), "{said}");
}

#[test]
fn interleaving_over_all_nodes_drops_the_spm_node_and_says_what_would_open_it() {
    let text = text(&explain(&["--nodes", "0-1", "--policy", "interleave"]));
    assert!(text.contains("allowed  0\n"), "{text}");
    assert!(text.contains("dropped  walled off (spm, hard guard); a grant from its owner"), "{text}");
}

#[test]
fn each_obstacle_has_its_word_the_ancestor_its_path() {
    let ask = |nodes, more: &[&str]| {
        let (answer, _) =
            json(&[&["--machine", MACHINE, "--domain", "/batch/job", "--nodes", nodes], more].concat());
        let node = &answer["nodes"][0];
        (node["obstacle"].as_str().map(str::to_owned), node["domain"].as_str().map(str::to_owned))
    };
    assert_eq!(ask("0", &[]), (None, None));
    assert_eq!(ask("3", &["--grant", "staging"]), (Some("outside-domain".into()), Some("/batch".into())));
    assert_eq!(ask("9", &[]), (Some("absent".into()), None));
    assert_eq!(ask("2", &[]), (None, None), "an easy guard opens to strict bind");
    assert_eq!(ask("2", &["--policy", "preferred"]), (Some("needs-grant".into()), None));
    assert_eq!(ask("2", &["--policy", "preferred", "--grant", "2:pin"]), (Some("lacks-right".into()), None));
    assert_eq!(ask("2", &["--policy", "preferred", "--grant", "2:alloc"]), (None, None));
}

#[test]
fn following_the_advice_changes_the_answer() {
    let (answer, status) = json(&["--machine", MACHINE, "--nodes", "3"]);
    assert_eq!((answer["errno"].as_str(), status), (Some("EINVAL"), Some(1)));
    assert!(answer["nodes"][0]["remedy"].as_str().unwrap().contains("a grant from its owner with ALLOC"));
    let (answer, status) = json(&["--machine", MACHINE, "--nodes", "3", "--grant", "staging"]);
    assert_eq!((answer["allowed"].as_str(), status), (Some("3"), Some(0)));
}

#[test]
fn a_mode_that_needs_nodes_is_refused_without_them_as_linux_does() {
    for mode in ["bind", "interleave", "preferred-many", "weighted-interleave"] {
        let output = explain(&["--policy", mode]);
        assert_eq!(output.status.code(), Some(1), "{mode}");
        let answer = text(&output);
        assert!(answer.contains("allowed  none: EINVAL\nbecause  "), "{mode}: {answer}");
        assert!(answer.contains("needs at least one node"), "{mode}: {answer}");
        let (answer, _) = json(&["--policy", mode]);
        assert_eq!((answer["errno"].as_str(), answer["policy"].as_str()), (Some("EINVAL"), Some(mode)));
    }
    for mode in ["default", "local", "preferred"] {
        assert_eq!(explain(&["--policy", mode]).status.code(), Some(0), "{mode}");
    }
}

#[test]
fn nodes_that_nobody_named_are_opened_by_naming_them() {
    let (answer, _) = json(&[]);
    assert!(answer["nodes"][1]["remedy"].as_str().unwrap().contains("requests that name it"), "{answer}");
    let (answer, _) = json(&["--grant", "cram"]);
    assert_eq!(answer["nodes"][1]["remedy"], "name it", "an SPM node is in no default mask (R4)");
}

#[test]
fn relative_numbers_are_not_taken_for_nodes() {
    let (answer, status) = json(&["--nodes", "1", "--policy", "bind=relative"]);
    assert_eq!(
        (answer["policy"].as_str(), answer["allowed"].as_str(), status),
        (Some("bind=relative"), Some("0"), Some(0))
    );
}

#[test]
fn a_node_among_others_gets_the_reason_that_holds_for_the_whole_request() {
    let machine = ["--machine", MACHINE];
    let obstacle = |arguments: &[&str], node: usize| {
        let (answer, _) = json(&[&machine[..], arguments].concat());
        let nodes = answer["nodes"].as_array().unwrap();
        let found = nodes.iter().find(|found| found["node"] == node).unwrap().clone();
        let word = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
        (word("obstacle"), word("reason"), word("remedy"))
    };
    // Node 2 is SPM and easy, node 3 SPM and hard, opened by the grant.
    for (arguments, node, name, remedy) in [
        (
            &["--nodes", "2", "--policy", "bind=relative"][..],
            2,
            "counted",
            "name it by its own number, without relative",
        ),
        (&["--nodes", "2", "--policy", "bind=relative|balancing"], 2, "counted", "name it by its own number"),
        (
            &["--nodes", "0,3", "--policy", "preferred", "--grant", "staging"],
            3,
            "not-first",
            "name it alone, or with bind",
        ),
        (&["--nodes", "0,3", "--policy", "preferred"], 3, "not-first", "name it alone, or with bind"),
        (&["--grant", "staging"], 3, "not-default", "name it"),
        (&["--nodes", "0,3", "--policy", "bind=static|balancing"], 3, "needs-grant", "a grant from its owner"),
    ] {
        let (found, reason, advice) = obstacle(arguments, node);
        assert_eq!(found, name, "{arguments:?}: {reason}; {advice}");
        assert!(advice.starts_with(remedy) && !reason.is_empty(), "{arguments:?}: {reason}; {advice}");
    }
}

#[test]
fn a_grant_whose_quota_is_used_up_opens_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("machine.toml");
    let machine = std::fs::read_to_string(MACHINE).unwrap();
    std::fs::write(&file, machine.replace("quota = \"1G\"", "quota = \"0\"")).unwrap();
    let (answer, status) = json(&["--machine", file.to_str().unwrap(), "--nodes", "3", "--grant", "staging"]);
    assert_eq!(
        (answer["errno"].as_str(), answer["allowed"].as_str(), status),
        (Some("EDQUOT"), Some(""), Some(1))
    );
    assert_eq!(answer["nodes"][0]["obstacle"], "over-quota");
}

/// Nodes 0 to 3 are sysram in two sockets, 0 and 1, 2 and 3.
const SOCKETS: &str = r#"
[[node]]
id = 0
type = "sysram"
[[node]]
id = 1
type = "sysram"
[[node]]
id = 2
type = "sysram"
[[node]]
id = 3
type = "sysram"
[[distance]]
from = 2
to = 3
distance = 12
[[distance]]
from = 0
to = 1
distance = 12
[[domain]]
path = "/job"
mems = "0,2-3"
"#;

/// Asks of [`SOCKETS`].
fn on_sockets(arguments: &[&str]) -> (Value, String, Option<i32>) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("machine.toml");
    std::fs::write(&file, SOCKETS).unwrap();
    let arguments = [&["--machine", file.to_str().unwrap()], arguments].concat();
    let (answer, status) = json(&arguments);
    (answer, text(&explain(&arguments)), status)
}

fn order(answer: &Value) -> Vec<u64> {
    answer["order"].as_array().unwrap().iter().map(|node| node.as_u64().unwrap()).collect()
}

#[test]
fn what_is_nearest_to_the_local_node_comes_first_and_to_the_home_node_before_that() {
    let (answer, text, status) = on_sockets(&["--local", "2"]);
    assert_eq!((order(&answer), answer["local"].as_u64(), status), (vec![2, 3, 0, 1], Some(2), Some(0)));
    assert!(text.contains("asked    nothing: the default (default, local node 2)\n"), "{text}");
    assert!(text.contains("order    2, then 3, then 0, then 1\n"), "{text}");
    let (answer, ..) = on_sockets(&["--policy", "local", "--local", "3"]);
    assert_eq!(order(&answer), [3, 0, 1, 2]);
    let (answer, ..) = on_sockets(&["--nodes", "0,2-3"]);
    assert_eq!((order(&answer), &answer["home"]), (vec![0, 2, 3], &Value::Null));
    let (answer, text, _) = on_sockets(&["--nodes", "0,2-3", "--home", "2", "--local", "0"]);
    assert_eq!((order(&answer), answer["home"].as_u64()), (vec![2, 3, 0], Some(2)));
    assert!(text.contains("(bind, home node 2, local node 0)"), "{text}");
    // A home node need not be one of the policy's.
    let (answer, ..) = on_sockets(&["--policy", "preferred-many", "--nodes", "0,3", "--home", "2"]);
    assert_eq!((order(&answer), answer["chosen"].as_str()), (vec![3, 0, 2, 1], Some("0,3")));
    let (answer, text, _) = on_sockets(&["--policy", "interleave", "--nodes", "0,2", "--local", "2"]);
    assert!(answer["order"].is_null() && !text.contains("order"), "{text}");
}

#[test]
fn a_home_node_is_refused_as_linux_refuses_it() {
    for (arguments, errno, words) in [
        (&["--home", "1"][..], "ENOENT", "policy default has no home node"),
        (
            &["--home", "1", "--policy", "interleave", "--nodes", "0"],
            "EOPNOTSUPP",
            "policy interleave has no home",
        ),
        (&["--home", "1", "--policy", "weighted-interleave", "--nodes", "0"], "EOPNOTSUPP", "has no home node"),
        (&["--home", "1", "--policy", "preferred", "--nodes", "0"], "EOPNOTSUPP", "bind and preferred-many have"),
        (&["--home", "1", "--policy", "local"], "EOPNOTSUPP", "policy local has no home node"),
        (&["--home", "9", "--nodes", "0"], "EINVAL", "the home node 9 is not registered"),
        // Whether the node is there Linux asks first.
        (&["--home", "9", "--policy", "local"], "EINVAL", "the home node 9 is not registered"),
        (&["--policy", "bind=static"], "EINVAL", "needs at least one node"),
        (&["--policy", "local=static"], "EINVAL", "STATIC_NODES"),
        (&["--policy", "bind=static|relative", "--nodes", "0"], "EINVAL", "static or relative can be given"),
        (
            &["--policy", "interleave=balancing", "--nodes", "0"],
            "EINVAL",
            "balancing with bind and preferred-many",
        ),
    ] {
        let (answer, text, status) = on_sockets(arguments);
        assert_eq!((answer["errno"].as_str(), status), (Some(errno), Some(1)), "{arguments:?}");
        assert!(answer["reason"].as_str().unwrap().contains(words), "{arguments:?}: {answer}");
        assert!(answer["order"].is_null() && answer["allowed"] == "", "{answer}");
        assert!(text.contains(&format!("allowed  none: {errno}\nbecause  ")), "{text}");
    }
}

#[test]
fn a_local_node_that_there_is_not_is_a_wrong_command_line() {
    for wrong in [&["--local", "9"][..], &["--local", "1024"], &["--local", "-1"], &["--home", "70000"]] {
        let output = explain(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{wrong:?}");
    }
}

#[test]
fn this_machines_own_nodes_can_be_asked_for() {
    let (answer, status) = json(&["--here"]);
    assert!(
        answer["nodes"].as_array().unwrap().iter().any(|node| node["reason"] == "ordinary memory"),
        "{answer}"
    );
    assert_eq!((answer["domain"].as_str(), status), (Some("/"), Some(0)));
    for wrong in [&["--here", "--machine", MACHINE][..], &["--guard", "easy"], &["--config", "spm.toml"]] {
        assert_eq!(explain(wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn a_wrong_grant_is_named_with_what_there_is() {
    let said = |grant| String::from_utf8(explain(&["--grant", grant]).stderr).unwrap();
    assert!(
        said("5:alloc").contains("--grant 5:alloc: node 5 is not registered; there are 0-1"),
        "{}",
        said("5:alloc")
    );
    assert!(
        said("1:fly").contains("--grant 1:fly: there is no right `fly`; there are alloc"),
        "{}",
        said("1:fly")
    );
}

#[test]
fn flags_that_exclude_each_other_are_both_named() {
    let (answer, status) = json(&["--nodes", "0", "--policy", "bind=static|relative"]);
    assert_eq!((answer["policy"].as_str(), status), (Some("bind=static|relative"), Some(1)));
}
