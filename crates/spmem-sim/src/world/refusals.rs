//! Refusals: what they say is true, and what they advise changes the answer (R11).

use spmem_core::frames::FramesError;
use spmem_core::grant::{Grant, GrantError, Rights, Terms};
use spmem_core::migrate::Stay;
use spmem_core::mm::AllocError;
use spmem_core::node::{Guard, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::Policy;
use spmem_core::units::{Bytes, DomainId, NodeId, Order};
use spmem_core::wall::{MAX_SHOWN, Reason, Refusal, Request};

use super::World;
use super::requests::shown;
use crate::check::{Violation, hold};
use crate::model::{self, Kind};
use crate::step::Mode;

/// A request, as the model and as the memory manager take it. The grants come to it when it is made.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) request: model::Request,
    pub(super) core: Request<'static>,
}

impl World {
    /// Whether each fact of a refusal by the wall is true. `wish` is the one node that a preferred policy means since it was set.
    pub(super) fn check_refusal(
        &self,
        asked: &Asked,
        right: Rights,
        wish: Option<u16>,
        refusal: Refusal,
    ) -> Result<(), Violation> {
        let request = &asked.request;
        let named = request.named();
        let plain = match &request.domain {
            Some(path) => &self.model.effective(path) & &self.model.of_type(false),
            None => self.model.of_type(false),
        };
        // Sysram within reach is not what a request is refused.
        let node = wish.or(named.iter().find(|node| !plain.contains(node)).copied());
        let held = shown(&self.grants, &request.grants).len();
        let is_true = match refusal.reason {
            Reason::TooManyGrants { shown } => {
                let is_lowest = refusal.node.map(NodeId::get) == named.first().copied();
                let is_true = shown == held && held > MAX_SHOWN && is_lowest;
                return hold("R11", is_true, || format!("{held} grants, {named:?} named: {refusal}"));
            }
            Reason::NothingAsked => request.kind() == Kind::Nothing,
            Reason::NoDefault { domain } => {
                let limiting = request.domain.as_deref().and_then(|path| self.model.leaves_none(path));
                let gets_none = match &request.domain {
                    Some(path) => self.model.default_mask(path).is_empty(),
                    None => plain.is_empty(),
                };
                gets_none && node.is_none() && domain == limiting.and_then(|path| self.domain(&path))
            }
            reason => node.is_some_and(|node| self.is_true_of(asked, right, node, reason)),
        };
        let is_node = refusal.node.map(NodeId::get) == node;
        hold("R11", is_true && is_node, || {
            format!("{request:?}, of which node {node:?} is what stands out: {:?}: {refusal}", refusal.reason)
        })
    }

    /// Whether it is true that this keeps a request from a node.
    fn is_true_of(&self, asked: &Asked, right: Rights, node: u16, reason: Reason) -> bool {
        let request = &asked.request;
        let Some(known) = self.model.nodes.get(&node) else { return reason == Reason::Absent };
        let Some(path) = &request.domain else { return reason == Reason::NoDomain };
        let limiting = self.model.limiting(path, node);
        let shown = &request.grants;
        match reason {
            Reason::OutsideDomain { domain } => limiting.and_then(|path| self.domain(&path)) == Some(domain),
            _ if limiting.is_some() || !known.spec.is_spm || self.model.carries(shown, right, node) => false,
            Reason::NeedsGrant { guard, mode } => {
                guard == known.spec.guard()
                    && mode == asked.core.policy.mode()
                    && !(guard == Guard::Easy && request.mode == Mode::Bind)
                    && !self.model.is_named(shown, node)
                    && shown.iter().all(|&grant| self.model.is_live(grant))
            }
            Reason::LacksRight { right: lacking } => lacking == right && self.model.is_named(shown, node),
            Reason::BadGrant { cause } => self.model.has_ended(shown, cause),
            _ => false,
        }
    }

