//! Every order of a few operations, and every value that a weak memory may show them: the frame allocator with loom's
//! atomics in place of the processor's.
//!
//! The source is the library's own, built once more. What is tried: the lock of a zone with the hints that are read without
//! it, the slot that processors share, who takes a block back, and the mark of poison that caches look at. Orders with more than three preemptions
//! are left to `tests/shuttle.rs`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

extern crate alloc;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

#[path = "model/loom_sync.rs"]
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

use frames::{Cache, FrameRange, Frames, FramesError, Hurt, Metadata, PerCpu};
use loom::model::Builder;
use loom::sync::Arc;
use loom::thread;
use units::{FrameCount, FrameNumber, Order};

/// Two frames.
const PAIR: Order = order(1);
/// Two rows.
const ROWS: Order = order(7);

const fn order(order: u8) -> Order {
    match Order::new(order) {
        Ok(order) => order,
        Err(_) => panic!("there is no such order"),
    }
}

/// Tries every order of what `run` does; how many there were.
fn explore(run: impl Fn([Metadata; 2]) + Sync + Send + 'static) {
    let lent = [Metadata::from_heap(ZONE).unwrap(), Metadata::from_heap(ZONE).unwrap()];
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 200_000;
    let runs = std::sync::Arc::new(AtomicUsize::new(0));
    let counted = std::sync::Arc::clone(&runs);
    builder.check(move || {
        sync::begin_run();
        counted.fetch_add(1, Relaxed);
        run(lent);
    });
    let runs = runs.load(Relaxed);
    println!("{runs} orders");
    assert!(runs > 5, "only {runs} orders were tried");
}

/// A node of one zone of which 2^`free` frames are free.
fn node(free: Order, lent: Metadata) -> Frames {
    let mut frames = Frames::with_relax(thread::yield_now);
    add_zone(&mut frames, free, lent);
    frames
}

/// Adds a zone of which 2^`free` frames are free, to a node that has none free.
fn add_zone(frames: &mut Frames, free: Order, lent: Metadata) {
    frames.add_range(ZONE, lent).unwrap();
    (1..sync::ZONE_TREES).for_each(|_| assert!(frames.alloc(Order::MAX).is_ok()));
    Order::all().filter(|&order| order >= free && order < Order::MAX).rev().for_each(|order| {
        frames.alloc(order).unwrap();
    });
    // Makes loom's atomics here: no thread may see them made by another.
    let frame = frames.alloc(Order::ZERO).unwrap();
    frames.free_block(frame, Order::ZERO).unwrap();
    assert_eq!(frames.free(), free.frames());
}

const ZONE: FrameCount = FrameCount(sync::ZONE_TREES as u64 * 1024);

#[test]
fn of_two_who_want_the_last_frame_one_gets_it() {
    explore(|[lent, _]| {
        let frames = Arc::new(node(Order::ZERO, lent));
        let other = {
            let frames = Arc::clone(&frames);
            thread::spawn(move || frames.alloc(Order::ZERO).is_ok())
        };
        let mine = frames.alloc(Order::ZERO).is_ok();
        assert_ne!(mine, other.join().unwrap());
        assert_eq!(frames.free(), FrameCount(0));
    });
}

#[test]
fn while_a_frame_is_free_all_the_time_nobody_is_refused() {
    explore(|[lent, _]| {
        // Two frames, and never more than two in use at once but for the instant of a swap: one thread gives one back and
        // takes one, so whenever the other asks there is one, or has just been one.
        let frames = Arc::new(node(PAIR, lent));
        let held = frames.alloc(Order::ZERO).unwrap();
        let other = {
            let frames = Arc::clone(&frames);
            thread::spawn(move || {
                frames.free_block(held, Order::ZERO).unwrap();
                frames.alloc(Order::ZERO).unwrap()
            })
        };
        let mine = frames.alloc(Order::ZERO).unwrap();
        assert_ne!(mine, other.join().unwrap());
    });
}

#[test]
fn while_a_frame_is_free_somewhere_all_the_time_nobody_is_refused() {
    explore(|[lent, second]| {
        // One frame in use in the first zone, none free; two free in the second. The other thread frees the one behind our
        // back, if we have passed it already, and then may take the two before we come there.
        let mut frames = node(PAIR, lent);
        let held = frames.alloc(Order::ZERO).unwrap();
        frames.alloc(Order::ZERO).unwrap();
        add_zone(&mut frames, PAIR, second);
        let frames = Arc::new(frames);
        let other = {
            let frames = Arc::clone(&frames);
            thread::spawn(move || {
                frames.free_block(held, Order::ZERO).unwrap();
                frames.alloc(PAIR).is_ok()
            })
        };
        frames.alloc(Order::ZERO).unwrap();
        other.join().unwrap();
    });
}

