//! Budget: the smallest RAM at which a program stays within a slow-down (`spm run --sysram auto`).
//!
//! [`AutoBudget::look`] is the whole decision, a few times a second. What a program loses is what its threads wait for pages
//! and room, and what spmem's threads take from it where no processor is idle; set against the time that it computes, that is
//! its slow-down. While it grows, its budget runs ahead of it. When it does not, the budget is trimmed in small steps, as Meta's
//! senpai does by PSI (Weiner et al., "TMO: Transparent Memory Offloading in Datacenters", ASPLOS 2022), until a step costs
//! more than is allowed: then it goes up again at once, and the next try waits, longer each time that it fails.
//! What was lost is remembered: a program that pays for tries with more than its allowance is left alone until it has caught up.
//! Pure: the caller measures and keeps the time. Called by `spm`'s supervisor.

use crate::units::{Bytes, Time};

/// How often to look, ns.
pub const LOOK_NS: u64 = 100_000_000;
/// The least budget that is tried.
pub const LEAST: Bytes = Bytes::mib(16);
/// A try is this part of the budget smaller at first: 6 % a second, which an encoder keeps up with for programs of a few GiB.
const TRY_SHARE: u64 = 16;
/// How long a try takes, ns. What is lost in its first half tells of pages that left and were wanted after all, which is how the
/// sweep learns what is hot; the second half tells what the budget costs.
const TRY_NS: u64 = 1_000_000_000;
/// A try that costs more than the allowance for so much time of computing is given up before its end, ns.
const TRY_COST_NS: u64 = 4_000_000_000;
/// After tries that failed it is as little as this part.
const TRY_LEAST_SHARE: u64 = 256;
/// Tries that went well, one after another, until what failed before is forgotten.
const RUN_OF_LUCK: u32 = 4;
/// A budget that was too small from the start goes up by at least this part, ...
const RAISE_LEAST_SHARE: u64 = 32;
/// ... and at most this one.
const RAISE_MOST_SHARE: u64 = 4;
/// Demand that rises by more than this part between two looks is growth.
const GROWTH_SHARE: u64 = 128;
/// So many times what it grew by is kept ready for a program that grows.
const GROWTH_AHEAD: u64 = 4;
/// A program that grew is left alone for so long, ns.
const SETTLE_NS: u64 = 1_000_000_000;
/// How long a budget that was found too small is kept away from at first, ns, ...
const HOLD_LEAST_NS: u64 = 4_000_000_000;
/// ... and at last.
const HOLD_MOST_NS: u64 = 256_000_000_000;
/// What a program may save up for tries: its allowance for so much time of computing, ns.
const CREDIT_NS: u64 = 10_000_000_000;
/// Less lost time than this between two looks says nothing, ns.
const NOISE_NS: u64 = 500_000;
/// So long a budget may be passed until it counts as one that cannot be kept, ns.
const PATIENCE_NS: u64 = 1_000_000_000;
/// Demand that differs by more than this part from what it was is another load.
const CHANGE_SHARE: u64 = 8;

/// What is known at a look. Times and counts since the beginning; none ever falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The time.
    pub now: Time,
    /// RAM that the tree takes.
    pub used: Bytes,
    /// RAM that it would take if no page had left.
    pub demand: Bytes,
    /// Time for which its own threads computed, all together, ns.
    pub busy_ns: u64,
    /// Time that they lost to spmem, ns.
    pub lost_ns: u64,
    /// RAM that the machine can give it.
    pub ceiling: Bytes,
}

/// Why the budget is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The program grows: the budget runs ahead of it.
    Grows,
    /// It loses more than it may: the budget was too small.
    TooSmall,
    /// It loses little: the budget is tried smaller.
    Trimmed,
    /// It loses about what it may.
    JustRight,
    /// Smaller was too small a while ago.
    Held,
    /// It has lost more than it may, and is catching up.
    InDebt,
    /// What is left does not leave: it is stored already, cannot be moved, or does not compress.
    Unmovable,
    /// The machine has no more, or the budget is the least that is tried.
    Bounded,
}

/// What a look comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// RAM that the tree may take now.
    pub limit: Bytes,
    /// Why.
    pub reason: Reason,
    /// What it lost since the last look, of the time that it computed, per mille.
    pub slowdown: u32,
}

/// A budget whose cost is not known yet.
#[derive(Clone, Debug)]
struct Try {
    before: Bytes,
    since: Time,
    /// Lost beyond the allowance, ns.
    excess_ns: i64,
    /// In its second half: computed and lost, ns.
    late: (u64, u64),
}

