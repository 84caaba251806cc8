//! The store: pages as compressed objects in slots of blocks of frames.
//!
//! [`Store::insert`] picks a size class, takes a slot of the fullest block that has room, and
//! writes header and payload; [`Store::load`] checks and decodes; [`Store::remove`] gives the slot
//! back, and the frames once a block is empty. All are O(1).
//!
//! Takes no lock: the runtime owns the store behind one. Called through [`crate::Backend`].
//!
//! Holes: the store does not compact itself, since handles name places and it does not know who holds
//! them: see [`Store::relocate`]. A store that shrank keeps its metadata chunks.

use spmem_core::units::{Bytes, FrameNumber, NodeId, Order};

use super::block::{Blocks, Removed};
use super::class::{CLASSES, MAX_SLOT, class_for, is_fine};
use super::codec::{Codec, HEADER_BYTES, Header, MAX_PAYLOAD_BYTES, Storable, Verified};
use super::dense::{DenseDecoder, Encoding};
use super::frames::{FrameBlock, FrameBytes, FrameSource};
use super::handle::{Place, tag_of};
use super::stats::{self, Stats, Totals};
use crate::backend::{Backend, Corrupt, Damage, Full, Handle, PAGE_BYTES, Page, Usage};

/// Empty blocks kept, so that a store whose pages come and go does not take and give frames each
/// time: at most 128 KiB.
const MAX_SPARES: usize = 4;
/// Blocks that a coarse class has before the fine class below it opens one of its own: a fine class
/// saves about 2 % of its objects' bytes and keeps half a block of 64 KiB empty.
const FINE_FROM_BLOCKS: u32 = 64;
const SHORT_PAYLOAD: &str = "a payload is shorter than a page";
const ADDRESSABLE: &str = "frames that a `FrameBytes` covers are within the address space";

/// A store of compressed pages on frames from `F`, whose bytes are in `M`.
pub struct Store<F: FrameSource, M> {
    pub(super) frames: F,
    pub(super) memory: M,
    pub(super) codec: Codec,
    pub(super) blocks: Blocks<F::Block>,
    /// Oldest first, `None` behind the last.
    spares: [Option<F::Block>; MAX_SPARES],
    pub(super) totals: Totals,
    pub(super) dense: DenseDecoder,
}

/// An object found and its header read, nothing verified yet.
pub(super) struct Object<'a> {
    block: u32,
    slot: u8,
    pub(super) payload: &'a [u8],
    pub(super) checksum: u64,
}

impl<F: FrameSource, M: FrameBytes> Store<F, M> {
    /// An empty store. `seed` is a random number of this machine, for the checksums.
    ///
    /// `memory` must cover the capacity of `frames`.
    pub fn new(frames: F, memory: M, seed: u64) -> Self {
        Self {
            frames,
            memory,
            codec: Codec::new(seed),
            blocks: Blocks::new(),
            spares: [const { None }; MAX_SPARES],
            totals: Totals::default(),
            dense: DenseDecoder::new(),
        }
    }

    /// Encodes pages for this store; needs no access to it.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Where the frames come from.
    pub fn frames(&self) -> &F {
        &self.frames
    }

    /// Where the frames come from, to change it.
    pub fn frames_mut(&mut self) -> &mut F {
        &mut self.frames
    }

    /// Bytes of all objects, without what is around them.
    pub const fn payload(&self) -> Bytes {
        Bytes(self.totals.payload_bytes)
    }

    #[cfg(test)]
    pub(super) fn memory_mut(&mut self) -> &mut M {
        &mut self.memory
    }

    /// Where every byte is. O(number of size classes).
    pub fn stats(&self) -> Stats {
        stats::collect(&self.blocks, &self.totals, self.dense.metadata_bytes())
    }

    /// Stores a page.
    ///
    /// # Errors
    /// [`Full`] if there is no room, or no decoder that reads it ([`Store::prepare_dense`]), or not its dictionary in the
    /// slot; then nothing has changed (R18).
    ///
    /// # Panics
    /// If the page was encoded under another seed: it could never be loaded.
    pub fn insert(&mut self, page: &Verified<'_>) -> Result<Handle, Full> {
        assert!(self.codec.made(page), "a page is encoded by the codec of the store that takes it");
        let (bytes, checksum, encoding, dictionary) = match page.storable {
            Storable::Fill(fill) => {
                self.totals.same_filled_pages += 1;
                return Ok(Place::Fill(fill).pack());
            }
            Storable::Object { bytes, checksum, encoding, dictionary } => (bytes, checksum, encoding, dictionary),
        };
        let full = |store: &Self| store.full(HEADER_BYTES + bytes.len());
        if !self.dense.reads(encoding, dictionary) {
            return Err(full(self));
        }
        let (Some(class), Ok(length)) = (class_for(HEADER_BYTES + bytes.len()), u16::try_from(bytes.len())) else {
            return Err(full(self));
        };
        let Some(block) = self.block_with_room(class) else { return Err(full(self)) };
        Ok(self.write(block, bytes, length, checksum, encoding))
    }

