//! A mapped node's frames: of the memory manager, through the wall, under the component's grant.

use spmem_core::frames::Metadata;
use spmem_core::grant::{Grant, GrantError, GrantId, Held, Rights, Terms};
use spmem_core::mm::{AllocError, Block, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};
use spmem_core::units::{DomainId, FrameCount, FrameNumber, NodeId, Order};
use spmem_core::wall::Request;
use spmem_core::zero::Initial;

use crate::compressed::{SetupError, sysram_spec};

/// What a byte-addressable node is registered as.
///
/// `services` are those that the owner offers: with WRITE_FENCE (which needs MIGRATION) pages enter by demotion and are only
/// read where they are (R17).
pub fn mapped_spec(class: Class, services: Services, owner: &'static str) -> NodeSpec {
    NodeSpec { node_type: NodeType::Spm, class, services, guard: Guard::Hard, owner: owner.into() }
}

/// The memory manager of a machine of two nodes: node 0, ordinary memory, and a mapped one.
#[derive(Debug)]
pub struct NodeFrames {
    mm: MemoryManager,
    node: NodeId,
    owner: Owner,
    grant: Grant,
}

impl NodeFrames {
    pub(super) fn new(
        node: NodeId,
        spec: NodeSpec,
        capacity: FrameCount,
        lent: Metadata,
        initial: Initial,
    ) -> Result<Self, SetupError> {
        let mut mm = MemoryManager::new();
        let registry = mm.registry_mut();
        registry.register(NodeId::ZERO, sysram_spec()).map_err(SetupError::Node)?;
        let owner = registry.register(node, spec.clone()).map_err(SetupError::Node)?.owner;
        registry.add_range(&owner, &spec, capacity, lent, initial).map_err(SetupError::Node)?;
        let mut rights = Rights::ALLOC | Rights::DEMOTE_TO | Rights::MIGRATE_FROM | Rights::MAP_READ;
        if !spec.services.contains(Services::WRITE_FENCE) {
            rights |= Rights::MAP_WRITE;
        }
        let grant = registry.grant(&[&owner], Terms::new(rights, capacity.bytes())).map_err(SetupError::Grant)?;
        Ok(Self { mm, node, owner, grant })
    }

    /// The memory manager.
    pub const fn mm(&self) -> &MemoryManager {
        &self.mm
    }

    /// The memory manager, to change: domains and further grants.
    pub const fn mm_mut(&mut self) -> &mut MemoryManager {
        &mut self.mm
    }

    /// The manager and the owner's token together.
    pub const fn parts_mut(&mut self) -> (&mut MemoryManager, &Owner) {
        (&mut self.mm, &self.owner)
    }

    /// The grant under which the component takes frames.
    pub const fn grant(&self) -> &Grant {
        &self.grant
    }

    pub(super) const fn node(&self) -> NodeId {
        self.node
    }

    pub(super) fn is_fenced(&self) -> bool {
        let spec = self.mm.registry().spec(self.node);
        spec.is_some_and(|spec| spec.services.contains(Services::WRITE_FENCE))
    }

    pub(crate) fn alloc(&mut self, domain: DomainId, order: Order) -> Result<Block, AllocError> {
        self.mm.alloc(&Request::on(domain, self.node, &[&self.grant]), order)
    }

    pub(super) fn alloc_at(&mut self, frame: FrameNumber, order: Order) -> Result<Block, AllocError> {
        self.mm.alloc_at(&Request::on(DomainId::ROOT, self.node, &[&self.grant]), self.node, frame, order)
    }

    pub(super) fn free(&mut self, block: Block) {
        let freed = self.mm.free(block);
        assert!(freed.is_ok(), "every block of this node is this manager's: {freed:?}");
    }

    pub(super) fn revoke(&mut self, grant: GrantId) -> Result<(), GrantError> {
        self.mm.registry_mut().revoke(&self.owner, grant).map(|_| ())
    }

    pub(super) fn held(&self) -> Result<alloc::vec::Vec<Held>, GrantError> {
        self.mm.registry().held(self.grant.id())
    }
}
