//! Heat: from which of the kernel's sources it is known which pages are used.
//!
//! [`choose`] turns what is asked for ([`Wish`]) and what this kernel lets its user do ([`Facts`]) into a [`Source`];
//! [`standing`] says of each source why it is used or not. What a source sees comes in as [`Accessed`]: hotness is a fact.
//! Sources are opened by spmem-node's `heat`, and by the runtime in a program. Hole: what a source costs is not weighed.

use core::fmt;

/// A way to know which pages are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// userfaultfd's RWP_ASYNC and PAGEMAP_SCAN: each page that was accessed, without a fault that anybody serves.
    Rwp,
    /// The holding area: a page that was taken out of its place is used when it comes back.
    Holding,
    /// DAMON on virtual addresses: regions, a page of each sampled.
    Damon,
    /// Idle page tracking: each page whose accessed bit was set, by page frame.
    Idle,
}

impl Source {
    /// All of them, the one that is preferred first.
    pub const ALL: [Self; 4] = [Self::Rwp, Self::Holding, Self::Damon, Self::Idle];

    /// As the configuration has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rwp => "rwp",
            Self::Holding => "holding",
            Self::Damon => "damon",
            Self::Idle => "idle",
        }
    }

    /// Who can ask it. A userfaultfd is the program's own; DAMON and page frames are root's, which a program need not be.
    pub const fn asker(self) -> Asker {
        match self {
            Self::Rwp | Self::Holding => Asker::Within,
            Self::Damon | Self::Idle => Asker::Outside,
        }
    }

    /// What it is, for a person.
    pub const fn summary(self) -> &'static str {
        match self {
            Self::Rwp => "userfaultfd RWP_ASYNC with PAGEMAP_SCAN",
            Self::Holding => "the holding area",
            Self::Damon => "DAMON on virtual addresses",
            Self::Idle => "idle page tracking",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Who wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// What runs inside the program, with the program's rights, and takes its pages out.
    Within,
    /// A supervisor, of any program by its number.
    Outside,
}

impl fmt::Display for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Within => "within a program",
            Self::Outside => "from outside",
        })
    }
}

/// What is asked for: the key `heat` of the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// The best there is.
    #[default]
    Auto,
    /// This one or none, for who can ask it; who cannot takes the best there is.
    Only(Source),
}

/// Why a source cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// The kernel is without it.
    Kernel {
        /// What it would take.
        needs: &'static str,
    },
    /// The caller may not.
    Forbidden {
        /// What it would take.
        needs: &'static str,
    },
    /// There is one of it, and it is in use.
    Taken {
        /// By whom.
        by: &'static str,
    },
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel { needs } => write!(f, "this kernel is without it: it takes {needs}"),
            Self::Forbidden { needs } => write!(f, "not for this user: it takes {needs}"),
            Self::Taken { by } => write!(f, "there is one of it, used by {by}"),
        }
    }
}

/// Which of the kernel's sources cannot be had, and why. The holding area is spmem's own: it takes no more than `spm run`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Of [`Source::Rwp`].
    pub rwp: Option<Lack>,
    /// Of [`Source::Damon`].
    pub damon: Option<Lack>,
    /// Of [`Source::Idle`].
    pub idle: Option<Lack>,
}

impl Facts {
    /// Why a source cannot be had; `None` when it can.
    pub const fn lack(&self, source: Source) -> Option<Lack> {
        match source {
            Source::Rwp => self.rwp,
            Source::Holding => None,
            Source::Damon => self.damon,
            Source::Idle => self.idle,
        }
    }

    fn best(&self, asker: Asker) -> Option<Source> {
        Source::ALL.into_iter().find(|&source| source.asker() == asker && self.lack(source).is_none())
    }
}

/// Why there is no source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The one that is asked for cannot be had.
    Unavailable {
        /// Which.
        source: Source,
        /// Why.
        lack: Lack,
        /// What could be had in its place.
        instead: Option<Source>,
    },
    /// None can be had.
    Nothing,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable { source, lack, instead } => {
                write!(f, "heat = \"{source}\" cannot be had: {lack}; ")?;
                match instead {
                    Some(instead) => write!(f, "heat = \"{instead}\" would work here, and is what \"auto\" takes"),
                    None => f.write_str("and nothing else would work here; \"auto\" does without"),
                }
            }
            Self::Nothing => f.write_str("this kernel tells nobody from outside which pages a program uses"),
        }
    }
}

impl core::error::Error for Refusal {}

