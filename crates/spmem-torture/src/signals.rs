//! Signals that arrive in the middle of faults, and handlers that fault themselves.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, Res, bail, ensure, threads};
use crate::model::PAGE;
use crate::process;
use crate::sys;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case::new("signal-itimer", "a 1 kHz setitimer handler touches cold pages while the program faults", |ctx| {
        timer(ctx, false)
    }),
    Case::new("signal-timer", "the same with timer_create", |ctx| timer(ctx, true)),
    Case::new("signal-altstack", "a handler on a cold alternate stack", altstack),
    Case::new("signal-directed", "pthread_kill storms on threads that fault", directed),
    Case::new("signal-segv", "a SIGSEGV handler gets the right address and count, cold pages give none", segv),
    Case::new("signal-jump", "siglongjmp out of a SIGSEGV handler", jump),
    Case::new("signal-eintr", "calls that restart do not show EINTR; calls on cold memory neither", eintr),
    Case::new("signal-wait", "sigwait and signalfd still get signals meant for the program", waiting),
    Case::new("signal-stop", "SIGSTOP and SIGCONT of a faulting child", stopped),
];

static BASE: AtomicUsize = AtomicUsize::new(0);
static PAGES: AtomicUsize = AtomicUsize::new(0);
static TICKS: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);
static STACKS: AtomicU64 = AtomicU64::new(0);
static BUSY: AtomicBool = AtomicBool::new(false);

/// Each tick adds one to the counter of the next page; each page must hold what the ticks before left.
extern "C" fn tick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if BUSY.swap(true, Relaxed) {
        return;
    }
    let number = TICKS.fetch_add(1, Relaxed);
    let pages = PAGES.load(Relaxed) as u64;
    // A stride coprime to the number of pages visits every page in turn, each far from the last.
    let page = (number.wrapping_mul(1_000_003)) % pages;
    let cell = (BASE.load(Relaxed) + page as usize * PAGE + 640) as *mut u64;
    // SAFETY: a page of the handler's own area.
    unsafe {
        let found = cell.read_volatile();
        if found != number / pages {
            WRONG.fetch_add(1, Relaxed);
        }
        cell.write_volatile(number / pages + 1);
    }
    BUSY.store(false, Relaxed);
}

fn handler_area(pages: usize) -> Outcome {
    // Odd, so that the handler's stride meets every page.
    let pages = pages | 1;
    BASE.store(sys::anon(pages)?, Relaxed);
    PAGES.store(pages, Relaxed);
    TICKS.store(0, Relaxed);
    WRONG.store(0, Relaxed);
    Ok(())
}

fn verdict(at_least: u64) -> Outcome {
    let (ticks, wrong) = (TICKS.load(Relaxed), WRONG.load(Relaxed));
    ensure!(wrong == 0, "{wrong} of {ticks} visits of a handler found a wrong counter in its page");
    ensure!(ticks >= at_least, "only {ticks} signals arrived");
    let pages = PAGES.load(Relaxed) as u64;
    let sum: u64 = (0..pages as usize)
        // SAFETY: the handler's area is mapped, no signal comes any more.
        .map(|page| unsafe { ((BASE.load(Relaxed) + page * PAGE + 640) as *const u64).read_volatile() })
        .sum();
    ensure!(sum == ticks, "the handler's counters add up to {sum}, expected {ticks}");
    Ok(())
}

/// Starts or stops the clock.
fn set_timer(is_posix: bool, microseconds: i64) -> Outcome {
    static TIMER: AtomicUsize = AtomicUsize::new(usize::MAX);
    // SAFETY: plain calls with structures of our own.
    unsafe {
        if is_posix {
            if TIMER.load(Relaxed) == usize::MAX {
                let mut event: libc::sigevent = std::mem::zeroed();
                event.sigev_notify = libc::SIGEV_SIGNAL;
                event.sigev_signo = libc::SIGALRM;
                let mut timer: libc::timer_t = std::mem::zeroed();
                sys::ok(
                    "timer_create",
                    libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer).into(),
                )?;
                TIMER.store(timer as usize, Relaxed);
            }
            let step = libc::timespec { tv_sec: 0, tv_nsec: microseconds * 1000 };
            let value = libc::itimerspec { it_interval: step, it_value: step };
            let timer = TIMER.load(Relaxed) as libc::timer_t;
            sys::ok(
                "timer_settime",
                libc::timer_settime(timer, 0, &raw const value, std::ptr::null_mut()).into(),
            )?;
        } else {
            let step = libc::timeval { tv_sec: 0, tv_usec: microseconds };
            let value = libc::itimerval { it_interval: step, it_value: step };
            sys::ok(
                "setitimer",
                libc::setitimer(libc::ITIMER_REAL, &raw const value, std::ptr::null_mut()).into(),
            )?;
        }
    }
    Ok(())
}

