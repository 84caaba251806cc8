//! Where the store's bytes are: every byte of its frames has one name.

use spmem_core::units::{Bytes, FrameCount, PAGE_SIZE};

use super::block::Blocks;
use super::codec::HEADER_BYTES;
use super::dense::{Encoding, Slot};

/// What a store holds and what it loses, in bytes.
///
/// `payload + header + rounding + tail + free_slot + spare` is exactly the bytes of `frames_used`;
/// `metadata` comes on top, in sysram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Pages stored as objects, in frames.
    pub object_pages: u64,
    /// Of these, in the dense encoding.
    pub dense_pages: u64,
    /// Of these, those that were stored as lz4 before.
    pub anew_pages: u64,
    /// Pages stored as a value in their handle.
    pub same_filled_pages: u64,
    /// Compressed bytes of all objects.
    pub payload: Bytes,
    /// Waste: length and checksum in front of each object.
    pub header: Bytes,
    /// Waste: slots larger than their objects.
    pub rounding: Bytes,
    /// Waste: ends of blocks that no slot covers.
    pub tail: Bytes,
    /// Waste: slots not taken in blocks that have others taken.
    pub free_slot: Bytes,
    /// Waste: empty blocks kept at hand.
    pub spare: Bytes,
    /// Waste outside the frames: descriptions of blocks, and what decoding takes.
    pub metadata: Bytes,
    /// Frames in use.
    pub frames_used: FrameCount,
}

impl Stats {
    /// What the stored pages would take uncompressed.
    #[must_use]
    pub const fn stored(&self) -> Bytes {
        Bytes((self.object_pages + self.same_filled_pages) * PAGE_SIZE)
    }

    /// What is lost to `rounding` and `tail`, the waste that size classes decide.
    #[must_use]
    pub const fn class_waste(&self) -> Bytes {
        Bytes(self.rounding.0 + self.tail.0)
    }
}

/// O(number of classes).
pub(super) fn collect<B>(blocks: &Blocks<B>, totals: &Totals, decoder_bytes: usize) -> Stats {
    let mut stats = Stats {
        same_filled_pages: totals.same_filled_pages,
        dense_pages: totals.dense_pages.iter().sum(),
        anew_pages: totals.anew_pages,
        payload: Bytes(totals.payload_bytes),
        spare: Bytes(totals.spare_frames * PAGE_SIZE),
        metadata: Bytes((blocks.metadata_bytes() + decoder_bytes) as u64),
        ..Stats::default()
    };
    let mut slot_bytes = 0;
    let mut frames = totals.spare_frames;
    for (class, in_use) in blocks.uses() {
        let (held, used) = (u64::from(in_use.blocks), u64::from(in_use.slots_used));
        let slot = class.slot_bytes() as u64;
        stats.object_pages += used;
        slot_bytes += used * slot;
        stats.tail.0 += held * class.tail_bytes() as u64;
        stats.free_slot.0 += (held * u64::from(class.slots) - used) * slot;
        frames += held << class.order;
    }
    stats.header.0 = stats.object_pages * HEADER_BYTES as u64;
    // Only a damaged length, until its block is empty, can make the sum of payloads inexact.
    stats.rounding.0 = slot_bytes.saturating_sub(stats.payload.0 + stats.header.0);
    stats.frames_used = FrameCount(frames);
    stats
}

impl Totals {
    /// An object that is so encoded is there now.
    pub(super) fn note_stored(&mut self, encoding: Encoding) {
        if let Encoding::Dense { slot, is_anew } = encoding {
            self.dense_pages[of_slot(slot)] += 1;
            self.anew_pages += u64::from(is_anew);
        }
    }

    /// It is not there any more.
    pub(super) fn note_gone(&mut self, encoding: Encoding) {
        if let Encoding::Dense { slot, is_anew } = encoding {
            let count = &mut self.dense_pages[of_slot(slot)];
            *count = count.saturating_sub(1);
            self.anew_pages = self.anew_pages.saturating_sub(u64::from(is_anew));
        }
    }
}

fn of_slot(slot: Option<Slot>) -> usize {
    slot.map_or(0, |slot| 1 + slot.index())
}

/// The counts that are kept as pages come and go.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    pub(super) same_filled_pages: u64,
    /// Without a dictionary, and with that of each slot.
    pub(super) dense_pages: [u64; 3],
    /// Of these, those that were stored as lz4 before.
    pub(super) anew_pages: u64,
    pub(super) payload_bytes: u64,
    pub(super) spare_frames: u64,
}
