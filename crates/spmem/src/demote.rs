//! Demotion: the oldest pages of the holding area are encoded, read back, compared and put on node 1; then their RAM
//! is given back.
//!
//! The long part, encoding, runs without the lock on slots that are `Busy`: their pages stay where they are. A page
//! that came back meanwhile keeps what was encoded as a copy. Copies still equal to their page cost no encoding.
//! What cannot be stored goes back to the program (R19); when node 1 is full, demotion stops (R18).

use crate::holding::{Span, State};
use crate::reclaim::BATCH;
use crate::runtime::Runtime;
use crate::table::{Copy, Entry};
use alloc::boxed::Box;
use core::mem::ManuallyDrop;
use core::sync::atomic::Ordering::{self, Relaxed};
use spmem_node::compressed::{Codec, Workspace};
use spmem_node::{Backend, Handle, Page, Stage, Unfit};
use spmem_sys::fd::Fd;
use spmem_sys::mapping;
use spmem_sys::pagemap::Pagemap;
use spmem_sys::uffd::Uffd;
use spmem_sys::{Errno, PAGE};

/// One thread's tools for demotion.
pub struct Demoter {
    runtime: &'static Runtime,
    codec: Codec,
    workspace: Workspace,
    readback: Box<Page>,
    uffd: ManuallyDrop<Uffd>,
    scratch: ManuallyDrop<Uffd>,
    trash: usize,
    pagemap: Option<ManuallyDrop<Pagemap>>,
}

impl Demoter {
    pub(crate) fn new(runtime: &'static Runtime, number: usize) -> Self {
        let codec = Codec::new(runtime.shared().seed.load(Relaxed));
        let borrow = |raw: i32| ManuallyDrop::new(Uffd::from_fd(Fd::from_raw(raw)));
        Self {
            runtime,
            codec,
            workspace: codec.workspace(),
            readback: Box::new([0; PAGE]),
            uffd: borrow(runtime.uffd.load(Ordering::Acquire)),
            scratch: borrow(runtime.scratch.load(Ordering::Acquire)),
            trash: runtime.trash_start.load(Relaxed) + number * BATCH * PAGE,
            pagemap: runtime.shared_pagemap(),
        }
    }

    /// Demotes up to `wanted` pages, the oldest of the holding area; how many pages of RAM became free.
    pub(crate) fn run(&mut self, wanted: usize) -> usize {
        let span = {
            let mut space = self.runtime.space.lock();
            space.as_mut().and_then(|space| space.holding.claim(wanted.min(BATCH) as u32))
        };
        let Some(span) = span else { return 0 };
        let mut freed = 0;
        for slot in span.first..span.first + span.len {
            freed += usize::from(self.demote(slot));
        }
        self.discard(span);
        self.runtime.room_pages.fetch_add(freed as i64, Relaxed);
        self.runtime.freed_pages.fetch_add(freed as u64, Relaxed);
        freed
    }

    /// One slot; whether its page's RAM becomes free.
    fn demote(&mut self, slot: u32) -> bool {
        let runtime = self.runtime;
        let (page, kept) = {
            let space = runtime.space.lock();
            let Some(space) = space.as_ref() else { return false };
            let held = space.holding.get(slot);
            if held.state != State::Busy {
                return false;
            }
            (space.holding.address(slot), held.kept)
        };
        // SAFETY: the slot is busy, so its page stays mapped and unchanged until `discard`: the handler only copies from
        // it, and no other reclaimer has claimed it.
        #[allow(unsafe_code, reason = "a page of the holding area, which is not Rust's memory, is read in place")]
        let page: &Page = unsafe { &*core::ptr::with_exposed_provenance::<Page>(page) };
        if kept.is_some_and(|handle| self.is_still_equal(slot, handle, page)) {
            return true;
        }
        match self.codec.stage(page, &mut self.workspace) {
            Ok(staged) => {
                let mut space = runtime.space.lock();
                let Some(space) = space.as_mut() else { return false };
                let held = space.holding.get(slot);
                if held.state != State::Busy {
                    return true; // dropped meanwhile
                }
                let Ok(handle) = space.store.store(&staged) else {
                    runtime.shared().counters.refused_full.fetch_add(1, Relaxed);
                    space.holding.release(slot);
                    return false;
                };
                if let Some(old) = space.holding.forget_kept(slot) {
                    space.forget(old);
                }
                let is_same_filled = staged.is_same_filled();
                Self::settle(runtime, space, slot, held.owner, handle, false, is_same_filled);
                true
            }
            Err(unfit) => self.give_back(slot, unfit),
        }
    }

