//! Hurdles: what keeps a forked child from serving its own faults. It is given all its pages by its parent then and runs without a budget.

use core::fmt;

use spmem_sys::Errno;
use spmem_sys::filter::{Need, first_refused};
use spmem_sys::mapping::Mapping;

use crate::control::Target;
use crate::runtime::{Hello, Runtime};

/// What the agent of a forked child must be able to map, where address space or data are limited (setrlimit(2)): the buffers of its threads, what it
/// shares with its encoder, and a few steps of its heap.
const ROOM: usize = 4 << 20;

/// What it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hurdle {
    /// A seccomp filter refuses this call.
    Filter(&'static str),
    /// It is in none of the tree's slots.
    Slot(Errno),
    /// There is no memory for its agent.
    Memory(Errno),
}

/// Looks for one, and takes a slot. With what `spm` has answered, if it had to be asked for that.
pub(crate) fn find(runtime: &Runtime) -> (Option<Hurdle>, Option<Hello>) {
    let has_devices = runtime.shared().targets().any(Target::is_device);
    if let Some(call) = first_refused(Need::Serving { has_devices }) {
        return (Some(Hurdle::Filter(call)), None);
    }
    if let Err(errno) = Mapping::new(ROOM, c"spmem heap") {
        return (Some(Hurdle::Memory(errno)), None);
    }
    match runtime.take_slot() {
        Ok(hello) => (None, hello),
        Err(errno) => (Some(Hurdle::Slot(errno)), None),
    }
}

impl fmt::Display for Hurdle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Filter(call) => write!(f, "a seccomp filter refuses {call}, which its agent needs"),
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
        }
    }
}
