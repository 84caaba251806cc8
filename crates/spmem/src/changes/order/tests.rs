extern crate std;
use super::*;
use crate::changes::{destination, is_overwritten};
use spmem_sys::{Errno, PAGE};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::vec;

const A: usize = 0x10_0000;
const B: usize = 0x20_0000;
const C: usize = 0x30_0000;
const D: usize = 0x40_0000;
const E: usize = 0x50_0000;
const LEN: usize = 16 * PAGE;

fn moved(from: usize, to: usize) -> Event {
    Event::Remap { from, to, len: LEN }
}
fn unmapped(start: usize) -> Event {
    Event::Unmap { start, end: start + LEN }
}

/// What is ours now, which pages were away before, which are present now.
#[derive(Default)]
struct Told<'a> {
    ours: &'a [usize],
    /// What of that goes on from the page before.
    parts: &'a [usize],
    away: &'a [usize],
    present: &'a [usize],
    /// How many questions there is time for.
    patience: Option<usize>,
    asked: Vec<usize>,
}

impl Told<'_> {
    fn answer(&mut self, address: usize, answer: bool) -> Result<bool> {
        if self.patience.is_some_and(|most| self.asked.len() >= most) {
            return Err(Errno::EAGAIN);
        }
        self.asked.push(address);
        Ok(answer)
    }
}

