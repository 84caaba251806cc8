//! The command line: what `spm` is asked to do, and its help.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use spmem_core::policy::{Flags, Mode};

use crate::config::EXAMPLE;
use crate::size::{Slowdown, SysramLimit};
use crate::wall::GuardName;

const EXIT_STATUS: &str = "\
Exit status: that of COMMAND, 128+N when signal N ended it; 125 when spm itself fails or
refuses; 126 when COMMAND cannot be executed; 127 when it is not found.";

const RUN_EXAMPLES: &str = "Examples:
  spm run --sysram 512M --report -- redis-server --port 7777
  spm run --sysram 25% --json out.json -- sort -S 90% big.txt
  spm run --sysram auto --slowdown 3% --svg ram.svg -- ./server";

/// Specific-purpose memory for stock Linux: walls first, then explicit holes.
#[derive(Parser)]
#[command(name = "spm", version, disable_help_subcommand = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub action: Action,
}

/// What to do.
#[derive(Subcommand)]
pub enum Action {
    /// Run a program inside a RAM budget, its cold pages on a walled-off compressed node
    #[command(after_help = format!("{EXIT_STATUS}\n\n{RUN_EXAMPLES}"), after_long_help = run_long_help())]
    Run(RunArguments),
    /// List the nodes: this machine's, what special memory it has besides, and spmem's own
    #[command(after_help = NODES_HELP, after_long_help = nodes_long_help())]
    Nodes(NodesArguments),
    /// Tell which nodes a request would get, and what stands in the way of the others
    #[command(after_help = EXPLAIN_HELP, after_long_help = explain_long_help())]
    Explain(ExplainArguments),
    /// Run a program behind a wall that the kernel keeps: no SPM node is reached by it, or by strict bind only
    #[command(after_help = format!("{EXIT_STATUS}\n\n{WALL_EXAMPLES}"), after_long_help = wall_long_help())]
    Wall(WallArguments),
    /// Tell who has pages on which SPM node, and who has them without being meant to
    #[command(after_help = AUDIT_HELP)]
    Audit(AuditArguments),
    /// Show on this machine, in about 15 seconds, what the walls refuse and how pages leave and come back
    Tour,
    /// The program that `spm tour` runs: fills memory, touches it, checks every byte
    #[command(name = "tour-load", hide = true)]
    TourLoad(LoadArguments),
}

/// Options of `spm run`.
#[derive(Args)]
pub struct RunArguments {
    /// RAM that the managed memory of COMMAND and all its children may take: 512M, 2G, 25% of the machine's, max, or auto
    /// for the smallest at which it stays within --slowdown [default: max]
    #[arg(long, value_name = "SIZE|PCT%|max|auto", allow_hyphen_values = true)]
    pub sysram: Option<SysramLimit>,
    /// With --sysram auto: how much slower COMMAND may become [default: 5%]
    #[arg(long, value_name = "PCT%", allow_hyphen_values = true)]
    pub slowdown: Option<Slowdown>,
    /// Draw RAM, demand and what COMMAND lost over time into FILE
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print a table at the end, on stderr or into FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub report: Option<Option<PathBuf>>,
    /// Write the report as one JSON object to FILE, - for stdout
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write what happens to pages to FILE, a line of JSON each, for `cargo xtask sim --replay`
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Read defaults and nodes from this TOML file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub wall: WallFlags,
    /// Run what cannot be managed or walled off anyway, without, and say so on stderr
    #[arg(long)]
    pub best_effort: bool,
    /// The program and its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true)]
    pub command: Vec<OsString>,
}

/// What a wall is to be like.
#[derive(Args, Clone, Debug)]
pub struct WallFlags {
    /// The kernel's nodes that the tree may use: 0,2-3, or all for the sysram nodes
    /// [default: the sysram nodes; with --guard easy the SPM nodes, too]
    #[arg(long, value_name = "LIST")]
    pub mems: Option<String>,
    /// Of these, the nodes for whoever names none [default: all that are sysram]
    #[arg(long, value_name = "LIST")]
    pub sysram_nodes: Option<String>,
    /// How hard the wall is: hard (nothing lands on an SPM node) or easy (strict bind may name it) [default: hard]
    #[arg(long, value_name = "hard|easy")]
    pub guard: Option<GuardName>,
}

impl WallFlags {
    /// Whether a wall is asked for at all.
    pub const fn is_wanted(&self) -> bool {
        self.mems.is_some() || self.sysram_nodes.is_some() || self.guard.is_some()
    }
}

/// Options of `spm wall`.
#[derive(Args)]
#[command(mut_arg("sysram_nodes", |arg| arg.visible_alias("sysram")))]
pub struct WallArguments {
    #[command(flatten)]
    pub wall: WallFlags,
    /// Where the kernel cannot be made to keep the wall, set the policy alone and say what that leaves open
    #[arg(long)]
    pub best_effort: bool,
    /// Read types and classes of nodes from this TOML file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The program and its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true)]
    pub command: Vec<OsString>,
}

