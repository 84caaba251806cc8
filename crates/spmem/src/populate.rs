//! Pages for a child that has no store of its own: all that are away, at once.
//!
//! Of a fork that nobody announced (a raw system call), and of one whose child cannot serve itself. [`populate`] gives the
//! child every page, then lets its ranges go: it is an ordinary process from then on, outside of the budget, and counted.
//!
//! The child runs meanwhile. What it moves, unmaps or drops is read from its userfaultfd, and pages go to where they are
//! then; a process that it clones lacks what it lacked, and is given that as well, its own children included.
//! Called by the fault handler, which holds the space's lock: nothing leaves or comes back meanwhile.
//!
//! Hole: a child whose threads move and unmap the same places within these milliseconds (see [`changes`]).

use crate::changes::{self, Noted};
use crate::protocol::Heir;
use crate::runtime::{Cram, Runtime};
use crate::space::Space;
use crate::table::{ADDRESS_END, CHUNK, Copy};
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use spmem_node::swapfile::Unloaded;
use spmem_sys::fd::{Fd, Poll, poll};
use spmem_sys::uffd::{Event, Uffd};
use spmem_sys::{Errno, PAGE, process};

/// How often a page is tried again for which the kernel has no memory, ...
const MEMORY_TRIES: u32 = 200;
/// ... after so long each time, ns; then its reader gets SIGBUS.
const MEMORY_PAUSE_NS: u64 = 5_000_000;

/// What has happened to the child's address space since what the table says, and who was cloned from the child.
#[derive(Default)]
pub(crate) struct Since {
    /// What the parent's other threads did at last before the fork.
    raced: Vec<Event>,
    /// What the child did.
    changes: Vec<Event>,
    born: Vec<Child>,
    /// When the fork was cannot be told, so pages are missing for good.
    pub(crate) is_lost: bool,
}

/// A child's child: like it, at some moment.
struct Child {
    uffd: Uffd,
    raced: Vec<Event>,
    changes: Vec<Event>,
}

impl Since {
    /// Where the page that the table has at `origin` is to go.
    fn place(&self, origin: usize) -> Option<usize> {
        changes::destination(&self.changes, changes::destination(&self.raced, origin)?)
    }

    /// Where the table has the page that the child has at `page`; `None` when the child has none.
    pub(crate) fn origin(&self, page: usize) -> Option<usize> {
        let mut at = page;
        for event in self.changes.iter().rev() {
            match *event {
                Event::Remove { start, end } | Event::Unmap { start, end } if (start..end).contains(&at) => {
                    return None;
                }
                Event::Remap { from, to, len } if (to..to + len).contains(&at) => at = at - to + from,
                Event::Remap { from, len, .. } if (from..from + len).contains(&at) => return None,
                _ => {}
            }
        }
        Some(at)
    }

    /// What the child did to its address space.
    pub(crate) fn changes(&self) -> &[Event] {
        &self.changes
    }

    /// Whether the child has cloned itself.
    pub(crate) fn has_children(&self) -> bool {
        !self.born.is_empty()
    }

    /// Takes an event that was read from the child's userfaultfd.
    pub(crate) fn note(&mut self, runtime: &Runtime, event: Event) {
        match event {
            // Its page is given soon, or its range let go.
            Event::Fault { .. } => {}
            Event::Fork { child } => {
                let uffd = Uffd::from_fd(Fd::from_raw(child));
                runtime.entrust(&uffd, Heir::Later);
                self.born.push(Child { uffd, raced: self.raced.clone(), changes: self.changes.clone() });
            }
            change => self.changes.push(change),
        }
    }
}

/// Gives the child, to which `since` has happened, all its pages, and all that it clones meanwhile theirs.
pub(crate) fn populate(runtime: &Runtime, space: &Space<Cram>, child: &Uffd, since: Since) {
    runtime.is_shared.store(true, Ordering::Relaxed);
    let mut born = populate_one(runtime, space, child, since);
    while let Some(child) = born.pop() {
        let since = Since { raced: child.raced, changes: child.changes, ..Since::default() };
        born.append(&mut populate_one(runtime, space, &child.uffd, since));
        runtime.release(&child.uffd);
    }
}

