//! The C library's functions that this object stands in front of, and why.
//!
//! | function | why |
//! |---|---|
//! | `pthread_create` | a thread's control block must stay in place: the kernel writes to it when the thread exits |
//! | `pthread_mutex_init` | a robust mutex must stay in place: the kernel unlocks it for a thread that dies |
//! | `mlockall` | locks what the program has, range by range: node 1's frames are not to be filled |
//! | `mremap` | registration splits mappings, and the kernel moves none that is split (EFAULT): moved piece by piece |
//! | `madvise` | MADV_GUARD_INSTALL drops pages without a word to userfaultfd, so they are dropped in words first; MADV_FREE becomes MADV_DONTNEED: it gives the budget its RAM back at once, and the kernel announces both alike; MADV_WIPEONFORK memory must stay in place: the kernel empties it in a child without a word |

use crate::RUNTIME;
use core::arch::naked_asm;
use core::ffi::{CStr, c_int, c_void};
use core::sync::atomic::{AtomicUsize, Ordering};
use spmem_sys::PAGE;
use spmem_sys::maps::{Maps, Name};

type Start = extern "C" fn(*mut c_void) -> *mut c_void;
type PthreadCreate = unsafe extern "C" fn(*mut c_void, *const c_void, Start, *mut c_void) -> c_int;
type MutexInit = unsafe extern "C" fn(*mut libc::pthread_mutex_t, *const libc::pthread_mutexattr_t) -> c_int;
type Mremap = unsafe extern "C" fn(*mut c_void, usize, usize, c_int, ...) -> *mut c_void;
type Madvise = unsafe extern "C" fn(*mut c_void, usize, c_int) -> c_int;

/// include/uapi/asm-generic/mman-common.h (6.13+).
const MADV_GUARD_INSTALL: c_int = 102;

static PTHREAD_CREATE: Next = Next::new(c"pthread_create");
static MUTEX_INIT: Next = Next::new(c"pthread_mutex_init");
static MLOCKALL: Next = Next::new(c"mlockall");
static MREMAP: Next = Next::new(c"mremap");
static MADVISE: Next = Next::new(c"madvise");

/// The function of this name that would have been called without this object.
struct Next {
    name: &'static CStr,
    at: AtomicUsize,
}

impl Next {
    const fn new(name: &'static CStr) -> Self {
        Self { name, at: AtomicUsize::new(0) }
    }

    fn find(&self) -> usize {
        let known = self.at.load(Ordering::Relaxed);
        if known != 0 {
            return known;
        }
        // SAFETY: the name is NUL-terminated.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.at.store(found.expose_provenance(), Ordering::Relaxed);
        found.expose_provenance()
    }
}

/// Looks the functions up while the dynamic linker's data is certainly there.
pub fn resolve() {
    for next in [&PTHREAD_CREATE, &MUTEX_INIT, &MLOCKALL, &MREMAP, &MADVISE] {
        next.find();
    }
}

/// What a new thread is to run; made by the creating thread, freed by the new one.
#[repr(C)]
struct Begin {
    start: Start,
    argument: *mut c_void,
}

/// Stands in front of pthread_create(3).
///
/// # Safety
/// As pthread_create(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_create(
    thread: *mut c_void,
    attributes: *const c_void,
    start: Start,
    argument: *mut c_void,
) -> c_int {
    let next = PTHREAD_CREATE.find();
    if next == 0 {
        return libc::EAGAIN;
    }
    // SAFETY: the address is that of the C library's pthread_create.
    let next: PthreadCreate = unsafe { core::mem::transmute::<usize, PthreadCreate>(next) };
    // The program's heap, as pthread_create itself uses: this is a program thread, and agent memory is not for it.
    // SAFETY: malloc(3) has no preconditions.
    let begin: *mut Begin = unsafe { libc::malloc(size_of::<Begin>()) }.cast();
    if begin.is_null() {
        return libc::EAGAIN;
    }
    // SAFETY: fresh memory of this size, aligned by malloc(3).
    unsafe { begin.write(Begin { start, argument }) };
    // SAFETY: the caller's arguments, and a start routine that takes what `begin` points to.
    let result = unsafe { next(thread, attributes, trampoline, begin.cast()) };
    if result != 0 {
        // SAFETY: no thread was started, so nobody else frees it.
        unsafe { libc::free(begin.cast()) };
    }
    result
}

