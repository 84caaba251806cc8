//! Demotion: the oldest pages of the holding area are encoded, read back, compared and put on node 1; then their RAM
//! is given back.
//!
//! The long part, encoding, runs without the lock on slots that are `Busy`: their pages stay where they are. The
//! monitor has it done by the encoder ([`crate::lanes`]) where there is one; whoever has none does it here. A page
//! that came back meanwhile keeps what was encoded as a copy. Copies still equal to their page cost no encoding.
//! What cannot be stored goes back to the program (R19); when node 1 is full, demotion stops (R18).

use crate::control::NODE_1;
use crate::encoder::{Answer, LANES};
use crate::fault::lose_held;
use crate::holding::{Holding, Span, State};
use crate::lanes::Lanes;
use crate::place::Placer;
use crate::recorder::Happening;
use crate::runtime::{Cram, Runtime};
use crate::space::Space;
use crate::swap::Swapper;
use crate::table::{Copy, Entry};
use alloc::boxed::Box;
use core::mem::ManuallyDrop;
use core::sync::atomic::Ordering::{self, Relaxed};
use spmem_core::placing::Targets;
use spmem_core::reclaim::BATCH_PAGES;
use spmem_node::compressed::{Codec, Verified, Workspace};
use spmem_node::{Backend, Handle, Page, Stage, Unfit};
use spmem_sys::fd::Fd;
use spmem_sys::mapping;
use spmem_sys::pagemap::{Pagemap, RUNS, Run};
use spmem_sys::uffd::Uffd;
use spmem_sys::{Errno, PAGE, process};

/// Where a reclaimer throws pages away: address space for one batch, bytes.
pub(crate) const TRASH_LEN: usize = BATCH_PAGES as usize * PAGE;
/// Encodings stored under one hold of the lock: a fault may have to wait for it.
const HOLD_SLOTS: usize = 8;

/// One thread's tools for demotion.
pub struct Demoter {
    pub(crate) runtime: &'static Runtime,
    codec: Codec,
    workspace: Workspace,
    readback: Box<Page>,
    pub(crate) uffd: ManuallyDrop<Uffd>,
    scratch: ManuallyDrop<Uffd>,
    trash: usize,
    pub(crate) pagemap: Option<ManuallyDrop<Pagemap>>,
    /// The one that has to do with the encoder.
    is_monitor: bool,
    pub(crate) placer: Option<Placer>,
    pub(crate) swapper: Option<Swapper>,
    /// Which nodes have had no room a moment ago.
    pub(crate) targets: Targets,
}

impl Demoter {
    pub(crate) fn new(runtime: &'static Runtime, number: usize) -> Self {
        let codec = Codec::new(runtime.shared().seed.load(Relaxed));
        let borrow = |raw: i32| ManuallyDrop::new(Uffd::from_fd(Fd::from_raw(raw)));
        let is_monitor = number == 0;
        if is_monitor && let Some(space) = runtime.space.lock().as_mut() {
            space.lanes = Lanes::new(runtime).map(Box::new);
        }
        Self {
            runtime,
            codec,
            workspace: codec.workspace(),
            readback: Box::new([0; PAGE]),
            uffd: borrow(runtime.uffd.load(Ordering::Acquire)),
            scratch: borrow(runtime.scratch.load(Ordering::Acquire)),
            trash: runtime.trash_start.load(Relaxed) + number * TRASH_LEN,
            pagemap: runtime.shared_pagemap(),
            is_monitor,
            placer: is_monitor.then(|| Placer::new(runtime)).flatten(),
            swapper: is_monitor.then(|| Swapper::new(runtime)).flatten(),
            targets: Targets::default(),
        }
    }

