//! `cargo xtask vm-test`: every topology, mode and kernel, and what a program in the guest says of it.
//!
//! Five checks, all of [`programs`](crate::programs): `vm-facts`, is the memory there that the topology's file promises, and
//! does spmem's discovery find it; `vm-backends`, does every kind of node there hold what all must; on [`WALLED`] `vm-wall`, does
//! `spm wall` keep what docs/walls.md says (on 6.1, with cgroup version 1); and there and on [`WITH_DEVICE`] `vm-runs`, do cold pages of runs go to a node, or to a device, and stay
//! whole; and where a medium outlives its guest `vm-reboots`, is a persistent node what it was. Each in a guest of its own, the last in several. A row is passed, failed, or skipped with its reason; a skip is never a pass. Guests run one after the other.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Write, stdout};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::archive::Kernel;
use super::machine::{self, Ending, Machine};
use super::reboots;
use super::topology::{Mode, Topology};
use crate::launch::{Bed, NeedSpm};

/// What fits in five minutes.
const QUICK: [&str; 3] = ["numa4", "hmem", "cxl"];
/// Where walls are tried: four nodes of the kernel's.
const WALLED: &str = "numa4";
/// Where runs use a dax device: the topology and its mode.
const WITH_DEVICE: [(&str, &str); 2] = [("hmem", "devdax"), ("gib", "devdax")];
/// Only what hangs takes as long, on a busy machine too.
pub(super) const LIMIT: Duration = Duration::from_secs(1800);
/// Guests whose emulator fails are started again so often.
pub(super) const RETRIES: u32 = 2;
/// Exit status when nothing could be fetched, so nothing was checked: CI counts it as a skip.
const EXIT_SKIPPED: u8 = 77;

/// Which part of the matrix.
#[derive(Clone, clap::Args)]
#[command(
    after_help = "Exit status: 0 when all that was checked holds; 1 when not; 77 when neither QEMU nor a kernel could be fetched."
)]
pub(crate) struct Options {
    /// Only numa4, hmem and cxl on 6.12, of the walls only the hard one, a few runs: three to four minutes.
    #[arg(long)]
    quick: bool,
    /// Only these topologies.
    #[arg(long, value_name = "NAME", conflicts_with = "quick")]
    topology: Vec<String>,
    /// Only this kernel.
    #[arg(long, value_enum, value_name = "V", conflicts_with = "quick")]
    kernel: Option<Kernel>,
    /// Only these checks: facts, backends, walls, walls-1, runs, reboots.
    #[arg(long, value_name = "NAME", conflicts_with = "quick")]
    check: Vec<String>,
}

/// What became of a row.
pub(super) enum Verdict {
    Passed(String),
    Failed(String),
    /// There is no such kernel here.
    Skipped,
}

/// Runs it.
///
/// # Errors
/// A row failed.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let topologies = choose(options)?;
    let kernels = match options.kernel {
        _ if options.quick => vec![Kernel::V6_12],
        Some(kernel) => vec![kernel],
        None if topologies.iter().any(|one| one.name == WALLED) => {
            vec![Kernel::V6_12, Kernel::Newest, Kernel::V6_1]
        }
        None => vec![Kernel::V6_12, Kernel::Newest],
    };
    let bed = Bed::new(NeedSpm::Yes)?;
    let (mut passed, mut failures, mut skipped) = (0, Vec::new(), 0);
    println!("{:<7} {:<9} {:<11} {:<9} {:<7} {:>5}", "kernel", "topology", "mode", "check", "result", "time");
    for kernel in kernels {
        // What cannot be fetched here is skipped; what was fetched has to work.
        let machine = match machine::fetch(&bed, kernel) {
            Ok(packages) => Ok(Machine::new(&bed, packages)?),
            Err(error) => Err(format!("{error:#}")),
        };
        match &machine {
            Ok(machine) => eprintln!("xtask: {} is {}", kernel.name(), machine.release()),
            Err(reason) => eprintln!("xtask: {} is skipped: {reason}", kernel.name()),
        }
        let modes = topologies.iter().flat_map(|topo| topo.modes.iter().map(move |mode| (topo, mode)));
        let checks = modes.flat_map(|(topo, mode)| {
            let is_wanted =
                |check: &&str| options.check.is_empty() || options.check.iter().any(|one| one == check);
            checks_of(kernel, topo, mode).into_iter().filter(is_wanted).map(move |check| (topo, mode, check))
        });
        for (topology, mode, check) in checks {
            let started = Instant::now();
            let row = format!("{:<7} {:<9} {:<11} {check:<9}", kernel.name(), topology.name, mode.name);
            let verdict = match &machine {
                Ok(machine) => run_check(&bed, machine, (topology, mode), check, options.quick)?,
                Err(_) => Verdict::Skipped,
            };
            let seconds = started.elapsed().as_secs();
            let (word, remark) = match verdict {
                Verdict::Passed(remark) => {
                    passed += 1;
                    ("pass", remark)
                }
                Verdict::Failed(log) => {
                    failures.push(format!("{}, {}, {}, {check}:\n{log}", kernel.name(), topology.name, mode.name));
                    ("FAIL", String::new())
                }
                Verdict::Skipped => {
                    skipped += 1;
                    ("skip", "not fetched".to_owned())
                }
            };
            println!("{}", format!("{row} {word:<7} {seconds:>3} s  {remark}").trim_end());
            stdout().flush().context("cannot write the table")?;
        }
    }
    println!("{passed} passed, {} failed, {skipped} skipped", failures.len());
    for failure in &failures {
        eprintln!("\n{failure}");
    }
    ensure!(failures.is_empty(), "{} of the checks failed", failures.len());
    Ok(if passed > 0 { ExitCode::SUCCESS } else { ExitCode::from(EXIT_SKIPPED) })
}

