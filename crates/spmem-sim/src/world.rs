//! A machine and its model, side by side: every step is done to both, and what differs is a violation.

use std::collections::BTreeMap;

use spmem_core::grant::{Grant, GrantId, Rights};
use spmem_core::migrate::{Move, Stay};
use spmem_core::mm::{AllocError, Block, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::page::Pages;
use spmem_core::policy::{Flags, Policy};
use spmem_core::tier::DRAM;
use spmem_core::units::{DomainId, FrameCount, NodeId, Order, Time};
use spmem_core::wall::{MAX_SHOWN, Mobility, Request};
use spmem_core::zero::Initial;

use crate::check::{Violation, hold};
use crate::machine::lend;
use crate::model::{self, Model, Payer, Set};
use crate::step::{Mode, Step, Terms};

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// It was refused, and changed nothing; why, in words.
    Refused(String),
}

/// When what concerns the whole machine is checked: every mask of every domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checks {
    /// After every step that changes any.
    EveryStep,
    /// In [`World::check_all`] only: for machines so large that it would take longer than what it checks.
    WhenAsked,
}

/// The machine.
#[derive(Debug)]
pub struct World {
    checks: Checks,
    mm: MemoryManager,
    pub(crate) model: Model,
    owners: BTreeMap<u16, Owner>,
    grants: BTreeMap<u32, Grant>,
    ids: BTreeMap<u32, GrantId>,
    blocks: BTreeMap<u32, Block>,
}

impl Default for World {
    fn default() -> Self {
        Self::new(Checks::EveryStep)
    }
}

type Applied = Result<Outcome, Violation>;

impl World {
    /// A machine without nodes, and the root domain.
    pub fn new(checks: Checks) -> Self {
        let mut model = Model::default();
        model.domains.insert(String::new(), model::Domain::default());
        let (owners, grants, ids, blocks) = Default::default();
        Self { checks, mm: MemoryManager::new(), model, owners, grants, ids, blocks }
    }

    /// The memory manager, to look at.
    pub const fn mm(&self) -> &MemoryManager {
        &self.mm
    }

    /// The memory manager, to measure. What is changed behind the model's back must be undone before the next step.
    pub const fn mm_mut(&mut self) -> &mut MemoryManager {
        &mut self.mm
    }

    /// Does one step and checks what came of it.
    ///
    /// # Errors
    /// [`Violation`]: a rule is broken.
    pub fn apply(&mut self, step: &Step) -> Applied {
        match step {
            Step::AddNode { node, is_spm, is_easy, frames, is_zero, services, tier } => {
                let initial = if *is_zero { Initial::Zero } else { Initial::Unknown };
                let services = Services::from_bits_truncate(*services);
                let known = model::Node { is_spm: *is_spm, is_easy: *is_easy, services, tier: *tier };
                self.add_node(*node, known, *frames, initial)
            }
            Step::RemoveNode { node } => self.remove_node(*node),
            Step::MakeDomain { path } => self.make_domain(path),
            Step::DropDomain { path } => self.drop_domain(path),
            Step::SetMems { path, nodes } => self.set_mems(path, nodes),
            Step::SetSysram { path, nodes } => self.set_sysram(path, nodes),
            Step::Grant { grant, nodes, terms } => self.grant(*grant, nodes, *terms),
            Step::Narrow { grant, from, nodes, terms } => self.narrow(*grant, *from, nodes, *terms),
            Step::Revoke { grant } => self.revoke(*grant),
            Step::Release { grant } => Ok(self.release(*grant)),
            Step::Advance { ns } => self.advance(*ns),
            Step::Alloc { block, domain, order, asked, mode, grants, is_movable } => {
                let asked = asked.as_ref().map(|nodes| nodes.iter().copied().collect());
                let request = model::Request { domain: domain.as_deref(), asked, mode: *mode, grants };
                self.alloc(*block, *order, &request, *is_movable)
            }
            Step::Use { block } => {
                let Some(block) = self.blocks.get(block) else { return refused("no block") };
                self.mm.note_used(block);
                Ok(Outcome::Done)
            }
            Step::Demote { node, wanted, grants, is_completed } => {
                self.demote(*node, *wanted, grants, *is_completed)
            }
            Step::Gather { path, grants } => self.gather(path, grants),
            Step::Free { block, is_zeroed } => self.free(*block, *is_zeroed),
        }
    }

