//! The recorder: what happens to pages, passed on to `spm`, which writes the trace of `spm run --trace`.
//!
//! A ring of records in the control page, filled by the processes of the tree and emptied by `spm` every tick. Each place
//! has a *turn*: twice the number of the lap when it is free, one more when it is filled. Who records takes the next place
//! by a compare-and-swap, writes, and publishes with a Release store of the turn, which `spm` loads with Acquire (the
//! bounded queue of D. Vyukov). Nobody waits: what finds no free place is counted as lost. A process killed between taking a
//! place and filling it leaves a gap, which `spm` passes over after [`GAP_NS`].
//!
//! Nothing is recorded, at the price of one load, unless the run is traced.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64};

/// Places: more than happens in a tick.
const PLACES: usize = 1 << 15;
/// How long `spm` waits for a place that was taken to be filled, ns.
const GAP_NS: u64 = 1_000_000_000;

/// What happened to pages.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// A page that was nowhere was touched.
    FaultNowhere = 1,
    /// A page of the holding area was touched.
    FaultHolding = 2,
    /// A page of node 1, or of a node that is a file, was touched; more may have come along.
    FaultNode = 3,
    /// A page left for node 1 and takes `value` bytes there.
    Demote = 4,
    /// A page could not leave: it does not compress.
    RefuseIncompressible = 5,
    /// A page could not leave: it is pinned.
    RefusePinned = 6,
    /// A page could not leave: it is shared since a fork.
    RefuseShared = 7,
    /// `value` pages were unmapped or discarded.
    Drop = 8,
    /// A page left for the node whose number is `value`, where it is mapped, or copied to its file.
    Place = 9,
    /// A page on a mapped node was written, behind a fence.
    FaultMapped = 10,
}

impl Happening {
    fn from_raw(raw: u32) -> Option<Self> {
        const ALL: [Happening; 10] = [
            Happening::FaultNowhere,
            Happening::FaultHolding,
            Happening::FaultNode,
            Happening::Demote,
            Happening::RefuseIncompressible,
            Happening::RefusePinned,
            Happening::RefuseShared,
            Happening::Drop,
            Happening::Place,
            Happening::FaultMapped,
        ];
        ALL.into_iter().find(|&known| known as u32 == raw)
    }
}

/// One thing that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// When, ns of CLOCK_MONOTONIC.
    pub ns: u64,
    /// The process id.
    pub process: u32,
    /// What.
    pub what: Happening,
    /// The first page: its address divided by 4096.
    pub page: u64,
    /// A fault: how many pages came, and in the highest bit whether the touch was a write. Otherwise as [`Happening`] says.
    pub value: u64,
}

/// In the value of a fault: it was a write.
pub const IS_WRITE: u64 = 1 << 63;

#[repr(C)]
#[derive(Default)]
struct Place {
    turn: AtomicU64,
    ns: AtomicU64,
    process: AtomicU32,
    what: AtomicU32,
    page: AtomicU64,
    value: AtomicU64,
}

/// The ring. Zeroed memory is an empty one that records nothing.
#[repr(C)]
pub struct Recorder {
    is_on: AtomicU32,
    /// Places taken since the start.
    taken: AtomicU64,
    lost: AtomicU64,
    places: [Place; PLACES],
}

/// `spm`'s end of the ring.
#[derive(Debug, Default)]
pub struct Reader {
    next: u64,
    /// Since when the next place is taken and not filled, ns.
    gap_ns: Option<u64>,
}

const fn free(position: u64) -> u64 {
    position / PLACES as u64 * 2
}

impl Recorder {
    /// From now on things are recorded.
    pub fn switch_on(&self) {
        self.is_on.store(1, Relaxed);
    }

    /// Whether things are recorded.
    pub fn is_on(&self) -> bool {
        self.is_on.load(Relaxed) != 0
    }

    /// Records that were lost since the start.
    pub fn lost(&self) -> u64 {
        self.lost.load(Relaxed)
    }

    /// Records something, if things are recorded.
    pub fn record(&self, record: impl FnOnce() -> Record) {
        if self.is_on() {
            self.push(record());
        }
    }

    fn push(&self, record: Record) {
        let mut position = self.taken.load(Relaxed);
        let place = loop {
            let place = &self.places[(position % PLACES as u64) as usize];
            if place.turn.load(Acquire) != free(position) {
                let now = self.taken.load(Relaxed);
                if now == position {
                    self.lost.fetch_add(1, Relaxed);
                    return;
                }
                position = now;
                continue;
            }
            match self.taken.compare_exchange_weak(position, position + 1, Relaxed, Relaxed) {
                Ok(_) => break place,
                Err(now) => position = now,
            }
        };
        place.ns.store(record.ns, Relaxed);
        place.process.store(record.process, Relaxed);
        place.what.store(record.what as u32, Relaxed);
        place.page.store(record.page, Relaxed);
        place.value.store(record.value, Relaxed);
        place.turn.store(free(position) + 1, Release);
    }
}

