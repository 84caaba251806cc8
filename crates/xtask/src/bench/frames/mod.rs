//! `cargo xtask bench frames`: the frame allocator beside others, in one run.
//!
//! Nothing of the memory is touched: 8 GiB of frame numbers are managed. Times are the threads' own processor time, the
//! slowest thread's where there are two, medians over rounds in which all sides take turns. Beside each bar stands what the same
//! data costs without an allocator, and what two threads cost with a node each ([`floors`]): what is between is the allocator's.
//!
//! jemalloc takes part with `cargo run --release --package xtask --features jemalloc -- bench frames`. It is not part of the plain
//! run: what builds it is a shell script and make, which took ten minutes on a virtual machine with 2 cores, once a profile, for
//! each build of a task that has nothing to do with it; nothing else here needs make.

mod floors;
mod fragments;
mod sides;

use crate::figures::{Table, median, short};
use clap::Args;
use fragments::Fragments;
use rustix::time::{ClockId, clock_gettime};
use sides::{Side, Sides};
use std::hint::black_box;
use std::sync::{Barrier, Mutex, MutexGuard};

/// Frames managed: 8 GiB.
pub(super) const FRAMES: usize = 8 << 18;
/// Frames of a huge frame, and its order.
const HUGE_FRAMES: usize = 512;
const HUGE_ORDER: u8 = 9;
/// What the bars of the page-frame allocator are, ns; per cent of huge frames.
const BARS: [(&str, f64); 8] = [
    ("pair of order 0, owner-cached", 10.0),
    ("pair of order 0, per processor", 32.0),
    ("pair of order 0, zones", 80.0),
    ("pair of order 9, owner-cached", 55.0),
    ("batch, a frame taken and given", 2.0),
    ("free in random order, owner-cached", 15.0),
    ("two threads, of one", 1.0),
    ("huge frames recovered, %", 98.0),
];

#[derive(Args)]
pub(crate) struct Options {
    /// Rounds; every side runs once in each.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Frames of the bulk measurements, thousands, for each thread.
    #[arg(long, default_value_t = 500)]
    thousands: usize,
    /// Rounds of the fragmentation protocol.
    #[arg(long, default_value_t = 100)]
    churn: usize,
}

/// What is measured of a side, ns an operation for one and two threads.
#[derive(Default, Clone)]
struct Figures {
    pair: [Vec<f64>; 2],
    bulk_alloc: [Vec<f64>; 2],
    bulk_free: [Vec<f64>; 2],
    random_free: [Vec<f64>; 2],
    huge_pair: [Vec<f64>; 2],
    batch: [Vec<f64>; 2],
    fragments: Option<Fragments>,
}

impl Figures {
    /// Per cent of huge frames; NaN of a side that has none.
    fn recovered(&self) -> f64 {
        self.fragments.as_ref().map_or(f64::NAN, |found| found.recovered)
    }
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let most = FRAMES / 2000;
    if options.thousands == 0 || options.thousands > most {
        anyhow::bail!("--thousands {}: two threads share 8 GiB of frames, so 1 to {most} each", options.thousands);
    }
    let mut all = Measure { options, figures: Vec::new(), round: 0 };
    for round in 0..options.rounds {
        all.round = round;
        eprintln!("frames: round {} of {}", round + 1, options.rounds);
        sides::visit(&mut all)?;
    }
    all.print();
    Ok(())
}

struct Measure<'a> {
    options: &'a Options,
    figures: Vec<(&'static str, Figures)>,
    round: usize,
}

impl Sides for Measure<'_> {
    fn side<S: Side>(&mut self, name: &'static str, make: impl Fn() -> anyhow::Result<S>) -> anyhow::Result<()> {
        let at = self.figures.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
            self.figures.push((name, Figures::default()));
            self.figures.len() - 1
        });
        let count = self.options.thousands * 1000;
        let is_first = self.round == 0;
        let figures = &mut self.figures[at].1;
        for threads in 1..=2 {
            let of = threads - 1;
            let side = make()?;
            let handle = |_| side.handle();
            figures.pair[of].push(on_threads(threads, count, handle, |handle| pairs(&side, handle, count, 0)));
            if S::HAS_ORDERS {
                let work = |handle: &mut _| pairs(&side, handle, count / 4, HUGE_ORDER);
                figures.huge_pair[of].push(on_threads(threads, count / 4, handle, work));
            }
            if S::HAS_BATCH {
                let number = count / HUGE_FRAMES;
                let work = |handle: &mut _| batches(&side, handle, number);
                figures.batch[of].push(on_threads(threads, number * HUGE_FRAMES, handle, work));
            }
            let [alloc, free, random] = bulk(&side, threads, count);
            figures.bulk_alloc[of].push(alloc);
            figures.bulk_free[of].push(free);
            figures.random_free[of].push(random);
        }
        if is_first && S::IS_CHURNED {
            eprintln!("frames: {name}: fragmentation");
            figures.fragments = Some(fragments::churn(&make()?, self.options.churn));
        }
        Ok(())
    }
}

