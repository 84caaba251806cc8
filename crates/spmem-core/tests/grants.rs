//! R12, R13: grants against a model that adds everything up anew.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use spmem_core::frames::Metadata;
use spmem_core::grant::{Charge, Grant, GrantError, Rights, Terms, Wider};
use spmem_core::mm::{AllocError, Block, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::units::{Bytes, DomainId, FrameCount, NodeId, Order, Time};
use spmem_core::wall::Request;
use spmem_core::zero::Initial;

fn lent(frames: u64) -> Metadata {
    Metadata::from_heap(FrameCount(frames)).unwrap()
}

const NODES: u16 = 3;
const FRAMES: u64 = 1024;

/// A grant as the model knows it. Entries are never removed; children name their parent by position.
#[derive(Debug)]
struct Known {
    /// `None` once given back.
    value: Option<Grant>,
    parent: Option<usize>,
    nodes: NodeMask,
    rights: Rights,
    quota: u64,
    expires: u64,
    is_revoked: bool,
}

#[derive(Debug)]
enum Use {
    Block(Block),
    Charge(Charge),
}

#[derive(Debug)]
struct Held {
    grant: usize,
    bytes: u64,
    what: Use,
}

struct Model {
    mm: MemoryManager,
    owners: Vec<Owner>,
    grants: Vec<Known>,
    held: Vec<Held>,
    now: u64,
}

#[derive(Clone, Debug)]
enum Op {
    Grant(Vec<u16>, Terms),
    Narrow(prop::sample::Index, Vec<u16>, Terms),
    HandOn(prop::sample::Index),
    Advance(u64),
    Alloc(prop::sample::Index, u16, u8),
    Charge(prop::sample::Index, u64),
    GiveBack(prop::sample::Index),
    Revoke(prop::sample::Index, u16),
    Release(prop::sample::Index),
}

fn op() -> impl Strategy<Value = Op> {
    let at = any::<prop::sample::Index>;
    let nodes = || prop::collection::vec(0..NODES, 0..3);
    prop_oneof![
        1 => (nodes(), terms()).prop_map(|(n, t)| Op::Grant(n, t)),
        2 => (at(), nodes(), terms()).prop_map(|(g, n, t)| Op::Narrow(g, n, t)),
        1 => at().prop_map(Op::HandOn),
        1 => (0u64..100).prop_map(Op::Advance),
        4 => (at(), 0..NODES, 0u8..4).prop_map(|(g, n, o)| Op::Alloc(g, n, o)),
        2 => (at(), 0u64..20_000).prop_map(|(g, b)| Op::Charge(g, b)),
        3 => at().prop_map(Op::GiveBack),
        1 => (at(), 0..NODES).prop_map(|(g, n)| Op::Revoke(g, n)),
        1 => at().prop_map(Op::Release),
    ]
}

fn mask(nodes: &[u16]) -> NodeMask {
    nodes.iter().map(|&node| NodeId::new(node).unwrap()).collect()
}

fn terms() -> impl Strategy<Value = Terms> {
    let rights = prop_oneof![Just(63u8), 0u8..64].prop_map(Rights::from_bits_truncate);
    let expires = prop_oneof![Just(u64::MAX), 0u64..1000];
    (rights, 0u64..200_000, expires)
        .prop_map(|(rights, quota, expires)| Terms::new(rights, Bytes(quota)).until(Time(expires)))
}

fn all(quota: u64) -> Terms {
    Terms::new(Rights::all(), Bytes(quota))
}

impl Model {
    fn new() -> Self {
        let mut mm = MemoryManager::new();
        let spec = NodeSpec {
            node_type: NodeType::Spm,
            class: Class::Featured,
            services: Services::empty(),
            guard: Guard::Hard,
            owner: "test".into(),
        };
        let mut owners = Vec::new();
        for node in 0..NODES {
            let owner = mm.registry_mut().register(NodeId::new(node).unwrap(), spec.clone()).unwrap().owner;
            mm.registry_mut().add_range(&owner, &spec, FrameCount(FRAMES), lent(FRAMES), Initial::Zero).unwrap();
            owners.push(owner);
        }
        Self { mm, owners, grants: Vec::new(), held: Vec::new(), now: 0 }
    }

    fn is_within(&self, mut grant: usize, ancestor: usize) -> bool {
        loop {
            if grant == ancestor {
                return true;
            }
            match self.grants[grant].parent {
                Some(parent) => grant = parent,
                None => return false,
            }
        }
    }

    /// Everything in use under the grant, added up.
    fn used(&self, grant: usize) -> u64 {
        self.held.iter().filter(|held| self.is_within(held.grant, grant)).map(|held| held.bytes).sum()
    }

    /// What is left for the grant: the least over it and all it came from.
    fn left(&self, grant: usize) -> u64 {
        let chain = (0..self.grants.len()).filter(|&ancestor| self.is_within(grant, ancestor));
        chain.map(|ancestor| self.grants[ancestor].quota - self.used(ancestor)).min().unwrap()
    }

    fn pick(&self, at: prop::sample::Index) -> Option<usize> {
        let values: Vec<usize> = (0..self.grants.len()).filter(|&g| self.grants[g].value.is_some()).collect();
        (!values.is_empty()).then(|| values[at.index(values.len())])
    }

    /// Why the grant is good for nothing, if so.
    fn end(&self, grant: usize) -> Option<GrantError> {
        let known = &self.grants[grant];
        if known.is_revoked {
            Some(GrantError::Revoked)
        } else {
            (known.expires <= self.now).then_some(GrantError::Expired { at: Time(known.expires) })
        }
    }

    fn add(&mut self, value: Grant, parent: Option<usize>, nodes: &[u16], terms: Terms) {
        self.grants.push(Known {
            value: Some(value),
            parent,
            nodes: mask(nodes),
            rights: terms.rights,
            quota: terms.quota.0,
            expires: terms.expires.0,
            is_revoked: false,
        });
    }

    fn grant(&mut self, nodes: &[u16], terms: Terms) {
        let shown: Vec<&Owner> = nodes.iter().map(|&node| &self.owners[usize::from(node)]).collect();
        match self.mm.registry_mut().grant(&shown, terms) {
            Ok(value) => {
                assert!(terms.expires.0 > self.now);
                self.add(value, None, nodes, terms);
            }
            Err(GrantError::Expired { at }) => assert!(at == terms.expires && at.0 <= self.now),
            Err(error) => assert!(error == GrantError::NoNode && nodes.is_empty()),
        }
    }

    fn narrow(&mut self, from: usize, nodes: &[u16], terms: Terms) {
        let (known, end) = (&self.grants[from], self.end(from));
        let value = known.value.as_ref().unwrap();
        let is_narrower = mask(nodes).is_subset(&known.nodes)
            && known.rights.contains(terms.rights)
            && terms.quota.0 <= known.quota
            && terms.expires.0 <= known.expires;
        match self.mm.registry_mut().narrow(value, mask(nodes), terms) {
            Ok(value) => {
                assert!(is_narrower && end.is_none() && !nodes.is_empty() && terms.expires.0 > self.now);
                self.add(value, Some(from), nodes, terms);
            }
            Err(error @ GrantError::Revoked) => assert_eq!(end, Some(error)),
            Err(error @ GrantError::Expired { .. }) => {
                assert!(end == Some(error) || end.is_none() && terms.expires.0 <= self.now);
            }
            Err(GrantError::NoNode) => assert!(nodes.is_empty()),
            Err(GrantError::Widened(Wider::Node(node))) => {
                assert!(mask(nodes).contains(node) && !known.nodes.contains(node));
            }
            Err(GrantError::Widened(Wider::Expiry { expires })) => assert!(terms.expires > expires),
            Err(GrantError::Widened(_)) => assert!(!is_narrower),
            Err(error) => assert_eq!(error, GrantError::TooDeep),
        }
    }

    fn advance(&mut self, by: u64) {
        let live = |model: &Self, g| model.end(g).is_none() && model.grants[g].value.is_some();
        let before: Vec<usize> = (0..self.grants.len()).filter(|&g| live(self, g)).collect();
        self.now += by;
        let mut expired = self.mm.registry_mut().advance(Time(self.now)).to_vec();
        let ended = before.into_iter().filter(|&g| self.end(g).is_some());
        let mut ended: Vec<_> = ended.map(|g| self.grants[g].value.as_ref().unwrap().id()).collect();
        expired.sort();
        ended.sort();
        assert_eq!(expired, ended, "R12: what ends with the time is told");
    }

    fn alloc(&mut self, grant: usize, node: u16, order: u8) {
        let known = &self.grants[grant];
        let (shown, order) = ([known.value.as_ref().unwrap()], Order::new(order).unwrap());
        let node = NodeId::new(node).unwrap();
        let opens =
            self.end(grant).is_none() && known.nodes.contains(node) && known.rights.contains(Rights::ALLOC);
        let may = opens && order.bytes().0 <= self.left(grant);
        match self.mm.alloc(&Request::on(DomainId::ROOT, node, &shown), order) {
            Ok(block) => {
                assert!(may);
                self.held.push(Held { grant, bytes: block.bytes().0, what: Use::Block(block) });
            }
            Err(error) => assert!(!may, "{error}"),
        }
    }

    fn charge(&mut self, grant: usize, bytes: u64) {
        let known = &self.grants[grant];
        match self.mm.registry_mut().charge(known.value.as_ref().unwrap(), Bytes(bytes)) {
            Ok(charge) => {
                assert!(self.end(grant).is_none() && bytes <= self.left(grant));
                self.held.push(Held { grant, bytes, what: Use::Charge(charge) });
            }
            Err(GrantError::OverQuota { left, .. }) => {
                assert_eq!(left.0, self.left(grant));
                assert!(bytes > left.0);
            }
            Err(error) => assert_eq!(Some(error), self.end(grant)),
        }
    }

    fn give_back(&mut self, at: prop::sample::Index) {
        if self.held.is_empty() {
            return;
        }
        match self.held.swap_remove(at.index(self.held.len())).what {
            Use::Block(block) => self.mm.free(block).unwrap(),
            Use::Charge(charge) => self.mm.registry_mut().uncharge(charge).unwrap(),
        }
    }

    fn revoke(&mut self, grant: usize, node: u16) {
        let known = &self.grants[grant];
        let id = known.value.as_ref().unwrap().id();
        match self.mm.registry_mut().revoke(&self.owners[usize::from(node)], id) {
            Ok(held) => {
                assert_eq!(self.mm.registry().held(id).unwrap().len(), held.len(), "it can be asked again");
                assert!(!known.is_revoked && known.nodes.contains(NodeId::new(node).unwrap()));
                let listed: u64 = held.iter().map(|held| held.bytes.0).sum();
                assert_eq!(listed, self.used(grant), "R13: all that is held is listed");
                for at in 0..self.grants.len() {
                    self.grants[at].is_revoked |= self.is_within(at, grant);
                }
            }
            Err(GrantError::Revoked) => assert!(known.is_revoked),
            Err(error) => assert!(matches!(error, GrantError::NotOwner { .. })),
        }
    }

    fn release(&mut self, grant: usize) {
        let value = self.grants[grant].value.take().unwrap();
        let released = self.mm.registry_mut().release(value);
        assert_eq!(released.is_err(), self.grants[grant].is_revoked);
    }

    fn check(&self) {
        for (at, known) in self.grants.iter().enumerate() {
            let Some(value) = &known.value else { continue };
            match self.mm.registry().grant_info(value) {
                Ok(info) => {
                    assert!(self.end(at).is_none());
                    assert_eq!(info.used.0, self.used(at));
                    let terms = Terms::new(known.rights, Bytes(known.quota)).until(Time(known.expires));
                    assert_eq!((info.nodes, info.terms), (known.nodes, terms));
                    assert!(info.used <= info.terms.quota);
                }
                Err(error) => assert_eq!(Some(error), self.end(at)),
            }
        }
    }
}

proptest! {
    #[test]
    fn grants_are_never_widened_overdrawn_or_used_once_revoked_or_expired(ops in prop::collection::vec(op(), 0..150)) {
        let mut model = Model::new();
        for op in ops {
            match op {
                Op::Grant(nodes, terms) => model.grant(&nodes, terms),
                Op::Advance(by) => model.advance(by),
                Op::GiveBack(at) => model.give_back(at),
                Op::Narrow(at, nodes, terms) => {
                    model.pick(at).into_iter().for_each(|g| model.narrow(g, &nodes, terms));
                }
                Op::HandOn(at) => {
                    let whole = |known: &Known| (known.nodes.iter().map(NodeId::get).collect::<Vec<_>>(),
                        Terms::new(known.rights, Bytes(known.quota)).until(Time(known.expires)));
                    if let Some(grant) = model.pick(at) {
                        let (nodes, terms) = whole(&model.grants[grant]);
                        model.narrow(grant, &nodes, terms);
                    }
                }
                Op::Alloc(at, node, order) => {
                    model.pick(at).into_iter().for_each(|g| model.alloc(g, node, order));
                }
                Op::Charge(at, bytes) => model.pick(at).into_iter().for_each(|g| model.charge(g, bytes)),
                Op::Revoke(at, node) => model.pick(at).into_iter().for_each(|g| model.revoke(g, node)),
                Op::Release(at) => model.pick(at).into_iter().for_each(|g| model.release(g)),
            }
            model.check();
        }
    }
}

#[test]
fn grants_narrowed_from_one_share_its_quota_however_far_they_were_handed_on() {
    let mut model = Model::new();
    let registry = model.mm.registry_mut();
    let (quota, node) = (4 * 4096, NodeId::ZERO);
    let whole = registry.grant(&[&model.owners[0]], all(quota)).unwrap();
    let one = registry.narrow(&whole, node.into(), all(quota)).unwrap();
    let other = registry.narrow(&whole, node.into(), all(quota)).unwrap();
    let below = registry.narrow(&other, node.into(), all(quota)).unwrap();
    let of_one = registry.charge(&one, Bytes(3 * 4096)).unwrap();
    for grant in [&whole, &one, &other, &below] {
        let (wanted, left) = (Bytes(4097), Bytes(4096));
        assert_eq!(registry.charge(grant, wanted), Err(GrantError::OverQuota { wanted, left }));
    }
    let of_below = registry.charge(&below, Bytes(4096)).unwrap();
    assert_eq!(registry.grant_info(&whole).unwrap().used, Bytes(quota));
    let grants = [&whole, &one, &other, &below];
    let cause = GrantError::OverQuota { wanted: Bytes(4096), left: Bytes(0) };
    let refused = model.mm.alloc(&Request::on(DomainId::ROOT, node, &grants), Order::ZERO);
    assert_eq!(refused, Err(AllocError::Grant { node, cause }));
    let registry = model.mm.registry_mut();
    registry.uncharge(of_one).unwrap();
    registry.uncharge(of_below).unwrap();
    assert_eq!(registry.charge(&below, Bytes(quota)).map(|_| ()), Ok(()));
}

#[test]
fn a_grant_on_a_node_does_not_open_its_successor() {
    let mut model = Model::new();
    model.grant(&[1], all(100_000));
    let first = model.mm.registry().frames(NodeId::ONE).unwrap().ranges().next().unwrap().first;
    let owner = model.owners.remove(1);
    let spec = model.mm.registry().spec(NodeId::ONE).unwrap().clone();
    model.mm.registry_mut().remove_range(&owner, first).unwrap();
    model.mm.registry_mut().unregister(&owner).unwrap();
    let anew = model.mm.registry_mut().register(NodeId::ONE, spec.clone()).unwrap().owner;
    model.mm.registry_mut().add_range(&anew, &spec, FrameCount(8), lent(8), Initial::Zero).unwrap();
    let shown = [model.grants[0].value.as_ref().unwrap()];
    assert!(model.mm.alloc(&Request::on(DomainId::ROOT, NodeId::ONE, &shown), Order::ZERO).is_err());
}

#[test]
fn a_grant_of_another_registry_is_refused() {
    let (mut mine, mut theirs) = (Model::new(), Model::new());
    mine.grant(&[1], all(100_000));
    theirs.grant(&[1], all(100_000));
    let value = mine.grants[0].value.as_ref().unwrap();
    assert_eq!(theirs.mm.registry_mut().charge(value, Bytes(1)), Err(GrantError::Foreign));
    let shown = [value];
    assert!(theirs.mm.alloc(&Request::on(DomainId::ROOT, NodeId::ONE, &shown), Order::ZERO).is_err());
}

#[test]
fn a_grant_without_an_end_outlives_the_last_moment_that_can_be_told() {
    let mut model = Model::new();
    model.grant(&[1], all(100_000));
    assert_eq!(model.mm.registry_mut().advance(Time::NEVER), &[]);
    model.alloc(0, 1, 0);
    model.grant(&[1], all(100_000));
    model.alloc(1, 1, 0);
    assert_eq!(model.held.len(), 2);
}

#[test]
fn released_records_are_used_again() {
    let mut model = Model::new();
    for _ in 0..10_000 {
        model.grant(&[0], all(1));
        model.release(0);
        model.grants.clear();
    }
}

#[test]
fn a_kept_pass_ends_with_its_grant_whether_that_expires_or_is_given_back() {
    for is_released in [false, true] {
        let mut mm = MemoryManager::new();
        let (node_type, class, services) = (NodeType::Spm, Class::Plain, Services::empty());
        let spec = NodeSpec { node_type, class, services, guard: Guard::Hard, owner: "test".into() };
        let owner = mm.registry_mut().register(NodeId::ONE, spec.clone()).unwrap().owner;
        mm.registry_mut().add_range(&owner, &spec, FrameCount(64), lent(64), Initial::Zero).unwrap();
        let terms = Terms::new(Rights::ALLOC, Bytes::mib(1)).until(Time(10));
        let grant = mm.registry_mut().grant(&[&owner], terms).unwrap();
        let mut pass = mm.registry().admit(&Request::on(DomainId::ROOT, NodeId::ONE, &[&grant])).unwrap();
        assert_eq!(pass.allowed(mm.registry()), Ok(&NodeId::ONE.into()));
        if is_released {
            mm.registry_mut().release(grant).unwrap();
        } else {
            mm.registry_mut().advance(Time(10));
        }
        assert!(pass.allowed(mm.registry()).is_err());
        assert!(matches!(mm.alloc_with(&mut pass, Order::ZERO), Err(AllocError::Refused(_))));
    }
}
