//! Zone: the bottom layer, up to 1 GiB of a range under one lock. Keeps huge frames whole, and makes them whole again.
//!
//! Two levels, both bit arithmetic in one word: 64 frames make a row, 16 rows a tree (4 MiB). An index an order says
//! which rows, or trees, have a free block that large; the lowest is taken: low huge frames fill up, high ones drain
//! and become whole. All of it lies in words lent by the caller, zero meaning free, so that nothing has to be written
//! before it is used. The words are atomic because they are shared; they are read and written with the lock held only,
//! so each access is a plain one.

use core::ops::ControlFlow;

use super::word::{self, WORD_ORDER};
use crate::sync::AtomicU64;
use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::units::Order;

/// Frames of a zone: 1 GiB.
pub(super) const ZONE_FRAMES: usize = crate::sync::ZONE_TREES * TREE_FRAMES;
pub(super) const ROW_FRAMES: usize = 64;
pub(super) const TREE_FRAMES: usize = 1 << 10;
const TREE_ROWS: usize = TREE_FRAMES / ROW_FRAMES;
const ROWS: usize = ZONE_FRAMES / ROW_FRAMES;
const TREES: usize = ZONE_FRAMES / TREE_FRAMES;
/// The order of a full row: from it on trees are searched, below it rows.
const ROW_ORDER: usize = WORD_ORDER;
/// Rows of a tree that are in use, all 16.
const TREE_USED: u64 = (1 << TREE_ROWS) - 1;

