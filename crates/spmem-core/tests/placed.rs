//! Blocks at a place that the caller names are had through the wall like any other.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use spmem_core::frames::{FramesError, Metadata};
use spmem_core::grant::{Rights, Terms};
use spmem_core::mm::{AllocError, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
use spmem_core::units::{Bytes, DomainId, FrameCount, FrameNumber, NodeId, Order};
use spmem_core::wall::Request;
use spmem_core::zero::Initial;

#[test]
fn a_block_at_a_place_is_charged_once_and_a_refused_one_changes_nothing() {
    let services = Services::empty();
    let (node_type, class, guard) = (NodeType::Spm, Class::Shared, Guard::Hard);
    let spec = NodeSpec { node_type, class, services, guard, owner: "test".into() };
    let mut mm = MemoryManager::new();
    let owner = mm.registry_mut().register(NodeId::ONE, spec.clone()).unwrap().owner;
    let lent = Metadata::from_heap(FrameCount(1000)).unwrap();
    mm.registry_mut().add_range(&owner, &spec, FrameCount(1000), lent, Initial::Unknown).unwrap();
    let grant = mm.registry_mut().grant(&[&owner], Terms::new(Rights::ALLOC, Bytes(16 * 4096))).unwrap();
    let grants = [&grant];
    let request = Request::on(DomainId::ROOT, NodeId::ONE, &grants);
    let order = Order::new(3).unwrap();

    let block = mm.alloc_at(&request, NodeId::ONE, FrameNumber(992), order).unwrap();
    assert!(!block.is_zeroed());
    assert_eq!(mm.registry().used_by(DomainId::ROOT, NodeId::ONE), FrameCount(8));
    let refused = |mm: &mut MemoryManager, frame, order| {
        let used = mm.registry().grant_info(&grant).unwrap().used;
        let answer = mm.alloc_at(&request, NodeId::ONE, FrameNumber(frame), order).unwrap_err();
        assert_eq!(mm.registry().grant_info(&grant).unwrap().used, used);
        answer
    };
    let cause = |error| if let AllocError::Exhausted { cause, .. } = error { Some(cause) } else { None };
    let (frame, zero) = (FrameNumber(995), Order::ZERO);
    assert_eq!(cause(refused(&mut mm, 995, zero)), Some(FramesError::NotFree { frame, order: zero }));
    assert!(matches!(cause(refused(&mut mm, 1000, zero)), Some(FramesError::Foreign { .. })));
    assert!(matches!(cause(refused(&mut mm, 4, order)), Some(FramesError::Misaligned { .. })));
    assert!(matches!(refused(&mut mm, 0, Order::new(4).unwrap()), AllocError::Grant { .. }));
    let unasked = Request::of(DomainId::ROOT);
    assert!(mm.alloc_at(&unasked, NodeId::ONE, FrameNumber(0), zero).is_err());
    mm.free(block).unwrap();
    assert_eq!(mm.registry().grant_info(&grant).unwrap().used, Bytes(0));
}
