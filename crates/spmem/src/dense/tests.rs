//! Claims about the densifier and its lane.

extern crate std;
use super::*;
use crate::workshop::tests::{HeapStore, common, new_store, record_page};
use crate::{encoder, workshop};
use alloc::vec::Vec;
use spmem_node::Stage;

fn store_all(store: &mut HeapStore, pages: &[Page]) -> Vec<Handle> {
    let codec = store.codec();
    let mut workspace = codec.workspace();
    let stored = pages.iter().map(|page| store.insert(&codec.stage(page, &mut workspace).expect("it compresses")));
    stored.map(|handle| handle.expect("there is room")).collect()
}

/// One batch through the lane, as the densifier posts and takes it; the new handles.
fn pass(lane: &DenseLane, store: &mut HeapStore, handles: &mut [Handle]) {
    let mut labels = Vec::new();
    for (index, handle) in handles.iter().enumerate() {
        let original = store.original(*handle).expect("lz4");
        put(&lane.bytes[index], original.bytes);
        lane.items[index].send(original.label);
        labels.push(original.label);
    }
    lane.count.store(handles.len() as u32, Relaxed);
    lane.state.store(POSTED, Ordering::Release);
    lane.posted.signal();
    while lane.state.load(Ordering::Acquire) != DONE {
        std::thread::sleep(core::time::Duration::from_micros(100));
    }
    let mut bytes = [0; PAGE];
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
fn pages_come_back_denser_with_and_without_a_dictionary() {
    let (exchange, mut store) = (encoder::tests::exchange(), new_store(2048));
    let is_over: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
    let workshop: &'static Workshop = Box::leak(Box::new(Workshop::new()));
    let codec = store.codec();
    let server = std::thread::spawn(move || serve(exchange, workshop, codec, is_over));
    let learner = std::thread::spawn(move || workshop::learn(exchange, workshop, codec, common, is_over));
    let pages: Vec<Page> = (0..320).map(record_page).collect();
    let mut handles = store_all(&mut store, &pages);
    let (before, after) = handles.split_at_mut(160);
    for batch in before.chunks_mut(DENSE_PAGES) {
        pass(&exchange.dense, &mut store, batch);
    }
    assert_eq!(store.stats().anew_pages, 160);
    let slot = workshop::tests::learn_one(exchange, workshop, &mut store);
    for batch in after.chunks_mut(DENSE_PAGES) {
        pass(&exchange.dense, &mut store, batch);
    }
    assert_eq!(store.dictionary_pages(slot), 160);
    let mut found = [0; PAGE];
    for (handle, page) in handles.iter().zip(&pages) {
        store.load(*handle, &mut found).expect("whole");
        assert_eq!(found, *page);
    }
    assert_eq!((store.stats().dense_pages, store.stats().anew_pages), (320, 320));
    is_over.store(true, Relaxed);
    exchange.wake();
    workshop.wake();
    server.join().expect("the thread ends when told to");
    learner.join().expect("the thread ends when told to");
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
    Maker::new(store.codec()).work(lane, &Workshop::new(), &AtomicBool::new(false));
    assert!(lane.items.iter().all(|item| item.kind.load(Relaxed) == NONE));
}

#[test]
fn the_dictionary_that_is_recommended_is_used_and_the_first_page_of_a_batch_is_learnt_from() {
    let (exchange, workshop) = (encoder::tests::exchange(), Workshop::new());
    let (lane, pages) = (&exchange.dense, [record_page(1), record_page(2)]);
    let codec = new_store(1).codec();
    let mut maker = Maker::new(codec);
    for dictionary in [None, Some((Slot::B, 512)), Some((Slot::A, 1024))] {
        let mut store = new_store(64);
        if let Some((slot, len)) = dictionary {
            workshop.set(&codec, slot, &pages[0][..len]);
            assert!(store.set_dictionary(slot, &pages[0][..len]));
        }
        let handles = store_all(&mut store, &pages);
        for (index, handle) in handles.iter().enumerate() {
            let original = store.original(*handle).expect("lz4");
            put(&lane.bytes[index], original.bytes);
            lane.items[index].send(original.label);
        }
        lane.count.store(2, Relaxed);
        maker.work(lane, &workshop, &AtomicBool::new(false));
        assert_eq!(workshop.take_samples(), [pages[0]]);
        let (slot, mut bytes) = (dictionary.map(|(slot, _)| slot), [0; PAGE]);
        let kind = slot.map_or(PLAIN, |slot| WITH[usize::from(slot == Slot::B)]);
        assert_eq!(lane.items[1].kind.load(Relaxed), kind);
        let len = lane.items[1].len.load(Relaxed) as usize;
        get(&lane.bytes[1], &mut bytes, len);
        let label = store.original(handles[1]).expect("lz4").label;
        store.densify(handles[1], label, &Dense { bytes: &bytes[..len], slot }).expect("of this dictionary");
    }
}
