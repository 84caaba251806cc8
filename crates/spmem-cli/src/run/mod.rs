//! `spm run`: a program inside a RAM budget.
//!
//! One line, read downwards: [`run`] settles the options, opens the outputs, finds and checks the program, prepares
//! what its agents need ([`Management`]), and [`execute`] starts and supervises it. A refusal is decided before
//! anything is started.
//!
//! Exit status: the command's, 128+N when signal N ended it; [`FAILURE`], [`NOT_EXECUTABLE`], [`NOT_FOUND`] as env(1).

mod agent_file;
mod broker;
mod course;
mod elf;
mod encoder;
pub mod kernel;
mod loss;
mod orphans;
mod plot;
mod porter;
mod proc;
pub mod program;
mod report;
mod shared;
mod signals;
pub mod stdio;
mod supervise;
mod swap;
pub mod targets;
mod trace;
pub mod witness;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Resource, Rlimit};
use spmem::control::Control;
use spmem::protocol::SOCKET_ENV;
use spmem_node::roll::Roll;

use crate::arguments::RunArguments;
use crate::config::Config;
use crate::heat;
use crate::machine::Ram;
use crate::remark::remark;
use crate::size::SysramLimit;
use crate::wall;
use broker::{Broker, DESCRIPTORS_NEEDED};
use course::Course;
use porter::Porter;
pub use proc::read_pid_namespace;
use report::Outputs;
pub use report::Summary;
pub use shared::ControlPage;
use signals::Inherited;
use supervise::Supervisor;
use swap::Swap;
use targets::Targets;
use trace::Trace;

/// `spm` itself failed or refused.
pub const FAILURE: i32 = 125;
/// The command was found and cannot be executed.
const NOT_EXECUTABLE: i32 = 126;
/// The command was not found.
const NOT_FOUND: i32 = 127;

/// Runs what `options` ask for and gives the exit status.
///
/// # Errors
/// `spm` itself fails, or refuses to run the command; the message has the reason and a remedy.
pub fn run(options: &RunArguments) -> anyhow::Result<i32> {
    let config = Config::read(options.config.as_deref())?;
    let ram = Ram::read()?;
    let ram_bytes = ram.total_bytes;
    let sysram = options.sysram.unwrap_or(config.run.sysram);
    if options.slowdown.is_some() && sysram != SysramLimit::Auto {
        bail!("--slowdown is for --sysram auto; a budget that is given costs what it costs");
    }
    let slowdown = (sysram == SysramLimit::Auto).then(|| options.slowdown.unwrap_or(config.run.slowdown));
    match heat::check(config.run.heat) {
        Err(reason) if options.best_effort || config.run.best_effort => {
            remark(format_args!("heat = \"auto\" in its place: {reason:#}"));
        }
        checked => checked.context("refused")?,
    }
    let outputs = Outputs::open(options)?;

    refuse_small_files()?;
    let (name, path) = (&options.command[0], std::env::var_os("PATH"));
    let program = match program::find(name, path.as_deref()) {
        Ok(program) => program,
        Err(missing) => return Ok(say_not_started(name, &missing.into())),
    };
    let control = ControlPage::for_tree(sysram.bytes(ram_bytes), config.store_capacity.bytes(ram_bytes))?;
    encoder::give_back_what_is_freed();
    let targets = Targets::plan(&config).map_err(|reason| anyhow::anyhow!("refused: {reason:#}"))?;
    let swap = Swap::make(&targets).map_err(|reason| anyhow::anyhow!("refused: {reason:#}"))?;
    targets.publish(&control, &config)?;
    // Before the porter is forked, which is to have it, too: behind the wall nobody would be believed.
    let roll = Roll::new().context("no memory for the roll")?;
    targets.enroll(&roll, &control)?;
    // Before the wall: it has to reach what the program does not.
    let porter = if targets.has_mapped() { Some(Porter::start(&targets, &control)?) } else { None };
    if options.wall.is_wanted() {
        let company = porter.as_ref().map(Porter::pid);
        wall::enter(&options.wall, &config, options.best_effort || config.run.best_effort, company)?;
    }
    let management = match Management::prepare(&program, path.as_deref(), targets.copied().count()) {
        Ok(management) => Some(management),
        Err(reason) if options.best_effort || config.run.best_effort => {
            remark(format_args!("running unmanaged, without a budget: {reason:#}"));
            None
        }
        Err(reason) => bail!("refused: {reason:#}; or run it unmanaged with --best-effort"),
    };

    let management = management.map(|management| management.with(porter, swap));
    let job = Job { program: &program, command: &options.command, control: &control };
    let mut trace = options.trace.as_deref().map(|path| Trace::begin(path, &control)).transpose()?;
    let mut course = Course::begin(slowdown, ram);
    let outcome = execute(&job, management, &mut |control| {
        course.look(control);
        if let Some(trace) = &mut trace {
            trace.take(control);
        }
    })?;
    if let Some(trace) = trace {
        trace.end(&control);
    }
    let (exit_code, elapsed) = match outcome {
        Outcome::Ended { exit_code, elapsed } => (exit_code, elapsed),
        Outcome::NotStarted(error) => return Ok(say_not_started(name, &error)),
    };
    let summary = Summary::collect(&control, &options.command, exit_code, elapsed, ram_bytes, course.report());
    if let Err(error) = outputs.write(&summary, &course) {
        remark(format_args!("{error:#}"));
    }
    Ok(exit_code)
}

