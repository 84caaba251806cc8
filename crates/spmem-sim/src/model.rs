//! The model: what the rules say, with sets and sums, without any of the memory manager's code.

use std::collections::{BTreeMap, BTreeSet};

use spmem_core::grant::Rights;
use spmem_core::node::Services;

use crate::step::{Mode, Terms};

pub(crate) type Set = BTreeSet<u16>;

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) is_spm: bool,
    pub(crate) is_easy: bool,
    pub(crate) services: Services,
    pub(crate) tier: u8,
}

#[derive(Debug, Default)]
pub(crate) struct Domain {
    pub(crate) mems: Set,
    pub(crate) sysram: Set,
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
}

/// What a request says.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) domain: Option<&'a str>,
    pub(crate) asked: Option<Set>,
    pub(crate) mode: Mode,
    pub(crate) grants: &'a [u32],
}

/// The machine as the rules see it. Domains go by path, the root is `""`.
#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) now: u64,
    pub(crate) nodes: BTreeMap<u16, Node>,
    pub(crate) domains: BTreeMap<String, Domain>,
    pub(crate) grants: BTreeMap<u32, Grant>,
    pub(crate) blocks: BTreeMap<u32, Block>,
    /// Who owns the frames from a place on: node and first frame to frames and block.
    pub(crate) owned: BTreeMap<(u16, u32), (u64, u32)>,
    /// Frames whose memory is broken (R20).
    pub(crate) poisoned: BTreeSet<(u16, u32)>,
    /// Nodes of whose free frames fewer may count as zero than are (R21).
    pub(crate) is_vague: Set,
    /// Frames that somebody may have written, 64 a word: by node and number of the word.
    written: BTreeMap<(u16, u32), u64>,
}

impl Model {
    pub(crate) fn of_type(&self, is_spm: bool) -> Set {
        self.nodes.iter().filter(|(_, node)| node.is_spm == is_spm).map(|(&node, _)| node).collect()
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
            .is_some_and(|grant| grant.is_held && !grant.is_revoked && grant.terms.ends() > self.now)
    }

    /// The nodes on which a grant carries a right.
    pub(crate) fn opens(&self, grant: u32, right: Rights) -> Set {
        let carries = |grant: &&Grant| Rights::from_bits_truncate(grant.terms.rights).contains(right);
        let grant = self.grants.get(&grant).filter(|_| self.is_live(grant)).filter(carries);
        grant.map(|grant| grant.nodes.clone()).unwrap_or_default()
    }

    /// R6, R7, R9, R10: the nodes that are named and open, and what they fall back to.
    pub(crate) fn allowed(&self, request: &Request<'_>) -> Set {
        let sysram = self.of_type(false);
        let default = request.domain.map_or_else(|| sysram.clone(), |path| self.default_mask(path));
        let Some(asked) = request.asked.as_ref().filter(|asked| !asked.is_empty()) else {
            return if request.asked.is_some() && request.mode == Mode::Bind { Set::new() } else { default };
        };
        let named = match request.domain {
            None => asked & &sysram,
            Some(path) => &(asked & &self.effective(path)) & &self.open(request, &sysram),
        };
        let falls_back = match request.mode {
            Mode::Bind => false,
            Mode::PreferredMany => !named.is_empty(),
            Mode::Interleave | Mode::WeightedInterleave => !named.is_disjoint(&sysram),
        };
        if falls_back { &named | &default } else { named }
    }

    fn open(&self, request: &Request<'_>, sysram: &Set) -> Set {
        let mut open = sysram.clone();
        request.grants.iter().for_each(|&grant| open.extend(self.opens(grant, Rights::ALLOC)));
        if request.mode == Mode::Bind {
            open.extend(self.nodes.iter().filter(|(_, node)| node.is_spm && node.is_easy).map(|(&node, _)| node));
        }
        open
    }

    /// R9: strict bind may name an easy node without a grant, so also with one whose quota is used up.
    pub(crate) fn is_free_of_charge(&self, request: &Request<'_>, node: u16) -> bool {
        self.nodes[&node].is_easy && request.mode == Mode::Bind && request.asked.is_some()
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

    /// Notes whether frames may hold what somebody wrote (R21).
    pub(crate) fn set_written(&mut self, node: u16, first: u32, frames: u64, is_written: bool) {
        for (word, mask) in words(first, frames) {
            let bits = self.written.entry((node, word)).or_default();
            *bits = if is_written { *bits | mask } else { *bits & !mask };
        }
    }

    /// Whether none of the frames may hold what somebody wrote (R21).
    pub(crate) fn is_zero(&self, node: u16, first: u32, frames: u64) -> bool {
        words(first, frames)
            .all(|(word, mask)| self.written.get(&(node, word)).is_none_or(|bits| bits & mask == 0))
    }

    /// Frames in use on a node.
    pub(crate) fn frames_used(&self, node: u16) -> u64 {
        self.owned.range((node, 0)..=(node, u32::MAX)).map(|(_, (frames, _))| frames).sum()
    }

    /// Whether any of the frames is broken (R20).
    pub(crate) fn has_poison(&self, node: u16, first: u32, frames: u64) -> bool {
        let next = self.poisoned.range((node, first)..).next();
        next.is_some_and(|&(of, frame)| of == node && u64::from(frame) < u64::from(first) + frames)
    }

    /// Broken frames of a node that nobody holds (R20).
    pub(crate) fn out_of_use(&self, node: u16) -> u64 {
        let of_node = self.poisoned.range((node, 0)..=(node, u32::MAX));
        of_node.filter(|(_, frame)| self.owner_of(node, *frame, 1).is_none()).count() as u64
    }

    /// The block that owns any of `frames` frames from `first` on.
    pub(crate) fn owner_of(&self, node: u16, first: u32, frames: u64) -> Option<u32> {
        let end = u64::from(first) + frames;
        let last = u32::try_from(end - 1).unwrap_or(u32::MAX);
        let (&(_, at), &(count, block)) = self.owned.range((node, 0)..=(node, last)).next_back()?;
        (u64::from(at) + count > u64::from(first)).then_some(block)
    }
}

/// The words that hold the bits of frames, and which bits of each.
fn words(first: u32, frames: u64) -> impl Iterator<Item = (u32, u64)> {
    let (first, end) = (u64::from(first), u64::from(first) + frames);
    (first / 64..end.div_ceil(64)).map(move |word| {
        let (from, to) = (first.max(word * 64) - word * 64, end.min(word * 64 + 64) - word * 64);
        let mask = (u64::MAX >> (64 - (to - from))) << from;
        (u32::try_from(word).expect("a node has at most 2^32 frames"), mask)
    })
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
