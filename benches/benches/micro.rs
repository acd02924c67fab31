//! Micro-benchmarks: the parts of a request's way, alone and in nanoseconds. `cargo bench -p ringmill-benches`.
//!
//! The instructions of the same parts are in `benches/instructions.toml`, which tests compare; times are for people.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use crossbeam_queue::ArrayQueue;
use ringmill_benches::cases::{four_regions, malloc_bdev, null_bdev};
use ringmill_benches::rig::{Format, Guest, Packed, Split, WorkerRig};
use ringmill_core::bdev::Bdev;
use ringmill_core::io::{Batch, IoOp};
use ringmill_core::stats::{LatencyTable, QueueStats, Stage};
use ringmill_core::units::GuestAddr;
use ringmill_vmm_glue::virtq::Virtqueue;

/// The worker's pass alone: what the guest does between passes is not timed.
fn worker<F: Format>(c: &mut Criterion, name: &str, bdev: &Arc<dyn Bdev>, indirect: bool) {
    let mut group = c.benchmark_group(name);
    for batch in [1, 32, 128] {
        let mut rig = WorkerRig::<F>::new(Arc::clone(bdev), indirect, None).expect("a rig");
        group.throughput(Throughput::Elements(batch));
        group.bench_function(BenchmarkId::from_parameter(batch), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    rig.round(batch, |rig| {
                        let start = Instant::now();
                        black_box(rig.pass());
                        spent += start.elapsed();
                    })
                    .expect("every request succeeds");
                }
                spent
            });
        });
    }
    group.finish();
}

/// Taking 32 requests off a ring and putting them back: the chain walk with its translations.
fn chain_walk<F: Format>(c: &mut Criterion, name: &str, indirect: bool) {
    let mut guest = Guest::<F>::new(indirect);
    let mut queue = guest.queue().expect("the ring fits");
    let table = guest.memory.table();
    let (mut batch, mut hint) = (Batch::new(), 0);
    let mut heads = Vec::with_capacity(32);
    guest.offer(32).expect("room for 32");
    let mut group = c.benchmark_group("chain walk");
    group.throughput(Throughput::Elements(32));
    group.bench_function(name, |b| {
        b.iter(|| {
            batch.clear();
            let count = queue.available().expect("a good ring");
            for _ in 0..count {
                let chain = queue.pop(&table, &mut hint, &mut batch).expect("a good chain");
                heads.extend(black_box(chain).map(|chain| chain.head));
            }
            while let Some(head) = heads.pop() {
                queue.unpop(head);
            }
        });
    });
    group.finish();
}

/// Answering 32 requests and showing them to the guest at once.
fn publish<F: Format>(c: &mut Criterion, name: &str) {
    let mut group = c.benchmark_group("used ring");
    group.throughput(Throughput::Elements(32));
    group.bench_function(name, |b| {
        let mut guest = Guest::<F>::new(false);
        let mut queue = guest.queue().expect("the ring fits");
        let table = guest.memory.table();
        let (mut batch, mut hint) = (Batch::new(), 0);
        b.iter_custom(|rounds| {
            let mut spent = Duration::ZERO;
            for _ in 0..rounds {
                guest.offer(32).expect("room for 32");
                batch.clear();
                let count = queue.available().expect("a good ring");
                let heads: Vec<u16> = (0..count)
                    .filter_map(|_| queue.pop(&table, &mut hint, &mut batch).expect("a good chain"))
                    .map(|chain| chain.head)
                    .collect();
                let start = Instant::now();
                for head in heads {
                    queue.put_used(head, 4097);
                }
                black_box(queue.publish(false));
                spent += start.elapsed();
                guest.take_all();
            }
            spent
        });
    });
    group.finish();
}

fn memory(c: &mut Criterion) {
    let table = four_regions().expect("memory");
    let mut group = c.benchmark_group("translate");
    for (name, regions) in [("the same region", &[2][..]), ("another region", &[0, 3, 1, 2])] {
        let addrs: Vec<GuestAddr> =
            regions.iter().map(|region: &u64| GuestAddr((region << 30) + 0x4_0000)).collect();
        let (mut hint, mut at) = (0, 0);
        group.bench_function(name, |b| {
            b.iter(|| {
                at = (at + 1) % addrs.len();
                table.translate(black_box(addrs[at]), 4096, &mut hint)
            });
        });
    }
    group.finish();
}

fn figures(c: &mut Criterion) {
    let (stats, table) =
        (QueueStats::new_shared().expect("memory"), Box::<LatencyTable>::default());
    let mut value = 0;
    c.bench_function("histogram record", |b| {
        b.iter(|| {
            value = (value + 1) % 64;
            table.record(black_box(1000 + value));
        });
    });
    c.bench_function("counters and histograms of a request", |b| {
        b.iter(|| {
            let op = stats.op(black_box(IoOp::Read));
            op.count(1, 4096, true);
            for stage in Stage::ALL {
                op.stage(stage).record(black_box(1000));
            }
        });
    });
}

fn mailbox(c: &mut Criterion) {
    let mailbox = ArrayQueue::new(64);
    c.bench_function("mailbox push and pop", |b| {
        b.iter(|| {
            let _ = mailbox.push(black_box(1u64));
            mailbox.pop()
        });
    });
    c.bench_function("mailbox is empty", |b| b.iter(|| black_box(&mailbox).is_empty()));
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let c = &mut criterion;
    let null = null_bdev().expect("a null device");
    let malloc = malloc_bdev().expect("a RAM disk");
    worker::<Split>(c, "worker, null, split", &null, false);
    worker::<Split>(c, "worker, null, split, indirect", &null, true);
    worker::<Packed>(c, "worker, null, packed", &null, false);
    worker::<Split>(c, "worker, malloc, split", &malloc, false);
    chain_walk::<Split>(c, "split", false);
    chain_walk::<Split>(c, "split, indirect", true);
    chain_walk::<Packed>(c, "packed", false);
    publish::<Split>(c, "split");
    publish::<Packed>(c, "packed");
    memory(c);
    figures(c);
    mailbox(c);
    criterion.final_summary();
}
