//! Both scenarios, small, with whatever can run guests here: the program fails if a guest finds a wrong word, a page is
//! filled twice or a write is missed, and says what it did.

use serde_json::Value;
use std::process::Command;

/// Runs the program; its figures.
fn figures(arguments: &[&str]) -> Value {
    let done = Command::new(env!("CARGO_BIN_EXE_kvm-vmm"))
        .args(arguments)
        .args(["--memory", "8M", "--rounds", "1", "--json", "-"])
        .output()
        .expect("the program");
    let (out, err) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    assert!(done.status.success(), "{arguments:?}: {out}{err}");
    serde_json::from_str(&out).unwrap_or_else(|why| panic!("{arguments:?}: {why}: {out}"))
}

/// What runs guests here.
fn machines(test: &str) -> Vec<&'static str> {
    if let Some(why) = uffd_handler::sys::unavailable() {
        eprintln!("SKIPPED {test}: {why}");
        return Vec::new();
    }
    match std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => vec!["threads", "kvm"],
        Err(why) => {
            eprintln!("SKIPPED {test} with KVM: /dev/kvm: {why}");
            vec!["threads"]
        }
    }
}

#[test]
fn a_snapshot_is_restored_under_load() {
    for machine in machines("a_snapshot_is_restored_under_load") {
        let it = figures(&["restore", "--vcpus", "3", "--machine", machine]);
        assert_eq!(it["machine"], machine);
        assert_eq!(it["wrong_words"], 0, "{it}");
        assert_eq!(it["double_fills"], 0, "{it}");
        // Once for reading, once for the logs.
        assert_eq!(it["pages_served"], 2 * 2048, "{it}");
        assert_eq!(it["dirty"]["missed"], 0, "{it}");
        if machine == "kvm" {
            assert_eq!(it["dirty"]["kvm"], it["dirty"]["ours"], "{it}");
            assert_eq!(it["dirty"]["different"], 0, "{it}");
        }
    }
}

#[test]
fn running_guests_are_migrated() {
    for machine in machines("running_guests_are_migrated") {
        for ahead in ["0", "2"] {
            let arguments = ["migrate", "--machine", machine, "--ahead", ahead];
            let it = figures(&arguments);
            assert_eq!(it["wrong_words"], 0, "{it}");
            assert_eq!(it["double_fills"], 0, "{it}");
            assert_eq!(it["absent"], it["fetched"], "{it}");
            if ahead == "0" {
                assert_eq!(it["fetched"], 2 * 2048, "{it}");
            }
            if machine == "kvm" {
                assert_eq!(it["missed"], 0, "{it}");
            }
        }
    }
}
