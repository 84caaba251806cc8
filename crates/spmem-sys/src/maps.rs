//! Which memory a process has: /proc/PID/maps (proc_pid_maps(5)), by `PROCMAP_QUERY` (6.11+) or by reading its text.

use crate::fd::Fd;
use crate::{Errno, Result};
use syscalls::{Sysno, syscall};

/// A range of addresses with one set of properties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: usize,
    /// First address behind it.
    pub end: usize,
    /// May be read.
    pub is_readable: bool,
    /// May be written.
    pub is_writable: bool,
    /// May be executed.
    pub is_executable: bool,
    /// Changes are seen by other mappings (MAP_SHARED).
    pub is_shared: bool,
    /// Backed by a file, shmem included.
    pub is_file: bool,
    /// What it is, by name.
    pub name: Name,
}

/// What the kernel calls a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// No name: mmap'ed anonymous memory.
    None,
    /// `[heap]`: the brk area.
    Heap,
    /// `[stack]`: the main thread's stack.
    Stack,
    /// `[anon:...]`: named by prctl(2).
    Anon,
    /// A path, or special: `[vdso]`, `[vvar]`, `[vsyscall]`.
    Other,
}

#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const _: () = assert!(size_of::<ProcmapQuery>() == 104);
/// `_IOWR('f', 17, struct procmap_query)` (include/uapi/linux/fs.h).
const PROCMAP_QUERY: u32 = 0xc068_6611;
const COVERING_OR_NEXT: u64 = 0x10;
/// Only ranges that may be read and written; others are passed over.
const READABLE_AND_WRITABLE: u64 = 0x3;
/// More than any name that is no path: `[anon:...]` has up to 79 letters (ANON_VMA_NAME_MAX_LEN).
const NAME_BYTES: usize = 96;
const TEXT_BYTES: usize = 16 * 1024;

/// An open maps file of one address space, its own text buffer included.
pub struct Maps {
    file: Fd,
    has_query: bool,
}

impl Maps {
    /// Opens the maps of the calling thread's process. It stays bound to this address space.
    ///
    /// # Errors
    /// As open(2); a process without /proc has none.
    pub fn open() -> Result<Self> {
        Self::from_file(Fd::open_in_proc(c"/proc/thread-self/maps")?)
    }

    /// As [`Maps::open`], for threads with the program's descriptor table.
    ///
    /// # Errors
    /// As open(2).
    pub fn open_by_path() -> Result<Self> {
        Self::from_file(Fd::open(c"/proc/thread-self/maps", libc::O_RDONLY)?)
    }

    fn from_file(file: Fd) -> Result<Self> {
        let mut maps = Self { file, has_query: true };
        maps.has_query = !matches!(maps.query(0, 0), Err(Errno(libc::ENOTTY)));
        Ok(maps)
    }

    /// The range that holds `address`, or the first one above it; `None` behind the last.
    ///
    /// # Errors
    /// As ioctl(2) or read(2).
    pub fn at_or_above(&self, address: usize) -> Result<Option<Vma>> {
        if self.has_query { self.query(address, 0) } else { self.search_text(address, |_| true) }
    }

    /// As [`Maps::at_or_above`], of the ranges that may be read and written.
    ///
    /// # Errors
    /// As ioctl(2) or read(2).
    pub fn writable_at_or_above(&self, address: usize) -> Result<Option<Vma>> {
        if self.has_query {
            self.query(address, READABLE_AND_WRITABLE)
        } else {
            self.search_text(address, |vma| vma.is_readable && vma.is_writable)
        }
    }

    fn query(&self, address: usize, rights: u64) -> Result<Option<Vma>> {
        let mut name = [0_u8; NAME_BYTES];
        let new = |name: &mut [u8]| ProcmapQuery {
            size: 104,
            query_flags: COVERING_OR_NEXT | rights,
            query_addr: address as u64,
            vma_name_size: name.len() as u32,
            vma_name_addr: if name.is_empty() { 0 } else { name.as_mut_ptr().expose_provenance() as u64 },
            ..Default::default()
        };
        let mut query = new(&mut name);
        let mut result = self.ioctl(&mut query);
        if result == Err(Errno(libc::ENAMETOOLONG)) {
            // A path, as no other name is so long. Should something else be there by now, it counts as what is not known.
            name[0] = b'?';
            query = new(&mut []);
            result = self.ioctl(&mut query);
        }
        match result {
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(errno),
            Ok(()) => {}
        }
        let len = name.iter().position(|&b| b == 0).unwrap_or(NAME_BYTES);
        Ok(Some(Vma {
            start: query.vma_start as usize,
            end: query.vma_end as usize,
            is_readable: query.vma_flags & 1 != 0,
            is_writable: query.vma_flags & 2 != 0,
            is_executable: query.vma_flags & 4 != 0,
            is_shared: query.vma_flags & 8 != 0,
            is_file: query.inode != 0,
            name: if query.inode == 0 { parse_name(&name[..len]) } else { Name::Other },
        }))
    }

