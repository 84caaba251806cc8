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

use crate::runtime::{Cram, Runtime};
use crate::space::Space;
use crate::table::{CHUNK, Table};
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use spmem_sys::pagemap::Pagemap;
use spmem_sys::uffd::{Event, Uffd};
use spmem_sys::{PAGE, Result, process};

/// Changes that can be put off; a thread has at most two under way, and waits for their being read.
pub(crate) const MAX_CHANGES: usize = 1024;

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
}

impl Changes {
    /// None. Allocates all that will be needed.
    pub(crate) fn new() -> Self {
        Self { read: Vec::with_capacity(MAX_CHANGES), ordered: Vec::with_capacity(MAX_CHANGES) }
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.read.is_empty()
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
    if space.is_settled() && !(matches!(event, Event::Remap { .. }) && uffd.is_changing()) {
        crate::fault::apply(runtime, space, pagemap, event);
        return;
    }
    if space.changes.read.len() == MAX_CHANGES {
        doubt("too many changes of the address space at once");
    }
    space.changes.read.push(event);
}

/// Applies what was put off, once everything that has begun was read. Whether nothing is put off any more.
pub(crate) fn settle(runtime: &Runtime, space: &mut Space<Cram>, uffd: &Uffd, pagemap: Option<&Pagemap>) -> bool {
    if space.is_settled() {
        return true;
    }
    if uffd.is_changing() {
        return false;
    }
    let Changes { read, ordered } = &mut space.changes;
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
            doubt("ranges were moved and unmapped by several threads at once")
        }
    }
    for index in 0..space.changes.ordered.len() {
        let event = space.changes.ordered[index];
        crate::fault::apply(runtime, space, pagemap, event);
    }
    space.changes.read.clear();
    true
}

/// Ends the process: going on might hand out wrong bytes.
fn doubt(what: &str) -> ! {
    crate::complain(format_args!(
        "spm: process {}: {what}, in an order that cannot be told; the process is ended\n",
        process::pid()
    ));
    process::abort()
}

/// Where the event's pages have gone from.
fn departure(event: Event) -> Option<(usize, usize)> {
    match event {
        Event::Unmap { start, end } => Some((start, end)),
        Event::Remap { from, len, .. } => Some((from, from + len)),
        _ => None,
    }
}

