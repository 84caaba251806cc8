//! Swap files: nodes that are reached by copy. Pages are written to frames of a file, or of a dax device ([`Medium`]), and read back when they are
//! touched.
//!
//! Several processes use one file at a time, and fork. What keeps them apart are *holds* of the kernel's (fcntl(2), `F_OFD_SETLK`) on a
//! second file, the *ledger*, of which each byte stands for a *cluster* of [`CLUSTER_FRAMES`] frames. A process has the ledger open
//! for itself. It writes only to clusters of which it has the exclusive hold: nobody else has ever had a page there since. Before a fork is completed
//! ([`SwapFiles::lend`]) holds become shared, and the child is given an open ledger with the same ones: from then on such a cluster is *frozen*
//! for both. It is read, and what is freed there is not used again, until one of them has let go: then the other's hold can be made exclusive.
//! Whoever ends, however, has no holds any more: the kernel takes care of that.
//!
//! What is where, and the checksum of each page, is in the process's own memory, and so each child's own after a fork. The file has contents only, which are
//! nothing to anybody once the processes have ended.
//!
//! Known holes: a frozen cluster is taken up by its last page; what lies between two pages that are read is not read along.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::mem;

use spmem_core::units::{FrameNumber, NodeId, PAGE_SIZE};
use spmem_sys::fd::{Fd, Hold};
use spmem_sys::{Errno, Result};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::backend::{Corrupt, Damage, Handle, Page};

mod medium;

pub use medium::{Medium, Outlet, Writer};

/// Frames of a cluster: 2 MiB.
pub const CLUSTER_FRAMES: u32 = 512;
/// Bytes of a cluster.
pub const CLUSTER_BYTES: u64 = CLUSTER_FRAMES as u64 * PAGE_SIZE;
/// Clusters that are tried for one that nobody holds, at a time.
const TRIES: u32 = 512;
/// A cluster with so many free frames is filled up before another one is begun.
const WORTH_FILLING: u32 = CLUSTER_FRAMES / 8;
/// In the ledger each file has so many bytes: a cluster each.
const FILE_SHIFT: u32 = 32;

/// Why a page is not there yet, or never will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unloaded {
    /// The kernel is short of something: to be tried again.
    Later,
    /// R20: it cannot be had as it was.
    Lost(Corrupt),
}

/// A process's part of the run's swap files.
#[derive(Debug)]
pub struct SwapFiles {
    ledger: Fd,
    seed: u64,
    files: Vec<Option<SwapFile>>,
}

#[derive(Debug)]
struct SwapFile {
    node: NodeId,
    medium: Medium,
    /// Clusters of the file.
    count: u32,
    held: BTreeMap<u32, Cluster>,
    /// The cluster that is being filled: its hold is exclusive.
    filling: Option<u32>,
    /// Where a free cluster is looked for next.
    cursor: u32,
    /// Pages of this process, without those that came with a fork.
    pages: u64,
}

#[derive(Debug)]
struct Cluster {
    /// Others may read it.
    is_frozen: bool,
    /// Its pages came with a fork: they are counted elsewhere.
    is_inherited: bool,
    live: u32,
    /// A bit a frame.
    used: [u64; CLUSTER_FRAMES as usize / 64],
    checksums: Box<[u64; CLUSTER_FRAMES as usize]>,
}

impl Cluster {
    fn new() -> Self {
        let checksums = Box::new([0; CLUSTER_FRAMES as usize]);
        Self { is_frozen: false, is_inherited: false, live: 0, used: [0; CLUSTER_FRAMES as usize / 64], checksums }
    }

    /// The lowest free frame becomes used.
    fn take(&mut self) -> Option<u32> {
        let word = self.used.iter().position(|&word| word != u64::MAX)?;
        let bit = self.used[word].trailing_ones();
        self.used[word] |= 1 << bit;
        self.live += 1;
        Some(u32::try_from(word).ok()? * 64 + bit)
    }

