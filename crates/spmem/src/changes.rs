//! Changes of the address space, put into the order in which they happened.
//!
//! The kernel announces munmap(2) and mremap(2) after it has let go of the mapping lock (mm/vma.c, mm/mremap.c:
//! `userfaultfd_unmap_complete`, `mremap_userfaultfd_complete`). So one thread's range can arrive where another thread's
//! was a moment ago, and the arrival be announced first. Applied in the order of reading, the arrival would wipe out the
//! entries of a range that has yet to move on: its pages would read as zero.
//!
//! Until all that has begun was read, calls that change program memory fail with `EAGAIN` ([`Uffd::is_changing`]). So
//! an arrival read in such a time is put off, and so is every change after it. Nothing is served meanwhile. When all is
//! read, [`order`] decides by what the kernel tells: what is at the place of arrival now, and which pages are
//! present where (one that is away cannot be). Where that does not decide, the process is ended: it takes threads that
//! move and unmap the same places within microseconds, and ranges that look alike.
//!
//! A birth is put off too: the child is a copy of the address space at one point of that order, and it is given its
//! pages ([`crate::fork`]) when that point is known, before any change after it is applied.

mod order;

pub(crate) use order::Noted;

use crate::fork;
use crate::populate::{condemn, find_raced, populate};
use crate::runtime::{Cram, Runtime};
use crate::space::{Mode, Space};
use crate::table::{CHUNK, Table};
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use order::{Doubt, Facts, Log, MAX_CHANGES};
use spmem_sys::fd::{Poll, poll};
use spmem_sys::pagemap::Pagemap;
use spmem_sys::thread::Urgent;
use spmem_sys::uffd::{Event, Uffd};
use spmem_sys::{PAGE, Result, clock, process};

/// Children that can be put off: one for each thread that forks by a raw system call, and one of fork(3)'s.
const MAX_BORN: usize = 512;
/// How long settling waits for a moment in which nothing changes, ns, before more is read, ...
const LOOK_NS: u64 = 500_000;
/// ... at first without giving up the processor.
const LOOK_CLOSELY_NS: u64 = 50_000;
/// How long a program that has more threads is taken to have more, ns: to ask takes longer than the moments that settling
/// looks for.
const CROWDED_NS: u64 = 10_000_000;
/// Changes shown when their order is in doubt.
const TOLD: usize = 32;

/// The facts of this process.
struct Seen<'a> {
    table: &'a Table,
    /// Pages that are in their places although the table says that they are away.
    promoted: &'a [usize],
    uffd: &'a Uffd,
    pagemap: Option<&'a Pagemap>,
    /// Address of a page that nobody can read.
    inaccessible: usize,
}

