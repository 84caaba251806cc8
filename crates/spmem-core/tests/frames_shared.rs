//! The frame allocator used by several threads at once, against an oracle that knows the owner of each frame: a word a
//! frame, claimed by who was given it and given up before it is freed.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking; its numbers are small"
)]

use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use spmem_core::frames::{Cache, FrameRange, Frames, FramesError, Metadata, PerCpu};
use spmem_core::units::{FrameCount, FrameNumber, Order};

const THREADS: u32 = 4;
/// Two zones and a little, and few enough to run full.
const FRAMES: u64 = (1 << 18) + 700;

struct Node {
    frames: Frames,
    caches: PerCpu,
    owners: Vec<AtomicU32>,
}

impl Node {
    fn new(count: u64) -> Self {
        let mut frames = Frames::with_relax(std::thread::yield_now);
        frames.add_range(FrameCount(count), Metadata::from_heap(FrameCount(count)).unwrap()).unwrap();
        let owners = (0..count).map(|_| AtomicU32::new(0)).collect();
        Self { frames, caches: PerCpu::new(2).unwrap(), owners }
    }

    fn claim(&self, first: FrameNumber, count: u64, owner: u32) {
        for frame in &self.owners[first.0 as usize..first.0 as usize + count as usize] {
            assert_eq!(frame.swap(owner, Relaxed), 0, "a frame of block {first} has two owners");
        }
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
        let most = largest.min(random.below(11) + 1);
        let order = Order::new(random.below(most) as u8).unwrap();
        let taken = match random.below(8) {
            0 => frames.alloc(order).map(|first| Held::Block(first, order)),
            1 | 2 => caches.alloc(frames, random.below(3) as usize, order).map(|first| Held::Block(first, order)),
            3 => cache.alloc(frames).map(Held::Cached),
            4 => {
                let mut batch = [FrameNumber(0); 100];
                let count = frames.alloc_batch(&mut batch[..1 + random.below(100) as usize]);
                for &frame in &batch[..count] {
                    node.claim(frame, 1, owner);
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
            Ok(Held::Block(first, order)) => node.claim(first, order.frames().0, owner),
            Ok(Held::Cached(first)) => node.claim(first, 1, owner),
            Ok(Held::Run(run)) => node.claim(run.first, run.count.0, owner),
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
            if random.below(2) == 0 {
                frames.free_block(first, order).unwrap();
            } else {
                caches.free_block(frames, random.below(3) as usize, first, order).unwrap();
            }
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

fn run(count: u64, steps: usize, largest: u32) {
    let node = Node::new(count);
    let whole = node.frames.count_free_blocks();
    let barrier = Barrier::new(THREADS as usize);
    std::thread::scope(|scope| {
        for owner in 1..=THREADS {
            let (node, barrier) = (&node, &barrier);
            scope.spawn(move || {
                barrier.wait();
                live(node, owner, steps, largest);
            });
        }
    });
    node.caches.drain(&node.frames);
    assert_eq!(node.frames.free(), FrameCount(count));
    assert_eq!(node.frames.count_free_blocks(), whole, "what was freed is whole again");
}

#[test]
fn no_frame_has_two_owners_among_threads_that_use_every_path() {
    run(FRAMES, 20_000, 11);
}

#[test]
fn no_frame_has_two_owners_on_a_node_that_is_always_nearly_full() {
    for count in [64, 700, 1024, 5000] {
        run(count, 20_000, 6);
    }
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
