//! Memory that fails: bits flip in what the pages that left are stored in (R20).
//!
//! A child flips them from outside, through /proc/PID/mem, in the mapping that is the store: it lies in front of the room that
//! it may still grow into, reserved address space, far more than anything else reserves. Where there is none, nothing flips and nothing may be lost. The program answers SIGBUS as one would that can do without a page: by a new one in its
//! place. Each loss is printed as `lost PID ADDRESS`; the suite looks whether `spm` has told of that one, and of no other.
//!
//! Swap files (`faults-swap`) have no name: the child finds what the program's agent has open through /proc/PID/task, and by what it has
//! locked of the ledger which part is that process's.

use crate::area::Area;
use crate::harness::{Case, Ctx, Outcome, Res, bail, ensure, skip};
use crate::model::{PAGE, Rng};
use crate::process;
use crate::sys;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case::new(
        "faults-bits",
        "where bits flip in the store a page has its bytes or is lost, with SIGBUS; other processes lose nothing",
        |ctx| bits(ctx, Where::Store),
    ),
    Case::new("faults-swap", "the same where bits flip in a swap file", |ctx| bits(ctx, Where::File)),
];

/// What is damaged.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Where {
    Store,
    File,
}

/// Where a child flips bits.
enum Target {
    Store { memory: File, pagemap: File, start: u64, pages: usize },
    File { file: File, ledger: PathBuf },
}

impl Target {
    fn find(program: u32, place: Where) -> Option<Self> {
        if place == Where::File {
            return swap_of(program).map(|(file, ledger)| Self::File { file, ledger });
        }
        let (start, pages) = store_of(program)?;
        let memory = File::options().read(true).write(true).open(format!("/proc/{program}/mem")).ok()?;
        Some(Self::Store { memory, pagemap: File::open(format!("/proc/{program}/pagemap")).ok()?, start, pages })
    }

    /// One bit, somewhere.
    fn flip(&self, rng: &mut Rng) -> Outcome {
        let (file, page) = match self {
            Self::Store { memory, pagemap, start, pages } => (memory, present(pagemap, *start, *pages, rng)),
            Self::File { file, ledger } => (file, swapped(ledger, rng)),
        };
        let Some(page) = page else { return Ok(()) };
        let place = page + rng.below(PAGE) as u64;
        let mut byte = [0];
        file.read_exact_at(&mut byte, place)?;
        byte[0] ^= 1 << rng.below(8);
        file.write_all_at(&byte, place)?;
        Ok(())
    }
}

/// A reservation of so many pages is the store's: 1 GiB.
const RESERVED_PAGES: u64 = 1 << 18;
/// Pages of a cluster, which a byte of the ledger stands for.
const CLUSTER_PAGES: usize = 512;
/// Losses that are enough.
const ENOUGH: usize = 8;
/// After this it is too late for the first one.
const LIMIT: Duration = Duration::from_secs(120);
/// Between two flipped bits, ms, at least.
const REST_MS: i32 = 2;
/// What the child is told.
const FLIP: u8 = 1;
const END: u8 = 2;
const PRESENT: u64 = 1 << 63;

static BASE: AtomicUsize = AtomicUsize::new(0);
static PAGES: AtomicUsize = AtomicUsize::new(0);
/// The page that was lost and not looked at yet, its number plus one; a second one, or one elsewhere, ends the program.
static LOST: AtomicUsize = AtomicUsize::new(0);

/// Puts a new page in the place of a lost one.
extern "C" fn replace(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands a handler of SIGBUS the address.
    let address = unsafe { (*info).si_addr() } as usize;
    let page = address.wrapping_sub(BASE.load(Relaxed)) / PAGE;
    if page >= PAGES.load(Relaxed) || LOST.swap(page + 1, Relaxed) != 0 {
        sys::default_signal(libc::SIGBUS);
        return;
    }
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    // SAFETY: a page of the area that nobody can read any more.
    unsafe { libc::mmap((address & !(PAGE - 1)) as *mut libc::c_void, PAGE, prot, flags, -1, 0) };
}

