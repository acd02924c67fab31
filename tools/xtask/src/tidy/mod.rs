//! `cargo xtask tidy`: what a machine can check of the house style.
//!
//! In: the files of the workspace, as text. Out: findings, one line each, `file:line: what, what to do`. Each rule is a
//! function in `rules` (source files) or here (names, packages); it sees a file through [`source::Source`], in which
//! comments and the contents of strings are apart from the code.

mod packages;
mod rules;
mod source;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use source::Source;

/// Directories that are not ours to check.
const SKIPPED_DIRS: [&str; 3] = ["target", ".git", "node_modules"];

/// Text that is searched for paths of one machine, besides Rust.
const TEXT_EXTENSIONS: [&str; 8] = ["rs", "md", "toml", "sh", "json", "yml", "yaml", "txt"];

/// Names that say nothing about what is in the file.
const EMPTY_NAMES: [&str; 8] =
    ["util", "utils", "common", "helper", "helpers", "manager", "misc", "stuff"];

/// Something to change.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    path: PathBuf,
    /// Counted from 1.
    line: usize,
    text: String,
}

impl Finding {
    fn new(path: &Path, line: usize, text: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, text: text.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:{}: {}", self.path.display(), self.line, self.text)
    }
}

/// Checks the workspace at `root`; the findings are sorted by file and line.
pub(crate) fn check(root: &Path) -> Result<Vec<Finding>> {
    let mut paths = Vec::new();
    list(root, Path::new(""), &mut paths)?;
    let mut findings = packages::check(root)?;
    for path in &paths {
        findings.extend(check_name(path));
        let extension = path.extension().map(|extension| extension.to_string_lossy());
        // `.ci/run` and the like have no extension.
        if extension.as_deref().is_some_and(|extension| !TEXT_EXTENSIONS.contains(&extension)) {
            continue;
        }
        let bytes =
            fs::read(root.join(path)).with_context(|| format!("reading {}", path.display()))?;
        let Ok(text) = String::from_utf8(bytes) else { continue };
        findings.extend(rules::machine_paths(path, &text));
        if extension.as_deref() == Some("rs") {
            findings.extend(rules::check(&Source::new(path, &text)));
        }
    }
    findings.sort();
    Ok(findings)
}

fn list(root: &Path, dir: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    let full = root.join(dir);
    let entries = fs::read_dir(&full).with_context(|| format!("listing {}", full.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("listing {}", full.display()))?;
        let path = dir.join(entry.file_name());
        let kind = entry.file_type().with_context(|| format!("looking at {}", path.display()))?;
        // In a worktree `.git` is a file.
        if SKIPPED_DIRS.iter().any(|skipped| entry.file_name() == *skipped) {
            continue;
        }
        if kind.is_dir() {
            list(root, &path, paths)?;
        } else if kind.is_file() {
            paths.push(path);
        }
    }
    Ok(())
}

fn check_name(path: &Path) -> Option<Finding> {
    let is_rust = path.extension().is_some_and(|extension| extension == "rs");
    let words: Vec<_> = path
        .iter()
        .map(|part| Path::new(part).file_stem().unwrap_or(part).to_string_lossy())
        .collect();
    let empty = words.iter().find(|word| EMPTY_NAMES.contains(&word.as_ref()))?;
    is_rust.then(|| {
        Finding::new(
            path,
            1,
            format!("`{empty}` says nothing, name the file by the one concept in it"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_say_nothing_are_found_in_files_and_folders() {
        assert!(check_name(Path::new("core/src/utils.rs")).is_some());
        assert!(check_name(Path::new("tools/tests/common/mod.rs")).is_some());
        assert!(check_name(Path::new("core/src/reactor.rs")).is_none());
        assert!(check_name(Path::new("docs/common.md")).is_none());
    }

    #[test]
    fn a_finding_is_one_line_that_an_editor_can_follow() {
        let finding = Finding::new(Path::new("a/b.rs"), 7, "what, what to do");
        assert_eq!(finding.to_string(), "a/b.rs:7: what, what to do");
    }
}
