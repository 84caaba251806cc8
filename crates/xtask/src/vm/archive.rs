//! The Debian packages that a virtual machine needs: fetched by this machine's apt, unpacked, nothing installed.
//!
//! [`fetch_tools`] brings QEMU and the guest's tools with every library they load, so that nothing depends on what is
//! installed here; [`fetch_kernel`] brings a kernel. apt's own configuration says where the archive is and through
//! which proxy; state, cache and the list of installed packages (an empty one) are ours. Each result is made in a
//! folder beside its place and renamed when complete, under a file lock: invocations do not disturb each other.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};

use crate::cleanup::{Step, Undo};
use crate::packages::find;

/// The release whose programs are used. A guest sees the same ones on every machine.
const RELEASE: &str = "bookworm";
/// Where QEMU 10 is: older ones know no volatile CXL memory.
const QEMU_SUITE: &str = "bookworm-backports";
/// Where the newest kernel is.
const NEWEST_SUITE: &str = "trixie-backports";
const QEMU_PACKAGES: [&str; 4] = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];
const TOOL_PACKAGES: [&str; 6] = ["busybox-static", "numactl", "daxctl", "ndctl", "kmod", "e2fsprogs"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Programs that are started through their own loader, so that the libraries here and there do not mix.
const WRAPPED: [(&str, &str); 8] = [
    ("qemu-system-x86_64", "usr/bin/qemu-system-x86_64"),
    ("numactl", "usr/bin/numactl"),
    ("daxctl", "usr/bin/daxctl"),
    ("ndctl", "usr/bin/ndctl"),
    ("cxl", "usr/bin/cxl"),
    ("modprobe", "bin/kmod"),
    ("depmod", "bin/kmod"),
    ("mkfs.ext4", "sbin/mke2fs"),
];

/// Which kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kernel {
    /// Debian's 6.1, the last with cpusets of cgroup version 1; too old for spm run.
    #[value(name = "6.1")]
    V6_1,
    /// Debian's 6.12.
    #[value(name = "6.12")]
    V6_12,
    /// The newest that Debian's backports have.
    #[value(name = "newest")]
    Newest,
}

impl Kernel {
    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Newest => "newest",
        }
    }

    fn meta_package(self) -> String {
        match self {
            Self::V6_1 => format!("linux-image-amd64/{RELEASE}"),
            Self::V6_12 => "linux-image-6.12-amd64".to_owned(),
            Self::Newest => format!("linux-image-amd64/{NEWEST_SUITE}"),
        }
    }
}

/// QEMU and the guest's tools, unpacked.
pub(crate) struct Tools {
    /// The packages' files.
    pub(super) root: PathBuf,
    /// A script for each program.
    pub(super) programs: PathBuf,
}

/// A kernel, unpacked.
pub(crate) struct KernelFiles {
    /// The folder with `boot` and `lib/modules`.
    pub(super) root: PathBuf,
    /// As `uname -r`.
    pub(super) release: String,
}

/// QEMU and the tools, fetched when they are not in `cache`.
///
/// # Errors
/// This machine cannot fetch them; the message says what is missing.
pub(crate) fn fetch_tools(cache: &Path) -> anyhow::Result<Tools> {
    let place = cache.join("tools");
    in_place(cache, &place, |folder| {
        let apt = Apt::new(cache)?;
        eprintln!("xtask: fetching QEMU and tools (about 70 MB)");
        let qemu = QEMU_PACKAGES.map(|name| format!("{name}/{QEMU_SUITE}"));
        let words = qemu.into_iter().chain(TOOL_PACKAGES.map(str::to_owned));
        let files = apt.download_closure(&words.collect::<Vec<_>>())?;
        unpack(&files, &folder.join("root"))?;
        fs::create_dir_all(folder.join("programs"))?;
        for (name, program) in WRAPPED {
            wrap(&place, folder, name, program)?;
        }
        apt.forget_packages()
    })?;
    Ok(Tools { root: place.join("root"), programs: place.join("programs") })
}

