//! The picture of `spm nodes --svg`: cards of nodes on either side of a wall, and the distances between them.
//!
//! Top down: title, the kernel's nodes, the wall, what is behind it, distances, what the colours mean. Everything is placed by
//! arithmetic over one width per letter (fonts are monospaced), so nothing overlaps whatever the names are; [`Canvas`] keeps
//! where everything went, and the tests look.

use spmem_core::node::{Class, NodeType};
use spmem_node::machine::{Node, list_text};
use svg::Document;
use svg::node::element::{Definitions, Pattern, Rectangle, Style, Text, Title};

use super::list::{Listing, NodeLine, Origin};
use crate::size::human;

const MARGIN: f64 = 28.0;
const GAP: f64 = 20.0;
const CARD: f64 = 262.0;
const PADDING: f64 = 12.0;
/// Cards side by side.
const MOST_COLUMNS: usize = 4;
/// The page is never narrower than this many cards: legend and title need the room.
const LEAST_COLUMNS: usize = 2;
const HEAD: f64 = 34.0;
const LINE: f64 = 19.0;
const BAR: f64 = 10.0;
const WALL: f64 = 36.0;
const CELL: (f64, f64) = (46.0, 28.0);
/// Devices named on a card; of more, how many.
const MOST_DEVICES: usize = 4;
/// Width of a letter, in font sizes: that of the widest common monospaced font.
const LETTER: f64 = 0.61;

const INK: &str = "#1f2933";
const FAINT: &str = "#52606d";
const PAPER: &str = "#ffffff";
const BRICK: &str = "#a8452c";
const MORTAR: &str = "#e9d9d0";
const CLASSES: [Class; 6] =
    [Class::Plain, Class::Slower, Class::Slow, Class::Featured, Class::Accelerator, Class::Shared];

const fn colour(class: Class) -> &'static str {
    match class {
        Class::Plain => "#2f7d4f",
        Class::Slower => "#2b6cb0",
        Class::Slow => "#1a365d",
        Class::Featured => "#7b3fa0",
        Class::Accelerator => "#b7621b",
        Class::Shared => "#6b5b3e",
    }
}

/// The picture as the text of an SVG file.
pub fn draw(listing: &Listing) -> String {
    let canvas = paint(listing);
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}\n", canvas.document)
}

/// What has been drawn, and where.
struct Canvas {
    document: Document,
    width: f64,
    texts: Vec<Area>,
    cards: Vec<Area>,
}

/// Of a text or card, for what has been drawn to be looked at.
#[allow(dead_code, reason = "read by the tests, which see that nothing overlaps, and by their messages")]
#[derive(Clone, Debug)]
struct Area {
    x: f64,
    y: f64,
    width: f64,
    height: f64,
    what: String,
}

/// Where a text's `x` is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Anchor {
    Start,
    Middle,
    End,
}

fn paint(listing: &Listing) -> Canvas {
    let (open, walled): (Vec<&NodeLine>, Vec<&NodeLine>) =
        listing.lines.iter().partition(|line| line.node_type == NodeType::Sysram);
    let columns = open.len().max(walled.len()).clamp(LEAST_COLUMNS, MOST_COLUMNS);
    let matrix = (listing.machine.nodes.len() as f64 + 1.0).mul_add(CELL.0, 2.0 * PADDING + 40.0);
    let cards = (columns as f64).mul_add(CARD + GAP, -GAP);
    let width = cards.max(matrix) + 2.0 * MARGIN;
    let mut canvas = Canvas { document: Document::new(), width, texts: Vec::new(), cards: Vec::new() };
    canvas.begin();
    let mut y = MARGIN + 18.0;
    canvas.text(MARGIN, y, 20.0, INK, Anchor::Start, "Memory of this machine", true);
    y += 24.0;
    canvas.text(MARGIN, y, 12.0, FAINT, Anchor::Start, &summary(&open, &walled), false);
    y += 34.0;
    canvas.text(MARGIN, y, 14.0, INK, Anchor::Start, "Ordinary memory: the kernel gives it to everyone", true);
    y = canvas.grid(listing, &open, columns, y + 14.0);
    if !walled.is_empty() {
        y = canvas.wall(y + 8.0);
        let title = "Special-purpose memory: nothing lands here by accident";
        y += 28.0;
        canvas.text(MARGIN, y, 14.0, INK, Anchor::Start, title, true);
        y = canvas.grid(listing, &walled, columns, y + 14.0);
    }
    if listing.machine.nodes.len() > 1 {
        y = canvas.distances(&listing.machine.nodes, y + 20.0);
    }
    y = canvas.legend(y + 24.0);
    canvas.end(y + MARGIN)
}

