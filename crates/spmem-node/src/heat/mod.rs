//! Heat: which pages of a program were used since somebody last looked.
//!
//! [`facts`] finds out what this kernel lets us ask, [`spmem_core::heat`] decides which [`Source`] it is, [`outside`] opens it for a
//! process by its number; each is a [`HeatSource`]. [`Damon`] samples regions, [`Idle`] looks at each page by its frame, [`Rwp`]
//! at each page of this very process. The holding area is none of them: it is the runtime's, and a page that comes back
//! from it is itself the answer. Takes no lock.
//!
//! Holes: DAMON is one of the kernel's, so one of ours at a time, and what it says is of its last interval only. Idle page
//! tracking was tried on made files: no kernel that Debian builds has it.

mod damon;
mod idle;
mod rwp;

use std::boxed::Box;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;
use std::vec::Vec;

pub use damon::{Damon, Pace};
pub use idle::Idle;
pub use rwp::Rwp;
pub use spmem_core::heat::{Accessed, Facts, Source};

/// Something that tells which pages of one process are used.
pub trait HeatSource {
    /// Which.
    fn source(&self) -> Source;

    /// The pages of `ranges` that were used since the last look, in order; the first look begins and tells nothing. Ranges are
    /// whole pages, in order and apart from each other; they may change from look to look, and what is new to a look is
    /// begun by it.
    ///
    /// # Errors
    /// [`HeatError`]; the process has ended, for one. The next look may be tried.
    fn look(&mut self, ranges: &[Range<usize>]) -> Result<Vec<Accessed>, HeatError>;
}

/// Why a source does not tell.
#[derive(Debug)]
pub enum HeatError {
    /// A file of the kernel's could not be read or written.
    File {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A call of the kernel's failed.
    Call {
        /// What it was for.
        doing: &'static str,
        /// Why.
        cause: spmem_sys::Errno,
    },
    /// It says something that makes no sense.
    Nonsense {
        /// What.
        what: &'static str,
    },
    /// It is not for looks from outside.
    Within(Source),
}

impl fmt::Display for HeatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, cause } => write!(f, "{}: {cause}", path.display()),
            Self::Call { doing, cause } => write!(f, "{doing}: {cause}"),
            Self::Nonsense { what } => write!(f, "the kernel tells nonsense: {what}"),
            Self::Within(source) => write!(f, "{source} is known within the program only"),
        }
    }
}

impl core::error::Error for HeatError {}

/// What the kernel under `root` (`/`, or a tree like it) lets this process ask.
pub fn facts(root: &Path) -> Facts {
    Facts { rwp: rwp::lack(), damon: damon::lack(root), idle: idle::lack(root) }
}

/// Opens a source for process `pid`, to be looked at about every `interval`.
///
/// # Errors
/// [`HeatError`]: it cannot be had after all.
pub fn outside(
    source: Source,
    root: &Path,
    pid: u32,
    interval: Duration,
) -> Result<Box<dyn HeatSource>, HeatError> {
    Ok(match source {
        Source::Damon => Box::new(Damon::new(root, pid, Pace::of(interval))),
        Source::Idle => Box::new(Idle::open(root, pid)?),
        Source::Rwp | Source::Holding => return Err(HeatError::Within(source)),
    })
}

/// Appends a page that was seen accessed, to the run before it if it continues that.
fn push_page(found: &mut Vec<Accessed>, start: usize, end: usize) {
    match found.last_mut().filter(|last| last.end == start) {
        Some(last) => last.end = end,
        None => found.push(Accessed { start, end, seen: 1, samples: 1 }),
    }
}
