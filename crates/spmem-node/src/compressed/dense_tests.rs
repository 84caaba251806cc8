//! Claims about the dense encoding and recompression: whatever goes wrong, a page is what it was or its loss is said.

use std::boxed::Box;
use std::vec::Vec;

use super::codec::{Header, Verified};
use super::dense::{Dense, DenseEncoder, DenseStage, DictionaryName, Encoding, Slot, checksum, train};
use super::densify::Kept;
use super::store::Store;
use super::{Codec, FrameBytes, HEADER_BYTES, Label};
use crate::backend::{Damage, Handle, PAGE_BYTES, Page, Stage};
use crate::conformance::page_with_noise;
use crate::testing::FirstFit;

type TestStore = Store<FirstFit, Vec<u8>>;
const SEED: u64 = 0x5eed;

fn new_store(frames: usize) -> TestStore {
    Store::new(FirstFit::new(frames), alloc::vec![0; frames * PAGE_BYTES], SEED)
}

/// A page of records that have much in common, and of which no two are equal.
fn record_page(number: u64) -> Page {
    let mut page = [0; PAGE_BYTES];
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for (index, record) in page.chunks_exact_mut(64).enumerate() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        record[..16].copy_from_slice(b"{\"city\":\"Ravenna");
        record[16..24].copy_from_slice(&(number * 64 + index as u64).to_le_bytes());
        record[24..32].copy_from_slice(&state.to_le_bytes());
        record[40..52].copy_from_slice(b"\",\"visits\":0");
    }
    page
}

fn dictionary() -> Box<[u8]> {
    let pages: Vec<Page> = (0..128).map(|number| record_page(1000 + number)).collect();
    train(&pages).expect("records have much in common")
}

/// Pages in a store, and an encoder for it; both know the dictionary as A and as B.
fn filled(pages: &[Page], frames: usize) -> (TestStore, Vec<Handle>, DenseEncoder) {
    let mut store = new_store(frames);
    let mut encoder = DenseEncoder::new(&store.codec());
    for slot in Slot::ALL {
        assert!(store.set_dictionary(slot, &dictionary()) && encoder.set_dictionary(slot, &dictionary()));
    }
    let mut workspace = store.codec().workspace();
    let handles = pages
        .iter()
        .map(|page| store.insert(&store.codec().stage(page, &mut workspace).unwrap()).unwrap())
        .collect();
    (store, handles, encoder)
}

fn densify(
    store: &mut TestStore,
    handle: Handle,
    encoder: &mut DenseEncoder,
    slot: Option<Slot>,
) -> Result<Handle, Kept> {
    let mut page = [0; PAGE_BYTES];
    let original = store.original(handle).expect("it is in the first encoding");
    assert!(original.read(&store.codec(), &mut page));
    let label = original.label;
    store.densify(handle, label, &encoder.encode(&page, slot).expect("it compresses"))
}

fn assert_holds(store: &TestStore, handle: Handle, page: &Page) {
    let (mut out, mut readback) = ([0x5a; PAGE_BYTES], [0; PAGE_BYTES]);
    store.load(handle, &mut out).unwrap();
    assert_eq!(out, *page);
    assert!(store.same_as(handle, page, &mut readback));
}

fn offset_of(store: &TestStore, handle: Handle) -> usize {
    let Some(super::handle::Place::Object { block, slot, .. }) = super::handle::Place::unpack(handle) else {
        panic!("an object")
    };
    store.slot_range(block, slot).unwrap().0
}

#[test]
fn every_byte_survives_recompression_with_and_without_a_dictionary() {
    let pages: Vec<Page> =
        (0..300).map(|i| if i % 3 == 0 { page_with_noise(i, 40) } else { record_page(i) }).collect();
    let (mut store, mut handles, mut encoder) = filled(&pages, 600);
    let before = store.stats();
    for (index, handle) in handles.iter_mut().enumerate() {
        let slot = [None, Some(Slot::A), Some(Slot::B)][index / 3 % 3];
        match densify(&mut store, *handle, &mut encoder, slot) {
            Ok(dense) => *handle = dense,
            Err(kept) => assert_eq!((kept, index % 3), (Kept::NoGain, 0), "noise may not get smaller, records do"),
        }
    }
    for (handle, page) in handles.iter().zip(&pages) {
        assert_holds(&store, *handle, page);
    }
    let after = store.stats();
    assert!(after.dense_pages >= 200 && after.object_pages == before.object_pages);
    assert!(after.payload < before.payload);
    for handle in &mut handles {
        *handle = store.relocate(*handle).unwrap().unwrap_or(*handle);
    }
    for (handle, page) in handles.iter().zip(&pages) {
        assert_holds(&store, *handle, page);
        store.remove(*handle).unwrap();
    }
    let empty = store.stats();
    assert_eq!((empty.object_pages, empty.dense_pages, empty.payload.0), (0, 0, 0));
    assert_eq!(Slot::ALL.map(|slot| store.dictionary_pages(slot)), [0, 0]);
}

