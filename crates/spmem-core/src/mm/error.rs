//! Why the memory manager did not give or take a block.

use core::fmt;

use super::Block;
use crate::frames::FramesError;
use crate::grant::GrantError;
use crate::units::{FrameCount, NodeId};
use crate::wall::Refusal;

/// Why nothing was allocated. Nothing has changed, but that the marks of a node may be boosted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocError {
    /// The wall leaves no node (R8).
    Refused(Refusal),
    /// The grant does not cover it (R12).
    Grant {
        /// The node that was tried last.
        node: NodeId,
        /// Why not.
        cause: GrantError,
    },
    /// Only the reserve is left on the nodes allowed.
    ReserveOnly {
        /// The node that was tried last.
        node: NodeId,
        /// Free frames there.
        free: FrameCount,
        /// Frames kept in reserve.
        min: FrameCount,
    },
    /// No block of the order is free on the nodes allowed (R10).
    Exhausted {
        /// The node that was tried last.
        node: NodeId,
        /// What its frames answered.
        cause: FramesError,
    },
}

impl fmt::Display for AllocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => refusal.fmt(f),
            Self::Grant { node, cause } => write!(f, "node {node}: {cause}"),
            Self::ReserveOnly { node, free, min } => write!(
                f,
                "node {node}: {free} frames free, {min} are kept in reserve; reclaim must free some first"
            ),
            Self::Exhausted { node, cause } => write!(f, "node {node}: {cause}"),
        }
    }
}

impl core::error::Error for AllocError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Refused(_) | Self::ReserveOnly { .. } => None,
            Self::Grant { cause, .. } => Some(cause),
            Self::Exhausted { cause, .. } => Some(cause),
        }
    }
}

/// Why a block was not taken back.
#[derive(Debug, PartialEq, Eq)]
pub enum FreeError {
    /// It was allocated by another manager; here it is again.
    Foreign(Block),
    /// It is on its way somewhere: complete the move or call it off first. Here it is again.
    Moving(Block),
}

impl fmt::Display for FreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (block, what) = match self {
            Self::Foreign(block) => (block, "is another manager's"),
            Self::Moving(block) => (block, "is on its way; complete the move or call it off first"),
        };
        write!(f, "the block at frame {} of node {} {what}", block.frame, block.node)
    }
}

impl core::error::Error for FreeError {}
