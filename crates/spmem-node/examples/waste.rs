//! Where the compressed store's bytes go, on realistic pages: after a fill, once all are recompressed as cold pages are, and
//! after half of the pages were replaced in random order; and what relocating gives back.
//!
//! ```text
//! cargo run --release -p spmem-node --example waste [PAGES_OF_A_KIND]
//! cargo run --release -p spmem-node --example waste NAME.pages...   # as `cargo xtask bench density --keep` writes them
//! ```

mod samples;

use std::error::Error;
use std::path::Path;

use samples::{Random, Sample, collect_samples};
use spmem_core::frames::Metadata;
use spmem_core::units::{Bytes, FrameCount};
use spmem_node::compressed::{DenseEncoder, GrantedFrames, Slot, Stats, Store, train};
use spmem_node::{Handle, PAGE_BYTES, Page, Stage};

const PAGES_OF_A_KIND: usize = 4096;
/// Pages that a dictionary is made of.
const SAMPLE_PAGES: usize = 128;

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
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument.ends_with(".pages")) {
        for path in &arguments {
            let bytes = std::fs::read(path)?;
            let name = Path::new(path).file_stem().and_then(|stem| stem.to_str()).unwrap_or(path);
            measure(name, bytes.as_chunks().0)?;
        }
        return Ok(());
    }
    let pages = arguments.first().map_or(Ok(PAGES_OF_A_KIND), |pages| pages.parse())?;
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
    densify(&mut store, pages, &mut handles);
    report("  recompressed", refused, &store.stats());
    relocate(&mut store, &mut handles)?;
    report("  and relocated", refused, &store.stats());

    let mut random = Random(5);
    let churn = handles.len() / 2;
    for _ in 0..churn {
        let at = usize::try_from(random.below(handles.len() as u64))?;
        store.remove(handles.swap_remove(at))?;
    }
    report("  half removed", refused, &store.stats());
    relocate(&mut store, &mut handles)?;
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
    relocate(&mut store, &mut handles)?;
    report("  and relocated", refused, &store.stats());
    Ok(())
}

fn relocate(store: &mut HeapStore, handles: &mut [Handle]) -> Result<(), Box<dyn Error>> {
    for handle in handles {
        *handle = store.relocate(*handle)?.unwrap_or(*handle);
    }
    Ok(())
}

/// Recompresses what it can, with a dictionary where that makes a page smaller.
fn densify(store: &mut HeapStore, pages: &[Page], handles: &mut [Handle]) {
    let codec = store.codec();
    let mut encoder = DenseEncoder::new(&codec);
    let stride = (pages.len() / SAMPLE_PAGES).max(1);
    let samples: Vec<Page> = pages.iter().step_by(stride).copied().collect();
    let has_dictionary = train(&samples).is_some_and(|dictionary| {
        store.set_dictionary(Slot::A, &dictionary) && encoder.set_dictionary(Slot::A, &dictionary)
    });
    let mut page = [0; PAGE_BYTES];
    for handle in handles {
        let Some(original) = store.original(*handle) else { continue };
        let label = original.label;
        assert!(original.read(&codec, &mut page), "what is stored reads back");
        let mut bytes = |slot| encoder.encode(&page, slot).map_or(PAGE_BYTES, |dense| dense.bytes.len());
        let slot = (has_dictionary && bytes(Some(Slot::A)) < bytes(None)).then_some(Slot::A);
        if let Some(dense) = encoder.encode(&page, slot)
            && let Ok(new) = store.densify(*handle, label, &dense)
        {
            *handle = new;
        }
    }
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
