//! Maps: which memfds a process has where (/proc/PID/maps, proc_pid_maps(5)).

use std::collections::BTreeMap;

use anyhow::Context;
use rustix::fs::MemfdFlags;

/// What all memfds are on.
pub struct Memfds {
    /// As /proc/PID/maps has it.
    device: String,
}

/// A mapping of a memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range<'a> {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// The file's number.
    pub inode: u64,
    /// The range, as maps and map_files have it.
    pub place: &'a str,
}

impl Memfds {
    /// Finds out by making one.
    ///
    /// # Errors
    /// The kernel gives no memfd.
    pub fn find() -> anyhow::Result<Self> {
        let memfd = rustix::fs::memfd_create("spmem-audit", MemfdFlags::CLOEXEC).context("no memfd")?;
        let device = rustix::fs::fstat(&memfd)?.st_dev;
        Ok(Self { device: format!("{:02x}:{:02x}", libc::major(device), libc::minor(device)) })
    }

    /// The memfds of that name in `maps`, one mapping of each. A file with a real name may look the same, and whoever serves its file system
    /// could keep us waiting: it is on another device.
    pub fn named<'a>(&self, maps: &'a str, name: &str) -> Vec<Range<'a>> {
        let lines = maps.lines().filter(|line| line.ends_with(name));
        let by_inode: BTreeMap<u64, Range<'_>> =
            lines.filter_map(|line| self.range(line)).map(|range| (range.inode, range)).collect();
        by_inode.into_values().collect()
    }

    /// All mappings of memfds, by where they start.
    pub fn all<'a>(&self, maps: &'a str) -> BTreeMap<u64, Range<'a>> {
        maps.lines().filter_map(|line| self.range(line)).map(|range| (range.start, range)).collect()
    }

    fn range<'a>(&self, line: &'a str) -> Option<Range<'a>> {
        let mut words = line.split_whitespace();
        let place = words.next()?;
        let (device, inode) = (words.nth(2)?, words.next()?);
        let (start, end) = bounds(place)?;
        (device == self.device).then(|| Some(Range { start, end, inode: inode.parse().ok()?, place }))?
    }
}

/// Where each range ends, by where it starts.
pub fn ends(maps: &str) -> BTreeMap<u64, u64> {
    maps.lines().filter_map(|line| bounds(line.split(' ').next()?)).collect()
}

fn bounds(place: &str) -> Option<(u64, u64)> {
    let (start, end) = place.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}
