//! Unix seqpacket sockets on abstract addresses, with descriptors as ancillary data (unix(7), cmsg(3)).

use crate::fd::{Fd, raw_fd};
use crate::{Errno, Result};
use syscalls::{Sysno, syscall};

/// Most descriptors in one message.
pub const MAX_FDS: usize = 8;
/// Longest abstract name, bytes.
pub const MAX_NAME: usize = 100;

/// A connected socket.
pub struct Socket(Fd);

/// A listening socket.
pub struct Listener(Fd);

/// A message that came: how long it is, and what descriptors it brought.
#[derive(Debug, Default)]
pub struct Received {
    /// Bytes written to the buffer; 0 when the other side hung up.
    pub len: usize,
    /// Descriptors, in the order they were sent.
    pub fds: [Option<Fd>; MAX_FDS],
}

#[repr(C)]
struct Address {
    family: u16,
    path: [u8; 108],
}

impl Address {
    /// The abstract address `name` and its length; an empty name asks the kernel for one (autobind).
    fn new(name: &[u8]) -> Result<(Self, usize)> {
        if name.len() > MAX_NAME {
            return Err(Errno::EINVAL);
        }
        let mut address = Self { family: 1, path: [0; 108] };
        address.path[1..=name.len()].copy_from_slice(name);
        Ok((address, if name.is_empty() { 2 } else { 3 + name.len() }))
    }
}

fn new_socket() -> Result<Fd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: takes no pointer.
    Ok(Fd::from_raw(raw_fd(unsafe { syscall!(Sysno::socket, libc::AF_UNIX, kind, 0) }?)))
}

impl Listener {
    /// Listens on an abstract name that the kernel picks; the name is written to `name`, its length returned.
    ///
    /// # Errors
    /// As socket(2), bind(2), listen(2).
    pub fn bind_anywhere(name: &mut [u8; MAX_NAME]) -> Result<(Self, usize)> {
        let fd = new_socket()?;
        let (mut address, len) = Address::new(b"")?;
        // SAFETY: reads `len` bytes of the address.
        unsafe { syscall!(Sysno::bind, fd.raw(), core::ptr::from_ref(&address), len) }?;
        // SAFETY: takes no pointer.
        unsafe { syscall!(Sysno::listen, fd.raw(), 64) }?;
        let mut len = 110_u32;
        let (to, len_at) = (core::ptr::from_mut(&mut address), core::ptr::from_mut(&mut len));
        // SAFETY: writes at most the 110 bytes of the address, and its length.
        unsafe { syscall!(Sysno::getsockname, fd.raw(), to, len_at) }?;
        let len = (len as usize).saturating_sub(3).min(MAX_NAME);
        name[..len].copy_from_slice(&address.path[1..=len]);
        Ok((Self(fd), len))
    }

    /// The descriptor, for poll(2).
    pub fn raw(&self) -> i32 {
        self.0.raw()
    }

    /// Takes ownership of a listening socket.
    pub fn from_fd(fd: Fd) -> Self {
        Self(fd)
    }

    /// Gives up ownership.
    pub fn into_fd(self) -> Fd {
        self.0
    }

    /// accept4(2).
    ///
    /// # Errors
    /// As accept(2).
    pub fn accept(&self) -> Result<Socket> {
        // SAFETY: null address pointers ask for none.
        let raw = unsafe { syscall!(Sysno::accept4, self.0.raw(), 0, 0, libc::SOCK_CLOEXEC) }?;
        Ok(Socket(Fd::from_raw(raw_fd(raw))))
    }
}

impl Socket {
    /// Connects to the abstract address `name`.
    ///
    /// # Errors
    /// As connect(2); `ECONNREFUSED` when nobody listens.
    pub fn connect(name: &[u8]) -> Result<Self> {
        let fd = new_socket()?;
        let (address, len) = Address::new(name)?;
        loop {
            // SAFETY: reads `len` bytes of the address.
            match unsafe { syscall!(Sysno::connect, fd.raw(), core::ptr::from_ref(&address), len) } {
                Err(syscalls::Errno::EINTR) => {}
                other => {
                    other?;
                    return Ok(Self(fd));
                }
            }
        }
    }

