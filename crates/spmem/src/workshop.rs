//! Dictionaries for the dense encoding: learnt by a thread of `spm` from pages of a process, used by the two that encode
//! for it, and handed to the process, whose store reads with them.
//!
//! Whoever encodes lays pages aside in the [`Workshop`], memory of `spm` alone: no process that is managed can write to what is to be read with.
//! [`learn`] makes dictionaries of them, finds out whether those pay, and recommends one that does. It also leaves each in the
//! [`Handover`], a part of the exchange: the process's monitor takes it once there is a slot for it, and says so. A page is encoded with a dictionary only if
//! the process has it, by a name that depends on every byte.
//!
//! The encoder, for which the program waits, never waits for the others here: where one of them has the lock, it goes on without.

use crate::encoder::{Exchange, get, put};
use crate::follow::Shadow;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, Ordering::Relaxed};
use spmem_core::reclaim::{Dictionaries, ENCODER_IDLE_NS, LEARN_PAGES, SAMPLE_PAGES, Way};
use spmem_node::Page;
use spmem_node::compressed::{Codec, DenseEncoder, DictionaryName, MAX_DICTIONARY_BYTES, Slot};
use spmem_sys::futex::{Event, Lock};
use spmem_sys::{PAGE, thread};

/// What is added to the nice value of a thread that learns.
const LEARNER_NICE: i32 = 5;

/// Makes a dictionary for pages like these, if there is one.
pub type Train = fn(&[Page]) -> Option<Box<[u8]>>;

/// What the threads of `spm` that encode for one process have in common.
pub struct Workshop {
    wants_samples: AtomicBool,
    samples: Lock<Vec<Page>>,
    are_enough: Event<true>,
    /// Name of the dictionary that pays; 0: none does.
    recommended: AtomicU64,
    dictionary: Lock<Option<(Slot, Box<[u8]>)>>,
}

impl Default for Workshop {
    fn default() -> Self {
        Self::new()
    }
}

impl Workshop {
    /// Nothing was learnt yet.
    pub const fn new() -> Self {
        Self {
            wants_samples: AtomicBool::new(true),
            samples: Lock::new(Vec::new()),
            are_enough: Event::new(),
            recommended: AtomicU64::new(0),
            dictionary: Lock::new(None),
        }
    }

    /// Wakes the thread that learns, to look at its orders.
    pub fn wake(&self) {
        self.are_enough.signal();
    }

    /// Lays a page aside, if such are wanted.
    pub(crate) fn offer(&self, page: &Page) {
        if !self.wants_samples.load(Relaxed) {
            return;
        }
        let Some(mut samples) = self.samples.try_lock() else { return };
        samples.push(*page);
        if samples.len() >= LEARN_PAGES {
            self.wants_samples.store(false, Relaxed);
            drop(samples);
            self.are_enough.signal();
        }
    }

    /// What was laid aside, if it is enough to learn from.
    fn samples(&self) -> Option<Vec<Page>> {
        let mut samples = self.samples.lock();
        (samples.len() >= LEARN_PAGES).then(|| core::mem::take(&mut *samples))
    }

    /// The name of the dictionary that pays.
    pub(crate) fn recommended(&self) -> Option<DictionaryName> {
        Some(DictionaryName(self.recommended.load(Relaxed))).filter(|name| name.0 != 0)
    }

    /// The dictionary of that name and the slot that it is for in the process; `None` also while another thread looks.
    pub(crate) fn dictionary(&self, codec: &Codec, name: DictionaryName) -> Option<(Slot, Box<[u8]>)> {
        let dictionary = self.dictionary.try_lock()?.clone();
        dictionary.filter(|(_, bytes)| DictionaryName::of(codec, bytes) == name)
    }

    fn recommend(&self, name: Option<DictionaryName>, learner: &Learner) {
        if name == self.recommended() {
            return;
        }
        if name.is_some() {
            self.dictionary.lock().clone_from(&learner.newest);
        }
        self.recommended.store(name.map_or(0, |name| name.0), Relaxed);
    }
}

/// Where a dictionary goes from `spm` to the process. Atomics only.
#[repr(C, align(64))]
pub(crate) struct Handover {
    /// From the process: a bit for each slot whose dictionary no page needs, and the number of the last dictionary that it has taken.
    free_slots: AtomicU32,
    taken: AtomicU32,
    /// From `spm`: the number of the newest dictionary, the first is 1, and the bit of the slot that it is for.
    number: AtomicU32,
    slot: AtomicU32,
    len: AtomicU32,
    bytes: [AtomicU64; MAX_DICTIONARY_BYTES / 8],
}

fn bit_of(slot: Slot) -> u32 {
    if slot == Slot::A { 1 } else { 2 }
}

impl Handover {
    #[cfg(test)]
    pub(crate) fn new() -> Self {
        Self {
            free_slots: AtomicU32::new(0),
            taken: AtomicU32::new(0),
            number: AtomicU32::new(0),
            slot: AtomicU32::new(0),
            len: AtomicU32::new(0),
            bytes: [const { AtomicU64::new(0) }; MAX_DICTIONARY_BYTES / 8],
        }
    }

    /// The process says which slots no page needs.
    pub(crate) fn say_free(&self, is_free: impl Fn(Slot) -> bool) {
        let free = Slot::ALL.into_iter().filter(|&slot| is_free(slot)).map(bit_of);
        self.free_slots.store(free.sum(), Relaxed);
    }

