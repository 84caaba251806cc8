//! A byte-addressable node: pages at addresses, frames from behind the wall.
//!
//! [`MappedNode::new`] is for memory that ends with the process, [`MappedNode::open`] for what a [`Medium`] keeps. A page
//! enters by [`MappedNode::demote`] and is read where it is; on a node without WRITE_FENCE blocks can also be taken empty and
//! written ([`MappedNode::alloc`], [`MappedNode::write`]). On a fenced one a page that is to be written leaves first
//! ([`MappedNode::promote`], R17). Takes no lock: `&mut self` is the caller's.
//!
//! Holes: what is known of blocks in use lives in a tree on the heap, which must not fail. After a restart every block is the
//! root domain's. The node does not compact itself.
//!
//! Over 500 lines: one type, whose every step is ordered against a crash.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use spmem_core::frames::{FramesError, Metadata};
use spmem_core::grant::{Grant, GrantError, Held as HeldUnder, Rights};
use spmem_core::mm::{AllocError, Block};
use spmem_core::node::NodeSpec;
use spmem_core::poison::Damage as Hurt;
use spmem_core::units::{Bytes, DomainId, FrameCount, FrameNumber, NodeId, Order};
use spmem_core::zero::Initial;

use super::error::{OpenError, Refused};
use super::frames::NodeFrames;
use super::ledger::{Ledger, Opened, Overwrite, Repair};
use super::medium::Medium;
use super::record::{Damaged, Entry, PeerId, Record};
use super::records::checksum;
use crate::backend::{Backend, Corrupt, Damage, Full, Handle, PAGE_BYTES, Page, Stage, Unfit, Usage};
use crate::compressed::SetupError;

/// Frames that are tried for a page before the medium counts as broken.
const TRIES: u32 = 3;

/// A node whose frames are mapped.
#[derive(Debug)]
pub struct MappedNode<M> {
    frames: NodeFrames,
    medium: M,
    ledger: Option<Ledger>,
    held: BTreeMap<FrameNumber, Held>,
    capacity: FrameCount,
    used: FrameCount,
    /// Of the last block, where no record tells it.
    generation: u16,
    last_refusal: Option<Refused>,
}

/// A block in use.
#[derive(Debug)]
struct Held {
    block: Block,
    entry: Entry,
    checksum: u64,
    poisoned: Option<FrameNumber>,
}

impl<M: Medium> MappedNode<M> {
    /// A node of all whole frames of a medium that is not persistent. `lent` is for their metadata.
    ///
    /// # Errors
    /// [`SetupError`] with what the memory manager refused.
    pub fn new(
        medium: M,
        node: NodeId,
        spec: NodeSpec,
        lent: Metadata,
        initial: Initial,
    ) -> Result<Self, SetupError> {
        let capacity = Bytes(medium.len()).frames_floor();
        let frames = NodeFrames::new(node, spec, capacity, lent, initial)?;
        Ok(Self::empty(frames, medium, None, capacity))
    }

    /// Makes an empty node of a persistent medium, frame 0 at a multiple of `align` bytes; `uuid` is a random number that tells
    /// it from every other. It is closed then: [`MappedNode::open`] it.
    ///
    /// # Errors
    /// [`OpenError::Size`], [`OpenError::AlreadyFormatted`], [`OpenError::Medium`].
    pub fn format(medium: &mut M, uuid: [u8; 16], align: u64, overwrite: Overwrite) -> Result<(), OpenError> {
        Ledger::format(medium, uuid, align, overwrite)
    }

