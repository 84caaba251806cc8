//! Configurations that are valid, and what is said of those that are not.

use super::*;

fn reason(text: &str) -> String {
    format!("{:#}", Config::parse(text).unwrap_err())
}

#[test]
fn the_documented_example_is_the_default() {
    assert_eq!(Config::parse(EXAMPLE).unwrap(), Config::default());
    assert_eq!(Config::parse("").unwrap(), Config::default());
}

#[test]
fn values_of_the_file_are_taken() {
    let text =
        "[run]\nsysram = \"25%\"\nheat = \"idle\"\n[[node]]\nid = 1\nkind = \"compressed\"\ncapacity = \"2G\"\n";
    let config = Config::parse(text).unwrap();
    assert_eq!(config.run.sysram, SysramLimit::Percent(25));
    assert_eq!(config.run.heat, heat::Wish::Only(Source::Idle));
    assert_eq!(config.store_capacity, Capacity::Bytes(2 << 30));
}

#[test]
fn nodes_of_files_are_listed_by_id_with_what_they_leave_out() {
    let node = |id: u32, more: &str| {
        format!("[[node]]\nid = {id}\nkind = \"file\"\npath = \"/f{id}\"\ncapacity = \"8M\"\n{more}")
    };
    let text = node(7, "class = 3\nwrite_fence = true\n") + &node(2, "guard = \"hard\"\n");
    let config = Config::parse(&text).unwrap();
    let file = |id: u16, class, is_fenced| FileNode {
        id,
        path: format!("/f{id}").into(),
        bytes: 8 << 20,
        class,
        is_fenced,
    };
    assert_eq!(config.files, [file(2, Class::Shared, false), file(7, Class::Slow, true)]);
    for path in ["", "/", "/var/.."] {
        let text = format!("[[node]]\nid = 2\nkind = \"file\"\ncapacity = \"8M\"\npath = \"{path}\"\n");
        let error = Config::parse(&text).unwrap_err().to_string();
        assert!(error.contains("line 5") && error.contains("names no file"), "{path:?}: {error}");
    }
}

#[test]
fn nodes_of_the_kernel_s_are_spm_and_listed_by_id_with_what_they_leave_out() {
    let text = "[[node]]\nid = 5\nkind = \"numa\"\nnode = 2\ncapacity = \"64M\"\nwrite_fence = true\n\
                [[node]]\nid = 3\nkind = \"numa\"\nclass = 3\n";
    let config = Config::parse(text).unwrap();
    let auto = Capacity::Auto;
    let plain = NumaNode { id: 3, node: 3, capacity: auto, class: Some(Class::Slow), is_fenced: false };
    let fenced = NumaNode { id: 5, node: 2, capacity: Capacity::Bytes(64 << 20), class: None, is_fenced: true };
    assert_eq!(config.numa, [plain, fenced]);
    assert_eq!(
        config.types,
        [("node2", NodeType::Spm), ("node3", NodeType::Spm)].map(|(name, kind)| (name.to_owned(), kind)).into()
    );
}

#[test]
fn nodes_of_devices_are_to_be_overwritten_and_listed_by_id_with_what_they_leave_out() {
    let node =
        |id: u32, more: &str| format!("[[node]]\nid = {id}\nkind = \"dax\"\npath = \"/dev/dax{id}.0\"\n{more}");
    let text = node(7, "overwrite = true\nclass = 3\ncapacity = \"64M\"\n") + &node(2, "overwrite = true\n");
    let dax = |id: u16, capacity, class| DaxNode { id, path: format!("/dev/dax{id}.0").into(), capacity, class };
    assert_eq!(
        Config::parse(&text).unwrap().dax,
        [dax(2, Capacity::Auto, None), dax(7, Capacity::Bytes(64 << 20), Some(Class::Slow))]
    );
    for more in ["", "overwrite = false\n"] {
        let reason = reason(&node(2, more));
        assert!(reason.contains("/dev/dax2.0") && reason.contains("overwrite = true"), "{reason}");
    }
}

