//! Claims about who sees to what the encoder has done.

extern crate std;
use super::*;
use crate::control::tests::control;
use crate::demote::Demoter;
use crate::dense::Densifier;
use crate::encoder::tests::{exchange, memory};
use crate::fault::{Fault, Served, Server};
use crate::holding::Holding;
use crate::space::tests::space;
use crate::sweep::take_out;
use crate::table::{CHUNK, Entry};
use crate::workshop::tests::{common, record_page};
use crate::workshop::{self, Workshop};
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use spmem_node::Page;
use spmem_node::compressed::Slot;
use spmem_sys::mapping::{self, Mapping};
use spmem_sys::uffd::feature;
use std::boxed::Box;
use std::time::Instant;
use std::vec::Vec;

/// Half of them are away: more than the MiB from which on pages leave as zstd.
const PAGES: usize = 2000;
const SLOTS: usize = 100;
/// Of the handler, at least.
const TURNS: usize = 20_000;
/// For what comes about with time.
const PATIENCE: Duration = Duration::from_secs(60);
const ROOM: i64 = 1 << 20;
/// That of the store.
const SEED: u64 = 1;

/// A program of `PAGES` pages, and what its two agent threads need.
struct Process {
    runtime: &'static Runtime,
    uffd: &'static Uffd,
    pagemap: &'static Pagemap,
    program: Mapping,
    /// Slots, and behind them the scratch areas.
    holding: Mapping,
}

impl Process {
    /// `None` where there is no such userfaultfd.
    fn new() -> Option<Self> {
        let uffd = Uffd::from_syscall().ok()?;
        uffd.enable(feature::SCRATCH).ok()?;
        let pagemap = Pagemap::open().ok()?.into_raw();
        let uffd = &*Box::leak(Box::new(uffd));
        let len = (PAGES * PAGE).next_multiple_of(CHUNK);
        let program = Mapping::aligned(len, CHUNK, c"spmem test").expect("mmap");
        let holding = Mapping::new(SLOTS * PAGE + (HANDLER + 1) * TRASH_LEN, c"spmem test").expect("mmap");
        for mapping in [&program, &holding] {
            uffd.register(mapping.start(), mapping.len()).expect("register");
        }
        let runtime = &*Box::leak(Box::new(Runtime::with_control(Box::leak(control()))));
        runtime.uffd.store(uffd.raw(), Relaxed);
        runtime.scratch.store(uffd.raw(), Relaxed);
        runtime.trash_start.store(holding.start() + SLOTS * PAGE, Relaxed);
        runtime.pagemap.store(pagemap, Ordering::Release);
        runtime.shared().seed.store(SEED, Relaxed);
        runtime.exchange.store(core::ptr::from_ref(exchange()).expose_provenance(), Ordering::Release);
        runtime.room_pages.store(ROOM, Relaxed);
        runtime.keeps_pace.store(true, Relaxed);
        let mut space = space(1);
        space.holding = Holding::new(holding.start(), SLOTS as u32);
        for start in (program.start()..program.start() + len).step_by(CHUNK) {
            space.table.find_or_add(start).set_registered(start, start + CHUNK, true);
        }
        *runtime.space.lock() = Some(space);
        let pagemap = &*Box::leak(Box::new(Pagemap::from_raw(pagemap)));
        Some(Self { runtime, uffd, pagemap, program, holding })
    }

    /// Pages of RAM.
    fn resident(&self) -> usize {
        let count = |mapping: &Mapping| {
            let pages = (mapping.start()..mapping.start() + mapping.len()).step_by(PAGE);
            pages.filter(|&page| self.pagemap.is_there(page) == Ok(true)).count()
        };
        count(&self.program) + count(&self.holding)
    }
}

/// Noise, or records with noise in front, or filled with one value.
fn new_page(mut random: impl FnMut() -> usize) -> Page {
    match random() % 8 {
        0 => core::array::from_fn(|_| random() as u8),
        1 => [random() as u8; PAGE],
        _ => {
            let mut page = record_page(random() as u64);
            let noise = 1000 + random() % 1000;
            page[..noise].fill_with(|| random() as u8);
            page
        }
    }
}

