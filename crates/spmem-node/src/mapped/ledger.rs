//! The ledger: what makes a node outlive its process. Formats a medium, opens it, closes it.
//!
//! [`Ledger::format`] and [`Ledger::find`] are the two ways in. Every change of a frame is one record's word, written when
//! all that it speaks of is durable: whatever a crash leaves is the state before or after. The superblock only says
//! where things are, and whether its counts can be believed.

use alloc::vec::Vec;

use spmem_core::units::{FrameCount, FrameNumber};

use super::error::OpenError;
use super::medium::{Medium, MediumError};
use super::record::Record;
use super::records::{Records, Scan};
use super::superblock::{self, Found, Geometry, Superblock};

/// What is done with records that are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// The medium is not opened.
    Refuse,
    /// The frames that they may have spoken of are taken out of use, for good.
    Retire,
}

/// What is done with a node that is on the medium already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// It stays, and the medium is not formatted.
    No,
    /// It is gone.
    Yes,
}

/// What opening found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// The process that had it open last did not close it.
    pub was_left_open: bool,
    /// A write of the superblock had been cut short; its other slot counted.
    pub is_superblock_repaired: bool,
    /// Blocks that were in use, and are.
    pub blocks: u64,
    /// Frames taken out of use now, their records being none.
    pub retired: Vec<FrameNumber>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Ledger {
    superblock: Superblock,
    /// The slot it is in.
    slot: usize,
    pub(super) records: Records,
}

impl Ledger {
    /// Makes an empty node of the whole medium, closed, frame 0 at a multiple of `align` bytes.
    pub(super) fn format(
        medium: &mut impl Medium,
        uuid: [u8; 16],
        align: u64,
        overwrite: Overwrite,
    ) -> Result<(), OpenError> {
        let size = medium.len();
        let geometry = Geometry::for_size(size, align).ok_or(OpenError::Size { bytes: size })?;
        if overwrite == Overwrite::No && superblock::is_formatted(medium)? {
            return Err(OpenError::AlreadyFormatted);
        }
        superblock::erase(medium)?;
        let mut fresh = Superblock { uuid, geometry, sequence: 1, is_open: false, used: 0, poisoned: 0 };
        Records::of(&fresh).clear(medium)?;
        // Once the first slot is whole the node is there.
        fresh.write(medium, 0)?;
        fresh.sequence = 2;
        fresh.write(medium, 1)?;
        Ok(())
    }

    /// Reads what is there; writes nothing.
    pub(super) fn find(medium: &impl Medium) -> Result<(Self, Opened), OpenError> {
        let Found { superblock, slot, is_other_torn } = superblock::find(medium)?;
        let opened = Opened {
            was_left_open: superblock.is_open,
            is_superblock_repaired: is_other_torn,
            ..Opened::default()
        };
        Ok((Self { superblock, slot, records: Records::of(&superblock) }, opened))
    }

    /// All blocks and poisoned frames. Records that are none are repaired or refused.
    pub(super) fn recover(
        &self,
        medium: &mut impl Medium,
        repair: Repair,
        opened: &mut Opened,
    ) -> Result<Scan, OpenError> {
        let mut scan = self.records.scan(medium)?;
        if let Some(&frame) = scan.damaged.first() {
            if repair == Repair::Refuse {
                return Err(OpenError::Record { frame, count: scan.damaged.len() as u64 });
            }
            // From above: as long as the damaged one is there, a crash leaves it to be repaired again.
            for frame in scan.in_doubt(self.records.frames()).into_iter().rev() {
                self.records.write(medium, frame, Record { is_poisoned: true, ..Record::default() })?;
                scan.poisoned.push(frame);
                opened.retired.push(frame);
            }
            scan.poisoned.sort_unstable();
            scan.poisoned.dedup();
            opened.retired.reverse();
        }
        opened.blocks = scan.blocks.len() as u64;
        Ok(scan)
    }

    /// Says on the medium that somebody has it open.
    pub(super) fn set_open(&mut self, medium: &mut impl Medium) -> Result<(), MediumError> {
        self.superblock.is_open = true;
        self.write_next(medium)
    }

    /// Says that nobody has, and how much is in use.
    pub(super) fn set_closed(
        &mut self,
        medium: &mut impl Medium,
        used: FrameCount,
        poisoned: FrameCount,
    ) -> Result<(), MediumError> {
        self.superblock.is_open = false;
        (self.superblock.used, self.superblock.poisoned) = (used.0, poisoned.0);
        self.write_next(medium)
    }

    fn write_next(&mut self, medium: &mut impl Medium) -> Result<(), MediumError> {
        self.superblock.sequence += 1;
        self.superblock.write(medium, 1 - self.slot)?;
        self.slot = 1 - self.slot;
        Ok(())
    }

    pub(super) const fn superblock(&self) -> &Superblock {
        &self.superblock
    }
}

/// What is on a medium, without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Tells the node from every other.
    pub uuid: [u8; 16],
    /// Frames.
    pub capacity: FrameCount,
    /// Of these in use, counted from the records where nobody has closed it.
    pub used: FrameCount,
    /// Of these out of use.
    pub poisoned: FrameCount,
    /// Somebody has it open, or did not close it.
    pub is_open: bool,
}

impl Summary {
    /// Reads the superblock, and the records where its counts are not those of now.
    ///
    /// # Errors
    /// [`OpenError`], as opening it would; damaged records are not counted.
    pub fn read(medium: &impl Medium) -> Result<Self, OpenError> {
        let (ledger, _) = Ledger::find(medium)?;
        let superblock = ledger.superblock();
        let (mut used, mut poisoned) = (superblock.used, superblock.poisoned);
        if superblock.is_open {
            let scan = ledger.records.scan(medium)?;
            used = scan.blocks.iter().map(|(_, entry, _)| entry.order.frames().0).sum();
            let is_free = |frame: &&FrameNumber| {
                let behind = scan.blocks.partition_point(|(first, ..)| first <= *frame);
                let block = behind.checked_sub(1).map(|at| &scan.blocks[at]);
                block.is_none_or(|(first, entry, _)| {
                    u64::from(frame.0) >= u64::from(first.0) + entry.order.frames().0
                })
            };
            poisoned = scan.poisoned.iter().filter(is_free).count() as u64;
        }
        let [capacity, used, poisoned] = [superblock.geometry.frames, used, poisoned].map(FrameCount);
        Ok(Self { uuid: superblock.uuid, capacity, used, poisoned, is_open: superblock.is_open })
    }
}
