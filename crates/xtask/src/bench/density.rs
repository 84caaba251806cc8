//! `cargo xtask bench density`: what stored pages take, beside zram with lz4, on the memory of real programs.
//!
//! Each program of the workload script runs bare until it has grown; then it is stopped and a sample of its private
//! memory read. Both sides get the same pages. zram's is a device without swap on it: what it holds is `mem_used_total`.
//! Ours is the store: as lz4, then all of it recompressed as cold pages are, with the dictionaries that the same
//! policy makes. A page that neither can compress counts as a page on both sides; what the store keeps outside its frames
//! counts too. Then half of the pages leave at random and others come, and the store is compacted.
//!
//! Hole: every page is taken for one that is stored densely. How many are is a matter of the program; `dense_pages` and
//! `recompressed_pages` of a report say it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use serde_json::json;
use spmem_core::frames::Metadata;
use spmem_core::reclaim::{Dictionaries, Way, compacts};
use spmem_core::units::FrameCount;
use spmem_node::compressed::{Codec, DenseEncoder, GrantedFrames, Slot, Stats, Store, train};
use spmem_node::{Handle, PAGE_BYTES, Page, Stage};

use crate::bench::peer::ZramDisk;
use crate::figures::{self, MIB, Table, short};
use crate::launch::{Bed, NeedSpm};
use crate::process_tree;
use crate::workloads;

/// The project's bars.
const GOAL_RATIO: f64 = 1.4;
const GOAL_WASTE: f64 = 0.03;
const GOAL_OVERHEAD: f64 = 0.02;
/// Pages of a sample are read in runs of so many, so that neighbours are among them.
const RUN_PAGES: usize = 16;
/// Longest that a program may take to grow.
const PATIENCE: Duration = Duration::from_secs(180);
/// Rounds of moving pages together.
const COMPACTIONS: usize = 4;

/// A program, and the size at which its memory is read, MiB.
const PROGRAMS: [(&str, u64); 5] = [("redis", 450), ("sqlite", 350), ("numpy", 450), ("sort", 300), ("g++", 400)];

/// Command line.
#[derive(Args)]
pub(crate) struct Options {
    /// Memory read of each program, MiB: about what half of its memory as budget sends away.
    #[arg(long, default_value_t = 128)]
    mib: usize,
    /// Write the raw numbers to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the pages of each program to NAME.pages in this folder, for the example `waste` of spmem-node.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Which programs: redis, sqlite, numpy, sort, g++; all when none is named.
    names: Vec<String>,
}

/// What one program's pages came to.
struct Row {
    name: &'static str,
    pages: usize,
    zram_ratio: f64,
    zram_mb_s: f64,
    /// The store before and after.
    lz4: Side,
    dense: Side,
    dense_pages: u64,
    dictionary_pages: u64,
    encode_us: f64,
    densify_us: f64,
    /// Shares of the frames that are free slots: after churn, and compacted.
    churned: f64,
    compacted: f64,
}

/// The store at one moment.
struct Side {
    ratio: f64,
    waste: f64,
    overhead: f64,
    load_us: f64,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let unknown = options.names.iter().find(|name| PROGRAMS.iter().all(|(program, _)| program != name));
    ensure!(unknown.is_none(), "there is no program called {}", unknown.map_or("", String::as_str));
    let bed = Bed::new(NeedSpm::No)?;
    drop(ZramDisk::new(16 * MIB)?);
    let mut rows = Vec::new();
    for (name, grown_mib) in PROGRAMS {
        if options.names.is_empty() || options.names.iter().any(|wanted| wanted == name) {
            eprintln!("density: {name}: grows to {grown_mib} MiB");
            let pages = read_grown(&bed, name, grown_mib * MIB, options.mib * MIB as usize / PAGE_BYTES)?;
            if let Some(folder) = &options.keep {
                std::fs::write(folder.join(format!("{name}.pages")), pages.as_flattened())?;
            }
            rows.push(measure(name, &pages)?);
        }
    }
    print(&rows);
    let raw: Vec<_> = rows.iter().map(Row::to_json).collect();
    figures::write_json(options.json.as_deref(), &json!({ "bench": "density", "mib": options.mib, "rows": raw }))
}

