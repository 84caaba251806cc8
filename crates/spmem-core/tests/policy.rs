//! R2, R6, R8-R10: memory policies against what Linux answers and what the rules add, cell by cell.
//!
//! `docs/policies.md` is made of the same cells. Where it differs from what the code answers, this fails;
//! `SPMEM_WRITE_DOCS=1` writes it anew.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fmt::Write as _;

use proptest::prelude::*;
use spmem_core::frames::Metadata;
use spmem_core::grant::{Grant, GrantError, Rights, Terms};
use spmem_core::mm::{AllocError, MemoryManager};
use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::{
    Bound, Context, Errno, Flags, Mode, Policy, PolicyError, Turns, migrate_targets, move_target, node_of,
};
use spmem_core::units::{DomainId, FrameCount, NodeId, Order};
use spmem_core::wall::Request;
use spmem_core::zero::Initial;

type Set = BTreeSet<u16>;

const DOCS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/policies.md");

const NAMING: [Mode; 5] =
    [Mode::Bind, Mode::Preferred, Mode::PreferredMany, Mode::Interleave, Mode::WeightedInterleave];

fn id(node: u16) -> NodeId {
    NodeId::new(node).unwrap()
}

fn mask(set: &Set) -> NodeMask {
    set.iter().map(|&node| id(node)).collect()
}

fn set(nodes: &[u16]) -> Set {
    nodes.iter().copied().collect()
}

/// The machine of the table, a node of each kind.
const SYSRAM: u16 = 0;
const SECOND: u16 = 1;
const OUTSIDE: u16 = 2;
const HARD: u16 = 3;
const GRANTED: u16 = 4;
const EASY: u16 = 5;
const ABSENT: u16 = 6;

fn table_context() -> Context {
    Context {
        effective: mask(&set(&[SYSRAM, SECOND, HARD, GRANTED, EASY])),
        sysram: mask(&set(&[SYSRAM, SECOND, OUTSIDE])),
        granted: mask(&set(&[GRANTED])),
        easy: mask(&set(&[EASY])),
    }
}

fn present() -> NodeMask {
    mask(&(0..ABSENT).collect())
}

fn kind(node: u16) -> &'static str {
    match node {
        SYSRAM | SECOND => "sysram",
        OUTSIDE => "sysram outside the domain",
        HARD => "SPM, hard",
        GRANTED => "SPM, hard, with a grant",
        EASY => "SPM, easy",
        _ => "absent",
    }
}

/// What set_mempolicy(2) and mbind(2) do with these nodes, by the rules, one node at a time.
fn expected(mode: Mode, named: &Set) -> Option<Set> {
    let is_open = |node: u16| match node {
        SYSRAM | SECOND | GRANTED => true,
        EASY => mode == Mode::Bind,
        _ => false,
    };
    let open: Set = named.iter().copied().filter(|&node| is_open(node)).collect();
    let chosen = if mode == Mode::Preferred { open.into_iter().take(1).collect() } else { open };
    (!chosen.is_empty()).then_some(chosen)
}

fn bind(mode: Mode, flags: Flags, named: &Set) -> Option<Bound> {
    Policy::new(mode, flags, mask(named)).unwrap().bind_to(&table_context())
}

fn cell(bound: Option<Bound>) -> String {
    bound.map_or_else(|| Errno::Einval.name().to_owned(), |bound| bound.nodes().to_string())
}

fn named_sets() -> Vec<Set> {
    let kinds = [SYSRAM, OUTSIDE, HARD, GRANTED, EASY, ABSENT];
    let alone = kinds.iter().map(|&node| set(&[node]));
    let mixed = kinds[1..].iter().map(|&node| set(&[SECOND, node]));
    let all: Set = (0..=ABSENT).collect();
    alone.chain(mixed).chain([all]).collect()
}

fn row(text: &mut String, cells: impl IntoIterator<Item = String>) {
    let cells: Vec<String> = cells.into_iter().collect();
    writeln!(text, "| {} |", cells.join(" | ")).unwrap();
}

