//! glibc's allocator: bricks from 16 bytes to 8 MiB, from the program break and from mappings of their own.

use crate::area::{Area, Ballast, check_zero};
use crate::harness::{Case, Ctx, Outcome, Res, ensure, threads};
use crate::model::{PAGE, Rng, mix};
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("heap-mixed", "malloc, calloc, realloc, memalign and free keep what was written", |ctx| {
        mixed(ctx, 1)
    }),
    Case::new("heap-threads", "the same in four arenas", |ctx| mixed(ctx, 4)),
    Case::new("heap-large", "bricks of 128 KiB to 8 MiB survive realloc (mremap) while cold", large),
    Case::new("heap-trim", "malloc_trim gives memory back and keeps the rest", trim),
    Case::new("heap-brk", "the program break shrinks and grows over cold pages, new pages are zero", brk),
];

/// A brick: where, how long, and the key of its contents.
struct Brick {
    at: usize,
    len: usize,
    key: u64,
}

impl Brick {
    fn fill(&self, from: usize) {
        for offset in (from..self.len).step_by(8) {
            let word = word(self.key, offset).to_le_bytes();
            let len = (self.len - offset).min(8);
            // SAFETY: inside the brick.
            unsafe { std::ptr::copy_nonoverlapping(word.as_ptr(), (self.at + offset) as *mut u8, len) };
        }
    }

    fn check(&self, upto: usize) -> Outcome {
        for offset in (0..upto).step_by(8) {
            let (mut found, len) = ([0u8; 8], (upto - offset).min(8));
            // SAFETY: inside the brick.
            unsafe { std::ptr::copy_nonoverlapping((self.at + offset) as *const u8, found.as_mut_ptr(), len) };
            let wanted = word(self.key, offset).to_le_bytes();
            ensure!(
                found[..len] == wanted[..len],
                "brick of {} bytes at {:#x}: at {:#x} (offset {offset}) expected {wanted:02x?}, found {found:02x?}",
                self.len,
                self.at,
                self.at + offset
            );
        }
        Ok(())
    }
}

/// Half of the 512-byte blocks repeat one word, the others count: compressible, yet every word is placed.
fn word(key: u64, offset: usize) -> u64 {
    let block = mix(key ^ (offset / 512) as u64);
    if block & 1 == 0 { block } else { (block & 0xffff_ffff_0000_0000) | offset as u64 }
}

fn size(rng: &mut Rng) -> usize {
    match rng.below(100) {
        0..60 => rng.between(16, 1024),
        60..85 => rng.between(1024, 32 << 10),
        85..98 => rng.between(32 << 10, 512 << 10),
        _ => rng.between(512 << 10, 8 << 20),
    }
}

fn allocate(rng: &mut Rng, len: usize) -> Res<Brick> {
    let kind = rng.below(8);
    // SAFETY: plain allocation calls; alignments are powers of two.
    let at = unsafe {
        match kind {
            0 => libc::calloc(1, len),
            1 => libc::memalign(1 << rng.between(5, 13), len),
            _ => libc::malloc(len),
        }
    } as usize;
    ensure!(at != 0, "allocation of {len} bytes failed");
    if kind == 0 {
        // SAFETY: the brick is ours.
        let bytes = unsafe { std::slice::from_raw_parts(at as *const u8, len) };
        let dirty = bytes.iter().position(|&b| b != 0);
        ensure!(dirty.is_none(), "calloc({len}) at {at:#x} is not zero at offset {dirty:?}");
    }
    let brick = Brick { at, len, key: rng.next() };
    brick.fill(0);
    Ok(brick)
}

fn resize(brick: &mut Brick, len: usize) -> Outcome {
    // SAFETY: the brick came from malloc.
    let at = unsafe { libc::realloc(brick.at as *mut _, len) } as usize;
    ensure!(at != 0, "realloc to {len} bytes failed");
    let kept = brick.len.min(len);
    (brick.at, brick.len) = (at, len);
    brick.check(kept)?;
    brick.fill(kept & !7);
    Ok(())
}

fn free(brick: Brick) -> Outcome {
    brick.check(brick.len)?;
    // SAFETY: it came from malloc and is dropped here.
    unsafe { libc::free(brick.at as *mut _) };
    Ok(())
}

