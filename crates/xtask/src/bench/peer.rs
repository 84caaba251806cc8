//! The peer of `bench zram`: kernel swap on a zram device under a memory cgroup, made and taken away again.
//!
//! [`Zram::new`] makes a swap device, on a kernel with `hot_add` a new one, else on zram0 if nobody uses it;
//! [`MemoryGroup::new`] makes a cgroup with a limit, v1 or v2, whichever has the memory controller. Both are undone
//! on drop, on panic and on Ctrl-C ([`crate::cleanup`]), in that order: processes, cgroup, swap, device.
//!
//! Known hole: settings of the whole system (vm.swappiness, vm.page-cluster) are left as they are and printed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::cleanup::{Step, Undo};
use crate::packages;

const CONTROL: &str = "/sys/class/zram-control";

/// A swap device in compressed RAM.
pub(crate) struct Zram {
    sys: PathBuf,
    /// Undone from the first to the last.
    _swap: Undo,
    _reset: Undo,
    _device: Option<Undo>,
}

/// A device that pages are written to, without a file system or swap.
pub(crate) struct ZramDisk {
    sys: PathBuf,
    device: PathBuf,
    _reset: Undo,
    _device: Option<Undo>,
}

impl ZramDisk {
    /// Makes a device of `bytes` with lz4.
    ///
    /// # Errors
    /// As [`Zram::new`].
    pub(crate) fn new(bytes: u64) -> anyhow::Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "a zram device needs root");
        let (sys, device, reset, undo) = make_device(bytes)?;
        Ok(Self { sys, device, _reset: reset, _device: undo })
    }

    /// The block device.
    pub(crate) fn device(&self) -> &Path {
        &self.device
    }

    /// What it holds now.
    pub(crate) fn read_use(&self) -> anyhow::Result<ZramUse> {
        read_use(&self.sys)
    }
}

/// A device with lz4: its directory in /sys, its file, what resets it, and what removes it.
fn make_device(bytes: u64) -> anyhow::Result<(PathBuf, PathBuf, Undo, Option<Undo>)> {
    let (number, device_undo) = take_device()?;
    let sys = PathBuf::from(format!("/sys/block/zram{number}"));
    let reset = Undo::new(Step::WriteOne(sys.join("reset")));
    write(&sys.join("comp_algorithm"), "lz4")?;
    let chosen = read(&sys.join("comp_algorithm"))?;
    ensure!(chosen.contains("[lz4]"), "this kernel's zram has no lz4: {}", chosen.trim());
    write(&sys.join("disksize"), &bytes.to_string())?;
    Ok((sys, PathBuf::from(format!("/dev/zram{number}")), reset, device_undo))
}

fn read_use(sys: &Path) -> anyhow::Result<ZramUse> {
    let text = read(&sys.join("mm_stat"))?;
    let words: Vec<u64> = text.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect();
    ensure!(words.len() >= 3, "mm_stat of zram is not what it was: {text}");
    Ok(ZramUse { stored: words[0], used: words[2] })
}

/// What `mm_stat` says, bytes.
#[derive(Clone, Copy)]
pub(crate) struct ZramUse {
    /// Pages stored, uncompressed.
    pub(crate) stored: u64,
    /// RAM they take, fragmentation included (`mem_used_total`).
    pub(crate) used: u64,
}

impl Zram {
    /// Makes a device of `bytes` with lz4 and swaps on it before any other.
    ///
    /// # Errors
    /// Not root, no zram in this kernel, no lz4 for it, or the only device is in use.
    pub(crate) fn new(bytes: u64) -> anyhow::Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "swap on zram and a memory cgroup need root");
        let (mkswap, swapon) = (packages::need("mkswap", "util-linux")?, packages::need("swapon", "mount")?);
        let (sys, device, reset, device_undo) = make_device(bytes)?;
        run(&mkswap, &[device.as_os_str()])?;
        let swap = Undo::new(Step::Swapoff(device.clone()));
        run(&swapon, &["--priority".as_ref(), "32767".as_ref(), device.as_os_str()])?;
        Ok(Self { sys, _swap: swap, _reset: reset, _device: device_undo })
    }

    /// What it holds now.
    pub(crate) fn read_use(&self) -> anyhow::Result<ZramUse> {
        read_use(&self.sys)
    }
}

