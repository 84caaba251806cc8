//! A process that encodes pages and answers wrongly, or late (R19, R20).
//!
//! A child is its ill will: it traces the thread that takes the answers, or those that give them, and lays hands on what both
//! share, a mapping named `spmem-exchange`, through /proc/PID/mem. So no build of `spm` needs a switch for it. Bare there is no such
//! mapping: nothing is spoiled, and nothing may be lost.
//!
//! Alone among the cases these know the names of threads of spm's and how an answer is laid out; where that is no more so, nothing is
//! spoiled, which fails.

use crate::area::{Area, Ballast};
use crate::faults;
use crate::fork_traced::{seize, wait_stopped};
use crate::harness::{Case, Ctx, Outcome, Res, ensure};
use crate::model::{PAGE, Rng};
use crate::process;
use crate::sys;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case::new(
        "faults-codec",
        "where the encoder fails, answers with garbage, or for another page, no byte is wrong or lost",
        codec,
    ),
    Case::new("faults-slow", "where the encoder answers late no byte is wrong, and nobody waits for ever", slow),
];

/// Lanes of an exchange: where they begin and how far it is from one to the next, bytes.
const LANES: [u64; 2] = [64, 64 + 65984];
/// In a lane: how many pages, its items, and the bytes of what was encoded.
const COUNT: u64 = 4;
const ITEMS: u64 = 16;
const ITEM_BYTES: u64 = 24;
const LANE_PAGES: u32 = 16;
const BYTES: u64 = ITEMS + ITEM_BYTES * LANE_PAGES as u64;
/// In an item, behind the address: what became of the page, how long it is, its checksum or what fills it.
const KIND: u64 = 8;
const LEN: u64 = 12;
const WORD: u64 = 16;
/// States of a lane.
const POSTED: u32 = 1;
const DONE: u32 = 2;
/// Kinds of an answer.
const UNREAD: u32 = 0;
const NOT_REPRODUCED: u32 = 3;
/// With lz4, or densely without a dictionary and with one.
const ENCODED: [u32; 3] = [1, 4, 5];

/// One answer of so many is spoiled.
const SPOILED_SHARE: usize = 2;
/// Of each kind, so many are enough.
const ENOUGH: usize = 8;
/// After this it is too late for them.
const LIMIT: Duration = Duration::from_secs(120);
/// Between two interruptions, ms.
const REST_MS: i32 = 20;
/// How long a question is waited for, ms.
const MOST_WAIT_MS: u64 = 10;
/// How long encoders stay away, ms: within the patience of who waits for them, and beyond it.
const DELAYS_MS: [u64; 5] = [1, 3, 10, 30, 120];

fn codec(ctx: &Ctx) -> Outcome {
    beside(ctx, |program, encoding, told| {
        let mut area = Area::filled(ctx.seed ^ 1, ctx.pages() / 2)?;
        let (mut rng, mut at, mut spoiler) = (ctx.rng(99), 0, None);
        let (mut spoiled, begin) = (Spoiled::default(), Instant::now());
        let mut is_over = false;
        while !is_over || spoiler.is_some() && !spoiled.is_enough() && begin.elapsed() < LIMIT {
            is_over = is_over || faults::heard(told, REST_MS)?.is_some();
            match &mut spoiler {
                None => spoiler = Spoiler::of(program, encoding)?,
                Some(spoiler) => spoiler.spoil(&mut rng, &mut spoiled)?,
            }
            faults::go_on(&mut area, &mut rng, &mut at)?;
        }
        drop(spoiler);
        // The suite holds it against what was told.
        println!("encoding errors at most: {}", spoiled.errors);
        println!("wrong answers at most: {}", spoiled.answers);
        area.check_all("process beside one whose answers are spoiled")
    })
}

/// How many answers the agent was given that are not what the encoder had made of the page.
#[derive(Default)]
struct Spoiled {
    /// The encoder is said to have failed.
    errors: usize,
    /// What it is said to have made is something else.
    answers: usize,
    /// Of these, such as are right of another page.
    exchanged: usize,
}

impl Spoiled {
    fn is_enough(&self) -> bool {
        self.errors >= ENOUGH && self.answers >= ENOUGH && self.exchanged >= ENOUGH
    }
}

/// Memory that a process shares with who encodes for it.
struct Exchange {
    memory: File,
    start: u64,
}

impl Exchange {
    fn of(pid: i32) -> Option<Self> {
        let maps = sys::slurp(&format!("/proc/{pid}/maps"));
        let line = maps.lines().find(|line| line.contains("/memfd:spmem-exchange"))?;
        let start = u64::from_str_radix(line.split_once('-')?.0, 16).ok()?;
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).ok()?;
        Some(Self { memory, start })
    }

    fn read(&self, at: u64) -> Res<u32> {
        let mut bytes = [0; 4];
        self.memory.read_exact_at(&mut bytes, self.start + at)?;
        Ok(u32::from_ne_bytes(bytes))
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Outcome {
        Ok(self.memory.write_all_at(bytes, self.start + at)?)
    }

    fn is_posted(&self) -> Res<bool> {
        Ok(self.read(LANES[0])? == POSTED || self.read(LANES[1])? == POSTED)
    }
}

