//! System calls that read from and write into cold buffers: the kernel faults on the program's behalf, and no call
//! may see an error or a short count that it would not see bare.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, all, bail, ensure, join};
use crate::model::{PAGE, Rng};
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("io-pipe", "pipes carry cold pages to cold pages", |ctx| carry(ctx, sys::pipe)),
    Case::new("io-socket", "sockets carry cold pages to cold pages", |ctx| carry(ctx, sys::socketpair)),
    Case::new("io-message", "sendmsg and recvmsg gather and scatter cold pages", message),
    Case::new("io-file", "pread and pwrite of all lengths and alignments in cold pages", file),
    Case::new("io-vectored", "readv and writev over many cold pages", vectored),
    Case::new(
        "io-structs",
        "stat, uname, poll, getdents and others read and write structures in cold pages",
        structs,
    ),
    Case::new("io-paths", "paths and names in cold pages", paths),
    Case::new("io-splice", "vmsplice, tee and splice of cold pages", splice),
    Case::new("io-sendfile", "files sent to sockets arrive in cold pages", sendfile),
];

/// Copies whole pages of one area into another through a channel, in pieces of odd lengths. The receiving area gets
/// the sending one's model.
fn carry(ctx: &Ctx, make: fn() -> crate::harness::Res<(i32, i32)>) -> Outcome {
    let pages = ctx.pages() / 2;
    let mut from = Area::filled(ctx.seed, pages)?;
    let mut to = Area::filled(ctx.seed ^ 3, pages)?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let (reader, writer) = make()?;
        let len = pages * PAGE;
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let mut rng = ctx.rng(round);
                let mut done = 0;
                while done < len {
                    let piece = rng.between(1, 200_000).min(len - done);
                    sys::write_full(writer, from.base + done, piece)?;
                    done += piece;
                }
                sys::close(writer);
                Ok(())
            });
            let mut rng = ctx.rng(round + 100);
            let mut done = 0;
            let outcome = (|| -> Outcome {
                while done < len {
                    let piece = rng.between(1, 200_000).min(len - done);
                    let got = sys::read_full(reader, to.base + done, piece)?;
                    ensure!(got == piece, "the channel ended after {} bytes of {len}", done + got);
                    done += piece;
                }
                Ok(())
            })();
            if outcome.is_err() {
                sys::close(reader);
            }
            all([outcome, join(sender)])
        })?;
        let mut end = 0u8;
        let got = sys::read_full(reader, (&raw mut end) as usize, 1)?;
        ensure!(got == 0, "no end of file behind the last byte");
        sys::close(reader);
        to.seed = from.seed;
        to.model.clone_from(&from.model);
        to.check_all("received through a channel")?;
        from.check_all("sent through a channel")?;
        from.scribble(&mut ctx.rng(round), 2);
    }
    Ok(())
}

/// An iovec over one piece of memory.
fn piece(at: usize, len: usize) -> libc::iovec {
    libc::iovec { iov_base: at as *mut _, iov_len: len }
}

/// Cuts pages `[0, count)` of an area, in a shuffled order, into pieces.
fn pieces(area: &Area, order: &[usize]) -> Vec<libc::iovec> {
    order
        .iter()
        .flat_map(|&page| [piece(area.addr(page), 1000), piece(area.addr(page) + 1000, PAGE - 1000)])
        .collect()
}

fn shuffled(rng: &mut Rng, count: usize, out_of: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..out_of).collect();
    for at in 0..count {
        let other = rng.between(at, out_of);
        order.swap(at, other);
    }
    order.truncate(count);
    order
}

/// Notes that pages of `to` now hold what pages of `from` hold.
fn copied(from: &Area, to: &Area, order: &[usize], arrived: &[usize]) -> Outcome {
    for (&source, &target) in order.iter().zip(arrived) {
        let mut wanted = [0; PAGE];
        from.expected(source, &mut wanted);
        // SAFETY: a mapped page of the receiving area.
        let found = unsafe { std::slice::from_raw_parts(to.addr(target) as *const u8, PAGE) };
        if let Some(at) = (0..PAGE).find(|&at| wanted[at] != found[at]) {
            bail!(
                "page {source} sent from {:#x} arrived wrong at {:#x} (offset {at}): expected {:#04x}, found {:#04x}",
                from.addr(source),
                to.addr(target) + at,
                wanted[at],
                found[at]
            );
        }
    }
    Ok(())
}

