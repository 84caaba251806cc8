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

use crate::frames::FrameRange;
use crate::migrate::{Isolated, Move, Stay};
use crate::mm::{Block, MemoryManager};
use crate::node::Services;
use crate::units::{FrameCount, FrameNumber, NodeId, Order};

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
            let (blocks, stuck) = self.blocks_in(compaction.node, window);
            if blocks.is_empty() || !stuck.is_empty() {
                continue;
            }
            let emptying = self.plan_blocks(compaction.node, window, blocks, Above::Yes);
            if emptying.stuck.is_empty() {
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
    /// [`Stay::NotOffered`] by a node without COMPACTION (R15).
    pub fn plan_emptying(&mut self, node: NodeId, run: FrameRange) -> Result<Emptying, Stay> {
        self.offered(node, Services::COMPACTION)?;
        let (blocks, mut stuck) = self.blocks_in(node, run);
        let mut emptying = self.plan_blocks(node, run, blocks, Above::No);
        emptying.stuck.append(&mut stuck);
        emptying.has_poison = self.has_poison(node, run);
        Ok(emptying)
    }

    fn has_poison(&self, node: NodeId, run: FrameRange) -> bool {
        self.registry.node(node).is_some_and(|entry| entry.frames.has_poison_in(run))
    }

    /// The blocks of a run that can move, and those that cannot. A block that begins before the run counts as one that cannot.
    fn blocks_in(&self, node: NodeId, run: FrameRange) -> (Vec<FrameNumber>, Vec<FrameNumber>) {
        let (mut movable, mut stuck) = (Vec::new(), Vec::new());
        let Some(entry) = self.registry.node(node) else { return (movable, stuck) };
        for block in entry.frames.in_use(run) {
            let page = entry.pages.get(block.first).filter(|_| run.contains(block.first));
            if page.is_some_and(|page| !page.is_pinned && !page.is_isolated) {
                movable.push(block.first);
            } else {
                stuck.push(block.first);
            }
        }
        (movable, stuck)
    }

    /// Finds a place outside the run for each block.
    fn plan_blocks(&mut self, node: NodeId, run: FrameRange, blocks: Vec<FrameNumber>, above: Above) -> Emptying {
        let mut emptying = Emptying::default();
        // Free blocks inside the run come up as well: they are held until it is planned.
        let mut held = Vec::new();
        for frame in blocks {
            let Some(isolated) = self.take_at(node, frame) else {
                emptying.stuck.push(frame);
                continue;
            };
            match self.alloc_outside(&isolated, run, above, &mut held) {
                Some(to) => emptying.moves.push(Move::new(isolated, to)),
                None => {
                    self.put_back(isolated);
                    emptying.stuck.push(frame);
                    if above == Above::Yes {
                        break;
                    }
                }
            }
        }
        for block in held {
            let freed = self.free(block);
            assert!(freed.is_ok(), "a block of this manager that nobody else has seen: {freed:?}");
        }
        emptying
    }

    /// A block as large as `isolated`, on the same node, outside the run.
    fn alloc_outside(
        &mut self,
        isolated: &Isolated,
        run: FrameRange,
        above: Above,
        held: &mut Vec<Block>,
    ) -> Option<Block> {
        loop {
            let block = self.alloc_unpaid(isolated.node(), isolated.page().order)?;
            let first = block.first_frame();
            let is_behind = first.0 >= run.first.0 && !run.contains(first);
            if is_behind || above == Above::No && !run.contains(first) {
                return Some(block);
            }
            held.push(block);
            if above == Above::Yes {
                return None;
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

/// Frames that are free in whole blocks of an order.
///
/// ```
/// use spmem_core::{compact::free_in_blocks, units::{FrameCount, Order}};
/// let mut counts = [0; Order::COUNT];
/// (counts[0], counts[9], counts[10]) = (100, 2, 1);
/// assert_eq!(free_in_blocks(&counts, Order::HUGE), FrameCount(2048));
/// ```
pub fn free_in_blocks(free_blocks: &[u64; Order::COUNT], order: Order) -> FrameCount {
    let large = Order::all().filter(|&of| of >= order);
    FrameCount(large.map(|of| free_blocks[of.index()] * of.frames().0).sum())
}
