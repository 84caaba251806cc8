//! The nodes that a run's cold pages go to, besides the compressed one: which, in what order, and by what grant.
//!
//! [`Targets::plan`] holds the configuration against this machine: the kernel's nodes, which pages are placed on (`porter`), and files and dax devices,
//! which they are copied to (`swap`). The order is that of core's tiers; of what is copied to its class says where it stands. [`Wicket`] is where the wall is asked:
//! it has the nodes and, for each, a grant with the run's quota (R6, R12).

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, bail, ensure};
use spmem::control::Control;
use spmem_core::distance::Distances;
use spmem_core::grant::{Charge, Grant, Rights, Terms};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::placing::{ALLOTMENT, MAX_TARGETS};
use spmem_core::registry::Registry;
use spmem_core::tier::{self, DRAM, Performance, Tiers};
use spmem_core::units::{Bytes, DomainId, MAX_NODES, NodeId};
use spmem_core::wall::Request;
use spmem_node::machine::{Dax, DaxMode, Machine, Node};
use spmem_node::roll::{Entry, Roll, What};
use spmem_node::swapfile::CLUSTER_BYTES;
use spmem_sys::{Errno, Result};

use super::ControlPage;
use crate::config::{Capacity, Config, DaxNode, FileNode, NumaNode};
use crate::heat;
use crate::machine::{kernel_nodes, reachable_nodes};

/// The nodes of a run, best first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Targets(Vec<Target>);

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// By the configuration.
    pub id: u16,
    /// The kernel's number; of what pages are copied to one that no node of the run has.
    pub node: NodeId,
    /// What it is registered as.
    pub spec: NodeSpec,
    /// What the run may have there.
    pub quota: Bytes,
    /// What takes them there.
    pub way: Way,
}

/// How pages get to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// They are placed there: it is the kernel's.
    Placed,
    /// They are copied to a file in the folder of this path.
    File(PathBuf),
    /// They are copied to a dax device.
    Device {
        /// The path that the configuration gives it.
        path: PathBuf,
        /// The kernel's name for it.
        name: String,
        /// In what it is mapped, bytes.
        align: u64,
    },
}

/// What runs ask of all these nodes.
fn services(is_fenced: bool) -> Services {
    let fence = if is_fenced { Services::WRITE_FENCE } else { Services::empty() };
    Services::RECLAIM | Services::MIGRATION | Services::DEMOTION | Services::PROMOTION | fence
}

/// The nodes as they are put in order.
#[derive(Default)]
struct Order {
    tiers: Tiers,
    distances: Distances,
    home: Option<NodeId>,
    targets: Vec<Target>,
}

impl Targets {
    /// Those of the configuration, against this machine.
    ///
    /// # Errors
    /// A node is not there, has no memory, or is not in this process's cpuset; there are too many.
    pub fn plan(config: &Config) -> anyhow::Result<Self> {
        let count = config.numa.len() + config.files.len() + config.dax.len();
        ensure!(
            count <= MAX_TARGETS,
            "a run uses at most {MAX_TARGETS} nodes of the kinds \"numa\", \"dax\" and \"file\""
        );
        let mut order = Order::default();
        if !(config.numa.is_empty() && config.dax.is_empty()) {
            let machine = Machine::read(Path::new("/"), &config.classes);
            if !config.numa.is_empty() {
                order.add_numa(&machine, &config.numa, &kernel_nodes(config)?.sysram, &reachable_nodes()?)?;
            }
            // In a tier the lower number comes first, and numbers are given from the highest on down.
            for node in config.dax.iter().rev() {
                let added = device_of(&machine, &node.path).and_then(|device| order.add_device(node, device));
                added.with_context(|| format!("node {}: {}", node.id, node.path.display()))?;
            }
        }
        for node in config.files.iter().rev() {
            order.add_file(node)?;
        }
        order.settle()
    }

    /// Whether some are the kernel's.
    pub fn has_mapped(&self) -> bool {
        self.0.iter().any(|target| target.way == Way::Placed)
    }

    /// Those that pages are copied to, with their numbers.
    pub fn copied(&self) -> impl Iterator<Item = (usize, &Target)> {
        self.0.iter().enumerate().filter(|(_, target)| target.way != Way::Placed)
    }

