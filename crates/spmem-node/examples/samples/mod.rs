//! Pages of realistic data, made or read on this machine.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use spmem_node::{PAGE_BYTES, Page};

/// Pages of one kind.
pub struct Sample {
    /// What they are.
    pub name: &'static str,
    /// The pages.
    pub pages: Vec<Page>,
}

/// A small deterministic generator (xorshift), so that runs can be compared.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }
}

/// Up to `most` pages of each kind that this machine has.
pub fn collect_samples(most: usize) -> Vec<Sample> {
    let mut samples = vec![
        sample("json", most, json(most * PAGE_BYTES)),
        sample("heap", most, heap(most * PAGE_BYTES)),
        sample("floats", most, floats(most * PAGE_BYTES)),
        sample("binaries", most, read_files(&[PathBuf::from("/usr/bin")], "", most * PAGE_BYTES)),
        sample("sources", most, read_files(&library_folders(), "py", most * PAGE_BYTES)),
        sample("bytecode", most, read_files(&library_folders(), "pyc", most * PAGE_BYTES)),
    ];
    samples.retain(|sample| !sample.pages.is_empty());
    samples
}

fn sample(name: &'static str, most: usize, bytes: Vec<u8>) -> Sample {
    let pages = bytes.as_chunks::<PAGE_BYTES>().0.iter().copied().take(most).collect();
    Sample { name, pages }
}

fn json(bytes: usize) -> Vec<u8> {
    let mut random = Random(1);
    let mut text = String::new();
    while text.len() < bytes {
        let (id, user, score) = (random.below(10_000_000), random.below(50_000), random.below(1_000_000));
        let _ = write!(
            text,
            r#"{{"id":{id},"name":"user{user}","email":"user{user}@example.org","score":{}.{:02},"active":{},"tags":["t{}","t{}"]}},"#,
            score / 100,
            score % 100,
            score.is_multiple_of(3),
            random.below(100),
            random.below(100),
        );
    }
    text.into_bytes()
}

/// Objects of a few words as an allocator lays them out: header, pointers near each other, small
/// counts, short strings.
fn heap(bytes: usize) -> Vec<u8> {
    let mut random = Random(2);
    let mut words = Vec::with_capacity(bytes / 8);
    while words.len() * 8 < bytes {
        let base = 0x7f3a_1c00_0000 + random.below(64) * 0x10_0000;
        let (kind, fields) = (random.below(40), 2 + random.below(6));
        words.push(0x21 + fields * 16);
        words.push(0x5581_6a40_0000 + kind * 0x60);
        for _ in 0..fields {
            words.push(match random.below(8) {
                0..3 => base + random.below(0x1_0000) * 16,
                3..5 => 0,
                5 => random.below(1000),
                6 => random.below(1 << 32),
                _ => u64::from_le_bytes(*b"label_00") + (random.below(10) << 56),
            });
        }
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A table with columns: a slow wave, prices of two decimals, counts as doubles, and noise.
fn floats(bytes: usize) -> Vec<u8> {
    let mut random = Random(3);
    let mut column = Vec::with_capacity(bytes / 8);
    let rows = bytes / 8 / 4;
    column.extend(
        (0..rows).map(|i| f64::from(u32::try_from(i % 1_000_000).unwrap_or(0)).mul_add(0.001, 20.0).floor()),
    );
    column.extend((0..rows).map(|_| f64::from(u32::try_from(random.below(100_000)).unwrap_or(0)) / 100.0));
    column.extend((0..rows).map(|_| f64::from(u32::try_from(random.below(50)).unwrap_or(0))));
    column.extend((0..rows).map(|i| (f64::from(u32::try_from(i).unwrap_or(0)) * 0.01).sin()));
    column.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn library_folders() -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir("/usr/lib") else { return Vec::new() };
    let is_python =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3"));
    let roots = entries.flatten().map(|entry| entry.path()).filter(is_python);
    roots
        .flat_map(|root| {
            let inner = ["", "__pycache__", "encodings", "encodings/__pycache__", "email", "email/__pycache__"];
            inner.map(|folder| root.join(folder))
        })
        .collect()
}

/// The bytes of files with that extension in the folders, in order of name.
fn read_files(folders: &[PathBuf], extension: &str, most: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for folder in folders {
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths.iter().filter(|path| has_extension(path, extension)) {
            if bytes.len() >= most {
                return bytes;
            }
            let Ok(file) = std::fs::read(path) else { continue };
            // One large file must not be the whole sample.
            bytes.extend(file.iter().take(most / 16));
        }
    }
    bytes
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.is_file() && path.extension().map_or(extension.is_empty(), |own| own == extension)
}
