//! Memory policies: which nodes a task or a range asks for, and how strongly (mempolicy(7), mm/mempolicy.c).
//!
//! A [`Policy`] is what a program says: mode, flags, node mask. [`Policy::bind_to`] makes it a [`Bound`] for what a domain
//! may use, with Linux's answers and errors; [`Bound::rebind`] follows when that changes. Ordinary nodes are handled exactly
//! as Linux handles all of a cpuset's; SPM nodes are the addition: they must be named by their own number, and be open
//! (by a grant, or by an easy guard and strict bind: R9), or they drop out silently (R8), and no remapping ever leads to one.
//! The table in docs/policies.md lists every call, mode and kind of node. Called by the wall. Takes no lock.

mod turns;

use core::fmt;

use bitflags::bitflags;

use crate::nodemask::NodeMask;
use crate::units::NodeId;

pub use self::turns::{Turns, node_of};

/// How a policy chooses among its nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// The default of the domain, nearest first (`MPOL_DEFAULT`).
    #[default]
    Default,
    /// The lowest of these, else the default (`MPOL_PREFERRED`); without nodes it is [`Mode::Local`].
    Preferred,
    /// These nodes and no other, nearest first (`MPOL_BIND`).
    Bind,
    /// These nodes in turn, else the default (`MPOL_INTERLEAVE`).
    Interleave,
    /// The node of the task's processor, else the default (`MPOL_LOCAL`).
    Local,
    /// Any of these, nearest first, else the default (`MPOL_PREFERRED_MANY`).
    PreferredMany,
    /// These nodes in turn, each as often as its weight says (`MPOL_WEIGHTED_INTERLEAVE`).
    WeightedInterleave,
}

impl Mode {
    /// Every mode, in the order of Linux's numbers.
    pub const ALL: [Self; 7] = [
        Self::Default,
        Self::Preferred,
        Self::Bind,
        Self::Interleave,
        Self::Local,
        Self::PreferredMany,
        Self::WeightedInterleave,
    ];

    /// As numactl and `spm explain` write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Preferred => "preferred",
            Self::Bind => "bind",
            Self::Interleave => "interleave",
            Self::Local => "local",
            Self::PreferredMany => "preferred-many",
            Self::WeightedInterleave => "weighted-interleave",
        }
    }

    /// Whether nodes are named at all.
    pub const fn takes_nodes(self) -> bool {
        !matches!(self, Self::Default | Self::Local)
    }

    /// Whether the nodes are taken in turn.
    pub const fn is_interleaved(self) -> bool {
        matches!(self, Self::Interleave | Self::WeightedInterleave)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

bitflags! {
    /// What node numbers mean when the possible nodes change, and what else comes with a mode.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Flags: u8 {
        /// The numbers are those of nodes, now and later (`MPOL_F_STATIC_NODES`).
        const STATIC_NODES = 1 << 0;
        /// The numbers count the nodes that are possible: 0 is the first of them (`MPOL_F_RELATIVE_NODES`).
        const RELATIVE_NODES = 1 << 1;
        /// Pages may be brought nearer to who uses them, to another of the nodes meant (`MPOL_F_NUMA_BALANCING`). Which nodes
        /// those are does not change.
        const NUMA_BALANCING = 1 << 2;
    }
}

impl Flags {
    /// Both would say what the numbers mean.
    const NUMBERING: Self = Self::STATIC_NODES.union(Self::RELATIVE_NODES);

    /// Whether the numbers are those of nodes, now and later.
    pub const fn is_static(self) -> bool {
        self.contains(Self::STATIC_NODES)
    }

    /// Whether the numbers count the nodes that are possible, and so name none.
    pub const fn is_relative(self) -> bool {
        self.contains(Self::RELATIVE_NODES)
    }

    /// As `spm explain --policy` and /proc/PID/numa_maps write them behind a mode (`mpol_to_str`); empty for none.
    ///
    /// ```
    /// use spmem_core::policy::Flags;
    /// assert_eq!((Flags::STATIC_NODES | Flags::NUMA_BALANCING).suffix(), "=static|balancing");
    /// ```
    pub const fn suffix(self) -> &'static str {
        match (self.is_static(), self.is_relative(), self.contains(Self::NUMA_BALANCING)) {
            (false, false, false) => "",
            (false, false, true) => "=balancing",
            (true, false, false) => "=static",
            (true, false, true) => "=static|balancing",
            (true, true, false) => "=static|relative",
            (true, true, true) => "=static|relative|balancing",
            (false, true, false) => "=relative",
            (false, true, true) => "=relative|balancing",
        }
    }
}

