//! Density: which stored pages are worth a denser encoding, when, and whether a dictionary pays.
//!
//! A hand goes round the pages that are away ([`Rounds`]); a page that it has met so often without its having come back is
//! cold ([`Stay`], [`on_round`]). Cold pages go in batches with a rest between them, so that this work takes a few
//! hundredths of a processor at most. [`Dictionaries`] says page by page how to encode and learns from what it came to.
//! [`compacts`] says when the room that is lost in half-empty blocks is worth moving pages for, and [`Payoff`] holds cold pages
//! back while those that were encoded anew come back too soon.
//!
//! Pure: the caller has the clock. Called by the runtime's monitor and by the thread of `spm` that encodes densely.

use crate::units::Bytes;

/// Pages of a batch: it is encoded in a millisecond or two.
pub const DENSE_PAGES: usize = 16;
/// A process spends about 20 us on a page that is encoded anew: of these, so much rest after a batch makes a fiftieth ...
const REST_NS: u64 = 16_000_000;
/// ... and a twenty-fifth where it has nothing else to do.
const REST_IDLE_NS: u64 = 8_000_000;
/// Entries that the hand looks at between two rests.
pub const LOOK_ENTRIES: usize = 1024;
/// A round of the hand takes no less, ns.
const ROUND_NS: u64 = 3_000_000_000;
/// Rounds that find a page stored before it is cold: it has been away for 6 s at least, mostly for 8.
const COLD_ROUNDS: u8 = 2;

/// In how many rounds the hand has met a page where it is now. Two bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stay(u8);

impl Stay {
    /// It came a moment ago.
    pub const NEW: Self = Self(0);
    /// It was tried and stays as it is.
    pub const FOR_GOOD: Self = Self(3);

    /// The stay in the low two bits of `bits`.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits & 3)
    }

    /// As two bits.
    pub const fn bits(self) -> u8 {
        self.0
    }
}

/// What the hand does with a stored page that it meets: `Ok` if it is cold, else what to remember.
///
/// ```
/// use spmem_core::reclaim::{Stay, on_round};
/// let (mut stay, mut rounds) = (Stay::NEW, 1);
/// while let Err(next) = on_round(stay) {
///     (stay, rounds) = (next, rounds + 1);
/// }
/// assert_eq!(rounds, 3);
/// assert_eq!(on_round(Stay::FOR_GOOD), Err(Stay::FOR_GOOD));
/// ```
pub const fn on_round(stay: Stay) -> Result<(), Stay> {
    match stay.0 {
        COLD_ROUNDS => Ok(()),
        3 => Err(stay),
        rounds => Err(Stay(rounds + 1)),
    }
}

/// The pace of the hand.
#[derive(Clone, Debug, Default)]
pub struct Rounds {
    next_ns: u64,
    round_ns: u64,
}

impl Rounds {
    /// Whether the hand may look further now.
    pub const fn may_look(&self, now_ns: u64) -> bool {
        now_ns >= self.next_ns
    }

    /// It has looked, or a batch came back. `is_busy`: the process has pages to evict.
    pub const fn note_looked(&mut self, now_ns: u64, is_busy: bool) {
        self.next_ns = now_ns.saturating_add(if is_busy { REST_NS } else { REST_IDLE_NS });
    }

    /// It has come round: it begins the next one no sooner than a round takes.
    pub const fn note_round(&mut self, now_ns: u64) {
        let due = self.round_ns.saturating_add(ROUND_NS);
        self.next_ns = if due > now_ns { due } else { now_ns };
        self.round_ns = self.next_ns;
    }

    /// How long until it may look, ns.
    pub const fn rest_ns(&self, now_ns: u64) -> u64 {
        self.next_ns.saturating_sub(now_ns)
    }
}

/// Whether so much room in blocks that have other pages is worth moving pages for: more than a sixteenth of the frames.
///
/// ```
/// use spmem_core::{reclaim::compacts, units::Bytes};
/// assert!(!compacts(Bytes::mib(1), Bytes::mib(16)) && compacts(Bytes::mib(2), Bytes::mib(16)));
/// assert!(!compacts(Bytes(65536), Bytes(131072)), "a few half-filled blocks are always there");
/// ```
pub const fn compacts(free_slots: Bytes, used: Bytes) -> bool {
    free_slots.0 > used.0 / 16 && free_slots.0 > Bytes::mib(1).0
}

