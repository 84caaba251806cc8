//! What [`spmem_node::machine`] makes of machines: those of `cargo xtask vm`, captured by `capture.sh` in a guest with
//! Linux 6.12 (or what their name says), and ones that were made by hand after the kernel's Documentation/ABI, for what QEMU cannot show.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

mod damage;
mod tree;

use spmem_core::class::Reason;
use spmem_node::machine::{Access, DaxMode, Machine, Memdev, Overrides};
use tree::Tree;

fn machine(text: &str) -> Machine {
    let machine = Machine::read(Tree::new(text).root(), &Overrides::new());
    assert_eq!(machine.remarks, [], "a machine as it should be gives no remark");
    machine
}

/// Of each node: number, class, processors, tier.
fn nodes(machine: &Machine) -> Vec<(u16, u8, usize, Option<u64>)> {
    machine.nodes.iter().map(|node| (node.id, node.class.class.number(), node.cpus.len(), node.tier)).collect()
}

/// Name, target node, mode, parent, class.
type Device<'a> = (&'a str, Option<u16>, DaxMode, Option<&'a str>, u8);

fn dax(machine: &Machine) -> Vec<Device<'_>> {
    let devices = machine.dax.iter();
    devices
        .map(|dax| (dax.name.as_str(), dax.target_node, dax.mode, dax.parent.as_deref(), dax.class.class.number()))
        .collect()
}

/// Of each namespace: mode, target node, block device, class.
fn namespaces(machine: &Machine) -> Vec<(&str, Option<u16>, Option<&str>, u8)> {
    let all = machine.namespaces.iter();
    all.map(|one| (one.mode.as_str(), one.target_node, one.blockdev.as_deref(), one.class.class.number()))
        .collect()
}

#[test]
fn four_nodes_have_their_figures_distances_tiers_and_classes() {
    let machine = machine(include_str!("numa4-plain.machine"));
    // Latencies of 80, 80, 300 and 70 ns: 300 is still class 2.
    assert_eq!(nodes(&machine), [(0, 1, 1, Some(4)), (1, 1, 1, Some(4)), (2, 2, 0, Some(67)), (3, 1, 0, Some(0))]);
    assert_eq!(machine.nodes[2].class.reason, Reason::Latency { ns: 300 });
    let distances: Vec<u8> = machine.nodes[2].distances.values().copied().collect();
    assert_eq!(distances, [30, 40, 10, 45]);
    let access = Access {
        initiators: vec![0],
        read_latency_ns: Some(300),
        write_latency_ns: Some(300),
        read_bandwidth_mib_s: Some(25_600),
        write_bandwidth_mib_s: Some(25_600),
    };
    assert_eq!((&machine.nodes[2].access, &machine.nodes[2].any_initiator), (&Some(access), &None));
    assert_eq!(machine.initiators_of(&machine.nodes[2]), [0, 1]);
    assert_eq!(machine.initiators_of(&machine.nodes[1]), [1, 0]);
    let memory = machine.nodes[3].memory.unwrap();
    assert_eq!((memory.total_bytes, memory.free_bytes), (128_668 << 10, 118_656 << 10));
    assert_eq!(memory.available_bytes, (118_656 + 168) << 10);
}

#[test]
fn what_the_kernel_makes_up_is_ordinary() {
    let machine = machine(include_str!("fake-plain.machine"));
    assert_eq!(nodes(&machine), (0..4).map(|id| (id, 1, 2, Some(4))).collect::<Vec<_>>());
    assert_eq!(machine.nodes[3].class.reason, Reason::OwnProcessors);
}

