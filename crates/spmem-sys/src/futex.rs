//! futex(2): a lock and an event whose whole state is one word in memory that never leaves.
//!
//! Both words live in the agent's own mappings and are private to the process. A forked child resets them
//! ([`Lock::reset`]): their owners do not exist there.

use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicU32, Ordering};
use syscalls::{Sysno, syscall};

const FREE: u32 = 0;
const HELD: u32 = 1;
const CONTENDED: u32 = 2;
/// Tries before the lock sleeps: some microseconds, the length of most holds.
const SPINS: u32 = 200;

/// A mutual exclusion lock around a value; sleeps in the kernel when contended. Not fair.
pub struct Lock<T> {
    word: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: `value` is reached only through a `Held`, of which there is one at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// A free lock.
    pub const fn new(value: T) -> Self {
        Self { word: AtomicU32::new(FREE), value: UnsafeCell::new(value) }
    }

    /// Waits for the lock and takes it.
    pub fn lock(&self) -> Held<'_, T> {
        // Acquire pairs with the Release in `Held::drop`.
        if self.word.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_err() {
            self.lock_contended();
        }
        Held { lock: self }
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> Option<Held<'_, T>> {
        // Acquire pairs with the Release in `Held::drop`.
        let result = self.word.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed);
        result.is_ok().then(|| Held { lock: self })
    }

    #[cold]
    fn lock_contended(&self) {
        for _ in 0..SPINS {
            if self.word.load(Ordering::Relaxed) == FREE
                && self.word.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                return;
            }
            spin_loop();
        }
        while self.word.swap(CONTENDED, Ordering::Acquire) != FREE {
            wait(&self.word, CONTENDED, None, libc::FUTEX_PRIVATE_FLAG);
        }
    }

    /// Declares the lock free, in a forked child whose other threads do not exist.
    ///
    /// # Safety
    /// No thread of this process holds or waits for the lock.
    pub unsafe fn reset(&self) {
        self.word.store(FREE, Ordering::Release);
    }
}

/// The right to the value of a [`Lock`]; gives it back when dropped.
pub struct Held<'a, T> {
    lock: &'a Lock<T>,
}

impl<T> Deref for Held<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this `Held` is the only one, so nobody else has a `&mut`.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Held<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this `Held` is the only one, and it is borrowed mutably.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        // Release pairs with the Acquire in `lock`.
        if self.lock.word.swap(FREE, Ordering::Release) == CONTENDED {
            wake(&self.lock.word, 1, libc::FUTEX_PRIVATE_FLAG);
        }
    }
}

/// A word to wait on: somebody changes it and wakes, waiters sleep until it differs from what they saw. `SHARED`: in memory
/// that several processes map.
#[repr(transparent)]
#[derive(Default)]
pub struct Event<const SHARED: bool = false>(AtomicU32);

impl<const SHARED: bool> Event<SHARED> {
    const FLAG: i32 = if SHARED { 0 } else { libc::FUTEX_PRIVATE_FLAG };

    /// An event nobody has signalled.
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// What to pass to [`Event::wait`]; read it before looking at the condition.
    pub fn ticket(&self) -> u32 {
        // Acquire pairs with the Release in `signal`.
        self.0.load(Ordering::Acquire)
    }

    /// Wakes all who wait.
    pub fn signal(&self) {
        self.0.fetch_add(1, Ordering::Release);
        wake(&self.0, i32::MAX, Self::FLAG);
    }

    /// Sleeps until signalled after `ticket` was taken, or `timeout_ns` is over. May return early.
    pub fn wait(&self, ticket: u32, timeout_ns: Option<u64>) {
        wait(&self.0, ticket, timeout_ns, Self::FLAG);
    }
}

fn wait(word: &AtomicU32, expected: u32, timeout_ns: Option<u64>, flag: i32) {
    let timeout = timeout_ns.map(|ns| libc::timespec {
        tv_sec: i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(ns % 1_000_000_000).expect("below 2^30"),
    });
    let timeout = timeout.as_ref().map_or(core::ptr::null(), core::ptr::from_ref);
    // SAFETY: the word outlives the call; the timeout is null or a timespec on this stack.
    let _ = unsafe { syscall!(Sysno::futex, word.as_ptr(), libc::FUTEX_WAIT | flag, expected, timeout) };
}

fn wake(word: &AtomicU32, count: i32, flag: i32) {
    // SAFETY: FUTEX_WAKE reads nothing through the pointer.
    let _ = unsafe { syscall!(Sysno::futex, word.as_ptr(), libc::FUTEX_WAKE | flag, count) };
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn a_lock_admits_one_thread_at_a_time() {
        let total = Lock::new(0_u64);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20_000).for_each(|_| *total.lock() += 1));
            }
        });
        assert_eq!(*total.lock(), 80_000);
    }

    #[test]
    fn a_signal_between_ticket_and_wait_is_not_lost() {
        let event: Event = Event::new();
        let ticket = event.ticket();
        event.signal();
        event.wait(ticket, None);
    }
}
