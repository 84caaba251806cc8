//! Proc: small questions about other processes (proc(5), pidfd_open(2)).

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

/// Ancestors that are asked for one process.
pub const MAX_DEPTH: usize = 1024;

/// Whether the process of `pidfd` has ended.
pub fn has_exited(pidfd: &OwnedFd) -> bool {
    let mut entry = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut entry, Some(&at_once)), Ok(1))
}

/// Whether the other end of `socket` is closed by all who had it.
pub fn has_hung_up(socket: &OwnedFd) -> bool {
    let mut entry = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::empty())];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut entry, Some(&at_once)), Ok(1)) && entry[0].revents().contains(PollFlags::HUP)
}

/// Reads which executable `pid` runs; none once it is exiting.
pub fn read_image(pid: u32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// Reads whether `pid` has the file `path` mapped. O(mappings).
pub fn has_mapped(pid: u32, path: &Path) -> bool {
    let text = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    text.split(|byte| *byte == b'\n').any(|line| line.ends_with(path.as_os_str().as_bytes()))
}

/// Reads whether `pid` has the character device of this number mapped shared, by whichever file. O(mappings); false where this user may not look.
pub fn has_device_mapped(pid: u32, device: u64) -> bool {
    let text = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().any(|line| {
        let mut words = line.splitn(6, ' ');
        let (Some(range), Some(rights), Some(path)) = (words.next(), words.next(), words.nth(3)) else {
            return false;
        };
        let path = path.trim_start();
        // The first takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, the second a file that is still there.
        let ways = [format!("/proc/{pid}/map_files/{range}"), format!("/proc/{pid}/root{path}")];
        rights.ends_with('s') && path.starts_with('/') && ways.iter().any(|path| is_device(path, device))
    })
}

fn is_device(path: &str, device: u64) -> bool {
    // Whoever serves the file's file system is not asked: he could keep us waiting.
    let seen = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE);
    seen.is_ok_and(|seen| {
        FileType::from_raw_mode(seen.stx_mode.into()) == FileType::CharacterDevice
            && rustix::fs::makedev(seen.stx_rdev_major, seen.stx_rdev_minor) == device
    })
}

/// Reads which pid namespace `pid` is in.
///
/// # Errors
/// It has ended, or is another's.
pub fn read_pid_namespace(pid: u32) -> std::io::Result<u64> {
    Ok(std::fs::metadata(format!("/proc/{pid}/ns/pid"))?.ino())
}

/// Reads the state of `pid`: `R`, `S`, `T` (stopped)...
pub fn read_state(pid: u32) -> Option<char> {
    fields(pid)?.chars().next()
}

/// Reads which signal has ended `pid`; none if it has not been ended by one, or whoever started it has waited for it.
pub fn read_fatal_signal(pid: u32) -> Option<i32> {
    // The last field, as wait(2) has it.
    let status: i32 = fields(pid)?.trim().rsplit(' ').next()?.parse().ok()?;
    Some(status & 0x7f).filter(|&signal| signal != 0)
}

/// Reads who started `pid`, or adopted it.
pub fn read_parent(pid: u32) -> Option<u32> {
    fields(pid)?.split(' ').nth(1)?.parse().ok()
}

/// Collects the processes that the threads of `pid` have started, or adopted, and that have not been waited for. None where
/// the kernel does not tell (CONFIG_PROC_CHILDREN).
pub fn collect_children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let texts = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    texts
        .flat_map(|text| text.split_whitespace().filter_map(|word| word.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// What follows the name in `/proc/PID/stat`; the name may hold anything, parentheses too.
fn fields(pid: u32) -> Option<String> {
    let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.rsplit_once(") ").map(|(_, rest)| rest.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_among_the_children_until_it_is_waited_for() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(collect_children(std::process::id()).contains(&child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!collect_children(std::process::id()).contains(&child.id()));
    }

    #[test]
    fn what_has_ended_a_child_is_told_until_it_is_waited_for() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(read_fatal_signal(child.id()), None);
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::BUS).unwrap();
        while read_state(child.id()) != Some('Z') {}
        assert_eq!(read_fatal_signal(child.id()), Some(libc::SIGBUS));
        child.wait().unwrap();
        assert_eq!(read_fatal_signal(child.id()), None);
    }

    #[test]
    fn this_process_runs_and_has_a_parent() {
        assert_eq!(read_state(std::process::id()).map(|state| matches!(state, 'R' | 'S')), Some(true));
        assert_eq!(read_parent(std::process::id()), Some(std::os::unix::process::parent_id()));
        assert!(has_mapped(std::process::id(), &std::env::current_exe().unwrap()));
        assert!(!has_mapped(std::process::id(), Path::new("/no/such/file")));
        assert_eq!(read_image(std::process::id()), std::env::current_exe().ok());
    }
}
