//! Program: which file does a command name, and can the agent be preloaded into it?
//!
//! [`find`] looks a command up as execvp(3) does. [`check`] follows `#!` lines to the program that the kernel will
//! load and gives the [`Obstacle`] for which the dynamic loader would not load the agent. Called before anything is
//! started; children are checked by nobody, they count as unmanaged when their agent does not show up.
//! Holes: binfmt_misc interpreters are taken for what they interpret; what `env` starts is followed for the plain
//! `#!/usr/bin/env NAME` only.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, StatVfsMountFlags};
use rustix::process::{getegid, getgid, getuid};

use super::elf::Header;

/// `#!` lines that are followed; the kernel gives up earlier (`exec_binprm` in fs/exec.c).
const SCRIPT_DEPTH: usize = 5;
/// Bytes of a `#!` line that the kernel looks at (BINPRM_BUF_SIZE).
const SCRIPT_LINE: usize = 256;
/// Where execvp(3) looks without a PATH.
const DEFAULT_PATH: &str = "/bin:/usr/bin";
/// Symbols of the runtimes of gcc's and clang's -fsanitize=address and -fsanitize=leak.
const SANITIZERS: [&str; 2] = ["__asan_init", "__lsan_init"];

/// Why no file can be executed for a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// No such file.
    NotFound,
    /// It may be there: a directory, not allowed, or a path that cannot be followed. The error number says which.
    NotExecutable(i32),
}

impl From<Missing> for std::io::Error {
    fn from(missing: Missing) -> Self {
        Self::from_raw_os_error(match missing {
            Missing::NotFound => libc::ENOENT,
            Missing::NotExecutable(errno) => errno,
        })
    }
}

/// Why the dynamic loader would not load the agent into a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// No dynamic loader is asked for.
    Static { program: PathBuf },
    /// Runs with other rights than its caller's, so the loader ignores LD_PRELOAD (ld.so(8), secure execution).
    Privileged { program: PathBuf, by: &'static str },
    /// It loads the command proper itself.
    Loader { program: PathBuf },
    /// Built with AddressSanitizer or LeakSanitizer. The runtime ends the program unless it is loaded before everything else;
    /// linked in, it stops all threads, the agent's too, and waits for memory that these would bring back.
    Sanitized { program: PathBuf },
    /// Another word size or processor than this `spm`'s.
    Foreign { program: PathBuf, is: String },
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Static { program } => write!(
                f,
                "{} is statically linked, so nothing can be preloaded into it; use a dynamically linked build of it",
                program.display()
            ),
            Self::Privileged { program, by } => write!(
                f,
                "{} is {by}, so the dynamic loader ignores LD_PRELOAD; start spm as the user that it would become",
                program.display()
            ),
            Self::Loader { program } => write!(
                f,
                "{} is a dynamic loader, and what it would load is not looked at; name the program itself, without it",
                program.display()
            ),
            Self::Sanitized { program } => write!(
                f,
                "{} is built with -fsanitize=address or leak, whose runtime does not go with the agent; use a build without",
                program.display()
            ),
            Self::Foreign { program, is } => write!(
                f,
                "{} is built for {is}, not for this machine's own {}; use a build for that",
                program.display(),
                std::env::consts::ARCH
            ),
        }
    }
}

/// Finds the file that execvp(3) would execute for `name`, in the directories of `path` (the variable PATH).
///
/// # Errors
/// Nothing of that name, or nothing that may be executed.
pub fn find(name: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, Missing> {
    if name.is_empty() {
        return Err(Missing::NotFound);
    }
    if name.as_bytes().contains(&b'/') {
        return executable(Path::new(name)).map(|()| PathBuf::from(name));
    }
    let mut reason = Missing::NotFound;
    for directory in path.unwrap_or(OsStr::new(DEFAULT_PATH)).as_bytes().split(|byte| *byte == b':') {
        // An empty entry is the working directory.
        let directory = if directory.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(directory) };
        let candidate = Path::new(directory).join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Missing::NotExecutable(libc::EACCES)) => reason = Missing::NotExecutable(libc::EACCES),
            // An entry of PATH that is no directory is passed over.
            Err(Missing::NotFound | Missing::NotExecutable(libc::ENOTDIR)) => {}
            Err(missing) => return Err(missing),
        }
    }
    Err(reason)
}