fn summary(open: &[&NodeLine], walled: &[&NodeLine]) -> String {
    let total =
        |lines: &[&NodeLine]| human(lines.iter().filter_map(|line| line.capacity).fold(0, u64::saturating_add));
    let count = |lines: &[&NodeLine]| match lines.len() {
        1 => "1 node".to_owned(),
        count => format!("{count} nodes"),
    };
    let ram = format!("{} of RAM, {}", count(open), total(open));
    if walled.is_empty() {
        return ram;
    }
    format!("{ram}; {} behind the wall, {}", count(walled), total(walled))
}

impl Canvas {
    fn begin(&mut self) {
        let bricks = Pattern::new()
            .set("id", "bricks")
            .set("width", 36)
            .set("height", 18)
            .set("patternUnits", "userSpaceOnUse")
            .add(plain(0.0, 0.0, 36.0, 18.0, MORTAR))
            .add(plain(1.0, 1.0, 34.0, 7.0, BRICK))
            .add(plain(-17.0, 10.0, 34.0, 7.0, BRICK))
            .add(plain(19.0, 10.0, 34.0, 7.0, BRICK));
        let style = "text { font-family: 'DejaVu Sans Mono', Menlo, Consolas, 'Liberation Mono', monospace; }";
        self.add(Title::new("Memory nodes, distances and walls"));
        self.add(Style::new(style));
        self.add(Definitions::new().add(bricks));
    }

    /// Sets the size, with the paper behind everything.
    fn end(mut self, height: f64) -> Self {
        let paper = plain(0.0, 0.0, self.width, height, PAPER);
        let drawn = std::mem::replace(&mut self.document, Document::new());
        self.document = Document::new()
            .set("viewBox", (0.0, 0.0, self.width, height))
            .set("width", self.width)
            .set("height", height);
        let children = drawn.get_children();
        self.add(paper);
        for child in children.iter() {
            svg::Node::append(&mut self.document, child.clone());
        }
        self
    }

    fn add(&mut self, node: impl svg::Node) {
        svg::Node::append(&mut self.document, node);
    }

    #[allow(clippy::too_many_arguments, reason = "what a text has: place, size, colour, and itself")]
    fn text(&mut self, x: f64, y: f64, size: f64, fill: &str, anchor: Anchor, text: &str, is_bold: bool) {
        let width = text.chars().count() as f64 * size * LETTER;
        let (anchor_name, left) = match anchor {
            Anchor::Start => ("start", x),
            Anchor::Middle => ("middle", x - width / 2.0),
            Anchor::End => ("end", x - width),
        };
        let (ascent, height) = (size * 0.8, size * 1.05);
        self.texts.push(Area { x: left, y: y - ascent, width, height, what: text.to_owned() });
        let mut node = Text::new(text).set("x", x).set("y", y).set("font-size", size).set("fill", fill);
        if is_bold {
            node = node.set("font-weight", "bold");
        }
        if anchor != Anchor::Start {
            node = node.set("text-anchor", anchor_name);
        }
        self.add(node);
    }

    /// Cards in rows; returns where the last row ends.
    fn grid(&mut self, listing: &Listing, lines: &[&NodeLine], columns: usize, top: f64) -> f64 {
        let mut y = top;
        for row in lines.chunks(columns) {
            let bodies: Vec<Vec<String>> = row.iter().map(|line| body(listing, line)).collect();
            let most = bodies.iter().map(Vec::len).max().unwrap_or(0);
            let height = HEAD + PADDING + BAR + LINE * (most as f64 + 1.0) + PADDING;
            for (column, (line, body)) in row.iter().zip(&bodies).enumerate() {
                let x = (column as f64).mul_add(CARD + GAP, MARGIN);
                self.card(line, body, (x, y), height);
            }
            y += height + GAP;
        }
        y
    }

