//! Domains: a tree of places that requests come from, each with a possible and a default mask (R4, R5).
//!
//! A domain has two configured masks, `mems` (which nodes are possible) and `mems.sysram` (which are the default), and two
//! effective ones that follow from them, its ancestors and the nodes there are. Configured masks are taken as they come, in
//! any order, also with nodes that are not there yet; a change of anything works out the effective ones anew, so that a
//! request only reads them. The tree lives in the [`Registry`]; a path names a domain as it names a cgroup(7).
//! Takes no lock.
//!
//! Frames in use are counted per domain and node: so a change of a mask can say what lies outside it now (R5).

mod path;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::frames::FramesError;
use crate::nodemask::NodeMask;
use crate::registry::Registry;
use crate::units::{DomainId, FrameCount, MAX_DOMAINS, NodeId};

/// Levels there can be below the root.
pub const MAX_DEPTH: usize = 64;
/// Bytes in a name, as in a file's.
pub const MAX_NAME: usize = 255;

/// Why a domain was not made, changed or removed. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainError {
    /// There is no such domain.
    Unknown {
        /// As given.
        domain: DomainId,
    },
    /// A name is 1 to [`MAX_NAME`] bytes without `/` or a line's end (as in cgroup(7)), and neither `.` nor `..`.
    BadName,
    /// The parent has a child of that name.
    Exists {
        /// The child.
        domain: DomainId,
    },
    /// The domain would lie more than [`MAX_DEPTH`] levels below the root.
    TooDeep,
    /// [`MAX_DOMAINS`] exist.
    TooMany,
    /// The root stays.
    Root,
    /// The domain has children; remove them first.
    HasChildren {
        /// How many.
        children: usize,
    },
    /// Frames of the domain are in use; free them or move them to another domain first.
    InUse {
        /// How many.
        used: FrameCount,
    },
    /// The heap has nothing left for it.
    NoMemory,
}

impl fmt::Display for DomainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { domain } => write!(f, "there is no domain {domain}"),
            Self::BadName => {
                write!(
                    f,
                    "a domain's name is 1 to {MAX_NAME} bytes without '/' or a line's end, and neither '.' nor '..'"
                )
            }
            Self::Exists { domain } => write!(f, "domain {domain} has that name already"),
            Self::TooDeep => write!(f, "a domain can lie {MAX_DEPTH} levels below the root"),
            Self::TooMany => write!(f, "{MAX_DOMAINS} domains exist; remove one"),
            Self::Root => f.write_str("the root domain stays"),
            Self::HasChildren { children } => write!(f, "the domain has {children} children; remove them first"),
            Self::InUse { used } => write!(f, "{used} frames of the domain are in use; free or move them first"),
            Self::NoMemory => f.write_str("there is no memory left for it"),
        }
    }
}

impl core::error::Error for DomainError {}

/// Frames that lie where their domain's masks no longer reach (R5). They stay valid; nothing new is allocated there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outside {
    /// Whose they are.
    pub domain: DomainId,
    /// Where they lie.
    pub node: NodeId,
    /// How many.
    pub frames: FrameCount,
}

/// A domain. Its effective masks are up to date whenever the registry is not being changed.
#[derive(Debug)]
struct Domain {
    name: String,
    parent: Option<DomainId>,
    children: Vec<DomainId>,
    depth: usize,
    mems: NodeMask,
    mems_sysram: NodeMask,
    effective: NodeMask,
    default: NodeMask,
    /// Frames in use by node; nodes above the last are unused.
    used: Vec<u64>,
    /// Tells it from one that had its number before.
    serial: u64,
}

/// The tree of domains of a registry.
#[derive(Debug)]
pub(crate) struct Domains {
    /// One or none each: a list, unlike a box, can be made fallibly.
    slots: Vec<Vec<Domain>>,
    /// Has room for all of them.
    vacant: Vec<DomainId>,
    next_serial: u64,
}

impl Domains {
    /// The root alone, without limits.
    pub(crate) fn new() -> Self {
        let root = Domain::new(String::new(), None, 0, 0);
        Self { slots: alloc::vec![alloc::vec![root]], vacant: Vec::new(), next_serial: 1 }
    }

    fn get(&self, id: DomainId) -> Option<&Domain> {
        self.slots.get(id.index())?.first()
    }

    fn get_mut(&mut self, id: DomainId) -> Result<&mut Domain, DomainError> {
        let slot = self.slots.get_mut(id.index()).and_then(|slot| slot.first_mut());
        slot.ok_or(DomainError::Unknown { domain: id })
    }

    /// The nodes that requests of the domain can reach at all, and those they get unasked.
    pub(crate) fn masks(&self, id: DomainId) -> Option<(&NodeMask, &NodeMask)> {
        self.get(id).map(|domain| (&domain.effective, &domain.default))
    }

