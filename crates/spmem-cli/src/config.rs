//! The configuration: one TOML file, every key with a default, none needed.
//!
//! [`Config::read`] reads a file, [`Config::default`] is the embedded one, whose text ([`EXAMPLE`]) documents every key
//! and is printed by `spm run --help`. Unknown keys and values are errors that name the line and what is valid.
//! Hole: only the machine of two nodes that the runtime knows can be described.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, bail};
use serde::{Deserialize, Deserializer};
use spmem_core::node::NodeType;
use spmem_node::machine::Overrides;

use crate::size::{self, SysramLimit};

/// The embedded default, with every key and what it means.
pub const EXAMPLE: &str = include_str!("../spmem.toml");

/// What a configuration file says, defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Section `[run]`.
    pub run: Run,
    /// How much RAM the frames of node 1 may take.
    pub store_capacity: Capacity,
    /// Section `[type]`: what the kernel's nodes are for, by name.
    pub types: BTreeMap<String, NodeType>,
    /// Section `[class]`: what this machine's nodes and devices are taken for, whatever else speaks for or against it.
    pub classes: Overrides,
}

/// Section `[run]`: defaults for the options of `spm run`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Run {
    /// Key `sysram`.
    pub sysram: SysramLimit,
    /// Key `best_effort`.
    pub best_effort: bool,
}

impl Default for Run {
    fn default() -> Self {
        Self { sysram: SysramLimit::Max, best_effort: false }
    }
}

/// The least and the most that a node may hold, bytes: a few blocks of the store; what frames can be numbered.
const LEAST_CAPACITY: u64 = 4 << 20;
const MOST_CAPACITY: u64 = 16 << 40;

/// Key `capacity` of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capacity {
    /// As much as the machine has RAM.
    Auto,
    /// Bytes.
    Bytes(u64),
}

impl Capacity {
    /// The capacity in bytes on a machine with `total_bytes` of RAM.
    pub fn bytes(self, total_bytes: u64) -> u64 {
        match self {
            Self::Auto => total_bytes,
            Self::Bytes(bytes) => bytes,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run: Run::default(),
            store_capacity: Capacity::Auto,
            types: BTreeMap::new(),
            classes: Overrides::new(),
        }
    }
}

impl Config {
    /// Reads the file at `path`, or gives the embedded default for `None`.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, or holds a key or value that is not known; the message names the line.
    pub fn read(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("configuration {} cannot be read", path.display()))?;
        Self::parse(&text).with_context(|| format!("configuration {} is not valid", path.display()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let file: File = toml::from_str(text)?;
        let classes = file.class.into_iter().map(|(name, class)| (name, class.0)).collect();
        let types = file.types.into_iter().map(|(name, kind)| (name, kind.into())).collect();
        let mut config = Self { run: file.run, types, classes, ..Self::default() };
        let mut seen = Vec::new();
        for node in file.node {
            let id = node.id;
            if seen.contains(&id) {
                bail!("node {id} is described twice; each [[node]] needs an id of its own");
            }
            seen.push(id);
            match (node.kind, id) {
                (Kind::Ram, 0) if node.class.is_none() && node.guard.is_none() && node.capacity.is_none() => {}
                (Kind::Ram, 0) => bail!("node 0 is this machine's RAM: it takes no class, guard or capacity"),
                (Kind::Compressed, 1) => config.store_capacity = node.capacity.unwrap_or(Capacity::Auto),
                (Kind::Ram, _) => bail!("node {id} is of kind \"ram\", which is node 0's and no other's"),
                (Kind::Compressed, _) => {
                    bail!("node {id} is of kind \"compressed\", which is node 1's and no other's")
                }
            }
        }
        Ok(config)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    run: Run,
    #[serde(default)]
    node: Vec<Node>,
    #[serde(default, rename = "type")]
    types: BTreeMap<String, Type>,
    #[serde(default)]
    class: BTreeMap<String, AnyClass>,
}

/// What a node is for.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Type {
    Sysram,
    Spm,
}

impl From<Type> for NodeType {
    fn from(kind: Type) -> Self {
        match kind {
            Type::Sysram => Self::Sysram,
            Type::Spm => Self::Spm,
        }
    }
}

/// A class by its number.
struct AnyClass(spmem_core::node::Class);

impl<'de> Deserialize<'de> for AnyClass {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = u8::deserialize(deserializer)?;
        let class = spmem_core::node::Class::from_number(number);
        class.map(Self).ok_or_else(|| refusal(format_args!("there is no class {number}, expected 1 to 6")))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Node {
    id: u32,
    kind: Kind,
    class: Option<Class>,
    guard: Option<Guard>,
    capacity: Option<Capacity>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Ram,
    Compressed,
}

/// The class of a compressed node: 4, so there is nothing to keep.
struct Class;

impl<'de> Deserialize<'de> for Class {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u32::deserialize(deserializer)? {
            4 => Ok(Self),
            other => Err(refusal(format_args!("class {other} does not fit kind \"compressed\", expected 4"))),
        }
    }
}

/// The guard of a compressed node: hard (R17: entered by demotion only), so there is nothing to keep.
struct Guard;

impl<'de> Deserialize<'de> for Guard {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "hard" => Ok(Self),
            other => {
                Err(refusal(format_args!("guard \"{other}\" does not fit kind \"compressed\", expected \"hard\"")))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Capacity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "auto" => Ok(Self::Auto),
            text => match size::parse_bytes(text).map_err(refusal)? {
                0 => Err(refusal(size::SizeError::Zero)),
                bytes if bytes < LEAST_CAPACITY => {
                    Err(refusal(format_args!("a node of `{text}` is too small, expected at least 4M")))
                }
                bytes if bytes > MOST_CAPACITY => {
                    Err(refusal(format_args!("a node of `{text}` is too large, expected at most 16T")))
                }
                bytes => Ok(Self::Bytes(bytes)),
            },
        }
    }
}

