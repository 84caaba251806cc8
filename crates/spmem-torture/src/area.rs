//! Memory under test and its model, and the ballast that drives it out.

use crate::harness::{Ctx, Failure, Outcome, Res, bail};
use crate::model::{self, Bytes, PAGE, Rng};
use crate::sys;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Differing pages that a failure lists in full.
const LISTED: usize = 6;
/// Small writes to a page before it is written anew.
const POKES: u8 = 6;

/// What a page is expected to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// The model's bytes.
    Known,
    /// The model's bytes or all zero (after `MADV_FREE`).
    Lazy,
    /// Not mapped, or without rights: not looked at.
    Gone,
}

/// The model of one page: eight bytes.
#[derive(Clone, Copy)]
pub struct Model {
    /// 0 = untouched, zero.
    pub version: u32,
    /// Small writes since.
    pub pokes: u8,
    /// What to expect.
    pub state: State,
}

/// A range of memory with the model of each page. Does not unmap itself: cases own their address space.
pub struct Area {
    /// Address of the first page.
    pub base: usize,
    /// Number of the first page in the model.
    pub first: u64,
    /// Seed of the contents.
    pub seed: u64,
    /// Who writes: goes into the upper bits of new versions, so that two processes never write the same bytes.
    pub writer: u8,
    /// One a page.
    pub model: Vec<Model>,
}

impl Area {
    /// New untouched private anonymous memory.
    pub fn new(seed: u64, pages: usize) -> Res<Area> {
        Ok(Area::at(sys::anon(pages)?, seed, pages))
    }

    /// New memory, each page written once.
    pub fn filled(seed: u64, pages: usize) -> Res<Area> {
        let mut area = Area::new(seed, pages)?;
        area.write_all();
        Ok(area)
    }

    /// The model for untouched (zero) memory at `base`.
    pub fn at(base: usize, seed: u64, pages: usize) -> Area {
        let model = vec![Model { version: 0, pokes: 0, state: State::Known }; pages];
        Area { base, first: 0, seed, writer: 0, model }
    }

    /// Pages in it.
    pub fn len(&self) -> usize {
        self.model.len()
    }

    /// Address of a page.
    pub fn addr(&self, page: usize) -> usize {
        self.base + page * PAGE
    }

    /// Takes the pages from `page` on into an area of their own.
    pub fn split_off(&mut self, page: usize) -> Area {
        let model = self.model.split_off(page);
        Area {
            base: self.addr(page),
            first: self.first + page as u64,
            seed: self.seed,
            writer: self.writer,
            model,
        }
    }

    /// Splits into `parts` areas of about equal size.
    pub fn split(mut self, parts: usize) -> Vec<Area> {
        let size = self.len() / parts;
        let mut tail: Vec<Area> = (1..parts).rev().map(|part| self.split_off(part * size)).collect();
        tail.push(self);
        tail.reverse();
        tail
    }

    /// Notes that pages are untouched (zero) from now on.
    pub fn zeroed(&mut self, pages: std::ops::Range<usize>) {
        self.model[pages].fill(Model { version: 0, pokes: 0, state: State::Known });
    }

    /// Notes another expectation for pages.
    pub fn expect(&mut self, pages: std::ops::Range<usize>, state: State) {
        for model in &mut self.model[pages] {
            model.state = state;
        }
    }

    /// Writes the next version of a page.
    pub fn write(&mut self, page: usize) {
        let mut bytes = [0; PAGE];
        self.next(page, &mut bytes);
        // SAFETY: the page is mapped writable and no reference to it lives.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.addr(page) as *mut u8, PAGE) };
    }

    /// Makes the next version of a page without writing it: somebody else will (a read, a poke by ptrace).
    pub fn next(&mut self, page: usize, bytes: &mut Bytes) {
        let (seed, index, writer) = (self.seed, self.first + page as u64, u32::from(self.writer));
        let model = &mut self.model[page];
        *model =
            Model { version: (writer << 24) | ((model.version + 1) & 0x00ff_ffff), pokes: 0, state: State::Known };
        model::page(seed, index, model.version, bytes);
    }

    /// Writes 64 bytes into a page (now and then the whole page).
    pub fn poke(&mut self, page: usize) {
        let model = self.model[page];
        if model.pokes >= POKES || model.version == 0 || model.state != State::Known {
            return self.write(page);
        }
        let mut line = [0; 64];
        self.model[page].pokes += 1;
        let at = model::poke(self.seed, self.first + page as u64, model.version, model.pokes + 1, &mut line);
        // SAFETY: 64 bytes inside a page that is mapped writable.
        unsafe { std::ptr::copy_nonoverlapping(line.as_ptr(), (self.addr(page) + at) as *mut u8, line.len()) };
    }

    /// Writes every page that is there.
    pub fn write_all(&mut self) {
        for page in 0..self.len() {
            if self.model[page].state != State::Gone {
                self.write(page);
            }
        }
    }

    /// Writes or pokes about one page in `n`.
    pub fn scribble(&mut self, rng: &mut Rng, n: usize) {
        for page in 0..self.len() {
            if self.model[page].state != State::Gone && rng.one_in(n) {
                if rng.one_in(2) { self.write(page) } else { self.poke(page) }
            }
        }
    }

    /// What a page must hold now.
    pub fn expected(&self, page: usize, bytes: &mut Bytes) {
        let (model, index) = (self.model[page], self.first + page as u64);
        model::page(self.seed, index, model.version, bytes);
        let mut line = [0; 64];
        for poke in 1..=model.pokes {
            let at = model::poke(self.seed, index, model.version, poke, &mut line);
            bytes[at..at + 64].copy_from_slice(&line);
        }
    }

