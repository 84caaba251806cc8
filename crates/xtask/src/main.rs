//! `cargo xtask`: real programs under `spm run`, and the benches beside a peer.
//!
//! [`workloads`] runs unmodified programs with and without a budget and compares what they print; [`mod@bench`] measures
//! speed: a program that fits its budget, and kernel swap on zram at equal total RAM. [`sim`] runs simulated machines,
//! [`vm`] virtual ones with NUMA, CXL and persistent memory. [`programs`] are the programs
//! of this tree that are measured; they know nothing of spmem. [`launch`] starts all of them, bare, under `spm`, or
//! in a memory cgroup. Nothing here is a test of one crate: `cargo test` does not run it.
//!
//! Exit status: 0 when everything ran and every output was the same, 1 otherwise, 2 for a wrong command line;
//! that of `vm` is the status of the command it ran.
#![allow(
    clippy::cast_possible_truncation,
    reason = "64-bit Linux only; what is cast are figures for a table and indices below 2^32"
)]

mod bench;
mod cleanup;
mod figures;
mod launch;
mod packages;
mod process_tree;
mod programs;
mod redis;
mod report;
mod sim;
mod sim_programs;
mod vm;
mod workloads;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Real programs and benches of spmem.
#[derive(Parser)]
#[command(name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run real programs under a RAM budget and compare their output with an unmanaged run.
    Workloads(workloads::Options),
    /// Measure speed; print ratios.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Simulate machines on the memory manager, seed by seed, and hold every step against the rules.
    Sim(sim::Options),
    /// Run a command in a virtual machine with unusual memory; passes its exit status out.
    Vm(vm::Options),
    /// Check in virtual machines what the topologies promise; print a table.
    VmTest(vm::matrix::Options),
    /// A program of this tree that the other tasks measure.
    #[command(subcommand, hide = true)]
    Program(programs::Program),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.task {
        Task::Vm(options) => guarded(|| vm::run(&options)),
        Task::VmTest(options) => guarded(|| vm::matrix::run(&options)),
        Task::Workloads(options) => succeeding(guarded(|| workloads::run(&options))),
        Task::Bench(which) => succeeding(guarded(|| bench::run(&which))),
        Task::Sim(options) => succeeding(sim::run(&options)),
        Task::Program(program) => succeeding(programs::run(&program)),
    };
    match outcome {
        Ok(status) => status,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn succeeding(outcome: anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    outcome.map(|()| ExitCode::SUCCESS)
}

/// Runs a task that starts processes or changes the machine: what it made is undone however it ends.
fn guarded<T>(task: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    cleanup::install()?;
    let outcome = task();
    cleanup::wait_if_interrupted();
    outcome
}