    /// The descriptor.
    pub fn raw(&self) -> i32 {
        self.0.raw()
    }

    /// Takes ownership of a connected socket.
    pub fn from_fd(fd: Fd) -> Self {
        Self(fd)
    }

    /// Gives up ownership.
    pub fn into_fd(self) -> Fd {
        self.0
    }

    /// The user id of the process on the other side, as of its connect (SO_PEERCRED).
    ///
    /// # Errors
    /// As getsockopt(2).
    pub fn peer_uid(&self) -> Result<u32> {
        let mut credentials = [0_u32; 3];
        let mut len = 12_u32;
        let (to, len_at) = (credentials.as_mut_ptr(), core::ptr::from_mut(&mut len));
        // SAFETY: writes one ucred of 12 bytes, and its length.
        unsafe { syscall!(Sysno::getsockopt, self.raw(), libc::SOL_SOCKET, libc::SO_PEERCRED, to, len_at) }?;
        Ok(credentials[1])
    }

    /// Sends one message with at most [`MAX_FDS`] descriptors; SIGPIPE is not raised.
    ///
    /// # Errors
    /// As sendmsg(2); `EINVAL` for too many descriptors.
    pub fn send(&self, bytes: &[u8], fds: &[i32]) -> Result<()> {
        self.send_with(bytes, fds, 0)
    }

    /// The same, but does not wait for room.
    ///
    /// # Errors
    /// As [`Socket::send`]; `EAGAIN` when the other side reads nothing.
    pub fn send_now(&self, bytes: &[u8], fds: &[i32]) -> Result<()> {
        self.send_with(bytes, fds, libc::MSG_DONTWAIT)
    }

    /// Whether the other side has yet to read half of what it can be sent without waiting, or cannot be asked.
    pub fn is_half_full(&self) -> bool {
        let (mut limit, mut waiting, mut len) = (0_i32, 0_i32, 4_u32);
        let (limit_at, len_at) = (core::ptr::from_mut(&mut limit), core::ptr::from_mut(&mut len));
        // SAFETY: writes one int, and its length.
        let asked = unsafe {
            syscall!(Sysno::getsockopt, self.raw(), libc::SOL_SOCKET, libc::SO_SNDBUF, limit_at, len_at)
        };
        // SAFETY: writes one int (SIOCOUTQ).
        let told =
            unsafe { syscall!(Sysno::ioctl, self.raw(), libc::TIOCOUTQ, core::ptr::from_mut(&mut waiting)) };
        asked.is_err() || told.is_err() || waiting > limit / 2
    }

    fn send_with(&self, bytes: &[u8], fds: &[i32], flags: i32) -> Result<()> {
        let mut control = Control::default();
        if fds.len() > MAX_FDS {
            return Err(Errno::EINVAL);
        }
        control.len = size_of::<usize>() * 2 + size_of_val(fds);
        control.level = libc::SOL_SOCKET;
        control.kind = libc::SCM_RIGHTS;
        control.fds[..fds.len()].copy_from_slice(fds);
        let mut vector = Vector { base: bytes.as_ptr().cast_mut(), len: bytes.len() };
        let mut header = Header::new(&mut vector, &mut control);
        header.control_len = if fds.is_empty() { 0 } else { control.len.next_multiple_of(8) };
        loop {
            let header = core::ptr::from_ref(&header);
            // SAFETY: the header points to the bytes and the control block, which outlive the call.
            match unsafe { syscall!(Sysno::sendmsg, self.raw(), header, libc::MSG_NOSIGNAL | flags) } {
                Err(syscalls::Errno::EINTR) => {}
                other => {
                    other?;
                    return Ok(());
                }
            }
        }
    }

