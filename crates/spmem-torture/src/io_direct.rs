//! Direct I/O: the device reads and writes the pages themselves, so none may leave while it does.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, Res, ensure, skip, threads};
use crate::model::{PAGE, Rng};
use crate::process;
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("direct-cold", "O_DIRECT out of and into cold pages", cold),
    Case::new("direct-leaving", "O_DIRECT into pages that are leaving at that moment", leaving),
    Case::new("direct-threads", "three threads with direct I/O on neighbouring pages", by_threads),
    Case::new("direct-fork", "direct I/O with children that share the pages", with_fork),
    Case::new("direct-vectored", "one direct transfer over scattered cold pages", vectored),
];

fn open() -> Res<i32> {
    match sys::temp_file(libc::O_DIRECT) {
        Ok(fd) => Ok(fd),
        Err(_) => skip!("the directory for temporary files has no O_DIRECT"),
    }
}

/// Writes pages of an area to the file, drops or overwrites them, and reads them back from there.
fn round_trip(fd: i32, area: &mut Area, rng: &mut Rng) -> Outcome {
    let pages = rng.between(1, 64.min(area.len()));
    let from = rng.below(area.len() - pages);
    let (at, len) = (area.addr(from), pages * PAGE);
    // SAFETY: the range is the area's.
    let put = unsafe { libc::pwrite(fd, at as *const _, len, 0) };
    ensure!(
        put == len as isize,
        "direct write of {len} bytes from {at:#x} gave {put}: {}",
        std::io::Error::last_os_error()
    );
    match rng.below(3) {
        0 => sys::advise(at, pages, libc::MADV_DONTNEED)?,
        // SAFETY: as above.
        1 => unsafe { std::ptr::write_bytes(at as *mut u8, 0x5a, len) },
        _ => {}
    }
    // SAFETY: as above.
    let got = unsafe { libc::pread(fd, at as *mut _, len, 0) };
    ensure!(
        got == len as isize,
        "direct read of {len} bytes to {at:#x} gave {got}: {}",
        std::io::Error::last_os_error()
    );
    area.check_order("pages after direct I/O", from..from + pages)
}

fn cold(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let fd = open()?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let mut rng = ctx.rng(round);
        for _ in 0..60 {
            round_trip(fd, &mut area, &mut rng)?;
        }
        area.check_all("area with direct I/O")?;
        area.scribble(&mut rng, 3);
    }
    sys::close(fd);
    Ok(())
}

fn leaving(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let fd = open()?;
    ballast.during(|| {
        for round in ctx.rounds(2) {
            let mut rng = ctx.rng(round);
            for _ in 0..100 {
                round_trip(fd, &mut area, &mut rng)?;
            }
            area.check_all("area with direct I/O, swept meanwhile")?;
            area.scribble(&mut rng, 3);
        }
        Ok(())
    })?;
    sys::close(fd);
    Ok(())
}

fn by_threads(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    ballast.during(|| {
        threads(3, |id| {
            let mut area = Area::filled(ctx.seed + id as u64, ctx.pages() / 3)?;
            let fd = open()?;
            for round in ctx.rounds(2) {
                let mut rng = ctx.rng(round * 3 + id as u64);
                for _ in 0..50 {
                    round_trip(fd, &mut area, &mut rng)?;
                }
                area.check_all("area of a thread with direct I/O")?;
            }
            sys::close(fd);
            Ok(())
        })
    })
}

fn with_fork(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages() / 2)?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let child = process::fork(|| {
            let fd = open()?;
            area.writer = 1;
            let mut rng = ctx.rng(round);
            area.scribble(&mut rng, 4);
            for _ in 0..30 {
                round_trip(fd, &mut area, &mut rng)?;
            }
            area.check_all("child with direct I/O")
        })?;
        let fd = open()?;
        let mut rng = ctx.rng(round + 50);
        for _ in 0..30 {
            round_trip(fd, &mut area, &mut rng)?;
        }
        sys::close(fd);
        area.scribble(&mut rng, 4);
        area.check_all("parent with direct I/O")?;
        process::succeed("child with direct I/O", child)?;
    }
    Ok(())
}

fn vectored(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 100;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let fd = open()?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let stride = area.len() / COUNT;
        let mut rng = ctx.rng(round);
        for _ in 0..5 {
            let shift = rng.below(stride);
            let vector: Vec<libc::iovec> = (0..COUNT)
                .map(|n| libc::iovec { iov_base: area.addr(n * stride + shift) as *mut _, iov_len: PAGE })
                .collect();
            // SAFETY: the vector describes pages of the area.
            let put = unsafe { libc::pwritev(fd, vector.as_ptr(), COUNT as i32, 0) };
            ensure!(
                put == (COUNT * PAGE) as isize,
                "direct pwritev gave {put}: {}",
                std::io::Error::last_os_error()
            );
            for n in (0..COUNT).step_by(2) {
                sys::advise(area.addr(n * stride + shift), 1, libc::MADV_DONTNEED)?;
            }
            // SAFETY: as above.
            let got = unsafe { libc::preadv(fd, vector.as_ptr(), COUNT as i32, 0) };
            ensure!(
                got == (COUNT * PAGE) as isize,
                "direct preadv gave {got}: {}",
                std::io::Error::last_os_error()
            );
        }
        area.check_all("area with vectored direct I/O")?;
    }
    sys::close(fd);
    Ok(())
}
