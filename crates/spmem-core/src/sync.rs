//! What [`frames`](crate::frames) stands on, in one place: tests/loom.rs and tests/shuttle.rs put a model checker's here.

/// Blocks of the largest order, 4 MiB, in a zone; a model checker takes fewer.
pub(crate) const ZONE_TREES: usize = 256;

pub(crate) use core::hint::spin_loop;
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
