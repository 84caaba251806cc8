//! Reclaim: how many pages must leave RAM now, who may grow, and when to look again.
//!
//! [`plan`] is the whole decision of a pressure loop; each process of a tree runs its own, on the same tree-wide
//! numbers. Marks lie below the limit: from *gate* on first touches go through the fault handler; eviction begins at
//! *low* and aims at *high*; from *close* on first touches wait. What lies between high and the limit is RAM not used,
//! and each byte of it costs nearly two of resident pages, so it is little: the gate keeps growth from overrunning it.
//! The processes share the excess in proportion to what they use. What goes with it: [`Floor`] (what stays), [`Throttle`]
//! and [`Turnstile`] (who waits), [`Coverage`] (who can be made to wait), [`Progress`] and [`Retry`] (what could not leave),
//! [`Mapping`] (what may leave at all), [`Sharing`] (what counts), [`reclaimers`] and [`Needs`] (how many threads work),
//! [`Pace`] (which does), [`Spin`] and [`answer_sleep_ns`] (how long they wait for each other), [`Stay`], [`Rounds`] and
//! [`Dictionaries`] (what is stored more densely).
//! Pure: the caller measures, and performs the plan. Called by the runtime's pressure loop and the simulator.
//!
//! Holes: pages are taken to free a whole page each; what the compressed copy takes is made up for by the next look.
//! A process with nothing left to evict is never held at the gate, even where others could make room for it.

mod density;
mod encoding;
mod floor;
mod following;
mod helpers;
mod managed;
mod pace;
mod progress;
mod retry;
mod sharing;
mod throttle;

pub use self::density::{
    DENSE_PAGES, Departure, Dictionaries, Hurry, LEARN_PAGES, LOOK_ENTRIES, Payoff, Rounds, SAMPLE_PAGES, Stay,
    Turnover, Way, compacts, on_round,
};
pub use self::encoding::{ENCODER_IDLE_NS, Spin, answer_sleep_ns};
pub use self::floor::{FLOOR_CROWDED, FLOOR_MAX, FLOOR_MIN, Floor, Movable, keeps_copies};
pub use self::following::{Follow, Following};
pub use self::helpers::{HELPER_REST_NS, MAX_RECLAIMERS, Needs, reclaimers};
pub use self::managed::{Mapping, Origin};
pub use self::pace::{AHEAD_PAGES, Footing, Pace, Pacer, pages_along};
pub use self::progress::Progress;
pub use self::retry::Retry;
pub use self::sharing::Sharing;
pub use self::throttle::{Admission, CROWDED_NS, Cover, Coverage, Extent, Look, PATIENCE_NS, Throttle, Turnstile};

use crate::units::{Bytes, PAGE_SIZE};

/// Pages of one batch: short enough that a fork or the next look waits about a millisecond.
pub const BATCH_PAGES: u64 = 32;
/// A tree that takes less than this part of its limit needs nothing prepared.
const NEAR_SHARE: u64 = 4;
/// The longest sleep, ns.
pub const SLEEP_MAX_NS: u64 = 100_000_000;
/// The shortest sleep of a process that evicts nothing, ns; matters near the gate of small limits on many processors.
pub const SLEEP_MIN_NS: u64 = 100_000;
/// The longest sleep once first touches go through the fault handler, which tells of growth, ns.
pub const SLEEP_GATED_NS: u64 = 1_000_000;
/// Sleep of a process that could evict nothing although it should, ns.
pub const SLEEP_STUCK_NS: u64 = 1_000_000;
/// The fastest growth of one processor that the sleep allows for, bytes a second: faster than a core zeroes pages.
pub const GROWTH_MAX_BYTES_PER_S: u64 = 4 << 30;
/// Processors that can grow so fast together: more than this share the bandwidth of memory.
pub const GROWING_MAX: u32 = 16;
/// The distance of the gate from the limit is never smaller, but for limits below 8 MiB: a quarter of them.
pub const MARGIN_MIN: Bytes = Bytes::mib(2);
/// The distance of the gate from the limit is never larger.
pub const MARGIN_MAX: Bytes = Bytes::mib(16);
/// The distance of the gate is so many times that of the low mark.
const GATE_SHARE: u64 = 8;
/// The holding area is aimed at this part of the limit.
const HOLDING_SHARE: u64 = 16;
/// The holding area is aimed no smaller than this, pages, unless many processes share a small limit.
pub const HOLDING_MIN_PAGES: u64 = 64;
/// The holding area is never aimed larger than this, pages (256 MiB).
pub const HOLDING_MAX_PAGES: u64 = 65536;

