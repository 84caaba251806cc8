//! The memory manager: joins the steps of an allocation in one straight line.
//!
//! [`MemoryManager::alloc`]: request -> policy (which node first) -> [`wall`](crate::wall) ->
//! [`watermark`](crate::watermark) -> [`frames`](crate::frames). It owns the registry with all frames; a [`Block`] is
//! what it gives out. Called by the runtime's store, the simulator and the tools. Takes no lock: `&mut self`.

mod error;
mod many;
mod placed;

use core::num::NonZeroU32;

use crate::frames::FramesError;
use crate::grant::{Grant, GrantError, GrantId, Rights};
use crate::node::Services;
use crate::oom::{self, Use, Victim};
use crate::registry::{Node, Registry};
use crate::units::{Bytes, DomainId, FrameCount, FrameNumber, NodeId, Order};
use crate::wall::{Mobility, Pass, Request, Reserve};
use crate::watermark::Pressure;

pub use self::error::{AllocError, FreeError};
pub use self::many::Contiguous;

/// Services for which it must be known which blocks can move.
pub(crate) const MOVING: Services = Services::MIGRATION.union(Services::RECLAIM);

/// In [`Block::charged`]: no grant was charged. In [`Block::domain`]: no domain was.
const UNCHARGED: u16 = u16::MAX;

/// An allocated block. Not copyable: whoever holds it owns the frames, and giving it back ends that.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped block stays allocated"]
pub struct Block {
    pub(crate) frame: FrameNumber,
    pub(crate) node: NodeId,
    /// Slot of the grant charged, or [`UNCHARGED`].
    charged: u16,
    /// Number of the domain charged, or [`UNCHARGED`].
    domain: u16,
    /// Of the manager: a block given to another one is noticed.
    registry: NonZeroU32,
    pub(crate) order: Order,
    pub(crate) is_zeroed: bool,
}

const _: () = assert!(size_of::<Option<Block>>() <= 16 && crate::units::MAX_DOMAINS < UNCHARGED);

impl Block {
    /// The node it lies on.
    pub const fn node(&self) -> NodeId {
        self.node
    }

    /// Its first frame.
    pub const fn first_frame(&self) -> FrameNumber {
        self.frame
    }

    /// Its order.
    pub const fn order(&self) -> Order {
        self.order
    }

    /// The domain it is charged to; `None` when the request had none.
    pub fn domain(&self) -> Option<DomainId> {
        DomainId::new(self.domain).ok()
    }

    /// Whether all of it is known to be zero. If not, it must be zeroed before somebody sees it who did not write what it
    /// holds (R21).
    pub const fn is_zeroed(&self) -> bool {
        self.is_zeroed
    }

    /// Its size.
    pub const fn bytes(&self) -> Bytes {
        self.order.bytes()
    }
}

/// How full a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeStats {
    /// Frames in all its ranges.
    pub capacity: FrameCount,
    /// Frames in use.
    pub used: FrameCount,
    /// Free frames.
    pub free: FrameCount,
    /// Frames that are poisoned and out of use.
    pub poisoned: FrameCount,
    /// Free blocks by order, each counted at the highest order it reaches.
    pub free_blocks: [u64; Order::COUNT],
    /// Ranges.
    pub ranges: usize,
    /// How short it is.
    pub pressure: Pressure,
    /// Bytes of metadata: what was lent, and what is kept of the contents and of blocks that move.
    pub metadata: Bytes,
}