/// Where the event's pages have come to.
fn arrival(event: Event) -> Option<(usize, usize)> {
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
            let to = first_of_row(changes, index, part.0);
            let rivals = (leaving + 1..end).filter(rival).count();
            if rivals > 0 {
                let second = (leaving + 1..end).find(rival).filter(|_| rivals == 1).ok_or(Doubt)?;
                if let Some(from) = which_fits(changes, [leaving, second], to, facts)? {
                    return Ok(Late::Found { from, to });
                }
            } else if next.is_none() {
                match facts.is_ours(part.0) {
                    Ok(true) => return Ok(Late::Found { from: leaving, to }),
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
mod tests {
    extern crate std;
    use super::*;
    use spmem_sys::Errno;
    use std::vec;

    const A: usize = 0x10_0000;
    const B: usize = 0x20_0000;
    const C: usize = 0x30_0000;
    const D: usize = 0x40_0000;
    const LEN: usize = 16 * PAGE;

    fn moved(from: usize, to: usize) -> Event {
        Event::Remap { from, to, len: LEN }
    }
    fn unmapped(start: usize) -> Event {
        Event::Unmap { start, end: start + LEN }
    }
    /// What is ours, which pages were away before, which are present now.
    #[derive(Default)]
    struct Told<'a> {
        ours: &'a [usize],
        away: &'a [usize],
        present: &'a [usize],
        is_busy: bool,
    }

    impl Facts for Told<'_> {
        fn is_ours(&self, address: usize) -> Result<bool> {
            if self.is_busy { Err(Errno::EAGAIN) } else { Ok(self.ours.contains(&address)) }
        }
        fn outcome(&self, order: &[Event]) -> Option<u64> {
            let mut digest = 0;
            for &page in self.away {
                let now = destination(order, page);
                if now.is_some_and(|now| self.present.contains(&now)) {
                    return None;
                }
                digest = digest * 31 + now.unwrap_or(0) as u64;
            }
            Some(digest)
        }
    }

    fn ordered(mut changes: Vec<Event>, ours: &[usize]) -> core::result::Result<Vec<Event>, Doubt> {
        put_in_order(&mut changes, &Told { ours, ..Told::default() }).map(|_| changes)
    }

    #[test]
    fn the_old_place_of_a_move_is_announced_once_more_and_that_is_dropped() {
        let mut changes = vec![moved(A, C), moved(B, A), unmapped(A), unmapped(B), unmapped(A)];
        drop_echoes(&mut changes);
        assert_eq!(changes, [moved(A, C), moved(B, A), unmapped(A)]);
    }

    #[test]
    fn what_was_there_before_leaves_before_the_arrival_that_was_announced_first() {
        let order = ordered(vec![moved(B, A), moved(A, C)], &[A, C]);
        assert_eq!(order, Ok(vec![moved(A, C), moved(B, A)]));
        let order = ordered(vec![moved(B, A), unmapped(A)], &[A]);
        assert_eq!(order, Ok(vec![unmapped(A), moved(B, A)]));
    }

    #[test]
    fn what_arrived_and_went_on_stays_in_order() {
        let order = ordered(vec![moved(B, A), moved(A, C)], &[C]);
        assert_eq!(order, Ok(vec![moved(B, A), moved(A, C)]));
        let order = ordered(vec![moved(B, A), moved(A, C), moved(C, A), unmapped(A)], &[]);
        assert_eq!(order, Ok(vec![moved(B, A), moved(A, C), moved(C, A), unmapped(A)]));
    }

    #[test]
    fn one_that_comes_and_goes_many_times_does_not_hide_who_was_there_before() {
        let read = vec![moved(B, A), moved(A, C), moved(C, A), moved(A, D)];
        let order = ordered(read, &[A, D]);
        assert_eq!(order, Ok(vec![moved(A, D), moved(B, A), moved(A, C), moved(C, A)]));
    }

    #[test]
    fn three_ranges_in_a_row_are_untangled() {
        // C left for D, then B came to C, then A came to B; read backwards.
        let order = ordered(vec![moved(A, B), moved(B, C), moved(C, D)], &[B, C, D]);
        assert_eq!(order, Ok(vec![moved(C, D), moved(B, C), moved(A, B)]));
    }

    #[test]
    fn of_two_that_left_after_one_arrival_the_pages_tell_who_was_there_before() {
        // Page 1 of what came from B, page 2 of what was at A were away. One of the two went to C, one to D.
        let away = [B + PAGE, A + 2 * PAGE];
        let read = vec![moved(B, A), moved(A, C), moved(A, D)];
        let order = |present: &[usize]| {
            let mut changes = read.clone();
            put_in_order(&mut changes, &Told { away: &away, present, ..Told::default() }).map(|_| changes)
        };
        assert_eq!(order(&[C + PAGE, D + 2 * PAGE]), Ok(vec![moved(A, C), moved(B, A), moved(A, D)]));
        assert_eq!(order(&[D + PAGE, C + 2 * PAGE]), Ok(vec![moved(A, D), moved(B, A), moved(A, C)]));
        assert_eq!(order(&[]), Err(Doubt), "both look alike");
        assert_eq!(order(&[C + PAGE, C + 2 * PAGE]), Err(Doubt), "neither can be");
    }

    #[test]
    fn pieces_of_an_arrival_that_are_unmapped_one_by_one_do_not_contradict_each_other() {
        let half = LEN / 2;
        let pieces = [Event::Unmap { start: A, end: A + half }, Event::Unmap { start: A + half, end: A + LEN }];
        let read = vec![moved(B, A), pieces[0], pieces[1]];
        assert_eq!(ordered(read.clone(), &[]), Ok(read));
    }

    #[test]
    fn an_answer_that_has_to_wait_changes_nothing() {
        let mut changes = vec![moved(B, A), moved(A, C)];
        assert_eq!(put_in_order(&mut changes, &Told { is_busy: true, ..Told::default() }), Ok(false));
        assert_eq!(changes, [moved(B, A), moved(A, C)]);
    }
}
