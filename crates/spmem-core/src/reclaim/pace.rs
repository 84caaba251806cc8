//! Pace: whether the monitor has pages leave, or the handler of faults, as many as come in.
//!
//! Where one thread faults and an encoder does the heavy work, handler and monitor share the thread's processor, and the
//! thread waits while either works. To see to what the encoder has done takes 3 us a page: too much for the monitor to do it
//! for all pages of a lane at once, little beside a fault. So there the handler does it for a page after each fault, and the
//! monitor looks ahead, now and then. Where that is not enough, as there is no room or no faults come, the monitor does it
//! all. Called by the runtime's pressure loop and fault line.

use super::{Plan, SLEEP_GATED_NS};

/// How often the monitor looks while the handler keeps pace, ns, ...
const LOOK_NS: u64 = 2 * SLEEP_GATED_NS;
/// ... and more often where other processes of the tree may need what this one has, ns.
const LOOK_SHARED_NS: u64 = SLEEP_GATED_NS;
/// Pages that are let go ahead, all at once: to find them takes longer than a look, and less than one fault of a hundred is
/// to wait for it, ...
pub const AHEAD_PAGES: u64 = 384;
/// ... once this part of them is left.
const AHEAD_PARTS: u64 = 4;
/// How long there must have been room, and one thread only that faults, ns.
const CALM_NS: u64 = 20_000_000;
/// Where more than these are to leave, one more leaves than comes in.
const BEHIND_PAGES: i64 = 48;

/// Who has pages leave until the next look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pacer {
    /// The monitor.
    Monitor,
    /// The monitor; the handler, too, should faults come.
    Both,
    /// The handler: the monitor looks again after so long, ns.
    Handler(u64),
}

/// What is known at a look.
#[derive(Clone, Copy, Debug)]
pub struct Footing {
    /// The time, ns.
    pub now_ns: u64,
    /// The handler is bound to the processor of the one thread that faults, and there is an encoder.
    pub is_bound: bool,
    /// Reclaim has freed nothing for a while: see [`Progress`](super::Progress).
    pub is_stuck: bool,
    /// Pages may go to other nodes first, which the encoder has nothing to do with.
    pub has_other_nodes: bool,
    /// Pages that may come in before growth waits: see [`Admission`](super::Admission).
    pub room_pages: i64,
    /// Faults after which the handler saw to pages, since the start.
    pub turns: u64,
    /// Processes in the tree.
    pub processes: u32,
}

/// What is remembered from look to look.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// The handler was told to keep it, ...
    is_kept: bool,
    /// ... and had taken so many turns.
    turns: u64,
    /// Until when it has to be calm, ns.
    calm_from_ns: u64,
}

impl Pace {
    /// Decides at a look that made `plan`.
    ///
    /// ```
    /// use spmem_core::reclaim::{Footing, Gate, Pace, Pacer, Plan};
    /// let plan = Plan { evict_pages: 9, holding_target_pages: 100, gate: Gate::Throttled, sleep_ns: 0 };
    /// let mut footing =
    ///     Footing { now_ns: 0, is_bound: true, is_stuck: false, has_other_nodes: false, room_pages: 1, turns: 0, processes: 1 };
    /// let mut pace = Pace::default();
    /// assert_eq!(pace.look(&plan, &footing), Pacer::Both);
    /// footing.turns += 1;
    /// assert_eq!(pace.look(&plan, &footing), Pacer::Handler(2_000_000));
    /// assert_eq!(pace.look(&plan, &footing), Pacer::Both, "no fault has come since");
    /// assert_eq!(pace.look(&plan, &Footing { is_stuck: true, ..footing }), Pacer::Monitor, "it has to see whether it still is");
    /// assert_eq!(pace.look(&plan, &Footing { room_pages: 0, ..footing }), Pacer::Monitor);
    /// assert_eq!(pace.look(&plan, &Footing { now_ns: 19_999_999, ..footing }), Pacer::Monitor, "not calm yet");
    /// assert_eq!(pace.look(&plan, &Footing { now_ns: 20_000_000, ..footing }), Pacer::Both);
    /// footing.now_ns = 20_000_000;
    /// assert_eq!(pace.look(&plan, &Footing { is_bound: false, ..footing }), Pacer::Monitor);
    /// assert_eq!(pace.look(&plan, &Footing { now_ns: 39_999_999, ..footing }), Pacer::Monitor, "several threads may fault");
    /// ```
    pub const fn look(&mut self, plan: &Plan, footing: &Footing) -> Pacer {
        if footing.room_pages <= 0 || !footing.is_bound {
            self.calm_from_ns = footing.now_ns + CALM_NS;
        }
        let is_calm = footing.now_ns >= self.calm_from_ns;
        // Where usage is low, nothing is to leave.
        let is_able = footing.is_bound && !footing.is_stuck && !footing.has_other_nodes;
        let is_fit = is_able && is_calm && plan.holding_target_pages > 0;
        let goes_on = self.is_kept && footing.turns != self.turns;
        (self.is_kept, self.turns) = (is_fit, footing.turns);
        match (is_fit, goes_on, footing.processes) {
            (false, ..) => Pacer::Monitor,
            (true, false, _) => Pacer::Both,
            (true, true, 0 | 1) => Pacer::Handler(LOOK_NS),
            (true, true, _) => Pacer::Handler(LOOK_SHARED_NS),
        }
    }
}

/// How many pages the handler sees to after a fault with which `brought` have come, while `due` are to leave.
///
/// ```
/// use spmem_core::reclaim::pages_along;
/// assert_eq!((pages_along(1, 0), pages_along(3, 48), pages_along(1, 49)), (1, 3, 2));
/// ```
pub const fn pages_along(brought: usize, due: i64) -> usize {
    brought + (due > BEHIND_PAGES) as usize
}

impl Plan {
    /// How many pages to let go ahead, with `held` in the holding area and `going` on their way there, while the handler keeps
    /// pace. The area stays between half and three quarters full (compare [`Plan::sweep_pages`]).
    ///
    /// ```
    /// use spmem_core::reclaim::{Gate, Plan};
    /// let plan = Plan { evict_pages: 0, holding_target_pages: 1000, gate: Gate::Throttled, sleep_ns: 0 };
    /// assert_eq!([0, 95, 96].map(|going| plan.ahead_pages(749, going)), [384, 289, 0]);
    /// assert_eq!(plan.ahead_pages(750, 0), 0);
    /// assert_eq!(Plan { holding_target_pages: 64, ..plan }.ahead_pages(40, 5), 27);
    /// ```
    pub const fn ahead_pages(&self, held: u64, going: u64) -> u64 {
        let half = self.holding_target_pages / 2;
        let ahead = if half < AHEAD_PAGES { half } else { AHEAD_PAGES };
        if going < ahead / AHEAD_PARTS && held < half + half / 2 { ahead - going } else { 0 }
    }
}
