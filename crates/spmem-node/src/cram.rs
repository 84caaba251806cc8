//! Compressed RAM of a device: the component that keeps byte-addressable memory that compresses from being overrun.
//!
//! [`Cram`] owns such a node and the pages of the programs on it. Pages enter by demotion only, and lie there read-only (R17):
//! a write moves the page to sysram *first*, so that what lies on the device never grows by itself. Whether one more may enter
//! is `spmem_core::compressed`'s decision (R18), from what the device says ([`Telemetry`]) and a reserve for what it has not
//! compressed yet. What does not compress is not demoted where the device tells (R19). Damage reaches the owner of the page only,
//! by name ([`Hurt`], R20).
//!
//! **No writer waits for ever.** Every program has a limit of sysram frames, all limits together are no more than there are, and
//! no program goes beyond its own. So whoever is below his limit gets a frame at once. At it, a page of his own has to leave;
//! where that cannot be decided yet he waits ([`Denied::Wait`]), in the order of arrival, until the device has been heard again,
//! or is dead, or the balloon has converged or stalled, or a teardown is over: each takes a bounded time. Otherwise he sees
//! [`Denied::OverLimit`], and the page is as it was.
//!
//! One straight line a call: `write` -> `room.rs` (a frame, or who must go) -> `component.rs` (demote, promote); `poll` ->
//! `poll.rs` (notices, reading, plan, balloon); `teardown.rs`.
//!
//! Used by nothing that ships yet: there is no such device in a stock kernel. Proved on the device of `model` (feature `model`),
//! by tests/compressed_device. Takes no lock: `&mut self` is the caller's.
//!
//! Holes: sysram pages are boxes on the heap, which must not fail. A program's pages are looked through one by one for what
//! can leave, in the order of their use; what comes back from the device because it is short comes in the order of frames.

mod component;
mod error;
mod poll;
mod room;
mod teardown;

use spmem_core::compressed::{Burst, Ratio, Reading};
use spmem_core::units::{Bytes, DomainId};

use crate::backend::Page;

pub use self::component::{Cram, Usage};
pub use self::error::{Denied, Hurt, SetupRefused, Ticket, Why};
pub use self::poll::MAX_NOTICES;
pub use self::teardown::{COPY_BATCH, Emptying};

/// Of a page that takes more on the device, in thousandths, there is nothing to gain: it does not enter (R19).
pub const UNFIT_ABOVE_PER_MILLE: u64 = 875;

/// What a device that compresses tells. All of it may be late, missing or wrong; nothing is lost by that.
pub trait Telemetry {
    /// Its physical memory now; `None` when it does not answer.
    fn reading(&self) -> Option<Reading>;

    /// What may have been written to it and not be in the reading, at worst.
    fn burst(&self) -> Burst;

    /// The ratio that the number of its frames promises.
    fn advertised(&self) -> Ratio;

    /// What a page would take; `None` where the device does not tell. A hint: pages count in full until they are measured.
    fn weigh(&self, page: &Page) -> Option<Bytes>;

    /// The next notice it has sent. Notices may be lost, or come without a reason.
    fn take_notice(&self) -> Option<Notice>;
}

/// What a device says by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// It has little memory left.
    Low,
    /// It has enough again.
    High,
    /// What is at this offset is lost.
    Poison {
        /// From the first byte of the node.
        offset: u64,
    },
}

/// A page of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageId {
    /// The program.
    pub owner: DomainId,
    /// Where the program has it: a multiple of 4096.
    pub address: u64,
}
