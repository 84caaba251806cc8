//! Claims about the encoder and its lanes.

extern crate std;
use super::*;
use crate::workshop;
use crate::workshop::tests::{HeapStore, common, new_store};
use alloc::boxed::Box;
use alloc::vec::Vec;
use spmem_sys::thread::Affinity;

pub(crate) fn exchange() -> &'static Exchange {
    let item = || Item {
        address: AtomicU64::new(0),
        kind: AtomicU32::new(0),
        len: AtomicU32::new(0),
        word: AtomicU64::new(0),
    };
    let lane = || Lane {
        state: AtomicU32::new(0),
        count: AtomicU32::new(0),
        done: Event::new(),
        pages: core::array::from_fn(|_| item()),
        bytes: [const { [const { AtomicU64::new(0) }; PAGE / 8] }; LANE_PAGES],
        dictionary: AtomicU64::new(0),
        wants_dense: AtomicU32::new(0),
    };
    let lanes = core::array::from_fn(|_| lane());
    Box::leak(Box::new(Exchange {
        posted: Event::new(),
        home: Home::nowhere(),
        lanes,
        dense: DenseLane::new(),
        dictionaries: Handover::new(),
    }))
}

pub(crate) fn memory() -> Fd {
    Fd::open(c"/proc/self/mem", libc::O_RDONLY).expect("/proc")
}

/// Page 0 compresses, 1 is same-filled, 2 is noise.
fn pages() -> Vec<Page> {
    let text = core::array::from_fn(|index| (index / 50) as u8);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let noise = core::array::from_fn(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    });
    alloc::vec![text, [7; PAGE], noise]
}

/// Where records lie, and a page whose encoding is the other's is told from it.
fn check(client: &mut Client, lane: usize, store: &mut HeapStore, pages: &[(usize, Page)], other: &Page) {
    let codec = store.codec();
    for (index, page) in pages {
        let Answer::Encoded(label) = client.answer(lane, *index) else { panic!("page {index}") };
        // R19: right of another page is wrong.
        assert!(client.take(&codec, (lane, *index), label, other).is_none());
        let taken = client.take(&codec, (lane, *index), label, page).expect("of this codec");
        let handle = store.insert(&taken).expect("there is room");
        let mut found = [0; PAGE];
        store.load(handle, &mut found).expect("whole");
        assert_eq!(found, *page);
        store.remove(handle).expect("it is there");
    }
}

#[test]
fn every_byte_of_every_page_comes_back_however_it_is_wanted() {
    let (exchange, pages, mut store) = (exchange(), pages(), new_store(64));
    let (codec, workshop) = (store.codec(), &*Box::leak(Box::new(Workshop::new())));
    let is_over: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
    let encoder = std::thread::spawn(move || serve(exchange, workshop, codec, &memory(), is_over));
    let learner = std::thread::spawn(move || workshop::learn(exchange, workshop, codec, common, is_over));
    let slot = workshop::tests::learn_one(exchange, workshop, &mut store);
    let newest = store.newest_dictionary();
    let unknown = Some((slot, DictionaryName(1)));
    let dense = |slot| Encoding::Dense { slot, is_anew: false };
    let kinds = [
        (Wanted::Lz4, Encoding::Lz4),
        (Wanted::Dense(None), dense(None)),
        (Wanted::Dense(newest), dense(Some(slot))),
        (Wanted::Dense(unknown), dense(None)),
    ];
    let mut client = Client::new(exchange);
    let record = workshop::tests::record_page(7);
    for (round, (wanted, encoding)) in (0..50).flat_map(|_| kinds).enumerate() {
        let address = |page: &Page| page.as_ptr().expose_provenance();
        let addresses = [address(&record), 0, address(&pages[0]), address(&pages[1]), address(&pages[2]), 0];
        // Wherever the handler is, and goes meanwhile.
        let home = (round % 3_usize).checked_sub(1);
        while client.has_room() {
            client.post(addresses.into_iter(), home, wanted);
        }
        while client.oldest().is_some() {
            assert!(client.waiter().is_some_and(|waiter| waiter.wait().is_some()), "round {round}");
            let lane = client.oldest().expect("it is out");
            let Answer::Encoded(label) = client.answer(lane, 0) else { panic!("round {round}") };
            assert_eq!(label.encoding, encoding, "round {round}");
            let there = [(0, record), (2, pages[0]), (3, pages[1])];
            check(&mut client, lane, &mut store, &there, &pages[2]);
            assert!(matches!(client.answer(lane, 4), Answer::Unfit(Unfit::Incompressible { .. })));
            assert_eq!((client.answer(lane, 1), client.answer(lane, 5)), (Answer::Unread, Answer::Unread));
            client.retire();
        }
    }
    is_over.store(true, Relaxed);
    exchange.wake();
    workshop.wake();
    encoder.join().expect("the encoder");
    learner.join().expect("the thread that learns");
}

#[test]
fn an_answer_with_a_dictionary_that_was_not_offered_is_none() {
    let exchange = exchange();
    let mut client = Client::new(exchange);
    client.post([PAGE].into_iter(), None, Wanted::Dense(None));
    for kind in [DENSE_WITH, 6, u32::MAX] {
        exchange.lanes[0].pages[0].kind.store(kind, Relaxed);
        assert_eq!(client.answer(0, 0), Answer::Unread);
    }
}

