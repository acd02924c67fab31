//! What tests that boot guests share: a lab or a skip, images, programs.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use ringmill_tools::guest_lab::server::set_len;
use ringmill_tools::guest_lab::{Lab, LabError, ScratchDir};

pub const MIB: u64 = 1024 * 1024;

pub type Outcome = Result<(), LabError>;

/// Runs a test in a lab, or skips it by name if the machine lacks something.
pub fn with_lab(name: &str, test: impl FnOnce(&mut Lab) -> Outcome) -> Outcome {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-lab");
    let started = Instant::now();
    let outcome = Lab::open(&cache).and_then(|mut lab| test(&mut lab));
    match outcome {
        Err(error) if error.is_missing_prerequisite() && !is_required() => {
            skip(name, &error.to_string());
            Ok(())
        }
        Err(error) => panic!("{name}: {error}"),
        Ok(()) => {
            eprintln!("{name}: {:.1} s", started.elapsed().as_secs_f64());
            Ok(())
        }
    }
}

fn is_required() -> bool {
    std::env::var_os("RINGMILL_GUEST_REQUIRED")
        .is_some_and(|value| !value.is_empty() && value != "0")
}

pub fn skip(name: &str, why: &str) {
    let line = format!("guest test \"{name}\" skipped: {why}");
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("RINGMILL_SKIPPED_FILE") {
        let file = OpenOptions::new().append(true).create(true).open(path);
        file.and_then(|mut file| writeln!(file, "{line}"))
            .expect("RINGMILL_SKIPPED_FILE is writable");
    }
}

pub fn image(scratch: &ScratchDir, name: &str, size_bytes: u64) -> Result<PathBuf, LabError> {
    let path = scratch.path().join(name);
    set_len(&path, size_bytes)?;
    Ok(path)
}

/// Without the symbols, which would fill the guest's memory.
pub fn stripped(scratch: &ScratchDir, program: &Path) -> PathBuf {
    let to = scratch.path().join(program.file_name().expect("a program"));
    fs::copy(program, &to).expect("a copy");
    // Works unstripped, too.
    let _ = Command::new("strip").arg(&to).status();
    to
}
