//! The records of a medium: read, written, and looked through.

use alloc::vec::Vec;

use spmem_core::units::{FrameCount, FrameNumber, Order};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::medium::{Medium, MediumError};
use super::record::{Damaged, Entry, Record};
use super::superblock::{Geometry, RECORD_BYTES, Superblock};
use crate::backend::Page;

/// Read at a time.
const CHUNK: usize = 4096;
const CHUNK_RECORDS: u64 = CHUNK as u64 / RECORD_BYTES;

/// Where the records are, and what they are checked with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Records {
    geometry: Geometry,
    key: u64,
}

/// What a look through all records has found, lowest frame first.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) blocks: Vec<(FrameNumber, Entry, u64)>,
    pub(super) poisoned: Vec<FrameNumber>,
    pub(super) damaged: Vec<FrameNumber>,
}

impl Records {
    pub(super) fn of(superblock: &Superblock) -> Self {
        Self { geometry: superblock.geometry, key: xxh3_64(&superblock.uuid) }
    }

    /// Frames of the medium.
    pub(super) const fn frames(&self) -> FrameCount {
        FrameCount(self.geometry.frames)
    }

    /// Where a frame's bytes are.
    pub(super) const fn data(&self, frame: FrameNumber) -> u64 {
        self.geometry.data + frame.offset().0
    }

    const fn at(&self, frame: FrameNumber) -> u64 {
        self.geometry.records + frame.0 as u64 * RECORD_BYTES
    }

    /// The checksum of what a frame holds.
    pub(super) fn checksum(&self, frame: FrameNumber, page: &Page) -> u64 {
        checksum(self.key, frame, page)
    }

    /// A frame's record and checksum.
    pub(super) fn read(
        &self,
        medium: &impl Medium,
        frame: FrameNumber,
    ) -> Result<(Result<Record, Damaged>, u64), MediumError> {
        let mut bytes = [0; 16];
        medium.read(self.at(frame), &mut bytes)?;
        Ok(self.decode(&bytes, frame))
    }

    fn decode(&self, bytes: &[u8; 16], frame: FrameNumber) -> (Result<Record, Damaged>, u64) {
        let ([checksum, word], _) = bytes.as_chunks::<8>() else { return (Err(Damaged), 0) };
        let word = u64::from_le_bytes(*word);
        (Record::decode(word, self.key, frame), u64::from_le_bytes(*checksum))
    }

    /// Writes the checksum of a frame that no record speaks of yet; durable when this returns.
    pub(super) fn write_checksum(
        &self,
        medium: &mut impl Medium,
        frame: FrameNumber,
        checksum: u64,
    ) -> Result<(), MediumError> {
        medium.write(self.at(frame), &checksum.to_le_bytes())?;
        medium.flush(self.at(frame), 8)
    }

    /// Writes a record, at once; durable when this returns.
    pub(super) fn write(
        &self,
        medium: &mut impl Medium,
        frame: FrameNumber,
        record: Record,
    ) -> Result<(), MediumError> {
        let at = self.at(frame) + 8;
        medium.write(at, &record.encode(self.key, frame).to_le_bytes())?;
        medium.flush(at, 8)
    }

    /// What others have written into a frame's record is seen from now on.
    pub(super) fn invalidate(&self, medium: &mut impl Medium, frame: FrameNumber) -> Result<(), MediumError> {
        medium.invalidate(self.at(frame), RECORD_BYTES)
    }

    /// All records are those of free frames.
    pub(super) fn clear(&self, medium: &mut impl Medium) -> Result<(), MediumError> {
        let len = self.geometry.frames * RECORD_BYTES;
        medium.zero(self.geometry.records, len)?;
        medium.flush(self.geometry.records, len)
    }

    /// Looks at every record.
    pub(super) fn scan(&self, medium: &impl Medium) -> Result<Scan, MediumError> {
        let mut found = Scan::default();
        let mut chunk = [0; CHUNK];
        let mut first = 0;
        while first < self.geometry.frames {
            let count = CHUNK_RECORDS.min(self.geometry.frames - first);
            let bytes = usize::try_from(count * RECORD_BYTES).unwrap_or(CHUNK);
            medium.read(self.geometry.records + first * RECORD_BYTES, &mut chunk[..bytes])?;
            for (frame, bytes) in (first..first + count).zip(chunk[..bytes].as_chunks::<16>().0) {
                let frame = FrameNumber(u32::try_from(frame).expect("a medium has at most 2^32 frames"));
                match self.decode(bytes, frame) {
                    (Ok(record), checksum) => {
                        found.blocks.extend(record.block.map(|entry| (frame, entry, checksum)));
                        found.poisoned.extend(record.is_poisoned.then_some(frame));
                    }
                    (Err(Damaged), _) => found.damaged.push(frame),
                }
            }
            first += count;
        }
        Ok(found)
    }
}

impl Scan {
    /// The frames that damaged records may have spoken of: a block that began there ends at its size or where another one
    /// begins. Within a block that is known only the frame itself is in doubt.
    pub(super) fn in_doubt(&self, frames: FrameCount) -> Vec<FrameNumber> {
        let mut doubtful = Vec::new();
        for &frame in &self.damaged {
            let behind = self.blocks.partition_point(|(first, ..)| *first <= frame);
            let within = behind.checked_sub(1).map(|at| &self.blocks[at]);
            let is_within = within
                .is_some_and(|(first, entry, _)| u64::from(frame.0) < u64::from(first.0) + entry.order.frames().0);
            let most = 1_u64 << frame.0.trailing_zeros().min(u32::from(Order::MAX.get()));
            let next = self.blocks.get(behind).map_or(u64::MAX, |(first, ..)| u64::from(first.0));
            let end = (u64::from(frame.0) + if is_within { 1 } else { most }).min(next).min(frames.0);
            doubtful.extend((frame.0..).take_while(|&at| u64::from(at) < end).map(FrameNumber));
        }
        doubtful.sort_unstable();
        doubtful.dedup();
        doubtful
    }
}

/// Of a page in a frame: the same page in another one has another.
pub(super) fn checksum(key: u64, frame: FrameNumber, page: &Page) -> u64 {
    xxh3_64_with_seed(page, key ^ u64::from(frame.0))
}
