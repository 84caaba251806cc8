//! Robust mutexes stay in place: when a thread ends, the kernel walks the list of those that it holds and marks each, and a
//! fault at that moment is served by nobody.
//!
//! `pthread_mutex_init` tells of most. One made by `PTHREAD_ROBUST_MUTEX_INITIALIZER_NP` is bytes in memory until somebody
//! locks it, so the four functions that lock look at the kind, one instruction, and pass every other mutex on.

use crate::RUNTIME;
use crate::interpose::Next;
use core::arch::naked_asm;
use core::ffi::c_int;
use core::mem::offset_of;
use spmem_sys::PAGE;

static MUTEX_INIT: Next = Next::new(c"pthread_mutex_init");
static LOCK: Next = Next::new(c"pthread_mutex_lock");
static TRYLOCK: Next = Next::new(c"pthread_mutex_trylock");
static TIMEDLOCK: Next = Next::new(c"pthread_mutex_timedlock");
static CLOCKLOCK: Next = Next::new(c"pthread_mutex_clocklock");

type MutexInit = unsafe extern "C" fn(*mut libc::pthread_mutex_t, *const libc::pthread_mutexattr_t) -> c_int;

/// Where a mutex keeps its kind, and the bit of the kind that says robust. Initialisers are compiled into programs, so glibc
/// can change neither (sysdeps/nptl/bits/struct_mutex.h, nptl/pthreadP.h).
const KIND: usize = 16;
const ROBUST: u8 = 16;

pub fn resolve() {
    for next in [&MUTEX_INIT, &LOCK, &TRYLOCK, &TIMEDLOCK, &CLOCKLOCK] {
        next.find();
    }
}

/// The page: a pin has room for what reaches into the next one.
fn pin(mutex: usize) {
    RUNTIME.pin(mutex & !(PAGE - 1));
}

/// Stands in front of pthread_mutex_init(3).
///
/// # Safety
/// As pthread_mutex_init(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_mutex_init(
    mutex: *mut libc::pthread_mutex_t,
    attributes: *const libc::pthread_mutexattr_t,
) -> c_int {
    let next = MUTEX_INIT.find();
    // SAFETY: the address is that of the C library's pthread_mutex_init.
    let next: MutexInit = unsafe { core::mem::transmute::<usize, MutexInit>(next) };
    // SAFETY: the caller's arguments.
    let result = unsafe { next(mutex, attributes) };
    let mut robust = 0;
    if result == 0 && !attributes.is_null() {
        // SAFETY: initialised attributes, which the C library has just accepted.
        unsafe { libc::pthread_mutexattr_getrobust(attributes, &raw mut robust) };
    }
    if robust == libc::PTHREAD_MUTEX_ROBUST {
        pin(mutex.expose_provenance());
    }
    result
}

/// A function that locks a mutex, its first argument: *jumps* to the C library's, past `prepare` if the mutex is not robust.
macro_rules! lock {
    ($name:ident, $next:ident, $prepare:ident) => {
        #[doc = concat!("Stands in front of ", stringify!($name), "(3).")]
        ///
        /// # Safety
        #[doc = concat!("As ", stringify!($name), "(3).")]
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name() -> c_int {
            naked_asm!(
                "test byte ptr [rdi + {kind}], {robust}",
                "jnz 2f",
                "mov rax, [rip + {next} + {at}]",
                "test rax, rax",
                "jz 2f",
                "jmp rax",
                "2:",
                "push rdi",
                "push rsi",
                "push rdx",
                "call {prepare}",
                "pop rdx",
                "pop rsi",
                "pop rdi",
                "jmp rax",
                kind = const KIND,
                robust = const ROBUST,
                next = sym $next,
                at = const offset_of!(Next, at),
                prepare = sym $prepare,
            )
        }

        /// Returns the C library's function.
        extern "C" fn $prepare(mutex: *const u8) -> usize {
            // SAFETY: within the mutex, which the C library is about to read.
            if unsafe { mutex.wrapping_add(KIND).read_volatile() } & ROBUST != 0 {
                pin(mutex.expose_provenance());
            }
            match $next.find() {
                0 => (absent as extern "C" fn() -> c_int as *const ()).expose_provenance(),
                found => found,
            }
        }
    };
}

lock!(pthread_mutex_lock, LOCK, prepare_lock);
lock!(pthread_mutex_trylock, TRYLOCK, prepare_trylock);
lock!(pthread_mutex_timedlock, TIMEDLOCK, prepare_timedlock);
lock!(pthread_mutex_clocklock, CLOCKLOCK, prepare_clocklock);

/// A C library that lacks the function.
extern "C" fn absent() -> c_int {
    libc::ENOSYS
}
