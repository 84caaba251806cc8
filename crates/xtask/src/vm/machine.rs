//! One run of a guest: the folder it is told by, QEMU, the limit, and the status that comes back.
//!
//! [`Machine::run`] is the whole line. The guest reads what to do from a 9p share, this run's folder, and leaves the
//! command's status there; its output comes through a serial line. The process is killed when the run ends in any
//! other way ([`cleanup`](crate::cleanup)); the guest also ends by itself a little after the limit.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::archive::{Kernel, KernelFiles, Tools, fetch_kernel, fetch_tools};
use super::kernel::{BootFiles, boot_files};
use super::topology::{Mode, Topology};
use crate::cleanup::{Step, Undo};
use crate::launch::Bed;

/// `-accel kvm` is not to be had everywhere, and has no CXL memory that can be executed. Regions of CXL memory cannot
/// be committed when the guest sees a hypervisor (no flushing of caches); five-level page tables only cost time.
const CPU: &str = "max,hypervisor=off,la57=off";
/// Memory that a device brings can be taken offline again only when it is movable. The kernel's check of its timer fails where the
/// emulator gets too little of the processor.
const APPEND: &str = "console=ttyS0 quiet loglevel=4 panic=-1 nokaslr mitigations=off random.trust_cpu=on tsc=reliable \
                      cryptomgr.notests=1 no_timer_check memhp_default_state=online_movable";
const POLL: Duration = Duration::from_millis(20);
/// Where a moment is waited for that is soon over.
const SHORT_POLL: Duration = Duration::from_micros(500);
/// What the guest's kernel says of a timer that did not go off (kernel/rcu/tree_stall.h).
const LOST_TIMER: &str = "kthread timer wakeup didn't happen";
/// How much longer than the limit a guest runs that nobody ends.
const GRACE_SECONDS: u64 = 30;
const CONSOLE_LINES: usize = 30;
const SETUP: &str = include_str!("setup.sh");

/// What is booted.
pub(crate) struct Machine<'a> {
    tools: Tools,
    kernel: KernelFiles,
    boot: BootFiles,
    bed: &'a Bed,
}

/// The packages of a machine, fetched where they are missing.
///
/// # Errors
/// This machine cannot fetch them; the message says what is missing.
pub(crate) fn fetch(bed: &Bed, kernel: Kernel) -> anyhow::Result<(Tools, KernelFiles)> {
    let cache = bed.cache.join("vm");
    let tools = fetch_tools(&cache)?;
    let kernel = fetch_kernel(&cache, kernel, &tools)?;
    Ok((tools, kernel))
}

/// What outlives a guest: the memory of its devices, and what the command has told of it.
#[derive(Clone, Copy)]
pub(crate) struct Kept<'a> {
    /// Where the media are, and the file [`TOLD`].
    pub(crate) folder: &'a Path,
    /// Whether the power is to be cut, by what was told so far.
    pub(crate) is_time: &'a dyn Fn(&str) -> bool,
}

/// A file of the job's folder, which the command may write and finds again.
pub(crate) const TOLD: &str = "told";

/// How a run ended.
pub(crate) enum Ending {
    /// The command's exit status.
    Status(u8),
    /// The guest could not make the topology's devices; what it said.
    NoSetup(String),
    /// It reported nothing: a panic, a hang, the limit. What is known, and the end of the console.
    Silent(String),
    /// The power was cut: QEMU was killed.
    Cut,
    /// The emulator failed, not the guest; how. Seen on a host with more to do than processors: a timer that does not go off, an
    /// assertion about memory sections.
    NoEmulator(String),
}

/// Whether it stands on the console so far.
fn console_says(console: &Path, words: &str) -> bool {
    fs::read(console).is_ok_and(|text| String::from_utf8_lossy(&text).contains(words))
}

