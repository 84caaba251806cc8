//! In a guest of `cargo xtask vm`: which sources of heat this kernel has, and whether each that it has can be used.
//!
//! What [`spmem_node::heat::facts`] finds is held against the kernel's own files, and the program [`heat`](super::heat), which checks
//! every byte of its own, is started with each source. How well a source follows is not judged: an emulator keeps
//! translations far longer than a processor. Called by `cargo xtask vm-test` on the topology numa4.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use serde_json::Value;
use spmem_node::heat::{self, Source};

use super::vm_facts::Facts;

/// Since 7.x on in Debian's kernels, and then DAMON's only user.
const DAMON_STAT: &str = "/sys/module/damon_stat/parameters/enabled";
/// What each takes of the kernel.
const FILES: [(Source, &str); 2] =
    [(Source::Damon, "/sys/kernel/mm/damon"), (Source::Idle, "/sys/kernel/mm/page_idle/bitmap")];

/// Runs it.
///
/// # Errors
/// A source is not what the kernel has.
pub(super) fn run() -> anyhow::Result<()> {
    let mut facts = Facts::default();
    if fs::read_to_string(DAMON_STAT).is_ok_and(|text| text.starts_with('Y')) {
        let lack = heat::facts(Path::new("/")).damon;
        let said = lack.map(|lack| lack.to_string()).unwrap_or_default();
        facts.note(said.contains(DAMON_STAT), format!("damon beside DAMON_STAT: {said:?}"));
        fs::write(DAMON_STAT, "N").context("DAMON_STAT stays on")?;
    }
    let seen = heat::facts(Path::new("/"));
    for (source, file) in FILES {
        let lack = seen.lack(source);
        let said = lack.map_or("it can be had".to_owned(), |lack| lack.to_string());
        facts.note(lack.is_none() == Path::new(file).exists(), format!("{source}: {said}; {file}"));
    }
    for source in [Source::Rwp, Source::Damon, Source::Idle] {
        if let Some(lack) = seen.lack(source) {
            println!("not tried: {source}: {lack}");
            continue;
        }
        check(&mut facts, source)?;
    }
    facts.end()
}

/// The program ends well where every look was answered and every byte is what it must be.
fn check(facts: &mut Facts, source: Source) -> anyhow::Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["program", "heat", "--from", source.name(), "--mib", "16", "--hot-mib", "1", "--moves", "1"]);
    let output = command.args(["--stay-seconds", "3"]).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let errors = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let figures: Value = serde_json::from_str(&said).unwrap_or_default();
    let is_right = output.status.success() && figures["hot_pages"] == 256;
    facts.note(is_right, format!("{source}: {}, {said} {errors}", output.status));
    if source == Source::Rwp {
        let missed = figures["missed_pages"].as_f64().unwrap_or(f64::INFINITY);
        facts.note(missed < 256.0, format!("{source}: {missed} of 256 hot pages are missed"));
    }
    Ok(())
}
