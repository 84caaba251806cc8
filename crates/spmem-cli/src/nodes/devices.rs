//! Nodes of kind "dax" of the configuration: what a run would have of each.

use spmem_core::node::NodeType;
use spmem_node::machine::Machine;

use super::list::{NodeLine, Origin, service_names};
use crate::config::DaxNode;
use crate::remark::remark;
use crate::run::targets::{self, Target};

/// The node's line; of one that a run would refuse its size is not known, and a remark says why.
pub fn line(machine: &Machine, node: &DaxNode) -> NodeLine {
    let path = node.path.display();
    let planned = targets::of_device(machine, node);
    let target = planned.inspect_err(|error| remark(format_args!("node {}: {path}: {error:#}", node.id))).ok();
    let spec = target.as_ref().map(|target| &target.spec);
    NodeLine {
        id: node.id,
        origin: Origin::Spmem,
        node_type: NodeType::Spm,
        class: spec.map(|spec| spec.class).or(node.class).unwrap_or(spmem_core::node::Class::Slower),
        reason: "configured".to_owned(),
        services: spec.map(service_names).unwrap_or_default(),
        guard: Some("hard".to_owned()),
        owner: "dax".to_owned(),
        capacity: target.as_ref().map(|Target { quota, .. }| quota.0),
        // Runs keep count of it themselves, each for the time that it has the device.
        used: None,
        free: None,
        devices: vec![path.to_string()],
        measured: None,
    }
}