    /// Waits for one message; descriptors that come with it are close-on-exec.
    ///
    /// # Errors
    /// As recvmsg(2).
    pub fn receive(&self, into: &mut [u8]) -> Result<Received> {
        let mut control = Control::default();
        let mut vector = Vector { base: into.as_mut_ptr(), len: into.len() };
        let mut header = Header::new(&mut vector, &mut control);
        header.control_len = size_of::<Control>();
        let len = loop {
            let header = core::ptr::from_mut(&mut header);
            // SAFETY: the kernel writes into the buffer and the control block, which outlive the call.
            match unsafe { syscall!(Sysno::recvmsg, self.raw(), header, libc::MSG_CMSG_CLOEXEC) } {
                Err(syscalls::Errno::EINTR) => {}
                other => break other?,
            }
        };
        let mut received = Received { len, ..Default::default() };
        if header.control_len >= 16 && control.level == libc::SOL_SOCKET && control.kind == libc::SCM_RIGHTS {
            let count = control.len.saturating_sub(16) / 4;
            for (slot, &raw) in received.fds.iter_mut().zip(&control.fds[..count.min(MAX_FDS)]) {
                *slot = Some(Fd::from_raw(raw));
            }
        }
        Ok(received)
    }
}

#[repr(C)]
struct Vector {
    base: *mut u8,
    len: usize,
}

/// `struct cmsghdr` with room for the descriptors.
#[repr(C, align(8))]
#[derive(Default)]
struct Control {
    len: usize,
    level: i32,
    kind: i32,
    fds: [i32; MAX_FDS],
}

/// `struct msghdr`.
#[repr(C)]
struct Header {
    name: usize,
    name_len: u32,
    pad: u32,
    vectors: *mut Vector,
    vector_count: usize,
    control: *mut Control,
    control_len: usize,
    flags: i32,
    pad_end: u32,
}

const _: () = assert!(size_of::<Header>() == size_of::<libc::msghdr>());

impl Header {
    fn new(vector: &mut Vector, control: &mut Control) -> Self {
        Self {
            name: 0,
            name_len: 0,
            pad: 0,
            vectors: vector,
            vector_count: 1,
            control,
            control_len: 0,
            flags: 0,
            pad_end: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_travels_with_its_message() {
        let mut name = [0; MAX_NAME];
        let (listener, len) = Listener::bind_anywhere(&mut name).expect("bind");
        let client = Socket::connect(&name[..len]).expect("connect");
        let server = listener.accept().expect("accept");
        let null = Fd::open(c"/dev/null", libc::O_RDWR).expect("/dev/null");
        client.send(b"hello", &[null.raw()]).expect("send");
        let mut bytes = [0; 16];
        let received = server.receive(&mut bytes).expect("receive");
        assert_eq!(&bytes[..received.len], b"hello");
        let fd = received.fds[0].as_ref().expect("a descriptor came");
        assert_eq!(fd.write(b"x"), Ok(1));
        drop(client);
        assert_eq!(server.receive(&mut bytes).expect("hang-up").len, 0);
    }

    #[test]
    fn for_each_message_below_half_another_one_goes_out() {
        let mut name = [0; MAX_NAME];
        let (listener, len) = Listener::bind_anywhere(&mut name).expect("bind");
        let client = Socket::connect(&name[..len]).expect("connect");
        let _server = listener.accept().expect("accept");
        let null = Fd::open(c"/dev/null", libc::O_RDWR).expect("/dev/null");
        let mut sent = 0;
        while !client.is_half_full() {
            client.send_now(&[0; 32], &[null.raw()]).expect("half of it is free");
            sent += 1;
        }
        assert!(sent > 8);
        // All of them, and one more that was sent before.
        for _ in 0..sent - 1 {
            client.send_now(&[0; 32], &[]).expect("as many again");
        }
    }
}
