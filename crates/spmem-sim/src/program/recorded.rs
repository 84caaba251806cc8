//! Recordings: what `spm run --trace` saw of a run, made into programs that can be run again, within any budget.
//!
//! A run is seen where the runtime acts: faults, demotions, refusals. Touches of pages that are in their place leave no
//! record. So a replay within the same budget or a smaller one misses some of what would be touched there, and one within a
//! larger budget has all that matters. What is not seen is made up for as little as can be: a page that leaves was written
//! before; of pages that came along with another each is touched; a process is one thread, because one handler serves it.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::de::Error as _;
use serde::{Deserialize, Serialize};
use spmem_core::units::{Bytes, FrameCount};

use super::source::{Access, Source};
use super::{Content, Costs, Program, Setup};
use crate::trace::{TraceError, read_lines};

/// In the header.
const NAME: &str = "spmem_program_trace";
/// Pages of an address space of 57 bits.
const PAGES: u64 = 1 << (57 - 12);
/// More pages never come at once: what the kernel maps by one entry, 1 GiB.
const CAME_MAX: u64 = 1 << (30 - 12);
/// A first touch that was not seen takes so long, ns.
const UNSEEN_NS: u64 = 500;
/// A thread that was away longer did something else, ns.
const THINK_MAX_NS: u64 = 10_000_000;

/// A line of a recording. Pages go by number: address divided by 4096. Times are ns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Record {
    /// RAM that the tree may take; none: no limit.
    Budget {
        /// In bytes.
        bytes: Option<u64>,
    },
    /// A page was touched that was not in its place.
    Fault {
        /// When it was served.
        ns: u64,
        /// The process id.
        process: u32,
        /// The page.
        page: u64,
        /// How many pages came from there on.
        pages: u64,
        /// Whether the touch was a write.
        is_write: bool,
        /// Where the page was.
        from: From,
    },
    /// A page left for node 1.
    Demote {
        /// When.
        ns: u64,
        /// The process id.
        process: u32,
        /// The page.
        page: u64,
        /// What it takes there; 0 for one filled with a value.
        bytes: u64,
    },
    /// A page left for a node that the configuration names: it is mapped there, or was copied to its file.
    Place {
        /// When.
        ns: u64,
        /// The process id.
        process: u32,
        /// The page.
        page: u64,
        /// The node's number.
        node: u64,
    },
    /// A page could not leave.
    Refuse {
        /// When.
        ns: u64,
        /// The process id.
        process: u32,
        /// The page.
        page: u64,
        /// Why not.
        why: Why,
    },
    /// Pages were unmapped, moved away or discarded.
    Drop {
        /// When.
        ns: u64,
        /// The process id.
        process: u32,
        /// The first page.
        page: u64,
        /// How many.
        pages: u64,
    },
    /// Records are missing here.
    Lost {
        /// How many.
        records: u64,
    },
}

/// Where a page was when it was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum From {
    /// It was never written, or was discarded.
    Nowhere,
    /// In the holding area.
    Holding,
    /// On node 1, or in the file of a node that is one.
    Node,
    /// On a node where it is mapped, in its place: it was written there, behind a fence.
    Mapped,
}

/// Why a page could not leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// It does not compress (R19).
    Incompressible,
    /// It is pinned for I/O.
    Pinned,
    /// It is shared since a fork.
    Shared,
}

/// What was recorded of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recording {
    /// Line by line.
    pub records: Vec<Record>,
}

impl Recording {
    /// Reads a recording.
    ///
    /// ```
    /// use spmem_core::units::Bytes;
    /// use spmem_sim::program::{Recording, run};
    /// let text = concat!(
    ///     "{\"spmem_program_trace\":1}\n",
    ///     "{\"budget\":{\"bytes\":1048576}}\n",
    ///     "{\"demote\":{\"ns\":10,\"process\":7,\"page\":100,\"bytes\":1200}}\n",
    ///     "{\"fault\":{\"ns\":20,\"process\":7,\"page\":100,\"pages\":1,\"is_write\":false,\"from\":\"node\"}}\n",
    /// );
    /// let recording = Recording::read(text).unwrap();
    /// assert_eq!(recording.budget(), Some(Bytes::mib(1)));
    /// assert_eq!(run(recording.setup(Bytes::mib(1))).unwrap().accesses, 2);
    /// ```
    ///
    /// # Errors
    /// [`TraceError`] names the line.
    pub fn read(text: &str) -> Result<Self, TraceError> {
        let records: Vec<Record> = read_lines(text, NAME)?;
        match records.iter().zip(2..).find(|(record, _)| !record.can_be()) {
            Some((record, line)) => {
                let cause = serde_json::Error::custom(format!("no run has such pages: {record:?}"));
                Err(TraceError::Line { line, cause })
            }
            None => Ok(Self { records }),
        }
    }

    /// Whether a text begins as a recording does.
    pub fn is_one(text: &str) -> bool {
        text.lines().next().is_some_and(|line| line.contains(NAME))
    }

