//! The encoders of one managed process: a thread of `spm` for pages that leave (`spmem::encoder`), another for those that
//! stay away (`spmem::dense`).

use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::Context;
use spmem::dense;
use spmem::encoder::{self, Exchange};
use spmem_node::compressed::{Codec, train};
use spmem_sys::fd::Fd;

use super::shared::Shared;

/// Works until this is dropped.
pub struct Encoder {
    exchange: Arc<Shared<Exchange>>,
    is_over: Arc<AtomicBool>,
}

impl Encoder {
    /// Starts one for the process whose /proc/PID/mem `memory` is; `seed` is that of the tree's checksums.
    ///
    /// # Errors
    /// No memory, no descriptor or no thread.
    pub fn start(memory: OwnedFd, seed: u64) -> anyhow::Result<Self> {
        spmem_sys::clock::find();
        let exchange = Arc::new(Shared::create("spmem-exchange")?);
        let is_over = Arc::new(AtomicBool::new(false));
        let (its_exchange, its_end) = (Arc::clone(&exchange), Arc::clone(&is_over));
        let memory = Fd::from_raw(memory.into_raw_fd());
        let work = move || encoder::serve(&its_exchange, Codec::new(seed), &memory, &its_end);
        std::thread::Builder::new().name("spm-encoder".into()).spawn(work).context("no thread for an encoder")?;
        let (its_exchange, its_end) = (Arc::clone(&exchange), Arc::clone(&is_over));
        let work = move || dense::serve(&its_exchange, Codec::new(seed), train, &its_end);
        // Without it what is stored stays as it is.
        let _ = std::thread::Builder::new().name("spm-dense".into()).spawn(work);
        Ok(Self { exchange, is_over })
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
    }
}
