//! Where the handler runs: on the processor whose thread faults, if it is one ([`Following`] decides).
//!
//! A thread that waits for its page leaves its processor idle. There the handler can begin at once, without waking
//! another processor, and the thread goes on with warm caches. With threads that fault on several processors in turn
//! there is no such place, and the scheduler decides.
//!
//! The monitor comes along where an encoder does its heavy work ([`crate::encoder`]): what it does to the page tables is
//! cheap while no other processor runs the process. And the encoder keeps away: it would take turns with the thread.

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use spmem_core::reclaim::{Follow, Following};
use spmem_sys::thread::{Affinity, last_cpu};

/// A processor, or none: one word, and zeroed memory is a valid value.
#[repr(transparent)]
pub(crate) struct Home(AtomicU32);

impl Home {
    pub(crate) const fn nowhere() -> Self {
        Self(AtomicU32::new(0))
    }

    pub(crate) fn get(&self) -> Option<usize> {
        self.0.load(Relaxed).checked_sub(1).map(|cpu| cpu as usize)
    }

    pub(crate) fn set(&self, cpu: Option<usize>) {
        let cpu = cpu.and_then(|cpu| u32::try_from(cpu + 1).ok());
        self.0.store(cpu.unwrap_or(0), Relaxed);
    }
}

/// Binds the calling thread to where the faults are, and says where that is.
pub(crate) struct Follower {
    home: &'static Home,
    all: Affinity,
    following: Following,
}

impl Follower {
    pub(crate) fn new(home: &'static Home) -> Self {
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
        self.home.set(self.following.bound());
    }
}

/// Binds the calling thread to where the handler is, or to where it is not, as long as the handler is bound.
pub(crate) struct Shadow {
    all: Affinity,
    at: Option<usize>,
}

impl Shadow {
    pub(crate) fn new() -> Self {
        Self { all: Affinity::of_caller(), at: None }
    }

    /// Where the handler is.
    pub(crate) fn follow(&mut self, home: Option<usize>) {
        if home != self.at {
            self.at = home;
            let _ = home.and_then(Affinity::only).unwrap_or(self.all).apply();
        }
    }

    /// Elsewhere, where there is any such place.
    pub(crate) fn avoid(&mut self, home: Option<usize>) {
        if home != self.at {
            self.at = home;
            let others = home.map_or(self.all, |home| self.all.without(home));
            let _ = others.apply().or_else(|_| self.all.apply());
        }
    }
}