impl Facts for Told<'_> {
    fn is_ours(&mut self, address: usize) -> Result<bool> {
        self.answer(address, self.ours.contains(&address))
    }
    fn goes_on(&mut self, address: usize) -> Result<bool> {
        self.answer(address, self.parts.contains(&address))
    }
    fn outcome(&self, order: &[Event]) -> Option<u64> {
        let mut digest = 0;
        for &page in self.away {
            let now = destination(order, page);
            if is_overwritten(order, page) || now.is_some_and(|now| self.present.contains(&now)) {
                return None;
            }
            digest = u64::wrapping_add(digest, now.unwrap_or(0) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        Some(digest)
    }
}

/// Each with its echo right behind.
fn push_all(log: &mut Log, events: &[Event]) {
    for &event in events {
        log.push(event, || false);
        echo(event).into_iter().for_each(|event| log.push(event, || false));
    }
}

/// The order found for `stretches`, each read whole before anything of the next had begun.
fn ordered_in(stretches: &[&[Event]], facts: &mut Told) -> core::result::Result<Vec<Event>, Doubt> {
    let mut log = Log::new();
    for stretch in stretches {
        push_all(&mut log, stretch);
        log.seals.push(log.read.len());
    }
    log.find_order(facts).map(|is_found| {
        assert!(is_found, "asked for more than there is time for");
        log.happened
    })
}

fn ordered(read: &[Event], ours: &[usize]) -> core::result::Result<Vec<Event>, Doubt> {
    ordered_in(&[read], &mut Told { ours, ..Told::default() })
}

/// What is kept of `events`, each with whether its echo came.
fn noted(events: &[Event]) -> Vec<(Event, bool)> {
    let mut log = Log::new();
    events.iter().for_each(|&event| log.push(event, || false));
    log.read.iter().map(|noted| (noted.event, noted.has_echo)).collect()
}

#[test]
fn the_old_place_of_a_move_is_announced_once_more_and_that_is_dropped() {
    let read = noted(&[moved(A, C), moved(B, A), unmapped(A), unmapped(B), unmapped(A)]);
    assert_eq!(read, [(moved(A, C), true), (moved(B, A), true), (unmapped(A), false)]);
}

#[test]
fn of_equal_moves_each_has_an_echo_of_its_own() {
    let round = [moved(A, B), unmapped(A), moved(B, A), unmapped(B)];
    let read = noted(&[&round[..], &round[..], &[unmapped(A)]].concat());
    let both = [(moved(A, B), true), (moved(B, A), true)];
    assert_eq!(read, [&both[..], &both[..], &[(unmapped(A), false)]].concat());
}

#[test]
fn what_was_unmapped_before_a_move_or_in_part_is_no_echo() {
    let half = Event::Unmap { start: A, end: A + LEN / 2 };
    let read = noted(&[unmapped(A), moved(A, B), half]);
    assert_eq!(read, [(unmapped(A), false), (moved(A, B), false), (half, false)]);
}

#[test]
fn what_was_there_before_leaves_before_the_arrival_that_was_announced_first() {
    let order = ordered(&[moved(B, A), moved(A, C)], &[A, C]);
    assert_eq!(order, Ok(vec![moved(A, C), moved(B, A)]));
    let order = ordered(&[moved(B, A), unmapped(A + LEN), Event::Unmap { start: A, end: A + 2 * LEN }], &[A]);
    let unmapped_both = Event::Unmap { start: A, end: A + 2 * LEN };
    assert_eq!(order, Ok(vec![unmapped_both, moved(B, A), unmapped(A + LEN)]));
}

#[test]
fn what_arrived_and_went_on_stays_in_order() {
    let read = [moved(B, A), moved(A, C)];
    assert_eq!(ordered(&read, &[C]), Ok(read.to_vec()));
    let read = [moved(B, A), moved(A, C), moved(C, A), Event::Unmap { start: A, end: A + 2 * LEN }];
    assert_eq!(ordered(&read, &[]), Ok(read.to_vec()));
}

#[test]
fn what_leaves_an_empty_range_behind_stays_in_order() {
    let mut log = Log::new();
    // MREMAP_DONTUNMAP: A is ours still.
    push_all(&mut log, &[moved(B, A)]);
    log.push(moved(A, C), || false);
    let mut facts = Told { ours: &[A, C], ..Told::default() };
    assert_eq!(log.find_order(&mut facts), Ok(true));
    assert_eq!(log.happened, [moved(B, A), moved(A, C)]);
}

#[test]
fn what_came_back_is_what_left() {
    let row = [moved(E, A), moved(A, C), moved(C, A)];
    let order = ordered(&[&row[..], &[moved(B, A), moved(A, D)]].concat(), &[A, D]);
    assert_eq!(order, Ok([&row[..], &[moved(A, D), moved(B, A)]].concat()));
}

#[test]
fn of_a_row_the_pages_tell_who_was_there_before() {
    // One of the two that left A had been there; what came from B left by the other, and what came from C is there.
    let read = [moved(B, A), moved(A, D), moved(C, A), moved(A, E)];
    let away = [B + PAGE, A + 2 * PAGE];
    let order = |present: &[usize]| {
        ordered_in(&[&read], &mut Told { ours: &[A, D, E], away: &away, present, ..Told::default() })
    };
    let late_first = vec![moved(A, E), moved(B, A), moved(A, D), moved(C, A)];
    assert_eq!(order(&[E + PAGE, D + 2 * PAGE]), Ok(late_first));
    let late_second = vec![moved(A, D), moved(B, A), moved(A, E), moved(C, A)];
    assert_eq!(order(&[D + PAGE, E + 2 * PAGE]), Ok(late_second));
    assert_eq!(order(&[]), Err(Doubt));
}

#[test]
fn three_ranges_in_a_row_are_untangled() {
    // C left for D, then B came to C, then A came to B; read backwards.
    let order = ordered(&[moved(A, B), moved(B, C), moved(C, D)], &[B, C, D]);
    assert_eq!(order, Ok(vec![moved(C, D), moved(B, C), moved(A, B)]));
}

#[test]
fn of_two_that_left_after_one_arrival_the_pages_tell_who_was_there_before() {
    // Page 1 of what came from B, page 2 of what was at A were away. One of the two went to C, one to D.
    let away = [B + PAGE, A + 2 * PAGE];
    let read = [moved(B, A), moved(A, C), moved(A, D)];
    let order = |present: &[usize]| ordered_in(&[&read], &mut Told { away: &away, present, ..Told::default() });
    assert_eq!(order(&[C + PAGE, D + 2 * PAGE]), Ok(vec![moved(A, C), moved(B, A), moved(A, D)]));
    assert_eq!(order(&[D + PAGE, C + 2 * PAGE]), Ok(vec![moved(A, D), moved(B, A), moved(A, C)]));
    assert_eq!(order(&[]), Err(Doubt), "both look alike");
    assert_eq!(order(&[C + PAGE, C + 2 * PAGE, D + PAGE, D + 2 * PAGE]), Err(Doubt), "neither can be");
}

#[test]
fn pieces_of_an_arrival_that_are_unmapped_one_by_one_do_not_contradict_each_other() {
    let half = LEN / 2;
    let pieces = [Event::Unmap { start: A, end: A + half }, Event::Unmap { start: A + half, end: A + LEN }];
    let read = [moved(B, A), pieces[0], pieces[1]];
    assert_eq!(ordered(&read, &[]), Ok(read.to_vec()));
}

#[test]
fn what_grew_where_it_arrived_may_leave_whole() {
    // mremap(2) is announced with the old length.
    let grown = Event::Remap { from: A, to: C, len: 2 * LEN };
    let read = [moved(B, A), grown, moved(D, A), Event::Remap { from: A, to: E, len: 2 * LEN }];
    assert_eq!(ordered(&read, &[C, E]), Ok(read.to_vec()));
}

#[test]
fn an_answer_that_has_to_wait_finds_nothing() {
    let mut log = Log::new();
    push_all(&mut log, &[moved(B, A), moved(A, C)]);
    assert_eq!(log.find_order(&mut Told { patience: Some(0), ..Told::default() }), Ok(false));
}

#[test]
fn what_began_after_all_was_read_did_not_happen_before() {
    let read = [moved(B, A), moved(A, C)];
    let mut facts = Told { ours: &[A, C], ..Told::default() };
    assert_eq!(ordered_in(&[&read], &mut facts), Ok(vec![moved(A, C), moved(B, A)]));
    assert_eq!(ordered_in(&[&read[..1], &read[1..]], &mut facts), Ok(read.to_vec()));
}

#[test]
fn what_happened_later_tells_what_was_there_when_all_was_read() {
    let read = [moved(B, A), moved(A, C)];
    // Something left A once more; something else came there.
    let order = ordered_in(&[&read, &[moved(A, D)]], &mut Told { ours: &[C, D], ..Told::default() });
    assert_eq!(order, Ok(vec![moved(A, C), moved(B, A), moved(A, D)]));
    let order = ordered_in(&[&read, &[moved(D, A)]], &mut Told { ours: &[A, C], ..Told::default() });
    assert_eq!(order, Ok(vec![moved(B, A), moved(A, C), moved(D, A)]));
}

#[test]
fn a_part_of_what_arrived_may_have_been_there_before() {
    let half = LEN / 2;
    let part = Event::Remap { from: A + half, to: C, len: half };
    assert_eq!(ordered(&[moved(B, A), part], &[A, A + half, C]), Ok(vec![part, moved(B, A)]));
    assert_eq!(ordered(&[moved(B, A), part], &[A, C]), Ok(vec![moved(B, A), part]));
}

#[test]
fn facts_that_no_order_explains_are_in_doubt() {
    assert_eq!(ordered(&[moved(A, B), moved(B, A)], &[B]), Err(Doubt));
    assert_eq!(ordered(&[moved(B, A), moved(C, A)], &[A]), Err(Doubt));
}

#[test]
fn what_was_unmapped_or_left_empty_later_does_not_tell_what_was_there() {
    let read = [moved(B, A), moved(A, C)];
    let unmapped_both = [Event::Unmap { start: A, end: A + 2 * LEN }];
    let away = [B + PAGE];
    let order = |present: &[usize]| {
        ordered_in(&[&read, &unmapped_both], &mut Told { ours: &[C], away: &away, present, ..Told::default() })
    };
    assert_eq!(order(&[]), Err(Doubt));
    assert_eq!(order(&[C + PAGE]), Ok(vec![moved(A, C), moved(B, A), unmapped_both[0]]));
    // MREMAP_DONTUNMAP from A, which is ours still: what came from D found it free.
    let mut log = Log::new();
    push_all(&mut log, &read);
    log.seal();
    push_all(&mut log, &[moved(D, A)]);
    log.push(moved(A, E), || false);
    let mut facts = Told { ours: &[A, C, E], away: &away, ..Told::default() };
    assert_eq!(log.find_order(&mut facts), Ok(true));
    assert_eq!(log.happened, [moved(B, A), moved(A, C), moved(D, A), moved(A, E)]);
}

#[test]
fn what_was_left_late_and_what_has_grown_since_are_told_apart() {
    // Either something left A for C late, or what came from B did, and another range has grown over A since.
    let read = [moved(B, A), moved(A, C)];
    let late_first = vec![moved(A, C), moved(B, A)];
    let order = |parts: &[usize], present: &[usize]| {
        let away = [B + 2 * PAGE];
        ordered_in(&[&read], &mut Told { ours: &[A, C], parts, away: &away, present, ..Told::default() })
    };
    assert_eq!(order(&[], &[]), Ok(late_first.clone()), "it has not grown");
    assert_eq!(order(&[A], &[]), Err(Doubt));
    assert_eq!(order(&[A], &[C + 2 * PAGE]), Ok(late_first));
    assert_eq!(order(&[A], &[A + 2 * PAGE]), Ok(read.to_vec()));
}

#[test]
fn more_than_was_there_has_left_only_where_something_has_grown() {
    assert_eq!(ordered(&[moved(A, C), moved(A, D)], &[C, D]), Err(Doubt));
    let unmapped_both = Event::Unmap { start: A, end: A + 2 * LEN };
    assert_eq!(ordered(&[unmapped_both, moved(A, C)], &[C]), Err(Doubt));
    let read = [moved(A, C), moved(A, D), moved(B, A)];
    assert_eq!(ordered(&read, &[A, C, D]), Err(Doubt), "what came there is there still");
    assert_eq!(
        ordered(&[unmapped_both, unmapped_both], &[]),
        Ok(vec![unmapped_both, unmapped_both]),
        "all is gone"
    );
    let order = ordered_in(&[&[moved(A, C)], &[moved(A, D)]], &mut Told::default());
    assert_eq!(order, Ok(vec![moved(A, C), moved(A, D)]), "in this order, whatever has grown");
}

#[test]
fn what_one_of_many_threads_does_to_its_own_ranges_stays_in_order() {
    let half = LEN / 2;
    let as_read = |read: &[Event], ours: &[usize]| assert_eq!(ordered(read, ours), Ok(read.to_vec()));
    // A piece is moved out, and the whole unmapped, hole and all.
    as_read(&[Event::Remap { from: A + half, to: C, len: half }, unmapped(A)], &[C]);
    as_read(&[moved(A, C), Event::Unmap { start: A - LEN, end: A + LEN }, moved(B, A)], &[A, C]);
    // What came before the old place has grown over that, and went on.
    let longer = |from, to| Event::Remap { from, to, len: 2 * LEN };
    as_read(&[moved(A, C), moved(B, A - LEN), longer(A - LEN, E)], &[C, E]);
    as_read(&[unmapped(A + LEN), longer(A, C)], &[C]);
    // MREMAP_DONTUNMAP, more than once.
    let mut log = Log::new();
    for _ in 0..3 {
        log.push(moved(A, C), || false);
        push_all(&mut log, &[moved(C, D), moved(D, E), unmapped(E)]);
    }
    let read: Vec<_> = log.read.iter().map(|noted| noted.event).collect();
    assert_eq!(log.find_order(&mut Told { ours: &[A], ..Told::default() }), Ok(true));
    assert_eq!(log.happened, read);
}

#[test]
fn a_page_that_is_away_was_not_overwritten() {
    // Where what is there may have grown, and where that cannot be told.
    let read = [moved(B, A), moved(A, C)];
    let order = |parts: &[usize], later: &[Event]| {
        let away = [A + PAGE];
        ordered_in(&[&read, later], &mut Told { ours: &[A, C], parts, away: &away, ..Told::default() })
    };
    assert_eq!(order(&[A], &[]), Ok(vec![moved(A, C), moved(B, A)]));
    let unmapped_both = Event::Unmap { start: A, end: A + 2 * LEN };
    assert_eq!(order(&[], &[unmapped_both]), Ok(vec![moved(A, C), moved(B, A), unmapped_both]));
}

#[test]
fn a_mapping_that_begins_where_a_part_of_it_has_left_may_have_grown() {
    let before = Event::Remap { from: A - LEN, to: D, len: LEN };
    let mut facts = Told { ours: &[A, C, D], away: &[B + PAGE], ..Told::default() };
    assert_eq!(ordered_in(&[&[moved(B, A), moved(A, C)], &[before]], &mut facts), Err(Doubt));
}

#[test]
fn what_left_later_with_what_was_before_it_has_grown() {
    let away = [B + PAGE];
    let order = |later| {
        ordered_in(
            &[&[moved(B, A), moved(A, C)], &[later]],
            &mut Told { ours: &[C, E], away: &away, ..Told::default() },
        )
    };
    assert_eq!(order(moved(A, E)), Ok(vec![moved(A, C), moved(B, A), moved(A, E)]));
    let longer = Event::Remap { from: A - LEN, to: D, len: 2 * LEN };
    assert_eq!(order(longer), Err(Doubt));
}

#[test]
fn whose_echo_it_is_may_be_in_doubt() {
    // The last is of the first, but might be of the third, which is MREMAP_DONTUNMAP.
    let mut log = Log::new();
    [moved(A, B), moved(C, A), unmapped(C), moved(A, D), unmapped(A)]
        .into_iter()
        .for_each(|event| log.push(event, || false));
    assert_eq!(log.find_order(&mut Told { ours: &[A, B, D], away: &[C], ..Told::default() }), Err(Doubt));
}

#[test]
fn what_is_known_of_a_place_is_not_asked_again_until_something_touches_it() {
    let mut log = Log::new();
    let asked = |log: &mut Log, ours: &'static [usize]| {
        let mut facts = Told { ours, patience: Some(1), ..Told::default() };
        log.note_quiet(&mut facts);
        (log.find_order(&mut facts), facts.asked)
    };
    push_all(&mut log, &[moved(B, A), moved(A, C), moved(C, D)]);
    // There are two questions, and time for one each time.
    assert_eq!(asked(&mut log, &[D]), (Ok(false), vec![C]));
    assert_eq!(asked(&mut log, &[D]), (Ok(true), vec![A]));
    assert_eq!(asked(&mut log, &[D]), (Ok(true), vec![]));
    push_all(&mut log, &[moved(D, A), moved(A, B)]);
    assert_eq!(asked(&mut log, &[A, B]), (Ok(false), vec![A]), "something else may be there now");
    assert_eq!(asked(&mut log, &[A, B]), (Ok(true), vec![A]), "and whether it begins there");
    assert_eq!(asked(&mut log, &[A, B]), (Ok(true), vec![]));
    assert_eq!(log.happened[3..], [moved(A, B), moved(D, A)]);
}