    /// Puts an object of `length` bytes into a block that has room.
    pub(super) fn write(
        &mut self,
        block: u32,
        bytes: &[u8],
        length: u16,
        checksum: u64,
        encoding: Encoding,
    ) -> Handle {
        let slot = self.blocks.take_slot(block, u32::from(length));
        self.totals.payload_bytes += u64::from(length);
        self.totals.note_stored(encoding);
        let (offset, _) = self.slot_range(block, slot).expect("the slot was taken just now");
        let object = self.memory.bytes_mut(offset, HEADER_BYTES + bytes.len());
        object[..HEADER_BYTES].copy_from_slice(&Header { length, checksum }.to_bytes());
        object[HEADER_BYTES..].copy_from_slice(bytes);
        Place::Object { block, slot, tag: tag_of(checksum), encoding }.pack()
    }

    /// Writes the stored page to `page`. Takes about 3 us, 10 if it is dense.
    ///
    /// # Errors
    /// [`Corrupt`] if what is stored is not what was stored (R20); `page` is then zeros.
    pub fn load(&self, handle: Handle, page: &mut Page) -> Result<(), Corrupt> {
        match Place::unpack(handle) {
            Some(Place::Fill(fill)) => {
                fill.expand(page);
                Ok(())
            }
            Some(Place::Object { block, slot, tag, encoding }) => self
                .object(block, slot, tag)
                .and_then(|object| self.decode(&object, encoding, page))
                .map_err(|damage| {
                    page.fill(0);
                    self.corrupt(handle, damage)
                }),
            None => {
                page.fill(0);
                Err(self.corrupt(handle, Damage::UnknownHandle))
            }
        }
    }

    /// Is the stored page byte for byte `page`? The checksum rules most others out in under a
    /// microsecond; a yes means that the stored bytes were decoded, into `readback`, and compared.
    pub fn same_as(&self, handle: Handle, page: &Page, readback: &mut Page) -> bool {
        match Place::unpack(handle) {
            Some(Place::Fill(fill)) => fill.is(page),
            Some(Place::Object { block, slot, tag, encoding }) => {
                let Ok(object) = self.object(block, slot, tag) else { return false };
                let name = |slot| self.dense.name_of(slot);
                let checksum = self.codec.checksum_of(encoding, name, page, object.payload);
                checksum == Some(object.checksum)
                    && self.decode(&object, encoding, readback).is_ok()
                    && readback == page
            }
            None => false,
        }
    }

    /// Gives up a stored page.
    ///
    /// # Errors
    /// [`Corrupt`] if the handle does not name what is stored there; then nothing has changed: a
    /// damaged object keeps its place, so that the frame is not used again (R20).
    pub fn remove(&mut self, handle: Handle) -> Result<(), Corrupt> {
        let (block, slot, length, encoding) = match Place::unpack(handle) {
            Some(Place::Fill(_)) => {
                self.totals.same_filled_pages = self.totals.same_filled_pages.saturating_sub(1);
                return Ok(());
            }
            Some(Place::Object { block, slot, tag, encoding }) => {
                let object = self.object(block, slot, tag).map_err(|damage| self.corrupt(handle, damage))?;
                (object.block, object.slot, object.payload.len(), encoding)
            }
            None => return Err(self.corrupt(handle, Damage::UnknownHandle)),
        };
        self.give_up(block, slot, u32::try_from(length).expect(SHORT_PAYLOAD));
        // The handle says it, which is not in the store's memory: no damage there makes a dictionary seem unused.
        self.totals.note_gone(encoding);
        Ok(())
    }

