//! No livelock: writers, the device and whoever polls take turns in any order; every write ends within a bound that follows
//! from the settings.

use spmem_core::units::Time;
use spmem_node::cram::{Denied, PageId, Ticket};
use spmem_node::model::{Fault, Shape};
use spmem_node::{PAGE_BYTES, Page};

use super::harness::{BY_LINE, Bench, STALE, page_of};

const WRITERS: usize = 6;
const WRITES: u64 = 60;

/// A thread of a program: what it is about to write, and since when.
struct Writer {
    program: spmem_core::units::DomainId,
    left: u64,
    pending: Option<(PageId, Box<Page>, Option<Ticket>, u64)>,
}

/// Runs all writers to their end; the longest that one waited, in rounds, and how many saw an error.
fn run(seed: u64, shape: Shape, fault: Fault) -> (u64, u64) {
    let mut bench = Bench::new(seed, shape, 8, |_| {});
    let programs = [bench.program("one", 5), bench.program("other", 3)];
    let mut writers: Vec<Writer> =
        (0..WRITERS).map(|number| Writer { program: programs[number % 2], left: WRITES, pending: None }).collect();
    let (mut round, mut longest, mut errors) = (0_u64, 0, 0);
    while writers.iter().any(|writer| writer.left > 0) {
        round += 1;
        if round == 30 {
            bench.device.set_fault(fault);
        }
        // Every actor once a round, in a random order: writers, the device, who polls.
        let mut order: Vec<usize> = (0..WRITERS + 2).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, usize::try_from(bench.random.below(at as u64 + 1)).unwrap());
        }
        for actor in order {
            if actor == WRITERS {
                bench.device.drain(3);
            } else if actor == WRITERS + 1 {
                bench.now += 1;
                bench.cram.poll(Time(bench.now));
            } else {
                errors += step(&mut bench, &mut writers[actor], round, &mut longest);
            }
        }
        assert!(round < 1_000_000, "somebody waits for ever");
    }
    bench.device.set_fault(Fault::None);
    bench.check_all();
    (longest, errors)
}

/// One try of a writer; 1 if it saw an error.
fn step(bench: &mut Bench, writer: &mut Writer, round: u64, longest: &mut u64) -> u64 {
    if writer.left == 0 {
        return 0;
    }
    let (id, page, ticket, since) = writer.pending.take().unwrap_or_else(|| {
        let id = page_of(writer.program, bench.random.below(70));
        // As bad as the device lets in, where it tells.
        let worst = if bench.device.shape().does_weigh { 52 } else { 64 };
        let noise = if bench.random.below(3) == 0 { worst } else { 3 };
        (id, Box::new(bench.random.page(noise)), None, round)
    });
    let wrote = bench.cram.write(Time(bench.now), id, 0, &page[..], ticket);
    *longest = (*longest).max(round - since);
    match wrote {
        Ok(()) => {
            bench.model.insert(id, page);
            writer.left -= 1;
            0
        }
        Err(Denied::Wait(ticket)) => {
            writer.pending = Some((id, page, Some(ticket), since));
            0
        }
        Err(Denied::OverLimit { limit, .. }) => {
            assert_eq!(bench.cram.resident(id.owner), limit, "only at its own limit");
            bench.check(id);
            writer.left -= 1;
            1
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn every_write_ends_within_a_bound() {
    // Whoever is first is told as soon as the device is heard, or is dead; those before him are as many as there are writers.
    let bound = WRITERS as u64 * (STALE + 2);
    for fault in [Fault::None, Fault::Stuck, Fault::Silent] {
        for does_weigh in [true, false] {
            let mut longest = 0;
            let mut errors = 0;
            for seed in 0..20 {
                let (waited, seen) = run(seed, Shape { does_weigh, ..BY_LINE }, fault);
                assert!(waited <= bound, "seed {seed}: {waited} rounds, at most {bound}");
                (longest, errors) = (longest.max(waited), errors + seen);
            }
            println!("{fault:?}, weighs {does_weigh}: at most {longest} rounds of {bound}, {errors} errors");
            assert!(longest > 0, "nobody ever waited, so nothing was shown");
        }
    }
}

#[test]
fn a_program_below_its_limit_never_waits_whatever_others_do() {
    let mut bench = Bench::new(3, Shape { does_weigh: false, ..BY_LINE }, 12, |_| {});
    let (greedy, modest) = (bench.program("greedy", 8), bench.program("modest", 4));
    assert!(bench.cram.create_program("third", spmem_core::units::FrameCount(1)).is_err(), "all is promised");
    bench.device.set_fault(Fault::Silent);
    let mut refused = 0;
    for number in 0..200 {
        let page = bench.random.page(64);
        refused += u64::from(bench.write(page_of(greedy, number), 0, &page).is_err());
    }
    assert!(refused > 0, "the greedy one is at its end");
    for number in 0..4 {
        let page = bench.random.page(64);
        let written = bench.cram.write(Time(bench.now), page_of(modest, number), 0, &page, None);
        assert_eq!(written, Ok(()), "at once");
        bench.model.insert(page_of(modest, number), Box::new(page));
    }
    bench.check_all();
}

#[test]
fn who_gives_up_waiting_lets_the_next_one_in() {
    let mut bench = Bench::new(4, BY_LINE, 1, |_| {});
    let program = bench.program("one", 1);
    let page = [7; PAGE_BYTES];
    bench.write(page_of(program, 0), 0, &page).unwrap();
    bench.cram.begin_emptying().unwrap();
    let wait =
        |bench: &mut Bench, number| bench.cram.write(Time(bench.now), page_of(program, number), 0, &page, None);
    let Err(Denied::Wait(first)) = wait(&mut bench, 1) else { panic!("nothing can leave") };
    let Err(Denied::Wait(second)) = wait(&mut bench, 2) else { panic!("nothing can leave") };
    bench.cram.stop_emptying();
    let again = |bench: &mut Bench, number, ticket| {
        bench.cram.write(Time(bench.now), page_of(program, number), 0, &page, Some(ticket))
    };
    assert_eq!(again(&mut bench, 2, second), Err(Denied::Wait(second)), "not his turn");
    bench.cram.give_up(program, first);
    assert_eq!(again(&mut bench, 2, second), Ok(()));
}

#[test]
fn a_program_that_ends_gives_all_back_and_nobody_of_it_waits() {
    let mut bench = Bench::new(7, BY_LINE, 4, |_| {});
    let (one, other) = (bench.program("one", 2), bench.program("other", 2));
    for number in 0..20 {
        for program in [one, other] {
            let page = bench.random.page(2);
            bench.write(page_of(program, number), 0, &page).unwrap();
        }
    }
    bench.cram.remove_program(one);
    bench.model.retain(|id, _| id.owner != one);
    assert_eq!(bench.cram.write(Time(bench.now), page_of(one, 0), 0, &[1], None), Err(Denied::UnknownProgram));
    assert_eq!(bench.cram.usage().device.0, 18);
    let again = bench.program("again", 2);
    bench.write(page_of(again, 0), 0, &[1]).unwrap();
    bench.check_all();
}
