//! `xtask program access`: random access to many pages of real-looking data.
//!
//! Each page carries a tag of 8 bytes, at a place and with a value that follow from the page and its version. Every
//! access checks the tag; a write makes the next version. At the end every byte of every page is compared with what
//! it must be. The phases are announced as one JSON object a line; after `measured` the program waits for a line on
//! stdin, so that whoever watches it can read counters of the machine at that moment. Pages are split among threads.
//!
//! An access slower than [`FAULT_NS`] is taken for a fault: a resident page takes a few hundred ns.

use std::fs::File;
use std::io::{BufRead, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Zipf};
use serde::{Deserialize, Serialize};

use crate::programs::corpus::PAGE;

/// Slower accesses count as faults.
const FAULT_NS: u64 = 2000;
/// Places of a page that tags rotate over: so a page written often keeps its compressibility.
const TAG_SLOTS: u32 = 8;
const WORDS: u64 = (PAGE / 8) as u64;
/// How finely throughput is followed, ms.
const SLICE_MS: u128 = 100;

/// Which pages are accessed how often.
#[derive(Clone, Copy, ValueEnum, Serialize, Deserialize, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pattern {
    /// All alike.
    Uniform,
    /// Zipf with exponent 0.99, popular pages scattered.
    Zipf,
    /// Every eighth page, these alike; the others never.
    Hot,
    /// As `hot`, and in the measurement other ones than in the warm-up.
    Moving,
}

impl Pattern {
    /// As the command line names it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
            Self::Hot => "hot",
            Self::Moving => "moving",
        }
    }
}

/// One page of so many is hot.
const HOT_SHARE: usize = 8;

/// Command line.
#[derive(Args)]
pub(crate) struct Options {
    /// File of pages to take the data from.
    #[arg(long)]
    corpus: PathBuf,
    /// Data, MiB.
    #[arg(long, default_value_t = 512)]
    mib: usize,
    /// Distribution of the accesses.
    #[arg(long, value_enum, default_value = "uniform")]
    pattern: Pattern,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Seconds before the measurement.
    #[arg(long, default_value_t = 5.0)]
    warm_seconds: f64,
    /// Seconds of the measurement.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
}

/// A line of the program's output.
#[derive(Serialize, Deserialize, Debug)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(crate) enum Event {
    /// The warm-up is over.
    Warm,
    /// The measurement is over.
    Measured(Measured),
    /// Every byte was what it must be.
    Verified,
}

/// What was measured.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) operations: u64,
    pub(crate) seconds: f64,
    /// Accesses slower than 2 us.
    pub(crate) faults: u64,
    pub(crate) fault_p50_us: f64,
    pub(crate) fault_p99_us: f64,
    pub(crate) fault_p999_us: f64,
    /// Of all accesses.
    pub(crate) access_p99_us: f64,
    /// Accesses in each whole tenth of a second.
    pub(crate) slices: Vec<u64>,
}

#[repr(align(4096))]
struct Page([u8; PAGE]);

/// The pages of one thread. The table of versions is small and hot: it stays resident on every side.
struct Part<'a> {
    first: usize,
    pages: &'a mut [Page],
    versions: &'a mut [u32],
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(options.threads > 0 && options.mib > 0, "there must be a thread and a MiB");
    let corpus =
        File::open(&options.corpus).with_context(|| format!("cannot read {}", options.corpus.display()))?;
    let corpus_pages = corpus.metadata()?.len() / PAGE as u64;
    let count = options.mib << 8;
    let mut pages: Vec<Page> = Vec::with_capacity(count);
    for number in 0..count {
        let mut page = Page([0; PAGE]);
        corpus.read_exact_at(&mut page.0, number as u64 % corpus_pages * PAGE as u64)?;
        put_tag(&mut page.0, number, 0);
        pages.push(page);
    }
    let mut versions = vec![0; count];
    let share = count.div_ceil(options.threads);
    let mut parts: Vec<Part<'_>> = pages
        .chunks_mut(share)
        .zip(versions.chunks_mut(share))
        .enumerate()
        .map(|(index, (pages, versions))| Part { first: index * share, pages, versions })
        .collect();
    for_all(&mut parts, options, options.warm_seconds, 1)?;
    say(&Event::Warm)?;
    let started = Instant::now();
    let (slices, times) = for_all(&mut parts, options, options.seconds, 2)?;
    say(&Event::Measured(summarise(slices, started.elapsed(), &times)))?;
    std::io::stdin().lock().read_line(&mut String::new())?;
    for (number, (page, version)) in pages.iter().zip(&versions).enumerate() {
        let mut expected = [0; PAGE];
        corpus.read_exact_at(&mut expected, number as u64 % corpus_pages * PAGE as u64)?;
        (version.saturating_sub(TAG_SLOTS - 1)..=*version).for_each(|old| put_tag(&mut expected, number, old));
        ensure!(page.0 == expected, "page {number} at version {version} has wrong bytes");
    }
    say(&Event::Verified)
}