#[test]
fn every_flipped_bit_of_a_dense_object_is_found() {
    let page = record_page(5);
    for slot in [None, Some(Slot::A)] {
        let (mut store, handles, mut encoder) = filled(&[page], 64);
        let handle = densify(&mut store, handles[0], &mut encoder, slot).unwrap();
        let offset = offset_of(&store, handle);
        let len = HEADER_BYTES + usize::try_from(store.stats().payload.0).unwrap();
        for bit in 0..len * 8 {
            store.memory_mut().bytes_mut(offset + bit / 8, 1)[0] ^= 1 << (bit % 8);
            let mut out = [0x5a; PAGE_BYTES];
            let damage = store.load(handle, &mut out).unwrap_err().damage;
            // The decoder is not asked.
            let is_frame = bit >= HEADER_BYTES * 8;
            assert!(!is_frame || matches!(damage, Damage::Checksum { .. }), "bit {bit}: {damage:?}");
            assert_eq!(out, [0; PAGE_BYTES], "nothing is handed out with an error");
            store.memory_mut().bytes_mut(offset + bit / 8, 1)[0] ^= 1 << (bit % 8);
        }
        assert_holds(&store, handle, &page);
    }
}

#[test]
fn what_the_check_does_not_see_the_pages_checksum_does() {
    let page = record_page(5);
    let (mut store, handles, mut encoder) = filled(&[page], 64);
    let handle = densify(&mut store, handles[0], &mut encoder, None).unwrap();
    let (codec, len) = (store.codec(), usize::try_from(store.stats().payload.0).unwrap());
    // A whole encoding of another page, as long or shorter, and what the frame has of the checksum.
    let encode = |number| encoder.encode(&record_page(number), None).unwrap().frame(&codec).unwrap().to_vec();
    let forged = (6..).map(encode).find(|forged| forged.len() <= len).unwrap();
    let offset = offset_of(&store, handle);
    let header =
        Header { length: u16::try_from(forged.len()).unwrap(), checksum: checksum(&codec, None, &page, &forged) };
    store.memory_mut().bytes_mut(offset, HEADER_BYTES).copy_from_slice(&header.to_bytes());
    store.memory_mut().bytes_mut(offset + HEADER_BYTES, forged.len()).copy_from_slice(&forged);
    let mut out = [0x5a; PAGE_BYTES];
    let damage = store.load(handle, &mut out).unwrap_err().damage;
    assert!(matches!(damage, Damage::Checksum { .. }) && out == [0; PAGE_BYTES], "{damage:?}");
}

#[test]
fn a_damaged_dictionary_gives_no_wrong_byte() {
    let pages: Vec<Page> = (0..32).map(record_page).collect();
    let (mut store, handles, mut encoder) = filled(&pages, 200);
    let handles: Vec<Handle> =
        handles.iter().map(|handle| densify(&mut store, *handle, &mut encoder, Some(Slot::A)).unwrap()).collect();
    let (mut lost, good) = (0, dictionary());
    let name = DictionaryName::of(&store.codec(), &good);
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        store.dense.set_dictionary(Slot::A, name, &bad);
        for (handle, page) in handles.iter().zip(&pages) {
            let mut out = [0x5a; PAGE_BYTES];
            match store.load(*handle, &mut out) {
                Ok(()) => assert_eq!(out, *page, "byte {at}"),
                Err(_) => {
                    assert_eq!(out, [0; PAGE_BYTES]);
                    lost += 1;
                }
            }
        }
    }
    assert!(lost > 0, "pages need the dictionary");
    assert!(store.dense.set_dictionary(Slot::A, name, &good));
    for (handle, page) in handles.iter().zip(&pages) {
        assert_holds(&store, *handle, page);
    }
}

