//! What a seccomp filter of the program's does not let through: the agent of a program that is executed under one, or is forked under one,
//! has it, too.
//!
//! Each call is made in a way that changes nothing, and in a process of its own that shares the memory (clone(2) with CLONE_VM): a filter
//! may end whoever makes a call (SECCOMP_RET_KILL_PROCESS, _KILL_THREAD; and SECCOMP_RET_TRAP, since agent threads block signals).
//!
//! Hole: who may make threads and no processes is ended by the attempt, if the filter ends those who try.

use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use syscalls::{Sysno, syscall};

use crate::{Result, process};

const NO_FD: usize = usize::MAX;
/// Behind the last descriptor there can be.
const LAST_FD: usize = u32::MAX as usize;

type Call = (Sysno, [usize; 3]);

/// How the end of the process that tries is waited for.
const WAIT: Call = (Sysno::wait4, [0, 0, usize::MAX]);

/// Without these it cannot ask its parent for anything. Like all that follows with arguments with which a call does nothing.
const NEEDED_TO_ASK: [Call; 4] = [
    (Sysno::socket, [NO_FD, 0, 0]),
    (Sysno::connect, [NO_FD, 0, 0]),
    (Sysno::sendmsg, [NO_FD, 0, 0]),
    (Sysno::recvmsg, [NO_FD, 0, 0]),
];

/// What it takes to serve itself, and children of its own.
const NEEDED_TO_SERVE: [Call; 13] = [
    (Sysno::ioctl, [NO_FD, 0, 0]),
    (Sysno::read, [NO_FD, 0, 0]),
    (Sysno::pread64, [NO_FD, 0, 0]),
    (Sysno::openat, [NO_FD, 0, 0]),
    (Sysno::close_range, [LAST_FD, LAST_FD, 0]),
    (Sysno::ppoll, [0, 1, 0]),
    (Sysno::mmap, [0, 0, 0]),
    (Sysno::mprotect, [0, 0, 0]),
    (Sysno::madvise, [0, 0, 0]),
    (Sysno::bind, [NO_FD, 0, 0]),
    (Sysno::listen, [NO_FD, 0, 0]),
    (Sysno::getsockname, [NO_FD, 0, 0]),
    (Sysno::accept4, [NO_FD, 0, 0]),
];

/// And where pages are on dax devices ([`crate::device`]).
const NEEDED_FOR_DEVICES: [Call; 2] = [(Sysno::pipe2, [0, 0, 0]), (Sysno::write, [NO_FD, 0, 0])];

/// What it makes as well and can do without: to be ended for.
const MADE_ANYWAY: [Call; 13] = [
    (Sysno::chdir, [0, 0, 0]),
    (Sysno::prctl, [usize::MAX, 0, 0]),
    (Sysno::fcntl, [NO_FD, 0, 0]),
    (Sysno::close, [NO_FD, 0, 0]),
    (Sysno::munmap, [0, 0, 0]),
    (Sysno::nanosleep, [0, 0, 0]),
    (Sysno::clock_gettime, [0, 0, 0]),
    (Sysno::getcpu, [0, 0, 0]),
    (Sysno::prlimit64, [0, usize::MAX, 0]),
    (Sysno::setpriority, [usize::MAX, 0, 0]),
    (Sysno::sched_setscheduler, [0, usize::MAX, 0]),
    (Sysno::sched_setaffinity, [0, 0, 0]),
    (Sysno::userfaultfd, [usize::MAX, 0, 0]),
];

/// For what the agent needs calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// To ask its parent, or `spm`.
    Asking,
    /// To serve its own faults.
    Serving {
        /// Pages are on dax devices.
        has_devices: bool,
    },
}

impl Need {
    /// With whether it cannot do without.
    fn calls(self) -> impl Iterator<Item = (&'static Call, bool)> {
        let (calls, more, anyway): (&[Call], &[Call], &[Call]) = match self {
            Self::Asking => (&NEEDED_TO_ASK, &[], &[]),
            Self::Serving { has_devices: false } => (&NEEDED_TO_SERVE, &[], &MADE_ANYWAY),
            Self::Serving { has_devices: true } => (&NEEDED_TO_SERVE, &NEEDED_FOR_DEVICES, &MADE_ANYWAY),
        };
        let needed = calls.iter().chain(more).map(|call| (call, true));
        [(&WAIT, false)].into_iter().chain(needed).chain(anyway.iter().map(|call| (call, false)))
    }
}

/// A call that a filter does not let through, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It fails.
    Fails(&'static str),
    /// Whoever makes it is ended by SIGSYS.
    Ends(&'static str),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fails(call) => write!(f, "a seccomp filter refuses {call}"),
            Self::Ends(call) => write!(f, "a seccomp filter ends whoever calls {call}"),
        }
    }
}

/// What a filter of the calling thread does not let through of the calls needed, the worst first. Costs one system call where there is no
/// filter.
pub fn find_refusal(need: Need) -> Option<Refusal> {
    // SAFETY: takes no pointer.
    let mode = unsafe { syscall!(Sysno::prctl, libc::PR_GET_SECCOMP, 0, 0, 0, 0) };
    if mode == Ok(0) {
        return None;
    }
    let trial = Trial { need, at: AtomicUsize::new(0), refused: AtomicUsize::new(usize::MAX) };
    match run_apart(try_apart, core::ptr::from_ref(&trial).expose_provenance()) {
        // Not to be waited for if that ends who does: it stays a zombie until this process has ended.
        Ok(pid) if trial.at.load(Relaxed) > 0 => wait_for(pid),
        Ok(_) => {}
        // No process can be had.
        Err(_) => trial.run(),
    }
    let name = |index: &AtomicUsize| need.calls().nth(index.load(Relaxed)).map(|((call, _), _)| call.name());
    name(&trial.at).map(Refusal::Ends).or_else(|| name(&trial.refused).map(Refusal::Fails))
}

