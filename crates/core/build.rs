//! Hands the compiler's and the target's names to `record::Build`.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| "unknown".to_owned());
    let version = Command::new(variable("RUSTC")).arg("--version").output().ok();
    let version = version.and_then(|output| String::from_utf8(output.stdout).ok());
    println!("cargo::rustc-env=ROOFBENCH_RUSTC={}", version.as_deref().unwrap_or("unknown").trim());
    println!("cargo::rustc-env=ROOFBENCH_TARGET={}", variable("TARGET"));
    println!("cargo::rustc-env=ROOFBENCH_PROFILE={}", variable("PROFILE"));
    println!("cargo::rustc-env=ROOFBENCH_TARGET_FEATURES={}", env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default());
}
