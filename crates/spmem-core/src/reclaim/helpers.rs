//! Helpers: how many threads of a process reclaim, and when those beside the first work.
//!
//! Demotion is mostly encoding. Where another process encodes, a further thread here would only be one more processor to
//! be interrupted whenever a page leaves; where the program waits for memory and nobody else encodes, its processors are
//! free to. Called by the runtime.

/// Most threads of a process that reclaim.
pub const MAX_RECLAIMERS: usize = 8;
/// How long a helper that found nothing to demote rests, ns.
pub const HELPER_REST_NS: u64 = 1_000_000;

/// How many threads reclaim on so many processors: one on each, up to [`MAX_RECLAIMERS`].
///
/// ```
/// use spmem_core::reclaim::{MAX_RECLAIMERS, reclaimers};
/// assert_eq!([0, 1, 3, 64].map(reclaimers), [1, 1, 3, MAX_RECLAIMERS]);
/// ```
#[inline]
pub const fn reclaimers(processors: usize) -> usize {
    match processors {
        0 => 1,
        1..MAX_RECLAIMERS => processors,
        _ => MAX_RECLAIMERS,
    }
}

/// What a helper knows.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Pages that may come in before growth waits: see [`Admission`](super::Admission).
    pub room_pages: i64,
    /// Nothing could leave for long: see [`Progress::is_stuck`](super::Progress::is_stuck).
    pub is_stuck: bool,
    /// Another process encodes for this one, ...
    pub has_encoder: bool,
    /// ... and owes an answer for long.
    pub is_encoder_late: bool,
}

impl Needs {
    /// Whether a helper is to demote.
    ///
    /// ```
    /// use spmem_core::reclaim::Needs;
    /// let waiting = Needs { room_pages: 0, is_stuck: false, has_encoder: false, is_encoder_late: false };
    /// assert!(waiting.help());
    /// assert!(!Needs { room_pages: 1, ..waiting }.help(), "the program has its processors for itself");
    /// assert!(!Needs { has_encoder: true, ..waiting }.help());
    /// ```
    #[inline]
    pub const fn help(self) -> bool {
        let is_needless = self.room_pages > 0 || self.is_stuck;
        let is_served = self.has_encoder && !self.is_encoder_late;
        !is_needless && !is_served
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helpers_work_only_while_growth_waits_for_what_they_can_do() {
        for bits in 0..16_u8 {
            let [has_room, is_stuck, has_encoder, is_encoder_late] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
            let needs = Needs { room_pages: i64::from(has_room), is_stuck, has_encoder, is_encoder_late };
            let expected = match (has_room, is_stuck) {
                (false, false) => !has_encoder || is_encoder_late,
                _ => false,
            };
            assert_eq!(needs.help(), expected, "{needs:?}");
        }
        let overdrawn = Needs { room_pages: -5, is_stuck: false, has_encoder: false, is_encoder_late: false };
        assert!(overdrawn.help());
    }
}
