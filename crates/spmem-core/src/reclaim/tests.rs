use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;

/// Facts with a limit of up to 16 GiB and usage up to one and a half times of it.
fn facts() -> impl Strategy<Value = Facts> {
    let limit = prop_oneof![0u64..32 << 20, 0u64..16 << 30];
    let times = (0u64..200_000_000, 0u64..1 << 30);
    (limit, 0u64..1500, 0u64..=1000, 0u64..1 << 22, 0u64..1 << 18, times, (0u32..64, 0u32..64)).prop_map(
        |(limit, used, own, resident, holding, (since, growth), (processes, processors))| {
            let tree_used = limit / 1000 * used;
            Facts {
                limit: Some(Bytes(limit)),
                tree_used: Bytes(tree_used),
                own_used: Bytes(tree_used / 1000 * own),
                own_resident_pages: resident,
                holding_pages: holding,
                since_last_ns: since,
                growth: Bytes(growth),
                processes,
                processors,
            }
        },
    )
}

/// Facts of a process that could evict all it is ever asked to, and is asked.
fn with_plenty(facts: Facts) -> Facts {
    Facts { own_resident_pages: 1 << 40, own_used: Bytes(facts.own_used.0.max(1)), ..facts }
}

proptest! {
    #[test]
    fn no_process_evicts_below_high_and_all_together_enough(
        base in facts(), parts in prop::collection::vec(1u64..1000, 1..20),
    ) {
        let Some(limit) = base.limit else { unreachable!() };
        let marks = Marks::of(limit);
        let total: u64 = parts.iter().sum();
        let mut left = base.tree_used.0;
        let owns: Vec<u64> = parts.iter().enumerate().map(|(n, part)| {
            let own = if n + 1 == parts.len() { left } else { left.min(base.tree_used.0 / total * part) };
            left -= own;
            own
        }).collect();
        let count = u32::try_from(owns.len()).unwrap();
        let plans: Vec<Plan> = owns.iter().map(|&own| {
            plan(&with_plenty(Facts { own_used: Bytes(own), processes: count, ..base }))
        }).collect();
        let evicted = plans.iter().map(|plan| plan.evict_pages).sum::<u64>() * PAGE_SIZE;
        let rounding = u64::from(count) * PAGE_SIZE;
        prop_assert!(evicted <= base.tree_used.0.saturating_sub(marks.high.0) + rounding);
        if base.tree_used > marks.low {
            prop_assert!(base.tree_used.0 - evicted.min(base.tree_used.0) <= marks.high.0, "enough");
        }
        if base.tree_used <= marks.high {
            prop_assert_eq!(evicted, 0);
        }
    }

    #[test]
    fn more_use_never_means_less_eviction_an_opener_gate_or_a_longer_sleep(base in facts(), more in 0u64..1 << 30) {
        let base = with_plenty(base);
        let (now, then) = (plan(&base), plan(&Facts { tree_used: Bytes(base.tree_used.0 + more), ..base }));
        prop_assert!(then.evict_pages >= now.evict_pages);
        prop_assert!(then.gate >= now.gate);
        // From the gate on the fault handler tells of growth: the sleep need not be as short as many processors make it below.
        prop_assert!(then.sleep_ns <= now.sleep_ns.max(SLEEP_GATED_NS.max(SLEEP_STUCK_NS)));
        if then.gate == Gate::Open {
            prop_assert!(then.sleep_ns <= now.sleep_ns);
        }
    }

    #[test]
    fn the_sleep_ends_before_the_fastest_growth_reaches_the_gate(facts in facts()) {
        let plan = plan(&facts);
        prop_assert!(plan.sleep_ns <= SLEEP_MAX_NS);
        let Some(limit) = facts.limit else { unreachable!() };
        let marks = Marks::of(limit);
        if facts.tree_used <= marks.gate && plan.sleep_ns > SLEEP_MIN_NS {
            let growing = u128::from(facts.processors.clamp(1, GROWING_MAX));
            let grown = u128::from(plan.sleep_ns) * growing * u128::from(GROWTH_MAX_BYTES_PER_S) / 1_000_000_000;
            prop_assert!(u128::from(facts.tree_used.0) + grown <= u128::from(marks.close.0));
        }
        prop_assert!(plan.sleep_ns > 0 || plan.evict_pages > 0, "no spinning");
    }

    #[test]
    fn a_plan_is_within_what_the_process_has_and_the_bounds(facts in facts()) {
        let plan = plan(&facts);
        prop_assert!(plan.evict_pages <= facts.own_resident_pages + facts.holding_pages);
        let Some(limit) = facts.limit else { unreachable!() };
        let marks = Marks::of(limit);
        if facts.tree_used > marks.high {
            prop_assert!((1..=HOLDING_MAX_PAGES).contains(&plan.holding_target_pages));
        } else {
            prop_assert_eq!((plan.holding_target_pages, plan.evict_pages), (0, 0));
        }
        prop_assert!(marks.gate <= marks.high && marks.high <= marks.low);
        prop_assert!(marks.low <= marks.close && marks.close <= limit);
        prop_assert_eq!(plan.gate == Gate::Open, facts.tree_used < marks.gate);
        let can_evict = facts.own_resident_pages + facts.holding_pages > 0;
        prop_assert_eq!(plan.gate == Gate::Closed, facts.tree_used >= marks.close && can_evict);
    }

    #[test]
    fn without_a_limit_nothing_ever_happens(facts in facts()) {
        let plan = plan(&Facts { limit: None, ..facts });
        let idle = Plan { evict_pages: 0, holding_target_pages: 0, gate: Gate::Open, sleep_ns: SLEEP_MAX_NS };
        prop_assert_eq!(plan, idle);
    }

    #[test]
    fn no_facts_make_it_panic(limit: Option<u64>, numbers: [u64; 6], processes: u32, processors: u32) {
        let [tree, own, own_resident_pages, holding_pages, since_last_ns, growth] = numbers;
        plan(&Facts {
            limit: limit.map(Bytes), tree_used: Bytes(tree), own_used: Bytes(own), own_resident_pages,
            holding_pages, since_last_ns, growth: Bytes(growth), processes, processors,
        });
    }
}

