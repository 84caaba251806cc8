//! What a program behind a wall tries: names nodes in every way, and says where the kernel put the pages.
//!
//! Prints one line: `nodes LIST`, the nodes of the pages that it touched, as move_pages(2) reads them back; or the name of the
//! error. Started by [`vm_wall`](super::vm_wall), under `spm wall` and without.
#![allow(unsafe_code, reason = "fork(2), and memory that is shared with other processes")]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::Mode;
use spmem_core::units::NodeId;
use spmem_node::machine::list_text;
use spmem_sys::mapping::{Mapping, populate_write};
use spmem_sys::mempolicy::{self, Mask};
use spmem_sys::uffd::Uffd;
use spmem_sys::{Errno, PAGE};

use super::vm_runs_probe::Area;

const PAGES: usize = 32;
/// Pages that do not fit into the budget.
const FILLED: usize = 16 << 20 >> 12;
/// What pages that come through a door hold.
pub(super) const DOOR_BYTE: u8 = 0xd0;
/// NUMA balancing takes a few seconds to move a page.
const USE: Duration = Duration::from_secs(10);

/// What to try.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// The way and its words, as in the function [`attempt`].
    #[arg(required = true)]
    words: Vec<String>,
    /// Become this user first.
    #[arg(long)]
    user: Option<u32>,
    /// Be a program that others of its user may not look into.
    #[arg(long)]
    hidden: bool,
    /// Stay that long when done, ms.
    #[arg(long, default_value_t = 0)]
    stay: u64,
}

/// Runs it.
///
/// # Errors
/// The words make no sense, or something fails that is not tried.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    if let Some(user) = options.user {
        // SAFETY: takes numbers; this process has one thread.
        ensure!(unsafe { libc::setgid(user) } == 0, "cannot become another group");
        // SAFETY: as above.
        ensure!(unsafe { libc::setuid(user) } == 0, "cannot become another user");
    }
    if options.hidden {
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    }
    let words: Vec<&str> = options.words.iter().map(String::as_str).collect();
    let mut kept = Vec::new();
    match attempt(&words, &mut kept)? {
        Ok(nodes) => println!("nodes {}", list_text(nodes)),
        Err(errno) => println!("{errno:?}"),
    }
    thread::sleep(Duration::from_millis(options.stay));
    Ok(())
}

type Outcome = Result<BTreeSet<u16>, Errno>;

fn attempt(words: &[&str], kept: &mut Vec<Mapping>) -> anyhow::Result<Outcome> {
    let outcome = match words {
        ["touch"] => touch(kept),
        ["policy", mode, nodes] => {
            let (mode, nodes) = (mode_of(mode)?, mask_of(nodes)?);
            mempolicy::set_policy(mode, &nodes).and_then(|()| touch(kept))
        }
        ["cold-policy", mode, nodes] => cold_policy(mode_of(mode)?, &mask_of(nodes)?)?,
        ["mbind", mode, nodes] => {
            let (mode, nodes) = (mode_of(mode)?, mask_of(nodes)?);
            memory().and_then(|memory| {
                mempolicy::bind_range(memory.start(), memory.len(), mode, &nodes)?;
                populate_write(memory.start(), memory.len())?;
                kept.push(memory);
                places(kept)
            })
        }
        ["move-pages", node] => move_pages(node.parse()?, kept),
        ["migrate-pages", from, to] => {
            let (from, to) = (mask_of(from)?, mask_of(to)?);
            touch(kept).and_then(|_| {
                mempolicy::migrate(0, &from, &to)?;
                places(kept)
            })
        }
        ["fork"] => fork()?,
        ["threads", mode, nodes] => threads(mode_of(mode)?, &mask_of(nodes)?)?,
        // Standard input is the file.
        ["file"] | ["file", "used"] => {
            let bytes = usize::try_from(fs::metadata("/proc/self/fd/0")?.len())?;
            Mapping::shared(std::io::stdin().as_raw_fd(), bytes).and_then(|memory| {
                populate_write(memory.start(), memory.len())?;
                kept.push(memory);
                let end = Instant::now() + if words.len() > 1 { USE } else { Duration::ZERO };
                while Instant::now() < end {
                    let len = kept[0].len();
                    kept[0].bytes_mut(0, len).fill(1);
                    thread::sleep(Duration::from_millis(1));
                }
                places(kept)
            })
        }
        ["fill", mode, nodes, mib] => fill(mode, nodes, mib.parse()?, kept)?,
        ["door"] => through_a_door(kept)?,
        // The wall's own files.
        ["escape", what] => escape(what)?,
        _ => bail!("there is no {words:?} to try"),
    };
    Ok(outcome)
}

