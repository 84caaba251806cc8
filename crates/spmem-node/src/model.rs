//! A model of a device that compresses its memory inline. **It is no kind of memory**: it exists to develop against, and to
//! prove that [`cram`](crate::cram) never overruns such a device, and that a component without a reserve does.
//!
//! [`Device`] is byte-addressable: what the processors see lies in a [`Region`], uncompressed. Beside it the model keeps what a
//! device would: lines that were written wait in a cache ([`Shape::dirty_lines`]) and are compressed when they fall out of it;
//! then their granule takes what its *actual bytes* come to ([`lines`]). Where that does not fit into the physical memory the
//! write is **dropped**: the line reads as poison from then on. The device says how much is in use, with the delay that the cache
//! makes, and sends notices; all of that can be made to fail ([`Fault`]).
//!
//! A handle is shared: a test keeps one to play the device's own part ([`Device::drain`], [`Device::poison`]) while the
//! component has another. Every call takes one lock.

pub mod lines;
mod state;

use core::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use spmem_core::compressed::{Burst, Ratio, Reading};
use spmem_core::units::{Bytes, PAGE_SIZE};
use spmem_sys::region::Region;
use spmem_sys::{Errno, Result};

use self::lines::LINE_BYTES;
use self::state::State;
use crate::backend::Page;
use crate::cram::{Notice, Telemetry};
use crate::mapped::{Medium, MediumError, Operation};

/// What a line holds whose write was dropped.
pub const POISON_BYTE: u8 = 0xdb;

/// What a device is built like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Physical memory, bytes.
    pub physical: Bytes,
    /// Lines that wait to be compressed at most.
    pub dirty_lines: usize,
    /// What is compressed as one: a power of two from a line (64) to a page (4096), bytes.
    pub granule: usize,
    /// What a granule takes is a multiple of this, bytes.
    pub sector: usize,
    /// Use above which it sends [`Notice::Low`] (on memory), per mille of `physical`; below it again, [`Notice::High`].
    pub low_per_mille: u64,
    /// Whether it tells what a page would take ([`Telemetry::weigh`]).
    pub does_weigh: bool,
}

impl Shape {
    /// So much physical memory; 1 KiB granules in 64-byte sectors as IBM's MXT stored 1 KiB in 256-byte ones, a small cache.
    pub const fn new(physical: Bytes) -> Self {
        let (dirty_lines, granule, sector) = (256, 1024, 64);
        Self { physical, dirty_lines, granule, sector, low_per_mille: 900, does_weigh: true }
    }
}

/// What is wrong with the telemetry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// It says for ever what it said last.
    Stuck,
    /// It does not answer.
    Silent,
}

/// What a device has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lines compressed.
    pub compressed_lines: u64,
    /// Writes dropped for want of physical memory: each lost a line.
    pub dropped_lines: u64,
    /// Most physical memory in use, bytes.
    pub peak: Bytes,
    /// Times that it was asked for a reading.
    pub readings: u64,
}

/// A device, shared by all its handles.
#[derive(Clone, Debug)]
pub struct Device(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    region: Region,
    shape: Shape,
    state: Mutex<State>,
}

