//! A file in memory whose pages are on one node: memfd_create(2) with a policy of its own.
//!
//! Pages of such a file stay where they are whoever maps it, also behind a cpuset that lacks the node, and NUMA balancing leaves
//! them alone: the policy is the file's. That is only so for pages that are there; so all are before anybody gets it, and it is sealed.

use core::ffi::CStr;

use syscalls::{Sysno, syscall};

use crate::fd::{Fd, raw_fd};
use crate::mapping::{Mapping, populate_write};
use crate::mempolicy::{MPOL_BIND, MPOL_F_STATIC_NODES, MPOL_PREFERRED, bind_range, mask, node_of};
use crate::{Errno, PAGE, Result};

/// The file, all of it there, of fixed size.
#[derive(Debug)]
pub struct NodeFile {
    fd: Fd,
    memory: Mapping,
}

impl NodeFile {
    /// `len` bytes (whole pages) of zeros on `node`, in a file that /proc calls `memfd:name`.
    ///
    /// # Errors
    /// `EINVAL` when `len` is no pages, there is no such node, or this process's cpuset lacks it; `ENOMEM` when a page came to be
    /// elsewhere, as they do once the node is full; as memfd_create(2), mbind(2).
    pub fn new(name: &CStr, len: usize, node: u16) -> Result<Self> {
        if len == 0 || !len.is_multiple_of(PAGE) {
            return Err(Errno::EINVAL);
        }
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name ends in NUL and outlives the call.
        let fd = unsafe { syscall!(Sysno::memfd_create, name.as_ptr(), flags) }?;
        let fd = Fd::from_raw(raw_fd(fd));
        // SAFETY: takes no pointer.
        unsafe { syscall!(Sysno::ftruncate, fd.raw(), len) }?;
        let memory = Mapping::shared(fd.raw(), len)?;
        let start = memory.start();
        // Bound to only once all is there: the kernel ends processes, anybody's, when a node that is bound to is full.
        bind_range(start, len, MPOL_PREFERRED | MPOL_F_STATIC_NODES, &mask([node]))?;
        populate_write(start, len)?;
        for page in (start..start + len).step_by(PAGE) {
            if node_of(0, page)? != i32::from(node) {
                return Err(Errno::ENOMEM);
            }
        }
        bind_range(start, len, MPOL_BIND | MPOL_F_STATIC_NODES, &mask([node]))?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: takes no pointer.
        unsafe { syscall!(Sysno::fcntl, fd.raw(), libc::F_ADD_SEALS, seals) }?;
        Ok(Self { fd, memory })
    }

    /// To hand over.
    pub fn fd(&self) -> &Fd {
        &self.fd
    }

    /// Its contents; those who map it see and change the same.
    pub fn memory(&self) -> &Mapping {
        &self.memory
    }
}
