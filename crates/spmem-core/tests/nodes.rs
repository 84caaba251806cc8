//! R1-R3: the node table against a map.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use spmem_core::frames::Metadata;
use spmem_core::mm::{Block, FreeError, MemoryManager};
use spmem_core::node::{Class, Guard, NodeError, NodeSpec, NodeType, Owner, Property, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::{Flags, Mode, Policy};
use spmem_core::registry::{Registered, Registry};
use spmem_core::units::{DomainId, FrameCount, FrameNumber, NodeId, Order};
use spmem_core::wall::{Mobility, Request};
use spmem_core::zero::Initial;

fn lent(frames: u64) -> Metadata {
    Metadata::from_heap(FrameCount(frames)).unwrap()
}

fn spec() -> impl Strategy<Value = NodeSpec> {
    let types = prop_oneof![Just(NodeType::Sysram), Just(NodeType::Spm)];
    let classes = prop_oneof![Just(Class::Plain), Just(Class::Featured)];
    let guards = prop_oneof![4 => Just(Guard::Easy), 1 => Just(Guard::Hard)];
    let services = prop_oneof![Just(Services::USER_NUMA), (0u16..512).prop_map(Services::from_bits_truncate)];
    (types, classes, guards, services).prop_map(|(node_type, class, guard, services)| NodeSpec {
        node_type,
        class,
        services,
        guard,
        owner: "test".into(),
    })
}

#[derive(Clone, Debug)]
enum Op {
    Register(u16, NodeSpec),
    AddRange(u16, NodeSpec, u64),
    AddLike(u16, u64),
    Alloc(u16, u8),
    Free(prop::sample::Index),
    RemoveRange(u16),
    Unregister(u16),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0u16..4, spec()).prop_map(|(n, s)| Op::Register(n, s)),
        1 => (0u16..4, spec(), 0u64..3000).prop_map(|(n, s, c)| Op::AddRange(n, s, c)),
        2 => (0u16..4, 1u64..3000).prop_map(|(n, c)| Op::AddLike(n, c)),
        2 => (0u16..4, 0u8..=10).prop_map(|(n, o)| Op::Alloc(n, o)),
        2 => any::<prop::sample::Index>().prop_map(Op::Free),
        2 => (0u16..4).prop_map(Op::RemoveRange),
        2 => (0u16..4).prop_map(Op::Unregister),
    ]
}

#[derive(Debug)]
struct Known {
    owner: Owner,
    spec: NodeSpec,
    ranges: Vec<FrameNumber>,
    used: u64,
}

#[derive(Default)]
struct Model {
    mm: MemoryManager,
    nodes: BTreeMap<u16, Known>,
    /// Tokens of nodes that are gone.
    stale: Vec<Owner>,
    blocks: Vec<Block>,
}

fn needs_are_met(s: Services) -> bool {
    (!s.contains(Services::DEMOTION) || s.contains(Services::RECLAIM) && s.contains(Services::MIGRATION))
        && (!s.contains(Services::PROMOTION) || s.contains(Services::MIGRATION))
        && (!s.contains(Services::WRITE_FENCE) || s.contains(Services::MIGRATION))
        && (!s.contains(Services::COMPACTION) || s.contains(Services::MIGRATION))
}

fn guard_is_met(spec: &NodeSpec) -> bool {
    spec.node_type == NodeType::Sysram || spec.guard == Guard::Hard || spec.services.contains(Services::USER_NUMA)
}

impl Model {
    fn register(&mut self, node: u16, spec: NodeSpec) {
        let result = self.mm.registry_mut().register(NodeId::new(node).unwrap(), spec.clone());
        match (self.nodes.get(&node), result) {
            (_, Err(NodeError::ServiceNeeds { .. })) => assert!(!needs_are_met(spec.services)),
            (_, Err(NodeError::GuardNeeds { .. })) => assert!(!guard_is_met(&spec)),
            (Some(known), Err(NodeError::TypeLatched { latched, .. })) => {
                assert_eq!(latched, known.spec.node_type);
                assert_ne!(latched, spec.node_type);
            }
            (Some(known), Err(NodeError::AlreadyRegistered { .. })) => {
                assert_eq!(known.spec.node_type, spec.node_type);
            }
            (None, Ok(Registered { owner, .. })) => {
                assert!(needs_are_met(spec.services) && guard_is_met(&spec));
                self.nodes.insert(node, Known { owner, spec, ranges: Vec::new(), used: 0 });
            }
            (known, result) => panic!("{known:?} {result:?}"),
        }
    }

