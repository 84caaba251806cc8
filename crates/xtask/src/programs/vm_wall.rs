//! In a guest of `cargo xtask vm`: what `spm wall` keeps, row by row; the table is docs/walls.md's.
//!
//! Each row starts [`vm_wall_probe`](super::vm_wall_probe) behind a wall and holds what the kernel did against what the row
//! says. Nodes 2 and 3 are spm by configuration. Called by `cargo xtask vm-test` on the topology numa4; with --version-1 on
//! Linux 6.1, the last of Debian's with cpusets of cgroup version 1.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use spmem_core::nodemask::NodeMask;
use spmem_sys::mapping::{Mapping, populate_write};
use spmem_sys::{PAGE, mempolicy};

use super::vm_facts::Facts;
use super::vm_wall_doors::{check_doors, check_full_node};
use super::vm_wall_rights::{
    check_bare_names, check_delegated, check_join, check_keeper, check_own_cpuset, check_rights, mount_version_1,
};

/// A user without rights.
pub(super) const NOBODY: u32 = 1000;
/// Where cpusets of cgroup version 1 are mounted for a part of the rows.
pub(super) const CPUSETS_1: &str = "/run/cpusets";
const TYPES: &str = "[type]\nnode2 = \"spm\"\nnode3 = \"spm\"\n";

/// What to hold against.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// Where `spm` is.
    #[arg(long)]
    spm: PathBuf,
    /// Only these parts.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// The table with cpusets of cgroup version 1, mounted for that.
    #[arg(long)]
    version_1: bool,
}

type Check = fn(&mut Facts, &Scene) -> anyhow::Result<()>;

/// The parts, and with which versions of cgroups they are tried; `few` is within `table`. `doors` audits the probe, all of whose pages count: it
/// comes before programs with policies of their own have brought pages of the probe's file to nodes that are walled off.
const PARTS: [(&str, bool, bool, Check); 13] = [
    ("doors", true, false, check_doors),
    ("table", true, true, check_table),
    ("few", false, false, check_few),
    ("pressure", true, true, check_pressure),
    ("escapes", true, false, check_escapes),
    ("rights", true, false, check_rights),
    ("delegated", false, false, check_delegated),
    ("join", true, false, check_join),
    ("keeper", true, false, check_keeper),
    ("own", false, true, check_own_cpuset),
    ("run", true, true, check_run),
    ("audit", true, true, check_audit),
    ("full", true, false, check_full_node),
];

