//! Idle page tracking: /sys/kernel/mm/page_idle/bitmap (Documentation/admin-guide/mm/idle_page_tracking.rst). A bit a page frame;
//! setting it marks the page idle, and it is clear again once the page was accessed.
//!
//! Frames of a process are read from its pagemap at every look, because pages move. A huge page has one bit, its first
//! frame's: /proc/kpageflags says where that is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::vec::Vec;
use std::{format, vec};

use spmem_core::heat::{Accessed, Lack, Source};
use spmem_sys::PAGE;

use super::{HeatError, HeatSource, push_page};

const BITMAP: &str = "sys/kernel/mm/page_idle/bitmap";
const FLAGS: &str = "proc/kpageflags";
const NEEDS: &str = "CONFIG_IDLE_PAGE_TRACKING";
/// Bits of /proc/PID/pagemap and of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h).
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
const COMPOUND_HEAD: u64 = 1 << 15;
const COMPOUND_TAIL: u64 = 1 << 16;
/// Orders of huge pages, 1 GiB at most.
const ORDERS: u32 = 18;
/// Pages whose entries are read at once.
const BATCH: usize = 4096;

/// The idle bits of one process's pages.
#[derive(Debug)]
pub struct Idle {
    bitmap: Named,
    flags: Named,
    pagemap: Named,
    /// Frames that were marked at the last look.
    marked: BTreeSet<u64>,
}

/// A file, and what it is called.
#[derive(Debug)]
struct Named {
    file: File,
    path: PathBuf,
}

impl Named {
    fn open(path: PathBuf, is_written: bool) -> Result<Self, HeatError> {
        match OpenOptions::new().read(true).write(is_written).open(&path) {
            Ok(file) => Ok(Self { file, path }),
            Err(cause) => Err(HeatError::File { path, cause }),
        }
    }

    fn failed(&self, cause: std::io::Error) -> HeatError {
        HeatError::File { path: self.path.clone(), cause }
    }

    /// `count` words from the one at `index` on.
    fn words(&self, index: u64, count: usize) -> Result<Vec<u64>, HeatError> {
        let mut bytes = vec![0; count * 8];
        self.file.read_exact_at(&mut bytes, index * 8).map_err(|cause| self.failed(cause))?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect())
    }

    fn word(&self, index: u64) -> Result<u64, HeatError> {
        Ok(self.words(index, 1)?.first().copied().unwrap_or_default())
    }
}

impl Idle {
    /// For process `pid` of the kernel under `root`.
    ///
    /// # Errors
    /// A file is not there, or not for this user.
    pub fn open(root: &Path, pid: u32) -> Result<Self, HeatError> {
        Ok(Self {
            bitmap: Named::open(root.join(BITMAP), true)?,
            flags: Named::open(root.join(FLAGS), false)?,
            pagemap: Named::open(root.join(format!("proc/{pid}/pagemap")), false)?,
            marked: BTreeSet::new(),
        })
    }

    /// The frame whose bit speaks for each present page, by address.
    fn frames(&self, ranges: &[Range<usize>]) -> Result<Vec<(usize, u64)>, HeatError> {
        let mut found = Vec::new();
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let count = ((range.end - at) / PAGE).clamp(1, BATCH);
                let entries = self.pagemap.words((at / PAGE) as u64, count)?;
                for (entry, address) in entries.into_iter().zip((at..).step_by(PAGE)) {
                    let frame = entry & FRAME;
                    if entry & PRESENT != 0 && frame != 0 {
                        found.push((address, self.head(frame)?));
                    }
                }
                at += count * PAGE;
            }
        }
        Ok(found)
    }

    /// The first frame of the page that has `frame`.
    fn head(&self, frame: u64) -> Result<u64, HeatError> {
        if self.flags.word(frame)? & COMPOUND_TAIL == 0 {
            return Ok(frame);
        }
        // A page of an order begins at a multiple of its size, and frames of its own lie in between.
        for order in 1..=ORDERS {
            let first = frame >> order << order;
            if self.flags.word(first)? & COMPOUND_HEAD != 0 {
                return Ok(first);
            }
        }
        Err(HeatError::Nonsense { what: "a part of a huge page without its first frame" })
    }

    /// Which of the frames are idle still.
    fn idle(&self, frames: &BTreeSet<u64>) -> Result<BTreeSet<u64>, HeatError> {
        let mut words: BTreeMap<u64, u64> = BTreeMap::new();
        for frame in frames {
            if let std::collections::btree_map::Entry::Vacant(place) = words.entry(frame / 64) {
                place.insert(self.bitmap.word(frame / 64)?);
            }
        }
        let is_idle = |frame: &&u64| words.get(&(*frame / 64)).is_some_and(|word| word >> (*frame % 64) & 1 == 1);
        Ok(frames.iter().filter(is_idle).copied().collect())
    }

    fn mark(&self, frames: &BTreeSet<u64>) -> Result<(), HeatError> {
        let mut words: BTreeMap<u64, u64> = BTreeMap::new();
        for frame in frames {
            *words.entry(frame / 64).or_default() |= 1 << (frame % 64);
        }
        for (index, word) in words {
            let bytes = word.to_ne_bytes();
            self.bitmap.file.write_all_at(&bytes, index * 8).map_err(|cause| self.bitmap.failed(cause))?;
        }
        Ok(())
    }
}

impl HeatSource for Idle {
    fn source(&self) -> Source {
        Source::Idle
    }