    fn add_range(&mut self, node: u16, spec: Option<NodeSpec>, count: u64) {
        let Some(known) = self.nodes.get_mut(&node) else { return };
        let spec = spec.unwrap_or_else(|| NodeSpec { owner: "other".into(), ..known.spec.clone() });
        let is_alike = NodeSpec { owner: "test".into(), ..spec.clone() } == known.spec;
        match self.mm.registry_mut().add_range(&known.owner, &spec, FrameCount(count), lent(count), Initial::Zero)
        {
            Ok(range) => {
                assert!(is_alike);
                known.ranges.push(range.first);
            }
            Err(NodeError::Conflict { property, .. }) => {
                assert!(!is_alike);
                assert_eq!(property == Property::Type, spec.node_type != known.spec.node_type);
            }
            Err(error) => assert!(matches!(error, NodeError::Frames(_)) && count == 0, "{error}"),
        }
    }

    fn alloc(&mut self, node: u16, order: u8) {
        let id = NodeId::new(node).unwrap();
        if let Ok(block) = self.mm.alloc(&Request::on(DomainId::ROOT, id, &[]), Order::new(order).unwrap()) {
            let known = self.nodes.get_mut(&node).unwrap();
            assert!(known.spec.node_type == NodeType::Sysram || known.spec.guard == Guard::Easy, "R9");
            known.used += block.order().frames().0;
            self.blocks.push(block);
        }
    }

    fn free(&mut self, at: prop::sample::Index) {
        if self.blocks.is_empty() {
            return;
        }
        let block = self.blocks.swap_remove(at.index(self.blocks.len()));
        self.nodes.get_mut(&block.node().get()).unwrap().used -= block.order().frames().0;
        self.mm.free(block).unwrap();
    }

    fn remove_range(&mut self, node: u16) {
        let Some(known) = self.nodes.get_mut(&node) else { return };
        let Some(&first) = known.ranges.last() else { return };
        match self.mm.registry_mut().remove_range(&known.owner, first) {
            Ok((range, _)) => assert_eq!(known.ranges.pop(), Some(range.first)),
            Err(_) => assert!(known.used > 0),
        }
    }

