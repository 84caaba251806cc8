//! A node that the kernel has onlined as system RAM: class 1 to 3 memory with processors of its own or without.
//!
//! [`region`] takes frames of it from the kernel, strictly, and reads back that they are there. Hole: the kernel's own
//! reclaim may swap them out, where there is swap.

use spmem_sys::region::Region;
use spmem_sys::{Errno, Result};

/// `bytes` of zeros (whole pages) on the kernel's node of that number.
///
/// # Errors
/// `EINVAL` when there is no such node, it has no memory, or this process's cpuset lacks it; `EXDEV` when the kernel put
/// pages elsewhere; as memfd_create(2), mmap(2), mbind(2), move_pages(2).
pub fn region(bytes: u64, node: u16) -> Result<Region> {
    Region::on_node(usize::try_from(bytes).map_err(|_| Errno::ENOMEM)?, node)
}
