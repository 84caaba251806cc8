//! Doors: memory of a node for a program behind a wall that lacks the node, by grant only.
//!
//! A cpuset keeps a program from allocating on a node, not from using pages that are there already. Who is outside and shows a
//! grant can hand it a whole range, [`Door::file`], or fill single missing pages of its own memory, [`Door::page`]. The
//! wall in core decides and the grant is charged first; what fails is not charged. What comes through is told of on a roll ([`crate::roll`]),
//! so that an audit knows it from what went astray. Takes no lock.
//!
//! Hole: NUMA balancing moves single pages back to the program's processors, unless the program's threads have a policy other
//! than the default, or their range gets one once they are there (from before it would decide where they go). Files keep
//! their pages.

use std::os::unix::fs::MetadataExt;
use std::{format, fs, thread};

use spmem_core::grant::{Charge, Grant, GrantError, Rights};
use spmem_core::placing::leaves_room;
use spmem_core::registry::Registry;
use spmem_core::units::{Bytes, DomainId, NodeId};
use spmem_core::wall::{Refusal, Request};
use spmem_sys::mempolicy::{MPOL_BIND, MPOL_F_STATIC_NODES, mask, node_of, set_policy};
use spmem_sys::node_file::NodeFile;
use spmem_sys::uffd::Uffd;
use spmem_sys::{Errno, PAGE};

use core::fmt;

use crate::machine::read_room;
use crate::roll::{Entry, Roll, What, started};

/// What /proc calls the files of doors.
pub const FILE_NAME: &core::ffi::CStr = c"spmem-door";

/// Why a door stays shut. Nothing is charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoorError {
    /// The wall lets nobody through (R6).
    Refused(Refusal),
    /// The grant does not reach that far (R12).
    Grant(GrantError),
    /// The kernel does not give the memory.
    Kernel(Errno),
    /// The kernel has put the page, which stays, on another node: its range has a policy of its own.
    Elsewhere {
        /// Which.
        node: i32,
    },
    /// The roll has no room left to tell of it.
    Untold,
}

impl fmt::Display for DoorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => write!(f, "{refusal}"),
            Self::Grant(error) => write!(f, "{error}"),
            Self::Kernel(errno) => write!(f, "the kernel gives no memory of the node: {errno}"),
            Self::Elsewhere { node } => write!(f, "the page is on node {node}: its range has a policy of its own"),
            Self::Untold => f.write_str("the roll that an audit reads is full; strike off what is there no more"),
        }
    }
}

impl core::error::Error for DoorError {}

/// Where to, and by what right.
#[derive(Debug)]
pub struct Door<'a> {
    /// Where nodes and grants are known.
    pub registry: &'a mut Registry,
    /// Where the walled program is.
    pub domain: DomainId,
    /// The grant shown.
    pub grant: &'a Grant,
    /// The node, by the kernel's number.
    pub node: NodeId,
    /// Where it is told of; has to live as long as what comes through.
    pub roll: &'a Roll,
}