    /// Opens what is on a persistent medium: all blocks that were in use are. Nobody else has it open; the caller sees to that.
    /// `lend` gives memory for the metadata of so many frames.
    ///
    /// # Errors
    /// [`OpenError`]; the medium is as it was then.
    pub fn open(
        mut medium: M,
        node: NodeId,
        spec: NodeSpec,
        repair: Repair,
        lend: impl FnOnce(FrameCount) -> Result<Metadata, FramesError>,
    ) -> Result<(Self, Opened), OpenError> {
        let (mut ledger, mut opened) = Ledger::find(&medium)?;
        let records = ledger.records;
        let capacity = records.frames();
        let lent = lend(capacity).map_err(|cause| OpenError::Setup(SetupError::Node(cause.into())))?;
        let mut frames =
            NodeFrames::new(node, spec, capacity, lent, Initial::Unknown).map_err(OpenError::Setup)?;
        let scan = ledger.recover(&mut medium, repair, &mut opened)?;
        let (mut held, mut used) = (BTreeMap::new(), 0);
        for (frame, entry, checksum) in scan.blocks {
            let order = entry.order;
            let block = frames.alloc_at(frame, order).map_err(|error| match error {
                AllocError::Exhausted { cause, .. } => OpenError::Overlap { frame, order, cause },
                other => OpenError::Alloc(other),
            })?;
            used += order.frames().0;
            held.insert(frame, Held { block, entry, checksum, poisoned: None });
        }
        ledger.set_open(&mut medium)?;
        let mut opened_node = Self { held, ..Self::empty(frames, medium, Some(ledger), capacity) };
        opened_node.used = FrameCount(used);
        for frame in scan.poisoned {
            opened_node.mark_poisoned(frame);
        }
        Ok((opened_node, opened))
    }

    fn empty(frames: NodeFrames, medium: M, ledger: Option<Ledger>, capacity: FrameCount) -> Self {
        let (held, used) = (BTreeMap::new(), FrameCount(0));
        Self { frames, medium, ledger, held, capacity, used, generation: 0, last_refusal: None }
    }

    /// Says on the medium that nobody has it open, and gives it back.
    ///
    /// # Errors
    /// [`Refused::Medium`]: the next one to open it will find it left open, and nothing else amiss.
    pub fn close(mut self) -> Result<M, Refused> {
        if let Some(ledger) = &mut self.ledger {
            let poisoned =
                self.frames.mm().stats(self.frames.node()).map_or(FrameCount(0), |stats| stats.poisoned);
            ledger.set_closed(&mut self.medium, self.used, poisoned)?;
        }
        Ok(self.medium)
    }

    /// Frames, grants and domains.
    pub const fn frames(&self) -> &NodeFrames {
        &self.frames
    }

    /// The same, to change.
    pub const fn frames_mut(&mut self) -> &mut NodeFrames {
        &mut self.frames
    }

    /// What it is made of.
    pub const fn medium(&self) -> &M {
        &self.medium
    }

    /// Why the last page was not stored ([`Backend::store`] says only that it was not).
    pub const fn last_refusal(&self) -> Option<&Refused> {
        self.last_refusal.as_ref()
    }