fn message(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 16;
    let pages = ctx.pages() / 2;
    let from = Area::filled(ctx.seed, pages)?;
    let to = Area::filled(ctx.seed ^ 3, pages)?;
    let mut ballast = Ballast::new(ctx)?;
    let (a, b) = sys::socketpair()?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let mut rng = ctx.rng(round);
        for _ in 0..100 {
            let (sent, arrived) = (shuffled(&mut rng, COUNT, pages), shuffled(&mut rng, COUNT, pages));
            let (mut out, mut into) = (pieces(&from, &sent), pieces(&to, &arrived));
            // SAFETY: zeroed is valid; the vectors live through both calls.
            let (put, got) = unsafe {
                let mut header: libc::msghdr = std::mem::zeroed();
                header.msg_iov = out.as_mut_ptr();
                header.msg_iovlen = out.len() as _;
                let put = libc::sendmsg(a, &raw const header, 0);
                header.msg_iov = into.as_mut_ptr();
                (put, libc::recvmsg(b, &raw mut header, libc::MSG_WAITALL))
            };
            ensure!(
                put == 65536 && got == 65536,
                "sendmsg gave {put}, recvmsg {got}: {}",
                std::io::Error::last_os_error()
            );
            copied(&from, &to, &sent, &arrived)?;
        }
    }
    sys::close(a);
    sys::close(b);
    Ok(())
}

fn file(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let fd = sys::temp_file(0)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let mut rng = ctx.rng(round);
        for _ in 0..200 {
            let pages = rng.between(1, 40);
            let from = rng.below(area.len() - pages);
            // Written from cold memory in one piece, then the memory is overwritten, then read back in odd pieces.
            let (at, len) = (area.addr(from), pages * PAGE);
            // SAFETY: the range is the area's.
            let put = unsafe { libc::pwrite(fd, at as *const _, len, 0) };
            ensure!(
                put == len as isize,
                "pwrite of {len} cold bytes gave {put}: {}",
                std::io::Error::last_os_error()
            );
            if rng.one_in(2) {
                sys::advise(at, pages, libc::MADV_DONTNEED)?;
            }
            let mut done = 0;
            while done < len {
                let part = rng.between(1, 9000).min(len - done);
                // SAFETY: the range is the area's.
                let got = unsafe { libc::pread(fd, (at + done) as *mut _, part, done as i64) };
                ensure!(
                    got == part as isize,
                    "pread of {part} bytes to {:#x} gave {got}: {}",
                    at + done,
                    std::io::Error::last_os_error()
                );
                done += part;
            }
        }
        area.check_all("written to a file and read back")?;
        area.scribble(&mut rng, 2);
    }
    sys::close(fd);
    Ok(())
}

fn vectored(ctx: &Ctx) -> Outcome {
    let pages = ctx.pages() / 2;
    let from = Area::filled(ctx.seed, pages)?;
    let to = Area::filled(ctx.seed ^ 3, pages)?;
    let mut ballast = Ballast::new(ctx)?;
    let fd = sys::temp_file(0)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let mut rng = ctx.rng(round);
        for _ in 0..20 {
            let (sent, arrived) = (shuffled(&mut rng, 200, pages), shuffled(&mut rng, 200, pages));
            let (out, into) = (pieces(&from, &sent), pieces(&to, &arrived));
            // SAFETY: the vectors describe mapped pages.
            let (put, got) = unsafe {
                (
                    libc::pwritev(fd, out.as_ptr(), out.len() as i32, 0),
                    libc::preadv(fd, into.as_ptr(), into.len() as i32, 0),
                )
            };
            let wanted = (200 * PAGE) as isize;
            ensure!(put == wanted && got == wanted, "pwritev gave {put}, preadv {got}, expected {wanted}");
            copied(&from, &to, &sent, &arrived)?;
        }
    }
    sys::close(fd);
    Ok(())
}

