//! The machine: which memory the kernel and the firmware know of, read from sysfs.
//!
//! [`Machine::read`] takes a root directory, `/` or a captured tree, and gives [`Node`]s, devices ([`Dax`], [`Namespace`],
//! [`Memdev`], [`Region`]) and soft-reserved ranges, each node and device with its class and the reason
//! ([`spmem_core::class`]). Called by `spm nodes` and the checks of `cargo xtask vm-test`. Takes no lock, changes nothing.
//!
//! What is missing or wrong is left out and noted in [`Machine::remarks`]; the rest is there. The files are those of
//! Documentation/ABI: stable/sysfs-devices-node, testing/sysfs-kernel-mm-memory-tiers, testing/sysfs-bus-dax,
//! testing/sysfs-bus-cxl, testing/sysfs-bus-nvdimm, and of Documentation/admin-guide/mm/numaperf.rst.
//!
//! Holes: the kernel tells the latency to a node from its best initiators only, not from each. Memory of an accelerator is
//! known by the node's generic initiator (ACPI SRAT) alone. Compressed memory has to be configured.

mod classes;
mod cxl;
mod dax;
mod iomem;
mod nodes;
mod nvdimm;
mod sysfs;

use std::collections::BTreeMap;
use std::path::Path;
use std::string::String;
use std::vec::Vec;

use serde::Serialize;
use spmem_core::class::{Reason, Verdict};
use spmem_core::node::Class;

pub use nodes::read_room;
pub use sysfs::Remark;
use sysfs::Sysfs;

/// What a configuration says about classes, by name: `node2`, `dax0.0`, `namespace0.0`.
pub type Overrides = BTreeMap<String, Class>;

/// All that was found.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// Nodes that are online, lowest first.
    pub nodes: Vec<Node>,
    /// Dax devices.
    pub dax: Vec<Dax>,
    /// Namespaces of persistent memory that have a size.
    pub namespaces: Vec<Namespace>,
    /// CXL memory devices.
    pub memdevs: Vec<Memdev>,
    /// CXL regions.
    pub regions: Vec<Region>,
    /// What the firmware reserves for drivers of special memory (EFI_MEMORY_SP); empty for others than root.
    pub soft_reserved: Vec<SoftReserved>,
    /// What was odd.
    pub remarks: Vec<Remark>,
    /// Names that a configuration gives a class and that nothing here has.
    pub unknown: Vec<String>,
}

/// A NUMA node of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The kernel's number.
    pub id: u16,
    /// Its processors.
    pub cpus: Vec<u32>,
    /// What is managed by the page allocator; `None` for a node without memory.
    pub memory: Option<Memory>,
    /// To each online node, as SLIT has it; 10 is its own.
    pub distances: BTreeMap<u16, u8>,
    /// What its best initiators see, as HMAT has it.
    pub access: Option<Access>,
    /// Same for initiators of any kind (access class 0), where that differs: a network card's node may be nearer.
    pub any_initiator: Option<Access>,
    /// N of `memory_tierN`; the lowest is the fastest.
    pub tier: Option<u64>,
    /// Whether the firmware names an initiator there that is no processor (SRAT, Generic Initiator).
    pub has_generic_initiator: bool,
    /// Caches in front of its memory, nearest first.
    pub caches: Vec<MemorySideCache>,
    /// What it is taken for.
    pub class: Verdict,
}

/// Memory of a node, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// `MemTotal`.
    pub total_bytes: u64,
    /// `MemFree`.
    pub free_bytes: u64,
    /// What could be had without swapping: free, page cache, reclaimable slab. As `MemAvailable`, but without the
    /// kernel's reserves, which it does not tell by node.
    pub available_bytes: u64,
}

/// How fast a node is from its best initiators.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Access {
    /// Nodes from which it is so.
    pub initiators: Vec<u16>,
    /// Read latency, ns.
    pub read_latency_ns: Option<u64>,
    /// Write latency, ns.
    pub write_latency_ns: Option<u64>,
    /// Read bandwidth, MiB/s.
    pub read_bandwidth_mib_s: Option<u64>,
    /// Write bandwidth, MiB/s.
    pub write_bandwidth_mib_s: Option<u64>,
}

impl Access {
    /// Mean of read and write, or the one that is known, ns.
    pub fn latency_ns(&self) -> Option<u64> {
        match (self.read_latency_ns, self.write_latency_ns) {
            (Some(read), Some(write)) => Some(read / 2 + write / 2 + (read % 2 + write % 2) / 2),
            (read, write) => read.or(write),
        }
    }
}

/// A cache in front of a node's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemorySideCache {
    /// 1 is nearest to the memory.
    pub level: u32,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub line_size: Option<u64>,
}

/// How a dax device is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DaxMode {
    /// A file to map; nobody else gets the memory.
    Devdax,
    /// Given to the page allocator.
    SystemRam,
    /// No driver.
    Disabled,
}

impl DaxMode {
    /// As daxctl(1) has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Devdax => "devdax",
            Self::SystemRam => "system-ram",
            Self::Disabled => "disabled",
        }
    }
}

