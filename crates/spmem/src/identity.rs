//! Identity: by which number, and in which slot of the control page, a process is known.
//!
//! Numbers are those of `spm`'s pid namespace. A process in that namespace knows its own; a child that was forked into another one
//! (unshare(2) with CLONE_NEWPID) has a number there that others have as well, and asks `spm`, whom the kernel tells (SO_PEERCRED in unix(7)).
//!
//! Slots are given back by `spm`. Once it is gone, each process does that for those that have ended ([`Runtime::bury_dead`]).

use core::sync::atomic::Ordering::Relaxed;

use spmem_sys::fd::{Poll, poll};
use spmem_sys::{Errno, Result, process};

use crate::runtime::{Hello, Runtime};

impl Runtime {
    /// In a forked child, in its first agent thread: takes a slot. What `spm` has answered, if it had to be asked.
    ///
    /// # Errors
    /// `ENOSPC` when the tree has too many processes; why `spm` could not be asked.
    pub(crate) fn take_slot(&self) -> Result<Option<Hello>> {
        let shared = self.shared();
        let is_among_others = process::pid_namespace() == Some(shared.pid_namespace.load(Relaxed));
        let hello = if is_among_others { None } else { Some(self.hello_again()?) };
        let number = hello.as_ref().map_or_else(process::pid, |hello| hello.number);
        self.claim(number, is_among_others)?;
        Ok(hello)
    }

    /// Takes the slot of a number.
    pub(crate) fn claim(&self, number: u32, is_among_others: bool) -> Result<()> {
        let shared = self.shared();
        let (slot, is_new) = shared.claim_slot(number).ok_or(Errno(libc::ENOSPC))?;
        if is_new {
            shared.counters.processes.fetch_add(1, Relaxed);
        }
        self.slot.store(slot, Relaxed);
        self.number.store(number, Relaxed);
        self.is_among_others.store(is_among_others, Relaxed);
        Ok(())
    }

    /// This process is none of those that are counted any more.
    pub(crate) fn give_slot_back(&self) {
        let number = self.number.swap(0, Relaxed);
        if number != 0 {
            self.shared().release_slot(number);
        }
    }

    /// Gives the slots of processes that have ended back, where `spm` is gone and this process can tell. O(slots).
    pub(crate) fn bury_dead(&self) {
        if !self.is_among_others.load(Relaxed) || !self.is_spm_gone() {
            return;
        }
        for slot in self.shared().live_slots() {
            let number = slot.pid.load(Relaxed);
            if number != 0 && !process::exists(number) {
                self.shared().release_slot(number);
            }
        }
    }

    fn is_spm_gone(&self) -> bool {
        let socket = self.socket.load(Relaxed);
        let mut entry = [Poll { fd: socket, events: 0, revents: 0 }];
        socket < 0 || poll(&mut entry, Some(0)).is_ok_and(|ready| ready > 0)
    }
}
