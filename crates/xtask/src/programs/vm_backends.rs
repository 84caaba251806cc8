//! In a guest of `cargo xtask vm`: the conformance suite of `spmem-node` on every byte-addressable kind of node that the
//! topology's mode has: each NUMA node with memory, each dax device, each file system that is mounted with dax.
//!
//! A claim that does not hold ends the program; the last line names it.

use std::cell::Cell;
use std::fs::{self, OpenOptions};
use std::os::fd::IntoRawFd;
use std::path::Path;

use anyhow::{Context, ensure};
use spmem_node::machine::{DaxMode, Machine, Overrides};
use spmem_node::{dax, file, numa};
use spmem_sys::fd::Fd;
use spmem_sys::region::{Access, Durability, Region};

use self::suite::Kind;
use crate::vm::topology::Topology;

#[allow(dead_code, clippy::unwrap_used, reason = "a suite of tests: it ends where something fails")]
#[path = "../../../spmem-node/tests/conformance/backend.rs"]
pub(super) mod backend;
#[allow(dead_code, clippy::unwrap_used, reason = "a suite of tests: it ends where something fails")]
#[path = "../../../spmem-node/tests/conformance/suite.rs"]
mod suite;

/// Of a node that the suite makes.
const BYTES: u64 = 4 << 20;
/// Where topologies mount a file system.
pub(super) const MOUNTED: &str = "/mnt";

/// What to look for.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    #[arg(long)]
    topology: String,
    #[arg(long)]
    mode: String,
}

/// Runs it.
///
/// # Errors
/// Something that the topology promises is not there, or cannot be used.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let topology = Topology::load(&options.topology)?;
    let mode = topology.mode(Some(&options.mode))?;
    let machine = Machine::read(Path::new("/"), &Overrides::new());
    let mut kinds = Vec::new();
    for node in &mode.nodes {
        kinds.push(of_numa(u16::try_from(node.id)?)?);
    }
    for device in machine.dax.iter().filter(|dax| dax.mode == DaxMode::Devdax) {
        let align = device.align_bytes.with_context(|| format!("{} has no align", device.name))?;
        let told = dax::Device { bytes: device.bytes, align, is_persistent: device.is_persistent };
        kinds.extend(of_dax(&device.name, told)?);
    }
    if mode.pmem.iter().any(|pmem| pmem.is_mounted) {
        kinds.push(of_file(&format!("{MOUNTED}/node"))?);
    }
    // The overlay is RAM: an ordinary file system.
    kinds.push(of_file("/tmp/node")?);
    let mut held = 0;
    for kind in &kinds {
        for (name, claim) in suite::claims(kind) {
            println!("      {}: {name}", kind.name);
            claim(kind);
            held += 1;
        }
    }
    let names: Vec<&str> = kinds.iter().map(|kind| kind.name.as_str()).collect();
    println!("{held} claims: {}", names.join(", "));
    Ok(())
}

/// Placement is read back, and memory that is not there is refused.
fn of_numa(node: u16) -> anyhow::Result<Kind> {
    let region = numa::region(BYTES, node).with_context(|| format!("node {node}"))?;
    let pages = usize::try_from(BYTES / 4096)?;
    ensure!(region.pages_elsewhere(node) == Ok((0, pages)), "node {node}: pages are elsewhere");
    ensure!(
        region.pages_elsewhere(node + 1) == Ok((pages, pages)),
        "node {node}: what is read back means nothing"
    );
    ensure!(numa::region(BYTES, 99).is_err(), "there is no node 99");
    let region = move || numa::region(BYTES, node).unwrap_or_else(|errno| panic!("node {node}: {errno}"));
    Ok(Kind { name: format!("numa {node}"), region: Box::new(region), again: None, unit: 4096 })
}

/// Two kinds of a device: memory that ends with the process, and a persistent node.
fn of_dax(name: &str, device: dax::Device) -> anyhow::Result<Vec<Kind>> {
    let path = format!("/dev/{name}");
    let unit = usize::try_from(device.align)?;
    let map = move || {
        let region =
            open(&path).and_then(|fd| Ok(dax::region(fd, &device, BYTES.max(device.align), Access::ReadWrite)?));
        region.unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    let region = map();
    ensure!(region.start().is_multiple_of(unit) && region.len().is_multiple_of(unit), "{name} is not aligned");
    ensure!(
        region.view(4096, 4096, Access::Read).is_err() == (unit > 4096),
        "{name} is mapped in units of {unit}"
    );
    let (first, second) = (map.clone(), map.clone());
    let name = |what: &str| format!("{name} {what}, units of {} KiB", unit >> 10);
    Ok(vec![
        Kind { name: name("as memory"), region: Box::new(map), again: None, unit },
        Kind { name: name("as a persistent node"), region: Box::new(first), again: Some(Box::new(second)), unit },
    ])
}

fn of_file(path: &str) -> anyhow::Result<Kind> {
    let (path, other) = (path.to_owned(), path.to_owned());
    let region = file::create(open(&path)?, BYTES).with_context(|| path.clone())?;
    let durability = region.durability();
    drop(region);
    // Persistent memory that the kernel knows to be synchronous; virtio-pmem is not.
    let mounts = fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
    println!("      {path}: durable by {durability:?}");
    let is_dax =
        mounts.lines().any(|line| line.contains(" /mnt ") && line.contains("dax")) && path.starts_with(MOUNTED);
    ensure!(is_dax || durability == Durability::Writeback, "{path} is not on dax");
    let how = Cell::new(match durability {
        Durability::CacheLines => "cache lines",
        _ => "msync",
    });
    let retry = move |path: &str, make: fn(Fd) -> spmem_sys::Result<Region>| {
        let region = open(path).and_then(|fd| Ok(make(fd)?));
        region.unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    let name = format!("{path} (durable by {})", how.get());
    let region = move || retry(&path, |fd| file::create(fd, BYTES));
    let again = move || retry(&other, |fd| file::map(fd, Access::ReadWrite));
    Ok(Kind { name, region: Box::new(region), again: Some(Box::new(again)), unit: 4096 })
}

pub(super) fn open(path: &str) -> anyhow::Result<Fd> {
    let is_device = path.starts_with("/dev/");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(!is_device);
    Ok(Fd::from_raw(options.open(path).with_context(|| path.to_owned())?.into_raw_fd()))
}
