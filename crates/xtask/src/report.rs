//! The object that `spm run --json FILE` writes, as far as the tables need it.
//!
//! Read strictly: a field that is missing or of another type is an error, not a zero in a table.

use std::path::Path;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

/// One managed run, as `spm` tells it.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Report {
    schema: u32,
    pub(crate) sysram_peak_bytes: u64,
    pub(crate) overrun_peak_bytes: u64,
    pub(crate) processes: u64,
    pub(crate) unmanaged_processes: u64,
    pub(crate) demoted_pages: u64,
    pub(crate) promoted_pages: u64,
    pub(crate) rescued_pages: u64,
    nodes: Vec<NodeReport>,
    /// Of an automatic budget.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) auto: Option<AutoReport>,
}

/// What `--sysram auto` came to.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct AutoReport {
    pub(crate) slowdown_percent: f64,
    pub(crate) smallest_bytes: u64,
    pub(crate) last_bytes: u64,
    pub(crate) mean_share_percent: f64,
    pub(crate) steps: Vec<serde_json::Value>,
}

#[derive(Clone, Serialize, Deserialize)]
struct NodeReport {
    #[serde(rename = "type")]
    kind: String,
    stored_bytes_peak: Option<u64>,
    used_bytes_peak: Option<u64>,
}

impl Report {
    /// Reads what `spm` wrote.
    ///
    /// # Errors
    /// The file is missing (`spm` did not reach its end), is no such object, or is of another schema.
    pub(crate) fn read(file: &Path) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("spm left no report in {}", file.display()))?;
        let report: Self = serde_json::from_str(&text).context("the report of spm is not what was agreed")?;
        ensure!(report.schema == 1, "the report of spm has schema {}, not 1", report.schema);
        Ok(report)
    }

    /// This run and another as if they were one: peaks are the higher ones, counts are added.
    pub(crate) fn merge(mut self, other: &Self) -> Self {
        self.sysram_peak_bytes = self.sysram_peak_bytes.max(other.sysram_peak_bytes);
        self.overrun_peak_bytes = self.overrun_peak_bytes.max(other.overrun_peak_bytes);
        self.processes += other.processes;
        self.unmanaged_processes += other.unmanaged_processes;
        self.demoted_pages += other.demoted_pages;
        self.promoted_pages += other.promoted_pages;
        self.rescued_pages += other.rescued_pages;
        self.nodes.extend(other.nodes.iter().cloned());
        self
    }

    /// What the pages stored on SPM nodes would take over what they took, at the peak; `None` when nothing was stored.
    pub(crate) fn stored_ratio(&self) -> Option<f64> {
        let spm_nodes = || self.nodes.iter().filter(|node| node.kind == "spm");
        let stored: u64 = spm_nodes().filter_map(|node| node.stored_bytes_peak).sum();
        let used: u64 = spm_nodes().filter_map(|node| node.used_bytes_peak).sum();
        (used > 0 && stored > 0).then(|| stored as f64 / used as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"schema":1,"command":["true"],"exit_code":0,"sysram_peak_bytes":10,"overrun_peak_bytes":0,
        "processes":1,"unmanaged_processes":0,"demoted_pages":4,"promoted_pages":3,"rescued_pages":2,"nodes":[
        {"node":0,"type":"sysram","class":1,"capacity_bytes":1},
        {"node":1,"type":"spm","class":4,"capacity_bytes":9,"stored_bytes_peak":12,"used_bytes_peak":4,"ratio":3.0}]}"#;

    #[test]
    fn the_stored_ratio_counts_spm_nodes_only() {
        let report: Report = serde_json::from_str(GOOD).unwrap();
        assert_eq!(report.stored_ratio(), Some(3.0));
    }

    #[test]
    fn a_missing_field_is_an_error_and_not_a_zero() {
        assert!(serde_json::from_str::<Report>(&GOOD.replace("\"demoted_pages\":4,", "")).is_err());
    }
}
