//! The sweep: the clock hand goes over the program's memory and takes cold pages into the holding area.
//!
//! Which ranges: those that the policy manages (`spmem_core::reclaim::Mapping`), without the C library's own data and threads'
//! control blocks. Which pages: those the policy (`spmem_core::lru`) lets go. How: a chunk is
//! registered when its first page leaves; then UFFDIO_MOVE, whose success says that no unread event concerns the range.

use crate::place::now_ms;
use crate::recorder::Happening;
use crate::runtime::{Cram, Runtime};
use crate::space::{Mode, Space};
use crate::table::{ADDRESS_END, CHUNK, Copy, Entry};
use core::sync::atomic::Ordering::{self, Relaxed};
use spmem_core::lru::{self, Verdict};
use spmem_core::placing::TRIALS_MAX;
use spmem_core::reclaim::{self, Mapping, Origin, Retry};
use spmem_sys::fd::Fd;
use spmem_sys::mapping::populate_write;
use spmem_sys::maps::{Maps, Name, Vma};
use spmem_sys::pagemap::{Pagemap, RUNS, Run};
use spmem_sys::uffd::{Progress, Uffd};
use spmem_sys::{Errno, PAGE, Result, clock, process};

/// Pages moved under one hold of the lock: a fault may have to wait for it.
const HOLD_PAGES: usize = 4;
/// Pages looked up at a time: somewhat more than a batch moves, as some of them stay.
const LOOK_PAGES: usize = 64;

/// The clock hand.
pub(crate) struct Sweeper {
    runtime: &'static Runtime,
    uffd: core::mem::ManuallyDrop<Uffd>,
    maps: Maps,
    pagemap: core::mem::ManuallyDrop<Pagemap>,
    hand: usize,
    retry: Retry,
    /// Pages that the handler is to take out, of this run.
    handed_over: usize,
}

/// Why a run ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// All of it was looked at.
    Done,
    /// No slot is free.
    Full,
    /// An event waits to be read.
    Unread,
    /// The range cannot be managed.
    Unfit,
}

/// What core decides of a range: whether its pages may be managed at all.
pub(crate) const fn is_managed(vma: &Vma) -> bool {
    let origin = match vma.name {
        Name::None | Name::Anon => Origin::Anonymous,
        Name::Heap => Origin::Heap,
        Name::Stack => Origin::Stack,
        Name::Other => Origin::Other,
    };
    let &Vma { is_readable, is_writable, is_executable, is_shared, is_file, .. } = vma;
    Mapping { is_readable, is_writable, is_executable, is_shared, is_file, origin }.is_managed()
}

impl Sweeper {
    pub(crate) fn new(runtime: &'static Runtime) -> Result<Self> {
        Ok(Self {
            runtime,
            uffd: core::mem::ManuallyDrop::new(Uffd::from_fd(Fd::from_raw(runtime.uffd.load(Ordering::Acquire)))),
            maps: Maps::open()?,
            pagemap: runtime.shared_pagemap().ok_or(Errno(libc::EACCES))?,
            hand: 0,
            retry: Retry::default(),
            handed_over: 0,
        })
    }

    /// Moves up to `wanted` pages into the holding area, or hands them over; how many were moved. Gives up after two rounds.
    pub(crate) fn run(&mut self, wanted: usize) -> usize {
        self.handed_over = 0;
        self.let_go(wanted) - self.handed_over
    }

    /// How many pages were moved or handed over.
    fn let_go(&mut self, wanted: usize) -> usize {
        let (mut moved, mut wraps) = (0, 0);
        let mut runs = [Run::default(); RUNS];
        let mut last: Option<Vma> = None;
        while moved < wanted && wraps < 2 {
            last = last.filter(|vma| (vma.start..vma.end).contains(&self.hand));
            if last.is_none() {
                let Ok(next) = self.maps.writable_at_or_above(self.hand) else { break };
                last = next.filter(|vma| vma.start < ADDRESS_END);
            }
            let Some(vma) = last else {
                self.hand = 0;
                self.retry.begin_round(clock::now_ns());
                wraps += 1;
                continue;
            };
            let start = self.hand.max(vma.start);
            if !is_managed(&vma) {
                self.hand = vma.end;
                continue;
            }
            let excluded = self.runtime.excluded_in(start, vma.end);
            if let Some((_, to)) = excluded.filter(|&(from, _)| from <= start) {
                self.hand = to;
                continue;
            }
            let fence = excluded.map_or(vma.end, |(from, _)| from);
            let end = vma.end.min(fence);
            let Ok((count, looked)) = self.pagemap.scan(start, end, LOOK_PAGES, &mut runs) else {
                self.hand = end;
                continue;
            };
            let mut stop = looked;
            for run in &runs[..count] {
                let (ended, at) = self.run_over(run, &vma, wanted, &mut moved);
                match ended {
                    End::Done => {}
                    End::Full | End::Unread => {
                        self.hand = at;
                        self.look_at_busy(&mut moved);
                        if ended == End::Unread {
                            process::sleep_ns(20_000);
                        }
                        return moved;
                    }
                    End::Unfit => {
                        stop = vma.end;
                        break;
                    }
                }
                if moved >= wanted {
                    stop = at;
                    break;
                }
            }
            self.hand = stop;
            self.look_at_busy(&mut moved);
        }
        moved
    }

