extern crate std;
use super::*;
use spmem_sys::Errno;
use std::collections::VecDeque;
use std::vec;

const A: usize = 0x10_0000;
const B: usize = 0x20_0000;
const C: usize = 0x30_0000;
const D: usize = 0x40_0000;
const LEN: usize = 16 * PAGE;

fn moved(from: usize, to: usize) -> Event {
    Event::Remap { from, to, len: LEN }
}
fn unmapped(start: usize) -> Event {
    Event::Unmap { start, end: start + LEN }
}
/// What is ours, which pages were away before, which are present now.
#[derive(Default)]
struct Told<'a> {
    ours: &'a [usize],
    away: &'a [usize],
    present: &'a [usize],
    /// How many questions there is time for.
    patience: Option<usize>,
    asked: Vec<usize>,
}

impl Facts for Told<'_> {
    fn is_ours(&mut self, address: usize) -> Result<bool> {
        if self.patience.is_some_and(|most| self.asked.len() >= most) {
            return Err(Errno::EAGAIN);
        }
        self.asked.push(address);
        Ok(self.ours.contains(&address))
    }
    fn outcome(&self, order: &[Event]) -> Option<u64> {
        let mut digest = 0;
        for &page in self.away {
            let now = destination(order, page);
            if now.is_some_and(|now| self.present.contains(&now)) {
                return None;
            }
            digest = u64::wrapping_add(digest, now.unwrap_or(0) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        Some(digest)
    }
}

fn ordered(mut changes: Vec<Event>, ours: &[usize]) -> core::result::Result<Vec<Event>, Doubt> {
    put_in_order(&mut changes, &Seals(Vec::new()), &mut Told { ours, ..Told::default() }).map(|_| changes)
}

/// What is kept of `events`, each with whether its echo came.
fn noted(events: &[Event]) -> Vec<(Event, bool)> {
    let mut changes = Changes::new();
    events.iter().for_each(|&event| changes.push(event));
    changes.read.iter().map(|noted| (noted.event, noted.has_echo)).collect()
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
    let order = ordered(vec![moved(B, A), moved(A, C)], &[A, C]);
    assert_eq!(order, Ok(vec![moved(A, C), moved(B, A)]));
    let order = ordered(vec![moved(B, A), unmapped(A)], &[A]);
    assert_eq!(order, Ok(vec![unmapped(A), moved(B, A)]));
}

#[test]
fn what_arrived_and_went_on_stays_in_order() {
    let order = ordered(vec![moved(B, A), moved(A, C)], &[C]);
    assert_eq!(order, Ok(vec![moved(B, A), moved(A, C)]));
    let order = ordered(vec![moved(B, A), moved(A, C), moved(C, A), unmapped(A)], &[]);
    assert_eq!(order, Ok(vec![moved(B, A), moved(A, C), moved(C, A), unmapped(A)]));
}

#[test]
fn one_that_comes_and_goes_many_times_does_not_hide_who_was_there_before() {
    let read = vec![moved(B, A), moved(A, C), moved(C, A), moved(A, D)];
    let order = ordered(read, &[A, D]);
    assert_eq!(order, Ok(vec![moved(A, D), moved(B, A), moved(A, C), moved(C, A)]));
}

#[test]
fn three_ranges_in_a_row_are_untangled() {
    // C left for D, then B came to C, then A came to B; read backwards.
    let order = ordered(vec![moved(A, B), moved(B, C), moved(C, D)], &[B, C, D]);
    assert_eq!(order, Ok(vec![moved(C, D), moved(B, C), moved(A, B)]));
}

#[test]
fn of_two_that_left_after_one_arrival_the_pages_tell_who_was_there_before() {
    // Page 1 of what came from B, page 2 of what was at A were away. One of the two went to C, one to D.
    let away = [B + PAGE, A + 2 * PAGE];
    let read = vec![moved(B, A), moved(A, C), moved(A, D)];
    let order = |present: &[usize]| {
        let mut changes = read.clone();
        put_in_order(&mut changes, &Seals(Vec::new()), &mut Told { away: &away, present, ..Told::default() })
            .map(|_| changes)
    };
    assert_eq!(order(&[C + PAGE, D + 2 * PAGE]), Ok(vec![moved(A, C), moved(B, A), moved(A, D)]));
    assert_eq!(order(&[D + PAGE, C + 2 * PAGE]), Ok(vec![moved(A, D), moved(B, A), moved(A, C)]));
    assert_eq!(order(&[]), Err(Doubt), "both look alike");
    assert_eq!(order(&[C + PAGE, C + 2 * PAGE]), Err(Doubt), "neither can be");
}

#[test]
fn pieces_of_an_arrival_that_are_unmapped_one_by_one_do_not_contradict_each_other() {
    let half = LEN / 2;
    let pieces = [Event::Unmap { start: A, end: A + half }, Event::Unmap { start: A + half, end: A + LEN }];
    let read = vec![moved(B, A), pieces[0], pieces[1]];
    assert_eq!(ordered(read.clone(), &[]), Ok(read));
}

#[test]
fn an_answer_that_has_to_wait_changes_nothing() {
    let mut changes = vec![moved(B, A), moved(A, C)];
    assert_eq!(
        put_in_order(&mut changes, &Seals(Vec::new()), &mut Told { patience: Some(0), ..Told::default() }),
        Ok(false)
    );
    assert_eq!(changes, [moved(B, A), moved(A, C)]);
}

/// The order found for `stretches`, each read whole before anything of the next had begun.
fn ordered_in(stretches: &[&[Event]], ours: &[usize]) -> core::result::Result<Vec<Event>, Doubt> {
    let mut changes = Changes::new();
    let mut facts = Told { ours, ..Told::default() };
    for &stretch in stretches {
        for &event in stretch {
            changes.push(event);
            echo(event).into_iter().for_each(|event| changes.push(event));
        }
        changes.seals.set(changes.read.len());
    }
    changes.try_order(&mut facts).map(|_| changes.ordered)
}

#[test]
fn what_began_after_all_was_read_did_not_happen_before() {
    let read = [moved(B, A), moved(A, C)];
    assert_eq!(ordered_in(&[&read], &[A, C]), Ok(vec![moved(A, C), moved(B, A)]));
    assert_eq!(ordered_in(&[&read[..1], &read[1..]], &[A, C]), Ok(read.to_vec()));
}

#[test]
fn a_row_begins_no_earlier_than_all_was_read() {
    let before = [moved(D, A), moved(A, C), moved(C, A)];
    let order = ordered_in(&[&before, &[moved(B, A), moved(A, D)]], &[A, D]);
    assert_eq!(order, Ok([&before[..], &[moved(A, D), moved(B, A)]].concat()));
}

#[test]
fn what_happened_later_tells_what_was_there_when_all_was_read() {
    let read = [moved(B, A), moved(A, C)];
    // Something left A once more; something else came there.
    let order = ordered_in(&[&read, &[unmapped(A)]], &[C]);
    assert_eq!(order, Ok(vec![moved(A, C), moved(B, A), unmapped(A)]));
    let order = ordered_in(&[&read, &[moved(D, A)]], &[A, C]);
    assert_eq!(order, Ok(vec![moved(B, A), moved(A, C), moved(D, A)]));
}

#[test]
fn an_address_where_nothing_is_left_is_asked_for_once_until_something_arrives() {
    let mut changes = Changes::new();
    let asked = |changes: &mut Changes, ours: &'static [usize]| {
        let mut facts = Told { ours, patience: Some(1), ..Told::default() };
        changes.note_quiet(&mut facts);
        (changes.try_order(&mut facts), facts.asked)
    };
    [moved(B, A), moved(A, C), moved(C, D)].into_iter().for_each(|event| changes.push(event));
    // There are two questions, and time for one each time.
    assert_eq!(asked(&mut changes, &[D]), (Ok(false), vec![C]));
    assert_eq!(asked(&mut changes, &[D]), (Ok(true), vec![A]));
    assert_eq!(asked(&mut changes, &[D]), (Ok(true), vec![]));
    [moved(D, A), moved(A, B)].into_iter().for_each(|event| changes.push(event));
    assert_eq!(asked(&mut changes, &[A, B]), (Ok(true), vec![A]), "something else may be there now");
    assert_eq!(changes.ordered[3..], [moved(A, B), moved(D, A)]);
}

