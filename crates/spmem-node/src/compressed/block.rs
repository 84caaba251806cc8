//! Blocks: which slots of which frames are taken, and which block to take the next slot from.
//!
//! [`Blocks`] holds one [`Block`] of 48 bytes for each block of frames, and for each size class eight
//! lists of its blocks that have room, by how full they are. Taking from the fullest list is what
//! lets other blocks run empty. All steps are O(1).
//!
//! Metadata lives on the heap, in sysram (R7), in chunks that never move, so that growing neither
//! copies nor doubles.

use alloc::vec::Vec;

use super::class::{CLASS_COUNT, CLASSES, Class, MAX_SLOTS};
use super::handle::MAX_BLOCKS;

/// No block.
const NIL: u32 = u32::MAX;
const CHUNK: usize = 64;
/// Lists of a class; a block with `n` of `slots` taken is in list `8 n / slots`.
const FULLNESS_GROUPS: usize = 8;

/// One block of frames, cut into slots of one class.
#[derive(Debug)]
pub(super) struct Block<B> {
    taken: [u64; MAX_SLOTS / 64],
    /// `None` while the entry is vacant.
    frames: Option<B>,
    /// Bytes of payload in its slots.
    pub(super) payload_bytes: u32,
    prev: u32,
    next: u32,
    class: u8,
    used: u8,
}

impl<B> Block<B> {
    const VACANT: Self = Self {
        taken: [0; MAX_SLOTS / 64],
        frames: None,
        payload_bytes: 0,
        prev: NIL,
        next: NIL,
        class: 0,
        used: 0,
    };

    pub(super) fn frames(&self) -> Option<&B> {
        self.frames.as_ref()
    }

    pub(super) fn class(&self) -> Class {
        CLASSES[usize::from(self.class)]
    }

    pub(super) fn class_number(&self) -> u8 {
        self.class
    }

    pub(super) fn is_taken(&self, slot: u8) -> bool {
        self.taken.get(usize::from(slot) / 64).is_some_and(|word| word >> (slot % 64) & 1 != 0)
    }

    fn lowest_free(&self) -> Option<u8> {
        let mut base = 0;
        for word in self.taken {
            let free = word.trailing_ones();
            if free < 64 {
                return u8::try_from(base + free).ok().filter(|slot| *slot < self.class().slots);
            }
            base += 64;
        }
        None
    }

    /// The list it belongs to; `None` for one without room.
    pub(super) fn group(&self) -> Option<usize> {
        let slots = self.class().slots;
        (self.used < slots).then(|| usize::from(self.used) * FULLNESS_GROUPS / usize::from(slots))
    }
}

/// How much of a class is in use.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ClassUse {
    pub(super) blocks: u32,
    pub(super) slots_used: u32,
}

/// All blocks of one store.
pub(super) struct Blocks<B> {
    chunks: Vec<Vec<Block<B>>>,
    /// First of the unused entries, linked through `next`.
    vacant: u32,
    heads: [[u32; FULLNESS_GROUPS]; CLASS_COUNT],
    uses: [ClassUse; CLASS_COUNT],
}

impl<B> Blocks<B> {
    pub(super) fn new() -> Self {
        Self {
            chunks: Vec::new(),
            vacant: NIL,
            heads: [[NIL; FULLNESS_GROUPS]; CLASS_COUNT],
            uses: [ClassUse::default(); CLASS_COUNT],
        }
    }

