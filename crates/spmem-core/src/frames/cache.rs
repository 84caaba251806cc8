//! Caches in front of the zones, for single frames.
//!
//! A cache holds a part of one row, taken from the lowest place, and what was freed last, used first. Its fields are
//! atomic so that a slot can be shared under a lock; whoever has a cache for himself reads and writes them plainly.

use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use super::zone::{ZONE_FRAMES, Zone};
use super::{Frames, FramesError, check};
use crate::units::{FrameCount, FrameNumber, Order};

/// Freed frames held, at most.
const HELD: usize = 64;
/// How many of them, the oldest, are given back when it is full.
const GIVEN_BACK: usize = HELD / 2;

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
    /// The node's; 0 while it is empty.
    node: AtomicU64,
    row_first: AtomicU32,
    row_bits: AtomicU64,
    len: AtomicU32,
    held: [AtomicU32; HELD],
}

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
        }
    }

    /// Takes a frame.
    ///
    /// # Errors
    /// [`FramesError::Exhausted`]; [`FramesError::OtherCache`].
    pub fn alloc(&mut self, frames: &Frames) -> Result<FrameNumber, FramesError> {
        self.alloc_alone(frames)
    }

    /// Gives a frame back.
    ///
    /// # Errors
    /// Those of [`Frames::free_block`]; [`FramesError::OtherCache`]; nothing has changed then.
    pub fn free(&mut self, frames: &Frames, frame: FrameNumber) -> Result<(), FramesError> {
        self.free_alone(frames, frame)
    }

    /// Gives everything it holds back to the node it came from.
    ///
    /// # Panics
    /// When `frames` is another node, or a frame it holds is not in use there: it was freed twice at once.
    pub fn drain(&mut self, frames: &Frames) {
        self.drain_alone(frames);
    }

    /// Frames it holds.
    pub fn len(&self) -> FrameCount {
        let held = u64::from(self.len.load(Relaxed));
        FrameCount(held + u64::from(self.row_bits.load(Relaxed).count_ones()))
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == FrameCount(0)
    }

    fn is_of(&self, frames: &Frames) -> Result<(), FramesError> {
        let node = self.node.load(Relaxed);
        if node == frames.id() {
            return Ok(());
        }
        if !self.is_empty() {
            return Err(FramesError::OtherCache);
        }
        self.node.store(frames.id(), Relaxed);
        Ok(())
    }

    /// By whoever has it for himself, as all that follows.
    fn alloc_alone(&self, frames: &Frames) -> Result<FrameNumber, FramesError> {
        self.is_of(frames)?;
        let len = self.len.load(Relaxed);
        let frame = if len > 0 {
            self.len.store(len - 1, Relaxed);
            FrameNumber(self.held[len as usize - 1].load(Relaxed))
        } else {
            let mut bits = self.row_bits.load(Relaxed);
            if bits == 0 {
                let (first, taken) = frames.take_row()?;
                self.row_first.store(first.0, Relaxed);
                bits = taken;
            }
            self.row_bits.store(bits & (bits - 1), Relaxed);
            FrameNumber(self.row_first.load(Relaxed) + bits.trailing_zeros())
        };
        frames.give_out(frame);
        Ok(frame)
    }

    fn free_alone(&self, frames: &Frames, frame: FrameNumber) -> Result<(), FramesError> {
        self.is_of(frames)?;
        frames.take_in(frame)?;
        let mut len = self.len.load(Relaxed) as usize;
        if len == HELD {
            self.give_back(frames, GIVEN_BACK);
            len -= GIVEN_BACK;
        }
        self.held[len].store(frame.0, Relaxed);
        self.len.store(len as u32 + 1, Relaxed);
        Ok(())
    }

    fn drain_alone(&self, frames: &Frames) {
        if self.is_empty() {
            return;
        }
        assert!(self.is_of(frames).is_ok(), "a cache is drained into the node it was filled from");
        self.give_back(frames, self.len.load(Relaxed) as usize);
        let (first, bits) = (self.row_first.load(Relaxed), self.row_bits.swap(0, Relaxed));
        let mut rest = [FrameNumber(0); 64];
        let mut count = 0;
        super::each_bit(bits, |bit| {
            rest[count] = FrameNumber(first + bit as u32);
            count += 1;
        });
        frames.put_cached(&mut rest[..count]);
    }

    /// The oldest of what was freed.
    fn give_back(&self, frames: &Frames, count: usize) {
        let mut oldest = [FrameNumber(0); HELD];
        for (to, from) in oldest.iter_mut().zip(&self.held[..count]) {
            *to = FrameNumber(from.load(Relaxed));
        }
        let len = self.len.load(Relaxed) as usize;
        for at in count..len {
            self.held[at - count].store(self.held[at].load(Relaxed), Relaxed);
        }
        self.len.store((len - count) as u32, Relaxed);
        frames.put_cached(&mut oldest[..count]);
    }
}

/// A cache for everybody who is on one processor, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Slot {
    is_taken: AtomicBool,
    cache: Cache,
}

impl Slot {
    /// Does `work` with the cache, unless somebody else is at it.
    fn try_with<T>(&self, work: impl FnOnce(&Cache) -> T) -> Option<T> {
        // Acquire pairs with the Release below: what the one before wrote is seen.
        if self.is_taken.swap(true, Acquire) {
            return None;
        }
        let result = work(&self.cache);
        self.is_taken.store(false, Release);
        Some(result)
    }