#[test]
fn classes_are_given_by_number_and_others_than_1_to_6_refused_with_their_line() {
    let config = Config::parse("[class]\nnode2 = 3\n\"dax0.0\" = 6\n").unwrap();
    let classes: Vec<(&str, u8)> =
        config.classes.iter().map(|(name, class)| (name.as_str(), class.number())).collect();
    assert_eq!(classes, [("dax0.0", 6), ("node2", 3)]);
    let reason = reason("[class]\nnode2 = 7\n");
    assert!(reason.contains("line 2") && reason.contains("no class 7"), "{reason}");
}

#[test]
fn an_unknown_key_is_an_error_that_names_it_its_line_and_the_valid_ones() {
    let reason = reason("[run]\nsysram = \"1G\"\nsysrma = \"1G\"\n");
    for part in ["line 3", "sysrma", "sysram", "best_effort"] {
        assert!(reason.contains(part), "{part}: {reason}");
    }
}

#[test]
fn wrong_values_are_errors_that_name_the_line() {
    for (text, parts) in [
        ("[run]\nsysram = \"1Q\"\n", ["line 2", "1Q"]),
        ("[runs]\n", ["line 1", "runs"]),
        ("[run]\nheat = \"warm\"\n", ["line 2", "\"holding\", \"damon\""]),
        ("[[node]]\nid = 1\nkind = \"compressed\"\nclass = 3\n", ["line 4", "class 3"]),
        ("[[node]]\nid = 1\nkind = \"compressed\"\nguard = \"easy\"\n", ["line 4", "guard \"easy\""]),
        ("[[node]]\nid = 1\nkind = \"compressed\"\ncolour = 1\n", ["line 4", "colour"]),
        ("[[node]]\nid = 1\nkind = \"gold\"\n", ["line 3", "gold"]),
        ("[[node]]\nid = 2\nkind = \"compressed\"\n", ["node 2", "node 1"]),
        ("[[node]]\nid = 2\nkind = \"file\"\npath = \"x\"\n", ["node 2", "capacity"]),
        ("[[node]]\nid = 2\nkind = \"file\"\ncapacity = \"8M\"\n", ["node 2", "path"]),
        ("[[node]]\nid = 1\nkind = \"file\"\n", ["node 1", "2 to 1023"]),
        ("[[node]]\nid = 2\nkind = \"file\"\npath = \"x\"\ncapacity = \"8M\"\nclass = 4\n", ["line 6", "class 4"]),
        ("[[node]]\nid = 1\nkind = \"compressed\"\npath = \"x\"\n", ["line 4", "path"]),
        ("[[node]]\nid = 1\nkind = \"compressed\"\nwrite_fence = false\n", ["line 4", "fenced"]),
        ("[[node]]\nid = 2\nkind = \"numa\"\npath = \"x\"\n", ["line 4", "path"]),
        ("[[node]]\nid = 2\nkind = \"numa\"\nclass = 7\n", ["line 4", "class 7"]),
        ("[[node]]\nid = 1\nkind = \"compressed\"\nnode = 2\n", ["line 4", "kernel"]),
        ("[[node]]\nid = 1\nkind = \"dax\"\n", ["node 1", "2 to 1023"]),
        ("[[node]]\nid = 2\nkind = \"dax\"\noverwrite = true\n", ["node 2", "path"]),
        ("[[node]]\nid = 2\nkind = \"dax\"\nclass = 4\n", ["line 4", "class 4"]),
        ("[[node]]\nid = 2\nkind = \"dax\"\nwrite_fence = true\n", ["line 4", "fenced"]),
        ("[[node]]\nid = 2\nkind = \"numa\"\noverwrite = true\n", ["line 4", "overwrites"]),
        ("[type]\nnode2 = \"sysram\"\n[[node]]\nid = 2\nkind = \"numa\"\n", ["node2", "sysram"]),
        ("[[node]]\nid = 2\nkind = \"numa\"\n[[node]]\nid = 3\nkind = \"numa\"\nnode = 2\n", ["node 3", "node2"]),
        ("[[node]]\nid = 0\nkind = \"ram\"\n[[node]]\nid = 0\nkind = \"ram\"\n", ["node 0", "twice"]),
    ] {
        let reason = reason(text);
        assert!(parts.iter().all(|part| reason.contains(part)), "{text}: {reason}");
    }
}
