//! mremap of cold ranges: pages that are away follow the mapping to its new address.

use crate::area::{Area, Ballast, check_zero};
use crate::harness::{Case, Ctx, Outcome, Res, all, ensure, join, threads};
use crate::sys::{self, ANON, RW};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

pub const CASES: &[Case] = &[
    Case::new("remap-grow", "a cold range grown (moved or not) keeps its bytes, the new part is zero", grow),
    Case::new("remap-shrink", "a cold range shrunk keeps its head", shrink),
    Case::new("remap-move", "a cold range moved keeps its bytes; its old place is free", moves),
    Case::new("remap-pieces", "pieces cut out of a cold range and moved keep their bytes", pieces),
    Case::new("remap-fixed", "MREMAP_FIXED over another cold range replaces it", fixed),
    Case::new("remap-border", "a range of which a part is new and the rest cold moves as one", border),
    Case::new("remap-dontunmap", "MREMAP_DONTUNMAP moves the pages and leaves zeros", dontunmap),
    Case::new("remap-in-a-row", "ranges moved twice at once, the second time with MREMAP_DONTUNMAP", in_a_row),
    Case::new("remap-swap", "two cold ranges that change places keep their bytes", swap),
    Case::new("remap-race", "threads that remap their ranges at once do not meet", race),
    Case::new("remap-under-readers", "moving one range while threads fault in its neighbour", under_readers),
    Case::new("remap-fork", "a child sees ranges that were moved while cold", with_fork),
];

/// Reserves address space: a place to move to.
fn place(pages: usize) -> Res<usize> {
    sys::map(0, pages, libc::PROT_NONE, ANON)
}

fn move_to(area: &mut Area, to: usize) -> Outcome {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let got = sys::remap(area.base, area.len(), area.len(), flags, to)?;
    ensure!(got == to, "mremap to {to:#x} went to {got:#x}");
    area.base = to;
    Ok(())
}

fn grow(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        let mut area = Area::filled(ctx.seed + round, ctx.pages() / 4)?;
        // A neighbour right behind forces every other growth to move.
        while area.len() < ctx.pages() {
            ballast.sweep()?;
            let (old, new) = (area.len(), area.len() * 2);
            let wall = sys::map(area.addr(old), 1, libc::PROT_NONE, ANON | libc::MAP_FIXED_NOREPLACE);
            area.base = sys::remap(area.base, old, new, libc::MREMAP_MAYMOVE, 0)?;
            check_zero("the grown part", area.addr(old), new - old)?;
            area.check_all("kept part of a grown range")?;
            let mut tail = Area::at(area.addr(old), ctx.seed, new - old);
            area.model.append(&mut tail.model);
            area.scribble(&mut ctx.rng(round), 2);
            if let Ok(wall) = wall {
                sys::unmap(wall, 1)?;
            }
        }
        area.check_all("grown range")?;
        sys::unmap(area.base, area.len())?;
    }
    Ok(())
}

fn shrink(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    for round in ctx.rounds(2) {
        let mut area = Area::filled(ctx.seed + round, ctx.pages())?;
        ballast.sweep()?;
        while area.len() > 10 {
            let kept = rng.between(area.len() / 2, area.len()).max(1);
            let lost = area.split_off(kept);
            area.base = sys::remap(area.base, kept + lost.len(), kept, 0, 0)?;
            area.check_order("head of a shrunk range", (0..kept).rev().step_by(3))?;
            let again = sys::map(lost.base, lost.len(), RW, ANON | libc::MAP_FIXED_NOREPLACE)?;
            check_zero("mapped where the tail was", again, lost.len())?;
            sys::unmap(again, lost.len())?;
        }
        sys::unmap(area.base, area.len())?;
    }
    Ok(())
}

fn moves(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut rng = ctx.rng(0);
    for round in ctx.rounds(3) {
        ballast.sweep()?;
        let old = area.base;
        // A shift by single pages as well: chunks of 2 MiB then hold pages of different halves.
        let to = place(area.len() + 8)? + (round as usize % 8) * 4096;
        move_to(&mut area, to)?;
        let again = sys::map(old, area.len(), RW, ANON | libc::MAP_FIXED_NOREPLACE)?;
        check_zero("mapped where a range was before it moved", again, area.len())?;
        sys::unmap(again, area.len())?;
        if round % 2 == 0 {
            area.check_all("moved range")?;
        }
        area.scribble(&mut rng, 3);
        ballast.sweep()?;
        area.check_all("moved range, cold again")?;
    }
    Ok(())
}

fn pieces(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    for round in ctx.rounds(2) {
        let mut rest = Area::filled(ctx.seed + round, ctx.pages())?;
        ballast.sweep()?;
        let mut parts = Vec::new();
        while rest.len() > 700 {
            let tail = rest.split_off(rest.len() - rng.between(1, 650));
            parts.push(tail);
        }
        parts.push(rest);
        for part in &mut parts {
            let to = place(part.len())?;
            move_to(part, to)?;
            part.check(part.len() - 1)?;
        }
        ballast.sweep()?;
        for part in &parts {
            part.check_all("moved piece")?;
            sys::unmap(part.base, part.len())?;
        }
    }
    Ok(())
}

