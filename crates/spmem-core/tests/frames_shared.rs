//! The frame allocator used by several threads at once, against an oracle that knows the owner of each frame: a word a
//! frame, claimed by who was given it and given up before it is freed.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking; its numbers are small"
)]

use std::sync::Barrier;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use spmem_core::frames::{Cache, FrameRange, Frames, FramesError, Hurt, Metadata, PerCpu};
use spmem_core::units::{FrameCount, FrameNumber, Order};

const THREADS: u32 = 4;
/// Two zones and a little, and few enough to run full.
const FRAMES: u64 = (1 << 18) + 700;

struct Node {
    frames: Frames,
    caches: PerCpu,
    owners: Vec<AtomicU32>,
    /// When each frame's poison was reported, 0 for never; and what time it is.
    poisoned: Vec<AtomicU32>,
    time: AtomicU32,
    /// Steps that all threads together have gone.
    steps: AtomicU32,
}

impl Node {
    fn new(count: u64) -> Self {
        let mut frames = Frames::with_relax(std::thread::yield_now);
        frames.add_range(FrameCount(count), Metadata::from_heap(FrameCount(count)).unwrap()).unwrap();
        let zeros = || (0..count).map(|_| AtomicU32::new(0)).collect();
        let (owners, poisoned) = (zeros(), zeros());
        Self {
            frames,
            caches: PerCpu::new(2).unwrap(),
            owners,
            poisoned,
            time: AtomicU32::new(1),
            steps: AtomicU32::new(0),
        }
    }

    /// What was asked for at `since` was given.
    fn claim(&self, first: FrameNumber, count: u64, owner: u32, since: u32) {
        let span = first.0 as usize..first.0 as usize + count as usize;
        for (frame, poisoned) in self.owners[span.clone()].iter().zip(&self.poisoned[span]) {
            assert_eq!(frame.swap(owner, Relaxed), 0, "a frame of block {first} has two owners");
            let when = poisoned.load(SeqCst);
            assert!(when == 0 || when >= since, "a frame of block {first} came back after it was poisoned");
        }
    }

    /// Poisons a frame, and notes when that was reported.
    fn poison(&self, frame: FrameNumber) -> Hurt {
        let poisoned = self.frames.poison(frame).unwrap();
        let now = self.time.fetch_add(1, SeqCst);
        if poisoned.is_new {
            self.poisoned[frame.0 as usize].store(now, SeqCst);
        }
        poisoned.hurt
    }

    fn give_up(&self, first: FrameNumber, count: u64, owner: u32) {
        for frame in &self.owners[first.0 as usize..first.0 as usize + count as usize] {
            assert_eq!(frame.swap(0, Relaxed), owner, "a frame of block {first} changed its owner");
        }
    }
}

/// What a thread holds.
enum Held {
    Block(FrameNumber, Order),
    /// From the owner's cache.
    Cached(FrameNumber),
    Run(FrameRange),
}

/// One thread's life: everything the allocator can do, at random, then all of it back.
fn live(node: &Node, owner: u32, steps: usize, largest: u32) {
    let Node { frames, caches, .. } = node;
    let (mut random, mut held, mut cache) = (Random(u64::from(owner) * 77 + 1), Vec::new(), Cache::new());
    for _ in 0..steps {
        node.steps.fetch_add(1, Relaxed);
        let most = largest.min(random.below(11) + 1);
        let order = Order::new(random.below(most) as u8).unwrap();
        let since = node.time.load(SeqCst);
        let taken = match random.below(8) {
            0 if random.below(2) == 0 => cache.alloc_block(frames, order).map(|first| Held::Block(first, order)),
            0 => frames.alloc(order).map(|first| Held::Block(first, order)),
            1 | 2 => caches.alloc(frames, random.below(3) as usize, order).map(|first| Held::Block(first, order)),
            3 => cache.alloc(frames).map(Held::Cached),
            4 => {
                let mut batch = [FrameNumber(0); 100];
                let count = frames.alloc_batch(&mut batch[..1 + random.below(100) as usize]);
                for &frame in &batch[..count] {
                    node.claim(frame, 1, owner, since);
                    node.give_up(frame, 1, owner);
                }
                frames.free_batch(&batch[..count]).unwrap();
                continue;
            }
            5 if random.below(50) == 0 => {
                frames.alloc_contiguous(FrameCount(1 + u64::from(random.below(3000)))).map(Held::Run)
            }
            _ => {
                if !held.is_empty() {
                    release(
                        node,
                        owner,
                        held.swap_remove(random.below(held.len() as u32) as usize),
                        &mut cache,
                        &mut random,
                    );
                }
                continue;
            }
        };
        match taken {
            Ok(Held::Block(first, order)) => node.claim(first, order.frames().0, owner, since),
            Ok(Held::Cached(first)) => node.claim(first, 1, owner, since),
            Ok(Held::Run(run)) => node.claim(run.first, run.count.0, owner, since),
            Err(error) => {
                assert!(matches!(error, FramesError::Exhausted { .. }), "{error}");
                // So full that others starve: some of it back.
                for _ in 0..held.len() / 2 {
                    release(node, owner, held.pop().unwrap(), &mut cache, &mut random);
                }
                continue;
            }
        }
        held.push(taken.unwrap());
    }
    while let Some(one) = held.pop() {
        release(node, owner, one, &mut cache, &mut random);
    }
    cache.drain(frames);
}

