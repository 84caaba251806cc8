//! The model: what the rules say, with sets and sums, without any of the memory manager's code.

mod facts;
mod frames;
mod policy;

use std::collections::{BTreeMap, BTreeSet};

use spmem_core::grant::Rights;
use spmem_core::node::Services;

use crate::step::Terms;

pub(crate) use self::facts::Goal;
pub(crate) use self::policy::{Bound, Choice, Kind, Request, Turn};

pub(crate) type Set = BTreeSet<u16>;

/// What a node is said to be where it is registered (R3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) is_spm: bool,
    /// Means nothing on sysram.
    pub(crate) is_easy: bool,
    pub(crate) class: u8,
    pub(crate) services: Services,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) spec: Spec,
    pub(crate) tier: u8,
    /// Pages in a row by weighted interleave.
    pub(crate) weight: u8,
    /// Frames that only who may use the reserve gets.
    pub(crate) reserve: u64,
    /// Frames by first frame.
    pub(crate) ranges: BTreeMap<u32, u64>,
}

impl Node {
    /// Where a range behind all others would begin.
    pub(crate) fn end(&self) -> u64 {
        let last = self.ranges.last_key_value();
        last.map_or(0, |(&first, &count)| (u64::from(first) + count).next_multiple_of(1024))
    }
}

#[derive(Debug, Default)]
pub(crate) struct Domain {
    pub(crate) mems: Set,
    pub(crate) sysram: Set,
    /// Tells it from another one that had its path before.
    pub(crate) made: u64,
}

#[derive(Debug)]
pub(crate) struct Grant {
    pub(crate) nodes: Set,
    pub(crate) terms: Terms,
    pub(crate) parent: Option<u32>,
    /// The holder has it still.
    pub(crate) is_held: bool,
    pub(crate) is_revoked: bool,
    /// Bytes in use directly under it.
    pub(crate) used: u64,
}

#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) domain: Option<String>,
    pub(crate) grant: Option<u32>,
    pub(crate) node: u16,
    pub(crate) first: u32,
    pub(crate) frames: u64,
    pub(crate) is_movable: bool,
    /// Pinned for long (R15).
    pub(crate) is_pinned: bool,
}

/// The machine as the rules see it. Domains go by path, the root is `""`.
#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) now: u64,
    pub(crate) nodes: BTreeMap<u16, Node>,
    pub(crate) domains: BTreeMap<String, Domain>,
    /// Domains that were ever made.
    pub(crate) domains_made: u64,
    pub(crate) grants: BTreeMap<u32, Grant>,
    pub(crate) blocks: BTreeMap<u32, Block>,
    /// Who owns the frames from a place on: node and first frame to frames and block.
    pub(crate) owned: BTreeMap<(u16, u32), (u64, u32)>,
    /// Frames whose memory is broken (R20).
    pub(crate) poisoned: BTreeSet<(u16, u32)>,
    /// Nodes of whose free frames fewer may count as zero than are (R21).
    pub(crate) is_vague: Set,
    /// What was set of how far nodes are from each other.
    pub(crate) distances: BTreeMap<(u16, u16), u8>,
    /// What came up from each node: when, and bytes.
    pub(crate) promoted: BTreeMap<u16, Vec<(u64, u64)>>,
    /// Frames that somebody may have written, 64 a word: by node and number of the word.
    written: BTreeMap<(u16, u32), u64>,
}

impl Model {
    pub(crate) fn of_type(&self, is_spm: bool) -> Set {
        self.nodes.iter().filter(|(_, node)| node.spec.is_spm == is_spm).map(|(&node, _)| node).collect()
    }

    /// R4.
    pub(crate) fn effective(&self, path: &str) -> Set {
        let above = match path.rsplit_once('/') {
            Some((above, _)) => self.effective(above),
            None => self.nodes.keys().copied().collect(),
        };
        let limited = &self.domains[path].mems & &above;
        if limited.is_empty() { above } else { limited }
    }

    /// R4.
    pub(crate) fn default_mask(&self, path: &str) -> Set {
        let plain = &self.effective(path) & &self.of_type(false);
        let sysram = &self.domains[path].sysram;
        if sysram.is_empty() { plain } else { &plain & sysram }
    }

    /// Whether a grant is good for anything (R12).
    pub(crate) fn is_live(&self, grant: u32) -> bool {
        self.grants
            .get(&grant)
            .is_some_and(|grant| grant.is_held && !grant.is_revoked && !grant.terms.is_over(self.now))
    }

    /// The nodes on which a grant carries a right.
    pub(crate) fn opens(&self, grant: u32, right: Rights) -> Set {
        let carries = |grant: &&Grant| Rights::from_bits_truncate(grant.terms.rights).contains(right);
        let grant = self.grants.get(&grant).filter(|_| self.is_live(grant)).filter(carries);
        grant.map(|grant| grant.nodes.clone()).unwrap_or_default()
    }

    /// The grant that pays for `bytes` on an SPM node, if one can: the first shown that opens it and has the quota.
    pub(crate) fn payer(&self, shown: &[u32], right: Rights, node: u16, bytes: u64) -> Payer {
        let covering: Vec<u32> =
            shown.iter().copied().filter(|&grant| self.opens(grant, right).contains(&node)).collect();
        match covering.iter().find(|&&grant| self.left(grant) >= bytes) {
            Some(&grant) => Payer::Grant(grant),
            None if covering.is_empty() => Payer::Nobody,
            None => Payer::OverQuota,
        }
    }

    /// What is left of a grant's quota, and of all it came from.
    pub(crate) fn left(&self, grant: u32) -> u64 {
        let mut left = u64::MAX;
        let mut at = Some(grant);
        while let Some(grant) = at {
            let Some(known) = self.grants.get(&grant) else { break };
            left = left.min(known.terms.quota.saturating_sub(self.used(grant)));
            at = known.parent;
        }
        left
    }

    /// Bytes in use under a grant and all narrowed from it.
    pub(crate) fn used(&self, grant: u32) -> u64 {
        let within = self.grants.iter().filter(|(id, _)| self.descends(**id, grant));
        within.map(|(_, grant)| grant.used).sum()
    }

    /// Whether a grant is, or was narrowed from, another.
    pub(crate) fn descends(&self, grant: u32, ancestor: u32) -> bool {
        let mut at = Some(grant);
        while let Some(grant) = at {
            if grant == ancestor {
                return true;
            }
            at = self.grants.get(&grant).and_then(|grant| grant.parent);
        }
        false
    }
}

/// Who pays for a block on an SPM node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Payer {
    /// This grant.
    Grant(u32),
    /// No grant that is shown opens the node.
    Nobody,
    /// Those that do have not the quota.
    OverQuota,
}
