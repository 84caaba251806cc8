//! Policies and memory on nodes of the kernel's: set_mempolicy(2), mbind(2), and move_pages(2) to see where pages are.
//!
//! [`NodeMemory`] is memory of one node, as far as that has room. For tools: where a page lands is the kernel's decision, so
//! it is read back ([`NodeMemory::pages_elsewhere`]), never assumed.

use syscalls::{Sysno, syscall};

use crate::mapping::{Mapping, populate_write};
use crate::{Errno, PAGE, Result};

/// This node while it has room, from linux/mempolicy.h: libc has no constants for policies.
pub const MPOL_PREFERRED: usize = 1;
/// Only these nodes.
pub const MPOL_BIND: usize = 2;
/// Numbers of nodes are meant as they are, not within the caller's cpuset.
pub const MPOL_F_STATIC_NODES: usize = 1 << 15;
/// Move pages that the process has for itself.
const MPOL_MF_MOVE: usize = 1 << 1;
/// Nodes that a mask has room for, as with `CONFIG_NODES_SHIFT=10`.
const NODES: usize = 1024;
/// Of the largest page that is asked for.
const HUGE: usize = 2 << 20;
/// Pages asked for in one call.
const BATCH: usize = 512;

/// A set of nodes, as the kernel takes it: bit n of word n / 64.
pub type Mask = [u64; NODES / 64];

/// The mask of some nodes; those that no mask has room for are left out.
pub fn mask(nodes: impl IntoIterator<Item = u16>) -> Mask {
    let mut mask = [0; NODES / 64];
    for node in nodes {
        if let Some(word) = mask.get_mut(usize::from(node) / 64) {
            *word |= 1 << (node % 64);
        }
    }
    mask
}

/// Sets the calling thread's policy, also that of what it starts (set_mempolicy(2)). `mode` has its flags.
///
/// # Errors
/// As set_mempolicy(2).
pub fn set_policy(mode: usize, nodes: &Mask) -> Result<()> {
    // SAFETY: the mask is read only. The kernel takes one bit fewer than it is told.
    unsafe { syscall!(Sysno::set_mempolicy, mode, nodes.as_ptr(), NODES + 1) }?;
    Ok(())
}

/// Sets the policy of our own memory at `start` (mbind(2)). `mode` has its flags.
///
/// # Errors
/// As mbind(2).
pub fn bind_range(start: usize, len: usize, mode: usize, nodes: &Mask) -> Result<()> {
    // SAFETY: a policy changes no contents; the mask is read only.
    unsafe { syscall!(Sysno::mbind, start, len, mode, nodes.as_ptr(), NODES + 1, 0) }?;
    Ok(())
}

/// Asks for the page at `address` of process `pid` (0: our own) to be moved to `node`; where it is then, or a negative
/// errno of that page alone (move_pages(2)).
///
/// # Errors
/// As move_pages(2).
pub fn move_page(pid: u32, address: usize, node: i32) -> Result<i32> {
    let mut status = -1_i32;
    let (page, to, status_at) = (core::ptr::from_ref(&address), core::ptr::from_ref(&node), &raw mut status);
    // SAFETY: the kernel reads one address and one number and writes one; contents stay.
    unsafe { syscall!(Sysno::move_pages, pid, 1, page, to, status_at, MPOL_MF_MOVE) }?;
    Ok(status)
}

/// The node of the page at `address` of process `pid` (0: our own), or a negative errno: `-ENOENT` when there is none.
///
/// # Errors
/// As move_pages(2).
pub fn node_of(pid: u32, address: usize) -> Result<i32> {
    let mut status = -1_i32;
    let (page, status_at) = (core::ptr::from_ref(&address), &raw mut status);
    // SAFETY: without targets nothing moves; the kernel reads one address and writes one number.
    unsafe { syscall!(Sysno::move_pages, pid, 1, page, 0, status_at, 0) }?;
    Ok(status)
}

