//! What the compiler expects of the system: memory functions, and the two names that core and alloc, which were built to
//! unwind, still mention.
#![allow(unsafe_code)]
// UNSAFETY: these are the definitions of memory functions; they cannot be written with them.

use core::arch::asm;

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    crate::exit(2)
}

/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's promise: both are valid for `bytes` and do not overlap.
    unsafe {
        asm!("rep movsq", inout("rcx") bytes / 8 => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack));
        let done = bytes & !7;
        asm!("rep movsb", inout("rcx") bytes & 7 => _, inout("rdi") to.add(done) => _, inout("rsi") from.add(done) => _,
            options(nostack));
    }
    to
}

/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: the destination does not begin inside the source: going up never overwrites what is still to be read.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: the caller's promise; downwards, so that an overlap is read before it is written.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") bytes => _, inout("rdi") to.add(bytes).wrapping_sub(1) => _,
            inout("rsi") from.add(bytes).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, bytes: usize) -> *mut u8 {
    let word = u64::from(value as u8) * 0x0101_0101_0101_0101;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep stosq", inout("rcx") bytes / 8 => _, inout("rdi") to => _, in("rax") word, options(nostack));
        asm!("rep stosb", inout("rcx") bytes & 7 => _, inout("rdi") to.add(bytes & !7) => _, in("rax") word, options(nostack));
    }
    to
}

/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    for i in 0..bytes {
        // SAFETY: the caller's promise. Volatile, or the loop would be compiled to a call of itself.
        let (a, b) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, bytes) }
}

/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: the caller's promise: there is a zero.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}
