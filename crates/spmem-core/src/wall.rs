//! The wall: which nodes may a request use? (R2, R6-R11)
//!
//! [`allowed`] turns a [`Request`] into the set that it never leaves, or into a [`Refusal`] that says what would
//! change the answer. [`MemoryManager::alloc`](crate::mm::MemoryManager::alloc) and `spm explain` ask the same
//! function. Takes no lock, changes nothing.
//!
//! Holes: the root domain only. A preferred mask is not widened to the default when its nodes are full (R6): name
//! the nodes to fall back to in the mask.

use core::fmt;

use crate::grant::{Grant, GrantError, Rights};
use crate::node::{Guard, NodeTable, NodeType};
use crate::nodemask::NodeMask;
use crate::units::NodeId;

/// The root of the domain tree: which nodes everything below may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Domain {
    mems: NodeMask,
    mems_sysram: NodeMask,
}

impl Domain {
    /// A root domain without limits: all nodes possible, all sysram by default.
    pub const fn root() -> Self {
        Self::new(NodeMask::EMPTY, NodeMask::EMPTY)
    }

    /// A root domain with configured masks: `mems` the possible nodes, `mems_sysram` the default ones. An empty mask
    /// sets no limit (R4).
    pub const fn new(mems: NodeMask, mems_sysram: NodeMask) -> Self {
        Self { mems, mems_sysram }
    }

    /// The nodes that requests of this domain can reach at all (R4); no limit when none of `mems` is registered.
    ///
    /// ```
    /// use spmem_core::{node::NodeTable, nodemask::NodeMask, units::NodeId, wall::Domain};
    /// let table = NodeTable::new(); // nothing registered: nothing effective, whatever is configured
    /// let domain = Domain::new(NodeId::ONE.into(), NodeMask::EMPTY);
    /// assert!(domain.effective(&table).is_empty());
    /// ```
    pub fn effective(&self, table: &NodeTable) -> NodeMask {
        let limited = self.mems.intersection(table.present());
        if limited.is_empty() { *table.present() } else { limited }
    }

    /// The nodes that a request without a mask gets (R4).
    pub fn default_mask(&self, table: &NodeTable) -> NodeMask {
        let reachable = self.effective(table).intersection(table.sysram());
        if self.mems_sysram.is_empty() { reachable } else { reachable.intersection(&self.mems_sysram) }
    }
}

/// How strongly a program names its nodes: the kernel's memory policies, mempolicy(7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Strictness {
    /// These nodes and no other (`MPOL_BIND`).
    #[default]
    Bind,
    /// Rather this node (`MPOL_PREFERRED`).
    Preferred,
    /// Rather these nodes (`MPOL_PREFERRED_MANY`).
    PreferredMany,
    /// These nodes in turn (`MPOL_INTERLEAVE`).
    Interleave,
    /// These nodes in turn, by weight (`MPOL_WEIGHTED_INTERLEAVE`).
    WeightedInterleave,
}

impl fmt::Display for Strictness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bind => "bind",
            Self::Preferred => "preferred",
            Self::PreferredMany => "preferred-many",
            Self::Interleave => "interleave",
            Self::WeightedInterleave => "weighted interleave",
        })
    }
}

/// Whether a request may take frames below a node's `min` watermark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reserve {
    /// Leaves the reserve alone.
    #[default]
    Keep,
    /// May use it: the request is needed to free memory.
    Use,
}

/// A request for memory.
///
/// ```
/// use spmem_core::wall::{Domain, Request, Strictness};
/// let root = Domain::root();
/// let request = Request { strictness: Strictness::Interleave, ..Request::of(&root) };
/// assert!(request.asked.is_none() && request.grants.is_empty());
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// The nodes named; `None` for the default of the domain.
    pub asked: Option<NodeMask>,
    /// How strongly they are named.
    pub strictness: Strictness,
    /// Where the request comes from; `None` gets sysram only (R7).
    pub domain: Option<&'a Domain>,
    /// The grants shown; the first that covers a node is charged.
    pub grants: &'a [&'a Grant],
    /// Whether the reserve may be used.
    pub reserve: Reserve,
}

impl<'a> Request<'a> {
    /// A plain request out of a domain: its default nodes, no grant.
    pub const fn of(domain: &'a Domain) -> Self {
        Self {
            asked: None,
            strictness: Strictness::Bind,
            domain: Some(domain),
            grants: &[],
            reserve: Reserve::Keep,
        }
    }

    /// A component's request for one node, with the grants that open it.
    pub const fn on(domain: &'a Domain, node: NodeId, grants: &'a [&'a Grant]) -> Self {
        Self { asked: Some(NodeMask::of(node)), grants, ..Self::of(domain) }
    }
}

/// Why no node was allowed (R8, R11): the first node asked for, and what stood in its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The lowest node named; `None` when none was.
    pub node: Option<NodeId>,
    /// What refused it.
    pub reason: Reason,
}

