//! The records behind grants: what each allows, how much of it is used, what it was narrowed from.
//!
//! Used by [`Registry`](crate::registry::Registry) only, through [`Grants`]. A record lives until its grant was given
//! back or revoked, nothing is in use under it, and nothing narrowed from it is left.

use alloc::vec::Vec;

use super::{Grant, GrantError, GrantId, Held, MAX_GRANTS, Rights, Terms};
use crate::nodemask::NodeMask;
use crate::units::{Bytes, NodeId, Time};

#[derive(Debug)]
pub(super) struct Record {
    pub(super) nodes: NodeMask,
    pub(super) terms: Terms,
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
    /// Its time is over.
    Expired,
    Revoked,
    /// In the free list.
    Vacant,
}

impl Record {
    pub(super) const fn new(nodes: NodeMask, terms: Terms, parent: Option<u16>, depth: u8) -> Self {
        Self { nodes, terms, used: 0, parent, children: 0, generation: 0, depth, state: State::Live }
    }
}

/// The records of all grants of a registry.
#[derive(Debug)]
pub(crate) struct Grants {
    registry: u64,
    pub(super) records: Vec<Record>,
    vacant: Vec<u16>,
    /// No live grant ends before.
    next_expiry: Time,
    /// What expired last; has room for all.
    expired: Vec<GrantId>,
}

impl Grants {
    pub(crate) const fn new(registry: u64) -> Self {
        Self { registry, records: Vec::new(), vacant: Vec::new(), next_expiry: Time::NEVER, expired: Vec::new() }
    }

    pub(super) fn record(&self, slot: u16) -> &Record {
        &self.records[usize::from(slot)]
    }

    pub(super) fn record_mut(&mut self, slot: u16) -> &mut Record {
        &mut self.records[usize::from(slot)]
    }

    /// The record of a grant that holds a place still, whatever its state.
    pub(super) fn known(&self, id: GrantId) -> Option<&Record> {
        let record = self.records.get(usize::from(id.slot))?;
        (record.generation == id.generation && record.state != State::Vacant).then_some(record)
    }

    /// The name of a grant that was made here.
    pub(crate) const fn own(&self, grant: &Grant) -> Result<GrantId, GrantError> {
        if grant.registry == self.registry { Ok(grant.id) } else { Err(GrantError::Foreign) }
    }

    pub(super) fn live(&self, grant: &Grant) -> Result<&Record, GrantError> {
        self.live_id(self.own(grant)?)
    }

    fn live_id(&self, id: GrantId) -> Result<&Record, GrantError> {
        // A held value's record changes generation only after it has ended.
        let record = self.known(id).ok_or(GrantError::Revoked)?;
        match record.state {
            State::Live => Ok(record),
            State::Expired => Err(GrantError::Expired { at: record.terms.expires }),
            State::Released | State::Revoked | State::Vacant => Err(GrantError::Revoked),
        }
    }

    /// The nodes on which a grant carries any of `rights`.
    ///
    /// # Errors
    /// [`GrantError::Revoked`], [`GrantError::Expired`].
    pub(crate) fn nodes_with(&self, id: GrantId, rights: Rights) -> Result<NodeMask, GrantError> {
        let record = self.live_id(id)?;
        Ok(if record.terms.rights.contains(rights) { record.nodes } else { NodeMask::EMPTY })
    }

    /// Whether a grant carries `rights` on `node`.
    pub(crate) fn allows(&self, id: GrantId, node: NodeId, rights: Rights) -> Result<bool, GrantError> {
        let record = self.live_id(id)?;
        Ok(record.nodes.contains(node) && record.terms.rights.contains(rights))
    }

    /// Whether nothing new can be had under the grant of a slot that something is charged to. One that was given back has
    /// not ended: what is in use under it stays.
    pub(crate) fn has_ended(&self, slot: u16) -> bool {
        matches!(self.record(slot).state, State::Expired | State::Revoked)
    }

    /// The nodes that a grant names, whatever it allows there.
    ///
    /// # Errors
    /// [`GrantError::Revoked`], [`GrantError::Expired`].
    pub(crate) fn nodes(&self, id: GrantId) -> Result<&NodeMask, GrantError> {
        Ok(&self.live_id(id)?.nodes)
    }

