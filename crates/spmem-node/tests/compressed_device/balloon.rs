//! Pressure and the balloon: perceived capacity is given back when the ratio falls, and had again when it rises.

use spmem_core::compressed::{Allocation, Balloon, Change, Gate, NotAdmitted, Ratio};
use spmem_core::units::{FrameCount, NodeId, Time};
use spmem_node::cram::{Denied, Why};
use spmem_node::model::Shape;

use super::harness::{BY_LINE, Bench, PERCEIVED, page_of};

/// Enough ticks for the device to compress all and the balloon to take all its steps.
fn settle(bench: &mut Bench) {
    bench.device.drain(usize::MAX);
    for _ in 0..PERCEIVED {
        bench.tick();
    }
}

#[test]
fn the_balloon_takes_back_what_there_is_no_memory_for() {
    let mut bench = Bench::new(1, Shape { does_weigh: false, ..BY_LINE }, 8, |_| {});
    let program = bench.program("one", 8);
    let mut number = 0;
    let fill = |bench: &mut Bench, number: &mut u64, lines: u64, count: u64| {
        for _ in 0..count {
            let page = bench.random.page(lines);
            bench.write(page_of(program, *number), 0, &page).unwrap();
            *number += 1;
        }
        settle(bench);
    };
    fill(&mut bench, &mut number, 1, 20);
    assert!(bench.cram.supply().ratio().unwrap() > Ratio(2000), "more than promised");
    assert_eq!(bench.cram.supply().balloon().held(), FrameCount(0));
    assert_eq!(bench.cram.supply().pressure(), 0);

    fill(&mut bench, &mut number, 64, 58);
    let supply = bench.cram.supply();
    let ratio = supply.ratio().unwrap();
    assert!(ratio < Ratio(2000) && supply.pressure() > 0, "{ratio}, pressure {}", supply.pressure());
    let target = Balloon::target(FrameCount(PERCEIVED), ratio, Ratio(2000));
    assert_eq!((supply.balloon().held(), supply.balloon().next()), (target, Change::Stay));
    assert_eq!(supply.gates().first_set(), None, "it has converged");
    let stats = bench.cram.node().frames().mm().stats(NodeId::ONE).unwrap();
    assert_eq!(stats.used.0, target.0 + bench.cram.usage().device.0, "the node's own count says so");

    // What does not compress goes: the balloon gives back.
    for old in 20..number {
        bench.cram.discard(page_of(program, old));
        bench.model.remove(&page_of(program, old));
    }
    fill(&mut bench, &mut number, 1, 20);
    assert_eq!(bench.cram.supply().balloon().held(), FrameCount(0));
    bench.check_all();
}

#[test]
fn while_the_balloon_converges_nothing_enters_and_afterwards_it_does() {
    let mut bench = Bench::new(2, Shape { does_weigh: false, ..BY_LINE }, 8, |settings| {
        settings.balloon_step = FrameCount(1);
    });
    let program = bench.program("one", 8);
    for number in 0..30 {
        let page = bench.random.page(64);
        bench.write(page_of(program, number), 0, &page).unwrap();
    }
    bench.device.drain(usize::MAX);
    bench.tick();
    assert!(bench.cram.supply().gates().is_set(Gate::Converging), "a frame at a time takes a while");
    settle(&mut bench);
    assert!(!bench.cram.supply().gates().is_set(Gate::Converging));
    let page = bench.random.page(2);
    bench.write(page_of(program, 31), 0, &page).unwrap();
    bench.check_all();
}

#[test]
fn the_owners_gate_is_not_opened_by_the_balloon_or_the_teardown() {
    let mut bench = Bench::new(3, BY_LINE, 4, |_| {});
    let program = bench.program("one", 4);
    for number in 0..10 {
        let page = bench.random.page(2);
        bench.write(page_of(program, number), 0, &page).unwrap();
    }
    let key = bench.cram.supply_mut().gates_mut().set::<Allocation>().unwrap();
    bench.cram.begin_emptying().unwrap();
    bench.cram.stop_emptying();
    settle(&mut bench);
    assert!(bench.cram.supply().gates().is_set(Gate::Allocation));
    let page = bench.random.page(2);
    let denied = bench.write(page_of(program, 50), 0, &page).unwrap_err();
    let Denied::OverLimit { why: Why::NotAdmitted(NotAdmitted::Gate(Gate::Allocation)), .. } = denied else {
        panic!("{denied}")
    };
    bench.cram.supply_mut().gates_mut().clear(key).unwrap();
    bench.write(page_of(program, 50), 0, &page).unwrap();
    bench.check_all();
}

#[test]
fn pressure_boosts_the_marks_of_the_node() {
    let mut bench = Bench::new(5, Shape { does_weigh: false, ..BY_LINE }, 4, |_| {});
    let program = bench.program("one", 4);
    assert_eq!(bench.cram.last_plan().unwrap().boost, FrameCount(0));
    for number in 0..200 {
        let page = bench.random.page(64);
        if bench.write(page_of(program, number), 0, &page).is_err() {
            break;
        }
    }
    settle(&mut bench);
    let plan = bench.cram.poll(Time(bench.now));
    assert!(plan.pressure > 900 && plan.boost > FrameCount(16) && !plan.is_demotion_on, "{plan:?}");
    bench.check_all();
}

#[test]
fn a_node_under_pressure_gives_pages_back_where_there_is_room_for_them() {
    let mut bench = Bench::new(6, Shape { does_weigh: false, ..BY_LINE }, 40, |_| {});
    let program = bench.program("one", 40);
    let full = (0..200).find(|&number| {
        let page = bench.random.page(64);
        bench.write(page_of(program, number), 0, &page).is_err()
    });
    settle(&mut bench);
    assert_eq!(bench.cram.supply().pressure(), 1000);
    let (before, room) = (bench.cram.usage().device, bench.cram.resident(program));
    assert_eq!(room, FrameCount(40), "all of it is in use, so none can come back");
    let resident: Vec<u64> =
        (0..full.unwrap()).filter(|&number| !bench.cram.is_on_device(page_of(program, number))).collect();
    for number in resident {
        bench.cram.discard(page_of(program, number));
        bench.model.remove(&page_of(program, number));
    }
    settle(&mut bench);
    assert!(bench.cram.usage().device < before && bench.cram.supply().pressure() < 1000);
    assert!(bench.cram.resident(program) <= FrameCount(40 - 5), "an eighth stays free");
    bench.check_all();
}
