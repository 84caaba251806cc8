//! `spm nodes --measure`: how fast each node really is, from the nearest processors.
//!
//! Memory is asked of the node (mbind(2), MPOL_PREFERRED) and where its pages are is read back before and after (move_pages(2)): a figure of
//! pages that are elsewhere is none. *Idle latency*: one thread follows a ring through all cache lines in random order,
//! each step needs the one before. *Loaded*: the same while the other processors read as fast as they can. *Bandwidth*:
//! every processor of the nearest node reads, then writes, pieces of its own in order.
//!
//! Devices that are no nodes are not measured: writing to them could destroy what they hold. Hole: bandwidth is what so
//! many processors reach, not what the memory could give to more.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use spmem_node::machine::{Access, Machine};
use spmem_sys::mempolicy::NodeMemory;
use spmem_sys::thread::Affinity;

use super::list::{Listing, Origin};
use crate::remark::remark;
use crate::size::human;

/// How long each of the four figures is measured.
const PHASE: Duration = Duration::from_millis(400);
/// The buffer, in last-level caches: most accesses miss them all then.
const CACHES: u64 = 4;
/// Bounds of the buffer, bytes, and where no cache is told of.
const LEAST_BYTES: u64 = 4 << 20;
const MOST_BYTES: u64 = 1 << 30;
const UNKNOWN_CACHE_BYTES: u64 = 32 << 20;
/// Words of a cache line.
const LINE_WORDS: usize = 8;
/// Steps between two looks at the clock.
const HOPS: usize = 2048;
/// Words read or written between two looks at the clock: 1 MiB.
const PIECE_WORDS: usize = 1 << 17;

/// Figures of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Measured {
    /// The node whose processors measured.
    pub initiator: u16,
    /// How many of them.
    pub threads: usize,
    /// Bytes that were used, each page of them on the node.
    pub buffer: u64,
    /// Median of a dependent read, ns.
    pub idle_latency_ns: u64,
    /// The same beside readers on the other processors; none where there is one processor only.
    pub loaded_latency_ns: Option<u64>,
    /// All threads together, MiB/s.
    pub read_bandwidth_mib_s: u64,
    /// All threads together, MiB/s.
    pub write_bandwidth_mib_s: u64,
    /// Where the firmware says otherwise.
    pub disagreements: Vec<String>,
}

/// Measures every node of the kernel that has memory; what cannot be measured is said on stderr.
pub fn measure(listing: &mut Listing) {
    let machine = &listing.machine;
    let is_real = |node: &&mut super::NodeLine| node.origin == Origin::Kernel && node.capacity > Some(0);
    let lines: Vec<_> = listing.lines.iter_mut().filter(is_real).collect();
    let bar = progress_bar(lines.len() * STEPS.len());
    for line in lines {
        let available = line.free.unwrap_or(0);
        match measure_node(machine, line.id, available, &bar) {
            Ok(figures) => {
                for text in &figures.disagreements {
                    bar.suspend(|| remark(format_args!("node {}: {text}", line.id)));
                }
                let class = spmem_core::class::class_of_latency(figures.idle_latency_ns);
                let is_by_speed = line.class.number() <= 3;
                if is_by_speed && class != line.class {
                    bar.suspend(|| {
                        remark(format_args!(
                            "node {}: {} ns would make it class {}, it is shown as {} ({}); [class] of the configuration decides",
                            line.id, figures.idle_latency_ns, class.number(), line.class.number(), line.reason
                        ));
                    });
                }
                line.measured = Some(figures);
            }
            Err(error) => bar.suspend(|| remark(format_args!("node {} is not measured: {error:#}", line.id))),
        }
    }
    bar.finish_and_clear();
    for line in listing.lines.iter().filter(|line| line.origin == Origin::Device) {
        remark(format_args!(
            "node {} is not measured: {} is no memory of the kernel's, and writing to it could destroy what it holds",
            line.id,
            line.devices.join(", ")
        ));
    }
}

const STEPS: [&str; 4] = ["idle latency", "loaded latency", "reading", "writing"];

