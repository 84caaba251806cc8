//! Traces: steps as lines of JSON.
//!
//! The first line is a header, `{"spmem_trace":1}`; each further line is a [`Step`]. For example:
//!
//! ```
//! use spmem_sim::{Step, trace};
//! let text = concat!(
//!     "{\"spmem_trace\":1}\n",
//!     "{\"add_node\":{\"node\":0,\"is_spm\":false,\"is_easy\":false,\"frames\":1024,\"is_zero\":true,\"services\":0,\"tier\":0}}\n",
//!     "{\"advance\":{\"ns\":1000}}\n",
//! );
//! let steps = trace::read(text).unwrap();
//! assert_eq!(steps[1], Step::Advance { ns: 1000 });
//! assert_eq!(trace::write(&steps).unwrap(), text);
//! ```

use core::fmt;
use std::collections::BTreeMap;

use serde::de::DeserializeOwned;

use crate::step::Step;

/// The version that is written.
const VERSION: u32 = 1;
/// In the header of a trace of steps.
const NAME: &str = "spmem_trace";

/// Why a text is no trace.
#[derive(Debug)]
pub enum TraceError {
    /// The first line is not a header of a version that can be read.
    Header {
        /// What it should name.
        name: &'static str,
    },
    /// A line is no step.
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        cause: serde_json::Error,
    },
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header { name } => write!(f, "such a trace begins with the line {{\"{name}\":{VERSION}}}"),
            Self::Line { line, .. } => write!(f, "line {line} is no step"),
        }
    }
}

impl std::error::Error for TraceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Header { .. } => None,
            Self::Line { cause, .. } => Some(cause),
        }
    }
}

/// Reads a trace.
///
/// # Errors
/// [`TraceError`] names the line.
pub fn read(text: &str) -> Result<Vec<Step>, TraceError> {
    read_lines(text, NAME)
}

/// Reads the lines of a trace whose header names it so.
pub(crate) fn read_lines<T: DeserializeOwned>(text: &str, name: &'static str) -> Result<Vec<T>, TraceError> {
    let mut lines = text.lines().zip(1..);
    let header: Option<BTreeMap<String, u32>> = lines.next().and_then(|(line, _)| serde_json::from_str(line).ok());
    if header != Some(BTreeMap::from([(name.to_owned(), VERSION)])) {
        return Err(TraceError::Header { name });
    }
    lines
        .map(|(text, line)| serde_json::from_str(text).map_err(|cause| TraceError::Line { line, cause }))
        .collect()
}

/// Writes a trace.
///
/// # Errors
/// None that is known: steps are plain numbers and text.
pub fn write(steps: &[Step]) -> serde_json::Result<String> {
    let mut text = serde_json::to_string(&BTreeMap::from([(NAME, VERSION)]))? + "\n";
    for step in steps {
        text += &serde_json::to_string(step)?;
        text.push('\n');
    }
    Ok(text)
}
