//! What the frame allocator costs and how many huge frames it keeps whole: `cargo run --release -p spmem-core
//! --example frames`. 8 GiB of frames on one node, one thread, medians of 9 runs; nothing of the memory is touched.

use std::hint::black_box;
use std::time::Instant;

use spmem_core::frames::{Cache, Frames, Metadata, PerCpu};
use spmem_core::grant::Rights;
use spmem_core::mm::MemoryManager;
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
use spmem_core::units::{FrameCount, FrameNumber, NodeId, Order};
use spmem_core::wall::{Domain, Request};

const FRAMES: u64 = 8 << 18;
const PAIRS: usize = 1_000_000;

fn main() {
    let mut frames = fresh();
    println!("metadata {:.3} bytes a frame", frames.metadata_bytes() as f64 / FRAMES as f64);
    println!("{:34} {:>7}", "", "ns");
    row("pair order 0, all free", || pairs(&mut frames, Order::ZERO));
    row("pair order 9, all free", || pairs(&mut frames, Order::HUGE));
    let mut half = half_full();
    row("pair order 0, half in use at random", || pairs(&mut half, Order::ZERO));
    let mut blocks = Vec::with_capacity(PAIRS);
    row("bulk order 0, alloc", || {
        blocks.drain(..).for_each(|f| frames.free_block(f, Order::ZERO).expect("allocated"));
        timed(PAIRS, || blocks.extend((0..PAIRS).map_while(|_| frames.alloc(Order::ZERO).ok())))
    });
    blocks.drain(..).for_each(|f| frames.free_block(f, Order::ZERO).expect("allocated"));
    row("bulk order 0, free in random order", || {
        blocks.extend((0..PAIRS).map_while(|_| frames.alloc(Order::ZERO).ok()));
        shuffle(&mut blocks, &mut Random(7));
        timed(PAIRS, || blocks.drain(..).for_each(|f| frames.free_block(f, Order::ZERO).expect("allocated")))
    });
    cached(&frames);
    managed_pairs();
    println!("huge frames recovered {:.1} %", huge_recovery() * 100.0);
}

/// The paths with caches, and batches.
fn cached(frames: &Frames) {
    let mut cache = Cache::new();
    row("pair order 0, owner-cached", || {
        timed(PAIRS, || {
            for _ in 0..PAIRS {
                let frame = cache.alloc(black_box(frames)).expect("free");
                cache.free(frames, black_box(frame)).expect("allocated");
            }
        })
    });
    let mut blocks = Vec::with_capacity(PAIRS);
    row("bulk order 0, owner-cached, alloc", || {
        blocks.drain(..).for_each(|f| cache.free(frames, f).expect("allocated"));
        timed(PAIRS, || blocks.extend((0..PAIRS).map_while(|_| cache.alloc(frames).ok())))
    });
    blocks.drain(..).for_each(|f| cache.free(frames, f).expect("allocated"));
    row("bulk order 0, owner-cached, free in random order", || {
        blocks.extend((0..PAIRS).map_while(|_| cache.alloc(frames).ok()));
        shuffle(&mut blocks, &mut Random(7));
        timed(PAIRS, || blocks.drain(..).for_each(|f| cache.free(frames, f).expect("allocated")))
    });
    cache.drain(frames);
    let caches = PerCpu::new(2).expect("memory");
    row("pair order 0, shared", || {
        timed(PAIRS, || {
            for _ in 0..PAIRS {
                let frame = caches.alloc(black_box(frames), 0, Order::ZERO).expect("free");
                caches.free_block(frames, 0, black_box(frame), Order::ZERO).expect("allocated");
            }
        })
    });
    caches.drain(frames);
    let mut batch = vec![FrameNumber(0); 512];
    row("batch of 512, a frame, alloc + free", || {
        timed(PAIRS, || {
            for _ in 0..PAIRS / 512 {
                assert_eq!(frames.alloc_batch(black_box(&mut batch)), 512);
                frames.free_batch(black_box(&batch)).expect("allocated");
            }
        })
    });
}

/// The same pair through policy, wall, grant and watermark.
fn managed_pairs() {
    let spec = NodeSpec {
        node_type: NodeType::Spm,
        class: Class::Featured,
        services: Services::empty(),
        guard: Guard::Hard,
        owner: "bench".into(),
    };
    let mut mm = MemoryManager::new();
    let owner = mm.register_node(NodeId::ONE, spec.clone()).expect("a fresh node");
    mm.add_range(&owner, &spec, FrameCount(FRAMES), lent()).expect("fits");
    let grant = mm.table_mut().grant(&[&owner], Rights::ALLOC, FrameCount(FRAMES).bytes()).expect("owned");
    let (root, grants) = (Domain::root(), [&grant]);
    let request = Request::on(&root, NodeId::ONE, &grants);
    row("pair order 0 through the manager", || {
        timed(PAIRS, || {
            for _ in 0..PAIRS {
                let block = mm.alloc(black_box(&request), Order::ZERO).expect("free");
                mm.free(black_box(block)).expect("own");
            }
        })
    });
}

/// Fill, free half at random, then 100 rounds of freeing and taking 10 %: free huge frames of those possible.
fn huge_recovery() -> f64 {
    let (mut frames, mut held, mut random) = (fresh(), Vec::new(), Random(1));
    held.extend(std::iter::from_fn(|| frames.alloc(Order::ZERO).ok()));
    shuffle(&mut held, &mut random);
    release(&mut frames, &mut held, FRAMES / 2);
    for _ in 0..100 {
        shuffle(&mut held, &mut random);
        release(&mut frames, &mut held, FRAMES / 20);
        held.extend((0..FRAMES / 20).map_while(|_| frames.alloc(Order::ZERO).ok()));
    }
    let blocks = frames.count_free_blocks();
    (blocks[9] + 2 * blocks[10]) as f64 / (frames.free().0 / 512) as f64
}

fn release(frames: &mut Frames, held: &mut Vec<FrameNumber>, count: u64) {
    for _ in 0..count {
        let frame = held.pop().expect("more are held");
        frames.free_block(frame, Order::ZERO).expect("allocated");
    }
}

fn lent() -> Metadata {
    Metadata::from_heap(FrameCount(FRAMES)).expect("memory")
}

fn fresh() -> Frames {
    let mut frames = Frames::new();
    frames.add_range(FrameCount(FRAMES), lent()).expect("fits");
    frames
}

fn half_full() -> Frames {
    let mut frames = fresh();
    let mut held: Vec<_> = std::iter::from_fn(|| frames.alloc(Order::ZERO).ok()).collect();
    shuffle(&mut held, &mut Random(3));
    release(&mut frames, &mut held, FRAMES / 2);
    frames
}

fn pairs(frames: &mut Frames, order: Order) -> f64 {
    timed(PAIRS, || {
        for _ in 0..PAIRS {
            let frame = frames.alloc(black_box(order)).expect("free");
            frames.free_block(black_box(frame), order).expect("allocated");
        }
    })
}

/// Nanoseconds an operation.
fn timed(operations: usize, run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_nanos() as f64 / operations as f64
}

fn row(name: &str, mut measure: impl FnMut() -> f64) {
    let mut runs: Vec<f64> = (0..9).map(|_| measure()).collect();
    runs.sort_by(f64::total_cmp);
    println!("{name:34} {:7.1}", runs[4]);
}

fn shuffle<T>(items: &mut [T], random: &mut Random) {
    for last in (1..items.len()).rev() {
        items.swap(last, random.below(last + 1));
    }
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as usize % bound
    }
}
