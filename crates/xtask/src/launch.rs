//! Starting a program the three ways that are compared, and what a finished one tells.
//!
//! [`Job`] says what to run, [`Side`] says how: bare, under `spm run`, or in a memory cgroup. [`Bed::start`] gives a
//! [`Running`], which is killed with its descendants when dropped, and [`Running::finish`] waits for it. All sides get
//! the same files for stdout and stderr, and the same sampler, so that what watching costs falls on each alike.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};
use wait4::Wait4;

use crate::cleanup::{Step, Undo};
use crate::process_tree::Sampler;
use crate::report::Report;

/// How a program is run.
#[derive(Clone, Debug)]
pub(crate) enum Side {
    /// As it is.
    Bare,
    /// Under `spm run --sysram`, bytes.
    Spm { sysram_bytes: u64 },
    /// Under `spm run --sysram auto`, per cent; the course is drawn into the file.
    Auto { slowdown: f64, svg: PathBuf },
    /// In the memory cgroup whose `cgroup.procs` this is.
    Cgroup { procs: PathBuf },
}

/// Where stdout goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Talk {
    /// Into a file, whose digest is compared.
    Digest,
    /// Through pipes: lines out, and lines in that let the program go on.
    Lines,
}

/// What to run.
pub(crate) struct Job {
    /// Names its files in the scratch directory.
    pub(crate) name: String,
    pub(crate) program: OsString,
    pub(crate) args: Vec<OsString>,
    pub(crate) env: Vec<(OsString, OsString)>,
    pub(crate) stdin: Option<PathBuf>,
    pub(crate) talk: Talk,
    /// Whether its memory is watched from outside; that costs a little time.
    is_sampled: bool,
    /// It is killed after this, and that is a failure.
    pub(crate) limit: Duration,
}

impl Job {
    /// A job with a minute to run, no environment of its own and an empty stdin.
    pub(crate) fn new(name: &str, program: impl Into<OsString>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            stdin: None,
            talk: Talk::Digest,
            is_sampled: true,
            limit: Duration::from_secs(60),
        }
    }

    /// A program of this tree (`xtask program NAME`).
    pub(crate) fn own(name: &str, args: &[String]) -> anyhow::Result<Self> {
        let mut job = Self::new(name, std::env::current_exe().context("cannot find this program's own file")?);
        job.args.push("program".into());
        job.args.extend(args.iter().map(OsString::from));
        Ok(job)
    }

    /// Adds arguments.
    pub(crate) fn args<I: Into<OsString>>(mut self, args: impl IntoIterator<Item = I>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds a variable.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Talks through pipes.
    pub(crate) fn lines(mut self) -> Self {
        self.talk = Talk::Lines;
        self
    }

    /// Is not watched.
    pub(crate) fn unsampled(mut self) -> Self {
        self.is_sampled = false;
        self
    }

    /// Allows so many seconds.
    pub(crate) fn limit_seconds(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds);
        self
    }
}

/// Where programs are run: a scratch directory, and `spm`.
pub(crate) struct Bed {
    spm: Option<PathBuf>,
    /// Scratch of this invocation, removed at the end.
    pub(crate) dir: PathBuf,
    /// Files kept between invocations (a corpus, a virtual environment).
    pub(crate) cache: PathBuf,
    _undo: Undo,
}

/// Whether a bed needs `spm`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum NeedSpm {
    Yes,
    No,
}

impl Bed {
    /// The `spm` that was asked for.
    pub(crate) fn spm(&self) -> anyhow::Result<&Path> {
        self.spm.as_deref().context("spm was not asked for")
    }

