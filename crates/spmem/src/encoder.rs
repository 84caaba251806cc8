//! The encoder: a thread of `spm` that reads pages of a managed process, compresses them and hands the encodings back.
//!
//! Why another process: each time a page leaves, the kernel makes the processors that run the process forget where it
//! was (TLB shoot-down), and waits for them. A compressing thread of the process itself would be one of them, and the
//! dearest. Where the encoder works, the process runs on as few processors as its own threads need (ADR 10).
//!
//! An [`Exchange`] is memory that both map. It has lanes; each goes round: the agent fills in addresses and posts it
//! ([`Client::post`]), the encoder reads the pages (/proc/PID/mem, which the agent has opened: nobody gets more by it than he has), writes what became of them and says so
//! ([`serve`]), the agent takes it ([`Client::take`]). An answer is held against the page before that page's RAM is
//! given up (R19). The pages are in slots of the holding area that are `Busy`, so
//! they do not change meanwhile. Nothing depends on an answer: a lane whose answer does not come stays out of use, and
//! the agent encodes by itself.

use crate::dense::DenseLane;
use crate::follow::{Home, Shadow};
use crate::workshop::{Handover, Workshop};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, Ordering::Relaxed};
use spmem_core::reclaim::{ENCODER_IDLE_NS, Spin, answer_sleep_ns};
use spmem_node::compressed::{Codec, DenseStage, DictionaryName, Encoding, Fill, Label, Slot, Verified};
use spmem_node::{Page, Stage, Unfit};
use spmem_sys::fd::Fd;
use spmem_sys::futex::Event;
use spmem_sys::{PAGE, clock, process, thread};

/// Pages of a lane.
pub const LANE_PAGES: usize = 16;
/// One is encoded while the other is taken and filled.
pub const LANES: usize = 2;

/// Nice value of an encoder that encodes: as urgent as the handler, as the program waits for what it has not done.
const URGENT: i32 = -10;

/// States of a lane; it is free in any other.
const POSTED: u32 = 1;
const DONE: u32 = 2;

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was not read: the agent has to see to it.
    Unread,
    /// Encoded, read back and compared.
    Encoded(Label),
    /// It cannot be stored (R19).
    Unfit(Unfit),
}

const UNREAD: u32 = 0;
/// Encoded as an lz4 block.
const LZ4: u32 = 1;
const INCOMPRESSIBLE: u32 = 2;
const NOT_REPRODUCED: u32 = 3;
/// Encoded densely, without a dictionary or with that of the lane.
const DENSE: u32 = 4;
const DENSE_WITH: u32 = 5;

/// What agent and encoder share. Atomics only: zeroed memory is a valid value, and any other as well.
#[repr(C)]
pub struct Exchange {
    posted: Event<true>,
    /// Where the handler of the process is bound.
    pub(crate) home: Home,
    lanes: [Lane; LANES],
    /// See [`crate::dense`].
    pub(crate) dense: DenseLane,
    /// See [`crate::workshop`].
    pub(crate) dictionaries: Handover,
}

#[repr(C, align(64))]
struct Lane {
    state: AtomicU32,
    count: AtomicU32,
    done: Event<true>,
    pages: [Item; LANE_PAGES],
    bytes: [[AtomicU64; PAGE / 8]; LANE_PAGES],
    /// Name of the dictionary that the agent has for the dense encoding, or 0, ...
    dictionary: AtomicU64,
    /// ... and whether the pages are wanted in that: 1.
    wants_dense: AtomicU32,
}

#[repr(C)]
struct Item {
    /// Of the page; 0: leave it.
    address: AtomicU64,
    kind: AtomicU32,
    len: AtomicU32,
    word: AtomicU64,
}

impl Exchange {
    /// Wakes the threads that serve it, to look at their orders.
    pub fn wake(&self) {
        self.posted.signal();
        self.dense.posted.signal();
    }
}

