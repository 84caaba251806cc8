//! What never leaves: ranges that agent threads or the kernel must find in place, and the control blocks of threads.
//!
//! A pin and a sweep that is under way are kept apart by [`Runtime::pin`]'s protocol with `leaving`. No lock.

#![allow(unsafe_code, reason = "refers to the pins, a mapping that is never unmapped, and reads what is pinned")]

use core::sync::atomic::{AtomicU64, Ordering};

use spmem_sys::{PAGE, mapping, process, thread};

use crate::runtime::{MAX_PINS, Runtime};

impl Runtime {
    /// Never lets pages of this range leave. For memory that agent threads or the kernel must find in place.
    pub fn exclude(&self, start: usize, end: usize) {
        for (from, to) in &self.excluded {
            if to.load(Ordering::Relaxed) == 0 {
                from.store(start, Ordering::Relaxed);
                to.store(end, Ordering::Release);
                return;
            }
        }
    }

    /// The first range that never leaves and overlaps `[start, end)`: its bounds. Ours count.
    pub(crate) fn excluded_in(&self, start: usize, end: usize) -> Option<(usize, usize)> {
        let listed = self
            .excluded
            .iter()
            .map(|(from, to)| (from.load(Ordering::Relaxed), to.load(Ordering::Acquire)))
            .filter(|&(from, to)| to > start && from < end);
        listed.chain(mapping::own_in(start, end)).min()
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
        let known = self.pins().any(|pin| pin.load(Ordering::Relaxed) == block as u64);
        let pins = self.pins.load(Ordering::Acquire);
        if known || pins.is_null() {
            return;
        }
        let index = self.pin_count.fetch_add(1, Ordering::Relaxed);
        if index >= MAX_PINS {
            return;
        }
        // SAFETY: in bounds of a mapping that is never unmapped.
        let pin = unsafe { &*pins.wrapping_add(index) };
        // SeqCst, with `leaving`: either the sweep sees this pin, or we see that a sweep is under way and wait for it.
        pin.store(block as u64, Ordering::SeqCst);
        let sweep = self.leaving.load(Ordering::SeqCst);
        if sweep % 2 == 1 {
            while self.leaving.load(Ordering::SeqCst) == sweep {
                process::sleep_ns(20_000);
            }
        }
        // Bring back what may have left in between.
        // SAFETY: mapped, says the caller.
        unsafe { core::ptr::with_exposed_provenance::<u8>(block).read_volatile() };
    }

    /// The first range within `[start, end)` that belongs to a thread's control block, or to the static thread-local
    /// storage just below one. With more threads than can be told apart, everything does.
    pub(crate) fn pinned_in(&self, start: usize, end: usize) -> Option<(usize, usize)> {
        if self.pin_count.load(Ordering::SeqCst) > MAX_PINS {
            return Some((start, end));
        }
        self.pins()
            .map(|pin| usize::try_from(pin.load(Ordering::SeqCst)).unwrap_or(0) & !(PAGE - 1))
            .map(|page| (page.saturating_sub(PAGE), page + 2 * PAGE))
            .filter(|&(from, to)| to > start && from < end)
            .min()
    }

    fn pins(&self) -> impl Iterator<Item = &'static AtomicU64> {
        let pins = self.pins.load(Ordering::Acquire);
        let count = if pins.is_null() { 0 } else { self.pin_count.load(Ordering::SeqCst).min(MAX_PINS) };
        // SAFETY: in bounds of a mapping that is never unmapped and only holds atomics.
        (0..count).map(move |index| unsafe { &*pins.wrapping_add(index) })
    }
}