    /// Does what a refusal advises, asks again, and undoes it. The answer must be another one.
    pub(super) fn follow(&mut self, asked: &Asked, refusal: Refusal) -> Result<(), Violation> {
        let all = shown(&self.grants, &asked.request.grants);
        // One more may have to be shown.
        let grants = &all[..all.len().min(MAX_SHOWN - 1)];
        let registry = self.mm.registry_mut();
        let again = |registry: &spmem_core::registry::Registry, policy, domain, grants: &[&Grant]| {
            registry.admit(&Request { policy, domain, grants, ..asked.core }).err()
        };
        let (policy, domain) = (asked.core.policy, asked.core.domain);
        let after;
        let mut must_open = false;
        match refusal.reason {
            Reason::NothingAsked => after = again(registry, Policy::DEFAULT, domain, grants),
            Reason::TooManyGrants { .. } => after = again(registry, policy, domain, grants),
            Reason::NoDomain => after = again(registry, policy, Some(DomainId::ROOT), grants),
            Reason::OutsideDomain { domain: limiting } => {
                let Some((&mems, _)) = registry.configured(limiting) else { return Ok(()) };
                let wider = mems.union(&refusal.node.map_or(NodeMask::EMPTY, NodeMask::of));
                let is_set = registry.set_mems(limiting, wider).is_ok();
                after = again(registry, policy, domain, grants);
                let is_undone = registry.set_mems(limiting, mems).is_ok();
                hold("R4", is_set && is_undone, || format!("the mems of {limiting} cannot be set"))?;
            }
            Reason::NoDefault { domain: Some(limiting) } => {
                let Some((&mems, &sysram)) = registry.configured(limiting) else { return Ok(()) };
                let above = registry.parent(limiting).and_then(|above| registry.effective(above));
                let reach = above.unwrap_or(registry.present()).intersection(registry.sysram());
                let own = registry.effective(limiting).map_or(NodeMask::EMPTY, |own| own.intersection(&reach));
                let Some(node) = own.first().or(reach.first()) else {
                    return hold("R11", false, || format!("{refusal}: no domain above has a sysram node either"));
                };
                if own.is_empty() {
                    let _ = registry.set_mems(limiting, mems.union(&node.into()));
                }
                if !sysram.is_empty() {
                    let _ = registry.set_mems_sysram(limiting, sysram.union(&node.into()));
                }
                after = again(registry, policy, domain, grants);
                let is_undone = registry.set_mems(limiting, mems).is_ok()
                    && registry.set_mems_sysram(limiting, sysram).is_ok();
                hold("R4", is_undone, || format!("the masks of {limiting} cannot be set"))?;
            }
            Reason::NeedsGrant { .. } | Reason::LacksRight { .. } | Reason::BadGrant { .. } => {
                must_open = true;
                let owner = refusal.node.and_then(|node| self.owners.get(&node.get()));
                let Some(owner) = owner else {
                    return hold("R11", false, || format!("{refusal}, but the node has no owner to ask"));
                };
                if let Reason::NeedsGrant { guard: Guard::Easy, .. } = refusal.reason {
                    let bind = Policy::bind(owner.node().into());
                    let closed = again(registry, bind, domain, grants);
                    hold("R9", closed.is_none(), || format!("{refusal}; named by bind: {closed:?}"))?;
                }
                let made = registry.grant(&[owner], Terms::new(Rights::ALLOC, Bytes(u64::MAX)));
                let Ok(made) = made else {
                    return hold("R12", false, || format!("the owner of {} cannot grant: {made:?}", owner.node()));
                };
                let more: Vec<&Grant> = grants.iter().copied().chain([&made]).collect();
                after = again(registry, policy, domain, &more);
                let is_undone = registry.release(made).is_ok();
                hold("R12", is_undone, || "a grant cannot be given back".to_owned())?;
            }
            Reason::Absent
            | Reason::UnknownDomain { .. }
            | Reason::NoDefault { domain: None }
            | Reason::NoMemory => return Ok(()),
            // No request is refused as a whole for these, nor a node that is named alone.
            Reason::NotDefault { .. } | Reason::NotNamed | Reason::Counted { .. } | Reason::NotFirst { .. } => {
                return hold("R11", false, || format!("{refusal}: of a node named alone"));
            }
        }
        let helps = if must_open { after.is_none() } else { after != Some(refusal) };
        hold("R11", helps, || format!("{refusal}; that was done, and now: {after:?}"))
    }

