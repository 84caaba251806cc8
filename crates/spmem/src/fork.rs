//! Fork: the child begins with missing pages, and must be served before it can serve itself.
//!
//! The store is in the program's own memory, so the child inherits it copy-on-write (what is in files: [`crate::swap`]); what has to be arranged is that
//! its picture is whole, and that somebody serves its first faults:
//!
//! 1. [`Runtime::before_fork`] (pthread_atfork(3), in the forking thread): one fork at a time; reclaimers pause; the space is quiet.
//! 2. The kernel copies the address space, then tells the parent's handler ([`Event::Fork`]) and waits until it was
//!    read. Calls that change program memory fail with `EAGAIN` from the copy until then; what other threads unmap is put
//!    off ([`changes`]). So the parent's entries are exactly the child's.
//! 3. [`nurse`](crate::nurse::nurse): the parent's handler serves the child's faults through the child's userfaultfd. `spm` holds it too.
//! 4. [`Runtime::after_fork_in_child`] starts a monitor; [`adopt`] connects to the parent's handler and is given the userfaultfd, and what
//!    the child unmapped meanwhile. From then on the child is a process like any other.
//!
//! `spm` is given each child's userfaultfd as soon as the fork's event is read: should this process be killed, the child's
//! missing pages are still missing, and who touches one gets SIGBUS. Before that the child of fork(3) may read zeros, but no code of
//! the program does: it runs once the child serves itself, and a child that cannot ends.
//!
//! A fork that nobody announced (a raw system call) gets all its pages at once ([`crate::populate`]) and runs unmanaged.
//! So does a child that cannot be told from such a one, that forks before it serves itself, that could not serve itself ([`hurdle`]), or that was
//! forked while other threads moved ranges: its copy of the entries may be torn.
//!
//! A raw fork of another thread may be taken for the one that was announced. So the quiet time, in which the child's picture is copied, lasts
//! until its forking thread is back as well ([`end_quiet_once_back`]).
//!
//! Known hole: a parent killed in the microseconds between reading the event of a raw fork and handing the descriptor to `spm`
//! leaves the child with zeros. Nothing in the kernel closes it; the README lists it.
//!
//! Over 500 lines: both sides of one protocol, which are read against each other.

use crate::changes;
use crate::hurdle::{self, Hurdle};
use crate::protocol::Heir;
use crate::reclaim;
use crate::runtime::{Cram, Runtime, Stage};
use crate::space::Space;
use crate::swap;
use crate::table::{CHUNK, Entry};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use spmem_core::placing::MAX_TARGETS;
use spmem_sys::fd::{Fd, close_all_but};
use spmem_sys::filter::{Need, Refusal, find_refusal};
use spmem_sys::mapping;
use spmem_sys::maps::Maps;
use spmem_sys::pagemap::Pagemap;
use spmem_sys::process::DescriptorLimit;
use spmem_sys::socket::{Listener, MAX_FDS, MAX_NAME, Received, Socket};
use spmem_sys::thread::{self, Table};
use spmem_sys::uffd::{Event, Uffd};
use spmem_sys::{Errno, PAGE, Result, clock, futex, process};

const NONE: u32 = 0;
const ANNOUNCED: u32 = 1;
const NURSING: u32 = 2;
/// Events of the child that are remembered for it; one more and it runs unmanaged.
pub(crate) const MAX_EVENTS: usize = 60;
/// Descriptors an agent's table may need, numbers of the program's in between included.
pub(crate) const DESCRIPTORS: u64 = 64;
/// Longest that fork(2) waits for its child to serve itself.
const PATIENCE_NS: u64 = 5_000_000_000;

/// Whose turn it is to fork, and how far that is. Taken and given back by the forking thread; the handler says when the
/// child stands alone.
pub struct Turn {
    is_taken: AtomicU32,
    state: AtomicU32,
    /// The handler takes part.
    is_announced: AtomicBool,
    /// A quiet time has begun, and whoever ends it lets reclaimers go on: that may be after its turn was given back.
    is_quiet: AtomicBool,
    /// The forking thread has said that its fork(2) is over. The handler's.
    is_back: AtomicBool,
    /// All else that the quiet time lasts for is over. The handler's.
    is_done: AtomicBool,
    signal_mask: AtomicU64,
    nonce: AtomicU64,
    /// RLIMIT_NOFILE as the program set it, while it is raised.
    limit: [AtomicU64; 2],
    has_limit: AtomicBool,
    changed: futex::Event,
}

