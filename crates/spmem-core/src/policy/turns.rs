//! Taking nodes in turn: interleaving by the task, and by the place of a page in its range.

use super::Mode;
use crate::nodemask::NodeMask;
use crate::units::NodeId;

/// Where a task is in its turns (`il_prev` and `il_weight`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turns {
    last: Option<NodeId>,
    /// Pages that the last node still gets in this turn.
    left: u8,
}

impl Turns {
    /// The node whose turn it is; `None` when there is none. `weight` is 1 or more.
    ///
    /// ```
    /// use spmem_core::{nodemask::NodeMask, policy::{Mode, Turns}, units::NodeId};
    /// let (nodes, mut turns) = ([NodeId::ZERO, NodeId::ONE].into_iter().collect::<NodeMask>(), Turns::default());
    /// let weight = |node| if node == NodeId::ONE { 2 } else { 1 };
    /// let mut next = || turns.next(Mode::WeightedInterleave, &nodes, weight).unwrap().get();
    /// assert_eq!([next(), next(), next(), next()], [0, 1, 1, 0]);
    /// ```
    pub fn next(&mut self, mode: Mode, nodes: &NodeMask, weight: impl Fn(NodeId) -> u8) -> Option<NodeId> {
        if let Some(last) = self.last
            && self.left > 0
            && nodes.contains(last)
        {
            self.left -= 1;
            return Some(last);
        }
        let node = nodes.next_in_ring(self.last)?;
        self.left = if mode == Mode::WeightedInterleave { weight(node).saturating_sub(1) } else { 0 };
        self.last = Some(node);
        Some(node)
    }
}

/// The node of the page with this index in a range that mbind(2) interleaves: it does not depend on what was touched
/// before. `weight` is 1 or more.
///
/// ```
/// use spmem_core::{nodemask::NodeMask, policy::{Mode, node_of}, units::NodeId};
/// let nodes = [NodeId::ZERO, NodeId::ONE].into_iter().collect::<NodeMask>();
/// assert_eq!(node_of(Mode::Interleave, &nodes, |_| 1, 7), Some(NodeId::ONE));
/// ```
pub fn node_of(mode: Mode, nodes: &NodeMask, weight: impl Fn(NodeId) -> u8, index: u64) -> Option<NodeId> {
    let weight = |node| if mode == Mode::WeightedInterleave { u64::from(weight(node).max(1)) } else { 1 };
    let sum: u64 = nodes.iter().map(weight).sum();
    let mut at = index.checked_rem(sum)?;
    nodes.iter().find(|&node| {
        let is_here = at < weight(node);
        at = at.saturating_sub(weight(node));
        is_here
    })
}
