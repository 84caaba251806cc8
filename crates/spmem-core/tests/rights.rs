//! R12: each right of a grant is asked for where it is used, and means nothing elsewhere.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use spmem_core::frames::Metadata;
use spmem_core::grant::{Grant, GrantError, Rights, Terms};
use spmem_core::migrate::{Mover, Stay};
use spmem_core::mm::{Block, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::Policy;
use spmem_core::tier::DRAM;
use spmem_core::units::{Bytes, DomainId, FrameCount, NodeId, Order};
use spmem_core::wall::{Mobility, Reason, Refusal, Request};
use spmem_core::zero::Initial;

const FRAMES: FrameCount = FrameCount(64);

/// Node 0 is sysram; nodes 1 and 2 are slower SPM, 1 with a hard guard, 2 with an easy one.
struct Machine {
    mm: MemoryManager,
    owners: Vec<Owner>,
    domain: DomainId,
}

fn id(node: u16) -> NodeId {
    NodeId::new(node).unwrap()
}

impl Machine {
    fn new() -> Self {
        let mut mm = MemoryManager::new();
        let mut owners = Vec::new();
        for node in 0..3 {
            let node_type = if node == 0 { NodeType::Sysram } else { NodeType::Spm };
            let guard = if node == 2 { Guard::Easy } else { Guard::Hard };
            let (class, services) = (Class::Plain, Services::all());
            let spec = NodeSpec { node_type, class, services, guard, owner: "test".into() };
            let owner = mm.registry_mut().register(id(node), spec.clone()).unwrap().owner;
            let lent = Metadata::from_heap(FRAMES).unwrap();
            mm.registry_mut().add_range(&owner, &spec, FRAMES, lent, Initial::Zero).unwrap();
            mm.registry_mut().set_abstract_distance(id(node), DRAM * (1 + 2 * u64::from(node))).unwrap();
            owners.push(owner);
        }
        let domain = mm.registry_mut().create_domain(DomainId::ROOT, "d").unwrap();
        Self { mm, owners, domain }
    }

    fn grant(&mut self, rights: Rights) -> Grant {
        let owners = [&self.owners[1], &self.owners[2]];
        self.mm.registry_mut().grant(&owners, Terms::new(rights, Bytes::mib(1))).unwrap()
    }

    fn alloc(&mut self, node: u16, grants: &[&Grant]) -> Block {
        let policy = Policy::bind(id(node).into());
        let request = Request { policy, grants, mobility: Mobility::Movable, ..Request::of(self.domain) };
        self.mm.alloc(&request, Order::ZERO).unwrap()
    }
}

fn lacks(node: u16, right: Rights) -> Refusal {
    Refusal { node: Some(id(node)), reason: Reason::LacksRight { right } }
}

#[test]
fn a_block_of_an_spm_node_is_pinned_with_the_right_to_it_only() {
    let mut machine = Machine::new();
    let (alloc, pin) = (machine.grant(Rights::ALLOC), machine.grant(Rights::PIN));
    for node in [1, 2] {
        let block = machine.alloc(node, &[&alloc]);
        let refusal = lacks(node, Rights::PIN);
        assert_eq!(machine.mm.pin(&block, &[&alloc]), Err(Stay::Refused { refusal }));
        assert_eq!(machine.mm.pin(&block, &[&alloc, &pin]), Ok(true));
        assert!(machine.mm.take(&block, Mover::Owner(&machine.owners[usize::from(node)])).is_err(), "R15");
        machine.mm.unpin(&block);
        let isolated = machine.mm.take(&block, Mover::Owner(&machine.owners[usize::from(node)])).unwrap();
        assert_eq!(isolated.node(), id(node));
    }
    let block = machine.alloc(0, &[]);
    assert_eq!(machine.mm.pin(&block, &[]), Ok(true), "sysram is everybody's");
}

#[test]
fn a_holder_moves_a_block_off_an_spm_node_with_the_right_to_it_only() {
    let mut machine = Machine::new();
    let (alloc, from) = (machine.grant(Rights::ALLOC), machine.grant(Rights::MIGRATE_FROM));
    let block = machine.alloc(1, &[&alloc]);
    let refused = Err(Stay::Refused { refusal: lacks(1, Rights::MIGRATE_FROM) });
    assert_eq!(machine.mm.take(&block, Mover::Holder(&[&alloc])), refused);
    let stranger = Mover::Owner(&machine.owners[2]);
    assert_eq!(machine.mm.take(&block, stranger), refused, "the owner of another node is nobody here");
    let isolated = machine.mm.take(&block, Mover::Holder(&[&from])).unwrap();
    let planned = machine.mm.plan_promotion(isolated, NodeId::ZERO).unwrap();
    let block = machine.mm.complete(planned, block).unwrap();
    assert_eq!(block.node(), NodeId::ZERO);
    assert!(machine.mm.take(&block, Mover::Holder(&[])).is_ok(), "off sysram anybody may");
    let easy = machine.alloc(2, &[]);
    assert!(machine.mm.take(&easy, Mover::Holder(&[])).is_ok(), "R9: who may name it may leave it");
}

#[test]
fn the_manager_moves_what_lies_outside_or_under_an_ended_grant_and_nothing_else() {
    let mut machine = Machine::new();
    let alloc = machine.grant(Rights::ALLOC);
    let (first, second) = (machine.alloc(1, &[&alloc]), machine.alloc(1, &[&alloc]));
    let refused = Err(Stay::Refused { refusal: lacks(1, Rights::MIGRATE_FROM) });
    assert_eq!(machine.mm.take(&first, Mover::Manager), refused);
    machine.mm.registry_mut().set_mems(machine.domain, id(0).into()).unwrap();
    assert!(machine.mm.take(&first, Mover::Manager).is_ok(), "R5");
    machine.mm.registry_mut().set_mems(machine.domain, NodeMask::EMPTY).unwrap();
    assert_eq!(machine.mm.take(&second, Mover::Manager), refused);
    machine.mm.registry_mut().revoke(&machine.owners[1], alloc.id()).unwrap();
    assert!(machine.mm.take(&second, Mover::Manager).is_ok(), "R13");
}

#[test]
fn the_services_of_a_node_move_its_blocks_without_a_right() {
    let mut machine = Machine::new();
    let alloc = machine.grant(Rights::ALLOC);
    let _block = machine.alloc(1, &[&alloc]);
    assert_eq!(machine.mm.take_cold(id(1), 1).unwrap().len(), 1);
}

#[test]
fn mapping_takes_the_right_to_it_as_long_as_the_grant_lasts() {
    let mut machine = Machine::new();
    let (read, both) = (machine.grant(Rights::MAP_READ), machine.grant(Rights::MAP_READ | Rights::MAP_WRITE));
    let registry = machine.mm.registry_mut();
    let write = Rights::MAP_WRITE;
    assert_eq!(registry.check(id(1), Rights::MAP_READ, &[&read]), Ok(()));
    assert_eq!(registry.check(id(1), write, &[&read]), Err(lacks(1, write)));
    assert_eq!(registry.check(id(1), write, &[&read, &both]), Ok(()));
    assert_eq!(registry.check(id(1), write, &[]), Err(lacks(1, write)));
    assert_eq!(registry.check(id(0), write, &[]), Ok(()), "sysram is everybody's");
    assert_eq!(registry.check(id(2), write, &[]), Ok(()), "R9");
    registry.revoke(&machine.owners[1], both.id()).unwrap();
    let cause = GrantError::Revoked;
    let gone = Refusal { node: Some(id(1)), reason: Reason::BadGrant { cause } };
    assert_eq!(registry.check(id(1), write, &[&read, &both]), Err(gone));
}
