//! Compaction: blocks move together within their node, so that large ones become free (mm/compaction.c).
//!
//! Two scanners: the one that empties goes up from the bottom of the node, window by window; the free blocks that take what
//! it finds come from the top. Where they meet, the node is as compact as moving makes it. What it gives out are moves
//! ([`Move`]), a few at a time: it can stop anywhere. The same serves to free a given run of frames: for a contiguous range,
//! or before a range is removed.
//!
//! Blocks that cannot move keep their window, so they are kept apart from those that can: they are allocated from the bottom,
//! movable ones from the top ([`MemoryManager::alloc_with`]). Only on nodes with COMPACTION (R3, R15). Takes no lock.

mod deferral;

use alloc::vec::Vec;

use crate::frames::{FrameRange, FramesError};
use crate::migrate::{Move, Stay};
use crate::mm::{AllocError, MemoryManager};
use crate::node::Services;
use crate::units::{FrameNumber, NodeId, Order};

pub use self::deferral::Deferral;

/// How far compaction of a node has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compaction {
    node: NodeId,
    order: Order,
    /// Where the next window begins.
    next: u64,
    is_over: bool,
}

impl Compaction {
    /// Whether the scanners have met.
    pub const fn is_over(&self) -> bool {
        self.is_over
    }
}

/// What it takes to free a run of frames.
#[derive(Debug, Default)]
#[must_use = "the moves must be completed or called off"]
pub struct Emptying {
    /// What can move, and where to.
    pub moves: Vec<Move>,
    /// First frames of blocks that cannot.
    pub stuck: Vec<FrameNumber>,
    /// Whether some frame is poisoned: the run can be removed, but not given out in one piece.
    pub has_poison: bool,
}

impl MemoryManager {
    /// Begins to make free blocks of an order on a node.
    ///
    /// # Errors
    /// [`Stay::NotOffered`] by a node without COMPACTION (R15), [`Stay::Deferred`] for a while after it did not help.
    pub fn begin_compaction(&mut self, node: NodeId, order: Order) -> Result<Compaction, Stay> {
        self.offered(node, Services::COMPACTION)?;
        if self.registry.node_mut(node).is_some_and(|entry| entry.deferral.is_deferred(order)) {
            return Err(Stay::Deferred { node });
        }
        let first = self.registry.frames(node).and_then(|frames| frames.ranges().next());
        let next = first.map_or(0, |range| u64::from(range.first.0));
        Ok(Compaction { node, order, next, is_over: first.is_none() })
    }

    /// Goes on: the moves that empty the next window in which everything can move. None when it is over.
    pub fn plan_compaction(&mut self, compaction: &mut Compaction) -> Vec<Move> {
        let size = compaction.order.frames();
        while !compaction.is_over {
            let end = self.registry.frames(compaction.node).and_then(|frames| frames.ranges().last());
            let end = end.map_or(0, |range| u64::from(range.first.0) + range.count.0);
            let Some(first) = u32::try_from(compaction.next).ok().filter(|_| compaction.next < end) else {
                compaction.is_over = true;
                break;
            };
            // Ranges begin at multiples of the largest block, so a window never begins in one and ends in another.
            compaction.next += size.0;
            let window = FrameRange { first: FrameNumber(first), count: size };
            if self.has_poison(compaction.node, window) {
                continue; // it never becomes whole (R20)
            }
            let found = self.blocks_in(compaction.node, window);
            if found.as_ref().is_ok_and(|(blocks, stuck)| blocks.is_empty() || !stuck.is_empty()) {
                continue;
            }
            let planned =
                found.and_then(|(blocks, _)| self.plan_blocks(compaction.node, window, blocks, Above::Yes));
            // Without memory for the lists there is nothing to be done now.
            let emptying = planned.unwrap_or_default();
            if emptying.stuck.is_empty() && !emptying.moves.is_empty() {
                return emptying.moves;
            }
            // The scanners have met: what was planned of this window would free nothing.
            compaction.is_over = true;
            for planned in emptying.moves {
                let is_off = self.call_off(planned);
                assert!(is_off.is_ok(), "a move of this manager: {is_off:?}");
            }
        }
        Vec::new()
    }

    /// Compaction has ended, its moves are done or called off: where it gave no block of the order, it is not begun again for
    /// some tries.
    pub fn end_compaction(&mut self, compaction: &Compaction) {
        let Some(entry) = self.registry.node_mut(compaction.node) else { return };
        if entry.frames.largest_free() >= Some(compaction.order) {
            entry.deferral.on_success(compaction.order);
        } else {
            entry.deferral.on_failure(compaction.order);
        }
    }

