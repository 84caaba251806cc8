//! Claims about dictionaries: who has one, and when it is used.

extern crate std;
use super::*;
use crate::encoder;
use alloc::vec;
use spmem_core::frames::Metadata;
use spmem_core::units::FrameCount;
use spmem_node::compressed::{GrantedFrames, Store};

pub(crate) type HeapStore = Store<GrantedFrames, Vec<u8>>;

const CODEC: Codec = Codec::new(5);

/// A store of that codec.
pub(crate) fn new_store(frames: usize) -> HeapStore {
    let capacity = FrameCount(frames as u64);
    let granted = GrantedFrames::embedded(capacity, Metadata::from_heap(capacity).expect("memory"));
    Store::new(granted.expect("the embedded machine"), vec![0; frames * PAGE], 5)
}

impl Workshop {
    /// As if this one had been learnt and paid.
    pub(crate) fn set(&self, codec: &Codec, slot: Slot, bytes: &[u8]) {
        *self.dictionary.lock() = Some((slot, bytes.into()));
        self.recommended.store(DictionaryName::of(codec, bytes).0, Relaxed);
    }

    /// As if it paid no more.
    pub(crate) fn unset(&self) {
        self.recommended.store(0, Relaxed);
    }

    /// What was laid aside, if it is enough or not.
    pub(crate) fn take_samples(&self) -> Vec<Page> {
        core::mem::take(&mut *self.samples.lock())
    }
}

pub(crate) fn record_page(number: u64) -> Page {
    let mut page = [0; PAGE];
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for record in page.chunks_exact_mut(64) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        record[..16].copy_from_slice(b"{\"city\":\"Ravenna");
        record[24..32].copy_from_slice(&state.to_le_bytes());
        record[40..52].copy_from_slice(b"\",\"visits\":0");
    }
    page
}

/// Stands in for zstd's: the records' common part, which zstd takes as raw content.
pub(crate) fn common(pages: &[Page]) -> Option<Box<[u8]>> {
    pages.first().map(|page| page[..512].into())
}

/// Lays records aside until a dictionary of them is recommended and `store` has it; its slot.
pub(crate) fn learn_one(exchange: &Exchange, workshop: &Workshop, store: &mut HeapStore) -> Slot {
    let handover = &exchange.dictionaries;
    let mut buffer = [0; PAGE];
    for number in 0.. {
        handover.say_free(|slot| store.dictionary_pages(slot) == 0);
        handover.take(&mut buffer, |slot, bytes| store.set_dictionary(slot, bytes));
        if let (Some(name), Some((slot, own))) = (workshop.recommended(), store.newest_dictionary())
            && name == own
        {
            return slot;
        }
        workshop.offer(&record_page(number));
        std::thread::sleep(core::time::Duration::from_micros(50));
    }
    unreachable!("it goes on until there is one")
}

/// So many pages looked at.
fn look(learner: &mut Learner, handover: &Handover, pages: core::ops::Range<u64>) {
    pages.for_each(|number| learner.look(handover, &record_page(number)));
}

const TO_PROVE: u64 = SAMPLE_PAGES as u64 + LEARN_PAGES as u64;

#[test]
fn a_dictionary_is_recommended_once_it_is_known_to_pay_and_has_one_name_on_both_sides() {
    let (handover, mut store) = (Handover::new(), new_store(16));
    let (workshop, mut learner) = (Workshop::new(), Learner::new(CODEC, common));
    handover.say_free(|_| true);
    look(&mut learner, &handover, 0..TO_PROVE - 1);
    assert_eq!(learner.recommended(&handover), None);
    look(&mut learner, &handover, 0..1);
    assert_eq!(learner.recommended(&handover), None, "the process has not taken it");
    assert!(handover.next_slot(learner.number, learner.slot()).is_none());
    handover.take(&mut [0; PAGE], |slot, bytes| store.set_dictionary(slot, bytes));
    workshop.recommend(learner.recommended(&handover), &learner);
    let name = workshop.recommended().expect("records have much in common");
    let (slot, bytes) = workshop.dictionary(&CODEC, name).expect("it is recommended");
    assert!(store.has_dictionary(slot, name) && bytes.len() == 512);
    assert!(workshop.dictionary(&CODEC, DictionaryName(name.0 ^ 1)).is_none());
    let next = handover.next_slot(learner.number, learner.slot());
    assert!(next.is_some() && next != Some(slot), "the newest one stays");
    workshop.recommend(None, &learner);
    assert_eq!(workshop.recommended(), None);
}

