//! The tables of `spm nodes`: nodes; and, where a machine has more than one or somebody asks, what the firmware says of
//! them, distances, devices, what was measured, and what tells which pages are used.

use std::fmt::Write as _;

use spmem_node::machine::{Access, list_text};

use super::Sizes;
use super::list::{Listing, NodeLine, Origin, mode_of};
use crate::size::human;

/// Nodes that are numbered by another: said above their table.
const OWN: &str = "Nodes that spmem makes itself, numbered apart from the kernel's:";

/// All tables that apply, an empty line between them.
pub fn all(listing: &Listing, sizes: Sizes, is_verbose: bool) -> String {
    let machine = &listing.machine;
    let mut parts = Vec::new();
    if listing.has_ambiguous_ids() {
        let (own, others): (Vec<NodeLine>, Vec<NodeLine>) =
            listing.lines.iter().cloned().partition(|line| line.origin == Origin::Spmem);
        parts.push(nodes(&others, sizes));
        parts.push(format!("{OWN}\n{}", nodes(&own, sizes)));
    } else {
        parts.push(nodes(&listing.lines, sizes));
    }
    let has_several = machine.nodes.len() + machine.target_nodes().len() > 1;
    if has_several || is_verbose {
        parts.push(access(listing));
    }
    if machine.nodes.len() > 1 || (is_verbose && !machine.nodes.is_empty()) {
        parts.push(distances(listing));
    }
    parts.push(devices(listing, sizes));
    parts.push(measured(listing));
    parts.push(heat(listing));
    parts.retain(|part| !part.is_empty());
    parts.join("\n")
}

/// The nodes, header first.
pub fn nodes(lines: &[NodeLine], sizes: Sizes) -> String {
    let rows = lines.iter().map(|line| {
        let or_dash = |bytes: Option<u64>| bytes.map_or_else(dash, |bytes| size(bytes, sizes));
        [
            line.id.to_string(),
            line.node_type.to_string(),
            line.class.number().to_string(),
            line.guard.clone().unwrap_or_else(dash),
            line.owner.clone(),
            or_dash(line.capacity),
            or_dash(line.used),
            or_dash(line.free),
            if line.services.is_empty() { dash() } else { line.services.join(",") },
        ]
    });
    let header = ["node", "type", "class", "guard", "owner", "capacity", "used", "free", "services"];
    let least = [4, 6, 5, 5, 6, 12, 12, 12, 0];
    columns(&header, &least, [true, false, true, false, false, true, true, true, false], rows)
}

fn access(listing: &Listing) -> String {
    let nodes = listing.lines.iter().filter(|line| line.origin != Origin::Spmem);
    let rows = nodes.map(|line| {
        let node = listing.machine.node(line.id).filter(|_| line.origin == Origin::Kernel);
        let access = node.and_then(|node| node.access.as_ref());
        let figure = |get: fn(&Access) -> Option<u64>| number(access.and_then(get));
        let cpus = node.map(|node| list_text(node.cpus.iter().copied())).filter(|cpus| !cpus.is_empty());
        [
            line.id.to_string(),
            cpus.unwrap_or_else(dash),
            number(node.and_then(|node| node.tier)),
            access.map_or_else(dash, |access| list_text(access.initiators.iter().copied())),
            figure(|access| access.read_latency_ns),
            figure(|access| access.write_latency_ns),
            figure(|access| access.read_bandwidth_mib_s),
            figure(|access| access.write_bandwidth_mib_s),
            format!("{}: {}", line.class.number(), line.reason),
        ]
    });
    let header =
        ["node", "cpus", "tier", "from", "read ns", "write ns", "read MiB/s", "write MiB/s", "class, and why"];
    columns(&header, &[4; 9], [true, false, true, true, true, true, true, true, false], rows)
}

/// As `numactl --hardware` has them.
fn distances(listing: &Listing) -> String {
    let nodes = &listing.machine.nodes;
    let mut text = String::from("distance");
    for node in nodes {
        let _ = write!(text, " {:>4}", node.id);
    }
    text.push('\n');
    for from in nodes {
        let _ = write!(text, "{:>8}", from.id);
        for to in nodes {
            let distance = from.distances.get(&to.id).map_or_else(dash, u8::to_string);
            let _ = write!(text, " {distance:>4}");
        }
        text.push('\n');
    }
    text
}