    /// One run of present pages, in steps short enough for the lock. Where it stopped.
    fn run_over(&mut self, run: &Run, vma: &Vma, wanted: usize, moved: &mut usize) -> (End, usize) {
        let mut at = run.start as usize;
        while at < run.end as usize && *moved < wanted {
            let step =
                (at + HOLD_PAGES.min(wanted - *moved) * PAGE).min(run.end as usize).min((at / CHUNK + 1) * CHUNK);
            let runtime = self.runtime;
            let mut space = runtime.space.lock();
            let Some(space) = space.as_mut() else { return (End::Unfit, at) };
            if !space.is_settled() {
                return (End::Unread, at);
            }
            // Odd while pages may be on their way out (Runtime::pin_thread).
            runtime.leaving.fetch_add(1, Ordering::SeqCst);
            let result = self.take(space, vma, at, step);
            runtime.leaving.fetch_add(1, Ordering::SeqCst);
            *moved += result.1;
            if result.0 != End::Done {
                return (result.0, at);
            }
            at = step;
            if space.outgoing.is_busy_full() {
                return (End::Done, at);
            }
        }
        (End::Done, at)
    }

    /// Whether the handler is to take a run out.
    fn hands_over(&self, space: &Space<Cram>, start: usize, end: usize) -> bool {
        let is_bound = self.runtime.home.get().is_some();
        let is_whole_step = end - start >= HOLD_PAGES * PAGE;
        reclaim::hands_over(is_bound, self.runtime.exchange().is_some(), is_whole_step)
            && space.table.find(start).is_some_and(|chunk| chunk.is_registered(start, end))
    }

    /// Takes out what no fault has; how many pages were moved.
    pub(crate) fn take_rest(&self) -> usize {
        let mut moved = 0;
        loop {
            let is_more = self.take_some(&mut moved);
            self.look_at_busy(&mut moved);
            if !is_more {
                return moved;
            }
        }
    }

    /// Takes runs out until there are none, or until busy pages have to be looked at; whether they have.
    fn take_some(&self, moved: &mut usize) -> bool {
        loop {
            let mut space = self.runtime.space.lock();
            let Some(space) = space.as_mut() else { return false };
            if space.outgoing.is_busy_full() {
                return true;
            }
            let Some(run) = space.outgoing.take() else { return false };
            let progress = take_out(self.runtime, space, &self.uffd, &self.pagemap, run);
            *moved += progress.done / PAGE;
            if progress.stopped == Some(Errno::EBUSY) {
                self.note_busy(space, run.0 + progress.done);
            }
        }
    }

    /// Under the lock: takes what may leave of `[start, end)`, which lies in one chunk and was present a moment ago.
    fn take(&mut self, space: &mut Space<Cram>, vma: &Vma, start: usize, end: usize) -> (End, usize) {
        let mut moved = 0;
        let mut at = start;
        while at < end {
            let pinned = self.runtime.pinned_in(at, end);
            if let Some((_, to)) = pinned.filter(|&(from, _)| from <= at) {
                at = to;
                continue;
            }
            let fence = pinned.map_or(end, |(from, _)| from);
            let mut stop = at;
            while stop < fence && self.lets_go(space, stop) {
                stop += PAGE;
            }
            if stop == at {
                at += PAGE;
                continue;
            }
            if self.hands_over(space, at, stop) && space.outgoing.offer(at, stop) {
                moved += (stop - at) / PAGE;
                self.handed_over += (stop - at) / PAGE;
                at = stop;
                continue;
            }
            let (ended, count) = self.take_run(space, vma, at, stop);
            moved += count;
            if ended != End::Done {
                return (ended, moved);
            }
            at = stop;
        }
        (End::Done, moved)
    }

    /// The policy's verdict on one page, whose age it changes.
    fn lets_go(&mut self, space: &mut Space<Cram>, page: usize) -> bool {
        let entry = space.table.get(page);
        if !space.may_leave(entry) || entry.is_refused() && !self.retry.is_turn((page / PAGE) as u64) {
            return false;
        }
        match lru::on_sweep(entry.age()) {
            Verdict::Evict(_) => true,
            Verdict::Keep(age) => {
                // It stayed a whole round: what its copy takes is better spent elsewhere.
                if let Copy::Stored(handle) = entry.copy() {
                    space.forget(handle);
                }
                space.table.set(page, Entry::present(Copy::None, age));
                false
            }
        }
    }

