//! What is out with the encoder: spans of the holding area, each in a lane of [`crate::encoder`]. Under the space's lock.
//!
//! Two see to what comes back. The monitor takes whole lanes ([`crate::demote`]). Where the handler keeps pace (core's
//! `Pace`), it sees to as many pages after each fault as have come in ([`Lanes::keep_pace`]). What a handler may not do it
//! leaves to the monitor: to encode, and to drop memory that may be shared since a fork.

use crate::demote::{self, TRASH_LEN};
use crate::encoder::{Answer, Client, LANE_PAGES, LANES, Waiter, Wanted};
use crate::holding::{Span, State};
use crate::reclaim::HANDLER;
use crate::runtime::{Cram, Runtime};
use crate::space::Space;
use core::mem::ManuallyDrop;
use core::sync::atomic::Ordering::Relaxed;
use spmem_core::reclaim::{Departure, Hurry, Marks, pages_along};
use spmem_core::units::Bytes;
use spmem_node::compressed::Codec;
use spmem_sys::fd::Fd;
use spmem_sys::pagemap::{Pagemap, RUNS, Run};
use spmem_sys::uffd::Uffd;
use spmem_sys::{PAGE, clock, process};

/// For how long the handler takes memory for readable that was a moment ago, ns: its faults may be far between.
const LOOK_NS: u64 = 1_000_000;

/// Slots whose RAM the handler gives back in one turn.
const DISCARD_SLOTS: u32 = LANE_PAGES as u32 / 2;

/// See the module's page.
pub(crate) struct Lanes {
    client: Client,
    codec: Codec,
    hurry: Hurry,
    /// The encoder could read nothing: it is not given any more.
    is_useless: bool,
    /// Oldest first.
    out: [Option<Batch>; LANES],
}

/// A span that is out.
#[derive(Clone, Copy)]
struct Batch {
    span: Span,
    /// How many of its slots have been seen to.
    settled: u32,
    /// How many of those the handler has given the RAM back of.
    discarded: u32,
    /// Pages whose RAM becomes free with it.
    freed: usize,
    /// When the handler last made sure that it can be read, ns.
    looked_ns: u64,
    /// The monitor sees to the rest.
    is_monitors: bool,
}

impl Batch {
    fn is_through(&self) -> bool {
        self.settled == self.span.len
    }
}

/// What the handler moves pages with.
pub(crate) struct Mover<'a> {
    uffd: &'a Uffd,
    scratch: ManuallyDrop<Uffd>,
    pagemap: &'a Pagemap,
    trash: usize,
}

impl<'a> Mover<'a> {
    pub(crate) fn new(runtime: &Runtime, uffd: &'a Uffd, pagemap: &'a Pagemap) -> Self {
        let scratch = ManuallyDrop::new(Uffd::from_fd(Fd::from_raw(runtime.scratch.load(Relaxed))));
        Self { uffd, scratch, pagemap, trash: runtime.trash_start.load(Relaxed) + HANDLER * TRASH_LEN }
    }
}

impl Lanes {
    /// Of a process that has an encoder.
    pub(crate) fn new(runtime: &Runtime) -> Option<Self> {
        let codec = Codec::new(runtime.shared().seed.load(Relaxed));
        let client = Client::new(runtime.exchange()?);
        Some(Self { client, codec, hurry: Hurry::default(), is_useless: false, out: [None; LANES] })
    }

    /// Whether the encoder takes more, or would.
    pub(crate) fn has_room(&self) -> bool {
        self.client.has_room()
    }

    /// Whether the encoder is done with the oldest span.
    pub(crate) fn is_done(&self) -> bool {
        self.client.is_done()
    }

    /// Whether the oldest span is the monitor's.
    pub(crate) fn is_monitors(&self) -> bool {
        self.out[0].is_some_and(|batch| batch.is_monitors)
    }

    /// Whether nothing is out with an encoder that can read nothing.
    pub(crate) fn is_over(&self) -> bool {
        self.is_useless && self.out[0].is_none()
    }

