//! Compressed memory: how much of it is there, and may one more page enter?
//!
//! A compressed node offers more frames than it has memory for. What holds is what its device *measures*, and that comes late:
//! lines wait in caches before they are compressed. [`Supply`] joins what is known: what the device said last
//! ([`Reading`]), what has entered since and counts in full, and a *reserve* for what the device had not compressed yet when it
//! said so ([`Burst`]). A page is admitted ([`Supply::admit`]) only while all of that together fits, so whatever the pages turn
//! out to be, the device has room for them (R18). The derivation is in docs/compressed.md.
//!
//! What goes with it: [`Ratio`] (per mille), [`Supply::pressure`] (0 to 1000), [`Balloon`] (takes back frames that there is no
//! memory for), [`Gates`] (three reasons not to allocate, each with its own key), [`Teardown`] (all or nothing).
//! Pure: the caller reads the device and tells the time. Called by `spmem_node::cram`, by the runtime for its compressed
//! store, and by the simulator. Takes no lock.
//!
//! Hole: a device that lies in numbers that change is believed; one that is silent, or says the same whatever enters, is not.

mod balloon;
mod error;
mod gates;
mod reserve;
mod settings;
mod teardown;
mod telemetry;

pub use self::balloon::{BALLOON_STEP, Balloon, Change};
pub use self::error::NotAdmitted;
pub use self::gates::{Allocation, Converging, Gate, Gates, IsSet, Key, TearingDown};
pub use self::reserve::{Burst, OPEN_TRANSACTIONS, Room};
pub use self::settings::{EASE_SHARE, STALE_NS, Settings};
pub use self::teardown::{Attempt, RETRY_NS, TEARDOWN_ATTEMPTS, Teardown};
pub use self::telemetry::{Health, Ratio, Reading, Trend};

use crate::units::{Bytes, FrameCount, PAGE_SIZE, Time};
use crate::watermark::{BOOST_MAX_PER_MILLE, Watermarks};

/// What is known of a compressed node's memory, and who may enter.
///
/// ```
/// use spmem_core::compressed::{Burst, Ratio, Reading, Settings, Supply};
/// use spmem_core::units::{Bytes, Time};
/// let burst = Burst::Device { dirty_lines: 1024, granule: Bytes(1024) };
/// let mut supply = Supply::new(Settings::new(Ratio(2000), burst));
/// assert!(supply.admit(Time(0), Bytes(4096)).is_err(), "nothing is known yet");
///
/// let mark = supply.mark();
/// supply.observe(Time(1), mark, Some(Reading { capacity: Bytes::mib(64), used: Bytes(0) }));
/// let admission = supply.admit(Time(2), Bytes(4096)).unwrap();
/// supply.entered(admission);
/// assert_eq!(supply.room().unmeasured, Bytes(4096));
///
/// let mark = supply.mark();
/// supply.observe(Time(3), mark, Some(Reading { capacity: Bytes::mib(64), used: Bytes(1024) }));
/// assert_eq!((supply.ratio(), supply.room().unmeasured), (Some(Ratio(4000)), Bytes(0)));
/// ```
#[derive(Debug)]
pub struct Supply {
    settings: Settings,
    gates: Gates,
    balloon: Balloon,
    reading: Option<Reading>,
    /// When something new was heard last.
    heard: Time,
    /// Whether something was owed since, and not heard.
    health: Health,
    /// What may still enter while nothing is heard.
    budget: Bytes,
    trend: Trend,
    /// All that has entered or left, ever: tells readings apart.
    entered: u64,
    left: u64,
    /// The counts that the last reading covers.
    covered: Mark,
    /// Admitted and not entered yet.
    open: Bytes,
}

/// A moment: what had entered when the device was asked. A reading covers what had entered before it was asked for, not before
/// it was answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    entered: u64,
    left: u64,
}

