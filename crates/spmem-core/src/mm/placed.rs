//! Blocks at a place that the caller names: what the component of a persistent node held before a restart.
//!
//! Through the wall and charged as any other block; only the choice of the frame is the caller's.

use super::{AllocError, Block, MemoryManager, UNCHARGED};
use crate::units::{DomainId, FrameNumber, NodeId, Order};
use crate::wall::{Pass, Request};

impl MemoryManager {
    /// Lets a request through the wall and allocates the block of `order` that begins at `frame` of `node`, which the request
    /// must allow.
    ///
    /// # Errors
    /// [`AllocError`]; nothing has changed then. [`AllocError::Exhausted`] says what is in the way of the block.
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
    /// use spmem_core::{frames::Metadata, grant::{Rights, Terms}, mm::MemoryManager, wall::Request};
    /// use spmem_core::units::{Bytes, DomainId, FrameCount, FrameNumber, NodeId, Order};
    /// use spmem_core::zero::Initial;
    /// # let spec = NodeSpec { node_type: NodeType::Spm, class: Class::Shared, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "pmem".into() };
    /// let mut mm = MemoryManager::new();
    /// let registry = mm.registry_mut();
    /// let owner = registry.register(NodeId::ONE, spec.clone()).unwrap().owner;
    /// let lent = Metadata::from_heap(FrameCount(1024)).unwrap();
    /// registry.add_range(&owner, &spec, FrameCount(1024), lent, Initial::Unknown).unwrap();
    /// let grant = registry.grant(&[&owner], Terms::new(Rights::ALLOC, Bytes::mib(1))).unwrap();
    /// let grants = [&grant];
    ///
    /// let request = Request::on(DomainId::ROOT, NodeId::ONE, &grants);
    /// let block = mm.alloc_at(&request, NodeId::ONE, FrameNumber(40), Order::ZERO).unwrap();
    /// assert_eq!(block.first_frame(), FrameNumber(40));
    /// assert!(mm.alloc_at(&request, NodeId::ONE, FrameNumber(40), Order::ZERO).is_err());
    /// let without = Request::on(DomainId::ROOT, NodeId::ONE, &[]);
    /// assert!(mm.alloc_at(&without, NodeId::ONE, FrameNumber(41), Order::ZERO).is_err());
    /// ```
    pub fn alloc_at(
        &mut self,
        request: &Request<'_>,
        node: NodeId,
        frame: FrameNumber,
        order: Order,
    ) -> Result<Block, AllocError> {
        let pass: Pass = self.registry.admit(request).map_err(AllocError::Refused)?;
        if !pass.mask().contains(node) {
            let refusal = self.registry.obstacle(request, node).expect("what is not allowed has its reason");
            return Err(AllocError::Refused(refusal));
        }
        let registry = self.tag();
        let charged = self.enter(&pass, order.frames(), node)?;
        let entry = self.registry.node_mut(node).expect("an allowed node is registered");
        let prepared = entry.frames.alloc_at(frame, order).and_then(|()| {
            entry.prepare(frame, pass.mobility).inspect_err(|_| {
                let freed = entry.frames.free_block(frame, order);
                assert!(freed.is_ok(), "it has just been taken: {freed:?}");
            })
        });
        if let Err(cause) = prepared {
            self.uncharge(charged, order.frames());
            return Err(AllocError::Exhausted { node, cause });
        }
        let is_zeroed = entry.contents.give_out(frame, order);
        let domain = pass.domain().map_or(UNCHARGED, DomainId::get);
        if let Some(domain) = pass.domain() {
            self.registry.domains.charge(domain, node, order.frames().0);
        }
        let block = Block { frame, node, charged, domain, registry, order, is_zeroed };
        if pass.mobility == crate::wall::Mobility::Movable {
            self.track(&block);
        }
        Ok(block)
    }
}