fn release(node: &Node, owner: u32, held: Held, cache: &mut Cache, random: &mut Random) {
    let Node { frames, caches, .. } = node;
    match held {
        Held::Block(first, order) => {
            node.give_up(first, order.frames().0, owner);
            match random.below(4) {
                0 | 1 => caches.free_block(frames, random.below(3) as usize, first, order),
                2 => cache.free_block(frames, first, order),
                _ => frames.free_block(first, order),
            }
            .unwrap();
        }
        Held::Cached(first) => {
            node.give_up(first, 1, owner);
            cache.free(frames, first).unwrap();
        }
        Held::Run(run) => {
            node.give_up(run.first, run.count.0, owner);
            frames.free_contiguous(run).unwrap();
        }
    }
}

/// Runs the threads, beside them one that poisons so many frames: what is left of the node.
fn run(count: u64, steps: usize, largest: u32, poisons: u32) -> Node {
    let node = Node::new(count);
    let barrier = Barrier::new(THREADS as usize + 1);
    let living = AtomicU32::new(THREADS);
    std::thread::scope(|scope| {
        for owner in 1..=THREADS {
            let (node, barrier, living) = (&node, &barrier, &living);
            scope.spawn(move || {
                barrier.wait();
                live(node, owner, steps, largest);
                living.fetch_sub(1, SeqCst);
            });
        }
        let mut random = Random(99);
        barrier.wait();
        for number in 0..poisons {
            // Spread over the lives of the others.
            let due = u64::from(number) * steps as u64 * u64::from(THREADS) / u64::from(poisons);
            while living.load(SeqCst) > 0 && u64::from(node.steps.load(Relaxed)) < due {
                std::thread::yield_now();
            }
            node.poison(FrameNumber(random.below(count as u32)));
        }
    });
    node.caches.drain(&node.frames);
    node
}

fn run_without_poison(count: u64, steps: usize, largest: u32) {
    let whole = Node::new(count).frames.count_free_blocks();
    let node = run(count, steps, largest, 0);
    assert_eq!(node.frames.free(), FrameCount(count));
    assert_eq!(node.frames.count_free_blocks(), whole, "what was freed is whole again");
}

#[test]
fn no_frame_has_two_owners_among_threads_that_use_every_path() {
    run_without_poison(FRAMES, 20_000, 11);
}

#[test]
fn no_frame_has_two_owners_on_a_node_that_is_always_nearly_full() {
    for count in [64, 700, 1024, 5000] {
        run_without_poison(count, 20_000, 6);
    }
}