/// All nodes, their frames, domains and grants.
///
/// ```
/// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
/// use spmem_core::{frames::Metadata, grant::{Rights, Terms}, mm::MemoryManager, wall::Request};
/// use spmem_core::units::{Bytes, DomainId, FrameCount, NodeId, Order};
/// use spmem_core::zero::Initial;
/// # let spec = NodeSpec { node_type: NodeType::Spm, class: Class::Featured, services: Services::empty(),
/// #     guard: Guard::Hard, owner: "cram".into() };
/// let mut mm = MemoryManager::new();
/// let registry = mm.registry_mut();
/// let owner = registry.register(NodeId::ONE, spec.clone()).unwrap().owner;
/// let lent = Metadata::from_heap(FrameCount(1024)).unwrap();
/// registry.add_range(&owner, &spec, FrameCount(1024), lent, Initial::Zero).unwrap();
/// let grant = registry.grant(&[&owner], Terms::new(Rights::ALLOC, Bytes(8192))).unwrap();
///
/// let grants = [&grant];
/// let request = Request::on(DomainId::ROOT, NodeId::ONE, &grants);
/// let block = mm.alloc(&request, Order::ZERO).unwrap();
/// assert_eq!(mm.stats(NodeId::ONE).unwrap().used, FrameCount(1));
/// assert!(mm.alloc(&request, Order::MAX).is_err()); // over the quota
/// mm.free(block).unwrap();
/// ```
#[derive(Debug, Default)]
pub struct MemoryManager {
    pub(crate) registry: Registry,
}

impl MemoryManager {
    /// A manager without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Nodes, domains and grants, to look at.
    pub const fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Nodes, domains and grants, to change.
    pub const fn registry_mut(&mut self) -> &mut Registry {
        &mut self.registry
    }

    /// Lets a request through the wall and allocates a block: see [`MemoryManager::alloc_with`].
    ///
    /// # Errors
    /// [`AllocError`]; nothing has changed then.
    pub fn alloc(&mut self, request: &Request<'_>, order: Order) -> Result<Block, AllocError> {
        let mut pass = self.registry.admit(request).map_err(AllocError::Refused)?;
        self.alloc_with(&mut pass, order)
    }

    /// Allocates a block on one of the nodes that a pass allows, charging the domain, and the grant that opened an SPM node.
    ///
    /// Nodes are tried as the policy says, then what it falls back to, nearest first. Where nodes are taken in turn, a full one
    /// is stood in for by the allowed node that is nearest to it, whether the policy names that or falls back to it, as
    /// Linux goes on in the zonelist of the node whose turn it is. Nothing outside the allowed set is ever tried (R6, R10).
    ///
    /// # Errors
    /// [`AllocError`], of the node tried last; nothing has changed then.
    ///
    /// # Panics
    /// When the pass is another manager's.
    pub fn alloc_with(&mut self, pass: &mut Pass, order: Order) -> Result<Block, AllocError> {
        self.on_each(pass, |mm, pass, node| mm.alloc_on(pass, order, node))
    }

    /// Asks the nodes that a pass allows, one after the other, until one of them gives.
    fn on_each<T>(
        &mut self,
        pass: &mut Pass,
        mut alloc_on: impl FnMut(&mut Self, &Pass, NodeId) -> Result<T, AllocError>,
    ) -> Result<T, AllocError> {
        pass.renew(&self.registry).map_err(AllocError::Refused)?;
        let turn = if pass.policy().mode().is_interleaved() {
            let weight = |node| self.registry.weight(node);
            let (mode, nodes) = (pass.policy().mode(), pass.nodes());
            pass.turns.next(mode, &nodes, weight)
        } else {
            None
        };
        let mut last = None;
        if let Some(turn) = turn {
            let mut at = Some(turn);
            while let Some(node) = at {
                match alloc_on(self, pass, node) {
                    Ok(given) => return Ok(given),
                    Err(error) => last = Some(error),
                }
                at = self.registry.distances().next_in_zonelist(turn, pass.mask(), node);
            }
        } else {
            for &node in pass.chosen.iter().chain(&pass.fallback) {
                match alloc_on(self, pass, node) {
                    Ok(given) => return Ok(given),
                    Err(error) => last = Some(error),
                }
            }
        }
        Err(last.expect("an allowed set is not empty"))
    }

    /// Allocates for a move: a grant opens an SPM node with `right` instead of ALLOC.
    pub(crate) fn alloc_under(
        &mut self,
        request: &Request<'_>,
        order: Order,
        grants: &[&Grant],
        right: Rights,
    ) -> Result<Block, AllocError> {
        let mut pass = self.registry.admit_for(request, grants, right).map_err(AllocError::Refused)?;
        self.alloc_with(&mut pass, order)
    }

