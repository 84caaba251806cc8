//! Stdio: the three standard descriptors, handed on as they came.

use rustix::fs::{Mode, OFlags};

/// Fills closed standard descriptors with `/dev/null`, closed again by exec, so that no file of ours takes their
/// number (a message would be written into it) and the program still finds them closed.
pub fn fill_closed_descriptors() {
    for number in 0..3 {
        if !is_open(number) {
            // The lowest free number is taken, and those below are open by now. Without /dev/null nothing is worse
            // than before.
            if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
                std::mem::forget(null);
            }
        }
    }
}

fn is_open(number: i32) -> bool {
    std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok()
}
