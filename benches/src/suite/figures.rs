//! Figures taken from the reports of rounds, by name.

use super::plan::{Pick, Scenario};
use crate::race::median;
use crate::size;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What a figure came to in each round.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Figure {
    /// What it is of, from its place in the scenario's report. No other of the same unit has this name.
    pub name: String,
    /// What the numbers are.
    pub unit: String,
    /// Whether more is better.
    pub more_is_better: bool,
    /// One a round, in their order.
    pub values: Vec<f64>,
    /// Of the values.
    #[serde(flatten)]
    pub spread: Spread,
}

/// The middle of some values, and how far they are apart.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Spread {
    /// The one in the middle.
    pub median: f64,
    /// A quarter is below this.
    pub lower: f64,
    /// A quarter is above this.
    pub upper: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of `values`; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        // Between the two values that are nearest to the rank.
        let at = |share: f64| {
            let rank = share * (sorted.len() - 1) as f64;
            let (low, high) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
            low + (high - low) * rank.fract()
        };
        Some(Self {
            median: median(&sorted),
            lower: at(0.25),
            upper: at(0.75),
            min,
            max,
        })
    }
}

/// A figure's unit and name.
type Key = (&'static str, String);

/// The figures of one scenario, round by round.
#[derive(Debug, Default)]
pub(super) struct Collected {
    /// In the order in which they were first seen.
    names: Vec<(Key, &'static Pick)>,
    values: BTreeMap<Key, Vec<f64>>,
}

impl Collected {
    /// Adds what `report` says.
    pub(super) fn add(&mut self, scenario: &'static Scenario, report: &Value) {
        for pick in scenario.picks {
            let keys: Vec<&str> = pick.path.split('.').collect();
            let mut found = Vec::new();
            gather(report, &keys, &mut Vec::new(), &mut found);
            for (name, value) in found {
                // Nobody's ratio to something that took no time.
                if !value.is_finite() {
                    continue;
                }
                let key = (pick.unit, name);
                if !self.values.contains_key(&key) {
                    self.names.push((key.clone(), pick));
                }
                self.values.entry(key).or_default().push(value);
            }
        }
    }

    /// All of them, each with its spread.
    pub(super) fn figures(&self) -> Vec<Figure> {
        let figure = |(key, pick): &(Key, &'static Pick)| {
            let values = self.values.get(key)?.clone();
            Some(Figure {
                name: key.1.clone(),
                unit: pick.unit.to_owned(),
                more_is_better: pick.more_is_better,
                spread: Spread::of(&values)?,
                values,
            })
        };
        self.names.iter().filter_map(figure).collect()
    }
}

/// Keys that say what shape a report has, and nothing about a figure.
const SHAPE: [&str; 8] = [
    "ratios",
    "by_format",
    "results",
    "baselines",
    "shared",
    "phases",
    "ns",
    "median",
];

/// Finds the numbers at `keys` below `value`. A name is made of the keys on the way that say something.
fn gather(value: &Value, keys: &[&str], path: &mut Vec<String>, found: &mut Vec<(String, f64)>) {
    let Some((key, rest)) = keys.split_first() else {
        if let Some(number) = number(value) {
            let told: Vec<_> = path.iter().filter(|key| !key.is_empty()).cloned().collect();
            found.push((told.join(" · "), number));
        }
        return;
    };
    let mut descend = |name: String, value: &Value| {
        path.push(name);
        gather(value, rest, path, found);
        path.pop();
    };
    match (value, *key) {
        (Value::Object(map), "*") => {
            for (name, value) in map {
                descend(name.clone(), value);
            }
        }
        (Value::Object(map), key) => {
            if let Some(value) = map.get(key) {
                let told = if SHAPE.contains(&key) { "" } else { key };
                descend(told.to_owned(), value);
            }
        }
        (Value::Array(elements), "*") => {
            for (index, element) in elements.iter().enumerate() {
                let label = element.as_object().map_or_else(String::new, label);
                let label = if label.is_empty() {
                    index.to_string()
                } else {
                    label
                };
                descend(label, element);
            }
        }
        _ => {}
    }
}

/// A number, or the median of raw ones.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Array(values) => {
            let values: Option<Vec<f64>> = values.iter().map(Value::as_f64).collect();
            values
                .filter(|values| !values.is_empty())
                .map(|v| median(&v))
        }
        value => value.as_f64(),
    }
}

/// What tells an element of an array from its neighbours.
fn label(element: &Map<String, Value>) -> String {
    const TELLING: [&str; 8] = [
        "name",
        "half",
        "format",
        "operation",
        "tables",
        "sweep",
        "ad_bits",
        "mix",
    ];
    let mut words: Vec<String> = TELLING
        .iter()
        .filter_map(|key| element.get(*key)?.as_str().map(str::to_owned))
        .collect();
    let number = |key| element.get(key).and_then(Value::as_u64);
    words.extend(number("page_bytes").map(size::show));
    words.extend(number("vcpus").map(|vcpus| format!("{vcpus} vCPU")));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const SCENARIO: Scenario = Scenario {
        name: "x",
        command: "x",
        quick: "",
        full: "",
        about: "",
        picks: &[
            Pick {
                path: "ratios.*.floor",
                unit: "ratio",
                more_is_better: true,
            },
            Pick {
                path: "results.*.ns",
                unit: "ns",
                more_is_better: false,
            },
        ],
    };

    fn collected(reports: &[Value]) -> Vec<Figure> {
        static X: Scenario = SCENARIO;
        let mut collected = Collected::default();
        for report in reports {
            collected.add(&X, report);
        }
        collected.figures()
    }

    #[test]
    fn figures_are_picked_by_path_and_named_by_what_tells_them_apart() {
        let report = |floor, ns: &[u64]| {
            json!({
                "ratios": {"ept": {"floor": floor, "mutex": 9}, "odd": 3},
                "results": [
                    {"name": "tdp", "format": "ept", "vcpus": 2, "ns": ns},
                    {"name": "tdp", "format": "npt", "vcpus": 2, "ns": 7},
                    {"ns": null},
                    5
                ]
            })
        };
        let figures = collected(&[report(0.5, &[1, 9, 2]), report(0.25, &[4])]);
        let told: Vec<_> = figures
            .iter()
            .map(|f| (f.name.as_str(), f.values.as_slice()))
            .collect();
        assert_eq!(
            told,
            [
                ("ept · floor", &[0.5, 0.25][..]),
                ("tdp ept 2 vCPU", &[2.0, 4.0]),
                ("tdp npt 2 vCPU", &[7.0, 7.0]),
            ]
        );
        assert!(figures[0].more_is_better && !figures[1].more_is_better);
        assert_eq!(figures[1].spread.median, 3.0);
    }

    #[test]
    fn a_spread_is_of_quartiles() {
        let spread = Spread::of(&[5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        assert_eq!(
            (
                spread.min,
                spread.lower,
                spread.median,
                spread.upper,
                spread.max
            ),
            (1.0, 2.0, 3.0, 4.0, 5.0)
        );
        let spread = Spread::of(&[1.0, 2.0]).unwrap();
        assert_eq!(
            (spread.lower, spread.median, spread.upper),
            (1.25, 1.5, 1.75)
        );
        assert_eq!(Spread::of(&[]), None);
    }
}
