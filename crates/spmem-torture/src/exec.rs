//! New programs: vfork, posix_spawn, system, and exec in place, from processes whose pages are away.

use crate::area::{Area, Ballast};
use crate::harness::{Case, Ctx, Outcome, bail, ensure, threads};
use crate::limits;
use crate::process::{self, End};
use crate::sys::{self, cstring};
use std::ffi::CString;
use std::io::Read;
use std::process::{Command, Stdio};

pub const CASES: &[Case] = &[
    Case::new("exec-vfork", "vfork shares the memory, cold pages too, until the exec", vforks),
    Case::new("exec-spawn", "posix_spawn with file actions, its strings in cold memory", spawns),
    Case::new("exec-system", "system() runs a shell and returns its status", systems),
    Case::new("exec-threads", "four threads start programs at once", from_threads),
    Case::new("exec-from-thread", "exec by a thread that is not the first replaces the process", by_thread),
    Case::new("exec-self", "exec in place keeps pid, arguments, environment and standard files", in_place),
    Case::new("exec-arguments", "exec reads arguments and environment from cold pages", cold_arguments),
    Case::new("exec-clean", "a child with an empty environment works", clean_environment),
    Case::new("exec-works", "children started by exec keep their own cold pages", working_children),
];

/// See [`limits::work_with_two_threads`].
pub const TWO_THREADS: &str = "@two-threads";
/// See [`limits::fork_with_few_threads`].
pub const FEW_FOR_CHILDREN: &str = "@few-threads-for-children";

/// What the binary does when it was started by a case of its own. `None`: an ordinary subcommand.
pub fn act(name: &str) -> Option<i32> {
    let arguments: Vec<String> = std::env::args().skip(2).collect();
    match name {
        "@arguments" => {
            println!("{}|{}", arguments.join("|"), std::env::var("TORTURE_WORD").unwrap_or_default());
            Some(0)
        }
        "@environment" => {
            let names: Vec<String> = std::env::vars().map(|(name, value)| format!("{name}={value}")).collect();
            println!("{}", names.join("\n"));
            Some(0)
        }
        "@work" => Some(process::verdict(work(&arguments))),
        TWO_THREADS => Some(process::verdict(limits::work_with_two_threads(&named_ctx(&arguments)))),
        FEW_FOR_CHILDREN => Some(process::verdict(limits::fork_with_few_threads(&named_ctx(&arguments)))),
        "@generation" => Some(process::verdict(generation(&arguments))),
        "@descriptors" => {
            println!("{:?}", sys::surprising_descriptors());
            Some(0)
        }
        _ => None,
    }
}

/// This binary.
pub fn myself() -> CString {
    cstring(&std::env::current_exe().unwrap_or_default().to_string_lossy())
}

fn own_ctx(mib: usize, seed: u64) -> Ctx {
    Ctx { seed, mib, time: std::time::Duration::ZERO, out: None, started: std::time::Instant::now() }
}

/// Of MiB and seed, as words.
fn named_ctx(arguments: &[String]) -> Ctx {
    let number = |at: usize| arguments.get(at).and_then(|a| a.parse().ok()).unwrap_or(4usize);
    own_ctx(number(0), number(1) as u64)
}

fn work(arguments: &[String]) -> Outcome {
    let ctx = named_ctx(arguments);
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(&ctx)?;
    let mut rng = ctx.rng(0);
    for _ in 0..2 {
        ballast.sweep()?;
        area.check_all("memory of a program started by exec")?;
        area.scribble(&mut rng, 2);
    }
    Ok(())
}

/// An array of pointers to strings as exec wants it.
fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Becomes a program that ends soon and well.
pub fn execute_list() -> Outcome {
    execute(&["list"])
}

/// Becomes this binary with these arguments; what it prints goes nowhere.
pub fn execute(arguments: &[&str]) -> Outcome {
    let strings: Vec<_> = ["torture"].iter().chain(arguments).map(|argument| cstring(argument)).collect();
    // SAFETY: opens a file for the program's output, and valid strings.
    unsafe {
        libc::dup2(sys::ok("open", libc::open(c"/dev/null".as_ptr(), libc::O_RDWR).into())? as i32, 1);
        libc::execv(myself().as_ptr(), pointers(&strings).as_ptr());
    }
    bail!("execv: {}", std::io::Error::last_os_error())
}

