//! The fault line: fault -> entry -> copy or move back -> wake; and the events that change what is known.
//!
//! One handler thread a process reads the userfaultfd. For a fault it takes the space's lock, finds where the page is
//! and puts it back; for an event it changes the entries before anything else is served. A call the kernel refuses
//! with `EAGAIN` (an event is on its way) waits in a list and is tried again after the next event.
//!
//! Growth is throttled here: while [`Runtime::room_pages`] is used up, faults wait until the reclaimers have made room or
//! core's `Turnstile` lets one pass.
//!
//! Known hole: one handler a process; threads that fault at the same time queue.
//!
//! Over 500 lines: where a page may come from, and what the kernel may answer, case by case.

use crate::changes;
use crate::dense::is_anew;
use crate::follow::Follower;
use crate::fork;
use crate::holding::State;
use crate::lanes::Mover;
use crate::nurse::nurse;
use crate::place::{comes_up, now_ms, raise};
use crate::recorder::{Happening, IS_WRITE};
use crate::runtime::{Cram, Runtime};
use crate::space::{Mode, Space};
use crate::sweep::take_out;
use crate::table::{CHUNK, Copy, Entry};
use core::mem::ManuallyDrop;
use core::sync::atomic::Ordering::Relaxed;
use spmem_core::lru;
use spmem_core::placing::PROMOTION_RATE;
use spmem_core::readahead::{Readahead, WINDOW_MAX};
use spmem_core::reclaim::{Admission, Turnstile};
use spmem_core::tier::Promotion;
use spmem_core::units::Time;
use spmem_node::Handle;
use spmem_node::swapfile::{Unloaded, file};
use spmem_sys::fd::{Fd, Poll, close_all_but, poll};
use spmem_sys::mapping::Mapping;
use spmem_sys::pagemap::{Pagemap, RUNS, Run};
use spmem_sys::uffd::{Event, Uffd};
use spmem_sys::{Errno, PAGE, Result, clock, process, thread};

/// How often waiting faults are looked at, ns.
const RETRY_NS: u64 = 50_000;
/// Events read under one hold of the lock where several threads fault. Where one does, a second one is seldom there: looking for
/// it in vain takes as long as what it would spare.
const MAX_READS: usize = 16;
/// Faults that can wait: a thread has one, or a few where signals interrupt it. Address space, most of it never touched.
pub(crate) const MAX_WAITING: usize = 1 << 16;

/// Why a thread waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The page is missing; it was to be read.
    Read,
    /// The page is missing; it was to be written.
    Write,
    /// The page is there, behind a fence, and was to be written.
    Fenced,
}

impl Fault {
    pub(crate) const fn missing(is_write: bool) -> Self {
        if is_write { Self::Write } else { Self::Read }
    }
}

/// A fault that could not be served yet.
#[derive(Clone, Copy)]
pub(crate) struct Waiting {
    address: usize,
    kind: Fault,
    tid: u32,
    /// Its page was away then. It may come with another one; the thread goes on, and this waits for nobody.
    was_away: bool,
    since_ns: u64,
}

impl Waiting {
    fn page(&self) -> usize {
        self.address & !(PAGE - 1)
    }

    /// Whether this is the same thread again, after a signal.
    fn is_again(&self, before: &Self) -> bool {
        self.tid == before.tid && self.page() == before.page()
    }
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// The thread runs again.
    Yes,
    /// An event has to be read first.
    Later,
}

/// Serves faults: the buffers and what is remembered between faults.
pub(crate) struct Server {
    runtime: &'static Runtime,
    pages: Mapping,
    zeros: Mapping,
    readahead: Readahead,
    follower: Follower,
    turnstile: Turnstile,
    promotion: Promotion,
    /// Pages that came with the last one served, itself included; none where it was there already.
    brought: usize,
    pub(crate) pagemap: Option<ManuallyDrop<Pagemap>>,
}

