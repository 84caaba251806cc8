//! What a simulation finds out.

use core::fmt;

/// The memory manager did what a rule forbids, or did not do what it demands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which rule, as `R6`; `frames` where frames have two owners or none, `distance` where a nearer node was passed over.
    pub rule: &'static str,
    /// What happened.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is violated: {}", self.rule, self.what)
    }
}

impl std::error::Error for Violation {}

/// A violation unless `is_kept`.
pub(crate) fn hold(rule: &'static str, is_kept: bool, what: impl FnOnce() -> String) -> Result<(), Violation> {
    if is_kept { Ok(()) } else { Err(Violation { rule, what: what() }) }
}
