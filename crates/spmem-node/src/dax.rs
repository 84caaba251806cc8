//! A dax device: memory that the kernel gives to who opens `/dev/daxX.Y`, and to nobody else.
//!
//! [`region`] maps it; its frames are ours alone. A userfaultfd is never registered on it: the kernel refuses it for missing
//! pages, and where it takes it for write protection the next write ends the process (with 2 MiB mappings). Hole: a device
//! that somebody else has open, too, is not noticed.

use spmem_sys::fd::Fd;
use spmem_sys::region::{Access, Durability, Region};
use spmem_sys::{Errno, Result};

/// What sysfs says of a device (`/sys/bus/dax/devices/daxX.Y`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// `size`, bytes.
    pub bytes: u64,
    /// `align`, bytes: 4 KiB, 2 MiB or 1 GiB.
    pub align: u64,
    /// Whether it is made of persistent memory.
    pub is_persistent: bool,
}

/// Maps the first `bytes` of an open device, rounded down to what it can map; all of it if that is less.
///
/// # Errors
/// `EINVAL` when nothing is left; as mmap(2).
pub fn region(fd: Fd, device: &Device, bytes: u64, access: Access) -> Result<Region> {
    let align = usize::try_from(device.align).map_err(|_| Errno::EINVAL)?;
    let most = usize::try_from(bytes.min(device.bytes)).map_err(|_| Errno::ENOMEM)?;
    let len = most.checked_div(align).ok_or(Errno::EINVAL)? * align;
    let durability = if device.is_persistent { Durability::CacheLines } else { Durability::Volatile };
    Region::of_device(fd, len, align, access, durability)
}