    /// Moves a run of pages that may all leave. They enter the holding area oldest address first.
    fn take_run(&mut self, space: &mut Space<Cram>, vma: &Vma, start: usize, end: usize) -> (End, usize) {
        if let Err(errno) = self.register(space, vma, start, end) {
            return (if errno == Errno::EAGAIN { End::Unread } else { End::Unfit }, 0);
        }
        let (mut at, mut moved) = (start, 0);
        while at < end {
            let Some((slot, count)) = space.holding.room(((end - at) / PAGE) as u32) else {
                return (End::Full, moved);
            };
            let progress = move_run(space, &self.uffd, &self.pagemap, slot, at, count as usize * PAGE);
            moved += progress.done / PAGE;
            at += progress.done;
            let Some(errno) = progress.stopped else { continue };
            if progress.done > 0 {
                continue;
            }
            match errno {
                Errno::EAGAIN => return (End::Unread, moved),
                // Gone meanwhile, or dropped as announced.
                Errno::ENOENT => {
                    self.note_missing(space, at);
                    at += PAGE;
                }
                Errno::EBUSY => {
                    self.note_busy(space, at);
                    at += PAGE;
                }
                // Somebody looked into a free slot (a debugger, say), and was given zeros.
                Errno::EEXIST => {
                    assert!(is_zero(space.holding.address(slot)), "a free slot of the holding area has data");
                    let slot = space.holding.push(0, None);
                    space.holding.kill(slot);
                }
                _ => {
                    let pages = ((vma.end - at) / PAGE) as u64;
                    self.runtime.shared().counters.refused_protected.fetch_add(pages, Relaxed);
                    return (End::Unfit, moved);
                }
            }
        }
        (End::Done, moved)
    }

    /// Makes sure that faults on the range come to us before a page of it leaves.
    fn register(&self, space: &mut Space<Cram>, vma: &Vma, start: usize, end: usize) -> Result<()> {
        let chunk = space.table.find_or_add(start);
        if chunk.is_registered(start, end) {
            return Ok(());
        }
        // Where pages are away the range is registered, or an unread change concerns it: not for us to register then.
        let (from, to) = if chunk.away == 0 {
            (chunk.start.max(vma.start), (chunk.start + CHUNK).min(vma.end))
        } else {
            (start, end)
        };
        // The range may have changed since it was looked up; our own mappings are made under this lock.
        let now =
            self.maps.at_or_above(start)?.filter(|now| is_managed(now) && now.start <= from && now.end >= to);
        if now.is_none() || self.runtime.excluded_in(from, to).is_some_and(|(from, to)| from < end && to > start) {
            return Err(Errno::EAGAIN);
        }
        self.uffd.register_for(from, to - from, self.runtime.watch())?;
        // The program may have unmapped some of it in between: the kernel passes over holes. What is registered is no
        // part of a mapping that is not, so one mapping and one page of it tell.
        let now = self.maps.at_or_above(from)?.filter(|now| now.start <= from && now.end >= to);
        if now.is_none() || !self.uffd.is_registered(from, PAGE, self.runtime.guard_start.load(Relaxed))? {
            return Err(Errno::EAGAIN);
        }
        space.table.find_or_add(start).set_registered(from, to, true);
        Ok(())
    }

    /// A page that madvise(2) announced and that is seen missing now may be managed again.
    fn note_missing(&self, space: &mut Space<Cram>, page: usize) {
        if space.table.get(page).is_discarded() {
            space.table.set(page, Entry::default());
        }
    }

    fn note_busy(&self, space: &mut Space<Cram>, page: usize) {
        if !space.outgoing.note_busy(page) {
            self.refuse(space, page);
        }
    }

    fn refuse(&self, space: &mut Space<Cram>, page: usize) {
        let entry = space.table.get(page);
        if space.may_leave(entry) && space.table.find(page).is_some() {
            space.table.set(page, Entry::refused(entry.copy()));
        }
    }

