//! The wire protocol of Redis (RESP 2), as much as the client needs.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

/// A server that is silent for so long has failed.
const SILENCE: Duration = Duration::from_secs(300);
/// Longest reply that is believed, bytes (the limit of Redis itself).
const MAX_BULK: usize = 512 << 20;

/// One connection.
pub(super) struct Connection {
    input: BufReader<UnixStream>,
    output: Vec<u8>,
}

/// What the server answers.
#[derive(Debug)]
pub(super) enum Reply {
    /// `+OK` and the like.
    Status(String),
    /// A number.
    Integer(i64),
    /// A value, or none.
    Bulk(Option<Vec<u8>>),
}

impl Reply {
    /// # Errors
    /// It is anything but OK.
    pub(super) fn expect_ok(self) -> anyhow::Result<()> {
        match self {
            Self::Status(status) if status == "OK" => Ok(()),
            other => bail!("the reply is {other:?}, not OK"),
        }
    }
}

impl Connection {
    /// Connects to a socket file.
    pub(super) fn open(socket: &Path) -> anyhow::Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(SILENCE))?;
        Ok(Self { input: BufReader::with_capacity(64 << 10, stream), output: Vec::new() })
    }

    /// Sends one command and waits for its reply.
    pub(super) fn call(&mut self, words: &[&[u8]]) -> anyhow::Result<Reply> {
        self.send(words);
        self.flush()?;
        self.receive()
    }

    /// Puts a command into the buffer.
    pub(super) fn send(&mut self, words: &[&[u8]]) {
        self.output.extend(format!("*{}\r\n", words.len()).as_bytes());
        for word in words {
            self.output.extend(format!("${}\r\n", word.len()).as_bytes());
            self.output.extend(*word);
            self.output.extend(b"\r\n");
        }
    }

    /// Sends the buffer.
    pub(super) fn flush(&mut self) -> anyhow::Result<()> {
        self.input.get_ref().write_all(&self.output).context("cannot send to redis-server")?;
        self.output.clear();
        Ok(())
    }

    /// The next reply.
    ///
    /// # Errors
    /// The server reported an error, is silent or gone, or broke the protocol.
    pub(super) fn receive(&mut self) -> anyhow::Result<Reply> {
        let mut line = String::new();
        ensure!(
            self.input.read_line(&mut line).context("no reply from redis-server")? > 0,
            "redis-server is gone"
        );
        let line = line.trim_end();
        let (kind, rest) = line.split_at_checked(1).context("an empty reply from redis-server")?;
        match kind {
            "+" => Ok(Reply::Status(rest.into())),
            "-" => bail!("redis-server says: {rest}"),
            ":" => Ok(Reply::Integer(rest.parse()?)),
            "$" if rest == "-1" => Ok(Reply::Bulk(None)),
            "$" => {
                let length: usize = rest.parse()?;
                ensure!(length <= MAX_BULK, "a reply of {length} bytes");
                let mut value = vec![0; length + 2];
                self.input.read_exact(&mut value)?;
                value.truncate(length);
                Ok(Reply::Bulk(Some(value)))
            }
            _ => bail!("redis-server sent {line:?}"),
        }
    }
}
