//! Nodes: what kinds of memory there are, who owns each, and what may be done on it (R1-R3).
//!
//! [`NodeTable`] is the register. Registering a node latches its type and fixes its class, services and guard; it
//! hands out the [`Owner`] token, the only thing that can add ranges, make grants or unregister. Grants live in the
//! same table (see [`grant`](crate::grant)). Called by [`MemoryManager`](crate::mm::MemoryManager) and the wall.

use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use bitflags::bitflags;

use crate::frames::{FrameRange, Frames, FramesError, Metadata};
use crate::grant::Grants;
use crate::nodemask::NodeMask;
use crate::units::{FrameCount, FrameNumber, NodeId};
use crate::watermark::Watermarks;

/// Ordinary memory, or memory behind the wall (R1: never both).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeType {
    /// The default for everyone.
    Sysram,
    /// Reachable through a grant only.
    Spm,
}

impl fmt::Display for NodeType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sysram => "sysram",
            Self::Spm => "spm",
        })
    }
}

/// What a node costs or can do, 1 to 6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// 1: below 100 ns.
    Plain = 1,
    /// 2: 100 to 300 ns.
    Slower = 2,
    /// 3: above 300 ns, 2 to 3 us loaded.
    Slow = 3,
    /// 4: does something of its own, such as compression.
    Featured = 4,
    /// 5: coherent accelerator.
    Accelerator = 5,
    /// 6: shared without coherence, or persistent.
    Shared = 6,
}

impl Class {
    /// The number, 1 to 6.
    ///
    /// ```
    /// use spmem_core::node::Class;
    /// assert_eq!((Class::Featured.number(), Class::Featured.name()), (4, "featured"));
    /// ```
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The word that `spm nodes` prints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Slower => "slower",
            Self::Slow => "slow",
            Self::Featured => "featured",
            Self::Accelerator => "accelerator",
            Self::Shared => "shared",
        }
    }
}

bitflags! {
    /// What may be done on a node; fixed when it is registered (R3).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Services: u16 {
        /// Its cold pages may be looked for and taken.
        const RECLAIM = 1 << 0;
        /// Its blocks may be moved together to make large ones.
        const COMPACTION = 1 << 1;
        /// Its pages may move at all (R15).
        const MIGRATION = 1 << 2;
        /// Its cold pages may go to a lower tier.
        const DEMOTION = 1 << 3;
        /// Its hot pages may go to a higher tier.
        const PROMOTION = 1 << 4;
        /// Its pages are read where they are, a write moves them first (R17).
        const WRITE_FENCE = 1 << 5;
        /// Pages may be pinned for long (R15: such frames never move).
        const LONGTERM_PIN = 1 << 6;
        /// Programs may set memory policies on it.
        const USER_NUMA = 1 << 7;
        /// Running out of it may end a program.
        const OOM_ELIGIBLE = 1 << 8;
    }
}

impl Services {
    /// R3: each of the left needs all of the right.
    const NEEDS: [(Self, Self); 4] = [
        (Self::DEMOTION, Self::RECLAIM.union(Self::MIGRATION)),
        (Self::PROMOTION, Self::MIGRATION),
        (Self::WRITE_FENCE, Self::MIGRATION),
        (Self::COMPACTION, Self::MIGRATION),
    ];

    /// Checks that every service has those it stands on (R3).
    ///
    /// # Errors
    /// [`NodeError::ServiceNeeds`] with the first service that lacks some, and what it lacks.
    ///
    /// ```
    /// use spmem_core::node::Services;
    /// assert!(Services::DEMOTION.check().is_err());
    /// assert!((Services::DEMOTION | Services::RECLAIM | Services::MIGRATION).check().is_ok());
    /// ```
    pub fn check(self) -> Result<(), NodeError> {
        for (service, needs) in Self::NEEDS {
            if self.contains(service) && !self.contains(needs) {
                return Err(NodeError::ServiceNeeds { service, missing: needs - self });
            }
        }
        Ok(())
    }
}

impl fmt::Display for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        bitflags::parser::to_writer(self, f)
    }
}

/// How hard the wall of an SPM node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Guard {
    /// Only components allocate there.
    Hard,
    /// A program may also name the node, with strict bind (R9).
    Easy,
}

impl fmt::Display for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hard => "hard",
            Self::Easy => "easy",
        })
    }
}

/// What a node is registered as. All but the owner's name is fixed for as long as the node is registered (R3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// Ordinary or walled.
    pub node_type: NodeType,
    /// Cost or kind.
    pub class: Class,
    /// What may be done on it.
    pub services: Services,
    /// How hard its wall is; means nothing on sysram.
    pub guard: Guard,
    /// The component's name, for people.
    pub owner: Cow<'static, str>,
}