/// Works while a child damages what this process's pages are stored in.
fn bits(ctx: &Ctx, place: Where) -> Outcome {
    let program = std::process::id();
    let (read, write) = sys::pipe()?;
    let child = process::fork(|| {
        sys::close(write);
        flip(ctx, (program, place), read)
    })?;
    sys::close(read);
    // The child sees the end of the pipe where this fails early.
    let outcome = work(ctx, place, write, child);
    sys::close(write);
    outcome
}

/// Reads and writes an area all over while bits flip, until enough is lost; then all of it once more.
fn work(ctx: &Ctx, place: Where, tell: i32, child: i32) -> Outcome {
    let pages = ctx.pages() * 2;
    let mut area = Area::at(0, ctx.seed, pages);
    println!("losses of process {}:", std::process::id());
    // What the program cannot do without stays where it is: only the area is damaged. Nothing is allocated from here on.
    // SAFETY: no memory is involved.
    if unsafe { libc::mlockall(libc::MCL_CURRENT) } != 0 {
        skip!("mlockall: errno {}", sys::errno());
    }
    area.base = sys::anon(pages)?;
    BASE.store(area.base, Relaxed);
    PAGES.store(pages, Relaxed);
    sys::on_signal(libc::SIGBUS, replace, 0)?;
    area.write_all();
    let is_stored = Target::find(std::process::id(), place).is_some();
    if is_stored {
        say(tell, FLIP)?;
    }
    let (mut rng, mut lost, begin) = (ctx.rng(0), 0, Instant::now());
    while !ctx.is_over() || is_stored && lost < ENOUGH && begin.elapsed() < LIMIT {
        let page = rng.below(pages);
        lost += visit(&mut area, page)?;
        if rng.one_in(3) {
            area.write(page);
            lost += usize::from(take(&area, page)?);
        }
    }
    ensure!(!is_stored || lost > 0, "no page was lost in {LIMIT:?}: nothing was damaged");
    ensure!(is_stored || lost == 0, "{lost} pages were lost, and there is no store");
    say(tell, END)?;
    process::succeed("process beside one whose store is damaged", child)?;
    for page in 0..pages {
        visit(&mut area, page)?;
    }
    area.check_all("area whose damage has been mended")
}

/// Looks at a page, and makes it whole if it was lost; how many were.
fn visit(area: &mut Area, page: usize) -> Res<usize> {
    let is_right = area.is_right(page);
    if !take(area, page)? {
        return if is_right {
            Ok(0)
        } else {
            area.check(page).and_then(|()| bail!("page {page} was wrong for a moment"))
        };
    }
    let bytes = area.addr(page) as *const [u8; PAGE];
    // SAFETY: a page of the area.
    ensure!(unsafe { bytes.read_volatile() } == [0; PAGE], "the page in place of a lost one is not new");
    area.write(page);
    Ok(1 + usize::from(take(area, page)?))
}

fn say(tell: i32, what: u8) -> Outcome {
    sys::write_full(tell, (&raw const what).addr(), 1)
}

/// Whether this page has just been lost; no other may have been.
fn take(area: &Area, page: usize) -> Res<bool> {
    let lost = LOST.swap(0, Relaxed);
    ensure!(lost == 0 || lost == page + 1, "page {} was lost when {page} was used", lost - 1);
    if lost != 0 {
        println!("lost {} {:#x}", std::process::id(), area.addr(page));
    }
    Ok(lost != 0)
}

/// The child: damages the program's store, or its swap file, from when it is told until it is to end, and has an area of its own, of which
/// nothing may be lost.
fn flip(ctx: &Ctx, (program, place): (u32, Where), told: i32) -> Outcome {
    let mut area = Area::filled(ctx.seed ^ 1, ctx.pages())?;
    let mut rng = ctx.rng(99);
    let (mut at, mut target) = (0, None);
    loop {
        match heard(told, REST_MS)? {
            Some(END) => return area.check_all("process beside one whose store is damaged"),
            Some(_) => target = Target::find(program, place),
            None => {}
        }
        if let Some(target) = &target {
            target.flip(&mut rng)?;
        }
        go_on(&mut area, &mut rng, &mut at)?;
    }
}

