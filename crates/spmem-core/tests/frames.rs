//! The frame allocator against an oracle that knows the owner of each frame. Ranges and zones have files of their own.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking; its numbers are small"
)]

use std::collections::BTreeSet;

use proptest::prelude::*;
use spmem_core::frames::{Cache, FrameRange, Frames, FramesError, Hurt, InUse, Metadata};
use spmem_core::units::{FrameCount, FrameNumber, Order};

/// What a frame is, one entry a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Owner {
    Hole,
    Free,
    /// Poisoned, and nobody's.
    Out,
    /// Serial number of the block.
    Block(u32),
}

struct Oracle {
    frames: Frames,
    owners: Vec<Owner>,
    /// Serial, first frame, order.
    blocks: Vec<(u32, FrameNumber, Order)>,
    /// Serial and span.
    runs: Vec<(u32, FrameRange)>,
    poisoned: BTreeSet<usize>,
    next: u32,
}

#[derive(Clone, Debug)]
enum Op {
    Alloc(u8),
    /// Any frame and order.
    AllocAt(u32, u8),
    AllocHighest(u8),
    /// Which block, by position.
    Free(prop::sample::Index),
    /// Any frame and order: right only by chance.
    FreeWrong(u32, u8),
    Contiguous(u64),
    FreeContiguous(prop::sample::Index),
    Batch(usize),
    Poison(u32),
    /// All at once, as when a row of a chip fails.
    PoisonRun(u32, u32),
    AddRange(u64),
    RemoveRange(prop::sample::Index),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => prop_oneof![4 => 0u8..=2, 1 => 0u8..=10].prop_map(Op::Alloc),
        2 => (0u32..6000, 0u8..=10).prop_map(|(frame, order)| Op::AllocAt(frame, order)),
        2 => (0u32..6000, 0u8..=10).prop_map(|(frame, order)| Op::AllocAt(frame >> order << order, order)),
        2 => (0u8..=10).prop_map(Op::AllocHighest),
        6 => any::<prop::sample::Index>().prop_map(Op::Free),
        2 => (0u32..6000, 0u8..=10).prop_map(|(frame, order)| Op::FreeWrong(frame, order)),
        1 => (1u64..3000).prop_map(Op::Contiguous),
        1 => any::<prop::sample::Index>().prop_map(Op::FreeContiguous),
        2 => (1usize..300).prop_map(Op::Batch),
        3 => (0u32..6000).prop_map(Op::Poison),
        1 => (0u32..6000, 1u32..200).prop_map(|(first, count)| Op::PoisonRun(first, count)),
        1 => (1u64..2100).prop_map(Op::AddRange),
        1 => any::<prop::sample::Index>().prop_map(Op::RemoveRange),
    ]
}

fn lent(frames: u64) -> Metadata {
    Metadata::from_heap(FrameCount(frames)).unwrap()
}

fn order(order: u8) -> Order {
    Order::new(order).unwrap()
}

impl Oracle {
    fn new(ranges: &[u64]) -> Self {
        let (frames, owners, blocks, runs) = (Frames::new(), Vec::new(), Vec::new(), Vec::new());
        let mut oracle = Self { frames, owners, blocks, runs, poisoned: BTreeSet::new(), next: 0 };
        ranges.iter().for_each(|&count| oracle.add_range(count));
        oracle
    }

    fn span(block: (FrameNumber, Order)) -> std::ops::Range<usize> {
        block.0.0 as usize..block.0.0 as usize + (1 << block.1.get())
    }

    fn is_free(&self, first: usize, order: Order) -> bool {
        let end = first + (1 << order.get());
        end <= self.owners.len() && self.owners[first..end].iter().all(|&owner| owner == Owner::Free)
    }

    fn has_free(&self, order: Order) -> bool {
        (0..self.owners.len()).step_by(1 << order.get()).any(|first| self.is_free(first, order))
    }

