//! `conflicts`: which cache lines two vCPUs share when what they do has nothing in common.
//!
//! The program runs itself under valgrind's `lackey`, which writes down every access to memory that its threads make: of the
//! library, of the allocator, of the C library, atomic or not. There, two threads take turns (`pairs.rs`): each does its part
//! of a pair of operations between two marks, on its own part of one guest. A conflict is a cache line that one of them
//! writes in its part and the other touches in its own.
//!
//! | module | holds |
//! |---|---|
//! | `pairs` | the pairs of operations |
//! | `child` | the traced process: two threads that take turns, and their marks |
//! | `lackey` | valgrind, and its trace cut at the marks |
//! | `symbols` | which function an instruction belongs to |
//! | `permitted` | conflicts that are meant to be, each with its reason |
//!
//! Turns are what makes the trace tell: no access of one thread is in the part of the other. It makes no difference to what
//! lines an operation touches unless another one is in its way, and then it meets it on a line that is found here as well.

mod child;
mod lackey;
mod pairs;
mod permitted;
mod symbols;

pub(crate) use child::Traced;
pub(crate) use lackey::{Side, Trace, Turn, trace};
pub(crate) use pairs::faults_of;

use crate::report::{Error, Output};
use clap::Args as ClapArgs;
use serde::Serialize;
use std::collections::BTreeMap;
use symbols::Symbols;

/// Runs pairs of operations of two vCPUs on disjoint parts of one guest, and finds every cache line that one of them writes
/// and the other touches, over all memory accesses of the process. Needs valgrind.
///
/// A conflict that is not on the list of permitted ones fails the run.
#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Pairs whose names contain this; all without it
    #[arg(long, value_name = "TEXT")]
    pair: Option<String>,
}

/// The hidden half of the command, run under valgrind.
#[derive(Clone, Debug, ClapArgs)]
pub struct TracedArgs {
    /// What is run.
    #[arg(long)]
    what: Traced,
}

/// Runs what is to be traced.
///
/// # Errors
///
/// What setting up a guest comes to.
pub fn run_traced(args: &TracedArgs) -> Result<(), Error> {
    child::run(args.what)
}

