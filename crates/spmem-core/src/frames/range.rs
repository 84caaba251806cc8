//! Ranges: the metadata that a caller lends for a range, and where in it what lies.
//!
//! [`Metadata`] is words and a byte a frame, zero meaning free; [`Range`] says which of them are a zone's, which the hints.
//! Takes no lock: hints are written while their zone is locked, and read at any time.

use alloc::vec::Vec;

use super::states::States;
use super::zone::{self, Words, ZONE_FRAMES, ZONE_WORDS};
use super::{FrameRange, Frames, FramesError, Place};
use crate::sync::Ordering::{Acquire, Relaxed};
use crate::sync::{AtomicU8, AtomicU64};
use crate::units::{FrameCount, FrameNumber, NodeId, Order};

/// Memory that the caller lends for the metadata of a range, all zero; it comes back when the range is removed. A copy of it
/// is the same memory: it can be lent once at a time, and [`Frames::add_range`](super::Frames::add_range) refuses what another range
/// has, or what the use of one has left in it.
#[derive(Clone, Copy, Debug)]
pub struct Metadata {
    pub(super) words: &'static [AtomicU64],
    pub(super) states: &'static [AtomicU8],
    node: Option<NodeId>,
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

    /// From memory that is all zero, for up to as many frames as it has room for. It is said to be sysram (R7), as the memory
    /// of a program is that has no policy of its own.
    pub const fn new(words: &'static [AtomicU64], states: &'static [AtomicU8]) -> Self {
        Self { words, states, node: None }
    }

    /// The same, of which it is known on which node it lies.
    pub const fn on(self, node: NodeId) -> Self {
        Self { node: Some(node), ..self }
    }

    /// The node on which it is said to lie.
    pub const fn node(&self) -> Option<NodeId> {
        self.node
    }

    /// As much of it as `count` frames take, if it is that much.
    pub(super) fn for_frames(self, count: FrameCount) -> Option<Self> {
        let (words, states) = Self::size(count);
        Some(Self { words: self.words.get(..words)?, states: self.states.get(..states)?, node: self.node })
    }

    /// From the heap, for tests, tools and simulation: it is never given back to it.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`].
    pub fn from_heap(count: FrameCount) -> Result<Self, FramesError> {
        let (words, states) = Self::size(count);
        Ok(Self::new(leak_zeros(words)?, leak_zeros(states)?))
    }

    /// Whether all of it is zero, as what is lent must be. Looks at all of it.
    pub fn is_zero(&self) -> bool {
        self.words.iter().all(|word| word.load(Relaxed) == 0)
            && self.states.iter().all(|state| state.load(Relaxed) == 0)
    }

    /// Makes all of it zero, the states as well if there may be any that are not. What was never written stays so.
    pub(super) fn clear(&self, has_states: bool) {
        self.words.iter().filter(|word| word.load(Relaxed) != 0).for_each(|word| word.store(0, Relaxed));
        let states = if has_states { self.states } else { &[] };
        states.iter().filter(|state| state.load(Relaxed) != 0).for_each(|state| state.store(0, Relaxed));
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

/// Where frames are.
impl Frames {
    /// After a range came or went.
    pub(super) fn note_only(&mut self) {
        self.only = match self.ranges.as_slice() {
            [range] => (range.span.first, range.states().0),
            _ => (FrameNumber(0), &[]),
        };
    }

    #[inline]
    pub(super) fn find(&self, frame: FrameNumber) -> Result<Place, FramesError> {
        // Most nodes have one range.
        let at = if let [range] = self.ranges.as_slice() {
            range.span.contains(frame).then_some((0, range.span.first))
        } else {
            self.find_among_many(frame)
        };
        let (range, first) = at.ok_or(FramesError::Foreign { frame })?;
        Ok(Place { range, offset: (frame.0 - first.0) as usize })
    }

    /// The state of a frame, if the node has one range and the frame lies in it.
    #[inline(always)]
    pub(super) fn state_of_only(&self, frame: FrameNumber) -> Option<&'static AtomicU8> {
        let (first, states) = self.only;
        states.get(frame.0.wrapping_sub(first.0) as usize)
    }

    /// The state of a frame, if it is the node's.
    #[inline]
    pub(super) fn state(&self, frame: FrameNumber) -> Option<&'static AtomicU8> {
        self.state_of_only(frame).or_else(|| self.state_among_many(frame))
    }