fn head(text: &mut String, first: &str, columns: &[&str]) {
    row(text, [first].iter().chain(columns).map(|&cell| cell.to_owned()));
    row(text, vec!["---".to_owned(); columns.len() + 1]);
}

fn document() -> String {
    let mut text = String::from(
        "# Memory policies\n\n\
         What spmem answers to each call, mode and kind of node. Ordinary nodes are answered as Linux answers\n\
         (mempolicy(7), mm/mempolicy.c of 6.12): where a table names sysram and absent nodes only, it is Linux's. SPM nodes\n\
         are the addition (R6, R8, R9). Made and checked by `crates/spmem-core/tests/policy.rs`.\n\n\
         The machine of the tables: nodes 0 and 1 are sysram, node 2 is sysram outside the task's domain, node 3 is SPM with\n\
         a hard guard, node 4 likewise but a grant with ALLOC is shown, node 5 is SPM with an easy guard\n\
         (and so with the service USER_NUMA), node 6 is absent.\n\n\
         ## set_mempolicy(2) and mbind(2)\n\n\
         The nodes that the policy then chooses from; with MPOL_F_STATIC_NODES the same. All but bind go on to the domain's\n\
         default when these are full: preferred to what is nearest to its node, preferred-many to what is nearest to its home or\n\
         the local node. Both interleaving modes go on to what is nearest to the node whose turn it is, named or not.\n\
         MPOL_F_NUMA_BALANCING, which bind and preferred-many take (Linux 6.9), changes no cell: the kernel then brings pages\n\
         nearer to who uses them, to another of the nodes chosen.\n\n",
    );
    head(&mut text, "nodes named", &NAMING.map(Mode::name));
    for named in named_sets() {
        let kinds: Vec<&str> = named.iter().map(|&node| kind(node)).collect();
        let label = if named.len() > 2 { "all of them".to_owned() } else { kinds.join(" and ") };
        let cells = NAMING.map(|mode| cell(bind(mode, Flags::empty(), &named)));
        row(&mut text, std::iter::once(format!("{} ({label})", mask(&named))).chain(cells));
    }
    text += "\n## Who pays on an SPM node\n\n\
         What a page costs on a node that the policy names, where a grant with ALLOC is shown. Strict bind to an easy node needs\n\
         none (R9): it goes on without charge where the grant's quota is used up.\n\n";
    head(&mut text, "node", &PAYING);
    for (guard, mode) in payments() {
        let label = format!("{guard} guard, {}", mode.name());
        row(&mut text, std::iter::once(label).chain(payment_cells(guard, mode)));
    }
    text += "\n## MPOL_F_RELATIVE_NODES\n\nNumbers count the domain's sysram nodes, here 0 and 1; they never lead to an SPM node.\n\n";
    head(&mut text, "numbers", &NAMING.map(Mode::name));
    for named in [&[0][..], &[1], &[2], &[3], &[0, 3], &[0, 1, 2]].map(set) {
        let cells = NAMING.map(|mode| cell(bind(mode, Flags::RELATIVE_NODES, &named)));
        row(&mut text, std::iter::once(mask(&named).to_string()).chain(cells));
    }
    text += "\n## Arguments\n\n";
    text +=
        "A flag is static or relative, both are these two; balancing is MPOL_F_NUMA_BALANCING, with nodes.\n\n";
    head(&mut text, "mode", &["no nodes", "no nodes, a flag", "nodes", "both flags", "balancing", "home node"]);
    for mode in Mode::ALL {
        row(&mut text, std::iter::once(mode.name().to_owned()).chain(argument_cells(mode)));
    }
    text += "\n## A change of the domain's mask\n\nThe domain's sysram nodes change from 0-3 to 1,3, then back; the nodes chosen from.\n\n";
    head(&mut text, "policy", &["0-3", "1,3", "0-3 again"]);
    for (mode, flags, numbers) in changes() {
        let label = format!("{}{} {}", mode.name(), flags.suffix(), mask(&numbers));
        row(&mut text, std::iter::once(label).chain(change_cells(mode, flags, &numbers)));
    }
    text += "\n## move_pages(2) and migrate_pages(2)\n\nA node named here opens no easy guard.\n\n";
    head(&mut text, "node", &["move_pages", "migrate_pages", "with CAP_SYS_NICE"]);
    for node in 0..=ABSENT {
        let cells = move_cells(node);
        row(&mut text, std::iter::once(format!("{node} ({})", kind(node))).chain(cells));
    }
    text
}

