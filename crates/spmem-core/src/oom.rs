//! Out of memory: who must give when a node has nothing left and nothing of it can move (mm/oom_kill.c).
//!
//! [`choose`] names a domain, by what it uses of the node that is short relative to its share; whoever runs things decides
//! what that means ([`MemoryManager::choose_victim`](crate::mm::MemoryManager::choose_victim)). It never answers with another node: pressure on sysram makes no SPM node a fallback, and none on an SPM
//! node takes more sysram (R10, R16). Pure.

use crate::units::{DomainId, FrameCount};

/// What a domain uses of the node that is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// The domain.
    pub domain: DomainId,
    /// What it uses of the node.
    pub used: FrameCount,
    /// What it is meant to have of it at least; 0 for nothing in particular.
    pub share: FrameCount,
}

/// Who must give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim {
    /// The domain.
    pub domain: DomainId,
    /// What it uses.
    pub used: FrameCount,
    /// Of that, what exceeds its share.
    pub excess: FrameCount,
}

/// The domain that exceeds its share by most; of those that do alike, the one that uses most, then the one with the
/// lowest number. `None` when none uses anything: then the request must fail (R10).
///
/// ```
/// use spmem_core::oom::{Use, choose};
/// use spmem_core::units::{DomainId, FrameCount};
/// let of = |number, used, share| Use {
///     domain: DomainId::new(number).unwrap(),
///     used: FrameCount(used),
///     share: FrameCount(share),
/// };
/// let victim = choose([of(1, 900, 800), of(2, 500, 0)]).unwrap();
/// assert_eq!((victim.domain.get(), victim.excess), (2, FrameCount(500)));
/// ```
pub fn choose(uses: impl IntoIterator<Item = Use>) -> Option<Victim> {
    let victims = uses.into_iter().filter(|of| of.used.0 > 0).map(|of| Victim {
        domain: of.domain,
        used: of.used,
        excess: FrameCount(of.used.0.saturating_sub(of.share.0)),
    });
    victims.max_by_key(|victim| (victim.excess, victim.used, core::cmp::Reverse(victim.domain)))
}
