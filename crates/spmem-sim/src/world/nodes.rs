//! Nodes and their ranges: come, go, and stay what they were registered as (R1, R3).

use std::borrow::Cow;

use spmem_core::frames::{FrameRange, FramesError, MAX_FRAMES};
use spmem_core::grant::{GrantError, Rights, Terms};
use spmem_core::migrate::Stay;
use spmem_core::node::{Class, NodeError, NodeSpec, Services};
use spmem_core::page::Page;
use spmem_core::registry::Registered;
use spmem_core::tier::DRAM;
use spmem_core::units::{Bytes, FrameCount, FrameNumber, NodeId};
use spmem_core::watermark::Watermarks;
use spmem_core::zero::Initial;

use super::{Applied, Outcome, World, refused};
use crate::check::{Violation, hold};
use crate::machine::lend;
use crate::model::{self, Spec};

/// Reclaim of a node begins when less than this part of its frames is free, ...
const LOW_SHARE: u64 = 16;
/// ... and ends when this part is.
const HIGH_SHARE: u64 = 8;

/// As the memory manager takes it; none without such a class.
fn core_spec(spec: &Spec) -> Option<NodeSpec> {
    Some(NodeSpec {
        node_type: spec.node_type(),
        class: Class::from_number(spec.class)?,
        services: spec.services,
        guard: spec.guard(),
        owner: Cow::Borrowed("simulated"),
    })
}

fn marks(frames: u64, reserve: u64) -> Watermarks {
    let at_least = |share: u64| FrameCount((frames / share).max(reserve));
    let marks = Watermarks::new(FrameCount(reserve), at_least(LOW_SHARE), at_least(HIGH_SHARE));
    marks.expect("a larger share is no less")
}

impl World {
    /// What a node keeps for requests that may use its reserve.
    pub(super) fn set_reserve(&mut self, node: u16, frames: u64) -> Applied {
        let whole = self.model.nodes.contains_key(&node).then(|| self.model.capacity(node));
        let (Some(whole), Some(owner)) = (whole, self.owners.get(&node)) else { return refused("no such node") };
        let is_set = self.mm.registry_mut().set_watermarks(owner, marks(whole, frames));
        hold("R3", is_set.is_ok(), || format!("the owner cannot set the marks of node {node}: {is_set:?}"))?;
        if let Some(known) = self.model.nodes.get_mut(&node) {
            known.reserve = frames;
        }
        Ok(Outcome::Done)
    }

    /// R1, R3: a node has one owner, one type, and services that can be.
    pub(super) fn add_node(&mut self, node: u16, spec: Spec, tier: u8, frames: u64, initial: Initial) -> Applied {
        let (Ok(id), Some(core)) = (NodeId::new(node), core_spec(&spec)) else { return refused("no such node") };
        if frames == 0 || frames > MAX_FRAMES {
            return refused("a node has 1 to 2^32 frames");
        }
        let is_known = self.model.nodes.contains_key(&node);
        let can_be = spec.can_be();
        let Registered { owner, outside } = match self.mm.registry_mut().register(id, core) {
            Ok(registered) => registered,
            Err(error) => {
                hold("R11", self.model.cannot_register(node, &spec, error), || {
                    format!("node {node} is refused as {spec:?}: {error}")
                })?;
                if is_known {
                    self.check_node(node)?;
                }
                self.check_step()?;
                return refused(error);
            }
        };
        hold("R1", !is_known, || format!("node {node} was registered twice"))?;
        hold("R3", can_be, || format!("node {node} is registered as {spec:?}"))?;
        self.owners.insert(node, owner);
        let ranges = std::collections::BTreeMap::new();
        self.model.nodes.insert(node, model::Node { spec, tier, weight: 1, reserve: 0, ranges });
        let set = self.mm.registry_mut().set_abstract_distance(id, DRAM * (1 + 2 * u64::from(tier)));
        hold("R14", set.is_ok(), || format!("node {node} in tier {tier}: {set:?}"))?;
        self.check_outside("", &outside)?;
        self.add_range(node, spec, frames, initial)?;
        self.check_step()
    }

