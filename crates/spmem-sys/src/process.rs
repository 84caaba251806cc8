//! Facts about the calling process: ids, memory in use, time; and its signal mask.

use crate::fd::{Fd, raw_fd};
use crate::{Errno, PAGE, Result};
use syscalls::{Sysno, syscall};

/// getpid(2), never cached.
pub fn pid() -> u32 {
    // SAFETY: takes no pointer and cannot fail.
    let pid = unsafe { syscall!(Sysno::getpid) }.unwrap_or(0);
    u32::try_from(pid).unwrap_or(0)
}

/// gettid(2).
pub fn tid() -> u32 {
    // SAFETY: takes no pointer and cannot fail.
    let tid = unsafe { syscall!(Sysno::gettid) }.unwrap_or(0);
    u32::try_from(tid).unwrap_or(0)
}

/// CLOCK_MONOTONIC, ns, by a system call: for threads of the program, which may have forbidden themselves to read the
/// processor's counter (PR_SET_TSC in prctl(2)). Others use [`crate::clock::now_ns`].
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec.
    let _ = unsafe { syscall!(Sysno::clock_gettime, libc::CLOCK_MONOTONIC, core::ptr::from_mut(&mut time)) };
    crate::clock::ns(&time)
}

/// Processor time that a thread of this process has used, ns; 0 when it is gone.
pub fn thread_time_ns(tid: u32) -> u64 {
    // CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED (include/linux/posix-timers_types.h).
    cpu_clock_ns((!tid << 3) | 6)
}

/// Processor time that all threads of a process have used, also those that have ended, ns; 0 when it is gone.
pub fn process_time_ns(pid: u32) -> u64 {
    // CPUCLOCK_SCHED.
    cpu_clock_ns((!pid << 3) | 2)
}

fn cpu_clock_ns(clock: u32) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec.
    let result = unsafe { syscall!(Sysno::clock_gettime, clock, core::ptr::from_mut(&mut time)) };
    if result.is_ok() { crate::clock::ns(&time) } else { 0 }
}

/// nanosleep(2) for `ns`; may return early.
pub fn sleep_ns(ns: u64) {
    let time = libc::timespec {
        tv_sec: i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(ns % 1_000_000_000).expect("below 2^30"),
    };
    // SAFETY: reads one timespec.
    let _ = unsafe { syscall!(Sysno::nanosleep, core::ptr::from_ref(&time), 0) };
}

/// As [`sleep_ns`], without the 50 us that the kernel else adds to join wakeups (PR_SET_TIMERSLACK).
pub fn sleep_exactly_ns(ns: u64) {
    let set_slack = |ns: usize| {
        // SAFETY: takes no pointer.
        let _ = unsafe { syscall!(Sysno::prctl, libc::PR_SET_TIMERSLACK, ns) };
    };
    set_slack(1);
    sleep_ns(ns);
    // The thread's own default again.
    set_slack(0);
}

/// Processors that are online and allowed to this thread, at least 1.
pub fn cpu_count() -> usize {
    crate::thread::Affinity::of_caller().count().max(1)
}

/// Which pid namespace this process is in (pid_namespaces(7)): the inode of /proc/PID/ns/pid. `None` where the kernel does not tell: before 6.11
/// without a /proc of its own.
pub fn pid_namespace() -> Option<u64> {
    /// `_IO(PIDFS_IOCTL_MAGIC, 5)` (include/uapi/linux/pidfd.h).
    const PIDFD_GET_PID_NAMESPACE: u32 = 0xff05;
    // What is looked up in /proc has to be thrown out of the kernel's cache when the process ends.
    // SAFETY: takes no pointer.
    let space =
        own_pidfd().and_then(|own| Ok(unsafe { syscall!(Sysno::ioctl, own.raw(), PIDFD_GET_PID_NAMESPACE, 0) }?));
    let space = space.map(|raw| Fd::from_raw(raw_fd(raw)));
    let space = space.or_else(|_| Fd::open_in_proc(c"/proc/thread-self/ns/pid")).ok()?;
    let mut found = core::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel writes one stat.
    unsafe { syscall!(Sysno::fstat, space.raw(), found.as_mut_ptr()) }.ok()?;
    // SAFETY: it was zeroed, and all of its fields are numbers.
    Some(unsafe { found.assume_init() }.st_ino)
}