/// Options of `spm audit`.
#[derive(Args)]
pub struct AuditArguments {
    /// Processes to look at [default: all]
    #[arg(value_name = "PID")]
    pub processes: Vec<u32>,
    /// Look at all processes
    #[arg(long, conflicts_with = "processes")]
    pub all: bool,
    /// Print a JSON array instead of a table
    #[arg(long)]
    pub json: bool,
    /// Read types and classes of nodes from this TOML file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Options of `spm nodes`.
#[derive(Args)]
pub struct NodesArguments {
    /// Print a JSON array instead of a table; sizes are integers in bytes
    #[arg(long)]
    pub json: bool,
    /// Sizes for people: 23.5G
    #[arg(short = 'u', long)]
    pub human: bool,
    /// Processors, tiers, the firmware's figures and distances also on a machine of one node; and what tells here which
    /// pages a program uses
    #[arg(short, long)]
    pub verbose: bool,
    /// Measure latency and bandwidth of each node of the kernel, about two seconds a node
    #[arg(long)]
    pub measure: bool,
    /// Draw nodes, distances and walls into FILE
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Read nodes and classes from this TOML file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Make the files of the configuration's nodes of kind "file" that are not there
    #[arg(long, requires = "config")]
    pub create: bool,
}

/// Options of `spm explain`.
#[derive(Args)]
pub struct ExplainArguments {
    /// Where the request comes from
    #[arg(long, value_name = "PATH", default_value = "/")]
    pub domain: String,
    /// The nodes it names: 0,2-3, !1, or all (the default ones); none named means the default
    #[arg(long, value_name = "LIST")]
    pub nodes: Option<String>,
    /// How strongly it names them, as mpol= of tmpfs(5) has it: bind, preferred, preferred-many, interleave,
    /// weighted-interleave, local or default, with =static, =relative or =balancing behind, or one of the first two
    /// and the last as =static|balancing [default: bind where nodes are named]
    #[arg(long, value_name = "MODE[=FLAG]")]
    pub policy: Option<PolicyName>,
    /// The home node of the policy, bind or preferred-many, as set_mempolicy_home_node(2) sets it: what is nearest to it
    /// comes first
    #[arg(long, value_name = "NODE")]
    pub home: Option<u16>,
    /// The node of the processor that the request runs on, as numactl --cpunodebind chooses it: what is nearest to it comes
    /// first, unless a home node is given
    #[arg(long, value_name = "NODE")]
    pub local: Option<u16>,
    /// A grant that is shown, by name, or NODES:RIGHT,RIGHT for one that the nodes' owner might give; may be repeated
    #[arg(long, value_name = "GRANT")]
    pub grant: Vec<String>,
    /// The machine, described in a TOML file [default: that of spm run]
    #[arg(long, value_name = "FILE")]
    pub machine: Option<PathBuf>,
    /// This machine's own nodes, by the kernel's numbers, behind a wall as spm wall makes it; the domain / is this process's
    /// cpuset
    #[arg(long, conflicts_with = "machine")]
    pub here: bool,
    /// How hard the wall around this machine's special-purpose nodes is: hard or easy [default: hard]
    #[arg(long, value_name = "GUARD", requires = "here")]
    pub guard: Option<GuardName>,
    /// Read classes and types of this machine's nodes from a TOML file
    #[arg(long, value_name = "FILE", requires = "here")]
    pub config: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// A mode of mempolicy(7) and its flag.
#[derive(Clone, Copy, Debug)]
pub struct PolicyName {
    /// How nodes are chosen.
    pub mode: Mode,
    /// What comes with it.
    pub flags: Flags,
}

impl FromStr for PolicyName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mode, flag) = text.split_once('=').map_or((text, None), |(mode, flag)| (mode, Some(flag)));
        let names = Mode::ALL.map(Mode::name);
        let Some(mode) = Mode::ALL.into_iter().find(|known| known.name() == mode) else {
            return Err(format!("there is no mode `{mode}`; there are {}", names.join(", ")));
        };
        let mut flags = Flags::empty();
        for flag in flag.iter().flat_map(|flags| flags.split('|')) {
            flags |= match flag {
                "static" => Flags::STATIC_NODES,
                "relative" => Flags::RELATIVE_NODES,
                "balancing" => Flags::NUMA_BALANCING,
                _ => return Err(format!("there is no flag `{flag}`; there are static, relative and balancing")),
            };
        }
        Ok(Self { mode, flags })
    }
}

/// Options of the tour's program.
#[derive(Args)]
pub struct LoadArguments {
    /// Memory to fill, MiB
    #[arg(long, default_value_t = 256)]
    pub mebibytes: usize,
    /// How long to touch it, milliseconds
    #[arg(long, default_value_t = 8000)]
    pub touch_ms: u64,
}

const WALL_EXAMPLES: &str = "Examples:
  spm wall -- numactl --interleave=all ./server
  spm wall --mems 0-2 --guard easy -- numactl --membind=2 ./loader";

