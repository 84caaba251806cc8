//! Hurdles: what keeps a forked child from serving its own faults. It is given all its pages by its parent then and runs without a budget.

use core::fmt;

use spmem_sys::Errno;
use spmem_sys::filter::{Need, Refusal, find_refusal};
use spmem_sys::mapping::Mapping;

use crate::control::Target;
use crate::runtime::{Hello, Runtime};

/// What the agent of a forked child must be able to map, where address space or data are limited (setrlimit(2)): the buffers of its threads, what it
/// shares with its encoder, and a few steps of its heap.
const ROOM: usize = 4 << 20;

/// What it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hurdle {
    /// A seccomp filter does not let a call through.
    Filter(Refusal),
    /// It is in none of the tree's slots.
    Slot(Errno),
    /// There is no memory for its agent.
    Memory(Errno),
    /// Its agent cannot have a thread.
    Thread(Errno),
}

/// What a seccomp filter of the calling thread does not let through of all that an agent does.
pub(crate) fn find_filter(runtime: &Runtime) -> Option<Refusal> {
    find_refusal(Need::Serving { has_devices: runtime.shared().targets().any(Target::is_device) })
}

/// Looks for one, starts the handler, and takes a slot. With what `spm` has answered, if it had to be asked for that.
pub(crate) fn find(runtime: &'static Runtime, filter: Option<Refusal>) -> (Option<Hurdle>, Option<Hello>) {
    if let Some(refusal) = filter {
        return (Some(Hurdle::Filter(refusal)), None);
    }
    if let Err(errno) = Mapping::new(ROOM, c"spmem heap") {
        return (Some(Hurdle::Memory(errno)), None);
    }
    if let Err(errno) = runtime.start_handler() {
        return (Some(Hurdle::of_thread(errno)), None);
    }
    match runtime.take_slot() {
        Ok(hello) => (None, hello),
        Err(errno) => (Some(Hurdle::Slot(errno)), None),
    }
}

impl Hurdle {
    /// Why a thread, or the memory that it takes, cannot be had.
    pub(crate) fn of_thread(errno: Errno) -> Self {
        if errno == Errno::ENOMEM { Self::Memory(errno) } else { Self::Thread(errno) }
    }
}

impl fmt::Display for Hurdle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Filter(refusal) => write!(f, "{refusal}, which its agent needs"),
            Self::Slot(Errno(libc::ENOSPC)) => f.write_str("the run has too many processes"),
            Self::Slot(errno) => {
                write!(
                    f,
                    "spm has not told it its number ({errno}), as it must in another pid namespace or without /proc"
                )
            }
            Self::Memory(errno) => {
                write!(f, "there is no memory for its agent ({errno}), as under RLIMIT_AS or RLIMIT_DATA")
            }
            Self::Thread(errno) => {
                write!(
                    f,
                    "its agent cannot have a thread ({errno}), as under RLIMIT_NPROC or pids.max of its cgroup"
                )
            }
        }
    }
}
