//! `cargo xtask bench wall`: what a check of the wall costs, beside working the answer out each time.
//!
//! Two machines: 2 nodes and a domain below the root; 1024 nodes and a domain 16 deep, a mask at each level. Three ways
//! to the same answer: a pass that is kept (the hot path of an allocation), a request that is admitted anew, and a walk
//! that intersects the masks of all ancestors, which is what a check costs without any cache.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Context;
use spmem_core::grant::{Rights, Terms};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::Policy;
use spmem_core::registry::Registry;
use spmem_core::units::{Bytes, DomainId, MAX_NODES, NodeId};
use spmem_core::wall::Request;

/// `--rounds`, and how much is timed at once.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// Rounds; the least time of them is printed.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Thousand checks timed at once.
    #[arg(long, default_value_t = 200)]
    thousands: usize,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    println!("a check of the wall, ns (least of {} rounds)\n", options.rounds);
    println!(
        "{:>5}  {:>6}  {:>9}  {:>8}  {:>8}  {:>12}",
        "nodes", "levels", "kept pass", "admitted", "walked", "kept/walked"
    );
    for (nodes, levels) in [(2, 1), (64, 4), (MAX_NODES, 16)] {
        let machine = Machine::new(nodes, levels)?;
        let [kept, admitted, walked] = machine.measure(options)?;
        println!("{nodes:>5}  {levels:>6}  {kept:>9.2}  {admitted:>8.1}  {walked:>8.1}  {:>12.3}", kept / walked);
    }
    Ok(())
}

struct Machine {
    registry: Registry,
    deepest: DomainId,
    /// Of the domains, the root's first.
    masks: Vec<NodeMask>,
    last: NodeId,
    grant: spmem_core::grant::Grant,
}

impl Machine {
    /// A machine whose odd nodes are SPM, all open to one grant, and a chain of domains of which each leaves out a node.
    fn new(nodes: u16, levels: usize) -> anyhow::Result<Self> {
        let mut registry = Registry::new();
        let mut owners = Vec::new();
        for node in 0..nodes {
            let is_spm = node % 2 == 1;
            let spec = NodeSpec {
                node_type: if is_spm { NodeType::Spm } else { NodeType::Sysram },
                class: Class::Plain,
                services: Services::empty(),
                guard: Guard::Hard,
                owner: "bench".into(),
            };
            let owner = registry.register(NodeId::new(node)?, spec)?.owner;
            if is_spm {
                owners.push(owner);
            }
        }
        let shown: Vec<_> = owners.iter().collect();
        let grant = registry.grant(&shown, Terms::new(Rights::ALLOC, Bytes::mib(1)))?;
        let mut masks = vec![NodeMask::ALL];
        let mut deepest = DomainId::ROOT;
        for level in 0..levels {
            deepest = registry.create_domain(deepest, "below")?;
            let mut mems = *registry.present();
            mems.remove(NodeId::new(u16::try_from(level)? % nodes)?);
            registry.set_mems(deepest, mems)?;
            masks.push(mems);
        }
        let last = NodeId::new(nodes - 1)?;
        Ok(Self { registry, deepest, masks, last, grant })
    }

    /// The three ways, ns a check each.
    fn measure(&self, options: &Options) -> anyhow::Result<[f64; 3]> {
        let (registry, last) = (&self.registry, self.last);
        let shown = [&self.grant];
        let request = Request { policy: Policy::bind(NodeMask::ALL), ..Request::on(self.deepest, last, &shown) };
        let mut pass = registry.admit(&request).context("the machine lets its own request through")?;
        let walked = self.walk();
        anyhow::ensure!(*pass.mask() == walked, "both ways must lead to the same nodes");
        let kept = least(options, options.thousands * 1000, || {
            let registry = black_box(registry);
            black_box(&mut pass).allowed(registry).is_ok_and(|mask| mask.contains(black_box(last)))
        });
        let admitted = least(options, options.thousands * 10, || {
            registry.admit(black_box(&request)).is_ok_and(|pass| pass.mask().contains(last))
        });
        let walked = least(options, options.thousands * 10, || self.walk().contains(black_box(last)));
        Ok([kept, admitted, walked])
    }

    /// R4 and R6 without anything kept.
    fn walk(&self) -> NodeMask {
        let effective = black_box(&self.masks).iter().fold(*self.registry.present(), |above, mems| {
            let limited = mems.intersection(&above);
            if limited.is_empty() { above } else { limited }
        });
        let open = self.registry.sysram().union(self.registry.spm());
        NodeMask::ALL.intersection(&effective).intersection(&open)
    }
}

/// The least time of a check over all rounds, ns.
fn least(options: &Options, checks: usize, mut check: impl FnMut() -> bool) -> f64 {
    let round = |check: &mut dyn FnMut() -> bool| {
        let start = Instant::now();
        for _ in 0..checks {
            assert!(check(), "the node is open");
        }
        start.elapsed().as_secs_f64() * 1e9 / checks as f64
    };
    // A call through a pointer is part of every figure alike.
    (0..options.rounds.max(1)).map(|_| round(&mut check)).fold(f64::INFINITY, f64::min)
}
