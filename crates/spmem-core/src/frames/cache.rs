//! Caches in front of the zones, for single frames and a few huge ones.
//!
//! [`Cache`] is one owner's, a slot of [`PerCpu`](super::PerCpu) everybody's. An interface for components: who uses it, and
//! why the memory manager does not, [`frames`](super) says. Measured by `cargo xtask bench frames`.
//!
//! A cache holds a part of one row, taken from the lowest place, and what was freed last, used first; huge frames as Linux's
//! per-CPU lists do (mm/page_alloc.c, `pcp_allowed_order`), but two at most. Its fields are
//! atomic so that a slot can be shared under a lock; whoever has a cache for himself reads and writes them plainly.

use super::cached::{HAS_CACHES, KNOWS_CACHES};
use super::poison::{HAS_POISON, Retired};
use super::states::{Tag, Users, take_in, take_out};
use super::zone::{ROW_FRAMES, ZONE_FRAMES};
use super::{Frames, FramesError, Place};
use crate::sync::Ordering::{Acquire, Relaxed};
use crate::sync::{AtomicBool, AtomicU8, AtomicU32, AtomicU64};
use crate::units::{FrameCount, FrameNumber, Order};

/// Freed frames held, at most.
pub(super) const HELD: usize = 192;
/// How many of them, the oldest, are given back when it is full.
pub(super) const GIVEN_BACK: usize = 128;

/// Freed huge frames held, at most.
const HUGE_HELD: usize = 2;

/// How many larger blocks are taken from a zone of its own: as many huge pages as a zone has.
const AWAY_BLOCKS: u32 = (ZONE_FRAMES >> 9) as u32;
/// How many rows a cache takes from a zone of its own because another one fills itself from the lowest: as many as a zone has.
const AWAY: u32 = (ZONE_FRAMES / ROW_FRAMES) as u32;

/// One owner's cache of free frames.
///
/// Call [`Cache::drain`] before it is dropped: what it holds stays in use otherwise.
///
/// ```
/// use spmem_core::frames::{Cache, Frames, Metadata};
/// use spmem_core::units::{FrameCount, Order};
/// let mut frames = Frames::new();
/// frames.add_range(FrameCount(1024), Metadata::from_heap(FrameCount(1024)).unwrap()).unwrap();
/// let mut cache = Cache::new();
/// let frame = cache.alloc(&frames).unwrap();
/// cache.free(&frames, frame).unwrap();
/// assert!(cache.free(&frames, frame).is_err());
/// cache.drain(&frames);
/// assert_eq!(frames.free(), FrameCount(1024));
/// ```
#[derive(Debug)]
pub struct Cache {
    /// The node's stamp, but for the mark of poison; 0 while it is empty.
    node: AtomicU64,
    row_first: AtomicU32,
    row_bits: AtomicU64,
    /// How many are held.
    len: AtomicU32,
    /// They, the oldest first.
    held: [AtomicU32; HELD],
    /// The huge frames that were freed last, and how many they are.
    huge: [AtomicU32; HUGE_HELD],
    huge_len: AtomicU32,
    /// Tells it from every other, 0 until it is used.
    name: AtomicU32,
    /// The [`Tag`] of that name.
    tag: AtomicU8,
    /// How often a frame that it had taken back was another's, too.
    lost: AtomicU32,
    /// The first frame of the zone that it was filled from.
    filled_at: AtomicU32,
    /// Whether another one was filled from there when it came.
    is_guest: AtomicBool,
    /// Where it looks first, ...
    away_at: AtomicU32,
    /// ... so many more times, before it goes back to the lowest place.
    away_for: AtomicU32,
    /// As these two, for larger blocks; hints, which a slot's users change without its lock.
    blocks_at: AtomicU32,
    blocks_for: AtomicU32,
}

/// Of [`Cache::name`].
static NEXT_NAME: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(1);

impl Default for Cache {
    fn default() -> Self {
        Self::new()
    }
}

