//! Requests: asked for once, by a task with a policy, or only to know what stands in the way (R6 to R11).

use std::collections::BTreeMap;

use spmem_core::grant::{Grant, Rights};
use spmem_core::mm::{AllocError, Block};
use spmem_core::nodemask::NodeMask;
use spmem_core::policy::{self, Context, Errno, Flags, Policy, PolicyError};
use spmem_core::units::{DomainId, NodeId, Order};
use spmem_core::wall::{MAX_SHOWN, Mobility, Pass, Reason, Refusal, Request, Reserve};

use super::refusals::Asked;
use super::{Applied, Outcome, World, mask_of, refused};
use crate::check::{Violation, hold};
use crate::model::{self, Bound, Choice, Kind, Set, Turn};
use crate::step::{Ask, Mode};

/// A task with a policy.
#[derive(Debug)]
pub(super) struct Task {
    pass: Pass,
    request: model::Request,
    is_movable: bool,
    domain: Option<DomainId>,
    /// Of the domain: another one may have its path later.
    made: Option<u64>,
    bound: Bound,
    turn: Turn,
}

/// The grants that are shown, of those that are held.
pub(super) fn shown<'a>(grants: &'a BTreeMap<u32, Grant>, numbers: &[u32]) -> Vec<&'a Grant> {
    numbers.iter().filter_map(|number| grants.get(number)).collect()
}

impl World {
    /// The policy as the memory manager takes it. It takes what Linux takes, and says to the rest what Linux says.
    fn policy(&self, request: &model::Request) -> Result<Result<Policy, PolicyError>, Violation> {
        let nodes = request.asked.as_ref().map_or(NodeMask::EMPTY, mask_of);
        let takes_none = matches!(request.mode, Mode::Default | Mode::Local | Mode::Preferred);
        let made = if request.asked.is_none() && !takes_none {
            Ok(Policy::DEFAULT)
        } else {
            Policy::new(request.mode.core(), request.flags, nodes)
        };
        let made = match made {
            // An error to Linux; here it is asking for nothing, or for the default.
            Err(PolicyError::NoNodes { .. }) => {
                hold("R8", nodes.is_empty(), || format!("{request:?} is said to name no node"))?;
                Ok(if request.mode == Mode::Bind { Policy::bind(NodeMask::EMPTY) } else { Policy::DEFAULT })
            }
            other => other,
        };
        let home = request.home.map(NodeId::new);
        let made = match (made, home) {
            (Ok(policy), Some(Ok(home))) => policy.with_home(home, self.mm.registry().present()),
            (made, _) => made,
        };
        let told: Option<Errno> = made.err().map(PolicyError::errno);
        let expected = request.errno(&self.model.nodes.keys().copied().collect());
        hold("R8", told == expected, || format!("{request:?} is answered {told:?}, by Linux {expected:?}"))?;
        Ok(made)
    }

