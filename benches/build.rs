//! Tells the program which compiler made it and how, because instruction counts are of a compiler and a build.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().ok();
    let version = version.and_then(|output| String::from_utf8(output.stdout).ok());
    let version = version.unwrap_or_default();
    println!("cargo::rustc-env=TDP_BENCH_RUSTC={}", version.trim());
    // What overrides the manifest's profile.
    println!("cargo::rerun-if-env-changed=CARGO_PROFILE_RELEASE_LTO");
    let lto = env::var("CARGO_PROFILE_RELEASE_LTO").unwrap_or_else(|_| "fat".to_owned());
    let profile = env::var("PROFILE").unwrap_or_default();
    println!("cargo::rustc-env=TDP_BENCH_PROFILE={profile}, lto {lto}");
    let target = env::var("TARGET").unwrap_or_default();
    println!("cargo::rustc-env=TDP_BENCH_TARGET={target}");
}
