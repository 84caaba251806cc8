//! seccomp(2): a filter whose chosen calls another process answers (seccomp_unotify(2)).
//!
//! [`install`] puts the filter on the calling thread and gives the [`Listener`] for whoever answers. The program that comes
//! as an argument says which calls; this module only carries it. What a call's pointers point to may change until
//! the kernel reads it: answers are a convenience, no boundary.

use core::mem::size_of;

use syscalls::{Sysno, syscall};

use crate::fd::{Fd, raw_fd};
use crate::{Errno, Result};

const SET_MODE_FILTER: usize = 1;
const FLAG_NEW_LISTENER: usize = 1 << 3;
const FLAG_CONTINUE: u32 = 1;

/// `SECCOMP_RET_USER_NOTIF`: a filter's word for "ask the listener".
pub const RET_ASK: u32 = 0x7fc0_0000;

const fn iowr(number: u32, size: usize) -> u32 {
    (3 << 30) | ((size as u32) << 16) | ((b'!' as u32) << 8) | number
}
const NOTIF_RECV: u32 = iowr(0, size_of::<Asked>());
const NOTIF_SEND: u32 = iowr(1, size_of::<Response>());
const NOTIF_ID_VALID: u32 = (1 << 30) | (8 << 16) | ((b'!' as u32) << 8) | 2;
const _: () = assert!(NOTIF_RECV == 0xc050_2100 && NOTIF_SEND == 0xc018_2101 && NOTIF_ID_VALID == 0x4008_2102);

/// A call that waits for an answer (`struct seccomp_notif`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Asked {
    id: u64,
    /// The thread, as this process's pid namespace numbers it; 0 when it does not.
    pub thread: u32,
    flags: u32,
    /// Its number.
    pub number: i32,
    /// AUDIT_ARCH_*.
    pub arch: u32,
    instruction_pointer: u64,
    /// Its arguments.
    pub arguments: [u64; 6],
}

#[repr(C)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

const _: () = assert!(size_of::<Asked>() == 80 && size_of::<Response>() == 24);

/// Receives what the filtered calls ask.
#[derive(Debug)]
pub struct Listener(Fd);

impl Listener {
    /// Takes over a descriptor of a listener that came from another process.
    pub fn from_fd(fd: Fd) -> Self {
        Self(fd)
    }

    /// The descriptor: readable when a call waits, hung up when nobody has the filter any more.
    pub fn fd(&self) -> &Fd {
        &self.0
    }

    /// The next call; waits for one.
    ///
    /// # Errors
    /// `ENOENT` when its thread has gone meanwhile; `EINTR`.
    pub fn receive(&self) -> Result<Asked> {
        let mut asked = Asked::default();
        // SAFETY: the kernel writes one zeroed `seccomp_notif`.
        unsafe { syscall!(Sysno::ioctl, self.0.raw(), NOTIF_RECV, core::ptr::from_mut(&mut asked)) }?;
        Ok(asked)
    }

    /// Whether the thread still waits: what was read of it by its number was its own then.
    pub fn is_waiting(&self, asked: &Asked) -> bool {
        // SAFETY: the kernel reads one u64.
        unsafe { syscall!(Sysno::ioctl, self.0.raw(), NOTIF_ID_VALID, core::ptr::from_ref(&asked.id)) }.is_ok()
    }

    /// Lets the kernel do the call as it stands.
    ///
    /// # Errors
    /// `ENOENT` when its thread has gone meanwhile.
    pub fn let_through(&self, asked: &Asked) -> Result<()> {
        self.send(&Response { id: asked.id, value: 0, error: 0, flags: FLAG_CONTINUE })
    }

    /// Makes the call fail.
    ///
    /// # Errors
    /// `ENOENT` when its thread has gone meanwhile.
    pub fn fail(&self, asked: &Asked, errno: Errno) -> Result<()> {
        self.send(&Response { id: asked.id, value: 0, error: -errno.0, flags: 0 })
    }

    fn send(&self, response: &Response) -> Result<()> {
        // SAFETY: the kernel reads one `seccomp_notif_resp`.
        unsafe { syscall!(Sysno::ioctl, self.0.raw(), NOTIF_SEND, core::ptr::from_ref(response)) }?;
        Ok(())
    }
}

/// What becomes of setuid programs below a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privileges {
    /// They get their rights.
    Gained,
    /// They do not (`no_new_privs`): a filter without CAP_SYS_ADMIN is to be had with that only.
    Dropped,
}

/// Puts `program` on the calling thread, for good, and on all it starts from now on.
///
/// # Errors
/// `EBUSY` when a filter with a listener is there already (one is all the kernel allows); as seccomp(2).
pub fn install(program: &[libc::sock_filter]) -> Result<(Listener, Privileges)> {
    match set_filter(program) {
        Ok(listener) => Ok((listener, Privileges::Gained)),
        Err(Errno(libc::EACCES)) => {
            // SAFETY: takes no pointer.
            unsafe { syscall!(Sysno::prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }?;
            Ok((set_filter(program)?, Privileges::Dropped))
        }
        Err(errno) => Err(errno),
    }
}

fn set_filter(program: &[libc::sock_filter]) -> Result<Listener> {
    let len = u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` instructions, and changes none.
    let fd =
        unsafe { syscall!(Sysno::seccomp, SET_MODE_FILTER, FLAG_NEW_LISTENER, core::ptr::from_ref(&program)) }?;
    Ok(Listener(Fd::from_raw(raw_fd(fd))))
}
