//! In a guest of `cargo xtask vm`: cold pages of `spm run`'s programs on a dax device.
//!
//! As [`vm_runs`](super::vm_runs), with the same probe, on the first device in devdax mode: alone and too small, forked, several processes
//! at a time, `spm` killed, the device used by somebody else, failed, and taken away under a run. Called by `cargo xtask vm-test` on [the topologies
//! hmem and gib](crate::vm), in units of 2 MiB and of 1 GiB: QEMU answers each access to a CXL window by a function of its own, so there it would take minutes.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};

use anyhow::{Context, ensure};
use rustix::fs::{FileType, Mode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use spmem_node::dax;
use spmem_node::machine::{Dax, DaxMode, Machine, Overrides};
use spmem_sys::fd::Fd;
use spmem_sys::region::Access;

use super::vm_facts::Facts;

/// Words of the probe, in 5 MiB of RAM, with so much of the device.
const ROWS: [(&str, &str); 6] = [
    ("fork --mib 8", "64M"),
    ("write --mib 8", "64M"),
    ("threads --mib 8", "64M"),
    ("unmap --mib 8", "64M"),
    ("write --mib 16", "4M"),
    ("fork --mib 16", "4M"),
];
/// The most that they may have in RAM.
const BUDGET: &str = "5M";

type Check = fn(&mut Facts, &Bed<'_>) -> anyhow::Result<()>;

/// The device, if the guest has one.
pub(super) fn find_device() -> Option<Dax> {
    let machine = Machine::read(Path::new("/"), &Overrides::new());
    machine.dax.into_iter().find(|dax| dax.mode == DaxMode::Devdax)
}

struct Bed<'a> {
    spm: &'a Path,
    device: Dax,
    path: String,
    report: PathBuf,
}

/// Runs the rows that are wanted.
///
/// # Errors
/// A row is not as it says.
pub(super) fn run(spm: &Path, device: Dax, is_wanted: &dyn Fn(&str) -> bool) -> anyhow::Result<()> {
    let path = format!("/dev/{}", device.name);
    let bed = Bed { spm, device, path, report: std::env::temp_dir().join("report.json") };
    let mut facts = Facts::default();
    for (words, capacity) in ROWS {
        if is_wanted(&format!("{words} {capacity}")) {
            check(&mut facts, &bed, words, capacity)?;
        }
    }
    let others: [(&str, Check); 5] = [
        ("several", check_several),
        ("killed", check_killed),
        ("mapped", check_mapped),
        ("failed", check_failed),
        // The device is gone afterwards.
        ("gone", check_gone),
    ];
    for (name, check) in others {
        if is_wanted(name) {
            check(&mut facts, &bed)?;
        }
    }
    facts.end()
}

impl Bed<'_> {
    /// `spm run` with so much of the device, up to the command.
    fn spm_run(&self, capacity: &str) -> anyhow::Result<Command> {
        let config = std::env::temp_dir().join(format!("{capacity}.toml"));
        let text = format!(
            "[[node]]\nid = 9\nkind = \"dax\"\npath = \"{}\"\noverwrite = true\ncapacity = \"{capacity}\"\n",
            self.path
        );
        fs::write(&config, text)?;
        let _ = fs::remove_file(&self.report);
        let mut command = Command::new(self.spm);
        command.args(["run", "--sysram", BUDGET, "--config"]).arg(config).arg("--json").arg(&self.report);
        command.arg("--").stdin(Stdio::null());
        Ok(command)
    }

    fn probe(&self, words: &str, capacity: &str) -> anyhow::Result<Command> {
        let mut command = self.spm_run(capacity)?;
        command.arg(std::env::current_exe()?).args(["program", "vm-runs-probe", "--away"]).args(words.split(' '));
        Ok(command)
    }

    /// What the last report says of the device.
    fn told(&self) -> Value {
        let text = fs::read_to_string(&self.report).unwrap_or_default();
        let report: Value = serde_json::from_str(&text).unwrap_or_default();
        let mut node = report["nodes"][2].clone();
        node["lost_pages"] = report["lost_pages"].clone();
        node["elsewhere"] = Value::from(
            report["demoted_pages"].as_u64().unwrap_or_default()
                - node["demoted_pages"].as_u64().unwrap_or_default(),
        );
        node
    }
}

