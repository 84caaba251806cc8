//! The wall: which nodes may a request use? (R2, R6-R11)
//!
//! [`Registry::admit`] turns a [`Request`] into a [`Pass`], which holds the set of nodes that is never left, or into a
//! [`Refusal`] that says what would change the answer. [`MemoryManager::alloc`](crate::mm::MemoryManager::alloc) and
//! `spm explain` ask the same function. A pass may be kept: it is worked out anew when a node, domain or grant has
//! changed, so a check costs a comparison (measured: `cargo xtask bench wall`). Takes no lock.
//!
//! Hole: a preferred mask is not widened to the default when its nodes are full (R6): name the nodes to fall back to in
//! the mask.

mod refusal;

use alloc::vec::Vec;
use core::fmt;

use crate::grant::{Grant, GrantId, Rights};
use crate::node::NodeType;
use crate::nodemask::NodeMask;
use crate::registry::Registry;
use crate::units::{DomainId, NodeId};

pub use self::refusal::{Reason, Refusal};

/// Grants that a request may show.
pub const MAX_SHOWN: usize = 16;

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
/// use spmem_core::{units::DomainId, wall::{Request, Strictness}};
/// let request = Request { strictness: Strictness::Interleave, ..Request::of(DomainId::ROOT) };
/// assert!(request.asked.is_none() && request.grants.is_empty());
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// The nodes named; `None` for the default of the domain.
    pub asked: Option<NodeMask>,
    /// How strongly they are named.
    pub strictness: Strictness,
    /// Where the request comes from; `None` gets sysram only (R7).
    pub domain: Option<DomainId>,
    /// The grants shown, at most [`MAX_SHOWN`]; the first that covers a node is charged.
    pub grants: &'a [&'a Grant],
    /// Whether the reserve may be used.
    pub reserve: Reserve,
}

impl<'a> Request<'a> {
    /// A plain request out of a domain: its default nodes, no grant.
    pub const fn of(domain: DomainId) -> Self {
        Self {
            asked: None,
            strictness: Strictness::Bind,
            domain: Some(domain),
            grants: &[],
            reserve: Reserve::Keep,
        }
    }

    /// A component's request for one node, with the grants that open it.
    pub const fn on(domain: DomainId, node: NodeId, grants: &'a [&'a Grant]) -> Self {
        Self { asked: Some(NodeMask::of(node)), grants, ..Self::of(domain) }
    }
}

/// A request that the wall let through, to be used any number of times. Good for as long as the answer is: a pass looks
/// again when the [`Registry`] has changed, and is refused as the request would be.
#[derive(Debug)]
pub struct Pass {
    registry: u64,
    epoch: u64,
    /// The answer at that epoch.
    allowed: NodeMask,
    asked: Option<NodeMask>,
    strictness: Strictness,
    domain: Option<DomainId>,
    grants: Vec<GrantId>,
    pub(crate) reserve: Reserve,
    /// The node that interleaving used last.
    pub(crate) last_interleaved: Option<NodeId>,
}

impl Pass {
    /// The nodes that may be used now; never any other (R6).
    ///
    /// # Errors
    /// [`Refusal`] when something has changed and none is left.
    ///
    /// # Panics
    /// When the pass is another registry's.
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
    /// use spmem_core::{nodemask::NodeMask, registry::Registry, units::{DomainId, NodeId}, wall::Request};
    /// # let spec = || NodeSpec { node_type: NodeType::Sysram, class: Class::Plain, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "doc".into() };
    /// let mut registry = Registry::new();
    /// registry.register(NodeId::ZERO, spec()).unwrap();
    /// let mut pass = registry.admit(&Request::of(DomainId::ROOT)).unwrap();
    /// assert_eq!(pass.allowed(&registry), Ok(&NodeId::ZERO.into()));
    /// let owner = registry.register(NodeId::ONE, spec()).unwrap();
    /// assert_eq!(pass.allowed(&registry), Ok(&[NodeId::ZERO, NodeId::ONE].into_iter().collect()));
    /// ```
    #[inline]
    pub fn allowed(&mut self, registry: &Registry) -> Result<&NodeMask, Refusal> {
        self.renew(registry)?;
        Ok(&self.allowed)
    }

    /// Makes sure that the answer is today's.
    #[inline]
    pub(crate) fn renew(&mut self, registry: &Registry) -> Result<(), Refusal> {
        let is_current = self.epoch == registry.epoch() && self.registry == registry.id();
        if is_current { Ok(()) } else { self.look_again(registry) }
    }

    /// The nodes that could be used when that was last worked out.
    pub const fn mask(&self) -> &NodeMask {
        &self.allowed
    }

    /// Where the request comes from.
    pub const fn domain(&self) -> Option<DomainId> {
        self.domain
    }

    pub(crate) const fn strictness(&self) -> Strictness {
        self.strictness
    }

    /// The grants shown.
    pub(crate) fn grants(&self) -> &[GrantId] {
        &self.grants
    }

    #[cold]
    fn look_again(&mut self, registry: &Registry) -> Result<(), Refusal> {
        assert!(self.registry == registry.id(), "a pass is used with the registry that gave it");
        self.allowed = self.work_out(registry)?;
        self.epoch = registry.epoch();
        Ok(())
    }

