//! Report: what a run took and did, for people (`--report`) and for programs (`--json`).
//!
//! [`Summary`] holds every number once; the table shows no other. [`Outputs`] opens the files before the command
//! starts, so that a path that cannot be written stops the run and not its result.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;
use spmem::control::{Control, Histogram, Target as Mapped, UNLIMITED, porter};

use super::course::{AutoReport, Course};
use super::{plot, stdio};
use crate::arguments::RunArguments;
use crate::size::human;

/// Where the report goes.
pub struct Outputs {
    table: Option<Target>,
    json: Option<Target>,
    svg: Option<Target>,
}

enum Target {
    Stdout,
    Stderr,
    File { path: PathBuf, file: File },
}

impl Outputs {
    /// Opens what `options` ask for.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn open(options: &RunArguments) -> anyhow::Result<Self> {
        let table = match &options.report {
            None => None,
            Some(None) => Some(Target::Stderr),
            Some(Some(path)) => Some(Target::open(path)?),
        };
        let json = match options.json.as_deref() {
            None => None,
            Some(path) if path.as_os_str() == "-" => Some(Target::Stdout),
            Some(path) => Some(Target::open(path)?),
        };
        if let (Some(table), Some(json)) = (&table, &json)
            && table.would_overwrite(json)
        {
            bail!("--report and --json name the same file; give each a file of its own");
        }
        let svg = options.svg.as_deref().map(Target::open).transpose()?;
        let clashes = |other: &Option<Target>| {
            svg.as_ref().zip(other.as_ref()).is_some_and(|(svg, other)| svg.would_overwrite(other))
        };
        if clashes(&table) || clashes(&json) {
            bail!("--svg names the file of another report; give each a file of its own");
        }
        Ok(Self { table, json, svg })
    }

    /// Writes what was asked for.
    ///
    /// # Errors
    /// A file cannot be written after all.
    pub fn write(self, summary: &Summary, course: &Course) -> anyhow::Result<()> {
        let svg = self.svg.map_or(Ok(()), |target| {
            let allowed = summary.auto.as_ref().map(AutoReport::allowed_percent);
            target.write(&plot::draw(&summary.title(), course.samples(), allowed)?)
        });
        let json = self.json.map_or(Ok(()), |target| {
            let mut text = serde_json::to_string_pretty(summary).context("the report is no JSON")?;
            text.push('\n');
            target.write(&text)
        });
        // The one is wanted even where the other fails.
        let table = self.table.map_or(Ok(()), |target| target.write(&summary.table()));
        let errors: Vec<_> =
            [json, table, svg].into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
        if errors.is_empty() { Ok(()) } else { bail!("{}", errors.join("; ")) }
    }
}

impl Target {
    /// Not truncated yet: a run that is refused leaves the last report alone. A file that is our stdout or stderr (also as
    /// /dev/stdout) holds what the command says, so it is written there, behind all that.
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| format!("the report {} cannot be written", path.display()))?;
        if is_same(&file, rustix::stdio::stdout()) {
            return Ok(Self::Stdout);
        }
        if is_same(&file, rustix::stdio::stderr()) {
            return Ok(Self::Stderr);
        }
        Ok(Self::File { path: path.to_owned(), file })
    }

    /// Whether one of the two would cut off what the other has written.
    fn would_overwrite(&self, other: &Self) -> bool {
        let (Self::File { file, .. }, Self::File { file: other, .. }) = (self, other) else { return false };
        file.metadata().is_ok_and(|metadata| metadata.is_file()) && is_same(file, other)
    }

    fn write(self, text: &str) -> anyhow::Result<()> {
        match self {
            Self::Stdout => stdio::write_out(text).context("the report cannot be written to stdout"),
            Self::Stderr => {
                io::stderr().write_all(text.as_bytes()).context("the report cannot be written to stderr")
            }
            Self::File { path, mut file } => {
                // Terminals and pipes have no length to cut.
                let _ = file.set_len(0);
                file.write_all(text.as_bytes())
                    .with_context(|| format!("the report {} cannot be written", path.display()))
            }
        }
    }
}

fn is_same(one: impl AsFd, other: impl AsFd) -> bool {
    match (rustix::fs::fstat(one), rustix::fs::fstat(other)) {
        (Ok(one), Ok(other)) => (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino),
        _ => false,
    }
}