/// Runs a program until it has grown, reads up to `most` pages of it, and ends it.
fn read_grown(bed: &Bed, name: &str, grown_bytes: u64, most: usize) -> anyhow::Result<Vec<Page>> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| workloads::run_bare(bed, name));
        let since = Instant::now();
        let pages = loop {
            let descendants = process_tree::collect_pids(std::process::id());
            let own = std::process::id();
            let grown = descendants
                .into_iter()
                .find(|&pid| pid != own && process_tree::read_rss_bytes(pid) >= grown_bytes);
            if let Some(pid) = grown {
                signal(pid, rustix::process::Signal::STOP);
                let pages = read_pages(pid, most);
                signal(pid, rustix::process::Signal::KILL);
                break pages;
            }
            if worker.is_finished() || since.elapsed() > PATIENCE {
                break Err(anyhow::anyhow!("{name} did not grow to {} MiB", grown_bytes / MIB));
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        // That it failed is our doing.
        let result = worker.join();
        pages.with_context(|| format!("{name}, which ended with {:?}", result.map(|result| result.err())))
    })
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Runs of present pages of private writable memory without a file, in random order.
fn read_pages(pid: u32, most: usize) -> anyhow::Result<Vec<Page>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let (memory, pagemap) = (File::open(format!("/proc/{pid}/mem"))?, File::open(format!("/proc/{pid}/pagemap"))?);
    let mut runs = Vec::new();
    for line in maps.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let Some((start, end)) = words.first().and_then(|range| range.split_once('-')) else { continue };
        if words.get(1).is_some_and(|rights| rights.starts_with("rw") && rights.ends_with('p'))
            && words.get(4) == Some(&"0")
        {
            let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
            runs.extend((start..end).step_by(RUN_PAGES * PAGE_BYTES).map(|at| (at, end)));
        }
    }
    runs.shuffle(&mut SmallRng::seed_from_u64(1));
    let mut pages = Vec::new();
    for (start, end) in runs {
        for at in (start..end).step_by(PAGE_BYTES).take(RUN_PAGES) {
            let (mut word, mut page) = ([0; 8], [0; PAGE_BYTES]);
            pagemap.read_exact_at(&mut word, at / PAGE_BYTES as u64 * 8)?;
            // Bit 63: it is in RAM.
            if word[7] & 0x80 != 0 && memory.read_exact_at(&mut page, at).is_ok() {
                pages.push(page);
            }
        }
        if pages.len() >= most {
            break;
        }
    }
    pages.truncate(most);
    Ok(pages)
}

fn measure(name: &'static str, pages: &[Page]) -> anyhow::Result<Row> {
    let (zram_ratio, zram_mb_s) = measure_zram(pages)?;
    let frames = pages.len() + 1024;
    let capacity = FrameCount(frames as u64);
    let granted = GrantedFrames::embedded(capacity, Metadata::from_heap(capacity)?)?;
    let mut store = Store::new(granted, vec![0; frames * PAGE_BYTES], 0x5eed);
    let (handles, encode_us) = insert_all(&mut store, pages)?;
    let mut handles: Vec<(usize, Handle)> =
        handles.into_iter().enumerate().filter_map(|(page, handle)| handle.map(|handle| (page, handle))).collect();
    let unfit = pages.len() - handles.len();
    let lz4 = look(&store, pages, &handles, unfit)?;
    let densify_us = densify_all(&mut store, &mut handles)?;
    compact(&mut store, &mut handles)?;
    let dense = look(&store, pages, &handles, unfit)?;
    let dense_pages = store.stats().dense_pages;
    let dictionary_pages = Slot::ALL.map(|slot| store.dictionary_pages(slot)).iter().sum();
    churn(&mut store, pages, &mut handles)?;
    let churned = free_share(&store.stats());
    compact(&mut store, &mut handles)?;
    let compacted = free_share(&store.stats());
    look(&store, pages, &handles, 0)?;
    Ok(Row {
        name,
        pages: pages.len(),
        zram_ratio,
        zram_mb_s,
        lz4,
        dense,
        dense_pages,
        dictionary_pages,
        encode_us,
        densify_us,
        churned,
        compacted,
    })
}

