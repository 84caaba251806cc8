//! Grants: unforgeable permission to use named nodes (R12).
//!
//! A [`Grant`] is a value with private fields that cannot be copied; only [`NodeTable::grant`], given the tokens of
//! the nodes' owners, makes a first one. [`NodeTable::narrow`] hands a part of it on. The record behind it (nodes,
//! rights, quota, use) lives in the table, so revoking takes effect at once wherever the value went. Use counts
//! against a grant and all it was narrowed from. Holes: no expiry yet; a dropped grant keeps its record until it is
//! revoked ([`NodeTable::release`] gives it back).

mod records;

use alloc::vec::Vec;
use core::fmt;

use bitflags::bitflags;

pub(crate) use self::records::Grants;
use self::records::{Record, State};
use crate::node::{NodeTable, Owner};
use crate::nodemask::NodeMask;
use crate::units::{Bytes, NodeId};

/// Grants that may exist at a time in one table.
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
        /// Migrate pages away from the node.
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
    /// The grant, or one it was narrowed from, was revoked.
    Revoked,
    /// The grant belongs to another table.
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
            Self::Revoked => f.write_str("the grant was revoked; ask the node's owner for another"),
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
            Self::OverQuota { wanted, left } => {
                write!(f, "{wanted} wanted, {left} left of the grant's quota")
            }
            Self::TooMany => write!(f, "{MAX_GRANTS} grants exist; release or revoke one"),
            Self::TooDeep => write!(f, "a grant can be narrowed {MAX_DEPTH} times in a row"),
        }
    }
}

impl core::error::Error for GrantError {}

/// Permission to use some nodes. Not copyable; lent to requests, handed on by moving it or a narrowed part of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant {
    table: u64,
    id: GrantId,
}

/// Names a grant, to revoke or report it; worth nothing as permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantId {
    slot: u16,
    generation: u32,
}

impl Grant {
    /// The grant's name.
    pub const fn id(&self) -> GrantId {
        self.id
    }
}

/// Bytes charged to a grant by hand, for what is placed by other means than frames; give it back with
/// [`NodeTable::uncharge`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped charge stays charged"]
pub struct Charge {
    table: u64,
    slot: u16,
    bytes: Bytes,
}

/// What a grant allows and how much of it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantInfo {
    /// The nodes it names.
    pub nodes: NodeMask,
    /// What may be done there.
    pub rights: Rights,
    /// Most bytes in use at a time.
    pub quota: Bytes,
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

