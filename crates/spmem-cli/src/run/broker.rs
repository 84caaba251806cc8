//! Broker: what `spm` does for the agents of its tree (`spmem::protocol`).
//!
//! [`Broker::accept`] and [`Broker::serve`] are called by the supervisor when epoll(7) says that a socket is ready;
//! neither ever waits. It hands out the control page, enables userfaultfds and holds them until nobody uses their memory
//! ([`super::orphans`]): were the program to close its own, missing pages would otherwise turn into zeros.
//!
//! A connection ends with the process image. [`Broker::sweep`] tells an exec from an exit: a process that lives on
//! without the agent in its memory became something that cannot be managed and is counted. A child of vfork(2) or
//! posix_spawn(3) announces itself only if it has an agent: the others are looked for below those that are known.
//! Holes: one that becomes unmanageable and ends within a few milliseconds may be missed in that count, and so may one that
//! was spawned and ends before it is looked for ([`SCAN_PERIOD`]). A program that is executed in another pid namespace than `spm`'s is refused; a
//! child that is forked into one is told its number here.
//!
//! Over 500 lines: one state machine, the life of a connection.

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, Resource};
use spmem::control::Control;
use spmem::protocol::{Heir, Kind, MAGIC, Message};
use spmem_sys::socket::MAX_FDS;
use spmem_sys::uffd::Uffd;

use super::encoder::Encoder;
use super::kernel::{self, Userfaultfd};
use super::loss::{tell_of_filter, tell_of_loss};
use super::orphans::Orphans;
use super::porter::{Porter, Service};
use super::proc;
use super::shared::{self, ControlPage};
use super::swap::Swap;

/// Most processes connected at a time: every slot twice, since a process between two images may have two.
const MAX_CONNECTED: usize = spmem::control::SLOTS * 2;
/// Descriptors that a process takes here: socket, pidfd, userfaultfd, a forked child's, its encoder's two, and what it
/// shares with its porter.
const DESCRIPTORS_EACH: u64 = 7;
/// Descriptors that are not for processes, and for those that have ended a moment ago.
const DESCRIPTORS_OTHER: u64 = 32;
/// Least hard limit of descriptors with which one process can be managed, and others be told that they cannot.
pub const DESCRIPTORS_NEEDED: u64 = DESCRIPTORS_OTHER + DESCRIPTORS_EACH;
/// Connections that are taken beyond the most, to be told so.
const MAX_REFUSED: usize = 8;
/// Most userfaultfds of its own that a process may have held.
const MAX_HELD: usize = 64;
/// Most children's that a process may have held: each thread may have forked one by a raw system call.
const MAX_CHILDREN: usize = 1024;
/// How often slots, and the children of those that are known, are looked through for processes without a connection, ...
const SCAN_PERIOD: Duration = Duration::from_millis(200);
/// ... but never so often that it takes more than one part in so many of the time.
const SCAN_SHARE: u32 = 16;
/// Processes without a budget whose children are looked for.
const MAX_UNMANAGED: usize = 1024;
/// How long the image that an exec started may take until its agent says hello.
const EXEC_GRACE: Duration = Duration::from_secs(2);
/// Epoll tokens from here on are connections.
pub const FIRST_TOKEN: u64 = 1 << 32;

/// The listening socket and everything that came through it.
pub struct Broker {
    listener: OwnedFd,
    address: String,
    userfaultfd: Userfaultfd,
    porter: Option<Porter>,
    swap: Option<Swap>,
    connections: HashMap<u64, Connection>,
    next_token: u64,
    /// The agent's file, by which a process that will still connect is known.
    agent: PathBuf,
    /// Most connections that may say hello.
    max_connected: usize,
    /// No connection is taken until the next sweep.
    is_paused: bool,
    /// Connections of each process: two for a moment when it executes another program.
    connected: HashMap<u32, usize>,
    /// Processes without a connection that may get one, or have ended.
    waiting: Vec<Waiting>,
    /// Those that were counted as unmanaged and may have children.
    unmanaged: Vec<Process>,
    /// What processes have left that others still use.
    orphans: Orphans,
    next_scan: Instant,
    /// Whether the command itself came under management.
    has_greeted: bool,
}

struct Connection {
    socket: OwnedFd,
    /// Who said hello.
    process: Option<Process>,
    /// Second holder of what the program could close.
    held: Vec<Uffd>,
    /// Those of forked children that the process serves, by their numbers there.
    children: HashMap<u32, Uffd>,
    encoder: Option<Encoder>,
    service: Option<Service>,
}

