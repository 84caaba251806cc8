//! Memory of our own: private anonymous mappings that no other component knows.

use crate::{PAGE, Result};
use core::ffi::CStr;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use syscalls::{Sysno, syscall};

/// Every live [`Mapping`] of this process, so that nobody takes spmem's own memory for the program's. Names in
/// /proc/PID/maps would tell as well, but not every kernel keeps them (CONFIG_ANON_VMA_NAME).
static OWN: [Own; MAX_MAPPINGS] =
    [const { Own { start: AtomicUsize::new(0), end: AtomicUsize::new(0), is_kept: AtomicBool::new(false) } };
        MAX_MAPPINGS];
/// Entries of [`OWN`] from this one on were never used.
static OWN_EVER: AtomicUsize = AtomicUsize::new(0);
/// Most mappings at a time.
const MAX_MAPPINGS: usize = 1024;

struct Own {
    start: AtomicUsize,
    end: AtomicUsize,
    /// A forked child does not have it.
    is_kept: AtomicBool,
}

/// The first of our own mappings that overlaps a range, as its bounds.
pub fn own_in(start: usize, end: usize) -> Option<(usize, usize)> {
    let ever = OWN_EVER.load(Ordering::Acquire).min(MAX_MAPPINGS);
    // The start is written before, and cleared after, the end: an end that is not 0 has its start.
    OWN[..ever]
        .iter()
        .map(|own| (own.end.load(Ordering::Acquire), &own.start))
        .filter(|&(to, from)| to > start && from.load(Ordering::Acquire) < end)
        .map(|(to, from)| (from.load(Ordering::Acquire), to))
        .min()
}

pub(crate) fn note_own(start: usize, end: usize) -> Result<()> {
    for (index, own) in OWN.iter().enumerate() {
        if own.start.compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            own.is_kept.store(false, Ordering::Relaxed);
            own.end.store(end, Ordering::Release);
            OWN_EVER.fetch_max(index + 1, Ordering::AcqRel);
            return Ok(());
        }
    }
    Err(crate::Errno::ENOMEM)
}

pub(crate) fn forget_own(start: usize) {
    if let Some(own) = OWN.iter().find(|own| own.start.load(Ordering::Acquire) == start) {
        own.forget();
    }
}

impl Own {
    fn forget(&self) {
        self.end.store(0, Ordering::Release);
        self.start.store(0, Ordering::Release);
    }
}

/// A forked child does not get a mapping of our own.
pub(crate) fn keep_from_children(start: usize, len: usize) -> Result<()> {
    // SAFETY: changes what fork does, nothing here.
    unsafe { syscall!(Sysno::madvise, start, len, libc::MADV_DONTFORK) }?;
    if let Some(own) = OWN.iter().find(|own| own.start.load(Ordering::Acquire) == start) {
        own.is_kept.store(true, Ordering::Relaxed);
    }
    Ok(())
}

/// In a forked child: what was [kept](Mapping::keep_from_children) from it is not there.
pub fn forget_kept() {
    OWN.iter().filter(|own| own.is_kept.swap(false, Ordering::Relaxed)).for_each(Own::forget);
}

/// Where the next mapping is to be; 0 before the first.
static PLACE: AtomicUsize = AtomicUsize::new(0);
/// Our own part of the address space, between the heap of a position-independent program and where the kernel puts
/// mappings: a program that frees a range and maps it again must not find us there.
const PLACES: core::ops::Range<usize> = 0x4000_0000_0000..0x4fff_0000_0000;
/// Left free between two mappings.
const GAP: usize = 1 << 20;

/// A place for `len` bytes, for mmap(2) to take as a hint; 0 (anywhere) once our part is used up, or for more than it has.
pub(crate) fn next_place(len: usize) -> usize {
    if len > PLACES.end - PLACES.start {
        return 0;
    }
    if PLACE.load(Ordering::Relaxed) == 0 {
        // As unpredictable as the time: the kernel's own randomness is in the stack's address too.
        let here = core::ptr::from_ref(&len).addr() as u64;
        let random = (here ^ crate::process::now_ns()).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 36;
        let first = PLACES.start + usize::try_from(random).unwrap_or(0) * PAGE;
        let _ = PLACE.compare_exchange(0, first, Ordering::Relaxed, Ordering::Relaxed);
    }
    let place = PLACE.fetch_add(len.next_multiple_of(PAGE) + GAP, Ordering::Relaxed);
    if PLACES.contains(&(place + len)) { place } else { 0 }
}

const PR_SET_VMA: i32 = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: usize = 0;