    /// R6, R7, R9.
    fn work_out(&self, registry: &Registry) -> Result<NodeMask, Refusal> {
        let Some(domain) = self.domain else {
            let mask = self.asked.map_or(*registry.sysram(), |asked| asked.intersection(registry.sysram()));
            return if mask.is_empty() { Err(self.refusal(registry)) } else { Ok(mask) };
        };
        let Some((effective, default)) = registry.domains.masks(domain) else {
            return Err(Refusal { node: None, reason: Reason::UnknownDomain { domain } });
        };
        let mask = match &self.asked {
            None => *default,
            Some(asked) => asked.intersection(effective).intersection(&self.open(registry)),
        };
        if mask.is_empty() { Err(self.refusal(registry)) } else { Ok(mask) }
    }

    /// The nodes without a wall for this request: sysram, what its grants open (R6), easy nodes under strict bind (R9).
    fn open(&self, registry: &Registry) -> NodeMask {
        let mut open = *registry.sysram();
        for &grant in &self.grants {
            if let Ok(nodes) = registry.grants.nodes_with(grant, Rights::ALLOC) {
                open = open.union(&nodes);
            }
        }
        if self.strictness == Strictness::Bind {
            open = open.union(registry.easy());
        }
        open
    }

    #[cold]
    fn refusal(&self, registry: &Registry) -> Refusal {
        let Some(asked) = &self.asked else {
            return Refusal { node: None, reason: Reason::NoDefault };
        };
        let node = asked.first();
        Refusal { node, reason: node.map_or(Reason::NothingAsked, |node| self.reason(registry, node)) }
    }

    /// What keeps the request from `node`, which is not allowed.
    fn reason(&self, registry: &Registry, node: NodeId) -> Reason {
        let Some(spec) = registry.spec(node) else { return Reason::Absent };
        let Some(domain) = self.domain else { return Reason::NoDomain };
        if let Some(domain) = registry.limiting_domain(domain, node) {
            return Reason::OutsideDomain { domain };
        }
        debug_assert_eq!(spec.node_type, NodeType::Spm, "a reachable sysram node is allowed");
        for &grant in &self.grants {
            match registry.grants.nodes(grant) {
                Ok(nodes) if nodes.contains(node) => return Reason::LacksRight { right: Rights::ALLOC },
                Ok(_) => {}
                Err(cause) => return Reason::BadGrant { cause },
            }
        }
        Reason::NeedsGrant { guard: spec.guard, strictness: self.strictness }
    }
}

impl Registry {
    /// Lets a request through the wall. Nodes asked for and not allowed are dropped silently as long as one is left (R8).
    ///
    /// # Errors
    /// [`Refusal`] when none is left: why, and what would change it (R11).
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
    /// use spmem_core::{nodemask::NodeMask, registry::Registry, units::{DomainId, NodeId}, wall::Request};
    /// # let spec = |node_type| NodeSpec { node_type, class: Class::Plain, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "doc".into() };
    /// let mut registry = Registry::new();
    /// registry.register(NodeId::ZERO, spec(NodeType::Sysram)).unwrap();
    /// registry.register(NodeId::ONE, spec(NodeType::Spm)).unwrap();
    /// let wide = Request { asked: Some(NodeMask::ALL), ..Request::of(DomainId::ROOT) };
    /// let mut pass = registry.admit(&wide).unwrap();
    /// assert_eq!(pass.allowed(&registry), Ok(&NodeId::ZERO.into()));
    /// let refusal = registry.admit(&Request::on(DomainId::ROOT, NodeId::ONE, &[])).unwrap_err();
    /// assert!(refusal.to_string().contains("a grant from its owner with ALLOC would open it"));
    /// ```
    pub fn admit(&self, request: &Request<'_>) -> Result<Pass, Refusal> {
        let node = request.asked.as_ref().and_then(NodeMask::first);
        if request.grants.len() > MAX_SHOWN {
            return Err(Refusal { node, reason: Reason::TooManyGrants { shown: request.grants.len() } });
        }
        let mut grants = Vec::new();
        let mut foreign = None;
        for grant in request.grants {
            match self.grants.own(grant) {
                Ok(id) => grants.push(id),
                Err(cause) => foreign = Some(cause),
            }
        }
        let mut pass = Pass {
            registry: self.id(),
            epoch: self.epoch(),
            allowed: NodeMask::EMPTY,
            asked: request.asked,
            strictness: request.strictness,
            domain: request.domain,
            grants,
            reserve: request.reserve,
            last_interleaved: None,
        };
        match pass.work_out(self) {
            Ok(allowed) => {
                pass.allowed = allowed;
                Ok(pass)
            }
            Err(Refusal { node, reason: Reason::NeedsGrant { .. } }) if let Some(cause) = foreign => {
                Err(Refusal { node, reason: Reason::BadGrant { cause } })
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// What stands between a request and one node, whatever else it asks for; `None` when nothing does.
    pub fn obstacle(&self, request: &Request<'_>, node: NodeId) -> Option<Refusal> {
        let one = Request { asked: Some(NodeMask::of(node)), ..*request };
        self.admit(&one).err()
    }
}
