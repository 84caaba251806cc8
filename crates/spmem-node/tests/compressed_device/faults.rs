//! The device fails in each way that it can, under load: only the owner of what is lost is hurt, and told exactly what.

use spmem_core::compressed::{Health, NotAdmitted};
use spmem_core::units::{Bytes, DomainId, NodeId, PAGE_SIZE};
use spmem_node::cram::{Denied, MAX_NOTICES, Notice, PageId, Why};
use spmem_node::model::{Fault, Shape};
use spmem_node::{Damage, Handle};

use super::harness::{BY_LINE, Bench, STALE, page_of};

const HOSTILE: Shape = Shape { does_weigh: false, ..BY_LINE };

/// Random writes of random pages; how many were refused, and why the last.
fn load(bench: &mut Bench, program: DomainId, writes: u64, pages: u64) -> (u64, Option<Why>) {
    let (mut refused, mut last) = (0, None);
    for _ in 0..writes {
        let id = page_of(program, bench.random.below(pages));
        let noise = bench.random.below(65);
        let page = bench.random.page(noise);
        match bench.write(id, 0, &page) {
            Ok(()) => {}
            Err(Denied::OverLimit { why, .. }) => (refused, last) = (refused + 1, Some(why)),
            Err(other) => panic!("{other}"),
        }
        bench.tick();
    }
    (refused, last)
}

#[test]
fn a_dead_telemetry_path_lets_a_budget_in_and_then_nothing_and_nothing_is_lost() {
    for fault in [Fault::Stuck, Fault::Silent] {
        for seed in 0..10 {
            let mut bench = Bench::new(seed, HOSTILE, 8, |settings| settings.budget = Bytes(3 * PAGE_SIZE));
            let program = bench.program("one", 8);
            load(&mut bench, program, 30, 30);
            bench.device.set_fault(fault);
            let (refused, why) = load(&mut bench, program, 300, 100);
            assert!(matches!(bench.cram.supply().health(), Health::Dead { .. }), "{fault:?}");
            assert!(refused > 0, "{fault:?}: it goes on without end");
            assert!(
                matches!(why, Some(Why::NotAdmitted(NotAdmitted::Dead { budget, .. })) if budget.0 < PAGE_SIZE),
                "{why:?}"
            );
            let on_device = bench.cram.usage().device;
            load(&mut bench, program, 100, 100);
            assert!(bench.cram.usage().device <= on_device, "no more demotion");
            bench.check_all();
            // It comes back to life when it is heard again.
            bench.device.set_fault(Fault::None);
            bench.tick();
            assert_eq!(bench.cram.supply().health(), Health::Live);
            load(&mut bench, program, 50, 30);
            bench.check_all();
        }
    }
}

#[test]
fn lost_notices_cost_nothing_and_a_storm_no_more_than_a_reading() {
    for seed in 0..10 {
        let mut bench = Bench::new(seed, HOSTILE, 8, |_| {});
        let program = bench.program("one", 8);
        bench.device.set_lossy(true);
        load(&mut bench, program, 150, 100);
        bench.check_all();
        bench.device.set_lossy(false);
        bench.device.send(Notice::Low, 100 * MAX_NOTICES);
        bench.device.send(Notice::High, 100 * MAX_NOTICES);
        let before = bench.device.counts().readings;
        for _ in 0..20 {
            bench.tick();
        }
        assert_eq!(bench.device.counts().readings - before, 20, "one reading a poll");
        load(&mut bench, program, 150, 100);
        bench.check_all();
    }
}

#[test]
fn poison_under_load_hurts_the_owner_only_and_names_him_his_page_and_the_frame() {
    for (seed, is_lossy) in (0..20).map(|seed| (seed, seed % 2 == 1)) {
        let mut bench = Bench::new(seed, HOSTILE, 16, |_| {});
        let (hurt, other) = (bench.program("hurt", 8), bench.program("other", 8));
        load(&mut bench, hurt, 60, 40);
        load(&mut bench, other, 60, 40);
        // Without a notice it is found when it is read.
        bench.device.set_lossy(is_lossy);
        let there: Vec<PageId> =
            bench.model.keys().copied().filter(|&id| id.owner == hurt && bench.cram.is_on_device(id)).collect();
        let victim = there[usize::try_from(bench.random.below(there.len() as u64)).unwrap()];
        let (frame, offset) = place_of(&bench, victim);
        bench.device.poison(offset + 64 * bench.random.below(64));
        let known = bench.model.remove(&victim).unwrap();
        load(&mut bench, other, 30, 40);
        let mut page = [0; spmem_node::PAGE_BYTES];
        let Err(Denied::Hurt(told)) = bench.cram.read(victim, &mut page) else { panic!("it is lost") };
        assert!(page != *known, "not handed out");
        assert_eq!((told.page, told.node, told.frame), (victim, NodeId::ONE, Some(frame)));
        assert!(matches!(told.damage, Damage::Unreadable | Damage::Poisoned), "{told}");
        assert_eq!(bench.cram.take_hurt(), Some(told), "told once, by name");
        assert_eq!(bench.cram.take_hurt(), None, "nobody else is hurt");
        let Err(Denied::Hurt(again)) = bench.write(victim, 0, &page) else { panic!("it stays lost") };
        assert_eq!(again, told);
        // Given up, it may be had anew, elsewhere; the frame is out of use.
        bench.cram.discard(victim);
        bench.write(victim, 0, &page).unwrap();
        load(&mut bench, hurt, 60, 40);
        assert_eq!(bench.cram.node().frames().mm().stats(NodeId::ONE).unwrap().poisoned.0, 1);
        assert!(bench.cram.node().handles().all(|(handle, _)| frame_of(handle) != frame));
        bench.check_all();
    }
}

#[test]
fn poison_of_a_free_frame_hurts_nobody_and_it_is_not_given_out() {
    let mut bench = Bench::new(9, BY_LINE, 4, |_| {});
    let program = bench.program("one", 4);
    for number in 0..10 {
        bench.device.poison(PAGE_SIZE * 10 * number);
    }
    bench.tick();
    load(&mut bench, program, 200, 60);
    assert_eq!(bench.cram.take_hurt(), None);
    assert_eq!(bench.cram.node().frames().mm().stats(NodeId::ONE).unwrap().poisoned.0, 10);
    bench.check_all();
}

#[test]
fn a_silent_device_is_dead_after_the_time_that_was_set_and_not_before() {
    let mut bench = Bench::new(1, BY_LINE, 2, |_| {});
    let program = bench.program("one", 2);
    load(&mut bench, program, 10, 6);
    bench.device.drain(usize::MAX);
    bench.tick();
    let since = bench.now;
    bench.device.set_fault(Fault::Silent);
    while bench.cram.supply().health() == Health::Live {
        bench.tick();
    }
    assert_eq!(bench.now - since, STALE);
}

/// The frame and the offset of a page that lies on the device.
fn place_of(bench: &Bench, id: PageId) -> (spmem_core::units::FrameNumber, u64) {
    let known = &bench.model[&id];
    let is_it = |handle: &Handle| {
        let mut page = [0; spmem_node::PAGE_BYTES];
        spmem_node::Backend::load(bench.cram.node(), *handle, &mut page).is_ok() && page == **known
    };
    let handle = bench.cram.node().handles().map(|(handle, _)| handle).find(is_it).unwrap();
    (frame_of(handle), bench.cram.node().place_on_medium(handle).unwrap())
}

fn frame_of(handle: Handle) -> spmem_core::units::FrameNumber {
    spmem_core::units::FrameNumber(u32::try_from(handle.raw() & 0xffff_ffff).unwrap())
}