    /// Demotes up to `wanted` pages, the oldest of the holding area; how many pages of RAM became free.
    pub(crate) fn run(&mut self, wanted: usize) -> usize {
        if let Some(freed) = self.send(wanted) {
            return freed;
        }
        if self.is_monitor && self.runtime.exchange().is_some() {
            let freed = self.run_with_encoder(wanted);
            let does_answer = self.with_lanes(|lanes, _| lanes.has_room()) == Some(true);
            self.runtime.is_encoder_late.store(!does_answer, Relaxed);
            if freed > 0 || does_answer {
                return freed;
            }
        }
        let span = self.claim(wanted.min(BATCH_PAGES as usize));
        let Some(span) = span else { return 0 };
        let mut freed = 0;
        for slot in span.first..span.first + span.len {
            freed += usize::from(self.demote(slot));
        }
        self.discard(span);
        self.runtime.free_pages(freed);
        freed
    }

    pub(crate) fn claim(&self, wanted: usize) -> Option<Span> {
        let mut space = self.runtime.space.lock();
        space.as_mut().and_then(|space| space.holding.claim(wanted as u32))
    }

    /// Works on what is out with the encoder, where there is one.
    pub(crate) fn with_lanes<T>(&self, work: impl FnOnce(&mut Lanes, &mut Space<Cram>) -> T) -> Option<T> {
        let mut space = self.runtime.space.lock();
        let space = space.as_mut().filter(|_| self.is_monitor)?;
        let mut lanes = space.lanes.take()?;
        let result = work(&mut lanes, space);
        space.lanes = Some(lanes);
        Some(result)
    }

    /// Takes what the encoder has done and gives it more.
    fn run_with_encoder(&mut self, wanted: usize) -> usize {
        let runtime = self.runtime;
        let mut freed = 0;
        while self.with_lanes(|lanes, _| lanes.is_done()) == Some(true) {
            freed += self.take_oldest().unwrap_or(0);
        }
        while self.with_lanes(|lanes, space| lanes.post(runtime, space, wanted)).is_some_and(|posted| posted > 0) {
        }
        // Whether there is anything to gain shows only once something was taken.
        for _ in 0..LANES {
            if freed > 0 {
                break;
            }
            freed += self.take_oldest().unwrap_or(0);
        }
        freed
    }

    /// Takes what the handler has left to the monitor.
    pub(crate) fn take_left(&mut self) {
        while self.with_lanes(|lanes, _| lanes.is_monitors()) == Some(true) {
            self.take_oldest();
        }
    }

    /// Takes all that is out; not what the handler gives out meanwhile.
    pub(crate) fn drain(&mut self) {
        for _ in 0..LANES {
            if self.take_oldest().is_none() {
                break;
            }
        }
    }

    /// Stores what the encoder made of the oldest span that is out; what it does not deliver is encoded here. How many
    /// pages of RAM became free; `None` if nothing is out.
    fn take_oldest(&mut self) -> Option<usize> {
        let runtime = self.runtime;
        let (span, waiter) = self.with_lanes(|lanes, _| lanes.take_over())??;
        let lane = waiter.wait();
        self.pass_over_failed(span);
        if let Some(lane) = lane {
            self.with_lanes(|lanes, _| lanes.note_useless(lane));
        }
        let mut is_through = false;
        while !is_through {
            let mut unsettled = [None; HOLD_SLOTS];
            is_through = self.with_lanes(|lanes, space| {
                unsettled.iter_mut().any(|unsettled| match lanes.settle_next(runtime, space, lane) {
                    Ok(is_more) => !is_more,
                    Err(why) => {
                        *unsettled = Some(why);
                        false
                    }
                })
            })?;
            for (slot, answer) in unsettled.into_iter().flatten() {
                let freed = match answer {
                    Answer::Unfit(unfit) => self.give_back(slot, unfit),
                    _ => self.demote(slot),
                };
                self.with_lanes(|lanes, _| lanes.note_freed(usize::from(freed)));
            }
        }
        let freed = self.with_lanes(|lanes, _| lanes.retire())?;
        self.discard(span);
        runtime.free_pages(freed);
        if self.with_lanes(|lanes, _| lanes.is_over()) == Some(true) {
            if let Some(space) = runtime.space.lock().as_mut() {
                space.lanes = None;
            }
            runtime.dismiss_encoder();
        }
        Some(freed)
    }

