//! Memory reached from another process, or by a process through a file: process_vm_readv, ptrace, /proc/PID/mem, gdb.
//!
//! process_vm_readv and _writev wait for a page that is away. The kernel does not let ptrace and /proc/PID/mem wait:
//! under userfaultfd they fail with EIO. That is a limit, counted and printed here; wrong bytes would be a failure.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, Res, bail, ensure, skip};
use crate::model::PAGE;
use crate::process::{self, End};
use crate::sys;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case::new("remote-read", "process_vm_readv of a cold child", |ctx| with_child(ctx, vm_read)),
    Case::new("remote-write", "process_vm_writev into a cold child", |ctx| with_child(ctx, vm_write)),
    Case::new("remote-parent", "a child reads and writes its cold parent", parent),
    Case::new("remote-mem", "/proc/PID/mem of a cold child", |ctx| with_child(ctx, mem_file)),
    Case::new("remote-ptrace", "PTRACE_PEEKDATA and POKEDATA on a cold child", |ctx| with_child(ctx, peek)),
    Case::new("self-mem", "/proc/self/mem of cold pages", self_mem),
    Case::new("gdb-cold", "gdb attaches to a cold process, reads it and lets go", |ctx| with_child(ctx, gdb)),
];

/// A child that has the area, lets it get cold and waits; then the parent does `act` (which may write pages with
/// writer 1) and the child checks what it then holds.
fn with_child(ctx: &Ctx, act: fn(&Ctx, i32, &mut Area) -> Outcome) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(1) {
        let (ready, ready_in) = sys::pipe()?;
        let (go, go_in) = sys::pipe()?;
        let child = process::fork(|| {
            // SAFETY: allows any process of this user to look.
            unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
            sys::close(go_in);
            area.writer = 1;
            area.write_all();
            ballast.sweep()?;
            ballast.sweep()?;
            sys::write_full(ready_in, c"r".as_ptr() as usize, 1)?;
            let mut models = vec![0u8; area.len() * 8];
            let got = sys::read_full(go, models.as_mut_ptr() as usize, models.len())?;
            ensure!(got == models.len(), "the observing parent gave up");
            decode(&models, &mut area);
            area.check_all("child that was observed from outside")
        })?;
        sys::close(ready_in);
        sys::close(go);
        let mut byte = 0u8;
        let got = sys::read_full(ready, (&raw mut byte) as usize, 1)?;
        sys::close(ready);
        let mut theirs = Area { base: area.base, first: 0, seed: area.seed, writer: 1, model: area.model.clone() };
        for page in 0..theirs.len() {
            theirs.next(page, &mut [0; PAGE]);
        }
        let outcome = if got == 1 { act(ctx, child, &mut theirs) } else { Ok(()) };
        if outcome.is_err() {
            let _ = process::kill(child, libc::SIGKILL);
            let _ = process::wait(child);
            return outcome;
        }
        let models = encode(&theirs);
        sys::write_full(go_in, models.as_ptr() as usize, models.len())?;
        sys::close(go_in);
        process::succeed("child that was observed from outside", child)?;
        area.check_all("parent that observed")?;
    }
    Ok(())
}

fn encode(area: &Area) -> Vec<u8> {
    area.model.iter().flat_map(|m| (u64::from(m.version) << 8 | u64::from(m.pokes)).to_le_bytes()).collect()
}

fn decode(bytes: &[u8], area: &mut Area) {
    for (model, word) in area.model.iter_mut().zip(bytes.chunks_exact(8)) {
        let word = u64::from_le_bytes(word.try_into().unwrap_or([0; 8]));
        model.version = (word >> 8) as u32;
        model.pokes = word as u8;
    }
}

/// What was read from outside against the model.
fn compare(what: &str, area: &Area, page: usize, found: &[u8]) -> Outcome {
    let mut wanted = [0; PAGE];
    area.expected(page, &mut wanted);
    let Some(at) = (0..PAGE).find(|&at| wanted[at] != found[at]) else { return Ok(()) };
    bail!(
        "{what}: page {page} at {:#x} (offset {at}): expected {:#04x}, found {:#04x}; page: {}",
        area.addr(page),
        wanted[at],
        found[at],
        crate::model::name(area.seed, found.try_into().unwrap_or(&[0; PAGE]))
    )
}

fn vector(at: usize, len: usize) -> libc::iovec {
    libc::iovec { iov_base: at as *mut _, iov_len: len }
}

fn vm_read(_: &Ctx, child: i32, area: &mut Area) -> Outcome {
    let mut buffer = vec![0u8; 16 * PAGE];
    for from in (0..area.len() - 16).step_by(16) {
        let (local, remote) =
            (vector(buffer.as_mut_ptr() as usize, buffer.len()), vector(area.addr(from), 16 * PAGE));
        // SAFETY: the local buffer is ours.
        let got = unsafe { libc::process_vm_readv(child, &raw const local, 1, &raw const remote, 1, 0) };
        ensure!(
            got == buffer.len() as isize,
            "process_vm_readv at {:#x} gave {got}: {}",
            area.addr(from),
            std::io::Error::last_os_error()
        );
        for page in 0..16 {
            compare("process_vm_readv", area, from + page, &buffer[page * PAGE..(page + 1) * PAGE])?;
        }
    }
    Ok(())
}

