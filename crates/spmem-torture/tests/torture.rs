//! The torture suite: every case of `torture`, bare and under `spm run` at budgets of 10, 25 and 50 % of what it
//! touches.
//!
//! `cargo test -p spmem-torture` runs the quick set: each case bare and at 10 %, and of each theme (fork, remap, ...) every
//! eighth case at 25 % and the one after it at 50 %. The other trials count as ignored and are printed as left out; `-- --include-ignored`
//! runs them too. One case: `-- at-10::fork-cold`; the bare ones: `-- bare::`. Settings, all by environment:
//!
//! - `SPM`: the binary under test (else `spm` is built once, by the profile of this test);
//! - `SPMEM_TORTURE=long`: all budgets, more data, longer;
//! - `SPMEM_TORTURE_MIB`, `_SECONDS`, `_SEED`: data and time of a case;
//! - `SPMEM_TORTURE_BUDGETS`: per cents, `10,25,50`; `SPMEM_TORTURE_FLOOR_MIB`: the least budget;
//! - `SPMEM_TORTURE_CONFIG`: a configuration for every run, in full: nodes that cold pages go to;
//! - `SPMEM_TORTURE_LIMIT`: seconds after which a case is killed, with all it started, and counts as failed.
//!
//! Some cases are tried once more with a swap file that has room for all (`swap::`) and with one that is soon full (`swap-full::`).
//!
//! A managed case passes if it exits 0 and, where it is meant to go cold, the report of `spm` shows demoted pages.
//! Without a usable userfaultfd (not root) managed cases are skipped, counted and printed.
//!
//! Known hole: `orphan` kills `spm`, so no report says whether its pages left before.
#![allow(
    unsafe_code,
    clippy::multiple_unsafe_ops_per_block,
    reason = "asks the kernel for userfaultfd and kills what a case left behind"
)]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test harness: a panic is a failed test, descriptors are small"
)]

mod traced;
mod watch;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};
use watch::{End, Watched};

const TORTURE: &str = env!("CARGO_BIN_EXE_torture");
/// Status of `torture` for a case this machine cannot run.
const EXIT_SKIPPED: i32 = 77;
/// The case whose data compresses so well that the budget has to be kept.
const KEEPS_BUDGET: &str = "store-read";
/// The case whose pages stay away for so long that they are recompressed, where a second processor is there for it.
const GOES_COLD: &str = "store-cold";
/// The case whose store is damaged: each page that it loses is told of.
const LOSES_PAGES: &str = "faults-bits";
/// The case whose encoder fails and answers wrongly: all of it is told of, and nothing is lost.
const FAILS_TO_ENCODE: &str = "faults-codec";
/// The case whose processes have the same number in different pid namespaces: how many are counted.
const COUNTS_ALL: (&str, u64) = ("fork-pid-namespaces", 7);
/// Cases that are tried with a swap file, too, and those of them that are tried with one that is soon full.
const WITH_SWAP: &[&str] = &[
    "threads-shared",
    "sweep-random",
    "sweep-clean",
    "fork-both",
    "fork-cold",
    "fork-many",
    "fork-chain",
    "fork-storm",
    "fork-exits",
    "fork-orphans",
    "fork-rewrite",
    "fork-kill",
    "fork-while-writing",
    "fork-while-unmapping",
    "fork-while-remapping",
    "fork-while-cloning",
    "fork-while-advising",
    "fork-killed",
    "fork-filtered",
    "fork-without-threads",
    "fork-generations",
    "fork-nursed",
    "fork-served",
    "exec-vfork",
    "exec-self",
    "exec-clean",
    "exec-threads",
    "raw-fork",
    "raw-chain",
    "raw-beside-fork",
    "raw-orphan",
    "raw-daemon",
    "remap-race",
    "unmap-race",
    "dontneed-threads",
    "daemon",
    "rights-dropped",
    "rights-chroot",
    "limit-fsize",
    "limit-nofile",
    "limit-threads",
    "fd-census",
    "fd-close-all",
    "store-incompressible",
    "orphan",
    "supervisor-stopped",
    "supervisor-stopped-fork",
    "siblings-killed",
    "creator-killed",
    SWAP_LOSES_PAGES,
];
const WITH_FULL_SWAP: &[&str] = &["sweep-random", "fork-both", "fork-chain", "fork-rewrite", "siblings-killed"];
/// Of these trials, the quick set.
const QUICK_WITH_SWAP: &[&str] = &[
    "swap::sweep-random",
    "swap::fork-both",
    "swap::fork-killed",
    "swap::fork-nursed",
    "swap::exec-threads",
    "swap::raw-orphan",
    "swap::siblings-killed",
    "swap::creator-killed",
    "swap::orphan",
    "swap::supervisor-stopped-fork",
    "swap::faults-swap",
    "swap-full::fork-both",
];
/// The case that damages swap files; without one nothing may be lost.
const SWAP_LOSES_PAGES: &str = "faults-swap";
/// A case touches its data and a ballast twice that size.
const TOUCHED_FACTOR: u64 = 3;
/// In the quick set, one in so many cases of a theme is tried at each of the wider budgets.
const EACH_WIDER: usize = 8;
/// Trials whose times are printed.
const SLOWEST: usize = 12;

