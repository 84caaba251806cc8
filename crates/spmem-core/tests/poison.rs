//! R20: frames that fail while nodes are used through the wall, against a model that knows whose each block is.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::Index;
use spmem_core::frames::{FrameRange, FramesError, Metadata};
use spmem_core::grant::{Grant, Rights, Terms};
use spmem_core::migrate::Move;
use spmem_core::mm::{Block, MemoryManager};
use spmem_core::node::{Class, Guard, NodeError, NodeSpec, NodeType, Owner, Services};
use spmem_core::poison::{Damage, Holder, PoisonError};
use spmem_core::units::{Bytes, DomainId, FrameCount, FrameNumber, NodeId, Order};
use spmem_core::wall::{Mobility, Request};
use spmem_core::zero::Initial;

const FRAMES: u64 = 2048;
const SERVICES: Services = Services::MIGRATION.union(Services::COMPACTION);

/// Node 0 is sysram without services, node 1 SPM whose blocks can move.
struct Machine {
    mm: MemoryManager,
    owners: Vec<Owner>,
    specs: Vec<NodeSpec>,
    domains: Vec<DomainId>,
    grants: Vec<Grant>,
    /// By node and first frame: the block, and which grant was shown for it.
    held: BTreeMap<(NodeId, FrameNumber), (Block, Option<usize>)>,
    poisoned: BTreeSet<(NodeId, FrameNumber)>,
}

#[derive(Clone, Debug)]
enum Op {
    Alloc {
        node: u16,
        order: u8,
        domain: usize,
        grant: usize,
        is_movable: bool,
    },
    Free(Index),
    Poison(u16, u32),
    /// Of a frame that is in use.
    Hurt(Index, u32),
    Compact(u8),
    RemoveRange(u16),
}

fn op() -> impl Strategy<Value = Op> {
    let alloc = (0u16..2, prop_oneof![3 => 0u8..4, 1 => 0u8..=10], 0usize..3, 0usize..2, any::<bool>());
    prop_oneof![
        8 => alloc.prop_map(|(node, order, domain, grant, is_movable)| {
            Op::Alloc { node, order, domain, grant, is_movable }
        }),
        5 => any::<Index>().prop_map(Op::Free),
        3 => (0u16..2, 0u32..2100).prop_map(|(node, frame)| Op::Poison(node, frame)),
        2 => (any::<Index>(), 0u32..1024).prop_map(|(block, at)| Op::Hurt(block, at)),
        1 => (1u8..=10).prop_map(Op::Compact),
        1 => (0u16..2).prop_map(Op::RemoveRange),
    ]
}

fn id(node: u16) -> NodeId {
    NodeId::new(node).unwrap()
}

fn contains(block: &Block, frame: FrameNumber) -> bool {
    let span = FrameRange { first: block.first_frame(), count: block.order().frames() };
    span.contains(frame)
}

impl Machine {
    fn new() -> Self {
        let mut mm = MemoryManager::new();
        let (mut owners, mut specs) = (Vec::new(), Vec::new());
        for (node_type, services) in [(NodeType::Sysram, Services::empty()), (NodeType::Spm, SERVICES)] {
            let (class, guard) = (Class::Plain, Guard::Hard);
            let spec = NodeSpec { node_type, class, services, guard, owner: "test".into() };
            let node = id(u16::try_from(specs.len()).unwrap());
            owners.push(mm.registry_mut().register(node, spec.clone()).unwrap().owner);
            specs.push(spec);
        }
        let registry = mm.registry_mut();
        let first = registry.create_domain(DomainId::ROOT, "first").unwrap();
        let second = registry.create_domain(first, "second").unwrap();
        let terms = Terms::new(Rights::ALLOC, Bytes(u64::MAX));
        let grants = (0..2).map(|_| registry.grant(&[&owners[1]], terms).unwrap()).collect();
        let domains = vec![DomainId::ROOT, first, second];
        let (held, poisoned) = (BTreeMap::new(), BTreeSet::new());
        let mut machine = Self { mm, owners, specs, domains, grants, held, poisoned };
        (0..2).for_each(|node| machine.add_range(node));
        machine
    }