#[test]
fn an_encoding_that_does_not_read_back_leaves_the_old_one() {
    let (page, other) = (record_page(1), record_page(2));
    let (mut store, handles, mut encoder) = filled(&[page], 64);
    let label = store.original(handles[0]).unwrap().label;
    let good = encoder.encode(&page, Some(Slot::A)).unwrap().bytes.to_vec();
    let wrong = encoder.encode(&other, None).unwrap().bytes.to_vec();
    let before = store.stats();
    for (bytes, slot) in [(&wrong, None), (&good, None), (&Vec::new(), None)] {
        let result = store.densify(handles[0], label, &Dense { bytes, slot });
        assert_eq!(result.unwrap_err(), Kept::NotReproduced);
    }
    for bit in 0..good.len() * 8 {
        let mut flipped = good.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let result = store.densify(handles[0], label, &Dense { bytes: &flipped, slot: Some(Slot::A) });
        assert_eq!(result.unwrap_err(), Kept::NotReproduced, "bit {bit}");
    }
    assert_eq!(store.stats(), before);
    assert_holds(&store, handles[0], &page);
}

#[test]
fn a_page_that_changed_meanwhile_is_not_replaced() {
    let (page, other) = (record_page(1), record_page(2));
    let (mut store, handles, mut encoder) = filled(&[page], 64);
    let label = store.original(handles[0]).unwrap().label;
    store.remove(handles[0]).unwrap();
    let bytes = encoder.encode(&page, None).unwrap().bytes.to_vec();
    let dense = Dense { bytes: &bytes, slot: None };
    assert_eq!(store.densify(handles[0], label, &dense).unwrap_err(), Kept::Changed);
    let mut workspace = store.codec().workspace();
    let taken = store.insert(&store.codec().stage(&other, &mut workspace).unwrap()).unwrap();
    assert_eq!(store.densify(taken, label, &dense).unwrap_err(), Kept::Changed);
    assert_holds(&store, taken, &other);
}

#[test]
fn a_damaged_page_keeps_its_place_and_is_not_taken_for_good() {
    let page = record_page(1);
    let (mut store, handles, mut encoder) = filled(&[page], 64);
    let label = store.original(handles[0]).unwrap().label;
    let bytes = encoder.encode(&page, None).unwrap().bytes.to_vec();
    let offset = offset_of(&store, handles[0]) + HEADER_BYTES + 20;
    store.memory_mut().bytes_mut(offset, 1)[0] ^= 4;
    let before = store.stats();
    let result = store.densify(handles[0], label, &Dense { bytes: &bytes, slot: None });
    assert!(matches!(result, Err(Kept::Corrupt(_))));
    assert_eq!(store.stats(), before);
}

#[test]
fn a_full_store_keeps_what_it_has() {
    let pages: Vec<Page> = (0..60).map(record_page).collect();
    let mut store = new_store(8);
    let mut workspace = store.codec().workspace();
    let mut handles = Vec::new();
    for page in &pages {
        match store.insert(&store.codec().stage(page, &mut workspace).unwrap()) {
            Ok(handle) => handles.push(handle),
            Err(_) => break,
        }
    }
    assert!(handles.len() < pages.len(), "it is full");
    let mut encoder = DenseEncoder::new(&store.codec());
    let mut results = Vec::new();
    for handle in &mut handles {
        let result = densify(&mut store, *handle, &mut encoder, None);
        *handle = result.unwrap_or(*handle);
        results.push(result.err());
    }
    assert!(results.contains(&Some(Kept::NoRoom)));
    for (handle, page) in handles.iter().zip(&pages) {
        assert_holds(&store, *handle, page);
    }
}

#[test]
fn a_dictionary_is_not_replaced_while_a_page_needs_it() {
    let pages = [record_page(1), record_page(2)];
    let (mut store, handles, mut encoder) = filled(&pages, 64);
    let dense = densify(&mut store, handles[0], &mut encoder, Some(Slot::A)).unwrap();
    assert_eq!(store.dictionary_pages(Slot::A), 1);
    assert!(!store.set_dictionary(Slot::A, &dictionary()));
    assert!(store.set_dictionary(Slot::B, &dictionary()));
    assert_holds(&store, dense, &pages[0]);
    store.remove(dense).unwrap();
    assert!(store.set_dictionary(Slot::A, &dictionary()));
}

