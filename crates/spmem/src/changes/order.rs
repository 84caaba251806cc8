//! The order in which changes happened, found from the order in which they were read.
//!
//! Of one place, that is known:
//! - Whatever arrives finds the place free: what mremap(2) overwrites is unmapped first, and announced.
//! - What has arrived leaves by a change read later: its address is known once mremap(2) has returned, which waits for the
//!   reading. So changes are read too late, never too early; and arrivals at one place are read in their order.
//! - Whether something is left there at the end ([`Facts::is_ours`]). MREMAP_DONTUNMAP leaves an empty range. What has grown
//!   over the place begins before it, unless it was split since ([`Facts::goes_on`]).
//! - Where all that had begun was read, nothing read later happened before. Nor where there is one thread only.
//!
//! Not known is what has grown, and when: in place that is not announced, and of what mremap(2) makes longer the old length is.
//! Where more was moved away from a place than can have been there the order is in doubt.
//!
//! Orders that agree with that are tried one after the other, that of reading first. If there are several, pages decide that
//! are present where one that is away would have to be, and pages that are away where something would have arrived
//! ([`Facts::outcome`]).

use super::{arrival, departure};
use alloc::vec::Vec;
use core::ops::Range;
use spmem_sys::Result;
use spmem_sys::uffd::Event;

/// As many as a thread makes that goes from one to the next, until [`super::is_quiet_soon`].
pub(super) const MAX_CHANGES: usize = 4000;
/// Where they begin and end.
const MAX_ENDS: usize = 2 * MAX_CHANGES;
/// So many without asking for memory.
const USUAL_CHANGES: usize = 1 << 10;
/// Places at which one order has a choice, ...
const MAX_CHOICES: usize = 16;
/// ... and orders that are tried.
const MAX_TRIES: usize = 256;

/// The order cannot be told from what the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Doubt;

/// What is known to be registered at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// Something; whether it begins there has to be asked, too.
    Something,
    /// A mapping that begins there.
    Start,
    /// More of the mapping of the page before: it has grown, or has come back to where it was a part.
    Part,
}

/// What the kernel tells.
pub(super) trait Facts {
    /// Whether the page of `address` is registered now; an error when more changes have begun: to be asked again later.
    fn is_ours(&mut self, address: usize) -> Result<bool>;
    /// Whether it belongs to the mapping of the page before; likewise.
    fn goes_on(&mut self, address: usize) -> Result<bool>;
    /// What comes of this order, as a digest of where each page that is away ends up; `None` when that cannot be,
    /// because a page is present there, or something would have arrived where one was.
    fn outcome(&self, order: &[Event]) -> Option<u64>;
}

/// A change that was read.
///
/// mremap(2) is announced twice: as moved, and then its old place as unmapped. The second, the echo, says nothing new, and
/// may be read after somebody else's range has come to that place. A real unmapping of that range is an equal event:
/// whichever of the two was read first counts as the echo. MREMAP_DONTUNMAP has none.
pub(crate) struct Noted {
    pub(crate) event: Event,
    /// A move whose old place was announced as unmapped.
    pub(crate) has_echo: bool,
}

impl Noted {
    fn departs_from(&self, page: usize) -> bool {
        covers(departure(self.event), page)
    }

    fn arrives_at(&self, page: usize) -> bool {
        covers(arrival(self.event), page)
    }

    fn touches(&self, page: usize) -> bool {
        self.departs_from(page) || self.arrives_at(page)
    }

    /// Whether nothing is left where it departs from.
    fn empties(&self) -> bool {
        self.has_echo || matches!(self.event, Event::Unmap { .. })
    }

    /// Whether it takes away what begins at the page.
    fn begins_at(&self, page: usize) -> bool {
        matches!(self.event, Event::Remap { from, .. } if from == page)
    }
}

fn covers(range: Option<(usize, usize)>, page: usize) -> bool {
    range.is_some_and(|(start, end)| (start..end).contains(&page))
}

fn overlap(a: Option<(usize, usize)>, b: Option<(usize, usize)>) -> Option<(usize, usize)> {
    let ((a, a_end), (b, b_end)) = (a?, b?);
    let both = (a.max(b), a_end.min(b_end));
    (both.0 < both.1).then_some(both)
}

