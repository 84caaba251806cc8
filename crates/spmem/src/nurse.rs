//! The parent's handler serves the first faults of a forked child, until the child can serve itself ([`crate::fork`]).

use core::sync::atomic::Ordering;

use spmem_core::placing::MAX_TARGETS;
use spmem_sys::fd::{Fd, Poll, poll};
use spmem_sys::uffd::{Event, Uffd};
use spmem_sys::{Errno, PAGE, clock, process};

use crate::fault::{Fault, Served, Server};
use crate::fork::{
    Handed, MAX_EVENTS, end_quiet, end_quiet_once_back, hand_over, note_back, note_gone, stand_alone,
};
use crate::populate::{Since, give, populate};
use crate::protocol::Heir;
use crate::runtime::Runtime;
use crate::swap;

/// How long the child may take until it serves itself, ns; then it gets all its pages. Events of the parent's own wait, and
/// nothing leaves.
const PATIENCE_NS: u64 = 1_000_000_000;

/// Serves a child's faults until it asks for its userfaultfd. The parent's own faults are served as well, as many as can be
/// remembered, its events are not: whoever causes one waits these milliseconds. While changes are put off, faults wait likewise. An event that was
/// read and is still to be taken is given back.
pub(crate) fn nurse(runtime: &'static Runtime, server: &mut Server, uffd: &Uffd, child: Uffd) -> Option<Event> {
    let listener = runtime.listener.load(Ordering::Relaxed);
    let mut since = Since::default();
    let may_read = runtime.space.lock().as_ref().is_some_and(|space| !space.changes.is_put_off());
    let mut own_event: Option<Event> = None;
    let mut is_own_waiting = false;
    let deadline_ns = clock::now_ns() + PATIENCE_NS;
    let end = loop {
        // More than can be passed on, or: of two children one was announced, and this need not be it. Or the child may never
        // come.
        if !can_be_handed_over(&since)
            || matches!(own_event, Some(Event::Fork { .. }))
            || clock::now_ns() > deadline_ns
        {
            // Whom it has made before it ended have missing pages still.
            break if is_gone(&child) && !since.has_children() { End::Gone } else { End::Populated };
        }
        let is_full = runtime.space.lock().as_ref().is_none_or(|space| space.is_promoted_full());
        let own = if is_own_waiting || is_full { -1 } else { uffd.raw() };
        let mut entries = [Poll::readable(own), Poll::readable(child.raw()), Poll::readable(listener)];
        let ready = poll(&mut entries, Some(10_000_000)).unwrap_or(0);
        if entries[0].is_ready() {
            match may_read.then(|| uffd.read()) {
                Some(Ok(Event::Fault { address, is_write, is_fenced, .. })) => {
                    let kind = if is_fenced { Fault::Fenced } else { Fault::missing(is_write) };
                    serve_own(runtime, server, uffd, address & !(PAGE - 1), kind);
                }
                Some(Ok(Event::Remove { start, .. }))
                    if start == runtime.holding_start.load(Ordering::Relaxed) =>
                {
                    runtime.space.lock().as_mut().into_iter().for_each(|space| note_back(runtime, space));
                }
                Some(Err(_)) => {}
                other => {
                    own_event = other.and_then(Result::ok);
                    is_own_waiting = true;
                }
            }
        }
        if entries[1].is_ready() {
            match child.read() {
                Ok(Event::Fault { address, is_fenced: true, .. }) => {
                    // What it shares with its parent is copied by the kernel.
                    let _ = child.lift_fence(address & !(PAGE - 1), PAGE);
                }
                Ok(Event::Fault { address, .. }) => {
                    let page = address & !(PAGE - 1);
                    serve_child(runtime, &child, page, since.origin(page));
                }
                Ok(event) => since.note(runtime, event),
                Err(_) => {}
            }
        }
        let may_take_over = entries[2].is_ready() && can_be_handed_over(&since);
        let mut handed = Handed::Nothing;
        if may_take_over {
            // A child that could not read swap files is given what is there.
            let Ok(swap) = swap::lend(runtime) else { break End::Populated };
            handed = pass_on(runtime, &child, &since, swap);
        }
        match handed {
            Handed::Back => break End::Populated,
            Handed::Over => break End::Alone,
            Handed::Nothing if ready == 0 && is_gone(&child) => break End::Gone,
            Handed::Nothing => {}
        }
    };
    if let Some(space) = runtime.space.lock().as_mut() {
        match end {
            End::Populated => {
                populate(runtime, space, &child, since);
                end_quiet_once_back(runtime, space);
            }
            End::Alone => {
                end_quiet(runtime, space);
                // Not before: the next fork's quiet time would end with this one's.
                stand_alone(runtime);
            }
            End::Gone => note_gone(runtime, space),
        }
    }
    runtime.release(&child);
    drop(child);
    own_event
}

/// How nursing has ended.
enum End {
    /// The child is to get all its pages.
    Populated,
    /// It serves itself: it was the one that was announced, as it knew the number.
    Alone,
    /// It has ended.
    Gone,
}

/// Gives a child that connects what it needs to serve itself.
///
/// `spm` lets go of it first: it may answer for none that could have its userfaultfd. Should this process be killed in between
/// nobody holds it, but a child that has connected waits, and ends itself.
fn pass_on(runtime: &Runtime, child: &Uffd, since: &Since, swap: Option<(Fd, [i32; MAX_TARGETS])>) -> Handed {
    if !runtime.release(child) {
        process::sleep_ns(1_000_000);
        return Handed::Nothing;
    }
    let handed = hand_over(runtime, Some(child), since.changes(), swap);
    if handed != Handed::Over {
        runtime.entrust(child, Heir::Later);
    }
    handed
}

/// Not one to which more has happened than can be passed on, or that has forked before it can serve itself: whom it has
/// cloned would be forgotten, with its missing pages.
fn can_be_handed_over(since: &Since) -> bool {
    since.changes().len() <= MAX_EVENTS && !since.has_children()
}

/// Serves one fault of the parent's own.
fn serve_own(runtime: &Runtime, server: &mut Server, uffd: &Uffd, page: usize, fault: Fault) {
    let mut space = runtime.space.lock();
    let Some(space) = space.as_mut() else { return };
    // What cannot be served now (an unread event) wakes its thread, which faults again.
    if server.serve(space, uffd, page, fault) == Served::Later {
        process::sleep_ns(50_000);
        let _ = uffd.wake(page, PAGE);
    }
}

/// Serves one fault of the child: a copy of what the parent knows of `origin`, and the parent knows no less after it.
fn serve_child(runtime: &Runtime, child: &Uffd, page: usize, origin: Option<usize>) {
    let space = runtime.space.lock();
    let Some(space) = space.as_ref() else { return };
    // An unread event of the child's: its thread is woken and faults again, after the event was read.
    let _ = give(runtime, space, child, page, origin);
    let _ = child.wake(page, PAGE);
}

/// A process whose memory is gone answers `ESRCH` to everything.
fn is_gone(child: &Uffd) -> bool {
    child.zero(0, PAGE).stopped == Some(Errno::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_handed_over_with_all_that_has_happened_to_it_or_not_at_all() {
        static RUNTIME: Runtime = Runtime::new();
        let mut since = Since::default();
        for page in 0..MAX_EVENTS {
            assert!(can_be_handed_over(&since));
            since.note(&RUNTIME, Event::Unmap { start: page * PAGE, end: (page + 1) * PAGE });
        }
        assert!(can_be_handed_over(&since), "as many as can be passed on");
        since.note(&RUNTIME, Event::Unmap { start: 0, end: PAGE });
        assert!(!can_be_handed_over(&since));
    }
}
