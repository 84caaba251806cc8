//! The runtime of spmem: moves a program's cold pages to a walled-off node and back.
//!
//! Three lines, one file a step:
//!
//! - **Access:** fault ([`fault`]) -> entry ([`table`]) -> slot ([`holding`]) or node 1 (`spmem-node`) -> wake.
//! - **Pressure:** measure and plan ([`reclaim`], `spmem_core::reclaim`) -> sweep ([`sweep`], `spmem_core::lru`) ->
//!   holding area -> node 1 ([`demote`]) -> free.
//! - **Allocation** on node 1: `Store` -> `GrantedFrames` -> `spmem_core::mm` (policy, wall, watermark, frames).
//!
//! Runs inside other people's programs: no std, no libc state, no thread-local storage; see [`runtime`].
#![no_std]
#![allow(
    clippy::cast_possible_truncation,
    reason = "addresses, sizes and page counts of a 64-bit process: usize and u64 are the same here"
)]

extern crate alloc;

mod changes;
pub mod control;
pub mod demote;
pub mod dense;
pub mod encoder;
mod fault;
mod follow;
mod fork;
mod frames;
mod gate;
pub mod holding;
mod hurdle;
mod identity;
mod lanes;
mod nurse;
mod outgoing;
mod pins;
mod place;
mod populate;
pub mod porter;
pub mod protocol;
pub mod reclaim;
pub mod recorder;
pub mod runtime;
pub mod space;
mod swap;
mod sweep;
pub mod table;
mod tracking;
pub mod workshop;

use core::fmt::{self, Write};

/// Tells the user of the program, on its standard error, what cannot be told otherwise.
pub(crate) fn complain(text: fmt::Arguments<'_>) {
    let mut line = Line { bytes: [0; 512], len: 0 };
    let _ = line.write_fmt(text);
    spmem_sys::process::write_stderr(&line.bytes[..line.len]);
}

/// Ends the process after it was refused memory that an agent thread cannot do without.
pub fn die_without_memory() -> ! {
    complain(format_args!(
        "spm: process {}: no memory is left for its agent: RLIMIT_AS or RLIMIT_DATA is too low, or the system has no more. Set limits before spm \
         run, or leave a few MiB\n",
        spmem_sys::process::pid()
    ));
    spmem_sys::process::abort()
}

/// Ends the process after a broken invariant in an agent thread: going on might hand out wrong bytes.
pub fn die(info: &core::panic::PanicInfo<'_>) -> ! {
    complain(format_args!("spm: process {}: {info}\n", spmem_sys::process::pid()));
    spmem_sys::process::abort()
}

/// A line of text without an allocation; what does not fit is cut.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let len = text.len().min(self.bytes.len() - self.len);
        self.bytes[self.len..self.len + len].copy_from_slice(&text.as_bytes()[..len]);
        self.len += len;
        Ok(())
    }
}
