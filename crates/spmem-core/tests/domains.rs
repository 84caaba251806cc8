//! R4, R5: the tree of domains against a map of paths, and kept passes against fresh ones.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::Index;
use spmem_core::domain::{DomainError, MAX_DEPTH, MAX_NAME, Outside};
use spmem_core::frames::Metadata;
use spmem_core::migrate::Mover;
use spmem_core::mm::{AllocError, Block, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::Policy;
use spmem_core::registry::Registered;
use spmem_core::units::{DomainId, FrameCount, MAX_DOMAINS, NodeId, Order};
use spmem_core::wall::{Mobility, Pass, Reason, Refusal, Request};
use spmem_core::zero::Initial;

type Set = BTreeSet<u16>;

const NODES: u16 = 6;
const FRAMES: u64 = 64;

fn id(node: u16) -> NodeId {
    NodeId::new(node).unwrap()
}

fn mask(set: &Set) -> NodeMask {
    set.iter().map(|&node| id(node)).collect()
}

fn set() -> impl Strategy<Value = Set> {
    prop::collection::btree_set(0..NODES, 0..4)
}

/// Static numbers: what they mean does not depend on what was before.
fn policy(asked: Option<&Set>) -> Policy {
    asked.map_or(Policy::DEFAULT, |asked| Policy::bind(mask(asked)))
}

#[derive(Clone, Debug)]
enum Op {
    Register(u16, bool),
    Unregister(u16),
    Create(Index, u8),
    Remove(Index),
    Mems(Index, Set),
    Sysram(Index, Set),
    /// Keeps a pass for a request of a domain, with a mask or without.
    Admit(Index, Option<Set>),
    Alloc(Index, u8),
    Free(Index),
}

fn op() -> impl Strategy<Value = Op> {
    let at = any::<Index>;
    prop_oneof![
        2 => (0..NODES, any::<bool>()).prop_map(|(n, s)| Op::Register(n, s)),
        1 => (0..NODES).prop_map(Op::Unregister),
        3 => (at(), 0u8..3).prop_map(|(d, n)| Op::Create(d, n)),
        1 => at().prop_map(Op::Remove),
        3 => (at(), set()).prop_map(|(d, s)| Op::Mems(d, s)),
        2 => (at(), set()).prop_map(|(d, s)| Op::Sysram(d, s)),
        3 => (at(), prop::option::of(set())).prop_map(|(d, s)| Op::Admit(d, s)),
        5 => (at(), 0u8..4).prop_map(|(p, o)| Op::Alloc(p, o)),
        2 => at().prop_map(Op::Free),
    ]
}

#[derive(Debug, Default)]
struct Known {
    mems: Set,
    mems_sysram: Set,
}

#[derive(Default)]
struct Model {
    mm: MemoryManager,
    nodes: BTreeMap<u16, (Owner, NodeType)>,
    /// By path; the root is "".
    domains: BTreeMap<String, Known>,
    passes: Vec<(Pass, String, Option<Set>)>,
    blocks: Vec<(Block, String)>,
}

impl Model {
    fn new() -> Self {
        let mut model = Self::default();
        model.domains.insert(String::new(), Known::default());
        model
    }

    fn pick(&self, at: Index) -> (String, DomainId) {
        let path = self.domains.keys().nth(at.index(self.domains.len())).unwrap().clone();
        let id = self.mm.registry().find_domain(&path).unwrap();
        (path, id)
    }

    fn of_type(&self, wanted: NodeType) -> Set {
        self.nodes.iter().filter(|(_, (_, t))| *t == wanted).map(|(&node, _)| node).collect()
    }

    fn effective(&self, path: &str) -> Set {
        let above = match path.rsplit_once('/') {
            Some((above, _)) => self.effective(above),
            None => self.nodes.keys().copied().collect(),
        };
        let limited = &self.domains[path].mems & &above;
        if limited.is_empty() { above } else { limited }
    }

    fn default_mask(&self, path: &str) -> Set {
        let plain = &self.effective(path) & &self.of_type(NodeType::Sysram);
        let known = &self.domains[path];
        if known.mems_sysram.is_empty() { plain } else { &plain & &known.mems_sysram }
    }

    fn register(&mut self, node: u16, is_spm: bool) {
        let node_type = if is_spm { NodeType::Spm } else { NodeType::Sysram };
        let spec = NodeSpec {
            node_type,
            class: Class::Plain,
            services: Services::USER_NUMA,
            guard: Guard::Easy,
            owner: "test".into(),
        };
        if let Ok(Registered { owner, outside }) = self.mm.registry_mut().register(id(node), spec.clone()) {
            let lent = Metadata::from_heap(FrameCount(FRAMES)).unwrap();
            self.mm.registry_mut().add_range(&owner, &spec, FrameCount(FRAMES), lent, Initial::Zero).unwrap();
            assert!(self.nodes.insert(node, (owner, node_type)).is_none());
            self.check_listed("", &outside);
        }
    }

    fn unregister(&mut self, node: u16) {
        let Some((owner, _)) = self.nodes.get(&node) else { return };
        let first = self.mm.registry().frames(id(node)).unwrap().ranges().next().unwrap().first;
        let is_used = self.blocks.iter().any(|(block, _)| block.node() == id(node));
        assert_eq!(self.mm.registry_mut().remove_range(owner, first).is_err(), is_used);
        if !is_used {
            let before = self.outside("");
            self.mm.registry_mut().unregister(owner).unwrap();
            self.nodes.remove(&node);
            let after = self.outside("");
            assert!(after.iter().all(|(place, frames)| before.get(place) == Some(frames)), "R5: nothing new");
        }
    }

    fn create(&mut self, at: Index, name: u8) {
        let (path, above) = self.pick(at);
        let child = format!("{path}/{name}");
        match self.mm.registry_mut().create_domain(above, &name.to_string()) {
            Ok(_) => assert!(self.domains.insert(child, Known::default()).is_none()),
            Err(DomainError::Exists { .. }) => assert!(self.domains.contains_key(&child)),
            Err(error) => assert_eq!(error, DomainError::TooDeep),
        }
    }

    fn remove(&mut self, at: Index) {
        let (path, domain) = self.pick(at);
        let children = self.domains.keys().filter(|p| p.starts_with(&format!("{path}/"))).count();
        match self.mm.registry_mut().remove_domain(domain) {
            Ok(()) => {
                assert_eq!(children, 0);
                assert!(self.blocks.iter().all(|(_, of)| *of != path));
                self.domains.remove(&path).unwrap();
                // The number may be another domain's next: a pass for it goes with the domain.
                let registry = self.mm.registry();
                self.passes.retain_mut(|(pass, of, _)| *of != path || pass.allowed(registry).is_ok());
                assert!(
                    self.passes.iter().all(|(_, of, _)| *of != path),
                    "a domain that is gone lets nobody through"
                );
            }
            Err(DomainError::Root) => assert_eq!(path, ""),
            Err(DomainError::HasChildren { .. }) => assert!(children > 0),
            Err(error) => assert!(matches!(error, DomainError::InUse { used } if used.0 > 0)),
        }
    }

    fn set_mems(&mut self, at: Index, mems: Set) {
        let (path, domain) = self.pick(at);
        let outside = self.mm.registry_mut().set_mems(domain, mask(&mems)).unwrap();
        self.domains.get_mut(&path).unwrap().mems = mems;
        self.check_listed(&path, &outside);
    }

    /// Frames of a domain and all below it that lie outside: by path and node.
    fn outside(&self, path: &str) -> BTreeMap<(String, u16), u64> {
        let mut found = BTreeMap::new();
        for (block, of) in &self.blocks {
            let is_below = of == path || of.starts_with(&format!("{path}/"));
            if is_below && !self.effective(of).contains(&block.node().get()) {
                *found.entry((of.clone(), block.node().get())).or_default() += block.order().frames().0;
            }
        }
        found
    }

    fn check_listed(&self, path: &str, listed: &[Outside]) {
        let path_of =
            |domain| self.mm.registry().domain_path(domain).unwrap().to_string().trim_end_matches('/').to_owned();
        let listed = listed.iter().map(|o| ((path_of(o.domain), o.node.get()), o.frames.0));
        assert_eq!(listed.collect::<BTreeMap<_, _>>(), self.outside(path), "R5: all that lies outside is listed");
    }

    fn admit(&mut self, at: Index, asked: Option<Set>) {
        let (path, domain) = self.pick(at);
        let request = Request { policy: policy(asked.as_ref()), ..Request::of(domain) };
        if let Ok(pass) = self.mm.registry().admit(&request) {
            self.passes.push((pass, path, asked));
        }
    }

    fn alloc(&mut self, at: Index, order: u8) {
        if self.passes.is_empty() {
            return;
        }
        let at = at.index(self.passes.len());
        let (pass, path, _) = &mut self.passes[at];
        if let Ok(block) = self.mm.alloc_with(pass, Order::new(order).unwrap()) {
            let path = path.clone();
            assert!(self.effective(&path).contains(&block.node().get()), "R6");
            self.blocks.push((block, path));
        }
    }

    fn check(&mut self) {
        let registry = self.mm.registry();
        let sysram = self.of_type(NodeType::Sysram);
        for path in self.domains.keys() {
            let domain = registry.find_domain(path).unwrap();
            let (effective, default) = (self.effective(path), self.default_mask(path));
            assert_eq!(registry.effective(domain), Some(&mask(&effective)));
            assert_eq!(registry.default_mask(domain), Some(&mask(&default)));
            assert!(default.is_subset(&effective) && default.is_subset(&sysram), "R4");
            if let Some(parent) = registry.parent(domain) {
                assert!(registry.effective(domain).unwrap().is_subset(registry.effective(parent).unwrap()), "R4");
            }
            for &node in self.nodes.keys() {
                let used = self.blocks.iter().filter(|(block, of)| of == path && block.node() == id(node));
                let used = used.map(|(block, _)| block.order().frames().0).sum();
                assert_eq!(registry.used_by(domain, id(node)), FrameCount(used));
                let limiting = registry.limiting_domain(domain, id(node));
                assert_eq!(limiting.is_some(), !effective.contains(&node));
                let above = limiting.and_then(|limiting| registry.parent(limiting));
                assert!(above.is_none_or(|above| registry.effective(above).unwrap().contains(id(node))), "R11");
            }
        }
        let effective: BTreeMap<_, _> =
            self.domains.keys().map(|path| (path.clone(), self.effective(path))).collect();
        for (pass, path, asked) in &mut self.passes {
            let domain = registry.find_domain(path).unwrap();
            let fresh = registry.admit(&Request { policy: policy(asked.as_ref()), ..Request::of(domain) });
            let kept = pass.allowed(registry).copied();
            // Ordinary nodes that went are stood in for, as Linux does it.
            let stands_in = kept.is_ok() && kept.ok() == Some(mask(&(&effective[path] & &sysram)));
            let is_same = kept == fresh.as_ref().map(|pass| *pass.mask()).map_err(|refusal| *refusal);
            assert!(is_same || stands_in && fresh.is_err(), "a pass that is kept answers as a new one");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn masks_follow_the_tree_and_the_nodes_whatever_is_changed_in_whatever_order(
        ops in prop::collection::vec(op(), 0..80),
    ) {
        let mut model = Model::new();
        for op in ops {
            match op {
                Op::Register(node, is_spm) => model.register(node, is_spm),
                Op::Unregister(node) => model.unregister(node),
                Op::Create(at, name) => model.create(at, name),
                Op::Remove(at) => model.remove(at),
                Op::Mems(at, mems) => model.set_mems(at, mems),
                Op::Sysram(at, mems) => {
                    let (path, domain) = model.pick(at);
                    model.mm.registry_mut().set_mems_sysram(domain, mask(&mems)).unwrap();
                    model.domains.get_mut(&path).unwrap().mems_sysram = mems;
                }
                Op::Admit(at, asked) => model.admit(at, asked),
                Op::Alloc(at, order) => model.alloc(at, order),
                Op::Free(at) if !model.blocks.is_empty() => {
                    let at = at.index(model.blocks.len());
                    model.mm.free(model.blocks.swap_remove(at).0).unwrap();
                }
                Op::Free(_) => {}
            }
            model.check();
        }
    }
}

#[test]
fn names_that_no_path_can_hold_are_refused() {
    let mut mm = MemoryManager::new();
    for name in ["", ".", "..", "a/b", "a\nb", &"x".repeat(MAX_NAME + 1)] {
        let error = mm.registry_mut().create_domain(DomainId::ROOT, name).unwrap_err();
        assert_eq!(error, DomainError::BadName, "{name}");
    }
}

#[test]
fn depth_and_number_of_domains_have_limits() {
    let mut mm = MemoryManager::new();
    let registry = mm.registry_mut();
    let mut at = DomainId::ROOT;
    for _ in 0..MAX_DEPTH {
        at = registry.create_domain(at, "below").unwrap();
    }
    assert_eq!(registry.create_domain(at, "below"), Err(DomainError::TooDeep));
    let mut at = registry.create_domain(DomainId::ROOT, "wide").unwrap();
    let mut made = (0..).map(|number| match number % 200 {
        0 => registry.create_domain(DomainId::ROOT, &format!("wide{number}")).inspect(|&domain| at = domain),
        _ => registry.create_domain(at, &number.to_string()),
    });
    assert_eq!(made.find_map(Result::err), Some(DomainError::TooMany));
    assert_eq!(registry.domains().count(), usize::from(MAX_DOMAINS));
}

#[test]
fn a_pass_of_a_removed_domain_is_none_of_the_one_that_has_its_number_now() {
    let mut mm = MemoryManager::new();
    for node in [0, 1] {
        let (node_type, class, services) = (NodeType::Sysram, Class::Plain, Services::empty());
        let spec = NodeSpec { node_type, class, services, guard: Guard::Hard, owner: "test".into() };
        let owner = mm.registry_mut().register(id(node), spec.clone()).unwrap().owner;
        let lent = Metadata::from_heap(FrameCount(FRAMES)).unwrap();
        mm.registry_mut().add_range(&owner, &spec, FrameCount(FRAMES), lent, Initial::Zero).unwrap();
    }
    let old = mm.registry_mut().create_domain(DomainId::ROOT, "old").unwrap();
    let mut pass = mm.registry().admit(&Request::of(old)).unwrap();
    mm.registry_mut().remove_domain(old).unwrap();
    let new = mm.registry_mut().create_domain(DomainId::ROOT, "new").unwrap();
    assert_eq!(new, old, "the number is used again");
    let gone = AllocError::Refused(Refusal { node: None, reason: Reason::UnknownDomain { domain: old } });
    assert_eq!(mm.alloc_with(&mut pass, Order::ZERO), Err(gone));
    assert_eq!(mm.registry().used_by(new, NodeId::ZERO), FrameCount(0));
}

/// A domain that names a node which is to come has its parent's nodes until then, and its pages lie there.
#[test]
fn a_node_that_comes_narrows_who_waited_for_it_and_what_lies_outside_is_listed_and_can_move_inside() {
    let mut mm = MemoryManager::new();
    let add = |mm: &mut MemoryManager, node| {
        let (node_type, class, services) = (NodeType::Sysram, Class::Plain, Services::MIGRATION);
        let spec = NodeSpec { node_type, class, services, guard: Guard::Hard, owner: "test".into() };
        let Registered { owner, outside } = mm.registry_mut().register(id(node), spec.clone()).unwrap();
        let lent = Metadata::from_heap(FrameCount(FRAMES)).unwrap();
        mm.registry_mut().add_range(&owner, &spec, FrameCount(FRAMES), lent, Initial::Zero).unwrap();
        outside
    };
    assert!(add(&mut mm, 0).is_empty() && add(&mut mm, 1).is_empty());
    let waiting = mm.registry_mut().create_domain(DomainId::ROOT, "waiting").unwrap();
    let below = mm.registry_mut().create_domain(waiting, "below").unwrap();
    let content = mm.registry_mut().create_domain(DomainId::ROOT, "content").unwrap();
    assert_eq!(mm.registry_mut().set_mems(waiting, id(2).into()), Ok(Vec::new()));
    let mut alloc = |domain, order| {
        let request = Request { mobility: Mobility::Movable, ..Request::of(domain) };
        mm.alloc(&request, Order::new(order).unwrap()).unwrap()
    };
    let blocks = [alloc(waiting, 0), alloc(below, 3)];
    let theirs = alloc(content, 0);

    let mut outside = add(&mut mm, 2);
    outside.sort_by_key(|outside| outside.domain.get());
    let expected = [(waiting, 1), (below, 8)];
    let expected =
        expected.map(|(domain, frames)| Outside { domain, node: NodeId::ZERO, frames: FrameCount(frames) });
    assert_eq!(outside, expected, "R5");
    for old in blocks {
        let isolated = mm.take(&old, Mover::Manager).unwrap();
        let planned = mm.plan_evacuation(isolated, &NodeMask::ALL, &[]).unwrap();
        assert_eq!(mm.complete(planned, old).unwrap().node(), id(2));
    }
    assert_eq!(mm.registry().outside(DomainId::ROOT).count(), 0, "the change is done");
    assert_eq!((theirs.node(), mm.registry().used_by(content, NodeId::ZERO)), (NodeId::ZERO, FrameCount(1)));
}
