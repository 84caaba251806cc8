//! `spm wall`: a program and all it starts behind a wall that the kernel keeps.
//!
//! [`run()`] works out what to make ([`spmem_core::enclosure`]), [`enter`] makes it around this process, which then becomes the
//! command: nothing stands between it and its signals, terminal or parent. [`cgroup`] is the hard wall, [`filter`] the
//! easy guard, [`keeper`] the small process that answers for it and tidies up. `spm run` calls [`enter`], too.
//!
//! Exit status: as `spm run`. Known holes are docs/walls.md's.

mod cgroup;
mod demotion;
mod filter;
mod keeper;

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, bail};
use spmem_core::enclosure::{Enclosure, Nodes, Wish};
use spmem_core::node::Guard;
use spmem_core::nodemask::NodeMask;
use spmem_sys::mempolicy;
use spmem_sys::seccomp::Privileges;

use crate::arguments::{WallArguments, WallFlags};
use crate::config::Config;
use crate::machine;
use crate::remark::remark;
use crate::run;
use cgroup::Site;
use keeper::Keeper;

pub use cgroup::WALL_NAMES;

/// Runs the command behind the wall; comes back only when it was not started.
///
/// # Errors
/// The wall cannot be made, or not as asked; the message has the reason and a remedy.
pub fn run(options: &WallArguments) -> anyhow::Result<i32> {
    let config = Config::read(options.config.as_deref())?;
    let name = &options.command[0];
    let program = match run::program::find(name, std::env::var_os("PATH").as_deref()) {
        Ok(program) => program,
        Err(missing) => return Ok(run::say_not_started(name, &missing.into())),
    };
    enter(&options.wall, &config, options.best_effort, None)?;
    Ok(run::say_not_started(name, &become_command(&program, &options.command)))
}

/// Puts this process, and all that it starts from now on, behind the wall. The process must have one thread. `company` is a process of
/// ours that stays outside.
///
/// # Errors
/// As [`run()`]; nothing has changed then.
pub fn enter(
    flags: &WallFlags,
    config: &Config,
    is_best_effort: bool,
    company: Option<u32>,
) -> anyhow::Result<()> {
    let nodes = machine::kernel_nodes(config)?;
    machine::tell_absent_types(config, &nodes);
    let wish = Wish {
        mems: flags.mems.as_deref().map(|text| parse(text, &nodes)).transpose().context("--mems")?,
        sysram: flags.sysram_nodes.as_deref().map(|text| parse(text, &nodes)).transpose().context("--sysram")?,
        guard: flags.guard.unwrap_or(GuardName(Guard::Hard)).0,
    };
    let enclosure = Enclosure::plan(&nodes, &wish).map_err(|error| anyhow::anyhow!("refused: {error}"))?;
    if let Some(node) = enclosure.shut.first() {
        remark(format_args!(
            "node {node} is spm: behind a hard guard only components allocate there; --guard easy lets programs bind to it"
        ));
    }
    raise(&enclosure, &nodes, (wish.guard, company), is_best_effort)
}