#[test]
fn an_answer_that_says_another_dictionary_than_it_needs_is_refused() {
    let codec = Codec::new(5);
    let (workshop, record) = (Workshop::new(), workshop::tests::record_page(7));
    let address = record.as_ptr().expose_provenance();
    let bytes = common(&[record]).expect("a page");
    let offered = Some((Slot::B, DictionaryName::of(&codec, &bytes)));
    for (kind, said) in [(DENSE, DENSE_WITH), (DENSE_WITH, DENSE)] {
        let exchange = exchange();
        let (mut client, lane) = (Client::new(exchange), &exchange.lanes[0]);
        client.post([address].into_iter(), None, Wanted::Dense(offered));
        let mut desk = Desk::new(codec, &workshop);
        if kind == DENSE_WITH {
            workshop.set(&codec, Slot::B, &bytes);
        }
        desk.encode(lane, &memory());
        assert_eq!(lane.pages[0].kind.load(Relaxed), kind);
        for (told, is_taken) in [(kind, true), (said, false), (LZ4, false)] {
            lane.pages[0].kind.store(told, Relaxed);
            let Answer::Encoded(label) = client.answer(0, 0) else { panic!("kind {told}") };
            assert_eq!(client.take(&codec, (0, 0), label, &record).is_some(), is_taken, "{kind} as {told}");
        }
    }
}

#[test]
fn the_dictionary_that_is_recommended_is_used_and_no_other() {
    let codec = Codec::new(5);
    let (workshop, exchange) = (Workshop::new(), exchange());
    let record = workshop::tests::record_page(7);
    let address = record.as_ptr().expose_provenance();
    let [first, second] = [&record[..512], &record[64..1024]];
    let name = |bytes: &[u8]| DictionaryName::of(&codec, bytes);
    let (mut desk, lane) = (Desk::new(codec, &workshop), &exchange.lanes[0]);
    let mut encoded = |offered: Option<&[u8]>| {
        let mut client = Client::new(exchange);
        let wanted = Wanted::Dense(offered.map(|bytes| (Slot::B, name(bytes))));
        client.post([address].into_iter(), None, wanted);
        desk.encode(lane, &memory());
        let Answer::Encoded(label) = client.answer(0, 0) else { panic!("it compresses") };
        assert!(client.take(&codec, (0, 0), label, &record).is_some());
        lane.pages[0].kind.load(Relaxed)
    };
    assert_eq!(encoded(Some(first)), DENSE);
    for bytes in [first, second] {
        workshop.set(&codec, Slot::B, bytes);
        assert_eq!(encoded(Some(bytes)), DENSE_WITH);
        assert_eq!(encoded(Some(&record[..100])), DENSE, "another one is there");
    }
    assert_eq!((encoded(Some(first)), encoded(None)), (DENSE, DENSE));
    workshop.unset();
    assert_eq!(encoded(Some(second)), DENSE, "it does not pay");
}

#[test]
fn pages_that_are_wanted_densely_are_learnt_from_if_they_are_not_filled_with_one_value() {
    let (workshop, exchange) = (Workshop::new(), exchange());
    let mut desk = Desk::new(Codec::new(5), &workshop);
    let pages = pages();
    let mut offered = |page: &Page, wanted| {
        Client::new(exchange).post([page.as_ptr().expose_provenance()].into_iter(), None, wanted);
        desk.encode(&exchange.lanes[0], &memory());
        workshop.take_samples()
    };
    assert!(offered(&pages[0], Wanted::Lz4).is_empty());
    assert!(offered(&pages[1], Wanted::Dense(None)).is_empty());
    assert_eq!(offered(&pages[0], Wanted::Dense(None)), alloc::vec![pages[0]]);
}

#[test]
fn an_encoder_keeps_off_the_home_unless_it_gives_way_to_most() {
    let check = |nice| {
        thread::set_nice(nice);
        let before = Affinity::of_caller();
        let Some(home) = (0..1024).find(|&cpu| before.contains(cpu)).filter(|_| before.count() > 1) else {
            return;
        };
        let exchange = exchange();
        exchange.home.set(Some(home));
        serve(exchange, &Workshop::new(), Codec::new(5), &memory(), &AtomicBool::new(true));
        assert_eq!(Affinity::of_caller().contains(home), thread::nice() > 0);
    };
    for nice in [0, 1] {
        std::thread::spawn(move || check(nice)).join().expect("a thread");
    }
}

#[test]
fn pages_that_cannot_be_read_are_left_to_the_agent() {
    let exchange = exchange();
    let pages = pages();
    let mut client = Client::new(exchange);
    client.post(
        [pages[0].as_ptr().expose_provenance(), PAGE, pages[1].as_ptr().expose_provenance()].into_iter(),
        None,
        Wanted::Lz4,
    );
    let workshop = Workshop::new();
    let mut desk = Desk::new(Codec::new(5), &workshop);
    desk.encode(&exchange.lanes[0], &memory());
    assert!(matches!(client.answer(0, 0), Answer::Encoded(_)));
    assert_eq!((client.answer(0, 1), client.answer(0, 2)), (Answer::Unread, Answer::Unread));
    assert!(!client.is_useless(0));
    client.post([0, PAGE].into_iter(), None, Wanted::Dense(None));
    desk.encode(&exchange.lanes[1], &memory());
    assert!(client.is_useless(1));
}

#[test]
fn without_an_encoder_the_agent_goes_on() {
    let mut client = Client::new(exchange());
    client.post([PAGE].into_iter(), None, Wanted::Lz4);
    assert!(client.waiter().is_some_and(|waiter| waiter.wait().is_none()));
    client.retire();
    client.post([PAGE].into_iter(), None, Wanted::Lz4);
    client.retire();
    assert!(!client.has_room(), "lanes that are out stay out of use");
}
