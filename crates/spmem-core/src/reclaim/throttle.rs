//! Throttling: how fast pages may come in while the budget is used up.
//!
//! [`Throttle`] turns each look into *room*, the pages that may come in until the next one, and *patience*, how long a page
//! waits where there is none. Nothing waits for ever: where the excess grows although reclaim makes progress, pages come in at
//! its pace, a little slower; where it makes none, or follows whatever comes in, the program goes on over its budget. [`Turnstile`] lets waiting pages pass, one in each patience
//! however many threads wait. [`Coverage`] says when what could grow comes under the fault handler, and when it is let go.
//! Pure. Called by the runtime's pressure loop and fault line, and by the simulator.

use crate::units::{Bytes, PAGE_SIZE};

use super::{BATCH_PAGES, Gate, Marks};

/// Where there is no room, a page comes in once in so long, ns, ...
pub const PATIENCE_NS: u64 = 20_000_000;
/// ... until there has been none to speak of for so long, ns: then pages come in at the pace at which reclaim makes them free, ...
pub const CROWDED_NS: u64 = 200_000_000;
/// ... or, where fewer than these became free in that time or the excess did not grow by as many, ...
const PROGRESS_PAGES: u64 = 64;
/// ... at least once in so long, ns: what cannot shrink goes on.
const IMPATIENCE_NS: u64 = 200_000;
/// Growth that does not wait is looked at again after so many pages, ...
const LEAVE_MIN: u64 = 2 * BATCH_PAGES;
/// ... or after this part of what is resident: a look takes time in proportion to that.
const LEAVE_SHARE: u64 = 64;
/// How often new ranges are looked for while the gate is not open and something hints at one, ns, ...
const COVER_NS: u64 = 4_000_000;
/// ... but never more often than this for each range that there is, ns: programs have thousands. A look takes about a quarter of it.
const COVER_RANGE_NS: u64 = 8_000;
/// Without a hint they are looked for this many times less often: a mapping may have taken the place of one of its size.
const COVER_RARELY: u64 = 16;
/// Growth that hints at a range which is not covered.
const COVER_GROWTH: Bytes = Bytes::mib(1);
/// How long the gate has to be open before ranges are let go, ns.
const UNCOVER_NS: u64 = 1_000_000_000;

/// What is known of a process at a look.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// The time, ns.
    pub now_ns: u64,
    /// RAM that the tree may take.
    pub limit: Bytes,
    /// RAM that it takes.
    pub tree_used: Bytes,
    /// What the plan says of growth.
    pub gate: Gate,
    /// Pages that reclaim has made free since the process began.
    pub freed_pages: u64,
    /// Pages that are resident, and of them those that cannot leave.
    pub resident_pages: u64,
    /// See `resident_pages`.
    pub refused_pages: u64,
    /// Pages that stay: see [`Floor`](super::Floor).
    pub floor_pages: u64,
    /// See [`Floor::is_hopeless`](super::Floor::is_hopeless).
    pub is_hopeless: bool,
    /// See [`Progress::is_stuck`](super::Progress::is_stuck).
    pub is_stuck: bool,
}

/// What may come in until the next look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Pages; 0 or less: each waits.
    pub room_pages: i64,
    /// How long, ns.
    pub patience_ns: u64,
}

/// What is remembered from look to look.
#[derive(Clone, Debug)]
pub struct Throttle {
    /// When there was room to speak of last, ns.
    had_room_ns: u64,
    /// Since when progress is counted, ns, ...
    window_ns: u64,
    /// ... and from how many freed pages and bytes used on.
    window_freed: u64,
    /// See `window_freed`.
    window_used: Bytes,
    /// Time between two pages at the pace of reclaim, ns.
    pace_ns: u64,
}

impl Throttle {
    /// Of a process that has room.
    pub const fn new(now_ns: u64) -> Self {
        Self { had_room_ns: now_ns, window_ns: 0, window_freed: 0, window_used: Bytes(0), pace_ns: PATIENCE_NS }
    }

