//! What churn leaves of the huge frames: how many can still be had, and what it would take to make the others whole.
//!
//! [`churn`] runs the protocol on one side and gives [`Fragments`]; [`print()`] shows those of all sides. What is in pieces is
//! counted from the frames that the protocol holds, so it means the same for every side; what can be had, by taking it.

use super::sides::Side;
use super::{FRAMES, HUGE_FRAMES, HUGE_ORDER, Random, shuffle};
use crate::figures::{Table, short};

/// Huge frames that are partly free, by how much of them is free: this many classes of equal width.
const CLASSES: usize = 8;

/// How free frames lie after churn.
#[derive(Clone)]
pub(super) struct Fragments {
    /// Huge frames that could be taken, per cent of what the free frames could make.
    pub(super) recovered: f64,
    /// Frames in use.
    held: usize,
    /// The fewest frames that have to move until the free ones make as many huge frames as they can.
    moves: usize,
    /// Huge frames without any frame in use, and without a free one.
    whole: usize,
    full: usize,
    /// The others, those that are least free first.
    partly: [usize; CLASSES],
}

/// Fill, free half at random, then rounds of freeing and taking 10 %. Caches stay as they are.
pub(super) fn churn<S: Side>(side: &S, rounds: usize) -> Fragments {
    let (mut handle, mut random) = (side.handle(), Random(1));
    let mut held: Vec<usize> = std::iter::from_fn(|| side.alloc(&mut handle, 0)).collect();
    let all = held.len();
    shuffle(&mut held, &mut random);
    held.drain(all / 2..).for_each(|frame| side.free(&mut handle, frame, 0));
    for _ in 0..rounds {
        shuffle(&mut held, &mut random);
        let kept = held.len() - all / 20;
        held.drain(kept..).for_each(|frame| side.free(&mut handle, frame, 0));
        held.extend((0..all / 20).map_while(|_| side.alloc(&mut handle, 0)));
    }
    let possible = (all - held.len()) / HUGE_FRAMES;
    let taken = std::iter::from_fn(|| side.alloc(&mut handle, HUGE_ORDER)).count();
    Fragments { recovered: taken as f64 * 100.0 / possible as f64, ..count(&held, FRAMES / HUGE_FRAMES) }
}

/// How the frames in use lie in so many huge frames.
fn count(held: &[usize], huge_frames: usize) -> Fragments {
    let mut used = vec![0_usize; huge_frames];
    held.iter().for_each(|frame| used[frame / HUGE_FRAMES] += 1);
    used.sort_unstable_by(|a, b| b.cmp(a));
    // What is in use fits into so many huge frames. To keep the fullest of them moves the least: every frame elsewhere
    // has to move, and none twice.
    let stay: usize = used.iter().take(held.len().div_ceil(HUGE_FRAMES)).sum();
    let mut partly = [0; CLASSES];
    for &used in used.iter().filter(|&&used| used % HUGE_FRAMES != 0) {
        partly[(HUGE_FRAMES - used) * CLASSES / HUGE_FRAMES] += 1;
    }
    let of = |wanted| used.iter().filter(|&&used| used == wanted).count();
    Fragments {
        recovered: f64::NAN,
        held: held.len(),
        moves: held.len() - stay,
        whole: of(0),
        full: of(HUGE_FRAMES),
        partly,
    }
}

/// A row a side.
pub(super) fn print<'a>(sides: impl Iterator<Item = (&'a str, &'a Fragments)>) {
    let classes: Vec<String> = (0..CLASSES).map(|class| format!("-{}%", (class + 1) * 100 / CLASSES)).collect();
    let head = ["after churn: huge frames", "given, %", "moves", "of used, %", "full"];
    let head: Vec<&str> = head.into_iter().chain(classes.iter().map(String::as_str)).chain(["free"]).collect();
    let mut table = Table::new(&head);
    for (name, found) in sides {
        let mut cells = vec![name.to_owned(), short(found.recovered), found.moves.to_string()];
        cells.push(short(found.moves as f64 * 100.0 / found.held as f64));
        cells.push(found.full.to_string());
        cells.extend(found.partly.iter().map(usize::to_string));
        cells.push(found.whole.to_string());
        table.row(cells);
    }
    table.print();
    println!(
        "moves: frames that have to move, at least, until the free ones make as many huge frames as they can"
    );
    println!("-N%: huge frames partly free, by how much of them is\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_are_the_frames_outside_of_the_fullest_huge_frames() {
        // 512 + 511 + 64 + 1 in use: they fit into three, so that one frame has to move.
        let held: Vec<usize> = [(0, 512), (1, 511), (2, 64), (3, 1)]
            .into_iter()
            .flat_map(|(huge, used)| (0..used).map(move |frame| huge * HUGE_FRAMES + frame))
            .collect();
        let found = count(&held, 5);
        assert_eq!((found.held, found.moves, found.full, found.whole), (1088, 1, 1, 1));
        assert_eq!(found.partly, [1, 0, 0, 0, 0, 0, 0, 2]);
    }

    #[test]
    fn nothing_has_to_move_when_nothing_is_in_pieces() {
        let held: Vec<usize> = (512..1024).collect();
        let found = count(&held, 2);
        assert_eq!((found.moves, found.full, found.whole, found.partly), (0, 1, 1, [0; CLASSES]));
    }
}
