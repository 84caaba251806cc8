//! Why a mapped node does not do something, and why a medium is not opened.

use core::fmt;

use spmem_core::frames::FramesError;
use spmem_core::mm::AllocError;
use spmem_core::units::{FrameNumber, NodeId, Order};
use spmem_core::wall::Refusal;

use super::medium::MediumError;
use super::record::PeerId;
use crate::backend::Corrupt;
use crate::compressed::SetupError;

/// Why something is not done. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No frames: the wall, the grant, or none is free (R6, R10, R12).
    Alloc(AllocError),
    /// The grants shown do not let it be mapped so (R12).
    Rights(Refusal),
    /// The node is fenced: pages enter by demotion and are not written (R17).
    Fenced {
        /// The node.
        node: NodeId,
    },
    /// The handle does not name what is there, or what is there is not what was stored (R20).
    Corrupt(Corrupt),
    /// A peer has it.
    HandedOver {
        /// The peer.
        to: PeerId,
    },
    /// The range does not lie in the block, or is not of words.
    OutOfBlock {
        /// From the block's beginning, bytes.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The node is not persistent: there are no peers.
    NotPersistent,
    /// The medium failed.
    Medium(MediumError),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alloc(cause) => cause.fmt(f),
            Self::Rights(refusal) => refusal.fmt(f),
            Self::Fenced { node } => {
                write!(f, "node {node} is write-fenced: a page enters by demotion and leaves before it is written")
            }
            Self::Corrupt(corrupt) => corrupt.fmt(f),
            Self::HandedOver { to } => write!(f, "the block was handed over to peer {}", to.0),
            Self::OutOfBlock { offset, len } => write!(f, "{len} bytes from {offset} do not lie in the block"),
            Self::NotPersistent => f.write_str("the node has no records that others could read"),
            Self::Medium(cause) => cause.fmt(f),
        }
    }
}

impl core::error::Error for Refused {}

impl From<MediumError> for Refused {
    fn from(cause: MediumError) -> Self {
        Self::Medium(cause)
    }
}

impl From<AllocError> for Refused {
    fn from(cause: AllocError) -> Self {
        Self::Alloc(cause)
    }
}

impl From<Corrupt> for Refused {
    fn from(corrupt: Corrupt) -> Self {
        Self::Corrupt(corrupt)
    }
}

/// Why a medium was not opened or formatted. A medium that was not opened is as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// Nothing of spmem's is on it.
    NotFormatted,
    /// Something of spmem's is on it already.
    AlreadyFormatted,
    /// It has no room for a frame, or more frames than can be numbered.
    Size {
        /// Bytes.
        bytes: u64,
    },
    /// Another version wrote it.
    Version {
        /// The version found.
        found: u32,
        /// The one that is known here.
        known: u32,
    },
    /// It is shorter than when it was formatted.
    Truncated {
        /// Bytes when it was formatted.
        size: u64,
        /// Bytes now.
        found: u64,
    },
    /// The superblock cannot be trusted.
    Superblock {
        /// Why.
        reason: &'static str,
    },
    /// A record is none that was written there. [`Repair::Retire`](super::Repair::Retire) takes what it may have spoken of out
    /// of use.
    Record {
        /// Its frame, the lowest.
        frame: FrameNumber,
        /// How many there are.
        count: u64,
    },
    /// Two records claim one frame.
    Overlap {
        /// The block that overlaps one before it.
        frame: FrameNumber,
        /// Its order.
        order: Order,
        /// What is in the way.
        cause: FramesError,
    },
    /// The node could not be set up.
    Setup(SetupError),
    /// A recorded block was refused.
    Alloc(AllocError),
    /// The medium failed.
    Medium(MediumError),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFormatted => f.write_str("it holds no node of spmem's"),
            Self::AlreadyFormatted => f.write_str("it holds a node of spmem's already"),
            Self::Size { bytes } => write!(f, "{bytes} bytes cannot be made a node of"),
            Self::Version { found, known } => {
                write!(f, "version {found} of the format wrote it, only version {known} is known here")
            }
            Self::Truncated { size, found } => {
                write!(f, "it had {size} bytes when it was made, and has {found} now")
            }
            Self::Superblock { reason } => write!(f, "the superblock is damaged: {reason}"),
            Self::Record { frame, count } => {
                write!(f, "{count} records are damaged, the first that of frame {frame}")
            }
            Self::Overlap { frame, order, cause } => {
                write!(f, "the block of order {} at frame {frame} overlaps another: {cause}", order.get())
            }
            Self::Setup(cause) => cause.fmt(f),
            Self::Alloc(cause) => write!(f, "a recorded block is refused: {cause}"),
            Self::Medium(cause) => cause.fmt(f),
        }
    }
}

impl core::error::Error for OpenError {}

impl From<MediumError> for OpenError {
    fn from(cause: MediumError) -> Self {
        Self::Medium(cause)
    }
}
