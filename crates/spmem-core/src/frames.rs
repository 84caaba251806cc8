//! Frames: which frames of a node are free. A buddy allocator, orders 0 (4 KiB) to 10 (4 MiB).
//!
//! [`Frames`] belongs to one node and is called by [`MemoryManager`](crate::mm::MemoryManager), which decides who may
//! ask. An order-k block is 2^k frames, aligned to 2^k. The lowest place that fits is taken: low huge frames fill up,
//! high ones drain and become whole (measured: see `examples/frames.rs`). Neighbours are one block as soon as both
//! are free; "free" in the statistics therefore means that allocation succeeds.
//!
//! Two levels, both bit arithmetic in one word: 64 frames make a row, 16 rows a tree (4 MiB). An index an order says
//! which rows, or trees, have a free block that large. Metadata is two bits a frame and an eighth of a bit of index,
//! in plain vectors, reserved when a range is added.
//!
//! Takes no lock. Hole: one caller at a time; there is no per-CPU cache.

mod bitmap;
mod word;

use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::fmt;

use self::bitmap::Bitmap;
use self::word::WORD_ORDER;
use crate::units::{FrameCount, FrameNumber, Order};

/// Frames in a block of the highest order: ranges begin at a multiple of this, so no block spans two ranges.
const TREE_FRAMES: usize = 1 << 10;
const ROW_FRAMES: usize = 64;
const TREE_ROWS: usize = TREE_FRAMES / ROW_FRAMES;
/// The order of a full row.
const ROW_ORDER: usize = WORD_ORDER;
/// Ranges a node may have.
pub const MAX_RANGES: usize = 256;
/// Frames a node may have, holes between its ranges included: 16 TiB.
pub const MAX_FRAMES: u64 = 1 << 32;

/// A run of frames that was added to a node in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRange {
    /// First frame; a multiple of 1024.
    pub first: FrameNumber,
    /// Frames, at least 1.
    pub count: FrameCount,
}

impl FrameRange {
    /// Whether the frame lies in the range.
    ///
    /// ```
    /// use spmem_core::{frames::FrameRange, units::{FrameCount, FrameNumber}};
    /// let range = FrameRange { first: FrameNumber(1024), count: FrameCount(8) };
    /// assert!(range.contains(FrameNumber(1031)) && !range.contains(FrameNumber(1032)));
    /// ```
    pub const fn contains(&self, frame: FrameNumber) -> bool {
        frame.0 >= self.first.0 && ((frame.0 - self.first.0) as u64) < self.count.0
    }
}

/// Why frames were not given, taken back, added or removed. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FramesError {
    /// No free block is large enough (R10).
    Exhausted {
        /// Asked for.
        order: Order,
        /// Free frames, all smaller blocks together.
        free: FrameCount,
        /// The largest block that is free.
        largest: Option<Order>,
    },
    /// The frame belongs to no range of this node.
    Foreign {
        /// As given.
        frame: FrameNumber,
    },
    /// The frame is free already.
    NotAllocated {
        /// As given.
        frame: FrameNumber,
    },
    /// The frame is inside an allocated block, not its first.
    NotFirst {
        /// As given.
        frame: FrameNumber,
    },
    /// A block begins there, of another order.
    WrongOrder {
        /// As given.
        frame: FrameNumber,
        /// As given.
        order: Order,
        /// The block's.
        allocated: Order,
    },
    /// The range to be removed has frames in use, or is no range of this node.
    RangeInUse {
        /// As given.
        first: FrameNumber,
        /// Frames in use, 0 when there is no such range.
        used: FrameCount,
    },
    /// A range must have at least one frame.
    EmptyRange,
    /// The node would have more than [`MAX_RANGES`] ranges or [`MAX_FRAMES`] frames.
    TooMany {
        /// Ranges the node has.
        ranges: usize,
        /// Frames the node has, holes included.
        frames: u64,
    },
    /// No memory for the metadata of the new range.
    NoMetadata,
}

