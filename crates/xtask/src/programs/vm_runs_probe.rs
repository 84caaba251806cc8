//! What a program does whose cold pages are placed on a node, or copied away: every byte is checked, and where its pages are is the kernel's word.
//!
//! Fills an area larger than its budget, waits until the kernel says that pages of it are on the node, or away, and then reads, writes,
//! forks, unmaps. Prints `placed N of process P` when so many are there, `done` at the end. Started by [`vm_runs`](super::vm_runs), under `spm run`.
#![allow(unsafe_code, reason = "memory that is unmapped, moved and dropped, and fork(2), are what is tried")]

use std::fs::File;
use std::io::{BufRead, Write, stdin, stdout};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use spmem_sys::{PAGE, mempolicy};

/// Only what hangs takes as long, on a busy emulated machine, too.
const PATIENCE: Duration = Duration::from_secs(600);
/// Of an entry of pagemap.
const PRESENT: u64 = 1 << 63;
/// So many are enough.
const ENOUGH: usize = 128;
/// Placed pages that are read all the time.
pub(super) const HOT: u32 = 32;

/// What to do.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// read, hot, write, threads, fork, unmap or wait
    what: String,
    #[arg(long, default_value_t = 6)]
    mib: usize,
    /// The kernel's node.
    #[arg(long, default_value_t = 2)]
    node: u16,
    /// Pages are to be away, rather than on a node.
    #[arg(long)]
    away: bool,
    /// A page is not on the node right after it was written.
    #[arg(long)]
    fenced: bool,
}

/// Where pages are to go.
#[derive(Clone, Copy)]
enum Goal {
    /// A node of the kernel's.
    Node(u16),
    /// Away: not present.
    Away,
}

impl Options {
    const fn goal(&self) -> Goal {
        if self.away { Goal::Away } else { Goal::Node(self.node) }
    }
}

/// Memory, and which version of each page is in it; version 0 is zeros.
pub(super) struct Area {
    start: usize,
    versions: Vec<u64>,
}

impl Area {
    pub(super) fn new(pages: usize) -> anyhow::Result<Self> {
        // SAFETY: a new mapping at a place that the kernel picks touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                pages * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        ensure!(start != libc::MAP_FAILED, "no memory");
        // SAFETY: advice about that range: single pages are what is placed.
        unsafe { libc::madvise(start, pages * PAGE, libc::MADV_NOHUGEPAGE) };
        Ok(Self { start: start.expose_provenance(), versions: vec![0; pages] })
    }

    pub(super) fn address(&self, page: usize) -> usize {
        self.start + page * PAGE
    }

    /// Half of the words repeat, so that pages compress, too.
    fn word(&self, page: usize, at: usize) -> u64 {
        match self.versions[page] {
            0 => 0,
            version => (version << 40) ^ (page as u64) << 16 ^ if at.is_multiple_of(2) { at as u64 } else { 7 },
        }
    }

    pub(super) fn write(&mut self, page: usize, version: u64) {
        self.versions[page] = version;
        for at in 0..PAGE / 8 {
            let to = std::ptr::with_exposed_provenance_mut::<u64>(self.address(page) + at * 8);
            // SAFETY: a word of the area, which is mapped; nobody else writes the page.
            unsafe { to.write_volatile(self.word(page, at)) };
        }
    }

    pub(super) fn check(&self, pages: impl IntoIterator<Item = usize>) -> anyhow::Result<()> {
        for page in pages {
            for at in 0..PAGE / 8 {
                let from = std::ptr::with_exposed_provenance::<u64>(self.address(page) + at * 8);
                // SAFETY: a word of the area, which is mapped; nobody writes the page meanwhile.
                let seen = unsafe { from.read_volatile() };
                let right = self.word(page, at);
                ensure!(
                    seen == right,
                    "page {page} of version {}: word {at} is {seen:#x}, not {right:#x}",
                    self.versions[page]
                );
            }
        }
        Ok(())
    }

    pub(super) fn all(&self) -> std::ops::Range<usize> {
        0..self.versions.len()
    }

