//! Load: the program that the tour puts into a budget. It knows nothing of spmem.
//!
//! It fills memory, reads and rewrites it in the patterns of real programs, and compares every byte at the end.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::pages::{self, PAGE, Random};
use crate::arguments::LoadArguments;

/// Exit status when a byte was not what had been written.
pub const WRONG_BYTES: i32 = 3;

/// Pages touched between two looks at the clock.
const BURST: usize = 256;

struct Load {
    pages: Vec<[u8; PAGE]>,
    /// How often each page was rewritten.
    generations: Vec<u32>,
    random: Random,
    wrong_pages: u64,
}

/// Runs the load; the exit status says whether every byte was right.
///
/// # Errors
/// There is no memory.
pub fn run(options: &LoadArguments) -> anyhow::Result<i32> {
    let count = (options.mebibytes << 20) / PAGE;
    let mut load = Load { pages: Vec::new(), generations: vec![0; count], random: Random::new(1), wrong_pages: 0 };
    load.pages.try_reserve_exact(count)?;
    say(&format!("filling {} MiB", options.mebibytes));
    load.fill(count);
    let third = Duration::from_millis(options.touch_ms / 3);
    say("reading it in order");
    load.touch(third, |load, step| load.check(step % count));
    say("reading and rewriting a hot tenth at random, the rest now and then");
    load.touch(third, |load, _| {
        let is_hot = load.random.below(10) < 9;
        let index = load.random.below(if is_hot { count / 10 } else { count });
        if load.random.below(4) == 0 { load.rewrite(index) } else { load.check(index) }
    });
    say("touching all of it at random");
    load.touch(third, |load, _| {
        let index = load.random.below(count);
        load.check(index);
    });
    say("checking every byte");
    (0..count).for_each(|index| load.check(index));
    say(&format!("{} pages, {} reads of wrong bytes", count, load.wrong_pages));
    Ok(if load.wrong_pages == 0 { 0 } else { WRONG_BYTES })
}

impl Load {
    fn fill(&mut self, count: usize) {
        for number in 0..count as u64 {
            let mut page = [0; PAGE];
            pages::fill(&mut page, number, 0);
            self.pages.push(page);
        }
    }

    fn touch(&mut self, time: Duration, mut step: impl FnMut(&mut Self, usize)) {
        let end = Instant::now() + time;
        let mut count = 0;
        while Instant::now() < end {
            for _ in 0..BURST {
                step(self, count);
                count += 1;
            }
        }
    }

    fn rewrite(&mut self, index: usize) {
        self.generations[index] += 1;
        pages::fill(&mut self.pages[index], index as u64, self.generations[index]);
    }

    fn check(&mut self, index: usize) {
        let mut expected = [0; PAGE];
        pages::fill(&mut expected, index as u64, self.generations[index]);
        self.wrong_pages += u64::from(self.pages[index] != expected);
    }
}

/// One line of its own, also where the tour's counters stand on the last one.
fn say(text: &str) {
    let mut out = std::io::stdout();
    let clear = if out.is_terminal() { "\r\x1b[K" } else { "" };
    // Its exit status is what counts.
    let _ = out.write_all(format!("{clear}   > {text}\n").as_bytes());
}