    fn with<T>(&self, relax: fn(), mut work: impl FnMut(&Cache) -> T) -> T {
        loop {
            if let Some(result) = self.try_with(&mut work) {
                return result;
            }
            relax();
        }
    }
}

/// Caches in front of one node, one a processor. The processor is a hint: a wrong one costs time only.
///
/// ```
/// use spmem_core::frames::{Frames, Metadata, PerCpu};
/// use spmem_core::units::{FrameCount, Order};
/// let mut frames = Frames::new();
/// frames.add_range(FrameCount(1024), Metadata::from_heap(FrameCount(1024)).unwrap()).unwrap();
/// let caches = PerCpu::new(2).unwrap();
/// let frame = caches.alloc(&frames, 0, Order::ZERO).unwrap();
/// caches.free_block(&frames, 1, frame, Order::ZERO).unwrap();
/// assert!(caches.alloc(&frames, 0, Order::MAX).is_ok()); // what is cached does not stand in the way
/// ```
#[derive(Debug)]
pub struct PerCpu {
    slots: Vec<Slot>,
}

impl PerCpu {
    /// Empty caches for so many processors, at least one.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`].
    pub fn new(processors: usize) -> Result<Self, FramesError> {
        let mut slots = Vec::new();
        slots.try_reserve_exact(processors.max(1)).map_err(|_| FramesError::NoMetadata)?;
        slots.resize_with(processors.max(1), Slot::default);
        Ok(Self { slots })
    }

    /// Takes a block: a single frame from the processor's cache, others from the node. Before it fails, everything that
    /// is cached is given back and the node is asked again.
    ///
    /// # Errors
    /// As [`Frames::alloc`]; [`FramesError::OtherCache`].
    pub fn alloc(&self, frames: &Frames, processor: usize, order: Order) -> Result<FrameNumber, FramesError> {
        let cached = if order == Order::ZERO {
            self.slots[processor % self.slots.len()].try_with(|cache| cache.alloc_alone(frames))
        } else {
            None
        };
        match cached.unwrap_or_else(|| frames.alloc(order)) {
            Err(FramesError::Exhausted { .. }) => {
                self.drain(frames);
                frames.alloc(order)
            }
            result => result,
        }
    }

    /// Gives a block back, a single frame to the processor's cache.
    ///
    /// # Errors
    /// As [`Frames::free_block`]; [`FramesError::OtherCache`].
    pub fn free_block(
        &self,
        frames: &Frames,
        processor: usize,
        frame: FrameNumber,
        order: Order,
    ) -> Result<(), FramesError> {
        let cached = if order == Order::ZERO {
            self.slots[processor % self.slots.len()].try_with(|cache| cache.free_alone(frames, frame))
        } else {
            None
        };
        cached.unwrap_or_else(|| frames.free_block(frame, order))
    }

    /// Gives everything that is cached back.
    ///
    /// # Panics
    /// As [`Cache::drain`].
    pub fn drain(&self, frames: &Frames) {
        for slot in &self.slots {
            slot.with(frames.relax, |cache| cache.drain_alone(frames));
        }
    }

    /// Frames that are cached, a moment ago.
    pub fn len(&self) -> FrameCount {
        FrameCount(self.slots.iter().map(|slot| slot.cache.len().0).sum())
    }

    /// Whether nothing was cached a moment ago.
    pub fn is_empty(&self) -> bool {
        self.len() == FrameCount(0)
    }
}

/// What caches ask of a node.
impl Frames {
    /// A row's free frames, the lowest there are: its first frame, and they as bits. They count as used, given to nobody.
    fn take_row(&self) -> Result<(FrameNumber, u64), FramesError> {
        let mut bits = 0;
        let taken = self.search(Order::ZERO, |zone| {
            let (first, taken) = zone.take_row(64)?;
            bits = taken;
            Some(first)
        });
        let (range, first) = taken.ok_or_else(|| self.exhausted(Order::ZERO))?;
        Ok((range.number(first), bits))
    }

    /// A cached frame gets an owner.
    fn give_out(&self, frame: FrameNumber) {
        let place = self.find(frame).expect("a cached frame is the node's");
        self.ranges[place.range].states().set(place.offset, Some(Order::ZERO));
    }

    /// A frame that is in use becomes a cached one.
    fn take_in(&self, frame: FrameNumber) -> Result<(), FramesError> {
        let place = self.find(frame)?;
        let range = &self.ranges[place.range];
        check(range, place.offset, frame, Order::ZERO)?;
        range.states().set(place.offset, None);
        Ok(())
    }

    /// Cached frames become free: one lock a zone, those that nobody works on first. Changes the order of `cached`.
    fn put_cached(&self, cached: &mut [FrameNumber]) {
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
            let mut others = 0;
            for at in 0..left.len() {
                let frame = left[at];
                if let Some(offset) = range.offset_in_zone(frame, place.zone()) {
                    let in_zone = offset % ZONE_FRAMES;
                    assert!(zone.is_used(in_zone), "frame {frame} was freed twice at once");
                    zone.put(in_zone, 0);
                } else {
                    left[others] = frame;
                    others += 1;
                }
            }
            self.settle(range, place.zone(), &zone);
            left = &mut left[..others];
            first = 0;
        }
    }
}
