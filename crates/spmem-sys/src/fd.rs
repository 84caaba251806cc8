//! Descriptors: owned, read, closed.

use crate::{Errno, Result};
use core::sync::atomic::{AtomicI32, Ordering};
use syscalls::{Sysno, syscall};

/// /proc as a directory in the agent threads' descriptor table; -1: not open.
static PROC: AtomicI32 = AtomicI32::new(-1);

/// Says where /proc is open, for [`Fd::open_in_proc`]; -1 for nowhere. The descriptor belongs to one descriptor table:
/// threads with another must open by path.
pub fn set_proc(raw: i32) {
    PROC.store(raw, Ordering::Relaxed);
}

/// The descriptor that [`set_proc`] named.
pub fn proc() -> i32 {
    PROC.load(Ordering::Relaxed)
}

/// An open file's hold on a byte of a file: what [`Fd::hold`] sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// None.
    None,
    /// Others may have a shared one, too.
    Shared,
    /// Nobody else has any.
    Exclusive,
}

/// A descriptor that is closed when dropped. It means something only to threads that share its descriptor table.
#[derive(Debug)]
pub struct Fd(i32);

impl Fd {
    /// Takes ownership of `raw`; closing it elsewhere afterwards is the caller's fault.
    pub fn from_raw(raw: i32) -> Self {
        Self(raw)
    }

    /// The descriptor's number.
    pub fn raw(&self) -> i32 {
        self.0
    }

    /// Gives up ownership without closing.
    pub fn into_raw(self) -> i32 {
        let raw = self.0;
        core::mem::forget(self);
        raw
    }

    /// openat(2) relative to the working directory, close-on-exec. `path` ends in NUL.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(path: &core::ffi::CStr, flags: i32) -> Result<Self> {
        // SAFETY: `path` is a NUL-terminated string that outlives the call.
        let raw = unsafe { syscall!(Sysno::openat, libc::AT_FDCWD, path.as_ptr(), flags | libc::O_CLOEXEC, 0) }?;
        Ok(Self(raw_fd(raw)))
    }

    /// Opens a path in /proc, by the descriptor of [`set_proc`] where there is one: the program may have changed its
    /// root directory since.
    ///
    /// # Errors
    /// As open(2).
    pub fn open_in_proc(path: &core::ffi::CStr) -> Result<Self> {
        Self::open_in_proc_for(path, libc::O_RDONLY)
    }

    fn open_in_proc_for(path: &core::ffi::CStr, flags: i32) -> Result<Self> {
        let proc = PROC.load(Ordering::Relaxed);
        if proc < 0 {
            return Self::open(path, flags);
        }
        let relative = path.to_bytes_with_nul().strip_prefix(b"/proc/").ok_or(Errno::EINVAL)?;
        // SAFETY: the rest of a NUL-terminated string, which outlives the call.
        let raw = unsafe { syscall!(Sysno::openat, proc, relative.as_ptr(), flags | libc::O_CLOEXEC, 0) }?;
        Ok(Self(raw_fd(raw)))
    }

    /// The same file once more, to read and write, as an open file of its own: with holds ([`Fd::hold`]) of its own.
    ///
    /// # Errors
    /// As open(2): there is no /proc, or this process may not.
    pub fn reopen(&self) -> Result<Self> {
        const PREFIX: &[u8] = b"/proc/thread-self/fd/";
        let mut path = [0; PREFIX.len() + 12];
        path[..PREFIX.len()].copy_from_slice(PREFIX);
        let (mut digits, mut at, mut rest) = ([0; 11], 11, self.0);
        while at == 11 || rest > 0 {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        path[PREFIX.len()..][..11 - at].copy_from_slice(&digits[at..]);
        let path = core::ffi::CStr::from_bytes_until_nul(&path).map_err(|_| Errno::EINVAL)?;
        Self::open_in_proc_for(path, libc::O_RDWR)
    }

    /// pread(2): bytes read at `offset`.
    ///
    /// # Errors
    /// As pread(2), `EINTR` included.
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> Result<usize> {
        // SAFETY: `into` is writable for its whole length.
        Ok(unsafe { syscall!(Sysno::pread64, self.0, into.as_mut_ptr(), into.len(), offset) }?)
    }

    /// pwrite(2): bytes written at `offset`.
    ///
    /// # Errors
    /// As pwrite(2).
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<usize> {
        // SAFETY: `bytes` is readable for its whole length.
        Ok(unsafe { syscall!(Sysno::pwrite64, self.0, bytes.as_ptr(), bytes.len(), offset) }?)
    }

    /// write(2).
    ///
    /// # Errors
    /// As write(2).
    pub fn write(&self, bytes: &[u8]) -> Result<usize> {
        // SAFETY: `bytes` is readable for its whole length.
        Ok(unsafe { syscall!(Sysno::write, self.0, bytes.as_ptr(), bytes.len()) }?)
    }

    /// Bytes of the file.
    ///
    /// # Errors
    /// As lseek(2).
    pub fn size(&self) -> Result<u64> {
        // SAFETY: takes no pointer.
        Ok(unsafe { syscall!(Sysno::lseek, self.0, 0, libc::SEEK_END) }? as u64)
    }

    /// fallocate(2): the file has at least `len` bytes from now on, and room for all of them.
    ///
    /// # Errors
    /// As fallocate(2): `ENOSPC`, `EOPNOTSUPP`.
    pub fn allocate(&self, len: u64) -> Result<()> {
        // SAFETY: takes no pointer.
        unsafe { syscall!(Sysno::fallocate, self.0, 0, 0, len) }?;
        Ok(())
    }

    /// flock(2): nobody else has it while this open file lives.
    ///
    /// # Errors
    /// `EAGAIN` when somebody else has it; as flock(2).
    pub fn lock_exclusive(&self) -> Result<()> {
        // SAFETY: takes no pointer.
        unsafe { syscall!(Sysno::flock, self.0, libc::LOCK_EX | libc::LOCK_NB) }?;
        Ok(())
    }

    /// Takes or changes this open file's hold on `count` bytes from `first` on (fcntl(2), `F_OFD_SETLK`). It ends with the last
    /// descriptor for this open file, in whatever process.
    ///
    /// # Errors
    /// `EAGAIN` when another open file's hold is in the way: nothing has changed. `ENOLCK`.
    pub fn hold(&self, first: u64, count: u64, hold: Hold) -> Result<()> {
        let kind = match hold {
            Hold::None => libc::F_UNLCK,
            Hold::Shared => libc::F_RDLCK,
            Hold::Exclusive => libc::F_WRLCK,
        };
        let lock = libc::flock {
            l_type: i16::try_from(kind).map_err(|_| Errno::EINVAL)?,
            l_whence: i16::try_from(libc::SEEK_SET).map_err(|_| Errno::EINVAL)?,
            l_start: first.cast_signed(),
            l_len: count.cast_signed(),
            l_pid: 0,
        };
        // SAFETY: `lock` is what this command reads, and outlives the call.
        unsafe { syscall!(Sysno::fcntl, self.0, libc::F_OFD_SETLK, &raw const lock) }?;
        Ok(())
    }

    /// A second descriptor for the same open file, close-on-exec, numbered `at_least` or higher.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn duplicate(&self, at_least: i32) -> Result<Self> {
        // SAFETY: takes no pointer.
        let raw = unsafe { syscall!(Sysno::fcntl, self.0, libc::F_DUPFD_CLOEXEC, at_least) }?;
        Ok(Self(raw_fd(raw)))
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: takes no pointer; the descriptor is ours, so nobody else loses one.
        let _ = unsafe { syscall!(Sysno::close, self.0) };
    }
}

