//! Cgroup: the cpuset around the tree, version 1 or 2.
//!
//! [`Site::prepare`] looks for a place where one can be made and makes it, [`Site::join`] moves this process in and reads
//! back what the kernel made of it, [`Site::remove`] is the keeper's. A wall is a cgroup below our own, so that what limits
//! this process limits the command. Version 2 has no room for that where other processes are in our own
//! cgroup (cgroups(7), no internal processes): then it stands beside it, unless that would lift a limit.
//!
//! Hole: root inside the wall can write to the cgroup's files, and so can its owner in a delegated cgroup.

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use spmem_core::node::Guard;
use spmem_core::nodemask::NodeMask;

use crate::machine;
use crate::remark::remark;

/// What walls' cgroups are called, before the guard and the number of the process.
pub const WALL_NAMES: &str = "spm-wall-";
const KEEPER_NAMES: &str = "spm-keeper-";
/// Cgroups of one number beside each other, at most.
const NAMES: u32 = 64;
const PROCESSES: &str = "cgroup.procs";
const CHILDREN: &str = "cgroup.subtree_control";
/// What limits a cgroup, and what these say when they do not.
const LIMITS: [(&str, &str); 9] = [
    ("memory.max", "max"),
    ("memory.high", "max"),
    ("memory.swap.max", "max"),
    ("memory.swap.high", "max"),
    ("memory.zswap.max", "max"),
    ("pids.max", "max"),
    ("cpu.max", "max 100000"),
    ("cpuset.cpus", ""),
    ("io.max", ""),
];

/// Which of the kernel's two ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// What a user who may not make a cgroup can do.
    const fn remedy(self) -> &'static str {
        match self {
            Self::One => {
                "run spm as root, or in a cpuset of your own, which root makes: mkdir job below it; copy cpuset.cpus and cpuset.mems \
                 into job; chown -R USER job; echo PID >job/cgroup.procs"
            }
            Self::Two => {
                "run spm as root, or in a cgroup delegated to you: systemd-run --user --scope -p Delegate=cpuset spm ..."
            }
        }
    }
}

/// Our own cgroup, where cpusets are.
#[derive(Debug, PartialEq, Eq)]
struct Own {
    version: Version,
    /// Where the hierarchy is mounted.
    top: PathBuf,
    directory: PathBuf,
}

/// Where the wall stands.
pub struct Site {
    version: Version,
    wall: PathBuf,
    /// Where the keeper waits, and the cgroup that it gives back, if ours had to be emptied first.
    emptied: Option<(PathBuf, PathBuf)>,
}

impl Own {
    /// A file of a cpuset. Version 1 may be mounted without their prefix (`mount -t cpuset`, or the option `noprefix`).
    fn file(&self, directory: &Path, name: &str) -> PathBuf {
        let is_bare = self.version == Version::One && self.directory.join("mems").exists();
        directory.join(if is_bare { name.to_owned() } else { format!("cpuset.{name}") })
    }
}

impl Site {
    /// Makes a cgroup whose cpuset has `mems`, empty. `company` is a process of ours that is not to be in it.
    ///
    /// # Errors
    /// There is no place for one; what would help.
    pub fn prepare(mems: &NodeMask, guard: Guard, company: Option<u32>) -> anyhow::Result<Self> {
        let read = |path| fs::read_to_string(path).with_context(|| format!("{path} cannot be read"));
        let own = find(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?)
            .context("no cgroups are mounted; mount -t cgroup2 cgroup /sys/fs/cgroup")?;
        let name = format!("{WALL_NAMES}{guard}-");
        let site = match own.version {
            Version::One => {
                Self { version: own.version, wall: make(&own.directory, &name, own.version)?, emptied: None }
            }
            Version::Two => prepare_two(&own, &name, company)?,
        };
        let result = site.set(&own, mems);
        if result.is_err() {
            site.remove();
        }
        result.map(|()| site)
    }

    fn set(&self, own: &Own, mems: &NodeMask) -> anyhow::Result<()> {
        if own.version == Version::One {
            // A new one has no processors and takes no process.
            let cpus = own.file(&own.directory, "cpus");
            let text = fs::read_to_string(&cpus).with_context(|| format!("{} cannot be read", cpus.display()))?;
            write(&own.file(&self.wall, "cpus"), text.trim(), own.version)?;
        }
        write(&own.file(&self.wall, "mems"), &mems.to_string(), own.version)
    }

