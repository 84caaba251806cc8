//! userfaultfd(2): who serves the faults of a range (Documentation/admin-guide/mm/userfaultfd.rst, ioctl_userfaultfd(2)).
//!
//! Every call that changes program memory answers `EAGAIN` while the kernel holds an event (fork, unmap, remove,
//! remap) that nobody has read yet. So a call that succeeds is known to come after every event read before it and
//! before every event still to come; callers build on that.

use crate::fd::{Fd, raw_fd};
use crate::pagemap::Pagemap;
use crate::{Errno, PAGE, Result, process};
use syscalls::{Sysno, syscall};

/// UFFDIO_API features (include/uapi/linux/userfaultfd.h).
pub mod feature {
    /// fork(2) is announced and the child's ranges stay registered. Needs CAP_SYS_PTRACE.
    pub const EVENT_FORK: u64 = 1 << 1;
    /// mremap(2) is announced.
    pub const EVENT_REMAP: u64 = 1 << 2;
    /// madvise(2) that drops pages is announced.
    pub const EVENT_REMOVE: u64 = 1 << 3;
    /// munmap(2) is announced.
    pub const EVENT_UNMAP: u64 = 1 << 6;
    /// Faults carry the thread id.
    pub const THREAD_ID: u64 = 1 << 8;
    /// UFFDIO_POISON (6.6+).
    pub const POISON: u64 = 1 << 14;
    /// UFFDIO_MOVE (6.8+).
    pub const MOVE: u64 = 1 << 16;
    /// UFFDIO_RWPROTECT (7.3+).
    pub const RWP: u64 = 1 << 17;
    /// What is protected from reads and writes is let go by the kernel itself at the first access (7.3+).
    pub const RWP_ASYNC: u64 = 1 << 18;
    /// What telling accesses takes.
    pub const TRACKED: u64 = RWP | RWP_ASYNC;
    /// What managing a program takes.
    pub const MANAGED: u64 = EVENT_FORK | EVENT_REMAP | EVENT_REMOVE | EVENT_UNMAP | THREAD_ID | POISON | MOVE;
    /// What a scratch area takes: pages move in and out of it, nothing is announced.
    pub const SCRATCH: u64 = MOVE;
}

/// Where /dev/userfaultfd is.
pub const DEVICE: &core::ffi::CStr = c"/dev/userfaultfd";

const fn iowr(number: u32, size: u32) -> u32 {
    0xc000_0000 | (size << 16) | (0xaa << 8) | number
}
const fn ior(number: u32, size: u32) -> u32 {
    0x8000_0000 | (size << 16) | (0xaa << 8) | number
}
const IOC_NEW: u32 = 0xaa00;
const API: u32 = iowr(0x3f, 24);
const REGISTER: u32 = iowr(0x00, 32);
const UNREGISTER: u32 = ior(0x01, 16);
const WAKE: u32 = ior(0x02, 16);
const COPY: u32 = iowr(0x03, 40);
const ZEROPAGE: u32 = iowr(0x04, 32);
const MOVE: u32 = iowr(0x05, 40);
const WRITEPROTECT: u32 = iowr(0x06, 24);
const POISON: u32 = iowr(0x08, 32);
const RWPROTECT: u32 = iowr(0x09, 24);
const _: () = assert!(API == 0xc018_aa3f && REGISTER == 0xc020_aa00 && COPY == 0xc028_aa03 && MOVE == 0xc028_aa05);
const _: () = assert!(RWPROTECT == 0xc018_aa09);
const MODE_MISSING: u64 = 1;
const MODE_RWP: u64 = 1 << 3;
const RWPROTECT_ON: u64 = 1;
const MODE_WP: u64 = 2;
const WRITEPROTECT_MODE_WP: u64 = 1;
const PAGEFAULT_FLAG_WRITE: u64 = 1;
const PAGEFAULT_FLAG_WP: u64 = 2;
const MOVE_ALLOW_SRC_HOLES: u64 = 1 << 1;

/// A userfaultfd, bound to the address space that made it.
#[derive(Debug)]
pub struct Uffd(Fd);

/// Which faults of a range come to its userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// On missing pages.
    Missing,
    /// Also writes to pages behind a [fence](Uffd::fence).
    MissingAndFenced,
    /// On missing pages; the kernel tells of accesses to those that are there ([`Uffd::begin_tracking`], [`feature::TRACKED`]).
    MissingAndTracked,
    /// None: accesses are told, no more.
    Tracked,
}

/// What a call on a run of pages did: `done` bytes from its start, then `stopped` by an error unless all were done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: usize,
    /// Why not all; `EAGAIN` may hide another reason when `done` is not zero: ask again from there.
    pub stopped: Option<Errno>,
}