    /// Makes the scratch directory under the target directory, finds or builds `spm`.
    pub(crate) fn new(need_spm: NeedSpm) -> anyhow::Result<Self> {
        let cache = find_cache()?;
        let dir = cache.join(format!("run-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let undo = Undo::new(Step::RemoveTree(dir.clone()));
        let spm = if need_spm == NeedSpm::Yes { Some(find_spm()?) } else { None };
        Ok(Self { spm, dir, cache, _undo: undo })
    }

    /// Starts a job.
    pub(crate) fn start(&self, side: &Side, job: &Job) -> anyhow::Result<Running> {
        let report_file = self.dir.join(format!("{}.report.json", job.name));
        let stdout_file = self.dir.join(format!("{}.stdout", job.name));
        let stderr_file = self.dir.join(format!("{}.stderr", job.name));
        let _ = fs::remove_file(&report_file);
        let mut command = self.command(side, job, &report_file)?;
        let make = |file: &Path| File::create(file).with_context(|| format!("cannot make {}", file.display()));
        command.envs(job.env.iter().cloned()).current_dir(&self.dir).stderr(make(&stderr_file)?);
        match (&job.stdin, job.talk) {
            (Some(file), _) => command.stdin(File::open(file)?),
            (None, Talk::Lines) => command.stdin(Stdio::piped()),
            (None, Talk::Digest) => command.stdin(Stdio::null()),
        };
        command.stdout(if job.talk == Talk::Lines { Stdio::piped() } else { make(&stdout_file)?.into() });
        let started = Instant::now();
        let child = command.spawn().with_context(|| format!("cannot start {}", job.program.display()))?;
        let pid = child.id();
        let undo = Undo::new(Step::Kill(pid));
        Ok(Running {
            name: job.name.clone(),
            sampler: job.is_sampled.then(|| Sampler::start(pid)),
            watchdog: Watchdog::start(pid, job.limit),
            is_managed: matches!(side, Side::Spm { .. } | Side::Auto { .. }),
            child: Awaited(child),
            started,
            undo,
            report_file,
            stdout_file: (job.talk == Talk::Digest).then_some(stdout_file),
            stderr_file,
        })
    }

    /// Starts a job, waits for its end, and demands that it succeeded.
    pub(crate) fn run(&self, side: &Side, job: &Job) -> anyhow::Result<Finished> {
        let finished = self.start(side, job)?.finish()?;
        finished.succeeded()?;
        Ok(finished)
    }

    fn command(&self, side: &Side, job: &Job, report_file: &Path) -> anyhow::Result<Command> {
        let mut command;
        match side {
            Side::Bare => command = Command::new(&job.program),
            Side::Spm { sysram_bytes } => {
                command = Command::new(self.spm()?);
                command.args(["run", "--sysram", &sysram_bytes.to_string(), "--json"]);
                command.arg(report_file).arg("--").arg(&job.program);
            }
            Side::Auto { slowdown, svg } => {
                command = Command::new(self.spm()?);
                command.args(["run", "--sysram", "auto", "--slowdown", &format!("{slowdown}%"), "--svg"]);
                command.arg(svg).arg("--json").arg(report_file).arg("--").arg(&job.program);
            }
            Side::Cgroup { procs } => {
                // The shell joins the cgroup before it becomes the program: all its memory is charged there.
                command = Command::new("/bin/sh");
                command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(procs).arg(&job.program);
            }
        }
        command.args(&job.args);
        Ok(command)
    }
}

/// A program on its way.
pub(crate) struct Running {
    name: String,
    started: Instant,
    sampler: Option<Sampler>,
    watchdog: Watchdog,
    /// Before the child: it is killed, then awaited.
    undo: Undo,
    child: Awaited,
    is_managed: bool,
    report_file: PathBuf,
    stdout_file: Option<PathBuf>,
    stderr_file: PathBuf,
}

/// A program that has ended.
pub(crate) struct Finished {
    name: String,
    status: ExitStatus,
    timed_out: bool,
    stderr_tail: String,
    /// From start to end.
    pub(crate) elapsed: Duration,
    /// CPU time of the tree, `spm` included.
    pub(crate) cpu: Duration,
    /// Largest resident set of one process of the tree, file pages included, bytes.
    pub(crate) max_rss_bytes: u64,
    /// Peak of the tree's anonymous memory as sampled from outside, bytes; 0 for an unsampled job.
    pub(crate) sampled_peak_bytes: u64,
    /// SHA-256 of stdout.
    pub(crate) digest: String,
    /// What `spm` said; `None` for the other sides.
    pub(crate) report: Option<Report>,
}

impl Running {
    /// The process id of what was started: for [`Side::Spm`] that is `spm`, the program is below it.
    pub(crate) fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// The sampled peak so far, bytes.
    pub(crate) fn sampled_peak_bytes(&self) -> u64 {
        self.sampler.as_ref().map_or(0, Sampler::peak_bytes)
    }

    /// Both ends of a [`Talk::Lines`] job; once.
    pub(crate) fn pipes(&mut self) -> anyhow::Result<(ChildStdin, BufReader<ChildStdout>)> {
        let stdin = self.child.0.stdin.take().context("stdin is no pipe")?;
        let stdout = self.child.0.stdout.take().context("stdout is no pipe")?;
        Ok((stdin, BufReader::new(stdout)))
    }

    /// Whether it still runs.
    pub(crate) fn is_running(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    }

    /// The end of its stderr so far, to be told with a failure.
    pub(crate) fn stderr_tail(&self) -> String {
        read_tail(&self.stderr_file)
    }

    /// Waits for the end.
    pub(crate) fn finish(mut self) -> anyhow::Result<Finished> {
        let usage = self.child.0.wait4().with_context(|| format!("cannot wait for {}", self.name))?;
        let elapsed = self.started.elapsed();
        let sampled_peak_bytes = self.sampled_peak_bytes();
        let timed_out = self.watchdog.barked.load(Relaxed);
        drop((self.sampler, self.watchdog));
        self.undo.forget();
        let digest = self.stdout_file.as_deref().map_or(Ok(String::new()), digest_file)?;
        let report =
            if self.is_managed && usage.status.success() { Some(Report::read(&self.report_file)?) } else { None };
        Ok(Finished {
            status: usage.status,
            timed_out,
            stderr_tail: read_tail(&self.stderr_file),
            name: self.name,
            elapsed,
            cpu: usage.rusage.utime + usage.rusage.stime,
            max_rss_bytes: usage.rusage.maxrss,
            sampled_peak_bytes,
            digest,
            report,
        })
    }
}

impl Finished {
    /// # Errors
    /// It did not end with status 0, or not in time; with the end of its stderr.
    pub(crate) fn succeeded(&self) -> anyhow::Result<()> {
        if self.timed_out {
            bail!("{} was killed: it did not end in time\n{}", self.name, self.stderr_tail);
        }
        ensure!(self.status.success(), "{} ended with {}\n{}", self.name, self.status, self.stderr_tail);
        Ok(())
    }
}

/// Kills a tree that takes too long.
struct Watchdog {
    done: Arc<AtomicBool>,
    barked: Arc<AtomicBool>,
}

impl Watchdog {
    fn start(pid: u32, limit: Duration) -> Self {
        let (done, barked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let watch = Self { done: Arc::clone(&done), barked: Arc::clone(&barked) };
        let end = Instant::now() + limit;
        std::thread::spawn(move || {
            while !done.load(Relaxed) {
                if Instant::now() > end {
                    barked.store(true, Relaxed);
                    drop(Undo::new(Step::Kill(pid)));
                    return;
                }
                sleep(Duration::from_millis(200));
            }
        });
        watch
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.done.store(true, Relaxed);
    }
}

/// A child that leaves no zombie.
struct Awaited(Child);

impl Drop for Awaited {
    fn drop(&mut self) {
        // ECHILD where it has been awaited already.
        let _ = self.0.wait();
    }
}

/// SHA-256 of a file, in hexadecimal digits.
pub(crate) fn digest_file(file: &Path) -> anyhow::Result<String> {
    let mut input = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = input.read(&mut buffer)?;
        if length == 0 {
            return Ok(hexadecimal(&hash.finalize()));
        }
        hash.update(&buffer[..length]);
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The directory of files that are kept between invocations, under the target directory.
fn find_cache() -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe().context("cannot find this program's own file")?;
    // target/release/xtask
    let target = exe.ancestors().nth(2).context("this program is not in a target directory")?;
    Ok(target.join("xtask"))
}

fn read_tail(file: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

/// `spm` from the variable SPM, else freshly built by the profile of this program.
fn find_spm() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("SPM") {
        return fs::canonicalize(&path).with_context(|| format!("SPM={} is not there", path.display()));
    }
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    // target/PROFILE/xtask
    let folder = own.parent().and_then(Path::file_name).and_then(OsStr::to_str);
    let profile = match folder.context("this program is not in a target directory")? {
        "debug" => "dev",
        name => name,
    };
    eprintln!("xtask: building spm, profile {profile}");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "build",
            "--profile",
            profile,
            "--package",
            "spmem-cli",
            "--message-format=json-render-diagnostics",
        ])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "building spmem-cli failed");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "spm")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("the build of spmem-cli made no program called spm")
}
