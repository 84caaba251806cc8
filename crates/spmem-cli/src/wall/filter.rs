//! Filter: which calls of a program behind an easy guard are asked about, and what is answered.
//!
//! The filter asks about policy calls that name nodes. [`answer`] reads the nodes out of the caller's memory, lets
//! [`judge`] decide, writes a trimmed mask back where it was, and lets the kernel go on. That is a convenience and no
//! boundary: another thread may change the mask in between, and calls of 32-bit programs are not asked about. A call whose
//! nodes cannot be read, or not be changed, fails.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use anyhow::Context;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use spmem_core::enclosure::{Answer, Call, judge};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy;
use spmem_core::units::NodeId;
use spmem_sys::Errno;
use spmem_sys::process::read_memory_of;
use spmem_sys::seccomp::{self, Asked, Listener, Privileges};

/// Entries of a move_pages(2) list that are read at once.
const BATCH: usize = 4096;
/// Words of the widest mask.
const WORDS: usize = 16;
const CAP_SYS_NICE: u64 = 1 << 23;

/// The calls, each with the argument that points to its nodes: without nodes there is nothing to ask.
const ASKED: [(i64, u8); 4] =
    [(libc::SYS_set_mempolicy, 1), (libc::SYS_mbind, 3), (libc::SYS_move_pages, 3), (libc::SYS_migrate_pages, 3)];

/// Puts the filter on this process, for good.
///
/// # Errors
/// The kernel refuses; the message says what would help.
pub fn install() -> anyhow::Result<(Listener, Privileges)> {
    let program: Vec<libc::sock_filter> = program()?
        .iter()
        .map(|step| libc::sock_filter { code: step.code, jt: step.jt, jf: step.jf, k: step.k })
        .collect();
    seccomp::install(&program).map_err(|errno| match errno {
        Errno::EBUSY => {
            anyhow::anyhow!("this process is behind an easy guard, or another filter with a listener, already")
        }
        errno => anyhow::anyhow!("the kernel takes no filter (seccomp): {errno}"),
    })
}

fn program() -> anyhow::Result<BpfProgram> {
    let has_nodes = |argument| -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let pointer = SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Ne, 0)?;
        Ok(vec![SeccompRule::new(vec![pointer])?])
    };
    let mut rules = BTreeMap::new();
    for (number, argument) in ASKED {
        rules.insert(number, has_nodes(argument).context("the filter is no filter")?);
    }
    let arch = std::env::consts::ARCH.try_into().context("the filter is not for this processor")?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Trace(0), arch);
    let mut program: BpfProgram = filter.and_then(TryInto::try_into).context("the filter is no filter")?;
    // The library has no word for "ask the listener", and one of its own for other processors: kill.
    for step in program.iter_mut().filter(|step| step.code == RETURN) {
        step.k = match step.k {
            libc::SECCOMP_RET_TRACE => seccomp::RET_ASK,
            libc::SECCOMP_RET_KILL_PROCESS => libc::SECCOMP_RET_ALLOW,
            other => other,
        };
    }
    Ok(program)
}

/// `BPF_RET | BPF_K`.
const RETURN: u16 = 0x06;

/// What an easy guard is around.
#[derive(Clone, Copy, Debug)]
pub struct Easy {
    pub cpuset: NodeMask,
    pub easy: NodeMask,
}

/// Whether this process may look into a program of `pid`, and change masks there.
///
/// # Errors
/// The kernel's reason.
pub fn may_look_into(pid: u32) -> io::Result<()> {
    open_memory(pid).map(|_| ())
}

fn open_memory(thread: u32) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(format!("/proc/{thread}/mem"))
}

/// Answers a call.
pub fn answer(listener: &Listener, asked: &Asked, around: &Easy) {
    let verdict = match Caller::open(listener, asked) {
        Ok(caller) => caller.judge(asked, around).unwrap_or_else(Reply::Fail),
        Err(_) => Reply::Fail(Errno::EPERM),
    };
    // A caller that has gone needs no answer.
    let _ = match verdict {
        Reply::Continue => listener.let_through(asked),
        Reply::Fail(errno) => listener.fail(asked, errno),
    };
}

enum Reply {
    Continue,
    Fail(Errno),
}

/// The thread that called, and its memory.
struct Caller {
    thread: u32,
    memory: File,
}

impl Caller {
    /// An error when it has gone, or is not to be looked at.
    fn open(listener: &Listener, asked: &Asked) -> io::Result<Self> {
        let memory = open_memory(asked.thread)?;
        // Its number may have been another's before the file was open, not after.
        let caller = Self { thread: asked.thread, memory };
        listener.is_waiting(asked).then_some(caller).ok_or_else(|| ErrorKind::NotFound.into())
    }

