//! What QEMU boots: the kernel uncompressed, and the archive of files that the kernel starts from.
//!
//! [`boot_files`] makes both from the unpacked packages and keeps them. An emulated processor takes three seconds to
//! uncompress a kernel, so it gets the ELF image, entered by PVH. The archive (initramfs) holds busybox, `init.sh` and
//! the modules that reach the host's root, nothing else.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Cursor, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use cpio::newc::{Builder, ModeFileType};

use super::archive::{KernelFiles, Tools};

/// What has to be there before the host's root is: the bus, the file system, the overlay over it.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
const FOLDERS: [&str; 9] = ["bin", "modules", "proc", "sys", "dev", "host", "root", "overlay", "job"];
const INIT: &str = include_str!("init.sh");

/// What is given to QEMU.
pub(super) struct BootFiles {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
}

/// Both files; the first one is kept beside the kernel's packages, the second in `scratch`.
pub(super) fn boot_files(kernel: &KernelFiles, tools: &Tools, scratch: &Path) -> anyhow::Result<BootFiles> {
    let image = kernel.root.join("vmlinux");
    if !image.exists() {
        let compressed = find_compressed(kernel)?;
        let bytes = fs::read(&compressed).with_context(|| format!("cannot read {}", compressed.display()))?;
        let elf = uncompress_kernel(&bytes).with_context(|| format!("{} is no kernel", compressed.display()))?;
        // Under its own name only when complete: several invocations may be here.
        let part = scratch.join("vmlinux");
        fs::write(&part, elf).with_context(|| format!("cannot write {}", part.display()))?;
        fs::rename(&part, &image).with_context(|| format!("cannot write {}", image.display()))?;
    }
    let initrd = scratch.join("initrd");
    write_initrd(&initrd, kernel, tools).with_context(|| format!("cannot write {}", initrd.display()))?;
    Ok(BootFiles { kernel: image, initrd })
}

fn find_compressed(kernel: &KernelFiles) -> anyhow::Result<PathBuf> {
    let places = [
        kernel.root.join("boot").join(format!("vmlinuz-{}", kernel.release)),
        kernel.root.join("lib/modules").join(&kernel.release).join("vmlinuz"),
    ];
    places
        .into_iter()
        .find(|file| file.exists())
        .with_context(|| format!("the packages of {} hold no vmlinuz", kernel.release))
}

/// The ELF image inside a bzImage: Documentation/arch/x86/boot.rst, `payload_offset`.
fn uncompress_kernel(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    const SETUP_SECTORS: usize = 0x1f1;
    const MAGIC: usize = 0x202;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;
    let word = |at: usize| -> anyhow::Result<usize> {
        let word = bytes.get(at..at + 4).context("it ends early")?.first_chunk().context("it ends early")?;
        Ok(u32::from_le_bytes(*word) as usize)
    };
    ensure!(bytes.get(MAGIC..MAGIC + 4) == Some(b"HdrS"), "it has no boot header");
    // 0 means 4, for kernels older than we boot.
    let setup = (usize::from(bytes[SETUP_SECTORS]) + 1) * 512;
    let start = setup + word(PAYLOAD_OFFSET)?;
    let payload = bytes.get(start..start + word(PAYLOAD_LENGTH)?).context("its payload ends early")?;
    let elf = uncompress(payload)?;
    ensure!(elf.starts_with(b"\x7fELF"), "its payload is no ELF image");
    Ok(elf)
}

/// Uncompresses zstd or xz, told apart by their magic numbers; anything else is given back as it is.
fn uncompress(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
    const XZ: &[u8] = b"\xfd7zXZ\0";
    let mut out = Vec::new();
    if bytes.starts_with(ZSTD) {
        let mut reader = ruzstd::decoding::StreamingDecoder::new(bytes).context("cannot read zstd")?;
        reader.read_to_end(&mut out).context("cannot uncompress zstd")?;
    } else if bytes.starts_with(XZ) {
        // One stream: after a kernel's come four bytes that are its size.
        let mut reader = lzma_rust2::XzReader::new(bytes, false);
        reader.read_to_end(&mut out).context("cannot uncompress xz")?;
    } else if bytes.starts_with(b"\x1f\x8b") {
        bail!("it is compressed by gzip, which Debian's are not");
    } else {
        out.extend_from_slice(bytes);
    }
    Ok(out)
}

