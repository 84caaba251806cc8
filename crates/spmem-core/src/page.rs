//! Pages: what is known of the blocks of a node that can move, and which of them are cold (struct page and the multi-generational
//! LRU are the models: include/linux/mm_types.h, mm/vmscan.c).
//!
//! A word for the first frame of each block whose holder moves it when asked to: whose it is, whether it may move now, when
//! it was last known to be used. Words are made for a GiB at a time when its first block is tracked; nodes without a
//! service that needs them have none (R3).
//! *Generations* count from [`Pages::age`] to the next: a block is in the youngest when it was used since, and
//! [`Pages::isolate`] takes from the oldest. Nobody looks at access bits here: use is told ([`Pages::on_used`]).
//!
//! Takes no lock: part of the registry. Holes: a block that is used is in the youngest generation, however often. The words
//! come from the heap, four bytes a frame: with what is lent they are more than a thousandth of the memory.

#![allow(
    clippy::cast_possible_truncation,
    reason = "a node has at most 2^32 frames, so pieces number few; ages are below 8"
)]

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::frames::{FrameRange, FramesError};
use crate::units::{DomainId, FrameNumber, Order};
use crate::zero::zeros;

/// Frames that a piece of the words is for: 1 GiB.
const PIECE_FRAMES: usize = 1 << 18;
/// Generations that are told apart at a time (`MAX_NR_GENS`).
pub const GENERATIONS: u8 = 4;
/// Generation numbers go round; more than can live at a time.
const NUMBERS: u8 = 8;

/// A word. 0: no block begins here, or none that is tracked.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word(u32);

const TRACKED: u32 = 1 << 31;
const PINNED: u32 = 1 << 29;
const ISOLATED: u32 = 1 << 28;
const HAS_DOMAIN: u32 = 1 << 27;
const GENERATION_SHIFT: u32 = 24;
const ORDER_SHIFT: u32 = 20;
const DOMAIN_MASK: u32 = (1 << 14) - 1;

impl Word {
    const fn has(self, flag: u32) -> bool {
        self.0 & flag != 0
    }

    const fn with(self, flag: u32, is_on: bool) -> Self {
        Self(if is_on { self.0 | flag } else { self.0 & !flag })
    }

    const fn generation(self) -> u8 {
        (self.0 >> GENERATION_SHIFT & 7) as u8
    }

    const fn with_generation(self, generation: u8) -> Self {
        Self(self.0 & !(7 << GENERATION_SHIFT) | (generation as u32) << GENERATION_SHIFT)
    }

    fn order(self) -> Order {
        Order::new((self.0 >> ORDER_SHIFT & 15) as u8).expect("an order was put in")
    }

    fn domain(self) -> Option<DomainId> {
        let number = (self.0 & DOMAIN_MASK) as u16;
        if self.has(HAS_DOMAIN) { DomainId::new(number).ok() } else { None }
    }
}

/// A block that can move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Its first frame.
    pub frame: FrameNumber,
    /// Its order.
    pub order: Order,
    /// Whose it is; none for a request without a domain.
    pub domain: Option<DomainId>,
    /// It must not move: somebody's device works on it.
    pub is_pinned: bool,
    /// It is on its way somewhere.
    pub is_isolated: bool,
    /// Generations since it was known to be used, 0 for the youngest.
    pub age: u8,
}

/// What is known of the blocks of a node.
#[derive(Debug, Default)]
pub struct Pages {
    pieces: Vec<Option<Box<[u32]>>>,
    /// Numbers of the oldest and the youngest generation.
    oldest: u8,
    youngest: u8,
    /// Blocks in each, isolated ones not counted.
    counts: [u64; NUMBERS as usize],
    /// Where [`Pages::isolate`] goes on.
    hand: u32,
    /// Behind the highest block that ever was: the hand turns back there.
    end: usize,
    /// Words that were looked at, ever.
    looked_at: u64,
}

impl Pages {
    fn word(&self, frame: FrameNumber) -> Word {
        let piece = self.pieces.get(frame.0 as usize / PIECE_FRAMES).and_then(Option::as_deref);
        Word(piece.map_or(0, |piece| piece[frame.0 as usize % PIECE_FRAMES]))
    }

    fn set(&mut self, frame: FrameNumber, word: Word) {
        let piece = self.pieces.get_mut(frame.0 as usize / PIECE_FRAMES).and_then(Option::as_deref_mut);
        piece.expect("made before its first block is tracked")[frame.0 as usize % PIECE_FRAMES] = word.0;
    }

