//! Migration: blocks move from node to node, by plans that can stop anywhere (mm/migrate.c, mm/vmscan.c).
//!
//! The memory manager does not touch bytes: it takes a cold block out of the count ([`MemoryManager::take_cold`]), finds a
//! target that the block's own domain and the grants allow (R14), and hands out a [`Move`]: from here, into this new block.
//! The holder of the old block copies, and gives it back for the new one ([`MemoryManager::complete`]), or does not, and
//! calls it off ([`MemoryManager::call_off`]). Until then the old block is valid, afterwards the new one; no frame has two
//! owners and none is lost at any point.
//!
//! What is planned is opted in node by node (R3): a node without RECLAIM is never searched, from one without MIGRATION
//! nothing moves, and what is pinned stays (R15). Takes no lock.

use alloc::vec::Vec;
use core::fmt;

use crate::frames::FramesError;
use crate::grant::{Grant, Rights};
use crate::mm::{AllocError, Block, MemoryManager};
use crate::node::{Owner, Services};
use crate::nodemask::NodeMask;
use crate::page::Page;
use crate::policy::Policy;
use crate::units::{DomainId, FrameCount, FrameNumber, NodeId};
use crate::wall::{Mobility, Refusal, Request};

/// Frames looked at, for each block that is wanted, to find cold ones.
const LOOKS_PER_BLOCK: usize = 512;

/// A block that is on its way, but not where to. Plan it or put it back.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped one never moves again"]
pub struct Isolated {
    registry: u64,
    node: NodeId,
    page: Page,
}

impl Isolated {
    /// The node it lies on.
    pub const fn node(&self) -> NodeId {
        self.node
    }

    /// What is known of it.
    pub const fn page(&self) -> &Page {
        &self.page
    }
}

/// A block is to move: its holder copies it into the new one. Complete it or call it off.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped one leaves both blocks in use"]
pub struct Move {
    from: Isolated,
    to: Block,
}

impl Move {
    pub(crate) const fn new(from: Isolated, to: Block) -> Self {
        Self { from, to }
    }

    /// The block that is to move.
    pub const fn from(&self) -> &Isolated {
        &self.from
    }

    /// Where to: allocated, and nobody else's.
    pub const fn to(&self) -> &Block {
        &self.to
    }
}

/// On whose behalf a block is taken. The services of a node need none of them: by offering RECLAIM, COMPACTION and the
/// like its owner has agreed to what they move ([`MemoryManager::take_cold`], [`MemoryManager::plan_emptying`]).
#[derive(Clone, Copy, Debug)]
pub enum Mover<'a> {
    /// Who holds it, or anybody else: off an SPM node only with a grant that carries MIGRATE_FROM.
    Holder(&'a [&'a Grant]),
    /// The owner of the node it lies on.
    Owner(&'a Owner),
    /// The memory manager: only what lies outside its domain's masks, or under a grant that has ended (R5, R13).
    Manager,
}

/// Why a block stays where it is. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stay {
    /// The node is not registered with a service that this needs (R3, R15).
    NotOffered {
        /// The node.
        node: NodeId,
        /// What it lacks.
        missing: Services,
    },
    /// No block that can move begins there, or it is pinned, or on its way already.
    NotMovable {
        /// The node.
        node: NodeId,
    },
    /// The block's domain and the grants shown leave no node in the tiers in question (R14).
    NoTarget {
        /// Whose it is.
        domain: Option<DomainId>,
    },
    /// The mover lacks a right on the SPM node that the block lies on (R12).
    Refused {
        /// What stands in the way.
        refusal: Refusal,
    },
    /// Compaction did not help lately: it is tried again later.
    Deferred {
        /// The node.
        node: NodeId,
    },
    /// None of the targets has room.
    NoRoom {
        /// What the last one answered.
        cause: AllocError,
    },
}

impl fmt::Display for Stay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOffered { node, missing } => write!(f, "node {node} does not offer {missing}"),
            Self::NotMovable { node } => write!(f, "no block that can move begins there on node {node}"),
            Self::NoTarget { domain: Some(domain) } => {
                write!(f, "domain {domain} and the grants shown leave no node to go to")
            }
            Self::NoTarget { domain: None } => f.write_str("a block without a domain has no node to go to"),
            Self::Refused { refusal } => refusal.fmt(f),
            Self::Deferred { node } => write!(f, "compaction of node {node} did not help lately; try again later"),
            Self::NoRoom { cause } => write!(f, "no room: {cause}"),
        }
    }
}

