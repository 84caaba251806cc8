//! The access program as a row of `bench zram`.

use std::io::{BufRead, Write};
use std::path::Path;

use anyhow::{Context, bail};

use crate::bench::zram::{Figures, Probe};
use crate::launch::{Bed, Job, Side};
use crate::process_tree;
use crate::programs::access::{Event, Pattern};
use crate::report::Report;

/// What is accessed how.
pub(super) struct Shape<'a> {
    pub(super) corpus: &'a Path,
    pub(super) mib: u64,
    pub(super) pattern: Pattern,
    pub(super) threads: u32,
    pub(super) warm_seconds: f64,
    pub(super) seconds: f64,
}

/// One run.
pub(super) fn run(
    bed: &Bed,
    side: &Side,
    shape: &Shape<'_>,
    probe: &Probe<'_>,
) -> anyhow::Result<(Figures, Option<Report>)> {
    let words = [
        ("--mib", shape.mib.to_string()),
        ("--pattern", shape.pattern.name().into()),
        ("--threads", shape.threads.to_string()),
        ("--warm-seconds", shape.warm_seconds.to_string()),
        ("--seconds", shape.seconds.to_string()),
    ];
    let job = Job::own("access", &["access".into()])?
        .args(words.into_iter().flat_map(|(name, value)| [name.to_string(), value]))
        .args(["--corpus".as_ref(), shape.corpus.as_os_str()])
        .lines()
        .limit_seconds(600 + shape.warm_seconds as u64 + shape.seconds as u64);
    let mut running = bed.start(side, &job)?;
    let (mut stdin, stdout) = running.pipes()?;
    let mut events = stdout.lines();
    let mut next = || -> anyhow::Result<Option<Event>> {
        let Some(line) = events.next() else { return Ok(None) };
        Ok(Some(serde_json::from_str(&line?).context("the access program said something else")?))
    };
    let mut figures = None;
    let mut cpu_at_start = std::time::Duration::ZERO;
    loop {
        match next()? {
            Some(Event::Warm) => cpu_at_start = process_tree::read_cpu(running.pid()),
            Some(Event::Measured(measured)) => {
                let cpu = process_tree::read_cpu(running.pid()).saturating_sub(cpu_at_start);
                let ram_bytes = probe(running.pid())?;
                stdin.write_all(b"\n")?;
                figures = Some(Figures {
                    rate: measured.operations as f64 / measured.seconds,
                    p50_us: measured.fault_p50_us,
                    p99_us: measured.fault_p99_us,
                    p999_us: measured.fault_p999_us,
                    settle_seconds: (shape.pattern == Pattern::Moving).then(|| settle_seconds(&measured.slices)),
                    slow_share: measured.faults as f64 / measured.operations as f64,
                    cpu_seconds_per_million: cpu.as_secs_f64() * 1e6 / measured.operations as f64,
                    slices: measured.slices,
                    ram_bytes,
                    peak_bytes: running.sampled_peak_bytes(),
                });
            }
            Some(Event::Verified) => break,
            None => {
                running.finish()?.succeeded()?;
                bail!("the access program ended early");
            }
        }
    }
    let finished = running.finish()?;
    finished.succeeded()?;
    Ok((figures.context("the access program measured nothing")?, finished.report))
}

/// Slices that have to be fast together: one alone may be chance.
const TOGETHER: usize = 5;

/// When throughput is settled, s after the phase change: from when on half a second on average makes nine tenths of what the
/// last third makes.
fn settle_seconds(slices: &[u64]) -> f64 {
    let mean = |slices: &[u64]| slices.iter().sum::<u64>() as f64 / slices.len().max(1) as f64;
    let wanted = mean(&slices[slices.len() - slices.len() / 3..]) * 0.9;
    let first = slices.windows(TOGETHER).position(|together| mean(together) >= wanted);
    first.map_or(f64::NAN, |first| first as f64 / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throughput_is_settled_once_half_a_second_makes_what_the_end_makes() {
        let mut slices = vec![10; 20];
        slices.extend([100; 40]);
        assert_eq!(settle_seconds(&slices), 2.0);
        slices[3] = 300;
        assert_eq!(settle_seconds(&slices), 2.0, "one fast slice is not enough");
        assert!(settle_seconds(&[]).is_nan());
    }
}