fn wall_long_help() -> String {
    format!(
        "{EXIT_STATUS}\n\n{WALL_EXAMPLES}\n\n\
         A hard wall is a cgroup whose cpuset lacks the SPM nodes: the kernel trims wide masks, refuses those that name\n\
         nothing else, and never falls back to such a node. It takes root or a delegated cgroup. An easy guard starts the\n\
         program bound to the sysram nodes and asks about each policy call: strict bind may name an SPM node, other\n\
         modes lose it. It is a convenience for programs that mean well, no boundary. docs/walls.md has both, call by call.\n\n\
         Which of the kernel's nodes are SPM: those of class 4 to 6 as spm nodes has them, and what [type] says:\n\n{EXAMPLE}"
    )
}

const AUDIT_HELP: &str = "\
Exit status: 0 when every page on an SPM node is there on purpose, 1 when one is not, 2 for a wrong command line, or when
a process cannot be looked at.

Examples:
  spm audit --config wall.toml
  spm audit --json 4711

On purpose means: bound there by name behind an easy guard, come through a door, or placed or copied by a run of spm. The JSON
has an object for each process, node and reason: pid, command, node, kind (numa: the kernel's node of that number; compressed,
file, dax: the run's own, by its configuration), pages, bytes (what they take there), wall (hard, easy or null), by (bind, door,
run or null), is_clean. Where several processes are named, those that can be looked at are. What a run has copied is read from the
page that it shares with its processes: that takes CAP_SYS_ADMIN and the same version of spm.";

const NODES_HELP: &str = "\
Exit status: 0, 1 when something failed, 2 for a wrong command line. What cannot be read is said on
stderr and left out.

Examples:
  spm nodes -u
  spm nodes --measure --json
  spm nodes --svg nodes.svg";

fn nodes_long_help() -> String {
    format!(
        "{NODES_HELP}\n\n\
         Nodes come in this order: the kernel's (type sysram), and those that are there as a device only, such as\n\
         memory in devdax mode (type spm, owner its driver: who may open the device gets it); then those that spmem\n\
         makes itself. spmem numbers its own apart, as spm run and spm explain have them.\n\n\
         The class follows from what the machine tells: 6 persistent, 5 a coherent accelerator's, else by the latency\n\
         from the nearest processors (HMAT, or CXL's own tables): 1 below 100 ns, 2 to 300 ns, 3 beyond. Where none is\n\
         told, memory of processors is 1, and what the kernel's tier, the distance or a CXL link puts below that is\n\
         2. Nothing in Linux tells class 4, memory that compresses: [class] of the configuration gives it, or any other.\n\n\
         JSON (--json): first an object for each node. Always there: node, type, class, services, guard, owner,\n\
         capacity, used, free (bytes; guard is null for sysram, used and free for devices). Where known: origin (kernel,\n\
         device, spmem), class_name, class_reason, cpus, distances, tier, access and any_initiator (latencies in ns,\n\
         bandwidths in MiB/s, from the best processors and from the best initiators of any kind), devices, measured.\n\
         Then, where there are any, an object for each kind of device, as cxl list, daxctl list and ndctl list have\n\
         them: dax, namespaces, memdevs, regions, soft_reserved (the last for root only); with -v heat, too.\n\n\
         --measure binds memory to each node, sees to it that every page is there, and follows a random ring through\n\
         it (idle latency), the same beside readers on other processors (loaded latency), then reads and writes in order.\n\
         It takes four last-level caches of memory on each node, at most half of what is available and 1G. Where its\n\
         figures and the firmware's are far apart (half as much again for latency, twice for bandwidth) it says so.\n\n\
         Configuration (--config), every key with its default:\n\n{EXAMPLE}"
    )
}

const EXPLAIN_HELP: &str = "\
Exit status: 0 when at least one node is allowed, 1 when none is, 2 for a wrong command line or machine.

Examples:
  spm explain --nodes 0-1 --policy interleave
  spm explain --nodes 1 --grant cram
  spm explain --here --nodes 0-3 --policy interleave
  spm explain --machine host.toml --nodes 0,2 --policy preferred-many --home 2 --local 0
  spm explain --machine host.toml --domain /batch/job --nodes 3 --grant 3:alloc";

fn explain_long_help() -> String {
    format!("{EXPLAIN_HELP}\n\nA machine (--machine), with every key:\n\n{}", crate::explain::EXAMPLE)
}

fn run_long_help() -> String {
    format!(
        "{EXIT_STATUS}\n\n{RUN_EXAMPLES}\n\n\
         Signals sent to spm reach COMMAND, which shares its process group, session and terminal.\n\
         Children of COMMAND are managed, too; those that outlive it go on without the report. What\n\
         cannot be managed (statically linked, setuid, for another architecture) is refused.\n\n\
         Configuration (--config), every key with its default:\n\n{EXAMPLE}"
    )
}
