//! Zero state: which frames of a node may hold what somebody wrote (R21).
//!
//! Kept apart from which frames are free: [`Contents`] is a bit a frame, made for a GiB at a time when its first frame is
//! given out, so it takes nothing for memory that is never used. A frame that is given out counts as written from then on;
//! only who has zeroed it, or proven it zero, says otherwise ([`MemoryManager::free_zeroed`]). So no domain gets another's
//! bytes unnoticed: [`Block::is_zeroed`] says whether a block must be zeroed before it is handed on.
//! Takes no lock: part of the registry.
//!
//! [`MemoryManager::free_zeroed`]: crate::mm::MemoryManager::free_zeroed
//! [`Block::is_zeroed`]: crate::mm::Block::is_zeroed

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::frames::{FrameRange, FramesError};
use crate::units::{FrameNumber, Order};

/// Frames that a piece of the bits is for: 1 GiB, or what is left of the range.
const PIECE_FRAMES: usize = 1 << 18;

/// What the frames of a range hold when it is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initial {
    /// Zeros: memory fresh from the kernel.
    Zero,
    /// Anything: a device's memory.
    Unknown,
}

/// The bits of one range.
#[derive(Debug)]
struct Bits {
    span: FrameRange,
    initial: Initial,
    /// Set: not as it was initially. A piece that is missing is all clear.
    changed: Vec<Option<Box<[u64]>>>,
}

/// What the frames of a node hold.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Lowest first.
    ranges: Vec<Bits>,
}

impl Contents {
    /// Makes room for one more range.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]
    pub(crate) fn reserve_range(&mut self) -> Result<(), FramesError> {
        self.ranges.try_reserve(1).map_err(|_| FramesError::NoMetadata)
    }

    /// A range that room was made for.
    pub(crate) fn add_range(&mut self, span: FrameRange, initial: Initial) {
        let at = self.ranges.partition_point(|bits| bits.span.first < span.first);
        self.ranges.insert(at, Bits { span, initial, changed: Vec::new() });
    }

    pub(crate) fn remove_range(&mut self, span: FrameRange) {
        self.ranges.retain(|bits| bits.span != span);
    }

    fn bits_of(&mut self, frame: FrameNumber) -> &mut Bits {
        let behind = self.ranges.partition_point(|bits| bits.span.first <= frame);
        let found = behind.checked_sub(1).map(|at| &mut self.ranges[at]);
        found.filter(|bits| bits.span.contains(frame)).expect("a block lies in a range of its node")
    }

    /// Makes the bits that a block needs to be given out.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]
    pub(crate) fn prepare(&mut self, first: FrameNumber) -> Result<(), FramesError> {
        self.prepare_as(first, Initial::Zero)
    }

    fn prepare_as(&mut self, first: FrameNumber, making: Initial) -> Result<(), FramesError> {
        let bits = self.bits_of(first);
        let piece = (first.0 - bits.span.first.0) as usize / PIECE_FRAMES;
        if let Some(missing @ 1..) = (piece + 1).checked_sub(bits.changed.len()) {
            bits.changed.try_reserve(missing).map_err(|_| FramesError::NoMetadata)?;
            bits.changed.resize_with(piece + 1, || None);
        }
        if bits.changed[piece].is_none() && bits.initial == making {
            let count = usize::try_from(bits.span.count.0).unwrap_or(usize::MAX);
            let left = count.saturating_sub(piece * PIECE_FRAMES).min(PIECE_FRAMES);
            bits.changed[piece] = Some(zeros(left.div_ceil(64))?);
        }
        Ok(())
    }

    /// Bytes of bits.
    pub(crate) fn bytes(&self) -> usize {
        let pieces = self.ranges.iter().flat_map(|bits| bits.changed.iter().flatten());
        pieces.map(|piece| size_of_val(&**piece)).sum()
    }

    /// A block is given out, prepared for before: whether it is known to be zero. From now on it is not.
    pub(crate) fn give_out(&mut self, first: FrameNumber, order: Order) -> bool {
        let mut is_zero = true;
        self.for_each_word(first, order, |word, mask, initial| {
            let changed = *word & mask;
            is_zero &= match initial {
                Initial::Zero => changed == 0,
                Initial::Unknown => changed == mask,
            };
            match initial {
                Initial::Zero => *word |= mask,
                Initial::Unknown => *word &= !mask,
            }
        });
        is_zero
    }