/// Which property of a [`NodeSpec`] differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property {
    /// [`NodeSpec::node_type`].
    Type,
    /// [`NodeSpec::class`].
    Class,
    /// [`NodeSpec::services`].
    Services,
    /// [`NodeSpec::guard`].
    Guard,
}

impl NodeSpec {
    /// Where another spec conflicts with this one; the owner's name does not count.
    fn conflict(&self, other: &Self) -> Option<Property> {
        if self.node_type != other.node_type {
            Some(Property::Type)
        } else if self.class != other.class {
            Some(Property::Class)
        } else if self.services != other.services {
            Some(Property::Services)
        } else {
            (self.guard != other.guard).then_some(Property::Guard)
        }
    }
}

/// Why a node was not registered, changed or unregistered. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeError {
    /// No such node is registered, or no longer under this owner.
    NotOwner {
        /// The node the token was made for.
        node: NodeId,
    },
    /// The node is registered already; it has one owner (R3).
    AlreadyRegistered {
        /// The node.
        node: NodeId,
    },
    /// The node is registered with the other type (R1).
    TypeLatched {
        /// The node.
        node: NodeId,
        /// What it is.
        latched: NodeType,
    },
    /// A service stands on others that are missing (R3).
    ServiceNeeds {
        /// The service asked for.
        service: Services,
        /// What it needs besides.
        missing: Services,
    },
    /// A further range must carry the node's own properties (R3).
    Conflict {
        /// The node.
        node: NodeId,
        /// What differs.
        property: Property,
    },
    /// The node still has frames in use or ranges (R1).
    InUse {
        /// The node.
        node: NodeId,
        /// Frames in use.
        used: FrameCount,
        /// Ranges left.
        ranges: usize,
    },
    /// The range was refused.
    Frames(FramesError),
}

impl fmt::Display for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOwner { node } => write!(f, "node {node} is not registered under this owner"),
            Self::AlreadyRegistered { node } => write!(f, "node {node} has an owner already"),
            Self::TypeLatched { node, latched } => {
                write!(f, "node {node} is {latched} until it is unregistered; it cannot be both")
            }
            Self::ServiceNeeds { service, missing } => {
                write!(f, "service {service} also needs {missing}")
            }
            Self::Conflict { node, property } => {
                write!(f, "the range differs from node {node} in {property:?}; all ranges of a node are alike")
            }
            Self::InUse { node, used, ranges } => {
                write!(f, "node {node} has {used} frames in use and {ranges} ranges; free and remove them first")
            }
            Self::Frames(cause) => cause.fmt(f),
        }
    }
}

impl core::error::Error for NodeError {}

impl From<FramesError> for NodeError {
    fn from(cause: FramesError) -> Self {
        Self::Frames(cause)
    }
}

/// Proof of owning a node (R3). Cannot be made or copied; only registering a node gives one.
#[derive(Debug, PartialEq, Eq)]
pub struct Owner {
    table: u64,
    serial: u64,
    node: NodeId,
}

impl Owner {
    /// The node owned.
    pub const fn node(&self) -> NodeId {
        self.node
    }
}

/// A registered node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) spec: NodeSpec,
    pub(crate) frames: Frames,
    pub(crate) watermarks: Watermarks,
    serial: u64,
}

/// The register of nodes, and of the grants on them.
///
/// ```
/// use spmem_core::frames::Metadata;
/// use spmem_core::node::{Class, Guard, NodeSpec, NodeTable, NodeType, Services};
/// use spmem_core::units::{FrameCount, NodeId};
/// let cram = NodeSpec {
///     node_type: NodeType::Spm,
///     class: Class::Featured,
///     services: Services::MIGRATION | Services::RECLAIM,
///     guard: Guard::Hard,
///     owner: "cram".into(),
/// };
/// let mut table = NodeTable::new();
/// let owner = table.register(NodeId::ONE, cram.clone()).unwrap();
/// let lent = Metadata::from_heap(FrameCount(1024)).unwrap();
/// table.add_range(&owner, &cram, FrameCount(1024), lent).unwrap();
/// assert!(table.spm().contains(NodeId::ONE) && !table.sysram().contains(NodeId::ONE));
/// assert!(table.register(NodeId::ONE, cram).is_err());
/// ```
#[derive(Debug)]
pub struct NodeTable {
    id: u64,
    next_serial: u64,
    nodes: Vec<Option<Box<Node>>>,
    present: NodeMask,
    sysram: NodeMask,
    spm: NodeMask,
    easy: NodeMask,
    pub(crate) grants: Grants,
}

impl Default for NodeTable {
    fn default() -> Self {
        Self::new()
    }
}

