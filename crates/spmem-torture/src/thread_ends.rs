//! How threads end. The kernel clears the thread's id in its control block, and walks its robust list, when the
//! thread is already exiting: a fault at that point is not served by userfaultfd, so those pages must not be away.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, bail, ensure};
use crate::model::PAGE;
use crate::process::{self, End};
use crate::sys;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};

pub const CASES: &[Case] = &[
    Case::new("thread-churn", "five thousand short threads are all joined", churn),
    Case::new("thread-cold-end", "threads that slept until their control block was cold are joined", cold_end),
    Case::new("thread-detached", "detached threads end and their stacks are used again", detached),
    Case::new("thread-cancel", "threads cancelled while they wait on a cold semaphore are joined", cancel),
    Case::new("thread-main-exits", "the process goes on when its first thread has gone", main_exits),
    Case::new(
        "thread-pthread-exit",
        "pthread_exit from the first thread, others end the process",
        pthread_exit_main,
    ),
    Case::new("thread-robust", "a robust mutex in a cold page is handed on when its owner dies", |ctx| {
        robust(ctx, by_attributes)
    }),
    Case::new("thread-robust-static", "the same of PTHREAD_ROBUST_MUTEX_INITIALIZER_NP", |ctx| {
        robust(ctx, by_initialiser)
    }),
    Case::new("thread-exit-group", "exit() while other threads fault", exit_group),
];

fn churn(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let count = AtomicUsize::new(0);
    ballast.during(|| {
        // 5,000 in the normal run, fewer when the time is short.
        let wanted = if ctx.time.as_secs() >= 3 { 5000 } else { 1000 };
        for start in (0..wanted).step_by(5) {
            std::thread::scope(|scope| {
                let running: Vec<_> = (0..5)
                    .map(|id| {
                        let (area, count) = (&area, &count);
                        scope.spawn(move || {
                            count.fetch_add(1, Relaxed);
                            area.check((start + id) * 17 % area.len())
                        })
                    })
                    .collect();
                crate::harness::all(running.into_iter().map(crate::harness::join))
            })?;
        }
        let ran = count.load(Relaxed);
        ensure!(ran == wanted, "{ran} threads ran, expected {wanted}");
        Ok(())
    })
}

/// The threads wait in `read` on a pipe in the middle of nothing, so that stack, TLS and control block get cold; then
/// they end without touching much of it: the kernel's write of the cleared id is the first access to that page.
fn cold_end(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 64;
    extern "C" fn wait_and_leave(fd: *mut libc::c_void) -> *mut libc::c_void {
        let mut byte = 0u8;
        // SAFETY: reads one byte, then ends only this thread, past libc.
        unsafe {
            libc::read(fd as i32, (&raw mut byte).cast(), 1);
            if fd as usize >> 32 == 1 {
                libc::syscall(libc::SYS_exit, 0);
            }
        }
        fd
    }
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        let (reader, writer) = sys::pipe()?;
        let raw = (round % 2) << 32;
        let mut ids = Vec::new();
        for _ in 0..COUNT {
            let mut id: libc::pthread_t = 0;
            // SAFETY: the function takes a number, not a pointer.
            let error = unsafe {
                libc::pthread_create(
                    &raw mut id,
                    std::ptr::null(),
                    wait_and_leave,
                    (raw as usize | reader as usize) as *mut _,
                )
            };
            ensure!(error == 0, "pthread_create: {}", std::io::Error::from_raw_os_error(error));
            ids.push(id);
        }
        process::nap(20);
        ballast.sweep()?;
        ballast.sweep()?;
        sys::write_full(writer, [0u8; COUNT].as_ptr() as usize, COUNT)?;
        for id in ids {
            // SAFETY: each thread is joined once.
            let error = unsafe { libc::pthread_join(id, std::ptr::null_mut()) };
            ensure!(error == 0, "pthread_join: {}", std::io::Error::from_raw_os_error(error));
        }
        sys::close(reader);
        sys::close(writer);
        area.check_all("after threads ended cold")?;
    }
    Ok(())
}

fn detached(ctx: &Ctx) -> Outcome {
    let area = std::sync::Arc::new(Area::filled(ctx.seed, ctx.pages())?);
    let mut ballast = Ballast::new(ctx)?;
    let done = std::sync::Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
    ballast.during(|| {
        let mut started = 0;
        for _ in ctx.rounds(5) {
            for _ in 0..40u32 {
                let (area, done) = (area.clone(), done.clone());
                let page = started as usize * 31 % area.len();
                started += 1;
                std::thread::spawn(move || {
                    if !area.is_right(page) {
                        done[1].fetch_add(1, Relaxed);
                    }
                    done[0].fetch_add(1, Relaxed);
                });
            }
            while done[0].load(Relaxed) < started {
                process::nap(1);
            }
        }
        let wrong = done[1].load(Relaxed);
        ensure!(wrong == 0, "{wrong} detached threads saw a wrong page");
        Ok(())
    })
}

