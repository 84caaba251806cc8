//! `spm nodes`: the machine's nodes as the kernel has them, what special memory there is besides, and spmem's own nodes.
//!
//! The straight line: [`Machine::read`] (sysfs) -> [`list`] (nodes of the kernel, of devices, of spmem) -> with
//! `--measure`, [`measure`] -> [`table`], [`json`] or [`svg`]. What was odd goes to stderr and costs no exit status. The habits
//! are those of `cxl list`: JSON is an array of objects, sizes are bytes, `-u` is for people.

mod devices;
mod files;
mod json;
mod list;
mod measure;
mod svg;
mod table;

use std::path::Path;

use anyhow::Context;
use spmem_core::mm::MemoryManager;
use spmem_core::node::NodeType;
use spmem_node::machine::Machine;

use crate::arguments::NodesArguments;
use crate::config::Config;
use crate::heat;
use crate::machine::{self, Ram};
use crate::remark::remark;
use crate::run::stdio::write_out;
use list::{Listing, Origin};

pub use list::NodeLine;

/// Whom sizes are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// Integers.
    Bytes,
    /// `23.5G`.
    Human,
}

/// Prints the nodes on stdout; the picture goes to its file.
///
/// # Errors
/// The configuration is not valid, the picture cannot be written, or stdout does not take the list.
pub fn print(options: &NodesArguments) -> anyhow::Result<()> {
    let config = Config::read(options.config.as_deref())?;
    let ram = Ram::read()?;
    let frames = machine::set_up_nodes(&config, ram)?;
    let machine = Machine::read(Path::new("/"), &config.classes);
    tell_what_was_odd(&machine);
    machine::tell_absent_types(&config, &machine::kernel_nodes(&config)?);
    let mut listing = Listing::new(machine, &config, frames.mm(), ram);
    if options.create {
        files::create(&config.files)?;
    }
    let devices: Vec<NodeLine> = config.dax.iter().map(|node| devices::line(&listing.machine, node)).collect();
    listing.lines.extend(config.files.iter().map(files::line).chain(devices));
    if options.measure {
        measure::measure(&mut listing);
    }
    if let Some(file) = &options.svg {
        let picture = svg::draw(&listing);
        std::fs::write(file, picture)
            .with_context(|| format!("the picture {} cannot be written", file.display()))?;
    }
    if options.verbose {
        listing.heat = heat::lines(config.run.heat);
        if let Err(reason) = heat::check(config.run.heat) {
            remark(format_args!("{reason:#}"));
        }
    }
    if !options.json && config.files.is_empty() {
        tell_what_lacks(&listing);
    }
    let sizes = if options.human { Sizes::Human } else { Sizes::Bytes };
    let text = if options.json {
        serde_json::to_string_pretty(&json::array(&listing, sizes)).context("the nodes are no JSON")? + "\n"
    } else {
        table::all(&listing, sizes, options.verbose)
    };
    write_out(&text).context("stdout does not take the list")
}

/// The nodes registered with `mm`, lowest first, as the table of `spm nodes` has them.
pub fn registered_table(mm: &MemoryManager, ram: Ram, sizes: Sizes) -> String {
    table::nodes(&list::registered(mm, ram), sizes)
}

/// What a machine of plain RAM is without, and what stands in for it.
fn tell_what_lacks(listing: &Listing) {
    let machine = &listing.machine;
    let has_devices =
        !machine.memdevs.is_empty() || !machine.regions.is_empty() || !machine.soft_reserved.is_empty();
    let is_plain = |line: &NodeLine| line.origin == Origin::Kernel && line.node_type == NodeType::Sysram;
    let others = listing.lines.iter().filter(|line| line.origin != Origin::Spmem && !is_plain(line)).count();
    let nodes = listing.lines.iter().filter(|line| is_plain(line)).count();
    if nodes <= 1 && others == 0 && !has_devices && machine.namespaces.is_empty() && machine.dax.is_empty() {
        remark(format_args!(
            "this machine lacks special memory: it has one node of RAM, no CXL, dax or pmem device; node 1 is RAM that spmem \
             compresses, and [[node]] of kind \"file\" in a configuration stands in for other classes"
        ));
    }
}

fn tell_what_was_odd(machine: &Machine) {
    for odd in &machine.remarks {
        remark(format_args!("{odd}; left out"));
    }
    for name in &machine.unknown {
        remark(format_args!("the configuration gives {name} a class, but there is no such node or device"));
    }
}