    /// All blocks in use, lowest first, with their orders.
    pub fn handles(&self) -> impl Iterator<Item = (Handle, Order)> + '_ {
        self.held.iter().map(|(&frame, held)| (handle(frame, held.entry.generation), held.entry.order))
    }

    /// Takes a page in, for a domain: it is durable, and nobody writes it, when this returns.
    ///
    /// # Errors
    /// [`Refused::Alloc`] when there is no frame for it (R10); [`Refused::Medium`] when what was written did not read back, on
    /// frames that are out of use now.
    pub fn demote(&mut self, domain: DomainId, page: &Page) -> Result<Handle, Refused> {
        let mut tries = 0;
        loop {
            let block = self.frames.alloc(domain, Order::ZERO)?;
            let frame = block.first_frame();
            let filled = self.new_entry(frame, Order::ZERO, true).and_then(|entry| {
                let checksum = self.fill(frame, entry, page)?;
                Ok((entry, checksum))
            });
            match filled {
                Ok((entry, checksum)) => return Ok(self.hold(block, entry, checksum)),
                Err(cause) => {
                    self.retire(block);
                    tries += 1;
                    if tries == TRIES {
                        return Err(cause);
                    }
                }
            }
        }
    }

    /// The data before the record that speaks of it.
    fn fill(&mut self, frame: FrameNumber, entry: Entry, page: &Page) -> Result<u64, Refused> {
        let offset = self.offset(frame);
        let checksum = self.checksum(frame, page);
        self.medium.write(offset, page)?;
        self.medium.flush(offset, PAGE_BYTES as u64)?;
        let mut back = [0; PAGE_BYTES];
        self.medium.read(offset, &mut back)?;
        if back != *page {
            let damage = Damage::Checksum { stored: checksum, found: self.checksum(frame, &back) };
            return Err(self.corrupt(handle(frame, entry.generation), damage).into());
        }
        if let Some(ledger) = &self.ledger {
            ledger.records.write_checksum(&mut self.medium, frame, checksum)?;
        }
        self.record(frame, Some(entry), false)?;
        Ok(checksum)
    }

    /// Takes an empty block for a domain, all zero (R21), to be written where it is.
    ///
    /// # Errors
    /// [`Refused::Fenced`] (R17), [`Refused::Alloc`], [`Refused::Medium`].
    pub fn alloc(&mut self, domain: DomainId, order: Order) -> Result<Handle, Refused> {
        self.check_fence()?;
        let block = self.frames.alloc(domain, order)?;
        let cleared = self.new_entry(block.first_frame(), order, false).and_then(|entry| {
            self.clear(&block, entry)?;
            Ok(entry)
        });
        match cleared {
            Ok(entry) => Ok(self.hold(block, entry, 0)),
            Err(cause) => {
                self.retire(block);
                Err(cause)
            }
        }
    }

    fn clear(&mut self, block: &Block, entry: Entry) -> Result<(), Refused> {
        let (offset, len) = (self.offset(block.first_frame()), block.bytes().0);
        if !block.is_zeroed() {
            self.medium.zero(offset, len)?;
            self.medium.flush(offset, len)?;
        }
        self.record(block.first_frame(), Some(entry), false)
    }

    /// The address where a block's bytes are, for those who may read it by their grants; `None` where nothing is mapped. Good
    /// until the block is given back. What is read there is not checked.
    ///
    /// # Errors
    /// [`Refused::Rights`], [`Refused::HandedOver`], [`Refused::Corrupt`].
    pub fn place_to_read(&self, handle: Handle, grants: &[&Grant]) -> Result<Option<usize>, Refused> {
        self.check_rights(Rights::MAP_READ, grants)?;
        let (frame, _) = self.find_own(handle)?;
        Ok(self.medium.address(self.offset(frame)))
    }

    /// As [`MappedNode::place_to_read`], for those who may write it. From now on nothing tells wrong bytes from written ones.
    ///
    /// # Errors
    /// [`Refused::Fenced`] (R17), and as [`MappedNode::place_to_read`].
    pub fn place_to_write(&mut self, handle: Handle, grants: &[&Grant]) -> Result<Option<usize>, Refused> {
        self.check_fence()?;
        self.check_rights(Rights::MAP_READ | Rights::MAP_WRITE, grants)?;
        let frame = self.find_own(handle)?.0;
        self.unseal(frame)?;
        Ok(self.medium.address(self.offset(frame)))
    }

    /// Where a block's bytes are on the medium.
    ///
    /// # Errors
    /// [`Refused::Corrupt`] when nothing is stored under the handle.
    pub fn place_on_medium(&self, handle: Handle) -> Result<u64, Refused> {
        Ok(self.offset(self.find(handle)?.0))
    }

    /// Copies bytes of a block out; those of a page that was demoted are not checked, [`Backend::load`] does that.
    ///
    /// # Errors
    /// [`Refused::OutOfBlock`], [`Refused::Corrupt`], [`Refused::HandedOver`], [`Refused::Medium`].
    pub fn read(&self, handle: Handle, offset: u64, into: &mut [u8]) -> Result<(), Refused> {
        let (frame, held) = self.find_own(handle)?;
        if held.poisoned.is_some() {
            return Err(self.corrupt(handle, Damage::Poisoned).into());
        }
        check_range(held.entry.order, offset, into.len() as u64)?;
        Ok(self.medium.read(self.offset(frame) + offset, into)?)
    }

    /// Writes bytes of a block where they are; durable once [`MappedNode::flush`] has returned.
    ///
    /// # Errors
    /// [`Refused::Fenced`] (R17): promote it. [`Refused::OutOfBlock`], [`Refused::Corrupt`], [`Refused::HandedOver`],
    /// [`Refused::Medium`].
    pub fn write(&mut self, handle: Handle, offset: u64, bytes: &[u8]) -> Result<(), Refused> {
        self.check_fence()?;
        let (frame, held) = self.find_own(handle)?;
        check_range(held.entry.order, offset, bytes.len() as u64)?;
        self.unseal(frame)?;
        Ok(self.medium.write(self.offset(frame) + offset, bytes)?)
    }

    /// What was written to a block is durable when this returns.
    ///
    /// # Errors
    /// [`Refused::Corrupt`], [`Refused::HandedOver`], [`Refused::Medium`].
    pub fn flush(&mut self, handle: Handle) -> Result<(), Refused> {
        let (frame, held) = self.find_own(handle)?;
        let len = held.entry.order.bytes().0;
        Ok(self.medium.flush(self.offset(frame), len)?)
    }

    /// Moves a demoted page out, to be written elsewhere: checked, and its frame free.
    ///
    /// # Errors
    /// [`Refused::Corrupt`]: `page` is zeros, and nothing has changed. [`Refused::HandedOver`], [`Refused::Medium`].
    pub fn promote(&mut self, handle: Handle, page: &mut Page) -> Result<(), Refused> {
        Backend::load(self, handle, page)?;
        self.release(handle)
    }

    /// Gives a block back.
    ///
    /// # Errors
    /// [`Refused::Corrupt`] when nothing is stored under the handle: it was given back before. [`Refused::HandedOver`];
    /// [`Refused::Medium`]: it stays taken.
    pub fn release(&mut self, handle: Handle) -> Result<(), Refused> {
        let (frame, held) = self.find_own(handle)?;
        let record =
            Record { block: None, is_poisoned: held.poisoned == Some(frame), last: held.entry.generation };
        self.write_record(frame, record)?;
        let held = self.held.remove(&frame).expect("it was found just now");
        self.medium.discard(self.offset(frame), held.block.bytes().0);
        self.used = FrameCount(self.used.0 - held.entry.order.frames().0);
        self.frames.free(held.block);
        Ok(())
    }

    /// The memory of a frame is broken: it is not given out again (R20). Whoever holds the block is to be told: its handle.
    ///
    /// # Errors
    /// [`Refused::OutOfBlock`] for a frame that is not the node's; [`Refused::Medium`]: it is out of use, but a restart forgets
    /// that. So it does of the first frame of a block that a peer has, until the block is back: the record is the peer's.
    pub fn poison(&mut self, frame: FrameNumber) -> Result<Option<Handle>, Refused> {
        if u64::from(frame.0) >= self.capacity.0 {
            return Err(Refused::OutOfBlock { offset: frame.offset().0, len: PAGE_BYTES as u64 });
        }
        let hurt = self.mark_poisoned(frame);
        let entry = self.held.get(&frame).map(|held| held.entry);
        if entry.is_none_or(|entry| entry.owner == PeerId::COMPONENT && !entry.is_fresh) {
            self.record(frame, entry, true)?;
        }
        Ok(hurt)
    }

    fn mark_poisoned(&mut self, frame: FrameNumber) -> Option<Handle> {
        let node = self.frames.node();
        let report = self.frames.mm_mut().poison(node, frame).ok()?;
        let Hurt::Holder(holder) = report.damage else { return None };
        let first = holder.block.first;
        let held = self.held.get_mut(&first)?;
        // Its first frame's record tells whether that one is.
        if held.poisoned != Some(first) {
            held.poisoned = Some(frame);
        }
        Some(handle(first, held.entry.generation))
    }

    /// Ends the component's grant: no frame is had any more. Every page that can leave is offered to `sink`, which returns
    /// whether it has taken it. What is still held, and by whom, is the answer; empty when all is gone (R13).
    ///
    /// # Errors
    /// [`GrantError::Revoked`] when it has ended before; [`GrantError::NoMemory`] when there is none for the list.
    pub fn revoke(&mut self, mut sink: impl FnMut(Handle, &Page) -> bool) -> Result<Vec<HeldUnder>, GrantError> {
        self.frames.revoke(self.frames.grant().id())?;
        let sealed: Vec<Handle> =
            self.handles().map(|(handle, _)| handle).filter(|&one| self.is_sealed(one)).collect();
        let mut page = Box::new([0; PAGE_BYTES]);
        for handle in sealed {
            if Backend::load(self, handle, &mut page).is_ok() && sink(handle, &page) {
                // One whose record cannot be written stays, and is listed.
                let _ = self.release(handle);
            }
        }
        self.frames.held()
    }

    fn is_sealed(&self, handle: Handle) -> bool {
        self.find_own(handle).is_ok_and(|(_, held)| held.entry.is_sealed)
    }

    /// Hands a block over to a peer, who may write it from now on, and the component may not. What it holds is durable before.
    ///
    /// # Errors
    /// [`Refused::NotPersistent`], [`Refused::Fenced`] (what is fenced nobody writes), [`Refused::Corrupt`],
    /// [`Refused::HandedOver`]; [`Refused::Medium`]: [`MappedNode::accept`] tells whose it is.
    pub fn hand_over(&mut self, handle: Handle, to: PeerId) -> Result<(), Refused> {
        self.check_fence()?;
        if self.ledger.is_none() {
            return Err(Refused::NotPersistent);
        }
        let (frame, held) = self.find_own(handle)?;
        let entry = Entry { owner: to, is_fresh: true, is_sealed: false, ..held.entry };
        let is_poisoned = held.poisoned == Some(frame);
        self.medium.flush(self.offset(frame), entry.order.bytes().0)?;
        // From here on it may be the peer's, whatever comes back.
        if let Some(held) = self.held.get_mut(&frame) {
            held.entry = entry;
        }
        self.record(frame, Some(entry), is_poisoned)
    }

    /// Takes a block that a peer has handed back. What the peer wrote is seen from now on.
    ///
    /// # Errors
    /// [`Refused::HandedOver`] while a peer has it; [`Refused::NotPersistent`], [`Refused::Corrupt`], [`Refused::Medium`].
    pub fn accept(&mut self, handle: Handle) -> Result<(), Refused> {
        let (frame, held) = self.find(handle)?;
        let (known, is_poisoned) = (held.entry, held.poisoned == Some(frame));
        let records = self.ledger.as_ref().ok_or(Refused::NotPersistent)?.records;
        records.invalidate(&mut self.medium, frame)?;
        let record = records.read(&self.medium, frame)?.0.ok();
        let is_it = |entry: &Entry| (entry.order, entry.generation) == (known.order, known.generation);
        let Some(entry) = record.and_then(|record| record.block).filter(is_it) else {
            return Err(self.corrupt(handle, Damage::WrongObject).into());
        };
        if entry.owner != PeerId::COMPONENT {
            return Err(Refused::HandedOver { to: entry.owner });
        }
        self.medium.invalidate(self.offset(frame), entry.order.bytes().0)?;
        let entry = Entry { is_fresh: false, ..entry };
        self.record(frame, Some(entry), is_poisoned || record.is_some_and(|record| record.is_poisoned))?;
        if let Some(held) = self.held.get_mut(&frame) {
            held.entry = entry;
        }
        Ok(())
    }

    /// Of a block that begins at a free frame: no handle from before names it. On a persistent medium the frame's record tells
    /// which ones there were.
    fn new_entry(&mut self, frame: FrameNumber, order: Order, is_sealed: bool) -> Result<Entry, Refused> {
        let last = match &self.ledger {
            None => self.generation,
            Some(ledger) => match ledger.records.read(&self.medium, frame)?.0 {
                Ok(record) => record.last,
                Err(Damaged) => return Err(self.corrupt(handle(frame, 1), Damage::Unreadable).into()),
            },
        };
        let generation = last.checked_add(1).unwrap_or(1);
        self.generation = generation;
        Ok(Entry { order, generation, owner: PeerId::COMPONENT, is_sealed, is_fresh: false })
    }

    fn hold(&mut self, block: Block, entry: Entry, checksum: u64) -> Handle {
        let frame = block.first_frame();
        self.used = FrameCount(self.used.0 + entry.order.frames().0);
        self.held.insert(frame, Held { block, entry, checksum, poisoned: None });
        handle(frame, entry.generation)
    }

    /// A block that the medium did not take goes out of use: what is there is not known.
    fn retire(&mut self, block: Block) {
        let (first, count) = (block.first_frame(), block.order().frames().0);
        let frames = (first.0..).map(FrameNumber).zip(0..count).map(|(frame, _)| frame);
        for frame in frames {
            self.mark_poisoned(frame);
            // Whether that can be written matters to the next process only.
            let _ = self.record(frame, None, true);
        }
        self.medium.discard(self.offset(block.first_frame()), block.bytes().0);
        self.frames.free(block);
    }

    /// From the first write on its checksum means nothing.
    fn unseal(&mut self, frame: FrameNumber) -> Result<(), Refused> {
        let held = self.held.get(&frame).filter(|held| held.entry.is_sealed);
        let Some(held) = held else { return Ok(()) };
        let entry = Entry { is_sealed: false, ..held.entry };
        let is_poisoned = held.poisoned == Some(frame);
        self.record(frame, Some(entry), is_poisoned)?;
        if let Some(held) = self.held.get_mut(&frame) {
            held.entry = entry;
        }
        Ok(())
    }

    fn record(&mut self, frame: FrameNumber, block: Option<Entry>, is_poisoned: bool) -> Result<(), Refused> {
        self.write_record(frame, Record { block, is_poisoned, last: 0 })
    }

    fn write_record(&mut self, frame: FrameNumber, record: Record) -> Result<(), Refused> {
        match &self.ledger {
            Some(ledger) => Ok(ledger.records.write(&mut self.medium, frame, record)?),
            None => Ok(()),
        }
    }

    fn offset(&self, frame: FrameNumber) -> u64 {
        self.ledger.as_ref().map_or(frame.offset().0, |ledger| ledger.records.data(frame))
    }

    fn checksum(&self, frame: FrameNumber, page: &Page) -> u64 {
        self.ledger
            .as_ref()
            .map_or_else(|| checksum(0, frame, page), |ledger| ledger.records.checksum(frame, page))
    }

    fn find(&self, handle: Handle) -> Result<(FrameNumber, &Held), Refused> {
        let (frame, generation) = take_apart(handle);
        let held = self.held.get(&frame).ok_or_else(|| self.corrupt(handle, Damage::UnknownHandle))?;
        if held.entry.generation != generation {
            return Err(self.corrupt(handle, Damage::WrongObject).into());
        }
        Ok((frame, held))
    }

    fn find_own(&self, handle: Handle) -> Result<(FrameNumber, &Held), Refused> {
        let (frame, held) = self.find(handle)?;
        match held.entry.owner {
            PeerId::COMPONENT if !held.entry.is_fresh => Ok((frame, held)),
            to => Err(Refused::HandedOver { to }),
        }
    }

    fn check_fence(&self) -> Result<(), Refused> {
        if self.frames.is_fenced() { Err(Refused::Fenced { node: self.frames.node() }) } else { Ok(()) }
    }

    fn check_rights(&self, rights: Rights, grants: &[&Grant]) -> Result<(), Refused> {
        self.frames.mm().registry().check(self.frames.node(), rights, grants).map_err(Refused::Rights)
    }

    fn corrupt(&self, handle: Handle, damage: Damage) -> Corrupt {
        let frame = Some(take_apart(handle).0).filter(|frame| u64::from(frame.0) < self.capacity.0);
        Corrupt { node: self.frames.node(), handle, frame, damage }
    }

    fn load_checked(&self, handle: Handle, page: &mut Page) -> Result<(), Corrupt> {
        let as_corrupt = |refused| match refused {
            Refused::Corrupt(corrupt) => corrupt,
            Refused::HandedOver { .. } => self.corrupt(handle, Damage::HandedOver),
            _ => self.corrupt(handle, Damage::Unreadable),
        };
        let (frame, held) = self.find_own(handle).map_err(as_corrupt)?;
        if held.poisoned.is_some() {
            return Err(self.corrupt(handle, Damage::Poisoned));
        }
        let unreadable = |_| self.corrupt(handle, Damage::Unreadable);
        self.medium.read(self.offset(frame), page).map_err(unreadable)?;
        let found = self.checksum(frame, page);
        if held.entry.is_sealed && found != held.checksum {
            return Err(self.corrupt(handle, Damage::Checksum { stored: held.checksum, found }));
        }
        Ok(())
    }
}