/// How the old place of a move is announced once more.
fn echo(event: Event) -> Option<Event> {
    match event {
        Event::Remap { from, len, .. } => Some(Event::Unmap { start: from, end: from + len }),
        _ => None,
    }
}

/// What has to be asked and was not.
#[derive(PartialEq, Eq)]
struct Unasked(usize);

/// What is known of a place at some point of an order.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Unknown,
    Free,
    /// By the arrival that was read so many-th, or left over by MREMAP_DONTUNMAP.
    Taken(Option<usize>),
}

/// What may come next of an order.
#[derive(Clone, Copy)]
enum Next {
    /// The one whose turn it is.
    Itself,
    /// The one at that position of the order, which was read too late.
    Late(usize),
}

/// The choices of one order, each with how many there are.
#[derive(Clone, Copy)]
struct Choices {
    taken: [(usize, usize); MAX_CHOICES],
    made: usize,
}

impl Choices {
    /// Takes the next, of so many.
    fn take(&mut self, of: usize) -> core::result::Result<usize, Doubt> {
        if of == 1 {
            return Ok(0);
        }
        let choice = self.taken.get_mut(self.made).ok_or(Doubt)?;
        self.made += 1;
        choice.1 = of;
        Ok(choice.0)
    }

    /// Those of the order after this.
    fn following(&self) -> Option<Self> {
        let last = self.taken[..self.made].iter().rposition(|(choice, of)| choice + 1 < *of)?;
        let mut next = Self { made: 0, ..*self };
        next.taken[last].0 += 1;
        next.taken[last + 1..].fill((0, 0));
        Some(next)
    }
}

/// The orders that are tried one after the other.
struct Tries {
    next: Option<Choices>,
    count: usize,
}

impl Tries {
    fn new() -> Self {
        Self { next: Some(Choices { taken: [(0, 0); MAX_CHOICES], made: 0 }), count: 0 }
    }
}

/// Changes that were read and not applied yet, and what is known of them.
pub(super) struct Log {
    /// In the order of reading.
    read: Vec<Noted>,
    /// Numbers of changes before which nothing happened that was read later.
    seals: Vec<usize>,
    /// So many, from the first, have been read with their echoes.
    whole: usize,
    /// Where ranges that changed begin and end, in ascending order.
    ends: Vec<usize>,
    /// What was asked, by address: valid until something read touches the place. There is time for few questions before
    /// the next change begins.
    known: Vec<(usize, Found)>,
    /// What is to be asked.
    wanted: Vec<usize>,
    /// Positions in `read`, in the order of happening.
    order: Vec<usize>,
    /// The same.
    happened: Vec<Event>,
}

impl Log {
    /// Nothing. Allocates all that will be needed.
    pub(super) fn new() -> Self {
        Self {
            read: Vec::with_capacity(USUAL_CHANGES),
            seals: Vec::with_capacity(USUAL_CHANGES),
            whole: 0,
            ends: Vec::with_capacity(USUAL_CHANGES),
            known: Vec::with_capacity(USUAL_CHANGES),
            wanted: Vec::with_capacity(USUAL_CHANGES),
            order: Vec::with_capacity(USUAL_CHANGES),
            happened: Vec::with_capacity(USUAL_CHANGES),
        }
    }

    /// No memory will be asked for.
    pub(super) fn reserve(&mut self) {
        self.read.reserve_exact(MAX_CHANGES);
        self.seals.reserve_exact(MAX_CHANGES);
        self.ends.reserve_exact(MAX_ENDS);
        self.known.reserve_exact(MAX_CHANGES);
        self.wanted.reserve_exact(MAX_CHANGES);
        self.order.reserve_exact(MAX_CHANGES);
        self.happened.reserve_exact(MAX_CHANGES);
    }

