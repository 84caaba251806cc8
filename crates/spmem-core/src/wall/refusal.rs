//! Refusals: why the wall let nobody through, as facts (R11).

use core::fmt;

use super::MAX_SHOWN;
use crate::grant::{GrantError, Rights};
use crate::node::Guard;
use crate::policy::Mode;
use crate::registry::Registry;
use crate::units::{DomainId, NodeId};

/// Why no node was allowed (R8, R11): the lowest node that was refused, and what stood in its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The lowest node named that is refused; `None` when none was named.
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
    NoDefault {
        /// The topmost domain, the one that asks or an ancestor, whose masks leave no sysram node; none where there is no
        /// sysram node to leave.
        domain: Option<DomainId>,
    },
    /// No such node is registered.
    Absent,
    /// Without a domain there is sysram only (R7).
    NoDomain,
    /// There is no such domain.
    UnknownDomain {
        /// As given.
        domain: DomainId,
    },
    /// The masks of this domain, where the request comes from or an ancestor of that, lack the node (R4, R6).
    OutsideDomain {
        /// The topmost that does.
        domain: DomainId,
    },
    /// More grants were shown than [`MAX_SHOWN`].
    TooManyGrants {
        /// How many.
        shown: usize,
    },
    /// The node is SPM and no grant shown names it (R6).
    NeedsGrant {
        /// How hard its wall is.
        guard: Guard,
        /// How the node was named; on an easy node bind would do (R9).
        mode: Mode,
    },
    /// No grant shown carries this right on the node (R6, R12).
    LacksRight {
        /// The right.
        right: Rights,
    },
    /// There is no memory for the lists that a pass holds.
    NoMemory,
    /// The request names no node, and this one is not in the domain's default mask.
    NotDefault {
        /// Whether it is SPM: in no default mask, ever (R4).
        is_spm: bool,
    },
    /// The request names other nodes.
    NotNamed,
    /// The request's numbers count the domain's sysram nodes (`MPOL_F_RELATIVE_NODES`), and do not lead here.
    Counted {
        /// Whether it is SPM: no number ever leads there.
        is_spm: bool,
    },
    /// Preferred means one node, and this is another.
    NotFirst {
        /// The first that it may use.
        first: NodeId,
    },
    /// A grant was shown that is not valid.
    BadGrant {
        /// Why not.
        cause: GrantError,
    },
}

impl Reason {
    /// A word for it, for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NothingAsked => "nothing-asked",
            Self::NoDefault { .. } => "no-default",
            Self::Absent => "absent",
            Self::NoDomain => "no-domain",
            Self::UnknownDomain { .. } => "unknown-domain",
            Self::OutsideDomain { .. } => "outside-domain",
            Self::TooManyGrants { .. } => "too-many-grants",
            Self::NeedsGrant { .. } => "needs-grant",
            Self::LacksRight { .. } => "lacks-right",
            Self::NoMemory => "no-memory",
            Self::NotDefault { .. } => "not-default",
            Self::NotNamed => "not-named",
            Self::Counted { .. } => "counted",
            Self::NotFirst { .. } => "not-first",
            Self::BadGrant { .. } => "bad-grant",
        }
    }

    /// What would change the answer.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::NothingAsked => "name a node or leave the mask out",
            Self::NoDefault { domain: Some(_) } => {
                "add a sysram node to its mems or mems.sysram, whichever lacks it"
            }
            Self::NoDefault { domain: None } => "register a sysram node",
            Self::Absent => "see the list of nodes",
            Self::NoDomain => "make it from within a domain",
            Self::UnknownDomain { .. } => "see the list of domains",
            Self::OutsideDomain { .. } => "add the node to its mems",
            Self::TooManyGrants { .. } => "leave out those not needed",
            Self::NeedsGrant { guard: Guard::Hard, .. } => "a grant from its owner with ALLOC would open it",
            Self::NeedsGrant { guard: Guard::Easy, .. } => {
                "strict bind would open it, or a grant from its owner with ALLOC"
            }
            Self::LacksRight { .. } => "ask the node's owner for one that has it",
            Self::NoMemory => "try again when there is some",
            Self::NotDefault { is_spm: true } | Self::NotNamed => "name it",
            Self::NotDefault { is_spm: false } => "name it, or add it to mems.sysram",
            Self::Counted { is_spm: true } => "name it by its own number, without relative",
            Self::Counted { is_spm: false } => "give the number that counts it, or its own without relative",
            Self::NotFirst { .. } => "name it alone, or with bind",
            Self::BadGrant { .. } => "ask the node's owner for another",
        }
    }

    /// The domain that stands in the way.
    pub const fn domain(self) -> Option<DomainId> {
        match self {
            Self::OutsideDomain { domain } | Self::UnknownDomain { domain } => Some(domain),
            Self::NoDefault { domain } => domain,
            _ => None,
        }
    }

    /// What stands in the way, with the paths of domains, in words.
    ///
    /// ```
    /// use spmem_core::{registry::Registry, units::DomainId, wall::Reason};
    /// let reason = Reason::OutsideDomain { domain: DomainId::ROOT };
    /// assert_eq!(reason.what(&Registry::new()).to_string(), "outside the masks of domain /");
    /// ```
    pub fn what(self, registry: &Registry) -> impl fmt::Display {
        What { reason: self, path: self.domain().and_then(|domain| registry.domain_path(domain)) }
    }
}