    fn card(&mut self, line: &NodeLine, body: &[String], (x, y): (f64, f64), height: f64) {
        // spmem numbers its own apart.
        let owner = if line.origin == Origin::Spmem { "spmem " } else { "" };
        let what = format!("{owner}node {}", line.id);
        self.cards.push(Area { x, y, width: CARD, height, what: what.clone() });
        let class = colour(line.class);
        let is_walled = line.node_type == NodeType::Spm;
        let frame = plain(x, y, CARD, height, "#f7f9fb").set("rx", 6);
        let frame = if is_walled {
            frame.set("stroke", "url(#bricks)").set("stroke-width", 7)
        } else {
            frame.set("stroke", class).set("stroke-width", 1.5)
        };
        self.add(frame);
        self.add(plain(x + 3.0, y + 3.0, CARD - 6.0, HEAD - 3.0, class).set("rx", 4));
        let baseline = y + 24.0;
        self.text(x + PADDING, baseline, 16.0, PAPER, Anchor::Start, &what, true);
        let name = format!("{} {}", line.class.number(), line.class.name());
        self.text(x + CARD - PADDING, baseline, 12.0, PAPER, Anchor::End, &name, false);
        let mut y = y + HEAD + PADDING + 6.0;
        self.text(x + PADDING, y, 12.0, INK, Anchor::Start, &clip(&capacity(line)), true);
        y += 8.0;
        let full = CARD - 2.0 * PADDING;
        self.add(plain(x + PADDING, y, full, BAR, "#dde3e9").set("rx", 3));
        if let (Some(used), Some(capacity)) = (line.used, line.capacity.filter(|&capacity| capacity > 0)) {
            let share = (used as f64 / capacity as f64).min(1.0);
            self.add(plain(x + PADDING, y, full * share, BAR, class).set("rx", 3));
        }
        y += BAR + 2.0;
        for text in body {
            y += LINE;
            self.text(x + PADDING, y - 4.0, 12.0, FAINT, Anchor::Start, &clip(text), false);
        }
    }

    /// Returns where it ends.
    fn wall(&mut self, y: f64) -> f64 {
        let full = self.width - 2.0 * MARGIN;
        self.add(plain(MARGIN, y, full, WALL, "url(#bricks)"));
        let label = "the wall: only a grant goes through";
        let width = label.chars().count() as f64 * 13.0 * LETTER + 24.0;
        let middle = self.width / 2.0;
        self.add(plain(middle - width / 2.0, y + 6.0, width, WALL - 12.0, PAPER).set("rx", 4));
        self.text(middle, y + 22.5, 13.0, BRICK, Anchor::Middle, label, true);
        y + WALL
    }

    /// A matrix, the darker the farther; returns where it ends.
    fn distances(&mut self, nodes: &[Node], y: f64) -> f64 {
        self.text(MARGIN, y, 14.0, INK, Anchor::Start, "Distances, from the row's node to the column's", true);
        let farthest = nodes.iter().flat_map(|node| node.distances.values()).copied().max().unwrap_or(10).max(11);
        let (left, top) = (MARGIN + 64.0, y + 14.0);
        let place = |column: usize, row: usize| {
            ((column as f64).mul_add(CELL.0, left), (row as f64 + 1.0).mul_add(CELL.1, top))
        };
        for (column, node) in nodes.iter().enumerate() {
            let (x, _) = place(column, 0);
            self.text(x + CELL.0 / 2.0, top + 18.0, 12.0, INK, Anchor::Middle, &node.id.to_string(), true);
        }
        for (row, from) in nodes.iter().enumerate() {
            let (_, y) = place(0, row);
            self.text(left - 8.0, y + 18.0, 12.0, INK, Anchor::End, &format!("node {}", from.id), true);
            for (column, to) in nodes.iter().enumerate() {
                let (x, y) = place(column, row);
                let Some(&distance) = from.distances.get(&to.id) else {
                    self.text(x + CELL.0 / 2.0, y + 18.0, 12.0, FAINT, Anchor::Middle, "-", false);
                    continue;
                };
                let share = f64::from(distance.saturating_sub(10)) / f64::from(farthest - 10);
                self.add(plain(x + 1.0, y + 1.0, CELL.0 - 2.0, CELL.1 - 2.0, &shade(share)).set("rx", 3));
                let ink = if share > 0.55 { PAPER } else { INK };
                self.text(x + CELL.0 / 2.0, y + 18.0, 12.0, ink, Anchor::Middle, &distance.to_string(), false);
            }
        }
        place(0, nodes.len()).1 + 8.0
    }

