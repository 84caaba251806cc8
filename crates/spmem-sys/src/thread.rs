//! Threads without libc: clone(2) on a stack of our own.
//!
//! Such a thread has no thread-local storage of its own (it sees its creator's), no libc state, and, when started
//! with [`Table::Private`], a descriptor table of its own: what the program closes or leaks is not its concern. Its root
//! and working directory are its own as well, so that it finds /proc after the program has called chroot(2). The
//! code it runs may use `core` and this crate, nothing else. A tracer that follows the creator's threads (`strace -f`) does
//! not get this one with them: it would stop whoever is to bring back the memory that it reads.

use crate::{Result, process};
use core::arch::asm;
use core::fmt::Write;
use syscalls::{Sysno, syscall};

/// The descriptor table of a new thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The creator's, shared.
    Shared,
    /// A copy of the creator's, made now.
    Private,
}

/// Starts `entry(argument)` in a new thread of this process with all signals blocked; its thread id.
///
/// # Errors
/// As clone(2).
///
/// # Safety
/// `stack_top` is the 16-byte aligned upper end of memory that nobody else uses as long as the thread runs; `entry`
/// and what it calls use no thread-local storage and no libc function that does.
pub unsafe fn spawn(
    table: Table,
    stack_top: *mut u8,
    entry: extern "C" fn(usize) -> !,
    argument: usize,
) -> Result<u32> {
    let mut flags =
        libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD | libc::CLONE_SYSVSEM | libc::CLONE_UNTRACED;
    if table == Table::Shared {
        flags |= libc::CLONE_FILES;
    }
    // SAFETY: as the caller promises.
    let tid = unsafe { clone(flags, stack_top, entry, argument) }?;
    Ok(u32::try_from(tid).unwrap_or(0))
}

/// Starts `entry(argument)` with all signals blocked in what clone(2) makes; its number. On this stack, below, if `stack_top` is null.
///
/// # Safety
/// As of [`spawn`]; without a stack of its own `flags` make the caller wait until it is needed no more.
pub(crate) unsafe fn clone(
    flags: i32,
    stack_top: *mut u8,
    entry: extern "C" fn(usize) -> !,
    argument: usize,
) -> Result<i32> {
    let mask = process::set_signal_mask(u64::MAX);
    let result: isize;
    // SAFETY: the child returns from the system call on its stack, with the callee-saved registers of the parent
    // (entry and argument among them), and never returns from `entry`; this frame lives on.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r13",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") 56_isize => result,
            in("rdi") flags as isize,
            in("rsi") stack_top,
            in("rdx") 0_usize,
            in("r10") 0_usize,
            in("r8") 0_usize,
            in("r12") entry,
            in("r13") argument,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    process::set_signal_mask(mask);
    let result = i32::try_from(result).unwrap_or(-libc::EINVAL);
    if result < 0 { Err(crate::Errno(-result)) } else { Ok(result) }
}

/// Ends the calling thread, and only it.
pub fn exit() -> ! {
    loop {
        // SAFETY: takes no pointer.
        let _ = unsafe { syscall!(Sysno::exit, 0) };
    }
}

/// Makes the root directory the calling thread's working directory, so that it keeps no other file system in use.
pub fn leave_directory() {
    // SAFETY: the path is NUL-terminated.
    let _ = unsafe { syscall!(Sysno::chdir, c"/".as_ptr()) };
}

/// Processors that a thread may run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affinity([u64; 16]);

impl Affinity {
    /// The calling thread's (sched_getaffinity(2)); every processor when the kernel does not say.
    pub fn of_caller() -> Self {
        let mut set = [0_u64; 16];
        // SAFETY: the kernel writes at most the 128 bytes given.
        match unsafe { syscall!(Sysno::sched_getaffinity, 0, size_of_val(&set), set.as_mut_ptr()) } {
            Ok(_) => Self(set),
            Err(_) => Self([u64::MAX; 16]),
        }
    }

    /// One processor.
    pub fn only(cpu: usize) -> Option<Self> {
        let mut set = [0_u64; 16];
        *set.get_mut(cpu / 64)? = 1 << (cpu % 64);
        Some(Self(set))
    }

