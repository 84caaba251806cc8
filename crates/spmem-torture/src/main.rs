//! `torture`: ordinary programs that check every byte of their memory.
//!
//! `torture CASE [--seed N] [--mib N] [--seconds S] [--out FILE]` checks one claim and exits 0, or prints what differed
//! and exits 1 (77: this machine cannot run it). `torture list` names the cases, each with its number in its theme. None of them knows about spm: bare
//! they pass always; under `spm run --sysram` their pages leave and return in the middle of what they do.
//!
//! [`model`] says what a page must hold, [`area`] keeps memory and model together and holds the ballast that drives
//! pages out, [`process`] makes children; every other module is a theme with its table of cases.
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "a test program whose subject is raw memory; the wrappers in sys.rs say what they rely on"
)]
#![allow(clippy::cast_possible_truncation, reason = "page numbers and descriptors of a test program are small")]

mod advise;
mod advise_guard;
mod advise_thp;
mod advise_wipe;
mod area;
mod descriptors;
mod exec;
mod faults;
mod faults_encoder;
mod fork;
mod fork_busy;
mod fork_traced;
mod futex;
mod harness;
mod heap;
mod io;
mod io_direct;
mod io_remote;
mod io_ring;
mod limits;
mod lock;
mod model;
mod neighbours;
mod process;
mod protect;
mod raw_clone;
mod raw_crowd;
mod remap;
mod seccomp;
mod signals;
mod stacks;
mod store;
mod store_cold;
mod supervisor;
mod sys;
mod thread_ends;
mod threads;
mod unmap;

use harness::{Case, Ctx};
use std::time::{Duration, Instant};

const THEMES: &[&[Case]] = &[
    threads::CASES,
    heap::CASES,
    fork::CASES,
    fork_busy::CASES,
    fork_traced::CASES,
    seccomp::CASES,
    exec::CASES,
    raw_clone::CASES,
    raw_crowd::CASES,
    unmap::CASES,
    remap::CASES,
    protect::CASES,
    advise::CASES,
    advise_wipe::CASES,
    advise_guard::CASES,
    advise_thp::CASES,
    lock::CASES,
    io::CASES,
    io_direct::CASES,
    io_ring::CASES,
    io_remote::CASES,
    signals::CASES,
    stacks::CASES,
    thread_ends::CASES,
    futex::CASES,
    descriptors::CASES,
    limits::CASES,
    neighbours::CASES,
    store::CASES,
    store_cold::CASES,
    supervisor::CASES,
    faults::CASES,
    faults_encoder::CASES,
];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    if name == "list" {
        for (number, case) in THEMES.iter().flat_map(|theme| theme.iter().enumerate()) {
            println!("{}\t{}\t{number}\t{}", case.name, if case.cold { "cold" } else { "warm" }, case.claim);
        }
        return;
    }
    if let Some(status) = exec::act(&name) {
        std::process::exit(status);
    }
    let Some(case) = THEMES.iter().copied().flatten().find(|case| case.name == name) else {
        eprintln!("usage: torture CASE [--seed N] [--mib N] [--seconds S] [--out FILE]\n       torture list");
        std::process::exit(2);
    };
    let ctx = match settings(arguments) {
        Ok(ctx) => ctx,
        Err(text) => {
            eprintln!("torture: {text}");
            std::process::exit(2);
        }
    };
    let outcome = (case.run)(&ctx);
    if outcome.is_err() {
        harness::report(&format!("{name}: {} (seed {}, {} MiB): {}", case.claim, ctx.seed, ctx.mib, rest(&ctx)));
    }
    std::process::exit(process::verdict(outcome));
}

fn rest(ctx: &Ctx) -> String {
    format!("after {:.1} s", ctx.started.elapsed().as_secs_f64())
}

fn settings(mut arguments: impl Iterator<Item = String>) -> Result<Ctx, String> {
    let mut ctx = Ctx { seed: 1, mib: 64, time: Duration::from_secs(3), out: None, started: Instant::now() };
    while let Some(key) = arguments.next() {
        let value = arguments.next().ok_or(format!("{key} needs a value"))?;
        let bad = |_| format!("{key} {value}: not a number");
        match key.as_str() {
            "--seed" => ctx.seed = value.parse().map_err(bad)?,
            "--mib" => ctx.mib = value.parse::<usize>().map_err(bad)?.max(8),
            "--seconds" => {
                let seconds: f64 = value.parse().map_err(|_| format!("{key} {value}: not a number"))?;
                ctx.time = Duration::from_secs_f64(seconds.clamp(0.0, 86_400.0));
            }
            "--out" => ctx.out = Some(value),
            _ => return Err(format!("{key}: no such option")),
        }
    }
    Ok(ctx)
}
