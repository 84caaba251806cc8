//! Frames: which frames of a node are free. A buddy allocator, orders 0 (4 KiB) to 10 (4 MiB), and contiguous ranges.
//!
//! [`Frames`] belongs to one node. An order-k block is 2^k frames, aligned to 2^k. Neighbours are one block as soon as
//! both are free; "free" in the statistics therefore means that allocation succeeds. Three paths, fastest first:
//!
//! | path | who | an operation costs |
//! |---|---|---|
//! | [`Cache`] | one owner, order 0 | plain loads and stores |
//! | [`PerCpu`] | everybody, order 0 through a slot a processor | one locked instruction |
//! | [`Frames`] | everybody, all orders | one lock of a 1 GiB zone; batches share it |
//!
//! Caches are filled a row (64 neighbours) at a time from the lowest place that has any, and give back what they
//! cannot hold: so what they hold keeps few huge frames in pieces.
//!
//! Metadata is lent by the caller, zero meaning free ([`Metadata`]): a byte and an eighth a frame, 0.03 % of the memory.
//! Nothing of it is touched before the frames it describes. Takes `&self`; adding and removing ranges takes `&mut self`.
//!
//! Hole: a frame that two threads free in the same instant through caches is found out only when the second of them
//! reaches its zone.

#![allow(
    clippy::cast_possible_truncation,
    reason = "a node has at most 2^32 frames, as add_range checks, and usize has 64 bits"
)]

mod cache;
mod placed;
mod word;
mod zone;

use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU8, AtomicU64};

use self::zone::{ROW_FRAMES, States, TREE_FRAMES, ZONE_FRAMES, ZONE_WORDS, Zone};
use crate::units::{FrameCount, FrameNumber, Order};

pub use self::cache::{Cache, PerCpu};

const _: () = assert!(usize::BITS >= 64);

/// Ranges a node may have.
pub const MAX_RANGES: usize = 256;
/// Frames a node may have, holes between its ranges included: 16 TiB.
pub const MAX_FRAMES: u64 = 1 << 32;
/// The longest contiguous range: 1 GiB.
pub const MAX_CONTIGUOUS: u64 = ZONE_FRAMES as u64;

/// A run of frames: one that was added to a node in one piece, or one that was given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRange {
    /// First frame; of a range that was added a multiple of 1024.
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
    /// A block of that order never begins at the frame.
    Misaligned {
        /// As given.
        frame: FrameNumber,
        /// As given.
        order: Order,
    },
    /// Something of the block that was asked for is in use, or in a cache.
    NotFree {
        /// As given.
        frame: FrameNumber,
        /// As given.
        order: Order,
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
    /// The metadata lent for a range is too small, or there is no memory for it.
    NoMetadata,
    /// A contiguous range of so many frames is never given: 0, or more than [`MAX_CONTIGUOUS`].
    Contiguous {
        /// As given.
        count: FrameCount,
    },
    /// The cache holds frames of another node.
    OtherCache,
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
            Self::Misaligned { frame, order } => {
                write!(f, "a block of order {order} cannot begin at frame {frame}")
            }
            Self::NotFree { frame, order } => {
                write!(f, "the block of order {order} at frame {frame} is not all free")
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
            Self::Contiguous { count } => {
                write!(f, "{count} frames cannot be contiguous: 1 to {MAX_CONTIGUOUS} can")
            }
            Self::OtherCache => f.write_str("the cache holds frames of another node"),
        }
    }
}

impl core::error::Error for FramesError {}

/// Memory that the caller lends for the metadata of a range, all zero; it comes back when the range is removed.
#[derive(Clone, Copy, Debug)]
pub struct Metadata {
    words: &'static [AtomicU64],
    states: &'static [AtomicU8],
}

impl Metadata {
    /// Words and bytes that `count` frames take.
    ///
    /// ```
    /// use spmem_core::{frames::Metadata, units::FrameCount};
    /// let (words, bytes) = Metadata::size(FrameCount(1 << 18)); // 1 GiB
    /// assert!((words * 8 + bytes) as u64 * 1000 < 1 << 30);
    /// ```
    pub const fn size(count: FrameCount) -> (usize, usize) {
        let zones = count.0.div_ceil(ZONE_FRAMES as u64) as usize;
        (zones * ZONE_WORDS + hint_words(zones) * Order::COUNT, count.0 as usize)
    }

