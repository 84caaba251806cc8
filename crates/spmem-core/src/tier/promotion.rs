//! Promotion: which hot pages come up, and how fast (the kernel's `numa_balancing` in its tiering mode).
//!
//! [`Promotion::consider`] is asked about each page that was just used and how long ago it was used before that. It
//! comes up when that is short (the threshold) and when the rate allows (a token bucket). The threshold follows the
//! rate as in the kernel's `numa_promotion_adjust_threshold`: where more candidates come than the rate lets up it
//! falls, so that what comes up is the hottest, and where fewer come it rises. Where it comes up to is
//! [`plan_promotion`](crate::mm::MemoryManager::plan_promotion)'s business, and whether its node offers that (R15).
//!
//! An interface for components whose memory programs read where it is, and which learn of uses by sampling or faults. A run
//! does not ask: a page of node 1 is never mapped (R17), so who touches one waits until it has come up.
//!
//! Hole: a block larger than what may come up in a second never does.

use crate::units::{Bytes, Order, Time};

/// The threshold at first: used twice within a second is hot.
const THRESHOLD_NS: u64 = 1_000_000_000;
/// The threshold changes by this.
const STEP_NS: u64 = THRESHOLD_NS / 8;
/// The threshold is never higher.
const THRESHOLD_MAX_NS: u64 = 2 * THRESHOLD_NS;
/// How often the threshold changes, ns.
const PERIOD_NS: u64 = 10_000_000_000;
const SECOND_NS: u128 = 1_000_000_000;

/// Whether a page comes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It does, and its bytes are taken off the rate.
    Promote,
    /// It is not used often enough.
    Cold,
    /// It is hot, but others came first.
    OverRate,
}

/// The promotion from one node.
///
/// ```
/// use spmem_core::{tier::{Promotion, Verdict}, units::{Bytes, Order, Time}};
/// let mut promotion = Promotion::new(Bytes(4096), Time(0));
/// assert_eq!(promotion.consider(Order::ZERO, 5_000_000_000, Time(0)), Verdict::Cold);
/// assert_eq!(promotion.consider(Order::ZERO, 1_000, Time(0)), Verdict::Promote);
/// assert_eq!(promotion.consider(Order::ZERO, 1_000, Time(0)), Verdict::OverRate);
/// assert_eq!(promotion.consider(Order::ZERO, 1_000, Time(1_000_000_000)), Verdict::Promote);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Promotion {
    rate: Bytes,
    /// What may come up now; at most what comes up in a second.
    left: Bytes,
    filled: Time,
    threshold_ns: u64,
    /// Bytes that were hot enough in this period.
    candidates: Bytes,
    period: Time,
}

impl Promotion {
    /// At most `rate` bytes a second.
    pub const fn new(rate: Bytes, now: Time) -> Self {
        let (left, candidates) = (rate, Bytes(0));
        Self { rate, left, filled: now, threshold_ns: THRESHOLD_NS, candidates, period: now }
    }

    /// A page used again after this long, or sooner, is hot, ns.
    pub const fn threshold_ns(&self) -> u64 {
        self.threshold_ns
    }

    /// Whether a page that was used now and `since_use_ns` before comes up.
    pub fn consider(&mut self, order: Order, since_use_ns: u64, now: Time) -> Verdict {
        self.adjust(now);
        if since_use_ns > self.threshold_ns {
            return Verdict::Cold;
        }
        self.candidates.0 = self.candidates.0.saturating_add(order.bytes().0);
        self.fill(now);
        if self.left.0 < order.bytes().0 {
            return Verdict::OverRate;
        }
        self.left.0 -= order.bytes().0;
        Verdict::Promote
    }

    fn fill(&mut self, now: Time) {
        let gained = u128::from(self.rate.0) * u128::from(now.since(self.filled)) / SECOND_NS;
        // Time that brought less than a byte counts on: it is filled up to when the last whole one had come.
        if gained > 0 {
            let took = (gained * SECOND_NS).div_ceil(u128::from(self.rate.0));
            self.filled = self.filled.after(u64::try_from(took).unwrap_or(u64::MAX));
            let gained = u64::try_from(gained).unwrap_or(u64::MAX);
            self.left.0 = self.left.0.saturating_add(gained).min(self.rate.0);
        }
    }

