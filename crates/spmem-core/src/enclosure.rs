//! Enclosures: what a wall that the kernel keeps around a tree of processes is made of, and what an easy one answers.
//!
//! [`Enclosure::plan`] turns what a person asks for ([`Wish`]) and what the machine has ([`Nodes`]) into the mask of a
//! cpuset, the policy that the tree starts with, and the nodes that explicit strict bind opens (R9). [`judge`] answers a
//! policy call of a program behind an easy guard, with the answers of [`policy`](crate::policy). Pure; `spm wall` performs.
//! Hole: an easy guard judges what a program says; where a kernel policy falls back to when its nodes are full is not asked.

use core::fmt;

use crate::node::Guard;
use crate::nodemask::NodeMask;
use crate::policy::{Context, Errno, Flags, Mode, Policy, migrate_targets, move_target};
use crate::units::NodeId;

/// The machine's nodes with memory, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nodes {
    /// Ordinary ones.
    pub sysram: NodeMask,
    /// Specific-purpose ones that the page allocator has.
    pub spm: NodeMask,
    /// Those that the caller's own cpuset allows.
    pub reachable: NodeMask,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The possible nodes (`mems` of a domain, R4).
    pub mems: Option<NodeMask>,
    /// The default nodes (`mems.sysram` of a domain, R4).
    pub sysram: Option<NodeMask>,
    /// How hard the wall is.
    pub guard: Guard,
}

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enclosure {
    /// The nodes of the cpuset.
    pub cpuset: NodeMask,
    /// Whether the cpuset differs from the caller's own; if not, nothing is kept out by it.
    pub is_narrower: bool,
    /// The nodes that the first process is bound to, if the cpuset alone does not say it.
    pub default: Option<NodeMask>,
    /// Nodes in the cpuset that only strict bind reaches; none with a hard guard.
    pub easy: NodeMask,
    /// Nodes that were named and stay shut: only a component may allocate there.
    pub shut: NodeMask,
}

/// Why there is no such enclosure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnclosureError {
    /// No such node, or it has no memory.
    Absent {
        /// The node.
        node: NodeId,
    },
    /// The caller's own cpuset lacks it.
    OutOfReach {
        /// The node.
        node: NodeId,
    },
    /// An SPM node is nobody's default (R4).
    NotSysram {
        /// The node.
        node: NodeId,
    },
    /// A default node has to be a possible one (R4).
    NotPossible {
        /// The node.
        node: NodeId,
    },
    /// No sysram node is left.
    NoSysram,
}

impl fmt::Display for EnclosureError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent { node } => write!(f, "there is no node {node} with memory; spm nodes lists them"),
            Self::OutOfReach { node } => {
                write!(f, "node {node} is outside this process's own cpuset; start spm where it is allowed")
            }
            Self::NotSysram { node } => {
                write!(f, "node {node} is spm, so it is nobody's default; name it in --mems with --guard easy")
            }
            Self::NotPossible { node } => write!(f, "node {node} is a default but not in --mems; add it there"),
            Self::NoSysram => f.write_str(
                "no sysram node is left; name one in --mems, or leave one sysram in [type] and [class]",
            ),
        }
    }
}

impl core::error::Error for EnclosureError {}

