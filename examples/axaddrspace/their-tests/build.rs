//! Takes the tests of the very version of `axaddrspace` that is depended on from its package, and puts our nested page table
//! beside them in the place of their own.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Where cargo keeps the package's source.
fn source_of_axaddrspace() -> Result<PathBuf, Box<dyn Error>> {
    // Only what this platform needs has been fetched so far.
    let output = Command::new(env::var("CARGO")?)
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(["--filter-platform", &env::var("TARGET")?])
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().ok_or("no packages")?;
    let manifest = packages
        .iter()
        .find(|package| package["name"] == "axaddrspace")
        .and_then(|package| package["manifest_path"].as_str())
        .ok_or("axaddrspace is not among the packages")?;
    Ok(Path::new(manifest).parent().ok_or("no folder")?.to_owned())
}

fn main() -> Result<(), Box<dyn Error>> {
    let theirs = source_of_axaddrspace()?.join("tests");
    let out = PathBuf::from(env::var("OUT_DIR")?).join("tests");
    for folder in ["mock_npt", "test_utils"] {
        fs::create_dir_all(out.join(folder))?;
    }
    for file in ["address_space.rs", "test_utils/mod.rs"] {
        fs::copy(theirs.join(file), out.join(file))?;
    }
    fs::copy("tests/table/mod.rs", out.join("mock_npt/mod.rs"))?;
    println!("cargo::rerun-if-changed=tests/table/mod.rs");
    println!("cargo::rerun-if-changed=../../../Cargo.lock");
    Ok(())
}
