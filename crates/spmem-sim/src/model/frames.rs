//! Frames: who owns which, what they hold, which are broken (R20, R21), and what is free.

use super::Model;

impl Model {
    /// Notes whether frames may hold what somebody wrote (R21).
    pub(crate) fn set_written(&mut self, node: u16, first: u32, frames: u64, is_written: bool) {
        for (word, mask) in words(first, frames) {
            let bits = self.written.entry((node, word)).or_default();
            *bits = if is_written { *bits | mask } else { *bits & !mask };
        }
    }

    /// Whether none of the frames may hold what somebody wrote (R21).
    pub(crate) fn is_zero(&self, node: u16, first: u32, frames: u64) -> bool {
        words(first, frames)
            .all(|(word, mask)| self.written.get(&(node, word)).is_none_or(|bits| bits & mask == 0))
    }

    /// Frames in all ranges of a node.
    pub(crate) fn capacity(&self, node: u16) -> u64 {
        self.nodes[&node].ranges.values().sum()
    }

    /// Frames in use on a node.
    pub(crate) fn frames_used(&self, node: u16) -> u64 {
        self.owned.range((node, 0)..=(node, u32::MAX)).map(|(_, (frames, _))| frames).sum()
    }

    /// Free frames of a node.
    pub(crate) fn frames_free(&self, node: u16) -> u64 {
        self.capacity(node) - self.frames_used(node) - self.out_of_use(node)
    }

    /// The blocks that lie in a part of a node: first frame, frames, number.
    pub(crate) fn blocks_in(&self, node: u16, first: u32, frames: u64) -> Vec<(u32, u64, u32)> {
        let within = self
            .owned
            .range((node, first)..)
            .take_while(|&(&(of, at), _)| of == node && u64::from(at) < u64::from(first) + frames);
        within.map(|(&(_, at), &(count, block))| (at, count, block)).collect()
    }

    /// The piece of a block or run that a frame lies in: its first frame, and how many; of those of nobody none.
    pub(crate) fn piece_of(&self, node: u16, frame: u32) -> (u32, u64) {
        let piece = self.owned.range((node, 0)..=(node, frame)).next_back();
        piece.map_or((0, 0), |(&(_, first), &(frames, _))| (first, frames))
    }

