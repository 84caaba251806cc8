//! Grants: unforgeable permission to use named nodes (R12).
//!
//! A [`Grant`] is a value with private fields that cannot be copied; only [`Registry::grant`], given the tokens of
//! the nodes' owners, makes a first one. [`Registry::narrow`] hands a part of it on. The record behind it (nodes,
//! terms, use) lives in the registry, so that revoking takes effect at once wherever the value went, and so does the end
//! of its time ([`Registry::advance`]). Use counts against a grant and all it was narrowed from. Hole: a dropped grant
//! keeps its record until it is revoked ([`Registry::release`] gives it back).
//!
//! | right | asked for by |
//! |---|---|
//! | ALLOC | the wall, for each allocation ([`Registry::admit`]) |
//! | DEMOTE_TO | each move to an SPM node ([`migrate`](crate::migrate)) |
//! | MIGRATE_FROM | [`MemoryManager::take`](crate::mm::MemoryManager::take): a move off the node on its holder's behalf |
//! | PIN | [`MemoryManager::pin`](crate::mm::MemoryManager::pin) |
//! | MAP_READ, MAP_WRITE | [`Registry::check`], by whoever maps: the manager itself maps nothing |
//!
//! What the memory manager moves by itself needs no MIGRATE_FROM: reclaim and compaction, to which the owner has agreed by
//! offering the services (R3), and evacuation, where a mask or a grant no longer covers what lies there (R5, R13).

mod records;

use alloc::vec::Vec;
use core::fmt;

use bitflags::bitflags;

pub(crate) use self::records::Grants;
use self::records::{Record, State};
use crate::node::Owner;
use crate::nodemask::NodeMask;
use crate::registry::Registry;
use crate::units::{Bytes, NodeId, Time};

/// Grants that may exist at a time in one registry.
pub const MAX_GRANTS: usize = 4096;
/// How often a grant may be narrowed in a row: bounds the cost of a charge.
pub const MAX_DEPTH: u8 = 8;

bitflags! {
    /// What a grant lets its holder do on its nodes.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Rights: u8 {
        /// Allocate frames.
        const ALLOC = 1 << 0;
        /// Map frames for reading.
        const MAP_READ = 1 << 1;
        /// Map frames for writing.
        const MAP_WRITE = 1 << 2;
        /// Demote pages to the node (R14).
        const DEMOTE_TO = 1 << 3;
        /// Migrate pages away from the node; the node's own services do so without.
        const MIGRATE_FROM = 1 << 4;
        /// Pin pages.
        const PIN = 1 << 5;
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        bitflags::parser::to_writer(self, f)
    }
}

/// Which part of a narrowed grant would be wider than the grant it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wider {
    /// A node that the grant does not name.
    Node(NodeId),
    /// Rights that the grant does not carry.
    Rights(Rights),
    /// A quota above the grant's.
    Quota {
        /// The grant's quota.
        quota: Bytes,
    },
    /// A time after the grant's own end.
    Expiry {
        /// When the grant ends.
        expires: Time,
    },
}

/// What a grant is good for.
///
/// ```
/// use spmem_core::{grant::{Rights, Terms}, units::{Bytes, Time}};
/// let terms = Terms::new(Rights::ALLOC, Bytes::mib(1)).until(Time(5_000));
/// assert_eq!(terms.expires, Time(5_000));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// What may be done on its nodes.
    pub rights: Rights,
    /// Most bytes in use at a time.
    pub quota: Bytes,
    /// From then on it is good for nothing.
    pub expires: Time,
}

impl Terms {
    /// Terms that do not end by themselves.
    pub const fn new(rights: Rights, quota: Bytes) -> Self {
        Self { rights, quota, expires: Time::NEVER }
    }

    /// The same terms, ending at a time.
    #[must_use]
    pub const fn until(self, expires: Time) -> Self {
        Self { expires, ..self }
    }

    /// Whether they have ended; those without an end never do.
    pub(crate) fn is_over(&self, now: Time) -> bool {
        self.expires <= now && self.expires != Time::NEVER
    }

    /// Where these terms go beyond `other`.
    fn wider_than(&self, other: &Self) -> Option<Wider> {
        if !other.rights.contains(self.rights) {
            Some(Wider::Rights(self.rights - other.rights))
        } else if self.quota > other.quota {
            Some(Wider::Quota { quota: other.quota })
        } else {
            (self.expires > other.expires).then_some(Wider::Expiry { expires: other.expires })
        }
    }
}

/// Why a grant was not made or not honoured. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantError {
    /// The token is not that of the node's owner; only the owner grants (R12).
    NotOwner {
        /// The node.
        node: NodeId,
    },
    /// A grant must name a node.
    NoNode,
    /// The grant, or one it was narrowed from, was revoked, or it was given back while a pass still shows it.
    Revoked,
    /// The time of the grant is over (R12).
    Expired {
        /// Since when.
        at: Time,
    },
    /// The grant belongs to another registry.
    Foreign,
    /// A narrowed grant cannot be wider (R12).
    Widened(Wider),
    /// The quota of the grant, or of one it was narrowed from, would be exceeded (R12).
    OverQuota {
        /// Asked for.
        wanted: Bytes,
        /// What is left.
        left: Bytes,
    },
    /// There is no memory for the grant, or for the list of what is held under it.
    NoMemory,
    /// [`MAX_GRANTS`] exist.
    TooMany,
    /// The grant was narrowed [`MAX_DEPTH`] times already.
    TooDeep,
}