/// What a system call would return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// `EINVAL`
    Einval,
    /// `EPERM`
    Eperm,
    /// `EACCES`
    Eacces,
    /// `ENODEV`
    Enodev,
    /// `EOPNOTSUPP`
    Eopnotsupp,
    /// `ENOENT`
    Enoent,
}

impl Errno {
    /// The name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Einval => "EINVAL",
            Self::Eperm => "EPERM",
            Self::Eacces => "EACCES",
            Self::Enodev => "ENODEV",
            Self::Eopnotsupp => "EOPNOTSUPP",
            Self::Enoent => "ENOENT",
        }
    }
}

/// Why a policy is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyError {
    /// The mode takes no nodes.
    NodesGiven {
        /// The mode.
        mode: Mode,
    },
    /// The mode needs at least one node.
    NoNodes {
        /// The mode.
        mode: Mode,
    },
    /// Static and relative at once, either without nodes, or balancing with a mode that has none.
    Flags {
        /// As given.
        flags: Flags,
    },
    /// Only bind and preferred-many have a home node.
    HomeNode {
        /// The mode.
        mode: Mode,
    },
    /// The home node is not there.
    HomeAbsent {
        /// The node.
        node: NodeId,
    },
}

impl PolicyError {
    /// What Linux returns.
    pub const fn errno(self) -> Errno {
        match self {
            // There is no policy to give a home to.
            Self::HomeNode { mode: Mode::Default } => Errno::Enoent,
            Self::HomeNode { .. } => Errno::Eopnotsupp,
            _ => Errno::Einval,
        }
    }
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NodesGiven { mode } => write!(f, "policy {mode} takes no nodes; leave them out"),
            Self::NoNodes { mode } => write!(f, "policy {mode} needs at least one node"),
            Self::Flags { flags } => {
                f.write_str("flags ")?;
                bitflags::parser::to_writer(flags, &mut *f)?;
                f.write_str(": static or relative can be given, and only with nodes; balancing with bind and preferred-many")
            }
            Self::HomeNode { mode } => write!(f, "policy {mode} has no home node; bind and preferred-many have"),
            Self::HomeAbsent { node } => write!(f, "the home node {node} is not registered"),
        }
    }
}

impl core::error::Error for PolicyError {}

/// What a program says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    mode: Mode,
    flags: Flags,
    nodes: NodeMask,
    home: Option<NodeId>,
}

impl Policy {
    /// The default of the domain.
    pub const DEFAULT: Self =
        Self { mode: Mode::Default, flags: Flags::empty(), nodes: NodeMask::EMPTY, home: None };

    /// A policy as set_mempolicy(2) and mbind(2) take it.
    ///
    /// # Errors
    /// [`PolicyError`], `EINVAL` to Linux.
    ///
    /// ```
    /// use spmem_core::{nodemask::NodeMask, policy::{Flags, Mode, Policy}, units::NodeId};
    /// assert!(Policy::new(Mode::Bind, Flags::empty(), NodeId::ONE.into()).is_ok());
    /// assert!(Policy::new(Mode::Bind, Flags::empty(), NodeMask::EMPTY).is_err());
    /// let local = Policy::new(Mode::Preferred, Flags::empty(), NodeMask::EMPTY).unwrap();
    /// assert_eq!(local.mode(), Mode::Local);
    /// ```
    pub fn new(mode: Mode, flags: Flags, nodes: NodeMask) -> Result<Self, PolicyError> {
        let is_balanced = flags.contains(Flags::NUMA_BALANCING);
        if flags.contains(Flags::NUMBERING) || is_balanced && !matches!(mode, Mode::Bind | Mode::PreferredMany) {
            return Err(PolicyError::Flags { flags });
        }
        let is_empty = nodes.is_empty();
        let mode = match mode {
            Mode::Default | Mode::Local if !is_empty => return Err(PolicyError::NodesGiven { mode }),
            Mode::Local if !flags.is_empty() => return Err(PolicyError::Flags { flags }),
            Mode::Preferred if is_empty && !flags.is_empty() => return Err(PolicyError::Flags { flags }),
            Mode::Preferred if is_empty => Mode::Local,
            _ if mode.takes_nodes() && is_empty => return Err(PolicyError::NoNodes { mode }),
            _ => mode,
        };
        Ok(Self { mode, flags, nodes, home: None })
    }