fn fixed(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        let mut area = Area::filled(ctx.seed + round, ctx.pages() / 2)?;
        let mut target = Area::filled(ctx.seed ^ 77, ctx.pages() / 2 + 200)?;
        ballast.sweep()?;
        let to = target.addr(100);
        let after = target.split_off(100 + area.len());
        let _replaced = target.split_off(100);
        move_to(&mut area, to)?;
        area.check_all("range moved over a cold one")?;
        target.check_all("what lies before it")?;
        after.check_all("what lies behind it")?;
        ballast.sweep()?;
        area.check_all("range moved over a cold one, cold again")?;
        sys::unmap(target.base, 200 + area.len())?;
    }
    Ok(())
}

/// Registration splits what the program knows as one mapping: kernels before 6.17 move none of it (EFAULT), later ones
/// the first part.
fn border(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(4) {
        let mut area = Area::filled(ctx.seed + round, ctx.pages() / 2)?;
        let new = area.len() / 2;
        ballast.sweep()?;
        sys::map(area.base, new, RW, ANON | libc::MAP_FIXED)?;
        area.zeroed(0..new);
        (0..new).step_by(2).for_each(|page| area.write(page));
        let to = place(area.len())?;
        move_to(&mut area, to)?;
        area.check_all("range moved, a part of it new")?;
        ballast.sweep()?;
        area.check_all("range moved, a part of it new, cold again")?;
        sys::unmap(area.base, area.len())?;
    }
    Ok(())
}

const DONTUNMAP: i32 = 4;

fn dontunmap(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut rng = ctx.rng(0);
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let old = area.base;
        area.base = sys::remap(old, area.len(), area.len(), libc::MREMAP_MAYMOVE | DONTUNMAP, 0)?;
        let order: Vec<usize> = (0..area.len()).step_by(2).collect();
        area.check_order("moved without unmapping", order.into_iter())?;
        check_zero("what is left behind", old, area.len())?;
        let mut left = Area::at(old, ctx.seed ^ 5, area.len());
        left.write_all();
        ballast.sweep()?;
        left.check_all("new bytes in what was left behind")?;
        area.check_all("moved without unmapping, again")?;
        sys::unmap(old, left.len())?;
        area.scribble(&mut rng, 2);
    }
    Ok(())
}

fn in_a_row(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let pages = (ctx.pages() / 16).clamp(1, 16);
    let places = (0..16).map(|_| place(pages)).collect::<Res<Vec<usize>>>()?;
    let mut areas = (0..16).map(|at| Area::filled(ctx.seed ^ at, pages)).collect::<Res<Vec<Area>>>()?;
    for _ in ctx.rounds(4) {
        ballast.sweep()?;
        for (area, &place) in areas.iter_mut().zip(&places) {
            let to = self::place(pages)?;
            move_to(area, place)?;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | DONTUNMAP;
            area.base = sys::remap(place, pages, pages, flags, to)?;
        }
        for (area, &place) in areas.iter().zip(&places) {
            area.check_all("moved twice")?;
            check_zero("what is left behind", place, pages)?;
        }
    }
    Ok(())
}

fn swap(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let pages = ctx.pages() / 2;
    let (mut a, mut b) = (Area::filled(ctx.seed, pages)?, Area::filled(ctx.seed ^ 9, pages)?);
    let mut rng = ctx.rng(0);
    for _ in ctx.rounds(3) {
        ballast.sweep()?;
        let (place_a, place_b, third) = (a.base, b.base, place(pages)?);
        move_to(&mut a, third)?;
        move_to(&mut b, place_a)?;
        move_to(&mut a, place_b)?;
        a.check_all("first range after a swap")?;
        b.check_all("second range after a swap")?;
        a.scribble(&mut rng, 3);
        b.scribble(&mut rng, 3);
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
                for _ in 0..6 {
                    let to = place(area.len())?;
                    move_to(&mut area, to)?;
                    area.check_order("range of a moving thread", (0..area.len()).step_by(7))?;
                    area.scribble(&mut rng, 8);
                }
                area.check_all("range of a moving thread, whole")?;
            }
            Ok(())
        })
    })
}

fn under_readers(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut mover = area.split_off(area.len() / 2);
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut result = Ok(());
                while result.is_ok() && !stop.load(Relaxed) {
                    result = area.check_all("neighbour of a moving range");
                }
                result
            });
            let outcome = (|| -> Outcome {
                for _ in 0..10 {
                    let to = place(mover.len())?;
                    move_to(&mut mover, to)?;
                    mover.check_order("moving range", (0..mover.len()).step_by(11))?;
                }
                mover.check_all("moving range, whole")
            })();
            stop.store(true, Relaxed);
            all([outcome, join(reader)])
        })?;
    }
    Ok(())
}

fn with_fork(ctx: &Ctx) -> Outcome {
    let mut ballast = Ballast::new(ctx)?;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let to = place(area.len())?;
        move_to(&mut area, to)?;
        let child = crate::process::fork(|| {
            area.check_order("child, range moved before the fork", (0..area.len()).step_by(2))?;
            let to = place(area.len())?;
            move_to(&mut area, to)?;
            area.writer = 1;
            area.scribble(&mut ctx.rng(1), 4);
            area.check_all("child, range moved before and after the fork")
        })?;
        let to = place(area.len())?;
        move_to(&mut area, to)?;
        area.check_all("parent, range moved after the fork")?;
        crate::process::succeed("child that moves a range", child)?;
    }
    Ok(())
}
