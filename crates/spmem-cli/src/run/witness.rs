//! Witness: which signals went to the whole process group?
//!
//! `spm` and the command share a process group. A signal sent to the group reaches the command by itself, one sent to
//! `spm` alone must be passed on, and siginfo does not tell them apart. So a child of ours in the same group, which
//! blocks everything, reports what *it* received: [`Witness::next`]. [`Judge`] compares. It is named so that killall(1)
//! and pkill(1) do not take it for an `spm`, and dies with it.
//!
//! While `spm` is stopped together with the command, the witness also wakes it when somebody continues the command
//! alone ([`Witness::watch`]).
//! Hole: a sender that picks each process of the group by itself and misses the witness makes the command see it twice.
#![allow(unsafe_code, reason = "fork, and the signal calls that rustix leaves to libc")]

use std::ffi::c_char;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::pipe::PipeFlags;
use rustix::process::Signal;

use super::proc;
use super::signals::{self, Received, SI_KERNEL};

/// How long a signal waits for the witness before it counts as sent to `spm` alone.
const PATIENCE: Duration = Duration::from_millis(10);
/// How long a report of the witness waits for `spm` to receive the same.
const MEMORY: Duration = Duration::from_millis(200);
/// How often the witness looks at a stopped command, and how many looks without a stop end the watch.
const WATCH_MS: i64 = 50;
const QUIET_LOOKS: u32 = 4;
/// What ps(1) shows.
const TITLE: &std::ffi::CStr = c"group-witness";

/// The witness, as `spm` sees it.
pub struct Witness {
    pid: u32,
    reports: OwnedFd,
}

impl Witness {
    /// Forks it; the caller must have one thread and have all signals blocked.
    ///
    /// # Errors
    /// No process or no pipe.
    pub fn start() -> io::Result<Self> {
        let (reports, to_spm) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let spm = std::process::id();
        // SAFETY: this process has one thread, so the child may do whatever it could do.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => testify(&to_spm, spm),
            pid => Ok(Self { pid: pid.cast_unsigned(), reports }),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The next signal that it received, if any.
    pub fn next(&self) -> Option<Received> {
        let mut bytes = [0; RECORD];
        let read = rustix::io::read(&self.reports, &mut bytes).ok()?;
        let (words, _) = bytes.as_chunks::<4>();
        (read == RECORD).then(|| Received {
            signal: i32::from_ne_bytes(words[0]),
            code: i32::from_ne_bytes(words[1]),
            sender: u32::from_ne_bytes(words[2]),
            value: 0,
        })
    }

    /// Asks it to continue `spm`, which is about to stop, as soon as `command` is not stopped any more.
    pub fn watch(&self, command: u32) {
        signals::send_value(self.pid, libc::SIGRTMAX(), u64::from(command));
    }

    /// Ends it.
    pub fn end(self) {
        signals::send(self.pid, libc::SIGKILL);
        // SAFETY: our child; a null pointer asks for no status.
        unsafe { libc::waitpid(self.pid.cast_signed(), std::ptr::null_mut(), 0) };
    }
}

impl AsFd for Witness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reports.as_fd()
    }
}

/// Tells signals for the command from those that it got by itself.
pub struct Judge {
    command: u32,
    witness: Option<u32>,
    is_session_leader: bool,
    undecided: Vec<(Received, Instant)>,
    seen_by_group: Vec<(Received, Instant)>,
}

impl Judge {
    /// A judge for the process `command`; without a witness every signal of a process is taken as sent to `spm` alone.
    pub fn new(command: u32, witness: Option<u32>) -> Self {
        // Not by `rustix`, which takes 0 for impossible: the session of a process whose leader is outside its pid namespace.
        // SAFETY: a plain system call.
        let is_session_leader = unsafe { libc::getsid(0) }.cast_unsigned() == std::process::id();
        Self { command, witness, is_session_leader, undecided: Vec::new(), seen_by_group: Vec::new() }
    }

    /// The witness is gone.
    pub fn forget_witness(&mut self) {
        self.witness = None;
    }

    /// Takes a signal that came at `now`; gives it back if it must be passed on at once.
    pub fn receive(&mut self, received: Received, now: Instant) -> Option<Received> {
        if received.code == SI_KERNEL {
            return self.is_for_us_alone(received.signal).then_some(received);
        }
        // What the command itself sends to its parent would have gone to somebody else without us.
        let senders = [Some(std::process::id()), Some(self.command), self.witness];
        if received.signal == libc::SIGCHLD || senders.contains(&Some(received.sender)) {
            return None;
        }
        if self.witness.is_none() {
            return Some(received);
        }
        match self.seen_by_group.iter().position(|(seen, _)| is_same(*seen, received)) {
            Some(index) => {
                self.seen_by_group.swap_remove(index);
            }
            None => self.undecided.push((received, now + PATIENCE)),
        }
        None
    }

