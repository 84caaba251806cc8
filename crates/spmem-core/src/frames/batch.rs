//! Batches: many single frames at a time, whole rows of neighbours, for one lock of a zone. One zone lock at a time.
//! Called by [`MemoryManager::alloc_batch`](crate::mm::MemoryManager::alloc_batch), and by who owns a [`Frames`].

use super::range::Range;
use super::states::refuse;
use super::zone::{ROW_FRAMES, Run, ZONE_FRAMES, Zone};
use super::{Found, Frames, FramesError, Place, each_bit};
use crate::sync::AtomicU8;
use crate::sync::Ordering::Relaxed;
use crate::units::{FrameNumber, Order};

impl Frames {
    /// Takes single frames, whole rows of neighbours where there are: fills `into` from the front; how many.
    pub fn alloc_batch(&self, into: &mut [FrameNumber]) -> usize {
        let mut done = 0;
        while done < into.len() {
            let mut runs = [Run::default(); 8];
            let mut count = 0;
            let wanted = into.len() - done;
            let taken = self.search(Order::ZERO, Place::LOWEST, |_, _, zone| {
                let mut left = wanted;
                while count < runs.len() && left > 0 {
                    let Some(run) = zone.take_run(left) else { break };
                    left -= run.frames();
                    runs[count] = run;
                    count += 1;
                }
                (count > 0).then_some(0)
            });
            let Some(Found { range, first: zone, .. }) = taken else { break };
            let has_caches = self.has_caches();
            for run in &runs[..count] {
                for row in 0..run.rows {
                    let first = zone + run.first + row * ROW_FRAMES;
                    done += give_out_row(range, first, run.bits, &mut into[done..], has_caches);
                }
            }
        }
        done
    }

    /// Gives single frames back, one lock a zone for runs of frames that share it.
    ///
    /// # Errors
    /// As [`Frames::free_block`], and which of them: those before it are free, it and those behind it are not.
    pub fn free_batch(&self, frames: &[FrameNumber]) -> Result<(), (usize, FramesError)> {
        let mut at = 0;
        while at < frames.len() {
            let place = self.find(frames[at]).map_err(|cause| (at, cause))?;
            let range = &self.ranges[place.range];
            let zone = Zone::lock(range.zone_words(place.zone()), self.relax);
            let (mut result, has_caches) = (Ok(()), self.has_caches());
            // Rows that go back whole, first and end: together they are blocks.
            let mut whole = (0, 0);
            while let Some(&frame) = frames.get(at) {
                let Some(offset) = range.offset_in_zone(frame, place.zone()) else { break };
                // The frames of one row go back together.
                let row = offset / ROW_FRAMES * ROW_FRAMES;
                let (bits, count) = take_in_row(range, row, &frames[at..], has_caches);
                let in_zone = row % ZONE_FRAMES;
                if bits == u64::MAX {
                    if in_zone != whole.1 {
                        self.put_rows(range, place.zone(), &zone, whole);
                        whole.0 = in_zone;
                    }
                    whole.1 = in_zone + ROW_FRAMES;
                } else {
                    self.put_in_row(range, place.zone(), &zone, in_zone, bits);
                }
                at += count;
                if count == 0 {
                    result = refuse(range, offset, Order::ZERO).map_err(|cause| (at, cause));
                    break;
                }
            }
            self.put_rows(range, place.zone(), &zone, whole);
            self.settle(range, place.zone(), &zone);
            result?;
        }
        Ok(())
    }

    /// Gives the rows from the first to before the second frame back, in the largest blocks that they make.
    fn put_rows(&self, range: &Range, number: usize, zone: &Zone<'_>, (first, end): (usize, usize)) {
        let mut at = first;
        while at < end {
            let order = at.trailing_zeros().min((end - at).ilog2()).min(u32::from(Order::MAX.get())) as usize;
            self.put(range, number, zone, at, order);
            at += 1 << order;
        }
    }
}

/// Frames of the row at `first`, as bits, get an owner; their numbers come to the front of `into`. How many: those are left
/// out that a cache has given to somebody, as by [`Frames::give_out_block`].
fn give_out_row(range: &Range, first: usize, bits: u64, into: &mut [FrameNumber], has_caches: bool) -> usize {
    let number = range.number(first).0;
    let states = range.states();
    if bits == u64::MAX
        && !(has_caches && states.has_owned(first, ROW_FRAMES))
        && let Some(states) = states.0[first..].first_chunk::<ROW_FRAMES>()
        && let Some(into) = into.first_chunk_mut()
    {
        // The common case, and one that needs no look at single bits.
        states.iter().for_each(|state| state.store(1, Relaxed));
        *into = core::array::from_fn::<_, ROW_FRAMES, _>(|bit| FrameNumber(number + bit as u32));
        return ROW_FRAMES;
    }
    let mut given = 0;
    each_bit(bits, |bit| {
        if states.give_out(first + bit) {
            into[given] = FrameNumber(number + bit as u32);
            given += 1;
        }
    });
    given
}

/// Single frames at the front of `frames` lose their owner, as many as lie in the row at `first` and are in use: they as
/// bits, and how many. None when the first of them may not be given back.
fn take_in_row(range: &Range, first: usize, frames: &[FrameNumber], has_caches: bool) -> (u64, usize) {
    let number = range.number(first).0;
    let states = &range.states().0[first..];
    if let (Some(row), Some(states), false) = (frames.first_chunk(), states.first_chunk(), has_caches)
        && take_in_whole_row(number, states, row)
    {
        return (u64::MAX, ROW_FRAMES);
    }
    let (mut bits, mut count) = (0, 0);
    for frame in frames {
        let bit = frame.0.wrapping_sub(number) as usize;
        if bit >= ROW_FRAMES {
            break;
        }
        // An exchange each also where no cache needs it: whole rows, the common case, are behind us.
        if !range.states().clear(first + bit, Order::ZERO) {
            break;
        }
        bits |= 1 << bit;
        count += 1;
    }
    (bits, count)
}

/// The common case, without a look at single frames: they are a row, in order, and all in use. Whether they were.
fn take_in_whole_row(number: u32, states: &[AtomicU8; ROW_FRAMES], row: &[FrameNumber; ROW_FRAMES]) -> bool {
    let is_in_order = row.iter().zip(number..).fold(0, |differs, (frame, number)| differs | frame.0 ^ number) == 0;
    let single = Order::ZERO.get() + 1;
    if !is_in_order || states.iter().fold(0, |differs, state| differs | state.load(Relaxed) ^ single) != 0 {
        return false;
    }
    states.iter().for_each(|state| state.store(0, Relaxed));
    true
}
