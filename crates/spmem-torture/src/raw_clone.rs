//! Processes made without libc: no fork handler runs, only the kernel knows.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, ensure};
use crate::process;
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("raw-fork", "a child by SYS_fork sees the cold pages and writes its own", |ctx| {
        children(ctx, raw_fork)
    }),
    Case::new("raw-clone", "a child by SYS_clone sees the cold pages and writes its own", |ctx| {
        children(ctx, raw_clone)
    }),
    Case::new("raw-clone3", "a child by SYS_clone3 sees the cold pages and writes its own", |ctx| {
        children(ctx, raw_clone3)
    }),
    Case::new("raw-grandchild", "raw children of raw children see the cold pages", grandchild),
    Case::new(
        "raw-chain",
        "raw children that clone at once, generation after generation, see the cold pages",
        chain,
    ),
    Case::new(
        "raw-changes",
        "a raw child that moves, unmaps and drops cold ranges at once keeps the rest",
        changes,
    ),
    Case::new("raw-changes-chain", "so does its own raw child, made in the middle of it", |ctx| {
        for _ in ctx.rounds(2) {
            change_ranges(ctx, true)?;
        }
        Ok(())
    }),
    Case::new("raw-words", "clone writes and clears thread ids in cold pages", words),
    Case::new("raw-thread", "a thread by clone without libc runs on a cold stack", thread),
];

#[cfg(target_arch = "x86_64")]
fn raw_fork() -> i32 {
    // SAFETY: like fork, without libc's handlers.
    unsafe { libc::syscall(libc::SYS_fork) as i32 }
}

#[cfg(not(target_arch = "x86_64"))]
fn raw_fork() -> i32 {
    raw_clone()
}

fn raw_clone() -> i32 {
    // SAFETY: flags without CLONE_VM and no stack: like fork.
    unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as i32 }
}

fn raw_clone3() -> i32 {
    // SAFETY: zeroed arguments but for the exit signal: like fork.
    unsafe {
        let mut arguments: libc::clone_args = std::mem::zeroed();
        arguments.exit_signal = libc::SIGCHLD as u64;
        libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) as i32
    }
}

fn children(ctx: &Ctx, make: fn() -> i32) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let child = process::run_child("raw clone", make(), || {
            area.writer = 1;
            area.check_all("raw child, at once")?;
            area.scribble(&mut ctx.rng(1), 3);
            ballast.sweep()?;
            area.check_all("raw child, after its writes")
        })?;
        area.scribble(&mut ctx.rng(1), 3);
        area.check_all("parent of a raw child")?;
        ballast.sweep()?;
        process::succeed("raw child", child)?;
        area.check_all("parent, after the raw child")?;
    }
    Ok(())
}

fn grandchild(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(1) {
        ballast.sweep()?;
        let child = process::run_child("raw clone", raw_clone(), || {
            area.writer = 1;
            area.scribble(&mut ctx.rng(1), 4);
            let inner = process::run_child("raw clone", raw_clone3(), || {
                area.writer = 2;
                area.check_all("raw grandchild")?;
                area.scribble(&mut ctx.rng(2), 4);
                let last = process::fork(|| area.check_all("child by fork of a raw grandchild"))?;
                process::succeed("child by fork of a raw grandchild", last)?;
                area.check_all("raw grandchild, again")
            })?;
            ballast.sweep()?;
            area.check_all("raw child, while its own lives")?;
            process::succeed("raw grandchild", inner)
        })?;
        area.check_all("parent of raw generations")?;
        process::succeed("raw child", child)?;
    }
    Ok(())
}

/// Each generation clones before it has touched anything: whoever gives it its pages is still at it.
fn chain(ctx: &Ctx) -> Outcome {
    const GENERATIONS: u8 = 5;
    fn generation(ctx: &Ctx, area: &mut Area, number: u8) -> Outcome {
        if number == GENERATIONS {
            return area.check_all("the last raw generation");
        }
        let make = [raw_clone, raw_clone3, raw_fork][usize::from(number) % 3];
        let child = process::run_child("raw clone", make(), || generation(ctx, area, number + 1))?;
        area.check_order("a raw generation, downwards", (0..area.len()).rev())?;
        area.writer = number;
        area.scribble(&mut ctx.rng(u64::from(number)), 4);
        process::succeed("raw generation", child)?;
        area.check_all("a raw generation, after its child")
    }
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(3) {
        ballast.sweep()?;
        let child = process::run_child("raw clone", raw_clone(), || generation(ctx, &mut area, 1))?;
        process::succeed("raw generations", child)?;
        area.check_all("parent of raw generations")?;
    }
    Ok(())
}

fn changes(ctx: &Ctx) -> Outcome {
    for _ in ctx.rounds(2) {
        change_ranges(ctx, false)?;
    }
    Ok(())
}