impl Cache {
    /// An empty cache.
    pub const fn new() -> Self {
        Self {
            node: AtomicU64::new(0),
            row_first: AtomicU32::new(0),
            row_bits: AtomicU64::new(0),
            len: AtomicU32::new(0),
            held: [const { AtomicU32::new(0) }; HELD],
            huge: [const { AtomicU32::new(0) }; HUGE_HELD],
            huge_len: AtomicU32::new(0),
            name: AtomicU32::new(0),
            tag: AtomicU8::new(0),
            lost: AtomicU32::new(0),
            filled_at: AtomicU32::new(u32::MAX),
            is_guest: AtomicBool::new(false),
            away_at: AtomicU32::new(0),
            away_for: AtomicU32::new(0),
            blocks_at: AtomicU32::new(0),
            blocks_for: AtomicU32::new(0),
        }
    }

    /// Takes a frame.
    ///
    /// # Errors
    /// [`FramesError::Exhausted`]; [`FramesError::OtherCache`].
    #[inline]
    pub fn alloc(&mut self, frames: &Frames) -> Result<FrameNumber, FramesError> {
        self.alloc_alone(frames)
    }

    /// Takes a block of any order: a huge frame that it holds, else as [`Frames::alloc`], but from a zone where others do not
    /// do the same.
    ///
    /// # Errors
    /// As [`Frames::alloc`].
    pub fn alloc_block(&mut self, frames: &Frames, order: Order) -> Result<FrameNumber, FramesError> {
        let held = if order == Order::HUGE { self.alloc_huge_alone(frames) } else { None };
        if let Some(frame) = held {
            return Ok(frame);
        }
        match self.alloc_block_shared(frames, order) {
            // What it holds itself may be all that is left.
            Err(FramesError::Exhausted { .. }) if !self.is_empty() && self.is_of(frames).is_ok() => {
                self.drain_alone(frames);
                frames.alloc(order)
            }
            result => result,
        }
    }

    /// A block from a zone that nobody else works on. Whoever found the lowest one busy stays in another for a while: in
    /// turns on one zone, two would wait for its cache lines most of the time.
    pub(super) fn alloc_block_shared(&self, frames: &Frames, order: Order) -> Result<FrameNumber, FramesError> {
        let left = self.blocks_for.load(Relaxed);
        let away = if left > 0 { frames.find(FrameNumber(self.blocks_at.load(Relaxed))).ok() } else { None };
        let found = away.and_then(|away| frames.take_block_from(away, order));
        let found = found.or_else(|| frames.take_block_from(Place::LOWEST, order));
        let found = found.ok_or_else(|| frames.exhausted(order))?;
        if found.was_busy {
            self.blocks_at.store(found.zone().0, Relaxed);
            self.blocks_for.store(AWAY_BLOCKS, Relaxed);
        } else if left > 0 {
            self.blocks_for.store(left - 1, Relaxed);
        }
        Ok(found.number())
    }

    /// Gives a frame back.
    ///
    /// # Errors
    /// Those of [`Frames::free_block`]; [`FramesError::OtherCache`]; nothing has changed then.
    #[inline]
    pub fn free(&mut self, frames: &Frames, frame: FrameNumber) -> Result<(), FramesError> {
        self.free_alone(frames, frame, Users::One)
    }

    /// Gives a block of any order back; it may keep a huge frame.
    ///
    /// # Errors
    /// As [`Frames::free_block`]; nothing has changed then.
    pub fn free_block(&mut self, frames: &Frames, frame: FrameNumber, order: Order) -> Result<(), FramesError> {
        let kept = if order == Order::HUGE { self.free_huge_alone(frames, frame) } else { None };
        kept.unwrap_or_else(|| frames.free_block(frame, order))
    }

    /// Gives everything it holds back to the node it came from.
    ///
    /// # Panics
    /// When `frames` is another node.
    pub fn drain(&mut self, frames: &Frames) {
        self.drain_alone(frames);
    }

