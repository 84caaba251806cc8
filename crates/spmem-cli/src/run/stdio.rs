//! Stdio: the three standard descriptors, handed on as they came.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::{Mode, OFlags};

/// Stdout came closed.
static HAS_NO_STDOUT: AtomicBool = AtomicBool::new(false);

/// Fills closed standard descriptors, closed again by exec, so that no file of ours takes their number (a message would be
/// written into it) and the program still finds them closed. `/dev/null` takes their place; that of stdout takes
/// nothing, so that results do not get lost unsaid.
pub fn fill_closed_descriptors() {
    for number in 0..3 {
        if !is_open(number) {
            HAS_NO_STDOUT.fetch_or(number == 1, Relaxed);
            // The lowest free number is taken, and those below are open by now. Without one nothing is worse
            // than before.
            let stand_in = if number == 1 { "/dev/full" } else { "/dev/null" };
            if let Ok(stand_in) = rustix::fs::open(stand_in, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
                std::mem::forget(stand_in);
            }
        }
    }
}

/// Writes an answer to stdout.
///
/// # Errors
/// As write(2); `EBADF` where stdout came closed, whatever stands in for it. `std` would take that for written.
pub fn write_out(text: &str) -> io::Result<()> {
    io::stdout().write_all(text.as_bytes()).map_err(true_cause)
}

/// Why stdout did not take something: what its stand-in says is not it.
pub fn true_cause(error: io::Error) -> io::Error {
    if HAS_NO_STDOUT.load(Relaxed) { io::Error::from_raw_os_error(libc::EBADF) } else { error }
}

fn is_open(number: i32) -> bool {
    std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok()
}
