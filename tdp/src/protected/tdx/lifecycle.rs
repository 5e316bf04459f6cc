//! A TD's two states and what they admit.
//!
//! Protocol. The *life cycle* says whether the TD's key can be used: configured; blocked, once no vCPU is associated any
//! more; teardown, once caches are written back and the key is given up. The *operational state* says what the TD is
//! doing while the key is configured: being built, running, being exported or imported. Each call is admitted in a set of
//! them. While a TD may run, what was mapped must be blocked and tracked before it is taken away.

use super::calls::Call;

/// Whether the TD's key can be used.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Lifecycle {
    /// The key is configured: the TD can be built and run.
    KeysConfigured = 0,
    /// No vCPU is associated, and none can be.
    Blocked = 1,
    /// The key is given up: pages can be reclaimed in any order.
    Teardown = 2,
}

impl Lifecycle {
    pub(crate) const fn of(number: u32) -> Self {
        match number {
            0 => Lifecycle::KeysConfigured,
            1 => Lifecycle::Blocked,
            _ => Lifecycle::Teardown,
        }
    }
}

/// What the TD is doing. The numbers are the module's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum OpState {
    /// Created.
    Uninitialized = 0,
    /// Being built.
    Initialized = 1,
    /// Finalised: its vCPUs may run.
    Runnable = 2,
    /// Exported while it runs.
    LiveExport = 3,
    /// Exported while it is paused.
    PausedExport = 4,
    /// Exported.
    PostExport = 5,
    /// Memory is being imported.
    MemoryImport = 6,
    /// Other state is being imported.
    StateImport = 7,
    /// The state is imported.
    PostImport = 8,
    /// It runs while the rest of its memory is imported.
    LiveImport = 9,
    /// The import failed; only teardown is left.
    FailedImport = 10,
}

impl OpState {
    pub(crate) const fn of(number: u32) -> Self {
        match number {
            0 => OpState::Uninitialized,
            1 => OpState::Initialized,
            2 => OpState::Runnable,
            3 => OpState::LiveExport,
            4 => OpState::PausedExport,
            5 => OpState::PostExport,
            6 => OpState::MemoryImport,
            7 => OpState::StateImport,
            8 => OpState::PostImport,
            9 => OpState::LiveImport,
            _ => OpState::FailedImport,
        }
    }

    /// Whether vCPUs may run.
    pub const fn may_run(self) -> bool {
        matches!(
            self,
            OpState::Runnable | OpState::LiveExport | OpState::LiveImport
        )
    }

    /// Whether an entry must be blocked and tracked before its page or table is taken away.
    pub const fn needs_tracking(self) -> bool {
        self.may_run()
    }

    /// Whether an import is in progress, so that what is taken away stays marked as removed.
    pub const fn is_importing(self) -> bool {
        matches!(
            self,
            OpState::MemoryImport
                | OpState::StateImport
                | OpState::PostImport
                | OpState::LiveImport
        )
    }

    /// Whether the migration calls lead from here to `next`.
    pub const fn leads_to(self, next: OpState) -> bool {
        use OpState as S;
        match next {
            S::Uninitialized | S::Initialized => false,
            S::Runnable => matches!(
                self,
                S::LiveExport | S::PausedExport | S::PostExport | S::PostImport | S::LiveImport
            ),
            S::LiveExport => matches!(self, S::Runnable),
            S::PausedExport => matches!(self, S::LiveExport),
            S::PostExport => matches!(self, S::PausedExport),
            S::MemoryImport => matches!(self, S::Uninitialized),
            S::StateImport => matches!(self, S::MemoryImport),
            S::PostImport => matches!(self, S::StateImport),
            S::LiveImport => matches!(self, S::PostImport),
            // Once the TD may run, an import that fails is only over.
            S::FailedImport => self.is_importing() && !self.may_run(),
        }
    }
}

/// Whether `call` is admitted in `state`.
pub(crate) const fn admits(call: Call, state: OpState) -> bool {
    use OpState as S;
    match call {
        Call::MngInit => matches!(state, S::Uninitialized),
        Call::MemPageAdd | Call::MrExtend | Call::MrFinalize => matches!(state, S::Initialized),
        Call::VpCreate => matches!(state, S::Initialized | S::MemoryImport | S::StateImport),
        Call::MemSeptAdd => {
            matches!(state, S::Initialized | S::Runnable | S::LiveExport) || state.is_importing()
        }
        Call::MemPageAug => matches!(
            state,
            S::Initialized | S::Runnable | S::LiveExport | S::LiveImport
        ),
        Call::MemRangeBlock
        | Call::MemRangeUnblock
        | Call::MemPageDemote
        | Call::MemPagePromote => may_change(state),
        Call::MemPageRemove => may_change(state) || matches!(state, S::FailedImport),
        Call::MemSeptRemove | Call::MemSeptRd => !matches!(state, S::Uninitialized),
        Call::MemTrack => !matches!(state, S::Uninitialized | S::FailedImport),
        Call::VpEnter => state.may_run(),
        // Judged elsewhere: by the life cycle, by where the state is to go, or because the guest runs.
        Call::MngVpFlushDone
        | Call::PhymemCacheWb
        | Call::MngKeyFreeId
        | Call::PhymemPageReclaim
        | Call::VpFlush
        | Call::Migrate
        | Call::GuestPageAccept => true,
    }
}

const fn may_change(state: OpState) -> bool {
    use OpState as S;
    matches!(
        state,
        S::Initialized
            | S::Runnable
            | S::LiveExport
            | S::LiveImport
            | S::PausedExport
            | S::PostExport
            | S::PostImport
    )
}
