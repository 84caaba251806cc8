//! The registry: which nodes, domains and grants there are. What the wall looks at.
//!
//! [`Registry::register`] latches a node's type and fixes its class, services and guard (R1, R3); it hands out the
//! [`Owner`] token, the only thing that can add ranges, make grants or unregister. Domains live here
//! ([`domain`](crate::domain)), and grants ([`grant`](crate::grant)). A node that comes may narrow the masks of domains
//! that waited for it; what lies outside then is listed with the token (R5).
//!
//! Whatever changes an answer of the wall changes the *epoch*, so that an answer can be kept
//! ([`wall::Pass`](crate::wall::Pass)). The time is what the caller said last ([`Registry::advance`]).
//! Owned by [`MemoryManager`](crate::mm::MemoryManager). Takes no lock.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::compact::Deferral;
use crate::distance::{DistanceError, Distances, grow_to};
use crate::domain::{Domains, Outside};
use crate::frames::{FrameRange, Frames, FramesError, FramesView, Metadata};
use crate::grant::{GrantId, Grants};
use crate::mm::MOVING;
use crate::node::{Guard, NodeError, NodeSpec, NodeType, Owner};
use crate::nodemask::NodeMask;
use crate::page::Pages;
use crate::tier::Tiers;
use crate::units::{DomainId, FrameCount, FrameNumber, NodeId, Time};
use crate::wall::Mobility;
use crate::watermark::Watermarks;
use crate::zero::{Contents, Initial};

/// A registered node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) spec: NodeSpec,
    pub(crate) frames: Frames,
    pub(crate) watermarks: Watermarks,
    pub(crate) contents: Contents,
    pub(crate) pages: Pages,
    pub(crate) deferral: Deferral,
    /// For weighted interleave; 1 or more.
    pub(crate) weight: u8,
    serial: u64,
}

impl Node {
    /// Makes what is kept of a block that is about to be given out.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]
    pub(crate) fn prepare(&mut self, frame: FrameNumber, mobility: Mobility) -> Result<(), FramesError> {
        if mobility == Mobility::Movable && self.spec.services.intersects(MOVING) {
            self.pages.prepare(frame)?;
        }
        self.contents.prepare(frame)
    }
}

/// What registering a node gives.
#[derive(Debug, PartialEq, Eq)]
pub struct Registered {
    /// Proof of owning the node.
    pub owner: Owner,
    /// Frames of all domains that lie outside their masks now: a domain whose `mems` named none but absent nodes had its
    /// parent's, and has only this one once it is there (R4). As after
    /// [`Registry::set_mems`], they stay valid, and the change is done when they have been moved (R5).
    pub outside: Vec<Outside>,
}