    /// One slot; whether its page's RAM becomes free.
    pub(crate) fn demote(&mut self, slot: u32) -> bool {
        let runtime = self.runtime;
        if self.end_trial(slot, State::Busy) || self.has_failed(slot) {
            return false;
        }
        let (page, kept) = {
            let space = runtime.space.lock();
            let Some(space) = space.as_ref() else { return false };
            let Some(page) = busy_page(space, slot) else { return false };
            (page, space.holding.get(slot).kept)
        };
        if kept.is_some_and(|handle| self.is_still_equal(slot, handle, page)) {
            return true;
        }
        match self.codec.stage(page, &mut self.workspace) {
            Ok(staged) => {
                let mut space = runtime.space.lock();
                space.as_mut().is_some_and(|space| store(runtime, space, slot, &staged))
            }
            Err(unfit) => self.give_back(slot, unfit),
        }
    }

    /// Slots of a span whose memory has failed are dead, their pages lost, before any is read.
    fn pass_over_failed(&self, span: Span) {
        let start = self.runtime.space.lock().as_ref().map(|space| space.holding.address(span.first));
        let (Some(start), Some(pagemap)) = (start, self.pagemap.as_deref()) else { return };
        let mut runs = [Run::default(); RUNS];
        let count = pagemap.scan_gone(start, start + span.len as usize * PAGE, &mut runs).unwrap_or(0);
        for run in &runs[..count] {
            for at in (run.start as usize..run.end as usize).step_by(PAGE) {
                self.has_failed(span.first + ((at - start) / PAGE) as u32);
            }
        }
    }

    /// Whether the memory of a busy slot's page has failed: to read it would end the process. Then the page is lost.
    fn has_failed(&self, slot: u32) -> bool {
        let runtime = self.runtime;
        // A slot that is not busy may have no page: to look at it would be a fault, which waits for room.
        let address = runtime.space.lock().as_ref().and_then(|space| {
            let is_busy = space.holding.get(slot).state == State::Busy;
            is_busy.then(|| space.holding.address(slot))
        });
        if !address.is_some_and(|at| mapping::populate_read(at, PAGE) == Err(Errno::EHWPOISON)) {
            return false;
        }
        let Some(space) = &mut *runtime.space.lock() else { return true };
        let held = space.holding.get(slot);
        if held.state != State::Busy {
            return true; // dropped meanwhile
        }
        let entry = space.table.get(held.owner);
        if entry.is_away() {
            if !space.is_settled() || lose_held(runtime, space, &self.uffd, slot).is_err() {
                space.holding.release(slot);
            }
            return true;
        }
        // It came back before: what has failed is a copy.
        if let Some(kept) = space.holding.forget_kept(slot) {
            space.forget(kept);
        }
        space.table.set(held.owner, Entry::present(Copy::None, entry.age()));
        space.holding.kill(slot);
        true
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
        let readback = &mut self.readback;
        if !self.runtime.reading(held.owner, NODE_1, || space.store.same_as(kept, page, readback)) {
            return false;
        }
        let _ = space.holding.forget_kept(slot);
        settle(self.runtime, space, slot, held.owner, kept, true, false);
        true
    }

    /// As the function of that name.
    fn give_back(&self, slot: u32, unfit: Unfit) -> bool {
        let mut space = self.runtime.space.lock();
        let Some(space) = space.as_mut() else { return false };
        give_back(self.runtime, space, &self.uffd, self.pagemap.as_deref(), slot, unfit)
    }

