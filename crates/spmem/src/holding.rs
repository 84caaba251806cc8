//! The holding area: pages that have left the program but not yet memory, an inactive list without a copy.
//!
//! A ring of slots over a mapping. Runs enter at the head (one UFFDIO_MOVE for a run of pages), a compressor claims a
//! span at its cursor, and the tail follows once slots are free again and their span is finished. All under the space's lock; the page of a slot
//! that is `Busy` may be read without it, because nobody moves it away: a fault on such a page is served by copying.

use crate::encoder::LANES;
use alloc::vec::Vec;
use core::num::NonZeroU8;
use spmem_core::placing::{MAX_TARGETS, TRIAL_MS};
use spmem_core::reclaim::MAX_RECLAIMERS;
use spmem_sys::PAGE;

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing; its page is missing.
    Free,
    /// A page that may be moved back or claimed.
    Held,
    /// A page being compressed: it stays where it is until the compressor is done with it.
    Busy,
    /// A page nobody needs any more.
    Dead,
    /// As `Busy`, but nobody needs the page any more (or there is none).
    BusyDead,
}

/// One slot: whose page it is, and the compressed copy that may still be equal to it.
#[derive(Clone, Copy)]
pub struct Slot {
    /// What it holds.
    pub state: State,
    /// Address of the page in the program.
    pub owner: usize,
    /// Handle of an older copy on node 1.
    pub kept: Option<u64>,
    /// Number of the mapped node whose page is here on trial, plus one.
    target: Option<NonZeroU8>,
    /// Since when, in ms: the low digits.
    since_ms: u32,
}

const _: () = assert!(size_of::<Slot>() == 32, "there is one for each page that can be held");

impl Slot {
    /// Of a page that is here on trial: the number of its mapped node.
    pub fn target(&self) -> Option<usize> {
        self.target.map(|target| usize::from(target.get()) - 1)
    }

    /// How long a page has been here on trial, ms; beyond 24 days the low digits.
    pub fn trial_ms(&self, now_ms: u32) -> u32 {
        now_ms.wrapping_sub(self.since_ms)
    }
}

/// A span of the ring that one compressor works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First slot.
    pub first: u32,
    /// Slots.
    pub len: u32,
}

/// Spans that are out at a time, at most: what the encoder has, and one of each reclaimer's.
const SPANS: usize = LANES + MAX_RECLAIMERS;

/// The ring. Allocates nothing after it was made: a fork may be under way.
pub struct Holding {
    start: usize,
    slots: Vec<Slot>,
    /// Next slot to be filled.
    head: u32,
    /// Next slot to be claimed.
    cursor: u32,
    /// Oldest slot that may not be free.
    tail: u32,
    /// Slots from tail to head.
    used: u32,
    /// Slots from cursor to head.
    unclaimed: u32,
    held: u32,
    /// Of those: on trial, of each mapped node.
    trials: [u32; MAX_TARGETS],
    /// Claimed and not finished: their slots are filled and claimed by nobody else, whatever becomes of them.
    out: Vec<Span>,
}

impl Holding {
    /// A ring over `count` pages from address `start`.
    pub fn new(start: usize, count: u32) -> Self {
        let free = Slot { state: State::Free, owner: 0, kept: None, target: None, since_ms: 0 };
        Self {
            start,
            slots: alloc::vec![free; count as usize],
            head: 0,
            cursor: 0,
            tail: 0,
            used: 0,
            unclaimed: 0,
            held: 0,
            trials: [0; MAX_TARGETS],
            out: Vec::with_capacity(SPANS),
        }
    }

    /// Whether `address` lies in the area.
    pub fn contains(&self, address: usize) -> bool {
        (self.start..self.start + self.slots.len() * PAGE).contains(&address)
    }

    /// Address of a slot's page.
    pub fn address(&self, slot: u32) -> usize {
        self.start + slot as usize * PAGE
    }

    /// Slots with a page that counts as the program's.
    pub fn held(&self) -> u32 {
        self.held
    }

