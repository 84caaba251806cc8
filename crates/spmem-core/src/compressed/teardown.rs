//! Teardown: a node is emptied whole, or is as before.
//!
//! The pages are copied where they go first, all of them; only then are the copies made theirs. Whatever stops that (no room,
//! a crash, somebody who gives up), the copies are dropped and nothing has happened. It is tried again a few times.

use super::gates::{Gates, IsSet, Key, TearingDown};
use crate::units::{FrameCount, Time};

/// How often it is tried before it is called off.
pub const TEARDOWN_ATTEMPTS: u32 = 5;
/// Rest between two attempts, ns: a tenth of a second, doubled each time.
pub const RETRY_NS: u64 = 100_000_000;

/// A teardown under way; it holds the gate.
#[derive(Debug)]
#[must_use = "a dropped one leaves the gate shut"]
pub struct Teardown {
    key: Key<TearingDown>,
    attempts: u32,
    next: Time,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Nothing lies there: the node can go.
    Complete,
    /// There is room for all: copy them.
    Copy(FrameCount),
    /// Not before this time.
    Wait(Time),
    /// It was tried often enough: call it off.
    GiveUp,
}

impl Teardown {
    /// Begins one: nothing enters any more.
    ///
    /// # Errors
    /// [`IsSet`] while another is under way.
    pub fn begin(gates: &mut Gates) -> Result<Self, IsSet> {
        Ok(Self { key: gates.set()?, attempts: 0, next: Time(0) })
    }

    /// What to do, with so many frames on the node and room for so many where they go.
    pub fn attempt(&mut self, now: Time, there: FrameCount, room: FrameCount) -> Attempt {
        if there.0 == 0 {
            return Attempt::Complete;
        }
        if now < self.next {
            return Attempt::Wait(self.next);
        }
        if self.attempts == TEARDOWN_ATTEMPTS {
            return Attempt::GiveUp;
        }
        self.next = now.after(RETRY_NS << self.attempts);
        self.attempts += 1;
        if room.0 < there.0 { Attempt::Wait(self.next) } else { Attempt::Copy(there) }
    }

    /// Ends it, whether the node is empty or stays: what was shut by it is open again.
    ///
    /// # Errors
    /// Itself, when it is another node's.
    pub fn end(self, gates: &mut Gates) -> Result<(), Self> {
        let (attempts, next) = (self.attempts, self.next);
        gates.clear(self.key).map_err(|key| Self { key, attempts, next })
    }
}