    /// From memory that is all zero, for up to as many frames as it has room for.
    pub const fn new(words: &'static [AtomicU64], states: &'static [AtomicU8]) -> Self {
        Self { words, states }
    }

    /// From the heap, for tests, tools and simulation: it is never given back to it.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`].
    pub fn from_heap(count: FrameCount) -> Result<Self, FramesError> {
        let (words, states) = Self::size(count);
        Ok(Self { words: leak_zeros(words)?, states: leak_zeros(states)? })
    }

    /// Bytes lent.
    pub const fn bytes(&self) -> usize {
        size_of_val(self.words) + size_of_val(self.states)
    }
}

fn leak_zeros<T: Default>(len: usize) -> Result<&'static [T], FramesError> {
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(len).map_err(|_| FramesError::NoMetadata)?;
    zeros.resize_with(len, T::default);
    Ok(zeros.leak())
}

/// Words of the hints of one order.
const fn hint_words(zones: usize) -> usize {
    zones.div_ceil(64)
}

/// A range with its metadata: first the hints of all orders, then the zones.
#[derive(Debug)]
struct Range {
    span: FrameRange,
    lent: Metadata,
    zones: usize,
}

impl Range {
    fn zone_words(&self, zone: usize) -> &'static [AtomicU64] {
        let start = hint_words(self.zones) * Order::COUNT + zone * ZONE_WORDS;
        &self.lent.words[start..start + ZONE_WORDS]
    }

    fn states(&self) -> States<'static> {
        States(self.lent.states)
    }

    /// A word of 64 zones, a bit each: it has no free block of the order.
    fn hint(&self, order: usize, word: usize) -> &AtomicU64 {
        &self.lent.words[order * hint_words(self.zones) + word]
    }

    /// The first zone from `from` on that may have a free block of the order.
    fn next_zone(&self, order: usize, from: usize) -> Option<usize> {
        let mut skipped = (1 << (from % 64)) - 1;
        for at in from / 64..hint_words(self.zones) {
            let none = self.hint(order, at).load(Acquire) | skipped;
            if none != u64::MAX {
                let zone = at * 64 + none.trailing_ones() as usize;
                return (zone < self.zones).then_some(zone);
            }
            skipped = 0;
        }
        None
    }

    /// Where a frame is in the range, if it is in its zone `zone`.
    fn offset_in_zone(&self, frame: FrameNumber, zone: usize) -> Option<usize> {
        let offset = frame.0.wrapping_sub(self.span.first.0) as usize;
        (offset / ZONE_FRAMES == zone && (offset as u64) < self.span.count.0).then_some(offset)
    }

    fn number(&self, offset: usize) -> FrameNumber {
        FrameNumber(self.span.first.0 + u32::try_from(offset).expect("a node has at most 2^32 frames"))
    }
}

/// Where a frame is.
#[derive(Clone, Copy)]
struct Place {
    range: usize,
    offset: usize,
}

impl Place {
    const fn zone(self) -> usize {
        self.offset / ZONE_FRAMES
    }

    const fn in_zone(self) -> usize {
        self.offset % ZONE_FRAMES
    }
}

/// The frames of one node.
///
/// ```
/// use spmem_core::frames::{Frames, Metadata};
/// use spmem_core::units::{FrameCount, FrameNumber, Order};
/// let mut frames = Frames::new();
/// frames.add_range(FrameCount(1024), Metadata::from_heap(FrameCount(1024)).unwrap()).unwrap();
/// let frame = frames.alloc(Order::ZERO).unwrap();
/// assert_eq!(frame, FrameNumber(0));
/// assert_eq!(frames.used(), FrameCount(1));
/// frames.free_block(frame, Order::ZERO).unwrap();
/// assert!(frames.free_block(frame, Order::ZERO).is_err());
/// assert!(frames.alloc(Order::MAX).is_ok());
/// ```
#[derive(Debug)]
pub struct Frames {
    ranges: Vec<Range>,
    capacity: u64,
    /// Raised after a block of some order has become free in a zone that had none.
    epoch: AtomicU64,
    relax: fn(),
    /// Tells it from every other; 0 before it has a range.
    id: u64,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Default for Frames {
    fn default() -> Self {
        Self::new()
    }
}

impl Frames {
    /// No frames yet.
    pub const fn new() -> Self {
        Self::with_relax(core::hint::spin_loop)
    }

    /// No frames yet. `relax` is called while a lock is waited for whose holder may be without a processor.
    pub const fn with_relax(relax: fn()) -> Self {
        Self { ranges: Vec::new(), capacity: 0, epoch: AtomicU64::new(0), relax, id: 0 }
    }