impl Item {
    fn answer(&self, answer: Answer) {
        let (kind, len, word) = match answer {
            Answer::Unread => (UNREAD, 0, 0),
            Answer::Encoded(label) => {
                let kind = match label.encoding {
                    Encoding::Lz4 => LZ4,
                    Encoding::Dense { slot: None, .. } => DENSE,
                    Encoding::Dense { slot: Some(_), .. } => DENSE_WITH,
                };
                (kind, label.len, label.word)
            }
            Answer::Unfit(Unfit::Incompressible { encoded, limit }) => (INCOMPRESSIBLE, encoded, limit as u64),
            Answer::Unfit(Unfit::NotReproduced) => (NOT_REPRODUCED, 0, 0),
        };
        self.kind.store(kind, Relaxed);
        self.len.store(u32::try_from(len).unwrap_or(u32::MAX), Relaxed);
        self.word.store(word, Relaxed);
    }

    /// `slot`: where the agent has the lane's dictionary.
    fn answered(&self, slot: Option<Slot>) -> Answer {
        let (len, word) = (self.len.load(Relaxed) as usize, self.word.load(Relaxed));
        let encoded = |encoding| Answer::Encoded(Label { len, word, encoding });
        match self.kind.load(Relaxed) {
            LZ4 => encoded(Encoding::Lz4),
            DENSE => encoded(Encoding::Dense { slot: None, is_anew: false }),
            DENSE_WITH if slot.is_some() => encoded(Encoding::Dense { slot, is_anew: false }),
            INCOMPRESSIBLE => Answer::Unfit(Unfit::Incompressible { encoded: len, limit: word as usize }),
            NOT_REPRODUCED => Answer::Unfit(Unfit::NotReproduced),
            _ => Answer::Unread,
        }
    }
}

/// Encodes for the process whose /proc/PID/mem `memory` is, until `is_over`; the encoder's thread.
pub fn serve(exchange: &Exchange, workshop: &Workshop, codec: Codec, memory: &Fd, is_over: &AtomicBool) {
    let mut desk = Desk::new(codec, workshop);
    let mut next = 0;
    let mut spin = Spin::new();
    let mut shadow = Shadow::new();
    let nice = thread::nice();
    // Whoever is on the other processors goes before one that gives way to most: the scheduler knows a better place.
    let gives_way = nice > 0;
    loop {
        shadow.avoid(exchange.home.get().filter(|_| !gives_way));
        let lane = &exchange.lanes[next];
        let ticket = exchange.posted.ticket();
        // Acquire pairs with the Release in `Client::post`.
        if lane.state.load(Ordering::Acquire) == POSTED {
            thread::set_nice(URGENT.min(nice));
            desk.encode(lane, memory);
            thread::set_nice(nice);
            // Release: whoever sees it done sees the encodings.
            lane.state.store(DONE, Ordering::Release);
            lane.done.signal();
            next = (next + 1) % LANES;
            continue;
        }
        if is_over.load(Relaxed) {
            return;
        }
        let since = clock::now_ns();
        let is_posted = || lane.state.load(Relaxed) == POSTED;
        let mut now = since;
        while !is_posted() && spin.goes_on(now - since) {
            // Whoever else has work for this processor goes first.
            process::give_way();
            let before = core::mem::replace(&mut now, clock::now_ns());
            spin.gave_way(now - before);
        }
        if !is_posted() {
            exchange.posted.wait(ticket, Some(ENCODER_IDLE_NS));
            spin.woken(clock::now_ns() - since);
        }
    }
}

/// What the encoder works with.
struct Desk<'a> {
    codec: Codec,
    workshop: &'a Workshop,
    workspace: <Codec as Stage>::Workspace,
    /// Made when it is asked for: most processes have few pages that leave.
    dense: Option<DenseStage>,
    pages: Vec<u8>,
}

impl<'a> Desk<'a> {
    fn new(codec: Codec, workshop: &'a Workshop) -> Self {
        let pages = alloc::vec![0; LANE_PAGES * PAGE];
        Self { codec, workshop, workspace: codec.workspace(), dense: None, pages }
    }

