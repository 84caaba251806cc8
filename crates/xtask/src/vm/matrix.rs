//! `cargo xtask vm-test`: every topology, mode and kernel, and what a program in the guest says of it.
//!
//! Six checks, all of [`programs`](crate::programs): `vm-facts`, is the memory there that the topology's file promises, and
//! does spmem's discovery find it; `vm-backends`, does every kind of node there hold what all must; on [`WALLED`] `vm-wall`, does
//! `spm wall` keep what docs/walls.md says (on 6.1, with cgroup version 1); there and on [`WITH_DEVICE`] `vm-runs`, do cold pages of runs go
//! to a node, or to a device, and stay whole; on [`WALLED`] `vm-heat`, can the sources of heat be used that the kernel has; where a medium
//! outlives its guest `vm-reboots`, is a persistent node what it was. Each in a guest of its own, the last in several; of the few ([`QUICK`])
//! several share one. A row is passed, failed, or skipped with its reason; a skip is never a pass. Guests run one after the other.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Write, stdout};
use std::os::unix::ffi::OsStringExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::archive::Kernel;
use super::machine::{self, Ending, Machine, quote};
use super::reboots;
use super::topology::{Mode, Topology};
use crate::launch::{Bed, NeedSpm};

/// Kernel, topology, mode, and checks with their parts.
type Few = (Kernel, &'static str, &'static str, &'static [(&'static str, &'static str)]);

/// What fits in five minutes: the kernel, the topology, its mode, and the checks, one after another in one guest, with what is
/// tried of them; nothing is all.
const QUICK: [Few; 7] = [
    (
        Kernel::V6_12,
        "numa4",
        "plain",
        &[
            ("facts", ""),
            ("walls", "few,delegated"),
            ("runs", "write fenced,read --mib 16,failed held,delegated,slow write,broken"),
        ],
    ),
    (
        Kernel::V6_12,
        "hmem",
        "devdax",
        &[("facts", ""), ("backends", ""), ("runs", "write --mib 16,several,killed,mapped,failed,gone")],
    ),
    (Kernel::V6_12, "cxl", "devdax", &[("facts", ""), ("backends", "")]),
    (
        Kernel::Newest,
        "numa4",
        "plain",
        &[("heat", ""), ("walls", "few,doors"), ("runs", "hot open,fork open,failed held")],
    ),
    (Kernel::Newest, "hmem", "devdax", &[("facts", ""), ("runs", "fork --mib 8,gone")]),
    (Kernel::Newest, "nvdimm", "ext4", &[("reboots", "few")]),
    (Kernel::V6_1, "numa4", "plain", &[("walls-1", "few,own")]),
];
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
    /// The most telling few of each: at most five minutes on two quiet processors.
    #[arg(long)]
    quick: bool,
    /// Only these topologies.
    #[arg(long, value_name = "NAME", conflicts_with = "quick")]
    topology: Vec<String>,
    /// Only this kernel.
    #[arg(long, value_enum, value_name = "V", conflicts_with = "quick")]
    kernel: Option<Kernel>,
    /// Only these checks: facts, backends, walls, walls-1, runs, heat, reboots.
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

/// A line of the table: what is checked in one guest, and what of it.
struct Row {
    kernel: Kernel,
    topology: Topology,
    mode: usize,
    checks: Vec<(&'static str, &'static str)>,
}

impl Row {
    fn mode(&self) -> &Mode {
        &self.topology.modes[self.mode]
    }

    fn names(&self) -> String {
        self.checks.iter().map(|(check, _)| *check).collect::<Vec<_>>().join("+")
    }
}

/// Runs it.
///
/// # Errors
/// A row failed.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let rows = if options.quick { few_rows()? } else { all_rows(options)? };
    let bed = Bed::new(NeedSpm::Yes)?;
    let (mut passed, mut failures, mut skipped) = (0, Vec::new(), 0);
    println!("{:<7} {:<9} {:<11} {:<9} {:<7} {:>5}", "kernel", "topology", "mode", "check", "result", "time");
    for rows in rows.chunk_by(|one, other| one.kernel == other.kernel) {
        let kernel = rows[0].kernel;
        // What cannot be fetched here is skipped; what was fetched has to work.
        let machine = match machine::fetch(&bed, kernel) {
            Ok(packages) => Ok(Machine::new(&bed, packages)?),
            Err(error) => Err(format!("{error:#}")),
        };
        match &machine {
            Ok(machine) => eprintln!("xtask: {} is {}", kernel.name(), machine.release()),
            Err(reason) => eprintln!("xtask: {} is skipped: {reason}", kernel.name()),
        }
        for row in rows {
            let started = Instant::now();
            let what = format!(
                "{:<7} {:<9} {:<11} {:<9}",
                kernel.name(),
                row.topology.name,
                row.mode().name,
                row.names()
            );
            let verdict = match &machine {
                Ok(machine) => run_row(&bed, machine, row)?,
                Err(_) => Verdict::Skipped,
            };
            let seconds = started.elapsed().as_secs();
            let (word, remark) = match verdict {
                Verdict::Passed(remark) => {
                    passed += 1;
                    ("pass", remark)
                }
                Verdict::Failed(log) => {
                    let name = &row.topology.name;
                    failures.push(format!(
                        "{}, {name}, {}, {}:\n{log}",
                        kernel.name(),
                        row.mode().name,
                        row.names()
                    ));
                    ("FAIL", String::new())
                }
                Verdict::Skipped => {
                    skipped += 1;
                    ("skip", "not fetched".to_owned())
                }
            };
            println!("{}", format!("{what} {word:<7} {seconds:>3} s  {remark}").trim_end());
            stdout().flush().context("cannot write the table")?;
        }
    }
    println!("{passed} passed, {} failed, {skipped} skipped", failures.len());
    if options.quick {
        say_what_is_left(&rows)?;
    }
    for failure in &failures {
        eprintln!("\n{failure}");
    }
    ensure!(failures.is_empty(), "{} of the checks failed", failures.len());
    Ok(if passed > 0 { ExitCode::SUCCESS } else { ExitCode::from(EXIT_SKIPPED) })
}

