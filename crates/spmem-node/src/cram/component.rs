//! The component: where each page is, and how it gets from one place to the other.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use spmem_core::compressed::{Converging, Gate, Key, NotAdmitted, Plan, Settings, Supply};
use spmem_core::frames::Metadata;
use spmem_core::mm::Block;
use spmem_core::node::{Class, Services};
use spmem_core::units::{Bytes, DomainId, FrameCount, FrameNumber, NodeId, PAGE_SIZE, Time};
use spmem_core::watermark::Watermarks;
use spmem_core::zero::Initial;

use super::error::{Denied, Hurt, SetupRefused, Ticket, Why};
use super::teardown::Emptied;
use super::{PageId, Telemetry, UNFIT_ABOVE_PER_MILLE};
use crate::backend::{Backend, Damage, Handle, PAGE_BYTES, Page};
use crate::mapped::{MappedNode, Medium, Refused, mapped_spec};

/// What a page counts for until it is measured: it may not compress at all.
pub(super) const WHOLE: Bytes = Bytes(PAGE_SIZE);
/// Reports of lost pages that are kept; the oldest give way. Whoever touches such a page is told all the same.
const MAX_HURTS: usize = 1024;

/// A node of compressed memory, and the pages of the programs that use it.
#[derive(Debug)]
pub struct Cram<D> {
    pub(super) node: MappedNode<D>,
    pub(super) supply: Supply,
    pub(super) marks: Watermarks,
    pub(super) perceived: FrameCount,
    sysram: FrameCount,
    pub(super) programs: BTreeMap<DomainId, Program>,
    pub(super) pages: BTreeMap<PageId, Entry>,
    /// Whose page is in a frame of the node.
    pub(super) in_frame: BTreeMap<FrameNumber, PageId>,
    pub(super) balloon: Vec<Block>,
    pub(super) converging: Option<Key<Converging>>,
    /// The balloon got nothing when it was last to take something.
    pub(super) is_stalled: bool,
    pub(super) emptying: Option<Emptied>,
    pub(super) hurts: VecDeque<Hurt>,
    pub(super) next_ticket: u64,
    pub(super) last_plan: Option<Plan>,
}

/// A program: how much sysram it may have and has.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) limit: FrameCount,
    pub(super) resident: FrameCount,
    /// Its pages in sysram, by address, the next to leave first.
    pub(super) clock: VecDeque<u64>,
    /// Who waits for a frame, in order.
    pub(super) waiting: VecDeque<Ticket>,
}

#[derive(Debug)]
pub(super) enum Entry {
    Sysram {
        bytes: Box<Page>,
        is_used: bool,
        /// It did not compress, and was not written since.
        is_unfit: bool,
    },
    Device(Handle),
    Lost(Hurt),
}

/// Where pages are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Pages in sysram.
    pub sysram: FrameCount,
    /// Pages on the device.
    pub device: FrameCount,
    /// Pages that are lost and not given up yet.
    pub lost: FrameCount,
}

impl<D: Medium + Telemetry> Cram<D> {
    /// A component over a device, with so many frames of sysram for all programs together. `change` may change the settings
    /// that follow from what the device says of itself; `marks` are the node's watermarks before any boost.
    ///
    /// # Errors
    /// [`SetupRefused::Node`].
    pub fn new(
        device: D,
        node: NodeId,
        sysram: FrameCount,
        lent: Metadata,
        marks: Watermarks,
        change: impl FnOnce(&mut Settings),
    ) -> Result<Self, SetupRefused> {
        let mut settings = Settings::new(device.advertised(), device.burst());
        change(&mut settings);
        let services = Services::RECLAIM | Services::MIGRATION | Services::WRITE_FENCE;
        let spec = mapped_spec(Class::Featured, services, "cram");
        let perceived = Bytes(device.len()).frames_floor();
        let node = MappedNode::new(device, node, spec, lent, Initial::Unknown).map_err(SetupRefused::Node)?;
        Ok(Self {
            node,
            supply: Supply::new(settings),
            marks,
            perceived,
            sysram,
            programs: BTreeMap::new(),
            pages: BTreeMap::new(),
            in_frame: BTreeMap::new(),
            balloon: Vec::new(),
            converging: None,
            is_stalled: false,
            emptying: None,
            hurts: VecDeque::new(),
            next_ticket: 0,
            last_plan: None,
        })
    }

