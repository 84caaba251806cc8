//! Node masks: sets of nodes, and how they are written.
//!
//! [`NodeMask`] holds any of 1024 nodes in 128 bytes. The text form is numactl's (`0,2-3`, `!1`, `all`). `all` is the
//! mask that the caller supplies, which must be a *default* mask: it never names an SPM node (R8).

use core::fmt;

use crate::units::{MAX_NODES, NodeId};

const WORDS: usize = MAX_NODES as usize / 64;

/// A set of nodes.
///
/// ```
/// use spmem_core::nodemask::NodeMask;
/// let mask = NodeMask::parse("0,2-3", NodeMask::EMPTY).unwrap();
/// assert_eq!(mask.count(), 3);
/// assert_eq!(mask.to_string(), "0,2-3");
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct NodeMask([u64; WORDS]);

/// Why a text is not a node list. `at` is the byte offset of what is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// A node number was expected.
    NotANumber {
        /// Byte offset.
        at: usize,
        /// What stands there; `None` at the end of the text.
        found: Option<char>,
    },
    /// After a node only `,`, `-` or the end may follow.
    Trailing {
        /// Byte offset.
        at: usize,
        /// What stands there.
        found: char,
    },
    /// The number is above the highest node number.
    TooLarge {
        /// Byte offset of the number.
        at: usize,
    },
    /// A range whose first node is above its last.
    Reversed {
        /// Byte offset of the range.
        at: usize,
        /// First node as written.
        first: NodeId,
        /// Last node as written.
        last: NodeId,
    },
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotANumber { at, found: Some(found) } => {
                write!(f, "expected a node number at byte {at}, found {found:?}; ")?;
            }
            Self::NotANumber { at, found: None } => {
                write!(f, "expected a node number at byte {at}, found the end; ")?;
            }
            Self::Trailing { at, found } => {
                write!(f, "expected ',' or '-' or the end at byte {at}, found {found:?}; ")?;
            }
            Self::TooLarge { at } => {
                write!(f, "the number at byte {at} is above the highest node, {}; ", MAX_NODES - 1)?;
            }
            Self::Reversed { at, first, last } => {
                return write!(f, "the range at byte {at} runs backwards; write {last}-{first}");
            }
        }
        f.write_str("a node list looks like 0,2-3 or !1 or all")
    }
}

impl core::error::Error for ParseError {}

impl NodeMask {
    /// No node.
    pub const EMPTY: Self = Self([0; WORDS]);
    /// Every node there can be.
    pub const ALL: Self = Self([u64::MAX; WORDS]);

    /// The set of one node.
    pub const fn of(node: NodeId) -> Self {
        let mut words = [0; WORDS];
        words[node.index() / 64] = 1 << (node.index() % 64);
        Self(words)
    }

    /// Reads a node list: numbers and ranges joined by commas (`0,2-3`), the same after `!` for every node of
    /// `default` but those, `all` for `default` itself, `none` for the empty set.
    ///
    /// # Errors
    /// [`ParseError`] says what is wrong, at which byte, and what would work.
    ///
    /// ```
    /// use spmem_core::{nodemask::{NodeMask, ParseError}, units::NodeId};
    /// let sysram = NodeMask::of(NodeId::ZERO);
    /// assert_eq!(NodeMask::parse("all", sysram), Ok(sysram));
    /// assert_eq!(NodeMask::parse("0,x", sysram), Err(ParseError::NotANumber { at: 2, found: Some('x') }));
    /// ```
    pub fn parse(text: &str, default: Self) -> Result<Self, ParseError> {
        match text {
            "all" => Ok(default),
            "none" => Ok(Self::EMPTY),
            _ => match text.strip_prefix('!') {
                Some(_) => Ok(default.difference(&parse_list(text, 1)?)),
                None => parse_list(text, 0),
            },
        }
    }

    /// Adds a node.
    pub const fn insert(&mut self, node: NodeId) {
        self.0[node.index() / 64] |= 1 << (node.index() % 64);
    }

    /// Takes a node out.
    pub const fn remove(&mut self, node: NodeId) {
        self.0[node.index() / 64] &= !(1 << (node.index() % 64));
    }

