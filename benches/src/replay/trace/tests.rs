use super::*;

fn event(text: &str) -> Event {
    Line::parse(text).unwrap().event
}

fn error(text: &str) -> String {
    Line::parse(text).unwrap_err().to_string()
}

#[test]
fn reads_a_fault_and_its_answer() {
    let line = Line::parse(
        r#"{"seq":8,"op":3,"t":2,"event":"kvm_page_fault","vcpu":1,"gpa":"0x1100","error_code":"0x100000014"}"#,
    )
    .unwrap();
    assert_eq!((line.seq, line.thread), (8, 2));
    assert_eq!(
        line.event,
        Event::PageFault {
            vcpu: 1,
            gpa: 0x1100,
            code: 0x1_0000_0014
        }
    );
    assert_eq!(
        event(
            r#"{"seq":9,"t":0,"event":"kvm_mmu_spte_requested","gfn":"0x1","level":2,"pfn":"0x184a7f","frame":"D0"}"#
        ),
        Event::Requested {
            gfn: 1,
            level: 2,
            pfn: Some(0x18_4a7f)
        }
    );
    assert_eq!(
        event(
            r#"{"seq":9,"t":0,"event":"kvm_mmu_spte_requested","gfn":"0x1","level":1,"pfn":"noslot"}"#
        ),
        Event::Requested {
            gfn: 1,
            level: 1,
            pfn: None
        }
    );
}

#[test]
fn expands_a_run() {
    let Event::Changed(run) = event(
        r#"{"seq":1,"t":0,"event":"kvm_tdp_mmu_spte_changed","as_id":1,"gfn":"0x200","level":1,"n":3,"gfn_step":"0x1",
            "old_spte":"0x1000e67","old_step":"0x1000","new_spte":"0x80000000000005a0","new_step":"0x0"}"#,
    ) else {
        panic!("not a change");
    };
    let changes: Vec<_> = run.changes().collect();
    assert_eq!(changes.len(), 3);
    let last = Change {
        as_id: 1,
        level: 1,
        gfn: 0x202,
        old: 0x100_2e67,
        new: 0x8000_0000_0000_05a0,
    };
    assert_eq!(changes[2], last);
}

#[test]
fn reads_both_forms_of_a_mode_change() {
    let fields = r#"{"seq":1,"t":1,"event":"kvm_smm_transition","vcpu":0,"entering":true}"#;
    let text = r#"{"seq":1,"t":1,"event":"kvm_smm_transition","text":"vcpu 0: entering SMM, smbase 0x30000"}"#;
    assert_eq!(
        event(fields),
        Event::Smm {
            vcpu: 0,
            entering: true
        }
    );
    assert_eq!(event(fields), event(text));
}

#[test]
fn tells_roots_from_other_tables() {
    let page = |level, direct| {
        event(&format!(
            r#"{{"seq":1,"t":0,"event":"kvm_mmu_get_page","gfn":"0x0","level":{level},"direct":{direct}}}"#
        ))
    };
    assert_eq!(page(5, true), Event::Root(5));
    assert_eq!(page(4, false), Event::Inside);
    assert_eq!(page(3, true), Event::Inside);
}

#[test]
fn an_unknown_event_is_no_error() {
    assert_eq!(
        event(
            r#"{"seq":1,"t":0,"event":"kvm_new_thing","gfn":7}"#
                .replace("7", "\"0x7\"")
                .as_str()
        ),
        Event::Other
    );
}

#[test]
fn bad_lines_say_what_is_wrong() {
    assert!(error("").contains("not a trace event"));
    assert!(error(r#"{"seq":1,"t":0}"#).contains("event"));
    assert!(
        error(r#"{"seq":1,"t":0,"event":"kvm_page_fault","vcpu":0,"gpa":"0x1"}"#)
            .contains("error_code")
    );
    assert!(
        error(
            r#"{"seq":1,"t":0,"event":"kvm_page_fault","vcpu":0,"gpa":"pear","error_code":"0x4"}"#
        )
        .contains("pear")
    );
    let absurd = [
        (
            r#""kvm_page_fault","vcpu":99999999,"gpa":"0x1","error_code":"0x4""#,
            "vcpu",
        ),
        (
            r#""kvm_page_fault","vcpu":0,"gpa":"0xfffffffffffff000","error_code":"0x4""#,
            "gpa",
        ),
        (
            r#""kvm_mmu_spte_requested","gfn":"0x1","level":0,"pfn":"0x1""#,
            "level",
        ),
        (
            r#""kvm_mmu_spte_requested","gfn":"0x1","level":4,"pfn":"0x1""#,
            "level",
        ),
        (
            r#""kvm_mmu_spte_requested","gfn":"0x1","level":1,"pfn":"0xffffffffffffffff""#,
            "pfn",
        ),
        (
            r#""kvm_tdp_mmu_spte_changed","as_id":2,"gfn":"0x1","level":1,"old_spte":"0x0","new_spte":"0x1""#,
            "as_id",
        ),
        (
            r#""kvm_tdp_mmu_spte_changed","as_id":0,"gfn":"0x1","level":6,"old_spte":"0x0","new_spte":"0x1""#,
            "level",
        ),
        (
            r#""kvm_tdp_mmu_spte_changed","as_id":0,"gfn":"0x1","level":1,"old_spte":"0x0","new_spte":"0x1","n":1000000000000,"gfn_step":"0x0","old_step":"0x0","new_step":"0x0""#,
            "n ",
        ),
        (
            r#""kvm_tdp_mmu_spte_changed","as_id":0,"gfn":"0x1","level":1,"old_spte":"0x0","new_spte":"0x1","n":3,"gfn_step":"0xffffffffffffffff","old_step":"0x0","new_step":"0x0""#,
            "gfn_step",
        ),
        (
            r#""kvm_unmap_hva_range","gfn_ranges":[{"as_id":0,"gfn_start":"0x8","gfn_end":"0x4"}]"#,
            "gfn_start",
        ),
    ];
    for (rest, field) in absurd {
        let message = error(&format!(r#"{{"seq":1,"t":0,"event":{rest}}}"#));
        assert!(
            message.contains(field) && message.contains("out of range"),
            "{message}"
        );
    }
}
