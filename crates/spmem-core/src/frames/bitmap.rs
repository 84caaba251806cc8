//! A bitmap that finds its lowest set bit in a few loads: a tree of words, each bit saying "the word below is not 0".
//!
//! Used by [`Frames`](super::Frames) only. A bit past the end cannot be set.

use alloc::collections::TryReserveError;
use alloc::vec::Vec;

/// 64^5 bits: more than the rows of the largest node.
const LEVELS: usize = 5;

#[derive(Debug, Default)]
pub(super) struct Bitmap {
    /// `levels[0]` holds the bits; only the first `depth` levels are in use, the last of them is one word.
    levels: [Vec<u64>; LEVELS],
    depth: usize,
}

impl Bitmap {
    /// Changes the number of bits; new ones are clear, those cut off must be.
    pub(super) fn resize(&mut self, bits: usize) -> Result<(), TryReserveError> {
        let mut sizes = [0; LEVELS];
        let mut words = bits;
        let mut depth = 0;
        while depth < LEVELS && (depth == 0 || words > 1) {
            words = words.div_ceil(64);
            sizes[depth] = words;
            depth += 1;
        }
        for (level, &size) in self.levels.iter_mut().zip(&sizes) {
            level.try_reserve_exact(size.saturating_sub(level.len()))?;
        }
        for (level, &size) in self.levels.iter_mut().zip(&sizes) {
            level.resize(size, 0);
        }
        self.depth = depth;
        self.summarise();
        Ok(())
    }

    fn summarise(&mut self) {
        for upper in 1..self.depth {
            let (below, above) = self.levels.split_at_mut(upper);
            for (word, chunk) in above[0].iter_mut().zip(below[upper - 1].chunks(64)) {
                *word = chunk.iter().rev().fold(0, |sum, &w| sum << 1 | u64::from(w != 0));
            }
        }
    }

    pub(super) fn set(&mut self, bit: usize) {
        self.set_run(bit, 1);
    }

    pub(super) fn clear(&mut self, bit: usize) {
        self.clear_run(bit, 1);
    }

    /// Sets the bits of `run`, moved up by `first`; they must lie in one word.
    pub(super) fn set_run(&mut self, first: usize, run: u64) {
        let (mut at, mut mask) = (first / 64, run << (first % 64));
        for level in &mut self.levels[..self.depth] {
            let Some(word) = level.get_mut(at) else { return };
            let was_empty = *word == 0;
            *word |= mask;
            if !was_empty {
                return;
            }
            (at, mask) = (at / 64, 1 << (at % 64));
        }
    }

    /// Clears the bits of `run`, moved up by `first`; they must lie in one word.
    pub(super) fn clear_run(&mut self, first: usize, run: u64) {
        let (mut at, mut mask) = (first / 64, run << (first % 64));
        for level in &mut self.levels[..self.depth] {
            let Some(word) = level.get_mut(at) else { return };
            *word &= !mask;
            if *word != 0 {
                return;
            }
            (at, mask) = (at / 64, 1 << (at % 64));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.levels[..self.depth].last().and_then(|top| top.first()).is_none_or(|word| *word == 0)
    }

    /// The lowest set bit.
    pub(super) fn first(&self) -> Option<usize> {
        let mut index = 0;
        for level in self.levels[..self.depth].iter().rev() {
            let word = level.get(index).copied().unwrap_or(0);
            if word == 0 {
                return None;
            }
            index = index * 64 + word.trailing_zeros() as usize;
        }
        (self.depth > 0).then_some(index)
    }

    /// Bytes of heap in use.
    pub(super) fn heap_bytes(&self) -> usize {
        self.levels.iter().map(|level| level.capacity() * size_of::<u64>()).sum()
    }
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_an_ordered_set(
            sizes in prop::collection::vec(1usize..10_000, 1..4),
            ops in prop::collection::vec((any::<bool>(), 0usize..10_000), 0..200),
        ) {
            let (mut bitmap, mut model) = (Bitmap::default(), BTreeSet::new());
            let mut bits = 0;
            for size in sizes {
                bits = bits.max(size);
                bitmap.resize(bits).unwrap();
                for &(set, bit) in &ops {
                    if set && bit < bits {
                        bitmap.set(bit);
                        model.insert(bit);
                    } else {
                        bitmap.clear(bit);
                        model.remove(&bit);
                    }
                    prop_assert_eq!(bitmap.first(), model.first().copied());
                }
                prop_assert_eq!(bitmap.is_empty(), model.is_empty());
            }
        }
    }
}