fn argument_cells(mode: Mode) -> [String; 6] {
    let answer = |result: Result<Policy, PolicyError>| match result {
        Ok(policy) if policy.mode() != mode => policy.mode().name().to_owned(),
        Ok(_) => "ok".to_owned(),
        Err(error) => error.errno().name().to_owned(),
    };
    let nodes = NodeMask::of(id(0));
    let takes =
        [nodes, NodeMask::EMPTY].into_iter().find_map(|nodes| Policy::new(mode, Flags::empty(), nodes).ok());
    [
        answer(Policy::new(mode, Flags::empty(), NodeMask::EMPTY)),
        answer(Policy::new(mode, Flags::STATIC_NODES, NodeMask::EMPTY)),
        answer(Policy::new(mode, Flags::empty(), nodes)),
        answer(Policy::new(mode, Flags::STATIC_NODES | Flags::RELATIVE_NODES, nodes)),
        answer(Policy::new(mode, Flags::NUMA_BALANCING, nodes)),
        answer(takes.unwrap().with_home(id(0), &present())),
    ]
}

const PAYING: [&str; 3] = ["quota left", "quota used up", "no grant"];

fn payments() -> impl Iterator<Item = (Guard, Mode)> {
    [Guard::Hard, Guard::Easy].into_iter().flat_map(|guard| NAMING.map(|mode| (guard, mode)))
}

/// Allocates on a machine with one node, an SPM node: with a grant for one page, with what that leaves, and without.
fn payment_cells(guard: Guard, mode: Mode) -> [String; 3] {
    let mut mm = MemoryManager::new();
    let services = Services::USER_NUMA;
    let spec = NodeSpec { node_type: NodeType::Spm, class: Class::Plain, services, guard, owner: "test".into() };
    let owner = mm.registry_mut().register(id(0), spec.clone()).unwrap().owner;
    let lent = Metadata::from_heap(FrameCount(64)).unwrap();
    mm.registry_mut().add_range(&owner, &spec, FrameCount(64), lent, Initial::Zero).unwrap();
    let grant = mm.registry_mut().grant(&[&owner], Terms::new(Rights::ALLOC, Order::ZERO.bytes())).unwrap();
    let policy = Policy::new(mode, Flags::empty(), NodeMask::of(id(0))).unwrap();
    let mut answer = |grants: &[&Grant]| {
        let before = mm.registry().grant_info(&grant).unwrap().used;
        let request = Request { policy, grants, ..Request::of(DomainId::ROOT) };
        let result = mm.alloc(&request, Order::ZERO);
        let is_charged = mm.registry().grant_info(&grant).unwrap().used > before;
        match result {
            // The block stays allocated, and charged: the next one finds no quota.
            Ok(_) => if is_charged { "charged" } else { "free of charge" }.to_owned(),
            Err(AllocError::Grant { cause: GrantError::OverQuota { .. }, .. }) => "over quota".to_owned(),
            Err(AllocError::Refused(_)) => Errno::Einval.name().to_owned(),
            Err(error) => panic!("{error}"),
        }
    };
    [answer(&[&grant]), answer(&[&grant]), answer(&[])]
}

fn changes() -> Vec<(Mode, Flags, Set)> {
    let mut all = Vec::new();
    for mode in [Mode::Bind, Mode::Interleave, Mode::PreferredMany] {
        for flags in [Flags::empty(), Flags::STATIC_NODES, Flags::RELATIVE_NODES] {
            for numbers in [&[0, 1][..], &[0, 2]] {
                all.push((mode, flags, set(numbers)));
            }
        }
    }
    all
}