impl Turn {
    pub(crate) const fn new() -> Self {
        Self {
            is_taken: AtomicU32::new(0),
            state: AtomicU32::new(NONE),
            is_announced: AtomicBool::new(false),
            is_quiet: AtomicBool::new(false),
            is_back: AtomicBool::new(false),
            is_done: AtomicBool::new(false),
            signal_mask: AtomicU64::new(0),
            nonce: AtomicU64::new(0),
            limit: [const { AtomicU64::new(0) }; 2],
            has_limit: AtomicBool::new(false),
            changed: futex::Event::new(),
        }
    }

    /// Waits for the turn.
    pub(crate) fn take(&self) {
        loop {
            let ticket = self.changed.ticket();
            // Acquire pairs with the Release in `give`.
            if self.is_taken.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return;
            }
            self.changed.wait(ticket, Some(10_000_000));
        }
    }

    /// Waits until an earlier fork's quiet time is over: its end would let reclaimers go on that the next one has paused. By who has the turn.
    fn wait_for_noise(&self) {
        loop {
            let ticket = self.changed.ticket();
            // Acquire pairs with the Release in `end_quiet`.
            if !self.is_quiet.load(Ordering::Acquire) {
                return;
            }
            self.changed.wait(ticket, Some(10_000_000));
        }
    }

    /// The child's userfaultfd, and what the child opens to serve it, need descriptors.
    fn raise_limit(&self) {
        let old = DescriptorLimit::raise(DESCRIPTORS);
        self.has_limit.store(old.is_some(), Ordering::Relaxed);
        for (word, limit) in self.limit.iter().zip(old.map_or([0; 2], DescriptorLimit::to_words)) {
            word.store(limit, Ordering::Relaxed);
        }
    }

    fn restore_limit(&self) {
        if self.has_limit.swap(false, Ordering::Relaxed) {
            let words = [0, 1].map(|index: usize| self.limit[index].load(Ordering::Relaxed));
            DescriptorLimit::from_words(words).restore();
        }
    }

    /// Gives it back.
    pub(crate) fn give(&self) {
        self.is_taken.store(0, Ordering::Release);
        self.changed.signal();
    }
}

impl Runtime {
    fn is_own(&self) -> bool {
        self.stage() != Stage::Dormant && self.pid.load(Ordering::Relaxed) == process::pid()
    }

    /// Before fork(2), in the forking thread.
    pub fn before_fork(&self) {
        if !self.is_own() {
            // The child of an unannounced fork: all its pages are here, and it stays unmanaged.
            self.set_stage(Stage::Dormant);
            return;
        }
        let mask = process::set_signal_mask(u64::MAX);
        self.fork_turn.take();
        self.fork_turn.wait_for_noise();
        self.fork_turn.signal_mask.store(mask, Ordering::Relaxed);
        self.fork_turn.raise_limit();
        self.pause_reclaimers();
        self.is_shared.store(true, Ordering::Relaxed);
        if self.stage() != Stage::Active {
            self.fork_turn.is_announced.store(false, Ordering::Relaxed);
            return;
        }
        self.fork_turn.is_announced.store(true, Ordering::Relaxed);
        self.fork_turn
            .nonce
            .store(process::now_ns() ^ self.shared().seed.load(Ordering::Relaxed), Ordering::Relaxed);
        touch_stack();
        // The child begins with these entries: they must say what is so.
        while !self.space.lock().as_mut().is_none_or(Space::quieten) {
            process::sleep_ns(20_000);
        }
        self.fork_turn.is_quiet.store(true, Ordering::Relaxed);
        self.fork_turn.is_back.store(false, Ordering::Relaxed);
        self.fork_turn.is_done.store(false, Ordering::Relaxed);
        self.fork_turn.state.store(ANNOUNCED, Ordering::Release);
    }