    /// Moves this process in, and makes sure that it is walled off.
    ///
    /// # Errors
    /// The kernel does not let it in, or gives it other nodes.
    pub fn join(&self, mems: &NodeMask) -> anyhow::Result<()> {
        write(&self.wall.join(PROCESSES), &std::process::id().to_string(), self.version)?;
        let seen = machine::reachable_nodes()?;
        ensure!(seen == *mems, "the cpuset {} gives nodes {seen} instead of {mems}", self.wall.display());
        Ok(())
    }

    /// Removes the cgroup, with what the program made in it, if nobody is inside; whether nothing is left to do.
    pub fn remove(&self) -> bool {
        if !remove_tree(&self.wall) {
            return false;
        }
        if let Some((keeper, own)) = &self.emptied {
            // As it was found.
            let _ = fs::write(own.join(CHILDREN), "-cpuset");
            let _ = fs::write(own.join(PROCESSES), std::process::id().to_string());
            // Company that has not ended yet.
            for process in fs::read_to_string(keeper.join(PROCESSES)).unwrap_or_default().lines() {
                let _ = fs::write(own.join(PROCESSES), process);
            }
            let _ = fs::remove_dir(keeper);
        }
        true
    }
}

/// Below our own cgroup if that can be, else beside it.
fn prepare_two(own: &Own, name: &str, company: Option<u32>) -> anyhow::Result<Site> {
    let (version, remedy) = (own.version, own.version.remedy());
    let above: Vec<&Path> =
        own.directory.ancestors().skip(1).take_while(|path| path.starts_with(&own.top)).collect();
    // Whoever may, passes cpusets down to us.
    for directory in above.iter().rev() {
        let _ = fs::write(directory.join(CHILDREN), "+cpuset");
    }
    if !has_word(&own.directory.join("cgroup.controllers"), "cpuset") {
        bail!("the cgroup {} has no cpuset controller; {remedy}", own.directory.display());
    }
    let kind = fs::read_to_string(own.directory.join("cgroup.type")).unwrap_or_default();
    if kind.trim() == "threaded" {
        bail!(
            "the cgroup {} is threaded: threads live there, and a wall takes a whole process; start spm in another one: \
             systemd-run --scope -p Delegate=cpuset spm ...",
            own.directory.display()
        );
    }
    let is_top = own.directory == own.top && !own.directory.join("cgroup.type").exists();
    let gives_on = has_word(&own.directory.join(CHILDREN), "cpuset");
    if is_top || gives_on {
        if !gives_on {
            write(&own.directory.join(CHILDREN), "+cpuset", version)?;
        }
        return Ok(Site { version, wall: make(&own.directory, name, version)?, emptied: None });
    }
    let ours: Vec<String> =
        [Some(std::process::id()), company].into_iter().flatten().map(|id| id.to_string()).collect();
    let inside = fs::read_to_string(own.directory.join(PROCESSES)).unwrap_or_default();
    if inside.lines().all(|line| ours.iter().any(|id| id == line)) {
        return prepare_emptied(own, name, &ours);
    }
    let Some(parent) = above.first() else {
        bail!(
            "other processes are in the cgroup {}, and it is the topmost that is seen here; {remedy}",
            own.directory.display()
        );
    };
    if let Some((limit, value)) = limit_of(&own.directory) {
        bail!(
            "other processes are in the cgroup {}, so a wall would stand beside it, without its {limit} of {value}; \
             start spm in a cgroup of its own: systemd-run --scope -p Delegate=cpuset spm ...",
            own.directory.display()
        );
    }
    let wall = make(parent, name, version)?;
    remark(format_args!(
        "other processes are in the cgroup {}: the wall stands beside it",
        own.directory.display()
    ));
    Ok(Site { version, wall, emptied: None })
}

/// A file that limits what is in a cgroup, and what it says.
fn limit_of(directory: &Path) -> Option<(String, String)> {
    // Which sizes of huge pages there are is the machine's.
    let names = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let of_huge_pages =
        names.filter(|name| name.starts_with("hugetlb.") && name.ends_with(".max")).map(|name| (name, "max"));
    let mut limits = LIMITS.iter().map(|&(name, none)| (name.to_owned(), none)).chain(of_huge_pages);
    limits.find_map(|(name, none)| {
        let value = fs::read_to_string(directory.join(&name)).ok()?.trim().to_owned();
        (value != none).then_some((name, value))
    })
}