/// A kernel, fetched when it is not in `cache`.
///
/// # Errors
/// This machine cannot fetch it; the message says what is missing.
pub(crate) fn fetch_kernel(cache: &Path, kernel: Kernel, tools: &Tools) -> anyhow::Result<KernelFiles> {
    let root = cache.join(format!("kernel-{}", kernel.name()));
    in_place(cache, &root, |folder| {
        let apt = Apt::new(cache)?;
        let packages = apt.kernel_packages(kernel)?;
        eprintln!("xtask: fetching {} (about 110 MB)", packages[0]);
        let files = apt.download(&packages)?;
        unpack(&files, folder)?;
        if !folder.join("lib").exists() {
            symlink("usr/lib", folder.join("lib"))?;
        }
        let release = find_release(folder)?;
        let status = Command::new(tools.programs.join("depmod"))
            .arg("-b")
            .arg(folder)
            .arg(&release)
            .status()
            .context("cannot run depmod")?;
        ensure!(status.success(), "depmod failed");
        let list = folder.join("lib/modules").join(&release).join("modules.builtin");
        ensure!(list.exists(), "the packages {} lack modules.builtin", packages.join(", "));
        apt.forget_packages()
    })?;
    let release = find_release(&root)?;
    Ok(KernelFiles { root, release })
}

