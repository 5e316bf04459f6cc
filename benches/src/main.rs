//! `tdp-bench`: see [`tdp_bench::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    tdp_bench::cli::main()
}
