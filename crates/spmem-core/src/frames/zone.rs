//! Zone: the bottom layer, up to 1 GiB of a range under one lock. Keeps huge frames whole, and makes them whole again.
//!
//! Two levels, both bit arithmetic in one word: 64 frames make a row, 16 rows a tree (4 MiB). An [`index`](super::index) an order
//! says which rows, or trees, have a free block that large; the lowest is taken: low huge frames fill up, high ones drain
//! and become whole. All of it lies in words lent by the caller, zero meaning free, so that nothing has to be written
//! before it is used. The words are atomic because they are shared; they are read and written with the lock held only,
//! so each access is a plain one.

use core::ops::ControlFlow;

use super::index::{INDEX_WORDS, levels};
use super::word::{self, WORD_ORDER};
use crate::sync::AtomicU64;
use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::units::Order;

/// Frames of a zone: 1 GiB.
pub(super) const ZONE_FRAMES: usize = crate::sync::ZONE_TREES * TREE_FRAMES;
pub(super) const ROW_FRAMES: usize = 64;
pub(super) const TREE_FRAMES: usize = 1 << 10;
pub(super) const TREE_ROWS: usize = TREE_FRAMES / ROW_FRAMES;
pub(super) const ROWS: usize = ZONE_FRAMES / ROW_FRAMES;
pub(super) const TREES: usize = ZONE_FRAMES / TREE_FRAMES;
/// The order of a full row: from it on trees are searched, below it rows.
pub(super) const ROW_ORDER: usize = WORD_ORDER;
/// Rows of a tree that are in use, all 16.
pub(super) const TREE_USED: u64 = (1 << TREE_ROWS) - 1;

/// 1 while somebody works on the zone.
const LOCK: usize = 0;
/// Frames in use, those in caches and those that do not exist included.
const USED: usize = 1;
/// How many of the largest orders have no free block.
pub(super) const LOST: usize = 2;
/// Frames that are poisoned.
const POISONED: usize = 3;
/// Those of them that are out of use. They count as used, too.
const RETIRED: usize = 4;
/// The name of the cache that was filled from here last.
const FILLER: usize = 5;
/// Of a range's first zone, and so at the same place whatever the range's length: 1 while the range has it.
const LENT: usize = 6;
/// A word a row, a bit a frame: it is in use.
pub(super) const ROW: usize = 8;
/// A word a tree, a bit a row: something of it is in use.
pub(super) const TREE: usize = ROW + ROWS;
/// A word a tree: what its rows lack of levels.
pub(super) const LEVELS: usize = TREE + TREES;
/// The index of all orders.
pub(super) const INDEX: usize = LEVELS + TREES;
/// A word a row, a bit a frame: it is poisoned. Not touched as long as none is.
const POISON: usize = INDEX + INDEX_WORDS;
/// A word a row, a bit a frame: it is poisoned and out of use. What its state says of that a cache may overwrite, with a free
/// that comes late.
const OUT: usize = POISON + ROWS;
/// Words of a zone: 103 KiB.
pub(super) const ZONE_WORDS: usize = (OUT + ROWS).next_multiple_of(8);

/// All that a zone has: with a length that is known no access has to be checked.
pub(super) type Words = [AtomicU64; ZONE_WORDS];

/// How long the lock is waited for before `relax` is asked.
const SPINS: u32 = 64;

/// A zone, locked for as long as this lives.
pub(super) struct Zone<'a> {
    words: &'a Words,
}

impl Drop for Zone<'_> {
    fn drop(&mut self) {
        // Release: whoever locks it next sees what was written.
        self.words[LOCK].store(0, Release);
    }
}

/// Frames in use in a zone, or out of use, a moment ago.
pub(super) fn read_used(words: &Words) -> u64 {
    words[USED].load(Relaxed)
}

impl<'a> Zone<'a> {
    /// Whether nothing was ever done here. Looks at what every use of a zone changes.
    pub(super) fn is_fresh(words: &Words) -> bool {
        words[..ROW].iter().all(|word| word.load(Relaxed) == 0)
    }

    /// A range has the words of its first zone from now on, unless another one has them.
    pub(super) fn claim(words: &Words) -> bool {
        // Relaxed: who lends them knows what was written before.
        words[LENT].compare_exchange(0, 1, Relaxed, Relaxed).is_ok()
    }

    /// Waits for the zone. `relax` is called while somebody else has had it for long, perhaps without a processor.
    pub(super) fn lock(words: &'a Words, relax: fn()) -> Self {
        let mut spins = 0;
        while words[LOCK].compare_exchange(0, 1, Acquire, Relaxed).is_err() {
            while words[LOCK].load(Relaxed) != 0 {
                spins += 1;
                if spins % SPINS == 0 { relax() } else { crate::sync::spin_loop() }
            }
        }
        Self { words }
    }