    /// Has up to `wanted` of the oldest pages of the holding area encoded, if a lane is free; how many.
    pub(crate) fn post(&mut self, runtime: &Runtime, space: &mut Space<Cram>, wanted: usize) -> usize {
        let Some(at) = self.out.iter().position(Option::is_none) else { return 0 };
        if self.is_useless || !self.client.has_room() {
            return 0;
        }
        let Some(span) = space.holding.claim(wanted.min(LANE_PAGES) as u32) else { return 0 };
        let mut addresses = [0; LANE_PAGES];
        for (address, slot) in addresses.iter_mut().zip(span.first..span.first + span.len) {
            // To compare an older copy takes as long as to have read back, and would be the handler's.
            if runtime.keeps_pace.load(Relaxed)
                && space.holding.get(slot).state == State::Busy
                && let Some(kept) = space.holding.forget_kept(slot)
            {
                space.forget(kept);
            }
            let held = space.holding.get(slot);
            // An older copy is tried first, by the monitor; and one on trial goes back.
            if held.state == State::Busy && held.kept.is_none() && held.target().is_none() {
                *address = space.holding.address(slot);
            }
        }
        let limit = Bytes(runtime.shared().limit_bytes.load(Relaxed));
        let departure = Departure {
            stored: space.store.payload(),
            room_pages: runtime.room_pages.load(Relaxed),
            scarce_pages: Marks::of(limit).scarce_pages(),
            returned: space.returned.0,
        };
        let wanted = if self.hurry.is_dense(&departure) && space.store.prepare_dense() {
            Wanted::Dense(space.store.newest_dictionary())
        } else {
            Wanted::Lz4
        };
        self.out[at] = Some(Batch { span, settled: 0, discarded: 0, freed: 0, looked_ns: 0, is_monitors: false });
        self.client.post(addresses.into_iter().take(span.len as usize), runtime.home.get(), wanted);
        span.len as usize
    }

    /// The monitor sees to what is left of the oldest span, once its lane is done.
    pub(crate) fn take_over(&mut self) -> Option<(Span, Waiter)> {
        let waiter = self.client.waiter()?;
        let batch = self.out[0].as_mut()?;
        batch.is_monitors = true;
        Some((batch.span, waiter))
    }

    /// Sees to the next slot of the oldest span, with what the encoder made of its page if `lane`, its lane, is done. False if
    /// it was the last. What cannot be stored so has happened to no page: the slot, and why.
    pub(crate) fn settle_next(
        &mut self,
        runtime: &Runtime,
        space: &mut Space<Cram>,
        lane: Option<usize>,
    ) -> Result<bool, (u32, Answer)> {
        let Some(batch) = self.out[0].as_mut().filter(|batch| !batch.is_through()) else { return Ok(false) };
        let (index, slot, is_monitors) =
            (batch.settled as usize, batch.span.first + batch.settled, batch.is_monitors);
        batch.settled += 1;
        // The slot may have another dictionary by now.
        let offered = lane.and_then(|lane| self.client.dictionary(lane));
        let is_readable = offered.is_none_or(|(slot, name)| space.store.has_dictionary(slot, name));
        let answer = lane.filter(|_| is_readable).map_or(Answer::Unread, |lane| self.client.answer(lane, index));
        let Some(page) = demote::busy_page(space, slot) else {
            // Dropped, or come back; what was encoded was to become free.
            batch.freed += usize::from(matches!(answer, Answer::Encoded(_)));
            return Ok(true);
        };
        let (Some(lane), Answer::Encoded(label)) = (lane, answer) else { return Err((slot, answer)) };
        let Some(staged) = self.client.take(&self.codec, (lane, index), label, page) else {
            // The monitor meets it again, where the handler has.
            if is_monitors {
                crate::complain(format_args!(
                    "spm: process {}: page {:#x}: spm has encoded something else; the process encodes it itself\n",
                    process::pid(),
                    space.holding.get(slot).owner
                ));
            }
            return Err((slot, Answer::Unread));
        };
        batch.freed += usize::from(demote::store(runtime, space, slot, &staged));
        Ok(true)
    }

