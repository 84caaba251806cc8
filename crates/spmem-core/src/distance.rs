//! Distances: how far nodes are from each other, as the firmware's SLIT has it (ACPI 6.5, 5.2.17).
//!
//! [`Distances`] answers what fallback order and demotion targets follow from. What nobody has set is 10 for a node to
//! itself and 20 to any other. Takes no lock: part of the registry.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::cmp::Reverse;
use core::fmt;

use crate::nodemask::NodeMask;
use crate::units::NodeId;

/// Of a node to itself.
pub const LOCAL: u8 = 10;
/// Between nodes of which nothing else is known.
pub const REMOTE: u8 = 20;

/// Why a distance is refused. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DistanceError {
    /// A node is [`LOCAL`] from itself.
    NotLocal {
        /// The node.
        node: NodeId,
        /// As given.
        distance: u8,
    },
    /// Another node is no nearer than [`LOCAL`]; 255 would say that it cannot be reached.
    OutOfRange {
        /// From.
        from: NodeId,
        /// To.
        to: NodeId,
        /// As given.
        distance: u8,
    },
}

impl fmt::Display for DistanceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotLocal { node, distance } => {
                write!(f, "node {node} cannot be {distance} from itself, only {LOCAL}")
            }
            Self::OutOfRange { from, to, distance } => {
                write!(f, "node {to} cannot be {distance} from node {from}, only {LOCAL} to 254")
            }
        }
    }
}

impl core::error::Error for DistanceError {}

/// Distances between nodes.
///
/// ```
/// use spmem_core::{distance::Distances, units::NodeId};
/// let mut distances = Distances::default();
/// distances.set(NodeId::ZERO, NodeId::ONE, 31).unwrap();
/// assert_eq!(distances.get(NodeId::ZERO, NodeId::ONE), 31);
/// assert_eq!(distances.get(NodeId::ONE, NodeId::ZERO), 20);
/// assert!(distances.set(NodeId::ONE, NodeId::ONE, 11).is_err());
/// ```
#[derive(Clone, Debug, Default)]
pub struct Distances(BTreeMap<(NodeId, NodeId), u8>);

impl Distances {
    /// Sets one, in one direction.
    ///
    /// # Errors
    /// [`DistanceError`]
    pub fn set(&mut self, from: NodeId, to: NodeId, distance: u8) -> Result<(), DistanceError> {
        if from == to && distance != LOCAL {
            return Err(DistanceError::NotLocal { node: from, distance });
        }
        if distance < LOCAL || distance == u8::MAX {
            return Err(DistanceError::OutOfRange { from, to, distance });
        }
        self.0.insert((from, to), distance);
        Ok(())
    }

    /// How far it is.
    pub fn get(&self, from: NodeId, to: NodeId) -> u8 {
        let known = self.0.get(&(from, to)).copied();
        known.unwrap_or(if from == to { LOCAL } else { REMOTE })
    }

    /// The nodes of a mask, nearest to `from` first; of those as near, `from` itself, then the lowest number.
    pub fn order(&self, from: NodeId, mask: &NodeMask) -> Vec<NodeId> {
        let mut nodes: Vec<NodeId> = mask.iter().collect();
        nodes.sort_by_key(|&node| (self.get(from, node), Reverse(node == from), node));
        nodes
    }

    /// A node is gone: what is said of it would be wrong of its successor.
    pub(crate) fn forget(&mut self, node: NodeId) {
        self.0.retain(|&(from, to), _| from != node && to != node);
    }
}
