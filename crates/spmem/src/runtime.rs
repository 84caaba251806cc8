//! The runtime of one process: what its threads share, and how they begin.
//!
//! Life of a process under management: [`Runtime::attach`] (in the program's first thread, before `main`) says hello
//! to `spm` and starts the *monitor*, a raw thread with a descriptor table of its own. The monitor measures and, once
//! the tree nears its budget, [`Runtime::activate`]s: a userfaultfd, the holding area, node 1, a fault handler and
//! more reclaimers. Until then nothing of the program is touched, and it runs at native speed.
//!
//! Locks, in this order: `fork_turn` (one fork at a time; taken by program threads) -> `space`. Reclaimers announce
//! themselves in `working` before they touch anything and stay out while `is_paused`.
//!
//! Over 500 lines: what a process's threads share is declared in one place, and shut down and begun anew there after a fork.

#![allow(
    unsafe_code,
    reason = "starts raw threads and refers to a mapping that is never unmapped: the control page"
)]

use crate::control::{self, Control, NODE_1, Slot};
use crate::demote::TRASH_LEN;
use crate::encoder::Exchange;
use crate::fault;
use crate::follow::Home;
use crate::fork;
use crate::frames::{Frames, lend_metadata};
use crate::holding::Holding;
use crate::hurdle::Hurdle;
use crate::porter::{Crossing, STAGING_LEN};
use crate::protocol::{Heir, Kind, MAGIC, Message};
use crate::reclaim;
use crate::recorder::{Happening, Record};
use crate::space::Space;
use crate::swap;
use crate::table::{CHUNK, Copy};
use alloc::vec::Vec;
use core::mem::ManuallyDrop;
use core::sync::atomic::{
    AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, compiler_fence,
};
use spmem_core::reclaim::{MAX_RECLAIMERS, holding_slots, reclaimers};
use spmem_core::units::{Bytes, FrameCount};
use spmem_node::Handle;
use spmem_node::compressed::{GrantedFrames, Store};
use spmem_node::swapfile::file;
use spmem_sys::fd::Fd;
use spmem_sys::filter::{Need, Refusal, find_refusal};
use spmem_sys::futex::{Event, Lock};
use spmem_sys::mapping::Mapping;
use spmem_sys::pagemap::Pagemap;
use spmem_sys::socket::{Listener, MAX_NAME, Socket};
use spmem_sys::thread::{self, Table};
use spmem_sys::uffd::{Uffd, Watch, feature};
use spmem_sys::{Errno, PAGE, Result, process};

/// The back end of node 1 in this process.
pub type Cram = Store<GrantedFrames, Frames>;

/// Bytes of an agent thread's stack.
const STACK: usize = 256 << 10;
/// What the agent's heap grows to.
const HEAP_ROOM: usize = 8 << 20;
/// And the metadata of node 1's frames: at most this part of what they hold.
const METADATA_PART: usize = 1000;
/// Where address space or data are limited (setrlimit(2)) the agent takes at most one in so many parts of what is left, and node 1's frames as much:
/// the limit is the program's.
const LIMITED_PART: usize = 8;
/// Scratch areas: the reclaimers' and the handler's.
const TRASHES: usize = MAX_RECLAIMERS + 1;
/// Excluded ranges that are told apart: the C library's and the dynamic linker's own data, ours, what is wiped on fork.
pub const MAX_EXCLUDED: usize = 256;
/// Thread control blocks that can be told apart; with more, nothing leaves (see [`Runtime::pin_thread`]).
pub const MAX_PINS: usize = 1 << 16;

/// How far a process has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
#[repr(u32)]
pub enum Stage {
    /// Not under management.
    Dormant = 0,
    /// Measured only.
    Watched = 1,
    /// Pages may leave.
    Active = 2,
}