#[test]
fn soft_reserved_memory_is_a_dax_device_of_a_node_that_is_not_there() {
    for text in [include_str!("hmem-devdax.machine"), include_str!("hmem-devdax-7.3.machine")] {
        let machine = machine(text);
        assert_eq!(nodes(&machine).iter().map(|node| node.0).collect::<Vec<_>>(), [0, 1, 3]);
        assert_eq!(dax(&machine), [("dax0.0", Some(2), DaxMode::Devdax, None, 1)]);
        assert_eq!(machine.target_nodes(), [2]);
        let [range] = &machine.soft_reserved[..] else { panic!("{:?}", machine.soft_reserved) };
        assert_eq!(
            (range.start, range.size, &range.used_by[..]),
            (0x3000_0000, 384 << 20, &["dax0.0".to_owned()][..])
        );
    }
}

#[test]
fn cxl_memory_is_told_from_the_device_to_the_node() {
    let volatile = machine(include_str!("cxl-devdax.machine"));
    assert_eq!(dax(&volatile), [("dax0.0", Some(2), DaxMode::Devdax, Some("region0"), 2)]);
    assert_eq!(volatile.dax[0].class.reason, Reason::Cxl);
    let mem0 = Memdev {
        memdev: "mem0".into(),
        ram_size: 256 << 20,
        pmem_size: 0,
        serial: Some(0x1234),
        numa_node: None,
        host: Some("0000:0d:00.0".into()),
    };
    assert_eq!(volatile.memdevs, [mem0]);
    let [region] = &volatile.regions[..] else { panic!("{:?}", volatile.regions) };
    assert_eq!((region.mode.as_deref(), region.size, region.target_node), (Some("ram"), 256 << 20, Some(2)));
    assert_eq!((region.start, &region.memdevs[..]), (Some(0x2_e000_0000), &["mem0".to_owned()][..]));

    let onlined = machine(include_str!("cxl-system-ram.machine"));
    assert_eq!(nodes(&onlined)[2], (2, 2, 0, Some(22)));
    assert_eq!(onlined.nodes[2].class.reason, Reason::BelowDram { tier: 22 });
    assert_eq!(dax(&onlined), [("dax0.0", Some(2), DaxMode::SystemRam, Some("region0"), 2)]);
    assert_eq!(onlined.target_nodes(), [0_u16; 0]);
}

#[test]
fn persistent_cxl_memory_is_a_region_a_namespace_and_a_dax_device() {
    let machine = machine(include_str!("cxlpmem-devdax.machine"));
    let [region] = &machine.regions[..] else { panic!("{:?}", machine.regions) };
    assert_eq!((region.mode.as_deref(), region.target_node), (Some("pmem"), Some(2)));
    assert_eq!(machine.memdevs[0].pmem_size, 256 << 20);
    assert_eq!(dax(&machine), [("dax0.0", Some(2), DaxMode::Devdax, Some("namespace0.0"), 6)]);
    assert_eq!(namespaces(&machine), [("devdax", Some(2), None, 6)]);
}

#[test]
fn namespaces_have_their_mode_and_block_device_and_class_6() {
    let fsdax = machine(include_str!("nvdimm-fsdax.machine"));
    assert_eq!(namespaces(&fsdax), [("fsdax", Some(2), Some("pmem0"), 6)]);
    assert_eq!(fsdax.target_nodes(), [2]);

    let onlined = machine(include_str!("nvdimm-system-ram.machine"));
    assert_eq!(nodes(&onlined)[2].1, 6, "onlined or not, it is persistent memory");
    assert_eq!(dax(&onlined), [("dax0.0", Some(2), DaxMode::SystemRam, Some("namespace0.0"), 6)]);

    let virtio = machine(include_str!("vpmem-none.machine"));
    assert_eq!(namespaces(&virtio), [("fsdax", Some(1), Some("pmem0"), 6)]);
    assert_eq!(virtio.nodes[1].access, None, "figures of 0 are none");

    let legacy = machine(include_str!("pmem-devdax.machine"));
    assert_eq!(dax(&legacy)[0].4, 6);
    assert_eq!(nodes(&legacy)[1].1, 1, "RAM stays RAM with persistent memory beside it");
}