    fn add_range(&mut self, node: usize) {
        let lent = Metadata::from_heap(FrameCount(FRAMES)).unwrap();
        let (owner, spec) = (&self.owners[node], &self.specs[node]);
        let range = self.mm.registry_mut().add_range(owner, spec, FrameCount(FRAMES), lent, Initial::Zero);
        assert_eq!(range.unwrap().first, FrameNumber(0));
    }

    fn alloc(&mut self, node: NodeId, order: Order, domain: usize, grant: usize, mobility: Mobility) {
        let shown = [&self.grants[grant]];
        let grants = if node == NodeId::ZERO { &[][..] } else { &shown };
        let request = Request { mobility, ..Request::on(self.domains[domain], node, grants) };
        let Ok(block) = self.mm.alloc(&request, order) else {
            let stats = self.mm.stats(node).unwrap();
            return assert!(
                stats.free_blocks[order.index()..].iter().all(|&count| count == 0),
                "free is allocatable"
            );
        };
        assert_eq!(self.hurt_in(node, &block), 0, "a poisoned frame came back");
        let shown = (node != NodeId::ZERO).then_some(grant);
        assert!(self.held.insert((node, block.first_frame()), (block, shown)).is_none());
    }

    fn hurt_in(&self, node: NodeId, block: &Block) -> usize {
        self.poisoned.iter().filter(|&&(of, frame)| of == node && contains(block, frame)).count()
    }

    fn holder_of(&self, node: NodeId, frame: FrameNumber) -> Option<&(Block, Option<usize>)> {
        self.held
            .range(..=(node, frame))
            .next_back()
            .map(|(_, held)| held)
            .filter(|held| held.0.node() == node && contains(&held.0, frame))
    }

    fn poison(&mut self, node: NodeId, frame: FrameNumber) {
        let report = match self.mm.poison(node, frame) {
            Ok(report) => report,
            Err(error) => {
                assert!(u64::from(frame.0) >= FRAMES);
                return assert_eq!(error, PoisonError::Frames { node, cause: FramesError::Foreign { frame } });
            }
        };
        assert_eq!(report.is_new, self.poisoned.insert((node, frame)));
        match (report.damage, self.holder_of(node, frame)) {
            (Damage::OutOfUse, None) => {}
            (Damage::Holder(holder), Some(held)) => self.is_named(&holder, held),
            (damage, held) => panic!("{damage:?}, but the model has {held:?}"),
        }
    }

    /// Whoever is named is the one who holds the block.
    fn is_named(&self, holder: &Holder, (block, _): &(Block, Option<usize>)) {
        assert_eq!((holder.block.first, holder.block.order), (block.first_frame(), Some(block.order())));
        assert!(holder.page.is_none_or(|page| (page.frame, page.domain) == (block.first_frame(), block.domain())));
    }

    fn complete(&mut self, planned: Move) {
        let (old, grant) = self.held.remove(&(id(1), planned.from().page().frame)).unwrap();
        let new = self.mm.complete(planned, old).unwrap();
        assert_eq!(self.hurt_in(id(1), &new), 0, "a block moved to a poisoned frame");
        assert!(self.held.insert((id(1), new.first_frame()), (new, grant)).is_none());
    }

    fn compact(&mut self, order: Order) {
        let Ok(mut compaction) = self.mm.begin_compaction(id(1), order) else { return };
        while !compaction.is_over() {
            for planned in self.mm.plan_compaction(&mut compaction) {
                let window = planned.from().page().frame.0 >> order.get();
                let is_vain =
                    |&(node, frame): &(NodeId, FrameNumber)| node == id(1) && frame.0 >> order.get() == window;
                assert!(!self.poisoned.iter().any(is_vain), "a block moves for a window that never becomes whole");
                self.complete(planned);
            }
        }
        self.mm.end_compaction(&compaction);
    }

