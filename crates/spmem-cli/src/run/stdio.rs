//! Stdio: the three standard descriptors, handed on as they came.

use rustix::fs::{Mode, OFlags};

/// Fills closed standard descriptors, closed again by exec, so that no file of ours takes their number (a message would be
/// written into it) and the program still finds them closed. `/dev/null` takes their place; that of stdout takes
/// nothing, so that results do not get lost unsaid.
pub fn fill_closed_descriptors() {
    for number in 0..3 {
        if !is_open(number) {
            // The lowest free number is taken, and those below are open by now. Without one nothing is worse
            // than before.
            let stand_in = if number == 1 { "/dev/full" } else { "/dev/null" };
            if let Ok(stand_in) = rustix::fs::open(stand_in, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
                std::mem::forget(stand_in);
            }
        }
    }
}

fn is_open(number: i32) -> bool {
    std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok()
}