    /// RAM that the run was given.
    pub fn budget(&self) -> Option<Bytes> {
        self.records.iter().find_map(|record| match record {
            Record::Budget { bytes } => bytes.map(Bytes),
            _ => None,
        })
    }

    /// Records that are missing.
    pub fn lost(&self) -> u64 {
        let lost =
            self.records.iter().map(|record| if let Record::Lost { records } = record { *records } else { 0 });
        lost.fold(0, u64::saturating_add)
    }

    /// The tree that did this, within a budget.
    pub fn setup(&self, limit: Bytes) -> Setup {
        let mut seen: BTreeMap<u32, Seen> = BTreeMap::new();
        for record in &self.records {
            if let Some(process) = record.process() {
                seen.entry(process).or_default().note(record);
            }
        }
        let programs: Vec<Program> = seen.into_values().map(Seen::program).collect();
        let pages: usize = programs.iter().map(|program| program.pages).sum();
        Setup { limit, node: FrameCount(pages.max(1) as u64), programs, costs: Costs::default() }
    }
}

impl Record {
    /// Whether a process has such pages, and as many came at once.
    fn can_be(&self) -> bool {
        match *self {
            Self::Fault { page, pages, .. } => page < PAGES && pages <= CAME_MAX,
            Self::Demote { page, .. }
            | Self::Place { page, .. }
            | Self::Refuse { page, .. }
            | Self::Drop { page, .. } => page < PAGES,
            Self::Budget { .. } | Self::Lost { .. } => true,
        }
    }

    const fn process(&self) -> Option<u32> {
        match self {
            Self::Fault { process, .. }
            | Self::Demote { process, .. }
            | Self::Place { process, .. }
            | Self::Refuse { process, .. }
            | Self::Drop { process, .. } => Some(*process),
            Self::Budget { .. } | Self::Lost { .. } => None,
        }
    }
}

/// What was seen of a process.
#[derive(Default)]
struct Seen {
    /// Pages that have been touched.
    touched: HashSet<u64>,
    /// Page, whether it was written, and time since the one before, ns.
    touches: Vec<(u64, bool, u64)>,
    /// Bytes on node 1; none for one that cannot leave.
    sizes: HashMap<u64, Option<u16>>,
    last_ns: Option<u64>,
}

impl Seen {
    fn note(&mut self, record: &Record) {
        match *record {
            Record::Fault { ns, page, pages, is_write, from, .. } => {
                if from != From::Nowhere {
                    (page..page + pages).for_each(|page| self.note_there(page));
                }
                let think = ns.saturating_sub(self.last_ns.unwrap_or(ns)).min(THINK_MAX_NS);
                self.last_ns = Some(ns);
                for at in page..page + pages {
                    self.touched.insert(at);
                    let is_first = at == page;
                    self.touches.push((at, is_write && is_first, if is_first { think } else { UNSEEN_NS }));
                }
            }
            Record::Demote { page, bytes, .. } => {
                self.note_there(page);
                self.sizes.insert(page, Some(u16::try_from(bytes).unwrap_or(u16::MAX)));
            }
            Record::Place { page, .. } => {
                self.note_there(page);
                // It took none of the budget. What it would take on node 1 nobody has seen.
                self.sizes.entry(page).or_insert(Some(0));
            }
            Record::Refuse { page, why, .. } => {
                self.note_there(page);
                // One that is shared may leave later.
                if why != Why::Shared {
                    self.sizes.insert(page, None);
                }
            }
            Record::Drop { .. } | Record::Budget { .. } | Record::Lost { .. } => {}
        }
    }

    /// A page is there, so it was written, seen or not.
    fn note_there(&mut self, page: u64) {
        if self.touched.insert(page) {
            self.touches.push((page, true, UNSEEN_NS));
        }
    }

    /// Pages get numbers from 0 on; neighbours stay neighbours, and what is between others counts as one page.
    fn program(self) -> Program {
        let mut pages: Vec<u64> = self.touched.into_iter().collect();
        pages.sort_unstable();
        let mut numbers = HashMap::with_capacity(pages.len());
        let (mut next, mut before) = (0, None);
        for &page in &pages {
            next += usize::from(before.is_some_and(|before| before + 1 != page));
            numbers.insert(page, next);
            (next, before) = (next + 1, Some(page));
        }
        let known: Vec<u64> = self.sizes.values().flatten().map(|&bytes| u64::from(bytes)).collect();
        let mean = known.iter().sum::<u64>().checked_div(known.len() as u64);
        let mean = mean.map(|mean| u16::try_from(mean).unwrap_or(u16::MAX));
        let mut content = vec![mean; next];
        for (page, bytes) in &self.sizes {
            content[numbers[page]] = *bytes;
        }
        let touches = self.touches.into_iter();
        let access = |(page, is_write, think_ns)| Access { page: numbers[&page], is_write, think_ns };
        let accesses: Vec<Access> = touches.map(access).collect();
        let threads = vec![Source::Given(accesses.into_iter())];
        Program { pages: next, content: Content::Known(content), threads }
    }
}