impl Facts for Seen<'_> {
    fn is_ours(&mut self, address: usize) -> Result<bool> {
        self.uffd.is_registered(address, PAGE, self.inaccessible)
    }

    fn goes_on(&mut self, address: usize) -> Result<bool> {
        self.uffd.is_registered(address - PAGE, 2 * PAGE, self.inaccessible)
    }

    fn outcome(&self, order: &[Event]) -> Option<u64> {
        let mut digest = 0_u64;
        let places = order.iter().flat_map(|&event| [departure(event), arrival(event)]).flatten();
        for (start, end) in places {
            for chunk in self.table.chunks_in(start, end) {
                for page in (chunk.max(start)..(chunk + CHUNK).min(end)).step_by(PAGE) {
                    if !self.table.get(page).is_away() || self.promoted.contains(&page) {
                        continue;
                    }
                    let now = destination(order, page);
                    // Without a pagemap nothing is known to be present.
                    let is_there = |now| self.pagemap.is_some_and(|map| map.is_there(now).unwrap_or(false));
                    if is_overwritten(order, page) || now.is_some_and(is_there) {
                        return None;
                    }
                    // Added up, as the places come in another order with each order of changes. SplitMix64's finalizer.
                    let both = (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ now.unwrap_or(0) as u64;
                    let mixed = (both ^ both >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                    digest = digest.wrapping_add(mixed ^ mixed >> 31);
                }
            }
        }
        Some(digest)
    }
}

/// Where the page that was at `page` before `changes` is after them; `None` when it was dropped.
pub(crate) fn destination(changes: &[Event], page: usize) -> Option<usize> {
    changes.iter().try_fold(page, |at, &event| match event {
        Event::Remove { start, end } | Event::Unmap { start, end } if (start..end).contains(&at) => None,
        Event::Remap { from, to, len } if (from..from + len).contains(&at) => Some(at - from + to),
        _ => Some(at),
    })
}

/// Whether something arrives where the page is that was at `page` before `changes`: then they did not happen in this order.
fn is_overwritten(changes: &[Event], page: usize) -> bool {
    let mut at = page;
    for event in changes {
        let Some(next) = destination(core::slice::from_ref(event), at) else { return false };
        if next == at && arrival(*event).is_some_and(|(start, end)| (start..end).contains(&at)) {
            return true;
        }
        at = next;
    }
    false
}

/// Changes that were read and not applied yet.
pub struct Changes {
    log: Log,
    /// Until then it is not asked again whether the program has one thread only.
    crowded_until_ns: u64,
    /// Children forked meanwhile.
    born: Vec<Born>,
    /// The child that is to be nursed before anything is applied.
    pub(crate) ward: Option<Uffd>,
    /// In this quiet time a range was moved: what a child has copied of the table may be torn.
    has_moved: bool,
}

/// A child that was forked while changes were under way.
struct Born {
    child: Uffd,
    is_announced: bool,
    /// Changes that had been read before.
    read: usize,
}

impl Changes {
    /// None. Allocates all that will be needed.
    pub(crate) fn new() -> Self {
        Self {
            log: Log::new(),
            crowded_until_ns: 0,
            born: Vec::with_capacity(MAX_BORN),
            ward: None,
            has_moved: false,
        }
    }

    /// No memory will be asked for while a fork may be copying the heap.
    pub(crate) fn quieten(&mut self) {
        self.log.reserve();
        self.has_moved = false;
    }

    /// That is over.
    pub(crate) fn end_quiet(&mut self) {
        self.log.shrink();
    }

    /// This is a forked child: what was read is its parent's to apply, and other children are its parent's.
    pub(crate) fn settle_after_fork(&mut self) {
        self.log.clear();
        core::mem::forget(self.ward.take());
        self.born.drain(..).for_each(core::mem::forget);
        self.end_quiet();
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.log.read().is_empty() && self.are_all_served()
    }

    /// Whether no child waits for its pages.
    pub(crate) fn are_all_served(&self) -> bool {
        self.born.is_empty() && self.ward.is_none()
    }

    /// Whether a change waits to be applied.
    pub(crate) fn is_put_off(&self) -> bool {
        !self.log.read().is_empty()
    }

    /// Whether the list is nearly full, of what need not be put in order. Whoever was changing something when a child was
    /// forked has been read long ago.
    fn is_long_enough(&self) -> bool {
        self.log.read().len() >= MAX_CHANGES / 2 && !self.is_moving()
    }

    fn is_moving(&self) -> bool {
        self.log.read().iter().any(|noted| matches!(noted.event, Event::Remap { .. }))
    }

    /// Bytes this takes.
    pub(crate) fn metadata_bytes(&self) -> u64 {
        self.log.metadata_bytes() as u64
    }
}

/// Takes a change that was just read: applies it, or puts it off.
pub(crate) fn note(
    runtime: &Runtime,
    space: &mut Space<Cram>,
    uffd: &Uffd,
    pagemap: Option<&Pagemap>,
    event: Event,
) {
    // Not to be put off: whoever made it goes on once it was read.
    if matches!(event, Event::Remove { start, .. } if start == runtime.holding_start.load(Relaxed)) {
        return fork::note_back(runtime, space);
    }
    let is_fork_near = space.mode == Mode::Quiet;
    space.changes.has_moved |= is_fork_near && matches!(event, Event::Remap { .. });
    let is_put_off = match event {
        // The child may still have what is gone here.
        Event::Unmap { .. } => is_fork_near,
        Event::Remap { .. } => is_fork_near || uffd.is_changing(),
        _ => false,
    };
    if space.is_settled() && !is_put_off {
        crate::fault::apply(runtime, space, pagemap, event);
        return;
    }
    // madvise(2) returns once it was read: a child forked after that must not find the page. What is unmapped meanwhile
    // makes no difference.
    if matches!(event, Event::Remove { .. }) && space.changes.are_all_served() && !space.changes.is_moving() {
        crate::fault::apply(runtime, space, pagemap, event);
        return;
    }
    if space.changes.log.is_full() {
        doubt(runtime, space, "too many changes of the address space at once");
    }
    let Changes { log, crowded_until_ns, .. } = &mut space.changes;
    log.push(event, || {
        let now_ns = clock::now_ns();
        if now_ns < *crowded_until_ns {
            return false;
        }
        let is_alone = runtime.is_single_threaded();
        if !is_alone {
            *crowded_until_ns = now_ns + CROWDED_NS;
        }
        is_alone
    });
}

/// Takes a child that was forked.
pub(crate) fn note_birth(runtime: &Runtime, space: &mut Space<Cram>, child: Uffd, is_announced: bool) {
    let read = space.changes.log.read().len();
    space.changes.born.push(Born { child, is_announced, read });
    if space.changes.born.len() == MAX_BORN {
        doubt(runtime, space, "too many children forked at once");
    }
}

/// Applies what was put off, once everything that has begun was read. Whether nothing is put off any more.
///
/// Children come first. The one that was announced becomes the [`Changes::ward`], unless ranges were moved meanwhile;
/// any other gets all its pages.
pub(crate) fn settle(runtime: &Runtime, space: &mut Space<Cram>, uffd: &Uffd, pagemap: Option<&Pagemap>) -> bool {
    if space.is_settled() {
        return true;
    }
    if space.changes.ward.is_some() {
        return false;
    }
    let inaccessible = runtime.guard_start.load(Relaxed);
    let mut facts = Seen { table: &space.table, promoted: &space.promoted, uffd, pagemap, inaccessible };
    if is_quiet_soon(uffd) {
        space.changes.log.note_quiet(&mut facts);
    } else if !space.changes.is_long_enough() {
        return false;
    }
    let may_be_nursed = space.changes.born.len() == 1 && space.changes.born[0].is_announced;
    if may_be_nursed && !space.changes.has_moved {
        space.changes.ward = space.changes.born.pop().map(|born| born.child);
        return false;
    }
    match space.changes.log.find_order(&mut facts) {
        Ok(true) => {}
        Ok(false) => return false,
        Err(Doubt) => {
            for noted in space.changes.log.read().iter().take(TOLD) {
                let echo = if noted.has_echo { ", and so announced" } else { "" };
                crate::complain(format_args!("spm:   read: {:x?}{echo}\n", noted.event));
            }
            doubt(runtime, space, "ranges were moved and unmapped by several threads at once")
        }
    }
    while let Some(Born { child, is_announced, read }) = space.changes.born.pop() {
        let log = &space.changes.log;
        let since = find_raced(runtime, space, &child, log.happened(), (log.read(), read));
        if !since.is_lost {
            populate(runtime, space, &child, since);
            runtime.release(&child);
        }
        if is_announced {
            fork::end_quiet_once_back(runtime, space);
        }
    }
    for index in 0..space.changes.log.happened().len() {
        let event = space.changes.log.happened()[index];
        crate::fault::apply(runtime, space, pagemap, event);
    }
    space.changes.log.clear();
    true
}

/// Whether all that has begun was read. A thread that goes from one change straight to the next leaves a microsecond in
/// between; it is seen by looking closely where the thread runs on another processor, and by looking at any time where
/// it runs on this one.
pub(crate) fn is_quiet_soon(uffd: &Uffd) -> bool {
    let begin_ns = clock::now_ns();
    let mut urgent = None;
    loop {
        if !uffd.is_changing() {
            return true;
        }
        let now_ns = clock::now_ns();
        // What waits to be read does not end by itself.
        let is_unread = poll(&mut [Poll::readable(uffd.raw())], Some(0)) != Ok(0);
        if is_unread || now_ns - begin_ns > LOOK_NS {
            return false;
        }
        if now_ns - begin_ns > LOOK_CLOSELY_NS {
            urgent.get_or_insert_with(Urgent::begin);
            process::sleep_exactly_ns(500 + now_ns / 10 % 4000);
        }
    }
}

/// Ends the process: going on might hand out wrong bytes. So might its children, which it can serve no more.
fn doubt(runtime: &Runtime, space: &Space<Cram>, what: &str) -> ! {
    for born in &space.changes.born {
        condemn(runtime, space, &born.child, space.changes.log.read().iter().map(|noted| noted.event));
    }
    crate::complain(format_args!(
        "spm: process {}: {what}, in an order that cannot be told; the process is ended\n",
        process::pid()
    ));
    process::abort()
}

/// Where the event's pages have gone from.
pub(crate) fn departure(event: Event) -> Option<(usize, usize)> {
    match event {
        Event::Unmap { start, end } => Some((start, end)),
        Event::Remap { from, len, .. } => Some((from, from + len)),
        _ => None,
    }
}

/// Where the event's pages have come to.
pub(crate) fn arrival(event: Event) -> Option<(usize, usize)> {
    match event {
        Event::Remap { to, len, .. } => Some((to, to + len)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::table::{Copy, Entry};
    use spmem_core::lru::Age;
    use spmem_sys::fd::Fd;

    const A: usize = 8 * CHUNK;
    const B: usize = A + 4 * PAGE;
    const C: usize = 16 * CHUNK;
    const D: usize = C + 4 * PAGE;

    fn moved(from: usize, to: usize) -> Event {
        Event::Remap { from, to, len: 4 * PAGE }
    }

    #[test]
    fn the_outcome_is_where_each_page_that_is_away_ends_up_however_it_got_there() {
        let mut table = Table::new();
        for page in [A + PAGE, B + PAGE] {
            table.find_or_add(page);
            table.set(page, Entry::away(Copy::Holding(0), Age::COLDEST));
        }
        let uffd = Uffd::from_fd(Fd::open_in_proc(c"/proc/self/stat").expect("/proc"));
        let outcome = |promoted: &[usize], order: &[Event]| {
            Seen { table: &table, promoted, uffd: &uffd, pagemap: None, inaccessible: 0 }.outcome(order)
        };
        let straight = outcome(&[], &[moved(A, C), moved(B, D)]);
        assert!(straight.is_some());
        assert_eq!(straight, outcome(&[], &[moved(B, D), moved(A, C)]), "the same comes of another order");
        assert_ne!(straight, outcome(&[], &[moved(A, D), moved(B, C)]), "each is where the other was");
        assert_eq!(outcome(&[], &[moved(B, A), moved(A, C)]), None, "one would have been overwritten");
        assert!(outcome(&[A + PAGE], &[moved(B, A), moved(A, C)]).is_some(), "but it has come back");
        assert_eq!(outcome(&[], &[moved(D, A)]), None, "nor does it need to leave for that");
    }
}