impl Device {
    /// A device that offers all pages of `region`, which hold zeros.
    ///
    /// # Errors
    /// `EINVAL` for a shape that cannot be.
    pub fn new(region: Region, shape: Shape) -> Result<Self> {
        let is_granule = shape.granule.is_power_of_two()
            && (LINE_BYTES..=crate::PAGE_BYTES).contains(&shape.granule)
            && shape.sector > 0;
        if !is_granule || !region.len().is_multiple_of(crate::PAGE_BYTES) || shape.physical.0 == 0 {
            return Err(Errno::EINVAL);
        }
        let state = Mutex::new(State::new(region.len(), &shape));
        Ok(Self(Arc::new(Inner { region, shape, state })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test thread that panicked holding it has failed its test.
        self.0.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What it is built like.
    pub fn shape(&self) -> &Shape {
        &self.0.shape
    }

    /// What the processors see.
    pub fn region(&self) -> &Region {
        &self.0.region
    }

    /// What it has done.
    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    /// Compresses up to `most` of the lines that wait, oldest first; how many.
    pub fn drain(&self, most: usize) -> usize {
        let mut state = self.state();
        (0..most).take_while(|_| state.drain_one(&self.0.region, &self.0.shape)).count()
    }

    /// Makes its telemetry fail, or work again.
    pub fn set_fault(&self, fault: Fault) {
        self.state().set_fault(fault);
    }

    /// Loses all notices from now on, or none any more.
    pub fn set_lossy(&self, loses_notices: bool) {
        self.state().loses_notices = loses_notices;
    }

    /// Sends a notice so many times, whatever is so.
    pub fn send(&self, notice: Notice, times: usize) {
        let mut state = self.state();
        (0..times).for_each(|_| state.notify(notice));
    }

    /// The memory behind a byte breaks: its line reads as poison for ever.
    pub fn poison(&self, offset: u64) {
        let Some(line) = usize::try_from(offset).ok().map(|offset| offset / LINE_BYTES) else { return };
        let mut state = self.state();
        state.break_line(line, &self.0.region);
    }
}

impl Telemetry for Device {
    fn reading(&self) -> Option<Reading> {
        self.state().read(&self.0.shape)
    }

    fn burst(&self) -> Burst {
        let Shape { dirty_lines, granule, .. } = self.0.shape;
        Burst::Device { dirty_lines: dirty_lines as u64, granule: Bytes(granule as u64) }
    }

    fn advertised(&self) -> Ratio {
        Ratio::of(Bytes(self.0.region.len() as u64), self.0.shape.physical).unwrap_or(Ratio(1000))
    }

    fn weigh(&self, page: &Page) -> Option<Bytes> {
        let Shape { granule, sector, does_weigh, .. } = self.0.shape;
        let bytes = || page.chunks(granule).map(|granule| lines::granule_bytes(granule, sector) as u64).sum();
        does_weigh.then(|| Bytes(bytes()))
    }

    fn take_notice(&self) -> Option<Notice> {
        self.state().notices.pop_front()
    }
}

fn failed(operation: Operation, offset: u64, errno: Errno) -> MediumError {
    MediumError { operation, offset, errno: errno.0 }
}

impl Device {
    fn range(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
    ) -> core::result::Result<(usize, usize), MediumError> {
        let outside = failed(operation, offset, Errno::EINVAL);
        let (at, len) = (usize::try_from(offset), usize::try_from(len));
        let (Ok(at), Ok(len)) = (at, len) else { return Err(outside) };
        let is_within = at.checked_add(len).is_some_and(|end| end <= self.0.region.len());
        if is_within { Ok((at, len)) } else { Err(outside) }
    }
}

impl Medium for Device {
    fn len(&self) -> u64 {
        self.0.region.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> core::result::Result<(), MediumError> {
        let (at, len) = self.range(Operation::Read, offset, into.len() as u64)?;
        let state = self.state();
        if state.has_poison(at, len) {
            return Err(failed(Operation::Read, offset, Errno::EIO));
        }
        self.0.region.read(at, into).map_err(|errno| failed(Operation::Read, offset, errno))
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> core::result::Result<(), MediumError> {
        let (at, len) = self.range(Operation::Write, offset, bytes.len() as u64)?;
        let mut state = self.state();
        self.0.region.write(at, bytes).map_err(|errno| failed(Operation::Write, offset, errno))?;
        state.written(at, len, &self.0.region, &self.0.shape);
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> core::result::Result<(), MediumError> {
        let (at, len) = self.range(Operation::Write, offset, len)?;
        let mut state = self.state();
        self.0.region.zero(at, len).map_err(|errno| failed(Operation::Write, offset, errno))?;
        state.written(at, len, &self.0.region, &self.0.shape);
        Ok(())
    }

    /// The processors' caches only: what a device does with it is its own affair.
    fn flush(&mut self, offset: u64, len: u64) -> core::result::Result<(), MediumError> {
        self.range(Operation::Flush, offset, len).map(|_| ())
    }

    fn discard(&mut self, offset: u64, len: u64) {
        let Ok((at, len)) = self.range(Operation::Write, offset, len) else { return };
        let mut state = self.state();
        if self.0.region.zero(at, len).is_ok() {
            state.discarded(at, len, &self.0.region, &self.0.shape);
        }
    }

    fn address(&self, offset: u64) -> Option<usize> {
        let offset = usize::try_from(offset).ok().filter(|&offset| offset < self.0.region.len())?;
        Some(self.0.region.start() + offset)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { compressed_lines, dropped_lines, peak, readings } = self;
        write!(
            f,
            "{compressed_lines} lines compressed, {dropped_lines} dropped, {peak} at most, {readings} readings"
        )
    }
}

const _: () = assert!(PAGE_SIZE.is_multiple_of(LINE_BYTES as u64));
