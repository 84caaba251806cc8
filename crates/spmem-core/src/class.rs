//! Class: what a node is taken for, from what is known of it.
//!
//! [`classify`] goes down one list and the first line that applies decides: what a person has configured, what the memory
//! *is* (compressed, an accelerator's, persistent), what an access takes, and last, where nobody tells the latency, what
//! the kernel and the firmware order nodes by. The [`Verdict`] says which line it was. Pure. Called for each node and
//! device of a machine by `spmem-node`'s `machine`.
//!
//! Hole: nothing in Linux tells compressed memory from other memory; that class has to be configured.

use core::fmt;

use crate::distance::REMOTE;
use crate::node::Class;
use crate::tier::{CHUNK, DRAM};

/// An access that takes less is class 1, ns.
pub const PLAIN_BELOW_NS: u64 = 100;
/// An access that takes more is class 3, ns.
pub const SLOW_ABOVE_NS: u64 = 300;

/// What memory is, where that counts more than how fast it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Nature {
    /// The device compresses what is written to it.
    Compressed,
    /// Memory of an accelerator that keeps it coherent.
    Accelerator,
    /// Contents outlive a reboot.
    Persistent,
}

impl Nature {
    /// The class that it makes.
    pub const fn class(self) -> Class {
        match self {
            Self::Compressed => Class::Featured,
            Self::Accelerator => Class::Accelerator,
            Self::Persistent => Class::Shared,
        }
    }
}

/// What is known of a node or device; by default nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// What a person says.
    pub configured: Option<Class>,
    /// What the memory is.
    pub nature: Option<Nature>,
    /// What an access takes from where it is fastest, mean of read and write, ns.
    pub latency_ns: Option<u64>,
    /// Whether processors belong to the node.
    pub has_cpus: bool,
    /// The kernel's tier: abstract distance in units of [`CHUNK`], as in `memory_tierN`.
    pub tier: Option<u64>,
    /// From the nearest node with processors, as SLIT has it.
    pub distance: Option<u8>,
    /// Whether it is reached over a CXL link.
    pub is_cxl: bool,
}

/// Which line of the list decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The configuration says so.
    Configured,
    /// What the memory is.
    Nature(Nature),
    /// What an access takes.
    Latency {
        /// Mean of read and write.
        ns: u64,
    },
    /// No latency is known; processors' own memory.
    OwnProcessors,
    /// No latency is known; the kernel puts it below DRAM.
    BelowDram {
        /// Its tier.
        tier: u64,
    },
    /// No latency is known; it is farther from every processor than remote memory is.
    Far {
        /// From the nearest node with processors.
        distance: u8,
    },
    /// No latency is known; it is behind a CXL link.
    Cxl,
    /// Nothing sets it apart from ordinary RAM.
    Unremarkable,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Configured => f.write_str("configured"),
            Self::Nature(Nature::Compressed) => f.write_str("compresses what is written"),
            Self::Nature(Nature::Accelerator) => f.write_str("an accelerator's own memory"),
            Self::Nature(Nature::Persistent) => f.write_str("persistent"),
            Self::Latency { ns } => write!(f, "an access takes {ns} ns"),
            Self::OwnProcessors => f.write_str("latency not known, taken for RAM: it has processors"),
            Self::BelowDram { tier } => {
                write!(f, "latency not known; the kernel's tier {tier} is below DRAM's, {}", DRAM / CHUNK)
            }
            Self::Far { distance } => {
                write!(f, "latency not known; at distance {distance}, beyond a remote node's {REMOTE}")
            }
            Self::Cxl => f.write_str("latency not known; behind a CXL link"),
            Self::Unremarkable => f.write_str("latency not known, taken for RAM: nothing speaks against it"),
        }
    }
}

/// A class and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// 1 to 6.
    pub class: Class,
    /// What decided.
    pub reason: Reason,
}

/// The class of memory of which an access takes so long.
///
/// ```
/// use spmem_core::{class::class_of_latency, node::Class};
/// assert_eq!([99, 100, 300, 301].map(class_of_latency), [Class::Plain, Class::Slower, Class::Slower, Class::Slow]);
/// ```
pub const fn class_of_latency(ns: u64) -> Class {
    match ns {
        0..PLAIN_BELOW_NS => Class::Plain,
        PLAIN_BELOW_NS..=SLOW_ABOVE_NS => Class::Slower,
        _ => Class::Slow,
    }
}

/// What a node or device is taken for.
///
/// ```
/// use spmem_core::class::{Evidence, Nature, Reason, classify};
/// use spmem_core::node::Class;
/// let slow = Evidence { latency_ns: Some(350), has_cpus: true, ..Evidence::default() };
/// assert_eq!(classify(&slow).class, Class::Slow);
/// let pmem = Evidence { nature: Some(Nature::Persistent), ..slow };
/// assert_eq!(classify(&pmem).reason, Reason::Nature(Nature::Persistent));
/// ```
pub fn classify(known: &Evidence) -> Verdict {
    let verdict = |class, reason| Verdict { class, reason };
    if let Some(class) = known.configured {
        return verdict(class, Reason::Configured);
    }
    if let Some(nature) = known.nature {
        return verdict(nature.class(), Reason::Nature(nature));
    }
    if let Some(ns) = known.latency_ns {
        return verdict(class_of_latency(ns), Reason::Latency { ns });
    }
    if known.has_cpus {
        return verdict(Class::Plain, Reason::OwnProcessors);
    }
    if let Some(tier) = known.tier.filter(|&tier| tier > DRAM / CHUNK) {
        return verdict(Class::Slower, Reason::BelowDram { tier });
    }
    if let Some(distance) = known.distance.filter(|&distance| distance > REMOTE) {
        return verdict(Class::Slower, Reason::Far { distance });
    }
    if known.is_cxl {
        return verdict(Class::Slower, Reason::Cxl);
    }
    verdict(Class::Plain, Reason::Unremarkable)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything known; lines of the list are taken away from the top.
    const ALL: Evidence = Evidence {
        configured: Some(Class::Featured),
        nature: Some(Nature::Accelerator),
        latency_ns: Some(301),
        has_cpus: true,
        tier: Some(22),
        distance: Some(21),
        is_cxl: true,
    };

    #[test]
    fn the_first_line_that_applies_decides_and_is_named() {
        let mut known = ALL;
        let mut seen = |change: fn(&mut Evidence)| {
            let verdict = classify(&known);
            change(&mut known);
            (verdict.class.number(), verdict.reason)
        };
        assert_eq!(seen(|known| known.configured = None), (4, Reason::Configured));
        assert_eq!(seen(|known| known.nature = None), (5, Reason::Nature(Nature::Accelerator)));
        assert_eq!(seen(|known| known.latency_ns = None), (3, Reason::Latency { ns: 301 }));
        assert_eq!(seen(|known| known.has_cpus = false), (1, Reason::OwnProcessors));
        assert_eq!(seen(|known| known.tier = Some(4)), (2, Reason::BelowDram { tier: 22 }));
        assert_eq!(seen(|known| known.distance = Some(20)), (2, Reason::Far { distance: 21 }));
        assert_eq!(seen(|known| known.is_cxl = false), (2, Reason::Cxl));
        assert_eq!(seen(|_| ()), (1, Reason::Unremarkable));
    }

    #[test]
    fn each_nature_has_its_class() {
        let natures = [Nature::Compressed, Nature::Accelerator, Nature::Persistent];
        assert_eq!(natures.map(|nature| nature.class().number()), [4, 5, 6]);
    }
}
