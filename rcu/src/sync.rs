//! The one module that names atomics, locks and fences, and swaps those of core and std for loom's under `cfg(loom)` and
//! for shuttle's under `cfg(shuttle)`.
//!
//! Everything above takes its atomics from here, so that a loom model runs the code that ships. Two things differ by
//! configuration and are hidden here: [`Atomic`] is the `atomic` crate's (without its lock fallback) or a wrapper over
//! loom's `AtomicU64`, and [`Mutex`] is std's with poison ignored, spin's without std, or loom's. The mutex is for the
//! control plane only; nothing that a fault runs takes one.

// UNSAFETY: `fill_unshared` writes to atomics as if they were none, two hints to the processor have no safe form, boxed words
// are taken for `Plain`s, and loom's stand-in turns integers back into the `T` that they were made from.
#![allow(unsafe_code)]

use bytemuck::Pod;

pub use alloc::sync::Arc;
pub use crossbeam_utils::CachePadded;
use imp::RawMutex;
pub use imp::*;
pub use plain::Plain;

#[cfg(shuttle)]
#[path = "sync/scheduled.rs"]
mod imp;

#[cfg(not(any(loom, shuttle)))]
mod imp {
    pub use atomic::Atomic;
    pub use core::hint::spin_loop;
    pub use core::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, compiler_fence, fence,
    };

    #[cfg(not(feature = "std"))]
    pub use spin::MutexGuard;
    #[cfg(not(feature = "std"))]
    pub(super) use spin::mutex::Mutex as RawMutex;
    #[cfg(feature = "std")]
    pub(super) use std::sync::Mutex as RawMutex;
    #[cfg(feature = "std")]
    pub use std::sync::MutexGuard;
}

#[cfg(loom)]
mod imp {
    pub use loom::hint::spin_loop;
    pub(super) use loom::sync::Mutex as RawMutex;
    pub use loom::sync::MutexGuard;
    pub use loom::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };

    pub use super::model::Atomic;

    /// Orders nothing between threads, and loom knows no other ordering: does nothing.
    pub fn compiler_fence(_order: Ordering) {}
}

// An entry is changed by the processor's own read-modify-writes, and a table of them is laid over a raw 4096-byte
// frame: a lock in place of an instruction, or a word of any other shape, would be wrong and not merely slow.
const _: () = assert!(Atomic::<u64>::is_lock_free());
#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Atomic<u64>>() == 8 && align_of::<Atomic<u64>>() == 8);
    assert!(size_of::<[Atomic<u64>; 512]>() == 4096);
};

/// Stores to atomics that nobody else can reach yet, by plain stores that the compiler may widen.
///
/// # Safety
///
/// No other thread accesses `atomics` until something that the caller does afterwards has published them.
#[inline(always)]
pub unsafe fn fill_unshared<T: Pod>(atomics: &[Atomic<T>], mut value: impl FnMut(usize) -> T) {
    #[cfg(not(loom))]
    {
        let first = atomics.as_ptr().cast::<T>().cast_mut();
        for index in 0..atomics.len() {
            // SAFETY: (1) `Atomic<T>` is `repr(transparent)` over an `UnsafeCell` of a `T`, so the slice is one of `T`s that
            // may be written; (2) `index` is inside it; (3) the caller promises that nobody races with it.
            unsafe { first.add(index).write(value(index)) };
        }
    }
    #[cfg(loom)]
    for (index, atomic) in atomics.iter().enumerate() {
        atomic.store(value(index), Ordering::Relaxed);
    }
}

