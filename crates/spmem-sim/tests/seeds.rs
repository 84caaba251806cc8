//! R1 to R16, R18, R20 and R21 on random machines: every step of many seeds is held against the model.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use spmem_sim::{Generator, Outcome, Step, World, trace};

const SEEDS: u64 = 100;
const STEPS: usize = 1500;
/// Of steps: `Step` has so many variants.
const KINDS: usize = 41;

/// The name of a step, as a trace has it.
fn kind(step: &Step) -> String {
    let value = serde_json::to_value(step).unwrap();
    value.as_object().unwrap().keys().next().unwrap().clone()
}

#[test]
fn a_hundred_seeds_break_no_rule() {
    let (mut done, mut refused) = (BTreeMap::new(), 0);
    for seed in 0..SEEDS {
        let (mut world, mut generator) = (World::default(), Generator::new(seed));
        for at in 0..STEPS {
            let step = generator.next(&world);
            match world.apply(&step) {
                Ok(Outcome::Done) => *done.entry(kind(&step)).or_insert(0) += 1,
                Ok(Outcome::Refused(_)) => refused += 1,
                Err(violation) => panic!("seed {seed}, step {at}, {step:?}: {violation}"),
            }
        }
        world.check_all().unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
    }
    // All must be common, or the checks see little.
    assert!(done.len() == KINDS && done.values().all(|&count| count > 100), "{done:?} done");
    assert!(done.values().sum::<usize>() > 50_000 && refused > 30_000, "{done:?} done, {refused} refused");
}

#[test]
fn a_seed_is_a_run_and_a_trace_replays_it() {
    let run = |seed| {
        let (mut world, mut generator) = (World::default(), Generator::new(seed));
        let steps: Vec<_> = (0..500)
            .map(|_| {
                let step = generator.next(&world);
                let outcome = world.apply(&step).unwrap();
                (step, outcome)
            })
            .collect();
        steps
    };
    let first = run(7);
    assert_eq!(first, run(7));
    assert_ne!(first, run(8));
    let steps: Vec<_> = first.iter().map(|(step, _)| step.clone()).collect();
    let mut world = World::default();
    for (step, (_, outcome)) in trace::read(&trace::write(&steps).unwrap()).unwrap().iter().zip(&first) {
        assert_eq!(world.apply(step).as_ref(), Ok(outcome));
    }
}
