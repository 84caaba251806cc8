//! In a guest of `cargo xtask vm`: what [`spmem_node::machine`] and `spm nodes` make of /sys, held against the topology's
//! file. Called by [`vm_facts`](super::vm_facts), with whose facts these are counted.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use spmem_node::machine::{DaxMode, Machine, Overrides};

use super::vm_facts::Facts;
use crate::vm::topology::{Mode, Topology};

/// What the library finds.
pub(super) fn check(facts: &mut Facts, topology: &Topology, mode: &Mode) {
    let machine = Machine::read(Path::new("/"), &Overrides::new());
    let remarks: Vec<String> = machine.remarks.iter().map(ToString::to_string).collect();
    facts.equal("discovery: remarks", remarks, Vec::new());
    check_nodes(facts, &machine, topology, mode);
    check_devices(facts, &machine, topology, mode);
}

fn check_nodes(facts: &mut Facts, machine: &Machine, topology: &Topology, mode: &Mode) {
    let with_memory = machine.nodes.iter().filter(|node| node.memory.is_some());
    let promised: Vec<u32> = mode.nodes.iter().map(|node| node.id).collect();
    facts.equal("discovery: nodes with memory", with_memory.map(|node| u32::from(node.id)).collect(), promised);
    for promised in &mode.nodes {
        let Some(node) = machine.nodes.iter().find(|node| u32::from(node.id) == promised.id) else { continue };
        let what = |name: &str| format!("discovery: node {}, {name}", promised.id);
        facts.size(&what("memory"), node.memory.map_or(0, |memory| memory.total_bytes), promised.mib);
        if !mode.is_any_cpus {
            facts.equal(&what("processors"), node.cpus.len(), promised.cpus);
        }
        facts.equal(&what("class"), node.class.class.number(), promised.class);
        for (&to, &distance) in &node.distances {
            if let Some(known) = topology.distance(promised.id, to.into()) {
                facts.equal(&what(&format!("distance to node {to}")), distance, known);
            }
        }
        let column = promised.id as usize;
        let latency = topology.access.iter().filter_map(|row| row.latency_ns.get(column)).min();
        let gib = topology.access.iter().filter_map(|row| row.bandwidth_gib.get(column)).max();
        let access = node.access.as_ref();
        let seen = access.map(|access| [access.read_latency_ns, access.write_latency_ns]);
        facts.equal(&what("latencies, ns"), seen, latency.map(|&ns| [Some(ns.into()); 2]));
        let seen = access.map(|access| [access.read_bandwidth_mib_s, access.write_bandwidth_mib_s]);
        facts.equal(&what("bandwidths, MiB/s"), seen, gib.map(|&gib| [Some(u64::from(gib) * 1024); 2]));
        let from = topology.access.iter().filter(|row| row.latency_ns.get(column) == latency).map(|row| row.from);
        if latency.is_some() {
            let seen = access.map(|access| access.initiators.iter().map(|&id| u32::from(id)).collect::<Vec<_>>());
            facts.equal(&what("best initiators"), seen, Some(from.collect()));
        }
        facts.note(node.tier.is_some(), what(&format!("tier {:?}", node.tier)));
    }
}

