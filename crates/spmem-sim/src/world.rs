//! A machine and its model, side by side: every step is done to both, and what differs is a violation. Here is what is
//! checked of all; what a step does is in a file for nodes, domains, grants, requests, blocks or services.

mod blocks;
mod compressed;
mod domains;
mod grants;
mod nodes;
mod promotion;
mod refusals;
mod requests;
mod runs;
mod services;

use std::collections::BTreeMap;

use spmem_core::grant::{Grant, GrantId};
use spmem_core::mm::{Block, Contiguous, MemoryManager};
use spmem_core::node::{Owner, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::tier::Promotion;
use spmem_core::units::{DomainId, NodeId};
use spmem_core::zero::Initial;

use self::requests::Task;
use crate::check::{Violation, hold};
use crate::model::{self, Model, Set, Spec};
use crate::step::{Ask, Step};

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
    /// Who owned nodes before they were last removed.
    former: BTreeMap<u16, Owner>,
    grants: BTreeMap<u32, Grant>,
    ids: BTreeMap<u32, GrantId>,
    blocks: BTreeMap<u32, Block>,
    /// Blocks by number that are runs of frames.
    runs: BTreeMap<u32, Contiguous>,
    tasks: BTreeMap<u32, Task>,
    promotions: BTreeMap<u16, Promotion>,
    devices: BTreeMap<u8, compressed::Device>,
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
        let (owners, former, grants, ids) = Default::default();
        let (blocks, runs, tasks, promotions, devices) = Default::default();
        let mm = MemoryManager::new();
        Self { checks, mm, model, owners, former, grants, ids, blocks, runs, tasks, promotions, devices }
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
            Step::MakeDomain { path } => self.make_domain(path),
            Step::DropDomain { path } => self.drop_domain(path),
            Step::SetMems { path, nodes } => self.set_mems(path, nodes),
            Step::SetSysram { path, nodes } => self.set_sysram(path, nodes),
            Step::Grant { grant, nodes, terms } => self.grant(*grant, nodes, *terms),
            Step::Narrow { grant, from, nodes, terms } => self.narrow(*grant, *from, nodes, *terms),
            Step::Revoke { grant } => self.revoke(*grant),
            Step::SetReserve { node, frames } => self.set_reserve(*node, *frames),
            Step::Release { grant } => Ok(self.release(*grant)),
            Step::Advance { ns } => self.advance(*ns),
            Step::Demote { node, wanted, grants, is_completed } => {
                self.demote(*node, *wanted, grants, *is_completed)
            }
            Step::Promote { block, used_at, since_use_ns, grants, is_completed } => {
                self.promote(*block, *used_at, *since_use_ns, grants, *is_completed)
            }
            Step::Reclaim { node, grants } => self.reclaim(*node, grants),
            Step::Compact { node, order, is_completed } => self.compact(*node, *order, *is_completed),
            Step::Gather { path, grants } => self.gather(path, grants),
            Step::Oom { node } => self.run_out(*node),
            Step::AddNode { node, is_spm, is_easy, frames, is_zero, services, tier, class } => {
                let class = class.unwrap_or(if *is_spm { 3 } else { 1 });
                let spec = spec(*is_spm, *is_easy, class, *services);
                self.add_node(*node, spec, *tier, *frames, initial(*is_zero))
            }
            Step::RemoveNode { node } => self.remove_node(*node),
            Step::AddRange { node, frames, is_zero, is_spm, is_easy, class, services } => {
                self.add_range(*node, spec(*is_spm, *is_easy, *class, *services), *frames, initial(*is_zero))
            }
            Step::RemoveRange { node, first, is_completed } => self.remove_range(*node, *first, *is_completed),
            Step::FormerOwner { node } => self.try_former_owner(*node),
            Step::SetDistance { from, to, distance } => self.set_distance(*from, *to, *distance),
            Step::SetWeight { node, weight } => self.set_weight(*node, *weight),
            Step::Alloc {
                block,
                domain,
                order,
                asked,
                mode,
                grants,
                is_movable,
                flags,
                home,
                at,
                uses_reserve,
            } => {
                let (domain, asked, grants) = (domain.clone(), asked.clone(), grants.clone());
                let (mode, flags, home, at) = (*mode, *flags, *home, *at);
                let (is_movable, uses_reserve) = (*is_movable, *uses_reserve);
                let ask = Ask { domain, asked, mode, flags, home, at, grants, is_movable, uses_reserve };
                self.alloc(*block, *order, &ask)
            }
            Step::SetPolicy { task, ask } => self.set_policy(*task, ask),
            Step::AllocBy { task, block, order } => self.alloc_by(*task, *block, *order),
            Step::AllocBatch { block, count, ask } => self.alloc_batch(*block, *count, ask),
            Step::AllocContiguous { block, frames, ask } => self.alloc_contiguous(*block, *frames, ask),
            Step::MoveTarget { path, node, grants } => self.move_target(path, *node, grants),
            Step::Explain { node, ask } => self.explain(*node, ask),
            Step::Use { block } => self.note_used(*block),
            Step::Pin { block, grants } => self.pin(*block, grants),
            Step::Unpin { block } => self.unpin(*block),
            Step::Poison { node, frame } => self.poison(*node, *frame),
            Step::AddDevice { device, frames, waiting } => self.add_device(*device, *frames, *waiting),
            Step::Enter { device, takes } => self.enter(*device, *takes),
            Step::Leave { device, is_oldest } => self.leave(*device, *is_oldest),
            Step::Measure { device, telemetry } => self.measure(*device, *telemetry),
            Step::Shut { device, gate } => self.shut(*device, *gate),
            Step::Open { device, gate, with } => self.open_gate(*device, *gate, *with),
            Step::Free { block, is_zeroed } => self.free(*block, *is_zeroed),
        }
    }

    fn domain(&self, path: &str) -> Option<DomainId> {
        self.model.domains.contains_key(path).then(|| self.mm.registry().find_domain(path)).flatten()
    }

    /// What a node is (R3), and its frames: in use, out of use and free, by its own count.
    fn check_node(&self, node: u16) -> Result<(), Violation> {
        let registry = self.mm.registry();
        let found = NodeId::new(node).ok().and_then(|id| Some((registry.spec(id)?, registry.frames(id)?)));
        let Some((spec, frames)) = found else { return hold("frames", false, || format!("node {node} is lost")) };
        let known = self.model.nodes[&node].spec;
        let is_same = spec.services == known.services
            && spec.class.number() == known.class
            && (spec.node_type, spec.guard) == (known.node_type(), known.guard());
        hold("R3", is_same, || format!("node {node} was registered as {known:?}, it is {spec:?}"))?;
        let used = self.model.frames_used(node);
        hold("frames", frames.used().0 == used, || {
            format!("node {node} counts {} frames in use of {used}", frames.used())
        })?;
        let poisoned = self.model.out_of_use(node);
        hold("R20", frames.poisoned().0 == poisoned, || {
            format!("node {node} counts {} frames out of use of {poisoned}", frames.poisoned())
        })?;
        let capacity = self.model.capacity(node);
        hold("frames", frames.capacity().0 == capacity, || {
            format!("node {node} counts {} frames of {capacity}", frames.capacity())
        })?;
        let free = capacity - used - poisoned;
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
            let Some(block) = self.blocks.get(number) else { continue };
            let first = block.first_frame();
            let order = frames.and_then(|frames| frames.allocated_order(first).ok());
            let is_there = order.is_some_and(|order| order.frames().0 == known.frames);
            hold("frames", is_there, || format!("block {number} is {order:?} to its node"))?;
        }
        Ok(())
    }
}

fn spec(is_spm: bool, is_easy: bool, class: u8, services: u16) -> Spec {
    Spec { is_spm, is_easy, class, services: Services::from_bits_truncate(services) }
}

const fn initial(is_zero: bool) -> Initial {
    if is_zero { Initial::Zero } else { Initial::Unknown }
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