    /// Pages the kernel would not move: shared with a relative, once shared, or pinned for I/O. A write fault makes
    /// a page that was shared its only owner's again (Documentation/mm: anonymous exclusive); a pinned one never moves.
    fn look_at_busy(&self, moved: &mut usize) {
        let counters = &self.runtime.shared().counters;
        let busy = self.runtime.space.lock().as_mut().map(|space| space.outgoing.take_busy());
        for page in busy.into_iter().flatten().flatten() {
            // It may be somebody else's place by now.
            let is_here = |space: &Space<Cram>| is_as_let_go(space, page, page + PAGE);
            if !self.runtime.space.lock().as_ref().is_some_and(is_here) {
                continue;
            }
            let is_exclusive = self.pagemap.is_exclusive(page).unwrap_or(false);
            let may_retry = is_exclusive && populate_write(page, PAGE).is_ok();
            let mut space = self.runtime.space.lock();
            let Some(space) = space.as_mut() else { return };
            let take_out = |space| take_out(self.runtime, space, &self.uffd, &self.pagemap, (page, page + PAGE));
            if may_retry && take_out(space).done > 0 {
                *moved += 1;
                continue;
            }
            let (counter, why) = if is_exclusive {
                (&counters.refused_pinned, Happening::RefusePinned)
            } else {
                (&counters.refused_shared, Happening::RefuseShared)
            };
            counter.fetch_add(1, Relaxed);
            self.runtime.record(why, page, 1);
            self.refuse(space, page);
        }
    }

    /// Takes placed pages out to see whether they are used.
    pub(crate) fn try_out(&self, pages: &[usize]) {
        let Some(space) = &mut *self.runtime.space.lock() else { return };
        for &page in pages {
            let entry = space.table.get(page);
            let may_leave = space.is_settled() && self.runtime.pinned_in(page, page + PAGE).is_none();
            let (Some(target), Some((slot, 1))) = (entry.target(), space.holding.room(1)) else { return };
            // Behind a fence any touch would bring it up.
            let is_fenced = self.runtime.shared().targets[target].is_fenced.load(Relaxed) != 0;
            if !may_leave || is_fenced || space.holding.trials().iter().sum::<u32>() as usize >= TRIALS_MAX {
                return;
            }
            self.runtime.leaving.fetch_add(1, Ordering::SeqCst);
            let to = space.holding.address(slot);
            if self.uffd.move_present(to, page, PAGE, &self.pagemap).done == PAGE {
                let slot = space.holding.push(page, None);
                space.holding.begin_trial(slot, target, now_ms());
                space.table.set(page, Entry::away(Copy::Holding(slot), entry.age()));
            }
            self.runtime.leaving.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Under the lock, by who is in [`Runtime::working`]: takes a run of one chunk out that was let go a while ago, unless something has come
/// between, as far as it goes.
pub(crate) fn take_out(
    runtime: &Runtime,
    space: &mut Space<Cram>,
    uffd: &Uffd,
    pagemap: &Pagemap,
    (start, end): (usize, usize),
) -> Progress {
    // Odd before the pins are looked at (Runtime::pin_thread).
    runtime.leaving.fetch_add(1, Ordering::SeqCst);
    let may_leave = is_as_let_go(space, start, end) && runtime.pinned_in(start, end).is_none();
    let room = space.holding.room(((end - start) / PAGE) as u32).filter(|_| may_leave);
    let progress = match room {
        Some((slot, count)) => move_run(space, uffd, pagemap, slot, start, count as usize * PAGE),
        None => Progress { done: 0, stopped: None },
    };
    runtime.leaving.fetch_add(1, Ordering::SeqCst);
    progress
}

/// Whether a run that the policy has let go is still the program's memory, in its place and registered.
fn is_as_let_go(space: &Space<Cram>, start: usize, end: usize) -> bool {
    space.mode == Mode::Normal
        && space.is_settled()
        && space.table.find(start).is_some_and(|chunk| chunk.is_registered(start, end))
        && (start..end).step_by(PAGE).all(|page| space.may_leave(space.table.get(page)))
}

/// Moves a run to the slots from `slot` on, which are the next free ones.
fn move_run(
    space: &mut Space<Cram>,
    uffd: &Uffd,
    pagemap: &Pagemap,
    slot: u32,
    start: usize,
    len: usize,
) -> Progress {
    let progress = uffd.move_present(space.holding.address(slot), start, len, pagemap);
    for page in (start..start + progress.done).step_by(PAGE) {
        let entry = space.table.get(page);
        let kept = if let Copy::Stored(handle) = entry.copy() { Some(handle) } else { None };
        let slot = space.holding.push(page, kept);
        space.table.set(page, Entry::away(Copy::Holding(slot), entry.age()));
    }
    progress
}

/// Whether the page at `address`, a slot's, is all zero.
fn is_zero(address: usize) -> bool {
    // SAFETY: the holding area stays mapped for as long as the process lives; a missing page reads as zero.
    #[allow(unsafe_code, reason = "a page of the holding area, which is not Rust's memory, is read in place")]
    let page: &[u8; PAGE] = unsafe { &*core::ptr::with_exposed_provenance(address) };
    page.iter().all(|&byte| byte == 0)
}
