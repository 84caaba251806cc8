//! What machine the guest is, and what a program in it must find: one TOML file each, in `topologies/`.
//!
//! [`Topology::load`] reads and checks one, [`Topology::qemu_args`] says it to QEMU. The rest of it, a [`Mode`] above
//! all, is what [`vm_facts`](crate::programs) holds against the guest's /sys. Takes no lock.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

/// A file of `topologies/`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Topology {
    /// The file's name without its extension.
    #[serde(skip)]
    pub(crate) name: String,
    /// One line for a list.
    pub(crate) summary: String,
    /// QEMU's `-M`.
    #[serde(default = "default_machine")]
    machine: String,
    /// Whether room for memory beyond that of the nodes is needed: devices that the firmware maps.
    #[serde(default)]
    can_grow: bool,
    /// Memory of devices that can outlive a guest.
    #[serde(default, rename = "medium")]
    media: Vec<Medium>,
    /// Further words for QEMU: the devices.
    #[serde(default)]
    qemu: Vec<String>,
    /// Further words for the kernel's command line.
    #[serde(default)]
    pub(super) append: String,
    /// Loaded before `setup`.
    #[serde(default)]
    pub(super) modules: Vec<String>,
    /// Shell text, run in the guest in every mode; the words are those of `src/vm/setup.sh`.
    #[serde(default)]
    setup: String,
    /// Nodes that the firmware announces, in order of their numbers.
    #[serde(rename = "node")]
    nodes: Vec<Node>,
    /// Distances between them as in SLIT; none where the kernel's own are kept.
    #[serde(default)]
    distances: Vec<Vec<u8>>,
    /// HMAT rows; none where there is no HMAT.
    #[serde(default)]
    pub(crate) access: Vec<Access>,
    /// Ranges that the firmware keeps for special use, MiB in all.
    #[serde(default)]
    pub(crate) soft_reserved_mib: u64,
    /// What can be made of the devices; the first one is made when none is asked for.
    #[serde(rename = "mode")]
    pub(crate) modes: Vec<Mode>,
}

/// A node as the firmware announces it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Node {
    /// None: a device brings it.
    mib: Option<u32>,
    #[serde(default)]
    cpus: u32,
    /// For a node without processors: the node whose processors it belongs to.
    initiator: Option<u32>,
}

/// Memory behind a device: QEMU's own, or a file where it is to be kept.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Medium {
    /// As `qemu` names it, and the file's name.
    id: String,
    mib: u32,
}

/// What a node with processors sees of each node, in order.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Access {
    /// The initiator.
    pub(crate) from: u32,
    /// Read and write latency, ns.
    pub(crate) latency_ns: Vec<u32>,
    /// Read and write bandwidth, GiB a second.
    pub(crate) bandwidth_gib: Vec<u32>,
}

/// A way to use the devices, and what is there then.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mode {
    pub(crate) name: String,
    /// Shell text, run after the topology's own.
    #[serde(default)]
    setup: String,
    /// The same where a guest has made the devices before; none where nothing outlives it.
    pub(crate) setup_again: Option<String>,
    /// Exactly the nodes that have memory.
    pub(crate) nodes: Vec<NodeFact>,
    /// Whether the processors' nodes are left open.
    #[serde(default)]
    pub(crate) is_any_cpus: bool,
    /// Exactly the dax devices.
    #[serde(default)]
    pub(crate) dax: Vec<DaxFact>,
    /// Exactly the pmem block devices.
    #[serde(default)]
    pub(crate) pmem: Vec<PmemFact>,
    /// Exactly the CXL memory devices and regions.
    #[serde(default)]
    pub(crate) cxl: Vec<String>,
    /// Whether `spm nodes --measure` is tried, which takes a while in an emulator.
    #[serde(default)]
    pub(crate) is_measured: bool,
}

/// A node with memory.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NodeFact {
    pub(crate) id: u32,
    /// Before the kernel takes its share.
    pub(crate) mib: u64,
    #[serde(default)]
    pub(crate) cpus: usize,
    /// What spmem takes it for.
    #[serde(default = "plain")]
    pub(crate) class: u8,
}

