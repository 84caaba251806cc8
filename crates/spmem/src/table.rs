//! The page table of what is away: one word a page, in chunks of 2 MiB that exist once their first page has left.
//!
//! A page that never left has no word or the word 0. The kernel's page tables say what is present; these words say
//! where a missing page's contents are, and which copy of a present page is still kept. Everything here is reached
//! under the space's lock. 8 bytes a page, in rows of 64 pages that exist once one of them has a word, and 2 bits for
//! "registered" and "discarded".
//!
//! | kind | `is_away` | meaning |
//! |---|---|---|
//! | `None` | no | nothing known: present, or never touched |
//! | `Holding` | yes | in the holding area |
//! | `Holding` | no | came back by copy while its slot is being compressed |
//! | `Stored` | yes | on node 1 |
//! | `Stored` | no | present, and an older compressed copy is kept: it may still be equal |
//! | `Swapped` | yes | in a swap file (swap.rs) |
//! | `placed` | no | present, in memory of a mapped node (place.rs), as far as known: who writes a shared page gets another |
//!
//! Over 500 lines: nobody else knows the bits of a word.

use alloc::boxed::Box;
use alloc::vec::Vec;
use spmem_core::lru::Age;
use spmem_core::placing::MAX_TARGETS;
use spmem_core::reclaim::Stay;
use spmem_sys::PAGE;

/// Pages in a chunk.
pub const CHUNK_PAGES: usize = 512;
/// Bytes in a chunk: the unit of registration, and of a transparent huge page.
pub const CHUNK: usize = CHUNK_PAGES * PAGE;
/// Chunks of a leaf, leaves of a branch and branches of a table. A program's memory lies in a few places far apart: small
/// steps, as in the processor's own page tables, keep what each of them takes small.
const LEAF: usize = 1 << 8;
const BRANCH: usize = 1 << 9;
const TOP: usize = 1 << 9;
/// Where addresses of programs end.
pub(crate) const ADDRESS_END: usize = TOP * BRANCH * LEAF * CHUNK;
const PAYLOAD: u64 = (1 << 48) - 1;
const KIND_SHIFT: u32 = 48;
/// In its place on a mapped node, or away in a swap file.
const ELSEWHERE: u64 = 3;
const AWAY: u64 = 1 << 50;
const AGE_SHIFT: u32 = 51;
/// Pages of a row. Fewer would make sparse memory cheaper and each chunk larger: 8 bytes a row.
const ROW: usize = 64;
const ROWS: usize = CHUNK_PAGES / ROW;
const DISCARDED: u64 = 1 << 54;
const REFUSED: u64 = 1 << 55;
const STAY_SHIFT: u32 = 56;

/// Where a page's contents are, besides its place in the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copy {
    /// Nowhere.
    None,
    /// In this slot of the holding area.
    Holding(u32),
    /// On node 1, under this handle.
    Stored(u64),
    /// In a swap file, under this handle. Of pages that are away only.
    Swapped(u64),
}