/// On stderr, and only where that is a terminal.
fn progress_bar(steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:<28} [{bar:30}] {pos}/{len}  {elapsed}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn measure_node(machine: &Machine, id: u16, available: u64, bar: &ProgressBar) -> anyhow::Result<Measured> {
    let (initiator, cpus) = processors_near(machine, id)?;
    let cache = last_level_cache_bytes(cpus[0]).unwrap_or(UNKNOWN_CACHE_BYTES);
    let bytes = (cache * CACHES).clamp(LEAST_BYTES, MOST_BYTES).min(available / 2);
    ensure!(bytes >= LEAST_BYTES, "{} are available, {} are needed", human(available), human(2 * LEAST_BYTES));
    let mut memory = memory_on(id, usize::try_from(bytes).context("more than an address space")?)?;
    let bytes = size_of_val(memory.words()) as u64;
    if bytes < cache * 2 {
        bar.suspend(|| {
            remark(format_args!(
                "node {id}: {} are available, too few to get past {} of cache: the figures may be the cache's",
                human(available),
                human(cache)
            ));
        });
    }
    let step = |index: usize| {
        bar.set_message(format!("node {id}: {}", STEPS[index]));
        bar.inc(1);
    };
    step(0);
    link_ring(memory.words());
    let idle_latency_ns = latency(memory.words(), cpus[0], &[])?;
    step(1);
    let others = other_processors(machine, &cpus);
    let loaded_latency_ns =
        if others.is_empty() { None } else { Some(latency(memory.words(), cpus[0], &others)?) };
    step(2);
    let read_bandwidth_mib_s = bandwidth(memory.words(), &cpus, |piece| {
        black_box(sum(piece));
    })?;
    step(3);
    let write_bandwidth_mib_s = bandwidth(memory.words(), &cpus, |piece| {
        piece.fill(black_box(u64::MAX));
        black_box(piece);
    })?;
    ensure_placed(&memory)?;
    let mut measured = Measured {
        initiator,
        threads: cpus.len(),
        buffer: bytes,
        idle_latency_ns,
        loaded_latency_ns,
        read_bandwidth_mib_s,
        write_bandwidth_mib_s,
        disagreements: Vec::new(),
    };
    if let Some(access) = machine.node(id).and_then(|node| node.access.as_ref()) {
        measured.disagreements = disagreements(access, &measured);
    }
    Ok(measured)
}

/// `bytes` there, or as much less as it has.
fn memory_on(id: u16, mut bytes: usize) -> anyhow::Result<NodeMemory> {
    loop {
        let memory = NodeMemory::new(bytes, id).map_err(|errno| {
            anyhow::anyhow!("no memory can be had of it: {errno} (does this cpuset have it in mems?)")
        })?;
        match ensure_placed(&memory) {
            Err(_) if bytes as u64 >= 2 * LEAST_BYTES => bytes /= 2,
            placed => return placed.map(|()| memory).context("the node is full"),
        }
    }
}

fn ensure_placed(memory: &NodeMemory) -> anyhow::Result<()> {
    let (elsewhere, pages) = memory.pages_elsewhere().context("where its pages are cannot be read")?;
    ensure!(elsewhere == 0, "{elsewhere} of {pages} pages asked of node {} are elsewhere", memory.node());
    Ok(())
}

/// The nearest node that has processors this process may use, and those.
fn processors_near(machine: &Machine, id: u16) -> anyhow::Result<(u16, Vec<usize>)> {
    let allowed = Affinity::of_caller();
    let node = machine.node(id).context("there is no such node")?;
    for initiator in machine.initiators_of(node) {
        let cpus = machine.node(initiator).map(|node| node.cpus.as_slice()).unwrap_or_default();
        let mine: Vec<usize> = cpus.iter().map(|&cpu| cpu as usize).filter(|&cpu| allowed.contains(cpu)).collect();
        if !mine.is_empty() {
            return Ok((initiator, mine));
        }
    }
    bail!("no node has processors that this process may use")
}

/// Those that make load: the others of the nearest node, or of the machine where it has one only.
fn other_processors(machine: &Machine, near: &[usize]) -> Vec<usize> {
    if near.len() > 1 {
        return near[1..].to_vec();
    }
    let allowed = Affinity::of_caller();
    let all = machine.nodes.iter().flat_map(|node| node.cpus.iter().map(|&cpu| cpu as usize));
    let mut others: Vec<usize> = all.filter(|&cpu| allowed.contains(cpu) && !near.contains(&cpu)).collect();
    others.sort_unstable();
    others.dedup();
    others
}

