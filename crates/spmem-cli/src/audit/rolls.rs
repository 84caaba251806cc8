//! Rolls: what those who hold grants tell of them (`spmem_node::roll`), and whether they are to be believed.
//!
//! Nothing that a process says of itself counts, nor a name that it gives to a file. [`Rolls::read`] finds the rolls that processes have mapped;
//! [`Rolls::of_file`], [`Rolls::of_pages`] and [`Rolls::of_run`] ask them about a process, and heed those only whose maker the process cannot be, or have made, by what
//! the kernel says of both: see [`Found::vouches`].
//!
//! Known holes: root can pretend anything, and so can who runs code of his own in the executable of `spm` (LD_PRELOAD) about programs of his own that are
//! behind no wall. A program of a run can lend the run's control page to another, which then counts as one of the run's.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::Serialize;
use spmem_core::nodemask::NodeMask;
use spmem_core::units::NodeId;
use spmem_node::roll::{self, Entry, What};

use super::maps::{Memfds, Range};

/// The right of somebody's to be on a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Title {
    /// Whose grant it is: the component, or the `spm` of a run.
    pub process: u32,
    /// The number of the grant there; of a run's the node that it is for, by the run's configuration.
    pub grant: String,
}

/// What the kernel says of a process.
#[derive(Clone, Debug, Default)]
pub struct Process {
    pub pid: u32,
    /// By which of its threads its memory is looked at.
    pub thread: u32,
    /// One of its users is root.
    pub is_root: bool,
    /// Which nodes its cpuset has.
    pub mems: NodeMask,
    /// It executes the same file as this one.
    pub is_spm: bool,
}

impl Process {
    /// Reads it.
    ///
    /// # Errors
    /// It has ended.
    pub fn read(pid: u32) -> std::io::Result<Self> {
        let thread = super::memory_of(pid);
        let status = super::read(thread, "status")?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let mems = field("Mems_allowed_list:").map(|list| NodeMask::parse(list, NodeMask::EMPTY));
        let same = |one: &Metadata, other: &Metadata| (one.dev(), one.ino()) == (other.dev(), other.ino());
        let executables = [fs::metadata(format!("/proc/{thread}/exe")), fs::metadata("/proc/self/exe")];
        Ok(Self {
            pid,
            thread,
            is_root: field("Uid:").is_some_and(|users| users.split_whitespace().any(|user| user == "0")),
            // A kernel without cpusets keeps nobody out.
            mems: mems.and_then(Result::ok).unwrap_or(NodeMask::ALL),
            is_spm: matches!(&executables, [Ok(one), Ok(other)] if same(one, other)),
        })
    }

    /// Whether it could allocate there itself. What is none of the kernel's nodes is open to all.
    fn reaches(&self, node: Option<NodeId>) -> bool {
        node.is_none_or(|node| self.mems.contains(node))
    }
}

/// A roll, and who has it mapped.
struct Found {
    maker: u32,
    is_roots: bool,
    holders: Vec<Process>,
    entries: Vec<Entry>,
}

impl Found {
    /// Whether what it says of `process` on `node` is not the process's own word: root's word, if the process is not root or needs nobody's help to get there;
    /// that of somebody whose cpuset has the node, about a process whose cpuset lacks it; where no wall
    /// is in between, that of an `spm`, which nobody tells what to enter.
    fn vouches(&self, process: &Process, node: Option<NodeId>) -> bool {
        let is_apart = |holder: &Process| {
            let is_heard = if process.reaches(node) { holder.is_spm } else { holder.reaches(node) };
            holder.pid != process.pid && is_heard
        };
        self.is_roots && (!process.is_root || process.reaches(node)) || self.holders.iter().any(is_apart)
    }

    fn title(&self, grant: impl ToString) -> Title {
        Title { process: self.maker, grant: grant.to_string() }
    }
}

/// Those of all processes.
#[derive(Default)]
pub struct Rolls {
    found: Vec<Found>,
    /// Some cannot be read by this user.
    pub is_part: bool,
}

impl Rolls {
    /// Reads those of `processes`. O(processes).
    pub fn read(processes: &[u32], memfds: &Memfds) -> Self {
        let mut rolls = Self::default();
        let name = format!("/memfd:{} (deleted)", roll::FILE_NAME.to_string_lossy());
        let mut places: BTreeMap<u64, Vec<(u32, PathBuf)>> = BTreeMap::new();
        for &pid in processes {
            let thread = super::memory_of(pid);
            let Ok(maps) = super::read(thread, "maps") else { continue };
            for Range { inode, place, .. } in memfds.named(&maps, &name) {
                let path = format!("/proc/{thread}/map_files/{place}");
                places.entry(inode).or_default().push((pid, path.into()));
            }
        }
        for held in places.values() {
            let holders = held.iter().filter_map(|(pid, _)| Process::read(*pid).ok()).collect();
            match held.iter().find_map(|(_, path)| File::open(path).ok()) {
                Some(file) => rolls.found.extend(found(&file, holders)),
                None => rolls.is_part = true,
            }
        }
        rolls
    }