    /// What may come in after a look.
    pub fn look(&mut self, look: &Look) -> Admission {
        let close = Marks::of(look.limit).close.0;
        let room = (i128::from(close) - i128::from(look.tree_used.0)) / i128::from(PAGE_SIZE);
        let room = i64::try_from(room).unwrap_or(i64::MAX);
        // A page now and then is none to many threads that wait.
        if room >= PROGRESS_PAGES.cast_signed() {
            self.had_room_ns = look.now_ns;
        }
        self.measure_pace(look);
        let is_crowded = look.now_ns.saturating_sub(self.had_room_ns) > CROWDED_NS;
        let patience_ns = if is_crowded { self.pace_ns } else { PATIENCE_NS };
        Admission { room_pages: room.max(excused(look, close)), patience_ns }
    }

    fn measure_pace(&mut self, look: &Look) {
        let since = look.now_ns.saturating_sub(self.window_ns);
        if since <= CROWDED_NS {
            return;
        }
        let gained = look.freed_pages.saturating_sub(self.window_freed);
        let grown = look.tree_used.0.saturating_sub(self.window_used.0) / PAGE_SIZE;
        // A little slower than pages leave, so that an excess goes away. But where each page that comes in drives one out, what
        // leaves says nothing about what could: the pace would follow itself downwards.
        let pace = since / gained.max(1) * 5 / 4;
        let shrunk = self.window_used.0.saturating_sub(look.tree_used.0) / PAGE_SIZE;
        self.pace_ns = if gained < PROGRESS_PAGES {
            IMPATIENCE_NS
        } else if grown >= PROGRESS_PAGES {
            pace.min(PATIENCE_NS)
        } else if shrunk > gained / 3 {
            // Far more could leave than comes in.
            IMPATIENCE_NS.max(self.pace_ns * 3 / 4)
        } else if shrunk >= gained / 8 {
            // This pace is what makes the excess go away: a faster one would bring it back.
            self.pace_ns
        } else {
            pace.min(IMPATIENCE_NS.max(self.pace_ns / 2))
        };
        (self.window_ns, self.window_freed, self.window_used) = (look.now_ns, look.freed_pages, look.tree_used);
    }
}

/// Pages that may come in although there is no room. A budget that cannot be kept is no reason to wait, unless the
/// program runs away from it; nor is one that others fill, with nothing here that could leave: then there is room for a
/// little, after which this is asked again.
fn excused(look: &Look, close: u64) -> i64 {
    let stays = look.floor_pages.saturating_add(look.refused_pages);
    let has_nothing_to_give = look.tree_used.0 >= close && look.gate != Gate::Closed;
    let pages = if has_nothing_to_give || look.is_stuck {
        (look.resident_pages / LEAVE_SHARE).max(LEAVE_MIN)
    } else if look.is_hopeless && stays > look.resident_pages {
        stays - look.resident_pages
    } else {
        return i64::MIN;
    };
    i64::try_from(pages).unwrap_or(i64::MAX)
}

/// Where pages that come in pass, or wait.
#[derive(Clone, Debug, Default)]
pub struct Turnstile {
    /// When the next page may come in although there is no room, ns.
    next_forced_ns: u64,
}

impl Turnstile {
    /// Whether a page that waits since `since_ns` may come in.
    ///
    /// ```
    /// use spmem_core::reclaim::{Admission, Turnstile};
    /// let mut turnstile = Turnstile::default();
    /// assert!(turnstile.admits(0, 0, Admission { room_pages: 1, patience_ns: 100 }));
    /// let full = Admission { room_pages: 0, patience_ns: 100 };
    /// assert!(!turnstile.admits(99, 0, full));
    /// assert!(turnstile.admits(100, 0, full));
    /// assert!(!turnstile.admits(150, 0, full), "one page in each patience");
    /// ```
    pub const fn admits(&mut self, now_ns: u64, since_ns: u64, admission: Admission) -> bool {
        if admission.room_pages > 0 {
            return true;
        }
        if now_ns.saturating_sub(since_ns) < admission.patience_ns || now_ns < self.next_forced_ns {
            return false;
        }
        self.next_forced_ns = now_ns.saturating_add(admission.patience_ns);
        true
    }
}

