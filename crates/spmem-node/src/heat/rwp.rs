//! Accesses to pages of this process, by userfaultfd's RWP_ASYNC (7.3+): the kernel itself lets a protected page go at its first
//! access, and `PAGEMAP_SCAN` lists those that it let go.

use std::ops::Range;
use std::vec::Vec;

use spmem_core::heat::{Accessed, Lack, Source};
use spmem_sys::Errno;
use spmem_sys::pagemap::{Pagemap, RUNS, Run};
use spmem_sys::uffd::{Uffd, Watch, feature};

use super::{HeatError, HeatSource, push_page};

/// Tracks ranges of the process that made it.
#[derive(Debug)]
pub struct Rwp {
    uffd: Uffd,
    pagemap: Pagemap,
    /// As they were at the last look.
    ranges: Vec<Range<usize>>,
}

impl Rwp {
    /// For the calling process.
    ///
    /// # Errors
    /// No userfaultfd with the features, no pagemap.
    pub fn open() -> Result<Self, HeatError> {
        let uffd = Uffd::new().map_err(|cause| HeatError::Call { doing: "making a userfaultfd", cause })?;
        uffd.enable(feature::TRACKED)
            .map_err(|cause| HeatError::Call { doing: "asking userfaultfd for RWP_ASYNC", cause })?;
        let pagemap = Pagemap::open().map_err(|cause| HeatError::Call { doing: "opening the pagemap", cause })?;
        Ok(Self { uffd, pagemap, ranges: Vec::new() })
    }

    fn begin(&self, range: &Range<usize>) -> Result<(), HeatError> {
        let doing = "protecting pages from accesses";
        self.uffd.begin_tracking(range.start, range.len()).map_err(|cause| HeatError::Call { doing, cause })
    }

    #[allow(clippy::cast_possible_truncation, reason = "addresses of this process, on x86-64 only")]
    fn scan(&self, range: &Range<usize>, found: &mut Vec<Accessed>) -> Result<(), HeatError> {
        let (mut at, mut runs) = (range.start, [Run::default(); RUNS]);
        while at < range.end {
            let (count, looked) = self
                .pagemap
                .scan_accessed(at, range.end, usize::MAX, &mut runs)
                .map_err(|cause| HeatError::Call { doing: "scanning for accessed pages", cause })?;
            for run in &runs[..count] {
                push_page(found, run.start as usize, run.end as usize);
            }
            if looked <= at {
                return Err(HeatError::Nonsense { what: "a scan that does not go on" });
            }
            at = looked;
        }
        Ok(())
    }
}

impl HeatSource for Rwp {
    fn source(&self) -> Source {
        Source::Rwp
    }

    fn look(&mut self, ranges: &[Range<usize>]) -> Result<Vec<Accessed>, HeatError> {
        let mut found = Vec::new();
        for range in ranges {
            if self.ranges.contains(range) {
                // An access between the scan and the protection is not told by this look; it is by no other either. Protecting
                // while scanning would take a scan that can do both, as it can for writes (PM_SCAN_WP_MATCHING).
                self.scan(range, &mut found)?;
            } else {
                let doing = "registering pages for tracking";
                self.uffd
                    .register_for(range.start, range.len(), Watch::Tracked)
                    .map_err(|cause| HeatError::Call { doing, cause })?;
            }
            self.begin(range)?;
        }
        self.ranges = ranges.to_vec();
        Ok(found)
    }
}

/// Why this process cannot have it.
pub(super) fn lack() -> Option<Lack> {
    const NEEDS: &str = "userfaultfd with RWP_ASYNC, Linux 7.3";
    const RIGHT: &str = "root, CAP_SYS_PTRACE or access to /dev/userfaultfd";
    let supported = Uffd::new().and_then(|uffd| uffd.enable(0));
    match supported {
        Ok(bits) if bits & feature::TRACKED == feature::TRACKED => None,
        Ok(_) => Some(Lack::Kernel { needs: NEEDS }),
        Err(Errno::EPERM | Errno::EACCES) => Some(Lack::Forbidden { needs: RIGHT }),
        Err(_) => Some(Lack::Kernel { needs: NEEDS }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spmem_sys::PAGE;
    use spmem_sys::mapping::Mapping;

    #[test]
    fn reads_and_writes_are_told_once_each_and_no_byte_changes() {
        if let Some(lack) = lack() {
            std::println!("skipped: {lack}");
            return;
        }
        let mut memory = Mapping::new(64 * PAGE, c"spmem test").unwrap();
        (0..64).for_each(|page| memory.bytes_mut(page * PAGE, PAGE).fill(u8::try_from(page).unwrap()));
        let range = memory.start()..memory.start() + 64 * PAGE;
        let mut source = Rwp::open().unwrap();
        assert_eq!(source.look(std::slice::from_ref(&range)).unwrap(), []);
        std::hint::black_box(memory.bytes(3 * PAGE, 1)[0]);
        memory.bytes_mut(9 * PAGE, 2 * PAGE).fill(7);
        let page = |first: usize, count: usize| Accessed {
            start: range.start + first * PAGE,
            end: range.start + (first + count) * PAGE,
            seen: 1,
            samples: 1,
        };
        assert_eq!(source.look(std::slice::from_ref(&range)).unwrap(), [page(3, 1), page(9, 2)]);
        assert_eq!(source.look(std::slice::from_ref(&range)).unwrap(), []);
        for number in 0..64 {
            let expected = if number == 9 || number == 10 { 7 } else { u8::try_from(number).unwrap() };
            assert!(memory.bytes(number * PAGE, PAGE).iter().all(|&byte| byte == expected), "{number}");
        }
    }
}