/// Writes where the pages at `addresses` of our own memory are to `nodes`: a node, or a negative errno of that page alone.
///
/// # Errors
/// As move_pages(2).
///
/// # Panics
/// When the two differ in length.
pub fn nodes_of(addresses: &[usize], nodes: &mut [i32]) -> Result<()> {
    assert!(addresses.len() == nodes.len(), "one answer a page");
    let (from, to) = (addresses.as_ptr(), nodes.as_mut_ptr());
    // SAFETY: without targets nothing moves; the kernel reads one address a page and writes one number.
    unsafe { syscall!(Sysno::move_pages, 0, addresses.len(), from, 0, to, 0) }?;
    Ok(())
}

/// Moves the pages at `addresses` of our own memory to `node`, as [`move_page`]; where each is then, or why it did not move.
///
/// # Errors
/// As move_pages(2). Then `nodes` says nothing, and some may have moved.
///
/// # Panics
/// When there are more than 64, or the two differ in length.
pub fn move_to(addresses: &[usize], node: u16, nodes: &mut [i32]) -> Result<()> {
    assert!(addresses.len() == nodes.len() && nodes.len() <= 64, "one answer a page");
    let (targets, count) = ([i32::from(node); 64], addresses.len());
    nodes.fill(-1);
    let (from, to, status) = (addresses.as_ptr(), targets.as_ptr(), nodes.as_mut_ptr());
    // SAFETY: the kernel reads one address and one number a page and writes one; contents stay.
    unsafe { syscall!(Sysno::move_pages, 0, count, from, to, status, MPOL_MF_MOVE) }?;
    Ok(())
}

/// The node of the processor that the caller runs on (getcpu(2)).
pub fn own_node() -> u16 {
    let mut node = 0_u32;
    // SAFETY: the kernel writes one number.
    let _ = unsafe { syscall!(Sysno::getcpu, 0, &raw mut node, 0) };
    u16::try_from(node).unwrap_or(0)
}

/// Moves all pages of process `pid` (0: our own) that are on `from` to `to`; how many could not be moved.
///
/// # Errors
/// As migrate_pages(2).
pub fn migrate(pid: u32, from: &Mask, to: &Mask) -> Result<usize> {
    // SAFETY: contents stay; the masks are read only.
    Ok(unsafe { syscall!(Sysno::migrate_pages, pid, NODES + 1, from.as_ptr(), to.as_ptr()) }?)
}

/// Private memory, all of it there, on one node; given back when dropped.
#[derive(Debug)]
pub struct NodeMemory {
    mapping: Mapping,
    node: u16,
}

impl NodeMemory {
    /// `len` bytes (rounded up to pages) of zeros on `node`, in huge pages where the kernel has them; what it has no room for is elsewhere. The
    /// node is preferred, not bound to: when one that is bound to is full the kernel ends processes, anybody's.
    ///
    /// # Errors
    /// `EINVAL` when there is no such node, it has no memory, or the caller's cpuset lacks it; `ENOMEM`; as mbind(2).
    pub fn new(len: usize, node: u16) -> Result<Self> {
        let mapping = Mapping::aligned(len, HUGE, c"spmem node")?;
        let (start, len) = (mapping.start(), mapping.len());
        prefer(start, len, node)?;
        // Fewer misses of the TLB, where it can be had; nothing depends on it.
        // SAFETY: advice about our own range.
        let _ = unsafe { syscall!(Sysno::madvise, start, len, libc::MADV_HUGEPAGE) };
        populate_write(start, len)?;
        Ok(Self { mapping, node })
    }

    /// The node that it was asked for.
    pub fn node(&self) -> u16 {
        self.node
    }

    /// All of it.
    pub fn words(&mut self) -> &mut [u64] {
        let len = self.mapping.len();
        let bytes = self.mapping.bytes_mut(0, len);
        // SAFETY: every bit pattern is a u64, and the other way round.
        let (before, words, after) = unsafe { bytes.align_to_mut::<u64>() };
        debug_assert!(before.is_empty() && after.is_empty(), "a mapping is pages");
        words
    }

    /// How many pages are not on the node, of how many: (0, all of them) is what was asked for.
    ///
    /// # Errors
    /// As move_pages(2).
    pub fn pages_elsewhere(&self) -> Result<(usize, usize)> {
        count_elsewhere(self.mapping.start(), self.mapping.len(), self.node)
    }
}

