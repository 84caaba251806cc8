//! What pages are copied to: a file, which is read and written, or a dax device, which has no read(2) and write(2) and is mapped.
//!
//! [`Medium`] reads, under its owner's lock; a [`Writer`] is a thread's own, and writes without it, to where an [`Outlet`] says. A device is
//! mapped whole, but to be read only. Written is it through a window, which is as small as the device's alignment allows: of what others have
//! there a stray write of the program reaches no more than lies in it.

use core::mem;

use spmem_core::units::{FrameNumber, PAGE_SIZE};
use spmem_sys::device::{Part, Pipe};
use spmem_sys::fd::Fd;
use spmem_sys::mapping::Mapping;
use spmem_sys::region::Access;
use spmem_sys::{Errno, PAGE, Result};

use super::CLUSTER_BYTES;
use crate::backend::Page;

/// A file or a device that frames are on.
#[derive(Debug)]
pub struct Medium {
    fd: Fd,
    device: Option<Device>,
}

#[derive(Debug)]
struct Device {
    /// Of its mappings, bytes.
    align: usize,
    all: Part,
    pipe: Pipe,
}

/// Where a thread writes; good for as long as the [`Medium`] lives, in its process.
#[derive(Clone, Copy, Debug)]
pub struct Outlet {
    fd: i32,
    /// Of a device: of its mappings, bytes.
    align: Option<usize>,
}

impl Medium {
    /// An open file.
    pub const fn file(fd: Fd) -> Self {
        Self { fd, device: None }
    }

    /// The first `bytes` of an open dax device that is mapped in units of `align` bytes.
    ///
    /// # Errors
    /// `EINVAL` for no alignment; as mmap(2), `ENOMEM` beyond RLIMIT_AS, and pipe2(2).
    pub fn device(fd: Fd, bytes: u64, align: u64) -> Result<Self> {
        let align = usize::try_from(align).ok().filter(|&align| align > 0).ok_or(Errno::EINVAL)?;
        let len = usize::try_from(bytes).map_err(|_| Errno::ENOMEM)?.next_multiple_of(align);
        let all = Part::map(&fd, 0, len, align, Access::Read)?;
        let device = Some(Device { align, all, pipe: Pipe::new()? });
        Ok(Self { fd, device })
    }

    /// For threads that write.
    pub fn outlet(&self) -> Outlet {
        Outlet { fd: self.fd.raw(), align: self.device.as_ref().map(|device| device.align) }
    }

    pub(super) const fn fd(&self) -> &Fd {
        &self.fd
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// As pread(2), and `EIO` for less than a page; of a device `EFAULT`, `EHWPOISON`, `ENOMEM`.
    pub(super) fn load(&self, frame: FrameNumber, page: &mut Page) -> Result<()> {
        match &self.device {
            None => match self.fd.read_at(page, offset(frame))? {
                PAGE => Ok(()),
                _ => Err(Errno::EIO),
            },
            Some(device) => {
                let at = usize::try_from(offset(frame)).map_err(|_| Errno::EINVAL)?;
                device.all.load(at, page, &device.pipe)
            }
        }
    }

    /// In a forked child: this is the file or device in its table of descriptors. What is mapped has come along.
    ///
    /// # Errors
    /// As pipe2(2).
    pub(super) fn adopt(&mut self, fd: Fd) -> Result<()> {
        // The numbers are of the parent's table.
        mem::forget(mem::replace(&mut self.fd, fd));
        if let Some(device) = &mut self.device {
            mem::replace(&mut device.pipe, Pipe::new()?).forget();
        }
        Ok(())
    }
}

fn offset(FrameNumber(frame): FrameNumber) -> u64 {
    u64::from(frame) * PAGE_SIZE
}

/// One thread's way to write pages. A forked child, which has none of its parent's threads, does not get what it maps.
#[derive(Debug)]
pub struct Writer {
    readback: Mapping,
    pipe: Option<Pipe>,
    window: Option<Window>,
}

#[derive(Debug)]
struct Window {
    fd: i32,
    start: u64,
    len: u64,
    part: Part,
}

impl Writer {
    /// For so many pages at a time.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn new(pages: usize) -> Result<Self> {
        let readback = Mapping::new(pages * PAGE, c"spmem readback")?;
        readback.keep_from_children()?;
        Ok(Self { readback, pipe: None, window: None })
    }

    /// Writes pages to frames in a row, and reads them back (R19); how many of them, from the first on, are there as they were.
    ///
    /// # Errors
    /// As pwrite(2) and pread(2): the file has no room, or is broken. Of a device as mmap(2) and pipe2(2), and `EFAULT`.
    pub fn write(&mut self, to: Outlet, first: FrameNumber, pages: &[u8]) -> Result<usize> {
        match to.align {
            None => self.write_to_file(to.fd, first, pages),
            Some(align) => self.write_to_device(to.fd, align, first, pages),
        }
    }

    fn write_to_file(&mut self, fd: i32, first: FrameNumber, pages: &[u8]) -> Result<usize> {
        // The medium's, which closes it.
        let fd = mem::ManuallyDrop::new(Fd::from_raw(fd));
        let written = fd.write_at(pages, offset(first))? / PAGE;
        let readback = self.readback.bytes_mut(0, written * PAGE);
        let read = fd.read_at(readback, offset(first))? / PAGE;
        Ok(count_equal(pages, &readback[..read * PAGE]))
    }

    fn write_to_device(&mut self, fd: i32, align: usize, first: FrameNumber, pages: &[u8]) -> Result<usize> {
        let Self { readback, pipe, window } = self;
        let pipe = match pipe {
            Some(pipe) => pipe,
            none => none.insert(Pipe::new()?),
        };
        let mut done = 0;
        while done < pages.len() {
            let at = offset(first) + done as u64;
            let is_within =
                |window: &&mut Window| window.fd == fd && (window.start..window.start + window.len).contains(&at);
            let window = match window.as_mut().filter(is_within) {
                Some(window) => window,
                None => window.insert(Window::open(fd, align, at)?),
            };
            let within = at - window.start;
            let len = (pages.len() - done).min(usize::try_from(window.len - within).unwrap_or(usize::MAX));
            let within = usize::try_from(within).map_err(|_| Errno::EINVAL)?;
            let (written, readback) = (&pages[done..done + len], readback.bytes_mut(0, len));
            window.part.store(within, written, pipe)?;
            window.part.load(within, readback, pipe)?;
            let equal = count_equal(written, readback) * PAGE;
            done += equal;
            if equal < len {
                break;
            }
        }
        Ok(done / PAGE)
    }
}

impl Window {
    /// What can be mapped around an offset.
    fn open(fd: i32, align: usize, at: u64) -> Result<Self> {
        let len = CLUSTER_BYTES.max(align as u64);
        let start = at / len * len;
        // The medium's, which closes it.
        let device = mem::ManuallyDrop::new(Fd::from_raw(fd));
        let bytes = usize::try_from(len).map_err(|_| Errno::ENOMEM)?;
        let part = Part::map(&device, start, bytes, align, Access::ReadWrite)?;
        part.keep_from_children()?;
        Ok(Self { fd, start, len, part })
    }
}

/// How many pages, from the first on, are in both.
fn count_equal(one: &[u8], other: &[u8]) -> usize {
    one.chunks_exact(PAGE).zip(other.chunks_exact(PAGE)).take_while(|(one, other)| one == other).count()
}
