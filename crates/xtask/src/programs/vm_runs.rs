//! In a guest of `cargo xtask vm`: cold pages of `spm run`'s programs on a node of the kernel's, behind walls and without.
//!
//! Each row starts [`vm_runs_probe`](super::vm_runs_probe), which checks every byte and asks the kernel where its pages are. Node 2 is
//! where they go, by configuration. And memory that fails, and disks that are slow or fail ([`vm_runs_disk`]). Where there is a dax device, it is that ([`vm_runs_dax`]). Called by
//! `cargo xtask vm-test` on the topologies numa4 and hmem.
#![allow(unsafe_code, reason = "another user, between fork and exec")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use rustix::fs::{Gid, Uid};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde_json::Value;

use super::vm_facts::Facts;
use super::vm_runs_probe::HOT;
use super::vm_wall::{NOBODY, within_seconds};
use super::vm_wall_rights::{delegate, process_of, start_in};
use super::{vm_runs_dax, vm_runs_disk};

/// What to hold against.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// Where `spm` is.
    #[arg(long)]
    spm: PathBuf,
    /// Only rows that begin with one of these.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

/// Nodes by name: open, tried (out, whatever else the kernel tells of heat), fenced, small, two.
const CONFIGS: [(&str, &str); 5] = [
    ("open", "[[node]]\nid = 2\nkind = \"numa\"\n"),
    ("tried", "[run]\nheat = \"holding\"\n[[node]]\nid = 2\nkind = \"numa\"\n"),
    ("fenced", "[[node]]\nid = 7\nkind = \"numa\"\nnode = 2\nwrite_fence = true\n"),
    ("small", "[[node]]\nid = 2\nkind = \"numa\"\ncapacity = \"4M\"\n"),
    (
        "two",
        "[[node]]\nid = 2\nkind = \"numa\"\ncapacity = \"4M\"\n\
         [[node]]\nid = 3\nkind = \"numa\"\ncapacity = \"4M\"\nwrite_fence = true\n",
    ),
];

/// The words of the probe, the node, the flags of the wall.
const ROWS: [(&str, &str, &[&str]); 13] = [
    ("write", "fenced", &["--guard", "hard"]),
    ("fork", "open", &["--guard", "hard"]),
    ("unmap", "open", &["--guard", "hard"]),
    ("read", "open", &["--guard", "hard"]),
    ("hot", "open", &["--guard", "hard"]),
    ("hot", "tried", &[]),
    ("write", "open", &[]),
    ("fork", "fenced", &["--mems", "0-1"]),
    ("threads", "fenced", &["--sysram-nodes", "0"]),
    ("unmap", "fenced", &[]),
    ("read --mib 14", "small", &["--guard", "hard"]),
    ("read --mib 16 --node 3", "two", &["--guard", "hard"]),
    ("fork --mib 16", "two", &["--guard", "hard"]),
];

/// Runs it.
///
/// # Errors
/// A row is not as it says.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let is_wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|only| name.starts_with(only));
    if let Some(device) = vm_runs_dax::find_device() {
        return vm_runs_dax::run(&options.spm, device, &is_wanted);
    }
    let mut facts = Facts::default();
    // What is tried here is who moves pages; the kernel's own idea of where they belong is tried with `fork open`.
    let balancing = "/proc/sys/kernel/numa_balancing";
    for (words, config, wall) in ROWS {
        if is_wanted(&format!("{words} {config}")) {
            fs::write(balancing, if words == "fork" { "1" } else { "0" }).context("no NUMA balancing")?;
            check(&mut facts, &options.spm, words, config, wall)?;
        }
    }
    if is_wanted("delegated") {
        check_delegated(&mut facts, &options.spm)?;
    }
    if is_wanted("killed") {
        check_killed(&mut facts, &options.spm)?;
    }
    for what in ["resident", "held", "node1"] {
        if is_wanted(&format!("failed {what}")) {
            check_failed_memory(&mut facts, &options.spm, what)?;
        }
    }
    vm_runs_disk::check(&mut facts, &options.spm, &is_wanted)?;
    facts.end()
}

