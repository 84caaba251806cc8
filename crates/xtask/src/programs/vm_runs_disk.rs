//! In a guest of `cargo xtask vm`: cold pages of `spm run`'s programs in a file on a disk that is slow, and on one that fails.
//!
//! As [`vm_runs`](super::vm_runs), with the same probe. The disk is Linux's null_blk with memory behind it, which answers as late
//! as it is told, and not at all where it is told to be bad (Documentation/block/null_blk.rst).

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use spmem_sys::PAGE;

use super::vm_facts::Facts;

/// How late the disk answers.
const DELAY: Duration = Duration::from_millis(1);
/// Its size: the kernel keeps a list of at most 512 bad ranges, each of 256 KiB (block/badblocks.c).
const SIZE_MIB: u64 = 96;
/// Where it is mounted: the file system that some topologies bring is elsewhere.
const FOLDER: &str = "/run/slow";
const CONFIGURED: &str = "/sys/kernel/config/nullb/nullb0";
const DEVICE: &str = "/dev/nullb0";

/// The disk, as long as it is mounted.
struct Disk;

impl Disk {
    fn new() -> anyhow::Result<Self> {
        run("modprobe", &["null_blk", "nr_devices=0"])?;
        if !Path::new("/sys/kernel/config/nullb").exists() {
            run("mount", &["-t", "configfs", "config", "/sys/kernel/config"])?;
        }
        fs::create_dir(CONFIGURED).context("null_blk makes no device")?;
        let (delay, size) = (DELAY.as_nanos().to_string(), SIZE_MIB.to_string());
        // Size in MiB; queue mode 2 and interrupt mode 2: requests end by a timer.
        for (name, value) in [
            ("size", size.as_str()),
            ("blocksize", "4096"),
            ("memory_backed", "1"),
            ("queue_mode", "2"),
            ("irqmode", "2"),
            ("completion_nsec", &delay),
            ("power", "1"),
        ] {
            fs::write(Path::new(CONFIGURED).join(name), value).with_context(|| format!("null_blk: {name}"))?;
        }
        run("mkfs.ext4", &["-q", "-b", "4096", DEVICE])?;
        fs::create_dir_all(FOLDER)?;
        run("mount", &["-t", "ext4", DEVICE, FOLDER])?;
        Ok(Self)
    }

    /// How long a page takes.
    fn measure(&self) -> anyhow::Result<Duration> {
        let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(DEVICE)?;
        let mut buffer = vec![0; 2 * PAGE];
        let start = buffer.as_ptr().align_offset(PAGE);
        let since = Instant::now();
        file.read_exact_at(&mut buffer[start..start + PAGE], 0)?;
        Ok(since.elapsed())
    }

    /// From now on all of it is bad.
    fn fail(&self) -> anyhow::Result<()> {
        let last_sector = (SIZE_MIB << 20) / 512 - 1;
        fs::write(Path::new(CONFIGURED).join("badblocks"), format!("+0-{last_sector}"))
            .context("null_blk: badblocks")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A file system whose disk fails may refuse; the guest ends soon.
        let _ = run("umount", &["-l", FOLDER]);
        let _ = fs::remove_dir(CONFIGURED);
    }
}

fn run(program: &str, words: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program).args(words).stdin(Stdio::null()).output().context(program.to_owned())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {} {}", words.join(" "), output.status, said.trim());
    Ok(())
}

/// Runs the rows that are wanted.
///
/// # Errors
/// The disk cannot be made, or a program cannot be started.
pub(super) fn check(facts: &mut Facts, spm: &Path, is_wanted: &dyn Fn(&str) -> bool) -> anyhow::Result<()> {
    let words = ["write", "fork", "threads", "unmap"];
    if !words.iter().any(|words| is_wanted(&format!("slow {words}"))) && !is_wanted("broken") {
        return Ok(());
    }
    let disk = Disk::new()?;
    let took = disk.measure()?;
    facts.note(took >= DELAY, format!("slow disk: a page takes {} us", took.as_micros()));
    for words in words.iter().filter(|words| is_wanted(&format!("slow {words}"))) {
        check_slow(facts, spm, words)?;
    }
    if is_wanted("broken") {
        check_broken(facts, spm, &disk)?;
    }
    Ok(())
}