fn vm_write(ctx: &Ctx, child: i32, area: &mut Area) -> Outcome {
    let mut rng = ctx.rng(5);
    for _ in 0..area.len() / 4 {
        let page = rng.below(area.len());
        let mut bytes = [0; PAGE];
        area.next(page, &mut bytes);
        let (local, remote) = (vector(bytes.as_ptr() as usize, PAGE), vector(area.addr(page), PAGE));
        // SAFETY: the local buffer is ours; the child waits.
        let put = unsafe { libc::process_vm_writev(child, &raw const local, 1, &raw const remote, 1, 0) };
        ensure!(
            put == PAGE as isize,
            "process_vm_writev at {:#x} gave {put}: {}",
            area.addr(page),
            std::io::Error::last_os_error()
        );
    }
    Ok(())
}

fn parent(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    // SAFETY: no memory is involved.
    let me = unsafe { libc::getpid() };
    // SAFETY: allows any process of this user to look.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
    for round in ctx.rounds(2) {
        let (go, go_in) = sys::pipe()?;
        let child = process::fork(|| {
            let mut byte = 0u8;
            sys::close(go_in);
            sys::read_full(go, (&raw mut byte) as usize, 1)?;
            vm_read(ctx, me, &mut area)?;
            // Every fourth page gets its next version.
            for page in (0..area.len()).step_by(4) {
                let mut bytes = [0; PAGE];
                area.next(page, &mut bytes);
                let (local, remote) = (vector(bytes.as_ptr() as usize, PAGE), vector(area.addr(page), PAGE));
                // SAFETY: the parent does not touch these pages now.
                let put = unsafe { libc::process_vm_writev(me, &raw const local, 1, &raw const remote, 1, 0) };
                ensure!(put == PAGE as isize, "process_vm_writev gave {put}: {}", std::io::Error::last_os_error());
            }
            Ok(())
        })?;
        ballast.sweep()?;
        ballast.sweep()?;
        sys::write_full(go_in, c"g".as_ptr() as usize, 1)?;
        process::succeed("child that writes its parent", child)?;
        sys::close(go);
        sys::close(go_in);
        for page in (0..area.len()).step_by(4) {
            area.next(page, &mut [0; PAGE]);
        }
        area.check_all("parent written by its child")?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    Ok(())
}

fn open_mem(path: &str) -> Res<i32> {
    let name = sys::cstring(path);
    // SAFETY: a valid string.
    let fd = unsafe { libc::open(name.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    Ok(sys::ok(path, fd.into())? as i32)
}

/// Whether a transfer of a page through the kernel's ptrace access went through; EIO (the page is away) is counted.
fn went_through(what: &str, result: isize, refused: &mut usize) -> Res<bool> {
    if result == -1 && sys::errno() == libc::EIO {
        *refused += 1;
        return Ok(false);
    }
    ensure!(result == PAGE as isize, "{what} gave {result}: {}", std::io::Error::last_os_error());
    Ok(true)
}

fn remark(what: &str, refused: usize) {
    if refused > 0 {
        crate::harness::report(&format!("remark: {refused} accesses by {what} got EIO, their pages were away"));
    }
}

fn through_file(ctx: &Ctx, path: &str, area: &mut Area) -> Outcome {
    let fd = open_mem(path)?;
    let mut rng = ctx.rng(6);
    let (mut bytes, mut refused) = ([0; PAGE], 0);
    for _ in 0..area.len() / 2 {
        let page = rng.below(area.len());
        let offset = area.addr(page) as i64;
        if rng.one_in(3) {
            let before = area.model[page];
            area.next(page, &mut bytes);
            // SAFETY: the local buffer is ours; nobody else touches the page now.
            let put = unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), PAGE, offset) };
            if !went_through(&format!("write of {path} at {offset:#x}"), put, &mut refused)? {
                area.model[page] = before;
            }
        } else {
            // SAFETY: as above.
            let got = unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), PAGE, offset) };
            if went_through(&format!("read of {path} at {offset:#x}"), got, &mut refused)? {
                compare(path, area, page, &bytes)?;
            }
        }
    }
    sys::close(fd);
    remark(path, refused);
    Ok(())
}

fn mem_file(ctx: &Ctx, child: i32, area: &mut Area) -> Outcome {
    through_file(ctx, &format!("/proc/{child}/mem"), area)
}

fn self_mem(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        through_file(ctx, "/proc/self/mem", &mut area)?;
        area.check_all("after /proc/self/mem")?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    Ok(())
}