    fn add_range(&mut self, count: u64) {
        let range = self.frames.add_range(FrameCount(count), lent(count)).unwrap();
        assert_eq!(range.first.0 % 1024, 0);
        let (first, end) = (range.first.0 as usize, range.first.0 as usize + count as usize);
        self.owners.resize(end.max(self.owners.len()), Owner::Hole);
        assert!(self.owners[first..end].iter().all(|&owner| owner == Owner::Hole), "ranges overlap");
        self.owners[first..end].fill(Owner::Free);
    }

    fn alloc(&mut self, order: Order) {
        match self.frames.alloc(order) {
            Ok(first) => {
                assert!(first.0.is_multiple_of(1 << order.get()), "aligned");
                assert!(self.is_free(first.0 as usize, order), "{first} of {order} had an owner");
                self.owners[Self::span((first, order))].fill(Owner::Block(self.next));
                self.blocks.push((self.next, first, order));
                self.next += 1;
            }
            Err(error) => {
                assert!(!self.has_free(order), "{error}, but a block of order {order} is free");
                assert!(matches!(error, FramesError::Exhausted { .. }));
            }
        }
    }

    /// Frames lose their owner: those that are poisoned go out of use.
    fn release(&mut self, frames: std::ops::Range<usize>) {
        for frame in frames {
            self.owners[frame] = if self.poisoned.contains(&frame) { Owner::Out } else { Owner::Free };
        }
    }

    fn poison(&mut self, number: u32) {
        let (frame, at) = (FrameNumber(number), number as usize);
        let result = self.frames.poison(frame);
        let owner = self.owners.get(at).copied().unwrap_or(Owner::Hole);
        if owner == Owner::Hole {
            return assert_eq!(result, Err(FramesError::Foreign { frame }));
        }
        let poisoned = result.unwrap();
        assert_eq!(poisoned.is_new, self.poisoned.insert(at), "{frame}");
        match owner {
            Owner::Block(serial) => {
                let Hurt::Holder { first, order } = poisoned.hurt else { panic!("{frame}: {poisoned:?}") };
                let span = Self::span((first, order));
                assert!(span.contains(&at), "{frame} is not in the block at {first}");
                match self.blocks.iter().find(|block| block.0 == serial) {
                    Some(block) => assert_eq!((first, order), (block.1, block.2)),
                    None => assert!(self.owners[span].iter().all(|&piece| piece == owner), "a piece of the run"),
                }
            }
            _ => {
                assert_eq!(poisoned.hurt, Hurt::Nobody, "{frame}");
                self.owners[at] = Owner::Out;
            }
        }
    }

    fn give(&mut self, first: FrameNumber, order: Order) {
        self.owners[Self::span((first, order))].fill(Owner::Block(self.next));
        self.blocks.push((self.next, first, order));
        self.next += 1;
    }

    fn alloc_at(&mut self, frame: FrameNumber, order: Order) {
        let is_aligned = frame.0.is_multiple_of(1 << order.get());
        let may = is_aligned && self.is_free(frame.0 as usize, order);
        let result = self.frames.alloc_at(frame, order);
        assert_eq!(result.is_ok(), may, "{frame} of {order}: {result:?}");
        if may {
            self.give(frame, order);
        }
    }

    fn alloc_highest(&mut self, order: Order) {
        let starts = (0..self.owners.len()).step_by(1 << order.get());
        let highest = starts.rev().find(|&first| self.is_free(first, order)).map(|first| first as u32);
        let given = self.frames.alloc_highest(order);
        assert_eq!(given.ok(), highest.map(FrameNumber), "{given:?}");
        if let Ok(first) = given {
            self.give(first, order);
        }
    }