/// A dax device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dax {
    /// `dax0.0`
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// Smallest piece that can be mapped, bytes.
    pub align_bytes: Option<u64>,
    /// The node that its memory is or would be.
    pub target_node: Option<u16>,
    /// The online node that is nearest.
    pub numa_node: Option<u16>,
    /// How it is used.
    pub mode: DaxMode,
    /// Its driver.
    pub driver: Option<String>,
    /// The CXL region or namespace that it is made of; `None` for memory of the firmware's tables.
    pub parent: Option<String>,
    /// Whether it is made of persistent memory.
    pub is_persistent: bool,
    /// What it is taken for.
    pub class: Verdict,
}

/// A namespace of persistent memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// `namespace0.0`
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// As ndctl(1) has it: raw, sector, fsdax or devdax.
    pub mode: String,
    /// The node that its memory would be.
    pub target_node: Option<u16>,
    /// The online node that is nearest.
    pub numa_node: Option<u16>,
    /// Its block device, but for devdax.
    pub blockdev: Option<String>,
    /// What it is taken for.
    pub class: Verdict,
}

/// A CXL memory device; its JSON has the names of cxl(1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Memdev {
    /// `mem0`
    pub memdev: String,
    /// Volatile capacity, bytes.
    pub ram_size: u64,
    /// Persistent capacity, bytes.
    pub pmem_size: u64,
    /// Serial number.
    pub serial: Option<u64>,
    /// The nearest node.
    pub numa_node: Option<u16>,
    /// The device it is a function of, such as a PCI address.
    pub host: Option<String>,
}

/// A CXL region: capacity of memory devices at an address. Its JSON has the names of cxl(1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    /// `region0`
    pub region: String,
    /// Bytes.
    pub size: u64,
    /// First byte; root only.
    #[serde(rename = "resource")]
    pub start: Option<u64>,
    /// `ram` or `pmem`.
    #[serde(rename = "type")]
    pub mode: Option<String>,
    /// Devices that share it.
    pub interleave_ways: Option<u64>,
    /// Bytes on one before the next.
    pub interleave_granularity: Option<u64>,
    /// Which devices, in order.
    pub memdevs: Vec<String>,
    /// The node of its memory, as its dax device tells.
    pub target_node: Option<u16>,
    /// How fast it is (access class 1, else 0), where the kernel computed it from the devices' own tables (6.9+).
    pub access: Option<Access>,
}

/// A range that the firmware keeps for special use. On Linux 7.3 only those that dax devices are made of are known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SoftReserved {
    /// First byte.
    #[serde(rename = "resource")]
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// What is in it: dax devices.
    pub used_by: Vec<String>,
}

impl Machine {
    /// Reads the tree at `root`, which has `sys` and `proc`. `overrides` win over what would follow from it.
    ///
    /// Never fails: what cannot be read is left out and noted.
    pub fn read(root: &Path, overrides: &Overrides) -> Self {
        let sysfs = Sysfs::new(root);
        let mut machine = Self {
            nodes: nodes::read(&sysfs),
            dax: dax::read(&sysfs),
            namespaces: nvdimm::read(&sysfs),
            memdevs: cxl::read_memdevs(&sysfs),
            regions: cxl::read_regions(&sysfs),
            soft_reserved: iomem::read(&sysfs),
            remarks: Vec::new(),
            unknown: Vec::new(),
        };
        dax::add_soft_reserved(&sysfs, &machine.dax, &mut machine.soft_reserved);
        for region in &mut machine.regions {
            let made_of_it = |dax: &&Dax| dax.parent.as_deref() == Some(region.region.as_str());
            let node = machine.dax.iter().find(made_of_it).and_then(|dax| dax.target_node);
            region.target_node = node.or(region.target_node);
        }
        classes::set(&mut machine, overrides);
        machine.remarks = sysfs.into_remarks();
        machine
    }

    /// The nearest nodes with processors, the nearest first; of those as near, the lowest number. A node's own first.
    pub fn initiators_of(&self, node: &Node) -> Vec<u16> {
        let with_cpus = self.nodes.iter().filter(|other| !other.cpus.is_empty());
        let mut initiators: Vec<(u8, u16)> =
            with_cpus.map(|other| (other.distances.get(&node.id).copied().unwrap_or(u8::MAX), other.id)).collect();
        initiators.sort_unstable();
        initiators.into_iter().map(|(_, id)| id).collect()
    }

    /// Nodes of devices that the page allocator does not have, and that are not online: each would be one.
    pub fn target_nodes(&self) -> Vec<u16> {
        let dax = self.dax.iter().filter_map(|dax| dax.target_node);
        let namespaces = self.namespaces.iter().filter_map(|namespace| namespace.target_node);
        let mut nodes: Vec<u16> = dax.chain(namespaces).filter(|&id| self.node(id).is_none()).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// The node of this number.
    pub fn node(&self, id: u16) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == id)
    }
}

/// What nothing is known of yet: [`classes::set`] decides.
const UNDECIDED: Verdict = Verdict { class: Class::Plain, reason: Reason::Unremarkable };

/// Numbers as the kernel writes them: `0,2-3`, for a person.
///
/// ```
/// assert_eq!(spmem_node::machine::list_text([0_u32, 2, 3]), "0,2-3");
/// ```
pub fn list_text<T: Into<u32>>(numbers: impl IntoIterator<Item = T>) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for number in numbers.into_iter().map(Into::into) {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let texts: Vec<String> = runs
        .into_iter()
        .map(|(first, last)| if first == last { std::format!("{first}") } else { std::format!("{first}-{last}") })
        .collect();
    texts.join(",")
}
