//! Hurdles: what keeps a forked child from serving its own faults. It is given all its pages by its parent then and runs without a budget.

use core::fmt;

use spmem_sys::Errno;
use spmem_sys::filter::{Need, first_refused};

use crate::control::Target;
use crate::runtime::{Hello, Runtime};

/// What it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hurdle {
    /// A seccomp filter refuses this call.
    Filter(&'static str),
    /// It is in none of the tree's slots.
    Slot(Errno),
}

/// Looks for one, and takes a slot. With what `spm` has answered, if it had to be asked for that.
pub(crate) fn find(runtime: &Runtime) -> (Option<Hurdle>, Option<Hello>) {
    let has_devices = runtime.shared().targets().any(Target::is_device);
    if let Some(call) = first_refused(Need::Serving { has_devices }) {
        return (Some(Hurdle::Filter(call)), None);
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
        }
    }
}