/// Entry of the handler thread.
pub(crate) extern "C" fn handler(argument: usize) -> ! {
    clock::allow();
    thread::set_name(c"spm-fault");
    thread::set_nice(-10);
    let runtime = Runtime::from_argument(argument);
    let Some(uffd) = runtime.await_userfaultfd() else { runtime.end_thread() };
    runtime.handler_tid.store(process::tid(), Relaxed);
    let uffd = Uffd::from_fd(Fd::from_raw(uffd));
    let Ok(mut server) = Server::new(runtime) else { crate::die_without_memory() };
    server.run(&uffd)
}

impl Server {
    pub(crate) fn new(runtime: &'static Runtime) -> Result<Self> {
        let pages = Mapping::new(WINDOW_MAX as usize * PAGE, c"spmem pages")?;
        let zeros = Mapping::new(PAGE, c"spmem zeros")?;
        for mapping in [&pages, &zeros] {
            let _ = mapping.keep_from_children();
        }
        Ok(Self {
            runtime,
            pages,
            zeros,
            readahead: Readahead::default(),
            follower: Follower::new(&runtime.home),
            turnstile: Turnstile::default(),
            promotion: Promotion::new(PROMOTION_RATE, Time(clock::now_ns())),
            brought: 0,
            pagemap: runtime.shared_pagemap(),
        })
    }

    fn run(&mut self, uffd: &Uffd) -> ! {
        let runtime = self.runtime;
        let mut waiting = runtime.waiting.lock();
        let mut is_settled = true;
        let listener = runtime.listener.load(Relaxed);
        let mut read_before = None;
        loop {
            let mut entries = [Poll::readable(uffd.raw()), Poll::readable(listener)];
            let is_idle = waiting.is_empty() && is_settled && read_before.is_none();
            let _ = poll(&mut entries, (!is_idle).then_some(RETRY_NS));
            let is_orphan;
            let ward = {
                // Events are read and applied under one hold of the lock: the kernel counts an event as over once it is
                // read, and a sweep that got the lock in between would act on what is known no longer.
                let mut space = runtime.space.lock();
                let Some(space) = space.as_mut() else { process::abort() };
                for _ in 0..if self.follower.is_bound() { 1 } else { MAX_READS } {
                    let event = match read_before.take().map_or_else(|| uffd.read(), Ok) {
                        Ok(event) => event,
                        Err(Errno::EAGAIN) => break,
                        // The descriptor is ours alone; without it missing pages would turn into zeros.
                        Err(errno) => {
                            let hint = if errno == Errno(libc::EMFILE) {
                                "; a fork needs a descriptor, and RLIMIT_NOFILE is too low (README, Limits)"
                            } else {
                                ""
                            };
                            // To say so takes one, too.
                            let _ = close_all_but(&[uffd.raw()]);
                            crate::complain(format_args!(
                                "spm: process {}: userfaultfd: {errno}{hint}\n",
                                process::pid()
                            ));
                            process::abort()
                        }
                    };
                    match event {
                        Event::Fault { address, is_write, is_fenced, tid } => {
                            self.follower.note(tid);
                            let now = clock::now_ns();
                            let was_away = space.table.get(address).is_away();
                            let kind = if is_fenced { Fault::Fenced } else { Fault::missing(is_write) };
                            let fault = Waiting { address, kind, tid, was_away, since_ns: now };
                            if let Some(before) = waiting.iter_mut().find(|before| fault.is_again(before)) {
                                before.kind = kind;
                            } else if space.is_settled() && self.try_serve(space, uffd, fault, now) {
                                self.take_along(space, uffd);
                            } else {
                                assert!(
                                    waiting.len() < MAX_WAITING,
                                    "more than {MAX_WAITING} threads wait for their pages"
                                );
                                waiting.push(fault);
                            }
                        }
                        Event::Fork { child: descriptor } => {
                            fork::on_fork(runtime, space, Uffd::from_fd(Fd::from_raw(descriptor)));
                        }
                        event => changes::note(runtime, space, uffd, self.pagemap.as_deref(), event),
                    }
                    self.settle(space, uffd);
                    if space.changes.ward.is_some() {
                        break;
                    }
                }
                is_settled = self.settle(space, uffd);
                if is_settled {
                    waiting.retain(|&fault| !self.try_serve(space, uffd, fault, clock::now_ns()));
                }
                is_orphan = entries[1].is_ready() && space.changes.are_all_served();
                space.changes.ward.take()
            };
            if is_orphan {
                fork::dismiss(runtime);
            }
            // Before anything changes that the child still needs.
            if let Some(child) = ward {
                read_before = nurse(runtime, self, uffd, child);
                is_settled = false;
            }
        }
    }

