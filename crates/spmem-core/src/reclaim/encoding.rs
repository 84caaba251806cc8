//! Encoding in another process: how long each side waits for the other.
//!
//! The encoder spins for the next pages while they keep coming, as a wake-up is dear to both sides ([`Spin`]); the process
//! waits for an answer for so long and then works by itself ([`answer_sleep_ns`]). Called by the runtime's encoder and
//! demotion.

/// Longest that the encoder spins for the next pages, ns: a wake-up costs both sides about a tenth of it. A processor that
/// is not idle also attracts no thread of the program away from the handler that serves it.
const SPIN_NS: u64 = 1_000_000;
/// Pages that come so many spins apart are still worth one.
const WORTH_SPINS: u64 = 4;
/// Who gives way for longer than this was not alone on the processor, ns: a call takes less than a microsecond.
const ALONE_NS: u64 = 50_000;
/// Sleeps, instead of spins, until the encoder tries again whether it is alone: at most so many, a power of two.
const MAX_SLEEPS: u32 = 256;
/// How often an encoder without work looks whether it is still wanted, ns.
pub const ENCODER_IDLE_NS: u64 = 500_000_000;
/// Longest that a process waits for an answer, ns.
const PATIENCE_NS: u64 = 50_000_000;
/// In so many parts: a wake-up may be lost with the encoder.
const LOOKS: u64 = 4;

/// How long the encoder spins where it has nothing to do.
#[derive(Clone, Debug)]
pub struct Spin {
    ns: u64,
    /// Sleeps that are left, as the processor is another's too.
    sleeps: u32,
    /// How many they were at first; 0: it was alone.
    last_sleeps: u32,
}

impl Default for Spin {
    fn default() -> Self {
        Self::new()
    }
}

impl Spin {
    /// Of an encoder that expects work.
    pub const fn new() -> Self {
        Self { ns: SPIN_NS, sleeps: 0, last_sleeps: 0 }
    }

    /// Whether to spin on, after so long.
    ///
    /// ```
    /// use spmem_core::reclaim::Spin;
    /// let mut spin = Spin::new();
    /// assert!(spin.goes_on(999_999) && !spin.goes_on(1_000_000));
    /// spin.woken(4_000_000);
    /// assert!(!spin.goes_on(0), "work does not keep coming");
    /// spin.woken(3_999_999);
    /// assert!(spin.goes_on(0));
    /// ```
    #[inline]
    pub const fn goes_on(&self, since_ns: u64) -> bool {
        self.sleeps == 0 && since_ns < self.ns
    }

    /// It gave way while it spun, and had its processor back after so long. Whoever is ready runs for some
    /// milliseconds then, however little he weighs; one who sleeps is put before him once woken. But a processor that
    /// falls idle attracts the program's threads. So it sleeps once instead of spinning, and each time that there is
    /// still somebody twice as often.
    ///
    /// ```
    /// use spmem_core::reclaim::Spin;
    /// let mut spin = Spin::new();
    /// spin.gave_way(50_000);
    /// assert!(spin.goes_on(0));
    /// for sleeps in [1, 2, 4, 8, 16, 32, 64, 128, 256, 256] {
    ///     spin.gave_way(50_001);
    ///     for _ in 0..sleeps {
    ///         assert!(!spin.goes_on(0), "not alone");
    ///         spin.woken(300_000);
    ///     }
    ///     assert!(spin.goes_on(0), "perhaps it is by now");
    /// }
    /// spin.gave_way(500);
    /// spin.gave_way(50_001);
    /// spin.woken(300_000);
    /// assert!(spin.goes_on(0), "whoever came now is gone");
    /// ```
    pub const fn gave_way(&mut self, took_ns: u64) {
        self.sleeps = match self.last_sleeps {
            _ if took_ns <= ALONE_NS => 0,
            0 => 1,
            MAX_SLEEPS => MAX_SLEEPS,
            sleeps => sleeps * 2,
        };
        self.last_sleeps = self.sleeps;
    }

    /// It slept, and was woken so long after it had begun to wait. Spinning pays only where work keeps
    /// coming.
    pub const fn woken(&mut self, waited_ns: u64) {
        self.sleeps = self.sleeps.saturating_sub(1);
        self.ns = if waited_ns < WORTH_SPINS * SPIN_NS { SPIN_NS } else { 0 };
    }
}

/// How long to sleep for an answer that was waited for so long, ns; `None` to wait no longer.
///
/// ```
/// use spmem_core::reclaim::answer_sleep_ns;
/// assert_eq!(answer_sleep_ns(0), Some(12_500_000));
/// assert_eq!(answer_sleep_ns(50_000_000), Some(12_500_000));
/// assert_eq!(answer_sleep_ns(50_000_001), None);
/// ```
#[inline]
pub const fn answer_sleep_ns(waited_ns: u64) -> Option<u64> {
    if waited_ns > PATIENCE_NS { None } else { Some(PATIENCE_NS / LOOKS) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_encoder_spins_again_as_soon_as_work_keeps_coming() {
        let mut spin = Spin::default();
        assert!(spin.goes_on(0));
        spin.woken(ENCODER_IDLE_NS);
        assert!(!spin.goes_on(0), "an idle encoder takes no processor");
        spin.woken(WORTH_SPINS * SPIN_NS - 1);
        assert!(spin.goes_on(SPIN_NS - 1) && !spin.goes_on(SPIN_NS));
    }

    #[test]
    fn nobody_waits_for_an_answer_for_ever() {
        let (mut waited, mut sleeps) = (0, 0);
        while let Some(ns) = answer_sleep_ns(waited) {
            (waited, sleeps) = (waited + ns, sleeps + 1);
        }
        assert_eq!((waited, sleeps), (PATIENCE_NS + PATIENCE_NS / LOOKS, LOOKS + 1));
    }
}