fn own_pidfd() -> Result<Fd> {
    // SAFETY: takes no pointer.
    Ok(unsafe { syscall!(Sysno::pidfd_open, pid(), 0) }.map(raw_fd).map(Fd::from_raw)?)
}

/// Whether a process of this id exists.
pub fn exists(pid: u32) -> bool {
    // SAFETY: signal 0 is never delivered.
    let result = unsafe { syscall!(Sysno::kill, pid, 0) };
    result != Err(syscalls::Errno::ESRCH)
}

/// Fills `to` from the memory of another process, by its process or a thread's number (process_vm_readv(2)). Unlike a read of
/// /proc/PID/mem it waits for pages that are away.
///
/// # Errors
/// `EFAULT` when not all of it is mapped there; `EPERM`, `ESRCH`.
pub fn read_memory_of(pid: u32, at: u64, to: &mut [u8]) -> Result<()> {
    let here = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    let there = libc::iovec { iov_base: core::ptr::without_provenance_mut(at as usize), iov_len: to.len() };
    // SAFETY: the kernel writes to `to` only, `iov_len` bytes at most.
    let read = unsafe {
        syscall!(Sysno::process_vm_readv, pid, core::ptr::from_ref(&here), 1, core::ptr::from_ref(&there), 1, 0)
    }?;
    if read == to.len() { Ok(()) } else { Err(Errno(libc::EFAULT)) }
}

/// Bytes that the process may still map as its own: the less of what RLIMIT_AS and RLIMIT_DATA leave, `None` when neither is set. Stacks count as
/// data here, which the kernel leaves out (may_expand_vm, mm/mmap.c).
pub fn memory_left() -> Option<u64> {
    let limits = [libc::RLIMIT_AS, libc::RLIMIT_DATA].map(|what| {
        let mut limit = [u64::MAX; 2];
        // SAFETY: the kernel writes one rlimit64.
        let result = unsafe { syscall!(Sysno::prlimit64, 0, what, 0, limit.as_mut_ptr()) };
        result.ok().map(|_| limit[0]).filter(|&soft| soft != u64::MAX)
    });
    if limits == [None; 2] {
        return None;
    }
    let mut text = [0_u8; 128];
    let statm = Fd::open_in_proc(c"/proc/thread-self/statm").ok()?;
    let len = statm.read_at(&mut text, 0).ok()?;
    // proc_pid_statm(5): size, resident, shared, text, lib, data, dt.
    let mut pages = text[..len].split(|b| b.is_ascii_whitespace()).map(parse_decimal);
    let (mapped, data) = (pages.next()??, pages.nth(4)??);
    let left = |limit: Option<u64>, pages: u64| limit.map(|limit| limit.saturating_sub(pages * PAGE as u64));
    [left(limits[0], mapped), left(limits[1], data)].into_iter().flatten().min()
}

/// RLIMIT_NOFILE as it was: soft and hard.
#[derive(Clone, Copy, Debug)]
pub struct DescriptorLimit([u64; 2]);

impl DescriptorLimit {
    /// Makes room for `at_least` descriptors for a moment, where the program's limit is lower: the limit counts numbers,
    /// also in descriptor tables that are none of the program's. What to [restore](Self::restore), if it changed.
    pub fn raise(at_least: u64) -> Option<Self> {
        Self::raise_to(|_| at_least)
    }

    /// Makes room for so `many` more, whatever the program's table holds. What to [restore](Self::restore), if it changed.
    pub fn widen(many: u64) -> Option<Self> {
        Self::raise_to(|soft| soft.saturating_add(many))
    }