    /// Adds `count` free frames; they begin at the next multiple of 1024 behind the last range.
    ///
    /// # Errors
    /// [`FramesError::EmptyRange`], [`FramesError::TooMany`]; [`FramesError::NoMetadata`] when less was lent than
    /// [`Metadata::size`] says.
    pub fn add_range(&mut self, count: FrameCount, lent: Metadata) -> Result<FrameRange, FramesError> {
        let first = self.ranges.last().map_or(0, |last| {
            (u64::from(last.span.first.0) + last.span.count.0).next_multiple_of(TREE_FRAMES as u64)
        });
        let too_many = FramesError::TooMany { ranges: self.ranges.len(), frames: first };
        if count.0 == 0 {
            return Err(FramesError::EmptyRange);
        }
        if self.ranges.len() >= MAX_RANGES || first > MAX_FRAMES || count.0 > MAX_FRAMES - first {
            return Err(too_many);
        }
        let Ok(first) = u32::try_from(first) else { return Err(too_many) };
        let (words, states) = Metadata::size(count);
        let (Some(words), Some(states)) = (lent.words.get(..words), lent.states.get(..states)) else {
            return Err(FramesError::NoMetadata);
        };
        self.ranges.try_reserve(1).map_err(|_| FramesError::NoMetadata)?;
        let span = FrameRange { first: FrameNumber(first), count };
        let zones = (count.0 as usize).div_ceil(ZONE_FRAMES);
        let range = Range { span, lent: Metadata { words, states }, zones };
        let rest = count.0 as usize % ZONE_FRAMES;
        if rest > 0 {
            let zone = Zone::lock(range.zone_words(zones - 1), self.relax);
            zone.truncate(rest);
            self.settle(&range, zones - 1, &zone);
        }
        if self.id == 0 {
            self.id = NEXT_ID.fetch_add(1, Relaxed);
        }
        self.ranges.push(range);
        self.capacity += count.0;
        Ok(span)
    }

    /// Takes away the range that begins at `first`, all of whose frames must be free: none in use, none in a cache.
    ///
    /// # Errors
    /// [`FramesError::RangeInUse`] with the number of frames in use, 0 when there is no such range.
    pub fn remove_range(&mut self, first: FrameNumber) -> Result<(FrameRange, Metadata), FramesError> {
        let at = self
            .ranges
            .binary_search_by_key(&first, |range| range.span.first)
            .map_err(|_| FramesError::RangeInUse { first, used: FrameCount(0) })?;
        let used = self.count_used(&self.ranges[at]);
        if used > 0 {
            return Err(FramesError::RangeInUse { first, used: FrameCount(used) });
        }
        let range = self.ranges.remove(at);
        self.capacity -= range.span.count.0;
        range.lent.words.iter().for_each(|word| word.store(0, Relaxed));
        Ok((range.span, range.lent))
    }

    /// Takes a free block, in the lowest row (below order 6) or tree of the lowest zone that has one.
    ///
    /// # Errors
    /// [`FramesError::Exhausted`]; never while a block of that order stays free.
    pub fn alloc(&self, order: Order) -> Result<FrameNumber, FramesError> {
        let taken = self.search(order, |zone| zone.take(order.index()));
        let Some((range, offset)) = taken else { return Err(self.exhausted(order)) };
        range.states().set(offset, Some(order));
        Ok(range.number(offset))
    }

    /// Gives a block back and merges it with its free buddies.
    ///
    /// # Errors
    /// [`FramesError::Foreign`], [`FramesError::NotAllocated`] (a double free), [`FramesError::NotFirst`],
    /// [`FramesError::WrongOrder`]; nothing has changed then.
    pub fn free_block(&self, frame: FrameNumber, order: Order) -> Result<(), FramesError> {
        let place = self.find(frame)?;
        let range = &self.ranges[place.range];
        // Checked under the lock: of two threads that free the same block one is refused.
        let zone = Zone::lock(range.zone_words(place.zone()), self.relax);
        check(range, place.offset, frame, order)?;
        range.states().set(place.offset, None);
        zone.put(place.in_zone(), order.index());
        self.settle(range, place.zone(), &zone);
        Ok(())
    }

