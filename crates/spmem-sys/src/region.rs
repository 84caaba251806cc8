//! Memory of a byte-addressable node: of a NUMA node, a file or a dax device, mapped shared.
//!
//! [`Region`] is read and written in words, each by one atomic access: other mappings, of other processes too, may change
//! it at any time, so it is never a slice. [`Region::flush`] makes what was written durable in the way that the mapping
//! needs, [`Region::invalidate`] has the next read come from the memory itself. Takes no lock but the kernel's.
//!
//! Hole: a word whose memory is broken ends the reader with SIGBUS; the address tells which frame it was.

use core::arch::asm;
use core::ffi::CStr;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use syscalls::{Sysno, syscall};

use crate::fd::{Fd, raw_fd};
use crate::mapping::{forget_own, next_place, note_own, populate_write, unmap};
use crate::mempolicy::{bind, count_elsewhere, prefer};
use crate::{Errno, PAGE, Result};

/// Of the processor's cache, x86-64.
pub const LINE: usize = 64;
const WORD: usize = 8;

/// What may be done through a mapping; the kernel enforces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading. A write is SIGSEGV, or EFAULT in a system call.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// What makes a write durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Nothing does: the memory is not persistent.
    Volatile,
    /// Writing back the processor's cache lines: persistent memory, mapped with MAP_SYNC or as a device.
    CacheLines,
    /// msync(2): everything else.
    Writeback,
}

/// A shared mapping, unmapped when dropped. It keeps its file open.
#[derive(Debug)]
pub struct Region {
    fd: Fd,
    /// Where in the file it begins.
    offset: u64,
    base: *mut u8,
    len: usize,
    access: Access,
    durability: Durability,
}

// SAFETY: the mapping belongs to this value; nothing ties it to a thread.
unsafe impl Send for Region {}
// SAFETY: every access is one atomic operation, or a system call.
unsafe impl Sync for Region {}

impl Region {
    /// The first `len` bytes of a file that has room for them. Durable by cache lines where the file system offers
    /// MAP_SYNC (ext4 or xfs with dax, on persistent memory), by msync(2) elsewhere.
    ///
    /// # Errors
    /// `EINVAL` for a length that is not whole pages; as mmap(2).
    pub fn of_file(fd: Fd, len: usize, access: Access) -> Result<Self> {
        let synchronous = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
        match map(&fd, 0, len, access, synchronous) {
            Ok(base) => Self::new(fd, 0, base, len, access, Durability::CacheLines),
            Err(Errno::EOPNOTSUPP | Errno::EINVAL) => {
                let base = map(&fd, 0, len, access, libc::MAP_SHARED)?;
                Self::new(fd, 0, base, len, access, Durability::Writeback)
            }
            Err(errno) => Err(errno),
        }
    }

    /// The first `len` bytes of a dax device whose mappings are in multiples of `align` bytes (its `align` in sysfs).
    /// `durability` is `CacheLines` for persistent memory and `Volatile` for other.
    ///
    /// # Errors
    /// `EINVAL` when the length is no multiple of `align`; as mmap(2).
    pub fn of_device(fd: Fd, len: usize, align: usize, access: Access, durability: Durability) -> Result<Self> {
        if align == 0 || !len.is_multiple_of(align) {
            return Err(Errno::EINVAL);
        }
        // The driver finds an aligned place by itself, if it is not told one.
        let base = map_at(0, &fd, 0, len, access, libc::MAP_SHARED)?;
        Self::new(fd, 0, base, len, access, durability)
    }

    /// `len` bytes of zeros on a node of the kernel's, all of them there and seen to be there. A memfd, so that others can
    /// map them; its policy is shared with them and keeps the kernel from moving pages elsewhere.
    ///
    /// # Errors
    /// `EINVAL` when there is no such node, it has no memory, or the caller's cpuset lacks it; `EXDEV` when the kernel put
    /// pages elsewhere, as it does once the node is full; as memfd_create(2), mmap(2), mbind(2), move_pages(2).
    pub fn on_node(len: usize, node: u16) -> Result<Self> {
        let name = c"spmem node";
        // SAFETY: the name is NUL-terminated and outlives the call.
        let raw = unsafe { syscall!(Sysno::memfd_create, name.as_ptr(), libc::MFD_CLOEXEC) }?;
        let fd = Fd::from_raw(raw_fd(raw));
        // SAFETY: takes no pointer.
        unsafe { syscall!(Sysno::ftruncate, fd.raw(), len) }?;
        let base = map(&fd, 0, len, Access::ReadWrite, libc::MAP_SHARED)?;
        let region = Self::new(fd, 0, base, len, Access::ReadWrite, Durability::Volatile)?;
        // Bound to only once all is there: the kernel ends processes, anybody's, when a node that is bound to is full.
        prefer(region.start(), len, node)?;
        populate_write(region.start(), len)?;
        if region.pages_elsewhere(node)?.0 > 0 {
            return Err(Errno::EXDEV);
        }
        bind(region.start(), len, node)?;
        Ok(region)
    }