    /// Encodes the pages of a lane.
    fn encode(&mut self, lane: &Lane, memory: &Fd) {
        let count = (lane.count.load(Relaxed) as usize).min(LANE_PAGES);
        let mut addresses = [0; LANE_PAGES];
        let mut wanted = 0;
        for item in &lane.pages[..count] {
            item.answer(Answer::Unread);
            if item.address.load(Relaxed) != 0 {
                addresses[wanted] = item.address.load(Relaxed) as usize;
                wanted += 1;
            }
        }
        let read = process::read_pages(memory, &addresses[..wanted], &mut self.pages);
        let wants_dense = lane.wants_dense.load(Relaxed) == 1;
        let slot = if wants_dense { self.prepare(DictionaryName(lane.dictionary.load(Relaxed))) } else { None };
        let mut dense = self.dense.as_mut().filter(|_| wants_dense);
        let items = lane.pages[..count].iter().zip(&lane.bytes);
        let items = items.filter(|(item, _)| item.address.load(Relaxed) != 0);
        let (pages, _) = self.pages.as_chunks::<PAGE>();
        for ((item, bytes), page) in items.zip(&pages[..read]) {
            let page: &Page = page;
            let is_filled = Fill::of(page).is_some();
            let densely = dense.as_mut().filter(|_| !is_filled).and_then(|dense| dense.stage(page, slot));
            // A page that cannot be had so may still be stored.
            let staged = densely.map_or_else(|| self.codec.stage(page, &mut self.workspace), Ok);
            item.answer(match staged {
                Ok(verified) => {
                    let (label, encoding) = verified.to_parcel();
                    put(bytes, encoding);
                    Answer::Encoded(label)
                }
                Err(unfit) => Answer::Unfit(unfit),
            });
        }
        if let Some(page) = pages[..read].first().filter(|page| wants_dense && Fill::of(page).is_none()) {
            self.workshop.offer(page);
        }
    }

    /// Gets the dense stage ready, with that dictionary if it pays. The slot to encode for; the answer says only that there is
    /// one, as the agent knows which.
    fn prepare(&mut self, name: DictionaryName) -> Option<Slot> {
        if self.dense.is_none() {
            self.dense = DenseStage::new(&self.codec);
        }
        let dense = self.dense.as_mut()?;
        if self.workshop.recommended() != Some(name) {
            return None;
        }
        if dense.dictionary() != Some(name) {
            let (_, bytes) = self.workshop.dictionary(&self.codec, name)?;
            dense.set_dictionary(&bytes);
        }
        (dense.dictionary() == Some(name)).then_some(Slot::A)
    }
}

/// Copies `len` bytes out of shared words; what they are is checked where it matters.
pub(crate) fn get(words: &[AtomicU64], bytes: &mut Page, len: usize) {
    let (bytes, _) = bytes.as_chunks_mut::<8>();
    for (bytes, word) in bytes.iter_mut().zip(words).take(len.div_ceil(8)) {
        *bytes = word.load(Relaxed).to_ne_bytes();
    }
}

pub(crate) fn put(words: &[AtomicU64], bytes: &[u8]) {
    let (whole, rest) = bytes.as_chunks::<8>();
    for (word, bytes) in words.iter().zip(whole) {
        word.store(u64::from_ne_bytes(*bytes), Relaxed);
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    if let Some(word) = words.get(whole.len()) {
        word.store(u64::from_ne_bytes(last), Relaxed);
    }
}

/// How pages are to be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// With lz4.
    Lz4,
    /// Densely, with the dictionary of that name if it pays, which the store has in that slot.
    Dense(Option<(Slot, DictionaryName)>),
}

impl Wanted {
    pub(crate) fn dictionary(self) -> Option<(Slot, DictionaryName)> {
        if let Self::Dense(dictionary) = self { dictionary } else { None }
    }
}

/// The agent's side: one reclaimer's.
pub(crate) struct Client {
    exchange: &'static Exchange,
    /// How pages of each lane are wanted.
    wanted: [Wanted; LANES],
    /// Lane to post next; the oldest one that is out is `next - out`.
    next: usize,
    out: usize,
    bytes: alloc::boxed::Box<Page>,
}

impl Client {
    pub(crate) fn new(exchange: &'static Exchange) -> Self {
        Self { exchange, wanted: [Wanted::Lz4; LANES], next: 0, out: 0, bytes: alloc::boxed::Box::new([0; PAGE]) }
    }