fn mixed(ctx: &Ctx, count: usize) -> Outcome {
    let target = ctx.pages() * PAGE * 3 / count;
    threads(count, |id| {
        let mut rng = ctx.rng(id as u64);
        let (mut bricks, mut held) = (Vec::<Brick>::new(), 0usize);
        for _ in ctx.rounds(2) {
            for _ in 0..2000 / count {
                let is_full = held > target;
                if bricks.is_empty() || (!is_full && !rng.one_in(3)) {
                    let len = size(&mut rng);
                    bricks.push(allocate(&mut rng, len)?);
                    held += len;
                } else if is_full || rng.one_in(2) {
                    let brick = bricks.swap_remove(rng.below(bricks.len()));
                    held -= brick.len;
                    free(brick)?;
                } else {
                    let (at, len) = (rng.below(bricks.len()), size(&mut rng));
                    held = held - bricks[at].len + len;
                    resize(&mut bricks[at], len)?;
                }
            }
            bricks.iter().try_for_each(|brick| brick.check(brick.len))?;
        }
        bricks.into_iter().try_for_each(free)
    })
}

fn large(ctx: &Ctx) -> Outcome {
    let mut rng = ctx.rng(0);
    let target = ctx.pages() * PAGE * 2;
    let mut ballast = Ballast::of(ctx, ctx.pages())?;
    let (mut bricks, mut held) = (Vec::<Brick>::new(), 0usize);
    for _ in ctx.rounds(2) {
        while held < target {
            let len = rng.between(128 << 10, 8 << 20);
            bricks.push(allocate(&mut rng, len)?);
            held += len;
        }
        ballast.sweep()?;
        for _ in 0..bricks.len() / 2 {
            let (at, len) = (rng.below(bricks.len()), rng.between(64 << 10, 8 << 20));
            held = held - bricks[at].len + len;
            resize(&mut bricks[at], len)?;
        }
        for _ in 0..bricks.len() / 3 {
            let brick = bricks.swap_remove(rng.below(bricks.len()));
            held -= brick.len;
            free(brick)?;
        }
    }
    bricks.into_iter().try_for_each(free)
}

fn trim(ctx: &Ctx) -> Outcome {
    let mut rng = ctx.rng(0);
    let target = ctx.pages() * PAGE;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(2) {
        let (mut bricks, mut held) = (Vec::new(), 0);
        while held < target {
            let len = rng.between(256, 64 << 10);
            bricks.push(allocate(&mut rng, len)?);
            held += len;
        }
        ballast.sweep()?;
        while bricks.len() > 100 {
            for _ in 0..bricks.len() / 3 {
                free(bricks.swap_remove(rng.below(bricks.len())))?;
            }
            // SAFETY: no memory of ours is involved.
            unsafe { libc::malloc_trim(0) };
            bricks.iter().try_for_each(|brick| brick.check(brick.len))?;
        }
        bricks.into_iter().try_for_each(free)?;
    }
    Ok(())
}

/// Moves the break itself, in a child whose allocator is told not to use it.
fn brk(ctx: &Ctx) -> Outcome {
    // SAFETY: settings of the allocator: everything from mappings, nothing from the break.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
    let mut ballast = Ballast::new(ctx)?;
    // SAFETY: asks for the break.
    let start = (unsafe { libc::syscall(libc::SYS_brk, 0) } as usize).next_multiple_of(PAGE);
    let set = |pages: usize| -> Outcome {
        // SAFETY: only memory above the heap that is there is given and taken.
        let got = unsafe { libc::syscall(libc::SYS_brk, start + pages * PAGE) } as usize;
        ensure!(got == start + pages * PAGE, "brk to {pages} pages gave {got:#x}");
        Ok(())
    };
    let pages = ctx.pages();
    set(pages)?;
    let mut area = Area::at(start, ctx.seed, pages);
    area.write_all();
    let mut rng = ctx.rng(1);
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let kept = rng.between(1, pages);
        set(kept)?;
        area.check_order("below the lowered break", 0..kept)?;
        set(pages)?;
        check_zero("above the break, raised again", area.addr(kept), pages - kept)?;
        area.zeroed(kept..pages);
        ballast.sweep()?;
        area.check_all("after the break moved")?;
        area.scribble(&mut rng, 2);
    }
    // The allocator may have moved the break's bottom pages into its own books: leave without running destructors.
    let _ = sys::gettid();
    Ok(())
}
