//! The porter of a run (`spmem::porter`): a process outside of the run's wall, which has the grant for its mapped nodes.
//!
//! [`Porter::start`] forks it before the wall is raised, as the keeper is. Every page is admitted and charged ([`Wicket`], R6, R12). A
//! thread of it serves each managed process. It ends with `spm`; the programs then go on with the compressed node.
//!
//! Holes: what a process has is its agent's word in the control page; pages that a forked child shares are charged to its parent alone.
#![allow(unsafe_code, reason = "ends a forked process without running what belongs to its parent")]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use anyhow::{Context, ensure};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use spmem::control::{Control, porter as porter_state};
use spmem::porter::{self, Crossing, Desk};
use spmem_core::grant::Charge;
use spmem_core::placing::{ALLOTMENT, Allotment, MAX_TARGETS, allotment, leaves_room};
use spmem_core::units::{Bytes, NodeId, PAGE_SIZE};
use spmem_node::machine::read_room;
use spmem_sys::fd::Fd;
use spmem_sys::mempolicy::{MPOL_F_STATIC_NODES, MPOL_PREFERRED, mask, set_policy};
use spmem_sys::uffd::Uffd;
use spmem_sys::{Errno, Result};

use super::proc;
use super::shared::{ControlPage, Shared};
use super::targets::{Targets, Wicket};
use crate::apart;
use crate::remark::remark;

/// The porter, as `spm` sees it. It ends when this is dropped.
pub struct Porter {
    channel: OwnedFd,
    pid: u32,
}

/// A process's porter. It ends when this is dropped.
pub struct Service {
    crossing: Shared<Crossing>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.crossing.end();
    }
}

impl Service {
    /// What the process maps to talk to it.
    pub fn crossing(&self) -> &Shared<Crossing> {
        &self.crossing
    }
}

/// Bytes of an order: the process and where its staging area is.
const ORDER: usize = 16;