fn main() {
    let mut arguments = Arguments::from_args();
    // Some trials wait most of the time.
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    arguments.test_threads.get_or_insert(processors + 1);
    let settings: &'static Settings = Box::leak(Box::new(Settings::from_environment()));
    let list = Command::new(TORTURE).arg("list").output().expect("torture runs");
    let list = String::from_utf8(list.stdout).expect("torture lists text");
    let mut trials = Vec::new();
    // Who names trials gets all of that name.
    let is_whole = settings.is_long || arguments.filter.is_some();
    let mut left_out = 0;
    for line in list.lines() {
        let mut fields = line.split('\t');
        let case = Case { name: fields.next().unwrap().into(), is_cold: fields.next() == Some("cold") };
        let number: usize = fields.next().and_then(|text| text.parse().ok()).expect("torture numbers its cases");
        let bare = case.clone();
        trials.push(trial(format!("bare::{}", case.name), move || run_bare(settings, &bare)));
        for (names, kind, mib) in [(WITH_SWAP, "swap", 512), (WITH_FULL_SWAP, "swap-full", 4)] {
            if names.contains(&&*case.name) {
                let (case, per_cent) = (case.clone(), settings.budgets[0]);
                let name = format!("{kind}::{}", case.name);
                let is_left_out = !is_whole && !QUICK_WITH_SWAP.contains(&&*name);
                left_out += u64::from(is_left_out && !arguments.include_ignored);
                let trial = trial(name, move || run_managed(settings, &case, per_cent, Some(mib)));
                trials.push(trial.with_ignored_flag(is_left_out));
            }
        }
        for (at, &per_cent) in settings.budgets.iter().enumerate() {
            let is_quick = at == 0 || number % EACH_WIDER == at - 1;
            let (name, case) = (format!("at-{per_cent}::{}", case.name), case.clone());
            let trial = trial(name, move || run_managed(settings, &case, per_cent, None));
            let is_left_out = !is_quick && !is_whole;
            left_out += u64::from(is_left_out && !arguments.include_ignored);
            trials.push(trial.with_ignored_flag(is_left_out));
        }
    }
    trials.push(trial("own-memory-functions".into(), move || run_own_memory_functions(settings)));
    trials.push(trial("traced".into(), move || traced::run_without_touching_empty_slots(settings)));
    trials.push(trial("under-strace".into(), move || run_under_strace(settings)));
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        print_slowest();
        if left_out > 0 && !arguments.ignored {
            println!(
                "{left_out} trials at wider budgets and with swap files were left out: `-- --include-ignored` runs them too"
            );
        }
    }
    let skipped = SKIPPED.load(Relaxed);
    if skipped > 0 {
        println!("{skipped} trials were skipped, not passed");
    }
    conclusion.exit();
}

/// What the trials took, and which.
static TIMES: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());
/// Trials that this machine could not run.
static SKIPPED: AtomicU64 = AtomicU64::new(0);