    /// Tells who audits what the run's grants are for: of these nodes, and of the compressed one.
    ///
    /// # Errors
    /// The control page cannot be looked at.
    pub fn enroll(&self, roll: &Roll, control: &ControlPage) -> anyhow::Result<()> {
        let inode = rustix::fs::fstat(control).context("the control page cannot be looked at")?.st_ino;
        let enter = |id, node, quota| roll.enter(&Entry { node, what: What::Run { control: inode, id, quota } });
        enter(1, None, control.store_capacity_bytes.load(Relaxed)).context("the roll is full")?;
        for target in &self.0 {
            let node = (target.way == Way::Placed).then_some(target.node);
            enter(target.id, node, target.quota.0).context("the roll is full")?;
        }
        Ok(())
    }

    /// Tells the agents.
    pub fn publish(&self, control: &Control, config: &Config) -> anyhow::Result<()> {
        for (to, target) in control.targets.iter().zip(&self.0) {
            to.id.store(target.id.into(), Relaxed);
            to.class.store(target.spec.class.number().into(), Relaxed);
            if target.way == Way::Placed {
                to.is_fenced.store(target.spec.services.contains(Services::WRITE_FENCE).into(), Relaxed);
                to.node.store(target.node.get().into(), Relaxed);
            } else {
                let clusters =
                    u32::try_from(target.quota.0 / CLUSTER_BYTES).context("a node of a run is too large")?;
                to.clusters.store(clusters, Relaxed);
            }
            if let Way::Device { align, .. } = target.way {
                to.align.store(align, Relaxed);
            }
            to.quota_bytes.store(target.quota.0, Relaxed);
        }
        if self.has_mapped() {
            let fenced = Services::WRITE_FENCE;
            // The kernel has one bit for both.
            let is_tracked = !self.0.iter().any(|target| target.spec.services.contains(fenced))
                && heat::is_tracked(config.run.heat);
            control.is_tracked.store(is_tracked.into(), Relaxed);
            for node in kernel_nodes(config)?.sysram.iter() {
                control.sysram[usize::from(node.get()) / 64].fetch_or(1 << (node.get() % 64), Relaxed);
            }
        }
        Ok(())
    }
}

impl Order {
    fn add_numa(
        &mut self,
        machine: &Machine,
        wanted: &[NumaNode],
        sysram: &NodeMask,
        reachable: &NodeMask,
    ) -> anyhow::Result<()> {
        let find = |id: u16| machine.nodes.iter().find(|node| node.id == id);
        let is_home = |node: &&Node| NodeId::new(node.id).is_ok_and(|id| sysram.contains(id));
        let home = machine.nodes.iter().find(|node| is_home(node) && !node.cpus.is_empty());
        // A machine of one node may stand in for others: then its pages come back to where they were.
        let home = home.or_else(|| machine.nodes.first()).context("this machine does not tell its nodes")?;
        let home_id = NodeId::new(home.id)?;
        self.home = Some(home_id);
        for numa in wanted {
            let id = NodeId::new(numa.node)?;
            let memory = find(numa.node).and_then(|node| Some((node, node.memory?)));
            let Some((node, memory)) = memory.filter(|(_, memory)| memory.total_bytes > 0) else {
                bail!(
                    "node {} of the configuration: the kernel has no memory on a node {}; `spm nodes` lists those that there are",
                    numa.id,
                    numa.node
                );
            };
            ensure!(
                reachable.contains(id),
                "node {}: this process's cpuset lacks the kernel's node {id}",
                numa.id
            );
            self.tiers.set(id, abstract_distance(home, node)).context("tiers of nodes")?;
            if let Some(&distance) = home.distances.get(&node.id) {
                self.distances.set(home_id, id, distance).context("distances of nodes")?;
            }
            let quota = Bytes(match numa.capacity {
                Capacity::Auto => memory.total_bytes,
                Capacity::Bytes(bytes) => bytes.min(memory.total_bytes),
            });
            let spec = NodeSpec {
                node_type: NodeType::Spm,
                class: numa.class.unwrap_or(node.class.class),
                services: services(numa.is_fenced),
                guard: Guard::Hard,
                owner: "porter".into(),
            };
            self.targets.push(Target { id: numa.id, node: id, spec, quota, way: Way::Placed });
        }
        Ok(())
    }

