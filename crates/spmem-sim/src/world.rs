//! A machine and its model, side by side: every step is done to both, and what differs is a violation. Here nodes, domains
//! and what is checked of all; grants, blocks and services have files of their own.

mod blocks;
mod grants;
mod services;

use std::collections::BTreeMap;

use spmem_core::domain::Outside;
use spmem_core::grant::{Grant, GrantId};
use spmem_core::mm::{Block, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::registry::Registered;
use spmem_core::tier::DRAM;
use spmem_core::units::{DomainId, FrameCount, NodeId};
use spmem_core::watermark::Watermarks;
use spmem_core::zero::Initial;

use crate::check::{Violation, hold};
use crate::machine::lend;
use crate::model::{self, Model, Set};
use crate::step::Step;

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

/// Reclaim of a node begins when less than this part of its frames is free, ...
const LOW_SHARE: u64 = 16;
/// ... and ends when this part is.
const HIGH_SHARE: u64 = 8;

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
            Step::Use { block } => self.note_used(*block),
            Step::Demote { node, wanted, grants, is_completed } => {
                self.demote(*node, *wanted, grants, *is_completed)
            }
            Step::Reclaim { node, grants } => self.reclaim(*node, grants),
            Step::Compact { node, order, is_completed } => self.compact(*node, *order, *is_completed),
            Step::Gather { path, grants } => self.gather(path, grants),
            Step::Oom { node } => self.run_out(*node),
            Step::Poison { node, frame } => self.poison(*node, *frame),
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
        if let Err(error) = spec.check() {
            return refused(error);
        }
        let result = self.mm.registry_mut().register(id, spec.clone());
        let is_known = self.model.nodes.contains_key(&node);
        hold("R1", result.is_err() == is_known, || format!("registering node {node}: {result:?}"))?;
        let Registered { owner, outside } = match result {
            Ok(registered) => registered,
            Err(error) => return refused(error),
        };
        let added =
            self.mm.registry_mut().add_range(&owner, &spec, FrameCount(frames), lend(FrameCount(frames)), initial);
        let added = added.map(|range| range.first.0);
        hold("frames", added.is_ok(), || format!("a range of {frames} frames: {added:?}"))?;
        if let (Ok(first), Initial::Unknown) = (added, initial) {
            self.model.set_written(node, first, frames, true);
        }
        let marks =
            Watermarks::new(FrameCount(0), FrameCount(frames / LOW_SHARE), FrameCount(frames / HIGH_SHARE));
        let is_set = marks.map(|marks| self.mm.registry_mut().set_watermarks(&owner, marks));
        hold("R3", matches!(is_set, Ok(Ok(()))), || format!("the marks of node {node}: {is_set:?}"))?;
        self.owners.insert(node, owner);
        self.mm.registry_mut().set_abstract_distance(id, DRAM * (1 + 2 * u64::from(known.tier)));
        self.model.nodes.insert(node, known);
        self.check_outside("", &outside)?;
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
        self.model.is_vague.remove(&node);
        self.model.poisoned.retain(|&(of, _)| of != node);
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
        let listed = self.mm.registry_mut().set_mems(domain, mask).unwrap_or_default();
        if let Some(known) = self.model.domains.get_mut(path) {
            known.mems = nodes.iter().copied().collect();
        }
        self.check_outside(path, &listed)?;
        self.check_step()
    }

    /// R5: what is listed is what lies outside its domain's masks, in a domain and all below it.
    fn check_outside(&self, path: &str, listed: &[Outside]) -> Result<(), Violation> {
        let listed: u64 = listed.iter().map(|outside| outside.frames.0).sum();
        let below = format!("{path}/");
        let is_outside = |block: &&model::Block| {
            let within = block.domain.as_deref().filter(|domain| *domain == path || domain.starts_with(&below));
            within.is_some_and(|domain| !self.model.effective(domain).contains(&block.node))
        };
        let outside: u64 = self.model.blocks.values().filter(is_outside).map(|block| block.frames).sum();
        hold("R5", listed == outside, || format!("{listed} frames are listed as outside, {outside} are"))
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

    fn domain(&self, path: &str) -> Option<DomainId> {
        self.model.domains.contains_key(path).then(|| self.mm.registry().find_domain(path)).flatten()
    }

    /// Frames of a node: in use, out of use and free, by its own count.
    fn check_node(&self, node: u16) -> Result<(), Violation> {
        let frames = NodeId::new(node).ok().and_then(|id| self.mm.registry().frames(id));
        let Some(frames) = frames else { return hold("frames", false, || format!("node {node} is lost")) };
        let used = self.model.frames_used(node);
        hold("frames", frames.used().0 == used, || {
            format!("node {node} counts {} frames in use of {used}", frames.used())
        })?;
        let poisoned = self.model.out_of_use(node);
        hold("R20", frames.poisoned().0 == poisoned, || {
            format!("node {node} counts {} frames out of use of {poisoned}", frames.poisoned())
        })?;
        let free = frames.capacity().0 - used - poisoned;
        hold("frames", frames.free().0 == free, || {
            format!("node {node} counts {} frames free of {free}", frames.free())
        })
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
