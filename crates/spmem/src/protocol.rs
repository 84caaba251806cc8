//! What an agent and `spm` say to each other: fixed messages over a Unix seqpacket socket.
//!
//! `spm` listens on the abstract address in [`SOCKET_ENV`] (the text after the leading NUL). An agent connects when
//! its process starts or is forked, says [`Kind::Hello`] and keeps the connection for as long as the process lives
//! in this program: the hang-up tells `spm` that it exited or called exec. Each request gets one reply with the
//! same kind, but for `Child`: a fork must not wait for `spm`. Descriptors travel as SCM_RIGHTS (unix(7)).
//!
//! | kind | request carries | reply carries |
//! |---|---|---|
//! | `Hello` | `value` 1: a forked child, which is managed even without a connection | memfd of the [control page](crate::control::Control), `/dev/userfaultfd`; `value`: the process's number in `spm`'s pid namespace |
//! | `Userfault` | a fresh userfaultfd of the agent's process | - ; `spm` has done the UFFDIO_API handshake on it with the features in `value` and keeps it as second holder; features 0: it is enabled already, hold it only |
//! | `Child` | the userfaultfd of a forked child that its parent serves, for `spm` to hold; `value`: its number in the agent's table, and a [`Heir`]. None: the child of that number is about to stand alone | no reply |
//! | `Encoder` | the process's /proc/self/mem, opened by itself | memfd of an [`Exchange`](crate::encoder::Exchange) that a thread of `spm` serves |
//! | `Porter` | the process's /proc/self/mem, and a userfaultfd of its staging area, which is at `value` | memfd of a [`Crossing`](crate::porter::Crossing) that a thread outside of any wall serves; `EOPNOTSUPP` where the run places no pages |
//! | `Swap` | - | the ledger of the run's swap files, opened for this process alone, and the files in the order of their targets; `EOPNOTSUPP` where the run has none |

/// Environment variable that names the socket.
pub const SOCKET_ENV: &str = "SPMEM_SOCKET";
/// First word of every message; the low digits are the version.
pub const MAGIC: u64 = 0x5350_4d50_524f_0006;

/// What a message asks.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A process came under management.
    Hello = 1,
    /// Enable a userfaultfd and hold it.
    Userfault = 2,
    /// Encode pages for this process.
    Encoder = 3,
    /// Copy pages to memory of mapped nodes for this process.
    Porter = 5,
    /// Hold a forked child's userfaultfd, or let go of it. No reply.
    Child = 4,
    /// Let this process use the run's swap files.
    Swap = 6,
}

/// From when on `spm` answers the faults of a forked child. The upper half of `value`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heir {
    /// When the parent that serves it ends.
    Later = 1,
    /// Now.
    Now = 2,
}

impl Heir {
    /// With the number of the child's userfaultfd, as `value` carries it.
    pub const fn with(self, number: i32) -> u64 {
        (self as u64) << 32 | number.cast_unsigned() as u64
    }

    /// The number and the heir that `value` carries; `None` for no heir that there is.
    pub const fn read(value: u64) -> Option<(u32, Self)> {
        let number = (value & 0xffff_ffff) as u32;
        match value >> 32 {
            1 => Some((number, Self::Later)),
            2 => Some((number, Self::Now)),
            _ => None,
        }
    }
}

/// One message, either way.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Message {
    /// [`MAGIC`]; anything else is refused.
    pub magic: u64,
    /// A [`Kind`] as its number.
    pub kind: u32,
    /// Reply: 0, or the errno that says why not.
    pub errno: i32,
    /// Request: the sender's process id.
    pub pid: u32,
    /// Unused, zero.
    pub pad: u32,
    /// `Userfault`: UFFDIO_API feature bits wanted. `Hello`: whether it is managed already. `Child`: see [`Heir::with`].
    pub value: u64,
}

const _: () = assert!(size_of::<Message>() == 32);

impl Message {
    /// As it travels, in the machine's byte order.
    pub fn to_bytes(&self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        bytes[0..8].copy_from_slice(&self.magic.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.kind.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.errno.to_ne_bytes());
        bytes[16..20].copy_from_slice(&self.pid.to_ne_bytes());
        bytes[24..32].copy_from_slice(&self.value.to_ne_bytes());
        bytes
    }

    /// What travelled; any 32 bytes are a message, [`Message::magic`] tells a real one.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        let word = |at: usize| u64::from_ne_bytes(core::array::from_fn(|i| bytes[at + i]));
        let half = |at: usize| u32::from_ne_bytes(core::array::from_fn(|i| bytes[at + i]));
        Self {
            magic: word(0),
            kind: half(8),
            errno: i32::from_ne_bytes(half(12).to_ne_bytes()),
            pid: half(16),
            pad: 0,
            value: word(24),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_travels_with_its_heir() {
        for heir in [Heir::Later, Heir::Now] {
            assert_eq!(Heir::read(heir.with(513)), Some((513, heir)));
        }
        assert_eq!(Heir::read(3 << 32), None);
    }
}
