//! Transparent huge pages: ranges that are one page of 2 MiB at one moment and 512 small ones at another.

use crate::area::{Area, Ballast, check_zero};
use crate::harness::{Case, Ctx, Outcome, bail, skip};
use crate::process;
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("thp-mixed", "huge pages partly hot, partly cold keep every byte", mixed),
    Case::new("thp-whole", "huge pages that leave and return whole keep every byte", whole),
    Case::new("thp-toggle", "HUGEPAGE and NOHUGEPAGE in turn change no byte", toggle),
    Case::new("thp-collapse", "MADV_COLLAPSE over cold pages keeps every byte", collapse),
    Case::new("thp-drop", "a piece dropped out of a cold huge page leaves the rest", drop_piece),
    Case::new("thp-remap", "huge pages moved to another alignment keep every byte", moved),
    Case::new("thp-fork", "a child shares and rewrites cold huge pages", forked),
    Case::new("thp-unaligned", "mappings that start and end inside a huge page's range", unaligned),
];

fn huge(ctx: &Ctx, pages: usize) -> crate::harness::Res<Area> {
    let pages = pages.next_multiple_of(512);
    let base = sys::anon_huge(pages)?;
    match sys::advise_raw(base, pages, libc::MADV_HUGEPAGE) {
        0 => {}
        libc::EINVAL => skip!("this kernel has no transparent huge pages"),
        error => bail!("MADV_HUGEPAGE: {}", std::io::Error::from_raw_os_error(error)),
    }
    let mut area = Area::at(base, ctx.seed, pages);
    area.write_all();
    Ok(area)
}

fn mixed(ctx: &Ctx) -> Outcome {
    let mut area = huge(ctx, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        for part in 0..8 {
            ballast.sweep_part(part, 8)?;
            // The first 64 pages of each huge page stay hot.
            for page in (0..area.len()).filter(|page| page % 512 < 64) {
                if page % 3 == part % 3 { area.poke(page) } else { area.check(page)? }
            }
        }
        area.check_all("huge pages, partly hot")?;
        area.scribble(&mut ctx.rng(round), 4);
    }
    Ok(())
}

fn whole(ctx: &Ctx) -> Outcome {
    let mut area = huge(ctx, ctx.pages() * 3)?;
    for round in ctx.rounds(3) {
        area.check_all("huge pages")?;
        if round % 2 == 0 { area.scribble(&mut ctx.rng(round), 5) } else { area.write_all() }
    }
    area.check_all("huge pages, at the end")
}

fn toggle(ctx: &Ctx) -> Outcome {
    let mut area = huge(ctx, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE] {
            ballast.sweep()?;
            sys::advise(area.base, area.len(), advice)?;
            area.check_order("after a change of huge page advice", (0..area.len()).step_by(3))?;
            area.scribble(&mut ctx.rng(round), 3);
        }
        area.check_all("after changes of huge page advice")?;
    }
    Ok(())
}

fn collapse(ctx: &Ctx) -> Outcome {
    const COLLAPSE: i32 = 25;
    let mut area = huge(ctx, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        for chunk in 0..area.len() / 512 {
            // It may answer EINVAL or EAGAIN or ENOMEM; what it must not do is change a byte.
            let error = sys::advise_raw(area.addr(chunk * 512), 512, COLLAPSE);
            if error == libc::EFAULT || error == libc::EIO {
                bail!("MADV_COLLAPSE: {}", std::io::Error::from_raw_os_error(error));
            }
            area.check(chunk * 512 + round as usize % 512)?;
        }
        area.check_all("after MADV_COLLAPSE")?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    Ok(())
}

fn drop_piece(ctx: &Ctx) -> Outcome {
    let mut area = huge(ctx, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let mut rng = ctx.rng(0);
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        for chunk in 0..area.len() / 512 {
            let from = chunk * 512 + rng.below(500);
            let to = from + rng.between(1, 12);
            sys::advise(area.addr(from), to - from, libc::MADV_DONTNEED)?;
            area.zeroed(from..to);
        }
        area.check_all("huge pages with pieces dropped")?;
        let chunk = rng.below(area.len() / 512) * 512;
        sys::advise(area.addr(chunk), 512, libc::MADV_DONTNEED)?;
        check_zero("a whole huge page dropped", area.addr(chunk), 512)?;
        area.zeroed(chunk..chunk + 512);
        area.write_all();
    }
    Ok(())
}

fn moved(ctx: &Ctx) -> Outcome {
    let mut area = huge(ctx, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(3) {
        ballast.sweep()?;
        let to = sys::anon_huge(area.len() + 512)? + [0, 4096, 256 * 4096][round as usize % 3];
        area.base = sys::remap(area.base, area.len(), area.len(), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to)?;
        area.check_all("huge pages, moved")?;
        area.scribble(&mut ctx.rng(round), 3);
    }
    Ok(())
}

fn forked(ctx: &Ctx) -> Outcome {
    let mut area = huge(ctx, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(2) {
        ballast.sweep()?;
        let child = process::fork(|| {
            area.writer = 1;
            area.check_all("child with huge pages")?;
            area.scribble(&mut ctx.rng(round), 3);
            ballast.sweep()?;
            area.check_all("child with rewritten huge pages")
        })?;
        area.scribble(&mut ctx.rng(round), 3);
        ballast.sweep()?;
        area.check_all("parent with huge pages")?;
        process::succeed("child with huge pages", child)?;
    }
    Ok(())
}

fn unaligned(ctx: &Ctx) -> Outcome {
    let mut rest = huge(ctx, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let mut parts = Vec::new();
    let mut rng = ctx.rng(0);
    while rest.len() > 900 {
        let mut tail = rest.split_off(rest.len() - rng.between(300, 800));
        // A hole of one page before each part.
        let part = tail.split_off(1);
        sys::unmap(tail.base, 1)?;
        parts.push(part);
    }
    parts.push(rest);
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        for part in &mut parts {
            part.check_all("part of a huge range")?;
            part.scribble(&mut rng, 3);
        }
    }
    Ok(())
}
