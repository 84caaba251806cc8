//! Swapping: cold pages are copied to files and dax devices, and copied back by a fault (`spmem_node::swapfile`).
//!
//! Out: frames are taken under the lock; the pages, in busy slots of the holding area, are written to them and read back without it; then,
//! under the lock again, a page that is still away is there. In: [`crate::fault`], as from node 1. Only clusters that this process holds alone are written
//! to, and a fork waits for reclaimers: so no process reads what another one writes.
//!
//! A fork: nothing is freed from before it until its child stands alone ([`crate::space::Mode::Quiet`]). Before the child is given its userfaultfd,
//! the parent's handler gives it holds of its own on all that the parent has ([`lend`]); the child's first thread takes them over ([`adopt`]). A child without
//! them would be given all its pages.

use core::sync::atomic::Ordering::Relaxed;

use spmem_core::placing::{MAX_TARGETS, PLACE_PAGES};
use spmem_core::units::{FrameNumber, NodeId};
use spmem_node::Page;
use spmem_node::swapfile::{CLUSTER_BYTES, Medium, Outlet, SwapFiles, Writer, frame};
use spmem_sys::fd::Fd;
use spmem_sys::{Errno, PAGE, Result, clock, process};

use crate::demote::Demoter;
use crate::holding::State;
use crate::protocol::Kind;
use crate::recorder::Happening;
use crate::runtime::Runtime;
use crate::table::{Copy, Entry};

/// One thread's way to swap files.
pub(crate) struct Swapper {
    writer: Writer,
    /// A file has not given back what was written, and that was said.
    is_distrusted: bool,
}

impl Swapper {
    /// `None` where the run has no swap file, or this process none of it.
    pub(crate) fn new(runtime: &Runtime) -> Option<Self> {
        runtime.space.lock().as_ref()?.swap.as_ref()?;
        // Without memory for it pages go elsewhere.
        Some(Self { writer: Writer::new(PLACE_PAGES).ok()?, is_distrusted: false })
    }

    /// Writes pages to frames; which of them are there.
    fn write(
        &mut self,
        to: Outlet,
        addresses: &[usize],
        frames: &[FrameNumber],
        is_there: &mut [bool],
    ) -> Result<()> {
        let mut first = 0;
        while first < addresses.len() {
            let follows = |at: usize| {
                addresses[at] == addresses[first] + (at - first) * PAGE
                    && frames[at].0 == frames[first].0 + (at - first) as u32
            };
            let count = (first + 1..addresses.len()).take_while(|&at| follows(at)).count() + 1;
            let pages = bytes_at(addresses[first], count * PAGE);
            let written = self.writer.write(to, frames[first], pages)?;
            is_there[first..first + written].fill(true);
            if written < count {
                return Err(Errno::EIO);
            }
            first += count;
        }
        Ok(())
    }
}

/// Bytes of busy slots of the holding area.
fn bytes_at<'a>(address: usize, len: usize) -> &'a [u8] {
    // SAFETY: the pages of busy slots: they stay mapped and unchanged until their span is discarded.
    #[allow(unsafe_code, reason = "pages of the holding area, which is not Rust's memory, are read in place")]
    unsafe {
        core::slice::from_raw_parts(core::ptr::with_exposed_provenance(address), len)
    }
}

