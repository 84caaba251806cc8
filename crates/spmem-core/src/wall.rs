//! The wall: which nodes may a request use? (R2, R6-R11)
//!
//! [`Registry::admit`] turns a [`Request`] into a [`Pass`], which holds the set of nodes that is never left, or into a
//! [`Refusal`] that says what would change the answer. [`MemoryManager::alloc`](crate::mm::MemoryManager::alloc) and
//! `spm explain` ask the same function. A pass may be kept: it is worked out anew when a node, domain or grant has
//! changed, so a check costs a comparison (measured: `cargo xtask bench wall`). Takes no lock.

mod refusal;

use alloc::vec::Vec;

use crate::grant::{Grant, GrantId, Rights};
use crate::node::NodeType;
use crate::nodemask::NodeMask;
use crate::policy::{Bound, Context, Flags, Mode, Policy, Turns};
use crate::registry::Registry;
use crate::units::{DomainId, NodeId};

pub use self::refusal::{Reason, Refusal};

/// Grants that a request may show.
pub const MAX_SHOWN: usize = 16;

/// Whether a request may take frames below a node's `min` watermark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reserve {
    /// Leaves the reserve alone.
    #[default]
    Keep,
    /// May use it: the request is needed to free memory.
    Use,
}

/// Whether the holder of a block can be asked to move it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mobility {
    /// It stays where it is until it is freed.
    #[default]
    Unmovable,
    /// Its holder moves it when a plan says so ([`migrate`](crate::migrate)).
    Movable,
}

/// A request for memory.
///
/// ```
/// use spmem_core::{nodemask::NodeMask, policy::{Flags, Mode, Policy}, units::DomainId, wall::Request};
/// let policy = Policy::new(Mode::Interleave, Flags::empty(), NodeMask::ALL).unwrap();
/// let request = Request { policy, ..Request::of(DomainId::ROOT) };
/// assert!(request.grants.is_empty());
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// The nodes named and how strongly; the default of the domain if none are.
    pub policy: Policy,
    /// The node of the processor that it runs on, if that matters: what is nearest to it comes first.
    pub local: Option<NodeId>,
    /// Where the request comes from; `None` gets sysram only (R7).
    pub domain: Option<DomainId>,
    /// The grants shown, at most [`MAX_SHOWN`]; the first that covers a node is charged.
    pub grants: &'a [&'a Grant],
    /// Whether the reserve may be used.
    pub reserve: Reserve,
    /// Whether what is given can be moved later.
    pub mobility: Mobility,
}

impl<'a> Request<'a> {
    /// A plain request out of a domain: its default nodes, no grant.
    pub const fn of(domain: DomainId) -> Self {
        Self {
            policy: Policy::DEFAULT,
            local: None,
            domain: Some(domain),
            grants: &[],
            reserve: Reserve::Keep,
            mobility: Mobility::Unmovable,
        }
    }

    /// A component's request for one node, with the grants that open it.
    pub const fn on(domain: DomainId, node: NodeId, grants: &'a [&'a Grant]) -> Self {
        Self { policy: Policy::bind(NodeMask::of(node)), grants, ..Self::of(domain) }
    }
}

/// A request that the wall let through, to be used any number of times. Good for as long as the answer is: a pass looks
/// again when the [`Registry`] has changed, and is refused as the request would be. Nodes of a policy that follow a change of
/// masks go from the last answer to today's at once: of changes that came and went in between it knows nothing, where Linux
/// rebinds at each.
#[derive(Debug)]
pub struct Pass {
    registry: u64,
    epoch: u64,
    /// The answer at that epoch.
    allowed: NodeMask,
    /// The policy as it holds then; `None` before the first answer.
    bound: Option<Bound>,
    /// The nodes that it chooses from, in the order in which they are tried, ...
    pub(crate) chosen: Vec<NodeId>,
    /// ... and those that follow when they are full.
    pub(crate) fallback: Vec<NodeId>,
    pub(crate) turns: Turns,
    policy: Policy,
    local: Option<NodeId>,
    domain: Option<DomainId>,
    /// Of the domain that was asked for: its number may name another one later.
    serial: Option<u64>,
    grants: Vec<GrantId>,
    /// What a grant must carry to open a node.
    pub(crate) right: Rights,
    pub(crate) reserve: Reserve,
    pub(crate) mobility: Mobility,
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
    /// let owner = registry.register(NodeId::ONE, spec()).unwrap().owner;
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

