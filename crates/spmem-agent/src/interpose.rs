//! The C library's functions that this object stands in front of, and why.
//!
//! | function | why |
//! |---|---|
//! | `pthread_create` | a thread's control block must stay in place: the kernel writes to it when the thread exits |
//! | `pthread_mutex_init`, `_lock`, `_trylock`, `_timedlock`, `_clocklock` | see [`crate::robust`] |
//! | `mlockall` | locks what the program has, range by range: node 1's frames are not to be filled |
//! | `mremap` | registration splits mappings, and the kernel moves none that is split (EFAULT): moved piece by piece |
//! | `madvise` | MADV_GUARD_INSTALL drops pages without a word to userfaultfd, so they are dropped in words afterwards; MADV_FREE becomes MADV_DONTNEED: it gives the budget its RAM back at once, and the kernel announces both alike; MADV_WIPEONFORK memory must stay in place: the kernel empties it in a child without a word |
//! | `shmat` | SHM_REMAP unmaps what is there without a word to userfaultfd, so it is unmapped in words first |
//! | `process_madvise` | the same for this process's own pidfd |
//! | `_exit`, `_Exit` | see [`crate::exit`] |

use crate::RUNTIME;
use core::arch::naked_asm;
use core::ffi::{CStr, c_int, c_void};
use core::sync::atomic::{AtomicUsize, Ordering};
use spmem_sys::PAGE;
use spmem_sys::maps::{Maps, Name, Vma};

type Start = extern "C" fn(*mut c_void) -> *mut c_void;
type PthreadCreate = unsafe extern "C" fn(*mut c_void, *const c_void, Start, *mut c_void) -> c_int;
type Mremap = unsafe extern "C" fn(*mut c_void, usize, usize, c_int, ...) -> *mut c_void;
type Shmat = unsafe extern "C" fn(c_int, *const c_void, c_int) -> *mut c_void;
type Madvise = unsafe extern "C" fn(*mut c_void, usize, c_int) -> c_int;

/// include/uapi/asm-generic/mman-common.h (6.13+).
const MADV_GUARD_INSTALL: c_int = 102;

static PTHREAD_CREATE: Next = Next::new(c"pthread_create");
static MLOCKALL: Next = Next::new(c"mlockall");
static MREMAP: Next = Next::new(c"mremap");
static MADVISE: Next = Next::new(c"madvise");
static SHMAT: Next = Next::new(c"shmat");

/// The function of this name that would have been called without this object.
pub struct Next {
    name: &'static CStr,
    pub at: AtomicUsize,
}

impl Next {
    pub const fn new(name: &'static CStr) -> Self {
        Self { name, at: AtomicUsize::new(0) }
    }

