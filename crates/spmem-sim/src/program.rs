//! Programs inside a budget: a tree of processes whose pages leave for node 1 and come back, as under `spm run`.
//!
//! What decides is core's, the same that the runtime asks: how many pages leave (`reclaim`), which (`lru`), who waits
//! (`Throttle`), what comes along (`Readahead`), and the frames of node 1 come through the wall from a grant. What is
//! simulated is the rest: threads that touch pages, the time that things take ([`Costs`]), how well pages compress.
//!
//! Time is made of events, each of one thread or one pressure loop; ties go by age. Pages have versions in place of
//! bytes: a page that comes back with another version than it had is a [`Violation`], as is a tree that exceeds its budget by
//! more than is promised, and a fault that waits too long.
//!
//! Holes: one reclaimer a process, and a processor for everyone; neighbours do not compress alike.

mod page;
mod process;
mod recorded;
mod source;

use core::cmp::Reverse;
use std::collections::BinaryHeap;

use spmem_core::grant::{Rights, Terms};
use spmem_core::mm::MemoryManager;
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
use spmem_core::reclaim::PATIENCE_NS;
use spmem_core::units::{Bytes, FrameCount, NodeId};
use spmem_core::zero::Initial;

use self::process::{Process, Touched};
pub use self::recorded::{From, Record, Recording, Why};
pub use self::source::{Access, Pattern, Source};
use crate::check::{Violation, hold};
use crate::machine::lend;

/// How much a budget may be exceeded: so many bytes, ...
const OVERRUN: Bytes = Bytes::mib(32);
/// ... and this part of it.
const OVERRUN_SHARE: u64 = 20;
/// How often a waiting fault is looked at, ns.
const RETRY_NS: u64 = 50_000;

/// How long things take, ns. The default is of the order seen on a virtual machine with two cores; a simulation compares
/// policies, it does not predict times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// A first touch that the kernel serves itself.
    pub first_touch: u64,
    /// A fault for a page that is nowhere, or in the holding area.
    pub rescue: u64,
    /// A fault for a page of node 1, and each page that comes along.
    pub promote: u64,
    /// One look of the pressure loop.
    pub look: u64,
    /// A page into the holding area.
    pub sweep: u64,
    /// A page to node 1.
    pub demote: u64,
}

impl Default for Costs {
    fn default() -> Self {
        Self { first_touch: 1000, rescue: 2000, promote: 4000, look: 20_000, sweep: 500, demote: 4000 }
    }
}

/// What the pages of a process are like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Drawn for each page.
    Made(Mix),
    /// Known of each page: bytes that it takes on node 1, none for one that cannot leave.
    Known(Vec<Option<u16>>),
}

/// A mix of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Bytes that a page takes on node 1, on average; sizes vary by half of it up and down.
    pub mean_bytes: u64,
    /// Of a thousand pages, those that do not compress.
    pub incompressible: u64,
    /// Of a thousand pages, those that the kernel does not move.
    pub pinned: u64,
}

/// A process.
#[derive(Debug)]
pub struct Program {
    /// Pages of its address space.
    pub pages: usize,
    /// What they are like.
    pub content: Content,
    /// What its threads do, one source each.
    pub threads: Vec<Source>,
}

/// A tree of processes and its budget.
#[derive(Debug)]
pub struct Setup {
    /// The budget.
    pub limit: Bytes,
    /// Frames of node 1.
    pub node: FrameCount,
    /// The processes.
    pub programs: Vec<Program>,
    /// How long things take.
    pub costs: Costs,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The time at which the last thread was done, ns.
    pub elapsed_ns: u64,
    /// Touches of pages.
    pub accesses: u64,
    /// Pages that came back from node 1 because they were touched, and unasked.
    pub promoted: u64,
    /// Of these: unasked.
    pub read_ahead: u64,
    /// Pages that came back from the holding area.
    pub rescued: u64,
    /// Pages that left for node 1.
    pub demoted: u64,
    /// Of these: their copy was still equal.
    pub clean: u64,
    /// Pages that could not leave, each time one was tried.
    pub refused: u64,
    /// Times that node 1 was full.
    pub full: u64,
    /// What threads waited for room, ns.
    pub stalled_ns: u64,
    /// The most RAM in use.
    pub peak: Bytes,
    /// How long each fault took, ns, shortest first.
    pub faults_ns: Vec<u64>,
}