fn command(spm: &Path, config: &str, wall: &[&str], words: &str) -> anyhow::Result<(Command, PathBuf)> {
    let folder = std::env::temp_dir();
    let (file, report) = (folder.join(format!("{config}.toml")), folder.join("report.json"));
    let text = CONFIGS.iter().find(|(name, _)| *name == config).context("no such configuration")?.1;
    fs::write(&file, text)?;
    let _ = fs::remove_file(&report);
    let mut command = Command::new(spm);
    command.args(["run", "--sysram", "5M", "--config"]).arg(&file).arg("--json").arg(&report).args(wall).arg("--");
    command.arg(std::env::current_exe()?).args(["program", "vm-runs-probe"]).args(words.split(' '));
    if config == "fenced" {
        command.arg("--fenced");
    }
    Ok((command, report))
}

fn check(facts: &mut Facts, spm: &Path, words: &str, config: &str, wall: &[&str]) -> anyhow::Result<()> {
    let (mut command, report) = command(spm, config, wall, words)?;
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stdout).trim().replace('\n', "; ");
    let errors = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    let name =
        format!("{words}, node {config}, {}", if wall.is_empty() { "no wall".to_owned() } else { wall.join(" ") });
    facts.note(output.status.success() && said.ends_with("done"), format!("{name}: {said} {errors}"));
    let text = fs::read_to_string(&report).unwrap_or_default();
    let report: Value = serde_json::from_str(&text).unwrap_or_default();
    let mapped = report["nodes"].as_array().and_then(|nodes| nodes.get(2..)).unwrap_or_default();
    facts.equal(&format!("{name}: mapped nodes"), mapped.len(), if config == "two" { 2 } else { 1 });
    let sum = |key: &str| mapped.iter().filter_map(|node| node[key].as_u64()).sum::<u64>();
    for (node, kernel_node) in mapped.iter().zip(2..) {
        let number = |key: &str| node[key].as_u64().unwrap_or_default();
        facts.note(
            number("demoted_pages") >= 128 && node["kernel_node"] == kernel_node,
            format!("{name}: the report has {node}"),
        );
        facts.note(
            number("used_bytes_peak") <= number("capacity_bytes"),
            format!("{name}: {} of {} bytes", number("used_bytes_peak"), number("capacity_bytes")),
        );
    }
    if ["small", "two"].contains(&config) {
        let compressed = report["demoted_pages"].as_u64().unwrap_or_default() - sum("demoted_pages");
        facts.note(compressed > 0, format!("{name}: {compressed} pages went to node 1 once the others were full"));
    }
    if config == "fenced" && words != "unmap" {
        facts.note(sum("promoted_pages") > 0, format!("{name}: writes have promoted {}", sum("promoted_pages")));
    }
    if words == "hot" {
        let promoted = sum("promoted_pages");
        facts.note(promoted >= u64::from(HOT / 4 * 3), format!("{name}: reads have promoted {promoted}"));
    }
    Ok(())
}

/// Alone in a delegated cgroup `spm` has to leave it, and takes the porter along: outside of the wall, and nothing stays behind.
fn check_delegated(facts: &mut Facts, spm: &Path) -> anyhow::Result<()> {
    for who in ["root", "a user with CAP_SYS_PTRACE"] {
        let name = format!("delegated cgroup, {who}");
        let folder = delegate()?;
        let (mut command, report) = command(spm, "open", &["--guard", "hard"], "read")?;
        start_in(&mut command, &folder)?;
        if who != "root" {
            fs::write(&report, "")?;
            std::os::unix::fs::chown(&report, Some(NOBODY), Some(NOBODY))?;
            // SAFETY: makes system calls only, between fork and exec.
            unsafe { command.pre_exec(become_tracing_user) };
        }
        let output = command.stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stdout).trim().replace('\n', "; ");
        let errors = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        facts.note(output.status.success() && said.ends_with("done"), format!("{name}: {said} {errors}"));
        let is_empty = within_seconds(|| fs::remove_dir(&folder).is_ok());
        facts.note(is_empty, format!("{name}: given back empty"));
    }
    // The porter ends after the last process of the wall.
    let folder = delegate()?;
    let (mut command, _) = command(spm, "open", &["--guard", "hard"], "wait")?;
    start_in(&mut command, &folder)?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut said = BufReader::new(child.stdout.take().context("no pipe")?);
    said.read_line(&mut String::new())?;
    let porter = process_of("spm-porter", "").context("no porter")?;
    kill_process(porter, Signal::STOP)?;
    child.stdin.take().context("no pipe")?.write_all(b"go\n")?;
    let status = child.wait()?;
    let has_cgroups = || {
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        entries.filter(|entry| entry.path().is_dir()).count() > 0
    };
    let is_tidy = within_seconds(|| !has_cgroups());
    facts.note(status.success() && is_tidy, format!("delegated cgroup, the porter ends last: {status}"));
    kill_process(porter, Signal::CONT)?;
    let is_empty = within_seconds(|| fs::remove_dir(&folder).is_ok());
    facts.note(is_empty, "delegated cgroup, the porter ends last: given back empty".to_owned());
    Ok(())
}

