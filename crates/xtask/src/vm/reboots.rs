//! The part of `cargo xtask vm-test` that boots more than once: a persistent node through power cuts and orderly ends.
//!
//! [`check`] boots [`vm_reboots`](crate::programs) again and again on one medium, a file of this machine's. A power cut is QEMU killed
//! while the program writes: what the guest has stored to the medium is there, what its page cache had is not. Hole: an emulated
//! processor has no caches, so a store that was not written back is never lost; `spmem-node`'s own tests play that through.

use std::ffi::OsString;
use std::fs::{self, File};

use anyhow::Context;

use super::machine::{Ending, Kept, Machine, TOLD};
use super::matrix::{LIMIT, RETRIES, Verdict};
use super::topology::{Mode, Topology};
use crate::launch::Bed;

/// How a boot ends.
#[derive(Clone, Copy, Debug)]
enum End {
    /// The power is cut while the node is made.
    CutMaking,
    /// The power is cut once so many steps were told.
    Cut(u64),
    /// After so many steps.
    Orderly(u64),
}

const BOOTS: [End; 8] = [
    End::CutMaking,
    End::Orderly(200),
    End::Cut(16),
    End::Cut(160),
    End::Cut(48),
    End::Cut(320),
    End::Orderly(32),
    End::Orderly(0),
];
/// A making, an orderly end, a cut, and what it left.
const FEW_BOOTS: [End; 3] = [End::Orderly(64), End::Cut(48), End::Orderly(0)];
/// More than a guest does before the power is cut.
const ENDLESS: u64 = 1 << 30;

/// Boots as often as it takes; only a few times where `part` is `few`.
pub(super) fn check(
    bed: &Bed,
    machine: &Machine,
    (topology, mode): (&Topology, &Mode),
    part: &str,
) -> anyhow::Result<Verdict> {
    let folder = bed.dir.join("kept");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let log = bed.dir.join("check.log");
    let boots = if part == "few" { &FEW_BOOTS[..] } else { &BOOTS };
    let (mut all, mut cuts, mut failures) = (String::new(), 0, 0);
    let mut left = boots.iter().copied();
    let mut next = left.next();
    while let Some(end) = next {
        let steps = if let End::Orderly(steps) = end { steps } else { ENDLESS };
        let words = ["program", "vm-reboots", "--told", "/run/job/told", "--steps", &steps.to_string()];
        let command: Vec<OsString> =
            [own.clone().into()].into_iter().chain(words.into_iter().map(OsString::from)).collect();
        let before = fs::read_to_string(folder.join(TOLD)).unwrap_or_default().len();
        let is_time = |told: &str| told.get(before..).is_some_and(|told| is_time(end, told));
        let file = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let kept = Kept { folder: &folder, is_time: &is_time };
        let ending = machine.run((topology, mode), &command, LIMIT, file.into(), Some(kept))?;
        let said = String::from_utf8_lossy(&fs::read(&log)?).trim_end().to_owned();
        all += &format!("{end:?}:\n{said}\n");
        match (ending, end) {
            (Ending::Cut, End::CutMaking | End::Cut(_)) => cuts += 1,
            (Ending::Status(0), End::Orderly(_)) => {}
            // As good as a power cut, at another moment.
            (Ending::NoEmulator(_), _) if failures < RETRIES => {
                failures += 1;
                if !folder.join(TOLD).exists() {
                    fs::remove_dir_all(&folder)?;
                    fs::create_dir_all(&folder)?;
                }
                continue;
            }
            (Ending::NoSetup(what), _) => return Ok(Verdict::Failed(format!("{all}the set-up failed: {what}"))),
            (Ending::Silent(what), _) => return Ok(Verdict::Failed(all + &what)),
            (Ending::Status(status), _) => return Ok(Verdict::Failed(format!("{all}status {status}"))),
            (Ending::NoEmulator(how), _) => {
                return Ok(Verdict::Failed(format!("{all}the emulator failed: {how}")));
            }
            (Ending::Cut, End::Orderly(_)) => unreachable!("it is never time to"),
        }
        next = left.next();
    }
    let last = all.lines().last().unwrap_or_default();
    Ok(Verdict::Passed(format!("{} boots, {cuts} power cuts: {last}", boots.len())))
}

/// Whether the power is to be cut, by what this boot has told.
fn is_time(end: End, told: &str) -> bool {
    let mut numbers = told.lines().filter_map(|line| line.parse::<u64>().ok());
    match end {
        End::CutMaking => told.contains("making\n"),
        End::Cut(steps) => {
            numbers.next().zip(numbers.next_back()).is_some_and(|(first, last)| last >= first + steps)
        }
        End::Orderly(_) => false,
    }
}
