//! Uses: which blocks of a part of a node stand in the way of its removal.
//!
//! [`Frames::in_use`] lists them. Takes no lock: what is listed was so a moment ago.

use super::range::Range;
use super::zone::{ROW_FRAMES, ZONE_FRAMES, Zone};
use super::{FrameRange, Frames};
use crate::units::{FrameCount, FrameNumber, Order};

/// Frames that are in use together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InUse {
    /// The first of them.
    pub first: FrameNumber,
    /// How many.
    pub count: FrameCount,
    /// The order of the block that they are; `None` for neighbours in a cache, which has to be drained.
    pub order: Option<Order>,
}

impl Frames {
    /// What is in use of a part of the node, lowest first; blocks that reach into it from outside among it, poisoned frames
    /// out of use not. Looks at every frame in use.
    ///
    /// ```
    /// use spmem_core::frames::{Frames, FrameRange, InUse, Metadata};
    /// use spmem_core::units::{FrameCount, FrameNumber, Order};
    /// let mut frames = Frames::new();
    /// let range = frames.add_range(FrameCount(1024), Metadata::from_heap(FrameCount(1024)).unwrap()).unwrap();
    /// frames.alloc_at(FrameNumber(40), Order::new(2).unwrap()).unwrap();
    /// let block = InUse { first: FrameNumber(40), count: FrameCount(4), order: Some(Order::new(2).unwrap()) };
    /// assert!(frames.in_use(range).eq([block]));
    /// assert!(frames.remove_range(range.first).is_err());
    /// ```
    pub fn in_use(&self, part: FrameRange) -> impl Iterator<Item = InUse> + '_ {
        self.ranges.iter().flat_map(move |range| range.in_use(part))
    }
}

impl Range {
    pub(super) fn in_use(&self, part: FrameRange) -> impl Iterator<Item = InUse> + '_ {
        let base = u64::from(self.span.first.0);
        let start = u64::from(part.first.0).saturating_sub(base);
        let end = u64::from(part.first.0).saturating_add(part.count.0).saturating_sub(base).min(self.span.count.0)
            as usize;
        let mut at = start as usize;
        core::iter::from_fn(move || {
            while at < end {
                let used = self.used_from(at);
                if used == 0 {
                    at = (at / ROW_FRAMES + 1) * ROW_FRAMES;
                    continue;
                }
                at += used.trailing_zeros() as usize;
                if at >= end {
                    break;
                }
                if let Some((first, order)) = self.states().holder(at) {
                    at = first + (1 << order.get());
                    return Some(InUse { first: self.number(first), count: order.frames(), order: Some(order) });
                }
                let first = at;
                while at < end && self.is_cached(at) {
                    at += 1;
                }
                if at > first {
                    let count = FrameCount((at - first) as u64);
                    return Some(InUse { first: self.number(first), count, order: None });
                }
                at += 1; // out of use
            }
            None
        })
    }

    /// Which frames of the row from `at` on are not free, `at` being the lowest bit.
    fn used_from(&self, at: usize) -> u64 {
        Zone::read_row(self.zone_words(at / ZONE_FRAMES), at % ZONE_FRAMES / ROW_FRAMES) >> (at % ROW_FRAMES)
    }

    fn is_cached(&self, at: usize) -> bool {
        let words = self.zone_words(at / ZONE_FRAMES);
        let is_out = Zone::reads_retired(words, at % ZONE_FRAMES);
        self.used_from(at) & 1 != 0 && !is_out && self.states().holder(at).is_none()
    }
}
