//! The pressure line: measure -> plan -> sweep -> demote. One monitor a process, and a helper for each further
//! processor.
//!
//! The monitor measures what the process takes, publishes it, and asks `spmem_core::reclaim` what is due. Then it
//! works in batches short enough that a fork or a new measurement waits about a millisecond: pages from the program
//! into the holding area ([`crate::sweep`]), the oldest ones of that to node 1 ([`crate::demote`]). Helpers only
//! demote, and only while the gate is shut: then the program waits for memory, so its processors are free for it.

use crate::demote::Demoter;
use crate::dense::Densifier;
use crate::follow::Shadow;
use crate::gate::GateKeeper;
use crate::hurdle::{self, Hurdle};
use crate::place::Checker;
use crate::runtime::{Runtime, Stage};
use crate::sweep::Sweeper;
use core::sync::atomic::Ordering::{self, Relaxed};
use spmem_core::compressed::Room;
use spmem_core::placing::TRIAL_PAGES;
use spmem_core::reclaim::{
    self, BATCH_PAGES, Extent, Facts, Floor, Footing, Gate, HELPER_REST_NS, Look, MAX_RECLAIMERS, Movable, Needs,
    Pace, Pacer, Plan, Progress, SLEEP_MAX_NS, SLEEP_MIN_NS, Sharing, Throttle, is_near, plan,
};
use spmem_core::units::{Bytes, FrameCount};
use spmem_node::Backend;
use spmem_sys::fd::close_all_but;
use spmem_sys::filter::Refusal;
use spmem_sys::process::{DescriptorLimit, MemoryBytes, MemoryUse};
use spmem_sys::{Errno, PAGE, Result, clock, process, thread};

/// Entry of the first agent thread.
pub(crate) extern "C" fn monitor(argument: usize) -> ! {
    let runtime = Runtime::from_argument(argument);
    clock::allow();
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
    let taken = match hurdle::find_filter(runtime) {
        // One that only refuses is met once pages are to leave, which may never be.
        Some(refusal @ Refusal::Ends(_)) => Err(Hurdle::Filter(refusal)),
        _ => {
            clock::allow();
            thread::set_name(c"spm-monitor");
            thread::leave_directory();
            let _ = close_all_but(&[]);
            runtime.take_slot().map_err(Hurdle::Slot)
        }
    };
    let hello = match taken {
        Ok(hello) => hello.or_else(|| runtime.hello_again().ok()),
        Err(hurdle) => {
            crate::complain(format_args!(
                "spm: process {}: forked, and {hurdle}; it runs without a budget\n",
                process::pid()
            ));
            runtime.shared().counters.unmanaged_processes.fetch_add(1, Relaxed);
            runtime.set_stage(Stage::Dormant);
            runtime.end_fork_in_child();
            runtime.end_thread()
        }
    };
    if let Some(hello) = hello {
        let device = runtime.meet(hello);
        runtime.device.store(device.map_or(-1, spmem_sys::fd::Fd::into_raw), Relaxed);
    }
    run_monitor(runtime, true)
}

/// Entry of a helper.
pub(crate) extern "C" fn helper(argument: usize) -> ! {
    let runtime = Runtime::from_argument(argument);
    clock::allow();
    thread::set_name(c"spm-reclaim");
    let number = runtime.reclaimers.fetch_add(1, Relaxed) as usize;
    let mut demoter = Demoter::new(runtime, number);
    loop {
        let ticket = runtime.help.ticket();
        let needs = Needs {
            room_pages: runtime.room_pages.load(Relaxed),
            is_stuck: runtime.is_stuck.load(Relaxed),
            has_encoder: runtime.exchange().is_some(),
            is_encoder_late: runtime.is_encoder_late.load(Relaxed),
        };
        if !needs.help() {
            runtime.help.wait(ticket, None);
            continue;
        }
        let done = runtime.working(number, || demoter.run(BATCH_PAGES as usize));
        if done == 0 {
            runtime.help.wait(ticket, Some(HELPER_REST_NS));
        }
    }
}

