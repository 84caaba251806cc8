//! Namespaces of persistent memory (Documentation/ABI/testing/sysfs-bus-nvdimm; drivers/nvdimm/namespace_devs.c).

use std::borrow::ToOwned;
use std::format;
use std::string::String;
use std::vec::Vec;

use super::sysfs::Sysfs;
use super::{Namespace, UNDECIDED};

const DEVICES: &str = "sys/bus/nd/devices";

pub(super) fn read(sysfs: &Sysfs<'_>) -> Vec<Namespace> {
    let namespaces = sysfs.numbered(DEVICES, "namespace").into_iter().filter_map(|name| {
        let folder = format!("{DEVICES}/{name}");
        // A seed, for the next namespace to be made, has a size of 0.
        let bytes = sysfs.number(format!("{folder}/size")).filter(|&bytes| bytes > 0)?;
        // What has claimed it has the block device, where there is one.
        let holder = sysfs.text(format!("{folder}/holder")).filter(|holder| !holder.is_empty());
        let claimed = holder.map_or_else(|| folder.clone(), |holder| format!("{DEVICES}/{holder}"));
        Some(Namespace {
            mode: mode(sysfs, &folder),
            target_node: sysfs.node(format!("{folder}/target_node")),
            numa_node: sysfs.node(format!("{folder}/numa_node")),
            blockdev: sysfs.names(format!("{claimed}/block")).into_iter().next(),
            class: UNDECIDED,
            name,
            bytes,
        })
    });
    namespaces.collect()
}

/// The kernel's word in ndctl's.
fn mode(sysfs: &Sysfs<'_>, folder: &str) -> String {
    let text = sysfs.text(format!("{folder}/mode")).unwrap_or_default();
    let word = match text.as_str() {
        "memory" => "fsdax",
        "dax" => "devdax",
        "safe" => "sector",
        "raw" => "raw",
        other => {
            sysfs.remark(format!("{folder}/mode"), format!("`{other}` is a mode that is not known here"));
            other
        }
    };
    word.to_owned()
}

/// The node of the persistent region at this address, which only root is told.
pub(super) fn target_node_at(sysfs: &Sysfs<'_>, start: u64) -> Option<u16> {
    let regions = sysfs.numbered(DEVICES, "region");
    let folder = regions
        .iter()
        .map(|name| format!("{DEVICES}/{name}"))
        .find(|folder| sysfs.number_if_told(format!("{folder}/resource")) == Some(start))?;
    sysfs.node(format!("{folder}/target_node"))
}
