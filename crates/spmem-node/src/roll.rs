//! Roll: what was put where by which grant, told by who holds the grants to who asks (`spm audit`).
//!
//! Grants are values in the memory of one process ([`Registry`](spmem_core::registry)). Of what they are used for others are told by a [`Roll`]: a
//! memfd that its maker keeps mapped, and that nobody else can write. [`read`] is the asker's side. It believes nothing: whose roll it is,
//! and whether that one had anything to say about the node, the asker finds out from the kernel. Takes no lock: one thread enters.
//!
//! Holes: a roll ends with its maker, as the grants do. A page that the program has dropped stays on the roll until it is struck off; so does one of a
//! process that executes another program.

use core::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::vec::Vec;
use std::{format, vec};

use spmem_core::grant::GrantId;
use spmem_core::units::NodeId;
use spmem_sys::region::Region;
use spmem_sys::{Errno, process};

/// What /proc calls it.
pub const FILE_NAME: &CStr = c"spmem-roll";
/// Entries that a roll has room for.
pub const MAX_ENTRIES: usize = 8191;

/// The low digits are the layout's version.
const MAGIC: u64 = 0x5350_4d52_4f4c_0001;
const WORDS: usize = 8;
const ENTRY: usize = WORDS * 8;

/// What is on a node by a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// All of a memfd.
    File {
        /// Its number; all memfds are on one device.
        inode: u64,
        /// By which grant.
        grant: GrantId,
    },
    /// A page of a process's own memory.
    Page {
        /// The process,
        pid: u32,
        /// since when it has that number ([`started`]),
        started: u64,
        /// and where it has the page.
        address: u64,
        /// By which grant.
        grant: GrantId,
    },
    /// What the processes of a run have there, by the run's grant for that node.
    Run {
        /// The run's control page, which they all map.
        control: u64,
        /// The node, as the run's configuration numbers it.
        id: u16,
        /// So many bytes at most.
        quota: u64,
    },
}

/// A line of a roll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// On which of the kernel's nodes; of a run's other nodes none.
    pub node: Option<NodeId>,
    /// What.
    pub what: What,
}

impl Entry {
    fn to_words(self) -> [u64; WORDS] {
        let node = self.node.map_or(u64::MAX, |node| node.get().into());
        let (kind, [one, two, three, four]) = match self.what {
            What::File { inode, grant } => (1, [inode, grant.to_bits(), 0, 0]),
            What::Page { pid, started, address, grant } => (2, [pid.into(), started, address, grant.to_bits()]),
            What::Run { control, id, quota } => (3, [control, id.into(), quota, 0]),
        };
        [kind, node, one, two, three, four, 0, 0]
    }

    /// `None` where nothing is entered, or nothing that makes sense.
    fn from_words([kind, node, one, two, three, four, ..]: [u64; WORDS]) -> Option<Self> {
        let grant = GrantId::from_bits;
        let what = match kind {
            1 => What::File { inode: one, grant: grant(two) },
            2 => What::Page { pid: u32::try_from(one).ok()?, started: two, address: three, grant: grant(four) },
            3 => What::Run { control: one, id: u16::try_from(two).ok()?, quota: three },
            _ => return None,
        };
        let node = match node {
            u64::MAX => None,
            node => Some(NodeId::new(u16::try_from(node).ok()?).ok()?),
        };
        Some(Self { node, what })
    }
}

/// A roll of this process's, and of those that it forks.
#[derive(Debug)]
pub struct Roll {
    memory: Region,
}

impl Roll {
    /// An empty one.
    ///
    /// # Errors
    /// As memfd_create(2), mmap(2).
    pub fn new() -> Result<Self, Errno> {
        let memory = Region::published(FILE_NAME, (MAX_ENTRIES + 1) * ENTRY)?;
        memory.write(8, &u64::from(process::pid()).to_ne_bytes())?;
        memory.write(0, &MAGIC.to_ne_bytes())?;
        Ok(Self { memory })
    }

    /// Tells of something.
    ///
    /// # Errors
    /// `ENOMEM` when [`MAX_ENTRIES`] are told of.
    pub fn enter(&self, entry: &Entry) -> Result<(), Errno> {
        let at = self.find(|words| words[0] == 0).ok_or(Errno::ENOMEM)?;
        let words = entry.to_words();
        for (word, value) in words.iter().enumerate().skip(1) {
            self.memory.write(at + word * 8, &value.to_ne_bytes())?;
        }
        // Comes last: it says that the others are there.
        self.memory.write(at, &words[0].to_ne_bytes())
    }

