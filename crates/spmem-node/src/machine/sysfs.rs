//! Reading sysfs with doubt: what is missing is nothing, what is there and makes no sense is a remark.
//!
//! [`Sysfs`] is a root directory with what was odd so far. Everything read is small and bounded, because the tree may be
//! anybody's: a captured one, a container's, a broken one.

use std::borrow::ToOwned;
use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::string::{String, ToString};
use std::vec::Vec;
use std::{fmt, format};

/// More than any file read here has: sysfs has a page, /proc/iomem some kilobytes.
const MOST_BYTES: u64 = 1 << 20;
/// Numbers in a list of nodes or processors: more than Linux can be built for (NR_CPUS is 8192 at most on x86).
const MOST_NUMBERS: usize = 1 << 16;

/// Something odd: a file that cannot be read or makes no sense. What it would have told is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// Which file, from the root.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.problem)
    }
}

/// A tree, and what was odd in it.
pub(super) struct Sysfs<'a> {
    root: &'a Path,
    remarks: RefCell<Vec<Remark>>,
}

impl<'a> Sysfs<'a> {
    pub(super) fn new(root: &'a Path) -> Self {
        Self { root, remarks: RefCell::default() }
    }

    pub(super) fn into_remarks(self) -> Vec<Remark> {
        self.remarks.into_inner()
    }

    /// Notes what is wrong with `path`.
    pub(super) fn remark(&self, path: impl AsRef<Path>, problem: impl fmt::Display) {
        let path = Path::new("/").join(path);
        self.remarks.borrow_mut().push(Remark { path, problem: problem.to_string() });
    }

    /// The text of a file without its last line feed; `None` where there is none.
    pub(super) fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let path = path.as_ref();
        let mut bytes = Vec::new();
        let read = File::open(self.root.join(path)).and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes));
        match read {
            Ok(_) => Some(String::from_utf8_lossy(&bytes).trim_end().to_owned()),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => {
                self.remark(path, error);
                None
            }
        }
    }

    /// As [`text`](Self::text), of a file that every kernel has.
    pub(super) fn required(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = self.text(&path);
        if text.is_none() && !self.exists(&path) {
            self.remark(path, "it is missing");
        }
        text
    }

    fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.root.join(path).exists()
    }

    /// A whole number, decimal or behind `0x`.
    pub(super) fn number(&self, path: impl AsRef<Path>) -> Option<u64> {
        let text = self.text(&path)?;
        let number = parse_number(&text);
        if number.is_none() {
            self.remark(path, format!("`{}` is no number", clip(&text)));
        }
        number
    }

    /// As [`number`](Self::number), of a file that only root may read or that is an error to read at times.
    pub(super) fn number_if_told(&self, path: impl AsRef<Path>) -> Option<u64> {
        parse_number(&fs::read_to_string(self.root.join(path)).ok()?)
    }

    /// A node's number; -1, the kernel's word for no node (NUMA_NO_NODE), is `None`.
    pub(super) fn node(&self, path: impl AsRef<Path>) -> Option<u16> {
        let text = self.text(&path)?;
        if text == "-1" {
            return None;
        }
        let node = text.parse().ok().filter(|&node| node < spmem_core::units::MAX_NODES);
        if node.is_none() {
            self.remark(path, format!("`{}` is no node", clip(&text)));
        }
        node
    }

    /// A list of the kernel's: `0,2-3`.
    pub(super) fn list<T: TryFrom<u32>>(&self, path: impl AsRef<Path>) -> Option<Vec<T>> {
        let text = self.text(&path)?;
        let numbers = parse_list(&text);
        if numbers.is_none() {
            self.remark(path, format!("`{}` is no list of numbers", clip(&text)));
        }
        numbers
    }

    /// The names in a directory that are `prefix` and a number, in order of the numbers; a dot may follow with another.
    pub(super) fn numbered(&self, folder: impl AsRef<Path>, prefix: &str) -> Vec<String> {
        let mut names: Vec<(Vec<u32>, String)> = self
            .names(folder)
            .into_iter()
            .filter_map(|name| {
                let numbers: Option<Vec<u32>> =
                    name.strip_prefix(prefix)?.split('.').map(|part| part.parse().ok()).collect();
                Some((numbers?, name))
            })
            .collect();
        names.sort();
        names.into_iter().map(|(_, name)| name).collect()
    }

    /// The names in a directory, sorted; none where there is no such directory.
    pub(super) fn names(&self, folder: impl AsRef<Path>) -> Vec<String> {
        let folder = folder.as_ref();
        let entries = match fs::read_dir(self.root.join(folder)) {
            Ok(entries) => entries,
            Err(error) => {
                if error.kind() != ErrorKind::NotFound {
                    self.remark(folder, error);
                }
                return Vec::new();
            }
        };
        let mut names: Vec<String> =
            entries.filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.to_owned())).collect();
        names.sort();
        names
    }

    /// The last name of what a link points to: of `driver`, the driver.
    pub(super) fn link_name(&self, path: impl AsRef<Path>) -> Option<String> {
        let target = fs::read_link(self.root.join(path)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    /// The names on the way to a device's own directory: what it is plugged into, outermost first, itself last.
    pub(super) fn ancestry(&self, path: impl AsRef<Path>) -> Vec<String> {
        let path = path.as_ref();
        let found = fs::canonicalize(self.root.join(path));
        let root = fs::canonicalize(self.root);
        match (found, root) {
            (Ok(found), Ok(root)) => {
                let inside = found.strip_prefix(root).unwrap_or(&found);
                inside.iter().map(|part| part.to_string_lossy().into_owned()).collect()
            }
            (Err(error), _) | (_, Err(error)) => {
                self.remark(path, error);
                Vec::new()
            }
        }
    }
}

fn parse_number(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn parse_list<T: TryFrom<u32>>(text: &str) -> Option<Vec<T>> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || (last - first) as usize >= MOST_NUMBERS - numbers.len().min(MOST_NUMBERS) {
            return None;
        }
        for number in first..=last {
            numbers.push(T::try_from(number).ok()?);
        }
    }
    Some(numbers)
}

/// What of a wrong text is repeated.
fn clip(text: &str) -> String {
    text.chars().take(40).map(|letter| if letter.is_control() { '?' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    #[test]
    fn lists_of_the_kernel_are_read_and_others_refused() {
        assert_eq!(parse_list::<u16>("0,2-4"), Some(vec![0, 2, 3, 4]));
        assert_eq!(parse_list::<u16>(""), Some(vec![]));
        for wrong in ["a", "3-1", "1-", "0-4294967295", "0-65535,0-65535", "70000", "-1"] {
            assert_eq!(parse_list::<u16>(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!([" 12 ", "0x10", "-1", "", "0xg"].map(parse_number), [Some(12), Some(16), None, None, None]);
    }
}
