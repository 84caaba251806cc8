//! The space: all that is known of one program's managed memory, behind one lock.
//!
//! [`Space`] owns the [`Table`], the [`Holding`] area's slots, the back end of node 1 and the swap files, and keeps them consistent:
//! a page's contents are in its place, in a slot, or under a handle, and every copy nobody refers to is given back.
//! The fault handler and the reclaimers take the lock; the program's own threads never do while they might fault.
//!
//! While a fork is under way ([`Mode::Quiet`]) the child may be given a picture of this memory torn in time. So then
//! nothing here allocates or frees: entries change one word at a time, and handles to give back wait in a list that
//! the child throws away.

use crate::changes::Changes;
use crate::holding::{Holding, State};
use crate::lanes::Lanes;
use crate::outgoing::Outgoing;
use crate::table::{CHUNK, Copy, Entry, Table};
use alloc::boxed::Box;
use alloc::vec::Vec;
use spmem_core::readahead::WINDOW_MAX;
use spmem_core::units::NodeId;
use spmem_node::swapfile::{SwapFiles, Unloaded};
use spmem_node::{Backend, Corrupt, Damage, Handle, Page};
use spmem_sys::PAGE;

/// Whether a fork is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No.
    Normal,
    /// From before the fork until the child serves its own faults: see the module's page.
    Quiet,
}

/// Handles that can wait for the end of a quiet time. More are leaked in the store; what swap files have is counted anew then.
const ORPHANS: usize = 1 << 16;

/// See the module's page.
pub struct Space<B> {
    /// Where each page is.
    pub table: Table,
    /// Pages between program and node 1.
    pub holding: Holding,
    /// Node 1.
    pub store: B,
    /// Nodes that are files, if there are.
    pub swap: Option<SwapFiles>,
    /// Whether a fork is under way.
    pub mode: Mode,
    /// Changes of the address space that were read and not applied yet (changes.rs).
    pub(crate) changes: Changes,
    /// Pages that came back from node 1, and of these, such as were encoded anew.
    pub(crate) returned: (u64, u64),
    /// Runs that were let go and wait for their turn.
    pub(crate) outgoing: Outgoing,
    /// What is out with the encoder, if there is one.
    pub(crate) lanes: Option<Box<Lanes>>,
    orphans: Vec<Handle>,
    /// Those of swap files.
    swap_orphans: Vec<Handle>,
    /// There were more of those.
    has_more_swap_orphans: bool,
    /// Pages promoted in a quiet time: their entries still say `away`.
    pub(crate) promoted: Vec<usize>,
}

impl<B: Backend> Space<B> {
    /// Nothing has left yet.
    pub fn new(holding: Holding, store: B, swap: Option<SwapFiles>) -> Self {
        Self {
            table: Table::new(),
            holding,
            store,
            swap,
            mode: Mode::Normal,
            changes: Changes::new(),
            returned: (0, 0),
            outgoing: Outgoing::new(),
            lanes: None,
            orphans: Vec::with_capacity(ORPHANS),
            swap_orphans: Vec::with_capacity(ORPHANS),
            has_more_swap_orphans: false,
            promoted: Vec::with_capacity(4096),
        }
    }

    /// Whether the entries say what is so: no change of the address space was read and not applied.
    pub fn is_settled(&self) -> bool {
        self.changes.is_empty()
    }

    /// Begins a quiet time, unless a change of the address space has to be applied first.
    pub fn quieten(&mut self) -> bool {
        if self.is_settled() {
            self.changes.quieten();
            self.table.quieten();
            self.mode = Mode::Quiet;
        }
        self.is_settled()
    }

    /// Bytes of the tables. The lists of a quiet time are address space, until one is.
    pub fn metadata_bytes(&self) -> u64 {
        let lists = self.orphans.len() + self.swap_orphans.len() + self.promoted.len();
        let lists =
            lists * size_of::<usize>() + self.swap.as_ref().map_or(0, |swap| swap.metadata_bytes() as usize);
        self.table.metadata_bytes() + self.holding.metadata_bytes() + self.changes.metadata_bytes() + lists as u64
    }

    /// Gives up a copy on node 1.
    pub fn forget(&mut self, handle: u64) {
        let Some(handle) = Handle::from_raw(handle) else { return };
        if self.mode == Mode::Quiet {
            if self.orphans.len() < self.orphans.capacity() {
                self.orphans.push(handle);
            }
            return;
        }
        // A damaged object keeps its place (R20); whoever needed it was told when it was loaded.
        let _ = self.store.forget(handle);
    }

    /// Gives up a page in a swap file.
    pub fn forget_swapped(&mut self, handle: u64) {
        let (Some(handle), Some(swap)) = (Handle::from_raw(handle), &mut self.swap) else { return };
        if self.mode == Mode::Normal {
            swap.forget(handle);
        } else if self.swap_orphans.len() < self.swap_orphans.capacity() {
            // A child that is being forked may need it.
            self.swap_orphans.push(handle);
        } else {
            self.has_more_swap_orphans = true;
        }
    }

