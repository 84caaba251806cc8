//! Data that the store cannot take: demotion stops, nothing is dropped (R18, R19).

use crate::area::Area;
use crate::harness::{Case, Ctx, Outcome, bail};
use crate::model::{Bytes, PAGE, Rng, mix, random};
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("store-incompressible", "data that does not compress stays right, over budget", incompressible)
        .warm(),
    Case::new("store-collapse", "a ratio that collapses under rewriting loses nothing", collapse),
    Case::new("store-same-filled", "same-filled pages keep their word", same_filled),
    Case::new("store-edges", "pages just below and above what compresses", edges),
    Case::new("store-poison", "pages whose last, first or only byte differs", single_bytes),
    Case::new("store-read", "a program that reads many times its budget again and again keeps it", read_often),
    Case::new("store-grow", "a program that grows to many times its budget", grow),
];

/// Pages held against a function instead of the model of the other cases.
fn verify(base: usize, pages: usize, what: &str, make: impl Fn(usize, &mut Bytes)) -> Outcome {
    let mut wanted = [0; PAGE];
    for page in 0..pages {
        make(page, &mut wanted);
        // SAFETY: a mapped page.
        let found = unsafe { std::slice::from_raw_parts((base + page * PAGE) as *const u8, PAGE) };
        if let Some(at) = (0..PAGE).find(|&at| found[at] != wanted[at]) {
            let same = (0..PAGE).filter(|&at| found[at] == wanted[at]).count();
            bail!(
                "{what}: page {page} of {pages} at {:#x} (offset {at}): expected {:#04x}, found {:#04x}; {same} bytes are right",
                base + page * PAGE,
                wanted[at],
                found[at]
            );
        }
    }
    Ok(())
}

fn fill(base: usize, pages: usize, make: impl Fn(usize, &mut Bytes)) {
    let mut bytes = [0; PAGE];
    for page in 0..pages {
        make(page, &mut bytes);
        // SAFETY: a mapped page.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (base + page * PAGE) as *mut u8, PAGE) };
    }
}

/// Fills and verifies, round after round, with bytes from `make(round, page)`.
fn rounds(ctx: &Ctx, what: &str, make: impl Fn(u64, usize, &mut Bytes)) -> Outcome {
    let pages = ctx.pages() * 3;
    let base = sys::anon(pages)?;
    for round in ctx.rounds(2) {
        fill(base, pages, |page, bytes| make(round, page, bytes));
        verify(base, pages, what, |page, bytes| make(round, page, bytes))?;
        verify(base, pages, what, |page, bytes| make(round, page, bytes))?;
    }
    sys::unmap(base, pages)
}

/// Pages that take hardly any room on node 1: whatever the budget, there is no reason to exceed it. The suite looks at the
/// peak in the report.
fn read_often(ctx: &Ctx) -> Outcome {
    let pages = ctx.pages() * 12;
    let base = sys::anon(pages)?;
    let word = |page: usize| (base + page * PAGE) as *mut u64;
    for page in 0..pages {
        // SAFETY: a mapped page.
        unsafe { word(page).write(mix(ctx.seed ^ page as u64)) };
    }
    for round in 0..3_usize {
        for page in 0..pages {
            // In order, in order again, and all over.
            let page = if round < 2 { page } else { page * 7919 % pages };
            // SAFETY: a mapped page.
            let found = unsafe { word(page).read_volatile() };
            if found != mix(ctx.seed ^ page as u64) {
                bail!("page {page} of {pages}, round {round}: found {found:#x}");
            }
        }
    }
    sys::unmap(base, pages)
}

fn incompressible(ctx: &Ctx) -> Outcome {
    let seed = ctx.seed;
    rounds(ctx, "incompressible data", |round, page, bytes| random(mix(seed ^ round << 40) ^ page as u64, bytes))
}

fn collapse(ctx: &Ctx) -> Outcome {
    let pages = ctx.pages() * 3;
    let base = sys::anon(pages)?;
    for round in ctx.rounds(1) {
        let key = mix(ctx.seed ^ round);
        // Step by step a larger part of each page is random: 0, 512, ... 4096 bytes.
        for step in 0..=8usize {
            let make = |page: usize, bytes: &mut Bytes| {
                random(key ^ (step << 32 | page) as u64, bytes);
                bytes[step * 512..].fill(page as u8);
            };
            fill(base, pages, make);
            verify(base, pages, &format!("data of which {step} eighths are random"), make)?;
        }
    }
    sys::unmap(base, pages)
}

fn same_filled(ctx: &Ctx) -> Outcome {
    let seed = ctx.seed;
    rounds(ctx, "same-filled pages", |round, page, bytes| {
        let word = match page % 4 {
            0 => 0,
            1 => u64::MAX,
            2 => 0x0101_0101_0101_0101 * (page as u64 % 251 + 1),
            _ => mix(seed ^ round << 40 ^ page as u64),
        };
        bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word.to_le_bytes()));
    })
}

/// The random part goes through every length, a byte at a time: whatever limits and size classes there are, pages lie
/// on both sides of them.
fn edges(ctx: &Ctx) -> Outcome {
    let seed = ctx.seed;
    rounds(ctx, "pages of every compressed size", |round, page, bytes| {
        random(mix(seed ^ round << 40) ^ page as u64, bytes);
        let from = page * 13 % (PAGE + 1);
        bytes[from..].fill(0);
    })
}

fn single_bytes(ctx: &Ctx) -> Outcome {
    let seed = ctx.seed;
    rounds(ctx, "pages with one odd byte", |round, page, bytes| {
        bytes.fill(if page % 2 == 0 { 0 } else { 0x77 });
        let at = match page % 5 {
            0 => 0,
            1 => PAGE - 1,
            2 => 7,
            3 => 8,
            _ => (mix(seed ^ page as u64) % PAGE as u64) as usize,
        };
        bytes[at] = (mix(seed ^ round << 40 ^ page as u64) as u8) | 1;
    })
}

fn grow(ctx: &Ctx) -> Outcome {
    let mut areas: Vec<Area> = Vec::new();
    let mut rng: Rng = ctx.rng(0);
    for step in 0..16 {
        let mut area = Area::filled(ctx.seed + step, ctx.pages() / 2)?;
        area.scribble(&mut rng, 4);
        areas.push(area);
        let old = rng.below(areas.len());
        areas[old].check_all("old part of a growing program")?;
    }
    for _ in ctx.rounds(1) {
        for area in &mut areas {
            area.check_all("part of a grown program")?;
            area.scribble(&mut rng, 4);
        }
    }
    Ok(())
}
