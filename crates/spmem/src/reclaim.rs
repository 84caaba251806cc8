//! The pressure line: measure -> plan -> sweep -> demote. One monitor a process, and a helper for each further
//! processor.
//!
//! The monitor measures what the process takes, publishes it, and asks `spmem_core::reclaim` what is due. Then it
//! works in batches short enough that a fork or a new measurement waits about a millisecond: pages from the program
//! into the holding area ([`crate::sweep`]), the oldest ones of that to node 1 ([`crate::demote`]). Helpers only
//! demote, and only while the gate is shut: then the program waits for memory, so its processors are free for it.

use crate::demote::Demoter;
use crate::follow::Shadow;
use crate::gate::GateKeeper;
use crate::runtime::{Runtime, Stage};
use crate::sweep::Sweeper;
use core::sync::atomic::Ordering::{self, Relaxed};
use spmem_core::reclaim::{Facts, Gate, Marks, Plan, plan};
use spmem_core::units::Bytes;
use spmem_node::Backend;
use spmem_sys::fd::close_all_but;
use spmem_sys::process::{DescriptorLimit, MemoryUse};
use spmem_sys::{PAGE, Result, process, thread};

/// Pages of one batch.
pub const BATCH: usize = 32;
/// Copies of pages that have come back may take this part of the limit.
const KEPT_SHARE: u64 = 256;
/// Resident memory never taken away: this part of the limit, ...
const FLOOR_SHARE: u64 = 8;
/// ... but at least this, bytes, ...
const FLOOR_MIN: u64 = 4 << 20;
/// ... and at most this.
const FLOOR_MAX: u64 = 64 << 20;
/// Where there is no room, a page comes in once in so long, ns, ...
pub(crate) const PATIENCE_NS: u64 = 20_000_000;
/// ... until there has been none for so long, ns: then pages come in at the pace at which reclaim makes them free, ...
const CROWDED_NS: u64 = 200_000_000;
/// ... or, where fewer than these became free in that time, ...
const PROGRESS_PAGES: u64 = 64;
/// ... once in so long, ns: what cannot shrink goes on.
const IMPATIENCE_NS: u64 = 200_000;
/// How often shared memory is counted exactly, ns: it walks all page tables.
const PROPORTIONAL_NS: u64 = 50_000_000;
/// Batches in a row that free nothing before growth stops waiting.
const STUCK_BATCHES: u32 = 8;
/// Growth that does not wait is looked at again after so many pages, ...
const LEAVE_MIN: i64 = 2 * BATCH as i64;
/// ... or after this part of what is resident: a look takes time in proportion to that.
const LEAVE_SHARE: u64 = 64;

/// Entry of the first agent thread.
pub(crate) extern "C" fn monitor(argument: usize) -> ! {
    let runtime = Runtime::from_argument(argument);
    thread::set_name(c"spm-monitor");
    thread::leave_directory();
    let mut keep = [runtime.device.load(Relaxed), runtime.socket.load(Relaxed), spmem_sys::fd::proc()];
    keep.sort_unstable();
    let missing = keep.iter().take_while(|&&fd| fd < 0).count();
    let _ = close_all_but(&keep[missing..]);
    run_monitor(runtime, false)
}

/// Entry of the first agent thread of a forked child none of whose pages are away.
pub(crate) extern "C" fn monitor_of_child(argument: usize) -> ! {
    let runtime = Runtime::from_argument(argument);
    thread::set_name(c"spm-monitor");
    thread::leave_directory();
    let _ = close_all_but(&[]);
    if let Ok((socket, device)) = runtime.hello_again() {
        runtime.socket.store(socket.into_fd().into_raw(), Relaxed);
        runtime.device.store(device.map_or(-1, spmem_sys::fd::Fd::into_raw), Relaxed);
    }
    run_monitor(runtime, true)
}

/// Entry of a helper.
pub(crate) extern "C" fn helper(argument: usize) -> ! {
    let runtime = Runtime::from_argument(argument);
    thread::set_name(c"spm-reclaim");
    let number = runtime.reclaimers.fetch_add(1, Relaxed) as usize;
    let mut demoter = Demoter::new(runtime, number);
    loop {
        let ticket = runtime.help.ticket();
        // Where there is an encoder, it encodes: this would only be one more processor to be interrupted.
        let is_needless = runtime.room_pages.load(Relaxed) > 0 || runtime.is_stuck.load(Relaxed);
        let has_encoder = runtime.exchange().is_some() && !runtime.is_encoder_late.load(Relaxed);
        if is_needless || has_encoder {
            runtime.help.wait(ticket, None);
            continue;
        }
        let done = runtime.working(number, || demoter.run(BATCH));
        if done == 0 {
            runtime.help.wait(ticket, Some(1_000_000));
        }
    }
}