/// Threads that move and unmap the same ranges, what really happens, and what is read of it.
struct World {
    rng: u64,
    /// Which pages of a range are away.
    away: Vec<[bool; 4]>,
    /// Where each range is.
    at: Vec<Option<usize>>,
    /// Who moved it last: nobody else knows where it is until that is read.
    mover: Vec<usize>,
    /// Where each range was before anything in the list.
    was: Vec<Option<usize>>,
    /// What each thread has done that was not read: it goes on when that is over.
    unread: Vec<VecDeque<Event>>,
    changes: Changes,
}

const PLACES: [usize; 5] = [A, B, C, D, 0x50_0000];
const SHORT: usize = 4 * PAGE;

impl World {
    fn new(seed: u64, threads: usize) -> Self {
        let at = vec![Some(A), Some(B), Some(C)];
        let mut world = Self {
            rng: seed,
            away: Vec::new(),
            was: at.clone(),
            at,
            mover: vec![0; 3],
            unread: vec![VecDeque::new(); threads],
            changes: Changes::new(),
        };
        world.away = (0..3).map(|_| core::array::from_fn(|_| world.below(2) == 0)).collect();
        world
    }

    fn below(&mut self, bound: usize) -> usize {
        // SplitMix64.
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.rng ^ self.rng >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) as usize % bound
    }

    /// A thread with nothing to wait for moves a range to a free place, or unmaps it.
    fn act(&mut self, thread: usize) {
        let range = self.below(self.at.len());
        let is_known = self.unread[thread].is_empty() && self.unread[self.mover[range]].is_empty();
        let Some(from) = self.at[range].filter(|_| is_known) else { return };
        self.mover[range] = thread;
        let free: Vec<usize> = PLACES.into_iter().filter(|&place| !self.at.contains(&Some(place))).collect();
        let gone = Event::Unmap { start: from, end: from + SHORT };
        if self.below(16) == 0 {
            self.at[range] = None;
        } else {
            let to = free[self.below(free.len())];
            self.at[range] = Some(to);
            self.unread[thread].push_back(Event::Remap { from, to, len: SHORT });
        }
        self.unread[thread].push_back(gone);
    }

    fn read(&mut self, thread: usize) {
        if let Some(event) = self.unread[thread].pop_front() {
            self.changes.push(event);
        }
    }

    fn is_quiet(&self) -> bool {
        self.unread.iter().all(VecDeque::is_empty)
    }

    /// Addresses of the pages that were away before, or are present now.
    fn pages(&self, at: &[Option<usize>], is_away: bool) -> Vec<usize> {
        let ranges = at.iter().zip(&self.away);
        let pages = ranges.filter_map(|(&start, away)| Some((start?, away)));
        pages
            .flat_map(|(start, away)| {
                (0..4).filter(|&page| away[page] == is_away).map(move |page| start + page * PAGE)
            })
            .collect()
    }

    /// All was read, and there is time for so many questions. Whether the order was found.
    fn settle(&mut self, patience: usize) -> core::result::Result<bool, Doubt> {
        let ours: Vec<usize> = self.at.iter().copied().flatten().collect();
        let (away, present) = (self.pages(&self.was, true), self.pages(&self.at, false));
        let mut facts =
            Told { ours: &ours, away: &away, present: &present, patience: Some(patience), ..Told::default() };
        self.changes.note_quiet(&mut facts);
        if !self.changes.try_order(&mut facts)? {
            return Ok(false);
        }
        for (range, away) in self.away.iter().enumerate() {
            for page in (0..4).filter(|&page| away[page]).map(|page| page * PAGE) {
                let Some(was) = self.was[range] else { continue };
                let now = destination(&self.changes.ordered, was + page);
                let read: Vec<Event> = self.changes.read.iter().map(|noted| noted.event).collect();
                assert_eq!(
                    now,
                    self.at[range].map(|at| at + page),
                    "range {range}, {:x?} of {read:x?}",
                    self.changes.ordered
                );
            }
        }
        self.changes.clear();
        self.was.clone_from(&self.at);
        Ok(true)
    }
}

