//! `cargo xtask sim`: simulated machines, seed by seed, and what allocation costs as they grow.
//!
//! `--seed N` runs one seed and, with `--trace FILE`, keeps its steps; `--replay FILE` runs a trace; `--programs` runs programs
//! inside budgets ([`sim_programs`]); `--curve` prints
//! start-up and cost of an allocation from a small machine to 1 TiB.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, anyhow};
use spmem_core::units::{DomainId, Order};
use spmem_core::wall::Request;
use spmem_sim::program::Recording;
use spmem_sim::{Checks, Generator, Outcome, Shape, Step, World, trace};

use crate::sim_programs;

/// Which run.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// The seed, or the first of --seeds.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Steps of a seed.
    #[arg(long, default_value_t = 10_000)]
    steps: usize,
    /// Write the steps of the (last) seed to FILE, also when one breaks a rule.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Run the steps of FILE instead, or what `spm run --trace FILE` recorded.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seed", "seeds", "trace", "curve", "programs"])]
    replay: Option<PathBuf>,
    /// Budget of what was recorded, MiB [default: that of the run].
    #[arg(long, value_name = "MIB", requires = "replay")]
    budget_mib: Option<u64>,
    /// Run programs of several kinds within several budgets instead.
    #[arg(long, conflicts_with_all = ["seeds", "trace", "curve"])]
    programs: bool,
    /// Print what start-up and an allocation cost on machines of 1 GiB to 1 TiB instead.
    #[arg(long)]
    curve: bool,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if options.curve {
        return curve();
    }
    if options.programs {
        return sim_programs::made(options.seed);
    }
    if let Some(path) = &options.replay {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("the trace {} cannot be read", path.display()))?;
        if Recording::is_one(&text) {
            return sim_programs::replay(path, &text, options.budget_mib);
        }
        let steps = trace::read(&text).with_context(|| format!("{} is no trace", path.display()))?;
        let mut tally = Tally::default();
        let mut world = World::default();
        for (step, at) in steps.iter().zip(2..) {
            tally.note(&world.apply(step).with_context(|| format!("line {at}: {step:?}"))?);
        }
        world.check_all()?;
        println!("{}: {tally}", path.display());
        return Ok(());
    }
    for seed in options.seed..options.seed.saturating_add(options.seeds) {
        let mut steps = Vec::new();
        let outcome = run_seed(seed, options.steps, &mut steps);
        if let Some(path) = &options.trace {
            std::fs::write(path, trace::write(&steps)?)
                .with_context(|| format!("the trace {} cannot be written", path.display()))?;
        }
        println!("seed {seed}: {}", outcome?);
    }
    Ok(())
}

#[derive(Default)]
struct Tally {
    done: u64,
    refused: u64,
}

impl Tally {
    fn note(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Done => self.done += 1,
            Outcome::Refused(_) => self.refused += 1,
        }
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} steps done, {} refused, no rule broken", self.done, self.refused)
    }
}

fn run_seed(seed: u64, count: usize, steps: &mut Vec<Step>) -> anyhow::Result<Tally> {
    let (mut world, mut generator, mut tally) = (World::default(), Generator::new(seed), Tally::default());
    for at in 0..count {
        let step = generator.next(&world);
        steps.push(step.clone());
        let outcome = world.apply(&step);
        tally.note(&outcome.with_context(|| {
            format!(
                "seed {seed}, step {at}, {step:?}; again with: cargo xtask sim --seed {seed} --steps {}",
                at + 1
            )
        })?);
    }
    world.check_all().with_context(|| format!("seed {seed}, after {count} steps"))?;
    Ok(tally)
}

/// Pairs of allocation and free that are timed at once.
const PAIRS: u32 = 1_000_000;

fn curve() -> anyhow::Result<()> {
    println!(
        "{:>8}  {:>5}  {:>7}  {:>9}  {:>12}  {:>12}",
        "memory", "nodes", "domains", "start ms", "order 0 ns", "order 9 ns"
    );
    let shapes = [(1, 1 << 18, 10), (4, 1 << 20, 50), (16, 1 << 21, 250)]
        .map(|(nodes, frames_per_node, domains)| Shape { nodes, frames_per_node, domains, depth: 8 });
    // As much memory in one node: what grows with a node is seen apart from what grows with their number.
    let one_node = Shape { nodes: 1, frames_per_node: 1 << 28, ..Shape::TERABYTE };
    for shape in shapes.into_iter().chain([Shape::TERABYTE, one_node]) {
        let start = Instant::now();
        let mut world = World::new(Checks::WhenAsked);
        for step in shape.steps() {
            match world.apply(&step)? {
                Outcome::Done => {}
                Outcome::Refused(reason) => return Err(anyhow!("{step:?}: {reason}")),
            }
        }
        let start_ms = start.elapsed().as_secs_f64() * 1e3;
        world.check_all()?;
        let bytes = u64::from(shape.nodes) * shape.frames_per_node * 4096;
        let [small, huge] = [Order::ZERO, Order::HUGE].map(|order| pair_ns(&mut world, &shape, order));
        println!(
            "{:>6} G  {:>5}  {:>7}  {start_ms:>9.1}  {:>12.1}  {:>12.1}",
            bytes >> 30,
            shape.nodes,
            shape.domains,
            small?,
            huge?
        );
    }
    Ok(())
}

/// The least time of an allocation and its free from the deepest domain, ns.
fn pair_ns(world: &mut World, shape: &Shape, order: Order) -> anyhow::Result<f64> {
    let mm = world.mm_mut();
    let domain = mm.registry().find_domain(&shape.path(shape.domains - 1)).unwrap_or(DomainId::ROOT);
    let mut pass = mm.registry().admit(&Request::of(domain))?;
    let mut least = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        for _ in 0..PAIRS {
            let block = mm.alloc_with(&mut pass, order)?;
            mm.free(block)?;
        }
        least = least.min(start.elapsed().as_secs_f64() * 1e9 / f64::from(PAIRS));
    }
    Ok(least)
}
