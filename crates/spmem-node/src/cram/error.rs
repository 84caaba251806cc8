//! Why a read or a write is not done.

use core::fmt;

use spmem_core::compressed::NotAdmitted;
use spmem_core::domain::DomainError;
use spmem_core::units::{FrameCount, FrameNumber, NodeId};

use super::PageId;
use crate::backend::Damage;
use crate::compressed::SetupError;
use crate::mapped::Refused;

/// A page that is lost: who is hurt, and by what (R20).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hurt {
    /// The page: its owner and where he has it.
    pub page: PageId,
    /// The node it lay on.
    pub node: NodeId,
    /// Its frame there, out of use now.
    pub frame: Option<FrameNumber>,
    /// What was found.
    pub damage: Damage,
}

impl fmt::Display for Hurt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PageId { owner, address } = self.page;
        write!(f, "the page of program {owner} at {address:#x} is lost on node {}", self.node)?;
        if let Some(frame) = self.frame {
            write!(f, " frame {frame}")?;
        }
        write!(f, ": {:?}", self.damage)
    }
}

/// Whose turn it is among those of a program who wait. Show it when trying again, or give it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub(super) u64);

/// Why no page of a program that is at its limit can leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// None of its pages compresses (R19).
    Incompressible,
    /// The node takes nothing (R18).
    NotAdmitted(NotAdmitted),
    /// The node refused, for want of frames or because its grant has ended.
    Refused(Refused),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Incompressible => f.write_str("none of its pages compresses"),
            Self::NotAdmitted(cause) => cause.fmt(f),
            Self::Refused(cause) => cause.fmt(f),
        }
    }
}

/// Why a page is not read or written. It is as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// There is no such program.
    UnknownProgram,
    /// The program has no such page.
    NoPage,
    /// The bytes do not lie in a page.
    OutOfPage,
    /// Not now: poll, and try again with the ticket.
    Wait(Ticket),
    /// The program has all the sysram that it may, and none of its pages can leave.
    OverLimit {
        /// The page.
        page: PageId,
        /// Frames that its program may have.
        limit: FrameCount,
        /// Why none leaves.
        why: Why,
    },
    /// The page is lost (R20).
    Hurt(Hurt),
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownProgram => f.write_str("there is no such program"),
            Self::NoPage => f.write_str("the program has no page there"),
            Self::OutOfPage => f.write_str("the bytes do not lie in one page"),
            Self::Wait(_) => f.write_str("no frame now; wait"),
            Self::OverLimit { page, limit, why } => {
                write!(f, "program {} has all its {limit} frames of sysram in use: {why}", page.owner)
            }
            Self::Hurt(hurt) => hurt.fmt(f),
        }
    }
}

impl core::error::Error for Denied {}

/// Why a component or a program was not set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetupRefused {
    /// The memory manager refused.
    Node(SetupError),
    /// The limits of all programs together would exceed the sysram that there is.
    Limit {
        /// Asked for.
        wanted: FrameCount,
        /// What is left to promise.
        left: FrameCount,
    },
    /// A program cannot do without a frame.
    NoFrame,
    /// The program has no domain.
    Domain(DomainError),
}

impl fmt::Display for SetupRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(cause) => cause.fmt(f),
            Self::Limit { wanted, left } => write!(f, "{wanted} frames of sysram wanted, {left} left to promise"),
            Self::NoFrame => f.write_str("a program needs at least one frame of sysram"),
            Self::Domain(cause) => cause.fmt(f),
        }
    }
}

impl core::error::Error for SetupRefused {}
