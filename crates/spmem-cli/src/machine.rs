//! This machine: its RAM, and the nodes that a configuration makes of it.

use std::path::Path;

use anyhow::Context;
use spmem_core::enclosure::Nodes;
use spmem_core::frames::Metadata;
use spmem_core::node::NodeType;
use spmem_core::nodemask::NodeMask;
use spmem_core::units::{Bytes, NodeId};
use spmem_node::compressed::GrantedFrames;
use spmem_node::machine::{Machine, Node};

use crate::config::Config;
use crate::remark::remark;

/// RAM as the kernel counts it.
#[derive(Clone, Copy, Debug)]
pub struct Ram {
    /// All of it (`MemTotal`), bytes.
    pub total_bytes: u64,
    /// What programs could still get without swapping (`MemAvailable`), bytes.
    pub available_bytes: u64,
}

impl Ram {
    /// Reads `/proc/meminfo`.
    ///
    /// # Errors
    /// It is not mounted or has another shape.
    pub fn read() -> anyhow::Result<Self> {
        let text = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo cannot be read")?;
        let bytes = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':')?.trim().strip_suffix("kB"))
                .and_then(|number| number.trim().parse::<u64>().ok())
                .map(|kibibytes| kibibytes << 10)
                .with_context(|| format!("/proc/meminfo has no {key}"))
        };
        Ok(Self { total_bytes: bytes("MemTotal")?, available_bytes: bytes("MemAvailable")? })
    }
}

/// What one of the kernel's nodes is for: what the configuration says, else what its class is for.
pub fn type_of(config: &Config, node: &Node) -> NodeType {
    let configured = config.types.get(&format!("node{}", node.id)).copied();
    configured.unwrap_or(node.class.class.usual_type())
}

/// Says which nodes the configuration gives a type that the kernel does not have: a wall would not keep them out.
pub fn tell_absent_types(config: &Config, nodes: &Nodes) {
    let present: Vec<String> =
        nodes.sysram.union(&nodes.spm).iter().map(|node| format!("node{}", node.get())).collect();
    for (name, kind) in config.types.iter().filter(|(name, _)| !present.contains(name)) {
        remark(format_args!("the configuration makes {name} {kind}, but the kernel has no memory on such a node"));
    }
}

/// The kernel's nodes with memory, by what they are for. A kernel without NUMA has node 0.
///
/// # Errors
/// /proc does not tell which of them this process may use.
pub fn kernel_nodes(config: &Config) -> anyhow::Result<Nodes> {
    let machine = Machine::read(Path::new("/"), &config.classes);
    let mut nodes = Nodes { reachable: reachable_nodes()?, ..Nodes::default() };
    for node in machine.nodes.iter().filter(|node| node.memory.is_some_and(|memory| memory.total_bytes > 0)) {
        let Ok(id) = NodeId::new(node.id) else { continue };
        match type_of(config, node) {
            NodeType::Sysram => nodes.sysram.insert(id),
            NodeType::Spm => nodes.spm.insert(id),
        }
    }
    if nodes.sysram.is_empty() && nodes.spm.is_empty() {
        nodes.sysram.insert(NodeId::ZERO);
    }
    Ok(nodes)
}

/// The nodes that this process's cpuset allows (proc_pid_status(5)).
///
/// # Errors
/// /proc is not mounted or has another shape.
pub fn reachable_nodes() -> anyhow::Result<NodeMask> {
    let status = std::fs::read_to_string("/proc/self/status").context("/proc/self/status cannot be read")?;
    let list = status.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:")).map(str::trim);
    // A kernel without cpusets has no such line: nothing is kept out.
    list.map_or(Ok(NodeMask::ALL), |list| NodeMask::parse(list, NodeMask::EMPTY).context("Mems_allowed_list"))
}

/// Sets the nodes up as the agent of a program does: through the memory manager, with its owners and the grant.
///
/// # Errors
/// The memory manager refuses, for example a capacity of more frames than it can number.
pub fn set_up_nodes(config: &Config, ram: Ram) -> anyhow::Result<GrantedFrames> {
    let capacity = Bytes(config.store_capacity.bytes(ram.total_bytes)).frames_ceil();
    let lent = Metadata::from_heap(capacity)?;
    GrantedFrames::embedded(capacity, lent).map_err(|error| anyhow::anyhow!("{error}"))
}
