//! In a guest of `cargo xtask vm`: memory of a node that comes through a wall by grant. A part of [`vm_wall`](super::vm_wall).
#![allow(unsafe_code, reason = "a descriptor that is lent")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::process::{Command, Stdio};

use anyhow::Context;
use rustix::process::Pid;
use spmem_core::grant::{Rights, Terms};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
use spmem_core::registry::Registry;
use spmem_core::units::{Bytes, DomainId, NodeId};
use spmem_node::door::Door;
use spmem_node::roll::Roll;
use spmem_sys::fd::Fd;
use spmem_sys::node_file::NodeFile;
use spmem_sys::uffd::Uffd;
use spmem_sys::{Errno, PAGE};

use super::vm_facts::Facts;
use super::vm_wall::Is::On;
use super::vm_wall::{Scene, far_file, note, within_seconds};
use super::vm_wall_probe::DOOR_BYTE;

/// A node that is nearly full gives nothing more, and nobody is ended for it: a process that has more there than all others stays.
pub(super) fn check_full_node(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
    let node = NodeId::new(3)?;
    let (free, _) = spmem_node::machine::read_room(node).context("no node 3")?;
    let mib = free.0.saturating_sub(14 << 20) >> 20;
    let mut rich = scene.probe(&["--stay", "600000", "fill", "bind", "3", &mib.to_string()]).into_iter();
    let mut rich = Command::new(rich.next().context("no program")?).args(rich).stdout(Stdio::piped()).spawn()?;
    BufReader::new(rich.stdout.take().context("no pipe")?).read_line(&mut String::new())?;
    let left = spmem_node::machine::read_room(node).context("no node 3")?.0;
    let file = NodeFile::new(c"spmem-door", 32 << 20, 3).map(|_| ());
    facts.equal("doors: a file that a full node has no room for", file, Err(Errno::ENOMEM));
    let measured = Command::new(&scene.spm).args(["nodes", "--measure"]).output()?;
    let said = String::from_utf8_lossy(&measured.stderr).into_owned();
    let is_said = said.lines().any(|line| line.starts_with("spm: node 3 is not measured"));
    facts.note(
        measured.status.success(),
        format!("nodes --measure beside {} free: {is_said} {}", left.0, measured.status),
    );
    facts.note(rich.try_wait()?.is_none(), "nobody is ended for room on a full node".to_owned());
    rich.kill()?;
    rich.wait()?;
    Ok(())
}

/// By grant, a range and a single page of node 2 come through a hard wall, and stay there while they are used.
pub(super) fn check_doors(facts: &mut Facts, scene: &Scene) -> anyhow::Result<()> {
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