fn trial(name: String, run: impl FnOnce() -> Result<Completion, Failed> + Send + 'static) -> Trial {
    let timed = name.clone();
    Trial::ignorable_test(name, move || {
        let started = Instant::now();
        let outcome = run();
        TIMES.lock().unwrap().push((started.elapsed(), timed));
        SKIPPED.fetch_add(u64::from(matches!(outcome, Ok(Completion::Ignored { .. }))), Relaxed);
        outcome
    })
}

fn print_slowest() {
    let mut times = TIMES.lock().unwrap();
    times.sort_unstable_by(|one, other| other.cmp(one));
    let all: Duration = times.iter().map(|(time, _)| *time).sum();
    println!("{} trials took {:.0} s one by one, the slowest:", times.len(), all.as_secs_f64());
    for (time, name) in times.iter().take(SLOWEST) {
        println!("{:>6.1} s  {name}", time.as_secs_f64());
    }
}

#[derive(Clone)]
struct Case {
    name: String,
    is_cold: bool,
}

struct Settings {
    is_long: bool,
    mib: u64,
    seconds: String,
    seed: String,
    budgets: Vec<u64>,
    floor_mib: u64,
    limit: Duration,
}

impl Settings {
    fn from_environment() -> Self {
        let get = |name: &str| std::env::var(format!("SPMEM_TORTURE{name}")).ok();
        let number = |name: &str, default: u64| get(name).map_or(default, |text| text.parse().expect(name));
        let is_long = get("").is_some_and(|text| text == "long");
        let budgets = get("_BUDGETS").unwrap_or_else(|| "10,25,50".into());
        Settings {
            is_long,
            mib: number("_MIB", if is_long { 64 } else { 12 }),
            seconds: get("_SECONDS").unwrap_or_else(|| if is_long { "5" } else { "0.2" }.into()),
            seed: get("_SEED").unwrap_or_else(|| "1".into()),
            budgets: budgets.split(',').map(|text| text.trim().parse().expect("per cents")).collect(),
            floor_mib: number("_FLOOR_MIB", 4),
            limit: Duration::from_secs(number("_LIMIT", if is_long { 300 } else { 60 })),
        }
    }

    fn budget_bytes(&self, per_cent: u64) -> u64 {
        (self.mib * TOUCHED_FACTOR * per_cent * (1 << 20) / 100).max(self.floor_mib << 20)
    }

    fn case_arguments(&self, case: &Case) -> Vec<String> {
        let mib = self.mib.to_string();
        [&case.name, "--mib", &mib, "--seconds", &self.seconds, "--seed", &self.seed].map(String::from).into()
    }
}

fn run_bare(settings: &Settings, case: &Case) -> Result<Completion, Failed> {
    let place = Place::new(&case.name);
    if case.name == "orphan" {
        // A shell takes the part of the supervisor that is killed.
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", "\"$@\" & wait", "sh", TORTURE]).args(settings.case_arguments(case));
        return run_orphan(settings, shell, &place);
    }
    let mut command = Command::new(TORTURE);
    command.args(settings.case_arguments(case));
    judge(watch::run(command, &place.path("output"), settings.limit))
}

/// With a swap file of so many MiB, if any.
fn run_managed(
    settings: &Settings,
    case: &Case,
    per_cent: u64,
    swap_mib: Option<u64>,
) -> Result<Completion, Failed> {
    if let Err(reason) = userfaultfd() {
        return Ok(Completion::ignored_with(reason));
    }
    let spm = spm()?;
    let place = Place::new(&format!("{}-{per_cent}-{}", case.name, swap_mib.unwrap_or(0)));
    let report = place.path("report.json");
    let mut command = Command::new(spm);
    command.args(["run", "--sysram", &settings.budget_bytes(per_cent).to_string(), "--json"]).arg(&report);
    if let Some(mib) = swap_mib {
        // Where programs are built is no RAM, as the folder for temporary files may be.
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("swap");
        let node = format!("[[node]]\nid = 2\nkind = \"file\"\npath = {path:?}\ncapacity = \"{mib}M\"\n");
        std::fs::write(place.path("config"), node)?;
        command.arg("--config").arg(place.path("config"));
    } else if let Ok(config) = std::env::var("SPMEM_TORTURE_CONFIG") {
        command.args(["--config", &config]);
    }
    command.arg("--").arg(TORTURE).args(settings.case_arguments(case));
    if case.name == "orphan" {
        return run_orphan(settings, command, &place);
    }
    let watched = watch::run(command, &place.path("output"), settings.limit);
    let watched_output = watched.output.clone();
    match judge(watched)? {
        Completion::Completed if case.name == LOSES_PAGES => judge_losses(&watched_output, &report, 1),
        Completion::Completed if case.name == FAILS_TO_ENCODE && has_encoder() => {
            judge_errors(&watched_output)?;
            judge_report(case, &report, settings.budget_bytes(per_cent))
        }
        Completion::Completed if case.name == SWAP_LOSES_PAGES && swap_mib.is_some() => {
            judge_losses(&watched_output, &report, 2)
        }
        Completion::Completed if swap_mib.is_some() => judge_swap(case, &report, swap_mib.unwrap_or(0)),
        Completion::Completed => judge_report(case, &report, settings.budget_bytes(per_cent)),
        skipped => Ok(skipped),
    }
}

