//! Teardown: the node is emptied whole, or is as it was.
//!
//! All pages are copied to sysram first, some at a time; the device still has every one, and they are read there. Only when all
//! are copied, and every program has room for its own, do the copies become the pages. What comes in between, a writer who moves
//! a page himself, poison, whoever stops it, costs nothing but the copies.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use spmem_core::compressed::{Attempt, IsSet, Teardown};
use spmem_core::units::{FrameCount, Time};

use super::component::{Cram, Entry};
use super::{PageId, Telemetry};
use crate::backend::{Backend, Handle, PAGE_BYTES, Page};
use crate::mapped::Medium;

/// Pages copied at a time.
pub const COPY_BATCH: usize = 16;

/// A teardown under way.
#[derive(Debug)]
pub(super) struct Emptied {
    teardown: Teardown,
    /// What has been copied, and from where: a page that has moved since is not what was copied.
    copies: BTreeMap<PageId, (Handle, Box<Page>)>,
    is_copying: bool,
}

/// How far a teardown is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emptying {
    /// So many pages are copied; go on.
    Copying(FrameCount),
    /// Some program has no room for its pages: not before this time again.
    Waiting(Time),
    /// It was tried often enough: the node is in use as before.
    CalledOff,
    /// The node is empty, and nothing enters any more.
    Done,
}

impl<D: Medium + Telemetry> Cram<D> {
    /// Begins to empty the node: nothing enters any more. Go on with [`Cram::empty_on`].
    ///
    /// # Errors
    /// [`IsSet`] while that is under way.
    pub fn begin_emptying(&mut self) -> Result<(), IsSet> {
        let teardown = Teardown::begin(self.supply.gates_mut())?;
        self.emptying = Some(Emptied { teardown, copies: BTreeMap::new(), is_copying: false });
        Ok(())
    }

    /// Goes on emptying: a batch of copies, and the change when all are made. [`Emptying::CalledOff`] when none was begun.
    pub fn empty_on(&mut self, now: Time) -> Emptying {
        let Some(mut emptied) = self.emptying.take() else { return Emptying::CalledOff };
        if !emptied.is_copying {
            let (there, room) = self.room_for_all();
            match emptied.teardown.attempt(now, there, room) {
                Attempt::Complete => return self.complete(emptied),
                Attempt::Copy(_) => emptied.is_copying = true,
                Attempt::Wait(until) => {
                    self.emptying = Some(emptied);
                    return Emptying::Waiting(until);
                }
                Attempt::GiveUp => {
                    self.end(emptied);
                    return Emptying::CalledOff;
                }
            }
        }
        let missing = self.copy_some(&mut emptied);
        let copied = FrameCount(emptied.copies.len() as u64);
        if missing {
            self.emptying = Some(emptied);
            return Emptying::Copying(copied);
        }
        let (there, room) = self.room_for_all();
        if room.0 < there.0 {
            // Somebody has taken the room meanwhile: from the beginning.
            emptied.copies.clear();
            emptied.is_copying = false;
            self.emptying = Some(emptied);
            return Emptying::Copying(FrameCount(0));
        }
        for (id, (handle, bytes)) in core::mem::take(&mut emptied.copies) {
            // `copy_some` has dropped the copies of what has moved.
            self.release(handle);
            self.settle(id, bytes);
        }
        self.complete(emptied)
    }

    /// Stops emptying: everything is as it was.
    pub fn stop_emptying(&mut self) {
        if let Some(emptied) = self.emptying.take() {
            self.end(emptied);
        }
    }

    /// Pages on the device, and of these, how many have room below their programs' limits.
    fn room_for_all(&self) -> (FrameCount, FrameCount) {
        let mut there: BTreeMap<_, u64> = BTreeMap::new();
        for id in self.in_frame.values() {
            *there.entry(id.owner).or_default() += 1;
        }
        let room = there.iter().map(|(owner, &count)| {
            let left = self.programs.get(owner).map_or(0, |program| program.limit.0 - program.resident.0);
            count.min(left)
        });
        (FrameCount(there.values().sum()), FrameCount(room.sum()))
    }

    /// Copies some of the pages that are not copied; whether there are more.
    fn copy_some(&mut self, emptied: &mut Emptied) -> bool {
        let pages = &self.pages;
        emptied
            .copies
            .retain(|id, (handle, _)| matches!(pages.get(id), Some(Entry::Device(now)) if now == handle));
        let missing = self.in_frame.values().filter(|id| !emptied.copies.contains_key(id));
        let batch: Vec<PageId> = missing.copied().take(COPY_BATCH).collect();
        for &id in &batch {
            let Some(&Entry::Device(handle)) = self.pages.get(&id) else { continue };
            let mut page = Box::new([0; PAGE_BYTES]);
            match self.node.load(handle, &mut page) {
                Ok(()) => {
                    emptied.copies.insert(id, (handle, page));
                }
                // Lost before: its owner is told, and the node is emptied all the same.
                Err(corrupt) => {
                    self.lose(id, handle, corrupt.damage);
                }
            }
        }
        self.in_frame.values().any(|id| !emptied.copies.contains_key(id))
    }

    /// Nothing is there any more: the component's grant ends (R13).
    fn complete(&mut self, emptied: Emptied) -> Emptying {
        for block in self.balloon.drain(..) {
            let frames = block.order().frames();
            let freed = self.node.frames_mut().mm_mut().free(block);
            assert!(freed.is_ok(), "the balloon's blocks are this manager's: {freed:?}");
            self.supply.balloon_mut().gave(frames);
        }
        if let Some(key) = self.converging.take() {
            let cleared = self.supply.gates_mut().clear(key);
            assert!(cleared.is_ok(), "the key is of this node");
        }
        let held = self.node.revoke(|_, _| false);
        assert!(held.is_ok_and(|held| held.is_empty()), "nothing lies on the node");
        self.end(emptied);
        Emptying::Done
    }

    fn end(&mut self, emptied: Emptied) {
        let ended = emptied.teardown.end(self.supply.gates_mut());
        assert!(ended.is_ok(), "the teardown is of this node");
    }
}
