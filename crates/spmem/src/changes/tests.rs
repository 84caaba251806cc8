extern crate std;
use super::*;
use spmem_sys::Errno;
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
    is_busy: bool,
}

impl Facts for Told<'_> {
    fn is_ours(&self, address: usize) -> Result<bool> {
        if self.is_busy { Err(Errno::EAGAIN) } else { Ok(self.ours.contains(&address)) }
    }
    fn outcome(&self, order: &[Event]) -> Option<u64> {
        let mut digest = 0;
        for &page in self.away {
            let now = destination(order, page);
            if now.is_some_and(|now| self.present.contains(&now)) {
                return None;
            }
            digest = digest * 31 + now.unwrap_or(0) as u64;
        }
        Some(digest)
    }
}

fn ordered(mut changes: Vec<Event>, ours: &[usize]) -> core::result::Result<Vec<Event>, Doubt> {
    put_in_order(&mut changes, &Told { ours, ..Told::default() }).map(|_| changes)
}

#[test]
fn the_old_place_of_a_move_is_announced_once_more_and_that_is_dropped() {
    let mut changes = vec![moved(A, C), moved(B, A), unmapped(A), unmapped(B), unmapped(A)];
    drop_echoes(&mut changes);
    assert_eq!(changes, [moved(A, C), moved(B, A), unmapped(A)]);
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
        put_in_order(&mut changes, &Told { away: &away, present, ..Told::default() }).map(|_| changes)
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
    assert_eq!(put_in_order(&mut changes, &Told { is_busy: true, ..Told::default() }), Ok(false));
    assert_eq!(changes, [moved(B, A), moved(A, C)]);
}
