//! The workloads that are one command each.

use std::fs;

use crate::launch::{Bed, Job, Side};
use crate::packages;
use crate::workloads::{Outcome, Scale, sources};

/// Longest that a job may take: a budget may slow it down a lot, a hang must end.
const LIMIT_SECONDS: u64 = 1800;

/// The shell of SQLite with a database in memory.
pub(super) fn sqlite(bed: &Bed, side: &Side, scale: Scale) -> anyhow::Result<Outcome> {
    let program = packages::need("sqlite3", "sqlite3")?;
    let script = bed.dir.join("sqlite.sql");
    fs::write(&script, sources::sql_script(scale.pick(5_000_000, 100_000)))?;
    let mut job = Job::new("sqlite", program).args(["-batch", "-bail", ":memory:"]).limit_seconds(LIMIT_SECONDS);
    job.stdin = Some(script);
    Ok(Outcome::of(bed.run(side, &job)?))
}

/// numpy: sorting, grouping, matrix products.
pub(super) fn numpy(bed: &Bed, side: &Side, scale: Scale) -> anyhow::Result<Outcome> {
    let python = packages::need_numpy(&bed.cache)?;
    let (rows, matrix) = scale.pick((12_000_000, 3000), (500_000, 600));
    let job = Job::new("numpy", python)
        .args(["-c", include_str!("../../programs/columns.py"), &rows.to_string(), &matrix.to_string()])
        .limit_seconds(LIMIT_SECONDS);
    Ok(Outcome::of(bed.run(side, &job)?))
}

/// GNU sort with a buffer that takes all lines.
pub(super) fn sort(bed: &Bed, side: &Side, scale: Scale) -> anyhow::Result<Outcome> {
    let program = packages::need("sort", "coreutils")?;
    let input = bed.dir.join("sort.input");
    if !input.exists() {
        sources::write_lines(&input, scale.pick(3_500_000, 250_000))?;
    }
    let job = Job::new("sort", program)
        .args(["--buffer-size=4G", "--parallel=2", "--key=3", "sort.input"])
        .env("LC_ALL", "C")
        .limit_seconds(LIMIT_SECONDS);
    Ok(Outcome::of(bed.run(side, &job)?))
}

/// g++ on one large generated file; its assembly is the output.
pub(super) fn compiler(bed: &Bed, side: &Side, scale: Scale) -> anyhow::Result<Outcome> {
    let program = packages::need("g++", "g++")?;
    fs::write(bed.dir.join("large.cc"), sources::cxx_source(scale.pick(30, 1)))?;
    let job = Job::new("g++", program)
        .args(["-O1", "-g", "-std=c++17", "-frandom-seed=1", "-S", "-o", "-", "large.cc"])
        .limit_seconds(LIMIT_SECONDS);
    Ok(Outcome::of(bed.run(side, &job)?))
}

/// Threads over a shared hash map: a program of this tree.
pub(super) fn threads(bed: &Bed, side: &Side, scale: Scale) -> anyhow::Result<Outcome> {
    let (keys, operations) = scale.pick(("400000", "1000000"), ("50000", "50000"));
    let words = ["shared-map", "--threads", "4", "--keys", keys, "--operations", operations].map(String::from);
    let job = Job::own("threads", &words)?.limit_seconds(LIMIT_SECONDS);
    Ok(Outcome::of(bed.run(side, &job)?))
}
