//! Keeper: the process that is left of `spm` when it has become the command.
//!
//! It is nobody's child, holds no file or terminal of the command, answers for an easy guard as long as one process has the filter,
//! and removes the cgroup once it is empty. If it is killed, an easy guard's calls fail (ENOSYS) and the next wall
//! removes the cgroup.
#![allow(unsafe_code, reason = "descriptors that outlive a call, and the end of a forked process")]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, send, sendmsg, socketpair,
};
use rustix::process::{PidfdFlags, pidfd_open};
use spmem_core::enclosure::Enclosure;
use spmem_sys::fd::Fd;
use spmem_sys::seccomp::Listener;

use super::cgroup::Site;
use super::filter::{self, Easy};
use crate::apart;

const FIRST_LOOK: Duration = Duration::from_millis(20);
const LAST_LOOK: Duration = Duration::from_secs(1);

/// The keeper, as the process that becomes the command sees it.
pub struct Keeper {
    channel: OwnedFd,
}

impl Keeper {
    /// Starts it; the caller must have one thread.
    ///
    /// # Errors
    /// No process, no descriptors.
    pub fn start(site: Option<&Site>, wall: &Enclosure) -> anyhow::Result<Self> {
        let (ours, its) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .context("no socket for the keeper")?;
        let command =
            pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).context("no descriptor of a process")?;
        let id = std::process::id();
        apart::start("the keeper", || {
            apart::settle(c"spm-keeper", &[command.as_raw_fd(), its.as_raw_fd()]);
            if !wall.easy.is_empty() {
                let errno =
                    filter::may_look_into(id).err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
                let _ = send(&its, &errno.to_ne_bytes(), SendFlags::NOSIGNAL);
            }
            keep(&command, &its, site, Easy { cpuset: wall.cpuset, easy: wall.easy });
        })?;
        Ok(Self { channel: ours })
    }

    /// Whether it may look into the command for what that asks; the wall's guard is easy.
    ///
    /// # Errors
    /// It may not, and what would help; or it is gone.
    pub fn check_sight(&self) -> anyhow::Result<()> {
        let mut errno = [0; 4];
        let read = rustix::io::read(&self.channel, &mut errno).context("the keeper of the easy guard")?;
        anyhow::ensure!(read == errno.len(), "the keeper of the easy guard is gone");
        match i32::from_ne_bytes(errno) {
            0 => Ok(()),
            errno => anyhow::bail!(
                "spm may not look into this user's programs ({}); run spm as root, or set kernel.yama.ptrace_scope to 0",
                spmem_sys::Errno(errno)
            ),
        }
    }

    /// Gives it the calls to answer; it has them when this returns.
    ///
    /// # Errors
    /// It is gone.
    pub fn hand_over(&self, listener: Listener) -> anyhow::Result<()> {
        // SAFETY: the descriptor is open as long as `listener` is, which outlives the call.
        let fd = unsafe { BorrowedFd::borrow_raw(listener.fd().raw()) };
        let (fds, mut space) = ([fd], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(&self.channel, &[IoSlice::new(b"L")], &mut control, SendFlags::NOSIGNAL)?;
        let mut answer = [0; 1];
        let read = rustix::io::read(&self.channel, &mut answer)?;
        anyhow::ensure!(read == 1, "it has hung up");
        Ok(())
    }
}

/// The keeper's life.
fn keep(command: &OwnedFd, channel: &OwnedFd, site: Option<&Site>, around: Easy) -> ! {
    // Without a message, the command has been started, or never will be: there is nothing to answer.
    if let Some(listener) = take_listener(channel) {
        answer_all(&listener, &around);
    } else {
        let _ = poll(&mut [PollFd::new(command, PollFlags::IN)], None);
    }
    let mut pause = FIRST_LOOK;
    while site.is_some_and(|site| !site.remove()) {
        std::thread::sleep(pause);
        pause = (pause * 2).min(LAST_LOOK);
    }
    // SAFETY: ends the process without running what belongs to the one it was forked from.
    unsafe { libc::_exit(0) }
}

fn take_listener(channel: &OwnedFd) -> Option<Listener> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut word = [0; 1];
    recvmsg(channel, &mut [IoSliceMut::new(&mut word)], &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    })?;
    send(channel, b"K", SendFlags::NOSIGNAL).ok()?;
    Some(Listener::from_fd(Fd::from_raw(fd.into_raw_fd())))
}

/// Answers until nobody has the filter any more.
fn answer_all(listener: &Listener, around: &Easy) {
    // SAFETY: a descriptor of its own for polling; the listener keeps the other.
    let Ok(polled) = listener.fd().duplicate(3).map(|fd| unsafe { OwnedFd::from_raw_fd(fd.into_raw()) }) else {
        return;
    };
    loop {
        let mut fds = [PollFd::from_borrowed_fd(polled.as_fd(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
        let events = fds[0].revents();
        if events.contains(PollFlags::IN) {
            if let Ok(asked) = listener.receive() {
                filter::answer(listener, &asked, around);
            }
        } else if events.intersects(PollFlags::HUP | PollFlags::ERR) {
            return;
        }
    }
}
