//! Tiers: nodes ordered by what an access costs; demotion goes down, promotion up (mm/memory-tiers.c).
//!
//! A node's *abstract distance* follows from its latency and bandwidth relative to plain DRAM's; a tier holds the nodes whose
//! distances fall into one chunk. [`Tiers::demotion_order`] and [`Tiers::promotion_order`] say where a page may go next,
//! nearest first, out of the nodes that its domain and the grants allow (R14). [`Promotion`] says whether it goes up.
//! Pure. Called by [`migrate`](crate::migrate).

mod promotion;

use alloc::vec::Vec;

use crate::distance::{Distances, grow_to, list};
use crate::frames::FramesError;
use crate::node::Class;
use crate::nodemask::NodeMask;
use crate::units::NodeId;

pub use self::promotion::{Promotion, Verdict};

/// Width of a tier in abstract distance (`MEMTIER_CHUNK_SIZE`).
pub const CHUNK: u64 = 128;
/// Abstract distance of DRAM: the middle of its tier (`MEMTIER_ADISTANCE_DRAM`).
pub const DRAM: u64 = 4 * CHUNK + CHUNK / 2;

/// What an access to a node costs, from where it is fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Performance {
    /// Mean of read and write, ns; at least 1.
    pub latency_ns: u64,
    /// Mean of read and write, MiB/s; at least 1.
    pub bandwidth_mib_s: u64,
}

impl Performance {
    /// The abstract distance where `dram` performs at [`DRAM`]: in proportion to latency, and to the inverse of bandwidth
    /// (`mt_perf_to_adistance`).
    ///
    /// ```
    /// use spmem_core::tier::{DRAM, Performance};
    /// let dram = Performance { latency_ns: 80, bandwidth_mib_s: 100_000 };
    /// let cxl = Performance { latency_ns: 240, bandwidth_mib_s: 50_000 };
    /// assert_eq!((dram.abstract_distance(&dram), cxl.abstract_distance(&dram)), (DRAM, 6 * DRAM));
    /// ```
    pub fn abstract_distance(&self, dram: &Self) -> u64 {
        let scaled =
            u128::from(DRAM) * u128::from(self.latency_ns.max(1)) * u128::from(dram.bandwidth_mib_s.max(1));
        let by = u128::from(dram.latency_ns.max(1)) * u128::from(self.bandwidth_mib_s.max(1));
        u64::try_from(scaled / by).unwrap_or(u64::MAX)
    }
}

/// The abstract distance of memory of which only its class is known: a tier below DRAM for memory that is plain but for being reached by copy, then the
/// middles of the classes' bounds.
///
/// ```
/// use spmem_core::node::Class;
/// use spmem_core::tier::{CHUNK, DRAM, assumed_distance};
/// assert_eq!(assumed_distance(Class::Plain), DRAM + CHUNK);
/// assert!(assumed_distance(Class::Slower) < assumed_distance(Class::Slow));
/// ```
pub const fn assumed_distance(class: Class) -> u64 {
    match class {
        Class::Plain => DRAM + CHUNK,
        Class::Slower => 3 * DRAM,
        Class::Slow | Class::Featured | Class::Accelerator | Class::Shared => 10 * DRAM,
    }
}

/// The tiers of a machine; the lowest number is the fastest.
///
/// ```
/// use spmem_core::tier::{DRAM, Tiers};
/// use spmem_core::units::NodeId;
/// let mut tiers = Tiers::default();
/// tiers.set(NodeId::ONE, 3 * DRAM).unwrap();
/// assert!(tiers.tier(NodeId::ZERO) < tiers.tier(NodeId::ONE));
/// ```
#[derive(Clone, Debug, Default)]
pub struct Tiers {
    /// The abstract distance of each node, where one was set.
    known: Vec<Option<u64>>,
}

impl Tiers {
    /// Sets a node's abstract distance.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]: there is no memory for it; nothing has changed.
    pub fn set(&mut self, node: NodeId, abstract_distance: u64) -> Result<(), FramesError> {
        grow_to(&mut self.known, node)?;
        self.known[node.index()] = Some(abstract_distance);
        Ok(())
    }

    /// A node is gone.
    pub(crate) fn forget(&mut self, node: NodeId) {
        if let Some(known) = self.known.get_mut(node.index()) {
            *known = None;
        }
    }

    /// The tier of a node; that of DRAM where nothing is known.
    pub fn tier(&self, node: NodeId) -> u64 {
        self.known.get(node.index()).copied().flatten().unwrap_or(DRAM) / CHUNK
    }

    /// The nodes of `allowed` that lie in lower tiers than `from`: the next tier first, and within it the nearest; then the
    /// tiers below.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]: there is no memory for the list.
    pub fn demotion_order(
        &self,
        from: NodeId,
        allowed: &NodeMask,
        distances: &Distances,
    ) -> Result<Vec<NodeId>, FramesError> {
        let own = self.tier(from);
        let mut nodes = list(allowed, |node| (self.tier(node), distances.nearness(from, node)))?;
        nodes.retain(|&node| self.tier(node) > own);
        Ok(nodes)
    }

    /// The nodes of `allowed` that lie in higher tiers than `from`: the highest first, and within it the nearest to where the
    /// page is used.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]: there is no memory for the list.
    pub fn promotion_order(
        &self,
        from: NodeId,
        used_at: NodeId,
        allowed: &NodeMask,
        distances: &Distances,
    ) -> Result<Vec<NodeId>, FramesError> {
        let own = self.tier(from);
        let mut nodes = list(allowed, |node| (self.tier(node), distances.nearness(used_at, node)))?;
        nodes.retain(|&node| self.tier(node) < own);
        Ok(nodes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(node: u16) -> NodeId {
        NodeId::new(node).unwrap()
    }

    #[test]
    fn demotion_goes_to_the_next_tier_first_and_there_to_the_nearest_and_never_up_or_aside() {
        let (mut tiers, mut distances) = (Tiers::default(), Distances::default());
        for (node, adistance) in [(0, DRAM), (1, DRAM), (2, 3 * DRAM), (3, 3 * DRAM), (4, 9 * DRAM), (5, DRAM / 2)]
        {
            tiers.set(id(node), adistance).unwrap();
        }
        distances.set(id(0), id(3), 15).unwrap();
        distances.set(id(0), id(4), 12).unwrap();
        let all = NodeMask::ALL.intersection(&(0..6).map(id).collect());
        let order = |from| tiers.demotion_order(id(from), &all, &distances).unwrap();
        assert_eq!(order(0), [id(3), id(2), id(4)]);
        assert_eq!(order(4), []);
        let up = tiers.promotion_order(id(4), id(0), &all, &distances).unwrap();
        assert_eq!(up, [id(5), id(0), id(1), id(3), id(2)]);
        assert_eq!(
            tiers.demotion_order(id(0), &id(4).into(), &distances).unwrap(),
            [id(4)],
            "what is not allowed is passed over"
        );
    }
}