/// The register of nodes, of the domains that requests come from, and of the grants on nodes.
///
/// ```
/// use spmem_core::frames::Metadata;
/// use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
/// use spmem_core::registry::Registry;
/// use spmem_core::units::{FrameCount, NodeId};
/// use spmem_core::zero::Initial;
/// let cram = NodeSpec {
///     node_type: NodeType::Spm,
///     class: Class::Featured,
///     services: Services::MIGRATION | Services::RECLAIM,
///     guard: Guard::Hard,
///     owner: "cram".into(),
/// };
/// let mut registry = Registry::new();
/// let owner = registry.register(NodeId::ONE, cram.clone()).unwrap().owner;
/// let lent = Metadata::from_heap(FrameCount(1024)).unwrap();
/// registry.add_range(&owner, &cram, FrameCount(1024), lent, Initial::Zero).unwrap();
/// assert!(registry.spm().contains(NodeId::ONE) && !registry.sysram().contains(NodeId::ONE));
/// assert!(registry.register(NodeId::ONE, cram).is_err());
/// ```
#[derive(Debug)]
pub struct Registry {
    id: u64,
    next_serial: u64,
    /// One or none each: a list, unlike a box, can be made fallibly.
    nodes: Vec<Vec<Node>>,
    present: NodeMask,
    sysram: NodeMask,
    spm: NodeMask,
    easy: NodeMask,
    epoch: u64,
    now: Time,
    distances: Distances,
    tiers: Tiers,
    pub(crate) domains: Domains,
    pub(crate) grants: Grants,
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry {
    /// A registry without nodes, and the root domain.
    ///
    /// # Panics
    /// After 2^32 of them in one process: no two may have one number.
    pub fn new() -> Self {
        /// Tells registries apart, so that a token of one is worth nothing in another. Relaxed: only the value matters.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(u32::try_from(id).is_ok(), "blocks and tokens tell 2^32 registries of a process apart");
        Self {
            id,
            next_serial: 0,
            nodes: Vec::new(),
            present: NodeMask::EMPTY,
            sysram: NodeMask::EMPTY,
            spm: NodeMask::EMPTY,
            easy: NodeMask::EMPTY,
            epoch: 0,
            now: Time::default(),
            distances: Distances::default(),
            tiers: Tiers::default(),
            domains: Domains::new(),
            grants: Grants::new(id),
        }
    }

    /// Registers a node without frames; latches its type (R1) and fixes its services (R3). Lists what lies outside the masks
    /// of its domain now (R5).
    ///
    /// # Errors
    /// [`NodeError::TypeLatched`] or [`NodeError::AlreadyRegistered`] when the node is registered;
    /// [`NodeError::ServiceNeeds`], [`NodeError::GuardNeeds`]; [`NodeError::Frames`] where the heap has nothing left for it.
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
    /// use spmem_core::{frames::Metadata, mm::MemoryManager, wall::Request, zero::Initial};
    /// use spmem_core::units::{DomainId, FrameCount, NodeId, Order};
    /// # let spec = NodeSpec { node_type: NodeType::Sysram, class: Class::Plain, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "doc".into() };
    /// let mut mm = MemoryManager::new();
    /// let owner = mm.registry_mut().register(NodeId::ZERO, spec.clone()).unwrap().owner;
    /// let lent = Metadata::from_heap(FrameCount(64)).unwrap();
    /// mm.registry_mut().add_range(&owner, &spec, FrameCount(64), lent, Initial::Zero).unwrap();
    /// let job = mm.registry_mut().create_domain(DomainId::ROOT, "job").unwrap();
    /// mm.registry_mut().set_mems(job, NodeId::ONE.into()).unwrap(); // absent: the job has what the root has
    /// let block = mm.alloc(&Request::of(job), Order::ZERO).unwrap();
    /// let registered = mm.registry_mut().register(NodeId::ONE, spec).unwrap();
    /// let outside = registered.outside[0];
    /// assert_eq!((outside.domain, outside.node, outside.frames), (job, NodeId::ZERO, FrameCount(1)));
    /// # mm.free(block).unwrap();
    /// ```
    pub fn register(&mut self, node: NodeId, spec: NodeSpec) -> Result<Registered, NodeError> {
        spec.check()?;
        if let Some(present) = self.node(node) {
            let latched = present.spec.node_type;
            return Err(if latched == spec.node_type {
                NodeError::AlreadyRegistered { node }
            } else {
                NodeError::TypeLatched { node, latched }
            });
        }
        let mut made = Vec::new();
        made.try_reserve_exact(1).map_err(|_| FramesError::NoMetadata)?;
        grow_to(&mut self.nodes, node)?;
        self.present.insert(node);
        match spec.node_type {
            NodeType::Sysram => self.sysram.insert(node),
            NodeType::Spm => self.spm.insert(node),
        }
        if spec.node_type == NodeType::Spm && spec.guard == Guard::Easy {
            self.easy.insert(node);
        }
        let serial = self.next_serial;
        self.next_serial += 1;
        let (frames, watermarks, contents, pages, deferral) = Default::default();
        made.push(Node { spec, frames, watermarks, contents, pages, deferral, weight: 1, serial });
        self.nodes[node.index()] = made;
        self.refresh_domains(DomainId::ROOT);
        let owner = Owner { registry: self.id, serial, node };
        let Ok(outside) = self.domains.list_outside(DomainId::ROOT) else {
            self.forget(node);
            return Err(FramesError::NoMetadata.into());
        };
        Ok(Registered { owner, outside })
    }

    fn forget(&mut self, node: NodeId) {
        self.nodes[node.index()] = Vec::new();
        for mask in [&mut self.present, &mut self.sysram, &mut self.spm, &mut self.easy] {
            mask.remove(node);
        }
        self.refresh_domains(DomainId::ROOT);
    }

    /// Adds free frames to a node; `spec` says what they are and must be what the node is (R3), `initial` what they hold
    /// (R21). `lent` is sysram (R7): where it is said to lie ([`Metadata::on`]) there must be such a node.
    ///
    /// # Errors
    /// [`NodeError::NotOwner`], [`NodeError::Conflict`], [`NodeError::MetadataOn`], [`NodeError::Frames`].
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeError, NodeSpec, NodeType, Services};
    /// use spmem_core::{frames::Metadata, registry::Registry, units::{FrameCount, NodeId}, zero::Initial};
    /// # let spec = NodeSpec { node_type: NodeType::Spm, class: Class::Plain, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "doc".into() };
    /// let mut registry = Registry::new();
    /// let owner = registry.register(NodeId::ONE, spec.clone()).unwrap().owner;
    /// let lent = Metadata::from_heap(FrameCount(64)).unwrap().on(NodeId::ONE);
    /// let refused = registry.add_range(&owner, &spec, FrameCount(64), lent, Initial::Zero);
    /// assert_eq!(refused, Err(NodeError::MetadataOn { node: NodeId::ONE })); // SPM
    /// ```
    pub fn add_range(
        &mut self,
        owner: &Owner,
        spec: &NodeSpec,
        count: FrameCount,
        lent: Metadata,
        initial: Initial,
    ) -> Result<FrameRange, NodeError> {
        let sysram = self.sysram;
        let node = self.owned(owner)?;
        if let Some(property) = node.spec.conflict(spec) {
            return Err(NodeError::Conflict { node: owner.node, property });
        }
        if let Some(node) = lent.node().filter(|&node| !sysram.contains(node)) {
            return Err(NodeError::MetadataOn { node });
        }
        node.contents.reserve_range()?;
        let range = node.frames.add_range(count, lent)?;
        node.contents.add_range(range, initial);
        Ok(range)
    }

