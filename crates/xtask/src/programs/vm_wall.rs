//! In a guest of `cargo xtask vm`: what `spm wall` keeps, row by row; the table is docs/walls.md's.
//!
//! Each row starts [`vm_wall_probe`](super::vm_wall_probe) behind a wall and holds what the kernel did against what the row
//! says. Nodes 2 and 3 are spm by configuration. Called by `cargo xtask vm-test` on the topology numa4; with --version-1 on
//! Linux 6.1, the last of Debian's with cpusets of cgroup version 1.
#![allow(unsafe_code, reason = "a descriptor that is lent")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Pid;
use spmem_core::grant::{Rights, Terms};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::registry::Registry;
use spmem_core::units::{Bytes, DomainId, NodeId};
use spmem_node::door::Door;
use spmem_node::roll::Roll;
use spmem_sys::fd::Fd;
use spmem_sys::mapping::{Mapping, populate_write};
use spmem_sys::uffd::Uffd;
use spmem_sys::{PAGE, mempolicy};

use super::vm_facts::Facts;
use super::vm_wall_probe::DOOR_BYTE;
use super::vm_wall_rights::{check_bare_names, check_join, check_keeper, check_rights, mount_version_1};

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
    /// The rows of the hard wall only.
    #[arg(long)]
    quick: bool,
    /// The doors only.
    #[arg(long)]
    doors: bool,
    /// Only who may do what, and what becomes of a keeper.
    #[arg(long)]
    rights: bool,
    /// The table with cpusets of cgroup version 1, mounted for that.
    #[arg(long)]
    version_1: bool,
}

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

/// Runs it.
///
/// # Errors
/// A row is not as it says.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let scene = Scene::new(&options.spm)?;
    let mut facts = Facts::default();
    if options.doors {
        check_doors(&mut facts, &scene)?;
        return facts.end();
    }
    if options.rights {
        check_rights(&mut facts, &scene)?;
        check_join(&mut facts, &scene)?;
        check_keeper(&mut facts, &scene)?;
        check_nothing_is_left(&mut facts);
        return facts.end();
    }
    if options.version_1 {
        check_bare_names(&mut facts, &scene)?;
        mount_version_1(&mut facts, &scene)?;
    }
    let guards = [("hard", 0), ("easy", 1)];
    for (guard, column) in guards.into_iter().take(if options.quick { 1 } else { 2 }) {
        // 6.1 has no weights.
        let rows = ROWS.into_iter().filter(|(words, ..)| !options.version_1 || !words.contains("weighted"));
        for (words, hard, easy) in rows {
            let mut words: Vec<&str> = words.split(' ').collect();
            let tail = words.iter().position(|word| *word == "touch" && words[0] == "numactl");
            let before: Vec<&str> = tail.map(|at| words.drain(..at).collect()).unwrap_or_default();
            let wall = [&["--guard", guard, "--"][..], &before].concat();
            scene.check(&mut facts, guard, &wall, &words, [hard, easy][column])?;
        }
        check_files(&mut facts, &scene, guard)?;
    }
    if options.version_1 {
        check_pressure(&mut facts, &scene)?;
        check_audit(&mut facts, &scene)?;
    }
    if options.quick || options.version_1 {
        check_nothing_is_left(&mut facts);
        return facts.end();
    }
    check_pressure(&mut facts, &scene)?;
    check_escapes(&mut facts, &scene)?;
    check_rights(&mut facts, &scene)?;
    check_join(&mut facts, &scene)?;
    check_keeper(&mut facts, &scene)?;
    check_run(&mut facts, &scene)?;
    check_audit(&mut facts, &scene)?;
    check_doors(&mut facts, &scene)?;
    check_nothing_is_left(&mut facts);
    facts.end()
}

/// What the rows share.
pub(super) struct Scene {
    pub(super) spm: PathBuf,
    own: PathBuf,
    pub(super) config: PathBuf,
}

impl Scene {
    fn new(spm: &Path) -> anyhow::Result<Self> {
        // The tests' own memory is not to go first, nor stand in the way.
        fs::write("/proc/self/oom_score_adj", "-1000").context("cannot keep from being ended")?;
        let config = std::env::temp_dir().join("wall.toml");
        fs::write(&config, TYPES)?;
        Ok(Self { spm: spm.to_owned(), own: std::env::current_exe()?, config })
    }

    /// `spm wall OPTIONS... [PROGRAM...] probe WORDS...`
    pub(super) fn wall(&self, wall: &[&str], words: &[&str]) -> Command {
        let mut command = Command::new(&self.spm);
        command.args(["wall", "--config"]).arg(&self.config).args(wall).args(self.probe(words));
        command
    }

