//! This machine: its RAM, and the nodes that a configuration makes of it.

use anyhow::Context;
use spmem_core::frames::Metadata;
use spmem_core::units::Bytes;
use spmem_node::compressed::GrantedFrames;

use crate::config::Config;

/// RAM as the kernel counts it.
#[derive(Clone, Copy, Debug)]
pub struct Ram {
    /// All of it (`MemTotal`), bytes.
    pub total_bytes: u64,
    /// What programs could still get without swapping (`MemAvailable`), bytes.
    pub available_bytes: u64,
}

impl Ram {
    /// Reads `/proc/meminfo`.
    ///
    /// # Errors
    /// It is not mounted or has another shape.
    pub fn read() -> anyhow::Result<Self> {
        let text = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo cannot be read")?;
        let bytes = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':')?.trim().strip_suffix("kB"))
                .and_then(|number| number.trim().parse::<u64>().ok())
                .map(|kibibytes| kibibytes << 10)
                .with_context(|| format!("/proc/meminfo has no {key}"))
        };
        Ok(Self { total_bytes: bytes("MemTotal")?, available_bytes: bytes("MemAvailable")? })
    }
}

/// Sets the nodes up as the agent of a program does: through the memory manager, with its owners and the grant.
///
/// # Errors
/// The memory manager refuses, for example a capacity of more frames than it can number.
pub fn set_up_nodes(config: &Config, ram: Ram) -> anyhow::Result<GrantedFrames> {
    let capacity = Bytes(config.store_capacity.bytes(ram.total_bytes)).frames_ceil();
    let lent = Metadata::from_heap(capacity)?;
    GrantedFrames::embedded(capacity, lent).map_err(|error| anyhow::anyhow!("{error}"))
}
