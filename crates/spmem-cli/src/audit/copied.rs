//! Copied: what `spm run` has copied from a process to node 1, to files and to dax devices, which no numa_maps shows.
//!
//! The process maps the control page of its run (`spmem::control`), where its agent keeps count a few times a second.
//! [`copied_pages`] opens that through /proc/PID/map_files, which takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
//!
//! Known holes: the processes of a run can write what they like there, and anybody can make a page that looks like one: then no `spm` tells of a
//! grant for it, as when the run's has ended. After a fork both sides count what is still the same.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{bail, ensure};
use spmem::control::Slot;
use spmem_sys::PAGE;

use super::maps::Memfds;
use super::pages::{By, Pages};
use super::rolls::{Process, Rolls};
use crate::run::{ControlPage, read_pid_namespace};

/// The control page, as /proc/PID/maps has it.
pub const CONTROL: &str = "/memfd:spmem-control (deleted)";

/// What runs of spm have copied from the process, by node as their configuration numbers it, and by which grant; nothing where it is in none. `maps` is its
/// /proc/PID/maps. A run inside a run has two control pages.
///
/// # Errors
/// The control page cannot be opened, another version of spm has made it, or neither the process nor this one is in its pid namespace.
pub fn copied_pages(
    process: &Process,
    maps: &str,
    memfds: &Memfds,
    rolls: &Rolls,
) -> anyhow::Result<Vec<(Pages, By)>> {
    let (mut found, thread) = (Vec::new(), process.thread);
    for control in memfds.named(maps, CONTROL) {
        let path = format!("/proc/{thread}/map_files/{}", control.place);
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            // The process has ended, or runs another program.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                bail!("that takes root with CAP_SYS_ADMIN")
            }
            opened => opened?,
        };
        let page = ControlPage::of_other_run(file)?;
        let (Ok(status), Ok(namespace)) = (super::read(thread, "status"), read_pid_namespace(thread)) else {
            continue;
        };
        let of_run = page.pid_namespace.load(Relaxed);
        let own = if read_pid_namespace(std::process::id()).is_ok_and(|own| own == of_run) {
            process.pid
        } else {
            ensure!(
                namespace == of_run,
                "it is in another pid namespace than the run's spm, by whose numbers that counts, and so is this audit"
            );
            pid_within(&status).unwrap_or(process.pid)
        };
        if let Some(slot) = page.live_slots().find(|slot| slot.pid.load(Relaxed) == own) {
            let by = |pages: &Pages| By::run(rolls.of_copied(process, control.inode, pages.node));
            found.extend(of_slot(&page, slot).into_iter().map(|pages| (pages, by(&pages))));
        }
    }
    Ok(found)
}

/// The number of a process in its own pid namespace, by which its agent knows it: of `status`, its /proc/PID/status.
fn pid_within(status: &str) -> Option<u32> {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NStgid:"))?;
    numbers.split_whitespace().next_back()?.parse().ok()
}

