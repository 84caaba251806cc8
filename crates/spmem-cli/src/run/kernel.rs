//! Kernel: does this machine give what management needs, and may we use it?
//!
//! [`open`] gives the means to make userfaultfds, or the [`Lack`] with its remedy. [`adopt`] takes those that agents send:
//! `spm` does the handshake for them, since EVENT_FORK takes CAP_SYS_PTRACE, which a program need not have.

use std::fmt;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use spmem_sys::Errno;
use spmem_sys::fd::Fd;
use spmem_sys::uffd::{self, Uffd, feature};

/// Features of userfaultfd(2) without which a page could be lost, and the kernel that brought each.
const REQUIRED: [(u64, &str, &str); 7] = [
    (feature::EVENT_FORK, "EVENT_FORK", "4.11"),
    (feature::EVENT_REMAP, "EVENT_REMAP", "4.11"),
    (feature::EVENT_REMOVE, "EVENT_REMOVE", "4.11"),
    (feature::EVENT_UNMAP, "EVENT_UNMAP", "4.11"),
    (feature::THREAD_ID, "THREAD_ID", "4.14"),
    (feature::POISON, "POISON", "6.6"),
    (feature::MOVE, "MOVE", "6.8"),
];

/// What the kernel lacks, or withholds.
#[derive(Debug, PartialEq, Eq)]
pub enum Lack {
    /// Neither the device nor the system call.
    NoUserfaultfd,
    /// Both are there and not for us.
    NotAllowed,
    /// These features are missing: names and the version that brought the last.
    Features { names: Vec<&'static str>, since: &'static str },
    /// EVENT_FORK takes a capability.
    NoPtraceRight,
    /// Something else went wrong.
    Other { doing: &'static str, errno: Errno },
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoUserfaultfd => write!(
                f,
                "this kernel has no userfaultfd (or this container's filter hides it); \
                 use a kernel >= 6.8 with CONFIG_USERFAULTFD=y"
            ),
            Self::NotAllowed => write!(
                f,
                "userfaultfd is not allowed for this user; run spm as root or with CAP_SYS_PTRACE, \
                 and give it access to /dev/userfaultfd"
            ),
            Self::Features { names, since } => {
                write!(f, "this kernel's userfaultfd lacks {}; use a kernel >= {since}", names.join(", "))
            }
            Self::NoPtraceRight => write!(
                f,
                "following forks (UFFD_FEATURE_EVENT_FORK) needs CAP_SYS_PTRACE; run spm as root, or give it the \
                 right: setcap cap_sys_ptrace+ep \"$(command -v spm)\""
            ),
            Self::Other { doing, errno } => write!(f, "{doing} failed: {errno}"),
        }
    }
}

/// The right to make userfaultfds, checked.
pub struct Userfaultfd {
    /// The open device to hand to agents, where there is one; without it they use the system call.
    pub device: Option<OwnedFd>,
}

/// Opens the way to userfaultfds and tries the handshake.
///
/// # Errors
/// What is missing, see [`Lack`].
pub fn open() -> Result<Userfaultfd, Lack> {
    let device = Fd::open(uffd::DEVICE, libc::O_RDWR | libc::O_CLOEXEC).ok();
    let supported = make(device.as_ref())?
        .enable(0)
        .map_err(|errno| Lack::Other { doing: "the userfaultfd handshake", errno })?;
    let missing = REQUIRED.iter().filter(|(bit, ..)| supported & bit == 0);
    if let Some((.., since)) = missing.clone().next_back() {
        return Err(Lack::Features { names: missing.map(|(_, name, _)| *name).collect(), since });
    }
    match make(device.as_ref())?.enable(feature::MANAGED) {
        Ok(_) => Ok(Userfaultfd { device: device.map(owned) }),
        Err(Errno::EPERM) => Err(Lack::NoPtraceRight),
        Err(errno) => Err(Lack::Other { doing: "asking userfaultfd for its features", errno }),
    }
}

fn make(device: Option<&Fd>) -> Result<Uffd, Lack> {
    device.map_or_else(Uffd::from_syscall, Uffd::from_device).map_err(|errno| match errno.0 {
        libc::ENOSYS => Lack::NoUserfaultfd,
        libc::EPERM | libc::EACCES => Lack::NotAllowed,
        _ => Lack::Other { doing: "making a userfaultfd", errno },
    })
}

/// Becomes a holder of a userfaultfd that another process sent. Its handshake needs *our* rights.
pub fn adopt(userfault: OwnedFd) -> Uffd {
    Uffd::from_fd(Fd::from_raw(userfault.into_raw_fd()))
}

#[allow(unsafe_code, reason = "from spmem-sys's descriptor type to std's")]
fn owned(fd: Fd) -> OwnedFd {
    // SAFETY: `into_raw` gave up ownership of an open descriptor.
    unsafe { OwnedFd::from_raw_fd(fd.into_raw()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handshake_on_another_kind_of_file_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(adopt(file.into()).enable(0).is_err());
    }

    #[test]
    fn what_management_asks_for_is_what_is_checked() {
        assert_eq!(REQUIRED.iter().fold(0, |bits, (bit, ..)| bits | bit), feature::MANAGED);
    }

    #[test]
    fn a_lack_names_its_remedy() {
        let lack = Lack::Features { names: vec!["POISON", "MOVE"], since: "6.8" };
        assert_eq!(lack.to_string(), "this kernel's userfaultfd lacks POISON, MOVE; use a kernel >= 6.8");
        assert!(Lack::NoPtraceRight.to_string().contains("setcap"));
    }
}
