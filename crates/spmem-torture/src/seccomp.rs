//! Seccomp filters: children that must do without a system call, and what a filter is made of.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome};
use crate::process;
use crate::sys;

pub const CASES: &[Case] = &[Case::new(
    "fork-filtered",
    "a child forked under a seccomp filter that refuses one call keeps its pages, and its child too",
    filtered,
)];

/// Calls that a program can do without, and that its memory may seem to need.
const REFUSED: [i64; 6] = [
    libc::SYS_pread64,
    libc::SYS_pipe2,
    libc::SYS_close_range,
    libc::SYS_bind,
    libc::SYS_accept4,
    libc::SYS_madvise,
];

fn filtered(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages() / 2)?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    for call in REFUSED {
        let parent = process::fork(|| {
            refuse(call)?;
            let child = process::fork(|| {
                area.check_all("child under a filter")?;
                let grandchild = process::fork(|| area.check_all("grandchild under a filter"))?;
                process::succeed("grandchild under a filter", grandchild)
            })?;
            process::succeed("child under a filter", child)
        })?;
        process::succeed(&format!("process under a filter that refuses call {call}"), parent)?;
    }
    area.check_all("parent of processes under filters")
}

fn refuse(call: i64) -> Outcome {
    install(&mut [
        load(0),
        unless(call as u32, 1),
        give(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        give(libc::SECCOMP_RET_ALLOW),
    ])
}

const fn step(code: u32, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf, k }
}

/// Looks at a word of `struct seccomp_data`.
pub const fn load(offset: u32) -> libc::sock_filter {
    step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, offset)
}

/// Passes over so many steps unless it is this value.
pub const fn unless(value: u32, skip: u8) -> libc::sock_filter {
    step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, skip, value)
}

/// Ends with this verdict.
pub const fn give(verdict: u32) -> libc::sock_filter {
    step(libc::BPF_RET | libc::BPF_K, 0, verdict)
}

/// Puts a filter on the calling thread.
pub fn install(steps: &mut [libc::sock_filter]) -> Outcome {
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the program lives as long as the calls.
    unsafe {
        sys::ok("PR_SET_NO_NEW_PRIVS", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        sys::ok("PR_SET_SECCOMP", libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program).into())?;
    }
    Ok(())
}
