//! Nodes: what kinds of memory there are, who owns each, and what may be done on it (R1-R3).
//!
//! The words for it: [`NodeSpec`] says what a node is registered as in the [`Registry`](crate::registry::Registry), and
//! [`Owner`] proves who registered it.

use alloc::borrow::Cow;
use core::fmt;

use bitflags::bitflags;

use crate::frames::FramesError;
use crate::units::{FrameCount, NodeId};

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

    /// The class with this number; `None` but for 1 to 6.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Plain,
            2 => Self::Slower,
            3 => Self::Slow,
            4 => Self::Featured,
            5 => Self::Accelerator,
            6 => Self::Shared,
            _ => return None,
        })
    }

    /// What memory of this class is for unless somebody says otherwise: what does something of its own, belongs to an
    /// accelerator, is shared or outlives a reboot is nothing to land on by accident.
    pub const fn usual_type(self) -> NodeType {
        match self {
            Self::Plain | Self::Slower | Self::Slow => NodeType::Sysram,
            Self::Featured | Self::Accelerator | Self::Shared => NodeType::Spm,
        }
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
        /// Programs may name it in memory policies; without it an SPM node has a hard guard.
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
    /// A program may also name the node, with strict bind (R9); needs [`Services::USER_NUMA`] (R3).
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

impl NodeSpec {
    /// Checks that the services have those that they and the guard stand on (R3).
    ///
    /// # Errors
    /// [`NodeError::ServiceNeeds`], [`NodeError::GuardNeeds`].
    ///
    /// ```
    /// use spmem_core::node::{Class, Guard, NodeError, NodeSpec, NodeType, Services};
    /// let services = Services::RECLAIM;
    /// let spec = NodeSpec { node_type: NodeType::Spm, class: Class::Slow, services, guard: Guard::Easy, owner: "cxl".into() };
    /// assert_eq!(spec.check(), Err(NodeError::GuardNeeds { missing: Services::USER_NUMA }));
    /// assert!(NodeSpec { guard: Guard::Hard, ..spec }.check().is_ok());
    /// ```
    pub fn check(&self) -> Result<(), NodeError> {
        self.services.check()?;
        let missing = Services::USER_NUMA - self.services;
        if self.node_type == NodeType::Spm && self.guard == Guard::Easy && !missing.is_empty() {
            return Err(NodeError::GuardNeeds { missing });
        }
        Ok(())
    }
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
    pub(crate) fn conflict(&self, other: &Self) -> Option<Property> {
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
    /// An easy guard lets programs name the node, which stands on a service that is missing (R3, R9).
    GuardNeeds {
        /// What it needs.
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
    /// The metadata lent for a range does not lie on a sysram node (R7).
    MetadataOn {
        /// Where it lies.
        node: NodeId,
    },
    /// Metadata of another node's ranges lies on the node, which therefore stays sysram (R7).
    Lends {
        /// The node.
        node: NodeId,
        /// The other one.
        to: NodeId,
    },
    /// The range was refused, or there is no memory left to record the node.
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
            Self::GuardNeeds { missing } => write!(f, "an easy guard needs the service {missing}"),
            Self::Conflict { node, property } => {
                write!(f, "the range differs from node {node} in {property:?}; all ranges of a node are alike")
            }
            Self::InUse { node, used, ranges } => {
                write!(f, "node {node} has {used} frames in use and {ranges} ranges; free and remove them first")
            }
            Self::MetadataOn { node } => {
                write!(f, "the metadata lies on node {node}, which is not sysram; lend memory of a sysram node")
            }
            Self::Lends { node, to } => {
                write!(f, "metadata of node {to} lies on node {node}; remove the ranges that it is lent for first")
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
    pub(crate) registry: u64,
    pub(crate) serial: u64,
    pub(crate) node: NodeId,
}

impl Owner {
    /// The node owned.
    pub const fn node(&self) -> NodeId {
        self.node
    }
}
