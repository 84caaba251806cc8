//! R6: where a request goes when the nodes of its policy are full, node by node, as Linux's zonelists have it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use spmem_core::frames::Metadata;
use spmem_core::mm::MemoryManager;
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
use spmem_core::policy::{Flags, Mode, Policy};
use spmem_core::units::{DomainId, FrameCount, NodeId, Order};
use spmem_core::wall::Request;
use spmem_core::zero::Initial;

fn id(node: u16) -> NodeId {
    NodeId::new(node).unwrap()
}

/// A machine of ordinary nodes of one frame each, in two sockets: 0, 2, 4 and 1, 3, 5.
fn two_sockets() -> MemoryManager {
    let mut mm = MemoryManager::new();
    let (node_type, class, guard) = (NodeType::Sysram, Class::Plain, Guard::Hard);
    let spec = NodeSpec { node_type, class, services: Services::empty(), guard, owner: "test".into() };
    for node in 0..6 {
        let owner = mm.registry_mut().register(id(node), spec.clone()).unwrap().owner;
        let lent = Metadata::from_heap(FrameCount(1)).unwrap();
        mm.registry_mut().add_range(&owner, &spec, FrameCount(1), lent, Initial::Zero).unwrap();
    }
    for (from, to) in (0..6).flat_map(|from| (0..6).map(move |to| (from, to))) {
        let distance = if from == to { 10 } else { 12 + 10 * u8::from(from % 2 != to % 2) };
        mm.registry_mut().set_distance(id(from), id(to), distance).unwrap();
    }
    mm
}

/// The nodes in the order in which a policy fills them, all with one frame.
fn filled(mode: Mode, nodes: &[u16], local: Option<u16>) -> Vec<u16> {
    let mut mm = two_sockets();
    let policy = Policy::new(mode, Flags::empty(), nodes.iter().map(|&node| id(node)).collect()).unwrap();
    let request = Request { policy, local: local.map(id), ..Request::of(DomainId::ROOT) };
    let mut pass = mm.registry().admit(&request).unwrap();
    let blocks = std::iter::from_fn(|| mm.alloc_with(&mut pass, Order::ZERO).ok());
    blocks.map(|block| block.node().get()).collect()
}

#[test]
fn a_full_node_is_stood_in_for_by_what_is_nearest_to_it_as_in_linux() {
    for mode in [Mode::Interleave, Mode::WeightedInterleave] {
        // Turns: 1 and 2. Then it is 1's: 3, in its socket, not 2, which is full, nor 0, the lowest; then 2's: 4 before 0.
        assert_eq!(filled(mode, &[1, 2], None), [1, 2, 3, 4, 5, 0], "{mode}");
        // The fallback lies between the nodes of the policy: 0 and 2 are in one socket.
        assert_eq!(filled(mode, &[0, 1], None), [0, 1, 2, 3, 4, 5], "{mode}");
    }
    // Preferred goes on in the zonelist of its node, preferred-many in that of where the task runs.
    assert_eq!(filled(Mode::Preferred, &[1], Some(0)), [1, 3, 5, 2, 4, 0]);
    assert_eq!(filled(Mode::PreferredMany, &[1, 4], Some(0)), [4, 1, 0, 2, 3, 5]);
    assert_eq!(filled(Mode::Bind, &[1, 2, 3], Some(3)), [3, 1, 2]);
    assert_eq!(filled(Mode::Local, &[], Some(2)), [2, 4, 0, 3, 5, 1]);
}

#[test]
fn a_node_of_the_policy_that_is_far_comes_after_a_near_one_that_is_not() {
    let mut mm = two_sockets();
    let policy = Policy::new(Mode::Interleave, Flags::empty(), [0, 1].map(id).into_iter().collect()).unwrap();
    let mut pass = mm.registry().admit(&Request { policy, ..Request::of(DomainId::ROOT) }).unwrap();
    let full = Request { policy: Policy::bind(id(0).into()), ..Request::of(DomainId::ROOT) };
    let held = mm.alloc(&full, Order::ZERO).unwrap();
    assert_eq!(mm.alloc_with(&mut pass, Order::ZERO).unwrap().node(), id(2), "1 is free, but in the other socket");
    assert_eq!(held.node(), id(0));
}
