//! What one run under callgrind cost: its output file, read line by line.
//!
//! Spec: Valgrind manual, "Callgrind Format Specification". Names may be written as `(number) text` once and `(number)`
//! afterwards. A cost line after `calls=` is the callee's and is counted there.

use std::collections::HashMap;

/// Instructions that were executed while counting was on.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    /// All.
    pub(crate) total: u64,
    /// Those in the C library: copying, mostly.
    pub(crate) libc: u64,
    /// By function, the most expensive first.
    pub(crate) functions: Vec<(String, u64)>,
}

/// Names that a file abbreviates.
#[derive(Default)]
struct Names(HashMap<String, String>);

impl Names {
    fn resolve(&mut self, text: &str) -> String {
        let Some((number, rest)) = text.strip_prefix('(').and_then(|t| t.split_once(')')) else {
            return text.to_owned();
        };
        let rest = rest.trim();
        if rest.is_empty() {
            return self.0.get(number).cloned().unwrap_or_default();
        }
        self.0.insert(number.to_owned(), rest.to_owned());
        rest.to_owned()
    }
}

/// Reads an output file.
pub(crate) fn parse(text: &str) -> Cost {
    let (mut objects, mut names) = (Names::default(), Names::default());
    let (mut object, mut function) = (String::new(), String::new());
    let mut costs: HashMap<String, u64> = HashMap::new();
    let mut cost = Cost::default();
    let mut of_callee = false;
    for line in text.lines() {
        match line.split_once('=') {
            Some(("ob", name)) => object = objects.resolve(name),
            // A callee's object and function may be named here first.
            Some(("cob", name)) => drop(objects.resolve(name)),
            Some(("fn", name)) => function = names.resolve(name),
            Some(("cfn", name)) => drop(names.resolve(name)),
            Some(("calls", _)) => of_callee = true,
            _ if line.starts_with(|c: char| c.is_ascii_digit() || "+-*".contains(c)) => {
                let count = line.split_whitespace().nth(1).and_then(|word| word.parse().ok());
                if !std::mem::take(&mut of_callee) {
                    let count: u64 = count.unwrap_or(0);
                    cost.total += count;
                    if object.contains("/libc.so") || object.contains("/libc-") {
                        cost.libc += count;
                    }
                    *costs.entry(function.clone()).or_default() += count;
                }
            }
            _ => {}
        }
    }
    cost.functions = costs.into_iter().collect();
    cost.functions.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    cost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_cost_is_added_up_and_a_callees_is_counted_once() {
        let text = "version: 1\npositions: line\nevents: Ir\n\n\
            ob=(1) /x/target/release/counted\nfl=(1) a.rs\nfn=(1) outer\n10 5\n+2 7\n\
            cob=(2) /usr/lib/x86_64-linux-gnu/libc.so.6\ncfi=(2) ???\ncfn=(2) memcpy\ncalls=3 0\n* 90\n-1 2\n\
            fi=(3) inlined.rs\n44 1\n\nob=(2)\nfl=(2)\nfn=(2)\n0 90\n\nob=(1)\nfl=(1)\nfn=(3) other\n1 4\n\ntotals: 109\n";
        let cost = parse(text);
        assert_eq!((cost.total, cost.libc), (109, 90));
        let names: Vec<(&str, u64)> =
            cost.functions.iter().map(|(name, count)| (name.as_str(), *count)).collect();
        assert_eq!(names, [("memcpy", 90), ("outer", 15), ("other", 4)]);
    }
}