impl Reader {
    /// The next record, if there is one. What any process may have written over is taken as it is found.
    pub fn next(&mut self, recorder: &Recorder, now_ns: u64) -> Option<Record> {
        loop {
            let place = &recorder.places[(self.next % PLACES as u64) as usize];
            if place.turn.load(Acquire) != free(self.next) + 1 {
                if recorder.taken.load(Relaxed) <= self.next {
                    self.gap_ns = None;
                    return None;
                }
                if now_ns.saturating_sub(*self.gap_ns.get_or_insert(now_ns)) < GAP_NS {
                    return None;
                }
                recorder.lost.fetch_add(1, Relaxed);
                self.pass(place);
                continue;
            }
            let what = Happening::from_raw(place.what.load(Relaxed));
            let (ns, process) = (place.ns.load(Relaxed), place.process.load(Relaxed));
            let (page, value) = (place.page.load(Relaxed), place.value.load(Relaxed));
            self.pass(place);
            if let Some(what) = what {
                return Some(Record { ns, process, what, page, value });
            }
        }
    }

    fn pass(&mut self, place: &Place) {
        place.turn.store(free(self.next) + 2, Release);
        self.next += 1;
        self.gap_ns = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::boxed::Box;
    use alloc::vec::Vec;

    extern crate std;

    fn recorder() -> Box<Recorder> {
        let places: Vec<Place> = (0..PLACES).map(|_| Place::default()).collect();
        let Ok(places) = <Box<[Place; PLACES]>>::try_from(places.into_boxed_slice()) else { unreachable!() };
        let (is_on, taken, lost) = Default::default();
        Box::new(Recorder { is_on, taken, lost, places: *places })
    }

    fn record(process: u32, page: u64) -> Record {
        Record { ns: page * 3, process, what: Happening::Demote, page, value: !page }
    }

    #[test]
    fn records_of_several_threads_come_out_whole_each_thread_s_in_its_order_and_all_or_counted() {
        const EACH: u64 = 50_000;
        let recorder = recorder();
        recorder.switch_on();
        let (mut reader, mut seen, mut count) = (Reader::default(), [None; 3], 0);
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..3)
                .map(|process| {
                    let recorder = &recorder;
                    scope.spawn(move || (0..EACH).for_each(|page| recorder.record(|| record(process, page))))
                })
                .collect();
            loop {
                let is_over = writers.iter().all(std::thread::ScopedJoinHandle::is_finished);
                while let Some(found) = reader.next(&recorder, 0) {
                    assert_eq!(found, record(found.process, found.page), "torn");
                    let before = seen[found.process as usize].replace(found.page);
                    assert!(before < Some(found.page), "out of order");
                    count += 1;
                }
                if is_over {
                    break;
                }
                std::thread::yield_now();
            }
        });
        assert_eq!(count + recorder.lost(), 3 * EACH);
        assert!(count >= PLACES as u64);
    }

    #[test]
    fn a_full_ring_loses_the_newest_and_goes_on_when_it_is_emptied() {
        let recorder = recorder();
        recorder.switch_on();
        let more = PLACES as u64 + 10;
        (0..more).for_each(|page| recorder.record(|| record(1, page)));
        assert_eq!(recorder.lost(), 10);
        let mut reader = Reader::default();
        let read: Vec<u64> = core::iter::from_fn(|| reader.next(&recorder, 0)).map(|record| record.page).collect();
        assert!(read.into_iter().eq(0..PLACES as u64));
        recorder.record(|| record(1, 77));
        assert_eq!(reader.next(&recorder, 0), Some(record(1, 77)));
    }

    #[test]
    fn a_place_that_is_never_filled_is_passed_over() {
        let recorder = recorder();
        recorder.switch_on();
        recorder.taken.fetch_add(1, Relaxed); // taken by a process that was killed
        recorder.record(|| record(1, 5));
        let mut reader = Reader::default();
        assert_eq!(reader.next(&recorder, 10), None);
        assert_eq!(reader.next(&recorder, 10 + GAP_NS - 1), None);
        assert_eq!(reader.next(&recorder, 10 + GAP_NS), Some(record(1, 5)));
        assert_eq!(recorder.lost(), 1);
    }

    #[test]
    fn nothing_is_recorded_before_it_is_switched_on() {
        let recorder = recorder();
        recorder.record(|| record(1, 5));
        assert_eq!(Reader::default().next(&recorder, 0), None);
    }
}