/// The handler's number where reclaimers announce themselves, and among their scratch areas.
pub(crate) const HANDLER: usize = MAX_RECLAIMERS;

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
        self.end_work(number);
        result
    }

    /// The same for the handler, which cannot wait: not run while reclaimers pause.
    pub(crate) fn try_working(&self, work: impl FnOnce()) {
        self.working[HANDLER].store(1, Ordering::SeqCst);
        if !self.is_paused.load(Ordering::SeqCst) {
            work();
        }
        self.end_work(HANDLER);
    }

    /// Pages in the holding area, and on their way there.
    fn count_leaving(&self) -> (u64, u64) {
        let space = self.space.lock();
        space
            .as_ref()
            .map_or((0, 0), |space| (u64::from(space.holding.held()), (space.outgoing.bytes() / PAGE) as u64))
    }

    fn end_work(&self, number: usize) {
        self.working[number].store(0, Ordering::SeqCst);
        if self.is_paused.load(Ordering::SeqCst) {
            self.pause.signal();
        }
    }
}

pub(crate) fn run_monitor(runtime: &'static Runtime, mut is_fresh_child: bool) -> ! {
    runtime.monitor_tid.store(process::tid(), Relaxed);
    let Ok(gauge) = Gauge::open(runtime) else {
        crate::complain(format_args!("spm: process {}: no /proc, so it cannot be measured\n", process::pid()));
        runtime.end_thread()
    };
    // Below the program's own threads where the right to it is there: a late monitor costs the budget.
    thread::set_nice(-5);
    let mut monitor = Monitor {
        runtime,
        gauge,
        tools: None,
        shadow: Shadow::new(),
        progress: Progress::default(),
        pace: Pace::default(),
        throttle: Throttle::new(clock::now_ns()),
        is_unfit: false,
        buried_ns: clock::now_ns(),
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
    progress: Progress,
    throttle: Throttle,
    pace: Pace,
    /// Nothing can be moved, and that was said.
    is_unfit: bool,
    /// When processes that have ended were looked for.
    buried_ns: u64,
}

/// How often that is due, ns.
const BURIAL_NS: u64 = 1_000_000_000;

/// What exists once pages may leave.
struct Tools {
    sweeper: Sweeper,
    demoter: Demoter,
    gate: GateKeeper,
    densifier: Densifier,
    checker: Checker,
}

impl Tools {
    /// Looks whether placed pages are where they were put, and whether they are used.
    fn look_at_placed(&mut self, runtime: &'static Runtime, gate: Gate) {
        if runtime.staging_start.load(Relaxed) == 0 || !self.checker.is_due() {
            return;
        }
        self.demoter.end_trials();
        let mut trial = [0; TRIAL_PAGES];
        let count = self.checker.check(runtime, &mut trial);
        if count > 0 && gate != Gate::Closed {
            self.sweeper.try_out(&trial[..count]);
        }
    }
}

impl Monitor {
    /// One look, and what it calls for. How long to sleep then, ns, and from which ticket of the demand on.
    fn round(&mut self) -> Option<(u32, u64)> {
        let runtime = self.runtime;
        let ticket = runtime.demand.ticket();
        let limit = runtime.shared().limit_bytes.load(Relaxed);
        self.bury_dead();
        let facts = self.gauge.measure(limit);
        let plan = plan(&facts);
        if is_near(&facts) && !self.prepare(limit) {
            return Some((ticket, SLEEP_MAX_NS));
        }
        self.open_or_shut(&facts, &plan);
        let extent = self.gauge.extent;
        let Some(tools) = &mut self.tools else {
            return Some((ticket, plan.sleep_ns));
        };
        runtime.working(0, || {
            tools.gate.keep(plan.gate, extent);
            tools.look_at_placed(runtime, plan.gate);
        });
        self.shadow.follow(runtime.exchange().and_then(|_| runtime.home.get()));
        let pacer = self.pace.look(
            &plan,
            &Footing {
                now_ns: clock::now_ns(),
                is_bound: runtime.home.get().is_some() && runtime.exchange().is_some(),
                is_stuck: runtime.is_stuck.load(Relaxed),
                has_other_nodes: runtime.shared().targets().next().is_some(),
                room_pages: runtime.room_pages.load(Relaxed),
                turns: runtime.turns.load(Relaxed),
                processes: facts.processes,
            },
        );
        runtime.keeps_pace.store(pacer != Pacer::Monitor, Relaxed);
        if let Pacer::Handler(sleep_ns) = pacer {
            runtime.due_pages.store(plan.evict_pages.cast_signed(), Relaxed);
            runtime.working(0, || {
                tools.densifier.run(true);
                tools.demoter.take_left();
                let (held, going) = runtime.count_leaving();
                match plan.ahead_pages(held, going) {
                    0 => {}
                    wanted => {
                        tools.sweeper.run(wanted as usize);
                    }
                }
            });
            return Some((ticket, sleep_ns));
        }
        if plan.evict_pages == 0 {
            runtime.working(0, || {
                tools.demoter.drain();
                tools.densifier.run(false);
            });
            return Some((ticket, plan.sleep_ns.min(tools.densifier.rest_ns().max(SLEEP_MIN_NS))));
        }
        runtime.working(0, || tools.densifier.run(true));
        let done = runtime.working(0, || {
            let (held, going) = runtime.count_leaving();
            let moved = match plan.sweep_pages(held, going) {
                0 => 0,
                wanted => tools.sweeper.run(wanted as usize),
            };
            let done = match plan.demote_pages(held, moved as u64) {
                0 => moved,
                wanted => moved + tools.demoter.run(wanted as usize),
            };
            if done == 0 { tools.sweeper.take_rest() } else { done }
        });
        let rest = self.progress.note(done as u64);
        runtime.is_stuck.store(self.progress.is_stuck(), Relaxed);
        let rest_ns = rest?;
        runtime.working(0, || tools.demoter.drain());
        Some((ticket, rest_ns))
    }

    /// Now and then: who has ended is counted no more.
    fn bury_dead(&mut self) {
        let now = clock::now_ns();
        if now.saturating_sub(self.buried_ns) >= BURIAL_NS {
            self.buried_ns = now;
            self.runtime.bury_dead();
        }
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
                densifier: Densifier::new(runtime),
                checker: Checker::new(runtime),
            })
        });
        if let Some(limit) = limit_before {
            limit.restore();
        }
        match result {
            Ok(tools) => self.tools = Some(tools),
            Err(errno) => {
                // Nobody makes room: nothing waits for it, whatever the process had left when it was forked.
                runtime.room_pages.store(i64::MAX, Relaxed);
                if !core::mem::replace(&mut self.is_unfit, true) {
                    runtime.shared().counters.unmanaged_processes.fetch_add(1, Relaxed);
                    let hint = match errno {
                        Errno::ENOMEM if process::memory_left().is_some() => {
                            " (RLIMIT_AS or RLIMIT_DATA leaves too little)"
                        }
                        Errno::EAGAIN => " (it may start no thread: RLIMIT_NPROC, or pids.max of its cgroup)",
                        _ => "",
                    };
                    crate::complain(format_args!(
                        "spm: process {}: cannot move its pages and runs without a budget: {errno}{hint}\n",
                        process::pid()
                    ));
                }
            }
        }
        self.tools.is_some()
    }

    fn open_or_shut(&mut self, facts: &Facts, plan: &Plan) {
        let runtime = self.runtime;
        let Some(limit) = facts.limit else { return };
        let admission = self.throttle.look(&Look {
            now_ns: clock::now_ns(),
            limit,
            tree_used: facts.tree_used,
            gate: plan.gate,
            freed_pages: runtime.freed_pages.load(Relaxed),
            resident_pages: self.gauge.resident_pages,
            refused_pages: self.gauge.refused_pages,
            floor_pages: self.gauge.floor_pages,
            is_hopeless: self.gauge.floor.is_hopeless(),
            is_stuck: runtime.is_stuck.load(Relaxed),
        });
        runtime.patience_ns.store(admission.patience_ns, Relaxed);
        runtime.room_pages.store(admission.room_pages, Relaxed);
        if admission.room_pages <= 0 {
            runtime.help.signal();
        }
    }
}