    /// Whether the node is in the set.
    pub const fn contains(&self, node: NodeId) -> bool {
        self.0[node.index() / 64] & (1 << (node.index() % 64)) != 0
    }

    /// Whether no node is in the set.
    pub fn is_empty(&self) -> bool {
        self.0.iter().fold(0, |any, word| any | word) == 0
    }

    /// Nodes in the set.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Nodes in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    /// Nodes in either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    /// Nodes in this one and not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    /// Whether every node of this set is in `other`.
    pub fn is_subset(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).all(|(a, b)| a & !b == 0)
    }

    /// The lowest node.
    ///
    /// ```
    /// use spmem_core::{nodemask::NodeMask, units::NodeId};
    /// assert_eq!(NodeMask::of(NodeId::ONE).first(), Some(NodeId::ONE));
    /// assert_eq!(NodeMask::EMPTY.first(), None);
    /// ```
    pub fn first(&self) -> Option<NodeId> {
        self.iter().next()
    }

    /// The nodes, lowest first.
    pub fn iter(&self) -> Iter<'_> {
        Iter { mask: self, word: 0, left: self.0[0] }
    }

    /// The next node after `node`, or the first where there is none: the nodes as a ring.
    pub(crate) fn next_in_ring(&self, node: Option<NodeId>) -> Option<NodeId> {
        let Some(node) = node else { return self.first() };
        let (word, bit) = (node.get() / 64, node.get() % 64);
        let above = (u64::MAX << bit) << 1;
        let rest = Iter { mask: self, word, left: self.0[usize::from(word)] & above };
        rest.chain(self.iter()).next()
    }

    fn zip(&self, other: &Self, op: impl Fn(u64, u64) -> u64) -> Self {
        let mut words = [0; WORDS];
        for (word, (a, b)) in words.iter_mut().zip(self.0.iter().zip(&other.0)) {
            *word = op(*a, *b);
        }
        Self(words)
    }
}

impl FromIterator<NodeId> for NodeMask {
    fn from_iter<T: IntoIterator<Item = NodeId>>(nodes: T) -> Self {
        let mut mask = Self::EMPTY;
        nodes.into_iter().for_each(|node| mask.insert(node));
        mask
    }
}

impl From<NodeId> for NodeMask {
    fn from(node: NodeId) -> Self {
        Self::of(node)
    }
}

/// The nodes of a [`NodeMask`], lowest first.
#[derive(Clone, Debug)]
pub struct Iter<'a> {
    mask: &'a NodeMask,
    word: u16,
    left: u64,
}

impl Iterator for Iter<'_> {
    type Item = NodeId;

    fn next(&mut self) -> Option<NodeId> {
        while self.left == 0 {
            self.word += 1;
            self.left = *self.mask.0.get(usize::from(self.word)).or_else(|| {
                self.word -= 1; // stay at the end however often we are asked
                None
            })?;
        }
        let bit = u16::try_from(self.left.trailing_zeros()).ok()?;
        self.left &= self.left - 1;
        NodeId::new(self.word * 64 + bit).ok()
    }
}

impl<'a> IntoIterator for &'a NodeMask {
    type Item = NodeId;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

impl fmt::Display for NodeMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut nodes = self.iter().peekable();
        let mut separator = "";
        if nodes.peek().is_none() {
            return f.write_str("none");
        }
        while let Some(first) = nodes.next() {
            let mut last = first;
            while let Some(next) = nodes.next_if(|next| next.get() == last.get() + 1) {
                last = next;
            }
            write!(f, "{separator}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for NodeMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeMask({self})")
    }
}

/// Reads `0,2-3` from byte `at` of `text` on.
fn parse_list(text: &str, mut at: usize) -> Result<NodeMask, ParseError> {
    let mut mask = NodeMask::EMPTY;
    loop {
        let start = at;
        let first = parse_node(text, &mut at)?;
        let mut last = first;
        if text[at..].starts_with('-') {
            at += 1;
            last = parse_node(text, &mut at)?;
        }
        if first > last {
            return Err(ParseError::Reversed { at: start, first, last });
        }
        for node in first.get()..=last.get() {
            mask.0[usize::from(node / 64)] |= 1 << (node % 64);
        }
        match text[at..].chars().next() {
            None => return Ok(mask),
            Some(',') => at += 1,
            Some(found) => return Err(ParseError::Trailing { at, found }),
        }
    }
}