    /// Moves a stored page to a fuller block, so that its own may run empty; its new handle, or
    /// `None` if it lies well. The old handle is void then.
    ///
    /// A caller that offers every handle it holds, now and then, compacts the store.
    ///
    /// # Errors
    /// [`Corrupt`] if the handle does not name what is stored there; then nothing has changed.
    pub fn relocate(&mut self, handle: Handle) -> Result<Option<Handle>, Corrupt> {
        let Some(Place::Object { block, slot, tag, encoding }) = Place::unpack(handle) else { return Ok(None) };
        let object = self.object(block, slot, tag).map_err(|damage| self.corrupt(handle, damage))?;
        let (length, bytes) = (object.payload.len(), HEADER_BYTES + object.payload.len());
        let Some(target) = self.fuller_block(block, bytes) else { return Ok(None) };
        let mut copy = [0; MAX_SLOT];
        let from = self.slot_range(block, slot);
        let length = u32::try_from(length).expect(SHORT_PAYLOAD);
        let new_slot = self.blocks.take_slot(target, length);
        if let (Some((from, _)), Some((to, _))) = (from, self.slot_range(target, new_slot)) {
            copy[..bytes].copy_from_slice(self.memory.bytes(from, bytes));
            self.memory.bytes_mut(to, bytes).copy_from_slice(&copy[..bytes]);
        }
        self.totals.payload_bytes += u64::from(length);
        self.give_up(block, slot, length);
        Ok(Some(Place::Object { block: target, slot: new_slot, tag, encoding }.pack()))
    }

    /// Gives back the frames of all empty blocks that are kept at hand.
    pub fn release_spares(&mut self) {
        self.totals.spare_frames = 0;
        for at in 0..MAX_SPARES {
            if let Some(spare) = self.spares[at].take() {
                self.release(spare);
            }
        }
    }

    /// A block of the class, or failing that of a larger one, that has room: a page is refused only
    /// if no frame can be had and no slot takes it.
    pub(super) fn block_with_room(&mut self, class: u8) -> Option<u32> {
        if let Some(block) = self.blocks.fullest(class) {
            return Some(block);
        }
        let populous = self.populous_class(class);
        if let Some(block) = self.blocks.fullest(populous).or_else(|| self.new_block(populous)) {
            return Some(block);
        }
        self.release_spares();
        let mut refused_order = u8::MAX;
        for (class, shape) in (0..).zip(&CLASSES).skip(usize::from(class)) {
            if let Some(block) = self.blocks.fullest(class) {
                return Some(block);
            }
            if shape.order < refused_order {
                if let Some(block) = self.new_block(class) {
                    return Some(block);
                }
                refused_order = shape.order;
            }
        }
        None
    }

    /// The class itself, or the next coarse one while that is too small for finer steps to pay.
    pub(super) fn populous_class(&self, class: u8) -> u8 {
        let mut populous = class;
        while is_fine(populous) && self.blocks.count_of(populous + 1) < FINE_FROM_BLOCKS {
            populous += 1;
        }
        populous
    }

    fn new_block(&mut self, class: u8) -> Option<u32> {
        let order = Order::new(CLASSES[usize::from(class)].order).ok()?;
        let frames = match self.take_spare(order) {
            Some(spare) => spare,
            None => self.new_frames(order)?,
        };
        match self.blocks.add(frames, class) {
            Ok(block) => Some(block),
            Err(frames) => {
                self.release(frames);
                None
            }
        }
    }

    /// A block to fill up with objects of that size before the one it is in: of a smaller class, since it was put where it
    /// is for want of a slot that fits, or of its own.
    fn fuller_block(&self, block: u32, bytes: usize) -> Option<u32> {
        let own = self.blocks.get(block)?;
        let smaller = (class_for(bytes)?..own.class_number()).find_map(|class| self.blocks.fullest(class));
        smaller.or_else(|| {
            let target = self.blocks.fullest(own.class_number())?;
            // The head of the fullest list only gains, so two blocks as full do not trade pages.
            let is_fuller = own.group().is_some() && self.blocks.get(target)?.group() >= own.group();
            (target != block && is_fuller).then_some(target)
        })
    }

    fn give_up(&mut self, block: u32, slot: u8, length: u32) {
        let given = self.blocks.give_slot(block, slot, length);
        self.totals.payload_bytes -= u64::from(given.payload_bytes);
        if given.is_empty {
            self.retire(block);
        }
    }

    /// An empty block goes back to where it came from; the last one of its class stays at hand.
    fn retire(&mut self, block: u32) {
        let Removed { frames, class } = self.blocks.remove(block);
        if self.blocks.fullest(class).is_some() {
            self.release(frames);
            return;
        }
        self.totals.spare_frames += frames.order().frames().0;
        if let Some(empty) = self.spares.iter_mut().find(|spare| spare.is_none()) {
            *empty = Some(frames);
        } else if let Some(oldest) = self.spares[0].replace(frames) {
            self.spares.rotate_left(1);
            self.totals.spare_frames -= oldest.order().frames().0;
            self.release(oldest);
        }
    }