/// Pages go to a mapped node as they are.
#[derive(Clone, Copy, Debug)]
pub struct Whole;

impl Stage for Whole {
    type Workspace = ();
    type Staged<'a> = &'a Page;

    fn workspace(&self) {}

    fn stage<'a>(&self, page: &'a Page, _workspace: &'a mut ()) -> Result<&'a Page, Unfit> {
        Ok(page)
    }
}

/// For callers that copy pages in and out: all of them are the root domain's.
impl<M: Medium> Backend for MappedNode<M> {
    type Stage = Whole;

    fn node(&self) -> NodeId {
        self.frames.node()
    }

    fn usage(&self) -> Usage {
        Usage { capacity: self.capacity.bytes(), used: self.used.bytes(), stored: self.used.bytes() }
    }

    fn stage(&self) -> Whole {
        Whole
    }

    fn store(&mut self, staged: &&Page) -> Result<Handle, Full> {
        self.demote(DomainId::ROOT, staged).map_err(|refused| {
            self.last_refusal = Some(refused);
            let Usage { capacity, used, .. } = self.usage();
            Full { node: self.frames.node(), wanted: Bytes(PAGE_BYTES as u64), used, capacity }
        })
    }

    fn load(&self, handle: Handle, page: &mut Page) -> Result<(), Corrupt> {
        self.load_checked(handle, page).inspect_err(|_| page.fill(0))
    }