/// Accesses of all threads in each tenth of a second, and the times of all of them, ns.
fn for_all(
    parts: &mut [Part<'_>],
    options: &Options,
    seconds: f64,
    salt: u64,
) -> anyhow::Result<(Vec<u64>, Histogram<u64>)> {
    let duration = Duration::from_secs_f64(seconds);
    let results: Vec<_> = std::thread::scope(|scope| {
        let spawn = |part| scope.spawn(move || access(part, options.pattern, duration, salt));
        let handles: Vec<_> = parts.iter_mut().map(spawn).collect();
        handles.into_iter().map(|handle| handle.join().expect("an access thread does not panic")).collect()
    });
    let (mut slices, mut times) = (Vec::new(), new_histogram());
    for result in results {
        let (counts, histogram) = result?;
        slices.resize(counts.len().max(slices.len()), 0);
        slices.iter_mut().zip(&counts).for_each(|(sum, count)| *sum += count);
        times.add(histogram).context("cannot add up the times")?;
    }
    Ok((slices, times))
}

fn access(
    part: &mut Part<'_>,
    pattern: Pattern,
    duration: Duration,
    salt: u64,
) -> anyhow::Result<(Vec<u64>, Histogram<u64>)> {
    let count = part.pages.len();
    let mut rng = SmallRng::seed_from_u64(mix(part.first as u64, salt));
    let mut place: Vec<u32> = (0..count as u32).collect();
    // Of the part only, not of the phase: what is hot in the warm-up is hot in the measurement.
    place.shuffle(&mut SmallRng::seed_from_u64(part.first as u64));
    let zipf = Zipf::new(count as f64, 0.99).context("no Zipf distribution over no page")?;
    let hot = count / HOT_SHARE;
    ensure!(hot > 0, "fewer than {HOT_SHARE} pages a thread");
    let mut times = new_histogram();
    let mut slices = Vec::new();
    let begin = Instant::now();
    let end = begin + duration;
    loop {
        let rank = match pattern {
            Pattern::Uniform => rng.random_range(0..count),
            Pattern::Zipf => zipf.sample(&mut rng) as usize - 1,
            Pattern::Hot => rng.random_range(0..hot),
            Pattern::Moving => rng.random_range(0..hot) + salt as usize % 2 * hot,
        };
        let index = place[rank] as usize;
        let is_write = rng.random_ratio(3, 10);
        let before = Instant::now();
        let is_right = part.touch(index, is_write);
        let after = Instant::now();
        ensure!(is_right, "page {} at version {} has a wrong tag", part.first + index, part.versions[index]);
        times.saturating_record((after - before).as_nanos() as u64);
        let slice = ((after - begin).as_millis() / SLICE_MS) as usize;
        if slices.len() <= slice {
            slices.resize(slice + 1, 0);
        }
        slices[slice] += 1;
        if after >= end {
            return Ok((slices, times));
        }
    }
}

impl Part<'_> {
    /// Reads the tag of a page, and writes the next one; whether it was right.
    fn touch(&mut self, index: usize, is_write: bool) -> bool {
        let (number, version) = (self.first + index, &mut self.versions[index]);
        let page = &mut self.pages[index].0;
        let place = tag_place(number, *version);
        let is_right = page[place..place + 8] == tag(number, *version).to_le_bytes();
        if is_write && is_right {
            *version += 1;
            put_tag(page, number, *version);
        }
        is_right
    }
}

fn put_tag(page: &mut [u8; PAGE], number: usize, version: u32) {
    let place = tag_place(number, version);
    page[place..place + 8].copy_from_slice(&tag(number, version).to_le_bytes());
}

fn tag_place(number: usize, version: u32) -> usize {
    let slot = u64::from(version % TAG_SLOTS) * (WORDS / u64::from(TAG_SLOTS));
    (mix(number as u64, 7).wrapping_add(slot) % WORDS) as usize * 8
}

fn tag(number: usize, version: u32) -> u64 {
    mix(number as u64, u64::from(version) + 1000)
}

/// The finaliser of splitmix64 over two numbers.
fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b.wrapping_mul(0xd1b5_4a32_d192_ed03));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("these bounds are valid")
}

fn summarise(mut slices: Vec<u64>, elapsed: Duration, times: &Histogram<u64>) -> Measured {
    let operations = slices.iter().sum();
    slices.truncate((elapsed.as_millis() / SLICE_MS) as usize);
    let mut faults = new_histogram();
    for bucket in times.iter_recorded().filter(|bucket| bucket.value_iterated_to() > FAULT_NS) {
        faults.saturating_record_n(bucket.value_iterated_to(), bucket.count_at_value());
    }
    let us = |histogram: &Histogram<u64>, part| histogram.value_at_quantile(part) as f64 / 1000.0;
    Measured {
        operations,
        seconds: elapsed.as_secs_f64(),
        faults: faults.len(),
        fault_p50_us: us(&faults, 0.5),
        fault_p99_us: us(&faults, 0.99),
        fault_p999_us: us(&faults, 0.999),
        access_p99_us: us(times, 0.99),
        slices,
    }
}

fn say(event: &Event) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, event)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_places_of_a_page_s_tags_are_distinct() {
        for number in 0..1000 {
            let places: std::collections::HashSet<_> = (0..TAG_SLOTS).map(|v| tag_place(number, v)).collect();
            assert_eq!(places.len(), TAG_SLOTS as usize);
        }
    }

    #[test]
    fn a_flipped_bit_of_a_tag_is_seen() {
        let mut pages = vec![Page([0; PAGE])];
        put_tag(&mut pages[0].0, 0, 0);
        pages[0].0[tag_place(0, 0) + 3] ^= 1;
        let mut part = Part { first: 0, pages: &mut pages, versions: &mut [0] };
        assert!(!part.touch(0, false));
    }
}
