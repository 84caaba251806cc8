//! io_uring: the kernel reaches memory later, from its own threads, or holds it pinned.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Failure, Outcome, Res, ensure};
use crate::model::PAGE;
use crate::sys;
use io_uring::{IoUring, opcode, squeue, types};

pub const CASES: &[Case] = &[
    Case::new("ring-plain", "io_uring out of and into cold pages", |ctx| plain(ctx, 0)),
    Case::new("ring-async", "the same by the kernel's own threads (IOSQE_ASYNC)", |ctx| plain(ctx, 1)),
    Case::new("ring-direct", "the same with O_DIRECT, pages leaving meanwhile", |ctx| plain(ctx, 2)),
    Case::new("ring-registered", "registered (pinned) buffers stay where the kernel writes", registered),
];

const DEPTH: usize = 32;
const RUN: usize = 8;

fn ring() -> Res<IoUring> {
    IoUring::new(DEPTH as u32).map_err(|error| Failure::Skipped(format!("io_uring: {error}")))
}

fn submit(ring: &mut IoUring, entries: Vec<squeue::Entry>) -> Outcome {
    let count = entries.len();
    for entry in entries {
        // SAFETY: buffers stay mapped until the completion was seen.
        let pushed = unsafe { ring.submission().push(&entry) };
        ensure!(pushed.is_ok(), "the submission queue is full");
    }
    let mut done = 0;
    while done < count {
        match ring.submit_and_wait(count - done) {
            Err(error) if error.raw_os_error() != Some(libc::EINTR) => return Err(error.into()),
            _ => {}
        }
        for completion in ring.completion() {
            let result = completion.result();
            ensure!(
                result == (RUN * PAGE) as i32,
                "request {} completed with {result}, expected {}",
                completion.user_data(),
                RUN * PAGE
            );
            done += 1;
        }
    }
    Ok(())
}

fn plain(ctx: &Ctx, kind: i32) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let fd = match sys::temp_file(if kind == 2 { libc::O_DIRECT } else { 0 }) {
        Ok(fd) => fd,
        Err(failure) => crate::harness::skip!("{failure}"),
    };
    let mut ring = ring()?;
    let flags = if kind == 1 { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let mut rng = ctx.rng(round);
        ballast.during(|| {
            for _ in 0..20 {
                let stride = area.len() / DEPTH;
                let starts: Vec<usize> = (0..DEPTH).map(|n| n * stride + rng.below(stride - RUN)).collect();
                let place = |n: usize| (area.addr(starts[n]) as *mut u8, (n * RUN * PAGE) as u64);
                let write = |n: usize| {
                    let (at, offset) = place(n);
                    opcode::Write::new(types::Fd(fd), at, (RUN * PAGE) as u32)
                        .offset(offset)
                        .build()
                        .flags(flags)
                        .user_data(n as u64)
                };
                let read = |n: usize| {
                    let (at, offset) = place(n);
                    opcode::Read::new(types::Fd(fd), at, (RUN * PAGE) as u32)
                        .offset(offset)
                        .build()
                        .flags(flags)
                        .user_data(n as u64)
                };
                submit(&mut ring, (0..DEPTH).map(write).collect())?;
                for &start in starts.iter().step_by(2) {
                    sys::advise(area.addr(start), RUN, libc::MADV_DONTNEED)?;
                }
                submit(&mut ring, (0..DEPTH).map(read).collect())?;
                for &start in &starts {
                    area.check_order("pages after io_uring", start..start + RUN)?;
                }
            }
            Ok(())
        })?;
        area.check_all("area with io_uring")?;
    }
    sys::close(fd);
    Ok(())
}

/// The buffers are registered once, then swept around for the whole run: if one of their pages were moved, the kernel
/// would write to the old frame.
fn registered(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut buffers = Area::filled(ctx.seed ^ 8, DEPTH * RUN)?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    ballast.sweep()?;
    let fd = sys::temp_file(0)?;
    let mut ring = ring()?;
    let vector: Vec<libc::iovec> = (0..DEPTH)
        .map(|n| libc::iovec { iov_base: buffers.addr(n * RUN) as *mut _, iov_len: RUN * PAGE })
        .collect();
    // SAFETY: the buffers stay mapped for the life of the ring.
    unsafe { ring.submitter().register_buffers(&vector) }
        .map_err(|error| Failure::Skipped(format!("register_buffers: {error}")))?;
    let place = |buffers: &Area, n: usize| (buffers.addr(n * RUN) as *mut u8, (n * RUN * PAGE) as u64);
    for round in ctx.rounds(3) {
        ballast.sweep()?;
        let write = |n: usize| {
            let (at, offset) = place(&buffers, n);
            opcode::WriteFixed::new(types::Fd(fd), at, (RUN * PAGE) as u32, n as u16)
                .offset(offset)
                .build()
                .user_data(n as u64)
        };
        submit(&mut ring, (0..DEPTH).map(write).collect())?;
        // Other bytes into the memory by the processor, then the old ones back by the kernel.
        for page in 0..buffers.len() {
            // SAFETY: a page of the buffers.
            unsafe { std::ptr::write_bytes(buffers.addr(page) as *mut u8, 0xa5, PAGE) };
        }
        ballast.sweep()?;
        let read = |n: usize| {
            let (at, offset) = place(&buffers, n);
            opcode::ReadFixed::new(types::Fd(fd), at, (RUN * PAGE) as u32, n as u16)
                .offset(offset)
                .build()
                .user_data(n as u64)
        };
        submit(&mut ring, (0..DEPTH).map(read).collect())?;
        buffers.check_all("registered buffers")?;
        buffers.write_all();
        area.check_all("beside registered buffers")?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    drop(ring);
    ballast.sweep()?;
    buffers.check_all("buffers no longer registered")?;
    sys::close(fd);
    Ok(())
}