/// [`Reason::what`]; without a path domains go by number.
struct What<P> {
    reason: Reason,
    path: Option<P>,
}

impl<P: fmt::Display> What<P> {
    fn write_domain(&self, f: &mut fmt::Formatter<'_>, domain: DomainId) -> fmt::Result {
        match &self.path {
            Some(path) => path.fmt(f),
            None => write!(f, "{domain}"),
        }
    }
}

impl<P: fmt::Display> fmt::Display for What<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason {
            Reason::NothingAsked => f.write_str("the mask is empty"),
            Reason::NoDefault { domain: None } => f.write_str("there is no sysram node"),
            Reason::NoDefault { domain: Some(domain) } => {
                f.write_str("no sysram node is left by the masks of domain ")?;
                self.write_domain(f, domain)
            }
            Reason::Absent => f.write_str("not registered"),
            Reason::NoDomain => f.write_str("a request without a domain gets sysram only"),
            Reason::UnknownDomain { domain } => {
                f.write_str("there is no domain ")?;
                self.write_domain(f, domain)
            }
            Reason::OutsideDomain { domain } => {
                f.write_str("outside the masks of domain ")?;
                self.write_domain(f, domain)
            }
            Reason::TooManyGrants { shown } => write!(f, "{shown} grants are shown, {MAX_SHOWN} can be"),
            Reason::NeedsGrant { guard: Guard::Hard, .. } => f.write_str("walled off (spm, hard guard)"),
            Reason::NeedsGrant { guard: Guard::Easy, mode } => {
                write!(f, "walled off (spm, easy guard) and named with {mode}")
            }
            Reason::LacksRight { right } => write!(f, "the grant lacks the right {right}"),
            Reason::NoMemory => f.write_str("no memory for what a pass holds"),
            Reason::NotDefault { .. } => f.write_str("not in the domain's default mask"),
            Reason::NotNamed => f.write_str("not among the nodes named"),
            Reason::Counted { is_spm: true } => {
                f.write_str("relative numbers count the domain's sysram nodes and lead to no spm node")
            }
            Reason::Counted { is_spm: false } => {
                f.write_str("the numbers lead to others of the domain's sysram nodes")
            }
            Reason::NotFirst { first } => {
                write!(f, "preferred means the first node named that it may use, {first}")
            }
            Reason::BadGrant { cause } => write!(f, "walled off, and {cause}"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(node) = self.node {
            write!(f, "node {node}: ")?;
        }
        write!(f, "{}", What::<DomainId> { reason: self.reason, path: None })?;
        // What is wrong with a grant says itself what to do.
        if matches!(self.reason, Reason::BadGrant { .. }) {
            return Ok(());
        }
        write!(f, "; {}", self.reason.remedy())
    }
}

impl core::error::Error for Refusal {}
