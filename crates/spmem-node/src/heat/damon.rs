//! DAMON, the kernel's monitor of data accesses, by sysfs (Documentation/admin-guide/mm/damon/usage.rst): one kdamond, one
//! context on fixed virtual addresses (`fvaddr`), one target. It keeps as many regions as its limits let it, samples a page of
//! each, splits and joins them by what it sees. A scheme that does nothing (`stat`) lists those with accesses.
//!
//! There is one list of kdamonds in a kernel. Ours is made only while there is none, and taken away when the source is
//! dropped, and none starts beside a module of the kernel's own that uses it (DAMON_STAT, on in Debian's 7.3). A killed process
//! leaves its own, which stops when the program that it watched ends, and [`Damon`] replaces such a one.

use std::borrow::ToOwned;
use std::fs;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::string::{String, ToString};
use std::time::Duration;
use std::vec::Vec;
use std::{format, thread};

use spmem_core::heat::{Accessed, Lack, Source};

use super::{HeatError, HeatSource};

const ADMIN: &str = "sys/kernel/mm/damon/admin/kdamonds";
const ANOTHER: &str = "another program (/sys/kernel/mm/damon/admin)";
/// Modules of the kernel's own beside which it starts no other, and where they are turned off.
const EXCLUSIVE: [(&str, &str); 3] = [
    (
        "sys/module/damon_stat/parameters/enabled",
        "the kernel's DAMON_STAT (/sys/module/damon_stat/parameters/enabled)",
    ),
    (
        "sys/module/damon_reclaim/parameters/enabled",
        "the kernel's DAMON_RECLAIM (/sys/module/damon_reclaim/parameters/enabled)",
    ),
    (
        "sys/module/damon_lru_sort/parameters/enabled",
        "the kernel's DAMON_LRU_SORT (/sys/module/damon_lru_sort/parameters/enabled)",
    ),
];
const OPERATIONS: &str = "fvaddr";
/// How long its thread may take to end.
const TURNS: u32 = 50;
const TURN: Duration = Duration::from_millis(20);

/// How often it samples and sums up, and how finely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Between samples of a region, microseconds.
    pub sample_us: u64,
    /// Of an interval that is summed up, microseconds.
    pub aggregate_us: u64,
    /// The fewest regions.
    pub least_regions: u64,
    /// The most: each costs a sample in every interval.
    pub most_regions: u64,
}

impl Pace {
    /// For looks about every `interval`: ten samples in each, and as many regions as take a small part of a processor.
    pub fn of(interval: Duration) -> Self {
        let aggregate_us = u64::try_from(interval.as_micros()).unwrap_or(u64::MAX).clamp(20_000, 10_000_000);
        Self { sample_us: aggregate_us / 10, aggregate_us, least_regions: 100, most_regions: 1000 }
    }
}

/// What DAMON sees of one process.
#[derive(Debug)]
pub struct Damon {
    kdamonds: PathBuf,
    pid: u32,
    pace: Pace,
    /// What is monitored; empty while nothing is.
    ranges: Vec<Range<usize>>,
}

impl Damon {
    /// For process `pid` of the kernel under `root`; it begins with the first look.
    pub fn new(root: &Path, pid: u32, pace: Pace) -> Self {
        Self { kdamonds: root.join(ADMIN), pid, pace, ranges: Vec::new() }
    }

    /// The kernel thread that does the work, while there is one.
    pub fn thread(&self) -> Option<u32> {
        fs::read_to_string(self.kdamonds.join("0/pid")).ok()?.trim().parse().ok()
    }

    fn begin(&mut self, ranges: &[Range<usize>]) -> Result<(), HeatError> {
        self.end();
        if is_taken(&self.kdamonds) {
            let cause = io::Error::from(ErrorKind::ResourceBusy);
            return Err(HeatError::File { path: self.kdamonds.clone(), cause });
        }
        self.set("nr_kdamonds", 1)?;
        // From here on there is something to take away.
        self.ranges = ranges.to_vec();
        let result = self.describe(ranges).and_then(|()| self.set("0/state", "on"));
        if result.is_err() {
            self.end();
        }
        result
    }

