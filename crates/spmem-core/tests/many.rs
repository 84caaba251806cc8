//! R6, R12: contiguous ranges and batches go through the wall, and are charged, as blocks are.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use spmem_core::frames::{FramesError, Metadata};
use spmem_core::grant::{Grant, GrantError, Rights, Terms};
use spmem_core::mm::{AllocError, Block, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};
use spmem_core::policy::{Flags, Mode, Policy};
use spmem_core::units::{Bytes, DomainId, FrameCount, NodeId, Order};
use spmem_core::wall::{Mobility, Request};
use spmem_core::watermark::Watermarks;
use spmem_core::zero::Initial;

const FRAMES: FrameCount = FrameCount(4096);

/// Node 0 is sysram, node 1 SPM with a hard guard and half of it granted.
struct Machine {
    mm: MemoryManager,
    owners: Vec<Owner>,
    grant: Grant,
}

impl Machine {
    fn new() -> Self {
        let mut mm = MemoryManager::new();
        let mut owners = Vec::new();
        for (node, node_type) in [(NodeId::ZERO, NodeType::Sysram), (NodeId::ONE, NodeType::Spm)] {
            let (class, guard) = (Class::Plain, Guard::Hard);
            let services = Services::MIGRATION;
            let spec = NodeSpec { node_type, class, services, guard, owner: "test".into() };
            let owner = mm.registry_mut().register(node, spec.clone()).unwrap().owner;
            let lent = Metadata::from_heap(FRAMES).unwrap();
            mm.registry_mut().add_range(&owner, &spec, FRAMES, lent, Initial::Zero).unwrap();
            owners.push(owner);
        }
        let terms = Terms::new(Rights::ALLOC, FrameCount(FRAMES.0 / 2).bytes());
        let grant = mm.registry_mut().grant(&[&owners[1]], terms).unwrap();
        Self { mm, owners, grant }
    }

    fn used(&self) -> (FrameCount, FrameCount, Bytes) {
        let registry = self.mm.registry();
        let (node, domain) = (NodeId::ONE, DomainId::ROOT);
        (
            registry.frames(node).unwrap().used(),
            registry.used_by(domain, node),
            registry.grant_info(&self.grant).unwrap().used,
        )
    }
}

#[test]
fn a_contiguous_range_of_a_walled_node_takes_a_grant_and_is_charged_to_it() {
    let mut machine = Machine::new();
    let bare = Request::on(DomainId::ROOT, NodeId::ONE, &[]);
    assert!(matches!(machine.mm.alloc_contiguous(&bare, FrameCount(8)), Err(AllocError::Refused(_))));
    let grants = [&machine.grant];
    let request = Request::on(DomainId::ROOT, NodeId::ONE, &grants);
    let held = machine.mm.alloc_contiguous(&request, FrameCount(1500)).unwrap();
    assert_eq!((held.node(), held.run().count, held.is_zeroed()), (NodeId::ONE, FrameCount(1500), true));
    assert_eq!(machine.used(), (FrameCount(1500), FrameCount(1500), FrameCount(1500).bytes()));
    let grants = [&machine.grant];
    let request = Request::on(DomainId::ROOT, NodeId::ONE, &grants);
    let over = machine.mm.alloc_contiguous(&request, FrameCount(600)).unwrap_err();
    assert!(matches!(over, AllocError::Grant { cause: GrantError::OverQuota { .. }, .. }), "{over}");
    machine.mm.free_contiguous(held).unwrap();
    assert_eq!(machine.used(), (FrameCount(0), FrameCount(0), Bytes(0)));
    let grants = [&machine.grant];
    let again = Request::on(DomainId::ROOT, NodeId::ONE, &grants);
    let again = machine.mm.alloc_contiguous(&again, FrameCount(8)).unwrap();
    assert!(!again.is_zeroed(), "R21: somebody wrote it");
}

#[test]
fn a_contiguous_range_leaves_the_reserve_alone_and_is_refused_without_a_trace() {
    let mut machine = Machine::new();
    let marks = Watermarks::new(FrameCount(100), FrameCount(100), FrameCount(100)).unwrap();
    machine.mm.registry_mut().set_watermarks(&machine.owners[0], marks).unwrap();
    let request = Request::of(DomainId::ROOT);
    let reserve = machine.mm.alloc_contiguous(&request, FrameCount(4000)).unwrap_err();
    assert!(matches!(reserve, AllocError::ReserveOnly { .. }), "{reserve}");
    let most = machine.mm.alloc_contiguous(&request, FrameCount(3996)).unwrap();
    machine.mm.free_contiguous(most).unwrap();
    let far = machine.mm.alloc_contiguous(&request, FrameCount(0)).unwrap_err();
    let cause = FramesError::Contiguous { count: FrameCount(0) };
    assert_eq!(far, AllocError::Exhausted { node: NodeId::ZERO, cause });
    assert_eq!(machine.mm.stats(NodeId::ZERO).unwrap().used, FrameCount(0));
    assert_eq!(machine.mm.registry().used_by(DomainId::ROOT, NodeId::ZERO), FrameCount(0));
}

#[test]
fn a_contiguous_range_is_taken_back_by_its_own_manager_only() {
    let (mut mine, mut theirs) = (Machine::new(), Machine::new());
    let held = mine.mm.alloc_contiguous(&Request::of(DomainId::ROOT), FrameCount(8)).unwrap();
    let held = theirs.mm.free_contiguous(held).unwrap_err();
    mine.mm.free_contiguous(held).unwrap();
}