/// Measures the process and publishes it.
struct Gauge {
    runtime: &'static Runtime,
    memory: MemoryUse,
    floor: Floor,
    sharing: Sharing,
    floor_pages: u64,
    resident_pages: u64,
    refused_pages: u64,
    extent: Extent,
    processors: u32,
    last_ns: u64,
    last_used: u64,
    /// When the agent's own processor time was published last, ns.
    agent_ns_at: u64,
}

/// How often that is due, ns: `spm` looks at it ten times a second.
const AGENT_TIME_NS: u64 = 50_000_000;

impl Gauge {
    fn open(runtime: &'static Runtime) -> Result<Self> {
        Ok(Self {
            runtime,
            memory: MemoryUse::open()?,
            sharing: Sharing::default(),
            floor: Floor::default(),
            floor_pages: 0,
            resident_pages: 0,
            refused_pages: 0,
            extent: Extent::default(),
            processors: u32::try_from(process::cpu_count()).unwrap_or(u32::MAX),
            last_ns: clock::now_ns(),
            last_used: 0,
            agent_ns_at: 0,
        })
    }

    /// What the monitor and the handler have used. Helpers run while the program waits, and are left out.
    fn publish_agent_time(&mut self, now: u64) {
        if now.saturating_sub(self.agent_ns_at) < AGENT_TIME_NS {
            return;
        }
        self.agent_ns_at = now;
        let handler = self.runtime.handler_tid.load(Relaxed);
        let handler_ns = if handler == 0 { 0 } else { process::thread_time_ns(handler) };
        let time = process::thread_time_ns(process::tid()) + handler_ns;
        self.runtime.own_slot().agent_ns.store(time, Relaxed);
    }

