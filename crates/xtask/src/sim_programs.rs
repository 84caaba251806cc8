//! `cargo xtask sim --programs` and `--replay` of what `spm run --trace` recorded: programs inside budgets, by the decisions
//! of the memory manager.

use std::path::Path;

use anyhow::{Context, bail};
use spmem_core::units::{Bytes, FrameCount, PAGE_SIZE};
use spmem_sim::program::{Content, Costs, Mix, Pattern, Program, Recording, Report, Setup, Source, run};

/// Pages of a made program, ...
const PAGES: usize = 40_000;
/// ... and how often each is touched, on average.
const TOUCHES: usize = 20;
/// Budgets, of a hundred parts of what the program takes.
const BUDGETS: [u64; 5] = [25, 40, 50, 75, 100];

/// Made programs within budgets.
pub(crate) fn made(seed: u64) -> anyhow::Result<()> {
    head("pattern");
    let mix = Mix { mean_bytes: 1500, incompressible: 5, pinned: 0 };
    for pattern in [Pattern::Uniform, Pattern::Skewed, Pattern::Sequential, Pattern::Moving] {
        for budget in BUDGETS {
            let threads = vec![Source::made(seed, pattern, (0, PAGES), TOUCHES * PAGES, 300)];
            let program = Program { pages: PAGES, content: Content::Made(mix), threads };
            let limit = Bytes(PAGES as u64 * PAGE_SIZE / 100 * budget);
            let node = FrameCount(PAGES as u64);
            let setup = Setup { limit, node, programs: vec![program], costs: Costs::default() };
            let report = run(setup).with_context(|| format!("{pattern:?} within {budget} %, seed {seed}"))?;
            line(&format!("{pattern:?} {budget} %").to_lowercase(), limit, &report);
        }
    }
    Ok(())
}

/// What was recorded, within the budget that it had, or another.
pub(crate) fn replay(path: &Path, text: &str, budget_mib: Option<u64>) -> anyhow::Result<()> {
    let recording = Recording::read(text).with_context(|| format!("{} is no trace", path.display()))?;
    if recording.lost() > 0 {
        eprintln!("{}: {} records are missing", path.display(), recording.lost());
    }
    let Some(limit) = budget_mib.map(Bytes::mib).or_else(|| recording.budget()) else {
        bail!("{} was recorded without a budget: give one by --budget-mib", path.display());
    };
    let report = run(recording.setup(limit)).with_context(|| format!("{}", path.display()))?;
    head("trace");
    let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    line(&name, limit, &report);
    Ok(())
}

fn head(what: &str) {
    println!(
        "{what:<18} {:>8} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>9}",
        "budget", "peak", "touches", "faults", "rescued", "promoted", "unasked", "p50 us", "p99 us", "stall ms"
    );
}

fn line(name: &str, limit: Bytes, report: &Report) {
    let mib = |bytes: Bytes| bytes.0 as f64 / f64::from(1 << 20);
    let us = |per_mille| report.fault_ns(per_mille) / 1000;
    println!(
        "{name:<18} {:>7.1}M {:>7.1}M {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>9}",
        mib(limit),
        mib(report.peak),
        report.accesses,
        report.faults_ns.len(),
        report.rescued,
        report.promoted - report.read_ahead,
        report.read_ahead,
        us(500),
        us(990),
        report.stalled_ns / 1_000_000,
    );
}
