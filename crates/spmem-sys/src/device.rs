//! Parts of a dax device that are mapped, and copied to and from by the kernel.
//!
//! Who touches mapped memory that has gone (the device was disabled, its memory has failed) gets SIGBUS, which a thread that blocks
//! signals does not survive. So [`Part`] has the kernel do it: a system call answers `EFAULT`. The calls are write(2) and read(2) of a
//! [`Pipe`]: what a program's seccomp filter lets through before all else.
//!
//! Hole: when the kernel learns of failed memory because it was read so, it also sends SIGBUS to who read it, a device's memory
//! being nothing that it could replace (mm/memory-failure.c, `mf_generic_kill_procs`).

use syscalls::{Sysno, syscall};

use crate::fd::Fd;
use crate::mapping::{forget_own, keep_from_children, next_place, note_own, populate_read, populate_write, unmap};
use crate::region::{Access, map_at};
use crate::{Errno, PAGE, Result};

/// A pipe with both ends. One thread at a time.
#[derive(Debug)]
pub struct Pipe {
    reader: Fd,
    writer: Fd,
}

impl Pipe {
    /// # Errors
    /// As pipe2(2).
    pub fn new() -> Result<Self> {
        let mut ends = [-1_i32; 2];
        // One that is full, which is as large as the user's other pipes leave it (pipe(7)), is emptied and filled again.
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the kernel writes two descriptors there.
        unsafe { syscall!(Sysno::pipe2, ends.as_mut_ptr(), flags) }?;
        Ok(Self { reader: Fd::from_raw(ends[0]), writer: Fd::from_raw(ends[1]) })
    }

    /// Gives up the descriptors without closing them: in a forked child, whose table has other ones of these numbers.
    pub fn forget(self) {
        self.reader.into_raw();
        self.writer.into_raw();
    }

    /// Copies bytes; the pipe is empty before and after.
    ///
    /// # Safety
    /// Nobody relies on the `len` bytes from `to`, and nobody else uses the pipe meanwhile.
    unsafe fn carry(&self, from: usize, to: usize, len: usize) -> Result<()> {
        let mut done = 0;
        while done < len {
            // SAFETY: the kernel reads there what can be read.
            let filled = unsafe { syscall!(Sysno::write, self.writer.raw(), from + done, len - done) };
            let end = done + self.moved(filled)?;
            while done < end {
                // SAFETY: the caller's promise.
                let read = unsafe { syscall!(Sysno::read, self.reader.raw(), to + done, end - done) };
                done += self.moved(read)?;
            }
        }
        Ok(())
    }

    /// Bytes that a call has moved: at least one, or the pipe is empty again.
    fn moved(&self, result: core::result::Result<usize, syscalls::Errno>) -> Result<usize> {
        match result {
            // What a seccomp filter makes of a call that it does not let through.
            Ok(0) => Err(Errno::EIO),
            Ok(moved) => Ok(moved),
            Err(errno) => Err(errno.into()),
        }
        .inspect_err(|_| self.empty())
    }

    fn empty(&self) {
        let mut rest = [0_u8; 512];
        // SAFETY: `rest` is writable for its whole length.
        while unsafe { syscall!(Sysno::read, self.reader.raw(), rest.as_mut_ptr(), rest.len()) }
            .is_ok_and(|read| read > 0)
        {}
    }
}

/// A part of a dax device, mapped shared; unmapped when dropped. It keeps no descriptor, and the device open.
#[derive(Debug)]
pub struct Part {
    start: usize,
    len: usize,
    access: Access,
}

impl Part {
    /// Maps `len` bytes from `offset`, both multiples of `align`, in which the device is mapped (`align` in sysfs).
    ///
    /// # Errors
    /// `EINVAL` for what is no multiple; as mmap(2).
    pub fn map(fd: &Fd, offset: u64, len: usize, align: usize, access: Access) -> Result<Self> {
        if align == 0 || !len.is_multiple_of(align) || !offset.is_multiple_of(align as u64) {
            return Err(Errno::EINVAL);
        }
        let map = |hint| map_at(hint, fd, offset, len, access, libc::MAP_SHARED);
        // The driver takes a place as it is, or finds one itself.
        let start = map(next_place(len + align).next_multiple_of(align)).or_else(|_| map(0))?;
        if let Err(errno) = note_own(start, start + len) {
            unmap(start, len);
            return Err(errno);
        }
        Ok(Self { start, len, access })
    }

    /// A forked child does not get it.
    ///
    /// # Errors
    /// As madvise(2).
    pub fn keep_from_children(&self) -> Result<()> {
        keep_from_children(self.start, self.len)
    }

