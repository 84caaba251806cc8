//! What a run's trace shows of the agent's own doings.

use crate::watch;
use crate::{Case, Place, Settings, TORTURE, judge, spm, userfaultfd};
use libtest_mimic::{Completion, Failed};
use spmem_sim::program::{From, Record, Recording};
use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Pages that come back while others of the same batch are encoded leave slots of the holding area without a page. Whoever
/// reads one faults like the program, waits for room like the program, and may be the one who makes it. On one processor, so
/// that the process encodes by itself: an encoder that answers late may look there.
pub(crate) fn run_without_touching_empty_slots(settings: &Settings) -> Result<Completion, Failed> {
    if let Err(reason) = userfaultfd() {
        return Ok(Completion::ignored_with(reason));
    }
    let place = Place::new("traced");
    let trace = place.path("trace");
    let case = Case { name: "threads-shared".into(), is_cold: true };
    let budget = settings.budget_bytes(25).to_string();
    let mut command = Command::new(spm()?);
    command.args(["run", "--sysram", &budget, "--trace"]).arg(&trace).arg("--").arg(TORTURE);
    command.args(settings.case_arguments(&case)).args(["--seconds", "2"]);
    let only_first = first_processor()?;
    // SAFETY: one system call on a value that the closure owns; nothing is allocated after the fork.
    unsafe {
        command.pre_exec(move || {
            match libc::sched_setaffinity(0, size_of_val(&only_first), &raw const only_first) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let judged = judge(watch::run(command, &place.path("output"), settings.limit))?;
    let recording = Recording::read(&std::fs::read_to_string(&trace)?)?;
    if recording.lost() > 0 {
        return Ok(Completion::ignored_with("the trace has gaps"));
    }
    let again = first_touches_of_touched_pages(&recording.records);
    if again > 0 {
        return Err(
            format!("{again} pages were nowhere although they had been touched, and not dropped since").into()
        );
    }
    Ok(judged)
}

/// The first of the processors that this process may run on.
fn first_processor() -> std::io::Result<libc::cpu_set_t> {
    // SAFETY: all zeros is an empty set; the kernel fills in one of this size.
    unsafe {
        let (mut allowed, mut first): (libc::cpu_set_t, libc::cpu_set_t) =
            (std::mem::zeroed(), std::mem::zeroed());
        if libc::sched_getaffinity(0, size_of_val(&allowed), &raw mut allowed) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let processor = (0..libc::CPU_SETSIZE as usize).find(|&number| libc::CPU_ISSET(number, &allowed));
        libc::CPU_SET(processor.unwrap_or(0), &mut first);
        Ok(first)
    }
}

/// Slots are no pages of the program's, which are touched for the first time once, unless they are dropped.
fn first_touches_of_touched_pages(records: &[Record]) -> usize {
    let (mut touched, mut again) = (BTreeSet::new(), 0);
    for record in records {
        match *record {
            Record::Fault { process, page, from: From::Nowhere, .. } => {
                again += usize::from(!touched.insert((process, page)));
            }
            Record::Drop { process, page, pages, .. } => {
                touched.retain(|&(of, at)| of != process || !(page..page + pages).contains(&at));
            }
            _ => {}
        }
    }
    again
}
