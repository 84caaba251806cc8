//! R3, R15: each service is opted in node by node. With it, and no more than it stands on, the service works on a node;
//! with all but it, the node is not touched by it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use spmem_core::frames::Metadata;
use spmem_core::grant::{Grant, Rights, Terms};
use spmem_core::migrate::{Isolated, Mover, Stay};
use spmem_core::mm::{Block, MemoryManager};
use spmem_core::node::{Class, Guard, NodeError, NodeSpec, NodeType, Services};
use spmem_core::page::Pages;
use spmem_core::policy::Policy;
use spmem_core::tier::DRAM;
use spmem_core::units::{Bytes, DomainId, FrameCount, NodeId, Order};
use spmem_core::wall::{Mobility, Request};
use spmem_core::watermark::{Pressure, Watermarks};
use spmem_core::zero::Initial;

const FRAMES: FrameCount = FrameCount(64);

/// Node 0 is sysram, node 2 slower SPM, both with all services; node 1, between them, is the one in question. Its blocks
/// are movable, of order 0, and half of them free.
struct Machine {
    mm: MemoryManager,
    /// ALLOC, MIGRATE_FROM and PIN.
    grant: Grant,
    demote: Grant,
    held: Vec<Block>,
}

fn id(node: u16) -> NodeId {
    NodeId::new(node).unwrap()
}

impl Machine {
    fn new(services: Services) -> Self {
        let mut mm = MemoryManager::new();
        let mut owners = Vec::new();
        for (node, services) in [(0, Services::all()), (1, services), (2, Services::all())] {
            let guard = if services.contains(Services::USER_NUMA) { Guard::Easy } else { Guard::Hard };
            let node_type = if node == 0 { NodeType::Sysram } else { NodeType::Spm };
            let spec = NodeSpec { node_type, class: Class::Plain, services, guard, owner: "test".into() };
            let owner = mm.registry_mut().register(id(node), spec.clone()).unwrap().owner;
            let lent = Metadata::from_heap(FRAMES).unwrap();
            mm.registry_mut().add_range(&owner, &spec, FRAMES, lent, Initial::Zero).unwrap();
            mm.registry_mut().set_abstract_distance(id(node), DRAM * (1 + 2 * u64::from(node))).unwrap();
            owners.push(owner);
        }
        let grant = |mm: &mut MemoryManager, right| {
            let terms = Terms::new(right, Bytes(u64::MAX));
            mm.registry_mut().grant(&[&owners[1], &owners[2]], terms).unwrap()
        };
        let rights = Rights::ALLOC | Rights::MIGRATE_FROM | Rights::PIN;
        let (grant, demote) = (grant(&mut mm, rights), grant(&mut mm, Rights::DEMOTE_TO));
        let grants = [&grant];
        let request = Request { mobility: Mobility::Movable, ..Request::on(DomainId::ROOT, NodeId::ONE, &grants) };
        let all: Vec<Block> = std::iter::from_fn(|| mm.alloc(&request, Order::ZERO).ok()).collect();
        assert_eq!(all.len() as u64, FRAMES.0);
        let mut held = Vec::new();
        for (at, block) in all.into_iter().enumerate() {
            if at % 2 == 0 { held.push(block) } else { mm.free(block).unwrap() }
        }
        let marks = Watermarks::new(FrameCount(0), FrameCount(40), FrameCount(50)).unwrap();
        mm.registry_mut().set_watermarks(&owners[1], marks).unwrap();
        Self { mm, grant, demote, held }
    }

    fn take(&mut self) -> Result<Isolated, Stay> {
        self.mm.take(&self.held[0], Mover::Holder(&[&self.grant]))
    }

    fn looked_at(&self) -> u64 {
        self.mm.registry().pages(NodeId::ONE).map(Pages::looked_at).unwrap()
    }
}

/// Tries what a service does, and tells whether it did anything.
type Try = fn(&mut Machine) -> bool;

/// Each thing that a service does to a node.
const TRIES: [(Services, Try); 9] = [
    (Services::RECLAIM, |machine| {
        let is_short = machine.mm.shortage(NodeId::ONE) > FrameCount(0);
        let before = machine.looked_at();
        let taken = machine.mm.take_cold(NodeId::ONE, 8).unwrap().len();
        assert_eq!(is_short, taken > 0, "it takes where it says that it is due");
        is_short || machine.looked_at() != before
    }),
    (Services::COMPACTION, |machine| machine.mm.begin_compaction(NodeId::ONE, Order::HUGE).is_ok()),
    (Services::COMPACTION, |machine| {
        let range = machine.mm.registry().frames(NodeId::ONE).unwrap().ranges().next().unwrap();
        machine.mm.plan_emptying(NodeId::ONE, range).is_ok()
    }),
    (Services::MIGRATION, |machine| machine.take().is_ok()),
    (Services::DEMOTION, |machine| {
        let Ok(isolated) = machine.take() else { return false };
        machine.mm.plan_demotion(isolated, &[&machine.demote]).is_ok()
    }),
    (Services::PROMOTION, |machine| {
        let Ok(isolated) = machine.take() else { return false };
        machine.mm.plan_promotion(isolated, NodeId::ZERO).is_ok()
    }),
    (Services::LONGTERM_PIN, |machine| machine.mm.pin(&machine.held[0], &[&machine.grant]) == Ok(true)),
    (Services::USER_NUMA, |machine| {
        let request = Request { policy: Policy::bind(NodeId::ONE.into()), ..Request::of(DomainId::ROOT) };
        machine.mm.alloc(&request, Order::ZERO).is_ok()
    }),
    (Services::OOM_ELIGIBLE, |machine| machine.mm.choose_victim(NodeId::ONE, |_| FrameCount(0)).is_some()),
];