/// From sysfs (Documentation/ABI/testing/sysfs-devices-system-cpu): the cache of the highest level.
fn last_level_cache_bytes(cpu: usize) -> Option<u64> {
    let folder = format!("/sys/devices/system/cpu/cpu{cpu}/cache");
    let caches = std::fs::read_dir(folder).ok()?.filter_map(|entry| {
        let folder = entry.ok()?.path();
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        let level: u32 = read("level")?.trim().parse().ok()?;
        Some((level, crate::size::parse_bytes(read("size")?.trim()).ok()?))
    });
    caches.max().map(|(_, bytes)| bytes)
}

/// One cycle through the first word of every line, in random order (Sattolo): each holds where the next is.
fn link_ring(words: &mut [u64]) {
    let lines = words.len() / LINE_WORDS;
    for line in 0..lines {
        words[line * LINE_WORDS] = (line * LINE_WORDS) as u64;
    }
    // Always the same order, so that two runs are alike.
    let mut random = fastrand::Rng::with_seed(1);
    for line in (1..lines).rev() {
        words.swap(line * LINE_WORDS, random.usize(..line) * LINE_WORDS);
    }
}

/// Median of a step through the ring on `cpu`, ns, while the processors `loaded` read all of it.
fn latency(ring: &[u64], cpu: usize, loaded: &[usize]) -> anyhow::Result<u64> {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for &other in loaded {
            let is_over = &is_over;
            scope.spawn(move || {
                // Elsewhere it loads the memory all the same.
                let _ = pin(other);
                for piece in ring.chunks(PIECE_WORDS).cycle() {
                    if is_over.load(Relaxed) {
                        break;
                    }
                    black_box(sum(piece));
                }
            });
        }
        let walker = scope.spawn(move || pin(cpu).map(|()| walk(ring)));
        let median = walker.join();
        is_over.store(true, Relaxed);
        median.map_err(|_| anyhow::anyhow!("the measuring thread ended in a panic"))?
    })
}

fn walk(ring: &[u64]) -> u64 {
    let (mut place, mut picoseconds) = (0_usize, Vec::new());
    let started = Instant::now();
    while started.elapsed() < PHASE || picoseconds.is_empty() {
        let before = Instant::now();
        for _ in 0..HOPS {
            // What was linked is below the length; `get` keeps that true whatever the memory says.
            place = usize::try_from(ring.get(place).copied().unwrap_or(0)).unwrap_or(0);
        }
        picoseconds.push(before.elapsed().as_nanos() * 1000 / HOPS as u128);
    }
    black_box(place);
    picoseconds.sort_unstable();
    u64::try_from((picoseconds[picoseconds.len() / 2] + 500) / 1000).unwrap_or(u64::MAX)
}

/// What all processors together do with pieces of their own, MiB/s.
fn bandwidth(words: &mut [u64], cpus: &[usize], work: impl Fn(&mut [u64]) + Sync) -> anyhow::Result<u64> {
    let work = &work;
    let share = words.len() / cpus.len();
    let rates: Vec<anyhow::Result<f64>> = thread::scope(|scope| {
        let workers: Vec<_> = words
            .chunks_exact_mut(share)
            .zip(cpus)
            .map(|(own, &cpu)| {
                scope.spawn(move || {
                    pin(cpu)?;
                    let (started, mut done_words) = (Instant::now(), 0_usize);
                    'measured: loop {
                        for piece in own.chunks_mut(PIECE_WORDS) {
                            done_words += piece.len();
                            work(piece);
                            if started.elapsed() >= PHASE {
                                break 'measured;
                            }
                        }
                    }
                    let mebibytes = (done_words * 8) as f64 / f64::from(1 << 20);
                    Ok(mebibytes / started.elapsed().as_secs_f64())
                })
            })
            .collect();
        let gone = |_| Err(anyhow::anyhow!("a measuring thread ended in a panic"));
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(gone)).collect()
    });
    let total: f64 = rates.into_iter().sum::<anyhow::Result<f64>>()?;
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rate: positive and far below 2^53"
    )]
    Ok(total.round() as u64)
}

fn pin(cpu: usize) -> anyhow::Result<()> {
    let only = Affinity::only(cpu).with_context(|| format!("processor {cpu} has too high a number"))?;
    only.apply().with_context(|| format!("processor {cpu} cannot be used"))
}

fn sum(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, word| sum.wrapping_add(*word))
}

