//! The reserve: what must stay free because it may be in use already, and nobody knows yet (docs/compressed.md).

use super::settings::EASE_SHARE;
use crate::reclaim::{BATCH_PAGES, MAX_RECLAIMERS};
use crate::units::{Bytes, PAGE_SIZE};

/// Pages that a process of a tree may store between two looks at what all have stored: a batch of each reclaimer.
pub const OPEN_TRANSACTIONS: u64 = BATCH_PAGES * MAX_RECLAIMERS as u64;
/// The reserve of a store that processes share is at most this part of it: nothing is lost where it is too small, only a limit
/// is kept less exactly.
const SHARED_RESERVE_SHARE: u64 = 8;

/// What may be written to a node without being seen in its measure, at worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Burst {
    /// A device: lines wait in caches, and each can make the granule in which it lies incompressible.
    Device {
        /// Lines that can wait at a time, the processors' caches included where they hold lines of the node.
        dirty_lines: u64,
        /// What is compressed as one, bytes uncompressed.
        granule: Bytes,
    },
    /// Software: what others have stored since they last said how much they have.
    Software {
        /// Pages that can be between the look and the store.
        transactions: u64,
        /// What one takes at most, bytes.
        most: Bytes,
    },
}

impl Burst {
    /// The worst burst, bytes of physical memory.
    ///
    /// ```
    /// use spmem_core::{compressed::Burst, units::Bytes};
    /// let device = Burst::Device { dirty_lines: 4096, granule: Bytes(1024) };
    /// assert_eq!(device.worst(), Bytes::mib(4));
    /// ```
    pub const fn worst(&self) -> Bytes {
        let (count, each) = match *self {
            Self::Device { dirty_lines, granule } => (dirty_lines, granule),
            Self::Software { transactions, most } => (transactions, most),
        };
        Bytes(count.saturating_mul(each.0))
    }
}

/// Physical memory: what there is, and what is spoken for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// There is.
    pub capacity: Bytes,
    /// Measured to be in use.
    pub used: Bytes,
    /// Entered since, or about to: counts in full.
    pub unmeasured: Bytes,
    /// Kept free for what the measure does not show yet.
    pub reserve: Bytes,
}

impl Room {
    /// The room in a store that the processes of a tree fill together: `stored` by all; 0 processes counts as 1. What the
    /// others may have stored since they said so is the reserve.
    pub fn shared(stored: Bytes, capacity: Bytes, processes: u32) -> Self {
        let others = u64::from(processes.saturating_sub(1));
        let transactions = others.saturating_mul(OPEN_TRANSACTIONS);
        let burst = Burst::Software { transactions, most: Bytes(PAGE_SIZE) };
        let reserve = burst.worst().0.min(capacity.0 / SHARED_RESERVE_SHARE);
        Self { capacity, used: stored, unmeasured: Bytes(0), reserve: Bytes(reserve) }
    }

    /// Whether a process that has stored `own` of it may store no more. Who is alone there is told by its own frames, which
    /// know better: a page may fit into what is free of them.
    pub fn is_full_for(&self, own: Bytes) -> bool {
        self.used != own && !self.holds(Bytes(PAGE_SIZE))
    }

    /// How near the reserve is: 0 with an eighth of the capacity ([`EASE_SHARE`]) or more above it, 1000 at it.
    pub fn pressure(&self) -> u16 {
        let ease = (self.capacity.0 / EASE_SHARE).max(1);
        let left = self.left().0.min(ease);
        u16::try_from(u128::from(ease - left) * 1000 / u128::from(ease)).unwrap_or(1000)
    }

    /// What may still enter, whatever it compresses to.
    pub const fn left(&self) -> Bytes {
        let spoken_for = self.used.0.saturating_add(self.unmeasured.0).saturating_add(self.reserve.0);
        Bytes(self.capacity.0.saturating_sub(spoken_for))
    }

    /// Whether so much more may enter (R18): the one decision for devices and for software.
    ///
    /// ```
    /// use spmem_core::{compressed::Room, units::Bytes};
    /// let room = Room { capacity: Bytes(100), used: Bytes(50), unmeasured: Bytes(20), reserve: Bytes(10) };
    /// assert!(room.holds(Bytes(20)) && !room.holds(Bytes(21)));
    /// ```
    pub const fn holds(&self, bytes: Bytes) -> bool {
        bytes.0 <= self.left().0
    }
}