/// What stood in the way of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The request names no node.
    NothingAsked,
    /// The domain's default mask is empty.
    NoDefault,
    /// No such node is registered.
    Absent,
    /// Without a domain there is sysram only (R7).
    NoDomain,
    /// The root domain's `mems` lacks the node (R6).
    OutsideDomain,
    /// The node is SPM and no grant shown names it (R6).
    NeedsGrant {
        /// How hard its wall is.
        guard: Guard,
        /// How the node was named; on an easy node bind would do (R9).
        strictness: Strictness,
    },
    /// A grant names the node but lacks this right (R6).
    LacksRight {
        /// The right.
        right: Rights,
    },
    /// A grant was shown that is not valid.
    BadGrant {
        /// Why not.
        cause: GrantError,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(node) = self.node {
            write!(f, "node {node}: ")?;
        }
        match self.reason {
            Reason::NothingAsked => f.write_str("the mask is empty; name a node or leave the mask out"),
            Reason::NoDefault => {
                f.write_str("the root domain's default mask holds no sysram node; widen its mems or mems.sysram")
            }
            Reason::Absent => f.write_str("not registered; see the list of nodes"),
            Reason::NoDomain => {
                f.write_str("a request without a domain gets sysram only; make it from within a domain")
            }
            Reason::OutsideDomain => f.write_str("outside the root domain; add the node to its mems"),
            Reason::NeedsGrant { guard: Guard::Hard, .. } => {
                f.write_str("walled off (spm, hard guard); a grant from its owner with ALLOC would open it")
            }
            Reason::NeedsGrant { guard: Guard::Easy, strictness } => write!(
                f,
                "walled off (spm, easy guard) and named with {strictness}; strict bind would open it, or a grant \
                 from its owner with ALLOC"
            ),
            Reason::LacksRight { right } => {
                write!(f, "the grant lacks the right {right}; ask the node's owner for one that has it")
            }
            Reason::BadGrant { cause } => write!(f, "walled off, and {cause}"),
        }
    }
}

impl core::error::Error for Refusal {}

/// The nodes that a request may use; it never leaves them (R6). Nodes asked for and not allowed are dropped silently
/// as long as one is left (R8).
///
/// # Errors
/// [`Refusal`] when none is left: why, and what would change it (R11).
///
/// ```
/// # use spmem_core::node::{Class, Guard, NodeSpec, NodeTable, NodeType, Services};
/// use spmem_core::{nodemask::NodeMask, units::NodeId, wall::{Domain, Request, allowed}};
/// # let spec = |node_type| NodeSpec { node_type, class: Class::Plain, services: Services::empty(),
/// #     guard: Guard::Hard, owner: "doc".into() };
/// let mut table = NodeTable::new();
/// table.register(NodeId::ZERO, spec(NodeType::Sysram)).unwrap();
/// table.register(NodeId::ONE, spec(NodeType::Spm)).unwrap();
/// let root = Domain::root();
/// let wide = Request { asked: Some(NodeMask::ALL), ..Request::of(&root) };
/// assert_eq!(allowed(&table, &wide), Ok(NodeId::ZERO.into()));
/// let refusal = allowed(&table, &Request::on(&root, NodeId::ONE, &[])).unwrap_err();
/// assert!(refusal.to_string().contains("a grant from its owner with ALLOC would open it"));
/// ```
pub fn allowed(table: &NodeTable, request: &Request<'_>) -> Result<NodeMask, Refusal> {
    let mask = match (&request.asked, request.domain) {
        (None, None) => *table.sysram(),
        (Some(asked), None) => asked.intersection(table.sysram()),
        (None, Some(domain)) => domain.default_mask(table),
        (Some(asked), Some(domain)) => {
            asked.intersection(&domain.effective(table)).intersection(&open(table, request))
        }
    };
    if mask.is_empty() { Err(refusal(table, request)) } else { Ok(mask) }
}

/// The nodes without a wall for this request: sysram, what its grants open (R6), easy nodes under strict bind (R9).
fn open(table: &NodeTable, request: &Request<'_>) -> NodeMask {
    let mut open = *table.sysram();
    for grant in request.grants {
        open = open.union(&table.grants.nodes_with(grant, Rights::ALLOC));
    }
    if request.strictness == Strictness::Bind {
        open = open.union(table.easy());
    }
    open
}

#[cold]
fn refusal(table: &NodeTable, request: &Request<'_>) -> Refusal {
    let Some(asked) = &request.asked else {
        return Refusal { node: None, reason: Reason::NoDefault };
    };
    let node = asked.first();
    Refusal { node, reason: node.map_or(Reason::NothingAsked, |node| reason(table, request, node)) }
}

/// What kept the request from `node`.
fn reason(table: &NodeTable, request: &Request<'_>, node: NodeId) -> Reason {
    let Some(spec) = table.spec(node) else { return Reason::Absent };
    let Some(domain) = request.domain else { return Reason::NoDomain };
    if !domain.effective(table).contains(node) {
        return Reason::OutsideDomain;
    }
    debug_assert_eq!(spec.node_type, NodeType::Spm, "a reachable sysram node is allowed");
    for grant in request.grants {
        match table.grant_info(grant) {
            Ok(info) if info.nodes.contains(node) => return Reason::LacksRight { right: Rights::ALLOC },
            Ok(_) => {}
            Err(cause) => return Reason::BadGrant { cause },
        }
    }
    Reason::NeedsGrant { guard: spec.guard, strictness: request.strictness }
}