    /// Takes single frames, whole rows of neighbours where there are: fills `into` from the front; how many.
    pub fn alloc_batch(&self, into: &mut [FrameNumber]) -> usize {
        let mut done = 0;
        while done < into.len() {
            let mut rows = [(0, 0_u64); 8];
            let mut count = 0;
            let wanted = into.len() - done;
            let taken = self.search(Order::ZERO, |zone| {
                let mut left = wanted;
                while count < rows.len() && left > 0 {
                    let Some(row) = zone.take_row(left) else { break };
                    left -= row.1.count_ones() as usize;
                    rows[count] = row;
                    count += 1;
                }
                (count > 0).then_some(0)
            });
            let Some((range, zone)) = taken else { break };
            for &(first, bits) in &rows[..count] {
                let first = zone + first;
                let number = range.number(first).0;
                let states = &range.states().0[first..(first + ROW_FRAMES).min(range.lent.states.len())];
                let mut to = into[done..].iter_mut();
                each_bit(bits, |bit| {
                    states[bit].store(1, Relaxed);
                    if let Some(to) = to.next() {
                        *to = FrameNumber(number + bit as u32);
                    }
                });
                done += bits.count_ones() as usize;
            }
        }
        done
    }

    /// Gives single frames back, one lock a zone for runs of frames that share it.
    ///
    /// # Errors
    /// As [`Frames::free_block`], and which of them: those before it are free, it and those behind it are not.
    pub fn free_batch(&self, frames: &[FrameNumber]) -> Result<(), (usize, FramesError)> {
        let mut at = 0;
        while at < frames.len() {
            let place = self.find(frames[at]).map_err(|cause| (at, cause))?;
            let range = &self.ranges[place.range];
            let states = range.states();
            let zone = Zone::lock(range.zone_words(place.zone()), self.relax);
            let mut result = Ok(());
            // The frames of one row go back together.
            let (mut row, mut bits) = (place.in_zone() / ROW_FRAMES, 0_u64);
            while let Some(&frame) = frames.get(at) {
                let Some(offset) = range.offset_in_zone(frame, place.zone()) else { break };
                if let Err(cause) = check(range, offset, frame, Order::ZERO) {
                    result = Err((at, cause));
                    break;
                }
                states.set(offset, None);
                let in_zone = offset % ZONE_FRAMES;
                if in_zone / ROW_FRAMES != row {
                    zone.put_in_row(row * ROW_FRAMES, bits);
                    (row, bits) = (in_zone / ROW_FRAMES, 0);
                }
                bits |= 1 << (in_zone % ROW_FRAMES);
                at += 1;
            }
            zone.put_in_row(row * ROW_FRAMES, bits);
            self.settle(range, place.zone(), &zone);
            result?;
        }
        Ok(())
    }

    /// Takes `count` neighbouring frames, up to 1 GiB; from 4 MiB on they begin at a multiple of 4 MiB, below that at a
    /// multiple of the next power of two. Looks at every tree: slow.
    ///
    /// # Errors
    /// [`FramesError::Contiguous`] for a length that is never given; [`FramesError::Exhausted`], with the smallest order
    /// that holds it, when no such run is free.
    pub fn alloc_contiguous(&self, count: FrameCount) -> Result<FrameRange, FramesError> {
        if count.0 == 0 || count.0 > MAX_CONTIGUOUS {
            return Err(FramesError::Contiguous { count });
        }
        let len = count.0 as usize;
        let order = Order::fitting(count.bytes()).unwrap_or(Order::MAX);
        for range in &self.ranges {
            let step = TREE_FRAMES.min(1 << order.get());
            let total = range.span.count.0 as usize;
            let mut first = 0;
            while first + len <= total {
                let zones = first / ZONE_FRAMES..=(first + len - 1) / ZONE_FRAMES;
                // Two at most, the lower one first: nobody waits for a lower one while holding a higher one.
                let low = Zone::lock(range.zone_words(*zones.start()), self.relax);
                let high =
                    (zones.start() != zones.end()).then(|| Zone::lock(range.zone_words(*zones.end()), self.relax));
                let parts = [Some(&low), high.as_ref()];
                // As long as it stays in the zones that are locked.
                while first + len <= total
                    && (first + len - 1) / ZONE_FRAMES == *zones.end()
                    && first / ZONE_FRAMES == *zones.start()
                {
                    if is_run_free(&parts, first, len) {
                        each_piece(first, len, |piece, order| {
                            let zone = parts[piece / ZONE_FRAMES - zones.start()].expect("locked");
                            zone.take_at(piece % ZONE_FRAMES, order.index());
                            range.states().set(piece, Some(order));
                            Ok(())
                        })?;
                        for (number, zone) in zones.zip(parts.into_iter().flatten()) {
                            self.settle(range, number, zone);
                        }
                        return Ok(FrameRange { first: range.number(first), count });
                    }
                    first += step;
                }
            }
        }
        Err(self.exhausted(order))
    }

