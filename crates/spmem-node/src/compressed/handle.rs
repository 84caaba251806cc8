//! What the 48 bits of a handle mean to the compressed store.
//!
//! | bits | object | same-filled page |
//! |---|---|---|
//! | 44..48 | 1: lz4; 5, 6, 7: dense, without a dictionary or with one of two; 8, 9, 10: the same, lz4 before | 2, 3, 4: where the value stands in the repeating word |
//! | 32..44 | tag: low bits of the object's checksum | 0 |
//! | 8..32 | block | value |
//! | 0..8 | slot in the block | value |
//!
//! The tag tells a stale handle (its slot was given to another object) from a good one. It has
//! 12 bits: a stale handle passes once in 4096 times. It guards against mistakes, not attackers.

use super::dense::{Encoding, Slot};
use crate::backend::{Handle, PAGE_BYTES, Page};

/// Blocks that a handle can name; with one frame each, 64 GiB of compressed bytes.
pub(super) const MAX_BLOCKS: usize = 1 << 24;

const KIND_SHIFT: u32 = 44;
const KIND_OBJECT: u64 = 1;
const KIND_FILL_BOTH: u64 = 2;
const KIND_FILL_LOW: u64 = 3;
const KIND_FILL_HIGH: u64 = 4;
const KIND_DENSE: u64 = 5;
const KIND_ANEW: u64 = 8;
/// Without a dictionary and with that of each slot.
const DENSE_KINDS: u64 = 3;
const TAG_SHIFT: u32 = 32;
const TAG_MASK: u64 = 0xfff;
const BLOCK_SHIFT: u32 = 8;
const BLOCK_MASK: u64 = 0xff_ffff;

/// A page that repeats one 64-bit word which 32 bits can tell: both halves equal, or one half zero.
///
/// That covers zero pages, every repeated byte, 16-bit and 32-bit value, small 64-bit integers and
/// round `f64` values such as 1.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill(u64);

impl Fill {
    /// The fill of a page, if it has one. Reads only as far as the first word that differs.
    #[must_use]
    pub fn of(page: &Page) -> Option<Self> {
        let (words, _) = page.as_chunks::<8>();
        let word = words[0];
        // The last word first: a page with a header and zeros behind it differs late, not early.
        if words[words.len() - 1] != word || words.iter().any(|w| *w != word) {
            return None;
        }
        let fill = Self(u64::from_le_bytes(word));
        fill.encode().map(|_| fill)
    }

    /// The value.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0
    }

    /// The fill of that value, if a handle can carry it.
    #[must_use]
    pub fn from_value(value: u64) -> Option<Self> {
        Self(value).encode().map(|_| Self(value))
    }

    /// Writes the page.
    pub fn expand(self, page: &mut Page) {
        let (words, _) = page.as_chunks_mut::<8>();
        words.fill(self.0.to_le_bytes());
    }

    /// Is `page` this fill throughout?
    #[must_use]
    pub fn is(self, page: &Page) -> bool {
        let (words, _) = page.as_chunks::<8>();
        words.iter().all(|w| *w == self.0.to_le_bytes())
    }

    fn encode(self) -> Option<(u64, u64)> {
        let (high, low) = (self.0 >> 32, self.0 & 0xffff_ffff);
        if high == low {
            Some((KIND_FILL_BOTH, low))
        } else if high == 0 {
            Some((KIND_FILL_LOW, low))
        } else if low == 0 {
            Some((KIND_FILL_HIGH, high))
        } else {
            None
        }
    }
}

/// A handle taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Fill(Fill),
    Object { block: u32, slot: u8, tag: u16, encoding: Encoding },
}

impl Place {
    pub(super) fn pack(self) -> Handle {
        let raw = match self {
            Self::Fill(fill) => {
                let (kind, value) = fill.encode().expect("a fill is made only if it encodes");
                kind << KIND_SHIFT | value
            }
            Self::Object { block, slot, tag, encoding } => {
                kind_of(encoding) << KIND_SHIFT
                    | (u64::from(tag) & TAG_MASK) << TAG_SHIFT
                    | (u64::from(block) & BLOCK_MASK) << BLOCK_SHIFT
                    | u64::from(slot)
            }
        };
        Handle::from_raw(raw).expect("a kind is not zero and ends below bit 48")
    }

