//! What the replacement policy is worth: `cargo run --release -p spmem-core --example replacement`.
//!
//! 256k pages, a quarter of them resident, an eighth of those in the holding area. Four seeded traces of 16 accesses
//! a page, the first quarter to warm up, against three policies. Cost: a store fault 8 us + 15 us in the background
//! (the eviction that makes room), a rescue 3 us. Prints counts and costs relative to plain FIFO.

use std::collections::VecDeque;

use spmem_core::lru::{self, Age, Verdict};

const PAGES: u32 = 256 << 10;
const ACCESSES: u32 = 16 * PAGES;
const WARM_UP: u32 = ACCESSES / 4;
const RESIDENT: u32 = PAGES / 4;
const HOLDING: u32 = RESIDENT / 8;
const STORE_FAULT_US: f64 = 8.0 + 15.0;
const RESCUE_US: f64 = 3.0;

fn main() {
    println!("{:12} {:22} {:>10} {:>10} {:>8}", "trace", "policy", "faults", "rescues", "cost");
    for (name, trace) in traces() {
        let fifo = run(&trace, 0, Fifo::default());
        let outcomes = [
            ("FIFO", fifo),
            ("FIFO + holding", run(&trace, HOLDING, Fifo::default())),
            ("clock + holding", run(&trace, HOLDING, Clock::default())),
        ];
        for (policy, outcome) in outcomes {
            let relative = outcome.cost_us() / fifo.cost_us();
            println!("{name:12} {policy:22} {:>10} {:>10} {relative:>8.3}", outcome.faults, outcome.rescues);
        }
    }
}

/// Where an arriving page comes from.
enum From {
    Nowhere,
    Store,
    Holding,
}

/// Picks among the resident pages.
trait Policy {
    fn arrive(&mut self, page: u32, from: From);
    /// The page that goes to the holding area; one is resident.
    fn pick(&mut self) -> u32;
}

/// The oldest arrival leaves.
#[derive(Default)]
struct Fifo(VecDeque<u32>);

impl Policy for Fifo {
    fn arrive(&mut self, page: u32, _: From) {
        self.0.push_back(page);
    }

    fn pick(&mut self) -> u32 {
        self.0.pop_front().expect("one is resident")
    }
}

/// The crate's policy: a hand that goes round by address.
struct Clock {
    ages: Vec<Age>,
    is_resident: Vec<bool>,
    hand: usize,
}

impl Default for Clock {
    fn default() -> Self {
        let pages = PAGES as usize;
        Self { ages: vec![Age::COLDEST; pages], is_resident: vec![false; pages], hand: 0 }
    }
}

impl Policy for Clock {
    fn arrive(&mut self, page: u32, from: From) {
        let age = &mut self.ages[page as usize];
        *age = match from {
            From::Nowhere => lru::on_first_touch(),
            From::Store => lru::on_promoted(*age),
            From::Holding => lru::on_rescued(*age),
        };
        self.is_resident[page as usize] = true;
    }

    fn pick(&mut self) -> u32 {
        loop {
            let page = self.hand;
            self.hand = (self.hand + 1) % PAGES as usize;
            if !self.is_resident[page] {
                continue;
            }
            match lru::on_sweep(self.ages[page]) {
                Verdict::Keep(age) => self.ages[page] = age,
                Verdict::Evict(age) => {
                    self.ages[page] = age;
                    self.is_resident[page] = false;
                    return u32::try_from(page).expect("below PAGES");
                }
            }
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Outcome {
    faults: u32,
    rescues: u32,
}

impl Outcome {
    fn cost_us(&self) -> f64 {
        f64::from(self.faults) * STORE_FAULT_US + f64::from(self.rescues) * RESCUE_US
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Nowhere,
    Resident,
    /// With the number of its entry in the holding queue.
    Holding(u32),
    Store,
}

fn run(trace: &[u32], holding: u32, mut policy: impl Policy) -> Outcome {
    let mut places = vec![Place::Nowhere; PAGES as usize];
    let mut queue = VecDeque::new();
    let (mut resident, mut held, mut serial) = (0, 0, 0);
    let mut outcome = Outcome::default();
    for (now, &page) in (0u32..).zip(trace) {
        let count = u32::from(now >= WARM_UP);
        let from = match places[page as usize] {
            Place::Resident => continue,
            Place::Nowhere => From::Nowhere,
            Place::Store => {
                outcome.faults += count;
                From::Store
            }
            Place::Holding(_) => {
                outcome.rescues += count;
                held -= 1;
                From::Holding
            }
        };
        places[page as usize] = Place::Resident;
        policy.arrive(page, from);
        resident += 1;
        if resident > RESIDENT - holding {
            let page = policy.pick();
            serial += 1;
            places[page as usize] = Place::Holding(serial);
            queue.push_back((page, serial));
            (resident, held) = (resident - 1, held + 1);
        }
        while held > holding {
            let (page, serial) = queue.pop_front().expect("held pages are queued");
            if places[page as usize] == Place::Holding(serial) {
                places[page as usize] = Place::Store;
                held -= 1;
            }
        }
    }
    outcome
}

/// Uniform; Zipf 0.99; Zipf with every fifth access of a sequential scan; 90 % of accesses in a hot set of 15 % of
/// the pages that drifts once through all of them. Popular pages lie scattered over the addresses.
fn traces() -> Vec<(&'static str, Vec<u32>)> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut scattered: Vec<u32> = (0..PAGES).collect();
    for last in (1..PAGES).rev() {
        scattered.swap(last as usize, random.below(last + 1) as usize);
    }
    let mut sum = 0.0;
    let weights: Vec<f64> = (1..=PAGES)
        .map(|rank| {
            sum += f64::from(rank).powf(-0.99);
            sum
        })
        .collect();
    let zipf = |random: &mut Random| {
        let at = f64::from(random.below(u32::MAX)) / f64::from(u32::MAX) * sum;
        scattered[weights.partition_point(|&w| w < at).min(PAGES as usize - 1)]
    };
    let mut scan = 0;
    let uniform = (0..ACCESSES).map(|_| random.below(PAGES)).collect();
    let skewed = (0..ACCESSES).map(|_| zipf(&mut random)).collect();
    let mixed = (0..ACCESSES)
        .map(|_| {
            if random.below(5) > 0 {
                return zipf(&mut random);
            }
            scan = (scan + 1) % PAGES;
            scan
        })
        .collect();
    let moving = (0..ACCESSES)
        .map(|now| {
            let start = now / (ACCESSES / PAGES);
            match random.below(10) {
                0 => random.below(PAGES),
                _ => scattered[((start + random.below(PAGES / 100 * 15)) % PAGES) as usize],
            }
        })
        .collect();
    vec![("uniform", uniform), ("zipf 0.99", skewed), ("zipf + scan", mixed), ("moving hot", moving)]
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        u32::try_from((high * u64::from(bound)) >> 32).expect("below the bound")
    }
}