/// We are alone in our cgroup, as in one that was delegated: leave it, so that it may give cpusets on.
fn prepare_emptied(own: &Own, name: &str, ours: &[String]) -> anyhow::Result<Site> {
    let version = own.version;
    let keeper = make(&own.directory, KEEPER_NAMES, version)?;
    let wall = make(&own.directory, name, version)?;
    let site = Site { version, wall, emptied: Some((keeper.clone(), own.directory.clone())) };
    let leave = || ours.iter().try_for_each(|id| write(&keeper.join(PROCESSES), id, version));
    let result = leave().and_then(|()| write(&own.directory.join(CHILDREN), "+cpuset", version));
    if result.is_err() {
        site.remove();
    }
    result.map(|()| site)
}

/// Makes a cgroup whose name begins so and ends with our number; removes what walls that are gone have left beside it.
fn make(host: &Path, kind: &str, version: Version) -> anyhow::Result<PathBuf> {
    let left = fs::read_dir(host).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in left.filter(|path| is_left_over(path)) {
        remove_tree(&path);
    }
    let id = std::process::id();
    // Who becomes its command may be the next `spm` here; and numbers are given again.
    let others = (1..NAMES).map(|turn| format!("{kind}{turn}-{id}"));
    for name in std::iter::once(format!("{kind}{id}")).chain(others) {
        let path = host.join(name);
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => bail!("no cgroup can be made in {}: {error}; {}", host.display(), version.remedy()),
        }
    }
    bail!(
        "{NAMES} cgroups of processes of number {id} are in {}: the last walls there are still inhabited",
        host.display()
    )
}

/// Named after a process that is no more.
fn is_left_over(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let is_ours = name.starts_with(WALL_NAMES) || name.starts_with(KEEPER_NAMES);
    let maker = name.rsplit('-').next().and_then(|number| number.parse::<u32>().ok());
    is_ours && maker.is_some_and(|maker| !Path::new(&format!("/proc/{maker}")).exists())
}

/// All of it, if nobody is in any part: who is may have empty ones for later. Whether it is gone.
fn remove_tree(path: &Path) -> bool {
    !is_inhabited(path) && remove_empty(path)
}

fn is_inhabited(path: &Path) -> bool {
    let has_processes = fs::read_to_string(path.join(PROCESSES)).is_ok_and(|text| !text.is_empty());
    has_processes || below(path).any(|child| is_inhabited(&child))
}

fn below(path: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// The deepest first. The kernel keeps those that have processes.
fn remove_empty(path: &Path) -> bool {
    below(path).for_each(|child| {
        remove_empty(&child);
    });
    !matches!(fs::remove_dir(path), Err(error) if error.kind() != ErrorKind::NotFound)
}

fn has_word(path: &Path, word: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.split_whitespace().any(|one| one == word))
}

fn write(path: &Path, text: &str, version: Version) -> anyhow::Result<()> {
    fs::write(path, text).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => {
            anyhow::anyhow!("{} may not be written: {error}; {}", path.display(), version.remedy())
        }
        _ => refused(path, text, &error),
    })
}

fn refused(path: &Path, text: &str, error: &io::Error) -> anyhow::Error {
    anyhow::anyhow!("{} does not take `{text}`: {error}", path.display())
}

/// Finds our cgroup in the texts of /proc/self/mountinfo and /proc/self/cgroup: the hierarchy that has cpusets.
fn find(mounts: &str, cgroups: &str) -> Option<Own> {
    let path_of = |is_it: &dyn Fn(&str, &str) -> bool| {
        cgroups.lines().find_map(|line| {
            let mut words = line.splitn(3, ':');
            let (id, controllers, path) = (words.next()?, words.next()?, words.next()?);
            is_it(id, controllers).then(|| path.to_owned())
        })
    };
    let is_one = |_: &str, controllers: &str| controllers.split(',').any(|one| one == "cpuset");
    let one = path_of(&is_one).map(|path| (Version::One, path));
    let two = path_of(&|id, _| id == "0").map(|path| (Version::Two, path));
    [one, two].into_iter().flatten().find_map(|(version, path)| {
        let (top, root) = mount_of(mounts, version)?;
        // A container sees a part of the hierarchy as all of it.
        let below = Path::new(&path).strip_prefix(&root).or_else(|_| Path::new(&path).strip_prefix("/")).ok()?;
        let directory = if below.as_os_str().is_empty() { top.clone() } else { top.join(below) };
        Some(Own { version, directory, top })
    })
}

