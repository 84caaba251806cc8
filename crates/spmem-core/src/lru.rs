//! Replacement: which page leaves next, as decisions about one page at a time.
//!
//! A clock (GCLOCK) without access bits. All that is known of a page: it was touched first, it came back from the
//! store, it came back from the holding area (used again within a short time), the hand passed it. [`Age`] keeps
//! that in three bits, also while the page is away: a *heat*, how often use was proven (0, 1, 2 or more rescues), and
//! within the heat a *credit*, how many more times the hand passes before the page leaves.
//!
//! | age | heat | credit | | age | heat | credit |
//! |---|---|---|---|---|---|---|
//! | 0 | 0 | 0 | | 3 to 7 | 2 | 0 to 4 |
//! | 1, 2 | 1 | 0, 1 | | | | |
//!
//! Measured (`cargo run --release -p spmem-core --example replacement`), cost relative to FIFO with a holding area:
//! uniform 1.00, Zipf 0.90, Zipf with a scan 0.90, moving hot set 0.96; to plain FIFO: 1.01, 0.84, 0.87, 0.85.
//! Called by the runtime's eviction and fault paths and the simulator. Hole: heat never cools while a page is away.

use core::fmt;

/// How warm a page is held to be, 0 (leaves at the next sweep) to 7. Three bits, also while the page is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Age(u8);

/// Age of the first heat with no credit left.
const WARM: u8 = 1;
/// Age of the highest heat with no credit left.
const HOT: u8 = 3;
/// Age of the highest heat halfway through its credit: where a page enters it.
const NEWLY_HOT: u8 = 5;

impl Age {
    /// Leaves at the next sweep, no use was proven.
    pub const COLDEST: Self = Self(0);
    /// Stays longest.
    pub const HOTTEST: Self = Self(7);

    /// The age in the low three bits of `bits`; the others are ignored.
    ///
    /// ```
    /// use spmem_core::lru::Age;
    /// assert_eq!(Age::from_bits(0b1101).bits(), 0b101);
    /// ```
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits & 7)
    }

    /// The age as three bits.
    pub const fn bits(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What the clock hand does with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays, with this age.
    Keep(Age),
    /// It leaves to the holding area; this age is remembered while it is away.
    Evict(Age),
}

/// The age of a page that is touched for the first time: most pages are not used again soon, and one that is comes
/// back cheaply from the holding area.
///
/// ```
/// use spmem_core::lru::{Age, Verdict, on_first_touch, on_sweep};
/// assert_eq!(on_sweep(on_first_touch()), Verdict::Evict(Age::COLDEST));
/// ```
pub const fn on_first_touch() -> Age {
    Age::COLDEST
}

/// The age of a page that came back from the store; `prev` was remembered when it left. It keeps its heat; a hot one
/// gets its whole credit, because losing it was a mistake.
///
/// ```
/// use spmem_core::lru::{Age, on_promoted};
/// assert_eq!(on_promoted(Age::COLDEST), Age::COLDEST);
/// assert_eq!(on_promoted(Age::from_bits(3)), Age::HOTTEST);
/// ```
pub const fn on_promoted(prev: Age) -> Age {
    match prev.0 {
        0 => prev,
        1..HOT => Age(WARM),
        _ => Age::HOTTEST,
    }
}

/// The age of a page that came back from the holding area, which proves recent use: one heat up. `prev` was
/// remembered when it left.
///
/// ```
/// use spmem_core::lru::{Age, on_rescued};
/// assert!(on_rescued(Age::COLDEST) > Age::COLDEST);
/// assert_eq!(on_rescued(Age::HOTTEST), Age::HOTTEST);
/// ```
pub const fn on_rescued(prev: Age) -> Age {
    match prev.0 {
        0 => Age(WARM + 1),
        1..HOT => Age(NEWLY_HOT),
        _ => Age::HOTTEST,
    }
}

/// What happens to a page of this age when the hand passes it: it pays with its credit, or leaves and keeps its heat.
///
/// ```
/// use spmem_core::lru::{Age, Verdict, on_rescued, on_sweep};
/// let warm = on_rescued(Age::COLDEST);
/// let Verdict::Keep(spent) = on_sweep(warm) else { panic!("a rescued page stays for one sweep") };
/// assert_eq!(on_sweep(spent), Verdict::Evict(spent));
/// ```
pub const fn on_sweep(age: Age) -> Verdict {
    match age.0 {
        0 | WARM | HOT => Verdict::Evict(age),
        credited => Verdict::Keep(Age(credited - 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ages() -> impl Iterator<Item = Age> {
        (0..8).map(Age::from_bits)
    }

    #[test]
    fn every_page_leaves_within_five_sweeps_and_keeps_its_heat() {
        for age in ages() {
            let mut at = age;
            let mut sweeps = 1;
            let left = loop {
                match on_sweep(at) {
                    Verdict::Keep(next) => at = next,
                    Verdict::Evict(left) => break left,
                }
                sweeps += 1;
            };
            assert!(sweeps <= 5, "{age}");
            let heat = |age: Age| [WARM, HOT].iter().filter(|&&floor| age.0 >= floor).count();
            assert_eq!(heat(left), heat(age), "{age}");
        }
    }

    #[test]
    fn a_rescued_page_is_never_colder_than_a_promoted_one_or_than_before() {
        for age in ages() {
            assert!(on_rescued(age) >= on_promoted(age) && on_rescued(age) >= age, "{age}");
        }
    }
}
