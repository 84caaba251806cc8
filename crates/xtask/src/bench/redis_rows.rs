//! Redis as a row of `bench zram`.

use std::time::Duration;

use crate::bench::zram::{Figures, Probe};
use crate::launch::{Bed, Side};
use crate::process_tree;
use crate::redis::{Server, Store, Until};

/// Blocking connections of the client: enough to keep the one thread of the server busy.
const CONNECTIONS: u32 = 4;
const SET_PERCENT: u32 = 30;

/// How much is stored, how long it is asked for.
pub(super) struct Shape {
    pub(super) mib: u64,
    pub(super) warm_seconds: f64,
    pub(super) seconds: f64,
}

/// One run: fill, warm up, measure, compare every value.
pub(super) fn run(bed: &Bed, side: &Side, shape: &Shape, probe: &Probe<'_>) -> anyhow::Result<Figures> {
    let server = Server::start(bed, side)?;
    let mut store = Store::new(shape.mib, CONNECTIONS);
    store.fill(&server)?;
    store.traffic(&server, Until::Elapsed(Duration::from_secs_f64(shape.warm_seconds)), SET_PERCENT, 1)?;
    let cpu_at_start = process_tree::read_cpu(server.pid());
    let traffic =
        store.traffic(&server, Until::Elapsed(Duration::from_secs_f64(shape.seconds)), SET_PERCENT, 2)?;
    let cpu = process_tree::read_cpu(server.pid()).saturating_sub(cpu_at_start);
    let ram_bytes = probe(server.pid())?;
    store.compare_all(&server)?;
    let finished = server.shut_down()?;
    Ok(Figures {
        rate: traffic.rate(),
        p50_us: traffic.quantile_us(0.5),
        p99_us: traffic.quantile_us(0.99),
        p999_us: traffic.quantile_us(0.999),
        slow_share: f64::NAN,
        settle_seconds: None,
        slices: Vec::new(),
        cpu_seconds_per_million: cpu.as_secs_f64() * 1e6 / traffic.requests as f64,
        ram_bytes,
        peak_bytes: finished.sampled_peak_bytes,
    })
}