    /// Allocates a block that takes another one's place on the same node, and its charges when it does ([`Self::succeed`]).
    pub(crate) fn alloc_unpaid(&mut self, node: NodeId, order: Order) -> Option<Block> {
        let registry = self.tag();
        let entry = self.registry.node_mut(node)?;
        let frame = entry.frames.alloc_highest(order).ok()?;
        if entry.prepare(frame, Mobility::Movable).is_err() {
            let freed = entry.frames.free_block(frame, order);
            assert!(freed.is_ok(), "it has just been taken: {freed:?}");
            return None;
        }
        let is_zeroed = entry.contents.give_out(frame, order);
        Some(Block { frame, node, charged: UNCHARGED, domain: UNCHARGED, registry, order, is_zeroed })
    }

    /// An unpaid block takes over what the old one, of its size and node, was charged to.
    pub(crate) const fn succeed(old: &mut Block, new: &mut Block) {
        (new.charged, new.domain) = (old.charged, old.domain);
        (old.charged, old.domain) = (UNCHARGED, UNCHARGED);
    }

    /// Takes a block back; the domain and the grant it was charged to regain it, the grant also when it has ended since.
    ///
    /// # Errors
    /// [`FreeError::Foreign`] when another manager allocated it, [`FreeError::Moving`] while it is on its way.
    ///
    /// # Panics
    /// When the block's frames are not what it says: an invariant of this crate is broken.
    pub fn free(&mut self, block: Block) -> Result<(), FreeError> {
        if !self.is_own(&block) {
            return Err(FreeError::Foreign(block));
        }
        let node = self.registry.node_mut(block.node).expect("a node with frames in use stays (R1)");
        if node.pages.get(block.frame).is_some_and(|page| page.is_isolated) {
            return Err(FreeError::Moving(block));
        }
        node.pages.untrack(block.frame);
        let freed = node.frames.free_block(block.frame, block.order);
        assert!(freed.is_ok(), "a block is not copyable, so it is freed once: {freed:?}");
        self.uncharge(block.charged, block.order.frames());
        if let Some(domain) = block.domain() {
            self.registry.domains.uncharge(domain, block.node, block.order.frames().0);
        }
        Ok(())
    }

    /// Takes a block back of which the caller knows that every byte is zero, and that nobody can write it any more: it
    /// need not be zeroed for the next one (R21).
    ///
    /// # Errors
    /// As [`MemoryManager::free`].
    ///
    /// # Panics
    /// As [`MemoryManager::free`].
    pub fn free_zeroed(&mut self, block: Block) -> Result<(), FreeError> {
        let (node, frame, order) = (block.node, block.frame, block.order);
        self.free(block)?;
        let entry = self.registry.node_mut(node).expect("its block was just freed");
        entry.contents.note_zeroed(frame, order);
        Ok(())
    }

    /// How full a node is; `None` when it is not registered. Looks at every row of its frames.
    pub fn stats(&self, node: NodeId) -> Option<NodeStats> {
        let node = self.registry.node(node)?;
        let frames = &node.frames;
        Some(NodeStats {
            capacity: frames.capacity(),
            used: frames.used(),
            free: frames.free(),
            poisoned: frames.poisoned(),
            free_blocks: frames.count_free_blocks(),
            ranges: frames.ranges().len(),
            pressure: node.watermarks.observe(frames.free()),
            metadata: Bytes((frames.metadata_bytes() + node.contents.bytes() + node.pages.bytes()) as u64),
        })
    }

    /// How short a node is of blocks of an order; `None` when it is not registered.
    pub fn pressure(&self, node: NodeId, order: Order) -> Option<Pressure> {
        let node = self.registry.node(node)?;
        let frames = &node.frames;
        Some(node.watermarks.observe_order(frames.free(), order, frames.largest_free()))
    }

