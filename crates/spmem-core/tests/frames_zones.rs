//! More than one zone, and more than one node: what runs, caches and the search for a free block make of that.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking; its numbers are small"
)]

use spmem_core::frames::{Cache, Frames, FramesError, Metadata, PerCpu};
use spmem_core::units::{FrameCount, FrameNumber, Order};

fn lent(frames: u64) -> Metadata {
    Metadata::from_heap(FrameCount(frames)).unwrap()
}

#[test]
fn caches_that_hold_frames_of_another_node_are_refused() {
    let node = || {
        let mut frames = Frames::new();
        frames.add_range(FrameCount(1024), lent(1024)).unwrap();
        frames
    };
    let (mine, other) = (node(), node());
    let caches = PerCpu::new(2).unwrap();
    caches.alloc(&mine, 0, Order::ZERO).unwrap();
    other.alloc(Order::MAX).unwrap();
    assert_eq!(caches.alloc(&other, 0, Order::HUGE), Err(FramesError::OtherCache));
    assert_eq!(caches.alloc(&other, 1, Order::ZERO), Err(FramesError::OtherCache));
    assert_eq!(caches.len(), FrameCount(63), "they keep what they have");
}

#[test]
fn a_run_across_two_zones_leaves_both_with_what_they_have_left() {
    let zone = 1_u64 << 18;
    let mut frames = Frames::new();
    frames.add_range(FrameCount(2 * zone), lent(2 * zone)).unwrap();
    let low = frames.alloc_contiguous(FrameCount(zone / 2)).unwrap();
    let run = frames.alloc_contiguous(FrameCount(zone)).unwrap();
    assert_eq!(u64::from(run.first.0), zone / 2);
    // All that is left lies in the second zone, and the first is not searched in vain: it says that it has nothing.
    let rest: Vec<_> = std::iter::from_fn(|| frames.alloc(Order::MAX).ok()).collect();
    assert_eq!(rest.len() as u64, zone / 2 / 1024);
    assert_eq!(frames.largest_free(), None, "as free() says: {}", frames.free());
    rest.into_iter().for_each(|first| frames.free_block(first, Order::MAX).unwrap());
    frames.free_contiguous(run).unwrap();
    frames.free_contiguous(low).unwrap();
    assert_eq!(frames.count_free_blocks()[Order::MAX.index()], 2 * zone / 1024);
}

#[test]
fn a_run_across_two_zones_is_given_only_where_both_parts_are_free() {
    let zone = 1_u64 << 18;
    let mut frames = Frames::new();
    frames.add_range(FrameCount(zone + 1024), lent(zone + 1024)).unwrap();
    // A run of a zone's length begins at frame 0 or, across the border, at frame 1024.
    frames.alloc_at(FrameNumber(0), Order::ZERO).unwrap();
    for used in [1024, zone - 1, zone, zone + 1023].map(|frame| FrameNumber(frame as u32)) {
        frames.alloc_at(used, Order::ZERO).unwrap();
        let refused = frames.alloc_contiguous(FrameCount(zone));
        assert!(matches!(refused, Err(FramesError::Exhausted { .. })), "frame {used} is in use: {refused:?}");
        frames.free_block(used, Order::ZERO).unwrap();
    }
    assert_eq!(frames.alloc_contiguous(FrameCount(zone)).unwrap().first, FrameNumber(1024));
}

#[test]
fn a_cache_that_was_sent_to_another_zone_comes_back_when_that_is_full() {
    let zone = 1_u64 << 18;
    let mut frames = Frames::new();
    frames.add_range(FrameCount(2 * zone), lent(2 * zone)).unwrap();
    for first in (zone..2 * zone).step_by(1024) {
        frames.alloc_at(FrameNumber(first as u32), Order::MAX).unwrap();
    }
    // Two that are filled in turn from one zone: one of them goes on to the next, which has nothing.
    let (mut one, mut other) = (Cache::new(), Cache::new());
    for _ in 0..zone / 2 {
        assert!(one.alloc(&frames).is_ok() && other.alloc(&frames).is_ok());
    }
    assert_eq!(frames.free(), FrameCount(0));
}