    fn same_as(&self, handle: Handle, page: &Page, readback: &mut Page) -> bool {
        Backend::load(self, handle, readback).is_ok() && readback == page
    }

    fn forget(&mut self, handle: Handle) -> Result<(), Corrupt> {
        self.release(handle).map_err(|refused| match refused {
            Refused::Corrupt(corrupt) => corrupt,
            Refused::HandedOver { .. } => self.corrupt(handle, Damage::HandedOver),
            _ => self.corrupt(handle, Damage::Unreadable),
        })
    }
}

/// Frame and generation: bits 0..32 and 32..48, the latter never 0.
fn handle(frame: FrameNumber, generation: u16) -> Handle {
    Handle::from_raw(u64::from(generation) << 32 | u64::from(frame.0))
        .expect("a generation is not 0 and has 16 bits")
}

fn take_apart(handle: Handle) -> (FrameNumber, u16) {
    let raw = handle.raw();
    let (frame, generation) = (u32::try_from(raw & 0xffff_ffff), u16::try_from(raw >> 32));
    (FrameNumber(frame.expect("masked")), generation.expect("a handle has 48 bits"))
}

pub(super) fn check_range(order: Order, offset: u64, len: u64) -> Result<(), Refused> {
    let is_of_words = offset.is_multiple_of(8) && len.is_multiple_of(8);
    let is_within = offset.checked_add(len).is_some_and(|end| end <= order.bytes().0);
    if is_of_words && is_within { Ok(()) } else { Err(Refused::OutOfBlock { offset, len }) }
}