/// Reads a node number at byte `*at` and moves past it.
fn parse_node(text: &str, at: &mut usize) -> Result<NodeId, ParseError> {
    let start = *at;
    let rest = &text[start..];
    let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    if digits == 0 {
        return Err(ParseError::NotANumber { at: start, found: rest.chars().next() });
    }
    *at += digits;
    let number = rest[..digits].parse().map_err(|_| ParseError::TooLarge { at: start })?;
    NodeId::new(number).map_err(|_| ParseError::TooLarge { at: start })
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeSet;
    use alloc::string::ToString;

    use proptest::prelude::*;

    use super::*;

    fn set() -> impl Strategy<Value = BTreeSet<u16>> {
        prop::collection::btree_set(prop_oneof![0u16..20, 0u16..MAX_NODES], 0..30)
    }

    fn mask(set: &BTreeSet<u16>) -> NodeMask {
        set.iter().map(|&node| NodeId::new(node).unwrap()).collect()
    }

    proptest! {
        #[test]
        fn masks_behave_as_sets(a in set(), b in set(), node in 0..MAX_NODES) {
            let (x, y) = (mask(&a), mask(&b));
            prop_assert_eq!(x.intersection(&y), mask(&(&a & &b)));
            prop_assert_eq!(x.union(&y), mask(&(&a | &b)));
            prop_assert_eq!(x.difference(&y), mask(&(&a - &b)));
            prop_assert_eq!(x.is_subset(&y), a.is_subset(&b));
            prop_assert_eq!(x.is_empty(), a.is_empty());
            prop_assert_eq!(x.count() as usize, a.len());
            prop_assert_eq!(x.contains(NodeId::new(node).unwrap()), a.contains(&node));
            prop_assert_eq!(x.iter().map(NodeId::get).collect::<BTreeSet<_>>(), a.clone());
            prop_assert!(x.iter().is_sorted());
            let next = x.next_in_ring(Some(NodeId::new(node).unwrap())).map(NodeId::get);
            prop_assert_eq!(next, a.range(node + 1..).chain(&a).next().copied());
        }

        #[test]
        fn what_is_printed_reads_back_the_same(a in set()) {
            let text = mask(&a).to_string();
            prop_assert_eq!(NodeMask::parse(&text, NodeMask::ALL), Ok(mask(&a)));
        }

        #[test]
        fn any_text_is_read_or_refused_at_a_place_within_it(text in "[0-9,!a-zé-]{0,12}|all|none|\\PC{0,8}") {
            match NodeMask::parse(&text, NodeMask::EMPTY) {
                Ok(_) => {}
                Err(
                    ParseError::NotANumber { at, .. } | ParseError::Trailing { at, .. }
                    | ParseError::TooLarge { at } | ParseError::Reversed { at, .. },
                ) => prop_assert!(text.is_char_boundary(at)),
            }
        }
    }

    #[test]
    fn errors_say_what_and_where() {
        let error = |text| NodeMask::parse(text, NodeMask::EMPTY).unwrap_err().to_string();
        assert!(error("").starts_with("expected a node number at byte 0, found the end"));
        assert!(error("0,2-").starts_with("expected a node number at byte 4, found the end"));
        assert!(error("0;1").starts_with("expected ',' or '-' or the end at byte 1, found ';'"));
        assert!(error("3,1024").starts_with("the number at byte 2 is above the highest node, 1023"));
        assert!(error("99999999999999999999").contains("at byte 0"));
        assert_eq!(error("0,7-5"), "the range at byte 2 runs backwards; write 5-7");
    }

    #[test]
    fn all_and_not_never_name_a_node_outside_the_default() {
        let default = NodeMask::of(NodeId::ZERO);
        assert_eq!(NodeMask::parse("all", default), Ok(default));
        assert_eq!(NodeMask::parse("!5", default), Ok(default));
        assert_eq!(NodeMask::parse("!0", default), Ok(NodeMask::EMPTY));
    }
}