    pub(super) fn shrink(&mut self) {
        self.read.shrink_to(USUAL_CHANGES);
        self.seals.shrink_to(USUAL_CHANGES);
        self.ends.shrink_to(USUAL_CHANGES);
        self.known.shrink_to(USUAL_CHANGES);
        self.wanted.shrink_to(USUAL_CHANGES);
        self.order.shrink_to(USUAL_CHANGES);
        self.happened.shrink_to(USUAL_CHANGES);
    }

    pub(super) fn clear(&mut self) {
        self.read.clear();
        self.seals.clear();
        self.whole = 0;
        self.ends.clear();
        self.known.clear();
        self.wanted.clear();
    }

    /// Bytes this takes.
    pub(super) fn metadata_bytes(&self) -> usize {
        self.read.capacity() * size_of::<Noted>()
            + self.happened.capacity() * size_of::<Event>()
            + self.known.capacity() * size_of::<(usize, Found)>()
            + [&self.seals, &self.ends, &self.wanted, &self.order]
                .iter()
                .map(|list| list.capacity())
                .sum::<usize>()
                * size_of::<usize>()
    }

    /// Whether no more can be added.
    pub(super) fn is_full(&self) -> bool {
        self.read.len() >= MAX_CHANGES || self.ends.len() + 4 > MAX_ENDS
    }

    /// In the order of reading.
    pub(super) fn read(&self) -> &[Noted] {
        &self.read
    }

    /// In the order of happening, once [`Log::find_order`] has found it.
    pub(super) fn happened(&self) -> &[Event] {
        &self.happened
    }

    /// Adds one, unless it is the echo of one that was read. `is_alone` tells whether no other thread is there: then all
    /// that happened before was read, and nothing else is under way.
    pub(super) fn push(&mut self, event: Event, is_alone: impl FnOnce() -> bool) {
        let has_come = |noted: &&mut Noted| !noted.has_echo && echo(noted.event) == Some(event);
        if let Some(noted) = self.read[self.whole..].iter_mut().rev().find(has_come) {
            noted.has_echo = true;
            return;
        }
        let is_alone = !self.read.is_empty() && is_alone();
        if is_alone {
            self.seal();
        }
        let noted = Noted { event, has_echo: false };
        self.known.retain(|&(address, _)| !noted.touches(address));
        self.read.push(noted);
        for end in [departure(event), arrival(event)].into_iter().flatten().flat_map(|(start, end)| [start, end]) {
            if let Err(at) = self.ends.binary_search(&end) {
                self.ends.insert(at, end);
            }
        }
        if is_alone {
            self.seal();
        }
    }

    /// Nothing read later happened before.
    fn seal(&mut self) {
        let count = self.read.len();
        if count > 0 && self.seals.last() != Some(&count) {
            self.seals.push(count);
        }
    }

    /// All that has begun was read. What is to be asked is asked at once: whoever moves ranges goes on in a moment.
    pub(super) fn note_quiet(&mut self, facts: &mut impl Facts) {
        self.seal();
        self.whole = self.read.len();
        self.ask(facts);
    }

    /// Whether all that is wanted was answered. There may be time for one question.
    fn ask(&mut self, facts: &mut impl Facts) -> bool {
        while let Some(&address) = self.wanted.last() {
            let known = self.known.binary_search_by_key(&address, |&(known, _)| known);
            let answer = if known.is_ok() {
                facts.goes_on(address).map(|goes_on| if goes_on { Found::Part } else { Found::Start })
            } else {
                facts.is_ours(address).map(|is_ours| if is_ours { Found::Something } else { Found::Nothing })
            };
            let Ok(found) = answer else { return false };
            let is_kept = known.is_ok() || self.known.len() < MAX_CHANGES;
            match known {
                Ok(at) => self.known[at].1 = found,
                Err(at) if is_kept => self.known.insert(at, (address, found)),
                Err(_) => {}
            }
            // What there is no room for stays unknown.
            if found != Found::Something || !is_kept {
                self.wanted.pop();
            }
        }
        true
    }