/// How often of how many the order was found, where so many threads move the same ranges.
fn run_worlds(threads: usize, seeds: core::ops::Range<u64>) -> (usize, usize) {
    let (mut found, mut doubted) = (0, 0);
    for seed in seeds {
        let mut world = World::new(seed, threads);
        'world: for _ in 0..4 {
            for _ in 0..12 {
                let thread = world.below(threads);
                if world.below(2) == 0 {
                    world.act(thread)
                } else {
                    world.read(thread)
                }
                // Now and then all is quiet by itself, with time for a question or for none.
                if world.is_quiet() && !world.changes.read.is_empty() && world.below(3) == 0 {
                    let patience = world.below(2);
                    match world.settle(patience) {
                        Ok(is_done) => found += usize::from(is_done),
                        Err(Doubt) => {
                            doubted += 1;
                            break 'world;
                        }
                    }
                }
            }
            while !world.is_quiet() {
                let thread = world.below(threads);
                world.read(thread);
            }
            match world.settle(100) {
                Ok(is_done) => {
                    assert!(is_done, "asked for ever");
                    found += 1;
                }
                Err(Doubt) => {
                    doubted += 1;
                    break;
                }
            }
        }
    }
    (found, doubted)
}

#[test]
fn where_two_threads_move_the_same_ranges_what_really_happened_is_found() {
    assert_eq!(run_worlds(1, 0..2000).1, 0);
    let (found, doubted) = run_worlds(2, 0..5000);

    assert!(doubted * 20 < found, "{doubted} in doubt, {found} found");
}

#[test]
fn where_more_do_it_is_found_or_in_doubt() {
    let (found, doubted) = run_worlds(4, 0..5000);

    assert!(doubted < found, "{doubted} in doubt, {found} found");
}

#[test]
fn what_came_back_before_is_what_left() {
    const E: usize = 0x50_0000;
    let row = [moved(E, A), moved(A, C), moved(C, A)];
    let order = ordered([&row[..], &[moved(B, A), moved(A, D)]].concat(), &[A, D]);
    assert_eq!(order, Ok([&row[..], &[moved(A, D), moved(B, A)]].concat()));
}
