//! Orphans: memory that is in use although the process that served it has ended (R22).
//!
//! A child that shares the address space (vfork(2), clone(2) with CLONE_VM) may outlive its creator, whose agent's threads end
//! with it. The compressed pages are then beyond reach. As long as somebody holds the userfaultfd, who touches such a page
//! waits; without a holder the kernel would give zeros. So `spm` holds it until nobody uses the memory any more, and answers
//! each fault by poisoning the page: the toucher gets SIGBUS (EFAULT in a system call). That is safe for certain: it takes
//! no list of ranges and no guess which processes share the memory, since the fault itself says where, and it harms nobody
//! who does not need what is lost. A page that was never touched gets SIGBUS too: from outside nothing tells it from a lost one.
//!
//! Likewise a forked child whose parent is killed before it can serve itself, or, if it was made by a raw system call, before it
//! has been given all its pages.
//!
//! [`Orphans::leave`] gives what is left to a process of its own when `spm` ends.
//! Hole: descendants that outlive `spm` have nobody who would do this for them later.

use std::time::Duration;

use spmem_sys::PAGE;
use spmem_sys::fd::Fd;
use spmem_sys::uffd::{Event, Uffd};

use crate::remark::remark;

/// How often the process that [`Orphans::leave`] starts looks.
const TICK: Duration = Duration::from_millis(20);

/// Addresses that programs fault at, as far as the kernel takes them in a range (`validate_range` in mm/userfaultfd.c).
const LOWEST: usize = 1 << 20;
const HIGHEST: usize = (1 << 47) - PAGE;

/// All memory of that kind.
#[derive(Default)]
pub struct Orphans {
    list: Vec<Orphan>,
}

struct Orphan {
    /// Whose memory it was.
    pid: u32,
    userfault: Uffd,
    /// Its threads are gone for certain: events are ours to read. Those of a live agent never are.
    is_unserved: bool,
    is_told: bool,
}

impl Orphans {
    /// Holds what the process `pid` leaves, unless nobody uses its memory any more. With `is_unserved` no thread of an
    /// agent can be there to read the events.
    pub fn take(&mut self, pid: u32, userfaults: impl IntoIterator<Item = Uffd>, is_unserved: bool) {
        for userfault in userfaults.into_iter().filter(Uffd::has_users) {
            self.add(Orphan { pid, userfault, is_unserved, is_told: false });
        }
    }

    /// Answers from now on for a child of the living process `pid`, which has given it up and has said so.
    pub fn take_condemned(&mut self, pid: u32, userfault: Uffd) {
        self.add(Orphan { pid, userfault, is_unserved: true, is_told: true });
    }

    fn add(&mut self, orphan: Orphan) {
        if orphan.is_unserved {
            // What was read before its reader was killed is not read again: who waits is to fault anew.
            let _ = orphan.userfault.wake(LOWEST, HIGHEST - LOWEST);
        }
        self.list.push(orphan);
    }

    /// Answers those that wait for a page, and drops what nobody uses any more. Never waits.
    pub fn sweep(&mut self) {
        let mut children = Vec::new();
        for orphan in self.list.iter_mut().filter(|orphan| orphan.is_unserved) {
            orphan.answer(&mut children);
        }
        self.list.append(&mut children);
        self.list.retain(|orphan| orphan.userfault.has_users());
    }

    /// `spm` is about to end: what is still used goes to a process of its own, which ends with the last user.
    #[allow(unsafe_code, reason = "fork")]
    pub fn leave(mut self) {
        self.sweep();
        if self.list.is_empty() {
            return;
        }
        // SAFETY: the child makes system calls and allocates, which the C library allows there, and never returns.
        if unsafe { libc::fork() } == 0 {
            self.keep();
        }
    }

    #[allow(unsafe_code, reason = "descriptors are closed, and the process ends here")]
    fn keep(mut self) -> ! {
        // It must not hang on to what belongs to spm: session, directory, pipes. Its remarks still go to stderr, which those
        // whom they are about have open, too.
        let _ = rustix::process::setsid();
        let _ = rustix::process::chdir("/");
        let _ = rustix::thread::set_name(c"spm-orphans");
        let mut kept: Vec<i32> = self.list.iter().map(|orphan| orphan.userfault.raw()).collect();
        kept.extend([2, i32::MAX]);
        kept.sort_unstable();
        let mut first = 0;
        for number in kept {
            if number > first {
                // SAFETY: closes what nothing here uses from now on.
                unsafe { libc::close_range(first.cast_unsigned(), (number - 1).cast_unsigned(), 0) };
            }
            first = number.saturating_add(1);
        }
        while !self.list.is_empty() {
            std::thread::sleep(TICK);
            self.sweep();
        }
        // SAFETY: ends the process without running what belongs to spm.
        unsafe { libc::_exit(0) }
    }
}

impl Orphan {
    fn answer(&mut self, children: &mut Vec<Self>) {
        loop {
            match self.userfault.read() {
                // The page is there, and nobody keeps it from being written any more.
                Ok(Event::Fault { address, is_fenced: true, .. }) => {
                    let _ = self.userfault.lift_fence(address & !(PAGE - 1), PAGE);
                }
                Ok(Event::Fault { address, tid, .. }) => {
                    let page = address & !(PAGE - 1);
                    if self.userfault.poison(page).stopped.is_some() {
                        // Unmapped, present after all, or an event comes first: it tries again and tells.
                        let _ = self.userfault.wake(page, PAGE);
                    }
                    self.tell(tid);
                }
                // It has the same pages missing, and nobody else serves it.
                Ok(Event::Fork { child }) => children.push(Self {
                    pid: self.pid,
                    userfault: Uffd::from_fd(Fd::from_raw(child)),
                    is_unserved: true,
                    is_told: self.is_told,
                }),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    fn tell(&mut self, tid: u32) {
        let pid = self.pid;
        // The process itself, about to execute another program, leaves nobody behind.
        if self.is_told || std::path::Path::new(&format!("/proc/{pid}/task/{tid}")).exists() {
            return;
        }
        self.is_told = true;
        remark(format_args!(
            "process {pid} has ended while process {tid} still used its memory (vfork, or clone with CLONE_VM) or had \
             not got all of its own (fork); what lay on node 1 is lost, and who touches it gets SIGBUS"
        ));
    }
}
