//! Claims about the compressed store: against a model, when full, and when its memory is damaged.

use std::boxed::Box;
use std::collections::HashMap;
use std::vec::Vec;

use proptest::prelude::*;

use super::class::{CLASSES, class_for, is_fine};
use super::store::Store;
use super::{Codec, Encoded, FrameBytes, HEADER_BYTES, MAX_PAYLOAD_BYTES, Scratch};
use crate::backend::{Damage, Full, Handle, PAGE_BYTES, Page, Stage, Unfit};
use crate::conformance::{conformance, page_with_noise};
use crate::testing::FirstFit;

type TestStore = Store<FirstFit, Vec<u8>>;

fn new_store(frames: usize) -> TestStore {
    Store::new(FirstFit::new(frames), alloc::vec![0; frames * PAGE_BYTES], 0x5eed)
}

conformance!(compressed, super::new_store);

fn put(store: &mut TestStore, page: &Page) -> Result<Handle, Full> {
    let mut workspace = store.codec().workspace();
    let verified = store.codec().stage(page, &mut workspace).unwrap();
    store.insert(&verified)
}

fn get(store: &TestStore, handle: Handle) -> Result<Box<Page>, Damage> {
    let mut page = Box::new([0x5a; PAGE_BYTES]);
    match store.load(handle, &mut page) {
        Ok(()) => Ok(page),
        Err(corrupt) => {
            assert_eq!(*page, [0; PAGE_BYTES], "nothing is handed out with an error");
            assert_eq!(corrupt.handle, handle);
            Err(corrupt.damage)
        }
    }
}

/// The names of `Stats` add up to the frames, and those are the ones the source gave.
fn assert_adds_up(store: &TestStore) {
    let s = store.stats();
    let named = s.payload.0 + s.header.0 + s.rounding.0 + s.tail.0 + s.free_slot.0 + s.spare.0;
    assert_eq!(named, s.frames_used.bytes().0, "{s:?}");
    assert_eq!(s.frames_used.0, store.frames().used() as u64);
    assert_eq!(s.header.0, s.object_pages * HEADER_BYTES as u64);
}

#[derive(Clone, Debug)]
enum Step {
    Insert { seed: u64, noise: u64 },
    Load(prop::sample::Index),
    Remove(prop::sample::Index),
    Relocate,
    RemoveMost,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Above noise 150 pages do not compress; 0 is a same-filled page.
    let noise = prop_oneof![1 => Just(0), 1 => Just(256), 8 => 1..150u64, 4 => Just(77)];
    let step = prop_oneof![
        8 => (any::<u64>(), noise).prop_map(|(seed, noise)| Step::Insert { seed, noise }),
        2 => any::<prop::sample::Index>().prop_map(Step::Load),
        5 => any::<prop::sample::Index>().prop_map(Step::Remove),
        1 => Just(Step::RemoveMost),
        1 => Just(Step::Relocate),
    ];
    prop::collection::vec(step, 1..400)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_agrees_with_a_map_in_every_byte(steps in steps(), frames in 1..200usize) {
        let mut store = new_store(frames);
        let mut model: HashMap<Handle, Vec<Box<Page>>> = HashMap::new();
        let mut handles: Vec<Handle> = Vec::new();
        let mut workspace = store.codec().workspace();
        for step in steps {
            match step {
                Step::Insert { seed, noise } => {
                    let page = Box::new(page_with_noise(seed, noise));
                    let codec = store.codec();
                    let Ok(verified) = codec.stage(&page, &mut workspace) else { continue };
                    let before = store.stats();
                    match store.insert(&verified) {
                        Ok(handle) => {
                            model.entry(handle).or_default().push(page);
                            handles.push(handle);
                        }
                        Err(full) => {
                            prop_assert!(full.used <= full.capacity);
                            let after = store.stats();
                            prop_assert_eq!(before.payload, after.payload);
                            prop_assert_eq!(before.object_pages, after.object_pages);
                        }
                    }
                }
                Step::Load(index) if !handles.is_empty() => {
                    let handle = *index.get(&handles);
                    prop_assert!(get(&store, handle).unwrap() == model[&handle][0]);
                }
                Step::Remove(index) if !handles.is_empty() => {
                    let handle = handles.swap_remove(index.index(handles.len()));
                    store.remove(handle).unwrap();
                    model.get_mut(&handle).unwrap().pop();
                }
                Step::RemoveMost => {
                    for handle in handles.drain(handles.len() / 8..) {
                        store.remove(handle).unwrap();
                        model.get_mut(&handle).unwrap().pop();
                    }
                }
                Step::Relocate => {
                    for handle in &mut handles {
                        if let Some(moved) = store.relocate(*handle).unwrap() {
                            let page = model.get_mut(handle).unwrap().pop().unwrap();
                            model.entry(moved).or_default().push(page);
                            *handle = moved;
                        }
                    }
                }
                Step::Load(_) | Step::Remove(_) => {}
            }
            assert_adds_up(&store);
        }
        let mut objects = 0;
        for (handle, pages) in &model {
            for page in pages {
                prop_assert!(get(&store, *handle).unwrap() == *page);
                objects += 1;
            }
        }
        let stats = store.stats();
        prop_assert_eq!(stats.object_pages + stats.same_filled_pages, objects);
        for handle in handles {
            store.remove(handle).unwrap();
        }
        store.release_spares();
        prop_assert_eq!(store.frames().used(), 0, "an empty store holds no frame");
    }