    /// Applies the changes that were put off, if it is time. Whether none is put off any more.
    fn settle(&self, space: &mut Space<Cram>, uffd: &Uffd) -> bool {
        changes::settle(self.runtime, space, uffd, self.pagemap.as_deref())
    }

    /// Serves a fault unless it has to wait.
    fn try_serve(&mut self, space: &mut Space<Cram>, uffd: &Uffd, fault: Waiting, now: u64) -> bool {
        let runtime = self.runtime;
        let waited = now.saturating_sub(fault.since_ns);
        let page = fault.page();
        if fault.was_away && !space.table.get(page).is_away() {
            return wake(uffd, page) == Served::Yes;
        }
        let admission = Admission {
            room_pages: runtime.room_pages.load(Relaxed),
            patience_ns: runtime.patience_ns.load(Relaxed),
        };
        // A fork waits for reclaimers, and threads for the fork: nobody would make room.
        if !runtime.is_paused.load(Relaxed) && !self.turnstile.admits(now, fault.since_ns, admission) {
            if waited == 0 {
                runtime.demand.signal();
            }
            return false;
        }
        let happening = happening(space.table.get(page));
        self.brought = 0;
        let served = self.serve(space, uffd, page, fault.kind);
        if served == Served::Yes {
            let shared = runtime.shared();
            // The kernel also tells of a thread that comes while another's fault for the page is served, though it need not wait.
            if self.brought > 0 {
                let is_write = if fault.kind == Fault::Read { 0 } else { IS_WRITE };
                runtime.record(happening, page, self.brought as u64 | is_write);
            }
            shared.faults.record(clock::now_ns().saturating_sub(fault.since_ns));
            if waited > 0 {
                shared.counters.throttled_ns.fetch_add(waited, Relaxed);
            }
        }
        served == Served::Yes
    }

    /// A page in, a page out: for what a fault has brought in, what was let go moves out, where that is the handler's.
    fn take_along(&self, space: &mut Space<Cram>, uffd: &Uffd) {
        let Some(pagemap) = self.pagemap.as_deref().filter(|_| self.follower.is_bound()) else { return };
        if space.mode != Mode::Normal || !space.is_settled() {
            return;
        }
        let runtime = self.runtime;
        // Nothing leaves while reclaimers pause, so this counts as one of them.
        runtime.try_working(|| {
            let mut moved = 0;
            while moved < self.brought
                && !space.outgoing.is_busy_full()
                && let Some(run) = space.outgoing.take()
            {
                let progress = take_out(runtime, space, uffd, pagemap, run);
                if progress.stopped == Some(Errno::EBUSY) {
                    let _ = space.outgoing.note_busy(run.0 + progress.done);
                }
                moved += (progress.done / PAGE).max(1);
            }
            if runtime.keeps_pace.load(Relaxed)
                && let Some(mut lanes) = space.lanes.take()
            {
                lanes.keep_pace(runtime, space, &Mover::new(runtime, uffd, pagemap), self.brought);
                space.lanes = Some(lanes);
            }
        });
    }

