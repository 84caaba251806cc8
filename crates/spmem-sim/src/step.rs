//! Steps: what happens to a simulated machine, one at a time, in a form that can be written down.
//!
//! Objects go by the names that the trace gives them: nodes by number, domains by path, grants and blocks by a number
//! of their own. A step that names what is not there is refused and changes nothing, as a program's mistake would.

use serde::{Deserialize, Serialize};
use spmem_core::grant::Rights;
use spmem_core::policy;
use spmem_core::units::{Bytes, Time};

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    /// A node is registered, with frames in one range.
    AddNode {
        /// Its number.
        node: u16,
        /// Whether it is SPM.
        is_spm: bool,
        /// Whether its guard is easy.
        is_easy: bool,
        /// 4 KiB frames.
        frames: u64,
        /// Whether they hold zeros (R21).
        is_zero: bool,
        /// Services, a bit each, in the order of `spmem_core::node::Services` (R3).
        services: u16,
        /// How far below DRAM it is, in tiers.
        tier: u8,
        /// Its class, 1 to 6; none for 1 of sysram, 3 of SPM.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        class: Option<u8>,
    },
    /// A node loses its ranges and is unregistered; refused while frames are in use (R1).
    RemoveNode {
        /// Its number.
        node: u16,
    },
    /// A node gets a further range; refused unless it is said to be what the node is (R3).
    AddRange {
        /// The node.
        node: u16,
        /// 4 KiB frames.
        frames: u64,
        /// Whether they hold zeros (R21).
        is_zero: bool,
        /// Whether the range is said to be SPM.
        is_spm: bool,
        /// Whether its guard is said to be easy.
        is_easy: bool,
        /// The class that it is said to have.
        class: u8,
        /// The services that it is said to have.
        services: u16,
    },
    /// What is in a range is moved elsewhere on its node where it can be, the rest is reported; then the range is removed,
    /// unless something is left in it.
    RemoveRange {
        /// The node.
        node: u16,
        /// Its first frame.
        first: u32,
        /// Whether the moves are completed, or called off.
        is_completed: bool,
    },
    /// Who owned the node before it was last removed tries all that only the owner may (R3).
    FormerOwner {
        /// The node.
        node: u16,
    },
    /// How far one node is from another is set.
    SetDistance {
        /// From.
        from: u16,
        /// To.
        to: u16,
        /// As in a SLIT: 10 of a node to itself, more to others.
        distance: u8,
    },
    /// How many pages in a row a node gets by weighted interleave is set.
    SetWeight {
        /// The node.
        node: u16,
        /// Pages.
        weight: u8,
    },
    /// A domain is made; all above it must exist.
    MakeDomain {
        /// Its path.
        path: String,
    },
    /// A domain is removed; refused while it has children or frames.
    DropDomain {
        /// Its path.
        path: String,
    },
    /// The possible nodes of a domain are set.
    SetMems {
        /// Its path.
        path: String,
        /// None of them: no limit.
        nodes: Vec<u16>,
    },
    /// The default nodes of a domain are set.
    SetSysram {
        /// Its path.
        path: String,
        /// None of them: no limit.
        nodes: Vec<u16>,
    },
    /// The owners of nodes make a grant.
    Grant {
        /// Its number.
        grant: u32,
        /// On which nodes.
        nodes: Vec<u16>,
        /// What it is good for.
        terms: Terms,
    },
    /// A part of a grant is handed on.
    Narrow {
        /// The number of the new grant.
        grant: u32,
        /// The grant it is a part of.
        from: u32,
        /// On which nodes.
        nodes: Vec<u16>,
        /// What it is good for.
        terms: Terms,
    },
    /// The owner of a grant's first node ends it.
    Revoke {
        /// Its number.
        grant: u32,
    },
    /// The holder gives a grant back.
    Release {
        /// Its number.
        grant: u32,
    },
    /// Time passes.
    Advance {
        /// How much, ns.
        ns: u64,
    },
    /// Somebody asks for a block.
    Alloc {
        /// The number it will have.
        block: u32,
        /// Path of the domain; none for a request without (R7).
        domain: Option<String>,
        /// Order of the block.
        order: u8,
        /// The nodes named; none for the default.
        asked: Option<Vec<u16>>,
        /// How strongly.
        mode: Mode,
        /// The grants shown.
        grants: Vec<u32>,
        /// Whether its holder moves it when asked to.
        is_movable: bool,
        /// What node numbers mean, as in [`Ask::flags`].
        #[serde(default, skip_serializing_if = "is_none")]
        flags: u8,
        /// The node that nearest is meant to, as in [`Ask::home`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        home: Option<u16>,
        /// The node of the processor, as in [`Ask::at`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<u16>,
        /// Whether it may use the reserve, as in [`Ask::uses_reserve`].
        #[serde(default, skip_serializing_if = "is_no")]
        uses_reserve: bool,
    },
    /// What a node keeps for requests that may use it: its `min` watermark.
    SetReserve {
        /// The node.
        node: u16,
        /// Frames.
        frames: u64,
    },
    /// A task sets its policy, for all that it asks for until it sets another: set_mempolicy(2).
    SetPolicy {
        /// The task's number.
        task: u32,
        /// What it will ask for.
        ask: Ask,
    },
    /// A task asks for a block by its policy, as the nodes and masks are now.
    AllocBy {
        /// The task.
        task: u32,
        /// The number that the block will have.
        block: u32,
        /// Order of the block.
        order: u8,
    },
    /// Somebody asks for many single frames at once.
    AllocBatch {
        /// The number that the first will have; the others have those behind it.
        block: u32,
        /// How many.
        count: u32,
        /// The request.
        ask: Ask,
    },
    /// Somebody asks for neighbouring frames, which never move.
    AllocContiguous {
        /// The number they will have, as a block.
        block: u32,
        /// How many.
        frames: u32,
        /// The request.
        ask: Ask,
    },
    /// A task of a domain asks whether a page of it can go to a node: move_pages(2), migrate_pages(2).
    MoveTarget {
        /// Path of the domain.
        path: String,
        /// The node.
        node: u16,
        /// The grants shown.
        grants: Vec<u32>,
    },
    /// Somebody asks what stands between a request and a node, and does what the answer advises (R11).
    Explain {
        /// The node.
        node: u16,
        /// The request; whatever nodes it names.
        ask: Ask,
    },
    /// A block is used.
    Use {
        /// Its number.
        block: u32,
    },
    /// A block was used twice, and goes up if that is often enough and the rate allows (R14, R15).
    Promote {
        /// Its number.
        block: u32,
        /// The node where it is used.
        used_at: u16,
        /// The time between the uses, ns.
        since_use_ns: u64,
        /// The grants shown.
        grants: Vec<u32>,
        /// Whether the move is completed, or called off.
        is_completed: bool,
    },
    /// A block is pinned for long: from now on it stays (R15).
    Pin {
        /// Its number.
        block: u32,
        /// The grants shown.
        grants: Vec<u32>,
    },
    /// A block may move again.
    Unpin {
        /// Its number.
        block: u32,
    },
    /// Cold blocks of a node are demoted (R14, R15).
    Demote {
        /// The node.
        node: u16,
        /// How many, at most.
        wanted: usize,
        /// The grants shown.
        grants: Vec<u32>,
        /// Whether the moves are completed, or called off.
        is_completed: bool,
    },
    /// If a node is short, cold blocks of it are demoted until it is not, or none can be (R15, R16).
    Reclaim {
        /// The node.
        node: u16,
        /// The grants shown.
        grants: Vec<u32>,
    },
    /// Blocks of a node are moved together, so that large ones become free (R15).
    Compact {
        /// The node.
        node: u16,
        /// Order of the blocks that are wanted.
        order: u8,
        /// Whether the moves are completed, or called off.
        is_completed: bool,
    },
    /// A node has run out for good: who must give gives all it has of it (R16).
    Oom {
        /// The node.
        node: u16,
    },
    /// The memory of a frame breaks (R20).
    Poison {
        /// The node.
        node: u16,
        /// The frame, by number.
        frame: u32,
    },
    /// What lies outside a domain's masks is moved inside (R5).
    Gather {
        /// Its path.
        path: String,
        /// The grants shown.
        grants: Vec<u32>,
    },
    /// A block is given back.
    Free {
        /// Its number.
        block: u32,
        /// Whether its holder has zeroed it (R21).
        is_zeroed: bool,
    },
    /// A compressing device appears; one of that number before is gone.
    AddDevice {
        /// Its number.
        device: u8,
        /// Physical memory, 4 KiB frames.
        frames: u64,
        /// Pages that its measure may not show yet, the newest.
        waiting: u64,
    },
    /// A page asks to enter a device (R18).
    Enter {
        /// The device.
        device: u8,
        /// What it turns out to take, bytes, at most 4096.
        takes: u64,
    },
    /// A page leaves a device.
    Leave {
        /// The device.
        device: u8,
        /// Whether it is the oldest; else the newest.
        is_oldest: bool,
    },
    /// A device is asked what it has in use, and what follows is done: pressure, a step of the balloon.
    Measure {
        /// The device.
        device: u8,
        /// How it answers.
        telemetry: Telemetry,
    },
    /// A gate of a device is shut.
    Shut {
        /// The device.
        device: u8,
        /// The gate.
        gate: GateName,
    },
    /// A gate of a device is opened, with a key.
    Open {
        /// The device.
        device: u8,
        /// The gate.
        gate: GateName,
        /// Of which device the key is: any other's does not fit.
        with: u8,
    },
}

