//! The rules for one source file. Each returns its findings; none knows of another.

use std::path::Path;

use super::Finding;
use super::source::{Line, Source};

const HEADER_LINES_MAX: usize = 15;
const HOT_LINES_MAX: usize = 400;
const LINES_MAX: usize = 800;

/// How far above an `unsafe` its SAFETY note may start: a statement and a paragraph.
const SAFETY_REACH_LINES: usize = 12;

/// What must not run per request, and what to do instead.
const HOT_WORDS: [(&str, &str); 31] = [
    ("Mutex", LOCK),
    ("RwLock", LOCK),
    ("Condvar", LOCK),
    ("Box::new(", ALLOCATION),
    ("vec![", ALLOCATION),
    ("Vec::new", ALLOCATION),
    ("Vec::with_capacity", ALLOCATION),
    ("VecDeque::", ALLOCATION),
    ("String::", ALLOCATION),
    (".to_vec()", ALLOCATION),
    (".to_owned()", ALLOCATION),
    (".to_string()", ALLOCATION),
    (".collect()", ALLOCATION),
    (".collect::<", ALLOCATION),
    ("Arc::new", ALLOCATION),
    ("Rc::new", ALLOCATION),
    ("HashMap", HASHING),
    ("HashSet", HASHING),
    ("BTreeMap", ALLOCATION),
    (
        "Arc::clone",
        "a shared reference count is an atomic write, borrow it or move it in before the loop",
    ),
    ("async ", "the data plane is made of state machines, write one"),
    (".await", "the data plane is made of state machines, write one"),
    ("format!(", WORDS),
    ("println!(", WORDS),
    ("eprintln!(", WORDS),
    ("info!(", WORDS),
    ("warn!(", WORDS),
    ("debug!(", WORDS),
    ("trace!(", WORDS),
    ("error!(", WORDS),
    ("thread::sleep", "a reactor never sleeps by itself, return to its loop"),
];

const LOCK: &str = "a reactor never waits, give the data one owner or hand it over by message";
const ALLOCATION: &str = "nothing allocates per request, do it at set-up or in a #[cold] function";
const HASHING: &str = "index by slot or generation instead of hashing";
const WORDS: &str = "count it and let a control thread say it, or move it to a #[cold] function";

/// All rules.
pub(super) fn check(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(header(source));
    findings.extend(length(source));
    findings.extend(hot_words(source));
    findings.extend(safety(source));
    findings.extend(left_over(source));
    findings.extend(direction(source));
    findings
}

fn header(source: &Source) -> Option<Finding> {
    let lines = source.header().count();
    let text = match lines {
        0 => "no header, start the file with //! lines: what it is, what flows in and out, who owns it".to_owned(),
        1..=HEADER_LINES_MAX => return None,
        _ => format!("a header of {lines} lines, cut it to {HEADER_LINES_MAX} and move the rest to the items"),
    };
    Some(Finding::new(&source.path, 1, text))
}

fn length(source: &Source) -> Option<Finding> {
    if source.is_test_file() {
        return None;
    }
    let limit = if source.is_hot() { HOT_LINES_MAX } else { LINES_MAX };
    let lines = source.lines.iter().filter(|line| !line.is_test).count();
    (lines > limit).then(|| {
        let text = format!("{lines} lines without tests, at most {limit}: split it by concept");
        Finding::new(&source.path, limit + 1, text)
    })
}

fn hot_words(source: &Source) -> Vec<Finding> {
    if !source.is_hot() || source.is_test_file() {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (index, line) in
        source.lines.iter().enumerate().filter(|(_, line)| !line.is_test && !line.is_cold)
    {
        for (word, advice) in HOT_WORDS {
            if has_word(&line.code, word) {
                let shown = word.trim();
                findings.push(Finding::new(
                    &source.path,
                    index + 1,
                    format!("`{shown}` in a HOT PATH file, {advice}"),
                ));
            }
        }
    }
    findings
}

/// `word` in `code`, not as the end of a longer name.
fn has_word(code: &str, word: &str) -> bool {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        let starts = !word.starts_with(is_name) || !before.is_some_and(is_name);
        let ends = !word.ends_with(is_name) || !after.is_some_and(is_name);
        starts && ends
    })
}