    /// Whether a lane is free.
    pub(crate) fn has_room(&self) -> bool {
        self.out < LANES && self.exchange.lanes[self.next].state.load(Ordering::Acquire) != POSTED
    }

    /// Has these pages encoded, on any processor but `home`; 0 stands for one that is not to be.
    pub(crate) fn post(&mut self, addresses: impl Iterator<Item = usize>, home: Option<usize>, wanted: Wanted) {
        self.exchange.home.set(home);
        let lane = &self.exchange.lanes[self.next];
        let mut count = 0;
        for (item, address) in lane.pages.iter().zip(addresses) {
            item.address.store(address as u64, Relaxed);
            count += 1;
        }
        lane.count.store(count, Relaxed);
        lane.wants_dense.store(u32::from(wanted != Wanted::Lz4), Relaxed);
        lane.dictionary.store(wanted.dictionary().map_or(0, |(_, name)| name.0), Relaxed);
        self.wanted[self.next] = wanted;
        // Release: the encoder that sees it posted sees the addresses.
        lane.state.store(POSTED, Ordering::Release);
        self.exchange.posted.signal();
        self.next = (self.next + 1) % LANES;
        self.out += 1;
    }

    /// Number of the oldest lane that is out.
    pub(crate) fn oldest(&self) -> Option<usize> {
        (self.out > 0).then_some((self.next + LANES - self.out) % LANES)
    }

    /// Whether the oldest lane is done.
    pub(crate) fn is_done(&self) -> bool {
        self.oldest().is_some_and(|lane| self.exchange.lanes[lane].state.load(Ordering::Acquire) == DONE)
    }

    /// To wait for the oldest lane with.
    pub(crate) fn waiter(&self) -> Option<Waiter> {
        self.oldest().map(|lane| Waiter { exchange: self.exchange, lane })
    }

    /// The oldest lane is dealt with.
    pub(crate) fn retire(&mut self) {
        self.out -= 1;
    }

    /// Whether the encoder could read none of the pages of a lane that is done.
    pub(crate) fn is_useless(&self, lane: usize) -> bool {
        let Lane { pages, count, .. } = &self.exchange.lanes[lane];
        let wanted = 0..LANE_PAGES.min(count.load(Relaxed) as usize);
        let mut asked = wanted.filter(|&index| pages[index].address.load(Relaxed) != 0).peekable();
        asked.peek().is_some() && asked.all(|index| self.answer(lane, index) == Answer::Unread)
    }

    /// What became of page `index` of a lane that is done.
    pub(crate) fn answer(&self, lane: usize, index: usize) -> Answer {
        let slot = self.dictionary(lane).map(|(slot, _)| slot);
        self.exchange.lanes[lane].pages[index].answered(slot)
    }

    /// The dictionary that was offered with a lane.
    pub(crate) fn dictionary(&self, lane: usize) -> Option<(Slot, DictionaryName)> {
        self.wanted[lane].dictionary()
    }

    /// What a lane that is done says to be `page`, encoded.
    pub(crate) fn take(
        &mut self,
        codec: &Codec,
        (lane, index): (usize, usize),
        label: Label,
        page: &Page,
    ) -> Option<Verified<'_>> {
        let words = &self.exchange.lanes[lane].bytes[index];
        get(words, &mut self.bytes, label.len);
        let dictionary = self.wanted[lane].dictionary().map(|(_, name)| name);
        Verified::from_parcel(codec, label, dictionary, &self.bytes[..], page)
    }
}

/// Waits for a lane.
pub(crate) struct Waiter {
    exchange: &'static Exchange,
    lane: usize,
}

impl Waiter {
    /// Waits until the lane is done: its number. If it does not get done, the agent works by itself until an answer comes.
    pub(crate) fn wait(&self) -> Option<usize> {
        let lane = &self.exchange.lanes[self.lane];
        let since = clock::now_ns();
        loop {
            let ticket = lane.done.ticket();
            if lane.state.load(Ordering::Acquire) == DONE {
                return Some(self.lane);
            }
            lane.done.wait(ticket, Some(answer_sleep_ns(clock::now_ns() - since)?));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
