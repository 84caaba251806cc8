//! Remarks: what `spm` says beside its results.

use std::fmt::Arguments;
use std::io::Write;

/// Writes one line to stderr, with `spm` in front. A stderr that is closed or hung up is no reason to fail, as
/// `eprintln!` would: the command's result still counts.
pub fn remark(text: Arguments<'_>) {
    let _ = std::io::stderr().write_all(format!("spm: {text}\n").as_bytes());
}
