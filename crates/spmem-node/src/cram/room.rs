//! Room: a frame of sysram for a page that is to be written, or who must leave for it.

use spmem_core::units::{DomainId, Time};

use super::component::{Cram, Entry, will_pass};
use super::error::{Denied, Ticket, Why};
use super::{PageId, Telemetry};
use crate::mapped::{Medium, Refused};

/// What reclaim of a program's pages came to.
enum Reclaimed {
    /// A frame is free.
    Freed,
    /// It cannot be said yet.
    Pending,
    /// Nothing can leave.
    Stuck(Why),
}

impl<D: Medium + Telemetry> Cram<D> {
    /// Sees to it that the program of a page has a frame for it: in turn, below its limit, if need be by demoting a page of its
    /// own.
    pub(super) fn make_room(&mut self, now: Time, id: PageId, ticket: Option<Ticket>) -> Result<(), Denied> {
        let program = self.programs.get(&id.owner).ok_or(Denied::UnknownProgram)?;
        let is_first = program.waiting.front().is_none_or(|&first| ticket == Some(first));
        if !is_first {
            return Err(Denied::Wait(self.enqueue(id.owner, ticket)));
        }
        let limit = program.limit;
        if program.resident >= limit {
            match self.reclaim(now, id.owner) {
                Reclaimed::Freed => {}
                Reclaimed::Pending => return Err(Denied::Wait(self.enqueue(id.owner, ticket))),
                Reclaimed::Stuck(why) => {
                    self.leave_queue(id.owner, ticket);
                    return Err(Denied::OverLimit { page: id, limit, why });
                }
            }
        }
        self.leave_queue(id.owner, ticket);
        Ok(())
    }

    fn enqueue(&mut self, owner: DomainId, ticket: Option<Ticket>) -> Ticket {
        let Some(program) = self.programs.get_mut(&owner) else { return Ticket(0) };
        if let Some(known) = ticket.filter(|ticket| program.waiting.contains(ticket)) {
            return known;
        }
        self.next_ticket += 1;
        program.waiting.push_back(Ticket(self.next_ticket));
        Ticket(self.next_ticket)
    }

    /// Who waited has what he waited for, or does not want it any more.
    pub(super) fn leave_queue(&mut self, owner: DomainId, ticket: Option<Ticket>) {
        if let (Some(ticket), Some(program)) = (ticket, self.programs.get_mut(&owner)) {
            program.waiting.retain(|&waiting| waiting != ticket);
        }
    }

    /// A writer gives up waiting: those behind him are next.
    pub fn give_up(&mut self, owner: DomainId, ticket: Ticket) {
        self.leave_queue(owner, Some(ticket));
    }

    /// Demotes one page of a program, the first of its clock that was not used since the hand came by; each page is looked at
    /// twice at most.
    fn reclaim(&mut self, now: Time, owner: DomainId) -> Reclaimed {
        let looks = self.programs.get(&owner).map_or(0, |program| 2 * program.clock.len());
        let mut refused = None;
        for _ in 0..looks {
            let Some(program) = self.programs.get_mut(&owner) else { break };
            let Some(address) = program.clock.pop_front() else { break };
            let id = PageId { owner, address };
            if let Some(Entry::Sysram { is_used, .. }) = self.pages.get_mut(&id)
                && core::mem::take(is_used)
            {
                self.return_to_clock(id);
                continue;
            }
            match self.demote(now, id) {
                Ok(()) => return Reclaimed::Freed,
                Err(Why::Incompressible) => self.return_to_clock(id),
                Err(why) => {
                    self.return_to_clock(id);
                    match why {
                        Why::NotAdmitted(cause) if will_pass(&cause, self.is_stalled) => {
                            return Reclaimed::Pending;
                        }
                        // The medium failed at these frames, which are out of use now; others may do.
                        Why::Refused(Refused::Medium(_) | Refused::Corrupt(_)) => refused = Some(why),
                        _ => return Reclaimed::Stuck(why),
                    }
                }
            }
        }
        Reclaimed::Stuck(refused.unwrap_or(Why::Incompressible))
    }

    fn return_to_clock(&mut self, id: PageId) {
        if let Some(program) = self.programs.get_mut(&id.owner) {
            program.clock.push_back(id.address);
        }
    }
}