    /// R3: a further range is what the node is.
    pub(super) fn add_range(&mut self, node: u16, spec: Spec, frames: u64, initial: Initial) -> Applied {
        let (Some(owner), Some(core)) = (self.owners.get(&node), core_spec(&spec)) else {
            return refused("no node, or no such class");
        };
        let known = &self.model.nodes[&node];
        let conflict = known.spec.conflict(&spec);
        let count = FrameCount(frames);
        let Some(lent) = lend(count) else { return refused("no memory for what is kept of the frames") };
        let range = match self.mm.registry_mut().add_range(owner, &core, count, lent, initial) {
            Ok(range) => range,
            Err(error) => {
                let is_true = match error {
                    NodeError::Conflict { node: of, property } => of.get() == node && Some(property) == conflict,
                    NodeError::Frames(FramesError::EmptyRange) => frames == 0,
                    NodeError::Frames(FramesError::TooMany { count: told, frames: behind }) => {
                        told == count && behind == known.end() && behind + frames > MAX_FRAMES
                    }
                    _ => false,
                };
                hold("R11", is_true, || {
                    format!("node {node}, {:?}, gets no range {spec:?}: {error}", known.spec)
                })?;
                self.check_node(node)?;
                return refused(error);
            }
        };
        hold("R3", conflict.is_none(), || format!("node {node}, {:?}, got a range {spec:?}", known.spec))?;
        let (first, end) = (range.first.0, u64::from(range.first.0) + frames);
        let overlaps =
            |(&at, &count): (&u32, &u64)| u64::from(at) < end && u64::from(at) + count > u64::from(first);
        let overlap = known.ranges.iter().find(|&(at, count)| overlaps((at, count)));
        hold("frames", range.count == count && first.is_multiple_of(1024) && overlap.is_none(), || {
            format!("a range of {frames} frames lies at {range:?}, over {overlap:?}")
        })?;
        let whole = self.model.capacity(node) + frames;
        let is_set = self.mm.registry_mut().set_watermarks(owner, marks(whole, known.reserve));
        hold("R3", is_set.is_ok(), || format!("the owner cannot set the marks of node {node}: {is_set:?}"))?;
        if let Some(known) = self.model.nodes.get_mut(&node) {
            known.ranges.insert(first, frames);
        }
        if initial == Initial::Unknown {
            self.model.set_written(node, first, frames, true);
        }
        self.check_node(node)?;
        Ok(Outcome::Done)
    }

    /// R1: a node in use, or with ranges, stays.
    pub(super) fn remove_node(&mut self, node: u16) -> Applied {
        let Some(owner) = self.owners.get(&node) else { return refused("no node") };
        let (used, ranges) = (self.model.frames_used(node), self.model.nodes[&node].ranges.len());
        if ranges > 0 {
            let why = self.mm.registry_mut().unregister(owner);
            let is_right = matches!(why, Err(NodeError::InUse { node: of, used: told, ranges: left })
                if (of.get(), told.0, left) == (node, used, ranges));
            hold("R1", is_right, || format!("node {node}, {used} frames in {ranges} ranges: {why:?}"))?;
        }
        if used > 0 {
            return refused("in use");
        }
        let firsts: Vec<u32> = self.model.nodes[&node].ranges.keys().copied().collect();
        for first in firsts {
            self.take_range(node, first)?;
        }
        let Some(owner) = self.owners.remove(&node) else { return refused("no node") };
        let gone = self.mm.registry_mut().unregister(&owner);
        hold("R1", gone.is_ok(), || format!("unregistering the empty node {node}: {gone:?}"))?;
        self.former.insert(node, owner);
        self.promotions.remove(&node);
        self.model.forget_node(node);
        self.check_step()
    }

    /// Takes a range away, unless something of it is in use: then that is said as it is.
    fn take_range(&mut self, node: u16, first: u32) -> Applied {
        let Some(owner) = self.owners.get(&node) else { return refused("no node") };
        let known = self.model.nodes[&node].ranges.get(&first).copied();
        let blocks = known.map(|count| self.model.blocks_in(node, first, count)).unwrap_or_default();
        let used: u64 = blocks.iter().map(|(_, frames, _)| frames).sum();
        match self.mm.registry_mut().remove_range(owner, FrameNumber(first)) {
            Ok((range, _)) => {
                let is_right = Some(range.count.0) == known && range.first.0 == first && used == 0;
                hold("R1", is_right, || format!("{range:?} of node {node} went with {used} frames in use"))?;
                self.model.forget_range(node, first);
                self.check_node(node)?;
                Ok(Outcome::Done)
            }
            Err(error) => {
                let is_true = match error {
                    NodeError::Frames(FramesError::NoRange { first: at }) => known.is_none() && at.0 == first,
                    NodeError::Frames(FramesError::RangeInUse { first: at, used: told, lowest }) => {
                        let first_used = blocks.first().map(|(at, ..)| *at);
                        (at.0, told.0, Some(lowest.0)) == (first, used, first_used)
                    }
                    _ => false,
                };
                hold("R11", is_true, || format!("range {first} of node {node}, {used} frames in use: {error}"))?;
                refused(error)
            }
        }
    }

