use proptest::prelude::*;

use super::*;

const PAGE: Bytes = Bytes(PAGE_SIZE);

fn supply(capacity: u64, reserve: u64) -> Supply {
    let burst = Burst::Device { dirty_lines: reserve, granule: Bytes(1) };
    let mut supply = Supply::new(Settings { stale_ns: 1000, ..Settings::new(Ratio(2000), burst) });
    let mark = supply.mark();
    supply.observe(Time(0), mark, Some(Reading { capacity: Bytes(capacity), used: Bytes(0) }));
    supply
}

fn enter(supply: &mut Supply, now: u64) -> Result<(), NotAdmitted> {
    let admission = supply.admit(Time(now), PAGE)?;
    supply.entered(admission);
    Ok(())
}

fn hear(supply: &mut Supply, now: u64, capacity: u64, used: u64) -> Health {
    let mark = supply.mark();
    supply.observe(Time(now), mark, Some(Reading { capacity: Bytes(capacity), used: Bytes(used) }))
}

#[test]
fn what_enters_counts_in_full_until_it_is_measured_and_never_takes_the_reserve() {
    let capacity = 10 * PAGE_SIZE;
    let mut supply = supply(capacity, 2 * PAGE_SIZE);
    let count = (0..).take_while(|_| enter(&mut supply, 0).is_ok()).count();
    assert_eq!(count, 8);
    assert_eq!(supply.pressure(), 1000);
    hear(&mut supply, 1, capacity, 2 * PAGE_SIZE);
    assert_eq!(supply.ratio(), Some(Ratio(4000)));
    let count = (0..).take_while(|_| enter(&mut supply, 1).is_ok()).count();
    assert_eq!(count, 6);
}

#[test]
fn what_enters_while_the_device_is_asked_is_not_covered_by_the_answer() {
    let mut supply = supply(10 * PAGE_SIZE, 0);
    enter(&mut supply, 0).unwrap();
    let mark = supply.mark();
    let open = supply.admit(Time(0), PAGE).unwrap();
    enter(&mut supply, 0).unwrap();
    supply.observe(Time(1), mark, Some(Reading { capacity: Bytes(10 * PAGE_SIZE), used: Bytes(100) }));
    assert_eq!(supply.room().unmeasured, Bytes(2 * PAGE_SIZE));
    supply.entered(open);
    hear(&mut supply, 2, 10 * PAGE_SIZE, 300);
    assert_eq!(supply.room().unmeasured, Bytes(0));
}

#[test]
fn a_stuck_counter_makes_no_room_and_is_dead_after_a_while() {
    let capacity = 100 * PAGE_SIZE;
    let mut supply = supply(capacity, 3 * PAGE_SIZE);
    for now in 1..999 {
        if now <= 40 {
            enter(&mut supply, now).unwrap();
        }
        assert_eq!(hear(&mut supply, now, capacity, 0), Health::Live);
    }
    assert_eq!(supply.room().unmeasured, Bytes(40 * PAGE_SIZE), "nothing was learnt");
    assert_eq!(hear(&mut supply, 1000, capacity, 0), Health::Dead { since: Time(0) });
    let count = (0..).take_while(|_| enter(&mut supply, 1000).is_ok()).count();
    assert_eq!(count, 3, "the budget");
    assert!(matches!(enter(&mut supply, 1001), Err(NotAdmitted::Dead { since: Time(0), budget: Bytes(0) })));
    assert_eq!(hear(&mut supply, 1002, capacity, 500), Health::Live, "news revive it");
    enter(&mut supply, 1002).unwrap();
}

#[test]
fn nobody_waits_for_a_measure_that_does_not_come() {
    let mut supply = supply(10 * PAGE_SIZE, 4 * PAGE_SIZE);
    (0..6).for_each(|_| enter(&mut supply, 0).unwrap());
    assert!(enter(&mut supply, 1).unwrap_err().may_pass(), "once it is measured it may be less");
    let dead = enter(&mut supply, 1000).unwrap_err();
    assert_eq!(dead, NotAdmitted::Dead { since: Time(0), budget: Bytes(0) });
    assert!(!dead.may_pass());
}