#[test]
fn of_two_who_free_a_block_one_is_refused() {
    explore(|[lent, _]| {
        let frames = Arc::new(node(PAIR, lent));
        let held = frames.alloc(Order::ZERO).unwrap();
        let other = {
            let frames = Arc::clone(&frames);
            thread::spawn(move || frames.free_block(held, Order::ZERO).is_ok())
        };
        let mine = frames.free_block(held, Order::ZERO);
        assert_ne!(mine.is_ok(), other.join().unwrap());
        assert!(mine.is_ok() || mine == Err(FramesError::NotAllocated { frame: held }), "{mine:?}");
        assert_eq!(frames.free(), FrameCount(2));
    });
}

/// One frees `held` into a cache, a second one into another at the same time: the caches, and how many of them took it. In
/// boxes: the stacks of loom's threads are small.
fn race_caches(frames: &Arc<Frames>, held: FrameNumber) -> ([Box<Cache>; 2], u32) {
    let free = move |frames: &Frames| {
        let mut cache = Box::new(Cache::new());
        let freed = cache.free(frames, held);
        assert!(freed.is_ok() || freed == Err(FramesError::NotAllocated { frame: held }), "{freed:?}");
        (cache, u32::from(freed.is_ok()))
    };
    let other = {
        let frames = Arc::clone(frames);
        thread::spawn(move || free(&frames))
    };
    let (mine, is_mine) = free(frames);
    let (others, is_others) = other.join().unwrap();
    ([mine, others], is_mine + is_others)
}

#[test]
fn what_two_caches_took_back_at_once_goes_to_one_owner() {
    explore(|[lent, _]| {
        // A row for each: whoever finds his frame gone takes one.
        let frames = Arc::new(node(ROWS, lent));
        let held = frames.alloc(Order::ZERO).unwrap();
        let ([mut mine, mut others], taken) = race_caches(&frames, held);
        let owned = [mine.alloc(&frames).unwrap(), others.alloc(&frames).unwrap()];
        assert_ne!(owned[0], owned[1]);
        assert_eq!(taken, 1 + mine.freed_twice() + others.freed_twice(), "who was not refused is counted");
        mine.free(&frames, owned[0]).unwrap();
        others.free(&frames, owned[1]).unwrap();
        mine.drain(&frames);
        others.drain(&frames);
        assert_eq!(frames.free(), ROWS.frames());
    });
}

#[test]
fn what_two_caches_took_back_at_once_is_given_back_once() {
    explore(|[lent, _]| {
        let frames = Arc::new(node(PAIR, lent));
        let held = frames.alloc(Order::ZERO).unwrap();
        let other = {
            let frames = Arc::clone(&frames);
            thread::spawn(move || {
                let mut cache = Box::new(Cache::new());
                let is_taken = cache.free(&frames, held).is_ok();
                (cache, is_taken)
            })
        };
        // The other's store may come when the frame is the zone's already.
        let mut cache = Box::new(Cache::new());
        let is_taken = cache.free(&frames, held).is_ok();
        cache.drain(&frames);
        let (mut others, is_others) = other.join().unwrap();
        others.drain(&frames);
        assert!(is_taken | is_others);
        assert_eq!(frames.free(), FrameCount(2));
        assert_eq!(frames.alloc(PAIR), Ok(held));
    });
}

#[test]
fn what_a_cache_and_a_zone_took_back_at_once_goes_to_one_owner() {
    // Whoever locked the zone before there was a cache knows of none, and exchanges nothing.
    let others: [fn(&Frames, FrameNumber) -> bool; 3] = [
        |frames, held| frames.free_block(held, Order::ZERO).is_ok(),
        |frames, held| frames.free_batch(&[held]).is_ok(),
        |frames, held| frames.free_contiguous(FrameRange { first: held, count: FrameCount(1) }).is_ok(),
    ];
    for free in others {
        for is_kept in [false, true] {
            explore(move |[lent, _]| {
                let frames = Arc::new(node(ROWS, lent));
                let held = frames.alloc(Order::ZERO).unwrap();
                let other = {
                    let frames = Arc::clone(&frames);
                    thread::spawn(move || free(&frames, held))
                };
                let mut cache = Cache::new();
                let mine = cache.free(&frames, held);
                assert!(mine.is_ok() || mine == Err(FramesError::NotAllocated { frame: held }), "{mine:?}");
                assert!(mine.is_ok() | other.join().unwrap());
                if is_kept {
                    let owned = [cache.alloc(&frames).unwrap(), frames.alloc(Order::ZERO).unwrap()];
                    assert_ne!(owned[0], owned[1]);
                    owned.iter().for_each(|&frame| frames.free_block(frame, Order::ZERO).unwrap());
                }
                cache.drain(&frames);
                assert_eq!(frames.free(), ROWS.frames());
            });
        }
    }
}