    /// Reads bytes from `offset` on.
    ///
    /// # Errors
    /// `EFAULT` or `EHWPOISON` where the memory has gone; `EINVAL` outside of it; `ENOMEM`.
    pub fn load(&self, offset: usize, into: &mut [u8], pipe: &Pipe) -> Result<()> {
        let from = self.check(offset, into.len())?;
        // SAFETY: `into` is writable for its whole length.
        let carry =
            |into: &mut [u8]| unsafe { pipe.carry(from, into.as_mut_ptr().expose_provenance(), into.len()) };
        match carry(into) {
            // Also where the kernel has no memory for its tables.
            Err(Errno::EFAULT) => {
                let (start, len) = pages_of(from, into.len());
                populate_read(start, len)?;
                carry(into)
            }
            carried => carried,
        }
    }

    /// Writes bytes from `offset` on.
    ///
    /// # Errors
    /// As [`Part::load`]; `EACCES` when it may only be read.
    pub fn store(&self, offset: usize, bytes: &[u8], pipe: &Pipe) -> Result<()> {
        if self.access == Access::Read {
            return Err(Errno::EACCES);
        }
        let to = self.check(offset, bytes.len())?;
        // SAFETY: that memory is never Rust's: it is reached here only.
        let carry = || unsafe { pipe.carry(bytes.as_ptr().expose_provenance(), to, bytes.len()) };
        match carry() {
            Err(Errno::EFAULT) => {
                let (start, len) = pages_of(to, bytes.len());
                populate_write(start, len)?;
                carry()
            }
            carried => carried,
        }
    }

    /// Its address.
    fn check(&self, offset: usize, len: usize) -> Result<usize> {
        let end = offset.checked_add(len).filter(|&end| end <= self.len);
        end.map(|_| self.start + offset).ok_or(Errno::EINVAL)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        unmap(self.start, self.len);
        forget_own(self.start);
    }
}

/// The whole pages that have these bytes.
fn pages_of(start: usize, len: usize) -> (usize, usize) {
    let first = start / PAGE * PAGE;
    (first, (start + len).next_multiple_of(PAGE) - first)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::os::fd::AsRawFd;
    use std::{fs, vec};

    /// A file stands in for a device: what lies beyond its end is SIGBUS, as a device's memory that has gone.
    fn with_file(name: &str, test: impl FnOnce(&fs::File, &Fd)) {
        let path = std::env::temp_dir().join(std::format!("spmem-device-{name}-{}", std::process::id()));
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path).expect("a file");
        fs::remove_file(&path).expect("it is there");
        file.set_len((64 * PAGE) as u64).expect("ftruncate");
        let fd = core::mem::ManuallyDrop::new(Fd::from_raw(file.as_raw_fd()));
        test(&file, &fd);
    }

    #[test]
    fn what_is_stored_is_loaded_through_another_part_however_small_the_pipe_is() {
        with_file("whole", |_, fd| {
            let all = Part::map(fd, 0, 64 * PAGE, PAGE, Access::Read).expect("mmap");
            let window = Part::map(fd, (8 * PAGE) as u64, 40 * PAGE, 8 * PAGE, Access::ReadWrite).expect("mmap");
            let pipe = Pipe::new().expect("pipe");
            let bytes: vec::Vec<u8> = (0..40 * PAGE).map(|at| (at / 7) as u8).collect();
            window.store(0, &bytes, &pipe).expect("store");
            // SAFETY: takes no pointer.
            unsafe { syscall!(Sysno::fcntl, pipe.writer.raw(), libc::F_SETPIPE_SZ, PAGE) }.expect("a small pipe");
            let mut back = vec![0; 40 * PAGE];
            all.load(8 * PAGE, &mut back, &pipe).expect("load");
            assert!(back == bytes);
            assert_eq!(all.store(0, &bytes[..PAGE], &pipe), Err(Errno::EACCES));
            assert_eq!(all.load(63 * PAGE, &mut back[..2 * PAGE], &pipe), Err(Errno::EINVAL));
            assert_eq!(Part::map(fd, PAGE as u64, PAGE, 2 * PAGE, Access::Read).err(), Some(Errno::EINVAL));
        });
    }

    #[test]
    fn memory_that_has_gone_is_an_error_and_what_comes_after_it_is_right() {
        with_file("cut", |file, fd| {
            let part = Part::map(fd, 0, 64 * PAGE, PAGE, Access::ReadWrite).expect("mmap");
            let pipe = Pipe::new().expect("pipe");
            part.store(0, &[3; 8 * PAGE], &pipe).expect("store");
            file.set_len((4 * PAGE) as u64).expect("ftruncate");
            let mut back = [0; 2 * PAGE];
            assert_eq!(part.load(3 * PAGE, &mut back, &pipe), Err(Errno::EFAULT));
            assert_eq!(part.store(3 * PAGE, &[4; 2 * PAGE], &pipe), Err(Errno::EFAULT));
            part.store(0, &[5; PAGE], &pipe).expect("store");
            part.load(0, &mut back, &pipe).expect("load");
            assert!(
                back[..PAGE] == [5; PAGE] && back[PAGE..] == [3; PAGE],
                "nothing of what failed is left in the pipe"
            );
        });
    }
}
