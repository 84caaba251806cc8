//! Index: which rows and trees of a zone have a free block of each order, so that the lowest is found without a search.
//!
//! Of each order a bit a row (below order 6) or tree, set where there is no such block, and a summary, a bit a word. Beside it
//! each row says how many orders it has a block of ([`Zone::row_levels`]): what is given back is compared with that, and most
//! of it changes no index. Called by [`Zone`](super::zone) with its lock held, as all words of a zone are.

use super::word;
use super::zone::{
    INDEX, LEVELS, LOST, ROW, ROW_FRAMES, ROW_ORDER, ROWS, TREE, TREE_ROWS, TREE_USED, TREES, Zone,
};
use super::zone::{TREE_FRAMES, ZONE_FRAMES};
use crate::sync::AtomicU64;
use crate::sync::Ordering::Relaxed;
use crate::units::Order;

/// Words of the index of an order, the summary behind them.
const ROW_INDEX: usize = ROWS / 64 + 1;
const TREE_INDEX: usize = TREES / 64 + 1;
/// Of all orders.
pub(super) const INDEX_WORDS: usize = ROW_ORDER * ROW_INDEX + (Order::COUNT - ROW_ORDER) * TREE_INDEX;

/// Levels of a row that is free: the orders below a row's, and its own.
const ROW_LEVELS: usize = ROW_ORDER + 1;
/// Bits that a row takes to say how many of them it lacks: those of a tree's rows fill a word.
const LACK_BITS: usize = 64 / TREE_ROWS;
const LACK_MASK: u64 = (1 << LACK_BITS) - 1;
/// All rows of a tree lack all levels.
const LACK_ALL: u64 = u64::MAX / LACK_MASK * ROW_LEVELS as u64;
const _: () = assert!(ROW_LEVELS as u64 <= LACK_MASK && TREE_ROWS * LACK_BITS == 64);

/// How many frames are looked at together.
const CHUNK: usize = 128;