/// What a service stands on, and it.
fn least(service: Services) -> Services {
    let mut services = service;
    while let Err(NodeError::ServiceNeeds { missing, .. }) = services.check() {
        services |= missing;
    }
    services
}

/// All services but one, and those that stand on it.
fn all_but(service: Services) -> Services {
    let mut services = Services::all() - service;
    while let Err(NodeError::ServiceNeeds { service, .. }) = services.check() {
        services -= service;
    }
    services
}

#[test]
fn a_service_works_on_a_node_that_offers_it_and_never_touches_one_that_does_not() {
    for (service, is_touched) in TRIES {
        // What cannot move is not kept in lists; all blocks of a node that moves nothing stay where they are.
        let moves = if service == Services::LONGTERM_PIN { Services::MIGRATION } else { Services::empty() };
        assert!(
            is_touched(&mut Machine::new(least(service) | moves)),
            "{service} does nothing where it is offered"
        );
        let mut machine = Machine::new(all_but(service));
        let before = machine.mm.stats(NodeId::ONE);
        assert!(!is_touched(&mut machine), "{service} works without being offered");
        assert_eq!(machine.mm.stats(NodeId::ONE), before, "{service} changed a node that does not offer it");
    }
}

/// A boost asks reclaim for more, and only what reclaim frees pays it off.
#[test]
fn marks_are_boosted_on_a_node_that_is_reclaimed_and_on_no_other() {
    for (services, after) in [(Services::all(), Pressure::Easing), (all_but(Services::RECLAIM), Pressure::None)] {
        let Machine { mut mm, grant, held, .. } = Machine::new(services);
        let mut kept = Vec::new();
        for (at, block) in held.into_iter().enumerate() {
            if at % 4 == 0 { kept.push(block) } else { mm.free(block).unwrap() }
        }
        // Of each eight frames seven are free: enough for a larger block, which there is none of.
        assert_eq!(mm.pressure(NodeId::ONE, Order::ZERO), Some(Pressure::None));
        let grants = [&grant];
        let request = Request::on(DomainId::ROOT, NodeId::ONE, &grants);
        assert!(mm.alloc(&request, Order::new(4).unwrap()).is_err());
        assert_eq!(mm.pressure(NodeId::ONE, Order::ZERO), Some(after), "{services}");
    }
}

/// What the table above does not try is named here: a service is not forgotten.
#[test]
fn every_service_is_tried() {
    let tried = TRIES.iter().fold(Services::empty(), |tried, (service, _)| tried | *service);
    // The fence is the back end's (R17): the memory manager hands out places, it maps nothing.
    assert_eq!(Services::all() - tried, Services::WRITE_FENCE);
}

#[test]
fn nothing_is_demoted_or_promoted_to_a_node_that_moves_nothing() {
    for services in [Services::empty(), Services::MIGRATION] {
        let mut mm = MemoryManager::new();
        for (node, services) in [(0, Services::all()), (1, services)] {
            let (node_type, class, guard) = (NodeType::Sysram, Class::Plain, Guard::Hard);
            let spec = NodeSpec { node_type, class, services, guard, owner: "test".into() };
            let owner = mm.registry_mut().register(id(node), spec.clone()).unwrap().owner;
            let lent = Metadata::from_heap(FRAMES).unwrap();
            mm.registry_mut().add_range(&owner, &spec, FRAMES, lent, Initial::Zero).unwrap();
        }
        for (down, distance) in [(true, 3 * DRAM), (false, DRAM / 2)] {
            mm.registry_mut().set_abstract_distance(NodeId::ONE, distance).unwrap();
            let policy = Policy::bind(NodeId::ZERO.into());
            let request = Request { policy, mobility: Mobility::Movable, ..Request::of(DomainId::ROOT) };
            let block = mm.alloc(&request, Order::ZERO).unwrap();
            let isolated = mm.take(&block, Mover::Holder(&[])).unwrap();
            let planned =
                if down { mm.plan_demotion(isolated, &[]) } else { mm.plan_promotion(isolated, NodeId::ZERO) };
            assert_eq!(planned.is_ok(), services == Services::MIGRATION, "{planned:?}");
        }
    }
}
