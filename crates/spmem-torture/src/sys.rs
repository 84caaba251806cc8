//! The system calls the cases make, with failures in words. Addresses are `usize`: nothing here may be a reference,
//! for the memory comes, goes and changes its rights.

use crate::harness::{Failure, Res};
use crate::model::PAGE;

/// Turns a C result into a value or a failure that names the call.
pub fn ok(what: &str, result: i64) -> Res<usize> {
    if result < 0 {
        Err(Failure::Wrong(format!("{what}: {}", std::io::Error::last_os_error())))
    } else {
        Ok(result as usize)
    }
}

/// The calling thread's `errno`.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// The calling thread's id.
pub fn gettid() -> i32 {
    // SAFETY: no memory is involved.
    unsafe { libc::syscall(libc::SYS_gettid) as i32 }
}

/// Read and write.
pub const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Private anonymous memory.
pub const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// `mmap` of `pages` pages.
pub fn map(at: usize, pages: usize, prot: i32, flags: i32) -> Res<usize> {
    map_file(at, pages, prot, flags, -1)
}

/// `mmap` of `pages` pages of a descriptor, from its start.
pub fn map_file(at: usize, pages: usize, prot: i32, flags: i32, fd: i32) -> Res<usize> {
    // SAFETY: callers pass 0 or an address they own (or MAP_FIXED_NOREPLACE).
    let got = unsafe { libc::mmap(at as *mut _, pages * PAGE, prot, flags, fd, 0) };
    ok("mmap", if got == libc::MAP_FAILED { -1 } else { got as i64 })
}

/// New private anonymous memory, read and write.
pub fn anon(pages: usize) -> Res<usize> {
    map(0, pages, RW, ANON)
}

/// New private anonymous memory whose start is a multiple of 2 MiB.
pub fn anon_huge(pages: usize) -> Res<usize> {
    let (huge, want) = (512 * PAGE, pages * PAGE);
    let base = map(0, pages + 512, RW, ANON)?;
    let start = base.next_multiple_of(huge);
    if start > base {
        unmap(base, (start - base) / PAGE)?;
    }
    let end = base + want + huge;
    if end > start + want {
        unmap(start + want, (end - start - want) / PAGE)?;
    }
    Ok(start)
}

/// `munmap`.
pub fn unmap(at: usize, pages: usize) -> Res<()> {
    // SAFETY: callers own the range.
    ok("munmap", unsafe { libc::munmap(at as *mut _, pages * PAGE) }.into()).map(drop)
}

/// `mprotect`.
pub fn protect(at: usize, pages: usize, prot: i32) -> Res<()> {
    // SAFETY: callers own the range and expect what its new rights do.
    ok("mprotect", unsafe { libc::mprotect(at as *mut _, pages * PAGE, prot) }.into()).map(drop)
}

/// `madvise`; the failure carries the advice.
pub fn advise(at: usize, pages: usize, advice: i32) -> Res<()> {
    match advise_raw(at, pages, advice) {
        0 => Ok(()),
        error => {
            let error = std::io::Error::from_raw_os_error(error);
            Err(Failure::Wrong(format!("madvise({advice}) of {pages} pages at {at:#x}: {error}")))
        }
    }
}

/// `madvise`; 0 or the error number.
pub fn advise_raw(at: usize, pages: usize, advice: i32) -> i32 {
    // SAFETY: callers own the range.
    if unsafe { libc::madvise(at as *mut _, pages * PAGE, advice) } == 0 { 0 } else { errno() }
}

/// `mremap`.
pub fn remap(at: usize, pages: usize, new_pages: usize, flags: i32, to: usize) -> Res<usize> {
    // SAFETY: callers own both ranges.
    let got =
        unsafe { libc::mremap(at as *mut _, pages * PAGE, new_pages * PAGE, flags, to as *mut libc::c_void) };
    ok("mremap", if got == libc::MAP_FAILED { -1 } else { got as i64 })
}