    /// Watermark, charge, frames: on one node.
    fn alloc_on(&mut self, pass: &Pass, order: Order, node: NodeId) -> Result<Block, AllocError> {
        let registry = self.tag();
        let charged = self.enter(pass, order.frames(), node)?;
        let entry = self.registry.node_mut(node).expect("an allowed node is registered");
        // Apart from those that cannot move: one of these keeps its neighbours from becoming a large block.
        let is_movable = pass.mobility == Mobility::Movable && entry.spec.services.intersects(MOVING);
        let taken = if is_movable { entry.frames.alloc_highest(order) } else { entry.frames.alloc(order) };
        let prepared = taken.and_then(|frame| match entry.prepare(frame, pass.mobility) {
            Ok(()) => Ok(frame),
            Err(cause) => {
                let freed = entry.frames.free_block(frame, order);
                assert!(freed.is_ok(), "it has just been taken: {freed:?}");
                Err(cause)
            }
        });
        match prepared {
            Ok(frame) => {
                let is_zeroed = entry.contents.give_out(frame, order);
                let domain = pass.domain().map_or(UNCHARGED, DomainId::get);
                if let Some(domain) = pass.domain() {
                    self.registry.domains.charge(domain, node, order.frames().0);
                }
                let block = Block { frame, node, charged, domain, registry, order, is_zeroed };
                if pass.mobility == Mobility::Movable {
                    self.track(&block);
                }
                Ok(block)
            }
            Err(cause) => {
                // Enough frames, but none of that size together: more must be freed than the marks ask for, where anything is (R15).
                let is_reclaimed = entry.spec.services.contains(Services::RECLAIM);
                if is_reclaimed && matches!(cause, FramesError::Exhausted { free, .. } if free >= order.frames()) {
                    entry.watermarks.boost(order.frames());
                }
                self.uncharge(charged, order.frames());
                Err(AllocError::Exhausted { node, cause })
            }
        }
    }

    /// Watermark, what counts the domain's use, and charge, for so many frames of a node: the slot of the grant charged, or [`UNCHARGED`].
    fn enter(&mut self, pass: &Pass, frames: FrameCount, node: NodeId) -> Result<u16, AllocError> {
        let entry = self.registry.node(node).expect("an allowed node is registered");
        keeps_reserve(entry, pass.reserve, frames).map_err(|(free, min)| AllocError::ReserveOnly {
            node,
            free,
            min,
        })?;
        if let Some(domain) = pass.domain() {
            let prepared = self.registry.domains.prepare(domain, node);
            prepared.map_err(|cause| AllocError::Exhausted { node, cause })?;
        }
        let needs_grant = self.registry.spm().contains(node);
        if needs_grant { self.charge_for(pass, frames.bytes(), node) } else { Ok(UNCHARGED) }
    }

    /// A grant regains what was charged to it.
    fn uncharge(&mut self, charged: u16, frames: FrameCount) {
        if charged != UNCHARGED && frames.0 > 0 {
            self.registry.grants.uncharge(charged, frames.bytes());
        }
    }

    /// From now on the block can move, where its node offers that.
    pub(crate) fn track(&mut self, block: &Block) {
        let entry = self.registry.node_mut(block.node).expect("a node with frames in use stays (R1)");
        if entry.spec.services.intersects(MOVING) {
            entry.pages.track(block.frame, block.order, block.domain());
        }
    }

    /// Charges the first grant that opens the node and has quota left. An easy node that strict bind names needs none (R9): who
    /// shows one that has ended, or whose quota is used up, is no worse off than who shows none. Otherwise nothing is had
    /// without, whatever a pass says (R12).
    fn charge_for(&mut self, pass: &Pass, bytes: Bytes, node: NodeId) -> Result<u16, AllocError> {
        let mut refused = GrantError::Revoked;
        for &grant in pass.grants() {
            match self.charge_one(grant, bytes, node, pass.right) {
                Ok(Some(slot)) => return Ok(slot),
                Ok(None) => {}
                // A quota that is too small says more than a grant that has ended.
                Err(_) if matches!(refused, GrantError::OverQuota { .. }) => {}
                Err(cause) => refused = cause,
            }
        }
        let needs_none =
            pass.right == Rights::ALLOC && pass.policy().opens_easy() && self.registry.easy().contains(node);
        if needs_none { Ok(UNCHARGED) } else { Err(AllocError::Grant { node, cause: refused }) }
    }

