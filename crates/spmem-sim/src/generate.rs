//! Random steps from a seed, favouring the edges: full nodes, quotas that several grants race for, masks that
//! overlap in part, nodes that are removed in use, frames that break,
//! grants that end while they are used.

use rand::seq::IteratorRandom;
use rand::{Rng, RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use spmem_core::node::Services;
use spmem_core::units::PAGE_SIZE;

use crate::step::{Mode, Step, Terms};
use crate::world::World;

/// Nodes that come and go.
const NODES: u16 = 8;
/// The most blocks at a time; beyond, more are freed than taken.
const BLOCKS: usize = 200;
/// The most domains at a time.
const DOMAINS: usize = 24;

/// Bind is what components use.
const MODES: [Mode; 5] = [Mode::Bind, Mode::Bind, Mode::PreferredMany, Mode::Interleave, Mode::WeightedInterleave];

/// All, none, and what a node without the rest might offer.
const SERVICES: [Services; 6] =
    [Services::all(), Services::all(), Services::all(), Services::empty(), Services::RECLAIM, Services::MIGRATION];

/// Makes steps for a world. The same seed and the same world give the same steps.
#[derive(Debug)]
pub struct Generator {
    random: Pcg64Mcg,
    next_grant: u32,
    next_block: u32,
}

impl Generator {
    /// Steps from a seed.
    pub fn new(seed: u64) -> Self {
        Self { random: Pcg64Mcg::seed_from_u64(seed), next_grant: 0, next_block: 0 }
    }

    /// What happens next.
    pub fn next(&mut self, world: &World) -> Step {
        let model = &world.model;
        if model.nodes.is_empty() {
            return self.add_node();
        }
        match self.random.random_range(0..100) {
            0..3 => self.add_node(),
            3..5 => Step::RemoveNode { node: self.random.random_range(0..NODES) },
            5..8 if model.domains.len() < DOMAINS => {
                let above = self.path(world);
                Step::MakeDomain { path: format!("{above}/{}", self.random.random_range(0..4)) }
            }
            5..9 => Step::DropDomain { path: self.path(world) },
            9..13 => Step::SetMems { path: self.path(world), nodes: self.nodes() },
            13..16 => Step::SetSysram { path: self.path(world), nodes: self.nodes() },
            16..20 => {
                let nodes = model.nodes.keys().copied();
                let nodes = nodes.filter(|_| self.random.random_bool(0.3)).collect();
                let terms = self.terms(model.now);
                Step::Grant { grant: self.new_grant(), nodes, terms }
            }
            20..25 => self.narrow(world),
            25..27 => Step::Revoke { grant: self.grant(world) },
            27..29 => Step::Release { grant: self.grant(world) },
            32..36 => Step::Use { block: self.block(world) },
            36..40 => Step::Demote {
                node: self.random.random_range(0..NODES),
                wanted: self.random.random_range(1..40),
                grants: (0..4).map(|_| self.grant(world)).collect(),
                is_completed: self.random.random_bool(0.8),
            },
            42..44 => Step::Reclaim {
                node: self.random.random_range(0..NODES),
                grants: (0..4).map(|_| self.grant(world)).collect(),
            },
            44..46 => Step::Compact {
                node: self.random.random_range(0..NODES),
                order: self.random.random_range(1..=10),
                is_completed: self.random.random_bool(0.8),
            },
            46..47 if self.random.random_bool(0.3) => Step::Oom { node: self.random.random_range(0..NODES) },
            47..48 => self.poison(world),
            40..42 => Step::Gather { path: self.path(world), grants: (0..4).map(|_| self.grant(world)).collect() },
            29..32 => Step::Advance { ns: self.random.random_range(0..1000) },
            _ if self.random.random_range(0..2 * BLOCKS) < model.blocks.len() => {
                Step::Free { block: self.block(world), is_zeroed: self.random.random_bool(0.3) }
            }
            _ => self.alloc(world),
        }
    }

    fn add_node(&mut self) -> Step {
        Step::AddNode {
            node: self.random.random_range(0..NODES),
            is_spm: self.random.random(),
            is_easy: self.random.random(),
            frames: self.random.random_range(1..1200),
            is_zero: self.random.random(),
            services: SERVICES[self.random.random_range(0..SERVICES.len())].bits(),
            tier: self.random.random_range(0..3),
        }
    }

    /// Mostly a frame that is in use.
    fn poison(&mut self, world: &World) -> Step {
        let is_held = self.random.random_bool(0.7);
        match world.model.blocks.values().choose(&mut self.random) {
            Some(block) if is_held => {
                let at = self.random.random_range(0..1_u32 << block.frames.ilog2());
                Step::Poison { node: block.node, frame: block.first + at }
            }
            _ => {
                Step::Poison { node: self.random.random_range(0..NODES), frame: self.random.random_range(0..1200) }
            }
        }
    }

    fn alloc(&mut self, world: &World) -> Step {
        let shown = self.random.random_range(0..4);
        Step::Alloc {
            block: {
                self.next_block += 1;
                self.next_block
            },
            domain: self.random.random_bool(0.95).then(|| self.path(world)),
            order: self.random.random_range(0..=10_u8).min(self.random.random_range(0..=10)),
            asked: self.random.random_bool(0.7).then(|| self.nodes()),
            mode: MODES[self.random.random_range(0..MODES.len())],
            grants: (0..shown).map(|_| self.grant(world)).collect(),
            is_movable: self.random.random_bool(0.7),
        }
    }

    fn narrow(&mut self, world: &World) -> Step {
        let from = self.grant(world);
        let mut terms = self.terms(world.model.now);
        let mut nodes = self.nodes();
        // Mostly something that can be: less of what there is.
        if let Some(whole) = world.model.grants.get(&from)
            && self.random.random_bool(0.8)
        {
            terms.rights &= whole.terms.rights;
            terms.quota = terms.quota.min(whole.terms.quota);
            terms.expires = terms.expires.min(whole.terms.expires).or(whole.terms.expires);
            nodes = whole.nodes.iter().copied().filter(|_| self.random.random_bool(0.7)).collect();
        }
        Step::Narrow { grant: self.new_grant(), from, nodes, terms }
    }

    fn terms(&mut self, now: u64) -> Terms {
        let quota = self.random.random_range(0..600) * PAGE_SIZE;
        Terms {
            rights: if self.random.random_bool(0.8) { 0x3f } else { self.random.random_range(0..64) },
            quota: if self.random.random_bool(0.5) { quota } else { u64::MAX },
            expires: self.random.random_bool(0.3).then(|| now + self.random.random_range(0..20_000)),
        }
    }

    fn new_grant(&mut self) -> u32 {
        self.next_grant += 1;
        self.next_grant
    }

    /// A grant, mostly one that was made lately.
    fn grant(&mut self, world: &World) -> u32 {
        let recent = world.model.grants.keys().rev().copied().take(12);
        recent.choose(&mut self.random).unwrap_or(0)
    }

    fn block(&mut self, world: &World) -> u32 {
        world.model.blocks.keys().copied().choose(&mut self.random).unwrap_or(0)
    }

    fn path(&mut self, world: &World) -> String {
        world.model.domains.keys().choose(&mut self.random).cloned().unwrap_or_default()
    }

    fn nodes(&mut self) -> Vec<u16> {
        let bits = self.random.next_u32();
        (0..NODES).filter(|node| bits >> node & 1 == 1).collect()
    }
}