    fn add_file(&mut self, file: &FileNode) -> anyhow::Result<()> {
        self.add_copied(file.id, file.class, file.bytes, Way::File(file.path.clone()))
    }

    fn add_device(&mut self, node: &DaxNode, device: &Dax) -> anyhow::Result<()> {
        let name = &device.name;
        let named = |target: &Target| matches!(&target.way, Way::Device { name: other, .. } if other == name);
        ensure!(!self.targets.iter().any(named), "another node is of {name}, too");
        match device.mode {
            DaxMode::Devdax => {}
            DaxMode::SystemRam => bail!(
                "{name} is in mode system-ram, a node of the kernel's, which kind = \"numa\" uses; or \
                 `daxctl reconfigure-device --mode=devdax {name}`"
            ),
            DaxMode::Disabled => bail!("{name} has no driver; `daxctl enable-device {name}` gives it one"),
        }
        let class = node.class.unwrap_or(device.class.class);
        ensure!(
            class != Class::Featured,
            "{name} is of class 4: memory that compresses may have less room than it says, and runs do not watch it"
        );
        let align = device.align_bytes.filter(|&align| align > 0);
        let align = align.with_context(|| format!("the kernel does not tell in what {name} is mapped"))?;
        let all = device.bytes / align * align;
        let bytes = match node.capacity {
            Capacity::Auto => all,
            Capacity::Bytes(bytes) => bytes.min(all),
        };
        ensure!(bytes >= CLUSTER_BYTES, "{name} has {all} bytes, a run needs {CLUSTER_BYTES}");
        let (path, name) = (node.path.clone(), name.clone());
        self.add_copied(node.id, class, bytes, Way::Device { path, name, align })
    }

    fn add_copied(&mut self, id: u16, class: Class, bytes: u64, way: Way) -> anyhow::Result<()> {
        let is_free = |id: &NodeId| {
            *id != NodeId::ZERO && Some(*id) != self.home && self.targets.iter().all(|target| target.node != *id)
        };
        // The numbers of the kernel's nodes begin at the other end.
        let mut ids = (0..MAX_NODES).rev().filter_map(|id| NodeId::new(id).ok());
        let node = ids.find(is_free).context("there are too many nodes")?;
        self.tiers.set(node, tier::assumed_distance(class)).context("tiers of nodes")?;
        let spec = NodeSpec {
            node_type: NodeType::Spm,
            class,
            // Pages are entered and left by copy: nobody could write them there.
            services: services(true),
            guard: Guard::Hard,
            owner: "swap".into(),
        };
        let quota = Bytes(bytes / CLUSTER_BYTES * CLUSTER_BYTES);
        self.targets.push(Target { id, node, spec, quota, way });
        Ok(())
    }

    fn settle(self) -> anyhow::Result<Targets> {
        let Self { tiers, distances, home, mut targets } = self;
        let all: NodeMask = targets.iter().map(|target| target.node).collect();
        let order = tiers.demotion_order(home.unwrap_or(NodeId::ZERO), &all, &distances);
        let order = order.map_err(|error| anyhow::anyhow!("{error}"))?;
        // What is no slower than ordinary memory is used because the configuration says so, after what is meant for it.
        targets.sort_by_key(|target| order.iter().position(|&node| node == target.node).unwrap_or(usize::MAX));
        Ok(Targets(targets))
    }
}

/// What a run would have of one node of kind "dax".
///
/// # Errors
/// It cannot be used; the message says why and what would do.
pub fn of_device(machine: &Machine, node: &DaxNode) -> anyhow::Result<Target> {
    let mut order = Order::default();
    order.add_device(node, device_of(machine, &node.path)?)?;
    order.targets.pop().context("it was not added")
}

