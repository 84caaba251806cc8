//! What a program under `spm run` sees of memory that the machine reports as failed (MADV_HWPOISON in madvise(2)): a page that it
//! has, or one that others of its pages are stored in.
//!
//! Fills an area of several times its budget, has one page of the kernel's poisoned, and reads and writes all of the area: each page has its
//! bytes, or raises SIGBUS with its address, which is answered by a new page. A child has an area of its own, of which nothing may
//! be lost. Prints `poisoned AT`, `lost ADDRESS` for each page, `beside is whole`, `done`. Started by [`vm_runs`](super::vm_runs), under `spm run`.
#![allow(unsafe_code, reason = "memory that fails, a handler of SIGBUS and fork(2) are what is tried")]

use std::fs;
use std::io::{Write, stdout};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, ensure};
use spmem_sys::PAGE;

use super::vm_runs_probe::Area;

/// What to poison.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// resident, held, node1 or dax
    what: String,
    #[arg(long, default_value_t = 10)]
    mib: usize,
}

/// Pages lost at most where one frame of the store is: as many as are stored in it, in part or whole.
const MOST_LOST: usize = 64;
/// Time for pages to begin to leave.
const LEAVING: Duration = Duration::from_millis(20);
const PRESENT: u64 = 1 << 63;
/// BUS_MCEERR_AR.
const MEMORY_FAILED: i32 = 4;

static START: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);
/// Memory is being poisoned: whoever does it may be told at once, which is no loss. What is lost raises SIGBUS when it is used.
static IS_POISONING: AtomicBool = AtomicBool::new(false);
static LOST: [AtomicUsize; MOST_LOST] = [const { AtomicUsize::new(0) }; MOST_LOST];
static COUNT: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_failure(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands a handler its structure.
    let info = unsafe { &*info };
    // SAFETY: that of a SIGBUS has an address.
    let address = unsafe { info.si_addr() }.expose_provenance() & !(PAGE - 1);
    let is_own = (START.load(Relaxed)..END.load(Relaxed)).contains(&address);
    if info.si_code == MEMORY_FAILED && IS_POISONING.load(Relaxed) {
        return;
    }
    let index = COUNT.fetch_add(1, Relaxed);
    if !is_own || index >= MOST_LOST {
        // SAFETY: the signal's own action; it comes again.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        return;
    }
    LOST[index].store(address, Relaxed);
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    let at = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: a page of the area that nobody can read any more.
    unsafe { libc::mmap(at, PAGE, prot, flags, -1, 0) };
}

/// Runs it.
///
/// # Errors
/// A byte is wrong.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let mut area = Area::new(options.mib << 20 >> 12)?;
    START.store(area.address(0), Relaxed);
    END.store(area.address(area.all().end), Relaxed);
    let mut action: libc::sigaction = unsafe_zeroed();
    action.sa_sigaction = (on_failure as extern "C" fn(_, _, _)) as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler touches atomics and makes system calls.
    ensure!(unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } == 0, "sigaction");
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors.
    ensure!(unsafe { libc::pipe(ends.as_mut_ptr()) } == 0, "pipe");
    // SAFETY: this process has one thread; the child ends by _exit.
    let child = unsafe { libc::fork() };
    ensure!(child >= 0, "fork");
    if child == 0 {
        // SAFETY: our copy of the writing end.
        unsafe { libc::close(ends[1]) };
        let outcome = beside(ends[0]);
        if let Err(error) = &outcome {
            println!("beside: {error:#}");
        }
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(outcome.is_err())) };
    }
    let outcome = hurt(&mut area, options);
    // SAFETY: tells the child to end.
    unsafe { libc::close(ends[1]) };
    let mut status = 0;
    // SAFETY: waits for our own child.
    ensure!(unsafe { libc::waitpid(child, &raw mut status, 0) } == child && status == 0, "beside: {status:#x}");
    outcome?;
    println!("done");
    Ok(())
}

fn unsafe_zeroed() -> libc::sigaction {
    // SAFETY: all zeros are a valid action.
    unsafe { std::mem::zeroed() }
}

/// Another process: writes and checks until it is told to end.
fn beside(told: i32) -> anyhow::Result<()> {
    let mut area = Area::new(512)?;
    let mut entry = libc::pollfd { fd: told, events: libc::POLLIN, revents: 0 };
    for version in 1.. {
        for page in area.all() {
            area.write(page, version);
        }
        area.check(area.all())?;
        // SAFETY: one entry.
        if unsafe { libc::poll(&raw mut entry, 1, 0) } > 0 {
            break;
        }
    }
    ensure!(COUNT.load(Relaxed) == 0, "{} pages were lost", COUNT.load(Relaxed));
    println!("beside is whole");
    Ok(())
}

fn hurt(area: &mut Area, options: &Options) -> anyhow::Result<()> {
    for page in area.all() {
        area.write(page, 1);
    }
    area.check(area.all())?;
    // What is on its way out may be stored by now: then nothing is lost with it.
    let tries = if options.what == "held" { 20 } else { 1 };
    for _ in 0..tries {
        poison_one(area, options)?;
        if COUNT.load(Relaxed) > 0 {
            break;
        }
    }
    // The kernel's word is all that there is of it: an emulated machine's memory does not fail.
    ensure!(COUNT.load(Relaxed) > 0 || options.what == "dax", "nothing was lost");
    area.check(area.all())
}