fn structs(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let base = sys::anon(64)?;
    let (reader, writer) = sys::pipe()?;
    sys::write_full(writer, c"x".as_ptr() as usize, 1)?;
    // Structures straddle two pages, so that one call can meet two faults.
    let place = |number: usize| base + (number * 2 + 1) * PAGE - 8;
    for round in ctx.rounds(3) {
        ballast.sweep()?;
        ballast.sweep()?;
        // SAFETY: each structure lies in two mapped pages of its own; unaligned access is by copy.
        unsafe {
            let stat = place(0) as *mut libc::stat;
            sys::ok("fstat", libc::fstat(reader, stat).into())?;
            ensure!(stat.read_unaligned().st_mode & libc::S_IFMT == libc::S_IFIFO, "fstat wrote a wrong mode");
            let name = place(1) as *mut libc::utsname;
            sys::ok("uname", libc::uname(name).into())?;
            ensure!(
                name.read_unaligned().sysname[..5] == b"Linux".map(|b| b as libc::c_char),
                "uname wrote a wrong name"
            );
            let poll = place(2) as *mut libc::pollfd;
            poll.write_unaligned(libc::pollfd { fd: reader, events: libc::POLLIN, revents: 0 });
            sys::ok("poll", libc::poll(poll, 1, 0).into())?;
            ensure!(poll.read_unaligned().revents == libc::POLLIN, "poll wrote {}", poll.read_unaligned().revents);
            let time = place(3) as *mut libc::timespec;
            sys::ok("clock_gettime", libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_REALTIME, time))?;
            ensure!(
                time.read_unaligned().tv_sec > 1_000_000_000,
                "clock_gettime wrote {}",
                time.read_unaligned().tv_sec
            );
            let set = place(4) as *mut u64;
            sys::ok("sched_getaffinity", libc::syscall(libc::SYS_sched_getaffinity, 0, 128, set))?;
            ensure!(set.read_unaligned() != 0, "sched_getaffinity wrote an empty set");
            let limit = place(5) as *mut libc::rlimit;
            sys::ok("getrlimit", libc::getrlimit(libc::RLIMIT_NOFILE, limit).into())?;
            ensure!(limit.read_unaligned().rlim_cur > 0, "getrlimit wrote zero");
            let wait = place(6) as *mut libc::timespec;
            wait.write_unaligned(libc::timespec { tv_sec: 0, tv_nsec: 1000 });
            sys::ok("nanosleep", libc::syscall(libc::SYS_nanosleep, wait, place(7)))?;
            let mask = place(8) as *mut u64;
            sys::ok("sigprocmask", libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, 0, mask, 8))?;
            let root =
                sys::ok("open", libc::open(c"/proc/self".as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY).into())?;
            let got = libc::syscall(libc::SYS_getdents64, root, base + 40 * PAGE, 8 * PAGE);
            sys::close(root as i32);
            ensure!(got > 200, "getdents64 gave {got}: {}", std::io::Error::last_os_error());
            let random = libc::syscall(libc::SYS_getrandom, base + 50 * PAGE - 300, 600, 0);
            ensure!(random == 600, "getrandom filled {random} of 600 bytes over two cold pages");
        }
        area.check_order("beside structures", (round as usize % 3..area.len()).step_by(3))?;
    }
    sys::close(reader);
    sys::close(writer);
    Ok(())
}

