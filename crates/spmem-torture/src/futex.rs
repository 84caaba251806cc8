//! Words that threads sleep on, and data the kernel hands back, in cold pages.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, ensure, skip, threads};
use crate::model::PAGE;
use crate::process;
use crate::sys;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};

pub const CASES: &[Case] = &[
    Case::new("futex-cold", "FUTEX_WAIT and WAKE on words in cold pages lose no wake-up", words),
    Case::new("futex-ops", "FUTEX_WAKE_OP, REQUEUE and PI on cold words", operations),
    Case::new("futex-condvar", "mutexes and condition variables in cold pages", condvars),
    Case::new("futex-fork", "futexes in memory shared with a child", shared),
    Case::new("epoll-cold", "epoll and eventfd hand their data to cold pages", epoll),
    Case::new("rseq", "restartable sequences of threads whose TLS got cold", rseq),
];

fn word<'a>(at: usize) -> &'a AtomicU32 {
    // SAFETY: mapped for the whole run, aligned, used as an atomic only.
    unsafe { AtomicU32::from_ptr(at as *mut u32) }
}

fn futex(at: usize, op: i32, value: u32) -> i64 {
    // SAFETY: the kernel reads the word.
    unsafe { libc::syscall(libc::SYS_futex, at, op, value, 0, 0, 0) }
}

fn wait(at: usize, value: u32) {
    while word(at).load(Ordering::Acquire) == value {
        futex(at, libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, value);
    }
}

fn wake(at: usize, value: u32) {
    word(at).store(value, Ordering::Release);
    futex(at, libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, u32::MAX >> 1);
}

