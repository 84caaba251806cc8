//! Poison: frames whose memory is broken are taken out of use for good (R20; mm/memory-failure.c is the model).
//!
//! [`Frames::poison`] marks a frame, at any time, and says whom that hurts ([`Hurt`]). A free frame goes out of use at once,
//! any other when whoever has it gives it back; a frame goes out of use once, and never comes back. Its neighbours are
//! free as before.
//!
//! The mark, a bit a frame, decides. It is set with the zone locked and cleared only when the range is removed. Caches have no
//! lock, so they look at the marks of what passes through them, but only from the first mark on: it changes the node's
//! stamp, which they compare in any case. So nothing is slower before that. One zone lock at a time.
//!
//! Hole: a frame that leaves a cache in the same instant as it is poisoned is reported as cached; whoever poisoned it can ask
//! again.

use core::ops::ControlFlow;

use super::range::Range;
use super::states::Tag;
use super::zone::{ROW_FRAMES, Words, ZONE_FRAMES, Zone, each_row};
use super::{FrameRange, Frames, FramesError, each_bit};
use crate::sync::Ordering::{Relaxed, Release};
use crate::units::{FrameCount, FrameNumber, Order};

/// In the stamp of a node: some frame is poisoned.
pub(super) const HAS_POISON: u64 = 1;

/// Who is hurt by the poison of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hurt {
    /// Nobody: the frame was free or out of use already. It is out of use.
    Nobody,
    /// Nobody yet: the frame is in a cache, or just being given out or back. Who asks again learns whether somebody got it in
    /// that instant.
    Cached,
    /// Whoever holds the block. Its frame goes out of use when the block is freed.
    Holder {
        /// The block's first frame.
        first: FrameNumber,
        /// The block's order.
        order: Order,
    },
}

/// What [`Frames::poison`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Poisoned {
    /// Whether that was not known before.
    pub is_new: bool,
    /// Who is hurt.
    pub hurt: Hurt,
}

impl Frames {
    /// Marks a frame as broken: from now on nobody is given it. Asked again, it says how the frame is now.
    ///
    /// # Errors
    /// [`FramesError::Foreign`].
    ///
    /// ```
    /// use spmem_core::frames::{Frames, Hurt, Metadata};
    /// use spmem_core::units::{FrameCount, FrameNumber, Order};
    /// let mut frames = Frames::new();
    /// frames.add_range(FrameCount(1024), Metadata::from_heap(FrameCount(1024)).unwrap()).unwrap();
    /// let first = frames.alloc(Order::HUGE).unwrap();
    /// let hurt = frames.poison(FrameNumber(first.0 + 7)).unwrap().hurt;
    /// assert_eq!(hurt, Hurt::Holder { first, order: Order::HUGE });
    /// frames.free_block(first, Order::HUGE).unwrap();
    /// assert_eq!((frames.free(), frames.poisoned()), (FrameCount(1023), FrameCount(1)));
    /// ```
    pub fn poison(&self, frame: FrameNumber) -> Result<Poisoned, FramesError> {
        let place = self.find(frame)?;
        let range = &self.ranges[place.range];
        let zone = Zone::lock(range.zone_words(place.zone()), self.relax);
        let is_new = zone.mark_poisoned(place.in_zone());
        // Release, behind the mark: a cache that sees the stamp sees the mark (`Cache::is_of`).
        self.stamp.fetch_or(HAS_POISON, Release);
        // One that a cache gave away while its zone had it, too, has an owner.
        if self.take_owned(range, place.zone(), &zone, place.in_zone(), 1) {
            self.settle(range, place.zone(), &zone);
        }
        let hurt = if !zone.is_used(place.in_zone()) {
            zone.take_at(place.in_zone(), 0);
            retire(range, &zone, place.offset);
            self.settle(range, place.zone(), &zone);
            Hurt::Nobody
        } else if zone.is_retired(place.in_zone()) && !range.states().has_owned(place.offset, 1) {
            Hurt::Nobody
        } else {
            range
                .states()
                .holder(place.offset)
                .map_or(Hurt::Cached, |(first, order)| Hurt::Holder { first: range.number(first), order })
        };
        Ok(Poisoned { is_new, hurt })
    }

    /// Frames out of use because they are poisoned. Those that somebody still has count as used.
    pub fn poisoned(&self) -> FrameCount {
        FrameCount(self.ranges.iter().map(Range::count_retired).sum())
    }

