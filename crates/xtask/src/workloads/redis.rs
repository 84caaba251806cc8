//! Redis as a workload: fill, random requests, save in a forked child, reload, compare every value.

use std::time::Instant;

use crate::launch::{Bed, Side};
use crate::redis::{Server, Store, Until};
use crate::report::Report;
use crate::workloads::{Outcome, Scale};

const CONNECTIONS: u32 = 4;
const SET_PERCENT: u32 = 20;

/// Runs it; both servers, before and after the reload, have the same budget.
pub(super) fn run(bed: &Bed, side: &Side, scale: Scale) -> anyhow::Result<Outcome> {
    let (mib, requests) = scale.pick((500, 400_000), (48, 30_000));
    let _ = std::fs::remove_file(bed.dir.join("dump.rdb"));
    let started = Instant::now();
    let lap = |since: &mut Instant| {
        let seconds = since.elapsed().as_secs_f64();
        *since = Instant::now();
        seconds
    };
    let mut since = started;
    let server = Server::start(bed, side)?;
    let mut store = Store::new(mib, CONNECTIONS);
    store.fill(&server)?;
    let fill = lap(&mut since);
    let traffic = store.traffic(&server, Until::Requests(requests), SET_PERCENT, 1)?;
    lap(&mut since);
    server.background_save()?;
    let save = lap(&mut since);
    let before = server.shut_down()?;
    lap(&mut since);
    let server = Server::start(bed, side)?;
    let reload = lap(&mut since);
    let digest = store.compare_all(&server)?;
    let compare = lap(&mut since);
    let after = server.shut_down()?;
    let report = match (before.report, after.report) {
        (Some(before), Some(after)) => Some(Report::merge(before, &after)),
        _ => None,
    };
    Ok(Outcome {
        seconds: started.elapsed().as_secs_f64(),
        digest,
        max_rss_bytes: before.max_rss_bytes.max(after.max_rss_bytes),
        sampled_peak_bytes: before.sampled_peak_bytes.max(after.sampled_peak_bytes),
        report,
        figures: vec![
            ("fill s", fill),
            ("requests/s", traffic.rate()),
            ("p50 us", traffic.quantile_us(0.5)),
            ("p99 us", traffic.quantile_us(0.99)),
            ("p99.9 us", traffic.quantile_us(0.999)),
            ("BGSAVE s", save),
            ("reload s", reload),
            ("compare s", compare),
        ],
    })
}