    /// Gives back what [`Frames::alloc_contiguous`] gave, all of it.
    ///
    /// # Errors
    /// As [`Frames::free_block`], for the first piece that is not as it was given; nothing has changed then.
    pub fn free_contiguous(&self, run: FrameRange) -> Result<(), FramesError> {
        if run.count.0 == 0 || run.count.0 > MAX_CONTIGUOUS {
            return Err(FramesError::Contiguous { count: run.count });
        }
        let place = self.find(run.first)?;
        let range = &self.ranges[place.range];
        let (first, len) = (place.offset, run.count.0 as usize);
        if first + len > range.span.count.0 as usize {
            return Err(FramesError::Foreign { frame: range.number(range.span.count.0 as usize - 1) });
        }
        let zones = place.zone()..=(first + len - 1) / ZONE_FRAMES;
        let low = Zone::lock(range.zone_words(*zones.start()), self.relax);
        let high = (zones.start() != zones.end()).then(|| Zone::lock(range.zone_words(*zones.end()), self.relax));
        let parts = [Some(&low), high.as_ref()];
        each_piece(first, len, |piece, order| check(range, piece, range.number(piece), order))?;
        each_piece(first, len, |piece, order| {
            range.states().set(piece, None);
            let zone = parts[piece / ZONE_FRAMES - zones.start()].expect("locked");
            zone.put(piece % ZONE_FRAMES, order.index());
            Ok(())
        })?;
        for (number, zone) in zones.zip(parts.into_iter().flatten()) {
            self.settle(range, number, zone);
        }
        Ok(())
    }

    /// The order of the allocated block that begins at `frame`.
    ///
    /// # Errors
    /// [`FramesError::Foreign`], [`FramesError::NotAllocated`], [`FramesError::NotFirst`].
    pub fn allocated_order(&self, frame: FrameNumber) -> Result<Order, FramesError> {
        let place = self.find(frame)?;
        let states = self.ranges[place.range].states();
        states.get(place.offset).ok_or_else(|| not_allocated(&states, place.offset, frame))
    }

    /// Frames in all ranges.
    pub const fn capacity(&self) -> FrameCount {
        FrameCount(self.capacity)
    }

    /// Free frames, those in caches not among them. Looks at every zone.
    pub fn free(&self) -> FrameCount {
        FrameCount(self.capacity - self.used().0)
    }

    /// Frames in use or in a cache. Looks at every zone.
    pub fn used(&self) -> FrameCount {
        FrameCount(self.ranges.iter().map(|range| self.count_used(range)).sum())
    }

    /// The ranges, lowest first.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = FrameRange> + '_ {
        self.ranges.iter().map(|range| range.span)
    }

    /// The order of the largest free block: what the next allocation can have.
    pub fn largest_free(&self) -> Option<Order> {
        let has = |order: &Order| self.ranges.iter().any(|range| range.next_zone(order.index(), 0).is_some());
        Order::all().rev().find(has)
    }

    /// Free blocks by order, each counted once at the highest order it reaches. Looks at every row.
    pub fn count_free_blocks(&self) -> [u64; Order::COUNT] {
        let mut counts = [0; Order::COUNT];
        for range in &self.ranges {
            for zone in 0..range.zones {
                Zone::lock(range.zone_words(zone), self.relax).count_free_blocks(&mut counts);
            }
        }
        counts
    }

    /// Bytes of metadata lent: about a byte and an eighth a frame.
    pub fn metadata_bytes(&self) -> usize {
        self.ranges.iter().map(|range| range.lent.bytes()).sum()
    }

    const fn id(&self) -> u64 {
        self.id
    }