    fn add_node(&mut self, node: u16, known: model::Node, frames: u64, initial: Initial) -> Applied {
        let Ok(id) = NodeId::new(node) else { return refused("no such node can be") };
        let spec = NodeSpec {
            node_type: if known.is_spm { NodeType::Spm } else { NodeType::Sysram },
            class: if known.is_spm { Class::Slow } else { Class::Plain },
            services: known.services,
            guard: if known.is_easy { Guard::Easy } else { Guard::Hard },
            owner: "simulated".into(),
        };
        if frames == 0 {
            return refused("a node without frames");
        }
        if let Err(error) = known.services.check() {
            return refused(error);
        }
        let result = self.mm.registry_mut().register(id, spec.clone());
        let is_known = self.model.nodes.contains_key(&node);
        hold("R1", result.is_err() == is_known, || format!("registering node {node}: {result:?}"))?;
        let owner = match result {
            Ok(owner) => owner,
            Err(error) => return refused(error),
        };
        let added =
            self.mm.registry_mut().add_range(&owner, &spec, FrameCount(frames), lend(FrameCount(frames)), initial);
        let added = added.map(|range| range.first.0);
        hold("frames", added.is_ok(), || format!("a range of {frames} frames: {added:?}"))?;
        if let (Ok(first), Initial::Unknown) = (added, initial) {
            self.model.set_written(node, first, frames, true);
        }
        self.owners.insert(node, owner);
        self.mm.registry_mut().set_abstract_distance(id, DRAM * (1 + 2 * u64::from(known.tier)));
        self.model.nodes.insert(node, known);
        self.check_step()
    }

    fn remove_node(&mut self, node: u16) -> Applied {
        let (Some(owner), Ok(id)) = (self.owners.get(&node), NodeId::new(node)) else { return refused("no node") };
        let first = self.mm.registry().frames(id).and_then(|frames| frames.ranges().next());
        let Some(range) = first else { return refused("no range") };
        let is_used = self.model.frames_used(node) > 0;
        let removed = self.mm.registry_mut().remove_range(owner, range.first);
        hold("R1", removed.is_err() == is_used, || format!("removing node {node} in use: {removed:?}"))?;
        if let Err(error) = removed {
            return refused(error);
        }
        let gone = self.mm.registry_mut().unregister(owner);
        hold("R1", gone.is_ok(), || format!("unregistering the empty node {node}: {gone:?}"))?;
        self.owners.remove(&node);
        self.model.set_written(node, range.first.0, range.count.0, false);
        self.model.nodes.remove(&node);
        for grant in self.model.grants.values_mut() {
            grant.nodes.remove(&node);
        }
        self.check_step()
    }

    fn make_domain(&mut self, path: &str) -> Applied {
        let Some((above, name)) = path.rsplit_once('/') else { return refused("the root is there") };
        let Some(parent) = self.domain(above) else { return refused("no parent") };
        match self.mm.registry_mut().create_domain(parent, name) {
            Ok(_) => {
                let old = self.model.domains.insert(path.to_owned(), model::Domain::default());
                hold("R4", old.is_none(), || format!("domain {path} was made twice"))?;
                self.check_step()
            }
            Err(error) => refused(error),
        }
    }

