//! Set-associative cache of fixed size: the stuff of which TLBs and paging-structure caches are made.
//!
//! A key is looked up in one set; a full set replaces its ways in turn, so that a run is reproducible. Nothing leaves
//! the cache except by replacement or by being dropped.

/// Entries of one set.
pub(super) const WAYS: usize = 4;

/// Key that nothing has. Keys here are a page number of at most 52 bits below a context of a few bits.
const VACANT: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Set<V> {
    keys: [u64; WAYS],
    values: [V; WAYS],
    /// Way to be replaced next.
    turn: u8,
}

/// `SETS` times [`WAYS`] entries; `SETS` is a power of two.
#[derive(Clone, Debug)]
pub(super) struct Cache<V, const SETS: usize> {
    sets: [Set<V>; SETS],
    /// Whether anything was cached since the last [`clear`](Self::clear).
    used: bool,
}

impl<V: Copy, const SETS: usize> Cache<V, SETS> {
    const POWER_OF_TWO: () = assert!(
        SETS.is_power_of_two(),
        "the number of sets must be a power of two"
    );

    /// Empty cache; `filler` only gives the memory a value.
    pub(super) const fn new(filler: V) -> Self {
        let () = Self::POWER_OF_TWO;
        Self {
            sets: [Set {
                keys: [VACANT; WAYS],
                values: [filler; WAYS],
                turn: 0,
            }; SETS],
            used: false,
        }
    }

    /// Set that holds `key`, if any does: its low bits.
    #[inline]
    const fn set_of(key: u64) -> usize {
        key as usize & (SETS - 1)
    }

    #[inline]
    pub(super) fn get(&self, key: u64) -> Option<&V> {
        if !self.used {
            return None;
        }
        let set = &self.sets[Self::set_of(key)];
        set.keys
            .iter()
            .position(|&k| k == key)
            .map(|way| &set.values[way])
    }

    /// Caches `value`, in the place of an entry with the same key if there is one.
    pub(super) fn insert(&mut self, key: u64, value: V) {
        self.used = true;
        let set = &mut self.sets[Self::set_of(key)];
        let way = set
            .keys
            .iter()
            .position(|&k| k == key)
            .or_else(|| set.keys.iter().position(|&k| k == VACANT));
        let way = way.unwrap_or_else(|| {
            let way = set.turn as usize % WAYS;
            set.turn = set.turn.wrapping_add(1);
            way
        });
        set.keys[way] = key;
        set.values[way] = value;
    }

    pub(super) fn remove(&mut self, key: u64) {
        for k in &mut self.sets[Self::set_of(key)].keys {
            if *k == key {
                *k = VACANT;
            }
        }
    }

    /// Drops every entry whose key is `unwanted`.
    pub(super) fn remove_if(&mut self, unwanted: impl Fn(u64) -> bool) {
        if self.used {
            for key in self.sets.iter_mut().flat_map(|set| &mut set.keys) {
                if *key != VACANT && unwanted(*key) {
                    *key = VACANT;
                }
            }
        }
    }

    pub(super) fn clear(&mut self) {
        if self.used {
            for set in &mut self.sets {
                set.keys = [VACANT; WAYS];
            }
            self.used = false;
        }
    }
}
