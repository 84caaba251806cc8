//! In a guest of `cargo xtask vm`: what /sys says of nodes and devices, held against the topology's file.
//!
//! Twice over: as a few lines here read it, and as spmem's own discovery does ([`vm_nodes`]). Every fact is looked at and told, `ok` or `WRONG`, before the program ends with a failure. Called by
//! `cargo xtask vm-test`. What is not checked: whether the memory can be used, and its speed, which an emulator has none of.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::vm_nodes;
use crate::vm::topology::{Mode, Topology};

/// The kernel keeps memory of a node for itself: more on a small one, most where its own image is.
const LEAST_PERCENT: u64 = 70;

/// What to hold against.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    #[arg(long)]
    topology: String,
    #[arg(long)]
    mode: String,
    /// Where `spm` is, to see what it makes of this machine.
    #[arg(long)]
    spm: Option<PathBuf>,
}

/// Runs it.
///
/// # Errors
/// A fact is wrong.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let topology = Topology::load(&options.topology)?;
    let mode = topology.mode(Some(&options.mode))?;
    let mut facts = Facts::default();
    check_nodes(&mut facts, mode);
    check_distances(&mut facts, &topology, mode);
    check_access(&mut facts, &topology, mode);
    check_dax(&mut facts, mode);
    check_pmem(&mut facts, mode);
    let devices = names_in("/sys/bus/cxl/devices", "");
    for name in &mode.cxl {
        facts.note(devices.contains(name), format!("{name} among the CXL devices {devices:?}"));
    }
    vm_nodes::check(&mut facts, &topology, mode);
    if let Some(spm) = &options.spm {
        vm_nodes::check_spm(&mut facts, spm, &topology, mode).with_context(|| format!("{}", spm.display()))?;
    }
    facts.end()
}

#[derive(Default)]
pub(super) struct Facts {
    seen: u32,
    wrong: u32,
}

impl Facts {
    pub(super) fn note(&mut self, is_right: bool, what: String) {
        self.seen += 1;
        self.wrong += u32::from(!is_right);
        println!("{} {what}", if is_right { "ok   " } else { "WRONG" });
    }

    pub(super) fn equal<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, seen: T, promised: T) {
        self.note(seen == promised, format!("{what}: {seen:?}, promised {promised:?}"));
    }

    /// Says how many there were.
    ///
    /// # Errors
    /// One is wrong.
    pub(super) fn end(&self) -> anyhow::Result<()> {
        println!("{} facts", self.seen);
        ensure!(self.wrong == 0, "{} of {} facts are wrong", self.wrong, self.seen);
        Ok(())
    }

    /// Never more than promised, and not much less.
    pub(super) fn size(&mut self, what: &str, bytes: u64, promised_mib: u64) {
        let promised = promised_mib << 20;
        let is_right = bytes <= promised && bytes >= promised / 100 * LEAST_PERCENT;
        self.note(is_right, format!("{what}: {} MiB, promised {promised_mib} MiB", bytes >> 20));
    }
}

fn check_nodes(facts: &mut Facts, mode: &Mode) {
    let promised: Vec<u32> = mode.nodes.iter().map(|node| node.id).collect();
    facts.equal("nodes with memory", read_list("/sys/devices/system/node/has_memory"), promised);
    for node in &mode.nodes {
        let folder = format!("/sys/devices/system/node/node{}", node.id);
        facts.size(&format!("node {}", node.id), memory_bytes(&folder), node.mib);
        if !mode.is_any_cpus {
            let cpus = read_list(&format!("{folder}/cpulist")).len();
            facts.equal(&format!("processors of node {}", node.id), cpus, node.cpus);
        }
    }
}

/// The kernel lists distances to the nodes that are online. One that a device brought without an entry in the table has
/// the kernel's default and is left out.
fn check_distances(facts: &mut Facts, topology: &Topology, mode: &Mode) {
    let online = read_list("/sys/devices/system/node/online");
    for from in &mode.nodes {
        let text = read(&format!("/sys/devices/system/node/node{}/distance", from.id));
        let all: Vec<u8> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        facts.equal(&format!("length of node {}'s distances", from.id), all.len(), online.len());
        let (mut seen, mut promised) = (Vec::new(), Vec::new());
        for (to, distance) in online.iter().zip(all) {
            if let Some(known) = topology.distance(from.id, *to) {
                seen.push(distance);
                promised.push(known);
            }
        }
        facts.equal(&format!("distances from node {}", from.id), seen, promised);
    }
}

