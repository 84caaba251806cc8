//! Changes of the address space, put into the order in which they happened.
//!
//! The kernel announces munmap(2) and mremap(2) after it has let go of the mapping lock (mm/vma.c, mm/mremap.c:
//! `userfaultfd_unmap_complete`, `mremap_userfaultfd_complete`). So one thread's range can arrive where another thread's
//! was a moment ago, and the arrival be announced first. Applied in the order of reading, the arrival would wipe out the
//! entries of a range that has yet to move on: its pages would read as zero.
//!
//! Until all that has begun was read, calls that change program memory fail with `EAGAIN` ([`Uffd::is_changing`]). So
//! an arrival read in such a time is put off, and so is every change after it. Nothing is served meanwhile. When all is
//! read, [`drop_echoes`] and [`put_in_order`] decide by two facts the kernel tells: whether the place of arrival is still
//! ours, and which pages are present where (one that is away cannot be). Where that does not decide, the process is
//! ended: it takes three threads that move and unmap the same places within microseconds, and ranges that look alike.
//!
//! A birth is put off too: the child is a copy of the address space at one point of that order, and it is given its
//! pages ([`crate::fork`]) when that point is known, before any change after it is applied.

use crate::fork;
use crate::populate::{condemn, find_raced, populate};
use crate::runtime::{Cram, Runtime};
use crate::space::{Mode, Space};
use crate::table::{CHUNK, Table};
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use spmem_sys::fd::{Poll, poll};
use spmem_sys::pagemap::Pagemap;
use spmem_sys::thread::Urgent;
use spmem_sys::uffd::{Event, Uffd};
use spmem_sys::{PAGE, Result, clock, process};

/// Changes that can be put off: as many as a thread makes that goes from one to the next, until [`is_quiet_soon`].
const MAX_CHANGES: usize = 1 << 13;
/// So many without asking for memory.
const USUAL_CHANGES: usize = 1 << 10;

/// Children that can be put off: one for each thread that forks by a raw system call, and one of fork(3)'s.
const MAX_BORN: usize = 512;
/// How long settling waits for a moment in which nothing changes, ns, before more is read, ...
const LOOK_NS: u64 = 500_000;
/// ... at first without giving up the processor.
const LOOK_CLOSELY_NS: u64 = 50_000;
/// Changes shown when their order is in doubt.
const TOLD: usize = 32;

/// The order cannot be told from what the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Doubt;

/// What [`put_in_order`] goes by.
trait Facts {
    /// Whether the page of `address` is registered now; an error when more changes have begun: to be asked again later.
    fn is_ours(&self, address: usize) -> Result<bool>;
    /// What comes of this order, as a digest of where each page that is away ends up; `None` when that cannot be,
    /// because a page is present there.
    fn outcome(&self, order: &[Event]) -> Option<u64>;
}

/// The facts of this process.
struct Seen<'a> {
    table: &'a Table,
    uffd: &'a Uffd,
    pagemap: Option<&'a Pagemap>,
    /// Address of a page that nobody can read.
    inaccessible: usize,
}

