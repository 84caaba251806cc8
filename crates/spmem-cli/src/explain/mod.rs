//! `spm explain`: what would be allowed, and who or what stands in the way (R11).
//!
//! Asks the same function as an allocation does ([`Registry::admit`]), of the machine of `spm run` or of a described one.
//! Exit status: 0 when at least one node is allowed, 1 when none is, 2 for a wrong command line or machine.

mod machine;

use std::fmt::Write as _;
use std::io::Write;

use anyhow::Context;
use serde::Serialize;
use spmem_core::grant::Grant;
use spmem_core::node::NodeType;
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::Policy;
use spmem_core::registry::Registry;
use spmem_core::units::NodeId;
use spmem_core::wall::{Pass, Refusal, Request};

pub use self::machine::EXAMPLE;
use self::machine::{Machine, parse_mask};
use crate::arguments::ExplainArguments;

/// No node is allowed.
const REFUSED: i32 = 1;

/// The answer, in the shape of its JSON.
#[derive(Debug, Serialize)]
struct Answer {
    schema: u32,
    domain: String,
    policy: String,
    /// Null when the request names none.
    asked: Option<String>,
    /// As a node list; empty when refused.
    allowed: String,
    /// Of them: those that the policy chooses from. The others follow when these are full.
    chosen: String,
    /// Null when something is allowed.
    errno: Option<&'static str>,
    /// Why nothing is, where no single node is the reason.
    reason: Option<String>,
    nodes: Vec<NodeAnswer>,
}

/// One node that was asked for, or would be by default.
#[derive(Debug, Serialize)]
struct NodeAnswer {
    node: u16,
    r#type: Option<String>,
    guard: Option<String>,
    is_allowed: bool,
    /// A word for programs; null when allowed.
    obstacle: Option<&'static str>,
    /// The domain that stands in the way.
    domain: Option<String>,
    reason: String,
    remedy: Option<&'static str>,
}

/// Explains on stdout; the exit status.
///
/// # Errors
/// The machine is not valid, the request names what there is not, or stdout does not take the answer.
pub fn explain(options: &ExplainArguments) -> anyhow::Result<i32> {
    let mut machine = match &options.machine {
        Some(path) => Machine::read(path)?,
        None => Machine::embedded()?,
    };
    options.grant.iter().try_for_each(|grant| machine.note_grant(grant))?;
    let answer = answer(&machine, options)?;
    let text = if options.json {
        serde_json::to_string_pretty(&answer).context("the answer is no JSON")? + "\n"
    } else {
        table(&answer)
    };
    std::io::stdout().write_all(text.as_bytes()).context("stdout does not take the answer")?;
    Ok(if answer.allowed.is_empty() { REFUSED } else { 0 })
}

fn answer(machine: &Machine, options: &ExplainArguments) -> anyhow::Result<Answer> {
    let registry = &machine.registry;
    let domain = registry
        .find_domain(&options.domain)
        .with_context(|| format!("there is no domain {}; there are {}", options.domain, paths(registry)))?;
    let default = registry.default_mask(domain).copied().unwrap_or_default();
    let asked = options.nodes.as_deref().map(|text| parse_mask("--nodes", text, default)).transpose()?;
    let grants: Vec<&Grant> = options.grant.iter().filter_map(|name| machine.grant(name)).collect();
    let policy = match asked {
        None => Policy::DEFAULT,
        Some(nodes) => Policy::new(options.policy.mode, options.policy.flags, nodes)?,
    };
    let request = Request { policy, grants: &grants, ..Request::of(domain) };
    let result = registry.admit(&request);
    let fallback = result.as_ref().map_or(NodeMask::EMPTY, |pass| *pass.mask());
    let looked_at = asked.map_or(*registry.present(), |asked| asked.union(&fallback));
    let nodes = looked_at.iter().map(|node| node_answer(registry, &request, result.as_ref(), node)).collect();
    let refusal = result.as_ref().err();
    Ok(Answer {
        schema: 1,
        domain: registry.domain_path(domain).unwrap_or_default(),
        policy: policy.mode().to_string(),
        asked: asked.map(|mask| mask.to_string()),
        allowed: result.as_ref().map_or_else(|_| String::new(), |pass| pass.mask().to_string()),
        chosen: result.as_ref().map_or_else(|_| String::new(), |pass| pass.nodes().to_string()),
        errno: refusal.map(|_| "EINVAL"),
        reason: refusal
            .filter(|refusal| refusal.node.is_none())
            .map(|refusal| format!("{}; {}", refusal.reason.what(registry), refusal.reason.remedy())),
        nodes,
    })
}