    /// R1, R15: what can move moves elsewhere on the node, what cannot is told, and then the range goes if nothing is left.
    pub(super) fn remove_range(&mut self, node: u16, first: u32, is_completed: bool) -> Applied {
        let (Some(known), Ok(id)) = (self.model.nodes.get(&node), NodeId::new(node)) else {
            return refused("no node");
        };
        let Some(&count) = known.ranges.get(&first) else { return self.take_range(node, first) };
        let run = FrameRange { first: FrameNumber(first), count: FrameCount(count) };
        let services = known.spec.services;
        match self.mm.plan_emptying(id, run) {
            Err(stay) => {
                let missing = Services::COMPACTION - services;
                hold("R11", stay == (Stay::NotOffered { node: id, missing }) && !missing.is_empty(), || {
                    format!("node {node} offers {services}: {stay}")
                })?;
            }
            Ok(emptying) => {
                hold("R15", services.contains(Services::COMPACTION), || {
                    format!("node {node} is emptied without the service")
                })?;
                self.model.is_vague.insert(node);
                let has_poison = self.model.has_poison(node, first, count);
                hold("R20", emptying.has_poison == has_poison, || {
                    format!("range {first} of node {node} is said to be poisoned: {}", emptying.has_poison)
                })?;
                let moving = emptying.moves.iter().map(|planned| planned.from().page().frame.0);
                let mut told: Vec<u32> = emptying.stuck.iter().map(|frame| frame.0).chain(moving).collect();
                told.sort_unstable();
                let there = self.model.blocks_in(node, first, count);
                let is_all = told.iter().eq(there.iter().map(|(at, ..)| at));
                hold("R11", is_all, || format!("in use of node {node} are {there:?}, told were {told:?}"))?;
                self.check_stuck(node, run, &emptying.stuck, emptying.moves.is_empty())?;
                for planned in emptying.moves {
                    let to = planned.to().first_frame();
                    hold("R15", !run.contains(to), || format!("{planned:?} stays in the range"))?;
                    self.finish_within(planned, None, is_completed)?;
                }
            }
        }
        self.check_in_use(node, id, run)?;
        self.take_range(node, first)
    }

    /// What is said to be stuck in a range cannot move, or has no place to go to.
    fn check_stuck(
        &self,
        node: u16,
        run: FrameRange,
        stuck: &[FrameNumber],
        is_untouched: bool,
    ) -> Result<(), Violation> {
        let ranges = &self.model.nodes[&node].ranges;
        let elsewhere = ranges.iter().filter(|(first, _)| **first != run.first.0);
        let room = elsewhere.filter_map(|(&first, &count)| self.model.largest_free_in(node, first, count)).max();
        for frame in stuck {
            let Some((frames, number)) = self.model.owned.get(&(node, frame.0)) else { continue };
            let known = &self.model.blocks[number];
            let can_move = known.is_movable && !known.is_pinned;
            let has_place = room.is_some_and(|order| 1 << order >= *frames);
            hold("R5", !(can_move && has_place && is_untouched), || {
                format!(
                    "block {number} does not leave {run:?} of node {node}, where order {room:?} is free elsewhere"
                )
            })?;
        }
        Ok(())
    }

