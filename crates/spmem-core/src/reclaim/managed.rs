//! Managed: which mappings of a program may have their pages taken.
//!
//! Private anonymous memory that a program reads and writes: what malloc(3) and mmap(2) give. Not code, not files, whose pages
//! the kernel itself can drop, not what others see through mappings of their own, and not the main stack, which grows
//! as it is touched. Called by the runtime's sweep and gate.

/// What a mapping is, as its name in proc_pid_maps(5) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// mmap(2), with or without a name given by prctl(2).
    Anonymous,
    /// brk(2).
    Heap,
    /// The main thread's stack.
    Stack,
    /// A file, or the kernel's own: `[vdso]`, `[vvar]`.
    Other,
}

/// What is known of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// May be read.
    pub is_readable: bool,
    /// May be written.
    pub is_writable: bool,
    /// May be executed.
    pub is_executable: bool,
    /// Changes are seen by other mappings (MAP_SHARED).
    pub is_shared: bool,
    /// Backed by a file, shmem included.
    pub is_file: bool,
    /// What it is.
    pub origin: Origin,
}

impl Mapping {
    /// Whether its pages may be managed at all.
    ///
    /// ```
    /// use spmem_core::reclaim::{Mapping, Origin};
    /// let heap = Mapping {
    ///     is_readable: true, is_writable: true, is_executable: false, is_shared: false, is_file: false, origin: Origin::Heap,
    /// };
    /// assert!(heap.is_managed());
    /// assert!(!Mapping { is_shared: true, ..heap }.is_managed());
    /// assert!(!Mapping { origin: Origin::Stack, ..heap }.is_managed());
    /// ```
    #[inline]
    pub const fn is_managed(&self) -> bool {
        self.is_readable
            && self.is_writable
            && !self.is_executable
            && !self.is_shared
            && !self.is_file
            && matches!(self.origin, Origin::Anonymous | Origin::Heap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_all_there_can_be_only_private_anonymous_data_is_managed() {
        let mut managed = 0;
        for bits in 0..32_u8 {
            let [is_readable, is_writable, is_executable, is_shared, is_file] =
                [1, 2, 4, 8, 16].map(|bit| bits & bit != 0);
            for origin in [Origin::Anonymous, Origin::Heap, Origin::Stack, Origin::Other] {
                let mapping = Mapping { is_readable, is_writable, is_executable, is_shared, is_file, origin };
                let is_data = bits == 0b00011 && matches!(origin, Origin::Anonymous | Origin::Heap);
                assert_eq!(mapping.is_managed(), is_data, "{mapping:?}");
                managed += usize::from(mapping.is_managed());
            }
        }
        assert_eq!(managed, 2);
    }
}
