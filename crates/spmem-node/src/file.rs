//! A file: on persistent memory with dax, on pmem without, or on any file system. Shared, and persistent.
//!
//! [`create`] makes room in a file, all of it, so that no later write finds the disk full; [`region`] maps it. What is in it:
//! [`crate::mapped::MappedNode::open`].

use spmem_sys::fd::Fd;
use spmem_sys::region::{Access, Region};
use spmem_sys::{Errno, PAGE, Result};

/// Where frame 0 of a file of that size is to be: at 2 MiB, so that dax file systems map it in one piece, if the file is large.
pub const fn data_align(bytes: u64) -> u64 {
    if bytes >= 64 << 20 { 2 << 20 } else { PAGE as u64 }
}

/// Gives an open file at least `bytes` (rounded up to pages), takes its lock, and maps all of it.
///
/// # Errors
/// `EAGAIN` while another process has it as a node; as fallocate(2) and mmap(2).
pub fn create(fd: Fd, bytes: u64) -> Result<Region> {
    fd.lock_exclusive()?;
    fd.allocate(bytes.next_multiple_of(PAGE as u64))?;
    map(fd, Access::ReadWrite)
}

/// Takes the lock of an open file and maps all of it, to run it as a node. A file that was copied may have holes, and a write into
/// one that finds the disk full is a SIGBUS: so they are filled first.
///
/// # Errors
/// `EAGAIN` while another process has it as a node; `ENOSPC` where its holes find no room, `EOPNOTSUPP` where the file system cannot
/// fill them; as mmap(2).
pub fn region(fd: Fd) -> Result<Region> {
    fd.lock_exclusive()?;
    fd.allocate(fd.size()?)?;
    map(fd, Access::ReadWrite)
}

/// Maps all of an open file without its lock: for peers, and to look at it.
///
/// # Errors
/// As mmap(2).
pub fn map(fd: Fd, access: Access) -> Result<Region> {
    let size = usize::try_from(fd.size()?).map_err(|_| Errno::ENOMEM)?;
    Region::of_file(fd, size / PAGE * PAGE, access)
}
