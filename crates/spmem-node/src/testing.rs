//! Frames and pages for tests: a frame source that checks its caller, and pages like real ones.

use std::vec;
use std::vec::Vec;

use spmem_core::units::{FrameCount, FrameNumber, NodeId, Order};

use crate::compressed::{FrameBlock, FrameSource};

/// First fit over a map of owners; panics on a wrong free.
pub(crate) struct FirstFit {
    /// Per frame: `None` free, else the order of the block it is in.
    owned: Vec<Option<Order>>,
}

impl FirstFit {
    pub(crate) fn new(frames: usize) -> Self {
        Self { owned: vec![None; frames] }
    }

    pub(crate) fn used(&self) -> usize {
        self.owned.iter().flatten().count()
    }
}

/// Frames taken from a [`FirstFit`].
pub(crate) struct Taken {
    first: FrameNumber,
    order: Order,
}

impl FrameBlock for Taken {
    fn first_frame(&self) -> FrameNumber {
        self.first
    }

    fn order(&self) -> Order {
        self.order
    }
}

impl FrameSource for FirstFit {
    type Block = Taken;

    fn node(&self) -> NodeId {
        NodeId::ONE
    }

    fn capacity(&self) -> FrameCount {
        FrameCount(self.owned.len() as u64)
    }

    fn alloc(&mut self, order: Order) -> Option<Taken> {
        let size = 1 << order.get();
        let at = (0..self.owned.len() / size)
            .map(|block| block * size)
            .find(|at| self.owned[*at..at + size].iter().all(Option::is_none))?;
        self.owned[at..at + size].fill(Some(order));
        Some(Taken { first: FrameNumber(u32::try_from(at).unwrap()), order })
    }

    fn free(&mut self, Taken { first, order }: Taken) {
        let (at, size) = (first.0 as usize, 1 << order.get());
        assert_eq!(at % size, 0, "a block starts at a multiple of its size");
        for owner in &mut self.owned[at..at + size] {
            assert_eq!(owner.take(), Some(order), "freed frames were allocated with that order");
        }
    }
}