impl Connection {
    fn new(socket: OwnedFd) -> Self {
        Self { socket, process: None, held: Vec::new(), children: HashMap::new(), encoder: None, service: None }
    }
}

struct Process {
    pid: u32,
    pidfd: OwnedFd,
    image: Option<PathBuf>,
}

/// Between the images of an exec, or exiting: time will tell.
struct Waiting {
    process: Process,
    deadline: Instant,
    /// It has been seen with another image: this is an exec.
    has_changed: bool,
}

impl Process {
    fn open(pid: u32) -> Result<Self, Errno> {
        let number = Pid::from_raw(pid.cast_signed()).ok_or(Errno::SRCH)?;
        let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty())?;
        Ok(Self { pid, pidfd, image: proc::read_image(pid) })
    }
}

impl Broker {
    /// Starts to listen on an abstract address, for processes that have the file `agent` preloaded.
    ///
    /// # Errors
    /// No socket, or no randomness for its name.
    pub fn listen(userfaultfd: Userfaultfd, agent: &Path) -> anyhow::Result<Self> {
        let address = format!("spmem-{}-{:016x}", std::process::id(), shared::random()?);
        let listener = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .context("no socket for the agents")?;
        let name =
            SocketAddrUnix::new_abstract_name(address.as_bytes()).context("no name for the agents' socket")?;
        rustix::net::bind(&listener, &name).context("the agents' socket cannot be bound")?;
        rustix::net::listen(&listener, 1024).context("the agents' socket cannot listen")?;
        // Not raised yet, but it will be (run/mod.rs).
        let descriptors = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        let max_connected = descriptors.saturating_sub(DESCRIPTORS_OTHER) / DESCRIPTORS_EACH;
        Ok(Self {
            listener,
            address,
            userfaultfd,
            porter: None,
            swap: None,
            connections: HashMap::new(),
            next_token: FIRST_TOKEN,
            agent: agent.to_owned(),
            max_connected: usize::try_from(max_connected).unwrap_or(usize::MAX).min(MAX_CONNECTED),
            is_paused: false,
            connected: HashMap::new(),
            waiting: Vec::new(),
            unmanaged: Vec::new(),
            orphans: Orphans::default(),
            next_scan: Instant::now(),
            has_greeted: false,
        })
    }

    /// Tells, before `pid` is waited for, of memory that has failed and has ended it.
    pub fn tell_of_loss(&self, pid: u32, control: &Control) {
        let connected = self.connections.values().filter_map(|connection| connection.process.as_ref());
        let mut known = connected.chain(self.waiting.iter().map(|waiting| &waiting.process));
        if let Some(process) = known.find(|process| process.pid == pid) {
            tell_of_loss(control, process.pid, &process.pidfd);
        }
    }

    /// The address, as [`spmem::protocol::SOCKET_ENV`] carries it.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether any agent has said hello.
    pub fn has_greeted(&self) -> bool {
        self.has_greeted
    }