/// A dax device.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DaxFact {
    pub(crate) name: String,
    /// Before labels and metadata take theirs.
    pub(crate) mib: u64,
    /// The node its memory would be; not checked when absent.
    pub(crate) node: Option<u32>,
    /// `device_dax` or `kmem`.
    pub(crate) driver: String,
    /// What mappings are multiples of.
    #[serde(default = "huge_page_mib")]
    pub(crate) align_mib: u64,
    /// What spmem takes it for.
    #[serde(default = "plain")]
    pub(crate) class: u8,
}

/// A pmem block device.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PmemFact {
    pub(crate) name: String,
    /// Before labels and metadata take theirs.
    pub(crate) mib: u64,
    /// Whether a file system on it is mounted with `dax`.
    #[serde(default)]
    pub(crate) is_mounted: bool,
}

const fn plain() -> u8 {
    1
}

const fn huge_page_mib() -> u64 {
    2
}

fn default_machine() -> String {
    "q35,hmat=on".to_owned()
}

impl Topology {
    /// Reads the one called `name`.
    ///
    /// # Errors
    /// There is none, or its file is wrong; the message says which there are, or what is wrong.
    pub(crate) fn load(name: &str) -> anyhow::Result<Self> {
        let file = folder().join(format!("{name}.toml"));
        let names = names()?;
        ensure!(
            names.iter().any(|known| known == name),
            "there is no topology `{name}`; there are: {}",
            names.join(", ")
        );
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        Self::parse(name, &text).with_context(|| format!("the topology {}", file.display()))
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// The folder cannot be read, or a file in it is wrong.
    pub(crate) fn load_all() -> anyhow::Result<Vec<Self>> {
        names()?.iter().map(|name| Self::load(name)).collect()
    }

    fn parse(name: &str, text: &str) -> anyhow::Result<Self> {
        let mut topology: Self = toml::from_str(text)?;
        name.clone_into(&mut topology.name);
        topology.check()?;
        Ok(topology)
    }

    /// The mode called `name`, or the first.
    ///
    /// # Errors
    /// There is none of that name; the message says which there are.
    pub(crate) fn mode(&self, name: Option<&str>) -> anyhow::Result<&Mode> {
        let Some(name) = name else { return Ok(&self.modes[0]) };
        self.modes
            .iter()
            .find(|mode| mode.name == name)
            .with_context(|| format!("{} has no mode `{name}`; it has: {}", self.name, self.mode_names()))
    }

    /// How far one node is from another; none where the table has no entry. Without a table all are equally near.
    pub(crate) fn distance(&self, from: u32, to: u32) -> Option<u8> {
        const LOCAL: u8 = 10;
        if self.distances.is_empty() {
            return Some(LOCAL);
        }
        self.distances.get(from as usize)?.get(to as usize).copied()
    }

    /// Its modes, for a person.
    pub(crate) fn mode_names(&self) -> String {
        self.modes.iter().map(|mode| mode.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// What is run in the guest before the command. `kept` is the folder where media are kept, if they are.
    pub(super) fn setup_for(&self, mode: &Mode, kept: Option<&Path>) -> String {
        let is_made = |folder: &&Path| self.media.iter().any(|medium| folder.join(&medium.id).exists());
        let again = kept.filter(is_made).and(mode.setup_again.as_ref());
        format!("{}\n{}\n", self.setup, again.unwrap_or(&mode.setup))
    }

    /// What cannot be said to QEMU, or what it would refuse with a message that names no cause.
    fn check(&self) -> anyhow::Result<()> {
        let count = self.nodes.len();
        ensure!(!self.modes.is_empty(), "it has no [[mode]]");
        ensure!(self.nodes.iter().any(|node| node.cpus > 0), "no node has processors (`cpus`)");
        ensure!(self.nodes[0].mib.is_some(), "node 0 has no memory (`mib`)");
        for (id, node) in self.nodes.iter().enumerate() {
            let Some(initiator) = node.initiator else { continue };
            let has_cpus = self.nodes.get(initiator as usize).is_some_and(|node| node.cpus > 0);
            ensure!(has_cpus, "node {id}: its initiator, node {initiator}, has no processors");
        }
        if !self.distances.is_empty() {
            let is_square = self.distances.len() == count && self.distances.iter().all(|row| row.len() == count);
            ensure!(is_square, "`distances` must be {count} rows of {count} numbers, as there are {count} nodes");
            for (from, to) in (0..count).flat_map(|from| (0..=from).map(move |to| (from, to))) {
                let (there, back) = (self.distances[from][to], self.distances[to][from]);
                // The kernel drops the whole table otherwise.
                ensure!(there == back, "distance {from} to {to} is {there}, and back {back}: make them equal");
                ensure!((there == 10) == (from == to), "distance {from} to {to} is {there}: 10 is a node's own");
                ensure!(there >= 10, "distance {from} to {to} is {there}: less than a node's own, 10");
            }
        }
        for row in &self.access {
            let is_full = row.latency_ns.len() == count && row.bandwidth_gib.len() == count;
            ensure!(is_full, "[[access]] from {}: {count} latencies and bandwidths are needed", row.from);
            let has_cpus = self.nodes.get(row.from as usize).is_some_and(|node| node.cpus > 0);
            ensure!(has_cpus, "[[access]] from {}: that node has no processors", row.from);
        }
        let is_kept = self.modes.iter().any(|mode| mode.setup_again.is_some());
        ensure!(!is_kept || !self.media.is_empty(), "`setup_again` needs a [[medium]] that outlives the guest");
        if !self.access.is_empty() && !self.machine.contains("hmat=on") {
            bail!("[[access]] needs `hmat=on` in `machine`");
        }
        Ok(())
    }

    /// Machine, processors, memory and devices in QEMU's words; media are files in `kept`, if there is such a folder.
    pub(super) fn qemu_args(&self, kept: Option<&str>) -> Vec<String> {
        let mut args = Args::default();
        let total_mib: u32 = self.nodes.iter().filter_map(|node| node.mib).sum();
        let cpus: u32 = self.nodes.iter().map(|node| node.cpus).sum();
        args.push("-M", self.machine.clone());
        let room = if self.can_grow { ",maxmem=4G,slots=4" } else { "" };
        args.push("-m", format!("{total_mib}M{room}"));
        args.push("-smp", format!("{cpus},sockets={cpus},cores=1,threads=1"));
        let mut socket = 0;
        for (id, node) in self.nodes.iter().enumerate() {
            let mut words = format!("node,nodeid={id}");
            if let Some(mib) = node.mib {
                args.push("-object", format!("memory-backend-ram,id=m{id},size={mib}M"));
                words += &format!(",memdev=m{id}");
            }
            if let Some(initiator) = node.initiator {
                words += &format!(",initiator={initiator}");
            }
            args.push("-numa", words);
            for _ in 0..node.cpus {
                args.push("-numa", format!("cpu,node-id={id},socket-id={socket}"));
                socket += 1;
            }
        }
        for (from, row) in self.distances.iter().enumerate() {
            for (to, distance) in row.iter().enumerate().skip(from + 1) {
                args.push("-numa", format!("dist,src={from},dst={to},val={distance}"));
            }
        }
        for row in &self.access {
            for (to, (latency, bandwidth)) in row.latency_ns.iter().zip(&row.bandwidth_gib).enumerate() {
                let pair = format!("hmat-lb,initiator={},target={to},hierarchy=memory,data-type=access", row.from);
                args.push("-numa", format!("{pair}-latency,latency={latency}"));
                args.push("-numa", format!("{pair}-bandwidth,bandwidth={bandwidth}G"));
            }
        }
        for Medium { id, mib } in &self.media {
            let kind = match kept {
                Some(folder) => format!("file,mem-path={folder}/{id}"),
                None => "ram".to_owned(),
            };
            args.push("-object", format!("memory-backend-{kind},id={id},share=on,size={mib}M"));
        }
        args.0.extend(self.qemu.iter().cloned());
        args.0
    }
}

#[derive(Default)]
struct Args(Vec<String>);

impl Args {
    fn push(&mut self, option: &str, value: String) {
        self.0.extend([option.to_owned(), value]);
    }
}

fn folder() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/topologies").into()
}

fn names() -> anyhow::Result<Vec<String>> {
    let folder = folder();
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.strip_suffix(".toml")?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"
        summary = "two nodes"
        distances = [[10, 21], [21, 10]]
        [[node]]
        mib = 64
        cpus = 1
        [[node]]
        mib = 32
        initiator = 0
        [[access]]
        from = 0
        latency_ns = [80, 300]
        bandwidth_gib = [100, 20]
        [[mode]]
        name = "plain"
        nodes = [{ id = 0, mib = 64, cpus = 1 }, { id = 1, mib = 32 }]
    "#;

    fn refusal(from: &str, to: &str) -> String {
        assert!(SMALL.contains(from), "{from}");
        format!("{:#}", Topology::parse("small", &SMALL.replace(from, to)).unwrap_err())
    }

    #[test]
    fn every_topology_of_the_tree_is_right() {
        let all = Topology::load_all().unwrap();
        assert_eq!(all.len(), 9);
        assert!(all.iter().all(|topology| !topology.summary.is_empty()));
    }

    #[test]
    fn nodes_distances_and_latencies_are_said_to_qemu() {
        let line = Topology::parse("small", SMALL).unwrap().qemu_args(None).join(" ");
        assert!(line.starts_with("-M q35,hmat=on -m 96M -smp 1,sockets=1,cores=1,threads=1"), "{line}");
        assert!(line.contains("-numa node,nodeid=1,memdev=m1,initiator=0"), "{line}");
        assert!(line.contains("-numa dist,src=0,dst=1,val=21"), "{line}");
        assert!(
            line.contains("initiator=0,target=1,hierarchy=memory,data-type=access-latency,latency=300"),
            "{line}"
        );
    }

    #[test]
    fn a_medium_that_is_kept_is_a_file() {
        let text = SMALL.replace("[[mode]]", "[[medium]]\nid = \"nv\"\nmib = 8\n[[mode]]");
        let topology = Topology::parse("small", &text).unwrap();
        let line = |kept| topology.qemu_args(kept).join(" ");
        assert!(line(None).contains("-object memory-backend-ram,id=nv,share=on,size=8M"), "{}", line(None));
        let kept = line(Some("/kept"));
        assert!(kept.contains("memory-backend-file,mem-path=/kept/nv,id=nv,share=on,size=8M"), "{kept}");
    }

    #[test]
    fn a_wrong_file_is_refused_with_the_reason() {
        assert!(refusal("[[10, 21], [21, 10]]", "[[10, 21], [20, 10]]").contains("make them equal"));
        assert!(refusal("[[10, 21], [21, 10]]", "[[10, 21]]").contains("2 rows of 2 numbers"));
        assert!(refusal("initiator = 0", "initiator = 1").contains("has no processors"));
        assert!(refusal("[80, 300]", "[80]").contains("2 latencies"));
        assert!(refusal("summary", "sumary").contains("unknown field"));
        let again = "name = \"plain\"\n        setup_again = \"true\"";
        assert!(refusal("name = \"plain\"", again).contains("[[medium]]"));
    }

    #[test]
    fn an_unknown_name_or_mode_is_refused_with_those_that_exist() {
        let refused = Topology::load("numa9").unwrap_err().to_string();
        assert!(refused.contains("`numa9`") && refused.contains("numa4"), "{refused}");
        let cxl = Topology::load("cxl").unwrap();
        assert!(cxl.mode(Some("fsdax")).unwrap_err().to_string().contains("devdax, system-ram, none"));
        assert_eq!(cxl.mode(None).unwrap().name, "devdax");
    }
}
