//! `cargo xtask bench zram`: cold pages beside kernel swap on zram, at equal total RAM, in one run.
//!
//! The kernel's side is a memory cgroup with a limit of a quarter of the data, and swap on zram with lz4. What it
//! takes in all is that limit plus what zram holds (`mem_used_total`) at the end of the measured time; exactly that
//! sum is the `--sysram` of the spm run that follows, because spm's budget counts its compressed store too. The two
//! alternate for some rounds; medians are compared. A bare run of each row comes first: everything resident.
//!
//! CPU time is that of the program's processes, `spm` included; the kernel reclaims and compresses in the faulting
//! thread, so it is in there as well. Known hole: zram's table (16 bytes a page of the device) is not counted.

use std::cell::Cell;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::json;

use crate::bench::peer::{self, MemoryGroup, Zram};
use crate::bench::zram_plot::{self, Bar, Course};
use crate::bench::{access_rows, redis_rows};
use crate::figures::{self, MIB, Table, median, mib, short};
use crate::launch::{Bed, NeedSpm, Side};
use crate::process_tree;
use crate::programs::access::Pattern;
use crate::programs::corpus;

/// What the project wants to reach against the peer.
const GOAL_RATE: f64 = 1.5;
const GOAL_P99: f64 = 0.1;
/// Share of the data that the peer's cgroup may hold: one in so many.
const RESIDENT_PART: u64 = 4;
/// How often a run of the peer is tried that the kernel kills.
const TRIES: u32 = 6;

/// Which programs.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub(crate) enum Which {
    /// The access program of this tree.
    Access,
    /// Redis.
    Redis,
}

/// Command line.
#[derive(Args)]
pub(crate) struct Options {
    /// Data of the access program, and values of Redis, MiB.
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// Alternating rounds.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds before each measurement.
    #[arg(long, default_value_t = 8.0)]
    warm_seconds: f64,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 12.0)]
    seconds: f64,
    /// Threads of the access program, one row for each number.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    threads: Vec<u32>,
    /// Access patterns.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "uniform,zipf")]
    patterns: Vec<Pattern>,
    /// Only the kernel's side; needs no spm.
    #[arg(long)]
    kernel_only: bool,
    /// Draw the comparison into this file (SVG).
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Write the raw numbers to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Which programs; both when none is named.
    #[arg(value_enum)]
    programs: Vec<Which>,
}

/// Reads what a side takes at the end of the measured time, bytes; it is given the process id.
pub(super) type Probe<'a> = dyn Fn(u32) -> anyhow::Result<u64> + 'a;

/// One run of one row.
#[derive(Clone, Serialize)]
pub(super) struct Figures {
    /// Operations a second.
    pub(super) rate: f64,
    /// Of faults (access program), of requests (Redis).
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) p999_us: f64,
    /// Share of accesses that were faults.
    pub(super) slow_share: f64,
    /// Of a phase change: how long until throughput is what it then stays.
    pub(super) settle_seconds: Option<f64>,
    /// Accesses in each tenth of a second.
    pub(super) slices: Vec<u64>,
    pub(super) cpu_seconds_per_million: f64,
    /// RAM in all at the end of the measured time.
    pub(super) ram_bytes: u64,
    /// Highest sampled anonymous memory of the processes (what is in zram is not in it).
    pub(super) peak_bytes: u64,
}

enum Shape<'a> {
    Access(access_rows::Shape<'a>),
    Redis(redis_rows::Shape),
}

struct Row<'a> {
    name: String,
    shape: Shape<'a>,
    bare: Figures,
    kernel: Vec<Figures>,
    zram_ratio: Vec<f64>,
    /// Runs that ended because the kernel killed the program.
    oom_kills: u32,
    spm: Vec<Figures>,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(options.rounds > 0 && options.mib >= 16, "at least one round and 16 MiB");
    let bed = Bed::new(if options.kernel_only { NeedSpm::No } else { NeedSpm::Yes })?;
    let corpus = corpus::prepare(&bed.cache)?;
    let ratio = corpus::measure_ratio(&corpus)?;
    // Before the first minute of work: whether the peer can be had at all.
    drop((Zram::new(16 * MIB)?, MemoryGroup::new(64 * MIB)?));
    let mut rows = Vec::new();
    for (name, shape) in shapes(options, &corpus) {
        eprintln!("zram: {name}: everything resident");
        let bare = shape.run(&bed, &Side::Bare, &|pid| Ok(process_tree::read_tree_bytes(pid)))?;
        rows.push(Row {
            name,
            shape,
            bare,
            kernel: Vec::new(),
            zram_ratio: Vec::new(),
            oom_kills: 0,
            spm: Vec::new(),
        });
    }
    for round in 1..=options.rounds {
        for row in &mut rows {
            row.round(&bed, options, round)?;
        }
    }
    print_head(options, ratio);
    print_rows(&rows, options);
    let raw: Vec<_> = rows.iter().map(Row::to_json).collect();
    if let Some(file) = &options.svg {
        write_picture(file, &rows, options)?;
    }
    let head = json!({ "bench": "zram", "mib": options.mib, "rounds": options.rounds, "corpus_lz4_ratio": ratio });
    figures::write_json(options.json.as_deref(), &json!({ "head": head, "rows": raw }))
}