    fn ioctl(&self, query: &mut ProcmapQuery) -> Result<()> {
        // SAFETY: the kernel reads and writes this struct of the size it states, and the name buffer it points to.
        unsafe { syscall!(Sysno::ioctl, self.file.raw(), PROCMAP_QUERY, core::ptr::from_mut(query)) }?;
        Ok(())
    }

    fn search_text(&self, address: usize, is_wanted: impl Fn(&Vma) -> bool) -> Result<Option<Vma>> {
        let mut buffer = [0_u8; TEXT_BYTES];
        let (mut filled, mut offset) = (0, 0_u64);
        loop {
            let got = match self.file.read_at(&mut buffer[filled..], offset) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            offset += got as u64;
            filled += got;
            let mut used = 0;
            while let Some(len) = buffer[used..filled].iter().position(|&b| b == b'\n') {
                let vma = parse_line(&buffer[used..used + len]).ok_or(Errno::EINVAL)?;
                if vma.end > address && is_wanted(&vma) {
                    return Ok(Some(vma));
                }
                used += len + 1;
            }
            if got == 0 {
                return Ok(None);
            }
            buffer.copy_within(used..filled, 0);
            filled -= used;
        }
    }
}

fn parse_name(name: &[u8]) -> Name {
    match name {
        b"" => Name::None,
        b"[heap]" => Name::Heap,
        b"[stack]" => Name::Stack,
        _ if name.starts_with(b"[anon:") => Name::Anon,
        _ => Name::Other,
    }
}

/// One line of /proc/PID/maps without its newline; `None` when it does not have that form.
pub fn parse_line(line: &[u8]) -> Option<Vma> {
    let mut fields = line.split(|&b| b == b' ').filter(|field| !field.is_empty());
    let range = fields.next()?;
    let dash = range.iter().position(|&b| b == b'-')?;
    let flags = fields.next()?;
    let (_offset, _device, inode) = (fields.next()?, fields.next()?, fields.next()?);
    if flags.len() != 4 {
        return None;
    }
    Some(Vma {
        start: parse_hex(&range[..dash])?,
        end: parse_hex(&range[dash + 1..])?,
        is_readable: flags[0] == b'r',
        is_writable: flags[1] == b'w',
        is_executable: flags[2] == b'x',
        is_shared: flags[3] == b's',
        is_file: inode != b"0",
        name: if inode == b"0" { parse_name(fields.next().unwrap_or(b"")) } else { Name::Other },
    })
}

fn parse_hex(digits: &[u8]) -> Option<usize> {
    usize::from_str_radix(core::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn both_ways_of_looking_agree_on_every_range() {
        let maps = Maps::open().expect("/proc");
        for rights in [0, READABLE_AND_WRITABLE] {
            let is_wanted = |vma: &Vma| rights == 0 || vma.is_readable && vma.is_writable;
            let (mut address, mut seen) = (0, 0);
            while let Some(vma) = maps.search_text(address, is_wanted).expect("read") {
                if vma.start > 0x7fff_ffff_f000 {
                    break; // [vsyscall] is not in the query's list
                }
                let queried = if maps.has_query { maps.query(address, rights).expect("query") } else { Some(vma) };
                // Other tests of this process map and unmap meanwhile.
                if maps.search_text(address, is_wanted).expect("read") != Some(vma) {
                    continue;
                }
                assert_eq!(queried, Some(vma));
                assert!(is_wanted(&vma));
                address = vma.end;
                seen += 1;
            }
            assert!(seen > 5);
        }
    }

    #[test]
    fn a_line_is_taken_apart() {
        let vma =
            parse_line(b"7f00-8f00 rw-p 00000000 00:00 0                          [anon:spmem store]").unwrap();
        assert_eq!((vma.start, vma.end, vma.is_writable), (0x7f00, 0x8f00, true));
        assert_eq!(vma.name, Name::Anon);
        assert_eq!(parse_line(b"7f00 rw-p"), None);
    }
}
