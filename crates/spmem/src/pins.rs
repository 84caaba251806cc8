//! What never leaves: ranges that agent threads or the kernel must find in place, and the control blocks of threads.
//!
//! A pin and a sweep that is under way are kept apart by [`Runtime::pin`]'s protocol with `leaving`. No lock.

#![allow(unsafe_code, reason = "reads what is pinned")]

use core::sync::atomic::{AtomicU64, Ordering};

use spmem_sys::{PAGE, mapping, process, thread};

use crate::runtime::{MAX_PINS, Runtime};

/// Addresses, in the order in which they were pinned. There before [`Runtime::attach`]: constructors of other objects
/// may run first.
static PINS: [AtomicU64; MAX_PINS] = [const { AtomicU64::new(0) }; MAX_PINS];

/// Some of them, where they are found at once: a mutex may be locked again and again.
static RECENT: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];

impl Runtime {
    /// Never lets pages of this range leave. For memory that agent threads or the kernel must find in place. Takes no lock.
    ///
    /// A range that touches a known one widens it. Once there is no room for another, the nearest one is widened over
    /// what lies between: more stays than was asked for, never less.
    pub fn exclude(&self, start: usize, end: usize) {
        let start = start.max(1);
        if start >= end {
            return;
        }
        if !self.widen(start, end, 0) && !self.add_excluded(start, end) {
            self.widen(start, end, usize::MAX);
        }
        self.wait_for_sweep();
    }

    /// Widens the nearest known range that is at most `reach` bytes away.
    fn widen(&self, start: usize, end: usize, reach: usize) -> bool {
        let mut nearest = None;
        for (index, (from, to)) in self.excluded.iter().enumerate() {
            // An end that is not 0 has its start.
            let to = to.load(Ordering::SeqCst);
            let gap = from.load(Ordering::SeqCst).saturating_sub(end).max(start.saturating_sub(to));
            if to != 0 && gap <= reach && nearest.is_none_or(|(least, _)| gap < least) {
                nearest = Some((gap, index));
            }
        }
        let Some((_, index)) = nearest else { return false };
        let (from, to) = &self.excluded[index];
        from.fetch_min(start, Ordering::SeqCst);
        to.fetch_max(end, Ordering::SeqCst);
        true
    }

    fn add_excluded(&self, start: usize, end: usize) -> bool {
        for (from, to) in &self.excluded {
            if from.compare_exchange(0, start, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
                to.store(end, Ordering::SeqCst);
                return true;
            }
        }
        false
    }

    /// Waits until no sweep is under way that began before what never leaves was written down (SeqCst, as `leaving`:
    /// either the sweep sees that, or we see the sweep).
    fn wait_for_sweep(&self) {
        let sweep = self.leaving.load(Ordering::SeqCst);
        if sweep % 2 == 1 {
            while self.leaving.load(Ordering::SeqCst) == sweep {
                process::sleep_ns(20_000);
            }
        }
    }

    /// The first range that never leaves and overlaps `[start, end)`: its bounds. Ours count.
    pub(crate) fn excluded_in(&self, start: usize, end: usize) -> Option<(usize, usize)> {
        self.listed_in(start, end).chain(mapping::own_in(start, end)).min()
    }

    fn listed_in(&self, start: usize, end: usize) -> impl Iterator<Item = (usize, usize)> {
        self.excluded
            .iter()
            .map(|(from, to)| (to.load(Ordering::SeqCst), from))
            .filter(move |&(to, from)| to > start && from.load(Ordering::SeqCst) < end)
            .map(|(to, from)| (from.load(Ordering::SeqCst), to))
    }

    /// Never lets the calling thread's control block leave: the kernel clears the thread id in it when the thread
    /// exits, a fault that userfaultfd does not serve (fs/userfaultfd.c, `PF_EXITING`), and pthread_join(3) would wait
    /// for ever. Called by each thread when it starts.
    pub fn pin_thread(&self) {
        self.pin(thread::control_block());
    }

    /// Never lets the page of `block`, its neighbours included, leave: the kernel or a dying thread touches it where
    /// faults are not served. Called by program threads; takes no lock. The memory stays mapped while this runs.
    pub fn pin(&self, block: usize) {
        if block == 0 {
            return;
        }
        let recent = &RECENT[((block / align_of::<u64>()) ^ (block / PAGE)) % RECENT.len()];
        if recent.load(Ordering::Relaxed) == block as u64 {
            return;
        }
        let is_known = self.pins().any(|pin| pin.load(Ordering::Relaxed) == block as u64);
        if !is_known {
            let index = self.pin_count.fetch_add(1, Ordering::Relaxed);
            // Without a place for it everything stays.
            if let Some(pin) = PINS.get(index) {
                pin.store(block as u64, Ordering::SeqCst);
            }
        }
        // Whoever made it known may still wait for this.
        self.wait_for_sweep();
        // Bring back what may have left in between.
        // SAFETY: mapped, says the caller.
        unsafe { core::ptr::with_exposed_provenance::<u8>(block).read_volatile() };
        recent.store(block as u64, Ordering::Relaxed);
    }

    /// The first range within `[start, end)` that never leaves, or that belongs to a thread's control block or to the
    /// static thread-local storage just below one. With more threads than can be told apart, everything does.
    pub(crate) fn pinned_in(&self, start: usize, end: usize) -> Option<(usize, usize)> {
        if self.pin_count.load(Ordering::SeqCst) > MAX_PINS {
            return Some((start, end));
        }
        self.pins()
            .map(|pin| usize::try_from(pin.load(Ordering::SeqCst)).unwrap_or(0) & !(PAGE - 1))
            .map(|page| (page.saturating_sub(PAGE), page + 2 * PAGE))
            .filter(|&(from, to)| to > start && from < end)
            .chain(self.listed_in(start, end))
            .min()
    }

    fn pins(&self) -> impl Iterator<Item = &'static AtomicU64> {
        PINS[..self.pin_count.load(Ordering::SeqCst).min(MAX_PINS)].iter()
    }
}
