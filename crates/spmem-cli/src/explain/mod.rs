//! `spm explain`: what would be allowed, and who or what stands in the way (R11).
//!
//! Asks the same function as an allocation does ([`Registry::admit`]), of the machine of `spm run`, of this one's own nodes, or of a
//! described one.
//! What the calls that set a policy refuse is an answer too, with their errno.
//! Exit status: 0 when at least one node is allowed, 1 when none is, 2 for a wrong command line or machine.

mod machine;

use std::fmt::Write as _;

use anyhow::{Context, bail};
use serde::Serialize;
use spmem_core::grant::{Grant, Rights};
use spmem_core::node::{Guard, NodeType};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::{Flags, Mode, Policy, PolicyError};
use spmem_core::registry::Registry;
use spmem_core::units::{DomainId, NodeId, PAGE_SIZE};
use spmem_core::wall::{Pass, Reason, Refusal, Request};

pub use self::machine::EXAMPLE;
use self::machine::{Machine, parse_mask};
use crate::arguments::{ExplainArguments, PolicyName};
use crate::config::Config;
use crate::run::stdio::write_out;

/// No node is allowed.
const REFUSED: i32 = 1;

/// The answer, in the shape of its JSON.
#[derive(Debug, Default, Serialize)]
struct Answer {
    schema: u32,
    domain: String,
    policy: String,
    /// The policy's home node.
    home: Option<u16>,
    /// The node of the processor that the request runs on.
    local: Option<u16>,
    /// Null when the request names none.
    asked: Option<String>,
    /// As a node list; empty when refused.
    allowed: String,
    /// Of them: those that the policy chooses from. The others follow when these are full.
    chosen: String,
    /// The allowed ones as they are tried; null where they are taken in turn, and when refused.
    order: Option<Vec<u16>>,
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
        None if options.here => {
            let config = Config::read(options.config.as_deref())?;
            Machine::here(&config, options.guard.map_or(Guard::Hard, |guard| guard.0))?
        }
        None => Machine::embedded()?,
    };
    options.grant.iter().try_for_each(|grant| machine.note_grant(grant))?;
    let answer = answer(&machine, options)?;
    let text = if options.json {
        serde_json::to_string_pretty(&answer).context("the answer is no JSON")? + "\n"
    } else {
        table(&answer)
    };
    write_out(&text).context("stdout does not take the answer")?;
    Ok(if answer.allowed.is_empty() { REFUSED } else { 0 })
}

fn answer(machine: &Machine, options: &ExplainArguments) -> anyhow::Result<Answer> {
    let registry = &machine.registry;
    let domain = registry
        .find_domain(&options.domain)
        .with_context(|| format!("there is no domain {}; there are {}", options.domain, paths(registry)))?;
    let default = registry.default_mask(domain).copied().unwrap_or_default();
    let asked = options.nodes.as_deref().map(|text| parse_mask("--nodes", text, default)).transpose()?;
    let node = |option, number: Option<u16>| {
        let node = number.map(|number| NodeId::new(number).with_context(|| format!("{option} {number}")));
        node.transpose()
    };
    let (home, local) = (node("--home", options.home)?, node("--local", options.local)?);
    if let Some(absent) = local.filter(|&local| !registry.present().contains(local)) {
        bail!("--local {absent}: there is no such node; there are {}", registry.present());
    }
    let grants: Vec<&Grant> = options.grant.iter().filter_map(|name| machine.grant(name)).collect();
    let asked_for = |policy: String| Answer {
        schema: 1,
        domain: path_of(registry, domain).unwrap_or_default(),
        policy,
        home: options.home,
        local: options.local,
        asked: asked.map(|mask| mask.to_string()),
        ..Answer::default()
    };
    let name = options.policy.unwrap_or(match asked {
        None => PolicyName { mode: Mode::Default, flags: Flags::empty() },
        Some(_) => PolicyName { mode: Mode::Bind, flags: Flags::empty() },
    });
    let policy = match policy(name, asked, home, registry) {
        Ok(policy) => policy,
        Err(error) => {
            let (errno, reason) = (Some(error.errno().name()), Some(error.to_string()));
            return Ok(Answer { errno, reason, ..asked_for(describe(name.mode, name.flags)) });
        }
    };
    let request = Request { policy, grants: &grants, local, ..Request::of(domain) };
    let result = registry.admit(&request);
    let open = result.as_ref().map_or(NodeMask::EMPTY, |pass| *pass.mask());
    let allowed: NodeMask = open.iter().filter(|&node| has_quota(registry, &request, node)).collect();
    // Relative numbers count the nodes that are possible: they are no nodes to be looked at.
    let named = asked.filter(|_| !policy.flags().is_relative());
    let looked_at = named.map_or(*registry.present(), |named| named.union(&open));
    let nodes = looked_at.iter().map(|node| node_answer(registry, &request, &open, &allowed, node)).collect();
    let refusal = result.as_ref().err();
    let is_refused = allowed.is_empty();
    let text = |mask: &NodeMask| if is_refused { String::new() } else { mask.to_string() };
    let tried = result.as_ref().ok().filter(|_| !is_refused).and_then(Pass::order);
    Ok(Answer {
        allowed: text(&allowed),
        order: tried.map(|nodes| nodes.filter(|&node| allowed.contains(node)).map(NodeId::get).collect()),
        chosen: result.as_ref().map_or_else(|_| String::new(), |pass| text(&pass.nodes().intersection(&allowed))),
        errno: is_refused.then(|| refusal.map_or("EDQUOT", |_| "EINVAL")),
        reason: refusal
            .filter(|refusal| refusal.node.is_none())
            .map(|refusal| format!("{}; {}", refusal.reason.what(registry), refusal.reason.remedy())),
        nodes,
        ..asked_for(describe(policy.mode(), policy.flags()))
    })
}

