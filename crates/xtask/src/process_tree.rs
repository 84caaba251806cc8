//! What a process and its descendants take, read from outside: memory and CPU time.
//!
//! [`Sampler`] watches a tree from a thread of its own, [`collect_pids`] walks it once. This is the check that does
//! not believe the JSON report of `spm`: it knows only /proc.
//!
//! The peak is the highest sum of proportional anonymous and shmem memory (smaps_rollup), file pages left out.
//! Reading smaps_rollup walks page tables, milliseconds for each GiB, and holds the map lock of the program; so the
//! cheap `RssAnon + RssShmem` (which counts memory shared by fork twice) is read at 20 Hz, and smaps_rollup only when
//! that sum is near or above the peak so far, within [`DUTY`] of the time.
//!
//! Known holes: a peak shorter than 50 ms is missed; a daemon that was reparented before its first sample is not
//! seen; shmem that nobody maps is not seen.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::sleep;
use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_millis(50);
/// Share of the time that may go into smaps_rollup: one part in so many.
const DUTY: u32 = 25;

/// Watches a tree until it is dropped.
pub(crate) struct Sampler {
    stop: Arc<AtomicBool>,
    peak: Arc<AtomicU64>,
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

impl Sampler {
    /// Starts to watch `root` and its descendants.
    pub(crate) fn start(root: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let peak = Arc::new(AtomicU64::new(0));
        let sampler = Self { stop: Arc::clone(&stop), peak: Arc::clone(&peak) };
        std::thread::spawn(move || watch(root, &stop, &peak));
        sampler
    }

    /// The peak so far, bytes.
    pub(crate) fn peak_bytes(&self) -> u64 {
        self.peak.load(Relaxed)
    }
}

fn watch(root: u32, stop: &AtomicBool, peak: &AtomicU64) {
    let mut known = BTreeSet::from([root]);
    let mut rollup_not_before = Instant::now();
    while !stop.load(Relaxed) {
        add_descendants(&mut known);
        let quick: u64 = known.iter().map(|pid| read_rss_bytes(*pid)).sum();
        // 2 % below: the cheap counters lag behind by some pages per CPU.
        if quick + quick / 50 > peak.load(Relaxed) && Instant::now() >= rollup_not_before {
            let started = Instant::now();
            let exact: u64 = known.iter().map(|pid| read_pss_bytes(*pid)).sum();
            rollup_not_before = Instant::now() + started.elapsed() * DUTY;
            peak.fetch_max(exact, Relaxed);
        }
        sleep(PERIOD);
    }
}

/// `root` and all its descendants that are alive now.
pub(crate) fn collect_pids(root: u32) -> BTreeSet<u32> {
    let mut pids = BTreeSet::from([root]);
    add_descendants(&mut pids);
    pids
}

/// CPU time that the live processes of the tree have used, threads and awaited children included.
pub(crate) fn read_cpu(root: u32) -> Duration {
    // Times are in ticks of sysconf(_SC_CLK_TCK), 100 Hz on every Linux architecture that spmem runs on.
    let ticks: u64 = collect_pids(root).into_iter().map(read_cpu_ticks).sum();
    Duration::from_millis(ticks * 10)
}

/// Proportional anonymous and shmem memory of the live processes of the tree, bytes.
pub(crate) fn read_tree_bytes(root: u32) -> u64 {
    collect_pids(root).into_iter().map(read_pss_bytes).sum()
}

fn add_descendants(known: &mut BTreeSet<u32>) {
    let mut fresh: Vec<u32> = known.iter().copied().collect();
    while let Some(pid) = fresh.pop() {
        for child in read_children(pid) {
            if known.insert(child) {
                fresh.push(child);
            }
        }
    }
    known.retain(|pid| fs::exists(format!("/proc/{pid}")).unwrap_or(false));
}

fn read_children(pid: u32) -> Vec<u32> {
    let mut children = Vec::new();
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return children };
    for thread in threads.flatten() {
        let text = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        children.extend(text.split_ascii_whitespace().filter_map(|word| word.parse::<u32>().ok()));
    }
    children
}

pub(crate) fn read_rss_bytes(pid: u32) -> u64 {
    sum_kib_lines(&format!("/proc/{pid}/status"), &["RssAnon:", "RssShmem:"])
}

fn read_pss_bytes(pid: u32) -> u64 {
    sum_kib_lines(&format!("/proc/{pid}/smaps_rollup"), &["Pss_Anon:", "Pss_Shmem:"])
}

fn sum_kib_lines(file: &str, names: &[&str]) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    let kib: u64 = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            names.contains(&words.next()?).then(|| words.next()?.parse::<u64>().ok()).flatten()
        })
        .sum();
    kib * 1024
}

fn read_cpu_ticks(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything: fields are counted after the last ')'. 14-17 in proc_pid_stat(5).
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_ascii_whitespace().skip(11).take(4).filter_map(|word| word.parse::<u64>().ok()).sum()
}