    /// `None` for a value that this store never handed out.
    pub(super) fn unpack(handle: Handle) -> Option<Self> {
        let raw = handle.raw();
        let value = raw & 0xffff_ffff;
        let above = raw >> TAG_SHIFT & TAG_MASK;
        let fill = match raw >> KIND_SHIFT {
            kind if let Some(encoding) = encoding_of(kind) => {
                return Some(Self::Object {
                    encoding,
                    block: u32::try_from(raw >> BLOCK_SHIFT & BLOCK_MASK).ok()?,
                    slot: u8::try_from(raw & 0xff).ok()?,
                    tag: u16::try_from(above).ok()?,
                });
            }
            KIND_FILL_BOTH => value << 32 | value,
            KIND_FILL_LOW => value,
            KIND_FILL_HIGH => value << 32,
            _ => return None,
        };
        // One fill has one handle: a value that `encode` would write differently is not ours.
        let place = Self::Fill(Fill(fill));
        (above == 0 && place.pack() == handle).then_some(place)
    }
}

fn kind_of(encoding: Encoding) -> u64 {
    match encoding {
        Encoding::Lz4 => KIND_OBJECT,
        Encoding::Dense { slot, is_anew } => {
            let first = if is_anew { KIND_ANEW } else { KIND_DENSE };
            match slot {
                None => first,
                Some(Slot::A) => first + 1,
                Some(Slot::B) => first + 2,
            }
        }
    }
}

/// Of an object's kind; `None` if it is not one's.
fn encoding_of(kind: u64) -> Option<Encoding> {
    if kind == KIND_OBJECT {
        return Some(Encoding::Lz4);
    }
    let at = kind.checked_sub(KIND_DENSE).filter(|&at| at < 2 * DENSE_KINDS)?;
    let slot = [None, Some(Slot::A), Some(Slot::B)][(at % DENSE_KINDS) as usize];
    Some(Encoding::Dense { slot, is_anew: at >= DENSE_KINDS })
}

const _: () = assert!(KIND_ANEW == KIND_DENSE + DENSE_KINDS && KIND_ANEW + DENSE_KINDS <= 1 << 4);

/// The tag of an object with this checksum.
pub(super) fn tag_of(checksum: u64) -> u16 {
    u16::try_from(checksum & TAG_MASK).expect("the mask keeps 12 bits")
}

const _: () = assert!(PAGE_BYTES.is_multiple_of(8));

#[cfg(test)]
mod tests {
    use super::*;

    fn page_of(word: u64) -> Page {
        let mut page = [0; PAGE_BYTES];
        page.as_chunks_mut::<8>().0.fill(word.to_le_bytes());
        page
    }

    #[test]
    fn a_repeating_word_survives_the_handle_and_others_are_not_fills() {
        for word in [0, 1, u64::MAX, 0x4141_4141_4141_4141, 1.0f64.to_bits(), 7 << 32, 7 << 32 | 7] {
            let page = page_of(word);
            let fill = Fill::of(&page).unwrap();
            let Some(Place::Fill(back)) = Place::unpack(Place::Fill(fill).pack()) else {
                panic!("a fill came back as something else")
            };
            let mut out = [0xa5; PAGE_BYTES];
            back.expand(&mut out);
            assert_eq!(out, page);
            assert!(back.is(&page));
        }
        assert_eq!(Fill::of(&page_of(0x1234_5678_9abc_def0)), None);
    }

    #[test]
    fn one_different_byte_anywhere_is_not_a_fill() {
        for at in 0..PAGE_BYTES {
            let mut page = page_of(0);
            page[at] = 1;
            assert_eq!(Fill::of(&page), None, "byte {at}");
            assert!(!Fill(0).is(&page), "byte {at}");
        }
    }

    #[test]
    fn an_object_survives_the_handle_and_foreign_values_are_refused() {
        for place in [
            Place::Object { block: 0, slot: 0, tag: 0, encoding: Encoding::Lz4 },
            Place::Object { block: (1 << 24) - 1, slot: 255, tag: 0xfff, encoding: Encoding::Lz4 },
        ] {
            assert_eq!(Place::unpack(place.pack()), Some(place));
        }
        for slot in [None, Some(Slot::A), Some(Slot::B)] {
            for is_anew in [false, true] {
                let encoding = Encoding::Dense { slot, is_anew };
                let place = Place::Object { block: 7, slot: 1, tag: 2, encoding };
                assert_eq!(Place::unpack(place.pack()), Some(place));
                assert!(place.pack().raw() < 1 << 48);
            }
        }
        for raw in [
            1,
            11 << KIND_SHIFT,
            15 << KIND_SHIFT,
            KIND_FILL_LOW << KIND_SHIFT,
            KIND_FILL_BOTH << KIND_SHIFT | 1 << 33,
        ] {
            assert_eq!(Place::unpack(Handle::from_raw(raw).unwrap()), None, "{raw:#x}");
        }
    }
}