    /// Plans to free a run of frames by moving what is in it elsewhere on the node: for a contiguous range, or to remove it.
    ///
    /// # Errors
    /// [`Stay::NotOffered`] by a node without COMPACTION (R15); [`Stay::NoRoom`] without memory for the plan.
    pub fn plan_emptying(&mut self, node: NodeId, run: FrameRange) -> Result<Emptying, Stay> {
        self.offered(node, Services::COMPACTION)?;
        let no_memory = |cause| Stay::NoRoom { cause: AllocError::Exhausted { node, cause } };
        let (blocks, stuck) = self.blocks_in(node, run).map_err(no_memory)?;
        let mut emptying = self.plan_blocks(node, run, blocks, Above::No).map_err(no_memory)?;
        // There is room: each block of the run is in one of the two lists.
        emptying.stuck.extend(stuck);
        emptying.has_poison = self.has_poison(node, run);
        Ok(emptying)
    }

    fn has_poison(&self, node: NodeId, run: FrameRange) -> bool {
        self.registry.node(node).is_some_and(|entry| entry.frames.has_poison_in(run))
    }

    /// The blocks of a run that can move, and those that cannot. A block that begins before the run counts as one that cannot.
    fn blocks_in(
        &self,
        node: NodeId,
        run: FrameRange,
    ) -> Result<(Vec<FrameNumber>, Vec<FrameNumber>), FramesError> {
        let (mut movable, mut stuck) = (Vec::new(), Vec::new());
        let Some(entry) = self.registry.node(node) else { return Ok((movable, stuck)) };
        for block in entry.frames.in_use(run) {
            let page = entry.pages.get(block.first).filter(|_| run.contains(block.first));
            let can_move = page.is_some_and(|page| !page.is_pinned && !page.is_isolated);
            let list = if can_move { &mut movable } else { &mut stuck };
            list.try_reserve(1).map_err(|_| FramesError::NoMetadata)?;
            list.push(block.first);
        }
        Ok((movable, stuck))
    }

    /// Finds a place outside the run for each block.
    fn plan_blocks(
        &mut self,
        node: NodeId,
        run: FrameRange,
        blocks: Vec<FrameNumber>,
        above: Above,
    ) -> Result<Emptying, FramesError> {
        let mut emptying = Emptying::default();
        let entry = self.registry.node(node);
        let all = entry.map_or(0, |entry| entry.frames.in_use(run).count());
        emptying.moves.try_reserve_exact(blocks.len()).map_err(|_| FramesError::NoMetadata)?;
        emptying.stuck.try_reserve_exact(all).map_err(|_| FramesError::NoMetadata)?;
        // What is free inside the run is held until it is planned, or it would be found as a place to move to.
        let mut held = Vec::new();
        let result = entry.map_or(Ok(()), |entry| entry.frames.take_free_in(run, &mut held));
        if result.is_ok() {
            self.find_places(node, run, blocks, above, &mut emptying);
        }
        let frames = self.registry.node(node).map(|entry| &entry.frames);
        for (frame, order) in held {
            let freed = frames.map(|frames| frames.free_block(frame, order));
            assert!(matches!(freed, Some(Ok(()))), "a block that nobody else has seen: {freed:?}");
        }
        result.map(|()| emptying)
    }

    fn find_places(
        &mut self,
        node: NodeId,
        run: FrameRange,
        blocks: Vec<FrameNumber>,
        above: Above,
        emptying: &mut Emptying,
    ) {
        for frame in blocks {
            let Some(isolated) = self.take_at(node, frame) else {
                emptying.stuck.push(frame);
                continue;
            };
            let to = self.alloc_unpaid(node, isolated.page().order);
            let is_behind = to.as_ref().is_some_and(|to| above == Above::No || to.first_frame() > run.first);
            if let Some(to) = to {
                if is_behind {
                    emptying.moves.push(Move::new(isolated, to));
                    continue;
                }
                let freed = self.free(to);
                assert!(freed.is_ok(), "a block of this manager that nobody else has seen: {freed:?}");
            }
            self.put_back(isolated);
            emptying.stuck.push(frame);
            if above == Above::Yes {
                break;
            }
        }
    }
}

/// Whether only places behind the run will do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Above {
    Yes,
    No,
}