    fn charge_one(
        &mut self,
        grant: GrantId,
        bytes: Bytes,
        node: NodeId,
        right: Rights,
    ) -> Result<Option<u16>, GrantError> {
        let grants = &mut self.registry.grants;
        if grants.allows(grant, node, right)? { grants.charge(grant, bytes).map(Some) } else { Ok(None) }
    }

    /// Who must give when `node` has nothing left and nothing of it can move: of the domains that use it, the one that exceeds
    /// its `share` of it by most. `None` for a node that is not OOM_ELIGIBLE: there the request fails (R10, R16).
    pub fn choose_victim(&self, node: NodeId, share: impl Fn(DomainId) -> FrameCount) -> Option<Victim> {
        let spec = self.registry.spec(node)?;
        if !spec.services.contains(Services::OOM_ELIGIBLE) {
            return None;
        }
        let uses = self.registry.domains().map(|domain| Use {
            domain,
            used: self.registry.used_by(domain, node),
            share: share(domain),
        });
        oom::choose(uses)
    }

    /// Whether the grant that the block is charged to has ended.
    pub(crate) fn has_lost_its_grant(&self, block: &Block) -> bool {
        block.charged != UNCHARGED && self.registry.grants.has_ended(block.charged)
    }

    /// Whether the block was allocated here.
    pub(crate) fn is_own(&self, block: &Block) -> bool {
        block.registry == self.tag()
    }

    fn tag(&self) -> NonZeroU32 {
        let tag = u32::try_from(self.registry.id()).ok().and_then(NonZeroU32::new);
        tag.expect("a registry's number is checked when it is made")
    }
}

/// Whether the node's reserve stays whole; its free frames and reserve when not.
fn keeps_reserve(node: &Node, reserve: Reserve, wanted: FrameCount) -> Result<(), (FrameCount, FrameCount)> {
    let min = node.watermarks.min();
    let is_kept =
        reserve == Reserve::Use || min.0 == 0 || node.frames.has_free(FrameCount(min.0.saturating_add(wanted.0)));
    if is_kept { Ok(()) } else { Err((node.frames.free(), min)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::Metadata;
    use crate::grant::Terms;
    use crate::node::{Class, Guard, NodeSpec, NodeType};
    use crate::units::Time;
    use crate::zero::Initial;

    #[test]
    fn a_pass_that_nobody_told_of_a_grants_end_takes_nothing_of_a_hard_node() {
        let mut mm = MemoryManager::new();
        let (node_type, class, guard) = (NodeType::Spm, Class::Plain, Guard::Hard);
        let spec = NodeSpec { node_type, class, services: Services::empty(), guard, owner: "test".into() };
        let owner = mm.registry.register(NodeId::ONE, spec.clone()).unwrap().owner;
        let lent = Metadata::from_heap(FrameCount(64)).unwrap();
        mm.registry.add_range(&owner, &spec, FrameCount(64), lent, Initial::Zero).unwrap();
        let terms = Terms::new(Rights::ALLOC, Bytes::mib(1)).until(Time(9));
        let grant = mm.registry.grant(&[&owner], terms).unwrap();
        let mut pass = mm.registry.admit(&Request::on(DomainId::ROOT, NodeId::ONE, &[&grant])).unwrap();
        // Behind the registry's back: the epoch is what it was.
        assert_eq!(mm.registry.grants.expire(Time(9)), [grant.id()]);
        let cause = GrantError::Expired { at: Time(9) };
        let refused = AllocError::Grant { node: NodeId::ONE, cause };
        assert_eq!(mm.alloc_with(&mut pass, Order::ZERO), Err(refused));
        assert_eq!(mm.alloc_batch(&mut pass, 3, &mut alloc::vec::Vec::new()), Err(refused));
        assert_eq!(mm.stats(NodeId::ONE).unwrap().used, FrameCount(0));
    }
}