impl Facts for Seen<'_> {
    fn is_ours(&self, address: usize) -> Result<bool> {
        self.uffd.is_registered(address, self.inaccessible)
    }

    fn outcome(&self, order: &[Event]) -> Option<u64> {
        let mut digest = 0_u64;
        for (start, end) in order.iter().filter_map(|&event| departure(event)) {
            for chunk in self.table.chunks_in(start, end) {
                for page in (chunk.max(start)..(chunk + CHUNK).min(end)).step_by(PAGE) {
                    if !self.table.get(page).is_away() {
                        continue;
                    }
                    let now = destination(order, page);
                    // Without a pagemap nothing is known to be present.
                    let is_there = |now| self.pagemap.is_some_and(|map| map.is_there(now).unwrap_or(false));
                    if now.is_some_and(is_there) {
                        return None;
                    }
                    digest =
                        (digest ^ now.unwrap_or(0) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
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

/// Changes that were read and not applied yet.
pub struct Changes {
    /// In the order of reading.
    read: Vec<Event>,
    /// The same in the order of happening, while they are applied.
    ordered: Vec<Event>,
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
        let list = || Vec::with_capacity(USUAL_CHANGES);
        Self { read: list(), ordered: list(), born: Vec::with_capacity(MAX_BORN), ward: None, has_moved: false }
    }

    /// No memory will be asked for while a fork may be copying the heap.
    pub(crate) fn quieten(&mut self) {
        self.read.reserve_exact(MAX_CHANGES);
        self.ordered.reserve_exact(MAX_CHANGES);
        self.has_moved = false;
    }

    /// That is over.
    pub(crate) fn end_quiet(&mut self) {
        self.read.shrink_to(USUAL_CHANGES);
        self.ordered.shrink_to(USUAL_CHANGES);
    }

    /// This is a forked child: what was read is its parent's to apply, and other children are its parent's.
    pub(crate) fn settle_after_fork(&mut self) {
        self.read.clear();
        core::mem::forget(self.ward.take());
        self.born.drain(..).for_each(core::mem::forget);
        self.end_quiet();
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.read.is_empty() && self.are_all_served()
    }

    /// Whether no child waits for its pages.
    pub(crate) fn are_all_served(&self) -> bool {
        self.born.is_empty() && self.ward.is_none()
    }

    /// Whether a change waits to be applied.
    pub(crate) fn is_put_off(&self) -> bool {
        !self.read.is_empty()
    }

    /// Whether the list is nearly full, of what need not be put in order. Whoever was changing something when a child was
    /// forked has been read long ago.
    fn is_long_enough(&self) -> bool {
        self.read.len() >= MAX_CHANGES / 2 && !self.is_moving()
    }

    fn is_moving(&self) -> bool {
        self.read.iter().any(|event| matches!(event, Event::Remap { .. }))
    }

    /// Bytes this takes.
    pub(crate) fn metadata_bytes(&self) -> u64 {
        ((self.read.capacity() + self.ordered.capacity()) * size_of::<Event>()) as u64
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
    if space.changes.read.len() == MAX_CHANGES {
        doubt(runtime, space, "too many changes of the address space at once");
    }
    space.changes.read.push(event);
}

/// Takes a child that was forked.
pub(crate) fn note_birth(runtime: &Runtime, space: &mut Space<Cram>, child: Uffd, is_announced: bool) {
    let read = space.changes.read.len();
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
    if space.changes.ward.is_some() || !is_quiet_soon(uffd) && !space.changes.is_long_enough() {
        return false;
    }
    let may_be_nursed = space.changes.born.len() == 1 && space.changes.born[0].is_announced;
    if may_be_nursed && !space.changes.has_moved {
        space.changes.ward = space.changes.born.pop().map(|born| born.child);
        return false;
    }
    let Changes { read, ordered, .. } = &mut space.changes;
    ordered.clear();
    ordered.extend_from_slice(read);
    drop_echoes(ordered);
    let inaccessible = runtime.guard_start.load(Relaxed);
    let facts = Seen { table: &space.table, uffd, pagemap, inaccessible };
    match put_in_order(ordered, &facts) {
        Ok(true) => {}
        Ok(false) => return false,
        Err(Doubt) => {
            for event in space.changes.read.iter().take(TOLD) {
                crate::complain(format_args!("spm:   read: {event:x?}\n"));
            }
            doubt(runtime, space, "ranges were moved and unmapped by several threads at once")
        }
    }
    while let Some(Born { child, is_announced, read }) = space.changes.born.pop() {
        let Changes { ordered, read: all, .. } = &space.changes;
        let since = find_raced(runtime, space, &child, ordered, (all, read));
        if !since.is_lost {
            populate(runtime, space, &child, since);
            runtime.release(&child);
        }
        if is_announced {
            fork::end_quiet_once_back(runtime, space);
        }
    }
    for index in 0..space.changes.ordered.len() {
        let event = space.changes.ordered[index];
        crate::fault::apply(runtime, space, pagemap, event);
    }
    space.changes.read.clear();
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
        condemn(runtime, space, &born.child, &space.changes.read);
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

fn overlap(a: Option<(usize, usize)>, b: Option<(usize, usize)>) -> Option<(usize, usize)> {
    let ((a, a_end), (b, b_end)) = (a?, b?);
    let both = (a.max(b), a_end.min(b_end));
    (both.0 < both.1).then_some(both)
}

/// mremap(2) is announced twice: as moved, and then its old place as unmapped. The second says nothing new, and may be
/// read after somebody else's range has come to that place. A real unmapping of that range is an equal event: whichever
/// of the two was read first, one is left. MREMAP_DONTUNMAP has no echo.
fn drop_echoes(changes: &mut Vec<Event>) {
    let mut index = 0;
    while index < changes.len() {
        if let Event::Remap { from, len, .. } = changes[index] {
            let echo = Event::Unmap { start: from, end: from + len };
            if let Some(at) = changes[index + 1..].iter().position(|&event| event == echo) {
                changes.remove(index + 1 + at);
            }
        }
        index += 1;
    }
}

/// Puts changes, in the order of reading, into the order in which they happened; `Ok(false)` when an answer has to wait.
///
/// A range that has arrived leaves by a change read later. If the range is still ours although such a change was read,
/// then what has left is what was there before: the change goes before the arrival. Of two such changes one may have
/// taken what was there before; which one, the pages tell.
fn put_in_order(changes: &mut Vec<Event>, facts: &impl Facts) -> core::result::Result<bool, Doubt> {
    // Each step puts one change before an arrival that it stood behind.
    for _ in 0..=changes.len() * changes.len() {
        match find_late(changes, facts)? {
            Late::None => return Ok(true),
            Late::NotYet => return Ok(false),
            Late::Found { from, to } => {
                let event = changes.remove(from);
                changes.insert(to, event);
            }
        }
    }
    Err(Doubt)
}

/// A change that was read too late.
enum Late {
    None,
    NotYet,
    /// The one at `from` belongs to `to`, before it.
    Found {
        from: usize,
        to: usize,
    },
}

fn find_late(changes: &mut Vec<Event>, facts: &impl Facts) -> core::result::Result<Late, Doubt> {
    for index in (0..changes.len()).rev() {
        let Some(place) = arrival(changes[index]) else { continue };
        let next = changes[index + 1..].iter().position(|&event| overlap(arrival(event), Some(place)).is_some());
        let end = next.map_or(changes.len(), |next| index + 1 + next);
        for leaving in index + 1..end {
            let Some(part) = overlap(departure(changes[leaving]), Some(place)) else { continue };
            let rival = |other: &usize| overlap(departure(changes[*other]), Some(part)).is_some();
            if (index + 1..leaving).any(|other| rival(&other)) {
                continue; // looked at with the first of them
            }
            let rivals = (leaving + 1..end).filter(rival).count();
            if rivals > 0 {
                let second = (leaving + 1..end).find(rival).filter(|_| rivals == 1).ok_or(Doubt)?;
                let to = first_of_row(changes, index, part.0);
                if let Some(from) = which_fits(changes, [leaving, second], to, facts)? {
                    return Ok(Late::Found { from, to });
                }
            } else if next.is_none() {
                match facts.is_ours(part.0) {
                    Ok(true) => {
                        let to = first_of_row(changes, index, part.0);
                        return Ok(Late::Found { from: leaving, to });
                    }
                    Ok(false) => {}
                    Err(_) => return Ok(Late::NotYet),
                }
            }
        }
    }
    Ok(Late::None)
}

/// Which of two changes belongs to `to`, or neither: what does not contradict the pages. If more than one does not, what
/// comes of them must be the same.
fn which_fits(
    changes: &mut Vec<Event>,
    late: [usize; 2],
    to: usize,
    facts: &impl Facts,
) -> core::result::Result<Option<usize>, Doubt> {
    let mut found = facts.outcome(changes).map(|outcome| (None, outcome));
    for from in late {
        let event = changes.remove(from);
        changes.insert(to, event);
        let outcome = facts.outcome(changes);
        let event = changes.remove(to);
        changes.insert(from, event);
        match (found, outcome) {
            (None, Some(outcome)) => found = Some((Some(from), outcome)),
            (Some((_, other)), Some(outcome)) if other != outcome => return Err(Doubt),
            _ => {}
        }
    }
    found.map(|(from, _)| from).ok_or(Doubt)
}

/// Ranges came to `address` and left it in turn, the last arrival being `last`: the first arrival of that row.
fn first_of_row(changes: &[Event], last: usize, address: usize) -> usize {
    let page = Some((address, address + PAGE));
    let mut first = last;
    loop {
        let earlier = |wanted: fn(Event) -> Option<(usize, usize)>, end: usize| {
            changes[..end].iter().rposition(|&event| overlap(wanted(event), page).is_some())
        };
        let Some(left) = earlier(departure, first) else { return first };
        let Some(came) = earlier(arrival, left) else { return first };
        // Nothing of the row in between: then the one before has left by `left`.
        if earlier(departure, left).is_some_and(|other| other > came) {
            return first;
        }
        first = came;
    }
}

#[cfg(test)]
mod tests;