unsafe extern "C" {
    fn sem_wait(semaphore: *mut libc::sem_t) -> libc::c_int;
    fn pthread_cancel(thread: libc::pthread_t) -> libc::c_int;
}

/// The thread's function is `sem_wait` itself, so that no Rust frame has to be unwound when it is cancelled.
fn cancel(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let semaphore = sys::anon(1)? as *mut libc::sem_t;
    // SAFETY: zeroed memory of the right size; the function's type differs only in its result.
    let start: extern "C" fn(*mut libc::c_void) -> *mut libc::c_void = unsafe {
        libc::sem_init(semaphore, 0, 0);
        std::mem::transmute(sem_wait as *const ())
    };
    for _ in ctx.rounds(2) {
        let mut ids = Vec::new();
        for _ in 0..32 {
            let mut id: libc::pthread_t = 0;
            // SAFETY: the semaphore outlives the threads.
            let error = unsafe { libc::pthread_create(&raw mut id, std::ptr::null(), start, semaphore.cast()) };
            ensure!(error == 0, "pthread_create: {}", std::io::Error::from_raw_os_error(error));
            ids.push(id);
        }
        process::nap(10);
        ballast.sweep()?;
        for (number, &id) in ids.iter().enumerate() {
            // SAFETY: the thread is there, cancelled or woken once.
            let error = unsafe { if number % 2 == 0 { pthread_cancel(id) } else { libc::sem_post(semaphore) } };
            ensure!(error == 0, "cancel or post gave {error}");
        }
        for _ in &ids {
            // A post may have woken one that was cancelled before it saw that: enough for everyone.
            // SAFETY: as above.
            unsafe { libc::sem_post(semaphore) };
        }
        for &id in &ids {
            // SAFETY: each is joined once.
            let error = unsafe { libc::pthread_join(id, std::ptr::null_mut()) };
            ensure!(error == 0, "pthread_join: {}", std::io::Error::from_raw_os_error(error));
        }
        // SAFETY: nobody waits.
        unsafe { libc::sem_init(semaphore, 0, 0) };
        area.check_order("after cancelled threads", (0..area.len()).step_by(3))?;
    }
    Ok(())
}

/// In a child: a thread goes on after the first thread has ended, and ends the process with its verdict.
fn without_first(ctx: &Ctx, leave: fn() -> !) -> Outcome {
    for _ in ctx.rounds(1) {
        let child = process::fork(|| {
            let ctx = ctx.clone();
            std::thread::spawn(move || {
                let outcome = (|| -> Outcome {
                    process::nap(20);
                    let mut area = Area::filled(ctx.seed, ctx.pages())?;
                    let mut ballast = Ballast::new(&ctx)?;
                    for round in 0..3 {
                        ballast.sweep()?;
                        area.check_all("process without its first thread")?;
                        area.scribble(&mut ctx.rng(round), 3);
                    }
                    let child = process::fork(|| area.check_all("child of a process without its first thread"))?;
                    process::succeed("child of a process without its first thread", child)
                })();
                process::leave(process::verdict(outcome));
            });
            leave()
        })?;
        process::succeed("process without its first thread", child)?;
    }
    Ok(())
}

fn main_exits(ctx: &Ctx) -> Outcome {
    without_first(ctx, || {
        // SAFETY: ends this thread only.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
        unreachable!("SYS_exit returned")
    })
}

// pthread_exit unwinds. A frame without unwind information ends that at once, before a Rust frame is met.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".globl torture_pthread_exit",
    "torture_pthread_exit:",
    "sub rsp, 8",
    "xor edi, edi",
    "call pthread_exit@PLT",
    "ud2",
);

#[cfg(target_arch = "x86_64")]
fn pthread_exit_main(ctx: &Ctx) -> Outcome {
    unsafe extern "C" {
        fn torture_pthread_exit() -> !;
    }
    // SAFETY: nothing on this stack is needed any more.
    without_first(ctx, || unsafe { torture_pthread_exit() })
}

#[cfg(not(target_arch = "x86_64"))]
fn pthread_exit_main(_: &Ctx) -> Outcome {
    crate::harness::skip!("written for x86-64")
}

/// Makes a robust mutex in zeroed memory.
type Make = fn(*mut libc::pthread_mutex_t) -> Outcome;

fn by_attributes(mutex: *mut libc::pthread_mutex_t) -> Outcome {
    // SAFETY: mapped zeroed memory, large enough.
    unsafe {
        let mut attributes: libc::pthread_mutexattr_t = std::mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut attributes);
        libc::pthread_mutexattr_setrobust(&raw mut attributes, libc::PTHREAD_MUTEX_ROBUST);
        let error = libc::pthread_mutex_init(mutex, &raw const attributes);
        ensure!(error == 0, "pthread_mutex_init gave {error}");
    }
    Ok(())
}

