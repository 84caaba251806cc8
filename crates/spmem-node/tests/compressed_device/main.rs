//! Compressed memory that cannot lie: `spmem_node::cram` on the model of a device that compresses. Every byte is checked.
//!
//! The model drops writes when it is overrun, so a component that overruns it loses bytes, and these tests see that: one
//! without a reserve, and one that trusts what the device promises, are shown to lose some by the same adversary.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

mod adversary;
mod balloon;
mod faults;
mod harness;
mod scheduler;
mod teardown;
mod threads;