impl Porter {
    /// Starts it; the caller must have one thread, and be outside of the wall.
    ///
    /// # Errors
    /// No process, no descriptors; the wall in core refuses the grant.
    pub fn start(targets: &Targets, control: &ControlPage) -> anyhow::Result<Self> {
        let (ours, its) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .context("no socket for the porter")?;
        let wicket = Wicket::new(targets)?;
        apart::start("the porter", || {
            apart::settle(c"spm-porter", &[its.as_raw_fd()]);
            let _ = rustix::io::write(&its, &std::process::id().to_ne_bytes());
            carry(&its, control, Arc::new(Mutex::new(wicket)));
            // SAFETY: ends the process without running what belongs to the one it was forked from.
            unsafe { libc::_exit(0) }
        })?;
        drop(its);
        let mut pid = [0; 4];
        let read = rustix::io::read(&ours, &mut pid).context("the porter")?;
        ensure!(read == pid.len(), "the porter has ended");
        Ok(Self { channel: ours, pid: u32::from_ne_bytes(pid) })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Takes note of what becomes of it, in the control page, and says so on stderr, once each.
    pub fn watch(&self, control: &Control) {
        let seen = match proc::has_hung_up(&self.channel) {
            true => porter_state::HAS_ENDED,
            // Of a process that has ended a moment ago another may have the number.
            false if matches!(proc::read_state(self.pid), Some('T' | 't')) => porter_state::WAS_STOPPED,
            false => porter_state::WORKS,
        };
        if control.porter.fetch_max(seen, Relaxed) >= seen || seen == porter_state::WORKS {
            return;
        }
        let nodes: Vec<String> = control
            .targets()
            .filter(|target| !target.is_swap())
            .map(|target| target.id.load(Relaxed).to_string())
            .collect();
        let (pid, nodes) = (self.pid, nodes.join(", "));
        if seen == porter_state::HAS_ENDED {
            remark(format_args!(
                "the porter (process {pid}) has been ended: no page goes to node {nodes} any more, cold ones go elsewhere; what is \
                 there stays"
            ));
        } else {
            remark(format_args!(
                "the porter (process {pid}) is stopped: until it goes on no page goes to node {nodes}, cold ones go elsewhere"
            ));
        }
    }

    /// Has a process's pages carried to its staging area: `memory` is its /proc/PID/mem, `userfault` what `staging` is registered with.
    ///
    /// # Errors
    /// The porter is gone, or busy; descriptors or memory are short.
    pub fn serve(&self, pid: u32, staging: u64, memory: &OwnedFd, userfault: &OwnedFd) -> anyhow::Result<Service> {
        let crossing: Shared<Crossing> = Shared::create("spmem-crossing")?;
        let mut order = [0; ORDER];
        order[..4].copy_from_slice(&pid.to_ne_bytes());
        order[8..].copy_from_slice(&staging.to_ne_bytes());
        let fds = [crossing.as_fd(), memory.as_fd(), userfault.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(&self.channel, &[IoSlice::new(&order)], &mut ancillary, flags).context("the porter")?;
        Ok(Service { crossing })
    }
}

/// The porter's life.
fn carry(channel: &OwnedFd, control: &ControlPage, wicket: Arc<Mutex<Wicket>>) {
    spmem_sys::clock::find();
    // SAFETY: this process ends without leaving this function's caller, so the mapping outlives all its threads.
    let control: &'static Control = unsafe { &*std::ptr::from_ref::<Control>(control) };
    while let Some((pid, staging, [crossing, memory, userfault])) = receive(channel.as_fd()) {
        let Ok(crossing) = Shared::<Crossing>::open(crossing) else { continue };
        let memory = Fd::from_raw(memory.into_raw_fd());
        let userfault = Uffd::from_fd(Fd::from_raw(userfault.into_raw_fd()));
        let mut counter =
            Counter { pid, control, wicket: Arc::clone(&wicket), charges: Default::default(), bound: None };
        let work = move || porter::serve(&crossing, &memory, (&userfault, staging), &mut counter);
        // Without a thread nobody answers, and the process does without.
        let _ = std::thread::Builder::new().name("spm-porter".into()).spawn(work);
    }
}

fn receive(channel: BorrowedFd<'_>) -> Option<(u32, usize, [OwnedFd; 3])> {
    loop {
        let mut order = [0; ORDER];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(channel, &mut [IoSliceMut::new(&mut order)], &mut ancillary, flags) {
            Err(rustix::io::Errno::INTR) => continue,
            received => received.ok()?,
        };
        if received.bytes == 0 {
            return None;
        }
        let fds: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        let pid = u32::from_ne_bytes(order[..4].try_into().ok()?);
        let staging = u64::from_ne_bytes(order[8..].try_into().ok()?);
        if let Ok(fds) = <[OwnedFd; 3]>::try_from(fds) {
            return Some((pid, usize::try_from(staging).ok()?, fds));
        }
    }
}

/// Where one process's pages are let through.
struct Counter {
    pid: u32,
    control: &'static Control,
    wicket: Arc<Mutex<Wicket>>,
    charges: [Vec<Charge>; MAX_TARGETS],
    /// The target that this thread's policy prefers.
    bound: Option<usize>,
}

impl Counter {
    /// Charges what `wanted` bytes more take, or gives back what is not needed.
    fn settle(&mut self, target: usize, wanted: Bytes) -> Result<()> {
        let slot = self.control.live_slots().find(|slot| slot.pid.load(Relaxed) == self.pid);
        let placed = Bytes(slot.map_or(0, |slot| slot.placed_bytes[target].load(Relaxed)));
        let charges = &mut self.charges[target];
        loop {
            let charged = Bytes(charges.len() as u64 * ALLOTMENT.0);
            let Ok(mut wicket) = self.wicket.lock() else { return Err(Errno(libc::EIO)) };
            match allotment(charged, placed, wanted) {
                Allotment::Covered => return Ok(()),
                Allotment::Charge => charges.push(wicket.charge(target, ALLOTMENT)?),
                Allotment::GiveBack => charges.pop().into_iter().for_each(|charge| wicket.uncharge(charge)),
            }
        }
    }
}

impl Desk for Counter {
    fn admit(&mut self, target: usize, pages: usize) -> Result<()> {
        let wanted = Bytes(pages as u64 * PAGE_SIZE);
        if target >= MAX_TARGETS {
            return Err(Errno::EINVAL);
        }
        self.settle(target, wanted)?;
        let node = u16::try_from(self.control.targets[target].node.load(Relaxed)).map_err(|_| Errno::EINVAL)?;
        let id = NodeId::new(node).map_err(|_| Errno::EINVAL)?;
        let (free, total) = read_room(id).ok_or(Errno(libc::EIO))?;
        if !leaves_room(free, total, wanted) {
            return Err(Errno::ENOMEM);
        }
        if self.bound != Some(target) {
            // Not MPOL_BIND: on a full node the kernel would end whoever is bound to it. Where pages land is looked at anyway.
            set_policy(MPOL_PREFERRED | MPOL_F_STATIC_NODES, &mask([node]))?;
            self.bound = Some(target);
        }
        Ok(())
    }

    fn rest(&mut self) {
        for target in 0..MAX_TARGETS {
            let _ = self.settle(target, Bytes(0));
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        let Ok(mut wicket) = self.wicket.lock() else { return };
        self.charges.iter_mut().flat_map(|charges| charges.drain(..)).for_each(|charge| wicket.uncharge(charge));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_charged_for_what_it_has_and_all_together_no_more_than_the_quota() {
        let control: &'static ControlPage = Box::leak(Box::new(ControlPage::for_tree(None, 0).unwrap()));
        let (first, _) = control.claim_slot(11).unwrap();
        control.claim_slot(12).unwrap();
        let wicket = Wicket::new(&Targets::one_mapped(2, Bytes(3 * ALLOTMENT.0))).unwrap();
        let wicket = Arc::new(Mutex::new(wicket));
        let counter =
            |pid| Counter { pid, control, wicket: Arc::clone(&wicket), charges: Default::default(), bound: None };
        let used = || wicket.lock().unwrap().used(0);
        let (mut one, mut other) = (counter(11), counter(12));
        one.settle(0, Bytes(PAGE_SIZE)).unwrap();
        assert_eq!(used(), ALLOTMENT);
        control.slots[first].placed_bytes[0].store(2 * ALLOTMENT.0, Relaxed);
        one.settle(0, Bytes(PAGE_SIZE)).unwrap();
        assert_eq!(used(), Bytes(3 * ALLOTMENT.0));
        assert_eq!(other.settle(0, Bytes(PAGE_SIZE)), Err(Errno(libc::EDQUOT)));
        control.slots[first].placed_bytes[0].store(0, Relaxed);
        one.rest();
        assert_eq!(used(), ALLOTMENT, "what is not needed is another's");
        other.settle(0, Bytes(PAGE_SIZE)).unwrap();
        drop(one);
        assert_eq!(used(), ALLOTMENT, "a process that ends gives all back");
        drop(other);
        assert_eq!(used(), Bytes(0));
    }
}
