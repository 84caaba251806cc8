extern crate std;
use std::vec::Vec;

use super::*;

const MIB: u64 = 1 << 20;
const RAM: Bytes = Bytes::mib(16 << 10);
/// A fault, all in all, ns.
const FAULT_NS: u64 = 30_000;

/// A program that touches its hot pages at random and never the others, one thread.
struct Program {
    now: u64,
    hot: u64,
    size: u64,
    used: u64,
    busy_ns: u64,
    lost_ns: u64,
    budget: AutoBudget,
    /// Limits, from the first look on.
    limits: Vec<u64>,
    slowdowns: Vec<u32>,
}

impl Program {
    fn new(allowed: u32, size: u64, hot: u64) -> Self {
        Self {
            now: 0,
            hot,
            size,
            used: size,
            busy_ns: 0,
            lost_ns: 0,
            budget: AutoBudget::new(allowed, RAM),
            limits: Vec::new(),
            slowdowns: Vec::new(),
        }
    }

    /// An access takes a microsecond, and a miss a fault besides. What left takes a third of its room.
    fn run(&mut self, seconds: u64) {
        for _ in 0..seconds * 1_000_000_000 / LOOK_NS {
            self.look();
        }
    }

    fn look(&mut self) {
        let decision = self.budget.look(&Facts {
            now: Time(self.now),
            used: Bytes(self.used),
            demand: Bytes(self.size),
            busy_ns: self.busy_ns,
            lost_ns: self.lost_ns,
            ceiling: RAM,
        });
        self.limits.push(decision.limit.0);
        self.slowdowns.push(decision.slowdown);
        self.used = self.size.min(decision.limit.0).max(self.size / 3);
        // used = resident + (size - resident) / 3
        let resident = (self.used * 3).saturating_sub(self.size) / 2;
        let missing = self.hot.saturating_sub(resident);
        // Of a look's time, in accesses of a microsecond.
        let a_miss = FAULT_NS * missing / self.hot.max(1);
        let accesses = LOOK_NS / (1000 + a_miss);
        self.busy_ns += accesses * 1000;
        self.lost_ns += accesses * a_miss;
        self.now += LOOK_NS;
    }

    /// The least RAM that keeps all of the hot part.
    fn ideal(&self) -> u64 {
        self.hot + (self.size - self.hot) / 3
    }

    /// How often it went up after it had gone down, from the look `from` on.
    fn turns(&self, from: usize) -> usize {
        let changes = self.limits[from..].windows(2).map(|pair| pair[1].cmp(&pair[0]));
        let moves: Vec<_> = changes.filter(|change| change.is_ne()).collect();
        moves.windows(2).filter(|pair| pair[0].is_lt() && pair[1].is_gt()).count()
    }

    fn total_slowdown(&self) -> u64 {
        per_mille(self.lost_ns, self.busy_ns)
    }
}

#[test]
fn the_budget_comes_down_to_what_the_hot_part_takes() {
    for (size, hot) in [(1024, 100), (1024, 512), (4096, 64), (200, 190), (300, 0)] {
        let mut program = Program::new(50, size * MIB, hot * MIB);
        program.run(120);
        // Not the last one, which may be a try.
        let mut late = program.limits[program.limits.len() - 300..].to_vec();
        late.sort_unstable();
        let (limit, ideal) = (late[150], program.ideal().max(LEAST.0));
        assert!(limit >= ideal * 95 / 100, "{size} {hot}: {} of {} MiB", limit / MIB, ideal / MIB);
        assert!(limit <= ideal * 110 / 100, "{size} {hot}: {} of {} MiB", limit / MIB, ideal / MIB);
    }
}

#[test]
fn the_whole_run_stays_within_the_slow_down() {
    for allowed in [10, 50, 200] {
        for (size, hot) in [(1024, 100), (1024, 512), (4096, 64)] {
            let mut program = Program::new(allowed, size * MIB, hot * MIB);
            program.run(60);
            let lost = program.total_slowdown();
            assert!(lost <= u64::from(allowed), "{allowed} per mille allowed, {size} {hot}: {lost}");
        }
    }
}

#[test]
fn a_budget_that_was_found_is_left_only_for_ever_rarer_tries() {
    let mut program = Program::new(50, 1024 * MIB, 300 * MIB);
    program.run(600);
    let looks = program.limits.len();
    let (early, late) = (program.turns(0), program.turns(looks / 2));
    assert!(early <= 8, "{early} turns in ten minutes");
    assert!(late <= 2, "{late} turns in the last five minutes");
}

