//! Course: how RAM, demand and what the program loses go over time, and the budget that `--sysram auto` makes of it.
//!
//! [`Course::look`] runs ten times a second in `spm`'s loop: it gathers the facts ([`Meter`]), lets core decide
//! (`spmem_core::budget`) where the budget is automatic, and remembers both. `--report`, `--json` and `--svg` show it.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering::Relaxed;

use serde::Serialize;
use spmem::control::{Control, UNLIMITED};
use spmem_core::budget::{AutoBudget, Facts, LOOK_NS, Reason};
use spmem_core::units::{Bytes, Time};
use spmem_sys::process::{now_ns, process_time_ns};

use crate::machine::Ram;
use crate::size::{Slowdown, human};

/// What a fault costs its thread beside what the handler's clock sees, ns: into the kernel, until the handler runs, and until
/// the thread runs again. Measured as the time of a fault that is served with nothing, less the handler's part of it
/// (`cargo xtask bench auto` holds the estimate that comes of it against the clock).
const UNSEEN_NS: u64 = 8_000;
/// Samples that are kept; of more, every second one goes.
const MOST_SAMPLES: usize = 4096;
/// Steps that the report names.
const MOST_STEPS: usize = 12;
/// How often processors' idle time is looked at, ns: the kernel tells it in hundredths of a second.
const IDLE_NS: u64 = 1_000_000_000;

/// What was seen at a look.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sample {
    /// Since the start.
    pub seconds: f64,
    /// RAM that the tree takes.
    pub used_bytes: u64,
    /// RAM that it would take if no page had left.
    pub demand_bytes: u64,
    /// Null for no limit.
    pub limit_bytes: Option<u64>,
    /// What it lost since the look before, in per cent of the time that it computed.
    pub slowdown_percent: f64,
}

/// A change of an automatic budget that the report tells of.
#[derive(Clone, Debug, Serialize)]
struct Step {
    seconds: f64,
    from_bytes: u64,
    to_bytes: u64,
    slowdown_percent: f64,
    why: &'static str,
}

/// What an automatic budget came to, for the report.
#[derive(Clone, Debug, Serialize)]
pub struct AutoReport {
    allowed_percent: f64,
    /// Over the whole run: what was lost to faults, stalls and spmem's threads, of the time that the program computed.
    slowdown_percent: f64,
    smallest_bytes: u64,
    last_bytes: u64,
    /// Of the demand's peak, what the budget was on average since the program first stopped growing.
    mean_share_percent: f64,
    /// How many looks came to what, ten a second.
    looks: BTreeMap<&'static str, u32>,
    steps: Vec<Step>,
}

/// The course of a run.
pub struct Course {
    start_ns: u64,
    next_ns: u64,
    meter: Meter,
    auto: Option<(Slowdown, AutoBudget)>,
    samples: Vec<Sample>,
    /// Looks to leave out between two samples, and how many of them are left.
    skip: (u32, u32),
    steps: Vec<Step>,
    last: Option<(Facts, Reason)>,
    looks: BTreeMap<&'static str, u32>,
    smallest: u64,
}

impl Course {
    /// Of a run that begins now; with `slowdown` its budget is automatic.
    pub fn begin(slowdown: Option<Slowdown>, ram: Ram) -> Self {
        let now = now_ns();
        let auto = slowdown.map(|allowed| (allowed, AutoBudget::new(allowed.per_mille(), Bytes(ram.total_bytes))));
        Self {
            start_ns: now,
            next_ns: now,
            meter: Meter::new(now),
            auto,
            samples: Vec::new(),
            skip: (0, 0),
            steps: Vec::new(),
            last: None,
            looks: BTreeMap::new(),
            smallest: u64::MAX,
        }
    }

    /// Looks, if it is time, and sets the budget.
    pub fn look(&mut self, control: &Control) {
        let now = now_ns();
        if now < self.next_ns {
            return;
        }
        self.next_ns = now + LOOK_NS;
        let facts = self.meter.read(control, now);
        let mut slowdown = self.last.map_or(0.0, |(last, _)| {
            percent(facts.lost_ns.saturating_sub(last.lost_ns), facts.busy_ns.saturating_sub(last.busy_ns))
        });
        let mut reason = Reason::Grows;
        if let Some((_, budget)) = &mut self.auto {
            let from = control.limit_bytes.load(Relaxed);
            let decision = budget.look(&facts);
            control.limit_bytes.store(decision.limit.0, Relaxed);
            slowdown = f64::from(decision.slowdown) / 10.0;
            reason = decision.reason;
            *self.looks.entry(why(reason)).or_default() += 1;
            self.note_step(now, from, decision.limit.0, slowdown, reason);
        }
        self.note_sample(now, &facts, control.limit_bytes.load(Relaxed), slowdown);
        self.last = Some((facts, reason));
    }