/// For a child that was forked while `raced` happened: finds out which part of it came before the fork, by what is registered
/// in the child. What has happened to the child since what the table says, none of `raced` applied, is given back.
///
/// `raced` is `read` in the order of happening. madvise(2) does not return before it was read: of those read after the
/// first `read_before` none was over when the child was forked.
pub(crate) fn find_raced(
    runtime: &Runtime,
    space: &Space<Cram>,
    child: &Uffd,
    raced: &[Event],
    (read, read_before): (&[Noted], usize),
) -> Since {
    let mut since = Since::default();
    let before: Vec<Event> = raced
        .iter()
        .filter(|&event| {
            !matches!(event, Event::Remove { .. }) || read[..read_before].iter().any(|noted| noted.event == *event)
        })
        .copied()
        .collect();
    let Some(count) = find_moment(runtime, space, child, &mut since, &before, read) else {
        crate::complain(format_args!(
            "spm: process {}: forked amid changes of its address space, in an order that cannot be told; users of the \
             child's missing pages get SIGBUS\n",
            process::pid()
        ));
        condemn(runtime, space, child, before.iter().copied());
        for born in since.born.drain(..) {
            condemn(runtime, space, &born.uffd, before.iter().chain(&born.changes).copied());
        }
        since.is_lost = true;
        return since;
    };
    since.raced = before[..count].to_vec();
    since
}

/// How many of `raced` had happened when the child was forked; `None` when that cannot be told and makes a difference.
fn find_moment(
    runtime: &Runtime,
    space: &Space<Cram>,
    child: &Uffd,
    since: &mut Since,
    raced: &[Event],
    read: &[Noted],
) -> Option<usize> {
    let mut pages: Vec<usize> = Vec::new();
    for (start, end) in raced.iter().filter_map(|&event| changes::departure(event)) {
        let chunks = space.table.chunks_in(start, end);
        let within = chunks.flat_map(|chunk| (chunk.max(start)..(chunk + CHUNK).min(end)).step_by(PAGE));
        pages.extend(within.filter(|&page| space.table.get(page).is_away()));
    }
    pages.sort_unstable();
    pages.dedup();
    // mremap(2) is followed by an unmapping, but with MREMAP_DONTUNMAP.
    let leaves_empty = |event| match event {
        Event::Remap { .. } => read.iter().any(|noted| noted.event == event && noted.has_echo),
        event => matches!(event, Event::Unmap { .. }),
    };
    let is_possible = find_possible_moments(raced, leaves_empty, |page| may_be_ours(runtime, child, since, page));
    pick_moment(pages, raced, &is_possible)
}

/// For each number of `raced`, whether so many may have happened when the child was forked: what has come to a place and
/// not left it, or leaves it next without having come, is registered there; and nothing is after what left it empty.
fn find_possible_moments(
    raced: &[Event],
    leaves_empty: impl Fn(Event) -> bool,
    mut is_ours: impl FnMut(usize) -> bool,
) -> Vec<bool> {
    let mut is_possible = alloc::vec![true; raced.len() + 1];
    let ends = raced.iter().flat_map(|&event| [changes::departure(event), changes::arrival(event)]);
    let mut places: Vec<usize> = ends.flatten().map(|(start, _)| start).collect();
    places.sort_unstable();
    places.dedup();
    for place in places {
        let is_ours = is_ours(place);
        let has = |range: Option<(usize, usize)>| range.is_some_and(|(start, end)| (start..end).contains(&place));
        // What is known of the place from the event before `first` on.
        let (mut first, mut known) = (0, None);
        for (index, &event) in raced.iter().enumerate() {
            let (leaves, comes) = (has(changes::departure(event)), has(changes::arrival(event)));
            if leaves || comes {
                if known.or(leaves.then_some(true)).is_some_and(|is_there| is_there != is_ours) {
                    is_possible[first..=index].fill(false);
                }
                known = if comes { Some(true) } else { leaves_empty(event).then_some(false) };
                first = index + 1;
            }
        }
        if known.is_some_and(|is_there| is_there != is_ours) {
            is_possible[first..].fill(false);
        }
    }
    is_possible
}