    /// The others.
    #[must_use]
    pub fn without(mut self, cpu: usize) -> Self {
        if let Some(word) = self.0.get_mut(cpu / 64) {
            *word &= !(1 << (cpu % 64));
        }
        self
    }

    /// Whether it is one of them.
    pub fn contains(&self, cpu: usize) -> bool {
        self.0.get(cpu / 64).is_some_and(|word| word & (1 << (cpu % 64)) != 0)
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Lets the calling thread run on these only (sched_setaffinity(2)).
    ///
    /// # Errors
    /// `EINVAL` when none of them is there and allowed.
    pub fn apply(&self) -> Result<()> {
        // SAFETY: the kernel reads the 128 bytes given.
        unsafe { syscall!(Sysno::sched_setaffinity, 0, size_of_val(&self.0), self.0.as_ptr()) }?;
        Ok(())
    }
}

/// The processor that a thread of this process ran on last (proc_pid_stat(5), field 39).
///
/// # Errors
/// As open(2): `ENOENT` when there is no such thread.
pub fn last_cpu(tid: u32) -> Result<usize> {
    let mut path = Text::<40> { bytes: [0; 40], len: 0 };
    write!(path, "/proc/self/task/{tid}/stat\0").map_err(|_| crate::Errno::EINVAL)?;
    let path = core::ffi::CStr::from_bytes_until_nul(&path.bytes).map_err(|_| crate::Errno::EINVAL)?;
    stat_field(path, 39)
}

/// How many threads this process has, the calling one included (proc_pid_stat(5), field 20).
///
/// # Errors
/// As open(2).
pub fn count() -> Result<usize> {
    stat_field(c"/proc/self/stat", 20)
}

/// A number of a file as proc_pid_stat(5) describes it.
fn stat_field(path: &core::ffi::CStr, number: usize) -> Result<usize> {
    let mut text = [0; 512];
    let len = crate::fd::Fd::open_in_proc(path)?.read_at(&mut text, 0)?;
    // The name in parentheses, field 2, may contain anything; the fields behind it are numbers.
    let rest = text[..len].rsplit(|&byte| byte == b')').next().unwrap_or_default();
    let field = rest.split(|&byte| byte == b' ').nth(number - 2).unwrap_or_default();
    let number = core::str::from_utf8(field).ok().and_then(|text| text.parse().ok());
    number.ok_or(crate::Errno::EINVAL)
}

/// Moves the calling thread into the network name space of another one (setns(2)); abstract sockets belong to one.
///
/// # Errors
/// As open(2) and setns(2): `EPERM` without CAP_SYS_ADMIN there.
pub fn join_network_of(tid: u32) -> Result<()> {
    let mut path = Text::<40> { bytes: [0; 40], len: 0 };
    write!(path, "/proc/{tid}/ns/net\0").map_err(|_| crate::Errno::EINVAL)?;
    let path = core::ffi::CStr::from_bytes_until_nul(&path.bytes).map_err(|_| crate::Errno::EINVAL)?;
    let space = crate::fd::Fd::open_in_proc(path)?;
    // SAFETY: takes no pointer.
    unsafe { syscall!(Sysno::setns, space.raw(), libc::CLONE_NEWNET) }?;
    Ok(())
}

/// Text of at most `N` bytes.
struct Text<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Write for Text<N> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let end = self.len + text.len();
        self.bytes.get_mut(self.len..end).ok_or(core::fmt::Error)?.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

/// Names the calling thread (15 bytes at most count), as `ps -T` shows it.
pub fn set_name(name: &core::ffi::CStr) {
    // SAFETY: the name is NUL-terminated.
    let _ = unsafe { syscall!(Sysno::prctl, libc::PR_SET_NAME, name.as_ptr()) };
}

/// The nice value of the calling thread (getpriority(2)); 0 when the kernel does not say.
pub fn nice() -> i32 {
    // SAFETY: takes no pointer. The raw call returns 20 less the value.
    unsafe { syscall!(Sysno::getpriority, libc::PRIO_PROCESS, 0) }.map_or(0, |value| 20 - value as i32)
}

/// Asks for a nice value for the calling thread; refused silently without the right to lower it.
pub fn set_nice(nice: i32) {
    // SAFETY: takes no pointer.
    let _ = unsafe { syscall!(Sysno::setpriority, libc::PRIO_PROCESS, 0, nice) };
}

/// Real-time scheduling of the calling thread, until dropped: once awake it runs at once, whoever has the processor.
pub struct Urgent {
    was_changed: bool,
}

impl Urgent {
    /// Begins it; refused silently without the right to it (CAP_SYS_NICE).
    pub fn begin() -> Self {
        Self { was_changed: set_policy(libc::SCHED_FIFO, 1) }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if self.was_changed {
            set_policy(libc::SCHED_OTHER, 0);
        }
    }
}

/// From now on the calling thread runs only where nobody else wants the processor (SCHED_IDLE, sched(7)).
pub fn be_idle() {
    set_policy(libc::SCHED_IDLE, 0);
}

fn set_policy(policy: i32, priority: i32) -> bool {
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: reads the parameter.
    unsafe { syscall!(Sysno::sched_setscheduler, 0, policy, core::ptr::from_ref(&parameter)) }.is_ok()
}

/// The thread's control block: what the `fs` segment points to (the TLS variant II of x86-64 ELF).
pub fn control_block() -> usize {
    let at: usize;
    // SAFETY: the first word of the control block is its own address (x86-64 psABI).
    unsafe { asm!("mov {}, fs:0", out(reg) at, options(nostack, preserves_flags, readonly)) };
    at
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::fd::Fd;
    use crate::futex::Event;
    use crate::mapping::Mapping;
    use core::sync::atomic::{AtomicI32, Ordering};

    #[test]
    fn a_thread_runs_where_it_is_bound_to() {
        let before = Affinity::of_caller();
        for cpu in (0..1024).filter(|&cpu| {
            Affinity::only(cpu).is_some_and(|only| only.0.iter().zip(before.0).any(|(a, b)| a & b != 0))
        }) {
            Affinity::only(cpu).and_then(|only| only.apply().ok()).expect("an allowed processor");
            // SAFETY: takes no pointer.
            let tid = unsafe { syscall!(Sysno::gettid) }.expect("gettid never fails");
            assert_eq!(last_cpu(u32::try_from(tid).expect("an id")), Ok(cpu));
        }
        before.apply().expect("what it was");
    }

    #[test]
    fn a_thread_more_is_counted() {
        let count_with = |more: usize| {
            let barrier = std::sync::Barrier::new(more + 1);
            std::thread::scope(|scope| {
                for _ in 0..more {
                    scope.spawn(|| barrier.wait());
                }
                let count = count().expect("there is /proc");
                barrier.wait();
                count
            })
        };
        // Other tests come and go.
        assert!(count_with(200) > 200);
        assert!(count_with(0) < 200);
    }

    #[test]
    fn a_thread_has_the_nice_value_it_asked_for() {
        std::thread::spawn(|| {
            let before = nice();
            set_nice(before + 1);
            assert_eq!(nice(), (before + 1).min(19));
        })
        .join()
        .expect("a thread");
    }

    static DONE: Event = Event::new();
    static RESULT: AtomicI32 = AtomicI32::new(0);

    extern "C" fn close_all(_: usize) -> ! {
        let closed = crate::fd::close_all_but(&[]).is_ok();
        RESULT.store(if closed { 1 } else { -1 }, Ordering::Release);
        DONE.signal();
        exit()
    }

    #[test]
    fn a_private_table_is_closed_without_the_program_losing_a_descriptor() {
        let file = Fd::open(c"/dev/null", libc::O_RDWR).expect("/dev/null");
        let stack = Mapping::new(64 << 10, c"spmem stack").expect("mmap");
        let top = stack.base().wrapping_add(stack.len());
        // SAFETY: the stack is fresh and kept; `close_all` makes raw system calls only.
        unsafe { spawn(Table::Private, top, close_all, 0) }.expect("clone");
        while RESULT.load(Ordering::Acquire) == 0 {
            let ticket = DONE.ticket();
            if RESULT.load(Ordering::Acquire) == 0 {
                DONE.wait(ticket, Some(10_000_000));
            }
        }
        assert_eq!(RESULT.load(Ordering::Acquire), 1);
        assert_eq!(file.write(b"x"), Ok(1));
        stack.leak();
    }
}
