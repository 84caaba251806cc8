//! The store's frames, through the wall: from the memory manager, under the component's grant.
//!
//! [`GrantedFrames`] is the only source of frames outside tests, so that the compressed store of a
//! program has no path around the wall: each block is a request in the root domain, for the one
//! node, with the grant of its owner (R6, R12).
//!
//! Owns the memory manager: whoever holds the store's lock holds the manager's.

use spmem_core::frames::Metadata;
use spmem_core::grant::{Grant, GrantError, Rights, Terms};
use spmem_core::mm::{self, AllocError, MemoryManager};
use spmem_core::node::{Class, Guard, NodeError, NodeSpec, NodeType, Owner, Services};
use spmem_core::units::{DomainId, FrameCount, FrameNumber, NodeId, Order};
use spmem_core::wall::{Pass, Refusal, Request};
use spmem_core::zero::Initial;

use super::frames::{FrameBlock, FrameSource};

/// Frames of one node that the owner's grant opens.
#[derive(Debug)]
pub struct GrantedFrames {
    mm: MemoryManager,
    node: NodeId,
    capacity: FrameCount,
    grant: Grant,
    /// The wall's answer to the component's request.
    pass: Pass,
    owners: Owners,
    last_refusal: Option<AllocError>,
}

/// Who owns the two nodes of the embedded default machine.
#[derive(Debug)]
pub struct Owners {
    /// Owner of node 0, ordinary memory.
    pub sysram: Owner,
    /// Owner of node 1, compressed RAM.
    pub cram: Owner,
}

/// Why the embedded default machine could not be set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetupError {
    /// A node was refused.
    Node(NodeError),
    /// The grant was refused.
    Grant(GrantError),
    /// The wall does not let the component's request through.
    Refused(Refusal),
}

impl core::fmt::Display for SetupError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Node(cause) => write!(f, "setting up the embedded nodes: {cause}"),
            Self::Grant(cause) => write!(f, "setting up the embedded grant: {cause}"),
            Self::Refused(cause) => write!(f, "setting up the embedded wall: {cause}"),
        }
    }
}

impl core::error::Error for SetupError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Node(cause) => Some(cause),
            Self::Grant(cause) => Some(cause),
            Self::Refused(cause) => Some(cause),
        }
    }
}

impl GrantedFrames {
    /// The embedded default machine: node 0 is sysram (class 1), node 1 is SPM (class 4, owner
    /// "cram", guard hard) with `capacity` frames, all of them under one grant. `lent` is for their metadata.
    ///
    /// Node 0 gets no frames here: the kernel gives out this machine's RAM.
    ///
    /// # Errors
    /// [`SetupError`] with what the memory manager refused, a capacity of zero for one.
    ///
    /// ```
    /// use spmem_core::frames::Metadata;
    /// use spmem_core::units::{FrameCount, NodeId, Order};
    /// use spmem_node::compressed::{FrameSource, GrantedFrames};
    /// let lent = Metadata::from_heap(FrameCount(64)).expect("a little memory");
    /// let mut frames = GrantedFrames::embedded(FrameCount(64), lent)?;
    /// let block = frames.alloc(Order::ZERO).expect("64 frames are free");
    /// assert_eq!(block.node(), NodeId::ONE);
    /// frames.free(block);
    /// # Ok::<(), spmem_node::compressed::SetupError>(())
    /// ```
    pub fn embedded(capacity: FrameCount, lent: Metadata) -> Result<Self, SetupError> {
        let mut mm = MemoryManager::new();
        let sysram = mm.registry_mut().register(NodeId::ZERO, sysram_spec()).map_err(SetupError::Node)?.owner;
        let cram = mm.registry_mut().register(NodeId::ONE, cram_spec()).map_err(SetupError::Node)?.owner;
        mm.registry_mut()
            .add_range(&cram, &cram_spec(), capacity, lent, Initial::Zero)
            .map_err(SetupError::Node)?;
        let rights = Rights::ALLOC | Rights::DEMOTE_TO | Rights::MIGRATE_FROM;
        let grant =
            mm.registry_mut().grant(&[&cram], Terms::new(rights, capacity.bytes())).map_err(SetupError::Grant)?;
        let pass = mm
            .registry()
            .admit(&Request::on(DomainId::ROOT, NodeId::ONE, &[&grant]))
            .map_err(SetupError::Refused)?;
        Ok(Self {
            mm,
            node: NodeId::ONE,
            capacity,
            grant,
            pass,
            owners: Owners { sysram, cram },
            last_refusal: None,
        })
    }

    /// The memory manager, to look at.
    pub const fn mm(&self) -> &MemoryManager {
        &self.mm
    }

