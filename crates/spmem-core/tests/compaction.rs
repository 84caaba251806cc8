//! R3, R15: compaction, with who owns which frame and what is charged checked after every move.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use spmem_core::frames::{FrameRange, Metadata};
use spmem_core::grant::{Grant, Rights, Terms};
use spmem_core::migrate::{Move, Stay};
use spmem_core::mm::{Block, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};
use spmem_core::units::{Bytes, DomainId, FrameCount, FrameNumber, NodeId, Order};
use spmem_core::wall::{Mobility, Request};
use spmem_core::zero::Initial;

const FRAMES: u64 = 8 * 512;

struct Machine {
    mm: MemoryManager,
    grant: Grant,
    owner: Owner,
    held: BTreeMap<FrameNumber, Block>,
}

impl Machine {
    fn new(services: Services) -> Self {
        let mut mm = MemoryManager::new();
        let spec = NodeSpec {
            node_type: NodeType::Spm,
            class: Class::Slow,
            services,
            guard: Guard::Hard,
            owner: "test".into(),
        };
        let owner = mm.registry_mut().register(NodeId::ONE, spec.clone()).unwrap().owner;
        let lent = Metadata::from_heap(FrameCount(FRAMES)).unwrap();
        mm.registry_mut().add_range(&owner, &spec, FrameCount(FRAMES), lent, Initial::Zero).unwrap();
        let grant =
            mm.registry_mut().grant(&[&owner], Terms::new(Rights::ALLOC | Rights::PIN, Bytes(u64::MAX))).unwrap();
        Self { mm, grant, owner, held: BTreeMap::new() }
    }

    fn alloc(&mut self, order: u8, mobility: Mobility) -> Option<FrameNumber> {
        let grants = [&self.grant];
        let request = Request { mobility, ..Request::on(DomainId::ROOT, NodeId::ONE, &grants) };
        let block = self.mm.alloc(&request, Order::new(order).unwrap()).ok()?;
        let first = block.first_frame();
        assert!(self.held.insert(first, block).is_none());
        Some(first)
    }

    fn free(&mut self, first: FrameNumber) {
        self.mm.free(self.held.remove(&first).unwrap()).unwrap();
    }

    fn complete(&mut self, planned: Move) {
        let old = self.held.remove(&planned.from().page().frame).unwrap();
        let new = self.mm.complete(planned, old).unwrap();
        assert!(self.held.insert(new.first_frame(), new).is_none(), "a frame has two owners");
    }

    /// What is held is what is in use and what is charged.
    fn check(&self) {
        let used: u64 = self.held.values().map(|block| block.order().frames().0).sum();
        assert_eq!(self.mm.stats(NodeId::ONE).unwrap().used, FrameCount(used));
        let registry = self.mm.registry();
        assert_eq!(registry.grant_info(&self.grant).unwrap().used, FrameCount(used).bytes());
        assert_eq!(registry.used_by(DomainId::ROOT, NodeId::ONE), FrameCount(used));
        let mut end = 0;
        for (first, block) in &self.held {
            assert!(u64::from(first.0) >= end, "a frame has two owners");
            end = u64::from(first.0) + block.order().frames().0;
        }
    }

    fn free_huge(&self) -> u64 {
        let counts = self.mm.stats(NodeId::ONE).unwrap().free_blocks;
        counts[Order::HUGE.index()] + 2 * counts[Order::MAX.index()]
    }

    fn compact(&mut self) -> u64 {
        let mut compaction = self.mm.begin_compaction(NodeId::ONE, Order::HUGE).unwrap();
        let mut moves = 0;
        while !compaction.is_over() {
            for planned in self.mm.plan_compaction(&mut compaction) {
                assert!(planned.to().first_frame() > planned.from().page().frame, "the scanners have not met");
                self.complete(planned);
                moves += 1;
            }
            self.check();
        }
        self.mm.end_compaction(&compaction);
        moves
    }
}

const ALL: Services = Services::COMPACTION.union(Services::MIGRATION).union(Services::LONGTERM_PIN);

#[test]
fn every_huge_frame_that_can_be_free_is_free_after_compaction() {
    let mut machine = Machine::new(ALL);
    let all: Vec<_> = std::iter::from_fn(|| machine.alloc(0, Mobility::Movable)).collect();
    assert_eq!(all.len() as u64, FRAMES);
    // Three of four go: two of eight huge frames hold what is left.
    all.iter().enumerate().filter(|(at, _)| at % 4 != 0).for_each(|(_, &frame)| machine.free(frame));
    assert_eq!(machine.free_huge(), 0);
    let moves = machine.compact();
    assert_eq!(machine.free_huge(), 6);
    assert_eq!(moves, 6 * 128, "each block of the lower six moves once");
}

