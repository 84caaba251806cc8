//! Distances: how far nodes are from each other, as the firmware's SLIT has it (ACPI 6.5, 5.2.17).
//!
//! [`Distances`] answers what demotion targets ([`Distances::order`]) and fallback order ([`Distances::zonelist`]) follow
//! from. What nobody has set is 10 for a node to
//! itself and 20 to any other. Takes no lock: part of the registry.

use alloc::vec::Vec;
use core::cmp::Reverse;
use core::fmt;

use crate::frames::FramesError;
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
    /// The heap has nothing left for it.
    NoMemory,
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
            Self::NoMemory => f.write_str("the heap has nothing left for the distance"),
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
pub struct Distances {
    /// A row for each node from which a distance was set, in it one for each node to which; 0 where none was.
    rows: Vec<Vec<u8>>,
}

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
        let no_memory = |_| DistanceError::NoMemory;
        grow_to(&mut self.rows, from).map_err(no_memory)?;
        let row = &mut self.rows[from.index()];
        grow_to(row, to).map_err(no_memory)?;
        row[to.index()] = distance;
        Ok(())
    }

    /// How far it is.
    pub fn get(&self, from: NodeId, to: NodeId) -> u8 {
        let known = self.rows.get(from.index()).and_then(|row| row.get(to.index()));
        let known = known.copied().filter(|&distance| distance > 0);
        known.unwrap_or(if from == to { LOCAL } else { REMOTE })
    }

    /// The nodes of a mask, nearest to `from` first; of those as near, `from` itself, then the lowest number.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]: there is no memory for the list.
    pub fn order(&self, from: NodeId, mask: &NodeMask) -> Result<Vec<NodeId>, FramesError> {
        list(mask, |node| self.nearness(from, node))
    }

    /// Orders nodes by how near they are to `from`.
    pub(crate) fn nearness(&self, from: NodeId, node: NodeId) -> (u8, Reverse<bool>, NodeId) {
        (self.get(from, node), Reverse(node == from), node)
    }

    /// The nodes of a mask in the order of `from`'s zonelist, as Linux builds it (`find_next_best_node` in mm/page_alloc.c): itself,
    /// then the nearest, where a lower number than `from`'s counts as farther by one; of those as near, the lowest number. Hole:
    /// Linux also puts off nodes with processors, and shares nodes as near among those that fall back to them.
    ///
    /// ```
    /// use spmem_core::{distance::Distances, nodemask::NodeMask, units::NodeId};
    /// let nodes: NodeMask = [0, 1, 2, 3].map(|node| NodeId::new(node).unwrap()).into_iter().collect();
    /// let two = NodeId::new(2).unwrap();
    /// let mut distances = Distances::default();
    /// let order = distances.zonelist(two, &nodes).unwrap();
    /// assert_eq!(order.iter().map(|node| node.get()).collect::<Vec<_>>(), [2, 3, 0, 1]);
    /// assert_eq!(distances.next_in_zonelist(two, &nodes, order[1]), Some(order[2]));
    /// ```
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]: there is no memory for the list.
    pub fn zonelist(&self, from: NodeId, mask: &NodeMask) -> Result<Vec<NodeId>, FramesError> {
        list(mask, |node| self.place(from, node))
    }

    /// The node of a mask that follows another one in `from`'s zonelist; `None` behind the last. O(nodes), and takes no memory.
    pub fn next_in_zonelist(&self, from: NodeId, mask: &NodeMask, after: NodeId) -> Option<NodeId> {
        let after = self.place(from, after);
        let places = mask.iter().map(|node| self.place(from, node));
        places.filter(|&place| place > after).min().map(|(.., node)| node)
    }

    /// Orders the nodes of `from`'s zonelist.
    fn place(&self, from: NodeId, node: NodeId) -> (bool, u16, NodeId) {
        (node != from, u16::from(self.get(from, node)) + u16::from(node < from), node)
    }

    /// A node is gone: what is said of it would be wrong of its successor.
    pub(crate) fn forget(&mut self, node: NodeId) {
        if let Some(row) = self.rows.get_mut(node.index()) {
            *row = Vec::new();
        }
        for to in self.rows.iter_mut().filter_map(|row| row.get_mut(node.index())) {
            *to = 0;
        }
    }
}

/// A list that is indexed by nodes gets a place for one.
pub(crate) fn grow_to<T: Default>(list: &mut Vec<T>, node: NodeId) -> Result<(), FramesError> {
    if let Some(missing @ 1..) = (node.index() + 1).checked_sub(list.len()) {
        list.try_reserve(missing).map_err(|_| FramesError::NoMetadata)?;
        list.resize_with(node.index() + 1, T::default);
    }
    Ok(())
}

/// The nodes of a mask in the order of their keys, no two of which are the same.
pub(crate) fn list<K: Ord>(mask: &NodeMask, key: impl Fn(NodeId) -> K) -> Result<Vec<NodeId>, FramesError> {
    let mut nodes = Vec::new();
    nodes.try_reserve_exact(mask.iter().count()).map_err(|_| FramesError::NoMetadata)?;
    nodes.extend(mask);
    // In place: the stable sort may take memory.
    nodes.sort_unstable_by_key(|&node| key(node));
    Ok(nodes)
}