/// What is remembered from look to look.
#[derive(Clone, Debug)]
pub struct AutoBudget {
    /// Per mille of the time that it computes.
    allowed: u64,
    limit: Bytes,
    last: Option<Facts>,
    /// Lost beyond the allowance, ns; below zero: saved up.
    debt_ns: i64,
    /// What the last try that failed cost beyond the allowance, ns.
    try_cost_ns: i64,
    /// The part by which the next try is smaller.
    try_share: u64,
    /// Tries that went well since one failed.
    luck: u32,
    trial: Option<Try>,
    /// Of the last looks, the older ones counting less: computed and lost, ns.
    recent: (u64, u64),
    /// When a try failed last.
    failed_at: Time,
    hold_ns: u64,
    hold_until: Time,
    /// When it grew last.
    grew_at: Time,
    /// Since when the tree takes more than it may.
    over_since: Option<Time>,
    /// Demand when a budget was last found too small.
    load: Bytes,
}

impl AutoBudget {
    /// Of a program that has not begun and may be slowed down by `allowed` per mille. Its first budget is the machine's RAM.
    ///
    /// ```
    /// use spmem_core::budget::{AutoBudget, Facts, Reason};
    /// use spmem_core::units::{Bytes, Time};
    /// let (mut budget, gib) = (AutoBudget::new(50, Bytes::mib(8192)), Bytes::mib(1024));
    /// let facts = Facts { now: Time(0), used: gib, demand: gib, busy_ns: 0, lost_ns: 0, ceiling: Bytes::mib(8192) };
    /// budget.look(&facts);
    /// let later = Facts { now: Time(1_000_000_000), busy_ns: 1_000_000_000, ..facts };
    /// let decision = budget.look(&later);
    /// assert_eq!((decision.reason, decision.limit), (Reason::Trimmed, Bytes::mib(960)), "it loses nothing");
    /// ```
    pub const fn new(allowed: u32, ram: Bytes) -> Self {
        Self {
            allowed: allowed as u64,
            limit: ram,
            last: None,
            debt_ns: 0,
            try_cost_ns: 0,
            try_share: TRY_SHARE,
            luck: 0,
            trial: None,
            recent: (0, 0),
            failed_at: Time(0),
            hold_ns: 0,
            hold_until: Time(0),
            grew_at: Time(0),
            over_since: None,
            load: Bytes(0),
        }
    }

    /// What the tree may take from now on.
    pub fn look(&mut self, facts: &Facts) -> Decision {
        let Some(last) = self.last.replace(*facts) else {
            return Decision { limit: self.limit, reason: Reason::Grows, slowdown: 0 };
        };
        let busy = facts.busy_ns.saturating_sub(last.busy_ns);
        let lost = facts.lost_ns.saturating_sub(last.lost_ns);
        let slowdown = if lost < NOISE_NS { 0 } else { per_mille(lost, busy) };
        let excess = self.note_debt(busy, lost);
        self.recent = (self.recent.0 / 4 * 3 + busy, self.recent.1 / 4 * 3 + lost);
        let (limit, reason) = self.decide(facts, &last, (busy, lost, excess));
        let bounded = Bytes(limit.0.min(facts.ceiling.0).max(LEAST.0));
        let reason = if bounded == limit { reason } else { Reason::Bounded };
        self.limit = bounded;
        Decision { limit: bounded, reason, slowdown: u32::try_from(slowdown).unwrap_or(u32::MAX) }
    }

    /// What was lost beyond the allowance since the last look, ns.
    fn note_debt(&mut self, busy: u64, lost: u64) -> i64 {
        let excess = i64::try_from(lost).unwrap_or(i64::MAX).saturating_sub(self.allowance(busy));
        // What lies long back is no reason to leave memory unused for ever.
        let most = self.allowance(CREDIT_NS).max(self.try_cost_ns);
        self.debt_ns = self.debt_ns.saturating_add(excess).clamp(-most, 4 * most);
        excess
    }

    fn allowance(&self, ns: u64) -> i64 {
        i64::try_from(u128::from(ns) * u128::from(self.allowed) / 1000).unwrap_or(i64::MAX)
    }