    /// Tells a domain from others that have had, or will have, its number.
    pub(crate) fn serial(&self, id: DomainId) -> Option<u64> {
        self.get(id).map(|domain| domain.serial)
    }

    /// Works out the effective masks of a domain and everything below it (R4).
    pub(crate) fn refresh(&mut self, from: DomainId, present: &NodeMask, sysram: &NodeMask) {
        let mut walk = Walk::new(from);
        while let Some(id) = walk.next(self) {
            let above = self.get(id).and_then(|domain| self.get(domain.parent?));
            let reach = above.map_or(*present, |parent| parent.effective);
            let Ok(domain) = self.get_mut(id) else { continue };
            let limited = domain.mems.intersection(&reach);
            domain.effective = if limited.is_empty() { reach } else { limited };
            let plain = domain.effective.intersection(sysram);
            let is_limited = !domain.mems_sysram.is_empty();
            domain.default = if is_limited { plain.intersection(&domain.mems_sysram) } else { plain };
        }
    }

    /// Makes what is kept of a domain's use of a node, before anything of it is taken.
    ///
    /// # Errors
    /// [`FramesError::NoMetadata`]
    pub(crate) fn prepare(&mut self, id: DomainId, node: NodeId) -> Result<(), FramesError> {
        let domain = self.get_mut(id).expect("a domain is not removed between admission and allocation");
        if let Some(missing @ 1..) = (node.index() + 1).checked_sub(domain.used.len()) {
            domain.used.try_reserve_exact(missing).map_err(|_| FramesError::NoMetadata)?;
            domain.used.resize(node.index() + 1, 0);
        }
        Ok(())
    }

    /// Counts frames as used by a domain, prepared for before.
    pub(crate) fn charge(&mut self, id: DomainId, node: NodeId, frames: u64) {
        let domain = self.get_mut(id).expect("a domain is not removed between admission and allocation");
        domain.used[node.index()] += frames;
    }

    /// Counts frames as used no longer.
    pub(crate) fn uncharge(&mut self, id: DomainId, node: NodeId, frames: u64) {
        let domain = self.get_mut(id).expect("a domain with frames in use stays");
        domain.used[node.index()] -= frames;
    }

    /// Frames of `from` and all below it that lie outside their domain's effective mask.
    fn outside(&self, from: DomainId) -> impl Iterator<Item = Outside> + '_ {
        let mut walk = Walk::new(from);
        let all = core::iter::from_fn(move || walk.next(self));
        all.filter_map(|id| Some((id, self.get(id)?))).flat_map(|(id, domain)| {
            let used = domain.used.iter().zip(&NodeMask::ALL);
            let outside = used.filter(|&(&frames, node)| frames > 0 && !domain.effective.contains(node));
            outside.map(move |(&frames, node)| Outside { domain: id, node, frames: FrameCount(frames) })
        })
    }

    /// The same as a list.
    ///
    /// # Errors
    /// [`DomainError::NoMemory`]
    pub(crate) fn list_outside(&self, from: DomainId) -> Result<Vec<Outside>, DomainError> {
        let mut all = Vec::new();
        for one in self.outside(from) {
            all.try_reserve(1).map_err(|_| DomainError::NoMemory)?;
            all.push(one);
        }
        Ok(all)
    }

    /// A new domain that nobody knows yet, and room for it here and in its parent.
    fn make(&mut self, parent: DomainId, name: &str, depth: usize) -> Result<Vec<Domain>, DomainError> {
        let no_memory = |_| DomainError::NoMemory;
        let (mut made, mut own) = (Vec::new(), String::new());
        made.try_reserve_exact(1).map_err(no_memory)?;
        own.try_reserve_exact(name.len()).map_err(no_memory)?;
        own.push_str(name);
        self.get_mut(parent)?.children.try_reserve(1).map_err(no_memory)?;
        self.slots.try_reserve(1).map_err(no_memory)?;
        // Also for the day on which it is removed, which nothing may refuse.
        self.vacant.try_reserve(self.slots.len() + 1 - self.vacant.len()).map_err(no_memory)?;
        made.push(Domain::new(own, Some(parent), depth, self.next_serial));
        Ok(made)
    }
}

/// A way through a domain and all below it, parents first. Takes no memory: a change of masks must not fail for want of it.
struct Walk {
    at: DomainId,
    has_begun: bool,
    /// Levels below where it began, ...
    level: usize,
    /// ... and which child comes next on each.
    next: [usize; MAX_DEPTH + 1],
}

impl Walk {
    const fn new(from: DomainId) -> Self {
        Self { at: from, has_begun: false, level: 0, next: [0; MAX_DEPTH + 1] }
    }

