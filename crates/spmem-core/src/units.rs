//! Units: node and domain numbers, frame numbers, counts, bytes, times and orders are different types.
//!
//! A value that exists is valid: [`NodeId`] and [`Order`] check when they are made, so nothing that takes one has to.
//! Used by every module here and by every caller.

use core::fmt;

/// Bytes in a page and in a frame.
pub const PAGE_SIZE: u64 = 4096;
/// Nodes there can be; numbers run from 0 to `MAX_NODES - 1`, as on Linux with `CONFIG_NODES_SHIFT=10`.
pub const MAX_NODES: u16 = 1024;
/// Domains there can be; numbers run from 0, the root, to `MAX_DOMAINS - 1`.
pub const MAX_DOMAINS: u16 = 1 << 14;

/// Why a number is not a valid unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitError {
    /// The node number is [`MAX_NODES`] or above.
    NodeTooLarge {
        /// The number given.
        node: u16,
    },
    /// The domain number is [`MAX_DOMAINS`] or above.
    DomainTooLarge {
        /// The number given.
        domain: u16,
    },
    /// The order is above [`Order::MAX`].
    OrderTooLarge {
        /// The number given.
        order: u8,
    },
}

impl fmt::Display for UnitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NodeTooLarge { node } => {
                write!(f, "no node can have number {node}; the highest is {}", MAX_NODES - 1)
            }
            Self::DomainTooLarge { domain } => {
                write!(f, "no domain can have number {domain}; the highest is {}", MAX_DOMAINS - 1)
            }
            Self::OrderTooLarge { order } => {
                write!(f, "no block can have order {order}; the highest is {} (4 MiB)", Order::MAX.get())
            }
        }
    }
}

impl core::error::Error for UnitError {}

/// Number of a node, 0 to 1023.
///
/// ```
/// use spmem_core::units::NodeId;
/// assert_eq!(NodeId::new(3).unwrap().get(), 3);
/// assert!(NodeId::new(1024).is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u16);

impl NodeId {
    /// Node 0: this machine's RAM in the embedded default.
    pub const ZERO: Self = Self(0);
    /// Node 1: compressed RAM in the embedded default.
    pub const ONE: Self = Self(1);

    /// The node with this number.
    ///
    /// # Errors
    /// [`UnitError::NodeTooLarge`] from [`MAX_NODES`] on.
    pub const fn new(node: u16) -> Result<Self, UnitError> {
        if node < MAX_NODES { Ok(Self(node)) } else { Err(UnitError::NodeTooLarge { node }) }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The number, to index with; always below [`MAX_NODES`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Number of a domain, 0 (the root) to 16383. Given out by the tree of domains; a number is used again once its domain is
/// gone.
///
/// ```
/// use spmem_core::units::DomainId;
/// assert_eq!(DomainId::new(0), Ok(DomainId::ROOT));
/// assert!(DomainId::new(1 << 14).is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(u16);

impl DomainId {
    /// The root of the tree.
    pub const ROOT: Self = Self(0);

    /// The domain with this number.
    ///
    /// # Errors
    /// [`UnitError::DomainTooLarge`] from [`MAX_DOMAINS`] on.
    pub const fn new(domain: u16) -> Result<Self, UnitError> {
        if domain < MAX_DOMAINS { Ok(Self(domain)) } else { Err(UnitError::DomainTooLarge { domain }) }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The number, to index with; always below [`MAX_DOMAINS`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A point in time, ns since a moment that the caller chose; it never runs backwards. Core has no clock: it is told.
///
/// ```
/// use spmem_core::units::Time;
/// assert_eq!(Time(1_000).since(Time(400)), 600);
/// assert_eq!(Time(400).since(Time(1_000)), 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Time {
    /// The latest there is: never.
    pub const NEVER: Self = Self(u64::MAX);

    /// Nanoseconds from `earlier` to this; 0 where it is later.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// This much later, ns; [`Time::NEVER`] where it does not fit.
    pub const fn after(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }
}

/// Index of a 4 KiB frame within its node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameNumber(pub u32);

impl FrameNumber {
    /// Where the frame begins, counted from the node's first byte.
    ///
    /// ```
    /// use spmem_core::units::{Bytes, FrameNumber};
    /// assert_eq!(FrameNumber(2).offset(), Bytes(8192));
    /// ```
    pub const fn offset(self) -> Bytes {
        Bytes(self.0 as u64 * PAGE_SIZE)
    }
}

impl fmt::Display for FrameNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A number of 4 KiB frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameCount(pub u64);

impl FrameCount {
    /// The same amount in bytes; `u64::MAX` where it does not fit.
    pub const fn bytes(self) -> Bytes {
        Bytes(self.0.saturating_mul(PAGE_SIZE))
    }
}

impl fmt::Display for FrameCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl Bytes {
    /// `mib` times 2^20 bytes; `u64::MAX` where it does not fit.
    pub const fn mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }

    /// Whole frames that hold this many bytes, rounded up.
    ///
    /// ```
    /// use spmem_core::units::{Bytes, FrameCount};
    /// assert_eq!(Bytes(4097).frames_ceil(), FrameCount(2));
    /// ```
    pub const fn frames_ceil(self) -> FrameCount {
        FrameCount(self.0.div_ceil(PAGE_SIZE))
    }

    /// Whole frames that fit into this many bytes.
    pub const fn frames_floor(self) -> FrameCount {
        FrameCount(self.0 / PAGE_SIZE)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)
    }
}

/// Size of a block: order k is 2^k frames, k from 0 (4 KiB) to 10 (4 MiB).
///
/// ```
/// use spmem_core::units::{FrameCount, Order};
/// assert_eq!(Order::new(9).unwrap().frames(), FrameCount(512));
/// assert!(Order::new(11).is_err());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Order(u8);

impl Order {
    /// One frame.
    pub const ZERO: Self = Self(0);
    /// 512 frames, 2 MiB: a huge frame.
    pub const HUGE: Self = Self(9);
    /// 1024 frames, 4 MiB.
    pub const MAX: Self = Self(10);
    /// Orders there are.
    pub const COUNT: usize = 11;

    /// The order with this number.
    ///
    /// # Errors
    /// [`UnitError::OrderTooLarge`] above 10.
    pub const fn new(order: u8) -> Result<Self, UnitError> {
        if order <= Self::MAX.0 { Ok(Self(order)) } else { Err(UnitError::OrderTooLarge { order }) }
    }

    /// The smallest order whose block holds `bytes`; `None` above 4 MiB.
    ///
    /// ```
    /// use spmem_core::units::{Bytes, Order};
    /// assert_eq!(Order::fitting(Bytes(12288)).map(Order::get), Some(2));
    /// assert_eq!(Order::fitting(Bytes((4 << 20) + 1)), None);
    /// ```
    pub const fn fitting(bytes: Bytes) -> Option<Self> {
        let mut order = 0;
        while order <= Self::MAX.0 {
            if Self(order).bytes().0 >= bytes.0 {
                return Some(Self(order));
            }
            order += 1;
        }
        None
    }

    /// The number, 0 to 10.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The number, to index with; always below [`Order::COUNT`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Frames in a block.
    pub const fn frames(self) -> FrameCount {
        FrameCount(1 << self.0)
    }

    /// Bytes in a block.
    pub const fn bytes(self) -> Bytes {
        Bytes(PAGE_SIZE << self.0)
    }

    /// Every order, lowest first.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> {
        (0..=Self::MAX.0).map(Self)
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
