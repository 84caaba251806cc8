//! The encoders of one managed process: a thread of `spm` for pages that leave (`spmem::encoder`), another for those that
//! stay away (`spmem::dense`), and one that learns from both (`spmem::workshop`).

use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::Context;
use spmem::dense;
use spmem::encoder::{self, Exchange};
use spmem::workshop::{self, Workshop};
use spmem_node::compressed::{Codec, train};
use spmem_sys::fd::Fd;

use super::shared::Shared;

/// Allocations from so many bytes on go back to the kernel once they are freed: glibc's M_MMAP_THRESHOLD as it is at first.
const MAPPED_FROM: i32 = 128 << 10;

/// Keeps what training frees, 4 MiB and more at a time, from staying with each thread that trains: by itself glibc raises the size from which
/// it maps to that of the largest allocation that was freed.
pub fn give_back_what_is_freed() {
    #[allow(unsafe_code, reason = "mallopt(3), which rustix leaves to libc")]
    // SAFETY: takes no pointer; the option is a documented one. Refused, it changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
    }
}

/// Works until this is dropped.
pub struct Encoder {
    exchange: Arc<Shared<Exchange>>,
    workshop: Arc<Workshop>,
    is_over: Arc<AtomicBool>,
}

impl Encoder {
    /// Starts one for the process whose /proc/PID/mem `memory` is; `seed` is that of the tree's checksums.
    ///
    /// # Errors
    /// No memory, no descriptor or no thread.
    pub fn start(memory: OwnedFd, seed: u64) -> anyhow::Result<Self> {
        spmem_sys::clock::find();
        let memory = Fd::from_raw(memory.into_raw_fd());
        let encoder = Self {
            exchange: Arc::new(Shared::create("spmem-exchange")?),
            workshop: Arc::new(Workshop::new()),
            is_over: Arc::new(AtomicBool::new(false)),
        };
        let codec = Codec::new(seed);
        encoder
            .spawn("spm-encoder", move |exchange, workshop, is_over| {
                encoder::serve(exchange, workshop, codec, &memory, is_over);
            })
            .context("no thread for an encoder")?;
        // Without these what is stored stays as it is, and there is no dictionary.
        let _ = encoder.spawn("spm-dense", move |exchange, workshop, is_over| {
            dense::serve(exchange, workshop, codec, is_over);
        });
        let _ = encoder.spawn("spm-learner", move |exchange, workshop, is_over| {
            workshop::learn(exchange, workshop, codec, train, is_over);
        });
        Ok(encoder)
    }

    fn spawn(
        &self,
        name: &str,
        work: impl FnOnce(&Exchange, &Workshop, &AtomicBool) + Send + 'static,
    ) -> std::io::Result<()> {
        let (exchange, workshop) = (Arc::clone(&self.exchange), Arc::clone(&self.workshop));
        let is_over = Arc::clone(&self.is_over);
        let work = move || work(&exchange, &workshop, &is_over);
        std::thread::Builder::new().name(name.into()).spawn(work).map(drop)
    }

    /// What the process maps to talk to it.
    pub fn exchange(&self) -> &Shared<Exchange> {
        &self.exchange
    }
}

impl Drop for Encoder {
    fn drop(&mut self) {
        self.is_over.store(true, Relaxed);
        self.exchange.wake();
        self.workshop.wake();
    }
}