    #[inline(never)]
    pub(super) fn state_among_many(&self, frame: FrameNumber) -> Option<&'static AtomicU8> {
        let at = self.ranges.partition_point(|range| range.span.first <= frame).checked_sub(1)?;
        let range = self.ranges.get(at)?;
        // A range has as many states as frames.
        range.lent.states.get((frame.0 - range.span.first.0) as usize)
    }

    /// The range that a frame lies in, and where that begins.
    #[inline(never)]
    fn find_among_many(&self, frame: FrameNumber) -> Option<(usize, FrameNumber)> {
        let at = self.ranges.partition_point(|range| range.span.first <= frame).checked_sub(1)?;
        let span = self.ranges[at].span;
        span.contains(frame).then_some((at, span.first))
    }
}

/// A range with its metadata: first the zones, so that what the first one has lies in one place whatever the range's length, then
/// the hints of all orders.
#[derive(Debug)]
pub(super) struct Range {
    pub(super) span: FrameRange,
    pub(super) lent: Metadata,
    pub(super) zones: usize,
}

impl Range {
    pub(super) fn zone_words(&self, zone: usize) -> &'static Words {
        let start = zone * ZONE_WORDS;
        self.lent.words[start..].first_chunk().expect("each zone has its words")
    }

    pub(super) fn all_zone_words(&self) -> impl Iterator<Item = &'static Words> + '_ {
        (0..self.zones).map(|zone| self.zone_words(zone))
    }

    pub(super) fn states(&self) -> States<'static> {
        States(self.lent.states)
    }

    /// A word of 64 zones, a bit each: it has no free block of the order.
    pub(super) fn hint(&self, order: usize, word: usize) -> &AtomicU64 {
        &self.lent.words[self.zones * ZONE_WORDS + order * hint_words(self.zones) + word]
    }

    /// The first zone from `from` on that may have a free block of the order.
    pub(super) fn next_zone(&self, order: usize, from: usize) -> Option<usize> {
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

    /// The last zone before `behind` that may have a free block of the order.
    pub(super) fn previous_zone(&self, order: usize, behind: usize) -> Option<usize> {
        let mut skipped = if behind.is_multiple_of(64) { 0 } else { u64::MAX << (behind % 64) };
        for at in (0..behind.div_ceil(64)).rev() {
            let none = self.hint(order, at).load(Acquire) | skipped;
            if none != u64::MAX {
                return Some(at * 64 + 63 - none.leading_ones() as usize);
            }
            skipped = 0;
        }
        None
    }

    /// Free frames of a zone.
    pub(super) fn count_free(&self, zone: usize) -> u64 {
        // Those that do not exist are counted as used.
        (ZONE_FRAMES as u64).saturating_sub(zone::read_used(self.zone_words(zone)))
    }

    /// Frames that are not free.
    pub(super) fn count_taken(&self) -> u64 {
        let taken: u64 = (0..self.zones).map(|zone| zone::read_used(self.zone_words(zone))).sum();
        // Those that do not exist are counted as used.
        taken.saturating_sub((self.zones * ZONE_FRAMES) as u64 - self.span.count.0)
    }

    /// The first frame of a zone, and how many of its frames exist.
    pub(super) fn zone_span(&self, zone: usize) -> (u32, u32) {
        let before = zone * ZONE_FRAMES;
        let count = (self.span.count.0 as usize - before).min(ZONE_FRAMES);
        (self.span.first.0 + before as u32, count as u32)
    }

    /// Where a frame is in the range, if it is in its zone `zone`.
    pub(super) fn offset_in_zone(&self, frame: FrameNumber, zone: usize) -> Option<usize> {
        let offset = frame.0.wrapping_sub(self.span.first.0) as usize;
        (offset / ZONE_FRAMES == zone && (offset as u64) < self.span.count.0).then_some(offset)
    }

    /// The frame behind its last one.
    pub(super) fn behind(&self) -> FrameNumber {
        FrameNumber(self.span.first.0.saturating_add(u32::try_from(self.span.count.0).unwrap_or(u32::MAX)))
    }

    pub(super) fn number(&self, offset: usize) -> FrameNumber {
        FrameNumber(self.span.first.0 + u32::try_from(offset).expect("a node has at most 2^32 frames"))
    }
}