    fn alloc_contiguous(&mut self, count: u64) {
        let align = (count as usize).next_power_of_two().min(1024);
        let fits = |first: usize| {
            let end = first + count as usize;
            end <= self.owners.len() && self.owners[first..end].iter().all(|&owner| owner == Owner::Free)
        };
        match self.frames.alloc_contiguous(FrameCount(count)) {
            Ok(run) => {
                let first = run.first.0 as usize;
                assert_eq!(run.count.0, count);
                assert!(first.is_multiple_of(align) && fits(first), "{run:?}");
                self.owners[first..first + count as usize].fill(Owner::Block(self.next));
                self.runs.push((self.next, run));
                self.next += 1;
            }
            Err(error) => {
                // A run does not go over the border of two ranges, nor does one that is free here: there is a hole.
                let ranges: Vec<_> = self.frames.ranges().collect();
                let is_inside = |first: usize| {
                    ranges.iter().any(|range| {
                        range.contains(FrameNumber(first as u32))
                            && range.contains(FrameNumber((first + count as usize - 1) as u32))
                    })
                };
                let missed = (0..self.owners.len()).step_by(align).find(|&first| fits(first) && is_inside(first));
                assert_eq!(missed, None, "{error}");
            }
        }
    }

    fn free_contiguous(&mut self, at: usize) {
        let (_, run) = self.runs.swap_remove(at);
        let end = (run.first.0 as usize) + run.count.0 as usize;
        if !matches!(self.owners.get(end), Some(Owner::Block(_))) {
            let longer = FrameRange { count: FrameCount(run.count.0 + 1), ..run };
            let before = self.frames.free();
            assert!(self.frames.free_contiguous(longer).is_err());
            assert_eq!(self.frames.free(), before);
        }
        self.frames.free_contiguous(run).unwrap();
        assert!(self.frames.free_contiguous(run).is_err(), "double free");
        self.release(run.first.0 as usize..end);
    }

    fn batch(&mut self, wanted: usize) {
        let mut batch = vec![FrameNumber(u32::MAX); wanted];
        let free = self.frames.free().0 as usize;
        let count = self.frames.alloc_batch(&mut batch);
        assert_eq!(count, wanted.min(free), "what is free is given");
        for &frame in &batch[..count] {
            assert!(self.is_free(frame.0 as usize, Order::ZERO), "{frame} had an owner");
            self.owners[frame.0 as usize] = Owner::Block(self.next);
        }
        batch.truncate(count);
        if count > 1 {
            // The second of two equal ones is refused, and all behind it.
            let twice = [batch[0], batch[0], batch[1]];
            let error = self.frames.free_batch(&twice).unwrap_err();
            assert_eq!(error, (1, FramesError::NotAllocated { frame: batch[0] }));
            batch.swap_remove(0);
        }
        // What is poisoned while it is in the batch goes out of use with it.
        for frame in batch.iter().step_by(37) {
            let hurt = self.frames.poison(*frame).unwrap().hurt;
            assert_eq!(hurt, Hurt::Holder { first: *frame, order: Order::ZERO });
            self.poisoned.insert(frame.0 as usize);
        }
        self.frames.free_batch(&batch).unwrap();
        let serial = self.next;
        let held = |owner: &Owner| *owner == Owner::Block(serial);
        let given: Vec<usize> = (0..self.owners.len()).filter(|&frame| held(&self.owners[frame])).collect();
        given.into_iter().for_each(|frame| self.release(frame..frame + 1));
        self.next += 1;
    }

    fn free(&mut self, at: usize) {
        let (_, first, order) = self.blocks.swap_remove(at);
        assert_eq!(self.frames.allocated_order(first), Ok(order));
        self.frames.free_block(first, order).unwrap();
        self.release(Self::span((first, order)));
        assert!(self.frames.free_block(first, order).is_err(), "double free");
    }

    fn free_wrong(&mut self, frame: FrameNumber, order: Order) {
        if let Some(at) = self.blocks.iter().position(|&(_, first, o)| (first, o) == (frame, order)) {
            return self.free(at);
        }
        if self
            .owners
            .get(frame.0 as usize)
            .is_some_and(|owner| self.runs.iter().any(|run| *owner == Owner::Block(run.0)))
        {
            return; // pieces of a run are blocks, too
        }
        let error = self.frames.free_block(frame, order).unwrap_err();
        let expected = match self.owners.get(frame.0 as usize) {
            None | Some(Owner::Hole) => FramesError::Foreign { frame },
            Some(Owner::Free) => FramesError::NotAllocated { frame },
            Some(Owner::Out) => FramesError::Poisoned { frame },
            Some(Owner::Block(serial)) => match self.blocks.iter().find(|block| block.0 == *serial) {
                Some(&(_, first, allocated)) if first == frame => {
                    FramesError::WrongOrder { frame, order, allocated }
                }
                _ => FramesError::NotFirst { frame },
            },
        };
        assert_eq!(error, expected);
    }