    fn is_used(&self, frame: u32) -> bool {
        self.used[frame as usize / 64] >> (frame % 64) & 1 != 0
    }
}

/// Where a handle points: which file, which cluster, which frame of it.
fn place(handle: Handle) -> (usize, u32, u32) {
    let (file, FrameNumber(frame)) = ((handle.raw() >> FILE_SHIFT) as usize, frame(handle));
    (file.wrapping_sub(1), frame / CLUSTER_FRAMES, frame % CLUSTER_FRAMES)
}

/// The frame of its file that a handle means.
#[allow(clippy::cast_possible_truncation, reason = "the lower half of the handle")]
pub const fn frame(handle: Handle) -> FrameNumber {
    FrameNumber(handle.raw() as u32)
}

/// The number of the file that a handle means.
pub fn file(handle: Handle) -> usize {
    place(handle).0
}

fn handle(file: usize, cluster: u32, frame: u32) -> Handle {
    let raw = (file as u64 + 1) << FILE_SHIFT | u64::from(cluster * CLUSTER_FRAMES + frame);
    Handle::from_raw(raw).expect("a run has few files, and frames have 32 bits")
}

/// The byte of the ledger for a cluster.
const fn byte(file: usize, cluster: u32) -> u64 {
    (file as u64) << FILE_SHIFT | cluster as u64
}

impl SwapFiles {
    /// With a ledger that is open for this process alone. `seed` is the run's.
    pub const fn new(ledger: Fd, seed: u64) -> Self {
        Self { ledger, seed, files: Vec::new() }
    }

    /// Adds file number `number`, node `node` of the run, of so many clusters. Looking for free ones begins at `from`.
    pub fn add(&mut self, number: usize, node: NodeId, medium: Medium, count: u32, from: u32) {
        if self.files.len() <= number {
            self.files.resize_with(number + 1, || None);
        }
        let cursor = from.checked_rem(count).unwrap_or(0);
        let held = BTreeMap::new();
        self.files[number] = Some(SwapFile { node, medium, count, held, filling: None, cursor, pages: 0 });
    }

