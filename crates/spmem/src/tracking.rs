//! Tracking: which placed pages are used, by the kernel's word (userfaultfd's RWP_ASYNC, Linux 7.3), where the run has it.
//!
//! At each look some more placed pages count as not accessed from then on. One that was accessed by a later look comes up, in its place,
//! if core's [`Promotion`] says so. Nothing is taken out to see whether it is wanted (a trial, [`crate::place`]), and no thread waits.
//! What the kernel tells is a hint: contents depend on none of it, and a page that something else let go is believed to be used.

use core::mem::ManuallyDrop;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use spmem_core::placing::{LOOK_PAGES, MAX_TARGETS, PROMOTION_RATE, WATCHED_LOOKS};
use spmem_core::tier::{Promotion, Verdict};
use spmem_core::units::{Order, Time};
use spmem_sys::fd::Fd;
use spmem_sys::pagemap::{Pagemap, RUNS, Run};
use spmem_sys::uffd::Uffd;
use spmem_sys::{PAGE, clock};

use crate::place::raise;
use crate::runtime::Runtime;

/// Pages that are watched since the same look; 0 is none.
#[derive(Clone, Copy)]
struct Watched {
    pages: [usize; LOOK_PAGES],
    since_ns: u64,
}

/// The pages that are watched.
pub(crate) struct Tracker {
    uffd: ManuallyDrop<Uffd>,
    pagemap: ManuallyDrop<Pagemap>,
    promotion: Promotion,
    watched: [Watched; WATCHED_LOOKS],
    /// Those that are watched for longest.
    oldest: usize,
}

impl Tracker {
    /// `None` where pages are tried out instead.
    pub(crate) fn new(runtime: &Runtime) -> Option<Self> {
        if !runtime.is_tracked.load(Relaxed) {
            return None;
        }
        Some(Self {
            uffd: ManuallyDrop::new(Uffd::from_fd(Fd::from_raw(runtime.uffd.load(Acquire)))),
            pagemap: runtime.shared_pagemap()?,
            promotion: Promotion::new(PROMOTION_RATE, Time(clock::now_ns())),
            watched: [Watched { pages: [0; LOOK_PAGES], since_ns: 0 }; WATCHED_LOOKS],
            oldest: 0,
        })
    }

    /// Has pages that were used moved to ordinary memory, as far as there is room.
    pub(crate) fn raise_used(&mut self, runtime: &Runtime) {
        let (mut used, mut count) = ([0; LOOK_PAGES], 0);
        let room = usize::try_from(runtime.room_pages.load(Relaxed)).unwrap_or(0).min(LOOK_PAGES);
        for number in 0..WATCHED_LOOKS {
            let batch = (self.oldest + number) % WATCHED_LOOKS;
            let mut first = 0;
            while first < LOOK_PAGES && count < room {
                let pages = &self.watched[batch].pages;
                let start = pages[first];
                let follows = |at: &usize| start != 0 && pages[*at] == start + (at - first) * PAGE;
                let len = 1 + (first + 1..LOOK_PAGES).take_while(follows).count();
                if start != 0 {
                    self.take_used(batch, first, len, &mut used[..room], &mut count);
                }
                first += len;
            }
        }
        let Some(space) = &mut *runtime.space.lock() else { return };
        if !space.is_settled() {
            return;
        }
        for target in 0..MAX_TARGETS {
            let (mut pages, mut len) = ([0; LOOK_PAGES], 0);
            for &page in &used[..count] {
                if space.table.get(page).target() == Some(target) && runtime.pinned_in(page, page + PAGE).is_none()
                {
                    pages[len] = page;
                    len += 1;
                }
            }
            if len > 0 {
                raise(runtime, space, target, &pages[..len]);
            }
        }
    }

    /// Of `len` neighbours in a batch, those that were used are watched no longer, and those that come up are added to `used`.
    fn take_used(&mut self, batch: usize, first: usize, len: usize, used: &mut [usize], count: &mut usize) {
        let Watched { pages, since_ns } = &mut self.watched[batch];
        let start = pages[first];
        let (now_ns, end) = (clock::now_ns(), start + len * PAGE);
        let mut runs = [Run::default(); RUNS];
        // There are as many runs as pages at most.
        let Ok((found, _)) = self.pagemap.scan_accessed(start, end, len, &mut runs) else { return };
        for run in &runs[..found] {
            for page in (run.start as usize..(run.end as usize).min(end)).step_by(PAGE) {
                if *count == used.len() {
                    return;
                }
                pages[first + (page - start) / PAGE] = 0;
                let verdict = self.promotion.consider(Order::ZERO, now_ns.saturating_sub(*since_ns), Time(now_ns));
                if verdict == Verdict::Promote {
                    used[*count] = page;
                    *count += 1;
                }
            }
        }
    }

    /// Watches pages from now on, in place of those that are watched for longest.
    pub(crate) fn watch(&mut self, pages: &[usize]) {
        let batch = &mut self.watched[self.oldest];
        self.oldest = (self.oldest + 1) % WATCHED_LOOKS;
        *batch = Watched { pages: [0; LOOK_PAGES], since_ns: clock::now_ns() };
        for (to, &page) in batch.pages.iter_mut().zip(pages) {
            // What the kernel does not watch would count as used.
            if self.uffd.begin_tracking(page, PAGE).is_ok() {
                *to = page;
            }
        }
    }
}