impl NodeTable {
    /// A table without nodes.
    pub fn new() -> Self {
        /// Tells tables apart, so that a token of one is worth nothing in another. Relaxed: only the value matters.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            id,
            next_serial: 0,
            nodes: Vec::new(),
            present: NodeMask::EMPTY,
            sysram: NodeMask::EMPTY,
            spm: NodeMask::EMPTY,
            easy: NodeMask::EMPTY,
            grants: Grants::new(id),
        }
    }

    /// Registers a node without frames; latches its type (R1) and fixes its services (R3).
    ///
    /// # Errors
    /// [`NodeError::TypeLatched`] or [`NodeError::AlreadyRegistered`] when the node is registered;
    /// [`NodeError::ServiceNeeds`].
    pub fn register(&mut self, node: NodeId, spec: NodeSpec) -> Result<Owner, NodeError> {
        spec.services.check()?;
        if let Some(present) = self.node(node) {
            let latched = present.spec.node_type;
            return Err(if latched == spec.node_type {
                NodeError::AlreadyRegistered { node }
            } else {
                NodeError::TypeLatched { node, latched }
            });
        }
        self.present.insert(node);
        match spec.node_type {
            NodeType::Sysram => self.sysram.insert(node),
            NodeType::Spm => self.spm.insert(node),
        }
        if spec.node_type == NodeType::Spm && spec.guard == Guard::Easy {
            self.easy.insert(node);
        }
        if self.nodes.len() <= node.index() {
            self.nodes.resize_with(node.index() + 1, || None);
        }
        let serial = self.next_serial;
        self.next_serial += 1;
        let (frames, watermarks) = (Frames::new(), Watermarks::default());
        self.nodes[node.index()] = Some(Box::new(Node { spec, frames, watermarks, serial }));
        Ok(Owner { table: self.id, serial, node })
    }

    /// Adds free frames to a node; `spec` says what they are and must be what the node is (R3). `lent` is sysram (R7).
    ///
    /// # Errors
    /// [`NodeError::NotOwner`], [`NodeError::Conflict`], [`NodeError::Frames`].
    pub fn add_range(
        &mut self,
        owner: &Owner,
        spec: &NodeSpec,
        count: FrameCount,
        lent: Metadata,
    ) -> Result<FrameRange, NodeError> {
        let node = self.owned(owner)?;
        if let Some(property) = node.spec.conflict(spec) {
            return Err(NodeError::Conflict { node: owner.node, property });
        }
        Ok(node.frames.add_range(count, lent)?)
    }

    /// Takes a range away from a node; none of its frames may be in use. What was lent for it comes back.
    ///
    /// # Errors
    /// [`NodeError::NotOwner`], [`NodeError::Frames`].
    pub fn remove_range(
        &mut self,
        owner: &Owner,
        first: FrameNumber,
    ) -> Result<(FrameRange, Metadata), NodeError> {
        Ok(self.owned(owner)?.frames.remove_range(first)?)
    }

    /// Unregisters a node without frames or ranges (R1) and takes it out of every grant; the owner's token is worth
    /// nothing afterwards. The node may be registered anew, with another type.
    ///
    /// # Errors
    /// [`NodeError::NotOwner`], [`NodeError::InUse`].
    pub fn unregister(&mut self, owner: &Owner) -> Result<(), NodeError> {
        let node = owner.node;
        let frames = &self.owned(owner)?.frames;
        let (used, ranges) = (frames.used(), frames.ranges().len());
        if used.0 > 0 || ranges > 0 {
            return Err(NodeError::InUse { node, used, ranges });
        }
        self.nodes[node.index()] = None;
        for mask in [&mut self.present, &mut self.sysram, &mut self.spm, &mut self.easy] {
            mask.remove(node);
        }
        self.grants.forget_node(node);
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

    /// All registered nodes.
    pub const fn present(&self) -> &NodeMask {
        &self.present
    }

    /// What a node was registered as; `None` when it is not.
    pub fn spec(&self, node: NodeId) -> Option<&NodeSpec> {
        self.node(node).map(|node| &node.spec)
    }

    /// The frames of a node, to look at; `None` when it is not registered.
    pub fn frames(&self, node: NodeId) -> Option<&Frames> {
        self.node(node).map(|node| &node.frames)
    }

    /// Tells this table from every other.
    pub(crate) const fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn node(&self, node: NodeId) -> Option<&Node> {
        self.nodes.get(node.index())?.as_deref()
    }

    pub(crate) fn node_mut(&mut self, node: NodeId) -> Option<&mut Node> {
        self.nodes.get_mut(node.index())?.as_deref_mut()
    }

    /// Whether the token is the current one of its node.
    pub(crate) fn is_owner(&self, owner: &Owner) -> bool {
        owner.table == self.id && self.node(owner.node).is_some_and(|node| node.serial == owner.serial)
    }

    fn owned(&mut self, owner: &Owner) -> Result<&mut Node, NodeError> {
        let table = self.id;
        self.node_mut(owner.node)
            .filter(|node| node.serial == owner.serial && table == owner.table)
            .ok_or(NodeError::NotOwner { node: owner.node })
    }
}