#[test]
fn poison_at_any_time_hurts_no_frame_but_its_own_and_no_poisoned_frame_comes_back() {
    for (count, poisons) in [(64, 20), (700, 300), (1024, 1024), (5000, 1000), (FRAMES, 5000)] {
        let mut node = run(count, 20_000, if count < 10_000 { 6 } else { 11 }, poisons);
        let dead: Vec<u32> = (0..count as u32).filter(|&f| node.poisoned[f as usize].load(Relaxed) != 0).collect();
        assert!(!dead.is_empty());
        assert!(node.frames.poisoned_frames().map(|frame| frame.0).eq(dead.iter().copied()));
        // Nobody has any of them: all are out of use, and all others are free.
        assert_eq!(node.frames.poisoned(), FrameCount(dead.len() as u64));
        assert_eq!((node.frames.used(), node.frames.free().0), (FrameCount(0), count - dead.len() as u64));
        for &frame in &dead {
            let frame = FrameNumber(frame);
            assert_eq!(node.poison(frame), Hurt::Nobody);
            assert_eq!(node.frames.free_block(frame, Order::ZERO), Err(FramesError::Poisoned { frame }));
        }
        let since = node.time.load(SeqCst);
        let all: Vec<FrameNumber> = std::iter::from_fn(|| node.frames.alloc(Order::ZERO).ok()).collect();
        assert_eq!(all.len() as u64, count - dead.len() as u64, "free means allocatable");
        all.iter().for_each(|&frame| node.claim(frame, 1, 1, since));
        node.frames.free_batch(&all).unwrap();
        let range = node.frames.ranges().next().unwrap();
        assert!(node.frames.in_use(range).next().is_none());
        let (_, lent) = node.frames.remove_range(range.first).unwrap();
        assert!(lent.is_zero());
    }
}

/// Poison in all places in which a frame can be while caches are used.
#[test]
fn a_frame_poisoned_in_a_cache_or_by_way_of_one_goes_out_of_use_once() {
    // Miri is some thousand times slower.
    let count = if cfg!(miri) { 128 } else { 1024 };
    let node = Node::new(count);
    let mut cache = Cache::new();
    let held: Vec<FrameNumber> = (0..10).map(|_| cache.alloc(&node.frames).unwrap()).collect();
    let [a, b, c, d] = [held[0], held[1], held[2], held[3]];
    cache.free(&node.frames, a).unwrap();
    // In the cache: freed there, and of the row that it was filled with.
    let rest = FrameNumber(held[9].0 + 1);
    assert_eq!((node.poison(a), node.poison(rest)), (Hurt::Cached, Hurt::Cached));
    // With an owner who frees it to the cache, to the zone, and to a processor's cache.
    for frame in [b, c, d] {
        assert_eq!(node.poison(frame), Hurt::Holder { first: frame, order: Order::ZERO });
    }
    assert_eq!(node.frames.poisoned(), FrameCount(0), "nobody has given one back");
    cache.free(&node.frames, b).unwrap();
    node.frames.free_block(c, Order::ZERO).unwrap();
    node.caches.free_block(&node.frames, 0, d, Order::ZERO).unwrap();
    assert_eq!(node.frames.poisoned(), FrameCount(3));
    for frame in [b, c, d] {
        assert_eq!(node.poison(frame), Hurt::Nobody);
        assert_eq!(cache.free(&node.frames, frame), Err(FramesError::Poisoned { frame }));
    }
    // Nobody gets any of them, though the cache has two.
    let rest: Vec<FrameNumber> = std::iter::from_fn(|| cache.alloc(&node.frames).ok()).collect();
    assert!(rest.iter().all(|frame| node.poisoned[frame.0 as usize].load(Relaxed) == 0));
    assert_eq!((rest.len() as u64, node.frames.poisoned().0), (count - 6 - 5, 5));
    held[4..].iter().chain(&rest).for_each(|&frame| cache.free(&node.frames, frame).unwrap());
    cache.drain(&node.frames);
    assert_eq!((node.frames.free(), node.frames.used()), (FrameCount(count - 5), FrameCount(0)));
}

#[test]
fn what_a_cache_holds_of_a_range_is_listed_apart_from_blocks() {
    let mut node = Node::new(1024);
    let mut cache = Cache::new();
    let frame = cache.alloc(&node.frames).unwrap();
    let range = node.frames.ranges().next().unwrap();
    let listed: Vec<_> = node.frames.in_use(range).map(|used| (used.count.0, used.order)).collect();
    assert_eq!(listed, [(1, Some(Order::ZERO)), (63, None)]);
    let error = FramesError::RangeInUse { first: range.first, used: FrameCount(64), lowest: frame };
    assert_eq!(node.frames.remove_range(range.first).unwrap_err(), error);
    cache.free(&node.frames, frame).unwrap();
    cache.drain(&node.frames);
    assert!(node.frames.remove_range(range.first).is_ok());
}

