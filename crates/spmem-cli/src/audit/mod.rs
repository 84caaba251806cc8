//! `spm audit`: who has pages on which SPM node, and by what right.
//!
//! [`audit`] reads numa_maps(5) of each process ([`pages`]) and holds what it finds against the wall that the process is
//! behind, if any. Nothing is assumed: the kernel says where pages are, and which policy a range has; by which grant they are there those say
//! who hold it ([`rolls`]), if they are to be believed about that process. What a run of `spm` has copied elsewhere the kernel does not know; the run's control page
//! does ([`copied`]).
//!
//! Known holes: pages of files that nobody maps, and the kernel's own, are nobody's. In a program of `spm run` that
//! places pages, all that nothing else explains is taken for placed, up to the quota of the run's grant. Looking at others' processes takes root.

mod copied;
mod maps;
mod pages;
mod rolls;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;

use anyhow::Context;
use serde::Serialize;
use spmem_core::node::Guard;
use spmem_core::nodemask::NodeMask;
use spmem_core::units::NodeId;
use spmem_sys::mempolicy::node_of;

use crate::arguments::AuditArguments;
use crate::config::Config;
use crate::machine;
use crate::remark::remark;
use crate::run::stdio::write_out;
use crate::wall::WALL_NAMES;
use copied::{CONTROL, copied_pages};
use maps::Memfds;
use pages::{By, Kind, Pages, pages_on};
use rolls::{Process, Rolls, Title};

/// A process cannot be looked at.
pub const FAILURE: i32 = 2;
const TAKES: &str = "that takes root with CAP_SYS_PTRACE";
/// Something is where it should not be.
const FOUND: i32 = 1;

/// A line of the answer.
#[derive(Debug, Serialize)]
struct Finding {
    pid: u32,
    command: String,
    #[serde(flatten)]
    pages: Pages,
    /// The guard of the wall that the process is behind.
    wall: Option<String>,
    by: Option<By>,
    is_clean: bool,
}

/// Prints what is found; the exit status.
///
/// # Errors
/// The configuration is not valid, or stdout does not take the answer.
pub fn audit(options: &AuditArguments) -> anyhow::Result<i32> {
    let config = Config::read(options.config.as_deref())?;
    let nodes = machine::kernel_nodes(&config)?;
    machine::tell_absent_types(&config, &nodes);
    let spm = nodes.spm;
    if spm.is_empty() {
        remark(format_args!("none of the kernel's nodes is spm; [type] of a configuration would say which are"));
    }
    let is_asked_for = !options.processes.is_empty();
    let mut processes = match is_asked_for {
        true => options.processes.clone(),
        false => all_processes()?,
    };
    processes.sort_unstable();
    processes.dedup();
    let (mut findings, mut unseen, mut untold) = (Vec::new(), 0, 0);
    let memfds = Memfds::find()?;
    let rolls = Rolls::read(&all_processes()?, &memfds);
    for pid in processes {
        match of_process(pid, &spm, &memfds, &rolls) {
            Ok((found, copied)) => {
                findings.extend(found);
                if let Err(error) = copied {
                    untold += 1;
                    remark(format_args!("process {pid}: what its run has copied cannot be told: {error}"));
                }
            }
            // The others are looked at all the same.
            Err(error) if is_asked_for => {
                unseen += 1;
                remark(format_args!("{}", unseen_reason(pid, &error)));
            }
            Err(error) => unseen += u32::from(error.kind() == ErrorKind::PermissionDenied),
        }
    }
    let text = if options.json {
        serde_json::to_string_pretty(&findings).context("the answer is no JSON")? + "\n"
    } else {
        table(&findings)
    };
    write_out(&text).context("stdout does not take the answer")?;
    let is_clean = findings.iter().all(|finding| finding.is_clean);
    if rolls.is_part && !is_clean {
        remark(format_args!(
            "what some holders of grants tell cannot be read: that takes root with CAP_SYS_ADMIN"
        ));
    }
    if unseen > 0 && !is_asked_for {
        remark(format_args!("{unseen} of the processes cannot be looked at: {TAKES}"));
    }
    // What a run has copied is there on purpose: without nodes of the kernel's that are spm, all others can be answered for unseen.
    let cannot_tell = unseen + untold > 0 && (is_asked_for || !spm.is_empty());
    Ok(match (is_clean, cannot_tell) {
        (false, _) => FOUND,
        (true, false) => 0,
        (true, true) => FAILURE,
    })
}

