//! The configuration: one TOML file, every key with a default, none needed.
//!
//! [`Config::read`] reads a file, [`Config::default`] is the embedded one, whose text ([`EXAMPLE`]) documents every key
//! and is printed by `spm run --help`. Unknown keys and values are errors that name the line and what is valid.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Deserializer};
use spmem_core::heat::{self, Source};
use spmem_core::node::{Class, NodeType};
use spmem_core::units::MAX_NODES;
use spmem_node::machine::Overrides;
use toml::Spanned;

use crate::size::{self, Slowdown, SysramLimit};

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
    /// Nodes of kind "numa", by id.
    pub numa: Vec<NumaNode>,
    /// Nodes of kind "file", by id.
    pub files: Vec<FileNode>,
    /// Nodes of kind "dax", by id.
    pub dax: Vec<DaxNode>,
    /// Section `[class]`: what this machine's nodes and devices are taken for, whatever else speaks for or against it.
    pub classes: Overrides,
}

/// Section `[run]`: defaults for the options of `spm run`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Run {
    /// Key `sysram`.
    pub sysram: SysramLimit,
    /// Key `slowdown`.
    pub slowdown: Slowdown,
    /// Key `best_effort`.
    pub best_effort: bool,
    /// Key `heat`.
    #[serde(deserialize_with = "heat_source")]
    pub heat: heat::Wish,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            sysram: SysramLimit::Max,
            slowdown: Slowdown::default(),
            best_effort: false,
            heat: heat::Wish::Auto,
        }
    }
}

/// The least and the most that a node may hold, bytes: a few blocks of the store; what frames can be numbered.
const LEAST_CAPACITY: u64 = 4 << 20;
const MOST_CAPACITY: u64 = 16 << 40;

/// A `[[node]]` of kind "file".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileNode {
    /// Key `id`.
    pub id: u16,
    /// Key `path`.
    pub path: PathBuf,
    /// Key `capacity`: bytes that a file is made with.
    pub bytes: u64,
    /// Key `class`.
    pub class: Class,
    /// Key `write_fence`.
    pub is_fenced: bool,
}

/// A `[[node]]` of kind "dax".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaxNode {
    /// Key `id`.
    pub id: u16,
    /// Key `path`: of the device.
    pub path: PathBuf,
    /// Key `capacity`: what a run may have there.
    pub capacity: Capacity,
    /// Key `class`; what the machine tells if it is not given.
    pub class: Option<Class>,
}

/// A `[[node]]` of kind "numa".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaNode {
    /// Key `id`.
    pub id: u16,
    /// Key `node`: the kernel's number.
    pub node: u16,
    /// Key `capacity`: what a run may have there.
    pub capacity: Capacity,
    /// Key `class`; what the machine tells if it is not given.
    pub class: Option<Class>,
    /// Key `write_fence`.
    pub is_fenced: bool,
}

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
            numa: Vec::new(),
            files: Vec::new(),
            dax: Vec::new(),
            classes: Overrides::new(),
        }
    }
}

