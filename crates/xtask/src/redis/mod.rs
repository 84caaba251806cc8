//! A Redis server as a measured program, and a client that knows what every reply must be.
//!
//! [`Server`] starts `redis-server` on a Unix socket, on any [`Side`]; [`Store`] fills it, does random GETs and SETs
//! from several connections, and compares all values in the end. The client's threads own disjoint keys, so each
//! knows the present version of its own without a lock.

mod resp;

use std::hash::Hasher;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use sha2::{Digest, Sha256};

use crate::launch::{Bed, Finished, Job, Running, Side, hexadecimal};
use crate::packages;
use crate::programs::values::{key_name, write_value};
use resp::{Connection, Reply};

/// Mean length of a value, bytes: how many keys make up so many MiB.
const MEAN_VALUE_BYTES: u64 = 1200;
/// Requests on their way at a time while filling and comparing.
const PIPELINE: usize = 32;
/// How long a server may take to load its file, or to save it.
const PATIENCE: Duration = Duration::from_secs(600);

/// A running server.
pub(crate) struct Server {
    running: Running,
    socket: PathBuf,
}

impl Server {
    /// Starts it and waits until it answers, which is after it has loaded `dump.rdb` when there is one.
    pub(crate) fn start(bed: &Bed, side: &Side) -> anyhow::Result<Self> {
        let program = packages::need("redis-server", "redis-server")?;
        let socket = bed.dir.join("redis.sock");
        let _ = std::fs::remove_file(&socket);
        let job = Job::new("redis", program)
            .args(["--port", "0", "--unixsocket", "redis.sock", "--save", "", "--appendonly", "no"])
            .args(["--dir", ".", "--dbfilename", "dump.rdb", "--daemonize", "no", "--loglevel", "warning"])
            .limit_seconds(3600);
        let server = Self { running: bed.start(side, &job)?, socket };
        let end = Instant::now() + PATIENCE;
        while !server.answers() {
            if !server.running.is_running() || Instant::now() > end {
                let said = std::fs::read_to_string(bed.dir.join("redis.stdout")).unwrap_or_default();
                bail!("redis-server does not answer\n{}\n{said}", server.running.stderr_tail());
            }
            sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// Its process, or that of `spm` above it.
    pub(crate) fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// Saves to `dump.rdb` in a forked child.
    pub(crate) fn background_save(&self) -> anyhow::Result<()> {
        let mut connection = Connection::open(&self.socket)?;
        connection.call(&[b"BGSAVE"])?;
        let end = Instant::now() + PATIENCE;
        loop {
            let Reply::Bulk(Some(info)) = connection.call(&[b"INFO", b"persistence"])? else {
                bail!("redis-server does not tell about persistence");
            };
            let info = String::from_utf8_lossy(&info).into_owned();
            if info.contains("rdb_bgsave_in_progress:0") {
                ensure!(
                    info.contains("rdb_last_bgsave_status:ok"),
                    "BGSAVE failed\n{}",
                    self.running.stderr_tail()
                );
                return Ok(());
            }
            ensure!(Instant::now() < end, "BGSAVE did not end in time");
            sleep(Duration::from_millis(20));
        }
    }

    /// Ends it without saving.
    pub(crate) fn shut_down(self) -> anyhow::Result<Finished> {
        // The server closes the connection instead of a reply.
        let _ = Connection::open(&self.socket)?.call(&[b"SHUTDOWN", b"NOSAVE"]);
        let finished = self.running.finish()?;
        finished.succeeded()?;
        Ok(finished)
    }

    fn answers(&self) -> bool {
        let pong = Connection::open(&self.socket).and_then(|mut connection| connection.call(&[b"PING"]));
        matches!(pong, Ok(Reply::Status(status)) if status == "PONG")
    }
}

/// What the client knows: the version and a hash of the value of every key.
pub(crate) struct Store {
    clients: Vec<Client>,
}

struct Client {
    number: u32,
    step: u32,
    known: Vec<Known>,
}

#[derive(Clone, Copy, Default)]
struct Known {
    version: u32,
    hash: u64,
}

/// Requests of one phase.
pub(crate) struct Traffic {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
    /// Time of each request, ns.
    pub(crate) times: Histogram<u64>,
}

impl Traffic {
    /// Requests a second.
    pub(crate) fn rate(&self) -> f64 {
        self.requests as f64 / self.seconds
    }

    /// The time that `part` (0 to 1) of the requests did not exceed, us.
    pub(crate) fn quantile_us(&self, part: f64) -> f64 {
        self.times.value_at_quantile(part) as f64 / 1000.0
    }
}

/// When a phase of random requests ends.
#[derive(Clone, Copy)]
pub(crate) enum Until {
    /// So many requests in all: the same ones each time.
    Requests(u64),
    /// So long.
    Elapsed(Duration),
}

impl Store {
    /// A store of about `mib` of values, over `connections`.
    pub(crate) fn new(mib: u64, connections: u32) -> Self {
        let keys = (mib * (1 << 20) / MEAN_VALUE_BYTES) as u32;
        let client = |number| Client {
            number,
            step: connections,
            known: vec![Known::default(); (keys - number).div_ceil(connections) as usize],
        };
        Self { clients: (0..connections).map(client).collect() }
    }

    /// Sets every key.
    pub(crate) fn fill(&mut self, server: &Server) -> anyhow::Result<()> {
        self.on_all(|client| client.fill(&mut Connection::open(&server.socket)?)).map(|_| ())
    }

    /// Random GETs, and SETs of `set_percent` in a hundred, every reply checked.
    pub(crate) fn traffic(
        &mut self,
        server: &Server,
        until: Until,
        set_percent: u32,
        seed: u64,
    ) -> anyhow::Result<Traffic> {
        let started = Instant::now();
        let connections = self.clients.len() as u64;
        let until = match until {
            Until::Requests(count) => Until::Requests(count / connections),
            elapsed @ Until::Elapsed(_) => elapsed,
        };
        let parts = self
            .on_all(|client| client.traffic(&mut Connection::open(&server.socket)?, until, set_percent, seed))?;
        let mut times = new_histogram();
        for part in &parts {
            times.add(part).context("cannot add up the times")?;
        }
        Ok(Traffic { requests: times.len(), seconds: started.elapsed().as_secs_f64(), times })
    }

    /// Reads every key, compares every byte; a digest over all values.
    pub(crate) fn compare_all(&mut self, server: &Server) -> anyhow::Result<String> {
        let keys: usize = self.clients.iter().map(|client| client.known.len()).sum();
        let size = Connection::open(&server.socket)?.call(&[b"DBSIZE"])?;
        ensure!(
            matches!(size, Reply::Integer(count) if count == keys as i64),
            "there are {size:?} keys, not {keys}"
        );
        let digests = self.on_all(|client| client.compare_all(&mut Connection::open(&server.socket)?))?;
        let mut digest = Sha256::new();
        digests.iter().for_each(|part| digest.update(part));
        Ok(hexadecimal(&digest.finalize()))
    }

    fn on_all<T: Send>(
        &mut self,
        act: impl Fn(&mut Client) -> anyhow::Result<T> + Sync,
    ) -> anyhow::Result<Vec<T>> {
        std::thread::scope(|scope| {
            let act = &act;
            let handles: Vec<_> = self.clients.iter_mut().map(|client| scope.spawn(move || act(client))).collect();
            handles.into_iter().map(|handle| handle.join().expect("a client thread does not panic")).collect()
        })
    }
}

impl Client {
    fn key(&self, index: usize) -> u32 {
        index as u32 * self.step + self.number
    }

    fn fill(&mut self, connection: &mut Connection) -> anyhow::Result<()> {
        let mut value = Vec::new();
        for start in (0..self.known.len()).step_by(PIPELINE) {
            let indices = start..(start + PIPELINE).min(self.known.len());
            for index in indices.clone() {
                value.clear();
                write_value(self.key(index), 0, &mut value);
                self.known[index] = Known { version: 0, hash: hash(&value) };
                connection.send(&[b"SET", key_name(self.key(index)).as_bytes(), &value]);
            }
            connection.flush()?;
            for _ in indices {
                connection.receive()?.expect_ok()?;
            }
        }
        Ok(())
    }

    fn traffic(
        &mut self,
        connection: &mut Connection,
        until: Until,
        set_percent: u32,
        seed: u64,
    ) -> anyhow::Result<Histogram<u64>> {
        let mut rng = SmallRng::seed_from_u64(seed << 8 | u64::from(self.number));
        let (mut times, mut value, started) = (new_histogram(), Vec::new(), Instant::now());
        loop {
            let is_over = match until {
                Until::Requests(count) => times.len() >= count,
                Until::Elapsed(duration) => started.elapsed() >= duration,
            };
            if is_over {
                return Ok(times);
            }
            let index = rng.random_range(0..self.known.len());
            let (key, name) = (self.key(index), key_name(self.key(index)));
            if rng.random_ratio(set_percent, 100) {
                let version = self.known[index].version + 1;
                value.clear();
                write_value(key, version, &mut value);
                let before = Instant::now();
                connection.call(&[b"SET", name.as_bytes(), &value])?.expect_ok()?;
                times.saturating_record(before.elapsed().as_nanos() as u64);
                self.known[index] = Known { version, hash: hash(&value) };
            } else {
                let before = Instant::now();
                let reply = connection.call(&[b"GET", name.as_bytes()])?;
                times.saturating_record(before.elapsed().as_nanos() as u64);
                let is_right = matches!(&reply, Reply::Bulk(Some(got)) if hash(got) == self.known[index].hash);
                ensure!(is_right, "{name} has another value than version {}", self.known[index].version);
            }
        }
    }

    fn compare_all(&mut self, connection: &mut Connection) -> anyhow::Result<[u8; 32]> {
        let (mut digest, mut value) = (Sha256::new(), Vec::new());
        for start in (0..self.known.len()).step_by(PIPELINE) {
            let indices = start..(start + PIPELINE).min(self.known.len());
            for index in indices.clone() {
                connection.send(&[b"GET", key_name(self.key(index)).as_bytes()]);
            }
            connection.flush()?;
            for index in indices {
                value.clear();
                write_value(self.key(index), self.known[index].version, &mut value);
                let Reply::Bulk(Some(got)) = connection.receive()? else {
                    bail!("key {} is lost", self.key(index))
                };
                ensure!(got == value, "key {} has wrong bytes", self.key(index));
                digest.update(&got);
            }
        }
        Ok(digest.finalize().into())
    }
}

fn hash(value: &[u8]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(value);
    hasher.finish()
}

fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000_000, 3).expect("these bounds are valid")
}