    /// Ends what expires up to `now`, and tells which. Takes no memory: time goes on also where there is none.
    pub(crate) fn expire(&mut self, now: Time) -> &[GrantId] {
        self.expired.clear();
        if now < self.next_expiry {
            return &[];
        }
        self.next_expiry = Time::NEVER;
        for (record, slot) in self.records.iter_mut().zip(0u16..) {
            if record.state != State::Live {
                continue;
            }
            if record.terms.is_over(now) {
                record.state = State::Expired;
                self.expired.push(GrantId { slot, generation: record.generation });
            } else {
                self.next_expiry = self.next_expiry.min(record.terms.expires);
            }
        }
        &self.expired
    }

    /// What [`Grants::expire`] told last.
    pub(crate) fn expired(&self) -> &[GrantId] {
        &self.expired
    }

    /// Counts `bytes` against the grant and all it came from; the slot to give them back to.
    pub(crate) fn charge(&mut self, id: GrantId, bytes: Bytes) -> Result<u16, GrantError> {
        self.live_id(id)?;
        let mut left = u64::MAX;
        let mut at = Some(id.slot);
        while let Some(slot) = at {
            let record = self.record(slot);
            left = left.min(record.terms.quota.0 - record.used);
            at = record.parent;
        }
        if bytes.0 > left {
            return Err(GrantError::OverQuota { wanted: bytes, left: Bytes(left) });
        }
        let mut at = Some(id.slot);
        while let Some(slot) = at {
            let record = self.record_mut(slot);
            record.used += bytes.0;
            at = record.parent;
        }
        Ok(id.slot)
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
        // Room also for the day on which it ends, which nothing may refuse.
        let (records, vacant) = (self.records.len(), self.vacant.len());
        self.records.try_reserve(1).map_err(|_| GrantError::NoMemory)?;
        self.vacant.try_reserve(records + 1 - vacant).map_err(|_| GrantError::NoMemory)?;
        self.expired.clear();
        self.expired.try_reserve(records + 1).map_err(|_| GrantError::NoMemory)?;
        let slot = if let Some(slot) = self.vacant.pop() {
            slot
        } else {
            let slot = u16::try_from(self.records.len()).map_err(|_| GrantError::TooMany)?;
            if self.records.len() >= MAX_GRANTS {
                return Err(GrantError::TooMany);
            }
            slot
        };
        self.next_expiry = self.next_expiry.min(record.terms.expires);
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
        Ok(Grant { registry: self.registry, id: GrantId { slot, generation } })
    }

    /// Frees the record, and its ancestors', once nothing needs it.
    pub(super) fn reap(&mut self, slot: u16) {
        let mut at = Some(slot);
        while let Some(slot) = at {
            let record = self.record_mut(slot);
            let is_idle = record.used == 0 && record.children == 0;
            if !is_idle || matches!(record.state, State::Live | State::Expired | State::Vacant) {
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

    /// Ends `root` and everything narrowed from it.
    pub(super) fn revoke(&mut self, root: u16) {
        let slots = (0u16..).take(self.records.len());
        for slot in slots.clone() {
            if self.is_of_family(slot, root) {
                self.record_mut(slot).state = State::Revoked;
            }
        }
        // A record goes before the one that it was narrowed from: so the others are still found.
        for slot in slots {
            if self.is_of_family(slot, root) {
                self.reap(slot);
            }
        }
    }

    /// Whether a slot is `root`, or was narrowed from it.
    fn is_of_family(&self, slot: u16, root: u16) -> bool {
        let above = |&slot: &u16| self.record(slot).parent;
        self.record(slot).state != State::Vacant
            && core::iter::successors(Some(slot), above).any(|slot| slot == root)
    }

    /// What is in use under `root` and everything narrowed from it.
    pub(super) fn held(&self, root: u16) -> Result<Vec<Held>, GrantError> {
        let slots = (0u16..).take(self.records.len()).filter(|&slot| self.is_of_family(slot, root));
        let held = slots.filter_map(|slot| {
            let (bytes, generation) = (Bytes(self.own_use(slot)), self.record(slot).generation);
            (bytes.0 > 0).then_some(Held { grant: GrantId { slot, generation }, bytes })
        });
        let mut all = Vec::new();
        for one in held {
            all.try_reserve(1).map_err(|_| GrantError::NoMemory)?;
            all.push(one);
        }
        Ok(all)
    }

    /// Bytes charged under the record itself, children's not counted.
    fn own_use(&self, slot: u16) -> u64 {
        let children = self.records.iter().filter(|child| child.parent == Some(slot));
        self.record(slot).used - children.map(|child| child.used).sum::<u64>()
    }
}