    /// Gives the RAM of the span's dead slots back, and the slots to the ring.
    pub(crate) fn discard(&self, span: Span) {
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

/// Puts what was staged of a busy slot's page on node 1; whether the page's RAM becomes free.
pub(crate) fn store(runtime: &Runtime, space: &mut Space<Cram>, slot: u32, staged: &Verified<'_>) -> bool {
    let held = space.holding.get(slot);
    if held.state != State::Busy {
        return true; // dropped meanwhile
    }
    // What other processes have stored counts too; it was looked at a moment ago.
    let is_full = runtime.is_node_full.load(Relaxed) && !staged.is_same_filled();
    let stored =
        if is_full { None } else { runtime.reading(held.owner, NODE_1, || space.store.store(staged).ok()) };
    let Some(handle) = stored else {
        runtime.shared().counters.refused_full.fetch_add(1, Relaxed);
        space.holding.release(slot);
        return false;
    };
    if let Some(old) = space.holding.forget_kept(slot) {
        space.forget(old);
    }
    runtime.record(Happening::Demote, held.owner, staged.to_parcel().0.len as u64);
    settle(runtime, space, slot, held.owner, handle, false, staged.is_same_filled());
    true
}

/// The page is on node 1: its slot is dead.
fn settle(
    runtime: &Runtime,
    space: &mut Space<Cram>,
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
        counters.dense_pages.fetch_add(u64::from(!is_clean && Cram::is_dense(handle)), Relaxed);
        space.table.set(owner, Entry::away(copy, entry.age()));
    } else {
        space.table.set(owner, Entry::present(copy, entry.age()));
    }
    space.holding.kill(slot);
}

/// What cannot be stored stays resident (R19): back to the program, not to be tried again soon. Whether RAM becomes free all the same.
pub(crate) fn give_back(
    runtime: &Runtime,
    space: &mut Space<Cram>,
    uffd: &Uffd,
    pagemap: Option<&Pagemap>,
    slot: u32,
    unfit: Unfit,
) -> bool {
    runtime.shared().counters.refused_incompressible.fetch_add(1, Relaxed);
    let held = space.holding.get(slot);
    if held.state != State::Busy {
        return true;
    }
    if let Unfit::NotReproduced = unfit {
        crate::complain(format_args!(
            "spm: process {}: page {:#x} did not read back after encoding for node 1; it stays resident\n",
            process::pid(),
            held.owner
        ));
    }
    let entry = space.table.get(held.owner);
    if entry.is_away() {
        if !space.is_settled() {
            space.holding.release(slot);
            return false;
        }
        let from = space.holding.address(slot);
        let moved = pagemap.map(|map| uffd.move_present(held.owner, from, PAGE, map));
        let moved = moved.filter(|moved| matches!(moved.stopped, None | Some(Errno::EAGAIN)));
        let progress = moved.unwrap_or_else(|| uffd.copy_from(held.owner, from, PAGE));
        // A page that is there already came back some other way.
        if !matches!(progress.stopped, None | Some(Errno::EEXIST)) {
            space.holding.release(slot);
            return false;
        }
    }
    if let Some(old) = space.holding.forget_kept(slot) {
        space.forget(old);
    }
    runtime.record(Happening::RefuseIncompressible, held.owner, 1);
    space.table.set(held.owner, Entry::refused(Copy::None));
    space.holding.kill(slot);
    // What had come back by itself was a second page.
    !entry.is_away()
}

/// The page of a slot that is busy, by who has claimed it: to be read until he discards it.
pub(crate) fn busy_page(space: &Space<Cram>, slot: u32) -> Option<&'static Page> {
    let is_busy = space.holding.get(slot).state == State::Busy;
    let page = core::ptr::with_exposed_provenance::<Page>(space.holding.address(slot));
    // SAFETY: the slot is busy, so its page stays mapped and unchanged until `discard`: the handler only copies from
    // it, and no other reclaimer has claimed it.
    #[allow(unsafe_code, reason = "a page of the holding area, which is not Rust's memory, is read in place")]
    is_busy.then(|| unsafe { &*page })
}

/// Under the lock, by the handler: gives the RAM of a span's dead slots back. Whether all of it: what is shared since a
/// fork cannot be moved, and is not for a thread to drop that would have to read of it.
pub(crate) fn discard_dead(holding: &Holding, span: Span, scratch: &Uffd, trash: usize) -> bool {
    let end = span.first + span.len;
    let is_dead = |slot: &u32| holding.get(*slot).state == State::BusyDead;
    let mut first = span.first;
    while let Some(from) = (first..end).find(is_dead) {
        let count = (from..end).take_while(is_dead).count();
        let progress = scratch.move_pages(trash, holding.address(from), count * PAGE);
        mapping::discard(trash, count * PAGE);
        if progress.stopped.is_some() {
            return false;
        }
        first = from + count as u32;
    }
    true
}