#[test]
fn an_answer_that_there_is_no_room_for_stays_unknown() {
    let mut log = Log::new();
    push_all(&mut log, &[moved(B, A), moved(A, C)]);
    log.known = (0..MAX_CHANGES).map(|address| (address, Found::Nothing)).collect();
    let mut facts = Told { ours: &[A, C], away: &[B], ..Told::default() };
    assert_eq!(log.find_order(&mut facts), Err(Doubt));
    assert_eq!(facts.asked, [A]);
}

#[test]
fn the_order_of_thousands_that_one_thread_made_is_that_of_reading() {
    let to_and_fro = |at: usize| if at.is_multiple_of(2) { moved(A, B) } else { moved(B, A) };
    let onwards = |at: usize| moved(A + at * LEN, A + (at + 1) * LEN);
    for read in [(0..2000).map(to_and_fro).collect::<Vec<_>>(), (0..2000).map(onwards).collect()] {
        let mut log = Log::new();
        push_all(&mut log, &read);
        let ours = [if read[1] == moved(B, A) { A } else { A + 2000 * LEN }];
        let mut facts = Told { ours: &ours, ..Told::default() };
        // There is no room for all questions at once.
        while !log.find_order(&mut facts).unwrap() {}
        assert!(log.happened == read);
    }
}

