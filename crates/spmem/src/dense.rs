//! Density: pages that stay cold on node 1 are encoded once more, smaller, by a thread of `spm` that runs while nobody else
//! wants its processor; blocks of the store that ran half empty are emptied.
//!
//! The monitor's [`Densifier`] goes round the table at a pace of `spmem_core::reclaim`'s, copies the encodings of cold pages
//! into its lane of the exchange, and puts what comes back in their place ([`spmem_node::compressed::Store::densify`]): under the space's lock, one
//! page at a time, after the store has read both and compared them. So nothing depends on what `spm` sends: an answer that
//! is wrong, late, or about a page that has moved on changes nothing.
//!
//! `spm`'s side is [`serve`]. The dictionaries are [`crate::workshop`]'s.

use crate::control::NODE_1;
use crate::encoder::{Exchange, get, put};
use crate::runtime::{Cram, Runtime};
use crate::space::{Mode, Space};
use crate::table::{CHUNK, CHUNK_PAGES, Copy};
use crate::workshop::{Handover, Workshop};
use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, Ordering::Relaxed};
use spmem_core::reclaim::{self, DENSE_PAGES, ENCODER_IDLE_NS, LOOK_ENTRIES, Payoff, Rounds, Stay, Turnover};
use spmem_node::compressed::{
    Codec, Dense, DenseEncoder, DictionaryName, Encoding, Kept, Label, MAX_PAYLOAD_BYTES, Original, Slot,
};
use spmem_node::{Handle, Page};
use spmem_sys::futex::Event;
use spmem_sys::{PAGE, clock, thread};

/// A page that is moved within the store takes as long as so many that are looked at: a fault may have to wait for it.
const MOVE_LOOKS: usize = 32;

/// States of the lane; it is free in any other.
const POSTED: u32 = 1;
const DONE: u32 = 2;

/// Kinds of an item: what the agent sent, ...
const ORIGINAL: u32 = 1;
/// ... nothing was made of it, ...
const NONE: u32 = 0;
/// ... or this, without a dictionary or with one of two.
const PLAIN: u32 = 2;
const WITH: [u32; 2] = [3, 4];

/// The part of the exchange that is about density. Atomics only.
#[repr(C, align(64))]
pub(crate) struct DenseLane {
    state: AtomicU32,
    count: AtomicU32,
    pub(crate) posted: Event<true>,
    items: [Item; DENSE_PAGES],
    bytes: [[AtomicU64; PAGE / 8]; DENSE_PAGES],
}

#[repr(C)]
struct Item {
    kind: AtomicU32,
    len: AtomicU32,
    word: AtomicU64,
}

#[cfg(test)]
impl DenseLane {
    pub(crate) fn new() -> Self {
        let item = || Item { kind: AtomicU32::new(0), len: AtomicU32::new(0), word: AtomicU64::new(0) };
        Self {
            state: AtomicU32::new(0),
            count: AtomicU32::new(0),
            posted: Event::new(),
            items: core::array::from_fn(|_| item()),
            bytes: [const { [const { AtomicU64::new(0) }; PAGE / 8] }; DENSE_PAGES],
        }
    }
}

/// Encodes densely until `is_over`: a thread of `spm`, for one process.
pub fn serve(exchange: &Exchange, workshop: &Workshop, codec: Codec, is_over: &AtomicBool) {
    thread::be_idle();
    let lane = &exchange.dense;
    // Most processes never have a page that is cold for so long.
    let mut maker = None;
    loop {
        let ticket = lane.posted.ticket();
        // Acquire pairs with the Release in `Densifier::look`.
        if lane.state.load(Ordering::Acquire) == POSTED {
            maker.get_or_insert_with(|| Maker::new(codec)).work(lane, workshop, is_over);
            // Release: whoever sees it done sees the encodings.
            lane.state.store(DONE, Ordering::Release);
        } else if is_over.load(Relaxed) {
            return;
        } else {
            lane.posted.wait(ticket, Some(ENCODER_IDLE_NS));
        }
    }
}

/// What the thread of `spm` works with.
struct Maker {
    codec: Codec,
    encoder: DenseEncoder,
    /// The dictionary that the encoder has, and its slot.
    dictionary: Option<(Slot, DictionaryName)>,
}

impl Maker {
    fn new(codec: Codec) -> Self {
        Self { codec, encoder: DenseEncoder::new(&codec), dictionary: None }
    }