#[test]
fn a_hot_part_that_grows_gets_its_ram_within_seconds_and_gives_it_back() {
    let mut program = Program::new(50, 1024 * MIB, 100 * MIB);
    program.run(60);
    program.hot = 500 * MIB;
    program.run(10);
    let limit = *program.limits.last().expect("looks");
    assert!(limit >= program.ideal() * 95 / 100, "{} of {} MiB", limit / MIB, program.ideal() / MIB);
    program.hot = 100 * MIB;
    program.run(120);
    let limit = *program.limits.last().expect("looks");
    assert!(limit <= program.ideal() * 115 / 100, "{} of {} MiB", limit / MIB, program.ideal() / MIB);
}

#[test]
fn a_program_that_grows_is_never_held_up() {
    let mut program = Program::new(50, 64 * MIB, 64 * MIB);
    program.run(30);
    // 1 GiB a second.
    for _ in 0..16 {
        program.size += 256 * MIB;
        program.used = program.size;
        program.hot = program.size;
        program.run(1);
        let limit = *program.limits.last().expect("looks");
        assert!(limit >= program.size, "{} of {} MiB", limit / MIB, program.size / MIB);
    }
}

#[test]
fn nothing_is_asked_of_the_machine_that_it_has_not_got() {
    let mut budget = AutoBudget::new(50, RAM);
    let mut facts = Facts {
        now: Time(0),
        used: Bytes::mib(900),
        demand: Bytes::mib(900),
        busy_ns: 0,
        lost_ns: 0,
        ceiling: Bytes::mib(1000),
    };
    budget.look(&facts);
    for look in 1..100 {
        facts = Facts {
            now: Time(look * LOOK_NS),
            busy_ns: look * LOOK_NS / 2,
            lost_ns: look * LOOK_NS / 2,
            demand: Bytes(facts.demand.0 * 11 / 10),
            ..facts
        };
        assert!(budget.look(&facts).limit <= facts.ceiling);
    }
    assert_eq!(budget.look(&facts).limit, facts.ceiling);
}

#[test]
fn a_try_that_fails_at_once_leaves_a_budget_near_what_is_used() {
    let mut program = Program::new(50, 512 * MIB, 512 * MIB);
    program.run(20);
    let limit = *program.limits.last().expect("looks");
    assert!(limit <= 540 * MIB, "{} MiB", limit / MIB);
}

#[test]
fn a_loss_that_lasts_for_seconds_is_one_failure() {
    let mut program = Program::new(50, 512 * MIB, 64 * MIB);
    program.run(2);
    // Whatever leaves first is missed: it is not known yet what is hot.
    for _ in 0..20 {
        program.lost_ns += LOOK_NS;
        program.look();
    }
    program.run(60);
    let (limit, ideal) = (*program.limits.last().expect("looks"), program.ideal());
    assert!(limit <= ideal * 115 / 100, "{} of {} MiB", limit / MIB, ideal / MIB);
}

#[test]
fn where_nothing_can_leave_the_budget_is_what_is_used() {
    let mut budget = AutoBudget::new(50, RAM);
    let limits: Vec<_> = (0..600)
        .map(|look| {
            let facts = Facts {
                now: Time(look * LOOK_NS),
                used: Bytes::mib(500),
                demand: Bytes::mib(500),
                busy_ns: look * LOOK_NS,
                lost_ns: 0,
                ceiling: RAM,
            };
            budget.look(&facts)
        })
        .collect();
    let held = limits.iter().filter(|decision| decision.limit == Bytes::mib(500)).count();
    assert!(held > 460, "{held} of 600 looks");
    assert!(limits.iter().any(|decision| decision.reason == Reason::Unmovable));
}

#[test]
fn a_program_that_does_nothing_gives_its_ram_back_down_to_the_least() {
    let mut budget = AutoBudget::new(50, RAM);
    let mut used = Bytes::mib(500);
    let mut last = None;
    for look in 0..1000 {
        let decision = budget.look(&Facts {
            now: Time(look * LOOK_NS),
            used,
            demand: Bytes::mib(500),
            busy_ns: 0,
            lost_ns: 0,
            ceiling: RAM,
        });
        used = Bytes(used.0.min(decision.limit.0));
        last = Some(decision);
    }
    assert_eq!(last.expect("looks").limit, LEAST);
}