/// Runs `work` on so many threads at once, each with what `prepare` makes for it, which is not counted: ns an operation, of the
/// slowest. A thread's first allocation and its last release take the C library a millisecond.
fn on_threads<T>(
    threads: usize,
    operations: usize,
    prepare: impl Fn(usize) -> T + Sync,
    work: impl Fn(&mut T) + Sync,
) -> f64 {
    let barrier = Barrier::new(threads);
    let slowest = std::thread::scope(|scope| {
        let spawn = |number| {
            let (barrier, prepare, work) = (&barrier, &prepare, &work);
            scope.spawn(move || {
                let mut own = prepare(number);
                barrier.wait();
                let start = thread_ns();
                work(&mut own);
                thread_ns() - start
            })
        };
        let all: Vec<_> = (0..threads).map(spawn).collect();
        all.into_iter().map(|thread| thread.join().expect("no thread panics")).fold(0.0, f64::max)
    });
    slowest / operations as f64
}

/// Processor time of the calling thread, ns.
fn thread_ns() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

fn pairs<S: Side>(side: &S, handle: &mut S::Handle, count: usize, order: u8) {
    for _ in 0..count {
        let frame = side.alloc(handle, black_box(order)).expect("nearly all is free");
        side.free(handle, black_box(frame), order);
    }
    side.finish(handle);
}

fn batches<S: Side>(side: &S, handle: &mut S::Handle, count: usize) {
    for _ in 0..count {
        side.alloc_batch(handle);
        side.free_batch(handle);
    }
    side.finish(handle);
}

/// What one thread holds, and what it has of its own.
type Part<H> = Mutex<(Vec<usize>, H)>;

/// Many frames taken, given back in the same order, taken again, and given back in random order: ns of each.
fn bulk<S: Side>(side: &S, threads: usize, count: usize) -> [f64; 3] {
    let parts: Vec<Part<S::Handle>> = (0..threads)
        // Written once, so that no page of it is missing when time is taken.
        .map(|_| Mutex::new((vec![usize::MAX; count], side.handle())))
        .collect();
    let own = |number: usize| parts[number].lock().expect("not poisoned");
    let take = |own: &mut MutexGuard<'_, (Vec<usize>, S::Handle)>| {
        let (held, handle) = &mut **own;
        held.iter_mut().for_each(|frame| *frame = side.alloc(handle, 0).expect("enough is free"));
    };
    let give = |own: &mut MutexGuard<'_, (Vec<usize>, S::Handle)>| {
        let (held, handle) = &mut **own;
        held.iter().for_each(|&frame| side.free(handle, frame, 0));
    };
    let alloc = on_threads(threads, count, own, take);
    let free = on_threads(threads, count, own, give);
    on_threads(threads, count, own, take);
    for (number, part) in parts.iter().enumerate() {
        shuffle(&mut part.lock().expect("not poisoned").0, &mut Random(number as u64 + 7));
    }
    let random = on_threads(threads, count, own, give);
    for part in parts {
        let (_, mut handle) = part.into_inner().expect("not poisoned");
        side.finish(&mut handle);
    }
    [alloc, free, random]
}