    /// Whether it is true that the node tried last gave nothing for this reason. Which node that was.
    pub(super) fn check_lack(
        &self,
        shown: &[u32],
        right: Rights,
        order: Order,
        error: AllocError,
    ) -> Result<u16, Violation> {
        let bytes = order.bytes().0;
        let (node, is_true) = match error {
            AllocError::Grant { node, cause: GrantError::OverQuota { wanted, left } } => {
                let is_over = self.model.is_over_quota(shown, right, node, bytes, left.0);
                (node, wanted.0 == bytes && is_over)
            }
            AllocError::Exhausted { node, cause: FramesError::Exhausted { order: wanted, free, largest } } => {
                let has = self.model.largest_free(node.get());
                let is_free = free.0 == self.model.frames_free(node.get());
                (node, is_free && wanted == order && largest.map(Order::get) == has && has < Some(order.get()))
            }
            AllocError::ReserveOnly { node, free, min } => {
                let (number, is_kept) = (node.get(), self.model.keeps_reserve(node.get(), order.get()));
                let is_min = min.0 == self.model.nodes[&number].reserve;
                (node, is_min && free.0 == self.model.frames_free(number) && !is_kept)
            }
            // Metadata never runs out.
            AllocError::Grant { node, .. } | AllocError::Exhausted { node, .. } => (node, false),
            AllocError::Refused(refusal) => {
                hold("R11", false, || format!("the wall refuses what it let through: {refusal}"))?;
                return Ok(0);
            }
        };
        hold("R11", is_true, || format!("{shown:?} shown with {right} for order {}: {error:?}", order.get()))?;
        Ok(node.get())
    }

    /// Whether it is true that a block stays for want of a service or a right of the mover, and whether the right would help.
    pub(super) fn check_stay(
        &mut self,
        node: u16,
        needs: Services,
        right: Rights,
        numbers: &[u32],
        stay: Stay,
    ) -> Result<(), Violation> {
        let missing = needs - self.model.nodes[&node].spec.services;
        let reason = match stay {
            Stay::NotOffered { node: of, missing: told } => {
                let is_true = of.get() == node && told == missing && !missing.is_empty();
                return hold("R11", is_true, || format!("node {node} lacks {missing}: {stay}"));
            }
            Stay::Refused { refusal } if refusal.node.map(NodeId::get) == Some(node) => refusal.reason,
            _ => return hold("R11", false, || format!("a block of node {node}: {stay}")),
        };
        let is_true = missing.is_empty()
            && !self.model.may(numbers, right, node)
            && match reason {
                Reason::LacksRight { right: lacking } => lacking == right,
                Reason::BadGrant { cause } => self.model.has_ended(numbers, cause),
                _ => false,
            };
        hold("R11", is_true, || format!("{numbers:?} shown for {right} on node {node}: {stay}"))?;
        let Some(owner) = self.owners.get(&node) else { return Ok(()) };
        let registry = self.mm.registry_mut();
        let Ok(made) = registry.grant(&[owner], Terms::new(right, Bytes(0))) else {
            return hold("R12", false, || format!("the owner of node {node} cannot grant"));
        };
        let mut grants = shown(&self.grants, numbers);
        grants.push(&made);
        let after = registry.check(owner.node(), right, &grants);
        let is_undone = registry.release(made).is_ok();
        hold("R11", after.is_ok() && is_undone, || format!("{stay}; that was done, and now: {after:?}"))
    }
}
