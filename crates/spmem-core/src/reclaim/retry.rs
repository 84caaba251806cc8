//! Retry: which of the pages that could not leave are tried again, and when.
//!
//! What is pinned for I/O, shared since a fork or does not compress mostly stays so. All of it tried in each round of the
//! clock hand would take a processor, so a round tries one part, chosen by page number, and the more pages it tried the longer
//! the next part waits. Called by the runtime's sweep and the simulator.

/// Parts, one a round, ...
const PARTS: u64 = 32;
/// ... with so much time after each page tried, ns: a page that stays costs about a tenth of it, ...
const PAUSE_NS: u64 = 150_000;
/// ... and at least so much after each part.
const PAUSE_MIN_NS: u64 = 10_000_000;

/// Where the second attempts are.
#[derive(Clone, Debug, Default)]
pub struct Retry {
    /// The part that was tried last, or is.
    part: u64,
    is_on: bool,
    /// Pages tried in this round.
    tried: u64,
    /// When the next part may be tried, ns.
    next_ns: u64,
}

impl Retry {
    /// The hand begins a round.
    pub fn begin_round(&mut self, now_ns: u64) {
        if self.is_on {
            self.next_ns = now_ns.saturating_add((self.tried.saturating_mul(PAUSE_NS)).max(PAUSE_MIN_NS));
        }
        self.tried = 0;
        self.is_on = now_ns >= self.next_ns;
        self.part = self.part.wrapping_add(u64::from(self.is_on));
    }

    /// Whether it is a page's turn in this round. Pages go by number.
    ///
    /// ```
    /// use spmem_core::reclaim::Retry;
    /// let mut retry = Retry::default();
    /// retry.begin_round(0);
    /// assert_eq!((0..64).filter(|&page| retry.is_turn(page)).count(), 2);
    /// retry.begin_round(1);
    /// assert_eq!((0..64).filter(|&page| retry.is_turn(page)).count(), 0, "too soon");
    /// ```
    pub fn is_turn(&mut self, page: u64) -> bool {
        let is_turn = self.is_on && page.wrapping_add(self.part).is_multiple_of(PARTS);
        self.tried += u64::from(is_turn);
        is_turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn every_page_has_its_turn_once_in_so_many_rounds_that_try() {
        let mut retry = Retry::default();
        let mut turns = vec![0; 100];
        let mut now = 0;
        for _ in 0..PARTS {
            retry.begin_round(now);
            assert!(retry.is_on);
            (0..).zip(&mut turns).for_each(|(page, turns)| *turns += u32::from(retry.is_turn(page)));
            // This round only ends the part that was on.
            retry.begin_round(now);
            now = retry.next_ns;
        }
        assert!(turns.iter().all(|&turns| turns == 1), "{turns:?}");
    }

    #[test]
    fn many_pages_that_stay_are_tried_less_often() {
        let mut retry = Retry::default();
        let pause_after = |retry: &mut Retry, pages: u64| {
            let now = retry.next_ns;
            retry.begin_round(now);
            (0..pages * PARTS).for_each(|page| {
                retry.is_turn(page);
            });
            retry.begin_round(now);
            retry.next_ns - now
        };
        assert_eq!(pause_after(&mut retry, 1), PAUSE_MIN_NS);
        assert_eq!(pause_after(&mut retry, 1000), 1000 * PAUSE_NS);
    }
}
