//! Where the compressed store's bytes go, on realistic pages: after a fill, and after half of the
//! pages were replaced in random order; and what relocating gives back.
//!
//! ```text
//! cargo run --release -p spmem-node --example waste [PAGES_OF_A_KIND]
//! ```

mod samples;

use std::error::Error;

use samples::{Random, Sample, collect_samples};
use spmem_core::frames::Metadata;
use spmem_core::units::{Bytes, FrameCount};
use spmem_node::compressed::{GrantedFrames, Stats, Store};
use spmem_node::{Handle, PAGE_BYTES, Page, Stage};

const PAGES_OF_A_KIND: usize = 4096;

type HeapStore = Store<GrantedFrames, Vec<u8>>;

fn main() -> Result<(), Box<dyn Error>> {
    println!("percent of payload bytes; 'ratio' is pages stored / frames used, metadata included");
    println!(
        "{:<22} {:>6} {:>6} {:>6} {:>8} {:>8} {:>6} {:>6} {:>9} {:>6} {:>5} {:>6} {:>7}",
        "data",
        "pages",
        "same",
        "refus.",
        "payload",
        "rounding",
        "tail",
        "header",
        "free slot",
        "spare",
        "meta",
        "total",
        "ratio"
    );
    let pages = std::env::args().nth(1).map_or(Ok(PAGES_OF_A_KIND), |pages| pages.parse())?;
    let samples = collect_samples(pages);
    for sample in &samples {
        measure(sample.name, &sample.pages)?;
    }
    let mut mixed: Vec<Page> = samples.iter().flat_map(|Sample { pages, .. }| pages).copied().collect();
    let mut random = Random(9);
    for i in (1..mixed.len()).rev() {
        mixed.swap(i, usize::try_from(random.below(i as u64 + 1))?);
    }
    measure("all, mixed", &mixed)
}

fn measure(name: &str, pages: &[Page]) -> Result<(), Box<dyn Error>> {
    let frames = pages.len() + 1024;
    let capacity = FrameCount(frames as u64);
    let granted = GrantedFrames::embedded(capacity, Metadata::from_heap(capacity)?)?;
    let mut store = Store::new(granted, vec![0; frames * PAGE_BYTES], 0x5eed);
    let mut handles = Vec::new();
    for page in pages {
        handles.extend(put(&mut store, page)?);
    }
    let refused = pages.len() - handles.len();
    report(name, refused, &store.stats());

    let mut random = Random(5);
    let churn = handles.len() / 2;
    for _ in 0..churn {
        let at = usize::try_from(random.below(handles.len() as u64))?;
        store.remove(handles.swap_remove(at))?;
    }
    report("  half removed", refused, &store.stats());
    for handle in &mut handles {
        *handle = store.relocate(*handle)?.unwrap_or(*handle);
    }
    report("  and relocated", refused, &store.stats());
    while handles.len() < 2 * churn {
        let at = usize::try_from(random.below(pages.len() as u64))?;
        handles.extend(put(&mut store, &pages[at])?);
    }
    report("  and filled again", refused, &store.stats());

    for _ in 0..4 * churn {
        let at = usize::try_from(random.below(handles.len() as u64))?;
        store.remove(handles.swap_remove(at))?;
        while handles.len() < 2 * churn {
            let at = usize::try_from(random.below(pages.len() as u64))?;
            handles.extend(put(&mut store, &pages[at])?);
        }
    }
    report("  replaced twice over", refused, &store.stats());
    for handle in &mut handles {
        *handle = store.relocate(*handle)?.unwrap_or(*handle);
    }
    report("  and relocated", refused, &store.stats());
    Ok(())
}

fn put(store: &mut HeapStore, page: &Page) -> Result<Option<Handle>, Box<dyn Error>> {
    let codec = store.codec();
    let mut workspace = codec.workspace();
    let Ok(verified) = codec.stage(page, &mut workspace) else { return Ok(None) };
    Ok(Some(store.insert(&verified)?))
}

#[expect(clippy::cast_precision_loss, reason = "percentages for people")]
fn report(name: &str, refused: usize, s: &Stats) {
    let percent = |part: Bytes| part.0 as f64 * 100.0 / s.payload.0 as f64;
    println!(
        "{name:<22} {:>6} {:>6} {refused:>6} {:>6}Ki {:>8.2} {:>6.2} {:>6.2} {:>9.2} {:>6.2} {:>5.2} {:>6.2} {:>7.2}",
        s.object_pages,
        s.same_filled_pages,
        s.payload.0 >> 10,
        percent(s.rounding),
        percent(s.tail),
        percent(s.header),
        percent(s.free_slot),
        percent(s.spare),
        percent(s.metadata),
        percent(Bytes(s.frames_used.bytes().0 + s.metadata.0)) - 100.0,
        s.stored().0 as f64 / (s.frames_used.bytes().0 + s.metadata.0) as f64,
    );
}
