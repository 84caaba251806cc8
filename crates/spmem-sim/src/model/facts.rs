//! Facts: what must be true of what the memory manager answers, and above all of its refusals (R3, R11).

use spmem_core::grant::{GrantError, Rights, Wider};
use spmem_core::node::{Guard, NodeError, NodeType, Property, Services};
use spmem_core::units::NodeId;

use super::{Block, Model, Payer, Set, Spec};
use crate::step::Terms;

/// Where a block is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// To a lower tier.
    Down,
    /// To a higher tier, near to where it is used.
    Up {
        /// The node where that is.
        used_at: u16,
    },
    /// To another node of its type.
    Aside,
}

impl Spec {
    pub(crate) const fn node_type(&self) -> NodeType {
        if self.is_spm { NodeType::Spm } else { NodeType::Sysram }
    }

    pub(crate) const fn guard(&self) -> Guard {
        if self.is_easy { Guard::Easy } else { Guard::Hard }
    }

    /// R3: what a service lacks that it stands on.
    fn lacks(&self, service: Services) -> Services {
        let needs = match service {
            Services::DEMOTION => Services::RECLAIM | Services::MIGRATION,
            Services::PROMOTION | Services::WRITE_FENCE | Services::COMPACTION => Services::MIGRATION,
            _ => Services::empty(),
        };
        if self.services.contains(service) { needs - self.services } else { Services::empty() }
    }

    /// What an easy guard lacks that it stands on (R3, R9).
    fn guard_lacks(&self) -> Services {
        if self.is_spm && self.is_easy { Services::USER_NUMA - self.services } else { Services::empty() }
    }

    /// Whether a node can be that (R3).
    pub(crate) fn can_be(&self) -> bool {
        Services::all().iter().all(|service| self.lacks(service).is_empty()) && self.guard_lacks().is_empty()
    }

    /// The first property in which another one differs.
    pub(crate) fn conflict(&self, other: &Self) -> Option<Property> {
        let differs = [
            (self.is_spm != other.is_spm, Property::Type),
            (self.class != other.class, Property::Class),
            (self.services != other.services, Property::Services),
            (self.is_easy != other.is_easy, Property::Guard),
        ];
        differs.into_iter().find(|(differs, _)| *differs).map(|(_, property)| property)
    }
}

impl Model {
    /// Whether it is true that a node cannot be registered so, for this reason (R1, R3).
    pub(crate) fn cannot_register(&self, node: u16, spec: &Spec, why: NodeError) -> bool {
        let known = self.nodes.get(&node);
        match why {
            NodeError::ServiceNeeds { service, missing } => !missing.is_empty() && spec.lacks(service) == missing,
            NodeError::GuardNeeds { missing } => !missing.is_empty() && spec.guard_lacks() == missing,
            NodeError::AlreadyRegistered { node: of } => {
                of.get() == node && known.is_some_and(|known| known.spec.is_spm == spec.is_spm)
            }
            NodeError::TypeLatched { node: of, latched } => {
                let is_other =
                    |known: &super::Node| known.spec.is_spm != spec.is_spm && known.spec.node_type() == latched;
                of.get() == node && known.is_some_and(is_other)
            }
            _ => false,
        }
    }

    /// Whether it is true that a grant cannot be made on such terms, out of another one or not, for this reason (R12).
    pub(crate) fn cannot_grant(&self, nodes: &[u16], terms: Terms, from: Option<u32>, why: GrantError) -> bool {
        let whole = from.map(|from| &self.grants[&from]);
        let is_wider = |wider| {
            whole.is_some_and(|whole| match wider {
                Wider::Node(node) => nodes.contains(&node.get()) && !whole.nodes.contains(&node.get()),
                Wider::Rights(rights) => {
                    let [asked, had] = [terms, whole.terms].map(|terms| Rights::from_bits_truncate(terms.rights));
                    !rights.is_empty() && rights == asked - had
                }
                Wider::Quota { quota } => quota.0 == whole.terms.quota && terms.quota > quota.0,
                Wider::Expiry { expires } => expires.0 == whole.terms.ends() && terms.ends() > expires.0,
            })
        };
        match why {
            GrantError::NoNode => nodes.is_empty(),
            GrantError::Expired { at } if terms.ends() == at.0 => at.0 <= self.now,
            GrantError::Expired { .. } | GrantError::Revoked => {
                from.is_some_and(|from| self.has_ended(&[from], why))
            }
            GrantError::Widened(wider) => is_wider(wider),
            GrantError::TooDeep => from.is_some_and(|from| self.depth(from) >= usize::from(MAX_NARROWED)),
            _ => false,
        }
    }