/// First code of a thread: pins its control block, then *jumps* to the program's routine, so that no frame of this
/// object is there to be unwound by pthread_exit(3) or a cancellation.
#[unsafe(naked)]
extern "C" fn trampoline(begin: *mut c_void) -> *mut c_void {
    naked_asm!(
        "sub rsp, 8",
        "call {prepare}",
        "add rsp, 8",
        "mov rdi, rdx",
        "jmp rax",
        prepare = sym prepare,
    )
}

/// Returned in `rax` and `rdx`.
extern "C" fn prepare(begin: *mut Begin) -> Begin {
    RUNTIME.pin_thread();
    // SAFETY: written by `pthread_create` for this thread alone.
    let copy = unsafe { begin.read() };
    // SAFETY: made by malloc(3) there, and not used any more.
    unsafe { libc::free(begin.cast()) };
    copy
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
    if result == 0 && !attributes.is_null() && RUNTIME.is_managed() {
        // SAFETY: initialised attributes, which the C library has just accepted.
        unsafe { libc::pthread_mutexattr_getrobust(attributes, &raw mut robust) };
    }
    if robust == libc::PTHREAD_MUTEX_ROBUST {
        RUNTIME.pin(mutex.expose_provenance());
    }
    result
}

/// Stands in front of mlockall(2).
///
/// # Safety
/// As mlockall(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mlockall(flags: c_int) -> c_int {
    let next = MLOCKALL.find();
    // SAFETY: the address is that of the C library's mlockall.
    let next: unsafe extern "C" fn(c_int) -> c_int = unsafe { core::mem::transmute(next) };
    if flags & libc::MCL_CURRENT == 0 || !RUNTIME.is_managed() {
        // SAFETY: the caller's arguments.
        return unsafe { next(flags) };
    }
    let on_fault = if flags & libc::MCL_ONFAULT != 0 { libc::MLOCK_ONFAULT } else { 0 };
    let Ok(maps) = Maps::open_by_path() else { return fail(libc::ENOMEM) };
    let mut at = 0;
    while let Ok(Some(vma)) = maps.at_or_above(at) {
        at = vma.end;
        let is_ours = spmem_sys::mapping::own_in(vma.start, vma.end).is_some();
        if is_ours || vma.start >= 1 << 47 || !(vma.is_readable || vma.is_writable || vma.is_executable) {
            continue;
        }
        let start = core::ptr::with_exposed_provenance(vma.start);
        // SAFETY: locking changes no byte.
        let result = unsafe { libc::mlock2(start, vma.end - vma.start, on_fault as libc::c_uint) };
        let errno = errno();
        // Special ranges ([vvar]) cannot be locked, and mlockall(2) passes over them.
        if result != 0 && vma.name != Name::Other && errno != libc::ENOMEM {
            return result;
        }
    }
    if flags & libc::MCL_FUTURE != 0 {
        // SAFETY: the caller's arguments, less what was done.
        return unsafe { next(flags & !libc::MCL_CURRENT) };
    }
    0
}

fn fail(errno: c_int) -> c_int {
    // SAFETY: has no precondition.
    let at = unsafe { libc::__errno_location() };
    // SAFETY: this thread's errno.
    unsafe { at.write(errno) };
    -1
}

fn errno() -> c_int {
    // SAFETY: has no precondition.
    let at = unsafe { libc::__errno_location() };
    // SAFETY: this thread's errno.
    unsafe { at.read() }
}

/// Stands in front of mremap(2). `to` is there with MREMAP_FIXED or MREMAP_DONTUNMAP only, and passed on as it came.
///
/// # Safety
/// As mremap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    from: *mut c_void,
    len: usize,
    new_len: usize,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    let next = MREMAP.find();
    // SAFETY: the address is that of the C library's mremap.
    let next: Mremap = unsafe { core::mem::transmute::<usize, Mremap>(next) };
    let may_be_pieces = RUNTIME.is_managed() && len > 0 && new_len >= len && flags & !MOVES == 0;
    let first = if may_be_pieces { piece(from.addr(), len) } else { None };
    // SAFETY: the caller's arguments.
    let result = unsafe { next(from, len, new_len, flags, to) };
    if result != libc::MAP_FAILED || errno() != libc::EFAULT || first.is_none() {
        return result;
    }
    // SAFETY: as above.
    unsafe { move_pieces(next, from, len, new_len, flags, to) }
}

