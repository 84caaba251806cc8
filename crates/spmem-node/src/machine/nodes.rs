//! Nodes: processors, memory, distances, HMAT's figures, tiers (Documentation/ABI/stable/sysfs-devices-node,
//! Documentation/ABI/testing/sysfs-kernel-mm-memory-tiers).

use std::collections::BTreeMap;
use std::format;
use std::string::String;
use std::vec::Vec;

use spmem_core::units::{Bytes, MAX_NODES, NodeId};

use super::sysfs::Sysfs;
use super::{Access, Memory, MemorySideCache, Node, UNDECIDED};

const NODES: &str = "sys/devices/system/node";
const TIERS: &str = "sys/devices/virtual/memory_tiering";

pub(super) fn read(sysfs: &Sysfs<'_>) -> Vec<Node> {
    if sysfs.required(format!("{NODES}/online")).is_none() {
        return Vec::new();
    }
    let mut online: Vec<u16> = sysfs.list(format!("{NODES}/online")).unwrap_or_default();
    online.sort_unstable();
    online.dedup();
    if let Some(first) = online.iter().copied().find(|&id| id >= MAX_NODES) {
        sysfs.remark(format!("{NODES}/online"), format!("node {first} is one too many: {MAX_NODES} is the most"));
        online.retain(|&id| id < MAX_NODES);
    }
    let with_memory: Option<Vec<u16>> = sysfs.list(format!("{NODES}/has_memory"));
    let generic: Vec<u16> = sysfs.list(format!("{NODES}/has_generic_initiator")).unwrap_or_default();
    let tiers = read_tiers(sysfs);
    let nodes = online.iter().map(|&id| {
        let folder = format!("{NODES}/node{id}");
        let has_memory = with_memory.as_ref().is_none_or(|nodes| nodes.contains(&id));
        let (cpus_only, any) = (read_access(sysfs, &folder, 1), read_access(sysfs, &folder, 0));
        // Before 5.11 there is class 0 alone.
        let access = cpus_only.or_else(|| any.clone());
        Node {
            id,
            cpus: sysfs.list(format!("{folder}/cpulist")).unwrap_or_default(),
            memory: if has_memory { read_memory(sysfs, &folder) } else { None },
            distances: read_distances(sysfs, &folder, &online),
            any_initiator: any.filter(|any| access.as_ref() != Some(any)),
            access,
            tier: tiers.get(&id).copied(),
            has_generic_initiator: generic.contains(&id),
            caches: read_caches(sysfs, &folder),
            class: UNDECIDED,
        }
    });
    nodes.collect()
}

/// The kernel lists distances to the nodes that are online, in order.
fn read_distances(sysfs: &Sysfs<'_>, folder: &str, online: &[u16]) -> BTreeMap<u16, u8> {
    let path = format!("{folder}/distance");
    let Some(text) = sysfs.required(&path) else { return BTreeMap::new() };
    let distances: Vec<u8> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    if distances.len() != online.len() || text.split_whitespace().count() != online.len() {
        sysfs.remark(path, format!("it has not one distance for each of {} nodes", online.len()));
        return BTreeMap::new();
    }
    online.iter().copied().zip(distances).collect()
}

/// Lines are `Node 0 MemTotal:  24 kB`.
fn read_memory(sysfs: &Sysfs<'_>, folder: &str) -> Option<Memory> {
    let path = format!("{folder}/meminfo");
    let text = sysfs.required(&path)?;
    let bytes = |key: &str| {
        text.lines().find_map(|line| {
            let (left, right) = line.split_once(':')?;
            let is_it = left.split_whitespace().nth(2)? == key;
            let kib: u64 = right.trim().strip_suffix("kB")?.trim().parse().ok()?;
            if is_it { kib.checked_mul(1024) } else { None }
        })
    };
    let (Some(total_bytes), Some(free_bytes)) = (bytes("MemTotal"), bytes("MemFree")) else {
        sysfs.remark(path, "it has no MemTotal and MemFree");
        return None;
    };
    let more: u64 = ["Active(file)", "Inactive(file)", "SReclaimable"]
        .iter()
        .filter_map(|key| bytes(key))
        .fold(0, u64::saturating_add);
    let free_bytes = free_bytes.min(total_bytes);
    let available_bytes = free_bytes.saturating_add(more).min(total_bytes);
    Some(Memory { total_bytes, free_bytes, available_bytes })
}