    /// It is there no more; nothing happens when it was not told of.
    pub fn strike(&self, entry: &Entry) {
        if let Some(at) = self.find(|words| *words == entry.to_words()) {
            self.memory.write(at, &[0; 8]).expect("it was read there");
        }
    }

    fn find(&self, mut is_it: impl FnMut(&[u64; WORDS]) -> bool) -> Option<usize> {
        let mut bytes = [0; ENTRY];
        (1..=MAX_ENTRIES).map(|number| number * ENTRY).find(|&at| {
            self.memory.read(at, &mut bytes).expect("it lies within");
            is_it(&words(&bytes))
        })
    }
}

fn words(bytes: &[u8]) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    words
}

/// Reads somebody's roll: the number of who made it, as he knows it, and what is on it.
///
/// # Errors
/// It is none, or of another version's layout; as read(2).
pub fn read(file: &File) -> io::Result<(u32, Vec<Entry>)> {
    let mut bytes = vec![0; (MAX_ENTRIES + 1) * ENTRY];
    file.read_exact_at(&mut bytes, 0)?;
    let head = words(&bytes[..ENTRY]);
    if head[0] != MAGIC {
        return Err(io::Error::new(ErrorKind::InvalidData, "it is no roll that this version reads"));
    }
    let entries = bytes[ENTRY..].chunks_exact(ENTRY).filter_map(|bytes| Entry::from_words(words(bytes)));
    Ok((u32::try_from(head[1]).unwrap_or(0), entries.collect()))
}

/// When a process was started, in ticks since the machine was (proc_pid_stat(5)): with its number, it is this one and no later one.
pub fn started(pid: u32) -> Option<u64> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, parentheses too.
    let after_name = text.iter().rposition(|byte| *byte == b')')?;
    let mut fields = text[after_name + 1..].split(|byte| *byte == b' ').skip(1);
    core::str::from_utf8(fields.nth(19)?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn entry(what: What) -> Entry {
        Entry { node: Some(NodeId::ONE), what }
    }

    fn of_file(inode: u64) -> Entry {
        entry(What::File { inode, grant: GrantId::from_bits(0) })
    }

    #[test]
    fn what_is_entered_is_read_by_others_until_it_is_struck_off() {
        let roll = Roll::new().unwrap();
        let file = File::open(format!("/proc/self/fd/{}", roll.memory.fd().raw())).unwrap();
        let grant = GrantId::from_bits(7 << 32 | 2);
        let page = entry(What::Page { pid: 9, started: 12, address: 0x7f00_0000_1000, grant });
        let run = Entry { node: None, ..entry(What::Run { control: 3, id: 2, quota: 4096 }) };
        let all = [page, of_file(u64::MAX), run];
        all.iter().for_each(|one| roll.enter(one).unwrap());
        assert_eq!(read(&file).unwrap(), (std::process::id(), all.to_vec()));
        roll.strike(&page);
        roll.strike(&page);
        assert_eq!(read(&file).unwrap().1, all[1..]);
        assert_eq!(std::format!("{grant} {}", GrantId::from_bits(3 << 32)), "7.2 3");
    }

    #[test]
    fn nobody_else_writes_to_a_roll() {
        let roll = Roll::new().unwrap();
        let path = format!("/proc/self/fd/{}", roll.memory.fd().raw());
        let file = File::options().read(true).write(true).open(path).unwrap();
        assert!(file.write_at(&[1; 8], 64).is_err());
        let len = usize::try_from(file.metadata().unwrap().size()).unwrap();
        assert!(spmem_sys::mapping::Mapping::shared(std::os::fd::AsRawFd::as_raw_fd(&file), len).is_err());
    }

    #[test]
    fn a_full_roll_takes_no_more() {
        let roll = Roll::new().unwrap();
        (0..MAX_ENTRIES as u64).for_each(|number| roll.enter(&of_file(number)).unwrap());
        assert_eq!(roll.enter(&of_file(u64::MAX)), Err(Errno::ENOMEM));
        roll.strike(&of_file(5));
        assert_eq!(roll.enter(&of_file(u64::MAX)), Ok(()));
    }

    #[test]
    fn a_process_has_started_before_its_child() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(started(std::process::id()).unwrap() <= started(child.id()).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(started(child.id()), None);
    }
}
