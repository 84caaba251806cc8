//! A machine to explain: the one that `spm run` sets up here, this one's own nodes, or one that a TOML file describes.
//!
//! The file has `[[node]]`, `[[distance]]`, `[[domain]]` and `[[grant]]` entries ([`EXAMPLE`] has every key). Keys and values that are not
//! known are errors that name the line; what does not fit together is refused by the memory manager, in its words.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use serde::Deserialize;
use spmem_core::grant::{Grant, Rights, Terms};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::registry::Registry;
use spmem_core::units::{Bytes, DomainId, NodeId};
use spmem_node::compressed::{cram_spec, sysram_spec};
use spmem_node::machine::{Machine as KernelMachine, Node as KernelNode};

use crate::config::{Config, read_description};
use crate::machine::{reachable_nodes, type_of};
use crate::remark::remark;
use crate::run::targets;
use crate::size;

/// A described machine, with every key.
pub const EXAMPLE: &str = include_str!("example.toml");

/// Nodes, domains and named grants.
#[derive(Debug)]
pub struct Machine {
    pub registry: Registry,
    grants: BTreeMap<String, Grant>,
    owners: BTreeMap<NodeId, Owner>,
}

impl Machine {
    /// What `spm run` sets up without a configuration: node 0 and node 1, the root domain, the grant `cram`.
    ///
    /// # Errors
    /// The memory manager refuses; it does not.
    pub fn embedded() -> anyhow::Result<Self> {
        let mut machine = Self { registry: Registry::new(), grants: BTreeMap::new(), owners: BTreeMap::new() };
        machine.register(NodeId::ZERO, sysram_spec())?;
        machine.register(NodeId::ONE, cram_spec())?;
        let rights = Rights::ALLOC | Rights::DEMOTE_TO | Rights::MIGRATE_FROM;
        machine.add_grant("cram", NodeId::ONE.into(), Terms::new(rights, Bytes(u64::MAX)))?;
        Ok(machine)
    }

    /// This machine's own nodes with memory, by the kernel's numbers, and their distances. The root's `mems` is this process's cpuset.
    ///
    /// # Errors
    /// /proc does not tell which nodes this process may use.
    pub fn here(config: &Config, guard: Guard) -> anyhow::Result<Self> {
        let machine = spmem_node::machine::Machine::read(Path::new("/"), &config.classes);
        let mems = reachable_nodes()?;
        let mut here = Self::of_kernel(&machine.nodes, config, guard, mems)?;
        here.add_devices(&machine, mems)?;
        tell_of_devices(&machine, config);
        Ok(here)
    }

    /// Nodes that are there as dax devices only: the page allocator lacks them, so their wall is hard and no cpuset is about them.
    fn add_devices(&mut self, machine: &KernelMachine, mut mems: NodeMask) -> anyhow::Result<()> {
        for id in machine.target_nodes() {
            let devices = machine.dax.iter().filter(|dax| dax.target_node == Some(id));
            let Some(first) = devices.max_by_key(|dax| dax.class.class.number()) else { continue };
            let owner = first.driver.clone().unwrap_or_else(|| "none".to_owned());
            let (class, services) = (first.class.class, Services::empty());
            let spec =
                NodeSpec { node_type: NodeType::Spm, class, services, guard: Guard::Hard, owner: owner.into() };
            let node = NodeId::new(id)?;
            self.register(node, spec)?;
            mems.insert(node);
        }
        self.registry.set_mems(DomainId::ROOT, mems)?;
        Ok(())
    }

    fn of_kernel(nodes: &[KernelNode], config: &Config, guard: Guard, mems: NodeMask) -> anyhow::Result<Self> {
        let mut machine = Self { registry: Registry::new(), grants: BTreeMap::new(), owners: BTreeMap::new() };
        let has_memory = |node: &&KernelNode| node.memory.is_some_and(|memory| memory.total_bytes > 0);
        for node in nodes.iter().filter(has_memory) {
            let (node_type, class) = (type_of(config, node), node.class.class);
            let services = if guard == Guard::Easy { Services::USER_NUMA } else { Services::empty() };
            let spec = NodeSpec { node_type, class, services, guard, owner: "kernel".into() };
            machine.register(NodeId::new(node.id)?, spec)?;
        }
        if machine.registry.present().is_empty() {
            // A kernel without NUMA has node 0.
            machine.register(NodeId::ZERO, sysram_spec())?;
        }
        for node in nodes {
            for (&to, &distance) in &node.distances {
                let [from, to] = [NodeId::new(node.id)?, NodeId::new(to)?];
                let is_known = [from, to].iter().all(|&node| machine.registry.present().contains(node));
                // A firmware that calls a node unreachable, or farther than itself, leaves the order as it would be without.
                let _ = is_known.then(|| machine.registry.set_distance(from, to, distance));
            }
        }
        machine.registry.set_mems(DomainId::ROOT, mems)?;
        Ok(machine)
    }