/// A private anonymous mapping, zero at first, unmapped when dropped. Takes RAM only where it was written.
#[derive(Debug)]
pub struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain memory that this value owns; nothing ties it to a thread.
unsafe impl Send for Mapping {}
// SAFETY: shared access only reads.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes (rounded up to pages), without reserving swap or populating, named `[anon:NAME]` where the
    /// kernel can (5.17+).
    ///
    /// # Errors
    /// `ENOMEM` when address space or RLIMIT_AS is exhausted.
    pub fn new(len: usize, name: &CStr) -> Result<Self> {
        Self::aligned(len, PAGE, name)
    }

    /// As [`Mapping::new`], its start a multiple of `align` (a power of two, at least a page).
    ///
    /// # Errors
    /// As [`Mapping::new`].
    pub fn aligned(len: usize, align: usize, name: &CStr) -> Result<Self> {
        let mapping = Self::reserve(len, align, name)?;
        mapping.commit(mapping.len)?;
        Ok(mapping)
    }

    /// As [`Mapping::aligned`], but inaccessible until it is [committed](Mapping::commit): not even mlockall(2) fills it.
    ///
    /// # Errors
    /// As [`Mapping::new`].
    pub fn reserve(len: usize, align: usize, name: &CStr) -> Result<Self> {
        let len = len.next_multiple_of(PAGE);
        let slack = align - PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let hint = next_place(len + slack);
        // SAFETY: a new mapping at a place the kernel picks touches nothing that exists.
        let start = unsafe { syscall!(Sysno::mmap, hint, len + slack, libc::PROT_NONE, flags, -1_isize, 0) }?;
        let base = start.next_multiple_of(align);
        unmap(start, base - start);
        unmap(base + len, start + slack - base);
        // Still inaccessible: nobody can have taken it for the program's.
        if let Err(errno) = note_own(base, base + len) {
            unmap(base, len);
            return Err(errno);
        }
        // Under mlockall(MCL_FUTURE) the kernel would populate what becomes accessible.
        // SAFETY: concerns the range just mapped.
        let _ = unsafe { syscall!(Sysno::munlock, base, len) };
        let name = name.as_ptr();
        // SAFETY: the range is ours; the name is NUL-terminated. Failure (an older kernel) costs the name only.
        let _ = unsafe { syscall!(Sysno::prctl, PR_SET_VMA, PR_SET_VMA_ANON_NAME, base, len, name) };
        // SAFETY: advice about our own range. A forked child keeps it; khugepaged must not fill it with huge pages.
        let _ = unsafe { syscall!(Sysno::madvise, base, len, libc::MADV_NOHUGEPAGE) };
        Ok(Self { base: core::ptr::with_exposed_provenance_mut(base), len })
    }

    /// Makes the first `len` bytes accessible.
    ///
    /// # Errors
    /// As mprotect(2): `ENOMEM` where the system does not overcommit.
    pub fn commit(&self, len: usize) -> Result<()> {
        self.check(0, len);
        // SAFETY: the range is ours; what was accessible stays so.
        unsafe { syscall!(Sysno::mprotect, self.start(), len, libc::PROT_READ | libc::PROT_WRITE) }?;
        Ok(())
    }

    /// Maps the memfd `fd` shared, `len` bytes from its start.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn shared(fd: i32, len: usize) -> Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place the kernel picks touches nothing that exists.
        let base = unsafe { syscall!(Sysno::mmap, next_place(len), len, prot, libc::MAP_SHARED, fd, 0) }?;
        Ok(Self { base: core::ptr::with_exposed_provenance_mut(base), len })
    }

    /// A forked child does not get it, and calls [`forget_kept`].
    ///
    /// # Errors
    /// As madvise(2).
    pub fn keep_from_children(&self) -> Result<()> {
        keep_from_children(self.start(), self.len)
    }

    /// A forked child finds it empty.
    ///
    /// # Errors
    /// As madvise(2).
    pub fn wipe_in_children(&self) -> Result<()> {
        // SAFETY: changes what fork does, nothing here.
        unsafe { syscall!(Sysno::madvise, self.start(), self.len, libc::MADV_WIPEONFORK) }?;
        Ok(())
    }

    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// First address.
    pub fn start(&self) -> usize {
        self.base.expose_provenance()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// A mapping is never empty; here for form's sake.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Gives up ownership: the memory stays mapped for ever.
    pub fn leak(self) -> *mut u8 {
        let base = self.base;
        core::mem::forget(self);
        base
    }

    /// A new mapping of so many words, all zero, for ever. Takes RAM only where it is written.
    ///
    /// # Errors
    /// As [`Mapping::new`].
    pub fn leak_words(words: usize, name: &CStr) -> Result<&'static [AtomicU64]> {
        let base = Self::new((words * size_of::<AtomicU64>()).max(1), name)?.leak();
        // SAFETY: mapped for ever, page-aligned, long enough, zero; nobody else knows the address.
        Ok(unsafe { core::slice::from_raw_parts(base.cast(), words) })
    }

    /// The same of bytes.
    ///
    /// # Errors
    /// As [`Mapping::new`].
    pub fn leak_bytes(bytes: usize, name: &CStr) -> Result<&'static [AtomicU8]> {
        let base = Self::new(bytes.max(1), name)?.leak();
        // SAFETY: as in `leak_words`.
        Ok(unsafe { core::slice::from_raw_parts(base.cast(), bytes) })
    }

    /// `len` bytes from `offset`.
    ///
    /// # Panics
    /// When the range does not lie in the mapping.
    pub fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        self.check(offset, len);
        // SAFETY: in bounds, mapped readable for as long as `self`, and shared access only reads.
        unsafe { core::slice::from_raw_parts(self.base.wrapping_add(offset), len) }
    }

    /// `len` bytes from `offset`, to write.
    ///
    /// # Panics
    /// When the range does not lie in the mapping.
    pub fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        self.check(offset, len);
        // SAFETY: in bounds, mapped writable for as long as `self`, which is borrowed mutably.
        unsafe { core::slice::from_raw_parts_mut(self.base.wrapping_add(offset), len) }
    }

    /// Gives the RAM of whole pages back; they read as zero afterwards.
    ///
    /// # Panics
    /// When the range does not lie in the mapping or is not page-aligned.
    pub fn discard(&mut self, offset: usize, len: usize) {
        self.check(offset, len);
        assert!(offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE), "whole pages only");
        discard(self.start() + offset, len);
    }

    fn check(&self, offset: usize, len: usize) {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len), "{offset}+{len} lies outside a mapping of {}", self.len);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.start(), self.len);
        forget_own(self.start());
    }
}