impl Measure<'_> {
    fn print(&self) {
        println!(
            "8 GiB of frames, {} thousand a thread; ns of processor time, 1 and 2 threads; medians of {} rounds",
            self.options.thousands, self.options.rounds
        );
        let mut table = Table::new(&[
            "",
            "pair o0",
            "2 threads",
            "alloc o0",
            "2 threads ",
            "free o0",
            "2 threads  ",
            "random free",
            "2 threads   ",
            "pair o9",
            "2 threads    ",
            "batch",
            "2 threads     ",
        ]);
        for (name, figures) in &self.figures {
            let mut cells = vec![(*name).to_owned()];
            for of in [
                &figures.pair,
                &figures.bulk_alloc,
                &figures.bulk_free,
                &figures.random_free,
                &figures.huge_pair,
                &figures.batch,
            ] {
                cells.extend(of.iter().map(|runs| short(median(runs))));
            }
            table.row(cells);
        }
        table.print();
        println!();
        fragments::print(
            self.figures.iter().filter_map(|(name, figures)| Some((*name, figures.fragments.as_ref()?))),
        );
        self.print_ratios();
        self.print_bars();
    }

    fn of(&self, name: &str) -> Option<&Figures> {
        self.figures.iter().find(|(known, _)| *known == name).map(|(_, figures)| figures)
    }

    /// How many times as long the others take as the owner-cached path.
    fn print_ratios(&self) {
        let Some(own) = self.of(sides::OWNER) else { return };
        let mut table =
            Table::new(&["of the owner-cached path", "pair o0", "alloc o0", "random free", "pair o9", "huge"]);
        for (name, figures) in self.figures.iter().filter(|(name, _)| *name != sides::OWNER) {
            let ratio = |pick: fn(&Figures) -> &Vec<f64>| short(median(pick(figures)) / median(pick(own)));
            table.row(vec![
                (*name).to_owned(),
                ratio(|f| &f.pair[0]),
                ratio(|f| &f.bulk_alloc[0]),
                ratio(|f| &f.random_free[0]),
                ratio(|f| &f.huge_pair[0]),
                short(figures.recovered() / own.recovered()),
            ]);
        }
        table.print();
        println!();
    }

    fn print_bars(&self) {
        let (Some(own), Some(cpu), Some(zones)) =
            (self.of(sides::OWNER), self.of(sides::PER_CPU), self.of(sides::ZONES))
        else {
            return;
        };
        let (slower, apart) = self.print_contended();
        let bare = |name, pick: fn(&Figures) -> &[Vec<f64>; 2]| {
            self.of(name).map_or(f64::NAN, |floor| median(&pick(floor)[0]))
        };
        let none = f64::NAN;
        let reached = [
            (median(&own.pair[0]), bare(sides::BARE, |f| &f.pair)),
            (median(&cpu.pair[0]), bare(sides::BARE_LOCKED, |f| &f.pair)),
            (median(&zones.pair[0]), none),
            (median(&own.huge_pair[0]), none),
            (median(&zones.batch[0]), none),
            (median(&own.random_free[0]), bare(sides::BARE, |f| &f.random_free)),
            (slower, apart),
            (own.recovered(), none),
        ];
        let mut table = Table::new(&["bar", "reached", "goal", "", "floor"]);
        for ((name, bar), (reached, floor)) in BARS.into_iter().zip(reached) {
            let is_share = name.ends_with('%');
            let is_kept = if is_share { reached >= bar } else { reached <= bar };
            let sign = if is_share { ">=" } else { "<=" };
            let verdict = if is_kept { "kept" } else { "missed" };
            let goal = format!("{sign} {bar}");
            table.row(vec![name.to_owned(), short(reached), goal, verdict.to_owned(), short(floor)]);
        }
        table.print();
        println!("floor: the same data without an allocator around it; of two threads, with a node each");
    }

    /// How many times as long each of two threads takes as one alone, on one node and on two: the worst of the first, and the
    /// second beside it.
    fn print_contended(&self) -> (f64, f64) {
        type Pick = fn(&Figures) -> &[Vec<f64>; 2];
        let rows: [(&str, [&str; 2], Pick); 7] = [
            ("pair o0, owner-cached", [sides::OWNER, sides::OWNER_APART], |f| &f.pair),
            ("alloc o0, owner-cached", [sides::OWNER, sides::OWNER_APART], |f| &f.bulk_alloc),
            ("free o0, owner-cached", [sides::OWNER, sides::OWNER_APART], |f| &f.bulk_free),
            ("random free, owner-cached", [sides::OWNER, sides::OWNER_APART], |f| &f.random_free),
            ("pair o9, owner-cached", [sides::OWNER, sides::OWNER_APART], |f| &f.huge_pair),
            ("pair o0, per processor", [sides::PER_CPU, sides::PER_CPU_APART], |f| &f.pair),
            ("batch, zones", [sides::ZONES, sides::ZONES_APART], |f| &f.batch),
        ];
        let mut table = Table::new(&["two threads, of one alone", "one node", "a node each"]);
        let mut worst = (0.0, f64::NAN);
        for (name, sides, pick) in rows {
            let [shared, apart] = sides.map(|side| {
                self.of(side).map_or(f64::NAN, |figures| median(&pick(figures)[1]) / median(&pick(figures)[0]))
            });
            table.row(vec![name.to_owned(), short(shared), short(apart)]);
            if shared > worst.0 {
                worst = (shared, apart);
            }
        }
        table.print();
        println!();
        worst
    }
}

fn shuffle<T>(items: &mut [T], random: &mut Random) {
    for last in (1..items.len()).rev() {
        items.swap(last, random.below(last + 1));
    }
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as usize % bound
    }
}