/// Where the hierarchy is mounted, and which part of it (proc_pid_mountinfo(5)).
fn mount_of(mounts: &str, version: Version) -> Option<(PathBuf, PathBuf)> {
    mounts.lines().find_map(|line| {
        let (fields, rest) = line.split_once(" - ")?;
        let mut rest = rest.split(' ');
        let (kind, options) = (rest.next()?, rest.nth(1)?);
        let is_it = match version {
            // `mount -t cpuset` shows either kind, by the kernel's version.
            Version::One => {
                kind == "cpuset" || kind == "cgroup" && options.split(',').any(|option| option == "cpuset")
            }
            Version::Two => kind == "cgroup2",
        };
        let mut fields = fields.split(' ').skip(3);
        let (root, top) = (fields.next()?, fields.next()?);
        is_it.then(|| (unescape(top), unescape(root)))
    })
}

/// A path of mountinfo: blanks, line feeds and backslashes are octal numbers there.
fn unescape(path: &str) -> PathBuf {
    let (mut bytes, mut rest) = (Vec::new(), path.as_bytes());
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| first == b'\\');
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(value.unwrap_or(first));
        rest = if value.is_some() { &after[3..] } else { after };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpusets_of_version_1_are_found_beside_version_2() {
        let mounts = "34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let own = find(mounts, "3:cpuset:/jobs/a\n0::/x\n").unwrap();
        let directory = PathBuf::from("/sys/fs/cgroup/cpuset/jobs/a");
        assert_eq!(own, Own { version: Version::One, top: "/sys/fs/cgroup/cpuset".into(), directory });
    }

    #[test]
    fn a_cpuset_of_version_1_without_prefix_is_set_by_its_own_names() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().display();
        for kind in ["cpuset cpuset rw,cpuset,noprefix", "cgroup cgroup rw,cpuset,noprefix", "cpuset none rw"] {
            let mounts = format!("34 31 0:31 / {path} rw,relatime - {kind}\n");
            let own = find(&mounts, "3:cpuset:/\n0::/\n").unwrap();
            assert_eq!((own.version, own.directory.as_path()), (Version::One, top.path()), "{kind}");
            fs::write(top.path().join("cpus"), "0-1\n").unwrap();
            fs::write(top.path().join("mems"), "0-3\n").unwrap();
            let site = Site { version: own.version, wall: top.path().join("wall"), emptied: None };
            fs::create_dir_all(&site.wall).unwrap();
            site.set(&own, &NodeMask::parse("0-1", NodeMask::EMPTY).unwrap()).unwrap();
            let read = |name| fs::read_to_string(site.wall.join(name)).unwrap();
            assert_eq!((read("cpus").as_str(), read("mems").as_str()), ("0-1", "0-1"));
        }
    }

    #[test]
    fn the_remedy_is_that_of_the_version_that_is_there() {
        let host = Path::new("/nonexistent");
        let said = |version| make(host, WALL_NAMES, version).unwrap_err().to_string();
        assert!(said(Version::One).contains("cpuset.mems") && !said(Version::One).contains("systemd"));
        assert!(said(Version::Two).contains("systemd-run"));
    }

    #[test]
    fn a_part_of_a_hierarchy_is_where_it_is_mounted() {
        let mounts = "30 25 0:26 /docker/1 /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n";
        let own = find(mounts, "0::/docker/1/job\n").unwrap();
        assert_eq!((own.version, own.directory), (Version::Two, "/sys/fs/cgroup/job".into()));
        assert_eq!(find(mounts, "0::/\n").unwrap().directory, PathBuf::from("/sys/fs/cgroup"));
        assert_eq!(find("", "0::/\n"), None);
    }

    #[test]
    fn blanks_and_backslashes_of_a_mount_are_its_own() {
        let mounts = "30 25 0:26 /a\\134b /mnt/c\\040group\\011x\\08 rw - cgroup2 cgroup rw\n";
        let own = find(mounts, "0::/a\\b/job\n").unwrap();
        assert_eq!((own.top, own.directory), ("/mnt/c group\tx\\08".into(), "/mnt/c group\tx\\08/job".into()));
    }

    #[test]
    fn a_wall_beside_our_cgroup_lifts_no_limit_of_it() {
        let top = tempfile::tempdir().unwrap();
        let directory = top.path().join("job");
        fs::create_dir(&directory).unwrap();
        let own = Own { version: Version::Two, top: top.path().to_owned(), directory: directory.clone() };
        let file = |name: &str, text: &str| fs::write(directory.join(name), text).unwrap();
        file("cgroup.controllers", "cpuset io memory\n");
        file("cgroup.procs", "1\n");
        for (limit, none) in LIMITS {
            file(limit, &format!("{none}\n"));
        }
        let beside = prepare_two(&own, WALL_NAMES, None).unwrap();
        assert_eq!(beside.wall.parent(), Some(top.path()));
        for (limit, none) in LIMITS {
            file(limit, "1\n");
            let refused = prepare_two(&own, WALL_NAMES, None).err().unwrap().to_string();
            assert!(refused.contains(limit), "{refused}");
            file(limit, &format!("{none}\n"));
        }
        file("io.max", "8:0 rbps=1 wbps=max riops=max wiops=max\n");
        assert!(prepare_two(&own, WALL_NAMES, None).is_err());
        file("io.max", "\n");
        for (name, text) in
            [("hugetlb.2MB.max", "max\n"), ("hugetlb.1GB.rsvd.max", "max\n"), ("hugetlb.2MB.current", "0\n")]
        {
            file(name, text);
        }
        assert!(prepare_two(&own, WALL_NAMES, None).is_ok());
        file("hugetlb.1GB.rsvd.max", "0\n");
        let refused = prepare_two(&own, WALL_NAMES, None).err().unwrap().to_string();
        assert!(refused.contains("hugetlb.1GB.rsvd.max of 0"), "{refused}");
    }

    #[test]
    fn in_a_threaded_cgroup_there_is_no_wall_and_it_is_said_why() {
        let top = tempfile::tempdir().unwrap();
        let directory = top.path().join("job");
        fs::create_dir(&directory).unwrap();
        let own = Own { version: Version::Two, top: top.path().to_owned(), directory: directory.clone() };
        fs::write(directory.join("cgroup.controllers"), "cpuset cpu\n").unwrap();
        fs::write(directory.join("cgroup.procs"), format!("{}\n", std::process::id())).unwrap();
        fs::write(directory.join("cgroup.type"), "threaded\n").unwrap();
        let refused = prepare_two(&own, WALL_NAMES, None).err().unwrap().to_string();
        assert!(refused.contains("job is threaded") && refused.contains("systemd-run"), "{refused}");
    }

    #[test]
    fn what_a_process_that_is_gone_left_is_known_by_its_number() {
        assert!(is_left_over(Path::new("/c/spm-wall-hard-4194304")));
        assert!(!is_left_over(Path::new(&format!("/c/spm-wall-hard-{}", std::process::id()))));
        assert!(!is_left_over(Path::new("/c/spm-wall-hard-x")) && !is_left_over(Path::new("/c/other-4194304")));
    }

    #[test]
    fn a_number_that_has_a_wall_already_gets_another_which_is_known_by_it_too() {
        let host = tempfile::tempdir().unwrap();
        let made: Vec<PathBuf> =
            (0..3).map(|_| make(host.path(), "spm-wall-easy-", Version::Two).unwrap()).collect();
        assert!(made.iter().all(|path| path.is_dir() && !is_left_over(path)), "{made:?}");
        assert!(is_left_over(Path::new("/c/spm-wall-easy-2-4194304")));
    }

    #[test]
    fn who_lives_behind_a_wall_keeps_the_empty_cgroups_there() {
        let host = tempfile::tempdir().unwrap();
        let wall = host.path().join("spm-wall-hard-4194304");
        let (inhabited, empty) = (wall.join("a"), wall.join("b/c"));
        fs::create_dir_all(&inhabited).unwrap();
        fs::create_dir_all(&empty).unwrap();
        fs::write(inhabited.join(PROCESSES), "7\n").unwrap();
        make(host.path(), "spm-wall-hard-", Version::Two).unwrap();
        assert!(!remove_tree(&wall) && empty.is_dir());
        fs::remove_file(inhabited.join(PROCESSES)).unwrap();
        assert!(remove_tree(&wall) && !wall.exists());
    }
}
