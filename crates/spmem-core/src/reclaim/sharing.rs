//! Sharing: how much of what a process counts as its own its relatives count too.
//!
//! Pages that are shared since a fork(2) are resident in each of the processes, so plain counting, which is cheap, counts them
//! several times. Proportional counting walks all page tables: it is done now and then, and between two of them what it
//! found too much is taken off. Called by the runtime's pressure loop.

use crate::units::{Bytes, PAGE_SIZE};

/// How often shared memory is counted exactly, ns.
const COUNT_NS: u64 = 50_000_000;
/// Less than this too much is nothing: the process shares no longer.
const LEAST: Bytes = Bytes(64 * PAGE_SIZE);

/// By how much plain counting exceeds proportional counting, as far as known.
#[derive(Clone, Debug, Default)]
pub struct Sharing {
    excess: Bytes,
    /// When it was counted last, or tried, ns.
    counted_ns: u64,
}

impl Sharing {
    /// Whether a process that shares pages is due to be counted proportionally.
    #[inline]
    pub const fn is_due(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.counted_ns) > COUNT_NS
    }

    /// It was counted, plainly and proportionally (`None`: that failed, so what was known stays). Whether it still shares.
    ///
    /// ```
    /// use spmem_core::{reclaim::Sharing, units::Bytes};
    /// let mut sharing = Sharing::default();
    /// assert!(sharing.is_due(60_000_000) && sharing.note(60_000_000, Bytes::mib(10), Some(Bytes::mib(7))));
    /// assert_eq!(sharing.own(Bytes::mib(12)), Bytes::mib(9));
    /// assert!(!sharing.is_due(110_000_000) && sharing.is_due(110_000_001));
    /// assert!(!sharing.note(120_000_000, Bytes::mib(10), Some(Bytes::mib(10))), "no longer");
    /// assert_eq!(sharing.own(Bytes::mib(12)), Bytes::mib(12));
    /// ```
    pub fn note(&mut self, now_ns: u64, plain: Bytes, proportional: Option<Bytes>) -> bool {
        self.counted_ns = now_ns;
        let Some(proportional) = proportional else { return true };
        self.excess = Bytes(plain.0.saturating_sub(proportional.0));
        let is_shared = self.excess >= LEAST;
        if !is_shared {
            self.excess = Bytes(0);
        }
        is_shared
    }

    /// What a process has that plain counting says has so much.
    #[inline]
    pub const fn own(&self, plain: Bytes) -> Bytes {
        Bytes(plain.0.saturating_sub(self.excess.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_taken_off_until_it_is_counted_anew() {
        let mut sharing = Sharing::default();
        assert_eq!(sharing.own(Bytes(5)), Bytes(5), "nothing is known");
        let plain = Bytes::mib(100);
        assert!(sharing.note(1, plain, Some(Bytes(plain.0 - LEAST.0))));
        assert_eq!(sharing.own(plain).0, plain.0 - LEAST.0);
        assert_eq!(sharing.own(Bytes(1)), Bytes(0), "it may have shrunk since");
    }

    #[test]
    fn a_little_too_much_is_nothing() {
        let mut sharing = Sharing::default();
        let plain = Bytes::mib(100);
        assert!(!sharing.note(1, plain, Some(Bytes(plain.0 - LEAST.0 + 1))));
        assert_eq!(sharing.own(plain), plain);
    }

    #[test]
    fn a_count_that_fails_is_tried_again_later_and_forgets_nothing() {
        let mut sharing = Sharing::default();
        let plain = Bytes::mib(100);
        assert!(sharing.note(1, plain, Some(Bytes::mib(60))));
        assert!(sharing.note(COUNT_NS + 2, plain, None));
        assert_eq!(sharing.own(plain), Bytes::mib(60));
        assert!(!sharing.is_due(2 * COUNT_NS + 2) && sharing.is_due(2 * COUNT_NS + 3));
    }

    #[test]
    fn more_proportionally_than_plainly_is_no_sharing() {
        let mut sharing = Sharing::default();
        assert!(!sharing.note(1, Bytes::mib(1), Some(Bytes::mib(2))));
        assert_eq!(sharing.own(Bytes::mib(1)), Bytes::mib(1));
    }
}
