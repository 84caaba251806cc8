//! What is to leave next: runs that the policy has let go and that wait for their turn.
//!
//! Where one thread faults and an encoder does the heavy work, the monitor shares the thread's processor
//! ([`crate::follow`]), and the thread waits for as long as it works. So there the sweep only picks short runs, and the
//! handler takes one out after each fault that it has served: a page in, a page out. What becomes of them is its to see to
//! as well, while it keeps pace ([`crate::lanes`]). Long ones, and what no fault takes out, the monitor moves.

use alloc::collections::VecDeque;
use spmem_core::reclaim::AHEAD_PAGES;

/// Runs at a time: what is let go ahead, should no two pages of it lie side by side.
const RUNS: usize = AHEAD_PAGES as usize;
/// Pages that the kernel did not move, remembered at a time.
const BUSY: usize = 4;

/// The list. Allocates nothing after it was made: a fork may be under way.
pub(crate) struct Outgoing {
    /// First address, and the first one behind: registered pages of one chunk.
    runs: VecDeque<(usize, usize)>,
    busy: VecDeque<usize>,
}

impl Outgoing {
    pub(crate) fn new() -> Self {
        Self { runs: VecDeque::with_capacity(RUNS), busy: VecDeque::with_capacity(BUSY) }
    }

    /// Bytes in the list.
    pub(crate) fn bytes(&self) -> usize {
        self.runs.iter().map(|(start, end)| end - start).sum()
    }

    /// Adds a run; whether there was room.
    pub(crate) fn offer(&mut self, start: usize, end: usize) -> bool {
        let has_room = self.runs.len() < RUNS;
        if has_room {
            self.runs.push_back((start, end));
        }
        has_room
    }

    /// The run that has waited longest.
    pub(crate) fn take(&mut self) -> Option<(usize, usize)> {
        self.runs.pop_front()
    }

    /// The kernel would not move a page (EBUSY): the sweep looks at it without the lock. Whether there was room.
    pub(crate) fn note_busy(&mut self, page: usize) -> bool {
        let has_room = !self.is_busy_full();
        if has_room {
            self.busy.push_back(page);
        }
        has_room
    }

    /// Whether no more of those can be remembered.
    pub(crate) fn is_busy_full(&self) -> bool {
        self.busy.len() == BUSY
    }

    /// All of those, one after the other.
    pub(crate) fn take_busy(&mut self) -> [Option<usize>; BUSY] {
        core::array::from_fn(|_| self.busy.pop_front())
    }

    /// A forked child begins anew.
    pub(crate) fn clear(&mut self) {
        self.runs.clear();
        self.busy.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spmem_sys::PAGE;

    #[test]
    fn runs_leave_in_the_order_in_which_they_came_and_none_is_added_beyond_the_room() {
        let mut outgoing = Outgoing::new();
        let room = outgoing.runs.capacity();
        for run in 0..RUNS {
            assert!(outgoing.offer(run * PAGE, (run + 2) * PAGE));
        }
        assert!(!outgoing.offer(0, PAGE));
        assert_eq!(outgoing.bytes(), RUNS * 2 * PAGE);
        assert_eq!((outgoing.take(), outgoing.take()), (Some((0, 2 * PAGE)), Some((PAGE, 3 * PAGE))));
        assert!((0..BUSY).all(|page| outgoing.note_busy(page * PAGE)));
        assert!(outgoing.is_busy_full() && !outgoing.note_busy(0));
        assert_eq!(outgoing.take_busy(), core::array::from_fn(|page| Some(page * PAGE)));
        assert_eq!(outgoing.take_busy(), [None; BUSY]);
        assert_eq!(outgoing.runs.capacity(), room, "nothing was allocated");
        outgoing.clear();
        assert_eq!(outgoing.take(), None);
    }
}