/// A program that defines `memcpy` itself, in front of the C library's: it must not be run by agent threads.
fn run_own_memory_functions(settings: &Settings) -> Result<Completion, Failed> {
    if let Err(reason) = userfaultfd() {
        return Ok(Completion::ignored_with(reason));
    }
    let place = Place::new("own-memory-functions");
    let (source, program) = (place.path("program.c"), place.path("program"));
    std::fs::write(&source, include_str!("own_memory_functions.c"))?;
    let built = Command::new("cc").args(["-O1", "-rdynamic", "-o"]).arg(&program).arg(&source).status();
    if !built.is_ok_and(|status| status.success()) {
        return Ok(Completion::ignored_with("no C compiler"));
    }
    let report = place.path("report.json");
    let budget: u64 = 16 << 20;
    let mut command = Command::new(spm()?);
    command.args(["run", "--sysram", &budget.to_string(), "--json"]).arg(&report).arg("--").arg(&program);
    let case = Case { name: "own-memory-functions".into(), is_cold: true };
    judge(watch::run(command, &place.path("output"), settings.limit))?;
    judge_report(&case, &report, budget)
}

/// A tracer that follows all threads and reads what system calls are given, out of cold pages.
fn run_under_strace(settings: &Settings) -> Result<Completion, Failed> {
    if let Err(reason) = userfaultfd() {
        return Ok(Completion::ignored_with(reason));
    }
    let place = Place::new("under-strace");
    let trace = place.path("trace");
    let is_there = Command::new("strace").args(["-f", "-o"]).arg(&trace).arg("true").output();
    if !is_there.is_ok_and(|output| output.status.success()) {
        return Ok(Completion::ignored_with("no strace that may trace"));
    }
    let (report, budget) = (place.path("report.json"), settings.budget_bytes(10));
    let case = Case { name: "io-pipe".into(), is_cold: true };
    let mut command = Command::new(spm()?);
    command.args(["run", "--sysram", &budget.to_string(), "--json"]).arg(&report);
    command.args(["--", "strace", "-f", "-s", "64", "-e", "trace=read,write", "-o"]).arg(&trace);
    command.arg(TORTURE).args(settings.case_arguments(&case));
    judge(watch::run(command, &place.path("output"), settings.limit))?;
    judge_report(&case, &report, budget)
}

fn judge(watched: Watched) -> Result<Completion, Failed> {
    match watched.end {
        End::Exit(0) if watched.left_behind.is_empty() => Ok(Completion::Completed),
        End::Exit(EXIT_SKIPPED) => {
            let reason = watched.output.lines().find(|line| line.contains("SKIPPED")).unwrap_or("skipped");
            Ok(Completion::ignored_with(reason))
        }
        _ => Err(watched.to_string().into()),
    }
}

