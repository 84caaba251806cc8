//! Grants made, narrowed, ended and outlived by time (R12, R13).

use spmem_core::grant::Grant;
use spmem_core::node::Owner;
use spmem_core::units::Time;

use super::{Applied, Outcome, World, mask, refused};
use crate::check::hold;
use crate::model::{self, Model, Set};
use crate::step::Terms;

impl World {
    pub(super) fn note_grant(
        &mut self,
        number: u32,
        grant: Grant,
        nodes: &[u16],
        terms: Terms,
        parent: Option<u32>,
    ) {
        self.ids.insert(number, grant.id());
        self.grants.insert(number, grant);
        let nodes = nodes.iter().copied().collect();
        let known = model::Grant { nodes, terms, parent, is_held: true, is_revoked: false, used: 0 };
        self.model.grants.insert(number, known);
    }

    pub(super) fn grant(&mut self, number: u32, nodes: &[u16], terms: Terms) -> Applied {
        let owners: Option<Vec<&Owner>> = nodes.iter().map(|node| self.owners.get(node)).collect();
        let Some(owners) = owners.filter(|_| !self.ids.contains_key(&number)) else {
            return refused("no node, or a grant of that number");
        };
        match self.mm.registry_mut().grant(&owners, terms.core()) {
            Ok(grant) => {
                hold("R12", !terms.is_over(self.model.now), || {
                    format!("grant {number} was over when it was made")
                })?;
                self.note_grant(number, grant, nodes, terms, None);
                Ok(Outcome::Done)
            }
            Err(error) => {
                hold("R11", self.model.cannot_grant(nodes, terms, None, error), || {
                    format!("no grant on {nodes:?}, {terms:?}: {error}")
                })?;
                refused(error)
            }
        }
    }

    pub(super) fn narrow(&mut self, number: u32, from: u32, nodes: &[u16], terms: Terms) -> Applied {
        let (Some(mask), false) = (mask(nodes), self.ids.contains_key(&number)) else { return refused("no node") };
        let Some(whole) = self.grants.get(&from) else { return refused("no grant") };
        match self.mm.registry_mut().narrow(whole, mask, terms.core()) {
            Ok(grant) => {
                let whole = &self.model.grants[&from];
                let asked: Set = nodes.iter().copied().collect();
                let is_narrower = asked.is_subset(&whole.nodes)
                    && terms.rights & !whole.terms.rights & 0x3f == 0
                    && terms.quota <= whole.terms.quota
                    && terms.ends() <= whole.terms.ends();
                let is_live = self.model.is_live(from);
                hold("R12", is_narrower && is_live, || format!("grant {number} is wider than {from}"))?;
                self.note_grant(number, grant, nodes, terms, Some(from));
                Ok(Outcome::Done)
            }
            Err(error) => {
                hold("R11", self.model.cannot_grant(nodes, terms, Some(from), error), || {
                    format!("no grant on {nodes:?}, {terms:?}, out of {:?}: {error}", self.model.grants[&from])
                })?;
                refused(error)
            }
        }
    }

    pub(super) fn revoke(&mut self, number: u32) -> Applied {
        let (Some(&id), Some(known)) = (self.ids.get(&number), self.model.grants.get(&number)) else {
            return refused("no grant");
        };
        let owner = known.nodes.first().and_then(|node| self.owners.get(node));
        let Some(owner) = owner else { return refused("none of its nodes is left") };
        match self.mm.registry_mut().revoke(owner, id) {
            Ok(held) => {
                let listed: u64 = held.iter().map(|held| held.bytes.0).sum();
                let used = self.model.used(number);
                hold("R13", listed == used, || format!("{listed} bytes are listed as held, {used} are"))?;
                let family: Vec<u32> = self
                    .model
                    .grants
                    .keys()
                    .copied()
                    .filter(|&grant| self.model.descends(grant, number))
                    .collect();
                for grant in family {
                    self.model.grants.entry(grant).and_modify(|grant| grant.is_revoked = true);
                }
                Ok(Outcome::Done)
            }
            Err(error) => {
                let has_ended = known.is_revoked || !known.is_held;
                hold("R13", has_ended, || format!("grant {number} cannot be revoked: {error}"))?;
                refused(error)
            }
        }
    }

    pub(super) fn release(&mut self, number: u32) -> Outcome {
        let Some(grant) = self.grants.remove(&number) else { return Outcome::Refused("no grant".to_owned()) };
        if let Some(known) = self.model.grants.get_mut(&number) {
            known.is_held = false;
        }
        match self.mm.registry_mut().release(grant) {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Refused(error.to_string()),
        }
    }

    pub(super) fn advance(&mut self, ns: u64) -> Applied {
        let live = |model: &Model| model.grants.keys().filter(|&&grant| model.is_live(grant)).count();
        let before = live(&self.model);
        self.model.now = self.model.now.saturating_add(ns);
        let ended = before - live(&self.model);
        let told = self.mm.registry_mut().advance(Time(self.model.now)).len();
        hold("R12", told == ended, || format!("{ended} grants ended with the time, {told} were told"))?;
        Ok(Outcome::Done)
    }
}