    fn describe(&self, ranges: &[Range<usize>]) -> Result<(), HeatError> {
        let Pace { sample_us, aggregate_us, least_regions, most_regions } = self.pace;
        self.set("0/contexts/nr_contexts", 1)?;
        let context =
            |name: &str, value: &dyn ToString| self.set(&format!("0/contexts/0/{name}"), value.to_string());
        context("operations", &OPERATIONS)?;
        context("monitoring_attrs/intervals/sample_us", &sample_us)?;
        context("monitoring_attrs/intervals/aggr_us", &aggregate_us)?;
        context("monitoring_attrs/intervals/update_us", &aggregate_us)?;
        // The most first: the kernel takes no fewest above it.
        context("monitoring_attrs/nr_regions/max", &most_regions)?;
        context("monitoring_attrs/nr_regions/min", &least_regions)?;
        context("targets/nr_targets", &1)?;
        context("targets/0/pid_target", &self.pid)?;
        context("targets/0/regions/nr_regions", &ranges.len())?;
        for (number, range) in ranges.iter().enumerate() {
            context(&format!("targets/0/regions/{number}/start"), &range.start)?;
            context(&format!("targets/0/regions/{number}/end"), &range.end)?;
        }
        context("schemes/nr_schemes", &1)?;
        context("schemes/0/action", &"stat")?;
        for (what, least) in [("sz", 0), ("nr_accesses", 1), ("age", 0)] {
            context(&format!("schemes/0/access_pattern/{what}/min"), &least)?;
            context(&format!("schemes/0/access_pattern/{what}/max"), &u32::MAX)?;
        }
        // A region may be as large as all of the memory.
        context("schemes/0/access_pattern/sz/max", &u64::MAX)
    }

    /// Ours is no more.
    fn end(&mut self) {
        if self.ranges.is_empty() {
            return;
        }
        self.ranges.clear();
        remove(&self.kdamonds);
    }

    fn set(&self, name: &str, value: impl ToString) -> Result<(), HeatError> {
        let path = self.kdamonds.join(name);
        fs::write(&path, value.to_string()).map_err(|cause| HeatError::File { path, cause })
    }

    fn read(&self, ranges: &[Range<usize>]) -> Result<Vec<Accessed>, HeatError> {
        self.set("0/state", "update_schemes_tried_regions")?;
        let tried = self.kdamonds.join("0/contexts/0/schemes/0/tried_regions");
        let entries = fs::read_dir(&tried).map_err(|cause| HeatError::File { path: tried.clone(), cause })?;
        let samples = u32::try_from(self.pace.aggregate_us / self.pace.sample_us).unwrap_or(u32::MAX);
        let mut found = Vec::new();
        for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
            let number = |name| read_number(&entry.path().join(name));
            let (start, end, seen) = (number("start")?, number("end")?, number("nr_accesses")?);
            let seen = u32::try_from(seen).unwrap_or(u32::MAX).min(samples);
            // It keeps to the ranges, but for their ends in a region that was joined.
            for range in ranges {
                let (start, end) = (range.start.max(start), range.end.min(end));
                if start < end {
                    found.push(Accessed { start, end, seen, samples });
                }
            }
        }
        found.sort_unstable_by_key(|one| one.start);
        Ok(found)
    }
}

impl Drop for Damon {
    fn drop(&mut self) {
        self.end();
    }
}

impl HeatSource for Damon {
    fn source(&self) -> Source {
        Source::Damon
    }

    fn look(&mut self, ranges: &[Range<usize>]) -> Result<Vec<Accessed>, HeatError> {
        if ranges.is_empty() {
            self.end();
            return Ok(Vec::new());
        }
        if self.ranges != ranges {
            self.begin(ranges)?;
            return Ok(Vec::new());
        }
        self.read(ranges)
    }
}

fn read_number(path: &Path) -> Result<usize, HeatError> {
    let text = fs::read_to_string(path).map_err(|cause| HeatError::File { path: path.to_owned(), cause })?;
    text.trim().parse().map_err(|_| HeatError::Nonsense { what: "a region of DAMON's without a number" })
}

fn state(kdamonds: &Path, number: usize) -> String {
    fs::read_to_string(kdamonds.join(format!("{number}/state"))).unwrap_or_default().trim().to_owned()
}

/// Somebody has kdamonds, and one is at work or about to be. One that is off and watched a process that ended is anybody's.
fn is_taken(kdamonds: &Path) -> bool {
    let count = read_number(&kdamonds.join("nr_kdamonds")).unwrap_or(0);
    let is_ours = |number| {
        let target = kdamonds.join(format!("{number}/contexts/0/targets/0/pid_target"));
        let pid = read_number(&target).unwrap_or(0);
        pid != 0 && state(kdamonds, number) == "off" && !Path::new(&format!("/proc/{pid}")).exists()
    };
    !(0..count).all(is_ours)
}

fn remove(kdamonds: &Path) {
    let _ = fs::write(kdamonds.join("0/state"), "off");
    for _ in 0..TURNS {
        // Refused while the thread is still there.
        if fs::write(kdamonds.join("nr_kdamonds"), "0").is_ok() {
            return;
        }
        thread::sleep(TURN);
    }
}