    fn measure(&mut self, limit: u64) -> Facts {
        let now = clock::now_ns();
        let runtime = self.runtime;
        self.publish_agent_time(now);
        let exchange = runtime.exchange().map_or(0, |exchange| size_of_val(exchange) as u64);
        // What is on mapped nodes is no RAM of the budget's.
        let placed = runtime.publish_placed() * PAGE as u64;
        let used = self.read_used(now).saturating_sub(placed) + exchange;
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
            let keeps_copies = reclaim::keeps_copies(Bytes(limit), Bytes(self.last_used), Bytes(kept_bytes));
            runtime.keeps_copies.store(keeps_copies, Relaxed);
            overhead = usage.used.0 + metadata + holding * PAGE as u64;
            slot.stored_bytes.store(usage.stored.0, Relaxed);
            slot.store_used_bytes.store(usage.used.0, Relaxed);
            slot.metadata_bytes.store(metadata, Relaxed);
            slot.holding_bytes.store(holding * PAGE as u64, Relaxed);
        }
        let tree_used = runtime.shared().observe();
        let resident = used.saturating_sub(overhead) / PAGE as u64;
        slot.refused_bytes.store(refused.min(resident) * PAGE as u64, Relaxed);
        let shared = runtime.shared();
        let stored = shared.sum(|slot| &slot.store_used_bytes);
        let own_stored = Bytes(slot.store_used_bytes.load(Relaxed));
        let capacity = Bytes(shared.store_capacity_bytes.load(Relaxed));
        let processes = shared.count_processes();
        // R18: the decision of every compressed node, with the open transactions of the others for its reserve.
        let room = Room::shared(Bytes(stored), capacity, processes);
        runtime.is_node_full.store(room.is_full_for(own_stored), Relaxed);
        shared.store_reserve_bytes_peak.fetch_max(room.reserve.0, Relaxed);
        shared.store_pressure_peak.fetch_max(room.pressure().into(), Relaxed);
        let fixed = stored + shared.sum(|slot| &slot.refused_bytes);
        let FrameCount(floor) = self.floor.update(Bytes(limit), Bytes(fixed), own_stored, processes);
        (self.floor_pages, self.resident_pages, self.refused_pages) = (floor, resident, refused);
        let movable = Movable::above(FrameCount(floor), resident, holding, refused);
        let facts = Facts {
            limit: (limit != crate::control::UNLIMITED).then_some(Bytes(limit)),
            tree_used: Bytes(tree_used),
            own_used: Bytes(used),
            own_resident_pages: movable.resident_pages,
            holding_pages: movable.holding_pages,
            since_last_ns: now - self.last_ns,
            growth: Bytes(tree_used.saturating_sub(self.last_used)),
            processes,
            processors: self.processors,
        };
        self.last_ns = now;
        self.last_used = tree_used;
        facts
    }

    /// Resident anonymous memory; pages shared with relatives count in part.
    fn read_used(&mut self, now: u64) -> u64 {
        let Ok(MemoryBytes { anonymous, writable }) = self.memory.read() else {
            return self.runtime.own_slot().used_bytes.load(Relaxed);
        };
        self.extent = Extent { writable: Bytes(writable), used: Bytes(anonymous) };
        if self.runtime.is_shared.load(Relaxed) && self.sharing.is_due(now) {
            let proportional = self.memory.read_proportional_bytes().ok().map(Bytes);
            if !self.sharing.note(now, Bytes(anonymous), proportional) {
                self.runtime.is_shared.store(false, Relaxed);
            }
        }
        self.sharing.own(Bytes(anonymous)).0
    }
}
