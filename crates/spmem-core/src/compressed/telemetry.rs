//! Telemetry: what a device says of its memory, and what follows from it.
//!
//! Integers only: ratios are per mille, 2000 is two bytes stored in one of memory.

use core::fmt;

use crate::units::{Bytes, Time};

/// What a device says of its physical memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// There is.
    pub capacity: Bytes,
    /// In use.
    pub used: Bytes,
}

impl Reading {
    /// Physical bytes that are free.
    pub const fn free(&self) -> Bytes {
        Bytes(self.capacity.0.saturating_sub(self.used.0))
    }

    /// Whether it can be so.
    pub const fn is_plausible(&self) -> bool {
        self.capacity.0 > 0 && self.used.0 <= self.capacity.0
    }
}

/// Bytes stored per byte of memory, per mille.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ratio(pub u64);

impl Ratio {
    /// The ratio of what is stored to what it takes; `None` where that is nothing.
    ///
    /// ```
    /// use spmem_core::{compressed::Ratio, units::Bytes};
    /// assert_eq!(Ratio::of(Bytes(4096), Bytes(1024)), Some(Ratio(4000)));
    /// assert_eq!(Ratio::of(Bytes(0), Bytes(0)), None);
    /// ```
    pub fn of(stored: Bytes, used: Bytes) -> Option<Self> {
        if stored.0 == 0 {
            return None;
        }
        let ratio = (u128::from(stored.0) * 1000).checked_div(u128::from(used.0))?;
        Some(Self(u64::try_from(ratio).unwrap_or(u64::MAX)))
    }

    /// What so many stored bytes take at this ratio, rounded up; without a limit at ratio 0.
    pub fn physical(self, stored: Bytes) -> Bytes {
        if self.0 == 0 {
            return Bytes(u64::MAX);
        }
        let bytes = (u128::from(stored.0) * 1000).div_ceil(u128::from(self.0));
        Bytes(u64::try_from(bytes).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:02}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// Whether a device is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Never yet.
    Unheard,
    /// It says what is new.
    Live,
    /// It says nothing, or the same whatever happens.
    Dead {
        /// When it said something new last.
        since: Time,
    },
}

/// The ratio now, and how it got there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trend {
    now: Option<(Time, Ratio)>,
    before: Option<(Time, Ratio)>,
}

impl Trend {
    /// Nothing is known.
    pub const NONE: Self = Self { now: None, before: None };

    /// The ratio at a time; none where nothing is stored, and then there is no trend.
    pub fn note(&mut self, at: Time, ratio: Option<Ratio>) {
        let Some(ratio) = ratio else {
            *self = Self::NONE;
            return;
        };
        // Readings at one moment are one.
        if self.now.is_none_or(|(time, _)| time < at) {
            self.before = self.now;
        }
        self.now = Some((at, ratio));
    }

    /// The ratio now.
    pub const fn ratio(&self) -> Option<Ratio> {
        match self.now {
            Some((_, ratio)) => Some(ratio),
            None => None,
        }
    }

    /// How it changed between the last two readings, per mille a second.
    ///
    /// ```
    /// use spmem_core::{compressed::{Ratio, Trend}, units::Time};
    /// let mut trend = Trend::NONE;
    /// trend.note(Time(0), Some(Ratio(3000)));
    /// trend.note(Time(500_000_000), Some(Ratio(2000)));
    /// assert_eq!((trend.per_mille_s(), trend.ahead()), (-2000, Some(Ratio(1000))));
    /// ```
    pub fn per_mille_s(&self) -> i64 {
        let (Some((now, ratio)), Some((before, from))) = (self.now, self.before) else { return 0 };
        let change = i128::from(ratio.0) - i128::from(from.0);
        let per_second = change * 1_000_000_000 / i128::from(now.since(before).max(1));
        i64::try_from(per_second).unwrap_or(if per_second < 0 { i64::MIN } else { i64::MAX })
    }

    /// The ratio after as long again, where it falls; `None` where it does not. It stops at 1 per mille.
    pub fn ahead(&self) -> Option<Ratio> {
        let ((_, now), (_, before)) = (self.now?, self.before?);
        let fall = before.0.checked_sub(now.0).filter(|&fall| fall > 0)?;
        Some(Ratio(now.0.saturating_sub(fall).max(1)))
    }
}