impl<'a> Machine<'a> {
    /// Makes what is booted of what was fetched.
    ///
    /// # Errors
    /// The packages are not what they should be, or there is no room.
    pub(crate) fn new(bed: &'a Bed, (tools, kernel): (Tools, KernelFiles)) -> anyhow::Result<Self> {
        let scratch = bed.dir.join(&kernel.release);
        fs::create_dir_all(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
        let boot = boot_files(&kernel, &tools, &scratch)?;
        Ok(Self { tools, kernel, boot, bed })
    }

    /// As `uname -r`.
    pub(crate) fn release(&self) -> &str {
        &self.kernel.release
    }

    /// Boots, runs `command` in this process's directory with its output to `output`, and waits for the end. Devices have the
    /// media that are `kept`, which are made where there are none.
    pub(crate) fn run(
        &self,
        (topology, mode): (&Topology, &Mode),
        command: &[OsString],
        limit: Duration,
        output: Stdio,
        kept: Option<Kept<'_>>,
    ) -> anyhow::Result<Ending> {
        let folder = self.bed.dir.join("vm");
        let job = folder.join("job");
        fs::create_dir_all(&job).with_context(|| format!("cannot make {}", job.display()))?;
        let _undo = Undo::new(Step::RemoveTree(folder.clone()));
        let media = kept.map(|kept| kept.folder);
        self.write_job(&job, &topology.setup_for(mode, media), &topology.modules, command, limit)?;
        if let Some(folder) = media.filter(|folder| folder.join(TOLD).exists()) {
            fs::copy(folder.join(TOLD), job.join(TOLD)).context("cannot copy what was told")?;
        }
        let console = folder.join("console");
        let mut qemu = Command::new(self.tools.programs.join("qemu-system-x86_64"));
        qemu.args(self.qemu_args(&folder, topology, media)?).stdin(Stdio::null()).stdout(output);
        let started = Instant::now();
        let mut child = qemu.spawn().context("cannot start QEMU")?;
        let undo = Undo::new(Step::Kill(child.id()));
        let is_time =
            || kept.is_some_and(|kept| fs::read_to_string(job.join(TOLD)).is_ok_and(|told| (kept.is_time)(&told)));
        let (mut is_stalled, mut is_cut) = (false, false);
        let ended = loop {
            if let Some(status) = child.try_wait().context("cannot wait for QEMU")? {
                break Some(status);
            }
            is_stalled = console_says(&console, LOST_TIMER);
            is_cut = is_time();
            if is_stalled || is_cut || started.elapsed() > limit {
                break None;
            }
            sleep(if kept.is_some() { SHORT_POLL } else { POLL });
        };
        match ended {
            // Awaited: its number may be another process's by now.
            Some(_) => undo.forget(),
            None => {
                drop(undo);
                child.wait().context("cannot wait for QEMU")?;
            }
        }
        let read = |name: &str| fs::read_to_string(job.join(name)).ok();
        if let Some((folder, told)) = media.zip(read(TOLD)) {
            fs::write(folder.join(TOLD), told).context("cannot keep what was told")?;
        }
        if is_cut {
            return Ok(Ending::Cut);
        }
        if read("setup.status").is_some() {
            return Ok(Ending::NoSetup(read("setup.log").unwrap_or_default()));
        }
        if let Some(status) = read("status").and_then(|text| text.trim().parse().ok()) {
            return Ok(Ending::Status(status));
        }
        if is_stalled {
            return Ok(Ending::NoEmulator("it has lost a timer of the guest's".to_owned()));
        }
        if let Some(signal) = ended.and_then(|status| status.signal()) {
            return Ok(Ending::NoEmulator(format!("it ended by signal {signal}")));
        }
        let cause = match ended {
            None => format!("it was ended after {} s", limit.as_secs()),
            Some(status) if status.success() => "it powered off".to_owned(),
            Some(status) => format!("QEMU ended with {status}"),
        };
        let setup = read("setup.log").filter(|log| !log.is_empty());
        let setup = setup.map(|log| format!("\nset-up so far:\n{log}")).unwrap_or_default();
        Ok(Ending::Silent(format!("{cause}{setup}\nthe end of its console:\n{}", console_tail(&console))))
    }

    /// What `init.sh` reads: variables, set-up, command.
    fn write_job(
        &self,
        job: &Path,
        topology_setup: &str,
        modules: &[String],
        command: &[OsString],
        limit: Duration,
    ) -> anyhow::Result<()> {
        let limit = limit.as_secs() + GRACE_SECONDS;
        let mut config = format!("LIMIT={limit}\nRELEASE=").into_bytes();
        config.extend(quote(self.kernel.release.as_ref()));
        config.extend(b"\nKERNEL=");
        config.extend(quote(self.kernel.root.as_os_str()));
        config.extend(b"\nTOOLS=");
        config.extend(quote(self.tools.programs.as_os_str()));
        config.push(b'\n');
        let modules: String = modules.iter().map(|name| format!("modprobe {name} || exit 1\n")).collect();
        let setup = format!("{SETUP}\n{modules}set -e\n{topology_setup}");
        let folder = std::env::current_dir().context("the working directory is gone")?;
        let mut script = b"cd ".to_vec();
        script.extend(quote(folder.as_os_str()));
        script.extend(b" || exit 125\nexec");
        for word in command {
            script.push(b' ');
            script.extend(quote(word));
        }
        script.push(b'\n');
        for (name, text) in [("config", config), ("setup", setup.into_bytes()), ("command", script)] {
            fs::write(job.join(name), text).with_context(|| format!("cannot write the job's {name}"))?;
        }
        Ok(())
    }

    /// No network, no screen. Serial lines: the kernel's console to a file, the command's output to ours.
    fn qemu_args(
        &self,
        folder: &Path,
        topology: &Topology,
        media: Option<&Path>,
    ) -> anyhow::Result<Vec<OsString>> {
        let mut args: Vec<OsString> = Vec::new();
        let words = |text: &str| text.split_whitespace().map(OsString::from).collect::<Vec<_>>();
        args.extend(words("-nodefaults -display none -no-reboot -accel tcg,thread=multi -cpu"));
        args.push(CPU.into());
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            args.extend(["-L".into(), self.tools.root.join(data).into()]);
        }
        args.extend(["-serial".into(), joined("file:", &folder.join("console"), "")?]);
        args.extend(words("-serial stdio"));
        let readable = ",security_model=none,readonly=on,multidevs=remap";
        args.extend(["-fsdev".into(), format!("local,id=root,path=/{readable}").into()]);
        args.extend(words("-device virtio-9p-pci,fsdev=root,mount_tag=hostroot"));
        args.extend(["-fsdev".into(), joined("local,id=job,path=", &folder.join("job"), ",security_model=none")?]);
        args.extend(words("-device virtio-9p-pci,fsdev=job,mount_tag=job"));
        args.extend(["-kernel".into(), self.boot.kernel.clone().into()]);
        args.extend(["-initrd".into(), self.boot.initrd.clone().into()]);
        args.extend(["-append".into(), format!("{APPEND} {}", topology.append).into()]);
        let media = media.map(|folder| plain(folder)).transpose()?;
        args.extend(topology.qemu_args(media).into_iter().map(OsString::from));
        Ok(args)
    }
}

fn joined(before: &str, path: &Path, after: &str) -> anyhow::Result<OsString> {
    Ok(format!("{before}{}{after}", plain(path)?).into())
}

/// QEMU takes a comma for the end of a value.
fn plain(path: &Path) -> anyhow::Result<&str> {
    let path = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    ensure!(!path.contains(','), "QEMU cannot take a comma in {path}: use another target directory");
    Ok(path)
}

/// A word for the shell.
pub(super) fn quote(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for byte in word.as_bytes() {
        if *byte == b'\'' {
            quoted.extend(b"'\\''");
        } else {
            quoted.push(*byte);
        }
    }
    quoted.push(b'\'');
    quoted
}

fn console_tail(console: &PathBuf) -> String {
    let text = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_with_quotes_and_spaces_stays_one_word() {
        let script = [b"printf %s ".to_vec(), quote("it's $HOME".as_ref())].concat();
        let output = Command::new("sh").arg("-c").arg(OsStr::from_bytes(&script)).output().unwrap();
        assert_eq!(output.stdout, b"it's $HOME");
    }
}