/// What the threads of one process share. Lives for ever, in memory that never leaves.
pub struct Runtime {
    control: AtomicPtr<Control>,
    pub(crate) slot: AtomicUsize,
    pub(crate) pid: AtomicU32,
    /// The number by which its slot is known; 0: it has none.
    pub(crate) number: AtomicU32,
    /// `spm`'s pid namespace is this process's.
    pub(crate) is_among_others: AtomicBool,
    stage: AtomicU32,
    /// Descriptors in the agent threads' table; -1 when there is none.
    pub(crate) device: AtomicI32,
    pub(crate) socket: AtomicI32,
    pub(crate) uffd: AtomicI32,
    /// Whether its ranges are registered so that the kernel tells of accesses.
    pub(crate) is_tracked: AtomicBool,
    pub(crate) scratch: AtomicI32,
    pub(crate) listener: AtomicI32,
    /// One pagemap for all agent threads; without it nothing is swept.
    pub(crate) pagemap: AtomicI32,
    pub(crate) listener_name: Lock<([u8; MAX_NAME], usize)>,
    pub(crate) spm_name: Lock<([u8; MAX_NAME], usize)>,
    pub(crate) space: Lock<Option<Space<Cram>>>,
    /// The fault handler's, as long as it runs. Here because a forked child uses the same memory again.
    pub(crate) waiting: Lock<Vec<fault::Waiting>>,
    /// Where the holding area is; 0 before it is there.
    pub(crate) holding_start: AtomicUsize,
    /// A page that nobody may read, to ask the kernel questions with.
    pub(crate) guard_start: AtomicUsize,
    /// One scratch area a reclaimer, and the handler's: where dropped pages go.
    pub(crate) trash_start: AtomicUsize,
    /// Pages that may still come before growth has to wait; below zero it waits.
    pub(crate) room_pages: AtomicI64,
    /// Longest that a fault on a page that comes back waits for room.
    pub(crate) patience_ns: AtomicU64,
    /// Pages whose RAM was given back since the start.
    pub(crate) freed_pages: AtomicU64,
    /// The handler has as many pages leave as come in (core's `Pace`), ...
    pub(crate) keeps_pace: AtomicBool,
    /// ... and these, which are not with the encoder yet.
    pub(crate) due_pages: AtomicI64,
    /// Faults after which it did.
    pub(crate) turns: AtomicU64,
    /// There is room for copies of pages that have come back.
    pub(crate) keeps_copies: AtomicBool,
    /// Reclaim frees nothing any more: growth must not wait for it.
    pub(crate) is_stuck: AtomicBool,
    /// Pages may be shared with a relative: count proportionally.
    pub(crate) is_shared: AtomicBool,
    pub(crate) is_paused: AtomicBool,
    pub(crate) working: [AtomicU32; MAX_RECLAIMERS + 1],
    /// Reclaimers that have begun; each takes the next number.
    pub(crate) reclaimers: AtomicU32,
    /// Address of what is shared with the encoder; 0 for none.
    pub(crate) exchange: AtomicUsize,
    /// Where pages that come from the porter arrive; 0 where no page is placed.
    pub(crate) staging_start: AtomicUsize,
    /// Address of what is shared with the porter; 0 for none.
    crossing: AtomicUsize,
    /// It owes an answer for long: there is work for others.
    pub(crate) is_encoder_late: AtomicBool,
    /// Several processes have filled node 1 together (R18).
    pub(crate) is_node_full: AtomicBool,
    /// Where the handler is bound, for the monitor to follow.
    pub(crate) home: Home,
    /// Threads of the agent in this process, at most as many as there are.
    pub(crate) own_threads: AtomicUsize,
    /// The fault handler's thread.
    pub(crate) handler_tid: AtomicU32,
    /// The monitor's, which is in `spm`'s network name space. A forked child finds its parent's here until it has one.
    pub(crate) monitor_tid: AtomicU32,
    /// There is one; in a forked child there is none yet.
    pub(crate) has_handler: AtomicBool,
    /// Wakes the handler once there is a userfaultfd.
    pub(crate) launch: Event,
    /// Wakes the monitor.
    pub(crate) demand: Event,
    /// Wakes the helpers.
    pub(crate) help: Event,
    /// Wakes whoever waits for reclaimers to pause, or to go on.
    pub(crate) pause: Event,
    pub(crate) fork_turn: fork::Turn,
    pub(crate) excluded: [(AtomicUsize, AtomicUsize); MAX_EXCLUDED],
    pub(crate) pin_count: AtomicUsize,
    /// Counts unmaps and moves: what was registered may be something else now.
    pub(crate) unmaps: AtomicU32,
    /// Odd while pages are on their way out: see [`Runtime::pin_thread`].
    pub(crate) leaving: AtomicU32,
    stacks: [AtomicUsize; MAX_RECLAIMERS + 1],
}

impl Default for Runtime {
    fn default() -> Self {
        Self::new()
    }
}

