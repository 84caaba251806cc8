//! Requests: what a policy means where it is set, and later, and in which order nodes are tried (R6 to R10; mempolicy(7)).

use std::collections::BTreeMap;

use spmem_core::grant::Rights;
use spmem_core::policy::{Errno, Flags};

use super::{Model, Payer, Set};
use crate::step::{Ask, Mode};

/// What a request says.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) domain: Option<String>,
    pub(crate) asked: Option<Set>,
    pub(crate) mode: Mode,
    pub(crate) flags: Flags,
    pub(crate) home: Option<u16>,
    pub(crate) at: Option<u16>,
    pub(crate) grants: Vec<u32>,
    pub(crate) uses_reserve: bool,
}

/// What it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// What the domain gets unasked.
    Default,
    /// No node at all.
    Nothing,
    /// Nodes that it names.
    Named,
}

/// What a policy has come to mean: what Linux keeps in `struct mempolicy`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bound {
    /// The ordinary nodes that were possible then, ...
    plain: Set,
    /// ... those of them that are meant, ...
    chosen: Set,
    /// ... and SPM nodes that are named and open.
    special: Set,
    /// It has meant ordinary nodes.
    has_plain: bool,
    /// The one node that [`Mode::Preferred`] prefers.
    pub(crate) wish: Option<u16>,
}

/// The nodes that a policy leads to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    pub(crate) nodes: Set,
    pub(crate) fallback: Set,
}

impl Choice {
    pub(crate) fn allowed(&self) -> Set {
        &self.nodes | &self.fallback
    }
}

/// Where a task is in its turns.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Turn {
    last: Option<u16>,
    left: u8,
}

impl Request {
    pub(crate) fn of(ask: &Ask) -> Self {
        Self {
            domain: ask.domain.clone(),
            asked: ask.asked.as_ref().map(|nodes| nodes.iter().copied().collect()),
            mode: ask.mode,
            flags: Flags::from_bits_truncate(ask.flags),
            home: ask.home,
            at: ask.at,
            grants: ask.grants.clone(),
            uses_reserve: ask.uses_reserve,
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        match (&self.asked, self.mode) {
            (_, Mode::Default | Mode::Local) | (None, _) => Kind::Default,
            (Some(asked), Mode::Bind) if asked.is_empty() => Kind::Nothing,
            (Some(asked), _) if asked.is_empty() => Kind::Default,
            _ => Kind::Named,
        }
    }

    /// Whether its numbers count the possible nodes.
    pub(crate) fn is_relative(&self) -> bool {
        self.flags.is_relative()
    }

    pub(crate) const fn is_interleaved(&self) -> bool {
        matches!(self.mode, Mode::Interleave | Mode::WeightedInterleave)
    }

    /// The nodes that it names by their own numbers.
    pub(crate) fn named(&self) -> Set {
        let asked = self.asked.clone().filter(|_| self.kind() == Kind::Named && !self.is_relative());
        asked.unwrap_or_default()
    }

    /// What set_mempolicy(2) and set_mempolicy_home_node(2) say to the arguments, but for a mode without its nodes.
    pub(crate) fn errno(&self, present: &Set) -> Option<Errno> {
        let has_nodes = self.asked.as_ref().is_some_and(|asked| !asked.is_empty());
        let takes_nodes = !matches!(self.mode, Mode::Default | Mode::Local);
        let stands_for_default = takes_nodes && self.mode != Mode::Preferred && self.asked.is_none();
        let is_wrong = match self.mode {
            _ if stands_for_default => false,
            _ if self.flags.is_static() && self.is_relative() => true,
            mode if self.flags.contains(Flags::NUMA_BALANCING)
                && !matches!(mode, Mode::Bind | Mode::PreferredMany) =>
            {
                true
            }
            Mode::Default => has_nodes,
            Mode::Local => has_nodes || !self.flags.is_empty(),
            Mode::Preferred => !has_nodes && !self.flags.is_empty(),
            _ => false,
        };
        if is_wrong {
            return Some(Errno::Einval);
        }
        let home = self.home?;
        let is_local = self.mode == Mode::Local || self.mode == Mode::Preferred && !has_nodes;
        match self.mode {
            _ if !present.contains(&home) => Some(Errno::Einval),
            _ if is_local => Some(Errno::Eopnotsupp),
            _ if self.kind() == Kind::Default => Some(Errno::Enoent),
            Mode::Bind | Mode::PreferredMany => None,
            _ => Some(Errno::Eopnotsupp),
        }
    }
}

impl Model {
    /// The nodes that a request can reach at all, and those it gets unasked (R4, R7).
    fn masks(&self, request: &Request) -> (Set, Set) {
        match &request.domain {
            None => (self.of_type(false), self.of_type(false)),
            Some(path) => (self.effective(path), self.default_mask(path)),
        }
    }