/// R20: who lost which page is told, by process, address and node; and nobody is told of a page that was not lost.
fn judge_losses(output: &str, report: &Path, node: u32) -> Result<Completion, Failed> {
    let losses = output.lines().filter_map(|line| line.strip_prefix("lost ")?.split_once(' '));
    let mut losses: Vec<_> = losses
        .map(|(process, address)| format!("process {process}: page {address} is lost: node {node} "))
        .collect();
    if losses.is_empty() {
        return Err(format!("no page was lost: the case proved nothing\n{output}").into());
    }
    let count = field(&std::fs::read_to_string(report)?, "lost_pages");
    if count != Some(losses.len() as u64) {
        return Err(format!("{} pages were lost; the report says {count:?}\n{output}", losses.len()).into());
    }
    for line in output.lines().filter(|line| line.contains(" is lost: ")) {
        let Some(at) = losses.iter().position(|loss| line.contains(loss)) else {
            return Err(format!("told, and not lost, or told twice: {line}\n{output}").into());
        };
        losses.swap_remove(at);
    }
    if losses.is_empty() {
        Ok(Completion::Completed)
    } else {
        Err(format!("not told: {losses:?}\n{output}").into())
    }
}

/// R19: what the encoder has failed at, and what it has answered wrongly, is told of, as often as that was and no more.
fn judge_errors(output: &str) -> Result<(), Failed> {
    for (what, words) in [
        ("encoding errors", "did not read back after encoding for node 1; it stays"),
        ("wrong answers", "spm has encoded something else; the process encodes it itself"),
    ] {
        let most = output
            .lines()
            .find_map(|line| line.strip_prefix(what)?.strip_prefix(" at most: ")?.parse::<usize>().ok());
        let told = output.lines().filter(|line| line.contains(words)).count();
        // Answers that come too late are not looked at.
        if told == 0 || most.is_none_or(|most| told > most) {
            return Err(format!("{told} {what} were told of, of {most:?}\n{output}").into());
        }
    }
    Ok(())
}

/// Pages are encoded in another process where there is a processor for it.
fn has_encoder() -> bool {
    std::thread::available_parallelism().is_ok_and(|count| count.get() > 1)
}

/// That pages went to the swap file, and that it was full if it is small.
fn judge_swap(case: &Case, path: &Path, mib: u64) -> Result<Completion, Failed> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("the report {}: {error}", path.display()))?;
    let node = text.split_once("\"node\": 2,").ok_or_else(|| format!("no node 2 in the report:\n{text}"))?.1;
    let (is_small, peak) = (mib < 64, field(node, "stored_bytes_peak").unwrap_or(0));
    if case.is_cold && field(node, "demoted_pages").unwrap_or(0) == 0 {
        return Err(format!("no page went to the file: the case proved nothing\n{text}").into());
    }
    if case.is_cold && is_small && peak < (mib << 20) / 4 * 3 {
        return Err(format!("the file was never nearly full: the case proved nothing\n{text}").into());
    }
    if field(&text, "lost_pages") != Some(0) {
        return Err(format!("pages were lost\n{text}").into());
    }
    match field(&text, "exit_code") {
        Some(0) => Ok(Completion::Completed),
        other => Err(format!("exit_code in the report is {other:?}, the status was 0\n{text}").into()),
    }
}

/// What must be in the report for the check not to be vacuous.
fn judge_report(case: &Case, path: &Path, budget_bytes: u64) -> Result<Completion, Failed> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("the report {}: {error}", path.display()))?;
    let demoted =
        field(&text, "demoted_pages").ok_or_else(|| format!("no demoted_pages in the report:\n{text}"))?;
    if case.is_cold && demoted == 0 {
        return Err(format!("no page was demoted: the case proved nothing\n{text}").into());
    }
    if field(&text, "lost_pages") != Some(0) {
        return Err(format!("pages were lost\n{text}").into());
    }
    if case.name == GOES_COLD && has_encoder() && field(&text, "recompressed_pages").unwrap_or(0) == 0 {
        return Err(format!("no page was recompressed: the case proved nothing\n{text}").into());
    }
    let counted = field(&text, "processes");
    // On a busy machine a child may take so long to serve itself that it is left alone, with its own children.
    let are_all_managed = field(&text, "unmanaged_processes") == Some(0);
    if case.name == COUNTS_ALL.0 && are_all_managed && counted != Some(COUNTS_ALL.1) {
        return Err(format!("{counted:?} processes of {} have a slot of their own\n{text}", COUNTS_ALL.1).into());
    }
    let most = budget_bytes + (32 << 20) + budget_bytes / 20;
    if case.name == KEEPS_BUDGET && field(&text, "sysram_peak_bytes").is_none_or(|peak| peak > most) {
        return Err(format!("the budget of {budget_bytes} was exceeded by more than 32 MiB + 5 %\n{text}").into());
    }
    match field(&text, "exit_code") {
        Some(0) => Ok(Completion::Completed),
        other => Err(format!("exit_code in the report is {other:?}, the status was 0\n{text}").into()),
    }
}