#[test]
fn processes_that_share_a_store_leave_room_for_what_others_have_under_way() {
    let capacity = Bytes::mib(1024);
    let room = |stored, processes| Room::shared(Bytes::mib(stored), capacity, processes);
    let own = Bytes::mib(50);
    assert!(!room(2048, 1).is_full_for(Bytes::mib(2048)), "alone its own frames say when they are full");
    assert_eq!(room(100, 3).reserve, Bytes(2 * OPEN_TRANSACTIONS * PAGE_SIZE));
    assert!(!room(1021, 3).is_full_for(own) && room(1022, 3).is_full_for(own));
    assert_eq!(room(0, 4096).reserve, Bytes::mib(128), "never more than an eighth");
    assert_eq!([0, 512, 1022].map(|stored| room(stored, 3).pressure()), [0, 0, 1000]);
}

#[test]
fn silence_is_death_also_for_who_never_asks() {
    let mut supply = supply(100 * PAGE_SIZE, PAGE_SIZE);
    enter(&mut supply, 1).unwrap();
    let later = supply.admit(Time(1000), PAGE).unwrap();
    assert_eq!(supply.health(), Health::Dead { since: Time(0) });
    supply.entered(later);
    assert!(matches!(supply.admit(Time(1000), PAGE), Err(NotAdmitted::Dead { .. })));
    let mark = supply.mark();
    assert_eq!(supply.observe(Time(1001), mark, None), Health::Dead { since: Time(0) });
    let nonsense = Some(Reading { capacity: Bytes(5), used: Bytes(6) });
    assert_eq!(supply.observe(Time(1001), mark, nonsense), Health::Dead { since: Time(0) });
}

#[test]
fn a_quiet_node_is_not_dead() {
    let mut supply = supply(100 * PAGE_SIZE, PAGE_SIZE);
    for now in [1, 1000, 5000, 1_000_000] {
        assert_eq!(hear(&mut supply, now, 100 * PAGE_SIZE, 0), Health::Live);
    }
    enter(&mut supply, 1_000_001).unwrap();
}

#[test]
fn a_gate_is_cleared_by_its_own_key_only() {
    let (mut one, mut other) = (Gates::new(), Gates::new());
    let key = one.set::<Allocation>().unwrap();
    let foreign = other.set::<Allocation>().unwrap();
    let foreign = one.clear(foreign).unwrap_err();
    assert!(one.is_set(Gate::Allocation));
    one.clear(key).unwrap();
    let again = one.set::<Allocation>().unwrap();
    assert_ne!(again, foreign, "a key is never made twice");
    other.clear(foreign).unwrap();
    assert_eq!((one.first_set(), other.first_set()), (Some(Gate::Allocation), None));
    one.clear(again).unwrap();
}

#[test]
fn nothing_enters_while_any_gate_is_shut() {
    fn shut<K: sealed_kind::Any>(supply: &mut Supply) {
        K::shut(supply);
    }
    let mut supply = supply(10 * PAGE_SIZE, 0);
    shut::<Allocation>(&mut supply);
    shut::<Converging>(&mut supply);
    shut::<TearingDown>(&mut supply);
    enter(&mut supply, 0).unwrap();
}

/// Each gate in turn.
mod sealed_kind {
    use super::*;

    pub trait Any: Sized {
        fn shut(supply: &mut Supply);
    }

    macro_rules! any {
        ($($kind:ident),*) => {$(
            impl Any for $kind {
                fn shut(supply: &mut Supply) {
                    let key = supply.gates_mut().set::<$kind>().unwrap();
                    let refused = supply.admit(Time(0), PAGE).unwrap_err();
                    assert_eq!(refused, NotAdmitted::Gate(Gate::$kind));
                    assert_eq!(refused.may_pass(), Gate::$kind != Gate::Allocation);
                    assert!(!supply.plan(FrameCount(1), &Watermarks::default()).is_demotion_on);
                    supply.gates_mut().clear(key).unwrap();
                }
            }
        )*};
    }
    any!(Allocation, Converging, TearingDown);
}

#[test]
fn a_teardown_waits_for_room_for_all_and_gives_up_in_the_end() {
    let mut gates = Gates::new();
    let mut teardown = Teardown::begin(&mut gates).unwrap();
    assert!(Teardown::begin(&mut gates).is_err());
    let (there, mut now, mut waits) = (FrameCount(10), Time(5), 0);
    while let Attempt::Wait(until) = teardown.attempt(now, there, FrameCount(9)) {
        assert!(until > now);
        (now, waits) = (until, waits + 1);
    }
    assert_eq!(waits, TEARDOWN_ATTEMPTS);
    assert_eq!(teardown.attempt(now, there, FrameCount(10)), Attempt::GiveUp);
    teardown.end(&mut gates).unwrap();
    let mut teardown = Teardown::begin(&mut gates).unwrap();
    assert_eq!(teardown.attempt(now, there, FrameCount(10)), Attempt::Copy(there));
    assert_eq!(teardown.attempt(now, FrameCount(0), FrameCount(0)), Attempt::Complete);
    teardown.end(&mut gates).unwrap();
    assert_eq!(gates.first_set(), None);
}

