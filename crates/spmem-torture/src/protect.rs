//! mprotect of cold ranges: rights change, bytes do not, and forbidden accesses still get their signal.

use crate::area::{Area, Ballast, State};
use crate::harness::{Case, Ctx, Outcome, ensure, threads};
use crate::model::PAGE;
use crate::sys::{self, RW};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

pub const CASES: &[Case] = &[
    Case::new("protect-read", "cold read-only pages read right and refuse writes", read_only),
    Case::new("protect-none", "cold pages without rights refuse reads and come back whole", none),
    Case::new("protect-cycle", "rights that go round and round keep the bytes", cycle),
    Case::new("protect-barrier", "a garbage collector's write barrier counts every first write", barrier),
    Case::new("protect-many", "two thousand mappings of alternating rights keep their bytes", alternate),
    Case::new("protect-race", "threads that change rights of their ranges at once do not meet", race),
    Case::new("protect-guard", "PROT_NONE reservations committed piece by piece are zero, then keep", reservation),
];

static FROM: AtomicUsize = AtomicUsize::new(0);
static TO: AtomicUsize = AtomicUsize::new(0);
static FAULTS: AtomicUsize = AtomicUsize::new(0);

/// Gives the page its rights back and counts; any other address is fatal.
extern "C" fn allow(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; mprotect is safe in a handler.
    unsafe {
        let at = (*info).si_addr() as usize & !(PAGE - 1);
        let is_ours = (FROM.load(Relaxed)..TO.load(Relaxed)).contains(&at);
        if !is_ours || (*info).si_code != 2 {
            let text = b"torture: unexpected SIGSEGV outside the protected range\n";
            libc::write(2, text.as_ptr().cast(), text.len());
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        FAULTS.fetch_add(1, Relaxed);
        libc::mprotect(at as *mut _, PAGE, RW);
    }
}

fn watch(area: &Area) -> Outcome {
    FROM.store(area.base, Relaxed);
    TO.store(area.addr(area.len()), Relaxed);
    FAULTS.store(0, Relaxed);
    sys::on_signal(libc::SIGSEGV, allow, 0)
}

fn refuse(ctx: &Ctx, prot: i32, every: usize) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        sys::protect(area.base, area.len(), prot)?;
        ballast.sweep()?;
        if prot == libc::PROT_READ {
            area.check_all("read-only range")?;
            ballast.sweep()?;
        }
        watch(&area)?;
        let mut count = 0;
        for page in (0..area.len()).step_by(every) {
            if prot == libc::PROT_READ {
                area.write(page)
            } else {
                area.check(page)?
            }
            count += 1;
        }
        let faults = FAULTS.load(Relaxed);
        ensure!(faults == count, "{faults} SIGSEGV came, expected {count} (round {round}, rights {prot})");
        sys::protect(area.base, area.len(), RW)?;
        area.check_all("range with all its rights again")?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    Ok(())
}

fn read_only(ctx: &Ctx) -> Outcome {
    refuse(ctx, libc::PROT_READ, 13)
}

fn none(ctx: &Ctx) -> Outcome {
    refuse(ctx, libc::PROT_NONE, 29)
}

fn cycle(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut rng = ctx.rng(0);
    for _ in ctx.rounds(2) {
        for prot in [libc::PROT_READ, RW, libc::PROT_NONE, libc::PROT_READ, libc::PROT_NONE, RW] {
            let from = rng.below(area.len());
            let pages = rng.between(1, area.len() - from + 1);
            sys::protect(area.addr(from), pages, prot)?;
            if prot != libc::PROT_NONE {
                area.check_order("piece with new rights", (from..from + pages).step_by(3))?;
            }
            ballast.sweep()?;
            sys::protect(area.base, area.len(), RW)?;
        }
        area.check_all("after a cycle of rights")?;
        area.scribble(&mut rng, 3);
    }
    Ok(())
}

fn barrier(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        sys::protect(area.base, area.len(), libc::PROT_READ)?;
        watch(&area)?;
        let mut rng = ctx.rng(round);
        let mut dirty = vec![false; area.len()];
        for _ in 0..2000.min(area.len()) {
            let page = rng.below(area.len());
            area.poke(page);
            dirty[page] = true;
        }
        let (count, faults) = (dirty.iter().filter(|d| **d).count(), FAULTS.load(Relaxed));
        ensure!(faults == count, "the write barrier saw {faults} first writes, expected {count}");
        sys::protect(area.base, area.len(), RW)?;
        area.check_all("after a write barrier")?;
    }
    Ok(())
}

fn alternate(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let count = 4000.min(area.len());
    for round in ctx.rounds(2) {
        let odd = round as usize % 2;
        for page in (odd..count).step_by(2) {
            sys::protect(area.addr(page), 1, if page % 4 < 2 { libc::PROT_READ } else { libc::PROT_NONE })?;
            if page % 4 >= 2 {
                area.expect(page..page + 1, State::Gone);
            }
        }
        ballast.sweep()?;
        area.check_all("mappings of alternating rights")?;
        ballast.sweep()?;
        sys::protect(area.base, area.len(), RW)?;
        area.expect(0..count, State::Known);
        area.check_all("alternating rights removed")?;
        area.scribble(&mut ctx.rng(round), 2);
    }
    Ok(())
}

fn race(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    ballast.during(|| {
        threads(3, |id| {
            let mut rng = ctx.rng(id as u64);
            let mut area = Area::filled(ctx.seed + id as u64, ctx.pages() / 3)?;
            for _ in ctx.rounds(2) {
                for _ in 0..20 {
                    let from = rng.below(area.len() - 30);
                    sys::protect(area.addr(from), 30, libc::PROT_READ)?;
                    area.check_order("read-only piece", from..from + 30)?;
                    sys::protect(area.addr(from), 30, libc::PROT_NONE)?;
                    sys::protect(area.addr(from), 30, RW)?;
                    for page in from..from + 30 {
                        area.poke(page);
                    }
                }
                area.check_all("range of a thread that changes rights")?;
            }
            Ok(())
        })
    })
}

fn reservation(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        let pages = ctx.pages();
        let mut area = Area::at(sys::map(0, pages, libc::PROT_NONE, sys::ANON)?, ctx.seed + round, pages);
        let mut ready = 0;
        while ready < pages {
            let step = 512.min(pages - ready);
            sys::protect(area.addr(ready), step, RW)?;
            area.check_order("newly committed memory", ready..ready + step)?;
            for page in ready..ready + step {
                area.write(page);
            }
            ready += step;
            if ready % 8192 == 0 {
                ballast.sweep()?;
            }
        }
        ballast.sweep()?;
        area.check_all("reservation, all committed")?;
        // Decommit as allocators do: drop and forbid, then use again.
        let half = pages / 2;
        sys::advise(area.base, half, libc::MADV_DONTNEED)?;
        sys::protect(area.base, half, libc::PROT_NONE)?;
        ballast.sweep()?;
        sys::protect(area.base, half, RW)?;
        area.zeroed(0..half);
        area.check_all("reservation, half of it decommitted")?;
        sys::unmap(area.base, pages)?;
    }
    Ok(())
}
