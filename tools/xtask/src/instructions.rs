//! `cargo xtask instructions`: instructions per request, counted by callgrind and compared with a checked-in table.
//!
//! In: the program `counted` (one case per run), built as it ships: other profiles inline less across crates. Out: a
//! table of asked, measured and difference. **Invariant:** only what the same compiler made is compared: a count says
//! nothing about the code when another compiler has translated it.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::callgrind::{self, Cost};
use crate::packages;

/// The checked-in table.
const TABLE: &str = "benches/instructions.toml";
/// Difference that is accepted, percent. The same binary gives the same counts but for addresses and the clock.
const TOLERANCE_PERCENT: f64 = 2.0;
/// A difference that is no news whatever its share: table values have one decimal.
const TOLERANCE_LEAST: f64 = 0.3;
const FUNCTIONS_SHOWN: usize = 12;

/// What is to be done with the counts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// Make them the table.
    pub(crate) write: bool,
    /// Also name the functions that they were spent in.
    pub(crate) functions: bool,
}

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Every count is what the table says.
    Same,
    /// At least one is not.
    Different,
    /// Nothing could be compared, and why.
    NotCompared(String),
}

/// The table: the compiler, and a count per case.
#[derive(Debug, Default, PartialEq)]
struct Table {
    rustc: String,
    counts: Vec<(String, f64)>,
}

/// One case, as the program lists it.
struct Case {
    name: String,
    without_libc: bool,
}

impl Table {
    /// Reads the subset of TOML that [`Table::text`] writes.
    fn parse(text: &str) -> Result<Table> {
        let mut table = Table::default();
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with(['#', '[']) {
                continue;
            }
            let (name, value) =
                line.split_once(" = ").with_context(|| format!("{TABLE}: no value: {line}"))?;
            let (name, value) = (name.trim_matches('"'), value.trim_matches('"'));
            if name == "rustc" {
                value.clone_into(&mut table.rustc);
            } else {
                let count =
                    value.parse().with_context(|| format!("{TABLE}: not a number: {line}"))?;
                table.counts.push((name.to_owned(), count));
            }
        }
        Ok(table)
    }

    fn text(&self) -> String {
        let mut text = format!(
            "# Instructions per request or call, x86-64, release profile; counted by callgrind.\n\
             # Written by `cargo xtask instructions --write`; tests compare it within {TOLERANCE_PERCENT} %.\n\n\
             rustc = \"{}\"\n\n[instructions]\n",
            self.rustc
        );
        for (name, count) in &self.counts {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "\"{name}\" = {count:.1}");
        }
        text
    }

    fn asked(&self, name: &str) -> Option<f64> {
        self.counts.iter().find(|(n, _)| n == name).map(|(_, count)| *count)
    }
}

fn differs(asked: f64, measured: f64) -> bool {
    let apart = (measured - asked).abs();
    apart > TOLERANCE_LEAST && apart > asked * TOLERANCE_PERCENT / 100.0
}