/// What happens to ranges none of whose pages is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cover {
    /// Nothing.
    Keep,
    /// First touches of all that can grow are to come through the fault handler.
    All,
    /// They go on at native speed.
    Nothing,
}

/// What hints at ranges that can grow and are not covered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Address space of private writable mappings (proc_pid_statm(5), `data`).
    pub writable: Bytes,
    /// RAM that the process takes.
    pub used: Bytes,
}

/// When first touches come through the fault handler.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// When new ranges are looked for next if something hints at one, and else, ns.
    due_ns: u64,
    rarely_ns: u64,
    /// At the last look; of what is used the least since then.
    extent: Extent,
    /// When the gate was last seen not open, ns; none since all was let go.
    gated_ns: Option<u64>,
}

impl Coverage {
    /// What is due.
    ///
    /// ```
    /// use spmem_core::{reclaim::{Cover, Coverage, Extent, Gate}, units::Bytes};
    /// let mut coverage = Coverage::default();
    /// let extent = Extent { writable: Bytes::mib(64), used: Bytes::mib(32) };
    /// let grown = Extent { used: Bytes::mib(34), ..extent };
    /// assert_eq!(coverage.look(Gate::Open, 5, extent), Cover::Keep);
    /// assert_eq!(coverage.look(Gate::Throttled, 10, extent), Cover::All);
    /// coverage.covered(10, 40, extent);
    /// assert_eq!(coverage.look(Gate::Throttled, 12, grown), Cover::Keep, "nothing grows that fast");
    /// assert_eq!(coverage.look(Gate::Throttled, 5_000_000, extent), Cover::Keep, "nothing hints at a new range");
    /// assert_eq!(coverage.look(Gate::Throttled, 5_000_000, grown), Cover::All);
    /// assert_eq!(coverage.look(Gate::Open, 6_000_000, extent), Cover::Keep, "it may be needed again soon");
    /// assert_eq!(coverage.look(Gate::Open, 2_000_000_000, extent), Cover::Nothing);
    /// ```
    pub fn look(&mut self, gate: Gate, now_ns: u64, extent: Extent) -> Cover {
        let is_over = |since: Option<u64>, ns| since.is_none_or(|since| now_ns.saturating_sub(since) >= ns);
        if gate == Gate::Open {
            if self.gated_ns.is_none() || !is_over(self.gated_ns, UNCOVER_NS) {
                return Cover::Keep;
            }
            (self.gated_ns, self.rarely_ns) = (None, 0);
            return Cover::Nothing;
        }
        self.gated_ns = Some(now_ns);
        self.extent.used = self.extent.used.min(extent.used);
        let has_grown = extent.used.0 - self.extent.used.0 > COVER_GROWTH.0;
        let is_hinted = has_grown || extent.writable != self.extent.writable;
        if now_ns < if is_hinted { self.due_ns } else { self.rarely_ns } { Cover::Keep } else { Cover::All }
    }

