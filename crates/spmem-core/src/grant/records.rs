//! The records behind grants: what each allows, how much of it is used, what it was narrowed from.
//!
//! Used by [`NodeTable`](crate::node::NodeTable) only, through [`Grants`]. A record lives until its grant was given
//! back or revoked, nothing is in use under it, and nothing narrowed from it is left.

use alloc::vec::Vec;

use super::{Grant, GrantError, GrantId, MAX_GRANTS, Rights};
use crate::nodemask::NodeMask;
use crate::units::{Bytes, NodeId};

#[derive(Debug)]
pub(super) struct Record {
    pub(super) nodes: NodeMask,
    pub(super) rights: Rights,
    pub(super) quota: u64,
    /// Bytes in use, children's included.
    pub(super) used: u64,
    pub(super) parent: Option<u16>,
    pub(super) children: u32,
    pub(super) generation: u32,
    pub(super) depth: u8,
    pub(super) state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Live,
    /// The value was given back; children and charges keep the record.
    Released,
    Revoked,
    /// In the free list.
    Vacant,
}

/// The records of all grants of a table.
#[derive(Debug)]
pub(crate) struct Grants {
    table: u64,
    pub(super) records: Vec<Record>,
    vacant: Vec<u16>,
}

impl Grants {
    pub(crate) const fn new(table: u64) -> Self {
        Self { table, records: Vec::new(), vacant: Vec::new() }
    }

    pub(super) fn record(&self, slot: u16) -> &Record {
        &self.records[usize::from(slot)]
    }

    pub(super) fn record_mut(&mut self, slot: u16) -> &mut Record {
        &mut self.records[usize::from(slot)]
    }

    pub(super) fn live(&self, grant: &Grant) -> Result<&Record, GrantError> {
        if grant.table != self.table {
            return Err(GrantError::Foreign);
        }
        let record = self.record(grant.id.slot);
        // A held value's record changes generation only after it was revoked.
        if record.generation != grant.id.generation || record.state != State::Live {
            return Err(GrantError::Revoked);
        }
        Ok(record)
    }

    /// The nodes on which the grant carries `rights`; none when it is not valid here.
    pub(crate) fn nodes_with(&self, grant: &Grant, rights: Rights) -> NodeMask {
        match self.live(grant) {
            Ok(record) if record.rights.contains(rights) => record.nodes,
            _ => NodeMask::EMPTY,
        }
    }

    /// Whether the grant carries `rights` on `node`.
    pub(crate) fn allows(&self, grant: &Grant, node: NodeId, rights: Rights) -> Result<bool, GrantError> {
        let record = self.live(grant)?;
        Ok(record.nodes.contains(node) && record.rights.contains(rights))
    }

    /// Counts `bytes` against the grant and all it came from; the slot to give them back to.
    pub(crate) fn charge(&mut self, grant: &Grant, bytes: Bytes) -> Result<u16, GrantError> {
        self.live(grant)?;
        let mut left = u64::MAX;
        let mut at = Some(grant.id.slot);
        while let Some(slot) = at {
            let record = self.record(slot);
            left = left.min(record.quota - record.used);
            at = record.parent;
        }
        if bytes.0 > left {
            return Err(GrantError::OverQuota { wanted: bytes, left: Bytes(left) });
        }
        let mut at = Some(grant.id.slot);
        while let Some(slot) = at {
            let record = self.record_mut(slot);
            record.used += bytes.0;
            at = record.parent;
        }
        Ok(grant.id.slot)
    }

    /// Gives back what [`Grants::charge`] counted, whatever became of the grant.
    pub(crate) fn uncharge(&mut self, slot: u16, bytes: Bytes) {
        let mut at = Some(slot);
        while let Some(slot) = at {
            let record = self.record_mut(slot);
            record.used -= bytes.0;
            at = record.parent;
        }
        if self.record(slot).state != State::Live {
            self.reap(slot);
        }
    }

    /// R1: a node registered anew must not be reachable through grants on what it was.
    pub(crate) fn forget_node(&mut self, node: NodeId) {
        self.records.iter_mut().for_each(|record| record.nodes.remove(node));
    }

    pub(super) fn insert(&mut self, mut record: Record) -> Result<Grant, GrantError> {
        let slot = if let Some(slot) = self.vacant.pop() {
            slot
        } else {
            let slot = u16::try_from(self.records.len()).map_err(|_| GrantError::TooMany)?;
            if self.records.len() >= MAX_GRANTS {
                return Err(GrantError::TooMany);
            }
            slot
        };
        if let Some(old) = self.records.get_mut(usize::from(slot)) {
            record.generation = old.generation;
            *old = record;
        } else {
            self.records.push(record);
        }
        let record = self.record(slot);
        let (generation, parent) = (record.generation, record.parent);
        if let Some(parent) = parent {
            self.record_mut(parent).children += 1;
        }
        Ok(Grant { table: self.table, id: GrantId { slot, generation } })
    }

    /// Frees the record, and its ancestors', once nothing needs it.
    pub(super) fn reap(&mut self, slot: u16) {
        let mut at = Some(slot);
        while let Some(slot) = at {
            let record = self.record_mut(slot);
            let is_idle = record.used == 0 && record.children == 0;
            if !is_idle || matches!(record.state, State::Live | State::Vacant) {
                return;
            }
            record.state = State::Vacant;
            record.generation = record.generation.wrapping_add(1);
            at = record.parent.take();
            self.vacant.push(slot);
            if let Some(parent) = at {
                self.record_mut(parent).children -= 1;
            }
        }
    }

    /// The slots of `root` and everything narrowed from it.
    pub(super) fn family(&self, root: u16) -> Vec<u16> {
        let descends = |mut slot: u16| loop {
            if slot == root {
                return true;
            }
            match self.record(slot).parent {
                Some(parent) => slot = parent,
                None => return false,
            }
        };
        let slots = (0u16..).take(self.records.len());
        slots.filter(|&slot| self.record(slot).state != State::Vacant && descends(slot)).collect()
    }

    /// Bytes charged under the record itself, children's not counted.
    pub(super) fn own_use(&self, slot: u16) -> u64 {
        let children = self.records.iter().filter(|child| child.parent == Some(slot));
        self.record(slot).used - children.map(|child| child.used).sum::<u64>()
    }
}