/// Ratio, and MB a second that it takes pages at.
fn measure_zram(pages: &[Page]) -> anyhow::Result<(f64, f64)> {
    let bytes = pages.as_flattened();
    let disk = ZramDisk::new((bytes.len() as u64).next_multiple_of(MIB))?;
    let device = File::options().write(true).open(disk.device())?;
    let since = Instant::now();
    device.write_all_at(bytes, 0)?;
    device.sync_all()?;
    let seconds = since.elapsed().as_secs_f64();
    let held = disk.read_use()?;
    ensure!(held.stored >= bytes.len() as u64, "zram holds {} of {} bytes", held.stored, bytes.len());
    Ok((bytes.len() as f64 / held.used as f64, bytes.len() as f64 / 1e6 / seconds))
}

type HeapStore = Store<GrantedFrames, Vec<u8>>;

/// A handle for each page that compresses, and us a page.
fn insert_all(store: &mut HeapStore, pages: &[Page]) -> anyhow::Result<(Vec<Option<Handle>>, f64)> {
    let codec = store.codec();
    let mut workspace = codec.workspace();
    let since = Instant::now();
    let mut handles = Vec::with_capacity(pages.len());
    for page in pages {
        handles.push(match codec.stage(page, &mut workspace) {
            Ok(verified) => Some(store.insert(&verified)?),
            Err(_) => None,
        });
    }
    Ok((handles, since.elapsed().as_secs_f64() * 1e6 / pages.len() as f64))
}

/// Loads and compares every page, and says what they take.
fn look(store: &HeapStore, pages: &[Page], handles: &[(usize, Handle)], unfit: usize) -> anyhow::Result<Side> {
    let mut page = [0; PAGE_BYTES];
    let since = Instant::now();
    for &(number, handle) in handles {
        store.load(handle, &mut page)?;
        ensure!(page == pages[number], "page {number} is not what was stored");
    }
    let load_us = since.elapsed().as_secs_f64() * 1e6 / handles.len() as f64;
    let stats = store.stats();
    let frames = stats.frames_used.bytes().0 as f64;
    let taken = frames + stats.metadata.0 as f64 + (unfit * PAGE_BYTES) as f64;
    Ok(Side {
        ratio: ((handles.len() + unfit) * PAGE_BYTES) as f64 / taken,
        waste: stats.class_waste().0 as f64 / frames,
        overhead: (stats.metadata.0 + stats.header.0) as f64 / frames,
        load_us,
    })
}

/// Recompresses every page as the hand and the thread of `spm` do, and moves it first while that is worth it; us a page.
fn densify_all(store: &mut HeapStore, handles: &mut [(usize, Handle)]) -> anyhow::Result<f64> {
    let codec: Codec = store.codec();
    let mut encoder = DenseEncoder::new(&codec);
    let mut dictionaries = Dictionaries::new();
    let (mut samples, mut newest) = (Vec::new(), 0);
    let slot_of = |number: usize| Slot::ALL[number % 2];
    let since = Instant::now();
    for (_, handle) in handles.iter_mut() {
        relocate(store, handle)?;
        let Some(original) = store.original(*handle) else { continue };
        let mut page = [0; PAGE_BYTES];
        let label = original.label;
        if !original.read(&codec, &mut page) {
            continue;
        }
        let slot = (newest > 0).then(|| slot_of(newest));
        let has_room = store.dictionary_pages(slot_of(newest + 1)) == 0;
        let slot = match dictionaries.next(has_room) {
            Way::Plain => None,
            Way::Sample => {
                samples.push(page);
                None
            }
            Way::Train => {
                samples.push(page);
                let next = slot_of(newest + 1);
                let made = train(&core::mem::take(&mut samples)).is_some_and(|bytes| {
                    encoder.set_dictionary(next, &bytes) && store.set_dictionary(next, &bytes)
                });
                newest += usize::from(made);
                dictionaries.note_made(made);
                None
            }
            Way::With => slot,
            Way::Both => {
                let mut bytes = |slot| encoder.encode(&page, slot).map_or(PAGE_BYTES, |dense| dense.bytes.len());
                let (plain, with) = (bytes(None), bytes(slot));
                dictionaries.note_trial(plain, with);
                if with < plain { slot } else { None }
            }
        };
        if let Some(dense) = encoder.encode(&page, slot)
            && let Ok(new) = store.densify(*handle, label, &dense)
        {
            *handle = new;
        }
    }
    Ok(since.elapsed().as_secs_f64() * 1e6 / handles.len() as f64)
}

