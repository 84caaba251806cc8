//! Blocks at a place that the caller chooses: what compaction takes its targets from.
//!
//! [`Frames::alloc_at`] takes the block at a frame, [`Frames::alloc_highest`] the highest there is: a scanner for free
//! frames comes down with it while one for frames to move goes up. [`Frames::take_free_in`] keeps a run that is to be emptied
//! from being filled. Called by compaction. One zone lock at a time.

use alloc::vec::Vec;

use super::contiguous::pieces;
use super::range::Range;
use super::zone::{ZONE_FRAMES, Zone};
use super::{FrameRange, Frames, FramesError};
use crate::sync::Ordering::Acquire;
use crate::units::{FrameNumber, Order};

impl Frames {
    /// Takes the block of `order` that begins at `frame`, if all of it is free.
    ///
    /// # Errors
    /// [`FramesError::Foreign`] when not all of it is in a range, [`FramesError::Misaligned`], [`FramesError::NotFree`]
    /// (what is in a cache is not free); nothing has changed then.
    ///
    /// ```
    /// use spmem_core::frames::{Frames, FramesError, Metadata};
    /// use spmem_core::units::{FrameCount, FrameNumber, Order};
    /// let mut frames = Frames::new();
    /// frames.add_range(FrameCount(1024), Metadata::from_heap(FrameCount(1024)).unwrap()).unwrap();
    /// let (frame, order) = (FrameNumber(40), Order::new(3).unwrap());
    /// assert_eq!(frames.alloc_at(frame, order), Ok(()));
    /// assert_eq!(frames.alloc_at(frame, order), Err(FramesError::NotFree { frame, order }));
    /// ```
    pub fn alloc_at(&self, frame: FrameNumber, order: Order) -> Result<(), FramesError> {
        let place = self.find(frame)?;
        let range = &self.ranges[place.range];
        let len = 1 << order.get();
        // Ranges begin at multiples of the largest block, and so do zones.
        if !place.offset.is_multiple_of(len) {
            return Err(FramesError::Misaligned { frame, order });
        }
        let count = usize::try_from(range.span.count.0).expect("a node has at most 2^32 frames");
        if place.offset + len > count {
            return Err(FramesError::Foreign { frame: range.behind() });
        }
        let zone = Zone::lock(range.zone_words(place.zone()), self.relax);
        if !zone.is_free(place.in_zone(), place.in_zone() + len) {
            return Err(FramesError::NotFree { frame, order });
        }
        zone.take_at(place.in_zone(), order.index());
        let is_given = self.give_out_block(range, place.zone(), &zone, place.in_zone(), order);
        self.settle(range, place.zone(), &zone);
        if is_given { Ok(()) } else { Err(FramesError::NotFree { frame, order }) }
    }

    /// Takes the free block of `order` that lies highest. Looks at the zones that may have one, from the top down.
    ///
    /// # Errors
    /// [`FramesError::Exhausted`]; never while a block of that order stays free.
    ///
    /// ```
    /// use spmem_core::frames::{Frames, Metadata};
    /// use spmem_core::units::{FrameCount, FrameNumber, Order};
    /// let mut frames = Frames::new();
    /// frames.add_range(FrameCount(1024), Metadata::from_heap(FrameCount(1024)).unwrap()).unwrap();
    /// assert_eq!(frames.alloc_highest(Order::ZERO), Ok(FrameNumber(1023)));
    /// ```
    pub fn alloc_highest(&self, order: Order) -> Result<FrameNumber, FramesError> {
        loop {
            let epoch = self.epoch.load(Acquire);
            for range in self.ranges.iter().rev() {
                let mut behind = range.zones;
                while let Some(number) = range.previous_zone(order.index(), behind) {
                    behind = number;
                    let zone = Zone::lock(range.zone_words(number), self.relax);
                    let found = loop {
                        let Some(first) = zone.find_highest(order.index()) else { break None };
                        zone.take_at(first, order.index());
                        if self.give_out_block(range, number, &zone, first, order) {
                            break Some(first);
                        }
                    };
                    self.settle(range, number, &zone);
                    if let Some(first) = found {
                        return Ok(range.number(number * ZONE_FRAMES + first));
                    }
                }
            }
            // As in `search`: a block may have become free behind our back.
            if self.epoch.load(Acquire) == epoch {
                return Err(self.exhausted(order));
            }
        }
    }

    /// Takes all that is free of a run, in the largest blocks it is made of, so that nobody is given any of it.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]: `taken` could not grow; what was taken by then is in it.
    pub(crate) fn take_free_in(
        &self,
        run: FrameRange,
        taken: &mut Vec<(FrameNumber, Order)>,
    ) -> Result<(), FramesError> {
        for range in &self.ranges {
            let base = u64::from(range.span.first.0);
            let end =
                u64::from(run.first.0).saturating_add(run.count.0).saturating_sub(base).min(range.span.count.0)
                    as usize;
            let mut at = u64::from(run.first.0).saturating_sub(base) as usize;
            while at < end {
                let number = at / ZONE_FRAMES;
                let stop = end.min((number + 1) * ZONE_FRAMES);
                let zone = Zone::lock(range.zone_words(number), self.relax);
                self.take_owned(range, number, &zone, at % ZONE_FRAMES, stop - at);
                let mut pieces = pieces(at, stop - at);
                let result = pieces.try_for_each(|(first, order)| take_free_of(range, &zone, first, order, taken));
                self.settle(range, number, &zone);
                result?;
                at = stop;
            }
        }
        Ok(())
    }
}

/// What is free of a block, itself or the halves of it that are.
fn take_free_of(
    range: &Range,
    zone: &Zone<'_>,
    first: usize,
    order: Order,
    taken: &mut Vec<(FrameNumber, Order)>,
) -> Result<(), FramesError> {
    let in_zone = first % ZONE_FRAMES;
    if zone.is_free(in_zone, in_zone + (1 << order.get())) {
        taken.try_reserve(1).map_err(|_| FramesError::NoMetadata)?;
        zone.take_at(in_zone, order.index());
        range.states().give_out_block(first, order);
        taken.push((range.number(first), order));
    } else if let Some(half) = order.get().checked_sub(1).and_then(|half| Order::new(half).ok()) {
        take_free_of(range, zone, first, half, taken)?;
        take_free_of(range, zone, first + (1 << half.get()), half, taken)?;
    }
    Ok(())
}
