//! Ranges of frames come and go: where they lie, what they cost, and which are refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use spmem_core::frames::{Frames, FramesError, Metadata};
use spmem_core::units::{FrameCount, FrameNumber, Order};

fn lent(frames: u64) -> Metadata {
    Metadata::from_heap(FrameCount(frames)).unwrap()
}

#[test]
fn limits_are_refused_and_change_nothing() {
    let mut frames = Frames::new();
    assert_eq!(frames.add_range(FrameCount(0), lent(1)), Err(FramesError::EmptyRange));
    assert!(matches!(frames.add_range(FrameCount(u64::MAX), lent(1)), Err(FramesError::TooMany { .. })));
    assert!(matches!(frames.add_range(FrameCount((1 << 32) + 1), lent(1)), Err(FramesError::TooMany { .. })));
    assert_eq!(frames.capacity(), FrameCount(0));
    assert!(matches!(frames.alloc(Order::ZERO), Err(FramesError::Exhausted { largest: None, .. })));
}

#[test]
fn thousands_of_ranges_come_and_go_and_every_frame_of_them_is_given_out_once() {
    let mut frames = Frames::new();
    let firsts: Vec<_> = (0..3000).map(|_| frames.add_range(FrameCount(3), lent(3)).unwrap().first).collect();
    let given: BTreeSet<_> = (0..9000).map(|_| frames.alloc(Order::ZERO).unwrap()).collect();
    assert_eq!(given.len(), 9000);
    assert!(frames.alloc(Order::ZERO).is_err());
    given.iter().for_each(|&frame| frames.free_block(frame, Order::ZERO).unwrap());
    for &first in firsts.iter().step_by(2) {
        frames.remove_range(first).unwrap();
    }
    assert_eq!(frames.capacity(), FrameCount(4500));
    for _ in 0..1500 {
        let again = frames.add_range(FrameCount(3), lent(3)).unwrap().first;
        assert!(firsts.contains(&again), "gaps are used again");
    }
    assert_eq!(frames.free(), FrameCount(9000));
}

#[test]
fn metadata_stays_below_a_thousandth_of_every_range_of_134_mib_or_more() {
    let bytes = |count| {
        let (words, states) = Metadata::size(FrameCount(count));
        words as u64 * 8 + states as u64
    };
    for count in (134 << 8..5 << 18).chain([(1 << 32) - 1, 1 << 32]) {
        assert!(bytes(count) * 1000 < count * 4096, "{} for {count} frames", bytes(count));
    }
    let mut frames = Frames::new();
    // What is lent beyond that is not used.
    frames.add_range(FrameCount(1000), lent(1 << 18)).unwrap();
    assert_eq!(frames.metadata_bytes() as u64, bytes(1000));
}

#[test]
fn memory_may_come_and_go_for_ever() {
    let count = FrameCount(1 << 18);
    let mut frames = Frames::new();
    let mut old = frames.add_range(count, lent(count.0)).unwrap();
    let mut spare = lent(count.0);
    for _ in 0..(1 << 15) {
        let new = frames.add_range(count, spare).unwrap();
        spare = frames.remove_range(old.first).unwrap().1;
        old = new;
    }
    assert!(u64::from(old.first.0) <= count.0);
}

#[test]
fn a_range_goes_into_the_lowest_gap_that_holds_it() {
    let mut frames = Frames::new();
    let add = |frames: &mut Frames, count: u64| frames.add_range(FrameCount(count), lent(count)).unwrap().first.0;
    assert_eq!([add(&mut frames, 1024), add(&mut frames, 100), add(&mut frames, 3000)], [0, 1024, 2048]);
    frames.remove_range(FrameNumber(0)).unwrap();
    frames.remove_range(FrameNumber(1024)).unwrap();
    assert_eq!(add(&mut frames, 2049), 5120, "the gap has 2048");
    assert_eq!([add(&mut frames, 1025), add(&mut frames, 5)], [0, 8192]);
    frames.remove_range(FrameNumber(0)).unwrap();
    assert_eq!([add(&mut frames, 2048), add(&mut frames, 1)], [0, 9216]);
    let firsts: Vec<u32> = frames.ranges().map(|range| range.first.0).collect();
    assert_eq!(firsts, [0, 2048, 5120, 8192, 9216]);
}

#[test]
fn metadata_is_lent_to_one_range_at_a_time_however_long_the_two_are() {
    // The hints of more than 64 zones take more words.
    let (long, short) = (FrameCount(65 << 18), FrameCount(1024));
    for (first, second) in [(long, short), (short, long), (long, FrameCount(129 << 18)), (short, short)] {
        let most = FrameCount(first.0.max(second.0));
        let lent = Metadata::from_heap(most).unwrap();
        let (mut one, mut other) = (Frames::new(), Frames::new());
        let range = one.add_range(first, lent).unwrap();
        assert_eq!(other.add_range(second, lent), Err(FramesError::MetadataInUse));
        one.remove_range(range.first).unwrap();
        assert!(lent.is_zero());
        other.add_range(second, lent).unwrap();
        assert_eq!(one.add_range(first, lent), Err(FramesError::MetadataInUse));
    }
}

#[test]
fn metadata_is_lent_to_one_range_at_a_time() {
    let count = FrameCount(2048);
    let lent = Metadata::from_heap(count).unwrap();
    let (mut one, mut other) = (Frames::new(), Frames::new());
    let range = one.add_range(count, lent).unwrap();
    assert_eq!(one.add_range(count, lent), Err(FramesError::MetadataInUse));
    assert_eq!(other.add_range(count, lent), Err(FramesError::MetadataInUse));
    assert_eq!(one.capacity(), count);
    let (_, back) = one.remove_range(range.first).unwrap();
    assert!(back.is_zero());
    let frame = other.add_range(count, back).map(|_| other.alloc(Order::ZERO).unwrap());
    assert!(frame.is_ok());
}
