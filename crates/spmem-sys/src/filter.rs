//! What a seccomp filter of the program's refuses: the agent of a forked child has the filter of the thread that forked.
//!
//! Each call is made in a way that changes nothing. A filter that ends the process instead of refusing would do so at the call
//! itself, too.

use syscalls::{Sysno, syscall};

const NO_FD: usize = usize::MAX;
/// Behind the last descriptor there can be.
const LAST_FD: usize = u32::MAX as usize;

type Call = (Sysno, [usize; 3]);

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

/// For what the agent of a forked child needs calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// To ask its parent.
    Asking,
    /// To serve its own faults.
    Serving {
        /// Pages are on dax devices.
        has_devices: bool,
    },
}

impl Need {
    fn calls(self) -> impl Iterator<Item = &'static Call> {
        let (calls, more): (&[Call], &[Call]) = match self {
            Self::Asking => (&NEEDED_TO_ASK, &[]),
            Self::Serving { has_devices: false } => (&NEEDED_TO_SERVE, &[]),
            Self::Serving { has_devices: true } => (&NEEDED_TO_SERVE, &NEEDED_FOR_DEVICES),
        };
        calls.iter().chain(more)
    }
}

/// The first of the calls needed that a filter of the calling thread refuses, by its name. Costs one system call where there is
/// no filter.
pub fn first_refused(need: Need) -> Option<&'static str> {
    // SAFETY: takes no pointer.
    let mode = unsafe { syscall!(Sysno::prctl, libc::PR_GET_SECCOMP, 0, 0, 0, 0) };
    if mode == Ok(0) {
        return None;
    }
    need.calls().find(|(call, arguments)| is_refused(*call, arguments)).map(|(call, _)| call.name())
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
            for (call, arguments) in need.calls() {
                assert!(!is_refused(*call, arguments), "{call}");
            }
            assert_eq!(first_refused(need), None);
        }
    }
}
