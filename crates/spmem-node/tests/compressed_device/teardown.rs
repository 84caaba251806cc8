//! Teardown: the node is emptied whole, or everything is as it was, wherever it is stopped.

use spmem_core::compressed::{Gate, RETRY_NS, TEARDOWN_ATTEMPTS};
use spmem_core::units::{FrameCount, Time};
use spmem_node::cram::{COPY_BATCH, Denied, Emptying};

use super::harness::{BY_LINE, Bench, page_of};

/// A component with pages on the device, and room for them in sysram: pages of the program that were discarded made it.
fn filled(seed: u64, has_room: bool) -> (Bench, spmem_core::units::DomainId) {
    let mut bench = Bench::new(seed, BY_LINE, 100, |_| {});
    let program = bench.program("one", 100);
    for number in 0..180 {
        let page = bench.random.page(2);
        bench.write(page_of(program, number), 0, &page).unwrap();
    }
    let is_there = |bench: &Bench, number| bench.cram.is_on_device(page_of(program, number));
    let resident: Vec<u64> = (0..180).filter(|&number| !is_there(&bench, number)).collect();
    for number in resident.into_iter().filter(|_| has_room) {
        bench.cram.discard(page_of(program, number));
        bench.model.remove(&page_of(program, number));
    }
    assert!(bench.cram.usage().device.0 > COPY_BATCH as u64, "more than one batch");
    (bench, program)
}

#[test]
fn an_emptied_node_has_nothing_and_every_byte_is_in_sysram() {
    let (mut bench, program) = filled(1, true);
    bench.cram.begin_emptying().unwrap();
    assert!(bench.cram.begin_emptying().is_err(), "one at a time");
    let mut steps = 0;
    while bench.cram.empty_on(Time(bench.now)) != Emptying::Done {
        steps += 1;
        bench.tick();
        assert!(steps < 10);
    }
    assert_eq!(bench.cram.usage().device, FrameCount(0));
    assert_eq!(bench.cram.node().frames().mm().stats(spmem_core::units::NodeId::ONE).unwrap().used, FrameCount(0));
    bench.check_all();
    // Whoever needs more sysram than he may have is told so: nothing goes there any more.
    let denied = (200..400).find_map(|number| bench.write(page_of(program, number), 0, &[1; 4096]).err());
    assert!(matches!(denied, Some(Denied::OverLimit { .. })), "{denied:?}");
    bench.check_all();
}

#[test]
fn stopped_anywhere_nothing_has_happened() {
    let mut stops = 0;
    for stop in 0.. {
        let (mut bench, program) = filled(2, true);
        let before = bench.cram.usage();
        bench.cram.begin_emptying().unwrap();
        let ends = (0..stop).find(|_| bench.cram.empty_on(Time(bench.now)) == Emptying::Done);
        if ends.is_some() {
            break;
        }
        bench.cram.stop_emptying();
        stops += 1;
        assert_eq!(bench.cram.usage(), before, "stopped after {stop}");
        assert!(!bench.cram.supply().gates().is_set(Gate::TearingDown));
        bench.check_all();
        for number in 200..300 {
            let page = bench.random.page(2);
            bench.write(page_of(program, number), 0, &page).unwrap();
        }
        bench.check_all();
    }
    assert!(stops > 4, "stopped at {stops} points");
}

#[test]
fn room_that_is_taken_while_pages_are_copied_is_not_taken_twice() {
    let (mut bench, program) = filled(5, true);
    let before = bench.cram.usage().device;
    bench.cram.begin_emptying().unwrap();
    assert!(matches!(bench.cram.empty_on(Time(bench.now)), Emptying::Copying(_)));
    for number in 200..300 {
        let page = bench.random.page(2);
        assert_eq!(bench.cram.write(Time(bench.now), page_of(program, number), 0, &page, None), Ok(()));
        bench.model.insert(page_of(program, number), Box::new(page));
    }
    let mut now = Time(bench.now);
    loop {
        match bench.cram.empty_on(now) {
            Emptying::Waiting(until) => now = until,
            Emptying::Copying(_) => {}
            Emptying::CalledOff => break,
            Emptying::Done => panic!("there is no room for all"),
        }
        assert!(bench.cram.resident(program) <= FrameCount(100), "within its limit");
    }
    assert_eq!(bench.cram.usage().device, before);
    bench.check_all();
}

#[test]
fn without_room_for_all_it_waits_tries_again_and_is_called_off() {
    let (mut bench, _) = filled(3, false);
    let before = bench.cram.usage();
    bench.cram.begin_emptying().unwrap();
    let (mut now, mut waits) = (Time(bench.now), 0);
    loop {
        match bench.cram.empty_on(now) {
            Emptying::Waiting(until) => (now, waits) = (until, waits + 1),
            Emptying::CalledOff => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(waits, TEARDOWN_ATTEMPTS);
    assert!(now.0 >= RETRY_NS);
    assert_eq!(bench.cram.usage(), before);
    assert_eq!(bench.cram.supply().gates().first_set(), None);
    bench.check_all();
}

#[test]
fn what_is_written_or_poisoned_while_pages_are_copied_is_not_taken_back() {
    let (mut bench, program) = filled(4, true);
    bench.cram.begin_emptying().unwrap();
    assert!(matches!(bench.cram.empty_on(Time(bench.now)), Emptying::Copying(_)));
    let there: Vec<u64> = (0..180).filter(|&number| bench.cram.is_on_device(page_of(program, number))).collect();
    for &number in &there[..10] {
        bench.write(page_of(program, number), 100, &[0xee; 50]).unwrap();
    }
    for &number in &there[10..20] {
        bench.cram.discard(page_of(program, number));
        bench.model.remove(&page_of(program, number));
    }
    while bench.cram.empty_on(Time(bench.now)) != Emptying::Done {
        bench.tick();
    }
    bench.check_all();
}