/// While a tracer has all threads of the child stopped, pages that are away can come only if their server still runs;
/// PTRACE_ATTACH stops one thread only, so the others (and a server thread) go on.
fn peek(ctx: &Ctx, child: i32, area: &mut Area) -> Outcome {
    // SAFETY: attaching to our own child.
    sys::ok("PTRACE_ATTACH", unsafe { libc::ptrace(libc::PTRACE_ATTACH, child, 0, 0) })?;
    let mut status = 0;
    // SAFETY: the status is ours.
    sys::ok("waitpid", unsafe { libc::waitpid(child, &raw mut status, libc::__WALL) }.into())?;
    ensure!(libc::WIFSTOPPED(status), "the traced child is not stopped: {status:#x}");
    let (mut rng, mut refused) = (ctx.rng(7), 0);
    for _ in 0..500.min(area.len()) {
        let page = rng.below(area.len());
        if rng.one_in(10) {
            refused += poke(child, area, page)?;
        } else {
            let mut wanted = [0; PAGE];
            area.expected(page, &mut wanted);
            let at = rng.below(512) * 8;
            // SAFETY: glibc's errno tells a failure from the word -1.
            let found = unsafe {
                *libc::__errno_location() = 0;
                libc::ptrace(libc::PTRACE_PEEKDATA, child, area.addr(page) + at, 0)
            };
            if found == -1 && sys::errno() == libc::EIO {
                refused += 1;
                continue;
            }
            ensure!(sys::errno() == 0 || found != -1, "PTRACE_PEEKDATA: {}", std::io::Error::last_os_error());
            ensure!(
                found.to_le_bytes() == wanted[at..at + 8],
                "PTRACE_PEEKDATA of page {page} offset {at} found {found:#x}, expected {:02x?}",
                &wanted[at..at + 8]
            );
        }
    }
    remark("ptrace", refused);
    // SAFETY: lets the child go.
    sys::ok("PTRACE_DETACH", unsafe { libc::ptrace(libc::PTRACE_DETACH, child, 0, 0) }).map(drop)
}

/// Writes the next version of a page word by word; what ptrace refuses goes by process_vm_writev. Gives the refusals.
fn poke(child: i32, area: &mut Area, page: usize) -> Res<usize> {
    let mut bytes = [0; PAGE];
    area.next(page, &mut bytes);
    let mut refused = 0;
    for (at, word) in bytes.chunks_exact(8).enumerate() {
        let address = area.addr(page) + at * 8;
        let value = i64::from_le_bytes(word.try_into().unwrap_or([0; 8]));
        // SAFETY: a word of the stopped child.
        let result = unsafe { libc::ptrace(libc::PTRACE_POKEDATA, child, address, value) };
        if result == -1 && sys::errno() == libc::EIO {
            refused += 1;
            let (local, remote) = (vector(word.as_ptr() as usize, 8), vector(address, 8));
            // SAFETY: as above.
            let put = unsafe { libc::process_vm_writev(child, &raw const local, 1, &raw const remote, 1, 0) };
            ensure!(put == 8, "process_vm_writev of a word gave {put}: {}", std::io::Error::last_os_error());
        } else {
            sys::ok("PTRACE_POKEDATA", result)?;
        }
    }
    Ok(refused)
}

/// gdb stops every thread, a server of pages included: it may see errors for pages that are away, but neither hang nor
/// change anything. Its reads that succeed must be right. It runs outside the budget: inside, it takes from the program's
/// RAM, and thrashes at the tightest.
fn gdb(_: &Ctx, child: i32, area: &mut Area) -> Outcome {
    let mut command = Command::new("gdb");
    command.env_remove("LD_PRELOAD");
    command.args(["-nx", "-q", "-batch", "-p", &child.to_string(), "-ex", "info threads"]);
    let pages: Vec<usize> = (0..8).map(|n| n * (area.len() / 8)).collect();
    for &page in &pages {
        command.args(["-ex", &format!("x/1gx {:#x}", area.addr(page) + 512)]);
    }
    command.args(["-ex", "bt 3", "-ex", "detach"]);
    let mut gdb = match command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn() {
        Ok(gdb) => gdb,
        Err(error) => skip!("gdb: {error}"),
    };
    let limit = Instant::now() + Duration::from_secs(120);
    while gdb.try_wait()?.is_none() {
        if Instant::now() > limit {
            let _ = gdb.kill();
            let _ = gdb.wait();
            process::kill(child, libc::SIGKILL)?;
            ensure!(process::wait(child)? == End::Signal(libc::SIGKILL), "the child of a hung gdb did not die");
            bail!("gdb hung on a cold process for 120 s");
        }
        process::nap(20);
    }
    let output = gdb.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    for &page in &pages {
        let mut wanted = [0; PAGE];
        area.expected(page, &mut wanted);
        let word = u64::from_le_bytes(wanted[512..520].try_into().unwrap_or([0; 8]));
        // A page that is away cannot be read by ptrace: gdb then prints the address and no value behind it.
        let mark = format!("{:#x}:\t", area.addr(page) + 512);
        let Some((_, rest)) = said.split_once(&mark) else { continue };
        let value = rest.split_whitespace().next().unwrap_or("");
        if value.ends_with(':') || !value.starts_with("0x") {
            continue;
        }
        ensure!(value == format!("{word:#018x}"), "gdb read {value} at {mark}, expected {word:#018x}");
    }
    Ok(())
}
