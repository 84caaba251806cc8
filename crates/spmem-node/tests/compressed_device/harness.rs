//! A component on a model device, with a copy of every page beside it.

use std::collections::BTreeMap;

use spmem_core::compressed::Settings;
use spmem_core::frames::Metadata;
use spmem_core::units::{Bytes, DomainId, FrameCount, NodeId, PAGE_SIZE, Time};
use spmem_core::watermark::Watermarks;
use spmem_node::cram::{Cram, Denied, PageId, Ticket};
use spmem_node::model::{Device, Shape};
use spmem_node::{PAGE_BYTES, Page, numa};

/// When silence is death, in ticks of a bench.
pub const STALE: u64 = 40;
/// Tries after which a writer that waits has waited too long: the device is heard, or dead, well before.
const TRIES: u64 = 10 * STALE;
/// 64 frames of memory behind 128 frames: lines compressed one by one, 256 of them waiting.
pub const BY_LINE: Shape = Shape { dirty_lines: 256, granule: 64, sector: 8, ..Shape::new(Bytes(64 * PAGE_SIZE)) };
/// The same in granules of 1 KiB, 32 lines waiting: the reserve is 8 frames.
pub const BY_GRANULE: Shape = Shape { dirty_lines: 32, ..Shape::new(Bytes(64 * PAGE_SIZE)) };
/// Frames that it offers.
pub const PERCEIVED: u64 = 128;

/// Random numbers of a seed (xorshift64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    /// A page with so many of its 64 lines random, the others a value in a row.
    pub fn page(&mut self, random_lines: u64) -> Page {
        let mut page = [0; PAGE_BYTES];
        for (number, line) in page.as_chunks_mut::<64>().0.iter_mut().enumerate() {
            let value = self.next();
            let is_random = (number as u64) < random_lines;
            for word in line.as_chunks_mut::<8>().0 {
                *word = if is_random { self.next() } else { value }.to_le_bytes();
            }
        }
        page
    }
}

pub fn device(shape: Shape) -> Device {
    Device::new(numa::region(PERCEIVED * PAGE_SIZE, 0).unwrap(), shape).unwrap()
}

pub fn component(device: Device, sysram: u64, change: impl FnOnce(&mut Settings)) -> Cram<Device> {
    let lent = Metadata::from_heap(FrameCount(PERCEIVED)).unwrap();
    let marks = Watermarks::new(FrameCount(0), FrameCount(8), FrameCount(16)).unwrap();
    let change = |settings: &mut Settings| {
        settings.stale_ns = STALE;
        settings.balloon_step = FrameCount(8);
        change(settings);
    };
    Cram::new(device, NodeId::ONE, FrameCount(sysram), lent, marks, change).unwrap()
}

/// A component that is used by one thread, tick by tick.
pub struct Bench {
    pub device: Device,
    pub cram: Cram<Device>,
    pub now: u64,
    pub random: Random,
    /// What every page holds.
    pub model: BTreeMap<PageId, Box<Page>>,
    /// Lines that the device compresses in a tick.
    pub drained: usize,
}

impl Bench {
    pub fn new(seed: u64, shape: Shape, sysram: u64, change: impl FnOnce(&mut Settings)) -> Self {
        let device = device(shape);
        let cram = component(device.clone(), sysram, change);
        let (now, random, model, drained) = (0, Random::new(seed), BTreeMap::new(), 4);
        let mut bench = Self { device, cram, now, random, model, drained };
        bench.tick();
        bench
    }

    pub fn program(&mut self, name: &str, limit: u64) -> DomainId {
        self.cram.create_program(name, FrameCount(limit)).unwrap()
    }

    /// The device goes on, time passes, the component looks.
    pub fn tick(&mut self) {
        self.now += 1;
        self.device.drain(self.drained);
        self.cram.poll(Time(self.now));
    }

    /// Writes as a program does that waits when it is told to. An error has changed nothing.
    pub fn write(&mut self, id: PageId, offset: usize, bytes: &[u8]) -> Result<(), Denied> {
        let mut ticket: Option<Ticket> = None;
        for _ in 0..TRIES {
            match self.cram.write(Time(self.now), id, offset, bytes, ticket) {
                Ok(()) => {
                    let page = self.model.entry(id).or_insert_with(|| Box::new([0; PAGE_BYTES]));
                    page[offset..offset + bytes.len()].copy_from_slice(bytes);
                    return Ok(());
                }
                Err(Denied::Wait(again)) => {
                    ticket = Some(again);
                    self.tick();
                }
                Err(denied) => {
                    if let Denied::OverLimit { limit, .. } = denied {
                        assert_eq!(self.cram.resident(id.owner), limit, "only at its own limit");
                    }
                    if !matches!(denied, Denied::Hurt(_)) {
                        self.check(id);
                    }
                    return Err(denied);
                }
            }
        }
        panic!("a writer waits for ever");
    }

    /// Every byte of a page, if there is one.
    pub fn check(&mut self, id: PageId) {
        let mut page = [0x5a; PAGE_BYTES];
        match (self.cram.read(id, &mut page), self.model.get(&id)) {
            (Ok(()), Some(known)) => assert!(page == **known, "every byte of {id:?}"),
            (Err(Denied::NoPage), None) => {}
            (other, known) => panic!("{id:?}: {other:?}, known: {}", known.is_some()),
        }
    }

    /// Every byte of every page, and that the device has dropped none.
    pub fn check_all(&mut self) {
        let ids: Vec<PageId> = self.model.keys().copied().collect();
        ids.into_iter().for_each(|id| self.check(id));
        assert_eq!(self.device.counts().dropped_lines, 0, "it was overrun: {}", self.device.counts());
    }

    /// How many pages do not hold what they should, or are lost.
    pub fn count_lost(&mut self) -> usize {
        let mut page = [0; PAGE_BYTES];
        let is_lost = self.model.iter().map(|(id, known)| match self.cram.read(*id, &mut page) {
            Ok(()) => {
                assert!(page == **known, "wrong bytes are never handed out (R20): {id:?}");
                false
            }
            Err(_) => true,
        });
        is_lost.filter(|&is_lost| is_lost).count()
    }
}

pub fn page_of(owner: DomainId, number: u64) -> PageId {
    PageId { owner, address: number * PAGE_SIZE }
}
