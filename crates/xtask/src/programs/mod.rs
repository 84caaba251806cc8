//! Programs of this tree that are measured: plain Rust, unaware of spmem, checking their own data.

pub(crate) mod access;
pub(crate) mod corpus;
pub(crate) mod heat;
pub(crate) mod kernels;
mod shared_map;
pub(crate) mod values;
mod vm_backends;
mod vm_facts;
mod vm_heat;
mod vm_nodes;
mod vm_poison_probe;
mod vm_reboots;
mod vm_runs;
mod vm_runs_dax;
mod vm_runs_disk;
mod vm_runs_probe;
mod vm_wall;
mod vm_wall_doors;
mod vm_wall_probe;
mod vm_wall_rights;

use clap::Subcommand;

/// Which program.
#[derive(Subcommand)]
pub(crate) enum Program {
    /// Random access to pages of real-looking data, every access checked.
    Access(access::Options),
    /// A CPU-bound, a memory-bound or an allocating loop.
    Kernel(kernels::Options),
    /// A hot set that moves through a large cold one, and who follows it.
    Heat(heat::Options),
    /// Threads over one shared hash map.
    SharedMap(shared_map::Options),
    /// In a virtual machine: is the memory what the topology's file promises?
    VmFacts(vm_facts::Options),
    /// In a virtual machine: does `spm wall` keep what it promises?
    VmWall(vm_wall::Options),
    /// In a virtual machine: can the sources of heat be used that its kernel has?
    VmHeat,
    /// What a program behind a wall tries.
    VmWallProbe(vm_wall_probe::Options),
    /// In a virtual machine: do cold pages of runs go to a node of the kernel's, or to a dax device, and stay whole?
    VmRuns(vm_runs::Options),
    /// What a program does whose pages are placed.
    VmRunsProbe(vm_runs_probe::Options),
    /// What a program does whose memory fails.
    VmPoisonProbe(vm_poison_probe::Options),
    /// In a virtual machine: does every kind of node hold what all must?
    VmBackends(vm_backends::Options),
    /// In a virtual machine that boots more than once: is a persistent node what it was?
    VmReboots(vm_reboots::Options),
}

/// Runs it.
pub(crate) fn run(program: &Program) -> anyhow::Result<()> {
    match program {
        Program::Access(options) => access::run(options),
        Program::Kernel(options) => kernels::run(options),
        Program::Heat(options) => heat::run(options),
        Program::SharedMap(options) => shared_map::run(options),
        Program::VmFacts(options) => vm_facts::run(options),
        Program::VmWall(options) => vm_wall::run(options),
        Program::VmHeat => vm_heat::run(),
        Program::VmWallProbe(options) => vm_wall_probe::run(options),
        Program::VmRuns(options) => vm_runs::run(options),
        Program::VmRunsProbe(options) => vm_runs_probe::run(options),
        Program::VmPoisonProbe(options) => vm_poison_probe::run(options),
        Program::VmBackends(options) => vm_backends::run(options),
        Program::VmReboots(options) => vm_reboots::run(options),
    }
}
