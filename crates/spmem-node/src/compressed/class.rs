//! Size classes: which slot does an object of this size get, and in blocks of how many frames?
//!
//! A block is 2^order contiguous frames cut into equal slots; objects cross frame borders inside
//! it. A class's slot is *what its block divides into*, not a round number, so the tail of a block
//! is smaller than its number of slots, and the only loss worth counting is the step between
//! classes. Steps are [`STEP`] bytes where blocks divide that finely and wider above.
//!
//! *Coarse* classes have blocks of up to 32 KiB. Between them lie *fine* ones, whose blocks of 64 KiB
//! halve the step for large objects; they pay only in a store that fills them ([`is_fine`]).
//!
//! [`class_for`] is called by the store. Everything here is computed at compile time.

use crate::backend::PAGE_BYTES;

/// Orders of coarse classes go from 0 to this.
const COARSE_ORDER: u8 = 3;
/// The order of fine classes, which lie between coarse ones.
const MAX_ORDER: u8 = 4;
/// Slots of one block; its bitmap has as many bits.
pub(super) const MAX_SLOTS: usize = 128;
/// The largest slot: ten in an order-3 block. A nine-in-a-block slot would save 11 % of a page.
pub(super) const MAX_SLOT: usize = (PAGE_BYTES << 3) / 10;
/// Number of classes.
pub(super) const CLASS_COUNT: usize = TABLE.1;

const MIN_SLOT: usize = 64;
/// Least distance between classes, in bytes.
const STEP: usize = 32;
const INDEX_GRAIN: usize = 16;

/// One size class.
#[derive(Clone, Copy, Debug)]
pub(super) struct Class {
    /// Bytes of one slot.
    pub(super) slot: u16,
    /// Slots in one block.
    pub(super) slots: u8,
    /// Frames of one block, as a power of two.
    pub(super) order: u8,
}

impl Class {
    pub(super) const fn slot_bytes(self) -> usize {
        self.slot as usize
    }

    pub(super) const fn block_bytes(self) -> usize {
        PAGE_BYTES << self.order
    }

    /// Bytes at the end of a block that no slot covers.
    pub(super) const fn tail_bytes(self) -> usize {
        self.block_bytes() - self.slot as usize * self.slots as usize
    }
}

/// The classes, by growing slot.
pub(super) static CLASSES: [Class; CLASS_COUNT] = {
    let mut classes = [TABLE.0[0]; CLASS_COUNT];
    let mut i = 0;
    while i < CLASS_COUNT {
        classes[i] = TABLE.0[i];
        i += 1;
    }
    classes
};

/// The number of the smallest class whose slot takes `bytes`; `None` above [`MAX_SLOT`].
pub(super) fn class_for(bytes: usize) -> Option<u8> {
    let mut class = *INDEX.get(bytes / INDEX_GRAIN)?;
    // The index is exact to INDEX_GRAIN bytes, and classes are further apart than that.
    if CLASSES.get(usize::from(class))?.slot_bytes() < bytes {
        class += 1;
    }
    (usize::from(class) < CLASS_COUNT).then_some(class)
}

/// Does the class pay only where many objects fall into it? The next class takes its objects too.
pub(super) fn is_fine(class: u8) -> bool {
    CLASSES.get(usize::from(class)).is_some_and(|class| class.order > COARSE_ORDER)
}

const TABLE: ([Class; 128], usize) = build();

const INDEX: [u8; MAX_SLOT / INDEX_GRAIN + 1] = {
    let mut index = [0u8; MAX_SLOT / INDEX_GRAIN + 1];
    let mut class = 0u8;
    let mut i = 0;
    while i < index.len() {
        while TABLE.0[class as usize].slot_bytes() < i * INDEX_GRAIN {
            class += 1;
        }
        index[i] = class;
        i += 1;
    }
    index
};

const fn build() -> ([Class; 128], usize) {
    let mut classes = [Class { slot: 0, slots: 0, order: 0 }; 128];
    let mut count = 0;
    let mut bytes = MIN_SLOT;
    while bytes <= MAX_SLOT {
        classes[count] = best_block(bytes);
        bytes = classes[count].slot_bytes() + STEP;
        count += 1;
    }
    if classes[count - 1].slot_bytes() < MAX_SLOT {
        classes[count] = best_block(MAX_SLOT);
        count += 1;
    }
    (classes, count)
}

/// The smallest block that divides into slots of `bytes` with little loss, else the one that
/// loses least.
#[expect(clippy::cast_possible_truncation, reason = "slots and slot sizes are bounded just above")]
const fn best_block(bytes: usize) -> Class {
    let mut best = Class { slot: u16::MAX, slots: 0, order: 0 };
    let mut order = 0;
    while order <= MAX_ORDER {
        let block = PAGE_BYTES << order;
        let mut slots = block / bytes;
        if slots > MAX_SLOTS {
            slots = MAX_SLOTS;
        }
        let slot = block / slots;
        if slot < best.slot as usize {
            best = Class { slot: slot as u16, slots: slots as u8, order };
        }
        if slot <= bytes + bytes / 64 {
            break;
        }
        order += 1;
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_gets_the_smallest_slot_that_takes_it() {
        for bytes in 0..=MAX_SLOT {
            let class = usize::from(class_for(bytes).unwrap());
            assert!(CLASSES[class].slot_bytes() >= bytes, "{bytes}");
            assert!(class == 0 || CLASSES[class - 1].slot_bytes() < bytes, "{bytes}");
        }
        for bytes in MAX_SLOT + 1..MAX_SLOT + 100 {
            assert_eq!(class_for(bytes), None, "{bytes}");
        }
    }

    #[test]
    fn every_fine_class_has_a_coarse_one_above() {
        assert!((0..).zip(&CLASSES).any(|(class, _)| is_fine(class)));
        assert!(!is_fine(u8::try_from(CLASS_COUNT - 1).unwrap()));
    }

    #[test]
    fn slots_lie_inside_their_block_and_its_tail_is_under_one_percent() {
        for class in &CLASSES {
            assert!(usize::from(class.slots) <= MAX_SLOTS);
            assert!(class.slot_bytes() * usize::from(class.slots) <= class.block_bytes());
            assert!(class.tail_bytes() * 100 < class.block_bytes(), "{class:?}");
        }
    }
}
