//! Deferral: how often compaction is not even tried, after it failed (the kernel's `defer_compaction`).

use crate::units::Order;

/// Requests are turned away for at most 2 to this power tries (`COMPACT_MAX_DEFER_SHIFT`).
const DEFER_SHIFT_MAX: u32 = 6;

/// Back-off: after each failure for an order twice as many tries for it, or a larger one, are turned away.
///
/// ```
/// use spmem_core::{compact::Deferral, units::Order};
/// let mut deferral = Deferral::default();
/// assert!(!deferral.is_deferred(Order::HUGE));
/// deferral.on_failure(Order::HUGE);
/// assert!(deferral.is_deferred(Order::HUGE) && !deferral.is_deferred(Order::ZERO));
/// assert!(!deferral.is_deferred(Order::HUGE)); // the second try goes through
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deferral {
    /// The smallest order that failed.
    failed: Option<Order>,
    shift: u32,
    tries: u32,
}

impl Deferral {
    /// Whether this try is turned away; counts it.
    pub fn is_deferred(&mut self, order: Order) -> bool {
        if self.failed.is_none_or(|failed| order < failed) {
            return false;
        }
        self.tries = (self.tries + 1).min(1 << self.shift);
        self.tries < 1 << self.shift
    }

    /// A run ended without a block of the order.
    pub fn on_failure(&mut self, order: Order) {
        self.failed = Some(self.failed.map_or(order, |failed| failed.min(order)));
        self.shift = (self.shift + 1).min(DEFER_SHIFT_MAX);
        self.tries = 0;
    }

    /// A block of the order was allocated: smaller ones will do too.
    pub fn on_success(&mut self, order: Order) {
        (self.shift, self.tries) = (0, 0);
        if self.failed.is_some_and(|failed| order >= failed) {
            self.failed = Order::new(order.get() + 1).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_as_many_tries_are_turned_away_after_each_failure_up_to_a_limit_and_none_after_a_success() {
        let mut deferral = Deferral::default();
        for failures in 1..10_u32 {
            deferral.on_failure(Order::HUGE);
            let turned_away = (0..).take_while(|_| deferral.is_deferred(Order::HUGE)).count();
            assert_eq!(turned_away, (1 << failures.min(DEFER_SHIFT_MAX)) - 1);
            assert!(!deferral.is_deferred(Order::ZERO), "smaller ones are tried");
        }
        deferral.on_success(Order::HUGE);
        assert!(!deferral.is_deferred(Order::HUGE));
    }
}
