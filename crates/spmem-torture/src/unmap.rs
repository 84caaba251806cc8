//! Taking memory away: cold pages of an unmapped range must never come back into what is mapped there next.

use crate::area::{Area, Ballast, State, check_zero};
use crate::harness::{Case, Ctx, Outcome, all, ensure, join, threads};
use crate::model::PAGE;
use crate::sys::{self, ANON, RW};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

pub const CASES: &[Case] = &[
    Case::new("unmap-whole", "a range that comes at the address of a cold one is zero", whole),
    Case::new("unmap-holes", "holes in a cold range leave the neighbours intact", holes),
    Case::new("unmap-ends", "cutting a cold range at both ends leaves the middle intact", ends),
    Case::new("map-fixed", "MAP_FIXED over cold pages gives zeros and leaves the neighbours", |ctx| {
        over(ctx, true)
    }),
    Case::new("map-noreplace", "MAP_FIXED_NOREPLACE into a hole of a cold range gives zeros", |ctx| {
        over(ctx, false)
    }),
    Case::new("map-fixed-file", "a file mapped over cold pages shows the file", file_over),
    Case::new("unmap-race", "threads that map, fill, check and unmap at once do not meet", race),
    Case::new("unmap-under-readers", "unmapping one range while threads fault in its neighbour", under_readers),
    Case::new("map-churn", "the same address mapped and unmapped a thousand times is zero each time", churn),
    Case::new("unmap-many", "one munmap over many mappings, cold and hot", many),
    Case::new("unmap-shmat", "SHM_REMAP over cold pages, and new memory there later", shmat),
];

fn whole(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        let area = Area::filled(ctx.seed + round, ctx.pages())?;
        ballast.sweep()?;
        if round % 2 == 0 {
            area.check_order("before its unmapping", (0..area.len()).step_by(3))?;
        }
        sys::unmap(area.base, area.len())?;
        let again = sys::map(area.base, area.len(), RW, ANON | libc::MAP_FIXED_NOREPLACE)?;
        ensure!(again == area.base, "mapped at {again:#x}, asked for {:#x}", area.base);
        check_zero("mapped where a cold range was", again, area.len())?;
        let mut next = Area::at(again, ctx.seed - 1, area.len());
        next.write_all();
        ballast.sweep()?;
        next.check_all("second use of the address")?;
        sys::unmap(again, next.len())?;
    }
    Ok(())
}

fn holes(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let mut cuts = Vec::new();
        for _ in 0..60 {
            let from = rng.below(area.len());
            let to = (from + rng.between(1, 200)).min(area.len());
            sys::unmap(area.addr(from), to - from)?;
            area.expect(from..to, State::Gone);
            cuts.push((from, to));
        }
        area.check_all("what is left around the holes")?;
        ballast.sweep()?;
        for (from, to) in cuts {
            sys::map(area.addr(from), to - from, RW, ANON | libc::MAP_FIXED)?;
            area.zeroed(from..to);
        }
        area.check_all("holes filled by new mappings")?;
        area.scribble(&mut rng, 2);
    }
    Ok(())
}

fn ends(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    for round in ctx.rounds(2) {
        let mut area = Area::filled(ctx.seed + round, ctx.pages())?;
        ballast.sweep()?;
        while area.len() > 64 {
            let cut = rng.between(1, area.len() / 2);
            let tail = area.split_off(area.len() - cut);
            let outcome = tail.check_order("an end about to be unmapped", (0..cut).step_by(17));
            sys::unmap(tail.base, cut)?;
            outcome?;
            let cut = rng.between(1, area.len() / 2);
            let rest = area.split_off(cut);
            sys::unmap(area.base, cut)?;
            area = rest;
            area.check_all("the middle")?;
        }
        sys::unmap(area.base, area.len())?;
    }
    Ok(())
}

fn over(ctx: &Ctx, is_fixed: bool) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        for _ in 0..80 {
            let from = rng.below(area.len());
            let to = (from + rng.between(1, 700)).min(area.len());
            let at = area.addr(from);
            if is_fixed {
                sys::map(at, to - from, RW, ANON | libc::MAP_FIXED)?;
            } else {
                sys::unmap(at, to - from)?;
                sys::map(at, to - from, RW, ANON | libc::MAP_FIXED_NOREPLACE)?;
            }
            area.zeroed(from..to);
            if rng.one_in(2) {
                check_zero("new mapping over cold pages", at, to - from)?;
            } else {
                area.write(from);
                area.check(to - 1)?;
            }
        }
        ballast.sweep()?;
        area.check_all("after mapping over")?;
        area.scribble(&mut rng, 2);
    }
    Ok(())
}

fn file_over(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let fd = sys::temp_file(0)?;
    let letters = vec![b'f'; 64 * PAGE];
    sys::write_full(fd, letters.as_ptr() as usize, letters.len())?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        for _ in 0..20 {
            let from = rng.below(area.len() - 64);
            let kind = if round % 2 == 0 { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
            sys::map_file(area.addr(from), 64, libc::PROT_READ, kind | libc::MAP_FIXED, fd)?;
            // SAFETY: just mapped.
            let found = unsafe { std::slice::from_raw_parts(area.addr(from) as *const u8, letters.len()) };
            ensure!(found == letters, "a file mapped at {:#x} over cold pages does not show", area.addr(from));
            sys::map(area.addr(from), 64, RW, ANON | libc::MAP_FIXED)?;
            area.zeroed(from..from + 64);
        }
        area.check_all("after files came and went")?;
        area.scribble(&mut rng, 2);
    }
    sys::close(fd);
    Ok(())
}