/// What a row says: exactly these nodes, some of these, or an error.
#[derive(Clone, Copy, Debug)]
pub(super) enum Is {
    On(&'static str),
    Within(&'static str),
    Error(&'static str),
}
use Is::{Error, On, Within};

/// The words of the probe, behind a hard wall, behind an easy guard. `numactl` before them stands for itself.
const ROWS: [(&str, Is, Is); 33] = [
    ("touch", Within("0-1"), Within("0-1")),
    ("policy bind 2", Error("EINVAL"), On("2")),
    ("policy bind 0,2", On("0"), Within("0,2")),
    ("policy bind=static 2", Error("EINVAL"), On("2")),
    ("policy bind=relative 2", On("0"), On("0")),
    ("policy preferred 2", Error("EINVAL"), Error("EINVAL")),
    ("policy preferred-many 2", Error("EINVAL"), Error("EINVAL")),
    ("policy preferred-many 0-3", Within("0-1"), Within("0-1")),
    ("policy interleave 2-3", Error("EINVAL"), Error("EINVAL")),
    ("policy interleave 0-3", On("0-1"), On("0-1")),
    ("policy interleave=static 0-3", On("0-1"), On("0-1")),
    ("policy interleave=relative 0-3", On("0-1"), On("0-1")),
    ("policy weighted-interleave 0-3", On("0-1"), On("0-1")),
    ("policy local none", Within("0-1"), Within("0-1")),
    ("mbind bind 2", Error("EINVAL"), On("2")),
    ("mbind bind 1-2", On("1"), Within("1-2")),
    ("mbind preferred 2", Error("EINVAL"), Error("EINVAL")),
    ("mbind preferred-many 1-3", On("1"), On("1")),
    ("mbind interleave 0-3", On("0-1"), On("0-1")),
    ("mbind interleave=static 1-3", On("1"), On("1")),
    ("move-pages 1", Within("0-1"), Within("0-1")),
    ("move-pages 2", Error("EACCES"), Error("EACCES")),
    ("migrate-pages 0-1 1", On("1"), On("1")),
    ("migrate-pages 0-1 2", Error("EINVAL"), Error("EINVAL")),
    ("migrate-pages 0-1 1-3", On("1"), On("1")),
    ("fork", Within("0-1"), Within("0-1")),
    ("threads interleave 0-3", On("0-1"), On("0-1")),
    ("threads bind 2", Error("EINVAL"), Within("0-2")),
    ("numactl --interleave=all touch", On("0-1"), On("0-1")),
    ("numactl --membind=2 touch", Error(""), On("2")),
    ("numactl --membind=1 touch", On("1"), On("1")),
    ("numactl --preferred-many=all touch", Within("0-1"), Within("0-1")),
    ("numactl --preferred=2 touch", Error(""), Error("")),
];

/// Of these the most telling.
const FEW: [&str; 9] = [
    "touch",
    "policy bind 2",
    "policy preferred-many 0-3",
    "policy interleave 0-3",
    "mbind bind 1-2",
    "move-pages 2",
    "migrate-pages 0-1 1-3",
    "threads bind 2",
    "numactl --interleave=all touch",
];

/// Runs it.
///
/// # Errors
/// A row is not as it says.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let is_known = |name: &String| PARTS.iter().any(|(part, ..)| part == name);
    ensure!(options.only.iter().all(is_known), "the parts are {}", PARTS.map(|(part, ..)| part).join(", "));
    let scene = Scene::new(&options.spm, if options.version_1 { Cgroups::One } else { Cgroups::Two })?;
    let mut facts = Facts::default();
    if options.version_1 {
        check_bare_names(&mut facts, &scene)?;
        mount_version_1(&mut facts, &scene)?;
    }
    for (name, is_of_two, is_of_one, check) in PARTS {
        let is_wanted = if options.version_1 { is_of_one } else { is_of_two };
        if options.only.iter().any(|only| only == name) || options.only.is_empty() && is_wanted {
            check(&mut facts, &scene)?;
        }
    }
    check_nothing_is_left(&mut facts);
    facts.end()
}

fn check_table(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    for guard in ["hard", "easy"] {
        // 6.1, which has cpusets of version 1, has no weights.
        let is_there = |words: &str| scene.cgroups == Cgroups::Two || !words.contains("weighted");
        check_rows(facts, scene, guard, is_there)?;
        check_files(facts, scene, guard)?;
    }
    Ok(())
}

fn check_few(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    for guard in ["hard", "easy"] {
        check_rows(facts, scene, guard, |words| FEW.contains(&words))?;
    }
    check_files(facts, scene, "hard")
}

fn check_rows(
    facts: &mut Facts,
    scene: &Scene,
    guard: &str,
    is_wanted: impl Fn(&str) -> bool,
) -> anyhow::Result<()> {
    for (words, hard, easy) in ROWS.into_iter().filter(|(words, ..)| is_wanted(words)) {
        let mut words: Vec<&str> = words.split(' ').collect();
        let tail = words.iter().position(|word| *word == "touch" && words[0] == "numactl");
        let before: Vec<&str> = tail.map(|at| words.drain(..at).collect()).unwrap_or_default();
        let wall = [&["--guard", guard, "--"][..], &before].concat();
        scene.check(facts, guard, &wall, &words, if guard == "hard" { hard } else { easy })?;
    }
    Ok(())
}

/// What the rows share.
pub(super) struct Scene {
    pub(super) spm: PathBuf,
    own: PathBuf,
    pub(super) config: PathBuf,
    cgroups: Cgroups,
}

/// Which version has the cpusets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cgroups {
    /// On 6.1, which lacks what `spm run` takes: that runs a program as it is, with --best-effort, behind its wall.
    One,
    Two,
}

impl Scene {
    fn new(spm: &Path, cgroups: Cgroups) -> anyhow::Result<Self> {
        // The tests' own memory is not to go first, nor stand in the way.
        fs::write("/proc/self/oom_score_adj", "-1000").context("cannot keep from being ended")?;
        let config = std::env::temp_dir().join("wall.toml");
        fs::write(&config, TYPES)?;
        Ok(Self { spm: spm.to_owned(), own: std::env::current_exe()?, config, cgroups })
    }

    /// `spm wall OPTIONS... [PROGRAM...] probe WORDS...`
    pub(super) fn wall(&self, wall: &[&str], words: &[&str]) -> Command {
        let mut command = Command::new(&self.spm);
        command.args(["wall", "--config"]).arg(&self.config).args(wall).args(self.probe(words));
        command
    }

    pub(super) fn probe(&self, words: &[&str]) -> Vec<String> {
        let own = self.own.display().to_string();
        let words = words.iter().map(|word| (*word).to_owned());
        [own, "program".to_owned(), "vm-wall-probe".to_owned()].into_iter().chain(words).collect()
    }

