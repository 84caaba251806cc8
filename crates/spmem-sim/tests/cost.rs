//! What an allocation costs does not grow with the node.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use spmem_core::mm::MemoryManager;
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
use spmem_core::units::{DomainId, FrameCount, NodeId, Order};
use spmem_core::wall::{Mobility, Request, Reserve};
use spmem_core::watermark::Watermarks;
use spmem_core::zero::Initial;
use spmem_sim::lend;

const PAIRS: u32 = 2_000;

/// The least time of some pairs of allocation and free, on a node with a reserve of which three quarters are full, those where
/// it looks first.
fn pairs(frames: FrameCount, mobility: Mobility) -> Duration {
    let mut mm = MemoryManager::new();
    let (class, services) = (Class::Plain, Services::MIGRATION);
    let spec = NodeSpec { node_type: NodeType::Sysram, class, services, guard: Guard::Hard, owner: "test".into() };
    let owner = mm.registry_mut().register(NodeId::ZERO, spec.clone()).unwrap();
    mm.registry_mut().add_range(&owner, &spec, frames, lend(frames), Initial::Unknown).unwrap();
    let min = FrameCount(frames.0 / 1024);
    mm.registry_mut().set_watermarks(&owner, Watermarks::new(min, min, min).unwrap()).unwrap();
    let request = Request { mobility, ..Request::of(DomainId::ROOT) };
    let no_reserve = Request { reserve: Reserve::Use, ..Request::of(DomainId::ROOT) };
    let mut all = mm.registry().admit(&no_reserve).unwrap();
    let mut full: Vec<_> = core::iter::from_fn(|| mm.alloc_with(&mut all, Order::MAX).ok()).collect();
    let part = full.len() / 4;
    let empty = if mobility == Mobility::Movable { 0..part } else { 3 * part..4 * part };
    full.drain(empty).for_each(|block| mm.free(block).unwrap());
    let mut pass = mm.registry().admit(&request).unwrap();
    let mut least = Duration::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        for _ in 0..PAIRS {
            let block = mm.alloc_with(&mut pass, Order::ZERO).unwrap();
            mm.free(block).unwrap();
        }
        least = least.min(start.elapsed());
    }
    full.into_iter().for_each(|block| mm.free(block).unwrap());
    least
}

#[test]
fn an_allocation_with_a_reserve_costs_about_the_same_on_a_tebibyte_as_on_four_gibibytes() {
    for mobility in [Mobility::Unmovable, Mobility::Movable] {
        let (small, large) = (pairs(FrameCount(1 << 20), mobility), pairs(FrameCount(1 << 28), mobility));
        // A look at each of 1024 zones would make it six times as much and more.
        assert!(large < small * 4, "{mobility:?}: {small:?} for {PAIRS} pairs, on a TiB {large:?}");
    }
}
