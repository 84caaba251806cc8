//! Which pages are there: /proc/PID/pagemap and its `PAGEMAP_SCAN` (6.7+; Documentation/admin-guide/mm/pagemap.rst).

use crate::fd::Fd;
use crate::{Errno, PAGE, Result};
use syscalls::{Sysno, syscall};

/// Most runs one scan returns.
pub const RUNS: usize = 128;

/// A run of pages that are present and hold data of their own (not the shared zero page).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// First address.
    pub start: u64,
    /// First address behind.
    pub end: u64,
    categories: u64,
}

const IS_PRESENT: u64 = 1 << 3;
/// Also what has failed: it has an entry as a swapped page has (include/linux/swapops.h).
const IS_SWAPPED: u64 = 1 << 4;
const IS_ZERO: u64 = 1 << 5;
const IS_HUGE: u64 = 1 << 6;
const IS_FILE: u64 = 1 << 2;
/// 7.3+: not protected by UFFDIO_RWPROTECT.
const IS_ACCESSED: u64 = 1 << 9;

impl Run {
    /// Mapped as (part of) a transparent huge page.
    pub fn is_huge(&self) -> bool {
        self.categories & IS_HUGE != 0
    }
}

#[repr(C)]
#[derive(Default)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<ScanArgs>() == 96);
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u32 = 0xc060_6610;

/// An open pagemap of one address space.
#[derive(Debug)]
pub struct Pagemap(Fd);

impl Pagemap {
    /// Opens the pagemap of the calling thread's process. It stays bound to this address space.
    ///
    /// # Errors
    /// As open(2).
    pub fn open() -> Result<Self> {
        Fd::open_in_proc(c"/proc/thread-self/pagemap").map(Self)
    }

    /// Gives up ownership without closing.
    pub fn into_raw(self) -> i32 {
        self.0.into_raw()
    }

    /// Takes ownership of an open pagemap.
    pub fn from_raw(raw: i32) -> Self {
        Self(Fd::from_raw(raw))
    }

    /// Writes the runs of present anonymous pages in a range to `runs`, until it is full or has `max_pages` pages. How
    /// many runs there are, and the address up to which it looked. The kernel goes on through one long run until it
    /// ends: who wants few pages should say so.
    ///
    /// # Errors
    /// As ioctl(2).
    pub fn scan(
        &self,
        start: usize,
        end: usize,
        max_pages: usize,
        runs: &mut [Run; RUNS],
    ) -> Result<(usize, usize)> {
        let category_mask = IS_PRESENT | IS_ZERO | IS_FILE;
        let args = ScanArgs { category_inverted: IS_ZERO | IS_FILE, category_mask, ..Default::default() };
        self.scan_by(start..end, max_pages, args, runs)
    }

    /// As [`Pagemap::scan`], the runs of present pages that were accessed since [`crate::uffd::Uffd::begin_tracking`]. What was
    /// never tracked counts as accessed.
    ///
    /// # Errors
    /// As ioctl(2): `EINVAL` for a kernel that cannot tell (before 7.3).
    pub fn scan_accessed(
        &self,
        start: usize,
        end: usize,
        max_pages: usize,
        runs: &mut [Run; RUNS],
    ) -> Result<(usize, usize)> {
        let args = ScanArgs { category_mask: IS_PRESENT | IS_ACCESSED, ..Default::default() };
        self.scan_by(start..end, max_pages, args, runs)
    }

    /// As [`Pagemap::scan`], the runs of pages that are in the kernel's swap or whose memory has failed.
    ///
    /// # Errors
    /// As ioctl(2).
    pub fn scan_gone(&self, start: usize, end: usize, runs: &mut [Run; RUNS]) -> Result<usize> {
        let args = ScanArgs { category_mask: IS_SWAPPED, ..Default::default() };
        self.scan_by(start..end, usize::MAX, args, runs).map(|(count, _)| count)
    }

    fn scan_by(
        &self,
        range: core::ops::Range<usize>,
        max_pages: usize,
        categories: ScanArgs,
        runs: &mut [Run; RUNS],
    ) -> Result<(usize, usize)> {
        let mut args = ScanArgs {
            size: 96,
            start: range.start as u64,
            end: range.end as u64,
            vec: runs.as_mut_ptr().expose_provenance() as u64,
            vec_len: RUNS as u64,
            max_pages: max_pages as u64,
            return_mask: IS_HUGE,
            ..categories
        };
        // SAFETY: the kernel writes at most `vec_len` runs and the args.
        let count = unsafe { syscall!(Sysno::ioctl, self.0.raw(), PAGEMAP_SCAN, core::ptr::from_mut(&mut args)) }?;
        Ok((count, (args.walk_end as usize).clamp(range.start, range.end)))
    }

