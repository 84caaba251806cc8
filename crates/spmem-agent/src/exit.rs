//! A process that ends by its own will: children that it made by a raw system call get their pages first.
//!
//! exit(3) and a return from `main` run [`DESTRUCTOR`], which comes after the program's own; _exit(2) is stood in front of. A
//! raw exit_group(2), quick_exit(3) and execve(2) pass by: who touches what such a child has not got gets SIGBUS.

use crate::RUNTIME;
use core::ffi::c_int;

#[used]
#[unsafe(link_section = ".fini_array")]
static DESTRUCTOR: extern "C" fn() = before_exit;

extern "C" fn before_exit() {
    RUNTIME.before_exit();
}

/// Stands in front of _exit(2).
#[unsafe(no_mangle)]
pub extern "C" fn _exit(status: c_int) -> ! {
    RUNTIME.before_exit();
    spmem_sys::process::exit(status)
}

/// Stands in front of _Exit(3).
#[unsafe(no_mangle)]
pub extern "C" fn _Exit(status: c_int) -> ! {
    _exit(status)
}