    /// Finds the order; `Ok(false)` when an answer has to wait.
    pub(super) fn find_order(&mut self, facts: &mut impl Facts) -> core::result::Result<bool, Doubt> {
        self.want();
        if !self.ask(facts) {
            self.want();
            return Ok(false);
        }
        if self.is_echo_in_doubt() || self.has_grown() {
            return Err(Doubt);
        }
        let mut tries = Tries::new();
        let mut best = self.next_order(&mut tries)?.ok_or(Doubt)?;
        if self.next_order(&mut tries)?.is_some() {
            best = self.find_fitting(facts)?;
        } else if tries.count == 1 {
            return Ok(true);
        }
        self.try_order(&mut best)
    }

    /// Whether of two moves away from one place, which may have happened in either order, one has an echo and the other has
    /// none: then it may be the other's.
    fn is_echo_in_doubt(&self) -> bool {
        self.read.iter().enumerate().filter(|(_, noted)| arrival(noted.event).is_some()).any(|(at, noted)| {
            self.read[at + 1..self.stretch_of(at).end]
                .iter()
                .any(|other| echo(other.event) == echo(noted.event) && other.has_echo != noted.has_echo)
        })
    }

    /// Whether more was moved away from a place than can have been there: a range has grown over it in between. Whose pages are
    /// whose depends on which was first.
    fn has_grown(&self) -> bool {
        self.read.iter().enumerate().any(|(at, noted)| {
            let Event::Remap { from: start, .. } = noted.event else { return false };
            if !noted.empties() {
                return false;
            }
            let stretch = self.stretch_of(at);
            let arrivals =
                |page| self.read[stretch.clone()].iter().filter(move |noted| noted.arrives_at(page)).count();
            // What is unmapped need not have been there, if that was read later. What a range has grown by since it arrived
            // goes with it. And what MREMAP_DONTUNMAP leaves can be moved as often as one likes.
            let has_left = |&(other, noted): &(usize, &Noted)| match noted.event {
                Event::Unmap { .. } => other < at,
                Event::Remap { from, .. } => {
                    from == start && noted.empties() || from < start && arrivals(from) == 0
                }
                _ => false,
            };
            let leaves =
                self.read[stretch.clone()].iter().enumerate().map(|(other, noted)| (stretch.start + other, noted));
            let left = leaves.filter(|(_, noted)| noted.departs_from(start)).filter(has_left).count();
            // Whatever it is, and even if it came there by growing.
            let is_found = || {
                let is_last = self.read[stretch.end..].iter().all(|noted| !noted.touches(start));
                is_last && self.found_at(start).is_some_and(|found| found != Found::Nothing)
            };
            let remains = || is_found() || self.is_left(start, &stretch) == Ok(Some(true));
            let arrived = arrivals(start);
            left > 1 && (left > arrived + 1 || left > arrived && remains())
        })
    }

    /// Of several orders, the one that does not contradict the pages; if more than one does not, the same must come of them.
    fn find_fitting(&mut self, facts: &impl Facts) -> core::result::Result<Choices, Doubt> {
        let mut fitting = None;
        let mut tries = Tries::new();
        while let Some(choices) = self.next_order(&mut tries)? {
            match (fitting, facts.outcome(&self.happened)) {
                (_, None) => {}
                (None, Some(outcome)) => fitting = Some((choices, outcome)),
                (Some((_, other)), Some(outcome)) if other != outcome => return Err(Doubt),
                (Some(_), Some(_)) => {}
            }
        }
        fitting.map(|(choices, _)| choices).ok_or(Doubt)
    }

    /// Puts the next order together that can have been so.
    fn next_order(&mut self, tries: &mut Tries) -> core::result::Result<Option<Choices>, Doubt> {
        while let Some(mut choices) = tries.next {
            if tries.count == MAX_TRIES {
                return Err(Doubt);
            }
            tries.count += 1;
            let is_possible = self.try_order(&mut choices)?;
            tries.next = choices.following();
            if is_possible {
                return Ok(Some(Choices { made: 0, ..choices }));
            }
        }
        Ok(None)
    }

    /// What may have happened in another order, around that change: what was read between two seals.
    fn stretch_of(&self, at: usize) -> Range<usize> {
        let next = self.seals.partition_point(|&seal| seal <= at);
        let start = next.checked_sub(1).map_or(0, |before| self.seals[before]);
        start..self.seals.get(next).copied().unwrap_or(self.read.len())
    }