fn write_initrd(file: &Path, kernel: &KernelFiles, tools: &Tools) -> anyhow::Result<()> {
    let mut archive = Archive { out: BufWriter::new(File::create(file)?), inode: 0 };
    for folder in FOLDERS {
        archive.add(folder, ModeFileType::Directory, 0o755, &[])?;
    }
    archive.add("init", ModeFileType::Regular, 0o755, INIT.as_bytes())?;
    archive.add("bin/busybox", ModeFileType::Regular, 0o755, &fs::read(tools.root.join("bin/busybox"))?)?;
    let modules = kernel.root.join("lib/modules").join(&kernel.release);
    for (number, path) in load_order(&modules, &MODULES)?.iter().enumerate() {
        let bytes = uncompress(&fs::read(modules.join(path))?).with_context(|| path.clone())?;
        let stem = path.rsplit('/').next().and_then(|name| name.split('.').next()).unwrap_or_default();
        // The shell lists them in this order.
        archive.add(&format!("modules/{number:03}-{stem}.ko"), ModeFileType::Regular, 0o644, &bytes)?;
    }
    let mut out = cpio::newc::trailer(archive.out)?;
    out.flush().context("cannot write the archive")
}

struct Archive<W: Write> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn add(&mut self, name: &str, kind: ModeFileType, mode: u32, bytes: &[u8]) -> anyhow::Result<()> {
        self.inode += 1;
        let size = u32::try_from(bytes.len()).context("a file of 4 GiB")?;
        let entry = Builder::new(name).ino(self.inode).nlink(1).mode(mode).set_mode_file_type(kind);
        let mut writer = entry.write(&mut self.out, size);
        std::io::copy(&mut Cursor::new(bytes), &mut writer)?;
        writer.finish()?;
        Ok(())
    }
}

/// The files of `wanted` and of what they need, in an order in which they can be loaded.
fn load_order(modules: &Path, wanted: &[&str]) -> anyhow::Result<Vec<String>> {
    let read = |name: &str| {
        fs::read_to_string(modules.join(name))
            .with_context(|| format!("cannot read {name} of {}", modules.display()))
    };
    order_modules(&read("modules.dep")?, &read("modules.builtin")?, wanted)
}

/// modules.dep(5): `file: what it needs, nearest first`.
fn order_modules(dep: &str, builtin: &str, wanted: &[&str]) -> anyhow::Result<Vec<String>> {
    let lines: BTreeMap<String, (&str, &str)> = dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (module_name(file), (file, needs)))
        .collect();
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        let Some((file, needs)) = lines.get(*name) else {
            ensure!(builtin.lines().any(|file| module_name(file) == *name), "the kernel has no module {name}");
            continue;
        };
        for file in needs.split_whitespace().rev().chain([*file]) {
            if !order.iter().any(|known| known == file) {
                order.push(file.to_owned());
            }
        }
    }
    Ok(order)
}

fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split('.').next().unwrap_or(name).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need() {
        let dep = "fs/9p/9p.ko.xz: net/9p/9pnet.ko.xz fs/netfs/netfs.ko.xz\nfs/netfs/netfs.ko.xz:\n\
                   net/9p/9pnet.ko.xz:\n";
        let order = order_modules(dep, "fs/overlayfs/overlay.ko\n", &["9p", "overlay"]).unwrap();
        assert_eq!(order, ["fs/netfs/netfs.ko.xz", "net/9p/9pnet.ko.xz", "fs/9p/9p.ko.xz"]);
    }

    #[test]
    fn a_module_that_the_kernel_lacks_is_named() {
        let refused = order_modules("a.ko:\n", "", &["virtio_pci"]).unwrap_err();
        assert!(refused.to_string().contains("virtio_pci"));
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(uncompress_kernel(b"").is_err());
        assert!(uncompress_kernel(&[0; 4096]).unwrap_err().to_string().contains("boot header"));
        let mut cut = vec![0; 0x250];
        cut[0x202..0x206].copy_from_slice(b"HdrS");
        cut[0x24c] = 200;
        assert!(uncompress_kernel(&cut).unwrap_err().to_string().contains("ends early"));
    }
}