    fn unregister(&mut self, node: u16) {
        let Some(known) = self.nodes.get(&node) else { return };
        match self.mm.registry_mut().unregister(&known.owner) {
            Ok(()) => {
                assert!(known.used == 0 && known.ranges.is_empty());
                self.stale.push(self.nodes.remove(&node).unwrap().owner);
            }
            Err(NodeError::InUse { used, ranges, .. }) => {
                assert_eq!((used.0, ranges), (known.used, known.ranges.len()));
                assert!(used.0 > 0 || ranges > 0);
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn check(&mut self) {
        let of = |t| {
            let nodes = self.nodes.iter().filter(|(_, known)| known.spec.node_type == t);
            nodes.map(|(&node, _)| NodeId::new(node).unwrap()).collect::<NodeMask>()
        };
        let (sysram, spm) = (of(NodeType::Sysram), of(NodeType::Spm));
        assert_eq!((*self.mm.registry().sysram(), *self.mm.registry().spm()), (sysram, spm), "R1, R2");
        for (&node, known) in &self.nodes {
            let node = NodeId::new(node).unwrap();
            assert_eq!(self.mm.registry().spec(node), Some(&known.spec), "R3");
            assert_eq!(self.mm.stats(node).unwrap().used.0, known.used);
        }
        for owner in &self.stale {
            assert!(self.mm.registry_mut().unregister(owner).is_err(), "a stale token is worth nothing");
        }
    }
}

proptest! {
    #[test]
    fn types_are_latched_services_fixed_and_only_empty_nodes_unregistered(
        ops in prop::collection::vec(op(), 0..120),
    ) {
        let mut model = Model::default();
        for op in ops {
            match op {
                Op::Register(node, spec) => model.register(node, spec),
                Op::AddRange(node, spec, count) => model.add_range(node, Some(spec), count),
                Op::AddLike(node, count) => model.add_range(node, None, count),
                Op::Alloc(node, order) => model.alloc(node, order),
                Op::Free(at) => model.free(at),
                Op::RemoveRange(node) => model.remove_range(node),
                Op::Unregister(node) => model.unregister(node),
            }
            model.check();
        }
    }

    #[test]
    fn without_spm_nodes_nothing_is_filtered(
        nodes in prop::collection::btree_set(0u16..8, 1..8), asked in prop::collection::btree_set(0u16..8, 1..8),
        mode in prop_oneof![Just(Mode::Bind), Just(Mode::PreferredMany), Just(Mode::Interleave)],
    ) {
        let mut mm = MemoryManager::new();
        for &node in &nodes {
            let spec = NodeSpec {
                node_type: NodeType::Sysram, class: Class::Plain, services: Services::empty(),
                guard: Guard::Hard, owner: "test".into(),
            };
            mm.registry_mut().register(NodeId::new(node).unwrap(), spec).unwrap();
        }
        let mask = |set: Vec<u16>| set.into_iter().map(|n| NodeId::new(n).unwrap()).collect::<NodeMask>();
        let both = mask(nodes.intersection(&asked).copied().collect());
        let policy = Policy::new(mode, Flags::empty(), mask(asked.into_iter().collect())).unwrap();
        let request = Request { policy, ..Request::of(DomainId::ROOT) };
        let pass = mm.registry().admit(&request);
        prop_assert_eq!(pass.map(|pass| pass.nodes()).unwrap_or_default(), both);
        let plain = mm.registry().admit(&Request::of(DomainId::ROOT)).unwrap();
        prop_assert_eq!(*plain.mask(), mask(nodes.into_iter().collect()));
    }
}

#[test]
fn a_token_of_another_table_owns_nothing() {
    let spec = NodeSpec {
        node_type: NodeType::Spm,
        class: Class::Plain,
        services: Services::empty(),
        guard: Guard::Hard,
        owner: "test".into(),
    };
    let (mut mine, mut theirs) = (MemoryManager::new(), MemoryManager::new());
    let owner = mine.registry_mut().register(NodeId::ONE, spec.clone()).unwrap().owner;
    theirs.registry_mut().register(NodeId::ONE, spec.clone()).unwrap();
    let refused = NodeError::NotOwner { node: NodeId::ONE };
    assert_eq!(
        theirs.registry_mut().add_range(&owner, &spec, FrameCount(1), lent(1), Initial::Zero),
        Err(refused)
    );
    assert_eq!(theirs.registry_mut().unregister(&owner), Err(refused));
}

#[test]
fn a_block_is_told_from_those_of_every_later_manager() {
    let with_memory = || {
        let mut mm = MemoryManager::new();
        let (node_type, class, services) = (NodeType::Sysram, Class::Plain, Services::empty());
        let spec = NodeSpec { node_type, class, services, guard: Guard::Hard, owner: "test".into() };
        let owner = mm.registry_mut().register(NodeId::ZERO, spec.clone()).unwrap().owner;
        mm.registry_mut().add_range(&owner, &spec, FrameCount(64), lent(64), Initial::Zero).unwrap();
        mm
    };
    let mut first = with_memory();
    // Others make managers meanwhile: one of these would have had the number again, when numbers went round at 2^16.
    (0..65_500).for_each(|_| drop(MemoryManager::new()));
    for _ in 0..100 {
        let block = first.alloc(&Request::of(DomainId::ROOT), Order::ZERO).unwrap();
        let mut later = with_memory();
        let _held = later.alloc(&Request::of(DomainId::ROOT), Order::ZERO).unwrap();
        let Err(FreeError::Foreign(block)) = later.free(block) else { panic!("it is another manager's") };
        first.free(block).unwrap();
    }
}

fn plain(mm: &mut MemoryManager, node: NodeId, frames: u64, services: Services) -> Owner {
    let (node_type, class, guard) = (NodeType::Sysram, Class::Plain, Guard::Hard);
    let spec = NodeSpec { node_type, class, services, guard, owner: "test".into() };
    let owner = mm.registry_mut().register(node, spec.clone()).unwrap().owner;
    mm.registry_mut().add_range(&owner, &spec, FrameCount(frames), lent(frames), Initial::Zero).unwrap();
    owner
}

#[test]
fn what_is_kept_of_a_nodes_blocks_is_reported_and_goes_with_its_ranges() {
    let mut mm = MemoryManager::new();
    let owner = plain(&mut mm, NodeId::ZERO, 1 << 18, Services::MIGRATION);
    let spec = mm.registry().spec(NodeId::ZERO).unwrap().clone();
    let before = mm.stats(NodeId::ZERO).unwrap().metadata;
    let request = Request { mobility: Mobility::Movable, ..Request::of(DomainId::ROOT) };
    let blocks: Vec<_> = (0..1 << 8).map(|_| mm.alloc(&request, Order::MAX).unwrap()).collect();
    let kept = mm.stats(NodeId::ZERO).unwrap().metadata;
    assert!(kept.0 >= before.0 + (1 << 18) / 8 + (5 << 17), "twenty-one bits a frame: {before} to {kept}");
    assert!(kept.0 * 1000 < 1 << 30, "{kept} for a GiB that is all in use");
    blocks.into_iter().for_each(|block| mm.free(block).unwrap());
    mm.registry_mut().remove_range(&owner, FrameNumber(0)).unwrap();
    assert_eq!(mm.stats(NodeId::ZERO).unwrap().metadata.0, 0);
    mm.registry_mut().add_range(&owner, &spec, FrameCount(1 << 18), lent(1 << 18), Initial::Zero).unwrap();
    assert_eq!(mm.stats(NodeId::ZERO).unwrap().metadata, before);
}

#[test]
fn a_node_that_is_registered_anew_has_neither_distance_nor_tier_of_its_predecessor() {
    let mut mm = MemoryManager::new();
    let owner = plain(&mut mm, NodeId::ONE, 64, Services::empty());
    mm.registry_mut().set_distance(NodeId::ZERO, NodeId::ONE, 99).unwrap();
    mm.registry_mut().set_distance(NodeId::ONE, NodeId::ZERO, 98).unwrap();
    let tier = mm.registry().tiers().tier(NodeId::ONE);
    mm.registry_mut().set_abstract_distance(NodeId::ONE, 1 << 20).unwrap();
    assert_ne!(mm.registry().tiers().tier(NodeId::ONE), tier);
    mm.registry_mut().remove_range(&owner, FrameNumber(0)).unwrap();
    mm.registry_mut().unregister(&owner).unwrap();
    plain(&mut mm, NodeId::ONE, 64, Services::empty());
    let distances = mm.registry().distances();
    let found = (distances.get(NodeId::ZERO, NodeId::ONE), distances.get(NodeId::ONE, NodeId::ZERO));
    assert_eq!(found, (20, 20));
    assert_eq!(mm.registry().tiers().tier(NodeId::ONE), tier);
}

#[test]
fn the_nearest_node_comes_first_home_before_local_also_for_a_pass_that_is_kept() {
    let mut mm = MemoryManager::new();
    let node = |number| NodeId::new(number).unwrap();
    for number in 0..4 {
        plain(&mut mm, node(number), 1, Services::empty());
    }
    let registry = mm.registry_mut();
    for (to, distance) in [(0, 40), (1, 30), (3, 25)] {
        registry.set_distance(node(2), node(to), distance).unwrap();
    }
    let local = Request { local: Some(node(2)), ..Request::of(DomainId::ROOT) };
    let mut pass = mm.registry().admit(&local).unwrap();
    let take = |mm: &mut MemoryManager, pass: &mut _| mm.alloc_with(pass, Order::ZERO).unwrap();
    let first = [take(&mut mm, &mut pass), take(&mut mm, &mut pass)];
    assert_eq!(first.each_ref().map(Block::node), [node(2), node(3)], "by distance, not by number");
    mm.registry_mut().set_distance(node(2), node(0), 12).unwrap();
    let rest = [take(&mut mm, &mut pass), take(&mut mm, &mut pass)];
    assert_eq!(rest.each_ref().map(Block::node), [node(0), node(1)], "the pass has heard of the new distance");
    first.into_iter().chain(rest).for_each(|block| mm.free(block).unwrap());
    let present = *mm.registry().present();
    let homed = Policy::bind(present).with_home(node(1), &present).unwrap();
    let request = Request { policy: homed, local: Some(node(2)), ..Request::of(DomainId::ROOT) };
    assert_eq!(mm.alloc(&request, Order::ZERO).unwrap().node(), node(1));
}

#[test]
fn metadata_lies_on_sysram_for_as_long_as_it_is_lent() {
    // R7: whatever says where it lies.
    let mut registry = Registry::new();
    let spec = |node_type| NodeSpec {
        node_type,
        class: Class::Plain,
        services: Services::empty(),
        guard: Guard::Hard,
        owner: "test".into(),
    };
    let node = |number| NodeId::new(number).unwrap();
    let sysram = registry.register(node(0), spec(NodeType::Sysram)).unwrap().owner;
    let spm = registry.register(node(1), spec(NodeType::Spm)).unwrap().owner;
    let count = FrameCount(64);
    for at in [node(1), node(2)] {
        let lent = Metadata::from_heap(count).unwrap().on(at);
        for (owner, of) in [(&sysram, NodeType::Sysram), (&spm, NodeType::Spm)] {
            let added = registry.add_range(owner, &spec(of), count, lent, Initial::Zero);
            assert_eq!(added, Err(NodeError::MetadataOn { node: at }), "SPM, or not there at all");
        }
        assert!(lent.is_zero(), "nothing of it was touched");
    }
    assert_eq!(registry.frames(node(1)).unwrap().capacity(), FrameCount(0));
    let lent = Metadata::from_heap(count).unwrap().on(node(0));
    let range = registry.add_range(&spm, &spec(NodeType::Spm), count, lent, Initial::Zero).unwrap();
    // Else it could come again as SPM.
    assert_eq!(registry.unregister(&sysram), Err(NodeError::Lends { node: node(0), to: node(1) }));
    let (_, lent) = registry.remove_range(&spm, range.first).unwrap();
    assert_eq!(lent.node(), Some(node(0)));
    registry.unregister(&sysram).unwrap();
    registry.register(node(0), spec(NodeType::Spm)).unwrap();
    let added = registry.add_range(&spm, &spec(NodeType::Spm), count, lent, Initial::Zero);
    assert_eq!(added, Err(NodeError::MetadataOn { node: node(0) }));
}
