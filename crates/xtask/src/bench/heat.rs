//! `cargo xtask bench heat`: how soon each source of heat follows a hot set that moves through a large cold one.
//!
//! Each source that this kernel has watches [`heat`](crate::programs::heat) once with a dense hot set and once with a scattered
//! one, and so does nobody, for the program's own speed. The holding area is `spm run` with a budget of a quarter of the
//! memory: what is in its place counts as told. What it costs there is the processor time of all but the program's own thread.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::ValueEnum;
use spmem_core::heat::Source;

use crate::figures::{Table, short};
use crate::launch::{Bed, NeedSpm};
use crate::programs::heat::{Figures, From, Shape, Size};

/// Command line.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    size: Size,
    /// Only these; all that this kernel has when none is named.
    #[arg(value_enum)]
    sources: Vec<From>,
}

/// Runs it.
///
/// # Errors
/// A program failed: a byte was wrong, or a source that the kernel has did not tell.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let bed = Bed::new(NeedSpm::Yes)?;
    let facts = spmem_node::heat::facts(std::path::Path::new("/"));
    let size = &options.size;
    println!(
        "{} MiB, {} of them hot for {} s at a place, {} moves, a look every {} ms; medians over the moves\n",
        size.mib, size.hot_mib, size.stay_seconds, size.moves, size.interval_ms
    );
    let head = ["source", "hot set", "found s", "let go s", "missed %", "wrong %", "CPU %", "speed"];
    let mut table = Table::new(&head);
    let mut lacking = Vec::new();
    for shape in [Shape::Dense, Shape::Scattered] {
        let mut alone = None;
        for from in From::value_variants() {
            let lack = source(*from).and_then(|source| facts.lack(source));
            let is_asked = options.sources.is_empty() || options.sources.contains(from) || *from == From::None;
            match lack.filter(|_| is_asked) {
                Some(lack) if shape == Shape::Dense => lacking.push(format!("{}: {lack}", name(*from))),
                None if is_asked => {
                    let figures = measure(&bed, size, *from, shape)?;
                    let speed = figures.kilo_reads / *alone.get_or_insert(figures.kilo_reads);
                    table.row(cells(*from, shape, &figures, speed));
                }
                _ => {}
            }
        }
    }
    table.print();
    println!(
        "\nfound: 90 % of the new hot set are told hot; let go: at most 10 % of the old one still are; missed, wrong: hot\n\
         pages not told, cold ones told, in the second half of a stay, in % of the hot set; CPU: of the watcher, in % of one\n\
         processor; speed: reads in a second of the reader's processor time, beside nobody's watch"
    );
    lacking.iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn source(from: From) -> Option<Source> {
    Source::ALL.into_iter().find(|source| source.name() == name(from))
}

fn name(of: impl ValueEnum) -> String {
    of.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

fn cells(from: From, shape: Shape, figures: &Figures, speed: f64) -> Vec<String> {
    let percent = |pages: f64| short(pages / figures.hot_pages as f64 * 100.0);
    let seconds = |value: Option<f64>| value.map_or_else(|| "never".to_owned(), short);
    let is_none = from == From::None;
    let or_dash = |text: String| if is_none { "-".to_owned() } else { text };
    vec![
        name(from),
        name(shape),
        or_dash(seconds(figures.found_seconds)),
        or_dash(seconds(figures.let_go_seconds)),
        or_dash(percent(figures.missed_pages)),
        or_dash(percent(figures.wrong_pages)),
        or_dash(short(figures.watch_percent)),
        short(speed),
    ]
}

fn measure(bed: &Bed, size: &Size, from: From, shape: Shape) -> anyhow::Result<Figures> {
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = if from == From::Holding {
        let mut command = Command::new(bed.spm()?);
        command.arg("run").arg(format!("--sysram={}M", size.mib / 4)).arg("--").arg(own);
        command
    } else {
        Command::new(own)
    };
    command.args(["program", "heat", "--from", &name(from), "--shape", &name(shape)]);
    for (option, value) in [
        ("--mib", size.mib.to_string()),
        ("--hot-mib", size.hot_mib.to_string()),
        ("--stay-seconds", size.stay_seconds.to_string()),
        ("--moves", size.moves.to_string()),
        ("--interval-ms", size.interval_ms.to_string()),
    ] {
        command.args([option, &value]);
    }
    eprintln!("xtask: {} {}", name(from), name(shape));
    let (start, before) = (Instant::now(), children_seconds());
    let output = command.stderr(Stdio::inherit()).output().context("the program cannot be run")?;
    let (elapsed, spent) = (start.elapsed().as_secs_f64(), children_seconds() - before);
    ensure!(output.status.success(), "{} {}: the program failed: {}", name(from), name(shape), output.status);
    let mut figures: Figures =
        serde_json::from_slice(&output.stdout).context("the program said something else")?;
    if from == From::Holding {
        figures.watch_percent = (spent - figures.load_cpu_seconds) / elapsed * 100.0;
    }
    Ok(figures)
}

/// Processor time of all children that have ended.
fn children_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = fields.split_whitespace().skip(13).take(2).filter_map(|word| word.parse::<u64>().ok()).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}