fn refusal<E: serde::de::Error>(reason: impl fmt::Display) -> E {
    E::custom(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(text: &str) -> String {
        format!("{:#}", Config::parse(text).unwrap_err())
    }

    #[test]
    fn the_documented_example_is_the_default() {
        assert_eq!(Config::parse(EXAMPLE).unwrap(), Config::default());
        assert_eq!(Config::parse("").unwrap(), Config::default());
    }

    #[test]
    fn values_of_the_file_are_taken() {
        let text = "[run]\nsysram = \"25%\"\n[[node]]\nid = 1\nkind = \"compressed\"\ncapacity = \"2G\"\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.run.sysram, SysramLimit::Percent(25));
        assert_eq!(config.store_capacity, Capacity::Bytes(2 << 30));
    }

    #[test]
    fn classes_are_given_by_number_and_others_than_1_to_6_refused_with_their_line() {
        let config = Config::parse("[class]\nnode2 = 3\n\"dax0.0\" = 6\n").unwrap();
        let classes: Vec<(&str, u8)> =
            config.classes.iter().map(|(name, class)| (name.as_str(), class.number())).collect();
        assert_eq!(classes, [("dax0.0", 6), ("node2", 3)]);
        let reason = reason("[class]\nnode2 = 7\n");
        assert!(reason.contains("line 2") && reason.contains("no class 7"), "{reason}");
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it_its_line_and_the_valid_ones() {
        let reason = reason("[run]\nsysram = \"1G\"\nsysrma = \"1G\"\n");
        for part in ["line 3", "sysrma", "sysram", "best_effort"] {
            assert!(reason.contains(part), "{part}: {reason}");
        }
    }

    #[test]
    fn wrong_values_are_errors_that_name_the_line() {
        for (text, parts) in [
            ("[run]\nsysram = \"1Q\"\n", ["line 2", "1Q"]),
            ("[runs]\n", ["line 1", "runs"]),
            ("[[node]]\nid = 1\nkind = \"compressed\"\nclass = 3\n", ["line 4", "class 3"]),
            ("[[node]]\nid = 1\nkind = \"compressed\"\nguard = \"easy\"\n", ["line 4", "guard \"easy\""]),
            ("[[node]]\nid = 1\nkind = \"compressed\"\ncolour = 1\n", ["line 4", "colour"]),
            ("[[node]]\nid = 1\nkind = \"gold\"\n", ["line 3", "gold"]),
            ("[[node]]\nid = 2\nkind = \"compressed\"\n", ["node 2", "node 1"]),
            ("[[node]]\nid = 0\nkind = \"ram\"\n[[node]]\nid = 0\nkind = \"ram\"\n", ["node 0", "twice"]),
        ] {
            let reason = reason(text);
            assert!(parts.iter().all(|part| reason.contains(part)), "{text}: {reason}");
        }
    }
}
