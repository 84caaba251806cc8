//! Which nodes there are: the kernel's, those that devices would be, and spmem's own.
//!
//! The kernel's numbers are the machine's. spmem numbers its own nodes apart: its node 0 is all that the kernel gives out,
//! which the kernel's nodes show already, so only its SPM nodes are listed beside them.

use spmem_core::class::Verdict;
use spmem_core::mm::MemoryManager;
use spmem_core::node::{Class, NodeSpec, NodeType, Services};
use spmem_core::units::NodeId;
use spmem_node::machine::{Dax, DaxMode, Machine, Namespace, Node};

use super::measure::Measured;
use crate::config::Config;
use crate::heat::HeatLine;
use crate::machine::{Ram, type_of};

/// Who numbers a node and decides what lands there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The page allocator has it.
    Kernel,
    /// Memory of a device that the page allocator does not have: who opens the device gets it.
    Device,
    /// spmem makes it.
    Spmem,
}

impl Origin {
    /// As the JSON has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Device => "device",
            Self::Spmem => "spmem",
        }
    }
}

/// One node.
#[derive(Clone, Debug)]
pub struct NodeLine {
    pub id: u16,
    pub origin: Origin,
    pub node_type: NodeType,
    pub class: Class,
    /// Why this class; empty for spmem's own, whose kind says it.
    pub reason: String,
    pub services: Vec<String>,
    /// None for sysram, which has no wall.
    pub guard: Option<String>,
    pub owner: String,
    /// Bytes; used and free are not known of a device.
    pub capacity: Option<u64>,
    pub used: Option<u64>,
    pub free: Option<u64>,
    /// Dax devices and namespaces whose memory is here.
    pub devices: Vec<String>,
    pub measured: Option<Measured>,
}

/// What `spm nodes` shows.
pub struct Listing {
    /// The machine's nodes first, by number, then spmem's.
    pub lines: Vec<NodeLine>,
    pub machine: Machine,
    /// Sources of heat, where somebody asks.
    pub heat: Vec<HeatLine>,
}

impl Listing {
    /// All nodes. A machine that does not tell its nodes has those of the memory manager.
    pub fn new(machine: Machine, config: &Config, mm: &MemoryManager, ram: Ram) -> Self {
        let own = registered(mm, ram);
        if machine.nodes.is_empty() {
            return Self { lines: own, machine, heat: Vec::new() };
        }
        // What the kernel does on a node it does on each.
        let sysram = own.iter().find(|line| line.node_type == NodeType::Sysram);
        let services = sysram.map(|line| line.services.clone()).unwrap_or_default();
        let is_alone = machine.nodes.iter().filter(|node| node.memory.is_some()).count() == 1;
        let mut lines: Vec<NodeLine> =
            machine.nodes.iter().map(|node| of_kernel(&machine, node, type_of(config, node), &services)).collect();
        if let Some(line) = lines.iter_mut().find(|line| line.capacity.is_some()).filter(|_| is_alone) {
            // The kernel's own estimate is better than ours, and it is of the whole machine. So is its total: a node's
            // MemTotal was seen far below it where memory had been plugged in later.
            line.capacity = Some(ram.total_bytes);
            line.used = Some(ram.total_bytes - ram.available_bytes);
            line.free = Some(ram.available_bytes);
        }
        lines.extend(machine.target_nodes().into_iter().filter_map(|id| of_devices(&machine, id)));
        lines.sort_by_key(|line| line.id);
        lines.extend(own.into_iter().filter(|line| line.node_type == NodeType::Spm));
        Self { lines, machine, heat: Vec::new() }
    }

    /// Whether spmem's own nodes have numbers that the machine's have, too.
    pub fn has_ambiguous_ids(&self) -> bool {
        let (own, others): (Vec<&NodeLine>, Vec<&NodeLine>) =
            self.lines.iter().partition(|line| line.origin == Origin::Spmem);
        own.iter().any(|line| others.iter().any(|other| other.id == line.id))
    }
}

/// The nodes registered with `mm`, lowest first.
pub fn registered(mm: &MemoryManager, ram: Ram) -> Vec<NodeLine> {
    mm.registry().present().iter().filter_map(|node| of_registry(mm, node, ram)).collect()
}

