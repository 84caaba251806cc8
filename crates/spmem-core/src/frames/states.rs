//! States: what of a range has been given out, a byte a frame.
//!
//! Whoever holds a frame may write its state without a lock: so a cache gives a frame out and takes it back, and refuses a
//! double free, a foreign frame and a wrong order, without asking a zone. What nobody holds is written under the lock of its
//! zone. Who takes a block back is settled by one exchange of its state ([`States::clear`]); a node that no cache was ever
//! used with has the lock of the zone for that, and saves it.

use super::range::Range;
use super::{Frames, FramesError};
use crate::sync::AtomicU8;
use crate::sync::Ordering::Relaxed;
use crate::units::{FrameNumber, Order};

/// The frame is poisoned and out of use.
const RETIRED: u8 = u8::MAX;

/// What has been given out: 0 nothing, or not the first frame of it; else the order and one, or [`RETIRED`].
pub(super) struct States<'a>(pub(super) &'a [AtomicU8]);

impl States<'_> {
    /// Whether a block of `order` begins there.
    pub(super) fn is(&self, frame: usize, order: Order) -> bool {
        self.0.get(frame).is_some_and(|state| state.load(Relaxed) == order.get() + 1)
    }

    pub(super) fn get(&self, frame: usize) -> Option<Order> {
        let state = self.0.get(frame)?.load(Relaxed);
        Order::new(state.checked_sub(1)?).ok()
    }

    pub(super) fn set(&self, frame: usize, order: Option<Order>) {
        if let Some(state) = self.0.get(frame) {
            state.store(order.map_or(0, |order| order.get() + 1), Relaxed);
        }
    }

    /// Takes the block of `order` that begins there back, if there is one. Of several that do it at once one succeeds.
    pub(super) fn clear(&self, frame: usize, order: Order) -> bool {
        // Relaxed: that one of them succeeds holds of a single byte; what else is written is ordered by the zone's lock.
        let clear = |state: &AtomicU8| state.compare_exchange(order.get() + 1, 0, Relaxed, Relaxed);
        self.0.get(frame).is_some_and(|state| clear(state).is_ok())
    }

    /// The block in use that the frame lies in: its first frame and order.
    pub(super) fn holder(&self, frame: usize) -> Option<(usize, Order)> {
        (0..Order::COUNT).find_map(|bits| {
            let first = frame >> bits << bits;
            let order = self.get(first)?;
            (frame - first < 1 << order.get()).then_some((first, order))
        })
    }

    pub(super) fn is_retired(&self, frame: usize) -> bool {
        self.0.get(frame).is_some_and(|state| state.load(Relaxed) == RETIRED)
    }

    /// Nobody has the frame, and nobody will.
    pub(super) fn set_retired(&self, frame: usize) {
        if let Some(state) = self.0.get(frame) {
            state.store(RETIRED, Relaxed);
        }
    }
}

impl Frames {
    /// A block that is in use loses its owner. With its zone locked.
    pub(super) fn take_back(&self, range: &Range, offset: usize, order: Order) -> Result<(), FramesError> {
        let states = range.states();
        let is_done = if self.has_caches() {
            states.clear(offset, order)
        } else {
            let is_there = states.is(offset, order);
            if is_there {
                states.set(offset, None);
            }
            is_there
        };
        if is_done { Ok(()) } else { refuse(range, offset, order) }
    }
}

/// Whether a block of `order` begins there.
pub(super) fn check(range: &Range, offset: usize, order: Order) -> Result<(), FramesError> {
    if range.states().is(offset, order) { Ok(()) } else { refuse(range, offset, order) }
}

/// Why no block of `order` that begins there was taken back.
#[cold]
pub(super) fn refuse(range: &Range, offset: usize, order: Order) -> Result<(), FramesError> {
    let (states, frame) = (range.states(), range.number(offset));
    Err(match states.get(offset) {
        Some(allocated) if allocated != order => FramesError::WrongOrder { frame, order, allocated },
        // Somebody else took it back, and it has been given out again since.
        Some(_) => FramesError::NotAllocated { frame },
        None => not_allocated(&states, offset, frame),
    })
}

/// Why no block that begins there can be taken back.
pub(super) fn not_allocated(states: &States<'_>, offset: usize, frame: FrameNumber) -> FramesError {
    if states.is_retired(offset) {
        FramesError::Poisoned { frame }
    } else if states.holder(offset).is_some() {
        FramesError::NotFirst { frame }
    } else {
        FramesError::NotAllocated { frame }
    }
}
