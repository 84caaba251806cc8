//! Why a page does not enter a compressed node.

use core::fmt;

use super::gates::Gate;
use super::reserve::Room;
use crate::units::{Bytes, Time};

/// Why a page does not enter. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotAdmitted {
    /// A gate is shut.
    Gate(Gate),
    /// The device has never said what it has.
    Unheard,
    /// The device says nothing new.
    Dead {
        /// Since when.
        since: Time,
        /// What may still enter.
        budget: Bytes,
    },
    /// It would go to the reserve (R18).
    Reserve {
        /// What there is.
        room: Room,
        /// What was to enter.
        wanted: Bytes,
    },
}

impl NotAdmitted {
    /// Whether waiting may help: what shrinks or is emptied will be done with that, and what has entered may turn out smaller
    /// once it is measured. The owner of a node may keep it shut for ever.
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Gate(gate) => !matches!(gate, Gate::Allocation),
            Self::Unheard | Self::Dead { .. } => false,
            Self::Reserve { room, .. } => room.unmeasured.0 > 0,
        }
    }
}

impl fmt::Display for NotAdmitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gate(gate) => write!(f, "the node is {gate}"),
            Self::Unheard => f.write_str("the device has not said yet what it has"),
            Self::Dead { since, budget } => {
                write!(f, "the device has said nothing new since {} ns; {budget} may still enter", since.0)
            }
            Self::Reserve { room, wanted } => write!(
                f,
                "{wanted} wanted of {}: {} in use, {} not measured yet, {} reserved",
                room.capacity, room.used, room.unmeasured, room.reserve
            ),
        }
    }
}

impl core::error::Error for NotAdmitted {}