/// The right to put so many bytes on the node. Give it back by [`Supply::entered`] or [`Supply::cancelled`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped one counts for ever"]
pub struct Admission {
    bytes: Bytes,
}

impl Admission {
    /// What it counts for.
    pub const fn bytes(&self) -> Bytes {
        self.bytes
    }
}

/// What is to be done about a node now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// 0 to 1000: how near the reserve is.
    pub pressure: u16,
    /// By so much are the node's watermarks boosted, so that its own pages leave earlier.
    pub boost: FrameCount,
    /// Whether pages may enter: not at the reserve.
    pub is_demotion_on: bool,
    /// What the balloon does next.
    pub balloon: Change,
}

impl Supply {
    /// A supply of which nothing is known: nothing is admitted before the first reading.
    pub const fn new(settings: Settings) -> Self {
        Self {
            settings,
            gates: Gates::new(),
            balloon: Balloon::new(settings.balloon_step),
            reading: None,
            heard: Time(0),
            health: Health::Unheard,
            budget: Bytes(0),
            trend: Trend::NONE,
            entered: 0,
            left: 0,
            covered: Mark { entered: 0, left: 0 },
            open: Bytes(0),
        }
    }

    /// Notes the moment at which the device is asked.
    pub const fn mark(&self) -> Mark {
        Mark { entered: self.entered, left: self.left }
    }

    /// Takes in what the device answered to the question at `mark`; none if it did not, or nonsense. A reading that is as the
    /// last one although something has entered or left meanwhile tells nothing new: a stuck counter must not make room.
    /// After [`Settings::stale_ns`] of that, pages enter within a budget only ([`Settings::budget`]), and then no more.
    pub fn observe(&mut self, now: Time, mark: Mark, reading: Option<Reading>) -> Health {
        let reading = reading.filter(Reading::is_plausible);
        let is_owed = mark != self.covered;
        let is_news = reading.is_some_and(|new| !is_owed || self.reading != Some(new));
        if let (Some(reading), true) = (reading, is_news) {
            self.reading = Some(reading);
            self.covered = mark;
            self.heard = self.heard.max(now);
            self.health = Health::Live;
            self.trend.note(now, Ratio::of(self.stored_at(mark), reading.used));
        } else if self.health == Health::Live && now.since(self.heard) >= self.settings.stale_ns {
            self.health = Health::Dead { since: self.heard };
            self.budget = self.settings.budget;
        }
        self.health
    }

    /// Asks whether so many bytes may enter, which may take as many of physical memory (R18).
    ///
    /// # Errors
    /// [`NotAdmitted`]; nothing has changed then.
    pub fn admit(&mut self, now: Time, bytes: Bytes) -> Result<Admission, NotAdmitted> {
        if let Some(gate) = self.gates.first_set() {
            return Err(NotAdmitted::Gate(gate));
        }
        if self.reading.is_none() {
            return Err(NotAdmitted::Unheard);
        }
        // Whoever only admits and never asks finds out as well.
        let is_owed = self.mark() != self.covered;
        if self.health == Health::Live && is_owed && now.since(self.heard) >= self.settings.stale_ns {
            self.health = Health::Dead { since: self.heard };
            self.budget = self.settings.budget;
        }
        let left = self.admissible();
        match self.health {
            // What has entered is not going to be measured: nobody need wait for that.
            Health::Dead { since } if left < bytes => return Err(NotAdmitted::Dead { since, budget: left }),
            _ if left < bytes => return Err(NotAdmitted::Reserve { room: self.room(), wanted: bytes }),
            Health::Dead { .. } => self.budget.0 -= bytes.0,
            Health::Live | Health::Unheard => {}
        }
        self.open.0 += bytes.0;
        Ok(Admission { bytes })
    }

    /// What may enter now, the gates aside.
    fn admissible(&self) -> Bytes {
        let left = self.room().left();
        match self.health {
            Health::Dead { .. } => left.min(self.budget),
            Health::Live | Health::Unheard => left,
        }
    }

