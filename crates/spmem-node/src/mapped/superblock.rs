//! The superblock: what a medium holds, in two slots of which the newer whole one counts.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 4, 4 | version, bytes of the superblock |
//! | 16 | 16 | uuid |
//! | 32 | 8 | size of the medium in use, bytes |
//! | 40 | 8 | frames |
//! | 48, 56 | 8, 8 | where the records begin, where frame 0 begins |
//! | 64 | 8 | flags: what this version does not know, 0 |
//! | 72 | 8 | sequence: the slot with the higher one is the newer |
//! | 80 | 8 | 0: closed; 1: open, or was when its process ended |
//! | 88, 96 | 8, 8 | frames in use, frames out of use: as of when it was closed |
//! | 104 | 16 | 0 |
//! | 120 | 8 | xxh3 of what comes before |
//!
//! All integers are little-endian. Slot 0 is at 0, slot 1 at 4096. A change goes to the slot that is not the newer one, so
//! a torn write leaves the other.

use spmem_core::frames::MAX_FRAMES;
use xxhash_rust::xxh3::xxh3_64;

use super::error::OpenError;
use super::medium::{Medium, MediumError};

const MAGIC: [u8; 8] = *b"SPMEMNOD";
/// Of the format.
pub const VERSION: u32 = 1;
const BYTES: usize = 128;
/// Between the slots, and what a frame takes.
const PAGE: u64 = 4096;
const SLOTS: [u64; 2] = [0, PAGE];
/// Where the records begin.
const RECORDS: u64 = 2 * PAGE;
/// Bytes of a frame's record.
pub(super) const RECORD_BYTES: u64 = 16;

/// Where things are on a medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) size: u64,
    pub(super) frames: u64,
    pub(super) records: u64,
    pub(super) data: u64,
}

impl Geometry {
    /// For as many frames as `size` bytes have room for, frame 0 at a multiple of `align` (a power of two, at least a page).
    /// `None` if there is no room for one.
    pub(super) fn for_size(size: u64, align: u64) -> Option<Self> {
        let align = align.max(PAGE);
        let data_for = |frames: u64| (RECORDS + frames * RECORD_BYTES).next_multiple_of(align);
        let mut frames = (size.saturating_sub(RECORDS) / (PAGE + RECORD_BYTES)).min(MAX_FRAMES);
        while frames > 0 && data_for(frames) + frames * PAGE > size {
            let over = data_for(frames) + frames * PAGE - size;
            frames -= over.div_ceil(PAGE).min(frames);
        }
        (frames > 0).then(|| Self { size, frames, records: RECORDS, data: data_for(frames) })
    }

    fn is_sound(&self) -> bool {
        let Self { size, frames, records, data } = *self;
        let is_in_order = records == RECORDS && data.is_multiple_of(PAGE) && (1..=MAX_FRAMES).contains(&frames);
        is_in_order
            && data >= records + frames * RECORD_BYTES
            && data.checked_add(frames * PAGE).is_some_and(|end| end <= size)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) uuid: [u8; 16],
    pub(super) geometry: Geometry,
    pub(super) sequence: u64,
    pub(super) is_open: bool,
    pub(super) used: u64,
    pub(super) poisoned: u64,
}

/// What a slot holds.
enum Slot {
    Blank,
    Torn,
    Foreign(u32),
    Whole(Superblock),
}

/// The superblock that counts, and the slot it is in.
pub(super) struct Found {
    pub(super) superblock: Superblock,
    pub(super) slot: usize,
    /// The other slot is not whole: a write of it was cut short.
    pub(super) is_other_torn: bool,
}