    /// By which grant a memfd is on a node.
    pub fn of_file(&self, process: &Process, inode: u64, node: NodeId) -> Option<Title> {
        let title = |found: &Found, what: &What| match *what {
            What::File { inode: told, grant } if told == inode => Some(found.title(grant)),
            _ => None,
        };
        self.told(process, Some(node), title).next()
    }

    /// The single pages of a process that are on a node, each with its grant.
    pub fn of_pages(&self, process: &Process, node: NodeId) -> BTreeMap<u64, Title> {
        let started = roll::started(process.pid);
        let page = |found: &Found, what: &What| match *what {
            What::Page { pid, started: since, address, grant } => {
                (pid == process.pid && Some(since) == started).then(|| (address, found.title(grant)))
            }
            _ => None,
        };
        self.told(process, Some(node), page).collect()
    }

    /// By which grant of its run a process is on one of the kernel's nodes, and with how many bytes at most. `controls` are the control pages that
    /// it has mapped.
    pub fn of_run(&self, process: &Process, controls: &[u64], node: NodeId) -> Option<(Title, u64)> {
        let title = |found: &Found, what: &What| match *what {
            What::Run { control, id, quota } if controls.contains(&control) => Some((found.title(id), quota)),
            _ => None,
        };
        self.told(process, Some(node), title).next()
    }

    /// The same of a run's other nodes, by the number that the run gives them.
    pub fn of_copied(&self, process: &Process, control: u64, id: u32) -> Option<Title> {
        let title = |found: &Found, what: &What| match *what {
            What::Run { control: of, id: node, .. } if of == control && u32::from(node) == id => {
                Some(found.title(node))
            }
            _ => None,
        };
        self.told(process, None, title).next()
    }

    fn told<T>(
        &self,
        process: &Process,
        node: Option<NodeId>,
        pick: impl Fn(&Found, &What) -> Option<T>,
    ) -> impl Iterator<Item = T> {
        let believed = self.found.iter().filter(move |found| found.vouches(process, node));
        let entries = believed.flat_map(|found| found.entries.iter().map(move |entry| (found, entry)));
        let of_node = entries.filter(move |(_, entry)| entry.node == node);
        of_node.filter_map(move |(found, entry)| pick(found, &entry.what))
    }
}

fn found(file: &File, holders: Vec<Process>) -> Option<Found> {
    let is_roots = file.metadata().ok()?.uid() == 0;
    let (maker, entries) = roll::read(file).ok()?;
    // Its number may be that of another pid namespace.
    let maker =
        holders.iter().map(|holder| holder.pid).find(|&pid| pid == maker).or(Some(holders.first()?.pid))?;
    Some(Found { maker, is_roots, holders, entries })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_vouches_for_himself_and_those_behind_a_wall_for_nobody_in_it() {
        let mask = |text| NodeMask::parse(text, NodeMask::EMPTY).unwrap();
        let process = |pid, is_root, mems| Process { pid, thread: pid, is_root, mems: mask(mems), is_spm: false };
        let two = Some(NodeId::new(2).unwrap());
        let vouches = |is_roots, holder: &Process, process: &Process, node| {
            let (holders, entries) = (vec![holder.clone()], Vec::new());
            Found { maker: 1, is_roots, holders, entries }.vouches(process, node)
        };
        let (walled, bare) = (process(7, false, "0-1"), process(8, false, "0-3"));
        assert!(vouches(false, &process(9, false, "0-3"), &walled, two), "who is outside of the wall");
        assert!(!vouches(false, &process(9, false, "0-1"), &walled, two), "its helper in there");
        assert!(!vouches(false, &walled, &walled, two) && !vouches(false, &bare, &bare, two), "itself");
        assert!(!vouches(false, &process(9, false, "0-3"), &bare, two), "its helper without a wall");
        assert!(vouches(true, &bare, &bare, two), "what root has made it has not");
        let root = process(10, true, "0-1");
        assert!(!vouches(true, &root, &root, two), "root behind a wall");
        assert!(vouches(true, &process(11, true, "0-3"), &root, two));
        let spm = Process { is_spm: true, ..process(9, false, "0-1") };
        assert!(vouches(false, &spm, &bare, two) && vouches(false, &spm, &walled, None));
        assert!(!vouches(false, &spm, &walled, two), "code of its own in the executable of spm, behind the wall");
        assert!(!vouches(false, &Process { pid: 8, ..spm }, &bare, two), "an spm of itself");
    }
}