impl Demoter {
    /// Copies the pages of busy slots to a swap file; how many pages of RAM become free.
    pub(crate) fn swap_out(&mut self, target: usize, slots: &[u32], addresses: &[usize]) -> usize {
        let runtime = self.runtime;
        let mut handles = [None; PLACE_PAGES];
        let (count, outlet) = {
            let mut space = runtime.space.lock();
            let Some(swap) = space.as_mut().and_then(|space| space.swap.as_mut()) else { return 0 };
            (swap.take(target, &mut handles[..slots.len()]), swap.outlet(target))
        };
        let mut frames = [FrameNumber(0); PLACE_PAGES];
        for (to, &handle) in frames.iter_mut().zip(handles.iter().flatten()) {
            *to = frame(handle);
        }
        let mut is_there = [false; PLACE_PAGES];
        let written = match (&mut self.swapper, outlet) {
            // The outlet stays good: nothing closes what it leads to.
            (Some(swapper), Some(outlet)) if count > 0 => {
                swapper.write(outlet, &addresses[..count], &frames[..count], &mut is_there)
            }
            _ => Ok(()),
        };
        let mut freed = 0;
        let counters = &runtime.shared().targets[target];
        if let Some(space) = runtime.space.lock().as_mut() {
            for at in 0..count {
                let Some(handle) = handles[at] else { break };
                let (slot, held) = (slots[at], space.holding.get(slots[at]));
                let entry = space.table.get(held.owner);
                let is_due = is_there[at] && held.state == State::Busy && entry.copy() == Copy::Holding(slot);
                let Some(swap) = space.swap.as_mut() else { break };
                if !is_due || !entry.is_away() {
                    swap.forget(handle);
                    continue;
                }
                if let Ok(page) = <&Page>::try_from(bytes_at(addresses[at], PAGE)) {
                    swap.seal(handle, page);
                }
                if let Some(kept) = space.holding.forget_kept(slot) {
                    space.forget(kept);
                }
                space.table.set(held.owner, Entry::away(Copy::Swapped(handle.raw()), entry.age()));
                space.holding.kill(slot);
                runtime.record(Happening::Place, held.owner, u64::from(counters.id.load(Relaxed)));
                freed += 1;
            }
        }
        counters.demoted_pages.fetch_add(freed as u64, Relaxed);
        if count < slots.len() || written.is_err() {
            self.targets.note_full(target, clock::now_ns());
            let refused = is_there[..slots.len()].iter().filter(|&&is_there| !is_there).count();
            counters.refused_pages.fetch_add(refused as u64, Relaxed);
        } else {
            self.targets.note_placed(target);
        }
        if let (Err(errno), Some(swapper)) = (written, &mut self.swapper)
            && !core::mem::replace(&mut swapper.is_distrusted, true)
        {
            crate::complain(format_args!(
                "spm: process {}: node {} does not take pages ({errno}); they go elsewhere\n",
                process::pid(),
                counters.id.load(Relaxed)
            ));
        }
        freed
    }
}

/// Asks `spm` for the run's swap files, if it has any.
pub(crate) fn open(runtime: &Runtime) -> Result<Option<SwapFiles>> {
    let shared = runtime.shared();
    if !shared.targets().any(|target| target.is_swap()) {
        return Ok(None);
    }
    let mut fds = runtime.ask_spm(Kind::Swap, 0, &[])?.into_iter().flatten();
    let ledger = fds.next().ok_or(Errno(libc::EPROTO))?;
    let mut swap = SwapFiles::new(ledger, shared.seed.load(Relaxed));
    for (number, target) in shared.targets().enumerate().filter(|(_, target)| target.is_swap()) {
        let data = fds.next().ok_or(Errno(libc::EPROTO))?;
        let node = u16::try_from(target.id.load(Relaxed)).ok().and_then(|id| NodeId::new(id).ok());
        let clusters = target.clusters.load(Relaxed);
        let medium = match target.align.load(Relaxed) {
            0 => Ok(Medium::file(data)),
            align => Medium::device(data, u64::from(clusters) * CLUSTER_BYTES, align),
        };
        let medium = match medium {
            Ok(medium) => medium,
            Err(errno) => {
                crate::complain(format_args!(
                    "spm: process {}: the device of node {} cannot be mapped ({errno}); its pages go elsewhere\n",
                    process::pid(),
                    target.id.load(Relaxed)
                ));
                continue;
            }
        };
        // Processes begin far from each other.
        let from = process::pid().wrapping_mul(0x9e37_79b1) >> 8;
        swap.add(number, node.ok_or(Errno::EINVAL)?, medium, clusters, from);
    }
    Ok(Some(swap))
}

/// What a forked child is to be given along with its userfaultfd: its own ledger, and the files. `None` where there are none.
pub(crate) fn lend(runtime: &Runtime) -> Result<Option<(Fd, [i32; MAX_TARGETS])>> {
    let mut space = runtime.space.lock();
    let Some(swap) = space.as_mut().and_then(|space| space.swap.as_mut()) else { return Ok(None) };
    let mut files = [-1; MAX_TARGETS];
    for (to, data) in files.iter_mut().zip(swap.data()) {
        *to = data;
    }
    Ok(Some((swap.lend()?, files)))
}

/// In a forked child: takes over what its parent's handler has lent. Before anything is freed.
pub(crate) fn adopt(swap: Option<&mut SwapFiles>, fds: impl Iterator<Item = Fd>) -> Result<()> {
    let Some(swap) = swap else { return Ok(()) };
    let mut fds = fds;
    let ledger = fds.next().ok_or(Errno(libc::EPROTO))?;
    let count = swap.data().count();
    let mut files = [const { None }; MAX_TARGETS];
    for to in files.iter_mut().take(count) {
        *to = Some(fds.next().ok_or(Errno(libc::EPROTO))?);
    }
    swap.adopt(ledger, files.into_iter().flatten())
}