fn memory() -> Result<Mapping, Errno> {
    Mapping::new(PAGES * PAGE, c"probe")
}

fn touch(kept: &mut Vec<Mapping>) -> Outcome {
    let memory = memory()?;
    populate_write(memory.start(), memory.len())?;
    kept.push(memory);
    places(kept)
}

fn places(kept: &[Mapping]) -> Outcome {
    let mut nodes = BTreeSet::new();
    for memory in kept {
        for at in (memory.start()..memory.start() + memory.len()).step_by(PAGE) {
            let node = mempolicy::node_of(0, at)?;
            nodes.insert(u16::try_from(node).map_err(|_| Errno(-node))?);
        }
    }
    Ok(nodes)
}

/// A policy whose mask is in a page that is away: under `spm run`, with a budget below what is filled here.
fn cold_policy(mode: usize, nodes: &Mask) -> anyhow::Result<Outcome> {
    let mut page = memory().map_err(|errno| anyhow::anyhow!("no memory: {errno}"))?;
    let start = page.start();
    for (at, word) in nodes.iter().enumerate() {
        page.bytes_mut(at * 8, 8).copy_from_slice(&word.to_ne_bytes());
    }
    // Not by its mapping, which would bring it back; the kernel reads no page for a file that is away.
    let own = File::open("/proc/self/mem")?;
    let is_away = || own.read_at(&mut [0; 8], start as u64).is_err();
    let mut area = Area::new(FILLED)?;
    let mut version = 0;
    while !is_away() {
        version += 1;
        area.all().for_each(|page| area.write(page, version));
    }
    // SAFETY: the kernel reads the mask, which is mapped.
    let result = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, start, nodes.len() * 64 + 1) };
    if result != 0 {
        return Ok(Err(Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))));
    }
    Ok(touch(&mut Vec::new()))
}

fn move_pages(node: i32, kept: &mut Vec<Mapping>) -> Outcome {
    touch(kept)?;
    let status = mempolicy::move_page(0, kept[0].start(), node)?;
    if status < 0 { Err(Errno(-status)) } else { places(kept) }
}

/// Pages that a child has for itself, and those that it copies from its parent.
fn fork() -> anyhow::Result<Outcome> {
    let mut kept = Vec::new();
    if let Err(errno) = touch(&mut kept) {
        return Ok(Err(errno));
    }
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error().into()),
        0 => {
            kept[0].bytes_mut(0, PAGES * PAGE).fill(1);
            Ok(touch(&mut kept))
        }
        child => {
            // SAFETY: waits for a child; nothing is written.
            ensure!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) } == child, "the child was lost");
            // The child has said it.
            std::process::exit(0);
        }
    }
}

/// One thread from before and one from after a policy of the first: a policy is its thread's, and that of what it starts.
fn threads(mode: usize, nodes: &Mask) -> anyhow::Result<Outcome> {
    let (go, start) = mpsc::channel::<()>();
    let before = thread::spawn(move || {
        let _ = start.recv();
        touch(&mut Vec::new())
    });
    if let Err(errno) = mempolicy::set_policy(mode, nodes) {
        return Ok(Err(errno));
    }
    let _ = go.send(());
    let after = thread::spawn(|| touch(&mut Vec::new()));
    let join = |one: thread::JoinHandle<Outcome>| one.join().map_err(|_| anyhow::anyhow!("a thread is gone"));
    let (before, after) = (join(before)?, join(after)?);
    Ok(before.and_then(|before| Ok(before.union(&after?).copied().collect())))
}

