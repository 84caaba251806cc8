//! What can go wrong with frames, with the facts.

use core::fmt;

use super::{MAX_CONTIGUOUS, MAX_FRAMES};
use crate::units::{FrameCount, FrameNumber, Order};

/// Why frames were not given, taken back, added or removed. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FramesError {
    /// No free block is large enough (R10).
    Exhausted {
        /// Asked for.
        order: Order,
        /// Free frames, all smaller blocks together.
        free: FrameCount,
        /// The largest block that is free.
        largest: Option<Order>,
    },
    /// The frame belongs to no range of this node.
    Foreign {
        /// As given.
        frame: FrameNumber,
    },
    /// The frame is free already.
    NotAllocated {
        /// As given.
        frame: FrameNumber,
    },
    /// The frame is inside an allocated block, not its first.
    NotFirst {
        /// As given.
        frame: FrameNumber,
    },
    /// A block begins there, of another order.
    WrongOrder {
        /// As given.
        frame: FrameNumber,
        /// As given.
        order: Order,
        /// The block's.
        allocated: Order,
    },
    /// A block of that order never begins at the frame.
    Misaligned {
        /// As given.
        frame: FrameNumber,
        /// As given.
        order: Order,
    },
    /// Something of the block that was asked for is in use, or in a cache.
    NotFree {
        /// As given.
        frame: FrameNumber,
        /// As given.
        order: Order,
    },
    /// The frame is poisoned and out of use (R20).
    Poisoned {
        /// As given.
        frame: FrameNumber,
    },
    /// No range of this node begins there.
    NoRange {
        /// As given.
        first: FrameNumber,
    },
    /// The range to be removed has frames in use or in a cache.
    RangeInUse {
        /// As given.
        first: FrameNumber,
        /// Frames in use.
        used: FrameCount,
        /// The lowest of them.
        lowest: FrameNumber,
    },
    /// A range must have at least one frame.
    EmptyRange,
    /// The node would have more than [`MAX_FRAMES`] frames.
    TooMany {
        /// Frames of the range.
        count: FrameCount,
        /// Frames the node has, holes included.
        frames: u64,
    },
    /// The metadata lent for a range is not all zero: it was written, or another range uses it.
    MetadataInUse,
    /// The metadata lent for a range is too small, or there is no memory for it.
    NoMetadata,
    /// A contiguous range of so many frames is never given: 0, or more than [`MAX_CONTIGUOUS`].
    Contiguous {
        /// As given.
        count: FrameCount,
    },
    /// The cache holds frames of another node.
    OtherCache,
}

impl fmt::Display for FramesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Exhausted { order, free, largest: Some(largest) } => write!(
                f,
                "no free block of order {order}: {free} frames are free, the largest block is of order {largest}"
            ),
            Self::Exhausted { order, free, largest: None } => {
                write!(f, "no free block of order {order}: {free} frames are free")
            }
            Self::Foreign { frame } => write!(f, "frame {frame} is in no range of this node"),
            Self::NotAllocated { frame } => write!(f, "frame {frame} is free already"),
            Self::NotFirst { frame } => {
                write!(f, "frame {frame} is inside an allocated block; free its first frame")
            }
            Self::WrongOrder { frame, order, allocated } => {
                write!(f, "the block at frame {frame} is of order {allocated}, not {order}")
            }
            Self::Misaligned { frame, order } => {
                write!(f, "a block of order {order} cannot begin at frame {frame}")
            }
            Self::NotFree { frame, order } => {
                write!(f, "the block of order {order} at frame {frame} is not all free")
            }
            Self::Poisoned { frame } => write!(f, "frame {frame} is poisoned and out of use"),
            Self::NoRange { first } => write!(f, "no range begins at frame {first}"),
            Self::RangeInUse { first, used, lowest } => write!(
                f,
                "{used} frames of the range at frame {first} are in use, frame {lowest} is the lowest; free or move them first"
            ),
            Self::EmptyRange => f.write_str("a range must have at least one frame"),
            Self::TooMany { count, frames } => write!(
                f,
                "{count} more frames do not fit: the node has {frames}, holes included, and can have {MAX_FRAMES}"
            ),
            Self::MetadataInUse => f.write_str("the metadata lent for the range is in use, or was written"),
            Self::NoMetadata => f.write_str("no memory for the metadata of the range"),
            Self::Contiguous { count } => {
                write!(f, "{count} frames cannot be contiguous: 1 to {MAX_CONTIGUOUS} can")
            }
            Self::OtherCache => f.write_str("the cache holds frames of another node"),
        }
    }
}

impl core::error::Error for FramesError {}
