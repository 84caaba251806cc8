//! mlock: locked memory is right, stays, and may leave again once unlocked.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, ensure, skip};
use crate::model::PAGE;
use crate::process;
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("mlock", "mlock of cold pages brings them, munlock lets them go, bytes stay", mlock),
    Case::new("mlock-resident", "what is locked stays resident", resident),
    Case::new("mlock-onfault", "MLOCK_ONFAULT of cold pages keeps their bytes", onfault),
    Case::new("mlockall", "mlockall and munlockall keep every byte", mlockall),
    Case::new("mlockall-future", "MCL_FUTURE: new mappings are locked, right, and fork works", future).warm(),
];

fn lock(area: &Area, from: usize, pages: usize) -> Outcome {
    // SAFETY: no memory is changed.
    if unsafe { libc::mlock(area.addr(from) as *const _, pages * PAGE) } != 0 {
        match sys::errno() {
            libc::ENOMEM | libc::EPERM | libc::EAGAIN => skip!("RLIMIT_MEMLOCK forbids mlock of {pages} pages"),
            _ => sys::ok("mlock", -1)?,
        };
    }
    Ok(())
}

fn unlock(area: &Area, from: usize, pages: usize) -> Outcome {
    // SAFETY: no memory is changed.
    sys::ok("munlock", unsafe { libc::munlock(area.addr(from) as *const _, pages * PAGE) }.into()).map(drop)
}

fn mlock(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut rng = ctx.rng(0);
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let from = rng.below(area.len() / 2);
        let pages = rng.between(1, 600);
        lock(&area, from, pages)?;
        area.check_order("locked pages", from..from + pages)?;
        area.scribble(&mut rng, 5);
        ballast.sweep()?;
        unlock(&area, from, pages)?;
        ballast.sweep()?;
        area.check_all("pages unlocked again")?;
    }
    Ok(())
}

fn resident(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages() / 4)?;
    let pages = area.len().min(400);
    ballast.sweep()?;
    lock(&area, 0, pages)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let mut here = vec![0u8; pages];
        // SAFETY: one byte a page fits.
        sys::ok("mincore", unsafe { libc::mincore(area.base as *mut _, pages * PAGE, here.as_mut_ptr()) }.into())?;
        let gone = here.iter().filter(|&&byte| byte & 1 == 0).count();
        ensure!(gone == 0, "{gone} of {pages} locked pages are not resident");
        area.check_all("area with locked pages")?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    Ok(())
}

fn onfault(ctx: &Ctx) -> Outcome {
    const ONFAULT: i32 = 1;
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let from = round as usize * 100 % (area.len() / 2);
        // SAFETY: no memory is changed.
        if unsafe { libc::syscall(libc::SYS_mlock2, area.addr(from), 500 * PAGE, ONFAULT) } != 0 {
            skip!("mlock2: {}", std::io::Error::last_os_error());
        }
        area.check_order("pages locked on fault", (from..from + 500).step_by(2))?;
        ballast.sweep()?;
        area.check_all("area with pages locked on fault")?;
        unlock(&area, from, 500)?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    Ok(())
}

fn lock_all(flags: i32) -> Outcome {
    // SAFETY: no memory is changed.
    if unsafe { libc::mlockall(flags) } != 0 {
        skip!("mlockall: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

fn mlockall(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    for round in ctx.rounds(1) {
        ballast.sweep()?;
        lock_all(libc::MCL_CURRENT)?;
        area.check_all("everything locked")?;
        // SAFETY: no memory is changed.
        unsafe { libc::munlockall() };
        area.scribble(&mut ctx.rng(round), 3);
        ballast.sweep()?;
        area.check_all("everything unlocked")?;
    }
    Ok(())
}

fn future(ctx: &Ctx) -> Outcome {
    let pages = ctx.pages() / 8;
    let old = Area::filled(ctx.seed, pages)?;
    lock_all(libc::MCL_CURRENT | libc::MCL_FUTURE)?;
    for round in ctx.rounds(2) {
        let area = Area::filled(ctx.seed + round, pages)?;
        crate::harness::threads(3, |_| area.check_all("seen by a thread made under MCL_FUTURE"))?;
        let child = process::fork(|| {
            area.check_all("child of a locked process").and_then(|()| old.check_all("the same"))
        })?;
        process::succeed("child of a locked process", child)?;
        old.check_all("memory older than the lock")?;
        sys::unmap(area.base, pages)?;
    }
    Ok(())
}