/// What is known of one page.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// A page whose contents are at `copy` only.
    pub fn away(copy: Copy, age: Age) -> Self {
        Self(Self::with_copy(copy, age).0 | AWAY)
    }

    /// A page that is in its place; `copy` may or may not be equal to it.
    pub fn present(copy: Copy, age: Age) -> Self {
        assert!(
            !matches!(copy, Copy::Swapped(_)),
            "no copy of a page that is in its place is kept in a swap file"
        );
        Self::with_copy(copy, age)
    }

    fn with_copy(copy: Copy, age: Age) -> Self {
        let (kind, payload) = match copy {
            Copy::None => (0, 0),
            Copy::Holding(slot) => (1, u64::from(slot)),
            Copy::Stored(handle) => (2, handle),
            Copy::Swapped(handle) => (ELSEWHERE, handle),
        };
        debug_assert!(payload & !PAYLOAD == 0, "a handle has 48 bits");
        Self(payload | kind << KIND_SHIFT | u64::from(age.bits()) << AGE_SHIFT)
    }

    /// A page in its place, on the mapped node that is number `target` of the run's.
    pub fn placed(target: usize, age: Age) -> Self {
        debug_assert!(target < MAX_TARGETS, "a run has few mapped nodes");
        Self(target as u64 | ELSEWHERE << KIND_SHIFT | u64::from(age.bits()) << AGE_SHIFT)
    }

    /// Which mapped node it is on, if it is in its place and on one.
    pub fn target(self) -> Option<usize> {
        (self.0 >> KIND_SHIFT & 3 == ELSEWHERE && !self.is_away()).then_some((self.0 & PAYLOAD) as usize)
    }

    /// Nothing is known.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Its place in the program is missing.
    pub fn is_away(self) -> bool {
        self.0 & AWAY != 0
    }

    /// Where else its contents are.
    pub fn copy(self) -> Copy {
        match self.0 >> KIND_SHIFT & 3 {
            1 => Copy::Holding((self.0 & 0xffff_ffff) as u32),
            2 => Copy::Stored(self.0 & PAYLOAD),
            ELSEWHERE if self.is_away() => Copy::Swapped(self.0 & PAYLOAD),
            _ => Copy::None,
        }
    }

    /// How recently it was used, as the replacement policy counts.
    pub fn age(self) -> Age {
        Age::from_bits((self.0 >> AGE_SHIFT & 7) as u8)
    }

    /// In how many rounds it was met on node 1; new with each other change.
    pub fn stay(self) -> Stay {
        Stay::from_bits((self.0 >> STAY_SHIFT & 3) as u8)
    }

    /// The same with another stay.
    #[must_use]
    pub fn with_stay(self, stay: Stay) -> Self {
        Self(self.0 & !(3 << STAY_SHIFT) | u64::from(stay.bits()) << STAY_SHIFT)
    }

    /// The same page with its copy under another handle.
    #[must_use]
    pub fn stored_as(self, handle: u64) -> Self {
        debug_assert!(matches!(self.copy(), Copy::Stored(_)) && handle & !PAYLOAD == 0, "it is on node 1 already");
        Self(self.0 & !PAYLOAD | handle)
    }

    /// It could not leave when it was tried: seldom to be tried again.
    pub fn is_refused(self) -> bool {
        self.0 & REFUSED != 0
    }

    /// A page in its place that could not leave.
    pub fn refused(copy: Copy) -> Self {
        Self(Self::present(copy, Age::COLDEST).0 | REFUSED)
    }

    /// madvise(2) announced that it will be dropped; it must not leave until it was seen missing.
    pub fn is_discarded(self) -> bool {
        self.0 & DISCARDED != 0
    }

    /// A page that madvise(2) is about to drop.
    pub fn discarded() -> Self {
        Self(DISCARDED)
    }
}

type Row = [Entry; ROW];

/// The pages of one 2 MiB-aligned range of addresses.
pub struct Chunk {
    rows: [Option<Box<Row>>; ROWS],
    /// A bit a page. Pages that are about to be dropped have no word: there can be very many of them at once.
    discarded: [u64; ROWS],
    registered: [u64; ROWS],
    /// First address.
    pub start: usize,
    /// Pages that are away.
    pub away: u32,
    /// Pages that are present and have a copy kept.
    pub kept: u32,
    /// Pages that could not leave.
    pub refused: u32,
    /// Pages on mapped nodes.
    pub placed: u32,
}

impl Chunk {
    /// A chunk nobody has left yet.
    pub fn new(start: usize) -> Self {
        Self {
            rows: [const { None }; ROWS],
            discarded: [0; ROWS],
            registered: [0; ROWS],
            start,
            away: 0,
            kept: 0,
            refused: 0,
            placed: 0,
        }
    }

    /// The entry of the page of `address`, which lies in this chunk.
    pub fn get(&self, address: usize) -> Entry {
        let page = page_index(address);
        if self.discarded[page / ROW] >> (page % ROW) & 1 != 0 {
            return Entry::discarded();
        }
        self.rows[page / ROW].as_ref().map_or(Entry::default(), |row| row[page % ROW])
    }

    /// Whether `entry` needs a row that does not exist yet.
    fn lacks_row(&self, address: usize, entry: Entry) -> bool {
        !entry.is_empty() && !entry.is_discarded() && self.rows[page_index(address) / ROW].is_none()
    }

