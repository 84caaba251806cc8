//! What the compressed store costs a page, next to lz4 alone. Wall time: on a busy machine compare
//! the columns with each other, not with other runs.
//!
//! ```text
//! cargo run --release -p spmem-node --example speed
//! ```

mod samples;

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use samples::collect_samples;
use spmem_core::frames::Metadata;
use spmem_core::units::FrameCount;
use spmem_node::compressed::{Codec, Encoded, GrantedFrames, Scratch, Store};
use spmem_node::{Handle, PAGE_BYTES, Page, Stage};

const PAGES_OF_A_KIND: usize = 2048;
const ROUNDS: usize = 7;

fn main() -> Result<(), Box<dyn Error>> {
    println!("microseconds a page, median of {ROUNDS} rounds; pages that do not compress left out");
    println!(
        "{:<10} {:>6} {:>6} | {:>8} {:>7} {:>7} | {:>6} {:>6} {:>6} {:>8} | {:>7} {:>7}",
        "data",
        "pages",
        "ratio",
        "lz4 enc",
        "encode",
        "stage",
        "lz4 dec",
        "load",
        "same",
        "not same",
        "insert",
        "remove"
    );
    for sample in collect_samples(PAGES_OF_A_KIND) {
        measure(sample.name, &sample.pages)?;
    }
    Ok(())
}

/// Seconds of one round, per step.
#[derive(Default)]
struct Rounds {
    lz4_encode: Vec<f64>,
    encode: Vec<f64>,
    stage: Vec<f64>,
    lz4_decode: Vec<f64>,
    load: Vec<f64>,
    same: Vec<f64>,
    not_same: Vec<f64>,
    insert: Vec<f64>,
    remove: Vec<f64>,
}

fn measure(name: &str, pages: &[Page]) -> Result<(), Box<dyn Error>> {
    let codec = Codec::new(0x5eed);
    let mut scratch = Scratch::new();
    let mut encoded = Vec::new();
    let mut kept = Vec::new();
    for page in pages {
        if let Encoded::Compressed { bytes, .. } = codec.encode(page, &mut scratch) {
            encoded.push(bytes.to_vec());
            kept.push(*page);
        }
    }
    let frames = kept.len() + 1024;
    let capacity = FrameCount(frames as u64);
    let mut store = Store::new(
        GrantedFrames::embedded(capacity, Metadata::from_heap(capacity)?)?,
        vec![0; frames * PAGE_BYTES],
        0x5eed,
    );
    let mut rounds = Rounds::default();
    for _ in 0..ROUNDS {
        time_codec(&mut rounds, codec, &kept, &encoded);
        time_store(&mut rounds, &mut store, &kept)?;
    }
    report(name, &encoded, &mut rounds);
    Ok(())
}

fn time_codec(rounds: &mut Rounds, codec: Codec, pages: &[Page], encoded: &[Vec<u8>]) {
    let mut table = CompressTable::small();
    let mut out = vec![0; get_maximum_output_size(PAGE_BYTES)];
    let mut scratch = Scratch::new();
    let mut workspace = codec.workspace();
    let mut back = [0; PAGE_BYTES];
    rounds.lz4_encode.push(seconds(|| {
        for page in pages {
            let _ = black_box(compress_into_with_table(page, &mut out, &mut table));
        }
    }));
    rounds.encode.push(seconds(|| {
        for page in pages {
            black_box(codec.encode(page, &mut scratch));
        }
    }));
    rounds.stage.push(seconds(|| {
        for page in pages {
            let _ = black_box(codec.stage(page, &mut workspace));
        }
    }));
    rounds.lz4_decode.push(seconds(|| {
        for bytes in encoded {
            let _ = black_box(decompress_into(bytes, &mut back));
        }
    }));
}

/// Inserts all pages, loads and compares them, and removes them in another order.
fn time_store(
    rounds: &mut Rounds,
    store: &mut Store<GrantedFrames, Vec<u8>>,
    pages: &[Page],
) -> Result<(), Box<dyn Error>> {
    let codec = store.codec();
    let mut workspace = codec.workspace();
    let mut handles: Vec<Handle> = Vec::with_capacity(pages.len());
    let mut insert = 0.0;
    for page in pages {
        let staged = codec.stage(page, &mut workspace)?;
        let begin = Instant::now();
        let handle = store.insert(&staged);
        insert += begin.elapsed().as_secs_f64();
        handles.push(handle?);
    }
    rounds.insert.push(insert);
    let mut back = [0; PAGE_BYTES];
    rounds.load.push(seconds(|| {
        for handle in &handles {
            let _ = black_box(store.load(*handle, &mut back));
        }
    }));
    rounds.same.push(seconds(|| {
        for (handle, page) in handles.iter().zip(pages) {
            assert!(store.same_as(*handle, page, &mut back), "stored pages are what they were");
        }
    }));
    rounds.not_same.push(seconds(|| {
        for (handle, page) in handles.iter().zip(pages.iter().skip(1)) {
            black_box(store.same_as(*handle, page, &mut back));
        }
    }));
    let stride = 769;
    rounds.remove.push(seconds(|| {
        for first in 0..stride {
            for handle in handles.iter().skip(first).step_by(stride) {
                let _ = black_box(store.remove(*handle));
            }
        }
    }));
    Ok(())
}

fn seconds(work: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    work();
    begin.elapsed().as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "times for people")]
fn report(name: &str, encoded: &[Vec<u8>], rounds: &mut Rounds) {
    let pages = encoded.len() as f64;
    let payload: usize = encoded.iter().map(Vec::len).sum();
    let us = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2] * 1e6 / pages
    };
    println!(
        "{name:<10} {:>6} {:>6.2} | {:>8.2} {:>7.2} {:>7.2} | {:>6.2} {:>6.2} {:>6.2} {:>8.2} | {:>7.3} {:>7.3}",
        encoded.len(),
        pages * PAGE_BYTES as f64 / payload as f64,
        us(&mut rounds.lz4_encode),
        us(&mut rounds.encode),
        us(&mut rounds.stage),
        us(&mut rounds.lz4_decode),
        us(&mut rounds.load),
        us(&mut rounds.same),
        us(&mut rounds.not_same),
        us(&mut rounds.insert),
        us(&mut rounds.remove),
    );
}
