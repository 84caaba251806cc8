//! Control page: the memory that `spm` and its agents share (`spmem::control`).
//!
//! [`ControlPage::create`] makes it in a memfd whose size is sealed, so that no process of the tree can take it from
//! under the others. They can write what they like into it: the values are statistics and hints.
#![allow(unsafe_code, reason = "a mapping becomes a reference to the structure laid out in it")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;

use anyhow::Context;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::rand::GetRandomFlags;
use spmem::control::{self, Control};
use spmem_sys::mapping::Mapping;

/// The page, mapped for as long as this lives.
pub struct ControlPage {
    memfd: OwnedFd,
    mapping: Mapping,
}

impl ControlPage {
    /// Makes a page for a tree that may take `limit_bytes` of RAM (`None`: no limit) and whose node 1 has
    /// `store_capacity_bytes`.
    ///
    /// # Errors
    /// The kernel gives no memory or no memfd.
    pub fn create(limit_bytes: Option<u64>, store_capacity_bytes: u64) -> anyhow::Result<Self> {
        let size = size_of::<Control>();
        let memfd = rustix::fs::memfd_create("spmem-control", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .context("no memfd for the control page")?;
        rustix::fs::ftruncate(&memfd, size as u64).context("no memory for the control page")?;
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .context("the control page cannot be sealed")?;
        let mapping = Mapping::shared(memfd.as_raw_fd(), size).context("the control page cannot be mapped")?;
        let page = Self { memfd, mapping };
        page.limit_bytes.store(limit_bytes.unwrap_or(control::UNLIMITED), Relaxed);
        page.store_capacity_bytes.store(store_capacity_bytes, Relaxed);
        page.seed.store(random()?, Relaxed);
        page.magic.store(control::MAGIC, Relaxed);
        Ok(page)
    }
}

impl std::ops::Deref for ControlPage {
    type Target = Control;

    fn deref(&self) -> &Control {
        // SAFETY: the mapping is page-aligned, as long as `Control`, zero at first, and lives as long as `self`; the
        // seals keep the file that long. `Control` is atomics only: any bytes are valid and others may write them.
        unsafe { &*self.mapping.base().cast::<Control>() }
    }
}

impl AsFd for ControlPage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

/// Sixty-four random bits.
///
/// # Errors
/// The kernel has no randomness to give.
pub fn random() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty()).context("no random bits")?;
    Ok(u64::from_ne_bytes(bytes))
}