impl Report {
    /// The time within which so many of a thousand faults were served, ns.
    ///
    /// ```
    /// let report = spmem_sim::program::Report { faults_ns: (1..=100).collect(), ..Default::default() };
    /// assert_eq!((report.fault_ns(500), report.fault_ns(1000)), (50, 100));
    /// ```
    pub fn fault_ns(&self, per_mille: usize) -> u64 {
        let at = (self.faults_ns.len() * per_mille).div_ceil(1000);
        self.faults_ns.get(at.saturating_sub(1)).copied().unwrap_or(0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A thread touches its page, or tries again.
    Thread { process: usize, thread: usize },
    /// A pressure loop looks, unless it was woken since.
    Look { process: usize, ticket: u64 },
}

/// The tree, running.
struct Tree {
    mm: MemoryManager,
    limit: Bytes,
    costs: Costs,
    /// Each thread has one.
    processors: u32,
    processes: Vec<Process>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    serial: u64,
    report: Report,
}

/// Runs a tree until all threads are done.
///
/// # Errors
/// [`Violation`]: a page came back wrong, the budget was not kept, or a thread waited for ever.
pub fn run(setup: Setup) -> Result<Report, Violation> {
    let mut tree = Tree::new(setup);
    while let Some(Reverse((now, _, event))) = tree.events.pop() {
        match event {
            Event::Thread { process, thread } => tree.thread(now, process, thread)?,
            Event::Look { process, ticket } => tree.look(now, process, ticket)?,
        }
    }
    tree.end()
}

impl Tree {
    fn new(setup: Setup) -> Self {
        let mut mm = MemoryManager::new();
        let spec = NodeSpec {
            node_type: NodeType::Spm,
            class: Class::Featured,
            services: Services::empty(),
            guard: Guard::Hard,
            owner: "simulated".into(),
        };
        let registry = mm.registry_mut();
        let owner = registry.register(NodeId::ONE, spec.clone()).expect("the node is the first").owner;
        let lent = lend(setup.node).expect("memory for what is kept of node 1");
        registry.add_range(&owner, &spec, setup.node, lent, Initial::Zero).expect("a range that fits");
        let process = |(number, program): (usize, Program)| {
            let terms = Terms::new(Rights::ALLOC, setup.node.bytes());
            let grant = registry.grant(&[&owner], terms).expect("by the owner");
            Process::new(number as u64, program, grant)
        };
        let processes: Vec<_> = setup.programs.into_iter().enumerate().map(process).collect();
        let (limit, costs) = (setup.limit, setup.costs);
        let threads: usize = processes.iter().map(|process| process.threads.len()).sum();
        let processors = u32::try_from(threads).unwrap_or(u32::MAX);
        let (events, report) = Default::default();
        let mut tree = Self { mm, limit, costs, processors, processes, events, serial: 0, report };
        for process in 0..tree.processes.len() {
            tree.schedule(0, Event::Look { process, ticket: 0 });
            for thread in 0..tree.processes[process].threads.len() {
                tree.schedule_next(0, process, thread);
            }
        }
        tree
    }

    fn schedule(&mut self, at_ns: u64, event: Event) {
        self.serial += 1;
        self.events.push(Reverse((at_ns, self.serial, event)));
    }

    /// The thread's next touch, after it has thought; none when it is done.
    fn schedule_next(&mut self, now: u64, process: usize, thread: usize) {
        self.report.elapsed_ns = self.report.elapsed_ns.max(now);
        if let Some(at) = self.processes[process].threads[thread].think(now) {
            self.schedule(at, Event::Thread { process, thread });
        }
    }

    fn thread(&mut self, now: u64, process: usize, thread: usize) -> Result<(), Violation> {
        let at = &mut self.processes[process];
        match at.touch(now, thread, &self.costs, &mut self.report, &mut self.mm)? {
            Touched::At(done) => {
                self.report.accesses += 1;
                self.check(process)?;
                self.schedule_next(done, process, thread);
            }
            Touched::Waits { is_new } => {
                let threads = at.threads.len() as u64;
                let waited = now - at.threads[thread].since_ns.unwrap_or(now);
                hold("throttle", waited <= (threads + 1) * (PATIENCE_NS + 2 * RETRY_NS), || {
                    format!("a thread of {threads} waits for {waited} ns")
                })?;
                if is_new {
                    at.ticket += 1;
                    let ticket = at.ticket;
                    self.schedule(now, Event::Look { process, ticket });
                }
                self.schedule(now + RETRY_NS, Event::Thread { process, thread });
            }
        }
        Ok(())
    }

    fn look(&mut self, now: u64, process: usize, ticket: u64) -> Result<(), Violation> {
        if self.processes[process].ticket != ticket {
            return Ok(());
        }
        let is_over = self.processes.iter().all(Process::is_done);
        if is_over {
            return Ok(());
        }
        self.processes[process].publish();
        let sum = |what: fn(&Process) -> u64| self.processes.iter().map(what).sum::<u64>();
        let (used, fixed) = (sum(Process::published), sum(Process::fixed));
        let count = u32::try_from(self.processes.len()).unwrap_or(u32::MAX);
        let at = &mut self.processes[process];
        let (limit, used, fixed) = (self.limit, Bytes(used), Bytes(fixed));
        let look = process::Surroundings { limit, used, fixed, count, processors: self.processors };
        let done = at.look(now, &look, &self.costs, &mut self.report, &mut self.mm)?;
        self.check(process)?;
        self.schedule(done.max(now + 1), Event::Look { process, ticket });
        Ok(())
    }

    /// What a budget promises: it is exceeded by little, but for what cannot leave.
    fn check(&mut self, process: usize) -> Result<(), Violation> {
        let sum = |what: fn(&Process) -> u64| self.processes.iter().map(what).sum::<u64>();
        let used = sum(Process::used);
        self.report.peak = self.report.peak.max(Bytes(used));
        let unavoidable = sum(Process::unavoidable);
        if self.report.full > 0 {
            return Ok(()); // what is full may be full for a while
        }
        let allowed = self.limit.0.max(unavoidable).saturating_add(self.limit.0 / OVERRUN_SHARE + OVERRUN.0);
        hold("budget", used <= allowed, || {
            format!(
                "process {process}: {} in use, {} allowed of a limit of {}",
                Bytes(used),
                Bytes(allowed),
                self.limit
            )
        })
    }

    fn end(mut self) -> Result<Report, Violation> {
        for (number, process) in self.processes.iter_mut().enumerate() {
            hold("frames", process.is_done(), || format!("process {number} has threads that never run again"))?;
            process.check_all(&mut self.mm)?;
        }
        let left = self.mm.stats(NodeId::ONE).map_or(0, |stats| stats.used.0);
        hold("frames", left == 0, || format!("{left} frames of node 1 are nobody's"))?;
        self.report.faults_ns.sort_unstable();
        Ok(self.report)
    }
}
