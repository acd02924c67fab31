//! Cuts a byte stream without framing into JSON values, without parsing them.
//!
//! The scanner looks at every byte once, however small the pieces are in which a value arrives: it remembers where
//! it stopped, how deep it is and whether it is inside a string. It decides only where a value *ends*; whether it
//! is valid is the parser's business. Bytes: untrusted. Owner: one connection.

use std::ops::Range;

/// What the bytes so far amount to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scan {
    /// No complete value yet.
    Incomplete,
    /// The next value is at this range of the buffer.
    Value(Range<usize>),
    /// A complete value, but nested deeper than allowed.
    TooDeep(Range<usize>),
    /// The value under way is longer than allowed already.
    TooLong,
    /// A byte that cannot begin a JSON value.
    Garbage(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inside {
    /// Before a value.
    Nothing,
    /// In an object or array.
    Container,
    /// In a string that is the whole value.
    String,
    /// In a number, `true`, `false` or `null` that is the whole value.
    Word,
}

/// Scanner state for one buffer; positions are indices into that buffer.
#[derive(Debug)]
pub struct Scanner {
    depth_max: usize,
    length_max: usize,
    at: usize,
    begin: usize,
    inside: Inside,
    depth: usize,
    deepest: usize,
    in_string: bool,
    escaped: bool,
}

impl Scanner {
    /// A scanner that refuses values deeper than `depth_max` levels or longer than `length_max` bytes.
    pub fn new(depth_max: usize, length_max: usize) -> Self {
        Self {
            depth_max,
            length_max,
            at: 0,
            begin: 0,
            inside: Inside::Nothing,
            depth: 0,
            deepest: 0,
            in_string: false,
            escaped: false,
        }
    }

    /// Looks for the end of the next value in `buffer`, going on where the last call stopped.
    ///
    /// With `at_end` no more bytes will come: a bare number is complete then.
    pub fn next(&mut self, buffer: &[u8], at_end: bool) -> Scan {
        while let Some(&byte) = buffer.get(self.at) {
            match self.inside {
                Inside::Nothing => match byte {
                    b' ' | b'\t' | b'\r' | b'\n' => self.at += 1,
                    b'{' | b'[' => self.start(Inside::Container),
                    b'"' => self.start(Inside::String),
                    b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => self.start(Inside::Word),
                    other => return Scan::Garbage(other),
                },
                Inside::Word => {
                    if matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | b'{' | b'[' | b'"') {
                        return self.finish();
                    }
                    self.at += 1;
                }
                Inside::String | Inside::Container => {
                    self.at += 1;
                    if self.step(byte) {
                        return self.finish();
                    }
                }
            }
            if self.inside != Inside::Nothing && self.at - self.begin > self.length_max {
                return Scan::TooLong;
            }
        }
        if at_end && self.inside == Inside::Word { self.finish() } else { Scan::Incomplete }
    }

    /// Whether a value has begun that has not ended.
    pub fn is_inside(&self) -> bool {
        self.inside != Inside::Nothing
    }

    /// Tells the scanner that the first `count` bytes of the buffer were removed.
    ///
    /// They must lie before the value under way.
    pub fn removed(&mut self, count: usize) {
        self.at = self.at.saturating_sub(count);
        self.begin = self.begin.saturating_sub(count);
    }

    /// First byte that is still needed.
    pub fn needed_from(&self) -> usize {
        if self.is_inside() { self.begin } else { self.at }
    }

    fn start(&mut self, inside: Inside) {
        self.begin = self.at;
        self.inside = inside;
        self.depth = usize::from(inside == Inside::Container);
        self.deepest = self.depth;
        self.in_string = inside == Inside::String;
        self.escaped = false;
        self.at += 1;
    }

    /// One byte inside a string or container; true when it ends the value.
    fn step(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return !self.in_string && self.inside == Inside::String;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => {
                self.depth += 1;
                self.deepest = self.deepest.max(self.depth);
            }
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
        self.depth == 0
    }

    fn finish(&mut self) -> Scan {
        let range = self.begin..self.at;
        self.inside = Inside::Nothing;
        if self.deepest > self.depth_max { Scan::TooDeep(range) } else { Scan::Value(range) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(bytes: &[u8], piece_len: usize) -> Vec<Scan> {
        let mut scanner = Scanner::new(4, 64);
        let mut found = Vec::new();
        let mut have = 0;
        while have < bytes.len() {
            have = (have + piece_len).min(bytes.len());
            loop {
                match scanner.next(&bytes[..have], have == bytes.len()) {
                    Scan::Incomplete => break,
                    end @ (Scan::TooLong | Scan::Garbage(_)) => {
                        found.push(end);
                        return found;
                    }
                    value => found.push(value),
                }
            }
        }
        found
    }

    #[test]
    fn values_are_found_whatever_the_pieces() {
        let text = br#" {"a":"}\"{"}[1,[2]]"x\\" 12 true{}nul"#;
        let want: [&[u8]; 7] =
            [br#"{"a":"}\"{"}"#, b"[1,[2]]", br#""x\\""#, b"12", b"true", b"{}", b"nul"];
        for piece_len in 1..text.len() {
            let got: Vec<&[u8]> = all(text, piece_len)
                .into_iter()
                .map(|scan| match scan {
                    Scan::Value(range) => &text[range],
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(got, want, "pieces of {piece_len}");
        }
    }

    #[test]
    fn garbage_depth_and_length_are_told_apart() {
        assert_eq!(all(b"GET / HTTP/1.1", 3), [Scan::Garbage(b'G')]);
        assert_eq!(all(b"[[[[]]]][[[[[]]]]]", 2), [Scan::Value(0..8), Scan::TooDeep(8..18)]);
        assert_eq!(all(&[b'['; 65], 7), [Scan::TooLong]);
        assert_eq!(all(b"}", 1), [Scan::Garbage(b'}')]);
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic_and_pieces_do_not_matter(
            bytes in proptest::collection::vec(
                prop_oneof![Just(b'{'), Just(b'}'), Just(b'['), Just(b']'), Just(b'"'), Just(b'\\'), Just(b' '), any::<u8>()],
                0..200,
            ),
            piece_len in 1_usize..20,
        ) {
            prop_assert_eq!(all(&bytes, piece_len), all(&bytes, bytes.len().max(1)));
        }
    }
}
