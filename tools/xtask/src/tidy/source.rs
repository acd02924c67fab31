//! A Rust file as tidy sees it: per line the code without comments and string contents, the comments, and whether the
//! line belongs to tests or to a `#[cold]` function.
//!
//! A small lexer, not a parser: it knows comments (nested), strings (raw, byte), characters and lifetimes, and finds
//! the extent of an item by counting braces. That is enough for rules which a person would apply by eye.

use std::path::{Path, PathBuf};

/// A line in pieces.
#[derive(Debug, Default, Clone)]
pub(super) struct Line {
    /// Code; comments are gone, strings and characters are empty.
    pub(super) code: String,
    /// Comments, with their slashes.
    pub(super) comment: String,
    /// Inside an item under `#[cfg(test)]`.
    pub(super) is_test: bool,
    /// Inside an item under `#[cold]`.
    pub(super) is_cold: bool,
}

/// A file in lines.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    pub(super) lines: Vec<Line>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Code,
    LineComment,
    /// Depth.
    BlockComment(u32),
    /// Number of `#`; a plain string has none and knows escapes.
    RawString(usize),
    String,
}

impl Source {
    pub(super) fn new(path: &Path, text: &str) -> Self {
        let mut lines = split(text);
        mark(&mut lines, is_test_attribute, |line| line.is_test = true);
        mark(&mut lines, |code| code.contains("#[cold]"), |line| line.is_cold = true);
        Self { path: path.to_owned(), lines }
    }

    /// Lines that start the file with `//!`.
    pub(super) fn header(&self) -> impl Iterator<Item = &str> {
        self.lines
            .iter()
            .map(|line| line.comment.trim())
            .take_while(|comment| comment.starts_with("//!"))
    }

    pub(super) fn is_hot(&self) -> bool {
        self.header().any(|line| line.contains("HOT PATH"))
    }

    /// Whole files of tests: `x/tests/y.rs`, and `x/tests.rs` which its parent declares under `#[cfg(test)]`.
    pub(super) fn is_test_file(&self) -> bool {
        let is_dir = |name: &str| self.path.iter().any(|part| part == name);
        is_dir("tests") || is_dir("fuzz") || self.path.ends_with("tests.rs")
    }
}

fn is_test_attribute(code: &str) -> bool {
    code.contains("#[cfg(test)]") || code.contains("#[cfg(all(test")
}

fn split(text: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut state = State::Code;
    for text in text.lines() {
        let (line, next) = split_line(text, state);
        lines.push(line);
        state = next;
    }
    lines
}

fn split_line(text: &str, mut state: State) -> (Line, State) {
    let chars: Vec<char> = text.chars().collect();
    let mut line = Line::default();
    let mut at = 0;
    while at < chars.len() {
        let (here, next) = (chars[at], chars.get(at + 1).copied());
        match state {
            State::Code => match (here, next) {
                ('/', Some('/')) => {
                    state = State::LineComment;
                    continue;
                }
                ('/', Some('*')) => {
                    state = State::BlockComment(1);
                    at += 2;
                    continue;
                }
                ('"', _) => {
                    line.code.push('"');
                    state = State::String;
                }
                ('r', Some('"' | '#')) if !is_word_before(&chars, at) => {
                    let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
                    // r#name is an identifier.
                    if chars.get(at + 1 + hashes) == Some(&'"') {
                        line.code.push('"');
                        state = State::RawString(hashes);
                        at += hashes + 2;
                        continue;
                    }
                    line.code.push(here);
                }
                ('\'', _) => {
                    line.code.push('\'');
                    at += char_literal_len(&chars[at..]);
                    continue;
                }
                _ => line.code.push(here),
            },
            State::LineComment => line.comment.push(here),
            State::BlockComment(depth) => match (here, next) {
                ('*', Some('/')) => {
                    state = if depth == 1 { State::Code } else { State::BlockComment(depth - 1) };
                    at += 1;
                }
                ('/', Some('*')) => {
                    state = State::BlockComment(depth + 1);
                    at += 1;
                }
                _ => line.comment.push(here),
            },
            State::String if here == '\\' => at += 1,
            State::String if here == '"' => {
                line.code.push('"');
                state = State::Code;
            }
            State::RawString(hashes) if here == '"' && ends_raw(&chars[at + 1..], hashes) => {
                line.code.push('"');
                state = State::Code;
                at += hashes;
            }
            State::String | State::RawString(_) => {}
        }
        at += 1;
    }
    if state == State::LineComment {
        state = State::Code;
    }
    (line, state)
}