/// How long it is watched, at least, before it is judged whether it pays: a round of the hand.
const WATCH_NS: u64 = ROUND_NS;
/// Encoding six pages anew makes room for one, and takes about eight times as long as a fault and the eviction that it calls
/// for. So it pays in processor time where such pages stay eight times as long as stored pages do on average ...
const PAYS_TIMES: u128 = 8;
/// ... and in memory, whatever the time, where they stay for a minute: that is a thousandth of a processor for 1000 pages.
const PAYS_NS: u128 = 60_000_000_000;
/// Pages that are encoded anew all the same, so that it shows when it would pay.
const PROBE_PAGES: u64 = 256;

/// Pages on node 1, and pages that came back from there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turnover {
    /// Pages that are stored.
    pub stored: u64,
    /// Of these, encoded anew.
    pub anew: u64,
    /// Pages that came back, since the beginning.
    pub returned: u64,
    /// Of these, encoded anew.
    pub anew_returned: u64,
}

/// Whether encoding pages anew pays: by how soon those come back that were.
///
/// A page that was away for some seconds stays away for long where a program has pages that it does not use, and no longer than
/// any other where it uses all of them now and then. Which of both is so only the pages tell that were encoded anew.
#[derive(Clone, Debug, Default)]
pub struct Payoff {
    since_ns: u64,
    before: Turnover,
    is_held: bool,
}

impl Payoff {
    /// How many cold pages may be encoded anew now, as far as this goes.
    pub fn allowed(&mut self, now_ns: u64, now: Turnover) -> u64 {
        let watched_ns = now_ns.saturating_sub(self.since_ns);
        if watched_ns >= WATCH_NS {
            let returned = u128::from(now.returned.saturating_sub(self.before.returned));
            let anew_returned = u128::from(now.anew_returned.saturating_sub(self.before.anew_returned));
            // What came back was there as well, if only between two looks.
            let anew = u128::from(self.before.anew.midpoint(now.anew)).max(anew_returned);
            let stored = u128::from(self.before.stored.midpoint(now.stored)).max(1);
            let stays_long = anew * u128::from(watched_ns) >= anew_returned * PAYS_NS;
            let stays_longer = anew * returned >= PAYS_TIMES * anew_returned * stored;
            self.is_held = !stays_long && !stays_longer;
            (self.since_ns, self.before) = (now_ns, now);
        }
        if self.is_held { PROBE_PAGES.saturating_sub(now.anew) } else { u64::MAX }
    }
}

/// What a store has to hold before pages come densely the first time: the decoder takes 66 KiB with a dictionary, and `spm` up to a MiB.
const DENSE_FROM: Bytes = Bytes::mib(1);

/// What a batch that leaves while there is no room adds to the hurry; one that leaves while there is some takes 1 off: so it grows where there is
/// none for more than one batch of five.
const NO_ROOM: u32 = 4;
/// From here on all batches leave in the faster encoding, ...
const HURRIES_FROM: u32 = 64;
/// ... and it is forgotten within so many batches.
const HURRY_MAX: u32 = 128;

/// With so many pages that came back since the batch before, pages circulate: half of what leaves with one.
const CIRCULATING_PAGES: u64 = 8;

/// What is known when a batch is to leave.
#[derive(Clone, Copy, Debug)]
pub struct Departure {
    /// What the store holds.
    pub stored: Bytes,
    /// Pages that may come in before growth waits: see [`Admission`](super::Admission).
    pub room_pages: i64,
    /// With less room than this, pages leave too slowly: see [`Marks::scarce_pages`](super::Marks::scarce_pages).
    pub scarce_pages: i64,
    /// Pages that have come back from the store so far.
    pub returned: u64,
}

/// Whether pages that leave are encoded densely at once. That makes them a third smaller and takes about twice as long, there and back, so more
/// pages stay resident and there are fewer faults. But where pages come in faster than they leave, the program waits for them. Where it only grows
/// that soon ends, and what it leaves behind lies for long. Where pages come back nearly as fast as they leave, it goes on: those
/// batches leave in the faster encoding, until there is room again.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hurry {
    score: u32,
    returned: u64,
}