/// The source that is used.
///
/// # Errors
/// [`Refusal`]: the one that is asked for cannot be had, or none can.
///
/// ```
/// use spmem_core::heat::{Asker, Facts, Lack, Source, Wish, choose};
/// let old = Facts { rwp: Some(Lack::Kernel { needs: "Linux 7.3" }), ..Facts::default() };
/// assert_eq!(choose(Wish::Auto, &old, Asker::Within), Ok(Source::Holding));
/// assert_eq!(choose(Wish::Auto, &old, Asker::Outside), Ok(Source::Damon));
/// assert!(choose(Wish::Only(Source::Rwp), &old, Asker::Within).is_err());
/// ```
pub fn choose(wish: Wish, facts: &Facts, asker: Asker) -> Result<Source, Refusal> {
    match wish {
        Wish::Only(source) if source.asker() == asker => match facts.lack(source) {
            None => Ok(source),
            Some(lack) => Err(Refusal::Unavailable { source, lack, instead: facts.best(asker) }),
        },
        Wish::Auto | Wish::Only(_) => facts.best(asker).ok_or(Refusal::Nothing),
    }
}

/// How a source stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Who asks gets this one.
    Chosen,
    /// It could be had; another is asked for, or preferred.
    Passed {
        /// Which.
        by: Source,
    },
    /// It could be had, but what is asked for cannot.
    Unasked,
    /// It cannot be had.
    Lacking(Lack),
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen => f.write_str("chosen"),
            Self::Passed { by } => write!(f, "could be had; {by} is chosen"),
            Self::Unasked => f.write_str("could be had; another is asked for, which cannot"),
            Self::Lacking(lack) => write!(f, "{lack}"),
        }
    }
}

/// Whether a source is used, and why not.
pub fn standing(source: Source, wish: Wish, facts: &Facts) -> Standing {
    if let Some(lack) = facts.lack(source) {
        return Standing::Lacking(lack);
    }
    match choose(wish, facts, source.asker()) {
        Ok(used) if used == source => Standing::Chosen,
        Ok(used) => Standing::Passed { by: used },
        Err(_) => Standing::Unasked,
    }
}

/// Pages next to each other that were used alike between two looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accessed {
    /// First address.
    pub start: usize,
    /// First address behind.
    pub end: usize,
    /// In how many of `samples` an access was seen; not 0. Where each page is looked at, 1 of 1.
    pub seen: u32,
    /// How many times it was looked at since the last look.
    pub samples: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    const LACK: Lack = Lack::Kernel { needs: "another" };

    fn all_facts() -> impl Iterator<Item = Facts> {
        (0..8_u8).map(|bits| {
            let of = |bit: u8| (bits >> bit & 1 == 1).then_some(LACK);
            Facts { rwp: of(0), damon: of(1), idle: of(2) }
        })
    }

    #[test]
    fn a_program_always_has_a_source_and_rwp_where_the_kernel_has_it() {
        for facts in all_facts() {
            let expected = if facts.rwp.is_none() { Source::Rwp } else { Source::Holding };
            assert_eq!(choose(Wish::Auto, &facts, Asker::Within), Ok(expected));
        }
    }

    #[test]
    fn from_outside_it_is_damon_then_idle_pages_then_nothing() {
        for facts in all_facts() {
            let expected = match (facts.damon, facts.idle) {
                (None, _) => Ok(Source::Damon),
                (Some(_), None) => Ok(Source::Idle),
                (Some(_), Some(_)) => Err(Refusal::Nothing),
            };
            assert_eq!(choose(Wish::Auto, &facts, Asker::Outside), expected);
        }
    }

    #[test]
    fn what_is_forced_is_chosen_or_refused_with_what_would_work() {
        for facts in all_facts() {
            for source in Source::ALL {
                let auto = choose(Wish::Auto, &facts, source.asker()).ok();
                match choose(Wish::Only(source), &facts, source.asker()) {
                    Ok(used) => assert!(used == source && facts.lack(source).is_none()),
                    Err(Refusal::Unavailable { source: refused, lack, instead }) => {
                        assert_eq!((refused, Some(lack), instead), (source, facts.lack(source), auto));
                    }
                    Err(Refusal::Nothing) => panic!("{source} was asked for"),
                }
            }
        }
    }

    #[test]
    fn what_is_forced_on_one_side_leaves_the_other_its_best() {
        for (facts, source) in all_facts().flat_map(|facts| Source::ALL.map(|source| (facts, source))) {
            let other = if source.asker() == Asker::Within { Asker::Outside } else { Asker::Within };
            assert_eq!(choose(Wish::Only(source), &facts, other), choose(Wish::Auto, &facts, other));
        }
    }

    #[test]
    fn exactly_the_chosen_source_stands_as_chosen() {
        for facts in all_facts() {
            for wish in core::iter::once(Wish::Auto).chain(Source::ALL.map(Wish::Only)) {
                for source in Source::ALL {
                    let is_chosen = standing(source, wish, &facts) == Standing::Chosen;
                    let chosen = choose(wish, &facts, source.asker());
                    assert_eq!(is_chosen, chosen == Ok(source), "{source} {wish:?} {facts:?}");
                }
            }
        }
    }
}