/// In `for"` the `r` ends a word; in `br"` it does not, because the `b` is part of the string's start.
fn is_word_before(chars: &[char], at: usize) -> bool {
    let word_char =
        |index: usize| chars.get(index).is_some_and(|c| c.is_alphanumeric() || *c == '_');
    match at.checked_sub(1) {
        Some(before) if matches!(chars[before], 'b' | 'c') => {
            before.checked_sub(1).is_some_and(word_char)
        }
        Some(before) => word_char(before),
        None => false,
    }
}

fn ends_raw(rest: &[char], hashes: usize) -> bool {
    rest.len() >= hashes && rest[..hashes].iter().all(|c| *c == '#')
}

/// How many characters a literal like `'x'` or `'\n'` has from its first quote; 1 for a lifetime.
fn char_literal_len(rest: &[char]) -> usize {
    match rest {
        [_, '\\', _, tail @ ..] => tail.iter().position(|c| *c == '\'').map_or(1, |end| end + 4),
        [_, _, '\'', ..] => 3,
        _ => 1,
    }
}

/// Marks every line of each item that follows an attribute: to its closing brace, or to `;` if it has no braces.
fn mark(lines: &mut [Line], is_attribute: impl Fn(&str) -> bool, set: impl Fn(&mut Line)) {
    let mut first = 0;
    while first < lines.len() {
        if !is_attribute(&lines[first].code) {
            first += 1;
            continue;
        }
        let last = item_end(lines, first);
        lines[first..=last].iter_mut().for_each(&set);
        first = last + 1;
    }
}

fn item_end(lines: &[Line], first: usize) -> usize {
    let (mut braces, mut others) = (0_i32, 0_i32);
    for (index, line) in lines.iter().enumerate().skip(first) {
        for c in line.code.chars() {
            match c {
                '{' => braces += 1,
                '}' => {
                    braces -= 1;
                    if braces <= 0 {
                        return index;
                    }
                }
                '(' | '[' => others += 1,
                ')' | ']' => others -= 1,
                ';' if braces == 0 && others == 0 => return index,
                _ => {}
            }
        }
    }
    lines.len() - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str) -> Vec<String> {
        Source::new(Path::new("x.rs"), text).lines.into_iter().map(|line| line.code).collect()
    }

    #[test]
    fn comments_and_strings_are_not_code() {
        assert_eq!(code("a // vec![\nb /* Mutex /* nested */\nstill */ c"), ["a ", "b ", " c"]);
        assert_eq!(code("f(\"format!( \\\" x\", g)"), ["f(\"\", g)"]);
        assert_eq!(code("f(r#\"a \" b\"#, br\"c\\\", 'x')"), ["f(\"\", b\"\", ')"]);
        assert_eq!(code("let s = \"two\nlines {\";"), ["let s = \"", "\";"]);
    }

    #[test]
    fn lifetimes_are_not_characters() {
        assert_eq!(
            code("fn f<'a>(x: &'a str, c: char) { c == '\"'; c == '\\'' }"),
            ["fn f<'a>(x: &'a str, c: char) { c == '; c == ' }"]
        );
    }

    #[test]
    fn test_modules_and_cold_functions_are_marked_to_their_end() {
        let text = "fn a() {}\n#[cold]\n#[inline(never)]\nfn b(x: [u8; 2]) {\n    if x {}\n}\nfn c() {}\n\
                    #[cfg(test)]\nmod tests {\n    fn d() {}\n}\n#[cfg(test)]\nmod more;\nfn e() {}";
        let source = Source::new(Path::new("x.rs"), text);
        let cold: Vec<bool> = source.lines.iter().map(|line| line.is_cold).collect();
        let test: Vec<bool> = source.lines.iter().map(|line| line.is_test).collect();
        assert_eq!(cold.iter().filter(|is_cold| **is_cold).count(), 5);
        assert!(!cold[0] && cold[1] && cold[5] && !cold[6]);
        assert_eq!(
            test,
            [
                false, false, false, false, false, false, false, true, true, true, true, true,
                true, false
            ]
        );
    }
}