#[test]
fn a_cache_keeps_two_huge_frames_and_gives_them_back_before_it_fails() {
    let (node, other) = (Node::new(4 << 9), Node::new(1 << 9));
    let mut cache = Cache::new();
    let alloc = |cache: &mut Cache, order| cache.alloc_block(&node.frames, order);
    let held: Vec<FrameNumber> = (0..4).map(|_| alloc(&mut cache, Order::HUGE).unwrap()).collect();
    for (number, &frame) in held.iter().enumerate() {
        cache.free_block(&node.frames, frame, Order::HUGE).unwrap();
        let again = cache.free_block(&node.frames, frame, Order::HUGE);
        assert_eq!(again, Err(FramesError::NotAllocated { frame }));
        let wrong = cache.free_block(&node.frames, frame, Order::ZERO);
        assert!(wrong.is_err(), "{number}");
        // The third sends the first two back.
        assert_eq!(cache.len().0 >> 9, [1, 2, 1, 2][number]);
        assert_eq!(node.frames.free().0 >> 9, [0, 0, 2, 2][number]);
    }
    // One of another node goes there, whatever is held here.
    let foreign = other.frames.alloc(Order::HUGE).unwrap();
    cache.free_block(&other.frames, foreign, Order::HUGE).unwrap();
    assert_eq!((other.frames.free(), cache.len()), (FrameCount(1 << 9), FrameCount(2 << 9)));
    assert_eq!(alloc(&mut cache, Order::HUGE), Ok(held[3]), "what was freed last comes first");
    // Of the 1024 frames of the block the cache holds the upper half, and the rest is free.
    cache.free_block(&node.frames, held[3], Order::HUGE).unwrap();
    let largest = Order::new(10).unwrap();
    assert_eq!(node.frames.alloc(largest), Ok(held[0]));
    assert_eq!(alloc(&mut cache, largest), Ok(held[2]), "what is held is given back first");
    node.frames.free_block(held[2], largest).unwrap();
    // So it is for single frames.
    let huge = [alloc(&mut cache, Order::HUGE).unwrap(), alloc(&mut cache, Order::HUGE).unwrap()];
    huge.iter().for_each(|&frame| cache.free_block(&node.frames, frame, Order::HUGE).unwrap());
    assert_eq!(node.frames.free(), FrameCount(0));
    let all = std::iter::from_fn(|| cache.alloc(&node.frames).ok()).count();
    assert_eq!(all, 1 << 10);
}

#[test]
fn of_a_huge_frame_poisoned_in_a_cache_the_rest_is_used() {
    let node = Node::new(2 << 9);
    let mut cache = Cache::new();
    let huge = cache.alloc_block(&node.frames, Order::HUGE).unwrap();
    cache.free_block(&node.frames, huge, Order::HUGE).unwrap();
    assert_eq!(node.poison(FrameNumber(huge.0 + 7)), Hurt::Cached);
    let next = cache.alloc_block(&node.frames, Order::HUGE).unwrap();
    assert_ne!(next, huge);
    assert_eq!((node.frames.poisoned(), node.frames.free()), (FrameCount(1), FrameCount(511)));
    // With an owner who frees it.
    assert_eq!(node.poison(next), Hurt::Holder { first: next, order: Order::HUGE });
    cache.free_block(&node.frames, next, Order::HUGE).unwrap();
    assert!(cache.is_empty());
    assert_eq!((node.frames.poisoned(), node.frames.free()), (FrameCount(2), FrameCount(1022)));
}

/// The last block of a node goes back and forth between threads: whoever sees it free gets it.
#[test]
fn a_block_that_is_free_is_found_whoever_freed_it_last() {
    let node = Node::new(1024);
    let turn = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (node, turn) = (&node, &turn);
            scope.spawn(move || {
                for round in 0..2000_u32 {
                    while turn.load(std::sync::atomic::Ordering::Acquire) != 2 * round + thread {
                        std::thread::yield_now();
                    }
                    let order = Order::new((round % 11) as u8).unwrap();
                    let all: Vec<_> = std::iter::from_fn(|| node.frames.alloc(order).ok()).collect();
                    assert_eq!(all.len() as u64, 1024 / order.frames().0);
                    for first in all {
                        node.frames.free_block(first, order).unwrap();
                    }
                    turn.store(2 * round + thread + 1, std::sync::atomic::Ordering::Release);
                }
            });
        }
    });
}