    /// How many frames it had taken back that another cache took back at the same moment: double frees that were not refused.
    /// They came to light, and it let go of them, when it would have given them away.
    pub fn freed_twice(&self) -> u32 {
        self.lost.load(Relaxed)
    }

    /// Frames it holds.
    pub fn len(&self) -> FrameCount {
        let huge = u64::from(self.huge_len.load(Relaxed)) << Order::HUGE.get();
        FrameCount(huge + u64::from(self.len.load(Relaxed)) + u64::from(self.row_bits.load(Relaxed).count_ones()))
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == FrameCount(0)
    }

    /// Whether it may hold frames of the node; and if so, whether some of these may be poisoned.
    pub(super) fn is_of(&self, frames: &Frames) -> Result<Poison, FramesError> {
        // Relaxed: what was poisoned before this operation began is known to who began it.
        if self.node.load(Relaxed) == frames.stamp.load(Relaxed) {
            Ok(Poison::None)
        } else {
            self.look_again(frames)
        }
    }

    #[cold]
    fn look_again(&self, frames: &Frames) -> Result<Poison, FramesError> {
        // Acquire pairs with the Release in `Frames::poison`: the marks are seen.
        let stamp = frames.stamp.load(Acquire);
        let node = stamp & !HAS_POISON;
        if self.node.load(Relaxed) != node | HAS_CACHES | KNOWS_CACHES {
            if !self.is_empty() {
                return Err(FramesError::OtherCache);
            }
            frames.announce_caches();
            if self.name.load(Relaxed) == 0 {
                let name = NEXT_NAME.fetch_add(1, Relaxed).max(1);
                self.name.store(name, Relaxed);
                self.tag.store(Tag::of(name).number(), Relaxed);
            }
            self.node.store(node | HAS_CACHES | KNOWS_CACHES, Relaxed);
        }
        Ok(if stamp & HAS_POISON == 0 { Poison::None } else { Poison::Some })
    }

    /// By whoever has it for himself, as all that follows.
    #[inline(always)]
    pub(super) fn alloc_alone(&self, frames: &Frames) -> Result<FrameNumber, FramesError> {
        match self.alloc_held(frames, |frame| frames.state_of_only(frame)) {
            Some(frame) => Ok(frame),
            None => self.alloc_slowly(frames),
        }
    }