    /// The process takes the newest dictionary, if `set` takes it for its slot; else it is there to be taken later.
    pub(crate) fn take(&self, buffer: &mut Page, set: impl FnOnce(Slot, &[u8]) -> bool) {
        // Acquire pairs with the Release in `Learner::make`.
        let number = self.number.load(Ordering::Acquire);
        let len = self.len.load(Relaxed) as usize;
        if number == self.taken.load(Relaxed) || len > MAX_DICTIONARY_BYTES {
            return;
        }
        get(&self.bytes, buffer, len);
        let bit = self.slot.load(Relaxed);
        let slot = Slot::ALL.into_iter().find(|&slot| bit_of(slot) == bit);
        if slot.is_some_and(|slot| set(slot, &buffer[..len])) {
            // Release: it was read before, and what `set` says to be free is said.
            self.taken.store(number, Ordering::Release);
        }
    }

    fn has_taken(&self, number: u32) -> bool {
        // Acquire pairs with the Release in `take`: what is said to be free was so then, or later.
        self.taken.load(Ordering::Acquire) == number
    }

    /// Where the dictionary after number `newest` is to go, which is in `slot`: where no page needs the one that is there, once the process has the newest.
    fn next_slot(&self, newest: u32, slot: Option<Slot>) -> Option<Slot> {
        let is_taken = self.has_taken(newest);
        let free = self.free_slots.load(Relaxed);
        let is_free = |&next: &Slot| is_taken && Some(next) != slot && free & bit_of(next) != 0;
        Slot::ALL.into_iter().find(is_free)
    }
}

/// Learns until `is_over`: a thread of `spm`, for one process.
pub fn learn(exchange: &Exchange, workshop: &Workshop, codec: Codec, train: Train, is_over: &AtomicBool) {
    // Nobody waits for it, and it has 20 ms of work at once; but beside a busy encoder an idle thread would never have done it.
    thread::set_nice(thread::nice() + LEARNER_NICE);
    let mut shadow = Shadow::new();
    // Most processes have few pages that leave.
    let mut learner = None;
    loop {
        let ticket = workshop.are_enough.ticket();
        if is_over.load(Relaxed) {
            return;
        }
        let Some(samples) = workshop.samples() else {
            workshop.are_enough.wait(ticket, Some(ENCODER_IDLE_NS));
            workshop.wants_samples.store(true, Relaxed);
            continue;
        };
        shadow.avoid(exchange.home.get());
        let learner = learner.get_or_insert_with(|| Learner::new(codec, train));
        for page in &samples {
            learner.look(&exchange.dictionaries, page);
        }
        workshop.recommend(learner.recommended(&exchange.dictionaries), learner);
        // What pays is looked at now and then.
        workshop.wants_samples.store(learner.dictionaries.is_learning(), Relaxed);
    }
}

struct Learner {
    codec: Codec,
    train: Train,
    encoder: DenseEncoder,
    dictionaries: Dictionaries,
    samples: Vec<Page>,
    /// The newest dictionary, its slot and its number.
    newest: Option<(Slot, Box<[u8]>)>,
    number: u32,
}

impl Learner {
    fn new(codec: Codec, train: Train) -> Self {
        Self {
            codec,
            train,
            encoder: DenseEncoder::new(&codec),
            dictionaries: Dictionaries::new(),
            samples: Vec::new(),
            newest: None,
            number: 0,
        }
    }

    fn slot(&self) -> Option<Slot> {
        self.newest.as_ref().map(|&(slot, _)| slot)
    }

    /// What a page has to tell.
    fn look(&mut self, handover: &Handover, page: &Page) {
        let next = handover.next_slot(self.number, self.slot());
        match self.dictionaries.next(next.is_some()) {
            Way::Plain | Way::With => {}
            way @ (Way::Sample | Way::Train) => {
                self.samples.push(*page);
                if way == Way::Train || self.samples.len() > SAMPLE_PAGES as usize {
                    let is_made = next.is_some_and(|next| self.make(handover, next));
                    self.dictionaries.note_made(is_made);
                }
            }
            Way::Both => {
                let slot = self.slot();
                let mut bytes = |slot| self.encoder.encode(page, slot).map_or(PAGE, |dense| dense.bytes.len());
                let (plain, with) = (bytes(None), bytes(slot));
                self.dictionaries.note_trial(plain, with);
            }
        }
    }

    /// The dictionary that pays, once the process has it.
    fn recommended(&self, handover: &Handover) -> Option<DictionaryName> {
        let is_of_use = self.dictionaries.pays() && handover.has_taken(self.number);
        let (_, bytes) = self.newest.as_ref().filter(|_| is_of_use)?;
        Some(DictionaryName::of(&self.codec, bytes))
    }

    /// Makes a dictionary of the samples and hands it over.
    fn make(&mut self, handover: &Handover, slot: Slot) -> bool {
        let samples = core::mem::take(&mut self.samples);
        let dictionary = (self.train)(&samples).filter(|bytes| bytes.len() <= MAX_DICTIONARY_BYTES);
        let Some(dictionary) = dictionary else { return false };
        if !self.encoder.set_dictionary(slot, &dictionary) {
            return false;
        }
        self.number += 1;
        put(&handover.bytes, &dictionary);
        handover.slot.store(bit_of(slot), Relaxed);
        handover.len.store(dictionary.len() as u32, Relaxed);
        // Release: whoever sees the number sees the dictionary.
        handover.number.store(self.number, Ordering::Release);
        self.newest = Some((slot, dictionary));
        true
    }
}

#[cfg(test)]
pub(crate) mod tests;
