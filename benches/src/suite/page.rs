//! The report as one file of HTML that needs nothing else: tables, and plots inside of it.

use super::plot::{draw, short};
use super::{Body, Figure, Told};
use crate::report::{Error, Machine};
use std::fmt::{Display, Write};

const STYLE: &str = "\
body{font:14px/1.5 sans-serif;max-width:1040px;margin:2em auto;padding:0 1em;color:#222}\
table{border-collapse:collapse;margin:.5em 0}\
td,th{padding:.1em .8em;text-align:right;border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}\
td:first-child,th:first-child{text-align:left}\
code{background:#f3f3f3;padding:.1em .3em}summary{cursor:pointer}\
h2{border-top:2px solid #456;padding-top:.4em;margin-top:2em}.wrong{color:#b00;font-weight:bold}svg{max-width:100%}";

/// The whole file.
///
/// # Errors
///
/// If a plot cannot be drawn.
pub(super) fn render(body: &Body, machine: &Machine) -> Result<String, Error> {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>tdp-bench suite</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>tdp-bench suite</h1>\n"
    );
    page.push_str(&preamble(body, machine));
    for (number, told) in body.scenarios.iter().enumerate() {
        page.push_str(&section(number, told)?);
    }
    page.push_str("</body>\n</html>\n");
    Ok(page)
}

fn preamble(body: &Body, machine: &Machine) -> String {
    let known = |text: &Option<String>| text.clone().unwrap_or_else(|| "not known".to_owned());
    let memory = machine.memory_bytes.map_or_else(
        || "not known".to_owned(),
        |bytes| format!("{} MiB", bytes >> 20),
    );
    let facts = [
        (
            "processor",
            format!("{}, {} of them", known(&machine.model), machine.cpus),
        ),
        ("memory", memory),
        ("kernel", known(&machine.kernel)),
        (
            "build",
            format!("{}, version {}", machine.build, env!("CARGO_PKG_VERSION")),
        ),
        ("source", known(&body.commit)),
        (
            "rounds",
            format!("{}{}", body.rounds, if body.quick { ", quick" } else { "" }),
        ),
        ("took", format!("{:.0} s", body.seconds)),
    ];
    let mut text = "<table>\n".to_owned();
    for (what, fact) in &facts {
        put(
            &mut text,
            format_args!("<tr><td>{what}</td><td>{}</td></tr>\n", escape(fact)),
        );
    }
    text.push_str(
        "</table>\n<p>Every scenario ran once in each round. A figure has one value a round: its median, quartiles and extremes are over \
         the rounds. In the plots a dot is a round, a bar goes from the lower quartile to the upper. Times differ between machines; \
         ratios of contenders that ran in one round carry over.</p>\n<ol>\n",
    );
    for (number, told) in body.scenarios.iter().enumerate() {
        let wrong = if told.errors.is_empty() {
            ""
        } else {
            " <span class=\"wrong\">failed</span>"
        };
        put(
            &mut text,
            format_args!(
                "<li><a href=\"#s{number}\">{}</a>{wrong}</li>\n",
                escape(&told.name)
            ),
        );
    }
    text.push_str("</ol>\n");
    text
}

fn section(number: usize, told: &Told) -> Result<String, Error> {
    let mut text = String::new();
    put(
        &mut text,
        format_args!(
            "<h2 id=\"s{number}\">{}</h2>\n<p>{}</p>\n<p><code>{}</code></p>\n",
            escape(&told.name),
            escape(&told.about),
            escape(&told.command)
        ),
    );
    for error in &told.errors {
        put(
            &mut text,
            format_args!("<p class=\"wrong\">{}</p>\n", escape(error)),
        );
    }
    let mut units: Vec<&str> = told
        .figures
        .iter()
        .map(|figure| figure.unit.as_str())
        .collect();
    units.sort_unstable();
    units.dedup();
    // Ratios first: they are what carries over.
    units.sort_by_key(|unit| !unit.starts_with("ratio"));
    for unit in units {
        let figures: Vec<&Figure> = told.figures.iter().filter(|f| f.unit == unit).collect();
        put(
            &mut text,
            format_args!("<h3>{}</h3>\n{}\n", escape(unit), draw(&figures, unit)?),
        );
        put(
            &mut text,
            format_args!(
                "<details><summary>{} figures</summary>\n{}</details>\n",
                figures.len(),
                table(&figures)
            ),
        );
    }
    put(
        &mut text,
        format_args!(
            "<details><summary>parameters and checks</summary>\n<p><code>{}</code></p>\n<p><code>{}</code></p></details>\n",
            escape(&told.parameters),
            escape(&told.checks)
        ),
    );
    Ok(text)
}

fn table(figures: &[&Figure]) -> String {
    let mut text =
        "<table>\n<tr><th></th><th>median</th><th>lower quartile</th><th>upper</th><th>least</th><th>most</th><th>rounds</th></tr>\n"
            .to_owned();
    for figure in figures {
        let spread = &figure.spread;
        put(
            &mut text,
            format_args!("<tr><td>{}</td>", escape(&figure.name)),
        );
        for value in [
            spread.median,
            spread.lower,
            spread.upper,
            spread.min,
            spread.max,
        ] {
            put(&mut text, format_args!("<td>{}</td>", short(value)));
        }
        put(
            &mut text,
            format_args!("<td>{}</td></tr>\n", figure.values.len()),
        );
    }
    text.push_str("</table>\n");
    text
}

fn put(text: &mut String, what: impl Display) {
    // A string takes everything.
    let _ = write!(text, "{what}");
}

/// Text that HTML takes for nothing else.
fn escape(text: impl Display) -> String {
    let mut escaped = String::new();
    for c in text.to_string().chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::Spread;
    use serde_json::Value;

    fn body(name: &str, values: &[f64]) -> Body {
        Body {
            commit: Some("<b>".to_owned()),
            started: 0,
            seconds: 1.0,
            quick: true,
            rounds: 2,
            scenarios: vec![Told {
                name: name.to_owned(),
                about: name.to_owned(),
                command: "tdp-bench x".to_owned(),
                parameters: Value::Null,
                checks: Value::Null,
                errors: vec![format!("round 1: {name}")],
                figures: vec![Figure {
                    name: name.to_owned(),
                    unit: "ratio, more is better".to_owned(),
                    more_is_better: true,
                    values: values.to_vec(),
                    spread: Spread::of(values).unwrap(),
                }],
            }],
        }
    }

    #[test]
    fn a_page_has_a_plot_and_names_no_address() {
        for values in [&[0.001, 70.0][..], &[0.0, 0.0], &[1.0, 1.0], &[-1.0, 1e300]] {
            let page = render(&body("sweeps", values), &Machine::detect()).unwrap();
            assert_eq!(page.matches("<svg").count(), 1, "{values:?}");
            assert_eq!(page.matches("<circle").count(), values.len(), "{values:?}");
            for word in ["http", "src=", "<script", "<link", "@import", "url("] {
                assert!(!page.contains(word), "{word}");
            }
        }
    }

    #[test]
    fn what_others_wrote_stays_text() {
        let page = render(&body("<i>&'\"", &[1.0]), &Machine::detect()).unwrap();
        assert!(!page.contains("<i>") && !page.contains("<b>"), "{page}");
        assert!(page.contains("&lt;i&gt;"));
    }
}