#[test]
fn a_child_forked_while_a_page_was_decoded_can_decode() {
    let page = record_page(1);
    let (mut store, handles, mut encoder) = filled(&[page], 64);
    let dense = densify(&mut store, handles[0], &mut encoder, Some(Slot::B)).unwrap();
    store.dense.lose_context();
    let mut out = [0x5a; PAGE_BYTES];
    assert!(store.load(dense, &mut out).is_err() && out == [0; PAGE_BYTES], "a refusal, not a wrong page");
    assert!(store.settle_after_fork());
    assert_holds(&store, dense, &page);
}

#[test]
fn a_child_without_memory_for_a_decoder_is_told_before_it_loses_a_page() {
    let page = record_page(1);
    let (mut store, handles, mut encoder) = filled(&[page, record_page(2)], 64);
    assert!(store.settle_with(|| None), "nothing needs one");
    assert_holds(&store, handles[1], &record_page(2));
    assert!(store.prepare_dense(), "there is memory later");
    let dense = densify(&mut store, handles[0], &mut encoder, Some(Slot::B)).unwrap();
    assert!(!store.settle_with(|| None));
    assert!(store.insert(&DenseStage::new(&Codec::new(SEED)).unwrap().stage(&page, None).unwrap()).is_err());
    assert!(store.prepare_dense());
    assert_holds(&store, dense, &page);
}

#[test]
fn an_encoder_of_another_seed_is_refused() {
    let page = record_page(1);
    let (mut store, handles, _) = filled(&[page], 64);
    let mut foreign = DenseEncoder::new(&Codec::new(SEED + 1));
    assert_eq!(densify(&mut store, handles[0], &mut foreign, None).unwrap_err(), Kept::NotReproduced);
    assert_holds(&store, handles[0], &page);
}

#[test]
fn every_byte_of_a_page_that_comes_densely_survives_with_and_without_a_dictionary() {
    let mut store = new_store(600);
    let mut stage = DenseStage::new(&store.codec()).expect("memory");
    stage.set_dictionary(&dictionary());
    let name = DictionaryName::of(&store.codec(), &dictionary());
    assert_eq!(stage.dictionary(), Some(name));
    assert!(store.set_dictionary(Slot::B, &dictionary()) && store.has_dictionary(Slot::B, name));
    assert_eq!(store.newest_dictionary(), Some((Slot::B, name)));
    let pages: Vec<Page> =
        (0..300).map(|i| if i % 3 == 0 { page_with_noise(i, 40) } else { record_page(i) }).collect();
    let mut handles = Vec::new();
    for (index, page) in pages.iter().enumerate() {
        let slot = if index % 2 == 0 { Some(Slot::B) } else { None };
        let staged = stage.stage(page, slot).expect("it compresses");
        // As it comes from another process.
        let (label, bytes) = staged.to_parcel();
        assert_eq!(label.encoding, Encoding::Dense { slot, is_anew: false });
        let dictionary = Some(name);
        let parcel = Verified::from_parcel(&store.codec(), label, dictionary, bytes, page).expect("of that page");
        assert!(Verified::from_parcel(&store.codec(), label, dictionary, bytes, &record_page(9999)).is_none());
        handles.push(store.insert(&parcel).expect("there is room"));
    }
    let stats = store.stats();
    assert_eq!((stats.dense_pages, stats.anew_pages, store.dictionary_pages(Slot::B)), (300, 0, 150));
    assert!(!store.set_dictionary(Slot::B, &dictionary()), "pages need it");
    for (handle, page) in handles.iter().zip(&pages) {
        assert_holds(&store, *handle, page);
        assert!(TestStore::is_dense(*handle) && !TestStore::is_anew(*handle) && store.original(*handle).is_none());
        store.remove(*handle).unwrap();
    }
    assert_eq!((store.stats().dense_pages, store.dictionary_pages(Slot::B)), (0, 0));
}

