//! The memory manager of spmem, pure: it decides who may take which frame of which node, and when pages must leave.
//!
//! Takes facts and returns values; no clock, no I/O, no locks, no unsafe code. Callers (the runtime, the simulator)
//! perform what it decides and provide exclusion: every change goes through `&mut self`.
//!
//! The straight line of an allocation, one module a step:
//! [`wall::Request`] -> [`policy`] -> [`registry::Registry::admit`] -> [`watermark`] -> [`frames`], joined in
//! [`mm::MemoryManager::alloc`].
//! The straight line of pressure on a node: [`mm::MemoryManager::shortage`] -> [`page`] (which blocks) -> [`tier`] (where to)
//! -> [`migrate`] (how). Of a program inside a budget: [`reclaim::plan`] says how many pages must leave, [`lru::on_sweep`]
//! which ones.
//!
//! Rules are cited by number: `R6` is the wall, `R12` grants, and so on.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod budget;
pub mod class;
pub mod compact;
pub mod compressed;
pub mod distance;
pub mod domain;
pub mod enclosure;
pub mod frames;
pub mod grant;
pub mod heat;
pub mod lru;
pub mod migrate;
pub mod mm;
pub mod node;
pub mod nodemask;
pub mod oom;
pub mod page;
pub mod placing;
pub mod poison;
pub mod policy;
pub mod readahead;
pub mod reclaim;
pub mod registry;
mod sync;
pub mod tier;
pub mod units;
pub mod wall;
pub mod watermark;
pub mod zero;
