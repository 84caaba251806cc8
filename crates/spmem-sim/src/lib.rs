//! Simulation: machines of many nodes and terabytes, on the memory manager that the runtime uses.
//!
//! A [`World`] is a machine and a plain model of it, side by side. A [`Step`] is something that happens to it: a node
//! or a range of it comes or goes, a mask or a policy changes, a grant is made, narrowed, revoked or runs out, somebody
//! allocates, pins or frees.
//! [`World::apply`] performs a step and holds what the memory manager did against the model, rule by rule; what
//! differs is a [`Violation`] that names the rule. [`Generator`] makes steps from a seed, favouring what goes wrong at
//! the edges; a trace is a sequence of steps as lines of JSON ([`trace`]), to be kept and replayed.
//!
//! Nothing here depends on the time, the machine or the order of threads: a seed is a run.

mod check;
mod generate;
mod machine;
mod model;
pub mod program;
mod step;
pub mod trace;
mod world;

pub use self::check::Violation;
pub use self::generate::Generator;
pub use self::machine::Shape;
pub use self::step::{Ask, GateName, Mode, Step, Telemetry, Terms};
pub use self::world::{Checks, Outcome, World};
