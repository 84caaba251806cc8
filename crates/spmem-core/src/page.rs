//! Pages: what is known of the blocks of a node that can move, and which of them are cold (struct page and the multi-generational
//! LRU are the models: include/linux/mm_types.h, mm/vmscan.c).
//!
//! A record for the first frame of each block whose holder moves it when asked to: whose it is, whether it may move now, when
//! it was last known to be used. Twenty bits a frame: four of state and generation, which is all that a search for cold
//! blocks reads, and sixteen of owner; the order of a block lies with the owner of its second frame. They are made for 4 MiB
//! at a time when the first block there is tracked; nodes without a service that needs them have none (R3). With what is lent
//! ([`crate::frames`]) and the zero state that is less than a thousandth of the memory.
//! *Generations* count from [`Pages::age`] to the next: a block is in the youngest when it was used since, and
//! [`Pages::isolate`] takes from the oldest. Nobody looks at access bits here: use is told ([`Pages::on_used`]).
//!
//! Takes no lock: part of the registry. Holes: a block that is used is in the youngest generation, however often. One that
//! stays isolated while five generations begin may come back younger than it was.

#![allow(
    clippy::cast_possible_truncation,
    reason = "a node has at most 2^32 frames, so pieces number few; orders and ages are small"
)]

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::frames::{FrameRange, FramesError};
use crate::units::{DomainId, FrameNumber, Order};
use crate::zero::zeros;

/// Frames that a piece of the records is for: 4 MiB, the largest block.
const PIECE_FRAMES: usize = 1 << 10;
/// Pieces of a table: 1 GiB.
const TABLE_PIECES: usize = 1 << 8;
/// Generations that are told apart at a time (`MAX_NR_GENS`).
pub const GENERATIONS: u8 = 4;
/// Generation numbers go round; one more than can live at a time.
const NUMBERS: u8 = GENERATIONS + 1;

/// Whether a block may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Free,
    Pinned,
    Isolated,
}

const HOLDS: u8 = 3;

/// Four bits: generation and hold of a block.
#[derive(Clone, Copy, PartialEq, Eq)]
struct State(u8);

impl State {
    /// No block begins here, or none that is tracked.
    const NONE: Self = Self(0);

    const fn new(generation: u8, hold: Hold) -> Self {
        Self(1 + generation * HOLDS + hold as u8)
    }

    const fn generation(self) -> u8 {
        (self.0 - 1) / HOLDS
    }

    const fn hold(self) -> Hold {
        match (self.0 - 1) % HOLDS {
            0 => Hold::Free,
            1 => Hold::Pinned,
            _ => Hold::Isolated,
        }
    }
}

const _: () = assert!(State::new(NUMBERS - 1, Hold::Isolated).0 < 16);

/// Of the owner of a block: its order is not 0, and lies with the owner of its second frame.
const HAS_ORDER: u16 = 1 << 15;

/// The records of 4 MiB: an owner a frame, then four states to a word.
#[derive(Debug)]
struct Piece(Box<[u16]>);

impl Piece {
    fn new() -> Result<Self, FramesError> {
        zeros(PIECE_FRAMES + PIECE_FRAMES / 4).map(Self)
    }

    fn state(&self, at: usize) -> State {
        State((self.0[PIECE_FRAMES + at / 4] >> (at % 4 * 4) & 15) as u8)
    }

    fn set_state(&mut self, at: usize, state: State) {
        let (word, shift) = (&mut self.0[PIECE_FRAMES + at / 4], at % 4 * 4);
        *word = *word & !(15 << shift) | u16::from(state.0) << shift;
    }

    fn is_empty(&self) -> bool {
        self.0[PIECE_FRAMES..].iter().all(|&states| states == 0)
    }

    fn set_owner(&mut self, at: usize, order: Order, domain: Option<DomainId>) {
        let is_large = order != Order::ZERO;
        self.0[at] = domain.map_or(0, |domain| domain.get() + 1) | if is_large { HAS_ORDER } else { 0 };
        if is_large {
            self.0[at + 1] = u16::from(order.get());
        }
    }

    fn owner(&self, at: usize) -> (Order, Option<DomainId>) {
        let word = self.0[at];
        let order = if word & HAS_ORDER == 0 { 0 } else { self.0[at + 1] as u8 };
        let domain = (word & !HAS_ORDER).checked_sub(1);
        (
            Order::new(order).expect("an order was put in"),
            domain.map(|domain| DomainId::new(domain).expect("a domain was put in")),
        )
    }

    /// The first block of a generation that is not isolated, from `from` on, before `to`.
    fn position(&self, generation: u8, from: usize, to: usize) -> Option<usize> {
        let wanted = [State::new(generation, Hold::Free), State::new(generation, Hold::Pinned)];
        (from..to).find(|&at| wanted.contains(&self.state(at)))
    }
}

type Table = Box<[Option<Piece>]>;

