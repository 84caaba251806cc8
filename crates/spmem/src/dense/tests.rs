//! Claims about the densifier and its lane.

extern crate std;
use super::*;
use crate::encoder;
use spmem_core::frames::Metadata;
use spmem_core::units::FrameCount;
use spmem_node::Stage;
use spmem_node::compressed::{GrantedFrames, Store};

type HeapStore = Store<GrantedFrames, Vec<u8>>;

fn new_store(frames: usize) -> HeapStore {
    let capacity = FrameCount(frames as u64);
    let granted = GrantedFrames::embedded(capacity, Metadata::from_heap(capacity).expect("memory"));
    Store::new(granted.expect("the embedded machine"), alloc::vec![0; frames * PAGE], 5)
}

fn record_page(number: u64) -> Page {
    let mut page = [0; PAGE];
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for record in page.chunks_exact_mut(64) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        record[..16].copy_from_slice(b"{\"city\":\"Ravenna");
        record[24..32].copy_from_slice(&state.to_le_bytes());
        record[40..52].copy_from_slice(b"\",\"visits\":0");
    }
    page
}

/// Stands in for zstd's: the records' common part, which zstd takes as raw content.
fn common(pages: &[Page]) -> Option<Box<[u8]>> {
    pages.first().map(|page| page[..512].into())
}

fn store_all(store: &mut HeapStore, pages: &[Page]) -> Vec<Handle> {
    let codec = store.codec();
    let mut workspace = codec.workspace();
    let stored = pages.iter().map(|page| store.insert(&codec.stage(page, &mut workspace).expect("it compresses")));
    stored.map(|handle| handle.expect("there is room")).collect()
}

/// One batch through the lane, as the densifier posts and takes it; the new handles.
fn pass(lane: &DenseLane, store: &mut HeapStore, handles: &mut [Handle], number: &mut u32) {
    let mut labels = Vec::new();
    for (index, handle) in handles.iter().enumerate() {
        let original = store.original(*handle).expect("lz4");
        put(&lane.bytes[index], original.bytes);
        lane.items[index].send(original.label);
        labels.push(original.label);
    }
    let in_use = Slot::ALL.into_iter().filter(|&slot| store.dictionary_pages(slot) > 0).map(bit_of);
    lane.slots_in_use.store(in_use.sum(), Relaxed);
    lane.count.store(handles.len() as u32, Relaxed);
    lane.state.store(POSTED, Ordering::Release);
    lane.posted.signal();
    while lane.state.load(Ordering::Acquire) != DONE {
        std::thread::sleep(core::time::Duration::from_micros(100));
    }
    let mut bytes = [0; PAGE];
    if lane.number.load(Relaxed) != *number {
        *number = lane.number.load(Relaxed);
        let len = lane.dictionary_len.load(Relaxed) as usize;
        get(&lane.dictionary, &mut bytes, len);
        assert!(store.set_dictionary(slot_of(*number), &bytes[..len]));
    }
    for (index, handle) in handles.iter_mut().enumerate() {
        let (kind, len) = (lane.items[index].kind.load(Relaxed), lane.items[index].len.load(Relaxed) as usize);
        get(&lane.bytes[index], &mut bytes, len);
        let slot = Slot::ALL.into_iter().find(|&slot| kind == WITH[usize::from(slot == Slot::B)]);
        assert!(kind == PLAIN || slot.is_some(), "records compress");
        let dense = Dense { bytes: &bytes[..len], slot };
        *handle = store.densify(*handle, labels[index], &dense).expect("it is smaller and reads back");
    }
}

#[test]
fn pages_come_back_denser_and_a_dictionary_is_made_on_the_way() {
    let (exchange, mut store) = (encoder::tests::exchange(), new_store(2048));
    let is_over: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
    let codec = store.codec();
    let server = std::thread::spawn(move || serve(exchange, codec, common, is_over));
    let pages: Vec<Page> = (0..320).map(record_page).collect();
    let mut handles = store_all(&mut store, &pages);
    let mut number = 0;
    for batch in handles.chunks_mut(DENSE_PAGES) {
        pass(&exchange.dense, &mut store, batch, &mut number);
    }
    let mut found = [0; PAGE];
    for (handle, page) in handles.iter().zip(&pages) {
        store.load(*handle, &mut found).expect("whole");
        assert_eq!(found, *page);
    }
    assert_eq!(store.stats().dense_pages, 320);
    assert!(number == 1 && store.dictionary_pages(Slot::B) > 0, "number {number}");
    is_over.store(true, Relaxed);
    exchange.wake();
    server.join().expect("the thread ends when told to");
}

#[test]
fn what_is_sent_damaged_is_left_alone() {
    let (exchange, mut store) = (encoder::tests::exchange(), new_store(64));
    let lane = &exchange.dense;
    let handles = store_all(&mut store, &[record_page(1), record_page(2)]);
    for (index, handle) in handles.iter().enumerate() {
        let original = store.original(*handle).expect("lz4");
        put(&lane.bytes[index], original.bytes);
        lane.items[index].send(original.label);
    }
    lane.bytes[0][10].fetch_xor(1 << 20, Relaxed);
    lane.items[1].len.store(u32::MAX, Relaxed);
    lane.count.store(u32::MAX, Relaxed);
    Maker::new(store.codec(), common).work(lane, &AtomicBool::new(false));
    assert!(lane.items.iter().all(|item| item.kind.load(Relaxed) == NONE));
}