    /// Takes a range away from a node; none of its frames may be in use, poisoned ones out of use do not matter. What was lent
    /// for it comes back. What stands in the way [`MemoryManager::in_use`](crate::mm::MemoryManager::in_use) says.
    ///
    /// # Errors
    /// [`NodeError::NotOwner`], [`NodeError::Frames`].
    pub fn remove_range(
        &mut self,
        owner: &Owner,
        first: FrameNumber,
    ) -> Result<(FrameRange, Metadata), NodeError> {
        let node = self.owned(owner)?;
        let (range, lent) = node.frames.remove_range(first)?;
        node.contents.remove_range(range);
        node.pages.remove_range(range);
        Ok((range, lent))
    }

    /// Unregisters a node without frames or ranges (R1) and takes it out of every grant; the owner's token is worth
    /// nothing afterwards. The node may be registered anew, with another type. Masks lose that node only, or fall back to a
    /// wider one: what lay inside them stays inside (R5).
    ///
    /// # Errors
    /// [`NodeError::NotOwner`], [`NodeError::InUse`]; [`NodeError::Lends`] while metadata of another node lies on it (R7).
    pub fn unregister(&mut self, owner: &Owner) -> Result<(), NodeError> {
        let node = owner.node;
        let frames = &self.owned(owner)?.frames;
        let (used, ranges) = (frames.used(), frames.ranges().len());
        if used.0 > 0 || ranges > 0 {
            return Err(NodeError::InUse { node, used, ranges });
        }
        if let Some(to) = self.present.iter().find(|&to| self.node(to).is_some_and(|to| to.frames.borrows(node))) {
            return Err(NodeError::Lends { node, to });
        }
        self.grants.forget_node(node);
        self.distances.forget(node);
        self.tiers.forget(node);
        self.forget(node);
        Ok(())
    }

    /// Sets the watermarks of a node; they begin as zero.
    ///
    /// # Errors
    /// [`NodeError::NotOwner`].
    pub fn set_watermarks(&mut self, owner: &Owner, watermarks: Watermarks) -> Result<(), NodeError> {
        self.owned(owner)?.watermarks = watermarks;
        Ok(())
    }

    /// The system-wide default mask: all sysram nodes (R2).
    pub const fn sysram(&self) -> &NodeMask {
        &self.sysram
    }