/// A process has slots for this part of the pages of its limit in its holding area, ...
const SLOTS_SHARE: u64 = 6;
/// ... but at least, ...
const SLOTS_MIN: u32 = 1024;
/// ... and at most so many: twice what is ever aimed at.
const SLOTS_MAX: u32 = 1 << 17;
const _: () = assert!(SLOTS_MAX as u64 == 2 * HOLDING_MAX_PAGES);

/// How many pages the holding area of a process can hold: address space, taken once.
///
/// ```
/// use spmem_core::{reclaim::holding_slots, units::Bytes};
/// assert_eq!([1, 96, 1 << 20].map(Bytes::mib).map(holding_slots), [1024, 4096, 1 << 17]);
/// ```
pub fn holding_slots(limit: Bytes) -> u32 {
    let slots = u32::try_from(limit.frames_floor().0 / SLOTS_SHARE).unwrap_or(u32::MAX);
    slots.clamp(SLOTS_MIN, SLOTS_MAX)
}

/// What a process knows when it looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// RAM that the tree may take; `None` for no limit.
    pub limit: Option<Bytes>,
    /// RAM that the tree takes: resident pages, holding areas, stores, metadata.
    pub tree_used: Bytes,
    /// Of it: this process's.
    pub own_used: Bytes,
    /// Pages of this process that are mapped and, as far as known, could leave.
    pub own_resident_pages: u64,
    /// Pages of this process in its holding area.
    pub holding_pages: u64,
    /// Time since the last look, ns.
    pub since_last_ns: u64,
    /// By how much the tree grew since then.
    pub growth: Bytes,
    /// Processes in the tree that plan; 0 counts as 1.
    pub processes: u32,
    /// Processors that the tree runs on, all of which can touch memory for the first time at once; 0 counts as 1.
    pub processors: u32,
}

/// Whether first touches go on, mildest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gate {
    /// At native speed.
    Open,
    /// They go through the fault handler, which may slow them down.
    Throttled,
    /// They wait until the next look.
    Closed,
}

/// What a process does until it looks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Pages to move to the store: out of the holding area, oldest first, which is filled again from mapped pages.
    pub evict_pages: u64,
    /// How many pages the holding area is filled to while usage is above the high mark; else 0. Never a reason to empty
    /// it.
    pub holding_target_pages: u64,
    /// Whether first touches go on.
    pub gate: Gate,
    /// When to look again at the latest, ns; 0 right after this plan is done.
    pub sleep_ns: u64,
}

impl Plan {
    /// How many pages to let go for the holding area in a batch, with `held` in it and `going` on their way. While it is at least
    /// half full, none for a few: to look for pages takes as long as to move some.
    ///
    /// ```
    /// use spmem_core::reclaim::{Gate, Plan};
    /// let plan = Plan { evict_pages: 9, holding_target_pages: 100, gate: Gate::Throttled, sleep_ns: 0 };
    /// assert_eq!((plan.sweep_pages(0, 0), plan.sweep_pages(80, 10), plan.sweep_pages(90, 3)), (16, 10, 0));
    /// assert_eq!(Plan { holding_target_pages: 8, ..plan }.sweep_pages(3, 0), 5);
    /// assert_eq!(Plan { holding_target_pages: 1, ..plan }.sweep_pages(0, 0), 1);
    /// ```
    pub fn sweep_pages(&self, held: u64, going: u64) -> u64 {
        let missing = self.holding_target_pages.saturating_sub(held).saturating_sub(going);
        let is_few = missing < BATCH_PAGES / 4 && held >= self.holding_target_pages.div_ceil(2);
        if is_few { 0 } else { missing.min(BATCH_PAGES / 2) }
    }