/// Changes of the address space while the child is being given its pages. It touches no page of its own before they are
/// made: it would wait for it until most of the others are there.
fn change_ranges(ctx: &Ctx, has_child: bool) -> Outcome {
    const FIXED: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    const PARTS: usize = 8;
    /// After this one the child makes its own.
    const MIDDLE: usize = 4;
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    ballast.sweep()?;
    let (base, pages) = (area.base, area.len());
    let part = pages / PARTS * 4096;
    let place = sys::map(0, pages, libc::PROT_NONE, sys::ANON)?;
    // What becomes of a part: 0 unmapped, 1 dropped, 2 and 3 moved.
    let change = |number: usize| -> Outcome {
        let (at, to) = (base + number * part, place + number * part);
        match number % 4 {
            0 => sys::unmap(at, part / 4096),
            1 => sys::advise(at, part / 4096, libc::MADV_DONTNEED),
            _ => sys::remap(at, part / 4096, part / 4096, FIXED, to).map(drop),
        }
    };
    let child = process::run_child("raw clone", raw_clone(), || {
        // From the end: what is given last is changed first.
        (MIDDLE..PARTS).rev().try_for_each(change)?;
        let own = if has_child { raw_clone() } else { -1 };
        let changed = if own == 0 { MIDDLE } else { 0 };
        (changed..MIDDLE).rev().try_for_each(change)?;
        for number in (0..PARTS).rev() {
            let mut tail = area.split_off(number * part / 4096);
            match number % 4 {
                _ if number < changed => {}
                0 => continue,
                1 => tail.zeroed(0..tail.len()),
                _ => tail.base = place + number * part,
            }
            tail.check_all(if own == 0 { "raw grandchild, amid changes" } else { "raw child, after changes" })?;
        }
        if own > 0 { process::succeed("raw grandchild, amid changes", own) } else { Ok(()) }
    })?;
    process::succeed("raw child that changes its ranges", child)?;
    area.check_all("parent of a raw child that changes its ranges")?;
    sys::unmap(base, pages)?;
    sys::unmap(place, pages)
}

fn words(ctx: &Ctx) -> Outcome {
    const FLAGS: i32 =
        libc::CLONE_PARENT_SETTID | libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let word = sys::anon(2)?;
    let (parent, child_word) = (word as *mut i32, (word + 4096) as *mut i32);
    for _ in ctx.rounds(3) {
        // SAFETY: two mapped pages.
        unsafe {
            parent.write_volatile(-1);
            child_word.write_volatile(-1);
        }
        ballast.sweep()?;
        // SAFETY: like fork; the kernel writes the child's id to the parent's and to the child's copy of the words.
        let pid = unsafe { libc::syscall(libc::SYS_clone, FLAGS, 0, parent, child_word, 0) as i32 };
        let pid = process::run_child("clone", pid, || {
            // SAFETY: as above.
            let (found, own) = unsafe { (child_word.read_volatile(), libc::syscall(libc::SYS_getpid) as i32) };
            ensure!(found == own, "CLONE_CHILD_SETTID left {found} in a cold page, expected {own}");
            area.check_order("child with its id in a cold page", (0..area.len()).step_by(9))
        })?;
        // SAFETY: as above.
        let (found, other) = unsafe { (parent.read_volatile(), child_word.read_volatile()) };
        ensure!(found == pid, "CLONE_PARENT_SETTID left {found} in a cold page, expected {pid}");
        ensure!(other == -1, "the child's word in the parent is {other}, expected -1");
        process::succeed("child with its id in a cold page", pid)?;
    }
    Ok(())
}

#[cfg(not(target_arch = "x86_64"))]
fn thread(_: &Ctx) -> Outcome {
    crate::harness::skip!("written for x86-64")
}

/// A thread as raw as it gets: a stack of our own, no TLS; it adds up one word of each page and exits.
#[cfg(target_arch = "x86_64")]
fn thread(ctx: &Ctx) -> Outcome {
    const FLAGS: i32 = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_CLEARTID;
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let stack = sys::anon(16)?;
    let block = sys::anon(1)?;
    let word = |page: usize| {
        // SAFETY: a mapped page.
        unsafe { (area.addr(page) as *const u64).read_volatile() }
    };
    let wanted = (0..area.len()).fold(0u64, |sum, page| sum.wrapping_add(word(page)));
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let result: i64;
        // SAFETY: the child touches its own stack and block and reads the area; it never returns from this block.
        unsafe {
            let top = stack + 16 * 4096 - 64;
            (top as *mut [u64; 3]).write([area.base as u64, area.len() as u64, block as u64]);
            std::arch::asm!(
                "syscall",
                "test rax, rax",
                "jnz 2f",
                "pop rsi",
                "pop rcx",
                "pop rdi",
                "xor rdx, rdx",
                "3:",
                "push rdx",
                "add rdx, [rsi]",
                "mov [rsp], rdx",
                "pop rdx",
                "add rsi, 4096",
                "dec rcx",
                "jnz 3b",
                "mov [rdi], rdx",
                "mov eax, 60",
                "xor edi, edi",
                "syscall",
                "2:",
                inlateout("rax") libc::SYS_clone => result,
                in("rdi") i64::from(FLAGS),
                in("rsi") top,
                in("rdx") block + 8,
                in("r10") block + 8,
                in("r8") 0,
                lateout("rcx") _,
                lateout("r11") _,
            );
        }
        sys::ok("clone of a thread", result)?;
        let id = (block + 8) as *const i32;
        // SAFETY: the kernel clears the word and wakes it when the thread has gone.
        unsafe {
            loop {
                let now = id.read_volatile();
                if now == 0 {
                    break;
                }
                libc::syscall(libc::SYS_futex, id, libc::FUTEX_WAIT, now, 0, 0, 0);
            }
        }
        // SAFETY: the thread has gone.
        let found = unsafe { (block as *const u64).read_volatile() };
        ensure!(found == wanted, "a raw thread added up {found:#x}, expected {wanted:#x}");
    }
    Ok(())
}
