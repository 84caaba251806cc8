//! What `spm run` promises about a command's life cycle, whatever its memory does.
//!
//! The commands are shell scripts. Where userfaultfd cannot be used they run unmanaged (`--best-effort`): the promises
//! are the same; what needs management says that it was skipped.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

mod audit;
mod auto;
mod exit_status;
mod harness;
mod managed;
mod porter;
mod programs;
mod refusals;
mod report;
mod signals;
mod surroundings;
mod terminal;
mod trace;