    /// Puts the page back, from wherever it is. `uffd` is this process's, or that of a child being nursed.
    pub(crate) fn serve(&mut self, space: &mut Space<Cram>, uffd: &Uffd, page: usize, fault: Fault) -> Served {
        if fault == Fault::Fenced {
            self.brought = usize::from(space.table.get(page).target().is_some());
            if !self.take_from_fence(space, uffd, page) {
                return lift_fence(uffd, page);
            }
        }
        let entry = space.table.get(page);
        match entry.copy() {
            Copy::Stored(_) | Copy::Swapped(_) if entry.is_away() => self.promote(space, uffd, page, entry),
            Copy::Holding(slot) if entry.is_away() => self.rescue(space, uffd, page, entry, slot),
            _ => self.fill(space, uffd, page, entry, fault),
        }
    }

    /// R17: a write moves the page first. Takes it out of its place, whether it could; then it is served like any page that is away.
    /// What cannot be taken is moved by the kernel if that can be, and written where it is.
    fn take_from_fence(&mut self, space: &mut Space<Cram>, uffd: &Uffd, page: usize) -> bool {
        let (entry, runtime) = (space.table.get(page), self.runtime);
        let is_own = uffd.raw() == runtime.uffd.load(Relaxed);
        if entry.is_away() && is_own {
            return true;
        }
        let Some(target) = entry.target().filter(|_| is_own) else { return false };
        if let (Some(pagemap), Some((slot, 1))) = (&self.pagemap, space.holding.room(1))
            && space.mode == Mode::Normal
            && runtime.pinned_in(page, page + PAGE).is_none()
            && uffd.move_present(space.holding.address(slot), page, PAGE, pagemap).done == PAGE
        {
            let slot = space.holding.push(page, None);
            // Written, so it comes up: the trial is as short as can be.
            space.holding.begin_trial(slot, target, now_ms());
            space.table.set(page, Entry::away(Copy::Holding(slot), entry.age()));
            return true;
        }
        raise(runtime, space, target, &[page]);
        false
    }

    /// From node 1: decode, verify, copy in. An equal copy is kept (it may spare a compression). From a swap file: read, verify, copy in.
    fn promote(&mut self, space: &mut Space<Cram>, uffd: &Uffd, page: usize, entry: Entry) -> Served {
        let room = self.runtime.room_pages.load(Relaxed);
        let window = self.readahead.window((page / PAGE) as u64, room) as usize;
        let window = window.min((CHUNK - page % CHUNK) / PAGE);
        let mut count = 0;
        while count < window {
            let next = space.table.get(page + count * PAGE);
            if !next.is_away() || !matches!(next.copy(), Copy::Stored(_) | Copy::Swapped(_)) {
                break;
            }
            let buffer = self.pages.bytes_mut(count * PAGE, PAGE);
            let Ok(buffer) = <&mut [u8; PAGE]>::try_from(buffer) else { break };
            let load = || space.load(next.copy(), buffer);
            let node = self.runtime.node_of(next.copy());
            match self.runtime.reading(page + count * PAGE, node, load) {
                Ok(()) => count += 1,
                Err(Unloaded::Lost(corrupt)) if count == 0 => return self.poison(uffd, page, &corrupt),
                Err(_) => break,
            }
        }
        if count == 0 {
            return Served::Later;
        }
        let mut progress = uffd.copy(page, self.pages.bytes(0, count * PAGE));
        if progress.done == 0 && count > 1 {
            // The mapping ends, or a page is there, somewhere behind the one asked for.
            progress = uffd.copy(page, self.pages.bytes(0, PAGE));
        }
        let done = progress.done / PAGE;
        self.brought = done;
        self.readahead.advance((page / PAGE) as u64, done.max(1) as u32);
        self.account(done);
        let shared = self.runtime.shared();
        shared.counters.readahead_pages.fetch_add(done.saturating_sub(1) as u64, Relaxed);
        for at in (page..page + done * PAGE).step_by(PAGE) {
            let entry = space.table.get(at);
            let mut copy = entry.copy();
            if let Copy::Swapped(handle) = copy {
                if let Some(target) = Handle::from_raw(handle).and_then(|handle| shared.targets.get(file(handle)))
                {
                    target.promoted_pages.fetch_add(1, Relaxed);
                }
                self.note_back_from_file(space, at, entry);
                continue;
            }
            shared.counters.promoted_pages.fetch_add(1, Relaxed);
            space.returned.0 += 1;
            space.returned.1 += u64::from(is_anew(copy));
            if space.mode == Mode::Normal && !self.runtime.keeps_copies.load(Relaxed) {
                space.forget_copy(entry);
                copy = Copy::None;
            }
            self.note_present(space, at, Entry::present(copy, lru::on_promoted(entry.age())));
        }
        match progress.stopped {
            _ if done > 0 => Served::Yes,
            Some(Errno::EEXIST) => {
                if let Copy::Swapped(_) = entry.copy() {
                    self.note_back_from_file(space, page, entry);
                } else {
                    self.note_present(space, page, Entry::present(entry.copy(), entry.age()));
                }
                wake(uffd, page)
            }
            stopped => self.refused(uffd, page, stopped),
        }
    }