    fn work(&mut self, lane: &DenseLane, workshop: &Workshop, is_over: &AtomicBool) {
        let slot = self.slot(workshop);
        let count = (lane.count.load(Relaxed) as usize).min(DENSE_PAGES);
        for (index, (item, words)) in lane.items.iter().zip(&lane.bytes).take(count).enumerate() {
            let kind = item.kind.swap(NONE, Relaxed);
            let mut bytes = [0; PAGE];
            let len = item.len.load(Relaxed) as usize;
            if is_over.load(Relaxed) || kind != ORIGINAL || len > MAX_PAYLOAD_BYTES {
                continue;
            }
            get(words, &mut bytes, len);
            let label = Label { len, word: item.word.load(Relaxed), encoding: Encoding::Lz4 };
            let mut page = [0; PAGE];
            if !(Original { label, bytes: &bytes[..len] }).read(&self.codec, &mut page) {
                continue;
            }
            if index == 0 {
                workshop.offer(&page);
            }
            if let Some(dense) = self.encoder.encode(&page, slot) {
                put(words, dense.bytes);
                item.len.store(dense.bytes.len() as u32, Relaxed);
                item.kind.store(dense.slot.map_or(PLAIN, |slot| WITH[usize::from(slot == Slot::B)]), Relaxed);
            }
        }
    }

    /// Where the process has the dictionary that pays, if it has it and the encoder does.
    fn slot(&mut self, workshop: &Workshop) -> Option<Slot> {
        let name = workshop.recommended()?;
        if self.dictionary.is_none_or(|(_, own)| own != name) {
            let (slot, bytes) = workshop.dictionary(&self.codec, name)?;
            self.dictionary = self.encoder.set_dictionary(slot, &bytes).then_some((slot, name));
        }
        self.dictionary.map(|(slot, _)| slot)
    }
}

/// The monitor's side.
pub(crate) struct Densifier {
    runtime: &'static Runtime,
    rounds: Rounds,
    payoff: Payoff,
    /// Where the hand is: a chunk's number and a page of it.
    hand: (usize, usize),
    /// What is out: its address and handle, and the label it was sent with.
    out: [Option<(usize, Handle, Label)>; DENSE_PAGES],
    is_out: bool,
    bytes: Box<Page>,
}

impl Densifier {
    pub(crate) fn new(runtime: &'static Runtime) -> Self {
        Self {
            runtime,
            rounds: Rounds::default(),
            payoff: Payoff::default(),
            hand: (0, 0),
            out: [None; DENSE_PAGES],
            is_out: false,
            bytes: Box::new([0; PAGE]),
        }
    }

    /// Takes what is done and sends more, if it is time. `is_busy`: the process has pages to evict.
    pub(crate) fn run(&mut self, is_busy: bool) {
        if let Some(exchange) = self.runtime.exchange() {
            self.take_dictionary(&exchange.dictionaries);
        }
        let now = clock::now_ns();
        if !self.rounds.may_look(now) {
            return;
        }
        self.rounds.note_looked(now, is_busy);
        let mut lane = self.runtime.exchange().map(|exchange| &exchange.dense);
        if self.is_out
            && let Some(used) = lane
        {
            // Acquire pairs with the Release in `serve`.
            if used.state.load(Ordering::Acquire) == DONE {
                self.take(used);
                self.is_out = false;
            } else {
                lane = None;
            }
        }
        self.look(lane, now);
    }

    /// How long until [`Self::run`] has something to do, ns.
    pub(crate) fn rest_ns(&self) -> u64 {
        self.rounds.rest_ns(clock::now_ns())
    }

    fn take(&mut self, lane: &DenseLane) {
        for (index, out) in self.out.iter_mut().enumerate() {
            let Some((page, handle, label)) = out.take() else { continue };
            let item = &lane.items[index];
            let kind = item.kind.load(Relaxed);
            let len = (item.len.load(Relaxed) as usize).min(PAGE);
            get(&lane.bytes[index], &mut self.bytes, len);
            let slot = Slot::ALL.into_iter().find(|&slot| kind == WITH[usize::from(slot == Slot::B)]);
            let dense = Dense { bytes: &self.bytes[..len], slot };
            let dense = (kind == PLAIN || slot.is_some()).then_some(dense);
            let mut space = self.runtime.space.lock();
            let Some(space) = space.as_mut().filter(|space| space.mode == Mode::Normal) else { continue };
            replace(self.runtime, space, (page, handle, label), dense);
        }
    }

    /// Takes the newest dictionary, if there is a slot for it.
    fn take_dictionary(&mut self, handover: &Handover) {
        let runtime = self.runtime;
        handover.take(&mut self.bytes, |slot, bytes| {
            let mut space = runtime.space.lock();
            let Some(space) = space.as_mut().filter(|space| space.mode == Mode::Normal) else { return false };
            let is_set = space.store.set_dictionary(slot, bytes);
            handover.say_free(|slot| space.store.dictionary_pages(slot) == 0);
            is_set
        });
    }

