//! Meets lying NVMe devices, one seed after the other, for `cargo xtask fuzz nvme`.
//!
//! Arguments: the first seed, and how many. Out: `begin SEED` and `end SEED WORD=NUMBER …` for each; whoever reads them sees
//! where it stands still. A panic of any thread ends the program (profile `fast`).

#[path = "../tests/nvme/liar.rs"]
mod liar;
#[path = "../tests/nvme/mod.rs"]
mod nvme;

use std::process::ExitCode;

fn main() -> ExitCode {
    let numbers: Option<Vec<u64>> = std::env::args().skip(1).map(|arg| arg.parse().ok()).collect();
    let Some(&[first, count]) = numbers.as_deref() else {
        eprintln!("usage: nvme-liar FIRST_SEED COUNT");
        return ExitCode::FAILURE;
    };
    for seed in (0..count).map(|number| first.wrapping_add(number)) {
        println!("begin {seed}");
        let life = liar::meet(seed);
        println!("end {seed} {life}");
    }
    ExitCode::SUCCESS
}