/// The last possible moment, if `pages` are in the same places at all of them.
fn pick_moment(pages: Vec<usize>, raced: &[Event], is_possible: &[bool]) -> Option<usize> {
    let mut places: Vec<Option<usize>> = pages.into_iter().map(Some).collect();
    let mut found: Option<(usize, Vec<Option<usize>>)> = None;
    for (count, &is_possible) in is_possible.iter().enumerate() {
        if is_possible {
            if found.as_ref().is_some_and(|(_, others)| *others != places) {
                return None;
            }
            found = Some((count, places.clone()));
        }
        // What madvise(2) has dropped may be there or not: all the same.
        if let Some(event) = raced.get(count).filter(|event| !matches!(event, Event::Remove { .. })) {
            for place in &mut places {
                *place = place.and_then(|page| changes::destination(core::slice::from_ref(event), page));
            }
        }
    }
    found.map(|(count, _)| count)
}

/// Whether the page was registered in the child when it was forked, as far as can be told.
fn may_be_ours(runtime: &Runtime, child: &Uffd, since: &mut Since, page: usize) -> bool {
    let inaccessible = runtime.guard_start.load(Ordering::Relaxed);
    loop {
        let Some(at) = changes::destination(&since.changes, page) else { return true };
        match child.is_registered(at, PAGE, inaccessible) {
            Ok(is_ours) => return is_ours,
            Err(_) => read_on(runtime, child, since),
        }
    }
}

/// The child has changed something, which is to be read first.
fn read_on(runtime: &Runtime, child: &Uffd, since: &mut Since) {
    let _ = poll(&mut [Poll::readable(child.raw())], Some(1_000_000));
    if let Ok(event) = child.read() {
        since.note(runtime, event);
    }
}

/// Whom the child has cloned is given back.
fn populate_one(runtime: &Runtime, space: &Space<Cram>, child: &Uffd, mut since: Since) -> Vec<Child> {
    runtime.shared().counters.unmanaged_processes.fetch_add(1, Ordering::Relaxed);
    give_all(runtime, space, child, &mut since);
    // Nothing is missing any more. What is not named here is let go when the userfaultfd is closed.
    for chunk in space.table.chunks_in(0, ADDRESS_END) {
        let _ = child.unregister(chunk, CHUNK);
    }
    for &change in since.raced.iter().chain(&since.changes) {
        if let Event::Remap { to, len, .. } = change {
            let _ = child.unregister(to, len);
        }
    }
    since.born
}

fn give_all(runtime: &Runtime, space: &Space<Cram>, child: &Uffd, since: &mut Since) {
    for chunk in space.table.chunks_in(0, ADDRESS_END) {
        for origin in (chunk..chunk + CHUNK).step_by(PAGE) {
            let is_due = space.table.get(origin).is_away();
            if is_due && !give_at_last(runtime, space, child, since, origin) {
                return;
            }
        }
    }
}

/// The child, to which some of `raced` has happened, is not to be given its pages any more: wherever one may be, its user
/// gets SIGBUS. So does whoever touches any other page that is missing there, as long as `spm` runs.
pub(crate) fn condemn(
    runtime: &Runtime,
    space: &Space<Cram>,
    child: &Uffd,
    raced: impl Iterator<Item = Event> + Clone,
) {
    for chunk in space.table.chunks_in(0, ADDRESS_END) {
        for origin in (chunk..chunk + CHUNK).step_by(PAGE).filter(|&page| space.table.get(page).is_away()) {
            poison(runtime, child, origin);
            let mut place = origin;
            for event in raced.clone() {
                if let Some(page) = changes::destination(&[event], place)
                    && page != place
                {
                    poison(runtime, child, page);
                    place = page;
                }
            }
        }
    }
    runtime.entrust(child, Heir::Now);
}

fn poison(runtime: &Runtime, child: &Uffd, page: usize) {
    for _ in 0..MEMORY_TRIES {
        if child.poison(page).stopped != Some(Errno::EAGAIN) {
            return;
        }
        if let Ok(Event::Fork { child }) = child.read() {
            runtime.entrust(&Uffd::from_fd(Fd::from_raw(child)), Heir::Now);
        }
    }
}

