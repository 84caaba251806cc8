//! Demotion: the kernel moves cold pages to slower nodes by itself, where it is told to, and asks no cpuset whether it may.
//!
//! [`reached`] says which nodes outside of a wall pages from inside go to that way. Seen on Linux 6.12; on 7.3 only the cpuset of a cgroup with a memory
//! controller of its own is asked, which a wall has not. The kernel's own `node_demotion` is not to be read: what counts is the order of tiers.
//!
//! Hole: demotion may be switched on later.

use std::collections::BTreeMap;
use std::path::Path;

use spmem_core::nodemask::NodeMask;
use spmem_node::machine::{Machine, Overrides};

/// The switch (Documentation/ABI/testing/sysfs-kernel-mm-numa).
pub const SWITCH: &str = "/sys/kernel/mm/numa/demotion_enabled";

/// Nodes of `outside` to which the kernel demotes pages of `inside`.
pub fn reached(inside: &NodeMask, outside: &NodeMask) -> NodeMask {
    let is_on = std::fs::read_to_string(SWITCH).is_ok_and(|text| matches!(text.trim(), "true" | "1"));
    if !is_on {
        return NodeMask::EMPTY;
    }
    let machine = Machine::read(Path::new("/"), &Overrides::new());
    let tiers = machine.nodes.iter().filter_map(|node| Some((node.id, node.tier?))).collect();
    below(&tiers, inside, outside)
}

/// A higher number is a slower tier. A node of no known tier may be in any.
fn below(tiers: &BTreeMap<u16, u64>, inside: &NodeMask, outside: &NodeMask) -> NodeMask {
    let tier = |node: spmem_core::units::NodeId| tiers.get(&node.get()).copied();
    let fastest = inside.iter().map(|node| tier(node).unwrap_or(0)).min().unwrap_or(0);
    outside.iter().filter(|&node| tier(node).is_none_or(|tier| tier > fastest)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_demoted_to_slower_tiers_and_no_others() {
        let tiers = BTreeMap::from([(0, 4), (1, 4), (2, 67), (3, 0)]);
        let list = |text| NodeMask::parse(text, NodeMask::EMPTY).unwrap();
        let below = |inside, outside| below(&tiers, &list(inside), &list(outside));
        assert_eq!(below("0-1", "2-3"), list("2"));
        assert_eq!(below("3", "0-2"), list("0-2"));
        assert_eq!(below("2", "0-1,3"), NodeMask::EMPTY);
        assert_eq!(below("0", "1"), NodeMask::EMPTY, "the same tier");
        assert_eq!(below("0", "3,5"), list("5"), "of no known tier");
    }
}