fn executable(path: &Path) -> Result<(), Missing> {
    let metadata = path.metadata().map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT) | None => Missing::NotFound,
        Some(errno) => Missing::NotExecutable(errno),
    })?;
    let may = rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).is_ok();
    if metadata.is_file() && may { Ok(()) } else { Err(Missing::NotExecutable(libc::EACCES)) }
}

/// Whether the agent will get into `program`, a path as [`find`] gives it; `None` when nothing speaks against it.
pub fn check(program: &Path, path: Option<&OsStr>) -> Option<Obstacle> {
    let mut program = program.to_owned();
    for _ in 0..SCRIPT_DEPTH {
        // What may be executed but not read cannot be judged; the report will tell whether the agent got in.
        let file = File::open(&program).ok()?;
        let head = read_head(&file);
        if head.starts_with(b"\x7fELF") {
            return check_elf(&program, &file, &head);
        }
        program = interpreter(&head, path)?;
    }
    None
}

fn read_head(file: &File) -> Vec<u8> {
    let mut head = Vec::with_capacity(SCRIPT_LINE);
    // A file that ends or fails early is judged by what came.
    let _ = file.take(SCRIPT_LINE as u64).read_to_end(&mut head);
    head
}

/// What interprets a file that is not ELF: the program of its `#!` line, or `/bin/sh` (execvp(3) on ENOEXEC).
fn interpreter(head: &[u8], path: Option<&OsStr>) -> Option<PathBuf> {
    let Some(line) = head.strip_prefix(b"#!") else { return Some(PathBuf::from("/bin/sh")) };
    let line = line.split(|byte| *byte == b'\n').next()?;
    let mut words = line.split(|byte| matches!(byte, b' ' | b'\t')).filter(|word| !word.is_empty());
    let program = PathBuf::from(OsString::from_vec(words.next()?.to_vec()));
    if program.file_name() == Some(OsStr::new("env"))
        && let (Some(name), None) = (words.next(), words.next())
        && !name.starts_with(b"-")
        && !name.contains(&b'=')
        && let Ok(found) = find(OsStr::from_bytes(name), path)
    {
        return Some(found);
    }
    Some(program)
}

fn check_elf(program: &Path, file: &File, head: &[u8]) -> Option<Obstacle> {
    let program = program.to_owned();
    let header = match Header::read(head) {
        Ok(header) => header,
        Err(is) => return Some(Obstacle::Foreign { program, is }),
    };
    if !header.has_interpreter(file) {
        // Linked to start without a loader, a program has no name for others to ask for.
        return Some(if header.has_name(file) {
            Obstacle::Loader { program }
        } else {
            Obstacle::Static { program }
        });
    }
    if header.mentions(file, &SANITIZERS) {
        return Some(Obstacle::Sanitized { program });
    }
    privilege(file).map(|by| Obstacle::Privileged { program, by })
}