/// No function is called: the C library learns of it when it is locked.
fn by_initialiser(mutex: *mut libc::pthread_mutex_t) -> Outcome {
    /// As pthread.h has it; the number is glibc's PTHREAD_MUTEX_ROBUST_NORMAL_NP.
    const KIND: i32 = 16;
    // SAFETY: mapped memory, large enough; the kind follows four words.
    unsafe { mutex.cast::<i32>().wrapping_add(4).write(KIND) };
    Ok(())
}

/// The functions that lock, in turn.
unsafe fn lock(mutex: *mut libc::pthread_mutex_t, number: usize) -> i32 {
    unsafe extern "C" {
        fn pthread_mutex_clocklock(
            mutex: *mut libc::pthread_mutex_t,
            clock: libc::clockid_t,
            until: *const libc::timespec,
        ) -> i32;
    }
    let until = libc::timespec { tv_sec: 4_000_000_000, tv_nsec: 0 };
    // SAFETY: the caller's mutex.
    unsafe {
        match number % 4 {
            0 => libc::pthread_mutex_lock(mutex),
            1 => libc::pthread_mutex_trylock(mutex),
            2 => libc::pthread_mutex_timedlock(mutex, &raw const until),
            _ => pthread_mutex_clocklock(mutex, libc::CLOCK_MONOTONIC, &raw const until),
        }
    }
}

/// Mutexes get cold, owners lock them, each in pages of its own, and sleep until these would be cold again, then die holding
/// them. A mutex may lie across two pages.
fn robust(ctx: &Ctx, make: Make) -> Outcome {
    const COUNT: usize = 16;
    const APART: usize = 8;
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut beside = Area::filled(ctx.seed + 1, COUNT * APART)?;
    for round in ctx.rounds(1) {
        let at = |number: usize| {
            beside.addr(number * APART + 4) + if number.is_multiple_of(2) { 256 } else { PAGE - 24 }
        };
        let mutexes: Vec<usize> = (0..COUNT).map(at).collect();
        for &mutex in &mutexes {
            let mutex = mutex as *mut libc::pthread_mutex_t;
            // SAFETY: pages of ours, large enough.
            unsafe { mutex.write_bytes(0, 1) };
            make(mutex)?;
        }
        ballast.sweep()?;
        ballast.sweep()?;
        let (reader, writer) = sys::pipe()?;
        let running: Vec<_> = mutexes
            .iter()
            .enumerate()
            .map(|(number, &mutex)| {
                std::thread::spawn(move || {
                    let mut byte = 0u8;
                    // SAFETY: the mutex was initialised; the thread ends holding it.
                    unsafe {
                        let error = lock(mutex as *mut _, number);
                        libc::read(reader, (&raw mut byte).cast(), 1);
                        error
                    }
                })
            })
            .collect();
        process::nap(20);
        ballast.sweep()?;
        ballast.sweep()?;
        sys::write_full(writer, [0u8; COUNT].as_ptr() as usize, COUNT)?;
        for thread in running {
            match thread.join() {
                Ok(0) => {}
                Ok(error) => bail!("an owner got its mutex with {error}"),
                Err(_) => bail!("an owner panicked"),
            }
        }
        for (number, &mutex) in mutexes.iter().enumerate() {
            let mutex = mutex as *mut libc::pthread_mutex_t;
            // A lock that waits for ever would end the case only by its limit.
            // SAFETY: initialised, its owner is dead.
            let error = unsafe { libc::pthread_mutex_trylock(mutex) };
            ensure!(error == libc::EOWNERDEAD, "mutex {number} in a cold page gave {error}, expected EOWNERDEAD");
            // SAFETY: now ours.
            unsafe {
                libc::pthread_mutex_consistent(mutex);
                libc::pthread_mutex_unlock(mutex);
                libc::pthread_mutex_destroy(mutex);
            }
        }
        sys::close(reader);
        sys::close(writer);
        area.check_all("far from robust mutexes")?;
        for number in 0..COUNT {
            let first = number * APART;
            beside.check_order("beside robust mutexes", (first..first + 4).chain(first + 6..first + APART))?;
        }
        area.scribble(&mut ctx.rng(round), 2);
        beside.write_all();
    }
    Ok(())
}

fn exit_group(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(3) {
        ballast.sweep()?;
        let child = process::fork(|| {
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        loop {
                            if process::verdict(area.check_all("thread of a process that exits")) != 0 {
                                process::leave(1);
                            }
                        }
                    });
                }
                process::nap(round % 20);
                // SAFETY: ends the process while its threads fault.
                unsafe { libc::exit(3) }
            })
        })?;
        process::ends("child that exits amid faults", child, End::Exit(3))?;
        area.check_order("parent of a child that exits", (0..area.len()).step_by(3))?;
    }
    Ok(())
}