/// Flags of a call that can be done in pieces.
const MOVES: c_int = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;

/// Bytes from `address` to the end of the mapping it is in, at most `len`.
fn piece(address: usize, len: usize) -> Option<usize> {
    let vma = Maps::open_by_path().ok()?.at_or_above(address).ok()??;
    (vma.start <= address).then(|| len.min(vma.end - address))
}

/// What mremap(2) would have done with one mapping that registration has split, mapping by mapping.
///
/// Kernels before 6.17 move nothing of it; later ones stop (EFAULT) at the first piece that is registered, and what lies
/// before it has moved by then.
unsafe fn move_pieces(
    next: Mremap,
    from: *mut c_void,
    len: usize,
    new_len: usize,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    let target = if flags & libc::MREMAP_FIXED != 0 {
        to
    } else if flags & libc::MREMAP_MAYMOVE != 0 {
        let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping touches nothing that exists.
        unsafe { libc::mmap(core::ptr::null_mut(), new_len, libc::PROT_NONE, how, -1, 0) }
    } else {
        // It grows where it is or not at all: its last piece does.
        from
    };
    if target == libc::MAP_FAILED {
        return target;
    }
    let mut done = 0;
    // A piece may be split again before it is moved.
    let mut tries = MOVE_TRIES;
    while done < len {
        let at = from.wrapping_byte_add(done);
        let Some(piece) = piece(at.addr(), len - done) else {
            let is_moved = flags & libc::MREMAP_FIXED != 0 && done == 0;
            match first_behind(at.addr()) {
                // What the kernel has moved already.
                Some(first) if is_moved && first - at.addr() < len => done = first - at.addr(),
                _ => return failed(),
            }
            continue;
        };
        let is_last = done + piece == len;
        let new_piece = if is_last { piece + (new_len - len) } else { piece };
        let result = if target != from {
            // SAFETY: the caller's memory, and the place it is to move to.
            unsafe { next(at, piece, new_piece, MOVES, target.wrapping_byte_add(done)) }
        } else if is_last {
            // SAFETY: the caller's memory.
            unsafe { next(at, piece, new_piece, 0) }
        } else {
            at
        };
        if result != libc::MAP_FAILED {
            done += piece;
        } else if errno() != libc::EFAULT || tries == 0 {
            return result;
        } else {
            tries -= 1;
        }
    }
    target
}

/// How often a piece is tried again.
const MOVE_TRIES: usize = 64;

/// Where the next mapping behind `address` begins.
fn first_behind(address: usize) -> Option<usize> {
    Some(Maps::open_by_path().ok()?.at_or_above(address).ok()??.start)
}

fn failed() -> *mut c_void {
    fail(libc::EFAULT);
    libc::MAP_FAILED
}

/// Stands in front of madvise(2).
///
/// # Safety
/// As madvise(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(start: *mut c_void, len: usize, advice: c_int) -> c_int {
    let next = MADVISE.find();
    // SAFETY: the address is that of the C library's madvise.
    let next: Madvise = unsafe { core::mem::transmute::<usize, Madvise>(next) };
    let advice = match advice {
        libc::MADV_FREE if RUNTIME.is_managed() => libc::MADV_DONTNEED,
        other => other,
    };
    if advice == MADV_GUARD_INSTALL && RUNTIME.is_managed() {
        // SAFETY: the caller's arguments; installing guards drops the same pages.
        unsafe { next(start, len, libc::MADV_DONTNEED) };
    }
    // SAFETY: the caller's arguments.
    let result = unsafe { next(start, len, advice) };
    if advice == libc::MADV_WIPEONFORK && result == 0 && RUNTIME.is_managed() {
        let from = start.addr() & !(PAGE - 1);
        let to = (start.addr() + len).next_multiple_of(PAGE);
        RUNTIME.exclude(from, to);
        // What is away comes back, to stay.
        for page in (from..to).step_by(PAGE) {
            // SAFETY: madvise(2) accepted the range, so it is mapped; the program may have made it unreadable, which
            // for memory to be wiped makes no sense.
            unsafe { core::ptr::with_exposed_provenance::<u8>(page).read_volatile() };
        }
    }
    result
}