impl Runtime {
    /// Runs a piece of work that a fork must not cut in two.
    pub(crate) fn working<T>(&self, number: usize, work: impl FnOnce() -> T) -> T {
        loop {
            // SeqCst, with `is_paused`: either the forking thread sees us work, or we see that we must not.
            self.working[number].store(1, Ordering::SeqCst);
            if !self.is_paused.load(Ordering::SeqCst) {
                break;
            }
            self.working[number].store(0, Ordering::SeqCst);
            self.pause.signal();
            let ticket = self.pause.ticket();
            if self.is_paused.load(Ordering::SeqCst) {
                self.pause.wait(ticket, Some(100_000_000));
            }
        }
        let result = work();
        self.working[number].store(0, Ordering::SeqCst);
        if self.is_paused.load(Ordering::SeqCst) {
            self.pause.signal();
        }
        result
    }
}

pub(crate) fn run_monitor(runtime: &'static Runtime, mut is_fresh_child: bool) -> ! {
    let Ok(gauge) = Gauge::open(runtime) else {
        crate::complain(format_args!("spm: process {}: no /proc, so it cannot be measured\n", process::pid()));
        thread::exit()
    };
    // Below the program's own threads where the right to it is there: a late monitor costs the budget.
    thread::set_nice(-5);
    let mut monitor = Monitor {
        runtime,
        gauge,
        tools: None,
        shadow: Shadow::new(),
        idle_batches: 0,
        had_room_ns: process::now_ns(),
        window_ns: 0,
        window_freed: 0,
        pace_ns: PATIENCE_NS,
    };
    loop {
        let sleep = monitor.round();
        if core::mem::take(&mut is_fresh_child) {
            runtime.end_fork_in_child();
        }
        if let Some((ticket, ns)) = sleep {
            runtime.demand.wait(ticket, Some(ns));
        }
    }
}

struct Monitor {
    runtime: &'static Runtime,
    gauge: Gauge,
    tools: Option<Tools>,
    shadow: Shadow,
    idle_batches: u32,
    had_room_ns: u64,
    window_ns: u64,
    window_freed: u64,
    pace_ns: u64,
}

/// What exists once pages may leave.
struct Tools {
    sweeper: Sweeper,
    demoter: Demoter,
    gate: GateKeeper,
}

impl Monitor {
    /// One look, and what it calls for. How long to sleep then, ns, and from which ticket of the demand on.
    fn round(&mut self) -> Option<(u32, u64)> {
        let runtime = self.runtime;
        let ticket = runtime.demand.ticket();
        let limit = runtime.shared().limit_bytes.load(Relaxed);
        let facts = self.gauge.measure(limit);
        let plan = plan(&facts);
        if facts.limit.is_some() && facts.tree_used.0 > limit / 4 && !self.prepare(limit) {
            return Some((ticket, 100_000_000));
        }
        self.open_or_shut(&facts, &plan);
        let Some(tools) = &mut self.tools else {
            return Some((ticket, plan.sleep_ns.max(100_000)));
        };
        runtime.working(0, || tools.gate.keep(plan.gate));
        let has_encoder = runtime.exchange().is_some();
        self.shadow.follow(if has_encoder { runtime.home_cpu.load(Relaxed) } else { -1 });
        if plan.evict_pages == 0 {
            runtime.working(0, || tools.demoter.drain());
            return Some((ticket, plan.sleep_ns.max(200_000)));
        }
        let done = runtime.working(0, || {
            let held = u64::from(runtime.space.lock().as_ref().map_or(0, |space| space.holding.held()));
            let lacking = (plan.holding_target_pages.saturating_sub(held) as usize).min(BATCH / 2);
            let moved = if lacking > 0 { tools.sweeper.run(lacking) } else { 0 };
            let is_filling = moved > 0 && held + (moved as u64) < plan.holding_target_pages / 2;
            // Filling is progress: what was moved is demoted next.
            moved + if is_filling { 0 } else { tools.demoter.run(BATCH.min(plan.evict_pages as usize)) }
        });
        self.idle_batches = if done == 0 { self.idle_batches.saturating_add(1) } else { 0 };
        let is_stuck = self.idle_batches >= STUCK_BATCHES;
        runtime.is_stuck.store(is_stuck, Relaxed);
        if is_stuck {
            runtime.working(0, || tools.demoter.drain());
            // Everything is pinned, incompressible or shared: look again later, less and less often.
            let patience = 1_000_000 << (self.idle_batches - STUCK_BATCHES).min(6);
            return Some((ticket, patience));
        }
        None
    }