impl Enclosure {
    /// Works out what to make. Without a wish for nodes: all sysram nodes within reach, and behind an easy guard the SPM nodes
    /// for those that bind to them.
    ///
    /// # Errors
    /// [`EnclosureError`]: a node that cannot be given, or none left.
    ///
    /// ```
    /// use spmem_core::{enclosure::{Enclosure, Nodes, Wish}, node::Guard, nodemask::NodeMask};
    /// let list = |text| NodeMask::parse(text, NodeMask::EMPTY).unwrap();
    /// let nodes = Nodes { sysram: list("0-1"), spm: list("2-3"), reachable: list("0-3") };
    /// let wall = Enclosure::plan(&nodes, &Wish { mems: None, sysram: None, guard: Guard::Hard }).unwrap();
    /// assert_eq!((wall.cpuset, wall.default), (list("0-1"), None));
    /// ```
    pub fn plan(nodes: &Nodes, wish: &Wish) -> Result<Self, EnclosureError> {
        let present = nodes.sysram.union(&nodes.spm);
        let named = wish.mems.unwrap_or(NodeMask::EMPTY).union(&wish.sysram.unwrap_or(NodeMask::EMPTY));
        if let Some(node) = named.difference(&present).first() {
            return Err(EnclosureError::Absent { node });
        }
        if let Some(node) = named.difference(&nodes.reachable).first() {
            return Err(EnclosureError::OutOfReach { node });
        }
        let within = present.intersection(&nodes.reachable);
        let mems = match (wish.mems, wish.guard) {
            (Some(mems), _) => mems,
            (None, Guard::Easy) => within,
            (None, Guard::Hard) => within.intersection(&nodes.sysram),
        };
        let ordinary = mems.intersection(&nodes.sysram);
        let special = mems.intersection(&nodes.spm);
        if let Some(sysram) = wish.sysram {
            if let Some(node) = sysram.intersection(&nodes.spm).first() {
                return Err(EnclosureError::NotSysram { node });
            }
            if let Some(node) = sysram.difference(&mems).first() {
                return Err(EnclosureError::NotPossible { node });
            }
        }
        let default = wish.sysram.filter(|mask| !mask.is_empty()).unwrap_or(ordinary);
        if default.is_empty() {
            return Err(EnclosureError::NoSysram);
        }
        let (cpuset, easy, shut) = match wish.guard {
            Guard::Hard => (ordinary, NodeMask::EMPTY, special),
            Guard::Easy => (mems, special, NodeMask::EMPTY),
        };
        let is_narrower = cpuset != within;
        Ok(Self { cpuset, is_narrower, default: (default != cpuset).then_some(default), easy, shut })
    }

    /// Nodes of the machine that the tree cannot reach at all.
    pub fn outside(&self, nodes: &Nodes) -> NodeMask {
        nodes.sysram.union(&nodes.spm).difference(&self.cpuset)
    }
}

/// A call of a program that names nodes, as the kernel takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// set_mempolicy(2), mbind(2): the mode with its flags, and the mask.
    Policy {
        /// As in linux/mempolicy.h.
        mode: u32,
        /// As given.
        nodes: NodeMask,
    },
    /// move_pages(2): the nodes that pages are to go to.
    MovePages(NodeMask),
    /// migrate_pages(2): the second mask.
    MigratePages {
        /// Where to.
        to: NodeMask,
        /// Whether the caller has CAP_SYS_NICE.
        is_privileged: bool,
    },
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The kernel may have it as it is.
    Continue,
    /// With this mask instead (R8, R9).
    Rewrite(NodeMask),
    /// It fails.
    Fail(Errno),
}

const STATIC_NODES: u32 = 1 << 15;
const RELATIVE_NODES: u32 = 1 << 14;
const NUMA_BALANCING: u32 = 1 << 13;
const MODE: u32 = 0xff;

/// Answers a call from behind an easy guard around `easy`, in a cpuset of `cpuset`. What is wrong with the call
/// otherwise the kernel says better.
///
/// ```
/// use spmem_core::{enclosure::{Answer, Call, judge}, nodemask::NodeMask};
/// let list = |text| NodeMask::parse(text, NodeMask::EMPTY).unwrap();
/// let (cpuset, easy) = (list("0-3"), list("2-3"));
/// let (bind, interleave) = (2, 3);
/// let call = |mode, nodes| judge(&cpuset, &easy, &Call::Policy { mode, nodes: list(nodes) });
/// assert_eq!(call(bind, "2"), Answer::Continue);
/// assert_eq!(call(interleave, "0-3"), Answer::Rewrite(list("0-1")));
/// ```
pub fn judge(cpuset: &NodeMask, easy: &NodeMask, call: &Call) -> Answer {
    let sysram = cpuset.difference(easy);
    let context = Context { effective: *cpuset, sysram, granted: NodeMask::EMPTY, easy: *easy };
    match *call {
        Call::Policy { mode, nodes } => judge_policy(&context, mode, nodes),
        Call::MovePages(nodes) => {
            let refused =
                nodes.intersection(easy).iter().find_map(|node| move_target(&context, cpuset, node).err());
            refused.map_or(Answer::Continue, Answer::Fail)
        }
        Call::MigratePages { to, .. } if to.intersection(easy).is_empty() => Answer::Continue,
        Call::MigratePages { to, is_privileged } => match migrate_targets(&context, &to, is_privileged) {
            Ok(targets) => Answer::Rewrite(targets),
            Err(errno) => Answer::Fail(errno),
        },
    }
}