fn few_rows() -> anyhow::Result<Vec<Row>> {
    let row = |&(kernel, name, mode, checks): &Few| {
        let topology = Topology::load(name)?;
        let mode = topology.modes.iter().position(|one| one.name == mode).context("no such mode")?;
        Ok(Row { kernel, topology, mode, checks: checks.to_vec() })
    };
    QUICK.iter().map(row).collect()
}

fn all_rows(options: &Options) -> anyhow::Result<Vec<Row>> {
    let kernels = match options.kernel {
        Some(kernel) => vec![kernel],
        None => vec![Kernel::V6_12, Kernel::Newest, Kernel::V6_1],
    };
    let mut rows = Vec::new();
    for kernel in kernels {
        let topologies = match &options.topology[..] {
            [] => Topology::load_all()?,
            names => names.iter().map(|name| Topology::load(name)).collect::<Result<_, _>>()?,
        };
        for topology in topologies {
            for mode in 0..topology.modes.len() {
                let checks = checks_of(kernel, &topology, &topology.modes[mode]);
                let is_wanted =
                    |check: &&str| options.check.is_empty() || options.check.iter().any(|one| one == check);
                for check in checks.into_iter().filter(is_wanted) {
                    let topology = Topology::load(&topology.name)?;
                    rows.push(Row { kernel, topology, mode, checks: vec![(check, "")] });
                }
            }
        }
    }
    Ok(rows)
}