    /// A program that may have so many frames of sysram: it has a right to them, whatever others do.
    ///
    /// # Errors
    /// [`SetupRefused::Limit`] where they are promised to others, [`SetupRefused::NoFrame`], [`SetupRefused::Domain`].
    pub fn create_program(&mut self, name: &str, limit: FrameCount) -> Result<DomainId, SetupRefused> {
        let promised: u64 = self.programs.values().map(|program| program.limit.0).sum();
        let left = FrameCount(self.sysram.0 - promised);
        if limit > left {
            return Err(SetupRefused::Limit { wanted: limit, left });
        }
        if limit.0 == 0 {
            return Err(SetupRefused::NoFrame);
        }
        let registry = self.node.frames_mut().mm_mut().registry_mut();
        let domain = registry.create_domain(DomainId::ROOT, name).map_err(SetupRefused::Domain)?;
        let (clock, waiting) = (VecDeque::new(), VecDeque::new());
        self.programs.insert(domain, Program { limit, resident: FrameCount(0), clock, waiting });
        Ok(domain)
    }

    /// A program has ended: its pages are needed no more, its limit is free for others, and none of its writers waits.
    pub fn remove_program(&mut self, program: DomainId) {
        let whole = PageId { owner: program, address: 0 }..=PageId { owner: program, address: u64::MAX };
        let pages: Vec<PageId> = self.pages.range(whole).map(|(&id, _)| id).collect();
        pages.into_iter().for_each(|id| self.discard(id));
        if self.programs.remove(&program).is_some() {
            let removed = self.node.frames_mut().mm_mut().registry_mut().remove_domain(program);
            assert!(removed.is_ok(), "a program's domain has nothing below it and no page left: {removed:?}");
        }
    }

    /// Copies a page out, from where it is (R17). What comes from the device is checked.
    ///
    /// # Errors
    /// [`Denied::NoPage`], [`Denied::Hurt`].
    pub fn read(&mut self, id: PageId, into: &mut Page) -> Result<(), Denied> {
        match self.pages.get_mut(&id).ok_or(Denied::NoPage)? {
            Entry::Sysram { bytes, is_used, .. } => {
                *is_used = true;
                into.copy_from_slice(&bytes[..]);
                Ok(())
            }
            Entry::Device(handle) => {
                let handle = *handle;
                self.node.load(handle, into).map_err(|corrupt| Denied::Hurt(self.lose(id, handle, corrupt.damage)))
            }
            Entry::Lost(hurt) => Err(Denied::Hurt(*hurt)),
        }
    }

    /// Writes bytes of a page, in sysram: one that lies on the device moves there first (R17), a new one begins as zeros. `ticket`
    /// is from the last try that had to wait.
    ///
    /// # Errors
    /// [`Denied`]; the page is as it was. After [`Denied::Wait`], [`Cram::poll`] and try again, or [`Cram::give_up`].
    pub fn write(
        &mut self,
        now: Time,
        id: PageId,
        offset: usize,
        bytes: &[u8],
        ticket: Option<Ticket>,
    ) -> Result<(), Denied> {
        let end = offset.checked_add(bytes.len()).filter(|&end| end <= PAGE_BYTES);
        let range = offset..end.filter(|_| id.address.is_multiple_of(PAGE_SIZE)).ok_or(Denied::OutOfPage)?;
        if let Some(Entry::Sysram { bytes: page, is_used, is_unfit }) = self.pages.get_mut(&id) {
            page[range].copy_from_slice(bytes);
            (*is_used, *is_unfit) = (true, false);
            self.leave_queue(id.owner, ticket);
            return Ok(());
        }
        if let Some(Entry::Lost(hurt)) = self.pages.get(&id) {
            let hurt = *hurt;
            self.leave_queue(id.owner, ticket);
            return Err(Denied::Hurt(hurt));
        }
        self.make_room(now, id, ticket)?;
        let mut page = Box::new([0; PAGE_BYTES]);
        if let Some(Entry::Device(handle)) = self.pages.get(&id) {
            let handle = *handle;
            self.node
                .load(handle, &mut page)
                .map_err(|corrupt| Denied::Hurt(self.lose(id, handle, corrupt.damage)))?;
            self.release(handle);
        }
        page[range].copy_from_slice(bytes);
        self.settle(id, page);
        Ok(())
    }

    /// A page is needed no more.
    pub fn discard(&mut self, id: PageId) {
        match self.pages.remove(&id) {
            Some(Entry::Device(handle)) => self.release(handle),
            Some(Entry::Sysram { .. }) => {
                if let Some(program) = self.programs.get_mut(&id.owner) {
                    program.resident.0 -= 1;
                    program.clock.retain(|&address| address != id.address);
                }
            }
            Some(Entry::Lost(_)) | None => {}
        }
    }