/// The text of a file that a person wrote. One without an end is refused, and so is what nobody writes.
///
/// # Errors
/// It cannot be read, is longer than a mebibyte, or is not UTF-8.
pub fn read_description(path: &Path) -> io::Result<String> {
    const LIMIT: u64 = 1 << 20;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(LIMIT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LIMIT {
        return Err(io::Error::other("it is longer than 1 MiB"));
    }
    String::from_utf8(bytes).map_err(io::Error::other)
}

impl Config {
    /// Reads the file at `path`, or gives the embedded default for `None`.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, or holds a key or value that is not known; the message names the line.
    pub fn read(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text =
            read_description(path).with_context(|| format!("configuration {} cannot be read", path.display()))?;
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
                (Kind::Ram, 0) if node.has_only_a_kind() => {}
                (Kind::Ram, 0) => bail!("node 0 is this machine's RAM: it takes no class, guard or capacity"),
                (Kind::Compressed, 1) => config.store_capacity = node.compressed(text)?,
                (Kind::File, 2..) if id < u32::from(MAX_NODES) => config.files.push(node.file(text)?),
                (Kind::Numa, 2..) if id < u32::from(MAX_NODES) => {
                    let node = node.numa(text)?;
                    config.declare(&node)?;
                    config.numa.push(node);
                }
                (Kind::Dax, 2..) if id < u32::from(MAX_NODES) => config.dax.push(node.dax(text)?),
                (Kind::Ram, _) => bail!("node {id} is of kind \"ram\", which is node 0's and no other's"),
                (Kind::Compressed, _) => {
                    bail!("node {id} is of kind \"compressed\", which is node 1's and no other's")
                }
                (Kind::File | Kind::Numa | Kind::Dax, _) => {
                    let most = MAX_NODES - 1;
                    bail!("node {id} is of kind \"file\", \"numa\" or \"dax\", expected an id of 2 to {most}")
                }
            }
        }
        config.files.sort_by_key(|file| file.id);
        config.numa.sort_by_key(|numa| numa.id);
        config.dax.sort_by_key(|dax| dax.id);
        Ok(config)
    }

    /// A node that runs place pages on is spm: walls keep programs off it.
    fn declare(&mut self, numa: &NumaNode) -> anyhow::Result<()> {
        let name = format!("node{}", numa.node);
        if self.types.get(&name) == Some(&NodeType::Sysram) {
            bail!("node {} is of kind \"numa\", so {name} is spm, and [type] says sysram", numa.id);
        }
        if self.numa.iter().any(|other| other.node == numa.node) {
            bail!("node {} is of kind \"numa\" and of {name}, as another one is", numa.id);
        }
        self.types.insert(name, NodeType::Spm);
        Ok(())
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
struct AnyClass(Class);

impl<'de> Deserialize<'de> for AnyClass {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = u8::deserialize(deserializer)?;
        let class = Class::from_number(number);
        class.map(Self).ok_or_else(|| refusal(format_args!("there is no class {number}, expected 1 to 6")))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Node {
    id: u32,
    kind: Kind,
    class: Option<Spanned<u32>>,
    guard: Option<Spanned<String>>,
    capacity: Option<Spanned<Capacity>>,
    path: Option<Spanned<PathBuf>>,
    write_fence: Option<Spanned<bool>>,
    node: Option<Spanned<u16>>,
    overwrite: Option<Spanned<bool>>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Ram,
    Compressed,
    File,
    Numa,
    Dax,
}

impl Node {
    const fn has_only_a_kind(&self) -> bool {
        let has_limits = self.class.is_some() || self.guard.is_some() || self.capacity.is_some();
        let is_elsewhere = self.path.is_some() || self.node.is_some() || self.overwrite.is_some();
        !has_limits && !is_elsewhere && self.write_fence.is_none()
    }

    /// A compressed node is of class 4 and its guard is hard (R17: entered by demotion only): there is nothing to keep.
    fn compressed(self, text: &str) -> anyhow::Result<Capacity> {
        if let Some(class) = self.class.as_ref().filter(|class| *class.get_ref() != 4) {
            bail!("{}: class {} does not fit kind \"compressed\", expected 4", line(text, class), class.get_ref());
        }
        self.check_guard(text, "compressed")?;
        if let Some(path) = &self.path {
            bail!("{}: a path does not fit kind \"compressed\"", line(text, path));
        }
        self.check_no_kernel_node(text, "compressed")?;
        self.check_no_overwrite(text, "compressed")?;
        if let Some(fence) = &self.write_fence {
            bail!("{}: kind \"compressed\" is always write-fenced", line(text, fence));
        }
        Ok(self.capacity.map_or(Capacity::Auto, Spanned::into_inner))
    }

    fn file(self, text: &str) -> anyhow::Result<FileNode> {
        let id = self.id;
        self.check_guard(text, "file")?;
        self.check_no_kernel_node(text, "file")?;
        self.check_no_overwrite(text, "file")?;
        let class = match &self.class {
            None => Class::Shared,
            Some(number) => {
                let fits = class_of(number).filter(|class| *class != Class::Featured);
                fits.with_context(|| {
                    format!(
                        "{}: class {} does not fit kind \"file\", expected 1, 2, 3, 5 or 6",
                        line(text, number),
                        number.get_ref()
                    )
                })?
            }
        };
        let bytes = match self.capacity.map(Spanned::into_inner) {
            Some(Capacity::Bytes(bytes)) => bytes,
            Some(Capacity::Auto) | None => bail!("node {id} is of kind \"file\": it needs a capacity, a size"),
        };
        let path = self.path.with_context(|| format!("node {id} is of kind \"file\": it needs a path"))?;
        if path.get_ref().file_name().is_none() {
            bail!("{}: this path names no file; /var/tmp/node{id} would", line(text, &path));
        }
        let id = u16::try_from(id).context("an id is below 1024")?;
        let is_fenced = self.write_fence.is_some_and(Spanned::into_inner);
        Ok(FileNode { id, path: path.into_inner(), bytes, class, is_fenced })
    }

    /// A node that the kernel has: what is asked for here is for runs.
    fn numa(self, text: &str) -> anyhow::Result<NumaNode> {
        self.check_guard(text, "numa")?;
        self.check_no_overwrite(text, "numa")?;
        if let Some(path) = &self.path {
            bail!("{}: a path does not fit kind \"numa\"", line(text, path));
        }
        let class = self.class.as_ref().map(|number| {
            let fits = class_of(number);
            fits.with_context(|| format!("{}: there is no class {}", line(text, number), number.get_ref()))
        });
        let id = u16::try_from(self.id).context("an id is below 1024")?;
        Ok(NumaNode {
            id,
            node: self.node.map_or(id, Spanned::into_inner),
            capacity: self.capacity.map_or(Capacity::Auto, Spanned::into_inner),
            class: class.transpose()?,
            is_fenced: self.write_fence.is_some_and(Spanned::into_inner),
        })
    }

    /// A device that runs copy pages to: what is on it is lost, so that is to be said.
    fn dax(self, text: &str) -> anyhow::Result<DaxNode> {
        let id = u16::try_from(self.id).context("an id is below 1024")?;
        self.check_guard(text, "dax")?;
        self.check_no_kernel_node(text, "dax")?;
        if let Some(fence) = &self.write_fence {
            bail!("{}: kind \"dax\" is always write-fenced", line(text, fence));
        }
        let class = self.class.as_ref().map(|number| {
            let fits = class_of(number).filter(|class| *class != Class::Featured);
            fits.with_context(|| {
                let (line, number) = (line(text, number), number.get_ref());
                format!("{line}: class {number} does not fit kind \"dax\", expected 1, 2, 3, 5 or 6")
            })
        });
        let class = class.transpose()?;
        let path = self.path.with_context(|| format!("node {id} is of kind \"dax\": it needs a path"))?;
        if !self.overwrite.is_some_and(Spanned::into_inner) {
            let device = path.get_ref().display();
            bail!("node {id} is of kind \"dax\": runs write over what is on {device}; overwrite = true lets them");
        }
        let capacity = self.capacity.map_or(Capacity::Auto, Spanned::into_inner);
        Ok(DaxNode { id, path: path.into_inner(), capacity, class })
    }

    fn check_no_overwrite(&self, text: &str, kind: &str) -> anyhow::Result<()> {
        match &self.overwrite {
            None => Ok(()),
            Some(overwrite) => bail!("{}: kind \"{kind}\" overwrites nothing", line(text, overwrite)),
        }
    }

    fn check_no_kernel_node(&self, text: &str, kind: &str) -> anyhow::Result<()> {
        match &self.node {
            None => Ok(()),
            Some(node) => bail!("{}: a node of the kernel's does not fit kind \"{kind}\"", line(text, node)),
        }
    }

    fn check_guard(&self, text: &str, kind: &str) -> anyhow::Result<()> {
        match self.guard.as_ref().filter(|guard| guard.get_ref() != "hard") {
            None => Ok(()),
            Some(guard) => bail!(
                "{}: guard \"{}\" does not fit kind \"{kind}\", expected \"hard\"",
                line(text, guard),
                guard.get_ref()
            ),
        }
    }
}

fn class_of(number: &Spanned<u32>) -> Option<Class> {
    u8::try_from(*number.get_ref()).ok().and_then(Class::from_number)
}

/// Where a value stands.
fn line<T>(text: &str, value: &Spanned<T>) -> String {
    let before = text.get(..value.span().start).unwrap_or_default();
    format!("line {}", before.matches('\n').count() + 1)
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

fn heat_source<'de, D: Deserializer<'de>>(deserializer: D) -> Result<heat::Wish, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "auto" {
        return Ok(heat::Wish::Auto);
    }
    let source = Source::ALL.into_iter().find(|source| source.name() == text);
    source.map(heat::Wish::Only).ok_or_else(|| {
        let names = Source::ALL.map(|source| format!("\"{source}\"")).join(", ");
        refusal(format_args!("there is no heat `{text}`, expected \"auto\", {names}"))
    })
}

fn refusal<E: serde::de::Error>(reason: impl fmt::Display) -> E {
    E::custom(reason)
}

#[cfg(test)]
mod tests;
