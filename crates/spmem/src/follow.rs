//! Where the handler runs: on the processor whose thread faults, if it is one ([`Following`] decides).
//!
//! A thread that waits for its page leaves its processor idle. There the handler can begin at once, without waking
//! another processor, and the thread goes on with warm caches. With threads that fault on several processors in turn
//! there is no such place, and the scheduler decides.
//!
//! The monitor comes along where an encoder does its heavy work ([`crate::encoder`]): what it does to the page tables is
//! cheap while no other processor runs the process.

use core::sync::atomic::{AtomicI32, Ordering::Relaxed};

use spmem_core::reclaim::{Follow, Following};
use spmem_sys::thread::{Affinity, last_cpu};

/// Binds the calling thread to where the faults are, and says where that is.
pub(crate) struct Follower {
    home: &'static AtomicI32,
    all: Affinity,
    following: Following,
}

impl Follower {
    pub(crate) fn new(home: &'static AtomicI32) -> Self {
        Self { home, all: Affinity::of_caller(), following: Following::default() }
    }

    /// Whether faults come from one processor.
    pub(crate) fn is_bound(&self) -> bool {
        self.following.bound().is_some()
    }

    /// Thread `tid` faults.
    pub(crate) fn note(&mut self, tid: u32) {
        if self.all.count() < 2 || !self.following.is_due() {
            return;
        }
        let Ok(cpu) = last_cpu(tid) else { return };
        match self.following.note(cpu) {
            None => return,
            Some(Follow::LetGo) => {
                let _ = self.all.apply();
            }
            Some(Follow::Bind(cpu)) if Affinity::only(cpu).is_some_and(|only| only.apply().is_ok()) => {}
            Some(Follow::Bind(_)) => self.following.let_go(),
        }
        let home = self.following.bound().and_then(|cpu| i32::try_from(cpu).ok());
        self.home.store(home.unwrap_or(-1), Relaxed);
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
