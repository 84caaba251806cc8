//! `spm tour`: what spmem does, shown on this machine.
//!
//! Three stops, top to bottom in [`tour`]: the nodes; the wall, by the memory manager's own answers; and a program
//! ([`load`]) whose data is four times its budget, with live counters. It checks every byte of its data at the end,
//! and the tour's exit status is what it found.

mod live;
pub mod load;
mod pages;

use std::ffi::OsString;
use std::io::{self, Write};
use std::sync::atomic::Ordering::Relaxed;

use anyhow::Context;
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::{Flags, Mode, Policy};
use spmem_core::units::{DomainId, NodeId, Order};
use spmem_core::wall::Request;
use spmem_node::compressed::{FrameSource, GrantedFrames};

use crate::config::Config;
use crate::machine::{self, Ram};
use crate::nodes::{self, Sizes};
use crate::run;
use live::Live;

/// The budget of the program.
const BUDGET_BYTES: u64 = 64 << 20;

/// Gives the tour; the exit status says whether every byte was right.
///
/// # Errors
/// A stop cannot be shown: stdout is gone, or nothing can be managed here.
pub fn tour() -> anyhow::Result<i32> {
    let (config, ram) = (Config::default(), Ram::read()?);
    let mut frames = machine::set_up_nodes(&config, ram)?;
    let out = &mut io::stdout();
    show_nodes(out, &frames, ram).map_err(run::stdio::true_cause).context("stdout does not take the tour")?;
    show_wall(out, &mut frames)?;
    let exit_code = show_run(out, &config, ram)?;
    Ok(exit_code)
}

fn show_nodes(out: &mut impl Write, frames: &GrantedFrames, ram: Ram) -> io::Result<()> {
    writeln!(out, "1. The nodes (spm nodes -u)\n")?;
    writeln!(out, "{}", nodes::registered_table(frames.mm(), ram, Sizes::Human))?;
    writeln!(out, "   Node 0 is everybody's. Node 1 is special-purpose memory: it is behind a wall.\n")
}

fn show_wall(out: &mut impl Write, frames: &mut GrantedFrames) -> anyhow::Result<()> {
    writeln!(out, "2. The wall\n")?;

    let bare = Request::on(DomainId::ROOT, NodeId::ONE, &[]);
    match frames.mm_mut().alloc(&bare, Order::ZERO) {
        Ok(_) => anyhow::bail!("the wall let a request without a grant through"),
        Err(refusal) => writeln!(out, "   a page on node 1, no grant      refused: {refusal}")?,
    }

    let everywhere = Policy::new(Mode::Interleave, Flags::empty(), NodeMask::ALL)?;
    let wide = Request { policy: everywhere, ..Request::of(DomainId::ROOT) };
    let pass = frames.mm().registry().admit(&wide).map_err(|refusal| anyhow::anyhow!("{refusal}"))?;
    let allowed = pass.mask();
    writeln!(
        out,
        "   a page interleaved on all nodes allowed: node {allowed}, and nothing lands on node 1 by accident"
    )?;

    let block = frames.alloc(Order::ZERO).context("the component's own grant was refused")?;
    writeln!(
        out,
        "   a page on node 1, cram's grant  granted: node {}, frame {}, {} bytes charged to the grant",
        block.node(),
        block.first_frame(),
        block.bytes().0
    )?;
    frames.free(block);

    let id = frames.grant().id();
    let (mm, owners) = frames.parts_mut();
    mm.registry_mut().revoke(&owners.cram, id).map_err(|error| anyhow::anyhow!("{error}"))?;
    match (frames.alloc(Order::ZERO), frames.last_refusal()) {
        (None, Some(refusal)) => writeln!(out, "   the same once it is revoked     refused: {refusal}\n")?,
        _ => anyhow::bail!("a revoked grant still opens the wall"),
    }
    Ok(())
}

fn show_run(out: &mut impl Write, config: &Config, ram: Ram) -> anyhow::Result<i32> {
    let program = std::env::current_exe().context("this program cannot find itself")?;
    let command = [OsString::from("spm"), OsString::from("tour-load")];
    writeln!(out, "3. A program with 256M of data in 64M of RAM (spm run --sysram 64M -- spm tour-load)\n")?;
    let management = run::Management::prepare(&program, None, 0)?;
    let control = run::ControlPage::for_tree(Some(BUDGET_BYTES), config.store_capacity.bytes(ram.total_bytes))?;
    let job = run::Job { program: &program, command: &command, control: &control };
    let mut live = Live::new();
    let outcome = run::execute(&job, Some(management), &mut |control| live.show(control))?;
    let (exit_code, elapsed) = match outcome {
        run::Outcome::Ended { exit_code, elapsed } => (exit_code, elapsed),
        run::Outcome::NotStarted(error) => return Err(error).context("the program cannot be started"),
    };
    live.end();
    let summary = run::Summary::collect(&control, &command, exit_code, elapsed, ram.total_bytes, None);
    writeln!(out, "\n{}", summary.table())?;
    if control.counters.unmanaged_processes.load(Relaxed) > 0 {
        writeln!(out, "The program was not managed: nothing is proved.")?;
        return Ok(1);
    }
    match exit_code {
        0 => writeln!(out, "Every byte was what the program had written.")?,
        load::WRONG_BYTES => writeln!(out, "Bytes were WRONG: this is a bug, please report it.")?,
        _ => writeln!(out, "The program ended early: nothing is proved.")?,
    }
    Ok(exit_code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wall_is_shown_refusing_trimming_granting_and_refusing_again() {
        let ram = Ram { total_bytes: 1 << 30, available_bytes: 1 << 29 };
        let mut frames = machine::set_up_nodes(&Config::default(), ram).unwrap();
        let mut text = Vec::new();
        show_nodes(&mut text, &frames, ram).unwrap();
        show_wall(&mut text, &mut frames).unwrap();
        let text = String::from_utf8(text).unwrap();
        for part in ["sysram", "refused: node 1", "allowed: node 0,", "granted: node 1, frame", "revoked"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
