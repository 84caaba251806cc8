//! Following: on which processor the thread runs that serves faults.
//!
//! A thread that waits for its page leaves its processor idle: who serves it there wakes no other. With faults on several
//! processors in turn there is no such place. Pure; takes no lock. Called by the runtime's fault line.

/// Every so many faults one is looked at, ...
const EVERY: u32 = 32;
/// ... and so many once the thread is bound: a look opens a file, and faults rarely move.
const EVERY_BOUND: u32 = 256;
/// Looks in a row that have to agree.
const AGREED: u32 = 4;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// Run on this processor only.
    Bind(usize),
    /// Run on any.
    LetGo,
}

/// Where faults came from lately.
///
/// ```
/// use spmem_core::reclaim::{Follow, Following};
/// let mut following = Following::default();
/// assert!(!following.is_due(), "not every fault is looked at");
/// let looks: Vec<_> = (0..5).map(|_| following.note(3)).collect();
/// assert_eq!(looks, [None, None, None, None, Some(Follow::Bind(3))]);
/// assert_eq!((following.note(3), following.note(1)), (None, Some(Follow::LetGo)));
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Following {
    /// Since the last look.
    faults: u32,
    last: usize,
    /// Looks in a row that found `last`, but for the first.
    row: u32,
    bound: Option<usize>,
}

impl Following {
    /// Where the thread is bound to, if it is.
    pub const fn bound(&self) -> Option<usize> {
        self.bound
    }

    /// A thread faults; whether to look on which processor ([`Following::note`]).
    pub const fn is_due(&mut self) -> bool {
        self.faults = self.faults.saturating_add(1);
        let every = if self.bound.is_some() { EVERY_BOUND } else { EVERY };
        let is_due = self.faults >= every;
        if is_due {
            self.faults = 0;
        }
        is_due
    }

    /// It faulted on this one.
    pub fn note(&mut self, cpu: usize) -> Option<Follow> {
        self.row = if cpu == self.last { self.row + 1 } else { 0 };
        self.last = cpu;
        if self.bound.is_some_and(|bound| bound != cpu) {
            self.bound = None;
            Some(Follow::LetGo)
        } else if self.bound.is_none() && self.row >= AGREED {
            self.bound = Some(cpu);
            Some(Follow::Bind(cpu))
        } else {
            None
        }
    }

    /// The thread could not be bound.
    pub const fn let_go(&mut self) {
        self.bound = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Faults until one is looked at.
    fn until_due(following: &mut Following) -> u32 {
        (1..).find(|_| following.is_due()).unwrap()
    }

    #[test]
    fn faults_of_one_processor_bind_and_are_then_looked_at_less_often() {
        let mut following = Following::default();
        assert_eq!(until_due(&mut following), EVERY);
        assert_eq!((0..=AGREED).filter_map(|_| following.note(7)).next_back(), Some(Follow::Bind(7)));
        assert_eq!((following.bound(), until_due(&mut following)), (Some(7), EVERY_BOUND));
        assert_eq!(following.note(7), None);
        assert_eq!(following.note(2), Some(Follow::LetGo));
        assert_eq!((following.bound(), until_due(&mut following)), (None, EVERY));
    }

    #[test]
    fn faults_of_several_processors_in_turn_bind_nowhere() {
        let mut following = Following::default();
        assert!((0..1000).all(|look| following.note(look / 3 % 2 + 1).is_none()));
    }

    #[test]
    fn who_cannot_be_bound_is_tried_again() {
        let mut following = Following::default();
        let bound = (0..=AGREED).filter_map(|_| following.note(1)).next_back();
        assert_eq!(bound, Some(Follow::Bind(1)));
        following.let_go();
        assert_eq!(following.note(1), Some(Follow::Bind(1)));
    }
}
