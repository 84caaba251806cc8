//! `cargo xtask workloads`: unmodified programs inside a RAM budget, their output compared with an unmanaged run.
//!
//! Each program runs bare first; its peak RSS there sets the budgets (25 % and 50 % of it by default), and what it
//! printed there is what every managed run must print. [`jobs`] are programs that run and end, [`redis`] is a server
//! with a checking client, [`sources`] makes their input. A failure of one program does not stop the others; the exit
//! status tells whether there was any.

mod jobs;
mod redis;
mod sources;

use std::path::PathBuf;

use anyhow::{bail, ensure};
use clap::Args;
use serde_json::json;

use crate::figures::{self, Table, mib, short};
use crate::launch::{Bed, Finished, NeedSpm, Side};
use crate::report::Report;

/// What the budget may be exceeded by: 32 MiB and 5 %.
const OVERRUN_BYTES: u64 = 32 << 20;
const OVERRUN_PART: u64 = 20;

/// Command line.
#[derive(Args)]
pub(crate) struct Options {
    /// Little data, for CI: all in two to three minutes.
    #[arg(long)]
    small: bool,
    /// Budgets, percent of the peak RSS of the bare run.
    #[arg(long, value_delimiter = ',', default_value = "25,50", value_parser = clap::value_parser!(u64).range(1..=400))]
    budgets: Vec<u64>,
    /// Only the bare runs; needs no spm.
    #[arg(long)]
    bare_only: bool,
    /// Write the raw numbers to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Which programs: redis, sqlite, numpy, sort, g++, threads; all when none is named.
    names: Vec<String>,
}

/// How much data.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    Full,
    /// For CI.
    Small,
}

impl Scale {
    /// One of two numbers.
    fn pick<T>(self, full: T, small: T) -> T {
        if self == Self::Full { full } else { small }
    }
}

/// A program of the list.
struct Workload {
    name: &'static str,
    run: fn(&Bed, &Side, Scale) -> anyhow::Result<Outcome>,
}

const WORKLOADS: [Workload; 6] = [
    Workload { name: "redis", run: redis::run },
    Workload { name: "sqlite", run: jobs::sqlite },
    Workload { name: "numpy", run: jobs::numpy },
    Workload { name: "sort", run: jobs::sort },
    Workload { name: "g++", run: jobs::compiler },
    Workload { name: "threads", run: jobs::threads },
];

/// One run of one program.
struct Outcome {
    seconds: f64,
    /// What was printed, or what all values were.
    digest: String,
    max_rss_bytes: u64,
    sampled_peak_bytes: u64,
    report: Option<Report>,
    /// More figures of this program, by name.
    figures: Vec<(&'static str, f64)>,
}

impl Outcome {
    /// The outcome of a program whose stdout is its result.
    fn of(finished: Finished) -> Self {
        Self {
            seconds: finished.elapsed.as_secs_f64(),
            digest: finished.digest,
            max_rss_bytes: finished.max_rss_bytes,
            sampled_peak_bytes: finished.sampled_peak_bytes,
            report: finished.report,
            figures: Vec::new(),
        }
    }

    fn to_json(&self) -> serde_json::Value {
        let figures: serde_json::Map<_, _> =
            self.figures.iter().map(|(name, value)| ((*name).into(), json!(value))).collect();
        json!({
            "seconds": self.seconds, "digest": self.digest, "max_rss_bytes": self.max_rss_bytes,
            "sampled_peak_bytes": self.sampled_peak_bytes, "report": self.report, "figures": figures,
        })
    }
}

/// Runs one program of the list bare, with all its data.
pub(crate) fn run_bare(bed: &Bed, name: &str) -> anyhow::Result<()> {
    let workload = WORKLOADS.iter().find(|workload| workload.name == name);
    let workload = workload.ok_or_else(|| anyhow::anyhow!("there is no workload called {name}"))?;
    (workload.run)(bed, &Side::Bare, Scale::Full).map(|_| ())
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let unknown = options.names.iter().find(|name| WORKLOADS.iter().all(|workload| workload.name != *name));
    ensure!(unknown.is_none(), "there is no workload called {}", unknown.map_or("", String::as_str));
    let bed = Bed::new(if options.bare_only { NeedSpm::No } else { NeedSpm::Yes })?;
    let mut rows = Rows::new();
    for workload in &WORKLOADS {
        if options.names.is_empty() || options.names.iter().any(|name| name == workload.name) {
            rows.add_workload(&bed, workload, options);
        }
    }
    rows.print();
    figures::write_json(options.json.as_deref(), &json!({ "task": "workloads", "rows": rows.raw }))?;
    if rows.failures > 0 {
        bail!("{} of {} runs failed", rows.failures, rows.runs);
    }
    Ok(())
}

struct Rows {
    table: Table,
    more: Vec<String>,
    raw: Vec<serde_json::Value>,
    runs: usize,
    failures: usize,
}

impl Rows {
    fn new() -> Self {
        let table = Table::new(&[
            "program",
            "budget",
            "bare s",
            "managed s",
            "ratio",
            "peak (report)",
            "peak (sampled)",
            "overrun",
            "demoted",
            "promoted",
            "rescued",
            "stored ratio",
            "output",
        ]);
        Self { table, more: Vec::new(), raw: Vec::new(), runs: 0, failures: 0 }
    }

