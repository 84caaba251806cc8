//! Demotion: the oldest pages of the holding area are encoded, read back, compared and put on node 1; then their RAM
//! is given back.
//!
//! The long part, encoding, runs without the lock on slots that are `Busy`: their pages stay where they are. The
//! monitor has it done by the encoder ([`crate::encoder`]) where there is one; whoever has none does it here. A page
//! that came back meanwhile keeps what was encoded as a copy. Copies still equal to their page cost no encoding.
//! What cannot be stored goes back to the program (R19); when node 1 is full, demotion stops (R18).

use crate::control::NODE_1;
use crate::encoder::{Answer, Client, LANE_PAGES, LANES, Wanted};
use crate::fault::lose_held;
use crate::holding::{Span, State};
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
use spmem_core::reclaim::{BATCH_PAGES, Hurry};
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
    client: Option<Client>,
    hurry: Hurry,
    /// The encoder is not given any more.
    is_useless: bool,
    /// What is out with the encoder, oldest first.
    out: [Option<Span>; LANES],
    pub(crate) placer: Option<Placer>,
    pub(crate) swapper: Option<Swapper>,
    /// Which nodes have had no room a moment ago.
    pub(crate) targets: Targets,
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
            trash: runtime.trash_start.load(Relaxed) + number * TRASH_LEN,
            pagemap: runtime.shared_pagemap(),
            client: (number == 0).then(|| runtime.exchange().map(Client::new)).flatten(),
            hurry: Hurry::default(),
            is_useless: false,
            out: [None; LANES],
            placer: (number == 0).then(|| Placer::new(runtime)).flatten(),
            swapper: (number == 0).then(|| Swapper::new(runtime)).flatten(),
            targets: Targets::default(),
        }
    }

    /// Demotes up to `wanted` pages, the oldest of the holding area; how many pages of RAM became free.
    pub(crate) fn run(&mut self, wanted: usize) -> usize {
        if let Some(freed) = self.send(wanted) {
            return freed;
        }
        if self.client.is_some() {
            let freed = self.run_with_encoder(wanted);
            let does_answer = self.client.as_ref().is_some_and(Client::has_room);
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

    /// Takes what the encoder has done and gives it more.
    fn run_with_encoder(&mut self, wanted: usize) -> usize {
        let mut freed = 0;
        while self.client.as_ref().is_some_and(Client::is_done) {
            freed += self.take_oldest();
        }
        while !self.is_useless
            && self.client.as_ref().is_some_and(Client::has_room)
            && let Some(span) = self.claim(wanted.min(LANE_PAGES))
        {
            self.post(span);
        }
        // Whether there is anything to gain shows only once something was taken.
        while freed == 0 && self.out[0].is_some() {
            freed += self.take_oldest();
        }
        freed
    }

    /// Takes all that is out.
    pub(crate) fn drain(&mut self) {
        while self.out[0].is_some() {
            self.take_oldest();
        }
    }

    fn post(&mut self, span: Span) {
        let mut addresses = [0; LANE_PAGES];
        let wanted = {
            let mut space = self.runtime.space.lock();
            let Some(space) = space.as_mut() else { return };
            for (address, slot) in addresses.iter_mut().zip(span.first..span.first + span.len) {
                let held = space.holding.get(slot);
                // An older copy is tried first, here; and one on trial goes back.
                if held.state == State::Busy && held.kept.is_none() && held.target().is_none() {
                    *address = space.holding.address(slot);
                }
            }
            let room = self.runtime.room_pages.load(Relaxed);
            let is_dense = self.hurry.is_dense(space.store.payload(), room);
            if is_dense && space.store.prepare_dense() {
                Wanted::Dense(space.store.newest_dictionary())
            } else {
                Wanted::Lz4
            }
        };
        let at = self.out.iter().position(Option::is_none);
        if let (Some(client), Some(at)) = (&mut self.client, at) {
            self.out[at] = Some(span);
            client.post(addresses.into_iter().take(span.len as usize), self.runtime.home.get(), wanted);
        }
    }

    /// Stores what the encoder made of the oldest span that is out; what it does not deliver is encoded here. How many
    /// pages of RAM became free.
    fn take_oldest(&mut self) -> usize {
        let (Some(span), Some(client)) = (self.out[0], &self.client) else { return 0 };
        let lane = if client.wait() { client.oldest() } else { None };
        self.is_useless |= lane.is_some_and(|lane| client.is_useless(lane));
        self.pass_over_failed(span);
        let mut freed = 0;
        for first in (0..span.len as usize).step_by(HOLD_SLOTS) {
            let indices = first..(first + HOLD_SLOTS).min(span.len as usize);
            let mut unsettled = [None; HOLD_SLOTS];
            {
                let mut space = self.runtime.space.lock();
                let (Some(space), Some(client)) = (space.as_mut(), &mut self.client) else { return freed };
                // The slot may have another dictionary by now.
                let offered = lane.and_then(|lane| client.dictionary(lane));
                let is_readable = offered.is_none_or(|(slot, name)| space.store.has_dictionary(slot, name));
                for (index, unsettled) in indices.clone().zip(&mut unsettled) {
                    let answer = lane.map_or(Answer::Unread, |lane| client.answer(lane, index));
                    let answer = if is_readable { answer } else { Answer::Unread };
                    let slot = span.first + index as u32;
                    let staged = match (lane, answer, Self::busy_page(space, slot)) {
                        (Some(lane), Answer::Encoded(label), Some(page)) => {
                            client.take(&self.codec, (lane, index), label, page)
                        }
                        (Some(_), Answer::Encoded(_), None) => {
                            freed += 1; // dropped meanwhile
                            continue;
                        }
                        _ => None,
                    };
                    match staged {
                        Some(staged) => freed += usize::from(Self::store(self.runtime, space, slot, &staged)),
                        None => *unsettled = Some((answer, space.holding.get(slot).owner)),
                    }
                }
            }
            for (index, unsettled) in indices.zip(unsettled) {
                let (slot, Some((answer, owner))) = (span.first + index as u32, unsettled) else { continue };
                if let Answer::Encoded(_) = answer {
                    crate::complain(format_args!(
                        "spm: process {}: page {owner:#x}: spm has encoded something else; the process encodes it itself\n",
                        process::pid()
                    ));
                }
                freed += usize::from(match answer {
                    Answer::Unfit(unfit) => self.give_back(slot, unfit),
                    _ => self.demote(slot),
                });
            }
        }
        if let Some(client) = &mut self.client {
            client.retire();
        }
        self.out.rotate_left(1);
        self.out[LANES - 1] = None;
        self.discard(span);
        self.runtime.free_pages(freed);
        if self.is_useless && self.out[0].is_none() {
            self.client = None;
            self.runtime.dismiss_encoder();
        }
        freed
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
            let Some(page) = Self::busy_page(space, slot) else { return false };
            (page, space.holding.get(slot).kept)
        };
        if kept.is_some_and(|handle| self.is_still_equal(slot, handle, page)) {
            return true;
        }
        match self.codec.stage(page, &mut self.workspace) {
            Ok(staged) => {
                let mut space = runtime.space.lock();
                space.as_mut().is_some_and(|space| Self::store(runtime, space, slot, &staged))
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

    /// The page of a slot that is busy, by who has claimed it: to be read until he discards it.
    fn busy_page(space: &Space<Cram>, slot: u32) -> Option<&'static Page> {
        let is_busy = space.holding.get(slot).state == State::Busy;
        let page = core::ptr::with_exposed_provenance::<Page>(space.holding.address(slot));
        // SAFETY: the slot is busy, so its page stays mapped and unchanged until `discard`: the handler only copies from
        // it, and no other reclaimer has claimed it.
        #[allow(unsafe_code, reason = "a page of the holding area, which is not Rust's memory, is read in place")]
        is_busy.then(|| unsafe { &*page })
    }

    /// Puts what was staged of a busy slot's page on node 1; whether the page's RAM becomes free.
    fn store(runtime: &Runtime, space: &mut Space<Cram>, slot: u32, staged: &Verified<'_>) -> bool {
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
        Self::settle(runtime, space, slot, held.owner, handle, false, staged.is_same_filled());
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
        Self::settle(self.runtime, space, slot, held.owner, kept, true, false);
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

    /// What cannot be stored stays resident (R19): back to the program, not to be tried again soon.
    fn give_back(&mut self, slot: u32, unfit: Unfit) -> bool {
        let runtime = self.runtime;
        runtime.shared().counters.refused_incompressible.fetch_add(1, Relaxed);
        let mut space = runtime.space.lock();
        let Some(space) = space.as_mut() else { return false };
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
        runtime.record(Happening::RefuseIncompressible, held.owner, 1);
        space.table.set(held.owner, Entry::refused(Copy::None));
        space.holding.kill(slot);
        false
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
