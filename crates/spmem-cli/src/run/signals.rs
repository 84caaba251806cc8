//! Signals: received by the supervisor as records, sent on to the command, and kept from the command's own set-up.
//!
//! [`Inherited::take_over`] blocks them all and opens a signalfd(2); [`Inherited::hand_on`] gives a child what `spm`
//! was started with. Fault signals (SIGSEGV...) keep their action: one of those is a fault of `spm`'s own.
#![allow(unsafe_code, reason = "signal calls that rustix leaves to libc")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Signals that a failing instruction raises.
const FAULTS: [i32; 6] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];

/// `si_code` of signals that the kernel itself sends, the terminal's among them.
pub const SI_KERNEL: i32 = 0x80;

/// A signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its number.
    pub signal: i32,
    /// `si_code`: who sent it and how.
    pub code: i32,
    /// Sender's process id, 0 for the kernel and for other pid namespaces.
    pub sender: u32,
    /// Value that sigqueue(3) sent along.
    pub value: u64,
}

/// What `spm` was started with and what it took over.
pub struct Inherited {
    mask: libc::sigset_t,
    /// Dispositions that std or we change, as they were.
    dispositions: [(i32, libc::sighandler_t); 2],
    signalfd: OwnedFd,
}

impl Inherited {
    /// Blocks all signals but [`FAULTS`] and turns them into records. Only one thread may run.
    ///
    /// # Errors
    /// No descriptor for the signalfd.
    pub fn take_over() -> io::Result<Self> {
        let blocked = all_but_faults();
        let mut mask = MaybeUninit::uninit();
        // SAFETY: both point to sets of ours; the second is written.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const blocked, mask.as_mut_ptr()) };
        // SAFETY: sigprocmask cannot fail with SIG_SETMASK and valid pointers, so it is written.
        let mask = unsafe { mask.assume_init() };
        // An ignored SIGCHLD, inherited from who started us, would reap the command behind our back.
        let dispositions =
            [libc::SIGPIPE, libc::SIGCHLD].map(|signal| (signal, set_disposition(signal, libc::SIG_DFL)));
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: reads the set.
        let raw = unsafe { libc::signalfd(-1, &raw const blocked, flags) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: made just now for us alone.
        let signalfd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { mask, dispositions, signalfd })
    }

    /// A function for a forked child, before it calls exec, that restores what `spm` was started with.
    /// It makes system calls only, so it may run between fork and exec.
    pub fn hand_on(&self) -> impl FnMut() -> io::Result<()> + Send + Sync + use<> {
        let (mask, dispositions) = (self.mask, self.dispositions);
        move || {
            for (signal, disposition) in dispositions {
                set_disposition(signal, disposition);
            }
            // SAFETY: reads the set.
            unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut()) };
            Ok(())
        }
    }

    /// The next signal that came, if any.
    pub fn next(&self) -> Option<Received> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the kernel writes one record of that size, or nothing.
        let read = unsafe { libc::read(self.signalfd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(read) != Ok(size) {
            return None;
        }
        // SAFETY: written in full.
        let info = unsafe { info.assume_init() };
        Some(Received {
            signal: info.ssi_signo.cast_signed(),
            code: info.ssi_code,
            sender: info.ssi_pid,
            value: info.ssi_ptr,
        })
    }
}

impl AsFd for Inherited {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signalfd.as_fd()
    }
}

/// Every signal but [`FAULTS`].
pub fn all_but_faults() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: writes the set.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    // SAFETY: written just now.
    let mut set = unsafe { set.assume_init() };
    for signal in FAULTS {
        // SAFETY: a set of ours and a valid number.
        unsafe { libc::sigdelset(&raw mut set, signal) };
    }
    set
}

/// Sends `signal` to `pid`, which may be gone.
pub fn send(pid: u32, signal: i32) {
    // SAFETY: no memory is involved.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}

/// Sends `signal` with a value.
pub fn send_value(pid: u32, signal: i32, value: u64) {
    let value = libc::sigval { sival_ptr: std::ptr::without_provenance_mut(usize::try_from(value).unwrap_or(0)) };
    // SAFETY: the value is handed over as bits; nobody follows it here.
    unsafe { libc::sigqueue(pid.cast_signed(), signal, value) };
}

/// Sends on what came, as it came.
pub fn forward(pid: u32, received: Received) {
    if received.code == libc::SI_QUEUE {
        send_value(pid, received.signal, received.value);
    } else {
        send(pid, received.signal);
    }
}

/// Stops this process with `signal` (SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU) until SIGCONT, as its default action does:
/// not at all in an orphaned process group, where nobody would continue it.
pub fn stop_self(signal: i32) {
    let old = if signal == libc::SIGSTOP { None } else { Some(set_disposition(signal, libc::SIG_DFL)) };
    let mut set = MaybeUninit::uninit();
    // SAFETY: writes the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: written just now.
    let mut set = unsafe { set.assume_init() };
    // SAFETY: a set of ours and a valid number.
    unsafe { libc::sigaddset(&raw mut set, signal) };
    // Sent while blocked, so that it merges with the one that the terminal may have sent: one stop, not two.
    send(std::process::id(), signal);
    // SAFETY: reads the set.
    unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) };
    // SAFETY: as above; we have been continued by now.
    unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if let Some(old) = old {
        set_disposition(signal, old);
    }
}

/// Sets the disposition of `signal` and gives the one before. Only SIG_DFL and SIG_IGN come from exec, and only those
/// are ever set here.
fn set_disposition(signal: i32, disposition: libc::sighandler_t) -> libc::sighandler_t {
    // SAFETY: SIG_DFL or SIG_IGN, no handler.
    unsafe { libc::signal(signal, disposition) }
}