fn dice(mut state: usize) -> impl FnMut() -> usize {
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 40
    }
}

/// What has come about.
#[derive(Debug)]
struct Tally {
    /// Spans that the handler was through with.
    by_handler: usize,
    /// Spans that the monitor had to finish.
    half_seen: usize,
    /// Pages that left as lz4, ...
    lz4: u64,
    /// ... as zstd, ...
    dense: u64,
    /// ... and of those, how many lay there with a dictionary in the end.
    with_dictionary: u64,
}

/// Stored pages that need a dictionary.
fn with_dictionary(space: &Space<Cram>) -> u64 {
    Slot::ALL.into_iter().map(|slot| space.store.dictionary_pages(slot)).sum()
}

/// Comes in at any time; how often the handler had seen to a part of the oldest span.
fn monitor(runtime: &'static Runtime, is_over: &AtomicBool) -> usize {
    let (mut demoter, mut densifier) = (Demoter::new(runtime, 0), Densifier::new(runtime));
    let (mut random, mut half_seen) = (dice(5), 0);
    while !is_over.load(Relaxed) {
        if let Some(Batch { span, settled, .. }) = demoter.with_lanes(|lanes, _| lanes.out[0]).flatten() {
            half_seen += usize::from((1..span.len).contains(&settled));
        }
        // Without it older copies are kept, which are the monitor's to compare.
        runtime.keeps_pace.store(random() % 2 == 0, Relaxed);
        // While the node is full, pages stay in their slots.
        runtime.is_node_full.store(random() % 4 == 0, Relaxed);
        match random() % 4 {
            0 => demoter.drain(),
            1 => drop(demoter.run(random() % 40)),
            _ => demoter.take_left(),
        }
        // It takes the dictionaries.
        densifier.run(true);
        std::thread::sleep(Duration::from_micros(random() as u64 % 2000));
    }
    demoter.drain();
    half_seen
}