    /// Whether a page holds what it must; reads all of it.
    pub fn is_right(&self, page: usize) -> bool {
        if self.model[page].state == State::Gone {
            return true;
        }
        let mut bytes = [0; PAGE];
        self.expected(page, &mut bytes);
        // SAFETY: the page is mapped readable, and only this thread's process writes it.
        let found = unsafe { std::slice::from_raw_parts(self.addr(page) as *const u8, PAGE) };
        found == bytes || (self.model[page].state == State::Lazy && found.iter().all(|&b| b == 0))
    }

    /// Checks one page.
    pub fn check(&self, page: usize) -> Outcome {
        if self.is_right(page) { Ok(()) } else { Err(self.failure("a page differs", &[page])) }
    }

    /// Checks every page; `what` says what was done before.
    pub fn check_all(&self, what: &str) -> Outcome {
        self.check_order(what, 0..self.len())
    }

    /// Checks pages in an order.
    pub fn check_order(&self, what: &str, order: impl Iterator<Item = usize>) -> Outcome {
        let wrong: Vec<usize> = order.filter(|&page| !self.is_right(page)).collect();
        if wrong.is_empty() { Ok(()) } else { Err(self.failure(what, &wrong)) }
    }

    fn failure(&self, what: &str, pages: &[usize]) -> Failure {
        let mut text = format!(
            "{what}: {} of {} pages differ (area {:#x}..{:#x}, process {}, thread {})",
            pages.len(),
            self.len(),
            self.base,
            self.addr(self.len()),
            std::process::id(),
            sys::gettid()
        );
        for &page in pages.iter().take(LISTED) {
            text.push_str(&self.describe(page));
        }
        if pages.len() > LISTED {
            text.push_str(&format!("\n  ... the last is page {}", pages[pages.len() - 1]));
        }
        Failure::Wrong(text)
    }

    fn describe(&self, page: usize) -> String {
        let (mut wanted, model) = ([0; PAGE], self.model[page]);
        self.expected(page, &mut wanted);
        // SAFETY: as in `is_right`.
        let found: Bytes = unsafe { std::ptr::read_volatile(self.addr(page) as *const Bytes) };
        let index = self.first + page as u64;
        let differing: Vec<usize> = (0..PAGE).filter(|&at| wanted[at] != found[at]).collect();
        let Some(&from) = differing.first() else {
            return format!("\n  page {index} at {:#x}: right on a second look", self.addr(page));
        };
        let to = (from + 16).min(PAGE);
        format!(
            "\n  page {index} at {:#x}: {} bytes differ, the first at address {:#x} (offset {from}); \
             expected version {:#x} with {} pokes ({:?}, {:?}): {:02x?}, found {:02x?}; found page: {}",
            self.addr(page),
            differing.len(),
            self.addr(page) + from,
            model.version,
            model.pokes,
            model::kind(self.seed, index, model.version),
            model.state,
            &wanted[from..to],
            &found[from..to],
            model::name(self.seed, &found)
        )
    }
}

/// Memory that is swept so that other memory gets cold. It is checked as well.
pub struct Ballast {
    area: Area,
    rng: Rng,
}

impl Ballast {
    /// Twice the tested data.
    pub fn new(ctx: &Ctx) -> Res<Ballast> {
        Ballast::of(ctx, ctx.pages() * 2)
    }

    /// A ballast of `pages`.
    pub fn of(ctx: &Ctx, pages: usize) -> Res<Ballast> {
        Ok(Ballast { area: Area::filled(ctx.seed ^ 0xba11_a570, pages)?, rng: ctx.rng(0xba11) })
    }

    /// Checks all of it and writes a sixteenth: what else there is gets cold.
    pub fn sweep(&mut self) -> Outcome {
        self.area.check_all("ballast")?;
        self.area.scribble(&mut self.rng, 16);
        Ok(())
    }

    /// Checks the `part`-th of `parts` of it.
    pub fn sweep_part(&mut self, part: usize, parts: usize) -> Outcome {
        let size = self.area.len() / parts;
        self.area.check_order("part of the ballast", part * size..(part + 1) * size)
    }

    /// Sweeps in a thread of its own for as long as `body` runs: pages leave in the middle of what it does.
    pub fn during<T>(&mut self, body: impl FnOnce() -> Res<T>) -> Res<T> {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stop = &stop;
            let sweeper = scope.spawn(move || {
                while !stop.load(Relaxed) {
                    self.sweep()?;
                }
                Ok(())
            });
            let result = body();
            stop.store(true, Relaxed);
            crate::harness::join(sweeper)?;
            result
        })
    }

    /// The child of a fork writes other bytes than its parent.
    pub fn set_writer(&mut self, writer: u8) {
        self.area.writer = writer;
    }
}

/// Checks that memory is all zero.
pub fn check_zero(what: &str, at: usize, pages: usize) -> Outcome {
    for page in 0..pages {
        // SAFETY: callers mapped the range readable.
        let bytes = unsafe { std::slice::from_raw_parts((at + page * PAGE) as *const u8, PAGE) };
        if let Some(offset) = bytes.iter().position(|&b| b != 0) {
            let address = at + page * PAGE + offset;
            bail!(
                "{what}: page {page} of {pages} is not zero at {address:#x} (offset {offset}): found {:#04x}",
                bytes[offset]
            );
        }
    }
    Ok(())
}