    /// What is in use of a range, block by block.
    fn in_use(&self, range: FrameRange) -> Vec<InUse> {
        let mut uses: Vec<InUse> = self
            .blocks
            .iter()
            .filter(|block| range.contains(block.1))
            .map(|&(_, first, order)| InUse { first, count: order.frames(), order: Some(order) })
            .collect();
        // Runs are made of blocks whose sizes are their own affair.
        for &(_, run) in self.runs.iter().filter(|(_, run)| range.contains(run.first)) {
            let mut at = run.first.0;
            while run.contains(FrameNumber(at)) {
                let order = self.frames.allocated_order(FrameNumber(at)).unwrap();
                uses.push(InUse { first: FrameNumber(at), count: order.frames(), order: Some(order) });
                at += 1 << order.get();
            }
        }
        uses.sort_by_key(|used| used.first);
        uses
    }

    fn remove_range(&mut self, range: FrameRange) {
        let span = range.first.0 as usize..range.first.0 as usize + range.count.0 as usize;
        let is_used = |owner: &&Owner| matches!(owner, Owner::Block(_));
        let used = self.owners[span.clone()].iter().filter(is_used).count() as u64;
        let expected = self.in_use(range);
        assert_eq!(self.frames.in_use(range).collect::<Vec<_>>(), expected);
        match self.frames.remove_range(range.first) {
            Ok((removed, lent)) => {
                assert_eq!((removed, used), (range, 0));
                assert!(lent.is_zero(), "what comes back can be lent again");
                self.owners[span.clone()].fill(Owner::Hole);
                self.poisoned.retain(|frame| !span.contains(frame));
                let keep = self.owners.iter().rposition(|&owner| owner != Owner::Hole).map_or(0, |last| last + 1);
                self.owners.truncate(keep);
            }
            Err(error) => {
                let (first, lowest) = (range.first, expected[0].first);
                assert_eq!(error, FramesError::RangeInUse { first, used: FrameCount(used), lowest });
            }
        }
    }

    /// The statistics against a count of the frames.
    fn check(&self) {
        let count = |pick: fn(&Owner) -> bool| self.owners.iter().filter(|owner| pick(owner)).count() as u64;
        assert_eq!(self.frames.free().0, count(|&owner| owner == Owner::Free));
        assert_eq!(self.frames.capacity().0, count(|&owner| owner != Owner::Hole));
        assert_eq!(self.frames.used().0, count(|owner| matches!(owner, Owner::Block(_))));
        assert_eq!(self.frames.poisoned().0, count(|&owner| owner == Owner::Out));
        assert!(self.frames.poisoned_frames().map(|frame| frame.0 as usize).eq(self.poisoned.iter().copied()));
        let mut blocks = [0; Order::COUNT];
        let mut at = 0;
        while at < self.owners.len() {
            let fits = |o: &Order| at.is_multiple_of(1 << o.get()) && self.is_free(at, *o);
            match Order::all().rev().find(fits) {
                Some(order) => {
                    blocks[order.index()] += 1;
                    at += 1 << order.get();
                }
                None => at += 1,
            }
        }
        assert_eq!(self.frames.count_free_blocks(), blocks);
        assert_eq!(self.frames.largest_free(), Order::all().rev().find(|o| blocks[o.index()] > 0));
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Alloc(k) => self.alloc(order(k)),
            Op::AllocAt(frame, k) => self.alloc_at(FrameNumber(frame), order(k)),
            Op::AllocHighest(k) => self.alloc_highest(order(k)),
            Op::Free(at) if !self.blocks.is_empty() => self.free(at.index(self.blocks.len())),
            Op::FreeWrong(frame, k) => self.free_wrong(FrameNumber(frame), order(k)),
            Op::Contiguous(count) => self.alloc_contiguous(count),
            Op::FreeContiguous(at) if !self.runs.is_empty() => self.free_contiguous(at.index(self.runs.len())),
            Op::Batch(wanted) => self.batch(wanted),
            Op::Poison(frame) => self.poison(frame),
            Op::PoisonRun(first, count) => (first..first + count).for_each(|frame| self.poison(frame)),
            Op::AddRange(count) if self.owners.len() < 8192 => self.add_range(count),
            Op::RemoveRange(at) if self.frames.ranges().len() > 0 => {
                let mut ranges = self.frames.ranges();
                let range = ranges.nth(at.index(ranges.len())).unwrap();
                drop(ranges);
                self.remove_range(range);
            }
            _ => {}
        }
    }
}

