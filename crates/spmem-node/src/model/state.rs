//! What a device keeps: which lines wait, what each granule takes, what is broken.

use alloc::collections::{BTreeSet, VecDeque};
use alloc::vec;
use alloc::vec::Vec;

use spmem_core::compressed::Reading;
use spmem_core::units::Bytes;
use spmem_sys::region::Region;

use super::lines::{LINE_BYTES, granule_bytes};
use super::{Counts, Fault, POISON_BYTE, Shape};
use crate::cram::Notice;

#[derive(Clone, Copy, Debug, Default)]
struct Line {
    is_dirty: bool,
    /// It reads as poison: a write to it was dropped, or its memory is broken.
    is_poisoned: bool,
    is_broken: bool,
}

#[derive(Debug)]
pub(super) struct State {
    lines: Vec<Line>,
    /// Lines that wait, oldest first. One that was discarded stays in the queue, clean.
    waiting: VecDeque<usize>,
    dirty: usize,
    /// What each granule takes, bytes.
    takes: Vec<u16>,
    used: u64,
    fault: Fault,
    said: Option<Reading>,
    is_low: bool,
    pub(super) notices: VecDeque<Notice>,
    pub(super) loses_notices: bool,
    pub(super) counts: Counts,
}

impl State {
    pub(super) fn new(len: usize, shape: &Shape) -> Self {
        Self {
            lines: vec![Line::default(); len / LINE_BYTES],
            waiting: VecDeque::new(),
            dirty: 0,
            takes: vec![0; len / shape.granule],
            used: 0,
            fault: Fault::None,
            said: None,
            is_low: false,
            notices: VecDeque::new(),
            loses_notices: false,
            counts: Counts::default(),
        }
    }

    pub(super) fn read(&mut self, shape: &Shape) -> Option<Reading> {
        self.counts.readings += 1;
        let now = Reading { capacity: shape.physical, used: Bytes(self.used) };
        match self.fault {
            Fault::None => self.said = Some(now),
            Fault::Stuck => self.said = self.said.or(Some(now)),
            Fault::Silent => return None,
        }
        self.said
    }

    pub(super) const fn set_fault(&mut self, fault: Fault) {
        self.fault = fault;
    }

    pub(super) fn notify(&mut self, notice: Notice) {
        if !self.loses_notices {
            self.notices.push_back(notice);
        }
    }

    pub(super) fn has_poison(&self, at: usize, len: usize) -> bool {
        self.lines[lines(at, len)].iter().any(|line| line.is_poisoned)
    }

    /// Bytes were written: their lines wait. Where too many do the oldest are compressed.
    pub(super) fn written(&mut self, at: usize, len: usize, region: &Region, shape: &Shape) {
        for number in lines(at, len) {
            let is_whole = at <= number * LINE_BYTES && (number + 1) * LINE_BYTES <= at + len;
            let line = &mut self.lines[number];
            line.is_poisoned &= line.is_broken || !is_whole;
            if line.is_dirty {
                continue;
            }
            line.is_dirty = true;
            self.dirty += 1;
            self.waiting.push_back(number);
            while self.dirty > shape.dirty_lines {
                self.drain_one(region, shape);
            }
        }
    }

    /// Bytes are needed no more, and are zero now.
    pub(super) fn discarded(&mut self, at: usize, len: usize, region: &Region, shape: &Shape) {
        for number in lines(at, len) {
            let line = &mut self.lines[number];
            self.dirty -= usize::from(core::mem::take(&mut line.is_dirty));
            line.is_poisoned = line.is_broken;
        }
        for granule in at / shape.granule..(at + len).div_ceil(shape.granule) {
            let is_whole = at <= granule * shape.granule && (granule + 1) * shape.granule <= at + len;
            let takes = if is_whole { 0 } else { measure(granule, region, shape) };
            self.set_takes(granule, takes);
        }
        if self.waiting.len() > 2 * shape.dirty_lines + 64 {
            let mut seen = BTreeSet::new();
            self.waiting.retain(|&line| self.lines[line].is_dirty && seen.insert(line));
        }
        self.watch(shape);
    }

    /// Compresses the line that waits longest; whether there was one.
    pub(super) fn drain_one(&mut self, region: &Region, shape: &Shape) -> bool {
        let number = loop {
            let Some(number) = self.waiting.pop_front() else { return false };
            // One that was discarded and written again is in the queue twice: it is compressed early.
            if core::mem::take(&mut self.lines[number].is_dirty) {
                break number;
            }
        };
        self.dirty -= 1;
        let granule = number * LINE_BYTES / shape.granule;
        let takes = measure(granule, region, shape);
        let after = self.used - u64::from(self.takes[granule]) + u64::from(takes);
        if after > shape.physical.0 {
            self.counts.dropped_lines += 1;
            self.lines[number].is_poisoned = true;
            let _ = region.write(number * LINE_BYTES, &[POISON_BYTE; LINE_BYTES]);
            self.notify(Notice::Poison { offset: (number * LINE_BYTES) as u64 });
        } else {
            self.set_takes(granule, takes);
            self.counts.compressed_lines += 1;
        }
        self.watch(shape);
        true
    }

    pub(super) fn break_line(&mut self, number: usize, region: &Region) {
        let Some(line) = self.lines.get_mut(number) else { return };
        (line.is_poisoned, line.is_broken) = (true, true);
        let _ = region.write(number * LINE_BYTES, &[POISON_BYTE; LINE_BYTES]);
        self.notify(Notice::Poison { offset: (number * LINE_BYTES) as u64 });
    }

    fn set_takes(&mut self, granule: usize, takes: u16) {
        self.used = self.used - u64::from(self.takes[granule]) + u64::from(takes);
        self.takes[granule] = takes;
        self.counts.peak = self.counts.peak.max(Bytes(self.used));
    }

    /// Sends what is to be sent when use crosses the mark.
    fn watch(&mut self, shape: &Shape) {
        let is_low = self.used > shape.physical.0 / 1000 * shape.low_per_mille;
        if is_low != self.is_low {
            self.is_low = is_low;
            self.notify(if is_low { Notice::Low } else { Notice::High });
        }
    }
}

/// The lines that a range touches.
fn lines(at: usize, len: usize) -> core::ops::Range<usize> {
    at / LINE_BYTES..(at + len).div_ceil(LINE_BYTES)
}

/// What a granule's bytes come to.
fn measure(granule: usize, region: &Region, shape: &Shape) -> u16 {
    let mut bytes = [0; crate::PAGE_BYTES];
    let bytes = &mut bytes[..shape.granule];
    let read = region.read(granule * shape.granule, bytes);
    assert!(read.is_ok(), "a granule lies in its region: {read:?}");
    u16::try_from(granule_bytes(bytes, shape.sector)).expect("a granule is a page at most")
}