    /// How often a grant was narrowed to be what it is.
    fn depth(&self, grant: u32) -> usize {
        let parent = |&grant: &u32| self.grants.get(&grant)?.parent;
        std::iter::successors(Some(grant), parent).count() - 1
    }

    /// Whether one of the grants shown has ended in this way. One that was given back is as good as revoked to who shows it yet.
    pub(crate) fn has_ended(&self, shown: &[u32], how: GrantError) -> bool {
        shown.iter().filter_map(|grant| self.grants.get(grant)).any(|grant| {
            let is_gone = grant.is_revoked || !grant.is_held;
            match how {
                GrantError::Revoked => is_gone,
                GrantError::Expired { at } => !is_gone && at.0 == grant.terms.ends() && at.0 <= self.now,
                _ => false,
            }
        })
    }

    /// Whether one of the grants shown is good for something on a node.
    pub(crate) fn is_named(&self, shown: &[u32], node: u16) -> bool {
        shown.iter().any(|&grant| self.is_live(grant) && self.grants[&grant].nodes.contains(&node))
    }

    /// Whether one of the grants shown carries rights on a node.
    pub(crate) fn carries(&self, shown: &[u32], rights: Rights, node: u16) -> bool {
        shown.iter().any(|&grant| self.opens(grant, rights).contains(&node))
    }

    /// Whether who shows grants may do with what lies on a node what `right` says (R9, R12).
    pub(crate) fn may(&self, shown: &[u32], right: Rights, node: u16) -> bool {
        let spec = &self.nodes[&node].spec;
        let is_open = !spec.is_spm || spec.is_easy && right != Rights::PIN;
        is_open || self.carries(shown, right, node)
    }

    /// R14, R15: where a block may go, what is tried first in front.
    pub(crate) fn targets(&self, block: &Block, goal: Goal, shown: &[u32]) -> Vec<u16> {
        let (from, sysram) = (block.node, self.of_type(false));
        let open: Set = match &block.domain {
            None => sysram,
            Some(path) => {
                let granted = shown.iter().map(|&grant| self.opens(grant, Rights::DEMOTE_TO));
                &granted.fold(sysram, |open, nodes| &open | &nodes) & &self.effective(path)
            }
        };
        let own = &self.nodes[&from];
        let is_there = |node: &u16| {
            let other = &self.nodes[node];
            let can_move = other.spec.services.contains(Services::MIGRATION);
            match goal {
                Goal::Down => can_move && other.tier > own.tier,
                Goal::Up { .. } => can_move && other.tier < own.tier,
                Goal::Aside => *node != from && other.spec.is_spm == own.spec.is_spm,
            }
        };
        let mut targets: Vec<u16> = open.into_iter().filter(is_there).collect();
        let near = if let Goal::Up { used_at } = goal { used_at } else { from };
        let tier = |node| if goal == Goal::Aside { 0 } else { self.nodes[&node].tier };
        targets.sort_by_key(|&node| (tier(node), self.nearness(near, node)));
        targets
    }

    /// What is wrong with an answer that a quota is too small for `bytes` on a node: none of those that could pay has more.
    pub(crate) fn is_over_quota(&self, shown: &[u32], right: Rights, node: NodeId, bytes: u64, left: u64) -> bool {
        let node = node.get();
        let mut covering = shown.iter().filter(|&&grant| self.opens(grant, right).contains(&node));
        let is_one = covering.any(|&grant| self.left(grant) == left);
        is_one && left < bytes && self.payer(shown, right, node, bytes) == Payer::OverQuota
    }
}

/// How often a grant may be narrowed in a row.
const MAX_NARROWED: u8 = spmem_core::grant::MAX_DEPTH;