    /// Keeps what the entries refer to of the swap files, and lets go of the rest. While nothing is on its way there.
    pub fn settle_swap(&mut self) {
        if let Some(swap) = &mut self.swap {
            swap.retain(self.table.swapped().filter_map(Handle::from_raw));
        }
    }

    /// Reads what is under a handle, of node 1 or of a swap file.
    ///
    /// # Errors
    /// R20: it cannot be had as it was; or the kernel is short of something.
    pub fn load(&self, copy: Copy, page: &mut Page) -> Result<(), Unloaded> {
        let (Copy::Stored(raw) | Copy::Swapped(raw)) = copy else { return Err(Unloaded::Later) };
        let handle = Handle::from_raw(raw).expect("an entry has a back end's handle");
        match &self.swap {
            _ if matches!(copy, Copy::Stored(_)) => self.store.load(handle, page).map_err(Unloaded::Lost),
            Some(swap) => swap.load(handle, page),
            None => {
                let damage = Damage::UnknownHandle;
                Err(Unloaded::Lost(Corrupt { node: NodeId::ZERO, handle, frame: None, damage }))
            }
        }
    }

    /// Gives up whatever copy an entry refers to.
    pub fn forget_copy(&mut self, entry: Entry) {
        match entry.copy() {
            Copy::None => {}
            Copy::Stored(handle) => self.forget(handle),
            Copy::Swapped(handle) => self.forget_swapped(handle),
            Copy::Holding(slot) => {
                if let Some(handle) = self.holding.forget_kept(slot) {
                    self.forget(handle);
                }
                self.holding.kill(slot);
            }
        }
    }

    /// The pages of a range are no more: copies are given up. With `Some` the entries say so afterwards
    /// (madvise), with `None` the range is not registered any more either (munmap).
    pub fn drop_range(&mut self, start: usize, end: usize, discarded: Option<Entry>) {
        let mut at = start;
        while let Some(chunk) = self.table.next_chunk(at, end) {
            let (first, last) = (chunk.max(start), (chunk + CHUNK).min(end));
            for page in (first..last).step_by(PAGE) {
                let entry = self.table.get(page);
                if !entry.is_empty() {
                    self.forget_copy(entry);
                }
                if discarded.is_some() || !entry.is_empty() {
                    self.table.set(page, discarded.unwrap_or_default());
                }
            }
            if discarded.is_none() {
                self.table.find_or_add(chunk).set_registered(first, last, false);
            }
            at = last;
        }
    }

    /// mremap(2) moved a range: what was known of its pages moves along. Whatever was at its new place has left before.
    ///
    /// # Panics
    /// When pages are still away there: the changes were not put in order, and they would be lost.
    pub fn move_range(&mut self, from: usize, to: usize, len: usize) {
        assert!(!self.table.has_away(to, to + len), "a range was moved to {to:#x}, where pages are away");
        self.drop_range(to, to + len, None);
        let mut at = from;
        while let Some(chunk) = self.table.next_chunk(at, from + len) {
            let (first, last) = (chunk.max(from), (chunk + CHUNK).min(from + len));
            for page in (first..last).step_by(PAGE) {
                let entry = self.table.set(page, Entry::default());
                if entry.is_empty() {
                    continue;
                }
                let new = page - from + to;
                self.table.find_or_add(new);
                self.table.set(new, entry);
                if let Copy::Holding(slot) = entry.copy() {
                    self.holding.set_owner(slot, new);
                }
            }
            self.table.find_or_add(chunk).set_registered(first, last, false);
            at = last;
        }
    }

    /// A page was promoted while quiet: its entry is put right afterwards.
    pub fn note_promoted(&mut self, page: usize) {
        if self.promoted.len() < self.promoted.capacity() {
            self.promoted.push(page);
        }
    }

    /// Whether no more pages that come back while quiet can be remembered.
    pub fn is_promoted_full(&self) -> bool {
        self.promoted.len() + WINDOW_MAX as usize > self.promoted.capacity()
    }

    /// A page that is in its place although its entry says that it is away.
    fn note_returned(&mut self, page: usize) {
        let entry = self.table.get(page);
        match entry.copy() {
            Copy::Stored(_) if entry.is_away() => {
                self.table.set(page, Entry::present(entry.copy(), entry.age()));
            }
            Copy::Swapped(handle) => {
                self.forget_swapped(handle);
                self.table.set(page, Entry::present(Copy::None, entry.age()));
            }
            Copy::Holding(slot) if entry.is_away() => {
                let kept = self.holding.forget_kept(slot).map_or(Copy::None, Copy::Stored);
                self.holding.kill(slot);
                self.table.set(page, Entry::present(kept, entry.age()));
            }
            _ => {}
        }
    }