    /// Replaces the entry, whose row exists if it needs one, and keeps the counts; what it was.
    fn set(&mut self, address: usize, entry: Entry) -> Entry {
        let (page, old) = (page_index(address), self.get(address));
        let (bits, bit) = (&mut self.discarded[page / ROW], 1 << (page % ROW));
        *bits = if entry.is_discarded() { *bits | bit } else { *bits & !bit };
        if let Some(row) = &mut self.rows[page / ROW] {
            row[page % ROW] = if entry.is_discarded() { Entry::default() } else { entry };
        }
        self.away = self.away + u32::from(entry.is_away()) - u32::from(old.is_away());
        self.kept = self.kept + u32::from(is_kept(entry)) - u32::from(is_kept(old));
        self.refused = self.refused + u32::from(entry.is_refused()) - u32::from(old.is_refused());
        self.placed = self.placed + u32::from(entry.target().is_some()) - u32::from(old.target().is_some());
        old
    }

    fn count_rows(&self) -> usize {
        self.rows.iter().flatten().count()
    }

    /// Whether all pages of a range in this chunk are registered with the userfaultfd.
    pub fn is_registered(&self, start: usize, end: usize) -> bool {
        (page_index(start)..page_index(start) + (end - start) / PAGE)
            .all(|page| self.registered[page / 64] >> (page % 64) & 1 != 0)
    }

    /// Notes that a range in this chunk is (not) registered.
    pub fn set_registered(&mut self, start: usize, end: usize, is_registered: bool) {
        for page in page_index(start)..page_index(start) + (end - start) / PAGE {
            let bit = 1 << (page % 64);
            let word = &mut self.registered[page / 64];
            *word = if is_registered { *word | bit } else { *word & !bit };
        }
    }

    /// The registered runs, as address ranges.
    pub fn registered_runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let mut page = 0;
        core::iter::from_fn(move || {
            let has = |page: usize| self.registered[page / 64] >> (page % 64) & 1 != 0;
            while page < CHUNK_PAGES && !has(page) {
                page += 1;
            }
            let first = page;
            while page < CHUNK_PAGES && has(page) {
                page += 1;
            }
            (first < page).then(|| (self.start + first * PAGE, self.start + page * PAGE))
        })
    }
}

fn is_kept(entry: Entry) -> bool {
    !entry.is_away() && entry.copy() != Copy::None
}

fn page_index(address: usize) -> usize {
    address / PAGE % CHUNK_PAGES
}

/// Numbers + 1 of chunks; 0: there is none.
type Leaf = [u32; LEAF];
type Branch = [Option<Box<Leaf>>; BRANCH];

/// All chunks, found by address in three steps.
pub struct Table {
    top: Vec<Option<Box<Branch>>>,
    #[allow(clippy::vec_box, reason = "grown under the lock that faults wait for: boxes are soon copied")]
    chunks: Vec<Box<Chunk>>,
    /// Of all chunks.
    rows: usize,
    placed: [u64; MAX_TARGETS],
    spare: Spare,
}

/// What is added to a table without allocating.
#[derive(Default)]
#[allow(clippy::vec_box, reason = "boxes are what goes into the table: boxing there would allocate")]
struct Spare {
    chunks: Vec<Box<Chunk>>,
    rows: Vec<Box<Row>>,
    leaves: Vec<Box<Leaf>>,
    branches: Vec<Box<Branch>>,
}

/// Chunks, leaves and branches that can be added in a quiet time without allocating. Of rows, as many as those chunks have.
const QUIET_SPARES: [usize; 3] = [64, 8, 2];

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

impl Table {
    /// A table without chunks.
    pub fn new() -> Self {
        Self { top: Vec::new(), chunks: Vec::new(), rows: 0, placed: [0; MAX_TARGETS], spare: Spare::default() }
    }

    /// Bytes this table takes.
    pub fn metadata_bytes(&self) -> u64 {
        let branches = self.top.iter().flatten();
        let leaves = branches.clone().map(|branch| branch.iter().flatten().count()).sum::<usize>();
        let leaves = (leaves + self.spare.leaves.len()) * size_of::<Leaf>();
        let branches = (branches.count() + self.spare.branches.len()) * size_of::<Branch>();
        let chunks = (self.chunks.len() + self.spare.chunks.len()) * size_of::<Chunk>();
        let rows = (self.rows + self.spare.rows.len()) * size_of::<Row>();
        (chunks + rows + leaves + branches + size_of_val(&self.top[..])) as u64
    }

    /// Pages that are in their place because they could not leave. O(chunks).
    pub fn count_refused(&self) -> u64 {
        self.chunks.iter().map(|chunk| u64::from(chunk.refused)).sum()
    }

    /// Pages that are in their place and have a copy kept as well. O(chunks).
    pub fn count_kept(&self) -> u64 {
        self.chunks.iter().map(|chunk| u64::from(chunk.kept)).sum()
    }