impl Hurry {
    /// Whether the next batch is.
    ///
    /// ```
    /// use spmem_core::{reclaim::{Departure, Hurry}, units::Bytes};
    /// let mut hurry = Hurry::default();
    /// let calm = Departure { stored: Bytes::mib(1), room_pages: 80, scarce_pages: 80, returned: 0 };
    /// assert!(hurry.is_dense(&calm));
    /// assert!(!hurry.is_dense(&Departure { stored: Bytes((1 << 20) - 1), ..calm }), "it could not save what that takes");
    ///
    /// let mut scarce = Departure { room_pages: 79, ..calm };
    /// assert!(hurry.is_dense(&scarce), "the program grows");
    /// scarce.returned += 8;
    /// assert!(!hurry.is_dense(&scarce), "pages that come back wait for pages that leave");
    /// scarce.returned += 7;
    /// assert!(hurry.is_dense(&scarce));
    ///
    /// let full = Departure { room_pages: 0, ..scarce };
    /// assert!(!hurry.is_dense(&full), "the program waits for room");
    /// assert!(hurry.is_dense(&scarce), "now and then that does no harm");
    /// while hurry.is_dense(&scarce) {
    ///     assert!(!hurry.is_dense(&full), "it waits for every second batch");
    /// }
    /// let batches = (0..).take_while(|_| !hurry.is_dense(&scarce)).count();
    /// assert!(batches < 128, "it waits no more");
    /// ```
    pub const fn is_dense(&mut self, batch: &Departure) -> bool {
        let has_room = batch.room_pages > 0;
        self.score = if has_room { self.score.saturating_sub(1) } else { self.score + NO_ROOM };
        if self.score > HURRY_MAX {
            self.score = HURRY_MAX;
        }
        let circulates = batch.returned.saturating_sub(self.returned) >= CIRCULATING_PAGES;
        self.returned = batch.returned;
        let is_late = circulates && batch.room_pages < batch.scarce_pages;
        batch.stored.0 >= DENSE_FROM.0 && has_room && self.score < HURRIES_FROM && !is_late
    }
}

/// Pages laid aside, of those that leave, before it is looked what can be learnt of them.
pub const LEARN_PAGES: usize = TRIALS as usize;
/// Pages that a dictionary is made from.
pub const SAMPLE_PAGES: u32 = 128;
/// Pages encoded both ways before it is judged.
const TRIALS: u32 = 32;
/// Once it has paid, one page of so many is encoded both ways.
const TRIAL_EVERY: u32 = 16;
/// With one, a page is encoded and decoded in four fifths of the time, as its tables are there already. So it pays unless it makes
/// pages larger by more than this part: one in so many.
const WORSE_PART: u64 = 64;
/// Pages without one after one that does not pay, at first; each failure doubles it.
const REST_PAGES: u32 = 1024;
const REST_PAGES_MAX: u32 = 1 << 20;

/// How to encode a page densely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Without a dictionary.
    Plain,
    /// Without one, and it is a sample for the next.
    Sample,
    /// As `Sample`, and now the dictionary is to be made ([`Dictionaries::note_made`]).
    Train,
    /// With the dictionary.
    With,
    /// Both ways ([`Dictionaries::note_trial`]); the smaller one is kept.
    Both,
}

/// When to make a dictionary and when to give it up. One process's.
#[derive(Clone, Debug)]
pub struct Dictionaries {
    phase: Phase,
    /// Of this phase.
    pages: u32,
    trials: u32,
    plain_bytes: u64,
    with_bytes: u64,
    /// It has paid at least once.
    is_proven: bool,
    rest_pages: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Gather,
    Use,
    Rest,
}

impl Default for Dictionaries {
    fn default() -> Self {
        Self::new()
    }
}

impl Dictionaries {
    /// None was made yet.
    pub const fn new() -> Self {
        Self {
            phase: Phase::Gather,
            pages: 0,
            trials: 0,
            plain_bytes: 0,
            with_bytes: 0,
            is_proven: false,
            rest_pages: REST_PAGES,
        }
    }

