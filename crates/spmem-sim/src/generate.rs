//! Random steps from a seed, favouring the edges: full nodes, quotas that several grants race for, masks that
//! overlap in part, nodes that are removed in use, frames that break,
//! grants that end while they are used.

use rand::seq::IteratorRandom;
use rand::{Rng, RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use spmem_core::frames::MAX_CONTIGUOUS;
use spmem_core::node::Services;
use spmem_core::units::PAGE_SIZE;

use crate::model;
use crate::step::{Ask, GateName, Mode, Step, Telemetry, Terms};
use crate::world::World;

/// Nodes that come and go.
const NODES: usize = 8;

/// How large a machine gets.
#[derive(Debug)]
struct Extent {
    /// Numbers of its nodes, rising.
    nodes: [u16; NODES],
    /// The most frames of a range.
    range: u64,
    /// The most frames of a run, ...
    run: u32,
    /// ... which most are shorter than, by a power of two below this one.
    shorter: u32,
}

/// Most seeds: nodes that fill up at once.
const SMALL: Extent = Extent { nodes: [0, 1, 2, 3, 4, 5, 6, 7], range: 1200, run: 1200, shorter: 8 };
/// One seed of [`WIDE_SHARE`]: node numbers at the edges of a mask's words, ranges of several zones, and runs that reach across
/// two of them, or are longer than any may be.
const WIDE: Extent =
    Extent { nodes: [0, 1, 63, 64, 511, 512, 1022, 1023], range: 600_000, run: (1 << 18) + (1 << 14), shorter: 3 };
const WIDE_SHARE: u64 = 4;

/// The most blocks at a time; beyond, more are freed than taken.
const BLOCKS: usize = 200;
/// The most domains at a time.
const DOMAINS: usize = 24;

/// Tasks with a policy.
const TASKS: u32 = 8;
/// Numbers of classes.
const CLASSES: core::ops::RangeInclusive<u8> = 1..=6;

/// Bind is what components use.
const MODES: [Mode; 9] = [
    Mode::Bind,
    Mode::Bind,
    Mode::Bind,
    Mode::PreferredMany,
    Mode::Interleave,
    Mode::WeightedInterleave,
    Mode::Preferred,
    Mode::Default,
    Mode::Local,
];

/// Compressing devices.
const DEVICES: u8 = 2;
/// Mostly one that works.
const TELEMETRY: [Telemetry; 8] = [
    Telemetry::True,
    Telemetry::True,
    Telemetry::True,
    Telemetry::True,
    Telemetry::True,
    Telemetry::True,
    Telemetry::Stuck,
    Telemetry::Silent,
];
/// What no domain can be called.
const NO_NAMES: [&str; 4] = ["", ".", "..", "a\nb"];

const GATES: [GateName; 3] = [GateName::Allocation, GateName::Converging, GateName::TearingDown];

/// None, static, relative, both, which is an error, and balancing, which is one with most modes.
const FLAGS: [u8; 12] = [0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 6];

/// All, none, and what a node without the rest might offer.
const SERVICES: [Services; 6] =
    [Services::all(), Services::all(), Services::all(), Services::empty(), Services::RECLAIM, Services::MIGRATION];

/// Makes steps for a world. The same seed and the same world give the same steps.
#[derive(Debug)]
pub struct Generator {
    random: Pcg64Mcg,
    extent: &'static Extent,
    next_grant: u32,
    next_block: u32,
}

impl Generator {
    /// Steps from a seed.
    pub fn new(seed: u64) -> Self {
        let extent = if seed % WIDE_SHARE == WIDE_SHARE - 1 { &WIDE } else { &SMALL };
        Self { random: Pcg64Mcg::seed_from_u64(seed), extent, next_grant: 0, next_block: 0 }
    }

    /// What happens next.
    pub fn next(&mut self, world: &World) -> Step {
        let model = &world.model;
        if model.nodes.is_empty() {
            return self.add_node();
        }
        match self.random.random_range(0..192) {
            0..3 => self.add_node(),
            100..105 => self.add_range(world),
            105..108 => self.remove_range(world),
            108 | 188 => Step::FormerOwner { node: self.node() },
            109..111 => {
                Step::SetDistance { from: self.node(), to: self.node(), distance: self.random.random_range(9..30) }
            }
            111 => Step::SetWeight { node: self.node(), weight: self.random.random_range(0..4) },
            112..116 => Step::SetPolicy { task: self.random.random_range(0..TASKS), ask: self.ask(world) },
            116..124 => Step::AllocBy {
                task: self.random.random_range(0..TASKS),
                block: self.new_block(),
                order: self.order(),
            },
            124..128 => Step::Explain { node: self.node(), ask: self.ask(world) },
            128..134 => Step::Promote {
                block: self.promotable(world),
                used_at: self.node(),
                since_use_ns: u64::from(self.random.next_u32()) >> self.random.random_range(0..32),
                grants: (0..4).map(|_| self.grant(world)).collect(),
                is_completed: self.random.random_bool(0.8),
            },
            134..138 => {
                Step::Pin { block: self.block(world), grants: (0..2).map(|_| self.grant(world)).collect() }
            }
            138..140 => Step::Unpin { block: self.pinned(world) },
            182..185 => self.alloc_batch(world),
            189..192 => self.alloc_contiguous(world),
            185..188 => self.move_target(world),
            140..142 => {
                Step::SetReserve { node: self.node(), frames: self.random.random_range(0..self.extent.range / 6) }
            }
            142..182 => self.compressed(),
            3..5 => Step::RemoveNode { node: self.node() },
            5..8 if model.domains.len() < DOMAINS => self.make_domain(world),
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
                node: self.node(),
                wanted: self.random.random_range(1..40),
                grants: (0..4).map(|_| self.grant(world)).collect(),
                is_completed: self.random.random_bool(0.8),
            },
            42..44 => Step::Reclaim { node: self.node(), grants: (0..4).map(|_| self.grant(world)).collect() },
            44..46 => Step::Compact {
                node: self.node(),
                order: self.random.random_range(1..=10),
                is_completed: self.random.random_bool(0.8),
            },
            46..47 if self.random.random_bool(0.9) => Step::Oom { node: self.node() },
            47..48 => self.poison(world),
            40..42 => Step::Gather { path: self.path(world), grants: (0..4).map(|_| self.grant(world)).collect() },
            29..32 => Step::Advance { ns: self.advance(world) },
            _ if self.random.random_range(0..2 * BLOCKS) < model.blocks.len() => {
                Step::Free { block: self.block(world), is_zeroed: self.random.random_bool(0.3) }
            }
            _ => self.alloc(world),
        }
    }

    /// Now and then one below the deepest, or with a name that cannot be.
    fn make_domain(&mut self, world: &World) -> Step {
        let deepest = world.model.domains.keys().max_by_key(|path| path.len()).cloned();
        let above = deepest.filter(|_| self.random.random_bool(0.3)).unwrap_or_else(|| self.path(world));
        let name = match self.random.random_range(0..20) {
            0 => NO_NAMES[self.random.random_range(0..NO_NAMES.len())].to_owned(),
            number => (number % 4).to_string(),
        };
        Step::MakeDomain { path: format!("{above}/{name}") }
    }

    /// Seldom long, or no grant that ends would live to be used; now and then to the very moment at which one ends, or just
    /// before.
    fn advance(&mut self, world: &World) -> u64 {
        let (now, grants) = (world.model.now, world.model.grants.values());
        let end = grants.filter_map(|grant| grant.terms.expires).filter(|&end| end > now).min();
        match (end, self.random.random_range(0..10)) {
            (Some(end), 0..3) => end - now - self.random.random_range(0..2),
            (_, 9) => self.random.random_range(0..12_000_000_000),
            _ => self.random.random_range(0..1000),
        }
    }

    /// What happens to compressing devices: mostly pages that enter, some of which turn out not to compress.
    fn compressed(&mut self) -> Step {
        let device = self.random.random_range(0..DEVICES);
        match self.random.random_range(0..40) {
            0 => Step::AddDevice {
                device,
                frames: self.random.random_range(0..64),
                waiting: self.random.random_range(0..8),
            },
            1..20 => {
                let most = if self.random.random_bool(0.5) { PAGE_SIZE } else { 600 };
                Step::Enter { device, takes: self.random.random_range(1..=most) }
            }
            20..25 => Step::Leave { device, is_oldest: self.random.random() },
            25..36 => Step::Measure { device, telemetry: TELEMETRY[self.random.random_range(0..TELEMETRY.len())] },
            36 | 37 => Step::Shut { device, gate: GATES[self.random.random_range(0..GATES.len())] },
            _ => {
                let with =
                    if self.random.random_bool(0.7) { device } else { self.random.random_range(0..DEVICES) };
                Step::Open { device, gate: GATES[self.random.random_range(0..GATES.len())], with }
            }
        }
    }

    fn add_node(&mut self) -> Step {
        Step::AddNode {
            node: self.node(),
            is_spm: self.random.random(),
            is_easy: self.random.random(),
            frames: self.frames().max(1),
            is_zero: self.random.random(),
            services: self.services(),
            tier: self.random.random_range(0..3),
            class: self.random.random_bool(0.5).then(|| self.random.random_range(CLASSES)),
        }
    }

    /// Mostly some that go together.
    fn services(&mut self) -> u16 {
        let any = u16::try_from(self.random.next_u32() >> 16).unwrap_or_default();
        let any = Services::from_bits_truncate(any);
        if self.random.random_bool(0.3) {
            any.bits()
        } else {
            SERVICES[self.random.random_range(0..SERVICES.len())].bits()
        }
    }

    /// Mostly one that is what the node is; else it differs in something.
    fn add_range(&mut self, world: &World) -> Step {
        let node = self.node();
        let (frames, is_zero) = (self.frames(), self.random.random());
        let known = world.model.nodes.get(&node).map(|known| known.spec);
        let (mut is_spm, mut is_easy) = known.map_or((false, false), |spec| (spec.is_spm, spec.is_easy));
        let mut class = known.map_or(1, |spec| spec.class);
        let mut services = known.map_or(0, |spec| spec.services.bits());
        match self.random.random_range(0..8) {
            0 => is_spm = !is_spm,
            1 => is_easy = !is_easy,
            2 => class = self.random.random_range(CLASSES),
            3 => services ^= 1 << self.random.random_range(0..9),
            _ => {}
        }
        Step::AddRange { node, frames, is_zero, is_spm, is_easy, class, services }
    }

    /// Mostly one that is there.
    fn remove_range(&mut self, world: &World) -> Step {
        let ranges =
            world.model.nodes.iter().flat_map(|(&node, known)| known.ranges.keys().map(move |&at| (node, at)));
        let some = ranges.choose(&mut self.random).filter(|_| self.random.random_bool(0.9));
        let (node, first) = some.unwrap_or((self.node(), 1024));
        Step::RemoveRange { node, first, is_completed: self.random.random_bool(0.8) }
    }

    /// Mostly a frame that is in use.
    fn poison(&mut self, world: &World) -> Step {
        let is_held = self.random.random_bool(0.7);
        match world.model.blocks.values().choose(&mut self.random) {
            Some(block) if is_held => {
                let at = u32::try_from(self.random.random_range(0..block.frames)).unwrap_or_default();
                Step::Poison { node: block.node, frame: block.first + at }
            }
            _ => {
                let frame = self.random.random_range(0..self.extent.range);
                Step::Poison { node: self.node(), frame: u32::try_from(frame).unwrap_or_default() }
            }
        }
    }

    fn alloc(&mut self, world: &World) -> Step {
        let Ask { domain, asked, mode, flags, home, at, grants, is_movable, uses_reserve } = self.ask(world);
        let (block, order) = (self.new_block(), self.order());
        Step::Alloc { block, domain, order, asked, mode, grants, is_movable, flags, home, at, uses_reserve }
    }

    /// Mostly few, now and then more than are taken at once.
    fn alloc_batch(&mut self, world: &World) -> Step {
        let most = if self.random.random_bool(0.1) { 200 } else { 10 };
        let (ask, count) = (self.ask(world), self.random.random_range(1..most));
        let block = self.new_block();
        self.next_block += count - 1;
        Step::AllocBatch { block, count, ask }
    }

    /// Mostly short.
    fn alloc_contiguous(&mut self, world: &World) -> Step {
        Step::AllocContiguous {
            block: self.new_block(),
            frames: 1
                + ((self.random.next_u32() % self.extent.run) >> self.random.random_range(0..self.extent.shorter)),
            ask: self.ask(world),
        }
    }

    fn move_target(&mut self, world: &World) -> Step {
        Step::MoveTarget {
            path: self.path(world),
            node: self.node(),
            grants: (0..2).map(|_| self.grant(world)).collect(),
        }
    }

    fn ask(&mut self, world: &World) -> Ask {
        let mode = MODES[self.random.random_range(0..MODES.len())];
        let takes_none = matches!(mode, Mode::Default | Mode::Local);
        let has_home = matches!(mode, Mode::Bind | Mode::PreferredMany);
        // Now and then more than can be shown.
        let shown = if self.random.random_bool(0.01) { 40 } else { self.random.random_range(0..4) };
        Ask {
            domain: self.random.random_bool(0.95).then(|| self.path(world)),
            asked: self.random.random_bool(if takes_none { 0.05 } else { 0.8 }).then(|| self.nodes()),
            mode,
            flags: FLAGS[self.random.random_range(0..FLAGS.len())],
            home: self.random.random_bool(if has_home { 0.2 } else { 0.03 }).then(|| self.node()),
            at: self.random.random_bool(0.5).then(|| self.node()),
            grants: (0..shown).map(|_| self.grant(world)).collect(),
            is_movable: self.random.random_bool(0.7),
            uses_reserve: self.random.random_bool(0.1),
        }
    }

    fn new_block(&mut self) -> u32 {
        self.next_block += 1;
        self.next_block
    }

    fn order(&mut self) -> u8 {
        self.random.random_range(0..=10_u8).min(self.random.random_range(0..=10))
    }

    fn narrow(&mut self, world: &World) -> Step {
        let from = self.grant(world);
        let mut terms = self.terms(world.model.now);
        let mut nodes = self.nodes();
        // Mostly something that can be: less of what there is.
        if let Some(whole) = world.model.grants.get(&from)
            && self.random.random_bool(0.3)
        {
            // All of it: so its children, and it, race for its quota.
            (terms, nodes) = (whole.terms, whole.nodes.iter().copied().collect());
        } else if let Some(whole) = world.model.grants.get(&from)
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

    /// Mostly a block of a node that promotes.
    fn promotable(&mut self, world: &World) -> u32 {
        let model = &world.model;
        let offers = |node: u16| model.nodes[&node].spec.services.contains(Services::PROMOTION);
        let is_low =
            |block: &model::Block| model.nodes[&block.node].tier > 0 && offers(block.node) && block.is_movable;
        let low = model.blocks.iter().filter(|(_, block)| is_low(block)).map(|(&number, _)| number);
        let some = low.choose(&mut self.random).filter(|_| self.random.random_bool(0.7));
        some.unwrap_or_else(|| self.block(world))
    }

    /// Mostly a block that is pinned.
    fn pinned(&mut self, world: &World) -> u32 {
        let pinned = world.model.blocks.iter().filter(|(_, block)| block.is_pinned).map(|(&number, _)| number);
        pinned.choose(&mut self.random).unwrap_or_else(|| self.block(world))
    }

    fn path(&mut self, world: &World) -> String {
        world.model.domains.keys().choose(&mut self.random).cloned().unwrap_or_default()
    }

    fn nodes(&mut self) -> Vec<u16> {
        let bits = self.random.next_u32();
        let nodes = self.extent.nodes.into_iter().zip(0..);
        nodes.filter(|(_, at)| bits >> at & 1 == 1).map(|(node, _)| node).collect()
    }

    /// Frames of a range; where it can have several zones, mostly a little more than one.
    fn frames(&mut self) -> u64 {
        let frames = self.random.random_range(0..self.extent.range);
        if self.extent.range > MAX_CONTIGUOUS && self.random.random_bool(0.6) {
            MAX_CONTIGUOUS + frames % 32_768
        } else {
            frames
        }
    }

    fn node(&mut self) -> u16 {
        self.extent.nodes[self.random.random_range(0..NODES)]
    }
}
