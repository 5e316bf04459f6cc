//! Says where the kernel is linked to.

fn main() {
    println!(
        "cargo::rustc-link-arg-bins=-T{}/../npt-hypervisor/machine/link.ld",
        env!("CARGO_MANIFEST_DIR")
    );
    println!("cargo::rerun-if-changed=../npt-hypervisor/machine/link.ld");
}