/// As [`give`], until it is given, wherever the page is by then; false when the child is gone.
fn give_at_last(runtime: &Runtime, space: &Space<Cram>, child: &Uffd, since: &mut Since, origin: usize) -> bool {
    let mut tries = 0;
    while let Some(page) = since.place(origin) {
        match give(runtime, space, child, page, Some(origin)) {
            Some(Errno::EAGAIN) => read_on(runtime, child, since),
            Some(Errno::ENOMEM) => {
                tries += 1;
                if tries > MEMORY_TRIES && matches!(child.poison(page).stopped, None | Some(Errno::EEXIST)) {
                    crate::complain(format_args!(
                        "spm: process {}: no memory for page {page:#x} of its child, whose user gets SIGBUS\n",
                        process::pid()
                    ));
                    break;
                }
                process::sleep_ns(MEMORY_PAUSE_NS);
            }
            Some(Errno(libc::ESRCH)) => return false,
            // It is there, or the child has no such range (MADV_DONTFORK).
            _ => {
                let _ = child.wake(page, PAGE);
                break;
            }
        }
    }
    true
}

/// What is read past the kernel's cache is read into whole pages.
#[repr(align(4096))]
struct Buffer([u8; PAGE]);

/// Copies what the parent knows of `origin` (`None`: nothing any more) to `page` of the child. Why not, if not.
pub(crate) fn give(
    runtime: &Runtime,
    space: &Space<Cram>,
    child: &Uffd,
    page: usize,
    origin: Option<usize>,
) -> Option<Errno> {
    let copy = origin.map_or(Copy::None, |origin| space.table.get(origin).copy());
    let progress = match copy {
        Copy::Stored(_) | Copy::Swapped(_) => {
            let mut buffer = Buffer([0; PAGE]);
            match runtime.reading(page, runtime.node_of(copy), || space.load(copy, &mut buffer.0)) {
                Ok(()) => child.copy(page, &buffer.0),
                Err(Unloaded::Later) => return Some(Errno::ENOMEM),
                Err(Unloaded::Lost(corrupt)) => {
                    runtime.shared().counters.corrupt_pages.fetch_add(1, Ordering::Relaxed);
                    crate::complain(format_args!(
                        "spm: process {}: page {page:#x} of its child is lost: {corrupt}; its user gets SIGBUS\n",
                        process::pid()
                    ));
                    child.poison(page)
                }
            }
        }
        Copy::Holding(slot) => child.copy_from(page, space.holding.address(slot), PAGE),
        Copy::None => child.zero(page, PAGE),
    };
    progress.stopped
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: usize = 0x10_0000;
    const B: usize = 0x20_0000;
    const LEN: usize = 16 * PAGE;

    fn moved(from: usize, to: usize) -> Event {
        Event::Remap { from, to, len: LEN }
    }

    fn moment(raced: &[Event], is_ours: impl FnMut(usize) -> bool) -> Option<usize> {
        pick_moment(alloc::vec![A, A + PAGE], raced, &find_possible_moments(raced, |_| true, is_ours))
    }

    #[test]
    fn where_the_child_has_the_range_tells_how_often_it_had_moved() {
        let raced = [moved(A, B), moved(B, A), moved(A, B)];
        // After none or two it is at A, after one or three at B: which of the two makes no difference.
        assert_eq!(moment(&raced, |page| page == A), Some(2));
        assert_eq!(moment(&raced, |page| page == B), Some(3));
    }

    #[test]
    fn a_range_that_was_unmapped_late_was_there() {
        let unmapped = [Event::Unmap { start: A, end: A + LEN }];
        assert_eq!(moment(&unmapped, |_| false), Some(1));
        assert_eq!(moment(&unmapped, |_| true), Some(0));
    }

    #[test]
    fn a_range_moved_over_another_one_is_told_from_it() {
        let raced = [Event::Unmap { start: B, end: B + LEN }, moved(A, B)];
        assert_eq!(moment(&raced, |_| true), Some(0));
        assert_eq!(moment(&raced, |page| page == A), Some(1));
        assert_eq!(moment(&raced, |page| page == B), Some(2));
    }

    #[test]
    fn what_contradicts_itself_or_can_be_read_in_two_ways_is_no_moment() {
        assert_eq!(moment(&[moved(A, B)], |_| false), None);
        let is_kept = find_possible_moments(&[moved(A, B)], |_| false, |_| true);
        assert_eq!(pick_moment(alloc::vec![A], &[moved(A, B)], &is_kept), None);
        assert_eq!(moment(&[], |_| true), Some(0));
    }
}