    /// Tries `take` on the zones that may have a free block of `order`, lowest first: the range, and what it gave counted
    /// from the range's beginning. A zone that somebody else works on is passed over as long as another one has some.
    fn search(&self, order: Order, mut take: impl FnMut(&Zone<'_>) -> Option<usize>) -> Option<(&Range, usize)> {
        let mut is_patient = false;
        loop {
            let epoch = self.epoch.load(Acquire);
            let mut was_busy = false;
            for range in &self.ranges {
                let mut from = 0;
                while let Some(number) = range.next_zone(order.index(), from) {
                    from = number + 1;
                    let words = range.zone_words(number);
                    let zone =
                        if is_patient { Some(Zone::lock(words, self.relax)) } else { Zone::try_lock(words) };
                    let Some(zone) = zone else {
                        was_busy = true;
                        continue;
                    };
                    if let Some(first) = take(&zone) {
                        self.settle(range, number, &zone);
                        return Some((range, number * ZONE_FRAMES + first));
                    }
                }
            }
            // A block may have become free behind our back: then there is one.
            if !was_busy && self.epoch.load(Acquire) == epoch {
                return None;
            }
            is_patient = true;
        }
    }

    /// Says what the zone has now, where that has changed. Before its lock is let go.
    fn settle(&self, range: &Range, number: usize, zone: &Zone<'_>) {
        let (before, now) = zone.update_levels();
        let bit = 1 << (number % 64);
        for order in now..before {
            range.hint(order, number / 64).fetch_or(bit, Release);
        }
        for order in before..now {
            range.hint(order, number / 64).fetch_and(!bit, Release);
        }
        if now > before {
            // Behind the hint: who sees no change here has seen the hint.
            self.epoch.fetch_add(1, Release);
        }
    }

    fn find(&self, frame: FrameNumber) -> Result<Place, FramesError> {
        // Most nodes have one range.
        let behind = if self.ranges.len() == 1 {
            1
        } else {
            self.ranges.partition_point(|range| range.span.first <= frame)
        };
        let range = behind.checked_sub(1).ok_or(FramesError::Foreign { frame })?;
        let span = self.ranges[range].span;
        if !span.contains(frame) {
            return Err(FramesError::Foreign { frame });
        }
        Ok(Place { range, offset: (frame.0 - span.first.0) as usize })
    }

    fn count_used(&self, range: &Range) -> u64 {
        let used: u64 = (0..range.zones).map(|zone| zone::read_used(range.zone_words(zone))).sum();
        // Those that do not exist are counted as used.
        used.saturating_sub((range.zones * ZONE_FRAMES) as u64 - range.span.count.0)
    }

    fn exhausted(&self, order: Order) -> FramesError {
        FramesError::Exhausted { order, free: self.free(), largest: self.largest_free() }
    }
}

/// Whether a block of `order` begins there.
fn check(range: &Range, offset: usize, frame: FrameNumber, order: Order) -> Result<(), FramesError> {
    let states = range.states();
    if states.is(offset, order) {
        return Ok(());
    }
    match states.get(offset) {
        Some(allocated) => Err(FramesError::WrongOrder { frame, order, allocated }),
        None => Err(not_allocated(&states, offset, frame)),
    }
}

fn not_allocated(states: &States<'_>, offset: usize, frame: FrameNumber) -> FramesError {
    if states.is_inside(offset) { FramesError::NotFirst { frame } } else { FramesError::NotAllocated { frame } }
}

/// Whether `len` frames from `first` on are free; the zones they lie in are locked.
fn is_run_free(parts: &[Option<&Zone<'_>>; 2], first: usize, len: usize) -> bool {
    let base = first / ZONE_FRAMES * ZONE_FRAMES;
    let (start, end) = (first - base, first - base + len);
    let in_zone = |number: usize| {
        let (from, to) = (start.max(number * ZONE_FRAMES), end.min((number + 1) * ZONE_FRAMES));
        let zone = parts[number];
        from >= to || zone.is_some_and(|zone| zone.is_free(from - number * ZONE_FRAMES, to - number * ZONE_FRAMES))
    };
    in_zone(0) && in_zone(1)
}

/// The blocks that `len` frames from `first` on are made of: the largest that fit, in order.
fn each_piece(
    first: usize,
    len: usize,
    mut piece: impl FnMut(usize, Order) -> Result<(), FramesError>,
) -> Result<(), FramesError> {
    let (mut at, end) = (first, first + len);
    while at < end {
        let fits = |order: &Order| at.is_multiple_of(1 << order.get()) && at + (1 << order.get()) <= end;
        let order = Order::all().rev().find(fits).unwrap_or(Order::ZERO);
        piece(at, order)?;
        at += 1 << order.get();
    }
    Ok(())
}

fn each_bit(bits: u64, mut look: impl FnMut(usize)) {
    let mut left = bits;
    while left != 0 {
        look(left.trailing_zeros() as usize);
        left &= left - 1;
    }
}