/// The report, in the shape of its JSON. Integers are bytes or counts.
#[derive(Debug, Serialize)]
pub struct Summary {
    schema: u32,
    command: Vec<String>,
    exit_code: i32,
    elapsed_seconds: f64,
    /// Null for no limit.
    sysram_limit_bytes: Option<u64>,
    sysram_peak_bytes: u64,
    overrun_peak_bytes: u64,
    processes: u64,
    unmanaged_processes: u64,
    demoted_pages: u64,
    promoted_pages: u64,
    rescued_pages: u64,
    same_filled_pages: u64,
    dense_pages: u64,
    recompressed_pages: u64,
    /// What was stored of them was damaged: whoever used them got SIGBUS, and each was told of.
    lost_pages: u64,
    /// What became of the porter; only of runs that have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    porter: Option<&'static str>,
    refused_pages: RefusedPages,
    fault_us: FaultTimes,
    nodes: Vec<NodeUse>,
    /// What all threads together waited for room.
    stall_seconds: f64,
    /// Of `--sysram auto`; the limit above is its last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    auto: Option<AutoReport>,
    /// What lay below the floors of the processes when the budget was exceeded most; explains the excess.
    #[serde(skip)]
    floor_bytes: u64,
}

#[derive(Debug, Serialize)]
struct RefusedPages {
    pinned: u64,
    shared_by_fork: u64,
    incompressible: u64,
    protected: u64,
    node_full: u64,
}

#[derive(Debug, Serialize)]
struct FaultTimes {
    p50: f64,
    p99: f64,
    max: f64,
}

#[derive(Debug, Serialize)]
struct NodeUse {
    node: u32,
    r#type: &'static str,
    class: u32,
    capacity_bytes: u64,
    /// What the pages would take uncompressed.
    stored_bytes_peak: u64,
    /// What they took then.
    used_bytes_peak: u64,
    /// Null when nothing was stored.
    ratio: Option<f64>,
    /// Kept free for what processes had under way; 0 for RAM.
    reserve_bytes_peak: u64,
    /// 0 to 1000; 0 for RAM.
    pressure_peak: u64,
    /// Of a node that pages are placed on, or copied to.
    #[serde(flatten)]
    placed: Option<PlacedPages>,
}

/// What became of pages on a mapped node, in a file, or on a dax device.
#[derive(Debug, Serialize)]
struct PlacedPages {
    /// As the configuration has it.
    kind: &'static str,
    /// The kernel's number; null of a file or device.
    kernel_node: Option<u32>,
    demoted_pages: u64,
    promoted_pages: u64,
    /// Found elsewhere later.
    strayed_pages: u64,
    /// For which there was no room.
    refused_pages: u64,
}

impl Summary {
    /// Reads the counters of a run that has ended.
    pub fn collect(
        control: &Control,
        command: &[OsString],
        exit_code: i32,
        elapsed: Duration,
        ram_bytes: u64,
        auto: Option<AutoReport>,
    ) -> Self {
        let read = |value: &AtomicU64| value.load(Relaxed);
        let counters = &control.counters;
        let limit = read(&control.limit_bytes);
        let placed = |count: fn(&Mapped) -> &AtomicU64| -> u64 {
            control.targets().map(|target| read(count(target))).sum()
        };
        Self {
            schema: 1,
            command: command.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
            exit_code,
            elapsed_seconds: round(elapsed.as_secs_f64(), 1e3),
            sysram_limit_bytes: (limit != UNLIMITED).then_some(limit),
            sysram_peak_bytes: read(&control.sysram_peak_bytes),
            overrun_peak_bytes: read(&control.overrun_peak_bytes),
            processes: read(&counters.processes),
            unmanaged_processes: read(&counters.unmanaged_processes),
            demoted_pages: read(&counters.demoted_pages) + placed(|target| &target.demoted_pages),
            promoted_pages: read(&counters.promoted_pages) + placed(|target| &target.promoted_pages),
            rescued_pages: read(&counters.rescued_pages),
            same_filled_pages: read(&counters.same_filled_pages),
            dense_pages: read(&counters.dense_pages),
            recompressed_pages: read(&counters.recompressed_pages),
            lost_pages: read(&counters.corrupt_pages),
            porter: match control.porter.load(Relaxed) {
                porter::WORKS => Some("works"),
                porter::WAS_STOPPED => Some("was_stopped"),
                porter::HAS_ENDED => Some("has_ended"),
                _ => None,
            },
            refused_pages: RefusedPages {
                pinned: read(&counters.refused_pinned),
                shared_by_fork: read(&counters.refused_shared),
                incompressible: read(&counters.refused_incompressible),
                protected: read(&counters.refused_protected),
                node_full: read(&counters.refused_full),
            },
            fault_us: FaultTimes::read(&control.faults),
            nodes: node_use(control, ram_bytes),
            stall_seconds: round(Duration::from_nanos(read(&counters.throttled_ns)).as_secs_f64(), 1e3),
            auto,
            floor_bytes: read(&control.floor_bytes_at_overrun),
        }
    }

