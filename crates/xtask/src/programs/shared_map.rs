//! `xtask program shared-map`: threads that insert, read and change text in one shared hash map.
//!
//! What the threads do to an entry commutes, so the digest over the map in the end is the same in every run,
//! whatever the order was. Each read is checked against the entry's own check sum.

use std::collections::HashMap;
use std::sync::Mutex;

use anyhow::{Context, ensure};
use clap::Args;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use sha2::{Digest, Sha256};

use crate::launch::hexadecimal;
use crate::programs::values;

/// Locks of the map, one a part.
const SHARDS: usize = 64;

/// Command line.
#[derive(Args)]
pub(crate) struct Options {
    /// Threads.
    #[arg(long, default_value_t = 4)]
    threads: u64,
    /// Keys.
    #[arg(long, default_value_t = 200_000)]
    keys: u32,
    /// Operations of each thread.
    #[arg(long, default_value_t = 300_000)]
    operations: u64,
}

struct Entry {
    text: Vec<u8>,
    check: u64,
    hits: u64,
}

type Shards = Vec<Mutex<HashMap<u32, Entry>>>;

/// Runs it: prints one digest.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let shards: Shards = (0..SHARDS).map(|_| Mutex::default()).collect();
    let results: Vec<anyhow::Result<()>> = std::thread::scope(|scope| {
        let shards = &shards;
        let handles: Vec<_> =
            (0..options.threads).map(|thread| scope.spawn(move || work(thread, options, shards))).collect();
        handles.into_iter().map(|handle| handle.join().expect("a worker does not panic")).collect()
    });
    results.into_iter().collect::<anyhow::Result<()>>()?;
    let mut digest = Sha256::new();
    for key in 0..options.keys {
        let shard = lock(&shards, key)?;
        let entry = shard.get(&key).with_context(|| format!("key {key} is lost"))?;
        ensure!(check_sum(&entry.text) == entry.check, "key {key} has wrong bytes");
        digest.update(entry.hits.to_le_bytes());
        digest.update(&entry.text);
    }
    println!("{}", hexadecimal(&digest.finalize()));
    Ok(())
}

fn work(thread: u64, options: &Options, shards: &Shards) -> anyhow::Result<()> {
    let mut text = Vec::new();
    let mut make = |key| {
        text.clear();
        values::write_value(key, 0, &mut text);
        Entry { check: check_sum(&text), text: text.clone(), hits: 0 }
    };
    for key in (thread as u32..options.keys).step_by(options.threads as usize) {
        lock(shards, key)?.entry(key).or_insert_with(|| make(key));
    }
    let mut rng = SmallRng::seed_from_u64(thread);
    for _ in 0..options.operations {
        let (key, step) = (rng.random_range(0..options.keys), rng.random_range(1..100));
        let mut shard = lock(shards, key)?;
        // Not there yet: another thread is still filling, and every hit must count.
        let entry = shard.entry(key).or_insert_with(|| make(key));
        ensure!(check_sum(&entry.text) == entry.check, "key {key} has wrong bytes");
        entry.hits += step;
    }
    Ok(())
}

fn lock(shards: &Shards, key: u32) -> anyhow::Result<std::sync::MutexGuard<'_, HashMap<u32, Entry>>> {
    shards[key as usize % SHARDS].lock().ok().context("a worker panicked with the lock held")
}

fn check_sum(text: &[u8]) -> u64 {
    text.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
