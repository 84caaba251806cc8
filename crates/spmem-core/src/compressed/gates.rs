//! Gates: three reasons why nothing enters a compressed node, each with a key that only who set it has.
//!
//! [`Allocation`]: its owner wants no more on it. [`Converging`]: the balloon has not got what it is to hold.
//! [`TearingDown`]: the node is being emptied. Whoever sets a gate gets a [`Key`] of its type; there is no other way to clear
//! it, so that who is done with one reason never lifts another's.

use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicU64, Ordering};

/// Which gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gate {
    /// The owner wants no more on the node.
    Allocation,
    /// The balloon takes frames back.
    Converging,
    /// The node is being emptied.
    TearingDown,
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allocation => "closed to allocation",
            Self::Converging => "shrinking",
            Self::TearingDown => "being torn down",
        })
    }
}

mod sealed {
    pub trait Kind {
        const GATE: super::Gate;
    }
}
use sealed::Kind;

/// The gate of a node's owner.
#[derive(Debug, PartialEq, Eq)]
pub enum Allocation {}
/// The gate of the balloon.
#[derive(Debug, PartialEq, Eq)]
pub enum Converging {}
/// The gate of the teardown.
#[derive(Debug, PartialEq, Eq)]
pub enum TearingDown {}

impl Kind for Allocation {
    const GATE: Gate = Gate::Allocation;
}
impl Kind for Converging {
    const GATE: Gate = Gate::Converging;
}
impl Kind for TearingDown {
    const GATE: Gate = Gate::TearingDown;
}

/// Clears one gate of one node, once. Not copyable, and made by [`Gates::set`] only.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a gate whose key is dropped stays shut"]
pub struct Key<K> {
    serial: u64,
    kind: PhantomData<K>,
}

/// The gate is shut already, and somebody else has the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsSet(pub Gate);

impl fmt::Display for IsSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the node is {} already", self.0)
    }
}

impl core::error::Error for IsSet {}

/// The gates of a node: nothing enters while any is shut.
///
/// ```
/// use spmem_core::compressed::{Allocation, Converging, Gate, Gates};
/// let mut gates = Gates::new();
/// let owners = gates.set::<Allocation>().unwrap();
/// let balloons = gates.set::<Converging>().unwrap();
/// assert!(gates.set::<Allocation>().is_err(), "somebody has it");
/// gates.clear(balloons).unwrap();
/// assert_eq!(gates.first_set(), Some(Gate::Allocation), "the owner's stays shut");
/// gates.clear(owners).unwrap();
/// assert_eq!(gates.first_set(), None);
/// ```
#[derive(Debug, Default)]
pub struct Gates {
    /// Serial numbers of the keys that are out, by gate; 0 for none.
    keys: [u64; 3],
}

impl Gates {
    /// All open.
    pub const fn new() -> Self {
        Self { keys: [0; 3] }
    }

    /// Shuts a gate; the key opens it.
    ///
    /// # Errors
    /// [`IsSet`] while it is shut.
    pub fn set<K: Kind>(&mut self) -> Result<Key<K>, IsSet> {
        /// No two keys are alike, of whatever node. Relaxed: only the value matters.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let slot = &mut self.keys[K::GATE as usize];
        if *slot != 0 {
            return Err(IsSet(K::GATE));
        }
        *slot = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Key { serial: *slot, kind: PhantomData })
    }

    /// Opens the gate that the key is of.
    ///
    /// # Errors
    /// The key, when it is another node's.
    pub fn clear<K: Kind>(&mut self, key: Key<K>) -> Result<(), Key<K>> {
        let slot = &mut self.keys[K::GATE as usize];
        if *slot != key.serial {
            return Err(key);
        }
        *slot = 0;
        Ok(())
    }

    /// Whether a gate is shut.
    pub const fn is_set(&self, gate: Gate) -> bool {
        self.keys[gate as usize] != 0
    }

    /// A gate that is shut.
    pub fn first_set(&self) -> Option<Gate> {
        [Gate::Allocation, Gate::Converging, Gate::TearingDown].into_iter().find(|&gate| self.is_set(gate))
    }
}
