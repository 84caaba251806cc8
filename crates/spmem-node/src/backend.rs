//! What the runtime needs from any kind of memory, and no more.
//!
//! A page enters in two steps. [`Stage::stage`] does the long part (compressing, say) on the bytes
//! alone, so that the runtime runs it outside the back end's lock; [`Backend::store`] then takes
//! what was staged. A page leaves by [`Backend::load`] and [`Backend::forget`].
//!
//! Implementations take no lock: `&mut self` is the runtime's lock. Called by the runtime's
//! eviction and fault paths.

use core::fmt;
use core::num::NonZeroU64;

use spmem_core::units::{Bytes, FrameNumber, NodeId, PAGE_SIZE};

/// Bytes of a page.
#[expect(clippy::cast_possible_truncation, reason = "4096 fits in every usize that runs this")]
pub const PAGE_BYTES: usize = PAGE_SIZE as usize;

/// The bytes of one page.
pub type Page = [u8; PAGE_BYTES];

/// Where a back end keeps a page: 48 bits, never zero, meaningful to that back end only.
///
/// The upper 16 bits of the raw value are zero: the runtime keeps its own there.
///
/// ```
/// use spmem_node::Handle;
/// assert_eq!(Handle::from_raw(7).map(Handle::raw), Some(7));
/// assert_eq!(Handle::from_raw(0), None);
/// assert_eq!(Handle::from_raw(1 << 48), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Handle(NonZeroU64);

impl Handle {
    /// Bits of a raw handle.
    pub const BITS: u32 = 48;

    /// The handle with this raw value; `None` if it is zero or needs more than 48 bits.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Option<Self> {
        match NonZeroU64::new(raw) {
            Some(raw) if raw.get() >> Self::BITS == 0 => Some(Self(raw)),
            _ => None,
        }
    }

    /// The raw value: not zero, below 2^48.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({:#x})", self.raw())
    }
}

/// Why a page cannot go to this kind of memory (R19). It stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It would take `encoded` bytes; `limit` is the most this back end stores.
    Incompressible {
        /// Bytes the page came to.
        encoded: usize,
        /// Bytes it may come to.
        limit: usize,
    },
    /// What was encoded does not read back as the page.
    NotReproduced,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Incompressible { encoded, limit } => {
                write!(f, "the page compresses to {encoded} bytes, more than the limit of {limit}")
            }
            Self::NotReproduced => f.write_str("the encoded page did not read back as it was"),
        }
    }
}

impl core::error::Error for Unfit {}

/// No room: nothing was stored and nothing was dropped to make room (R18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// The node that is full.
    pub node: NodeId,
    /// Bytes that were to be stored.
    pub wanted: Bytes,
    /// Bytes of the node in use.
    pub used: Bytes,
    /// Bytes the node may use.
    pub capacity: Bytes,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, wanted, used, capacity } = self;
        write!(f, "node {node} has no room for {wanted}: {used} of {capacity} in use")
    }
}

impl core::error::Error for Full {}

/// A stored page that cannot be given back as it was (R20): its bytes are not handed out.
///
/// The handle stays taken, so that its frame is not used again; the caller reports the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt {
    /// The node it was stored on.
    pub node: NodeId,
    /// The handle that was used.
    pub handle: Handle,
    /// The frame where the stored bytes begin, if the handle names one.
    pub frame: Option<FrameNumber>,
    /// What was found.
    pub damage: Damage,
}

/// How a stored page differs from what was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Nothing is stored under this handle.
    UnknownHandle,
    /// The place holds another page: the handle is stale, or the header is damaged.
    WrongObject,
    /// The stored length cannot be right.
    Length {
        /// The length found.
        found: usize,
        /// The most that fits there.
        most: usize,
    },
    /// The stored bytes are not valid for the codec, which stopped after `decoded` bytes if it got
    /// to an end at all.
    Undecodable {
        /// Bytes the codec produced, where it ended without an error.
        decoded: Option<usize>,
    },
    /// The bytes decode to a page with another checksum.
    Checksum {
        /// The checksum that was stored.
        stored: u64,
        /// The checksum of what is there now.
        found: u64,
    },
    /// The memory of the frame is broken.
    Poisoned,
    /// The medium did not do what it was to.
    Unreadable,
    /// This process may not read it.
    Forbidden,
    /// Somebody else may write it now.
    HandedOver,
}