    /// Descriptors of the files, in order.
    pub fn data(&self) -> impl Iterator<Item = i32> + '_ {
        self.files.iter().flatten().map(|file| file.medium.fd().raw())
    }

    /// Where pages of file `number` are written.
    pub fn outlet(&self, number: usize) -> Option<Outlet> {
        Some(self.files.get(number)?.as_ref()?.medium.outlet())
    }

    /// Pages of this process in file `number`. Those that came with a fork are its parent's.
    pub fn pages(&self, number: usize) -> u64 {
        self.files.get(number).and_then(Option::as_ref).map_or(0, |file| file.pages)
    }

    /// Bytes that are taken by what is known of clusters.
    pub fn metadata_bytes(&self) -> u64 {
        let clusters: usize = self.files.iter().flatten().map(|file| file.held.len()).sum();
        (clusters * (size_of::<Cluster>() + size_of::<[u64; CLUSTER_FRAMES as usize]>())) as u64
    }

    /// Takes frames of file `number` for pages that will be written, as many as there are; how many.
    pub fn take(&mut self, number: usize, handles: &mut [Option<Handle>]) -> usize {
        let Self { ledger, files, .. } = self;
        let Some(Some(file)) = files.get_mut(number) else { return 0 };
        for (taken, to) in handles.iter_mut().enumerate() {
            let Some((cluster, frame)) = file.take(number, ledger) else { return taken };
            *to = Some(handle(number, cluster, frame));
        }
        handles.len()
    }

    /// What was written to a frame is this page.
    pub fn seal(&mut self, handle: Handle, page: &Page) {
        let checksum = xxh3_64_with_seed(page, self.seed);
        let (number, cluster, frame) = place(handle);
        if let Some(cluster) = self.cluster_mut(number, cluster) {
            cluster.checksums[frame as usize] = checksum;
        }
    }

    /// A page is needed no more.
    pub fn forget(&mut self, handle: Handle) {
        let (number, at, frame) = place(handle);
        let Self { ledger, files, .. } = self;
        let Some(Some(file)) = files.get_mut(number) else { return };
        let Some(cluster) = file.held.get_mut(&at).filter(|cluster| cluster.is_used(frame)) else { return };
        cluster.used[frame as usize / 64] &= !(1 << (frame % 64));
        cluster.live -= 1;
        file.pages -= u64::from(!cluster.is_inherited);
        if cluster.live == 0 && file.filling != Some(at) {
            file.let_go(number, at, ledger);
        }
    }

    /// Reads a page.
    ///
    /// # Errors
    /// [`Unloaded`]: the file does not give it, or it is another one (R20).
    pub fn load(&self, handle: Handle, page: &mut Page) -> core::result::Result<(), Unloaded> {
        let (number, cluster, at) = place(handle);
        let file = self.files.get(number).and_then(Option::as_ref);
        let node = file.map_or(NodeId::ZERO, |file| file.node);
        let lost = |damage| Unloaded::Lost(Corrupt { node, handle, frame: Some(frame(handle)), damage });
        let known = file.and_then(|file| Some((file, file.held.get(&cluster)?)));
        let Some((file, cluster)) = known.filter(|(_, cluster)| cluster.is_used(at)) else {
            return Err(lost(Damage::UnknownHandle));
        };
        match file.medium.load(frame(handle), page) {
            Ok(()) => {}
            Err(Errno::EAGAIN | Errno::ENOMEM | Errno::EINTR) => return Err(Unloaded::Later),
            Err(Errno::EPERM | Errno::EACCES) => return Err(lost(Damage::Forbidden)),
            // It was cut short, or the device is broken, or gone.
            Err(_) => return Err(lost(Damage::Unreadable)),
        }
        let (stored, found) = (cluster.checksums[at as usize], xxh3_64_with_seed(page, self.seed));
        if stored == found { Ok(()) } else { Err(lost(Damage::Checksum { stored, found })) }
    }

    /// Makes the holds of this process shared, and gives `child`, the ledger opened once more, the same ones: for a process that has been
    /// forked. Nothing may have been taken or forgotten since the fork.
    ///
    /// # Errors
    /// The kernel has no memory for it; then the child must not be given it.
    pub fn lend(&mut self) -> Result<Fd> {
        for cluster in self.files.iter_mut().flatten().flat_map(|file| file.held.values_mut()) {
            cluster.is_frozen = true;
        }
        for file in self.files.iter_mut().flatten() {
            file.filling = None;
        }
        let child = self.ledger.reopen()?;
        for (number, file) in self.files.iter().enumerate() {
            for &cluster in file.iter().flat_map(|file| file.held.keys()) {
                self.ledger.hold(byte(number, cluster), 1, Hold::Shared)?;
                child.hold(byte(number, cluster), 1, Hold::Shared)?;
            }
        }
        Ok(child)
    }

    /// This is the forked child, with what its parent's handler has given it: the ledger, and the files in order.
    ///
    /// # Errors
    /// As pipe2(2), where there is a device; then nothing can be read.
    pub fn adopt(&mut self, ledger: Fd, data: impl Iterator<Item = Fd>) -> Result<()> {
        // The numbers are of the parent's table of descriptors.
        mem::forget(mem::replace(&mut self.ledger, ledger));
        for (file, data) in self.files.iter_mut().flatten().zip(data) {
            file.medium.adopt(data)?;
            file.filling = None;
            file.pages = 0;
            for cluster in file.held.values_mut() {
                (cluster.is_frozen, cluster.is_inherited) = (true, true);
            }
        }
        Ok(())
    }

    /// These are all the pages that there are, whatever is known of the frames. In a forked child, whose copy of that may be torn; and where more has been
    /// given up than could be remembered.
    pub fn retain(&mut self, live: impl Iterator<Item = Handle>) {
        for file in self.files.iter_mut().flatten() {
            file.pages = 0;
            for cluster in file.held.values_mut() {
                (cluster.used, cluster.live) = ([0; CLUSTER_FRAMES as usize / 64], 0);
            }
        }
        for handle in live {
            let (number, cluster, frame) = place(handle);
            if let Some(cluster) = self.cluster_mut(number, cluster) {
                cluster.live += u32::from(!cluster.is_used(frame));
                cluster.used[frame as usize / 64] |= 1 << (frame % 64);
            }
        }
        let Self { ledger, files, .. } = self;
        for (number, file) in
            files.iter_mut().enumerate().filter_map(|(number, file)| Some((number, file.as_mut()?)))
        {
            let SwapFile { held, pages, .. } = file;
            held.retain(|&at, cluster| {
                if cluster.live == 0 {
                    release(number, at, ledger);
                } else if !cluster.is_inherited {
                    *pages += u64::from(cluster.live);
                }
                cluster.live > 0
            });
        }
    }

    fn cluster_mut(&mut self, number: usize, cluster: u32) -> Option<&mut Cluster> {
        self.files.get_mut(number)?.as_mut()?.held.get_mut(&cluster)
    }
}