#[test]
fn a_batch_stops_at_the_quota_and_every_frame_of_it_is_a_block() {
    let mut machine = Machine::new();
    let grants = [&machine.grant];
    let mut pass = machine.mm.registry().admit(&Request::on(DomainId::ROOT, NodeId::ONE, &grants)).unwrap();
    let mut blocks = Vec::new();
    machine.mm.alloc_batch(&mut pass, 100, &mut blocks).unwrap();
    assert_eq!(machine.used(), (FrameCount(100), FrameCount(100), FrameCount(100).bytes()));
    let over = machine.mm.alloc_batch(&mut pass, 5000, &mut blocks).unwrap_err();
    assert!(matches!(over, AllocError::Grant { cause: GrantError::OverQuota { .. }, .. }), "{over}");
    assert_eq!(blocks.len() as u64, FRAMES.0 / 2, "all that the grant is good for");
    let mut frames: Vec<_> = blocks.iter().map(Block::first_frame).collect();
    frames.sort_unstable();
    frames.dedup();
    assert_eq!(frames.len(), blocks.len(), "a frame has two owners");
    assert!(blocks.iter().all(|block| block.order() == Order::ZERO && block.is_zeroed()));
    blocks.into_iter().for_each(|block| machine.mm.free(block).unwrap());
    assert_eq!(machine.used(), (FrameCount(0), FrameCount(0), Bytes(0)));
}

#[test]
fn a_batch_takes_turns_and_keeps_track_of_what_moves_as_single_frames_do() {
    let mut machine = Machine::new();
    let policy = Policy::new(Mode::Interleave, Flags::empty(), [NodeId::ZERO, NodeId::ONE].into_iter().collect());
    let grants = [&machine.grant];
    let mobility = Mobility::Movable;
    let request = Request { policy: policy.unwrap(), grants: &grants, mobility, ..Request::of(DomainId::ROOT) };
    let mut pass = machine.mm.registry().admit(&request).unwrap();
    let mut blocks = Vec::new();
    machine.mm.alloc_batch(&mut pass, 100, &mut blocks).unwrap();
    assert_eq!(blocks.iter().filter(|block| block.node() == NodeId::ONE).count(), 50);
    assert_eq!(machine.mm.registry().pages(NodeId::ONE).unwrap().iter().count(), 50);
}

#[test]
fn the_reserve_is_kept_to_the_frame_however_free_frames_are_spread() {
    let mut machine = Machine::new();
    let request = Request::of(DomainId::ROOT);
    let all: Vec<_> = (0..FRAMES.0).map(|_| machine.mm.alloc(&request, Order::ZERO).unwrap()).collect();
    let mut held = Vec::new();
    for (at, block) in all.into_iter().enumerate() {
        if at % 64 == 0 { machine.mm.free(block).unwrap() } else { held.push(block) }
    }
    let free = machine.mm.stats(NodeId::ZERO).unwrap().free;
    for (min, may) in [(free.0 - 1, true), (free.0, false)] {
        let marks = Watermarks::new(FrameCount(min), FrameCount(min), FrameCount(min)).unwrap();
        machine.mm.registry_mut().set_watermarks(&machine.owners[0], marks).unwrap();
        match machine.mm.alloc(&request, Order::ZERO) {
            Ok(block) => {
                assert!(may);
                machine.mm.free(block).unwrap();
            }
            Err(error) => {
                assert!(!may);
                assert_eq!(error, AllocError::ReserveOnly { node: NodeId::ZERO, free, min: FrameCount(min) });
            }
        }
    }
}

#[test]
fn a_batch_of_all_that_can_be_counted_ends_with_the_node() {
    let mut machine = Machine::new();
    let mut pass = machine.mm.registry().admit(&Request::of(DomainId::ROOT)).unwrap();
    let mut blocks = vec![machine.mm.alloc(&Request::of(DomainId::ROOT), Order::ZERO).unwrap()];
    let over = machine.mm.alloc_batch(&mut pass, usize::MAX, &mut blocks).unwrap_err();
    assert!(matches!(over, AllocError::Exhausted { node: NodeId::ZERO, .. }), "{over}");
    assert_eq!(blocks.len() as u64, FRAMES.0);
}

#[test]
fn marks_that_no_node_can_reach_keep_all_of_it() {
    let mut machine = Machine::new();
    let most = FrameCount(u64::MAX);
    let marks = Watermarks::new(most, most, most).unwrap();
    machine.mm.registry_mut().set_watermarks(&machine.owners[0], marks).unwrap();
    let refused = AllocError::ReserveOnly { node: NodeId::ZERO, free: FRAMES, min: most };
    assert_eq!(machine.mm.alloc(&Request::of(DomainId::ROOT), Order::ZERO), Err(refused));
    let marks = Watermarks::new(FrameCount(0), FrameCount(0), most).unwrap();
    machine.mm.registry_mut().set_watermarks(&machine.owners[0], marks).unwrap();
    let policy = Policy::bind(NodeId::ZERO.into());
    let all: Vec<_> = (0..FRAMES.0)
        .map(|_| machine.mm.alloc(&Request { policy, ..Request::of(DomainId::ROOT) }, Order::ZERO).unwrap())
        .collect();
    for (at, block) in all.into_iter().enumerate() {
        if at % 2 == 0 {
            machine.mm.free(block).unwrap();
        }
    }
    // There are frames, but no block so large: the marks are raised, as far as they can be.
    assert!(machine.mm.alloc(&Request { policy, ..Request::of(DomainId::ROOT) }, Order::HUGE).is_err());
    assert_eq!(machine.mm.shortage(NodeId::ZERO), FrameCount(0), "it has no RECLAIM");
}
