//! Zone: the bottom layer, up to 1 GiB of a range under one lock. Keeps huge frames whole, and makes them whole again.
//!
//! Two levels, both bit arithmetic in one word: 64 frames make a row, 16 rows a tree (4 MiB). An index an order says
//! which rows, or trees, have a free block that large; the lowest is taken: low huge frames fill up, high ones drain
//! and become whole. All of it lies in words lent by the caller, zero meaning free, so that nothing has to be written
//! before it is used. The words are atomic because they are shared; they are read and written with the lock held only,
//! so each access is a plain one.
//!
//! The state of a frame, a byte, is apart: what has been given out, and as what. Whoever holds the frame may write it
//! without the lock.

use super::word::{self, WORD_ORDER};
use crate::units::Order;
use core::ops::ControlFlow;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU8, AtomicU64};

/// Frames of a zone: 1 GiB.
pub(super) const ZONE_FRAMES: usize = 1 << 18;
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
/// A word a row, a bit a frame: it is in use.
const ROW: usize = 8;
/// A word a tree, a bit a row: something of it is in use.
const TREE: usize = ROW + ROWS;
/// For each order: a bit a row, or tree, that has no free block so large; behind them a bit a word of those that are all
/// ones.
const INDEX: usize = TREE + TREES;
const ROW_INDEX: usize = ROWS / 64 + 1;
const TREE_INDEX: usize = TREES / 64 + 1;
/// Words of a zone: 38 KiB.
pub(super) const ZONE_WORDS: usize =
    (INDEX + ROW_ORDER * ROW_INDEX + (Order::COUNT - ROW_ORDER) * TREE_INDEX).next_multiple_of(8);

/// How long the lock is waited for before `relax` is asked.
const SPINS: u32 = 64;

/// A zone, locked for as long as this lives.
pub(super) struct Zone<'a> {
    words: &'a [AtomicU64],
}

impl Drop for Zone<'_> {
    fn drop(&mut self) {
        // Release: whoever locks it next sees what was written.
        self.words[LOCK].store(0, Release);
    }
}

/// Frames in use in a zone, a moment ago.
pub(super) fn read_used(words: &[AtomicU64]) -> u64 {
    words[USED].load(Relaxed)
}

impl<'a> Zone<'a> {
    /// Waits for the zone. `relax` is called while somebody else has had it for long, perhaps without a processor.
    pub(super) fn lock(words: &'a [AtomicU64], relax: fn()) -> Self {
        let mut spins = 0;
        while words[LOCK].compare_exchange(0, 1, Acquire, Relaxed).is_err() {
            while words[LOCK].load(Relaxed) != 0 {
                spins += 1;
                if spins % SPINS == 0 { relax() } else { core::hint::spin_loop() }
            }
        }
        Self { words }
    }

    /// The zone, if nobody has it.
    pub(super) fn try_lock(words: &'a [AtomicU64]) -> Option<Self> {
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

    /// Gives single frames of a row back, as bits. They must be in use.
    pub(super) fn put_in_row(&self, first: usize, bits: u64) {
        self.add_used(-i64::from(bits.count_ones()));
        let row = first / ROW_FRAMES;
        let used = self.get(ROW + row) & !bits;
        self.set(ROW + row, used);
        self.some_in_row(row, levels(!used));
        if used == 0 {
            self.put_in_tree(row, 0);
        }
    }

    pub(super) fn is_used(&self, frame: usize) -> bool {
        self.get(ROW + frame / ROW_FRAMES) >> (frame % ROW_FRAMES) & 1 != 0
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
        for order in 0..levels.min(ROW_ORDER) {
            self.mark_some(order, row / 64, 1 << (row % 64));
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

    /// They have.
    fn mark_some(&self, order: usize, at: usize, run: u64) {
        let (base, summary) = index(order);
        let word = self.get(base + at);
        if word & run != 0 {
            self.set(base + at, word & !run);
            if word == u64::MAX {
                self.set(summary, self.get(summary) & !(1 << at));
            }
        }
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
fn each_row(first: usize, end: usize, mut look: impl FnMut(usize, u64) -> ControlFlow<()>) -> ControlFlow<()> {
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

/// What has been given out: 0 nothing, or not the first frame of it; else the order and one.
pub(super) struct States<'a>(pub(super) &'a [AtomicU8]);

impl States<'_> {
    /// Whether a block of `order` begins there.
    pub(super) fn is(&self, frame: usize, order: Order) -> bool {
        self.0.get(frame).is_some_and(|state| state.load(Relaxed) == order.get() + 1)
    }

    pub(super) fn get(&self, frame: usize) -> Option<Order> {
        let state = self.0.get(frame)?.load(Relaxed);
        Order::new(state.checked_sub(1)?).ok()
    }

    pub(super) fn set(&self, frame: usize, order: Option<Order>) {
        if let Some(state) = self.0.get(frame) {
            state.store(order.map_or(0, |order| order.get() + 1), Relaxed);
        }
    }

    /// Whether the frame is inside a block that begins before it.
    pub(super) fn is_inside(&self, frame: usize) -> bool {
        (1..Order::COUNT).any(|bits| {
            let first = frame >> bits << bits;
            first < frame && self.get(first).is_some_and(|order| frame - first < 1 << order.get())
        })
    }
}