    /// Of those: pages on trial, of each mapped node, which are there still.
    pub fn trials(&self) -> [u32; MAX_TARGETS] {
        self.trials
    }

    /// Pages whose trial has taken too long, wherever in the ring, and that nobody works on: fills `into` from the front; how many.
    pub fn overdue(&self, now_ms: u32, into: &mut [u32]) -> usize {
        let trials: u32 = self.trials.iter().sum();
        let used = if trials > 0 { self.used } else { 0 };
        let slots = (0..used).map(|at| (self.tail + at) % self.capacity());
        let is_overdue = |slot: &u32| {
            let held = self.get(*slot);
            held.state == State::Held && held.target().is_some() && held.trial_ms(now_ms) > TRIAL_MS
        };
        into.iter_mut().zip(slots.filter(is_overdue)).map(|(to, slot)| *to = slot).count()
    }

    /// Slots.
    pub fn capacity(&self) -> u32 {
        u32::try_from(self.slots.len()).expect("made from a u32")
    }

    /// Bytes the slot list takes.
    pub fn metadata_bytes(&self) -> u64 {
        (self.slots.len() * size_of::<Slot>()) as u64
    }

    /// Room for a run at the head: its first slot and how many of `wanted` fit without wrapping.
    pub fn room(&self, wanted: u32) -> Option<(u32, u32)> {
        let capacity = self.capacity();
        let len = wanted.min(capacity - self.used).min(capacity - self.head);
        (len > 0).then_some((self.head, len))
    }

    /// Takes the next slot at the head for the page of `owner`, which has just been moved there.
    pub fn push(&mut self, owner: usize, kept: Option<u64>) -> u32 {
        let slot = self.head;
        assert!(self.slots[slot as usize].state == State::Free && self.used < self.capacity());
        self.slots[slot as usize] = Slot { state: State::Held, owner, kept, target: None, since_ms: 0 };
        self.head = (slot + 1) % self.capacity();
        self.used += 1;
        self.unclaimed += 1;
        self.held += 1;
        slot
    }

    /// The slot.
    pub fn get(&self, slot: u32) -> Slot {
        self.slots[slot as usize]
    }

    /// Its page went back to the program by a move: the slot is empty.
    pub fn vacate(&mut self, slot: u32) {
        debug_assert!(self.slots[slot as usize].state == State::Held);
        self.slots[slot as usize].state = State::Free;
        self.note_gone(slot);
        self.advance_tail();
    }

    /// Its page is needed no more, but still there.
    pub fn kill(&mut self, slot: u32) {
        let state = &mut self.slots[slot as usize].state;
        let dead = match *state {
            State::Held => State::Dead,
            State::Busy => State::BusyDead,
            State::Free | State::Dead | State::BusyDead => return,
        };
        *state = dead;
        self.note_gone(slot);
    }

    fn note_gone(&mut self, slot: u32) {
        self.held -= 1;
        if let Some(target) = self.slots[slot as usize].target() {
            self.trials[target] -= 1;
        }
    }

    /// Its page belongs elsewhere now.
    pub fn set_owner(&mut self, slot: u32, owner: usize) {
        self.slots[slot as usize].owner = owner;
    }

    /// Its page is one of the mapped node number `target`, taken out to see whether it is used.
    pub fn begin_trial(&mut self, slot: u32, target: usize, now_ms: u32) {
        self.trials[target] += 1;
        let slot = &mut self.slots[slot as usize];
        slot.target = u8::try_from(target + 1).ok().and_then(NonZeroU8::new);
        slot.since_ms = now_ms;
    }

    /// The copy that came along is gone.
    pub fn forget_kept(&mut self, slot: u32) -> Option<u64> {
        self.slots[slot as usize].kept.take()
    }