    /// # Errors
    /// What the call fails with, because its nodes cannot be read: `EFAULT` as the kernel has it.
    fn judge(&self, asked: &Asked, around: &Easy) -> Result<Reply, Errno> {
        let a = asked.arguments;
        let number = i64::from(asked.number);
        let (call, place) = if number == libc::SYS_move_pages {
            (Call::MovePages(self.read_targets(a[3], a[1])?), None)
        } else {
            let (mode, at, bits) = match number {
                libc::SYS_set_mempolicy => (a[0], a[1], a[2]),
                libc::SYS_mbind => (a[2], a[3], a[4]),
                _ => (0, a[3], a[1]),
            };
            let nodes = self.read_mask(at, bits)?;
            let call = if number == libc::SYS_migrate_pages {
                Call::MigratePages { to: nodes, is_privileged: self.may_move_others() }
            } else {
                #[allow(clippy::cast_possible_truncation, reason = "the kernel takes an int")]
                Call::Policy { mode: mode as u32, nodes }
            };
            (call, Some((at, bits)))
        };
        Ok(match (judge(&around.cpuset, &around.easy, &call), place) {
            (Answer::Continue, _) => Reply::Continue,
            (Answer::Fail(errno), _) => Reply::Fail(linux(errno)),
            (Answer::Rewrite(nodes), Some((at, bits))) if self.write_mask(at, bits, &nodes) => Reply::Continue,
            (Answer::Rewrite(_), _) => Reply::Fail(Errno::EPERM),
        })
    }

    /// The file has no page that is away, as programs of `spm run` have them: those come by the other way.
    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        self.memory.read_exact_at(to, at).or_else(|_| read_memory_of(self.thread, at, to))
    }

    fn read_mask(&self, at: u64, bits: u64) -> Result<NodeMask, Errno> {
        let mut bytes = [0; WORDS * 8];
        let bytes = &mut bytes[..words(bits) * 8];
        self.read(at, bytes)?;
        Ok(mask_of(bytes, bits))
    }

    fn write_mask(&self, at: u64, bits: u64, nodes: &NodeMask) -> bool {
        let Some(bytes) = bytes_of(nodes, bits) else { return false };
        self.memory.write_all_at(&bytes, at).is_ok()
    }

    /// The nodes in a list of `count` numbers.
    fn read_targets(&self, at: u64, count: u64) -> Result<NodeMask, Errno> {
        let (mut nodes, mut done) = (NodeMask::EMPTY, 0);
        let mut bytes = vec![0; BATCH * 4];
        while done < count {
            let next = usize::try_from(count - done).unwrap_or(BATCH).min(BATCH);
            let place =
                done.checked_mul(4).and_then(|offset| at.checked_add(offset)).ok_or(Errno(libc::EFAULT))?;
            self.read(place, &mut bytes[..next * 4])?;
            let (numbers, _) = bytes[..next * 4].as_chunks::<4>();
            let numbers = numbers.iter().map(|number| i32::from_ne_bytes(*number));
            numbers
                .filter_map(|number| NodeId::new(u16::try_from(number).ok()?).ok())
                .for_each(|node| nodes.insert(node));
            done += next as u64;
        }
        Ok(nodes)
    }

    fn may_move_others(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.thread)).unwrap_or_default();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        effective
            .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
            .is_some_and(|set| set & CAP_SYS_NICE != 0)
    }
}

/// Words of a mask of which the kernel is told `bits`: it takes one fewer.
fn words(bits: u64) -> usize {
    usize::try_from(bits.saturating_sub(1).div_ceil(64)).unwrap_or(WORDS).min(WORDS)
}

fn mask_of(bytes: &[u8], bits: u64) -> NodeMask {
    let is_set = |&node: &u16| u64::from(node) + 1 < bits && bytes[usize::from(node) / 8] >> (node % 8) & 1 == 1;
    let all = 0..u16::try_from(bytes.len() * 8).unwrap_or(u16::MAX);
    all.filter(is_set).filter_map(|node| NodeId::new(node).ok()).collect()
}

/// None when a node has no place among `bits`.
fn bytes_of(nodes: &NodeMask, bits: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; words(bits) * 8];
    for node in nodes {
        if u64::from(node.get()) + 1 >= bits {
            return None;
        }
        bytes[node.index() / 8] |= 1 << (node.index() % 8);
    }
    Some(bytes)
}

fn linux(errno: policy::Errno) -> Errno {
    Errno(match errno {
        policy::Errno::Einval => libc::EINVAL,
        policy::Errno::Eperm => libc::EPERM,
        policy::Errno::Eacces => libc::EACCES,
        policy::Errno::Enodev => libc::ENODEV,
        policy::Errno::Eopnotsupp => libc::EOPNOTSUPP,
        policy::Errno::Enoent => libc::ENOENT,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_asks_about_named_nodes_and_kills_nobody() {
        let returns: Vec<u32> =
            program().unwrap().iter().filter(|step| step.code == RETURN).map(|step| step.k).collect();
        assert!(returns.contains(&seccomp::RET_ASK) && returns.contains(&libc::SECCOMP_RET_ALLOW));
        assert!(returns.iter().all(|&word| word == seccomp::RET_ASK || word == libc::SECCOMP_RET_ALLOW));
    }

    #[test]
    fn a_mask_is_read_and_written_as_the_kernel_takes_it() {
        let list = |text| NodeMask::parse(text, NodeMask::EMPTY).unwrap();
        let bytes = bytes_of(&list("0-2,64"), 129).unwrap();
        assert_eq!(bytes.len(), 16);
        assert_eq!(mask_of(&bytes, 129), list("0-2,64"));
        assert_eq!(mask_of(&bytes, 3), list("0-1"), "the kernel takes one bit fewer than it is told");
        assert_eq!(bytes_of(&list("2"), 3), None);
        assert_eq!((words(0), words(1), words(2), words(65), words(66), words(u64::MAX)), (0, 0, 1, 1, 2, WORDS));
    }
}