impl Runtime {
    /// A process not under management.
    pub const fn new() -> Self {
        Self {
            control: AtomicPtr::new(core::ptr::null_mut()),
            slot: AtomicUsize::new(0),
            pid: AtomicU32::new(0),
            number: AtomicU32::new(0),
            is_among_others: AtomicBool::new(false),
            stage: AtomicU32::new(0),
            device: AtomicI32::new(-1),
            socket: AtomicI32::new(-1),
            uffd: AtomicI32::new(-1),
            is_tracked: AtomicBool::new(false),
            scratch: AtomicI32::new(-1),
            listener: AtomicI32::new(-1),
            pagemap: AtomicI32::new(-1),
            listener_name: Lock::new(([0; MAX_NAME], 0)),
            spm_name: Lock::new(([0; MAX_NAME], 0)),
            space: Lock::new(None),
            waiting: Lock::new(Vec::new()),
            holding_start: AtomicUsize::new(0),
            guard_start: AtomicUsize::new(0),
            trash_start: AtomicUsize::new(0),
            room_pages: AtomicI64::new(i64::MAX),
            patience_ns: AtomicU64::new(spmem_core::reclaim::PATIENCE_NS),
            freed_pages: AtomicU64::new(0),
            keeps_pace: AtomicBool::new(false),
            due_pages: AtomicI64::new(0),
            turns: AtomicU64::new(0),
            keeps_copies: AtomicBool::new(true),
            is_stuck: AtomicBool::new(false),
            is_shared: AtomicBool::new(false),
            is_paused: AtomicBool::new(false),
            working: [const { AtomicU32::new(0) }; MAX_RECLAIMERS + 1],
            reclaimers: AtomicU32::new(0),
            exchange: AtomicUsize::new(0),
            staging_start: AtomicUsize::new(0),
            crossing: AtomicUsize::new(0),
            is_encoder_late: AtomicBool::new(false),
            is_node_full: AtomicBool::new(false),
            home: Home::nowhere(),
            handler_tid: AtomicU32::new(0),
            own_threads: AtomicUsize::new(0),
            monitor_tid: AtomicU32::new(0),
            has_handler: AtomicBool::new(false),
            launch: Event::new(),
            demand: Event::new(),
            help: Event::new(),
            pause: Event::new(),
            fork_turn: fork::Turn::new(),
            excluded: [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; MAX_EXCLUDED],
            pin_count: AtomicUsize::new(0),
            unmaps: AtomicU32::new(0),
            leaving: AtomicU32::new(0),
            stacks: [const { AtomicUsize::new(0) }; MAX_RECLAIMERS + 1],
        }
    }