/// All that some way to take frames finds: two at a time, where it does not say otherwise.
type Take = fn(&Frames) -> Vec<FrameNumber>;

fn both(first: FrameNumber) -> [FrameNumber; 2] {
    [first, FrameNumber(first.0 + 1)]
}

#[test]
fn what_a_cache_gave_away_while_its_zone_had_it_is_given_to_nobody_else_by_any_path() {
    let takes: [Take; 6] = [
        |_| Vec::new(),
        |frames| std::iter::from_fn(|| frames.alloc(PAIR).ok()).flat_map(both).collect(),
        |frames| std::iter::from_fn(|| frames.alloc_highest(PAIR).ok()).flat_map(both).collect(),
        |frames| {
            let mut batch = vec![FrameNumber(0); 200];
            let count = frames.alloc_batch(&mut batch);
            batch.truncate(count);
            batch
        },
        |frames| {
            // A row each: loom does not go as many steps as there are pairs.
            let all = std::iter::from_fn(|| frames.alloc_contiguous(FrameCount(64)).ok());
            all.flat_map(|run| (run.first.0..).take(64).map(FrameNumber)).collect()
        },
        |frames| {
            let free = ZONE.0 - ROWS.frames().0..ZONE.0;
            let pairs = free.step_by(2).map(|frame| FrameNumber(u32::try_from(frame).unwrap()));
            pairs.filter(|&first| frames.alloc_at(first, PAIR).is_ok()).flat_map(both).collect()
        },
    ];
    let frees: [fn(&Frames, FrameNumber); 3] = [
        |frames, frame| frames.free_block(frame, Order::ZERO).unwrap(),
        |frames, frame| frames.free_batch(&[frame]).unwrap(),
        |frames, first| frames.free_contiguous(FrameRange { first, count: FrameCount(1) }).unwrap(),
    ];
    // Whatever found the frame, any way to free it is one; where nobody looked for it, each has to find out itself.
    let nobody = frees.map(|free| (takes[0], free));
    for (take, free) in nobody.into_iter().chain(takes[1..].iter().map(|&take| (take, frees[0]))) {
        explore(move |[lent, _]| {
            let frames = Arc::new(node(ROWS, lent));
            let held = frames.alloc(Order::ZERO).unwrap();
            let other = {
                let frames = Arc::clone(&frames);
                thread::spawn(move || frames.free_block(held, Order::ZERO).is_ok())
            };
            let mut cache = Box::new(Cache::new());
            let mine = cache.free(&frames, held).is_ok();
            assert!(mine | other.join().unwrap());
            // One of the cache's frames has an owner, whatever the zone knows of it.
            let owned = cache.alloc(&frames).unwrap();
            let taken = take(&frames);
            assert!(!taken.contains(&owned), "frame {owned} has two owners");
            free(&frames, owned);
            cache.drain(&frames);
            let in_use = u64::try_from(taken.len()).unwrap();
            assert_eq!(frames.free().0 + in_use, ROWS.frames().0, "no frame is lost or counted twice");
        });
    }
}

#[test]
fn a_run_of_which_a_cache_takes_a_part_back_is_freed_whole_or_stays_in_use() {
    explore(|[lent, _]| {
        let frames = Arc::new(node(order(2), lent));
        let run = frames.alloc_contiguous(FrameCount(3)).unwrap();
        let last = FrameNumber(run.first.0 + 2);
        let other = {
            let frames = Arc::clone(&frames);
            thread::spawn(move || frames.free_contiguous(run).is_ok())
        };
        let mut cache = Cache::new();
        let mine = cache.free(&frames, last).is_ok();
        let others = other.join().unwrap();
        assert!(mine | others);
        cache.drain(&frames);
        assert_eq!(frames.free(), FrameCount(if others { 4 } else { 2 }));
        assert_eq!(frames.free_block(run.first, PAIR).is_ok(), !others);
    });
}

