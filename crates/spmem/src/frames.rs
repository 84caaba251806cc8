//! The frames of node 1 in one process: a mapping that becomes accessible as it fills, and what is known of them.

use spmem_core::frames::Metadata;
use spmem_core::units::{FrameCount, NodeId};
use spmem_sys::Result;
use spmem_sys::mapping::Mapping;

/// Frames of node 1: a mapping of this process, made accessible as it fills.
pub struct Frames {
    pub(crate) mapping: Mapping,
    pub(crate) committed: usize,
}

/// Frames are made accessible in steps of this size, bytes.
const COMMIT: usize = 16 << 20;

impl spmem_node::compressed::FrameBytes for Frames {
    /// `false` at a limit of the process's (RLIMIT_DATA, RLIMIT_AS) or of a system that does not overcommit: to the store
    /// that is a full node.
    fn prepare(&mut self, offset: usize, len: usize) -> bool {
        let end = offset + len;
        if end > self.committed {
            let steps = [end.next_multiple_of(COMMIT).min(self.mapping.len()), end];
            let Some(committed) = steps.into_iter().find(|&step| self.mapping.commit(step).is_ok()) else {
                return false;
            };
            self.committed = committed;
        }
        true
    }

    fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        self.mapping.bytes(offset, len)
    }

    fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        self.mapping.bytes_mut(offset, len)
    }

    fn discard(&mut self, offset: usize, len: usize) {
        self.mapping.discard(offset, len);
    }
}

/// Memory for what is known of node 1's frames, on sysram (R7): node 0, which is what this process has as ordinary memory.
pub(crate) fn lend_metadata(capacity: FrameCount) -> Result<Metadata> {
    let (words, bytes) = Metadata::size(capacity);
    let lent = Metadata::new(
        Mapping::leak_words(words, c"spmem frames")?,
        Mapping::leak_bytes(bytes, c"spmem frame states")?,
    );
    Ok(lent.on(NodeId::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_lent_from_sysram_and_says_so() {
        let lent = lend_metadata(FrameCount(64)).unwrap();
        assert_eq!(lent.node(), Some(NodeId::ZERO), "R7");
        assert!(lent.is_zero());
    }
}