    /// Makes the words that a block needs to be tracked.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]
    pub(crate) fn prepare(&mut self, frame: FrameNumber) -> Result<(), FramesError> {
        let number = frame.0 as usize / PIECE_FRAMES;
        if let Some(missing @ 1..) = (number + 1).checked_sub(self.pieces.len()) {
            self.pieces.try_reserve(missing).map_err(|_| FramesError::NoMetadata)?;
            self.pieces.resize_with(number + 1, || None);
        }
        if self.pieces[number].is_none() {
            self.pieces[number] = Some(zeros(PIECE_FRAMES)?);
        }
        Ok(())
    }

    /// A range is gone, and nothing in it is tracked any more: words for nothing are given back.
    pub(crate) fn remove_range(&mut self, span: FrameRange) {
        let first = span.first.0 as usize / PIECE_FRAMES;
        let last = (span.first.0 as usize + span.count.0 as usize).div_ceil(PIECE_FRAMES);
        for slot in self.pieces.iter_mut().take(last).skip(first) {
            if slot.as_deref().is_some_and(|piece| piece.iter().all(|&word| word == 0)) {
                *slot = None;
            }
        }
    }

    /// Bytes of words.
    pub(crate) fn bytes(&self) -> usize {
        self.pieces.iter().flatten().map(|piece| size_of_val(&**piece)).sum()
    }

    /// A block is given out: from now on it is tracked, in the youngest generation.
    pub(crate) fn track(&mut self, frame: FrameNumber, order: Order, domain: Option<DomainId>) {
        let domain_bits = domain.map_or(0, |domain| HAS_DOMAIN | u32::from(domain.get()));
        let bits = TRACKED | u32::from(order.get()) << ORDER_SHIFT | domain_bits;
        let word = Word(bits).with_generation(self.youngest);
        self.counts[usize::from(self.youngest)] += 1;
        self.end = self.end.max(frame.0 as usize + 1);
        self.set(frame, word);
    }

    /// A block is given back.
    pub(crate) fn untrack(&mut self, frame: FrameNumber) {
        let word = self.word(frame);
        if word.has(TRACKED) {
            if !word.has(ISOLATED) {
                self.counts[usize::from(word.generation())] -= 1;
            }
            self.set(frame, Word(0));
        }
    }

    /// What is known of the block that begins at a frame.
    pub fn get(&self, frame: FrameNumber) -> Option<Page> {
        let word = self.word(frame);
        word.has(TRACKED).then(|| self.page(frame, word))
    }

    fn page(&self, frame: FrameNumber, word: Word) -> Page {
        Page {
            frame,
            order: word.order(),
            domain: word.domain(),
            is_pinned: word.has(PINNED),
            is_isolated: word.has(ISOLATED),
            age: self.age_of(word.generation()),
        }
    }

    const fn age_of(&self, generation: u8) -> u8 {
        (self.youngest + NUMBERS - generation) % NUMBERS
    }

    /// The block was used: it is young again. Nothing happens to one that is not tracked.
    pub(crate) fn on_used(&mut self, frame: FrameNumber) {
        let word = self.word(frame);
        if word.has(TRACKED) && word.generation() != self.youngest {
            if !word.has(ISOLATED) {
                self.counts[usize::from(word.generation())] -= 1;
                self.counts[usize::from(self.youngest)] += 1;
            }
            self.set(frame, word.with_generation(self.youngest));
        }
    }

    /// Sets whether the block must not move; whether that could be: not while it is on its way.
    pub(crate) fn set_pinned(&mut self, frame: FrameNumber, is_pinned: bool) -> bool {
        let word = self.word(frame);
        let may = word.has(TRACKED) && !word.has(ISOLATED);
        if may {
            self.set(frame, word.with(PINNED, is_pinned));
        }
        may
    }

    /// Begins a generation, if no more than [`GENERATIONS`] live with it; whether it did.
    pub(crate) fn age(&mut self) -> bool {
        self.retire();
        if self.age_of(self.oldest) + 1 >= GENERATIONS {
            return false;
        }
        self.youngest = (self.youngest + 1) % NUMBERS;
        true
    }

    /// The oldest generation that has any block is the oldest.
    fn retire(&mut self) {
        while self.oldest != self.youngest && self.counts[usize::from(self.oldest)] == 0 {
            self.oldest = (self.oldest + 1) % NUMBERS;
        }
    }