fn devices(listing: &Listing, sizes: Sizes) -> String {
    let machine = &listing.machine;
    let mut rows: Vec<[String; 7]> = Vec::new();
    let node = |id: Option<u16>| id.map_or_else(dash, |id| id.to_string());
    for memdev in &machine.memdevs {
        let total = memdev.ram_size.saturating_add(memdev.pmem_size);
        let kind = if memdev.pmem_size == 0 { "ram" } else { "pmem" };
        let host = memdev.host.clone().unwrap_or_else(dash);
        rows.push([
            memdev.memdev.clone(),
            "cxl memdev".into(),
            kind.into(),
            dash(),
            dash(),
            size(total, sizes),
            host,
        ]);
    }
    for region in &machine.regions {
        let mode = region.mode.clone().unwrap_or_else(dash);
        rows.push([
            region.region.clone(),
            "cxl region".into(),
            mode,
            node(region.target_node),
            dash(),
            size(region.size, sizes),
            region.memdevs.join(","),
        ]);
    }
    for one in &machine.namespaces {
        rows.push([
            one.name.clone(),
            "namespace".into(),
            one.mode.clone(),
            node(one.target_node),
            one.class.class.number().to_string(),
            size(one.bytes, sizes),
            one.blockdev.as_ref().map_or_else(dash, |disk| format!("/dev/{disk}")),
        ]);
    }
    for dax in &machine.dax {
        rows.push([
            dax.name.clone(),
            "dax".into(),
            mode_of(dax).into(),
            node(dax.target_node),
            dax.class.class.number().to_string(),
            size(dax.bytes, sizes),
            dax.parent.clone().unwrap_or_else(|| "firmware's tables".to_owned()),
        ]);
    }
    for range in &machine.soft_reserved {
        let used_by = if range.used_by.is_empty() { "unused".to_owned() } else { range.used_by.join(",") };
        rows.push([
            format!("{:#x}", range.start),
            "soft-reserved".into(),
            dash(),
            dash(),
            dash(),
            size(range.size, sizes),
            used_by,
        ]);
    }
    if rows.is_empty() {
        return String::new();
    }
    let header = ["device", "kind", "mode", "node", "class", "size", "of, or as"];
    columns(&header, &[6, 4, 4, 4, 5, 12, 0], [false, false, false, true, true, true, false], rows.into_iter())
}

fn measured(listing: &Listing) -> String {
    let with_figures = listing.lines.iter().filter_map(|line| Some((line, line.measured.as_ref()?)));
    let rows: Vec<[String; 7]> = with_figures
        .map(|(line, figures)| {
            [
                line.id.to_string(),
                figures.initiator.to_string(),
                figures.threads.to_string(),
                figures.idle_latency_ns.to_string(),
                number(figures.loaded_latency_ns),
                figures.read_bandwidth_mib_s.to_string(),
                figures.write_bandwidth_mib_s.to_string(),
            ]
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let header = ["measured node", "from", "threads", "idle ns", "loaded ns", "read MiB/s", "write MiB/s"];
    columns(&header, &[0; 7], [true; 7], rows.into_iter())
}

fn heat(listing: &Listing) -> String {
    if listing.heat.is_empty() {
        return String::new();
    }
    let rows = listing.heat.iter().map(|line| {
        let source = line.source;
        [source.to_string(), source.summary().to_owned(), source.asker().to_string(), line.reason()]
    });
    columns(&["heat", "what it is", "asked", "is"], &[0; 4], [false; 4], rows)
}

fn dash() -> String {
    "-".to_owned()
}

fn number(value: Option<u64>) -> String {
    value.map_or_else(dash, |value| value.to_string())
}

fn size(bytes: u64, sizes: Sizes) -> String {
    if sizes == Sizes::Human { human(bytes) } else { bytes.to_string() }
}

/// Rows under a header, each column as wide as its widest cell, two blanks apart; the last is not padded.
fn columns<const N: usize>(
    header: &[&str; N],
    least: &[usize; N],
    is_right: [bool; N],
    rows: impl Iterator<Item = [String; N]>,
) -> String {
    let all: Vec<[String; N]> = [header.map(str::to_owned)].into_iter().chain(rows).collect();
    let width = |column: usize| {
        let widest = all.iter().map(|row| row[column].chars().count()).max();
        widest.unwrap_or(0).max(least[column])
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &all {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let width = if column + 1 == N && !is_right[column] { 0 } else { widths[column] };
            // Writing to a string cannot fail.
            let _ = if is_right[column] {
                write!(line, "{gap}{cell:>width$}")
            } else {
                write!(line, "{gap}{cell:<width$}")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
