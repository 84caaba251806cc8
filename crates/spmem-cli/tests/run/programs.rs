//! Programs without a C library, made by hand: nothing can be preloaded into them.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Prints `static` and ends with status 9.
pub fn static_program(directory: &Path) -> PathBuf {
    let code: &[u8] = &[
        0xb8, 1, 0, 0, 0, // mov eax, 1 (write)
        0xbf, 1, 0, 0, 0, // mov edi, 1
        0x48, 0x8d, 0x35, 0x17, 0, 0, 0, // lea rsi, [rip + 0x17]
        0xba, 7, 0, 0, 0, // mov edx, 7
        0x0f, 0x05, // syscall
        0xb8, 60, 0, 0, 0, // mov eax, 60 (exit)
        0xbf, 9, 0, 0, 0, // mov edi, 9
        0x0f, 0x05, // syscall
        0x90, 0x90, 0x90, 0x90, // padding
        b's', b't', b'a', b't', b'i', b'c', b'\n',
    ];
    write(directory.join("static-program"), code)
}

/// Waits until a signal ends it.
pub fn static_waiter(directory: &Path) -> PathBuf {
    let code: &[u8] = &[
        0xb8, 34, 0, 0, 0, // mov eax, 34 (pause)
        0x0f, 0x05, // syscall
        0xeb, 0xf7, // jmp to the start
    ];
    write(directory.join("static-waiter"), code)
}

/// Sleeps for a second.
pub fn static_sleeper(directory: &Path) -> PathBuf {
    let code: &[u8] = &[
        0x6a, 0, // push 0 (nanoseconds)
        0x6a, 1, // push 1 (seconds)
        0x48, 0x89, 0xe7, // mov rdi, rsp
        0x31, 0xf6, // xor esi, esi
        0xb8, 35, 0, 0, 0, // mov eax, 35 (nanosleep)
        0x0f, 0x05, // syscall
        0xb8, 60, 0, 0, 0, // mov eax, 60 (exit)
        0x31, 0xff, // xor edi, edi
        0x0f, 0x05, // syscall
    ];
    write(directory.join("static-sleeper"), code)
}

/// An ELF file of one segment that starts with `code` (elf(5)).
fn write(path: PathBuf, code: &[u8]) -> PathBuf {
    const BASE: u64 = 0x40_0000;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version
    elf.extend((BASE + 120).to_le_bytes()); // entry
    elf.extend(64_u64.to_le_bytes()); // program headers
    elf.extend([0; 12]); // section headers, flags
    elf.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, read and execute
    let size = 120 + code.len() as u64;
    for word in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    std::fs::write(&path, elf).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}