    /// The pages that are where they are to go.
    fn placed(&self, goal: Goal) -> anyhow::Result<Vec<usize>> {
        let Goal::Node(node) = goal else {
            let mut entries = vec![0; self.versions.len() * 8];
            let pagemap = File::open("/proc/self/pagemap").context("no pagemap")?;
            pagemap.read_exact_at(&mut entries, (self.start / PAGE * 8) as u64).context("pagemap")?;
            let entries = entries.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
            return Ok(self
                .all()
                .zip(entries)
                .filter(|(_, entry)| entry & PRESENT == 0)
                .map(|(page, _)| page)
                .collect());
        };
        let addresses: Vec<usize> = self.all().map(|page| self.address(page)).collect();
        let mut nodes = vec![-1; addresses.len()];
        mempolicy::nodes_of(&addresses, &mut nodes).context("move_pages")?;
        Ok(self.all().filter(|&page| nodes[page] == i32::from(node)).collect())
    }

    /// Waits until there are enough.
    fn wait_placed(&self, goal: Goal) -> anyhow::Result<Vec<usize>> {
        let start = Instant::now();
        let mut next = self.all().cycle();
        loop {
            let placed = self.placed(goal)?;
            if placed.len() >= ENOUGH {
                println!("placed {} of process {}", placed.len(), std::process::id());
                stdout().flush()?;
                return Ok(placed);
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "only {} pages of {} have left",
                placed.len(),
                self.versions.len()
            );
            // Something has to be wanted for what is cold to leave. What was compressed, because whoever places pages was
            // late, comes back here and leaves once more.
            self.check(next.by_ref().filter(|page| !placed.contains(page)).take(ENOUGH))?;
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Runs it.
///
/// # Errors
/// A byte is wrong, or pages are where they should not be.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let mut area = Area::new(options.mib << 20 >> 12)?;
    for page in area.all() {
        area.write(page, 1);
    }
    let placed = area.wait_placed(options.goal())?;
    match options.what.as_str() {
        "read" => read(&area, &placed, options.goal())?,
        "hot" => hot(&area, &placed, options.goal())?,
        "write" => write(&mut area, &placed, options)?,
        "threads" => threads(area, options.goal())?,
        "fork" => fork(&mut area, options.goal())?,
        "unmap" => unmap(&mut area, &placed)?,
        "wait" => {
            // Whoever started this has something to do meanwhile.
            stdin().lock().read_line(&mut String::new())?;
            area.check(area.all())?;
            for page in area.all() {
                area.write(page, 2);
            }
            area.check(area.all())?;
        }
        other => bail!("nothing is called {other}"),
    }
    println!("done");
    Ok(())
}

/// Pages are read where they are: reading leaves them there, but for the few that are tried out.
fn read(area: &Area, placed: &[usize], goal: Goal) -> anyhow::Result<()> {
    area.check(placed.iter().copied())?;
    let now = area.placed(goal)?;
    let stayed = placed.iter().filter(|page| now.binary_search(page).is_ok()).count();
    println!("{stayed} of {} stayed", placed.len());
    ensure!(
        stayed >= placed.len() / 2,
        "reading has taken {} of {} pages away",
        placed.len() - stayed,
        placed.len()
    );
    area.check(area.all())
}

/// Pages that are read all the time come up, though none is written.
fn hot(area: &Area, placed: &[usize], goal: Goal) -> anyhow::Result<()> {
    let (start, mut rounds) = (Instant::now(), 0_u64);
    loop {
        let hot = placed.iter().copied().take(HOT as usize);
        area.check(hot.clone())?;
        rounds += 1;
        if rounds.is_multiple_of(16) {
            let now = area.placed(goal)?;
            let up = hot.filter(|page| now.binary_search(page).is_err()).count();
            if up >= HOT as usize / 4 * 3 {
                println!(
                    "{up} of {HOT} came up after {:.1} s, {} on the node",
                    start.elapsed().as_secs_f64(),
                    now.len()
                );
                break;
            }
            ensure!(start.elapsed() < PATIENCE, "only {up} of {HOT} came up, {} on the node", now.len());
        }
        thread::sleep(Duration::from_millis(5));
    }
    area.check(area.all())
}

fn write(area: &mut Area, placed: &[usize], options: &Options) -> anyhow::Result<()> {
    let mut still = 0;
    for &page in placed.iter().take(2 * ENOUGH) {
        area.write(page, 2);
        still += usize::from(mempolicy::node_of(0, area.address(page))? == i32::from(options.node));
    }
    println!("{still} were written on the node");
    // It may have been demoted again before it was looked at.
    ensure!(!options.fenced || still <= ENOUGH / 16, "{still} pages are behind their fence after a write");
    area.check(area.all())?;
    for page in area.all() {
        area.write(page, 3);
    }
    area.check(area.all())
}

fn threads(area: Area, goal: Goal) -> anyhow::Result<()> {
    let part = area.versions.len() / 3;
    let parts: Vec<Area> =
        (0..3).map(|index| Area { start: area.address(index * part), versions: vec![1; part] }).collect();
    thread::scope(|scope| {
        let handles: Vec<_> = parts
            .into_iter()
            .enumerate()
            .map(|(index, mut part)| {
                scope.spawn(move || -> anyhow::Result<()> {
                    // The contents tell the page's number in the whole.
                    let first = index * part.versions.len();
                    let whole =
                        Area { start: part.start - first * PAGE, versions: vec![1; first + part.versions.len()] };
                    whole.check(first..first + part.versions.len())?;
                    for version in 2..4 {
                        for page in part.all() {
                            part.write(page, version);
                        }
                        part.check(part.all())?;
                    }
                    Ok(())
                })
            })
            .collect();
        handles.into_iter().try_for_each(|handle| handle.join().unwrap_or_else(|_| bail!("a thread panicked")))
    })?;
    println!("{} there at the end", area.placed(goal)?.len());
    Ok(())
}

/// Parent and child share placed pages and write them, each its own.
fn fork(area: &mut Area, goal: Goal) -> anyhow::Result<()> {
    // SAFETY: this process has one thread; the child ends by _exit.
    let child = unsafe { libc::fork() };
    ensure!(child >= 0, "fork");
    let version = if child == 0 { 5 } else { 6 };
    let result = (|| {
        area.check(area.all().step_by(2))?;
        for page in area.all().step_by(3) {
            area.write(page, version);
        }
        area.check(area.all())
    })();
    if child == 0 {
        if let Err(error) = &result {
            println!("in the child: {error:#}");
        }
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(result.is_err())) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    ensure!(waited == child && status == 0, "the child ended with {status:#x}");
    result?;
    println!("{} there at the end", area.placed(goal)?.len());
    area.check(area.all())
}

/// Placed pages that are dropped, unmapped and moved: zeros where there is nothing, contents where they went.
fn unmap(area: &mut Area, placed: &[usize]) -> anyhow::Result<()> {
    let quarter = area.versions.len() / 4;
    // SAFETY: drops pages of the area that nobody refers to.
    let dropped = unsafe {
        libc::madvise(std::ptr::with_exposed_provenance_mut(area.start), quarter * PAGE, libc::MADV_DONTNEED)
    };
    ensure!(dropped == 0, "madvise");
    area.versions[..quarter].fill(0);
    area.check(area.all())?;
    let at = std::ptr::with_exposed_provenance_mut::<libc::c_void>(area.address(quarter));
    // SAFETY: unmaps pages of the area that nobody refers to.
    ensure!(unsafe { libc::munmap(at, quarter * PAGE) } == 0, "munmap");
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: maps where nothing is.
    let again = unsafe { libc::mmap(at, quarter * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    ensure!(again == at, "mmap");
    area.versions[quarter..2 * quarter].fill(0);
    area.check(area.all())?;
    // The last quarter moves to another place; its pages keep their numbers.
    let from = std::ptr::with_exposed_provenance_mut::<libc::c_void>(area.address(3 * quarter));
    let (len, flags) = (quarter * PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at a place that the kernel picks touches nothing that exists.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    // SAFETY: moves pages of the area that nobody refers to, over the mapping just made.
    let to = unsafe { libc::mremap(from, len, len, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, place) };
    ensure!(to != libc::MAP_FAILED, "mremap");
    let first = 3 * quarter;
    let moved = Area { start: to.expose_provenance() - first * PAGE, versions: area.versions.clone() };
    moved.check(first..first + quarter)?;
    area.versions.truncate(first);
    area.check(area.all())?;
    println!("{} were placed before", placed.len());
    for page in area.all() {
        area.write(page, 9);
    }
    area.check(area.all())?;
    moved.check(first..first + quarter)
}
