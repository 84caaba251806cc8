//! R4, R6-R11: the wall and the manager behind it against sets.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use proptest::prelude::*;
use spmem_core::frames::Metadata;
use spmem_core::grant::{Grant, GrantError, Rights, Terms};
use spmem_core::migrate::{Mover, Stay};
use spmem_core::mm::{AllocError, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::{Flags, Mode, Policy};
use spmem_core::tier::DRAM;
use spmem_core::units::{Bytes, DomainId, FrameCount, NodeId, Order};
use spmem_core::wall::{MAX_SHOWN, Mobility, Reason, Refusal, Request, Reserve};
use spmem_core::watermark::Watermarks;
use spmem_core::zero::Initial;

fn lent(frames: u64) -> Metadata {
    Metadata::from_heap(FrameCount(frames)).unwrap()
}

type Set = BTreeSet<u16>;

const NODES: u16 = 8;

fn id(node: u16) -> NodeId {
    NodeId::new(node).unwrap()
}

fn mask(set: &Set) -> NodeMask {
    set.iter().map(|&node| id(node)).collect()
}

fn set() -> impl Strategy<Value = Set> {
    prop::collection::btree_set(0..NODES, 0..usize::from(NODES))
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![
        3 => Just(Mode::Bind),
        1 => Just(Mode::Preferred),
        1 => Just(Mode::PreferredMany),
        1 => Just(Mode::Interleave),
        1 => Just(Mode::WeightedInterleave),
    ]
}

/// A machine and a request on it, as plain sets.
#[derive(Clone, Debug)]
struct World {
    sysram: Set,
    hard: Set,
    easy: Set,
    /// The masks of the root, of its child and so on, down to where the request comes from.
    levels: Vec<(Set, Set)>,
    has_domain: bool,
    asked: Option<Set>,
    mode: Mode,
    /// Nodes asked for and rights; SPM nodes only are granted.
    grants: Vec<(Set, Rights)>,
}

fn world() -> impl Strategy<Value = World> {
    let kinds = prop::collection::vec(0u8..4, usize::from(NODES));
    let grants = prop::collection::vec((set(), (0u8..64).prop_map(Rights::from_bits_truncate)), 0..3);
    let level = || (set(), prop_oneof![Just(Set::new()), set()]);
    let domain = (prop::collection::vec(level(), 1..5), prop::bool::weighted(0.9));
    (kinds, domain, prop::option::weighted(0.8, set()), mode(), grants).prop_map(
        |(kinds, (levels, has_domain), asked, mode, grants)| {
            let of = |kind| (0u16..).zip(&kinds).filter(|(_, k)| **k == kind).map(|(n, _)| n).collect();
            World { sysram: of(1), hard: of(2), easy: of(3), levels, has_domain, asked, mode, grants }
        },
    )
}

impl World {
    fn spm(&self) -> Set {
        &self.hard | &self.easy
    }

    /// R4: from the top down.
    fn effective(&self) -> Set {
        self.levels.iter().fold(&self.sysram | &self.spm(), |above, (mems, _)| {
            let limited = mems & &above;
            if limited.is_empty() { above } else { limited }
        })
    }

    fn default(&self) -> Set {
        let plain = &self.effective() & &self.sysram;
        let (_, mems_sysram) = self.levels.last().unwrap();
        if mems_sysram.is_empty() { plain } else { &plain & mems_sysram }
    }

    /// The nodes that are named and open: R6, R7, R9 as DESIGN writes them.
    fn named(&self) -> Set {
        let asked = self.asked.clone().unwrap_or_default();
        if !self.has_domain {
            return &asked & &self.sysram;
        }
        let mut open = self.sysram.clone();
        for (nodes, rights) in &self.grants {
            if rights.contains(Rights::ALLOC) {
                open.extend(nodes & &self.spm());
            }
        }
        if self.mode == Mode::Bind {
            open.extend(&self.easy);
        }
        let named = &(&asked & &self.effective()) & &open;
        if self.mode == Mode::Preferred { named.into_iter().take(1).collect() } else { named }
    }

    /// The named ones and what they fall back to (R10).
    fn allowed(&self) -> Set {
        let default = if self.has_domain { self.default() } else { self.sysram.clone() };
        if self.asked.as_ref().is_none_or(Set::is_empty) && !(self.asked.is_some() && self.mode == Mode::Bind) {
            return default;
        }
        let named = self.named();
        let falls_back = match self.mode {
            Mode::Bind => false,
            Mode::Interleave | Mode::WeightedInterleave => !named.is_disjoint(&self.sysram),
            _ => true,
        };
        if falls_back && !named.is_empty() { &named | &default } else { named }
    }

    fn policy(&self) -> Policy {
        let Some(asked) = &self.asked else { return Policy::DEFAULT };
        // Naming no node is an error of its own (policy.rs); here it is asking for nothing, or for the default.
        match Policy::new(self.mode, Flags::empty(), mask(asked)) {
            Ok(policy) => policy,
            Err(_) if self.mode == Mode::Bind => Policy::bind(NodeMask::EMPTY),
            Err(_) => Policy::DEFAULT,
        }
    }

    fn build(&self, frames: u64) -> (MemoryManager, Vec<Owner>, Vec<Grant>) {
        let mut mm = MemoryManager::new();
        let mut owners = Vec::new();
        for node in &self.sysram | &self.spm() {
            let spec = NodeSpec {
                node_type: if self.sysram.contains(&node) { NodeType::Sysram } else { NodeType::Spm },
                class: Class::Plain,
                services: Services::USER_NUMA,
                guard: if self.easy.contains(&node) { Guard::Easy } else { Guard::Hard },
                owner: "test".into(),
            };
            let owner = mm.registry_mut().register(id(node), spec.clone()).unwrap().owner;
            if frames > 0 {
                mm.registry_mut()
                    .add_range(&owner, &spec, FrameCount(frames), lent(frames), Initial::Zero)
                    .unwrap();
            }
            owners.push(owner);
        }
        let spm = mask(&self.spm());
        let mut grants = Vec::new();
        for (nodes, rights) in &self.grants {
            let named = mask(nodes).intersection(&spm);
            let shown: Vec<&Owner> = owners.iter().filter(|owner| named.contains(owner.node())).collect();
            if !shown.is_empty() {
                grants.push(mm.registry_mut().grant(&shown, Terms::new(*rights, Bytes::mib(1 << 20))).unwrap());
            }
        }
        let mut domain = None;
        for (level, (mems, mems_sysram)) in self.levels.iter().enumerate() {
            let here = match domain {
                None => DomainId::ROOT,
                Some(above) => mm.registry_mut().create_domain(above, &level.to_string()).unwrap(),
            };
            mm.registry_mut().set_mems_sysram(here, mask(mems_sysram)).unwrap();
            assert!(mm.registry_mut().set_mems(here, mask(mems)).unwrap().is_empty(), "nothing is in use");
            assert_eq!(here.index(), level);
            domain = Some(here);
        }
        (mm, owners, grants)
    }

    fn domain(&self) -> DomainId {
        DomainId::new(u16::try_from(self.levels.len() - 1).unwrap()).unwrap()
    }

    fn request<'a>(&self, grants: &'a [&'a Grant]) -> Request<'a> {
        Request {
            policy: self.policy(),
            local: None,
            domain: self.has_domain.then_some(self.domain()),
            grants,
            reserve: Reserve::Keep,
            mobility: Mobility::Unmovable,
        }
    }

    /// Does what a refusal advises.
    fn follow(&mut self, node: Option<u16>, reason: Reason) {
        match (reason, node) {
            (Reason::NothingAsked, _) => self.asked = None,
            (Reason::NoDefault { domain: None }, _) => drop(self.sysram.insert(NODES)),
            (Reason::NoDefault { domain: Some(domain) }, _) => {
                // What is above has some.
                let reach = World { levels: self.levels[..domain.index()].to_vec(), ..self.clone() }.effective();
                let own = World { levels: self.levels[..=domain.index()].to_vec(), ..self.clone() }.effective();
                let own = &own & &self.sysram;
                let node = *own.first().or((&reach & &self.sysram).first()).unwrap();
                let (mems, mems_sysram) = &mut self.levels[domain.index()];
                if own.is_empty() {
                    mems.insert(node);
                }
                if !mems_sysram.is_empty() {
                    mems_sysram.insert(node);
                }
            }
            (Reason::Absent, Some(node)) => drop(self.sysram.insert(node)),
            (Reason::NoDomain, _) => self.has_domain = true,
            (Reason::OutsideDomain { domain }, Some(node)) => drop(self.levels[domain.index()].0.insert(node)),
            (Reason::NeedsGrant { guard: Guard::Easy, .. }, _) => self.mode = Mode::Bind,
            (Reason::NeedsGrant { .. } | Reason::LacksRight { .. }, Some(node)) => {
                self.grants.push((Set::from([node]), Rights::ALLOC));
            }
            (reason, node) => panic!("{reason:?} {node:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn allowed_is_what_the_rules_say_in_sets(world in world()) {
        let (mm, _owners, grants) = world.build(0);
        let grants = grants.iter().collect::<Vec<_>>();
        let expected = mask(&world.allowed());
        match mm.registry().admit(&world.request(&grants)) {
            Ok(pass) => prop_assert_eq!(*pass.mask(), expected),
            Err(refusal) => {
                prop_assert!(expected.is_empty(), "{} but {} is allowed", refusal, expected);
                let first = world.policy().nodes().first();
                prop_assert_eq!(refusal.node, first);
            }
        }
        prop_assert_eq!(Some(&mask(&world.effective())), mm.registry().effective(world.domain()));
        prop_assert_eq!(Some(&mask(&world.default())), mm.registry().default_mask(world.domain()));
    }

    #[test]
    fn following_the_advice_of_refusals_opens_the_node(mut world in world()) {
        for _ in 0..10 {
            let (mm, _owners, grants) = world.build(0);
            let grants = grants.iter().collect::<Vec<_>>();
            match mm.registry().admit(&world.request(&grants)) {
                Ok(_) => return Ok(()),
                Err(refusal) => {
                    prop_assert!(refusal.to_string().len() > 20);
                    world.follow(refusal.node.map(NodeId::get), refusal.reason);
                }
            }
        }
        prop_assert!(false, "still refused: {:?}", world);
    }

    #[test]
    fn allocation_never_leaves_the_allowed_set_and_exhaustion_is_an_error(
        world in world(), orders in prop::collection::vec(0u8..=6, 1..60),
    ) {
        let (mut mm, _owners, grants) = world.build(64);
        let grants = grants.iter().collect::<Vec<_>>();
        let (request, allowed) = (world.request(&grants), mask(&world.allowed()));
        let mut blocks = Vec::new();
        for order in orders {
            let order = Order::new(order).unwrap();
            match mm.alloc(&request, order) {
                Ok(block) => {
                    prop_assert!(allowed.contains(block.node()), "R6");
                    blocks.push(block);
                }
                Err(AllocError::Refused(_)) => prop_assert!(allowed.is_empty(), "R8"),
                Err(AllocError::Exhausted { node, .. }) => {
                    prop_assert!(allowed.contains(node));
                    let fits = |n: NodeId| mm.registry().frames(n).unwrap().largest_free() >= Some(order);
                    prop_assert!(!allowed.iter().any(fits), "R10: no error while one allowed node has room");
                }
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
        blocks.into_iter().for_each(|block| mm.free(block).unwrap());
        for node in mm.registry().present() {
            prop_assert_eq!(mm.stats(node).unwrap().used, FrameCount(0));
        }
    }
}

fn two_nodes() -> World {
    World {
        sysram: Set::from([0]),
        hard: Set::from([1]),
        easy: Set::new(),
        levels: vec![(Set::new(), Set::new())],
        has_domain: true,
        asked: Some(Set::from([1])),
        mode: Mode::Bind,
        grants: vec![(Set::from([1]), Rights::ALLOC)],
    }
}

#[test]
fn a_full_spm_node_never_spills_into_sysram() {
    let world = two_nodes();
    let (mut mm, _owners, grants) = world.build(64);
    let grants = [&grants[0]];
    let request = world.request(&grants);
    let blocks: Vec<_> = std::iter::from_fn(|| mm.alloc(&request, Order::ZERO).ok()).collect();
    assert_eq!(blocks.len(), 64);
    assert!(matches!(mm.alloc(&request, Order::ZERO), Err(AllocError::Exhausted { node, .. }) if node == id(1)));
    assert_eq!(mm.stats(id(0)).unwrap().used, FrameCount(0));
}

#[test]
fn the_reserve_is_for_requests_that_may_use_it() {
    let world = World { asked: None, ..two_nodes() };
    let (mut mm, owners, _grants) = world.build(64);
    let marks = Watermarks::new(FrameCount(10), FrameCount(20), FrameCount(30)).unwrap();
    mm.registry_mut().set_watermarks(&owners[0], marks).unwrap();
    let request = world.request(&[]);
    let blocks: Vec<_> = std::iter::from_fn(|| mm.alloc(&request, Order::ZERO).ok()).collect();
    assert_eq!(blocks.len(), 54);
    assert!(matches!(mm.alloc(&request, Order::ZERO), Err(AllocError::ReserveOnly { free: FrameCount(10), .. })));
    assert!(mm.alloc(&Request { reserve: Reserve::Use, ..request }, Order::ZERO).is_ok());
}

#[test]
fn interleaving_takes_the_allowed_nodes_in_turn() {
    let world = World {
        sysram: Set::from([0, 2, 5]),
        asked: Some(Set::from([0, 1, 2, 5])),
        mode: Mode::Interleave,
        grants: Vec::new(),
        ..two_nodes()
    };
    let (mut mm, ..) = world.build(64);
    let request = world.request(&[]);
    let mut pass = mm.registry().admit(&request).unwrap();
    let nodes: Vec<_> = (0..5).map(|_| mm.alloc_with(&mut pass, Order::ZERO).unwrap().node().get()).collect();
    assert_eq!(nodes, [0, 2, 5, 0, 2]);
}

#[test]
fn turns_over_spm_nodes_alone_never_end_on_sysram() {
    let world = World {
        hard: Set::from([1, 2]),
        asked: Some(Set::from([1, 2])),
        mode: Mode::Interleave,
        grants: vec![(Set::from([1, 2]), Rights::ALLOC)],
        ..two_nodes()
    };
    let (mut mm, _owners, grants) = world.build(2);
    let shown: Vec<_> = grants.iter().collect();
    let mut pass = mm.registry().admit(&world.request(&shown)).unwrap();
    let blocks = std::iter::from_fn(|| mm.alloc_with(&mut pass, Order::ZERO).ok());
    assert_eq!(blocks.map(|block| block.node().get()).collect::<Vec<_>>(), [1, 2, 1, 2], "R10");
}

#[test]
fn a_block_of_another_manager_comes_back_untouched() {
    let world = World { asked: None, ..two_nodes() };
    let ((mut mine, ..), (mut theirs, ..)) = (world.build(64), world.build(64));
    let block = mine.alloc(&world.request(&[]), Order::ZERO).unwrap();
    let spmem_core::mm::FreeError::Foreign(block) = theirs.free(block).unwrap_err() else {
        panic!("it is foreign")
    };
    mine.free(block).unwrap();
    assert_eq!(theirs.stats(id(0)).unwrap().used, FrameCount(0));
}

#[test]
fn more_grants_than_can_be_shown_are_refused_in_words() {
    let world = two_nodes();
    let (mm, _owners, grants) = world.build(0);
    let shown = [&grants[0]; MAX_SHOWN + 1];
    let refusal = mm.registry().admit(&world.request(&shown)).unwrap_err();
    let reason = Reason::TooManyGrants { shown: MAX_SHOWN + 1 };
    assert_eq!(refusal, Refusal { node: Some(id(1)), reason });
    // Relative numbers are not those of nodes.
    let policy = Policy::new(Mode::Bind, Flags::RELATIVE_NODES, NodeMask::of(id(1))).unwrap();
    let counted = Request { policy, ..world.request(&shown) };
    assert_eq!(mm.registry().admit(&counted).unwrap_err(), Refusal { node: None, reason });
}

#[test]
fn what_a_node_among_others_is_kept_for_is_said_of_the_whole_request() {
    // Node 0 is sysram, 1 SPM with a hard guard, 2 SPM with an easy one.
    let world = World { hard: Set::from([1]), easy: Set::from([2]), sysram: Set::from([0]), ..two_nodes() };
    let (mm, _owners, grants) = world.build(0);
    let shown = [&grants[0]];
    let registry = mm.registry();
    let ask = |mode, flags, nodes: &[u16], node, grants| {
        let nodes = nodes.iter().map(|&node| id(node)).collect();
        let policy = Policy::new(mode, flags, nodes).unwrap();
        registry.obstacle(&Request { policy, grants, ..Request::of(DomainId::ROOT) }, id(node))
    };
    let reason = |mode, flags, nodes: &[u16], node, grants| {
        let refusal = ask(mode, flags, nodes, node, grants).unwrap();
        assert_eq!(refusal.node, Some(id(node)));
        refusal.reason
    };
    let (none, relative) = (Flags::empty(), Flags::RELATIVE_NODES);
    // Relative numbers lead to no SPM node, granted or easy.
    assert_eq!(reason(Mode::Bind, relative, &[1], 1, &shown), Reason::Counted { is_spm: true });
    assert_eq!(reason(Mode::Bind, relative, &[2], 2, &[]), Reason::Counted { is_spm: true });
    // Preferred is the first that may be used, granted or not.
    assert_eq!(reason(Mode::Preferred, none, &[0, 1], 1, &shown), Reason::NotFirst { first: id(0) });
    assert_eq!(reason(Mode::Preferred, none, &[0, 1], 1, &[]), Reason::NotFirst { first: id(0) });
    assert!(
        matches!(reason(Mode::Preferred, none, &[1, 2], 2, &shown), Reason::NotFirst { first } if first == id(1))
    );
    assert_eq!(reason(Mode::Preferred, none, &[0, 5], 5, &[]), Reason::Absent);
    assert_eq!(ask(Mode::Bind, none, &[0, 1], 1, &shown[..]), None);
    assert_eq!(ask(Mode::Bind, none, &[0, 2], 2, &[]), None);
    assert_eq!(reason(Mode::Bind, none, &[0], 1, &shown), Reason::NotNamed);
    assert_eq!(reason(Mode::Default, none, &[], 1, &shown), Reason::NotDefault { is_spm: true });
    assert!(matches!(reason(Mode::Bind, none, &[0], 1, &[]), Reason::NeedsGrant { .. }));
}

#[test]
fn a_pass_ends_with_what_opened_it() {
    let world = two_nodes();
    let (mut mm, owners, grants) = world.build(64);
    let shown = [&grants[0]];
    let mut pass = mm.registry().admit(&world.request(&shown)).unwrap();
    let block = mm.alloc_with(&mut pass, Order::ZERO).unwrap();
    let held = mm.registry_mut().revoke(&owners[1], grants[0].id()).unwrap();
    assert_eq!(held.iter().map(|held| held.bytes.0).sum::<u64>(), 4096, "R13");
    assert!(matches!(mm.alloc_with(&mut pass, Order::ZERO), Err(AllocError::Refused(_))), "R12");
    mm.free(block).unwrap();
    assert!(mm.registry().held(grants[0].id()).unwrap().is_empty());
}

#[test]
fn a_grant_whose_quota_is_used_up_does_not_close_an_easy_node_to_strict_bind() {
    let one_page = Terms::new(Rights::ALLOC, Bytes(4096));
    for (mode, is_open) in [(Mode::Bind, true), (Mode::PreferredMany, false), (Mode::Interleave, false)] {
        let world = World {
            hard: Set::new(),
            easy: Set::from([1]),
            sysram: Set::new(),
            mode,
            grants: vec![],
            ..two_nodes()
        };
        let (mut mm, owners, _) = world.build(64);
        let grant = mm.registry_mut().grant(&[&owners[0]], one_page).unwrap();
        let shown = [&grant];
        let request = world.request(&shown);
        let charged = mm.alloc(&request, Order::ZERO).unwrap();
        assert_eq!(mm.registry().grant_info(&grant).unwrap().used, Bytes(4096), "it pays while it can");
        let second = mm.alloc(&request, Order::ZERO);
        assert_eq!(mm.registry().grant_info(&grant).unwrap().used, Bytes(4096), "R12");
        assert_eq!(second.is_ok(), is_open, "R9: {mode}");
        if let Err(error) = &second {
            let cause = GrantError::OverQuota { wanted: Bytes(4096), left: Bytes(0) };
            assert_eq!(*error, AllocError::Grant { node: id(1), cause }, "{mode}");
        }
        second.into_iter().chain([charged]).for_each(|block| mm.free(block).unwrap());
        assert_eq!(
            mm.registry().grant_info(&grant).unwrap().used,
            Bytes(0),
            "who was not charged regains nothing"
        );
    }
}

#[test]
fn a_demotion_to_an_easy_node_needs_quota_all_the_same() {
    let mut mm = MemoryManager::new();
    let services = Services::all();
    let mut owners = Vec::new();
    for (node, node_type) in [(0, NodeType::Sysram), (1, NodeType::Spm)] {
        let (class, guard) = (Class::Plain, Guard::Easy);
        let spec = NodeSpec { node_type, class, services, guard, owner: "test".into() };
        let owner = mm.registry_mut().register(id(node), spec.clone()).unwrap().owner;
        mm.registry_mut().add_range(&owner, &spec, FrameCount(64), lent(64), Initial::Zero).unwrap();
        mm.registry_mut().set_abstract_distance(id(node), DRAM * (1 + u64::from(node))).unwrap();
        owners.push(owner);
    }
    let terms = Terms::new(Rights::DEMOTE_TO, Bytes(4096));
    let grant = mm.registry_mut().grant(&[&owners[1]], terms).unwrap();
    let request = Request { mobility: Mobility::Movable, ..Request::of(DomainId::ROOT) };
    let mut demote = || {
        let block = mm.alloc(&request, Order::ZERO).unwrap();
        let isolated = mm.take(&block, Mover::Holder(&[])).unwrap();
        let moved = mm.plan_demotion(isolated, &[&grant]);
        moved.map(|moved| mm.complete(moved, block).unwrap().node())
    };
    assert_eq!(demote(), Ok(id(1)));
    let cause = GrantError::OverQuota { wanted: Bytes(4096), left: Bytes(0) };
    assert_eq!(demote(), Err(Stay::NoRoom { cause: AllocError::Grant { node: id(1), cause } }), "R14");
}

#[test]
fn a_grant_that_has_ended_does_not_close_an_easy_node() {
    let world = World { hard: Set::new(), easy: Set::from([1]), ..two_nodes() };
    let (mut mm, owners, grants) = world.build(64);
    mm.registry_mut().revoke(&owners[1], grants[0].id()).unwrap();
    let shown = [&grants[0]];
    let block = mm.alloc(&world.request(&shown), Order::ZERO).unwrap();
    assert_eq!(block.node(), id(1), "R9: strict bind opens it");
    mm.free(block).unwrap();
}

#[test]
fn a_policy_that_lost_its_grant_is_told_so_and_not_of_sysram_that_it_never_meant() {
    let world = World {
        levels: vec![(Set::new(), Set::new()), (Set::from([1, 2]), Set::new())],
        sysram: Set::from([0, 2]),
        asked: Some(Set::from([0, 1])),
        ..two_nodes()
    };
    let (mut mm, owners, grants) = world.build(64);
    let shown = [&grants[0]];
    // Node 0 is out of reach when the policy is set, so it means node 1 alone.
    let mut pass = mm.registry().admit(&world.request(&shown)).unwrap();
    assert_eq!(pass.mask(), &NodeMask::of(id(1)));
    mm.registry_mut().set_mems(world.domain(), mask(&Set::from([0, 1]))).unwrap();
    mm.registry_mut().revoke(&owners[1], grants[0].id()).unwrap();
    let reason = Reason::BadGrant { cause: GrantError::Revoked };
    assert_eq!(pass.allowed(mm.registry()), Err(Refusal { node: Some(id(1)), reason }));
}