/// What is tried, how far that is, and what came of it: indices of calls.
struct Trial {
    need: Need,
    /// The one that is made; behind the last one when all have been.
    at: AtomicUsize,
    /// The first one that is needed and failed.
    refused: AtomicUsize,
}

impl Trial {
    fn run(&self) {
        for (index, ((call, arguments), is_needed)) in self.need.calls().enumerate() {
            self.at.store(index, Relaxed);
            if is_refused(*call, arguments) && is_needed {
                let _ = self.refused.compare_exchange(usize::MAX, index, Relaxed, Relaxed);
            }
        }
        self.at.store(usize::MAX, Relaxed);
    }
}

extern "C" fn try_apart(argument: usize) -> ! {
    // No core of it: not into a file, nor, as core(5) has it for this value, into a pipe.
    let limit = [1_u64, 1];
    // SAFETY: the kernel reads the two words.
    let _ = unsafe { syscall!(Sysno::prlimit64, 0, libc::RLIMIT_CORE, limit.as_ptr(), 0) };
    // SAFETY: `find_refusal` passes the address of its trial and waits meanwhile.
    let trial: &Trial = unsafe { &*core::ptr::with_exposed_provenance(argument) };
    trial.run();
    process::exit(0)
}

/// Runs `entry(argument)` in a process that shares this one's memory, on this thread's stack, with all signals blocked, and waits until it
/// uses neither any more; its number. Nobody is told when it has ended: it is to be waited for with `__WALL`.
fn run_apart(entry: extern "C" fn(usize) -> !, argument: usize) -> Result<i32> {
    // As for agent threads ([`crate::thread`]), a tracer does not get it.
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_UNTRACED;
    // SAFETY: as after vfork(2) the child runs below, in a frame that lives on, since this thread waits for it (CLONE_VFORK).
    unsafe { crate::thread::clone(flags, core::ptr::null_mut(), entry, argument) }
}

fn wait_for(pid: i32) {
    // SAFETY: the kernel writes nothing.
    while unsafe { syscall!(Sysno::wait4, pid, 0, libc::__WALL, 0) } == Err(syscalls::Errno::EINTR) {}
}

/// Whether the answer is one that only a filter gives: no descriptor, no range and no address is named that there is.
fn is_refused(call: Sysno, &[a, b, c]: &[usize; 3]) -> bool {
    // SAFETY: the kernel reads and writes nothing: null pointers, or no bytes at them.
    let answer = unsafe { syscall!(call, a, b, c, 0, 0, 0) };
    matches!(answer, Err(syscalls::Errno::EPERM | syscalls::Errno::EACCES | syscalls::Errno::ENOSYS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_tried_is_refused_by_nobody_but_a_filter() {
        for need in [Need::Asking, Need::Serving { has_devices: true }] {
            for ((call, arguments), is_needed) in need.calls() {
                assert!(!is_refused(*call, arguments) || !is_needed, "{call}");
            }
            assert_eq!(find_refusal(need), None);
        }
    }

    /// In a process of its own: a filter stays.
    fn under_filter(call: Sysno, verdict: u32, test: impl FnOnce() -> bool) -> bool {
        let step = |code: u32, jf: u8, k: u32| libc::sock_filter {
            code: u16::try_from(code).expect("a code"),
            jt: 0,
            jf,
            k,
        };
        let mut steps = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, u32::try_from(call.id()).expect("a number")),
            step(libc::BPF_RET | libc::BPF_K, 0, verdict),
            step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: 4, filter: steps.as_mut_ptr() };
        // SAFETY: the child makes system calls and looks at its own memory only.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: takes no pointer.
            let is_bare = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } == 0;
            // SAFETY: the program lives as long as the call.
            let is_set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program) } == 0;
            process::exit(i32::from(!(is_bare && is_set && test())));
        }
        let mut status = -1;
        // SAFETY: the status is ours.
        let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        waited == pid && status == 0
    }

    #[test]
    fn a_filter_that_ends_who_makes_a_call_is_found_out_without_being_ended() {
        let lethal = [libc::SECCOMP_RET_KILL_PROCESS, libc::SECCOMP_RET_KILL_THREAD, libc::SECCOMP_RET_TRAP];
        let serving = Need::Serving { has_devices: false };
        for verdict in lethal {
            for call in [Sysno::madvise, Sysno::chdir, Sysno::wait4] {
                let is_found = || find_refusal(serving) == Some(Refusal::Ends(call.name()));
                assert!(under_filter(call, verdict, is_found), "{call}, {verdict:#x}");
            }
            assert!(under_filter(Sysno::pipe2, verdict, || find_refusal(serving).is_none()), "not needed");
        }
        let fails = libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned();
        assert!(under_filter(Sysno::bind, fails, || find_refusal(serving) == Some(Refusal::Fails("bind"))));
        assert!(under_filter(Sysno::chdir, fails, || find_refusal(serving).is_none()), "it can do without");
    }
}