    fn add_workload(&mut self, bed: &Bed, workload: &Workload, options: &Options) {
        let scale = if options.small { Scale::Small } else { Scale::Full };
        eprintln!("workloads: {}: bare", workload.name);
        self.runs += 1;
        let bare = match (workload.run)(bed, &Side::Bare, scale) {
            Ok(bare) => bare,
            Err(error) => return self.fail(workload.name, "bare", &error),
        };
        eprintln!("workloads:   {} s, peak RSS {}", short(bare.seconds), mib(bare.max_rss_bytes));
        self.raw.push(json!({ "program": workload.name, "side": "bare", "run": bare.to_json() }));
        self.add_figures(workload.name, "bare", &bare);
        if options.bare_only {
            self.bare_row(workload.name, &bare);
            return;
        }
        for percent in &options.budgets {
            let sysram_bytes = bare.max_rss_bytes * percent / 100;
            let budget = format!("{percent}% {}", mib(sysram_bytes));
            eprintln!("workloads: {}: budget {budget}", workload.name);
            self.runs += 1;
            match (workload.run)(bed, &Side::Spm { sysram_bytes }, scale) {
                Ok(managed) => self.managed_row(workload.name, &budget, sysram_bytes, &bare, &managed),
                Err(error) => self.fail(workload.name, &budget, &error),
            }
        }
    }

    fn bare_row(&mut self, name: &str, bare: &Outcome) {
        let mut cells =
            vec![name.to_string(), format!("- ({} RSS)", mib(bare.max_rss_bytes)), short(bare.seconds)];
        cells.extend(["-", "-", "-"].map(String::from));
        cells.push(mib(bare.sampled_peak_bytes));
        cells.resize(13, "-".into());
        self.table.row(cells);
    }

    fn managed_row(&mut self, name: &str, budget: &str, sysram_bytes: u64, bare: &Outcome, managed: &Outcome) {
        self.raw.push(json!({
            "program": name, "side": "spm", "sysram_bytes": sysram_bytes, "run": managed.to_json(),
            "is_same": managed.digest == bare.digest,
        }));
        let Some(report) = &managed.report else {
            return self.fail(name, budget, &anyhow::anyhow!("spm left no report"));
        };
        let allowed = sysram_bytes + OVERRUN_BYTES + sysram_bytes / OVERRUN_PART;
        let is_over = |bytes: u64| if bytes > allowed { "!" } else { "" };
        let is_same = managed.digest == bare.digest;
        self.failures += usize::from(!is_same);
        self.table.row(vec![
            name.into(),
            budget.into(),
            short(bare.seconds),
            short(managed.seconds),
            short(managed.seconds / bare.seconds),
            mib(report.sysram_peak_bytes) + is_over(report.sysram_peak_bytes),
            mib(managed.sampled_peak_bytes) + is_over(managed.sampled_peak_bytes),
            mib(report.overrun_peak_bytes),
            report.demoted_pages.to_string(),
            report.promoted_pages.to_string(),
            report.rescued_pages.to_string(),
            report.stored_ratio().map_or_else(|| "-".into(), short),
            if is_same { "same" } else { "DIFFERENT" }.into(),
        ]);
        if report.unmanaged_processes > 0 {
            let (part, all) = (report.unmanaged_processes, report.processes + report.unmanaged_processes);
            self.more.push(format!("{name}, {budget}: {part} of {all} processes ran unmanaged"));
        }
        self.add_figures(name, budget, managed);
    }

    fn add_figures(&mut self, name: &str, budget: &str, outcome: &Outcome) {
        if !outcome.figures.is_empty() {
            let list: Vec<_> =
                outcome.figures.iter().map(|(what, value)| format!("{what} {}", short(*value))).collect();
            self.more.push(format!("{name}, {budget}: {}", list.join(", ")));
        }
    }

    fn fail(&mut self, name: &str, budget: &str, error: &anyhow::Error) {
        self.failures += 1;
        eprintln!("workloads: {name}, {budget}: FAILED: {error:#}");
        self.raw.push(json!({ "program": name, "budget": budget, "failure": format!("{error:#}") }));
        let mut cells = vec![name.to_string(), budget.to_string()];
        cells.resize(12, "-".into());
        cells.push("FAILED".into());
        self.table.row(cells);
    }

    fn print(&self) {
        self.table.print();
        println!();
        self.more.iter().for_each(|line| println!("{line}"));
        println!("budget: percent of the bare run's peak RSS; !: beyond the budget by more than 32 MiB + 5 %");
        println!("{} runs, {} failures", self.runs, self.failures);
    }
}