    /// R5, R11: what is in use of a range is told, and whose it is.
    fn check_in_use(&self, node: u16, id: NodeId, run: FrameRange) -> Result<(), Violation> {
        let there = self.model.blocks_in(node, run.first.0, run.count.0);
        let holders: Vec<_> = self.mm.in_use(id, run).collect();
        let told: Vec<(u32, u64)> = holders.iter().map(|of| (of.block.first.0, of.block.count.0)).collect();
        let is_all = told.iter().copied().eq(there.iter().map(|&(at, frames, _)| (at, frames)));
        hold("R11", is_all, || format!("in use of node {node} are {there:?}, told are {told:?}"))?;
        let services = self.model.nodes[&node].spec.services;
        for (holder, (_, _, number)) in holders.iter().zip(&there) {
            let known = &self.model.blocks[number];
            let domain = known.domain.as_deref().and_then(|path| self.domain(path));
            let is_true = |page: Page| page.domain == domain && page.is_pinned == known.is_pinned;
            let is_known = known.is_movable && services.intersects(Services::RECLAIM | Services::MIGRATION);
            hold("R11", holder.page.is_some() == is_known && holder.page.is_none_or(is_true), || {
                format!("block {number} is {known:?}, told is {holder:?}")
            })?;
        }
        Ok(())
    }

    /// R3: a node has one owner, and it is not who had it before.
    pub(super) fn try_former_owner(&mut self, node: u16) -> Applied {
        let Some(former) = self.former.get(&node) else { return refused("nobody had it before") };
        let stays = Err(NodeError::NotOwner { node: former.node() });
        let spec = self
            .model
            .nodes
            .get(&node)
            .map_or(Spec { is_spm: false, is_easy: false, class: 1, services: Services::empty() }, |known| {
                known.spec
            });
        let Some(spec) = core_spec(&spec) else { return refused("no such class") };
        let first = self.model.nodes.get(&node).and_then(|known| known.ranges.keys().next().copied()).unwrap_or(0);
        let registry = self.mm.registry_mut();
        let Some(lent) = lend(FrameCount(64)) else { return refused("no memory for what is kept of the frames") };
        let added = registry.add_range(former, &spec, FrameCount(64), lent, Initial::Zero);
        hold("R3", added.map(|_| ()) == stays, || format!("a former owner of node {node} adds {added:?}"))?;
        let removed = registry.remove_range(former, FrameNumber(first)).map(|_| ());
        hold("R3", removed == stays, || format!("a former owner of node {node} removes a range: {removed:?}"))?;
        let set = registry.set_watermarks(former, marks(64, 0));
        hold("R3", set == stays, || format!("a former owner of node {node} sets its marks: {set:?}"))?;
        let gone = registry.unregister(former);
        hold("R3", gone == stays, || format!("a former owner of node {node} unregisters it: {gone:?}"))?;
        let no_grant = GrantError::NotOwner { node: former.node() };
        let granted = registry.grant(&[former], Terms::new(Rights::all(), Bytes(4096))).map(|grant| grant.id());
        hold("R12", granted == Err(no_grant), || format!("a former owner of node {node} grants {granted:?}"))?;
        let of_node = self.model.grants.iter().find(|(_, grant)| grant.nodes.contains(&node) && !grant.is_revoked);
        if let Some((number, id)) = of_node.and_then(|(number, _)| Some((number, *self.ids.get(number)?))) {
            let ended = registry.revoke(former, id).map(|_| ());
            let has_gone = !self.model.grants[number].is_held;
            let is_refused = ended == Err(no_grant) || has_gone && ended == Err(GrantError::Revoked);
            hold("R12", is_refused, || {
                format!("a former owner of node {node} revokes grant {number}: {ended:?}")
            })?;
        }
        if self.model.nodes.contains_key(&node) {
            self.check_node(node)?;
        }
        self.check_step()
    }

    pub(super) fn set_distance(&mut self, from: u16, to: u16, distance: u8) -> Applied {
        let is_there = self.model.nodes.contains_key(&from) && self.model.nodes.contains_key(&to);
        let (Ok(a), Ok(b), true) = (NodeId::new(from), NodeId::new(to), is_there) else {
            return refused("no node");
        };
        let can_be = if from == to { distance == 10 } else { (10..255).contains(&distance) };
        let set = self.mm.registry_mut().set_distance(a, b, distance);
        hold("distance", set.is_ok() == can_be, || format!("{distance} from {from} to {to}: {set:?}"))?;
        if let Err(error) = set {
            return refused(error);
        }
        self.model.distances.insert((from, to), distance);
        Ok(Outcome::Done)
    }

    pub(super) fn set_weight(&mut self, node: u16, weight: u8) -> Applied {
        let (Some(known), Ok(id)) = (self.model.nodes.get_mut(&node), NodeId::new(node)) else {
            return refused("no node");
        };
        self.mm.registry_mut().set_weight(id, weight);
        known.weight = weight.max(1);
        Ok(Outcome::Done)
    }
}