fn paths(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let base = sys::anon(8)?;
    let path = std::env::temp_dir().join(format!("spmem-torture-{}-cold", std::process::id()));
    let text = sys::cstring(&path.to_string_lossy());
    let at = base + PAGE - 7;
    // SAFETY: the string and the link's target lie in mapped pages; their rest is zero.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), at as *mut libc::c_char, text.as_bytes_with_nul().len())
    };
    for _ in ctx.rounds(2) {
        for step in 0..4 {
            ballast.sweep()?;
            // SAFETY: as above.
            let result = unsafe {
                match step {
                    0 => i64::from(libc::symlink(c"a-target".as_ptr(), at as *const _)),
                    1 => libc::readlink(at as *const _, (base + 5 * PAGE - 3) as *mut _, 100) as i64,
                    2 => i64::from(libc::faccessat(
                        libc::AT_FDCWD,
                        at as *const _,
                        libc::F_OK,
                        libc::AT_SYMLINK_NOFOLLOW,
                    )),
                    _ => i64::from(libc::unlink(at as *const _)),
                }
            };
            sys::ok(["symlink", "readlink", "faccessat", "unlink"][step], result)?;
            ensure!(step != 1 || result == 8, "readlink gave {result}");
        }
        // SAFETY: the link's target lies there.
        let found = unsafe { std::slice::from_raw_parts((base + 5 * PAGE - 3) as *const u8, 8) };
        ensure!(found == b"a-target", "readlink wrote {found:?}");
        area.check_order("beside paths", (0..area.len()).step_by(5))?;
    }
    Ok(())
}

fn splice(ctx: &Ctx) -> Outcome {
    let pages = ctx.pages() / 2;
    let from = Area::filled(ctx.seed, pages)?;
    let to = Area::filled(ctx.seed ^ 3, pages)?;
    let mut ballast = Ballast::new(ctx)?;
    let (reader, writer) = sys::pipe()?;
    let (copy, copy_in) = sys::pipe()?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let mut rng = ctx.rng(round);
        for number in 0..200 {
            let (sent, arrived) = (shuffled(&mut rng, 8, pages), shuffled(&mut rng, 8, pages));
            let vector: Vec<libc::iovec> = sent.iter().map(|&page| piece(from.addr(page), PAGE)).collect();
            // SAFETY: the pages stay unchanged until they were read at the other end.
            let put = unsafe { libc::vmsplice(writer, vector.as_ptr(), vector.len(), 0) };
            ensure!(put == 8 * PAGE as isize, "vmsplice took {put} bytes: {}", std::io::Error::last_os_error());
            if number % 50 == 0 {
                // While the pipe holds references to the pages, they shall not leave (or leave unharmed).
                ballast.sweep()?;
            }
            // SAFETY: no memory is involved.
            let teed = unsafe { libc::tee(reader, copy_in, 8 * PAGE, 0) };
            ensure!(teed == 8 * PAGE as isize, "tee took {teed} bytes");
            for end in [reader, copy] {
                for &page in &arrived {
                    sys::read_full(end, to.addr(page), PAGE)?;
                }
                copied(&from, &to, &sent, &arrived)?;
            }
        }
        from.check_all("after vmsplice")?;
    }
    for fd in [reader, writer, copy, copy_in] {
        sys::close(fd);
    }
    Ok(())
}

fn sendfile(ctx: &Ctx) -> Outcome {
    let pages = 256;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let fd = sys::temp_file(0)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let from = ctx.rng(round).below(area.len() - pages);
        let (at, len) = (area.addr(from), pages * PAGE);
        // SAFETY: the range is the area's.
        ensure!(unsafe { libc::pwrite(fd, at as *const _, len, 0) } == len as isize, "pwrite was short");
        sys::advise(at, pages, libc::MADV_DONTNEED)?;
        ballast.sweep()?;
        let (a, b) = sys::socketpair()?;
        std::thread::scope(|scope| {
            let sender = scope.spawn(move || {
                let mut offset = 0i64;
                while (offset as usize) < len {
                    // SAFETY: the offset is ours.
                    let sent = unsafe { libc::sendfile(a, fd, &raw mut offset, len - offset as usize) };
                    ensure!(sent > 0, "sendfile gave {sent}: {}", std::io::Error::last_os_error());
                }
                sys::close(a);
                Ok(())
            });
            let got = sys::read_full(b, at, len);
            sys::close(b);
            all([got.map(drop), join(sender)])
        })?;
        area.check_all("received from sendfile")?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    sys::close(fd);
    Ok(())
}