    /// Steps of one kind in a row are one.
    fn note_step(&mut self, now: u64, from: u64, to: u64, slowdown: f64, reason: Reason) {
        if reason != Reason::Grows {
            self.smallest = self.smallest.min(to);
        }
        // Before the first try there is nothing to tell: the budget is the machine's RAM.
        let is_told = !self.steps.is_empty() || reason == Reason::Trimmed;
        if from == to || !is_told {
            return;
        }
        let why = why(reason);
        let is_same = self.last.is_some_and(|(_, last)| last == reason);
        match self.steps.last_mut() {
            Some(step) if is_same && step.why == why => {
                step.to_bytes = to;
                step.slowdown_percent = step.slowdown_percent.max(slowdown);
            }
            _ => self.steps.push(Step {
                seconds: self.seconds(now),
                from_bytes: from,
                to_bytes: to,
                slowdown_percent: slowdown,
                why,
            }),
        }
    }

    fn note_sample(&mut self, now: u64, facts: &Facts, limit: u64, slowdown_percent: f64) {
        if self.skip.1 > 0 {
            self.skip.1 -= 1;
            return;
        }
        self.skip.1 = self.skip.0;
        if self.samples.len() == MOST_SAMPLES {
            let mut index = 0;
            self.samples.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.skip.0 = self.skip.0 * 2 + 1;
        }
        self.samples.push(Sample {
            seconds: self.seconds(now),
            used_bytes: facts.used.0,
            demand_bytes: facts.demand.0,
            limit_bytes: (limit != UNLIMITED).then_some(limit),
            slowdown_percent,
        });
    }

    fn seconds(&self, now: u64) -> f64 {
        std::time::Duration::from_nanos(now - self.start_ns).as_secs_f64()
    }

    /// What has been seen.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// What the automatic budget came to; `None` for one that was given.
    pub fn report(&self) -> Option<AutoReport> {
        let (allowed, _) = self.auto.as_ref()?;
        let (facts, _) = self.last?;
        let settled = self.samples.iter().skip_while(|sample| sample.limit_bytes > Some(sample.used_bytes));
        let shares: Vec<_> = settled.map(|sample| percent(sample.used_bytes, sample.demand_bytes)).collect();
        #[allow(clippy::cast_precision_loss, reason = "a few thousand samples")]
        let mean = if shares.is_empty() { 100.0 } else { shares.iter().sum::<f64>() / shares.len() as f64 };
        let last = self.samples.last().and_then(|sample| sample.limit_bytes).unwrap_or(0);
        Some(AutoReport {
            allowed_percent: f64::from(allowed.per_mille()) / 10.0,
            slowdown_percent: tenths(percent(facts.lost_ns, facts.busy_ns)),
            smallest_bytes: self.smallest.min(last),
            last_bytes: last,
            mean_share_percent: tenths(mean),
            looks: self.looks.clone(),
            steps: self.steps.clone(),
        })
    }
}

impl AutoReport {
    /// What it was allowed to cost, in per cent.
    pub const fn allowed_percent(&self) -> f64 {
        self.allowed_percent
    }

    /// Lines of the report's table.
    pub fn table(&self) -> String {
        let mut text = format!(
            "  auto       {}% lost of the {}% allowed; at last {}, never below {}; on average {}% of what it would take\n",
            self.slowdown_percent,
            self.allowed_percent,
            human(self.last_bytes),
            human(self.smallest_bytes),
            self.mean_share_percent,
        );
        let left_out = self.steps.len().saturating_sub(MOST_STEPS);
        if left_out > 0 {
            text += &format!("             {left_out} earlier steps are in --json\n");
        }
        for step in &self.steps[left_out..] {
            text += &format!(
                "             {:>8.1} s  {:>8} -> {:<8}  {} ({:.1}% lost)\n",
                step.seconds,
                human(step.from_bytes),
                human(step.to_bytes),
                step.why,
                step.slowdown_percent,
            );
        }
        text
    }
}

const fn why(reason: Reason) -> &'static str {
    match reason {
        Reason::Grows => "it grows",
        Reason::TooSmall => "too small",
        Reason::Trimmed => "it loses little: tried smaller",
        Reason::JustRight => "it loses what it may",
        Reason::Held => "smaller was too small",
        Reason::InDebt => "it has to catch up first",
        Reason::Unmovable => "what is left does not leave",
        Reason::Bounded => "no more to be had, or no less tried",
    }
}