/// Has a page fail, and looks at all of the area.
fn poison_one(area: &mut Area, options: &Options) -> anyhow::Result<()> {
    let at = match options.what.as_str() {
        "resident" => {
            area.write(7, 1);
            area.address(7)
        }
        "held" => present_in_holding(area)?,
        "node1" => present_in_store()?,
        "dax" => on_device()?,
        other => anyhow::bail!("nothing is called {other}"),
    };
    let page = std::ptr::with_exposed_provenance_mut(at);
    IS_POISONING.store(true, Relaxed);
    // SAFETY: what is there is lost, which is what is tried.
    let done = unsafe { libc::madvise(page, PAGE, libc::MADV_HWPOISON) };
    let error = std::io::Error::last_os_error();
    IS_POISONING.store(false, Relaxed);
    println!("poisoned {at:#x} in process {}", std::process::id());
    stdout().flush()?;
    // The page may leave at that moment, and the slot be empty. Then it is the page of zeros, and nothing is lost.
    let has_left = matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EHWPOISON));
    ensure!(done == 0 || options.what == "held" && has_left, "madvise: {error}");
    for page in area.all() {
        check(area, page)?;
        area.write(page, 2);
    }
    Ok(())
}

/// Looks at a page, which is right, or has been lost: then it is new, and written.
fn check(area: &mut Area, page: usize) -> anyhow::Result<()> {
    let lost = || LOST.iter().any(|lost| lost.load(Relaxed) == area.address(page));
    let was_lost = lost();
    let outcome = area.check([page]);
    if !lost() || was_lost && outcome.is_ok() {
        return outcome;
    }
    println!("lost {:#x}", area.address(page));
    stdout().flush()?;
    let bytes = std::ptr::with_exposed_provenance::<[u8; PAGE]>(area.address(page));
    // SAFETY: a page of the area.
    ensure!(unsafe { bytes.read_volatile() } == [0; PAGE], "page {page} is neither right nor new");
    Ok(())
}

/// The addresses of a line of /proc/PID/maps.
fn range(line: &str) -> Option<(usize, usize)> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

/// The pages that are there.
fn present_in(pagemap: &fs::File, start: usize, end: usize) -> anyhow::Result<Vec<usize>> {
    let mut entries = vec![0; (end - start) / PAGE * 8];
    let read = pagemap.read_at(&mut entries, (start / PAGE * 8) as u64)?;
    let (entries, _) = entries[..read].as_chunks::<8>();
    let pages = (start..end).step_by(PAGE).zip(entries);
    Ok(pages.filter(|(_, entry)| u64::from_ne_bytes(**entry) & PRESENT != 0).map(|(page, _)| page).collect())
}

/// Whether there is anything in a page. Of an empty slot that somebody has looked into (an encoder that is late does) nothing is: it
/// has the page of zeros that all processes share, and must not fail.
fn is_filled(page: usize) -> bool {
    let bytes = std::ptr::with_exposed_provenance::<[u8; PAGE]>(page);
    // SAFETY: a page of the holding area, which stays mapped.
    let read = unsafe { bytes.read_volatile() };
    read != [0; PAGE]
}

/// A page of the holding area that is held, while pages are written, so that others leave. The area begins at a multiple of 2 MiB, and is a
/// page longer than a power of two: that one stays empty.
fn present_in_holding(area: &mut Area) -> anyhow::Result<usize> {
    let pagemap = fs::File::open("/proc/self/pagemap")?;
    let is_one = |&(start, end): &(usize, usize)| {
        start.is_multiple_of(2 << 20) && (end - start - PAGE).is_power_of_two() && end - start > PAGE
    };
    let mut maps = String::new();
    for _ in 0..20 {
        // It is there once the first pages are about to leave.
        maps = fs::read_to_string("/proc/self/maps")?;
        let lines = maps.lines().filter(|line| line.contains(" rw-p "));
        let areas: Vec<_> = lines.filter_map(range).filter(is_one).collect();
        for page in area.all() {
            area.write(page, 1);
            for &(start, end) in &areas {
                if let Some(at) = present_in(&pagemap, start, end)?.into_iter().rfind(|&page| is_filled(page)) {
                    return Ok(at);
                }
            }
        }
        std::thread::sleep(LEAVING);
    }
    anyhow::bail!("nothing was in a holding area:\n{maps}")
}

/// A page of the part of a dax device that the process writes to.
fn on_device() -> anyhow::Result<usize> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let window = maps.lines().find(|line| line.contains(" rw-s ") && line.contains(" /dev/dax"));
    let start = window.and_then(|line| usize::from_str_radix(line.split_once('-')?.0, 16).ok());
    start.context("no device is mapped")
}

/// A page of the store that is there. The store lies in front of the room that it may grow into.
fn present_in_store() -> anyhow::Result<usize> {
    const LEAST_ROOM: usize = 64 << 20;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let pagemap = fs::File::open("/proc/self/pagemap")?;
    let lines: Vec<&str> = maps.lines().collect();
    for pair in lines.windows(2).filter(|pair| pair[0].contains(" rw-p ") && pair[1].contains(" ---p ")) {
        let (Some((start, end)), Some((next, room))) = (range(pair[0]), range(pair[1])) else { continue };
        if end != next || room - next < LEAST_ROOM {
            continue;
        }
        if let Some(at) = present_in(&pagemap, start, end)?.first() {
            return Ok(*at);
        }
    }
    anyhow::bail!("there is no store:\n{maps}")
}