/// access0 is the best initiator of a node: the least latency and the most bandwidth of its column.
fn check_access(facts: &mut Facts, topology: &Topology, mode: &Mode) {
    for node in &mode.nodes {
        let to = node.id as usize;
        let latency = topology.access.iter().filter_map(|row| row.latency_ns.get(to)).min();
        let bandwidth = topology.access.iter().filter_map(|row| row.bandwidth_gib.get(to)).max();
        let (Some(latency), Some(gib)) = (latency, bandwidth) else { continue };
        let number = |name: &str| -> Option<u32> {
            let file = format!("/sys/devices/system/node/node{to}/access0/initiators/{name}");
            read(&file).trim().parse().ok()
        };
        for side in ["read", "write"] {
            let seen = number(&format!("{side}_latency"));
            facts.equal(&format!("node {to}, {side} latency, ns"), seen, Some(*latency));
            let seen = number(&format!("{side}_bandwidth"));
            facts.equal(&format!("node {to}, {side} bandwidth, MiB/s"), seen, Some(gib * 1024));
        }
    }
}

fn check_dax(facts: &mut Facts, mode: &Mode) {
    let promised: BTreeSet<String> = mode.dax.iter().map(|device| device.name.clone()).collect();
    facts.equal("dax devices", names_in("/sys/bus/dax/devices", "dax"), promised);
    for device in &mode.dax {
        let name = &device.name;
        let folder = format!("/sys/bus/dax/devices/{name}");
        facts.size(name, number(&format!("{folder}/size")), device.mib);
        if let Some(node) = device.node {
            facts.equal(&format!("target node of {name}"), number(&format!("{folder}/target_node")), node.into());
        }
        facts.equal(&format!("align of {name}"), number(&format!("{folder}/align")), device.align_mib << 20);
        let driver = fs::read_link(format!("{folder}/driver")).unwrap_or_default();
        let driver = driver.file_name().unwrap_or_default().to_string_lossy().into_owned();
        facts.equal(&format!("driver of {name}"), driver, device.driver.clone());
        // The file is there with either driver: opening it tells.
        let can_open = File::open(Path::new("/dev").join(name)).is_ok();
        facts.equal(&format!("/dev/{name} can be opened"), can_open, device.driver == "device_dax");
    }
}

fn check_pmem(facts: &mut Facts, mode: &Mode) {
    const SECTOR_BYTES: u64 = 512;
    let promised: BTreeSet<String> = mode.pmem.iter().map(|device| device.name.clone()).collect();
    facts.equal("pmem devices", names_in("/sys/block", "pmem"), promised);
    for device in &mode.pmem {
        let name = &device.name;
        facts.size(name, number(&format!("/sys/block/{name}/size")) * SECTOR_BYTES, device.mib);
        let mounts = read("/proc/mounts");
        let is_mounted = mounts.lines().any(|line| {
            line.starts_with(&format!("/dev/{name} "))
                && line.split([' ', ',']).any(|word| word.starts_with("dax"))
        });
        facts.equal(&format!("{name} is mounted with dax"), is_mounted, device.is_mounted);
    }
}

fn read(file: &str) -> String {
    fs::read_to_string(file).unwrap_or_default()
}

fn number(file: &str) -> u64 {
    read(file).trim().parse().unwrap_or_default()
}

/// `0,2-3`.
fn read_list(file: &str) -> Vec<u32> {
    parse_list(read(file).trim())
}

fn parse_list(text: &str) -> Vec<u32> {
    let bounds = |part: &str| -> anyhow::Result<(u32, u32)> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Ok((first.parse().context("no number")?, last.parse().context("no number")?))
    };
    text.split(',').filter_map(|part| bounds(part).ok()).flat_map(|(first, last)| first..=last).collect()
}

fn memory_bytes(node: &str) -> u64 {
    let text = read(&format!("{node}/meminfo"));
    let kib =
        text.lines().find_map(|line| line.split_once("MemTotal:")?.1.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0_u64) * 1024
}

fn names_in(folder: &str, start: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(start))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_the_kernel_is_read() {
        assert_eq!(parse_list("0,2-3"), [0, 2, 3]);
        assert_eq!(parse_list(""), [0_u32; 0]);
    }
}
