//! Traces that once broke a rule, cut to what it takes, and one of the first version of the format.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use spmem_sim::{Outcome, World, trace};

/// What became of the steps of a trace, none of which breaks a rule.
fn replay(text: &str) -> (World, Vec<Outcome>) {
    let mut world = World::default();
    let apply = |(step, line)| match world.apply(step) {
        Ok(outcome) => outcome,
        Err(violation) => panic!("line {line}, {step:?}: {violation}"),
    };
    let steps = trace::read(text).unwrap();
    let outcomes = steps.iter().zip(2..).map(apply).collect();
    world.check_all().unwrap();
    (world, outcomes)
}

#[test]
fn who_lost_a_grant_is_not_told_of_sysram_that_the_policy_never_meant() {
    let (_, outcomes) = replay(include_str!("traces/lost-grant.jsonl"));
    let Some(Outcome::Refused(why)) = outcomes.last() else { panic!("{outcomes:?}") };
    assert!(why.starts_with("node 1: ") && why.contains("revoked"), "{why}");
    assert!(outcomes[..outcomes.len() - 1].iter().all(|outcome| *outcome == Outcome::Done), "{outcomes:?}");
}

#[test]
fn a_preferred_node_stays_the_one_that_it_was_when_it_was_set() {
    let (world, outcomes) = replay(include_str!("traces/preferred-wish.jsonl"));
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Done), "{outcomes:?}");
    let used = |node| world.mm().stats(spmem_core::units::NodeId::new(node).unwrap()).unwrap().used.0;
    assert_eq!([used(0), used(1), used(2)], [0, 0, 1]);
}

#[test]
fn a_trace_of_the_first_version_is_the_run_that_it_was() {
    let (_, outcomes) = replay(include_str!("traces/first-version.jsonl"));
    let done = outcomes.iter().filter(|outcome| **outcome == Outcome::Done).count();
    assert_eq!((done, outcomes.len()), (238, 400));
}