fn vforks(ctx: &Ctx) -> Outcome {
    let mut area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let (path, strings) = (myself(), [cstring("torture"), cstring("list")]);
    let arguments = pointers(&strings);
    // SAFETY: opens a file for the child's output.
    let null =
        sys::ok("open", unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) }.into())?;
    for round in ctx.rounds(3) {
        ballast.sweep()?;
        let page = round as usize * 3 % (area.len() - 1);
        let (from, to) = (area.addr(page), area.addr(page + 1));
        #[expect(deprecated, reason = "vfork itself is under test")]
        // SAFETY: until the exec the child copies one page to another (the memory is shared) and calls dup2.
        let pid = unsafe {
            let pid = libc::vfork();
            if pid == 0 {
                std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, 4096);
                libc::dup2(null as i32, 1);
                libc::execv(path.as_ptr(), arguments.as_ptr());
                libc::_exit(127);
            }
            pid
        };
        let pid = sys::ok("vfork", pid.into())? as i32;
        let (mut wanted, mut found) = ([0u8; 4096], [0u8; 4096]);
        area.expected(page, &mut wanted);
        // SAFETY: a mapped page.
        unsafe { std::ptr::copy_nonoverlapping(to as *const u8, found.as_mut_ptr(), 4096) };
        ensure!(
            wanted == found,
            "page {} at {to:#x}, written by a vfork child from a cold page, differs",
            page + 1
        );
        area.write(page + 1);
        process::succeed("vfork and exec", pid)?;
        area.check_all("after vfork and exec")?;
    }
    Ok(())
}

fn spawns(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(3) {
        ballast.sweep()?;
        let (reader, writer) = sys::pipe()?;
        let strings = [cstring("torture"), cstring("@arguments"), cstring(&format!("round-{round}"))];
        let environment = [cstring("TORTURE_WORD=cold"), cstring("A=b")];
        let mut pid = 0;
        // SAFETY: zeroed is valid before init; all strings live until the call returned.
        let error = unsafe {
            let mut actions: libc::posix_spawn_file_actions_t = std::mem::zeroed();
            libc::posix_spawn_file_actions_init(&raw mut actions);
            libc::posix_spawn_file_actions_adddup2(&raw mut actions, writer, 1);
            libc::posix_spawn_file_actions_addclose(&raw mut actions, reader);
            libc::posix_spawn_file_actions_addclose(&raw mut actions, writer);
            let error = libc::posix_spawn(
                &raw mut pid,
                myself().as_ptr(),
                &raw const actions,
                std::ptr::null(),
                pointers(&strings).as_ptr().cast(),
                pointers(&environment).as_ptr().cast(),
            );
            libc::posix_spawn_file_actions_destroy(&raw mut actions);
            error
        };
        ensure!(error == 0, "posix_spawn: {}", std::io::Error::from_raw_os_error(error));
        sys::close(writer);
        let mut text = vec![0u8; 256];
        let got = sys::read_full(reader, text.as_mut_ptr() as usize, text.len())?;
        sys::close(reader);
        process::succeed("spawned program", pid)?;
        let wanted = format!("round-{round}|cold\n");
        ensure!(
            text[..got] == *wanted.as_bytes(),
            "spawned program said {:?}, expected {wanted:?}",
            String::from_utf8_lossy(&text[..got])
        );
        area.check_all("after posix_spawn")?;
    }
    Ok(())
}

fn systems(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for round in ctx.rounds(3) {
        ballast.sweep()?;
        let wanted = (round % 100) as i32;
        let command = cstring(&format!("x=$(seq 1 200 | wc -l); test $x -eq 200 || exit 200; exit {wanted}"));
        // SAFETY: a valid string.
        let status = unsafe { libc::system(command.as_ptr()) };
        ensure!(
            process::end(status) == End::Exit(wanted),
            "system() gave {:?}, expected status {wanted}",
            process::end(status)
        );
        area.check_all("after system()")?;
    }
    Ok(())
}

fn from_threads(ctx: &Ctx) -> Outcome {
    let areas = Area::filled(ctx.seed, ctx.pages())?.split(4);
    let mut ballast = Ballast::new(ctx)?;
    ballast.during(|| {
        threads(4, |id| {
            for _ in ctx.rounds(2) {
                for count in 0..5 {
                    let text = format!("{id}-{count}");
                    let output = Command::new("/bin/echo").arg(&text).output()?;
                    let said = String::from_utf8_lossy(&output.stdout);
                    ensure!(
                        output.status.success() && said.trim() == text,
                        "echo ended with {:?} and {said:?}",
                        output.status
                    );
                    areas[id].check_all("a thread that starts programs")?;
                }
            }
            Ok(())
        })
    })
}

fn by_thread(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        let child = process::fork(|| {
            let strings = [cstring("torture"), cstring("@work"), cstring("8"), cstring("5")];
            std::thread::spawn(move || {
                let path = myself();
                // SAFETY: valid strings.
                unsafe { libc::execv(path.as_ptr(), pointers(&strings).as_ptr()) };
            })
            .join()
            .ok();
            bail!("execv returned: {}", std::io::Error::last_os_error())
        })?;
        area.check_all("parent, while its child is replaced by a thread's exec")?;
        process::succeed("program executed by a thread", child)?;
    }
    Ok(())
}

/// Four generations in one process; each fills memory, lets it get cold and executes itself.
fn in_place(ctx: &Ctx) -> Outcome {
    let child = process::fork(|| {
        // SAFETY: no memory of ours is involved.
        let pid = unsafe { libc::getpid() };
        execute_generation(0, ctx.mib, &format!("pid {pid}"))
    })?;
    process::succeed("program that executes itself", child)
}

