//! In a guest of `cargo xtask vm`: who may have a wall, what stands in the way, and what becomes of its keeper. Rows of
//! [`vm_wall`](super::vm_wall).
#![allow(unsafe_code, reason = "another cgroup, between fork and exec")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::process::Pid;

use super::vm_facts::Facts;
use super::vm_wall::Is::{self, Error, On, Within};
use super::vm_wall::{CPUSETS_1, NOBODY, Scene, note, within_seconds};

/// Whether programs of one user may look into each other (kernel.org, LSM, Yama); not there without Yama.
const YAMA: &str = "/proc/sys/kernel/yama/ptrace_scope";

/// Who may not make a cgroup is refused with a remedy; an easy guard takes no cgroup, a delegated cgroup is enough.
pub(super) fn check_rights(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    let output = as_nobody(scene.wall(&["--"], &["touch"])).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    facts.equal("a user: hard: status", output.status.code(), Some(125));
    facts.note(said.contains("Delegate=cpuset"), format!("a user: hard: {}", said.trim()));
    let output = as_nobody(scene.wall(&["--best-effort", "--"], &["policy", "bind", "2"])).output()?;
    note(facts, "a user: --best-effort keeps nobody from naming", &output, On("2"));
    let output = as_nobody(scene.wall(&["--best-effort", "--"], &["touch"])).output()?;
    note(facts, "a user: --best-effort binds who names none", &output, Within("0-1"));
    let output = as_nobody(scene.wall(&["--guard", "easy", "--"], &["policy", "interleave", "0-3"])).output()?;
    note(facts, "a user: easy", &output, On("0-1"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    facts.note(said.contains("spm audit"), format!("a user: easy, without a cgroup: {}", said.trim()));
    let words = ["--hidden", "policy", "interleave", "0-3"];
    let output = as_nobody(scene.wall(&["--guard", "easy", "--"], &words)).output()?;
    note(facts, "a user: easy, a program that may not be looked into", &output, Error("EPERM"));
    check_unseen(facts, scene)?;
    check_demotion(facts, scene)?;
    check_delegated(facts, scene)
}

/// Where the kernel demotes pages by itself, to nodes that the wall keeps out, no wall holds: refused, or said.
fn check_demotion(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    let switch = "/sys/kernel/mm/numa/demotion_enabled";
    fs::write(switch, "1").context("this kernel demotes nothing")?;
    for (guard, more, is) in [
        ("hard", "--mems=0-3", Error("")),
        ("easy", "--mems=0-3", Error("")),
        ("hard", "--best-effort", Within("0-1")),
    ] {
        let output = scene.wall(&["--guard", guard, more, "--"], &["touch"]).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        note(facts, &format!("while the kernel demotes: {guard}: {more}"), &output, is);
        facts.note(
            said.contains("cold pages to node 2,") && said.contains(switch),
            format!("it says so: {}", said.trim()),
        );
    }
    fs::write(switch, "0").context("this kernel demotes nothing")
}

/// A user's wall in a cgroup that was delegated to him.
pub(super) fn check_delegated(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    let folder = delegate()?;
    let mut command = as_nobody(scene.wall(&["--"], &["policy", "interleave", "0-3"]));
    start_in(&mut command, &folder)?;
    let output = command.output()?;
    note(facts, "a user: in a delegated cgroup", &output, On("0-1"));
    let is_empty = within_seconds(|| fs::remove_dir(&folder).is_ok());
    facts.note(is_empty, "a delegated cgroup is given back empty".to_owned());
    Ok(())
}

/// With cgroup version 1 a user needs a cpuset whose folder is his.
pub(super) fn check_own_cpuset(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    let output = as_nobody(scene.wall(&["--"], &["touch"])).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    facts.equal("a user, version 1: without a cpuset: status", output.status.code(), Some(125));
    facts.note(said.contains("in a cpuset of your own"), format!("it says so: {}", said.trim()));
    let top = Path::new(CPUSETS_1);
    let folder = top.join("user");
    fs::create_dir(&folder)?;
    // A hierarchy that was mounted without prefix stays so for as long as the kernel keeps it.
    let files = if top.join("mems").exists() { ["cpus", "mems"] } else { ["cpuset.cpus", "cpuset.mems"] };
    for file in files {
        fs::write(folder.join(file), fs::read_to_string(top.join(file))?)?;
    }
    std::os::unix::fs::chown(&folder, Some(NOBODY), Some(NOBODY))?;
    let rows: [(&[&str], Is); 4] = [
        (&["policy", "interleave", "0-3"], On("0-1")),
        (&["policy", "bind", "2"], Error("EINVAL")),
        (&["fork"], Within("0-1")),
        (&["threads", "interleave", "0-3"], On("0-1")),
    ];
    for (words, is) in rows {
        let mut command = as_nobody(scene.wall(&["--"], words));
        start_in(&mut command, &folder)?;
        note(
            facts,
            &format!("a user, version 1: in a cpuset of his own: {}", words.join(" ")),
            &command.output()?,
            is,
        );
    }
    let mut command = Command::new(&scene.spm);
    command.args(["wall", "--config"]).arg(&scene.config).args(["--", "cat", "/proc/self/cgroup"]);
    let mut command = as_nobody(command);
    start_in(&mut command, &folder)?;
    let said = String::from_utf8_lossy(&command.output()?.stdout).into_owned();
    let is_below = said.lines().any(|line| line.contains(":cpuset:/user/spm-wall-hard-"));
    facts.note(is_below, format!("a user, version 1: the wall is below: {}", said.trim().replace('\n', "; ")));
    let is_empty = within_seconds(|| fs::remove_dir(&folder).is_ok());
    facts.note(is_empty, "a user, version 1: the cpuset is given back empty".to_owned());
    Ok(())
}

/// Who may not look into a user's programs cannot judge what they ask for: refused, or said.
fn check_unseen(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    fs::write(YAMA, "1").context("no Yama in this kernel")?;
    for (more, is) in [("--mems=0-3", Error("")), ("--best-effort", On("0-3"))] {
        let wall = ["--guard=easy", more, "--"];
        let output = as_nobody(scene.wall(&wall, &["policy", "interleave", "0-3"])).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        note(facts, &format!("a user whose programs may not be looked into: easy: {more}"), &output, is);
        facts.note(said.contains("yama.ptrace_scope"), format!("it says so: {}", said.trim()));
    }
    fs::write(YAMA, "0").context("no Yama in this kernel")?;
    Ok(())
}

/// Cpusets of version 1 whose files are called `mems`, not `cpuset.mems`; and what is said to a user there.
pub(super) fn check_bare_names(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    fs::create_dir_all(CPUSETS_1)?;
    rustix::mount::mount("cpuset", CPUSETS_1, "cpuset", rustix::mount::MountFlags::empty(), None)
        .context("no cpusets of cgroup version 1 in this kernel")?;
    facts.note(Path::new(CPUSETS_1).join("mems").exists(), "mount -t cpuset: files have no prefix".to_owned());
    scene.check(facts, "mount -t cpuset", &["--"], &["policy", "interleave", "0-3"], On("0-1"))?;
    let output = as_nobody(scene.wall(&["--"], &["touch"])).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let is_right =
        output.status.code() == Some(125) && said.contains("which root makes") && !said.contains("systemd");
    facts.note(is_right, format!("a user: version 1: {}", said.trim()));
    // As the remedy says.
    let job = Path::new(CPUSETS_1).join("job");
    fs::create_dir(&job)?;
    for name in ["cpus", "mems"] {
        fs::write(job.join(name), fs::read_to_string(Path::new(CPUSETS_1).join(name))?.trim())?;
    }
    for name in ["", "cgroup.procs", "cpus", "mems"] {
        std::os::unix::fs::chown(job.join(name), Some(NOBODY), Some(NOBODY))?;
    }
    let mut command = as_nobody(scene.wall(&["--"], &["policy", "interleave", "0-3"]));
    start_in(&mut command, &job)?;
    note(facts, "a user: version 1, in a cpuset of its own", &command.output()?, On("0-1"));
    // It has a file of the cpuset open.
    drop(command);
    let is_empty = within_seconds(|| fs::remove_dir(&job).is_ok());
    facts.note(is_empty, "version 1: a cpuset of a user's is given back empty".to_owned());
    let is_gone =
        within_seconds(|| rustix::mount::unmount(CPUSETS_1, rustix::mount::UnmountFlags::empty()).is_ok());
    facts.note(is_gone, "mount -t cpuset: nothing is left".to_owned());
    Ok(())
}

/// From here on cpusets are version 1's, and walls have to find them there.
pub(super) fn mount_version_1(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    fs::create_dir_all(CPUSETS_1)?;
    let flags = rustix::mount::MountFlags::empty();
    // What was mounted otherwise goes a moment after its mount.
    let is_mounted =
        within_seconds(|| rustix::mount::mount("cpuset", CPUSETS_1, "cgroup", flags, Some(c"cpuset")).is_ok());
    ensure!(is_mounted, "no cpusets of cgroup version 1 in this kernel");
    let mut command = Command::new(&scene.spm);
    command.args(["wall", "--config"]).arg(&scene.config).args(["--", "cat", "/proc/self/cgroup"]);
    let said = String::from_utf8_lossy(&command.output()?.stdout).into_owned();
    let is_one = said.lines().any(|line| line.contains(":cpuset:/spm-wall-hard-"));
    facts.note(is_one, format!("a wall of version 1: {}", said.trim().replace('\n', "; ")));
    Ok(())
}

fn as_nobody(mut command: Command) -> Command {
    command.uid(NOBODY).gid(NOBODY);
    command
}

/// A cgroup that is [`NOBODY`]'s, as systemd delegates them.
pub(super) fn delegate() -> anyhow::Result<PathBuf> {
    let folder = PathBuf::from("/sys/fs/cgroup/delegated");
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+cpuset")?;
    fs::create_dir(&folder)?;
    for name in ["", "cgroup.procs", "cgroup.subtree_control"] {
        std::os::unix::fs::chown(folder.join(name), Some(NOBODY), Some(NOBODY))?;
    }
    Ok(folder)
}

/// Has a command start in this cgroup.
pub(super) fn start_in(command: &mut Command, cgroup: &Path) -> anyhow::Result<()> {
    let procs = File::options().write(true).open(cgroup.join("cgroup.procs"))?;
    // SAFETY: writes to a descriptor, between fork and exec.
    unsafe {
        command.pre_exec(move || rustix::io::write(&procs, b"0").map(|_| ()).map_err(Into::into));
    }
    Ok(())
}

/// A user who may make a cgroup and not move there goes on with --best-effort, and is refused without.
pub(super) fn check_join(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    let parent = PathBuf::from("/sys/fs/cgroup/parent");
    let job = parent.join("job");
    fs::create_dir(&parent)?;
    fs::write(parent.join("cgroup.subtree_control"), "+cpuset")?;
    fs::create_dir(&job)?;
    std::os::unix::fs::chown(&parent, Some(NOBODY), Some(NOBODY))?;
    // Somebody else in it: the wall would stand beside.
    let mut other = Command::new("sleep").arg("1000").spawn()?;
    fs::write(job.join("cgroup.procs"), other.id().to_string())?;
    for (more, is) in [("--best-effort", Within("0-1")), ("--guard=hard", Error(""))] {
        let mut command = as_nobody(scene.wall(&[more, "--"], &["touch"]));
        start_in(&mut command, &job)?;
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        note(facts, &format!("a user: a cgroup that is not to be joined: {more}"), &output, is);
        facts.note(said.contains("cgroup.procs may not be written"), format!("it says so: {}", said.trim()));
    }
    other.kill()?;
    other.wait()?;
    let is_empty = within_seconds(|| fs::remove_dir(&job).is_ok() && fs::remove_dir(&parent).is_ok());
    facts.note(is_empty, "the cgroup that was not joined is gone".to_owned());
    Ok(())
}

/// A stopped keeper holds policy calls until it goes on; one that is killed fails them, those that wait as well.
pub(super) fn check_keeper(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    use rustix::process::{Signal, kill_process};
    let cases: [(&str, &[Signal], Is); 3] = [
        ("stopped, goes on", &[Signal::STOP, Signal::CONT], On("2")),
        ("stopped, killed while a call waits", &[Signal::STOP, Signal::KILL], Error("ENOSYS")),
        ("killed", &[Signal::KILL], Error("ENOSYS")),
    ];
    for (number, (name, signals, is)) in cases.into_iter().enumerate() {
        let script = format!("echo; read word; exec \"$@\" # {number}");
        let wall = ["--guard", "easy", "--", "sh", "-c", &script, "sh"];
        let mut command = scene.wall(&wall, &["policy", "bind", "2"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdout.as_mut().context("no pipe")?.read_exact(&mut [0; 1])?;
        let keeper = process_of("spm-keeper", &format!("# {number}")).context("no keeper")?;
        kill_process(keeper, signals[0])?;
        child.stdin.take().context("no pipe")?.write_all(b"go\n")?;
        if let Some(&then) = signals.get(1) {
            sleep(Duration::from_secs(3));
            facts.note(child.try_wait()?.is_none(), format!("keeper {name}: the call waits"));
            kill_process(keeper, then)?;
        }
        note(facts, &format!("keeper {name}"), &child.wait_with_output()?, is);
    }
    // It removes what the killed ones have left.
    scene.check(facts, "after killed keepers", &["--guard", "easy", "--"], &["touch"], Within("0-1"))
}

/// A process of `spm` that stands apart: it has the command line that it was forked with.
pub(super) fn process_of(name: &str, word: &str) -> Option<Pid> {
    let entries = fs::read_dir("/proc").ok()?.flatten();
    let mut numbers = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let number = numbers.find(|number| {
        let read = |name| fs::read_to_string(format!("/proc/{number}/{name}")).unwrap_or_default();
        read("comm").trim() == name && read("cmdline").contains(word)
    })?;
    Pid::from_raw(number.parse().ok()?)
}