proptest! {
    #[test]
    fn every_frame_has_at_most_one_owner_and_free_means_allocatable(
        ranges in prop::collection::vec(1u64..2100, 0..4),
        ops in prop::collection::vec(op(), 0..400),
    ) {
        let mut oracle = Oracle::new(&ranges);
        for (n, op) in ops.into_iter().enumerate() {
            oracle.step(op);
            if n % 16 == 0 {
                oracle.check();
            }
        }
        oracle.check();
    }

    #[test]
    fn a_nearly_full_node_gives_its_last_block(
        count in 1u64..3000, holes in prop::collection::vec(any::<prop::sample::Index>(), 1..40),
        orders in prop::collection::vec(0u8..=10, 1..40),
    ) {
        let mut oracle = Oracle::new(&[count]);
        while oracle.has_free(Order::ZERO) {
            let largest = oracle.frames.largest_free().unwrap();
            oracle.alloc(largest.min(order(orders[oracle.blocks.len() % orders.len()])));
        }
        for hole in holes {
            if !oracle.blocks.is_empty() {
                oracle.free(hole.index(oracle.blocks.len()));
            }
            oracle.check();
        }
        for k in orders {
            oracle.alloc(order(k));
        }
        oracle.check();
    }

    #[test]
    fn what_is_freed_in_any_order_becomes_whole_again(
        count in 1u64..5000, orders in prop::collection::vec(0u8..=10, 1..200), picks: Vec<prop::sample::Index>,
    ) {
        let mut oracle = Oracle::new(&[count]);
        let whole = oracle.frames.count_free_blocks();
        orders.into_iter().for_each(|k| oracle.alloc(order(k)));
        let mut picks = picks.iter().cycle();
        while !oracle.blocks.is_empty() {
            oracle.free(picks.next().map_or(0, |pick| pick.index(oracle.blocks.len())));
        }
        prop_assert_eq!(oracle.frames.count_free_blocks(), whole);
    }
}

#[test]
fn a_block_that_ends_behind_the_node_names_a_frame_that_is_not_the_nodes() {
    let mut frames = Frames::new();
    frames.add_range(FrameCount(1000), lent(1000)).unwrap();
    let is_foreign = |error| match error {
        FramesError::Foreign { frame } => frames.ranges().all(|range| !range.contains(frame)),
        _ => false,
    };
    assert!(is_foreign(frames.alloc_at(FrameNumber(992), order(4)).unwrap_err()));
    let run = FrameRange { first: FrameNumber(996), count: FrameCount(8) };
    assert!(is_foreign(frames.free_contiguous(run).unwrap_err()));
}

#[test]
fn a_cache_that_holds_all_that_is_free_gives_a_block_of_any_order() {
    for wanted in [0, 1, 3, 6] {
        let mut frames = Frames::new();
        frames.add_range(FrameCount(64), lent(64)).unwrap();
        let mut cache = Cache::new();
        let frame = cache.alloc(&frames).unwrap();
        cache.free(&frames, frame).unwrap();
        assert_eq!(cache.len(), FrameCount(64), "it took the whole row");
        let block = cache.alloc_block(&frames, order(wanted)).unwrap();
        assert_eq!(frames.allocated_order(block), Ok(order(wanted)));
    }
}