    fn take_spare(&mut self, order: Order) -> Option<F::Block> {
        let at = self.spares.iter().position(|spare| spare.as_ref().is_some_and(|s| s.order() == order))?;
        let spare = self.spares[at].take();
        self.spares[at..].rotate_left(1);
        self.totals.spare_frames -= order.frames().0;
        spare
    }

    fn new_frames(&mut self, order: Order) -> Option<F::Block> {
        let frames = self.frames.alloc(order)?;
        let (offset, len) = range_of(&frames);
        if self.memory.prepare(offset, len) {
            return Some(frames);
        }
        self.frames.free(frames);
        None
    }

    /// Frames are zeroed before they are given back (R21).
    fn release(&mut self, frames: F::Block) {
        let (offset, len) = range_of(&frames);
        self.memory.discard(offset, len);
        self.frames.free(frames);
    }

    /// Checks and decodes.
    pub(super) fn decode(&self, object: &Object<'_>, encoding: Encoding, page: &mut Page) -> Result<(), Damage> {
        let Encoding::Dense { slot, .. } = encoding else {
            return self.codec.decode(object.payload, object.checksum, page);
        };
        self.dense.decode(&self.codec, (object.payload, object.checksum), slot, page)
    }

    /// Offset and size of a taken slot.
    pub(super) fn slot_range(&self, block: u32, slot: u8) -> Option<(usize, usize)> {
        let block = self.blocks.get(block).filter(|block| block.is_taken(slot))?;
        let size = block.class().slot_bytes();
        let first = usize::try_from(block.frames()?.first_frame().offset().0).ok()?;
        Some((first + usize::from(slot) * size, size))
    }

    pub(super) fn object(&self, block: u32, slot: u8, tag: u16) -> Result<Object<'_>, Damage> {
        let (offset, size) = self.slot_range(block, slot).ok_or(Damage::UnknownHandle)?;
        let (header, payload) =
            self.memory.bytes(offset, size).split_first_chunk::<HEADER_BYTES>().ok_or(Damage::UnknownHandle)?;
        let Header { length, checksum } = Header::from_bytes(*header);
        if tag_of(checksum) != tag {
            return Err(Damage::WrongObject);
        }
        let found = usize::from(length);
        let most = payload.len().min(MAX_PAYLOAD_BYTES);
        let payload = payload.get(..found).ok_or(Damage::Length { found, most })?;
        Ok(Object { block, slot, payload, checksum })
    }

    pub(super) fn corrupt(&self, handle: Handle, damage: Damage) -> Corrupt {
        let frame = match Place::unpack(handle) {
            Some(Place::Object { block, slot, .. }) => self
                .slot_range(block, slot)
                .and_then(|(offset, _)| u32::try_from(offset / PAGE_BYTES).ok().map(FrameNumber)),
            _ => None,
        };
        Corrupt { node: self.frames.node(), handle, frame, damage }
    }

    fn full(&self, wanted: usize) -> Full {
        let Usage { capacity, used, .. } = self.usage();
        Full { node: self.frames.node(), wanted: Bytes(wanted as u64), used, capacity }
    }
}

/// Offset and length of a block, bytes.
fn range_of(frames: &impl FrameBlock) -> (usize, usize) {
    let offset = usize::try_from(frames.first_frame().offset().0);
    let len = usize::try_from(frames.order().bytes().0);
    (offset.expect(ADDRESSABLE), len.expect(ADDRESSABLE))
}

impl<F: FrameSource, M: FrameBytes> Backend for Store<F, M> {
    type Stage = Codec;

    fn node(&self) -> NodeId {
        self.frames.node()
    }

    fn usage(&self) -> Usage {
        let stats = self.stats();
        Usage { capacity: self.frames.capacity().bytes(), used: stats.frames_used.bytes(), stored: stats.stored() }
    }

    fn stage(&self) -> Codec {
        self.codec
    }

    fn store(&mut self, staged: &Verified<'_>) -> Result<Handle, Full> {
        self.insert(staged)
    }

    fn load(&self, handle: Handle, page: &mut Page) -> Result<(), Corrupt> {
        Self::load(self, handle, page)
    }

    fn same_as(&self, handle: Handle, page: &Page, readback: &mut Page) -> bool {
        Self::same_as(self, handle, page, readback)
    }

    fn forget(&mut self, handle: Handle) -> Result<(), Corrupt> {
        self.remove(handle)
    }
}