    /// The zone, if nobody has it.
    pub(super) fn try_lock(words: &'a Words) -> Option<Self> {
        let lock = &words[LOCK];
        let is_mine = lock.load(Relaxed) == 0 && lock.compare_exchange(0, 1, Acquire, Relaxed).is_ok();
        // Not `then_some`: a guard that is made is dropped, and lets go of the lock.
        is_mine.then(|| Self { words })
    }

    pub(super) const fn words(&self) -> &'a Words {
        self.words
    }

    pub(super) fn get(&self, at: usize) -> u64 {
        self.words[at].load(Relaxed)
    }

    pub(super) fn set(&self, at: usize, word: u64) {
        self.words[at].store(word, Relaxed);
    }

    /// Takes a free block of `order`, in the lowest row or tree that has one: its first frame.
    pub(super) fn take(&self, order: usize) -> Option<usize> {
        let at = self.first(order)?;
        self.add_used(1 << order);
        if order < ROW_ORDER {
            let free = !self.get(ROW + at);
            let bit = word::place(free, order).expect("the index says that the row has such a block");
            self.take_in_row(at, free, word::mask(bit, order));
            Some(at * ROW_FRAMES + bit)
        } else {
            let free = !self.get(TREE + at) & TREE_USED;
            let row = word::place(free, order - ROW_ORDER).expect("the index says that the tree has such a block");
            self.take_in_tree(at, row, order - ROW_ORDER);
            Some(at * TREE_FRAMES + row * ROW_FRAMES)
        }
    }

    /// Takes free frames of the lowest row that has any, at most `most`: the row's first frame, and the frames as bits.
    pub(super) fn take_row(&self, most: usize) -> Option<(usize, u64)> {
        let row = self.first(0)?;
        let free = !self.get(ROW + row);
        let mut taken = free;
        while taken.count_ones() as usize > most {
            taken ^= 1 << taken.ilog2();
        }
        self.take_in_row(row, free, taken);
        self.add_used(i64::from(taken.count_ones()));
        Some((row * ROW_FRAMES, taken))
    }

    /// Takes free frames at the lowest place that has any, at most `most`: whole rows, as many as make a block, or a part of one.
    pub(super) fn take_run(&self, most: usize) -> Option<Run> {
        let row = self.first(0)?;
        if most < ROW_FRAMES || self.get(ROW + row) != 0 {
            let (first, bits) = self.take_row(most)?;
            return Some(Run { first, bits, rows: 1 });
        }
        let (tree, at) = (row / TREE_ROWS, row % TREE_ROWS);
        // Nothing is free below, so the block that holds the row begins with it.
        let free = word::merged(!self.get(TREE + tree) & TREE_USED, at, 0);
        let order = free.min((most / ROW_FRAMES).ilog2() as usize);
        self.add_used((ROW_FRAMES << order) as i64);
        self.take_in_tree(tree, at, order);
        Some(Run { first: row * ROW_FRAMES, bits: u64::MAX, rows: 1 << order })
    }

    /// Gives a block back and merges it with its free neighbours. What of it is free already is not counted again.
    pub(super) fn put(&self, first: usize, order: usize) {
        let row = first / ROW_FRAMES;
        if order >= ROW_ORDER {
            return self.put_rows(row, order - ROW_ORDER);
        }
        let (bit, before) = (first % ROW_FRAMES, self.get(ROW + row));
        let mask = word::mask(bit, order);
        // All of it is in use, but after a double free: then its bits are counted, which takes longer.
        let were_used = if before & mask == mask { 1 << order } else { (before & mask).count_ones() };
        self.add_used(-i64::from(were_used));
        let used = before & !mask;
        self.set(ROW + row, used);
        self.raise_row(row, word::merged(!used, bit, order) + 1);
    }

    /// Gives single frames of a row back, as bits. One that is free already is not counted again.
    pub(super) fn put_in_row(&self, first: usize, bits: u64) {
        let row = first / ROW_FRAMES;
        let before = self.get(ROW + row);
        let used = before & !bits;
        self.add_used(-i64::from((before & bits).count_ones()));
        self.set(ROW + row, used);
        self.raise_row(row, levels(!used));
    }

    /// A cache is filled from here: which one was before.
    pub(super) fn replace_filler(&self, name: u32) -> u32 {
        let before = self.get(FILLER);
        self.set(FILLER, u64::from(name));
        before as u32
    }

    pub(super) fn is_used(&self, frame: usize) -> bool {
        self.get(ROW + frame / ROW_FRAMES) >> (frame % ROW_FRAMES) & 1 != 0
    }

    /// Whether any frame is poisoned.
    pub(super) fn has_poison(&self) -> bool {
        Self::reads_poison(self.words)
    }

    /// Those frames of a row that are poisoned.
    pub(super) fn poisoned_in(&self, row: usize) -> u64 {
        Self::read_poisoned_in(self.words, row)
    }

    /// A frame is poisoned; whether that is news.
    pub(super) fn mark_poisoned(&self, frame: usize) -> bool {
        let (at, bit) = (POISON + frame / ROW_FRAMES, 1 << (frame % ROW_FRAMES));
        let is_new = self.get(at) & bit == 0;
        if is_new {
            self.set(at, self.get(at) | bit);
            self.set(POISONED, self.get(POISONED) + 1);
        }
        is_new
    }

    /// A frame is out of use; whether that is news.
    pub(super) fn mark_retired(&self, frame: usize) -> bool {
        let (at, bit) = (OUT + frame / ROW_FRAMES, 1 << (frame % ROW_FRAMES));
        let is_new = self.get(at) & bit == 0;
        if is_new {
            self.set(at, self.get(at) | bit);
            self.set(RETIRED, self.get(RETIRED) + 1);
        }
        is_new
    }

    pub(super) fn is_retired(&self, frame: usize) -> bool {
        Self::reads_retired(self.words, frame)
    }

    /// Without the lock: whether a frame was out of use a moment ago.
    pub(super) fn reads_retired(words: &Words, frame: usize) -> bool {
        words[OUT + frame / ROW_FRAMES].load(Relaxed) >> (frame % ROW_FRAMES) & 1 != 0
    }

    /// Without the lock: those frames of a row that were not free a moment ago.
    pub(super) fn read_row(words: &Words, row: usize) -> u64 {
        words[ROW + row].load(Relaxed)
    }

    /// Without the lock: whether any frame was poisoned a moment ago.
    pub(super) fn reads_poison(words: &Words) -> bool {
        words[POISONED].load(Relaxed) != 0
    }

    /// Without the lock: those frames of a row that were.
    pub(super) fn read_poisoned_in(words: &Words, row: usize) -> u64 {
        words[POISON + row].load(Relaxed)
    }

    /// Without the lock: frames out of use a moment ago.
    pub(super) fn read_retired(words: &Words) -> u64 {
        words[RETIRED].load(Relaxed)
    }

    /// Whether all frames of `[first, end)` are free.
    pub(super) fn is_free(&self, first: usize, end: usize) -> bool {
        each_row(first, end, |row, mask| {
            if self.get(ROW + row) & mask == 0 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
        .is_continue()
    }

    /// Takes the block of `order` at `first`, all of which is free.
    pub(super) fn take_at(&self, first: usize, order: usize) {
        self.add_used(1 << order);
        let row = first / ROW_FRAMES;
        if order < ROW_ORDER {
            self.take_in_row(row, !self.get(ROW + row), word::mask(first % ROW_FRAMES, order));
        } else {
            self.take_in_tree(row / TREE_ROWS, row % TREE_ROWS, order - ROW_ORDER);
        }
    }

    /// Adds the free blocks by order, each counted once at the highest order it reaches.
    pub(super) fn count_free_blocks(&self, counts: &mut [u64; Order::COUNT]) {
        debug_assert!(self.is_index_right(), "what is known of a row's blocks is not what it has");
        let (in_rows, in_trees) = counts.split_at_mut(ROW_ORDER);
        for row in 0..ROWS {
            let used = self.get(ROW + row);
            if used != 0 && used != u64::MAX {
                word::count_blocks(!used, in_rows);
            }
        }
        for tree in 0..TREES {
            word::count_blocks(!self.get(TREE + tree) & TREE_USED, in_trees);
        }
    }

    pub(super) fn add_used(&self, frames: i64) {
        self.set(USED, self.get(USED).wrapping_add_signed(frames));
    }

    fn take_in_row(&self, row: usize, free: u64, taken: u64) {
        let left = free & !taken;
        self.set(ROW + row, !left);
        self.lower_row(row, left);
        if free == u64::MAX {
            self.take_rows(row / TREE_ROWS, 1 << (row % TREE_ROWS));
        }
    }
}

/// Frames that were taken together.
#[derive(Clone, Copy, Default)]
pub(super) struct Run {
    /// The first frame of the first row.
    pub(super) first: usize,
    /// Which frames of a row.
    pub(super) bits: u64,
    /// Rows; more than one are whole.
    pub(super) rows: usize,
}

impl Run {
    pub(super) const fn frames(&self) -> usize {
        self.bits.count_ones() as usize * self.rows
    }
}

/// Each row of `[first, end)` and which of its frames are meant.
pub(super) fn each_row(
    first: usize,
    end: usize,
    mut look: impl FnMut(usize, u64) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let mut at = first;
    while at < end {
        let row = at / ROW_FRAMES;
        let stop = end.min((row + 1) * ROW_FRAMES);
        let count = stop - at;
        let mask = if count == ROW_FRAMES { u64::MAX } else { ((1 << count) - 1) << (at % ROW_FRAMES) };
        look(row, mask)?;
        at = stop;
    }
    ControlFlow::Continue(())
}
