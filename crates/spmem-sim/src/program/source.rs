//! What threads do: which page next, after how long, and whether it is written.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// One touch of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The page, by number from the start of the address space.
    pub page: usize,
    /// Whether it is written.
    pub is_write: bool,
    /// What the thread does before, ns.
    pub think_ns: u64,
}

/// How a thread goes over its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Any page as likely as any other.
    Uniform,
    /// A few are touched most of the time: the rank of a page is the product of three uniform numbers.
    Skewed,
    /// One after the other, round and round.
    Sequential,
    /// A tenth is hot, and is another tenth after each tenth of the run.
    Moving,
}

/// What a thread does.
#[derive(Clone, Debug)]
pub enum Source {
    /// Made from a seed.
    Made {
        /// How.
        pattern: Pattern,
        /// Its random numbers.
        random: Box<Pcg64Mcg>,
        /// The first page, and how many.
        span: (usize, usize),
        /// Accesses in all, and so far.
        count: (usize, usize),
        /// Of a thousand, those that write.
        writes: u64,
    },
    /// These, in their order.
    Given(std::vec::IntoIter<Access>),
}

impl Source {
    /// `count` accesses from a seed: first all pages of the span are written in order, then `pattern` decides.
    pub fn made(seed: u64, pattern: Pattern, span: (usize, usize), count: usize, writes: u64) -> Self {
        let random = Box::new(Pcg64Mcg::seed_from_u64(seed));
        Self::Made { pattern, random, span, count: (count, 0), writes }
    }

    pub(super) fn next(&mut self) -> Option<Access> {
        let (pattern, random, (first, pages), (count, at), writes) = match self {
            Self::Given(accesses) => return accesses.next(),
            Self::Made { pattern, random, span, count, writes } => (*pattern, random, *span, count, *writes),
        };
        if *at >= *count || pages == 0 {
            return None;
        }
        let now = *at;
        *at += 1;
        if now < pages {
            return Some(Access { page: first + now, is_write: true, think_ns: 100 });
        }
        let page = match pattern {
            Pattern::Uniform => random.random_range(0..pages),
            Pattern::Sequential => now % pages,
            Pattern::Skewed => {
                let below = random.random_range(0..pages);
                let below = random.random_range(0..=below);
                let rank = random.random_range(0..=below);
                // Ranks are spread over the address space.
                rank.wrapping_mul(0x9e37_79b9) % pages
            }
            Pattern::Moving => {
                let hot = (pages / 10).max(1);
                let phase = now * 10 / *count;
                if random.random_bool(0.95) {
                    (phase * hot + random.random_range(0..hot)) % pages
                } else {
                    random.random_range(0..pages)
                }
            }
        };
        let is_write = random.random_range(0..1000) < writes;
        Some(Access { page: first + page, is_write, think_ns: 200 })
    }
}

/// A thread of the program.
#[derive(Debug)]
pub(super) struct Thread {
    pub(super) source: Source,
    pub(super) next: Option<Access>,
    /// Since when its fault waits, ns.
    pub(super) since_ns: Option<u64>,
}

impl Thread {
    pub(super) fn think(&mut self, now: u64) -> Option<u64> {
        self.next = self.source.next();
        self.next.map(|access| now + access.think_ns)
    }
}
