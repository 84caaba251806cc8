//! Supervise: what `spm` does while the command runs.
//!
//! One thread, one epoll(7) loop: [`Supervisor::run`] passes signals on, stops and continues with the command, serves
//! the agents, and keeps the peaks of the control page up to date every [`TICK`]. It ends when the command has ended;
//! descendants that outlive it are left alone.
//! Hole: while `spm` is stopped together with the command, new processes of the tree wait for it in their start-up.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitIdStatus, WaitOptions};
use spmem::control::Control;

use super::broker::{self, Broker};
use super::loss::filtered;
use super::shared::ControlPage;
use super::signals::{self, Inherited};
use super::witness::{Judge, Witness};
use crate::remark::remark;

/// How often peaks are looked at.
const TICK: Duration = Duration::from_millis(20);
/// Events taken from the kernel at once.
const BATCH: usize = 64;

const SIGNALS: u64 = 0;
const WITNESS: u64 = 1;
/// The epoll token of the agents' listening socket.
pub const BROKER: u64 = 2;

/// The loop's state.
pub struct Supervisor<'a> {
    pub command: Pid,
    pub inherited: &'a Inherited,
    pub control: &'a ControlPage,
    /// None when the command runs unmanaged.
    pub broker: Option<&'a mut Broker>,
    /// Called every [`TICK`].
    pub on_tick: &'a mut dyn FnMut(&Control),
}

impl Supervisor<'_> {
    /// Runs until the command has ended, and gives its exit status as a shell counts it: 128+N for signal N.
    ///
    /// # Errors
    /// The kernel gives no epoll descriptor, or loses track of the command.
    pub fn run(mut self) -> anyhow::Result<i32> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).context("no epoll descriptor")?;
        watch(&epoll, self.inherited, SIGNALS)?;
        // Without a witness the command may see a signal twice; that is no reason to give up.
        let mut witness = Witness::start().ok();
        if let Some(witness) = &witness {
            watch(&epoll, witness, WITNESS)?;
        }
        if let Some(broker) = &self.broker {
            watch(&epoll, &**broker, BROKER)?;
        }
        let mut judge = Judge::new(self.command_pid(), witness.as_ref().map(Witness::pid));
        let result = self.run_loop(&epoll, &mut witness, &mut judge);
        if let Some(witness) = witness {
            witness.end();
        }
        result
    }

    fn run_loop(
        &mut self,
        epoll: &OwnedFd,
        witness: &mut Option<Witness>,
        judge: &mut Judge,
    ) -> anyhow::Result<i32> {
        let mut events = Vec::with_capacity(BATCH);
        let mut next_tick = Instant::now();
        // A command that ended or stopped before the loop has left its SIGCHLD in the signalfd.
        loop {
            let now = Instant::now();
            if now >= next_tick {
                self.tick(epoll);
                next_tick = now + TICK;
            }
            for signal in judge.due(now) {
                signals::forward(self.command_pid(), signal);
            }
            let until = judge.next_due().map_or(next_tick, |due| due.min(next_tick));
            match epoll::wait(epoll, spare_capacity(&mut events), Some(&timespec(until))) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).context("waiting for events failed"),
            }
            for event in events.drain(..) {
                match event.data.u64() {
                    // Whatever became ready, signals are looked at below, after the witness.
                    SIGNALS => {}
                    WITNESS => {}
                    BROKER => {
                        if let Some(broker) = &mut self.broker {
                            broker.accept(epoll.as_fd());
                        }
                    }
                    token => {
                        debug_assert!(token >= broker::FIRST_TOKEN);
                        if let Some(broker) = &mut self.broker {
                            broker.serve(token, self.control);
                        }
                    }
                }
            }
            if let Some(exit_code) = self.take_signals(witness, judge)? {
                self.tick(epoll);
                return Ok(exit_code);
            }
        }
    }

    fn tick(&mut self, epoll: &OwnedFd) {
        self.control.observe();
        if let Some(broker) = &mut self.broker {
            broker.sweep(self.control, epoll.as_fd());
        }
        (self.on_tick)(self.control);
    }

    /// Takes the signals that came; the exit status once the command has ended.
    fn take_signals(&mut self, witness: &mut Option<Witness>, judge: &mut Judge) -> anyhow::Result<Option<i32>> {
        let now = Instant::now();
        while let Some(seen) = witness.as_ref().and_then(Witness::next) {
            judge.witnessed(seen, now);
        }
        let mut has_child_changed = false;
        while let Some(received) = self.inherited.next() {
            has_child_changed |= received.signal == libc::SIGCHLD;
            if let Some(signal) = judge.receive(received, now) {
                signals::forward(self.command_pid(), signal);
            }
        }
        if !has_child_changed {
            return Ok(None);
        }
        if witness.as_ref().is_some_and(|witness| has_ended(witness.pid())) {
            *witness = None;
            judge.forget_witness();
        }
        let options =
            WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::CONTINUED | WaitIdOptions::NOHANG;
        // It tells what has ended it only until it is waited for.
        let peek = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        if let Some(status) = wait(self.command, peek)?
            && let Some(broker) = &self.broker
        {
            broker.tell_of_loss(self.command_pid(), self.control);
            if status.terminating_signal() == Some(libc::SIGSYS) {
                remark(format_args!("{}", filtered(self.command_pid())));
            }
        }
        while let Some(status) = wait(self.command, options)? {
            if let Some(exit_code) = exit_code(&status) {
                return Ok(Some(exit_code));
            }
            if let Some(signal) = status.stopping_signal() {
                if let Some(witness) = witness {
                    witness.watch(self.command_pid());
                }
                signals::stop_self(signal);
            }
        }
        Ok(None)
    }

    fn command_pid(&self) -> u32 {
        self.command.as_raw_nonzero().get().cast_unsigned()
    }
}

fn watch(epoll: &OwnedFd, source: &impl AsFd, token: u64) -> anyhow::Result<()> {
    epoll::add(epoll, source, EventData::new_u64(token), EventFlags::IN).context("epoll takes no more descriptors")
}

fn wait(command: Pid, options: WaitIdOptions) -> anyhow::Result<Option<WaitIdStatus>> {
    loop {
        match rustix::process::waitid(WaitId::Pid(command), options) {
            Err(Errno::INTR) => {}
            other => return other.context("the command was lost"),
        }
    }
}

/// Whether the child `pid` has ended; it is reaped then.
fn has_ended(pid: u32) -> bool {
    let pid = Pid::from_raw(pid.cast_signed());
    matches!(rustix::process::waitpid(pid, WaitOptions::NOHANG), Ok(Some(_)) | Err(Errno::CHILD))
}

fn exit_code(status: &WaitIdStatus) -> Option<i32> {
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal))
}

fn timespec(until: Instant) -> Timespec {
    let left = until.saturating_duration_since(Instant::now());
    Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) }
}
