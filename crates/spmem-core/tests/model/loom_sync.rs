//! Stands in for `src/sync.rs`: atomics of loom.
//!
//! Loom's are made while a model runs and belong to that run; metadata lives longer and is mostly never touched. So an
//! atomic here is made when it is first used in a run, with its first value. It is not dropped: the run it belongs to is over then.

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex};

pub(crate) const ZONE_TREES: usize = 64;

pub(crate) use loom::hint::spin_loop;
pub(crate) use loom::sync::atomic::Ordering;

thread_local! {
    /// A model runs in one thread, its threads are coroutines.
    static RUN: Cell<usize> = const { Cell::new(0) };
}

/// A run of a model begins: all atomics have their first values again.
pub(crate) fn begin_run() {
    RUN.set(RUN.get() + 1);
}

macro_rules! atomic {
    ($name:ident, $value:ty, [$($operation:ident),*] $(, $exchange:ident)?) => {
        #[derive(Debug)]
        pub(crate) struct $name {
            first: $value,
            of_run: Mutex<Option<(usize, Arc<ManuallyDrop<loom::sync::atomic::$name>>)>>,
        }

        impl $name {
            pub(crate) const fn new(first: $value) -> Self {
                Self { first, of_run: Mutex::new(None) }
            }

            fn now(&self) -> Arc<ManuallyDrop<loom::sync::atomic::$name>> {
                let run = RUN.get();
                let mut of_run = self.of_run.lock().unwrap();
                match &*of_run {
                    Some((of, atomic)) if *of == run => Arc::clone(atomic),
                    _ => {
                        let atomic = Arc::new(ManuallyDrop::new(loom::sync::atomic::$name::new(self.first)));
                        *of_run = Some((run, Arc::clone(&atomic)));
                        atomic
                    }
                }
            }

            pub(crate) fn load(&self, order: Ordering) -> $value {
                self.now().load(order)
            }

            pub(crate) fn store(&self, value: $value, order: Ordering) {
                self.now().store(value, order);
            }

            $(pub(crate) fn $operation(&self, value: $value, order: Ordering) -> $value {
                self.now().$operation(value, order)
            })*
        }

        impl $name {
            $(pub(crate) fn $exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.now().$exchange(current, new, success, failure)
            })?
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new(<$value>::default())
            }
        }
    };
}

atomic!(AtomicBool, bool, [], compare_exchange);
atomic!(AtomicU8, u8, [], compare_exchange);
atomic!(AtomicU32, u32, [swap]);
atomic!(AtomicU64, u64, [swap, fetch_add, fetch_or, fetch_and], compare_exchange);