/// A request for memory, as a program makes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ask {
    /// Path of the domain; none for a request without (R7).
    pub domain: Option<String>,
    /// The nodes named; none for the default. No nodes at all are nothing to [`Mode::Bind`], else the default.
    pub asked: Option<Vec<u16>>,
    /// How strongly.
    pub mode: Mode,
    /// What node numbers mean: bit 0 `MPOL_F_STATIC_NODES`, bit 1 `MPOL_F_RELATIVE_NODES`, bit 2
    /// `MPOL_F_NUMA_BALANCING`.
    #[serde(default, skip_serializing_if = "is_none")]
    pub flags: u8,
    /// The node that nearest is meant to: set_mempolicy_home_node(2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<u16>,
    /// The node of the processor that it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<u16>,
    /// The grants shown.
    pub grants: Vec<u32>,
    /// Whether the holder of what is given moves it when asked to.
    pub is_movable: bool,
    /// Whether it may use the reserves of nodes: it is needed to free memory.
    #[serde(default, skip_serializing_if = "is_no")]
    pub uses_reserve: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
const fn is_no(is: &bool) -> bool {
    !*is
}

/// What older traces do not have is left out where it says nothing.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands out references")]
const fn is_none(flags: &u8) -> bool {
    *flags == 0
}

/// The terms of a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terms {
    /// Rights, a bit each, in the order of `spmem_core::grant::Rights`.
    pub rights: u8,
    /// Bytes.
    pub quota: u64,
    /// The time at which it ends, ns; none for never.
    pub expires: Option<u64>,
}

