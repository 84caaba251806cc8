//! The clock without a system call: the function that the kernel maps into every process for it (vdso(7)).
//!
//! It reads memory that the kernel keeps up to date, and the processor's counter, and needs no thread-local storage,
//! unlike libc's way to it. A thread that was forbidden to read the counter must [`allow`] it first.

use core::mem::transmute;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use elf::{ElfBytes, endian::NativeEndian, file::Elf64_Ehdr};
use syscalls::{Sysno, syscall};

type ClockGettime = unsafe extern "C" fn(libc::clockid_t, *mut libc::timespec) -> libc::c_int;

/// Address of the function; 0 before [`find`], or where there is none.
static FUNCTION: AtomicUsize = AtomicUsize::new(0);

/// Looks the function up, so that [`now_ns`] uses it from now on. Asks libc where the kernel's object
/// is: to be called by a thread of libc's. Once is enough, also for children by fork(2).
pub fn find() {
    FUNCTION.store(look_up().unwrap_or(0), Relaxed);
}

/// Lets the calling thread read the processor's counter, whatever the thread that made it may do (PR_SET_TSC in prctl(2)).
pub fn allow() {
    // SAFETY: takes no pointer; refused where there is no such thing.
    let _ = unsafe { syscall!(Sysno::prctl, libc::PR_SET_TSC, libc::PR_TSC_ENABLE) };
}

/// CLOCK_MONOTONIC, ns; by a system call where the function is not known.
pub fn now_ns() -> u64 {
    monotonic().map_or_else(crate::process::now_ns, |time| ns(&time))
}

/// Nanoseconds.
pub(crate) const fn ns(time: &libc::timespec) -> u64 {
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

/// If the function is known and answers.
fn monotonic() -> Option<libc::timespec> {
    let function = FUNCTION.load(Relaxed);
    if function == 0 {
        return None;
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: an address other than 0 is that of the kernel's `clock_gettime`, which stays mapped.
    let function: ClockGettime = unsafe { transmute(core::ptr::with_exposed_provenance::<()>(function)) };
    // SAFETY: it writes one timespec.
    let result = unsafe { function(libc::CLOCK_MONOTONIC, &raw mut time) };
    (result == 0).then_some(time)
}

fn look_up() -> Option<usize> {
    // SAFETY: getauxval(3) reads a vector that does not change.
    let start = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
    if start == 0 {
        return None;
    }
    let base = core::ptr::with_exposed_provenance::<u8>(start);
    // SAFETY: an ELF object, whose header comes first, is mapped there and never changes.
    let header = unsafe { &*base.cast::<Elf64_Ehdr>() };
    // The section headers come last.
    let len = header.e_shoff as usize + usize::from(header.e_shnum) * usize::from(header.e_shentsize);
    // SAFETY: the kernel maps the whole object.
    let object = unsafe { core::slice::from_raw_parts(base, len) };
    let object = ElfBytes::<NativeEndian>::minimal_parse(object).ok()?;
    let (symbols, names) = object.dynamic_symbol_table().ok()??;
    let symbol = symbols
        .iter()
        .find(|symbol| names.get(symbol.st_name as usize).is_ok_and(|name| name == "__vdso_clock_gettime"))?;
    (symbol.st_value != 0).then_some(start + symbol.st_value as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    #[test]
    fn the_clock_of_the_kernels_object_is_the_system_calls() {
        find();
        assert_ne!(FUNCTION.load(Relaxed), 0, "no __vdso_clock_gettime");
        let before = process::now_ns();
        let between = monotonic().map(|time| ns(&time)).expect("it answers");
        let after = process::now_ns();
        assert!(before <= between && between <= after, "{before} {between} {after}");
    }

    #[test]
    fn a_thread_that_must_not_read_the_counter_can_once_it_is_allowed_to() {
        find();
        // SAFETY: takes no pointer. Of this thread only.
        unsafe { syscall!(Sysno::prctl, libc::PR_SET_TSC, libc::PR_TSC_SIGSEGV) }.expect("prctl");
        let before = process::now_ns();
        allow();
        assert!(before <= now_ns());
    }
}