fn change_cells(mode: Mode, flags: Flags, numbers: &Set) -> [String; 3] {
    let context = |nodes: &[u16]| Context {
        effective: mask(&set(nodes)),
        sysram: mask(&set(&[0, 1, 2, 3])),
        ..Context::default()
    };
    let mut bound = Policy::new(mode, flags, mask(numbers)).unwrap().bind_to(&context(&[0, 1, 2, 3])).unwrap();
    let mut after = |nodes: &[u16]| {
        assert!(bound.rebind(&context(nodes)));
        bound.nodes().to_string()
    };
    [after(&[0, 1, 2, 3]), after(&[1, 3]), after(&[0, 1, 2, 3])]
}

fn move_cells(node: u16) -> [String; 3] {
    let context = table_context();
    let name = |errno: Errno| errno.name().to_owned();
    let moved = move_target(&context, &present(), id(node)).map_or_else(name, |()| "ok".to_owned());
    let [plain, privileged] = [false, true].map(|is_privileged| {
        migrate_targets(&context, &NodeMask::of(id(node)), is_privileged).map_or_else(name, |_| "ok".to_owned())
    });
    [moved, plain, privileged]
}

#[test]
fn the_documented_table_is_what_the_code_answers() {
    let text = document();
    if std::env::var_os("SPMEM_WRITE_DOCS").is_some() {
        std::fs::write(DOCS, &text).unwrap();
    }
    let found = std::fs::read_to_string(DOCS).unwrap();
    assert!(found == text, "docs/policies.md is not what the code answers; SPMEM_WRITE_DOCS=1 writes it anew");
}

#[test]
fn each_cell_is_what_linux_and_the_rules_say() {
    for mode in NAMING {
        for named in named_sets() {
            let wanted = expected(mode, &named).map(|nodes| mask(&nodes));
            let is_balanced = matches!(mode, Mode::Bind | Mode::PreferredMany);
            let balancing = if is_balanced { Flags::NUMA_BALANCING } else { Flags::empty() };
            for flags in [Flags::empty(), Flags::STATIC_NODES, balancing, balancing | Flags::STATIC_NODES] {
                let found = bind(mode, flags, &named).map(|bound| bound.nodes());
                assert_eq!(found, wanted, "{mode} {flags:?} {named:?}");
            }
        }
        // Relative: number n is sysram node n modulo 2.
        for named in [&[0][..], &[1], &[2], &[3], &[0, 3], &[0, 1, 2]].map(set) {
            let counted: Set = named.iter().map(|number| number % 2).collect();
            let wanted = if mode == Mode::Preferred { counted.into_iter().take(1).collect() } else { counted };
            assert_eq!(
                bind(mode, Flags::RELATIVE_NODES, &named).unwrap().nodes(),
                mask(&wanted),
                "{mode} {named:?}"
            );
        }
    }
}

#[test]
fn arguments_are_refused_as_linux_refuses_them() {
    let rows = Mode::ALL.map(argument_cells);
    let einval = "EINVAL";
    let none = "EOPNOTSUPP";
    assert_eq!(rows[0], ["ok", "ok", einval, einval, einval, "ENOENT"], "default");
    assert_eq!(rows[1], ["local", einval, "ok", einval, einval, none], "preferred");
    assert_eq!(rows[2], [einval, einval, "ok", einval, "ok", "ok"], "bind");
    assert_eq!(rows[3], [einval, einval, "ok", einval, einval, none], "interleave");
    assert_eq!(rows[4], ["ok", einval, einval, einval, einval, none], "local");
    assert_eq!(rows[5], [einval, einval, "ok", einval, "ok", "ok"], "preferred-many");
    assert_eq!(rows[6], [einval, einval, "ok", einval, einval, none], "weighted-interleave");
    let bind = Policy::bind(NodeMask::of(id(0)));
    assert_eq!(bind.with_home(id(ABSENT), &present()), Err(PolicyError::HomeAbsent { node: id(ABSENT) }));
}