    fn drop_domain(&mut self, path: &str) -> Applied {
        let Some(domain) = self.domain(path) else { return refused("no domain") };
        match self.mm.registry_mut().remove_domain(domain) {
            Ok(()) => {
                let is_used = self.model.blocks.values().any(|block| block.domain.as_deref() == Some(path));
                hold("R5", !is_used, || format!("domain {path} went with frames in use"))?;
                self.model.domains.remove(path);
                Ok(Outcome::Done)
            }
            Err(error) => refused(error),
        }
    }

    fn set_mems(&mut self, path: &str, nodes: &[u16]) -> Applied {
        let (Some(domain), Some(mask)) = (self.domain(path), mask(nodes)) else {
            return refused("no domain or node");
        };
        let listed = self.mm.registry_mut().set_mems(domain, mask);
        let listed: u64 = listed.iter().flatten().map(|outside| outside.frames.0).sum();
        if let Some(known) = self.model.domains.get_mut(path) {
            known.mems = nodes.iter().copied().collect();
        }
        let below = format!("{path}/");
        let is_outside = |block: &&model::Block| {
            let within = block.domain.as_deref().filter(|domain| *domain == path || domain.starts_with(&below));
            within.is_some_and(|domain| !self.model.effective(domain).contains(&block.node))
        };
        let outside: u64 = self.model.blocks.values().filter(is_outside).map(|block| block.frames).sum();
        hold("R5", listed == outside, || format!("{listed} frames are listed as outside, {outside} are"))?;
        self.check_step()
    }

    fn set_sysram(&mut self, path: &str, nodes: &[u16]) -> Applied {
        let (Some(domain), Some(mask)) = (self.domain(path), mask(nodes)) else {
            return refused("no domain or node");
        };
        if let Err(error) = self.mm.registry_mut().set_mems_sysram(domain, mask) {
            return refused(error);
        }
        if let Some(known) = self.model.domains.get_mut(path) {
            known.sysram = nodes.iter().copied().collect();
        }
        self.check_step()
    }

    fn note_grant(&mut self, number: u32, grant: Grant, nodes: &[u16], terms: Terms, parent: Option<u32>) {
        self.ids.insert(number, grant.id());
        self.grants.insert(number, grant);
        let nodes = nodes.iter().copied().collect();
        let known = model::Grant { nodes, terms, parent, is_held: true, is_revoked: false, used: 0 };
        self.model.grants.insert(number, known);
    }

    fn grant(&mut self, number: u32, nodes: &[u16], terms: Terms) -> Applied {
        let owners: Option<Vec<&Owner>> = nodes.iter().map(|node| self.owners.get(node)).collect();
        let Some(owners) = owners.filter(|_| !self.ids.contains_key(&number)) else {
            return refused("no node, or a grant of that number");
        };
        match self.mm.registry_mut().grant(&owners, terms.core()) {
            Ok(grant) => {
                hold("R12", terms.ends() > self.model.now, || {
                    format!("grant {number} was over when it was made")
                })?;
                self.note_grant(number, grant, nodes, terms, None);
                Ok(Outcome::Done)
            }
            Err(error) => refused(error),
        }
    }

    fn narrow(&mut self, number: u32, from: u32, nodes: &[u16], terms: Terms) -> Applied {
        let (Some(mask), false) = (mask(nodes), self.ids.contains_key(&number)) else { return refused("no node") };
        let Some(whole) = self.grants.get(&from) else { return refused("no grant") };
        match self.mm.registry_mut().narrow(whole, mask, terms.core()) {
            Ok(grant) => {
                let whole = &self.model.grants[&from];
                let asked: Set = nodes.iter().copied().collect();
                let is_narrower = asked.is_subset(&whole.nodes)
                    && terms.rights & !whole.terms.rights & 0x3f == 0
                    && terms.quota <= whole.terms.quota
                    && terms.ends() <= whole.terms.ends();
                let is_live = self.model.is_live(from);
                hold("R12", is_narrower && is_live, || format!("grant {number} is wider than {from}"))?;
                self.note_grant(number, grant, nodes, terms, Some(from));
                Ok(Outcome::Done)
            }
            Err(error) => refused(error),
        }
    }

