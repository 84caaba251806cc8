//! Dax devices (Documentation/ABI/testing/sysfs-bus-dax).

use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

use super::sysfs::Sysfs;
use super::{Dax, DaxMode, SoftReserved, UNDECIDED};

const DEVICES: &str = "sys/bus/dax/devices";

pub(super) fn read(sysfs: &Sysfs<'_>) -> Vec<Dax> {
    let devices = sysfs.numbered(DEVICES, "dax").into_iter().filter_map(|name| {
        let folder = format!("{DEVICES}/{name}");
        // A seed, for the next device to be made of the region, has a size of 0.
        let bytes = sysfs.number(format!("{folder}/size")).filter(|&bytes| bytes > 0)?;
        let driver = sysfs.link_name(format!("{folder}/driver"));
        let mode = match driver.as_deref() {
            Some("kmem") => DaxMode::SystemRam,
            Some("device_dax") => DaxMode::Devdax,
            Some(other) => {
                sysfs.remark(format!("{folder}/driver"), format!("{other} is a driver that is not known here"));
                DaxMode::Disabled
            }
            None => DaxMode::Disabled,
        };
        let ancestry = sysfs.ancestry(&folder);
        Some(Dax {
            align_bytes: sysfs.number(format!("{folder}/align")),
            target_node: sysfs.node(format!("{folder}/target_node")),
            numa_node: sysfs.node(format!("{folder}/numa_node")),
            parent: parent_of(sysfs, &ancestry),
            is_persistent: is_on_ndbus(&ancestry),
            class: UNDECIDED,
            name,
            bytes,
            mode,
            driver,
        })
    });
    devices.collect()
}

/// Adds the soft-reserved ranges that /proc/iomem does not name to those that it does. Linux 7.3 keeps them to itself: what
/// is left to see are the devices that it has made of them, below the driver `hmem`. Who is not root is not told where.
pub(super) fn add_soft_reserved(sysfs: &Sysfs<'_>, devices: &[Dax], ranges: &mut Vec<SoftReserved>) {
    for device in devices {
        let folder = format!("{DEVICES}/{}", device.name);
        let is_soft_reserved = sysfs.ancestry(&folder).iter().any(|part| part.starts_with("hmem."));
        let Some(start) = sysfs.number_if_told(format!("{folder}/resource")).filter(|_| is_soft_reserved) else {
            continue;
        };
        if !ranges.iter().any(|range| range.start <= start && start - range.start < range.size) {
            ranges.push(SoftReserved { start, size: device.bytes, used_by: vec![device.name.clone()] });
        }
    }
}

/// What a device is made of: below a CXL region, `.../region0/dax_region0/dax0.0`, the region; below libnvdimm's bus,
/// `.../ndbus0/region0/dax0.1/dax0.0`, the namespace that the outer of the two has claimed.
fn parent_of(sysfs: &Sysfs<'_>, ancestry: &[String]) -> Option<String> {
    let (_, above) = ancestry.split_last()?;
    if is_on_ndbus(ancestry) {
        return sysfs.text(above.join("/") + "/namespace").filter(|name| !name.is_empty());
    }
    let (last, above) = above.split_last()?;
    if last.starts_with("dax_region") { above.last().cloned() } else { None }
}

/// Whether it is made of persistent memory: libnvdimm's bus is above it.
fn is_on_ndbus(ancestry: &[String]) -> bool {
    ancestry.iter().any(|part| part.strip_prefix("ndbus").is_some_and(|number| number.parse::<u32>().is_ok()))
}