fn check_devices(facts: &mut Facts, machine: &Machine, topology: &Topology, mode: &Mode) {
    let names = |names: Vec<&String>| names.into_iter().cloned().collect::<BTreeSet<String>>();
    let seen = names(machine.dax.iter().map(|dax| &dax.name).collect());
    facts.equal("discovery: dax devices", seen, names(mode.dax.iter().map(|dax| &dax.name).collect()));
    for promised in &mode.dax {
        let Some(dax) = machine.dax.iter().find(|dax| dax.name == promised.name) else { continue };
        let what = |name: &str| format!("discovery: {}, {name}", promised.name);
        facts.size(&what("size"), dax.bytes, promised.mib);
        if let Some(node) = promised.node {
            facts.equal(&what("target node"), dax.target_node.map(u32::from), Some(node));
        }
        facts.equal(&what("align"), dax.align_bytes, Some(promised.align_mib << 20));
        let is_online = promised.driver == "kmem";
        facts.equal(&what("mode"), dax.mode, if is_online { DaxMode::SystemRam } else { DaxMode::Devdax });
        facts.equal(&what("class"), dax.class.class.number(), promised.class);
    }
    let disks = names(machine.namespaces.iter().filter_map(|one| one.blockdev.as_ref()).collect());
    facts.equal("discovery: pmem devices", disks, names(mode.pmem.iter().map(|pmem| &pmem.name).collect()));
    for one in &machine.namespaces {
        facts.equal(&format!("discovery: {}, class", one.name), one.class.class.number(), 6);
    }
    let memdevs = machine.memdevs.iter().map(|one| &one.memdev);
    let cxl = names(memdevs.chain(machine.regions.iter().map(|one| &one.region)).collect());
    facts.equal("discovery: CXL devices", cxl, names(mode.cxl.iter().collect()));
    for region in &machine.regions {
        facts.equal(
            &format!("discovery: devices of {}", region.region),
            &region.memdevs[..],
            &["mem0".to_owned()][..],
        );
        let dax = mode.dax.iter().find_map(|dax| dax.node);
        if let Some(node) = dax {
            facts.equal(
                &format!("discovery: node of {}", region.region),
                region.target_node.map(u32::from),
                Some(node),
            );
        }
    }
    let reserved: u64 = machine.soft_reserved.iter().map(|range| range.size).sum();
    facts.equal("discovery: soft-reserved MiB", reserved >> 20, topology.soft_reserved_mib);
    let in_use = machine.soft_reserved.iter().all(|range| range.used_by == ["dax0.0"]);
    facts.note(in_use, "discovery: what is soft-reserved is dax0.0".to_owned());
}

/// What `spm nodes` prints of it, and that it measures where the mode asks for it.
///
/// # Errors
/// `spm` cannot be run.
pub(super) fn check_spm(facts: &mut Facts, spm: &Path, topology: &Topology, mode: &Mode) -> anyhow::Result<()> {
    let picture = std::env::temp_dir().join("nodes.svg");
    let mut command = Command::new(spm);
    command.args(["nodes", "--json", "--svg"]).arg(&picture);
    if mode.is_measured {
        command.arg("--measure");
    }
    let output = command.output()?;
    let remarks = String::from_utf8_lossy(&output.stderr).into_owned();
    facts.equal("spm nodes: status", output.status.code(), Some(0));
    let listed: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let all: Vec<&Value> = listed.as_array().into_iter().flatten().collect();
    let of_origin = |origin: &'static str| all.iter().copied().filter(move |node| node["origin"] == origin);
    let ids =
        |origin: &'static str| of_origin(origin).filter_map(|node| node["node"].as_u64()).collect::<Vec<_>>();
    let promised: Vec<u64> = mode.nodes.iter().map(|node| node.id.into()).collect();
    let online: Vec<u64> = of_origin("kernel")
        .filter(|node| node["capacity"] != 0)
        .filter_map(|node| node["node"].as_u64())
        .collect();
    facts.equal("spm nodes: nodes of the kernel with memory", online, promised.clone());
    let elsewhere = mode.dax.iter().filter(|dax| dax.driver != "kmem").filter_map(|dax| dax.node);
    let devices: BTreeSet<u64> = elsewhere.map(u64::from).filter(|node| !promised.contains(node)).collect();
    for node in devices {
        let line = of_origin("device").find(|line| line["node"] == node);
        let seen = line.map(|line| (line["type"].clone(), line["guard"].clone(), line["owner"].clone()));
        let walled = ("spm".into(), "hard".into(), "device_dax".into());
        facts.equal(&format!("spm nodes: node {node} of a device"), seen, Some(walled));
        check_explained(facts, spm, node)?;
    }
    for dax in mode.dax.iter().filter(|dax| dax.driver != "kmem") {
        check_configured(facts, spm, &dax.name, dax.mib)?;
    }
    facts.equal("spm nodes: its own", ids("spmem"), vec![1]);
    let drawn = std::fs::read_to_string(&picture).unwrap_or_default();
    let missing: Vec<u64> =
        promised.iter().copied().filter(|id| !drawn.contains(&format!("node {id}\n"))).collect();
    facts.equal("spm nodes: nodes that the picture lacks", missing, Vec::new());
    if mode.is_measured {
        for node in of_origin("kernel") {
            check_measured(facts, topology, node);
        }
        facts.note(remarks.contains("the firmware says"), format!("spm nodes: disagreements are said: {remarks}"));
    }
    Ok(())
}

