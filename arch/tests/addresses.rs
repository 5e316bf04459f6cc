//! Addresses, frame numbers and ranges of them: what no arithmetic on them may do, and how they are shown.

use tdp_arch::{Gfn, GfnRange, Gpa, Hpa, Pfn, Spte};

/// Numbers that an embedder or a guest chose reach these: past the end there is no answer, and never a small one.
#[test]
fn nothing_wraps() {
    let last = Gfn(u64::MAX);
    assert_eq!(last.checked_add(1), None);
    assert_eq!(GfnRange::new(last, 1), None);
    assert_eq!(GfnRange::new(last, 0), Some((last..last).into()));
    assert_eq!(Gfn(5).checked_offset_from(Gfn(3)), Some(2));
    assert_eq!(Gfn(3).checked_offset_from(Gfn(5)), None);
    let highest = (1 << 52) - 1;
    assert_eq!(Gfn(highest).checked_address(), Some(Gpa(!0xfff)));
    assert_eq!(Gfn(highest + 1).checked_address(), None);
    assert_eq!(Pfn(highest + 1).checked_address(), None);
}

#[test]
fn numbers_are_shown_in_hexadecimal_and_say_what_they_are() {
    assert_eq!(
        format!("{:?} {}", Gpa(0x1000), Gpa(0x1000)),
        "Gpa(0x1000) 0x1000"
    );
    assert_eq!(format!("{:x} {:#x}", Pfn(0xabc), Hpa(0xabc)), "abc 0xabc");
    let range = GfnRange::from(Gfn(0x10)..Gfn(0x20));
    assert_eq!(format!("{range} {range:?}"), "[0x10, 0x20) [0x10, 0x20)");
}

#[test]
fn an_entry_is_shown_with_all_its_digits() {
    let entry = Spte(0x8000_0000_0000_0037);
    assert_eq!(format!("{entry:?}"), "Spte(0x8000000000000037)");
    assert_eq!(
        format!("{:?} {:x}", Spte(7), Spte(0x37)),
        "Spte(0x0000000000000007) 37"
    );
}