/// mbind(2) of a range of our own to one node, strictly.
///
/// # Errors
/// `EINVAL` when there is no such node, it has no memory, or the caller's cpuset lacks it; as mbind(2).
pub(crate) fn bind(start: usize, len: usize, node: u16) -> Result<()> {
    set_range(MPOL_BIND, start, len, node)
}

/// The same, and once the node is full pages come to be elsewhere.
pub(crate) fn prefer(start: usize, len: usize, node: u16) -> Result<()> {
    set_range(MPOL_PREFERRED, start, len, node)
}

fn set_range(mode: usize, start: usize, len: usize, node: u16) -> Result<()> {
    let mut mask = [0_u64; NODES / 64];
    *mask.get_mut(usize::from(node) / 64).ok_or(Errno::EINVAL)? = 1 << (node % 64);
    // The kernel takes one bit fewer than it is told.
    let mode = mode | MPOL_F_STATIC_NODES;
    // SAFETY: the range is ours, the mask is read only.
    unsafe { syscall!(Sysno::mbind, start, len, mode, mask.as_ptr(), NODES + 1, 0) }?;
    Ok(())
}

/// How many pages of a range of our own are not on the node, of how many.
///
/// # Errors
/// As move_pages(2).
pub(crate) fn count_elsewhere(start: usize, len: usize, node: u16) -> Result<(usize, usize)> {
    let pages = len / PAGE;
    let mut elsewhere = 0;
    for first in (0..pages).step_by(BATCH) {
        let count = BATCH.min(pages - first);
        let places: [usize; BATCH] = core::array::from_fn(|index| start + (first + index.min(count - 1)) * PAGE);
        let mut nodes = [-1_i32; BATCH];
        // No target: nothing moves, the kernel writes `count` numbers.
        let (from, to) = (places.as_ptr(), nodes.as_mut_ptr());
        // SAFETY: both arrays have room for `count`.
        unsafe { syscall!(Sysno::move_pages, 0, count, from, 0, to, 0) }?;
        elsewhere += nodes[..count].iter().filter(|&&at| at != i32::from(node)).count();
    }
    Ok((elsewhere, pages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_node_0_is_on_node_0_and_of_a_node_that_is_not_there_is_refused() {
        let mut memory = NodeMemory::new(3 * PAGE, 0).expect("every machine has node 0");
        assert_eq!(memory.words().len(), 3 * PAGE / 8);
        memory.words().fill(7);
        assert_eq!(memory.pages_elsewhere(), Ok((0, 3)));
        assert_eq!(NodeMemory::new(PAGE, 1023).map(|memory| memory.node()), Err(Errno::EINVAL));
        assert_eq!(NodeMemory::new(PAGE, 5000).map(|memory| memory.node()), Err(Errno::EINVAL));
    }

    #[test]
    fn where_pages_are_is_told_one_by_one_and_what_is_not_there_does_not_move() {
        let mut memory = Mapping::new(3 * PAGE, c"spmem test").expect("mmap");
        memory.bytes_mut(PAGE, PAGE).fill(1);
        let at = [0, 1, 2].map(|page| memory.start() + page * PAGE);
        let mut nodes = [7; 3];
        nodes_of(&at, &mut nodes).expect("move_pages");
        assert!(nodes[0] < 0 && nodes[1] >= 0 && nodes[2] < 0, "{nodes:?}");
        let node = u16::try_from(nodes[1]).expect("a node");
        move_to(&at, node, &mut nodes).expect("move_pages");
        assert!(nodes[0] < 0 && nodes[1] == i32::from(node) && nodes[2] < 0, "{nodes:?}");
        assert!(memory.bytes(PAGE, PAGE).iter().all(|&byte| byte == 1));
        assert!(own_node() < 1024);
    }

    #[test]
    fn pages_on_another_node_are_counted() {
        let memory = NodeMemory::new(2 * PAGE, 0).expect("every machine has node 0");
        let claimed = NodeMemory { node: 1, ..memory };
        assert_eq!(claimed.pages_elsewhere(), Ok((2, 2)));
    }
}
