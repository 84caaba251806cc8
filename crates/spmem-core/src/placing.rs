//! Placing: cold pages of a run on byte-addressable nodes, where the program reads them: which node, how many at once, what
//! is charged, and what is looked at again.
//!
//! [`Targets`] picks the node (the first that is neither full nor at its quota, in the order that [`tier`](crate::tier) gave),
//! [`leaves_room`] says whether the kernel's node can take more, [`allotment`] how much is charged to the grant, [`Looks`] when placed
//! pages are looked at: that they are still where they were put, and whether they are used. Whether a used one comes up is
//! [`Promotion`](crate::tier::Promotion)'s. Pure. Called by the runtime and by `spm`'s porter.

use crate::units::{Bytes, PAGE_SIZE};

/// Nodes that a run places pages on, at most; a slower one behind them is the compressed node.
pub const MAX_TARGETS: usize = 4;
/// Pages that are placed at a time.
pub const PLACE_PAGES: usize = 16;
/// Placed pages looked at at a time, ...
pub const LOOK_PAGES: usize = 64;
/// ... and how often, ns: 64 MiB in 26 seconds.
const LOOK_NS: u64 = 100_000_000;
/// Where the kernel tells of accesses, each is watched for so many looks: 0.8 s, about what is hot at first
/// ([`Promotion::threshold_ns`](crate::tier::Promotion::threshold_ns)).
pub const WATCHED_LOOKS: usize = 8;
/// Elsewhere so many of those are taken out on trial.
pub const TRIAL_PAGES: usize = 8;
/// At most so many at a time.
pub const TRIALS_MAX: usize = 64;
/// A page that is not touched on trial for so long is cold, ms.
pub const TRIAL_MS: u32 = 2_000;
/// What may come up in a second: the bandwidth of a slow link, of which programs need the rest.
pub const PROMOTION_RATE: Bytes = Bytes::mib(256);
/// How long a node that was full is left alone, ns, at first ...
const PAUSE_NS: u64 = 50_000_000;
/// ... and at most.
const PAUSE_MAX_NS: u64 = 2_000_000_000;
/// The grant is charged in pieces of this size: one request to the wall for many pages.
pub const ALLOTMENT: Bytes = Bytes(64 * PAGE_SIZE);
/// The part of a node that is left to the kernel: below its own marks it would give pages of another node.
const RESERVE_SHARE: u64 = 32;
/// At least so much.
const RESERVE_MIN: Bytes = Bytes::mib(4);

/// What is known of one target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// What the tree may have there.
    pub quota: Bytes,
    /// What it has there.
    pub placed: Bytes,
}

/// Which node a process places its next pages on.
///
/// ```
/// use spmem_core::placing::{Target, Targets};
/// use spmem_core::units::Bytes;
/// let nodes = [Target { quota: Bytes::mib(1), placed: Bytes::mib(1) }, Target { quota: Bytes::mib(1), placed: Bytes(0) }];
/// let mut targets = Targets::default();
/// assert_eq!(targets.choose(0, &nodes), Some(1), "the first is at its quota");
/// targets.note_full(1, 0);
/// assert_eq!(targets.choose(0, &nodes), None);
/// assert_eq!(targets.choose(50_000_000, &nodes), Some(1), "it may have room again");
/// ```
#[derive(Clone, Debug, Default)]
pub struct Targets {
    /// Until when each is left alone, and how long that was.
    rest: [(u64, u64); MAX_TARGETS],
}

impl Targets {
    /// The first of `nodes`, best first, that may have room; `None` when pages go to the compressed node.
    pub fn choose(&self, now_ns: u64, nodes: &[Target]) -> Option<usize> {
        let step = PAGE_SIZE * PLACE_PAGES as u64;
        let has_room = |node: &Target| node.placed.0.saturating_add(step) <= node.quota.0;
        nodes.iter().zip(&self.rest).position(|(node, rest)| has_room(node) && now_ns >= rest.0)
    }

    /// It gave nothing: twice as long a rest as the last time.
    pub fn note_full(&mut self, index: usize, now_ns: u64) {
        if let Some((until, pause)) = self.rest.get_mut(index) {
            *pause = (*pause * 2).clamp(PAUSE_NS, PAUSE_MAX_NS);
            *until = now_ns.saturating_add(*pause);
        }
    }

    /// It took pages.
    pub fn note_placed(&mut self, index: usize) {
        if let Some(rest) = self.rest.get_mut(index) {
            *rest = (0, 0);
        }
    }
}

/// Whether a node of the kernel's with so much free memory can give `wanted` without nearing its marks. A node that is bound
/// to and full makes the kernel end processes; one that is preferred and full gives what is another's.
///
/// ```
/// use spmem_core::{placing::leaves_room, units::Bytes};
/// assert!(leaves_room(Bytes::mib(13), Bytes::mib(384), Bytes(65536)));
/// assert!(!leaves_room(Bytes::mib(12), Bytes::mib(384), Bytes(65536)));
/// assert!(!leaves_room(Bytes::mib(4), Bytes::mib(16), Bytes(4096)));
/// ```
pub fn leaves_room(free: Bytes, total: Bytes, wanted: Bytes) -> bool {
    let reserve = (total.0 / RESERVE_SHARE).max(RESERVE_MIN.0);
    free.0 >= reserve.saturating_add(wanted.0)
}