    pub(super) fn check(
        &self,
        facts: &mut Facts,
        name: &str,
        wall: &[&str],
        words: &[&str],
        is: Is,
    ) -> anyhow::Result<()> {
        let output = self.wall(wall, words).output().context("spm cannot be run")?;
        let what = format!("{name}: {} {}", wall.join(" "), words.join(" "));
        note(facts, &what, &output, is);
        Ok(())
    }
}

pub(super) fn note(facts: &mut Facts, what: &str, output: &Output, is: Is) {
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let nodes = said.strip_prefix("nodes ").and_then(|list| NodeMask::parse(list, NodeMask::EMPTY).ok());
    let list = |text| NodeMask::parse(text, NodeMask::EMPTY).unwrap_or_default();
    let is_right = match is {
        On(wanted) => nodes == Some(list(wanted)),
        Within(wanted) => nodes.is_some_and(|nodes| !nodes.is_empty() && nodes.is_subset(&list(wanted))),
        // Refused by the program itself.
        Error("") => nodes.is_none() && !output.status.success(),
        Error(name) => said == name,
    };
    let remarks = if is_right { String::new() } else { String::from_utf8_lossy(&output.stderr).into_owned() };
    facts.note(is_right, format!("{what}: {said} ({}), expected {is:?} {remarks}", output.status));
}

/// A file that an outsider has filled on node 2 stays there; one that it only bound to node 2 fills up inside the wall.
fn check_files(facts: &mut Facts, scene: &Scene, guard: &str) -> anyhow::Result<()> {
    for (is_filled, hard, easy) in [(true, On("2"), On("2")), (false, Within("0-1"), On("2"))] {
        let (file, _memory) = far_file(is_filled)?;
        let mut command = scene.wall(&["--guard", guard, "--"], &["file"]);
        let output = command.stdin(Stdio::from(file.try_clone()?)).output()?;
        let name = if is_filled { "memfd filled outside" } else { "memfd bound outside, filled inside" };
        note(facts, &format!("{guard}: {name}"), &output, if guard == "hard" { hard } else { easy });
    }
    Ok(())
}

pub(super) fn far_file(is_filled: bool) -> anyhow::Result<(File, Mapping)> {
    let file = File::from(rustix::fs::memfd_create("spmem-door", rustix::fs::MemfdFlags::CLOEXEC)?);
    let len = 16 * PAGE;
    file.set_len(len as u64)?;
    let memory = Mapping::shared(file.as_raw_fd(), len)?;
    mempolicy::bind_range(memory.start(), len, mempolicy::MPOL_BIND, &mempolicy::mask([2]))?;
    if is_filled {
        populate_write(memory.start(), len)?;
    }
    Ok((file, memory))
}

/// Inside the wall memory ends before another node is touched (R16): the kernel ends the program.
fn check_pressure(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    let walls: [&[&str]; 2] = [&["--mems", "1", "--"], &["--guard", "easy", "--mems", "1-3", "--"]];
    for wall in walls {
        let before = [anonymous_kib(2), anonymous_kib(3)];
        let mut child = scene.wall(wall, &["fill", "none", "none", "400"]).stdout(Stdio::null()).spawn()?;
        let (status, most) = watch(&mut child)?;
        let what = format!("pressure: {}", wall.join(" "));
        facts.equal(&format!("{what}: it is ended by a signal"), status, Some(libc::SIGKILL));
        let grown: Vec<u64> = most.iter().zip(before).map(|(most, before)| most.saturating_sub(before)).collect();
        // What spm itself had is moved into the cpuset when it joins, and gone when it becomes the command.
        let own = if wall.contains(&"easy") { 64 } else { 0 };
        facts.note(grown.iter().all(|kib| *kib <= own), format!("{what}: KiB more on nodes 2 and 3: {grown:?}"));
    }
    // What the easy guard is not: a policy that falls back does so to wherever the cpuset allows.
    let wall = ["--guard", "easy", "--mems", "1-3", "--"];
    scene.check(facts, "pressure, known hole", &wall, &["fill", "preferred", "1", "290"], On("1,3"))
}

/// The signal that ended it, and the most that nodes 2 and 3 had meanwhile.
fn watch(child: &mut Child) -> anyhow::Result<(Option<i32>, [u64; 2])> {
    let mut most = [0, 0];
    loop {
        for (most, node) in most.iter_mut().zip([2, 3]) {
            *most = anonymous_kib(node).max(*most);
        }
        if let Some(status) = child.try_wait()? {
            return Ok((status.signal(), most));
        }
        sleep(Duration::from_millis(50));
    }
}

fn anonymous_kib(node: u32) -> u64 {
    let text = fs::read_to_string(format!("/sys/devices/system/node/node{node}/meminfo")).unwrap_or_default();
    let words = |line: &str| line.split_once("AnonPages:")?.1.split_whitespace().next()?.parse().ok();
    text.lines().find_map(words).unwrap_or(0)
}

/// Root inside a wall can take it down, and nobody else.
fn check_escapes(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    let user = NOBODY.to_string();
    for what in ["mems", "leave"] {
        let words = ["--user", &user, "escape", what];
        scene.check(facts, "a user", &["--"], &words, Error("EACCES"))?;
        scene.check(facts, "root", &["--"], &["escape", what], On("2"))?;
    }
    Ok(())
}

/// The same flags on `spm run`.
fn check_run(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    let run = |more: &[&str]| {
        let mut command = Command::new(&scene.spm);
        command.args(["run", "--config"]).arg(&scene.config).args(more);
        command
    };
    let more: &[&str] = if scene.cgroups == Cgroups::Two { &[] } else { &["--best-effort"] };
    for (guard, words, is) in [
        ("hard", ["policy", "interleave", "0-3"], On("0-1")),
        ("hard", ["policy", "bind", "2"], Error("EINVAL")),
        ("easy", ["policy", "bind", "2"], On("2")),
    ] {
        let output = run(more).args(["--guard", guard, "--"]).args(scene.probe(&words)).output()?;
        note(facts, &format!("spm run --guard {guard}: {}", words.join(" ")), &output, is);
    }
    if scene.cgroups == Cgroups::One {
        let output = run(&["--guard", "hard", "--"]).args(scene.probe(&["touch"])).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let is_refused = output.status.code() == Some(125) && said.contains("use a kernel >= 6.8");
        facts.note(is_refused, format!("spm run without --best-effort: {}", said.trim()));
        return Ok(());
    }
    // The list of nodes is away when the kernel is called.
    let mut command = run(&["--sysram", "5M", "--guard", "easy", "--"]);
    let output = command.args(scene.probe(&["cold-policy", "interleave", "0-3"])).output()?;
    note(facts, "spm run --guard easy: cold-policy interleave 0-3", &output, On("0-1"));
    Ok(())
}

/// Who has pages on nodes 2 and 3: one bound behind an easy guard, then one that is behind no wall as well.
fn check_audit(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    let audit = || -> anyhow::Result<(Option<i32>, serde_json::Value)> {
        let output =
            Command::new(&scene.spm).args(["audit", "--all", "--json", "--config"]).arg(&scene.config).output()?;
        Ok((output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default()))
    };
    // What the kernel had given to this process before it was said what the nodes are for counts as well.
    let (_, before) = audit()?;
    let known = before.as_array().map_or(0, Vec::len);
    let words = ["--stay", "60000", "policy", "bind", "2"];
    let mut walled = Staying::start(scene.wall(&["--guard", "easy", "--"], &words))?;
    let (_, clean) = audit()?;
    let of = |all: &serde_json::Value, pid: u32| {
        all.as_array()
            .into_iter()
            .flatten()
            .find(|one| one["pid"] == pid && one["by"]["kind"] == "bind")
            .cloned()
            .unwrap_or_default()
    };
    let line = of(&clean, walled.0.id());
    facts.note(
        line["is_clean"] == true && line["wall"] == "easy" && line["node"] == 2,
        format!("audit: easy: {line}"),
    );
    let mut bare = Command::new(&scene.own);
    bare.args(&scene.probe(&words)[1..]);
    let mut bare = Staying::start(bare)?;
    let (status, found) = audit()?;
    let line = of(&found, bare.0.id());
    facts.equal("audit: status with one astray", status, Some(1));
    facts.note(line["is_clean"] == false && line["wall"].is_null(), format!("audit: without a wall: {line}"));
    let pid = walled.0.id().to_string();
    let status =
        Command::new(&scene.spm).args(["audit", &pid, "--config"]).arg(&scene.config).output()?.status.code();
    facts.note(
        status.is_some_and(|status| status < 2),
        format!("audit: one process: status {status:?}, {known} before"),
    );
    let status = Command::new(&scene.spm).args(["audit", "4194304"]).output()?.status.code();
    facts.equal("audit: a process that is not there", status, Some(2));
    walled.end()?;
    bare.end()
}

/// A probe that has said where its pages are, and stays.
struct Staying(Child);

impl Staying {
    fn start(mut command: Command) -> anyhow::Result<Self> {
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut said = [0; 1];
        child.stdout.as_mut().context("no pipe")?.read_exact(&mut said).context("it said nothing")?;
        Ok(Self(child))
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.0.kill()?;
        ensure!(self.0.wait()?.signal() == Some(libc::SIGKILL), "it ended otherwise");
        Ok(())
    }
}

fn check_nothing_is_left(facts: &mut Facts) {
    let left = || -> Vec<String> {
        let folders = ["/sys/fs/cgroup", CPUSETS_1].map(|top| fs::read_dir(top).into_iter().flatten().flatten());
        let entries = folders.into_iter().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with("spm-"))
            .collect()
    };
    within_seconds(|| left().is_empty());
    facts.equal("cgroups that are left behind", left(), Vec::new());
}

pub(super) fn within_seconds(mut is_so: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        if is_so() {
            return true;
        }
        sleep(Duration::from_millis(50));
    }
    false
}
