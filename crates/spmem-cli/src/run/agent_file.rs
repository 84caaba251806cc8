//! Agent file: puts the embedded agent where the dynamic loader of every child can read it.
//!
//! [`install`] gives the path. The directory is world-readable and may have been made by somebody else, so nothing in
//! it is trusted: owner and mode are checked, the bytes are compared at every start, and a file is only ever replaced
//! by rename. Agents of other builds are removed when nobody uses them any more ([`sweep`]).
//! Holes: a child in another mount namespace or root directory does not see the path and runs unmanaged. So do programs that are
//! executed by a process that was started a day ago by another build, if it is in another pid namespace than this `spm`.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::bail;
use rustix::fs::{FlockOperation, StatVfsMountFlags};

/// The agent's object file.
static AGENT: &[u8] = include_bytes!(env!("SPMEM_AGENT_OBJECT"));
/// Names it; a new build gets a new name, programs that run keep their old one.
const NAME: &str = concat!("agent-", env!("SPMEM_AGENT_HASH"), ".so");
/// Whose turn it is to change what is there.
const LOCK: &str = "lock";
/// Where directories are tried, in this order. Not below `$XDG_RUNTIME_DIR`: children of other users cannot read it.
const ROOTS: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];
/// Directory names tried in each root, in case somebody else took the first.
const NAMES_EACH: u32 = 4;
/// An agent that no run was started with for so long is removed, unless a process still has it.
const UNUSED: Duration = Duration::from_secs(24 * 60 * 60);

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
    // A sweep and this do not cross: the file is there, and marked as used, or not looked at yet.
    let _lock = lock(directory)?;
    let path = directory.join(NAME);
    if !is_intact(&path, uid) {
        write(directory, &path)?;
    }
    // When it was used last; a sweep that fails leaves files behind, no more.
    let _ = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
    let _ = sweep(directory, Path::new("/proc"));
    Ok(path)
}

/// Waits for the directory's turn. By a file that nobody else can open: who can open one can keep its lock for ever.
fn lock(directory: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(directory.join(LOCK))?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockExclusive))?;
    Ok(file)
}

/// Removes agents of other builds that no run was started with for [`UNUSED`] and that no process has mapped or would preload
/// into what it executes. Where that cannot be told of each process, none is removed.
fn sweep(directory: &Path, proc: &Path) -> io::Result<()> {
    let mut unused = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_agent = name.as_bytes().starts_with(b"agent-") && name.as_bytes().ends_with(b".so");
        let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
        if is_agent && name != NAME && age > UNUSED {
            unused.push(entry.path());
        }
    }
    if unused.is_empty() {
        return Ok(());
    }
    for process in fs::read_dir(proc)? {
        let process = process?;
        if !process.file_name().as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        for file in ["maps", "environ"] {
            let text = match fs::read(process.path().join(file)) {
                Ok(text) => text,
                // It has ended.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => continue,
                Err(error) => return Err(error),
            };
            unused.retain(|path| {
                let name = path.file_name().unwrap_or_default().as_bytes();
                !text.windows(name.len()).any(|part| part == name)
            });
        }
    }
    unused.iter().try_for_each(fs::remove_file)
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
    fn the_agent_asks_no_program_for_a_function_of_zstds() {
        // Local symbols may be there; a weak one of the trace hooks would be taken from whatever it is loaded into.
        let name = b"ZSTD_trace_";
        assert!(!AGENT.windows(name.len()).any(|bytes| bytes == name));
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
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2, "no temporary file stays");
    }

    #[test]
    fn agents_of_other_builds_go_when_nobody_has_them_any_more() {
        let root = tempfile::tempdir().unwrap();
        let (directory, proc) = (root.path().join("d"), root.path().join("proc"));
        let own = install_in(&directory, uid()).unwrap();
        let make = |name: &str, age: Duration| {
            let path = directory.join(name);
            File::create(&path).unwrap().set_modified(SystemTime::now() - age).unwrap();
            path
        };
        let process = |pid: &str, maps: &str, environ: &str| {
            fs::create_dir_all(proc.join(pid)).unwrap();
            fs::write(proc.join(pid).join("maps"), maps).unwrap();
            fs::write(proc.join(pid).join("environ"), environ).unwrap();
        };
        let (young, mapped) = (make("agent-1.so", UNUSED / 2), make("agent-2.so", UNUSED * 2));
        let (preloaded, unused) = (make("agent-3.so", UNUSED * 2), make("agent-4.so", UNUSED * 2));
        let other = make("notes", UNUSED * 2);
        process("12", "7f00-7f01 r-xp 0 fe:00 9 /tmp/d/agent-2.so\n", "HOME=/\0");
        process("13", "", "LD_PRELOAD=/tmp/d/agent-3.so\0HOME=/\0");
        fs::create_dir_all(proc.join("sys")).unwrap();
        // What cannot be read may have any of them.
        fs::create_dir_all(proc.join("14/maps")).unwrap();
        assert!(sweep(&directory, &proc).is_err());
        assert!(unused.exists());
        fs::remove_dir_all(proc.join("14")).unwrap();
        sweep(&directory, &proc).unwrap();
        assert!([own, young, mapped, preloaded, other].iter().all(|path| path.exists()));
        assert!(!unused.exists());
    }

    #[test]
    fn nobody_else_can_keep_a_run_from_starting() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("d");
        install_in(&directory, uid()).unwrap();
        assert_eq!(fs::metadata(directory.join(LOCK)).unwrap().mode() & 0o777, 0o600);
        // What others can open they can lock.
        let others: Vec<File> = std::iter::once(directory.clone())
            .chain(fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()))
            .filter(|path| fs::metadata(path).unwrap().mode() & 0o004 != 0)
            .map(|path| File::open(path).unwrap())
            .collect();
        assert_eq!(others.len(), 2);
        for file in &others {
            rustix::fs::flock(file, FlockOperation::LockExclusive).unwrap();
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(install_in(&directory, uid()).is_ok()));
        assert_eq!(receiver.recv_timeout(Duration::from_secs(10)), Ok(true));
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
