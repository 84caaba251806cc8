//! The back ends of spmem: one module per kind of memory.
//!
//! [`Backend`] is what the runtime needs from any node. [`compressed`] keeps pages in the memory that its caller lends
//! ([`compressed::FrameBytes`]). [`mapped`] is every byte-addressable kind: pages lie at addresses, in a
//! [`mapped::Medium`]; [`numa`], [`dax`] and [`mod@file`] are the kinds that this machine may have, through the calls of
//! `spmem-sys`. [`swapfile`] is files and dax devices that processes divide and reach by copy. [`cram`] keeps byte-addressable memory that compresses from being overrun. The crate decides nothing about *which* page goes *where*: that is `spmem-core`.
//!
//! It takes no lock and keeps no global state. It runs inside other people's programs, so it is
//! `no_std`, holds no unsafe code, and treats every stored byte as possibly wrong: damage is a
//! [`Corrupt`] value, never a panic and never wrong bytes (R20).
//!
//! The exceptions are `machine`, what memory this machine has, `door`, memory of a node for a walled program, `roll`, what is told of grants, and `heat`, which
//! pages a program uses: they read sysfs or make system calls, take std and are built for tools only (feature `machine`); and
//! `model`, a device that does not exist (feature `model`).

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
// The conformance suite names this crate as its users do.
#[cfg(test)]
extern crate self as spmem_node;
#[cfg(any(test, feature = "machine", feature = "model"))]
extern crate std;

pub mod backend;
pub mod compressed;
#[cfg(test)]
mod conformance;
pub mod cram;
pub mod dax;
#[cfg(feature = "machine")]
pub mod door;
pub mod file;
#[cfg(feature = "machine")]
pub mod heat;
#[cfg(feature = "machine")]
pub mod machine;
pub mod mapped;
#[cfg(feature = "model")]
pub mod model;
pub mod numa;
#[cfg(feature = "machine")]
pub mod roll;
pub mod swapfile;
#[cfg(test)]
mod testing;

pub use backend::{Backend, Corrupt, Damage, Full, Handle, PAGE_BYTES, Page, Stage, Unfit, Usage};