/// [`NOBODY`], with the one right that `spm run` takes.
fn become_tracing_user() -> std::io::Result<()> {
    let rights = CapabilitySet::SYS_PTRACE;
    let sets = CapabilitySets { effective: rights, permitted: rights, inheritable: rights };
    rustix::thread::set_keep_capabilities(true)?;
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_gid(Gid::from_raw(NOBODY))?;
    rustix::thread::set_thread_uid(Uid::from_raw(NOBODY))?;
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::configure_capability_in_ambient_set(rights, true)?;
    Ok(())
}

/// `spm` is killed, and the porter ends with it: the program reads and writes its pages all the same.
fn check_killed(facts: &mut Facts, spm: &Path) -> anyhow::Result<()> {
    // Behind a wall it is the porter that is believed: `spm` is in there, too.
    for (config, wall) in [("open", &[][..]), ("fenced", &["--guard", "hard"])] {
        let (mut command, _) = command(spm, config, wall, "wait")?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut said = BufReader::new(child.stdout.take().context("no pipe")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        facts.note(line.starts_with("placed"), format!("killed, {config}: {}", line.trim()));
        let pid = line.split_whitespace().last().unwrap_or_default();
        let file = std::env::temp_dir().join(format!("{config}.toml"));
        let audit = Command::new(spm).args(["audit", pid, "--json", "--config"]).arg(file).output()?;
        let id = if config == "fenced" { "7" } else { "2" };
        let by = serde_json::json!({ "kind": "run", "process": child.id(), "grant": id });
        let found: Value = serde_json::from_slice(&audit.stdout).unwrap_or_default();
        facts.note(
            audit.status.success() && found[0]["by"] == by && found[0]["is_clean"] == true,
            format!("killed, {config}: audit says {found}"),
        );
        kill_process(Pid::from_raw(child.id().cast_signed()).context("no process")?, Signal::KILL)?;
        let mut told = child.stdin.take().context("no pipe")?;
        child.wait()?;
        told.write_all(b"go\n")?;
        line.clear();
        said.read_line(&mut line)?;
        facts.equal(&format!("killed, {config}: the program goes on"), line.trim(), "done");
    }
    Ok(())
}

/// Memory that the machine reports as failed costs the page that is in it, or, under node 1, the process: nobody else, and both
/// are told of. See [`vm_poison_probe`](super::vm_poison_probe).
fn check_failed_memory(facts: &mut Facts, spm: &Path, what: &str) -> anyhow::Result<()> {
    let mut command = Command::new(spm);
    command.args(["run", "--sysram", "5M", "--"]).arg(std::env::current_exe()?);
    let output = command.args(["program", "vm-poison-probe", what]).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let both = format!("{} {}", said.trim(), errors.trim()).replace('\n', "; ");
    let poisoned = said.lines().find_map(|line| line.strip_prefix("poisoned ")?.split_once(" in process "));
    let lost: Vec<_> = said.lines().filter_map(|line| line.strip_prefix("lost ")).collect();
    let told: Vec<_> = errors.lines().filter(|line| line.contains(" is lost")).collect();
    let (at, process) = poisoned.with_context(|| format!("nothing was poisoned: {both}"))?;
    let start = format!("spm: process {process}: page 0x");
    let is_right = if what == "resident" {
        output.status.success() && said.contains("done") && lost == [at] && told.is_empty()
    } else if what == "held" {
        // Whose page it was `spm` says, and the signal.
        output.status.success()
            && said.contains("done")
            && lost.len() == 1
            && told.len() == 1
            && told[0].starts_with(&format!("spm: process {process}: page {} is lost", lost[0]))
    } else {
        output.status.code() == Some(128 + libc::SIGBUS)
            && lost.is_empty()
            && told.len() == 1
            && told[0].starts_with(&start)
            && told[0].contains("node 1")
    };
    facts.note(
        is_right && said.contains("beside is whole"),
        format!("failed memory, {what}: {}, {both}", output.status),
    );
    Ok(())
}
