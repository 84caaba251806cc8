//! Compressed memory (R17, R18): devices with a limit of their own, whose pages turn out as they please. What core admits is held
//! against sums, and the device against its capacity. Devices stand beside the nodes: what is theirs is numbers.

use spmem_core::compressed::{
    Allocation, Burst, Change, Converging, Gate, Health, Key, NotAdmitted, Ratio, Reading, STALE_NS, Settings,
    Supply, TearingDown,
};
use spmem_core::frames::MAX_FRAMES;
use spmem_core::units::{Bytes, FrameCount, PAGE_SIZE, Time};
use spmem_core::watermark::Watermarks;

use super::{Applied, Outcome, World, refused};
use crate::check::{Violation, hold};
use crate::step::{GateName, Telemetry};

/// What a device promises, per mille.
const ADVERTISED: u64 = 2500;
/// Frames that its balloon moves at a time.
const STEP: u64 = 32;

/// A device, what core knows of it, and what is so.
#[derive(Debug)]
pub(super) struct Device {
    supply: Supply,
    keys: [Option<AnyKey>; 3],
    capacity: u64,
    /// Pages that it can hold back from its measure.
    waiting: u64,
    /// What each page takes, oldest first: no more than 4096 bytes.
    takes: Vec<u64>,
    /// What it said last.
    said: Option<u64>,
    /// By the model: the last news, what had entered and left by then, and when they came.
    heard: Option<(u64, (u64, u64), u64)>,
    entered: u64,
    left: u64,
    /// What may still enter where it is dead, bytes.
    dead: Option<u64>,
    /// The ratio by the last news, and the number of pages there.
    ratio: Option<u64>,
}

#[derive(Debug)]
enum AnyKey {
    Allocation(Key<Allocation>),
    Converging(Key<Converging>),
    TearingDown(Key<TearingDown>),
}

impl GateName {
    const fn core(self) -> Gate {
        match self {
            Self::Allocation => Gate::Allocation,
            Self::Converging => Gate::Converging,
            Self::TearingDown => Gate::TearingDown,
        }
    }
}

impl Device {
    fn reserve(&self) -> u64 {
        self.waiting * PAGE_SIZE
    }

    fn frames(&self) -> u64 {
        self.capacity * ADVERTISED / 1000 / PAGE_SIZE
    }

    /// What may still enter: the last news, and all since in full.
    fn room(&self) -> u64 {
        let Some((used, covered, _)) = self.heard else { return 0 };
        let since = (self.entered - covered.0) * PAGE_SIZE;
        self.capacity.saturating_sub(used + since + self.reserve())
    }

    /// Silence becomes death.
    fn age(&mut self, now: u64) {
        if let Some((_, _, at)) = self.heard
            && self.dead.is_none()
            && now.saturating_sub(at) >= STALE_NS
        {
            self.dead = Some(self.reserve());
        }
    }

    /// R18: never more than there is, whatever the pages take.
    fn check(&self) -> Result<(), Violation> {
        let (used, capacity) = (self.takes.iter().sum::<u64>(), self.capacity);
        hold("R18", used <= capacity, || format!("a device of {capacity} bytes is overrun: {used}"))?;
        let room = self.supply.room();
        hold("R18", room.left().0 == self.room(), || format!("{room:?}: there are {} left", self.room()))
    }
}

impl World {
    /// A compressing device appears; one of that number before is gone.
    pub(super) fn add_device(&mut self, number: u8, frames: u64, waiting: u64) -> Applied {
        if frames == 0 || frames > MAX_FRAMES || waiting > MAX_FRAMES {
            return refused("a device has 1 to 2^32 frames, of which no more wait");
        }
        let burst = Burst::Device { dirty_lines: waiting, granule: Bytes(PAGE_SIZE) };
        let settings = Settings { balloon_step: FrameCount(STEP), ..Settings::new(Ratio(ADVERTISED), burst) };
        let device = Device {
            supply: Supply::new(settings),
            keys: [None, None, None],
            capacity: frames * PAGE_SIZE,
            waiting,
            takes: Vec::new(),
            said: None,
            heard: None,
            entered: 0,
            left: 0,
            dead: None,
            ratio: None,
        };
        self.devices.insert(number, device);
        Ok(Outcome::Done)
    }