    /// After fork(2), in the parent's thread, whether it succeeded or not.
    pub fn after_fork_in_parent(&self) {
        if !self.is_own() {
            return;
        }
        let turn = &self.fork_turn;
        let mask = turn.signal_mask.load(Ordering::Relaxed);
        if turn.is_announced.load(Ordering::Relaxed) {
            // An event of our own: it is read after the fork's, if there is one. So once this call is back, the handler
            // has seen the fork, or there was none.
            // Where a seccomp filter of this thread's refuses it nobody else will say so.
            if mapping::try_discard(self.holding_start.load(Ordering::Relaxed), PAGE).is_err()
                && let Some(space) = self.space.lock().as_mut()
            {
                note_back(self, space);
            }
            let failed = turn.state.compare_exchange(ANNOUNCED, NONE, Ordering::AcqRel, Ordering::Relaxed).is_ok();
            if failed && let Some(space) = self.space.lock().as_mut() {
                end_quiet(self, space);
            }
            // Until the child stands alone this process must not exit, as a daemon's parent would at once.
            let start = process::now_ns();
            loop {
                let ticket = turn.changed.ticket();
                if turn.state.load(Ordering::Acquire) == NONE || process::now_ns() - start > PATIENCE_NS {
                    break;
                }
                turn.changed.wait(ticket, Some(10_000_000));
            }
        } else {
            self.resume_reclaimers();
        }
        turn.restore_limit();
        turn.give();
        process::set_signal_mask(mask);
    }

    /// After fork(2), in the child.
    pub fn after_fork_in_child(&'static self) {
        if self.stage() == Stage::Dormant {
            return;
        }
        let mask = self.fork_turn.signal_mask.load(Ordering::Relaxed);
        let pid = process::pid();
        self.pid.store(pid, Ordering::Relaxed);
        self.reset_after_fork();
        let entry = if self.stage() == Stage::Active { adopt } else { reclaim::monitor_of_child };
        if let Err(errno) = self.start_thread(0, Table::Private, entry) {
            self.go_without(Hurdle::of_thread(errno));
        }
        // The program goes on once the monitor has what it needs: it may lower its limits or leave its name spaces next.
        loop {
            let ticket = self.fork_turn.changed.ticket();
            if self.fork_turn.is_taken.load(Ordering::Acquire) == 0 {
                break;
            }
            self.fork_turn.changed.wait(ticket, Some(10_000_000));
        }
        process::set_signal_mask(mask);
    }

    /// In a forked child whose agent has no thread, by the forking one: it runs without, once all its pages are here.
    fn go_without(&self, hurdle: Hurdle) {
        // In the program's table, which may be full: a socket, or what it takes to say something.
        let limit = DescriptorLimit::widen(2);
        if self.stage() != Stage::Active {
            crate::complain(format_args!(
                "spm: process {}: forked, and {hurdle}; it runs without a budget\n",
                process::pid()
            ));
            self.shared().counters.unmanaged_processes.fetch_add(1, Ordering::Relaxed);
        } else if let Err(errno) = take_all(self, Asker::Program, hurdle) {
            let _ = close_all_but(&[2]);
            crate::complain(format_args!(
                "spm: process {}: forked, {hurdle}, and its parent did not give it its pages: {errno}\n",
                process::pid()
            ));
            process::abort();
        }
        if let Some(limit) = limit {
            limit.restore();
        }
        // All pages are here; whatever the entries say is history.
        self.set_stage(Stage::Dormant);
        self.end_fork_in_child();
    }