    /// These nodes, by number, and no other: what a component asks for.
    pub const fn bind(nodes: NodeMask) -> Self {
        Self { mode: Mode::Bind, flags: Flags::STATIC_NODES, nodes, home: None }
    }

    /// The same policy, nearest to `home` first instead of to where the task runs (set_mempolicy_home_node(2)).
    ///
    /// # Errors
    /// [`PolicyError::HomeNode`], `EOPNOTSUPP` to Linux (`ENOENT` without a policy); [`PolicyError::HomeAbsent`] when
    /// `present` lacks it.
    pub fn with_home(self, home: NodeId, present: &NodeMask) -> Result<Self, PolicyError> {
        if !present.contains(home) {
            return Err(PolicyError::HomeAbsent { node: home });
        }
        match self.mode {
            Mode::Bind | Mode::PreferredMany => Ok(Self { home: Some(home), ..self }),
            mode => Err(PolicyError::HomeNode { mode }),
        }
    }

    /// How it chooses.
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// What its numbers mean.
    pub const fn flags(&self) -> Flags {
        self.flags
    }

    /// Whether an easy guard lets it name a node without a grant: strict bind by the node's own number only (R9).
    pub const fn opens_easy(&self) -> bool {
        matches!(self.mode, Mode::Bind) && !self.flags.is_relative()
    }

    /// The nodes as named; none for a mode that takes none.
    pub const fn nodes(&self) -> &NodeMask {
        &self.nodes
    }

    /// The node to which nearest is meant.
    pub const fn home(&self) -> Option<NodeId> {
        self.home
    }

    /// What the policy means where it is set; `None` when none of its nodes can be used (`EINVAL`, R8).
    pub fn bind_to(self, context: &Context) -> Option<Bound> {
        let plain = context.plain();
        let chosen =
            if self.flags.is_relative() { relative(&self.nodes, &plain) } else { self.nodes.intersection(&plain) };
        let special = context.special(&self);
        let wish = chosen.union(&special).first();
        let mut bound = Bound { policy: self, plain, chosen, special, has_plain: !chosen.is_empty(), wish };
        bound.keep_wish();
        let is_empty = self.mode.takes_nodes() && bound.nodes().is_empty();
        (!is_empty).then_some(bound)
    }
}

/// What a policy is held against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// The nodes that the domain can reach (R4).
    pub effective: NodeMask,
    /// All sysram nodes (R2).
    pub sysram: NodeMask,
    /// SPM nodes that the grants shown open with ALLOC (R6).
    pub granted: NodeMask,
    /// SPM nodes with an easy guard (R9).
    pub easy: NodeMask,
}

impl Context {
    /// The ordinary nodes: what `cpuset_mems_allowed` is to Linux.
    fn plain(&self) -> NodeMask {
        self.effective.intersection(&self.sysram)
    }

    /// The SPM nodes that the policy names and may use. Relative numbers name none.
    fn special(&self, policy: &Policy) -> NodeMask {
        if policy.flags.is_relative() {
            return NodeMask::EMPTY;
        }
        let open = if policy.opens_easy() { self.granted.union(&self.easy) } else { self.granted };
        let special = policy.nodes.intersection(&self.effective).intersection(&open);
        special.difference(&self.sysram)
    }
}

/// A policy where it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    policy: Policy,
    /// The ordinary nodes that were possible then.
    plain: NodeMask,
    /// Of them, those that the policy means.
    chosen: NodeMask,
    /// The SPM nodes that it names and may use.
    special: NodeMask,
    /// It has meant ordinary nodes before.
    has_plain: bool,
    /// The first of its nodes where it was set: all that [`Mode::Preferred`] ever means.
    wish: Option<NodeId>,
}

impl Bound {
    /// What the program said.
    pub const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The nodes that the policy chooses from; none for [`Mode::Default`] and [`Mode::Local`].
    pub fn nodes(&self) -> NodeMask {
        self.chosen.intersection(&self.plain).union(&self.special)
    }

    /// The one node that [`Mode::Preferred`] means, as it was when the policy was set.
    pub(crate) fn wish(&self) -> Option<NodeId> {
        self.wish.filter(|_| self.policy.mode == Mode::Preferred)
    }

