//! Services: what moves blocks about, each only where a node offers it (R3, R5, R14 to R16).

use std::collections::BTreeMap;

use spmem_core::grant::Rights;
use spmem_core::migrate::{Isolated, Move, Mover, Stay};
use spmem_core::mm::MemoryManager;
use spmem_core::node::Services;
use spmem_core::page::Pages;
use spmem_core::units::{FrameCount, NodeId, Order};

use super::requests::shown;
use super::{Applied, Outcome, World, mask_of, refused};
use crate::check::{Violation, hold};
use crate::model::{self, Goal, Payer};

/// Blocks that reclaim takes at a time.
const RECLAIM_BATCH: usize = 32;

impl World {
    /// R14, R15: cold blocks go down.
    pub(super) fn demote(&mut self, node: u16, wanted: usize, shown: &[u32], is_completed: bool) -> Applied {
        if !self.model.nodes.contains_key(&node) {
            return refused("no node");
        }
        for isolated in self.take_cold(node, wanted)? {
            self.demote_one(isolated, shown, is_completed)?;
        }
        self.check_node(node)?;
        Ok(Outcome::Done)
    }

    /// What kswapd does: once a node is below low, cold blocks go down until it is at high, or none can (R15, R16).
    pub(super) fn reclaim(&mut self, node: u16, shown: &[u32]) -> Applied {
        let (Ok(id), Some(known)) = (NodeId::new(node), self.model.nodes.get(&node)) else {
            return refused("no node");
        };
        let (due, may_look) = (self.mm.shortage(id), known.spec.services.contains(Services::RECLAIM));
        hold("R15", may_look || due == FrameCount(0), || format!("node {node} is to free {due} without RECLAIM"))?;
        let mut freed = 0;
        while freed < due.0 {
            let mut batch = 0;
            for isolated in self.take_cold(node, RECLAIM_BATCH)? {
                batch += self.demote_one(isolated, shown, true)?.0;
            }
            if batch == 0 {
                break;
            }
            freed += batch;
        }
        self.mm.note_reclaimed(id, FrameCount(freed));
        let left = self.mm.shortage(id);
        hold("R15", freed < due.0 || left == FrameCount(0), || {
            format!("{freed} frames left node {node}, {due} were due, yet it is short of {left}")
        })?;
        self.check_node(node)?;
        Ok(Outcome::Done)
    }

    /// R15: without RECLAIM a node is not even looked at.
    fn take_cold(&mut self, node: u16, wanted: usize) -> Result<Vec<Isolated>, Violation> {
        let Ok(id) = NodeId::new(node) else { return Ok(Vec::new()) };
        let looked_at = |mm: &MemoryManager| mm.registry().pages(id).map(Pages::looked_at);
        let before = looked_at(&self.mm);
        let taken = self.mm.take_cold(id, wanted);
        hold("frames", taken.is_ok(), || format!("the cold blocks of node {node} are not listed: {taken:?}"))?;
        let taken = taken.unwrap_or_default();
        let may_look = self.model.nodes[&node].spec.services.contains(Services::RECLAIM);
        hold("R15", may_look || taken.is_empty() && looked_at(&self.mm) == before, || {
            format!("node {node} was searched without RECLAIM")
        })?;
        for isolated in &taken {
            let number = self.model.owned.get(&(node, isolated.page().frame.0)).map(|(_, number)| number);
            let is_pinned = number.is_some_and(|number| self.model.blocks[number].is_pinned);
            hold("R15", !is_pinned, || format!("the pinned block {number:?} of node {node} is taken"))?;
        }
        Ok(taken)
    }