    /// All that can grow was looked at: so many ranges. Their number counts, not the time that it took, which is long for one
    /// range too where the looking thread has to wait for a processor.
    pub fn covered(&mut self, now_ns: u64, ranges: u64, extent: Extent) {
        let pause = ranges.saturating_mul(COVER_RANGE_NS).max(COVER_NS);
        self.due_ns = now_ns.saturating_add(pause);
        self.rarely_ns = now_ns.saturating_add(pause.saturating_mul(COVER_RARELY));
        self.extent = extent;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Bytes = Bytes::mib(256);

    fn full(now_ns: u64, freed_pages: u64) -> Look {
        Look {
            now_ns,
            limit: LIMIT,
            tree_used: LIMIT,
            gate: Gate::Closed,
            freed_pages,
            resident_pages: 50_000,
            refused_pages: 0,
            floor_pages: 8192,
            is_hopeless: false,
            is_stuck: false,
        }
    }

    #[test]
    fn room_is_what_is_left_below_the_close_mark() {
        let mut throttle = Throttle::new(0);
        let look = Look { tree_used: Bytes(Marks::of(LIMIT).close.0 - 7 * PAGE_SIZE), ..full(1, 0) };
        assert_eq!(throttle.look(&look).room_pages, 7);
        assert!(throttle.look(&full(2, 0)).room_pages <= 0);
    }

    #[test]
    fn where_reclaim_makes_progress_pages_come_in_slower_than_they_leave() {
        let mut throttle = Throttle::new(0);
        let mut patience = 0;
        for look in 0..100_u64 {
            patience = throttle.look(&full(look * 10_000_000, look * 1000)).patience_ns;
        }
        // 1000 pages leave in 10 ms.
        assert!((10_000..20_000).contains(&patience), "{patience} ns");
    }

    /// Pages leave because others come in, here in lockstep: what stays cannot leave.
    #[test]
    fn where_reclaim_follows_what_comes_in_the_pace_does_not_follow_itself_down() {
        let (mut throttle, mut turnstile) = (Throttle::new(0), Turnstile::default());
        let (mut now, mut came) = (0, 0);
        while now < 10_000_000_000 {
            let admission = throttle.look(&full(now, came));
            for _ in 0..20 {
                came += u64::from(turnstile.admits(now, 0, admission));
                now += 50_000;
            }
        }
        assert!(came > 40_000, "{came} pages in 10 s");
    }

    #[test]
    fn a_page_of_room_now_and_then_does_not_make_a_crowd_patient() {
        let mut throttle = Throttle::new(0);
        let mut patience = 0;
        for look in 0..100_u64 {
            let used = Marks::of(LIMIT).close.0 - look % 10 / 9 * PAGE_SIZE;
            patience = throttle.look(&Look { tree_used: Bytes(used), ..full(look * 10_000_000, 0) }).patience_ns;
        }
        assert_eq!(patience, IMPATIENCE_NS);
    }

    #[test]
    fn where_the_excess_grows_pages_come_in_slower_than_they_leave() {
        let mut throttle = Throttle::new(0);
        let mut patience = 0;
        for look in 0..100_u64 {
            let tree_used = Bytes(LIMIT.0 + look * 50 * PAGE_SIZE);
            // 20 pages leave in 10 ms.
            patience = throttle.look(&Look { tree_used, ..full(look * 10_000_000, look * 20) }).patience_ns;
        }
        assert!((500_000..1_000_000).contains(&patience), "{patience} ns");
    }

    #[test]
    fn where_far_more_could_leave_than_comes_in_pages_come_in_faster() {
        let mut throttle = Throttle::new(0);
        let mut patience = [0; 2];
        for look in 0..2000_u64 {
            // The excess grows for a second; then half of what leaves makes it go away.
            let is_growing = look < 100;
            let excess = if is_growing { look * 50 } else { 10_000 - (look - 100) * 5 };
            let tree_used = Bytes(LIMIT.0 + excess * PAGE_SIZE);
            let admission = throttle.look(&Look { tree_used, ..full(look * 10_000_000, look * 10) });
            patience[usize::from(!is_growing)] = admission.patience_ns;
        }
        assert!(patience[0] > 1_000_000, "{} ns", patience[0]);
        assert_eq!(patience[1], IMPATIENCE_NS);
    }

    /// Reclaim can do so much and no more, and pages come in whenever they are let in.
    #[test]
    fn where_reclaim_is_slow_the_excess_goes_away_all_the_same() {
        for pages_a_second in [500, 1000, 2000, 4000] {
            let (mut throttle, mut turnstile) = (Throttle::new(0), Turnstile::default());
            let (mut now, mut freed, mut excess, mut most) = (0_u64, 0_u64, 1000_i64, 0);
            while now < 60_000_000_000 {
                let tree_used =
                    Bytes(Marks::of(LIMIT).close.0.saturating_add_signed(excess * PAGE_SIZE.cast_signed()));
                let admission = throttle.look(&Look { tree_used, ..full(now, freed) });
                for _ in 0..20 {
                    excess += i64::from(turnstile.admits(now, 0, admission));
                    now += 50_000;
                }
                let able = now * pages_a_second / 1_000_000_000 - freed;
                let leaving = able.min(u64::try_from(excess + 1000).unwrap_or(0));
                freed += leaving;
                excess -= leaving.cast_signed();
                most = most.max(excess);
            }
            assert!(most < 4000, "{pages_a_second} pages a second: an excess of up to {most} pages");
        }
    }

    #[test]
    fn where_reclaim_makes_none_the_program_goes_on() {
        let mut throttle = Throttle::new(0);
        assert_eq!(throttle.look(&full(0, 0)).patience_ns, PATIENCE_NS);
        assert_eq!(throttle.look(&full(CROWDED_NS + 1, 0)).patience_ns, IMPATIENCE_NS);
        let stuck = Look { is_stuck: true, ..full(CROWDED_NS + 2, 0) };
        assert!(throttle.look(&stuck).room_pages > 0);
    }

    #[test]
    fn new_ranges_are_looked_for_less_often_the_more_there_are_and_where_nothing_hints_at_one() {
        let looks = |ranges, growth, mapped| {
            let mut coverage = Coverage::default();
            let is_look = |&ms: &u64| {
                let now = ms * 1_000_000;
                let extent = Extent { writable: Bytes(ms * mapped), used: Bytes(ms * growth) };
                let is_due = coverage.look(Gate::Throttled, now, extent) == Cover::All;
                if is_due {
                    coverage.covered(now, ranges, extent);
                }
                is_due
            };
            (0..1000).filter(is_look).count()
        };
        for (growth, mapped) in [(1 << 20, 0), (0, PAGE_SIZE)] {
            let looks = |ranges| looks(ranges, growth, mapped);
            assert_eq!((looks(40), looks(500), looks(1000), looks(10_000)), (250, 250, 125, 13));
        }
        let looks = |ranges| looks(ranges, 0, 0);
        assert_eq!((looks(40), looks(500), looks(1000), looks(10_000)), (16, 16, 8, 1));
    }

    #[test]
    fn growth_is_what_came_since_the_least_since_the_last_look() {
        let mut coverage = Coverage::default();
        let used = |used| Extent { writable: Bytes(0), used: Bytes::mib(used) };
        coverage.covered(0, 1, used(100));
        assert_eq!(coverage.look(Gate::Throttled, 2 * COVER_NS, used(60)), Cover::Keep);
        assert_eq!(coverage.look(Gate::Throttled, 3 * COVER_NS, used(62)), Cover::All);
    }

    #[test]
    fn who_has_nothing_to_give_is_not_held_for_others() {
        let mut throttle = Throttle::new(0);
        assert!(throttle.look(&Look { gate: Gate::Throttled, ..full(0, 0) }).room_pages > 0);
    }

    #[test]
    fn below_the_floor_of_a_hopeless_budget_nothing_waits_and_above_it_all_does() {
        let mut throttle = Throttle::new(0);
        let hopeless = Look { is_hopeless: true, floor_pages: 40_000, refused_pages: 10_100, ..full(0, 0) };
        assert_eq!(throttle.look(&hopeless).room_pages, 100);
        assert!(throttle.look(&Look { refused_pages: 10_000, ..hopeless }).room_pages <= 0);
    }

    #[test]
    fn no_page_waits_for_ever() {
        let (mut throttle, mut turnstile) = (Throttle::new(0), Turnstile::default());
        let mut now = 0;
        for _ in 0..1000 {
            let since = now;
            let mut admission = throttle.look(&full(now, 0));
            while !turnstile.admits(now, since, admission) {
                now += 100_000;
                admission = throttle.look(&full(now, 0));
                assert!(now - since <= 2 * PATIENCE_NS + 100_000);
            }
        }
    }
}