impl Zone<'_> {
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

    /// Makes the last frames of a fresh zone ones that do not exist: all from `count` on.
    pub(super) fn truncate(&self, count: usize) {
        for row in count.div_ceil(ROW_FRAMES)..ROWS {
            self.set(ROW + row, u64::MAX);
            self.lower_row(row, 0);
        }
        if !count.is_multiple_of(ROW_FRAMES) {
            let row = count / ROW_FRAMES;
            let used = u64::MAX << (count % ROW_FRAMES);
            self.set(ROW + row, used);
            self.lower_row(row, !used);
        }
        for tree in count / TREE_FRAMES..TREES {
            let rows = count.saturating_sub(tree * TREE_FRAMES) / ROW_FRAMES;
            let used = TREE_USED & (TREE_USED << rows);
            self.set(TREE + tree, used);
            self.lower_tree(tree, !used & TREE_USED);
        }
        self.add_used((ZONE_FRAMES - count) as i64);
    }

    /// The lowest row, or tree, with a free block of `order`.
    pub(super) fn first(&self, order: usize) -> Option<usize> {
        let (base, summary) = index(order);
        let at = self.get(summary).trailing_ones() as usize;
        if at == summary - base {
            return None;
        }
        Some(at * 64 + self.get(base + at).trailing_ones() as usize)
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

    /// How many orders the row has a free block of, its own among them.
    fn row_levels(&self, row: usize) -> usize {
        ROW_LEVELS.wrapping_sub(self.row_lacks(row))
    }

    /// Whether index and levels say of each row what it has.
    pub(super) fn is_index_right(&self) -> bool {
        (0..ROWS / 64).all(|at| {
            let mut none = [0_u64; ROW_ORDER];
            let is_right = (0..64).all(|bit| {
                let row = at * 64 + bit;
                let levels = levels(!self.get(ROW + row));
                none.iter_mut().skip(levels).for_each(|none| *none |= 1 << bit);
                self.row_levels(row) == levels
            });
            is_right && none.iter().enumerate().all(|(order, &none)| self.get(index(order).0 + at) == none)
        })
    }

    fn row_lacks(&self, row: usize) -> usize {
        (self.get(LEVELS + row / TREE_ROWS) >> (row % TREE_ROWS * LACK_BITS) & LACK_MASK) as usize
    }

    fn set_row_levels(&self, row: usize, levels: usize) {
        let (at, shift) = (LEVELS + row / TREE_ROWS, row % TREE_ROWS * LACK_BITS);
        let lacking = (ROW_LEVELS - levels) as u64;
        self.set(at, self.get(at) & !(LACK_MASK << shift) | lacking << shift);
    }

    /// Of a row `free` is left, which is less than it was.
    pub(super) fn lower_row(&self, row: usize, free: u64) {
        let (before, levels) = (self.row_levels(row), levels(free));
        for order in levels..before.min(ROW_ORDER) {
            self.mark_none(order, row / 64, 1 << (row % 64));
        }
        if levels < before {
            self.set_row_levels(row, levels);
        }
    }

    /// Of a row `free` is there, which is more than it was, in blocks of so many orders. A row that is free is one of its tree.
    pub(super) fn raise_row(&self, row: usize, levels: usize) {
        let before = self.row_levels(row);
        if levels <= before {
            return;
        }
        for order in before..levels.min(ROW_ORDER) {
            self.mark_some(order, row / 64, 1 << (row % 64));
        }
        self.set_row_levels(row, levels);
        if levels == ROW_LEVELS {
            self.put_in_tree(row, 0);
        }
    }

    /// Gives single frames back, wherever they are. One that is free already is not counted again.
    pub(super) fn put_each(&self, frames: &[u32]) {
        let mut were_used = 0;
        for frames in frames.chunks(CHUNK) {
            // Few make a block that their row did not have. To find them takes no branch that nobody can foretell, so that no
            // row is waited for.
            let (mut rising, mut count) = ([0; CHUNK], 0);
            for &frame in frames {
                let (row, bit) = (frame as usize % ZONE_FRAMES / ROW_FRAMES, frame % ROW_FRAMES as u32);
                let before = self.get(ROW + row);
                let used = before & !(1 << bit);
                self.set(ROW + row, used);
                were_used += before >> bit & 1;
                let size = (1_u32 << ROW_LEVELS) >> self.row_lacks(row);
                // Of the block of the next order, alone: shifted down to its first frame, and up behind its last.
                let is_free = used >> (bit & size.wrapping_neg()) << (size.wrapping_neg() % 64) == 0;
                rising[count % CHUNK] = row;
                count += usize::from(is_free);
            }
            for &row in &rising[..count] {
                self.raise_row(row, levels(!self.get(ROW + row)));
            }
        }
        self.add_used(-(were_used as i64));
    }

    /// Rows of a tree, all free, are in use.
    pub(super) fn take_in_tree(&self, tree: usize, row: usize, rows_order: usize) {
        let first = tree * TREE_ROWS + row;
        self.fill_rows(first, rows_order, u64::MAX);
        let run = word::mask(first % 64, rows_order);
        for order in 0..ROW_ORDER {
            self.mark_none(order, first / 64, run);
        }
        self.set(LEVELS + tree, self.get(LEVELS + tree) | LACK_ALL & lacks(row, rows_order));
        self.take_rows(tree, word::mask(row, rows_order));
    }

    /// Rows of a tree are free, all of whose frames were in use, but after a double free: then their bits are counted, which takes longer.
    pub(super) fn put_rows(&self, row: usize, rows_order: usize) {
        let rows = &self.words()[ROW + row..ROW + row + (1 << rows_order)];
        let is_used = rows.iter().fold(u64::MAX, |all, word| all & word.load(Relaxed)) == u64::MAX;
        let count = |word: &AtomicU64| i64::from(word.load(Relaxed).count_ones());
        let were_used = if is_used { (ROW_FRAMES << rows_order) as i64 } else { rows.iter().map(count).sum() };
        self.add_used(-were_used);
        self.fill_rows(row, rows_order, 0);
        let run = word::mask(row % 64, rows_order);
        for order in 0..ROW_ORDER {
            self.mark_some(order, row / 64, run);
        }
        let at = LEVELS + row / TREE_ROWS;
        self.set(at, self.get(at) & !lacks(row % TREE_ROWS, rows_order));
        self.put_in_tree(row, rows_order);
    }

    fn fill_rows(&self, first: usize, rows_order: usize, used: u64) {
        let rows = &self.words()[ROW + first..ROW + first + (1 << rows_order)];
        rows.iter().for_each(|word| word.store(used, Relaxed));
    }

    /// Rows of a tree, as bits, are not free any more.
    pub(super) fn take_rows(&self, tree: usize, rows: u64) {
        let used = self.get(TREE + tree) | rows;
        self.set(TREE + tree, used);
        self.lower_tree(tree, !used & TREE_USED);
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

    fn lower_tree(&self, tree: usize, free: u64) {
        for order in ROW_ORDER + levels(free)..Order::COUNT {
            if !self.mark_none(order, tree / 64, 1 << (tree % 64)) {
                break; // nor of a larger one, as known
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
        if word & run == 0 {
            return;
        }
        self.set(base + at, word & !run);
        if word == u64::MAX {
            self.set(summary, self.get(summary) & !(1 << at));
        }
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

/// What rows of a tree say of their levels.
const fn lacks(row: usize, rows_order: usize) -> u64 {
    let bits = LACK_BITS << rows_order;
    (u64::MAX >> (64 - bits)) << (row * LACK_BITS)
}

/// How many orders the word has a free block of.
pub(super) fn levels(free: u64) -> usize {
    word::largest(free).map_or(0, |order| order + 1)
}
