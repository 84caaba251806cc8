//! Agent file: puts the embedded agent where the dynamic loader of every child can read it.
//!
//! [`install`] gives the path. The directory is world-readable and may have been made by somebody else, so nothing in
//! it is trusted: owner and mode are checked, the bytes are compared at every start, and a file is only ever replaced
//! by rename. Hole: a child in another mount namespace or root directory does not see the path and runs unmanaged.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::bail;
use rustix::fs::StatVfsMountFlags;

/// The agent's object file.
static AGENT: &[u8] = include_bytes!(env!("SPMEM_AGENT_OBJECT"));
/// Names it; a new build gets a new name, programs that run keep their old one.
const NAME: &str = concat!("agent-", env!("SPMEM_AGENT_HASH"), ".so");
/// Where directories are tried, in this order. Not below `$XDG_RUNTIME_DIR`: children of other users cannot read it.
const ROOTS: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];
/// Directory names tried in each root, in case somebody else took the first.
const NAMES_EACH: u32 = 4;

/// Makes sure that the agent lies in a file that only we can change, and gives its path.
///
/// # Errors
/// No directory of [`ROOTS`] will do; the message says why for each.
pub fn install() -> anyhow::Result<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let mut reasons = Vec::new();
    for root in ROOTS {
        for attempt in 0..NAMES_EACH {
            let name = if attempt == 0 { format!("spmem-{uid}") } else { format!("spmem-{uid}-{attempt}") };
            let directory = Path::new(root).join(name);
            match install_in(&directory, uid) {
                Ok(path) => return Ok(path),
                Err(reason) => reasons.push(format!("{}: {reason}", directory.display())),
            }
        }
    }
    bail!("the agent cannot be put where programs would load it; make one of these usable: {}", reasons.join("; "))
}

fn install_in(directory: &Path, uid: u32) -> io::Result<PathBuf> {
    match DirBuilder::new().mode(0o755).create(directory) {
        // The umask may have taken rights away.
        Ok(()) => fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let metadata = fs::symlink_metadata(directory)?;
    if !metadata.is_dir() || metadata.uid() != uid || metadata.mode() & 0o777 != 0o755 {
        return Err(refusal("is not a directory of ours with mode 0755"));
    }
    if rustix::fs::statvfs(directory)?.f_flag.contains(StatVfsMountFlags::NOEXEC) {
        return Err(refusal("is mounted noexec"));
    }
    let path = directory.join(NAME);
    if !is_intact(&path, uid) {
        write(directory, &path)?;
    }
    Ok(path)
}

fn is_intact(path: &Path, uid: u32) -> bool {
    let open = || -> io::Result<bool> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
        let metadata = file.metadata()?;
        let is_ours = metadata.is_file() && metadata.uid() == uid && metadata.mode() & 0o777 == 0o755;
        Ok(is_ours && metadata.len() == AGENT.len() as u64 && holds_agent(file)?)
    };
    open().unwrap_or(false)
}

fn holds_agent(file: File) -> io::Result<bool> {
    let mut bytes = Vec::with_capacity(AGENT.len());
    file.take(AGENT.len() as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes == AGENT)
}

fn write(directory: &Path, path: &Path) -> io::Result<()> {
    let temporary = directory.join(format!(".{NAME}.{}", std::process::id()));
    let written = write_new(&temporary).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // Somebody's leftover of the same process id, or ours.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn write_new(path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(AGENT)?;
    file.set_permissions(fs::Permissions::from_mode(0o755))
}

fn refusal(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    #[test]
    fn the_file_is_written_once_and_repaired_when_changed() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("d");
        let path = install_in(&directory, uid()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), AGENT);
        let inode = fs::metadata(&path).unwrap().ino();
        assert_eq!(fs::metadata(install_in(&directory, uid()).unwrap()).unwrap().ino(), inode);
        let mut changed = AGENT.to_vec();
        changed[AGENT.len() / 2] ^= 1;
        fs::write(&path, changed).unwrap();
        assert_eq!(fs::read(install_in(&directory, uid()).unwrap()).unwrap(), AGENT);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        install_in(&directory, uid()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o755);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn a_directory_that_others_could_change_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let open = root.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(install_in(&open, uid()).is_err());
        let link = root.path().join("link");
        std::os::unix::fs::symlink(root.path(), &link).unwrap();
        assert!(install_in(&link, uid()).is_err());
        let own = root.path().join("own");
        fs::create_dir(&own).unwrap();
        assert!(install_in(&own, uid() + 1).is_err());
    }

    #[test]
    fn a_link_in_place_of_the_file_is_replaced_and_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("d");
        let path = install_in(&directory, uid()).unwrap();
        let victim = root.path().join("victim");
        fs::write(&victim, AGENT).unwrap();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        install_in(&directory, uid()).unwrap();
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
    }
}