impl SwapFile {
    fn take(&mut self, number: usize, ledger: &Fd) -> Option<(u32, u32)> {
        loop {
            let at = match self.filling {
                Some(at) => at,
                None => self.find(number, ledger)?,
            };
            if let Some(frame) = self.held.get_mut(&at).and_then(Cluster::take) {
                self.filling = Some(at);
                self.pages += 1;
                return Some((at, frame));
            }
            self.filling = None;
        }
    }

    /// A cluster with a free frame that nobody else reads.
    fn find(&mut self, number: usize, ledger: &Fd) -> Option<u32> {
        let with_free = |file: &Self, free: u32| {
            let has = |(&at, cluster): (&u32, &Cluster)| {
                (!cluster.is_frozen && cluster.live + free <= CLUSTER_FRAMES).then_some(at)
            };
            file.held.iter().find_map(has)
        };
        with_free(self, WORTH_FILLING)
            .or_else(|| self.begin(number, ledger))
            .or_else(|| with_free(self, 1))
            .or_else(|| self.thaw(number, ledger))
    }

    /// A cluster that nobody holds.
    fn begin(&mut self, number: usize, ledger: &Fd) -> Option<u32> {
        for _ in 0..self.count.min(TRIES) {
            let at = self.cursor;
            self.cursor = (at + 1) % self.count;
            if !self.held.contains_key(&at) && ledger.hold(byte(number, at), 1, Hold::Exclusive).is_ok() {
                self.held.insert(at, Cluster::new());
                return Some(at);
            }
        }
        None
    }

    /// A frozen cluster with room whose other holders have let go.
    fn thaw(&mut self, number: usize, ledger: &Fd) -> Option<u32> {
        for (&at, cluster) in &mut self.held {
            let has_room = cluster.is_frozen && cluster.live < CLUSTER_FRAMES;
            if has_room && ledger.hold(byte(number, at), 1, Hold::Exclusive).is_ok() {
                self.pages += if cluster.is_inherited { u64::from(cluster.live) } else { 0 };
                (cluster.is_frozen, cluster.is_inherited) = (false, false);
                return Some(at);
            }
        }
        None
    }

    fn let_go(&mut self, number: usize, at: u32, ledger: &Fd) {
        self.held.remove(&at);
        release(number, at, ledger);
    }
}

/// Gives up the hold on a cluster. If that fails it is held in vain, and had again when it is tried.
fn release(number: usize, at: u32, ledger: &Fd) {
    let _ = ledger.hold(byte(number, at), 1, Hold::None);
}

#[cfg(test)]
mod tests;