fn place(frame: usize) -> (usize, usize, usize) {
    let piece = frame / PIECE_FRAMES;
    (piece / TABLE_PIECES, piece % TABLE_PIECES, frame % PIECE_FRAMES)
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
    tables: Vec<Option<Table>>,
    /// Numbers of the oldest and the youngest generation.
    oldest: u8,
    youngest: u8,
    /// Blocks in each, isolated ones not counted.
    counts: [u64; NUMBERS as usize],
    /// Where [`Pages::isolate`] goes on.
    hand: u32,
    /// Behind the highest block that ever was: the hand turns back there.
    end: usize,
    /// Records that were looked at, ever.
    looked_at: u64,
}

impl Pages {
    fn piece(&self, frame: FrameNumber) -> Option<(&Piece, usize)> {
        let (table, piece, at) = place(frame.0 as usize);
        Some((self.tables.get(table)?.as_ref()?[piece].as_ref()?, at))
    }

    fn state(&self, frame: FrameNumber) -> State {
        self.piece(frame).map_or(State::NONE, |(piece, at)| piece.state(at))
    }

    fn piece_mut(&mut self, frame: FrameNumber) -> (&mut Piece, usize) {
        let (table, piece, at) = place(frame.0 as usize);
        let table = self.tables.get_mut(table).and_then(Option::as_mut);
        let piece = table.and_then(|table| table[piece].as_mut());
        (piece.expect("made before its first block is tracked"), at)
    }

    fn set(&mut self, frame: FrameNumber, state: State) {
        let (piece, at) = self.piece_mut(frame);
        piece.set_state(at, state);
    }

    /// Makes the records that a block needs to be tracked. These are all that is ever allocated here; what is made of them
    /// when memory runs out stays, without a block, until one comes or its range goes.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]
    pub(crate) fn prepare(&mut self, frame: FrameNumber) -> Result<(), FramesError> {
        let (number, piece, _) = place(frame.0 as usize);
        if let Some(missing @ 1..) = (number + 1).checked_sub(self.tables.len()) {
            self.tables.try_reserve(missing).map_err(|_| FramesError::NoMetadata)?;
            self.tables.resize_with(number + 1, || None);
        }
        if self.tables[number].is_none() {
            let mut table = Vec::new();
            table.try_reserve_exact(TABLE_PIECES).map_err(|_| FramesError::NoMetadata)?;
            table.resize_with(TABLE_PIECES, || None);
            self.tables[number] = Some(table.into_boxed_slice());
        }
        let slot = self.tables[number].as_mut().map(|table| &mut table[piece]);
        if let Some(slot @ None) = slot {
            *slot = Some(Piece::new()?);
        }
        Ok(())
    }

    /// A range is gone, and nothing in it is tracked any more: records of nothing are given back.
    pub(crate) fn remove_range(&mut self, span: FrameRange) {
        let (first, count) = (span.first.0 as usize, span.count.0 as usize);
        for frame in (first..first + count).step_by(PIECE_FRAMES) {
            let (number, piece, _) = place(frame);
            let Some(slot) = self.tables.get_mut(number) else { return };
            let Some(table) = slot else { continue };
            if table[piece].as_ref().is_some_and(Piece::is_empty) {
                table[piece] = None;
            }
            if table.iter().all(Option::is_none) {
                *slot = None;
            }
        }
    }

    /// Bytes of records, tables included.
    pub(crate) fn bytes(&self) -> usize {
        let tables = self.tables.iter().flatten();
        let pieces = tables.clone().flat_map(|table| table.iter().flatten());
        tables.map(|table| size_of_val(&**table)).sum::<usize>()
            + pieces.map(|piece| size_of_val(&*piece.0)).sum::<usize>()
    }

    /// A block is given out: from now on it is tracked, in the youngest generation.
    pub(crate) fn track(&mut self, frame: FrameNumber, order: Order, domain: Option<DomainId>) {
        self.counts[usize::from(self.youngest)] += 1;
        self.end = self.end.max(frame.0 as usize + 1);
        let state = State::new(self.youngest, Hold::Free);
        let (piece, at) = self.piece_mut(frame);
        piece.set_owner(at, order, domain);
        piece.set_state(at, state);
    }

    /// A block is given back.
    pub(crate) fn untrack(&mut self, frame: FrameNumber) {
        let state = self.state(frame);
        if state != State::NONE {
            if state.hold() != Hold::Isolated {
                self.counts[usize::from(state.generation())] -= 1;
            }
            self.set(frame, State::NONE);
        }
    }

    /// What is known of the block that begins at a frame.
    pub fn get(&self, frame: FrameNumber) -> Option<Page> {
        let (piece, at) = self.piece(frame)?;
        self.page(piece, at, frame)
    }

    fn page(&self, piece: &Piece, at: usize, frame: FrameNumber) -> Option<Page> {
        let state = piece.state(at);
        if state == State::NONE {
            return None;
        }
        let (order, domain) = piece.owner(at);
        let (is_pinned, is_isolated) = (state.hold() == Hold::Pinned, state.hold() == Hold::Isolated);
        Some(Page { frame, order, domain, is_pinned, is_isolated, age: self.age_of(state.generation()) })
    }