/// Holds up who takes answers, and changes them meanwhile.
struct Spoiler {
    exchange: Exchange,
    monitor: i32,
    encoders: Encoders,
}

impl Spoiler {
    fn of(program: i32, encoding: i32) -> Res<Option<Self>> {
        let (Some(exchange), Some(&monitor)) = (Exchange::of(program), threads_of(program, "spm-monitor").first())
        else {
            return Ok(None);
        };
        seize(monitor, 0)?;
        Ok(Some(Self { exchange, monitor, encoders: Encoders { encoding, traced: Vec::new() } }))
    }

    fn spoil(&mut self, rng: &mut Rng, spoiled: &mut Spoiled) -> Outcome {
        // Nothing is answered until there is a question.
        self.encoders.stop()?;
        for _ in 0..MOST_WAIT_MS {
            if self.exchange.is_posted()? {
                break;
            }
            process::nap(1);
        }
        interrupt(self.monitor)?;
        let were_posted = [self.exchange.read(LANES[0])? == POSTED, self.exchange.read(LANES[1])? == POSTED];
        let posted = || LANES.into_iter().zip(were_posted).filter_map(|(lane, was)| was.then_some(lane));
        let mut exchanged = [None; LANES.len()];
        for (lane, exchanged) in posted().zip(&mut exchanged) {
            if rng.one_in(SPOILED_SHARE) {
                *exchanged = self.exchange_questions(lane, rng)?;
            }
        }
        self.encoders.resume();
        // What was posted will be looked at; of what was done already that is not known.
        for (lane, exchanged) in posted().zip(exchanged) {
            for _ in 0..50 {
                if self.exchange.read(lane)? != POSTED {
                    break;
                }
                process::nap(1);
            }
            let is_done = self.exchange.read(lane)? == DONE;
            if let Some(two) = exchanged {
                spoiled.answers += two;
                spoiled.exchanged += if is_done { two } else { 0 };
            }
            if is_done && exchanged.is_none() {
                for item in 0..self.exchange.read(lane + COUNT)?.min(LANE_PAGES) {
                    if rng.one_in(SPOILED_SHARE) {
                        self.spoil_answer(lane, u64::from(item), rng, spoiled)?;
                    }
                }
            }
        }
        resume(self.monitor)
    }

    /// Two pages of a question change places: each answer is right, of the other page. How many, where there are two.
    fn exchange_questions(&self, lane: u64, rng: &mut Rng) -> Res<Option<usize>> {
        let count = self.exchange.read(lane + COUNT)?.min(LANE_PAGES) as usize;
        if count < 2 {
            return Ok(None);
        }
        let first = rng.below(count);
        let second = (first + 1 + rng.below(count - 1)) % count;
        let [one, other] = [first, second].map(|number| lane + ITEMS + number as u64 * ITEM_BYTES);
        let (mut of_one, mut of_other) = ([0; 8], [0; 8]);
        self.exchange.memory.read_exact_at(&mut of_one, self.exchange.start + one)?;
        self.exchange.memory.read_exact_at(&mut of_other, self.exchange.start + other)?;
        self.exchange.write(one, &of_other)?;
        self.exchange.write(other, &of_one)?;
        Ok(Some(2))
    }