#[test]
fn what_the_only_thread_does_stays_in_order() {
    // Something has grown over A since, which is not announced.
    let mut log = Log::new();
    [moved(B, A), unmapped(B), moved(A, C), unmapped(A)].into_iter().for_each(|event| log.push(event, || true));
    assert_eq!(log.find_order(&mut Told { ours: &[A, C], ..Told::default() }), Ok(true));
    assert_eq!(log.happened, [moved(B, A), moved(A, C)]);
    assert!(log.read.iter().all(|noted| noted.has_echo));
}

#[test]
fn what_is_unmapped_after_all_was_read_is_no_echo_of_what_was_moved_before() {
    let mut log = Log::new();
    // MREMAP_DONTUNMAP.
    log.push(moved(A, D), || false);
    log.note_quiet(&mut Told::default());
    log.push(unmapped(A), || false);
    assert_eq!(log.read.iter().map(|noted| noted.event).collect::<Vec<_>>(), [moved(A, D), unmapped(A)]);
}

/// Pages of a place; half of them may move alone.
const PAGES: usize = 4;
const WIDTH: usize = PAGES * PAGE;
/// Two of them, twice, next to each other.
const PLACES: [usize; 5] = [A, A + WIDTH, B, B + WIDTH, C];

/// A page that is mapped.
#[derive(Clone, Copy)]
struct Mapped {
    /// Unless it is empty.
    name: Option<usize>,
    mapping: usize,
}