fn timer(ctx: &Ctx, is_posix: bool) -> Outcome {
    handler_area(2048)?;
    sys::on_signal(libc::SIGALRM, tick, libc::SA_RESTART)?;
    set_timer(is_posix, 1000)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        area.check_all("area under a timer")?;
        area.scribble(&mut ctx.rng(round), 3);
        let child = process::fork(|| area.check_order("child under a timer", (0..area.len()).step_by(9)))?;
        process::succeed("child under a timer", child)?;
    }
    set_timer(is_posix, 0)?;
    process::nap(5);
    verdict(20)
}

extern "C" fn tick_on_altstack(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let here = &raw const signal as usize;
    STACKS.fetch_add(u64::from(here < BASE.load(Relaxed)), Relaxed);
    // A frame of 32 KiB: several cold pages of the stack.
    let mut frame = std::hint::black_box([0u8; 32 << 10]);
    for at in (0..frame.len()).step_by(512) {
        frame[at] = (at / 512) as u8;
    }
    if (0..frame.len()).step_by(512).any(|at| std::hint::black_box(&frame)[at] != (at / 512) as u8) {
        WRONG.fetch_add(1, Relaxed);
    }
    tick(signal, info, context);
}

fn altstack(ctx: &Ctx) -> Outcome {
    const STACK: usize = 64;
    handler_area(1024)?;
    let stack = sys::anon(STACK)?;
    // SAFETY: the stack is ours and stays.
    unsafe {
        let new = libc::stack_t { ss_sp: stack as *mut _, ss_flags: 0, ss_size: STACK * PAGE };
        sys::ok("sigaltstack", libc::sigaltstack(&raw const new, std::ptr::null_mut()).into())?;
    }
    sys::on_signal(libc::SIGALRM, tick_on_altstack, libc::SA_ONSTACK | libc::SA_RESTART)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let mut count = 0;
    for _ in ctx.rounds(2) {
        // A signal from time to time: the stack is cold when it comes.
        ballast.sweep()?;
        // SAFETY: to ourselves.
        unsafe { libc::raise(libc::SIGALRM) };
        count += 1;
        set_timer(false, 1000)?;
        area.check_all("area with a handler on another stack")?;
        set_timer(false, 0)?;
    }
    process::nap(5);
    verdict(count)
}

fn directed(ctx: &Ctx) -> Outcome {
    handler_area(1024)?;
    sys::on_signal(libc::SIGUSR1, tick, libc::SA_RESTART)?;
    let areas = Area::filled(ctx.seed, ctx.pages() * 3)?.split(2);
    let stop = AtomicBool::new(false);
    let ids = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let done = AtomicUsize::new(0);
    threads(3, |id| {
        if id == 2 {
            while !stop.load(Relaxed) {
                for thread in &ids {
                    let thread = thread.load(Relaxed);
                    if thread != 0 {
                        // SAFETY: the threads live until this one has seen `stop`... or longer: ids are cleared first.
                        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1) };
                    }
                }
                std::thread::sleep(std::time::Duration::from_micros(300));
            }
            return Ok(());
        }
        ids[id].store(sys::gettid() as usize, Relaxed);
        let until = Instant::now() + Duration::from_secs(60);
        let outcome = (|| {
            ctx.rounds(2).try_for_each(|_| areas[id].check_all("area of a thread under signals"))?;
            // On a busy machine the sender may get to run late.
            while TICKS.load(Relaxed) < 20 && Instant::now() < until {
                areas[id].check_all("area of a thread under signals")?;
            }
            Ok(())
        })();
        ids[id].store(0, Relaxed);
        if outcome.is_err() || done.fetch_add(1, Relaxed) == 1 {
            stop.store(true, Relaxed);
        }
        outcome
    })?;
    verdict(20)
}