/// What `spm explain --here` says of a node that is there as a device only.
fn check_explained(facts: &mut Facts, spm: &Path, node: u64) -> anyhow::Result<()> {
    let number = node.to_string();
    let output = Command::new(spm).args(["explain", "--here", "--json", "--nodes", &number]).output()?;
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let seen = &answer["nodes"][0];
    let is_walled = seen["type"] == "spm" && seen["obstacle"] == "needs-grant" && seen["node"] == node;
    facts.note(output.status.code() == Some(1) && is_walled, format!("spm explain --here, node {node}: {answer}"));
    Ok(())
}

/// A `[[node]]` of kind "dax" is listed with the size of its device, and explained.
fn check_configured(facts: &mut Facts, spm: &Path, name: &str, mib: u64) -> anyhow::Result<()> {
    let config = std::env::temp_dir().join("dax-nodes.toml");
    let node = format!("[[node]]\nid = 9\nkind = \"dax\"\npath = \"/dev/{name}\"\noverwrite = true\n");
    std::fs::write(&config, node)?;
    let output = Command::new(spm).args(["nodes", "--json", "--config"]).arg(&config).output()?;
    let listed: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let mut lines = listed.as_array().into_iter().flatten();
    let line = lines.find(|line| line["node"] == 9 && line["origin"] == "spmem").cloned().unwrap_or_default();
    facts.size(&format!("spm nodes: {name} as node 9"), line["capacity"].as_u64().unwrap_or(0), mib);
    facts.equal(&format!("spm nodes: {name} as node 9, owner"), line["owner"].as_str(), Some("dax"));
    let output = Command::new(spm).args(["explain", "--here", "--config"]).arg(&config).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let is_said = said.contains(&format!("node 9 of the configuration is the dax device /dev/{name}"));
    facts.note(is_said, format!("spm explain --here, node 9: {}", said.trim()));
    Ok(())
}

/// An emulator's memory is all as fast as the next: firmware that tells otherwise is found out.
fn check_measured(facts: &mut Facts, topology: &Topology, node: &Value) {
    let (id, measured) = (node["node"].as_u64().unwrap_or_default(), &node["measured"]);
    let figures = ["idle_latency_ns", "read_bandwidth_mib_s", "write_bandwidth_mib_s"];
    let has_all = figures.iter().all(|key| measured[key].as_u64() > Some(0));
    facts.note(has_all, format!("spm nodes: node {id} is measured: {measured}"));
    let column = usize::try_from(id).unwrap_or_default();
    let told = topology.access.iter().filter_map(|row| row.latency_ns.get(column)).min();
    let (Some(&told), Some(seen)) = (told, measured["idle_latency_ns"].as_u64()) else { return };
    let is_apart = seen * 2 > u64::from(told) * 3 || u64::from(told) * 2 > seen * 3;
    let said = measured["disagreements"].as_array().into_iter().flatten();
    let is_said = said.filter_map(Value::as_str).any(|text| text.starts_with("read latency"));
    facts.equal(&format!("spm nodes: node {id}, {told} ns told and {seen} measured, is said"), is_said, is_apart);
}