    /// How much left its node.
    fn demote_one(
        &mut self,
        isolated: Isolated,
        numbers: &[u32],
        is_completed: bool,
    ) -> Result<FrameCount, Violation> {
        let (from, order) = (isolated.node().get(), isolated.page().order);
        let needs = Services::DEMOTION | Services::MIGRATION;
        let Some(&(_, number)) = self.model.owned.get(&(from, isolated.page().frame.0)) else {
            hold("frames", false, || format!("nobody owns {isolated:?}"))?;
            return Ok(FrameCount(0));
        };
        let targets = self.model.targets(&self.model.blocks[&number], Goal::Down, numbers);
        let best = self.first_with_room(&targets, numbers, order);
        match self.mm.plan_demotion(isolated, &shown(&self.grants, numbers)) {
            Ok(planned) => {
                let is_offered = self.model.nodes[&from].spec.services.contains(needs);
                hold("R15", is_offered, || format!("node {from} demotes without the services"))?;
                let to = planned.to().node().get();
                hold("R14", best == Some(to), || {
                    format!("block {number} goes down to node {to}, not {best:?}, of {targets:?}")
                })?;
                self.finish(planned, numbers, is_completed)?;
                Ok(if is_completed { order.frames() } else { FrameCount(0) })
            }
            Err(stay) => {
                self.check_no_move(number, needs, &targets, best, numbers, order, stay)?;
                Ok(FrameCount(0))
            }
        }
    }

    /// The first of the nodes that a block can go to by DEMOTE_TO.
    pub(super) fn first_with_room(&self, targets: &[u16], shown: &[u32], order: Order) -> Option<u16> {
        let has_room = |node: &u16| self.model.has_room(shown, Rights::DEMOTE_TO, *node, order.get());
        targets.iter().copied().find(has_room)
    }