static EXPECTED: AtomicUsize = AtomicUsize::new(0);
static CAUGHT: AtomicU64 = AtomicU64::new(0);

extern "C" fn open_page(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo.
    let at = unsafe { (*info).si_addr() } as usize;
    if at != EXPECTED.load(Relaxed) {
        WRONG.fetch_add(1, Relaxed);
        sys::default_signal(signal);
        return;
    }
    CAUGHT.fetch_add(1, Relaxed);
    // SAFETY: gives the page of the area its rights back.
    unsafe { libc::mprotect((at & !(PAGE - 1)) as *mut _, PAGE, sys::RW) };
}

fn segv(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    WRONG.store(0, Relaxed);
    sys::on_signal(libc::SIGSEGV, open_page, 0)?;
    sys::on_signal(libc::SIGBUS, open_page, 0)?;
    let mut wanted = 0;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        for page in (0..area.len()).step_by(16) {
            sys::protect(area.addr(page), 1, libc::PROT_NONE)?;
        }
        for page in 0..area.len() {
            if page % 16 == 0 {
                EXPECTED.store(area.addr(page) + 24, Relaxed);
                // SAFETY: the handler gives the rights back.
                unsafe { ((area.addr(page) + 24) as *const u8).read_volatile() };
                wanted += 1;
            }
            area.check(page)?;
        }
        let caught = CAUGHT.load(Relaxed);
        ensure!(caught == wanted, "{caught} SIGSEGV were caught, expected {wanted}");
        area.scribble(&mut ctx.rng(round), 3);
    }
    Ok(())
}

#[cfg(not(target_arch = "x86_64"))]
fn jump(_: &Ctx) -> Outcome {
    crate::harness::skip!("written for x86-64")
}

// A function that returns twice cannot be called from Rust; this one calls it and returns once: 0 when the byte could
// be read, 1 when the handler jumped.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".globl torture_try_read",
    "torture_try_read:",
    "push rbx",
    "mov rbx, rdi",
    "mov rdi, rsi",
    "mov esi, 1",
    "call __sigsetjmp@PLT",
    "test eax, eax",
    "jnz 2f",
    "mov al, [rbx]",
    "xor eax, eax",
    "pop rbx",
    "ret",
    "2:",
    "mov eax, 1",
    "pop rbx",
    "ret",
);

#[cfg(target_arch = "x86_64")]
unsafe extern "C" {
    fn torture_try_read(at: usize, buffer: *mut libc::c_void) -> i32;
    fn siglongjmp(buffer: *mut libc::c_void, value: i32) -> !;
}

#[cfg(target_arch = "x86_64")]
static BUFFER: AtomicUsize = AtomicUsize::new(0);

#[cfg(target_arch = "x86_64")]
extern "C" fn jump_out(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; the buffer was filled by the function that faulted.
    unsafe {
        WRONG.fetch_add(u64::from((*info).si_addr() as usize != EXPECTED.load(Relaxed)), Relaxed);
        siglongjmp(BUFFER.load(Relaxed) as *mut _, 1)
    }
}