    /// The threads that held these do not exist here.
    fn reset_after_fork(&self) {
        #![allow(unsafe_code, reason = "locks of threads that do not exist any more are declared free")]
        // SAFETY: the child has one thread, this one.
        unsafe { self.space.reset() };
        // SAFETY: as above.
        unsafe { self.listener_name.reset() };
        // SAFETY: as above.
        unsafe { self.spm_name.reset() };
        for working in &self.working {
            working.store(0, Ordering::Relaxed);
        }
        // SAFETY: as above.
        unsafe { self.waiting.reset() };
        mapping::forget_kept();
        for fd in [&self.device, &self.socket, &self.uffd, &self.scratch, &self.listener, &self.pagemap] {
            fd.store(-1, Ordering::Relaxed);
        }
        self.dismiss_encoder();
        self.dismiss_porter();
        spmem_sys::fd::set_proc(-1);
        self.has_handler.store(false, Ordering::Relaxed);
        self.own_threads.store(0, Ordering::SeqCst);
        self.number.store(0, Ordering::Relaxed);
        self.leaving.store(0, Ordering::Relaxed);
        self.reclaimers.store(1, Ordering::Relaxed);
        self.fork_turn.state.store(NONE, Ordering::Relaxed);
        self.fork_turn.is_quiet.store(false, Ordering::Relaxed);
        self.fork_turn.is_done.store(false, Ordering::Relaxed);
        self.is_shared.store(true, Ordering::Relaxed);
        if self.stage() != Stage::Active {
            self.is_paused.store(false, Ordering::Relaxed);
        }
    }

    /// The child has opened what it needs.
    pub(crate) fn end_fork_in_child(&self) {
        self.fork_turn.restore_limit();
        self.fork_turn.give();
    }

    /// Never lets pages of `[start, end)` leave, and brings back those that are away. Called by program threads. False if
    /// some cannot come: the program may not read them.
    pub fn keep_in_place(&self, start: usize, end: usize) -> bool {
        self.exclude(start, end);
        // A small range is not worth stopping the reclaimers.
        let is_small = end - start <= CHUNK;
        if self.stage() != Stage::Active || is_small && mapping::populate_read(start, end - start).is_ok() {
            return true;
        }
        let mut at = start;
        while let Some((from, to)) = self.next_away(at, end) {
            if mapping::populate_read(from, to - from).is_err() {
                return false;
            }
            at = to;
        }
        true
    }

    /// The first part of `[start, end)`, within one chunk, in which pages are away.
    fn next_away(&self, start: usize, end: usize) -> Option<(usize, usize)> {
        let find = |space: &Space<Cram>| {
            let mut at = start;
            while at < end {
                let chunk = space.table.next_chunk(at, end)?.max(at);
                let stop = ((chunk / CHUNK + 1) * CHUNK).min(end);
                if space.table.has_away(chunk, stop) {
                    return Some((chunk, stop));
                }
                at = stop;
            }
            None
        };
        self.look(find).flatten()
    }

    /// Before this process ends by its own will: its children that were made by a raw system call get their pages first, as
    /// nobody else has them. Called by program threads; returns after five seconds at the latest, in the parent only.
    pub fn before_exit(&self) {
        let start = process::now_ns();
        let are_served = |space: &Space<Cram>| {
            space.changes.are_all_served() && self.fork_turn.state.load(Ordering::Acquire) != NURSING
        };
        while self.look(are_served) == Some(false) && process::now_ns() - start < PATIENCE_NS {
            process::sleep_ns(1_000_000);
        }
    }

    /// Lets a program thread look at what is known. `None` where nothing has ever left.
    fn look<T>(&self, look: impl FnOnce(&Space<Cram>) -> T) -> Option<T> {
        if !self.is_own() || self.stage() != Stage::Active {
            return None;
        }
        let mask = process::set_signal_mask(u64::MAX);
        self.fork_turn.take();
        // A fork that has given its turn up may still have a child to nurse.
        self.fork_turn.wait_for_noise();
        self.pause_reclaimers();
        touch_stack();
        let found = self.space.lock().as_ref().map(look);
        self.resume_reclaimers();
        self.fork_turn.give();
        process::set_signal_mask(mask);
        found
    }

    /// Keeps reclaimers from touching anything, and waits until none does.
    pub(crate) fn pause_reclaimers(&self) {
        // SeqCst, with `working`: either a reclaimer sees this, or we see it work.
        self.is_paused.store(true, Ordering::SeqCst);
        for working in &self.working {
            loop {
                let ticket = self.pause.ticket();
                if working.load(Ordering::SeqCst) == 0 {
                    break;
                }
                self.pause.wait(ticket, Some(10_000_000));
            }
        }
    }

