//! `cargo xtask vm`: a command on a real kernel with several nodes, CXL, devdax or persistent memory.
//!
//! QEMU emulates the machine, so this answers what happens, never how fast. [`topology`] says what the machine is,
//! [`archive`] fetches Debian's packages, [`kernel`] makes what is booted, [`machine`] runs it, [`matrix`] is
//! `cargo xtask vm-test`, [`reboots`] its part that boots more than once. `init.sh` is the guest's first process,
//! `setup.sh` what topologies' set-up is written in.
//!
//! Known holes: standard output and standard error of the command come out as one stream; what it writes to files is
//! gone afterwards.

mod archive;
mod kernel;
mod machine;
pub(crate) mod matrix;
mod reboots;
pub(crate) mod topology;

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::launch::{Bed, NeedSpm};
use archive::Kernel;
use machine::{Ending, Kept, Machine};
use topology::Topology;

/// The guest never told how the command ended; the shell and `spm` use the numbers around it.
const NO_STATUS: u8 = 125;

/// Which machine, and what in it.
#[derive(Clone, clap::Args)]
#[command(after_help = "\
The guest sees this machine's files; what it writes to them is forgotten. The command runs as root in the same directory.
Exit status: the command's; 125 when the guest reported none; 1 when the machine cannot be made; 2 for a wrong command line.
QEMU, kernels and tools are Debian packages, kept unpacked in the target directory's xtask/vm: remove it to fetch newer ones.")]
pub(crate) struct Options {
    /// Which machine.
    #[arg(long, default_value = "numa4", value_name = "NAME")]
    topology: String,
    /// What is made of its devices; the topology's first mode if not given.
    #[arg(long)]
    mode: Option<String>,
    /// Which of Debian's kernels.
    #[arg(long, value_enum, default_value = "6.12", value_name = "V")]
    kernel: Kernel,
    /// End it after this many seconds.
    #[arg(long, default_value_t = 300, value_name = "S")]
    timeout: u64,
    /// Keep the memory of devices in this folder, and find it there: a further run of the same topology and mode is the next boot.
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
    /// List the topologies and their modes.
    #[arg(long)]
    list: bool,
    /// What to run in it.
    #[arg(last = true, required_unless_present = "list", value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if options.list {
        return list();
    }
    let topology = Topology::load(&options.topology)?;
    let mode = topology.mode(options.mode.as_deref())?;
    if let Some(folder) = &options.keep {
        ensure!(mode.setup_again.is_some(), "nothing of {} in mode {} outlives a boot", topology.name, mode.name);
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let kept = options.keep.as_deref().map(|folder| Kept { folder, is_time: &|_| false });
    let bed = Bed::new(NeedSpm::No)?;
    let machine = Machine::new(&bed, machine::fetch(&bed, options.kernel)?)?;
    let limit = Duration::from_secs(options.timeout);
    let status = match machine.run((&topology, mode), &options.command, limit, Stdio::inherit(), kept)? {
        Ending::Status(status) => status,
        Ending::NoSetup(log) => {
            eprintln!(
                "xtask: the guest could not make {} in mode {}:\n{}",
                topology.name,
                mode.name,
                log.trim_end()
            );
            NO_STATUS
        }
        Ending::Cut => unreachable!("it is never time to"),
        Ending::NoEmulator(how) => {
            eprintln!("xtask: the emulator failed: {how}; run it again, on a machine with less to do");
            NO_STATUS
        }
        Ending::Silent(what) => {
            eprintln!("xtask: the guest reported no status: {what}");
            NO_STATUS
        }
    };
    Ok(ExitCode::from(status))
}

fn list() -> anyhow::Result<ExitCode> {
    for topology in Topology::load_all()? {
        println!("{:<8}  {} [{}]", topology.name, topology.summary, topology.mode_names());
    }
    Ok(ExitCode::SUCCESS)
}