#[test]
fn a_grant_pays_while_it_can_and_only_strict_bind_to_an_easy_node_goes_on_without() {
    for (guard, mode) in payments() {
        let without = if (guard, mode) == (Guard::Easy, Mode::Bind) {
            ["free of charge"; 2]
        } else {
            ["over quota", "EINVAL"]
        };
        assert_eq!(payment_cells(guard, mode), ["charged", without[0], without[1]], "R9: {guard}, {mode}");
    }
}

#[test]
fn a_change_of_masks_is_followed_as_linux_follows_it() {
    let cells = |mode, flags, numbers: &[u16]| change_cells(mode, flags, &set(numbers));
    let none = Flags::empty();
    for mode in [Mode::Bind, Mode::Interleave] {
        // The nth of 0-3 becomes the nth of 1,3, from the front again at its end; and the same back.
        assert_eq!(cells(mode, none, &[0, 1]), ["0-1", "1,3", "0-1"]);
        assert_eq!(cells(mode, none, &[0, 2]), ["0,2", "1", "0"]);
        assert_eq!(cells(mode, Flags::STATIC_NODES, &[0, 1]), ["0-1", "1", "0-1"]);
        assert_eq!(cells(mode, Flags::STATIC_NODES, &[0, 2]), ["0,2", "1,3", "0,2"], "none left: all there are");
        assert_eq!(cells(mode, Flags::RELATIVE_NODES, &[0, 1]), ["0-1", "1,3", "0-1"]);
        assert_eq!(cells(mode, Flags::RELATIVE_NODES, &[0, 2]), ["0,2", "1", "0,2"]);
    }
    for flags in [none, Flags::STATIC_NODES, Flags::RELATIVE_NODES] {
        assert_eq!(cells(Mode::PreferredMany, flags, &[0, 1]), ["0-1", "1", "0-1"], "wishes stay as they are");
    }
}

#[test]
fn moving_pages_needs_a_grant_whatever_the_guard() {
    let answers = |node| move_cells(node);
    for node in [SYSRAM, GRANTED] {
        assert_eq!(answers(node), ["ok", "ok", "ok"]);
    }
    for node in [OUTSIDE, HARD, EASY] {
        assert_eq!(answers(node), ["EACCES", "EPERM", "EINVAL"]);
    }
    assert_eq!(answers(ABSENT), ["ENODEV", "EPERM", "EINVAL"]);
}

#[test]
fn an_spm_node_that_closes_is_never_stood_in_for() {
    let open = Context { granted: mask(&set(&[HARD])), ..table_context() };
    for (mode, survives) in [(Mode::Bind, false), (Mode::Interleave, false), (Mode::PreferredMany, true)] {
        let mut bound = Policy::new(mode, Flags::empty(), NodeMask::of(id(HARD))).unwrap().bind_to(&open).unwrap();
        assert_eq!(bound.nodes(), NodeMask::of(id(HARD)));
        assert_eq!(bound.rebind(&table_context()), survives, "R10: {mode}");
        assert!(bound.nodes().is_empty());
    }
}

#[test]
fn preferred_means_the_node_that_was_first_when_it_was_set() {
    let within = |effective: &[u16]| Context {
        effective: mask(&set(effective)),
        sysram: mask(&set(&[0, 2])),
        granted: mask(&set(&[1])),
        easy: NodeMask::EMPTY,
    };
    let policy = Policy::new(Mode::Preferred, Flags::empty(), mask(&set(&[1, 2]))).unwrap();
    let mut bound = policy.bind_to(&within(&[0, 2])).unwrap();
    for effective in [&[0, 1, 2][..], &[0, 2]] {
        assert!(bound.rebind(&within(effective)));
        assert_eq!(bound.nodes(), NodeMask::of(id(2)), "the lower SPM node does not take its place");
    }
    assert!(
        bound.rebind(&within(&[0, 1])) && bound.nodes().is_empty(),
        "it is passed over, and nothing stands in"
    );
}