impl Door<'_> {
    /// A sealed file of `len` bytes on the node, for the program to map; give the charge back, and strike the file off the roll, when it is
    /// closed everywhere.
    ///
    /// # Errors
    /// [`DoorError`].
    pub fn file(&mut self, len: usize) -> Result<(NodeFile, Charge), DoorError> {
        let node = self.node.get();
        let (file, charge) = self.open(len, || NodeFile::new(FILE_NAME, len, node))?;
        let seen = fs::metadata(format!("/proc/self/fd/{}", file.fd().raw()));
        let inode = seen.map_err(|error| Errno(error.raw_os_error().unwrap_or(Errno::ENOMEM.0)));
        match inode {
            Ok(seen) => self
                .tell(What::File { inode: seen.ino(), grant: self.grant.id() }, charge)
                .map(|charge| (file, charge)),
            Err(errno) => {
                self.give_back(charge);
                Err(DoorError::Kernel(errno))
            }
        }
    }

    /// Fills the missing page at `address` of process `pid`, whose userfaultfd `program` is, with `contents`, and looks where it is.
    ///
    /// # Errors
    /// [`DoorError`]; `EEXIST` when the page is there, `ENOMEM` when the node is nearly full.
    pub fn page(
        &mut self,
        program: &Uffd,
        pid: u32,
        address: usize,
        contents: &[u8; PAGE],
    ) -> Result<Charge, DoorError> {
        let (id, node) = (self.node, self.node.get());
        let place = || {
            // On a full node that is bound to the kernel ends processes, anybody's.
            let (free, total) = read_room(id).ok_or(Errno::EIO)?;
            if !leaves_room(free, total, Bytes(PAGE as u64)) {
                return Err(Errno::ENOMEM);
            }
            set_policy(MPOL_BIND | MPOL_F_STATIC_NODES, &mask([node]))?;
            let progress = program.copy(address, contents);
            progress.stopped.map_or(Ok(()), Err)
        };
        // The kernel allocates by the policy of the thread that calls: one of its own, so that no other memory lands there.
        let copy = || thread::scope(|scope| scope.spawn(place).join().unwrap_or(Err(Errno::ENOMEM)));
        let ((), charge) = self.open(PAGE, copy)?;
        match node_of(pid, address) {
            Ok(seen) if seen == i32::from(node) => {
                let (started, address) = (started(pid).unwrap_or(0), address as u64);
                self.tell(What::Page { pid, started, address, grant: self.grant.id() }, charge)
            }
            seen => {
                self.give_back(charge);
                Err(seen.map_or_else(DoorError::Kernel, |node| DoorError::Elsewhere { node }))
            }
        }
    }

    /// On the roll, or not charged.
    fn tell(&mut self, what: What, charge: Charge) -> Result<Charge, DoorError> {
        let entry = Entry { node: Some(self.node), what };
        match self.roll.enter(&entry) {
            Ok(()) => Ok(charge),
            Err(_) => {
                self.give_back(charge);
                Err(DoorError::Untold)
            }
        }
    }

    fn give_back(&mut self, charge: Charge) {
        self.registry.uncharge(charge).expect("it is this registry's");
    }

    fn open<T>(&mut self, len: usize, make: impl FnOnce() -> Result<T, Errno>) -> Result<(T, Charge), DoorError> {
        let grants = [self.grant];
        self.registry.admit(&Request::on(self.domain, self.node, &grants)).map_err(DoorError::Refused)?;
        let rights = Rights::ALLOC | Rights::MAP_READ | Rights::MAP_WRITE;
        self.registry.check(self.node, rights, &grants).map_err(DoorError::Refused)?;
        let charge = self.registry.charge(self.grant, Bytes(len as u64)).map_err(DoorError::Grant)?;
        match make() {
            Ok(made) => Ok((made, charge)),
            Err(errno) => {
                self.give_back(charge);
                Err(DoorError::Kernel(errno))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spmem_core::grant::Terms;
    use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Owner, Services};

    fn registry() -> (Registry, Owner) {
        let spec = |node_type| NodeSpec {
            node_type,
            class: Class::Plain,
            services: Services::empty(),
            guard: Guard::Hard,
            owner: "test".into(),
        };
        let mut registry = Registry::new();
        // This machine may have node 0 only.
        let owner = registry.register(NodeId::ZERO, spec(NodeType::Spm)).unwrap().owner;
        registry.register(NodeId::ONE, spec(NodeType::Sysram)).unwrap();
        (registry, owner)
    }

    const ALL: Rights = Rights::ALLOC.union(Rights::MAP_READ).union(Rights::MAP_WRITE);

    #[test]
    fn a_file_is_charged_and_full_of_pages_on_the_node() {
        let (mut registry, owner) = registry();
        let grant = registry.grant(&[&owner], Terms::new(ALL, Bytes(2 * PAGE as u64))).unwrap();
        let (domain, roll) = (DomainId::ROOT, Roll::new().unwrap());
        let mut door = Door { registry: &mut registry, domain, grant: &grant, node: NodeId::ZERO, roll: &roll };
        let (file, charge) = door.file(2 * PAGE).unwrap();
        assert_eq!(file.memory().bytes(0, 2 * PAGE), [0; 2 * PAGE]);
        assert!(matches!(door.file(PAGE), Err(DoorError::Grant(GrantError::OverQuota { .. }))));
        assert_eq!(registry.grant_info(&grant).unwrap().used, Bytes(2 * PAGE as u64));
        registry.uncharge(charge).unwrap();
    }

    #[test]
    fn without_the_rights_nothing_is_made_and_nothing_charged() {
        let (mut registry, owner) = registry();
        for rights in [Rights::ALLOC, Rights::MAP_READ | Rights::MAP_WRITE] {
            let grant = registry.grant(&[&owner], Terms::new(rights, Bytes::mib(1))).unwrap();
            let (domain, roll) = (DomainId::ROOT, Roll::new().unwrap());
            let mut door =
                Door { registry: &mut registry, domain, grant: &grant, node: NodeId::ZERO, roll: &roll };
            assert!(matches!(door.file(PAGE), Err(DoorError::Refused(_))));
            assert_eq!(registry.grant_info(&grant).unwrap().used, Bytes(0));
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_not_charged() {
        let (mut registry, owner) = registry();
        let grant = registry.grant(&[&owner], Terms::new(ALL, Bytes::mib(1))).unwrap();
        let (domain, roll) = (DomainId::ROOT, Roll::new().unwrap());
        let mut door = Door { registry: &mut registry, domain, grant: &grant, node: NodeId::ZERO, roll: &roll };
        assert_eq!(door.file(PAGE + 1).map(|_| ()), Err(DoorError::Kernel(Errno::EINVAL)));
        assert_eq!(registry.grant_info(&grant).unwrap().used, Bytes(0));
    }
}
