//! Live: the counters of a running program, from its control page.
//!
//! On a terminal one line is written over and over; elsewhere a line is added each second.

use std::io::{IsTerminal, Write};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use spmem::control::Control;

use crate::size::human;

/// Shows counters when they are due.
pub struct Live {
    start: Instant,
    next: Instant,
    is_terminal: bool,
}

impl Live {
    /// Starts the clock.
    pub fn new() -> Self {
        let now = Instant::now();
        Self { start: now, next: now, is_terminal: std::io::stdout().is_terminal() }
    }

    /// Shows the counters if it is time to.
    pub fn show(&mut self, control: &Control) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        self.next = now + if self.is_terminal { Duration::from_millis(200) } else { Duration::from_secs(1) };
        let line = line(control, self.start.elapsed());
        let text = if self.is_terminal { format!("\r\x1b[K{line}") } else { format!("{line}\n") };
        let mut out = std::io::stdout();
        // A reader that went away is noticed by the tour's next line.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }

    /// Leaves the last line standing.
    pub fn end(self) {
        if self.is_terminal {
            let _ = std::io::stdout().write_all(b"\r\n");
        }
    }
}

fn line(control: &Control, elapsed: Duration) -> String {
    let counters = &control.counters;
    let used = control.sum(|slot| &slot.used_bytes);
    let stored = control.sum(|slot| &slot.stored_bytes);
    let store_used = control.sum(|slot| &slot.store_used_bytes);
    format!(
        "   {:>5.1} s  RAM {:>7}  on node 1 {:>7} in {:>6}  pages out {:>7}, back {:>7}  fault p50 {:.0} us",
        elapsed.as_secs_f64(),
        human(used),
        human(stored),
        human(store_used),
        counters.demoted_pages.load(Relaxed),
        counters.promoted_pages.load(Relaxed) + counters.rescued_pages.load(Relaxed),
        Duration::from_nanos(control.faults.quantile_ns(500)).as_secs_f64() * 1e6,
    )
}
