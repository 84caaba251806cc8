//! Domains: made, dropped, and their masks (R4, R5).

use spmem_core::domain::{DomainError, MAX_DEPTH, MAX_NAME, Outside};
use spmem_core::units::MAX_DOMAINS;

use super::{Applied, Outcome, World, mask, refused};
use crate::check::{Violation, hold};
use crate::model;

impl World {
    pub(super) fn make_domain(&mut self, path: &str) -> Applied {
        let Some((above, name)) = path.rsplit_once('/') else { return refused("the root is there") };
        let Some(parent) = self.domain(above) else { return refused("no parent") };
        match self.mm.registry_mut().create_domain(parent, name) {
            Ok(_) => {
                self.model.domains_made += 1;
                let made = model::Domain { made: self.model.domains_made, ..model::Domain::default() };
                let old = self.model.domains.insert(path.to_owned(), made);
                hold("R4", old.is_none(), || format!("domain {path} was made twice"))?;
                self.check_step()
            }
            Err(error) => {
                let is_true = match error {
                    DomainError::Exists { domain } => self.domain(path) == Some(domain),
                    DomainError::BadName => !is_name(name),
                    DomainError::TooDeep => path.matches('/').count() > MAX_DEPTH,
                    DomainError::TooMany => self.model.domains.len() == usize::from(MAX_DOMAINS),
                    _ => false,
                };
                hold("R11", is_true, || format!("domain {path} cannot be made: {error}"))?;
                refused(error)
            }
        }
    }

    pub(super) fn drop_domain(&mut self, path: &str) -> Applied {
        let Some(domain) = self.domain(path) else { return refused("no domain") };
        let own = self.model.blocks.values().filter(|block| block.domain.as_deref() == Some(path));
        let frames: u64 = own.map(|block| block.frames).sum();
        let is_child = |other: &&String| other.rsplit_once('/').is_some_and(|(above, _)| above == path);
        let below = self.model.domains.keys().filter(is_child).count();
        match self.mm.registry_mut().remove_domain(domain) {
            Ok(()) => {
                hold("R5", frames == 0, || format!("domain {path} went with {frames} frames in use"))?;
                hold("R4", below == 0, || format!("domain {path} went with {below} below it"))?;
                self.model.domains.remove(path);
                Ok(Outcome::Done)
            }
            Err(error) => {
                let is_true = match error {
                    DomainError::Root => path.is_empty(),
                    DomainError::HasChildren { children } => children == below && below > 0,
                    DomainError::InUse { used } => used.0 == frames && frames > 0,
                    _ => false,
                };
                hold("R11", is_true, || format!("domain {path} with {frames} frames, {below} below it: {error}"))?;
                refused(error)
            }
        }
    }

    pub(super) fn set_mems(&mut self, path: &str, nodes: &[u16]) -> Applied {
        let (Some(domain), Some(mask)) = (self.domain(path), mask(nodes)) else {
            return refused("no domain or node");
        };
        let listed = self.mm.registry_mut().set_mems(domain, mask).unwrap_or_default();
        if let Some(known) = self.model.domains.get_mut(path) {
            known.mems = nodes.iter().copied().collect();
        }
        self.check_outside(path, &listed)?;
        self.check_step()
    }

    /// R5: what is listed is what lies outside its domain's masks, in a domain and all below it.
    pub(super) fn check_outside(&self, path: &str, listed: &[Outside]) -> Result<(), Violation> {
        let listed: u64 = listed.iter().map(|outside| outside.frames.0).sum();
        let below = format!("{path}/");
        let is_outside = |block: &&model::Block| {
            let within = block.domain.as_deref().filter(|domain| *domain == path || domain.starts_with(&below));
            within.is_some_and(|domain| !self.model.effective(domain).contains(&block.node))
        };
        let outside: u64 = self.model.blocks.values().filter(is_outside).map(|block| block.frames).sum();
        hold("R5", listed == outside, || format!("{listed} frames are listed as outside, {outside} are"))
    }

    pub(super) fn set_sysram(&mut self, path: &str, nodes: &[u16]) -> Applied {
        let (Some(domain), Some(mask)) = (self.domain(path), mask(nodes)) else {
            return refused("no domain or node");
        };
        if let Err(error) = self.mm.registry_mut().set_mems_sysram(domain, mask) {
            return refused(error);
        }
        if let Some(known) = self.model.domains.get_mut(path) {
            known.sysram = nodes.iter().copied().collect();
        }
        self.check_step()
    }
}

/// Whether a domain can have the name, which has no `/`: as a directory of cgroup(7).
fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= MAX_NAME && !name.contains('\n')
}