    fn revoke(&mut self, number: u32) -> Applied {
        let (Some(&id), Some(known)) = (self.ids.get(&number), self.model.grants.get(&number)) else {
            return refused("no grant");
        };
        let owner = known.nodes.first().and_then(|node| self.owners.get(node));
        let Some(owner) = owner else { return refused("none of its nodes is left") };
        match self.mm.registry_mut().revoke(owner, id) {
            Ok(held) => {
                let listed: u64 = held.iter().map(|held| held.bytes.0).sum();
                let used = self.model.used(number);
                hold("R13", listed == used, || format!("{listed} bytes are listed as held, {used} are"))?;
                let family: Vec<u32> = self
                    .model
                    .grants
                    .keys()
                    .copied()
                    .filter(|&grant| self.model.descends(grant, number))
                    .collect();
                for grant in family {
                    self.model.grants.entry(grant).and_modify(|grant| grant.is_revoked = true);
                }
                Ok(Outcome::Done)
            }
            Err(error) => {
                let has_ended = known.is_revoked || !known.is_held;
                hold("R13", has_ended, || format!("grant {number} cannot be revoked: {error}"))?;
                refused(error)
            }
        }
    }

    fn release(&mut self, number: u32) -> Outcome {
        let Some(grant) = self.grants.remove(&number) else { return Outcome::Refused("no grant".to_owned()) };
        if let Some(known) = self.model.grants.get_mut(&number) {
            known.is_held = false;
        }
        match self.mm.registry_mut().release(grant) {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Refused(error.to_string()),
        }
    }

    fn advance(&mut self, ns: u64) -> Applied {
        let live = |model: &Model| model.grants.keys().filter(|&&grant| model.is_live(grant)).count();
        let before = live(&self.model);
        self.model.now = self.model.now.saturating_add(ns);
        let ended = before - live(&self.model);
        let told = self.mm.registry_mut().advance(Time(self.model.now)).len();
        hold("R12", told == ended, || format!("{ended} grants ended with the time, {told} were told"))?;
        Ok(Outcome::Done)
    }

    fn alloc(&mut self, number: u32, order: u8, asked: &model::Request<'_>, is_movable: bool) -> Applied {
        let (Ok(order), false) = (Order::new(order), self.blocks.contains_key(&number)) else {
            return refused("no such order, or a block of that number");
        };
        let domain = match asked.domain {
            None => None,
            Some(path) => match self.domain(path) {
                None => return refused("no domain"),
                found => found,
            },
        };
        let policy = match &asked.asked {
            None => Policy::DEFAULT,
            Some(nodes) => match Policy::new(asked.mode.core(), Flags::empty(), mask_of(nodes)) {
                Ok(policy) => policy,
                Err(_) if asked.mode == Mode::Bind => Policy::bind(NodeMask::EMPTY),
                Err(_) => Policy::DEFAULT,
            },
        };
        let shown: Vec<&Grant> =
            asked.grants.iter().filter_map(|grant| self.grants.get(grant)).take(MAX_SHOWN).collect();
        let mobility = if is_movable { Mobility::Movable } else { Mobility::Unmovable };
        let request = Request { policy, domain, grants: &shown, mobility, ..Request::default() };
        let allowed = self.model.allowed(asked);
        match self.mm.alloc(&request, order) {
            Ok(block) => {
                self.take(number, block, asked, &allowed, is_movable)?;
                Ok(Outcome::Done)
            }
            Err(AllocError::Refused(refusal)) => {
                hold("R8", allowed.is_empty(), || format!("{refusal}, but {allowed:?} are allowed"))?;
                refused(refusal)
            }
            Err(error) => {
                let bytes = order.bytes().0;
                let has_room = |node: u16| {
                    let frames = NodeId::new(node).ok().and_then(|node| self.mm.registry().frames(node));
                    let is_paid = self.model.payer(asked.grants, Rights::ALLOC, node, bytes) != Payer::OverQuota;
                    is_paid && frames.is_some_and(|frames| frames.largest_free() >= Some(order))
                };
                let room = allowed.iter().copied().find(|&node| has_room(node));
                hold("R10", room.is_none(), || format!("{error}, but node {room:?} has room"))?;
                refused(error)
            }
        }
    }