    /// The fork is over, here in the parent.
    pub fn end_quiet(&mut self) {
        self.mode = Mode::Normal;
        self.changes.end_quiet();
        self.table.end_quiet();
        while let Some(page) = self.promoted.pop() {
            self.note_returned(page);
        }
        while let Some(handle) = self.orphans.pop() {
            let _ = self.store.forget(handle);
        }
        while let Some(handle) = self.swap_orphans.pop() {
            self.forget_swapped(handle.raw());
        }
        if core::mem::take(&mut self.has_more_swap_orphans) {
            self.settle_swap();
        }
    }

    /// This is the forked child: what may be torn is thrown away, what the parent's threads had claimed is free.
    ///
    /// Pages that were promoted between the announcement and the fork are in their place, whatever their entries say;
    /// `is_there` tells.
    pub fn settle_after_fork(&mut self, is_there: impl Fn(usize) -> bool) {
        self.mode = Mode::Normal;
        self.changes.settle_after_fork();
        self.table.recount();
        for index in 0..self.promoted.len() {
            let page = self.promoted[index];
            if self.table.get(page).is_away() && is_there(page) {
                self.note_returned(page);
            }
        }
        // What is shared with the parent is the parent's to count; a page that is written is somewhere else then.
        self.table.forget_placed();
        // Where these lists are has not changed since before the fork, only what is in them.
        self.orphans.clear();
        self.swap_orphans.clear();
        self.has_more_swap_orphans = false;
        self.promoted.clear();
        self.outgoing.clear();
        // The parent's.
        core::mem::forget(self.lanes.take());
        self.table.leak_spares();
        self.holding.settle();
    }

    /// Whether the page may be taken away: it is in its place, and nothing says it must stay.
    pub fn may_leave(&self, entry: Entry) -> bool {
        let is_here = !entry.is_away() && !matches!(entry.copy(), Copy::Holding(_));
        is_here && !entry.is_discarded() && entry.target().is_none()
    }

    /// Whether a slot's page can be moved back whole, or only copied.
    pub fn is_movable(&self, slot: u32) -> bool {
        self.mode == Mode::Normal && self.holding.get(slot).state == State::Held
    }
}

#[cfg(test)]
pub(crate) mod tests {
    extern crate std;
    use super::*;
    use crate::frames::{Frames, lend_metadata};
    use crate::runtime::Cram;
    use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
    use spmem_core::lru::Age;
    use spmem_core::units::FrameCount;
    use spmem_node::compressed::{GrantedFrames, Store};
    use spmem_node::swapfile::{CLUSTER_FRAMES, Medium};
    use spmem_sys::fd::Fd;
    use spmem_sys::mapping::Mapping;
    use std::os::fd::IntoRawFd;

    /// A file of no bytes that ends with the test.
    fn file(name: &str) -> Fd {
        static FILES: AtomicU32 = AtomicU32::new(0);
        let number = FILES.fetch_add(1, Relaxed);
        let path = std::env::temp_dir().join(std::format!("spmem-space-{name}-{}-{number}", std::process::id()));
        let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        std::fs::remove_file(&path).expect("it is there");
        Fd::from_raw(file.expect("a file").into_raw_fd())
    }

    pub(crate) fn space(clusters: u32) -> Space<Cram> {
        let capacity = FrameCount(1024);
        let mapping = Mapping::reserve(2 * CHUNK, CHUNK, c"spmem test").expect("mmap");
        let granted = GrantedFrames::embedded(capacity, lend_metadata(capacity).expect("mmap")).expect("frames");
        let mut swap = SwapFiles::new(file("ledger"), 1);
        swap.add(0, NodeId::new(2).expect("a node"), Medium::file(file("data")), clusters, 0);
        let store = Store::new(granted, Frames { mapping, committed: 0 }, 1);
        Space::new(Holding::new(CHUNK, 16), store, Some(swap))
    }

    #[test]
    fn pages_dropped_in_a_quiet_time_leave_no_frame_of_a_swap_file_behind_however_many_they_are() {
        let count = ORPHANS + 3 * CLUSTER_FRAMES as usize;
        let mut space = space(u32::try_from(count).expect("few") / CLUSTER_FRAMES + 1);
        let mut handles = std::vec![None; count];
        assert_eq!(space.swap.as_mut().map(|swap| swap.take(0, &mut handles)), Some(count));
        let address = |page: usize| 8 * CHUNK + page * PAGE;
        for (page, handle) in handles.into_iter().flatten().enumerate() {
            space.table.find_or_add(address(page));
            space.table.set(address(page), Entry::away(Copy::Swapped(handle.raw()), Age::COLDEST));
        }
        assert!(space.quieten());
        space.drop_range(address(0), address(count - 1), Some(Entry::discarded()));
        space.end_quiet();
        let swap = space.swap.as_ref().expect("it was given");
        assert_eq!(swap.pages(0), 1, "the last one was not dropped");
        let (one, all) = (swap.metadata_bytes(), u64::from(CLUSTER_FRAMES) * size_of::<u64>() as u64);
        assert!((all..2 * all).contains(&one), "{one} bytes: more than one cluster is held");
    }
}
