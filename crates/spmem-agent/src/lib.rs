//! The agent: the preloaded object that brings an unmodified program under management.
//!
//! `spm` names it in LD_PRELOAD (ld.so(8)). Before `main` its constructor connects to `spm` and starts the runtime;
//! after that it takes part where the C library lets it: at fork(2), at the start of a thread, and where a program
//! gives advice on memory. Everything else happens in the runtime's raw threads.
//!
//! | module | what |
//! |---|---|
//! | [`atfork`] | what happens before and after fork(3) |
//! | [`heap`] | the allocator of agent threads: its own mappings, never the program's heap |
//! | [`interpose`] | the C library's functions that this object stands in front of |
//! | [`robust`] | robust mutexes stay in place |
//! | [`memory`] | `memcpy` and its kind, so that agent threads run none of the program's |
//!
//! Symbols are bound when the object is loaded (RELRO, `now`): agent threads never enter the dynamic linker, whose
//! data may be away.
#![no_std]
#![allow(unsafe_code, reason = "this object is C to the programs it is loaded into")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "x86-64 only, as spmem-sys asserts: usize and u64 are the same"
)]

extern crate alloc;

mod atfork;
mod exit;
mod heap;
mod interpose;
mod memory;
mod robust;

use core::ffi::{CStr, c_char, c_int, c_void};
use spmem::runtime::Runtime;
use spmem_sys::PAGE;

/// This process's runtime. Its memory is excluded from management with the rest of this object.
pub(crate) static RUNTIME: Runtime = Runtime::new();

#[global_allocator]
static HEAP: heap::Heap = heap::Heap::new();

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn(c_int, *const *const c_char, *const *const c_char) = construct;

/// Runs before `main`, in the program's only thread.
extern "C" fn construct(_argc: c_int, _argv: *const *const c_char, environment: *const *const c_char) {
    interpose::resolve();
    let Some(name) = variable(environment, c"SPMEM_SOCKET") else { return };
    spmem_sys::clock::find();
    exclude_libraries();
    if RUNTIME.attach(name.to_bytes()).is_ok() {
        pin_link_maps();
        atfork::register();
    }
}

/// The value of an environment variable.
fn variable(environment: *const *const c_char, name: &CStr) -> Option<&'static CStr> {
    let mut entry = environment;
    loop {
        // SAFETY: the vector the kernel built ends with a null pointer, where this loop returns.
        let text = unsafe { *entry };
        if text.is_null() {
            return None;
        }
        // SAFETY: each entry is a NUL-terminated string that lives as long as the process.
        let text = unsafe { CStr::from_ptr(text) };
        let rest = text.to_bytes_with_nul().strip_prefix(name.to_bytes());
        if let Some(value) = rest.and_then(|rest| rest.strip_prefix(b"=")) {
            return CStr::from_bytes_with_nul(value).ok();
        }
        entry = entry.wrapping_add(1);
    }
}

/// The data of the C library, the dynamic linker and this object stays in place: forked children run code of
/// theirs before anybody could serve them.
fn exclude_libraries() {
    // SAFETY: the callback only reads what it is given.
    unsafe { libc::dl_iterate_phdr(Some(exclude_library), core::ptr::null_mut()) };
}

/// The dynamic linker's list of objects stays in place: debuggers read it from a stopped process, in which nobody
/// serves faults.
fn pin_link_maps() {
    /// The public start of `struct link_map` (link.h).
    #[repr(C)]
    struct LinkMap {
        address: usize,
        name: *const c_char,
        dynamic: usize,
        next: *const LinkMap,
    }
    // SAFETY: a null name asks for the program itself, which is loaded.
    let handle = unsafe { libc::dlopen(core::ptr::null(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    let mut at: *const LinkMap = handle.cast_const().cast();
    while !at.is_null() {
        // SAFETY: in glibc a handle is the object's link map, and the list ends with a null pointer.
        let map = unsafe { &*at };
        RUNTIME.pin(at.expose_provenance());
        RUNTIME.pin(map.name.expose_provenance());
        at = map.next;
    }
}

unsafe extern "C" fn exclude_library(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: dl_iterate_phdr(3) passes a valid structure.
    let info = unsafe { &*info };
    // SAFETY: names are NUL-terminated.
    let name = unsafe { CStr::from_ptr(info.dlpi_name) }.to_bytes();
    let file = name.rsplit(|&b| b == b'/').next().unwrap_or(name);
    let own = core::ptr::from_ref(&RUNTIME).addr();
    let (mut low, mut high) = (usize::MAX, 0);
    for index in 0..usize::from(info.dlpi_phnum) {
        // SAFETY: `dlpi_phnum` headers start at `dlpi_phdr`.
        let header = unsafe { &*info.dlpi_phdr.wrapping_add(index) };
        if header.p_type == libc::PT_LOAD {
            let start = info.dlpi_addr as usize + header.p_vaddr as usize;
            low = low.min(start);
            high = high.max(start + header.p_memsz as usize);
        }
    }
    let is_basic =
        [&b"libc.so"[..], b"libc-", b"ld-linux", b"libpthread", b"ld-2"].iter().any(|p| file.starts_with(p));
    if is_basic || (low..high).contains(&own) {
        RUNTIME.exclude(low & !(PAGE - 1), high.next_multiple_of(PAGE));
    }
    0
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    if heap::has_run_out() {
        spmem::die_without_memory()
    }
    spmem::die(info)
}