/// A number of a flat JSON object.
fn field(json: &str, name: &str) -> Option<u64> {
    let rest = json.split_once(&format!("\"{name}\""))?.1.trim_start().strip_prefix(':')?.trim_start();
    rest[..rest.find(|c: char| !c.is_ascii_digit())?].parse().ok()
}

/// Starts a program that starts `torture orphan`, kills the former with SIGKILL once the latter is at work, and waits
/// for the latter's verdict in a file.
fn run_orphan(settings: &Settings, mut command: Command, place: &Place) -> Result<Completion, Failed> {
    let verdict = place.path("verdict");
    let ready = PathBuf::from(format!("{}.ready", verdict.display()));
    command.arg("--out").arg(&verdict);
    let mut started = watch::start(command, &place.path("output"));
    let deadline = Instant::now() + settings.limit;
    let mut text = String::new();
    if started.wait_for(&ready, deadline) {
        std::thread::sleep(Duration::from_millis(500));
        started.kill_leader();
        if started.wait_for(&verdict, deadline) {
            text = std::fs::read_to_string(&verdict).unwrap_or_default();
        }
    }
    let is_late = Instant::now() >= deadline;
    let watched = started.finish(is_late);
    if text == "ok" {
        return Ok(Completion::Completed);
    }
    let mut message = format!("the orphan's verdict: {text:?}");
    write!(message, "\n{watched}").unwrap();
    Err(message.into())
}

/// A directory of a trial, removed when it passed or failed.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("spmem-torture-suite-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Place(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The binary under test.
fn spm() -> Result<&'static Path, Failed> {
    static SPM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let found = SPM.get_or_init(|| match std::env::var_os("SPM") {
        Some(path) => Ok(PathBuf::from(path)),
        None => build_spm(),
    });
    found.as_ref().map(PathBuf::as_path).map_err(|text| text.as_str().into())
}

/// By the profile that this test was built with: where the tests of the workspace run, it is there already. The agent
/// inside is the one that is shipped, whatever the profile.
fn build_spm() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| format!("this program's own file: {error}"))?;
    // target/PROFILE/deps/torture-HASH
    let folder = own.ancestors().nth(2).and_then(Path::file_name).and_then(|name| name.to_str());
    let profile = match folder.ok_or("this test is not in a target directory")? {
        "debug" => "dev",
        name => name,
    };
    let output = Command::new(env!("CARGO"))
        .args(["build", "--locked", "--profile", profile, "--package", "spmem-cli"])
        .args(["--message-format", "json-render-diagnostics"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cargo: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let path = text
        .lines()
        .filter(|line| line.contains("\"executable\":\""))
        .filter_map(|line| line.split_once("\"executable\":\"")?.1.split('"').next().map(PathBuf::from))
        .find(|path| path.file_name().is_some_and(|name| name == "spm"));
    path.ok_or_else(|| "the build of spmem-cli gave no spm".into())
}

/// Whether this process may have a userfaultfd with the features the agent needs.
fn userfaultfd() -> Result<(), String> {
    const API: u64 = 0xc018_aa3f;
    // EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP, MOVE.
    const FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 16;
    // SAFETY: asks for a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(format!("userfaultfd: {}", std::io::Error::last_os_error()));
    }
    let mut api = [0xaau64, FEATURES, 0];
    // SAFETY: the structure has the kernel's layout.
    let result = unsafe { libc::ioctl(fd as i32, API, api.as_mut_ptr()) };
    let error = std::io::Error::last_os_error();
    // SAFETY: the descriptor is ours.
    unsafe { libc::close(fd as i32) };
    if result < 0 { Err(format!("userfaultfd with events and MOVE: {error}")) } else { Ok(()) }
}
