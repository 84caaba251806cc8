//! The nodes that a run's cold pages go to, besides the compressed one: which, in what order, and by what grant.
//!
//! [`Targets::plan`] holds the configuration against this machine: the kernel's nodes, which pages are placed on (`porter`), and files, which they are
//! copied to (`swap`). The order is that of core's tiers; of a file its class says where it stands. [`Wicket`] is where the wall is asked:
//! it has the nodes and, for each, a grant with the run's quota (R6, R12).

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, bail, ensure};
use spmem::control::Control;
use spmem_core::distance::Distances;
use spmem_core::grant::{Charge, Grant, Rights, Terms};
use spmem_core::node::{Guard, NodeSpec, NodeType, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::placing::{ALLOTMENT, MAX_TARGETS};
use spmem_core::registry::Registry;
use spmem_core::tier::{self, DRAM, Performance, Tiers};
use spmem_core::units::{Bytes, DomainId, MAX_NODES, NodeId};
use spmem_core::wall::Request;
use spmem_node::machine::{Machine, Node};
use spmem_node::swapfile::CLUSTER_BYTES;
use spmem_sys::{Errno, Result};

use crate::config::{Capacity, Config, FileNode, NumaNode};
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
    /// The kernel's number; of a file one that no node of the run has.
    pub node: NodeId,
    spec: NodeSpec,
    /// What the run may have there.
    pub quota: Bytes,
    /// Of a file: the path that the configuration gives it.
    pub path: Option<PathBuf>,
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
        let count = config.numa.len() + config.files.len();
        ensure!(count <= MAX_TARGETS, "a run uses at most {MAX_TARGETS} nodes of the kinds \"numa\" and \"file\"");
        let mut order = Order::default();
        if !config.numa.is_empty() {
            let machine = Machine::read(Path::new("/"), &config.classes);
            order.add_numa(&machine, &config.numa, &kernel_nodes(config)?.sysram, &reachable_nodes()?)?;
        }
        order.add_files(&config.files)?;
        order.settle()
    }

    /// Whether some are the kernel's.
    pub fn has_mapped(&self) -> bool {
        self.0.iter().any(|target| target.path.is_none())
    }

    /// The files, with their numbers.
    pub fn files(&self) -> impl Iterator<Item = (usize, &Target)> {
        self.0.iter().enumerate().filter(|(_, target)| target.path.is_some())
    }

    /// Tells the agents.
    pub fn publish(&self, control: &Control, config: &Config) -> anyhow::Result<()> {
        for (to, target) in control.targets.iter().zip(&self.0) {
            to.id.store(target.id.into(), Relaxed);
            to.class.store(target.spec.class.number().into(), Relaxed);
            if target.path.is_some() {
                let clusters =
                    u32::try_from(target.quota.0 / CLUSTER_BYTES).context("a node of a run is too large")?;
                to.clusters.store(clusters, Relaxed);
            } else {
                to.is_fenced.store(target.spec.services.contains(Services::WRITE_FENCE).into(), Relaxed);
                to.node.store(target.node.get().into(), Relaxed);
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
                bail!("node {} of the configuration: the kernel has no memory on a node {}", numa.id, numa.node);
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
            self.targets.push(Target { id: numa.id, node: id, spec, quota, path: None });
        }
        Ok(())
    }

    fn add_files(&mut self, wanted: &[FileNode]) -> anyhow::Result<()> {
        // In a tier the lower number comes first.
        for file in wanted.iter().rev() {
            let is_free = |id: &NodeId| {
                *id != NodeId::ZERO
                    && Some(*id) != self.home
                    && self.targets.iter().all(|target| target.node != *id)
            };
            // The numbers of the kernel's nodes begin at the other end.
            let mut ids = (0..MAX_NODES).rev().filter_map(|id| NodeId::new(id).ok());
            let node = ids.find(is_free).context("there are too many nodes")?;
            self.tiers.set(node, tier::assumed_distance(file.class)).context("tiers of nodes")?;
            let spec = NodeSpec {
                node_type: NodeType::Spm,
                class: file.class,
                // Pages are entered and left by copy: nobody could write them there.
                services: services(true),
                guard: Guard::Hard,
                owner: "swap".into(),
            };
            let quota = Bytes(file.bytes / CLUSTER_BYTES * CLUSTER_BYTES);
            self.targets.push(Target { id: file.id, node, spec, quota, path: Some(file.path.clone()) });
        }
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
            class: spmem_core::node::Class::Slower,
            services: services(false),
            guard: Guard::Hard,
            owner: "porter".into(),
        };
        Self(vec![Target { id, node: NodeId::new(id).unwrap(), spec, quota, path: None }])
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
    use spmem_core::node::Class;

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
