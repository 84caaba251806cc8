//! Watermarks: when is a node short of frames?
//!
//! [`Watermarks::observe`] turns a free count into a [`Pressure`]; allocation refuses to go below `min` unless the
//! request may use the reserve, and the pressure loop starts at `low` and stops at `high`, as in the kernel's kswapd.
//! A *boost* raises low and high for a while, so that reclaim frees more than it otherwise would: after a large block was not
//! to be had although there were frames (mm/page_alloc.c, boost_watermark). What reclaim frees pays it off. Takes no lock.

use core::fmt;

use crate::units::{FrameCount, Order};

/// Free frames below which something happens; always `min <= low <= high`. All zero (the default) asks for nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watermarks {
    min: FrameCount,
    low: FrameCount,
    high: FrameCount,
    boost: FrameCount,
}

/// The boost is at most so many thousandths of high (`watermark_boost_factor`, 150 %).
pub const BOOST_MAX_PER_MILLE: u64 = 1500;

/// How short a node is, mildest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// `high` or more free: reclaim stops.
    None,
    /// Between `low` and `high`: reclaim that runs goes on, none is started.
    Easing,
    /// Below `low`: reclaim starts.
    Short,
    /// Below `min`: what is left is the reserve.
    Critical,
}

/// Why watermarks are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatermarkError {
    /// They must rise: `min <= low <= high`.
    NotRising {
        /// As given.
        min: FrameCount,
        /// As given.
        low: FrameCount,
        /// As given.
        high: FrameCount,
    },
}

impl fmt::Display for WatermarkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::NotRising { min, low, high } = self;
        write!(f, "watermarks must rise, min <= low <= high, but are {min}, {low}, {high} frames")
    }
}

impl core::error::Error for WatermarkError {}

impl Watermarks {
    /// Watermarks in frames.
    ///
    /// # Errors
    /// [`WatermarkError::NotRising`] unless `min <= low <= high`.
    ///
    /// ```
    /// use spmem_core::{units::FrameCount, watermark::{Pressure, Watermarks}};
    /// let marks = Watermarks::new(FrameCount(10), FrameCount(20), FrameCount(30)).unwrap();
    /// assert_eq!(marks.observe(FrameCount(30)), Pressure::None);
    /// assert_eq!(marks.observe(FrameCount(19)), Pressure::Short);
    /// assert!(Watermarks::new(FrameCount(2), FrameCount(1), FrameCount(3)).is_err());
    /// ```
    pub const fn new(min: FrameCount, low: FrameCount, high: FrameCount) -> Result<Self, WatermarkError> {
        if min.0 <= low.0 && low.0 <= high.0 {
            Ok(Self { min, low, high, boost: FrameCount(0) })
        } else {
            Err(WatermarkError::NotRising { min, low, high })
        }
    }

    /// How short a node with `free` free frames is.
    pub const fn observe(&self, free: FrameCount) -> Pressure {
        if free.0 >= self.high().0 {
            Pressure::None
        } else if free.0 >= self.low().0 {
            Pressure::Easing
        } else if free.0 >= self.min.0 {
            Pressure::Short
        } else {
            Pressure::Critical
        }
    }

    /// How short the node is for a request of `order`, given its largest free block (the kernel's `__zone_watermark_ok`):
    /// what the block takes beyond one frame does not count as free, and without such a block the node is short.
    ///
    /// ```
    /// use spmem_core::{units::{FrameCount, Order}, watermark::{Pressure, Watermarks}};
    /// let marks = Watermarks::new(FrameCount(10), FrameCount(20), FrameCount(30)).unwrap();
    /// let largest = Order::new(2).ok();
    /// assert_eq!(marks.observe_order(FrameCount(100), Order::ZERO, largest), Pressure::None);
    /// assert_eq!(marks.observe_order(FrameCount(100), Order::HUGE, largest), Pressure::Critical);
    /// ```
    pub fn observe_order(&self, free: FrameCount, order: Order, largest: Option<Order>) -> Pressure {
        let pressure = self.observe(FrameCount(free.0.saturating_sub(order.frames().0 - 1)));
        let has_block = largest.is_some_and(|largest| largest >= order);
        if has_block || order == Order::ZERO { pressure } else { pressure.max(Pressure::Short) }
    }

    /// The reserve: frames that only a request with [`Reserve::Use`](crate::wall::Reserve::Use) may take.
    pub const fn min(&self) -> FrameCount {
        self.min
    }

    /// Where reclaim starts, the boost included.
    pub const fn low(&self) -> FrameCount {
        FrameCount(self.low.0.saturating_add(self.boost.0))
    }

    /// Where reclaim stops, the boost included.
    pub const fn high(&self) -> FrameCount {
        FrameCount(self.high.0.saturating_add(self.boost.0))
    }

    /// Raises low and high by so many frames more, up to [`BOOST_MAX_PER_MILLE`] of high. Without a high mark nothing
    /// happens: then nobody reclaims.
    ///
    /// ```
    /// use spmem_core::{units::FrameCount, watermark::Watermarks};
    /// let mut marks = Watermarks::new(FrameCount(10), FrameCount(20), FrameCount(30)).unwrap();
    /// marks.boost(FrameCount(1000));
    /// assert_eq!((marks.min(), marks.high()), (FrameCount(10), FrameCount(75)));
    /// marks.pay_off(FrameCount(40));
    /// assert_eq!(marks.high(), FrameCount(35));
    /// ```
    pub const fn boost(&mut self, by: FrameCount) {
        let most = self.high.0.saturating_mul(BOOST_MAX_PER_MILLE) / 1000;
        let boost = self.boost.0.saturating_add(by.0);
        self.boost = FrameCount(if boost < most { boost } else { most });
    }

    /// Reclaim has freed so many frames: the boost is less by as much.
    pub const fn pay_off(&mut self, freed: FrameCount) {
        self.boost = FrameCount(self.boost.0.saturating_sub(freed.0));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pressure_never_eases_as_frames_run_out(mut marks in prop::array::uniform3(0u64..100), free in 0u64..200) {
            marks.sort_unstable();
            let [min, low, high] = marks.map(FrameCount);
            let marks = Watermarks::new(min, low, high).unwrap();
            prop_assert!(marks.observe(FrameCount(free)) >= marks.observe(FrameCount(free + 1)));
            prop_assert_eq!(marks.observe(FrameCount(free)) == Pressure::Critical, free < min.0);
            prop_assert_eq!(marks.observe(FrameCount(free)) == Pressure::None, free >= high.0);
        }
    }
}