/// 1 while somebody works on the zone.
const LOCK: usize = 0;
/// Frames in use, those in caches and those that do not exist included.
const USED: usize = 1;
/// How many of the largest orders have no free block.
const LOST: usize = 2;
/// Frames that are poisoned.
const POISONED: usize = 3;
/// Those of them that are out of use. They count as used, too.
const RETIRED: usize = 4;
/// The name of the cache that was filled from here last.
const FILLER: usize = 5;
/// Of a range's first zone: 1 while the range has it.
const LENT: usize = 6;
/// A word a row, a bit a frame: it is in use.
const ROW: usize = 8;
/// A word a tree, a bit a row: something of it is in use.
const TREE: usize = ROW + ROWS;
/// For each order: a bit a row, or tree, that has no free block so large; behind them a bit a word of those that are all
/// ones.
const INDEX: usize = TREE + TREES;
const ROW_INDEX: usize = ROWS / 64 + 1;
const TREE_INDEX: usize = TREES / 64 + 1;
/// A word a row, a bit a frame: it is poisoned. Not touched as long as none is.
const POISON: usize = INDEX + ROW_ORDER * ROW_INDEX + (Order::COUNT - ROW_ORDER) * TREE_INDEX;
/// Words of a zone: 70 KiB.
pub(super) const ZONE_WORDS: usize = (POISON + ROWS).next_multiple_of(8);

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

    fn get(&self, at: usize) -> u64 {
        self.words[at].load(Relaxed)
    }

    fn set(&self, at: usize, word: u64) {
        self.words[at].store(word, Relaxed);
    }

    /// Makes the last frames of a fresh zone ones that do not exist: all from `count` on.
    pub(super) fn truncate(&self, count: usize) {
        for row in count.div_ceil(ROW_FRAMES)..ROWS {
            self.set(ROW + row, u64::MAX);
            self.none_in_row(row, 0);
        }
        if !count.is_multiple_of(ROW_FRAMES) {
            let row = count / ROW_FRAMES;
            let used = u64::MAX << (count % ROW_FRAMES);
            self.set(ROW + row, used);
            self.none_in_row(row, levels(!used));
        }
        for tree in count / TREE_FRAMES..TREES {
            let rows = count.saturating_sub(tree * TREE_FRAMES) / ROW_FRAMES;
            let used = TREE_USED & (TREE_USED << rows);
            self.set(TREE + tree, used);
            self.none_in_tree(tree, levels(!used & TREE_USED));
        }
        self.add_used((ZONE_FRAMES - count) as i64);
    }

    /// How many orders have a free block, before and after what was done since the last call.
    pub(super) fn update_levels(&self) -> (usize, usize) {
        let before = Order::COUNT - self.get(LOST) as usize;
        let mut levels = before;
        while levels > 0 && self.first(levels - 1).is_none() {
            levels -= 1;
        }
        while levels < Order::COUNT && self.first(levels).is_some() {
            levels += 1;
        }
        if levels != before {
            self.set(LOST, (Order::COUNT - levels) as u64);
        }
        (before, levels)
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

    /// Gives a block back and merges it with its free neighbours. It must be in use.
    pub(super) fn put(&self, first: usize, order: usize) {
        self.add_used(-(1 << order));
        let row = first / ROW_FRAMES;
        if order >= ROW_ORDER {
            let rows = 1 << (order - ROW_ORDER);
            self.words[ROW + row..ROW + row + rows].iter().for_each(|word| word.store(0, Relaxed));
            let run = word::mask(row % 64, order - ROW_ORDER);
            for order in 0..ROW_ORDER {
                self.mark_some(order, row / 64, run);
            }
            self.put_in_tree(row, order - ROW_ORDER);
            return;
        }
        let bit = first % ROW_FRAMES;
        let used = self.get(ROW + row) & !word::mask(bit, order);
        self.set(ROW + row, used);
        self.some_in_row(row, word::merged(!used, bit, order) + 1);
        if used == 0 {
            self.put_in_tree(row, 0);
        }
    }

    /// Gives single frames back, wherever they are. One that is free already is not counted again.
    pub(super) fn put_each(&self, frames: &[u32]) {
        let place = |frame: u32| (frame as usize % ZONE_FRAMES / ROW_FRAMES, frame as usize % ROW_FRAMES);
        // First all words, one not waiting for another, as no branch depends on them; then what they tell the index.
        let mut were_used = 0;
        for (row, bit) in frames.iter().map(|&frame| place(frame)) {
            let used = self.get(ROW + row);
            were_used += used >> bit & 1;
            self.set(ROW + row, used & !(1 << bit));
        }
        for (row, bit) in frames.iter().map(|&frame| place(frame)) {
            let used = self.get(ROW + row);
            self.some_in_row(row, word::merged(!used, bit, 0) + 1);
            if used == 0 {
                self.put_in_tree(row, 0);
            }
        }
        self.add_used(-(were_used as i64));
    }

    /// Gives single frames of a row back, as bits. One that is free already is not counted again.
    pub(super) fn put_in_row(&self, first: usize, bits: u64) {
        let row = first / ROW_FRAMES;
        let before = self.get(ROW + row);
        let used = before & !bits;
        self.add_used(-i64::from((before & bits).count_ones()));
        self.set(ROW + row, used);
        self.some_in_row(row, levels(!used));
        if used == 0 {
            self.put_in_tree(row, 0);
        }
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

    /// One more frame is out of use.
    pub(super) fn count_retired_one(&self) {
        self.set(RETIRED, self.get(RETIRED) + 1);
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

    /// The highest free block of `order`: its first frame.
    pub(super) fn find_highest(&self, order: usize) -> Option<usize> {
        let (base, summary) = index(order);
        let at = (base..summary).rev().find(|&at| self.get(at) != u64::MAX)?;
        let unit = (at - base) * 64 + (!self.get(at)).ilog2() as usize;
        let expect = "the index says that it has such a block";
        Some(if order < ROW_ORDER {
            unit * ROW_FRAMES + word::highest(!self.get(ROW + unit), order).expect(expect)
        } else {
            let free = !self.get(TREE + unit) & TREE_USED;
            unit * TREE_FRAMES + word::highest(free, order - ROW_ORDER).expect(expect) * ROW_FRAMES
        })
    }

    /// Adds the free blocks by order, each counted once at the highest order it reaches.
    pub(super) fn count_free_blocks(&self, counts: &mut [u64; Order::COUNT]) {
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

    fn add_used(&self, frames: i64) {
        self.set(USED, self.get(USED).wrapping_add_signed(frames));
    }

    fn take_in_row(&self, row: usize, free: u64, taken: u64) {
        let left = free & !taken;
        self.set(ROW + row, !left);
        self.none_in_row(row, levels(left));
        if free == u64::MAX {
            let tree = row / TREE_ROWS;
            let used = self.get(TREE + tree) | 1 << (row % TREE_ROWS);
            self.set(TREE + tree, used);
            self.none_in_tree(tree, levels(!used & TREE_USED));
        }
    }

    fn take_in_tree(&self, tree: usize, row: usize, rows_order: usize) {
        let first = tree * TREE_ROWS + row;
        let rows = &self.words[ROW + first..ROW + first + (1 << rows_order)];
        rows.iter().for_each(|word| word.store(u64::MAX, Relaxed));
        let run = word::mask(first % 64, rows_order);
        for order in 0..ROW_ORDER {
            self.mark_none(order, first / 64, run);
        }
        let used = self.get(TREE + tree) | word::mask(row, rows_order);
        self.set(TREE + tree, used);
        self.none_in_tree(tree, levels(!used & TREE_USED));
    }

    fn put_in_tree(&self, row: usize, rows_order: usize) {
        let (tree, at) = (row / TREE_ROWS, row % TREE_ROWS);
        let used = self.get(TREE + tree) & !word::mask(at, rows_order);
        self.set(TREE + tree, used);
        let largest = word::merged(!used & TREE_USED, at, rows_order);
        for order in ROW_ORDER..=ROW_ORDER + largest {
            self.mark_some(order, tree / 64, 1 << (tree % 64));
        }
    }

    /// The row has no free block of the orders from `levels` on.
    fn none_in_row(&self, row: usize, levels: usize) {
        for order in levels..ROW_ORDER {
            if !self.mark_none(order, row / 64, 1 << (row % 64)) {
                break; // nor of a larger one, as known
            }
        }
    }

    fn some_in_row(&self, row: usize, levels: usize) {
        for order in (0..levels.min(ROW_ORDER)).rev() {
            if !self.mark_some(order, row / 64, 1 << (row % 64)) {
                break; // and of smaller ones, as known
            }
        }
    }

    fn none_in_tree(&self, tree: usize, levels: usize) {
        for order in ROW_ORDER + levels..Order::COUNT {
            if !self.mark_none(order, tree / 64, 1 << (tree % 64)) {
                break;
            }
        }
    }

    /// The rows, or trees, `run` of a word have no free block of the order. Whether that is news.
    fn mark_none(&self, order: usize, at: usize, run: u64) -> bool {
        let (base, summary) = index(order);
        let word = self.get(base + at);
        if word & run == run {
            return false;
        }
        self.set(base + at, word | run);
        if word | run == u64::MAX {
            self.set(summary, self.get(summary) | 1 << at);
        }
        true
    }

    /// They have. Whether that is news.
    fn mark_some(&self, order: usize, at: usize, run: u64) -> bool {
        let (base, summary) = index(order);
        let word = self.get(base + at);
        if word & run == 0 {
            return false;
        }
        self.set(base + at, word & !run);
        if word == u64::MAX {
            self.set(summary, self.get(summary) & !(1 << at));
        }
        true
    }

    /// The lowest row, or tree, with a free block of `order`.
    fn first(&self, order: usize) -> Option<usize> {
        let (base, summary) = index(order);
        let at = self.get(summary).trailing_ones() as usize;
        if at == summary - base {
            return None;
        }
        Some(at * 64 + self.get(base + at).trailing_ones() as usize)
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

/// Where the index of an order begins, and where its summary is.
const fn index(order: usize) -> (usize, usize) {
    if order < ROW_ORDER {
        let base = INDEX + order * ROW_INDEX;
        (base, base + ROW_INDEX - 1)
    } else {
        let base = INDEX + ROW_ORDER * ROW_INDEX + (order - ROW_ORDER) * TREE_INDEX;
        (base, base + TREE_INDEX - 1)
    }
}

/// How many orders the word has a free block of.
fn levels(free: u64) -> usize {
    word::largest(free).map_or(0, |order| order + 1)
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