/// As a superchip of Grace and Hopper has it: memory of the graphics processor as a node with a generic initiator and no
/// CPU (Documentation/ABI/stable/sysfs-devices-node, has_generic_initiator), and class 0 figures from that initiator.
#[test]
fn memory_of_a_coherent_accelerator_is_known_by_its_initiator() {
    let machine = machine(include_str!("made-accelerator.machine"));
    assert_eq!(nodes(&machine), [(0, 2, 72, Some(4)), (1, 5, 0, Some(5)), (2, 2, 0, None)]);
    let gpu = &machine.nodes[1];
    let latencies =
        |access: &Option<Access>| access.as_ref().map(|access| (access.initiators.clone(), access.latency_ns()));
    assert_eq!(latencies(&gpu.access), Some((vec![0], Some(450))), "what processors see counts");
    assert_eq!(latencies(&gpu.any_initiator), Some((vec![1], Some(220))));
    assert!(machine.nodes[2].memory.is_none() && machine.nodes[2].has_generic_initiator);
}

/// Since 6.9 a CXL region tells what the kernel computed from the devices' CDATs (Documentation/ABI/testing/sysfs-bus-cxl,
/// regionZ/accessY/), and a node may have a memory-side cache (stable/sysfs-devices-node).
#[test]
fn a_region_of_two_devices_tells_its_latency_and_a_node_its_cache() {
    let machine = machine(include_str!("made-cxl-interleaved.machine"));
    let [region] = &machine.regions[..] else { panic!("{:?}", machine.regions) };
    assert_eq!(
        (region.interleave_ways, &region.memdevs[..]),
        (Some(2), &["mem1".to_owned(), "mem0".to_owned()][..])
    );
    assert_eq!(region.access.as_ref().and_then(Access::latency_ns), Some(425));
    assert_eq!(dax(&machine), [("dax9.0", Some(1), DaxMode::Devdax, Some("region9"), 3)]);
    assert_eq!(machine.dax[0].class.reason, Reason::Latency { ns: 425 });
    let [cache] = machine.nodes[0].caches[..] else { panic!("{:?}", machine.nodes[0].caches) };
    assert_eq!((cache.level, cache.size, cache.line_size), (1, 16 << 30, Some(64)));
}

#[test]
fn a_configured_class_wins_and_a_name_that_nothing_has_is_told() {
    use spmem_core::node::Class;
    let names = ["node0", "node2", "dax0.0", "node7", "gold"];
    let classes = [Class::Slower, Class::Featured, Class::Accelerator, Class::Plain, Class::Plain];
    let overrides: Overrides = names.into_iter().map(str::to_owned).zip(classes).collect();
    let tree = Tree::new(include_str!("hmem-devdax.machine"));
    let machine = Machine::read(tree.root(), &overrides);
    assert_eq!(nodes(&machine)[0].1, 2);
    assert_eq!(machine.nodes[0].class.reason, Reason::Configured);
    assert_eq!(dax(&machine)[0].4, 5, "a device's own name before its node's");
    assert_eq!(machine.unknown, ["gold", "node7"]);
    let by_node: Overrides = [("node2".to_owned(), Class::Featured)].into();
    assert_eq!(dax(&Machine::read(tree.root(), &by_node))[0].4, 4);
}

#[test]
fn a_tree_without_anything_is_one_remark_and_no_node() {
    let machine = Machine::read(Tree::new("").root(), &Overrides::new());
    assert!(machine.nodes.is_empty());
    let said: Vec<String> = machine.remarks.iter().map(ToString::to_string).collect();
    assert_eq!(said, ["/sys/devices/system/node/online: it is missing"]);
}

/// This machine's own, whatever it is.
#[test]
fn the_machine_that_this_runs_on_has_a_node_with_memory() {
    let machine = Machine::read("/".as_ref(), &Overrides::new());
    assert!(machine.nodes.iter().any(|node| node.memory.is_some_and(|memory| memory.total_bytes > 1 << 20)));
}