    /// How to encode the next page. `has_room`: a further dictionary could be kept.
    pub fn next(&mut self, has_room: bool) -> Way {
        match self.phase {
            Phase::Gather if !has_room => Way::Plain,
            Phase::Gather => {
                self.pages += 1;
                if self.pages < SAMPLE_PAGES { Way::Sample } else { Way::Train }
            }
            Phase::Use => {
                self.pages = self.pages.wrapping_add(1);
                if !self.is_proven || self.pages.is_multiple_of(TRIAL_EVERY) { Way::Both } else { Way::With }
            }
            Phase::Rest => {
                self.pages += 1;
                if self.pages >= self.rest_pages {
                    self.enter(Phase::Gather);
                }
                Way::Plain
            }
        }
    }

    /// Whether the dictionary that there is pays.
    pub fn pays(&self) -> bool {
        self.phase == Phase::Use && self.is_proven
    }

    /// Whether pages tell something: it does not pay, or is not known to, and has not been given up.
    pub fn is_learning(&self) -> bool {
        self.phase == Phase::Gather || self.phase == Phase::Use && !self.is_proven
    }

    /// Whether a dictionary could be made of the samples.
    pub fn note_made(&mut self, is_made: bool) {
        if is_made {
            self.is_proven = false;
            self.enter(Phase::Use);
        } else {
            self.give_up();
        }
    }

    /// What a page came to both ways, bytes.
    pub fn note_trial(&mut self, plain_bytes: usize, with_bytes: usize) {
        self.trials += 1;
        self.plain_bytes += plain_bytes as u64;
        self.with_bytes += with_bytes as u64;
        if self.trials < TRIALS {
            return;
        }
        let pays = self.with_bytes <= self.plain_bytes + self.plain_bytes / WORSE_PART;
        (self.trials, self.plain_bytes, self.with_bytes) = (0, 0, 0);
        if !pays {
            if self.is_proven {
                // It paid for a while, so another one will.
                self.enter(Phase::Gather);
            } else {
                self.give_up();
            }
        } else if !self.is_proven {
            self.is_proven = true;
            self.rest_pages = REST_PAGES;
        }
    }