/// What the agents of a tree need.
pub struct Management {
    broker: Broker,
    agent: PathBuf,
}

impl Management {
    /// Checks that `program` can be managed here, with pages copied to so many nodes, and prepares for it.
    ///
    /// # Errors
    /// It cannot; the message has the reason and a remedy.
    pub fn prepare(program: &Path, path: Option<&OsStr>, copied: usize) -> anyhow::Result<Self> {
        if let Some(obstacle) = program::check(program, path) {
            bail!("{obstacle}");
        }
        check_descriptor_limits(copied)?;
        let userfaultfd = kernel::open().map_err(|lack| anyhow::anyhow!("{lack}"))?;
        let agent = agent_file::install()?;
        Ok(Self { broker: Broker::listen(userfaultfd, &agent)?, agent })
    }

    /// With a porter, for runs that place pages on mapped nodes, and with swap files.
    #[must_use]
    pub fn with(mut self, porter: Option<Porter>, swap: Option<Swap>) -> Self {
        self.broker.employ(porter, swap);
        self
    }
}

/// What to run, and where its numbers go.
pub struct Job<'a> {
    /// The file to execute.
    pub program: &'a Path,
    /// The name it is called by and its arguments.
    pub command: &'a [OsString],
    /// Made for this run.
    pub control: &'a ControlPage,
}

/// How a command ended.
pub enum Outcome {
    /// It ran.
    Ended {
        /// Its exit status, 128+N when signal N ended it.
        exit_code: i32,
        /// How long it ran.
        elapsed: Duration,
    },
    /// The kernel refused to execute it.
    NotStarted(io::Error),
}

/// Starts the command, waits until it has ended, and calls `on_tick` meanwhile. Signals are taken over for good: the
/// caller is expected to end soon.
///
/// # Errors
/// `spm` itself fails: descriptors or memory are short.
pub fn execute(
    job: &Job<'_>,
    management: Option<Management>,
    on_tick: &mut dyn FnMut(&Control),
) -> anyhow::Result<Outcome> {
    let inherited = Inherited::take_over().context("no descriptor for signals")?;
    let start = Instant::now();
    let child = match spawn(job, management.as_ref(), &inherited) {
        Ok(child) => child,
        Err(error) => return Ok(Outcome::NotStarted(error)),
    };
    raise_descriptor_limit();
    let command = Pid::from_raw(child.id().cast_signed()).context("a command without a process id")?;
    let is_managed = management.is_some();
    let mut broker = management.map(|management| management.broker);
    let supervisor =
        Supervisor { command, inherited: &inherited, control: job.control, broker: broker.as_mut(), on_tick };
    let exit_code = supervisor.run()?;
    let elapsed = start.elapsed();
    let has_greeted = broker.as_ref().is_some_and(Broker::has_greeted);
    if let Some(broker) = broker {
        broker.leave(job.control);
    }
    if !has_greeted {
        job.control.counters.unmanaged_processes.fetch_add(1, Relaxed);
        if is_managed {
            remark(format_args!(
                "the agent never reported from {}: it ran without a budget",
                job.program.display()
            ));
        }
    }
    Ok(Outcome::Ended { exit_code, elapsed })
}

