//! The memory that `spm` and its agents share: the control page (`spmem::control`) and the exchanges (`spmem::encoder`).
//!
//! [`Shared::create`] makes it in a memfd whose size is sealed, so that no process of the tree can take it from under the
//! others. They can write what they like into it: the values are statistics, hints, and a process's own pages.
#![allow(unsafe_code, reason = "a mapping becomes a reference to the structure laid out in it")]

use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::Context;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::rand::GetRandomFlags;
use spmem::control::{self, Control};
use spmem::encoder::Exchange;
use spmem::porter::Crossing;
use spmem_sys::mapping::Mapping;

use super::proc;

/// Memory of which any bytes are a valid value, and others may write them at any time.
///
/// # Safety
/// The type consists of atomics only.
pub unsafe trait Atomics {}
// SAFETY: its fields are.
unsafe impl Atomics for Control {}
// SAFETY: its fields are.
unsafe impl Atomics for Exchange {}
// SAFETY: its fields are.
unsafe impl Atomics for Crossing {}

/// A `T`, mapped for as long as this lives; zeros at first.
pub struct Shared<T> {
    memfd: OwnedFd,
    mapping: Mapping,
    of: PhantomData<T>,
}

/// What all agents share.
pub type ControlPage = Shared<Control>;

impl<T> Shared<T> {
    /// Makes one; `name` shows in /proc/PID/maps.
    ///
    /// # Errors
    /// The kernel gives no memory or no memfd.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        let size = size_of::<T>();
        let memfd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .with_context(|| format!("no memfd for {name}"))?;
        rustix::fs::ftruncate(&memfd, size as u64).with_context(|| format!("no memory for {name}"))?;
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .with_context(|| format!("{name} cannot be sealed"))?;
        let mapping =
            Mapping::shared(memfd.as_raw_fd(), size).with_context(|| format!("{name} cannot be mapped"))?;
        Ok(Self { memfd, mapping, of: PhantomData })
    }
}

impl<T: Atomics> Shared<T> {
    /// Maps what another process has made.
    ///
    /// # Errors
    /// It is of another size, or can still be made smaller; as mmap(2).
    pub fn open(memfd: OwnedFd) -> anyhow::Result<Self> {
        let (size, seals) = (size_of::<T>(), rustix::fs::fcntl_get_seals(&memfd)?);
        let is_whole = rustix::fs::fstat(&memfd)?.st_size.cast_unsigned() == size as u64;
        anyhow::ensure!(is_whole && seals.contains(SealFlags::SHRINK), "no memory that is shared like this");
        let mapping = Mapping::shared(memfd.as_raw_fd(), size)?;
        Ok(Self { memfd, mapping, of: PhantomData })
    }
}

impl ControlPage {
    /// Makes the page of a tree that may take `limit_bytes` of RAM (`None`: no limit) and whose node 1 has
    /// `store_capacity_bytes`.
    ///
    /// # Errors
    /// As [`Shared::create`].
    pub fn for_tree(limit_bytes: Option<u64>, store_capacity_bytes: u64) -> anyhow::Result<Self> {
        let page = Self::create("spmem-control")?;
        page.limit_bytes.store(limit_bytes.unwrap_or(control::UNLIMITED), Relaxed);
        page.store_capacity_bytes.store(store_capacity_bytes, Relaxed);
        page.seed.store(random()?, Relaxed);
        page.pid_namespace.store(proc::read_pid_namespace(std::process::id()).unwrap_or(0), Relaxed);
        page.magic.store(control::MAGIC, Relaxed);
        Ok(page)
    }

    /// Maps the page of a run that another `spm` may have started.
    ///
    /// # Errors
    /// It is none, or of another layout than this program's; as mmap(2).
    pub fn of_other_run(file: File) -> anyhow::Result<Self> {
        let mut magic = [0; 8];
        // Sealing comes first: of what cannot be sealed a read might not end.
        rustix::fs::fcntl_get_seals(&file).context("it is no control page")?;
        file.read_exact_at(&mut magic, 0).context("it is no control page")?;
        let (magic, mask) = (u64::from_ne_bytes(magic), control::VERSION_MASK);
        anyhow::ensure!(magic & !mask == control::MAGIC & !mask, "it has no control page");
        anyhow::ensure!(
            magic == control::MAGIC,
            "another version of spm runs it (control page {}, this one reads {}); the audit of that spm would tell",
            magic & mask,
            control::MAGIC & mask
        );
        Self::open(file.into()).context("its control page is not laid out as this spm's")
    }
}

impl<T: Atomics> std::ops::Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mapping is page-aligned, as long as `T`, zero at first, and lives as long as `self`; the seals keep
        // the file that long. `T` is atomics only: any bytes are valid and others may write them.
        unsafe { &*self.mapping.base().cast::<T>() }
    }
}

impl<T> AsFd for Shared<T> {
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