/// What the child is told within so many ms, if anything.
pub fn heard(told: i32, wait_ms: i32) -> Res<Option<u8>> {
    let mut entry = libc::pollfd { fd: told, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry.
    if unsafe { libc::poll(&raw mut entry, 1, wait_ms) } <= 0 {
        return Ok(None);
    }
    let mut what = END;
    // The end of the pipe is the end.
    sys::read_full(told, (&raw mut what).addr(), 1)?;
    Ok(Some(what))
}

/// The child's own work: some more pages.
pub fn go_on(area: &mut Area, rng: &mut Rng, at: &mut usize) -> Outcome {
    for _ in 0..64 {
        area.check(*at)?;
        if rng.one_in(3) {
            area.write(*at);
        }
        *at = (*at + 1) % area.len();
    }
    Ok(())
}

/// First address and pages of a process's store.
fn store_of(program: u32) -> Option<(u64, usize)> {
    let maps = sys::slurp(&format!("/proc/{program}/maps"));
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    };
    let is_room = |line: &str| {
        line.contains(" ---p ")
            && range(line).is_some_and(|(start, end)| (end - start) / PAGE as u64 >= RESERVED_PAGES)
    };
    let lines: Vec<&str> = maps.lines().collect();
    let pair = lines.windows(2).find(|pair| pair[0].contains(" rw-p ") && is_room(pair[1]))?;
    let ((start, end), (room, _)) = (range(pair[0])?, range(pair[1])?);
    (end == room).then_some((start, (end - start) as usize / PAGE))
}

/// A page of the store that is there, by chance.
fn present(pagemap: &File, start: u64, pages: usize, rng: &mut Rng) -> Option<u64> {
    // A store begins where its memory does: what is used lies in front.
    let mut entries = vec![0_u8; 8 * pages.min(4096)];
    let read = pagemap.read_at(&mut entries, start / PAGE as u64 * 8).ok()?;
    let (entries, _) = entries[..read].as_chunks::<8>();
    let is_there = |entry: &[u8; 8]| u64::from_ne_bytes(*entry) & PRESENT != 0;
    let there: Vec<usize> = (0..entries.len()).filter(|&index| is_there(&entries[index])).collect();
    (!there.is_empty()).then(|| start + (there[rng.below(there.len())] * PAGE) as u64)
}

/// What a process's agent has open under a name that `is_it`: the path in /proc.
fn open_file(program: u32, is_it: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let folders = std::fs::read_dir(format!("/proc/{program}/task")).ok()?.flatten();
    let open = folders.filter_map(|task| std::fs::read_dir(task.path().join("fd")).ok()).flatten().flatten();
    open.map(|entry| entry.path())
        .find(|path| std::fs::read_link(path).is_ok_and(|name| name.to_str().is_some_and(&is_it)))
}

/// The swap file of a process, which has no name, and the ledger that tells which clusters are the process's.
fn swap_of(program: u32) -> Option<(File, PathBuf)> {
    let ledger = open_file(program, |name| name.starts_with("/memfd:spmem-ledger"))?;
    let file = open_file(program, |name| name.ends_with(" (deleted)") && !name.contains("memfd:"))?;
    let information = PathBuf::from(ledger.to_str()?.replace("/fd/", "/fdinfo/"));
    Some((File::options().read(true).write(true).open(file).ok()?, information))
}

/// A page of the clusters that the process holds, by chance.
fn swapped(ledger: &Path, rng: &mut Rng) -> Option<u64> {
    let text = std::fs::read_to_string(ledger).ok()?;
    // lock: 1: OFDLCK ADVISORY WRITE -1 00:01:1234 FIRST LAST
    let locks = text.lines().filter(|line| line.starts_with("lock:"));
    let ends = locks.filter_map(|line| {
        let mut fields = line.split_whitespace().rev();
        let last = fields.next()?.parse::<u64>().ok()?;
        Some(fields.next()?.parse::<u64>().ok()?..=last)
    });
    let clusters: Vec<u64> = ends.flatten().collect();
    let page = rng.below(CLUSTER_PAGES) as u64;
    (!clusters.is_empty())
        .then(|| (clusters[rng.below(clusters.len())] * CLUSTER_PAGES as u64 + page) * PAGE as u64)
}
