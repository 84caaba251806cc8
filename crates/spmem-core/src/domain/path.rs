//! Paths: what a domain is called, as a cgroup(7) is. Takes neither lock nor memory.

use core::fmt;

use super::{Domain, Domains};
use crate::registry::Registry;
use crate::units::DomainId;

impl Registry {
    /// The domain's path, `/` for the root, to be written: that takes no memory.
    pub fn domain_path(&self, id: DomainId) -> Option<impl fmt::Display> {
        Some(Path { domains: &self.domains, domain: self.domains.get(id)? })
    }

    /// The domain that a path names; empty parts of it mean nothing.
    pub fn find_domain(&self, path: &str) -> Option<DomainId> {
        let mut names = path.split('/').filter(|name| !name.is_empty());
        names.try_fold(DomainId::ROOT, |above, name| self.child(above, name))
    }
}

/// [`Registry::domain_path`]
struct Path<'a> {
    domains: &'a Domains,
    domain: &'a Domain,
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domains, domain } = *self;
        let Some(above) = domain.parent.and_then(|parent| domains.get(parent)) else {
            return f.write_str("/");
        };
        // At most MAX_DEPTH deep.
        if above.parent.is_some() {
            Path { domains, domain: above }.fmt(f)?;
        }
        write!(f, "/{}", domain.name)
    }
}