#[test]
fn a_poisoned_frame_that_is_freed_twice_at_once_goes_out_of_use_once() {
    let others: [fn(&Frames, FrameNumber) -> bool; 3] = [
        |frames, held| frames.free_block(held, Order::ZERO).is_ok(),
        |frames, held| frames.free_batch(&[held]).is_ok(),
        |frames, held| {
            let mut cache = Box::new(Cache::new());
            cache.free(frames, held).is_ok()
        },
    ];
    for free in others {
        explore(move |[lent, _]| {
            let frames = Arc::new(node(ROWS, lent));
            // There have been caches: the first one makes all zones wait, which is another model's.
            let mut cache = Box::new(Cache::new());
            let held = cache.alloc(&frames).unwrap();
            cache.drain(&frames);
            frames.poison(held).unwrap();
            let other = {
                let frames = Arc::clone(&frames);
                thread::spawn(move || free(&frames, held))
            };
            let mine = cache.free(&frames, held).is_ok();
            assert!(mine | other.join().unwrap());
            cache.drain(&frames);
            assert_eq!((frames.poisoned().0, frames.free().0), (1, ROWS.frames().0 - 1));
            assert_eq!(frames.poison(held).unwrap().hurt, Hurt::Nobody);
            assert_eq!(frames.free_block(held, Order::ZERO), Err(FramesError::Poisoned { frame: held }));
        });
    }
}

/// A cache frees a frame, a zone does so at the same time: the cache, with the frame's owner gone.
fn race_zone(frames: &Arc<Frames>, held: FrameNumber) -> Box<Cache> {
    let other = {
        let frames = Arc::clone(frames);
        thread::spawn(move || frames.free_block(held, Order::ZERO).is_ok())
    };
    let mut cache = Box::new(Cache::new());
    let mine = cache.free(frames, held).is_ok();
    assert!(mine | other.join().unwrap());
    cache
}

#[test]
fn a_row_of_which_the_zone_had_a_frame_already_is_counted_by_what_was_in_use() {
    explore(|[lent, _]| {
        let frames = Arc::new(node(ROWS, lent));
        let used = frames.used();
        let mut row = [FrameNumber(0); 64];
        assert_eq!(frames.alloc_batch(&mut row), 64);
        let mut cache = race_zone(&frames, row[10]);
        // It goes to one owner, whatever the zone knows of that; and then it has a row.
        assert_eq!(cache.alloc(&frames), Ok(row[10]));
        frames.free_batch(&row).unwrap();
        cache.drain(&frames);
        assert_eq!((frames.free(), frames.used()), (ROWS.frames(), used));
        assert_eq!(frames.alloc(ROWS), Ok(row[0]));
    });
}

#[test]
fn a_block_of_which_a_frame_was_freed_under_its_owner_is_counted_by_what_was_in_use() {
    for is_block_first in [false, true] {
        explore(move |[lent, _]| {
            // Two frames; the second is freed twice, and one of the frees comes so late that both are a block in use by then.
            let frames = Arc::new(node(PAIR, lent));
            let used = frames.used();
            let [first, held] = [(); 2].map(|()| frames.alloc(Order::ZERO).unwrap());
            frames.free_block(first, Order::ZERO).unwrap();
            let other = {
                let frames = Arc::clone(&frames);
                thread::spawn(move || {
                    let is_freed = frames.free_block(held, Order::ZERO).is_ok();
                    is_freed && frames.alloc_at(first, PAIR).is_ok()
                })
            };
            let mut cache = Box::new(Cache::new());
            let is_kept = cache.free(&frames, held).is_ok();
            let is_block = other.join().unwrap();
            let free_block = || assert!(!is_block || frames.free_block(first, PAIR).is_ok());
            let owned = if is_kept { cache.alloc(&frames).ok() } else { None };
            if is_block_first {
                free_block();
            }
            owned.into_iter().for_each(|frame| frames.free_block(frame, Order::ZERO).unwrap());
            if !is_block_first {
                free_block();
            }
            cache.drain(&frames);
            assert_eq!((frames.free(), frames.used()), (PAIR.frames(), used));
            assert_eq!(frames.alloc(PAIR), Ok(first));
        });
    }
}

