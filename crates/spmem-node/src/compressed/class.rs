//! Size classes: which slot does an object of this size get, and in blocks of how many frames?
//!
//! A block is 2^order contiguous frames cut into equal slots; objects cross frame borders inside
//! it. A class's slot is *what its block divides into*, not a round number, so the tail of a block
//! is smaller than its number of slots. Two losses are left: the step between classes, of which an object loses half, and
//! the one block of each class that is partly filled. Steps of [`STEP_PART`] keep both at 2 to 3 % of a store of 20 MiB.
//!
//! *Coarse* classes have blocks of up to 32 KiB. Where these divide into steps that are too wide, *fine* ones lie between
//! them, whose blocks of 64 KiB pay only in a store that fills them ([`is_fine`]). No two fine classes are neighbours: what a
//! store has no fine block for goes one step up.
//!
//! [`class_for`] is called by the store. Everything here is computed at compile time.

use crate::backend::PAGE_BYTES;

/// Orders of coarse classes go from this, below which describing a block takes up to a percent of it, ...
const MIN_ORDER: u8 = 2;
/// ... to this.
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
/// Least distance between classes, in bytes ...
const STEP: usize = 24;
/// ... and in parts of a slot: one in so many.
const STEP_PART: usize = 32;
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
        let slot = classes[count].slot_bytes();
        bytes = slot + if slot / STEP_PART > STEP { slot / STEP_PART } else { STEP };
        count += 1;
    }
    if classes[count - 1].slot_bytes() < MAX_SLOT {
        classes[count] = best_block_of(MAX_SLOT, MIN_ORDER, COARSE_ORDER);
        count += 1;
    }
    (classes, count)
}

/// A coarse class, unless that is more than a step too large and a fine one is better.
const fn best_block(bytes: usize) -> Class {
    // Of the smallest slots, no larger block can have enough.
    let least = if bytes * MAX_SLOTS < PAGE_BYTES << MIN_ORDER { MIN_ORDER - 1 } else { MIN_ORDER };
    let coarse = best_block_of(bytes, least, COARSE_ORDER);
    let fine = best_block_of(bytes, MAX_ORDER, MAX_ORDER);
    if coarse.slot_bytes() > bytes + bytes / STEP_PART && fine.slot < coarse.slot { fine } else { coarse }
}

/// Of these orders, the smallest block that divides into slots of `bytes` with little loss, else the one that
/// loses least.
#[expect(clippy::cast_possible_truncation, reason = "slots and slot sizes are bounded just above")]
const fn best_block_of(bytes: usize, from: u8, to: u8) -> Class {
    let mut best = Class { slot: u16::MAX, slots: 0, order: 0 };
    let mut order = from;
    while order <= to {
        let block = PAGE_BYTES << order;
        let mut slots = block / bytes;
        if slots > MAX_SLOTS {
            slots = MAX_SLOTS;
        }
        let slot = block / slots;
        if slot < best.slot as usize {
            best = Class { slot: slot as u16, slots: slots as u8, order };
        }
        if slot <= bytes + bytes / STEP_PART {
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
        assert!((1..).zip(&CLASSES[1..]).all(|(class, _)| !is_fine(class) || !is_fine(class - 1)));
    }

    #[test]
    fn an_object_loses_three_percent_to_its_class_on_average_and_five_where_fine_ones_are_shut() {
        for (from, to) in [(300, 800), (800, 1500), (1500, 2500), (2500, MAX_SLOT)] {
            let lost = |opens_fine: bool| {
                let slots = (from..to).map(|bytes| {
                    let mut class = class_for(bytes).unwrap();
                    while is_fine(class) && !opens_fine {
                        class += 1;
                    }
                    CLASSES[usize::from(class)].slot_bytes()
                });
                slots.sum::<usize>() - (from..to).sum::<usize>()
            };
            let bytes: usize = (from..to).sum();
            assert!(lost(true) * 100 <= bytes * 3, "{from}..{to}: {} of {bytes}", lost(true));
            assert!(lost(false) * 100 <= bytes * 5, "{from}..{to}: {} of {bytes}", lost(false));
        }
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