fn checks_of(kernel: Kernel, topology: &Topology, mode: &Mode) -> Vec<&'static str> {
    let is_walled = topology.name == WALLED;
    if kernel == Kernel::V6_1 {
        return if is_walled { vec!["walls-1"] } else { Vec::new() };
    }
    let has_device = WITH_DEVICE.contains(&(topology.name.as_str(), mode.name.as_str()));
    let which = [
        ("facts", true),
        ("backends", true),
        ("walls", is_walled),
        ("runs", is_walled || has_device),
        ("reboots", mode.setup_again.is_some()),
    ];
    which.into_iter().filter(|(_, is_wanted)| *is_wanted).map(|(check, _)| check).collect()
}

fn choose(options: &Options) -> anyhow::Result<Vec<Topology>> {
    if options.quick {
        return QUICK.iter().map(|name| Topology::load(name)).collect();
    }
    if !options.topology.is_empty() {
        return options.topology.iter().map(|name| Topology::load(name)).collect();
    }
    Topology::load_all()
}

fn run_check(
    bed: &Bed,
    machine: &Machine,
    (topology, mode): (&Topology, &Mode),
    check: &str,
    is_quick: bool,
) -> anyhow::Result<Verdict> {
    if check == "reboots" {
        return reboots::check(bed, machine, (topology, mode), is_quick);
    }
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let words: &[&str] = match check {
        "walls" if is_quick => &["program", "vm-wall", "--quick", "--spm"],
        "walls" => &["program", "vm-wall", "--spm"],
        "walls-1" => &["program", "vm-wall", "--version-1", "--spm"],
        "runs" if is_quick => &["program", "vm-runs", "--quick", "--spm"],
        "runs" => &["program", "vm-runs", "--spm"],
        "backends" => &["program", "vm-backends", "--topology", &topology.name, "--mode", &mode.name],
        _ => &["program", "vm-facts", "--topology", &topology.name, "--mode", &mode.name, "--spm"],
    };
    let mut command: Vec<OsString> =
        [own.into_os_string()].into_iter().chain(words.iter().map(OsString::from)).collect();
    if words.ends_with(&["--spm"]) {
        command.push(bed.spm()?.into());
    }
    let log = bed.dir.join("check.log");
    let file = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
    let mut ending = machine.run((topology, mode), &command, LIMIT, file.into(), None)?;
    for _ in 0..RETRIES {
        let Ending::NoEmulator(how) = &ending else { break };
        eprintln!("xtask: {} {}: the emulator failed, {how}: once more", topology.name, mode.name);
        let file = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        ending = machine.run((topology, mode), &command, LIMIT, file.into(), None)?;
    }
    let said = String::from_utf8_lossy(&fs::read(&log)?).trim_end().to_owned();
    Ok(match ending {
        Ending::Status(0) => Verdict::Passed(said.lines().last().unwrap_or_default().to_owned()),
        Ending::Status(status) => Verdict::Failed(format!("{said}\nstatus {status}")),
        Ending::NoSetup(what) => Verdict::Failed(format!("the set-up failed: {}", what.trim_end())),
        Ending::Silent(what) => Verdict::Failed(format!("{said}\n{what}")),
        Ending::Cut => unreachable!("nothing is kept"),
        Ending::NoEmulator(how) => {
            Verdict::Failed(format!("{said}\nthe emulator failed {} times: {how}", RETRIES + 1))
        }
    })
}