/// What has to change before a process with so much placed may place `wanted` more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allotment {
    /// What is charged covers it.
    Covered,
    /// One more [`ALLOTMENT`] is to be charged, then ask again.
    Charge,
    /// One may be given back, then ask again.
    GiveBack,
}

/// See [`Allotment`]. With `wanted` nothing it says what an idle process gives back.
///
/// ```
/// use spmem_core::placing::{ALLOTMENT, Allotment, allotment};
/// use spmem_core::units::Bytes;
/// assert_eq!(allotment(Bytes(0), Bytes(0), Bytes(4096)), Allotment::Charge);
/// assert_eq!(allotment(ALLOTMENT, Bytes(0), Bytes(4096)), Allotment::Covered);
/// assert_eq!(allotment(Bytes(3 * ALLOTMENT.0), Bytes(4096), Bytes(0)), Allotment::GiveBack);
/// ```
pub fn allotment(charged: Bytes, placed: Bytes, wanted: Bytes) -> Allotment {
    let needed = placed.0.saturating_add(wanted.0);
    if charged.0 < needed {
        Allotment::Charge
    } else if charged.0 - needed >= 2 * ALLOTMENT.0 {
        Allotment::GiveBack
    } else {
        Allotment::Covered
    }
}

/// When placed pages are looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Looks {
    last_ns: u64,
}

impl Looks {
    /// The first is due at once.
    pub const fn new() -> Self {
        Self { last_ns: 0 }
    }

    /// The next is due at once.
    pub const fn hurry(&mut self) {
        self.last_ns = 0;
    }

    /// Whether it is time; then the next is due a while later.
    pub const fn is_due(&mut self, now_ns: u64) -> bool {
        let is_due = now_ns.saturating_sub(self.last_ns) >= LOOK_NS;
        if is_due {
            self.last_ns = now_ns;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Target = Target { quota: Bytes::mib(1), placed: Bytes(0) };

    #[test]
    fn a_full_node_is_left_alone_for_longer_each_time_until_it_takes_pages() {
        let mut targets = Targets::default();
        let mut now = 0;
        let mut pauses = [0; 8];
        for pause in &mut pauses {
            targets.note_full(0, now);
            let before = now;
            while targets.choose(now, &[NODE]).is_none() {
                now += PAUSE_NS;
            }
            *pause = now - before;
        }
        assert_eq!(pauses[..3], [PAUSE_NS, 2 * PAUSE_NS, 4 * PAUSE_NS]);
        assert_eq!(pauses[7], PAUSE_MAX_NS);
        targets.note_placed(0);
        targets.note_full(0, now);
        assert_eq!(targets.choose(now + PAUSE_NS, &[NODE]), Some(0));
    }

    #[test]
    fn what_would_pass_the_quota_goes_to_the_next_node() {
        let step = PLACE_PAGES as u64 * PAGE_SIZE;
        let near = |left: u64| Target { placed: Bytes(NODE.quota.0 - left), ..NODE };
        let targets = Targets::default();
        assert_eq!(targets.choose(0, &[near(step), NODE]), Some(0));
        assert_eq!(targets.choose(0, &[near(step - 1), NODE]), Some(1));
        assert_eq!(targets.choose(0, &[near(step - 1)]), None);
        assert_eq!(targets.choose(0, &[]), None);
    }

    #[test]
    fn what_is_charged_covers_what_is_placed_and_little_more() {
        let (mut charged, mut placed) = (Bytes(0), Bytes(0));
        let step = Bytes(PLACE_PAGES as u64 * PAGE_SIZE);
        let settle = |charged: &mut Bytes, placed, wanted| loop {
            match allotment(*charged, placed, wanted) {
                Allotment::Covered => break,
                Allotment::Charge => charged.0 += ALLOTMENT.0,
                Allotment::GiveBack => charged.0 -= ALLOTMENT.0,
            }
        };
        for turn in 0..1000_u64 {
            let wanted = if turn % 3 == 0 { Bytes(0) } else { step };
            settle(&mut charged, placed, wanted);
            assert!(charged.0 >= placed.0 + wanted.0 && charged.0 < placed.0 + wanted.0 + 2 * ALLOTMENT.0);
            placed.0 = if turn % 200 == 199 { placed.0 / 3 } else { placed.0 + wanted.0 };
        }
    }

    #[test]
    fn placed_pages_are_looked_at_ten_times_a_second() {
        let mut looks = Looks::default();
        let due = (1..=20).filter(|turn| looks.is_due(turn * LOOK_NS / 2)).count();
        assert_eq!(due, 10);
    }
}
