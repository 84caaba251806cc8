//! What caches ask of a node: rows to hold, and who has a single frame.
//!
//! Called by [`Cache`](super::Cache), alone or behind the flag of a [`PerCpu`](super::PerCpu) slot. Whose a frame is, its state
//! says ([`states`](super::states)). One zone lock at a time.

use super::cache::GIVEN_BACK;
use super::range::Range;
use super::states::{Tag, Users, clear, give_out, refuse, set, take_in, take_out};
use super::zone::{ROW_FRAMES, ZONE_FRAMES, Zone};
use super::{Frames, FramesError, Place};
use crate::sync::AtomicU32;
use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::units::{FrameNumber, Order};

/// In the stamp of a node: somebody may have a cache in front of it, ...
pub(super) const HAS_CACHES: u64 = 2;
/// ... and everybody who works on a zone knows.
pub(super) const KNOWS_CACHES: u64 = 4;

/// What a cache is filled with.
pub(super) struct Row {
    pub(super) first: FrameNumber,
    /// Its free frames.
    pub(super) bits: u64,
    /// The first frame of its zone.
    pub(super) zone: FrameNumber,
    /// Whether another cache was filled from the zone last.
    pub(super) is_others: bool,
    /// Whether a zone before it was passed over because somebody else worked on it.
    pub(super) was_busy: bool,
}

/// What caches ask of a node.
impl Frames {
    /// Whether blocks are freed with caches about, which ask no zone. With a zone locked: until it is let go, no cache comes
    /// of which this does not tell.
    pub(super) fn has_caches(&self) -> bool {
        self.stamp.load(Relaxed) & HAS_CACHES != 0
    }

    /// Before the first cache is used: whoever has a zone now ends, whoever locks one later sees the mark.
    pub(super) fn announce_caches(&self) {
        // Acquire pairs with the Release below.
        if self.stamp.fetch_or(HAS_CACHES, Acquire) & KNOWS_CACHES != 0 {
            return;
        }
        let zones = self.ranges.iter().flat_map(Range::all_zone_words);
        zones.for_each(|words| drop(Zone::lock(words, self.relax)));
        self.stamp.fetch_or(KNOWS_CACHES, Release);
    }

    /// A row's free frames for the cache `name`, the lowest there are in the zone of `from` or behind it. They count as used,
    /// given to nobody.
    pub(super) fn take_row_from(&self, from: Place, name: u32) -> Option<Row> {
        let (mut bits, mut filler) = (0, 0);
        let found = self.search(Order::ZERO, from, |_, _, zone| {
            let (first, taken) = zone.take_row(ROW_FRAMES)?;
            (bits, filler) = (taken, zone.replace_filler(name));
            Some(first)
        })?;
        let (first, zone) = (found.number(), found.zone());
        Some(Row { first, bits, zone, is_others: filler != name && filler != 0, was_busy: found.was_busy })
    }

    /// A cached frame gets an owner; not if it is another's by now. `freed`: what it was taken back with.
    #[inline]
    pub(super) fn give_out_single(&self, frame: FrameNumber, freed: Option<Tag>) -> bool {
        // Of a range that was removed since, the frame is not the cache's any more: two took it back at the same moment.
        self.state(frame).is_some_and(|state| match freed {
            Some(tag) => take_out(state, tag, Some(Order::ZERO)),
            None => give_out(state),
        })
    }

    /// Cached frames are nobody's, but for those that are another's by now: the others come to the front of `into`; how many.
    pub(super) fn take_out_each(
        &self,
        cached: &[AtomicU32],
        tag: Tag,
        into: &mut [FrameNumber; GIVEN_BACK],
    ) -> usize {
        let mut mine = 0;
        for frame in cached.iter().map(|frame| FrameNumber(frame.load(Relaxed))) {
            into[mine % GIVEN_BACK] = frame;
            let is_mine = match self.state_of_only(frame) {
                Some(state) => take_out(state, tag, None),
                None => self.take_out_single(frame, tag),
            };
            mine += usize::from(is_mine);
        }
        mine
    }

    #[inline(never)]
    fn take_out_single(&self, frame: FrameNumber, tag: Tag) -> bool {
        self.state(frame).is_some_and(|state| take_out(state, tag, None))
    }