    /// Holds a block that was given against the rules, and takes it into the model.
    fn take(
        &mut self,
        number: u32,
        block: Block,
        asked: &model::Request<'_>,
        allowed: &Set,
        is_movable: bool,
    ) -> Result<(), Violation> {
        let (node, first, frames) = (block.node().get(), block.first_frame().0, block.order().frames().0);
        hold("R6", allowed.contains(&node), || format!("{asked:?} got node {node}, allowed are {allowed:?}"))?;
        let mut grant = None;
        let known = &self.model.nodes[&node];
        if known.is_spm {
            match self.model.payer(asked.grants, Rights::ALLOC, node, block.bytes().0) {
                Payer::Grant(payer) => grant = Some(payer),
                Payer::Nobody => {
                    let is_named = known.is_easy && asked.mode == Mode::Bind && asked.asked.is_some();
                    hold("R9", is_named, || format!("{asked:?} got SPM node {node} without a grant"))?;
                }
                Payer::OverQuota => hold("R12", false, || format!("{asked:?} exceeds its quota on node {node}"))?,
            }
        }
        let domain = asked.domain.map(str::to_owned);
        self.settle(number, block, model::Block { domain, grant, node, first, frames, is_movable })
    }

    /// A block has a place: nobody else's, and zero if it is said to be.
    fn settle(&mut self, number: u32, block: Block, known: model::Block) -> Result<(), Violation> {
        let model::Block { node, first, frames, grant, .. } = known;
        let owner = self.model.owner_of(node, first, frames);
        hold("frames", owner.is_none(), || format!("frame {first} of node {node} is block {owner:?}'s already"))?;
        let is_aligned = u64::from(first).is_multiple_of(frames);
        hold("frames", is_aligned, || format!("a block of {frames} frames at frame {first}"))?;
        let is_zero = self.model.is_zero(node, first, frames);
        hold("R21", block.is_zeroed() == is_zero, || {
            format!(
                "the block at frame {first} of node {node} is zero: {is_zero}, it is said to be: {}",
                block.is_zeroed()
            )
        })?;
        self.model.set_written(node, first, frames, true);
        if let Some(grant) = grant.and_then(|grant| self.model.grants.get_mut(&grant)) {
            grant.used += block.bytes().0;
        }
        self.model.owned.insert((node, first), (frames, number));
        self.model.blocks.insert(number, known);
        self.blocks.insert(number, block);
        self.check_node(node)
    }

    /// A block leaves its place.
    fn unsettle(&mut self, number: u32) -> Option<(Block, model::Block)> {
        let (block, known) = (self.blocks.remove(&number)?, self.model.blocks.remove(&number)?);
        self.model.owned.remove(&(known.node, known.first));
        if let Some(grant) = known.grant.and_then(|grant| self.model.grants.get_mut(&grant)) {
            grant.used -= block.bytes().0;
        }
        Some((block, known))
    }

