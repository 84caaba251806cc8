//! `cargo xtask vm-test`: every topology, mode and kernel, and what a program in the guest says of it.
//!
//! Two checks in one guest, both of [`programs`](crate::programs): `vm-facts`, is the memory there that the topology's file
//! promises, and does spmem's discovery find it; `vm-backends`, does every kind of node there hold what all must. A row is
//! passed, failed, or skipped with its reason; a skip is never a pass. Guests run one after the other.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Write, stdout};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::archive::Kernel;
use super::machine::{self, Ending, Machine};
use super::topology::{Mode, Topology};
use crate::launch::{Bed, NeedSpm};

/// What is checked, in order.
const CHECKS: [&str; 2] = ["facts", "backends"];
/// What fits in five minutes.
const QUICK: [&str; 3] = ["numa4", "hmem", "cxl"];
const LIMIT: Duration = Duration::from_secs(180);

/// Which part of the matrix.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// Only numa4, hmem and cxl on 6.12: five minutes.
    #[arg(long)]
    quick: bool,
    /// Only these topologies.
    #[arg(long, value_name = "NAME", conflicts_with = "quick")]
    topology: Vec<String>,
    /// Only this kernel.
    #[arg(long, value_enum, value_name = "V", conflicts_with = "quick")]
    kernel: Option<Kernel>,
}

/// What became of a row.
enum Verdict {
    Passed(String),
    Failed(String),
    /// There is no such kernel here.
    Skipped,
}

/// Runs it.
///
/// # Errors
/// A row failed, or none was run.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let topologies = choose(options)?;
    let kernels = match options.kernel {
        _ if options.quick => vec![Kernel::V6_12],
        Some(kernel) => vec![kernel],
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
        for (topology, mode) in topologies.iter().flat_map(|topo| topo.modes.iter().map(move |mode| (topo, mode)))
        {
            let started = Instant::now();
            let verdicts = match &machine {
                Ok(machine) => check(&bed, machine, topology, mode)?,
                Err(_) => CHECKS.map(|_| Verdict::Skipped),
            };
            // One guest makes all checks: the time is that of all.
            let seconds = started.elapsed().as_secs();
            for (name, verdict) in CHECKS.into_iter().zip(verdicts) {
                let row = format!("{:<7} {:<9} {:<11} {name:<9}", kernel.name(), topology.name, mode.name);
                let (word, remark) = match verdict {
                    Verdict::Passed(remark) => {
                        passed += 1;
                        ("pass", remark)
                    }
                    Verdict::Failed(log) => {
                        failures.push(format!("{}, {}, {}:\n{log}", kernel.name(), topology.name, mode.name));
                        ("FAIL", String::new())
                    }
                    Verdict::Skipped => {
                        skipped += 1;
                        ("skip", "not fetched".to_owned())
                    }
                };
                println!("{}", format!("{row} {word:<7} {seconds:>3} s  {remark}").trim_end());
            }
            stdout().flush().context("cannot write the table")?;
        }
    }
    println!("{passed} passed, {} failed, {skipped} skipped", failures.len());
    for failure in &failures {
        eprintln!("\n{failure}");
    }
    ensure!(failures.is_empty(), "{} of the checks failed", failures.len());
    ensure!(passed > 0, "nothing could be checked");
    Ok(())
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

/// Both checks in one guest; which of them failed is in its status.
const SCRIPT: &str = r#"
"$1" program vm-facts --topology "$2" --mode "$3" --spm "$4"; facts=$?
echo "$5"
"$1" program vm-backends --topology "$2" --mode "$3"; backends=$?
exit $(( (facts != 0) + 2 * (backends != 0) ))
"#;
/// Between the two checks' output.
const DIVIDE: &str = "-- back ends";

fn check(bed: &Bed, machine: &Machine, topology: &Topology, mode: &Mode) -> anyhow::Result<[Verdict; 2]> {
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command: Vec<OsString> = ["sh", "-c", SCRIPT, "sh"].map(OsString::from).into();
    command.push(own.into_os_string());
    command.extend([&topology.name, &mode.name].map(OsString::from));
    command.extend([bed.spm()?.into(), DIVIDE.into()]);
    let log = bed.dir.join("checks.log");
    let file = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
    let ending = machine.run((topology, mode), &command, LIMIT, file.into())?;
    let said = String::from_utf8_lossy(&fs::read(&log)?).trim_end().to_owned();
    let (facts, backends) = said.split_once(DIVIDE).unwrap_or((&said, ""));
    let verdict = |said: &str, is_right: bool, ending: &str| {
        let said = said.trim();
        if is_right {
            Verdict::Passed(said.lines().last().unwrap_or_default().to_owned())
        } else {
            Verdict::Failed(format!("{said}\n{ending}"))
        }
    };
    Ok(match ending {
        Ending::Status(status @ 0..=3) => {
            let told = format!("status {status}");
            [verdict(facts, status & 1 == 0, &told), verdict(backends, status & 2 == 0, &told)]
        }
        Ending::Status(status) => {
            let told = format!("status {status}");
            [verdict(facts, false, &told), verdict(backends, false, &told)]
        }
        Ending::NoSetup(what) => {
            let told = format!("the set-up failed: {}", what.trim_end());
            [verdict(facts, false, &told), verdict(backends, false, &told)]
        }
        Ending::Silent(what) => [verdict(facts, false, &what), verdict(backends, false, &what)],
    })
}