    /// One page of each part of the range that a change may treat otherwise than the rest.
    fn parts(&self, (start, end): (usize, usize)) -> impl Iterator<Item = usize> {
        let after = self.ends.partition_point(|&at| at <= start);
        core::iter::once(start).chain(self.ends[after..].iter().copied().take_while(move |&at| at < end))
    }

    /// Finds out what has to be asked, and is not known.
    fn want(&mut self) {
        self.wanted.clear();
        let mut wanted = core::mem::take(&mut self.wanted);
        'all: for (at, noted) in self.read.iter().enumerate() {
            let Some(place) = arrival(noted.event) else { continue };
            let stretch = self.stretch_of(at);
            let later = &self.read[at + 1..stretch.end];
            if !later.iter().any(|noted| overlap(departure(noted.event), Some(place)).is_some()) {
                continue;
            }
            for page in self.parts(place) {
                if later.iter().any(|noted| noted.arrives_at(page)) {
                    continue;
                }
                if let Err(Unasked(page)) = self.is_left(page, &stretch) {
                    if wanted.len() == MAX_CHANGES {
                        break 'all;
                    }
                    if !wanted.contains(&page) {
                        wanted.push(page);
                    }
                }
            }
        }
        self.wanted = wanted;
    }

    /// Whether something is left at the page at the end of the stretch; `Ok(None)` when that cannot be told.
    fn is_left(&self, page: usize, stretch: &Range<usize>) -> core::result::Result<Option<bool>, Unasked> {
        let is_last = |noted: &&Noted| noted.arrives_at(page) || noted.departs_from(page) && noted.empties();
        match self.read[stretch.clone()].iter().rev().find(is_last) {
            // What was read before an arrival has not taken it along.
            Some(last) if last.arrives_at(page) => Ok(Some(true)),
            _ => self.is_taken_after(page, stretch.end),
        }
    }

    /// What is known to be at the page now.
    fn found_at(&self, page: usize) -> Option<Found> {
        let at = self.known.binary_search_by_key(&page, |&(known, _)| known).ok()?;
        Some(self.known[at].1)
    }

    /// Whether something was at the page before the changes from the `from`-th on.
    fn is_taken_after(&self, page: usize, mut from: usize) -> core::result::Result<Option<bool>, Unasked> {
        loop {
            let Some(next) = (from..self.read.len()).find(|&at| self.read[at].touches(page)) else {
                return match self.found_at(page).ok_or(Unasked(page))? {
                    Found::Nothing => Ok(Some(false)),
                    Found::Something => Err(Unasked(page)),
                    Found::Start if !self.is_split_at(page) => Ok(Some(true)),
                    // It may have grown since.
                    Found::Start | Found::Part => Ok(None),
                };
            };
            let first = &self.read[next];
            if first.departs_from(page) {
                // What is unmapped may have been free, and what begins before may have grown since.
                return Ok(first.begins_at(page).then_some(true));
            }
            from = self.stretch_of(next).end;
            let later = || self.read[next + 1..from].iter().filter(|noted| noted.touches(page));
            match (later().count(), later().next()) {
                (0, _) => return Ok(Some(false)),
                // By then it is left again, or what had been there before has left.
                (1, Some(only)) if only.departs_from(page) && only.has_echo => {}
                _ => return Ok(None),
            }
        }
    }

    /// Whether a part of a mapping may have left that ended there.
    fn is_split_at(&self, page: usize) -> bool {
        self.read.iter().any(|noted| departure(noted.event).is_some_and(|(_, end)| end == page))
    }

    /// What is at the page after the first `placed` of the order.
    fn state(&self, page: usize, placed: usize) -> Place {
        let Some(&last) = self.order[..placed].iter().rev().find(|&&at| self.read[at].touches(page)) else {
            return Place::Unknown;
        };
        let noted = &self.read[last];
        if noted.arrives_at(page) {
            Place::Taken(Some(last))
        } else if noted.empties() {
            Place::Free
        } else {
            Place::Taken(None)
        }
    }

    /// Puts one order together, by these choices; whether it can have been so.
    fn try_order(&mut self, choices: &mut Choices) -> core::result::Result<bool, Doubt> {
        self.order.clear();
        self.order.extend(0..self.read.len());
        let mut placed = 0;
        // Those behind which something stood that had to come first.
        let mut waiting = 0;
        while placed < self.order.len() {
            let current = self.order[placed];
            if let Some((start, end)) = departure(self.read[current].event) {
                // What arrives was read before it leaves.
                let mut parts = self.parts((start, end));
                if parts.any(|page| matches!(self.state(page, placed), Place::Taken(Some(by)) if by > current)) {
                    return Ok(false);
                }
            }
            let count = self.options(placed, waiting).count();
            if count == 0 {
                return Ok(false);
            }
            let choice = choices.take(count)?;
            let next = self.options(placed, waiting).nth(choice);
            match next {
                Some(Next::Late(at)) => {
                    self.order[placed..=at].rotate_right(1);
                    waiting += 1;
                }
                _ => {
                    placed += 1;
                    waiting = waiting.saturating_sub(1);
                }
            }
        }
        self.happened.clear();
        self.happened.extend(self.order.iter().map(|&at| self.read[at].event));
        Ok(true)
    }

    /// What may come next of the order.
    fn options(&self, placed: usize, waiting: usize) -> impl Iterator<Item = Next> {
        let current = self.order[placed];
        let stretch = self.stretch_of(current);
        let place = arrival(self.read[current].event);
        let is_now = place.is_none_or(|place| {
            self.parts(place).all(|page| {
                !matches!(self.state(page, placed), Place::Taken(_)) && self.may_arrive(page, placed, &stretch)
            })
        });
        let behind = placed + 1 + waiting..stretch.end;
        let late = place.into_iter().flat_map(move |place| {
            let stretch = stretch.clone();
            behind.clone().filter(move |&at| self.may_leave_before(at, place, placed, &stretch))
        });
        is_now.then_some(Next::Itself).into_iter().chain(late.map(Next::Late))
    }

    /// How many of what follows arrive at the page, and how many leave it free.
    fn to_come(&self, page: usize, placed: usize, stretch: &Range<usize>) -> (usize, usize) {
        let (mut arrive, mut leave) = (0, 0);
        for &at in &self.order[placed + 1..stretch.end] {
            let noted = &self.read[at];
            arrive += usize::from(noted.arrives_at(page));
            leave += usize::from(noted.departs_from(page) && noted.empties());
        }
        (arrive, leave)
    }

    /// Whether what follows frees the page for each that arrives there later, and leaves it as it is in the end.
    fn may_arrive(&self, page: usize, placed: usize, stretch: &Range<usize>) -> bool {
        let (arrive, leave) = self.to_come(page, placed, stretch);
        if leave == 0 || arrive > 0 {
            return leave >= arrive;
        }
        self.is_left(page, stretch).ok().flatten() != Some(true)
    }

    /// Whether the one at that position of the order may have left `place` before the next one arrives there.
    fn may_leave_before(&self, at: usize, place: (usize, usize), placed: usize, stretch: &Range<usize>) -> bool {
        let late = self.order[at];
        let noted = &self.read[late];
        let Some(part) = overlap(departure(noted.event), Some(place)) else { return false };
        let is_overtaken = |&before: &usize| {
            before < late && overlap(arrival(self.read[before].event), arrival(noted.event)).is_some()
        };
        if self.order[placed..at].iter().any(is_overtaken) {
            return false;
        }
        self.parts(part).any(|page| {
            let is_there = match self.state(page, placed) {
                Place::Unknown => true,
                // What is unmapped need not have been there.
                Place::Free => matches!(noted.event, Event::Unmap { .. }),
                Place::Taken(by) => by.is_none_or(|by| by < late),
            };
            let (arrive, leave) = self.to_come(page, placed, stretch);
            let is_left = self.is_left(page, stretch).ok().flatten();
            is_there && leave > arrive + usize::from(is_left == Some(false))
        })
    }
}

#[cfg(test)]
mod tests;
