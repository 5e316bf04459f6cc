//! When which thread last changed which part of the tables: what excuses a processor's report that no longer fits.
//!
//! A processor reports what it found when it walked; its report is traced a moment later. In between another thread
//! may have changed the entry. Kept by 2 MiB, the span of a table of level 1.

use std::collections::HashMap;

/// Frames per block.
const BLOCK: u64 = 512;
/// A wider change is kept once for everything.
const WIDE: u64 = 1024;

/// The latest change, and the latest of another thread than that.
#[derive(Clone, Copy, Debug, Default)]
struct Stamp {
    latest: Option<(u64, u32)>,
    other: Option<u64>,
}

impl Stamp {
    fn note(&mut self, thread: u32, seq: u64) {
        if let Some((latest, _)) = self.latest.filter(|&(_, by)| by != thread) {
            self.other = Some(latest);
        }
        self.latest = Some((seq, thread));
    }

    fn by_other(&self, thread: u32) -> Option<u64> {
        match self.latest {
            Some((seq, by)) if by != thread => Some(seq),
            _ => self.other,
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Stamps {
    blocks: HashMap<(u8, u64), Stamp>,
    everything: Stamp,
}

impl Stamps {
    /// `thread` changed entries over `[start, end)`.
    pub(super) fn note(&mut self, as_id: u8, start: u64, end: u64, thread: u32, seq: u64) {
        let (first, last) = (start / BLOCK, end.saturating_sub(1) / BLOCK);
        if last.saturating_sub(first) >= WIDE {
            return self.note_all(thread, seq);
        }
        for block in first..=last {
            self.blocks
                .entry((as_id, block))
                .or_default()
                .note(thread, seq);
        }
    }

    /// `thread` changed everything.
    pub(super) fn note_all(&mut self, thread: u32, seq: u64) {
        self.everything.note(thread, seq);
    }

    /// Whether another thread than `thread` changed anything near `gfn` after `since`.
    pub(super) fn changed_by_other(&self, as_id: u8, gfn: u64, thread: u32, since: u64) -> bool {
        let block = self
            .blocks
            .get(&(as_id, gfn / BLOCK))
            .and_then(|stamp| stamp.by_other(thread));
        block
            .max(self.everything.by_other(thread))
            .is_some_and(|seq| seq > since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_others_and_only_later() {
        let mut stamps = Stamps::default();
        stamps.note(0, 0x200, 0x201, 1, 10);
        assert!(stamps.changed_by_other(0, 0x3ff, 2, 9));
        assert!(!stamps.changed_by_other(0, 0x3ff, 2, 10));
        assert!(!stamps.changed_by_other(0, 0x3ff, 1, 0));
        assert!(!stamps.changed_by_other(0, 0x400, 2, 0));
        assert!(!stamps.changed_by_other(1, 0x200, 2, 0));
        // The thread's own later change does not hide the other's.
        stamps.note(0, 0x200, 0x201, 2, 12);
        assert!(stamps.changed_by_other(0, 0x200, 2, 9));
        stamps.note_all(3, 20);
        assert!(stamps.changed_by_other(1, 7, 2, 19));
        // All of a 1 GiB page is still kept by block.
        stamps.note(0, 0x4_0000, 0x8_0000, 4, 30);
        assert!(
            stamps.changed_by_other(0, 0x7_ffff, 1, 29) && !stamps.changed_by_other(0, 0, 1, 29)
        );
    }
}