/// Of two threads that free the same block at once one is refused.
#[test]
fn a_double_free_by_two_threads_is_refused_once() {
    let node = Node::new(4096);
    let barrier = Barrier::new(2);
    let first = AtomicU32::new(0);
    let refused = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (node, barrier, first, refused) = (&node, &barrier, &first, &refused);
            scope.spawn(move || {
                for round in 0..2000_u32 {
                    let order = Order::new((round % 11) as u8).unwrap();
                    if thread == 0 {
                        first.store(node.frames.alloc(order).unwrap().0, Relaxed);
                    }
                    barrier.wait();
                    if node.frames.free_block(FrameNumber(first.load(Relaxed)), order).is_err() {
                        refused.fetch_add(1, Relaxed);
                    }
                    barrier.wait();
                }
            });
        }
    });
    assert_eq!(refused.load(Relaxed), 2000);
    assert_eq!(node.frames.free(), FrameCount(4096));
}

/// As the one above, through the slots of two processors, without a barrier that sleeps: both come at the same instant.
#[test]
fn a_double_free_through_two_slots_is_refused_once() {
    const ROUNDS: u32 = 50_000;
    let node = Node::new(4096);
    let (arrived, first, taken) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
    let meet = || {
        let turn = arrived.fetch_add(1, SeqCst) / 2;
        let mut spins = 0;
        while arrived.load(SeqCst) / 2 == turn {
            spins += 1;
            if spins % 1000 == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    };
    let free = |slot, order| {
        let is_taken = node.caches.free_block(&node.frames, slot, FrameNumber(first.load(SeqCst)), order).is_ok();
        taken.fetch_add(u32::from(is_taken), SeqCst);
    };
    let order = |round: u32| if round.is_multiple_of(2) { Order::ZERO } else { Order::HUGE };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS {
                meet();
                free(1, order(round));
                meet();
            }
        });
        for round in 0..ROUNDS {
            first.store(node.caches.alloc(&node.frames, 0, order(round)).unwrap().0, SeqCst);
            meet();
            free(0, order(round));
            meet();
            assert_eq!(taken.swap(0, SeqCst), 1, "round {round}");
        }
    });
    node.caches.drain(&node.frames);
    assert_eq!(node.frames.free(), FrameCount(4096));
}

#[test]
fn a_cache_of_another_node_is_refused_and_loses_nothing() {
    let (one, other) = (Node::new(64), Node::new(64));
    let mut cache = Cache::new();
    let frame = cache.alloc(&one.frames).unwrap();
    assert_eq!(cache.alloc(&other.frames), Err(FramesError::OtherCache));
    assert_eq!(cache.free(&other.frames, frame), Err(FramesError::OtherCache));
    cache.free(&one.frames, frame).unwrap();
    assert_eq!(cache.free(&one.frames, frame), Err(FramesError::NotAllocated { frame }));
    cache.drain(&one.frames);
    assert_eq!((one.frames.free(), other.frames.free()), (FrameCount(64), FrameCount(64)));
    assert!(cache.alloc(&other.frames).is_ok(), "an empty cache is nobody's");
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32 % bound
    }
}

#[test]
fn blocks_from_a_zone_of_ones_own_have_one_owner_and_none_is_missed() {
    let mut frames = Frames::new();
    for count in [(1 << 18) + 1024, 1 << 18] {
        frames.add_range(FrameCount(count), Metadata::from_heap(FrameCount(count)).unwrap()).unwrap();
    }
    let (caches, huge) = (PerCpu::new(2).unwrap(), Order::new(9).unwrap());
    let owners: Vec<AtomicU32> = (0..3 << 9).map(|_| AtomicU32::new(0)).collect();
    let owner_of = |first: FrameNumber| &owners[first.0 as usize >> 9];
    let live = |owner: u32| {
        let mut cache = Cache::new();
        for round in 0..20_000 {
            let first = match round % 2 {
                0 => caches.alloc(&frames, owner as usize, huge),
                _ => cache.alloc_block(&frames, huge),
            };
            let first = first.expect("nearly all is free");
            assert_eq!(owner_of(first).swap(owner, Relaxed), 0);
            assert_eq!(owner_of(first).swap(0, Relaxed), owner);
            frames.free_block(first, huge).unwrap();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| live(1));
        scope.spawn(|| live(2));
    });
    // Wherever the hints point now, every block is found.
    let all: Vec<_> = std::iter::from_fn(|| caches.alloc(&frames, 1, huge).ok()).collect();
    assert_eq!(all.len(), (1 << 10) + 2);
    all.iter().for_each(|&first| assert_eq!(owner_of(first).swap(1, Relaxed), 0));
}