/// What a userfaultfd announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Thread `tid` waits for the page of `address`.
    Fault {
        /// Address touched.
        address: usize,
        /// It was a write.
        is_write: bool,
        /// The page is there; its fence stopped the write.
        is_fenced: bool,
        /// Who waits (with [`feature::THREAD_ID`]).
        tid: u32,
    },
    /// The process forked; the descriptor is the child's userfaultfd, to be owned by the reader.
    Fork {
        /// Raw descriptor in the reader's table.
        child: i32,
    },
    /// mremap(2) moved `len` bytes.
    Remap {
        /// Where they were.
        from: usize,
        /// Where they are.
        to: usize,
        /// Bytes.
        len: usize,
    },
    /// madvise(2) is about to drop the pages of a range.
    Remove {
        /// First address.
        start: usize,
        /// First address behind.
        end: usize,
    },
    /// munmap(2) or an equal removed a range.
    Unmap {
        /// First address.
        start: usize,
        /// First address behind.
        end: usize,
    },
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    pad: [u8; 7],
    arg: [u64; 3],
}
const _: () = assert!(size_of::<Message>() == 32);

impl Uffd {
    /// A new userfaultfd of the calling process from an open [`DEVICE`], not yet enabled.
    ///
    /// # Errors
    /// As ioctl(2).
    pub fn from_device(device: &Fd) -> Result<Self> {
        // SAFETY: takes no pointer.
        let raw = unsafe { syscall!(Sysno::ioctl, device.raw(), IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) }?;
        Ok(Self(Fd::from_raw(raw_fd(raw))))
    }

    /// A new userfaultfd of the calling process by userfaultfd(2), not yet enabled.
    ///
    /// # Errors
    /// As userfaultfd(2): `EPERM` without CAP_SYS_PTRACE where vm.unprivileged_userfaultfd is 0.
    pub fn from_syscall() -> Result<Self> {
        // SAFETY: takes no pointer.
        let raw = unsafe { syscall!(Sysno::userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) }?;
        Ok(Self(Fd::from_raw(raw_fd(raw))))
    }

    /// A new one of the calling process by whichever way is open, not yet enabled.
    ///
    /// # Errors
    /// As [`Uffd::from_syscall`].
    pub fn new() -> Result<Self> {
        Fd::open(DEVICE, libc::O_RDWR)
            .and_then(|device| Self::from_device(&device))
            .or_else(|_| Self::from_syscall())
    }

    /// Takes ownership of a userfaultfd, which may belong to another process.
    pub fn from_fd(fd: Fd) -> Self {
        Self(fd)
    }

    /// The descriptor's number.
    pub fn raw(&self) -> i32 {
        self.0.raw()
    }

    /// Gives up ownership without closing.
    pub fn into_raw(self) -> i32 {
        self.0.into_raw()
    }

    /// Enables it with `features` (UFFDIO_API); all that the kernel has. Needs the rights of the *caller*.
    ///
    /// # Errors
    /// `EINVAL` when the kernel lacks a feature, `EPERM` when EVENT_FORK is asked without CAP_SYS_PTRACE.
    pub fn enable(&self, features: u64) -> Result<u64> {
        let mut api = [libc_uffd_api(), features, 0];
        self.ioctl(API, &mut api)?;
        Ok(api[1])
    }

    /// Faults on missing pages of the range come here from now on. The kernel splits mappings at its ends.
    ///
    /// # Errors
    /// As UFFDIO_REGISTER: `EBUSY` when another userfaultfd has a part of it, `EINVAL` when it cannot be served.
    pub fn register(&self, start: usize, len: usize) -> Result<()> {
        self.register_for(start, len, Watch::Missing)
    }

    /// As [`Uffd::register`]. What the range was registered for before is forgotten: fences that are no longer watched are
    /// none.
    ///
    /// # Errors
    /// As [`Uffd::register`].
    pub fn register_for(&self, start: usize, len: usize, watch: Watch) -> Result<()> {
        let mode = match watch {
            Watch::Missing => MODE_MISSING,
            Watch::MissingAndFenced => MODE_MISSING | MODE_WP,
            Watch::MissingAndTracked => MODE_MISSING | MODE_RWP,
            Watch::Tracked => MODE_RWP,
        };
        self.ioctl(REGISTER, &mut [start as u64, len as u64, mode, 0])
    }

    /// Writes to pages of the range, which are there, come here from now on; reads go on.
    ///
    /// # Errors
    /// `ENOENT` where the range is not registered for [`Watch::MissingAndFenced`]; `EAGAIN` while [`Uffd::is_changing`].
    pub fn fence(&self, start: usize, len: usize) -> Result<()> {
        self.ioctl(WRITEPROTECT, &mut [start as u64, len as u64, WRITEPROTECT_MODE_WP])
    }