    /// A block is all zero, and nobody writes it any more.
    pub(crate) fn note_zeroed(&mut self, first: FrameNumber, order: Order) {
        // Without memory for it that is forgotten: then it is zeroed once more.
        let _ = self.prepare_as(first, Initial::Unknown);
        self.for_each_word(first, order, |word, mask, initial| match initial {
            Initial::Zero => *word &= !mask,
            Initial::Unknown => *word |= mask,
        });
    }

    /// Calls with each word that has bits of the block, the mask of these, and how the range began. Where there is no piece the
    /// change is lost.
    fn for_each_word(&mut self, first: FrameNumber, order: Order, mut change: impl FnMut(&mut u64, u64, Initial)) {
        let bits = self.bits_of(first);
        let start = (first.0 - bits.span.first.0) as usize;
        let frames = 1_usize << order.get();
        // A block is aligned to its size and no larger than a piece.
        let (piece, at) = (start / PIECE_FRAMES, start % PIECE_FRAMES);
        let mut untouched = 0;
        let mut slot = bits.changed.get_mut(piece).and_then(Option::as_deref_mut);
        for from in (at..at + frames).step_by(64) {
            let count = frames.min(64);
            let mask = (u64::MAX >> (64 - count)) << (from % 64);
            let word = slot.as_deref_mut().map_or(&mut untouched, |piece| &mut piece[from / 64]);
            change(word, mask, bits.initial);
            untouched = 0;
        }
    }
}

/// Zeros, if there is memory for them.
///
/// # Errors
/// [`FramesError::NoMetadata`]
pub(crate) fn zeros<T: Copy + Default>(len: usize) -> Result<Box<[T]>, FramesError> {
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(len).map_err(|_| FramesError::NoMetadata)?;
    zeros.resize(len, T::default());
    Ok(zeros.into_boxed_slice())
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::units::FrameCount;

    proptest! {
        #[test]
        fn a_block_is_zero_exactly_if_all_its_frames_are(
            ops in prop::collection::vec((any::<bool>(), 0u32..4096, 0u8..=10), 0..60), is_zero in any::<bool>(),
        ) {
            let initial = if is_zero { Initial::Zero } else { Initial::Unknown };
            let mut contents = Contents::default();
            let span = FrameRange { first: FrameNumber(1024), count: FrameCount(4096) };
            contents.add_range(span, initial);
            let mut zero: BTreeSet<u32> = if is_zero { (1024..5120).collect() } else { BTreeSet::new() };
            for (gives_out, place, order) in ops {
                let first = 1024 + (place >> order << order);
                let (frames, order) = (first..first + (1 << order), Order::new(order).unwrap());
                if gives_out {
                    contents.prepare(FrameNumber(first)).unwrap();
                    let expected = frames.clone().all(|frame| zero.contains(&frame));
                    prop_assert_eq!(contents.give_out(FrameNumber(first), order), expected);
                    zero.retain(|frame| !frames.contains(frame));
                } else {
                    contents.note_zeroed(FrameNumber(first), order);
                    zero.extend(frames);
                }
            }
        }
    }

    #[test]
    fn a_short_range_has_bits_for_its_frames_only() {
        let mut contents = Contents::default();
        let count = FrameCount((1 << 18) + 100);
        contents.add_range(FrameRange { first: FrameNumber(0), count }, Initial::Zero);
        for first in [(1 << 18) + 99, (1 << 18) + 64] {
            contents.prepare(FrameNumber(first)).unwrap();
            assert!(contents.give_out(FrameNumber(first), Order::ZERO));
        }
        assert_eq!(contents.bytes(), 16, "a hundred bits, in words");
    }

    #[test]
    fn what_is_never_given_out_takes_no_memory() {
        let mut contents = Contents::default();
        contents.add_range(FrameRange { first: FrameNumber(0), count: FrameCount(1 << 30) }, Initial::Unknown);
        contents.prepare(FrameNumber(1 << 29)).unwrap();
        assert!(!contents.give_out(FrameNumber(1 << 29), Order::MAX));
        assert!(contents.ranges[0].changed.iter().all(Option::is_none));
    }
}