    /// It lies on the node now.
    #[expect(clippy::needless_pass_by_value, reason = "an admission is good for one page")]
    pub const fn entered(&mut self, admission: Admission) {
        self.open.0 -= admission.bytes.0;
        self.entered += admission.bytes.0;
    }

    /// It does not, after all. What was written of it may lie on the node until it is measured: it counts as entered and left.
    pub const fn cancelled(&mut self, admission: Admission) {
        let bytes = admission.bytes;
        self.entered(admission);
        self.left(bytes);
    }

    /// So many bytes, as admitted, have left the node. Room they make once the device has measured it.
    pub const fn left(&mut self, bytes: Bytes) {
        self.left += bytes.0;
    }

    /// What there is and what is spoken for.
    pub fn room(&self) -> Room {
        let reading = self.reading.unwrap_or_default();
        let unmeasured = Bytes(self.entered - self.covered.entered + self.open.0);
        Room { capacity: reading.capacity, used: reading.used, unmeasured, reserve: self.settings.reserve }
    }

    /// What lies on the node, uncompressed.
    pub const fn stored(&self) -> Bytes {
        Bytes(self.entered - self.left)
    }

    const fn stored_at(&self, mark: Mark) -> Bytes {
        Bytes(mark.entered.saturating_sub(mark.left))
    }

    /// What it takes there, as measured: uncompressed bytes per physical one. `None` while nothing lies there or is measured.
    pub const fn ratio(&self) -> Option<Ratio> {
        self.trend.ratio()
    }

    /// How the ratio changes.
    pub const fn trend(&self) -> Trend {
        self.trend
    }

    /// What was measured last.
    pub const fn reading(&self) -> Option<Reading> {
        self.reading
    }

    /// Whether the device is heard.
    pub const fn health(&self) -> Health {
        self.health
    }

    /// As given.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The three gates. Who sets one gets its key.
    pub const fn gates(&self) -> &Gates {
        &self.gates
    }

    /// The same, to set and clear.
    pub const fn gates_mut(&mut self) -> &mut Gates {
        &mut self.gates
    }

    /// What the balloon holds and is to hold.
    pub const fn balloon(&self) -> &Balloon {
        &self.balloon
    }

    /// The same, to say what was taken or given back.
    pub const fn balloon_mut(&mut self) -> &mut Balloon {
        &mut self.balloon
    }

    /// How near the reserve is: 0 with an eighth of the capacity ([`EASE_SHARE`]) or more above it, 1000 at it. A falling ratio
    /// counts as if it fell on as fast for as long again.
    pub fn pressure(&self) -> u16 {
        let Some(reading) = self.reading else { return 1000 };
        let room = self.room();
        let ahead = self.trend.ahead().map_or(reading.used, |ratio| ratio.physical(self.stored_at(self.covered)));
        Room { used: reading.used.max(ahead), ..room }.pressure()
    }

    /// What is to be done now, for a node that offers `perceived` frames with these watermarks.
    pub fn plan(&mut self, perceived: FrameCount, marks: &Watermarks) -> Plan {
        let pressure = self.pressure();
        if let Some(ratio) = self.ratio() {
            self.balloon.aim(Balloon::target(perceived, ratio, self.settings.advertised));
        } else if self.stored() == Bytes(0) {
            self.balloon.aim(FrameCount(0));
        }
        let most = u128::from(marks.high().0) * u128::from(BOOST_MAX_PER_MILLE) / 1000;
        let boost = u64::try_from(most * u128::from(pressure) / 1000).unwrap_or(u64::MAX);
        Plan {
            pressure,
            boost: FrameCount(boost),
            is_demotion_on: self.gates.first_set().is_none() && self.admissible().0 >= PAGE_SIZE,
            balloon: self.balloon.next(),
        }
    }
}

#[cfg(test)]
mod tests;