    /// Pages of the range have no fence any more; waiting threads retry.
    ///
    /// # Errors
    /// As [`Uffd::fence`].
    pub fn lift_fence(&self, start: usize, len: usize) -> Result<()> {
        self.ioctl(WRITEPROTECT, &mut [start as u64, len as u64, 0])
    }

    /// Present pages of the range count as not accessed from now on, until they are: `Pagemap::scan_accessed`.
    ///
    /// # Errors
    /// As UFFDIO_RWPROTECT (7.3+): `ENOENT` for a range whose accesses are not told ([`Watch`]); `EAGAIN` while [`Uffd::is_changing`].
    pub fn begin_tracking(&self, start: usize, len: usize) -> Result<()> {
        self.ioctl(RWPROTECT, &mut [start as u64, len as u64, RWPROTECT_ON])
    }

    /// Missing pages of the range read as zero from now on; waiting threads retry.
    ///
    /// # Errors
    /// As UFFDIO_UNREGISTER.
    pub fn unregister(&self, start: usize, len: usize) -> Result<()> {
        self.ioctl(UNREGISTER, &mut [start as u64, len as u64])
    }

    /// Threads that wait for a page of the range retry.
    ///
    /// # Errors
    /// As UFFDIO_WAKE.
    pub fn wake(&self, start: usize, len: usize) -> Result<()> {
        self.ioctl(WAKE, &mut [start as u64, len as u64])
    }

    /// Fills missing pages from `source` and wakes who waits.
    pub fn copy(&self, to: usize, source: &[u8]) -> Progress {
        let from = source.as_ptr().expose_provenance() as u64;
        let mut args = [to as u64, from, source.len() as u64, 0, 0];
        let result = self.ioctl(COPY, &mut args);
        progress(result, args[4], source.len())
    }

    /// As [`Uffd::copy`], from an address in memory of our own that another call may be emptying.
    pub fn copy_from(&self, to: usize, from: usize, len: usize) -> Progress {
        let mut args = [to as u64, from as u64, len as u64, 0, 0];
        let result = self.ioctl(COPY, &mut args);
        progress(result, args[4], len)
    }

    /// Fills missing pages with the zero page and wakes who waits.
    pub fn zero(&self, to: usize, len: usize) -> Progress {
        let mut args = [to as u64, len as u64, 0, 0];
        let result = self.ioctl(ZEROPAGE, &mut args);
        progress(result, args[3], len)
    }

    /// Moves pages within the address space into a range registered here, atomically; missing source pages are skipped
    /// and count as done. Wakes who waits at the destination.
    pub fn move_pages(&self, to: usize, from: usize, len: usize) -> Progress {
        let mut args = [to as u64, from as u64, len as u64, MOVE_ALLOW_SRC_HOLES, 0];
        let result = self.ioctl(MOVE, &mut args);
        progress(result, args[4], len)
    }

    /// As [`Uffd::move_pages`], but a missing source page stops it with `ENOENT`; and `done` is what was really moved.
    ///
    /// Kernels from 6.18 on may move pages and say that they did not. When a page's entry changes under the call (its
    /// accessed bit, say), `move_pages()` of mm/userfaultfd.c tries again, but keeps the `EAGAIN` of the first attempt,
    /// tries once more although the second has succeeded, and meets at the destination what it has moved itself:
    /// `EEXIST`. So after an error `pagemap` tells. A destination page must have been missing before, and faults on the
    /// source pages must come to the caller: then a page that is here and not there has been moved.
    pub fn move_present(&self, to: usize, from: usize, len: usize, pagemap: &Pagemap) -> Progress {
        let mut args = [to as u64, from as u64, len as u64, 0, 0];
        let result = self.ioctl(MOVE, &mut args);
        let mut progress = progress(result, args[4], len);
        let is_moved = |at| Ok::<bool, Errno>(pagemap.is_there(to + at)? && !pagemap.is_there(from + at)?);
        while progress.stopped.is_some() && progress.done < len {
            match is_moved(progress.done) {
                Ok(true) => progress.done += PAGE,
                Ok(false) => return progress,
                // Whatever is assumed now may lose a page.
                Err(_) => {
                    process::write_stderr(
                        b"spm: the kernel does not tell where a page is that was to be moved (PAGEMAP_SCAN)\n",
                    );
                    process::abort()
                }
            }
        }
        progress.stopped = None;
        progress
    }

    /// Whether the kernel holds an event that nobody has read yet, or is about to announce one: calls that change program
    /// memory fail with `EAGAIN`.
    pub fn is_changing(&self) -> bool {
        // An empty range is refused with EINVAL, but only after this.
        self.zero(0, 0).stopped == Some(Errno::EAGAIN)
    }