    /// Whether the domain's default follows where these nodes are full. A policy that has never meant any but SPM nodes must
    /// say so by its mode (R10).
    pub const fn falls_back(&self) -> bool {
        match self.policy.mode {
            Mode::Bind => false,
            Mode::Interleave | Mode::WeightedInterleave => self.has_plain,
            Mode::Default | Mode::Preferred | Mode::Local | Mode::PreferredMany => true,
        }
    }

    /// Follows a change of what is possible, as `mpol_rebind_policy` does; whether any node is left to choose. Static
    /// numbers stay, relative ones are counted anew, others move along with the possible nodes; where that leaves no
    /// node, all ordinary ones are meant. SPM nodes stay for as long as they are open, and are never stood in for
    /// (R10).
    pub fn rebind(&mut self, context: &Context) -> bool {
        let (plain, special) = (context.plain(), context.special(&self.policy));
        let flags = self.policy.flags;
        let moved = match self.policy.mode {
            Mode::Bind | Mode::Interleave | Mode::WeightedInterleave => {
                let moved = match () {
                    () if flags.is_static() => self.policy.nodes.intersection(&plain),
                    () if flags.is_relative() => relative(&self.policy.nodes, &plain),
                    () if plain == self.plain => self.chosen,
                    () => remap(&self.chosen, &self.plain, &plain),
                };
                let must_stand_in = moved.is_empty() && special.is_empty() && self.has_plain;
                if must_stand_in { plain } else { moved }
            }
            // Preferred nodes are wishes: Linux leaves them alone, and passes over those it cannot have.
            _ => self.chosen,
        };
        self.chosen = moved;
        self.plain = plain;
        self.special = special;
        self.has_plain |= !self.chosen.is_empty();
        self.keep_wish();
        self.falls_back() || !self.nodes().is_empty()
    }

    /// Preferred means one node, whatever others come within reach later (`mpol_new_preferred`).
    fn keep_wish(&mut self) {
        if self.policy.mode == Mode::Preferred {
            let wish = self.wish().map_or(NodeMask::EMPTY, NodeMask::of);
            self.chosen = self.chosen.intersection(&wish);
            self.special = self.special.intersection(&wish);
        }
    }
}

/// Where move_pages(2) may put a page.
///
/// # Errors
/// `ENODEV` for a node that is not there, `EACCES` for one that the domain, or the wall, keeps from the program: naming a
/// node here opens no easy guard (R9).
pub fn move_target(context: &Context, present: &NodeMask, node: NodeId) -> Result<(), Errno> {
    let open = context.plain().union(&context.effective.intersection(&context.granted));
    if !present.contains(node) {
        Err(Errno::Enodev)
    } else if open.contains(node) {
        Ok(())
    } else {
        Err(Errno::Eacces)
    }
}

/// Where migrate_pages(2) may move a task's pages: those of `to` that are open to it.
///
/// # Errors
/// `EPERM` when `to` is wider than that and the caller has no CAP_SYS_NICE; `EINVAL` when nothing of it is left.
pub fn migrate_targets(context: &Context, to: &NodeMask, is_privileged: bool) -> Result<NodeMask, Errno> {
    let open = context.plain().union(&context.effective.intersection(&context.granted));
    if !is_privileged && !to.is_subset(&open) {
        return Err(Errno::Eperm);
    }
    let targets = to.intersection(&open);
    if targets.is_empty() { Err(Errno::Einval) } else { Ok(targets) }
}

/// Number i means the (i modulo size)th node of `base` (`mpol_relative_nodemask`).
fn relative(numbers: &NodeMask, base: &NodeMask) -> NodeMask {
    let size = base.count() as usize;
    if size == 0 {
        return NodeMask::EMPTY;
    }
    let mut wanted = [0_u64; 16];
    numbers.iter().map(|number| number.index() % size).for_each(|at| wanted[at / 64] |= 1 << (at % 64));
    base.iter().zip(0..).filter(|(_, at)| wanted[at / 64] >> (at % 64) & 1 == 1).map(|(node, _)| node).collect()
}

/// The nth node of `old` becomes the nth of `new`, which begins anew at its end; others stay (`nodes_remap`).
fn remap(nodes: &NodeMask, old: &NodeMask, new: &NodeMask) -> NodeMask {
    let size = new.count() as usize;
    if size == 0 {
        return NodeMask::EMPTY;
    }
    let of = |node: NodeId| match old.iter().position(|known| known == node) {
        Some(at) => new.iter().nth(at % size).unwrap_or(node),
        None => node,
    };
    // What stays where it was may not be possible any more.
    nodes.iter().map(of).collect::<NodeMask>().intersection(new)
}