    /// How many pages to demote in a batch that found so many in the holding area and moved so many more there. While it fills
    /// up none: what was moved is progress, and is demoted next.
    pub fn demote_pages(&self, held: u64, moved: u64) -> u64 {
        let is_filling = moved > 0 && held.saturating_add(moved) < self.holding_target_pages / 2;
        if is_filling { 0 } else { self.evict_pages.min(BATCH_PAGES) }
    }
}

/// Whether the handler takes out a run that was let go, one after each fault that it has served, instead of the monitor, which
/// takes many at once: where both are bound to the processor of the one thread that faults, that waits while the monitor works. A
/// whole step stays the monitor's: it is one call for many pages.
pub const fn hands_over(is_bound: bool, has_encoder: bool, is_whole_step: bool) -> bool {
    is_bound && has_encoder && !is_whole_step
}

/// Whether a tree is near enough to its limit that what moving pages takes should be ready.
pub fn is_near(facts: &Facts) -> bool {
    facts.limit.is_some_and(|limit| facts.tree_used.0 > limit.0 / NEAR_SHARE)
}

/// The marks of a limit: bytes of RAM in use at which something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Eviction aims here.
    pub high: Bytes,
    /// Eviction begins above this.
    pub low: Bytes,
    /// First touches go through the fault handler from here on.
    pub gate: Bytes,
    /// First touches wait from here on.
    pub close: Bytes,
}

impl Marks {
    /// The marks of `limit`.
    ///
    /// ```
    /// use spmem_core::{reclaim::Marks, units::Bytes};
    /// let marks = Marks::of(Bytes::mib(512));
    /// assert_eq!((marks.gate, marks.high, marks.low), (Bytes::mib(496), Bytes::mib(508), Bytes::mib(510)));
    /// ```
    pub const fn of(limit: Bytes) -> Self {
        let mut margin = limit.0 / 32;
        if margin < MARGIN_MIN.0 {
            margin = if limit.0 / 4 < MARGIN_MIN.0 { limit.0 / 4 } else { MARGIN_MIN.0 };
        } else if margin > MARGIN_MAX.0 {
            margin = MARGIN_MAX.0;
        }
        let reserve = margin / GATE_SHARE;
        Self {
            high: Bytes(limit.0 - 2 * reserve),
            low: Bytes(limit.0 - reserve),
            gate: Bytes(limit.0 - margin),
            close: Bytes(limit.0 - reserve / 4),
        }
    }

    /// Pages that may come in before first touches wait: with fewer, pages leave more slowly than they come in. Half of those at the low mark,
    /// above which eviction begins.
    ///
    /// ```
    /// use spmem_core::{reclaim::Marks, units::Bytes};
    /// assert_eq!([57, 512, 1 << 20].map(|mib| Marks::of(Bytes::mib(mib)).scarce_pages()), [24, 192, 192]);
    /// ```
    pub const fn scarce_pages(&self) -> i64 {
        ((self.close.0 - self.low.0) / 2 / PAGE_SIZE).cast_signed()
    }
}