    /// R6, R9: SPM nodes that are named and open. Relative numbers name none, and without a domain there is none (R7).
    fn special(&self, request: &Request, reach: &Set) -> Set {
        let mut open = Set::new();
        request.grants.iter().for_each(|&grant| open.extend(self.opens(grant, Rights::ALLOC)));
        if request.mode == Mode::Bind {
            open.extend(self.nodes.iter().filter(|(_, node)| node.spec.is_easy).map(|(&node, _)| node));
        }
        let special = &self.of_type(true) & &(&request.named() & &open);
        if request.domain.is_some() { &special & reach } else { Set::new() }
    }

    /// What a policy means where it is set; none if none of the nodes that it names can be used (R8).
    pub(crate) fn bind(&self, request: &Request) -> Option<Bound> {
        if request.kind() != Kind::Named {
            return Some(Bound::default());
        }
        let (reach, _) = self.masks(request);
        let plain = &reach & &self.of_type(false);
        let asked = request.asked.clone().unwrap_or_default();
        let chosen = if request.is_relative() { fold(&asked, &plain) } else { &asked & &plain };
        let special = self.special(request, &reach);
        let wish = chosen.union(&special).min().copied();
        let has_plain = !chosen.is_empty();
        wish.map(|wish| Bound { plain, chosen, special, has_plain, wish: Some(wish) }.keep_wish(request))
    }

    /// What it means after masks, nodes or grants have changed (`mpol_rebind_policy`); none if it leads nowhere.
    pub(crate) fn rebind(&self, request: &Request, bound: &Bound) -> Option<Bound> {
        let (reach, _) = self.masks(request);
        let plain = &reach & &self.of_type(false);
        let special = self.special(request, &reach);
        let mut chosen = bound.chosen.clone();
        if request.kind() == Kind::Named && (request.mode == Mode::Bind || request.is_interleaved()) {
            let asked = request.asked.clone().unwrap_or_default();
            chosen = match request.flags {
                flags if flags.is_static() => &asked & &plain,
                flags if flags.is_relative() => fold(&asked, &plain),
                _ if plain == bound.plain => chosen,
                _ => remap(&chosen, &bound.plain, &plain),
            };
            // Linux lets such a task have all that it may; SPM nodes are not stood in for (R10).
            if chosen.is_empty() && special.is_empty() && bound.has_plain {
                chosen.clone_from(&plain);
            }
        }
        let has_plain = bound.has_plain || !chosen.is_empty();
        let bound = Bound { plain, chosen, special, has_plain, wish: bound.wish }.keep_wish(request);
        let choice = self.choice(request, &bound);
        (!choice.allowed().is_empty()).then_some(bound)
    }

    /// The nodes that a policy leads to now.
    pub(crate) fn choice(&self, request: &Request, bound: &Bound) -> Choice {
        let nodes = &(&bound.chosen & &bound.plain) | &bound.special;
        let falls_back = match (request.kind(), request.mode) {
            (Kind::Default, _) => true,
            (Kind::Nothing, _) | (_, Mode::Bind) => false,
            (_, Mode::Interleave | Mode::WeightedInterleave) => bound.has_plain,
            _ => true,
        };
        let (_, default) = self.masks(request);
        let fallback = if falls_back { &default - &nodes } else { Set::new() };
        Choice { nodes, fallback }
    }

    /// The nodes in the order in which they are tried: those of the policy, then the others, each in the order of a zonelist.
    pub(crate) fn ranks(&self, request: &Request, choice: &Choice, turn: Option<u16>) -> BTreeMap<u16, usize> {
        let in_order = |nodes: Vec<u16>| nodes.into_iter().zip(0..).collect();
        if let Some(turn) = turn.filter(|_| request.is_interleaved()) {
            let mut nodes: Vec<u16> = choice.allowed().into_iter().collect();
            nodes.sort_by_key(|&node| self.place(turn, node));
            return in_order(nodes);
        }
        let mut nodes: Vec<u16> = choice.nodes.iter().copied().collect();
        let mut others: Vec<u16> = choice.fallback.iter().copied().collect();
        let lowest = nodes.first().or(others.first()).copied();
        let Some(from) = request.home.or(request.at).or(lowest) else { return BTreeMap::new() };
        nodes.sort_by_key(|&node| self.place(from, node));
        let preferred = nodes.first().copied().filter(|_| request.mode == Mode::Preferred);
        others.sort_by_key(|&node| self.place(preferred.unwrap_or(from), node));
        nodes.append(&mut others);
        in_order(nodes)
    }