    pub(crate) fn resume_reclaimers(&self) {
        self.is_paused.store(false, Ordering::SeqCst);
        self.pause.signal();
    }
}

/// Touches the stack that the calling thread's next calls run on, so that they cannot fault while they hold the lock that the handler
/// needs: nothing leaves while reclaimers pause. Not inlined: what lies below its caller's frame is what matters.
#[inline(never)]
fn touch_stack() {
    let mut stack = [0_u8; 2 * PAGE];
    core::hint::black_box(&mut stack);
}

const _: () = assert!(4 + MAX_TARGETS <= MAX_FDS, "a child is given all at once");

/// What a child asks, and what it is given along with its userfaultfd and /dev/userfaultfd: events as words.
const WORDS: usize = 2 + 4 * MAX_EVENTS;

/// A child was forked. The one that was announced is to be nursed; any other gets all its pages ([`changes::settle`]).
///
/// Both need to know what the child has where. That is what the table says, unless other threads are changing the
/// address space at the time: then it waits until all of that was read.
pub(crate) fn on_fork(runtime: &Runtime, space: &mut Space<Cram>, child: Uffd) {
    let turn = &runtime.fork_turn;
    // A raw fork of another thread may be taken for the one that was announced.
    let is_announced =
        turn.state.compare_exchange(ANNOUNCED, NURSING, Ordering::AcqRel, Ordering::Relaxed).is_ok();
    // From here on the child's missing pages survive this process.
    runtime.entrust(&child, Heir::Later);
    changes::note_birth(runtime, space, child, is_announced);
}

/// The child that was announced has all its pages, or is somebody else's to serve: this process goes on.
pub(crate) fn end_quiet(runtime: &Runtime, space: &mut Space<Cram>) {
    space.end_quiet();
    runtime.resume_reclaimers();
    let turn = &runtime.fork_turn;
    // Release: whoever sees it over sees reclaimers go on.
    turn.is_quiet.store(false, Ordering::Release);
    turn.changed.signal();
}

/// The same, but of a child that need not be the one that was announced: that one may still be being copied, until its forking thread is back.
pub(crate) fn end_quiet_once_back(runtime: &Runtime, space: &mut Space<Cram>) {
    if runtime.fork_turn.is_back.load(Ordering::Relaxed) {
        end_quiet(runtime, space);
    } else {
        runtime.fork_turn.is_done.store(true, Ordering::Relaxed);
    }
}

/// The forking thread's mark was read: its fork(2) is over ([`Runtime::after_fork_in_parent`]).
pub(crate) fn note_back(runtime: &Runtime, space: &mut Space<Cram>) {
    runtime.fork_turn.is_back.store(true, Ordering::Relaxed);
    if runtime.fork_turn.is_done.swap(false, Ordering::Relaxed) {
        end_quiet(runtime, space);
    }
}

/// The child that was nursed has ended. If the forking thread is not back it need not be the one that was announced: that is still awaited.
pub(crate) fn note_gone(runtime: &Runtime, space: &mut Space<Cram>) {
    if runtime.fork_turn.is_back.load(Ordering::Relaxed) {
        end_quiet(runtime, space);
        stand_alone(runtime);
    } else {
        runtime.fork_turn.state.store(ANNOUNCED, Ordering::Release);
    }
}

/// Somebody connects who is not being nursed: a child that has all its pages, which is told so.
pub(crate) fn dismiss(runtime: &Runtime) {
    if hand_over(runtime, None, &[], None) == Handed::Over {
        stand_alone(runtime);
    }
}

pub(crate) fn stand_alone(runtime: &Runtime) {
    runtime.fork_turn.state.store(NONE, Ordering::Release);
    runtime.fork_turn.changed.signal();
}

/// What became of a child that connects.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handed {
    /// It has what it needs.
    Over,
    /// It was somebody else, or is gone.
    Nothing,
    /// It cannot serve itself, and is to get all its pages.
    Back,
}

