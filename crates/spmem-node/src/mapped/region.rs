//! The medium of this machine: a shared mapping.

use spmem_sys::Errno;
use spmem_sys::region::Region;

use super::medium::{Medium, MediumError, Operation};

fn place(number: u64, operation: Operation) -> Result<usize, MediumError> {
    let outside = MediumError { operation, offset: number, errno: Errno::EINVAL.0 };
    usize::try_from(number).map_err(|_| outside)
}

fn told(result: spmem_sys::Result<()>, operation: Operation, offset: u64) -> Result<(), MediumError> {
    result.map_err(|errno| MediumError { operation, offset, errno: errno.0 })
}

impl Medium for Region {
    fn len(&self) -> u64 {
        Self::len(self) as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
        let operation = Operation::Read;
        told(Self::read(self, place(offset, operation)?, into), operation, offset)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        let operation = Operation::Write;
        told(Self::write(self, place(offset, operation)?, bytes), operation, offset)
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<(), MediumError> {
        let operation = Operation::Write;
        told(Self::zero(self, place(offset, operation)?, place(len, operation)?), operation, offset)
    }

    fn flush(&mut self, offset: u64, len: u64) -> Result<(), MediumError> {
        let operation = Operation::Flush;
        told(Self::flush(self, place(offset, operation)?, place(len, operation)?), operation, offset)
    }

    fn invalidate(&mut self, offset: u64, len: u64) -> Result<(), MediumError> {
        let operation = Operation::Read;
        told(Self::invalidate(self, place(offset, operation)?, place(len, operation)?), operation, offset)
    }

    fn address(&self, offset: u64) -> Option<usize> {
        let offset = usize::try_from(offset).ok().filter(|&offset| offset < Self::len(self))?;
        Some(self.start() + offset)
    }
}