    /// How far this process has come.
    pub fn stage(&self) -> Stage {
        // Acquire pairs with the Release in `set_stage`: what the stage promises is there.
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Dormant,
            1 => Stage::Watched,
            _ => Stage::Active,
        }
    }

    /// Whether this process is under management.
    pub fn is_managed(&self) -> bool {
        self.stage() != Stage::Dormant
    }

    pub(crate) fn set_stage(&self, stage: Stage) {
        self.stage.store(stage as u32, Ordering::Release);
    }

    /// What the tree shares; `None` before [`Runtime::attach`].
    pub fn control(&self) -> Option<&'static Control> {
        let control = self.control.load(Ordering::Acquire).cast_const();
        // SAFETY: null, or a mapping of a `Control` that is never unmapped and only holds atomics.
        (!control.is_null()).then(|| unsafe { &*control })
    }

    /// Of a process that shares this, and has nothing else.
    #[cfg(test)]
    pub(crate) fn with_control(control: &'static Control) -> Self {
        let runtime = Self::new();
        runtime.control.store(core::ptr::from_ref(control).cast_mut(), Ordering::Release);
        runtime
    }

    pub(crate) fn shared(&self) -> &'static Control {
        self.control().expect("agent threads start after the control page is mapped")
    }

    /// Records what happened to the page at an address, if the run is traced.
    pub(crate) fn record(&self, what: Happening, address: usize, value: u64) {
        self.shared().recorder.record(|| {
            let (ns, page) = (process::now_ns(), (address / PAGE) as u64);
            Record { ns, process: process::pid(), what, page, value }
        });
    }

    /// Has what is stored of `page` on a node read or written: see [`Slot::reading`]. Under the space's lock.
    pub(crate) fn reading<T>(&self, page: usize, node: u32, read: impl FnOnce() -> T) -> T {
        let slot = self.own_slot();
        slot.reading_node.store(node, Ordering::Relaxed);
        slot.reading.store(page as u64, Ordering::Relaxed);
        // The compiler may not move what is read out from between the two.
        compiler_fence(Ordering::SeqCst);
        let result = read();
        compiler_fence(Ordering::SeqCst);
        slot.reading.store(0, Ordering::Relaxed);
        result
    }

    /// The node of a copy, as the configuration numbers it; 0 of what is on none.
    pub(crate) fn node_of(&self, copy: Copy) -> u32 {
        match copy {
            Copy::None | Copy::Holding(_) => 0,
            Copy::Stored(_) => NODE_1,
            Copy::Swapped(handle) => {
                let handle = Handle::from_raw(handle);
                let target = handle.and_then(|handle| self.shared().targets.get(file(handle)));
                target.map_or(0, |target| target.id.load(Ordering::Relaxed))
            }
        }
    }

    pub(crate) fn own_slot(&self) -> &'static Slot {
        &self.shared().slots[self.slot.load(Ordering::Relaxed)]
    }

    /// Brings this process under management: called once, by the only thread there is, before `main`.
    ///
    /// # Errors
    /// Why it stays unmanaged: `ECONNREFUSED` when `spm` is gone, `ENOSPC` when the tree has too many processes, `EPERM` when a seccomp
    /// filter would end it for what the agent does, which is said.
    pub fn attach(&'static self, spm_name: &[u8]) -> Result<()> {
        let pid = process::pid();
        for need in [Need::Asking, Need::Serving { has_devices: false }] {
            if let Some(refusal @ Refusal::Ends(_)) = find_refusal(need) {
                crate::complain(format_args!(
                    "spm: process {pid}: executed, and {refusal}, which its agent needs; it runs without a budget\n"
                ));
                return Err(Errno::EPERM);
            }
        }
        let Hello { socket, control, device, .. } = hello(spm_name, 0)?;
        let mapping = Mapping::shared(control.raw(), size_of::<Control>())?;
        self.control.store(mapping.leak().cast(), Ordering::Release);
        // `spm` has let nobody in whose number is not the same there.
        self.claim(pid, true)?;
        self.pid.store(pid, Ordering::Relaxed);
        {
            let mut name = self.spm_name.lock();
            name.0[..spm_name.len()].copy_from_slice(spm_name);
            name.1 = spm_name.len();
        }
        self.pin_thread();
        self.set_stage(Stage::Watched);
        self.device.store(device.as_ref().map_or(-1, Fd::raw), Ordering::Relaxed);
        self.socket.store(socket.raw(), Ordering::Relaxed);
        self.reclaimers.store(1, Ordering::Relaxed);
        let proc = Fd::open(c"/proc", libc::O_PATH | libc::O_DIRECTORY);
        spmem_sys::fd::set_proc(proc.as_ref().map_or(-1, Fd::raw));
        // The thread gets copies of the descriptors with its table; ours close when they drop.
        self.start_thread(0, Table::Private, reclaim::monitor).inspect_err(|&errno| {
            let hurdle = Hurdle::of_thread(errno);
            crate::complain(format_args!(
                "spm: process {pid}: executed, and {hurdle}; it runs without a budget\n"
            ));
            self.shared().counters.unmanaged_processes.fetch_add(1, Ordering::Relaxed);
            self.set_stage(Stage::Dormant);
            self.give_slot_back();
        })
    }

    /// Starts one of the agent's threads on its stack, which is made once and used again after a fork.
    pub(crate) fn start_thread(
        &'static self,
        number: usize,
        table: Table,
        entry: extern "C" fn(usize) -> !,
    ) -> Result<()> {
        let top = self.make_stack(number)?;
        let argument = core::ptr::from_ref(self).expose_provenance();
        let top = core::ptr::with_exposed_provenance_mut(top);
        // SAFETY: the stack is used by thread `number` only, which starts once in a process's life; the entries of
        // this crate use no thread-local storage.
        unsafe { thread::spawn(table, top, entry, argument) }?;
        self.own_threads.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Ends the calling thread, one of the agent's.
    pub(crate) fn end_thread(&self) -> ! {
        self.own_threads.fetch_sub(1, Ordering::SeqCst);
        thread::exit()
    }

    /// Whether the program has one thread and no more. When in doubt it has more.
    pub(crate) fn is_single_threaded(&self) -> bool {
        let own = self.own_threads.load(Ordering::SeqCst);
        thread::count().is_ok_and(|count| count <= own + 1)
    }

    /// Where the stack of thread `number` begins, at its upper end.
    fn make_stack(&self, number: usize) -> Result<usize> {
        let mut top = self.stacks[number].load(Ordering::Relaxed);
        if top == 0 {
            let stack = Mapping::new(STACK, c"spmem stack")?;
            top = stack.start() + stack.len();
            stack.leak();
            self.stacks[number].store(top, Ordering::Relaxed);
        }
        Ok(top)
    }

    /// The runtime an agent thread was started with.
    pub(crate) fn from_argument(argument: usize) -> &'static Self {
        // SAFETY: `start_thread` passes the address of a `&'static Runtime`.
        unsafe { &*core::ptr::with_exposed_provenance(argument) }
    }

    /// Connects to `spm` again (a forked child) and hands it a userfaultfd to hold.
    pub(crate) fn hello_again(&self) -> Result<Hello> {
        let name = self.spm_name.lock();
        hello(&name.0[..name.1], 1)
    }

    /// This process is connected to `spm`. The device for userfaultfds that came, if one did.
    pub(crate) fn meet(&self, hello: Hello) -> Option<Fd> {
        self.socket.store(hello.socket.into_fd().into_raw(), Ordering::Relaxed);
        hello.device
    }

    /// A userfaultfd of this process with the features that managing takes, held by `spm` too.
    pub(crate) fn make_userfaultfd(&self) -> Result<Uffd> {
        let device = self.device.load(Ordering::Relaxed);
        let uffd = new_userfaultfd(device)?;
        let wanted = self.shared().is_tracked.load(Ordering::Relaxed) != 0;
        for is_tracked in [true, false].into_iter().filter(|&is_tracked| wanted || !is_tracked) {
            let features = feature::MANAGED | if is_tracked { feature::TRACKED } else { 0 };
            // Where `spm` is gone or may not, perhaps this process may.
            let enabled = self.enlist(&uffd, features).or_else(|_| uffd.enable(features).map(|_| ()));
            self.is_tracked.store(is_tracked, Ordering::Relaxed);
            if enabled.is_ok() || !is_tracked {
                return enabled.map(|()| uffd);
            }
        }
        Err(Errno::EINVAL)
    }

    /// A userfaultfd for scratch areas.
    pub(crate) fn make_scratch_userfaultfd(&self) -> Result<Uffd> {
        let uffd = new_userfaultfd(self.device.load(Ordering::Relaxed))?;
        uffd.enable(feature::SCRATCH)?;
        Ok(uffd)
    }

    /// Everything that moving pages takes: userfaultfd, holding area, node 1, fault handler, further reclaimers. Called
    /// by the monitor, until it succeeds.
    ///
    /// # Errors
    /// What the kernel refused; the process goes on as it is. Of the attempt the handler's thread is left and, if the last step failed,
    /// for which there is no memory then, the userfaultfd that `spm` holds.
    pub(crate) fn activate(&'static self, limit: u64) -> Result<()> {
        let slots = holding_slots(Bytes(limit));
        let holding_len = (slots as usize + 1) * PAGE;
        let capacity = self.store_capacity();
        // Before anything is made that stays: the monitor tries again. What the agent takes the program is refused.
        let need = holding_len + TRASHES * TRASH_LEN + HEAP_ROOM + capacity as usize / METADATA_PART;
        if process::memory_left().is_some_and(|left| left < (LIMITED_PART * need) as u64) {
            return Err(Errno::ENOMEM);
        }
        let holding = Mapping::aligned(holding_len, CHUNK, c"spmem holding")?;
        let trash = Mapping::new(TRASHES * TRASH_LEN, c"spmem scratch")?;
        let guard = Mapping::reserve(PAGE, PAGE, c"spmem guard")?;
        let frames = Mapping::reserve(capacity as usize, CHUNK, c"spmem node1")?;
        // Who is given no memory later must end the program: better to leave it alone now.
        drop(Mapping::new(HEAP_ROOM + capacity as usize / METADATA_PART, c"spmem heap")?);
        self.start_handler()?;
        let scratch = self.make_scratch(trash.start())?;
        let listener = self.make_listener()?;
        let uffd = self.make_userfaultfd()?;
        let capacity = FrameCount(capacity / PAGE as u64);
        // From here on the kernel waits for somebody to read what it announces of the area, its unmapping for one.
        // The first page is not a slot: its dropping is the mark behind a fork (fork.rs).
        uffd.register(holding.start(), holding.len())?;
        let granted = lend_metadata(capacity)
            .and_then(|metadata| GrantedFrames::embedded(capacity, metadata).map_err(|_| Errno::ENOMEM))
            .inspect_err(|_| {
                // Nobody reads what is announced: nothing may be.
                let _ = uffd.unregister(holding.start(), holding.len());
            })?;
        let frames = Frames { mapping: frames, committed: 0 };
        let store = Store::new(granted, frames, self.shared().seed.load(Ordering::Relaxed));
        let swap = swap::open(self).unwrap_or_else(|errno| {
            let pid = process::pid();
            crate::complain(format_args!(
                "spm: process {pid}: swap files cannot be had ({errno}); its pages go to node 1\n"
            ));
            None
        });
        *self.space.lock() = Some(Space::new(Holding::new(holding.start() + PAGE, slots), store, swap));
        for (start, mapping) in
            [(&self.holding_start, holding), (&self.trash_start, trash), (&self.guard_start, guard)]
        {
            start.store(mapping.leak().expose_provenance(), Ordering::Relaxed);
        }
        self.scratch.store(scratch.into_raw(), Ordering::Relaxed);
        self.listener.store(listener.into_raw(), Ordering::Relaxed);
        if self.shared().targets().any(|target| !target.is_swap()) {
            // Without it pages go to node 1 only.
            let staging = Mapping::new(STAGING_LEN, c"spmem staging");
            if let Ok(staging) = staging.and_then(|staging| staging.wipe_in_children().map(|()| staging)) {
                self.staging_start.store(staging.leak().expose_provenance(), Ordering::Relaxed);
            }
        }
        self.hire();
        self.set_off(uffd);
        self.set_stage(Stage::Active);
        Ok(())
    }

    /// Bytes of frames node 1 may take here: what the configuration says, less where address space or data are limited.
    fn store_capacity(&self) -> u64 {
        let wanted = self.shared().store_capacity_bytes.load(Ordering::Relaxed);
        let wanted = process::memory_left().map_or(wanted, |left| wanted.min(left / LIMITED_PART as u64));
        wanted.max(CHUNK as u64) / CHUNK as u64 * CHUNK as u64
    }

    /// A userfaultfd without events for the scratch areas, which begin at `trash`.
    pub(crate) fn make_scratch(&self, trash: usize) -> Result<Uffd> {
        let scratch = self.make_scratch_userfaultfd()?;
        scratch.register(trash, TRASHES * TRASH_LEN)?;
        Ok(scratch)
    }

    /// Where forked children ask for their userfaultfd.
    pub(crate) fn make_listener(&self) -> Result<Fd> {
        let mut name = self.listener_name.lock();
        let (listener, len) = Listener::bind_anywhere(&mut name.0)?;
        name.1 = len;
        Ok(listener.into_fd())
    }

    /// What the agent's threads share, and who works for them. Before the handler goes on, which asks `spm` for things too.
    pub(crate) fn hire(&self) {
        // A process that has changed its user may not open it: then its pages stay.
        self.pagemap.store(Pagemap::open().map_or(-1, Pagemap::into_raw), Ordering::Release);
        // Without an encoder pages are encoded here.
        let _ = self.hire_encoder();
        // And without a porter they go to node 1.
        let _ = self.hire_porter();
    }

    /// The fault handler, unless there is one from an earlier attempt; it waits until there is a userfaultfd. It shares the monitor's descriptors.
    pub(crate) fn start_handler(&'static self) -> Result<()> {
        if self.has_handler.load(Ordering::Relaxed) {
            return Ok(());
        }
        // All at once, and not by the handler: nothing is allocated while a fork may be copying the heap.
        // Nor in a child, whose copy of the heap may be torn then: it has its parent's room, and what waits there is its parent's.
        let mut waiting = self.waiting.lock();
        waiting.clear();
        waiting.try_reserve_exact(fault::MAX_WAITING).map_err(|_| Errno::ENOMEM)?;
        drop(waiting);
        self.start_thread(MAX_RECLAIMERS, Table::Shared, fault::handler)?;
        self.has_handler.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The userfaultfd, once there is one. `None` if there will be none.
    pub(crate) fn await_userfaultfd(&self) -> Option<i32> {
        loop {
            let ticket = self.launch.ticket();
            // Acquire pairs with the Release of who has made it, and all that it needs.
            let uffd = self.uffd.load(Ordering::Acquire);
            if uffd >= 0 {
                return Some(uffd);
            }
            if self.stage() == Stage::Dormant {
                return None;
            }
            self.launch.wait(ticket, None);
        }
    }

    /// All is ready: the handler goes on, and there are reclaimers for the other processors. With fewer it is slower.
    pub(crate) fn set_off(&'static self, uffd: Uffd) {
        self.uffd.store(uffd.into_raw(), Ordering::Release);
        self.launch.signal();
        let _ = (1..reclaimers(process::cpu_count()))
            .try_for_each(|number| self.start_thread(number, Table::Shared, reclaim::helper));
    }

    /// Pages of RAM are free again.
    pub(crate) fn free_pages(&self, count: usize) {
        self.room_pages.fetch_add(count as i64, Ordering::Relaxed);
        self.freed_pages.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// What this process shares with its encoder; `None` where it has none.
    pub(crate) fn exchange(&self) -> Option<&'static Exchange> {
        let at = self.exchange.load(Ordering::Acquire);
        // SAFETY: `hire_encoder` stored the address of a mapping that is never unmapped, as long as an `Exchange`, which is
        // atomics only.
        (at != 0).then(|| unsafe { &*core::ptr::with_exposed_provenance(at) })
    }

    /// Asks `spm` for an encoder, where a processor is left for it.
    fn hire_encoder(&self) -> Result<()> {
        if process::cpu_count() < 2 {
            return Ok(());
        }
        let memory = Fd::open_in_proc(c"/proc/self/mem")?;
        let memfd = self.ask_spm(Kind::Encoder, 0, &[memory.raw()])?[0].take().ok_or(Errno(libc::EPROTO))?;
        let mapping = Mapping::shared(memfd.raw(), size_of::<Exchange>())?;
        mapping.keep_from_children()?;
        self.exchange.store(mapping.leak().expose_provenance(), Ordering::Release);
        Ok(())
    }

    /// What faults are to come of the program's ranges.
    pub(crate) fn watch(&self) -> Watch {
        let is_fenced = |target: &control::Target| target.is_fenced.load(Ordering::Relaxed) != 0;
        if self.is_tracked.load(Ordering::Relaxed) {
            Watch::MissingAndTracked
        } else if self.shared().targets().any(is_fenced) {
            Watch::MissingAndFenced
        } else {
            Watch::Missing
        }
    }

    /// What this process shares with its porter; `None` where it has none.
    pub(crate) fn crossing(&self) -> Option<&'static Crossing> {
        let at = self.crossing.load(Ordering::Acquire);
        // SAFETY: `hire_porter` stored the address of a mapping that is never unmapped, as long as a `Crossing`, which is
        // atomics only.
        (at != 0).then(|| unsafe { &*core::ptr::with_exposed_provenance(at) })
    }

    /// Asks `spm` for a porter, where pages are placed on mapped nodes.
    fn hire_porter(&self) -> Result<()> {
        let staging = self.staging_start.load(Ordering::Relaxed);
        if staging == 0 {
            return Ok(());
        }
        // The porter is its only holder: once he is gone nothing arrives there.
        let userfault = self.make_scratch_userfaultfd()?;
        userfault.register(staging, STAGING_LEN)?;
        let memory = Fd::open_in_proc(c"/proc/self/mem")?;
        let fds = [memory.raw(), userfault.raw()];
        let memfd = self.ask_spm(Kind::Porter, staging as u64, &fds)?[0].take().ok_or(Errno(libc::EPROTO))?;
        let mapping = Mapping::shared(memfd.raw(), size_of::<Crossing>())?;
        mapping.keep_from_children()?;
        self.crossing.store(mapping.leak().expose_provenance(), Ordering::Release);
        Ok(())
    }

    /// From now on nothing is placed. In a forked child: the parent's porter works for the parent.
    pub(crate) fn dismiss_porter(&self) {
        self.crossing.store(0, Ordering::Relaxed);
    }

    /// From now on pages are encoded here. In a forked child: the parent's encoder works for the parent.
    pub(crate) fn dismiss_encoder(&self) {
        self.exchange.store(0, Ordering::Relaxed);
        self.is_encoder_late.store(false, Ordering::Relaxed);
        self.home.set(None);
    }

    /// The pagemap that agent threads share; `None` where it could not be opened.
    pub(crate) fn shared_pagemap(&self) -> Option<ManuallyDrop<Pagemap>> {
        let raw = self.pagemap.load(Ordering::Acquire);
        (raw >= 0).then(|| ManuallyDrop::new(Pagemap::from_raw(raw)))
    }

    /// Asks `spm` to enable `uffd` with `features` (0: it is enabled) and to hold it.
    pub(crate) fn enlist(&self, uffd: &Uffd, features: u64) -> Result<()> {
        self.ask_spm(Kind::Userfault, features, &[uffd.raw()]).map(|_| ())
    }

    /// Gives `spm` the userfaultfd of a forked child to hold, until [`Runtime::release`]. Does not wait: should `spm` be
    /// stopped, the message keeps the descriptor.
    pub(crate) fn entrust(&self, child: &Uffd, heir: Heir) {
        // Nothing else holds it if that fails, and nothing else could. Where `spm` reads nothing, what is left is for letting go:
        // a child that is held for ever would wait for its parent's end, and be given SIGBUS then.
        let _ = self.with_socket(|socket| {
            if socket.is_half_full() {
                return Err(Errno::EAGAIN);
            }
            socket.send_now(&request(Kind::Child, heir.with(child.raw())).to_bytes(), &[child.raw()])
        });
    }

    /// The child is about to stand alone, or has got all its pages. To be called before its userfaultfd is closed here: the
    /// number is another's then. False if `spm` cannot be told now.
    pub(crate) fn release(&self, child: &Uffd) -> bool {
        let message = request(Kind::Child, Heir::Later.with(child.raw())).to_bytes();
        self.with_socket(|socket| socket.send_now(&message, &[])) != Err(Errno::EAGAIN)
    }

    pub(crate) fn ask_spm(&self, kind: Kind, value: u64, fds: &[i32]) -> Result<Descriptors> {
        self.with_socket(|socket| ask(socket, kind, value, fds)).map(|(_, fds)| fds)
    }

    fn with_socket<T>(&self, work: impl FnOnce(&Socket) -> Result<T>) -> Result<T> {
        let socket = self.socket.load(Ordering::Relaxed);
        if socket < 0 {
            return Err(Errno(libc::ENOTCONN));
        }
        let socket = Socket::from_fd(Fd::from_raw(socket));
        let result = work(&socket);
        let _ = socket.into_fd().into_raw();
        result
    }
}

