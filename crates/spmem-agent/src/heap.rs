//! The allocator of agent threads: dlmalloc over mappings of our own, behind a futex lock.
//!
//! Program threads never use it: one that faulted while it held the lock would wait for the handler, which may want it.

use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicBool, Ordering};
use dlmalloc::{Allocator, Dlmalloc};
use spmem_sys::futex::Lock;
use spmem_sys::mapping::Mapping;

/// Least memory asked of the kernel at a time, bytes.
const STEP: usize = 1 << 20;

/// See the module's page.
pub struct Heap(Lock<Dlmalloc<Source>>);

/// The kernel has refused memory.
static HAS_RUN_OUT: AtomicBool = AtomicBool::new(false);

/// Whether that has ever been so, which is what an allocation that fails comes from.
pub fn has_run_out() -> bool {
    HAS_RUN_OUT.load(Ordering::Relaxed)
}

struct Source;

// SAFETY: memory comes fresh from the kernel and is never given back.
unsafe impl Allocator for Source {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        match Mapping::new(size.next_multiple_of(STEP), c"spmem heap") {
            Ok(mapping) => {
                let len = mapping.len();
                (mapping.leak(), len, 0)
            }
            Err(_) => {
                HAS_RUN_OUT.store(true, Ordering::Relaxed);
                (core::ptr::null_mut(), 0, 0)
            }
        }
    }

    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        core::ptr::null_mut()
    }

    fn free_part(&self, _: *mut u8, _: usize, _: usize) -> bool {
        false
    }

    fn free(&self, _: *mut u8, _: usize) -> bool {
        false
    }

    fn can_release_part(&self, _: u32) -> bool {
        false
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        spmem_sys::PAGE
    }
}

impl Heap {
    pub const fn new() -> Self {
        Self(Lock::new(Dlmalloc::new_with_allocator(Source)))
    }

    /// In a forked child: whoever held the lock is not there. Nobody did: allocating threads pause for a fork.
    pub fn reset(&self) {
        // SAFETY: the child has one thread.
        unsafe { self.0.reset() };
    }
}

// SAFETY: dlmalloc upholds the contract, under the lock.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller passes a layout of non-zero size.
        unsafe { self.0.lock().malloc(layout.size(), layout.align()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { self.0.lock().calloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller passes what `alloc` returned for this layout.
        unsafe { self.0.lock().free(at, layout.size(), layout.align()) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        unsafe { self.0.lock().realloc(at, layout.size(), layout.align(), size) }
    }
}