/// Where firmware and measurement are farther apart than noise and the way of measuring explain: half as much again for
/// latency, a factor of two for bandwidth.
fn disagreements(firmware: &Access, measured: &Measured) -> Vec<String> {
    let differ = |told: u64, seen: u64, (times, of): (u64, u64)| {
        seen.saturating_mul(of) > told.saturating_mul(times)
            || told.saturating_mul(of) > seen.saturating_mul(times)
    };
    let rows = [
        ("read latency", "ns", firmware.read_latency_ns, measured.idle_latency_ns, (3, 2)),
        ("read bandwidth", "MiB/s", firmware.read_bandwidth_mib_s, measured.read_bandwidth_mib_s, (2, 1)),
        ("write bandwidth", "MiB/s", firmware.write_bandwidth_mib_s, measured.write_bandwidth_mib_s, (2, 1)),
    ];
    let told = rows.into_iter().filter_map(|(what, unit, told, seen, factor)| {
        let told = told.filter(|&told| differ(told, seen, factor))?;
        let by = match (unit, measured.threads) {
            ("ns", _) => String::new(),
            (_, 1) => " by one thread".to_owned(),
            (_, threads) => format!(" by {threads} threads"),
        };
        Some(format!("{what}: the firmware says {told} {unit}, measured {seen} {unit}{by}"))
    });
    told.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_goes_through_every_line_once_before_it_is_back() {
        let mut words = vec![0_u64; 1000 * LINE_WORDS];
        link_ring(&mut words);
        let (mut place, mut seen) = (0, vec![false; 1000]);
        for _ in 0..1000 {
            assert!(place % LINE_WORDS == 0 && !seen[place / LINE_WORDS], "{place}");
            seen[place / LINE_WORDS] = true;
            place = usize::try_from(words[place]).unwrap();
        }
        assert_eq!(place, 0);
        let steps = (0..1000).filter(|line| words[line * LINE_WORDS] == ((line + 1) * LINE_WORDS) as u64).count();
        assert!(steps < 20, "{steps} lines are followed by their neighbour: a prefetcher would see through it");
    }

    #[test]
    fn only_figures_far_apart_disagree_in_either_direction() {
        let firmware = |latency, bandwidth| Access {
            initiators: vec![0],
            read_latency_ns: latency,
            write_latency_ns: latency,
            read_bandwidth_mib_s: bandwidth,
            write_bandwidth_mib_s: bandwidth,
        };
        let measured = Measured {
            initiator: 0,
            threads: 2,
            buffer: 1 << 20,
            idle_latency_ns: 150,
            loaded_latency_ns: None,
            read_bandwidth_mib_s: 1000,
            write_bandwidth_mib_s: 900,
            disagreements: Vec::new(),
        };
        let count = |latency, bandwidth| disagreements(&firmware(latency, bandwidth), &measured).len();
        assert_eq!(count(None, None), 0);
        assert_eq!(count(Some(100), Some(1800)), 0, "just within bounds");
        assert_eq!((count(Some(99), None), count(Some(226), None)), (1, 1));
        assert_eq!((count(None, Some(2001)), count(None, Some(449))), (2, 2));
        assert_eq!(
            disagreements(&firmware(Some(300), Some(25_600)), &measured),
            [
                "read latency: the firmware says 300 ns, measured 150 ns",
                "read bandwidth: the firmware says 25600 MiB/s, measured 1000 MiB/s by 2 threads",
                "write bandwidth: the firmware says 25600 MiB/s, measured 900 MiB/s by 2 threads"
            ]
        );
    }

    #[test]
    fn figures_are_of_memory_on_the_node_and_make_sense() {
        let machine = Machine::read("/".as_ref(), &std::collections::BTreeMap::new());
        let id = machine.nodes.iter().find(|node| node.memory.is_some()).unwrap().id;
        let figures = measure_node(&machine, id, 2 * LEAST_BYTES, &ProgressBar::hidden()).unwrap();
        assert_eq!(figures.buffer, LEAST_BYTES);
        assert!((1..1_000_000).contains(&figures.idle_latency_ns), "{figures:?}");
        assert!(figures.read_bandwidth_mib_s > 1 && figures.write_bandwidth_mib_s > 1, "{figures:?}");
        let refused = measure_node(&machine, id, LEAST_BYTES, &ProgressBar::hidden()).unwrap_err();
        assert!(refused.to_string().contains("are needed"), "{refused}");
    }
}