    fn spoil_answer(&self, lane: u64, number: u64, rng: &mut Rng, spoiled: &mut Spoiled) -> Outcome {
        let (item, bytes) = (lane + ITEMS + number * ITEM_BYTES, lane + BYTES + number * PAGE as u64);
        let bit = |rng: &mut Rng| 1_u32 << rng.below(32);
        let kind = rng.below(9);
        match kind {
            // An error.
            0 | 1 => self.exchange.write(item + KIND, &NOT_REPRODUCED.to_ne_bytes())?,
            // No answer, or one of no kind.
            2 => {
                let kind = if rng.one_in(2) { UNREAD } else { rng.next() as u32 | 4 };
                self.exchange.write(item + KIND, &kind.to_ne_bytes())?;
            }
            // What cannot be stored is said to be encoded, in so many bytes.
            3 => {
                self.exchange.write(item + KIND, &ENCODED[rng.below(3)].to_ne_bytes())?;
                self.exchange.write(item + LEN, &(rng.below(2 * PAGE) as u32).to_ne_bytes())?;
            }
            // A page is said to be the same word throughout.
            4 => {
                self.exchange.write(item + KIND, &ENCODED[rng.below(3)].to_ne_bytes())?;
                self.exchange.write(item + LEN, &0_u32.to_ne_bytes())?;
                self.exchange.write(item + WORD, &(rng.below(256) as u64).to_ne_bytes())?;
            }
            // A bit of what it is, ...
            5 => {
                let at = item + WORD + 4 * rng.below(2) as u64;
                let old = self.exchange.read(at)?;
                self.exchange.write(at, &(old ^ bit(rng)).to_ne_bytes())?;
            }
            // ... or of the encoding, or all of it.
            6 => {
                let at = bytes + 4 * rng.below(256) as u64;
                let old = self.exchange.read(at)?;
                self.exchange.write(at, &(old ^ bit(rng)).to_ne_bytes())?;
            }
            // The dictionary that it needs is said to be none, or none one.
            7 => {
                let old = self.exchange.read(item + KIND)?;
                if ENCODED[1..].contains(&old) {
                    self.exchange.write(item + KIND, &(ENCODED[1] + ENCODED[2] - old).to_ne_bytes())?;
                }
            }
            _ => self.exchange.write(bytes, &rng.next().to_ne_bytes().repeat(PAGE / 8))?,
        }
        spoiled.errors += usize::from(kind < 2);
        spoiled.answers += usize::from(kind > 2);
        Ok(())
    }
}

/// Another process makes the encoders late.
fn slow(ctx: &Ctx) -> Outcome {
    beside(ctx, |program, encoding, told| delay(ctx, program, encoding, told))
}

/// One thread works, and forks, beside a child that is given its id, who encodes for it, and the end of a pipe that is closed in the end; and as
/// long as that child goes on.
fn beside(ctx: &Ctx, injure: impl FnOnce(i32, i32, i32) -> Outcome) -> Outcome {
    let (read, write) = sys::pipe()?;
    let program = std::process::id() as i32;
    // SAFETY: no memory is involved.
    let encoding = unsafe { libc::getppid() };
    let child = process::fork(|| {
        sys::close(write);
        injure(program, encoding, read)
    })?;
    sys::close(read);
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let mut round = 0;
    let mut work = || -> Outcome {
        ballast.sweep()?;
        area.scribble(&mut ctx.rng(round), 3);
        area.check_all("program whose encoder is hurt")?;
        let child = process::fork(|| area.check_all("child of a program whose encoder is hurt"))?;
        round += 1;
        process::succeed("child of a program whose encoder is hurt", child)
    };
    let outcome = ctx.rounds(4).try_for_each(|_| work());
    sys::close(write);
    outcome?;
    while process::is_running(child)? {
        work()?;
    }
    process::succeed("process that hurts an encoder", child)
}

/// Until the program closes its end.
fn delay(ctx: &Ctx, program: i32, encoding: i32, told: i32) -> Outcome {
    let (mut rng, mut late) = (ctx.rng(98), 0);
    let (mut encoders, mut exchange) = (Encoders { encoding, traced: Vec::new() }, None);
    while faults::heard(told, 1)?.is_none() {
        if exchange.is_none() {
            exchange = Exchange::of(program);
        }
        encoders.stop()?;
        process::nap(DELAYS_MS[rng.below(DELAYS_MS.len())]);
        let is_wanted = exchange.as_ref().map_or(Ok(false), Exchange::is_posted)?;
        late += usize::from(is_wanted && !encoders.traced.is_empty());
        encoders.resume();
    }
    println!("late answers: {late}");
    ensure!(exchange.is_none() || late > 0, "no answer was late");
    Ok(())
}

/// The threads of a process that encode for others, traced.
struct Encoders {
    encoding: i32,
    traced: Vec<i32>,
}

impl Encoders {
    fn stop(&mut self) -> Outcome {
        for encoder in threads_of(self.encoding, "spm-encoder") {
            if !self.traced.contains(&encoder) {
                seize(encoder, 0)?;
                self.traced.push(encoder);
            }
        }
        // An encoder ends with the process that it worked for.
        self.traced.retain(|&encoder| interrupt(encoder).is_ok());
        Ok(())
    }

    fn resume(&mut self) {
        self.traced.retain(|&encoder| resume(encoder).is_ok());
    }
}

fn threads_of(pid: i32, name: &str) -> Vec<i32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let numbers = tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok());
    numbers.filter(|tid| sys::slurp(&format!("/proc/{pid}/task/{tid}/comm")).trim() == name).collect()
}

fn interrupt(tid: i32) -> Outcome {
    // SAFETY: stops the thread.
    sys::ok("PTRACE_INTERRUPT", unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0) })?;
    wait_stopped(tid).map(|_| ())
}

fn resume(tid: i32) -> Outcome {
    // SAFETY: lets the thread go on.
    sys::ok("PTRACE_CONT", unsafe { libc::ptrace(libc::PTRACE_CONT, tid, 0, 0) }).map(|_| ())
}