fn safety(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in source.lines.iter().enumerate() {
        let mut find = |text: &str| findings.push(Finding::new(&source.path, index + 1, text));
        let code = line.code.as_str();
        let above = &source.lines[index.saturating_sub(SAFETY_REACH_LINES)..=index];
        let has_note = above.iter().any(|line| line.comment.contains("SAFETY:"));
        if (has_word(code, "unsafe {") || has_word(code, "unsafe impl")) && !has_note {
            find(
                "unsafe without a SAFETY note, write // SAFETY: above it: the precondition and where it was established",
            );
        }
        // `unsafe fn(` is a type.
        if has_word(code, "unsafe fn")
            && !code.contains("unsafe fn(")
            && !has_note
            && !has_safety_doc(&source.lines[..index])
        {
            find(
                "unsafe fn without a contract, write a `# Safety` section that says what the caller must ensure",
            );
        }
        let opens = ["#![expect(unsafe_code", "#![allow(unsafe_code"]
            .iter()
            .any(|attribute| code.contains(attribute));
        let around = &source.lines
            [index.saturating_sub(SAFETY_REACH_LINES)..source.lines.len().min(index + 4)];
        if opens && !around.iter().any(|line| line.comment.contains("UNSAFETY:")) {
            find(
                "a module that opts in to unsafe code without a reason, write // UNSAFETY: why above it",
            );
        }
    }
    findings
}

/// Walks up over the attributes and doc comments of an item.
fn has_safety_doc(above: &[Line]) -> bool {
    above
        .iter()
        .rev()
        .take_while(|line| line.comment.starts_with("//") || line.code.trim().starts_with('#'))
        .any(|line| line.comment.contains("# Safety"))
}

fn left_over(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in source.lines.iter().enumerate() {
        let code = ["todo!", "unimplemented!"].into_iter().find(|word| has_word(&line.code, word));
        let note = ["FIXME", "XXX", "TODO"].into_iter().find(|word| has_word(&line.comment, word));
        if let Some(word) = code.or(note) {
            let text = format!("`{word}` is left over, do it or describe it as an issue");
            findings.push(Finding::new(&source.path, index + 1, text));
        }
    }
    findings
}

/// What the manifests do not show: a path through a dev-dependency outside tests is an error of the compiler, but a
/// name in a feature or a doc link is not.
fn direction(source: &Source) -> Vec<Finding> {
    let forbidden: &[&str] = match source.path.iter().next().and_then(|part| part.to_str()) {
        Some("core") => &["ringmill_drivers", "ringmill_vmm_glue", "ringmill_tools"],
        Some("drivers") => &["ringmill_vmm_glue", "ringmill_tools"],
        Some("vmm-glue") => &["ringmill_drivers", "ringmill_tools"],
        _ => return Vec::new(),
    };
    let mut findings = Vec::new();
    if source.is_test_file() {
        return findings;
    }
    for (index, line) in source.lines.iter().enumerate().filter(|(_, line)| !line.is_test) {
        if let Some(name) = forbidden.iter().find(|name| has_word(&line.code, name)) {
            let text = format!(
                "`{name}` is not below this package, move what both need into ringmill-core"
            );
            findings.push(Finding::new(&source.path, index + 1, text));
        }
    }
    findings
}