    fn next(&mut self, domains: &Domains) -> Option<DomainId> {
        if !self.has_begun {
            self.has_begun = true;
            return Some(self.at);
        }
        loop {
            let domain = domains.get(self.at)?;
            if let Some(&child) = domain.children.get(self.next[self.level]) {
                self.next[self.level] += 1;
                self.level += 1;
                // The deepest has no children.
                if let Some(next) = self.next.get_mut(self.level) {
                    *next = 0;
                }
                self.at = child;
                return Some(child);
            }
            self.level = self.level.checked_sub(1)?;
            self.at = domain.parent?;
        }
    }
}

impl Domain {
    const fn new(name: String, parent: Option<DomainId>, depth: usize, serial: u64) -> Self {
        Self {
            name,
            parent,
            children: Vec::new(),
            depth,
            mems: NodeMask::EMPTY,
            mems_sysram: NodeMask::EMPTY,
            effective: NodeMask::EMPTY,
            default: NodeMask::EMPTY,
            used: Vec::new(),
            serial,
        }
    }
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len()) && !name.contains(['/', '\n']) && name != "." && name != ".."
}

impl Registry {
    /// Makes a domain below `parent`, without limits of its own.
    ///
    /// # Errors
    /// [`DomainError::Unknown`], [`DomainError::BadName`], [`DomainError::Exists`], [`DomainError::TooDeep`],
    /// [`DomainError::TooMany`], [`DomainError::NoMemory`].
    ///
    /// ```
    /// use spmem_core::{registry::Registry, units::DomainId};
    /// let mut registry = Registry::new();
    /// let slice = registry.create_domain(DomainId::ROOT, "batch.slice").unwrap();
    /// let job = registry.create_domain(slice, "job1").unwrap();
    /// assert_eq!(registry.domain_path(job).unwrap().to_string(), "/batch.slice/job1");
    /// assert_eq!(registry.find_domain("/batch.slice/job1"), Some(job));
    /// ```
    pub fn create_domain(&mut self, parent: DomainId, name: &str) -> Result<DomainId, DomainError> {
        let domains = &self.domains;
        let above = domains.get(parent).ok_or(DomainError::Unknown { domain: parent })?;
        if !is_name(name) {
            return Err(DomainError::BadName);
        }
        if let Some(domain) = self.child(parent, name) {
            return Err(DomainError::Exists { domain });
        }
        let depth = above.depth + 1;
        if depth > MAX_DEPTH {
            return Err(DomainError::TooDeep);
        }
        let domains = &mut self.domains;
        let domain = domains.make(parent, name, depth)?;
        let id = if let Some(id) = domains.vacant.pop() {
            domains.slots[id.index()] = domain;
            id
        } else {
            let number = u16::try_from(domains.slots.len()).map_err(|_| DomainError::TooMany)?;
            let id = DomainId::new(number).map_err(|_| DomainError::TooMany)?;
            domains.slots.push(domain);
            id
        };
        domains.next_serial += 1;
        domains.get_mut(parent)?.children.push(id);
        self.refresh_domains(id);
        Ok(id)
    }

    /// Removes a domain that has neither children nor frames. Its number may name another domain later.
    ///
    /// # Errors
    /// [`DomainError::Root`], [`DomainError::Unknown`], [`DomainError::HasChildren`], [`DomainError::InUse`].
    pub fn remove_domain(&mut self, id: DomainId) -> Result<(), DomainError> {
        let domain = self.domains.get(id).ok_or(DomainError::Unknown { domain: id })?;
        let Some(parent) = domain.parent else { return Err(DomainError::Root) };
        let (children, used) = (domain.children.len(), domain.used.iter().sum());
        if children > 0 {
            return Err(DomainError::HasChildren { children });
        }
        if used > 0 {
            return Err(DomainError::InUse { used: FrameCount(used) });
        }
        self.domains.get_mut(parent)?.children.retain(|&child| child != id);
        self.domains.slots[id.index()] = Vec::new();
        self.domains.vacant.push(id);
        self.bump_epoch();
        Ok(())
    }

    /// Sets which nodes are possible in a domain; an empty mask sets no limit (R4). New requests obey at once. What
    /// lies outside now, here or further down, is listed: the change is done when it has been moved (R5).
    ///
    /// # Errors
    /// [`DomainError::Unknown`]; [`DomainError::NoMemory`] where what lies outside could not be listed.
    pub fn set_mems(&mut self, id: DomainId, mems: NodeMask) -> Result<Vec<Outside>, DomainError> {
        let before = core::mem::replace(&mut self.domains.get_mut(id)?.mems, mems);
        self.refresh_domains(id);
        let listed = self.domains.list_outside(id);
        if listed.is_err() {
            self.domains.get_mut(id)?.mems = before;
            self.refresh_domains(id);
        }
        listed
    }

