//! Poison: what the failure of a frame does to those who use a node (R20).
//!
//! [`MemoryManager::poison`] takes the frame out of use, now or as soon as it is given back
//! ([`Frames::poison`](crate::frames::Frames::poison)), and names who is hurt: it is for the caller to tell the holder, as
//! the kernel does with SIGBUS. [`MemoryManager::in_use`] names holders in the same words, where a range is to be removed.
//! Takes no lock. Hole: a hurt block still counts as one that can move; its holder copies what can be read.

use core::fmt;

use crate::frames::{FrameRange, FramesError, Hurt, InUse};
use crate::mm::MemoryManager;
use crate::page::Page;
use crate::registry::Node;
use crate::units::{FrameNumber, NodeId};

/// A block in use, by which whoever holds it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The frames. Its holder has a [`Block`](crate::mm::Block) that begins with the first one, and says what it is charged to.
    pub block: InUse,
    /// What is known of it where blocks can move: its domain, for one.
    pub page: Option<Page>,
}

/// What the poison of a frame did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Nobody is hurt: the frame is out of use.
    OutOfUse,
    /// The frame is in somebody's cache before the node, who does not give it out any more.
    Cached,
    /// Whoever holds the block is hurt. Its frame goes out of use when the block is given back.
    Holder(Holder),
}

/// What [`MemoryManager::poison`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "whoever is hurt must be told"]
pub struct PoisonReport {
    /// Whether that was not known before.
    pub is_new: bool,
    /// What it did.
    pub damage: Damage,
}

/// Why no frame was poisoned. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoisonError {
    /// The node is not registered.
    Absent {
        /// As given.
        node: NodeId,
    },
    /// The frame is not the node's.
    Frames {
        /// As given.
        node: NodeId,
        /// What its frames answered.
        cause: FramesError,
    },
}

impl fmt::Display for PoisonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent { node } => write!(f, "node {node} is not registered"),
            Self::Frames { node, cause } => write!(f, "node {node}: {cause}"),
        }
    }
}

impl core::error::Error for PoisonError {}

impl MemoryManager {
    /// The memory of a frame is broken: it is never given out again. Who is hurt by that. Asked again, it says how things are
    /// now.
    ///
    /// # Errors
    /// [`PoisonError`]
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
    /// use spmem_core::{frames::Metadata, mm::MemoryManager, poison::Damage, wall::Request, zero::Initial};
    /// use spmem_core::units::{DomainId, FrameCount, FrameNumber, NodeId, Order};
    /// # let spec = NodeSpec { node_type: NodeType::Sysram, class: Class::Plain, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "doc".into() };
    /// let mut mm = MemoryManager::new();
    /// let owner = mm.registry_mut().register(NodeId::ZERO, spec.clone()).unwrap().owner;
    /// let lent = Metadata::from_heap(FrameCount(1024)).unwrap();
    /// mm.registry_mut().add_range(&owner, &spec, FrameCount(1024), lent, Initial::Zero).unwrap();
    /// let block = mm.alloc(&Request::of(DomainId::ROOT), Order::HUGE).unwrap();
    ///
    /// let report = mm.poison(NodeId::ZERO, FrameNumber(3)).unwrap();
    /// let Damage::Holder(holder) = report.damage else { panic!("it is in use") };
    /// assert_eq!(holder.block.first, block.first_frame());
    /// mm.free(block).unwrap();
    /// assert_eq!(mm.poison(NodeId::ZERO, FrameNumber(3)).unwrap().damage, Damage::OutOfUse);
    /// assert_eq!(mm.stats(NodeId::ZERO).unwrap().poisoned, FrameCount(1));
    /// ```
    pub fn poison(&mut self, node: NodeId, frame: FrameNumber) -> Result<PoisonReport, PoisonError> {
        let entry = self.registry.node(node).ok_or(PoisonError::Absent { node })?;
        let poisoned = entry.frames.poison(frame).map_err(|cause| PoisonError::Frames { node, cause })?;
        let damage = match poisoned.hurt {
            Hurt::Nobody => Damage::OutOfUse,
            Hurt::Cached => Damage::Cached,
            Hurt::Holder { first, order } => {
                let block = InUse { first, count: order.frames(), order: Some(order) };
                Damage::Holder(holder(entry, block))
            }
        };
        Ok(PoisonReport { is_new: poisoned.is_new, damage })
    }

    /// What is in use of a part of a node, lowest first, and whose it is: what keeps a range from being removed. Looks at every
    /// frame in use; nothing for a node that is not registered.
    pub fn in_use(&self, node: NodeId, part: FrameRange) -> impl Iterator<Item = Holder> + '_ {
        let entry = self.registry.node(node).into_iter();
        entry.flat_map(move |entry| entry.frames.in_use(part).map(move |block| holder(entry, block)))
    }
}

fn holder(node: &Node, block: InUse) -> Holder {
    Holder { block, page: node.pages.get(block.first) }
}