impl fmt::Display for FramesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Exhausted { order, free, largest: Some(largest) } => write!(
                f,
                "no free block of order {order}: {free} frames are free, the largest block is of order {largest}"
            ),
            Self::Exhausted { order, free, largest: None } => {
                write!(f, "no free block of order {order}: {free} frames are free")
            }
            Self::Foreign { frame } => write!(f, "frame {frame} is in no range of this node"),
            Self::NotAllocated { frame } => write!(f, "frame {frame} is free already"),
            Self::NotFirst { frame } => {
                write!(f, "frame {frame} is inside an allocated block; free its first frame")
            }
            Self::WrongOrder { frame, order, allocated } => {
                write!(f, "the block at frame {frame} is of order {allocated}, not {order}")
            }
            Self::RangeInUse { first, used: FrameCount(0) } => {
                write!(f, "no range begins at frame {first}")
            }
            Self::RangeInUse { first, used } => {
                write!(f, "{used} frames of the range at frame {first} are in use; free them first")
            }
            Self::EmptyRange => f.write_str("a range must have at least one frame"),
            Self::TooMany { ranges, frames } => write!(
                f,
                "the node has {ranges} ranges and {frames} frames; at most {MAX_RANGES} and {MAX_FRAMES} fit"
            ),
            Self::NoMetadata => f.write_str("no memory for the metadata of the range"),
        }
    }
}

impl core::error::Error for FramesError {}

impl From<TryReserveError> for FramesError {
    fn from(_: TryReserveError) -> Self {
        Self::NoMetadata // the cause carries no facts
    }
}

/// 64 frames. One is free (`free` bit), the first of an allocated block (`head` bit), or neither: inside a block. A
/// block ends where the next bit in either word is set, which is how its order is known without being stored.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    free: u64,
    head: u64,
}

/// The frames of one node.
///
/// ```
/// use spmem_core::{frames::Frames, units::{FrameCount, FrameNumber, Order}};
/// let mut frames = Frames::new();
/// frames.add_range(FrameCount(1024)).unwrap();
/// let frame = frames.alloc(Order::ZERO).unwrap();
/// assert_eq!(frame, FrameNumber(0));
/// assert_eq!(frames.used(), FrameCount(1));
/// frames.free_block(frame, Order::ZERO).unwrap();
/// assert!(frames.free_block(frame, Order::ZERO).is_err());
/// assert!(frames.alloc(Order::MAX).is_ok());
/// ```
#[derive(Debug, Default)]
pub struct Frames {
    rows: Vec<Row>,
    /// For each tree, bit r set when its row r is all free.
    trees: Vec<u16>,
    /// Bit set when the row (below [`ROW_ORDER`]) or the tree (from it on) has a free block of that order or larger.
    index: [Bitmap; Order::COUNT],
    ranges: Vec<FrameRange>,
    capacity: u64,
    free: u64,
}

impl Frames {
    /// No frames yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `count` free frames; they begin at the next multiple of 1024 behind the last range.
    ///
    /// # Errors
    /// [`FramesError::EmptyRange`], [`FramesError::TooMany`], [`FramesError::NoMetadata`].
    pub fn add_range(&mut self, count: FrameCount) -> Result<FrameRange, FramesError> {
        let first = self.rows.len() * ROW_FRAMES;
        let too_many = FramesError::TooMany { ranges: self.ranges.len(), frames: first as u64 };
        if count.0 == 0 {
            return Err(FramesError::EmptyRange);
        }
        if self.ranges.len() >= MAX_RANGES || count.0 > MAX_FRAMES - first as u64 {
            return Err(too_many);
        }
        let (Ok(first_frame), Ok(frames)) = (u32::try_from(first), usize::try_from(count.0)) else {
            return Err(too_many);
        };
        let rows = (first + frames).next_multiple_of(TREE_FRAMES) / ROW_FRAMES;
        self.rows.try_reserve_exact(rows - self.rows.len())?;
        self.trees.try_reserve_exact(rows / TREE_ROWS - self.trees.len())?;
        self.ranges.try_reserve(1)?;
        self.resize_index(rows)?;
        self.rows.resize(rows, Row::default());
        self.trees.resize(rows / TREE_ROWS, 0);

        let range = FrameRange { first: FrameNumber(first_frame), count };
        self.ranges.push(range);
        self.capacity += count.0;
        self.free += count.0;
        let (full, rest) = (frames / ROW_FRAMES, frames % ROW_FRAMES);
        for row in first / ROW_FRAMES..first / ROW_FRAMES + full {
            self.set_free(row, u64::MAX);
        }
        if rest > 0 {
            self.set_free(first / ROW_FRAMES + full, (1 << rest) - 1);
        }
        if frames % TREE_FRAMES > 0 {
            // The frame behind the range: marks where its last block ends.
            let end = first + frames;
            self.rows[end / ROW_FRAMES].head |= 1 << (end % ROW_FRAMES);
        }
        Ok(range)
    }