/// Makes a pipe: the reading end, the writing end.
pub fn pipe() -> Res<(i32, i32)> {
    let mut ends = [0i32; 2];
    // SAFETY: two descriptors fit.
    ok("pipe", unsafe { libc::pipe(ends.as_mut_ptr()) }.into())?;
    Ok((ends[0], ends[1]))
}

/// Makes a pair of connected stream sockets.
pub fn socketpair() -> Res<(i32, i32)> {
    let mut ends = [0i32; 2];
    // SAFETY: two descriptors fit.
    ok("socketpair", unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr()) }.into())?;
    Ok((ends[0], ends[1]))
}

/// Closes a descriptor.
pub fn close(fd: i32) {
    // SAFETY: no memory is involved; callers own the descriptor.
    unsafe { libc::close(fd) };
}

/// `read`, whole: fewer bytes only at the end of the file. `at` may be any memory of the process.
pub fn read_full(fd: i32, at: usize, len: usize) -> Res<usize> {
    let mut done = 0;
    while done < len {
        // SAFETY: callers own the range.
        let got = unsafe { libc::read(fd, (at + done) as *mut _, len - done) };
        match ok(&format!("read of {} bytes to {:#x}", len - done, at + done), got as i64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

/// `write`, whole.
pub fn write_full(fd: i32, at: usize, len: usize) -> Res<()> {
    let mut done = 0;
    while done < len {
        // SAFETY: callers own the range.
        let got = unsafe { libc::write(fd, (at + done) as *const _, len - done) };
        done += ok(&format!("write of {} bytes from {:#x}", len - done, at + done), got as i64)?;
    }
    Ok(())
}

/// An unlinked file in the directory for temporary files.
pub fn temp_file(flags: i32) -> Res<i32> {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("spmem-torture-{}-{number}", std::process::id()));
    let name = cstring(&path.to_string_lossy());
    // SAFETY: the name ends with a zero.
    let fd = unsafe {
        libc::open(name.as_ptr(), libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC | flags, 0o600)
    };
    let fd = ok("open of a temporary file", fd.into())?;
    // SAFETY: as above.
    unsafe { libc::unlink(name.as_ptr()) };
    Ok(fd as i32)
}

/// A C string.
pub fn cstring(text: &str) -> std::ffi::CString {
    std::ffi::CString::new(text).expect("no zero byte in a path or argument")
}

/// Installs a signal handler with `SA_SIGINFO` and more flags.
pub fn on_signal(
    signal: i32,
    handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void),
    flags: i32,
) -> Res<()> {
    // SAFETY: zeroed is valid for sigaction; the handler only does what a handler may.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | flags;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut())
    };
    ok("sigaction", result.into()).map(drop)
}

/// Restores a signal's default.
pub fn default_signal(signal: i32) {
    // SAFETY: no memory is involved.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Reads a file to a string, or "" if that fails.
pub fn slurp(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Numbers of this process's open descriptors, sorted (without the one that lists them).
pub fn descriptors() -> Vec<i32> {
    let mut open: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .collect();
    // SAFETY: no memory is involved.
    open.retain(|&fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0);
    open.sort_unstable();
    open
}

/// Open descriptors from 3 on that this process did not simply inherit from the one that started it: an inherited file
/// or pipe has the same number and target there. Kernel objects (userfaultfd, memfd, sockets) always count.
pub fn surprising_descriptors() -> Vec<i32> {
    // SAFETY: no memory is involved.
    let parent = unsafe { libc::getppid() };
    let target =
        |process: &str, fd: i32| std::fs::read_link(format!("/proc/{process}/fd/{fd}")).unwrap_or_default();
    let mut open = descriptors();
    open.retain(|&fd| {
        let own = target("self", fd);
        let is_object =
            ["anon_inode", "/memfd:", "socket:"].iter().any(|kind| own.to_string_lossy().starts_with(kind));
        fd > 2 && (is_object || own != target(&parent.to_string(), fd))
    });
    open
}

/// The lowest `count` numbers that are free now.
pub fn free_descriptors(count: usize) -> Vec<i32> {
    let open = descriptors();
    (0..).filter(|fd| !open.contains(fd)).take(count).collect()
}