    /// `len` bytes of zeros in a memfd that /proc calls `memfd:name`. This mapping, and what a fork makes of it, can write there; others
    /// that get hold of the file can read (`F_SEAL_FUTURE_WRITE`, memfd_create(2)).
    ///
    /// # Errors
    /// As memfd_create(2), mmap(2).
    pub fn published(name: &CStr, len: usize) -> Result<Self> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is NUL-terminated and outlives the call.
        let raw = unsafe { syscall!(Sysno::memfd_create, name.as_ptr(), flags) }?;
        let fd = Fd::from_raw(raw_fd(raw));
        // SAFETY: takes no pointer.
        unsafe { syscall!(Sysno::ftruncate, fd.raw(), len) }?;
        let base = map(&fd, 0, len, Access::ReadWrite, libc::MAP_SHARED)?;
        let region = Self::new(fd, 0, base, len, Access::ReadWrite, Durability::Volatile)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
        // SAFETY: takes no pointer.
        unsafe { syscall!(Sysno::fcntl, region.fd.raw(), libc::F_ADD_SEALS, seals) }?;
        Ok(region)
    }

    /// Another mapping of a part of it, `offset` from its beginning, for whoever is to have it with other rights. The bounds are
    /// whole pages, of a dax device whole multiples of its alignment.
    ///
    /// # Errors
    /// `EINVAL` for a part that does not lie in it; as mmap(2).
    pub fn view(&self, offset: usize, len: usize, access: Access) -> Result<Self> {
        self.check(offset, len, PAGE)?;
        let fd = self.fd.duplicate(3)?;
        let at = self.offset + offset as u64;
        let flags = libc::MAP_SHARED;
        // Where the driver wants alignment it finds the place.
        let base = map(&fd, at, len, access, flags).or_else(|_| map_at(0, &fd, at, len, access, flags))?;
        Self::new(fd, at, base, len, access, self.durability)
    }

    fn new(fd: Fd, offset: u64, base: usize, len: usize, access: Access, durability: Durability) -> Result<Self> {
        if let Err(errno) = note_own(base, base + len) {
            unmap(base, len);
            return Err(errno);
        }
        Ok(Self { fd, offset, base: core::ptr::with_exposed_provenance_mut(base), len, access, durability })
    }

    /// A forked child does not get it.
    ///
    /// # Errors
    /// As madvise(2).
    pub fn keep_from_children(&self) -> Result<()> {
        // SAFETY: changes what fork does, nothing here.
        unsafe { syscall!(Sysno::madvise, self.start(), self.len, libc::MADV_DONTFORK) }?;
        Ok(())
    }

    /// First address.
    pub fn start(&self) -> usize {
        self.base.expose_provenance()
    }

    /// Bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Always false; for the sake of convention.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What may be done with it.
    pub const fn access(&self) -> Access {
        self.access
    }

    /// What makes a write durable.
    pub const fn durability(&self) -> Durability {
        self.durability
    }

    /// Its file.
    pub const fn fd(&self) -> &Fd {
        &self.fd
    }

    /// How many pages are not on a node, of how many: as move_pages(2) tells.
    ///
    /// # Errors
    /// As move_pages(2).
    pub fn pages_elsewhere(&self, node: u16) -> Result<(usize, usize)> {
        count_elsewhere(self.start(), self.len, node)
    }

    /// Reads words from `offset` on, both multiples of 8 bytes.
    ///
    /// # Errors
    /// `EINVAL` for a range that is not in it, or not of words.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        self.check(offset, into.len(), WORD)?;
        for (word, bytes) in self.words(offset).zip(into.as_chunks_mut::<WORD>().0) {
            // Relaxed: whoever hands memory over orders it himself.
            *bytes = word.load(Ordering::Relaxed).to_le_bytes();
        }
        Ok(())
    }

    /// Writes words from `offset` on, both multiples of 8 bytes; each word at once.
    ///
    /// # Errors
    /// `EINVAL` as [`Region::read`]; `EACCES` when it may only be read.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.check_write(offset, bytes.len())?;
        for (word, bytes) in self.words(offset).zip(bytes.as_chunks::<WORD>().0) {
            // Release: a word that says that something is there comes after what it speaks of.
            word.store(u64::from_le_bytes(*bytes), Ordering::Release);
        }
        Ok(())
    }

    /// Writes zeros.
    ///
    /// # Errors
    /// As [`Region::write`].
    pub fn zero(&self, offset: usize, len: usize) -> Result<()> {
        self.check_write(offset, len)?;
        self.words(offset).take(len / WORD).for_each(|word| word.store(0, Ordering::Relaxed));
        Ok(())
    }

    /// Makes what was written durable; it is so when this returns.
    ///
    /// # Errors
    /// `EINVAL` for a range that is not in it; as msync(2): `EIO` when the medium did not take it.
    pub fn flush(&self, offset: usize, len: usize) -> Result<()> {
        self.check(offset, len, 1)?;
        match self.durability {
            Durability::Volatile => {}
            Durability::CacheLines => {
                let write_back = LineWriteBack::of_processor();
                self.for_each_line(offset, len, |line| write_back.line(line));
                store_fence();
            }
            Durability::Writeback => {
                let first = offset / PAGE * PAGE;
                let end = offset + len;
                // SAFETY: a range of our own mapping.
                unsafe { syscall!(Sysno::msync, self.start() + first, end - first, libc::MS_SYNC) }?;
            }
        }
        Ok(())
    }

    /// The next read comes from the memory itself: what a cache of this host holds of it is dropped, after it was written back.
    ///
    /// # Errors
    /// `EINVAL` for a range that is not in it.
    pub fn invalidate(&self, offset: usize, len: usize) -> Result<()> {
        self.check(offset, len, 1)?;
        full_fence();
        self.for_each_line(offset, len, |line| {
            // SAFETY: clflush of a mapped address changes no byte; it needs SSE2, which x86-64 has.
            unsafe { core::arch::x86_64::_mm_clflush(line) };
        });
        full_fence();
        Ok(())
    }

    fn words(&self, offset: usize) -> impl Iterator<Item = &AtomicU64> {
        (offset..self.len).step_by(WORD).map(|at| {
            let word = self.base.wrapping_add(at).cast::<AtomicU64>();
            // SAFETY: mapped for as long as `self`, aligned because the base is a page and callers check the offset, and
            // accessed by atomic operations only; where it may only be read, nobody stores (`check_write`).
            unsafe { &*word }
        })
    }

    fn for_each_line(&self, offset: usize, len: usize, mut each: impl FnMut(*const u8)) {
        for at in (offset / LINE * LINE..offset + len).step_by(LINE) {
            each(self.base.wrapping_add(at));
        }
    }

    fn check(&self, offset: usize, len: usize, unit: usize) -> Result<()> {
        let end = offset.checked_add(len).filter(|&end| end <= self.len);
        if end.is_some() && offset.is_multiple_of(unit) && len.is_multiple_of(unit) {
            Ok(())
        } else {
            Err(Errno::EINVAL)
        }
    }

    fn check_write(&self, offset: usize, len: usize) -> Result<()> {
        if self.access == Access::Read {
            return Err(Errno::EACCES);
        }
        self.check(offset, len, WORD)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        unmap(self.start(), self.len);
        forget_own(self.start());
    }
}