    /// Takes the connections that wait, and watches them with `epoll`. Where there are too many, or no descriptor is left,
    /// the others wait until [`Broker::sweep`].
    pub fn accept(&mut self, epoll: BorrowedFd<'_>) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while self.connections.len() < self.max_connected + MAX_REFUSED {
            match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => {
                    let token = self.next_token;
                    // Dropping the socket tells the agent to go on without us.
                    if epoll::add(epoll, &socket, EventData::new_u64(token), EventFlags::IN).is_ok() {
                        self.next_token += 1;
                        self.connections.insert(token, Connection::new(socket));
                    }
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(_) => break,
            }
        }
        let listener = EventData::new_u64(super::supervise::BROKER);
        self.is_paused = epoll::modify(epoll, &self.listener, listener, EventFlags::empty()).is_ok();
    }

    /// Answers what connection `token` asks, or takes note that it hung up.
    pub fn serve(&mut self, token: u64, control: &ControlPage) {
        loop {
            let Some(connection) = self.connections.get(&token) else { return };
            match receive(connection.socket.as_fd()) {
                Ok(Some((request, descriptors))) => {
                    if self.answer(token, request, descriptors, control).is_err() {
                        return self.hang_up(token, control);
                    }
                }
                Ok(None) => return self.hang_up(token, control),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => return self.hang_up(token, control),
            }
        }
    }

    /// Gives the slots of processes that have ended back, and gives up on those that became unmanageable. Called every
    /// few milliseconds; looks through all slots now and then, since a forked child has one before it connects.
    pub fn sweep(&mut self, control: &Control, epoll: BorrowedFd<'_>) {
        let now = Instant::now();
        self.orphans.sweep();
        if let Some(porter) = &self.porter {
            porter.watch(control);
        }
        if self.is_paused {
            let listener = EventData::new_u64(super::supervise::BROKER);
            self.is_paused = epoll::modify(epoll, &self.listener, listener, EventFlags::IN).is_err();
        }
        if now >= self.next_scan {
            self.find_unconnected(control, now);
            self.find_spawned(now);
            self.next_scan = now + SCAN_PERIOD.max(now.elapsed() * SCAN_SHARE);
        }
        for mut waiting in std::mem::take(&mut self.waiting) {
            let pid = waiting.process.pid;
            if self.is_connected(pid) {
                continue;
            }
            let has_exited = proc::has_exited(&waiting.process.pidfd);
            waiting.look();
            if !has_exited && (now < waiting.deadline || proc::has_mapped(pid, &self.agent)) {
                self.waiting.push(waiting);
                continue;
            }
            bury(control, &waiting.process);
            if !has_exited || waiting.has_changed {
                control.counters.unmanaged_processes.fetch_add(1, Relaxed);
            }
            if !has_exited && self.unmanaged.len() < MAX_UNMANAGED {
                self.unmanaged.push(waiting.process);
            }
        }
    }

    /// Looks for children without an agent that nobody has announced. One in whose memory the agent is will connect, or is a
    /// raw clone that has counted itself.
    fn find_spawned(&mut self, now: Instant) {
        self.unmanaged.retain(|process| !proc::has_exited(&process.pidfd));
        let managed = self.connected.keys().map(|&pid| (pid, true));
        let parents: Vec<_> = managed.chain(self.unmanaged.iter().map(|process| (process.pid, false))).collect();
        for (parent, is_managed) in parents {
            for pid in proc::collect_children(parent) {
                let is_known = self.is_connected(pid)
                    || self.waiting.iter().any(|known| known.process.pid == pid)
                    || self.unmanaged.iter().any(|known| known.pid == pid);
                if is_known || proc::has_mapped(pid, &self.agent) {
                    continue;
                }
                let Ok(process) = Process::open(pid) else { continue };
                // With its parent's image it has not executed its own yet, or has ended.
                if process.image.is_some() && !(is_managed && process.image == proc::read_image(parent)) {
                    self.waiting.push(Waiting { process, deadline: now + EXEC_GRACE, has_changed: true });
                }
            }
        }
    }

    fn find_unconnected(&mut self, control: &Control, now: Instant) {
        let pids = control.live_slots().map(|slot| slot.pid.load(Relaxed));
        let is_known =
            |pid: &u32| self.is_connected(*pid) || self.waiting.iter().any(|known| known.process.pid == *pid);
        let unconnected: Vec<u32> = pids.filter(|pid| *pid != 0 && !is_known(pid)).collect();
        for pid in unconnected {
            match Process::open(pid) {
                Ok(process) => {
                    self.waiting.push(Waiting { process, deadline: now + EXEC_GRACE, has_changed: false })
                }
                Err(Errno::SRCH) => control.release_slot(pid),
                // Short of descriptors: the next scan may have one.
                Err(_) => {}
            }
        }
    }

    fn answer(
        &mut self,
        token: u64,
        request: Message,
        mut taken: Vec<OwnedFd>,
        control: &ControlPage,
    ) -> Result<(), Errno> {
        // All but one kind bring one at most; others are closed.
        let second = if taken.len() == 2 { taken.pop() } else { None };
        let descriptor = taken.pop();
        if request.kind == Kind::Child as u32 {
            self.hold_child(token, request.value, descriptor);
            return Ok(());
        }
        let mut reply = Message { errno: 0, pad: 0, value: 0, ..request };
        let ledger;
        let mut descriptors: Vec<BorrowedFd<'_>> = Vec::new();
        if request.kind == Kind::Hello as u32 {
            match self.greet(token, (request.value == 0).then_some(request.pid)) {
                Ok(number) => {
                    reply.value = number.into();
                    descriptors.push(control.as_fd());
                    descriptors.extend(self.userfaultfd.device.as_ref().map(AsFd::as_fd));
                }
                Err(errno) => {
                    let is_managed = request.value != 0;
                    control.counters.unmanaged_processes.fetch_add(u64::from(!is_managed), Relaxed);
                    reply.errno = errno.raw_os_error();
                }
            }
        } else if request.kind == Kind::Userfault as u32 {
            reply.errno = self.hold(token, descriptor, request.value);
        } else if request.kind == Kind::Encoder as u32 {
            reply.errno = self.hire(token, descriptor, control.seed.load(Relaxed));
        } else if request.kind == Kind::Porter as u32 {
            reply.errno = self.hire_porter(token, request.value, descriptor, second);
        } else if request.kind == Kind::Swap as u32 {
            match self.open_swap(token) {
                Ok((opened, swap)) => {
                    ledger = opened;
                    descriptors.push(ledger.as_fd());
                    descriptors.extend(swap.files());
                }
                Err(errno) => reply.errno = errno.raw_os_error(),
            }
        } else {
            reply.errno = Errno::OPNOTSUPP.raw_os_error();
        }
        let Some(connection) = self.connections.get(&token) else { return Ok(()) };
        if request.kind == Kind::Encoder as u32 {
            descriptors.extend(connection.encoder.as_ref().map(|encoder| encoder.exchange().as_fd()));
        }
        if request.kind == Kind::Porter as u32 {
            descriptors.extend(connection.service.as_ref().map(|service| service.crossing().as_fd()));
        }
        send(connection.socket.as_fd(), &reply, &descriptors)
    }

    /// Lets a process in: it must be of this tree, and be the one it says, unless it asks. Its number.
    fn greet(&mut self, token: u64, says: Option<u32>) -> Result<u32, Errno> {
        let connection = self.connections.get(&token).ok_or(Errno::NOTCONN)?;
        let peer = rustix::net::sockopt::socket_peercred(&connection.socket)?;
        let pid = peer.pid.as_raw_nonzero().get().cast_unsigned();
        if says.is_some_and(|says| says != pid) {
            return Err(Errno::SRCH);
        }
        if peer.uid != rustix::process::geteuid() && !self.is_of_this_tree(pid) {
            return Err(Errno::PERM);
        }
        if connection.process.is_some() {
            return Err(Errno::ISCONN);
        }
        if self.connected.values().sum::<usize>() >= self.max_connected {
            return Err(Errno::MFILE);
        }
        let process = Process::open(pid)?;
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.process = Some(process);
        }
        *self.connected.entry(pid).or_default() += 1;
        // What an earlier image of this process was waited for has come, however soon it leaves again.
        self.waiting.retain(|earlier| earlier.process.pid != pid);
        self.has_greeted = true;
        Ok(pid)
    }

    /// Whether `pid` or an ancestor of it is known: a process of another user must not get in by knowing the address.
    fn is_of_this_tree(&self, pid: u32) -> bool {
        let own = std::process::id();
        let mut ancestors = std::iter::successors(Some(pid), |pid| proc::read_parent(*pid)).take(proc::MAX_DEPTH);
        ancestors.any(|pid| {
            pid == own || self.is_connected(pid) || self.waiting.iter().any(|known| known.process.pid == pid)
        })
    }

    fn is_connected(&self, pid: u32) -> bool {
        self.connected.contains_key(&pid)
    }

    /// Becomes second holder of a userfaultfd, and enables it unless it is enabled already (no `features`). 0, or an
    /// errno.
    fn hold(&mut self, token: u64, descriptor: Option<OwnedFd>, features: u64) -> i32 {
        let Some(connection) = self.connections.get_mut(&token) else { return libc::ENOTCONN };
        if connection.process.is_none() {
            return libc::EPROTO;
        }
        let Some(descriptor) = descriptor else { return libc::EBADF };
        if connection.held.len() == MAX_HELD {
            return libc::EMFILE;
        }
        let userfault = kernel::adopt(descriptor);
        if features != 0
            && let Err(errno) = userfault.enable(features)
        {
            return errno.0;
        }
        connection.held.push(userfault);
        0
    }

    /// Becomes second holder of a forked child's userfaultfd, or lets go of it.
    fn hold_child(&mut self, token: u64, value: u64, descriptor: Option<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let (Some(process), Some((number, heir))) = (&connection.process, Heir::read(value)) else { return };
        let children = &mut connection.children;
        match descriptor.map(kernel::adopt) {
            None => {
                children.remove(&number);
            }
            Some(child) if heir == Heir::Now => {
                children.remove(&number);
                self.orphans.take_condemned(process.pid, child);
            }
            Some(child) if children.len() < MAX_CHILDREN || children.contains_key(&number) => {
                children.insert(number, child);
            }
            Some(_) => {}
        }
    }

    /// Gives the process an encoder. 0, or an errno.
    fn hire(&mut self, token: u64, memory: Option<OwnedFd>, seed: u64) -> i32 {
        let Some(connection) = self.connections.get_mut(&token) else { return libc::ENOTCONN };
        if connection.process.is_none() {
            return libc::EPROTO;
        }
        let Some(memory) = memory else { return libc::EBADF };
        if connection.encoder.is_none() {
            connection.encoder = Encoder::start(memory, seed).ok();
        }
        if connection.encoder.is_some() { 0 } else { libc::EAGAIN }
    }

    /// From now on processes are given a porter, and swap files.
    pub fn employ(&mut self, porter: Option<Porter>, swap: Option<Swap>) {
        (self.porter, self.swap) = (porter, swap);
    }

    /// Gives the process a porter. 0, or an errno.
    fn hire_porter(
        &mut self,
        token: u64,
        staging: u64,
        memory: Option<OwnedFd>,
        userfault: Option<OwnedFd>,
    ) -> i32 {
        let Some(porter) = &self.porter else { return libc::EOPNOTSUPP };
        let Some(connection) = self.connections.get_mut(&token) else { return libc::ENOTCONN };
        let Some(process) = &connection.process else { return libc::EPROTO };
        let (Some(memory), Some(userfault)) = (memory, userfault) else { return libc::EBADF };
        if connection.service.is_some() {
            return libc::EALREADY;
        }
        connection.service = porter.serve(process.pid, staging, &memory, &userfault).ok();
        if connection.service.is_some() { 0 } else { libc::EAGAIN }
    }

    /// What a process needs of the swap files: the ledger, open for it alone. No copy of that descriptor may stay here: it holds what it holds until the
    /// last one is closed.
    fn open_swap(&self, token: u64) -> Result<(OwnedFd, &Swap), Errno> {
        let swap = self.swap.as_ref().ok_or(Errno::OPNOTSUPP)?;
        self.connections.get(&token).and_then(|connection| connection.process.as_ref()).ok_or(Errno::PROTO)?;
        let ledger = swap.open_ledger().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok((ledger, swap))
    }

    /// `spm` is about to end: memory that its processes have left and that others still use is looked after by somebody else.
    pub fn leave(mut self, control: &ControlPage) {
        let tokens: Vec<u64> = self.connections.keys().copied().collect();
        for token in tokens {
            self.serve(token, control);
        }
        self.orphans.leave();
    }

    fn hang_up(&mut self, token: u64, control: &Control) {
        let Some(connection) = self.connections.remove(&token) else { return };
        let Connection { socket, process: Some(process), held, children, .. } = connection else { return };
        // The agent's threads have a table of descriptors of their own: it is closed when the last of them has ended.
        let is_unserved = proc::has_hung_up(&socket);
        self.orphans.take(process.pid, held, is_unserved);
        // None of these can read its events itself: it was let go of before it could.
        self.orphans.take(process.pid, children.into_values(), is_unserved);
        // The last look at what it had: its slot may be gone with the next line.
        control.observe();
        let pid = process.pid;
        match self.connected.get_mut(&pid) {
            Some(count) if *count > 1 => {
                *count -= 1;
                return;
            }
            _ => self.connected.remove(&pid),
        };
        // An exiting process gives its image up before its descriptors, but its threads end one by one.
        if proc::has_exited(&process.pidfd) || proc::read_image(pid).is_none() {
            bury(control, &process);
        } else {
            let mut waiting = Waiting { process, deadline: Instant::now() + EXEC_GRACE, has_changed: false };
            waiting.look();
            self.waiting.push(waiting);
        }
    }
}

impl Waiting {
    fn look(&mut self) {
        let image = proc::read_image(self.process.pid);
        self.has_changed |= image.is_some() && image != self.process.image;
    }
}

impl AsFd for Broker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// The next message and its descriptors; `None` on hang-up or for something that is no message.
fn receive(socket: BorrowedFd<'_>) -> Result<Option<(Message, Vec<OwnedFd>)>, Errno> {
    let mut bytes = [0; size_of::<Message>()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags)?;
    let mut taken = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            taken.extend(descriptors);
        }
    }
    let message = Message::from_bytes(&bytes);
    let is_whole = received.bytes == bytes.len() && message.magic == MAGIC;
    Ok(is_whole.then_some((message, taken)))
}

fn send(socket: BorrowedFd<'_>, message: &Message, descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let bytes = message.to_bytes();
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, flags).map(drop)
}

/// Gives up the slot of a process that is gone.
fn bury(control: &Control, process: &Process) {
    tell_of_loss(control, process.pid, &process.pidfd);
    tell_of_filter(process.pid);
    control.release_slot(process.pid);
}