    fn adjust(&mut self, now: Time) {
        let passed = now.since(self.period);
        if passed < PERIOD_NS {
            return;
        }
        let meant = u128::from(self.rate.0) * u128::from(passed) / SECOND_NS;
        let came = u128::from(self.candidates.0);
        if came * 10 > meant * 11 {
            self.threshold_ns = self.threshold_ns.saturating_sub(STEP_NS).max(STEP_NS);
        } else if came * 10 < meant * 9 {
            self.threshold_ns = (self.threshold_ns + STEP_NS).min(THRESHOLD_MAX_NS);
        }
        (self.candidates, self.period) = (Bytes(0), now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_however_it_is_asked_for() {
        let mut promotion = Promotion::new(Bytes(1 << 20), Time(0));
        let mut up = 0_u64;
        for ms in 0..9_000_u64 {
            while promotion.consider(Order::ZERO, 0, Time(ms * 1_000_000)) == Verdict::Promote {
                up += 4096;
            }
        }
        assert!((9 << 20..=10 << 20).contains(&up), "{up}: nine seconds, and one that was saved up");
    }

    #[test]
    fn a_rate_is_kept_to_the_byte_however_often_it_is_asked_for() {
        const SECOND: u64 = 1_000_000_000;
        let (rate, start) = (Bytes(1 << 20), 10 * SECOND);
        for every_ns in [100, 953, 954, 1907, 1_000_000] {
            let mut promotion = Promotion::new(rate, Time(start));
            // What was saved up comes up at once.
            while promotion.consider(Order::ZERO, 0, Time(start)) == Verdict::Promote {}
            let mut up = 0_u64;
            for at in (start..start + 2 * SECOND).step_by(every_ns) {
                up += u64::from(promotion.consider(Order::ZERO, 0, Time(at)) == Verdict::Promote) * 4096;
            }
            let most = 2 * rate.0;
            assert!((most - 2 * 4096..=most).contains(&up), "asked every {every_ns} ns: {up} of {most}");
        }
    }

    #[test]
    fn the_threshold_is_the_kernels_step_by_step() {
        // As `numa_promotion_adjust_threshold`: a sixteenth of twice the first one at a time, between that and twice it.
        const SECOND: u64 = 1_000_000_000;
        let rate = Bytes(1000 * 4096);
        let step = SECOND / 8;
        let mut promotion = Promotion::new(rate, Time(0));
        let (mut expected, mut now) = (SECOND, 0);
        let mut period = |pages_a_second: u64, passed: u64| {
            // What is just hot is a candidate, what is used a moment later is none; whether it comes up does not matter.
            for _ in 0..pages_a_second * passed / SECOND {
                assert_ne!(promotion.consider(Order::ZERO, promotion.threshold_ns(), Time(now)), Verdict::Cold);
                let cold = promotion.threshold_ns() + 1;
                assert_eq!(promotion.consider(Order::ZERO, cold, Time(now)), Verdict::Cold);
            }
            now += passed;
            // One that never counts: it only shows the time.
            assert_eq!(promotion.consider(Order::ZERO, u64::MAX, Time(now)), Verdict::Cold);
            promotion.threshold_ns()
        };
        for (pages_a_second, passed, change) in [
            (1000, 10 * SECOND, 0),
            (1100, 10 * SECOND, 0),
            (900, 10 * SECOND, 0),
            (1101, 10 * SECOND, -1_i64),
            (899, 10 * SECOND, 1),
            (5000, 10 * SECOND - 1, 0), // it is not yet time
            (0, 1, -1),                 // now it is: what came before counts
            (1101, 20 * SECOND, -1),    // by the time that has passed
            (1000, 30 * SECOND, 0),
        ] {
            expected = expected.saturating_add_signed(change * 125_000_000);
            assert_eq!(period(pages_a_second, passed), expected, "{pages_a_second} a second");
        }
        for _ in 0..20 {
            expected = (expected - step).max(step);
            assert_eq!(period(2000, 10 * SECOND), expected);
        }
        assert_eq!(expected, step);
        for _ in 0..20 {
            expected = (expected + step).min(2 * SECOND);
            assert_eq!(period(0, 10 * SECOND), expected);
        }
        assert_eq!(expected, 2 * SECOND);
    }
}
