//! Stands in for `src/sync.rs`: atomics of shuttle.

pub(crate) const ZONE_TREES: usize = 64;

pub(crate) use shuttle::hint::spin_loop;
pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