#[test]
fn what_cannot_move_keeps_its_window_and_no_other() {
    let mut machine = Machine::new(ALL);
    let all: Vec<_> = std::iter::from_fn(|| machine.alloc(0, Mobility::Movable)).collect();
    // Blocks were given out from the top down; every fourth is kept, this one among them.
    let pinned = all[4 * 512 + 4];
    assert!(machine.mm.pin(&machine.held[&pinned], &[&machine.grant]).unwrap());
    all.iter().enumerate().filter(|(at, _)| at % 4 != 0).for_each(|(_, &frame)| machine.free(frame));
    machine.compact();
    assert_eq!(machine.free_huge(), 5);
    assert!(machine.held.contains_key(&pinned), "R15");
}

#[test]
fn blocks_that_cannot_move_are_kept_apart_from_those_that_can() {
    let mut machine = Machine::new(ALL);
    let mut both: Vec<_> = Vec::new();
    for _ in 0..500 {
        both.push(machine.alloc(0, Mobility::Movable).unwrap());
        machine.alloc(0, Mobility::Unmovable).unwrap();
    }
    // 500 of each: a huge frame holds all that cannot move, another what can.
    assert_eq!(machine.free_huge(), 6);
    both.into_iter().step_by(2).for_each(|frame| machine.free(frame));
    machine.compact();
    assert_eq!(machine.free_huge(), 6);
}

#[test]
fn a_node_without_the_service_is_not_compacted() {
    let mut machine = Machine::new(Services::MIGRATION);
    let frame = machine.alloc(0, Mobility::Movable).unwrap();
    let refused = Stay::NotOffered { node: NodeId::ONE, missing: Services::COMPACTION };
    assert_eq!(machine.mm.begin_compaction(NodeId::ONE, Order::HUGE), Err(refused), "R3, R15");
    let run = FrameRange { first: frame, count: FrameCount(512) };
    assert_eq!(machine.mm.plan_emptying(NodeId::ONE, run).unwrap_err(), refused);
}

#[test]
fn compaction_that_did_not_help_is_not_tried_again_at_once() {
    let mut machine = Machine::new(ALL);
    while machine.alloc(0, Mobility::Movable).is_some() {}
    machine.compact();
    let deferred = Stay::Deferred { node: NodeId::ONE };
    assert_eq!(machine.mm.begin_compaction(NodeId::ONE, Order::HUGE), Err(deferred));
    assert!(machine.mm.begin_compaction(NodeId::ONE, Order::HUGE).is_ok(), "the second try goes through");
}

#[test]
fn a_contiguous_range_is_had_by_emptying_it() {
    let mut machine = Machine::new(ALL);
    let all: Vec<_> = std::iter::from_fn(|| machine.alloc(0, Mobility::Movable)).collect();
    all.iter().enumerate().filter(|(at, _)| at % 2 != 0).for_each(|(_, &frame)| machine.free(frame));
    let first = machine.mm.registry().frames(NodeId::ONE).unwrap().ranges().next().unwrap().first;
    let run = FrameRange { first: FrameNumber(first.0 + 1024), count: FrameCount(2048) };
    let contiguous = |machine: &mut Machine| {
        let grants = [&machine.grant];
        machine.mm.alloc_contiguous(&Request::on(DomainId::ROOT, NodeId::ONE, &grants), run.count)
    };
    assert!(contiguous(&mut machine).is_err());
    let emptying = machine.mm.plan_emptying(NodeId::ONE, run).unwrap();
    assert!(emptying.stuck.is_empty());
    emptying.moves.into_iter().for_each(|planned| machine.complete(planned));
    machine.check();
    assert_eq!(contiguous(&mut machine).unwrap().run(), run);
}