    /// No copy is kept there of a page that is in its place: it would have to be read to be compared.
    fn note_back_from_file(&self, space: &mut Space<Cram>, page: usize, entry: Entry) {
        if space.mode == Mode::Normal {
            space.forget_copy(entry);
        }
        self.note_present(space, page, Entry::present(Copy::None, lru::on_promoted(entry.age())));
    }

    /// From the holding area: moved back as it is, or copied where moving cannot be.
    fn rescue(&mut self, space: &mut Space<Cram>, uffd: &Uffd, page: usize, entry: Entry, slot: u32) -> Served {
        let from = space.holding.address(slot);
        let age = lru::on_rescued(entry.age());
        let is_own = uffd.raw() == self.runtime.uffd.load(Relaxed);
        let mut is_moved = false;
        let mut progress = None;
        // A page of a mapped node that comes up is copied, and else moved back as it is.
        let target = space.holding.get(slot).target();
        let stays = target.filter(|&target| is_own && !self.comes_up(space, slot, target));
        if is_own
            && (target.is_none() || stays.is_some())
            && space.is_movable(slot)
            && let Some(pagemap) = &self.pagemap
        {
            let moved = uffd.move_present(page, from, PAGE, pagemap);
            is_moved = moved.stopped.is_none();
            // Not to be moved (read-only mapping, shared since a fork): copied below.
            if is_moved || matches!(moved.stopped, Some(Errno::EAGAIN | Errno::EEXIST)) {
                progress = Some(moved);
            }
        }
        let progress = progress.unwrap_or_else(|| uffd.copy_from(page, from, PAGE));
        let is_there = progress.stopped.is_none() || progress.stopped == Some(Errno::EEXIST);
        if progress.stopped == Some(Errno::EFAULT) {
            return match lose_held(self.runtime, space, uffd, slot) {
                Ok(()) => wake(uffd, page),
                Err(errno) => self.refused(uffd, page, Some(errno)),
            };
        }
        if !is_there {
            return self.refused(uffd, page, progress.stopped);
        }
        if progress.stopped.is_none() {
            self.brought = 1;
            self.runtime.shared().counters.rescued_pages.fetch_add(1, Relaxed);
        }
        if !is_moved {
            self.account(1);
        }
        if space.mode == Mode::Quiet {
            space.note_promoted(page);
        } else if space.holding.get(slot).state == State::Busy {
            // Its compressor finds out, and keeps the result as a copy.
            space.table.set(page, Entry::present(Copy::Holding(slot), age));
        } else {
            let kept = space.holding.forget_kept(slot).map_or(Copy::None, Copy::Stored);
            let now = match stays {
                Some(target) if is_moved => Entry::placed(target, age),
                _ => Entry::present(kept, age),
            };
            if is_moved {
                space.holding.vacate(slot);
            } else {
                space.holding.kill(slot);
            }
            if let Some(target) = target.filter(|_| !is_moved) {
                self.runtime.shared().targets[target].promoted_pages.fetch_add(1, Relaxed);
            }
            space.table.set(page, now);
        }
        if progress.stopped.is_some() { wake(uffd, page) } else { Served::Yes }
    }