    /// Takes away the range that begins at `first`, all of whose frames must be free.
    ///
    /// # Errors
    /// [`FramesError::RangeInUse`] with the number of frames in use, 0 when there is no such range.
    pub fn remove_range(&mut self, first: FrameNumber) -> Result<FrameRange, FramesError> {
        let unknown = FramesError::RangeInUse { first, used: FrameCount(0) };
        let at = self.ranges.binary_search_by_key(&first, |range| range.first).map_err(|_| unknown)?;
        let range = self.ranges[at];
        let rows = range_rows(&range);
        let free: u64 = self.rows[rows.clone()].iter().map(|r| u64::from(r.free.count_ones())).sum();
        if free < range.count.0 {
            return Err(FramesError::RangeInUse { first, used: FrameCount(range.count.0 - free) });
        }
        for row in rows {
            self.set_free(row, 0);
            self.rows[row].head = 0;
        }
        self.ranges.remove(at);
        self.capacity -= range.count.0;
        self.free -= range.count.0;
        let rows = self.ranges.last().map_or(0, |last| range_rows(last).end);
        self.resize_index(rows)?; // shrinks: reserves nothing, cannot fail
        self.rows.truncate(rows);
        self.trees.truncate(rows / TREE_ROWS);
        Ok(range)
    }

    /// Takes a free block, in the lowest row (below order 6) or tree that has one.
    ///
    /// # Errors
    /// [`FramesError::Exhausted`]; never while [`Frames::largest_free`] is `order` or above.
    pub fn alloc(&mut self, order: Order) -> Result<FrameNumber, FramesError> {
        let k = order.index();
        let Some(at) = self.index[k].first() else {
            return Err(FramesError::Exhausted { order, free: self.free(), largest: self.largest_free() });
        };
        let (row, bit) = if k < ROW_ORDER {
            let free = self.rows[at].free;
            let bit = word::place(free, k).expect("the index says that the row has such a block");
            self.set_free(at, free & !word::mask(bit, k));
            (at, bit)
        } else {
            let full = u64::from(self.trees[at]);
            let first = word::place(full, k - ROW_ORDER).expect("the index says that the tree has such a block");
            let row = at * TREE_ROWS + first;
            self.set_rows(row, k - ROW_ORDER, Fill::Used);
            (row, 0)
        };
        self.rows[row].head |= 1 << bit;
        self.free -= order.frames().0;
        Ok(frame_number(row * ROW_FRAMES + bit))
    }

    /// Gives a block back and merges it with its free buddies.
    ///
    /// # Errors
    /// [`FramesError::Foreign`], [`FramesError::NotAllocated`] (a double free), [`FramesError::NotFirst`],
    /// [`FramesError::WrongOrder`]; nothing has changed then.
    pub fn free_block(&mut self, frame: FrameNumber, order: Order) -> Result<(), FramesError> {
        let allocated = self.allocated_order(frame)?;
        if allocated != order {
            return Err(FramesError::WrongOrder { frame, order, allocated });
        }
        let (row, bit) = split_number(frame);
        self.rows[row].head &= !(1 << bit);
        let k = order.index();
        if k < ROW_ORDER {
            self.set_free(row, self.rows[row].free | word::mask(bit, k));
        } else {
            self.set_rows(row, k - ROW_ORDER, Fill::Free);
        }
        self.free += order.frames().0;
        Ok(())
    }

    /// The order of the allocated block that begins at `frame`.
    ///
    /// # Errors
    /// [`FramesError::Foreign`], [`FramesError::NotAllocated`], [`FramesError::NotFirst`].
    pub fn allocated_order(&self, frame: FrameNumber) -> Result<Order, FramesError> {
        let behind = self.ranges.partition_point(|range| range.first <= frame);
        if !self.ranges[..behind].last().is_some_and(|range| range.contains(frame)) {
            return Err(FramesError::Foreign { frame });
        }
        let (row, bit) = split_number(frame);
        if self.rows[row].free >> bit & 1 != 0 {
            return Err(FramesError::NotAllocated { frame });
        }
        if self.rows[row].head >> bit & 1 == 0 {
            return Err(FramesError::NotFirst { frame });
        }
        // No block is larger than its alignment, and it ends at the first boundary.
        let ends = |order: &Order| {
            let end = row * ROW_FRAMES + bit + (1 << order.get());
            end.trailing_zeros() > u32::from(order.get())
                || end.is_multiple_of(TREE_FRAMES)
                || is_boundary(self.rows[end / ROW_FRAMES], end % ROW_FRAMES)
        };
        Ok(Order::all().find(ends).unwrap_or(Order::MAX))
    }

    /// Frames in all ranges.
    pub const fn capacity(&self) -> FrameCount {
        FrameCount(self.capacity)
    }

    /// Free frames.
    pub const fn free(&self) -> FrameCount {
        FrameCount(self.free)
    }