#[test]
fn a_range_in_use_is_emptied_into_another_and_removed() {
    let mut machine = Machine::new(ALL);
    let frames: Vec<_> = (0..40).filter_map(|_| machine.alloc(3, Mobility::Movable)).collect();
    assert_eq!(frames.len(), 40);
    let old = machine.mm.registry().frames(NodeId::ONE).unwrap().ranges().next().unwrap();
    assert!(machine.mm.registry_mut().remove_range(&machine.owner, old.first).is_err());
    let spec = machine.mm.registry().spec(NodeId::ONE).unwrap().clone();
    let lent = Metadata::from_heap(FrameCount(FRAMES)).unwrap();
    let registry = machine.mm.registry_mut();
    registry.add_range(&machine.owner, &spec, FrameCount(FRAMES), lent, Initial::Unknown).unwrap();
    let emptying = machine.mm.plan_emptying(NodeId::ONE, old).unwrap();
    assert!(emptying.stuck.is_empty());
    emptying.moves.into_iter().for_each(|planned| machine.complete(planned));
    machine.check();
    machine.mm.registry_mut().remove_range(&machine.owner, old.first).unwrap();
    machine.check();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn compaction_loses_nothing_and_never_makes_it_worse(
        orders in prop::collection::vec((0u8..6, prop::bool::weighted(0.95)), 100..600),
        keep in prop::collection::vec(any::<bool>(), 600), stops_after in 0usize..400,
    ) {
        let mut machine = Machine::new(ALL);
        let mobility = |is_movable| if is_movable { Mobility::Movable } else { Mobility::Unmovable };
        let got: Vec<_> = orders.iter().filter_map(|&(order, m)| machine.alloc(order, mobility(m))).collect();
        got.iter().zip(&keep).filter(|(_, keep)| !**keep).for_each(|(&frame, _)| machine.free(frame));
        let before = machine.free_huge();
        let mut compaction = machine.mm.begin_compaction(NodeId::ONE, Order::HUGE).unwrap();
        let mut done = 0;
        while !compaction.is_over() {
            for planned in machine.mm.plan_compaction(&mut compaction) {
                // It may be stopped anywhere.
                if done < stops_after {
                    machine.complete(planned);
                    done += 1;
                } else {
                    machine.mm.call_off(planned).unwrap();
                }
            }
            machine.check();
        }
        if done < stops_after {
            prop_assert!(machine.free_huge() >= before);
        }
    }
}

#[test]
fn a_run_is_emptied_however_far_beyond_the_node_it_reaches() {
    let mut machine = Machine::new(ALL);
    let blocks: Vec<_> =
        [0, 3, 9].iter().map(|&order| machine.alloc(order, Mobility::Unmovable).unwrap()).collect();
    for (first, count) in [(0, u64::MAX), (0, u64::MAX / 2), (u32::MAX, u64::MAX), (4095, 1 << 32)] {
        let run = FrameRange { first: FrameNumber(first), count: FrameCount(count) };
        let emptying = machine.mm.plan_emptying(NodeId::ONE, run).unwrap();
        assert!(emptying.moves.is_empty() && !emptying.has_poison);
        let mut stuck = emptying.stuck;
        stuck.sort_unstable();
        let mut within: Vec<_> = blocks.iter().copied().filter(|&first| run.contains(first)).collect();
        within.sort_unstable();
        assert_eq!(stuck, within);
        assert_eq!(machine.mm.in_use(NodeId::ONE, run).count(), within.len());
    }
}

#[test]
fn a_block_that_begins_before_a_run_is_named_once_by_its_first_frame() {
    let mut machine = Machine::new(ALL);
    let first = machine.alloc(9, Mobility::Movable).unwrap();
    let run = FrameRange { first: FrameNumber(first.0 + 100), count: FrameCount(200) };
    let emptying = machine.mm.plan_emptying(NodeId::ONE, run).unwrap();
    assert_eq!((emptying.moves.len(), emptying.stuck), (0, vec![first]));
    machine.check();
}

#[test]
fn to_empty_a_run_leaves_what_was_free_of_it_zero_and_gives_none_of_it_out() {
    let mut machine = Machine::new(Services::MIGRATION | Services::COMPACTION);
    let first = machine.alloc(0, Mobility::Movable).unwrap();
    assert_eq!(u64::from(first.0), FRAMES - 1);
    // All but the lowest 4 MiB, in which the block finds its place.
    let run = FrameRange { first: FrameNumber(1024), count: FrameCount(FRAMES - 1024) };
    let emptying = machine.mm.plan_emptying(NodeId::ONE, run).unwrap();
    assert_eq!((emptying.moves.len(), emptying.stuck.len()), (1, 0));
    assert_eq!(emptying.moves[0].to().first_frame(), FrameNumber(1023));
    emptying.moves.into_iter().for_each(|planned| machine.complete(planned));
    machine.check();
    let grants = [&machine.grant];
    let request = Request::on(DomainId::ROOT, NodeId::ONE, &grants);
    let blocks: Vec<Block> = (0..3).map(|_| machine.mm.alloc(&request, Order::MAX).unwrap()).collect();
    assert!(blocks[..2].iter().all(Block::is_zeroed), "nobody had them (R21)");
    blocks.into_iter().for_each(|block| machine.mm.free(block).unwrap());
}