fn map(fd: &Fd, offset: u64, len: usize, access: Access, flags: i32) -> Result<usize> {
    map_at(next_place(len), fd, offset, len, access, flags)
}

pub(crate) fn map_at(hint: usize, fd: &Fd, offset: u64, len: usize, access: Access, flags: i32) -> Result<usize> {
    if len == 0 || !len.is_multiple_of(PAGE) {
        return Err(Errno::EINVAL);
    }
    let prot = match access {
        Access::Read => libc::PROT_READ,
        Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
    };
    // SAFETY: a new mapping at a place the kernel picks touches nothing that exists.
    Ok(unsafe { syscall!(Sysno::mmap, hint, len, prot, flags, fd.raw(), offset) }?)
}

/// How this processor writes a cache line back.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum LineWriteBack {
    /// Keeps the line; not ordered but by a fence.
    Clwb = 1,
    /// Drops the line; not ordered but by a fence.
    ClflushOpt,
    /// Drops the line, one after the other.
    Clflush,
}

impl LineWriteBack {
    fn of_processor() -> Self {
        /// 0: not asked yet. Relaxed: everybody finds the same answer.
        static KNOWN: AtomicU8 = AtomicU8::new(0);
        match KNOWN.load(Ordering::Relaxed) {
            1 => return Self::Clwb,
            2 => return Self::ClflushOpt,
            3 => return Self::Clflush,
            _ => {}
        }
        // Leaf 7: bit 24 of EBX is CLWB, bit 23 CLFLUSHOPT.
        let ebx = core::arch::x86_64::__cpuid_count(7, 0).ebx;
        let known = match ebx {
            _ if ebx >> 24 & 1 != 0 => Self::Clwb,
            _ if ebx >> 23 & 1 != 0 => Self::ClflushOpt,
            _ => Self::Clflush,
        };
        KNOWN.store(known as u8, Ordering::Relaxed);
        known
    }