/// Up to the words of the probe, and where the report will be.
fn command(spm: &Path) -> anyhow::Result<(Command, PathBuf)> {
    let folder = std::env::temp_dir();
    let (file, report) = (folder.join("slow.toml"), folder.join("report.json"));
    let text = format!("[[node]]\nid = 2\nkind = \"file\"\npath = \"{FOLDER}/node\"\ncapacity = \"64M\"\n");
    fs::write(&file, text)?;
    let _ = fs::remove_file(&report);
    let mut command = Command::new(spm);
    command.args(["run", "--sysram", "5M", "--config"]).arg(file).arg("--json").arg(&report).arg("--");
    command.arg(std::env::current_exe()?).args(["program", "vm-runs-probe", "--away", "--mib", "8"]);
    Ok((command, report))
}

/// Every byte is right.
fn check_slow(facts: &mut Facts, spm: &Path, words: &str) -> anyhow::Result<()> {
    let (mut command, report) = command(spm)?;
    let output = command.arg(words).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stdout).trim().replace('\n', "; ");
    let errors = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    let name = format!("slow disk, {words}");
    facts.note(output.status.success() && said.ends_with("done"), format!("{name}: {said} {errors}"));
    let report: Value = serde_json::from_str(&fs::read_to_string(report).unwrap_or_default()).unwrap_or_default();
    let node = &report["nodes"][2];
    let number = |key: &str| node[key].as_u64().unwrap_or_default();
    facts.note(
        number("demoted_pages") >= 128 && number("promoted_pages") > 0 && report["lost_pages"] == 0,
        format!("{name}: the report has {node}, {} pages lost", report["lost_pages"]),
    );
    Ok(())
}

/// Who needs a page that cannot be read is told which one and from which node, and ends; who runs beside goes on.
fn check_broken(facts: &mut Facts, spm: &Path, disk: &Disk) -> anyhow::Result<()> {
    let (mut command, _) = command(spm)?;
    let pipes = command.arg("wait").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn()?;
    let mut said = BufReader::new(child.stdout.take().context("no pipe")?);
    let mut line = String::new();
    said.read_line(&mut line)?;
    let program = line.split_whitespace().last().unwrap_or_default().to_owned();
    facts.note(line.starts_with("placed"), format!("broken disk: {}", line.trim()));
    // Of a run of its own, beside it, whose pages are on node 1.
    let mut beside = Command::new(spm);
    beside.args(["run", "--sysram", "5M", "--"]).arg(std::env::current_exe()?);
    beside.args(["program", "vm-runs-probe", "--away", "--mib", "8", "write"]);
    disk.fail()?;
    child.stdin.take().context("no pipe")?.write_all(b"go\n")?;
    let beside = beside.stdin(Stdio::null()).output()?;
    let status = child.wait()?;
    let mut errors = String::new();
    child.stderr.take().context("no pipe")?.read_to_string(&mut errors)?;
    let start = format!("spm: process {program}: page 0x");
    let told: Vec<_> = errors.lines().filter(|line| line.contains(" is lost")).collect();
    facts.note(
        status.code() == Some(128 + libc::SIGBUS)
            && told.first().is_some_and(|line| line.starts_with(&start) && line.contains("node 2")),
        format!("broken disk: {status}, {}", errors.trim().replace('\n', "; ")),
    );
    let is_whole = beside.status.success() && String::from_utf8_lossy(&beside.stdout).trim().ends_with("done");
    facts.note(is_whole, format!("broken disk: beside it, {}", beside.status));
    Ok(())
}