    /// Whether there is a page at `address`: present, being migrated, or in swap space.
    ///
    /// # Errors
    /// As ioctl(2).
    pub fn is_there(&self, address: usize) -> Result<bool> {
        let page = address & !(PAGE - 1);
        let mut runs = [Run::default(); RUNS];
        let args = ScanArgs { category_anyof_mask: IS_PRESENT | IS_SWAPPED, ..Default::default() };
        self.scan_by(page..page + PAGE, 1, args, &mut runs).map(|(count, _)| count > 0)
    }

    /// Whether the page of `address` is present and mapped by no other process.
    ///
    /// # Errors
    /// As read(2).
    pub fn is_exclusive(&self, address: usize) -> Result<bool> {
        let word = self.read(address)?;
        Ok(word >> 63 != 0 && word >> 56 & 1 != 0)
    }

    fn read(&self, address: usize) -> Result<u64> {
        let mut word = [0_u8; 8];
        let got = self.0.read_at(&mut word, (address / PAGE * 8) as u64)?;
        if got == 8 { Ok(u64::from_ne_bytes(word)) } else { Err(Errno::EINVAL) }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::mapping::Mapping;

    #[test]
    fn a_scan_finds_exactly_the_pages_written() {
        let pagemap = Pagemap::open().expect("pagemap");
        let mut mapping = Mapping::new(16 * PAGE, c"spmem test").expect("mmap");
        // Another test that forks would make the pages shared.
        mapping.keep_from_children().expect("madvise");
        let mut runs = [Run::default(); RUNS];
        mapping.bytes_mut(2 * PAGE, 3 * PAGE).fill(1);
        mapping.bytes_mut(9 * PAGE, 1).fill(1);
        let _ = core::hint::black_box(mapping.bytes(12 * PAGE, 1)[0]);
        let start = mapping.start();
        let end = start + 16 * PAGE;
        let (count, looked) = pagemap.scan(start, end, usize::MAX, &mut runs).expect("PAGEMAP_SCAN");
        let found: [_; 2] = [0, 1].map(|i: usize| (runs[i].start as usize - start, runs[i].end as usize - start));
        assert_eq!((count, found, looked), (2, [(2 * PAGE, 5 * PAGE), (9 * PAGE, 10 * PAGE)], end));
        assert_eq!(pagemap.is_exclusive(start + 2 * PAGE), Ok(true));
        assert_eq!(pagemap.is_there(start), Ok(false));
    }

    #[test]
    fn scans_that_stop_at_a_number_of_pages_find_each_page_once() {
        let pagemap = Pagemap::open().expect("pagemap");
        let len = 2048;
        let mut mapping = Mapping::new(len * PAGE, c"spmem test").expect("mmap");
        let is_written = |page: usize| page < 700 || page.is_multiple_of(3);
        for page in (0..len).filter(|&page| is_written(page)) {
            mapping.bytes_mut(page * PAGE, 1).fill(1);
        }
        let (start, end) = (mapping.start(), mapping.start() + len * PAGE);
        for max_pages in [1, 7, 64, 1000] {
            let (mut at, mut runs, mut found) = (start, [Run::default(); RUNS], std::vec![0; len]);
            while at < end {
                let (count, looked) = pagemap.scan(at, end, max_pages, &mut runs).expect("PAGEMAP_SCAN");
                let pages =
                    runs[..count].iter().flat_map(|run| (run.start as usize..run.end as usize).step_by(PAGE));
                let pages: std::vec::Vec<_> = pages.map(|page| (page - start) / PAGE).collect();
                assert!(pages.len() <= max_pages && looked > at, "{max_pages}: {at:#x} to {looked:#x}");
                assert!(pages.iter().all(|&page| (at..looked).contains(&(start + page * PAGE))));
                pages.into_iter().for_each(|page| found[page] += 1);
                at = looked;
            }
            assert!((0..len).all(|page| found[page] == usize::from(is_written(page))), "{max_pages}");
        }
    }
}