    /// What was asked for.
    pub const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The nodes that the policy chooses from: of [`Pass::mask`], those that are not what it falls back to.
    pub fn nodes(&self) -> NodeMask {
        self.bound.as_ref().map_or(NodeMask::EMPTY, Bound::nodes)
    }

    /// The nodes in the order in which they are tried: those that the policy chooses from, then those that it falls back to;
    /// `None` where they are taken in turn. As of when that was last worked out.
    pub fn order(&self) -> Option<impl Iterator<Item = NodeId> + '_> {
        let is_in_turn = self.policy.mode().is_interleaved() && !self.chosen.is_empty();
        (!is_in_turn).then(|| self.chosen.iter().chain(&self.fallback).copied())
    }

    /// The grants shown.
    pub(crate) fn grants(&self) -> &[GrantId] {
        &self.grants
    }

    #[cold]
    fn look_again(&mut self, registry: &Registry) -> Result<(), Refusal> {
        assert!(self.registry == registry.id(), "a pass is used with the registry that gave it");
        self.work_out(registry)?;
        self.epoch = registry.epoch();
        Ok(())
    }

    /// R6, R7, R9.
    fn work_out(&mut self, registry: &Registry) -> Result<(), Refusal> {
        let sysram = registry.sysram();
        let (effective, default) = match self.domain {
            None => (sysram, sysram),
            Some(domain) => registry
                .domains
                .masks(domain)
                .filter(|_| registry.domains.serial(domain) == self.serial)
                .ok_or(Refusal { node: None, reason: Reason::UnknownDomain { domain } })?,
        };
        let (granted, easy) = match self.domain {
            None => (NodeMask::EMPTY, NodeMask::EMPTY),
            Some(_) => (self.granted(registry), *registry.easy()),
        };
        let context = Context { effective: *effective, sysram: *sysram, granted, easy };
        let bound = match self.bound {
            None => self.policy.bind_to(&context),
            Some(mut bound) => bound.rebind(&context).then_some(bound),
        };
        let bound = bound.ok_or_else(|| self.refusal(registry))?;
        let chosen = bound.nodes();
        let fallback = if bound.falls_back() { default.difference(&chosen) } else { NodeMask::EMPTY };
        let allowed = chosen.union(&fallback);
        if allowed.is_empty() {
            return Err(self.refusal(registry));
        }
        let from =
            self.policy.home().or(self.local).or(chosen.first()).or(fallback.first()).unwrap_or(NodeId::ZERO);
        let list = |from, nodes: &NodeMask| {
            let no_memory = |_| Refusal { node: nodes.first(), reason: Reason::NoMemory };
            registry.distances().zonelist(from, nodes).map_err(no_memory)
        };
        let in_order = list(from, &chosen)?;
        // Preferred means the zonelist of its node; preferred-many that of where the task runs, once its own nodes are full
        // (`policy_nodemask` and `alloc_pages_preferred_many` in mm/mempolicy.c).
        let is_one = self.policy.mode() == Mode::Preferred;
        let from = in_order.first().copied().filter(|_| is_one).unwrap_or(from);
        self.fallback = list(from, &fallback)?;
        self.chosen = in_order;
        self.bound = Some(bound);
        self.allowed = allowed;
        Ok(())
    }

    /// The nodes that the grants shown open (R6).
    fn granted(&self, registry: &Registry) -> NodeMask {
        let nodes = self.grants.iter().filter_map(|&grant| registry.grants.nodes_with(grant, self.right).ok());
        nodes.fold(NodeMask::EMPTY, |open, nodes| open.union(&nodes))
    }

    #[cold]
    fn refusal(&self, registry: &Registry) -> Refusal {
        let is_counted = self.policy.flags().is_relative();
        if self.policy.nodes().is_empty() || is_counted {
            let is_bind = self.policy.mode() == Mode::Bind && !is_counted;
            let no_default =
                || Reason::NoDefault { domain: self.domain.and_then(|of| registry.leaves_no_sysram(of)) };
            return Refusal { node: None, reason: if is_bind { Reason::NothingAsked } else { no_default() } };
        }
        // A policy that is kept may have named ordinary nodes that it did not mean then, and does not mean now that they
        // are within reach: it is the others that it lacks.
        let named = self.policy.nodes();
        let within = self.domain.and_then(|domain| registry.effective(domain)).unwrap_or(registry.sysram());
        let lacking = named.difference(&within.intersection(registry.sysram()));
        // Of a preferred policy that is kept it is the one node that it means, whatever others have opened since.
        let node = self.bound.and_then(|bound| bound.wish()).or(lacking.first()).or(named.first());
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
                Ok(nodes) if nodes.contains(node) => return Reason::LacksRight { right: self.right },
                Ok(_) => {}
                Err(cause) => return Reason::BadGrant { cause },
            }
        }
        Reason::NeedsGrant { guard: spec.guard, mode: self.policy.mode() }
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
    /// use spmem_core::{nodemask::NodeMask, policy::Policy, registry::Registry, units::{DomainId, NodeId}, wall::Request};
    /// # let spec = |node_type| NodeSpec { node_type, class: Class::Plain, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "doc".into() };
    /// let mut registry = Registry::new();
    /// registry.register(NodeId::ZERO, spec(NodeType::Sysram)).unwrap();
    /// registry.register(NodeId::ONE, spec(NodeType::Spm)).unwrap();
    /// let wide = Request { policy: Policy::bind(NodeMask::ALL), ..Request::of(DomainId::ROOT) };
    /// let mut pass = registry.admit(&wide).unwrap();
    /// assert_eq!(pass.allowed(&registry), Ok(&NodeId::ZERO.into()));
    /// let refusal = registry.admit(&Request::on(DomainId::ROOT, NodeId::ONE, &[])).unwrap_err();
    /// assert!(refusal.to_string().contains("a grant from its owner with ALLOC would open it"));
    /// ```
    pub fn admit(&self, request: &Request<'_>) -> Result<Pass, Refusal> {
        self.admit_for(request, request.grants, Rights::ALLOC)
    }

    /// Lets a request through for which `grants` open nodes with `right`.
    pub(crate) fn admit_for(
        &self,
        request: &Request<'_>,
        shown: &[&Grant],
        right: Rights,
    ) -> Result<Pass, Refusal> {
        let is_counted = request.policy.flags().is_relative();
        let node = request.policy.nodes().first().filter(|_| !is_counted);
        if shown.len() > MAX_SHOWN {
            return Err(Refusal { node, reason: Reason::TooManyGrants { shown: shown.len() } });
        }
        let mut grants = Vec::new();
        if grants.try_reserve_exact(shown.len()).is_err() {
            return Err(Refusal { node, reason: Reason::NoMemory });
        }
        let mut foreign = None;
        for grant in shown {
            match self.grants.own(grant) {
                Ok(id) => grants.push(id),
                Err(cause) => foreign = Some(cause),
            }
        }
        let mut pass = Pass {
            registry: self.id(),
            epoch: self.epoch(),
            allowed: NodeMask::EMPTY,
            bound: None,
            chosen: Vec::new(),
            fallback: Vec::new(),
            turns: Turns::default(),
            policy: request.policy,
            local: request.local,
            domain: request.domain,
            serial: request.domain.and_then(|domain| self.domains.serial(domain)),
            grants,
            right,
            reserve: request.reserve,
            mobility: request.mobility,
        };
        match (pass.work_out(self), foreign) {
            (Ok(()), _) => Ok(pass),
            (Err(Refusal { node, reason: Reason::NeedsGrant { .. } }), Some(cause)) => {
                Err(Refusal { node, reason: Reason::BadGrant { cause } })
            }
            (Err(refusal), _) => Err(refusal),
        }
    }

    /// Whether who shows `grants` may do with what lies on a node what `rights` say (R12): map it, move it off, pin it. On
    /// sysram everybody may, and on an easy node all but pin it, as everybody may allocate there (R9).
    ///
    /// # Errors
    /// [`Refusal`]: why not, and what would change it (R11).
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
    /// use spmem_core::{grant::{Rights, Terms}, registry::Registry, units::{Bytes, NodeId}};
    /// # let spec = NodeSpec { node_type: NodeType::Spm, class: Class::Plain, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "doc".into() };
    /// let mut registry = Registry::new();
    /// let owner = registry.register(NodeId::ONE, spec).unwrap().owner;
    /// let grant = registry.grant(&[&owner], Terms::new(Rights::MAP_READ, Bytes::mib(1))).unwrap();
    /// assert!(registry.check(NodeId::ONE, Rights::MAP_READ, &[&grant]).is_ok());
    /// assert!(registry.check(NodeId::ONE, Rights::MAP_READ | Rights::MAP_WRITE, &[&grant]).is_err());
    /// assert!(registry.check(NodeId::ONE, Rights::MAP_READ, &[]).is_err());
    /// ```
    pub fn check(&self, node: NodeId, rights: Rights, grants: &[&Grant]) -> Result<(), Refusal> {
        let refused = |reason| Err(Refusal { node: Some(node), reason });
        let Some(spec) = self.spec(node) else { return refused(Reason::Absent) };
        let is_open = self.easy().contains(node) && !rights.contains(Rights::PIN);
        if spec.node_type == NodeType::Sysram || is_open {
            return Ok(());
        }
        let mut reason = Reason::LacksRight { right: rights };
        for grant in grants {
            match self.grants.own(grant).and_then(|id| self.grants.allows(id, node, rights)) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(cause) => reason = Reason::BadGrant { cause },
            }
        }
        refused(reason)
    }

    /// What stands between a request and one node; `None` when nothing does, and the node is allowed.
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
    /// use spmem_core::policy::{Flags, Mode, Policy};
    /// use spmem_core::{registry::Registry, units::{DomainId, NodeId}, wall::{Reason, Request}};
    /// # let spec = || NodeSpec { node_type: NodeType::Spm, class: Class::Plain, services: Services::USER_NUMA,
    /// #     guard: Guard::Easy, owner: "doc".into() };
    /// # let mut registry = Registry::new();
    /// # registry.register(NodeId::ZERO, NodeSpec { node_type: NodeType::Sysram, guard: Guard::Hard, ..spec() }).unwrap();
    /// # registry.register(NodeId::ONE, spec()).unwrap();
    /// // Node 0 is sysram, node 1 SPM with an easy guard.
    /// let policy = |flags| Policy::new(Mode::Bind, flags, NodeId::ONE.into()).unwrap();
    /// let request = |flags| Request { policy: policy(flags), ..Request::of(DomainId::ROOT) };
    /// assert_eq!(registry.obstacle(&request(Flags::STATIC_NODES), NodeId::ONE), None);
    /// let refusal = registry.obstacle(&request(Flags::RELATIVE_NODES), NodeId::ONE).unwrap();
    /// assert_eq!(refusal.reason, Reason::Counted { is_spm: true });
    /// ```
    pub fn obstacle(&self, request: &Request<'_>, node: NodeId) -> Option<Refusal> {
        let pass = self.admit(request);
        if pass.as_ref().is_ok_and(|pass| pass.mask().contains(node)) {
            return None;
        }
        let policy = &request.policy;
        // What it would meet as the only one named, by its own number.
        let one = NodeMask::of(node);
        let alone = Policy::new(policy.mode(), Flags::STATIC_NODES, one).unwrap_or(Policy::bind(one));
        let alone = self.admit(&Request { policy: alone, ..*request }).err().map(|refusal| refusal.reason);
        let is_spm = self.spec(node).is_some_and(|spec| spec.node_type == NodeType::Spm);
        let is_counted = policy.mode().takes_nodes() && policy.flags().is_relative();
        // Preferred means the first node that it may use: those behind it never.
        let first =
            pass.ok().filter(|_| policy.mode() == Mode::Preferred && !is_counted && policy.nodes().contains(node));
        let first = first.and_then(|pass| pass.nodes().first()).filter(|&first| first < node);
        let reason = match (alone, first) {
            _ if is_counted && is_spm => Reason::Counted { is_spm },
            (Some(Reason::NeedsGrant { .. } | Reason::LacksRight { .. }) | None, Some(first)) => {
                Reason::NotFirst { first }
            }
            (Some(reason), _) => reason,
            _ if is_counted => Reason::Counted { is_spm },
            _ if policy.mode().takes_nodes() => Reason::NotNamed,
            _ => Reason::NotDefault { is_spm },
        };
        Some(Refusal { node: Some(node), reason })
    }
}