    /// R3, R11: a block that could move goes nowhere for a reason that is true.
    #[allow(
        clippy::too_many_arguments,
        reason = "what was asked, what the model makes of it, and what came of it"
    )]
    pub(super) fn check_no_move(
        &self,
        number: u32,
        needs: Services,
        targets: &[u16],
        best: Option<u16>,
        shown: &[u32],
        order: Order,
        stay: Stay,
    ) -> Result<(), Violation> {
        let known = &self.model.blocks[&number];
        let missing = needs - self.model.nodes[&known.node].spec.services;
        let is_true = match stay {
            Stay::NotOffered { node, missing: told } => node.get() == known.node && told == missing,
            Stay::NoTarget { domain } => {
                targets.is_empty() && domain == known.domain.as_deref().and_then(|path| self.domain(path))
            }
            Stay::NoRoom { cause } => {
                let last = self.check_lack(shown, Rights::DEMOTE_TO, order, cause)?;
                best.is_none() && targets.last() == Some(&last)
            }
            _ => false,
        };
        let is_lacking = matches!(stay, Stay::NotOffered { .. });
        hold("R11", is_true && is_lacking != missing.is_empty(), || {
            format!("block {number}, {known:?}, could go to {targets:?}, best to {best:?}: {stay}")
        })
    }

    /// R15, R20: blocks move together within their node, and none in vain.
    pub(super) fn compact(&mut self, node: u16, order: u8, is_completed: bool) -> Applied {
        let (Ok(id), Ok(order)) = (NodeId::new(node), Order::new(order)) else { return refused("no such node") };
        let Some(known) = self.model.nodes.get(&node) else { return refused("no node") };
        let is_offered = known.spec.services.contains(Services::COMPACTION);
        let mut compaction = match self.mm.begin_compaction(id, order) {
            Ok(compaction) => compaction,
            Err(stay) => {
                let missing = Services::COMPACTION - known.spec.services;
                let is_true = match stay {
                    Stay::NotOffered { node: of, missing: told } => of == id && told == missing && !is_offered,
                    Stay::Deferred { node: of } => of == id && is_offered,
                    _ => false,
                };
                hold("R11", is_true, || format!("node {node} lacks {missing}: {stay}"))?;
                return refused(stay);
            }
        };
        hold("R15", is_offered, || format!("node {node} is compacted without the service"))?;
        self.model.is_vague.insert(node);
        while !compaction.is_over() {
            for planned in self.mm.plan_compaction(&mut compaction) {
                self.finish_within(planned, Some(order), is_completed)?;
            }
            self.check_node(node)?;
        }
        self.mm.end_compaction(&compaction);
        Ok(Outcome::Done)
    }

    /// Completes a move within a node, or calls it off. The node is in order when all moves of a window are done.
    pub(super) fn finish_within(
        &mut self,
        planned: Move,
        window: Option<Order>,
        is_completed: bool,
    ) -> Result<(), Violation> {
        let (node, from) = (planned.from().node().get(), planned.from().page().frame.0);
        let (to, first, frames) =
            (planned.to().node().get(), planned.to().first_frame().0, planned.to().order().frames().0);
        hold("R15", to == node, || format!("compaction of node {node} moves to node {to}"))?;
        let Some(&(_, number)) = self.model.owned.get(&(node, from)) else {
            return hold("frames", false, || format!("nobody owns frame {from} of node {node}"));
        };
        let known = &self.model.blocks[&number];
        hold("R15", known.is_movable && !known.is_pinned, || format!("block {number} cannot move, yet it does"))?;
        let has_poison =
            |window: Order| self.model.has_poison(node, from >> window.get() << window.get(), window.frames().0);
        let is_vain = window.is_some_and(has_poison);
        hold("R20", !is_vain, || format!("block {number} moves for a window that never becomes whole"))?;
        if !is_completed {
            self.model.set_written(node, first, frames, true);
            let is_off = self.mm.call_off(planned);
            return hold("R14", is_off.is_ok(), || format!("a move cannot be called off: {is_off:?}"));
        }
        let Some((old, known)) = self.unsettle(number) else { return Ok(()) };
        match self.mm.complete(planned, old) {
            Ok(new) => self.settle(number, new, model::Block { first, ..known }),
            Err(_) => hold("R14", false, || format!("the move of block {number} cannot be completed")),
        }
    }

    /// R16: a node that has run out names who must give, if it may; all that one has of it comes back.
    pub(super) fn run_out(&mut self, node: u16) -> Applied {
        let (Ok(id), Some(known)) = (NodeId::new(node), self.model.nodes.get(&node)) else {
            return refused("no node");
        };
        let is_eligible = known.spec.services.contains(Services::OOM_ELIGIBLE);
        let of_node = self.model.blocks.values().filter(|block| block.node == node);
        let mut uses: BTreeMap<&str, u64> = BTreeMap::new();
        for block in of_node {
            if let Some(path) = &block.domain {
                *uses.entry(path).or_default() += block.frames;
            }
        }
        let most = uses.values().copied().max().filter(|_| is_eligible);
        let victim = self.mm.choose_victim(id, |_| FrameCount(0));
        let used = victim.map(|victim| victim.used.0);
        hold("R16", used == most, || format!("who must give of node {node} has {used:?}, the most is {most:?}"))?;
        let Some(victim) = victim else { return refused("nobody must give") };
        let path = uses.keys().find(|path| self.domain(path) == Some(victim.domain)).copied().map(str::to_owned);
        hold("R16", path.as_ref().is_some_and(|path| uses[path.as_str()] == victim.used.0), || {
            format!("{path:?} must give {} of node {node}", victim.used)
        })?;
        let is_theirs = |block: &model::Block| block.node == node && block.domain == path;
        let theirs: Vec<u32> =
            self.model.blocks.iter().filter(|(_, block)| is_theirs(block)).map(|(&number, _)| number).collect();
        for number in theirs {
            self.free(number, false)?;
        }
        Ok(Outcome::Done)
    }

    /// R5: what lies outside a domain's masks moves inside, or stays for a reason.
    pub(super) fn gather(&mut self, path: &str, numbers: &[u32]) -> Applied {
        if !self.model.domains.contains_key(path) {
            return refused("no domain");
        }
        let effective = self.model.effective(path);
        let outside = self.model.blocks.iter();
        let outside = outside.filter(|(_, b)| b.domain.as_deref() == Some(path) && !effective.contains(&b.node));
        let outside: Vec<u32> = outside.map(|(&number, _)| number).collect();
        for number in outside {
            let known = &self.model.blocks[&number];
            let (is_movable, node) = (known.is_movable && !known.is_pinned, known.node);
            let has_service = self.model.nodes[&node].spec.services.contains(Services::MIGRATION);
            // What is contiguous never moves: there is no block to take.
            let Some(block) = self.blocks.get(&number) else { continue };
            let isolated = match self.mm.take(block, Mover::Manager) {
                Ok(isolated) => isolated,
                Err(stay) => {
                    hold("R5", !is_movable || !has_service, || format!("block {number} cannot move: {stay}"))?;
                    continue;
                }
            };
            hold("R15", is_movable && has_service, || format!("block {number} of node {node} moves"))?;
            let order = isolated.page().order;
            let targets = self.model.targets(&self.model.blocks[&number], Goal::Aside, numbers);
            let best = self.first_with_room(&targets, numbers, order);
            let grants = shown(&self.grants, numbers);
            match self.mm.plan_evacuation(isolated, &mask_of(&effective), &grants) {
                Ok(planned) => {
                    let to = planned.to().node().get();
                    hold("R14", best == Some(to), || {
                        format!("block {number} goes to node {to}, not {best:?}, of {targets:?}")
                    })?;
                    self.finish(planned, numbers, true)?;
                }
                Err(stay) => {
                    self.check_no_move(number, Services::MIGRATION, &targets, best, numbers, order, stay)?;
                }
            }
        }
        Ok(Outcome::Done)
    }

    /// Completes a move, or calls it off, and holds it against R12 and R14.
    pub(super) fn finish(&mut self, planned: Move, shown: &[u32], is_completed: bool) -> Result<(), Violation> {
        let from = (planned.from().node().get(), planned.from().page().frame.0);
        let number = self.model.owned.get(&from).map(|&(_, number)| number);
        let Some(number) = number else { return hold("frames", false, || format!("nobody owns {from:?}")) };
        let to = planned.to();
        let (node, first, frames) = (to.node().get(), to.first_frame().0, to.order().frames().0);
        let known = &self.model.blocks[&number];
        let reach =
            known.domain.as_deref().map_or_else(|| self.model.of_type(false), |path| self.model.effective(path));
        hold("R15", !known.is_pinned, || format!("the pinned block {number} goes to node {node}"))?;
        hold("R14", reach.contains(&node), || format!("block {number} goes to node {node}, outside its domain"))?;
        let payer = self.model.payer(shown, Rights::DEMOTE_TO, node, to.bytes().0);
        let grant = match payer {
            _ if !self.model.nodes[&node].spec.is_spm => None,
            Payer::Grant(grant) => Some(grant),
            Payer::Nobody | Payer::OverQuota => {
                return hold("R14", false, || format!("block {number} goes to SPM node {node}: {payer:?}"));
            }
        };
        if !is_completed {
            // What was allocated for it counts as written all the same.
            self.model.set_written(node, first, frames, true);
            let is_off = self.mm.call_off(planned);
            return hold("R14", is_off.is_ok(), || format!("a move cannot be called off: {is_off:?}"));
        }
        let (domain, is_movable) = (known.domain.clone(), known.is_movable);
        let Some((old, _)) = self.unsettle(number) else { return Ok(()) };
        match self.mm.complete(planned, old) {
            Ok(new) => {
                // A copy lies there now (R21).
                self.model.set_written(node, first, frames, true);
                self.settle(
                    number,
                    new,
                    model::Block { domain, grant, node, first, frames, is_movable, is_pinned: false },
                )?;
                self.check_node(node)?;
                self.check_node(from.0)
            }
            Err(_) => hold("R14", false, || format!("the move of block {number} cannot be completed")),
        }
    }
}