    /// Takes up to `wanted` blocks of the oldest generation out of the count, to be moved or put back. Looks at no more than
    /// `limit` frames, from where it stopped last. What cannot move is made young, so that it is not met again soon. Takes
    /// nothing while there is one generation only: age first.
    pub(crate) fn isolate(&mut self, wanted: usize, limit: usize) -> Vec<Page> {
        let mut found = Vec::new();
        let mut left = limit;
        self.retire();
        while found.len() < wanted && left > 0 && self.oldest != self.youngest {
            let Some(frame) = self.next_of(self.oldest, &mut left) else { break };
            let word = self.word(frame);
            self.counts[usize::from(self.oldest)] -= 1;
            if !word.has(PINNED) {
                self.set(frame, word.with(ISOLATED, true));
                found.push(self.page(frame, word));
            } else {
                self.counts[usize::from(self.youngest)] += 1;
                self.set(frame, word.with_generation(self.youngest));
            }
            self.retire();
        }
        found
    }

    /// The next block of a generation from the hand on, which stays behind it; `left` frames may be looked at.
    fn next_of(&mut self, generation: u8, left: &mut usize) -> Option<FrameNumber> {
        let end = self.end;
        while *left > 0 && end > 0 {
            let at = self.hand as usize % end;
            let (number, from) = (at / PIECE_FRAMES, at % PIECE_FRAMES);
            let Some(piece) = self.pieces[number].as_deref() else {
                // A GiB without a block takes one look.
                self.hand = ((number + 1) * PIECE_FRAMES % end) as u32;
                *left -= 1;
                continue;
            };
            let run = (PIECE_FRAMES - from).min(end - at).min(*left);
            let is_it = |&bits: &u32| {
                let word = Word(bits);
                word.has(TRACKED) && !word.has(ISOLATED) && word.generation() == generation
            };
            let at = piece[from..from + run].iter().position(is_it);
            let passed = at.map_or(run, |at| at + 1);
            *left -= passed;
            self.looked_at += passed as u64;
            self.hand = ((number * PIECE_FRAMES + from + passed) % end) as u32;
            if at.is_some() {
                return Some(FrameNumber((number * PIECE_FRAMES + from + passed - 1) as u32));
            }
        }
        None
    }

    /// Isolates one block, of any age, if it can move; whether it did.
    pub(crate) fn isolate_one(&mut self, frame: FrameNumber) -> bool {
        let word = self.word(frame);
        let may = word.has(TRACKED) && !word.has(PINNED) && !word.has(ISOLATED);
        if may {
            self.counts[usize::from(word.generation())] -= 1;
            self.set(frame, word.with(ISOLATED, true));
        }
        may
    }

    /// An isolated block stays after all, with the age it had, or as young when that is forgotten.
    pub(crate) fn put_back(&mut self, frame: FrameNumber) {
        let word = self.word(frame);
        if word.has(TRACKED) && word.has(ISOLATED) {
            // Its generation may have gone meanwhile; then it is as old as any.
            let is_known = self.age_of(word.generation()) <= self.age_of(self.oldest);
            let generation = if is_known { word.generation() } else { self.oldest };
            self.counts[usize::from(generation)] += 1;
            self.set(frame, word.with(ISOLATED, false).with_generation(generation));
        }
    }

