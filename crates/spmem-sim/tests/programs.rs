//! Programs inside budgets, by core's decisions: budgets are kept, every page comes back as it was, nobody waits for ever.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use spmem_core::units::{Bytes, FrameCount, PAGE_SIZE};
use spmem_sim::program::{Content, Costs, Mix, Pattern, Program, Report, Setup, Source, run};

const PATTERNS: [Pattern; 4] = [Pattern::Uniform, Pattern::Skewed, Pattern::Sequential, Pattern::Moving];
const PLAIN: Mix = Mix { mean_bytes: 1500, incompressible: 0, pinned: 0 };
const MANY: FrameCount = FrameCount(1 << 18);

fn program(seed: u64, pattern: Pattern, pages: usize, threads: usize, content: Mix) -> Program {
    let part = pages / threads;
    let thread = |n| Source::made(seed << 8 | n as u64, pattern, (n * part, part), 6 * part, 300);
    Program { pages, content: Content::Made(content), threads: (0..threads).map(thread).collect() }
}

fn alone(pattern: Pattern, pages: usize, per_cent: u64, content: Mix, node: FrameCount) -> Report {
    let limit = Bytes(pages as u64 * PAGE_SIZE / 100 * per_cent);
    let programs = vec![program(1, pattern, pages, 1, content)];
    run(Setup { limit, node, programs, costs: Costs::default() })
        .unwrap_or_else(|error| panic!("{pattern:?}: {error}"))
}

/// A tree from a seed: how many processes, of which size, with what in their pages, and how much for all.
fn random_setup(seed: u64) -> Setup {
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    let count = random.random_range(1..6);
    let mut pages = 0;
    let programs = (0..count)
        .map(|number| {
            let content = Mix {
                mean_bytes: random.random_range(100..3000),
                incompressible: if random.random_bool(0.3) { random.random_range(0..1000) } else { 0 },
                pinned: if random.random_bool(0.3) { random.random_range(0..500) } else { 0 },
            };
            let size = random.random_range(500..20_000);
            pages += size;
            let pattern = PATTERNS[random.random_range(0..PATTERNS.len())];
            program(seed << 16 | number, pattern, size, random.random_range(1..4), content)
        })
        .collect();
    let limit = Bytes(pages as u64 * PAGE_SIZE / 100 * random.random_range(8..120));
    let node = if random.random_bool(0.2) { FrameCount(random.random_range(1..pages as u64 / 4)) } else { MANY };
    Setup { limit, node, programs, costs: Costs::default() }
}

#[test]
fn a_hundred_random_trees_keep_their_budgets_and_their_pages() {
    let (mut promoted, mut full, mut refused, mut clean) = (0, 0, 0, 0);
    for seed in 0..100 {
        let report = run(random_setup(seed)).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
        promoted += report.promoted;
        (full, refused, clean) = (full + report.full, refused + report.refused, clean + report.clean);
    }
    // All of it must be common, or the checks see little.
    assert!(
        promoted > 100_000 && full > 100 && refused > 1000 && clean > 1000,
        "{promoted} {full} {refused} {clean}"
    );
}

#[test]
fn a_seed_is_a_run() {
    assert_eq!(run(random_setup(3)).unwrap(), run(random_setup(3)).unwrap());
    assert_ne!(run(random_setup(3)).unwrap(), run(random_setup(4)).unwrap());
}

#[test]
fn a_program_that_fits_its_budget_never_waits_and_loses_no_page() {
    let report = alone(Pattern::Uniform, 20_000, 150, PLAIN, MANY);
    assert_eq!((report.demoted, report.stalled_ns, report.faults_ns.len()), (0, 0, 0));
}

#[test]
fn a_skewed_program_faults_less_than_a_uniform_one() {
    let faults = |pattern| alone(pattern, 40_000, 50, PLAIN, MANY).faults_ns.len();
    assert!(faults(Pattern::Skewed) * 4 < faults(Pattern::Uniform) * 3);
}

#[test]
fn a_program_that_walks_is_read_ahead_for() {
    let report = alone(Pattern::Sequential, 40_000, 50, PLAIN, MANY);
    assert!(report.read_ahead * 2 > report.promoted, "{} of {}", report.read_ahead, report.promoted);
}

#[test]
fn what_does_not_compress_goes_on_over_its_budget() {
    let content = Mix { incompressible: 1000, ..PLAIN };
    let report = alone(Pattern::Uniform, 20_000, 25, content, MANY);
    assert_eq!((report.demoted, report.accesses), (0, 6 * 20_000));
    assert_eq!(report.peak.0 / PAGE_SIZE, 20_000 + 20_000 * 12 / PAGE_SIZE);
}

#[test]
fn a_full_node_drops_nothing() {
    let report = alone(Pattern::Uniform, 20_000, 25, PLAIN, FrameCount(1000));
    assert!(report.full > 0 && report.accesses == 6 * 20_000);
}