fn said(output: &Output) -> String {
    let both =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).trim().replace('\n', "; "));
    both.join(" ")
}

fn check(facts: &mut Facts, bed: &Bed<'_>, words: &str, capacity: &str) -> anyhow::Result<()> {
    let output = bed.probe(words, capacity)?.output()?;
    let name = format!("{words}, {capacity} of the device");
    let is_done = output.status.success() && String::from_utf8_lossy(&output.stdout).trim().ends_with("done");
    facts.note(is_done, format!("{name}: {}", said(&output)));
    let node = bed.told();
    let number = |key: &str| node[key].as_u64().unwrap_or_default();
    facts.note(
        number("demoted_pages") >= 128
            && number("promoted_pages") > 0
            && node["kind"] == "dax"
            && node["node"] == 9,
        format!("{name}: the report has {node}"),
    );
    facts.note(
        number("used_bytes_peak") <= number("capacity_bytes"),
        format!("{name}: {} of {} bytes", number("used_bytes_peak"), number("capacity_bytes")),
    );
    if capacity == "4M" {
        let elsewhere = number("elsewhere");
        facts.note(elsewhere > 0, format!("{name}: {elsewhere} pages went to node 1 once it was full"));
    }
    Ok(())
}

/// Three programs of one run, at a time, divide the device.
fn check_several(facts: &mut Facts, bed: &Bed<'_>) -> anyhow::Result<()> {
    let own = std::env::current_exe()?;
    let probe = format!("{} program vm-runs-probe --away --mib 6", own.display());
    let script = format!("{probe} fork & a=$!; {probe} write & b=$!; {probe} unmap && wait $a && wait $b");
    let output = bed.spm_run("64M")?.args(["/bin/sh", "-c", &script]).output()?;
    let done = String::from_utf8_lossy(&output.stdout).matches("done").count();
    facts.note(output.status.success() && done == 3, format!("several: {}", said(&output)));
    let node = bed.told();
    facts.note(node["demoted_pages"].as_u64() >= Some(3 * 128), format!("several: the report has {node}"));
    Ok(())
}

/// A program that waits, its pages away.
struct Waiting {
    spm: Child,
    told: ChildStdin,
    said: BufReader<ChildStdout>,
    program: String,
}

impl Waiting {
    fn start(bed: &Bed<'_>) -> anyhow::Result<Self> {
        let mut command = bed.probe("wait --mib 8", "64M")?;
        let mut spm = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let told = spm.stdin.take().context("no pipe")?;
        let mut said = BufReader::new(spm.stdout.take().context("no pipe")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        ensure!(line.starts_with("placed"), "the program says {line:?}");
        let program = line.split_whitespace().last().unwrap_or_default().to_owned();
        Ok(Self { spm, told, said, program })
    }

    /// Tells the program to go on; what it says last.
    fn go_on(&mut self) -> anyhow::Result<String> {
        self.told.write_all(b"go\n")?;
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }
}

fn refusal(bed: &Bed<'_>) -> anyhow::Result<(Option<i32>, String)> {
    let output = bed.spm_run("64M")?.arg("/bin/true").output()?;
    Ok((output.status.code(), said(&output)))
}

/// The device by another name.
fn another_file(bed: &Bed<'_>) -> anyhow::Result<String> {
    let path = "/dev/another";
    let device = fs::metadata(&bed.path)?.rdev();
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::CharacterDevice, Mode::RWXU, device)?;
    Ok(path.to_owned())
}

