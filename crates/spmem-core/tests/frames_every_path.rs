//! The frame allocator by one thread through every path at random: zones, two caches and two slots before one node, against
//! an oracle that knows who owns each frame, with what was freed freed again by another path, and poison.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use spmem_core::frames::{Cache, Frames, FramesError, Hurt, Metadata, PerCpu};
use spmem_core::units::{FrameCount, FrameNumber, Order};

const SEEDS: u64 = 200;
const STEPS: usize = 1500;
const ORDERS: [u8; 8] = [0, 0, 9, 9, 9, 10, 3, 1];

/// xorshift
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % bound
    }
}

type Block = (FrameNumber, Order);

struct Node {
    frames: Frames,
    slots: PerCpu,
    caches: [Cache; 2],
    held: Vec<Block>,
    freed: Vec<Block>,
    is_owned: Vec<bool>,
    is_poisoned: Vec<bool>,
}

fn frames_of((first, order): Block) -> std::ops::Range<usize> {
    first.0 as usize..first.0 as usize + (1 << order.get())
}

fn node(count: u64) -> Frames {
    let mut frames = Frames::new();
    frames.add_range(FrameCount(count), Metadata::from_heap(FrameCount(count)).unwrap()).unwrap();
    frames
}

impl Node {
    fn new(count: usize) -> Self {
        Self {
            frames: node(count as u64),
            slots: PerCpu::new(2).unwrap(),
            caches: [Cache::new(), Cache::new()],
            held: Vec::new(),
            freed: Vec::new(),
            is_owned: vec![false; count],
            is_poisoned: vec![false; count],
        }
    }

    fn alloc(&mut self, random: &mut Random, order: Order) {
        let (frames, path) = (&self.frames, random.below(4));
        let given = match path {
            0 => frames.alloc(order),
            1 => self.slots.alloc(frames, random.below(3), order),
            2 => self.caches[random.below(2)].alloc_block(frames, order),
            _ if order == Order::ZERO => self.caches[random.below(2)].alloc(frames),
            _ => frames.alloc_highest(order),
        };
        let first = match given {
            Ok(first) => first,
            Err(FramesError::Exhausted { .. }) => {
                let counts = frames.count_free_blocks();
                assert!(counts[order.index()..].iter().all(|&free| free == 0), "{counts:?} are free of {order}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        for frame in frames_of((first, order)) {
            assert!(!self.is_owned[frame], "frame {frame} has two owners");
            assert!(!self.is_poisoned[frame], "frame {frame} came back after it was poisoned");
            self.is_owned[frame] = true;
        }
        let given = frames_of((first, order));
        self.freed.retain(|&old| frames_of(old).end <= given.start || given.end <= frames_of(old).start);
        self.held.push((first, order));
    }

    fn free_by(&mut self, random: &mut Random, (first, order): Block) -> Result<(), FramesError> {
        match random.below(3) {
            0 => self.frames.free_block(first, order),
            1 => self.slots.free_block(&self.frames, random.below(3), first, order),
            _ => self.caches[random.below(2)].free_block(&self.frames, first, order),
        }
    }

    fn free(&mut self, random: &mut Random) {
        if self.held.is_empty() {
            return;
        }
        let block = self.held.swap_remove(random.below(self.held.len()));
        self.is_owned[frames_of(block)].fill(false);
        self.free_by(random, block).unwrap();
        self.freed.push(block);
    }

    /// Also with a wrong order, and to another node.
    fn free_again(&mut self, random: &mut Random, other: &Frames) {
        if self.freed.is_empty() {
            return;
        }
        let (first, order) = self.freed[random.below(self.freed.len())];
        assert!(self.free_by(random, (first, order)).is_err(), "a double free was taken");
        let wrong = Order::new((order.get() + 1) % 11).unwrap();
        assert!(self.free_by(random, (first, wrong)).is_err());
        assert!(self.slots.free_block(other, 0, first, order).is_err());
    }

    fn poison(&mut self, frame: usize) {
        let hurt = self.frames.poison(FrameNumber(u32::try_from(frame).unwrap())).unwrap().hurt;
        self.is_poisoned[frame] = true;
        match hurt {
            Hurt::Holder { first, order } => assert!(self.held.contains(&(first, order))),
            Hurt::Cached | Hurt::Nobody => assert!(!self.is_owned[frame]),
        }
    }

    /// Gives all back: what is not poisoned is free, and the metadata as it was lent.
    fn end(mut self) {
        for (first, order) in std::mem::take(&mut self.held) {
            self.slots.free_block(&self.frames, 0, first, order).unwrap();
        }
        self.slots.drain(&self.frames);
        self.caches.iter_mut().for_each(|cache| cache.drain(&self.frames));
        let count = |is: bool| self.is_poisoned.iter().filter(|&&poisoned| poisoned == is).count() as u64;
        let frames = &self.frames;
        assert_eq!((frames.used().0, frames.free().0, frames.poisoned().0), (0, count(false), count(true)));
        let (_, lent) = self.frames.remove_range(FrameNumber(0)).unwrap();
        assert!(lent.is_zero());
    }
}

#[test]
fn no_frame_has_two_owners_whatever_paths_it_takes_and_no_double_free_is_taken() {
    let other = node(2048);
    for seed in 1..=SEEDS {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let count = 4096 + random.below(3) * 100;
        let mut node = Node::new(count);
        for _ in 0..STEPS {
            let order = Order::new(ORDERS[random.below(ORDERS.len())]).unwrap();
            match random.below(12) {
                0..=4 => node.alloc(&mut random, order),
                5..=8 => node.free(&mut random),
                9 => node.free_again(&mut random, &other),
                10 if random.below(6) == 0 => node.slots.drain(&node.frames),
                10 if random.below(3) == 0 => node.caches[random.below(2)].drain(&node.frames),
                11 if seed % 2 == 0 && random.below(10) == 0 => node.poison(random.below(count)),
                _ => {}
            }
        }
        println!("seed {seed}");
        node.end();
    }
}