    /// The blocks that are tracked, lowest first. O(frames).
    pub fn iter(&self) -> impl Iterator<Item = Page> + '_ {
        let words = self.pieces.iter().zip(0_usize..).flat_map(|(piece, number)| {
            let words = piece.as_deref().unwrap_or_default();
            words.iter().zip(number * PIECE_FRAMES..).map(|(&bits, at)| (Word(bits), at))
        });
        let tracked = words.filter(|(word, _)| word.has(TRACKED));
        tracked.map(|(word, at)| self.page(FrameNumber(at as u32), word))
    }

    /// Blocks by age, youngest first, isolated ones not counted.
    pub fn count_by_age(&self) -> [u64; GENERATIONS as usize] {
        core::array::from_fn(|age| self.counts[usize::from((self.youngest + NUMBERS - age as u8) % NUMBERS)])
    }

    /// Frames that were looked at to find cold blocks, ever.
    pub const fn looked_at(&self) -> u64 {
        self.looked_at
    }
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Track(u32),
        Untrack(u32),
        Use(u32),
        Pin(u32, bool),
        Age,
        Isolate(usize, usize),
        PutBack(u32),
    }

    fn op() -> impl Strategy<Value = Op> {
        let frame = || prop_oneof![0u32..40, Just(PIECE_FRAMES as u32 - 3)];
        prop_oneof![
            4 => frame().prop_map(Op::Track),
            2 => frame().prop_map(Op::Untrack),
            4 => frame().prop_map(Op::Use),
            1 => (frame(), any::<bool>()).prop_map(|(f, p)| Op::Pin(f, p)),
            3 => Just(Op::Age),
            3 => (1usize..8, prop_oneof![1usize..60, Just(PIECE_FRAMES)]).prop_map(|(w, l)| Op::Isolate(w, l)),
            2 => frame().prop_map(Op::PutBack),
        ]
    }

    #[derive(Clone, Debug)]
    struct Known {
        is_pinned: bool,
        is_isolated: bool,
        /// Number of the generation, never going round.
        generation: u64,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn the_oldest_that_can_move_are_taken_and_counts_are_what_they_count(
            ops in prop::collection::vec(op(), 0..200),
        ) {
            let mut pages = Pages::default();
            let mut known: BTreeMap<u32, Known> = BTreeMap::new();
            let mut youngest = 0_u64;
            for op in ops {
                match op {
                    Op::Track(frame) if !known.contains_key(&frame) => {
                        pages.prepare(FrameNumber(frame)).unwrap();
                        pages.track(FrameNumber(frame), Order::ZERO, Some(DomainId::ROOT));
                        let page = Known { is_pinned: false, is_isolated: false, generation: youngest };
                        known.insert(frame, page);
                    }
                    Op::Track(_) => {}
                    Op::Untrack(frame) => {
                        pages.untrack(FrameNumber(frame));
                        known.remove(&frame);
                    }
                    Op::Use(frame) => {
                        pages.on_used(FrameNumber(frame));
                        known.entry(frame).and_modify(|page| page.generation = youngest);
                    }
                    Op::Pin(frame, is_pinned) => {
                        let may = pages.set_pinned(FrameNumber(frame), is_pinned);
                        let page = known.get_mut(&frame).filter(|page| !page.is_isolated);
                        prop_assert_eq!(may, page.is_some());
                        page.into_iter().for_each(|page| page.is_pinned = is_pinned);
                    }
                    Op::Age => youngest += u64::from(pages.age()),
                    Op::Isolate(wanted, limit) => {
                        let taken = pages.isolate(wanted, limit);
                        prop_assert!(taken.len() <= wanted);
                        let oldest = known.values().filter(|p| !p.is_isolated).map(|p| p.generation).min();
                        for page in &taken {
                            let page = known.get_mut(&page.frame.0).unwrap();
                            prop_assert!(!page.is_pinned && !page.is_isolated, "R15");
                            prop_assert!(page.generation < youngest && Some(page.generation) >= oldest);
                            page.is_isolated = true;
                        }
                        // Those met that cannot move are young now.
                        for (&frame, page) in &mut known {
                            let now = pages.get(FrameNumber(frame)).unwrap();
                            if page.is_pinned && now.age == 0 {
                                page.generation = youngest;
                            }
                        }
                    }
                    Op::PutBack(frame) => {
                        pages.put_back(FrameNumber(frame));
                        known.entry(frame).and_modify(|page| page.is_isolated = false);
                    }
                }
                let mut counts = [0; GENERATIONS as usize];
                for (&frame, page) in &mut known {
                    let found = pages.get(FrameNumber(frame)).unwrap();
                    prop_assert_eq!(found.is_isolated, page.is_isolated);
                    if !page.is_isolated {
                        // A block that was isolated for long is as old as the oldest.
                        page.generation = youngest - u64::from(found.age).min(youngest - page.generation);
                        prop_assert_eq!(u64::from(found.age), youngest - page.generation);
                        counts[usize::from(found.age)] += 1;
                    }
                }
                prop_assert_eq!(pages.count_by_age(), counts);
            }
            prop_assert_eq!(pages.iter().count(), known.len());
        }
    }

    #[test]
    fn a_look_is_bounded_whatever_there_is() {
        let mut pages = Pages::default();
        for frame in 0..1000 {
            pages.prepare(FrameNumber(frame)).unwrap();
            pages.track(FrameNumber(frame), Order::ZERO, None);
        }
        assert!(pages.age());
        assert_eq!(pages.isolate(1000, 10).len(), 10);
        assert_eq!(pages.looked_at(), 10);
    }
}
