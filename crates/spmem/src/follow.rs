//! Where the handler runs: on the processor whose thread faults, if it is one.
//!
//! A thread that waits for its page leaves its processor idle. There the handler can begin at once, without waking
//! another processor, and the thread goes on with warm caches. With threads that fault on several processors in turn
//! there is no such place, and the scheduler decides.
//!
//! The monitor comes along where an encoder does its heavy work ([`crate::encoder`]): what it does to the page tables is
//! cheap while no other processor runs the process.

use core::sync::atomic::{AtomicI32, Ordering::Relaxed};
use spmem_sys::thread::{Affinity, last_cpu};

/// Every so many faults one is looked at, ...
const EVERY: u32 = 32;
/// ... and so many once the thread is bound: a look opens a file, and faults rarely move.
const EVERY_BOUND: u32 = 256;
/// Looks in a row that have to agree.
const AGREED: u32 = 4;

/// Binds the calling thread to where the faults are, and says where that is.
pub(crate) struct Follower {
    home: &'static AtomicI32,
    all: Affinity,
    faults: u32,
    last: usize,
    /// Looks in a row that found `last`.
    row: u32,
    bound: Option<usize>,
}

impl Follower {
    pub(crate) fn new(home: &'static AtomicI32) -> Self {
        Self { home, all: Affinity::of_caller(), faults: 0, last: 0, row: 0, bound: None }
    }

    /// Whether faults come from one processor.
    pub(crate) fn is_bound(&self) -> bool {
        self.bound.is_some()
    }

    /// Thread `tid` faults.
    pub(crate) fn note(&mut self, tid: u32) {
        self.faults += 1;
        let every = if self.bound.is_some() { EVERY_BOUND } else { EVERY };
        if self.faults < every || self.all.count() < 2 {
            return;
        }
        self.faults = 0;
        let Ok(cpu) = last_cpu(tid) else { return };
        self.row = if cpu == self.last { self.row + 1 } else { 0 };
        self.last = cpu;
        if self.bound.is_some_and(|bound| bound != cpu) {
            let _ = self.all.apply();
            self.bound = None;
            self.home.store(-1, Relaxed);
        } else if self.bound.is_none() && self.row >= AGREED {
            let is_bound = Affinity::only(cpu).is_some_and(|only| only.apply().is_ok());
            self.bound = is_bound.then_some(cpu);
            self.home.store(if is_bound { i32::try_from(cpu).unwrap_or(-1) } else { -1 }, Relaxed);
        }
    }
}

/// Binds the calling thread to where the handler is, as long as it is bound.
pub(crate) struct Shadow {
    all: Affinity,
    at: i32,
}

impl Shadow {
    pub(crate) fn new() -> Self {
        Self { all: Affinity::of_caller(), at: -1 }
    }

    pub(crate) fn follow(&mut self, home: i32) {
        if home == self.at {
            return;
        }
        self.at = home;
        let only = usize::try_from(home).ok().and_then(Affinity::only);
        let _ = only.map_or_else(|| self.all.apply(), |only| only.apply());
    }
}