#[test]
fn pressure_counts_a_falling_ratio_ahead() {
    let capacity = 1000 * PAGE_SIZE;
    let run = |second: u64| {
        let mut supply = supply(capacity, 0);
        for _ in 0..900 {
            enter(&mut supply, 0).unwrap();
        }
        hear(&mut supply, 1, capacity, 450 * PAGE_SIZE);
        hear(&mut supply, 2, capacity, second * PAGE_SIZE);
        supply.pressure()
    };
    assert_eq!(run(450), 0);
    assert!(run(700) > 0, "at 700 of 1000 with 700 left by the measure alone there would be none");
}

proptest! {
    /// The model: a device that has compressed everything but what waits in its caches, at any size of each page.
    #[test]
    fn the_device_is_never_overrun_whatever_pages_turn_out_to_be(
        seed in prop::collection::vec((0u64..=4096, any::<bool>(), any::<bool>()), 1..400),
        waiting in 0usize..8,
    ) {
        let capacity = 40 * PAGE_SIZE;
        let mut supply = supply(capacity, waiting as u64 * PAGE_SIZE);
        // Sizes of what lies there, compressed; the newest `waiting` are not compressed yet.
        let (mut sizes, mut now) = (alloc::vec::Vec::new(), 0);
        for (size, is_leaving, is_asked) in seed {
            now += 1;
            if is_leaving && !sizes.is_empty() {
                sizes.remove(0);
                supply.left(PAGE);
            } else if enter(&mut supply, now).is_ok() {
                sizes.push(size);
            }
            if is_asked {
                let seen: u64 = sizes.iter().rev().skip(waiting).sum();
                hear(&mut supply, now, capacity, seen);
            }
            prop_assert!(sizes.iter().sum::<u64>() <= capacity, "overrun");
        }
    }

    #[test]
    fn pressure_rises_as_room_is_used_up(used in 0u64..1000, more in 0u64..1000) {
        let at = |used: u64| {
            let mut supply = supply(1000, 100);
            hear(&mut supply, 1, 1000, used.min(1000));
            supply.pressure()
        };
        prop_assert!(at(used) <= at(used + more));
        prop_assert_eq!(at(900), 1000);
        prop_assert_eq!(at(775), 0);
    }

    #[test]
    fn the_balloon_reaches_the_latest_target_in_steps(targets in prop::collection::vec(0u64..10_000, 1..20), step in 1u64..3000) {
        let mut balloon = Balloon::new(FrameCount(step));
        for target in targets {
            balloon.aim(FrameCount(target));
            // One step only before the next word: the latest wins.
            match balloon.next() {
                Change::Take(frames) => { prop_assert!(frames.0 <= step); balloon.took(frames); }
                Change::Give(frames) => { prop_assert!(frames.0 <= step); balloon.gave(frames); }
                Change::Stay => prop_assert_eq!(balloon.held().0, target),
            }
        }
        let mut steps = 0;
        loop {
            match balloon.next() {
                Change::Take(frames) => balloon.took(frames),
                Change::Give(frames) => balloon.gave(frames),
                Change::Stay => break,
            }
            steps += 1;
            prop_assert!(steps <= 10_000 / step + 1);
        }
        prop_assert_eq!(balloon.held(), balloon.aimed_at());
    }

    #[test]
    fn what_is_stored_always_fits_beside_the_balloon(perceived in 1u64..1 << 30, used in 1u64..1 << 30, ratio in 1u64..5000, advertised in 1000u64..5000) {
        // Physical memory is what the promise makes of the frames; what is stored fits into it at this ratio.
        let physical = perceived * 1000 / advertised;
        let stored = used.min(physical) * ratio / 1000;
        let target = Balloon::target(FrameCount(perceived), Ratio(ratio), Ratio(advertised));
        prop_assert!(stored.min(perceived) + target.0 <= perceived);
    }
}