#[cfg(target_arch = "x86_64")]
fn jump(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    WRONG.store(0, Relaxed);
    sys::on_signal(libc::SIGSEGV, jump_out, 0)?;
    // The jump buffer lies in memory that gets cold as well.
    BUFFER.store(sys::anon(1)? + 1024, Relaxed);
    for round in ctx.rounds(2) {
        for page in (0..area.len()).step_by(8) {
            sys::protect(area.addr(page), 1, libc::PROT_NONE)?;
        }
        ballast.sweep()?;
        for page in (0..area.len()).step_by(4) {
            EXPECTED.store(area.addr(page), Relaxed);
            // SAFETY: the buffer is large enough for a jmp_buf.
            let jumped = unsafe { torture_try_read(area.addr(page), BUFFER.load(Relaxed) as *mut _) };
            let wanted = i32::from(page % 8 == 0);
            ensure!(
                jumped == wanted,
                "page {page}: a read gave {jumped}, expected {wanted} (1 = SIGSEGV and jump)"
            );
        }
        ensure!(WRONG.load(Relaxed) == 0, "SIGSEGV came with a wrong address");
        sys::protect(area.base, area.len(), sys::RW)?;
        area.check_all("after jumps out of a handler")?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    Ok(())
}

/// With SA_RESTART, bare, neither call ever gives EINTR; a fault inside the call must not change that.
fn eintr(ctx: &Ctx) -> Outcome {
    handler_area(512)?;
    sys::on_signal(libc::SIGALRM, tick, libc::SA_RESTART)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let (reader, writer) = sys::pipe()?;
    set_timer(false, 700)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        for page in 0..area.len() - 8 {
            let at = area.addr(page);
            // SAFETY: a page of the area; a pipe holds 16 of them.
            let (put, got) =
                unsafe { (libc::write(writer, at as *const _, PAGE), libc::read(reader, at as *mut _, PAGE)) };
            ensure!(
                put == PAGE as isize && got == put,
                "page {page}: write gave {put}, read {got}: {}",
                std::io::Error::last_os_error()
            );
            if page % 64 == 0 {
                // SAFETY: a futex word whose value differs from the expected one: EAGAIN at once, never EFAULT or EINTR.
                let result =
                    unsafe { libc::syscall(libc::SYS_futex, at + 4092, libc::FUTEX_WAIT, 0x1357_9bdf, 0, 0, 0) };
                ensure!(
                    result == -1 && sys::errno() == libc::EAGAIN,
                    "futex gave {result}: {}",
                    std::io::Error::last_os_error()
                );
            }
        }
        area.check_all("through a pipe under a timer")?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    set_timer(false, 0)?;
    process::nap(5);
    verdict(10)
}

fn blocked(signal: i32) -> Res<libc::sigset_t> {
    // SAFETY: zeroed, then emptied and filled by libc.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        sys::ok(
            "pthread_sigmask",
            -i64::from(libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())),
        )?;
        Ok(set)
    }
}

/// A signal blocked in every thread of the program stays pending for `sigwait`: no other thread may take it.
fn waiting(ctx: &Ctx) -> Outcome {
    let set = blocked(libc::SIGUSR2)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    // SAFETY: the set is valid.
    let fd = sys::ok("signalfd", unsafe { libc::signalfd(-1, &raw const set, 0) }.into())? as i32;
    let info = sys::anon(2)? + PAGE - 64;
    for round in ctx.rounds(3) {
        // SAFETY: to our own process.
        unsafe { libc::kill(libc::getpid(), libc::SIGUSR2) };
        ballast.sweep()?;
        if round % 2 == 0 {
            let mut signal = 0;
            // SAFETY: as above.
            let error = unsafe { libc::sigwait(&raw const set, &raw mut signal) };
            ensure!(error == 0 && signal == libc::SIGUSR2, "sigwait gave {error}, signal {signal}");
        } else {
            let got = sys::read_full(fd, info, 128)?;
            // SAFETY: just read.
            let signal = unsafe { (info as *const u32).read_volatile() };
            ensure!(got == 128 && signal == libc::SIGUSR2 as u32, "signalfd gave {got} bytes, signal {signal}");
        }
        area.check_order("between signals", (0..area.len()).step_by(7))?;
    }
    sys::close(fd);
    Ok(())
}

fn stopped(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(1) {
        ballast.sweep()?;
        let child = process::fork(|| {
            area.writer = 1;
            for round in 0..3 {
                area.check_all("child that is stopped now and then")?;
                area.scribble(&mut ctx.rng(round), 3);
                ballast.sweep()?;
            }
            Ok(())
        })?;
        for pause in [3, 10, 20] {
            process::nap(5);
            process::kill(child, libc::SIGSTOP)?;
            process::nap(pause);
            area.check_order("parent of a stopped child", (0..area.len()).step_by(13))?;
            process::kill(child, libc::SIGCONT)?;
        }
        match process::wait(child)? {
            process::End::Exit(0) => {}
            end => bail!("the child stopped now and then ended with {end:?}"),
        }
        area.check_all("parent of a child that was stopped")?;
    }
    Ok(())
}