/// Half of the pages leave, at random, and others come: what a program's phases do to a store.
fn churn(store: &mut HeapStore, pages: &[Page], handles: &mut Vec<(usize, Handle)>) -> anyhow::Result<()> {
    handles.shuffle(&mut SmallRng::seed_from_u64(2));
    for (_, handle) in handles.drain(handles.len() / 2..) {
        store.remove(handle)?;
    }
    let codec = store.codec();
    let mut workspace = codec.workspace();
    for (number, page) in pages[..pages.len() / 8].iter().enumerate() {
        if let Ok(verified) = codec.stage(page, &mut workspace) {
            handles.push((number, store.insert(&verified)?));
        }
    }
    Ok(())
}

/// As the runtime does: while it is worth it, every page is offered a better place.
fn compact(store: &mut HeapStore, handles: &mut [(usize, Handle)]) -> anyhow::Result<()> {
    for _ in 0..COMPACTIONS {
        for (_, handle) in handles.iter_mut() {
            if !relocate(store, handle)? {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Whether it is worth it; then the page is where it lies better.
fn relocate(store: &mut HeapStore, handle: &mut Handle) -> anyhow::Result<bool> {
    let stats = store.stats();
    let is_due = compacts(stats.free_slot, stats.frames_used.bytes());
    if is_due {
        *handle = store.relocate(*handle)?.unwrap_or(*handle);
    }
    Ok(is_due)
}

/// Slots that nobody has, in blocks that others have, as a share of the frames.
fn free_share(stats: &Stats) -> f64 {
    stats.free_slot.0 as f64 / stats.frames_used.bytes().0 as f64
}

impl Row {
    fn to_json(&self) -> serde_json::Value {
        let side = |side: &Side| json!({ "ratio": side.ratio, "waste": side.waste, "overhead": side.overhead, "load_us": side.load_us });
        json!({
            "program": self.name, "pages": self.pages, "zram_ratio": self.zram_ratio, "zram_mb_s": self.zram_mb_s,
            "lz4": side(&self.lz4), "dense": side(&self.dense), "dense_pages": self.dense_pages,
            "dictionary_pages": self.dictionary_pages, "encode_us": self.encode_us, "densify_us": self.densify_us,
            "free_after_churn": self.churned, "free_after_compaction": self.compacted,
        })
    }
}

fn print(rows: &[Row]) {
    let head = [
        "program",
        "pages",
        "zram",
        "lz4",
        "dense",
        "/zram",
        "waste",
        "overhead",
        "with dict",
        "load us",
        "dense",
        "recode us",
        "churned",
        "compacted",
    ];
    let mut table = Table::new(&head);
    let percent = |share: f64| format!("{:.1}%", share * 100.0);
    let mut misses = 0;
    let mut judge = |text: String, is_met: bool| {
        misses += usize::from(!is_met);
        if is_met { text } else { text + "!" }
    };
    for row in rows {
        let gain = row.dense.ratio / row.zram_ratio;
        table.row(vec![
            row.name.into(),
            row.pages.to_string(),
            short(row.zram_ratio),
            short(row.lz4.ratio),
            short(row.dense.ratio),
            judge(short(gain), gain >= GOAL_RATIO),
            judge(percent(row.dense.waste), row.dense.waste <= GOAL_WASTE),
            judge(percent(row.dense.overhead), row.dense.overhead <= GOAL_OVERHEAD),
            percent(row.dictionary_pages as f64 / row.dense_pages.max(1) as f64),
            short(row.lz4.load_us),
            short(row.dense.load_us),
            short(row.densify_us),
            percent(row.churned),
            percent(row.compacted),
        ]);
    }
    table.print();
    println!("\nzram, lz4, dense: bytes of pages a byte of RAM, pages that do not compress and metadata included");
    println!(
        "bars: dense/zram >= {GOAL_RATIO}, waste by classes <= {}, headers and metadata <= {}; !: missed",
        percent(GOAL_WASTE),
        percent(GOAL_OVERHEAD)
    );
    println!(
        "churned, compacted: free slots, share of the frames, after half of the pages left and an eighth came; {misses} bars missed"
    );
}