/// The device at a path, whatever it is called there.
///
/// # Errors
/// There is none.
pub fn device_of<'a>(machine: &'a Machine, path: &Path) -> anyhow::Result<&'a Dax> {
    let metadata = path.metadata().context("there is no such device; `spm nodes` lists those that there are")?;
    let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    let link = std::fs::read_link(format!("/sys/dev/char/{major}:{minor}")).unwrap_or_default();
    let is_named = |dax: &&Dax| metadata.file_type().is_char_device() && link.ends_with(&dax.name);
    let found = machine.dax.iter().find(is_named);
    found.context("this is no dax device; `spm nodes` lists those that there are")
}

/// What the firmware tells, else its distance, where 10 is the node's own.
fn abstract_distance(home: &Node, node: &Node) -> u64 {
    let performance = |node: &Node| {
        let access = node.access.as_ref()?;
        let (read, write) = (access.read_bandwidth_mib_s?, access.write_bandwidth_mib_s?);
        Some(Performance { latency_ns: access.latency_ns()?, bandwidth_mib_s: u64::midpoint(read, write) })
    };
    match (performance(home), performance(node)) {
        (Some(dram), Some(own)) => own.abstract_distance(&dram),
        _ => DRAM * u64::from(home.distances.get(&node.id).copied().unwrap_or(10)) / 10,
    }
}

/// The nodes and the grants: where the wall is asked.
pub struct Wicket {
    registry: Registry,
    grants: Vec<(NodeId, Grant)>,
}

impl Wicket {
    /// Registers the nodes and makes the grants.
    ///
    /// # Errors
    /// The wall in core refuses one.
    pub fn new(targets: &Targets) -> anyhow::Result<Self> {
        let mut registry = Registry::new();
        let mut grants = Vec::new();
        let rights =
            Rights::ALLOC | Rights::MAP_READ | Rights::MAP_WRITE | Rights::DEMOTE_TO | Rights::MIGRATE_FROM;
        for target in &targets.0 {
            let refused = |error: &dyn std::fmt::Display| anyhow::anyhow!("node {}: {error}", target.id);
            let owner =
                registry.register(target.node, target.spec.clone()).map_err(|error| refused(&error))?.owner;
            // In whole allotments, the last one for what is left.
            let quota = Bytes(target.quota.0.next_multiple_of(ALLOTMENT.0));
            let grant = registry.grant(&[&owner], Terms::new(rights, quota)).map_err(|error| refused(&error))?;
            grants.push((target.node, grant));
        }
        Ok(Self { registry, grants })
    }

    /// Admits and charges so much more of a node.
    ///
    /// # Errors
    /// `EDQUOT` when the grant does not reach so far, `EACCES` when the wall refuses.
    pub fn charge(&mut self, target: usize, bytes: Bytes) -> Result<Charge> {
        let (node, grant) = self.grants.get(target).ok_or(Errno::EINVAL)?;
        let shown = [grant];
        let refused = Errno(libc::EACCES);
        self.registry.admit(&Request::on(DomainId::ROOT, *node, &shown)).map_err(|_| refused)?;
        self.registry.check(*node, Rights::ALLOC | Rights::DEMOTE_TO, &shown).map_err(|_| refused)?;
        self.registry.charge(grant, bytes).map_err(|_| Errno(libc::EDQUOT))
    }

    /// Gives back what was charged.
    pub fn uncharge(&mut self, charge: Charge) {
        self.registry.uncharge(charge).expect("it is this registry's");
    }
}

#[cfg(test)]
impl Targets {
    /// One of the kernel's nodes, for tests.
    pub fn one_mapped(id: u16, quota: Bytes) -> Self {
        let spec = NodeSpec {
            node_type: NodeType::Spm,
            class: Class::Slower,
            services: services(false),
            guard: Guard::Hard,
            owner: "porter".into(),
        };
        Self(vec![Target { id, node: NodeId::new(id).unwrap(), spec, quota, way: Way::Placed }])
    }
}