    /// A page lies in sysram from now on.
    pub(super) fn settle(&mut self, id: PageId, bytes: Box<Page>) {
        self.pages.insert(id, Entry::Sysram { bytes, is_used: true, is_unfit: false });
        let program = self.programs.get_mut(&id.owner).expect("a page is some program's");
        program.resident.0 += 1;
        program.clock.push_back(id.address);
    }

    /// Moves a page of sysram to the device, if it may enter.
    pub(super) fn demote(&mut self, now: Time, id: PageId) -> Result<(), Why> {
        let Some(Entry::Sysram { bytes, is_unfit, .. }) = self.pages.get_mut(&id) else { return Ok(()) };
        let weight = self.node.medium().weigh(bytes);
        if *is_unfit || weight.is_some_and(|weight| weight.0 > PAGE_SIZE * UNFIT_ABOVE_PER_MILLE / 1000) {
            *is_unfit = true;
            return Err(Why::Incompressible);
        }
        let admission = self.supply.admit(now, WHOLE).map_err(Why::NotAdmitted)?;
        match self.node.demote(id.owner, bytes) {
            Ok(handle) => {
                self.supply.entered(admission);
                self.in_frame.insert(frame_of(handle), id);
                self.pages.insert(id, Entry::Device(handle));
                let program = self.programs.get_mut(&id.owner).expect("a page is some program's");
                program.resident.0 -= 1;
                Ok(())
            }
            Err(refused) => {
                self.supply.cancelled(admission);
                Err(Why::Refused(refused))
            }
        }
    }

    /// A frame of the device is free again.
    pub(super) fn release(&mut self, handle: Handle) {
        let released: Result<(), Refused> = self.node.release(handle);
        assert!(released.is_ok(), "a page of this component is on its node: {released:?}");
        self.in_frame.remove(&frame_of(handle));
        self.supply.left(WHOLE);
    }

    /// A page of the device is lost: its owner is told, its frame goes out of use, nobody else is touched (R20).
    pub(super) fn lose(&mut self, id: PageId, handle: Handle, damage: Damage) -> Hurt {
        let frame = frame_of(handle);
        let hurt = Hurt { page: id, node: self.node.node(), frame: Some(frame), damage };
        // The frame is this node's: a page was in it.
        let _ = self.node.poison(frame);
        self.release(handle);
        self.pages.insert(id, Entry::Lost(hurt));
        if self.hurts.len() == MAX_HURTS {
            self.hurts.pop_front();
        }
        self.hurts.push_back(hurt);
        hurt
    }

    /// The next lost page that nobody was told of here.
    pub fn take_hurt(&mut self) -> Option<Hurt> {
        self.hurts.pop_front()
    }

    /// Where pages are. Looks at all of them.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        for entry in self.pages.values() {
            match entry {
                Entry::Sysram { .. } => usage.sysram.0 += 1,
                Entry::Device(_) => usage.device.0 += 1,
                Entry::Lost(_) => usage.lost.0 += 1,
            }
        }
        usage
    }

    /// Frames of sysram that a program has in use.
    pub fn resident(&self, program: DomainId) -> FrameCount {
        self.programs.get(&program).map_or(FrameCount(0), |program| program.resident)
    }

    /// Whether a page lies on the device.
    pub fn is_on_device(&self, id: PageId) -> bool {
        matches!(self.pages.get(&id), Some(Entry::Device(_)))
    }

    /// What is known of the device's memory: ratio, trend, pressure, gates.
    pub const fn supply(&self) -> &Supply {
        &self.supply
    }

    /// The same, for who has a gate to set or clear.
    pub const fn supply_mut(&mut self) -> &mut Supply {
        &mut self.supply
    }

    /// The node.
    pub const fn node(&self) -> &MappedNode<D> {
        &self.node
    }
}

/// Whether a refusal of the device's memory will be decided without its owner.
pub(super) const fn will_pass(cause: &NotAdmitted, is_stalled: bool) -> bool {
    let is_converging = matches!(cause, NotAdmitted::Gate(Gate::Converging));
    cause.may_pass() && !(is_converging && is_stalled)
}

/// The frame that a handle of a mapped node names.
fn frame_of(handle: Handle) -> FrameNumber {
    FrameNumber(u32::try_from(handle.raw() & 0xffff_ffff).expect("masked"))
}