fn race(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let outcome = ballast.during(|| {
        threads(3, |id| {
            let mut rng = ctx.rng(id as u64);
            let mut held: Vec<Area> = Vec::new();
            for round in ctx.rounds(2) {
                for step in 0..30u64 {
                    let pages = rng.between(1, ctx.pages() / 16);
                    let fresh = sys::anon(pages)?;
                    check_zero("fresh mapping", fresh, pages)?;
                    let mut area = Area::at(fresh, ctx.seed ^ (round << 32 | step << 8 | id as u64), pages);
                    area.write_all();
                    held.push(area);
                    if held.len() > 5 {
                        let area = held.swap_remove(rng.below(held.len()));
                        area.check_all("range about to be unmapped")?;
                        sys::unmap(area.base, area.len())?;
                    }
                }
            }
            held.iter().try_for_each(|area| area.check_all("range that stays"))
        })
    });
    outcome.and_then(|()| ballast.sweep())
}

fn under_readers(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        let mut area = Area::filled(ctx.seed + round, ctx.pages())?;
        let mut victim = area.split_off(area.len() / 2);
        ballast.sweep()?;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut result = Ok(());
                while result.is_ok() && !stop.load(Relaxed) {
                    result = area.check_order("neighbour of a vanishing range", (0..area.len()).rev());
                }
                result
            });
            let outcome = (|| -> Outcome {
                while victim.len() > 40 {
                    let tail = victim.split_off(victim.len() - 40);
                    sys::unmap(tail.base, tail.len())?;
                    victim.check(victim.len() - 1)?;
                }
                sys::unmap(victim.base, victim.len())
            })();
            stop.store(true, Relaxed);
            all([outcome, join(reader)])
        })?;
        area.check_all("neighbour of a vanished range")?;
        sys::unmap(area.base, area.len())?;
    }
    Ok(())
}

fn churn(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let place = sys::map(0, 300, libc::PROT_NONE, ANON)?;
    let mut rng = ctx.rng(0);
    ballast.during(|| {
        for round in ctx.rounds(300) {
            let pages = rng.between(1, 300);
            sys::map(place, pages, RW, ANON | libc::MAP_FIXED)?;
            check_zero("churned mapping", place, pages)?;
            let mut area = Area::at(place, ctx.seed + round, pages);
            area.write_all();
            if rng.one_in(4) {
                crate::process::nap(2);
            }
            area.check_all("churned mapping, filled")?;
            sys::unmap(place, pages)?;
        }
        Ok(())
    })
}

fn many(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        let mut area = Area::filled(ctx.seed + round, ctx.pages())?;
        for page in (0..area.len()).step_by(16) {
            sys::protect(area.addr(page), 1, libc::PROT_READ)?;
        }
        ballast.sweep()?;
        area.check_order("before the one munmap", (0..area.len()).step_by(5))?;
        let (from, to) = (area.len() / 8, area.len() - area.len() / 8);
        sys::unmap(area.addr(from), to - from)?;
        area.expect(from..to, State::Gone);
        sys::map(area.addr(from), to - from, RW, ANON | libc::MAP_FIXED_NOREPLACE)?;
        area.zeroed(from..to);
        area.check_all("one munmap over many mappings")?;
        sys::unmap(area.base, area.len())?;
    }
    Ok(())
}

fn shmat(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let quarter = ctx.pages() / 4;
    for round in ctx.rounds(2) {
        let mut area = Area::at(sys::anon_huge(4 * quarter)?, ctx.seed + round, 4 * quarter);
        area.write_all();
        ballast.sweep()?;
        ballast.sweep()?;
        let at = area.addr(quarter);
        // SAFETY: the range is ours, and given up.
        let found = unsafe {
            let id = libc::shmget(libc::IPC_PRIVATE, quarter * PAGE, libc::IPC_CREAT | 0o600);
            let found = libc::shmat(id, at as *const _, libc::SHM_REMAP);
            libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut());
            found
        };
        if found as usize != at {
            crate::harness::skip!("shmat: {}", std::io::Error::last_os_error());
        }
        area.zeroed(quarter..2 * quarter);
        area.check_all("around a shared segment")?;
        (quarter..2 * quarter).for_each(|page| area.write(page));
        ballast.sweep()?;
        area.check_all("with a shared segment inside")?;
        // SAFETY: attached above.
        sys::ok("shmdt", unsafe { libc::shmdt(found) }.into())?;
        sys::map(at, quarter, sys::RW, sys::ANON | libc::MAP_FIXED)?;
        area.zeroed(quarter..2 * quarter);
        area.check_all("new memory where a shared segment was")?;
        (quarter..2 * quarter).for_each(|page| area.write(page));
        ballast.sweep()?;
        ballast.sweep()?;
        area.check_all("pages written where a shared segment was")?;
        sys::unmap(area.base, area.len())?;
    }
    Ok(())
}