/// While one run uses it no other does, by whichever file. `spm` is killed: the program goes on, and the device is its own until it has ended.
fn check_killed(facts: &mut Facts, bed: &Bed<'_>) -> anyhow::Result<()> {
    let mut waiting = Waiting::start(bed)?;
    let (status, why) = refusal(bed)?;
    facts.note(status == Some(125) && why.contains("another run"), format!("killed: a second run: {why}"));
    let other = Bed { device: bed.device.clone(), path: another_file(bed)?, report: bed.report.clone(), ..*bed };
    let (status, why) = refusal(&other)?;
    facts.note(
        status == Some(125) && why.contains("has it mapped"),
        format!("killed: a second run by another file of the device: {why}"),
    );
    kill_process(Pid::from_raw(waiting.spm.id().cast_signed()).context("no process")?, Signal::KILL)?;
    waiting.spm.wait()?;
    let (status, why) = refusal(bed)?;
    facts.note(status == Some(125) && why.contains("another run"), format!("killed: a run after it: {why}"));
    let (status, why) = refusal(&other)?;
    facts.note(status == Some(125) && why.contains("has it mapped"), format!("killed: by another file: {why}"));
    facts.equal("killed: the program goes on", waiting.go_on()?.as_str(), "done");
    // It may be a moment before it has ended.
    for _ in 0..1000 {
        if !Path::new("/proc").join(&waiting.program).exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    // One at once after the other, behind a wall, whose keeper is there a moment longer.
    for turn in 1..=3 {
        let config = std::env::temp_dir().join("64M.toml");
        let mut command = Command::new(bed.spm);
        command.args(["run", "--guard", "hard", "--config"]).arg(config).args(["--", "/bin/true"]);
        let output = command.output()?;
        let is_run = output.status.success();
        facts.note(is_run, format!("killed: run {turn} after all have ended: {}", said(&output)));
    }
    Ok(())
}

/// Who has the device mapped is named.
fn check_mapped(facts: &mut Facts, bed: &Bed<'_>) -> anyhow::Result<()> {
    let fd = OpenOptions::new().read(true).write(true).open(&bed.path)?;
    let align = bed.device.align_bytes.context("no align")?;
    let told = dax::Device { bytes: bed.device.bytes, align, is_persistent: bed.device.is_persistent };
    let _region = dax::region(Fd::from_raw(fd.into_raw_fd()), &told, align, Access::Read)?;
    let (status, why) = refusal(bed)?;
    let own = format!("process {} has it mapped", std::process::id());
    facts.note(status == Some(125) && why.contains(&own), format!("mapped: {why}"));
    Ok(())
}

/// Memory of the device that the machine reports as failed: who reports it is told by SIGBUS, and nobody else is.
fn check_failed(facts: &mut Facts, bed: &Bed<'_>) -> anyhow::Result<()> {
    let mut command = bed.spm_run("64M")?;
    let output = command.arg(std::env::current_exe()?).args(["program", "vm-poison-probe", "dax"]).output()?;
    let said = said(&output);
    facts.note(
        output.status.success() && said.contains("poisoned") && said.contains("beside is whole"),
        format!("failed: {said}"),
    );
    Ok(())
}

/// The device is taken away: the pages that are there are lost, each told of, and their user gets SIGBUS.
fn check_gone(facts: &mut Facts, bed: &Bed<'_>) -> anyhow::Result<()> {
    let mut waiting = Waiting::start(bed)?;
    fs::write("/sys/bus/dax/drivers/device_dax/unbind", &bed.device.name).context("unbind")?;
    // It may have ended already.
    let last = waiting.go_on().unwrap_or_default();
    let output = waiting.spm.wait_with_output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let start = format!("spm: process {}: page 0x", waiting.program);
    let told: Vec<_> = errors.lines().filter(|line| line.contains(" is lost")).collect();
    let is_told = !told.is_empty() && told.iter().all(|line| line.starts_with(&start) && line.contains("node 9"));
    let ended = output.status.code() == Some(128 + libc::SIGBUS) || output.status.signal() == Some(libc::SIGBUS);
    facts.note(
        is_told && ended && last.is_empty(),
        format!("gone: {:?}, {last:?}, {}", output.status, errors.trim()),
    );
    let (status, why) = refusal(bed)?;
    facts.note(status == Some(125), format!("gone: a run after it: {why}"));
    Ok(())
}