    /// Whether a page that was touched on trial goes to ordinary memory: behind a fence always, as it may be a write.
    fn comes_up(&mut self, space: &Space<Cram>, slot: u32, target: usize) -> bool {
        let is_fenced = self.runtime.shared().targets[target].is_fenced.load(Relaxed) != 0;
        is_fenced || comes_up(&mut self.promotion, space.holding.get(slot).trial_ms(now_ms()))
    }

    /// A page that is nowhere: first touch, or touched again after madvise(2) dropped it.
    fn fill(&mut self, space: &mut Space<Cram>, uffd: &Uffd, page: usize, entry: Entry, fault: Fault) -> Served {
        // One page at a time: the next ones may be guard regions (MADV_GUARD_INSTALL), which a copy would fill.
        let progress =
            if fault != Fault::Read { uffd.copy(page, self.zeros.bytes(0, PAGE)) } else { uffd.zero(page, PAGE) };
        let done = progress.done / PAGE;
        self.brought = done;
        self.account(done);
        if done == 0 {
            return match progress.stopped {
                Some(Errno::EEXIST) => wake(uffd, page),
                stopped => self.refused(uffd, page, stopped),
            };
        }
        self.runtime.shared().counters.zero_filled_pages.fetch_add(done as u64, Relaxed);
        if uffd.raw() == self.runtime.uffd.load(Relaxed) {
            // It really was missing: what an older copy says is history.
            if !entry.is_empty() {
                space.forget_copy(entry);
                space.table.set(page, Entry::default());
            }
        }
        Served::Yes
    }

    /// R20: wrong bytes are never handed out; the page's user gets SIGBUS and everybody is told.
    fn poison(&self, uffd: &Uffd, page: usize, corrupt: &spmem_node::Corrupt) -> Served {
        self.runtime.shared().counters.corrupt_pages.fetch_add(1, Relaxed);
        crate::complain(format_args!(
            "spm: process {}: page {page:#x} is lost: {corrupt}; its user gets SIGBUS\n",
            process::pid()
        ));
        let progress = uffd.poison(page);
        match progress.stopped {
            None | Some(Errno::EEXIST) => wake(uffd, page),
            stopped => self.refused(uffd, page, stopped),
        }
    }

    /// The kernel did not let us.
    fn refused(&self, uffd: &Uffd, page: usize, stopped: Option<Errno>) -> Served {
        match stopped {
            Some(Errno::EAGAIN | Errno::ENOMEM) => Served::Later,
            // No such mapping any more, or the process is going: the thread finds out by itself.
            _ => wake(uffd, page),
        }
    }

    fn note_present(&self, space: &mut Space<Cram>, page: usize, entry: Entry) {
        if space.mode == Mode::Quiet {
            space.note_promoted(page);
        } else {
            space.table.set(page, entry);
        }
    }

    fn account(&self, pages: usize) {
        self.runtime.room_pages.fetch_sub(pages as i64, Relaxed);
    }
}