/// Gathers facts of a tree.
struct Meter {
    /// Processor time of each process that is or was there, less its agent's, ns.
    busy: HashMap<u32, u64>,
    /// That of processes that are gone.
    gone_ns: u64,
    /// What spmem's threads took while no processor was idle, ns, ...
    stolen_ns: u64,
    /// ... and a second how much that is at present.
    stolen_rate: u64,
    last_ns: u64,
    idle: Idle,
    stalls: Stalls,
}

impl Meter {
    fn new(now: u64) -> Self {
        Self {
            busy: HashMap::new(),
            gone_ns: 0,
            stolen_ns: 0,
            stolen_rate: 0,
            last_ns: now,
            idle: Idle { at_ns: now, idle_ns: read_idle_ns(), own_ns: 0 },
            stalls: Stalls { at_ns: now, total_ns: read_stalled_ns().unwrap_or(0) },
        }
    }

    fn read(&mut self, control: &Control, now: u64) -> Facts {
        let mut agents_ns = 0;
        let mut busy = HashMap::with_capacity(self.busy.len());
        for slot in control.live_slots() {
            let (pid, agent) = (slot.pid.load(Relaxed), slot.agent_ns.load(Relaxed));
            agents_ns += agent;
            let before = self.busy.remove(&pid).unwrap_or(0);
            // A process that is being reaped has no clock any more.
            busy.insert(pid, process_time_ns(pid).saturating_sub(agent).max(before));
        }
        self.gone_ns += self.busy.values().sum::<u64>();
        self.busy = busy;
        if let Some(rate) = self.idle.look(now, agents_ns) {
            self.stolen_rate = rate;
        }
        self.stolen_ns += self.stolen_rate / 1000 * (now - self.last_ns) / 1_000_000;
        self.last_ns = now;
        let used = control.sum(|slot| &slot.used_bytes);
        let (stored, frames) =
            (control.sum(|slot| &slot.stored_bytes), control.sum(|slot| &slot.store_used_bytes));
        let available = Ram::read().map_or(0, |ram| ram.available_bytes);
        // Where the machine itself waits for memory, nobody is given more.
        let ceiling = if self.stalls.are_many(now) { used } else { used.saturating_add(available / 8 * 7) };
        Facts {
            now: Time(now),
            used: Bytes(used),
            demand: Bytes(used.saturating_sub(frames).saturating_add(stored)),
            busy_ns: self.gone_ns + self.busy.values().sum::<u64>(),
            lost_ns: control.faults.total_ns() + control.faults.count() * UNSEEN_NS + self.stolen_ns,
            ceiling: Bytes(ceiling),
        }
    }
}

/// Whether spmem's own threads run on processors that nobody else wants.
struct Idle {
    at_ns: u64,
    idle_ns: u64,
    own_ns: u64,
}

impl Idle {
    /// Once a second: what they take away from others, ns a second.
    fn look(&mut self, now: u64, agents_ns: u64) -> Option<u64> {
        let since = now - self.at_ns;
        if since < IDLE_NS {
            return None;
        }
        let (idle_ns, own_ns) = (read_idle_ns(), agents_ns + process_time_ns(spmem_sys::process::pid()));
        let own = own_ns.saturating_sub(self.own_ns);
        let stolen = own.saturating_sub(idle_ns.saturating_sub(self.idle_ns));
        *self = Self { at_ns: now, idle_ns, own_ns };
        Some(stolen.saturating_mul(1000) / (since / 1_000_000))
    }
}

/// Time for which processors had nothing to do, all together, ns (proc_stat(5)); 0 where the kernel does not say.
fn read_idle_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let numbers = text.lines().next().unwrap_or("").split_whitespace().skip(4).take(2);
    let ticks: u64 = numbers.filter_map(|number| number.parse::<u64>().ok()).sum();
    ticks * (1_000_000_000 / rustix::param::clock_ticks_per_second().max(1))
}

/// Whether the machine waits for memory, by PSI (Documentation/accounting/psi.rst).
struct Stalls {
    at_ns: u64,
    total_ns: u64,
}

impl Stalls {
    /// More than a tenth of the last second or so.
    fn are_many(&mut self, now: u64) -> bool {
        let Some(total_ns) = read_stalled_ns() else { return false };
        let (since, stalled) = (now - self.at_ns, total_ns.saturating_sub(self.total_ns));
        let are_many = stalled > since / 10;
        if since >= IDLE_NS {
            *self = Self { at_ns: now, total_ns };
        }
        are_many
    }
}

/// Time for which some thread of the machine waited for memory, ns; `None` on a kernel without PSI.
fn read_stalled_ns() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/pressure/memory").ok()?;
    let total = text.lines().find(|line| line.starts_with("some "))?.split("total=").nth(1)?;
    total.trim().parse::<u64>().ok().map(|us| us * 1000)
}

#[allow(clippy::cast_precision_loss, reason = "a percentage needs three digits")]
fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 * 100.0 }
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}