/// Takes memory until it has `mib`, or is ended.
fn fill(mode: &str, nodes: &str, mib: usize, kept: &mut Vec<Mapping>) -> anyhow::Result<Outcome> {
    fs::write("/proc/self/oom_score_adj", "1000").context("cannot ask to be the first to go")?;
    if mode != "none"
        && let Err(errno) = mempolicy::set_policy(mode_of(mode)?, &mask_of(nodes)?)
    {
        return Ok(Err(errno));
    }
    for _ in 0..mib {
        let memory = match Mapping::new(1 << 20, c"probe") {
            Ok(memory) => memory,
            Err(errno) => return Ok(Err(errno)),
        };
        if let Err(errno) = populate_write(memory.start(), memory.len()) {
            return Ok(Err(errno));
        }
        kept.push(memory);
    }
    Ok(places(kept))
}

/// Waits until an outsider has filled a missing page of ours, and uses it for as long as NUMA balancing needs to look twice.
fn through_a_door(kept: &mut Vec<Mapping>) -> anyhow::Result<Outcome> {
    let mut memory = memory()?;
    let (start, len) = (memory.start(), memory.len());
    // A policy of the thread's, whichever: NUMA balancing leaves its memory alone.
    mempolicy::set_policy(1, &mempolicy::mask([0]))?;
    let faults = Uffd::from_syscall()?;
    faults.enable(0)?;
    faults.register(start, len)?;
    println!("door {} {start}", faults.raw());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    ensure!(memory.bytes(0, PAGE) == [DOOR_BYTE; PAGE], "the page has other contents");
    faults.unregister(start, len)?;
    let end = Instant::now() + USE;
    while Instant::now() < end {
        memory.bytes_mut(0, PAGE).fill(DOOR_BYTE);
        thread::sleep(Duration::from_millis(1));
    }
    kept.push(memory);
    let node = mempolicy::node_of(0, start);
    Ok(node.map(|node| u16::try_from(node).into_iter().collect()))
}

fn escape(what: &str) -> anyhow::Result<Outcome> {
    let cgroup = fs::read_to_string("/proc/self/cgroup")?;
    let own = cgroup.lines().find_map(|line| line.strip_prefix("0::")).context("no cgroup of version 2")?;
    let own = format!("/sys/fs/cgroup{own}");
    let written = match what {
        "mems" => fs::write(format!("{own}/cpuset.mems"), "0-3"),
        "leave" => fs::write("/sys/fs/cgroup/cgroup.procs", std::process::id().to_string()),
        _ => bail!("there is no {what} to try"),
    };
    if let Err(error) = written {
        return Ok(Err(Errno(error.raw_os_error().unwrap_or(libc::EIO))));
    }
    // Whether it helped: an explicit bind.
    let bound = mempolicy::set_policy(mempolicy::MPOL_BIND, &mempolicy::mask([2]));
    Ok(bound.and_then(|()| touch(&mut Vec::new())))
}

/// `interleave`, `bind=static`.
fn mode_of(text: &str) -> anyhow::Result<usize> {
    let (name, flag) = text.split_once('=').unwrap_or((text, ""));
    let number =
        Mode::ALL.iter().position(|mode| mode.name() == name).with_context(|| format!("no mode {name}"))?;
    Ok(number
        | match flag {
            "" => 0,
            "static" => mempolicy::MPOL_F_STATIC_NODES,
            "relative" => mempolicy::MPOL_F_STATIC_NODES >> 1,
            other => bail!("no flag {other}"),
        })
}

fn mask_of(text: &str) -> anyhow::Result<Mask> {
    Ok(mempolicy::mask(NodeMask::parse(text, NodeMask::EMPTY)?.iter().map(NodeId::get)))
}