/// Fills `place` by `make` unless it is there.
fn in_place(cache: &Path, place: &Path, make: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    if place.exists() {
        return Ok(());
    }
    fs::create_dir_all(cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let lock = File::create(cache.join("lock")).context("cannot make the lock of the cache")?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).context("cannot lock the cache")?;
    if place.exists() {
        return Ok(());
    }
    let folder = place.with_extension("part");
    let undo = Undo::new(Step::RemoveTree(folder.clone()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    make(&folder)?;
    fs::rename(&folder, place).with_context(|| format!("cannot rename {}", folder.display()))?;
    undo.forget();
    Ok(())
}

fn find_release(root: &Path) -> anyhow::Result<String> {
    let modules = root.join("lib/modules");
    let mut entries = fs::read_dir(&modules).with_context(|| format!("cannot read {}", modules.display()))?;
    let entry = entries.next().with_context(|| format!("{} is empty", modules.display()))??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

fn unpack(files: &[PathBuf], root: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(root)?;
    for file in files {
        let status = Command::new("dpkg-deb").arg("-x").arg(file).arg(root).status();
        ensure!(status.context("cannot run dpkg-deb")?.success(), "cannot unpack {}", file.display());
    }
    Ok(())
}

/// A script `programs/name` that starts `program` with the libraries unpacked beside it.
fn wrap(place: &Path, folder: &Path, name: &str, program: &str) -> anyhow::Result<()> {
    ensure!(folder.join("root").join(program).exists(), "the packages hold no {program}");
    let script = folder.join("programs").join(name);
    let text = format!(
        "#!/bin/sh\nroot='{root}/root'\nlibs=x86_64-linux-gnu\nexport QEMU_MODULE_DIR=\"$root/usr/lib/$libs/qemu\"\n\
         exec \"$root/lib/$libs/ld-linux-x86-64.so.2\" --argv0 \"$0\" \
         --library-path \"$root/lib/$libs:$root/usr/lib/$libs\" \"$root/{program}\" \"$@\"\n",
        root = place.display().to_string().replace('\'', "'\\''"),
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// This machine's apt, with lists, cache and packages of our own.
struct Apt {
    options: Vec<String>,
    archives: PathBuf,
    downloads: PathBuf,
}

impl Apt {
    /// Finds the archive and reads its lists.
    fn new(cache: &Path) -> anyhow::Result<Self> {
        ensure!(
            std::env::consts::ARCH == "x86_64",
            "virtual machines are x86_64's only, this machine is {}",
            std::env::consts::ARCH
        );
        for program in ["apt-get", "apt-cache", "dpkg-deb"] {
            if find(program).is_none() {
                bail!(
                    "there is no {program} here: QEMU, kernels and tools come as Debian packages. Use a Debian \
                     machine or container (packages apt, dpkg), or copy the folder {} from one, to the same path",
                    cache.display()
                );
            }
        }
        let apt = cache.join("apt");
        let (lists, archives) = (apt.join("lists"), apt.join("cache/archives"));
        let downloads = apt.join("downloads");
        for folder in [&lists.join("partial"), &archives.join("partial"), &downloads] {
            fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let sources = apt.join("sources.list");
        fs::write(&sources, source_lines(&known_suites()?)?)?;
        fs::write(apt.join("status"), "")?;
        let named = [
            ("Dir::Etc::SourceList", sources),
            ("Dir::Etc::SourceParts", "/dev/null".into()),
            ("Dir::Etc::Preferences", "/dev/null".into()),
            ("Dir::Etc::PreferencesParts", "/dev/null".into()),
            ("Dir::State", apt.clone()),
            ("Dir::State::Lists", lists),
            ("Dir::State::Status", apt.join("status")),
            ("Dir::Cache", apt.join("cache")),
            ("Dir::Log", apt.join("cache")),
            ("Acquire::Languages", "none".into()),
            ("Acquire::Retries", "3".into()),
            // Without it, a failed update is a success with a warning.
            ("APT::Update::Error-Mode", "any".into()),
            ("APT::Sandbox::User", "root".into()),
            ("APT::Install-Recommends", "false".into()),
            ("APT::Architecture", "amd64".into()),
        ];
        let options = named.iter().map(|(name, value)| format!("-o{name}={}", value.display())).collect();
        let apt = Self { options, archives, downloads };
        eprintln!("xtask: reading the package lists");
        apt.run("apt-get", &["update", "-qq"], None).context(
            "the Debian archive cannot be read: is there a network, and does `apt-get update` work here?",
        )?;
        Ok(apt)
    }

    /// Downloads packages with all they depend on.
    fn download_closure(&self, packages: &[String]) -> anyhow::Result<Vec<PathBuf>> {
        let mut words = vec!["install", "--download-only", "--yes", "-qq"];
        words.extend(packages.iter().map(String::as_str));
        self.run("apt-get", &words, None)?;
        debs(&self.archives)
    }

    /// Downloads packages alone.
    fn download(&self, packages: &[String]) -> anyhow::Result<Vec<PathBuf>> {
        let mut words = vec!["download", "-qq"];
        words.extend(packages.iter().map(String::as_str));
        self.run("apt-get", &words, Some(&self.downloads))?;
        debs(&self.downloads)
    }

    /// The image that a meta-package stands for, and what is part of the same build.
    fn kernel_packages(&self, kernel: Kernel) -> anyhow::Result<Vec<String>> {
        let depends = |package: &str| self.run("apt-cache", &["depends", "--important", package], None);
        let meta = kernel.meta_package();
        let image = image_in(&depends(&meta)?).with_context(|| format!("the archive has no kernel for {meta}"))?;
        let parts = parts_in(&depends(&image)?, &image);
        Ok([image].into_iter().chain(parts).collect())
    }

    /// Unpacked packages are not needed again.
    fn forget_packages(&self) -> anyhow::Result<()> {
        for file in debs(&self.archives)?.into_iter().chain(debs(&self.downloads)?) {
            fs::remove_file(file)?;
        }
        Ok(())
    }

    fn run(&self, program: &str, words: &[&str], folder: Option<&Path>) -> anyhow::Result<String> {
        let mut command = Command::new(program);
        command.args(&self.options).args(words).env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        if let Some(folder) = folder {
            command.current_dir(folder);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = child.with_context(|| format!("cannot run {program}"))?;
        let undo = Undo::new(Step::Kill(child.id()));
        let output = child.wait_with_output().with_context(|| format!("cannot wait for {program}"))?;
        undo.forget();
        ensure!(
            output.status.success(),
            "{program} {} failed:\n{}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn debs(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let files = entries.filter_map(Result::ok).map(|entry| entry.path());
    Ok(files.filter(|file| file.extension().is_some_and(|end| end == "deb")).collect())
}

fn dependencies(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "))
}

/// `linux-image-6.12.1+deb12-amd64`, not `linux-image-amd64`.
fn image_in(text: &str) -> Option<String> {
    let is_image = |name: &&str| {
        let release = name.strip_prefix("linux-image-").unwrap_or_default();
        release.starts_with(|first: char| first.is_ascii_digit())
    };
    dependencies(text).find(is_image).map(str::to_owned)
}

/// Newer kernels come in several packages: the list of built-in modules, the kernel, the modules.
fn parts_in(text: &str, image: &str) -> Vec<String> {
    let release = image.trim_start_matches("linux-image-");
    let parts = ["linux-base-", "linux-binary-", "linux-modules-"].map(|part| format!("{part}{release}"));
    dependencies(text).filter(|name| parts.iter().any(|part| part == name)).map(str::to_owned).collect()
}

/// `SUITE SITE` lines: what this machine's apt knows of Debian.
fn known_suites() -> anyhow::Result<String> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(CODENAME) $(SITE)", "Origin: Debian", "Created-By: Packages"])
        .output()
        .context("cannot run apt-get indextargets")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// sources.list(5) with our suites, at the places of `known`.
fn source_lines(known: &str) -> anyhow::Result<String> {
    let site = |is_wanted: fn(&str) -> bool| {
        let (_, site) =
            known.lines().filter_map(|line| line.split_once(' ')).find(|(suite, _)| is_wanted(suite))?;
        Some(site.trim_end_matches('/').to_owned())
    };
    let main = site(|suite| !suite.ends_with("-security"));
    let Some(main) = main else {
        bail!(
            "this machine's apt knows no Debian archive: add one to its sources and run `apt-get update`, or use a \
             Debian machine or container"
        );
    };
    let security = site(|suite| suite.ends_with("-security")).unwrap_or_else(|| format!("{main}-security"));
    let signed = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    let suites = [
        (&main, RELEASE.to_owned()),
        (&security, format!("{RELEASE}-security")),
        (&main, QEMU_SUITE.to_owned()),
        (&main, NEWEST_SUITE.to_owned()),
    ];
    Ok(suites.iter().map(|(site, suite)| format!("deb {signed}{site} {suite} main\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meta_package_leads_to_the_image_and_its_parts() {
        let meta = "linux-image-amd64\n  Depends: linux-base-amd64\n  Depends: linux-image-7.3.4-amd64\n";
        let image = image_in(meta).unwrap();
        assert_eq!(image, "linux-image-7.3.4-amd64");
        let text = "linux-image-7.3.4-amd64\n |Depends: dracut\n  Depends: linux-base-7.3.4-amd64\n  \
                    Depends: linux-base\n  Depends: linux-modules-7.3.4-amd64\n";
        assert_eq!(parts_in(text, &image), ["linux-base-7.3.4-amd64", "linux-modules-7.3.4-amd64"]);
        assert!(image_in("linux-image-amd64\n").is_none());
    }

    #[test]
    fn suites_are_looked_for_where_apt_has_debian() {
        let lines = source_lines("trixie-security http://b/sec/\ntrixie http://a/debian/\n").unwrap();
        let places: Vec<&str> = lines.lines().filter_map(|line| line.split("http://").nth(1)).collect();
        let expected = [
            "a/debian bookworm main",
            "b/sec bookworm-security main",
            "a/debian bookworm-backports main",
            "a/debian trixie-backports main",
        ];
        assert_eq!(places, expected);
        assert!(source_lines("").unwrap_err().to_string().contains("no Debian archive"));
    }
}
