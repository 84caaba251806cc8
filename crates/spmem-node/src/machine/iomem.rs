//! Soft-reserved ranges, from /proc/iomem: a tree, two blanks a level, `START-END : NAME`.
//!
//! Others than root are told addresses of 0 (kernel/resource.c); then there is nothing to show.

use std::borrow::ToOwned;
use std::vec::Vec;

use super::SoftReserved;
use super::sysfs::Sysfs;

const IOMEM: &str = "proc/iomem";
const NAME: &str = "Soft Reserved";

pub(super) fn read(sysfs: &Sysfs<'_>) -> Vec<SoftReserved> {
    let Some(text) = sysfs.text(IOMEM) else { return Vec::new() };
    let ranges = parse(&text);
    if ranges.iter().any(|range| range.start == 0 && range.size == 1) {
        sysfs.remark(IOMEM, "there are soft-reserved ranges; only root is told where");
        return Vec::new();
    }
    ranges
}

fn parse(text: &str) -> Vec<SoftReserved> {
    let mut ranges: Vec<SoftReserved> = Vec::new();
    // How far the range is indented that lines belong to, while they do.
    let mut inside = None;
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        let Some((start, end, name)) = parse_line(line) else { continue };
        if inside.is_some_and(|outer| indent <= outer) {
            inside = None;
        }
        match inside {
            Some(_) => {
                if let Some(range) = ranges.last_mut().filter(|_| name.starts_with("dax")) {
                    range.used_by.push(name.to_owned());
                }
            }
            None if name == NAME => {
                inside = Some(indent);
                ranges.push(SoftReserved { start, size: (end - start).saturating_add(1), used_by: Vec::new() });
            }
            None => {}
        }
    }
    ranges
}

fn parse_line(line: &str) -> Option<(u64, u64, &str)> {
    let (range, name) = line.split_once(" : ")?;
    let (start, end) = range.trim().split_once('-')?;
    let address = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = (address(start)?, address(end)?);
    if start <= end { Some((start, end, name)) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    #[test]
    fn soft_reserved_ranges_are_found_at_any_depth_with_the_devices_in_them() {
        let text = "00001000-0009fbff : System RAM\n30000000-47ffffff : Soft Reserved\n  30000000-47ffffff : dax0.0\n    \
                    30000000-47ffffff : System RAM (kmem)\n48000000-4ffdffff : System RAM\n2e0000000-31fffffff : CXL \
                    Window 0\n  2e0000000-2efffffff : Soft Reserved\n  2f0000000-2f0000fff : dax9.9\nrubbish\n9-1 : Soft Reserved\n";
        let range = |start, size, used_by: &[&str]| SoftReserved {
            start,
            size,
            used_by: used_by.iter().map(|&name| name.to_owned()).collect(),
        };
        assert_eq!(
            parse(text),
            vec![range(0x3000_0000, 384 << 20, &["dax0.0"]), range(0x2_e000_0000, 256 << 20, &[])]
        );
    }
}