/// Gives the child that connects its userfaultfd (`None`: it has all its pages and runs unmanaged), and what it needs of swap files.
pub(crate) fn hand_over(
    runtime: &Runtime,
    child: Option<&Uffd>,
    changes: &[Event],
    swap: Option<(Fd, [i32; MAX_TARGETS])>,
) -> Handed {
    let listening = Listener::from_fd(Fd::from_raw(runtime.listener.load(Ordering::Relaxed)));
    let accepted = listening.accept();
    let _ = listening.into_fd().into_raw();
    let Ok(socket) = accepted else { return Handed::Nothing };
    let mut question = [0; 9];
    let asked = socket.receive(&mut question).is_ok_and(|received| received.len == question.len());
    let [nonce @ .., can_serve] = question;
    if !asked || u64::from_ne_bytes(nonce) != runtime.fork_turn.nonce.load(Ordering::Relaxed) {
        return Handed::Nothing;
    }
    if child.is_some() && can_serve == 0 {
        return Handed::Back;
    }
    let mut words = [0_u64; WORDS];
    words[1] = changes.len() as u64;
    for (event, words) in changes.iter().zip(words[2..].chunks_exact_mut(4)) {
        let (kind, a, b, c) = match *event {
            Event::Remove { start, end } => (1, start, end, 0),
            Event::Unmap { start, end } => (2, start, end, 0),
            Event::Remap { from, to, len } => (3, from, to, len),
            Event::Fault { .. } | Event::Fork { .. } => continue,
        };
        words.copy_from_slice(&[kind, a as u64, b as u64, c as u64]);
    }
    // What there is, in this order; the first word says what.
    let mut all = [-1; MAX_FDS];
    if let Some(child) = child {
        all[..3].copy_from_slice(&[child.raw(), spmem_sys::fd::proc(), runtime.device.load(Ordering::Relaxed)]);
        if let Some((ledger, files)) = &swap {
            all[3] = ledger.raw();
            all[4..4 + MAX_TARGETS].copy_from_slice(files);
        }
    }
    let (mut fds, mut count) = ([-1; MAX_FDS], 0);
    for (at, fd) in all.into_iter().enumerate().filter(|&(_, fd)| fd >= 0) {
        words[0] |= 1 << at;
        fds[count] = fd;
        count += 1;
    }
    let mut bytes = [0; WORDS * 8];
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    if socket.send(&bytes, &fds[..count]).is_ok() { Handed::Over } else { Handed::Nothing }
}

/// Entry of a forked child's first agent thread: takes its faults over from the parent.
extern "C" fn adopt(argument: usize) -> ! {
    let runtime = Runtime::from_argument(argument);
    let filter = hurdle::find_filter(runtime);
    // Where a call would end the process this thread makes no more of them than it must: it ends soon.
    if !matches!(filter, Some(Refusal::Ends(_))) {
        // A copy of the forking thread's table: nothing in it is ours.
        let _ = close_all_but(&[]);
        clock::allow();
        thread::set_name(c"spm-monitor");
        thread::leave_directory();
    }
    match take_over(runtime, filter) {
        Ok(true) => {}
        Ok(false) => {
            // All pages are here; whatever the entries say is history.
            runtime.set_stage(Stage::Dormant);
            runtime.launch.signal();
            runtime.give_slot_back();
            runtime.end_fork_in_child();
            runtime.end_thread()
        }
        Err(errno) => {
            let pid = process::pid();
            match find_refusal(Need::Asking) {
                Some(refusal) => crate::complain(format_args!(
                    "spm: process {pid}: forked, and {refusal}, by which its agent takes its pages over from its parent; let that through, or \
                     fork before the filter is there\n"
                )),
                None => crate::complain(format_args!(
                    "spm: process {pid}: forked, and cannot take its pages over from its parent: {errno}\n"
                )),
            }
            process::abort();
        }
    }
    reclaim::run_monitor(runtime, true)
}

/// Who asks the parent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asker {
    /// An agent that can serve itself.
    Server,
    /// One that cannot.
    Agent,
    /// The program's thread, whose name spaces are not the agent's to change.
    Program,
}

