//! Pages: how many pages of a process are on which node, by what is known of their range (numa_maps, numa(7)).

use std::collections::BTreeMap;

use serde::Serialize;
use spmem_core::nodemask::NodeMask;
use spmem_core::units::NodeId;

/// What doors call the files that they hand over (memfd_create(2)).
const DOOR: &str = "file=/memfd:spmem-door\\040(deleted)";
const PAGE_KIB: u64 = 4;

/// What put pages on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// Their range is strictly bound to nodes that include it.
    Bind,
    /// They came through a door.
    Door,
    /// `spm run` has placed them, by its grant.
    Run,
}

impl By {
    /// As the table has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Door => "door",
            Self::Run => "run",
        }
    }
}

/// What a process has on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Pages {
    /// The kernel's number of a node of kind "numa", of others that of the run's configuration.
    pub node: u32,
    /// As the configuration has it.
    pub kind: &'static str,
    pub pages: u64,
    /// What they take there.
    pub bytes: u64,
}

/// Pages on the nodes of `wanted`, by node, each with what put them there.
pub fn pages_on(numa_maps: &str, wanted: &NodeMask) -> Vec<(Option<By>, Pages)> {
    let mut found: BTreeMap<(NodeId, Option<By>), Pages> = BTreeMap::new();
    for line in numa_maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let kib = words.iter().find_map(|word| word.strip_prefix("kernelpagesize_kB=")?.parse().ok());
        for (node, pages) in words.iter().filter_map(|word| pages_of(word)) {
            if wanted.contains(node) {
                let none = Pages { node: node.get().into(), kind: "numa", pages: 0, bytes: 0 };
                let sum = found.entry((node, by(&words, node))).or_insert(none);
                sum.pages += pages;
                sum.bytes += pages * kib.unwrap_or(PAGE_KIB) * 1024;
            }
        }
    }
    found.into_iter().map(|((_, by), pages)| (by, pages)).collect()
}

/// `N2=17`
fn pages_of(word: &str) -> Option<(NodeId, u64)> {
    let (node, pages) = word.strip_prefix('N')?.split_once('=')?;
    Some((NodeId::new(node.parse().ok()?).ok()?, pages.parse().ok()?))
}

fn by(words: &[&str], node: NodeId) -> Option<By> {
    if words.contains(&DOOR) {
        return Some(By::Door);
    }
    // `bind:2`, `bind=static:2`, `bind=static|balancing:2`; relative numbers are no names.
    let (mode, nodes) = words.get(1)?.split_once(':')?;
    let (mode, flags) = mode.split_once('=').unwrap_or((mode, ""));
    let is_bind = mode == "bind" && flags.split('|').all(|flag| flag != "relative");
    let names_it = NodeMask::parse(nodes, NodeMask::EMPTY).is_ok_and(|mask| mask.contains(node));
    (is_bind && names_it).then_some(By::Bind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_by_node_and_by_what_put_them_there() {
        let text = "\
55d0 default file=/usr/bin/cat mapped=5 N0=5 kernelpagesize_kB=4
7f00 bind:2 anon=3 dirty=3 N2=3 kernelpagesize_kB=4
7f10 bind=static:1-2 anon=2 dirty=2 N1=1 N2=1 kernelpagesize_kB=4
7f20 interleave:0-3 anon=4 dirty=4 N0=1 N1=1 N2=1 N3=1 kernelpagesize_kB=4
7f30 default file=/memfd:spmem-door\\040(deleted) dirty=6 N3=6 kernelpagesize_kB=4
7f40 bind:3 huge anon=1 dirty=1 N3=1 kernelpagesize_kB=2048
7f50 bind=balancing:2 anon=1 dirty=1 N2=1 kernelpagesize_kB=4
7f60 bind=static|balancing:2 anon=1 dirty=1 N2=1 kernelpagesize_kB=4
7f70 bind=relative:2 anon=1 dirty=1 N2=1 kernelpagesize_kB=4
7f80 default file=/memfd:spmem-doorway\\040(deleted) dirty=1 N2=1 kernelpagesize_kB=4
";
        let wanted = NodeMask::parse("2-3", NodeMask::EMPTY).unwrap();
        let of = |node, by, pages, bytes| (by, Pages { node, kind: "numa", pages, bytes });
        let expected = [
            of(2, None, 3, 3 * 4096),
            of(2, Some(By::Bind), 6, 6 * 4096),
            of(3, None, 1, 4096),
            of(3, Some(By::Bind), 1, 2 << 20),
            of(3, Some(By::Door), 6, 6 * 4096),
        ];
        assert_eq!(pages_on(text, &wanted), expected);
    }
}