fn subset() -> impl Strategy<Value = Set> {
    prop::collection::btree_set(0u16..10, 0..8)
}

fn naming() -> impl Strategy<Value = (Mode, Flags)> {
    let flags = prop_oneof![Just(Flags::empty()), Just(Flags::STATIC_NODES), Just(Flags::RELATIVE_NODES)];
    (prop::sample::select(NAMING.to_vec()), flags)
}

#[derive(Clone, Debug)]
struct Facts {
    effective: Set,
    sysram: Set,
    granted: Set,
    easy: Set,
}

fn facts() -> impl Strategy<Value = Facts> {
    // Nodes 0 to 4 are sysram, the others SPM.
    (subset(), subset(), subset()).prop_map(|(effective, granted, easy)| Facts {
        effective,
        sysram: (0..5).collect(),
        granted: granted.into_iter().filter(|&node| node >= 5).collect(),
        easy: easy.into_iter().filter(|&node| node >= 5).collect(),
    })
}

fn context(facts: &Facts) -> Context {
    Context {
        effective: mask(&facts.effective),
        sysram: mask(&facts.sysram),
        granted: mask(&facts.granted),
        easy: mask(&facts.easy),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_policy_ever_chooses_a_node_outside_the_domain_or_behind_the_wall(
        (mode, flags) in naming(), named in subset().prop_filter("some", |set| !set.is_empty()),
        changes in prop::collection::vec(facts(), 1..6),
    ) {
        let policy = Policy::new(mode, flags, mask(&named)).unwrap();
        let Some(mut bound) = policy.bind_to(&context(&changes[0])) else { return Ok(()) };
        for facts in &changes {
            let is_good = bound.rebind(&context(facts));
            let nodes: Set = bound.nodes().iter().map(NodeId::get).collect();
            prop_assert!(nodes.is_subset(&facts.effective), "R6: {nodes:?} of {facts:?}");
            for node in nodes.difference(&facts.sysram) {
                let is_open = facts.granted.contains(node) || mode == Mode::Bind && facts.easy.contains(node);
                prop_assert!(is_open && named.contains(node) && flags != Flags::RELATIVE_NODES, "R9: {node}");
            }
            prop_assert!(is_good || !bound.falls_back());
            if mode == Mode::Preferred {
                prop_assert!(nodes.len() <= 1);
            }
            if flags == Flags::STATIC_NODES && !named.is_disjoint(&(&facts.effective & &facts.sysram))
                && mode == Mode::Bind {
                let wanted: Set = named.iter().copied().filter(|node| nodes.contains(node)).collect();
                prop_assert_eq!(&wanted, &nodes, "static numbers stay");
            }
        }
    }

    #[test]
    fn turns_give_each_node_its_weight_and_ranges_depend_on_the_place_only(
        nodes in subset().prop_filter("some", |set| !set.is_empty()), weights in prop::collection::vec(1u8..6, 10),
        is_weighted in any::<bool>(),
    ) {
        let mode = if is_weighted { Mode::WeightedInterleave } else { Mode::Interleave };
        let weight = |node: NodeId| weights[node.index()];
        let round: Vec<u16> = nodes.iter()
            .flat_map(|&node| std::iter::repeat_n(node, if is_weighted { usize::from(weights[usize::from(node)]) } else { 1 }))
            .collect();
        let mut turns = Turns::default();
        for (index, wanted) in round.iter().chain(&round).enumerate() {
            prop_assert_eq!(turns.next(mode, &mask(&nodes), weight), Some(id(*wanted)));
            prop_assert_eq!(node_of(mode, &mask(&nodes), weight, index as u64), Some(id(*wanted)));
        }
    }
}

#[test]
fn there_is_no_turn_without_nodes() {
    assert_eq!(Turns::default().next(Mode::Interleave, &NodeMask::EMPTY, |_| 1), None);
    assert_eq!(node_of(Mode::Interleave, &NodeMask::EMPTY, |_| 1, 3), None);
}