#[test]
fn fast_growth_begins_eviction_before_the_low_mark() {
    let calm = Facts {
        limit: Some(Bytes::mib(512)),
        tree_used: Bytes::mib(509),
        own_used: Bytes::mib(509),
        own_resident_pages: 1 << 20,
        since_last_ns: 1_000_000,
        ..Facts::default()
    };
    assert_eq!(plan(&calm).evict_pages, 0);
    let storm = Facts { growth: Bytes::mib(4), ..calm };
    assert_eq!(plan(&storm).evict_pages, Bytes::mib(1).frames_ceil().0);
}

#[test]
fn far_below_the_limit_it_sleeps_long() {
    let facts = Facts { limit: Some(Bytes::mib(512)), tree_used: Bytes::mib(50), ..Facts::default() };
    assert_eq!(plan(&facts).sleep_ns, SLEEP_MAX_NS);
}

/// With many processors the room between gate and close lasts less than the sleep above the gate, where growth is told of.
#[test]
fn many_processors_shorten_the_sleep_below_the_gate_only() {
    let limit = Bytes(13_008_487_319);
    let at =
        |tree_used| plan(&Facts { limit: Some(limit), tree_used, processors: 12, ..Facts::default() }).sleep_ns;
    let marks = Marks::of(limit);
    assert!(at(marks.gate) < SLEEP_GATED_NS);
    assert_eq!((at(Bytes(marks.gate.0 + 1)), at(Bytes(marks.low.0 + 1))), (SLEEP_GATED_NS, SLEEP_STUCK_NS));
}
