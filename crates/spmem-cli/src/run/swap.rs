//! The swap files and devices of a run (`spmem_node::swapfile`): made here, divided by the agents among themselves.
//!
//! A file has no name (O_TMPFILE): it is made in the folder of the path that the configuration gives, and what is at that path is neither
//! opened nor changed. So nothing is ever overwritten, two runs never have the same one, and nothing stays behind, however a run ends. All its room
//! is allocated before the program starts, and charged to the run (R6, R12). It is read and written past the kernel's cache where the file system
//! can do that: what is there takes no RAM.
//!
//! A dax device is opened for the run alone. Its file is locked (flock(2)), for as long as a process of the run has it mapped. That tells two runs apart that
//! name the same file; a device may have several (mknod(2)). So `spm` maps a piece of it, and then looks whether another process has the device mapped,
//! by its number: of two that come at the same time at least one sees the other. What was there is written over, and what the run leaves there stays.
//!
//! Holes: who maps it later, and is no run, or where this user may not look (another pid namespace), is not
//! noticed, but by checksums. RAM below a file system (a RAM disk, the upper layer of an overlay) is not seen.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, bail};
use rustix::fs::{FallocateFlags, FlockOperation, MemfdFlags};
use rustix::process::Resource;
use spmem_core::grant::Charge;
use spmem_core::units::Bytes;
use spmem_sys::PAGE;
use spmem_sys::fd::Fd;
use spmem_sys::region::{Access, Durability, Region};

use super::targets::{Targets, Way, Wicket};
use super::{proc, shared};
use crate::audit::all_processes;
use crate::remark::remark;
use crate::size::human;

/// Files whose contents are RAM (statfs(2)): tmpfs, ramfs, hugetlbfs.
const OF_RAM: [u32; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];

/// What the agents are given.
pub struct Swap {
    ledger: OwnedFd,
    files: Vec<File>,
    /// Pieces of devices, for others to see that they are used; never touched.
    _claims: Vec<Region>,
    /// The run's part of the nodes: all of each.
    _charges: (Wicket, Vec<Charge>),
}

impl Swap {
    /// Makes the files of a run; `None` where it has none.
    ///
    /// # Errors
    /// One cannot be made, or would be RAM; the wall refuses the grant.
    pub fn make(targets: &Targets) -> anyhow::Result<Option<Self>> {
        let (mut files, mut charges, mut claims) = (Vec::new(), Vec::new(), Vec::new());
        let mut wicket = Wicket::new(targets)?;
        for (number, target) in targets.copied() {
            let charge = wicket.charge(number, target.quota);
            charges.push(charge.map_err(|errno| anyhow::anyhow!("node {}: its grant: {errno}", target.id))?);
            files.push(match &target.way {
                Way::Placed => continue,
                Way::File(path) => {
                    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                    let folder = folder.unwrap_or(Path::new("."));
                    let made = make(folder, target.quota);
                    made.with_context(|| format!("node {}: a file in {}", target.id, folder.display()))?
                }
                Way::Device { path, align, .. } => {
                    let opened = open_device(path, *align);
                    let (file, claim) =
                        opened.with_context(|| format!("node {}: {}", target.id, path.display()))?;
                    claims.push(claim);
                    file
                }
            });
        }
        if files.is_empty() {
            return Ok(None);
        }
        let ledger = rustix::fs::memfd_create("spmem-ledger", MemfdFlags::CLOEXEC).context("no memfd")?;
        Ok(Some(Self { ledger, files, _claims: claims, _charges: (wicket, charges) }))
    }

    /// The ledger, opened once more: for one process.
    ///
    /// # Errors
    /// No descriptor is left, or there is no /proc.
    pub fn open_ledger(&self) -> std::io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.ledger));
        OpenOptions::new().read(true).write(true).open(path).map(OwnedFd::from)
    }

    /// The files, in the order of their targets.
    pub fn files(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.files.iter().map(AsFd::as_fd)
    }
}

