//! `xtask program kernel`: loops that fit their budget. Each prints the seconds of its loop and a check sum.
//!
//! They exist to show what management costs a program that needs none: at most 1 % is the goal.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use clap::{Args, ValueEnum};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

/// Which loop.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Integer arithmetic in registers.
    Cpu,
    /// A walk along random pointers, then a stream, over memory far larger than the caches.
    Memory,
    /// Small allocations that are made, linked and freed.
    Alloc,
}

/// Command line.
#[derive(Args)]
pub(crate) struct Options {
    /// Which loop.
    kind: Kind,
    /// Memory of the memory-bound loop, MiB.
    #[arg(long, default_value_t = 192)]
    mib: usize,
    /// How much work, in percent of about three seconds' worth.
    #[arg(long, default_value_t = 100)]
    work: u64,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let (seconds, sum) = match options.kind {
        Kind::Cpu => cpu(options.work),
        Kind::Memory => memory(options.mib, options.work),
        Kind::Alloc => alloc(options.work),
    };
    println!("{seconds:.6} {sum:016x}");
    Ok(())
}

fn cpu(work: u64) -> (f64, u64) {
    let started = Instant::now();
    let mut state = black_box(0x1234_5678_9abc_def1_u64);
    for round in 0..black_box(work * 9_000_000) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state = state.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(round);
    }
    (started.elapsed().as_secs_f64(), state)
}

fn memory(mib: usize, work: u64) -> (f64, u64) {
    // One cycle through all cache lines in random order: each step waits for the one before.
    const LINE: usize = 8;
    let lines = mib << 14;
    let mut order: Vec<u32> = (0..lines as u32).collect();
    order.shuffle(&mut SmallRng::seed_from_u64(7));
    let mut words = vec![0_u64; lines * LINE];
    for pair in order.windows(2) {
        words[pair[0] as usize * LINE] = u64::from(pair[1]);
    }
    words[order[lines - 1] as usize * LINE] = u64::from(order[0]);
    drop(order);
    let started = Instant::now();
    let (mut place, mut sum) = (0, 0_u64);
    for _ in 0..work * 100_000 {
        place = words[place * LINE] as usize;
        words[place * LINE + 1] += 1;
    }
    for _ in 0..work.div_ceil(10) {
        sum = words.iter_mut().skip(1).step_by(2).fold(sum, |sum, word| {
            *word = word.wrapping_add(3);
            sum.wrapping_add(*word)
        });
    }
    (started.elapsed().as_secs_f64(), sum.wrapping_add(place as u64))
}

fn alloc(work: u64) -> (f64, u64) {
    let started = Instant::now();
    let mut rng = SmallRng::seed_from_u64(3);
    let mut live: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let mut sum = 0_u64;
    for round in 0..work * 25_000 {
        let key = rng.random_range(0..120_000);
        if let Some(old) = live.remove(&key) {
            sum = sum.wrapping_add(old.iter().map(|byte| u64::from(*byte)).sum::<u64>());
        }
        // Some are beyond malloc's mmap threshold: mapping and unmapping is part of the cost.
        let size = if round % 4096 == 0 { 256 << 10 } else { rng.random_range(16..1200) };
        live.insert(key, vec![round as u8; size]);
    }
    (started.elapsed().as_secs_f64(), sum)
}
