use alloc::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::units::FrameCount;

#[derive(Clone, Debug)]
enum Op {
    Track(u32),
    Untrack(u32),
    Use(u32),
    Pin(u32, bool),
    Age,
    Isolate(usize, usize),
    PutBack(u32),
}

fn op() -> impl Strategy<Value = Op> {
    let frame =
        || prop_oneof![0u32..40, Just(PIECE_FRAMES as u32 - 3), Just((PIECE_FRAMES * TABLE_PIECES) as u32 + 7)];
    prop_oneof![
        4 => frame().prop_map(Op::Track),
        2 => frame().prop_map(Op::Untrack),
        4 => frame().prop_map(Op::Use),
        1 => (frame(), any::<bool>()).prop_map(|(f, p)| Op::Pin(f, p)),
        3 => Just(Op::Age),
        3 => (1usize..8, prop_oneof![1usize..60, Just(PIECE_FRAMES * TABLE_PIECES)]).prop_map(|(w, l)| Op::Isolate(w, l)),
        2 => frame().prop_map(Op::PutBack),
    ]
}

fn isolate(pages: &mut Pages, wanted: usize, limit: usize) -> Vec<Page> {
    let mut taken = Vec::new();
    pages.isolate(wanted, limit, |page| taken.push(page));
    taken
}

#[derive(Clone, Debug)]
struct Known {
    is_pinned: bool,
    is_isolated: bool,
    /// Number of the generation, never going round.
    generation: u64,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn the_oldest_that_can_move_are_taken_and_counts_are_what_they_count(
        ops in prop::collection::vec(op(), 0..200),
    ) {
        let mut pages = Pages::default();
        let mut known: BTreeMap<u32, Known> = BTreeMap::new();
        let mut youngest = 0_u64;
        for op in ops {
            match op {
                Op::Track(frame) if !known.contains_key(&frame) => {
                    pages.prepare(FrameNumber(frame)).unwrap();
                    pages.track(FrameNumber(frame), Order::ZERO, Some(DomainId::ROOT));
                    let page = Known { is_pinned: false, is_isolated: false, generation: youngest };
                    known.insert(frame, page);
                }
                Op::Track(_) => {}
                Op::Untrack(frame) => {
                    pages.untrack(FrameNumber(frame));
                    known.remove(&frame);
                }
                Op::Use(frame) => {
                    pages.on_used(FrameNumber(frame));
                    known.entry(frame).and_modify(|page| page.generation = youngest);
                }
                Op::Pin(frame, is_pinned) => {
                    let may = pages.set_pinned(FrameNumber(frame), is_pinned);
                    let page = known.get_mut(&frame).filter(|page| !page.is_isolated);
                    prop_assert_eq!(may, page.is_some());
                    page.into_iter().for_each(|page| page.is_pinned = is_pinned);
                }
                Op::Age => youngest += u64::from(pages.age()),
                Op::Isolate(wanted, limit) => {
                    let taken = isolate(&mut pages, wanted, limit);
                    prop_assert!(taken.len() <= wanted);
                    let oldest = known.values().filter(|p| !p.is_isolated).map(|p| p.generation).min();
                    for page in &taken {
                        let page = known.get_mut(&page.frame.0).unwrap();
                        prop_assert!(!page.is_pinned && !page.is_isolated, "R15");
                        prop_assert!(page.generation < youngest && Some(page.generation) >= oldest);
                        page.is_isolated = true;
                    }
                    // Those met that cannot move are young now.
                    for (&frame, page) in &mut known {
                        let now = pages.get(FrameNumber(frame)).unwrap();
                        if page.is_pinned && now.age == 0 {
                            page.generation = youngest;
                        }
                    }
                }
                Op::PutBack(frame) => {
                    pages.put_back(FrameNumber(frame));
                    known.entry(frame).and_modify(|page| page.is_isolated = false);
                }
            }
            let mut counts = [0; GENERATIONS as usize];
            for (&frame, page) in &mut known {
                let found = pages.get(FrameNumber(frame)).unwrap();
                prop_assert_eq!(found.is_isolated, page.is_isolated);
                if !page.is_isolated {
                    // A block that was isolated for long is as old as the oldest.
                    page.generation = youngest - u64::from(found.age).min(youngest - page.generation);
                    prop_assert_eq!(u64::from(found.age), youngest - page.generation);
                    counts[usize::from(found.age)] += 1;
                }
            }
            prop_assert_eq!(pages.count_by_age(), counts);
            prop_assert_eq!(pages.count(), counts.iter().sum::<u64>());
        }
        prop_assert_eq!(pages.iter().count(), known.len());
    }
}

#[test]
fn what_is_known_of_a_block_is_what_was_said_for_every_order_and_domain() {
    let mut pages = Pages::default();
    let domains = [None, Some(0), Some(1), Some(0x1555), Some(crate::units::MAX_DOMAINS - 1)];
    let domains = domains.map(|number| number.map(|number| DomainId::new(number).unwrap()));
    let mut known = BTreeMap::new();
    for (round, domain) in domains.into_iter().enumerate() {
        let mut at = (round * 3 * PIECE_FRAMES) as u32;
        for order in (0..=Order::MAX.get()).rev().map(|order| Order::new(order).unwrap()) {
            pages.prepare(FrameNumber(at)).unwrap();
            pages.track(FrameNumber(at), order, domain);
            known.insert(at, (order, domain));
            at += 1 << order.get();
        }
    }
    pages.set_pinned(FrameNumber(0), true);
    let said: BTreeMap<_, _> = pages.iter().map(|page| (page.frame.0, (page.order, page.domain))).collect();
    assert_eq!(said, known);
    // What was a block and is two halves now is forgotten.
    pages.untrack(FrameNumber(0));
    pages.track(FrameNumber(0), Order::ZERO, None);
    pages.track(FrameNumber(1), Order::ZERO, domains[3]);
    assert_eq!(pages.get(FrameNumber(0)).map(|page| (page.order, page.domain)), Some((Order::ZERO, None)));
    assert_eq!(pages.get(FrameNumber(1)).map(|page| page.domain), Some(domains[3]));
}

#[test]
fn records_of_a_gib_and_what_is_lent_for_it_take_less_than_a_thousandth_and_come_back() {
    let mut pages = Pages::default();
    let count = (PIECE_FRAMES * TABLE_PIECES) as u32;
    for frame in (0..count).step_by(PIECE_FRAMES) {
        pages.prepare(FrameNumber(frame)).unwrap();
        pages.track(FrameNumber(frame), Order::MAX, None);
    }
    let (words, states) = crate::frames::Metadata::size(FrameCount(u64::from(count)));
    let zero_state = count as usize / 8;
    assert!((pages.bytes() + words * 8 + states + zero_state) * 1000 < 1 << 30, "{}", pages.bytes());
    (0..count).step_by(PIECE_FRAMES).for_each(|frame| pages.untrack(FrameNumber(frame)));
    pages.remove_range(FrameRange { first: FrameNumber(0), count: FrameCount(u64::from(count)) });
    assert_eq!(pages.bytes(), 0);
}

#[test]
fn a_look_is_bounded_whatever_there_is() {
    let mut pages = Pages::default();
    for frame in 0..1000 {
        pages.prepare(FrameNumber(frame)).unwrap();
        pages.track(FrameNumber(frame), Order::ZERO, None);
    }
    assert!(pages.age());
    assert_eq!(isolate(&mut pages, 1000, 10).len(), 10);
    assert_eq!(pages.looked_at(), 10);
}