    /// Frames in use.
    pub const fn used(&self) -> FrameCount {
        FrameCount(self.capacity - self.free)
    }

    /// The ranges, lowest first.
    pub fn ranges(&self) -> &[FrameRange] {
        &self.ranges
    }

    /// The order of the largest free block: what the next allocation can have.
    pub fn largest_free(&self) -> Option<Order> {
        Order::all().rev().find(|order| !self.index[order.index()].is_empty())
    }

    /// Free blocks by order, each counted once at the highest order it reaches. Looks at every row.
    pub fn count_free_blocks(&self) -> [u64; Order::COUNT] {
        let mut counts = [0; Order::COUNT];
        let (in_rows, in_trees) = counts.split_at_mut(ROW_ORDER);
        for row in self.rows.iter().filter(|row| row.free != u64::MAX) {
            word::count_blocks(row.free, in_rows);
        }
        for &full in &self.trees {
            word::count_blocks(u64::from(full), in_trees);
        }
        counts
    }

    /// Heap bytes of the metadata: about a quarter of a byte a frame.
    pub fn metadata_bytes(&self) -> usize {
        self.rows.capacity() * size_of::<Row>()
            + self.trees.capacity() * size_of::<u16>()
            + self.ranges.capacity() * size_of::<FrameRange>()
            + self.index.iter().map(Bitmap::heap_bytes).sum::<usize>()
    }

    /// Replaces the free bits of a row and brings the indices up to date.
    fn set_free(&mut self, row: usize, free: u64) {
        let was = core::mem::replace(&mut self.rows[row].free, free);
        self.reindex(0, row, levels(was).min(ROW_ORDER), levels(free).min(ROW_ORDER));
        if (was == u64::MAX) != (free == u64::MAX) {
            let tree = row / TREE_ROWS;
            self.set_full(tree, self.trees[tree] ^ 1 << (row % TREE_ROWS));
        }
    }

    /// Makes 2^`order` whole rows from `first` on used or free; they must have been the other.
    fn set_rows(&mut self, first: usize, order: usize, fill: Fill) {
        let run = word::mask(0, order);
        for row in &mut self.rows[first..first + (1 << order)] {
            row.free = if fill == Fill::Free { u64::MAX } else { 0 };
        }
        for index in &mut self.index[..ROW_ORDER] {
            match fill {
                Fill::Free => index.set_run(first, run),
                Fill::Used => index.clear_run(first, run),
            }
        }
        let tree = first / TREE_ROWS;
        let rows = u16::try_from(word::mask(first % TREE_ROWS, order)).expect("a tree has 16 rows");
        self.set_full(tree, self.trees[tree] ^ rows);
    }

    /// Replaces the full rows of a tree and brings the indices up to date.
    fn set_full(&mut self, tree: usize, full: u16) {
        let was = core::mem::replace(&mut self.trees[tree], full);
        self.reindex(ROW_ORDER, tree, levels(was.into()), levels(full.into()));
    }

    /// Row or tree `at` had blocks of `was` orders from `base` on, and now has them of `now`.
    fn reindex(&mut self, base: usize, at: usize, was: usize, now: usize) {
        for k in now..was {
            self.index[base + k].clear(at);
        }
        for k in was..now {
            self.index[base + k].set(at);
        }
    }

    fn resize_index(&mut self, rows: usize) -> Result<(), TryReserveError> {
        for (k, index) in self.index.iter_mut().enumerate() {
            index.resize(if k < ROW_ORDER { rows } else { rows / TREE_ROWS })?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fill {
    Free,
    Used,
}

/// How many orders the word has a free block of.
fn levels(free: u64) -> usize {
    word::largest(free).map_or(0, |order| order + 1)
}

/// Whether a block ends before this frame: it is free or begins another block.
fn is_boundary(row: Row, bit: usize) -> bool {
    (row.free | row.head) >> bit & 1 != 0
}

/// The rows of a range, whole trees.
fn range_rows(range: &FrameRange) -> core::ops::Range<usize> {
    let first = range.first.0 as usize / ROW_FRAMES;
    let count = usize::try_from(range.count.0).expect("checked when the range was added");
    first..first + count.div_ceil(TREE_FRAMES) * TREE_ROWS
}

fn frame_number(frame: usize) -> FrameNumber {
    FrameNumber(u32::try_from(frame).expect("a node has at most 2^32 frames"))
}

const fn split_number(frame: FrameNumber) -> (usize, usize) {
    (frame.0 as usize / ROW_FRAMES, frame.0 as usize % ROW_FRAMES)
}