    /// Whose turn it is among the nodes of an interleaved request.
    pub(crate) fn take_turn(&self, request: &Request, choice: &Choice, turn: &mut Turn) -> Option<u16> {
        if !request.is_interleaved() || request.kind() != Kind::Named {
            return None;
        }
        if let Some(last) = turn.last.filter(|last| turn.left > 0 && choice.nodes.contains(last)) {
            turn.left -= 1;
            return Some(last);
        }
        let next = turn.last.and_then(|last| choice.nodes.range(last + 1..).next());
        let &node = next.or_else(|| choice.nodes.first())?;
        let weight = if request.mode == Mode::WeightedInterleave { self.nodes[&node].weight } else { 1 };
        *turn = Turn { last: Some(node), left: weight - 1 };
        Some(node)
    }

    /// R9: strict bind may name an easy node without a grant, so also with one whose quota is used up.
    pub(crate) fn is_free_of_charge(&self, request: &Request, node: u16) -> bool {
        self.nodes[&node].spec.is_easy
            && request.mode == Mode::Bind
            && !request.is_relative()
            && request.asked.is_some()
    }

    /// Whether a node has a free block of an order outside its reserve, and somebody can pay for it.
    pub(crate) fn has_room(&self, shown: &[u32], right: Rights, node: u16, order: u8) -> bool {
        self.keeps_reserve(node, order) && self.has_block(shown, right, node, order)
    }

    /// Whether a node keeps its reserve when it gives a block of an order.
    pub(crate) fn keeps_reserve(&self, node: u16, order: u8) -> bool {
        let reserve = self.nodes[&node].reserve;
        reserve == 0 || self.frames_free(node) >= reserve.saturating_add(1 << order)
    }

    /// Whether a node has a free block of an order, and somebody can pay for it.
    pub(crate) fn has_block(&self, shown: &[u32], right: Rights, node: u16, order: u8) -> bool {
        let bytes = 4096 << order;
        let is_paid = !self.nodes[&node].spec.is_spm || self.payer(shown, right, node, bytes) != Payer::OverQuota;
        is_paid && self.largest_free(node) >= Some(order)
    }

    /// The topmost domain on the way to `path` whose masks lack a node.
    pub(crate) fn limiting(&self, path: &str, node: u16) -> Option<String> {
        let on_way = on_way_to(path);
        on_way.into_iter().find(|above| !self.effective(above).contains(&node)).map(str::to_owned)
    }

    /// The topmost domain on the way to `path` whose masks leave no sysram node of those there are.
    pub(crate) fn leaves_none(&self, path: &str) -> Option<String> {
        let plain = self.of_type(false);
        let none = |above: &&str| self.effective(above).is_disjoint(&plain);
        let is_own = !plain.is_empty() && self.default_mask(path).is_empty();
        let above = on_way_to(path).into_iter().find(none).filter(|_| !plain.is_empty());
        above.or(is_own.then_some(path)).map(str::to_owned)
    }
}

impl Bound {
    fn keep_wish(mut self, request: &Request) -> Self {
        if request.mode == Mode::Preferred {
            let wish = self.wish;
            self.chosen.retain(|&node| Some(node) == wish);
            self.special.retain(|&node| Some(node) == wish);
        }
        self
    }
}

/// The domains from the root to one.
fn on_way_to(path: &str) -> Vec<&str> {
    let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
    ends.map(|end| &path[..end]).collect()
}

/// Number i is the (i modulo size)th of `base`.
fn fold(numbers: &Set, base: &Set) -> Set {
    let base: Vec<u16> = base.iter().copied().collect();
    if base.is_empty() {
        return Set::new();
    }
    numbers.iter().map(|&number| base[usize::from(number) % base.len()]).collect()
}

/// The nth of `old` becomes the nth of `new`, which begins anew at its end; what is in neither is left out.
fn remap(nodes: &Set, old: &Set, new: &Set) -> Set {
    let to: Vec<u16> = new.iter().copied().collect();
    if to.is_empty() {
        return Set::new();
    }
    let of = |node: &u16| old.iter().position(|known| known == node).map_or(*node, |at| to[at % to.len()]);
    &nodes.iter().map(of).collect::<Set>() & new
}