/// Threads that move, unmap and grow the same ranges, what really happens, and what is read of it.
struct World {
    rng: u64,
    mapped: BTreeMap<usize, Mapped>,
    mappings: usize,
    /// Where each page was before anything in the log.
    was: BTreeMap<usize, usize>,
    /// Which pages are away, by name.
    away: Vec<bool>,
    /// Who brought what is at an address: nobody else knows until that is read.
    mover: BTreeMap<usize, usize>,
    /// What each thread has done that was not read: it goes on when that is over.
    unread: Vec<VecDeque<Event>>,
    log: Log,
    /// Whether ranges move whole only.
    is_whole: bool,
    grows: bool,
    /// Addresses that something in the log has unmapped: nothing grows over them.
    unmapped: BTreeSet<usize>,
}

impl World {
    fn new(seed: u64, threads: usize) -> Self {
        let mut world = Self {
            rng: seed,
            mapped: BTreeMap::new(),
            mappings: PLACES.len(),
            was: BTreeMap::new(),
            away: Vec::new(),
            mover: BTreeMap::new(),
            unread: vec![VecDeque::new(); threads],
            log: Log::new(),
            is_whole: seed.is_multiple_of(2),
            grows: seed % 4 > 1,
            unmapped: BTreeSet::new(),
        };
        for (mapping, place) in PLACES.into_iter().step_by(2).enumerate() {
            for page in 0..PAGES {
                world.mapped.insert(place + page * PAGE, Mapped { name: Some(world.away.len()), mapping });
                let is_away = world.below(2) == 0;
                world.away.push(is_away);
            }
        }
        world.begin();
        world
    }