    /// One line, whatever is in the command.
    fn title(&self) -> String {
        let command = self.command.join(" ").replace(char::is_control, " ");
        format!("{command}: exit status {} after {:.2} s", self.exit_code, self.elapsed_seconds)
    }

    /// The short table.
    pub fn table(&self) -> String {
        let mut text = String::new();
        self.write_table(&mut text).expect("a string takes all that is written to it");
        text
    }

    fn write_table(&self, to: &mut String) -> std::fmt::Result {
        writeln!(to, "spm: {}", self.title())?;
        let limit = self.sysram_limit_bytes.map_or_else(|| "max".to_owned(), human);
        writeln!(to, "  RAM        peak {} of {limit}{}", human(self.sysram_peak_bytes), self.overrun())?;
        writeln!(to, "  processes  {} managed, {} unmanaged", self.processes, self.unmanaged_processes)?;
        writeln!(
            to,
            "  pages      {} demoted ({} same-filled, {} as zstd), {} promoted, {} rescued from the holding area, {} recompressed",
            self.demoted_pages,
            self.same_filled_pages,
            self.dense_pages,
            self.promoted_pages,
            self.rescued_pages,
            self.recompressed_pages
        )?;
        if self.lost_pages > 0 {
            writeln!(to, "  lost       {} pages: what was stored of them was damaged", self.lost_pages)?;
        }
        let trouble = match self.porter {
            Some("was_stopped") => Some("was stopped for a while"),
            Some("has_ended") => Some("ended before the command"),
            _ => None,
        };
        if let Some(trouble) = trouble {
            writeln!(to, "  porter     {trouble}: meanwhile no page went to a node of the kernel's")?;
        }
        let refused = &self.refused_pages;
        writeln!(
            to,
            "  refused    {} pinned, {} shared by fork, {} incompressible, {} protected, {} node full",
            refused.pinned, refused.shared_by_fork, refused.incompressible, refused.protected, refused.node_full
        )?;
        let faults = &self.fault_us;
        writeln!(to, "  faults     p50 {:.1} us, p99 {:.1} us, max {:.1} us", faults.p50, faults.p99, faults.max)?;
        writeln!(to, "  stalls     {:.2} s, all threads together, because there was no room", self.stall_seconds)?;
        if let Some(auto) = &self.auto {
            to.push_str(&auto.table());
        }
        writeln!(to)?;
        writeln!(to, "  node  type    class  capacity    stored      used  ratio")?;
        for node in &self.nodes {
            writeln!(
                to,
                "  {:>4}  {:<6}  {:>5}  {:>8}  {:>8}  {:>8}  {:>5}",
                node.node,
                node.r#type,
                node.class,
                human(node.capacity_bytes),
                human(node.stored_bytes_peak),
                human(node.used_bytes_peak),
                node.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
            )?;
        }
        for (node, placed) in self.nodes.iter().filter_map(|node| Some((node.node, node.placed.as_ref()?))) {
            let PlacedPages { kind, kernel_node, demoted_pages, promoted_pages, strayed_pages, refused_pages } =
                placed;
            let Some(kernel_node) = kernel_node else {
                let what = if *kind == "dax" { "dax device" } else { "file" };
                writeln!(
                    to,
                    "  node {node} is a {what}: pages {demoted_pages} demoted, {promoted_pages} promoted, {refused_pages} \
                     found no room"
                )?;
                continue;
            };
            writeln!(
                to,
                "  node {node} is the kernel's {kernel_node}: pages {demoted_pages} demoted, {promoted_pages} promoted, \
                 {strayed_pages} strayed, {refused_pages} found no room"
            )?;
        }
        Ok(())
    }

