//! Which function an instruction belongs to, inlined ones included: the innermost of this workspace, as far as there is one.

use crate::report::Error;
use addr2line::Loader;

/// Where the sources of this workspace are.
const CRATES: [&str; 4] = ["/tdp/src/", "/rcu/src/", "/arch/src/", "/benches/src/"];
/// The module through which all atomics go.
const ATOMICS: &str = "rcu/src/sync.rs";

pub(super) struct Symbols {
    loader: Loader,
    bias: u64,
}

impl Symbols {
    /// Of this program, loaded at `bias`.
    pub(super) fn load(bias: u64) -> Result<Self, Error> {
        let program = std::env::current_exe().map_err(|e| Error::run("this program", e))?;
        let loader = Loader::new(program).map_err(|e| Error::run("symbols", e.to_string()))?;
        Ok(Self { loader, bias })
    }

    /// Names of the functions that instructions belong to, each once.
    pub(super) fn names(&self, instructions: &[u64]) -> Vec<String> {
        let mut names: Vec<String> = instructions.iter().map(|&at| self.name(at)).collect();
        names.sort();
        names.dedup();
        names
    }

    fn name(&self, instruction: u64) -> String {
        let address = instruction.wrapping_sub(self.bias);
        if let Ok(mut frames) = self.loader.find_frames(address) {
            while let Ok(Some(frame)) = frames.next() {
                let file = frame.location.as_ref().and_then(|it| it.file);
                if let (Some(file), Some(function)) = (file.and_then(ours), frame.function) {
                    let name = function.demangle().map(String::from).unwrap_or_default();
                    return format!("{file} {}", plain(&name));
                }
            }
        }
        self.loader
            .find_symbol(address)
            .map_or_else(|| "another library".to_owned(), plain)
    }
}

/// The part of a source file's path that begins with a crate of this workspace, if it is one of those; not the module that
/// stands for the atomics, in which every atomic access is.
fn ours(file: &str) -> Option<&str> {
    let at = CRATES.iter().find_map(|name| file.rfind(name))?;
    Some(&file[at + 1..]).filter(|file| *file != ATOMICS)
}

/// A function's name without what it is generic over, and without its hash.
fn plain(name: &str) -> String {
    let name = addr2line::demangle_auto(name.into(), None);
    let name = match name.rsplit_once("::h") {
        Some((name, hash)) if hash.len() == 16 => name,
        _ => &name,
    };
    match name.find('<') {
        Some(at) if at > 0 => name[..at].to_owned(),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_workspace_are_told_from_others() {
        assert_eq!(ours("/home/a/tdp/tdp/src/vcpu.rs"), Some("tdp/src/vcpu.rs"));
        assert_eq!(
            ours("/home/a/rcu/src/section.rs"),
            Some("rcu/src/section.rs")
        );
        assert_eq!(ours("/home/a/rcu/src/sync.rs"), None);
        assert_eq!(ours("/rustc/0/library/core/src/sync/atomic.rs"), None);
    }

    #[test]
    fn names_are_plain() {
        assert_eq!(plain("act<tdp::Ours<A, B>>"), "act");
        assert_eq!(plain("a::b::h0123456789abcdef"), "a::b");
    }
}