    fn raise_to(at_least: impl Fn(u64) -> u64) -> Option<Self> {
        let mut old = [0_u64; 2];
        // SAFETY: the kernel writes one rlimit64.
        unsafe { syscall!(Sysno::prlimit64, 0, libc::RLIMIT_NOFILE, 0, old.as_mut_ptr()) }.ok()?;
        let at_least = at_least(old[0]);
        if old[0] >= at_least {
            return None;
        }
        let new = Self([at_least, old[1].max(at_least)]);
        // Raising the hard limit takes CAP_SYS_RESOURCE; without it the most that may be had.
        if !new.restore() {
            Self([old[1], old[1]]).restore();
        }
        Some(Self(old))
    }

    /// Sets the limit to this; whether that was possible.
    pub fn restore(self) -> bool {
        // SAFETY: the kernel reads one rlimit64.
        unsafe { syscall!(Sysno::prlimit64, 0, libc::RLIMIT_NOFILE, self.0.as_ptr(), 0) }.is_ok()
    }

    /// As two words.
    pub fn to_words(self) -> [u64; 2] {
        self.0
    }

    /// From two words.
    pub fn from_words(words: [u64; 2]) -> Self {
        Self(words)
    }
}

/// Lets other threads that are ready have the processor (sched_yield(2)).
pub fn give_way() {
    // SAFETY: takes nothing.
    let _ = unsafe { syscall!(Sysno::sched_yield) };
}

/// Reads pages of the process whose /proc/PID/mem `memory` is, one behind the other into `into`; how many were read before
/// one that cannot be. It is the address space at the time of the opening, whatever the process executes later.
///
/// # Panics
/// When `into` has not room for all.
pub fn read_pages(memory: &Fd, addresses: &[usize], into: &mut [u8]) -> usize {
    let mut done = 0;
    while done < addresses.len() {
        let neighbours = addresses[done..].windows(2).take_while(|pair| pair[0] + PAGE == pair[1]).count() + 1;
        let run = &mut into[done * PAGE..(done + neighbours) * PAGE];
        let read = memory.read_at(run, addresses[done] as u64).unwrap_or(0) / PAGE;
        done += read;
        if read < neighbours {
            break;
        }
    }
    done
}

/// Writes to the process's standard error, whichever descriptor table the calling thread has. Best effort.
pub fn write_stderr(text: &[u8]) {
    // A container's filter may forbid pidfd_getfd(2).
    let fd = standard_error().or_else(|_| Fd::open(c"/proc/self/fd/2", libc::O_WRONLY | libc::O_APPEND));
    if let Ok(fd) = fd {
        let _ = fd.write(text);
    }
}

/// The first thread's descriptor 2 itself, with its place in the file; opened anew it would overwrite or be overwritten.
fn standard_error() -> Result<Fd> {
    let process = own_pidfd()?;
    // SAFETY: takes no pointer.
    let fd = unsafe { syscall!(Sysno::pidfd_getfd, process.raw(), 2, 0) }?;
    Ok(Fd::from_raw(raw_fd(fd)))
}

/// Ends the calling process as abort(3) does, without libc: SIGABRT with its default action.
pub fn abort() -> ! {
    let default = [0_usize; 4];
    // SAFETY: a zeroed kernel sigaction means SIG_DFL.
    let _ = unsafe { syscall!(Sysno::rt_sigaction, libc::SIGABRT, default.as_ptr(), 0, 8) };
    set_signal_mask(0);
    // SAFETY: takes no pointer.
    let _ = unsafe { syscall!(Sysno::tgkill, pid(), tid(), libc::SIGABRT) };
    loop {
        // SAFETY: takes no pointer; ends the process should the signal not have.
        let _ = unsafe { syscall!(Sysno::exit_group, 134) };
    }
}

