//! Guard pages by madvise in cold ranges.

use crate::area::{Area, Ballast, State};
use crate::harness::{Case, Ctx, Outcome, bail, ensure};
use crate::process;
use crate::seccomp::{give, install, load, unless};
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new(
        "madvise-guard-refused",
        "MADV_GUARD_INSTALL that the kernel refuses changes no byte",
        guard_refused,
    ),
    Case::new("madvise-guard", "guard pages refuse access; removed, they are zero and neighbours intact", guard),
];

fn guard(ctx: &Ctx) -> Outcome {
    const INSTALL: i32 = 102;
    const REMOVE: i32 = 103;
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut rng = ctx.rng(0);
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        for _ in 0..40 {
            let from = rng.below(area.len() - 20);
            match sys::advise_raw(area.addr(from), 20, INSTALL) {
                0 => area.expect(from..from + 20, State::Gone),
                libc::EINVAL => crate::harness::skip!("this kernel has no MADV_GUARD_INSTALL"),
                error => bail!("MADV_GUARD_INSTALL: {}", std::io::Error::from_raw_os_error(error)),
            }
        }
        ballast.sweep()?;
        area.check_all("around guard pages")?;
        let child = process::fork(|| {
            let page = (0..area.len()).find(|&page| area.model[page].state == State::Gone).unwrap_or(0);
            // SAFETY: the access must end this process.
            unsafe { ((area.addr(page) + 8) as *const u8).read_volatile() };
            Ok(())
        })?;
        process::ends("child that reads a guard page", child, process::End::Signal(libc::SIGSEGV))?;
        for page in 0..area.len() {
            if area.model[page].state == State::Gone {
                sys::advise(area.addr(page), 1, REMOVE)?;
                area.zeroed(page..page + 1);
            }
        }
        area.check_all("guard pages removed")?;
        area.scribble(&mut rng, 2);
    }
    Ok(())
}

/// A seccomp filter plays a kernel without guards.
fn guard_refused(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    ballast.sweep()?;
    let child = process::fork(|| {
        refuse_guards()?;
        ballast.sweep()?;
        let error = sys::advise_raw(area.base, area.len() / 2, 102);
        ensure!(error == libc::EINVAL, "MADV_GUARD_INSTALL gave error {error}");
        area.check_all("after guards were refused")
    })?;
    process::succeed("child whose guards are refused", child)?;
    area.check_all("parent of a child whose guards are refused")
}

fn refuse_guards() -> Outcome {
    // struct seccomp_data: the number at 0, the third argument at 32.
    install(&mut [
        load(0),
        unless(libc::SYS_madvise as u32, 3),
        load(32),
        unless(102, 1),
        give(libc::SECCOMP_RET_ERRNO | libc::EINVAL as u32),
        give(libc::SECCOMP_RET_ALLOW),
    ])
}