fn judge_policy(context: &Context, mode: u32, nodes: NodeMask) -> Answer {
    let bits = [
        (STATIC_NODES, Flags::STATIC_NODES),
        (RELATIVE_NODES, Flags::RELATIVE_NODES),
        (NUMA_BALANCING, Flags::NUMA_BALANCING),
    ];
    let flags = bits.into_iter().filter(|(bit, _)| mode & bit != 0).map(|(_, flag)| flag).collect::<Flags>();
    let Some(&kind) = Mode::ALL.get((mode & MODE) as usize) else { return Answer::Continue };
    let Ok(policy) = Policy::new(kind, flags, nodes) else { return Answer::Continue };
    if nodes.is_empty() {
        return Answer::Continue;
    }
    let Some(bound) = policy.bind_to(context) else { return Answer::Fail(Errno::Einval) };
    if flags.is_relative() {
        // The kernel counts within the cpuset, the wall within its sysram nodes: say it in the kernel's numbers.
        let ordinal = |node: NodeId| context.effective.iter().position(|known| known == node);
        let meant = bound.nodes();
        let numbers = meant.iter().filter_map(ordinal).filter_map(|at| u16::try_from(at).ok());
        let numbers: NodeMask = numbers.filter_map(|at| NodeId::new(at).ok()).collect();
        return if numbers == nodes { Answer::Continue } else { Answer::Rewrite(numbers) };
    }
    let dropped = nodes.intersection(&context.easy).difference(&bound.nodes());
    if dropped.is_empty() { Answer::Continue } else { Answer::Rewrite(nodes.difference(&dropped)) }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    const MODES: [u32; 7] = [0, 1, 2, 3, 4, 5, 6];

    fn list(text: &str) -> NodeMask {
        NodeMask::parse(text, NodeMask::EMPTY).unwrap()
    }

    fn nodes() -> Nodes {
        Nodes { sysram: list("0-1"), spm: list("2-3"), reachable: list("0-3") }
    }

    fn plan(mems: Option<&str>, sysram: Option<&str>, guard: Guard) -> Result<Enclosure, EnclosureError> {
        Enclosure::plan(&nodes(), &Wish { mems: mems.map(list), sysram: sysram.map(list), guard })
    }

    #[test]
    fn a_hard_wall_leaves_spm_out_even_where_it_is_named() {
        let wall = plan(None, None, Guard::Hard).unwrap();
        assert_eq!(
            (wall.cpuset, wall.default, wall.easy, wall.shut),
            (list("0-1"), None, list("none"), list("none"))
        );
        assert_eq!(wall.outside(&nodes()), list("2-3"));
        let named = plan(Some("0,2"), None, Guard::Hard).unwrap();
        assert_eq!((named.cpuset, named.shut), (list("0"), list("2")));
        let default = plan(None, Some("1"), Guard::Hard).unwrap();
        assert_eq!((default.cpuset, default.default), (list("0-1"), Some(list("1"))));
    }

    #[test]
    fn an_easy_wall_keeps_spm_possible_and_no_default() {
        let wall = plan(None, None, Guard::Easy).unwrap();
        assert_eq!((wall.cpuset, wall.default, wall.easy), (list("0-3"), Some(list("0-1")), list("2-3")));
        assert!(!wall.is_narrower);
        let one = plan(Some("0-2"), None, Guard::Easy).unwrap();
        assert_eq!(
            (one.cpuset, one.default, one.easy, one.is_narrower),
            (list("0-2"), Some(list("0-1")), list("2"), true)
        );
    }

    #[test]
    fn what_cannot_be_given_is_refused_with_the_node() {
        let error = |mems, sysram| plan(mems, sysram, Guard::Hard).unwrap_err().to_string();
        assert!(error(Some("0,7"), None).starts_with("there is no node 7"));
        assert!(error(None, Some("2")).starts_with("node 2 is spm"));
        assert!(error(Some("0"), Some("1")).starts_with("node 1 is a default but not in --mems"));
        assert!(error(Some("2"), None).starts_with("no sysram node is left"));
        let narrow = Nodes { reachable: list("0"), ..nodes() };
        let wish = Wish { mems: Some(list("1")), sysram: None, guard: Guard::Hard };
        assert_eq!(Enclosure::plan(&narrow, &wish), Err(EnclosureError::OutOfReach { node: NodeId::ONE }));
    }

    fn answer(mode: u32, nodes: &str) -> Answer {
        judge(&list("0-3"), &list("2-3"), &Call::Policy { mode, nodes: list(nodes) })
    }

    #[test]
    fn only_strict_bind_reaches_an_easy_node() {
        for mode in MODES {
            let (only, wide) = (answer(mode, "2"), answer(mode, "0-3"));
            match mode {
                2 => assert_eq!((only, wide), (Answer::Continue, Answer::Continue)),
                // These take no nodes: the kernel says so.
                0 | 4 => assert_eq!((only, wide), (Answer::Continue, Answer::Continue)),
                _ => assert_eq!((only, wide), (Answer::Fail(Errno::Einval), Answer::Rewrite(list("0-1")))),
            }
            assert_eq!(answer(mode, "0-1"), Answer::Continue);
            assert_eq!(answer(mode, "none"), Answer::Continue);
        }
        assert_eq!(answer(3 | STATIC_NODES, "1-2"), Answer::Rewrite(list("1")));
        assert_eq!(answer(2 | STATIC_NODES, "2"), Answer::Continue);
        assert_eq!(answer(99, "2"), Answer::Continue, "the kernel knows what it knows");
    }

    #[test]
    fn relative_numbers_never_lead_to_an_easy_node() {
        assert_eq!(answer(2 | RELATIVE_NODES, "2"), Answer::Rewrite(list("0")));
        assert_eq!(answer(3 | RELATIVE_NODES, "0-1"), Answer::Continue);
        // The wall trims what balances as well; what the kernel refuses it refuses itself.
        assert_eq!(answer(5 | NUMA_BALANCING, "1-2"), Answer::Rewrite(list("1")));
        assert_eq!(answer(2 | NUMA_BALANCING, "2"), Answer::Continue);
        assert_eq!(answer(3 | NUMA_BALANCING, "1-2"), Answer::Continue);
        // Sysram nodes that are not the first ones: number 1 of them is number 2 of the cpuset.
        let call = Call::Policy { mode: 3 | RELATIVE_NODES, nodes: list("1") };
        assert_eq!(judge(&list("0-2"), &list("1"), &call), Answer::Rewrite(list("2")));
    }

    #[test]
    fn pages_are_not_moved_to_an_easy_node() {
        let judge = |call| judge(&list("0-3"), &list("2-3"), &call);
        assert_eq!(judge(Call::MovePages(list("0-1"))), Answer::Continue);
        assert_eq!(judge(Call::MovePages(list("0,2"))), Answer::Fail(Errno::Eacces));
        assert_eq!(judge(Call::MovePages(list("9"))), Answer::Continue, "the kernel has no such node");
        let migrate = |to, is_privileged| judge(Call::MigratePages { to: list(to), is_privileged });
        assert_eq!(migrate("1", false), Answer::Continue);
        assert_eq!(migrate("1-2", false), Answer::Fail(Errno::Eperm));
        assert_eq!(migrate("1-2", true), Answer::Rewrite(list("1")));
        assert_eq!(migrate("2", true), Answer::Fail(Errno::Einval));
    }
}