fn of_registry(mm: &MemoryManager, node: NodeId, ram: Ram) -> Option<NodeLine> {
    let (spec, stats) = (mm.registry().spec(node)?, mm.stats(node)?);
    let [capacity, used, free] = match spec.node_type {
        NodeType::Sysram => [ram.total_bytes, ram.total_bytes - ram.available_bytes, ram.available_bytes],
        NodeType::Spm => [stats.capacity, stats.used, stats.free].map(|count| count.bytes().0),
    };
    Some(NodeLine {
        id: node.get(),
        origin: if spec.node_type == NodeType::Sysram { Origin::Kernel } else { Origin::Spmem },
        node_type: spec.node_type,
        class: spec.class,
        reason: String::new(),
        services: service_names(spec),
        guard: (spec.node_type == NodeType::Spm).then(|| spec.guard.to_string()),
        owner: spec.owner.clone().into_owned(),
        capacity: Some(capacity),
        used: Some(used),
        free: Some(free),
        devices: Vec::new(),
        measured: None,
    })
}

/// As they are told.
pub fn service_names(spec: &NodeSpec) -> Vec<String> {
    let services: Services = spec.services;
    services.iter_names().map(|(name, _)| name.to_lowercase()).collect()
}

fn of_kernel(machine: &Machine, node: &Node, node_type: NodeType, services: &[String]) -> NodeLine {
    let memory = node.memory;
    NodeLine {
        id: node.id,
        origin: Origin::Kernel,
        node_type,
        class: node.class.class,
        reason: node.class.reason.to_string(),
        services: services.to_vec(),
        // How hard it is, the wall says: the kernel itself has none.
        guard: (node_type == NodeType::Spm).then(|| "hard".to_owned()),
        owner: "kernel".to_owned(),
        capacity: memory.map(|memory| memory.total_bytes).or(Some(0)),
        used: memory.map(|memory| memory.total_bytes - memory.available_bytes).or(Some(0)),
        free: memory.map(|memory| memory.available_bytes).or(Some(0)),
        devices: device_names(machine, node.id),
        measured: None,
    }
}

/// A node that is there as a device only: nothing lands there by accident, and nothing works either; the file's mode is
/// the wall.
fn of_devices(machine: &Machine, id: u16) -> Option<NodeLine> {
    let dax: Vec<&Dax> = machine.dax.iter().filter(|dax| dax.target_node == Some(id)).collect();
    // A namespace in devdax mode is the dax device that is made of it.
    let is_its = |one: &&Namespace| one.target_node == Some(id) && one.mode != "devdax";
    let namespaces: Vec<&Namespace> = machine.namespaces.iter().filter(is_its).collect();
    let owner = match (dax.first(), namespaces.first()) {
        (Some(dax), _) => dax.driver.clone().unwrap_or_else(|| "none".to_owned()),
        (None, Some(namespace)) if namespace.blockdev.is_some() => "nd_pmem".to_owned(),
        (None, Some(_)) => "none".to_owned(),
        (None, None) => return None,
    };
    let verdicts = dax.iter().map(|dax| dax.class).chain(namespaces.iter().map(|one| one.class));
    // Of several kinds of memory on one node the most special one tells what to expect.
    let class: Verdict = verdicts.max_by_key(|verdict| verdict.class.number())?;
    let capacity = dax.iter().map(|dax| dax.bytes).chain(namespaces.iter().map(|one| one.bytes)).sum();
    Some(NodeLine {
        id,
        origin: Origin::Device,
        node_type: NodeType::Spm,
        class: class.class,
        reason: class.reason.to_string(),
        services: Vec::new(),
        guard: Some("hard".to_owned()),
        owner,
        capacity: Some(capacity),
        used: None,
        free: None,
        devices: device_names(machine, id),
        measured: None,
    })
}

fn device_names(machine: &Machine, id: u16) -> Vec<String> {
    let dax = machine.dax.iter().filter(|dax| dax.target_node == Some(id)).map(|dax| &dax.name);
    let namespaces = machine.namespaces.iter().filter(|one| one.target_node == Some(id)).map(|one| &one.name);
    dax.chain(namespaces).cloned().collect()
}

/// How a dax device is told in a line of text.
pub fn mode_of(dax: &Dax) -> &'static str {
    let mode: DaxMode = dax.mode;
    mode.name()
}
