//! Records: what the medium says of each frame, in one word that is there whole or not at all.
//!
//! A record is 16 bytes: the checksum of what the frame holds, then the word. The word of a frame at which no block begins
//! has poison and the generation of the last one that did, so that a handle from before a restart never names what came later. Bits
//! of the word:
//!
//! | bits | |
//! |---|---|
//! | 0 | a block begins here |
//! | 1 | sealed: the checksum is that of the page, which nobody writes |
//! | 2 | poison: the frame is not used again (R20) |
//! | 3 | handed over: whoever owns it now has not looked at it yet |
//! | 8..12 | order of the block |
//! | 16..32 | generation, never 0; of a free frame the last one, 0 where no block ever began |
//! | 32..48 | owner: 0 the component, else a peer |
//! | 48..64 | check of the rest, the frame and the medium's uuid |

use spmem_core::units::{FrameNumber, Order};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Who may write a block: the component that runs the node, or a peer by its number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u16);

impl PeerId {
    /// The component that runs the node.
    pub const COMPONENT: Self = Self(0);
}

/// A block as its record has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) order: Order,
    pub(super) generation: u16,
    pub(super) owner: PeerId,
    pub(super) is_sealed: bool,
    pub(super) is_fresh: bool,
}

/// What is known of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// The block that begins here.
    pub(super) block: Option<Entry>,
    pub(super) is_poisoned: bool,
    /// Where no block begins, the generation of the last that did; else 0.
    pub(super) last: u16,
}

/// The word is none that was ever written there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Damaged;

const USED: u64 = 1;
const SEALED: u64 = 1 << 1;
const POISON: u64 = 1 << 2;
const FRESH: u64 = 1 << 3;
const ORDER_SHIFT: u32 = 8;
const GENERATION_SHIFT: u32 = 16;
const OWNER_SHIFT: u32 = 32;
const CHECK_SHIFT: u32 = 48;
const CONTENT: u64 = (1 << CHECK_SHIFT) - 1;

impl Record {
    pub(super) fn encode(self, key: u64, frame: FrameNumber) -> u64 {
        let mut word = if self.is_poisoned { POISON } else { 0 };
        if let Some(entry) = self.block {
            let flag = |is_set: bool, flag: u64| if is_set { flag } else { 0 };
            word |= USED | flag(entry.is_sealed, SEALED) | flag(entry.is_fresh, FRESH);
            word |= u64::from(entry.order.get()) << ORDER_SHIFT;
            word |= u64::from(entry.generation) << GENERATION_SHIFT;
            word |= u64::from(entry.owner.0) << OWNER_SHIFT;
        } else {
            word |= u64::from(self.last) << GENERATION_SHIFT;
        }
        if word == 0 { 0 } else { word | check(word, key, frame) }
    }

    pub(super) fn decode(word: u64, key: u64, frame: FrameNumber) -> Result<Self, Damaged> {
        if word == 0 {
            return Ok(Self::default());
        }
        let part = |shift: u32| u16::try_from(word >> shift & 0xffff).map_err(|_| Damaged);
        let order = u8::try_from(word >> ORDER_SHIFT & 0xf).map_err(|_| Damaged)?;
        let entry = Entry {
            order: Order::new(order).map_err(|_| Damaged)?,
            generation: part(GENERATION_SHIFT)?,
            owner: PeerId(part(OWNER_SHIFT)?),
            is_sealed: word & SEALED != 0,
            is_fresh: word & FRESH != 0,
        };
        let block = (word & USED != 0).then_some(entry);
        let last = if block.is_some() { 0 } else { entry.generation };
        let record = Self { block, is_poisoned: word & POISON != 0, last };
        // One record has one word: bits that mean nothing are damage, too.
        let is_aligned = frame.0.is_multiple_of(1 << order);
        if is_aligned && record.encode(key, frame) == word { Ok(record) } else { Err(Damaged) }
    }
}

/// In its place, the uppermost 16 bits.
fn check(word: u64, key: u64, frame: FrameNumber) -> u64 {
    let seed = key ^ u64::from(frame.0);
    xxh3_64_with_seed(&(word & CONTENT).to_le_bytes(), seed) >> CHECK_SHIFT << CHECK_SHIFT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_its_word_and_no_other_bit_pattern_passes() {
        let (key, frame) = (0x1234_5678, FrameNumber(48));
        let entry = Entry {
            order: Order::new(4).unwrap(),
            generation: 0xfffe,
            owner: PeerId(3),
            is_sealed: true,
            is_fresh: true,
        };
        let mut passed = 0;
        for record in [
            Record::default(),
            Record { block: None, is_poisoned: true, last: 0 },
            Record { block: None, is_poisoned: false, last: 7 },
            Record { block: Some(entry), is_poisoned: false, last: 0 },
            Record {
                block: Some(Entry { owner: PeerId(0), is_sealed: false, ..entry }),
                is_poisoned: true,
                last: 0,
            },
        ] {
            let word = record.encode(key, frame);
            assert_eq!(Record::decode(word, key, frame), Ok(record));
            if word != 0 {
                assert_eq!(Record::decode(word, key + 1, frame), Err(Damaged), "another medium's");
                assert_eq!(Record::decode(word, key, FrameNumber(64)), Err(Damaged), "another frame's");
            }
            for bit in 0..64 {
                passed += u32::from(word ^ 1 << bit != 0 && Record::decode(word ^ 1 << bit, key, frame).is_ok());
            }
        }
        assert_eq!(passed, 0);
    }
}