    /// Takes a report of the witness.
    pub fn witnessed(&mut self, seen: Received, now: Instant) {
        match self.undecided.iter().position(|(received, _)| is_same(*received, seen)) {
            Some(index) => {
                self.undecided.swap_remove(index);
            }
            None => self.seen_by_group.push((seen, now + MEMORY)),
        }
    }

    /// The signals to pass on by `now`, in the order they came.
    pub fn due(&mut self, now: Instant) -> Vec<Received> {
        self.seen_by_group.retain(|(_, until)| *until > now);
        let due =
            self.undecided.iter().filter(|(_, until)| *until <= now).map(|(received, _)| *received).collect();
        self.undecided.retain(|(_, until)| *until > now);
        due
    }

    /// When [`Judge::due`] has to be asked next.
    pub fn next_due(&self) -> Option<Instant> {
        self.undecided.iter().map(|(_, until)| *until).min()
    }

    /// The kernel sends timers, and a terminal's hang-up to its session leader, to one process; the rest to a group.
    fn is_for_us_alone(&self, signal: i32) -> bool {
        match signal {
            libc::SIGALRM | libc::SIGVTALRM | libc::SIGPROF => true,
            libc::SIGHUP | libc::SIGCONT => self.is_session_leader,
            _ => false,
        }
    }
}

fn is_same(one: Received, other: Received) -> bool {
    (one.signal, one.code, one.sender) == (other.signal, other.code, other.sender)
}

const RECORD: usize = 12;

/// The life of the witness.
fn testify(to_spm: &OwnedFd, spm: u32) -> ! {
    // It must outlive nothing: neither spm nor what hangs on the descriptors and directory of spm.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    if std::os::unix::process::parent_id() != spm {
        leave();
    }
    rename();
    let _ = rustix::process::chdir("/");
    let _ = rustix::stdio::dup2_stdin(to_spm);
    // SAFETY: descriptor 0 is all that is used from here on.
    unsafe { libc::close_range(1, libc::c_uint::MAX, 0) };
    let mut watch: Option<Watch> = None;
    loop {
        match wait_for_signal(watch.is_some()) {
            Some(received) if received.signal == libc::SIGRTMAX() && received.sender == spm => {
                watch = u32::try_from(received.value).ok().map(|command| Watch { command, quiet_looks: 0 });
            }
            Some(received) => report(received),
            None => {
                if watch.as_mut().is_some_and(|watch| !watch.look(spm)) {
                    watch = None;
                }
            }
        }
    }
}

struct Watch {
    command: u32,
    quiet_looks: u32,
}

impl Watch {
    /// Looks once; whether to go on watching.
    fn look(&mut self, spm: u32) -> bool {
        if proc::read_state(self.command) == Some('T') {
            self.quiet_looks = 0;
        } else if proc::read_state(spm) == Some('T') {
            signals::send(spm, libc::SIGCONT);
            self.quiet_looks = 0;
        } else {
            self.quiet_looks += 1;
        }
        self.quiet_looks < QUIET_LOOKS
    }
}

/// The next signal, or `None` after a while when there is something to watch.
fn wait_for_signal(is_watching: bool) -> Option<Received> {
    let set = signals::all_but_faults();
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let timeout = libc::timespec { tv_sec: 0, tv_nsec: WATCH_MS * 1_000_000 };
    let timeout = if is_watching { &raw const timeout } else { std::ptr::null() };
    // SAFETY: reads the set and the time, writes the information.
    let signal = unsafe { libc::sigtimedwait(&raw const set, info.as_mut_ptr(), timeout) };
    if signal < 0 {
        return None;
    }
    // SAFETY: zeroed at first, and every bit pattern is one of this structure.
    let info = unsafe { info.assume_init() };
    // SAFETY: these fields are integers at fixed places whatever the kind of signal (`siginfo_t` in sigaction(2)).
    let sender = unsafe { info.si_pid() };
    // SAFETY: as above.
    let value = unsafe { info.si_value() }.sival_ptr.addr() as u64;
    Some(Received { signal, code: info.si_code, sender: sender.cast_unsigned(), value })
}

fn report(received: Received) {
    let words = [received.signal.to_ne_bytes(), received.code.to_ne_bytes(), received.sender.to_ne_bytes()];
    // A full pipe means that spm has not looked for thousands of signals; it will take them as its own.
    let _ = rustix::io::write(rustix::stdio::stdin(), words.as_flattened());
}

fn leave() -> ! {
    // SAFETY: ends the process without running what belongs to spm.
    unsafe { libc::_exit(0) }
}

