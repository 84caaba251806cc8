//! Changes of the address space, put into the order in which they happened.
//!
//! The kernel announces munmap(2) and mremap(2) after it has let go of the mapping lock (mm/vma.c, mm/mremap.c:
//! `userfaultfd_unmap_complete`, `mremap_userfaultfd_complete`). So one thread's range can arrive where another thread's
//! was a moment ago, and the arrival be announced first. Applied in the order of reading, the arrival would wipe out the
//! entries of a range that has yet to move on: its pages would read as zero.
//!
//! Until all that has begun was read, calls that change program memory fail with `EAGAIN` ([`Uffd::is_changing`]). So
//! an arrival read in such a time is put off, and so is every change after it. Nothing is served meanwhile. When all is
//! read, [`put_in_order`] decides by two facts the kernel tells: whether the place of arrival is still
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
use core::ops::Range;
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
    fn is_ours(&mut self, address: usize) -> Result<bool>;
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

/// Addresses where nothing was ours when it was asked, and where nothing has arrived since: not to be asked again. There is
/// time for few questions before the next change begins.
struct Gone {
    /// In ascending order.
    addresses: Vec<usize>,
    /// What is to be asked next.
    wanted: Vec<usize>,
}

impl Gone {
    fn new() -> Self {
        Self { addresses: Vec::with_capacity(USUAL_CHANGES), wanted: Vec::with_capacity(USUAL_CHANGES) }
    }

    /// Finds out what [`put_in_order`] still has to ask, as far as it can be told.
    fn prepare(&mut self, order: &mut Vec<Event>, seals: &Seals) {
        self.wanted.clear();
        let _ = find_late(order, seals, &mut Rehearsal(self));
    }

    /// Asks that, until more changes have begun.
    fn ask(&mut self, facts: &mut impl Facts) {
        while let Some(address) = self.wanted.pop() {
            match facts.is_ours(address) {
                Ok(false) => self.insert(address),
                Ok(true) => {}
                Err(_) => return,
            }
        }
    }

    fn contains(&self, address: usize) -> bool {
        self.addresses.binary_search(&address).is_ok()
    }

    fn insert(&mut self, address: usize) {
        if let Err(at) = self.addresses.binary_search(&address)
            && self.addresses.len() < self.addresses.capacity()
        {
            self.addresses.insert(at, address);
        }
    }

    fn note(&mut self, event: Event) {
        if let Some((start, end)) = arrival(event) {
            self.addresses.retain(|address| !(start..end).contains(address));
        }
    }
}

impl Facts for Seen<'_> {
    fn is_ours(&mut self, address: usize) -> Result<bool> {
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

/// Numbers of changes after which all that had begun was read: no change read later happened before one of them.
struct Seals(Vec<usize>);

impl Seals {
    /// After so many. Without room a seal is missing, which only leaves more to be found out.
    fn set(&mut self, count: usize) {
        if self.0.last() != Some(&count) && self.0.len() < self.0.capacity() {
            self.0.push(count);
        }
    }

    /// What was read between two of them, of `count` changes, the latest first.
    fn stretches(&self, count: usize) -> impl Iterator<Item = Range<usize>> {
        let ends = core::iter::once(count).chain(self.0.iter().rev().copied().filter(move |&end| end < count));
        let starts = self.0.iter().rev().copied().filter(move |&end| end < count).chain([0]);
        starts.zip(ends).map(|(start, end)| start..end)
    }
}

/// The facts, with what is known already.
struct Recalled<'a, F>(&'a mut Gone, &'a mut F);

impl<F: Facts> Facts for Recalled<'_, F> {
    fn is_ours(&mut self, address: usize) -> Result<bool> {
        let Self(gone, facts) = self;
        if gone.contains(address) {
            return Ok(false);
        }
        let is_ours = facts.is_ours(address)?;
        if !is_ours {
            gone.insert(address);
        }
        Ok(is_ours)
    }

    fn outcome(&self, order: &[Event]) -> Option<u64> {
        self.1.outcome(order)
    }
}

/// Notes what is asked, and goes on as if nothing were ours.
struct Rehearsal<'a>(&'a mut Gone);

