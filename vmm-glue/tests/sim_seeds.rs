//! A hundred seeds of the simulator; `cargo xtask sim --seeds N` runs more.

use ringmill_vmm_glue::sim::simulate;

#[test]
fn a_hundred_seeds_keep_every_promise() {
    let mut moves_count = 0;
    let failures: Vec<String> = (0..100)
        .filter_map(|seed| simulate(seed).map(|report| moves_count += report.moves_count).err())
        .map(|failure| format!("{failure}; replay: cargo xtask sim --seed {}", failure.seed))
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(moves_count > 100, "{moves_count} moves");
}

#[test]
fn a_seed_repeats_itself() {
    for seed in [1, 7, 23] {
        assert_eq!(simulate(seed), simulate(seed));
    }
}