/// Asks the parent for what it takes to serve itself, or, where it could not, for all its pages: the answer.
fn ask_parent(runtime: &Runtime, asker: Asker, bytes: &mut [u8]) -> Result<Received> {
    let (name, len): ([u8; MAX_NAME], usize) = *runtime.listener_name.lock();
    let can_serve = asker == Asker::Server;
    let socket = match Socket::connect(&name[..len]) {
        // The program has left the network name space that its agent, and `spm`, listen in.
        Err(Errno(libc::ECONNREFUSED)) if asker != Asker::Program => {
            thread::join_network_of(runtime.monitor_tid.load(Ordering::Relaxed))?;
            Socket::connect(&name[..len])?
        }
        other => other?,
    };
    let mut question = [u8::from(can_serve); 9];
    question[..8].copy_from_slice(&runtime.fork_turn.nonce.load(Ordering::Relaxed).to_ne_bytes());
    socket.send(&question, &[])?;
    socket.receive(bytes)
}

/// Has the parent give all pages.
fn take_all(runtime: &Runtime, asker: Asker, hurdle: Hurdle) -> Result<()> {
    let mut bytes = [0; WORDS * 8];
    let mut received = ask_parent(runtime, asker, &mut bytes)?;
    if received.len == 0 {
        // The parent has begun to give all pages, and answers whoever connects once that is done.
        received = ask_parent(runtime, asker, &mut bytes)?;
    }
    let is_given = received.len == bytes.len() && bytes[0] & 1 == 0;
    if !is_given {
        return Err(Errno(libc::EPROTO));
    }
    crate::complain(format_args!(
        "spm: process {}: forked, and {hurdle}; it gets all its pages and runs without a budget\n",
        process::pid()
    ));
    Ok(())
}

fn take_over(runtime: &'static Runtime, filter: Option<Refusal>) -> Result<bool> {
    if filter.is_some() && matches!(find_refusal(Need::Asking), Some(Refusal::Ends(_))) {
        return Err(Errno::EPERM);
    }
    let (hurdle, mut hello) = hurdle::find(runtime, filter);
    if let Some(hurdle) = hurdle {
        return take_all(runtime, Asker::Agent, hurdle).map(|()| false);
    }
    let mut bytes = [0; WORDS * 8];
    let mut received = ask_parent(runtime, Asker::Server, &mut bytes)?;
    if received.len != bytes.len() {
        return Err(Errno(libc::EPROTO));
    }
    let word = |index: usize| u64::from_ne_bytes(core::array::from_fn(|i| bytes[index * 8 + i])) as usize;
    if word(0) & 1 == 0 {
        return Ok(false);
    }
    let mut fds = received.fds.iter_mut();
    let mut given: [Option<Fd>; MAX_FDS] =
        core::array::from_fn(|at| if word(0) >> at & 1 != 0 { fds.next().and_then(Option::take) } else { None });
    let uffd = Uffd::from_fd(given[0].take().ok_or(Errno(libc::EPROTO))?);
    spmem_sys::fd::set_proc(given[1].take().map_or(-1, Fd::into_raw));
    let mut device = given[2].take();
    hello = hello.or_else(|| runtime.hello_again().ok());
    if let Some(other) = hello.and_then(|hello| runtime.meet(hello)) {
        device = device.or(Some(other));
    }
    runtime.device.store(device.map_or(-1, Fd::into_raw), Ordering::Relaxed);
    let _ = runtime.enlist(&uffd, 0);
    let scratch = runtime.make_scratch(runtime.trash_start.load(Ordering::Relaxed))?;
    runtime.scratch.store(scratch.into_raw(), Ordering::Relaxed);
    runtime.listener.store(runtime.make_listener()?.into_raw(), Ordering::Relaxed);
    {
        let mut space = runtime.space.lock();
        let space = space.as_mut().ok_or(Errno::EINVAL)?;
        let pagemap = Pagemap::open();
        swap::adopt(space.swap.as_mut(), given.into_iter().skip(3).flatten())?;
        if !space.store.settle_after_fork() {
            return Err(Errno::ENOMEM);
        }
        space.settle_after_fork(|page| {
            pagemap.as_ref().is_ok_and(|pagemap| pagemap.is_there(page).unwrap_or(false))
        });
        for index in 0..word(1) {
            let at = 2 + 4 * index;
            let (a, b, c) = (word(at + 1), word(at + 2), word(at + 3));
            match word(at) {
                1 => space.drop_range(a, b, Some(Entry::discarded())),
                2 => space.drop_range(a, b, None),
                _ => space.move_range(a, b, c),
            }
        }
        reconcile(space)?;
        space.settle_swap();
    }
    runtime.hire();
    runtime.set_off(uffd);
    runtime.resume_reclaimers();
    Ok(true)
}