/// A dax device that nobody else uses, and the piece of it by which others see that we do.
fn open_device(path: &Path, align: u64) -> anyhow::Result<(File, Region)> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            bail!("another run of spm uses it, or what is left of one; a run needs a device of its own")
        }
        Err(error) => return Err(error).context("it cannot be locked"),
    }
    let device = file.metadata()?.rdev();
    let (fd, align) = (Fd::from_raw(file.try_clone()?.into_raw_fd()), usize::try_from(align)?);
    let claim = Region::of_device(fd, align, align, Access::Read, Durability::Volatile);
    let claim = claim.map_err(|errno| anyhow::anyhow!("it cannot be mapped: {errno}"))?;
    // A keeper of ours that outlives the run by a moment would stand in the next one's way.
    claim.keep_from_children().map_err(|errno| anyhow::anyhow!("it cannot be claimed: {errno}"))?;
    let is_others = |pid: &u32| *pid != std::process::id() && proc::has_device_mapped(*pid, device);
    if let Some(pid) = all_processes()?.into_iter().find(is_others) {
        bail!("process {pid} has it mapped, by this file or another; a run needs a device of its own");
    }
    Ok((file, claim))
}

fn make(folder: &Path, quota: Bytes) -> anyhow::Result<File> {
    let folder_file = File::open(folder)?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "magic numbers have 32 bits")]
    let kind = rustix::fs::fstatfs(&folder_file)?.f_type as u32;
    if OF_RAM.contains(&kind) {
        bail!("its file system is RAM, so nothing would be saved; a folder on a disk would do");
    }
    let limit = rustix::process::getrlimit(Resource::Fsize).current;
    if limit.is_some_and(|limit| limit < quota.0) {
        bail!("RLIMIT_FSIZE is below its capacity of {}; raise it (ulimit -f)", human(quota.0));
    }
    let file = match open(folder, libc::O_DIRECT).and_then(|file| try_out(&file).map(|()| file)) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            remark(format_args!(
                "files in {} are read through the kernel's cache, which takes RAM while there is some",
                folder.display()
            ));
            open(folder, 0)?
        }
        made => made?,
    };
    match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, quota.0) {
        Ok(()) => Ok(file),
        // Where room cannot be had beforehand, a write that finds none is refused then.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(file),
        Err(error) => Err(error).with_context(|| format!("there is no room for {}", human(quota.0))),
    }
}

/// A file without a name.
fn open(folder: &Path, flags: i32) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.custom_flags(libc::O_TMPFILE | libc::O_EXCL | flags).open(folder) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)) => {}
        opened => return opened,
    }
    // Not every file system has such. One with a name that nobody has, for a moment.
    let name = shared::random().map_err(|_| std::io::Error::from(ErrorKind::Other))?;
    let path = folder.join(format!(".spm-run-{name:016x}"));
    let file = options.custom_flags(flags).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

#[repr(align(4096))]
struct Aligned([u8; PAGE]);

/// Whether whole pages can be written and read past the cache.
fn try_out(file: &File) -> std::io::Result<()> {
    let mut page = Aligned([0; PAGE]);
    file.write_all_at(&page.0, 0)?;
    file.read_exact_at(&mut page.0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_no_name_and_all_its_room_and_leaves_what_is_there_alone() {
        // Beside this test, which is on a disk where the folder for temporary files may not be.
        let here = std::env::current_exe().unwrap();
        let folder = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let there = folder.path().join("node2");
        std::fs::write(&there, "somebody's").unwrap();
        let file = make(folder.path(), Bytes::mib(4)).unwrap();
        let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!((names, std::fs::read_to_string(&there).unwrap().as_str()), (vec![there], "somebody's"));
        assert_eq!(file.metadata().unwrap().len(), 4 << 20);
    }

    #[test]
    fn a_folder_that_is_ram_is_refused() {
        let shm = Path::new("/dev/shm");
        if !shm.exists() {
            println!("SKIPPED: no /dev/shm");
            return;
        }
        let error = make(shm, Bytes::mib(4)).unwrap_err().to_string();
        assert!(error.contains("is RAM"), "{error}");
    }
}
