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
//! Both caches pass requests for larger blocks on to a zone that nobody else works on.
//!
//! The caches are for components that own a [`Frames`] and hand out single frames at the pace of a program's faults. The memory
//! manager goes to the zones itself, alone or in batches ([`MemoryManager::alloc_batch`](crate::mm::MemoryManager::alloc_batch)):
//! each frame it gives out is charged to a domain and a grant, and frames that lie in a cache would be charged to nobody
//! (R6, R12). Nor would a run gain by one: its store takes blocks for many pages each, keeps spare ones, and compresses
//! for microseconds in between.
//!
//! Caches are filled a row (64 neighbours) at a time from the lowest place that has any, and give back what they
//! cannot hold: so what they hold keeps few huge frames in pieces.
//!
//! A frame whose memory is broken is taken out of use for good ([`Frames::poison`]).
//!
//! Metadata is lent by the caller, zero meaning free ([`Metadata`]): a byte a frame, and 103 KiB for each GiB that a range begins.
//! That is 0.034 % of whole GiBs, and at most 0.1 % of a range of 134 MiB or more; a shorter one takes more.
//! Nothing of it is touched before the frames it describes. Takes `&self`; adding and removing ranges takes `&mut self`.
//!
//! A double free is refused, on whatever paths. Of several threads that free one block at the very same moment one succeeds,
//! unless caches take a single frame: then who frees may be told nothing, and the frame still goes to one owner ([`states`]).
//!
//! Holes: an allocation looks at each full range before the one it comes from. A contiguous range lies in one range that was
//! added, even where two of them touch.

#![allow(
    clippy::cast_possible_truncation,
    reason = "a node has at most 2^32 frames, as add_range checks, and usize has 64 bits"
)]

mod batch;
mod cache;
mod cached;
mod contiguous;
mod error;
mod index;
mod percpu;
mod placed;
mod poison;
mod range;
mod states;
mod uses;
mod view;
mod word;
mod zone;

use alloc::vec::Vec;

use self::cached::HAS_CACHES;
use self::poison::HAS_POISON;
use self::range::Range;
use self::states::not_allocated;
use self::zone::{TREE_FRAMES, ZONE_FRAMES, Zone};
use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{AtomicU8, AtomicU64};
use crate::units::{FrameCount, FrameNumber, NodeId, Order};

pub use self::cache::Cache;
pub use self::error::FramesError;
pub use self::percpu::PerCpu;
pub use self::poison::{Hurt, Poisoned};
pub use self::range::Metadata;
pub use self::uses::InUse;
pub use self::view::FramesView;

const _: () = assert!(usize::BITS >= 64);

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

    /// The blocks that a contiguous range is given out as, in order.
    pub(crate) fn blocks(self) -> impl Iterator<Item = (FrameNumber, Order)> {
        // Ranges of a node begin at multiples of the largest block: the pieces are the same from there and from frame 0.
        let pieces = contiguous::pieces(self.first.0 as usize, self.count.0 as usize);
        pieces.map(|(first, order)| (FrameNumber(first as u32), order))
    }
}

/// Where a frame is.
#[derive(Clone, Copy)]
struct Place {
    range: usize,
    offset: usize,
}

impl Place {
    const LOWEST: Self = Self { range: 0, offset: 0 };

    const fn zone(self) -> usize {
        self.offset / ZONE_FRAMES
    }

    const fn in_zone(self) -> usize {
        self.offset % ZONE_FRAMES
    }
}

/// What a search has found.
struct Found<'a> {
    range: &'a Range,
    /// Frames from the range's beginning.
    first: usize,
    /// Whether a zone before it was passed over because somebody else worked on it.
    was_busy: bool,
}

