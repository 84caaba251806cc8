//! What can be set of a compressed node, and what follows where nothing is.

use super::balloon::BALLOON_STEP;
use super::reserve::Burst;
use super::telemetry::Ratio;
use crate::units::{Bytes, FrameCount};

/// Pressure begins with this part of the capacity left above the reserve: an eighth.
pub const EASE_SHARE: u64 = 8;
/// A device that has said nothing new for so long although it should have is dead, ns.
pub const STALE_NS: u64 = 1_000_000_000;

/// Settings of a compressed node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The ratio that the number of the node's frames promises.
    pub advertised: Ratio,
    /// Physical memory that stays free, bytes.
    pub reserve: Bytes,
    /// When silence becomes death, ns.
    pub stale_ns: u64,
    /// What may enter after that, bytes; never more than would have fit by the last reading.
    pub budget: Bytes,
    /// What the balloon takes or gives at a time.
    pub balloon_step: FrameCount,
}

impl Settings {
    /// The defaults: the reserve is the worst burst, and the budget of writes of a dead device is as much.
    ///
    /// ```
    /// use spmem_core::{compressed::{Burst, Ratio, Settings}, units::Bytes};
    /// let burst = Burst::Software { transactions: 64, most: Bytes(3072) };
    /// assert_eq!(Settings::new(Ratio(3000), burst).reserve, burst.worst());
    /// ```
    pub const fn new(advertised: Ratio, burst: Burst) -> Self {
        let reserve = burst.worst();
        Self { advertised, reserve, stale_ns: STALE_NS, budget: reserve, balloon_step: BALLOON_STEP }
    }
}