/// Why this process cannot have it.
pub(super) fn lack(root: &Path) -> Option<Lack> {
    let kdamonds = root.join(ADMIN);
    let count = kdamonds.join("nr_kdamonds");
    match fs::OpenOptions::new().write(true).open(&count) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Some(Lack::Kernel { needs: "CONFIG_DAMON_SYSFS" });
        }
        Err(_) => return Some(Lack::Forbidden { needs: "root" }),
        Ok(_) if is_taken(&kdamonds) => return Some(Lack::Taken { by: ANOTHER }),
        Ok(_) => {}
    }
    let is_on = |path: &str| fs::read_to_string(root.join(path)).is_ok_and(|text| text.trim() == "Y");
    if let Some((_, by)) = EXCLUSIVE.into_iter().find(|(path, _)| is_on(path)) {
        return Some(Lack::Taken { by });
    }
    // What it can do is told by a context only, so one is made and taken away; nothing runs meanwhile.
    let has = fs::write(&count, "1")
        .and_then(|()| fs::write(kdamonds.join("0/contexts/nr_contexts"), "1"))
        .and_then(|()| fs::read_to_string(kdamonds.join("0/contexts/0/avail_operations")));
    let _ = fs::write(&count, "0");
    match has {
        Ok(list) if list.split_whitespace().any(|one| one == OPERATIONS) => None,
        Ok(_) => Some(Lack::Kernel { needs: "CONFIG_DAMON_VADDR" }),
        Err(error) if error.kind() == ErrorKind::ResourceBusy => Some(Lack::Taken { by: ANOTHER }),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Some(Lack::Kernel { needs: "DAMON with avail_operations, Linux 5.19" })
        }
        Err(_) => Some(Lack::Forbidden { needs: "root" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spmem_sys::PAGE;
    use spmem_sys::mapping::Mapping;

    #[test]
    fn regions_of_this_process_that_are_used_are_told_and_nothing_is_left_behind() {
        let root = Path::new("/");
        if let Some(lack) = lack(root) {
            std::println!("skipped: {lack}");
            return;
        }
        const PAGES: usize = 4096;
        let mut memory = Mapping::new(PAGES * PAGE, c"spmem test").unwrap();
        memory.bytes_mut(0, PAGES * PAGE).fill(3);
        let range = memory.start()..memory.start() + PAGES * PAGE;
        let mut source = Damon::new(root, std::process::id(), Pace::of(Duration::from_millis(100)));
        assert_eq!(source.look(std::slice::from_ref(&range)).unwrap(), []);
        assert_eq!(lack(root), Some(Lack::Taken { by: ANOTHER }));
        // Regions follow what they see: it takes as many rounds as it takes.
        let hot = range.start..range.start + PAGES / 4 * PAGE;
        loop {
            let until = std::time::Instant::now() + Duration::from_millis(150);
            while std::time::Instant::now() < until {
                (0..PAGES / 4).for_each(|page| {
                    std::hint::black_box(memory.bytes(page * PAGE, 1)[0]);
                });
            }
            let found = source.look(std::slice::from_ref(&range)).unwrap();
            assert!(found.iter().all(|one| one.start >= range.start && one.end <= range.end && one.seen > 0));
            let in_hot: usize =
                found.iter().map(|one| one.end.min(hot.end).saturating_sub(one.start.max(hot.start))).sum();
            if in_hot >= hot.len() / 2 {
                break;
            }
        }
        drop(source);
        assert_eq!(lack(root), None);
        assert_eq!(fs::read_to_string(root.join(ADMIN).join("nr_kdamonds")).unwrap().trim(), "0");
        assert!(memory.bytes(0, PAGES * PAGE).iter().all(|&byte| byte == 3));
    }

    #[test]
    fn a_kernel_without_it_is_said_to_be() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(lack(root.path()), Some(Lack::Kernel { needs: "CONFIG_DAMON_SYSFS" }));
    }

    /// A tree with the files that are looked at.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn what_others_use_is_left_to_them_and_what_the_dead_left_is_not() {
        const COUNT: &str = "sys/kernel/mm/damon/admin/kdamonds/nr_kdamonds";
        const STATE: &str = "sys/kernel/mm/damon/admin/kdamonds/0/state";
        const TARGET: &str = "sys/kernel/mm/damon/admin/kdamonds/0/contexts/0/targets/0/pid_target";
        const AVAILABLE: &str = "sys/kernel/mm/damon/admin/kdamonds/0/contexts/0/avail_operations";
        let own = std::process::id().to_string();
        let cases: [(&str, &str, &str, bool); 4] = [
            ("on", "4194304", "N", true),
            ("off", &own, "N", true),
            ("off", "4194304", "N", false),
            ("off", "4194304", "Y", true),
        ];
        for (state, target, stat, is_taken) in cases {
            let root = tree(&[
                (COUNT, "1\n"),
                (STATE, state),
                (TARGET, target),
                (AVAILABLE, "vaddr\nfvaddr\n"),
                (EXCLUSIVE[0].0, stat),
            ]);
            let lack = lack(root.path());
            assert_eq!(matches!(lack, Some(Lack::Taken { .. })), is_taken, "{state} {target} {stat}: {lack:?}");
            let is_left = fs::read_to_string(root.path().join(COUNT)).unwrap() == "1\n";
            assert_eq!(is_left, is_taken, "{state} {target} {stat}");
        }
    }
}
