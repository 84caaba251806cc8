//! What every case shares: its settings, its verdict, its clock.
//!
//! A [`Case`] is one claim about memory; it gets a [`Ctx`] and gives an [`Outcome`]. Nothing here knows about spm.

use std::fmt;
use std::time::{Duration, Instant};

/// Exit status of a case that this machine cannot run.
pub const EXIT_SKIPPED: i32 = 77;

/// Why a case did not pass.
pub enum Failure {
    /// Something differed; the text says what, where and who saw it.
    Wrong(String),
    /// The machine lacks what the case needs.
    Skipped(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Wrong(text) => write!(f, "FAILED: {text}"),
            Failure::Skipped(text) => write!(f, "SKIPPED: {text}"),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::Wrong(format!("input/output: {error}"))
    }
}

/// A step's result.
pub type Res<T> = Result<T, Failure>;
/// A case's verdict.
pub type Outcome = Res<()>;

/// Leaves the function with [`Failure::Wrong`].
macro_rules! bail {
    ($($text:tt)*) => { return Err($crate::harness::Failure::Wrong(format!($($text)*))) };
}
/// Leaves the function with [`Failure::Wrong`] unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => { if !$condition { $crate::harness::bail!($($text)*) } };
}
/// Leaves the function with [`Failure::Skipped`].
macro_rules! skip {
    ($($text:tt)*) => { return Err($crate::harness::Failure::Skipped(format!($($text)*))) };
}
pub(crate) use {bail, ensure, skip};

/// One claim and the program that checks it.
pub struct Case {
    /// The subcommand.
    pub name: &'static str,
    /// What must hold, in one line.
    pub claim: &'static str,
    /// The program.
    pub run: fn(&Ctx) -> Outcome,
    /// Whether it touches enough to lose pages at every budget (most do).
    pub cold: bool,
}

impl Case {
    /// A case whose pages leave and return.
    pub const fn new(name: &'static str, claim: &'static str, run: fn(&Ctx) -> Outcome) -> Self {
        Case { name, claim, run, cold: true }
    }

    /// A case that may pass without one page leaving (what it holds is not private anonymous memory, or is locked).
    pub const fn warm(mut self) -> Self {
        self.cold = false;
        self
    }
}

/// Settings of one run.
#[derive(Clone)]
pub struct Ctx {
    /// Seed of contents and of choices.
    pub seed: u64,
    /// Size of the tested data, MiB; the ballast comes on top.
    pub mib: usize,
    /// How long to go on, at least.
    pub time: Duration,
    /// Where `orphan` and `daemon` leave their verdict.
    pub out: Option<String>,
    /// When the case began.
    pub started: Instant,
}

impl Ctx {
    /// Pages of tested data.
    pub fn pages(&self) -> usize {
        self.mib * 256
    }

    /// Round numbers: at least `min`, then on until the time is up.
    pub fn rounds(&self, min: u64) -> impl Iterator<Item = u64> + use<> {
        let (started, time) = (self.started, self.time);
        (0u64..).take_while(move |&round| round < min || started.elapsed() < time)
    }

    /// Whether the time is up.
    pub fn is_over(&self) -> bool {
        self.started.elapsed() >= self.time
    }

    /// A generator of choices, different for each `salt`.
    pub fn rng(&self, salt: u64) -> crate::model::Rng {
        crate::model::Rng::new(self.seed ^ crate::model::mix(salt + 1))
    }
}

/// Writes one line to standard error in one piece, with process and thread. No lock is taken: it works after a fork.
pub fn report(text: &str) {
    let line = format!("torture[{}/{}]: {text}\n", std::process::id(), crate::sys::gettid());
    // SAFETY: the buffer is valid for its length; a failed write loses a remark.
    unsafe { libc::write(2, line.as_ptr().cast(), line.len()) };
}

/// Joins the outcomes of several threads into one, all texts kept.
pub fn all(outcomes: impl IntoIterator<Item = Outcome>) -> Outcome {
    let mut wrong = Vec::new();
    for outcome in outcomes {
        match outcome {
            Ok(()) => {}
            Err(Failure::Wrong(text)) => wrong.push(text),
            Err(skipped) => return Err(skipped),
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(Failure::Wrong(wrong.join("\n"))) }
}

/// Runs `count` threads and joins their outcomes.
pub fn threads(count: usize, body: impl Fn(usize) -> Outcome + Sync) -> Outcome {
    std::thread::scope(|scope| {
        let body = &body;
        let running: Vec<_> = (0..count).map(|id| scope.spawn(move || body(id))).collect();
        all(running.into_iter().map(join))
    })
}

/// A scoped thread's outcome; a panic is a failure.
pub fn join(handle: std::thread::ScopedJoinHandle<'_, Outcome>) -> Outcome {
    handle.join().unwrap_or_else(|_| Err(Failure::Wrong("a thread panicked".into())))
}