#[cfg(test)]
impl Wicket {
    /// What is charged of a node.
    pub fn used(&self, target: usize) -> Bytes {
        self.registry.grant_info(&self.grants[target].1).unwrap().used
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spmem_core::class::{Reason, Verdict};

    fn file(id: u16, class: Class) -> FileNode {
        FileNode { id, path: format!("/mnt/{id}").into(), bytes: 5 << 20, class, is_fenced: false }
    }

    #[test]
    fn files_come_in_the_order_of_their_classes_and_hold_whole_clusters() {
        let files = [file(2, Class::Shared), file(3, Class::Plain), file(9, Class::Slow), file(4, Class::Slower)];
        let config = Config { files: files.to_vec(), ..Config::default() };
        let targets = Targets::plan(&config).unwrap();
        let ids: Vec<_> = targets.0.iter().map(|target| target.id).collect();
        assert_eq!(ids, [3, 4, 2, 9], "those of one tier in the order of the configuration");
        assert!(targets.0.iter().all(|target| target.quota == Bytes(4 << 20)) && !targets.has_mapped());
        let control = super::super::ControlPage::for_tree(None, 0).unwrap();
        targets.publish(&control, &config).unwrap();
        let told: Vec<_> = control.targets().map(|target| (target.id.load(Relaxed), target.is_swap())).collect();
        assert_eq!(told, [(3, true), (4, true), (2, true), (9, true)]);
    }

    fn device(name: &str, mode: DaxMode) -> Dax {
        Dax {
            name: name.into(),
            bytes: 3 << 30,
            align_bytes: Some(2 << 30),
            target_node: Some(2),
            numa_node: None,
            mode,
            driver: None,
            parent: None,
            is_persistent: false,
            class: Verdict { class: Class::Slow, reason: Reason::Unremarkable },
        }
    }

    #[test]
    fn a_device_is_mapped_in_its_own_units_and_one_that_is_not_the_runs_to_use_is_refused() {
        let node = |id: u16, capacity, class| DaxNode { id, path: "/dev/dax0.0".into(), capacity, class };
        let mut order = Order::default();
        let devdax = device("dax0.0", DaxMode::Devdax);
        order.add_device(&node(2, Capacity::Auto, Some(Class::Slower)), &devdax).unwrap();
        let small = node(3, Capacity::Bytes(5 << 20), Some(Class::Slow));
        order.add_device(&small, &device("dax0.1", DaxMode::Devdax)).unwrap();
        for (class, device, what) in [
            (None, devdax, "another node"),
            (None, device("dax1.0", DaxMode::SystemRam), "--mode=devdax dax1.0"),
            (None, device("dax1.0", DaxMode::Disabled), "no driver"),
            (Some(Class::Featured), device("dax1.0", DaxMode::Devdax), "class 4"),
        ] {
            let error = order.add_device(&node(4, Capacity::Auto, class), &device).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        let targets = order.settle().unwrap();
        let control = super::super::ControlPage::for_tree(None, 0).unwrap();
        targets.publish(&control, &Config::default()).unwrap();
        let told: Vec<_> = control
            .targets()
            .map(|target| (target.id.load(Relaxed), target.clusters.load(Relaxed), target.align.load(Relaxed)))
            .collect();
        assert_eq!(told, [(2, 1024, 2 << 30), (3, 2, 2 << 30)]);
    }

    #[test]
    fn what_is_no_dax_device_is_refused_with_its_path() {
        for (path, what) in
            [("/dev/null", "no dax device"), ("/dev/dax77.7", "no such device"), ("/tmp", "no dax")]
        {
            let dax = vec![DaxNode { id: 2, path: path.into(), capacity: Capacity::Auto, class: None }];
            let error = format!("{:#}", Targets::plan(&Config { dax, ..Config::default() }).unwrap_err());
            assert!(error.contains(what) && error.contains(path), "{error}");
        }
    }

    #[test]
    fn more_nodes_than_a_run_uses_are_refused() {
        let files = (2..7).map(|id| file(id, Class::Slow)).collect();
        let config = Config { files, ..Config::default() };
        assert!(Targets::plan(&config).unwrap_err().to_string().contains("at most 4 nodes"));
    }

    #[test]
    fn a_quota_is_charged_once() {
        let files = vec![file(2, Class::Slow)];
        let targets = Targets::plan(&Config { files, ..Config::default() }).unwrap();
        let mut wicket = Wicket::new(&targets).unwrap();
        let _charge = wicket.charge(0, Bytes(4 << 20)).unwrap();
        assert_eq!(wicket.charge(0, Bytes(1)), Err(Errno(libc::EDQUOT)));
        assert_eq!(wicket.used(0), Bytes(4 << 20));
    }
}