    pub(super) fn uses(&self) -> impl Iterator<Item = (Class, ClassUse)> + '_ {
        CLASSES.iter().copied().zip(self.uses.iter().copied())
    }

    /// Bytes of heap that describe the blocks.
    pub(super) fn metadata_bytes(&self) -> usize {
        self.chunks.capacity() * size_of::<Vec<Block<B>>>()
            + self.chunks.len() * CHUNK * size_of::<Block<B>>()
            + size_of::<Self>()
    }

    /// The block of that number, if there is one.
    pub(super) fn get(&self, id: u32) -> Option<&Block<B>> {
        let id = usize::try_from(id).ok()?;
        self.chunks.get(id / CHUNK)?.get(id % CHUNK).filter(|block| block.frames.is_some())
    }

    /// How many blocks the class has.
    pub(super) fn count_of(&self, class: u8) -> u32 {
        self.uses.get(usize::from(class)).map_or(0, |in_use| in_use.blocks)
    }

    /// The fullest block of the class that has room, more or less: one of the fullest eighth that has any.
    pub(super) fn fullest(&self, class: u8) -> Option<u32> {
        self.heads[usize::from(class)].iter().rev().copied().find(|id| *id != NIL)
    }

    /// Adds an empty block. If there is no heap or no number for it, the frames come back.
    pub(super) fn add(&mut self, frames: B, class: u8) -> Result<u32, B> {
        if self.vacant == NIL && self.grow().is_none() {
            return Err(frames);
        }
        let id = self.vacant;
        let block = self.at(id);
        let next_vacant = block.next;
        *block = Block { frames: Some(frames), class, ..Block::VACANT };
        self.vacant = next_vacant;
        self.uses[usize::from(class)].blocks += 1;
        self.link(id);
        Ok(id)
    }

    /// Takes a slot of a block that has room.
    pub(super) fn take_slot(&mut self, id: u32, payload_bytes: u32) -> u8 {
        let block = self.at(id);
        let slot = block.lowest_free().expect("a block on a list has room");
        let before = block.group();
        block.taken[usize::from(slot) / 64] |= 1 << (slot % 64);
        block.used += 1;
        block.payload_bytes += payload_bytes;
        let class = usize::from(block.class);
        let after = block.group();
        self.uses[class].slots_used += 1;
        self.relink(id, before, after);
        slot
    }

    /// Gives a taken slot back and says whether its block is empty now.
    ///
    /// `payload_bytes` is what the object's header says, which may be wrong if it is damaged:
    /// the sum of a block never goes below zero and is exact again once the block is empty.
    pub(super) fn give_slot(&mut self, id: u32, slot: u8, payload_bytes: u32) -> Given {
        let block = self.at(id);
        debug_assert!(block.is_taken(slot));
        let before = block.group();
        block.taken[usize::from(slot) / 64] &= !(1 << (slot % 64));
        block.used -= 1;
        let freed = if block.used == 0 { block.payload_bytes } else { payload_bytes.min(block.payload_bytes) };
        block.payload_bytes -= freed;
        let is_empty = block.used == 0;
        let class = usize::from(block.class);
        let after = block.group();
        self.uses[class].slots_used -= 1;
        self.relink(id, before, after);
        Given { payload_bytes: freed, is_empty }
    }

    /// Removes an empty block; its frames are the caller's again.
    pub(super) fn remove(&mut self, id: u32) -> Removed<B> {
        self.unlink(id, 0);
        let vacant = self.vacant;
        let block = self.at(id);
        assert_eq!(block.used, 0, "only an empty block is removed");
        let class = block.class;
        let frames = block.frames.take().expect("a block has frames until it is removed");
        *block = Block { next: vacant, ..Block::VACANT };
        self.vacant = id;
        self.uses[usize::from(class)].blocks -= 1;
        Removed { frames, class }
    }

    fn grow(&mut self) -> Option<()> {
        let base = self.chunks.len() * CHUNK;
        if base + CHUNK > MAX_BLOCKS {
            return None;
        }
        let base = u32::try_from(base).ok()?;
        let mut chunk = Vec::new();
        chunk.try_reserve_exact(CHUNK).ok()?;
        self.chunks.try_reserve(1).ok()?;
        let mut next = base;
        chunk.resize_with(CHUNK, || {
            next += 1;
            Block { next, ..Block::VACANT }
        });
        chunk[CHUNK - 1].next = self.vacant;
        self.vacant = base;
        self.chunks.push(chunk);
        Some(())
    }

    fn relink(&mut self, id: u32, before: Option<usize>, after: Option<usize>) {
        if before == after {
            return;
        }
        if let Some(group) = before {
            self.unlink(id, group);
        }
        if after.is_some() {
            self.link(id);
        }
    }

    fn link(&mut self, id: u32) {
        let block = self.at(id);
        let Some(group) = block.group() else { return };
        let class = usize::from(block.class);
        let head = self.heads[class][group];
        let block = self.at(id);
        (block.prev, block.next) = (NIL, head);
        if head != NIL {
            self.at(head).prev = id;
        }
        self.heads[class][group] = id;
    }

    fn unlink(&mut self, id: u32, group: usize) {
        let block = self.at(id);
        let (prev, next, class) = (block.prev, block.next, usize::from(block.class));
        if prev == NIL {
            self.heads[class][group] = next;
        } else {
            self.at(prev).next = next;
        }
        if next != NIL {
            self.at(next).prev = prev;
        }
    }

    /// A block that one of our own links or a checked handle names.
    fn at(&mut self, id: u32) -> &mut Block<B> {
        let id = id as usize;
        &mut self.chunks[id / CHUNK][id % CHUNK]
    }
}

/// What giving back a slot came to.
pub(super) struct Given {
    pub(super) payload_bytes: u32,
    pub(super) is_empty: bool,
}

/// A block that is no more.
pub(super) struct Removed<B> {
    pub(super) frames: B,
    pub(super) class: u8,
}

const _: () = assert!(size_of::<Block<spmem_core::mm::Block>>() == 48);