    fn probe(&self, words: &[&str]) -> Vec<String> {
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

fn far_file(is_filled: bool) -> anyhow::Result<(File, Mapping)> {
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
    for (guard, words, is) in [
        ("hard", ["policy", "interleave", "0-3"], On("0-1")),
        ("hard", ["policy", "bind", "2"], Error("EINVAL")),
        ("easy", ["policy", "bind", "2"], On("2")),
    ] {
        let mut command = Command::new(&scene.spm);
        command.args(["run", "--config"]).arg(&scene.config).args(["--guard", guard, "--"]);
        let output = command.args(scene.probe(&words)).output()?;
        note(facts, &format!("spm run --guard {guard}: {}", words.join(" ")), &output, is);
    }
    // The list of nodes is away when the kernel is called.
    let mut command = Command::new(&scene.spm);
    command.args(["run", "--sysram", "5M", "--config"]).arg(&scene.config).args(["--guard", "easy", "--"]);
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

/// By grant, a range and a single page of node 2 come through a hard wall, and stay there while they are used.
fn check_doors(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    fs::write("/proc/sys/kernel/numa_balancing", "1").context("no NUMA balancing")?;
    let node = NodeId::new(2)?;
    let mut registry = Registry::new();
    let spec = |node_type| NodeSpec {
        node_type,
        class: Class::Slower,
        services: Services::empty(),
        guard: Guard::Hard,
        owner: "test".into(),
    };
    registry.register(NodeId::ZERO, spec(NodeType::Sysram))?;
    let owner = registry.register(node, spec(NodeType::Spm))?.owner;
    let len = 16 * PAGE;
    let quota = Bytes((len + PAGE) as u64);
    let grant =
        registry.grant(&[&owner], Terms::new(Rights::ALLOC | Rights::MAP_READ | Rights::MAP_WRITE, quota))?;
    let roll = Roll::new()?;
    let mut door = Door { registry: &mut registry, domain: DomainId::ROOT, grant: &grant, node, roll: &roll };

    let (file, _charge) = door.file(len)?;
    // SAFETY: the descriptor is open as long as `file` is.
    let file_fd = unsafe { BorrowedFd::borrow_raw(file.fd().raw()) }.try_clone_to_owned()?;
    let mut ranges = scene.wall(&["--"], &["file", "used"]);
    let ranges = ranges.stdin(Stdio::from(file_fd)).stdout(Stdio::piped()).spawn()?;
    // What only has the name of a door's file, filled by who has no grant for it.
    let (named, _memory) = far_file(true)?;
    let mut liar = scene.wall(&["--"], &["file", "used"]);
    let mut liar = liar.stdin(Stdio::from(named)).stdout(Stdio::piped()).spawn()?;

    let mut single = scene.wall(&["--"], &["door"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut said = BufReader::new(single.stdout.take().context("no pipe")?);
    let mut line = String::new();
    said.read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["door", fd, address] = words[..] else { anyhow::bail!("the probe said {line}") };
    let pid = Pid::from_raw(single.id().cast_signed()).context("no process")?;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let faults = rustix::process::pidfd_getfd(&pidfd, fd.parse()?, rustix::process::PidfdGetfdFlags::empty())?;
    let faults = Uffd::from_fd(Fd::from_raw(faults.into_raw_fd()));
    let _charge = door.page(&faults, single.id(), address.parse()?, &[DOOR_BYTE; PAGE])?;
    let refused = door.page(&faults, single.id(), address.parse::<usize>()? + PAGE, &[DOOR_BYTE; PAGE]);
    facts.note(refused.is_err(), format!("doors: past the quota: {:?}", refused.err()));
    let by = serde_json::json!({ "kind": "door", "process": std::process::id(), "grant": grant.id().to_string() });
    audit_doors(facts, scene, &by, [("file", ranges.id(), 16), ("page", single.id(), 1)], liar.id());
    liar.kill()?;
    liar.wait()?;
    single.stdin.take().context("no pipe")?.write_all(b"go\n")?;
    let mut nodes = String::new();
    said.read_line(&mut nodes)?;
    facts.equal("doors: a page placed by UFFDIO_COPY, used for 10 s", nodes.trim(), "nodes 2");
    single.wait()?;
    let output = ranges.wait_with_output()?;
    note(facts, "doors: a sealed file, used for 10 s", &output, On("2"));
    Ok(())
}

/// What came through doors is there by a grant; what has only the name of a door's file is not.
fn audit_doors(
    facts: &mut Facts,
    scene: &Scene,
    by: &serde_json::Value,
    through: [(&str, u32, u64); 2],
    liar: u32,
) {
    // A file is mapped soon.
    let audit = |pid: u32, pages: u64| {
        let mut command = Command::new(&scene.spm);
        command.args(["audit", &pid.to_string(), "--json", "--config"]).arg(&scene.config);
        let mut seen = (None, serde_json::Value::Null);
        within_seconds(|| {
            seen = command.output().map_or_else(
                |_| (None, serde_json::Value::Null),
                |output| (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default()),
            );
            seen.1[0]["pages"] == pages
        });
        seen
    };
    for (what, pid, pages) in through {
        let seen = audit(pid, pages);
        let is_so = seen.0 == Some(0) && seen.1[0]["by"] == *by && seen.1[0]["pages"] == pages;
        facts.note(is_so && seen.1[1].is_null(), format!("doors: audit of the {what}: {seen:?}"));
    }
    let seen = audit(liar, 16);
    let is_found = seen.0 == Some(1) && seen.1[0]["is_clean"] == false;
    facts.note(is_found, format!("doors: audit of a file that is only called so: {seen:?}"));
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
