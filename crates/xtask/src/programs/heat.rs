//! `xtask program heat`: a hot set that moves through a large cold one, and how soon a source of heat follows it.
//!
//! One thread reads the hot pages at random and checks what it reads; another looks every interval at what a source tells and holds it
//! against the truth. The source is one of [`spmem_node::heat`], on this very process; the holding area, when this process
//! runs under `spm run`: what is in its place is held to be hot; or none, for the speed of the program alone. Prints one
//! JSON object, after every byte of every page was compared with what it must be.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use spmem_core::heat::Accessed;
use spmem_node::heat::{Damon, HeatSource, Idle, Pace, Rwp};
use spmem_sys::pagemap::{Pagemap, RUNS, Run};

use crate::figures::median;

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// Pages of a scattered hot set are this many apart.
const APART: usize = 16;
const MIB_PAGES: usize = (1 << 20) / PAGE;

/// Who tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum From {
    /// Nobody.
    None,
    /// userfaultfd RWP_ASYNC.
    Rwp,
    /// The holding area of spm run, which this is run under.
    Holding,
    /// DAMON.
    Damon,
    /// Idle page tracking.
    Idle,
}

/// Where hot pages lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Shape {
    /// Next to each other.
    Dense,
    /// Every sixteenth page.
    Scattered,
}

/// Command line.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// Who tells.
    #[arg(long, value_enum, default_value = "none")]
    from: From,
    /// Where hot pages lie.
    #[arg(long, value_enum, default_value = "dense")]
    shape: Shape,
    #[command(flatten)]
    pub(crate) size: Size,
}

/// How much, and how long.
#[derive(Clone, clap::Args)]
pub(crate) struct Size {
    /// All memory, MiB.
    #[arg(long, default_value_t = 256)]
    pub(crate) mib: usize,
    /// The hot part of it, MiB; at most a sixteenth.
    #[arg(long, default_value_t = 8)]
    pub(crate) hot_mib: usize,
    /// Seconds between two moves of the hot set.
    #[arg(long, default_value_t = 6.0)]
    pub(crate) stay_seconds: f64,
    /// Moves.
    #[arg(long, default_value_t = 3)]
    pub(crate) moves: usize,
    /// Milliseconds between two looks.
    #[arg(long, default_value_t = 200)]
    pub(crate) interval_ms: u64,
}

/// What is printed.
#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct Figures {
    /// Median over the moves: seconds until 90 % of the new hot set were told hot; `None` where one never was.
    pub(crate) found_seconds: Option<f64>,
    /// The same, until at most 10 % of the old one still were.
    pub(crate) let_go_seconds: Option<f64>,
    /// In the second half of each stay: hot pages that were not told, mean.
    pub(crate) missed_pages: f64,
    /// Cold pages that were told hot, mean.
    pub(crate) wrong_pages: f64,
    /// Pages of the hot set.
    pub(crate) hot_pages: usize,
    /// Processor time of the watching thread and of the kernel's, percent of one processor.
    pub(crate) watch_percent: f64,
    /// Thousand reads in a second of the processor's.
    pub(crate) kilo_reads: f64,
    /// Processor time of the thread that reads, seconds.
    pub(crate) load_cpu_seconds: f64,
}

/// The memory: words of whole pages, and which are hot.
struct Memory {
    words: Vec<AtomicU64>,
    /// First word of the first whole page.
    first: usize,
    pages: usize,
    hot_pages: usize,
    shape: Shape,
    /// Which place the hot set is at.
    place: AtomicUsize,
}

impl Memory {
    fn new(options: &Options) -> anyhow::Result<Self> {
        let (pages, hot_pages) = (options.size.mib * MIB_PAGES, options.size.hot_mib * MIB_PAGES);
        ensure!(hot_pages > 0 && hot_pages * APART <= pages, "the hot part is at most a sixteenth of all");
        let words: Vec<AtomicU64> = (0..(pages + 1) * WORDS).map(|_| AtomicU64::new(0)).collect();
        let address = words.as_ptr().addr();
        let first = (address.next_multiple_of(PAGE) - address) / 8;
        let memory = Self { words, first, pages, hot_pages, shape: options.shape, place: AtomicUsize::new(0) };
        for page in 0..pages {
            (0..WORDS).for_each(|word| memory.word(page, word).store(stamp(page, word), Relaxed));
        }
        Ok(memory)
    }

    fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        &self.words[self.first + page * WORDS + word]
    }

    fn start(&self) -> usize {
        self.words.as_ptr().addr() + self.first * 8
    }

    /// A hot page by its number, at a place.
    fn hot(&self, place: usize, number: usize) -> usize {
        match self.shape {
            // Places that are far from each other, and none twice in eleven moves.
            Shape::Dense => place * 5 % APART * (self.pages / APART) + number,
            Shape::Scattered => number * APART + place * 5 % APART,
        }
    }

    fn is_hot(&self, place: usize) -> Vec<bool> {
        let mut hot = vec![false; self.pages];
        (0..self.hot_pages).for_each(|number| hot[self.hot(place, number)] = true);
        hot
    }

    fn check_all(&self) -> anyhow::Result<()> {
        for page in 0..self.pages {
            for word in 0..WORDS {
                let found = self.word(page, word).load(Relaxed);
                ensure!(found == stamp(page, word), "page {page}, word {word} is {found:#x}");
            }
        }
        Ok(())
    }
}

/// Compresses, and is another on every page.
fn stamp(page: usize, word: usize) -> u64 {
    if word.is_multiple_of(4) {
        (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word as u64
    } else {
        page as u64
    }
}

/// What a look said.
struct Look {
    /// Since the last move.
    seconds: f64,
    found: f64,
    still: f64,
    missed: usize,
    wrong: usize,
}

/// Runs it.
///
/// # Errors
/// The source cannot be had, or a byte is wrong.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if options.from != From::Holding {
        // spm run is as programs are; the others are asked about pages of 4 KiB.
        rustix::thread::disable_transparent_huge_pages(true).context("huge pages cannot be turned off")?;
    }
    let memory = Memory::new(options)?;
    let mut watch = Watch::open(options, &memory)?;
    let (is_over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let start = Instant::now();
    let (looks, load_cpu_seconds) = scope(|scope| {
        let load = scope.spawn(|| read(&memory, &is_over, &reads));
        let looks = follow(options, &memory, &mut watch);
        is_over.store(true, Relaxed);
        let cpu = load.join().expect("it does not panic");
        anyhow::Ok((looks?, cpu?))
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let watch_seconds = watch.cpu_seconds();
    drop(watch);
    memory.check_all()?;
    let figures = Figures {
        watch_percent: watch_seconds / seconds * 100.0,
        kilo_reads: reads.load(Relaxed) as f64 / load_cpu_seconds / 1e3,
        load_cpu_seconds,
        ..judge(options, &looks, memory.hot_pages)
    };
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

/// Reads hot pages until told to end; its processor time, seconds.
fn read(memory: &Memory, is_over: &AtomicBool, reads: &AtomicU64) -> anyhow::Result<f64> {
    let mut random = SmallRng::seed_from_u64(1);
    while !is_over.load(Relaxed) {
        let place = memory.place.load(Relaxed);
        for _ in 0..64 {
            let (page, word) =
                (memory.hot(place, random.random_range(0..memory.hot_pages)), random.random_range(0..WORDS));
            let found = memory.word(page, word).load(Relaxed);
            ensure!(found == stamp(page, word), "page {page}, word {word} is {found:#x}");
        }
        reads.fetch_add(64, Relaxed);
    }
    Ok(thread_seconds())
}

fn thread_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Moves the hot set and looks; the looks of each stay but the first, at a place that no source has seen moved to.
fn follow(options: &Options, memory: &Memory, watch: &mut Watch) -> anyhow::Result<Vec<Vec<Look>>> {
    let mut stays = Vec::new();
    for place in 0..=options.size.moves {
        memory.place.store(place, Relaxed);
        let moved = Instant::now();
        let (new, old) = (memory.is_hot(place), place.checked_sub(1).map(|place| memory.is_hot(place)));
        let mut looks = Vec::new();
        while moved.elapsed().as_secs_f64() < options.size.stay_seconds {
            sleep(Duration::from_millis(options.size.interval_ms));
            let told = watch.look(memory)?;
            let share = |of: &[bool]| {
                let both = told.iter().zip(of).filter(|(told, of)| **told && **of).count();
                both as f64 / memory.hot_pages as f64
            };
            let count =
                |is: fn(bool, bool) -> bool| told.iter().zip(&new).filter(|(told, new)| is(**told, **new)).count();
            looks.push(Look {
                seconds: moved.elapsed().as_secs_f64(),
                found: share(&new),
                still: old.as_deref().map_or(0.0, share),
                missed: count(|told, hot| !told && hot),
                wrong: count(|told, hot| told && !hot),
            });
        }
        if place > 0 {
            stays.push(looks);
        }
    }
    Ok(stays)
}

fn judge(options: &Options, stays: &[Vec<Look>], hot_pages: usize) -> Figures {
    let until = |is: fn(&Look) -> bool| -> Option<f64> {
        let firsts: Option<Vec<f64>> =
            stays.iter().map(|looks| looks.iter().find(|look| is(look)).map(|look| look.seconds)).collect();
        firsts.filter(|firsts| !firsts.is_empty()).map(|firsts| median(&firsts))
    };
    let late: Vec<&Look> =
        stays.iter().flatten().filter(|look| look.seconds > options.size.stay_seconds / 2.0).collect();
    let mean =
        |of: fn(&Look) -> usize| late.iter().map(|look| of(look) as f64).sum::<f64>() / late.len().max(1) as f64;
    Figures {
        found_seconds: until(|look| look.found >= 0.9),
        let_go_seconds: until(|look| look.still <= 0.1),
        missed_pages: mean(|look| look.missed),
        wrong_pages: mean(|look| look.wrong),
        hot_pages,
        watch_percent: 0.0,
        kilo_reads: 0.0,
        load_cpu_seconds: 0.0,
    }
}

/// A source at work.
enum Watch {
    None,
    Holding(Pagemap),
    Damon(Damon, f64),
    Other(Box<dyn HeatSource>),
}

impl Watch {
    fn open(options: &Options, memory: &Memory) -> anyhow::Result<Self> {
        let (root, pid) = (std::path::Path::new("/"), std::process::id());
        let mut watch = match options.from {
            From::None => Self::None,
            From::Holding => Self::Holding(Pagemap::open().context("no pagemap")?),
            From::Damon => {
                let pace = Pace::of(Duration::from_millis(options.size.interval_ms));
                Self::Damon(Damon::new(root, pid, pace), 0.0)
            }
            From::Rwp => Self::Other(Box::new(Rwp::open()?)),
            From::Idle => Self::Other(Box::new(Idle::open(root, pid)?)),
        };
        watch.look(memory)?;
        Ok(watch)
    }

    /// Which pages are told to be hot.
    fn look(&mut self, memory: &Memory) -> anyhow::Result<Vec<bool>> {
        let mut told = vec![false; memory.pages];
        let range = memory.start()..memory.start() + memory.pages * PAGE;
        let ranges = std::slice::from_ref(&range);
        let accessed: Vec<Accessed> = match self {
            Self::None => Vec::new(),
            Self::Holding(pagemap) => present(pagemap, &range)?,
            Self::Damon(damon, spent) => {
                let accessed = damon.look(ranges)?;
                // It is gone once the source is.
                *spent = damon.thread().map_or(*spent, thread_cpu_seconds);
                accessed
            }
            Self::Other(source) => source.look(ranges)?,
        };
        for one in accessed {
            let (start, end) = ((one.start - range.start) / PAGE, (one.end - range.start).div_ceil(PAGE));
            told[start..end].fill(true);
        }
        Ok(told)
    }

    /// Of this thread, and of the kernel's.
    fn cpu_seconds(&self) -> f64 {
        thread_seconds() + if let Self::Damon(_, spent) = self { *spent } else { 0.0 }
    }
}

fn present(pagemap: &Pagemap, range: &std::ops::Range<usize>) -> anyhow::Result<Vec<Accessed>> {
    let (mut at, mut runs, mut found) = (range.start, [Run::default(); RUNS], Vec::new());
    while at < range.end {
        let (count, looked) = pagemap.scan(at, range.end, usize::MAX, &mut runs).context("no scan")?;
        let here = runs[..count].iter().map(|run| (run.start as usize, run.end as usize));
        found.extend(here.map(|(start, end)| Accessed { start, end, seen: 1, samples: 1 }));
        at = looked;
    }
    Ok(found)
}

/// utime and stime of a thread of the kernel's (proc_pid_stat(5)).
fn thread_cpu_seconds(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}