fn execute_generation(number: usize, mib: usize, mark: &str) -> Outcome {
    let strings: Vec<CString> =
        ["torture", "@generation", &number.to_string(), &mib.to_string(), mark, "", "a b\nc"].map(cstring).into();
    // SAFETY: valid strings; the environment is passed on by execv.
    unsafe {
        libc::setenv(c"TORTURE_WORD".as_ptr(), cstring(mark).as_ptr(), 1);
        libc::execv(myself().as_ptr(), pointers(&strings).as_ptr());
    }
    bail!("execv: {}", std::io::Error::last_os_error())
}

fn generation(arguments: &[String]) -> Outcome {
    let [number, mib, mark, empty, odd] = arguments else {
        bail!("{} arguments arrived: {arguments:?}", arguments.len())
    };
    let (number, mib) = (number.parse().unwrap_or(9usize), mib.parse().unwrap_or(8usize));
    ensure!(empty.is_empty() && odd == "a b\nc", "arguments arrived as {arguments:?}");
    ensure!(*mark == format!("pid {}", std::process::id()), "{mark} became {}", std::process::id());
    let word = std::env::var("TORTURE_WORD").unwrap_or_default();
    ensure!(word == *mark, "the environment says {word:?}, expected {mark:?}");
    let open = sys::surprising_descriptors();
    ensure!(open.is_empty(), "descriptors {open:?} are open in generation {number}, expected none from 3 on");
    work(&[mib.to_string(), number.to_string()])?;
    if number < 3 { execute_generation(number + 1, mib, mark) } else { Ok(()) }
}

fn cold_arguments(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    // 100 arguments of 1,000 bytes, each string at the end of one page and the start of the next.
    let texts: Vec<String> = (0..100).map(|n| format!("{n:03}").repeat(333)).collect();
    let base = sys::anon(102)?;
    let mut table: Vec<*const libc::c_char> = vec![c"torture".as_ptr(), c"@arguments".as_ptr()];
    for (n, text) in texts.iter().enumerate() {
        let at = base + (n + 1) * 4096 - 500;
        // SAFETY: inside the mapping; the rest of it is zero, which ends the string.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), at as *mut u8, text.len()) };
        table.push(at as *const _);
    }
    table.push(std::ptr::null());
    let path = myself();
    for _ in ctx.rounds(2) {
        ballast.sweep()?;
        ballast.sweep()?;
        let (reader, writer) = sys::pipe()?;
        let child = process::fork(|| {
            // SAFETY: the table and its strings are complete.
            unsafe {
                libc::dup2(writer, 1);
                libc::close(reader);
                libc::close(writer);
                libc::execve(
                    path.as_ptr(),
                    table.as_ptr(),
                    [c"TORTURE_WORD=w".as_ptr(), std::ptr::null()].as_ptr(),
                );
            }
            bail!("execve: {}", std::io::Error::last_os_error())
        })?;
        sys::close(writer);
        let mut said = vec![0u8; 200_000];
        let got = sys::read_full(reader, said.as_mut_ptr() as usize, said.len())?;
        sys::close(reader);
        process::succeed("program with cold arguments", child)?;
        let wanted = format!("{}|w\n", texts.join("|"));
        ensure!(
            said[..got] == *wanted.as_bytes(),
            "arguments from cold pages arrived wrong ({got} bytes of {})",
            wanted.len()
        );
        area.check_all("after an exec with cold arguments")?;
    }
    Ok(())
}

fn clean_environment(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let me = std::env::current_exe()?;
    let before: Vec<(String, String)> = std::env::vars().collect();
    for _ in ctx.rounds(1) {
        ballast.sweep()?;
        let status = Command::new("/usr/bin/env").arg("-i").arg(&me).args(["@work", "8", "3"]).status()?;
        ensure!(status.success(), "program without environment ended with {status:?}");
        let mut child = Command::new(&me)
            .arg("@environment")
            .env_clear()
            .env("ONLY", "this")
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = String::new();
        if let Some(out) = child.stdout.as_mut() {
            out.read_to_string(&mut said)?;
        }
        ensure!(child.wait()?.success(), "program with one variable failed");
        ensure!(said.lines().any(|line| line == "ONLY=this"), "the one variable did not arrive: {said:?}");
        area.check_all("after children with little environment")?;
    }
    let after: Vec<(String, String)> = std::env::vars().collect();
    ensure!(before == after, "the environment changed by itself");
    Ok(())
}

fn working_children(ctx: &Ctx) -> Outcome {
    let area = Area::filled(ctx.seed, ctx.pages())?;
    let mut ballast = Ballast::new(ctx)?;
    let me = std::env::current_exe()?;
    let mib = (ctx.mib / 4).max(4).to_string();
    for round in ctx.rounds(1) {
        let mut children = Vec::new();
        for id in 0..3u64 {
            children.push(Command::new(&me).args(["@work", &mib, &(round * 3 + id).to_string()]).spawn()?);
        }
        ballast.sweep()?;
        area.check_all("parent of working programs")?;
        for mut child in children {
            let status = child.wait()?;
            ensure!(status.success(), "working program ended with {status:?}");
        }
    }
    Ok(())
}