    fn decide(&mut self, facts: &Facts, last: &Facts, cost: (u64, u64, i64)) -> (Bytes, Reason) {
        let grown = facts.demand.0.saturating_sub(last.demand.0);
        if grown > last.demand.0 / GROWTH_SHARE {
            (self.trial, self.grew_at) = (None, facts.now);
            let ahead = grown.saturating_mul(GROWTH_AHEAD).saturating_add(facts.used.0 / RAISE_MOST_SHARE);
            return (Bytes(self.limit.0.max(facts.used.0.saturating_add(ahead))), Reason::Grows);
        }
        let is_other_load = facts.demand.0.abs_diff(self.load.0) > self.load.0 / CHANGE_SHARE;
        if is_other_load {
            (self.try_share, self.hold_ns, self.hold_until) = (TRY_SHARE, 0, facts.now);
        }
        if let Some(trial) = self.trial.take() {
            if let Some(decision) = self.judge(facts, trial, cost) {
                return decision;
            }
        } else if self.recent_slowdown() > self.allowed && facts.now.since(self.failed_at) > TRY_NS / 2 {
            let raised = self.raised(facts.used);
            self.note_too_small(facts);
            return (raised, Reason::TooSmall);
        }
        if facts.used > self.limit {
            let since = *self.over_since.get_or_insert(facts.now);
            if facts.now.since(since) < PATIENCE_NS {
                return (self.limit, Reason::Trimmed);
            }
            self.load = facts.demand;
            self.hold(facts.now);
            return (facts.used, Reason::Unmovable);
        }
        self.over_since = None;
        if facts.now < self.hold_until {
            (self.limit, Reason::Held)
        } else if facts.now.since(self.grew_at) < SETTLE_NS {
            (self.limit, Reason::Grows)
        } else if self.debt_ns.saturating_add(self.try_cost_ns) > 0 {
            (self.limit, Reason::InDebt)
        } else if self.recent_slowdown() > self.allowed / 2 {
            (self.limit, Reason::JustRight)
        } else {
            let from = self.limit.0.min(facts.used.0);
            let step = from / self.try_share;
            // A budget far above what is used is no place to go back to.
            let before = Bytes(self.limit.0.min(from.saturating_add(step)));
            self.trial = Some(Try { before, since: facts.now, excess_ns: 0, late: (0, 0) });
            (Bytes(from - step), Reason::Trimmed)
        }
    }

    /// Whether a try goes on, or has failed; `None`: it went well.
    fn judge(&mut self, facts: &Facts, mut trial: Try, cost: (u64, u64, i64)) -> Option<(Bytes, Reason)> {
        let (busy, lost, excess) = cost;
        let age = facts.now.since(trial.since);
        trial.excess_ns = trial.excess_ns.saturating_add(excess);
        if age > TRY_NS / 2 {
            trial.late = (trial.late.0 + busy, trial.late.1 + lost);
        }
        let is_dear = trial.excess_ns > self.allowance(TRY_COST_NS);
        if age < TRY_NS && !is_dear {
            self.trial = Some(trial);
            return Some((self.limit, Reason::Trimmed));
        }
        let is_lost = trial.late.1 >= NOISE_NS && per_mille(trial.late.1, trial.late.0) > self.allowed;
        if is_dear || is_lost {
            self.try_share = (self.try_share * 2).min(TRY_LEAST_SHARE);
            self.try_cost_ns = trial.excess_ns.max(0);
            self.note_too_small(facts);
            // What left is still coming back.
            self.failed_at = facts.now;
            return Some((trial.before, Reason::TooSmall));
        }
        self.luck += 1;
        if self.luck >= RUN_OF_LUCK {
            (self.luck, self.hold_ns) = (0, 0);
            self.try_share = (self.try_share / 2).max(TRY_SHARE);
        }
        None
    }

    fn note_too_small(&mut self, facts: &Facts) {
        self.load = facts.demand;
        (self.luck, self.recent) = (0, (0, 0));
        self.hold(facts.now);
    }

    /// Per mille, over the last half second or so.
    fn recent_slowdown(&self) -> u64 {
        let (busy, lost) = self.recent;
        if lost < NOISE_NS { 0 } else { per_mille(lost, busy) }
    }

    /// No try for a while, a longer one each time.
    fn hold(&mut self, now: Time) {
        self.over_since = None;
        // What is lost while nothing is tried still belongs to the last try.
        if now >= self.hold_until {
            self.hold_ns = self.hold_ns.saturating_mul(2).clamp(HOLD_LEAST_NS, HOLD_MOST_NS);
        }
        self.hold_until = now.after(self.hold_ns);
    }

    /// A budget that is too small without having been made smaller: the more is lost, the larger the step. One that is not used up
    /// is large enough: what is lost then are pages that left before.
    fn raised(&self, used: Bytes) -> Bytes {
        let step = used.0 / RAISE_LEAST_SHARE * (self.recent_slowdown() / self.allowed.max(1)).max(1);
        Bytes(self.limit.0.max(used.0.saturating_add(step.min(used.0 / RAISE_MOST_SHARE))))
    }
}

/// Per mille; of nothing it is everything.
fn per_mille(part: u64, whole: u64) -> u64 {
    u64::try_from(u128::from(part) * 1000 / u128::from(whole.max(1))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
