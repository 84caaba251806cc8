//! The Linux calls spmem makes, without libc.
//!
//! The agent runs inside other people's programs, in threads that own no thread-local storage: there, `errno`, locks
//! and lazily bound symbols of libc live in memory that may itself be away. So every call here is a raw system call
//! that returns its error as a value. Nothing in this crate allocates, takes a lock it does not say, or panics on
//! what the kernel returns.
//!
//! | module | calls |
//! |---|---|
//! | [`uffd`] | userfaultfd(2): ranges, copy, move, poison, events |
//! | [`mapping`] | mmap(2), madvise(2): memory of our own |
//! | [`maps`] | /proc/PID/maps, `PROCMAP_QUERY` |
//! | [`pagemap`] | /proc/PID/pagemap, `PAGEMAP_SCAN` |
//! | [`mempolicy`] | mbind(2), set_mempolicy(2), move_pages(2), migrate_pages(2): policies, memory on one node, where pages are |
//! | [`node_file`] | memfd_create(2): a file whose pages are on one node |
//! | [`region`] | mmap(2), msync(2), clwb: memory of a node, a file or a dax device, mapped shared |
//! | [`device`] | pipe(2): a dax device, mapped, that the kernel copies from and to |
//! | [`seccomp`] | seccomp(2): calls that another process answers |
//! | [`filter`] | which calls a seccomp filter refuses |
//! | [`thread`] | clone(2) without libc, sched_setaffinity(2) |
//! | [`futex`] | futex(2): [`futex::Lock`], [`futex::Event`] |
//! | [`socket`] | unix(7) seqpacket sockets with descriptors |
//! | [`clock`] | none: the clock in the kernel's vdso(7) |
//! | [`process`] | pids, /proc/PID/statm, clocks, signals masks, process_vm_readv(2) |
#![no_std]
#![allow(unsafe_code, reason = "this is the crate where system calls are made")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "the `syscall!` macro expands to several raw operations that are one system call"
)]
#![allow(clippy::cast_possible_truncation, reason = "x86-64 only, asserted below: usize and u64 are the same")]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("spmem-sys speaks the x86-64 Linux ABI only");

pub mod clock;
pub mod device;
pub mod fd;
pub mod filter;
pub mod futex;
pub mod mapping;
pub mod maps;
pub mod mempolicy;
pub mod node_file;
pub mod pagemap;
pub mod process;
pub mod region;
pub mod seccomp;
pub mod socket;
pub mod thread;
pub mod uffd;

use core::fmt;

/// A system call's error number (errno(3)).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// No memory, or too many mappings.
    pub const ENOMEM: Self = Self(libc::ENOMEM);
    /// Not to be read or written at that address.
    pub const EFAULT: Self = Self(libc::EFAULT);
    /// Try again.
    pub const EAGAIN: Self = Self(libc::EAGAIN);
    /// Exists already.
    pub const EEXIST: Self = Self(libc::EEXIST);
    /// No such thing.
    pub const ENOENT: Self = Self(libc::ENOENT);
    /// In use.
    pub const EBUSY: Self = Self(libc::EBUSY);
    /// The process is gone.
    pub const ESRCH: Self = Self(libc::ESRCH);
    /// Invalid argument.
    pub const EINVAL: Self = Self(libc::EINVAL);
    /// Interrupted by a signal.
    pub const EINTR: Self = Self(libc::EINTR);
    /// Not for this caller.
    pub const EPERM: Self = Self(libc::EPERM);
    /// Not in this way: a mapping that may only be read, for one.
    pub const EACCES: Self = Self(libc::EACCES);
    /// The kernel or the file system cannot do it.
    pub const EOPNOTSUPP: Self = Self(libc::EOPNOTSUPP);
    /// The device failed.
    pub const EIO: Self = Self(libc::EIO);
    /// The memory has failed.
    pub const EHWPOISON: Self = Self(libc::EHWPOISON);
    /// Memory is somewhere else than it was asked for.
    pub const EXDEV: Self = Self(libc::EXDEV);
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match syscalls::Errno::new(self.0).name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match syscalls::Errno::new(self.0).description() {
            Some(text) => f.write_str(text),
            None => write!(f, "error {}", self.0),
        }
    }
}

impl core::error::Error for Errno {}

impl From<syscalls::Errno> for Errno {
    fn from(errno: syscalls::Errno) -> Self {
        Self(errno.into_raw())
    }
}

/// What a system call gives.
pub type Result<T> = core::result::Result<T, Errno>;

/// Bytes in a page (x86-64).
pub const PAGE: usize = 4096;
