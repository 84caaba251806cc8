//! What a byte-addressable node is made of: bytes at offsets, some of them durable.

use core::fmt;

/// The memory of a byte-addressable node.
///
/// Offsets and lengths are multiples of 8 bytes and lie within [`Medium::len`]. A write of 8 bytes reaches the medium whole
/// or not at all; of a longer one any part may be there after a crash, until a flush has returned.
pub trait Medium {
    /// Bytes.
    fn len(&self) -> u64;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies out.
    ///
    /// # Errors
    /// [`MediumError`].
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError>;

    /// Copies in.
    ///
    /// # Errors
    /// [`MediumError`].
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), MediumError>;

    /// Writes zeros.
    ///
    /// # Errors
    /// [`MediumError`].
    fn zero(&mut self, offset: u64, len: u64) -> Result<(), MediumError>;

    /// What was written is durable when this returns. Nothing to do where nothing is.
    ///
    /// # Errors
    /// [`MediumError`]: it may or may not be durable.
    fn flush(&mut self, offset: u64, len: u64) -> Result<(), MediumError>;

    /// What another host has written is seen from now on.
    ///
    /// # Errors
    /// [`MediumError`].
    fn invalidate(&mut self, _offset: u64, _len: u64) -> Result<(), MediumError> {
        Ok(())
    }

    /// Nobody needs what is there any more. A medium that compresses, or gives memory out by need, takes it back; what cannot be
    /// taken back stays.
    fn discard(&mut self, _offset: u64, _len: u64) {}

    /// Where the byte at an offset can be read without asking: an address of this process; `None` where nothing is mapped.
    fn address(&self, _offset: u64) -> Option<usize> {
        None
    }
}

/// What a medium was to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Making durable.
    Flush,
}

/// A medium that did not do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MediumError {
    /// What it was to do.
    pub operation: Operation,
    /// Where.
    pub offset: u64,
    /// errno(3).
    pub errno: i32,
}

impl fmt::Display for MediumError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.operation {
            Operation::Read => "read",
            Operation::Write => "written",
            Operation::Flush => "made durable",
        };
        write!(f, "the medium cannot be {what} at {:#x}: errno {}", self.offset, self.errno)
    }
}

impl core::error::Error for MediumError {}
