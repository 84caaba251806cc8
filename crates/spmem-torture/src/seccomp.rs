//! Seccomp filters: children that must do without a system call, and what a filter is made of.

use crate::area::{Area, Ballast};
use crate::exec;
use crate::harness::{Case, Ctx, Outcome};
use crate::process;
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new(
        "fork-filtered",
        "a child forked under a seccomp filter that refuses one call keeps its pages, and its child too",
        filtered,
    ),
    Case::new(
        "fork-filtered-lethal",
        "a child forked or executed under a seccomp filter that ends whoever makes one call lives and keeps its pages, and its child too",
        filtered_lethally,
    ),
    Case::new(
        "fork-without-threads",
        "a child forked where no thread may be started keeps its pages, and its child too",
        without_threads,
    ),
];

/// Calls that a program can do without, and that its memory may seem to need.
const REFUSED: [i64; 6] = [
    libc::SYS_pread64,
    libc::SYS_pipe2,
    libc::SYS_close_range,
    libc::SYS_bind,
    libc::SYS_accept4,
    libc::SYS_madvise,
];

/// Of these, what the forking thread itself does not need for its child.
const ENDED_FOR: [i64; 4] = [libc::SYS_pread64, libc::SYS_close_range, libc::SYS_bind, libc::SYS_accept4];

fn filtered(ctx: &Ctx) -> Outcome {
    let errno = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    fork_under_filters(ctx, REFUSED.map(|call| (call, errno)))
}

fn filtered_lethally(ctx: &Ctx) -> Outcome {
    let verdicts = [libc::SECCOMP_RET_KILL_PROCESS, libc::SECCOMP_RET_KILL_THREAD, libc::SECCOMP_RET_TRAP];
    for verdict in verdicts {
        let child = process::fork(|| {
            install_for(libc::SYS_socket, verdict)?;
            exec::execute_list()
        })?;
        process::succeed("program executed under a filter", child)?;
    }
    fork_under_filters(
        ctx,
        std::array::from_fn::<_, { ENDED_FOR.len() }, _>(|at| (ENDED_FOR[at], verdicts[at % 3])),
    )
}

/// As under RLIMIT_NPROC, or pids.max of a cgroup: processes may be had here, threads not.
fn without_threads(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages() / 2)?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    for _ in ctx.rounds(1) {
        let parent = process::fork(|| {
            install(&mut [
                load(0),
                unless(libc::SYS_clone as u32, 3),
                load(FLAGS),
                unless_any(libc::CLONE_THREAD as u32, 1),
                give(libc::SECCOMP_RET_ERRNO | libc::EAGAIN as u32),
                give(libc::SECCOMP_RET_ALLOW),
            ])?;
            // The first has a parent with pages elsewhere, the second one without an agent.
            let child = process::fork(|| {
                area.check_all("child without threads")?;
                let grandchild = process::fork(|| area.check_all("grandchild without threads"))?;
                process::succeed("grandchild without threads", grandchild)
            })?;
            ballast.sweep()?;
            process::succeed("child without threads", child)?;
            area.check_all("parent of a child without threads")
        })?;
        process::succeed("process that may start no thread", parent)?;
    }
    area.check_all("parent of a process that may start no thread")
}

/// Where `struct seccomp_data` has the low half of a call's first argument: clone(2)'s flags.
const FLAGS: u32 = 16;

fn fork_under_filters<const N: usize>(ctx: &Ctx, filters: [(i64, u32); N]) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages() / 2)?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    for (call, verdict) in filters {
        let parent = process::fork(|| {
            install_for(call, verdict)?;
            let child = process::fork(|| {
                area.check_all("child under a filter")?;
                let grandchild = process::fork(|| area.check_all("grandchild under a filter"))?;
                process::succeed("grandchild under a filter", grandchild)
            })?;
            process::succeed("child under a filter", child)
        })?;
        process::succeed(&format!("process under a filter that answers call {call} with {verdict:#x}"), parent)?;
    }
    area.check_all("parent of processes under filters")
}

fn install_for(call: i64, verdict: u32) -> Outcome {
    install(&mut [load(0), unless(call as u32, 1), give(verdict), give(libc::SECCOMP_RET_ALLOW)])
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

/// Passes over so many steps unless one of these bits is set.
const fn unless_any(bits: u32, skip: u8) -> libc::sock_filter {
    step(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, skip, bits)
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
