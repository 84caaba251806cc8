//! What the store needs from the node it lives on: frames, and their bytes.

use alloc::vec::Vec;

use spmem_core::units::{FrameCount, FrameNumber, NodeId, Order};

use crate::backend::PAGE_BYTES;

/// Where the store gets its frames and gives them back.
///
/// [`super::GrantedFrames`] is the one that asks the memory manager.
pub trait FrameSource {
    /// Proof of holding a block of frames.
    type Block: FrameBlock;

    /// The node the frames are of.
    fn node(&self) -> NodeId;

    /// Frames that can be had at most.
    fn capacity(&self) -> FrameCount;

    /// A block of 2^order contiguous frames. `None` if it cannot be had now.
    fn alloc(&mut self, order: Order) -> Option<Self::Block>;

    /// Takes a block back.
    fn free(&mut self, block: Self::Block);
}

/// A block of contiguous frames that somebody holds.
pub trait FrameBlock {
    /// Its first frame.
    fn first_frame(&self) -> FrameNumber;

    /// Its order.
    fn order(&self) -> Order;
}

/// The bytes of the node's frames: frame 0 is at offset 0, and so on, up to the capacity.
///
/// Nobody else writes them. Ranges that the store passes lie inside frames it holds.
pub trait FrameBytes {
    /// Gets frames ready that the store has just been given; whether it can use them now.
    fn prepare(&mut self, _offset: usize, _len: usize) -> bool {
        true
    }

    /// `len` bytes from `offset` on.
    fn bytes(&self, offset: usize, len: usize) -> &[u8];

    /// The same, to write.
    fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8];

    /// Gives the RAM of whole frames back to the kernel; they read as zeros from then on (R21).
    fn discard(&mut self, offset: usize, len: usize);
}

/// Memory on the heap, for tests and tools: zeros to begin with.
impl FrameBytes for Vec<u8> {
    fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        &self[offset..offset + len]
    }

    fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        &mut self[offset..offset + len]
    }

    fn discard(&mut self, offset: usize, len: usize) {
        assert!(offset.is_multiple_of(PAGE_BYTES) && len.is_multiple_of(PAGE_BYTES), "whole frames");
        self[offset..offset + len].fill(0);
    }
}
