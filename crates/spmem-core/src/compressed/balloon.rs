//! The balloon: frames of a compressed node that there is no memory for are taken out of use.
//!
//! A node of `perceived` frames promises the ratio `advertised`. At a lower one it has too many; the balloon holds
//! `perceived x (advertised - ratio) / advertised` of them, a step at a time. Holding a frame takes no memory: nothing is
//! written to it. The latest target wins, also in the middle of a change.

use super::telemetry::Ratio;
use crate::units::{FrameCount, PAGE_SIZE};

/// What the balloon takes or gives at a time: 8 MiB.
pub const BALLOON_STEP: FrameCount = FrameCount((8 << 20) / PAGE_SIZE);

/// How many frames are held, and are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balloon {
    step: FrameCount,
    target: FrameCount,
    held: FrameCount,
}

/// What the balloon does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing: it holds what it is to hold.
    Stay,
    /// It takes so many frames more.
    Take(FrameCount),
    /// It gives so many back.
    Give(FrameCount),
}

impl Balloon {
    /// An empty balloon that changes by so many frames at a time, at least one.
    pub const fn new(step: FrameCount) -> Self {
        let step = FrameCount(if step.0 == 0 { 1 } else { step.0 });
        Self { step, target: FrameCount(0), held: FrameCount(0) }
    }

    /// How many of `perceived` frames have no memory behind them at `ratio`, rounded down: no page has to leave for it.
    ///
    /// ```
    /// use spmem_core::{compressed::{Balloon, Ratio}, units::FrameCount};
    /// let target = |ratio| Balloon::target(FrameCount(3000), Ratio(ratio), Ratio(3000)).0;
    /// assert_eq!([3500, 3000, 2000, 1000].map(target), [0, 0, 1000, 2000]);
    /// ```
    pub fn target(perceived: FrameCount, ratio: Ratio, advertised: Ratio) -> FrameCount {
        let short = advertised.0.saturating_sub(ratio.0);
        let frames = (u128::from(perceived.0) * u128::from(short)).checked_div(u128::from(advertised.0));
        FrameCount(frames.and_then(|frames| u64::try_from(frames).ok()).unwrap_or(0))
    }

    /// Sets what it is to hold; the latest word counts.
    pub const fn aim(&mut self, target: FrameCount) {
        self.target = target;
    }

    /// The next step towards the target.
    pub fn next(&self) -> Change {
        let (held, target) = (self.held.0, self.target.0);
        if held < target {
            Change::Take(FrameCount((target - held).min(self.step.0)))
        } else if held > target {
            Change::Give(FrameCount((held - target).min(self.step.0)))
        } else {
            Change::Stay
        }
    }

    /// It has taken so many frames.
    pub const fn took(&mut self, frames: FrameCount) {
        self.held.0 += frames.0;
    }

    /// It has given back so many.
    ///
    /// # Panics
    /// When it did not hold them.
    pub const fn gave(&mut self, frames: FrameCount) {
        assert!(frames.0 <= self.held.0, "a balloon gives back what it holds");
        self.held.0 -= frames.0;
    }

    /// Frames it holds.
    pub const fn held(&self) -> FrameCount {
        self.held
    }

    /// Frames it is to hold.
    pub const fn aimed_at(&self) -> FrameCount {
        self.target
    }
}