/// Ends the process at once (exit_group(2)).
pub fn exit(status: i32) -> ! {
    loop {
        // SAFETY: takes no pointer.
        let _ = unsafe { syscall!(Sysno::exit_group, status) };
    }
}

/// Sets the calling thread's signal mask (bit n-1 = signal n); what it was.
pub fn set_signal_mask(mask: u64) -> u64 {
    let mut old = 0_u64;
    let (new, old_at) = (core::ptr::from_ref(&mask), core::ptr::from_mut(&mut old));
    // SAFETY: both point to 8-byte kernel signal sets.
    let _ = unsafe { syscall!(Sysno::rt_sigprocmask, libc::SIG_SETMASK, new, old_at, 8) };
    old
}

/// What a process takes, bytes (proc_pid_statm(5)).
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryBytes {
    /// Resident anonymous memory (resident - shared). Pages shared by fork count in full.
    pub anonymous: u64,
    /// Address space of private writable mappings (data).
    pub writable: u64,
}

/// Memory in use as the kernel counts it, read from two files that stay open.
pub struct MemoryUse {
    statm: Fd,
    rollup: Option<Fd>,
}

impl MemoryUse {
    /// Opens /proc/thread-self/statm and smaps_rollup.
    ///
    /// # Errors
    /// As open(2).
    pub fn open() -> Result<Self> {
        Ok(Self {
            statm: Fd::open_in_proc(c"/proc/thread-self/statm")?,
            rollup: Fd::open_in_proc(c"/proc/thread-self/smaps_rollup").ok(),
        })
    }

    /// What the process takes now (proc_pid_statm(5)).
    ///
    /// # Errors
    /// As read(2).
    pub fn read(&self) -> Result<MemoryBytes> {
        let mut text = [0_u8; 128];
        let len = self.statm.read_at(&mut text, 0)?;
        let mut numbers = text[..len].split(|b| b.is_ascii_whitespace()).map(parse_decimal);
        let resident = numbers.nth(1).flatten().ok_or(Errno::EINVAL)?;
        let shared = numbers.next().flatten().ok_or(Errno::EINVAL)?;
        let data = numbers.nth(2).flatten().ok_or(Errno::EINVAL)?;
        let bytes = |pages| pages * PAGE as u64;
        Ok(MemoryBytes { anonymous: bytes(resident.saturating_sub(shared)), writable: bytes(data) })
    }

    /// The same with each page divided by the processes that share it (`Pss_Anon`), bytes. Walks all page tables.
    ///
    /// # Errors
    /// As read(2); `ENOENT` where the kernel has no such line.
    pub fn read_proportional_bytes(&self) -> Result<u64> {
        let mut text = [0_u8; 2048];
        let len = self.rollup.as_ref().ok_or(Errno::ENOENT)?.read_at(&mut text, 0)?;
        let line = text[..len].split(|&b| b == b'\n').find_map(|line| line.strip_prefix(b"Pss_Anon:"));
        let kib = line.and_then(|line| line.split(|&b| b == b' ').find_map(parse_decimal)).ok_or(Errno::ENOENT)?;
        Ok(kib * 1024)
    }
}

fn parse_decimal(digits: &[u8]) -> Option<u64> {
    core::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn the_pid_namespace_is_the_one_that_proc_names() {
        use std::os::unix::fs::MetadataExt;
        let named = std::fs::metadata("/proc/self/ns/pid").expect("/proc");
        assert_eq!(pid_namespace(), Some(named.ino()));
    }

    #[test]
    fn memory_use_follows_what_is_touched() {
        let memory = MemoryUse::open().expect("/proc");
        let block = core::hint::black_box(std::vec![1_u8; 64 << 20]);
        // Other tests run beside this one and take and give a few megabytes: only a bound from below is certain.
        assert!(memory.read().expect("statm").anonymous >= 60 << 20);
        assert!(memory.read_proportional_bytes().expect("rollup") >= 60 << 20);
        drop(block);
    }
}