    /// The common case: no frame is poisoned, and one was freed into the cache. `state` finds its state; the bounds of lists tell
    /// all else.
    #[inline(always)]
    fn alloc_held<'a>(
        &self,
        frames: &Frames,
        state: impl Fn(FrameNumber) -> Option<&'a AtomicU8>,
    ) -> Option<FrameNumber> {
        let rest = self.len.load(Relaxed).wrapping_sub(1);
        if self.node.load(Relaxed) == frames.stamp.load(Relaxed)
            && let Some(held) = self.held.get(rest as usize)
            && let frame = FrameNumber(held.load(Relaxed))
            && let Some(state) = state(frame)
            && take_out(state, self.tag(), Some(Order::ZERO))
        {
            self.len.store(rest, Relaxed);
            return Some(frame);
        }
        None
    }

    #[inline(never)]
    fn alloc_slowly(&self, frames: &Frames) -> Result<FrameNumber, FramesError> {
        if let Some(frame) = self.alloc_held(frames, |frame| frames.state_among_many(frame)) {
            return Ok(frame);
        }
        let poison = self.is_of(frames)?;
        loop {
            let (frame, freed) = self.pop(frames)?;
            let retired = if poison == Poison::Some { frames.retire_cached(frame, freed) } else { Retired::Sound };
            match retired {
                Retired::Now => {}
                Retired::Sound if frames.give_out_single(frame, freed) => return Ok(frame),
                Retired::Sound | Retired::Before | Retired::NotMine => self.lose(1),
            }
        }
    }

    fn lose(&self, count: usize) {
        if count > 0 {
            self.lost.store(self.lost.load(Relaxed).saturating_add(count as u32), Relaxed);
        }
    }

    fn tag(&self) -> Tag {
        Tag::from_number(self.tag.load(Relaxed))
    }

    /// A frame, and its tag if it was freed into the cache.
    fn pop(&self, frames: &Frames) -> Result<(FrameNumber, Option<Tag>), FramesError> {
        let len = self.len.load(Relaxed);
        if len > 0 {
            self.len.store(len - 1, Relaxed);
            return Ok((FrameNumber(self.held[len as usize - 1].load(Relaxed)), Some(self.tag())));
        }
        let mut bits = self.row_bits.load(Relaxed);
        if bits == 0 {
            let filled = match self.fill(frames) {
                Err(FramesError::Exhausted { .. }) if self.give_back_huge(frames) => self.fill(frames),
                result => result,
            };
            let (first, taken) = filled?;
            self.row_first.store(first.0, Relaxed);
            bits = taken;
        }
        self.row_bits.store(bits & (bits - 1), Relaxed);
        Ok((FrameNumber(self.row_first.load(Relaxed) + bits.trailing_zeros()), None))
    }

    /// A row's free frames: of the lowest zone, but of another one for a while when another cache is filled from that. Two that are
    /// filled and emptied at the same time then write to different zones.
    fn fill(&self, frames: &Frames) -> Result<(FrameNumber, u64), FramesError> {
        let name = self.name.load(Relaxed);
        let left = self.away_for.load(Relaxed);
        let away = if left > 0 { frames.find(FrameNumber(self.away_at.load(Relaxed))).ok() } else { None };
        let row = away.and_then(|from| frames.take_row_from(from, name));
        let left = if row.is_some() { left - 1 } else { 0 };
        let row = row.or_else(|| frames.take_row_from(Place::LOWEST, name));
        let row = row.ok_or_else(|| frames.exhausted(Order::ZERO))?;
        self.away_for.store(left, Relaxed);
        let zone = row.zone.0;
        if self.filled_at.swap(zone, Relaxed) != zone {
            self.is_guest.store(row.is_others, Relaxed);
        } else if row.is_others && self.is_guest.load(Relaxed) {
            // Whoever was there is still: who came last goes on.
            self.away_at.store(zone.saturating_add(ZONE_FRAMES as u32), Relaxed);
            self.away_for.store(AWAY, Relaxed);
        }
        if row.was_busy {
            self.away_at.store(zone, Relaxed);
            self.away_for.store(AWAY, Relaxed);
        }
        Ok((row.first, row.bits))
    }

    #[inline(always)]
    pub(super) fn free_alone(&self, frames: &Frames, frame: FrameNumber, users: Users) -> Result<(), FramesError> {
        match self.hold(frames, frame, users, |frame| frames.state_of_only(frame)) {
            Some(()) => Ok(()),
            None => self.free_slowly(frames, frame, users),
        }
    }

    /// The common case: no frame is poisoned, and there is room.
    #[inline(always)]
    fn hold<'a>(
        &self,
        frames: &Frames,
        frame: FrameNumber,
        users: Users,
        state: impl Fn(FrameNumber) -> Option<&'a AtomicU8>,
    ) -> Option<()> {
        let len = self.len.load(Relaxed);
        if self.node.load(Relaxed) == frames.stamp.load(Relaxed)
            && let Some(held) = self.held.get(len as usize)
            && let Some(state) = state(frame)
            && take_in(state, self.tag(), users)
        {
            held.store(frame.0, Relaxed);
            self.len.store(len + 1, Relaxed);
            return Some(());
        }
        None
    }

    #[inline(never)]
    fn free_slowly(&self, frames: &Frames, frame: FrameNumber, users: Users) -> Result<(), FramesError> {
        if self.hold(frames, frame, users, |frame| frames.state_among_many(frame)).is_some() {
            return Ok(());
        }
        let poison = self.is_of(frames)?;
        let tag = self.tag();
        frames.take_in_single(frame, tag, users)?;
        let retired = if poison == Poison::Some { frames.retire_cached(frame, Some(tag)) } else { Retired::Sound };
        match retired {
            Retired::Sound => {}
            Retired::Now => return Ok(()),
            Retired::Before => return Err(FramesError::Poisoned { frame }),
            Retired::NotMine => return Err(FramesError::NotAllocated { frame }),
        }
        let mut len = self.len.load(Relaxed) as usize;
        if len == HELD {
            self.give_back(frames, GIVEN_BACK);
            len -= GIVEN_BACK;
        }
        self.held[len].store(frame.0, Relaxed);
        self.len.store(len as u32 + 1, Relaxed);
        Ok(())
    }

    /// A huge frame that it holds.
    pub(super) fn alloc_huge_alone(&self, frames: &Frames) -> Option<FrameNumber> {
        let len = self.huge_len.load(Relaxed);
        // One that was poisoned meanwhile goes through its zone, which takes the bad frames out.
        if len == 0 || self.is_of(frames).ok()? == Poison::Some {
            self.give_back_huge(frames);
            return None;
        }
        self.huge_len.store(len - 1, Relaxed);
        let frame = FrameNumber(self.huge[len as usize - 1].load(Relaxed));
        frames.give_out_huge(frame);
        Some(frame)
    }

    /// Keeps a huge frame; `None`: it is one for the node to take.
    pub(super) fn free_huge_alone(&self, frames: &Frames, frame: FrameNumber) -> Option<Result<(), FramesError>> {
        if self.is_of(frames).ok()? == Poison::Some {
            return None;
        }
        if let Err(cause) = frames.take_in_huge(frame) {
            return Some(Err(cause));
        }
        let mut len = self.huge_len.load(Relaxed) as usize;
        if len == HUGE_HELD {
            self.give_back_huge(frames);
            len = 0;
        }
        self.huge[len].store(frame.0, Relaxed);
        self.huge_len.store(len as u32 + 1, Relaxed);
        Some(Ok(()))
    }

    /// Gives the huge frames back that it holds of the node; whether there were any.
    fn give_back_huge(&self, frames: &Frames) -> bool {
        let len = self.huge_len.load(Relaxed) as usize;
        if len == 0 || self.is_of(frames).is_err() {
            return false;
        }
        self.huge_len.store(0, Relaxed);
        self.huge[..len].iter().for_each(|huge| frames.put_huge(FrameNumber(huge.load(Relaxed))));
        true
    }

    pub(super) fn drain_alone(&self, frames: &Frames) {
        if self.is_empty() {
            return;
        }
        assert!(self.is_of(frames).is_ok(), "a cache is drained into the node it was filled from");
        self.give_back_huge(frames);
        while let len @ 1.. = self.len.load(Relaxed) as usize {
            self.give_back(frames, len.min(GIVEN_BACK));
        }
        let (first, bits) = (self.row_first.load(Relaxed), self.row_bits.swap(0, Relaxed));
        let mut rest = [FrameNumber(0); 64];
        let mut count = 0;
        super::each_bit(bits, |bit| {
            let frame = FrameNumber(first + bit as u32);
            rest[count] = frame;
            // All of them are the node's, but after a double free.
            count += usize::from(frames.find(frame).is_ok());
        });
        frames.put_cached(&mut rest[..count]);
    }

    /// The oldest of what was freed, at most [`GIVEN_BACK`].
    fn give_back(&self, frames: &Frames, count: usize) {
        let mut oldest = [FrameNumber(0); GIVEN_BACK];
        let len = self.len.load(Relaxed) as usize;
        let (given, kept) = self.held[..len].split_at(count);
        let mine = frames.take_out_each(given, self.tag(), &mut oldest);
        self.lose(count - mine);
        for (to, from) in self.held.iter().zip(kept) {
            to.store(from.load(Relaxed), Relaxed);
        }
        self.len.store(kept.len() as u32, Relaxed);
        frames.put_cached(&mut oldest[..mine]);
    }
}

/// Whether a node has poisoned frames, so that a cache must look at the marks of those that pass through it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Poison {
    None,
    Some,
}