    /// What a request is to the memory manager; none if it cannot be made.
    pub(super) fn asked(&self, ask: &Ask) -> Result<Result<Asked, String>, Violation> {
        let mut request = model::Request::of(ask);
        request.grants.retain(|grant| self.grants.contains_key(grant));
        let domain = match &request.domain {
            None => None,
            Some(path) => match self.domain(path) {
                None => return Ok(Err("no domain".to_owned())),
                found => found,
            },
        };
        let policy = match self.policy(&request)? {
            Ok(policy) => policy,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let local = request.at.and_then(|node| NodeId::new(node).ok());
        let mobility = if ask.is_movable { Mobility::Movable } else { Mobility::Unmovable };
        let reserve = if ask.uses_reserve { Reserve::Use } else { Reserve::Keep };
        let core = Request { policy, local, domain, mobility, reserve, ..Request::default() };
        Ok(Ok(Asked { request, core }))
    }

    /// R6 to R11: somebody asks once.
    pub(super) fn alloc(&mut self, number: u32, order: u8, ask: &Ask) -> Applied {
        let (Ok(order), false) = (Order::new(order), self.model.blocks.contains_key(&number)) else {
            return refused("no such order, or a block of that number");
        };
        let asked = match self.asked(ask)? {
            Ok(asked) => asked,
            Err(why) => return refused(why),
        };
        let request = &asked.request;
        let choice = self.model.bind(request).map(|bound| self.model.choice(request, &bound)).unwrap_or_default();
        let turn = self.model.take_turn(request, &choice, &mut Turn::default());
        let room = self.room(request, &choice, order);
        let grants = shown(&self.grants, &request.grants);
        let given = self.mm.alloc(&Request { grants: &grants, ..asked.core }, order);
        match given {
            Err(AllocError::Refused(refusal)) => self.note_refused(&asked, &choice, refusal),
            given => self.note_given(number, order, &asked, &choice, turn, &room, given, ask.is_movable),
        }
    }

    /// R6 to R12: somebody asks for many frames at once, and gets what so many requests would get.
    pub(super) fn alloc_batch(&mut self, number: u32, count: u32, ask: &Ask) -> Applied {
        let numbers = number..number.saturating_add(count);
        if numbers.clone().any(|number| self.model.blocks.contains_key(&number)) {
            return refused("a block of that number");
        }
        let asked = match self.asked(ask)? {
            Ok(asked) => asked,
            Err(why) => return refused(why),
        };
        let request = &asked.request;
        let choice = self.model.bind(request).map(|bound| self.model.choice(request, &bound)).unwrap_or_default();
        let grants = shown(&self.grants, &request.grants);
        let mut pass = match self.mm.registry().admit(&Request { grants: &grants, ..asked.core }) {
            Ok(pass) => pass,
            Err(refusal) => return self.note_refused(&asked, &choice, refusal),
        };
        let mut into = Vec::new();
        let result = self.mm.alloc_batch(&mut pass, numbers.len(), &mut into);
        let is_whole = into.len() == numbers.len();
        hold("R11", result.is_ok() == is_whole, || format!("{} of {count} frames: {result:?}", into.len()))?;
        let (mut turn, mut nodes) = (Turn::default(), Set::new());
        for (number, block) in numbers.zip(into) {
            let turn = self.model.take_turn(request, &choice, &mut turn);
            let room = self.room(request, &choice, Order::ZERO);
            nodes.insert(block.node().get());
            self.note_block(number, block, &asked, &choice, turn, &room, ask.is_movable)?;
        }
        nodes.iter().try_for_each(|&node| self.check_node(node))?;
        let Err(error) = result else { return Ok(Outcome::Done) };
        let turn = self.model.take_turn(request, &choice, &mut turn);
        let room = self.room(request, &choice, Order::ZERO);
        self.note_lack(Order::ZERO, &asked, &choice, turn, &room, error)
    }

    /// R6, R9: a page goes by its own task's hand where the domain reaches, on SPM with a grant only.
    pub(super) fn move_target(&mut self, path: &str, node: u16, numbers: &[u32]) -> Applied {
        let (Some(domain), Ok(id)) = (self.domain(path), NodeId::new(node)) else { return refused("no domain") };
        let registry = self.mm.registry();
        let mut granted = Set::new();
        numbers.iter().for_each(|&grant| granted.extend(self.model.opens(grant, Rights::ALLOC)));
        let Some(&effective) = registry.effective(domain) else { return refused("no domain") };
        let (sysram, easy) = (*registry.sysram(), *registry.easy());
        let context = Context { effective, sysram, granted: mask_of(&granted), easy };
        let told = policy::move_target(&context, registry.present(), id);
        let known = self.model.nodes.get(&node);
        let is_open = self.model.effective(path).contains(&node)
            && known.is_some_and(|known| !known.spec.is_spm || granted.contains(&node));
        let expected = match known {
            None => Err(Errno::Enodev),
            Some(_) if is_open => Ok(()),
            Some(_) => Err(Errno::Eacces),
        };
        hold("R6", told == expected, || format!("{path} to node {node} is {told:?}, not {expected:?}"))?;
        let all = policy::migrate_targets(&context, &NodeMask::from(id), true);
        let is_same = all.is_ok() == is_open && all.is_err() == (all == Err(Errno::Einval));
        hold("R6", is_same, || format!("{path} migrates to node {node}: {all:?}, open: {is_open}"))?;
        let asks = policy::migrate_targets(&context, &NodeMask::from(id), false);
        hold("R6", asks.is_ok() == is_open && asks.is_err() == (asks == Err(Errno::Eperm)), || {
            format!("{path} migrates unprivileged to node {node}: {asks:?}, open: {is_open}")
        })?;
        // With all that is open beside it: who may not name more loses nothing, who may gets what is open.
        let mut open: Set = self.model.effective(path);
        open.retain(|node| !self.model.nodes[node].spec.is_spm || granted.contains(node));
        let (mut wide, open) = (mask_of(&open), mask_of(&open));
        wide.insert(id);
        let narrowed = if open.is_empty() { Err(Errno::Einval) } else { Ok(open) };
        let expected = if is_open { Ok(wide) } else { Err(Errno::Eperm) };
        for (is_privileged, expected) in [(true, narrowed), (false, expected)] {
            let told = policy::migrate_targets(&context, &wide, is_privileged);
            hold("R8", told == expected, || {
                format!("{path} migrates to {wide}, privileged: {is_privileged}: {told:?}, not {expected:?}")
            })?;
        }
        match told {
            Ok(()) => Ok(Outcome::Done),
            Err(errno) => refused(format!("{errno:?}")),
        }
    }

    /// R8, R11: the wall refuses where nothing is allowed, and what it says is true and helps.
    pub(super) fn note_refused(&mut self, asked: &Asked, choice: &Choice, refusal: Refusal) -> Applied {
        let is_right = choice.allowed().is_empty() || matches!(refusal.reason, Reason::TooManyGrants { .. });
        hold("R8", is_right, || format!("{refusal}, but {choice:?} are allowed"))?;
        self.check_refusal(asked, Rights::ALLOC, None, refusal)?;
        self.follow(asked, refusal)?;
        refused(refusal)
    }

    /// The nodes that could give a block of an order.
    fn room(&self, request: &model::Request, choice: &Choice, order: Order) -> Set {
        let has_room = |node: &u16| {
            let is_free = self.model.is_free_of_charge(request, *node);
            let shown = if is_free { &[][..] } else { &request.grants };
            let keeps_reserve = request.uses_reserve || self.model.keeps_reserve(*node, order.get());
            keeps_reserve && self.model.has_block(shown, Rights::ALLOC, *node, order.get())
        };
        choice.allowed().into_iter().filter(has_room).collect()
    }

    /// What the wall let through: from where it should, or exhaustion that is true.
    #[allow(
        clippy::too_many_arguments,
        reason = "what was asked, what the model makes of it, and what came of it"
    )]
    fn note_given(
        &mut self,
        number: u32,
        order: Order,
        asked: &Asked,
        choice: &Choice,
        turn: Option<u16>,
        room: &Set,
        given: Result<Block, AllocError>,
        is_movable: bool,
    ) -> Applied {
        match given {
            Ok(block) => {
                let node = block.node().get();
                self.note_block(number, block, asked, choice, turn, room, is_movable)?;
                self.check_node(node)?;
                Ok(Outcome::Done)
            }
            Err(error) => self.note_lack(order, asked, choice, turn, room, error),
        }
    }

    /// What is given comes from where it should.
    #[allow(
        clippy::too_many_arguments,
        reason = "what was asked, what the model makes of it, and what came of it"
    )]
    fn note_block(
        &mut self,
        number: u32,
        block: Block,
        asked: &Asked,
        choice: &Choice,
        turn: Option<u16>,
        room: &Set,
        is_movable: bool,
    ) -> Result<(), Violation> {
        let (request, node) = (&asked.request, block.node().get());
        let ranks = self.model.ranks(request, choice, turn);
        let rank = ranks.get(&node).copied().unwrap_or(usize::MAX);
        let before = room.iter().find(|other| ranks[*other] < rank);
        hold("distance", before.is_none(), || {
            format!("{request:?} got node {node}, but {before:?} has room and comes first: {ranks:?}")
        })?;
        self.take(number, block, request, &choice.allowed(), is_movable)
    }

    /// R10, R11: nothing is given where nothing is, and what it says is true.
    fn note_lack(
        &self,
        order: Order,
        asked: &Asked,
        choice: &Choice,
        turn: Option<u16>,
        room: &Set,
        error: AllocError,
    ) -> Applied {
        let request = &asked.request;
        let ranks = self.model.ranks(request, choice, turn);
        hold("R10", room.is_empty(), || format!("{request:?}: {error}, but nodes {room:?} have room"))?;
        let node = self.check_lack(&request.grants, Rights::ALLOC, order, error)?;
        let is_last = ranks.get(&node) == ranks.values().max();
        hold("R11", is_last, || format!("{request:?} ends at node {node}: {error}, of {ranks:?}"))?;
        refused(error)
    }

    /// A task sets its policy: as mbind(2) or set_mempolicy(2) it is refused where nothing of it can be used.
    pub(super) fn set_policy(&mut self, number: u32, ask: &Ask) -> Applied {
        let asked = match self.asked(ask)? {
            Ok(asked) => asked,
            Err(why) => return refused(why),
        };
        let request = &asked.request;
        let bound = self.model.bind(request);
        let choice = bound.as_ref().map(|bound| self.model.choice(request, bound)).unwrap_or_default();
        let grants = shown(&self.grants, &request.grants);
        match self.mm.registry().admit(&Request { grants: &grants, ..asked.core }) {
            Ok(pass) => {
                let (told, allowed) = (*pass.mask(), mask_of(&choice.allowed()));
                hold("R6", told == allowed, || format!("{request:?} may use {told}, not {allowed}"))?;
                let (nodes, chosen) = (pass.nodes(), mask_of(&choice.nodes));
                hold("R6", nodes == chosen, || format!("{request:?} chooses from {nodes}, not {chosen}"))?;
                let made = ask.domain.as_ref().map(|path| self.model.domains[path].made);
                let (is_movable, domain, turn) = (ask.is_movable, asked.core.domain, Turn::default());
                let bound = bound.unwrap_or_default();
                let request = asked.request;
                self.tasks.insert(number, Task { pass, request, is_movable, domain, made, bound, turn });
                Ok(Outcome::Done)
            }
            Err(refusal) => self.note_refused(&asked, &choice, refusal),
        }
    }

    /// R5 to R11: a task asks by its policy, whatever has become of masks, nodes and grants since it was set.
    pub(super) fn alloc_by(&mut self, task: u32, number: u32, order: u8) -> Applied {
        let (Ok(order), false) = (Order::new(order), self.model.blocks.contains_key(&number)) else {
            return refused("no such order, or a block of that number");
        };
        let Some(mut of) = self.tasks.remove(&task) else { return refused("no task") };
        let applied = self.alloc_by_policy(&mut of, number, order);
        self.tasks.insert(task, of);
        applied
    }

    fn alloc_by_policy(&mut self, task: &mut Task, number: u32, order: Order) -> Applied {
        let asked = Asked {
            request: task.request.clone(),
            core: Request { policy: *task.pass.policy(), domain: task.domain, ..Request::default() },
        };
        let made = task.request.domain.as_ref().map(|path| self.model.domains.get(path).map(|known| known.made));
        let is_gone = made.is_some_and(|made| made != task.made);
        let bound = if is_gone { None } else { self.model.rebind(&task.request, &task.bound) };
        let choice = bound.as_ref().map(|bound| self.model.choice(&task.request, bound)).unwrap_or_default();
        let room = self.room(&task.request, &choice, order);
        let given = self.mm.alloc_with(&mut task.pass, order);
        if let Some(bound) = bound {
            task.bound = bound;
        }
        match given {
            Err(AllocError::Refused(refusal)) => {
                hold("R8", choice.allowed().is_empty(), || {
                    format!("{:?}: {refusal}, but {choice:?} are allowed", task.request)
                })?;
                if is_gone {
                    let is_true =
                        Some(refusal.reason) == task.domain.map(|domain| Reason::UnknownDomain { domain });
                    hold("R11", is_true && refusal.node.is_none(), || {
                        format!("domain {:?} is gone: {refusal}", task.request.domain)
                    })?;
                } else {
                    let wish = task
                        .bound
                        .wish
                        .filter(|_| task.request.mode == Mode::Preferred && !task.request.is_relative());
                    self.check_refusal(&asked, Rights::ALLOC, wish, refusal)?;
                }
                refused(refusal)
            }
            given => {
                let nodes = (task.pass.nodes(), mask_of(&choice.nodes));
                hold("R6", nodes.0 == nodes.1, || {
                    format!("{:?} chooses from {}, not {}", task.request, nodes.0, nodes.1)
                })?;
                let turn = self.model.take_turn(&task.request, &choice, &mut task.turn);
                self.note_given(number, order, &asked, &choice, turn, &room, given, task.is_movable)
            }
        }
    }

    /// R11: what stands between a request and a node, and whether what is advised against it helps.
    pub(super) fn explain(&mut self, node: u16, ask: &Ask) -> Applied {
        let Ok(id) = NodeId::new(node) else { return refused("no such node can be") };
        self.explain_among_others(id, ask)?;
        // Of a mode that takes no nodes it is asked as of bind; the number is the node's own.
        let takes_none = matches!(ask.mode, Mode::Default | Mode::Local);
        let mode = if takes_none { Mode::Bind } else { ask.mode };
        let one = Ask { mode, asked: Some(vec![node]), flags: 1, home: None, ..ask.clone() };
        let asked = match self.asked(&one)? {
            Ok(asked) => asked,
            Err(why) => return refused(why),
        };
        let bound = self.model.bind(&asked.request);
        let is_open = bound.is_some_and(|bound| self.model.choice(&asked.request, &bound).nodes.contains(&node));
        let grants = shown(&self.grants, &asked.request.grants);
        let policy = Policy::new(mode.core(), asked.core.policy.flags(), mask_of(&Set::from([node])));
        let policy = policy.unwrap_or(Policy::DEFAULT);
        let obstacle = self.mm.registry().obstacle(&Request { policy, grants: &grants, ..asked.core }, id);
        let Some(refusal) = obstacle else {
            hold("R11", is_open, || {
                format!("nothing is said to stand between {:?} and node {node}", asked.request)
            })?;
            return Ok(Outcome::Done);
        };
        let is_right = !is_open || matches!(refusal.reason, Reason::TooManyGrants { .. });
        hold("R11", is_right, || format!("{:?} may use node {node}: {refusal}", asked.request))?;
        self.check_refusal(&asked, Rights::ALLOC, None, refusal)?;
        self.follow(&asked, refusal)?;
        Ok(Outcome::Done)
    }

    /// R11: what stands between a request as it is, whatever it names, and a node.
    fn explain_among_others(&self, id: NodeId, ask: &Ask) -> Result<(), Violation> {
        let node = id.get();
        let Ok(asked) = self.asked(ask)? else { return Ok(()) };
        let request = &asked.request;
        let choice = self.model.bind(request).map(|bound| self.model.choice(request, &bound)).unwrap_or_default();
        let grants = shown(&self.grants, &request.grants);
        let registry = self.mm.registry();
        let core = Request { grants: &grants, ..asked.core };
        let said = registry.obstacle(&core, id).map(|refusal| refusal.reason);
        if grants.len() > MAX_SHOWN {
            let is_said = matches!(said, Some(Reason::TooManyGrants { .. } | Reason::Counted { .. }));
            return hold("R11", is_said, || {
                format!("{request:?}, {} grants, node {node}: {said:?}", grants.len())
            });
        }
        let is_allowed = choice.allowed().contains(&node);
        let is_spm = self.model.nodes.get(&node).is_some_and(|known| known.spec.is_spm);
        // Whether there is a mode in which it could be named alone and be had.
        let alone = |policy| registry.admit(&Request { policy, ..core }).is_ok();
        let is_within = alone(Policy::bind(id.into()));
        let is_counted = request.kind() == Kind::Named && request.is_relative();
        let is_true = match said {
            None => is_allowed,
            Some(_) if is_allowed => false,
            Some(Reason::NotDefault { is_spm: said }) => {
                request.kind() == Kind::Default && said == is_spm && is_within
            }
            Some(Reason::NotNamed) => is_within && !is_counted && !request.named().contains(&node),
            Some(Reason::Counted { is_spm: said }) => is_counted && said == is_spm && (is_spm || is_within),
            Some(Reason::NotFirst { first }) => {
                request.mode == Mode::Preferred
                    && request.named().contains(&node)
                    && choice.nodes.first() == Some(&first.get())
                    && first < id
            }
            // Of what it would meet alone the step itself asks.
            Some(_) => {
                let policy = Policy::new(asked.core.policy.mode(), Flags::STATIC_NODES, id.into());
                !alone(policy.unwrap_or(Policy::bind(id.into())))
            }
        };
        hold("R11", is_true, || format!("{request:?}, node {node}: {said:?}"))
    }
}