/// Has the processor fetch the beginning of a value, `lines` cache lines of 64 bytes, while the caller does other things.
#[inline(always)]
pub fn prefetch<T>(value: &T, lines: usize) {
    #[cfg(all(target_arch = "x86_64", not(loom)))]
    for line in 0..lines.min(size_of::<T>().div_ceil(64)) {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let address = core::ptr::from_ref(value).cast::<i8>();
        // SAFETY: a hint that reads nothing and faults on nothing, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.wrapping_add(line * 64)) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom))))]
    let _ = (value, lines);
}

/// Has the processor fetch the cache line of a value that is about to be exchanged, to be written: an exchange waits for all
/// instructions before it, and only then for its line.
#[inline(always)]
pub fn prefetch_for_exchange<T>(value: &T) {
    #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
    // SAFETY: a hint that changes nothing and faults on nothing; a processor that does not know it takes it for a NOP (Intel SDM
    // volume 2, PREFETCHW; AMD APM volume 3, PREFETCHW).
    unsafe {
        core::arch::asm!(
            "prefetchw [{}]",
            in(reg) core::ptr::from_ref(value),
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(not(all(target_arch = "x86_64", not(any(loom, miri)))))]
    let _ = value;
}

/// A mutual-exclusion lock for the control plane. Poison is ignored: what it guards here is left whole by every panic.
pub struct Mutex<T>(RawMutex<T>);

impl<T> Mutex<T> {
    /// Makes an unlocked mutex around `value`.
    pub fn new(value: T) -> Self {
        Self(RawMutex::new(value))
    }

    /// Waits until the lock is free and takes it. Spins without std.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        #[cfg(any(feature = "std", loom, shuttle))]
        return self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        #[cfg(not(any(feature = "std", loom, shuttle)))]
        return self.0.lock();
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> core::fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Mutex { .. }")
    }
}

#[cfg(loom)]
use loom::thread::yield_now;
#[cfg(shuttle)]
use shuttle::thread::yield_now;

/// A bounded local wait: spins twice as long each time, then yields the thread (with std), and says when it is time to
/// give up or to block. Under loom and shuttle it yields at once, which is what lets a model with a waiting loop end.
#[derive(Debug, Default)]
pub struct Backoff {
    #[cfg(not(any(loom, shuttle)))]
    inner: crossbeam_utils::Backoff,
    #[cfg(any(loom, shuttle))]
    rounds: core::cell::Cell<u32>,
}

impl Backoff {
    /// Makes a wait that has not begun.
    #[inline]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits a little, longer each time.
    #[inline]
    pub fn snooze(&self) {
        #[cfg(not(any(loom, shuttle)))]
        self.inner.snooze();
        #[cfg(any(loom, shuttle))]
        {
            self.rounds.set(self.rounds.get() + 1);
            yield_now();
        }
    }

    /// Whether it has waited as long as a bounded wait should.
    #[inline]
    pub fn is_completed(&self) -> bool {
        #[cfg(not(any(loom, shuttle)))]
        return self.inner.is_completed();
        #[cfg(any(loom, shuttle))]
        return self.rounds.get() >= 2;
    }
}

/// A local wait for something that may take as long as a call into firmware: spins, then yields, then sleeps (with std)
/// for longer each time, up to a millisecond. Whoever waits holds nothing that others wait for.
#[derive(Debug, Default)]
pub struct Pause {
    steps: u32,
}

impl Pause {
    /// Steps after which a bounded wait is over: about a hundred milliseconds with std.
    const BOUND: u32 = if cfg!(loom) { 2 } else { 160 };

    /// Makes a wait that has not begun.
    pub const fn new() -> Self {
        Self { steps: 0 }
    }

    /// Waits a little, longer each time.
    pub fn wait(&mut self) {
        let step = self.steps;
        self.steps = step.saturating_add(1);
        #[cfg(any(loom, shuttle))]
        yield_now();
        #[cfg(not(any(loom, shuttle)))]
        match step {
            0..6 => (0..1u32 << step).for_each(|_| spin_loop()),
            _ => Self::rest(step),
        }
    }

    #[cfg(all(feature = "std", not(any(loom, shuttle))))]
    fn rest(step: u32) {
        match step {
            0..24 => std::thread::yield_now(),
            // 16 microseconds, doubled every eighth step.
            _ => std::thread::sleep(core::time::Duration::from_micros(
                16 << ((step - 24) / 8).min(6),
            )),
        }
    }

    #[cfg(not(any(feature = "std", loom, shuttle)))]
    fn rest(_step: u32) {
        (0..256).for_each(|_| spin_loop());
    }

    /// Whether it has waited as long as a bounded wait should.
    pub fn is_over(&self) -> bool {
        self.steps >= Self::BOUND
    }
}

mod plain {
    //! A word that no model follows.

    use core::sync::atomic::{AtomicU64, Ordering};

    /// A 64-bit word on whose order nothing rests: a counter, or a note that another exchange publishes. All accesses are
    /// Relaxed, and loom does not follow it.
    #[derive(Debug, Default)]
    #[repr(transparent)]
    pub struct Plain(AtomicU64);

    impl Plain {
        /// A word that holds `value`.
        pub const fn new(value: u64) -> Self {
            Self(AtomicU64::new(value))
        }

        /// The word now.
        #[inline(always)]
        pub fn get(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }

        /// Stores `value`.
        #[inline(always)]
        pub fn set(&self, value: u64) {
            self.0.store(value, Ordering::Relaxed);
        }

        /// Adds `n` (wrapping) by a load and a store: right only where one thread at a time writes.
        #[inline(always)]
        pub fn add_owned(&self, n: u64) {
            self.set(self.get().wrapping_add(n));
        }

        /// Adds `n` (wrapping), whoever else does.
        #[inline]
        pub fn add_shared(&self, n: u64) {
            self.0.fetch_add(n, Ordering::Relaxed);
        }

        /// `count` words of zero. The system supplies memory only for those that are written.
        pub fn zeroed(count: usize) -> alloc::boxed::Box<[Plain]> {
            const {
                assert!(
                    size_of::<Plain>() == size_of::<u64>()
                        && align_of::<Plain>() == align_of::<u64>()
                )
            };
            let words = alloc::vec![0u64; count].into_boxed_slice();
            // SAFETY: a `Plain` is a `u64` in size, alignment (both asserted) and valid values, and the box owns them all.
            unsafe {
                alloc::boxed::Box::from_raw(alloc::boxed::Box::into_raw(words) as *mut [Plain])
            }
        }
    }
}

#[cfg(loom)]
mod model {
    //! loom's stand-in for the `atomic` crate: the same methods, over a 64-bit atomic that loom follows.

    use core::marker::PhantomData;

    use bytemuck::NoUninit;

    use super::{AtomicU64, Ordering};

    /// An 8-byte value that loom follows as an `AtomicU64`.
    pub struct Atomic<T> {
        bits: AtomicU64,
        _value: PhantomData<T>,
    }

    impl<T> Atomic<T> {
        /// Whether a `T` is changed by an instruction and not under a lock.
        pub const fn is_lock_free() -> bool {
            size_of::<T>() == 8
        }
    }

    impl<T: NoUninit> Atomic<T> {
        fn to_bits(value: T) -> u64 {
            const { assert!(size_of::<T>() == 8) };
            // SAFETY: both are 8 bytes (asserted), and `T: NoUninit` has no padding, so all of them are initialised.
            unsafe { core::mem::transmute_copy(&value) }
        }

        fn of_bits(bits: u64) -> T {
            // SAFETY: both are 8 bytes (asserted in `to_bits`, without which no `Atomic<T>` is made), and the bits
            // came from a `T`, by `to_bits`.
            unsafe { core::mem::transmute_copy(&bits) }
        }

        /// Makes an atomic that holds `value`.
        #[track_caller]
        pub fn new(value: T) -> Self {
            Self {
                bits: AtomicU64::new(Self::to_bits(value)),
                _value: PhantomData,
            }
        }

        /// Loads the value.
        #[track_caller]
        pub fn load(&self, order: Ordering) -> T {
            Self::of_bits(self.bits.load(order))
        }

        /// Stores `value`.
        #[track_caller]
        pub fn store(&self, value: T, order: Ordering) {
            self.bits.store(Self::to_bits(value), order);
        }

        /// Stores `value` and returns what was there.
        #[track_caller]
        pub fn swap(&self, value: T, order: Ordering) -> T {
            Self::of_bits(self.bits.swap(Self::to_bits(value), order))
        }

        /// Stores `new` if `current` is there.
        ///
        /// # Errors
        ///
        /// The value that was there instead.
        #[track_caller]
        pub fn compare_exchange(
            &self,
            current: T,
            new: T,
            success: Ordering,
            failure: Ordering,
        ) -> Result<T, T> {
            self.bits
                .compare_exchange(Self::to_bits(current), Self::to_bits(new), success, failure)
                .map(Self::of_bits)
                .map_err(Self::of_bits)
        }

        /// Stores `new` if `current` is there; may fail for no reason on hardware, never does under loom.
        ///
        /// # Errors
        ///
        /// The value that was there instead.
        #[track_caller]
        pub fn compare_exchange_weak(
            &self,
            current: T,
            new: T,
            success: Ordering,
            failure: Ordering,
        ) -> Result<T, T> {
            self.compare_exchange(current, new, success, failure)
        }
    }

    impl<T: NoUninit + Default> Default for Atomic<T> {
        fn default() -> Self {
            Self::new(T::default())
        }
    }

    impl<T: NoUninit + core::fmt::Debug> core::fmt::Debug for Atomic<T> {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            f.debug_tuple("Atomic")
                .field(&self.load(Ordering::Relaxed))
                .finish()
        }
    }

    /// The operations that the `atomic` crate offers for integers only.
    impl Atomic<u64> {
        /// Adds, returns what was there.
        #[track_caller]
        pub fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
            self.bits.fetch_add(value, order)
        }

        /// Subtracts, returns what was there.
        #[track_caller]
        pub fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
            self.bits.fetch_sub(value, order)
        }

        /// Clears the bits that are not in `value`, returns what was there.
        #[track_caller]
        pub fn fetch_and(&self, value: u64, order: Ordering) -> u64 {
            self.bits.fetch_and(value, order)
        }

        /// Sets the bits in `value`, returns what was there.
        #[track_caller]
        pub fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
            self.bits.fetch_or(value, order)
        }
    }
}
