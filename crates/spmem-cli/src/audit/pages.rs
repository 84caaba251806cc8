//! Pages: how many pages of a process are on which node, by what is known of their range (numa_maps, numa(7)).

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use spmem_core::nodemask::NodeMask;
use spmem_core::units::NodeId;

use super::rolls::Title;

const PAGE_KIB: u64 = 4;

/// What put pages on a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct By {
    /// How.
    pub kind: Kind,
    /// By which grant, where somebody tells who is to be believed.
    #[serde(flatten)]
    pub title: Option<Title>,
}

/// How pages come to be on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Their range is strictly bound to nodes that include it.
    Bind,
    /// They came through a door.
    Door,
    /// `spm run` has placed or copied them.
    Run,
}

impl By {
    const BIND: Self = Self { kind: Kind::Bind, title: None };

    pub const fn door(title: Title) -> Self {
        Self { kind: Kind::Door, title: Some(title) }
    }

    pub const fn run(title: Option<Title>) -> Self {
        Self { kind: Kind::Run, title }
    }
}

impl fmt::Display for By {
    /// `run 4711/2`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            Kind::Bind => "bind",
            Kind::Door => "door",
            Kind::Run => "run",
        })?;
        self.title.as_ref().map_or(Ok(()), |title| write!(f, " {}/{}", title.process, title.grant))
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

impl Pages {
    /// Those that so many bytes have room for, and the others.
    pub fn split(self, bytes: u64) -> (Self, Self) {
        if self.bytes <= bytes {
            return (self, Self { pages: 0, bytes: 0, ..self });
        }
        let each = self.bytes / self.pages.max(1);
        let within = (bytes / each.max(1)).min(self.pages);
        let part = |pages| Self { pages, bytes: pages * each, ..self };
        (part(within), part(self.pages - within))
    }
}

/// Pages on the nodes of `wanted`, by node, each with what put them there. `told` says which of the pages that a range, by its first address, has on a node came through
/// doors; of the others its policy speaks.
pub fn pages_on(
    numa_maps: &str,
    wanted: &NodeMask,
    told: impl Fn(u64, NodeId, u64) -> Vec<(Title, u64)>,
) -> Vec<(Option<By>, Pages)> {
    let mut found: BTreeMap<(NodeId, Option<By>), Pages> = BTreeMap::new();
    for line in numa_maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let start = words.first().and_then(|word| u64::from_str_radix(word, 16).ok()).unwrap_or(0);
        let kib = words.iter().find_map(|word| word.strip_prefix("kernelpagesize_kB=")?.parse().ok());
        for (node, mut left) in words.iter().filter_map(|word| pages_of(word)) {
            if !wanted.contains(node) {
                continue;
            }
            let mut add = |by, pages| {
                let none = Pages { node: node.get().into(), kind: "numa", pages: 0, bytes: 0 };
                let sum = found.entry((node, by)).or_insert(none);
                sum.pages += pages;
                sum.bytes += pages * kib.unwrap_or(PAGE_KIB) * 1024;
            };
            for (title, pages) in told(start, node, left) {
                let pages = pages.min(left);
                left -= pages;
                add(Some(By::door(title)), pages);
            }
            if left > 0 {
                add(is_bound(&words, node).then_some(By::BIND), left);
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

fn is_bound(words: &[&str], node: NodeId) -> bool {
    // `bind:2`, `bind=static:2`, `bind=static|balancing:2`; relative numbers are no names.
    let Some((mode, nodes)) = words.get(1).and_then(|policy| policy.split_once(':')) else { return false };
    let (mode, flags) = mode.split_once('=').unwrap_or((mode, ""));
    let is_bind = mode == "bind" && flags.split('|').all(|flag| flag != "relative");
    is_bind && NodeMask::parse(nodes, NodeMask::EMPTY).is_ok_and(|mask| mask.contains(node))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_a_quota_is_not_within_it() {
        let pages = Pages { node: 2, kind: "numa", pages: 10, bytes: 10 * 4096 };
        let (within, beyond) = pages.split(3 * 4096 + 1);
        assert_eq!((within.pages, within.bytes, beyond.pages, beyond.bytes), (3, 3 * 4096, 7, 7 * 4096));
        assert_eq!((pages.split(1 << 20).0, pages.split(0).1), (pages, pages));
    }

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
7f80 default anon=3 dirty=3 N2=3 kernelpagesize_kB=4
";
        let wanted = NodeMask::parse("2-3", NodeMask::EMPTY).unwrap();
        let of = |node, by, pages, bytes| (by, Pages { node, kind: "numa", pages, bytes });
        let title = |grant: &str| Title { process: 9, grant: grant.to_owned() };
        let told = |start, node: NodeId, pages| match (start, node.get()) {
            (0x7f30, 3) => vec![(title("0"), pages)],
            // More is told of than there is.
            (0x7f80, 2) => vec![(title("1"), 2), (title("2"), 7)],
            _ => Vec::new(),
        };
        let expected = [
            of(2, None, 2, 2 * 4096),
            of(2, Some(By::BIND), 6, 6 * 4096),
            of(2, Some(By::door(title("1"))), 2, 2 * 4096),
            of(2, Some(By::door(title("2"))), 1, 4096),
            of(3, None, 1, 4096),
            of(3, Some(By::BIND), 1, 2 << 20),
            of(3, Some(By::door(title("0"))), 6, 6 * 4096),
        ];
        assert_eq!(pages_on(text, &wanted, told), expected);
        let named = "7f30 default file=/memfd:spmem-door\\040(deleted) dirty=6 N3=6 kernelpagesize_kB=4\n";
        let found = pages_on(named, &wanted, |_, _, _| Vec::new());
        assert_eq!(found, [of(3, None, 6, 6 * 4096)], "a name is no door");
        assert_eq!(By::run(Some(title("2"))).to_string(), "run 9/2");
    }
}
