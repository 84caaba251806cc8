//! That the picture can be read, with any number of nodes and any names.

use std::collections::BTreeMap;

use spmem_core::class::{Reason, Verdict};
use spmem_node::machine::{Access, Machine, Memory};

use super::*;
use crate::nodes::measure::Measured;

fn node(id: u16, count: u16) -> Node {
    let memory = Memory { total_bytes: 64 << 30, free_bytes: 20 << 30, available_bytes: 40 << 30 };
    let access = Access {
        initiators: (0..40).step_by(2).collect(),
        read_latency_ns: Some(1_000_000),
        write_latency_ns: Some(80),
        read_bandwidth_mib_s: Some(u64::MAX),
        write_bandwidth_mib_s: Some(1),
    };
    Node {
        id,
        cpus: (0..400).step_by(2).collect(),
        memory: Some(memory),
        distances: (0..count)
            .map(|to| (to, if to == id { 10 } else { 255 - u8::try_from(to).unwrap() }))
            .collect(),
        access: Some(access),
        any_initiator: None,
        tier: Some(4),
        has_generic_initiator: false,
        caches: Vec::new(),
        class: Verdict { class: CLASSES[usize::from(id) % 6], reason: Reason::Configured },
    }
}

fn listing(count: u16, spm: u16) -> Listing {
    let machine = Machine { nodes: (0..count).map(|id| node(id, count)).collect(), ..Machine::default() };
    let measured = Measured {
        initiator: 0,
        threads: 64,
        buffer: 1 << 30,
        idle_latency_ns: 123_456,
        loaded_latency_ns: Some(1),
        read_bandwidth_mib_s: 1 << 40,
        write_bandwidth_mib_s: 1,
        disagreements: Vec::new(),
    };
    let line = |id: u16, origin, node_type| NodeLine {
        id,
        origin,
        node_type,
        class: CLASSES[usize::from(id) % 6],
        reason: String::new(),
        services: Vec::new(),
        guard: (node_type == NodeType::Spm).then(|| "hard".to_owned()),
        owner: "a component <with> & \"a long name\"".to_owned(),
        capacity: Some(u64::MAX),
        used: Some(u64::MAX / 2),
        free: Some(0),
        devices: (0..6).map(|index| format!("dax{index}.1234567890123456789")).collect(),
        measured: Some(measured.clone()),
    };
    let mut lines: Vec<NodeLine> = (0..count).map(|id| line(id, Origin::Kernel, NodeType::Sysram)).collect();
    let kinds = [Origin::Device, Origin::Spmem].into_iter().cycle();
    lines.extend((count..count + spm).zip(kinds).map(|(id, origin)| line(id, origin, NodeType::Spm)));
    Listing { lines, machine, heat: Vec::new() }
}

fn overlap(one: &Area, other: &Area) -> bool {
    one.x < other.x + other.width
        && other.x < one.x + one.width
        && one.y < other.y + other.height
        && other.y < one.y + one.height
}

#[test]
fn nothing_overlaps_and_all_is_on_the_page_with_any_number_of_nodes() {
    for (count, spm) in [(1, 0), (1, 1), (2, 3), (4, 2), (5, 1), (8, 4), (8, 9), (24, 5)] {
        let canvas = paint(&listing(count, spm));
        assert_eq!(canvas.cards.len(), usize::from(count + spm));
        for areas in [&canvas.texts, &canvas.cards] {
            for (index, one) in areas.iter().enumerate() {
                let height = canvas.document.get_attributes().get("height").unwrap().parse::<f64>().unwrap();
                assert!(one.x >= 0.0 && one.x + one.width <= canvas.width, "{count}: {one:?}");
                assert!(one.y >= 0.0 && one.y + one.height <= height, "{count}: {one:?}");
                for other in &areas[index + 1..] {
                    assert!(!overlap(one, other), "{count} and {spm} nodes: {one:?} over {other:?}");
                }
            }
        }
        // A text is in a card as a whole or not at all.
        for (text, card) in canvas.texts.iter().flat_map(|text| canvas.cards.iter().map(move |card| (text, card)))
        {
            let is_inside = text.x >= card.x
                && text.x + text.width <= card.x + card.width
                && text.y >= card.y
                && text.y + text.height <= card.y + card.height;
            assert!(is_inside || !overlap(text, card), "{text:?} over the edge of {card:?}");
        }
    }
}

#[test]
fn the_picture_has_every_node_the_wall_and_the_distances_and_is_well_formed() {
    let text = draw(&listing(4, 2));
    for part in ["node 3", "node 5", "the wall", "guard hard", "open the device (", "\n254\n", "1 plain"] {
        assert!(text.contains(part), "{part}");
    }
    assert!(text.contains("&lt;with&gt; &amp;") && !text.contains("<with>"), "names are escaped");
    let mut open: Vec<String> = Vec::new();
    for event in svg::read(&text).unwrap() {
        match event {
            svg::parser::Event::Tag(name, svg::node::element::tag::Type::Start, _) => open.push(name.to_owned()),
            svg::parser::Event::Tag(name, svg::node::element::tag::Type::End, _) => {
                assert_eq!(open.pop().as_deref(), Some(name));
            }
            svg::parser::Event::Error(error) => panic!("{error}"),
            _ => {}
        }
    }
    assert_eq!(open, [""; 0]);
}

#[test]
fn a_machine_without_walls_shows_none_and_one_of_one_node_no_distances() {
    assert!(!draw(&listing(2, 0)).contains("the wall"));
    assert!(!draw(&listing(1, 1)).contains("Distances"));
    let unknown = Listing {
        machine: Machine {
            nodes: vec![Node { distances: BTreeMap::new(), ..node(0, 1) }, node(1, 2)],
            ..Machine::default()
        },
        ..listing(2, 1)
    };
    assert!(draw(&unknown).contains("\n-\n"), "a distance that is not told is a dash");
}
