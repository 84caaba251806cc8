//! Whatever a file holds, there is no panic, what is odd is named, and what the file does not concern is still there.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use spmem_node::machine::{Machine, Overrides};

use crate::tree::Tree;

const MACHINES: [&str; 4] = [
    include_str!("numa4-plain.machine"),
    include_str!("cxl-system-ram.machine"),
    include_str!("nvdimm-fsdax.machine"),
    include_str!("made-accelerator.machine"),
];

fn files(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.strip_prefix("= ")).collect()
}

fn read(tree: &Tree) -> Machine {
    Machine::read(tree.root(), &Overrides::new())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_damage_to_a_file_is_a_panic(
        which in 0..MACHINES.len(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 0..40)), 1..6),
    ) {
        let tree = Tree::new(MACHINES[which]);
        let files = files(MACHINES[which]);
        for (file, bytes) in damage {
            tree.write(files[file.index(files.len())], &bytes);
        }
        let machine = read(&tree);
        // A number that is wrong may only be larger than the kernel's own bound if that is a remark.
        prop_assert!(machine.nodes.iter().all(|node| node.id < 1024));
    }

    #[test]
    fn a_list_that_is_made_up_is_read_or_remarked(text in "[0-9,\\-]{0,12}") {
        let tree = Tree::new(MACHINES[0]);
        tree.write("sys/devices/system/node/online", text.as_bytes());
        let machine = read(&tree);
        prop_assert!(machine.nodes.len() <= 1024);
    }
}

#[test]
fn more_nodes_than_linux_can_have_are_cut_off_with_a_remark() {
    let tree = Tree::new(MACHINES[0]);
    tree.write("sys/devices/system/node/online", b"0-1100");
    let machine = read(&tree);
    assert_eq!(machine.nodes.len(), 1024);
    let said = machine.remarks[0].to_string();
    assert_eq!(said, "/sys/devices/system/node/online: node 1024 is one too many: 1024 is the most");
}

#[test]
fn each_wrong_file_is_named_and_the_rest_is_shown() {
    let base = "sys/devices/system/node";
    for (file, text, problem) in [
        (format!("{base}/node1/distance"), "21 ten 40 25", "it has not one distance for each of 4 nodes"),
        (format!("{base}/node1/meminfo"), "Node 1 MemTotal: lots", "it has no MemTotal and MemFree"),
        (format!("{base}/node1/cpulist"), "one", "`one` is no list of numbers"),
        (format!("{base}/node1/access1/initiators/read_latency"), "fast", "`fast` is no number"),
        ("sys/devices/virtual/memory_tiering/memory_tier4/nodelist".into(), "9-", "`9-` is no list of numbers"),
    ] {
        let tree = Tree::new(MACHINES[0]);
        tree.write(&file, text.as_bytes());
        let machine = read(&tree);
        assert!(!machine.remarks.is_empty(), "{file}");
        for remark in &machine.remarks {
            assert_eq!(remark.path, PathBuf::from(format!("/{file}")));
            assert_eq!(remark.problem, problem);
        }
        assert_eq!(machine.nodes.len(), 4, "{file}");
        assert!(machine.nodes[2].memory.is_some() && machine.nodes[2].distances.len() == 4);
    }
}

#[test]
fn each_missing_file_that_every_kernel_has_is_named() {
    for name in ["distance", "meminfo"] {
        let tree = Tree::new(MACHINES[0]);
        fs::remove_file(tree.root().join(format!("sys/devices/system/node/node2/{name}"))).unwrap();
        let machine = read(&tree);
        let [remark] = &machine.remarks[..] else { panic!("{:?}", machine.remarks) };
        assert_eq!(remark.to_string(), format!("/sys/devices/system/node/node2/{name}: it is missing"));
        assert_eq!(machine.nodes.len(), 4);
    }
}

#[test]
fn a_device_of_nonsense_is_remarked_and_its_neighbours_are_shown() {
    let device = "sys/devices/platform/ACPI0017:00/root0/decoder0.0/region0/dax_region0/dax0.0";
    for (file, text, problem) in
        [("target_node", "70000", "`70000` is no node"), ("size", "big", "`big` is no number")]
    {
        let tree = Tree::new(MACHINES[1]);
        tree.write(&format!("{device}/{file}"), text.as_bytes());
        let machine = read(&tree);
        let said: Vec<String> = machine.remarks.iter().map(ToString::to_string).collect();
        assert_eq!(said, [format!("/sys/bus/dax/devices/dax0.0/{file}: {problem}")]);
        assert_eq!((machine.nodes.len(), machine.memdevs.len()), (3, 1));
    }
    let tree = Tree::new(MACHINES[1]);
    fs::remove_dir_all(tree.root().join(device)).unwrap();
    let machine = read(&tree);
    assert_eq!((machine.dax.len(), machine.nodes.len()), (0, 3), "a link to nothing is no device");
}