    /// Gets everything ready that moving pages takes; whether it is.
    fn prepare(&mut self, limit: u64) -> bool {
        if self.tools.is_some() {
            return true;
        }
        let runtime = self.runtime;
        let limit_before = DescriptorLimit::raise(crate::fork::DESCRIPTORS);
        let result = runtime.working(0, || -> Result<Tools> {
            if runtime.stage() != Stage::Active {
                runtime.activate(limit)?;
            }
            Ok(Tools {
                sweeper: Sweeper::new(runtime)?,
                demoter: Demoter::new(runtime, 0),
                gate: GateKeeper::new(runtime)?,
            })
        });
        if let Some(limit) = limit_before {
            limit.restore();
        }
        match result {
            Ok(tools) => self.tools = Some(tools),
            Err(errno) => {
                if self.idle_batches == 0 {
                    runtime.shared().counters.unmanaged_processes.fetch_add(1, Relaxed);
                    crate::complain(format_args!(
                        "spm: process {}: cannot move its pages and runs without a budget: {errno}\n",
                        process::pid()
                    ));
                }
                self.idle_batches = self.idle_batches.saturating_add(1);
            }
        }
        self.tools.is_some()
    }

    fn open_or_shut(&mut self, facts: &Facts, plan: &Plan) {
        let runtime = self.runtime;
        let Some(limit) = facts.limit else { return };
        let close = Marks::of(limit).close.0;
        let room = (i128::from(close) - i128::from(facts.tree_used.0)) / PAGE as i128;
        let room = i64::try_from(room).unwrap_or(i64::MAX);
        let now = process::now_ns();
        if room > 0 {
            self.had_room_ns = now;
        }
        if now.saturating_sub(self.window_ns) > CROWDED_NS {
            let freed = runtime.freed_pages.load(Relaxed);
            let gained = freed - self.window_freed;
            let pace = (now - self.window_ns) / gained.max(1);
            let does_help = gained >= PROGRESS_PAGES;
            // A little slower than pages leave, so that an excess goes away.
            self.pace_ns = if does_help { (pace + pace / 4).min(PATIENCE_NS) } else { IMPATIENCE_NS };
            (self.window_ns, self.window_freed) = (now, freed);
        }
        let is_crowded = now.saturating_sub(self.had_room_ns) > CROWDED_NS;
        runtime.patience_ns.store(if is_crowded { self.pace_ns } else { PATIENCE_NS }, Relaxed);
        // A budget that cannot be kept is no reason to wait, unless the program runs away from it; nor is one that others
        // fill, with nothing here that could leave: then there is room for a little, after which this is asked again.
        let present = facts.own_resident_pages + facts.holding_pages;
        let excused = i64::try_from(self.gauge.floor_pages.saturating_sub(present)).unwrap_or(0);
        let leave = i64::try_from(self.gauge.resident_pages / LEAVE_SHARE).unwrap_or(0).max(LEAVE_MIN);
        let has_nothing_to_give = facts.tree_used.0 >= close && plan.gate != Gate::Closed;
        let room = if has_nothing_to_give || runtime.is_stuck.load(Relaxed) {
            room.max(leave)
        } else if self.gauge.is_hopeless && excused > 0 {
            room.max(excused)
        } else {
            room
        };
        runtime.room_pages.store(room, Relaxed);
        if room <= 0 {
            runtime.help.signal();
        }
    }
}

/// Measures the process and publishes it.
struct Gauge {
    runtime: &'static Runtime,
    memory: MemoryUse,
    /// By how much plain counting exceeds proportional counting, bytes.
    shared_bytes: u64,
    proportional_ns: u64,
    /// What cannot be made less fills the budget alone.
    is_hopeless: bool,
    floor_pages: u64,
    resident_pages: u64,
    last_ns: u64,
    last_used: u64,
}

