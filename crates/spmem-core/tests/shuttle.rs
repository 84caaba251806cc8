//! The whole frame allocator on thousands of random schedules: three threads, all paths, a node that is nearly full, and an
//! oracle that knows the owner of every frame.
//!
//! The source is the library's own, built once more with shuttle's atomics in place of the processor's; each access of one is
//! a point where another thread may go on. `tests/loom.rs` tries every order of a few operations, and weak memory, too.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

extern crate alloc;

#[path = "model/shuttle_sync.rs"]
mod sync;
#[path = "../src"]
#[allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    clippy::all,
    clippy::pedantic,
    reason = "the library's own source"
)]
mod source {
    pub(crate) mod frames;
    pub(crate) mod units;
}
use source::{frames, units};

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use frames::{Cache, Frames, Metadata, PerCpu};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use units::{FrameCount, FrameNumber, Order};

/// So few that they run out; not so few that nothing else happens.
const FRAMES: FrameCount = FrameCount(2048);
const THREADS: u32 = 3;
const STEPS: usize = 25;
const SCHEDULES: usize = 2000;
const NOBODY: u32 = 0;

/// Who owns each frame, and since when it is known to be poisoned.
struct Oracle {
    clock: AtomicU32,
    owners: Vec<AtomicU32>,
    /// 0: not.
    poisoned: Vec<AtomicU32>,
}

impl Oracle {
    fn new() -> Self {
        let none = || (0..FRAMES.0).map(|_| AtomicU32::new(NOBODY)).collect();
        Self { clock: AtomicU32::new(1), owners: none(), poisoned: none() }
    }

    fn now(&self) -> u32 {
        self.clock.fetch_add(1, Relaxed)
    }

    /// Since `asked` the owner has asked for it.
    fn give(&self, first: FrameNumber, order: Order, owner: u32, asked: u32) {
        for frame in first.0 as usize..first.0 as usize + (1 << order.get()) {
            assert_eq!(self.owners[frame].swap(owner, Relaxed), NOBODY, "frame {frame} has two owners");
            let poisoned = self.poisoned[frame].load(Relaxed);
            assert!(poisoned == 0 || poisoned > asked, "frame {frame} was given out after it was poisoned");
        }
    }

    fn take(&self, first: FrameNumber, order: Order, owner: u32) {
        for frame in first.0 as usize..first.0 as usize + (1 << order.get()) {
            assert_eq!(self.owners[frame].swap(NOBODY, Relaxed), owner);
        }
    }
}

/// One thread's blocks and its steps.
struct Worker {
    number: u32,
    frames: Arc<Frames>,
    slots: Arc<PerCpu>,
    oracle: Arc<Oracle>,
    cache: Cache,
    held: Vec<(FrameNumber, Order)>,
    /// When its step began.
    asked: u32,
}

impl Worker {
    fn got(&mut self, first: FrameNumber, order: Order) {
        self.oracle.give(first, order, self.number, self.asked);
        self.held.push((first, order));
    }

    fn step(&mut self) {
        let mut random = thread_rng();
        self.asked = self.oracle.now();
        match random.gen_range(0..12) {
            0..3 => {
                let order = Order::new([0, 0, 0, 1, 3, 5, 6, 9, 10][random.gen_range(0..9)]).unwrap();
                if let Ok(first) = self.slots.alloc(&self.frames, random.gen_range(0..2), order) {
                    self.got(first, order);
                }
            }
            3..5 => {
                if let Ok(frame) = self.cache.alloc(&self.frames) {
                    self.got(frame, Order::ZERO);
                }
            }
            5 => {
                let mut batch = [FrameNumber(0); 20];
                let count = self.frames.alloc_batch(&mut batch);
                batch[..count].iter().for_each(|&frame| self.got(frame, Order::ZERO));
            }
            6 => {
                let singles = self.held.extract_if(.., |(_, order)| *order == Order::ZERO);
                let batch: Vec<FrameNumber> = singles.take(15).map(|(frame, _)| frame).collect();
                batch.iter().for_each(|&frame| self.oracle.take(frame, Order::ZERO, self.number));
                self.frames.free_batch(&batch).unwrap();
            }
            7 => {
                let frame = FrameNumber(random.gen_range(0..2048));
                let _ = self.frames.poison(frame).unwrap();
                let now = self.oracle.now();
                let _ = self.oracle.poisoned[frame.0 as usize].compare_exchange(0, now, Relaxed, Relaxed);
            }
            _ if self.held.is_empty() => {}
            at => {
                let (first, order) = self.held.swap_remove(random.gen_range(0..self.held.len()));
                self.oracle.take(first, order, self.number);
                match (order, at) {
                    (Order::ZERO, 8) => self.cache.free(&self.frames, first).unwrap(),
                    (_, 9..11) => self.frames.free_block(first, order).unwrap(),
                    _ => self.slots.free_block(&self.frames, random.gen_range(0..2), first, order).unwrap(),
                }
            }
        }
    }
}

fn run(lent: Metadata) {
    let mut frames = Frames::with_relax(thread::yield_now);
    frames.add_range(FRAMES, lent).unwrap();
    let (frames, slots) = (Arc::new(frames), Arc::new(PerCpu::new(2).unwrap()));
    let oracle = Arc::new(Oracle::new());
    let workers: Vec<_> = (1..=THREADS)
        .map(|number| {
            let (frames, slots, oracle) = (Arc::clone(&frames), Arc::clone(&slots), Arc::clone(&oracle));
            thread::spawn(move || {
                let (cache, held) = (Cache::new(), Vec::new());
                let mut worker = Worker { number, frames, slots, oracle, cache, held, asked: 0 };
                (0..STEPS).for_each(|_| worker.step());
                worker.cache.drain(&worker.frames);
                worker.held
            })
        })
        .collect();
    let held: Vec<_> = workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect();
    check(&frames, &slots, &oracle, &held);
    // Everything comes back but what is poisoned, once.
    for (first, order) in held {
        frames.free_block(first, order).unwrap();
    }
    slots.drain(&frames);
    let poisoned = oracle.poisoned.iter().filter(|poisoned| poisoned.load(Relaxed) != 0).count() as u64;
    assert_eq!((frames.poisoned().0, frames.free().0, frames.used().0), (poisoned, FRAMES.0 - poisoned, 0));
    let in_blocks = (0..).zip(frames.count_free_blocks()).map(|(order, count)| count << order);
    assert_eq!(in_blocks.sum::<u64>(), frames.free().0, "what is free can be allocated");
    let mut frames = Arc::into_inner(frames).unwrap();
    let (_, lent) = frames.remove_range(FrameNumber(0)).unwrap();
    assert!(lent.is_zero());
}

/// With all threads gone: what is held is held once, and the counts say so.
fn check(frames: &Frames, slots: &PerCpu, oracle: &Oracle, held: &[(FrameNumber, Order)]) {
    let mut by_first = BTreeMap::new();
    for &(first, order) in held {
        assert!(by_first.insert(first, order).is_none());
        assert_eq!(frames.allocated_order(first), Ok(order));
    }
    let owned = oracle.owners.iter().filter(|owner| owner.load(Relaxed) != NOBODY).count() as u64;
    let counted: u64 = by_first.values().map(|order| order.frames().0).sum();
    assert_eq!(owned, counted);
    assert_eq!(frames.used().0, counted + slots.len().0);
}

#[test]
fn no_frame_has_two_owners_on_any_of_thousands_of_schedules() {
    let lent = Mutex::new(Metadata::from_heap(FRAMES).unwrap());
    shuttle::check_random(move || run(*lent.lock().unwrap()), SCHEDULES);
}