fn unseen_reason(pid: u32, error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::PermissionDenied => format!("process {pid} cannot be looked at: {TAKES}"),
        _ if !Path::new(&format!("/proc/{pid}")).exists() => format!("there is no process {pid}"),
        ErrorKind::NotFound => {
            format!("process {pid} cannot be looked at: this kernel is without numa_maps (CONFIG_NUMA)")
        }
        _ => format!("process {pid} cannot be looked at: {error}"),
    }
}

/// The processes that there are, by number.
///
/// # Errors
/// /proc is not mounted.
pub fn all_processes() -> anyhow::Result<Vec<u32>> {
    let entries = fs::read_dir("/proc").context("/proc cannot be read")?.flatten();
    let mut all: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    all.sort_unstable();
    Ok(all)
}

/// The thread by which a process's memory is looked at: its first, or another one where that has ended (pthread_exit(3)) and shows none.
fn memory_of(pid: u32) -> u32 {
    let shows = |thread: u32| {
        let maps = File::open(format!("/proc/{thread}/maps"));
        maps.and_then(|mut maps| maps.read(&mut [0])).is_ok_and(|bytes| bytes > 0)
    };
    if shows(pid) {
        return pid;
    }
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut numbers = threads.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.find(|&thread| shows(thread)).unwrap_or(pid)
}

/// What is no UTF-8 there is a name that somebody gave.
fn read(pid: u32, name: &str) -> std::io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/{name}"))?).into_owned())
}

/// What is found of a process, and whether that is all.
fn of_process(
    pid: u32,
    spm: &NodeMask,
    memfds: &Memfds,
    rolls: &Rolls,
) -> std::io::Result<(Vec<Finding>, anyhow::Result<()>)> {
    let process = Process::read(pid)?;
    let maps = read(process.thread, "maps")?;
    // A kernel without NUMA has none.
    let numa_maps = if spm.is_empty() { String::new() } else { read(process.thread, "numa_maps")? };
    let through_doors = Doors::find(&process, &maps, spm, memfds, rolls);
    let controls: Vec<u64> = memfds.named(&maps, CONTROL).iter().map(|range| range.inode).collect();
    let mut found = Vec::new();
    for (by, pages) in pages_on(&numa_maps, spm, |start, node, count| through_doors.told(start, node, count)) {
        let node = u16::try_from(pages.node).ok().and_then(|node| NodeId::new(node).ok());
        let run = node.filter(|_| by.is_none()).and_then(|node| rolls.of_run(&process, &controls, node));
        let Some((title, quota)) = run else {
            found.push((pages, by));
            continue;
        };
        let (within, beyond) = pages.split(quota);
        let parts = [(within, Some(By::run(Some(title)))), (beyond, None)];
        found.extend(parts.into_iter().filter(|(pages, _)| pages.pages > 0));
    }
    let copied = copied_pages(&process, &maps, memfds, rolls)
        .map(|copied| found.extend(copied.into_iter().map(|(pages, by)| (pages, Some(by)))));
    if found.is_empty() {
        return Ok((Vec::new(), copied));
    }
    let read = |name| read(pid, name).unwrap_or_default();
    let (command, guard) = (read("comm").trim().to_owned(), guard_of(&read("cgroup")));
    let finding = |(pages, by): (Pages, Option<By>)| Finding {
        pid,
        command: command.clone(),
        pages,
        wall: guard.map(|guard| guard.to_string()),
        is_clean: is_clean(by.as_ref().map(|by| by.kind), guard),
        by,
    };
    Ok((found.into_iter().map(finding).collect(), copied))
}