    pub fn find(&self) -> usize {
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
    for next in [&PTHREAD_CREATE, &MLOCKALL, &MREMAP, &MADVISE, &SHMAT] {
        next.find();
    }
    crate::robust::resolve();
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
    let is_possible = RUNTIME.is_managed() && len > 0 && new_len >= len && flags & !MOVES == 0;
    let is_fixed_move = flags == MOVES && new_len == len;
    let is_ours = is_possible && (is_one_mapping(from.addr(), len) || is_fixed_move && moves_several());
    // SAFETY: the caller's arguments.
    let result = unsafe { next(from, len, new_len, flags, to) };
    if result != libc::MAP_FAILED || errno() != libc::EFAULT || !is_ours {
        return result;
    }
    // SAFETY: as above.
    unsafe { move_pieces(next, from, len, new_len, flags, to) }
}

/// Flags of a call that can be done in pieces.
const MOVES: c_int = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
/// How often a piece that cannot be moved is looked up and tried again: it may have been split in between.
const MOVE_TRIES: usize = 64;

/// Whether the program knows the range as one mapping: nothing but registration can split one whose parts are alike.
fn is_one_mapping(start: usize, len: usize) -> bool {
    let Ok(maps) = Maps::open_by_path() else { return false };
    let Some(end) = start.checked_add(len) else { return false };
    let mut first = None;
    let mut at = start;
    while at < end {
        let Ok(Some(vma)) = maps.at_or_above(at) else { return false };
        let like = Vma { start: 0, end: 0, ..vma };
        if vma.start > at || vma.is_file || vma.is_shared || *first.get_or_insert(like) != like {
            return false;
        }
        at = vma.end;
    }
    true
}

/// Whether mremap(2) moves several mappings at once (Linux 6.17).
fn moves_several() -> bool {
    let mut name = core::mem::MaybeUninit::<libc::utsname>::uninit();
    // SAFETY: writes the structure, whole.
    if unsafe { libc::uname(name.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: written by the kernel.
    let name = unsafe { name.assume_init() };
    let mut numbers = name
        .release
        .split(|&byte| !byte.cast_unsigned().is_ascii_digit())
        .map(|digits| digits.iter().fold(0_u32, |sum, &digit| sum * 10 + u32::from(digit.cast_unsigned() - b'0')));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (6, 17)
}

/// What is mapped at `address`: bytes to its end, at most `len`.
fn piece(address: usize, len: usize) -> Option<usize> {
    let vma = Maps::open_by_path().ok()?.at_or_above(address).ok()??;
    (vma.start <= address).then(|| len.min(vma.end - address))
}

/// Where the next mapping behind `address` begins.
fn first_behind(address: usize) -> Option<usize> {
    Some(Maps::open_by_path().ok()?.at_or_above(address).ok()??.start)
}

/// What mremap(2) would have done with one mapping that registration has split, mapping by mapping.
///
/// Kernels before 6.17 move nothing of it; later ones stop (EFAULT) at the first piece that is registered, and what lies
/// before it has moved by then. Where a piece cannot be moved, those that were are moved back.
unsafe fn move_pieces(
    next: Mremap,
    from: *mut c_void,
    len: usize,
    new_len: usize,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    let is_fixed = flags & libc::MREMAP_FIXED != 0;
    if !is_fixed && flags & libc::MREMAP_MAYMOVE == 0 {
        // It grows where it is or not at all: its last piece does.
        let mut start = 0;
        while let Some(piece) = piece(from.addr() + start, len - start) {
            if start + piece == len {
                let at = from.wrapping_byte_add(start);
                // SAFETY: the caller's memory.
                let result = unsafe { next(at, piece, piece + (new_len - len), 0) };
                return if result == libc::MAP_FAILED { result } else { from };
            }
            start += piece;
        }
        return failed(libc::EFAULT);
    }
    let target = if is_fixed {
        to
    } else {
        let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping touches nothing that exists.
        unsafe { libc::mmap(core::ptr::null_mut(), new_len, libc::PROT_NONE, how, -1, 0) }
    };
    if target == libc::MAP_FAILED {
        return target;
    }
    // SAFETY: the caller's memory, and the place it is to move to.
    let (done, cause) = unsafe { move_range(next, from, target, len, new_len) };
    if done == len {
        return target;
    }
    // SAFETY: what was moved goes back to where it was, which is free.
    let (back, _) = unsafe { move_range(next, target, from, done, done) };
    if !is_fixed && back == done {
        // SAFETY: nothing is left there.
        unsafe { libc::munmap(target, new_len) };
    }
    failed(cause)
}

/// Moves `len` bytes mapping by mapping, the last of them growing by what `new_len` is more. How many were moved, and
/// the errno of the one that was not.
unsafe fn move_range(
    next: Mremap,
    from: *mut c_void,
    to: *mut c_void,
    len: usize,
    new_len: usize,
) -> (usize, c_int) {
    let mut done = 0;
    let mut tries = MOVE_TRIES;
    while done < len {
        let at = from.wrapping_byte_add(done);
        let Some(piece) = piece(at.addr(), len - done) else {
            // A hole: what the kernel has moved already, or one of the program's between several mappings.
            match first_behind(at.addr()) {
                Some(first) if first - at.addr() < len - done => done += first - at.addr(),
                _ => return (len, 0),
            }
            continue;
        };
        let new_piece = if done + piece == len { piece + (new_len - len) } else { piece };
        // SAFETY: as the caller says.
        let result = unsafe { next(at, piece, new_piece, MOVES, to.wrapping_byte_add(done)) };
        if result != libc::MAP_FAILED {
            done += piece;
        } else if errno() != libc::EFAULT || tries == 0 {
            return (done, errno());
        } else {
            tries -= 1;
        }
    }
    (done, 0)
}

fn failed(cause: c_int) -> *mut c_void {
    fail(cause);
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
    // SAFETY: the caller's arguments.
    let result = unsafe { next(start, len, advice) };
    if advice == MADV_GUARD_INSTALL && RUNTIME.is_managed() {
        let cause = errno();
        // SAFETY: the caller's arguments.
        unsafe { drop_guarded(next, start, len, result) };
        if result != 0 {
            return fail(cause);
        }
    }
    // Before the runtime is attached as well: other constructors may come first.
    if advice == libc::MADV_WIPEONFORK && result == 0 {
        let from = start.addr() & !(PAGE - 1);
        let to = (start.addr() + len).next_multiple_of(PAGE);
        if !RUNTIME.keep_in_place(from, to) {
            // What is away cannot come back, so a child would have it.
            // SAFETY: the caller's arguments.
            unsafe { next(start, len, libc::MADV_KEEPONFORK) };
            return fail(libc::ENOMEM);
        }
    }
    result
}

/// Says in words, MADV_DONTNEED, that pages are gone where guards have been installed: the kernel says nothing. Guards
/// outlive it. Where the call failed in between, the mappings before that one have their guards.
unsafe fn drop_guarded(next: Madvise, start: *mut c_void, len: usize, result: c_int) {
    if result == 0 {
        // SAFETY: nothing but guards is there.
        unsafe { next(start, len, libc::MADV_DONTNEED) };
        return;
    }
    let Ok(maps) = Maps::open_by_path() else { return };
    let Some(end) = start.addr().checked_add(len) else { return };
    let mut at = start.addr();
    while let Ok(Some(vma)) = maps.at_or_above(at) {
        let (from, to) = (vma.start.max(at), vma.end.min(end));
        if from >= to {
            return;
        }
        let piece = core::ptr::with_exposed_provenance_mut(from);
        // SAFETY: the caller asked for guards here.
        if unsafe { next(piece, to - from, MADV_GUARD_INSTALL) } != 0 {
            return;
        }
        // SAFETY: nothing but guards is there.
        unsafe { next(piece, to - from, libc::MADV_DONTNEED) };
        at = to;
    }
}

/// Stands in front of process_madvise(2).
///
/// # Safety
/// As process_madvise(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn process_madvise(
    process: c_int,
    vector: *const libc::iovec,
    count: usize,
    advice: c_int,
    flags: libc::c_uint,
) -> isize {
    let is_ours =
        matches!(advice, libc::MADV_FREE | libc::MADV_WIPEONFORK | MADV_GUARD_INSTALL) && count <= MAX_VECTOR;
    // Nobody may give this advice to another process: what takes it for no range at all is this one.
    let asked = if is_ours { 0 } else { count };
    // SAFETY: the caller's arguments.
    let result =
        unsafe { libc::syscall(libc::SYS_process_madvise, process, vector, asked, advice, flags) } as isize;
    if !is_ours || result < 0 {
        return result;
    }
    let mut done = 0;
    for index in 0..count {
        // SAFETY: the caller's vector has this many entries.
        let range = unsafe { vector.wrapping_add(index).read() };
        // SAFETY: the caller's range.
        if unsafe { madvise(range.iov_base, range.iov_len, advice) } != 0 {
            return if done > 0 { done } else { -1 };
        }
        done += range.iov_len.cast_signed();
    }
    done
}

/// Most entries of a vector (include/uapi/linux/uio.h, `UIO_MAXIOV`).
const MAX_VECTOR: usize = 1024;

/// Stands in front of shmat(2).
///
/// # Safety
/// As shmat(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn shmat(id: c_int, at: *const c_void, flags: c_int) -> *mut c_void {
    let next = SHMAT.find();
    // SAFETY: the address is that of the C library's shmat.
    let next: Shmat = unsafe { core::mem::transmute::<usize, Shmat>(next) };
    if flags & libc::SHM_REMAP != 0 && !at.is_null() && RUNTIME.is_managed() {
        // Whatever can be refused is tried elsewhere first: then nothing is lost.
        let elsewhere = flags & !(libc::SHM_REMAP | libc::SHM_RND);
        // SAFETY: at a place that the kernel picks nothing is.
        let trial = unsafe { next(id, core::ptr::null(), elsewhere) };
        if trial == libc::MAP_FAILED {
            return trial;
        }
        // SAFETY: just attached.
        unsafe { libc::shmdt(trial) };
        if let Some(len) = segment_len(id) {
            let is_rounded = flags & libc::SHM_RND != 0;
            let from = if is_rounded { at.addr() & !(PAGE - 1) } else { at.addr() };
            let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
            // SAFETY: the caller gives up what is mapped there. An address that is no page's is refused, here and below.
            unsafe { libc::mmap(core::ptr::with_exposed_provenance_mut(from), len, libc::PROT_NONE, how, -1, 0) };
        }
    }
    // SAFETY: the caller's arguments.
    unsafe { next(id, at, flags) }
}

/// Bytes of a System V shared memory segment, as pages.
fn segment_len(id: c_int) -> Option<usize> {
    let mut status = core::mem::MaybeUninit::<libc::shmid_ds>::uninit();
    // SAFETY: writes the structure, whole.
    if unsafe { libc::shmctl(id, libc::IPC_STAT, status.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: written by the kernel.
    let status = unsafe { status.assume_init() };
    Some(status.shm_segsz.next_multiple_of(PAGE))
}