impl core::error::Error for Stay {}

impl MemoryManager {
    /// The holder, or somebody who watches, says that a block was used.
    pub fn note_used(&mut self, block: &Block) {
        let is_own = self.is_own(block);
        if let Some(node) = self.registry.node_mut(block.node).filter(|_| is_own) {
            node.pages.on_used(block.frame);
        }
    }

    /// Keeps a block where it is; whether that could be: not while it is on its way. A pin for long needs a node with
    /// LONGTERM_PIN, and on an SPM node a grant with PIN: what is pinned its owner does not get back (R12).
    ///
    /// # Errors
    /// [`Stay::NotOffered`], [`Stay::Refused`].
    pub fn pin(&mut self, block: &Block, grants: &[&Grant]) -> Result<bool, Stay> {
        self.offered(block.node, Services::LONGTERM_PIN)?;
        let refused = |refusal| Stay::Refused { refusal };
        self.registry.check(block.node, Rights::PIN, grants).map_err(refused)?;
        let is_own = self.is_own(block);
        let node = self.registry.node_mut(block.node).filter(|_| is_own);
        Ok(node.is_some_and(|node| node.pages.set_pinned(block.frame, true)))
    }

    /// Lets a block move again.
    pub fn unpin(&mut self, block: &Block) {
        let is_own = self.is_own(block);
        if let Some(node) = self.registry.node_mut(block.node).filter(|_| is_own) {
            node.pages.set_pinned(block.frame, false);
        }
    }

    /// How many frames must leave a node so that it is no longer short (watermarks: begun below low, aimed at high); 0 for
    /// one that is never reclaimed.
    pub fn shortage(&self, node: NodeId) -> FrameCount {
        let Some(entry) = self.registry.node(node) else { return FrameCount(0) };
        let (free, marks) = (entry.frames.free(), &entry.watermarks);
        let is_due = entry.spec.services.contains(Services::RECLAIM) && free < marks.low();
        FrameCount(if is_due { marks.high().0.saturating_sub(free.0) } else { 0 })
    }

    /// Reclaim has freed so many frames of a node: a boost of its marks is paid off by as much.
    pub fn note_reclaimed(&mut self, node: NodeId, freed: FrameCount) {
        if let Some(entry) = self.registry.node_mut(node) {
            entry.watermarks.pay_off(freed);
        }
    }