/// What another thread of the parent unmapped just before the fork is gone here, and its event went to the parent.
fn reconcile(space: &mut Space<Cram>) -> Result<()> {
    let maps = Maps::open()?;
    for number in 0..space.table.len() {
        let start = space.table.chunk(number).start;
        let mut at = start;
        while at < start + CHUNK {
            let vma = maps.at_or_above(at)?;
            let next = vma.map_or(start + CHUNK, |vma| vma.start.clamp(at, start + CHUNK));
            if next > at {
                space.drop_range(at, next, None);
            }
            at = vma.map_or(start + CHUNK, |vma| vma.end.max(next));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::tests::space;

    /// A fork was announced, and a child taken for its.
    fn quieten(runtime: &Runtime, space: &mut Space<Cram>) {
        assert!(space.quieten());
        runtime.is_paused.store(true, Ordering::SeqCst);
        let turn = &runtime.fork_turn;
        turn.is_quiet.store(true, Ordering::Relaxed);
        turn.is_back.store(false, Ordering::Relaxed);
        turn.state.store(NURSING, Ordering::Relaxed);
    }

    fn is_quiet(runtime: &Runtime) -> bool {
        let is_quiet = runtime.fork_turn.is_quiet.load(Ordering::Relaxed);
        assert_eq!(runtime.is_paused.load(Ordering::Relaxed), is_quiet);
        is_quiet
    }

    #[test]
    fn whatever_becomes_of_a_child_that_may_be_a_raw_forks_it_is_quiet_until_the_forking_thread_is_back() {
        static RUNTIME: Runtime = Runtime::new();
        let (runtime, state) = (&RUNTIME, &RUNTIME.fork_turn.state);
        let mut space = space(1);
        quieten(runtime, &mut space);
        end_quiet_once_back(runtime, &mut space);
        assert!(is_quiet(runtime), "it has all its pages");
        note_back(runtime, &mut space);
        assert!(!is_quiet(runtime));
        assert_eq!(state.load(Ordering::Relaxed), NURSING, "it has still to hear so");

        quieten(runtime, &mut space);
        note_gone(runtime, &mut space);
        assert!(is_quiet(runtime), "it was a raw fork's, or its forking thread sees to the rest");
        assert_eq!(state.load(Ordering::Relaxed), ANNOUNCED);

        quieten(runtime, &mut space);
        note_back(runtime, &mut space);
        assert!(is_quiet(runtime), "nothing has become of it yet");
        note_gone(runtime, &mut space);
        assert!(!is_quiet(runtime));
        assert_eq!(state.load(Ordering::Relaxed), NONE);
    }

    #[test]
    fn the_forking_thread_is_back_once_its_mark_was_read_whatever_is_put_off() {
        static RUNTIME: Runtime = Runtime::new();
        let (runtime, mut space) = (&RUNTIME, space(1));
        runtime.holding_start.store(CHUNK, Ordering::Relaxed);
        quieten(runtime, &mut space);
        let uffd = core::mem::ManuallyDrop::new(Uffd::from_fd(Fd::from_raw(-1)));
        changes::note(
            runtime,
            &mut space,
            &uffd,
            None,
            Event::Remap { from: 8 * CHUNK, to: 9 * CHUNK, len: CHUNK },
        );
        assert!(space.changes.is_put_off());
        changes::note(runtime, &mut space, &uffd, None, Event::Remove { start: CHUNK, end: CHUNK + PAGE });
        note_gone(runtime, &mut space);
        assert!(!is_quiet(runtime), "nobody else would end it");
    }
}