fn shapes<'a>(options: &Options, corpus: &'a std::path::Path) -> Vec<(String, Shape<'a>)> {
    let has = |which| options.programs.is_empty() || options.programs.contains(&which);
    let (warm_seconds, seconds, mib) = (options.warm_seconds, options.seconds, options.mib);
    let mut shapes = Vec::new();
    if has(Which::Access) {
        for threads in options.threads.iter().copied() {
            for pattern in options.patterns.iter().copied() {
                let name = format!("access {pattern:?} {threads}T").to_lowercase();
                let shape = access_rows::Shape { corpus, mib, pattern, threads, warm_seconds, seconds };
                shapes.push((name, Shape::Access(shape)));
            }
        }
    }
    if has(Which::Redis) {
        shapes.push(("redis".into(), Shape::Redis(redis_rows::Shape { mib, warm_seconds, seconds })));
    }
    shapes
}

impl Shape<'_> {
    fn run(&self, bed: &Bed, side: &Side, probe: &Probe<'_>) -> anyhow::Result<Figures> {
        match self {
            Self::Access(shape) => Ok(access_rows::run(bed, side, shape, probe)?.0),
            Self::Redis(shape) => redis_rows::run(bed, side, shape, probe),
        }
    }
}

impl Row<'_> {
    fn round(&mut self, bed: &Bed, options: &Options, round: u32) -> anyhow::Result<()> {
        // For Redis the data is what it takes when all is resident, its own overhead included.
        let data_bytes = match &self.shape {
            Shape::Access(shape) => shape.mib * MIB,
            Shape::Redis(_) => self.bare.ram_bytes,
        };
        let limit_bytes = data_bytes / RESIDENT_PART;
        eprintln!("zram: {}: round {round} of {}: kernel, limit {}", self.name, options.rounds, mib(limit_bytes));
        let Some(kernel) = self.run_kernel(bed, data_bytes, limit_bytes)? else {
            eprintln!("zram:   the peer cannot do this row: the round is left out");
            return Ok(());
        };
        let sysram_bytes = kernel.ram_bytes;
        eprintln!("zram:   {} a second, p99 {} us", short(kernel.rate), short(kernel.p99_us));
        self.kernel.push(kernel);
        if !options.kernel_only {
            eprintln!("zram: {}: round {round}: spm, --sysram {}", self.name, mib(sysram_bytes));
            let probe = |pid| Ok(process_tree::read_tree_bytes(pid));
            let spm = self.shape.run(bed, &Side::Spm { sysram_bytes }, &probe)?;
            eprintln!("zram:   {} a second, p99 {} us", short(spm.rate), short(spm.p99_us));
            self.spm.push(spm);
        }
        Ok(())
    }

    /// The peer's run. The kernel sometimes gives up on reclaim and kills the program although swap is free: that
    /// is counted, and the run repeated; `None` when it happened [`TRIES`] times.
    fn run_kernel(&mut self, bed: &Bed, data_bytes: u64, limit_bytes: u64) -> anyhow::Result<Option<Figures>> {
        for _ in 0..TRIES {
            // Far more room than needed costs nothing; 11 of 35 runs were killed with it, 13 of 27 with twice the data,
            // on Linux 6.18: perhaps chance.
            let zram = Zram::new(data_bytes * 8)?;
            let group = MemoryGroup::new(limit_bytes)?;
            let ratio = Cell::new(f64::NAN);
            let probe = |_| {
                let held = zram.read_use()?;
                ratio.set(held.stored as f64 / held.used as f64);
                let charged = mib(group.read_usage_bytes()?);
                eprintln!("zram:   charged {charged}, {} of swap in {}", mib(held.stored), mib(held.used));
                Ok(limit_bytes + held.used)
            };
            match self.shape.run(bed, &Side::Cgroup { procs: group.procs() }, &probe) {
                Ok(figures) => {
                    self.zram_ratio.push(ratio.get());
                    return Ok(Some(figures));
                }
                Err(_) if group.read_oom_kills()? > 0 => {
                    eprintln!("zram:   the kernel killed the program (out of memory in its cgroup): once more");
                    self.oom_kills += 1;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn to_json(&self) -> serde_json::Value {
        json!({ "row": self.name, "bare": self.bare, "kernel": self.kernel, "zram_ratio": self.zram_ratio,
            "kernel_oom_kills": self.oom_kills, "spm": self.spm })
    }
}

fn print_head(options: &Options, ratio: f64) {
    println!("{}", peer::describe_settings());
    println!(
        "{} MiB of pages (lz4 by 4 KiB: {ratio:.2} times), 30 % writes, every access checked; cgroup limit = data / {RESIDENT_PART}",
        options.mib
    );
    println!(
        "equal total RAM: spm's --sysram = cgroup limit + zram's mem_used_total of the kernel run of the same round"
    );
    println!(
        "medians of {} alternating rounds; p50/p99/p99.9: faults (access), requests (redis)\n",
        options.rounds
    );
}

fn print_rows(rows: &[Row<'_>], options: &Options) {
    let mut table = Table::new(&[
        "",
        "side",
        "kops/s",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "faults %",
        "settled s",
        "CPU s/Mop",
        "RAM",
        "peak",
        "stored ratio",
    ]);
    for row in rows {
        table.row(side_cells(&row.name, "resident", std::slice::from_ref(&row.bare), f64::NAN));
        table.row(side_cells("", "kernel zram", &row.kernel, median(&row.zram_ratio)));
        if !row.spm.is_empty() {
            table.row(side_cells("", "spm", &row.spm, f64::NAN));
        }
    }
    table.print();
    for row in rows.iter().filter(|row| row.oom_kills > 0) {
        println!(
            "{}: the kernel killed the program {} times in its cgroup; {} of {} rounds count",
            row.name,
            row.oom_kills,
            row.kernel.len(),
            options.rounds
        );
    }
    if options.kernel_only {
        return;
    }
    println!();
    let mut table =
        Table::new(&["spm / kernel zram", "throughput", "goal", "p99", "goal ", "CPU per op", "settles"]);
    for row in rows {
        let ratio = |pick: fn(&Figures) -> f64| middle(&row.spm, pick) / middle(&row.kernel, pick);
        let (rate, p99) = (ratio(|f| f.rate), ratio(|f| f.p99_us));
        if rate.is_nan() {
            let none = || "-".into();
            table.row(vec![
                row.name.clone(),
                none(),
                "no figure".into(),
                none(),
                "no figure".into(),
                none(),
                none(),
            ]);
            continue;
        }
        let verdict = |is_kept| if is_kept { "kept" } else { "missed" };
        table.row(vec![
            row.name.clone(),
            format!("{rate:.2}"),
            format!(">= {GOAL_RATE}: {}", verdict(rate >= GOAL_RATE)),
            format!("{p99:.3}"),
            format!("<= {GOAL_P99}: {}", verdict(p99 <= GOAL_P99)),
            format!("{:.2}", ratio(|f| f.cpu_seconds_per_million)),
            short(ratio(|f| f.settle_seconds.unwrap_or(f64::NAN))),
        ]);
    }
    table.print();
}

fn write_picture(file: &std::path::Path, rows: &[Row<'_>], options: &Options) -> anyhow::Result<()> {
    let bars = rows.iter().map(|row| {
        let ratio = |pick: fn(&Figures) -> f64| middle(&row.spm, pick) / middle(&row.kernel, pick);
        Bar { name: row.name.clone(), rate: ratio(|f| f.rate), p99: ratio(|f| f.p99_us) }
    });
    let courses = rows.iter().filter_map(|row| match (&row.shape, row.kernel.first(), row.spm.first()) {
        (Shape::Access(shape), Some(kernel), Some(spm)) if shape.pattern == Pattern::Moving => {
            Some(Course { name: row.name.clone(), kernel: kernel.slices.clone(), spm: spm.slices.clone() })
        }
        _ => None,
    });
    let (bars, courses): (Vec<_>, Vec<_>) = (bars.collect(), courses.collect());
    let title = format!("{} MiB, {} rounds", options.mib, options.rounds);
    let text = zram_plot::draw(&title, &bars, [GOAL_RATE, GOAL_P99], &courses)?;
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

fn side_cells(name: &str, side: &str, runs: &[Figures], ratio: f64) -> Vec<String> {
    let middle = |pick: fn(&Figures) -> f64| middle(runs, pick);
    vec![
        name.into(),
        side.into(),
        short(middle(|f| f.rate / 1000.0)),
        short(middle(|f| f.p50_us)),
        short(middle(|f| f.p99_us)),
        short(middle(|f| f.p999_us)),
        short(middle(|f| f.slow_share * 100.0)),
        short(middle(|f| f.settle_seconds.unwrap_or(f64::NAN))),
        short(middle(|f| f.cpu_seconds_per_million)),
        mib(middle(|f| f.ram_bytes as f64) as u64),
        mib(middle(|f| f.peak_bytes as f64) as u64),
        short(ratio),
    ]
}

fn middle(runs: &[Figures], pick: fn(&Figures) -> f64) -> f64 {
    median(&runs.iter().map(pick).collect::<Vec<_>>())
}
