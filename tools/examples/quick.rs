//! quick
use ringmill_tools::load::*;
use std::time::Duration;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let path = std::path::PathBuf::from(&a[1]);
    let depth: usize = a[2].parse().unwrap();
    let secs: u64 = a[3].parse().unwrap();
    if a.len() > 4 {
        let mut c = Client::connect(&path, 1, 256, 32, 65536).unwrap();
        let span = c.capacity_bytes().min(128 << 20);
        fill(&mut c, span, 32, 7, |_| ()).unwrap();
        verify_filled(&mut c, span, 32, 7, |_| ()).unwrap();
        println!("verified {span}");
    }
    let mut c = Client::connect(&path, 1, 256, depth, 4096).unwrap();
    let span_bytes = c.capacity_bytes();
    let r = random_load(
        &mut c,
        &LoadOptions {
            block_bytes: 4096,
            depth,
            duration: Duration::from_secs(secs),
            mix: Mix::READS,
            span_bytes,
            seed: 1,
        },
        |_| (),
    )
    .unwrap();
    println!(
        "{:.0} IOPS p50 {} p99 {}",
        r.iops(),
        r.latency_ns.value_at_quantile(0.5),
        r.latency_ns.value_at_quantile(0.99)
    );
}