/// Whether something of ours, whole or not, is on the medium.
pub(super) fn is_formatted(medium: &impl Medium) -> Result<bool, MediumError> {
    for at in SLOTS {
        if medium.len() >= at + BYTES as u64 && !matches!(read_slot(medium, at)?, Slot::Blank) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Finds the superblock that counts. Writes nothing.
pub(super) fn find(medium: &impl Medium) -> Result<Found, OpenError> {
    if medium.len() < RECORDS {
        return Err(OpenError::NotFormatted);
    }
    let slots = [read_slot(medium, SLOTS[0])?, read_slot(medium, SLOTS[1])?];
    let found = match slots {
        [Slot::Foreign(version), _] | [_, Slot::Foreign(version)] => {
            return Err(OpenError::Version { found: version, known: VERSION });
        }
        [Slot::Blank, Slot::Blank] => return Err(OpenError::NotFormatted),
        [Slot::Whole(one), Slot::Whole(other)] => {
            let is_one_node = one.uuid == other.uuid && one.geometry == other.geometry;
            if !is_one_node || one.sequence == other.sequence {
                return Err(OpenError::Superblock { reason: "its two slots contradict each other" });
            }
            let slot = usize::from(other.sequence > one.sequence);
            Found { superblock: [one, other][slot], slot, is_other_torn: false }
        }
        [Slot::Whole(superblock), _] => Found { superblock, slot: 0, is_other_torn: true },
        [_, Slot::Whole(superblock)] => Found { superblock, slot: 1, is_other_torn: true },
        [_, _] => return Err(OpenError::Superblock { reason: "neither slot is whole" }),
    };
    let size = found.superblock.geometry.size;
    if medium.len() < size {
        return Err(OpenError::Truncated { size, found: medium.len() });
    }
    Ok(found)
}

impl Superblock {
    /// Writes it to a slot; durable when this returns.
    pub(super) fn write(&self, medium: &mut impl Medium, slot: usize) -> Result<(), MediumError> {
        medium.write(SLOTS[slot], &self.encode())?;
        medium.flush(SLOTS[slot], BYTES as u64)
    }

    fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &128_u32.to_le_bytes());
        put(16, &self.uuid);
        let Geometry { size, frames, records, data } = self.geometry;
        let (flags, state) = (0, u64::from(self.is_open));
        let numbers = [size, frames, records, data, flags, self.sequence, state, self.used, self.poisoned];
        for (index, number) in numbers.iter().enumerate() {
            put(32 + index * 8, &number.to_le_bytes());
        }
        let checksum = xxh3_64(&bytes[..BYTES - 8]);
        bytes[BYTES - 8..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }
}

fn read_slot(medium: &impl Medium, at: u64) -> Result<Slot, MediumError> {
    let mut bytes = [0; BYTES];
    medium.read(at, &mut bytes)?;
    Ok(decode(&bytes))
}

fn decode(bytes: &[u8; BYTES]) -> Slot {
    // Another kind of data, or a torn write into an empty slot whose first word is not there.
    if bytes[..8] != MAGIC {
        return Slot::Blank;
    }
    let number = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    // A torn write leaves words of the slot's former content or zeros, never another version's number.
    if version != VERSION && version != 0 {
        return Slot::Foreign(version);
    }
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&bytes[16..32]);
    let geometry = Geometry { size: number(32), frames: number(40), records: number(48), data: number(56) };
    let is_known = number(64) == 0 && number(80) <= 1;
    if !checksum_of(bytes) || !is_known || !geometry.is_sound() {
        return Slot::Torn;
    }
    let (sequence, is_open, used, poisoned) = (number(72), number(80) == 1, number(88), number(96));
    Slot::Whole(Superblock { uuid, geometry, sequence, is_open, used, poisoned })
}

fn checksum_of(bytes: &[u8; BYTES]) -> bool {
    bytes[BYTES - 8..] == xxh3_64(&bytes[..BYTES - 8]).to_le_bytes()
}

/// Takes both slots away: what is on the medium is nobody's from then on.
pub(super) fn erase(medium: &mut impl Medium) -> Result<(), MediumError> {
    medium.zero(0, RECORDS)?;
    medium.flush(0, RECORDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_geometry_uses_the_room_there_is_and_never_more() {
        for size in (0..64).map(|pages| pages * PAGE + 8).chain([1 << 26, (1 << 30) + 4096, 1 << 40]) {
            for align in [PAGE, 2 << 20] {
                let Some(geometry) = Geometry::for_size(size, align) else {
                    assert!(size < align + 3 * PAGE, "{size}");
                    continue;
                };
                assert!(geometry.is_sound() && geometry.data.is_multiple_of(align), "{geometry:?}");
                assert!(size - (geometry.data + geometry.frames * PAGE) < align + 2 * PAGE, "{geometry:?}");
            }
        }
    }

    #[test]
    fn one_changed_bit_anywhere_is_seen() {
        let geometry = Geometry::for_size(1 << 20, PAGE).unwrap();
        let superblock = Superblock { uuid: [7; 16], geometry, sequence: 5, is_open: true, used: 3, poisoned: 1 };
        let bytes = superblock.encode();
        assert!(matches!(decode(&bytes), Slot::Whole(back) if back == superblock));
        for bit in 0..BYTES * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(!matches!(decode(&damaged), Slot::Whole(_)), "bit {bit}");
        }
    }
}