    /// Takes up to `wanted` blocks that were not used for longest, to be moved. From a node without RECLAIM none, and it is
    /// not even looked at (R15).
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]: no memory to list them. Nothing is taken then, and nothing has aged.
    pub fn take_cold(&mut self, node: NodeId, wanted: usize) -> Result<Vec<Isolated>, FramesError> {
        let registry = self.registry.id();
        let Some(entry) = self.registry.node_mut(node) else { return Ok(Vec::new()) };
        if !entry.spec.services.contains(Services::RECLAIM) {
            return Ok(Vec::new());
        }
        // Before any is taken: one that could not be listed would never move again.
        let mut taken = Vec::new();
        let most = usize::try_from(entry.pages.count()).unwrap_or(usize::MAX).min(wanted);
        taken.try_reserve_exact(most).map_err(|_| FramesError::NoMetadata)?;
        let limit = wanted.saturating_mul(LOOKS_PER_BLOCK);
        entry.pages.isolate(wanted, limit, |page| taken.push(Isolated { registry, node, page }));
        if taken.is_empty() && entry.pages.age() {
            entry.pages.isolate(wanted, limit, |page| taken.push(Isolated { registry, node, page }));
        }
        Ok(taken)
    }

    /// Takes one block, however warm, to be moved; whether it may leave its node depends on the mover (R12).
    ///
    /// # Errors
    /// [`Stay::NotOffered`] from a node without MIGRATION (R15), [`Stay::NotMovable`]; [`Stay::Refused`] when the mover may
    /// not.
    pub fn take(&mut self, block: &Block, mover: Mover<'_>) -> Result<Isolated, Stay> {
        self.offered(block.node, Services::MIGRATION)?;
        if !self.is_own(block) {
            return Err(Stay::NotMovable { node: block.node });
        }
        let may = match mover {
            Mover::Holder(grants) => self.registry.check(block.node, Rights::MIGRATE_FROM, grants),
            Mover::Owner(owner) if owner.node() == block.node && self.registry.is_owner(owner) => Ok(()),
            Mover::Manager if self.must_leave(block) => Ok(()),
            Mover::Owner(_) | Mover::Manager => self.registry.check(block.node, Rights::MIGRATE_FROM, &[]),
        };
        may.map_err(|refusal| Stay::Refused { refusal })?;
        self.take_at(block.node, block.frame).ok_or(Stay::NotMovable { node: block.node })
    }

    /// Whether a block lies where its domain no longer reaches (R5), or where the grant that it is charged to has ended (R13).
    fn must_leave(&self, block: &Block) -> bool {
        let effective = block.domain().and_then(|domain| self.registry.effective(domain));
        let is_outside = effective.is_some_and(|effective| !effective.contains(block.node));
        is_outside || self.has_lost_its_grant(block)
    }

    /// Takes the block that begins at a frame, if it can move.
    pub(crate) fn take_at(&mut self, node: NodeId, frame: FrameNumber) -> Option<Isolated> {
        let registry = self.registry.id();
        let entry = self.registry.node_mut(node)?;
        let page = entry.pages.get(frame)?;
        entry.pages.isolate_one(frame).then_some(Isolated { registry, node, page })
    }

    /// A block stays after all.
    ///
    /// # Panics
    /// When it is another manager's.
    pub fn put_back(&mut self, isolated: Isolated) {
        self.release(&isolated);
    }

    fn release(&mut self, isolated: &Isolated) {
        assert!(isolated.registry == self.registry.id(), "a block is put back by the manager that took it");
        if let Some(entry) = self.registry.node_mut(isolated.node) {
            entry.pages.put_back(isolated.page.frame);
        }
    }

    /// Plans a move to a lower tier: to sysram, and to SPM nodes on which a grant shown carries DEMOTE_TO (R14). Only to nodes
    /// with MIGRATION: on another the block would have to stay (R15).
    ///
    /// # Errors
    /// [`Stay`]; the block is put back then.
    ///
    /// # Panics
    /// When the block is another manager's.
    pub fn plan_demotion(&mut self, isolated: Isolated, grants: &[&Grant]) -> Result<Move, Stay> {
        let needs = Services::DEMOTION | Services::MIGRATION;
        self.plan(isolated, needs, grants, |mm, isolated, open| {
            let open = mm.with_migration(open);
            mm.registry.tiers().demotion_order(isolated.node, &open, mm.registry.distances())
        })
    }

    /// Plans a move to a higher tier, near to the node where the block is used: to sysram with MIGRATION, as above (R14).
    ///
    /// # Errors
    /// [`Stay`]; the block is put back then.
    ///
    /// # Panics
    /// When the block is another manager's.
    pub fn plan_promotion(&mut self, isolated: Isolated, used_at: NodeId) -> Result<Move, Stay> {
        let needs = Services::PROMOTION | Services::MIGRATION;
        self.plan(isolated, needs, &[], |mm, isolated, open| {
            let open = mm.with_migration(open);
            mm.registry.tiers().promotion_order(isolated.node, used_at, &open, mm.registry.distances())
        })
    }

    /// Plans a move to any of `targets`, nearest first: away from a node that is to be emptied, or that a domain's masks no
    /// longer reach (R5, R13). A block on an SPM node goes to SPM nodes only, a block on sysram to sysram (R10).
    ///
    /// # Errors
    /// [`Stay`]; the block is put back then.
    ///
    /// # Panics
    /// When the block is another manager's.
    pub fn plan_evacuation(
        &mut self,
        isolated: Isolated,
        targets: &NodeMask,
        grants: &[&Grant],
    ) -> Result<Move, Stay> {
        self.plan(isolated, Services::MIGRATION, grants, |mm, isolated, open| {
            let registry = &mm.registry;
            let is_spm = registry.spm().contains(isolated.node);
            let alike = if is_spm { registry.spm() } else { registry.sysram() };
            let mut open = open.intersection(targets).intersection(alike);
            open.remove(isolated.node);
            registry.distances().order(isolated.node, &open)
        })
    }

    /// Finds a target among the nodes that are open to the block, in the order that `order` gives them.
    fn plan(
        &mut self,
        isolated: Isolated,
        needs: Services,
        grants: &[&Grant],
        order: impl Fn(&Self, &Isolated, &NodeMask) -> Result<Vec<NodeId>, FramesError>,
    ) -> Result<Move, Stay> {
        assert!(isolated.registry == self.registry.id(), "a move is planned by the manager that took the block");
        let entry = self.registry.node(isolated.node);
        let page = entry.and_then(|entry| entry.pages.get(isolated.page.frame));
        assert!(page.is_some_and(|page| page.is_isolated), "what was taken is on its way until it is planned");
        let planned = self.offered(isolated.node, needs).and_then(|()| {
            let open = self.open_to(&isolated, grants);
            let domain = isolated.page.domain;
            let mut stay = Stay::NoTarget { domain };
            let no_memory = |cause| Stay::NoRoom { cause: AllocError::Exhausted { node: isolated.node, cause } };
            for node in order(self, &isolated, &open).map_err(no_memory)? {
                // Nobody holds it before the move is complete: until then it cannot move.
                let policy = Policy::bind(NodeMask::of(node));
                let request = Request { policy, domain, mobility: Mobility::Unmovable, ..Request::default() };
                match self.alloc_under(&request, isolated.page.order, grants, Rights::DEMOTE_TO) {
                    Ok(to) => match self.prepare_to_track(to) {
                        Ok(to) => return Ok(to),
                        Err(cause) => stay = Stay::NoRoom { cause },
                    },
                    Err(cause) => stay = Stay::NoRoom { cause },
                }
            }
            Err(stay)
        });
        match planned {
            Ok(to) => Ok(Move { from: isolated, to }),
            Err(stay) => {
                self.release(&isolated);
                Err(stay)
            }
        }
    }

    /// Makes what is kept of the block once it can move; without memory for that it is given back.
    fn prepare_to_track(&mut self, to: Block) -> Result<Block, AllocError> {
        let node = to.node;
        let entry = self.registry.node_mut(node).expect("a node with frames in use stays (R1)");
        let Err(cause) = entry.prepare(to.frame, Mobility::Movable) else { return Ok(to) };
        let freed = self.free(to);
        assert!(freed.is_ok(), "a block of this manager that nobody else has seen: {freed:?}");
        Err(AllocError::Exhausted { node, cause })
    }

    /// R14: sysram and what a grant shown opens with DEMOTE_TO, as far as the block's own domain reaches.
    fn open_to(&self, isolated: &Isolated, grants: &[&Grant]) -> NodeMask {
        let registry = &self.registry;
        let mut open = *registry.sysram();
        // R7: without a domain there is sysram only.
        let Some(domain) = isolated.page.domain else { return open };
        for grant in grants {
            let nodes =
                registry.grants.own(grant).and_then(|id| registry.grants.nodes_with(id, Rights::DEMOTE_TO));
            open = nodes.map_or(open, |nodes| open.union(&nodes));
        }
        registry.effective(domain).map_or(NodeMask::EMPTY, |effective| open.intersection(effective))
    }

    /// R3, R15: the nodes that have opted into moves.
    fn with_migration(&self, nodes: &NodeMask) -> NodeMask {
        nodes.iter().filter(|&node| self.offered(node, Services::MIGRATION).is_ok()).collect()
    }

    pub(crate) fn offered(&self, node: NodeId, needs: Services) -> Result<(), Stay> {
        let services = self.registry.spec(node).map_or(Services::empty(), |spec| spec.services);
        let missing = needs - services;
        if missing.is_empty() { Ok(()) } else { Err(Stay::NotOffered { node, missing }) }
    }

    /// The holder has copied: gives the old block back for the new one.
    ///
    /// # Errors
    /// Both again, when the block is not the one that was to move, or another manager planned it.
    pub fn complete(&mut self, mut moved: Move, mut old: Block) -> Result<Block, (Move, Block)> {
        let isolated = &moved.from;
        let is_own = isolated.registry == self.registry.id() && self.is_own(&old);
        if (old.node, old.frame) != (isolated.node, isolated.page.frame) || !is_own {
            return Err((moved, old));
        }
        self.release(isolated);
        if moved.to.node == old.node {
            Self::succeed(&mut old, &mut moved.to);
        }
        match self.free(old) {
            Ok(()) => {
                self.track(&moved.to);
                // It holds a copy now, whatever it held when it was allocated (R21).
                moved.to.is_zeroed = false;
                Ok(moved.to)
            }
            Err(error) => unreachable!("it is this manager's and not on its way any more: {error}"),
        }
    }

    /// The move does not happen: the old block stays, the new one is given back.
    ///
    /// # Errors
    /// It again, when it is another manager's.
    pub fn call_off(&mut self, moved: Move) -> Result<(), Move> {
        if moved.from.registry != self.registry.id() {
            return Err(moved);
        }
        let freed = self.free(moved.to);
        assert!(freed.is_ok(), "the new block is this manager's, and not on its way: {freed:?}");
        self.release(&moved.from);
        Ok(())
    }
}