    /// Where runs of so many frames can begin that are free: those of a node, lowest first.
    pub(crate) fn free_runs(&self, node: u16, frames: u64) -> impl Iterator<Item = u32> + '_ {
        let step = frames.next_power_of_two().min(1024);
        let is_free = move |&first: &u32| {
            self.owner_of(node, first, frames).is_none() && !self.has_poison(node, first, frames)
        };
        self.nodes[&node].ranges.iter().flat_map(move |(&first, &count)| {
            let at = (0..).map(move |number| number * step).take_while(move |at| at + frames <= count);
            at.filter_map(move |at| first.checked_add(u32::try_from(at).ok()?)).filter(is_free)
        })
    }

    /// The order of the largest free block of a node.
    pub(crate) fn largest_free(&self, node: u16) -> Option<u8> {
        self.nodes[&node]
            .ranges
            .iter()
            .filter_map(|(&first, &count)| self.largest_free_in(node, first, count))
            .max()
    }

    /// The order of the largest free block of a range.
    pub(crate) fn largest_free_in(&self, node: u16, first: u32, count: u64) -> Option<u8> {
        let poisoned = self
            .poisoned
            .range((node, first)..)
            .take_while(|&&(of, frame)| of == node && u64::from(frame) < u64::from(first) + count);
        let owned = self.blocks_in(node, first, count).into_iter().map(|(at, frames, _)| (u64::from(at), frames));
        let mut taken: Vec<(u64, u64)> = poisoned.map(|&(_, frame)| (u64::from(frame), 1)).chain(owned).collect();
        let end = u64::from(first) + count;
        taken.push((end, 0));
        taken.sort_unstable();
        let (mut largest, mut from) = (None, u64::from(first));
        for (at, frames) in taken {
            largest = largest.max(largest_within(from, at));
            from = from.max(at + frames);
        }
        largest
    }

    /// Whether any of the frames is broken (R20).
    pub(crate) fn has_poison(&self, node: u16, first: u32, frames: u64) -> bool {
        let next = self.poisoned.range((node, first)..).next();
        next.is_some_and(|&(of, frame)| of == node && u64::from(frame) < u64::from(first) + frames)
    }

    /// Broken frames of a node that nobody holds (R20).
    pub(crate) fn out_of_use(&self, node: u16) -> u64 {
        let of_node = self.poisoned.range((node, 0)..=(node, u32::MAX));
        of_node.filter(|(_, frame)| self.owner_of(node, *frame, 1).is_none()).count() as u64
    }

    /// The block that owns any of `frames` frames from `first` on.
    pub(crate) fn owner_of(&self, node: u16, first: u32, frames: u64) -> Option<u32> {
        let end = u64::from(first) + frames;
        let last = u32::try_from(end - 1).unwrap_or(u32::MAX);
        let (&(_, at), &(count, block)) = self.owned.range((node, 0)..=(node, last)).next_back()?;
        (u64::from(at) + count > u64::from(first)).then_some(block)
    }

    /// A range is gone: nothing is known of its frames any more.
    pub(crate) fn forget_range(&mut self, node: u16, first: u32) {
        let known = self.nodes.get_mut(&node).and_then(|node| node.ranges.remove(&first));
        let Some(count) = known else { return };
        self.set_written(node, first, count, false);
        let end = u64::from(first) + count;
        self.poisoned.retain(|&(of, frame)| of != node || frame < first || u64::from(frame) >= end);
    }

    /// A node is gone, with all that was said of it.
    pub(crate) fn forget_node(&mut self, node: u16) {
        let ranges: Vec<u32> = self.nodes[&node].ranges.keys().copied().collect();
        ranges.into_iter().for_each(|first| self.forget_range(node, first));
        self.nodes.remove(&node);
        self.is_vague.remove(&node);
        self.promoted.remove(&node);
        self.distances.retain(|&(from, to), _| from != node && to != node);
        for grant in self.grants.values_mut() {
            grant.nodes.remove(&node);
        }
    }

    /// Where a node is in another's zonelist (`find_next_best_node` in mm/page_alloc.c): behind the node itself the nearest,
    /// where those numbered below count as farther by one.
    pub(crate) fn place(&self, from: u16, node: u16) -> (bool, u16, u16) {
        let (distance, ..) = self.nearness(from, node);
        (node != from, u16::from(distance) + u16::from(node < from), node)
    }

    /// How near a node is to another: less is tried first. Of those as near the node itself, then the lowest number.
    pub(crate) fn nearness(&self, from: u16, node: u16) -> (u8, bool, u16) {
        let unknown = if from == node { 10 } else { 20 };
        (self.distances.get(&(from, node)).copied().unwrap_or(unknown), from != node, node)
    }
}

/// The order of the largest block that fits between two frames.
fn largest_within(from: u64, to: u64) -> Option<u8> {
    (0..=10).rev().find(|&order| from.next_multiple_of(1 << order) + (1 << order) <= to)
}

/// The words that hold the bits of frames, and which bits of each.
fn words(first: u32, frames: u64) -> impl Iterator<Item = (u32, u64)> {
    let (first, end) = (u64::from(first), u64::from(first) + frames);
    (first / 64..end.div_ceil(64)).map(move |word| {
        let (from, to) = (first.max(word * 64) - word * 64, end.min(word * 64 + 64) - word * 64);
        let mask = (u64::MAX >> (64 - (to - from))) << from;
        (u32::try_from(word).expect("a node has at most 2^32 frames"), mask)
    })
}
