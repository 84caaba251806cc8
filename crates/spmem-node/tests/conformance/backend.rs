//! What every back end must pass, whatever it keeps pages in. `make(frames)` is a new one with room for about that many frames.
//!
//! Included by this crate's unit tests, by its conformance suite, and by `cargo xtask vm-test`.

use std::boxed::Box;
use std::vec::Vec;

use spmem_node::{Backend, Full, Handle, PAGE_BYTES, Page, Stage, Unfit};

/// Stages and stores one page; `Ok(Err(_))` if the back end does not take such pages.
fn store<B: Backend>(backend: &mut B, page: &Page) -> Result<Result<Handle, Unfit>, Full> {
    let stage = backend.stage();
    let mut workspace = stage.workspace();
    match stage.stage(page, &mut workspace) {
        Ok(staged) => backend.store(&staged).map(Ok),
        Err(unfit) => Ok(Err(unfit)),
    }
}

fn assert_holds<B: Backend>(backend: &B, handle: Handle, page: &Page) {
    let mut back = Box::new([0x5a; PAGE_BYTES]);
    backend.load(handle, &mut back).unwrap();
    assert!(*back == *page, "the page comes back as it went");
}

pub fn what_is_stored_comes_back<B: Backend>(make: impl Fn(usize) -> B) {
    let mut backend = make(512);
    let mut stored = Vec::new();
    for seed in 0..300 {
        let page = page_with_noise(seed, seed);
        if let Ok(handle) = store(&mut backend, &page).unwrap() {
            assert_eq!(handle.raw() >> Handle::BITS, 0);
            stored.push((handle, page));
        }
    }
    assert!(stored.len() > 100, "a back end takes pages");
    for (handle, page) in &stored {
        assert_holds(&backend, *handle, page);
    }
}

pub fn same_as_tells_the_page_from_any_other<B: Backend>(make: impl Fn(usize) -> B) {
    let mut backend = make(512);
    let mut readback = Box::new([0; PAGE_BYTES]);
    for noise in [0, 1, 20, 100] {
        let mut page = page_with_noise(noise, noise);
        let handle = store(&mut backend, &page).unwrap().unwrap();
        assert!(backend.same_as(handle, &page, &mut readback));
        for at in (0..PAGE_BYTES).step_by(97) {
            page[at] ^= 1;
            assert!(!backend.same_as(handle, &page, &mut readback), "byte {at}");
            page[at] ^= 1;
        }
    }
}

pub fn a_forgotten_page_is_gone_and_its_room_is_back<B: Backend>(make: impl Fn(usize) -> B) {
    let mut backend = make(512);
    let before = backend.usage();
    let page = page_with_noise(1, 50);
    let handles: Vec<_> = (0..64).map(|_| store(&mut backend, &page).unwrap().unwrap()).collect();
    assert_eq!(backend.usage().stored.0, before.stored.0 + 64 * PAGE_BYTES as u64);
    assert!(backend.usage().used > before.used);
    let most = backend.usage().used;
    for handle in &handles {
        backend.forget(*handle).unwrap();
    }
    assert_eq!(backend.usage().stored, before.stored);
    assert!(backend.usage().used < most);
    let mut back = Box::new([0x5a; PAGE_BYTES]);
    for handle in handles {
        assert!(backend.load(handle, &mut back).is_err());
        assert_eq!(*back, [0; PAGE_BYTES], "nothing is handed out with an error");
        assert!(backend.forget(handle).is_err(), "twice forgotten");
        assert!(!backend.same_as(handle, &page, &mut back));
    }
}

pub fn a_full_back_end_refuses_and_loses_nothing<B: Backend>(make: impl Fn(usize) -> B) {
    let mut backend = make(64);
    let mut stored = Vec::new();
    let full = loop {
        let page = page_with_noise(stored.len() as u64, 40);
        match store(&mut backend, &page) {
            Ok(handle) => stored.push((handle.unwrap(), page)),
            Err(full) => break full,
        }
    };
    assert_eq!(full.node, backend.node());
    assert_eq!(full.used, backend.usage().used);
    assert!(full.used <= full.capacity && full.wanted.0 > 0);
    for (handle, page) in &stored {
        assert_holds(&backend, *handle, page);
    }
    // One page less makes room for one as large.
    let (handle, page) = stored.swap_remove(stored.len() / 2);
    backend.forget(handle).unwrap();
    let again = store(&mut backend, &page).unwrap().unwrap();
    assert_holds(&backend, again, &page);
    for (handle, page) in &stored {
        assert_holds(&backend, *handle, page);
    }
}

/// A page of which about `noise` of 256 words are random: 0 is all zeros, 256 does not compress.
pub fn page_with_noise(seed: u64, noise: u64) -> Page {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut page = [0; PAGE_BYTES];
    for word in page.as_chunks_mut::<8>().0 {
        if random() >> 32 & 0xff < noise {
            *word = random().to_le_bytes();
        }
    }
    page
}