    /// Pages on each mapped node.
    pub fn count_placed(&self) -> [u64; MAX_TARGETS] {
        self.placed
    }

    /// The chunk of `address`, if it exists.
    pub fn find(&self, address: usize) -> Option<&Chunk> {
        self.number(address).and_then(|number| self.chunks.get(number)).map(|chunk| &**chunk)
    }

    /// The chunk of `address`, if it exists, to change.
    pub fn find_mut(&mut self, address: usize) -> Option<&mut Chunk> {
        self.number(address).and_then(|number| self.chunks.get_mut(number)).map(|chunk| &mut **chunk)
    }

    /// The chunk of `address`; made when it does not exist.
    pub fn find_or_add(&mut self, address: usize) -> &mut Chunk {
        let number = self.number(address).unwrap_or_else(|| self.add(address));
        &mut self.chunks[number]
    }

    /// The entry of the page of `address`.
    pub fn get(&self, address: usize) -> Entry {
        self.find(address).map_or(Entry::default(), |chunk| chunk.get(address))
    }

    /// Replaces the entry of a page whose chunk exists; what it was.
    ///
    /// # Panics
    /// When the chunk does not exist: an entry is made together with its chunk.
    pub fn set(&mut self, address: usize, entry: Entry) -> Entry {
        let number = self.number(address).expect("the page has an entry, so its chunk exists");
        let chunk = &mut self.chunks[number];
        if chunk.lacks_row(address, entry) {
            let row = self.spare.rows.pop().unwrap_or_else(|| Box::new([Entry::default(); ROW]));
            chunk.rows[page_index(address) / ROW] = Some(row);
            self.rows += 1;
        }
        let old = chunk.set(address, entry);
        for (entry, is_more) in [(old, false), (entry, true)] {
            if let Some(count) = entry.target().and_then(|target| self.placed.get_mut(target)) {
                *count = if is_more { *count + 1 } else { *count - 1 };
            }
        }
        old
    }

    /// How many chunks there are; they are numbered from 0.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// There is no chunk.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Chunk `number`.
    pub fn chunk(&mut self, number: usize) -> &mut Chunk {
        &mut self.chunks[number]
    }