/// What the few leave to the whole: a skip that is said.
fn say_what_is_left(few: &[Row]) -> anyhow::Result<()> {
    let all = all_rows(&Options { quick: false, topology: Vec::new(), kernel: None, check: Vec::new() })?;
    let part_of = |row: &Row| {
        let same = few.iter().filter(|one| {
            (one.kernel, &one.topology.name, one.mode) == (row.kernel, &row.topology.name, row.mode)
        });
        same.flat_map(|one| &one.checks).find(|(check, _)| *check == row.checks[0].0).map(|(_, part)| *part)
    };
    for rows in all.chunk_by(|one, other| one.kernel == other.kernel) {
        let named =
            |row: &Row| few.iter().any(|one| (one.kernel, &one.topology.name) == (row.kernel, &row.topology.name));
        let mut left: Vec<String> = Vec::new();
        for row in rows.iter().filter(|row| part_of(row).is_none_or(|part| !part.is_empty())) {
            let (topology, what) = (&row.topology.name, format!("{} {}", row.mode().name, row.names()));
            let text = match part_of(row) {
                _ if !named(row) => topology.clone(),
                None => format!("{topology} {what}"),
                Some(_) => format!("the rest of {topology} {what}"),
            };
            if left.last() != Some(&text) {
                left.push(text);
            }
        }
        println!("left to vm-test without --quick on {}: {}", rows[0].kernel.name(), left.join(", "));
    }
    Ok(())
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
        ("heat", is_walled),
        ("reboots", mode.setup_again.is_some()),
    ];
    which.into_iter().filter(|(_, is_wanted)| *is_wanted).map(|(check, _)| check).collect()
}

fn run_row(bed: &Bed, machine: &Machine, row: &Row) -> anyhow::Result<Verdict> {
    let (topology, mode) = (&row.topology, row.mode());
    if let [("reboots", part)] = row.checks[..] {
        return reboots::check(bed, machine, (topology, mode), part);
    }
    let mut script = Vec::new();
    for check in &row.checks {
        script.extend(if script.is_empty() { "" } else { " && " }.bytes());
        for word in command_of(bed, topology, mode, *check)? {
            script.push(b' ');
            script.extend(quote(&word));
        }
    }
    let command = ["sh".into(), "-c".into(), OsString::from_vec(script)];
    let log = bed.dir.join("check.log");
    let mut tries = 0;
    let ending = loop {
        let file = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let ending = machine.run((topology, mode), &command, LIMIT, file.into(), None)?;
        match &ending {
            Ending::NoEmulator(how) if tries < RETRIES => {
                eprintln!("xtask: {} {}: the emulator failed, {how}: once more", topology.name, mode.name);
                tries += 1;
            }
            _ => break ending,
        }
    };
    let said = String::from_utf8_lossy(&fs::read(&log)?).trim_end().to_owned();
    Ok(match ending {
        Ending::Status(0) => Verdict::Passed(remark(&said, row.checks.len())),
        Ending::Status(status) => Verdict::Failed(format!("{said}\nstatus {status}")),
        Ending::NoSetup(what) => Verdict::Failed(format!("the set-up failed: {}", what.trim_end())),
        Ending::Silent(what) => Verdict::Failed(format!("{said}\n{what}")),
        Ending::Cut => unreachable!("nothing is kept"),
        Ending::NoEmulator(how) => {
            Verdict::Failed(format!("{said}\nthe emulator failed {} times: {how}", RETRIES + 1))
        }
    })
}

/// A program of this tree and its words.
fn command_of(
    bed: &Bed,
    topology: &Topology,
    mode: &Mode,
    (check, part): (&str, &str),
) -> anyhow::Result<Vec<OsString>> {
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let place = ["--topology", &topology.name, "--mode", &mode.name];
    let words: &[&str] = match check {
        "walls" => &["vm-wall"],
        "walls-1" => &["vm-wall", "--version-1"],
        "runs" => &["vm-runs"],
        "heat" => &["vm-heat"],
        "backends" => &[&["vm-backends"][..], &place].concat(),
        _ => &[&["vm-facts"][..], &place].concat(),
    };
    let mut command = vec![own.into_os_string(), "program".into()];
    command.extend(words.iter().map(OsString::from));
    if !["backends", "heat"].contains(&check) {
        command.extend(["--spm".into(), bed.spm()?.into()]);
    }
    if !part.is_empty() {
        command.extend(["--only".into(), part.into()]);
    }
    Ok(command)
}

/// The last line of what was said, or of several checks how much each has seen.
fn remark(said: &str, checks: usize) -> String {
    if checks == 1 {
        return said.lines().last().unwrap_or_default().to_owned();
    }
    let counts = said.lines().filter_map(|line| {
        let is_count = line.ends_with(" facts") || line.contains(" claims: ");
        line.split(':').next().filter(|_| is_count)
    });
    counts.collect::<Vec<_>>().join(", ")
}
