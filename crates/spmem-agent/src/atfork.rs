//! Handlers of fork(3), before those of anybody else: no code of a program runs in a child before the child serves its own
//! faults. If it cannot, because its parent was killed, it ends here.
//!
//! The C library runs the handlers for the child in the order of their registration, and constructors that run before this
//! object's register theirs. So this object stands in front of the function that registers, and registers its own first.

use crate::interpose::Next;
use crate::{HEAP, RUNTIME};
use core::ffi::{c_int, c_void};
use core::sync::atomic::{AtomicBool, Ordering};

type Handler = Option<unsafe extern "C" fn()>;
type Register = unsafe extern "C" fn(Handler, Handler, Handler, *mut c_void) -> c_int;

static REGISTER: Next = Next::new(c"__register_atfork");
static IS_REGISTERED: AtomicBool = AtomicBool::new(false);

/// Registers the handlers, once.
pub fn register() {
    if IS_REGISTERED.swap(true, Ordering::Relaxed) {
        return;
    }
    // SAFETY: the three functions stay loaded as long as the process runs: a preloaded object is never unloaded.
    unsafe {
        next(Some(before_fork), Some(after_fork_in_parent), Some(after_fork_in_child), core::ptr::null_mut())
    };
}

unsafe fn next(prepare: Handler, parent: Handler, child: Handler, object: *mut c_void) -> c_int {
    match REGISTER.find() {
        0 => libc::ENOMEM,
        found => {
            // SAFETY: the address is that of the C library's function.
            let register: Register = unsafe { core::mem::transmute(found) };
            // SAFETY: the caller's handlers.
            unsafe { register(prepare, parent, child, object) }
        }
    }
}

/// Stands in front of what pthread_atfork(3) calls.
///
/// # Safety
/// As pthread_atfork(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __register_atfork(
    prepare: Handler,
    parent: Handler,
    child: Handler,
    object: *mut c_void,
) -> c_int {
    register();
    // SAFETY: the caller's handlers.
    unsafe { next(prepare, parent, child, object) }
}

unsafe extern "C" fn before_fork() {
    RUNTIME.before_fork();
}

unsafe extern "C" fn after_fork_in_parent() {
    RUNTIME.after_fork_in_parent();
}

unsafe extern "C" fn after_fork_in_child() {
    HEAP.reset();
    RUNTIME.after_fork_in_child();
}