impl Terms {
    /// As the memory manager takes them.
    pub(crate) fn core(self) -> spmem_core::grant::Terms {
        let terms = spmem_core::grant::Terms::new(Rights::from_bits_truncate(self.rights), Bytes(self.quota));
        terms.until(Time(self.ends()))
    }

    pub(crate) fn ends(self) -> u64 {
        self.expires.unwrap_or(u64::MAX)
    }

    /// Whether they have ended. The last moment that can be told is no end.
    pub(crate) fn is_over(self, now: u64) -> bool {
        self.ends() <= now && self.ends() != u64::MAX
    }
}

/// How strongly nodes are named: mempolicy(7), by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// `MPOL_DEFAULT`
    Default,
    /// `MPOL_PREFERRED`
    Preferred,
    /// `MPOL_BIND`
    Bind,
    /// `MPOL_LOCAL`
    Local,
    /// `MPOL_PREFERRED_MANY`
    PreferredMany,
    /// `MPOL_INTERLEAVE`
    Interleave,
    /// `MPOL_WEIGHTED_INTERLEAVE`
    WeightedInterleave,
}

impl Mode {
    pub(crate) const fn core(self) -> policy::Mode {
        match self {
            Self::Default => policy::Mode::Default,
            Self::Preferred => policy::Mode::Preferred,
            Self::Bind => policy::Mode::Bind,
            Self::Local => policy::Mode::Local,
            Self::PreferredMany => policy::Mode::PreferredMany,
            Self::Interleave => policy::Mode::Interleave,
            Self::WeightedInterleave => policy::Mode::WeightedInterleave,
        }
    }
}

/// How a device answers when it is asked what it has in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Telemetry {
    /// As it is, but for what waits.
    True,
    /// As it did last.
    Stuck,
    /// Not at all.
    Silent,
}

/// A gate of a compressed node: `spmem_core::compressed::Gate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateName {
    /// The owner's.
    Allocation,
    /// The balloon's.
    Converging,
    /// The teardown's.
    TearingDown,
}