impl Gauge {
    fn open(runtime: &'static Runtime) -> Result<Self> {
        Ok(Self {
            runtime,
            memory: MemoryUse::open()?,
            shared_bytes: 0,
            proportional_ns: 0,
            is_hopeless: false,
            floor_pages: 0,
            resident_pages: 0,
            last_ns: process::now_ns(),
            last_used: 0,
        })
    }

    fn measure(&mut self, limit: u64) -> Facts {
        let now = process::now_ns();
        let runtime = self.runtime;
        let exchange = runtime.exchange().map_or(0, |exchange| size_of_val(exchange) as u64);
        let used = self.read_used(now) + exchange;
        let slot = runtime.own_slot();
        slot.used_bytes.store(used, Relaxed);
        let (mut holding, mut overhead, mut refused) = (0, 0, 0);
        if let Some(space) = runtime.space.lock().as_ref() {
            let usage = space.store.usage();
            let metadata = space.metadata_bytes() + exchange;
            holding = u64::from(space.holding.held());
            refused = space.table.count_refused();
            // What the copies take: their number times the mean size of what is stored.
            let stored_pages = (usage.stored.0 / PAGE as u64).max(1);
            let kept_bytes = space.table.count_kept() * usage.used.0 / stored_pages;
            let has_room = kept_bytes < limit / KEPT_SHARE && self.last_used < limit;
            runtime.keeps_copies.store(has_room, Relaxed);
            overhead = usage.used.0 + metadata + holding * PAGE as u64;
            slot.stored_bytes.store(usage.stored.0, Relaxed);
            slot.store_used_bytes.store(usage.used.0, Relaxed);
            slot.metadata_bytes.store(metadata, Relaxed);
            slot.holding_bytes.store(holding * PAGE as u64, Relaxed);
        }
        let tree_used = runtime.shared().observe();
        // Below the floor the program would only chase its own pages: it runs over budget instead.
        let resident = used.saturating_sub(overhead) / PAGE as u64;
        slot.refused_bytes.store(refused.min(resident) * PAGE as u64, Relaxed);
        let floor = self.floor_bytes(limit) / PAGE as u64;
        (self.floor_pages, self.resident_pages) = (floor, resident);
        let movable = (resident + holding).saturating_sub(floor + refused);
        let movable = if movable < 2 * BATCH as u64 { 0 } else { movable };
        let holding = holding.min(movable);
        let facts = Facts {
            limit: (limit != crate::control::UNLIMITED).then_some(Bytes(limit)),
            tree_used: Bytes(tree_used),
            own_used: Bytes(used),
            own_resident_pages: movable - holding,
            holding_pages: holding,
            since_last_ns: now - self.last_ns,
            growth: Bytes(tree_used.saturating_sub(self.last_used)),
            processes: u32::try_from(runtime.shared().live_slots().count()).unwrap_or(u32::MAX),
        };
        self.last_ns = now;
        self.last_used = tree_used;
        facts
    }

    /// How much stays resident. A budget that is filled by what is stored and by what cannot leave is not to be kept,
    /// whatever is resident: then half of it stays, because a resident page costs little more than a stored one and a
    /// thrashing program costs a lot.
    fn floor_bytes(&mut self, limit: u64) -> u64 {
        let shared = self.runtime.shared();
        let fixed = shared.sum(|slot| &slot.store_used_bytes) + shared.sum(|slot| &slot.refused_bytes);
        let mark = if self.is_hopeless { limit / 8 * 5 } else { limit / 8 * 7 };
        self.is_hopeless = fixed > mark;
        if self.is_hopeless {
            (limit / 2).max(FLOOR_MIN)
        } else {
            (limit / FLOOR_SHARE).clamp(FLOOR_MIN, FLOOR_MAX)
        }
    }

    /// Resident anonymous memory; pages shared with relatives count in part.
    fn read_used(&mut self, now: u64) -> u64 {
        let Ok(anonymous) = self.memory.read_anonymous_bytes() else { return self.last_used };
        if self.runtime.is_shared.load(Relaxed) && now - self.proportional_ns > PROPORTIONAL_NS {
            self.proportional_ns = now;
            if let Ok(proportional) = self.memory.read_proportional_bytes() {
                self.shared_bytes = anonymous.saturating_sub(proportional);
                if self.shared_bytes < 64 * PAGE as u64 {
                    self.runtime.is_shared.store(false, Relaxed);
                    self.shared_bytes = 0;
                }
            }
        }
        anonymous.saturating_sub(self.shared_bytes)
    }
}