fn node_answer(
    registry: &Registry,
    request: &Request<'_>,
    result: Result<&Pass, &Refusal>,
    node: NodeId,
) -> NodeAnswer {
    let spec = registry.spec(node);
    let is_allowed = result.is_ok_and(|pass| pass.mask().contains(node));
    let is_spm = spec.is_some_and(|spec| spec.node_type == NodeType::Spm);
    let mut answer = NodeAnswer {
        node: node.get(),
        r#type: spec.map(|spec| spec.node_type.to_string()),
        guard: spec.filter(|_| is_spm).map(|spec| spec.guard.to_string()),
        is_allowed,
        obstacle: None,
        domain: None,
        reason: String::new(),
        remedy: None,
    };
    match registry.obstacle(request, node) {
        _ if is_allowed => answer.reason = opening(is_spm, request, registry, node).to_owned(),
        Some(Refusal { reason, .. }) => {
            answer.obstacle = Some(reason.name());
            answer.domain = reason.domain().and_then(|domain| registry.domain_path(domain));
            answer.reason = reason.what(registry).to_string();
            answer.remedy = Some(reason.remedy());
        }
        None => {
            answer.obstacle = Some("not-default");
            answer.reason = "not in the domain's default mask".to_owned();
            answer.remedy = Some("name it, or add it to mems.sysram");
        }
    }
    answer
}

/// Why a node is open.
fn opening(is_spm: bool, request: &Request<'_>, registry: &Registry, node: NodeId) -> &'static str {
    let without = Request { grants: &[], ..*request };
    if !is_spm {
        "ordinary memory"
    } else if registry.obstacle(&without, node).is_none() {
        "easy guard, strict bind"
    } else {
        "opened by a grant with ALLOC"
    }
}

fn paths(registry: &Registry) -> String {
    let mut paths: Vec<String> = registry.domains().filter_map(|domain| registry.domain_path(domain)).collect();
    paths.sort_unstable();
    paths.join(", ")
}

fn table(answer: &Answer) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "domain   {}", answer.domain);
    let _ = writeln!(
        text,
        "asked    {} ({})",
        answer.asked.as_deref().unwrap_or("nothing: the default"),
        answer.policy
    );
    let _ = match answer.errno {
        None if answer.chosen == answer.allowed || answer.chosen == "none" => {
            writeln!(text, "allowed  {}", answer.allowed)
        }
        None => writeln!(text, "allowed  {}, of them first {}", answer.allowed, answer.chosen),
        Some(errno) => writeln!(text, "allowed  none: {errno}"),
    };
    if let Some(reason) = &answer.reason {
        let _ = writeln!(text, "because  {reason}");
    }
    let _ = writeln!(text, "\n{:>4}  {:<6}  {:<5}  {:<7}  why", "node", "type", "guard", "answer");
    for node in &answer.nodes {
        let [node_type, guard] = [&node.r#type, &node.guard].map(|cell| cell.as_deref().unwrap_or("-"));
        let verdict = match (node.is_allowed, answer.errno) {
            (true, _) => "allowed",
            (false, None) => "dropped",
            (false, Some(_)) => "refused",
        };
        let remedy = node.remedy.map_or_else(String::new, |remedy| format!("; {remedy}"));
        let _ =
            writeln!(text, "{:>4}  {node_type:<6}  {guard:<5}  {verdict:<7}  {}{remedy}", node.node, node.reason);
    }
    text
}
