//! The trace of `spm run --trace`: what happened to the tree's pages, as lines of JSON (docs/simulation.md).
//!
//! `spm` takes the records from the ring of the control page ([`spmem::recorder`]) every tick. A file that cannot be
//! written to any more ends the trace, not the run.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;
use spmem::control::{Control, UNLIMITED};
use spmem::recorder::{Happening, IS_WRITE, Reader, Record};

use crate::remark::remark;

/// The version that is written.
const VERSION: u32 = 1;

/// One line. Pages go by number: address divided by 4096. Times are ns of CLOCK_MONOTONIC.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Budget { bytes: Option<u64> },
    Fault { ns: u64, process: u32, page: u64, pages: u64, is_write: bool, from: &'static str },
    Demote { ns: u64, process: u32, page: u64, bytes: u64 },
    Place { ns: u64, process: u32, page: u64, node: u64 },
    Refuse { ns: u64, process: u32, page: u64, why: &'static str },
    Drop { ns: u64, process: u32, page: u64, pages: u64 },
    Lost { records: u64 },
}

/// A trace that is being written.
pub struct Trace {
    path: PathBuf,
    /// None once it could not be written.
    file: Option<BufWriter<File>>,
    reader: Reader,
    lost: u64,
}

impl Trace {
    /// Begins a trace of a run that has not started.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn begin(path: &Path, control: &Control) -> anyhow::Result<Self> {
        let file =
            File::create(path).with_context(|| format!("the trace {} cannot be written", path.display()))?;
        let (reader, lost) = Default::default();
        let mut trace = Self { path: path.to_owned(), file: Some(BufWriter::new(file)), reader, lost };
        let limit = control.limit_bytes.load(std::sync::atomic::Ordering::Relaxed);
        trace.write(&serde_json::json!({ "spmem_program_trace": VERSION }));
        trace.write(&Line::Budget { bytes: (limit != UNLIMITED).then_some(limit) });
        control.recorder.switch_on();
        Ok(trace)
    }

    /// Writes what has been recorded since the last time.
    pub fn take(&mut self, control: &Control) {
        while let Some(record) = self.reader.next(&control.recorder, spmem_sys::process::now_ns()) {
            self.write(&line(&record));
        }
        let lost = control.recorder.lost();
        if lost > self.lost {
            self.write(&Line::Lost { records: lost - self.lost });
            self.lost = lost;
        }
    }

    /// Writes the rest.
    pub fn end(mut self, control: &Control) {
        self.take(control);
        let flushed = self.file.as_mut().map_or(Ok(()), BufWriter::flush);
        if let Err(error) = flushed {
            self.give_up(&error);
        }
        if self.lost > 0 {
            remark(format_args!("the trace {} lacks {} records", self.path.display(), self.lost));
        }
    }

    fn write(&mut self, line: &impl Serialize) {
        let Some(file) = &mut self.file else { return };
        let written = serde_json::to_writer(&mut *file, line).map_err(Into::into);
        if let Err(error) = written.and_then(|()| file.write_all(b"\n")) {
            self.give_up(&error);
        }
    }

    fn give_up(&mut self, error: &std::io::Error) {
        remark(format_args!("the trace {} ends here: {error}", self.path.display()));
        // Dropped as it is: its buffer cannot be written.
        if let Some(file) = self.file.take() {
            let _ = file.into_parts();
        }
    }
}

fn line(record: &Record) -> Line {
    let Record { ns, process, what, page, value } = *record;
    let fault =
        |from| Line::Fault { ns, process, page, pages: value & !IS_WRITE, is_write: value & IS_WRITE != 0, from };
    let refuse = |why| Line::Refuse { ns, process, page, why };
    match what {
        Happening::FaultNowhere => fault("nowhere"),
        Happening::FaultHolding => fault("holding"),
        Happening::FaultNode => fault("node"),
        Happening::FaultMapped => fault("mapped"),
        Happening::Demote => Line::Demote { ns, process, page, bytes: value },
        Happening::Place => Line::Place { ns, process, page, node: value },
        Happening::RefuseIncompressible => refuse("incompressible"),
        Happening::RefusePinned => refuse("pinned"),
        Happening::RefuseShared => refuse("shared"),
        Happening::Drop => Line::Drop { ns, process, page, pages: value },
    }
}