    /// R18: a page that turns out to take so much asks to enter.
    pub(super) fn enter(&mut self, number: u8, takes: u64) -> Applied {
        let now = self.model.now;
        let Some(device) = self.devices.get_mut(&number) else { return refused("no device") };
        let is_shut = device.keys.iter().any(Option::is_some);
        let is_owed = device.heard.is_some_and(|(_, covered, _)| covered != (device.entered, device.left));
        if !is_shut && is_owed {
            device.age(now);
        }
        let room = device.room();
        let left = device.dead.map_or(room, |budget| budget.min(room));
        let may_enter = !is_shut && device.heard.is_some() && left >= PAGE_SIZE;
        let admitted = device.supply.admit(Time(now), Bytes(PAGE_SIZE));
        hold("R18", admitted.is_ok() == may_enter, || {
            format!("device {number}, {left} bytes left, shut: {is_shut}: {admitted:?}")
        })?;
        match admitted {
            Ok(admission) => {
                device.supply.entered(admission);
                device.entered += 1;
                device.dead = device.dead.map(|budget| budget - PAGE_SIZE);
                device.takes.push(takes.min(PAGE_SIZE));
                device.check()?;
                Ok(Outcome::Done)
            }
            Err(refusal) => {
                let is_true = match refusal {
                    NotAdmitted::Gate(gate) => device.keys[gate as usize].is_some(),
                    NotAdmitted::Unheard => device.heard.is_none(),
                    NotAdmitted::Dead { budget, .. } => device.dead.is_some() && budget.0 == left,
                    NotAdmitted::Reserve { room, wanted } => {
                        device.dead.is_none() && room.left().0 == left && wanted.0 == PAGE_SIZE
                    }
                };
                hold("R11", is_true, || format!("device {number}, {left} bytes left: {refusal}"))?;
                refused(refusal)
            }
        }
    }

    /// The oldest or the newest page leaves a device.
    pub(super) fn leave(&mut self, number: u8, is_oldest: bool) -> Applied {
        let Some(device) = self.devices.get_mut(&number) else { return refused("no device") };
        if device.takes.is_empty() {
            return refused("no page");
        }
        let at = if is_oldest { 0 } else { device.takes.len() - 1 };
        device.takes.remove(at);
        device.left += 1;
        device.supply.left(Bytes(PAGE_SIZE));
        device.check()?;
        Ok(Outcome::Done)
    }

    /// The device is asked, and what follows is done: R18 and what the balloon holds.
    pub(super) fn measure(&mut self, number: u8, telemetry: Telemetry) -> Applied {
        let now = self.model.now;
        let Some(device) = self.devices.get_mut(&number) else { return refused("no device") };
        let waiting = usize::try_from(device.waiting).unwrap_or(usize::MAX);
        let actual = device.takes.iter().rev().skip(waiting).sum();
        let said = match telemetry {
            Telemetry::Silent => None,
            Telemetry::Stuck => device.said.or(Some(actual)),
            Telemetry::True => Some(actual),
        };
        device.said = said.or(device.said);
        let counts = (device.entered, device.left);
        let is_news = said
            .filter(|&used| device.heard.is_none_or(|(before, covered, _)| counts == covered || used != before));
        if let Some(used) = is_news {
            device.heard = Some((used, counts, now));
            device.dead = None;
            let stored = u128::from(counts.0 - counts.1) * u128::from(PAGE_SIZE);
            let ratio = (stored > 0 && used > 0).then(|| stored * 1000 / u128::from(used));
            device.ratio = ratio.and_then(|ratio| u64::try_from(ratio).ok());
        } else {
            device.age(now);
        }
        let reading = said.map(|used| Reading { capacity: Bytes(device.capacity), used: Bytes(used) });
        let mark = device.supply.mark();
        let health = device.supply.observe(Time(now), mark, reading);
        let is_so = match health {
            Health::Unheard => device.heard.is_none(),
            Health::Live => device.heard.is_some() && device.dead.is_none(),
            Health::Dead { since } => device.dead.is_some() && device.heard.is_some_and(|(.., at)| at == since.0),
        };
        hold("R18", is_so, || format!("device {number} is {health:?}, last heard {:?}", device.heard))?;
        device.check()?;
        Self::balloon(number, device)
    }