/// Counts everything and compares.
pub(crate) fn run(root: &Path, options: Options) -> Result<Outcome> {
    if cfg!(not(target_arch = "x86_64")) {
        return Ok(Outcome::NotCompared("the table is for x86-64".into()));
    }
    if packages::find("valgrind").is_none() {
        return Ok(Outcome::NotCompared("missing valgrind (package valgrind)".into()));
    }
    let rustc = rustc_version(root)?;
    let program = build(root)?;
    let path = root.join(TABLE);
    let old = match fs::read_to_string(&path) {
        Ok(text) => Table::parse(&text)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Table::default(),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    let mut new = Table { rustc, counts: Vec::new() };
    let mut apart = Vec::new();
    println!("{:<44} {:>9} {:>9} {:>8}  of these in libc", "case", "asked", "measured", "apart");
    for case in list(&program)? {
        let (units, cost) = count(root, &program, &case.name)?;
        let per_unit = |count: u64| count_f64(count) / count_f64(units.max(1));
        let counted = if case.without_libc { cost.total - cost.libc } else { cost.total };
        let measured = per_unit(counted);
        let asked = old.asked(&case.name);
        let difference = asked.map_or_else(
            || "new".to_owned(),
            |asked| format!("{:+.1} %", 100.0 * (measured - asked) / asked),
        );
        let asked_text = asked.map_or_else(|| "-".to_owned(), |asked| format!("{asked:.1}"));
        let libc = if case.without_libc {
            "left out".to_owned()
        } else {
            format!("{:.1}", per_unit(cost.libc))
        };
        println!("{:<44} {asked_text:>9} {measured:>9.1} {difference:>8}  {libc}", case.name);
        if options.functions {
            for (name, count) in cost.functions.iter().take(FUNCTIONS_SHOWN) {
                println!("    {:>9.1}  {name}", per_unit(*count));
            }
        }
        if asked.is_none_or(|asked| differs(asked, measured)) {
            apart.push(case.name.clone());
        }
        new.counts.push((case.name, measured));
    }
    let gone = old.counts.iter().filter(|(name, _)| new.asked(name).is_none());
    apart.extend(gone.map(|(name, _)| format!("{name} (not there any more)")));
    if options.write {
        fs::write(&path, new.text()).with_context(|| format!("writing {}", path.display()))?;
        println!("written to {TABLE}");
        return Ok(Outcome::Same);
    }
    if old.rustc != new.rustc && !old.rustc.is_empty() {
        return Ok(Outcome::NotCompared(format!(
            "{TABLE} was counted with rustc {}, this is {}",
            old.rustc, new.rustc
        )));
    }
    if apart.is_empty() {
        return Ok(Outcome::Same);
    }
    println!(
        "\nmore than {TOLERANCE_PERCENT} % apart: {}\n\
         If that is meant: `cargo xtask instructions --write`, and say in the commit what it is for.\n\
         Where they went: `cargo xtask instructions --functions`.",
        apart.join("; ")
    );
    Ok(Outcome::Different)
}

fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

fn rustc_version(root: &Path) -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("--version").current_dir(root).output();
    let text = String::from_utf8(output.context("cannot run rustc")?.stdout)?;
    text.split_whitespace().nth(1).map(str::to_owned).context("rustc says no version")
}

/// Builds the counted program as it ships, without what only the timed benchmarks need.
fn build(root: &Path) -> Result<PathBuf> {
    let built = cargo(root)
        .args(["build", "--quiet", "--release", "--package", "ringmill-benches"])
        .args(["--no-default-features", "--bin", "counted"])
        .status()
        .context("cannot run cargo")?;
    if !built.success() {
        bail!("the release build failed");
    }
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
    Ok(target.join("release/counted"))
}

fn list(program: &Path) -> Result<Vec<Case>> {
    let output = Command::new(program).arg("list").output().context("cannot start counted")?;
    let text = String::from_utf8(output.stdout)?;
    let cases = text.lines().filter_map(|line| line.split_once('\t'));
    Ok(cases
        .map(|(name, flag)| Case { name: name.to_owned(), without_libc: flag == "no-libc" })
        .collect())
}

/// One case under callgrind: requests or calls, and what they cost.
fn count(root: &Path, program: &Path, name: &str) -> Result<(u64, Cost)> {
    let file = root.join("target/callgrind.out");
    let output = Command::new("valgrind")
        .args(["--quiet", "--tool=callgrind", "--collect-atstart=no"])
        .arg("--toggle-collect=*counted_window*")
        .arg(format!("--callgrind-out-file={}", file.display()))
        .arg(program)
        .args(["run", name])
        .output()
        .context("cannot start valgrind")?;
    if !output.status.success() {
        bail!("case \"{name}\" failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let units = String::from_utf8(output.stdout)?;
    let units = units.trim().parse().with_context(|| format!("counted printed {units}"))?;
    let text = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
    let cost = callgrind::parse(&String::from_utf8_lossy(&text));
    if cost.total == 0 {
        bail!("callgrind counted nothing in \"{name}\": is counted_window still a function?");
    }
    Ok((units, cost))
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
fn count_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let table = Table {
            rustc: "1.95.0".into(),
            counts: vec![("null, batch 1".into(), 412.5), ("histogram record".into(), 21.0)],
        };
        assert_eq!(Table::parse(&table.text()).expect("our own text"), table);
        assert!(Table::parse("\"a\" = many").is_err());
    }

    #[test]
    fn two_percent_are_accepted_and_more_is_not() {
        assert!(!differs(400.0, 408.0) && !differs(400.0, 392.0));
        assert!(differs(400.0, 408.2) && differs(400.0, 391.0));
        // Rounding of a small count is no difference.
        assert!(!differs(5.0, 5.3) && differs(5.0, 5.4));
    }
}