/// Decides what this process does now.
///
/// ```
/// use spmem_core::{reclaim::{Facts, Gate, plan}, units::Bytes};
/// let facts = Facts {
///     limit: Some(Bytes::mib(512)),
///     tree_used: Bytes::mib(511),
///     own_used: Bytes(Bytes::mib(511).0 / 2),
///     own_resident_pages: 50_000,
///     ..Facts::default()
/// };
/// let plan = plan(&facts);
/// assert_eq!(plan.evict_pages, 384); // half of the 3 MiB above the high mark
/// assert_eq!(plan.gate, Gate::Throttled);
/// ```
pub fn plan(facts: &Facts) -> Plan {
    let Some(limit) = facts.limit else {
        return Plan { evict_pages: 0, holding_target_pages: 0, gate: Gate::Open, sleep_ns: SLEEP_MAX_NS };
    };
    let marks = Marks::of(limit);
    let used = facts.tree_used.0;
    let evictable = facts.own_resident_pages.saturating_add(facts.holding_pages);
    let is_due = used.saturating_add(expected_growth(facts, &marks)) > marks.low.0;
    let excess = if is_due { used.saturating_sub(marks.high.0) } else { 0 };
    let evict_pages = own_share(facts, excess).min(evictable);
    Plan {
        evict_pages,
        holding_target_pages: if used > marks.high.0 { holding_target(facts, limit) } else { 0 },
        gate: gate(used, &marks, evictable),
        sleep_ns: if evict_pages > 0 {
            0
        } else if used > marks.low.0 {
            SLEEP_STUCK_NS
        } else if used > marks.gate.0 {
            SLEEP_GATED_NS
        } else {
            headroom_ns(marks.close.0 - used, facts.processors).max(SLEEP_MIN_NS)
        },
    }
}

/// What the tree will grow by before eviction that begins at the low mark could help: the measured rate over the
/// time that the room behind the mark lasts. Lets eviction begin ahead of need, never aim lower.
fn expected_growth(facts: &Facts, marks: &Marks) -> u64 {
    if facts.since_last_ns == 0 {
        return 0;
    }
    let horizon_ns = u128::from(headroom_ns(marks.close.0 - marks.low.0, facts.processors));
    let growth = u128::from(facts.growth.0) * horizon_ns / u128::from(facts.since_last_ns);
    // A burst in a short look must not look like a flood: at most what the assumed maximum would bring.
    u64::try_from(growth).unwrap_or(u64::MAX).min(marks.close.0 - marks.low.0)
}

/// This process's part of `excess` bytes, in pages, rounded up.
fn own_share(facts: &Facts, excess: u64) -> u64 {
    if facts.tree_used.0 == 0 {
        return 0;
    }
    let own = u128::from(facts.own_used.0.min(facts.tree_used.0));
    let bytes = (u128::from(excess) * own).div_ceil(u128::from(facts.tree_used.0));
    u64::try_from(bytes).unwrap_or(u64::MAX).div_ceil(PAGE_SIZE)
}

/// A part of this process's part of the limit, in pages, within bounds. The lower bound gives way where so many
/// processes would together hold more than an eighth of the limit.
fn holding_target(facts: &Facts, limit: Bytes) -> u64 {
    let even_part = limit.frames_floor().0 / 8 / u64::from(facts.processes.max(1));
    let least = even_part.clamp(1, HOLDING_MIN_PAGES);
    (own_share(facts, limit.0) / HOLDING_SHARE).clamp(least, HOLDING_MAX_PAGES)
}

fn gate(used: u64, marks: &Marks, evictable: u64) -> Gate {
    if used >= marks.close.0 && evictable > 0 {
        Gate::Closed
    } else if used >= marks.gate.0 {
        Gate::Throttled
    } else {
        Gate::Open
    }
}

/// How long `headroom` bytes last at the fastest growth, at most the longest sleep, ns.
fn headroom_ns(headroom: u64, processors: u32) -> u64 {
    let growth = u128::from(GROWTH_MAX_BYTES_PER_S) * u128::from(processors.clamp(1, GROWING_MAX));
    let ns = u128::from(headroom) * 1_000_000_000 / growth;
    u64::try_from(ns).unwrap_or(u64::MAX).min(SLEEP_MAX_NS)
}

#[cfg(test)]
mod tests;