/// A system call's non-negative result as a descriptor number.
pub(crate) fn raw_fd(result: usize) -> i32 {
    i32::try_from(result).expect("the kernel numbers descriptors below 2^31")
}

/// Closes every descriptor of this thread's table except those in `keep` (ascending, without repeats).
///
/// # Errors
/// As close_range(2); `EINVAL` when `keep` is not ascending.
pub fn close_all_but(keep: &[i32]) -> Result<()> {
    let mut next: u32 = 0;
    for &fd in keep {
        let fd = u32::try_from(fd).map_err(|_| Errno::EINVAL)?;
        if fd < next {
            return Err(Errno::EINVAL);
        }
        if fd > next {
            // SAFETY: takes no pointer; the caller owns this descriptor table.
            unsafe { syscall!(Sysno::close_range, next, fd - 1, 0) }?;
        }
        next = fd + 1;
    }
    // SAFETY: as above.
    unsafe { syscall!(Sysno::close_range, next, u32::MAX, 0) }?;
    Ok(())
}

/// One entry of a poll(2) set.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Poll {
    /// The descriptor; negative ones are skipped.
    pub fd: i32,
    /// Events asked for.
    pub events: i16,
    /// Events that came.
    pub revents: i16,
}

impl Poll {
    /// Waits for input on `fd`.
    pub fn readable(fd: i32) -> Self {
        Self { fd, events: libc::POLLIN, revents: 0 }
    }

    /// Something arrived, or the other side is gone.
    pub fn is_ready(self) -> bool {
        self.revents != 0
    }
}

/// ppoll(2): how many entries are ready; waits at most `timeout_ns`, or as long as it takes: the kernel sets no timer then.
///
/// # Errors
/// As poll(2).
pub fn poll(entries: &mut [Poll], timeout_ns: Option<u64>) -> Result<usize> {
    let timeout = timeout_ns.map(|ns| libc::timespec {
        tv_sec: i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(ns % 1_000_000_000).expect("below 2^30"),
    });
    let timeout = timeout.as_ref().map_or(core::ptr::null(), core::ptr::from_ref);
    let (at, len) = (entries.as_mut_ptr(), entries.len());
    // SAFETY: the kernel writes `revents` of exactly `entries.len()` entries; a null mask changes none.
    let result = unsafe { syscall!(Sysno::ppoll, at, len, timeout, 0, 8) };
    if result == Err(syscalls::Errno::EINVAL) {
        // More entries than RLIMIT_NOFILE, which the program may set to 0: callers look again by themselves.
        crate::process::sleep_ns(timeout_ns.map_or(50_000, |ns| ns.min(50_000)));
    }
    Ok(result?)
}