impl fmt::Display for Corrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.node)?;
        if let Some(frame) = self.frame {
            write!(f, " frame {frame}")?;
        }
        write!(f, " {:?}: ", self.handle)?;
        match self.damage {
            Damage::UnknownHandle => f.write_str("nothing is stored under this handle"),
            Damage::WrongObject => f.write_str("another page is stored there"),
            Damage::Length { found, most } => {
                write!(f, "stored length {found} where at most {most} fit")
            }
            Damage::Undecodable { decoded: None } => f.write_str("the stored bytes do not decode"),
            Damage::Undecodable { decoded: Some(bytes) } => {
                write!(f, "the stored bytes decode to {bytes} bytes instead of a page")
            }
            Damage::Checksum { stored, found } => {
                write!(f, "checksum {found:#018x}, stored {stored:#018x}")
            }
            Damage::Poisoned => f.write_str("the memory of the frame is broken"),
            Damage::Unreadable => f.write_str("the medium failed"),
            Damage::Forbidden => f.write_str(
                "this process may not read it any more, as under a seccomp filter without pread64, or read, write and pipe2",
            ),
            Damage::HandedOver => f.write_str("it was handed over to a peer"),
        }
    }
}

impl core::error::Error for Corrupt {}

/// How full a back end is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes the node may use.
    pub capacity: Bytes,
    /// Bytes of the node in use.
    pub used: Bytes,
    /// Bytes the stored pages would take uncompressed.
    pub stored: Bytes,
}

/// The part of storing a page that needs no back end, only its settings: cheap to clone, one for
/// each thread.
pub trait Stage: Clone + Send {
    /// Buffers that are used again for each page; one for each thread.
    type Workspace;
    /// A page ready to be stored.
    type Staged<'a>;

    /// New buffers.
    fn workspace(&self) -> Self::Workspace;

    /// Makes `page` ready, verified against its bytes (R19).
    ///
    /// # Errors
    /// [`Unfit`] if it cannot go to this kind of memory.
    fn stage<'a>(&self, page: &'a Page, workspace: &'a mut Self::Workspace) -> Result<Self::Staged<'a>, Unfit>;
}

/// One node's memory, as the runtime sees it.
pub trait Backend {
    /// How pages are made ready.
    type Stage: Stage;

    /// The node this is.
    fn node(&self) -> NodeId;

    /// How full it is. O(1) in the number of pages.
    fn usage(&self) -> Usage;

    /// The stage for this back end; what another back end's stage made is not valid here.
    fn stage(&self) -> Self::Stage;

    /// Stores a staged page.
    ///
    /// # Errors
    /// [`Full`]; then nothing has changed (R18).
    fn store(&mut self, staged: &<Self::Stage as Stage>::Staged<'_>) -> Result<Handle, Full>;

    /// Writes the stored page to `page`. The handle stays valid.
    ///
    /// # Errors
    /// [`Corrupt`] if it is not what was stored (R20); `page` then holds zeros.
    fn load(&self, handle: Handle, page: &mut Page) -> Result<(), Corrupt>;

    /// Is what the handle stores byte for byte `page`? Certain, not probable: what is stored is read
    /// back, into `readback`.
    fn same_as(&self, handle: Handle, page: &Page, readback: &mut Page) -> bool;

    /// Gives up a stored page.
    ///
    /// # Errors
    /// [`Corrupt`] if the handle does not name what is stored there; then nothing has changed.
    fn forget(&mut self, handle: Handle) -> Result<(), Corrupt>;
}
