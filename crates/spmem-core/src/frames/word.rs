//! Buddy arithmetic in one word: each bit a unit that is free or not, all block sizes found by shifting.
//!
//! Used twice by [`Frames`](super::Frames): 64 frames make a row, the full rows among 16 make a tree. "Order" here
//! counts doublings of the unit, whatever it is.

/// The order of a whole word.
pub(super) const WORD_ORDER: usize = 6;

/// Bits at multiples of 2^order.
const STARTS: [u64; WORD_ORDER + 1] = [
    u64::MAX,
    0x5555_5555_5555_5555,
    0x1111_1111_1111_1111,
    0x0101_0101_0101_0101,
    0x0001_0001_0001_0001,
    0x0000_0001_0000_0001,
    1,
];

/// `runs` marks the free aligned runs of `order`; the result those of `order + 1`.
fn double(runs: u64, order: usize) -> u64 {
    runs & runs >> (1 << order) & STARTS[order + 1]
}

/// The order of the largest free block in the word, `None` when nothing is free.
pub(super) fn largest(free: u64) -> Option<usize> {
    if free == u64::MAX {
        return Some(WORD_ORDER);
    }
    let mut runs = free;
    for order in 0..WORD_ORDER {
        if runs == 0 {
            return order.checked_sub(1);
        }
        runs = double(runs, order);
    }
    Some(WORD_ORDER - 1)
}

/// The order of the largest free block that holds the free block of `order` at `bit`.
#[inline]
pub(super) fn merged(free: u64, bit: usize, order: usize) -> usize {
    // Each block that is free holds smaller ones that are: to count them needs no branch that nobody can foretell.
    let is_free = |larger: usize| {
        let mask = mask(bit >> larger << larger, larger);
        usize::from(larger > order && free & mask == mask)
    };
    order + is_free(1) + is_free(2) + is_free(3) + is_free(4) + is_free(5) + usize::from(free == u64::MAX)
}

const _: () = assert!(WORD_ORDER == 6, "`merged` asks for each order below");

/// Free blocks by order, each counted once at the highest order it reaches.
pub(super) fn count_blocks(free: u64, counts: &mut [u64]) {
    let mut runs = free;
    for (order, count) in counts.iter_mut().enumerate().take(WORD_ORDER) {
        let bigger = double(runs, order);
        *count += u64::from(runs.count_ones() - 2 * bigger.count_ones());
        runs = bigger;
    }
}

/// The highest free block of `order`.
pub(super) fn highest(free: u64, order: usize) -> Option<usize> {
    let runs = (0..order).fold(free, double);
    runs.checked_ilog2().map(|bit| bit as usize)
}

/// Where a block of `order` is best taken from the word: the smallest free block that holds it, the lowest of those.
pub(super) fn place(free: u64, order: usize) -> Option<usize> {
    if free == u64::MAX {
        return Some(0);
    }
    let mut runs = free;
    for smaller in 0..order {
        runs = double(runs, smaller);
    }
    for size in order..WORD_ORDER {
        let bigger = double(runs, size);
        let exact = runs & !(bigger | bigger << (1 << size));
        if exact != 0 {
            return Some(exact.trailing_zeros() as usize);
        }
        runs = bigger;
    }
    (runs != 0).then_some(0)
}

/// The bits of a block of `order` (below [`WORD_ORDER`]) at `bit`.
pub(super) fn mask(bit: usize, order: usize) -> u64 {
    ((1 << (1 << order)) - 1) << bit
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Whether the aligned block of `order` at `bit` is free, frame by frame.
    fn is_free(free: u64, bit: usize, order: usize) -> bool {
        (bit..bit + (1 << order)).all(|b| free >> b & 1 != 0)
    }

    fn starts(order: usize) -> impl Iterator<Item = usize> {
        (0..64).step_by(1 << order)
    }

    proptest! {
        #[test]
        fn word_arithmetic_agrees_with_looking_at_each_frame(a: u64, b: u64, mode in 0..4, order in 0usize..6) {
            let free = match mode { 0 => a & b, 1 => a | b, 2 => u64::MAX, _ => a };
            let fits = |o: usize| starts(o).any(|bit| is_free(free, bit, o));
            prop_assert_eq!(largest(free), (0..=6).rev().find(|&o| fits(o)));
            prop_assert_eq!(place(free, order).is_some(), fits(order));
            if let Some(bit) = place(free, order) {
                prop_assert!(bit % (1 << order) == 0 && is_free(free, bit, order));
                prop_assert_eq!(mask(bit, order) & free, mask(bit, order));
            }
            let mut counts = [0; 6];
            count_blocks(free, &mut counts);
            if free != u64::MAX {
                let frames: u64 = counts.iter().enumerate().map(|(o, n)| n << o).sum();
                prop_assert_eq!(frames, u64::from(free.count_ones()));
            }
        }
    }
}