    fn begin(&mut self) {
        self.log.clear();
        self.unmapped.clear();
        self.was = self.mapped.iter().filter_map(|(&at, page)| Some((page.name?, at))).collect();
    }

    fn below(&mut self, bound: usize) -> usize {
        // SplitMix64.
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.rng ^ self.rng >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) as usize % bound
    }

    fn any_range(&mut self) -> Range<usize> {
        let place = PLACES[self.below(PLACES.len())];
        let len = if self.is_whole || self.below(2) == 0 { PAGES } else { PAGES / 2 };
        let start = if len < PAGES { self.below(2) * len } else { 0 };
        place + start * PAGE..place + (start + len) * PAGE
    }

    /// Whether nobody has to hear first of what is there.
    fn is_known(&self, page: usize) -> bool {
        self.mover.get(&page).is_none_or(|&mover| self.unread[mover].is_empty())
    }

    fn is_one(&self, range: &Range<usize>) -> bool {
        let mapping = |page| self.mapped.get(&page).map(|page| page.mapping);
        let first = mapping(range.start);
        first.is_some() && range.clone().step_by(PAGE).all(|page| mapping(page) == first && self.is_known(page))
    }

    fn is_free(&self, range: &Range<usize>) -> bool {
        range.clone().step_by(PAGE).all(|page| !self.mapped.contains_key(&page))
    }

    fn has_been_unmapped(&self, range: &Range<usize>) -> bool {
        self.unread.len() > 1 && range.clone().step_by(PAGE).any(|page| self.unmapped.contains(&page))
    }

    /// What a mapping is made longer by is empty.
    fn extend(&mut self, range: Range<usize>, mapping: usize) {
        for page in range.step_by(PAGE) {
            self.mapped.insert(page, Mapped { name: None, mapping });
        }
    }

    /// What is behind becomes a mapping of its own.
    fn split(&mut self, behind: usize, mapping: usize) {
        self.mappings += 1;
        for (_, page) in self.mapped.range_mut(behind..).filter(|(_, page)| page.mapping == mapping) {
            page.mapping = self.mappings;
        }
    }

    /// A thread that waits for nothing moves a range to a free place, or unmaps it, or lets it grow.
    fn act(&mut self, thread: usize) {
        let (from, to) = (self.any_range(), self.any_range());
        if !self.unread[thread].is_empty() {
            return;
        }
        // In place, which is not announced.
        if self.grows && self.below(4) == 0 {
            let before = from.start - PAGE;
            if self.is_one(&(before..from.start))
                && self.is_free(&from)
                && !self.has_been_unmapped(&from)
                && !self.is_outside(from.start)
            {
                from.clone().step_by(PAGE).for_each(|page| _ = self.mover.remove(&page));
                self.extend(from, self.mapped[&before].mapping);
            }
            return;
        }
        if !self.is_one(&from) {
            return;
        }
        let mapping = self.mapped[&from.start].mapping;
        let unmapped = Event::Unmap { start: from.start, end: from.end };
        if self.below(16) == 0 {
            // Told from an echo by a page more, which never was ours.
            if !self.is_outside(from.end) {
                return;
            }
            self.split(from.end, mapping);
            for page in from.clone().step_by(PAGE) {
                self.mapped.remove(&page);
                self.unmapped.insert(page);
            }
            self.unread[thread].push_back(Event::Unmap { start: from.start, end: from.end + PAGE });
            return;
        }
        if to.len() < from.len() || to.len() > from.len() && !self.grows || !self.is_free(&to) {
            return;
        }
        if self.has_been_unmapped(&(to.start + from.len().min(to.len())..to.end)) {
            return;
        }
        let leaves_empty = to.len() == from.len() && self.below(8) == 0;
        self.split(from.end, mapping);
        self.mappings += 1;
        let moved = self.mappings;
        for page in from.clone().step_by(PAGE) {
            let Mapped { name, .. } = self.mapped.remove(&page).unwrap();
            let now = page - from.start + to.start;
            self.mapped.insert(now, Mapped { name, mapping: moved });
            self.mover.insert(now, thread);
            if leaves_empty {
                self.mapped.insert(page, Mapped { name: None, mapping });
                self.mover.insert(page, thread);
            }
        }
        let longer = to.start + from.len()..to.end;
        longer.clone().step_by(PAGE).for_each(|page| _ = self.mover.insert(page, thread));
        self.extend(longer, moved);
        // Where it goes on from what is before, the two become one.
        if let Some(&Mapped { mapping, .. }) = self.mapped.get(&(to.start - PAGE))
            && self.below(8) == 0
        {
            self.mapped.values_mut().filter(|page| page.mapping == moved).for_each(|page| page.mapping = mapping);
        }
        self.unread[thread].push_back(Event::Remap { from: from.start, to: to.start, len: from.len() });
        if !leaves_empty {
            self.unread[thread].push_back(unmapped);
        }
    }

    /// Whether an address is behind all places that are next to each other.
    fn is_outside(&self, address: usize) -> bool {
        PLACES.iter().all(|place| !(*place..place + WIDTH).contains(&address))
    }

    fn read(&mut self, thread: usize) {
        let is_alone = self.unread.len() == 1;
        if let Some(event) = self.unread[thread].pop_front() {
            self.log.push(event, || is_alone);
        }
    }

    fn is_quiet(&self) -> bool {
        self.unread.iter().all(VecDeque::is_empty)
    }

    /// All was read, and there is time for so many questions. Whether the order was found.
    fn settle(&mut self, patience: usize) -> core::result::Result<bool, Doubt> {
        let ours: Vec<usize> = self.mapped.keys().copied().collect();
        let mapping = |at: usize| self.mapped.get(&at).map(|page| page.mapping);
        let parts: Vec<usize> = ours.iter().copied().filter(|at| mapping(at - PAGE) == mapping(*at)).collect();
        let away: Vec<usize> = self.was.iter().filter(|&(&name, _)| self.away[name]).map(|(_, &at)| at).collect();
        let is_present = |name: Option<usize>| name.is_some_and(|name| !self.away[name]);
        let present: Vec<usize> =
            self.mapped.iter().filter(|(_, page)| is_present(page.name)).map(|(&at, _)| at).collect();
        let mut facts = Told {
            ours: &ours,
            parts: &parts,
            away: &away,
            present: &present,
            patience: Some(patience),
            ..Told::default()
        };
        self.log.note_quiet(&mut facts);
        if !self.log.find_order(&mut facts)? {
            return Ok(false);
        }
        for (&name, &was) in self.was.iter().filter(|&(&name, _)| self.away[name]) {
            let now = self.mapped.iter().find(|(_, page)| page.name == Some(name)).map(|(&at, _)| at);
            let found = destination(&self.log.happened, was);
            assert!(!is_overwritten(&self.log.happened, was), "{:x?}", self.log.happened);
            let read: Vec<_> = self.log.read.iter().map(|noted| (noted.event, noted.has_echo)).collect();
            assert_eq!(
                found, now,
                "page {name}, from {was:#x}: {:x?} of {read:x?}, {:?}",
                self.log.happened, self.log.seals
            );
        }
        self.begin();
        Ok(true)
    }
}