#[allow(unsafe_code, reason = "`pre_exec` runs between fork and exec")]
fn spawn(job: &Job<'_>, management: Option<&Management>, inherited: &Inherited) -> io::Result<Child> {
    let mut command = Command::new(job.program);
    command.arg0(&job.command[0]).args(&job.command[1..]);
    if let Some(management) = management {
        command.env(SOCKET_ENV, management.broker.address());
        command.env("LD_PRELOAD", preload(&management.agent, std::env::var_os("LD_PRELOAD")));
    }
    // SAFETY: it makes system calls only, on copied values.
    unsafe { command.pre_exec(inherited.hand_on()) };
    command.spawn()
}

/// The agent in front of what is preloaded already.
fn preload(agent: &Path, others: Option<OsString>) -> OsString {
    let mut list = agent.as_os_str().to_owned();
    if let Some(others) = others.filter(|others| !others.is_empty()) {
        list.push(":");
        list.push(others);
    }
    list
}

/// Every process of the tree takes a few descriptors of ours. Not before the command has started: it keeps its limit.
fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // Where it is refused, fewer processes can be managed.
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Says why the command was not started, and gives the exit status for it.
pub fn say_not_started(name: &OsStr, error: &io::Error) -> i32 {
    let errno = spmem_sys::Errno(error.raw_os_error().unwrap_or(libc::EIO));
    remark(format_args!("{}: {errno}", name.display()));
    match errno.0 {
        libc::ENOENT => NOT_FOUND,
        // It never came to executing it: no descriptor, or no process, for us.
        libc::EMFILE | libc::ENFILE | libc::EAGAIN => FAILURE,
        _ => NOT_EXECUTABLE,
    }
}

/// With fewer descriptors `spm` could not answer the tree's processes, which would wait for it, nor the agent open its own.
fn check_descriptor_limits(copied: usize) -> anyhow::Result<()> {
    /// Of the command itself: three of its own, those of the agent, one to spare.
    const SOFT_NEEDED: u64 = 16;
    /// For nodes that pages are copied to: the ledger and a pipe to write through; and for each the node and a pipe to read through.
    const COPYING_NEEDED: (u64, u64) = (3, 3);
    let more = if copied > 0 { COPYING_NEEDED.0 + COPYING_NEEDED.1 * copied as u64 } else { 0 };
    let needed = SOFT_NEEDED + more;
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let (hard, soft) = (limit.maximum.unwrap_or(u64::MAX), limit.current.unwrap_or(u64::MAX));
    if hard < DESCRIPTORS_NEEDED {
        bail!("the hard limit of open files is {hard}, spm needs {DESCRIPTORS_NEEDED}; raise it (ulimit -Hn)");
    }
    if soft < needed {
        bail!("the limit of open files is {soft}, the agent needs {needed}; raise it (ulimit -Sn)");
    }
    Ok(())
}

/// What `spm` shares with a program lies in files without a name (memfd_create(2)); RLIMIT_FSIZE is for them, too, and
/// SIGXFSZ would end `spm` without a word.
fn refuse_small_files() -> anyhow::Result<()> {
    const NEEDED: u64 = 1 << 20;
    let limit = rustix::process::getrlimit(Resource::Fsize).current;
    if limit.is_some_and(|limit| limit < NEEDED) {
        bail!(
            "refused: RLIMIT_FSIZE is below 1 MiB, which spm needs for what it shares with the program; raise it (ulimit -f)"
        );
    }
    Ok(())
}
