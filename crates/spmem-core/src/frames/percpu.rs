//! Caches for everybody: one a processor, each behind a flag that nobody waits for on the way.
//!
//! An interface for components with several threads: who uses it, and why the memory manager does not, [`frames`](super) says.

use alloc::vec::Vec;

use super::cache::Cache;
use super::states::Users;
use super::{Frames, FramesError};
use crate::sync::AtomicBool;
use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::units::{FrameCount, FrameNumber, Order};

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
        if self.is_taken.compare_exchange(false, true, Acquire, Relaxed).is_err() {
            return None;
        }
        let _taken = Taken(&self.is_taken);
        Some(work(&self.cache))
    }

    fn with<T>(&self, relax: fn(), mut work: impl FnMut(&Cache) -> T) -> T {
        loop {
            if let Some(result) = self.try_with(&mut work) {
                return result;
            }
            // Only looked at until it seems free, so that its holder keeps the cache line.
            while self.is_taken.load(Relaxed) {
                relax();
            }
        }
    }
}

/// A slot that somebody works on, also where that ends in a panic.
struct Taken<'a>(&'a AtomicBool);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.store(false, Release);
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

    /// Takes a block: a single or a huge frame from the processor's cache, others from a zone that nobody else works on. Before it fails, everything that
    /// is cached is given back and the node is asked again.
    ///
    /// # Errors
    /// As [`Frames::alloc`]; [`FramesError::OtherCache`].
    pub fn alloc(&self, frames: &Frames, processor: usize, order: Order) -> Result<FrameNumber, FramesError> {
        let slot = &self.slots[processor % self.slots.len()];
        let taken = if order == Order::ZERO {
            slot.try_with(|cache| cache.alloc_alone(frames)).unwrap_or_else(|| frames.alloc(order))
        } else {
            let is_huge = order == Order::HUGE;
            let held = if is_huge { slot.try_with(|cache| cache.alloc_huge_alone(frames)) } else { None };
            held.flatten().map_or_else(|| slot.cache.alloc_block_shared(frames, order), Ok)
        };
        match taken {
            Err(FramesError::Exhausted { .. }) => {
                let is_mixed = self.drain_own(frames);
                frames.alloc(order).map_err(|cause| if is_mixed { FramesError::OtherCache } else { cause })
            }
            result => result,
        }
    }

    /// Gives a block back, a single or a huge frame to the processor's cache.
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
        let slot = &self.slots[processor % self.slots.len()];
        let cached = match order {
            Order::ZERO => slot.try_with(|cache| cache.free_alone(frames, frame, Users::Many)),
            Order::HUGE => slot.try_with(|cache| cache.free_huge_alone(frames, frame)).flatten(),
            _ => None,
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

    /// Gives back what is cached of the node; whether something is of another one.
    fn drain_own(&self, frames: &Frames) -> bool {
        let drain = |cache: &Cache| {
            let is_other = cache.is_of(frames).is_err();
            if !is_other {
                cache.drain_alone(frames);
            }
            is_other
        };
        self.slots.iter().fold(false, |is_mixed, slot| slot.with(frames.relax, drain) | is_mixed)
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