    /// So many more pages' RAM becomes free with the oldest span.
    pub(crate) fn note_freed(&mut self, pages: usize) {
        if let Some(batch) = &mut self.out[0] {
            batch.freed += pages;
        }
    }

    /// Whether the encoder could read nothing of a lane that is done: then it gets no more.
    pub(crate) fn note_useless(&mut self, lane: usize) -> bool {
        self.is_useless |= self.client.is_useless(lane);
        self.is_useless
    }

    /// The oldest span is through: how many pages' RAM becomes free.
    pub(crate) fn retire(&mut self) -> usize {
        self.client.retire();
        self.out.rotate_left(1);
        self.out[LANES - 1].take().map_or(0, |batch| batch.freed)
    }

    /// By the handler, in [`Runtime::try_working`]: sees to as many pages as a fault has brought in, and has as many encoded.
    pub(crate) fn keep_pace(
        &mut self,
        runtime: &Runtime,
        space: &mut Space<Cram>,
        mover: &Mover<'_>,
        brought: usize,
    ) {
        runtime.turns.fetch_add(1, Relaxed);
        let mut due = runtime.due_pages.load(Relaxed) + brought as i64;
        for _ in 0..pages_along(brought, due) {
            let Some(lane) = self.client.oldest().filter(|_| self.client.is_done()) else { break };
            if self.is_monitors() {
                break;
            }
            if !self.settle_one(runtime, space, mover, lane) {
                self.take_over();
                runtime.demand.signal();
                break;
            }
        }
        while due >= LANE_PAGES as i64 {
            match self.post(runtime, space, LANE_PAGES) {
                0 => break,
                posted => due -= posted as i64,
            }
        }
        runtime.due_pages.store(due, Relaxed);
    }

    /// Sees to one slot of the oldest span or, in a turn of its own as it takes longer, gives the RAM of some back. Whether
    /// the handler could.
    fn settle_one(&mut self, runtime: &Runtime, space: &mut Space<Cram>, mover: &Mover<'_>, lane: usize) -> bool {
        let Some(batch) = &mut self.out[0] else { return false };
        let (span, settled) = (batch.span, batch.settled);
        let seen = Span { first: span.first + batch.discarded, len: settled - batch.discarded };
        if batch.is_through() || seen.len >= DISCARD_SLOTS {
            batch.discarded = settled;
            if !demote::discard_dead(&space.holding, seen, &mover.scratch, mover.trash) {
                return false;
            }
            if settled == span.len {
                space.holding.finish(span);
                runtime.free_pages(self.retire());
            }
            return true;
        }
        let now = clock::now_ns();
        if now - batch.looked_ns > LOOK_NS {
            batch.looked_ns = now;
            if has_failed(space, mover.pagemap, span) || self.note_useless(lane) {
                return false;
            }
        }
        match self.settle_next(runtime, space, Some(lane)) {
            Ok(_) => {}
            Err((slot, Answer::Unfit(unfit))) => {
                let freed = demote::give_back(runtime, space, mover.uffd, Some(mover.pagemap), slot, unfit);
                self.note_freed(usize::from(freed));
            }
            Err(_) => {
                // As before: it is the monitor's.
                if let Some(batch) = &mut self.out[0] {
                    batch.settled = settled;
                }
                return false;
            }
        }
        true
    }
}

/// Whether the memory of a slot of the span has failed, or may have: to read it would end the process.
fn has_failed(space: &Space<Cram>, pagemap: &Pagemap, span: Span) -> bool {
    let start = space.holding.address(span.first);
    let mut runs = [Run::default(); RUNS];
    pagemap.scan_gone(start, start + span.len as usize * PAGE, &mut runs) != Ok(0)
}

#[cfg(test)]
mod tests;