    /// Reads a description.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, holds a key or value that is not known (the message names the line), or
    /// describes what cannot be.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text =
            read_description(path).with_context(|| format!("the machine {} cannot be read", path.display()))?;
        Self::parse(&text).with_context(|| format!("the machine {} is not valid", path.display()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let file: File = toml::from_str(text)?;
        let mut machine = Self { registry: Registry::new(), grants: BTreeMap::new(), owners: BTreeMap::new() };
        for node in file.node {
            let id = NodeId::new(node.id)?;
            machine.register(id, node.spec()?).with_context(|| format!("[[node]] {id}"))?;
        }
        for distance in &file.distance {
            let Distance { from, to, distance } = *distance;
            let [first, second] = [NodeId::new(from)?, NodeId::new(to)?];
            for node in [first, second] {
                if !machine.registry.present().contains(node) {
                    bail!("[[distance]] {from} to {to}: node {node} is not registered");
                }
            }
            let set = machine.registry.set_distance(first, second, distance);
            set.with_context(|| format!("[[distance]] {from} to {to}"))?;
        }
        for domain in &file.domain {
            machine.add_domain(domain).with_context(|| format!("[[domain]] {}", domain.path))?;
        }
        for grant in &file.grant {
            machine.add_described_grant(grant).with_context(|| format!("[[grant]] {}", grant.name))?;
        }
        Ok(machine)
    }

    fn register(&mut self, id: NodeId, spec: NodeSpec) -> anyhow::Result<()> {
        // Nothing is in use on a machine that is only described, so nothing lies outside.
        let owner = self.registry.register(id, spec)?.owner;
        self.owners.insert(id, owner);
        Ok(())
    }

    /// The domain of the path, made with all above it where it does not exist.
    fn add_domain(&mut self, described: &Domain) -> anyhow::Result<()> {
        let mut at = DomainId::ROOT;
        let mut path = String::new();
        for name in described.path.split('/').filter(|name| !name.is_empty()) {
            path = format!("{path}/{name}");
            at = match self.registry.find_domain(&path) {
                Some(known) => known,
                None => self.registry.create_domain(at, name)?,
            };
        }
        if let Some(text) = &described.mems {
            self.registry.set_mems(at, parse_mask("mems", text, NodeMask::ALL)?)?;
        }
        if let Some(text) = &described.sysram {
            self.registry.set_mems_sysram(at, parse_mask("sysram", text, NodeMask::ALL)?)?;
        }
        Ok(())
    }

    fn add_described_grant(&mut self, described: &GrantEntry) -> anyhow::Result<()> {
        let nodes = parse_mask("nodes", &described.nodes, *self.registry.sysram())?;
        let rights = parse_rights(described.rights.iter().map(String::as_str))?;
        let quota = match &described.quota {
            Some(text) => Bytes(size::parse_bytes(text)?),
            None => Bytes(u64::MAX),
        };
        self.add_grant(&described.name, nodes, Terms::new(rights, quota))
    }

    fn add_grant(&mut self, name: &str, nodes: NodeMask, terms: Terms) -> anyhow::Result<()> {
        let owner = |node| {
            let present = self.registry.present();
            self.owners.get(&node).with_context(|| format!("node {node} is not registered; there are {present}"))
        };
        let owners = nodes.iter().map(owner).collect::<anyhow::Result<Vec<_>>>()?;
        let grant = self.registry.grant(&owners, terms)?;
        if self.grants.insert(name.to_owned(), grant).is_some() {
            bail!("there are two grants of that name");
        }
        Ok(())
    }

    /// Makes the grant that `--grant` asks for, unless it names one: `cram`, or `2-3:alloc,map_read` for what the nodes'
    /// owners might grant.
    ///
    /// # Errors
    /// No such grant; a node or right that there is not.
    pub fn note_grant(&mut self, text: &str) -> anyhow::Result<()> {
        if self.grants.contains_key(text) {
            return Ok(());
        }
        let Some((nodes, rights)) = text.split_once(':') else {
            let known: Vec<&str> = self.grants.keys().map(String::as_str).collect();
            bail!(
                "there is no grant `{text}` (known: {}); NODES:RIGHT,RIGHT makes one, such as 1:alloc",
                known.join(", ")
            );
        };
        let nodes = parse_mask("--grant", nodes, *self.registry.sysram())?;
        let rights = parse_rights(rights.split(','));
        let granted = rights.and_then(|rights| self.add_grant(text, nodes, Terms::new(rights, Bytes(u64::MAX))));
        granted.with_context(|| format!("--grant {text}"))
    }

    /// A grant that is known.
    pub fn grant(&self, name: &str) -> Option<&Grant> {
        self.grants.get(name)
    }
}

/// Says what runs do with the devices that the configuration names: its numbers are not the kernel's.
fn tell_of_devices(machine: &KernelMachine, config: &Config) {
    for node in &config.dax {
        let (id, path) = (node.id, node.path.display());
        let node = match targets::device_of(machine, &node.path).map(|dax| dax.target_node) {
            Ok(Some(node)) => format!("node {node} here"),
            Ok(None) => "no node that the kernel tells".to_owned(),
            Err(error) => {
                remark(format_args!("node {id} of the configuration: {path}: {error:#}"));
                continue;
            }
        };
        remark(format_args!(
            "node {id} of the configuration is the dax device {path}, of {node}: spm run copies cold pages there, by a grant of its own"
        ));
    }
}

/// Reads a node list; `all` stands for `default`.
pub fn parse_mask(what: &str, text: &str, default: NodeMask) -> anyhow::Result<NodeMask> {
    NodeMask::parse(text, default).map_err(|error| anyhow!("{what} = \"{text}\": {error}"))
}

fn parse_rights<'a>(names: impl Iterator<Item = &'a str>) -> anyhow::Result<Rights> {
    let mut rights = Rights::empty();
    for name in names {
        let known = Rights::from_name(&name.to_uppercase());
        rights |= known.with_context(|| {
            let all: Vec<String> = Rights::all().iter_names().map(|(name, _)| name.to_lowercase()).collect();
            format!("there is no right `{name}`; there are {}", all.join(", "))
        })?;
    }
    Ok(rights)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    node: Vec<Node>,
    #[serde(default)]
    distance: Vec<Distance>,
    #[serde(default)]
    domain: Vec<Domain>,
    #[serde(default)]
    grant: Vec<GrantEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Node {
    id: u16,
    r#type: Type,
    class: Option<u8>,
    guard: Option<Hardness>,
    owner: Option<String>,
    #[serde(default)]
    services: Vec<String>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Type {
    Sysram,
    Spm,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Hardness {
    Hard,
    Easy,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Distance {
    from: u16,
    to: u16,
    distance: u8,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Domain {
    path: String,
    mems: Option<String>,
    sysram: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GrantEntry {
    name: String,
    nodes: String,
    rights: Vec<String>,
    quota: Option<String>,
}

impl Node {
    fn spec(self) -> anyhow::Result<NodeSpec> {
        let (node_type, class, guard) = match self.r#type {
            Type::Sysram if self.guard.is_some() => bail!("[[node]] {}: sysram has no wall, so no guard", self.id),
            Type::Sysram => (NodeType::Sysram, Class::Plain, Guard::Easy),
            Type::Spm => (NodeType::Spm, Class::Slower, Guard::Hard),
        };
        let class = match self.class {
            None => class,
            Some(number) => Class::from_number(number)
                .with_context(|| format!("[[node]] {}: there is no class {number}, only 1 to 6", self.id))?,
        };
        let guard = match self.guard {
            None => guard,
            Some(Hardness::Hard) => Guard::Hard,
            Some(Hardness::Easy) => Guard::Easy,
        };
        let mut services = Services::empty();
        for name in &self.services {
            services |= Services::from_name(&name.to_uppercase()).with_context(|| {
                let all: Vec<String> = Services::all().iter_names().map(|(name, _)| name.to_lowercase()).collect();
                format!("[[node]] {}: there is no service `{name}`; there are {}", self.id, all.join(", "))
            })?;
        }
        let owner = self.owner.unwrap_or_else(|| "described".to_owned());
        Ok(NodeSpec { node_type, class, services, guard, owner: owner.into() })
    }
}

#[cfg(test)]
mod tests {
    use spmem_core::class::{Reason as ClassReason, Verdict};
    use spmem_node::machine::Memory;

    use super::*;

    #[test]
    fn the_documented_example_is_a_machine() {
        let machine = Machine::parse(EXAMPLE).unwrap();
        assert!(machine.registry.present().count() > 1 && machine.registry.domains().count() > 1);
        assert!(machine.grant("staging").is_some());
    }

    /// A node of the kernel's, with so much memory of a class, as far from node 0 as said.
    fn kernel_node(id: u16, total_bytes: u64, class: Class, far: u8) -> KernelNode {
        let memory = Memory { total_bytes, free_bytes: 0, available_bytes: 0 };
        KernelNode {
            id,
            cpus: Vec::new(),
            memory: Some(memory),
            distances: BTreeMap::from([(0, far), (id, 10)]),
            access: None,
            any_initiator: None,
            tier: None,
            has_generic_initiator: false,
            caches: Vec::new(),
            class: Verdict { class, reason: ClassReason::Configured },
        }
    }

    #[test]
    fn this_machines_nodes_are_the_kernels_with_their_classes_distances_and_the_cpuset_of_the_asker() {
        let nodes = [
            kernel_node(0, 1 << 30, Class::Plain, 10),
            kernel_node(1, 0, Class::Plain, 20), // processors alone
            kernel_node(2, 1 << 30, Class::Slower, 17),
            kernel_node(5, 1 << 30, Class::Accelerator, 255), // cannot be reached, says the firmware
        ];
        let mems = NodeMask::parse("0,5", NodeMask::EMPTY).unwrap();
        for guard in [Guard::Hard, Guard::Easy] {
            let Machine { registry, .. } = Machine::of_kernel(&nodes, &Config::default(), guard, mems).unwrap();
            assert_eq!(registry.present().to_string(), "0,2,5");
            let number = |node| NodeId::new(node).unwrap();
            assert_eq!(registry.spm(), &number(5).into(), "by its class, as spm wall has it");
            assert_eq!(registry.easy().contains(number(5)), guard == Guard::Easy);
            assert_eq!(registry.effective(DomainId::ROOT), Some(&mems));
            let far = |node| registry.distances().get(number(node), NodeId::ZERO);
            assert_eq!((far(2), far(5)), (17, 20));
        }
        let mut config = Config::default();
        config.types.insert("node2".to_owned(), NodeType::Spm);
        let machine = Machine::of_kernel(&nodes, &config, Guard::Hard, NodeMask::ALL).unwrap();
        assert_eq!(machine.registry.spm().to_string(), "2,5");
        let none = Machine::of_kernel(&[], &config, Guard::Hard, NodeMask::ALL).unwrap();
        assert_eq!(none.registry.sysram(), &NodeId::ZERO.into());
    }

    #[test]
    fn what_cannot_be_is_refused_in_words() {
        for (text, parts) in [
            ("[[node]]\nid = 0\ntype = \"ram\"\n", ["line 3", "ram"]),
            ("[[node]]\nid = 0\ntype = \"spm\"\ncolour = 1\n", ["line 4", "colour"]),
            ("[[node]]\nid = 0\ntype = \"sysram\"\nguard = \"hard\"\n", ["[[node]] 0", "no guard"]),
            ("[[node]]\nid = 1024\ntype = \"sysram\"\n", ["1024", "1023"]),
            ("[[node]]\nid = 0\ntype = \"spm\"\nclass = 7\n", ["[[node]] 0", "class 7"]),
            ("[[node]]\nid = 0\ntype = \"spm\"\nservices = [\"demotion\"]\n", ["[[node]] 0", "DEMOTION"]),
            ("[[node]]\nid = 0\ntype = \"spm\"\nguard = \"easy\"\n", ["[[node]] 0", "USER_NUMA"]),
            ("[[node]]\nid = 0\ntype = \"spm\"\nservices = [\"fly\"]\n", ["[[node]] 0", "`fly`"]),
            ("[[node]]\nid = 0\ntype = \"spm\"\n[[node]]\nid = 0\ntype = \"sysram\"\n", ["[[node]] 0", "both"]),
            ("[[distance]]\nfrom = 0\nto = 1\ndistance = 20\n", ["[[distance]] 0 to 1", "node 0"]),
            (
                "[[node]]\nid = 0\ntype = \"spm\"\n[[distance]]\nfrom = 0\nto = 0\ndistance = 11\n",
                ["[[distance]] 0 to 0", "only 10"],
            ),
            ("[[domain]]\npath = \"/a/../b\"\n", ["[[domain]] /a/../b", "'..'"]),
            ("[[domain]]\npath = \"/a\"\nmems = \"0-\"\n", ["[[domain]] /a", "byte 2"]),
            ("[[grant]]\nname = \"g\"\nnodes = \"1\"\nrights = [\"alloc\"]\n", ["[[grant]] g", "node 1"]),
        ] {
            let reason = format!("{:#}", Machine::parse(text).unwrap_err());
            assert!(parts.iter().all(|part| reason.contains(part)), "{text}: {reason}");
        }
    }
}
