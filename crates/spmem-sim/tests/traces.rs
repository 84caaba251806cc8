//! Traces that once broke a rule, cut to what it takes, and one of the first version of the format.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use spmem_sim::program::{Recording, run};
use spmem_sim::trace::TraceError;
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

const NODE: &str =
    r#"{"add_node":{"node":0,"is_spm":false,"is_easy":false,"frames":1024,"is_zero":true,"services":0,"tier":0}}"#;

/// What a trace can say that no machine does: nothing of it is a broken rule, nor ends the simulator.
#[test]
fn numbers_that_cannot_be_are_refused() {
    const MAX: u64 = u64::MAX;
    let node = |frames: u64| NODE.replace("1024", &frames.to_string());
    let range = |frames: u64| {
        format!(
            r#"{{"add_range":{{"node":0,"frames":{frames},"is_zero":true,"is_spm":false,"is_easy":false,"class":1,"services":0}}}}"#
        )
    };
    let ask = r#"{"domain":"","asked":null,"mode":"default","grants":[],"is_movable":true}"#;
    let alloc = r#"{"alloc":{"block":1,"domain":"","order":0,"asked":null,"mode":"default","grants":[],"is_movable":true}}"#;
    let run = |frames: u32| format!(r#"{{"alloc_contiguous":{{"block":1,"frames":{frames},"ask":{ask}}}}}"#);
    let device = |frames: u64, waiting: u64| {
        format!(r#"{{"add_device":{{"device":0,"frames":{frames},"waiting":{waiting}}}}}"#)
    };
    let domain = |path: &str| format!(r#"{{"make_domain":{{"path":"{path}"}}}}"#);
    let reserve = |frames: u64| format!(r#"{{"set_reserve":{{"node":0,"frames":{frames}}}}}"#);
    for refused in [
        vec![node(MAX)],
        vec![node(1 << 33)],
        vec![NODE.to_owned(), range(MAX)],
        vec![NODE.to_owned(), range((1 << 32) - 1)],
        vec![NODE.to_owned(), reserve(MAX), alloc.to_owned()],
        vec![NODE.to_owned(), reserve(MAX), run(8)],
        vec![NODE.to_owned(), run((1 << 18) + 1)],
        vec![NODE.to_owned(), run(u32::MAX)],
        vec![device(MAX, 1)],
        vec![device(1, MAX)],
        vec![domain("/")],
        vec![domain("/..")],
        vec![domain("/a\\nb")],
        vec![domain(&format!("/{}", "a".repeat(256)))],
    ] {
        let text = format!("{{\"spmem_trace\":1}}\n{}\n", refused.join("\n"));
        let (_, outcomes) = replay(&text);
        assert!(matches!(outcomes.last(), Some(Outcome::Refused(_))), "{text}{outcomes:?}");
    }
}

#[test]
fn what_ends_at_the_last_moment_that_can_be_told_never_ends() {
    let grant = format!(
        r#"{{"grant":{{"grant":1,"nodes":[0],"terms":{{"rights":63,"quota":4096,"expires":{}}}}}}}"#,
        u64::MAX
    );
    let advance = format!(r#"{{"advance":{{"ns":{}}}}}"#, u64::MAX);
    let text = ["{\"spmem_trace\":1}", NODE, &advance, &grant, &advance].join("\n");
    let (_, outcomes) = replay(&text);
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Done), "{outcomes:?}");
}

#[test]
fn a_recording_of_pages_that_no_process_has_names_the_line() {
    let fault = |page: u64, pages: u64| {
        format!(
            "{{\"spmem_program_trace\":1}}\n{{\"budget\":{{\"bytes\":{}}}}}\n{{\"fault\":{{\"ns\":1,\"process\":7,\"page\":{page},\"pages\":{pages},\"is_write\":false,\"from\":\"node\"}}}}\n",
            u64::MAX
        )
    };
    for text in [fault(u64::MAX, 2), fault(1, u64::MAX), fault(1 << 45, 1), fault(1, (1 << 18) + 1)] {
        let refused = Recording::read(&text).unwrap_err();
        assert!(matches!(refused, TraceError::Line { line: 3, .. }), "{text}: {refused:?}");
    }
    let text = fault(5, 3) + &format!("{{\"lost\":{{\"records\":{}}}}}\n", u64::MAX).repeat(2);
    let recording = Recording::read(&text).unwrap();
    assert_eq!(recording.lost(), u64::MAX);
    assert!(run(recording.setup(recording.budget().unwrap())).is_ok());
}