    /// R14, R15: cold blocks go down.
    fn demote(&mut self, node: u16, wanted: usize, shown: &[u32], is_completed: bool) -> Applied {
        let (Ok(id), Some(known)) = (NodeId::new(node), self.model.nodes.get(&node)) else {
            return refused("no node");
        };
        let services = known.services;
        let looked_at = |mm: &MemoryManager| mm.registry().pages(id).map(Pages::looked_at);
        let before = looked_at(&self.mm);
        let taken = self.mm.take_cold(id, wanted);
        let may_look = services.contains(Services::RECLAIM);
        hold("R15", may_look || taken.is_empty() && looked_at(&self.mm) == before, || {
            format!("node {node} was searched without RECLAIM")
        })?;
        let needs = Services::DEMOTION | Services::MIGRATION;
        for isolated in taken {
            let grants: Vec<&Grant> =
                shown.iter().filter_map(|grant| self.grants.get(grant)).take(MAX_SHOWN).collect();
            match self.mm.plan_demotion(isolated, &grants) {
                Ok(planned) => {
                    hold("R15", services.contains(needs), || format!("node {node} demotes without the services"))?;
                    let tier = |node: NodeId| self.model.nodes[&node.get()].tier;
                    let (from, to) = (id, planned.to().node());
                    hold("R14", tier(to) > tier(from), || format!("node {from} demotes to node {to}"))?;
                    self.finish(planned, shown, is_completed)?;
                }
                Err(stay) => {
                    let is_reason = !matches!(stay, Stay::NotOffered { .. }) || !services.contains(needs);
                    hold("R3", is_reason, || format!("node {node}: {stay}"))?;
                }
            }
        }
        self.check_node(node)?;
        Ok(Outcome::Done)
    }

    /// R5: what lies outside a domain's masks moves inside, or stays for a reason.
    fn gather(&mut self, path: &str, shown: &[u32]) -> Applied {
        if !self.model.domains.contains_key(path) {
            return refused("no domain");
        }
        let effective = self.model.effective(path);
        let outside = self.model.blocks.iter();
        let outside = outside.filter(|(_, b)| b.domain.as_deref() == Some(path) && !effective.contains(&b.node));
        let outside: Vec<u32> = outside.map(|(&number, _)| number).collect();
        for number in outside {
            let (is_movable, node) = (self.model.blocks[&number].is_movable, self.model.blocks[&number].node);
            let has_service = self.model.nodes[&node].services.contains(Services::MIGRATION);
            let isolated = match self.mm.take(&self.blocks[&number]) {
                Ok(isolated) => isolated,
                Err(stay) => {
                    hold("R5", !is_movable || !has_service, || format!("block {number} cannot move: {stay}"))?;
                    continue;
                }
            };
            hold("R15", is_movable && has_service, || format!("block {number} of node {node} moves"))?;
            let grants: Vec<&Grant> =
                shown.iter().filter_map(|grant| self.grants.get(grant)).take(MAX_SHOWN).collect();
            if let Ok(planned) = self.mm.plan_evacuation(isolated, &mask_of(&effective), &grants) {
                self.finish(planned, shown, true)?;
            }
        }
        Ok(Outcome::Done)
    }