#[test]
fn a_dictionary_is_made_only_for_a_slot_that_no_page_needs() {
    let (handover, mut learner) = (Handover::new(), Learner::new(CODEC, common));
    look(&mut learner, &handover, 0..1000);
    assert_eq!(learner.number, 0, "the process has said nothing yet");
    for slot in Slot::ALL {
        handover.say_free(|free| free == slot);
        let mut learner = Learner::new(CODEC, common);
        look(&mut learner, &handover, 0..SAMPLE_PAGES.into());
        assert_eq!((learner.slot(), learner.number), (Some(slot), 1));
    }
}

#[test]
fn a_dictionary_that_is_refused_is_there_to_be_taken_later() {
    let (handover, mut learner) = (Handover::new(), Learner::new(CODEC, common));
    handover.say_free(|_| true);
    look(&mut learner, &handover, 0..SAMPLE_PAGES.into());
    let mut calls = 0;
    for is_taken in [false, false, true, true] {
        handover.take(&mut [0; PAGE], |_, bytes| {
            assert_eq!(Some(bytes), learner.newest.as_ref().map(|(_, bytes)| &bytes[..]));
            calls += 1;
            is_taken
        });
    }
    assert_eq!(calls, 3, "once it is taken it is not offered again");
}

#[test]
fn where_no_dictionary_can_be_made_none_is_recommended() {
    let (handover, mut learner) = (Handover::new(), Learner::new(CODEC, |_| None));
    handover.say_free(|_| true);
    look(&mut learner, &handover, 0..TO_PROVE);
    assert_eq!((learner.recommended(&handover), learner.number), (None, 0));
}

#[test]
fn samples_come_in_full_batches_and_only_while_they_are_wanted() {
    let workshop = Workshop::new();
    for number in 0..LEARN_PAGES as u64 {
        assert!(workshop.samples().is_none());
        workshop.offer(&record_page(number));
    }
    workshop.offer(&record_page(1000));
    let samples = workshop.samples().expect("a batch");
    assert!(samples.iter().zip(0..).all(|(page, number)| *page == record_page(number)));
    assert_eq!(samples.len(), LEARN_PAGES, "more were not wanted");
    workshop.offer(&record_page(0));
    assert!(workshop.samples().is_none() && workshop.samples.lock().is_empty());
}

#[test]
fn whoever_encodes_does_not_wait_for_who_learns() {
    let workshop = Workshop::new();
    let samples = workshop.samples.lock();
    let dictionary = workshop.dictionary.lock();
    workshop.offer(&record_page(0));
    assert!(workshop.dictionary(&CODEC, DictionaryName(1)).is_none());
    drop((samples, dictionary));
}

#[test]
fn after_a_rest_pages_are_looked_at_again() {
    let exchange = encoder::tests::exchange();
    let (workshop, is_over) = (Workshop::new(), AtomicBool::new(false));
    workshop.wants_samples.store(false, Relaxed);
    std::thread::scope(|scope| {
        scope.spawn(|| learn(exchange, &workshop, CODEC, common, &is_over));
        while !workshop.wants_samples.load(Relaxed) {
            std::thread::yield_now();
        }
        is_over.store(true, Relaxed);
        workshop.wake();
    });
}

#[test]
fn a_thread_that_learns_ends_when_told_to() {
    let exchange = encoder::tests::exchange();
    let (workshop, is_over) = (Workshop::new(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let learner = scope.spawn(|| learn(exchange, &workshop, CODEC, common, &is_over));
        let mut store = new_store(16);
        learn_one(exchange, &workshop, &mut store);
        is_over.store(true, Relaxed);
        workshop.wake();
        learner.join().expect("it ends");
    });
}

#[test]
fn whatever_a_process_writes_into_the_handover_no_dictionary_but_the_learnt_one_is_recommended() {
    let (handover, mut learner) = (Handover::new(), Learner::new(CODEC, common));
    let mut state = 1_u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    for number in 0..4 * TO_PROVE {
        let free = random() | u32::from(number % 3 == 0);
        handover.free_slots.store(free, Relaxed);
        handover.taken.store(if random() % 2 == 0 { learner.number } else { random() }, Relaxed);
        handover.number.store(random() % 8, Relaxed);
        handover.slot.store(random() % 8, Relaxed);
        handover.len.store(random() >> (random() % 32), Relaxed);
        handover.bytes[number as usize % 512].store(u64::from(random()), Relaxed);
        learner.look(&handover, &record_page(number));
        let name = learner.newest.as_ref().map(|(_, bytes)| DictionaryName::of(&CODEC, bytes));
        assert!(learner.recommended(&handover).is_none_or(|recommended| Some(recommended) == name));
        handover.take(&mut [0; PAGE], |_, bytes| bytes.len() % 2 == 0);
    }
    assert!(learner.dictionaries.pays() && learner.number > 0);
}
