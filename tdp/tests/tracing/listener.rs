//! Listens to events and keeps a copy of the tables.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};
use tdp::{AddressSpaceId, Format, Gfn, Host, Level, Mmu, Spte};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// The fields of one event. Numbers and flags as they are, words as their length.
pub(crate) type Fields = BTreeMap<&'static str, u64>;

/// Address space, private, first frame, level.
type Place = (u8, bool, u64, u8);

/// Leaves, by place.
pub(crate) struct Copy;

impl Copy {
    /// Every leaf of the halves of some address spaces.
    pub(crate) fn of<F: Format, H: Host>(
        mmu: &Mmu<F, H>,
        spaces: impl IntoIterator<Item = AddressSpaceId>,
    ) -> BTreeMap<Place, Spte> {
        let mut leaves = BTreeMap::new();
        for as_id in spaces {
            let all = Gfn(0)..Gfn(u64::MAX);
            mmu.visit_leaves(as_id, all.clone(), |leaf| {
                let place = (as_id.0, false, leaf.gfn.0, leaf.level.number());
                leaves.insert(place, leaf.spte);
            });
            mmu.visit_private_leaves(as_id, all, |leaf| {
                let place = (as_id.0, true, leaf.gfn.0, leaf.level.number());
                leaves.insert(place, leaf.spte);
            });
        }
        leaves
    }
}

/// What was heard.
pub(crate) struct Heard<F> {
    events: Vec<(&'static str, Fields)>,
    _format: PhantomData<F>,
}

impl<F: Format> Heard<F> {
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Fields> {
        let named = self.events.iter().filter(move |(it, _)| *it == name);
        named.map(|(_, fields)| fields)
    }

    pub(crate) fn count(&self, name: &str) -> usize {
        self.all(name).count()
    }

    pub(crate) fn first<'a>(&'a self, name: &'a str) -> &'a Fields {
        self.all(name).next().unwrap_or_else(|| panic!("no {name}"))
    }

    /// The leaves that there must be now. Each change has to go on from the one before.
    pub(crate) fn copy(&self) -> BTreeMap<Place, Spte> {
        let mut entries: BTreeMap<Place, Spte> = BTreeMap::new();
        for (name, fields) in &self.events {
            let at = |level: u64| {
                let level = Level::from_number(level as u8).expect("there is such a level");
                let private = fields.get("private") == Some(&1);
                (
                    level,
                    (
                        fields["as_id"] as u8,
                        private,
                        fields["gfn"],
                        level.number(),
                    ),
                )
            };
            match *name {
                "get_page" => {
                    // A new table is empty.
                    let (level, (as_id, private, first, number)) = at(fields["level"]);
                    let span = level.pages().saturating_mul(512);
                    entries.retain(|place, _| {
                        (place.0, place.1, place.3) != (as_id, private, number)
                            || place.2.wrapping_sub(first) >= span
                    });
                }
                "spte_changed" => {
                    let (_, place) = at(fields["level"]);
                    let (old, new) = (Spte(fields["old_spte"]), Spte(fields["new_spte"]));
                    let was = entries.insert(place, new).unwrap_or(F::EMPTY);
                    let kept = !(F::ACCESSED | F::DIRTY);
                    assert_eq!(
                        was.0 & kept,
                        old.0 & kept,
                        "{place:?}: {was:?}, {old:?}, {new:?}"
                    );
                }
                "split_huge_page" => {
                    let (level, (as_id, private, first, number)) = at(fields["level"]);
                    let huge = Spte(fields["huge_spte"]);
                    let below = level.below().expect("a large leaf");
                    for index in 0..512 {
                        let gfn = first + index * below.pages();
                        let child = F::split_child(huge, level, index as usize);
                        entries.insert((as_id, private, gfn, number - 1), child);
                    }
                }
                _ => {}
            }
        }
        entries.retain(|place, spte| {
            let level = Level::from_number(place.3).expect("there is such a level");
            F::is_leaf(*spte, level)
        });
        entries
    }
}

/// Runs `body` and hears what this thread tells meanwhile.
pub(crate) fn listen<F: Format, R>(body: impl FnOnce() -> R) -> (R, Heard<F>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let heard = events.clone();
    let hear = move |name, fields: &Fields| {
        let mut heard = heard.lock().expect("nothing panics while listening");
        heard.push((name, fields.clone()));
    };
    let result = interrupt(hear, body);
    let events = std::mem::take(&mut *events.lock().expect("nothing panics while listening"));
    let heard = Heard {
        events,
        _format: PhantomData,
    };
    (result, heard)
}

/// Runs `body`, and `meanwhile` at each event of this thread, inside whatever tells of it.
pub(crate) fn interrupt<R>(
    meanwhile: impl FnMut(&'static str, &Fields) + Send + 'static,
    body: impl FnOnce() -> R,
) -> R {
    tracing::subscriber::with_default(Interrupter(Mutex::new(meanwhile)), body)
}

struct Interrupter<T>(Mutex<T>);

impl<T: FnMut(&'static str, &Fields) + Send + 'static> Subscriber for Interrupter<T> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "tdp" && *metadata.level() == tracing::Level::TRACE
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Collected::default();
        event.record(&mut fields);
        // What is done meanwhile may tell of itself: that is nobody's business.
        if let Ok(mut meanwhile) = self.0.try_lock() {
            meanwhile(event.metadata().name(), &fields.0);
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Collected(Fields);

impl Visit for Collected {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name(), value as u64);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name(), u64::from(value));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.len() as u64);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        panic!("{} is neither a number nor a word: {value:?}", field.name());
    }
}
