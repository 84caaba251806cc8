//! Builds the preloaded object (crate `spmem-agent`) and leaves it where `src/run/agent_file.rs` embeds it.
//!
//! The agent is a `no_std` cdylib for the target, optimised in every profile; cargo has no stable way to depend on
//! such an artifact, so a nested cargo builds it in a target directory of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// What the agent is made of: directories beside this crate.
const SOURCES: [&str; 5] = ["spmem-core", "spmem-sys", "spmem-node", "spmem", "spmem-agent"];

/// Set by an outer cargo, cargo-clippy, rustdoc or a coverage tool for the outer build only.
const NOT_INHERITED: [&str; 9] = [
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CLIPPY_ARGS",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_DIR",
    "CARGO_BUILD_RUSTC_WRAPPER",
    "CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER",
];

fn main() {
    let crates = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("..");
    for name in SOURCES {
        println!("cargo:rerun-if-changed={}", crates.join(name).join("src").display());
        println!("cargo:rerun-if-changed={}", crates.join(name).join("Cargo.toml").display());
    }
    println!("cargo:rerun-if-changed={}", crates.join("../Cargo.toml").display());
    println!("cargo:rerun-if-changed=build.rs");

    let object = build_agent(&crates.join("spmem-agent/Cargo.toml"));
    let bytes = fs::read(&object).unwrap_or_else(|error| panic!("{} cannot be read: {error}", object.display()));
    println!("cargo:rustc-env=SPMEM_AGENT_OBJECT={}", object.display());
    println!("cargo:rustc-env=SPMEM_AGENT_HASH={:016x}", fnv1a(&bytes));
}

fn build_agent(manifest: &Path) -> PathBuf {
    let target = variable("TARGET");
    let target_dir = PathBuf::from(variable("OUT_DIR")).join("agent");
    let mut cargo = Command::new(variable("CARGO"));
    cargo.args(["build", "--release", "--quiet", "--package", "spmem-agent", "--target", &target]);
    cargo.arg("--manifest-path").arg(manifest).arg("--target-dir").arg(&target_dir);
    for name in NOT_INHERITED {
        cargo.env_remove(name);
    }
    // Symbols stay for gdb; what the debug lines would add is many times the code.
    cargo.env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo");
    // TRACE: else zstd calls functions of that name of whatever program it is loaded into. BUFFER: a page's literals fit, and
    // the decoder that each process has is 60 KiB smaller.
    let flags = env::var("CFLAGS").unwrap_or_default();
    cargo.env("CFLAGS", format!("{flags} -DZSTD_TRACE=0 -DZSTD_DECODER_INTERNAL_BUFFER=4096"));
    if let Ok(jobs) = env::var("CARGO_MAKEFLAGS") {
        cargo.env("MAKEFLAGS", jobs);
    }
    let status = cargo.status().unwrap_or_else(|error| panic!("{cargo:?} cannot be started: {error}"));
    assert!(status.success(), "the agent does not build: {cargo:?}");
    target_dir.join(target).join("release/libspmem_agent.so")
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for build scripts"))
}

/// Names the file: its bytes are compared at run time, so a collision costs a rewrite and nothing else.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