    /// All frames that are poisoned, lowest first: out of use or not. Looks at every row of zones that have any.
    pub fn poisoned_frames(&self) -> impl Iterator<Item = FrameNumber> + '_ {
        self.ranges.iter().flat_map(Range::poisoned_frames)
    }

    /// Whether any frame of a run is poisoned, out of use or not. Once any of the node is, it looks at the rows of the run.
    pub fn has_poison_in(&self, run: FrameRange) -> bool {
        let has_any = self.stamp.load(Relaxed) & HAS_POISON != 0;
        has_any && self.ranges.iter().any(|range| range.poisoned_in(run).next().is_some())
    }

    /// Gives a block that is in use back to its zone, but for what of it is poisoned. A single frame may be free already: a cache
    /// gave it to an owner while its zone had it, too.
    pub(super) fn put(&self, range: &Range, number: usize, zone: &Zone<'_>, first: usize, order: usize) {
        if order == 0 && !zone.is_used(first) {
            return;
        }
        if !zone.has_poison() {
            return zone.put(first, order);
        }
        let done = each_row(first, first + (1 << order), |row, mask| {
            self.put_in_row(range, number, zone, row * ROW_FRAMES, mask);
            ControlFlow::Continue(())
        });
        debug_assert!(done.is_continue());
    }

    /// Gives single frames back, counted from the zone's beginning, but for those that are poisoned, and those that are free.
    pub(super) fn put_each(&self, range: &Range, number: usize, zone: &Zone<'_>, frames: &[u32]) {
        if !zone.has_poison() {
            return zone.put_each(frames);
        }
        for frame in frames.iter().map(|&frame| frame as usize).filter(|&frame| zone.is_used(frame)) {
            self.put_in_row(range, number, zone, frame / ROW_FRAMES * ROW_FRAMES, 1 << (frame % ROW_FRAMES));
        }
    }

    /// Gives single frames of a row back, as bits, but for those that are poisoned.
    pub(super) fn put_in_row(&self, range: &Range, number: usize, zone: &Zone<'_>, first: usize, bits: u64) {
        let poisoned = if zone.has_poison() { zone.poisoned_in(first / ROW_FRAMES) & bits } else { 0 };
        each_bit(poisoned, |bit| {
            retire(range, zone, number * ZONE_FRAMES + first + bit);
        });
        zone.put_in_row(first, bits & !poisoned);
    }

    /// Takes a frame that a cache has for itself, `freed` into it or not, out of use, if it is poisoned.
    #[cold]
    pub(super) fn retire_cached(&self, frame: FrameNumber, freed: Option<Tag>) -> Retired {
        // Of a range that was removed since, the frame is another's in any case.
        let Ok(place) = self.find(frame) else { return Retired::NotMine };
        let range = &self.ranges[place.range];
        let words = range.zone_words(place.zone());
        if !is_marked(words, place.in_zone()) {
            return Retired::Sound;
        }
        let zone = Zone::lock(words, self.relax);
        if freed.is_some_and(|tag| !range.states().has(place.offset, tag)) {
            return Retired::NotMine;
        }
        if retire(range, &zone, place.offset) { Retired::Now } else { Retired::Before }
    }
}

/// What became of a frame that passes through a cache.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Retired {
    /// It is not poisoned.
    Sound,
    /// It is out of use from now on.
    Now,
    /// It was out of use already: somebody else freed it at the same moment.
    Before,
    /// It was poisoned, and somebody else took it back at the same moment.
    NotMine,
}

/// Whether a frame of a zone is poisoned. Once true it stays true.
fn is_marked(words: &Words, frame: usize) -> bool {
    Zone::read_poisoned_in(words, frame / ROW_FRAMES) >> (frame % ROW_FRAMES) & 1 != 0
}

/// A poisoned frame that nobody has any more goes out of use; whether it was not already. It stays used in its zone.
fn retire(range: &Range, zone: &Zone<'_>, offset: usize) -> bool {
    let is_new = zone.mark_retired(offset % ZONE_FRAMES);
    // Also where that is no news: a cache may have stored its tag there since, with a free that came late.
    range.states().set_retired(offset);
    is_new
}

impl Range {
    pub(super) fn count_retired(&self) -> u64 {
        (0..self.zones).map(|zone| Zone::read_retired(self.zone_words(zone))).sum()
    }

    fn poisoned_frames(&self) -> impl Iterator<Item = FrameNumber> + '_ {
        self.poisoned_in(self.span)
    }

    fn poisoned_in(&self, run: FrameRange) -> impl Iterator<Item = FrameNumber> + '_ {
        let begins = u64::from(self.span.first.0);
        let first = u64::from(run.first.0).saturating_sub(begins);
        let end = u64::from(run.first.0).saturating_add(run.count.0).saturating_sub(begins).min(self.span.count.0);
        const ROWS: usize = ZONE_FRAMES / ROW_FRAMES;
        let rows = first as usize / ROW_FRAMES..(end as usize).div_ceil(ROW_FRAMES);
        let rows = rows.filter(|row| Zone::reads_poison(self.zone_words(row / ROWS)));
        rows.flat_map(move |row| {
            let poisoned = Zone::read_poisoned_in(self.zone_words(row / ROWS), row % ROWS);
            let bits = (0..ROW_FRAMES).filter(move |bit| poisoned >> bit & 1 != 0);
            bits.map(move |bit| self.number(row * ROW_FRAMES + bit)).filter(move |&frame| run.contains(frame))
        })
    }
}