    /// A copy from before, still equal: certain, byte for byte.
    fn is_still_equal(&mut self, slot: u32, handle: u64, page: &Page) -> bool {
        let mut space = self.runtime.space.lock();
        let Some(space) = space.as_mut() else { return false };
        let held = space.holding.get(slot);
        let Some(kept) = Handle::from_raw(handle) else { return false };
        // The page may have been dropped, and its copy with it, since the slot was looked at.
        if held.state != State::Busy || held.kept != Some(handle) {
            return held.state != State::Busy;
        }
        if !space.store.same_as(kept, page, &mut self.readback) {
            return false;
        }
        let _ = space.holding.forget_kept(slot);
        Self::settle(self.runtime, space, slot, held.owner, kept, true, false);
        true
    }

    /// The page is on node 1: its slot is dead.
    fn settle(
        runtime: &Runtime,
        space: &mut crate::space::Space<crate::runtime::Cram>,
        slot: u32,
        owner: usize,
        handle: Handle,
        is_clean: bool,
        is_same_filled: bool,
    ) {
        let entry = space.table.get(owner);
        assert!(entry.copy() == Copy::Holding(slot), "a busy slot and its page refer to each other");
        let copy = Copy::Stored(handle.raw());
        if entry.is_away() {
            let counters = &runtime.shared().counters;
            counters.demoted_pages.fetch_add(1, Relaxed);
            counters.clean_pages.fetch_add(u64::from(is_clean), Relaxed);
            counters.same_filled_pages.fetch_add(u64::from(is_same_filled), Relaxed);
            space.table.set(owner, Entry::away(copy, entry.age()));
        } else {
            space.table.set(owner, Entry::present(copy, entry.age()));
        }
        space.holding.kill(slot);
    }

    /// What cannot be stored stays resident (R19): back to the program, not to be tried again soon.
    fn give_back(&mut self, slot: u32, unfit: Unfit) -> bool {
        let runtime = self.runtime;
        if let Unfit::NotReproduced = unfit {
            crate::complain(format_args!("spm: a page did not read back after encoding; it stays resident\n"));
        }
        runtime.shared().counters.refused_incompressible.fetch_add(1, Relaxed);
        let mut space = runtime.space.lock();
        let Some(space) = space.as_mut() else { return false };
        let held = space.holding.get(slot);
        if held.state != State::Busy {
            return true;
        }
        let entry = space.table.get(held.owner);
        if entry.is_away() {
            if !space.is_settled() {
                space.holding.release(slot);
                return false;
            }
            let from = space.holding.address(slot);
            let moved = self.pagemap.as_deref().map(|map| self.uffd.move_present(held.owner, from, PAGE, map));
            let moved = moved.filter(|moved| matches!(moved.stopped, None | Some(Errno::EAGAIN)));
            let progress = moved.unwrap_or_else(|| self.uffd.copy_from(held.owner, from, PAGE));
            // A page that is there already came back some other way.
            if !matches!(progress.stopped, None | Some(Errno::EEXIST)) {
                space.holding.release(slot);
                return false;
            }
        }
        if let Some(old) = space.holding.forget_kept(slot) {
            space.forget(old);
        }
        space.table.set(held.owner, Entry::refused(Copy::None));
        space.holding.kill(slot);
        false
    }

    /// Gives the RAM of the span's dead slots back, and the slots to the ring.
    fn discard(&mut self, span: Span) {
        let runtime = self.runtime;
        let mut first = span.first;
        let end = span.first + span.len;
        while first < end {
            let (from, count) = {
                let space = runtime.space.lock();
                let Some(space) = space.as_ref() else { return };
                let is_dead = |slot: u32| space.holding.get(slot).state == State::BusyDead;
                while first < end && !is_dead(first) {
                    first += 1;
                }
                let count = (first..end).take_while(|&slot| is_dead(slot)).count();
                (space.holding.address(first.min(end - 1)), count)
            };
            if count > 0 {
                let len = count * PAGE;
                let progress = self.scratch.move_pages(self.trash, from, len);
                mapping::discard(self.trash, len);
                if progress.stopped.is_some() {
                    // Shared since a fork, so not to be moved. Dropping in place raises an event: no lock is held here.
                    mapping::discard(from, len);
                }
            }
            first += count as u32;
        }
        if let Some(space) = runtime.space.lock().as_mut() {
            space.holding.finish(span);
        }
    }
}