    fn look(&mut self, ranges: &[Range<usize>]) -> Result<Vec<Accessed>, HeatError> {
        let pages = self.frames(ranges)?;
        let frames: BTreeSet<u64> = pages.iter().map(|&(_, frame)| frame).collect();
        let asked: BTreeSet<u64> = frames.intersection(&self.marked).copied().collect();
        let idle = self.idle(&asked)?;
        let mut found = Vec::new();
        for (address, frame) in pages {
            if asked.contains(&frame) && !idle.contains(&frame) {
                push_page(&mut found, address, address + PAGE);
            }
        }
        self.mark(&frames)?;
        // What the kernel does not mark, because it is on no list of its own, would look used for ever.
        self.marked = self.idle(&frames)?;
        Ok(found)
    }
}

/// Why this process cannot have it.
pub(super) fn lack(root: &Path) -> Option<Lack> {
    match OpenOptions::new().read(true).write(true).open(root.join(BITMAP)) {
        Ok(_) => None,
        Err(error) if error.kind() == ErrorKind::NotFound => Some(Lack::Kernel { needs: NEEDS }),
        Err(_) => Some(Lack::Forbidden { needs: "root" }),
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "the frames of a test are few")]
mod tests {
    use super::*;
    use std::fs;

    const FRAMES: u64 = 1024;
    const PID: u32 = 7;
    const START: usize = 16 * PAGE;

    /// A tree with the three files: pages of the process at [`START`], by frame.
    fn tree(frames: &[u64], huge: Range<u64>) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for directory in [format!("proc/{PID}"), "sys/kernel/mm/page_idle".into()] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        let write = |path: &str, words: Vec<u64>| {
            let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_ne_bytes).collect();
            fs::write(root.path().join(path), bytes).unwrap();
        };
        let mut entries = vec![0; START / PAGE];
        entries.extend(frames.iter().map(|&frame| if frame == 0 { 0 } else { PRESENT | frame }));
        write(&format!("proc/{PID}/pagemap"), entries);
        let flag = |frame: u64| match frame {
            frame if frame == huge.start && !huge.is_empty() => COMPOUND_HEAD,
            frame if huge.contains(&frame) => COMPOUND_TAIL,
            _ => 0,
        };
        write(FLAGS, (0..FRAMES).map(flag).collect());
        write(BITMAP, vec![0; (FRAMES / 64) as usize]);
        root
    }

    /// The page of a frame is accessed.
    fn access(root: &Path, frame: u64) {
        let mut words = fs::read(root.join(BITMAP)).unwrap();
        words[(frame / 8) as usize] &= !(1 << (frame % 8));
        fs::write(root.join(BITMAP), words).unwrap();
    }

    fn pages(found: &[Accessed]) -> Vec<usize> {
        let of = |one: &Accessed| ((one.start - START) / PAGE)..((one.end - START) / PAGE);
        found.iter().flat_map(of).collect()
    }

    #[test]
    fn pages_whose_bit_was_cleared_are_told_once_and_missing_ones_never() {
        let root = tree(&[100, 0, 200, 201, 63, 64], 0..0);
        let range = START..START + 6 * PAGE;
        let mut idle = Idle::open(root.path(), PID).unwrap();
        assert_eq!(pages(&idle.look(std::slice::from_ref(&range)).unwrap()), [0_usize; 0]);
        for frame in [100, 201, 64] {
            access(root.path(), frame);
        }
        access(root.path(), 300);
        assert_eq!(pages(&idle.look(std::slice::from_ref(&range)).unwrap()), [0, 3, 5]);
        assert_eq!(pages(&idle.look(std::slice::from_ref(&range)).unwrap()), [0_usize; 0]);
        let set: Vec<u64> = (0..FRAMES)
            .filter(|frame| {
                fs::read(root.path().join(BITMAP)).unwrap()[(frame / 8) as usize] >> (frame % 8) & 1 == 1
            })
            .collect();
        assert_eq!(set, [63, 64, 100, 200, 201], "nobody else's page is marked");
    }

    #[test]
    fn pages_of_a_huge_page_are_used_when_its_first_frame_is() {
        let root = tree(&[512, 513, 1000], 512..520);
        let range = START..START + 3 * PAGE;
        let mut idle = Idle::open(root.path(), PID).unwrap();
        idle.look(std::slice::from_ref(&range)).unwrap();
        access(root.path(), 513);
        assert_eq!(pages(&idle.look(std::slice::from_ref(&range)).unwrap()), [0_usize; 0]);
        access(root.path(), 512);
        assert_eq!(pages(&idle.look(std::slice::from_ref(&range)).unwrap()), [0, 1]);
    }

    #[test]
    fn a_page_that_came_to_another_frame_begins_anew() {
        let root = tree(&[100, 200], 0..0);
        let range = START..START + 2 * PAGE;
        let mut idle = Idle::open(root.path(), PID).unwrap();
        idle.look(std::slice::from_ref(&range)).unwrap();
        let mut entries = fs::read(root.path().join(format!("proc/{PID}/pagemap"))).unwrap();
        entries[START / PAGE * 8..][..8].copy_from_slice(&(PRESENT | 300).to_ne_bytes());
        fs::write(root.path().join(format!("proc/{PID}/pagemap")), entries).unwrap();
        let mut idle = Idle { marked: idle.marked, ..Idle::open(root.path(), PID).unwrap() };
        assert_eq!(pages(&idle.look(std::slice::from_ref(&range)).unwrap()), [0_usize; 0]);
        access(root.path(), 300);
        assert_eq!(pages(&idle.look(&[range]).unwrap()), [0]);
    }

    #[test]
    fn a_kernel_without_it_is_said_to_be() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(lack(root.path()), Some(Lack::Kernel { needs: NEEDS }));
        assert_eq!(lack(tree(&[1], 0..0).path()), None);
    }
}
