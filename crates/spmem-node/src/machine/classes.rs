//! What each node and device is taken for: gathers what is known of it for [`spmem_core::class::classify`].

use std::format;
use std::string::String;
use std::vec::Vec;

use spmem_core::class::{Evidence, Nature, classify};
use spmem_core::node::Class;

use super::{Access, Dax, DaxMode, Machine, Node, Overrides};

pub(super) fn set(machine: &mut Machine, overrides: &Overrides) {
    let nodes: Vec<_> = machine.nodes.iter().map(|node| of_node(machine, node, overrides)).collect();
    let dax: Vec<_> = machine.dax.iter().map(|dax| of_dax(machine, dax, overrides)).collect();
    for (node, known) in machine.nodes.iter_mut().zip(nodes) {
        node.class = classify(&known);
    }
    for (dax, known) in machine.dax.iter_mut().zip(dax) {
        dax.class = classify(&known);
    }
    for namespace in &mut machine.namespaces {
        let configured = overrides.get(&namespace.name).copied();
        namespace.class =
            classify(&Evidence { configured, nature: Some(Nature::Persistent), ..Evidence::default() });
    }
    machine.unknown = unknown(machine, overrides);
}

fn of_node(machine: &Machine, node: &Node, overrides: &Overrides) -> Evidence {
    let is_its = |dax: &&Dax| dax.mode == DaxMode::SystemRam && dax.target_node == Some(node.id);
    let brought: Vec<&Dax> = machine.dax.iter().filter(is_its).collect();
    let has_cpus = !node.cpus.is_empty();
    let nature = if has_cpus {
        None
    } else if node.has_generic_initiator && node.memory.is_some() {
        Some(Nature::Accelerator)
    } else if brought.iter().any(|dax| dax.is_persistent) {
        Some(Nature::Persistent)
    } else {
        None
    };
    let own = node.access.as_ref().and_then(Access::latency_ns);
    let with_cpus = machine.nodes.iter().filter(|other| !other.cpus.is_empty());
    Evidence {
        configured: configured_node(overrides, node.id),
        nature,
        latency_ns: own.or_else(|| brought.iter().find_map(|dax| region_latency(machine, dax))),
        has_cpus,
        tier: node.tier,
        distance: with_cpus.filter_map(|other| other.distances.get(&node.id).copied()).min(),
        is_cxl: brought.iter().any(|dax| is_cxl(machine, dax)),
    }
}

fn of_dax(machine: &Machine, dax: &Dax, overrides: &Overrides) -> Evidence {
    // Its node is online with other memory of the same place, or with this.
    let node = dax.target_node.and_then(|id| machine.node(id));
    // What is said of a node is said of all that would be that node; one that is online may have memory of its own.
    let of_node = dax.target_node.filter(|_| node.is_none() || dax.mode == DaxMode::SystemRam);
    let configured = overrides.get(&dax.name).copied();
    Evidence {
        configured: configured.or_else(|| configured_node(overrides, of_node?)),
        nature: dax.is_persistent.then_some(Nature::Persistent),
        latency_ns: region_latency(machine, dax)
            .or_else(|| node.and_then(|node| node.access.as_ref()).and_then(Access::latency_ns)),
        has_cpus: false,
        tier: node.filter(|_| dax.mode == DaxMode::SystemRam).and_then(|node| node.tier),
        distance: None,
        is_cxl: is_cxl(machine, dax),
    }
}

fn configured_node(overrides: &Overrides, id: u16) -> Option<Class> {
    overrides.get(&format!("node{id}")).copied()
}

fn is_cxl(machine: &Machine, dax: &Dax) -> bool {
    machine.regions.iter().any(|region| dax.parent.as_deref() == Some(region.region.as_str()))
}

fn region_latency(machine: &Machine, dax: &Dax) -> Option<u64> {
    let region = machine.regions.iter().find(|region| dax.parent.as_deref() == Some(region.region.as_str()))?;
    region.access.as_ref()?.latency_ns()
}

fn unknown(machine: &Machine, overrides: &Overrides) -> Vec<String> {
    let is_known = |name: &str| {
        let node = name.strip_prefix("node").and_then(|id| id.parse::<u16>().ok());
        node.is_some_and(|id| machine.node(id).is_some() || machine.target_nodes().contains(&id))
            || machine.dax.iter().any(|dax| dax.name == name)
            || machine.namespaces.iter().any(|namespace| namespace.name == name)
    };
    overrides.keys().filter(|name| !is_known(name)).cloned().collect()
}
