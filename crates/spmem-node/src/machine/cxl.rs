//! CXL memory devices and regions (Documentation/ABI/testing/sysfs-bus-cxl).

use std::format;
use std::string::String;
use std::vec::Vec;

use super::sysfs::Sysfs;
use super::{Memdev, Region, nodes, nvdimm};

const DEVICES: &str = "sys/bus/cxl/devices";
/// The specification allows 16.
const MOST_WAYS: u64 = 16;

pub(super) fn read_memdevs(sysfs: &Sysfs<'_>) -> Vec<Memdev> {
    let memdevs = sysfs.numbered(DEVICES, "mem").into_iter().map(|memdev| {
        let folder = format!("{DEVICES}/{memdev}");
        let ancestry = sysfs.ancestry(&folder);
        Memdev {
            ram_size: sysfs.number(format!("{folder}/ram/size")).unwrap_or(0),
            pmem_size: sysfs.number(format!("{folder}/pmem/size")).unwrap_or(0),
            serial: sysfs.number(format!("{folder}/serial")),
            numa_node: sysfs.node(format!("{folder}/numa_node")),
            host: ancestry.iter().rev().nth(1).cloned(),
            memdev,
        }
    });
    memdevs.collect()
}

pub(super) fn read_regions(sysfs: &Sysfs<'_>) -> Vec<Region> {
    let regions = sysfs.numbered(DEVICES, "region").into_iter().map(|region| {
        let folder = format!("{DEVICES}/{region}");
        let ways = sysfs.number(format!("{folder}/interleave_ways"));
        // Not committed yet: an error to read, or all ones.
        let start = sysfs.number_if_told(format!("{folder}/resource")).filter(|&start| start != u64::MAX);
        let access = |class| nodes::read_access_at(sysfs, &format!("{folder}/access{class}"));
        let targets = (0..ways.unwrap_or(0).min(MOST_WAYS)).filter_map(|index| target(sysfs, &folder, index));
        Region {
            size: sysfs.number_if_told(format!("{folder}/size")).unwrap_or(0),
            mode: sysfs.text(format!("{folder}/mode")).filter(|mode| !mode.is_empty()),
            interleave_ways: ways,
            interleave_granularity: sysfs.number(format!("{folder}/interleave_granularity")),
            memdevs: targets.collect(),
            target_node: start.and_then(|start| nvdimm::target_node_at(sysfs, start)),
            access: access(1).or_else(|| access(0)),
            start,
            region,
        }
    });
    regions.collect()
}

/// `target0` names an endpoint's decoder; the port that it belongs to, `endpoint2`, faces a memory device (`uport`).
fn target(sysfs: &Sysfs<'_>, folder: &str, index: u64) -> Option<String> {
    let decoder = sysfs.text(format!("{folder}/target{index}")).filter(|decoder| !decoder.is_empty())?;
    let ancestry = sysfs.ancestry(format!("{DEVICES}/{decoder}"));
    let port = ancestry.iter().rev().nth(1)?;
    sysfs.link_name(format!("{DEVICES}/{port}/uport"))
}
