//! Contiguous runs: any number of neighbouring frames, up to 1 GiB, across the border of two zones.
//!
//! A run is given out as the largest blocks that it is made of. Two zone locks at most, the lower one first.

use super::range::Range;
use super::states::check;
use super::zone::{TREE_FRAMES, ZONE_FRAMES, Zone};
use super::{FrameRange, Frames, FramesError, MAX_CONTIGUOUS};
use crate::sync::Ordering::Acquire;
use crate::units::{FrameCount, Order};

/// Looks at a whole node, each as long as it takes, before a run is given up that others may be freeing.
const LOOKS: usize = 8;

impl Frames {
    /// Takes `count` neighbouring frames, up to 1 GiB; from 4 MiB on they begin at a multiple of 4 MiB, below that at a
    /// multiple of the next power of two. Looks at every tree: slow.
    ///
    /// A run lies in one range that was added, also where two of them touch, as Linux's `alloc_contig_range` stays in one zone: a
    /// range goes as a whole, and a run across two would keep both. Whoever wants longer runs adds the memory in one piece.
    ///
    /// # Errors
    /// [`FramesError::Contiguous`] for a length that is never given; [`FramesError::Exhausted`], with the smallest order
    /// that holds it, when no such run is free: in eight looks in a row, if others free meanwhile.
    pub fn alloc_contiguous(&self, count: FrameCount) -> Result<FrameRange, FramesError> {
        if count.0 == 0 || count.0 > MAX_CONTIGUOUS {
            return Err(FramesError::Contiguous { count });
        }
        for _ in 0..LOOKS {
            let epoch = self.epoch.load(Acquire);
            if let Some(run) = self.find_contiguous(count) {
                return Ok(run);
            }
            // As in `search`: a run may have become free behind our back.
            if self.epoch.load(Acquire) == epoch {
                break;
            }
        }
        Err(self.exhausted(Order::fitting(count.bytes()).unwrap_or(Order::MAX)))
    }

    /// One look at every tree.
    fn find_contiguous(&self, count: FrameCount) -> Option<FrameRange> {
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
                    if is_run_free(&parts, first, len) && !self.take_owned_of_run(range, &parts, first, len) {
                        for (piece, order) in pieces(first, len) {
                            let zone = parts[piece / ZONE_FRAMES - zones.start()].expect("locked");
                            zone.take_at(piece % ZONE_FRAMES, order.index());
                            range.states().give_out_block(piece, order);
                        }
                        for (number, zone) in zones.zip(parts.into_iter().flatten()) {
                            self.settle(range, number, zone);
                        }
                        return Some(FrameRange { first: range.number(first), count });
                    }
                    first += step;
                }
            }
        }
        None
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
            return Err(FramesError::Foreign { frame: range.behind() });
        }
        let zones = place.zone()..=(first + len - 1) / ZONE_FRAMES;
        let low = Zone::lock(range.zone_words(*zones.start()), self.relax);
        let high = (zones.start() != zones.end()).then(|| Zone::lock(range.zone_words(*zones.end()), self.relax));
        let parts = [Some(&low), high.as_ref()];
        pieces(first, len).try_for_each(|(piece, order)| check(range, piece, order))?;
        for (done, (piece, order)) in pieces(first, len).enumerate() {
            if let Err(cause) = self.take_back(range, piece, order) {
                // A cache took this piece back since: all others stay in use.
                pieces(first, len).take(done).for_each(|(piece, order)| range.states().set(piece, Some(order)));
                return Err(cause);
            }
        }
        for (piece, order) in pieces(first, len) {
            let number = piece / ZONE_FRAMES;
            let zone = parts[number - zones.start()].expect("locked");
            self.put(range, number, zone, piece % ZONE_FRAMES, order.index());
        }
        for (number, zone) in zones.zip(parts.into_iter().flatten()) {
            self.settle(range, number, zone);
        }
        Ok(())
    }
}

impl Frames {
    /// [`Frames::take_owned`] of a run in two zones at most.
    fn take_owned_of_run(&self, range: &Range, parts: &[Option<&Zone<'_>>; 2], first: usize, len: usize) -> bool {
        let lowest = first / ZONE_FRAMES;
        let take = |(number, zone): (usize, &Zone<'_>)| {
            let (from, to) = (first.max(number * ZONE_FRAMES), (first + len).min((number + 1) * ZONE_FRAMES));
            let has_taken = self.take_owned(range, number, zone, from % ZONE_FRAMES, to.saturating_sub(from));
            if has_taken {
                self.settle(range, number, zone);
            }
            has_taken
        };
        (lowest..).zip(parts.iter().copied().flatten()).map(take).fold(false, |any, taken| any | taken)
    }
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
pub(super) fn pieces(first: usize, len: usize) -> impl Iterator<Item = (usize, Order)> {
    let (mut at, end) = (first, first + len);
    core::iter::from_fn(move || {
        let fits = |order: &Order| at.is_multiple_of(1 << order.get()) && at + (1 << order.get()) <= end;
        let piece = (at, Order::all().rev().find(fits)?);
        at += 1 << piece.1.get();
        Some(piece)
    })
}