    /// A block that its zone has just given gets an owner; not if a cache has given a frame of it one, which can be where it was
    /// freed into the cache and past it at the same moment. Such a frame is used from then on, the rest of the block free again.
    pub(super) fn give_out_block(
        &self,
        range: &Range,
        number: usize,
        zone: &Zone<'_>,
        first: usize,
        order: Order,
    ) -> bool {
        let (states, offset) = (range.states(), number * ZONE_FRAMES + first);
        if !self.has_caches() {
            states.set(offset, Some(order));
            return true;
        }
        let is_free = !states.has_owned(offset, 1 << order.get());
        if is_free {
            states.give_out_block(offset, order);
        } else {
            self.put(range, number, zone, first, order.index());
            self.take_owned(range, number, zone, first, 1 << order.get());
        }
        is_free
    }

    /// Of so many frames those that the zone says are free, while caches have given them to an owner, are used from now on;
    /// whether there were any.
    pub(super) fn take_owned(
        &self,
        range: &Range,
        number: usize,
        zone: &Zone<'_>,
        first: usize,
        count: usize,
    ) -> bool {
        let offset = number * ZONE_FRAMES;
        if !self.has_caches() || !range.states().has_owned(offset + first, count) {
            return false;
        }
        let is_owned = |&frame: &usize| !zone.is_used(frame) && range.states().has_owned(offset + frame, 1);
        let owned = (first..first + count).filter(is_owned);
        owned.map(|frame| zone.take_at(frame, 0)).count() > 0
    }

    /// A cached huge frame gets an owner.
    #[inline]
    pub(super) fn give_out_huge(&self, frame: FrameNumber) {
        set(self.state(frame).expect("a cached frame is the node's"), Some(Order::HUGE));
    }

    /// A cached huge frame becomes free.
    pub(super) fn put_huge(&self, frame: FrameNumber) {
        let place = self.find(frame).expect("a cached frame is the node's");
        let range = &self.ranges[place.range];
        let zone = Zone::lock(range.zone_words(place.zone()), self.relax);
        self.put(range, place.zone(), &zone, place.in_zone(), Order::HUGE.index());
        self.settle(range, place.zone(), &zone);
    }

    /// A frame that is in use becomes a cached one.
    pub(super) fn take_in_single(&self, frame: FrameNumber, tag: Tag, users: Users) -> Result<(), FramesError> {
        let is_taken = self.state(frame).is_some_and(|state| take_in(state, tag, users));
        if is_taken { Ok(()) } else { self.refuse(frame, Order::ZERO) }
    }

    /// A huge frame that is in use becomes a cached one.
    #[inline]
    pub(super) fn take_in_huge(&self, frame: FrameNumber) -> Result<(), FramesError> {
        let is_taken = self.state(frame).is_some_and(|state| clear(state, Order::HUGE));
        if is_taken { Ok(()) } else { self.refuse(frame, Order::HUGE) }
    }

    #[cold]
    fn refuse(&self, frame: FrameNumber, order: Order) -> Result<(), FramesError> {
        let place = self.find(frame)?;
        refuse(&self.ranges[place.range], place.offset, order)
    }

    /// Cached frames become free: one lock a zone, those that nobody works on first. Changes the order of `cached`.
    pub(super) fn put_cached(&self, cached: &mut [FrameNumber]) {
        let mut left = cached;
        let mut first = 0;
        while !left.is_empty() {
            // Once round, and none of their zones was free to take: then the first one is waited for.
            let must_wait = first == left.len();
            let place = self.find(left[if must_wait { 0 } else { first }]).expect("a cached frame is the node's");
            let range = &self.ranges[place.range];
            let words = range.zone_words(place.zone());
            let zone = if must_wait { Some(Zone::lock(words, self.relax)) } else { Zone::try_lock(words) };
            let Some(zone) = zone else {
                first += 1;
                continue;
            };
            // Which zone a frame is of is random: to branch on it would cost more than to store it twice.
            let mut mine = [0_u32; GIVEN_BACK];
            let (mut count, mut others) = (0, 0);
            let (first_of_zone, frames_of_zone) = range.zone_span(place.zone());
            for at in 0..left.len() {
                let frame = left[at];
                let offset = frame.0.wrapping_sub(first_of_zone);
                mine[count % GIVEN_BACK] = offset;
                left[others] = frame;
                count += usize::from(offset < frames_of_zone);
                others += usize::from(offset >= frames_of_zone);
            }
            self.put_each(range, place.zone(), &zone, &mine[..count]);
            self.settle(range, place.zone(), &zone);
            left = &mut left[..others];
            first = 0;
        }
    }
}