    /// By how much the budget was passed, and what kept pages from leaving; empty when it was kept.
    fn overrun(&self) -> String {
        if self.overrun_peak_bytes == 0 {
            return String::new();
        }
        let refused = &self.refused_pages;
        let reasons = [
            (refused.incompressible, "do not compress"),
            (refused.node_full, "found node 1 full"),
            (refused.shared_by_fork, "were shared by fork"),
            (refused.pinned, "were pinned"),
            (refused.protected, "were protected"),
        ];
        let stored = self.nodes[1].used_bytes_peak;
        let fixed = stored.saturating_add(self.floor_bytes);
        let limit = self.sysram_limit_bytes.unwrap_or(u64::MAX);
        let mut because = Vec::new();
        if refused.node_full > 0 && stored >= self.nodes[1].capacity_bytes / 8 * 7 {
            because.push("node 1 is full".to_owned());
        } else if stored > limit / 8 * 7 {
            because.push(format!("what is stored takes {} alone", human(stored)));
        } else if fixed > limit / 8 * 7 {
            let floors = human(self.floor_bytes);
            because.push(format!(
                "the working floors of its processes take {floors}, what is stored {}",
                human(stored)
            ));
        }
        // Attempts are counted, so one page may count often: a reason is named only where it can explain the excess or, beside nothing
        // better, a part of it.
        let (pages, reason) = reasons.into_iter().max_by_key(|(pages, _)| *pages).unwrap_or_default();
        let explains = |part| pages.saturating_mul(PAGE_BYTES) >= self.overrun_peak_bytes / part;
        let is_open = because.is_empty();
        if is_open && !explains(2) {
            because.push("pages came in faster than others could leave".to_owned());
        }
        if explains(2) || is_open && explains(16) {
            because.push(format!("{pages} times pages {reason}"));
        }
        if self.unmanaged_processes > 0 {
            because.push(format!("{} of its processes ran without a budget", self.unmanaged_processes));
        }
        let because = because.join("; ");
        format!(", over by {} ({because})", human(self.overrun_peak_bytes))
    }
}

impl FaultTimes {
    fn read(faults: &Histogram) -> Self {
        // A fault of centuries would lose digits; nothing else does.
        let us = |ns: u64| round(Duration::from_nanos(ns).as_secs_f64() * 1e6, 10.0);
        Self { p50: us(faults.quantile_ns(500)), p99: us(faults.quantile_ns(990)), max: us(faults.max_ns()) }
    }
}

/// Bytes in a page (x86-64).
const PAGE_BYTES: u64 = 4096;

/// Node 0 holds everything that is resident, the frames of node 1 included: they are RAM, too.
fn node_use(control: &Control, ram_bytes: u64) -> Vec<NodeUse> {
    let peak = control.sysram_peak_bytes.load(Relaxed);
    let stored = control.stored_bytes_peak.load(Relaxed);
    let used = control.store_used_bytes_peak.load(Relaxed);
    let mut nodes = vec![
        NodeUse {
            node: 0,
            r#type: "sysram",
            class: 1,
            capacity_bytes: ram_bytes,
            stored_bytes_peak: peak,
            used_bytes_peak: peak,
            ratio: ratio(peak, peak),
            reserve_bytes_peak: 0,
            pressure_peak: 0,
            placed: None,
        },
        NodeUse {
            node: 1,
            r#type: "spm",
            class: 4,
            capacity_bytes: control.store_capacity_bytes.load(Relaxed),
            stored_bytes_peak: stored,
            used_bytes_peak: used,
            ratio: ratio(stored, used),
            reserve_bytes_peak: control.store_reserve_bytes_peak.load(Relaxed),
            pressure_peak: control.store_pressure_peak.load(Relaxed),
            placed: None,
        },
    ];
    nodes.extend(control.targets().map(placed_use));
    nodes
}

fn placed_use(target: &Mapped) -> NodeUse {
    let peak = target.peak_bytes.load(Relaxed);
    NodeUse {
        node: target.id.load(Relaxed),
        r#type: "spm",
        class: target.class.load(Relaxed),
        capacity_bytes: target.quota_bytes.load(Relaxed),
        stored_bytes_peak: peak,
        used_bytes_peak: peak,
        ratio: ratio(peak, peak),
        reserve_bytes_peak: 0,
        pressure_peak: 0,
        placed: Some(PlacedPages {
            kind: target.kind(),
            kernel_node: (!target.is_swap()).then(|| target.node.load(Relaxed)),
            demoted_pages: target.demoted_pages.load(Relaxed),
            promoted_pages: target.promoted_pages.load(Relaxed),
            strayed_pages: target.strayed_pages.load(Relaxed),
            refused_pages: target.refused_pages.load(Relaxed),
        }),
    }
}

#[allow(clippy::cast_precision_loss, reason = "a ratio of amounts of memory needs three digits")]
fn ratio(stored: u64, used: u64) -> Option<f64> {
    (used > 0).then(|| round(stored as f64 / used as f64, 100.0))
}

fn round(value: f64, steps: f64) -> f64 {
    (value * steps).round() / steps
}
