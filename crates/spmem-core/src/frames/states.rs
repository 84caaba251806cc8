//! States: what of a range has been given out, a byte a frame.
//!
//! Whoever holds a frame may write its state without a lock: so a cache gives a frame out and takes it back, and refuses a
//! double free, a foreign frame and a wrong order, without asking a zone. What nobody holds is written under the lock of its
//! zone.
//!
//! Who takes a larger block back, or one without a cache, is settled by one exchange of its state ([`States::clear`]); a
//! node that no cache was ever used with has the lock of the zone for that, and saves it. A cache that takes a single frame
//! puts its [`Tag`] there: a slot of a processor by an exchange, too; an owner's cache looks and then stores, which costs no
//! locked instruction. Two that do so at the same moment both think that they
//! have it; the tag that was stored last stays, and the other cache finds it when it would give the frame away, to an owner
//! or to the zone, and drops it. If a zone took it back at that moment, whoever takes frames from the zone finds that one of them
//! has an owner, and leaves it to him ([`Frames::give_out_block`]). What that does not find is in ADR 11, "Double frees".

use super::range::Range;
use super::{Frames, FramesError};
use crate::sync::AtomicU8;
use crate::sync::Ordering::Relaxed;
use crate::units::{FrameNumber, Order};

/// A single frame is in use.
const SINGLE: u8 = 1;
/// The frame is poisoned and out of use.
const RETIRED: u8 = u8::MAX;

/// The lowest tag: behind the orders.
const FIRST_TAG: u8 = Order::COUNT as u8 + 1;

/// The state of single frames that a cache took back. As many caches as there are tags have different ones.
#[derive(Clone, Copy)]
pub(super) struct Tag(u8);

impl Tag {
    /// That of the cache of this name.
    pub(super) const fn of(name: u32) -> Self {
        Self(FIRST_TAG + (name % (RETIRED - FIRST_TAG) as u32) as u8)
    }
}

impl Tag {
    /// As a number, to keep it in an atomic.
    pub(super) const fn number(self) -> u8 {
        self.0
    }

    /// What [`Tag::number`] gave.
    pub(super) const fn from_number(number: u8) -> Self {
        Self(number)
    }
}

/// Who uses a cache.
#[derive(Clone, Copy)]
pub(super) enum Users {
    /// Its owner.
    One,
    /// Everybody on a processor, who pays for a locked instruction in any case.
    Many,
}

/// What has been given out: 0 nothing, or not the first frame of it; else the order and one, a [`Tag`], or [`RETIRED`].
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
            set(state, order);
        }
    }

    /// Takes the block of `order` that begins there back, if there is one. Of several that do it at once one succeeds.
    pub(super) fn clear(&self, frame: usize, order: Order) -> bool {
        self.0.get(frame).is_some_and(|state| clear(state, order))
    }

    /// Whether it is still that cache's.
    #[inline]
    pub(super) fn has(&self, frame: usize, tag: Tag) -> bool {
        self.0.get(frame).is_some_and(|state| state.load(Relaxed) == tag.0)
    }

    /// A frame that was free gets an owner; not if a cache has given it one.
    #[inline]
    pub(super) fn give_out(&self, frame: usize) -> bool {
        self.0.get(frame).is_some_and(give_out)
    }

    /// A block that was free gets an owner, who has all its frames: a cache that took one of them back, too, lets go of it.
    pub(super) fn give_out_block(&self, frame: usize, order: Order) {
        let states = self.0.get(frame..).unwrap_or_default();
        for state in states.iter().take(1 << order.get()).filter(|state| state.load(Relaxed) != 0) {
            state.store(0, Relaxed);
        }
        self.set(frame, Some(order));
    }

    /// Whether one of so many frames, of which its zone says that they are free, is a single one in use.
    pub(super) fn has_owned(&self, frame: usize, count: usize) -> bool {
        let states = self.0.get(frame..).unwrap_or_default();
        states.iter().take(count).any(|state| state.load(Relaxed) == SINGLE)
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

/// Says of one state who has the block.
#[inline(always)]
pub(super) fn set(state: &AtomicU8, order: Option<Order>) {
    state.store(number(order), Relaxed);
}

/// [`States::clear`] of one state.
#[inline(always)]
pub(super) fn clear(state: &AtomicU8, order: Order) -> bool {
    // Relaxed: that one of them succeeds holds of a single byte; what else is written is ordered by the zone's lock.
    state.compare_exchange(order.get() + 1, 0, Relaxed, Relaxed).is_ok()
}

/// [`States::give_out`] of one state.
#[inline(always)]
pub(super) fn give_out(state: &AtomicU8) -> bool {
    let is_free = state.load(Relaxed) != SINGLE;
    if is_free {
        state.store(SINGLE, Relaxed);
    }
    is_free
}

/// A cache takes a single frame back, if it is in use.
#[inline(always)]
pub(super) fn take_in(state: &AtomicU8, tag: Tag, users: Users) -> bool {
    match users {
        Users::One => {
            let is_there = state.load(Relaxed) == SINGLE;
            if is_there {
                state.store(tag.0, Relaxed);
            }
            is_there
        }
        // Relaxed, as in `clear`.
        Users::Many => state.compare_exchange(SINGLE, tag.0, Relaxed, Relaxed).is_ok(),
    }
}

/// A frame that a cache took back becomes a free one, or that of an owner; not if another one has taken it back, too.
#[inline(always)]
pub(super) fn take_out(state: &AtomicU8, tag: Tag, order: Option<Order>) -> bool {
    let is_mine = state.load(Relaxed) == tag.0;
    if is_mine {
        set(state, order);
    }
    is_mine
}

/// The state of a block in use, or of a frame that nobody has.
const fn number(order: Option<Order>) -> u8 {
    match order {
        Some(order) => order.get() + 1,
        None => 0,
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