/// Free and all memory of one of this machine's nodes, as the kernel has it now; none where it does not tell.
pub fn read_room(node: NodeId) -> Option<(Bytes, Bytes)> {
    parse_room(&std::fs::read_to_string(format!("/{NODES}/node{}/meminfo", node.get())).ok()?)
}

fn parse_room(text: &str) -> Option<(Bytes, Bytes)> {
    let bytes = |key: &str| {
        let kib =
            text.lines().find_map(|line| line.split_once(key)?.1.split_whitespace().next()?.parse::<u64>().ok());
        kib.map(|kib| Bytes(kib << 10))
    };
    Some((bytes("MemFree:")?, bytes("MemTotal:")?))
}

/// Access class 1 counts processors only, 0 initiators of every kind (Documentation/admin-guide/mm/numaperf.rst).
fn read_access(sysfs: &Sysfs<'_>, folder: &str, class: u8) -> Option<Access> {
    read_access_at(sysfs, &format!("{folder}/access{class}/initiators"))
}

/// The same four files, of a node or of a CXL region. A figure of 0 is one that the firmware did not give.
pub(super) fn read_access_at(sysfs: &Sysfs<'_>, folder: &str) -> Option<Access> {
    let figure = |name: &str| sysfs.number(format!("{folder}/{name}")).filter(|&figure| figure > 0);
    let initiators = sysfs.numbered(folder, "node");
    let access = Access {
        initiators: initiators.iter().filter_map(|name| name.strip_prefix("node")?.parse().ok()).collect(),
        read_latency_ns: figure("read_latency"),
        write_latency_ns: figure("write_latency"),
        read_bandwidth_mib_s: figure("read_bandwidth"),
        write_bandwidth_mib_s: figure("write_bandwidth"),
    };
    let is_empty =
        access.latency_ns().is_none() && access.read_bandwidth_mib_s.or(access.write_bandwidth_mib_s).is_none();
    if is_empty { None } else { Some(access) }
}

fn read_tiers(sysfs: &Sysfs<'_>) -> BTreeMap<u16, u64> {
    let mut tiers = BTreeMap::new();
    for name in sysfs.numbered(TIERS, "memory_tier") {
        let Some(number) = name.strip_prefix("memory_tier").and_then(|number| number.parse().ok()) else {
            continue;
        };
        let nodes: Vec<u16> = sysfs.list(format!("{TIERS}/{name}/nodelist")).unwrap_or_default();
        tiers.extend(nodes.into_iter().map(|node| (node, number)));
    }
    tiers
}

fn read_caches(sysfs: &Sysfs<'_>, folder: &str) -> Vec<MemorySideCache> {
    let folder = format!("{folder}/memory_side_cache");
    let caches = sysfs.numbered(&folder, "index").into_iter().filter_map(|name: String| {
        let level = name.strip_prefix("index")?.parse().ok()?;
        let size = sysfs.number(format!("{folder}/{name}/size"))?;
        let line_size = sysfs.number(format!("{folder}/{name}/line_size"));
        Some(MemorySideCache { level, size, line_size })
    });
    caches.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_has_left_is_read_of_its_own_meminfo() {
        let text =
            "Node 2 MemTotal:         393216 kB\nNode 2 MemFree:           65536 kB\nNode 2 MemUsed: 1 kB\n";
        assert_eq!(parse_room(text), Some((Bytes::mib(64), Bytes::mib(384))));
        assert_eq!(parse_room("Node 2 MemTotal: 1 kB\n"), None);
    }
}
