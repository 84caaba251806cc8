//! The gate: near the budget, first touches of memory come through the fault handler, which makes them wait.
//!
//! Growth by first touch is the kernel's business and as fast as RAM. So when the plan says so, every range that could
//! grow is registered with the userfaultfd, without a page of it being away. When there has been room for a while, what
//! has no page away is let go again and runs at native speed.

use crate::runtime::Runtime;
use crate::sweep::is_managed;
use crate::table::{ADDRESS_END, CHUNK, Copy};
use alloc::vec::Vec;
use core::mem::ManuallyDrop;
use core::sync::atomic::Ordering;
use spmem_core::reclaim::{Cover, Coverage, Extent, Gate};
use spmem_sys::fd::Fd;
use spmem_sys::maps::Maps;
use spmem_sys::pagemap::Pagemap;
use spmem_sys::uffd::Uffd;
use spmem_sys::{Errno, PAGE, Result, clock};

/// Registers and releases ranges.
pub(crate) struct GateKeeper {
    runtime: &'static Runtime,
    uffd: ManuallyDrop<Uffd>,
    maps: Maps,
    pagemap: ManuallyDrop<Pagemap>,
    ranges: Vec<(usize, usize)>,
    coverage: Coverage,
    epoch: u32,
}

impl GateKeeper {
    pub(crate) fn new(runtime: &'static Runtime) -> Result<Self> {
        Ok(Self {
            runtime,
            uffd: ManuallyDrop::new(Uffd::from_fd(Fd::from_raw(runtime.uffd.load(Ordering::Acquire)))),
            maps: Maps::open()?,
            pagemap: runtime.shared_pagemap().ok_or(Errno(libc::EACCES))?,
            ranges: Vec::new(),
            coverage: Coverage::default(),
            epoch: 0,
        })
    }

    /// Does what the plan says of growth.
    pub(crate) fn keep(&mut self, gate: Gate, extent: Extent) {
        let now = clock::now_ns();
        match self.coverage.look(gate, now, extent) {
            Cover::Keep => {}
            Cover::All => {
                let ranges = self.register_all();
                self.coverage.covered(now, ranges, extent);
            }
            Cover::Nothing => self.release(),
        }
    }

    /// Registers all that can be; how many ranges there are.
    fn register_all(&mut self) -> u64 {
        // Ranges that were unmapped may be other ranges now.
        let epoch = self.runtime.unmaps.load(Ordering::Relaxed);
        if epoch != self.epoch {
            self.ranges.clear();
            self.epoch = epoch;
        }
        let (mut at, mut ranges) = (0, 0);
        while let Ok(Some(vma)) = self.maps.writable_at_or_above(at) {
            (at, ranges) = (vma.end, ranges + 1);
            if vma.start >= ADDRESS_END {
                break;
            }
            if !is_managed(&vma) || self.ranges.binary_search(&(vma.start, vma.end)).is_ok() {
                continue;
            }
            // Under the lock our own mappings do not change; the range itself may, which the kernel then says.
            let mut space = self.runtime.space.lock();
            let Some(space) = space.as_mut() else { break };
            // Where pages are away the range is registered, or an unread change concerns it.
            if !space.is_settled() || space.table.has_away(vma.start, vma.end) {
                continue;
            }
            let is_same = self.maps.at_or_above(vma.start).is_ok_and(|now| now == Some(vma));
            let is_free = self.runtime.excluded_in(vma.start, vma.end).is_none();
            let is_new = is_same
                && is_free
                && self.uffd.register_for(vma.start, vma.end - vma.start, self.runtime.watch()).is_ok();
            if let (true, Err(place)) = (is_new, self.ranges.binary_search(&(vma.start, vma.end))) {
                self.ranges.insert(place, (vma.start, vma.end));
            }
        }
        ranges
    }

    /// Lets go of every chunk none of whose pages is away.
    fn release(&mut self) {
        for &(start, end) in &self.ranges {
            let mut at = start;
            while at < end {
                let mut space = self.runtime.space.lock();
                let Some(space) = space.as_mut().filter(|space| space.is_settled()) else { return };
                let next = space.table.next_chunk(at, end);
                let stop = next.unwrap_or(end).max(at);
                if stop > at {
                    let _ = self.uffd.let_go(at, stop - at, self.runtime.watch());
                }
                at = stop;
                if next.is_some() {
                    at = ((stop / CHUNK + 1) * CHUNK).min(end);
                }
            }
        }
        self.ranges.clear();
        let mut number = 0;
        loop {
            let mut space = self.runtime.space.lock();
            let Some(space) = space.as_mut().filter(|space| space.is_settled()) else { return };
            if number >= space.table.len() {
                return;
            }
            let chunk = space.table.chunk(number);
            number += 1;
            let start = chunk.start;
            // Pages being compressed that have come back still refer to their slots.
            let is_settled = (start..start + CHUNK)
                .step_by(PAGE)
                .all(|page| !chunk.get(page).is_away() && !matches!(chunk.get(page).copy(), Copy::Holding(_)));
            // Pages on mapped nodes are known by what is announced of their ranges.
            if !is_settled || chunk.placed > 0 || chunk.registered_runs().next().is_none() {
                continue;
            }
            for page in (start..start + CHUNK).step_by(PAGE) {
                let entry = space.table.get(page);
                // Announced as dropped, and not seen missing since: it may still be about to be.
                if entry.is_discarded() && self.pagemap.is_there(page).unwrap_or(true) {
                    continue;
                }
                space.forget_copy(entry);
                space.table.set(page, crate::table::Entry::present(Copy::None, entry.age()));
            }
            let runs: Vec<_> = space.table.chunk(number - 1).registered_runs().collect();
            for (from, to) in runs {
                if self.uffd.let_go(from, to - from, self.runtime.watch()).is_ok() {
                    space.table.chunk(number - 1).set_registered(from, to, false);
                }
            }
        }
    }
}