/// How both sides use lines.
#[derive(Clone, Debug, Serialize)]
struct Conflict {
    /// How many lines they use like this.
    lines: usize,
    /// What the lines are part of, as far as is known.
    place: &'static str,
    /// Functions of the first side that touch it.
    first: Vec<String>,
    /// Functions of the second.
    second: Vec<String>,
    /// The first side writes it.
    first_writes: bool,
    /// The second side writes it.
    second_writes: bool,
    /// Why it is meant to be, if it is.
    permitted: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct Pair {
    pair: String,
    /// Cache lines that either side touches.
    lines: usize,
    conflicts: Vec<Conflict>,
    unexpected: usize,
}

/// Cache lines of one fault with everything in place.
#[derive(Debug, Serialize)]
struct WarmFault {
    /// Of tables.
    tables: usize,
    /// Of the thread's stack.
    stack: usize,
    /// Of the program that is traced, which calls the library.
    caller: usize,
    /// Of anything else.
    other: usize,
    /// Who touches the last two kinds, line by line.
    functions: Vec<String>,
    /// Instructions, marks included.
    instructions: u64,
}

#[derive(Debug, Serialize)]
struct Body {
    pairs: Vec<Pair>,
    warm_fault: Vec<WarmFault>,
    lines: usize,
    permitted: usize,
    unexpected: usize,
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Check`] if there is a conflict that is not permitted; [`Error::Run`] if there is no valgrind.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let trace = trace(Traced::Pairs)?;
    let symbols = Symbols::load(trace.bias)?;
    let wanted = |name: &str| args.pair.as_ref().is_none_or(|part| name.contains(part));
    let mut pairs = Vec::new();
    let mut warm_fault = Vec::new();
    for (name, turns) in &trace.pairs {
        if turns.is_empty() {
            return Err(Error::Check(format!("{name}: nothing was traced")));
        }
        if name == pairs::ONE_FAULT {
            warm_fault.extend(turns.last().map(|turn| warm(&trace, turn, &symbols)));
        } else if wanted(name) {
            pairs.push(compare(&trace, name, turns, &symbols));
        }
    }
    let all = || pairs.iter().flat_map(|pair| &pair.conflicts);
    let body = Body {
        lines: pairs.iter().map(|pair| pair.lines).sum(),
        permitted: all().filter(|it| it.permitted.is_some()).count(),
        unexpected: all().filter(|it| it.permitted.is_none()).count(),
        pairs,
        warm_fault,
    };
    show(&body, output);
    output.finish("conflicts", &body)?;
    match body.unexpected {
        0 => Ok(()),
        count => Err(Error::Check(format!(
            "{count} cache lines are shared that nobody permits"
        ))),
    }
}

/// Where the code of the traced program is.
const CALLER: &str = "benches/src/conflicts/";

/// What one side does to a line.
#[derive(Default)]
struct Use {
    writes: bool,
    instructions: Vec<u64>,
}

fn uses(turns: &[Turn], side: Side) -> BTreeMap<u64, Use> {
    let mut lines: BTreeMap<u64, Use> = BTreeMap::new();
    for access in turns
        .iter()
        .filter(|turn| turn.side == side)
        .flat_map(|turn| &turn.accesses)
    {
        let line = lines.entry(access.line).or_default();
        line.writes |= access.writes;
        if !line.instructions.contains(&access.instruction) {
            line.instructions.push(access.instruction);
        }
    }
    lines
}

fn compare(trace: &Trace, name: &str, turns: &[Turn], symbols: &Symbols) -> Pair {
    let (first, second) = (uses(turns, Side::First), uses(turns, Side::Second));
    let mut conflicts: Vec<Conflict> = Vec::new();
    for (line, mine) in &first {
        let Some(other) = second.get(line).filter(|other| mine.writes || other.writes) else {
            continue;
        };
        let mut conflict = Conflict {
            lines: 1,
            place: trace.place(*line),
            first: symbols.names(&mine.instructions),
            second: symbols.names(&other.instructions),
            first_writes: mine.writes,
            second_writes: other.writes,
            permitted: None,
        };
        conflict.permitted = permitted::reason(name, &conflict.first, &conflict.second);
        let same = |it: &&mut Conflict| {
            (&it.first, &it.second, it.place) == (&conflict.first, &conflict.second, conflict.place)
        };
        match conflicts.iter_mut().find(same) {
            Some(alike) => alike.lines += 1,
            None => conflicts.push(conflict),
        }
    }
    Pair {
        pair: name.to_owned(),
        lines: first
            .keys()
            .chain(second.keys().filter(|line| !first.contains_key(line)))
            .count(),
        unexpected: conflicts.iter().filter(|it| it.permitted.is_none()).count(),
        conflicts,
    }
}

fn warm(trace: &Trace, turn: &Turn, symbols: &Symbols) -> WarmFault {
    let mut lines: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for access in &turn.accesses {
        lines
            .entry(access.line)
            .or_default()
            .push(access.instruction);
    }
    let of = |place| {
        lines
            .keys()
            .filter(|&&line| trace.place(line) == place)
            .count()
    };
    let (tables, stack) = (of(lackey::TABLES), of(lackey::STACK));
    let others: Vec<Vec<String>> = lines
        .iter()
        .filter(|(line, _)| ![lackey::TABLES, lackey::STACK].contains(&trace.place(**line)))
        .map(|(_, instructions)| symbols.names(instructions))
        .collect();
    let of_caller = |names: &&Vec<String>| names.iter().all(|name| name.starts_with(CALLER));
    let caller = others.iter().filter(of_caller).count();
    WarmFault {
        tables,
        stack,
        caller,
        other: others.len() - caller,
        functions: others.iter().map(|names| names.join(", ")).collect(),
        instructions: turn.instructions,
    }
}

fn show(body: &Body, output: &Output) {
    output.table(
        &["pair", "lines", "conflicts", "permitted", "unexpected"],
        body.pairs.iter().map(|pair| {
            let permitted = pair.conflicts.len() - pair.unexpected;
            [
                pair.pair.clone(),
                pair.lines.to_string(),
                pair.conflicts.len().to_string(),
                permitted.to_string(),
                pair.unexpected.to_string(),
            ]
        }),
    );
    for pair in &body.pairs {
        for conflict in &pair.conflicts {
            let writes = |writes| if writes { "writes" } else { "reads" };
            output.say(format!(
                "{}: {} lines of {}: {} {} x {} {}: {}",
                pair.pair,
                conflict.lines,
                conflict.place,
                conflict.first.join(", "),
                writes(conflict.first_writes),
                conflict.second.join(", "),
                writes(conflict.second_writes),
                conflict.permitted.unwrap_or("NOT PERMITTED"),
            ));
        }
    }
    for fault in &body.warm_fault {
        output.say(format!(
            "A fault with everything in place touches {} cache lines of tables, {} of its stack, {} of its caller and {} \
             others, in {} instructions",
            fault.tables, fault.stack, fault.caller, fault.other, fault.instructions
        ));
    }
    output.say(format!(
        "{} pairs, {} lines, {} conflicts permitted, {} unexpected",
        body.pairs.len(),
        body.lines,
        body.permitted,
        body.unexpected
    ));
}