    /// All SPM nodes.
    pub const fn spm(&self) -> &NodeMask {
        &self.spm
    }

    /// The SPM nodes with an easy guard (R9).
    pub const fn easy(&self) -> &NodeMask {
        &self.easy
    }

    /// Sets how far one node is from another.
    ///
    /// # Errors
    /// [`DistanceError`]
    pub fn set_distance(&mut self, from: NodeId, to: NodeId, distance: u8) -> Result<(), DistanceError> {
        self.distances.set(from, to, distance)?;
        self.bump_epoch();
        Ok(())
    }

    /// How far nodes are from each other.
    pub const fn distances(&self) -> &Distances {
        &self.distances
    }

    /// Sets a node's abstract distance, and with it its tier.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]: there is no memory for it; nothing has changed.
    pub fn set_abstract_distance(&mut self, node: NodeId, abstract_distance: u64) -> Result<(), FramesError> {
        self.tiers.set(node, abstract_distance)
    }

    /// Which tier each node is in.
    pub const fn tiers(&self) -> &Tiers {
        &self.tiers
    }

    /// The blocks of a node that can move; `None` when it is not registered.
    pub fn pages(&self, node: NodeId) -> Option<&Pages> {
        self.node(node).map(|node| &node.pages)
    }

    /// Sets how many pages in a row a node gets by weighted interleave; 0 for what it began with, 1. Unlike a mask it is
    /// anybody's who may write the machine's settings, as in /sys/kernel/mm/mempolicy/weighted_interleave.
    pub fn set_weight(&mut self, node: NodeId, weight: u8) {
        if let Some(node) = self.node_mut(node) {
            node.weight = weight.max(1);
        }
    }

    /// How many pages in a row a node gets by weighted interleave.
    pub fn weight(&self, node: NodeId) -> u8 {
        self.node(node).map_or(1, |node| node.weight)
    }

    /// Tells the time; earlier than before means nothing. The grants that have expired with it: nothing new can be allocated
    /// under them, what is in use is listed by [`Registry::held`] (R12, R13).
    pub fn advance(&mut self, now: Time) -> &[GrantId] {
        self.now = self.now.max(now);
        if !self.grants.expire(self.now).is_empty() {
            self.bump_epoch();
        }
        self.grants.expired()
    }

    /// The time told last.
    pub const fn now(&self) -> Time {
        self.now
    }

    /// Another number than before whenever an answer of the wall may have changed.
    pub(crate) const fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) const fn bump_epoch(&mut self) {
        self.epoch += 1;
    }

    /// Works out the masks of a domain and all below it, after a change.
    pub(crate) fn refresh_domains(&mut self, from: DomainId) {
        self.domains.refresh(from, &self.present, &self.sysram);
        self.bump_epoch();
    }

    /// All registered nodes.
    pub const fn present(&self) -> &NodeMask {
        &self.present
    }

    /// What a node was registered as; `None` when it is not.
    pub fn spec(&self, node: NodeId) -> Option<&NodeSpec> {
        self.node(node).map(|node| &node.spec)
    }

    /// The frames of a node, to look at; `None` when it is not registered. They are had by a request only (R6).
    pub fn frames(&self, node: NodeId) -> Option<FramesView<'_>> {
        self.node(node).map(|node| FramesView::new(&node.frames))
    }

    /// Tells this registry from every other.
    pub(crate) const fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn node(&self, node: NodeId) -> Option<&Node> {
        self.nodes.get(node.index())?.first()
    }

    pub(crate) fn node_mut(&mut self, node: NodeId) -> Option<&mut Node> {
        self.nodes.get_mut(node.index())?.first_mut()
    }

    /// Whether the token is the current one of its node.
    pub(crate) fn is_owner(&self, owner: &Owner) -> bool {
        owner.registry == self.id && self.node(owner.node).is_some_and(|node| node.serial == owner.serial)
    }

    fn owned(&mut self, owner: &Owner) -> Result<&mut Node, NodeError> {
        let registry = self.id;
        self.node_mut(owner.node)
            .filter(|node| node.serial == owner.serial && registry == owner.registry)
            .ok_or(NodeError::NotOwner { node: owner.node })
    }
}