/// Turns of the handler, each of a fault and what goes along with it, while the monitor comes in at any time: `TURNS`, and until pages lie
/// in node 1 in each of their encodings. Every byte is looked at whenever a page has come, and in the end.
fn take_turns(process: &mut Process, has_drops: bool) -> Tally {
    let (runtime, uffd, pagemap) = (process.runtime, process.uffd, process.pagemap);
    let (is_over, encoder_ends) = (&AtomicBool::new(false), &AtomicBool::new(false));
    let workshop = &Workshop::new();
    let exchange = runtime.exchange().expect("it was given");
    let mut expected: Vec<Page> = std::vec![[0; PAGE]; PAGES];
    let mut by_handler = 0;
    let half_seen = std::thread::scope(|scope| {
        scope.spawn(move || crate::encoder::serve(exchange, workshop, Codec::new(SEED), &memory(), encoder_ends));
        scope.spawn(move || workshop::learn(exchange, workshop, Codec::new(SEED), common, encoder_ends));
        let monitor = scope.spawn(move || monitor(runtime, is_over));
        let (mut server, mut random) = (Server::new(runtime).expect("mmap"), dice(7));
        let mover = Mover::new(runtime, uffd, pagemap);
        while runtime.space.lock().as_ref().is_some_and(|space| space.lanes.is_none()) {
            std::thread::yield_now();
        }
        let since = Instant::now();
        for turn in 0.. {
            let (index, other) = (random() % PAGES, random() % PAGES);
            let page = process.program.start() + index * PAGE;
            let mut guard = runtime.space.lock();
            let space = guard.as_mut().expect("it was given");
            if turn >= TURNS && (with_dictionary(space) > 0 || since.elapsed() > PATIENCE) {
                break;
            }
            if pagemap.is_there(page) != Ok(true) {
                assert_eq!(server.serve(space, uffd, page, Fault::Write), Served::Yes, "turn {turn}");
                assert_eq!(
                    process.program.bytes(index * PAGE, PAGE),
                    expected[index],
                    "page {index}, turn {turn}"
                );
            }
            if random() % 3 == 0 {
                expected[index] = new_page(&mut random);
                process.program.bytes_mut(index * PAGE, PAGE).copy_from_slice(&expected[index]);
            }
            if has_drops && random() % 4 == 0 {
                let page = process.program.start() + other * PAGE;
                mapping::discard(page, PAGE);
                space.drop_range(page, page + PAGE, Some(Entry::discarded()));
                expected[other] = [0; PAGE];
            }
            // A page out, if any, ...
            let leaves = process.program.start() + (random() % PAGES) * PAGE;
            take_out(runtime, space, uffd, pagemap, (leaves, leaves + PAGE));
            // ... and one is seen to.
            if let Some(mut lanes) = space.lanes.take() {
                let before = lanes.client.oldest();
                lanes.keep_pace(runtime, space, &mover, 1);
                by_handler += usize::from(before.is_some() && before != lanes.client.oldest());
                space.lanes = Some(lanes);
            }
            drop(guard);
            // Between faults a handler sleeps, and the monitor gets the lock.
            if turn % 16 == 0 {
                std::thread::sleep(Duration::from_micros(20));
            }
        }
        is_over.store(true, Relaxed);
        let half_seen = monitor.join().expect("the monitor");
        encoder_ends.store(true, Relaxed);
        exchange.wake();
        workshop.wake();
        half_seen
    });
    let mut server = Server::new(runtime).expect("mmap");
    let mut guard = runtime.space.lock();
    let space = guard.as_mut().expect("it was given");
    assert!(space.lanes.as_ref().is_some_and(|lanes| lanes.out[0].is_none()), "nothing is out");
    for slot in 0..SLOTS as u32 {
        let state = space.holding.get(slot).state;
        assert!(!matches!(state, State::Busy | State::BusyDead), "slot {slot} is {state:?}: it was not seen to");
    }
    if !has_drops {
        let missing = ROOM - runtime.room_pages.load(Relaxed);
        assert_eq!(missing, process.resident() as i64, "what was taken and given back is what is resident");
    }
    let with_dictionary = with_dictionary(space);
    for (index, expected) in expected.iter().enumerate() {
        let page = process.program.start() + index * PAGE;
        if pagemap.is_there(page) != Ok(true) {
            assert_eq!(server.serve(space, uffd, page, Fault::Write), Served::Yes);
        }
        assert_eq!(process.program.bytes(index * PAGE, PAGE), expected, "page {index}, in the end");
    }
    let counters = &runtime.shared().counters;
    let all = counters.demoted_pages.load(Relaxed);
    let (clean, filled) = (counters.clean_pages.load(Relaxed), counters.same_filled_pages.load(Relaxed));
    let dense = counters.dense_pages.load(Relaxed);
    Tally { by_handler, half_seen, lz4: all - clean - filled - dense, dense, with_dictionary }
}

#[test]
fn handler_and_monitor_take_turns_on_one_lane_and_every_byte_comes_back_however_it_left() {
    let Some(mut process) = Process::new() else {
        std::println!("skipped: no userfaultfd with MOVE here");
        return;
    };
    let tally = take_turns(&mut process, false);
    let Tally { by_handler, half_seen, lz4, dense, with_dictionary } = tally;
    assert!(by_handler > 0 && half_seen > 0 && lz4 > 0 && dense > 0 && with_dictionary > 0, "{tally:?}");
}

#[test]
fn a_page_that_is_dropped_while_it_is_out_comes_back_as_zeros_and_no_other_does() {
    let Some(mut process) = Process::new() else {
        std::println!("skipped: no userfaultfd with MOVE here");
        return;
    };
    let tally = take_turns(&mut process, true);
    assert!(tally.dense > 0 && tally.with_dictionary > 0, "{tally:?}");
}