/// A new device, or zram0 when it is idle.
fn take_device() -> anyhow::Result<(u32, Option<Undo>)> {
    let hot_add = Path::new(CONTROL).join("hot_add");
    if !Path::new(CONTROL).exists() && !Path::new("/sys/block/zram0").exists() {
        let _ = Command::new("modprobe").args(["zram", "num_devices=0"]).status();
    }
    if hot_add.exists() {
        // Reading the file makes the device.
        let number = read(&hot_add)?.trim().parse().context("hot_add gave no number")?;
        let undo = Undo::new(Step::WriteNumber(Path::new(CONTROL).join("hot_remove"), number));
        return Ok((number, Some(undo)));
    }
    let sys = Path::new("/sys/block/zram0");
    ensure!(sys.exists(), "this kernel has no zram: load the module, or build it with CONFIG_ZRAM");
    let in_use = read(&sys.join("initstate"))?.trim() != "0" || read(&sys.join("disksize"))?.trim() != "0";
    ensure!(!in_use, "zram0 is in use and this kernel cannot add a device: nothing was changed");
    Ok((0, None))
}

/// A memory cgroup with a limit.
pub(crate) struct MemoryGroup {
    dir: PathBuf,
    is_v2: bool,
    _undo: Undo,
}

impl MemoryGroup {
    /// Makes it.
    ///
    /// # Errors
    /// There is no memory controller, or it is not ours to use.
    pub(crate) fn new(limit_bytes: u64) -> anyhow::Result<Self> {
        let (parent, is_v2) = find_controller()?;
        let dir = parent.join(format!("spmem-xtask-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot make the cgroup {}", dir.display()))?;
        let undo = Undo::new(Step::RemoveCgroup(dir.clone()));
        let group = Self { dir, is_v2, _undo: undo };
        group.set_limit(limit_bytes)?;
        Ok(group)
    }

    /// The file to join by.
    pub(crate) fn procs(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }

    /// What is charged now: resident memory, page tables, file cache; bytes.
    pub(crate) fn read_usage_bytes(&self) -> anyhow::Result<u64> {
        let name = if self.is_v2 { "memory.current" } else { "memory.usage_in_bytes" };
        read(&self.dir.join(name))?.trim().parse().context("the usage is no number")
    }

    /// Processes in it that the kernel killed for want of memory.
    pub(crate) fn read_oom_kills(&self) -> anyhow::Result<u64> {
        let text = read(&self.dir.join(if self.is_v2 { "memory.events" } else { "memory.oom_control" }))?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|word| word.trim().parse().ok()).context("the cgroup does not count its OOM kills")
    }

    fn set_limit(&self, bytes: u64) -> anyhow::Result<()> {
        if self.is_v2 {
            write(&self.dir.join("memory.max"), &bytes.to_string())?;
            return write(&self.dir.join("memory.swap.max"), "max");
        }
        write(&self.dir.join("memory.limit_in_bytes"), &bytes.to_string())
    }
}

/// Where a memory cgroup can be made, and whether it is the unified hierarchy.
fn find_controller() -> anyhow::Result<(PathBuf, bool)> {
    let mounts = read(Path::new("/proc/mounts"))?;
    for line in mounts.lines() {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (Some(dir), Some(kind), Some(options)) = (words.next(), words.next(), words.next()) else { continue };
        if kind == "cgroup" && options.split(',').any(|option| option == "memory") {
            return Ok((dir.into(), false));
        }
        let has_memory = |file: &str| {
            read(&Path::new(dir).join(file))
                .is_ok_and(|text| text.split_ascii_whitespace().any(|word| word == "memory"))
        };
        if kind == "cgroup2" && has_memory("cgroup.controllers") {
            if !has_memory("cgroup.subtree_control") {
                write(&Path::new(dir).join("cgroup.subtree_control"), "+memory")?;
            }
            return Ok((dir.into(), true));
        }
    }
    bail!("there is no memory controller: no cgroup v1 memory hierarchy is mounted, and none under cgroup v2")
}

/// The system's settings that the peer depends on, for the head of a table.
pub(crate) fn describe_settings() -> String {
    let setting = |name: &str| read(&Path::new("/proc/sys/vm").join(name)).unwrap_or_default().trim().to_string();
    let kernel = read(Path::new("/proc/sys/kernel/osrelease")).unwrap_or_default().trim().to_string();
    format!("Linux {kernel}, vm.swappiness {}, vm.page-cluster {}", setting("swappiness"), setting("page-cluster"))
}

fn read(file: &Path) -> anyhow::Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

fn write(file: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {text} to {}", file.display()))
}

fn run(program: &Path, args: &[&std::ffi::OsStr]) -> anyhow::Result<()> {
    let output =
        Command::new(program).args(args).output().with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(output.status.success(), "{}: {}", program.display(), String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