    /// Completes a move, or calls it off, and holds it against R12 and R14.
    fn finish(&mut self, planned: Move, shown: &[u32], is_completed: bool) -> Result<(), Violation> {
        let from = (planned.from().node().get(), planned.from().page().frame.0);
        let number = self.model.owned.get(&from).map(|&(_, number)| number);
        let Some(number) = number else { return hold("frames", false, || format!("nobody owns {from:?}")) };
        let to = planned.to();
        let (node, first, frames) = (to.node().get(), to.first_frame().0, to.order().frames().0);
        let known = &self.model.blocks[&number];
        let reach =
            known.domain.as_deref().map_or_else(|| self.model.of_type(false), |path| self.model.effective(path));
        hold("R14", reach.contains(&node), || format!("block {number} goes to node {node}, outside its domain"))?;
        let payer = self.model.payer(shown, Rights::DEMOTE_TO, node, to.bytes().0);
        let grant = match payer {
            _ if !self.model.nodes[&node].is_spm => None,
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
                self.settle(number, new, model::Block { domain, grant, node, first, frames, is_movable })?;
                self.check_node(from.0)
            }
            Err(_) => hold("R14", false, || format!("the move of block {number} cannot be completed")),
        }
    }

    fn free(&mut self, number: u32, is_zeroed: bool) -> Applied {
        let Some((block, known)) = self.unsettle(number) else { return refused("no block") };
        let freed = if is_zeroed { self.mm.free_zeroed(block) } else { self.mm.free(block) };
        hold("frames", freed.is_ok(), || format!("block {number} is not taken back: {freed:?}"))?;
        if is_zeroed {
            self.model.set_written(known.node, known.first, known.frames, false);
        }
        self.check_node(known.node)?;
        Ok(Outcome::Done)
    }

    fn domain(&self, path: &str) -> Option<DomainId> {
        self.model.domains.contains_key(path).then(|| self.mm.registry().find_domain(path)).flatten()
    }

    /// Frames in use on a node, by its own count.
    fn check_node(&self, node: u16) -> Result<(), Violation> {
        let counted =
            NodeId::new(node).ok().and_then(|id| self.mm.registry().frames(id)).map(|frames| frames.used().0);
        let used = self.model.frames_used(node);
        hold("frames", counted == Some(used), || format!("node {node} counts {counted:?} frames in use of {used}"))
    }

    /// R2, R4, if it is time.
    fn check_step(&self) -> Applied {
        if self.checks == Checks::EveryStep {
            self.check_masks()?;
        }
        Ok(Outcome::Done)
    }

    /// R2, R4: the masks of every domain.
    fn check_masks(&self) -> Result<(), Violation> {
        let registry = self.mm.registry();
        let plain = mask_of(&self.model.of_type(false));
        hold("R2", *registry.sysram() == plain, || format!("sysram is {}, not {plain}", registry.sysram()))?;
        for path in self.model.domains.keys() {
            let Some(domain) = self.domain(path) else {
                hold("R4", false, || format!("domain {path} is lost"))?;
                continue;
            };
            let (effective, default) =
                (mask_of(&self.model.effective(path)), mask_of(&self.model.default_mask(path)));
            let found = (registry.effective(domain), registry.default_mask(domain));
            hold("R4", found == (Some(&effective), Some(&default)), || {
                format!("{path}: masks are {found:?}, not {effective} and {default}")
            })?;
        }
        Ok(())
    }

    /// Everything that can be checked, whatever it costs.
    ///
    /// # Errors
    /// [`Violation`]
    pub fn check_all(&self) -> Result<(), Violation> {
        self.check_masks()?;
        self.model.nodes.keys().try_for_each(|&node| self.check_node(node))?;
        let registry = self.mm.registry();
        for (number, known) in &self.model.grants {
            let Some(grant) = self.grants.get(number) else { continue };
            let info = registry.grant_info(grant);
            let is_live = self.model.is_live(*number);
            hold("R12", info.is_ok() == is_live, || format!("grant {number}: {info:?}, live: {is_live}"))?;
            let used = self.model.used(*number);
            if let Ok(info) = info {
                hold("R12", info.used.0 == used && used <= known.terms.quota, || {
                    format!("grant {number} counts {} bytes in use of {used}", info.used)
                })?;
            }
        }
        for (number, known) in &self.model.blocks {
            let frames = NodeId::new(known.node).ok().and_then(|node| registry.frames(node));
            let first = self.blocks[number].first_frame();
            let order = frames.and_then(|frames| frames.allocated_order(first).ok());
            let is_there = order.is_some_and(|order| order.frames().0 == known.frames);
            hold("frames", is_there, || format!("block {number} is {order:?} to its node"))?;
        }
        Ok(())
    }
}

fn refused(reason: impl ToString) -> Applied {
    Ok(Outcome::Refused(reason.to_string()))
}

fn mask(nodes: &[u16]) -> Option<NodeMask> {
    nodes.iter().map(|&node| NodeId::new(node).ok()).collect()
}

fn mask_of(nodes: &Set) -> NodeMask {
    nodes.iter().filter_map(|&node| NodeId::new(node).ok()).collect()
}