impl NodeTable {
    /// Makes a grant on the nodes whose owners' tokens are shown (R12).
    ///
    /// # Errors
    /// [`GrantError::NotOwner`], [`GrantError::NoNode`], [`GrantError::TooMany`].
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeSpec, NodeTable, NodeType, Services};
    /// # use spmem_core::units::{Bytes, NodeId};
    /// use spmem_core::grant::Rights;
    /// # let spec = NodeSpec { node_type: NodeType::Spm, class: Class::Featured, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "cram".into() };
    /// let mut table = NodeTable::new();
    /// let owner = table.register(NodeId::ONE, spec).unwrap();
    /// let whole = table.grant(&[&owner], Rights::ALLOC | Rights::DEMOTE_TO, Bytes::mib(64)).unwrap();
    /// let part = table.narrow(&whole, owner.node().into(), Rights::ALLOC, Bytes::mib(1)).unwrap();
    /// assert!(table.narrow(&part, owner.node().into(), Rights::PIN, Bytes::mib(1)).is_err());
    /// table.revoke(&owner, whole.id()).unwrap();
    /// assert!(table.grant_info(&part).is_err());
    /// ```
    pub fn grant(&mut self, owners: &[&Owner], rights: Rights, quota: Bytes) -> Result<Grant, GrantError> {
        if owners.is_empty() {
            return Err(GrantError::NoNode);
        }
        if let Some(stranger) = owners.iter().find(|owner| !self.is_owner(owner)) {
            return Err(GrantError::NotOwner { node: stranger.node() });
        }
        self.grants.insert(Record {
            nodes: owners.iter().map(|owner| owner.node()).collect(),
            rights,
            quota: quota.0,
            used: 0,
            parent: None,
            children: 0,
            generation: 0,
            depth: 0,
            state: State::Live,
        })
    }

    /// Makes a grant out of a part of `from`: no further node or right, no larger quota (R12). Its use counts
    /// against `from` as well.
    ///
    /// # Errors
    /// [`GrantError::Widened`], [`GrantError::NoNode`], [`GrantError::Revoked`], [`GrantError::Foreign`],
    /// [`GrantError::TooDeep`], [`GrantError::TooMany`].
    pub fn narrow(
        &mut self,
        from: &Grant,
        nodes: NodeMask,
        rights: Rights,
        quota: Bytes,
    ) -> Result<Grant, GrantError> {
        let record = self.grants.live(from)?;
        if nodes.is_empty() {
            return Err(GrantError::NoNode);
        }
        if let Some(node) = nodes.difference(&record.nodes).first() {
            return Err(GrantError::Widened(Wider::Node(node)));
        }
        if !record.rights.contains(rights) {
            return Err(GrantError::Widened(Wider::Rights(rights - record.rights)));
        }
        if quota.0 > record.quota {
            return Err(GrantError::Widened(Wider::Quota { quota: Bytes(record.quota) }));
        }
        if record.depth >= MAX_DEPTH {
            return Err(GrantError::TooDeep);
        }
        let depth = record.depth + 1;
        self.grants.insert(Record {
            nodes,
            rights,
            quota: quota.0,
            used: 0,
            parent: Some(from.id.slot),
            children: 0,
            generation: 0,
            depth,
            state: State::Live,
        })
    }

    /// Ends a grant and all narrowed from it; the owner of any of its nodes may. When this returns nothing new can
    /// be allocated under them; what is still in use is listed (R13).
    ///
    /// # Errors
    /// [`GrantError::NotOwner`]; [`GrantError::Revoked`] when it has ended already.
    pub fn revoke(&mut self, owner: &Owner, grant: GrantId) -> Result<Vec<Held>, GrantError> {
        let known = self.grants.records.get(usize::from(grant.slot));
        let record = known
            .filter(|r| r.generation == grant.generation)
            .filter(|r| matches!(r.state, State::Live | State::Released))
            .ok_or(GrantError::Revoked)?;
        if !self.is_owner(owner) || !record.nodes.contains(owner.node()) {
            return Err(GrantError::NotOwner { node: owner.node() });
        }
        let family = self.grants.family(grant.slot);
        let mut held = Vec::new();
        for &slot in &family {
            let bytes = Bytes(self.grants.own_use(slot));
            if bytes.0 > 0 {
                let generation = self.grants.record(slot).generation;
                held.push(Held { grant: GrantId { slot, generation }, bytes });
            }
        }
        family.iter().for_each(|&slot| self.grants.record_mut(slot).state = State::Revoked);
        family.iter().for_each(|&slot| self.grants.reap(slot));
        Ok(held)
    }

    /// Gives a grant back. Grants narrowed from it stay valid; what is in use under it stays in use.
    ///
    /// # Errors
    /// [`GrantError::Revoked`], [`GrantError::Foreign`]: there is nothing to give back.
    pub fn release(&mut self, grant: Grant) -> Result<(), GrantError> {
        self.grants.live(&grant)?;
        self.grants.record_mut(grant.id.slot).state = State::Released;
        self.grants.reap(grant.id.slot);
        Ok(())
    }

    /// What a grant allows and how much is used.
    ///
    /// # Errors
    /// [`GrantError::Revoked`], [`GrantError::Foreign`].
    pub fn grant_info(&self, grant: &Grant) -> Result<GrantInfo, GrantError> {
        let record = self.grants.live(grant)?;
        Ok(GrantInfo {
            nodes: record.nodes,
            rights: record.rights,
            quota: Bytes(record.quota),
            used: Bytes(record.used),
        })
    }

    /// Counts bytes against a grant that are placed by other means than this table's frames.
    ///
    /// # Errors
    /// [`GrantError::OverQuota`], [`GrantError::Revoked`], [`GrantError::Foreign`].
    pub fn charge(&mut self, grant: &Grant, bytes: Bytes) -> Result<Charge, GrantError> {
        let slot = self.grants.charge(grant, bytes)?;
        Ok(Charge { table: self.id(), slot, bytes })
    }

    /// Gives a charge back, also after the grant has ended.
    ///
    /// # Errors
    /// [`GrantError::Foreign`] when it is another table's.
    pub fn uncharge(&mut self, charge: Charge) -> Result<(), GrantError> {
        if charge.table != self.id() {
            return Err(GrantError::Foreign);
        }
        if charge.bytes.0 > 0 {
            self.grants.uncharge(charge.slot, charge.bytes);
        }
        Ok(())
    }
}
