//! The back ends of spmem: one module per kind of memory.
//!
//! [`Backend`] is what the runtime needs from a node whose pages are not simply mapped; each module
//! below is one implementation. The crate decides nothing about *which* page goes *where*: that is
//! `spmem-core`. It makes no system call either: the memory behind a node is lent by the caller
//! through [`compressed::FrameBytes`].
//!
//! It takes no lock and keeps no global state. It runs inside other people's programs, so it is
//! `no_std`, holds no unsafe code, and treats every stored byte as possibly wrong: damage is a
//! [`Corrupt`] value, never a panic and never wrong bytes (R20).
//!
//! The exceptions are `machine`, what memory this machine has, and `door`, memory of a node for a walled program: they
//! read sysfs or make system calls, take std and are built for tools only (feature `machine`).
//!
//! Holes: `compressed` is the only kind so far.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "machine"))]
extern crate std;

pub mod backend;
pub mod compressed;
#[cfg(test)]
mod conformance;
#[cfg(feature = "machine")]
pub mod door;
#[cfg(feature = "machine")]
pub mod machine;
#[cfg(test)]
mod testing;

pub use backend::{Backend, Corrupt, Damage, Full, Handle, PAGE_BYTES, Page, Stage, Unfit, Usage};