    /// What the colours mean; returns where it ends.
    fn legend(&mut self, y: f64) -> f64 {
        self.text(MARGIN, y, 14.0, INK, Anchor::Start, "Classes", true);
        let names = [
            "1 plain: below 100 ns",
            "2 slower: to 300 ns",
            "3 slow: beyond 300 ns",
            "4 featured: compresses",
            "5 accelerator, coherent",
            "6 shared or persistent",
        ];
        let step = 218.0;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a page is some cards wide")]
        let in_row = (((self.width - 2.0 * MARGIN) / step) as usize).clamp(1, names.len());
        // Full rows only: 6, 3, 2 or 1.
        let in_row = if in_row < names.len() { in_row.min(3) } else { in_row };
        let mut bottom = y;
        for (index, (class, name)) in CLASSES.into_iter().zip(names).enumerate() {
            let x = ((index % in_row) as f64).mul_add(step, MARGIN);
            let row = ((index / in_row) as f64).mul_add(24.0, y + 14.0);
            self.add(plain(x, row, 16.0, 16.0, colour(class)).set("rx", 3));
            self.text(x + 24.0, row + 12.5, 12.0, INK, Anchor::Start, name, false);
            bottom = row + 16.0;
        }
        bottom
    }
}

fn plain(x: f64, y: f64, width: f64, height: f64, fill: &str) -> Rectangle {
    Rectangle::new().set("x", x).set("y", y).set("width", width).set("height", height).set("fill", fill)
}

/// From light to dark, 0 to 1.
fn shade(share: f64) -> String {
    let mix = |from: f64, to: f64| (to - from).mul_add(share, from).round();
    format!("rgb({},{},{})", mix(253.0, 156.0), mix(243.0, 42.0), mix(215.0, 28.0))
}

fn capacity(line: &NodeLine) -> String {
    match (line.capacity, line.used) {
        (Some(0), _) => "no memory".to_owned(),
        (Some(capacity), Some(used)) => format!("{}, {} used", human(capacity), human(used)),
        (Some(capacity), None) => human(capacity),
        (None, _) => "-".to_owned(),
    }
}

/// The lines of a card, as much as is known.
fn body(listing: &Listing, line: &NodeLine) -> Vec<String> {
    let mut lines = match (line.origin, line.guard.as_deref()) {
        (Origin::Device, _) => vec![format!("open the device ({})", line.owner)],
        (_, Some(guard)) => vec![format!("guard {guard}, owner {}", line.owner)],
        (_, None) => vec![format!("owner {}", line.owner)],
    };
    if let Some(node) = listing.machine.node(line.id).filter(|_| line.origin == Origin::Kernel) {
        if !node.cpus.is_empty() {
            lines.push(format!("cpus {}", list_text(node.cpus.iter().copied())));
        }
        if let Some(access) = &node.access {
            let from = list_text(access.initiators.iter().copied());
            let from = if from.is_empty() { String::new() } else { format!(" from {from}") };
            let latency = access.latency_ns().map(|ns| format!("{ns} ns"));
            let bandwidth = access.read_bandwidth_mib_s.map(rate);
            let figures: Vec<String> = [latency, bandwidth].into_iter().flatten().collect();
            lines.push(format!("{}{from}", figures.join(", ")));
        }
        if let Some(tier) = node.tier {
            lines.push(format!("tier {tier}"));
        }
    }
    if let Some(measured) = &line.measured {
        lines.push(format!("measured {} ns, {}", measured.idle_latency_ns, rate(measured.read_bandwidth_mib_s)));
    }
    let named = line.devices.iter().take(MOST_DEVICES).map(|name| device(listing, name));
    lines.extend(named);
    if line.devices.len() > MOST_DEVICES {
        lines.push(format!("and {} more", line.devices.len() - MOST_DEVICES));
    }
    lines
}

fn device(listing: &Listing, name: &str) -> String {
    let dax = listing.machine.dax.iter().find(|dax| dax.name == name);
    let namespace = listing.machine.namespaces.iter().find(|one| one.name == name);
    match (dax, namespace) {
        (Some(dax), _) => format!("{name} {} {}", dax.mode.name(), human(dax.bytes)),
        (None, Some(one)) => format!("{name} {} {}", one.mode, human(one.bytes)),
        (None, None) => name.to_owned(),
    }
}

fn rate(mib_s: u64) -> String {
    format!("{}/s", human(mib_s.saturating_mul(1 << 20)))
}

/// What fits on a line of a card.
fn clip(text: &str) -> String {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some thirty letters")]
    let most = ((CARD - 2.0 * PADDING) / (12.0 * LETTER)) as usize;
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests;