/// What the program's calls make of it: set_mempolicy(2), then set_mempolicy_home_node(2).
fn policy(
    name: PolicyName,
    asked: Option<NodeMask>,
    home: Option<NodeId>,
    registry: &Registry,
) -> Result<Policy, PolicyError> {
    let policy = Policy::new(name.mode, name.flags, asked.unwrap_or_default())?;
    home.map_or(Ok(policy), |home| policy.with_home(home, registry.present()))
}

fn node_answer(
    registry: &Registry,
    request: &Request<'_>,
    open: &NodeMask,
    allowed: &NodeMask,
    node: NodeId,
) -> NodeAnswer {
    let spec = registry.spec(node);
    let is_allowed = allowed.contains(node);
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
        _ if open.contains(node) => {
            answer.obstacle = Some("over-quota");
            answer.reason = "less than a page (4096 bytes) is left of the quota of the grant".to_owned();
            answer.remedy = Some("ask the node's owner for a larger one");
        }
        Some(Refusal { reason, .. }) => {
            answer.obstacle = Some(reason.name());
            answer.domain = reason.domain().and_then(|domain| path_of(registry, domain));
            answer.reason = reason.what(registry).to_string();
            answer.remedy = Some(match reason {
                Reason::NeedsGrant { .. } if request.policy.nodes().is_empty() => {
                    "a grant from its owner with ALLOC would open it to requests that name it"
                }
                _ => reason.remedy(),
            });
        }
        // Allowed, and not open: there is no such answer.
        None => {}
    }
    answer
}

/// The mode and its flags, as `--policy` takes them.
fn describe(mode: Mode, flags: Flags) -> String {
    format!("{mode}{}", flags.suffix())
}

/// Whether a page of the node could be charged: it needs no grant, or one of those shown has as much left.
fn has_quota(registry: &Registry, request: &Request<'_>, node: NodeId) -> bool {
    !needs_grant(registry, request, node)
        || request.grants.iter().filter_map(|grant| registry.grant_info(grant).ok()).any(|info| {
            info.nodes.contains(node)
                && info.terms.rights.contains(Rights::ALLOC)
                && info.terms.quota.0.saturating_sub(info.used.0) >= PAGE_SIZE
        })
}

/// Whether an open node is open by a grant: SPM, and not easy and named by strict bind (R9).
fn needs_grant(registry: &Registry, request: &Request<'_>, node: NodeId) -> bool {
    let spec = registry.spec(node).filter(|spec| spec.node_type == NodeType::Spm);
    spec.is_some_and(|spec| spec.guard == Guard::Hard || !request.policy.opens_easy())
}

/// Why a node is open.
fn opening(is_spm: bool, request: &Request<'_>, registry: &Registry, node: NodeId) -> &'static str {
    if !is_spm {
        "ordinary memory"
    } else if needs_grant(registry, request, node) {
        "opened by a grant with ALLOC"
    } else {
        "easy guard, strict bind"
    }
}

fn path_of(registry: &Registry, domain: DomainId) -> Option<String> {
    registry.domain_path(domain).map(|path| path.to_string())
}

fn paths(registry: &Registry) -> String {
    let mut paths: Vec<String> = registry.domains().filter_map(|domain| path_of(registry, domain)).collect();
    paths.sort_unstable();
    paths.join(", ")
}

fn table(answer: &Answer) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "domain   {}", answer.domain);
    let near = |what, node: Option<u16>| node.map_or_else(String::new, |node| format!(", {what} node {node}"));
    let _ = writeln!(
        text,
        "asked    {} ({}{}{})",
        answer.asked.as_deref().unwrap_or("nothing: the default"),
        answer.policy,
        near("home", answer.home),
        near("local", answer.local),
    );
    let _ = match answer.errno {
        None if answer.chosen == answer.allowed || answer.chosen == "none" => {
            writeln!(text, "allowed  {}", answer.allowed)
        }
        None => writeln!(text, "allowed  {}, of them first {}", answer.allowed, answer.chosen),
        Some(errno) => writeln!(text, "allowed  none: {errno}"),
    };
    match &answer.order {
        Some(order) if order.len() > 1 => {
            let nodes: Vec<String> = order.iter().map(u16::to_string).collect();
            let _ = writeln!(text, "order    {}", nodes.join(", then "));
        }
        _ => {}
    }
    if let Some(reason) = &answer.reason {
        let _ = writeln!(text, "because  {reason}");
    }
    if answer.nodes.is_empty() {
        return text;
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