/// How often the order was found, and how often it was in doubt, where so many threads move the same ranges.
fn run_worlds(threads: usize, seeds: Range<u64>) -> (usize, usize) {
    let (mut found, mut doubted) = (0, 0);
    for seed in seeds {
        let mut world = World::new(seed, threads);
        let mut settle = |world: &mut World, patience| match world.settle(patience) {
            Ok(is_done) => found += usize::from(is_done),
            Err(Doubt) => {
                doubted += 1;
                world.begin();
            }
        };
        for _ in 0..4 {
            for _ in 0..24 {
                let thread = world.below(threads);
                if world.below(3) == 0 {
                    world.read(thread)
                } else {
                    world.act(thread)
                }
                // Now and then all is quiet by itself, with time for a question or for none.
                if world.is_quiet() && !world.log.read.is_empty() && world.below(3) == 0 {
                    let patience = world.below(2);
                    settle(&mut world, patience);
                }
            }
            while !world.is_quiet() {
                let thread = world.below(threads);
                world.read(thread);
            }
            settle(&mut world, 100);
        }
    }
    (found, doubted)
}

#[test]
fn what_one_thread_did_is_never_in_doubt() {
    assert_eq!(run_worlds(1, 0..3000).1, 0);
}

#[test]
fn what_really_happened_is_found_or_in_doubt() {
    for threads in 2..5 {
        let (found, doubted) = run_worlds(threads, 0..4000);
        assert!(doubted * 10 < found, "{threads} threads: {doubted} in doubt, {found} found");
    }
}