/// Makes the cgroup, the policy and the filter, in this order.
fn raise(
    wall: &Enclosure,
    nodes: &Nodes,
    (guard, company): (Guard, Option<u32>),
    is_best_effort: bool,
) -> anyhow::Result<()> {
    let outside = wall.outside(nodes);
    if outside.is_empty() && wall.easy.is_empty() {
        remark(format_args!(
            "none of the kernel's nodes ({}) is spm: this wall keeps nothing out; [type] of a configuration says which are",
            nodes.sysram
        ));
    }
    let (inside, kept_out) = (wall.cpuset.difference(&wall.easy), outside.union(&wall.easy));
    let demoted_to = demotion::reached(&inside, &kept_out);
    if !demoted_to.is_empty() {
        let what = format!(
            "the kernel demotes cold pages to node {demoted_to}, through any wall ({} is on)",
            demotion::SWITCH
        );
        if !is_best_effort {
            bail!(
                "refused: {what}; switch it off, as root: echo 0 >{}; or go on with --best-effort",
                demotion::SWITCH
            );
        }
        remark(format_args!("{what}"));
    }
    let mut default = wall.default;
    // Where the cpuset would keep nothing out that is not out already, nobody misses it.
    let mut go_on_without = |reason: anyhow::Error| {
        if !is_best_effort && wall.is_narrower {
            bail!(
                "refused: node {outside} cannot be walled off: {reason:#}; or have the policy alone with --best-effort"
            );
        }
        if wall.is_narrower {
            default = default.or(Some(wall.cpuset));
            remark(format_args!(
                "no cpuset: {reason:#}; nothing keeps the program from naming node {outside} itself"
            ));
        }
        Ok(())
    };
    let is_easy = !wall.easy.is_empty();
    let site = match Site::prepare(&wall.cpuset, guard, company) {
        Ok(site) => Some(site),
        Err(reason) => {
            if is_easy && !wall.is_narrower {
                remark(format_args!("spm audit will not know of this guard: {reason:#}"));
            }
            go_on_without(reason)?;
            None
        }
    };
    let keeper = if site.is_some() || is_easy { Some(Keeper::start(site.as_ref(), wall)?) } else { None };
    if let Some(site) = &site {
        // Nothing of the wall is left behind: the keeper removes what stands empty.
        site.join(&wall.cpuset).or_else(go_on_without)?;
    }
    if let Some(default) = default {
        let mask = mempolicy::mask(default.iter().map(spmem_core::units::NodeId::get));
        let mode = mempolicy::MPOL_BIND | mempolicy::MPOL_F_STATIC_NODES;
        mempolicy::set_policy(mode, &mask)
            .map_err(|errno| anyhow::anyhow!("refused: memory cannot be bound to node {default}: {errno}"))?;
    }
    let Some(keeper) = keeper.filter(|_| is_easy) else { return Ok(()) };
    match keeper.check_sight().and_then(|()| filter::install()) {
        Ok((listener, privileges)) => {
            if privileges == Privileges::Dropped {
                remark(format_args!(
                    "setuid programs get no rights in there: the filter needs that without CAP_SYS_ADMIN"
                ));
            }
            keeper.hand_over(listener).context("the keeper of the easy guard is gone")
        }
        Err(reason) if is_best_effort => {
            remark(format_args!("no filter: {reason:#}; wide masks are not trimmed"));
            Ok(())
        }
        Err(reason) => bail!(
            "refused: no easy guard can be kept: {reason:#}; use --guard hard, or have the policy alone with --best-effort"
        ),
    }
}

/// A node list; `all` is every sysram node, never an SPM one (R8).
fn parse(text: &str, nodes: &Nodes) -> anyhow::Result<NodeMask> {
    let default = nodes.sysram.intersection(&nodes.reachable);
    NodeMask::parse(text, default).with_context(|| format!("`{text}` is no node list"))
}

/// Becomes the command, as execvp(3) does; the error if not.
#[allow(
    unsafe_code,
    reason = "std's exec changes the signal mask and SIGPIPE, which the command is to inherit as they are"
)]
fn become_command(program: &Path, command: &[OsString]) -> io::Error {
    let text =
        |word: &OsStr| CString::new(word.as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let words: Result<Vec<CString>, io::Error> = command.iter().map(|word| text(word)).collect();
    let (path, words) = match (text(program.as_os_str()), words) {
        (Ok(path), Ok(words)) => (path, words),
        (Err(error), _) | (_, Err(error)) => return error,
    };
    let mut pointers: Vec<*const std::ffi::c_char> = words.iter().map(|word| word.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: a path and a list of words, each ends in NUL, the list in a null pointer; all outlive the call.
    unsafe { libc::execvp(path.as_ptr(), pointers.as_ptr()) };
    io::Error::last_os_error()
}

/// `hard` or `easy`.
#[derive(Clone, Copy, Debug)]
pub struct GuardName(pub Guard);

impl std::str::FromStr for GuardName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Guard::Hard, Guard::Easy]
            .into_iter()
            .find(|guard| guard.to_string() == text)
            .map(Self)
            .ok_or_else(|| format!("there is no guard `{text}`; there are hard and easy"))
    }
}