#[test]
fn a_store_takes_nothing_that_it_could_not_read() {
    let page = record_page(1);
    let mut store = new_store(16);
    let mut stage = DenseStage::new(&store.codec()).expect("memory");
    stage.set_dictionary(&dictionary());
    assert!(store.insert(&stage.stage(&page, None).unwrap()).is_err(), "there is no decoder");
    assert!(store.prepare_dense());
    assert!(store.insert(&stage.stage(&page, Some(Slot::A)).unwrap()).is_err(), "there is no dictionary");
    let handle = store.insert(&stage.stage(&page, None).unwrap()).unwrap();
    assert_holds(&store, handle, &page);
    // Another dictionary in the place of the one that was offered has another name.
    assert!(store.set_dictionary(Slot::A, &dictionary()));
    let offered = store.newest_dictionary().expect("set a moment ago");
    assert!(store.set_dictionary(Slot::A, &dictionary()[..1024]));
    assert!(!store.has_dictionary(offered.0, offered.1) && !store.has_dictionary(Slot::B, offered.1));
    assert!(store.insert(&stage.stage(&page, Some(Slot::A)).unwrap()).is_err(), "the slot has another dictionary");
    assert_eq!(store.dictionary_pages(Slot::A), 0);
}

#[test]
fn what_zstd_makes_too_little_of_is_not_staged_densely() {
    let mut stage = DenseStage::new(&Codec::new(SEED)).expect("memory");
    assert!(stage.stage(&page_with_noise(3, 256), None).is_none());
    assert!(stage.stage(&record_page(3), Some(Slot::A)).is_none(), "it has no dictionary");
}

#[test]
fn a_page_under_one_dictionary_is_not_taken_for_one_under_another() {
    let (codec, page) = (Codec::new(SEED), record_page(1));
    let mut stage = DenseStage::new(&codec).expect("memory");
    stage.set_dictionary(&dictionary());
    let (name, other) = (stage.dictionary(), DictionaryName::of(&codec, &dictionary()[..1024]));
    for own in [None, Some(Slot::A)] {
        let (label, bytes) = stage.stage(&page, own).expect("it compresses").to_parcel();
        let take = |slot, dictionary| {
            let label = Label { encoding: Encoding::Dense { slot, is_anew: false }, ..label };
            Verified::from_parcel(&codec, label, dictionary, bytes, &page).is_some()
        };
        assert_eq!((take(None, name), take(Some(Slot::A), name)), (own.is_none(), own.is_some()));
        assert!(!take(Some(Slot::A), Some(other)) && !take(Some(Slot::A), None));
    }
}

#[test]
fn where_another_dictionary_came_into_the_slot_pages_are_lost_and_the_decoder_is_not_asked() {
    let page = record_page(1);
    let (mut store, handles, mut encoder) = filled(&[page], 200);
    let handle = densify(&mut store, handles[0], &mut encoder, Some(Slot::A)).unwrap();
    let name = DictionaryName::of(&store.codec(), &dictionary()[..1024]);
    assert!(store.dense.set_dictionary(Slot::A, name, &dictionary()[..1024]));
    let mut out = [0x5a; PAGE_BYTES];
    let damage = store.load(handle, &mut out).unwrap_err().damage;
    assert!(matches!(damage, Damage::Checksum { .. }) && out == [0; PAGE_BYTES], "{damage:?}");
}

#[test]
fn a_dictionary_that_zstd_refuses_is_not_the_newest_one() {
    let mut store = new_store(16);
    assert!(store.set_dictionary(Slot::A, &dictionary()));
    let first = store.newest_dictionary();
    // zstd's magic, and nothing that it could be a dictionary by.
    let mut refused = [0xff; 64];
    refused[..4].copy_from_slice(&0xec30_a437_u32.to_le_bytes());
    assert!(!store.set_dictionary(Slot::B, &refused));
    assert_eq!(store.newest_dictionary(), first);
    assert!(!store.set_dictionary(Slot::A, &refused));
    assert_eq!(store.newest_dictionary(), None, "what was there is gone");
}

#[test]
fn pages_that_were_encoded_anew_are_counted_until_they_go() {
    let (mut store, handles, mut encoder) = filled(&[record_page(1), record_page(2)], 200);
    let anew = [0, 1].map(|at| densify(&mut store, handles[at], &mut encoder, None).unwrap());
    assert_eq!(store.stats().anew_pages, 2);
    for (left, handle) in [1, 0].into_iter().zip(anew) {
        store.remove(handle).unwrap();
        assert_eq!(store.stats().anew_pages, left);
    }
}
