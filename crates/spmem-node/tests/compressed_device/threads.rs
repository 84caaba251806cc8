//! The same in threads: writers, a device and who polls, as fast as the machine can. Every byte is checked.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Instant;

use spmem_core::compressed::STALE_NS;
use spmem_core::units::{DomainId, FrameCount, Time};
use spmem_node::cram::{Cram, Denied, PageId};
use spmem_node::model::{Device, Shape};
use spmem_node::{PAGE_BYTES, Page};

use super::harness::{BY_LINE, Random, component, device, page_of};

const WRITES: u64 = 2500;

struct Shared {
    cram: Mutex<Cram<Device>>,
    /// Something has changed: whoever waits tries again.
    changed: Condvar,
    begun: Instant,
    is_over: AtomicBool,
}

impl Shared {
    fn now(&self) -> Time {
        Time(u64::try_from(self.begun.elapsed().as_nanos()).unwrap())
    }

    /// Writes, waiting as long as it takes; an error has changed nothing.
    fn write(&self, id: PageId, bytes: &Page) -> Result<(), Denied> {
        let (mut cram, mut ticket) = (self.cram.lock().unwrap(), None);
        loop {
            let now = self.now();
            match cram.write(now, id, 0, bytes, ticket) {
                Err(Denied::Wait(again)) => {
                    ticket = Some(again);
                    cram = self.changed.wait(cram).unwrap();
                }
                other => {
                    self.changed.notify_all();
                    return other;
                }
            }
        }
    }
}

/// A thread of a program: turns its pages incompressible and back, and checks each before; how often it was refused.
fn write(shared: &Shared, program: DomainId, thread: u64, is_hostile: bool) -> u64 {
    let mut random = Random::new(thread + 1);
    let mut model: BTreeMap<u64, Page> = BTreeMap::new();
    let mut refused = 0;
    for step in 0..WRITES {
        // Pages of its own: threads share the limit, not the bytes.
        let number = thread * 1000 + random.below(40);
        let mut back = [0; PAGE_BYTES];
        match shared.cram.lock().unwrap().read(page_of(program, number), &mut back) {
            Ok(()) => assert!(back == model[&number], "every byte"),
            Err(Denied::NoPage) => assert!(!model.contains_key(&number)),
            Err(other) => panic!("{other}"),
        }
        let page = random.page(if is_hostile && step % 3 != 0 { 64 } else { 2 });
        match shared.write(page_of(program, number), &page) {
            Ok(()) => {
                model.insert(number, page);
            }
            Err(Denied::OverLimit { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    let mut back = [0; PAGE_BYTES];
    for (&number, page) in &model {
        shared.cram.lock().unwrap().read(page_of(program, number), &mut back).unwrap();
        assert!(back == *page, "every byte");
    }
    refused
}

#[test]
fn threads_that_turn_pages_incompressible_as_fast_as_they_can_lose_nothing() {
    for does_weigh in [true, false] {
        let device = device(Shape { does_weigh, ..BY_LINE });
        let mut cram = component(device.clone(), 32, |settings| settings.stale_ns = STALE_NS);
        let adversary = cram.create_program("adversary", FrameCount(16)).unwrap();
        let bystander = cram.create_program("bystander", FrameCount(16)).unwrap();
        let (cram, changed) = (Mutex::new(cram), Condvar::new());
        let shared = Shared { cram, changed, begun: Instant::now(), is_over: AtomicBool::new(false) };
        let refused: u64 = std::thread::scope(|scope| {
            let shared = &shared;
            let poller = scope.spawn(|| {
                while !shared.is_over.load(Ordering::Relaxed) {
                    shared.cram.lock().unwrap().poll(shared.now());
                    shared.changed.notify_all();
                    std::thread::yield_now();
                }
            });
            let own_part = device.clone();
            let compressing = scope.spawn(move || {
                while !shared.is_over.load(Ordering::Relaxed) {
                    own_part.drain(16);
                    std::thread::yield_now();
                }
            });
            let threads = [(adversary, true), (adversary, true), (bystander, false)];
            let writers: Vec<_> = (0..)
                .zip(threads)
                .map(|(thread, (program, is_hostile))| {
                    scope.spawn(move || write(shared, program, thread, is_hostile))
                })
                .collect();
            // The others end also where one of them has failed.
            let refused: Vec<_> = writers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            shared.is_over.store(true, Ordering::Relaxed);
            poller.join().unwrap();
            compressing.join().unwrap();
            refused.into_iter().map(Result::unwrap).sum()
        });
        device.drain(usize::MAX);
        println!("weighs {does_weigh}: {}, {refused} writes refused", device.counts());
        assert_eq!(device.counts().dropped_lines, 0, "it was overrun");
    }
}