    fn give_up(&mut self) {
        self.rest_pages = (self.rest_pages * 2).min(REST_PAGES_MAX);
        self.enter(Phase::Rest);
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        (self.pages, self.trials, self.plain_bytes, self.with_bytes) = (0, 0, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    /// Drives it for so many pages, of each of which `lengths` says what it comes to; how often each way was taken.
    fn drive(dictionaries: &mut Dictionaries, pages: u32, lengths: (usize, usize)) -> [u32; 5] {
        let mut ways = [0; 5];
        for _ in 0..pages {
            let way = dictionaries.next(true);
            ways[way as usize] += 1;
            match way {
                Way::Train => dictionaries.note_made(true),
                Way::Both => dictionaries.note_trial(lengths.0, lengths.1),
                _ => {}
            }
        }
        ways
    }

    #[test]
    fn a_dictionary_that_pays_is_used_and_one_page_of_sixteen_tries_both() {
        let mut dictionaries = Dictionaries::new();
        let ways = drive(&mut dictionaries, SAMPLE_PAGES + TRIALS, (1000, 900));
        assert_eq!(ways, [0, SAMPLE_PAGES - 1, 1, 0, TRIALS]);
        let ways = drive(&mut dictionaries, 1600, (1000, 900));
        assert_eq!((ways[Way::Both as usize], ways[Way::With as usize]), (100, 1500));
    }

    #[test]
    fn one_that_stops_paying_is_made_anew_and_one_that_never_paid_rests_longer_each_time() {
        let mut dictionaries = Dictionaries::new();
        drive(&mut dictionaries, SAMPLE_PAGES + TRIALS, (1000, 900));
        let ways = drive(&mut dictionaries, TRIALS * TRIAL_EVERY + SAMPLE_PAGES, (1000, 1020));
        assert!(ways[Way::Sample as usize] > 0, "samples are gathered again: {ways:?}");

        let mut dictionaries = Dictionaries::new();
        let mut rests = [0; 3];
        for rest in &mut rests {
            drive(&mut dictionaries, SAMPLE_PAGES + TRIALS, (1000, 1020));
            while dictionaries.phase == Phase::Rest {
                assert_eq!(dictionaries.next(true), Way::Plain);
                *rest += 1;
            }
        }
        assert_eq!(rests, [2048, 4096, 8192]);
    }

    #[test]
    fn without_room_for_another_none_is_made() {
        let mut dictionaries = Dictionaries::new();
        assert!((0..10_000).all(|_| dictionaries.next(false) == Way::Plain));
    }

    /// Stored pages of which those below `resting` are never used and each other one is, in each tick of 100 ms, with a chance
    /// of one in `stay_ticks`; a page that came back is evicted at once. Cold ones are encoded anew, 64 a tick at most, as
    /// `Payoff` allows. How many were, in the second half of so many ticks, and how many are at the end.
    fn recompress(payoff: &mut Payoff, pages: usize, resting: usize, stay_ticks: u64, ticks: u64) -> (u64, u64) {
        const COLD_TICKS: u64 = 70;
        // When it was evicted, and whether it is dense.
        let mut stored = vec![(0u64, false); pages];
        let (mut turnover, mut random, mut made) =
            (Turnover { stored: pages as u64, ..Turnover::default() }, 1u64, 0);
        for tick in 0..ticks {
            for (evicted, is_dense) in &mut stored[resting..] {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                if (random >> 33) % stay_ticks == 0 {
                    turnover.returned += 1;
                    turnover.anew_returned += u64::from(*is_dense);
                    turnover.anew -= u64::from(*is_dense);
                    (*evicted, *is_dense) = (tick, false);
                }
            }
            let allowed = payoff.allowed(tick * 100_000_000, turnover).min(64);
            let cold = stored.iter_mut().filter(|page| !page.1 && tick - page.0 >= COLD_TICKS);
            for page in cold.take(usize::try_from(allowed).expect("few")) {
                page.1 = true;
                turnover.anew += 1;
                made += u64::from(tick >= ticks / 2);
            }
        }
        (made, turnover.anew)
    }

    #[test]
    fn pages_that_all_come_back_within_seconds_are_left_as_they_are() {
        // 20,000 pages that stay for 4 s: one of six is cold at some time, 900 a second.
        let (pages, seconds) = (20_000, 60);
        let mut payoff = Payoff::default();
        let (made, _) = recompress(&mut payoff, pages, 0, 40, seconds * 2 * 10);
        assert!(payoff.is_held && made > 0, "some are, to see whether it still does not pay: {made}");
        assert!(made < seconds * 100, "{made}");
    }

    #[test]
    fn pages_that_rest_are_all_encoded_anew_beside_others_that_move() {
        for moving in [0, 4000] {
            let (mut payoff, resting) = (Payoff::default(), 16_000);
            let (_, dense) = recompress(&mut payoff, resting + moving, resting, 10, resting as u64 / 64 + 140);
            assert!(!payoff.is_held && dense >= resting as u64, "{dense} with {moving} that move");
        }
    }

    #[test]
    fn pages_that_come_to_rest_are_encoded_anew_soon() {
        let mut payoff = Payoff::default();
        let mut now = Turnover { stored: 20_000, anew: 2000, returned: 0, anew_returned: 0 };
        assert_eq!(payoff.allowed(0, now), u64::MAX);
        (now.returned, now.anew_returned) = (15_000, 1500);
        assert_eq!(payoff.allowed(WATCH_NS - 1, now), u64::MAX, "not judged yet");
        assert_eq!(payoff.allowed(WATCH_NS, Turnover { anew: 200, ..now }), PROBE_PAGES - 200);
        assert_eq!(payoff.allowed(WATCH_NS + 1, Turnover { anew: 300, ..now }), 0);
        assert_eq!(payoff.allowed(2 * WATCH_NS, now), u64::MAX, "none came back");
    }

    #[test]
    fn the_hand_rests_between_looks_and_a_round_takes_its_time() {
        let mut rounds = Rounds::default();
        assert!(rounds.may_look(0));
        rounds.note_looked(0, true);
        assert!(!rounds.may_look(REST_NS - 1) && rounds.may_look(REST_NS));
        rounds.note_round(1000);
        assert_eq!(rounds.rest_ns(1000), ROUND_NS - 1000);
        rounds.note_round(10 * ROUND_NS);
        assert_eq!(rounds.rest_ns(10 * ROUND_NS), 0, "a round that took long enough is followed by the next");
        rounds.note_round(10 * ROUND_NS + 1);
        assert_eq!(rounds.rest_ns(10 * ROUND_NS + 1), ROUND_NS - 1);
    }
}
