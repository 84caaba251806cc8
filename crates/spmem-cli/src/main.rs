//! `spm`: the command line of spmem.
//!
//! [`arguments`] says what can be asked; [`run`] runs a program inside a budget, [`nodes`] lists the nodes, [`explain`]
//! tells what the wall would answer, [`wall`] puts one around a program, [`audit`] looks who is beyond, [`tour`] shows it all. Results go to stdout, remarks to stderr. Exit status: 0, 1 when something failed, 2 for a wrong command
//! line; `spm run`, `spm wall`, `spm audit` and `spm explain` have their own.
#![cfg_attr(not(test), no_main)]

mod apart;
mod arguments;
mod audit;
mod config;
mod explain;
mod heat;
mod machine;
mod nodes;
mod remark;
#[cfg_attr(test, allow(dead_code, reason = "some of it is called by the C main, which tests do not have"))]
mod run;
mod size;
mod tour;
mod wall;

use std::io::ErrorKind;

use clap::Parser;

use arguments::{Action, Arguments};
use remark::remark;

/// The program starts here rather than in Rust's `main`: that one's runtime changes what a child would inherit (it
/// ignores SIGPIPE and opens closed standard descriptors), and `spm run` must hand on everything as it came.
#[cfg(not(test))]
#[allow(unsafe_code, reason = "the C runtime looks for a function of this name")]
// SAFETY: the only `main` of the program; the C runtime calls it with the arguments that std reads for itself.
#[unsafe(no_mangle)]
extern "C" fn main(argc: i32, argv: *mut *mut std::ffi::c_char) -> i32 {
    run::stdio::fill_closed_descriptors();
    run::witness::remember_arguments(argc, argv);
    dispatch()
}

#[cfg_attr(test, allow(dead_code, reason = "called by the C main"))]
fn dispatch() -> i32 {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let is_run = std::env::args_os().nth(1).is_some_and(|word| word == "run" || word == "wall");
            let failure = if is_run { run::FAILURE } else { 1 };
            return match error.print() {
                // A reader that went away is no reason to say more.
                Err(unwritten) if !error.use_stderr() && unwritten.kind() != ErrorKind::BrokenPipe => {
                    let unwritten = run::stdio::true_cause(unwritten);
                    remark(format_args!("stdout does not take the answer: {unwritten}"));
                    failure
                }
                _ if error.use_stderr() && is_run => failure,
                _ => error.exit_code(),
            };
        }
    };
    let (result, failure) = match arguments.action {
        Action::Run(options) => (run::run(&options), run::FAILURE),
        Action::Nodes(options) => (nodes::print(&options).map(|()| 0), 1),
        Action::Explain(options) => (explain::explain(&options), 2),
        Action::Wall(options) => (wall::run(&options), run::FAILURE),
        Action::Audit(options) => (audit::audit(&options), audit::FAILURE),
        Action::Tour => (tour::tour(), 1),
        Action::TourLoad(options) => (tour::load::run(&options), 1),
    };
    result.unwrap_or_else(|error| {
        remark(format_args!("{error:#}"));
        failure
    })
}