impl Found<'_> {
    fn number(&self) -> FrameNumber {
        self.range.number(self.first)
    }

    /// The first frame of its zone.
    fn zone(&self) -> FrameNumber {
        self.range.number(self.first / ZONE_FRAMES * ZONE_FRAMES)
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
    /// Of a node with one range: where that begins, and its states; else none. What is looked at for each single frame.
    only: (FrameNumber, &'static [AtomicU8]),
    capacity: u64,
    /// Raised after a block of some order has become free in a zone that had none.
    epoch: AtomicU64,
    relax: fn(),
    /// Tells it from every other, 0 before it has a range; whether it [`has poison`](poison::HAS_POISON), and
    /// [`caches`](cached::HAS_CACHES).
    stamp: AtomicU64,
}

/// The lowest bits of a stamp are for poison and caches.
const STAMPS: u64 = 8;
static NEXT_STAMP: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(STAMPS);

impl Default for Frames {
    fn default() -> Self {
        Self::new()
    }
}

impl Frames {
    /// No frames yet.
    pub const fn new() -> Self {
        Self::with_relax(crate::sync::spin_loop)
    }

    /// No frames yet. `relax` is called while a lock is waited for whose holder may be without a processor.
    pub const fn with_relax(relax: fn()) -> Self {
        Self {
            ranges: Vec::new(),
            only: (FrameNumber(0), &[]),
            capacity: 0,
            epoch: AtomicU64::new(0),
            relax,
            stamp: AtomicU64::new(0),
        }
    }

    /// Adds `count` free frames, in the lowest gap between ranges that holds them, at a multiple of 1024: so memory that comes
    /// and goes never runs out of frame numbers.
    ///
    /// # Errors
    /// [`FramesError::EmptyRange`], [`FramesError::TooMany`]; [`FramesError::NoMetadata`] when less was lent than
    /// [`Metadata::size`] says, [`FramesError::MetadataInUse`] when it is another range's, or that was written.
    pub fn add_range(&mut self, count: FrameCount, lent: Metadata) -> Result<FrameRange, FramesError> {
        let (at, first) = self.find_gap(count);
        let too_many = FramesError::TooMany { count, frames: first };
        if count.0 == 0 {
            return Err(FramesError::EmptyRange);
        }
        if first > MAX_FRAMES || count.0 > MAX_FRAMES - first {
            return Err(too_many);
        }
        let Ok(first) = u32::try_from(first) else { return Err(too_many) };
        let lent = lent.for_frames(count).ok_or(FramesError::NoMetadata)?;
        self.ranges.try_reserve(1).map_err(|_| FramesError::NoMetadata)?;
        let span = FrameRange { first: FrameNumber(first), count };
        let zones = (count.0 as usize).div_ceil(ZONE_FRAMES);
        let range = Range { span, lent, zones };
        let is_fresh = range.all_zone_words().all(Zone::is_fresh);
        if !is_fresh || !Zone::claim(range.zone_words(0)) {
            return Err(FramesError::MetadataInUse);
        }
        let rest = count.0 as usize % ZONE_FRAMES;
        if rest > 0 {
            let zone = Zone::lock(range.zone_words(zones - 1), self.relax);
            zone.truncate(rest);
            self.settle(&range, zones - 1, &zone);
        }
        if self.stamp.load(Relaxed) < STAMPS {
            self.stamp.fetch_or(NEXT_STAMP.fetch_add(STAMPS, Relaxed), Relaxed);
        }
        self.ranges.insert(at, range);
        self.note_only();
        self.capacity += count.0;
        Ok(span)
    }

    /// Where a new range goes: which of the ranges it is then, and where it begins.
    fn find_gap(&self, count: FrameCount) -> (usize, u64) {
        let mut first = 0;
        for (at, range) in self.ranges.iter().enumerate() {
            let start = u64::from(range.span.first.0);
            if start - first >= count.0 {
                return (at, first);
            }
            first = (start + range.span.count.0).next_multiple_of(TREE_FRAMES as u64);
        }
        (self.ranges.len(), first)
    }

    /// Takes away the range that begins at `first`, all of whose frames must be free or out of use: none in use, none in a
    /// cache. A frame that is free, while a cache took it back, too, at the same moment, is taken from the cache: it counts it as
    /// [`Cache::freed_twice`]. Which ones are poisoned is forgotten with it: [`Frames::poisoned_frames`] tells before.
    ///
    /// # Errors
    /// [`FramesError::NoRange`]; [`FramesError::RangeInUse`], of which [`Frames::in_use`] knows more.
    pub fn remove_range(&mut self, first: FrameNumber) -> Result<(FrameRange, Metadata), FramesError> {
        let at = self
            .ranges
            .binary_search_by_key(&first, |range| range.span.first)
            .map_err(|_| FramesError::NoRange { first })?;
        let range = &self.ranges[at];
        if self.has_caches() {
            for number in 0..range.zones {
                let zone = Zone::lock(range.zone_words(number), self.relax);
                let (_, count) = range.zone_span(number);
                self.take_owned(range, number, &zone, 0, count as usize);
                self.settle(range, number, &zone);
            }
        }
        let used = range.count_taken().saturating_sub(range.count_retired());
        let lowest = range.in_use(range.span).next();
        if used > 0 || lowest.is_some() {
            let lowest_first = lowest.map_or(first, |lowest| lowest.first);
            let used = FrameCount(used.max(lowest.map_or(0, |lowest| lowest.count.0)));
            return Err(FramesError::RangeInUse { first, used, lowest: lowest_first });
        }
        let range = self.ranges.remove(at);
        self.note_only();
        self.capacity -= range.span.count.0;
        // States are all zero but for those of frames out of use, and of those that caches have lost.
        range.lent.clear(self.stamp.load(Relaxed) & (HAS_CACHES | HAS_POISON) != 0);
        Ok((range.span, range.lent))
    }

    /// Takes a free block, in the lowest row (below order 6) or tree of the lowest zone that has one.
    ///
    /// # Errors
    /// [`FramesError::Exhausted`]; never while a block of that order stays free.
    pub fn alloc(&self, order: Order) -> Result<FrameNumber, FramesError> {
        let found = self.take_block_from(Place::LOWEST, order);
        found.map(|found| found.number()).ok_or_else(|| self.exhausted(order))
    }

    /// A block, of the lowest place that has one in the zone of `from` or behind it.
    fn take_block_from(&self, from: Place, order: Order) -> Option<Found<'_>> {
        loop {
            let found = self.search(order, from, |range, number, zone| {
                loop {
                    let first = zone.take(order.index())?;
                    if order == Order::ZERO || self.give_out_block(range, number, zone, first, order) {
                        return Some(first);
                    }
                }
            })?;
            // A cache may have given away what was freed past it at the same moment: then it has an owner, and is used.
            if order != Order::ZERO || found.range.states().give_out(found.first) {
                return Some(found);
            }
        }
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
        self.take_back(range, place.offset, order)?;
        self.put(range, place.zone(), &zone, place.in_zone(), order.index());
        self.settle(range, place.zone(), &zone);
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

    /// Free frames; neither those in caches nor poisoned ones. Looks at every zone.
    pub fn free(&self) -> FrameCount {
        FrameCount(self.capacity - self.ranges.iter().map(Range::count_taken).sum::<u64>())
    }

    /// Whether at least so many frames are free. Looks at no more zones than it takes, those with a large block first and never
    /// at full ones: an allocation asks this each time.
    pub(crate) fn has_free(&self, wanted: FrameCount) -> bool {
        let reaches = |order: Order| {
            let mut found = 0;
            self.ranges.iter().any(|range| {
                let next = |&zone: &usize| range.next_zone(order.index(), zone + 1);
                core::iter::successors(range.next_zone(order.index(), 0), next).any(|zone| {
                    found += range.count_free(zone);
                    found >= wanted.0
                })
            })
        };
        wanted.0 == 0 || reaches(Order::MAX) || reaches(Order::ZERO)
    }

    /// Frames in use or in a cache. Looks at every zone.
    pub fn used(&self) -> FrameCount {
        let used = |range: &Range| range.count_taken().saturating_sub(range.count_retired());
        FrameCount(self.ranges.iter().map(used).sum())
    }

    /// The ranges, lowest first.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = FrameRange> + DoubleEndedIterator + '_ {
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

    /// Whether metadata of it lies on the node.
    pub(crate) fn borrows(&self, node: NodeId) -> bool {
        self.ranges.iter().any(|range| range.lent.node() == Some(node))
    }

    /// Bytes of metadata lent: of a whole GiB about 1.4 a frame.
    pub fn metadata_bytes(&self) -> usize {
        self.ranges.iter().map(|range| range.lent.bytes()).sum()
    }

    /// Tries `take` on the zones that may have a free block of `order`, with their range and number in it, lowest first, from that of `from` on. A zone that somebody else works on is passed over as long as another one has some.
    fn search(
        &self,
        order: Order,
        from: Place,
        mut take: impl FnMut(&Range, usize, &Zone<'_>) -> Option<usize>,
    ) -> Option<Found<'_>> {
        let mut is_patient = false;
        loop {
            let epoch = self.epoch.load(Acquire);
            let mut was_busy = false;
            let mut next = from.zone();
            for range in self.ranges.iter().skip(from.range) {
                while let Some(number) = range.next_zone(order.index(), next) {
                    next = number + 1;
                    let words = range.zone_words(number);
                    let zone =
                        if is_patient { Some(Zone::lock(words, self.relax)) } else { Zone::try_lock(words) };
                    let Some(zone) = zone else {
                        was_busy = true;
                        continue;
                    };
                    let taken = take(range, number, &zone);
                    self.settle(range, number, &zone);
                    if let Some(first) = taken {
                        let first = number * ZONE_FRAMES + first;
                        return Some(Found { range, first, was_busy: was_busy || is_patient });
                    }
                }
                next = 0;
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

    fn exhausted(&self, order: Order) -> FramesError {
        FramesError::Exhausted { order, free: self.free(), largest: self.largest_free() }
    }
}

fn each_bit(bits: u64, mut look: impl FnMut(usize)) {
    let mut left = bits;
    while left != 0 {
        look(left.trailing_zeros() as usize);
        left &= left - 1;
    }
}
