//! The floor: how much of a process stays resident whatever the budget.
//!
//! Below it a program only chases its own pages: it runs over budget instead. A budget that is filled by what is stored and
//! by what cannot leave is not to be kept whatever is resident; then half of it stays, or as much as the process has stored
//! beyond that half: a resident page costs little more than a stored one, and a thrashing program costs a lot.
//!
//! The processes of a tree share that half: where they are many, the floors of those that sleep would otherwise exceed the
//! budget alone. Called by the runtime's pressure loop and the simulator.

use crate::units::{Bytes, FrameCount};

use super::BATCH_PAGES;

/// This part of the limit stays, ...
const SHARE: u64 = 8;
/// ... but at least this, ...
pub const FLOOR_MIN: Bytes = Bytes::mib(4);
/// ... unless so many processes have it that half of the limit, or this, does not suffice for all; then their part of that, ...
const POOL_MIN: Bytes = Bytes::mib(16);
/// ... and at least this.
pub const FLOOR_CROWDED: Bytes = Bytes(512 << 10);
/// No process has more, unless the limit cannot be kept.
pub const FLOOR_MAX: Bytes = Bytes::mib(64);
/// Of eight parts of the limit, how many must be filled by what cannot be made less before it is held to be hopeless, ...
const HOPELESS_ABOVE: u64 = 7;
/// ... and how many may be before it is held to be so no longer.
const HOPEFUL_BELOW: u64 = 5;
/// Copies of pages that have come back may take this part of the limit.
const KEPT_SHARE: u64 = 256;

/// The floor of a process, which remembers whether its limit can be kept.
#[derive(Clone, Debug, Default)]
pub struct Floor {
    is_hopeless: bool,
}

/// Pages of a process that may leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Movable {
    /// Mapped.
    pub resident_pages: u64,
    /// In the holding area.
    pub holding_pages: u64,
}

impl Floor {
    /// What stays of a process whose tree has a `limit` and so many `processes` (0 counts as 1); `fixed` is what of the tree
    /// cannot be made less: what is stored, and the pages that cannot leave. Of it, the process itself has `stored`.
    ///
    /// ```
    /// use spmem_core::{reclaim::Floor, units::Bytes};
    /// let (mut floor, limit) = (Floor::default(), Bytes::mib(256));
    /// let none = Bytes(0);
    /// assert_eq!(floor.update(limit, Bytes::mib(100), none, 1).bytes(), Bytes::mib(32));
    /// assert_eq!(floor.update(limit, Bytes::mib(225), none, 1).bytes(), Bytes::mib(128));
    /// assert_eq!(floor.update(limit, Bytes::mib(200), none, 1).bytes(), Bytes::mib(128), "not before it is well below");
    /// assert_eq!(floor.update(limit, Bytes::mib(160), none, 1).bytes(), Bytes::mib(32));
    /// assert_eq!(floor.update(limit, Bytes::mib(160), none, 32).bytes(), Bytes::mib(4), "a part of half the limit");
    /// assert_eq!(floor.update(limit, Bytes::mib(600), Bytes::mib(600), 1).bytes(), Bytes::mib(472));
    /// ```
    pub fn update(&mut self, limit: Bytes, fixed: Bytes, stored: Bytes, processes: u32) -> FrameCount {
        let eighths = if self.is_hopeless { HOPEFUL_BELOW } else { HOPELESS_ABOVE };
        self.is_hopeless = fixed.0 > limit.0 / 8 * eighths;
        let processes = u64::from(processes.max(1));
        let part = ((limit.0 / 2).max(POOL_MIN.0) / processes).max(FLOOR_CROWDED.0);
        let floor = if self.is_hopeless {
            let half = (limit.0 / 2).max(FLOOR_MIN.0).min(part);
            half.max(stored.0.saturating_sub(limit.0 / 2 / processes))
        } else {
            part.min((limit.0 / SHARE).clamp(FLOOR_MIN.0, FLOOR_MAX.0))
        };
        Bytes(floor).frames_floor()
    }

    /// Whether what cannot be made less fills the limit alone.
    pub const fn is_hopeless(&self) -> bool {
        self.is_hopeless
    }
}

