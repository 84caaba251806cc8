//! `cargo xtask bench auto`: what automatic budgets find, and whether they cost what they say.
//!
//! The access program, bare and under `spm run --sysram auto` in turn. Its slow-down by its own count of accesses in the measured
//! time is set beside the allowed one and beside what `spm` itself makes of it. The warm-up counts for nothing here: a budget
//! is found in it. Pattern `moving` goes on to other pages with the measurement, so that the search begins once more.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::json;

use crate::bench::access_rows::{self, Shape};
use crate::figures::{self, Table, median, mib, short};
use crate::launch::{Bed, NeedSpm, Side};
use crate::process_tree;
use crate::programs::access::Pattern;
use crate::programs::corpus;

/// Command line.
#[derive(Args)]
pub(crate) struct Options {
    /// Slow-down that is allowed, per cent.
    #[arg(long, default_value_t = 5.0)]
    slowdown: f64,
    /// Data, MiB.
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// Rounds of a bare and a managed run.
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// Seconds before each measurement.
    #[arg(long, default_value_t = 25.0)]
    warm_seconds: f64,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Threads of the program.
    #[arg(long, default_value_t = 1)]
    threads: u32,
    /// Access patterns.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "hot,moving,zipf")]
    patterns: Vec<Pattern>,
    /// Draw the course of each pattern's last run into this directory: auto-PATTERN.svg.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Write the raw numbers to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(options.rounds > 0 && options.mib >= 16, "at least one round and 16 MiB");
    let bed = Bed::new(NeedSpm::Yes)?;
    let corpus = corpus::prepare(&bed.cache)?;
    let pictures = options.svg.as_deref().unwrap_or(&bed.dir);
    std::fs::create_dir_all(pictures).with_context(|| format!("cannot make {}", pictures.display()))?;
    let pictures = pictures.canonicalize()?;
    let mut table = Table::new(&[
        "pattern",
        "bare k/s",
        "auto k/s",
        "lost %",
        "allowed %",
        "by spm's count %",
        "RAM on average %",
        "at last",
        "steps",
    ]);
    let mut raw = Vec::new();
    for &pattern in &options.patterns {
        let shape = Shape {
            corpus: &corpus,
            mib: options.mib,
            pattern,
            threads: options.threads,
            warm_seconds: options.warm_seconds,
            seconds: options.seconds,
        };
        let (mut bare, mut managed, mut reports) = (Vec::new(), Vec::new(), Vec::new());
        let svg = pictures.join(format!("auto-{}.svg", pattern.name()));
        for round in 1..=options.rounds {
            for side in [Side::Bare, Side::Auto { slowdown: options.slowdown, svg: svg.clone() }] {
                eprintln!("auto: {}, round {round} of {}: {side:?}", pattern.name(), options.rounds);
                let (figures, report) =
                    access_rows::run(&bed, &side, &shape, &|pid| Ok(process_tree::read_tree_bytes(pid)))?;
                let Some(report) = report else {
                    bare.push(figures.rate);
                    continue;
                };
                managed.push(figures.rate);
                reports.push(report.auto.context("spm does not tell of the automatic budget")?);
            }
        }
        let lost: Vec<_> =
            bare.iter().zip(&managed).map(|(bare, managed)| (bare / managed - 1.0) * 100.0).collect();
        let of =
            |value: fn(&crate::report::AutoReport) -> f64| median(&reports.iter().map(value).collect::<Vec<_>>());
        let last = reports.last().context("no run")?;
        table.row(vec![
            pattern.name().into(),
            short(median(&bare) / 1e3),
            short(median(&managed) / 1e3),
            format!("{:+.1}", median(&lost)),
            short(options.slowdown),
            short(of(|report| report.slowdown_percent)),
            short(of(|report| report.mean_share_percent)),
            mib(last.last_bytes),
            last.steps.len().to_string(),
        ]);
        raw.push(json!({
            "pattern": pattern.name(), "bare_rate": bare, "auto_rate": managed, "lost_percent": lost, "auto": reports,
        }));
    }
    println!(
        "{} MiB, {} threads; a share of RAM is of what the program would take; per cent lost: of the time that it computes",
        options.mib, options.threads
    );
    table.print();
    figures::write_json(options.json.as_deref(), &json!({ "bench": "auto", "rows": raw }))
}
