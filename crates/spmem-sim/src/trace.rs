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

use serde::{Deserialize, Serialize};

use crate::step::Step;

/// The version that is written.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    spmem_trace: u32,
}

/// Why a text is no trace.
#[derive(Debug)]
pub enum TraceError {
    /// The first line is not a header of a version that can be read.
    Header,
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
            Self::Header => write!(f, "a trace begins with the line {{\"spmem_trace\":{VERSION}}}"),
            Self::Line { line, cause } => write!(f, "line {line} is no step: {cause}"),
        }
    }
}

impl std::error::Error for TraceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Header => None,
            Self::Line { cause, .. } => Some(cause),
        }
    }
}

/// Reads a trace.
///
/// # Errors
/// [`TraceError`] names the line.
pub fn read(text: &str) -> Result<Vec<Step>, TraceError> {
    let mut lines = text.lines().zip(1..);
    let header: Option<Header> = lines.next().and_then(|(line, _)| serde_json::from_str(line).ok());
    if header.is_none_or(|header| header.spmem_trace != VERSION) {
        return Err(TraceError::Header);
    }
    let steps =
        lines.map(|(text, line)| serde_json::from_str(text).map_err(|cause| TraceError::Line { line, cause }));
    steps.collect()
}

/// Writes a trace.
///
/// # Errors
/// None that is known: steps are plain numbers and text.
pub fn write(steps: &[Step]) -> serde_json::Result<String> {
    let mut text = serde_json::to_string(&Header { spmem_trace: VERSION })? + "\n";
    for step in steps {
        text += &serde_json::to_string(step)?;
        text.push('\n');
    }
    Ok(text)
}