/// The memory of a page in the holding area has failed (R20): its user gets SIGBUS where it was, once; the slot is given back. `uffd`:
/// whose page it is, this process's or a child's that is being nursed; then this process keeps the slot, for its own page.
///
/// # Errors
/// Nothing has changed: where the page is missing without a mark it would read as zeros.
pub(crate) fn lose_held(runtime: &Runtime, space: &mut Space<Cram>, uffd: &Uffd, slot: u32) -> Result<()> {
    let page = space.holding.get(slot).owner;
    match uffd.poison(page).stopped {
        None | Some(Errno::EEXIST) => {}
        Some(errno) => return Err(errno),
    }
    runtime.shared().counters.corrupt_pages.fetch_add(1, Relaxed);
    crate::complain(format_args!(
        "spm: process {}: page {page:#x} is lost: the memory it was in has failed on its way out; its user gets SIGBUS\n",
        process::pid()
    ));
    if space.mode != Mode::Quiet && uffd.raw() == runtime.uffd.load(Relaxed) {
        if let Some(kept) = space.holding.forget_kept(slot) {
            space.forget(kept);
        }
        space.table.set(page, Entry::default());
        space.holding.kill(slot);
    }
    Ok(())
}

/// What a fault for the page of an entry is to a trace.
fn happening(entry: Entry) -> Happening {
    match entry.copy() {
        Copy::Stored(_) | Copy::Swapped(_) if entry.is_away() => Happening::FaultNode,
        Copy::Holding(_) if entry.is_away() => Happening::FaultHolding,
        _ if entry.target().is_some() => Happening::FaultMapped,
        _ => Happening::FaultNowhere,
    }
}

/// Threads that wait to write the page do.
fn lift_fence(uffd: &Uffd, page: usize) -> Served {
    match uffd.lift_fence(page, PAGE) {
        Err(Errno::EAGAIN) => Served::Later,
        // No such mapping any more: the thread finds out by itself.
        Err(_) => wake(uffd, page),
        Ok(()) => Served::Yes,
    }
}

/// Threads that wait for the page look again.
fn wake(uffd: &Uffd, page: usize) -> Served {
    let _ = uffd.wake(page, PAGE);
    Served::Yes
}

/// Ranges up to this size get their chunks without a look at what is present, bytes.
const SMALL: usize = 16 << 20;

/// Makes sure that every present page of a range about to be dropped has an entry to say so. A range registered by the
/// gate has no chunks yet; a sweep that made one only then would take pages away before madvise(2) drops them, and
/// they would come back.
fn cover(space: &mut Space<Cram>, pagemap: &Pagemap, start: usize, end: usize) {
    if end - start <= SMALL {
        (start / CHUNK * CHUNK..end).step_by(CHUNK).for_each(|chunk| {
            space.table.find_or_add(chunk);
        });
        return;
    }
    let mut runs = [Run::default(); RUNS];
    let mut at = start;
    while at < end {
        let Ok((count, looked)) = pagemap.scan(at, end, usize::MAX, &mut runs) else { process::abort() };
        for run in &runs[..count] {
            (run.start as usize / CHUNK * CHUNK..run.end as usize).step_by(CHUNK).for_each(|chunk| {
                space.table.find_or_add(chunk);
            });
        }
        at = looked;
    }
}

/// Applies an event to what is known. Its caller waits in the kernel until it was read; see [`Server::run`] for the rest.
pub(crate) fn apply(runtime: &Runtime, space: &mut Space<Cram>, pagemap: Option<&Pagemap>, event: Event) {
    match event {
        Event::Remove { start, .. } if space.holding.contains(start) => {}
        Event::Remove { start, end } => {
            // Without a pagemap nothing is swept.
            if let Some(pagemap) = pagemap {
                cover(space, pagemap, start, end);
            }
            space.drop_range(start, end, Some(Entry::discarded()));
            runtime.record(Happening::Drop, start, ((end - start) / PAGE) as u64);
        }
        Event::Unmap { start, end } => {
            runtime.unmaps.fetch_add(1, Relaxed);
            space.drop_range(start, end, None);
            runtime.record(Happening::Drop, start, ((end - start) / PAGE) as u64);
        }
        Event::Remap { from, to, len } => {
            runtime.unmaps.fetch_add(1, Relaxed);
            space.move_range(from, to, len);
            runtime.record(Happening::Drop, from, (len / PAGE) as u64);
        }
        Event::Fault { .. } | Event::Fork { .. } => {}
    }
}

#[cfg(test)]
mod tests;