impl fmt::Display for GrantError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOwner { node } => write!(f, "only the owner of node {node} can grant it"),
            Self::NoNode => f.write_str("a grant must name at least one node"),
            Self::Revoked => f.write_str("the grant was revoked or given back; ask the node's owner for another"),
            Self::Expired { at } => {
                write!(f, "the grant expired at {} ns; ask the node's owner for another", at.0)
            }
            Self::Foreign => f.write_str("the grant belongs to another memory manager"),
            Self::Widened(Wider::Node(node)) => {
                write!(f, "a grant is never widened: it does not name node {node}")
            }
            Self::Widened(Wider::Rights(rights)) => {
                write!(f, "a grant is never widened: it lacks the right {rights}")
            }
            Self::Widened(Wider::Quota { quota }) => {
                write!(f, "a grant is never widened: its quota is {quota}")
            }
            Self::Widened(Wider::Expiry { expires }) => {
                write!(f, "a grant is never widened: it expires at {} ns", expires.0)
            }
            Self::OverQuota { wanted, left } => {
                write!(f, "{wanted} wanted, {left} left of the grant's quota")
            }
            Self::NoMemory => f.write_str("no memory for the grant or for what is held under it"),
            Self::TooMany => write!(f, "{MAX_GRANTS} grants exist; release or revoke one"),
            Self::TooDeep => write!(f, "a grant can be narrowed {MAX_DEPTH} times in a row"),
        }
    }
}

impl core::error::Error for GrantError {}

/// Permission to use some nodes. Not copyable; lent to requests, handed on by moving it or a narrowed part of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant {
    registry: u64,
    id: GrantId,
}

/// Names a grant, to revoke or report it; worth nothing as permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantId {
    slot: u16,
    generation: u32,
}

impl GrantId {
    /// As a number, for who has to write it down.
    pub const fn to_bits(self) -> u64 {
        (self.slot as u64) << 32 | self.generation as u64
    }

    /// The name that [`GrantId::to_bits`] was of.
    #[allow(clippy::cast_possible_truncation, reason = "the halves of a word")]
    pub const fn from_bits(bits: u64) -> Self {
        Self { slot: (bits >> 32) as u16, generation: bits as u32 }
    }
}

impl fmt::Display for GrantId {
    /// `3`; `3.1` once the number was another grant's before.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.generation {
            0 => write!(f, "{}", self.slot),
            generation => write!(f, "{}.{generation}", self.slot),
        }
    }
}

impl Grant {
    /// The grant's name.
    pub const fn id(&self) -> GrantId {
        self.id
    }
}

/// Bytes charged to a grant by hand, for what is placed by other means than frames; give it back with
/// [`Registry::uncharge`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped charge stays charged"]
pub struct Charge {
    registry: u64,
    slot: u16,
    bytes: Bytes,
}

/// What a grant allows and how much of it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantInfo {
    /// The nodes it names.
    pub nodes: NodeMask,
    /// What it is good for.
    pub terms: Terms,
    /// Bytes in use, those of grants narrowed from it included.
    pub used: Bytes,
}

/// What is still in use under a revoked grant (R13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Who holds it: the grant or one narrowed from it.
    pub grant: GrantId,
    /// Bytes in use directly under it.
    pub bytes: Bytes,
}

impl Registry {
    /// Makes a grant on the nodes whose owners' tokens are shown (R12).
    ///
    /// # Errors
    /// [`GrantError::NotOwner`], [`GrantError::NoNode`], [`GrantError::TooMany`].
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
    /// # use spmem_core::units::{Bytes, NodeId};
    /// use spmem_core::{grant::{Rights, Terms}, registry::Registry};
    /// # let spec = NodeSpec { node_type: NodeType::Spm, class: Class::Featured, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "cram".into() };
    /// let mut registry = Registry::new();
    /// let owner = registry.register(NodeId::ONE, spec).unwrap().owner;
    /// let terms = Terms::new(Rights::ALLOC | Rights::DEMOTE_TO, Bytes::mib(64));
    /// let whole = registry.grant(&[&owner], terms).unwrap();
    /// let less = Terms::new(Rights::ALLOC, Bytes::mib(1));
    /// let part = registry.narrow(&whole, owner.node().into(), less).unwrap();
    /// let more = Terms { rights: Rights::PIN, ..less };
    /// assert!(registry.narrow(&part, owner.node().into(), more).is_err());
    /// registry.revoke(&owner, whole.id()).unwrap();
    /// assert!(registry.grant_info(&part).is_err());
    /// ```
    pub fn grant(&mut self, owners: &[&Owner], terms: Terms) -> Result<Grant, GrantError> {
        if owners.is_empty() {
            return Err(GrantError::NoNode);
        }
        if let Some(stranger) = owners.iter().find(|owner| !self.is_owner(owner)) {
            return Err(GrantError::NotOwner { node: stranger.node() });
        }
        self.check_time(terms)?;
        self.grants.insert(Record::new(owners.iter().map(|owner| owner.node()).collect(), terms, None, 0))
    }