impl Facts for Rehearsal<'_> {
    fn is_ours(&mut self, address: usize) -> Result<bool> {
        if !self.0.contains(address) && self.0.wanted.len() < self.0.wanted.capacity() {
            self.0.wanted.push(address);
        }
        Ok(false)
    }

    fn outcome(&self, _: &[Event]) -> Option<u64> {
        None
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
    read: Vec<Noted>,
    /// The same in the order of happening, while they are applied.
    ordered: Vec<Event>,
    seals: Seals,
    gone: Gone,
    /// Children forked meanwhile.
    born: Vec<Born>,
    /// The child that is to be nursed before anything is applied.
    pub(crate) ward: Option<Uffd>,
    /// In this quiet time a range was moved: what a child has copied of the table may be torn.
    has_moved: bool,
}

/// A change that was read.
///
/// mremap(2) is announced twice: as moved, and then its old place as unmapped. The second, the echo, says nothing new, and
/// may be read after somebody else's range has come to that place. A real unmapping of that range is an equal event:
/// whichever of the two was read first counts as the echo. MREMAP_DONTUNMAP has none.
pub(crate) struct Noted {
    pub(crate) event: Event,
    /// A move whose old place was announced as unmapped.
    pub(crate) has_echo: bool,
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
        let read = Vec::with_capacity(USUAL_CHANGES);
        let ordered = Vec::with_capacity(USUAL_CHANGES);
        let seals = Seals(Vec::with_capacity(USUAL_CHANGES));
        Self {
            read,
            ordered,
            seals,
            gone: Gone::new(),
            born: Vec::with_capacity(MAX_BORN),
            ward: None,
            has_moved: false,
        }
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
        self.clear();
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
        self.read.iter().any(|noted| matches!(noted.event, Event::Remap { .. }))
    }

    /// Adds one, unless it is the echo of one that was read.
    fn push(&mut self, event: Event) {
        let has_come = |noted: &&mut Noted| !noted.has_echo && echo(noted.event) == Some(event);
        match self.read.iter_mut().rev().find(has_come) {
            Some(noted) => noted.has_echo = true,
            None => {
                self.gone.note(event);
                self.read.push(Noted { event, has_echo: false });
            }
        }
    }

    fn clear(&mut self) {
        self.read.clear();
        self.seals.0.clear();
        self.gone.addresses.clear();
    }

    /// Starts with the order of reading.
    fn begin_order(&mut self) {
        self.ordered.clear();
        self.ordered.extend(self.read.iter().map(|noted| noted.event));
    }

    /// All that has begun was read. What is to be asked is asked at once: whoever moves ranges goes on in a moment.
    fn note_quiet(&mut self, facts: &mut impl Facts) {
        self.seals.set(self.read.len());
        self.gone.ask(facts);
    }

    /// As [`put_in_order`].
    fn try_order(&mut self, facts: &mut impl Facts) -> core::result::Result<bool, Doubt> {
        self.begin_order();
        let Self { ordered, seals, gone, .. } = self;
        let is_done = put_in_order(ordered, seals, &mut Recalled(gone, facts))?;
        if !is_done {
            gone.prepare(ordered, seals);
        }
        Ok(is_done)
    }

    /// Bytes this takes.
    pub(crate) fn metadata_bytes(&self) -> u64 {
        let numbers = [&self.seals.0, &self.gone.addresses, &self.gone.wanted];
        let numbers: usize = numbers.iter().map(|list| list.capacity() * size_of::<usize>()).sum();
        (self.read.capacity() * size_of::<Noted>() + self.ordered.capacity() * size_of::<Event>() + numbers) as u64
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
    space.changes.push(event);
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
    if space.changes.ward.is_some() {
        return false;
    }
    let inaccessible = runtime.guard_start.load(Relaxed);
    let mut facts = Seen { table: &space.table, uffd, pagemap, inaccessible };
    if is_quiet_soon(uffd) {
        space.changes.note_quiet(&mut facts);
    } else if !space.changes.is_long_enough() {
        return false;
    }
    let may_be_nursed = space.changes.born.len() == 1 && space.changes.born[0].is_announced;
    if may_be_nursed && !space.changes.has_moved {
        space.changes.ward = space.changes.born.pop().map(|born| born.child);
        return false;
    }
    match space.changes.try_order(&mut facts) {
        Ok(true) => {}
        Ok(false) => return false,
        Err(Doubt) => {
            for noted in space.changes.read.iter().take(TOLD) {
                let echo = if noted.has_echo { ", and so announced" } else { "" };
                crate::complain(format_args!("spm:   read: {:x?}{echo}\n", noted.event));
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
    space.changes.clear();
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
fn doubt(runtime: &Runtime, space: &mut Space<Cram>, what: &str) -> ! {
    space.changes.begin_order();
    for born in &space.changes.born {
        condemn(runtime, space, &born.child, &space.changes.ordered);
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

/// How the old place of a move is announced once more.
fn echo(event: Event) -> Option<Event> {
    match event {
        Event::Remap { from, len, .. } => Some(Event::Unmap { start: from, end: from + len }),
        _ => None,
    }
}

/// Puts changes, in the order of reading, into the order in which they happened; `Ok(false)` when an answer has to wait.
///
/// A range that has arrived leaves by a change read later. If the range is still ours although such a change was read,
/// then what has left is what was there before: the change goes before the arrival. Of two such changes one may have
/// taken what was there before; which one, the pages tell.
fn put_in_order(
    changes: &mut Vec<Event>,
    seals: &Seals,
    facts: &mut impl Facts,
) -> core::result::Result<bool, Doubt> {
    // Each step puts one change before an arrival that it stood behind.
    for _ in 0..=changes.len() * changes.len() {
        match find_late(changes, seals, facts)? {
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

fn find_late(
    changes: &mut Vec<Event>,
    seals: &Seals,
    facts: &mut impl Facts,
) -> core::result::Result<Late, Doubt> {
    for stretch in seals.stretches(changes.len()) {
        for index in stretch.clone().rev() {
            let Some(place) = arrival(changes[index]) else { continue };
            let mut after = index + 1..stretch.end;
            let next = after.clone().find(|&at| overlap(arrival(changes[at]), Some(place)).is_some());
            after.end = next.unwrap_or(after.end);
            for leaving in after.clone() {
                let Some(part) = overlap(departure(changes[leaving]), Some(place)) else { continue };
                let rival = |other: &usize| overlap(departure(changes[*other]), Some(part)).is_some();
                if (after.start..leaving).any(|other| rival(&other)) {
                    continue; // looked at with the first of them
                }
                let rivals = (leaving + 1..after.end).filter(rival).count();
                if rivals > 0 {
                    let second = (leaving + 1..after.end).find(rival).filter(|_| rivals == 1).ok_or(Doubt)?;
                    let to = first_of_row(changes, stretch.start, index, part.0);
                    if let Some(from) = which_fits(changes, [leaving, second], to, facts)? {
                        return Ok(Late::Found { from, to });
                    }
                } else if next.is_none() {
                    match was_ours(&changes[stretch.end..], part.0, facts) {
                        Ok(true) => {
                            let to = first_of_row(changes, stretch.start, index, part.0);
                            return Ok(Late::Found { from: leaving, to });
                        }
                        Ok(false) => {}
                        Err(_) => return Ok(Late::NotYet),
                    }
                }
            }
        }
    }
    Ok(Late::None)
}

/// Whether the page of `address` was registered before `later` happened.
fn was_ours(later: &[Event], address: usize, facts: &mut impl Facts) -> Result<bool> {
    let page = Some((address, address + PAGE));
    for &event in later {
        if overlap(departure(event), page).is_some() {
            return Ok(true);
        }
        if overlap(arrival(event), page).is_some() {
            return Ok(false);
        }
    }
    facts.is_ours(address)
}

/// Which of two changes belongs to `to`, or neither: what does not contradict the pages. If more than one does not, what
/// comes of them must be the same.
fn which_fits(
    changes: &mut Vec<Event>,
    late: [usize; 2],
    to: usize,
    facts: &mut impl Facts,
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

/// Ranges came to `address` and left it in turn, the last arrival being `last`: the first arrival of that row, from `start`
/// on.
fn first_of_row(changes: &[Event], start: usize, last: usize, address: usize) -> usize {
    let page = Some((address, address + PAGE));
    let mut first = last;
    loop {
        // What touched the place last before `end`, and whether it came.
        let earlier = |end: usize| {
            let at = (start..end).rfind(|&at| {
                overlap(departure(changes[at]), page).or(overlap(arrival(changes[at]), page)).is_some()
            })?;
            Some((at, overlap(arrival(changes[at]), page).is_some()))
        };
        let Some((left, false)) = earlier(first) else { return first };
        let Some((came, true)) = earlier(left) else { return first };
        first = came;
    }
}

#[cfg(test)]
mod tests;
