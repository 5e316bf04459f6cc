//! The atomics of core and of the `atomic` crate, with a point before every access at which shuttle's scheduler may go on
//! with another thread.
//!
//! Shuttle runs all threads of a scenario on one, as coroutines, so an access is an access and the order is sequentially
//! consistent: it explores schedules, and orderings are loom's business. The layout is that of what is wrapped, so that a
//! table still lies over a raw frame. What names no atomic of this module, such as the collector behind a visit, runs
//! from one point to the next as one step.

use core::ops::{Deref, DerefMut};
use core::sync::atomic;

pub use atomic::{Ordering, compiler_fence};
pub use shuttle::hint::spin_loop;
pub(super) use shuttle::sync::Mutex as RawMutex;
pub use shuttle::sync::MutexGuard;

/// Lets the scheduler choose. Not a yield, which would tell it that this thread waits for another.
fn point() {
    shuttle::sync::atomic::AtomicBool::new(false).load(Ordering::SeqCst);
}

/// An atomic that is reached through a point.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Scheduled<A>(A);

impl<A> Deref for Scheduled<A> {
    type Target = A;

    fn deref(&self) -> &A {
        point();
        &self.0
    }
}

impl<A> DerefMut for Scheduled<A> {
    fn deref_mut(&mut self) -> &mut A {
        &mut self.0
    }
}

macro_rules! scheduled {
    ($($name:ident: $value:ty,)*) => {
        $(
            /// The same of core, behind a point.
            pub type $name = Scheduled<atomic::$name>;

            impl Scheduled<atomic::$name> {
                /// An atomic that holds `value`.
                pub const fn new(value: $value) -> Self {
                    Self(atomic::$name::new(value))
                }
            }
        )*
    };
}

scheduled! {
    AtomicBool: bool,
    AtomicU32: u32,
    AtomicU64: u64,
    AtomicUsize: usize,
}

/// The same of core, behind a point.
pub type AtomicPtr<T> = Scheduled<atomic::AtomicPtr<T>>;

impl<T> Scheduled<atomic::AtomicPtr<T>> {
    /// An atomic that holds `value`.
    pub const fn new(value: *mut T) -> Self {
        Self(atomic::AtomicPtr::new(value))
    }
}

/// That of the `atomic` crate, behind a point.
pub type Atomic<T> = Scheduled<::atomic::Atomic<T>>;

impl<T> Scheduled<::atomic::Atomic<T>> {
    /// An atomic that holds `value`.
    pub const fn new(value: T) -> Self {
        Self(::atomic::Atomic::new(value))
    }

    /// Whether a `T` is changed by an instruction and not under a lock.
    pub const fn is_lock_free() -> bool {
        ::atomic::Atomic::<T>::is_lock_free()
    }
}

/// A fence between two points.
pub fn fence(order: Ordering) {
    point();
    atomic::fence(order);
}
