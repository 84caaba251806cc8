//! R3, R5, R10, R14-R16: reclaim, demotion, promotion and evacuation, with who owns which frame checked after every step.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::Index;
use spmem_core::frames::Metadata;
use spmem_core::grant::{Grant, Rights, Terms};
use spmem_core::migrate::{Isolated, Move, Mover, Stay};
use spmem_core::mm::{Block, FreeError, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::Policy;
use spmem_core::tier::DRAM;
use spmem_core::units::{Bytes, DomainId, FrameCount, NodeId, Order};
use spmem_core::wall::{Mobility, Request};
use spmem_core::watermark::Watermarks;
use spmem_core::zero::Initial;

const FRAMES: u64 = 64;

fn id(node: u16) -> NodeId {
    NodeId::new(node).unwrap()
}

fn mask(nodes: &[u16]) -> NodeMask {
    nodes.iter().map(|&node| id(node)).collect()
}

const ALL: Services = Services::RECLAIM
    .union(Services::MIGRATION)
    .union(Services::DEMOTION)
    .union(Services::PROMOTION)
    .union(Services::LONGTERM_PIN);

/// Nodes 0 and 1: sysram. 2: slow SPM. 3: slower SPM. 4: slow SPM without any service. 5: sysram without any service.
struct Machine {
    mm: MemoryManager,
    owners: Vec<Owner>,
    /// ALLOC and PIN on all SPM nodes.
    alloc: Grant,
    /// DEMOTE_TO on nodes 2 to 4.
    demote: Grant,
    inner: DomainId,
}

impl Machine {
    fn new() -> Self {
        let mut mm = MemoryManager::new();
        let mut owners = Vec::new();
        for node in 0..6_u16 {
            let is_spm = (2..5).contains(&node);
            let spec = NodeSpec {
                node_type: if is_spm { NodeType::Spm } else { NodeType::Sysram },
                class: Class::Plain,
                services: if node < 4 { ALL } else { Services::empty() },
                guard: Guard::Hard,
                owner: "test".into(),
            };
            let owner = mm.registry_mut().register(id(node), spec.clone()).unwrap().owner;
            let lent = Metadata::from_heap(FrameCount(FRAMES)).unwrap();
            mm.registry_mut().add_range(&owner, &spec, FrameCount(FRAMES), lent, Initial::Zero).unwrap();
            owners.push(owner);
        }
        let registry = mm.registry_mut();
        for (node, adistance) in [(2, 3 * DRAM), (3, 9 * DRAM), (4, 3 * DRAM)] {
            registry.set_abstract_distance(id(node), adistance).unwrap();
        }
        let spm: Vec<&Owner> = owners[2..5].iter().collect();
        let alloc = registry.grant(&spm, Terms::new(Rights::ALLOC | Rights::PIN, Bytes(u64::MAX))).unwrap();
        let demote = registry.grant(&spm, Terms::new(Rights::DEMOTE_TO, Bytes(u64::MAX))).unwrap();
        let inner = registry.create_domain(DomainId::ROOT, "inner").unwrap();
        Self { mm, owners, alloc, demote, inner }
    }

    fn alloc(&mut self, domain: DomainId, node: u16, order: u8) -> Option<Block> {
        let policy = Policy::bind(id(node).into());
        let grants = [&self.alloc];
        let request = Request { policy, grants: &grants, mobility: Mobility::Movable, ..Request::of(domain) };
        self.mm.alloc(&request, Order::new(order).unwrap()).ok()
    }
}

#[derive(Clone, Debug)]
enum Op {
    Alloc(bool, u16, u8),
    Free(Index),
    Use(Index),
    Pin(Index, bool),
    TakeCold(u16, usize),
    Take(Index),
    Demote(Index, bool),
    Promote(Index),
    Evacuate(Index, Vec<u16>),
    PutBack(Index),
    Complete(Index),
    CallOff(Index),
    Mems(Vec<u16>),
}

fn op() -> impl Strategy<Value = Op> {
    let at = any::<Index>;
    let nodes = || prop::collection::vec(0u16..6, 0..4);
    prop_oneof![
        6 => (any::<bool>(), 0u16..6, 0u8..4).prop_map(|(d, n, o)| Op::Alloc(d, n, o)),
        2 => at().prop_map(Op::Free),
        2 => at().prop_map(Op::Use),
        1 => (at(), any::<bool>()).prop_map(|(b, p)| Op::Pin(b, p)),
        3 => (0u16..6, 1usize..6).prop_map(|(n, w)| Op::TakeCold(n, w)),
        2 => at().prop_map(Op::Take),
        4 => (at(), any::<bool>()).prop_map(|(i, g)| Op::Demote(i, g)),
        2 => at().prop_map(Op::Promote),
        2 => (at(), nodes()).prop_map(|(i, n)| Op::Evacuate(i, n)),
        1 => at().prop_map(Op::PutBack),
        4 => at().prop_map(Op::Complete),
        2 => at().prop_map(Op::CallOff),
        1 => nodes().prop_map(Op::Mems),
    ]
}

struct Model {
    machine: Machine,
    /// What holders hold, with whether it is pinned.
    blocks: Vec<(Block, bool)>,
    isolated: Vec<Isolated>,
    moves: Vec<Move>,
}

impl Model {
    fn pick<T>(from: &mut Vec<T>, at: Index) -> Option<T> {
        (!from.is_empty()).then(|| from.swap_remove(at.index(from.len())))
    }

    /// Whether a block is on its way: its holder cannot free it.
    fn is_moving(&self, block: &Block) -> bool {
        let place = (block.node(), block.first_frame());
        self.isolated.iter().chain(self.moves.iter().map(Move::from)).any(|i| (i.node(), i.page().frame) == place)
    }

    fn free(&mut self, at: Index) {
        let Some((block, is_pinned)) = Self::pick(&mut self.blocks, at) else { return };
        let is_moving = self.is_moving(&block);
        match self.machine.mm.free(block) {
            Ok(()) => assert!(!is_moving),
            Err(FreeError::Moving(block)) => {
                assert!(is_moving);
                self.blocks.push((block, is_pinned));
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn take_cold(&mut self, node: u16, wanted: usize) {
        let looked_at = |machine: &Machine| machine.mm.registry().pages(id(node)).unwrap().looked_at();
        let before = looked_at(&self.machine);
        let taken = self.machine.mm.take_cold(id(node), wanted).unwrap();
        assert!(taken.len() <= wanted);
        if node >= 4 {
            assert!(
                taken.is_empty() && looked_at(&self.machine) == before,
                "R15: a node without RECLAIM is not scanned"
            );
        }
        for isolated in &taken {
            let place = (isolated.node(), isolated.page().frame);
            let held = self.blocks.iter().find(|(b, _)| (b.node(), b.first_frame()) == place).unwrap();
            assert!(!held.1, "R15: what is pinned stays");
        }
        self.isolated.extend(taken);
    }

    /// Holds a planned move against the rules.
    fn planned(&mut self, result: Result<Move, Stay>, may_go: impl Fn(&Isolated, NodeId) -> bool) {
        match result {
            Ok(planned) => {
                let (from, to) = (planned.from(), planned.to().node());
                let registry = self.machine.mm.registry();
                let effective = registry.effective(from.page().domain.unwrap()).unwrap();
                assert!(effective.contains(to), "R14: node {to} is outside the block's own domain");
                assert!(may_go(from, to), "from node {} to node {to}", from.node());
                assert_eq!((planned.to().order(), planned.to().domain()), (from.page().order, from.page().domain));
                self.moves.push(planned);
            }
            Err(Stay::NotOffered { node, .. }) => assert!(node >= id(4), "R3"),
            Err(_) => {}
        }
    }

    fn demote(&mut self, at: Index, has_grant: bool) {
        let Some(isolated) = Self::pick(&mut self.isolated, at) else { return };
        let grants = [&self.machine.demote];
        let result = self.machine.mm.plan_demotion(isolated, if has_grant { &grants } else { &[] });
        self.planned(result, |from, to| {
            let tier = |node: NodeId| [0, 0, 1, 2, 1, 0][node.index()];
            let is_spm = (id(2)..=id(4)).contains(&to);
            tier(to) > tier(from.node()) && to < id(4) && (!is_spm || has_grant)
        });
    }

    fn complete(&mut self, at: Index) {
        let Some(planned) = Self::pick(&mut self.moves, at) else { return };
        let place = (planned.from().node(), planned.from().page().frame);
        let at = self.blocks.iter().position(|(b, _)| (b.node(), b.first_frame()) == place).unwrap();
        let (old, is_pinned) = self.blocks.swap_remove(at);
        assert!(!is_pinned);
        let to = (planned.to().node(), planned.to().first_frame());
        let new = self.machine.mm.complete(planned, old).unwrap();
        assert_eq!((new.node(), new.first_frame()), to);
        self.blocks.push((new, false));
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Alloc(is_inner, node, order) => {
                let domain = if is_inner { self.machine.inner } else { DomainId::ROOT };
                self.blocks.extend(self.machine.alloc(domain, node, order).map(|block| (block, false)));
            }
            Op::Free(at) => self.free(at),
            Op::Use(at) if !self.blocks.is_empty() => {
                self.machine.mm.note_used(&self.blocks[at.index(self.blocks.len())].0);
            }
            Op::Pin(at, is_pinned) if !self.blocks.is_empty() => {
                let at = at.index(self.blocks.len());
                let is_moving = self.is_moving(&self.blocks[at].0);
                let (block, known) = &mut self.blocks[at];
                let result = if is_pinned {
                    self.machine.mm.pin(block, &[&self.machine.alloc])
                } else {
                    // Says nothing; what came of it the next pin and move tell.
                    self.machine.mm.unpin(block);
                    if block.node() >= id(4) { return } else { Ok(!is_moving) }
                };
                match result {
                    Ok(is_set) => {
                        assert_eq!(is_set, !is_moving);
                        *known = if is_set { is_pinned } else { *known };
                    }
                    Err(stay) => assert!(matches!(stay, Stay::NotOffered { node, .. } if node >= id(4))),
                }
            }
            Op::Use(_) | Op::Pin(..) => {}
            Op::TakeCold(node, wanted) => self.take_cold(node, wanted),
            Op::Take(at) if !self.blocks.is_empty() => {
                let (block, is_pinned) = &self.blocks[at.index(self.blocks.len())];
                let may = !is_pinned && !self.is_moving(block) && block.node() < id(4);
                let owner = &self.machine.owners[block.node().index()];
                let taken = self.machine.mm.take(block, Mover::Owner(owner));
                assert_eq!(taken.is_ok(), may, "R15");
                self.isolated.extend(taken);
            }
            Op::Take(_) => {}
            Op::Demote(at, has_grant) => self.demote(at, has_grant),
            Op::Promote(at) => {
                let Some(isolated) = Self::pick(&mut self.isolated, at) else { return };
                let result = self.machine.mm.plan_promotion(isolated, id(0));
                self.planned(result, |from, to| from.node() >= id(2) && [id(0), id(1)].contains(&to));
            }
            Op::Evacuate(at, targets) => {
                let Some(isolated) = Self::pick(&mut self.isolated, at) else { return };
                let grants = [&self.machine.demote];
                let result = self.machine.mm.plan_evacuation(isolated, &mask(&targets), &grants);
                let is_spm = |node: NodeId| (id(2)..=id(4)).contains(&node);
                self.planned(result, |from, to| {
                    to != from.node() && targets.contains(&to.get()) && is_spm(from.node()) == is_spm(to)
                });
            }
            Op::PutBack(at) => {
                let isolated = Self::pick(&mut self.isolated, at);
                isolated.into_iter().for_each(|isolated| self.machine.mm.put_back(isolated));
            }
            Op::Complete(at) => self.complete(at),
            Op::CallOff(at) => {
                let planned = Self::pick(&mut self.moves, at);
                planned.into_iter().for_each(|planned| self.machine.mm.call_off(planned).unwrap());
            }
            Op::Mems(nodes) => {
                let inner = self.machine.inner;
                self.machine.mm.registry_mut().set_mems(inner, mask(&nodes)).unwrap();
            }
        }
    }

    /// No frame has two owners, none is lost.
    fn check(&self) {
        let mut owned = BTreeSet::new();
        let mut used = BTreeMap::<NodeId, u64>::new();
        let targets = self.moves.iter().map(Move::to);
        for block in self.blocks.iter().map(|(block, _)| block).chain(targets) {
            for frame in 0..block.order().frames().0 {
                let is_new = owned.insert((block.node(), u64::from(block.first_frame().0) + frame));
                assert!(is_new, "a frame has two owners");
            }
            *used.entry(block.node()).or_default() += block.order().frames().0;
        }
        for node in 0..6 {
            let stats = self.machine.mm.stats(id(node)).unwrap();
            assert_eq!(stats.used.0, used.get(&id(node)).copied().unwrap_or(0), "node {node}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn blocks_move_only_where_they_may_and_every_frame_has_one_owner_wherever_it_stops(
        ops in prop::collection::vec(op(), 0..150),
    ) {
        let (blocks, isolated, moves) = Default::default();
        let mut model = Model { machine: Machine::new(), blocks, isolated, moves };
        for op in ops {
            model.apply(op);
            model.check();
        }
    }
}

#[test]
fn reclaim_begins_below_low_and_aims_at_high_and_only_where_it_is_offered() {
    let mut machine = Machine::new();
    let marks = Watermarks::new(FrameCount(4), FrameCount(8), FrameCount(16)).unwrap();
    for owner in &machine.owners {
        machine.mm.registry_mut().set_watermarks(owner, marks).unwrap();
    }
    for node in [0, 5] {
        let held: Vec<_> = std::iter::from_fn(|| machine.alloc(DomainId::ROOT, node, 0)).collect();
        assert_eq!(held.len(), 60, "min is kept");
        assert_eq!(machine.mm.shortage(id(node)), FrameCount(if node == 0 { 12 } else { 0 }), "R15");
    }
}

#[test]
fn cold_blocks_of_a_full_node_go_down_a_tier_and_the_used_ones_stay() {
    let mut machine = Machine::new();
    let mut held: Vec<Block> = std::iter::from_fn(|| machine.alloc(DomainId::ROOT, 0, 0)).collect();
    assert!(machine.mm.take_cold(id(0), 0).unwrap().is_empty());
    // The second generation begins with the first look; what is used then is young.
    let first = machine.mm.take_cold(id(0), 1).unwrap();
    first.into_iter().for_each(|isolated| machine.mm.put_back(isolated));
    let hot: BTreeSet<_> = held[..20].iter().map(Block::first_frame).collect();
    held[..20].iter().for_each(|block| machine.mm.note_used(block));
    let mut moved = 0;
    for isolated in machine.mm.take_cold(id(0), 44).unwrap() {
        assert!(!hot.contains(&isolated.page().frame), "a used block is not cold");
        let planned = machine.mm.plan_demotion(isolated, &[&machine.demote]).unwrap();
        assert_eq!(planned.to().node(), id(2), "the next tier, not the one below it");
        let at = held.iter().position(|block| block.first_frame() == planned.from().page().frame).unwrap();
        let new = machine.mm.complete(planned, held.swap_remove(at)).unwrap();
        assert_eq!(new.domain(), Some(DomainId::ROOT));
        machine.mm.free(new).unwrap();
        moved += 1;
    }
    assert_eq!(moved, 44);
    assert_eq!(machine.mm.stats(id(0)).unwrap().free, FrameCount(44));
}

#[test]
fn a_large_block_that_is_not_to_be_had_raises_the_marks_until_reclaim_has_paid() {
    let mut machine = Machine::new();
    let marks = Watermarks::new(FrameCount(0), FrameCount(8), FrameCount(16)).unwrap();
    machine.mm.registry_mut().set_watermarks(&machine.owners[0], marks).unwrap();
    let mut held: Vec<Option<Block>> = (0..64).map(|_| machine.alloc(DomainId::ROOT, 0, 0)).collect();
    for block in held.iter_mut().step_by(2) {
        machine.mm.free(block.take().unwrap()).unwrap();
    }
    assert_eq!(machine.mm.shortage(id(0)), FrameCount(0), "half of it is free");
    assert!(machine.alloc(DomainId::ROOT, 0, 4).is_none());
    assert!(machine.alloc(DomainId::ROOT, 0, 4).is_none());
    held.push(machine.alloc(DomainId::ROOT, 0, 0));
    assert_eq!(machine.mm.shortage(id(0)), FrameCount(9), "31 are free, low is 32 and high 40 now");
    machine.mm.note_reclaimed(id(0), FrameCount(24));
    assert_eq!(machine.mm.shortage(id(0)), FrameCount(0));
}

#[test]
fn the_domain_that_exceeds_its_share_by_most_must_give_and_only_on_a_node_that_asks_for_that() {
    let mut machine = Machine::new();
    let blocks: Vec<_> = (0..3).map(|_| machine.alloc(machine.inner, 0, 3).unwrap()).collect();
    let more = machine.alloc(DomainId::ROOT, 0, 4).unwrap();
    let share = |domain| FrameCount(if domain == DomainId::ROOT { 0 } else { 10 });
    assert_eq!(machine.mm.choose_victim(id(0), share), None, "R3: no OOM_ELIGIBLE, no victim");
    let spec = NodeSpec { services: Services::OOM_ELIGIBLE, ..machine.mm.registry().spec(id(0)).unwrap().clone() };
    let owner = machine.mm.registry_mut().register(id(6), spec.clone()).unwrap().owner;
    let lent = Metadata::from_heap(FrameCount(FRAMES)).unwrap();
    machine.mm.registry_mut().add_range(&owner, &spec, FrameCount(FRAMES), lent, Initial::Zero).unwrap();
    let mine = machine.alloc(machine.inner, 6, 5).unwrap();
    let theirs = machine.alloc(DomainId::ROOT, 6, 4).unwrap();
    let victim = machine.mm.choose_victim(id(6), share).unwrap();
    assert_eq!((victim.domain, victim.excess), (machine.inner, FrameCount(22)));
    for block in blocks.into_iter().chain([more, mine, theirs]) {
        machine.mm.free(block).unwrap();
    }
    assert_eq!(machine.mm.choose_victim(id(6), share), None, "who uses nothing has nothing to give");
}

#[test]
fn a_move_of_one_manager_is_no_move_of_another() {
    let (mut mine, mut theirs) = (Machine::new(), Machine::new());
    let (my_block, their_block) =
        (mine.alloc(DomainId::ROOT, 0, 0).unwrap(), theirs.alloc(DomainId::ROOT, 0, 0).unwrap());
    let isolated = mine.mm.take(&my_block, Mover::Holder(&[])).unwrap();
    let planned = mine.mm.plan_demotion(isolated, &[&mine.demote]).unwrap();
    let (planned, their_block) = mine.mm.complete(planned, their_block).unwrap_err();
    theirs.mm.free(their_block).unwrap();
    let planned = theirs.mm.call_off(planned).unwrap_err();
    let their_block = theirs.alloc(DomainId::ROOT, 0, 0).unwrap();
    assert_eq!(their_block.first_frame(), my_block.first_frame());
    let (planned, their_block) = theirs.mm.complete(planned, their_block).unwrap_err();
    theirs.mm.free(their_block).unwrap();
    let new = mine.mm.complete(planned, my_block).unwrap();
    mine.mm.free(new).unwrap();
    assert!((0..6).all(|node| mine.mm.stats(id(node)).unwrap().used.0 == 0));
}

#[test]
fn a_block_that_was_copied_into_is_not_said_to_be_zero() {
    let mut machine = Machine::new();
    let block = machine.alloc(DomainId::ROOT, 0, 0).unwrap();
    let isolated = machine.mm.take(&block, Mover::Holder(&[])).unwrap();
    let planned = machine.mm.plan_evacuation(isolated, &mask(&[1]), &[]).unwrap();
    let block = machine.mm.complete(planned, block).unwrap();
    assert!(!block.is_zeroed(), "R21");
}

#[test]
#[should_panic(expected = "a block is put back by the manager that took it")]
fn a_block_is_put_back_by_its_own_manager_only() {
    let (mut mine, mut theirs) = (Machine::new(), Machine::new());
    let block = mine.alloc(DomainId::ROOT, 0, 0).unwrap();
    let isolated = mine.mm.take(&block, Mover::Holder(&[])).unwrap();
    theirs.mm.put_back(isolated);
}

#[test]
fn a_use_of_one_managers_block_makes_no_block_of_another_young() {
    let (mut mine, mut theirs) = (Machine::new(), Machine::new());
    let (my_block, their_block) =
        (mine.alloc(DomainId::ROOT, 0, 0).unwrap(), theirs.alloc(DomainId::ROOT, 0, 0).unwrap());
    assert_eq!(their_block.first_frame(), my_block.first_frame());
    let _other = mine.alloc(DomainId::ROOT, 0, 0).unwrap();
    // Looking for cold blocks ages what is there.
    for cold in mine.mm.take_cold(NodeId::ZERO, 1).unwrap() {
        mine.mm.put_back(cold);
    }
    let age = |machine: &Machine| {
        machine.mm.registry().pages(NodeId::ZERO).unwrap().get(my_block.first_frame()).unwrap().age
    };
    assert_eq!(age(&mine), 1);
    mine.mm.note_used(&their_block);
    assert_eq!(age(&mine), 1);
    mine.mm.note_used(&my_block);
    assert_eq!(age(&mine), 0);
}