    /// Starts of the existing chunks that overlap a range, in order.
    pub fn chunks_in(&self, start: usize, end: usize) -> impl Iterator<Item = usize> + '_ {
        let mut chunk = if start < end { start / CHUNK * CHUNK } else { end };
        core::iter::from_fn(move || {
            while chunk < end {
                let here = chunk;
                let step = match self.branch(here) {
                    None => CHUNK * LEAF * BRANCH,
                    Some(branch) if leaf_of(branch, here).is_none() => CHUNK * LEAF,
                    Some(_) => CHUNK,
                };
                if step > CHUNK {
                    chunk = (here / step + 1) * step;
                    continue;
                }
                chunk += CHUNK;
                if self.find(here).is_some() {
                    return Some(here);
                }
            }
            None
        })
    }

    /// Whether a page of the range is away.
    pub fn has_away(&self, start: usize, end: usize) -> bool {
        self.chunks_in(start, end).filter(|&chunk| self.find(chunk).is_some_and(|chunk| chunk.away > 0)).any(
            |chunk| {
                (chunk.max(start)..(chunk + CHUNK).min(end)).step_by(PAGE).any(|page| self.get(page).is_away())
            },
        )
    }

    /// Start of the first existing chunk that overlaps a range.
    pub fn next_chunk(&self, start: usize, end: usize) -> Option<usize> {
        self.chunks_in(start, end).next()
    }

    /// Makes sure that nothing is allocated in a quiet time, within the limits of [`QUIET_SPARES`].
    pub fn quieten(&mut self) {
        let [chunks, leaves, branches] = QUIET_SPARES;
        self.chunks.reserve(chunks);
        self.make_top();
        let Spare { chunks: spare_chunks, rows, leaves: spare_leaves, branches: spare_branches } = &mut self.spare;
        rows.resize_with(chunks * ROWS, || Box::new([Entry::default(); ROW]));
        spare_chunks.resize_with(chunks, || Box::new(Chunk::new(0)));
        spare_leaves.resize_with(leaves, || Box::new([0; LEAF]));
        spare_branches.resize_with(branches, || Box::new([const { None }; BRANCH]));
    }

    /// That is over.
    pub fn end_quiet(&mut self) {
        self.spare = Spare::default();
    }

    /// Counts anew: after a fork, counts, bits and words may be of different times.
    pub fn recount(&mut self) {
        self.placed = [0; MAX_TARGETS];
        self.rows = self.chunks.iter().map(|chunk| chunk.count_rows()).sum();
        for chunk in &mut self.chunks {
            // A word that a page had before it was discarded would be counted for ever.
            let Chunk { rows, discarded, .. } = &mut **chunk;
            for (row, discarded) in rows.iter_mut().zip(discarded) {
                for (page, word) in row.iter_mut().flat_map(|row| row.iter_mut()).enumerate() {
                    if *discarded >> page & 1 != 0 {
                        *word = Entry::default();
                    }
                }
            }
            let words = || chunk.rows.iter().flatten().flat_map(|row| row.iter());
            let count = |is: fn(Entry) -> bool| words().filter(|&&entry| is(entry)).count() as u32;
            let counts = (count(Entry::is_away), count(is_kept), count(Entry::is_refused));
            (chunk.away, chunk.kept, chunk.refused) = counts;
            chunk.placed = count(|entry| entry.target().is_some());
            for target in words().filter_map(|entry| entry.target()) {
                if let Some(count) = self.placed.get_mut(target) {
                    *count += 1;
                }
            }
        }
    }

    /// The handles of all pages in swap files. O(words).
    pub fn swapped(&self) -> impl Iterator<Item = u64> + '_ {
        let chunks = self.chunks.iter().filter(|chunk| chunk.away > 0);
        let words = chunks.flat_map(|chunk| chunk.rows.iter().flatten()).flat_map(|row| row.iter());
        words.filter_map(|word| if let Copy::Swapped(handle) = word.copy() { Some(handle) } else { None })
    }

    /// Pages on mapped nodes are pages like any other from now on. O(words).
    pub fn forget_placed(&mut self) {
        for chunk in self.chunks.iter_mut().filter(|chunk| chunk.placed > 0) {
            for word in chunk.rows.iter_mut().flatten().flat_map(|row| row.iter_mut()) {
                if word.target().is_some() {
                    *word = Entry::present(Copy::None, word.age());
                }
            }
            chunk.placed = 0;
        }
        self.placed = [0; MAX_TARGETS];
    }

    /// Forgets the spares without freeing them: after a fork their list may be torn.
    pub fn leak_spares(&mut self) {
        core::mem::forget(core::mem::take(&mut self.spare));
    }

    fn branch(&self, address: usize) -> Option<&Branch> {
        self.top.get(address / (CHUNK * LEAF * BRANCH))?.as_deref()
    }

    fn number(&self, address: usize) -> Option<usize> {
        let number = leaf_of(self.branch(address)?, address)?[address / CHUNK % LEAF];
        number.checked_sub(1).map(|number| number as usize)
    }

    fn make_top(&mut self) {
        if self.top.is_empty() {
            self.top.resize_with(TOP, || None);
        }
    }

    fn add(&mut self, address: usize) -> usize {
        assert!(address < ADDRESS_END, "a user address has 47 bits");
        self.make_top();
        let mut chunk = self.spare.chunks.pop().unwrap_or_else(|| Box::new(Chunk::new(0)));
        chunk.start = address / CHUNK * CHUNK;
        let branch = self.top[address / (CHUNK * LEAF * BRANCH)].get_or_insert_with(|| {
            self.spare.branches.pop().unwrap_or_else(|| Box::new([const { None }; BRANCH]))
        });
        let leaf = branch[address / (CHUNK * LEAF) % BRANCH]
            .get_or_insert_with(|| self.spare.leaves.pop().unwrap_or_else(|| Box::new([0; LEAF])));
        self.chunks.push(chunk);
        leaf[address / CHUNK % LEAF] = u32::try_from(self.chunks.len()).expect("2^32 chunks are 8 PiB");
        self.chunks.len() - 1
    }
}

fn leaf_of(branch: &Branch, address: usize) -> Option<&Leaf> {
    branch[address / (CHUNK * LEAF) % BRANCH].as_deref()
}

const _: () = assert!(size_of::<Chunk>() + ROWS * size_of::<Row>() <= 9 * CHUNK_PAGES, "at most 9 bytes a page");

#[cfg(test)]
mod tests;
