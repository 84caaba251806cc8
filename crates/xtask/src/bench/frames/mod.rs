//! `cargo xtask bench frames`: the frame allocator beside others, in one run.
//!
//! Nothing of the memory is touched: 8 GiB of frame numbers are managed. Times are the threads' own processor time, the
//! slowest thread's where there are two, medians over rounds in which all sides take turns.

mod sides;

use crate::figures::{Table, median, short};
use clap::Args;
use rustix::time::{ClockId, clock_gettime};
use sides::{Side, Sides};
use std::hint::black_box;
use std::sync::Barrier;

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
    ("pair of order 9", 55.0),
    ("batch, a frame taken or given", 2.0),
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
    recovered: Vec<f64>,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
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
            figures.pair[of].push(on_threads(threads, count, |_| pairs(&side, count, 0)));
            if S::HAS_ORDERS {
                figures.huge_pair[of]
                    .push(on_threads(threads, count / 4, |_| pairs(&side, count / 4, HUGE_ORDER)));
            }
            if S::HAS_BATCH {
                figures.batch[of]
                    .push(on_threads(threads, count / HUGE_FRAMES * HUGE_FRAMES, |_| batches(&side, count)));
            }
            let [alloc, free, random] = bulk(&side, threads, count);
            figures.bulk_alloc[of].push(alloc);
            figures.bulk_free[of].push(free);
            figures.random_free[of].push(random);
        }
        if is_first && S::HAS_ORDERS {
            eprintln!("frames: {name}: fragmentation");
            figures.recovered.push(recover_huge(&make()?, self.options.churn));
        }
        Ok(())
    }
}

/// Runs `work` on so many threads at once: ns an operation, of the slowest.
fn on_threads(threads: usize, operations: usize, work: impl Fn(usize) + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let slowest = std::thread::scope(|scope| {
        let spawn = |number| {
            let (barrier, work) = (&barrier, &work);
            scope.spawn(move || {
                barrier.wait();
                let start = thread_ns();
                work(number);
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

fn pairs<S: Side>(side: &S, count: usize, order: u8) {
    let mut handle = side.handle();
    for _ in 0..count {
        let frame = side.alloc(&mut handle, black_box(order)).expect("nearly all is free");
        side.free(&mut handle, black_box(frame), order);
    }
    side.finish(handle);
}

fn batches<S: Side>(side: &S, count: usize) {
    let mut batch = vec![0; HUGE_FRAMES];
    for _ in 0..count / HUGE_FRAMES {
        side.alloc_batch(black_box(&mut batch));
        side.free_batch(black_box(&batch));
    }
}

/// What one thread holds, and what it has of its own.
type Part<H> = std::sync::Mutex<(Vec<usize>, Option<H>)>;

/// Many frames taken, given back in the same order, taken again, and given back in random order: ns of each.
fn bulk<S: Side>(side: &S, threads: usize, count: usize) -> [f64; 3] {
    let parts: Vec<Part<S::Handle>> =
        (0..threads).map(|_| std::sync::Mutex::new((Vec::with_capacity(count), Some(side.handle())))).collect();
    let take = |number: usize| {
        let mut part = parts[number].lock().expect("not poisoned");
        let (held, handle) = &mut *part;
        let handle = handle.as_mut().expect("made above");
        held.extend((0..count).map(|_| side.alloc(handle, 0).expect("enough is free")));
    };
    let give = |number: usize| {
        let mut part = parts[number].lock().expect("not poisoned");
        let (held, handle) = &mut *part;
        let handle = handle.as_mut().expect("made above");
        held.drain(..).for_each(|frame| side.free(handle, frame, 0));
    };
    let alloc = on_threads(threads, count, take);
    let free = on_threads(threads, count, give);
    on_threads(threads, count, take);
    for (number, part) in parts.iter().enumerate() {
        shuffle(&mut part.lock().expect("not poisoned").0, &mut Random(number as u64 + 7));
    }
    let random = on_threads(threads, count, give);
    for part in parts {
        let (_, handle) = part.into_inner().expect("not poisoned");
        side.finish(handle.expect("made above"));
    }
    [alloc, free, random]
}

/// Fill, free half at random, then rounds of freeing and taking 10 %: per cent of the huge frames that the free frames could
/// make, counted by taking them. Caches stay as they are.
fn recover_huge<S: Side>(side: &S, rounds: usize) -> f64 {
    let (mut handle, mut random) = (side.handle(), Random(1));
    let mut held: Vec<usize> = std::iter::from_fn(|| side.alloc(&mut handle, 0)).collect();
    let all = held.len();
    shuffle(&mut held, &mut random);
    held.drain(all / 2..).for_each(|frame| side.free(&mut handle, frame, 0));
    for _ in 0..rounds {
        shuffle(&mut held, &mut random);
        let kept = held.len() - all / 20;
        held.drain(kept..).for_each(|frame| side.free(&mut handle, frame, 0));
        held.extend((0..all / 20).map_while(|_| side.alloc(&mut handle, 0)));
    }
    let possible = (all - held.len()) / HUGE_FRAMES;
    let taken = std::iter::from_fn(|| side.alloc(&mut handle, HUGE_ORDER)).count();
    taken as f64 * 100.0 / possible as f64
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
            "huge %",
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
            cells.push(short(median(&figures.recovered)));
            table.row(cells);
        }
        table.print();
        println!();
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
                ratio(|f| &f.recovered),
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
        let slower = [&own.pair, &own.bulk_alloc, &own.random_free].map(|of| median(&of[1]) / median(&of[0]));
        let reached = [
            median(&own.pair[0]),
            median(&cpu.pair[0]),
            median(&zones.pair[0]),
            median(&zones.huge_pair[0]),
            median(&zones.batch[0]),
            median(&own.random_free[0]),
            slower.into_iter().fold(0.0, f64::max),
            median(&own.recovered),
        ];
        let mut table = Table::new(&["bar", "reached", "goal", ""]);
        for ((name, bar), reached) in BARS.into_iter().zip(reached) {
            let is_share = name.ends_with('%');
            let is_kept = if is_share { reached >= bar } else { reached <= bar };
            let sign = if is_share { ">=" } else { "<=" };
            let verdict = if is_kept { "kept" } else { "missed" };
            table.row(vec![name.to_owned(), short(reached), format!("{sign} {bar}"), verdict.to_owned()]);
        }
        table.print();
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