/// What makes the loader enter secure execution (AT_SECURE; `cap_bprm_creds_from_file` in security/commoncap.c).
fn privilege(file: &File) -> Option<&'static str> {
    const SETUID: u32 = 0o4000;
    const SETGID_EXECUTABLE: u32 = 0o2010;
    let metadata = file.metadata().ok()?;
    let is_mount_trusted =
        rustix::fs::fstatvfs(file).map_or(true, |mount| !mount.f_flag.contains(StatVfsMountFlags::NOSUID));
    if !is_mount_trusted || rustix::thread::no_new_privs().unwrap_or(false) {
        return None;
    }
    let mode = metadata.mode();
    if mode & SETUID != 0 && metadata.uid() != getuid().as_raw() {
        return Some("setuid");
    }
    let is_own_group = metadata.gid() == getgid().as_raw() && getgid() == getegid();
    if mode & SETGID_EXECUTABLE == SETGID_EXECUTABLE && !is_own_group {
        return Some("setgid");
    }
    let mut value = [0_u8; 64];
    let has_capabilities = rustix::fs::fgetxattr(file, c"security.capability", &mut value).is_ok();
    // Real root gains nothing by them.
    (has_capabilities && !getuid().is_root()).then_some("given capabilities (getcap)")
}

#[cfg(test)]
mod tests {
    use super::super::elf::MACHINE;
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn script(directory: &Path, name: &str, text: &[u8], mode: u32) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    /// The smallest ELF that says what it is: one program header of type `kind`.
    fn elf(class: u8, machine: u16, kind: u32) -> Vec<u8> {
        let mut bytes = vec![0; 120];
        bytes[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1]);
        bytes[16] = 2;
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56_u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&1_u16.to_le_bytes());
        bytes[64..68].copy_from_slice(&kind.to_le_bytes());
        bytes
    }

    #[test]
    fn a_command_is_looked_up_as_execvp_does() {
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = (directory.path().join("1"), directory.path().join("2"));
        fs::create_dir_all(&first).unwrap();
        fs::create_dir_all(&second).unwrap();
        script(&first, "tool", b"", 0o644);
        let tool = script(&second, "tool", b"", 0o755);
        script(&first, "data", b"", 0o644);
        let path = OsString::from(format!("{}:{}", first.display(), second.display()));
        assert_eq!(find(OsStr::new("tool"), Some(&path)), Ok(tool));
        assert_eq!(find(OsStr::new("data"), Some(&path)), Err(Missing::NotExecutable(libc::EACCES)));
        assert_eq!(find(OsStr::new("nothing"), Some(&path)), Err(Missing::NotFound));
        assert_eq!(find(OsStr::new(""), Some(&path)), Err(Missing::NotFound));
        // As execvp(3) and so env(1) have it.
        let long = "x".repeat(300);
        assert_eq!(find(OsStr::new(&long), Some(&path)), Err(Missing::NotExecutable(libc::ENAMETOOLONG)));
        assert_eq!(find(OsStr::new("/etc/passwd/x"), None), Err(Missing::NotExecutable(libc::ENOTDIR)));
        assert_eq!(find(first.as_os_str(), None), Err(Missing::NotExecutable(libc::EACCES)));
        assert!(find(OsStr::new("sh"), None).is_ok());
    }

    #[test]
    fn a_program_without_a_loader_is_static() {
        let directory = tempfile::tempdir().unwrap();
        let program = script(directory.path(), "static", &elf(2, MACHINE, 1), 0o755);
        assert_eq!(check(&program, None), Some(Obstacle::Static { program: program.clone() }));
        let dynamic = script(directory.path(), "dynamic", &elf(2, MACHINE, 3), 0o755);
        assert_eq!(check(&dynamic, None), None);
    }

    /// An ELF with a dynamic section of one entry, and a table of names.
    fn dynamic_elf(kind: u32, entry: [u64; 2], names: &[u8]) -> Vec<u8> {
        let mut bytes = elf(2, MACHINE, kind);
        bytes.resize(512, 0);
        bytes[56..58].copy_from_slice(&2_u16.to_le_bytes());
        bytes[58..60].copy_from_slice(&64_u16.to_le_bytes());
        bytes[60..62].copy_from_slice(&1_u16.to_le_bytes());
        let mut put = |at: usize, words: &[u64]| {
            for (index, word) in words.iter().enumerate() {
                bytes[at + 8 * index..][..8].copy_from_slice(&word.to_le_bytes());
            }
        };
        put(40, &[320]);
        // PT_DYNAMIC and SHT_STRTAB, with offset and length.
        put(120, &[2, 256, 0, 0, 16]);
        put(256, &entry);
        put(320, &[3 << 32, 0, 0, 512, names.len() as u64]);
        bytes.extend_from_slice(names);
        bytes
    }

    #[test]
    fn a_dynamic_loader_is_not_taken_for_a_static_program() {
        let directory = tempfile::tempdir().unwrap();
        let loader = script(directory.path(), "ld.so", &dynamic_elf(1, [14, 1], b"\0ld.so\0"), 0o755);
        assert_eq!(check(&loader, None), Some(Obstacle::Loader { program: loader.clone() }));
        let pie = script(directory.path(), "pie", &dynamic_elf(1, [24, 0], b"\0"), 0o755);
        assert_eq!(check(&pie, None), Some(Obstacle::Static { program: pie.clone() }));
        for known in ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"] {
            if Path::new(known).exists() {
                assert!(matches!(check(Path::new(known), None), Some(Obstacle::Loader { .. })), "{known}");
            }
        }
    }

    #[test]
    fn a_program_with_the_address_sanitizer_is_told_by_its_names() {
        let directory = tempfile::tempdir().unwrap();
        let sanitized = dynamic_elf(3, [1, 1], b"\0libasan.so.8\0__asan_init\0");
        let sanitized = script(directory.path(), "sanitized", &sanitized, 0o755);
        assert_eq!(check(&sanitized, None), Some(Obstacle::Sanitized { program: sanitized.clone() }));
        let other = script(directory.path(), "other", &dynamic_elf(3, [1, 1], b"\0no__asan_init\0"), 0o755);
        assert_eq!(check(&other, None), None);
    }

    #[test]
    fn scripts_are_judged_by_what_interprets_them() {
        let directory = tempfile::tempdir().unwrap();
        let program = script(directory.path(), "static", &elf(2, MACHINE, 1), 0o755);
        let line = format!("#!  {} -x\nbody\n", program.display());
        let inner = script(directory.path(), "inner", line.as_bytes(), 0o755);
        let outer = script(directory.path(), "outer", format!("#!{}\n", inner.display()).as_bytes(), 0o755);
        let by_env = script(directory.path(), "by-env", b"#!/usr/bin/env static\n", 0o755);
        let path = directory.path().as_os_str();
        for script in [inner, outer, by_env] {
            assert_eq!(
                check(&script, Some(path)),
                Some(Obstacle::Static { program: program.clone() }),
                "{script:?}"
            );
        }
        assert_eq!(check(&script(directory.path(), "plain", b"echo hello\n", 0o755), None), None);
        let own = script(directory.path(), "own", b"", 0o755);
        fs::write(&own, format!("#!{}\n", own.display())).unwrap();
        assert_eq!(check(&own, None), None, "a loop ends");
    }

    #[test]
    fn another_architecture_is_foreign() {
        let directory = tempfile::tempdir().unwrap();
        for (name, bytes) in [("32", elf(1, MACHINE, 3)), ("other", elf(2, 8, 3)), ("cut", b"\x7fELF".to_vec())] {
            let program = script(directory.path(), name, &bytes, 0o755);
            assert!(matches!(check(&program, None), Some(Obstacle::Foreign { .. })), "{name}");
        }
    }

    #[test]
    fn setuid_to_another_user_is_privileged() {
        let directory = tempfile::tempdir().unwrap();
        let program = script(directory.path(), "setuid", &elf(2, MACHINE, 3), 0o4755);
        assert_eq!(check(&program, None), None, "setuid to oneself changes nothing");
        if !getuid().is_root() || rustix::fs::chown(&program, Some(rustix::fs::Uid::from_raw(1)), None).is_err() {
            println!("skipped: needs root to give a file away");
            return;
        }
        fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
        assert!(matches!(check(&program, None), Some(Obstacle::Privileged { by: "setuid", .. })));
    }
}
