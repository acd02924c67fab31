//! How many requests per second one channel does when nothing stands above it: the drivers' own cost.
//!
//! `cargo run --profile fast -p ringmill-drivers --example channel_speed -- null|malloc|PATH [DEPTH [SECONDS]]`

use std::sync::Arc;
use std::time::{Duration, Instant};

use ringmill_core::bdev::Bdev;
use ringmill_core::io::{Completions, IoFlags, IoOp, IoRequest, Tag};
use ringmill_core::mem::MemTable;
use ringmill_core::reactor::{Entropy, ReactorCx, Ring, ticks_now};
use ringmill_core::units::GuestAddr;
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_drivers::null::{NullBdev, NullOptions};
use ringmill_drivers::uring::{UringBdev, UringOptions};

fn device(name: &str) -> Result<Arc<dyn Bdev>, Box<dyn std::error::Error>> {
    let (blocks_count, block_bytes, uuid) = (1 << 18, 4096, None);
    Ok(match name {
        "null" => {
            Arc::new(NullBdev::new("null", &NullOptions { blocks_count, block_bytes, uuid })?)
        }
        "malloc" => {
            Arc::new(MallocBdev::new("malloc", &MallocOptions { blocks_count, block_bytes, uuid })?)
        }
        path => {
            let options = UringOptions { filename: path.into(), ..UringOptions::default() };
            Arc::new(UringBdev::open_patiently("disk", &options, Duration::from_secs(5))?)
        }
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let name = args.first().map_or("null", String::as_str);
    let depth: usize = args.get(1).map_or(Ok(32), |text| text.parse())?;
    let seconds: u64 = args.get(2).map_or(Ok(3), |text| text.parse())?;
    let bdev = device(name)?;
    let mut ring = Ring::new(&[])?;
    ring.enable()?;
    let mut cx = ReactorCx::new(Some(ring))?;
    let mut channel = bdev.open_channel(None)?(&mut cx.io)?;
    let table = MemTable::anonymous(GuestAddr(0), depth * 4096)?;
    let mut entropy = Entropy::seeded(1);
    let blocks_count = bdev.info().size_bytes() / 4096;
    if name == "malloc" {
        // A RAM disk's memory comes into being when it is touched first.
        let segment = table.translate(GuestAddr(0), 4096, &mut 0).ok_or("no memory")?;
        for block in 0..blocks_count {
            let (offset_bytes, len_bytes, tag) = (block * 4096, 4096, Tag::new(0, 0));
            let (op, flags, segments_at, segments_count) = (IoOp::Write, IoFlags::NONE, 0, 0);
            let request =
                IoRequest { offset_bytes, len_bytes, tag, segments_at, segments_count, op, flags };
            cx.batch.single(request, &[segment]);
            channel.submit(&mut cx.io, cx.batch.view());
            let mut done = Completions::new();
            channel.poll(&mut cx.io, &mut done);
        }
    }
    let mut free: Vec<u16> = (0..u16::try_from(depth)?).collect();
    let mut done = Completions::new();
    let (start, ticks) = (Instant::now(), ticks_now());
    let mut ended: u64 = 0;
    while start.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..1000 {
            cx.batch.clear();
            while !cx.batch.is_full()
                && let Some(slot) = free.pop()
            {
                let segments_at = u32::try_from(cx.batch.segments_mark())?;
                let address = GuestAddr(u64::from(slot) * 4096);
                let segment = table.translate(address, 4096, &mut 0).ok_or("no memory")?;
                cx.batch.push_segment(segment);
                cx.batch.push(IoRequest {
                    offset_bytes: entropy.below(blocks_count) * 4096,
                    len_bytes: 4096,
                    tag: Tag::new(slot, 0),
                    segments_at,
                    segments_count: 1,
                    op: IoOp::Read,
                    flags: IoFlags::NONE,
                });
            }
            let offered = cx.batch.len();
            let taken = channel.submit(&mut cx.io, cx.batch.view());
            free.extend(cx.batch.view().slice(taken, offered).tags().map(Tag::slot));
            cx.turn_ring();
            channel.poll(&mut cx.io, &mut done);
            for completion in done.drain(..) {
                if !completion.status.is_ok() {
                    return Err(format!("{:?}", completion.status).into());
                }
                free.push(completion.tag.slot());
                ended += 1;
            }
        }
    }
    let spent = ticks_now().wrapping_sub(ticks);
    let rate = ended / seconds.max(1);
    println!("{name} at depth {depth}: {rate} IOPS, {} ticks per request", spent / ended.max(1));
    while channel.inflight() > 0 {
        cx.turn_ring();
        channel.poll(&mut cx.io, &mut done);
        done.clear();
    }
    channel.close(&mut cx.io);
    Ok(())
}