/// madvise(MADV_DONTNEED) on a range of our own.
pub fn discard(start: usize, len: usize) {
    let result = try_discard(start, len);
    debug_assert!(result.is_ok(), "MADV_DONTNEED on our own mapping");
}

/// The same, by a thread of the program.
///
/// # Errors
/// What a seccomp filter of the program's answers.
pub fn try_discard(start: usize, len: usize) -> Result<()> {
    // SAFETY: callers pass ranges that spmem mapped itself and holds no references into.
    unsafe { syscall!(Sysno::madvise, start, len, libc::MADV_DONTNEED) }?;
    Ok(())
}

/// madvise(MADV_POPULATE_WRITE): makes each page of a program's range writable and its own, contents unchanged. A
/// page shared since a fork becomes exclusive. May fault: hold no lock that the fault handler needs.
///
/// # Errors
/// As madvise(2).
pub fn populate_write(start: usize, len: usize) -> Result<()> {
    // SAFETY: populating changes no byte.
    unsafe { syscall!(Sysno::madvise, start, len, libc::MADV_POPULATE_WRITE) }?;
    Ok(())
}

/// madvise(MADV_POPULATE_READ): makes each page of a program's range present, contents unchanged. May fault: hold no
/// lock that the fault handler needs.
///
/// # Errors
/// As madvise(2): `EFAULT` where the program may not read; `EHWPOISON` where memory has failed.
pub fn populate_read(start: usize, len: usize) -> Result<()> {
    // SAFETY: populating changes no byte.
    unsafe { syscall!(Sysno::madvise, start, len, libc::MADV_POPULATE_READ) }?;
    Ok(())
}

pub(crate) fn unmap(start: usize, len: usize) {
    if len > 0 {
        // SAFETY: the range was mapped by this module and nothing refers to it any more.
        let _ = unsafe { syscall!(Sysno::munmap, start, len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_no_mapping_can_have_is_refused_and_takes_nobodys_place() {
        assert!(Mapping::new(usize::MAX - PAGE + 1, c"spmem test").is_err());
        assert_eq!(next_place(usize::MAX), 0);
        assert!(PLACES.contains(&next_place(PAGE)));
    }

    #[test]
    fn a_mapping_is_aligned_and_discarded_pages_read_as_zero() {
        let mut mapping = Mapping::aligned(3 * PAGE, 2 << 20, c"spmem test").expect("mmap");
        assert!(mapping.start().is_multiple_of(2 << 20));
        mapping.bytes_mut(0, 3 * PAGE).fill(7);
        mapping.discard(PAGE, PAGE);
        assert!(mapping.bytes(PAGE, PAGE).iter().all(|&b| b == 0));
        assert!(mapping.bytes(2 * PAGE, PAGE).iter().all(|&b| b == 7));
    }
}