fn of_slot(page: &ControlPage, slot: &Slot) -> Vec<Pages> {
    let of = |node, kind, held: u64, bytes| Pages { node, kind, pages: held / PAGE as u64, bytes };
    let node1 = of(1, "compressed", slot.stored_bytes.load(Relaxed), slot.store_used_bytes.load(Relaxed));
    // What is placed on the kernel's nodes the kernel tells.
    let targets = page.targets().zip(&slot.placed_bytes).filter(|(target, _)| target.is_swap());
    let copied = targets.map(|(target, bytes)| {
        let bytes = bytes.load(Relaxed);
        of(target.id.load(Relaxed), target.kind(), bytes, bytes)
    });
    std::iter::once(node1).chain(copied).filter(|pages| pages.pages > 0 || pages.bytes > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use spmem::control;

    /// A control page of this process, and the lines of its maps that are about it: other tests have such pages, too.
    fn control_page() -> (ControlPage, String) {
        let page = ControlPage::for_tree(None, 0).unwrap();
        let start = format!("{:x}-", std::ptr::from_ref(&*page).addr());
        let maps = super::super::read(std::process::id(), "maps").unwrap();
        let line = maps.lines().find(|line| line.starts_with(&start)).unwrap().to_owned();
        (page, line)
    }

    /// By nobody's word.
    fn copied(maps: &str) -> anyhow::Result<Vec<Pages>> {
        let process = Process::read(std::process::id())?;
        let copied = copied_pages(&process, maps, &Memfds::find()?, &Rolls::default())?;
        assert!(copied.iter().all(|(_, by)| *by == By::run(None)));
        Ok(copied.into_iter().map(|(pages, _)| pages).collect())
    }

    fn may_open(maps: &str) -> bool {
        let range = maps.split(' ').next().unwrap();
        let is_allowed = std::fs::File::open(format!("/proc/self/map_files/{range}")).is_ok();
        if !is_allowed {
            println!("SKIPPED: what others map cannot be opened here");
        }
        is_allowed
    }

    #[test]
    fn a_process_has_what_its_slot_says_and_what_the_kernel_tells_is_not_told_twice() {
        let (page, maps) = control_page();
        if !may_open(&maps) {
            return;
        }
        let pid = std::process::id();
        assert_eq!(copied(&maps).unwrap(), []);
        for (id, clusters, align) in [(3, 0, 0), (2, 8, 0), (7, 8, 2 << 20)] {
            let target = page.targets().count();
            page.targets[target].id.store(id, Relaxed);
            page.targets[target].clusters.store(clusters, Relaxed);
            page.targets[target].align.store(align, Relaxed);
            page.targets[target].quota_bytes.store(16 << 20, Relaxed);
        }
        let (other, _) = page.claim_slot(pid + 1).unwrap();
        let (own, _) = page.claim_slot(pid_within(&super::super::read(pid, "status").unwrap()).unwrap()).unwrap();
        page.slots[other].stored_bytes.store(1 << 20, Relaxed);
        page.slots[own].stored_bytes.store(8 * 4096, Relaxed);
        page.slots[own].store_used_bytes.store(3 * 4096, Relaxed);
        for (to, bytes) in page.slots[own].placed_bytes.iter().zip([4096, 2 * 4096, 3 * 4096]) {
            to.store(bytes, Relaxed);
        }
        let expected = [
            Pages { node: 1, kind: "compressed", pages: 8, bytes: 3 * 4096 },
            Pages { node: 2, kind: "file", pages: 2, bytes: 2 * 4096 },
            Pages { node: 7, kind: "dax", pages: 3, bytes: 3 * 4096 },
        ];
        assert_eq!(copied(&maps).unwrap(), expected);
        // The same file, mapped in two pieces.
        assert_eq!(copied(&format!("{maps}\n{maps}")).unwrap(), expected);
    }

    #[test]
    fn a_control_page_of_another_namespace_or_layout_is_refused() {
        let (page, maps) = control_page();
        if !may_open(&maps) {
            return;
        }
        page.pid_namespace.store(1, Relaxed);
        let error = copied(&maps).unwrap_err().to_string();
        assert!(error.contains("another pid namespace"), "{error}");
        page.magic.store(control::MAGIC + 1, Relaxed);
        let error = copied(&maps).unwrap_err().to_string();
        assert!(error.contains("another version"), "{error}");
        page.magic.store(0, Relaxed);
        let error = copied(&maps).unwrap_err().to_string();
        assert!(error.contains("no control page"), "{error}");
    }

    #[test]
    fn a_file_that_is_called_like_a_control_page_is_not_opened() {
        let line = "7f00-7f10 rw-s 00000000 fe:01 3006                       /memfd:spmem-control (deleted)\n";
        assert_eq!(Memfds::find().unwrap().named(line, CONTROL), []);
    }

    #[test]
    fn a_process_is_known_by_its_number_in_its_own_namespace() {
        assert_eq!(pid_within("Pid:\t301\nNStgid:\t300\t17\t1\nNSpid:\t301\t18\t2\n"), Some(1));
        assert_eq!(pid_within("Pid:\t300\n"), None);
    }
}