/// Paths that exist on the author's machine only. For every text file, Rust or not.
pub(super) fn machine_paths(path: &Path, text: &str) -> Vec<Finding> {
    // In two pieces, so that this file does not find itself.
    let homes = ["root", "home", "work", "Users"].map(|dir| format!("/{dir}/"));
    let mut findings = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let found = homes.iter().find(|home| {
            line.match_indices(home.as_str()).any(|(at, _)| {
                // Only at the start of a path: not in https://example.org/home/ or target/work/.
                let before = line[..at].chars().next_back();
                let after = line[at + home.len()..].chars().next();
                let starts = before.is_none_or(|c| !c.is_alphanumeric() && !"/._-~}".contains(c));
                starts && after.is_some_and(|c| c.is_alphanumeric() || c == '.')
            })
        });
        if let Some(home) = found {
            let text = format!(
                "a path under {home} exists on one machine only, make it relative or an example in /var/lib"
            );
            findings.push(Finding::new(path, index + 1, text));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_of(findings: &[Finding]) -> Vec<usize> {
        findings.iter().map(|finding| finding.line).collect()
    }

    fn checked(path: &str, text: &str) -> Vec<Finding> {
        check(&Source::new(Path::new(path), text))
    }

    #[test]
    fn a_good_file_has_no_findings() {
        let text = "//! What it is.\n\nfn f() -> u8 {\n    // SAFETY: checked in `new`.\n    unsafe { g() }\n}\n";
        assert_eq!(checked("core/src/x.rs", text), []);
    }

    #[test]
    fn headers_must_be_there_and_short() {
        assert_eq!(lines_of(&checked("core/src/x.rs", "fn f() {}\n")), [1]);
        let long = "//! line\n".repeat(HEADER_LINES_MAX + 1);
        assert_eq!(lines_of(&checked("core/src/x.rs", &long)), [1]);
        assert_eq!(checked("core/src/x.rs", &"//! line\n".repeat(HEADER_LINES_MAX)), []);
    }

    #[test]
    fn lengths_leave_tests_out_and_hot_files_are_shorter() {
        let body = "fn f() {}\n".repeat(LINES_MAX - 1);
        let tests = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", "fn t() {}\n".repeat(100));
        assert_eq!(checked("core/src/x.rs", &format!("//! X.\n{body}{tests}")), []);
        assert_eq!(
            lines_of(&checked("core/src/x.rs", &format!("//! X.\n{body}\n{tests}"))),
            [LINES_MAX + 1]
        );
        assert_eq!(
            lines_of(&checked("core/src/x.rs", &format!("//! HOT PATH X.\n{body}"))),
            [HOT_LINES_MAX + 1]
        );
        for path in ["core/tests/x.rs", "core/src/x/tests.rs"] {
            assert_eq!(checked(path, &format!("//! X.\n{body}\n{body}")), []);
        }
    }

    #[test]
    fn hot_files_neither_allocate_nor_lock_nor_speak() {
        let text = "//! HOT PATH\nfn f() {\n    let v = vec![0];\n    m.lock(Mutex);\n    info!(\"x\");\n\
                    let a = Arc::clone(&b);\n    // vec![ in a comment\n    let s = \"format!(\";\n}\n";
        assert_eq!(lines_of(&checked("core/src/x.rs", text)), [3, 4, 5, 6]);
        assert_eq!(checked("core/src/x.rs", &text.replace("HOT PATH", "A cool path.")), []);
    }

    #[test]
    fn cold_functions_and_tests_in_hot_files_may_do_as_they_like() {
        let text = "//! HOT PATH\n#[cold]\n#[inline(never)]\nfn f() {\n    warn!(\"x\");\n}\n\
                    #[cfg(test)]\nmod tests {\n    fn t() { vec![1]; }\n}\n";
        assert_eq!(checked("core/src/x.rs", text), []);
    }

    #[test]
    fn words_inside_longer_names_are_not_meant() {
        assert!(
            !has_word("my_vec![", "vec![")
                && !has_word("NotMutexed", "Mutex")
                && !has_word("reinfo!(", "info!(")
        );
        assert!(has_word("std::sync::Mutex<T>", "Mutex") && has_word("x.to_vec()", ".to_vec()"));
    }

    #[test]
    fn unsafe_needs_its_reason() {
        let text = "//! X.\nfn f() {\n    unsafe { g() }\n}\nunsafe impl Send for X {}\n/// Doc.\nunsafe fn h() {}\n\
                    /// Doc.\n///\n/// # Safety\n/// Say why.\n#[inline]\npub unsafe fn i() {}\nstruct T(unsafe fn());\n";
        assert_eq!(lines_of(&checked("core/src/x.rs", text)), [3, 5, 7]);
        let module = "//! X.\n#![expect(unsafe_code)]\n";
        assert_eq!(lines_of(&checked("core/src/x.rs", module)), [2]);
        let module = "//! X.\n// UNSAFETY: maps memory.\n#![expect(unsafe_code)]\n";
        assert_eq!(checked("core/src/x.rs", module), []);
    }

    #[test]
    fn left_overs_are_found_in_code_and_comments() {
        let text = "//! X.\nfn f() { todo!() }\n// FIXME: later\nlet s = \"FIXME\";\n";
        assert_eq!(lines_of(&checked("core/src/x.rs", text)), [2, 3]);
    }

    #[test]
    fn drivers_and_vmm_glue_do_not_name_each_other_outside_tests() {
        let text = "//! X.\nuse ringmill_vmm_glue::x;\n#[cfg(test)]\nmod tests {\n    use ringmill_vmm_glue::y;\n}\n";
        assert_eq!(lines_of(&checked("drivers/src/x.rs", text)), [2]);
        assert_eq!(checked("vmm-glue/src/x.rs", text), []);
        assert_eq!(checked("drivers/tests/x.rs", text), []);
    }

    #[test]
    fn paths_of_one_machine_are_found_but_not_urls() {
        let path = Path::new("README.md");
        let home = format!("/{}/", "home");
        assert_eq!(lines_of(&machine_paths(path, &format!("see\n{home}me/x\n"))), [2]);
        assert_eq!(machine_paths(path, &format!("https://example.org{home}me")), []);
        assert_eq!(machine_paths(path, &format!("target{home}me and {home}")), []);
    }
}