static ARGUMENTS: AtomicPtr<c_char> = AtomicPtr::new(std::ptr::null_mut());
static ARGUMENTS_LEN: AtomicUsize = AtomicUsize::new(0);

/// Keeps where the arguments of this process lie, so that the witness can write its own name over them: `pkill -f`
/// would otherwise take it for `spm`, too. `argv` is the C main's.
#[cfg_attr(test, allow(dead_code, reason = "called by the C main, which tests do not have"))]
pub fn remember_arguments(argc: i32, argv: *mut *mut c_char) {
    let Some(last) = usize::try_from(argc).ok().and_then(|count| count.checked_sub(1)) else { return };
    // SAFETY: argv holds argc pointers to strings that live as long as the process.
    let first = unsafe { *argv };
    // SAFETY: as above; `last` is the index of one of them.
    let last = unsafe { argv.add(last) };
    // SAFETY: as above.
    let last = unsafe { *last };
    // SAFETY: as above.
    let last_len = unsafe { std::ffi::CStr::from_ptr(last) }.count_bytes();
    // The kernel lays them out one after the other (execve(2)); where they are not, nothing is overwritten.
    let len = (last.addr() + last_len).saturating_sub(first.addr());
    ARGUMENTS.store(first, Relaxed);
    ARGUMENTS_LEN.store(len, Relaxed);
}

fn rename() {
    let _ = rustix::thread::set_name(TITLE);
    let (first, len) = (ARGUMENTS.load(Relaxed), ARGUMENTS_LEN.load(Relaxed));
    if first.is_null() {
        return;
    }
    let title = TITLE.to_bytes();
    // SAFETY: the process's own copy of its argument strings, writable and read by nobody here any more.
    unsafe { first.write_bytes(0, len) };
    // SAFETY: as above, and not longer than they are.
    unsafe { first.cast::<u8>().copy_from_nonoverlapping(title.as_ptr(), title.len().min(len)) };
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMAND: u32 = 1_000_001;
    const WITNESS: u32 = 1_000_002;
    const SHELL: u32 = 1_000_003;

    fn judge(witness: Option<u32>) -> Judge {
        Judge {
            command: COMMAND,
            witness,
            is_session_leader: false,
            undecided: Vec::new(),
            seen_by_group: Vec::new(),
        }
    }

    fn signal(signal: i32, sender: u32) -> Received {
        Received { signal, code: libc::SI_USER, sender, value: 0 }
    }

    #[test]
    fn a_signal_to_spm_alone_is_passed_on_when_the_witness_stays_silent() {
        let (mut judge, now) = (judge(Some(WITNESS)), Instant::now());
        let term = signal(libc::SIGTERM, SHELL);
        assert_eq!(judge.receive(term, now), None);
        assert_eq!(judge.due(now), []);
        assert_eq!(judge.due(now + PATIENCE), [term]);
        assert_eq!(judge.due(now + PATIENCE), []);
    }

    #[test]
    fn a_signal_to_the_group_is_not_passed_on_whoever_reports_first() {
        let (mut judge, now) = (judge(Some(WITNESS)), Instant::now());
        let term = signal(libc::SIGTERM, SHELL);
        judge.receive(term, now);
        judge.witnessed(term, now);
        judge.witnessed(term, now);
        judge.receive(term, now);
        assert_eq!(judge.due(now + PATIENCE), []);
    }

    #[test]
    fn a_stale_report_hides_no_later_signal() {
        let (mut judge, now) = (judge(Some(WITNESS)), Instant::now());
        let term = signal(libc::SIGTERM, SHELL);
        judge.witnessed(term, now);
        judge.due(now + MEMORY);
        judge.receive(term, now + MEMORY);
        assert_eq!(judge.due(now + MEMORY + PATIENCE), [term]);
    }

    #[test]
    fn the_terminal_and_the_command_itself_are_never_echoed() {
        let (mut judge, now) = (judge(Some(WITNESS)), Instant::now());
        assert_eq!(judge.receive(Received { code: SI_KERNEL, ..signal(libc::SIGINT, 0) }, now), None);
        for sender in [COMMAND, WITNESS, std::process::id()] {
            assert_eq!(judge.receive(signal(libc::SIGUSR1, sender), now), None);
        }
        assert_eq!(judge.due(now + PATIENCE), []);
        let alarm = Received { code: SI_KERNEL, ..signal(libc::SIGALRM, 0) };
        assert_eq!(judge.receive(alarm, now), Some(alarm));
    }

    #[test]
    fn without_a_witness_signals_are_passed_on_at_once() {
        let term = signal(libc::SIGTERM, SHELL);
        assert_eq!(judge(None).receive(term, Instant::now()), Some(term));
    }
}