    fn remove_range(&mut self, node: u16) {
        let (node, part) = (id(node), FrameRange { first: FrameNumber(0), count: FrameCount(FRAMES) });
        let named: Vec<_> = self.mm.in_use(node, part).collect();
        let held: Vec<_> = self.held.values().filter(|(block, _)| block.node() == node).collect();
        assert_eq!(named.len(), held.len());
        named.iter().zip(&held).for_each(|(named, held)| self.is_named(named, held));
        let owner = &self.owners[usize::from(node.get())];
        match self.mm.registry_mut().remove_range(owner, FrameNumber(0)) {
            Ok((_, lent)) => {
                assert!(held.is_empty() && lent.is_zero(), "only frames out of use are left");
                self.poisoned.retain(|&(of, _)| of != node);
                self.add_range(usize::from(node.get()));
            }
            Err(NodeError::Frames(FramesError::RangeInUse { used, lowest, .. })) => {
                let frames: u64 = held.iter().map(|(block, _)| block.order().frames().0).sum();
                assert_eq!((used.0, lowest), (frames, named[0].block.first));
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn free(&mut self, at: Index) {
        if !self.held.is_empty() {
            let key = *self.held.keys().nth(at.index(self.held.len())).unwrap();
            self.mm.free(self.held.remove(&key).unwrap().0).unwrap();
        }
    }

    fn check(&self) {
        for node in [id(0), id(1)] {
            let stats = self.mm.stats(node).unwrap();
            let held = self.held.values().filter(|(block, _)| block.node() == node);
            let used: u64 = held.map(|(block, _)| block.order().frames().0).sum();
            let is_out =
                |&&(of, frame): &&(NodeId, FrameNumber)| of == node && self.holder_of(of, frame).is_none();
            let poisoned = self.poisoned.iter().filter(is_out).count() as u64;
            assert_eq!((stats.used.0, stats.poisoned.0), (used, poisoned));
            assert_eq!(stats.free.0, FRAMES - used - poisoned);
            let in_blocks = (0..).zip(stats.free_blocks).map(|(order, count)| count << order);
            assert_eq!(stats.free.0, in_blocks.sum::<u64>(), "what is free can be allocated");
        }
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Alloc { node, order, domain, grant, is_movable } => {
                let mobility = if is_movable { Mobility::Movable } else { Mobility::Unmovable };
                self.alloc(id(node), Order::new(order).unwrap(), domain, grant, mobility);
            }
            Op::Free(at) => self.free(at),
            Op::Poison(node, frame) => self.poison(id(node), FrameNumber(frame)),
            Op::Hurt(at, frame) if !self.held.is_empty() => {
                let (block, _) = self.held.values().nth(at.index(self.held.len())).unwrap();
                let (node, first, order) = (block.node(), block.first_frame(), block.order());
                self.poison(node, FrameNumber(first.0 + (frame & ((1 << order.get()) - 1))));
            }
            Op::Hurt(..) => {}
            Op::Compact(order) => self.compact(Order::new(order).unwrap()),
            Op::RemoveRange(node) => self.remove_range(node),
        }
        self.check();
    }
}

proptest! {
    #[test]
    fn poison_names_whoever_holds_the_frame_and_no_poisoned_frame_comes_back(
        ops in prop::collection::vec(op(), 0..150),
    ) {
        let mut machine = Machine::new();
        ops.iter().for_each(|op| machine.step(op));
        while let Some((&key, _)) = machine.held.iter().next() {
            machine.mm.free(machine.held.remove(&key).unwrap().0).unwrap();
        }
        machine.check();
        (0..2).for_each(|node| machine.remove_range(node));
    }
}

#[test]
fn an_unknown_node_has_no_frame_to_poison() {
    let mut machine = Machine::new();
    assert_eq!(machine.mm.poison(id(7), FrameNumber(0)), Err(PoisonError::Absent { node: id(7) }));
}
