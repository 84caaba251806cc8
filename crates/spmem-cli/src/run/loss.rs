//! Loss: what has ended a process because an agent was in it, told by `spm`: the process itself could not. Memory that has failed, and seccomp
//! filters.
//!
//! Hole: of a process whose parent has waited for it by then nothing is known.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use spmem::control::{Control, Slot};

use super::proc;
use crate::remark::remark;

/// How long to wait for the last thread of a process that is ending, ms, where it matters: it gives the memory back.
const FAREWELL_MS: u32 = 1000;

/// Tells of a seccomp filter that has ended a managed process: perhaps for what its agent did. The command itself is left to who waits for it.
pub fn tell_of_filter(pid: u32) {
    if proc::read_fatal_signal(pid) == Some(libc::SIGSYS) && proc::read_parent(pid) != Some(std::process::id()) {
        remark(format_args!("{}", filtered(pid)));
    }
}

/// What is said of a managed process that SIGSYS has ended, before it is waited for.
pub fn filtered(pid: u32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!(
        "process {pid} ({}): SIGSYS has ended it: a seccomp filter of its own did not let a call through, perhaps one that its agent has made; let \
         through what README.md lists (Limits), put the filter on without SECCOMP_FILTER_FLAG_TSYNC, or run it without spm",
        name.trim_end()
    )
}

/// Tells of memory that has failed, if that has ended a process: its agent had to do with what lies there. Before it is waited for.
pub fn tell_of_loss(control: &Control, pid: u32, pidfd: &OwnedFd) {
    let Some(slot) = control.live_slots().find(|slot| slot.pid.load(Relaxed) == pid) else { return };
    if slot.reading.load(Relaxed) == 0 {
        return;
    }
    // Its threads end one by one; only then is it known what ended it.
    for _ in 0..FAREWELL_MS {
        if proc::has_exited(pidfd) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if proc::read_fatal_signal(pid) == Some(libc::SIGBUS) {
        remark(format_args!("{}", loss(slot)));
    }
}

fn loss(slot: &Slot) -> String {
    let [pid, node] = [&slot.pid, &slot.reading_node].map(|number| number.load(Relaxed));
    let page = slot.reading.load(Relaxed);
    let place = if node == 0 { "a node that is not known".to_owned() } else { format!("node {node}") };
    format!(
        "process {pid}: page {page:#x} is lost, and the process with it: SIGBUS has ended it while its agent had to do with what \
         is stored of that page on {place}, as happens where memory has failed"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::ControlPage;

    #[test]
    fn a_loss_names_the_node_that_the_page_was_on() {
        let control = ControlPage::for_tree(None, 0).unwrap();
        let slot = &control.slots[control.claim_slot(77).unwrap().0];
        slot.reading.store(0x7000, Relaxed);
        for (node, place) in [(1, "on node 1,"), (9, "on node 9,"), (0, "on a node that is not known,")] {
            slot.reading_node.store(node, Relaxed);
            let said = loss(slot);
            assert!(said.starts_with("process 77: page 0x7000 is lost") && said.contains(place), "{said}");
        }
    }
}