fn new_userfaultfd(device: i32) -> Result<Uffd> {
    if device >= 0 {
        let device = Fd::from_raw(device);
        let uffd = Uffd::from_device(&device);
        let _ = device.into_raw();
        if uffd.is_ok() {
            return uffd;
        }
    }
    Uffd::from_syscall()
}

/// What comes of a hello.
pub(crate) struct Hello {
    socket: Socket,
    /// The control page's memfd.
    control: Fd,
    /// /dev/userfaultfd.
    device: Option<Fd>,
    /// This process's, in `spm`'s pid namespace.
    pub(crate) number: u32,
}

/// Says hello. `is_managed`: 1 in a forked child.
fn hello(name: &[u8], is_managed: u64) -> Result<Hello> {
    let socket = Socket::connect(name)?;
    let (number, mut fds) = ask(&socket, Kind::Hello, is_managed, &[])?;
    let control = fds[0].take().ok_or(Errno(libc::EPROTO))?;
    let number = u32::try_from(number).ok().filter(|&number| number > 0).ok_or(Errno(libc::EPROTO))?;
    Ok(Hello { socket, control, device: fds[1].take(), number })
}

/// What came with a reply.
type Descriptors = [Option<Fd>; spmem_sys::socket::MAX_FDS];

fn request(kind: Kind, value: u64) -> Message {
    Message { magic: MAGIC, kind: kind as u32, errno: 0, pid: process::pid(), pad: 0, value }
}

/// The value and the descriptors of the reply.
fn ask(socket: &Socket, kind: Kind, value: u64, fds: &[i32]) -> Result<(u64, Descriptors)> {
    socket.send(&request(kind, value).to_bytes(), fds)?;
    let mut bytes = [0; size_of::<Message>()];
    let received = socket.receive(&mut bytes)?;
    let reply = Message::from_bytes(&bytes);
    if received.len != bytes.len() || reply.magic != MAGIC || reply.kind != kind as u32 {
        return Err(Errno(libc::EPROTO));
    }
    if reply.errno != 0 {
        return Err(Errno(reply.errno));
    }
    Ok((reply.value, received.fds))
}