    fn line(self, line: *const u8) {
        match self {
            // SAFETY: the processor has it; writing a mapped line back changes no byte.
            Self::Clwb => unsafe { asm!("clwb [{}]", in(reg) line, options(nostack, preserves_flags)) },
            // SAFETY: as above.
            Self::ClflushOpt => unsafe {
                asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags))
            },
            // SAFETY: every x86-64 processor has it; it changes no byte.
            Self::Clflush => unsafe { core::arch::x86_64::_mm_clflush(line) },
        }
    }
}

/// What was written back before is durable.
fn store_fence() {
    // SAFETY: orders stores, nothing else; it needs SSE, which x86-64 has.
    unsafe { core::arch::x86_64::_mm_sfence() };
}

fn full_fence() {
    // SAFETY: orders accesses, nothing else; it needs SSE2, which x86-64 has.
    unsafe { core::arch::x86_64::_mm_mfence() };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_view_writes_another_reads_and_one_that_may_not_write_does_not() {
        let region = Region::on_node(4 * PAGE, 0).expect("every machine has node 0");
        assert_eq!(region.pages_elsewhere(0), Ok((0, 4)));
        region.write(PAGE, &[7; 64]).expect("it may be written");
        let view = region.view(PAGE, PAGE, Access::Read).expect("mmap");
        let mut back = [0; 64];
        view.read(0, &mut back).expect("it may be read");
        assert_eq!(back, [7; 64]);
        assert_eq!(view.write(0, &[1; 8]), Err(Errno::EACCES));
        region.zero(PAGE, 32).expect("it may be written");
        view.read(0, &mut back).expect("it may be read");
        assert!(back[..32] == [0; 32] && back[32..] == [7; 32]);
    }

    #[test]
    fn what_lies_outside_or_is_no_word_is_refused() {
        let region = Region::on_node(PAGE, 0).expect("every machine has node 0");
        let mut back = [0; 16];
        for (offset, len) in [(PAGE, 8), (PAGE - 8, 16), (4, 8), (0, 7), (usize::MAX, 8)] {
            assert_eq!(region.read(offset, &mut back[..len]), Err(Errno::EINVAL), "{offset}");
            assert_eq!(region.write(offset, &back[..len]), Err(Errno::EINVAL), "{offset}");
        }
        assert_eq!(region.flush(PAGE, 1), Err(Errno::EINVAL));
        assert_eq!(Region::on_node(PAGE, 1023).map(|region| region.len()), Err(Errno::EINVAL));
        assert_eq!(Region::on_node(PAGE + 1, 0).map(|region| region.len()), Err(Errno::EINVAL));
    }

    #[test]
    fn every_way_to_write_a_line_back_leaves_its_bytes() {
        let region = Region::on_node(PAGE, 0).expect("every machine has node 0");
        region.write(0, &[5; PAGE]).expect("it may be written");
        let way = LineWriteBack::of_processor();
        for way in [way, LineWriteBack::Clflush] {
            region.for_each_line(0, PAGE, |line| way.line(line));
            store_fence();
        }
        region.invalidate(0, PAGE).expect("all of it");
        let mut back = [0; PAGE];
        region.read(0, &mut back).expect("it may be read");
        assert_eq!(back, [5; PAGE]);
    }
}
