//! Programs that the workloads need: found, or installed as Debian packages.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// The path of `program`, installing `package` when it is not in PATH.
///
/// # Errors
/// It is missing and cannot be installed; the message says what to install.
pub(crate) fn need(program: &str, package: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = find(program) {
        return Ok(path);
    }
    install(package).with_context(|| format!("{program} is missing: install the package {package}"))?;
    find(program).with_context(|| format!("{package} is installed and there is still no {program} in PATH"))
}

/// A Python interpreter that has numpy: one that is there, Debian's, or one in a virtual environment under `cache`.
///
/// # Errors
/// None of them can be had; the message says what to install.
pub(crate) fn need_numpy(cache: &Path) -> anyhow::Result<PathBuf> {
    let venv = cache.join("venv");
    let candidates = || [PathBuf::from("python3"), PathBuf::from("/usr/bin/python3"), venv.join("bin/python3")];
    if let Some(python) = candidates().iter().find_map(|path| numpy_interpreter(path)) {
        return Ok(python);
    }
    let installed = install("python3-numpy").or_else(|_| make_venv(&venv));
    installed.context("no Python with numpy: install the package python3-numpy, or python3-venv and a network")?;
    candidates()
        .iter()
        .find_map(|path| numpy_interpreter(path))
        .context("numpy is installed and cannot be imported")
}

/// The file of `program` in PATH.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    // sbin: swapon and its like are there, and not in every user's PATH.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join(program)).find(|file| file.is_file())
}

fn install(package: &str) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("not root: run `sudo apt-get install {package}`");
    }
    if find("apt-get").is_none() {
        bail!("there is no apt-get here");
    }
    eprintln!("xtask: installing {package}");
    let apt = |words: &[&str]| -> anyhow::Result<bool> {
        let status = Command::new("apt-get")
            .args(words)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .context("cannot run apt-get")?;
        Ok(status.success())
    };
    let words = ["install", "--yes", "--quiet", "--no-install-recommends", package];
    if apt(&words)? || (apt(&["update", "--quiet"])? && apt(&words)?) {
        return Ok(());
    }
    bail!("apt-get install {package} failed")
}

fn numpy_interpreter(python: &Path) -> Option<PathBuf> {
    // The interpreter itself, not a wrapper script in front of it: the wrapper would be measured too.
    let output = Command::new(python).args(["-c", "import numpy, sys; print(sys.executable)"]).output().ok()?;
    output.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

fn make_venv(dir: &Path) -> anyhow::Result<()> {
    eprintln!("xtask: making a virtual environment with numpy");
    let ran = |program: &Path, words: &[&std::ffi::OsStr]| -> anyhow::Result<()> {
        let status = Command::new(program).args(words).stdout(Stdio::null()).status()?;
        anyhow::ensure!(status.success(), "{} failed", program.display());
        Ok(())
    };
    ran(Path::new("python3"), &["-m".as_ref(), "venv".as_ref(), dir.as_os_str()])?;
    ran(&dir.join("bin/python3"), &["-m".as_ref(), "pip".as_ref(), "install".as_ref(), "numpy".as_ref()])
}