/// Sixteen sleepers, each on a word in its own page; a page swept out under a sleeper must still wake it.
fn words(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 16;
    let base = sys::anon(COUNT)?;
    let mut ballast = Ballast::new(ctx)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let rounds = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let ballast = Mutex::new(&mut ballast);
    threads(COUNT + 1, |id| {
        if id < COUNT {
            let at = base + id * PAGE + id * 8;
            for value in 0.. {
                wait(at, value);
                if word(at).load(Ordering::Acquire) == u32::MAX {
                    return Ok(());
                }
                ensure!(
                    word(at).load(Ordering::Acquire) == value + 1,
                    "word {id} jumped to {}",
                    word(at).load(Ordering::Acquire)
                );
                rounds.fetch_add(1, Ordering::Relaxed);
            }
            return Ok(());
        }
        let mut value = 0;
        let outcome = (|| -> Outcome {
            for _ in ctx.rounds(2) {
                ballast.lock().map_or(Ok(()), |mut ballast| ballast.sweep())?;
                area.check_order("beside futexes", (0..area.len()).step_by(3))?;
                value += 1;
                for sleeper in 0..COUNT {
                    wake(base + sleeper * PAGE + sleeper * 8, value);
                }
                while rounds.load(Ordering::Relaxed) < u64::from(value) * COUNT as u64 {
                    process::nap(1);
                }
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        (0..COUNT).for_each(|sleeper| wake(base + sleeper * PAGE + sleeper * 8, u32::MAX));
        outcome
    })
}

fn operations(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let base = sys::anon(3)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    for round in ctx.rounds(3) {
        let (first, second, third) = (base + 100 * 4, base + PAGE, base + 2 * PAGE + 4092);
        word(first).store(5, Ordering::SeqCst);
        word(second).store(7, Ordering::SeqCst);
        word(third).store(0, Ordering::SeqCst);
        ballast.sweep()?;
        ballast.sweep()?;
        // FUTEX_WAKE_OP: second += 3 (op ADD), compared with 7 (cmp EQ).
        let operation = 1 << 28 | 3 << 12 | 7;
        // SAFETY: the kernel reads and writes the words.
        let result =
            unsafe { libc::syscall(libc::SYS_futex, first, libc::FUTEX_WAKE_OP, 1, 1, second, operation) };
        ensure!(result == 0, "FUTEX_WAKE_OP gave {result}: {}", std::io::Error::last_os_error());
        let found = word(second).load(Ordering::SeqCst);
        ensure!(found == 10, "FUTEX_WAKE_OP left {found} in a cold word, expected 10");
        ballast.sweep()?;
        // SAFETY: as above.
        let result = unsafe { libc::syscall(libc::SYS_futex, first, libc::FUTEX_CMP_REQUEUE, 1, 1, second, 5) };
        ensure!(result == 0, "FUTEX_CMP_REQUEUE gave {result}: {}", std::io::Error::last_os_error());
        let wrong = futex(first, libc::FUTEX_WAIT, 6);
        ensure!(wrong == -1 && sys::errno() == libc::EAGAIN, "FUTEX_WAIT for another value gave {wrong}");
        let result = futex(third, libc::FUTEX_LOCK_PI, 0);
        if result != 0 && sys::errno() == libc::ENOSYS {
            skip!("no FUTEX_LOCK_PI");
        }
        let owner = word(third).load(Ordering::SeqCst);
        ensure!(result == 0 && owner == sys::gettid() as u32, "FUTEX_LOCK_PI gave {result}, owner {owner}");
        ballast.sweep()?;
        let result = futex(third, libc::FUTEX_UNLOCK_PI, 0);
        let owner = word(third).load(Ordering::SeqCst);
        ensure!(result == 0 && owner == 0, "FUTEX_UNLOCK_PI gave {result}, owner {owner}");
        area.check_order("beside futexes", (round as usize % 5..area.len()).step_by(5))?;
    }
    Ok(())
}

/// A value, its bell, and room, so that each lies in pages of its own.
type Seat = (Mutex<u64>, Condvar, [u8; 8192]);

/// Seats far apart, handed round by four threads.
fn condvars(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 4;
    let mut ballast = Ballast::new(ctx)?;
    let slots: Vec<Box<Seat>> = (0..COUNT).map(|_| Box::new((Mutex::new(0), Condvar::new(), [0; 8192]))).collect();
    let steps = if ctx.time.as_secs() >= 3 { 20_000 } else { 5_000 };
    ballast.during(|| {
        threads(COUNT, |id| {
            for step in 1..=steps {
                {
                    let Ok(mine) = slots[id].0.lock() else { return Ok(()) };
                    let awaited = if id == 0 { step - 1 } else { step };
                    let Ok(mine) = slots[id].1.wait_while(mine, |value| *value < awaited) else { return Ok(()) };
                    ensure!(*mine == awaited, "the value went past: {} at step {awaited} of thread {id}", *mine);
                }
                let next = (id + 1) % COUNT;
                if let Ok(mut theirs) = slots[next].0.lock() {
                    *theirs += 1;
                }
                slots[next].1.notify_all();
            }
            Ok(())
        })
    })
}

fn shared(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let base = sys::map(0, 1, sys::RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS)?;
    for round in ctx.rounds(2) {
        word(base).store(0, Ordering::SeqCst);
        let child = process::fork(|| {
            area.writer = 1;
            for value in 0..3 {
                while word(base).load(Ordering::SeqCst) == value {
                    futex(base, libc::FUTEX_WAIT, value);
                }
                area.check_all("child woken by its parent")?;
                area.scribble(&mut ctx.rng(u64::from(value)), 4);
            }
            Ok(())
        })?;
        for value in 1..=3 {
            ballast.sweep()?;
            word(base).store(value, Ordering::SeqCst);
            futex(base, libc::FUTEX_WAKE, 1);
            area.check_order("parent that wakes its child", (0..area.len()).step_by(5))?;
        }
        process::succeed("child woken by its parent", child)?;
        area.scribble(&mut ctx.rng(round), 4);
    }
    Ok(())
}

fn epoll(ctx: &Ctx) -> Outcome {
    const COUNT: usize = 100;
    let mut ballast = Ballast::new(ctx)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let base = sys::anon(8)?;
    let at = base + PAGE - 7;
    // SAFETY: descriptors of our own; events go to mapped pages.
    unsafe {
        let poll = sys::ok("epoll_create1", libc::epoll_create1(libc::EPOLL_CLOEXEC).into())? as i32;
        let mut events = Vec::new();
        for number in 0..COUNT {
            let fd = sys::ok("eventfd", libc::eventfd(0, libc::EFD_CLOEXEC).into())? as i32;
            let mut event =
                libc::epoll_event { events: libc::EPOLLIN as u32, u64: number as u64 ^ 0xabcd_ef01_2345_6700 };
            sys::ok("epoll_ctl", libc::epoll_ctl(poll, libc::EPOLL_CTL_ADD, fd, &raw mut event).into())?;
            events.push(fd);
        }
        for round in ctx.rounds(3) {
            for &fd in &events {
                let one = 1u64 + round;
                sys::write_full(fd, &raw const one as usize, 8)?;
            }
            ballast.sweep()?;
            ballast.sweep()?;
            let got = libc::epoll_wait(poll, at as *mut _, COUNT as i32, 1000);
            ensure!(got == COUNT as i32, "epoll_wait gave {got}: {}", std::io::Error::last_os_error());
            let mut seen = [false; COUNT];
            for number in 0..COUNT {
                let event = (at as *const libc::epoll_event).add(number).read_unaligned();
                let index = (event.u64 ^ 0xabcd_ef01_2345_6700) as usize;
                ensure!(index < COUNT && !seen[index], "event {number} carries {:#x}", { event.u64 });
                seen[index] = true;
            }
            for &fd in &events {
                sys::read_full(fd, base + 4 * PAGE - 4, 8)?;
                let value = ((base + 4 * PAGE - 4) as *const u64).read_unaligned();
                ensure!(value == 1 + round, "eventfd gave {value}, expected {}", 1 + round);
            }
            area.check_order("beside epoll", (0..area.len()).step_by(5))?;
        }
        events.into_iter().chain([poll]).for_each(sys::close);
    }
    Ok(())
}

/// The kernel writes the processor's number into each thread's TLS when it is scheduled; a fault there that nobody
/// serves kills the process. The threads sleep until their TLS is cold, then run on, moved between processors.
fn rseq(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    ballast.during(|| {
        threads(12, |id| {
            let mut rng = ctx.rng(id as u64);
            for round in ctx.rounds(3) {
                process::nap(20 + rng.below(50) as u64);
                // SAFETY: plain calls; a set with both of the first two processors allowed in turn.
                unsafe {
                    let mut set: libc::cpu_set_t = std::mem::zeroed();
                    libc::CPU_SET((round % 2) as usize, &mut set);
                    // Fails where that processor does not exist: no matter.
                    libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
                    libc::sched_yield();
                    let cpu = libc::sched_getcpu();
                    ensure!((0..4096).contains(&cpu), "sched_getcpu (from rseq) gave {cpu}");
                }
                area.check_order("thread with a cold TLS", (id..area.len()).step_by(50))?;
            }
            Ok(())
        })
    })
}