    /// The memory manager, to change; with [`Self::owners`] more nodes and grants can be made.
    pub const fn mm_mut(&mut self) -> &mut MemoryManager {
        &mut self.mm
    }

    /// The owners' tokens of both nodes.
    pub const fn owners(&self) -> &Owners {
        &self.owners
    }

    /// The manager and the tokens together, for changes that need both.
    pub const fn parts_mut(&mut self) -> (&mut MemoryManager, &Owners) {
        (&mut self.mm, &self.owners)
    }

    /// The grant under which frames are taken.
    pub const fn grant(&self) -> &Grant {
        &self.grant
    }

    /// Why the last block that was not given was not (R11).
    pub const fn last_refusal(&self) -> Option<AllocError> {
        self.last_refusal
    }
}

impl FrameSource for GrantedFrames {
    type Block = mm::Block;

    fn node(&self) -> NodeId {
        self.node
    }

    fn capacity(&self) -> FrameCount {
        self.capacity
    }

    fn alloc(&mut self, order: Order) -> Option<mm::Block> {
        match self.mm.alloc_with(&mut self.pass, order) {
            Ok(block) => Some(block),
            Err(refusal) => {
                self.last_refusal = Some(refusal);
                None
            }
        }
    }

    fn free(&mut self, block: mm::Block) {
        let freed = self.mm.free(block);
        assert!(freed.is_ok(), "every block of this store is this manager's: {freed:?}");
    }
}

impl FrameBlock for mm::Block {
    fn first_frame(&self) -> FrameNumber {
        mm::Block::first_frame(self)
    }

    fn order(&self) -> Order {
        mm::Block::order(self)
    }
}

/// Node 0 of the embedded default machine: this machine's RAM, which the kernel gives out.
pub fn sysram_spec() -> NodeSpec {
    NodeSpec {
        node_type: NodeType::Sysram,
        class: Class::Plain,
        services: Services::RECLAIM
            | Services::COMPACTION
            | Services::MIGRATION
            | Services::DEMOTION
            | Services::LONGTERM_PIN
            | Services::USER_NUMA
            | Services::OOM_ELIGIBLE,
        guard: Guard::Easy,
        owner: "kernel".into(),
    }
}

/// Node 1 of the embedded default machine: compressed RAM made in software.
pub fn cram_spec() -> NodeSpec {
    NodeSpec {
        node_type: NodeType::Spm,
        class: Class::Featured,
        services: Services::RECLAIM
            | Services::COMPACTION
            | Services::MIGRATION
            | Services::DEMOTION
            | Services::PROMOTION
            | Services::WRITE_FENCE,
        guard: Guard::Hard,
        owner: "cram".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::PAGE_BYTES;
    use crate::compressed::Store;
    use crate::conformance::conformance;

    fn embedded(frames: u64) -> GrantedFrames {
        let lent = Metadata::from_heap(FrameCount(frames)).unwrap();
        GrantedFrames::embedded(FrameCount(frames), lent).unwrap()
    }

    fn new_store(frames: usize) -> Store<GrantedFrames, alloc::vec::Vec<u8>> {
        let granted = embedded(frames as u64);
        Store::new(granted, alloc::vec![0; frames * PAGE_BYTES], 0x5eed)
    }

    conformance!(through_the_wall, super::new_store);

    #[test]
    fn frames_come_from_node_1_and_are_charged_to_the_grant() {
        let mut frames = embedded(16);
        let block = frames.alloc(Order::new(3).unwrap()).unwrap();
        assert_eq!(block.node(), NodeId::ONE);
        let info = frames.mm().registry().grant_info(frames.grant()).unwrap();
        assert_eq!(info.used, FrameCount(8).bytes());
        frames.free(block);
        assert_eq!(frames.mm().registry().grant_info(frames.grant()).unwrap().used.0, 0);
    }

    #[test]
    fn without_the_grant_no_frame_is_had() {
        let mut frames = embedded(16);
        let request = Request::on(DomainId::ROOT, NodeId::ONE, &[]);
        assert!(matches!(frames.mm_mut().alloc(&request, Order::ZERO), Err(AllocError::Refused(_))));
    }

    #[test]
    fn a_revoked_grant_gives_no_more_frames_and_says_so() {
        let mut frames = embedded(16);
        let id = frames.grant().id();
        let (mm, owners) = frames.parts_mut();
        mm.registry_mut().revoke(&owners.cram, id).unwrap();
        assert!(frames.alloc(Order::ZERO).is_none());
        assert!(matches!(frames.last_refusal(), Some(AllocError::Refused(_) | AllocError::Grant { .. })));
    }
}