    /// Claims up to `wanted` slots for a compressor, oldest first; they are busy until [`Holding::finish`].
    pub fn claim(&mut self, wanted: u32) -> Option<Span> {
        // Slots whose pages have gone back by themselves are nobody's work.
        while self.unclaimed > 0 && self.slots[self.cursor as usize].state == State::Free {
            self.cursor = (self.cursor + 1) % self.capacity();
            self.unclaimed -= 1;
        }
        self.advance_tail();
        self.start_over();
        let len = wanted.min(self.unclaimed).min(self.capacity() - self.cursor);
        if len == 0 {
            return None;
        }
        let span = Span { first: self.cursor, len };
        for slot in span.first..span.first + len {
            let state = &mut self.slots[slot as usize].state;
            *state = if *state == State::Held { State::Busy } else { State::BusyDead };
        }
        self.cursor = (self.cursor + len) % self.capacity();
        self.unclaimed -= len;
        debug_assert!(self.out.len() < SPANS, "who claims finishes");
        self.out.push(span);
        Some(span)
    }

    /// A busy slot that could not be stored stays with its page; it is claimed again with the span it is in.
    pub fn release(&mut self, slot: u32) {
        debug_assert!(self.slots[slot as usize].state == State::Busy);
        self.slots[slot as usize].state = State::Held;
    }

    /// The pages of the span's dead slots are gone; slots still held move to the back of the queue when `is_last`.
    pub fn finish(&mut self, span: Span) {
        for slot in span.first..span.first + span.len {
            let state = &mut self.slots[slot as usize].state;
            // A released slot may have died since its span was looked over: its page is still there.
            if *state == State::BusyDead {
                *state = State::Free;
            }
        }
        self.out.retain(|other| *other != span);
        self.advance_tail();
        self.start_over();
    }

    /// What was released in a span is at the tail now or will be: once nothing is unclaimed or out, it is to be claimed again.
    fn start_over(&mut self) {
        if self.unclaimed == 0 && self.out.is_empty() {
            self.cursor = self.tail;
            self.unclaimed = self.used;
        }
    }

    /// After a fork every claim of the parent's compressors is void: all that is left is held or dead. Pages on trial are the parent's to
    /// count and to take back to their node: here they are pages like any other.
    pub fn settle(&mut self) {
        self.trials = [0; MAX_TARGETS];
        self.out.clear();
        for slot in &mut self.slots {
            slot.target = None;
            slot.state = match slot.state {
                State::Busy => State::Held,
                State::BusyDead => State::Dead,
                other => other,
            };
        }
        self.cursor = self.tail;
        self.unclaimed = self.used;
    }

    /// Slots from the tail to the head, whatever they hold.
    pub fn used(&self) -> u32 {
        self.used
    }