#[test]
fn a_range_goes_only_when_nobody_has_a_frame_of_it_and_takes_from_a_cache_what_is_free() {
    for is_owned in [false, true] {
        // No more than that: loom counts the steps of a thread in 16 bits.
        let count = FrameCount(128);
        let lent = Metadata::from_heap(count).unwrap();
        explore(move |_| {
            let mut frames = Frames::with_relax(thread::yield_now);
            let range = frames.add_range(count, lent).unwrap();
            let held = frames.alloc(Order::ZERO).unwrap();
            let frames = Arc::new(frames);
            let mut cache = race_zone(&frames, held);
            let mut frames = Arc::try_unwrap(frames).unwrap();
            let in_use = |lowest| FramesError::RangeInUse { first: range.first, used: FrameCount(1), lowest };
            if is_owned {
                // The cache may be filled with a row: whatever is left of that stays in the way as well.
                let owned = cache.alloc(&frames).unwrap();
                cache.drain(&frames);
                assert_eq!(frames.remove_range(range.first).unwrap_err(), in_use(owned));
                assert_eq!(frames.in_use(range).next().map(|one| one.first), Some(owned));
                frames.free_block(owned, Order::ZERO).unwrap();
            }
            let (is_kept, before) = (!cache.is_empty(), cache.freed_twice());
            let is_counted = frames.used() == FrameCount(1);
            let removed = frames.remove_range(range.first);
            assert_eq!(removed.is_err(), is_counted);
            if is_counted {
                assert_eq!(removed.unwrap_err(), in_use(held));
                cache.drain(&frames);
                frames.remove_range(range.first).unwrap();
            } else {
                // It lets go of what it has lost, and counts it.
                cache.drain(&frames);
                assert_eq!(cache.freed_twice() - before, u32::from(is_kept));
            }
            assert!(cache.is_empty());
            assert!(lent.is_zero(), "what is lent comes back as it was");
        });
    }
}

#[test]
fn a_slot_gives_no_frame_to_two() {
    explore(|[lent, _]| {
        // Two rows, so that who finds the slot taken finds frames all the same. Waiting for a slot is left to shuttle: loom
        // lets a waiting loop see an old value for ever.
        let frames = Arc::new(node(ROWS, lent));
        let caches = Arc::new(PerCpu::new(1).unwrap());
        let frame = caches.alloc(&frames, 0, Order::ZERO).unwrap();
        caches.free_block(&frames, 0, frame, Order::ZERO).unwrap();
        caches.drain(&frames);
        let other = {
            let (frames, caches) = (Arc::clone(&frames), Arc::clone(&caches));
            thread::spawn(move || caches.alloc(&frames, 0, Order::ZERO).unwrap())
        };
        let mine = caches.alloc(&frames, 0, Order::ZERO).unwrap();
        let others = other.join().unwrap();
        assert_ne!(mine, others);
        caches.free_block(&frames, 0, mine, Order::ZERO).unwrap();
        caches.free_block(&frames, 0, others, Order::ZERO).unwrap();
        caches.drain(&frames);
        assert_eq!(frames.free(), ROWS.frames());
    });
}

#[test]
fn a_frame_poisoned_while_it_is_freed_into_a_cache_never_comes_back() {
    explore(|[lent, _]| {
        let frames = Arc::new(node(PAIR, lent));
        let mut cache = Cache::new();
        let held = cache.alloc(&frames).unwrap();
        let other = {
            let frames = Arc::clone(&frames);
            thread::spawn(move || frames.poison(held).unwrap().hurt)
        };
        cache.free(&frames, held).unwrap();
        other.join().unwrap();
        // Whoever has joined knows of it.
        let next = cache.alloc(&frames).unwrap();
        assert_ne!(next, held);
        cache.free(&frames, next).unwrap();
        cache.drain(&frames);
        assert_eq!((frames.free(), frames.poisoned()), (FrameCount(1), FrameCount(1)));
        assert_eq!(frames.poison(held).unwrap().hurt, Hurt::Nobody);
    });
}

#[test]
fn a_frame_poisoned_while_it_is_allocated_is_nobodys_or_its_holder_is_named() {
    explore(|[lent, _]| {
        let frames = Arc::new(node(PAIR, lent));
        let first = FrameNumber(u32::try_from(ZONE.0).unwrap() - 2);
        let other = {
            let frames = Arc::clone(&frames);
            thread::spawn(move || frames.poison(first).unwrap().hurt)
        };
        let mine = frames.alloc(Order::ZERO).unwrap();
        let hurt = other.join().unwrap();
        if mine == first {
            // "Cached" is said of one that is just being given out; asked again it is its holder's.
            let again = frames.poison(mine).unwrap().hurt;
            assert_eq!(again, Hurt::Holder { first: mine, order: Order::ZERO }, "{hurt:?} at first");
        } else {
            assert_eq!(hurt, Hurt::Nobody);
        }
        frames.free_block(mine, Order::ZERO).unwrap();
        assert_eq!((frames.free(), frames.poisoned()), (FrameCount(1), FrameCount(1)));
    });
}
