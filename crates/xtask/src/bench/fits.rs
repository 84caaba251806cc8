//! `cargo xtask bench fits`: what management costs a program that needs none.
//!
//! Pairs of a bare and a managed run in turn, the order swapped from pair to pair, so that a drift of the machine
//! falls on both. The slow-down of a pair is the ratio of the two; the median over the pairs is judged, once for the
//! loop alone and once for the whole process, start of `spm` included. `--control` does the same with two bare
//! runs: what the noise of the machine alone makes of it. CPU time (of `spm` and of its threads in the program too) is
//! shown beside it: on a busy machine it is the steadier figure.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::figures::{self, MIB, Table, median, quantile, short};
use crate::launch::{Bed, Job, NeedSpm, Side};
use crate::programs::kernels::Kind;

/// Slow-down that the project promises at most, percent.
const GOAL_PERCENT: f64 = 1.0;

/// Command line.
#[derive(Args)]
pub(crate) struct Options {
    /// Pairs of runs.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(3..))]
    pairs: u32,
    /// Budget of the managed run, MiB; the programs take about 200.
    #[arg(long, default_value_t = 1024)]
    sysram_mib: u64,
    /// Work of a run, in percent of about three seconds' worth.
    #[arg(long, default_value_t = 100)]
    work: u32,
    /// Run bare against bare: the noise of the machine, no spm needed.
    #[arg(long)]
    control: bool,
    /// Write the raw numbers to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Which loops; all when none is named.
    #[arg(value_enum)]
    kernels: Vec<Kind>,
}

struct Run {
    total_seconds: f64,
    loop_seconds: f64,
    cpu_seconds: f64,
    check: String,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let bed = Bed::new(if options.control { NeedSpm::No } else { NeedSpm::Yes })?;
    let other = if options.control { Side::Bare } else { Side::Spm { sysram_bytes: options.sysram_mib * MIB } };
    let mut table =
        Table::new(&["kernel", "bare s", "other s", "loop %", "quartiles", "whole process %", "CPU %", "goal %"]);
    let mut raw = Vec::new();
    for kind in Kind::value_variants() {
        if !options.kernels.is_empty() && !options.kernels.contains(kind) {
            continue;
        }
        let kernel = format!("{kind:?}").to_lowercase();
        let (mut bare, mut managed) = (Vec::new(), Vec::new());
        for pair in 0..options.pairs {
            eprintln!("fits: {kernel} pair {} of {}", pair + 1, options.pairs);
            let measure = |side: &Side| measure(&bed, side, &kernel, options.work);
            if pair % 2 == 0 {
                bare.push(measure(&Side::Bare)?);
                managed.push(measure(&other)?);
            } else {
                managed.push(measure(&other)?);
                bare.push(measure(&Side::Bare)?);
            }
        }
        ensure!(
            bare.iter().chain(&managed).all(|run| run.check == bare[0].check),
            "{kernel} computed different results"
        );
        let slow_down = |seconds: fn(&Run) -> f64| -> Vec<f64> {
            bare.iter().zip(&managed).map(|(bare, other)| (seconds(other) / seconds(bare) - 1.0) * 100.0).collect()
        };
        let (in_loop, in_all) = (slow_down(|run| run.loop_seconds), slow_down(|run| run.total_seconds));
        let in_cpu = slow_down(|run| run.cpu_seconds);
        let seconds = |runs: &[Run]| -> Vec<f64> { runs.iter().map(|run| run.loop_seconds).collect() };
        table.row(vec![
            kernel.clone(),
            short(median(&seconds(&bare))),
            short(median(&seconds(&managed))),
            format!("{:+.2}", median(&in_loop)),
            format!("{:+.2}..{:+.2}", quantile(&in_loop, 0.25), quantile(&in_loop, 0.75)),
            format!("{:+.2}", median(&in_all)),
            format!("{:+.2}", median(&in_cpu)),
            format!("<= {GOAL_PERCENT}: {}", if median(&in_all) <= GOAL_PERCENT { "kept" } else { "missed" }),
        ]);
        raw.push(json!({
            "kernel": kernel, "bare_loop_seconds": seconds(&bare), "other_loop_seconds": seconds(&managed),
            "loop_slow_down_percent": in_loop, "process_slow_down_percent": in_all,
            "cpu_slow_down_percent": in_cpu,
        }));
    }
    println!("a program that fits its budget, {} pairs, other = {other:?}", options.pairs);
    table.print();
    figures::write_json(
        options.json.as_deref(),
        &json!({ "bench": "fits", "control": options.control, "rows": raw }),
    )
}

fn measure(bed: &Bed, side: &Side, kernel: &str, work: u32) -> anyhow::Result<Run> {
    let words = ["kernel", kernel, "--work", &work.to_string()].map(String::from);
    let job = Job::own("fits", &words)?.limit_seconds(600).unsampled();
    let finished = bed.run(side, &job)?;
    let text = std::fs::read_to_string(bed.dir.join("fits.stdout"))?;
    let (seconds, check) = text.trim().split_once(' ').context("the kernel printed something else")?;
    Ok(Run {
        total_seconds: finished.elapsed.as_secs_f64(),
        loop_seconds: seconds.parse()?,
        cpu_seconds: finished.cpu.as_secs_f64(),
        check: check.into(),
    })
}