/// What has come to a process through doors.
struct Doors<'a> {
    process: &'a Process,
    rolls: &'a Rolls,
    /// Its mappings of memfds, and where all of its mappings end, by where they start.
    files: BTreeMap<u64, maps::Range<'a>>,
    ends: BTreeMap<u64, u64>,
    /// Single pages that are told of, by node and address.
    pages: BTreeMap<NodeId, BTreeMap<u64, Title>>,
}

impl<'a> Doors<'a> {
    fn find(process: &'a Process, maps: &'a str, spm: &NodeMask, memfds: &Memfds, rolls: &'a Rolls) -> Self {
        let pages = spm.iter().map(|node| (node, rolls.of_pages(process, node))).collect();
        Self { process, rolls, files: memfds.all(maps), ends: maps::ends(maps), pages }
    }

    /// Of the `count` pages that the range at `start` has on a node: by which grants, how many.
    fn told(&self, start: u64, node: NodeId, count: u64) -> Vec<(Title, u64)> {
        let file = self.files.get(&start).map(|range| range.inode);
        if let Some(title) = file.and_then(|inode| self.rolls.of_file(self.process, inode, node)) {
            return vec![(title, count)];
        }
        let (Some(pages), Some(&end)) = (self.pages.get(&node), self.ends.get(&start)) else { return Vec::new() };
        // What was put there may have been dropped since, or have moved.
        let is_there = |address: u64| {
            let seen = usize::try_from(address).map(|address| node_of(self.process.thread, address));
            matches!(seen, Ok(Ok(seen)) if seen == i32::from(node.get()))
        };
        let told = pages.range(start..end).filter(|(address, _)| is_there(**address));
        told.map(|(_, title)| (title.clone(), 1)).collect()
    }
}

/// R9: strict bind opens an easy node, and no other. A door is opened by a grant only, and a run's porter has one.
fn is_clean(by: Option<Kind>, guard: Option<Guard>) -> bool {
    match by {
        Some(Kind::Door | Kind::Run) => true,
        Some(Kind::Bind) => guard == Some(Guard::Easy),
        None => false,
    }
}

/// The guard of the wall in a path of /proc/PID/cgroup; the innermost.
fn guard_of(cgroups: &str) -> Option<Guard> {
    let mut names = cgroups.lines().rev().flat_map(|line| line.rsplit('/'));
    let of = |name: &str| {
        let rest = name.strip_prefix(WALL_NAMES)?;
        [Guard::Hard, Guard::Easy].into_iter().find(|guard| rest.starts_with(&format!("{guard}-")))
    };
    names.find_map(of)
}

fn table(findings: &[Finding]) -> String {
    let mut text = format!(
        "{:>8}  {:<16} {:>5} {:<10} {:>10} {:>14}  {:<5} {:<14} {}\n",
        "pid", "command", "node", "kind", "pages", "bytes", "wall", "by", "is"
    );
    for one in findings {
        let by = one.by.as_ref().map_or("-".to_owned(), By::to_string);
        let is = if one.is_clean { "on purpose" } else { "without" };
        let wall = one.wall.as_deref().unwrap_or("-");
        let Pages { node, kind, pages, bytes } = one.pages;
        text += &format!(
            "{:>8}  {:<16} {node:>5} {kind:<10} {pages:>10} {bytes:>14}  {wall:<5} {by:<14} {is}\n",
            one.pid, one.command
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bound_pages_are_clean_behind_an_easy_guard_only() {
        assert!(is_clean(Some(Kind::Bind), Some(Guard::Easy)));
        assert!(!is_clean(Some(Kind::Bind), Some(Guard::Hard)) && !is_clean(Some(Kind::Bind), None));
        assert!(is_clean(Some(Kind::Door), Some(Guard::Hard)) && is_clean(Some(Kind::Run), Some(Guard::Hard)));
        assert!(!is_clean(None, Some(Guard::Easy)));
    }

    #[test]
    fn the_wall_is_in_the_name_of_the_cgroup() {
        assert_eq!(guard_of("0::/a/spm-wall-easy-12/x\n"), Some(Guard::Easy));
        assert_eq!(guard_of("3:cpuset:/spm-wall-hard-1\n0::/\n"), Some(Guard::Hard));
        assert_eq!(guard_of("0::/spm-wall-\n"), None);
    }
}
