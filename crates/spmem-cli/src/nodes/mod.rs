//! `spm nodes`: the nodes of a configuration, as the memory manager registers them.
//!
//! Node 0 is what the kernel gives out, so its numbers are the machine's; node 1 exists anew in every run, so here it
//! is empty. The habits are those of `cxl list`: JSON is an array, sizes are bytes, `-u` is for people.

use std::fmt::Write as _;
use std::io::Write;

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;
use spmem_core::mm::MemoryManager;
use spmem_core::node::NodeType;
use spmem_core::units::NodeId;

use crate::arguments::NodesArguments;
use crate::config::Config;
use crate::machine::{self, Ram};
use crate::size::human;

/// One node, in the shape of its JSON.
#[derive(Clone, Debug, Serialize)]
pub struct NodeLine {
    node: u16,
    r#type: String,
    class: u8,
    services: Vec<String>,
    /// Null for sysram, which has no wall.
    guard: Option<String>,
    owner: String,
    capacity: Value,
    used: Value,
    free: Value,
}

/// Whom sizes are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// Integers.
    Bytes,
    /// `23.5G`.
    Human,
}

/// Prints the nodes on stdout.
///
/// # Errors
/// The configuration is not valid, or stdout does not take it.
pub fn print(options: &NodesArguments) -> anyhow::Result<()> {
    let config = Config::read(options.config.as_deref())?;
    let ram = Ram::read()?;
    let frames = machine::set_up_nodes(&config, ram)?;
    let sizes = if options.human { Sizes::Human } else { Sizes::Bytes };
    let lines = collect(frames.mm(), ram, sizes);
    let text = if options.json {
        serde_json::to_string_pretty(&lines).context("the nodes are no JSON")? + "\n"
    } else {
        table(&lines)
    };
    std::io::stdout().write_all(text.as_bytes()).context("stdout does not take the list")
}

/// The nodes registered with `mm`, lowest first.
pub fn collect(mm: &MemoryManager, ram: Ram, sizes: Sizes) -> Vec<NodeLine> {
    mm.registry().present().iter().filter_map(|node| line(mm, node, ram, sizes)).collect()
}

fn line(mm: &MemoryManager, node: NodeId, ram: Ram, sizes: Sizes) -> Option<NodeLine> {
    let (spec, stats) = (mm.registry().spec(node)?, mm.stats(node)?);
    let [capacity, used, free] = match spec.node_type {
        NodeType::Sysram => [ram.total_bytes, ram.total_bytes - ram.available_bytes, ram.available_bytes],
        NodeType::Spm => [stats.capacity, stats.used, stats.free].map(|count| count.bytes().0),
    };
    let size = |bytes| match sizes {
        Sizes::Bytes => Value::from(bytes),
        Sizes::Human => Value::from(human(bytes)),
    };
    Some(NodeLine {
        node: node.get(),
        r#type: spec.node_type.to_string(),
        class: spec.class.number(),
        services: spec.services.iter_names().map(|(name, _)| name.to_lowercase()).collect(),
        guard: (spec.node_type == NodeType::Spm).then(|| spec.guard.to_string()),
        owner: spec.owner.clone().into_owned(),
        capacity: size(capacity),
        used: size(used),
        free: size(free),
    })
}

/// The table, header first.
pub fn table(lines: &[NodeLine]) -> String {
    let mut text = String::new();
    let size = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut row = |cells: [&str; 9]| {
        let [node, kind, class, guard, owner, capacity, used, free, services] = cells;
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{node:>4}  {kind:<6}  {class:>5}  {guard:<5}  {owner:<6}  {capacity:>12}  {used:>12}  {free:>12}  {services}"
        );
    };
    row(["node", "type", "class", "guard", "owner", "capacity", "used", "free", "services"]);
    for line in lines {
        row([
            &line.node.to_string(),
            &line.r#type,
            &line.class.to_string(),
            line.guard.as_deref().unwrap_or("-"),
            &line.owner,
            &size(&line.capacity),
            &size(&line.used),
            &size(&line.free),
            &line.services.join(","),
        ]);
    }
    text
}