    /// Lets the hand go on, until a batch is full or it has looked at enough. `lane`: where cold pages go, if one is free.
    fn look(&mut self, lane: Option<&DenseLane>, now: u64) {
        let mut space = self.runtime.space.lock();
        let Some(space) = space.as_mut().filter(|space| space.mode == Mode::Normal) else { return };
        let stats = space.store.stats();
        let compacts = reclaim::compacts(stats.free_slot, stats.frames_used.bytes());
        let allowed = self.payoff.allowed(
            now,
            Turnover {
                stored: stats.object_pages,
                anew: stats.anew_pages,
                returned: space.returned.0,
                anew_returned: space.returned.1,
            },
        );
        if let Some(exchange) = self.runtime.exchange() {
            exchange.dictionaries.say_free(|slot| space.store.dictionary_pages(slot) == 0);
        }
        let lane = lane.filter(|_| allowed > 0);
        let most = allowed.min(DENSE_PAGES as u64) as usize;
        let (mut looked, mut count) = (0, 0);
        while looked < LOOK_ENTRIES && (count < most || most == 0) {
            if self.hand.1 == CHUNK_PAGES || space.table.len() <= self.hand.0 {
                self.hand = (self.hand.0 + 1, 0);
            }
            if space.table.len() <= self.hand.0 {
                self.hand = (0, 0);
                self.rounds.note_round(now);
                break;
            }
            let chunk = space.table.chunk(self.hand.0);
            if chunk.away == 0 {
                self.hand.1 = CHUNK_PAGES;
                looked += CHUNK_PAGES / 64;
                continue;
            }
            let page = chunk.start + self.hand.1 * PAGE;
            self.hand.1 += 1;
            looked += 1;
            let (is_moved, cold) = self.runtime.reading(page, NODE_1, || meet(space, page, compacts));
            if is_moved {
                looked += MOVE_LOOKS;
            }
            if let Some((handle, label)) = cold
                && let Some(lane) = lane
                && let Some(original) = space.store.original(handle)
            {
                self.runtime.reading(page, NODE_1, || put(&lane.bytes[count], original.bytes));
                lane.items[count].send(label);
                self.out[count] = Some((page, handle, label));
                count += 1;
            }
        }
        if let Some(lane) = lane.filter(|_| count > 0) {
            lane.count.store(count as u32, Relaxed);
            // Release: whoever sees it posted sees the items.
            lane.state.store(POSTED, Ordering::Release);
            lane.posted.signal();
            self.is_out = true;
        }
    }
}

impl Item {
    fn send(&self, label: Label) {
        self.len.store(label.len as u32, Relaxed);
        self.word.store(label.word, Relaxed);
        self.kind.store(ORIGINAL, Relaxed);
    }
}

/// Whether such a copy was encoded anew.
pub(crate) fn is_anew(copy: Copy) -> bool {
    matches!(copy, Copy::Stored(raw) if Handle::from_raw(raw).is_some_and(Cram::is_anew))
}

/// The hand meets a page: whether it was moved within the store, and what to send of it, if it is cold.
fn meet(space: &mut Space<Cram>, page: usize, compacts: bool) -> (bool, Option<(Handle, Label)>) {
    let mut entry = space.table.get(page);
    let handle = if let Copy::Stored(raw) = entry.copy() { Handle::from_raw(raw) } else { None };
    let Some(mut handle) = handle.filter(|_| entry.is_away()) else { return (false, None) };
    let mut is_moved = false;
    if compacts && let Ok(Some(moved)) = space.store.relocate(handle) {
        handle = moved;
        entry = entry.stored_as(moved.raw());
        space.table.set(page, entry);
        is_moved = true;
    }
    if !Cram::is_first_encoding(handle) {
        return (is_moved, None);
    }
    match reclaim::on_round(entry.stay()) {
        Ok(()) => (is_moved, space.store.original(handle).map(|original| (handle, original.label))),
        Err(stay) => {
            if stay != entry.stay() {
                space.table.set(page, entry.with_stay(stay));
            }
            (is_moved, None)
        }
    }
}

/// Puts a dense encoding in the place of the one that was sent, if the page still has it.
fn replace(
    runtime: &Runtime,
    space: &mut Space<Cram>,
    (page, handle, label): (usize, Handle, Label),
    dense: Option<Dense<'_>>,
) {
    let entry = space.table.get(page);
    // A page that is back and keeps its copy is no longer cold, and its copy may go any time.
    if entry.copy() != Copy::Stored(handle.raw()) || !entry.is_away() {
        return;
    }
    let result = dense.map_or(Err(Kept::NoGain), |dense| {
        runtime.reading(page, NODE_1, || space.store.densify(handle, label, &dense))
    });
    match result {
        Ok(new) => {
            space.table.set(page, entry.stored_as(new.raw()));
            runtime.shared().counters.recompressed_pages.fetch_add(1, Relaxed);
        }
        Err(Kept::NoGain) => {
            space.table.set(page, entry.with_stay(Stay::FOR_GOOD));
        }
        // Its reader will be told of a corrupt one, nobody else; the others may be tried again.
        Err(Kept::Corrupt(_)) => {
            space.table.set(page, entry.with_stay(Stay::FOR_GOOD));
        }
        Err(Kept::Changed | Kept::NotReproduced | Kept::NoRoom) => {}
    }
}

const _: () = assert!(CHUNK == CHUNK_PAGES * PAGE);

#[cfg(test)]
mod tests;