impl Movable {
    /// What may leave of a process with so many pages resident, held, and known to be unable to leave, above its floor.
    /// Fewer than two batches are not worth a look: none.
    pub fn above(floor: FrameCount, resident_pages: u64, holding_pages: u64, refused_pages: u64) -> Self {
        let stays = floor.0.saturating_add(refused_pages);
        let movable = resident_pages.saturating_add(holding_pages).saturating_sub(stays);
        if movable < 2 * BATCH_PAGES {
            return Self::default();
        }
        let holding_pages = holding_pages.min(movable);
        Self { resident_pages: movable - holding_pages, holding_pages }
    }
}

/// Whether pages that come back keep their stored copy, which spares an encoding if they leave unchanged: while the copies
/// take little, and the budget is not used up.
pub const fn keeps_copies(limit: Bytes, tree_used: Bytes, kept: Bytes) -> bool {
    kept.0 < limit.0 / KEPT_SHARE && tree_used.0 < limit.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_lies_between_its_bounds_and_never_above_half_a_large_limit() {
        for mib in [1, 8, 31, 32, 33, 511, 512, 513, 1 << 20] {
            for fixed in 0..=16 {
                let limit = Bytes::mib(mib);
                let floor = Floor::default().update(limit, Bytes(limit.0 / 16 * fixed), Bytes(0), 1).bytes();
                assert!(floor >= FLOOR_MIN && floor.0 <= (limit.0 / 2).max(FLOOR_MIN.0), "{mib} MiB: {floor}");
                assert!(fixed >= 14 || floor <= FLOOR_MAX, "{mib} MiB: {floor}");
            }
        }
    }

    #[test]
    fn the_floor_of_a_hopeless_budget_grows_with_what_is_stored_and_has_no_step() {
        let limit = Bytes::mib(64);
        let mut before = Floor::default().update(limit, limit, Bytes(limit.0 / 2), 1);
        for mib in 32..1024 {
            let now = Floor::default().update(limit, Bytes::mib(mib + 64), Bytes::mib(mib), 1);
            assert!(now >= before && now.bytes().0 - before.bytes().0 <= Bytes::mib(1).0, "{mib} MiB");
            before = now;
        }
        assert_eq!(before.bytes(), Bytes::mib(1023 - 32));
    }

    #[test]
    fn the_floors_of_many_processes_take_no_more_than_half_the_limit_or_the_least_each() {
        for mib in [1, 8, 32, 64, 512, 1 << 14] {
            for processes in [1_u32, 2, 3, 30, 1000] {
                let (limit, count) = (Bytes::mib(mib), u64::from(processes));
                let floor = Floor::default().update(limit, Bytes(0), Bytes(0), processes).bytes().0;
                let most = (limit.0 / 2).max(POOL_MIN.0).max(FLOOR_CROWDED.0 * count);
                assert!(floor >= FLOOR_CROWDED.0 && floor * count <= most, "{mib} MiB, {processes}: {floor}");
                // Beyond hope, all together keep what they have stored beyond half of the limit.
                let stored = Bytes(limit.0 * 4 / count);
                let floor = Floor::default().update(limit, Bytes(limit.0 * 4), stored, processes).bytes().0;
                assert!(floor * count + 4096 * count >= limit.0 * 7 / 2, "{mib} MiB, {processes}: {floor}");
            }
        }
    }

    #[test]
    fn movable_pages_are_what_is_there_less_what_stays() {
        for (resident, holding, refused, floor) in [
            (0, 0, 0, 0),
            (100, 0, 0, 0),
            (100, 50, 20, 30),
            (1000, 64, 0, 1030),
            (10, 500, 0, 400),
            (500, 10, 600, 0),
        ] {
            let movable = Movable::above(FrameCount(floor), resident, holding, refused);
            let (all, stays) = (resident + holding, floor + refused);
            let count = movable.resident_pages + movable.holding_pages;
            assert!(count == 0 || count == all - stays, "{movable:?}");
            assert_eq!(count == 0, all.saturating_sub(stays) < 2 * BATCH_PAGES);
            assert!(movable.holding_pages <= holding && movable.resident_pages <= resident);
        }
    }
}