    /// Makes a grant out of a part of `from`: no further node or right, no larger quota, no later end (R12). Its use counts
    /// against `from` as well.
    ///
    /// # Errors
    /// [`GrantError::Widened`], [`GrantError::NoNode`], [`GrantError::Revoked`], [`GrantError::Expired`],
    /// [`GrantError::Foreign`], [`GrantError::TooDeep`], [`GrantError::TooMany`].
    pub fn narrow(&mut self, from: &Grant, nodes: NodeMask, terms: Terms) -> Result<Grant, GrantError> {
        let record = self.grants.live(from)?;
        if nodes.is_empty() {
            return Err(GrantError::NoNode);
        }
        if let Some(node) = nodes.difference(&record.nodes).first() {
            return Err(GrantError::Widened(Wider::Node(node)));
        }
        if let Some(wider) = terms.wider_than(&record.terms) {
            return Err(GrantError::Widened(wider));
        }
        if record.depth >= MAX_DEPTH {
            return Err(GrantError::TooDeep);
        }
        let depth = record.depth + 1;
        self.check_time(terms)?;
        self.grants.insert(Record::new(nodes, terms, Some(from.id.slot), depth))
    }

    /// Terms that are over already make no grant.
    fn check_time(&self, terms: Terms) -> Result<(), GrantError> {
        if !terms.is_over(self.now()) { Ok(()) } else { Err(GrantError::Expired { at: terms.expires }) }
    }

    /// Ends a grant and all narrowed from it; the owner of any of its nodes may. When this returns nothing new can
    /// be allocated under them; what is still in use is listed (R13).
    ///
    /// # Errors
    /// [`GrantError::NotOwner`]; [`GrantError::Revoked`] when it has ended already; [`GrantError::NoMemory`].
    pub fn revoke(&mut self, owner: &Owner, grant: GrantId) -> Result<Vec<Held>, GrantError> {
        let known = self.grants.known(grant);
        let record = known.filter(|record| record.state != State::Revoked).ok_or(GrantError::Revoked)?;
        if !self.is_owner(owner) || !record.nodes.contains(owner.node()) {
            return Err(GrantError::NotOwner { node: owner.node() });
        }
        let held = self.grants.held(grant.slot)?;
        self.grants.revoke(grant.slot);
        self.bump_epoch();
        Ok(held)
    }

    /// What is in use under a grant and all narrowed from it, and by whom; also when it has ended (R13).
    ///
    /// # Errors
    /// [`GrantError::NoMemory`]
    pub fn held(&self, grant: GrantId) -> Result<Vec<Held>, GrantError> {
        if self.grants.known(grant).is_some() { self.grants.held(grant.slot) } else { Ok(Vec::new()) }
    }

    /// Gives a grant back. Grants narrowed from it stay valid; what is in use under it stays in use.
    ///
    /// # Errors
    /// [`GrantError::Revoked`], [`GrantError::Foreign`]: there is nothing to give back.
    pub fn release(&mut self, grant: Grant) -> Result<(), GrantError> {
        match self.grants.live(&grant) {
            Ok(_) | Err(GrantError::Expired { .. }) => {}
            Err(cause) => return Err(cause),
        }
        self.grants.record_mut(grant.id.slot).state = State::Released;
        self.grants.reap(grant.id.slot);
        self.bump_epoch();
        Ok(())
    }

    /// What a grant allows and how much is used.
    ///
    /// # Errors
    /// [`GrantError::Revoked`], [`GrantError::Foreign`].
    pub fn grant_info(&self, grant: &Grant) -> Result<GrantInfo, GrantError> {
        let record = self.grants.live(grant)?;
        Ok(GrantInfo { nodes: record.nodes, terms: record.terms, used: Bytes(record.used) })
    }

    /// Counts bytes against a grant that are placed by other means than this registry's frames.
    ///
    /// # Errors
    /// [`GrantError::OverQuota`], [`GrantError::Revoked`], [`GrantError::Foreign`].
    pub fn charge(&mut self, grant: &Grant, bytes: Bytes) -> Result<Charge, GrantError> {
        self.grants.live(grant)?;
        let slot = self.grants.charge(grant.id, bytes)?;
        Ok(Charge { registry: self.id(), slot, bytes })
    }

    /// Gives a charge back, also after the grant has ended.
    ///
    /// # Errors
    /// [`GrantError::Foreign`] when it is another registry's.
    pub fn uncharge(&mut self, charge: Charge) -> Result<(), GrantError> {
        if charge.registry != self.id() {
            return Err(GrantError::Foreign);
        }
        if charge.bytes.0 > 0 {
            self.grants.uncharge(charge.slot, charge.bytes);
        }
        Ok(())
    }
}
