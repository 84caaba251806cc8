//! ELF: what the file of a program says of itself (elf(5)).
//!
//! [`Header::read`] takes the first bytes, and answers what [`super::program`] asks about. Any bytes may come: what is not
//! there counts as not said.

use std::fs::File;
use std::os::unix::fs::FileExt;

#[cfg(target_arch = "x86_64")]
pub const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
pub const MACHINE: u16 = 183;

const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_SONAME: u64 = 14;
const SHT_STRTAB: u32 = 3;
/// Longest dynamic section and longest table of names that are read, bytes.
const DYNAMIC_MAX: u64 = 64 << 10;
const NAMES_MAX: u64 = 64 << 20;

/// The words of an ELF-64 header that matter here: where program headers and section headers are.
pub struct Header {
    segments: Table,
    sections: Table,
}

struct Table {
    start: u64,
    entry_size: u16,
    entries: u16,
}

impl Table {
    fn entries(&self, file: &File) -> impl Iterator<Item = [u8; 40]> {
        (0..self.entries).filter_map(|index| {
            let mut bytes = [0; 40];
            let at = self.start.saturating_add(u64::from(index) * u64::from(self.entry_size));
            file.read_exact_at(&mut bytes, at).ok().map(|()| bytes)
        })
    }
}

impl Header {
    /// # Errors
    /// It is for another machine; the text says which.
    pub fn read(head: &[u8]) -> Result<Self, String> {
        const CLASS_64: u8 = 2;
        const LITTLE_ENDIAN: u8 = 1;
        let short = |at: usize| head.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
        match (head.get(4), head.get(5)) {
            (Some(&CLASS_64), Some(&LITTLE_ENDIAN)) if short(18) == MACHINE => {}
            (Some(&CLASS_64), Some(&LITTLE_ENDIAN)) => {
                return Err(format!("machine {} (ELF e_machine)", short(18)));
            }
            (Some(&CLASS_64), _) => return Err("big-endian processors".to_owned()),
            _ => return Err("32-bit processors".to_owned()),
        }
        Ok(Self {
            segments: Table { start: word(head, 32), entry_size: short(54), entries: short(56) },
            sections: Table { start: word(head, 40), entry_size: short(58), entries: short(60) },
        })
    }

    /// Whether it asks for a dynamic loader.
    pub fn has_interpreter(&self, file: &File) -> bool {
        self.segments.entries(file).any(|segment| kind(&segment, 0) == PT_INTERP)
    }

    /// Whether it has a name for others to ask for: a library, or a dynamic loader.
    pub fn has_name(&self, file: &File) -> bool {
        self.segments.entries(file).filter(|segment| kind(segment, 0) == PT_DYNAMIC).any(|segment| {
            let entries = read_at(file, word(&segment, 8), word(&segment, 32).min(DYNAMIC_MAX));
            entries.chunks_exact(16).any(|entry| word(entry, 0) == DT_SONAME)
        })
    }

    /// Whether one of `names` is among its symbols, those that it only asks for included. A file that was stripped tells of
    /// those alone.
    pub fn mentions(&self, file: &File, names: &[&str]) -> bool {
        self.sections.entries(file).filter(|section| kind(section, 4) == SHT_STRTAB).any(|section| {
            let texts = read_at(file, word(&section, 24), word(&section, 32).min(NAMES_MAX));
            texts.split(|byte| *byte == 0).any(|text| names.iter().any(|name| name.as_bytes() == text))
        })
    }
}

fn kind(bytes: &[u8; 40], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// As many bytes as there are.
fn read_at(file: &File, mut at: u64, len: u64) -> Vec<u8> {
    // Not what a damaged header says: what comes.
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    while (bytes.len() as u64) < len {
        let wanted = buffer.len().min(usize::try_from(len - bytes.len() as u64).unwrap_or(buffer.len()));
        match file.read_at(&mut buffer[..wanted], at) {
            Ok(count @ 1..) => {
                bytes.extend_from_slice(&buffer[..count]);
                at = at.saturating_add(count as u64);
            }
            Ok(0) | Err(_) => break,
        }
    }
    bytes
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}
