//! The JSON of `spm nodes`: an array of objects as `cxl list` prints it. Nodes come first, an object each; then, where
//! there are any, one object for each kind of device: `{"dax": [...]}`, `{"namespaces": [...]}`, `{"memdevs": [...]}`,
//! `{"regions": [...]}`, `{"heat": [...]}` with `-v`, `{"soft_reserved": [...]}`. Sizes are integers in bytes, or text with `-u`; what is not known
//! is left out.

use serde_json::{Map, Value, json};
use spmem_node::machine::{Dax, Namespace, list_text};

use super::Sizes;
use super::list::{Listing, NodeLine, Origin};
use crate::heat::HeatLine;
use crate::size::human;

/// Keys whose values are bytes.
const SIZES: [&str; 9] =
    ["capacity", "used", "free", "size", "ram_size", "pmem_size", "align", "line_size", "buffer"];

/// The whole array.
pub fn array(listing: &Listing, sizes: Sizes) -> Value {
    let machine = &listing.machine;
    let mut objects: Vec<Value> = listing.lines.iter().map(|line| node(listing, line)).collect();
    let group = |name: &str, devices: Vec<Value>| (!devices.is_empty()).then(|| json!({ name: devices }));
    let groups = [
        group("dax", machine.dax.iter().map(dax).collect()),
        group("namespaces", machine.namespaces.iter().map(namespace).collect()),
        group("memdevs", machine.memdevs.iter().map(|one| json!(one)).collect()),
        group("regions", machine.regions.iter().map(|one| json!(one)).collect()),
        group("heat", listing.heat.iter().map(heat).collect()),
        group("soft_reserved", machine.soft_reserved.iter().map(|one| json!(one)).collect()),
    ];
    objects.extend(groups.into_iter().flatten().map(without_nulls));
    let mut array = Value::Array(objects);
    if sizes == Sizes::Human {
        for_people(&mut array);
    }
    array
}

/// The first nine keys are always there.
fn node(listing: &Listing, line: &NodeLine) -> Value {
    let mut object = json!({
        "node": line.id,
        "type": line.node_type.to_string(),
        "class": line.class.number(),
        "services": line.services,
        "guard": line.guard,
        "owner": line.owner,
        "capacity": line.capacity,
        "used": line.used,
        "free": line.free,
    });
    let mut more = json!({
        "origin": line.origin.name(),
        "class_name": line.class.name(),
        "class_reason": Some(&line.reason).filter(|reason| !reason.is_empty()),
        "devices": Some(&line.devices).filter(|devices| !devices.is_empty()),
        "measured": line.measured,
    });
    if line.origin == Origin::Kernel
        && let Some(node) = listing.machine.node(line.id)
        && let Value::Object(map) = &mut more
    {
        let Value::Object(seen) = json!({
            "cpus": list_text(node.cpus.iter().copied()),
            "distances": node.distances,
            "tier": node.tier,
            "access": node.access,
            "any_initiator": node.any_initiator,
            "has_generic_initiator": Some(true).filter(|_| node.has_generic_initiator),
            "memory_side_caches": Some(&node.caches).filter(|caches| !caches.is_empty()),
        }) else {
            return object;
        };
        map.extend(seen);
    }
    if let (Value::Object(object), Value::Object(more)) = (&mut object, without_nulls(more)) {
        object.extend(more);
    }
    object
}

fn heat(line: &HeatLine) -> Value {
    json!({
        "source": line.source.name(),
        "asked": line.source.asker().to_string(),
        "is_chosen": line.is_chosen(),
        "reason": line.reason(),
    })
}

/// As daxctl-list(1).
fn dax(dax: &Dax) -> Value {
    json!({
        "chardev": dax.name,
        "size": dax.bytes,
        "target_node": dax.target_node,
        "numa_node": dax.numa_node,
        "align": dax.align_bytes,
        "mode": dax.mode.name(),
        "driver": dax.driver,
        "parent": dax.parent,
        "class": dax.class.class.number(),
        "class_reason": dax.class.reason.to_string(),
    })
}

/// As ndctl-list(1).
fn namespace(namespace: &Namespace) -> Value {
    json!({
        "dev": namespace.name,
        "mode": namespace.mode,
        "size": namespace.bytes,
        "blockdev": namespace.blockdev,
        "numa_node": namespace.numa_node,
        "target_node": namespace.target_node,
        "class": namespace.class.class.number(),
        "class_reason": namespace.class.reason.to_string(),
    })
}

/// What is not known is left out, at any depth.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let known = map.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(known.map(|(key, value)| (key, without_nulls(value))).collect::<Map<_, _>>())
        }
        Value::Array(values) => Value::Array(values.into_iter().map(without_nulls).collect()),
        other => other,
    }
}

fn for_people(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                match value.as_u64() {
                    Some(bytes) if SIZES.contains(&key.as_str()) => *value = human(bytes).into(),
                    Some(address) if key == "resource" => *value = format!("{address:#x}").into(),
                    _ => for_people(value),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(for_people),
        _ => {}
    }
}