    #[test]
    fn garbage_in_the_frames_is_never_handed_out(
        garbage in prop::collection::vec(any::<u8>(), 1..400),
        at in 0..3000usize,
        noise in 1..120u64,
    ) {
        let page = page_with_noise(at as u64, noise);
        let mut store = new_store(16);
        let handle = put(&mut store, &page).unwrap();
        let end = (at + garbage.len()).min(store.memory_mut().len());
        store.memory_mut()[at..end].copy_from_slice(&garbage[..end - at]);
        if let Ok(back) = get(&store, handle) {
            prop_assert!(*back == page);
        }
    }
}

#[test]
fn every_flipped_bit_of_an_object_is_found() {
    for noise in [1, 12, 60, 110] {
        let page = page_with_noise(noise, noise);
        let mut store = new_store(16);
        let handle = put(&mut store, &page).unwrap();
        let object = HEADER_BYTES + usize::try_from(store.stats().payload.0).unwrap();
        for bit in 0..object * 8 {
            store.memory_mut()[bit / 8] ^= 1 << (bit % 8);
            assert!(get(&store, handle).is_err(), "bit {bit} of {object} bytes");
            assert!(!store.same_as(handle, &page, &mut Box::new([0; PAGE_BYTES])), "bit {bit}");
            store.memory_mut()[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(*get(&store, handle).unwrap(), page);
    }
}

#[test]
fn every_flipped_bit_of_a_handle_is_refused_or_gives_another_stored_page_unmixed() {
    let mut store = new_store(256);
    let pages: Vec<_> = (0..200).map(|seed| page_with_noise(seed, 20 + seed % 3)).collect();
    let handles: Vec<_> = pages.iter().map(|page| put(&mut store, page).unwrap()).collect();
    for (handle, page) in handles.iter().zip(&pages) {
        for bit in 0..44 {
            let flipped = Handle::from_raw(handle.raw() ^ 1 << bit).unwrap();
            if let Ok(back) = get(&store, flipped) {
                // 12 bits of tag: one in 4096 neighbours passes, and then it is a whole page.
                assert!(*back != *page && pages.contains(&back), "bit {bit}");
            }
        }
    }
}

#[test]
fn a_stale_handle_does_not_reach_the_page_that_took_its_place() {
    let mut store = new_store(16);
    let old = put(&mut store, &page_with_noise(1, 50)).unwrap();
    store.remove(old).unwrap();
    let page = page_with_noise(2, 50);
    let new = put(&mut store, &page).unwrap();
    assert_ne!(old, new);
    assert_eq!(get(&store, old), Err(Damage::WrongObject));
    assert_eq!(store.remove(old).unwrap_err().damage, Damage::WrongObject);
    assert_eq!(*get(&store, new).unwrap(), page);
}

#[test]
fn a_damaged_object_keeps_its_place_and_names_its_frame() {
    let mut store = new_store(16);
    let handle = put(&mut store, &page_with_noise(1, 50)).unwrap();
    store.memory_mut()[0] ^= 1;
    let corrupt = store.remove(handle).unwrap_err();
    assert_eq!(corrupt.frame.unwrap().0, 0);
    assert_eq!(store.stats().object_pages, 1);
    store.memory_mut()[0] ^= 1;
    store.remove(handle).unwrap();
    assert_adds_up(&store);
}

#[test]
fn a_damaged_length_upsets_the_sums_only_until_its_block_is_empty() {
    let mut store = new_store(16);
    let handles: Vec<_> = (0..4).map(|_| put(&mut store, &page_with_noise(7, 50)).unwrap()).collect();
    store.memory_mut()[6] ^= 0x30;
    for handle in handles {
        store.remove(handle).unwrap();
    }
    assert_eq!(store.stats().payload.0, 0);
    assert_adds_up(&store);
}

#[test]
fn pages_that_do_not_compress_are_refused_before_the_store() {
    let page = page_with_noise(1, 256);
    let codec = Codec::new(1);
    let mut workspace = codec.workspace();
    match codec.stage(&page, &mut workspace).map(|_| ()) {
        Err(Unfit::Incompressible { encoded, limit: MAX_PAYLOAD_BYTES }) => {
            assert!(encoded > MAX_PAYLOAD_BYTES);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_encoding_that_does_not_read_back_is_not_verified() {
    let page = page_with_noise(1, 30);
    let (mut scratch, mut readback) = (Scratch::new(), [0; PAGE_BYTES]);
    let encoded = Codec::new(1).encode(&page, &mut scratch);
    let mut other = page;
    for at in (0..PAGE_BYTES).step_by(61) {
        other[at] ^= 0x80;
        assert_eq!(encoded.verify(&other, &mut readback).map(|_| ()), Err(Unfit::NotReproduced));
        other[at] ^= 0x80;
    }
    assert!(encoded.verify(&page, &mut readback).is_ok());
    let fill = Codec::new(1).encode(&[0; PAGE_BYTES], &mut scratch);
    assert!(matches!(fill, Encoded::SameFilled(_)));
    assert_eq!(fill.verify(&page, &mut readback).map(|_| ()), Err(Unfit::NotReproduced));
}

#[test]
#[should_panic(expected = "a page is encoded by the codec of the store that takes it")]
fn a_page_encoded_under_another_seed_is_not_taken() {
    let page = page_with_noise(1, 30);
    let codec = Codec::new(0xbad);
    let mut workspace = codec.workspace();
    let verified = codec.stage(&page, &mut workspace).unwrap();
    let _ = new_store(16).insert(&verified);
}

#[test]
fn a_store_may_move_to_another_thread() {
    fn assert_send<T: Send>() {}
    assert_send::<Store<super::GrantedFrames, Vec<u8>>>();
    assert_send::<super::Workspace>();
}

#[test]
fn same_filled_pages_take_no_frame() {
    let mut store = new_store(1);
    for value in 0..=255 {
        let handle = put(&mut store, &[value; PAGE_BYTES]).unwrap();
        assert_eq!(*get(&store, handle).unwrap(), [value; PAGE_BYTES]);
    }
    assert_eq!(store.stats().same_filled_pages, 256);
    assert_eq!(store.stats().frames_used.0, 0);
}

#[test]
fn a_class_whose_blocks_cannot_be_had_uses_room_in_larger_slots() {
    // Four frames: no block of order 3 or more exists, but classes of order 2 take the object.
    let mut store = new_store(4);
    let mut stored = Vec::new();
    for seed in 0.. {
        let page = page_with_noise(seed, 20 + seed % 60);
        let mut scratch = Scratch::new();
        let Encoded::Compressed { bytes, .. } = store.codec().encode(&page, &mut scratch) else { continue };
        let class = class_for(HEADER_BYTES + bytes.len()).unwrap();
        if CLASSES[usize::from(class)].order <= 2 {
            continue;
        }
        match put(&mut store, &page) {
            Ok(handle) => stored.push((handle, page)),
            Err(full) => {
                assert_eq!(full.used, full.capacity);
                break;
            }
        }
    }
    assert!(stored.len() >= 2, "{}", stored.len());
    for (handle, page) in &stored {
        assert_eq!(*get(&store, *handle).unwrap(), *page);
    }
    assert_adds_up(&store);
}

#[test]
fn a_page_that_comes_and_goes_takes_frames_once() {
    let mut store = new_store(64);
    let page = page_with_noise(1, 50);
    let first = put(&mut store, &page).unwrap();
    let frames = store.frames().used();
    store.remove(first).unwrap();
    assert_eq!(store.frames().used(), frames, "the block stays at hand");
    let again = put(&mut store, &page).unwrap();
    assert_eq!(store.frames().used(), frames);
    store.remove(again).unwrap();
    store.release_spares();
    assert_eq!(store.frames().used(), 0);
    assert!(store.memory_mut().iter().all(|byte| *byte == 0), "given back means zeroed (R21)");
}

#[test]
fn relocating_every_page_gives_back_what_removals_left_empty() {
    let mut store = new_store(4096);
    let mut random = 1u32;
    let mut stored = Vec::new();
    for seed in 0..4000 {
        let page = page_with_noise(seed, 30);
        stored.push((put(&mut store, &page).unwrap(), page));
    }
    stored.retain(|(handle, _)| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let is_kept = random >> 30 == 0;
        if !is_kept {
            store.remove(*handle).unwrap();
        }
        is_kept
    });
    let before = store.stats();
    for (handle, _) in &mut stored {
        *handle = store.relocate(*handle).unwrap().unwrap_or(*handle);
    }
    let after = store.stats();
    assert_eq!(after.payload, before.payload);
    for (handle, _) in &mut stored {
        *handle = store.relocate(*handle).unwrap().unwrap_or(*handle);
    }
    let moved_again = stored.iter().filter(|(handle, _)| store.relocate(*handle).unwrap().is_some()).count();
    assert_eq!(moved_again, 0, "the third pass finds nothing to move");
    assert!(after.free_slot.0 * 3 < before.free_slot.0, "{before:?} {after:?}");
    for (handle, page) in &stored {
        assert_eq!(*get(&store, *handle).unwrap(), *page);
    }
    assert_adds_up(&store);
}

#[test]
fn pages_that_were_stored_before_their_class_paid_do_not_keep_half_empty_blocks() {
    let mut store = new_store(8192);
    let class_of = |page: &Page| match Codec::new(0x5eed).encode(page, &mut Scratch::new()) {
        Encoded::Compressed { bytes, .. } => class_for(HEADER_BYTES + bytes.len()).unwrap(),
        other => panic!("{other:?}"),
    };
    let fine = (0..).find(|&class| is_fine(class)).unwrap();
    let pages_of = |wanted: u8, count: usize| {
        let pages =
            (0..).map(|seed| page_with_noise(seed, 60 + seed % 60)).filter(move |page| class_of(page) == wanted);
        pages.take(count).collect::<Vec<_>>()
    };
    // The fine class opens no block until the next one has many.
    let mut stored = Vec::new();
    for page in pages_of(fine, 600).into_iter().chain(pages_of(fine + 1, 1200)) {
        stored.push((put(&mut store, &page).unwrap(), page));
    }
    let mut random = 1u32;
    stored.retain(|(handle, _)| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let is_kept = random >> 30 == 0;
        if !is_kept {
            store.remove(*handle).unwrap();
        }
        is_kept
    });
    let before = store.stats();
    assert!(before.free_slot > before.payload, "{before:?}");
    for (handle, _) in &mut stored {
        *handle = store.relocate(*handle).unwrap().unwrap_or(*handle);
    }
    let after = store.stats();
    assert!(after.free_slot.0 * 10 < after.payload.0, "{after:?}");
    for (handle, page) in &stored {
        assert_eq!(*get(&store, *handle).unwrap(), *page);
    }
    assert_adds_up(&store);
}

#[test]
fn metadata_stays_under_two_percent_of_the_bytes_stored() {
    let mut store = new_store(8192);
    for seed in 0..12_000 {
        put(&mut store, &page_with_noise(seed, 8 + seed % 100)).unwrap();
    }
    let stats = store.stats();
    assert!(stats.metadata.0 * 50 < stats.payload.0, "{stats:?}");
}

/// Frames of which only the first few can be had, as under RLIMIT_DATA.
struct Rationed {
    ram: Vec<u8>,
    ready: usize,
}

impl FrameBytes for Rationed {
    fn prepare(&mut self, offset: usize, len: usize) -> bool {
        offset + len <= self.ready
    }

    fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        self.ram.bytes(offset, len)
    }

    fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset + len <= self.ready, "only frames that are ready are written");
        self.ram.bytes_mut(offset, len)
    }

    fn discard(&mut self, offset: usize, len: usize) {
        self.ram.discard(offset, len);
    }
}

#[test]
fn frames_that_cannot_be_made_ready_are_a_full_store_and_nothing_is_lost() {
    let memory = Rationed { ram: alloc::vec![0; 256 * PAGE_BYTES], ready: 64 * PAGE_BYTES };
    let mut store = Store::new(FirstFit::new(256), memory, 0x5eed);
    let mut workspace = store.codec().workspace();
    let mut stored = Vec::new();
    for seed in 0..600 {
        let page = page_with_noise(seed, 100);
        let staged = store.codec().stage(&page, &mut workspace).unwrap();
        if let Ok(handle) = store.insert(&staged) {
            stored.push((seed, handle));
        }
    }
    assert!(!stored.is_empty() && stored.len() < 600, "{} of 600 pages", stored.len());
    let used = store.stats().frames_used.0;
    assert!(used <= 64, "{used} frames are held");
    for (seed, handle) in stored {
        let mut page = [0; PAGE_BYTES];
        store.load(handle, &mut page).unwrap();
        assert_eq!(page, page_with_noise(seed, 100));
    }
}