    const fn age_of(&self, generation: u8) -> u8 {
        (self.youngest + NUMBERS - generation) % NUMBERS
    }

    /// The block was used: it is young again. Nothing happens to one that is not tracked.
    pub(crate) fn on_used(&mut self, frame: FrameNumber) {
        let state = self.state(frame);
        if state != State::NONE && state.generation() != self.youngest {
            if state.hold() != Hold::Isolated {
                self.counts[usize::from(state.generation())] -= 1;
                self.counts[usize::from(self.youngest)] += 1;
            }
            self.set(frame, State::new(self.youngest, state.hold()));
        }
    }

    /// Sets whether the block must not move; whether that could be: not while it is on its way.
    pub(crate) fn set_pinned(&mut self, frame: FrameNumber, is_pinned: bool) -> bool {
        let state = self.state(frame);
        let may = state != State::NONE && state.hold() != Hold::Isolated;
        if may {
            let hold = if is_pinned { Hold::Pinned } else { Hold::Free };
            self.set(frame, State::new(state.generation(), hold));
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

    /// Takes up to `wanted` blocks of the oldest generation out of the count, each given to `take`, to be moved or put back.
    /// Looks at no more than `limit` frames, from where it stopped last. What cannot move is made young, so that it is not met
    /// again soon. Takes nothing while there is one generation only: age first.
    pub(crate) fn isolate(&mut self, wanted: usize, limit: usize, mut take: impl FnMut(Page)) {
        let (mut taken, mut left) = (0, limit);
        self.retire();
        while taken < wanted && left > 0 && self.oldest != self.youngest {
            let Some(frame) = self.next_of(self.oldest, &mut left) else { break };
            let state = self.state(frame);
            self.counts[usize::from(self.oldest)] -= 1;
            if state.hold() == Hold::Pinned {
                self.counts[usize::from(self.youngest)] += 1;
                self.set(frame, State::new(self.youngest, Hold::Pinned));
            } else {
                self.get(frame).into_iter().for_each(&mut take);
                taken += 1;
                self.set(frame, State::new(state.generation(), Hold::Isolated));
            }
            self.retire();
        }
    }

    /// Blocks that are not isolated.
    pub(crate) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The next block of a generation from the hand on, which stays behind it; `left` frames may be looked at.
    fn next_of(&mut self, generation: u8, left: &mut usize) -> Option<FrameNumber> {
        let end = self.end;
        while *left > 0 && end > 0 {
            let first = self.hand as usize % end;
            let (number, piece, from) = place(first);
            let table = self.tables[number].as_ref();
            let Some(piece) = table.and_then(|table| table[piece].as_ref()) else {
                // 4 MiB without a block take one look, and so does a GiB.
                let passed = if table.is_some() { PIECE_FRAMES } else { PIECE_FRAMES * TABLE_PIECES };
                self.hand = ((first / passed + 1) * passed % end) as u32;
                *left -= 1;
                continue;
            };
            let run = (PIECE_FRAMES - from).min(end - first).min(*left);
            let at = piece.position(generation, from, from + run);
            let passed = at.map_or(run, |at| at - from + 1);
            *left -= passed;
            self.looked_at += passed as u64;
            self.hand = ((first + passed) % end) as u32;
            if at.is_some() {
                return Some(FrameNumber((first + passed - 1) as u32));
            }
        }
        None
    }

    /// Isolates one block, of any age, if it can move; whether it did.
    pub(crate) fn isolate_one(&mut self, frame: FrameNumber) -> bool {
        let state = self.state(frame);
        let may = state != State::NONE && state.hold() == Hold::Free;
        if may {
            self.counts[usize::from(state.generation())] -= 1;
            self.set(frame, State::new(state.generation(), Hold::Isolated));
        }
        may
    }

    /// An isolated block stays after all, with the age it had, or as young when that is forgotten.
    pub(crate) fn put_back(&mut self, frame: FrameNumber) {
        let state = self.state(frame);
        if state != State::NONE && state.hold() == Hold::Isolated {
            // Its generation may have gone meanwhile; then it is as old as any.
            let is_known = self.age_of(state.generation()) <= self.age_of(self.oldest);
            let generation = if is_known { state.generation() } else { self.oldest };
            self.counts[usize::from(generation)] += 1;
            self.set(frame, State::new(generation, Hold::Free));
        }
    }

    /// The blocks that are tracked, lowest first. O(frames).
    pub fn iter(&self) -> impl Iterator<Item = Page> + '_ {
        let tables =
            self.tables.iter().zip(0_usize..).filter_map(|(table, number)| Some((table.as_ref()?, number)));
        let pieces = tables.flat_map(|(table, number)| table.iter().zip(number * TABLE_PIECES..));
        let pieces = pieces.filter_map(|(piece, number)| Some((piece.as_ref()?, number * PIECE_FRAMES)));
        pieces.flat_map(move |(piece, first)| {
            (0..PIECE_FRAMES).filter_map(move |at| self.page(piece, at, FrameNumber((first + at) as u32)))
        })
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
mod tests;