    /// Sets which sysram nodes a domain gets unasked; an empty mask sets no limit (R4). SPM nodes in it mean nothing, however
    /// early it is set: the default never holds one.
    ///
    /// # Errors
    /// [`DomainError::Unknown`].
    pub fn set_mems_sysram(&mut self, id: DomainId, mems_sysram: NodeMask) -> Result<(), DomainError> {
        self.domains.get_mut(id)?.mems_sysram = mems_sysram;
        self.refresh_domains(id);
        Ok(())
    }

    /// Frames of the domain and all below it that lie where its masks do not reach (R5).
    pub fn outside(&self, id: DomainId) -> impl Iterator<Item = Outside> + '_ {
        self.domains.outside(id)
    }

    /// The nodes that requests of the domain can reach at all (R4); `None` when there is no such domain.
    ///
    /// ```
    /// use spmem_core::{nodemask::NodeMask, registry::Registry, units::{DomainId, NodeId}};
    /// let mut registry = Registry::new(); // no node is registered: nothing is effective, whatever is configured
    /// registry.set_mems(DomainId::ROOT, NodeId::ONE.into()).unwrap();
    /// assert_eq!(registry.effective(DomainId::ROOT), Some(&NodeMask::EMPTY));
    /// ```
    pub fn effective(&self, id: DomainId) -> Option<&NodeMask> {
        self.domains.get(id).map(|domain| &domain.effective)
    }

    /// The nodes that a request without a mask gets (R4); `None` when there is no such domain.
    pub fn default_mask(&self, id: DomainId) -> Option<&NodeMask> {
        self.domains.get(id).map(|domain| &domain.default)
    }

    /// The masks as they were set: `mems` and `mems.sysram`.
    pub fn configured(&self, id: DomainId) -> Option<(&NodeMask, &NodeMask)> {
        self.domains.get(id).map(|domain| (&domain.mems, &domain.mems_sysram))
    }

    /// Frames of the domain in use on a node; children's are not counted.
    pub fn used_by(&self, id: DomainId, node: NodeId) -> FrameCount {
        let used = self.domains.get(id).and_then(|domain| domain.used.get(node.index()));
        FrameCount(used.copied().unwrap_or(0))
    }

    /// Every domain, in no order.
    pub fn domains(&self) -> impl Iterator<Item = DomainId> + '_ {
        let slots = self.domains.slots.iter().zip(0..MAX_DOMAINS);
        slots.filter(|(slot, _)| !slot.is_empty()).filter_map(|(_, number)| DomainId::new(number).ok())
    }

    /// The domain above; `None` for the root.
    pub fn parent(&self, id: DomainId) -> Option<DomainId> {
        self.domains.get(id)?.parent
    }

    /// The ancestor, or the domain itself, whose mask keeps it from a registered node: the topmost one.
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
    /// use spmem_core::{registry::Registry, units::{DomainId, NodeId}};
    /// # let spec = || NodeSpec { node_type: NodeType::Sysram, class: Class::Plain, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "doc".into() };
    /// let mut registry = Registry::new();
    /// registry.register(NodeId::ZERO, spec()).unwrap();
    /// registry.register(NodeId::ONE, spec()).unwrap();
    /// let slice = registry.create_domain(DomainId::ROOT, "slice").unwrap();
    /// let job = registry.create_domain(slice, "job").unwrap();
    /// registry.set_mems(slice, NodeId::ZERO.into()).unwrap();
    /// assert_eq!(registry.limiting_domain(job, NodeId::ONE), Some(slice));
    /// ```
    pub fn limiting_domain(&self, id: DomainId, node: NodeId) -> Option<DomainId> {
        let mut found = None;
        let mut at = Some(id);
        while let Some(id) = at {
            let domain = self.domains.get(id)?;
            if domain.effective.contains(node) {
                break;
            }
            found = Some(id);
            at = domain.parent;
        }
        found
    }

    /// The ancestor, or the domain itself, whose masks leave it no sysram node of those there are: the topmost one. `None` where
    /// there is none to leave.
    pub(crate) fn leaves_no_sysram(&self, id: DomainId) -> Option<DomainId> {
        if self.sysram().is_empty() {
            return None;
        }
        // Where some are possible it is the default that lacks them: `mems.sysram` is the domain's own.
        let mut found = id;
        let mut at = Some(id);
        while let Some(id) = at {
            let domain = self.domains.get(id)?;
            if !domain.effective.intersection(self.sysram()).is_empty() {
                break;
            }
            found = id;
            at = domain.parent;
        }
        Some(found)
    }

    fn child(&self, parent: DomainId, name: &str) -> Option<DomainId> {
        let children = &self.domains.get(parent)?.children;
        children.iter().copied().find(|&child| self.domains.get(child).is_some_and(|domain| domain.name == name))
    }
}