    /// Whether any process still uses the address space.
    pub fn has_users(&self) -> bool {
        // Lifting a write protection where nothing is registered for it changes nothing, whatever is at the address; an
        // address space without users is refused before that (`userfaultfd_writeprotect`, mmget_not_zero).
        const SOMEWHERE: u64 = 1 << 30;
        self.ioctl(WRITEPROTECT, &mut [SOMEWHERE, PAGE as u64, 0]) != Err(Errno::ESRCH)
    }

    /// Whether all pages from `address` on, so many bytes, are registered and of one mapping; `inaccessible` is the address of
    /// a page of our own that nobody may read.
    ///
    /// # Errors
    /// `EAGAIN` while [`Uffd::is_changing`].
    pub fn is_registered(&self, address: usize, len: usize, inaccessible: usize) -> Result<bool> {
        // The copy fails after the kernel has looked at where it would go (`validate_dst_vma`, mm/userfaultfd.c).
        match self.copy_from(address & !(PAGE - 1), inaccessible, len).stopped {
            Some(Errno::EAGAIN) => Err(Errno::EAGAIN),
            // From 6.9 on the kernel looks for the mapping before it looks whether something is under way.
            Some(Errno::ENOENT) if self.is_changing() => Err(Errno::EAGAIN),
            Some(Errno::ENOENT) => Ok(false),
            _ => Ok(true),
        }
    }

    /// As [`Uffd::unregister`], but not while a range might have arrived there that nobody has heard of yet: its missing
    /// pages would read as zero. Whoever moves a range waits until the event was read; so what was let go in that time
    /// can be taken back, for `watch`, before any thread sees it. To be called where no event can be read meanwhile.
    ///
    /// # Errors
    /// `EAGAIN` when the range is registered still; else as UFFDIO_UNREGISTER.
    pub fn let_go(&self, start: usize, len: usize, watch: Watch) -> Result<()> {
        if self.is_changing() {
            return Err(Errno::EAGAIN);
        }
        self.unregister(start, len)?;
        if self.is_changing() {
            let _ = self.register_for(start, len, watch);
            return Err(Errno::EAGAIN);
        }
        Ok(())
    }

    /// Accesses to the missing page raise SIGBUS from now on (R20).
    pub fn poison(&self, at: usize) -> Progress {
        let mut args = [at as u64, PAGE as u64, 0, 0];
        let result = self.ioctl(POISON, &mut args);
        progress(result, args[3], PAGE)
    }

    /// The next event, without waiting: poll(2) does that. Faults come before other events.
    ///
    /// # Errors
    /// As read(2); `EAGAIN` when there is none.
    pub fn read(&self) -> Result<Event> {
        let mut message = Message::default();
        let to = core::ptr::from_mut(&mut message);
        loop {
            // SAFETY: the kernel writes one message of 32 bytes.
            match unsafe { syscall!(Sysno::read, self.raw(), to, 32) } {
                Err(syscalls::Errno::EINTR) => {}
                Ok(32) => {}
                Ok(_) => return Err(Errno::EINVAL),
                Err(errno) => return Err(errno.into()),
            }
            if let Some(event) = message.decode() {
                return Ok(event);
            }
        }
    }

    fn ioctl<const N: usize>(&self, request: u32, args: &mut [u64; N]) -> Result<()> {
        // SAFETY: `args` has the size encoded in the request; what it points to is the caller's to guarantee: ranges
        // of this process that stay valid, which the kernel checks.
        unsafe { syscall!(Sysno::ioctl, self.raw(), request, args.as_mut_ptr()) }?;
        Ok(())
    }
}

const fn libc_uffd_api() -> u64 {
    0xaa
}

fn progress(result: Result<()>, field: u64, len: usize) -> Progress {
    match result {
        Ok(()) => Progress { done: len, stopped: None },
        Err(errno) => {
            let done = i64::from_ne_bytes(field.to_ne_bytes()).max(0);
            Progress { done: usize::try_from(done).unwrap_or(0), stopped: Some(errno) }
        }
    }
}

impl Message {
    fn decode(&self) -> Option<Event> {
        let [a, b, c] = self.arg;
        let (low, _high) = (c & 0xffff_ffff, c >> 32);
        Some(match self.event {
            0x12 => Event::Fault {
                address: b as usize,
                is_write: a & PAGEFAULT_FLAG_WRITE != 0,
                is_fenced: a & PAGEFAULT_FLAG_WP != 0,
                tid: u32::try_from(low).ok()?,
            },
            0x13 => Event::Fork { child: i32::try_from(a & 0xffff_ffff).ok()? },
            0x14 => Event::Remap { from: a as usize, to: b as usize, len: c as usize },
            0x15 => Event::Remove { start: a as usize, end: b as usize },
            0x16 => Event::Unmap { start: a as usize, end: b as usize },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests;