    fn advance_tail(&mut self) {
        // Never past the cursor, as what is unclaimed is the compressors' to pass first, nor into a span that is out.
        while self.used > self.unclaimed
            && self.slots[self.tail as usize].state == State::Free
            && !self.out.iter().any(|span| span.first == self.tail)
        {
            self.tail = (self.tail + 1) % self.capacity();
            self.used -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u32 = 64;

    fn filled(count: u32) -> Holding {
        let mut holding = Holding::new(1 << 20, PAGES);
        for page in 0..count {
            assert!(holding.room(1).is_some());
            assert_eq!(holding.push(page as usize * PAGE, None), page);
        }
        holding
    }

    fn demote_all(holding: &mut Holding, span: Span) {
        (span.first..span.first + span.len).for_each(|slot| holding.kill(slot));
        holding.finish(span);
    }

    /// As [`demote_all`], but what was released stays.
    fn demote_rest(holding: &mut Holding, span: Span) {
        for slot in span.first..span.first + span.len {
            if holding.get(slot).state == State::Busy {
                holding.kill(slot);
            }
        }
        holding.finish(span);
    }

    #[test]
    fn a_claim_passes_over_pages_that_went_back() {
        let mut holding = filled(40);
        (0..36).for_each(|slot| holding.vacate(slot));
        assert_eq!(holding.claim(8), Some(Span { first: 36, len: 4 }));
        assert_eq!(holding.held(), 4);
    }

    #[test]
    fn slots_come_round_again_and_never_two_pages_to_one() {
        let mut holding = filled(0);
        let (mut next, mut oldest) = (0, 0);
        for round in 0..1000 {
            while let Some((slot, 1)) = holding.room(1) {
                assert_eq!(holding.get(slot).state, State::Free);
                holding.push(next * PAGE, None);
                next += 1;
            }
            let span = holding.claim(1 + round % 7).expect("all slots are held");
            for slot in span.first..span.first + span.len {
                assert_eq!(holding.get(slot).owner, oldest * PAGE, "first in, first out");
                oldest += 1;
            }
            demote_all(&mut holding, span);
        }
    }

    #[test]
    fn what_could_not_be_stored_is_claimed_again_once_all_else_is() {
        let mut holding = filled(8);
        let span = holding.claim(8).expect("eight are held");
        (0..8).for_each(|slot| if slot == 3 { holding.release(slot) } else { holding.kill(slot) });
        holding.finish(span);
        let again = holding.claim(8).expect("slot 3 is still held");
        assert!((again.first..again.first + again.len).contains(&3));
        demote_all(&mut holding, again);
        assert_eq!((holding.held(), holding.used()), (0, 0));
    }

    #[test]
    fn what_could_not_be_stored_is_claimed_again_though_all_behind_it_went_back() {
        for dies in [false, true] {
            let mut holding = filled(PAGES);
            let (first, second) = (holding.claim(16), holding.claim(16));
            let (first, second) = (first.expect("64 are held"), second.expect("48 are held"));
            holding.release(second.first + 4);
            demote_rest(&mut holding, second);
            demote_rest(&mut holding, first);
            let left = second.first + 4;
            while holding.room(1).is_some() {
                holding.push(0, None);
            }
            for slot in (0..PAGES).filter(|&slot| slot != left) {
                if holding.get(slot).state == State::Held {
                    holding.vacate(slot);
                }
            }
            if dies {
                holding.kill(left);
            }
            assert_eq!(holding.room(1), None, "what is behind it has not been passed over yet");
            let again = holding.claim(1).expect("it is still there");
            assert_eq!(again, Span { first: left, len: 1 });
            demote_all(&mut holding, again);
            assert_eq!((holding.claim(1), holding.used()), (None, 0));
        }
    }

    #[test]
    fn while_nothing_is_out_whatever_is_left_can_be_claimed_or_is_free() {
        let mut holding = filled(0);
        let (mut out, mut state, mut idle) = (alloc::vec::Vec::new(), 1_u64, 0);
        let mut random = |below: u32| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(11);
            (state >> 40) as u32 % below
        };
        for _ in 0..200_000 {
            let slot = random(PAGES);
            match (random(8), holding.get(slot).state) {
                (0..=2, _) => (0..random(20)).for_each(|_| {
                    if holding.room(1).is_some() {
                        holding.push(slot as usize * PAGE, None);
                    }
                }),
                (3, _) if out.len() < 2 => out.extend(holding.claim(1 + random(16))),
                (4, _) if !out.is_empty() => {
                    let span: Span = out.remove(random(2) as usize % out.len());
                    for slot in span.first..span.first + span.len {
                        match holding.get(slot).state {
                            State::Busy if random(8) == 0 => holding.release(slot),
                            _ => holding.kill(slot),
                        }
                    }
                    holding.finish(span);
                }
                (5 | 6, State::Held) => holding.vacate(slot),
                (_, State::Held | State::Busy) => holding.kill(slot),
                _ => {}
            }
            if out.is_empty() && random(4) == 0 {
                out.extend(holding.claim(1 + random(16)));
                assert!(!out.is_empty() || holding.used() == 0, "{} slots are left", holding.used());
                idle += 1;
            }
        }
        assert!(idle > 1000, "{idle}");
    }

    #[test]
    fn slots_of_a_span_that_is_out_are_claimed_and_filled_by_nobody_else() {
        let mut holding = filled(32);
        let (first, second) = (holding.claim(16), holding.claim(16));
        let (first, second) = (first.expect("32 are held"), second.expect("16 are held"));
        // None can be stored; some go back to the program.
        (0..16).for_each(|slot| holding.release(slot));
        (0..8).for_each(|slot| holding.vacate(slot));
        demote_all(&mut holding, second);
        assert_eq!(holding.claim(16), None, "{first:?} is out");
        while let Some((slot, _)) = holding.room(1) {
            assert!(slot >= 16, "{first:?} is out");
            holding.push(slot as usize * PAGE, None);
        }
        holding.finish(first);
        assert_eq!(holding.room(PAGES), Some((0, 8)));
        assert_eq!(holding.claim(PAGES), Some(Span { first: 32, len: 32 }));
    }

    #[test]
    fn a_released_slot_that_dies_before_its_span_is_finished_keeps_its_page() {
        let mut holding = filled(2);
        let span = holding.claim(2).expect("two are held");
        holding.release(0);
        holding.kill(1);
        holding.kill(0);
        holding.finish(span);
        assert_eq!((holding.get(0).state, holding.get(1).state), (State::Dead, State::Free));
        holding.push(9 * PAGE, None);
        let again = holding.claim(PAGES).expect("a dead page and a held one");
        assert_eq!(
            (again.first, holding.get(0).state),
            (0, State::BusyDead),
            "its page is still to be given back"
        );
    }

    #[test]
    fn a_trial_that_takes_too_long_is_found_behind_pages_that_nobody_claims() {
        let mut holding = filled(10);
        let (first, later) = (holding.push(77 * PAGE, None), holding.push(78 * PAGE, None));
        holding.begin_trial(first, 1, 100);
        holding.begin_trial(later, 2, 101);
        let mut slots = [0; 4];
        assert_eq!(holding.overdue(100 + TRIAL_MS, &mut slots), 0);
        assert_eq!((holding.overdue(101 + TRIAL_MS, &mut slots), slots[0]), (1, first));
        assert_eq!((holding.overdue(102 + TRIAL_MS, &mut slots), slots[1]), (2, later));
        // It goes back to its place: the slot is empty, those before and behind it are as they were.
        holding.vacate(first);
        assert_eq!((holding.overdue(102 + TRIAL_MS, &mut slots), slots[0], holding.held()), (1, later, 11));
        assert_eq!(holding.claim(20).map(|span| span.len), Some(12));
        assert_eq!(holding.overdue(102 + TRIAL_MS, &mut slots), 0, "it is busy");
    }

    #[test]
    fn a_page_on_trial_is_known_until_its_slot_is_another_pages() {
        let mut holding = filled(1);
        assert_eq!(holding.get(0).target(), None);
        holding.begin_trial(0, 3, u32::MAX - 4);
        assert_eq!((holding.get(0).target(), holding.get(0).trial_ms(5)), (Some(3), 10));
        let span = holding.claim(1).expect("one is held");
        assert_eq!((holding.get(0).target(), holding.trials()), (Some(3), [0, 0, 0, 1]));
        demote_all(&mut holding, span);
        assert_eq!(holding.trials(), [0; MAX_TARGETS]);
        for page in 1..=PAGES as usize {
            holding.push(page * PAGE, None);
        }
        assert_eq!((holding.get(0).owner, holding.get(0).target()), (PAGES as usize * PAGE, None));
    }

    #[test]
    fn a_page_on_trial_is_counted_by_the_parent_alone_after_a_fork() {
        let mut holding = filled(3);
        holding.begin_trial(0, 1, 5);
        holding.begin_trial(2, 0, 5);
        holding.settle();
        assert_eq!((holding.trials(), holding.held()), ([0; MAX_TARGETS], 3));
        assert_eq!(holding.overdue(u32::MAX, &mut [0; 4]), 0);
        let span = holding.claim(3).expect("three are held");
        demote_all(&mut holding, span);
        assert_eq!((holding.trials(), holding.held()), ([0; MAX_TARGETS], 0));
    }

    #[test]
    fn a_page_dropped_while_busy_is_dead_and_its_slot_free_afterwards() {
        let mut holding = filled(2);
        let span = holding.claim(2).expect("two are held");
        holding.kill(0);
        assert_eq!(holding.get(0).state, State::BusyDead);
        demote_all(&mut holding, span);
        assert_eq!((holding.get(0).state, holding.held()), (State::Free, 0));
    }
}