    /// What pressure says, and a step of the balloon.
    fn balloon(number: u8, device: &mut Device) -> Applied {
        let frames = device.frames();
        let plan = device.supply.plan(FrameCount(frames), &Watermarks::default());
        let (room, ease) = (device.room(), device.capacity / 8);
        let is_right = if device.heard.is_none() || room == 0 {
            plan.pressure == 1000
        } else {
            plan.pressure <= 1000 && (room >= ease || plan.pressure > 0)
        };
        hold("R18", is_right, || format!("device {number}: {room} bytes left, pressure {}", plan.pressure))?;
        let is_shut = device.keys.iter().any(Option::is_some);
        let left = device.dead.map_or(room, |budget| budget.min(room));
        hold("R18", plan.is_demotion_on == (!is_shut && left >= PAGE_SIZE), || {
            format!("device {number}: {left} bytes left, shut: {is_shut}, demotion: {}", plan.is_demotion_on)
        })?;
        hold("R18", device.supply.ratio().map(|ratio| ratio.0) == device.ratio, || {
            format!("device {number}: the ratio is {:?}, not {:?}", device.supply.ratio(), device.ratio)
        })?;
        let balloon = device.supply.balloon_mut();
        if let Some(ratio) = device.ratio {
            let target =
                u128::from(frames) * u128::from(ADVERTISED.saturating_sub(ratio)) / u128::from(ADVERTISED);
            hold("R18", u128::from(balloon.aimed_at().0) == target, || {
                format!("device {number}: the balloon aims at {}, not {target}", balloon.aimed_at())
            })?;
        }
        let before = balloon.held().0.abs_diff(balloon.aimed_at().0);
        match plan.balloon {
            Change::Take(count) => balloon.took(count),
            Change::Give(count) => balloon.gave(count),
            Change::Stay => {}
        }
        let after = balloon.held().0.abs_diff(balloon.aimed_at().0);
        hold("R18", after == before - before.min(STEP), || {
            format!("device {number}: the balloon was off by {before} frames, now by {after}")
        })?;
        Ok(Outcome::Done)
    }

    /// R18: who shuts a gate gets the only key.
    pub(super) fn shut(&mut self, number: u8, name: GateName) -> Applied {
        let Some(device) = self.devices.get_mut(&number) else { return refused("no device") };
        let gates = device.supply.gates_mut();
        let key = match name {
            GateName::Allocation => gates.set().map(AnyKey::Allocation),
            GateName::Converging => gates.set().map(AnyKey::Converging),
            GateName::TearingDown => gates.set().map(AnyKey::TearingDown),
        };
        let slot = &mut device.keys[name.core() as usize];
        hold("R18", key.is_ok() == slot.is_none(), || format!("device {number}: {name:?} is {slot:?}: {key:?}"))?;
        match key {
            Ok(key) => {
                *slot = Some(key);
                Ok(Outcome::Done)
            }
            Err(is_set) => refused(is_set),
        }
    }

    /// R18: a gate is opened by its key only; `with` is the device whose key is tried.
    pub(super) fn open_gate(&mut self, number: u8, name: GateName, with: u8) -> Applied {
        let at = name.core() as usize;
        let key = self.devices.get_mut(&with).and_then(|device| device.keys[at].take());
        let Some(key) = key else { return refused("no key") };
        let Some(device) = self.devices.get_mut(&number) else {
            self.give_key_back(with, at, key);
            return refused("no device");
        };
        let was_set = device.supply.gates().is_set(name.core());
        let gates = device.supply.gates_mut();
        let cleared = match key {
            AnyKey::Allocation(key) => gates.clear(key).map_err(AnyKey::Allocation),
            AnyKey::Converging(key) => gates.clear(key).map_err(AnyKey::Converging),
            AnyKey::TearingDown(key) => gates.clear(key).map_err(AnyKey::TearingDown),
        };
        let is_set = device.supply.gates().is_set(name.core());
        let is_right =
            if with == number { cleared.is_ok() && !is_set } else { cleared.is_err() && is_set == was_set };
        hold("R18", is_right, || format!("{name:?} of device {number} with the key of {with}: {cleared:?}"))?;
        match cleared {
            Ok(()) => Ok(Outcome::Done),
            Err(key) => {
                self.give_key_back(with, at, key);
                refused("another's key")
            }
        }
    }

    fn give_key_back(&mut self, number: u8, at: usize, key: AnyKey) {
        if let Some(device) = self.devices.get_mut(&number) {
            device.keys[at] = Some(key);
        }
    }
}
