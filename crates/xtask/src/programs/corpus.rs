//! Pages of real-looking data for the access program: text and binaries of this machine, and what programs keep in
//! memory (JSON, columns of numbers, linked records).
//!
//! [`prepare`] makes a file of pages once and keeps it; [`measure_ratio`] says how well they compress.
//!
//! Known hole: the pages differ from machine to machine, because the files do; the ratio is printed with each result.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::programs::values;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// From this compressed size on zram stores a page as it is (`huge_class_size` of zsmalloc on x86-64).
const HUGE_CLASS: usize = 3264;
const CORPUS_PAGES: usize = 256 << 8;
const POOL_BYTES: usize = 48 << 20;
const TEXT_DIRS: [&str; 4] = ["/usr/share/doc", "/usr/include", "/usr/lib/python3", "/usr/share/perl"];
const BINARY_DIRS: [&str; 3] = ["/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"];

/// The file with the pages, made when it is not in `cache` yet.
pub(crate) fn prepare(cache: &Path) -> anyhow::Result<PathBuf> {
    let file = cache.join("corpus-1.pages");
    if fs::metadata(&file).is_ok_and(|meta| meta.len() == (CORPUS_PAGES * PAGE) as u64) {
        return Ok(file);
    }
    eprintln!("xtask: collecting {} MiB of pages", CORPUS_PAGES >> 8);
    let text = collect_pool(&TEXT_DIRS, |name| !name.ends_with(".gz") && !name.ends_with(".pyc"));
    let binary = collect_pool(&BINARY_DIRS, |_| true);
    ensure!(text.len() > 64 * PAGE && binary.len() > 64 * PAGE, "this machine has too few files under /usr");
    let scratch = cache.join(format!("corpus-{}.tmp", std::process::id()));
    let mut out =
        BufWriter::new(File::create(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?);
    let mut rng = SmallRng::seed_from_u64(1);
    for number in 0..CORPUS_PAGES {
        let page = match rng.random_range(0..100_u8) {
            0..13 => pool_page(&text, &mut rng),
            13..20 => pool_page(&binary, &mut rng),
            20..47 => json_page(number),
            47..64 => column_page(&mut rng),
            64..92 => record_page(number, &mut rng),
            92..96 => sparse_page(&text, &mut rng),
            _ => (0..PAGE).map(|_| rng.random()).collect(),
        };
        out.write_all(&page)?;
    }
    out.flush()?;
    fs::rename(&scratch, &file)?;
    Ok(file)
}

/// How many times smaller lz4 makes the pages one by one, pages that zram would store as they are counted as such.
pub(crate) fn measure_ratio(file: &Path) -> anyhow::Result<f64> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut out = vec![0; lz4_flex::block::get_maximum_output_size(PAGE)];
    let (mut pages, mut stored) = (0, 0);
    for page in bytes.chunks_exact(PAGE).step_by(8) {
        let size = lz4_flex::block::compress_into(page, &mut out).context("lz4 refused a page")?;
        pages += 1;
        stored += if size >= HUGE_CLASS { PAGE } else { size };
    }
    Ok((pages * PAGE) as f64 / stored as f64)
}

/// Contents of the files below some directories, up to [`POOL_BYTES`] in all.
fn collect_pool(dirs: &[&str], is_wanted: impl Fn(&str) -> bool) -> Vec<u8> {
    let mut pool = Vec::new();
    let share = POOL_BYTES / dirs.len();
    for dir in dirs {
        let end = pool.len() + share;
        let mut stack = vec![PathBuf::from(dir)];
        while let Some(path) = stack.pop().filter(|_| pool.len() < end) {
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            if meta.is_dir() {
                stack.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
            } else if meta.is_file() && is_wanted(&path.to_string_lossy()) {
                // One file gives a sixteenth of a share at most, so that one kind of file does not fill it.
                let take = (share / 16).min(end - pool.len()) as u64;
                if let Ok(input) = File::open(&path) {
                    let _ = input.take(take).read_to_end(&mut pool);
                }
            }
        }
    }
    pool
}

fn pool_page(pool: &[u8], rng: &mut SmallRng) -> Vec<u8> {
    let place = rng.random_range(0..pool.len() / PAGE - 1) * PAGE;
    pool[place..place + PAGE].to_vec()
}

fn json_page(number: usize) -> Vec<u8> {
    let mut page = Vec::with_capacity(2 * PAGE);
    let mut key = number as u32 * 16;
    while page.len() < PAGE {
        values::write_value(key, 0, &mut page);
        key += 1 + u32::from(key % 16 == 6) * 9;
    }
    page.truncate(PAGE);
    page
}

/// A column of a data frame: prices off a list, counts, a sorted category, time stamps, coordinates, or flags.
fn column_page(rng: &mut SmallRng) -> Vec<u8> {
    let kind = rng.random_range(0..6_u8);
    let mut clock = 1_700_000_000_000_u64 + rng.random_range(0..1_000_000_000);
    let mut category = rng.random_range(0..50_u64);
    let words = (0..PAGE / 8).map(|_| match kind {
        0 => (f64::from(rng.random_range(20..200_u32)) * 2.5).to_bits(),
        1 => rng.random_range(0..200),
        2 => {
            category += u64::from(rng.random_ratio(1, 8));
            category
        }
        3 => {
            clock += rng.random_range(1..2000);
            clock
        }
        4 => f64::from(rng.random_range(-180.0..180.0_f32)).to_bits(),
        _ => u64::from(rng.random::<u8>() & 1) | u64::from(rng.random::<u8>() & 1) << 32,
    });
    words.flat_map(u64::to_le_bytes).collect()
}

/// Records of a heap: pointers to near neighbours, small integers, flags, short names.
fn record_page(number: usize, rng: &mut SmallRng) -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE);
    let base = 0x7f3a_4000_0000 + number as u64 * PAGE as u64;
    while page.len() < PAGE {
        let here = base + page.len() as u64;
        let near = here + rng.random_range(1..64_u64) * 64;
        let far = 0x7f3a_4000_0000 + rng.random_range(0..1 << 20_u64) * 64;
        let kind = rng.random_range(0..8_u64);
        for word in
            [0x5581_20c4_7d10 + kind * 40, near, if kind < 5 { 0 } else { far }, kind + 1, 0x0001_0000_0021]
        {
            page.extend(word.to_le_bytes());
        }
        let mut name = values::sample_word(rng).as_bytes().to_vec();
        name.resize(24, 0);
        page.extend(name);
    }
    page.truncate(PAGE);
    page
}

/// A page that is used in part.
fn sparse_page(text: &[u8], rng: &mut SmallRng) -> Vec<u8> {
    let mut page = pool_page(text, rng);
    let used = rng.random_range(0..PAGE / 2);
    page[used..].fill(0);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_pages_compress_like_the_heaps_of_programs() {
        let mut rng = SmallRng::seed_from_u64(1);
        for (kind, low, high) in [(0, 2.2, 3.3), (1, 1.8, 2.8), (2, 2.4, 3.6)] {
            let make = |number: usize| match kind {
                0 => json_page(number),
                1 => column_page(&mut rng),
                _ => record_page(number, &mut rng),
            };
            let pages: Vec<Vec<u8>> = (0..500).map(make).collect();
            let stored: usize = pages.iter().map(|page| lz4_flex::block::compress(page).len().min(PAGE)).sum();
            let ratio = (pages.len() * PAGE) as f64 / stored as f64;
            assert!((low..high).contains(&ratio), "kind {kind}: {ratio:.2}");
        }
    }
}
