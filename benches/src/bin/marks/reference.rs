//! What the machine itself can do: copying memory on one core, and a cache line's way between two cores.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use ringmill_core::mem::{Mapping, MemTable, RegionSpec};
use ringmill_core::reactor::Entropy;
use ringmill_core::units::GuestAddr;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use crate::lab::on_core;

/// Copies between two looks at the clock.
const COPIES_PER_LOOK: u64 = 256;
const ROUND_TRIPS: u64 = 200_000;

/// Shared memory, as RAM disks and guests have it.
struct Area {
    table: MemTable,
    len_bytes: u64,
}

impl Area {
    fn new(len_bytes: u64, huge: bool) -> anyhow::Result<Area> {
        let page =
            if huge { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
        let len_bytes = len_bytes.next_multiple_of(2 << 20);
        let file = File::from(memfd_create(c"ringmill-marks", MemfdFlags::CLOEXEC | page)?);
        file.set_len(len_bytes)?;
        fallocate(&file, FallocateFlags::empty(), 0, len_bytes)?;
        let mapping = Arc::new(Mapping::own_file(&file, usize::try_from(len_bytes)?)?);
        let mut table = MemTable::new();
        table.add(RegionSpec { guest_addr: GuestAddr(0), len_bytes, user_addr: 0 }, mapping)?;
        let area = Area { table, len_bytes };
        for at in (0..len_bytes).step_by(1 << 20) {
            let segment = area.table.translate(GuestAddr(at), 1 << 20, &mut 0);
            segment.context("inside the area")?.write_from(&[0x5a; 1 << 16]);
            segment.context("inside the area")?.fill_zero();
        }
        Ok(area)
    }
}

/// A medium and the buffers of its guests.
pub(crate) struct Copier {
    medium: Area,
    buffers: Area,
    pub(crate) page_text: &'static str,
}

impl Copier {
    /// In large pages if that many are free, as the daemon does it for RAM disks.
    pub(crate) fn new(medium_bytes: u64, buffer_bytes: u64) -> anyhow::Result<Copier> {
        let (medium, page_text) = match Area::new(medium_bytes, true) {
            Ok(area) => (area, "2 MiB pages"),
            Err(_) => (Area::new(medium_bytes, false)?, "4 KiB pages"),
        };
        let huge = page_text.starts_with('2');
        let buffers = Area::new(buffer_bytes, huge).or_else(|_| Area::new(buffer_bytes, false))?;
        Ok(Copier { medium, buffers, page_text })
    }

    /// Copies per second of this size, half to the medium and half from it, random over all of it.
    pub(crate) fn rate(
        &self,
        core: u32,
        size_bytes: u32,
        buffers_count: u64,
        seconds: f64,
    ) -> anyhow::Result<f64> {
        on_core(core, || {
            let mut entropy = Entropy::seeded(7);
            let size = u64::from(size_bytes);
            let blocks = self.medium.len_bytes / size;
            let places = buffers_count.min(self.buffers.len_bytes / size);
            let (start, mut count) = (Instant::now(), 0u64);
            let (mut hints, end) = ((0, 0), Duration::from_secs_f64(seconds));
            loop {
                for _ in 0..COPIES_PER_LOOK {
                    let bits = entropy.next_u64();
                    let block = GuestAddr((bits >> 8) % blocks * size);
                    let buffer = GuestAddr(count % places * size);
                    let medium = self.medium.table.translate(block, size_bytes, &mut hints.0);
                    let buffer = self.buffers.table.translate(buffer, size_bytes, &mut hints.1);
                    let (Some(medium), Some(buffer)) = (medium, buffer) else { continue };
                    if bits & 1 == 0 {
                        buffer.copy_from(&medium);
                    } else {
                        medium.copy_from(&buffer);
                    }
                    count += 1;
                }
                if start.elapsed() >= end {
                    break;
                }
            }
            #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
            Ok(count as f64 / start.elapsed().as_secs_f64())
        })
    }
}

/// A cache line on its own.
#[repr(align(128))]
struct Line(AtomicU64);

/// The time that a cache line takes from one core to another and back, ns.
pub(crate) fn line_round_trip_ns(one: u32, other: u32) -> anyhow::Result<f64> {
    let line = Line(AtomicU64::new(0));
    std::thread::scope(|scope| {
        let line = &line;
        let answers = scope.spawn(move || {
            on_core(other, || {
                for round in 0..ROUND_TRIPS {
                    while line.0.load(Ordering::Acquire) != 2 * round + 1 {
                        std::hint::spin_loop();
                    }
                    line.0.store(2 * round + 2, Ordering::Release);
                }
                Ok(())
            })
        });
        let elapsed = on_core(one, || {
            let start = Instant::now();
            for round in 0..ROUND_TRIPS {
                line.0.store(2 * round + 1, Ordering::Release);
                while line.0.load(Ordering::Acquire) != 2 * round + 2 {
                    std::hint::spin_loop();
                }
            }
            Ok(start.elapsed())
        })?;
        answers.join().map_err(|_| anyhow::anyhow!("a measuring thread panicked"))??;
        #[expect(clippy::cast_precision_loss, reason = "a time for people")]
        Ok(elapsed.as_secs_f64() * 1e9 / ROUND_TRIPS as f64)
    })
}

const _: () = assert!(size_of::<Line>() == 128);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_made_in_both_directions() {
        let copier = Copier::new(4 << 20, 1 << 20).expect("memory");
        assert!(copier.medium.len_bytes >= 4 << 20);
        let core = u32::try_from(rustix::thread::sched_getcpu()).expect("a core");
        let rate = copier.rate(core, 4096, 16, 0.05).expect("core 0 is there");
        assert!(rate > 1000.0, "{rate}");
        let touched = |area: &Area, at: u64| {
            let mut byte = [0];
            let segment = area.table.translate(GuestAddr(at), 1, &mut 0).expect("inside");
            segment.read_into(&mut byte);
            byte[0]
        };
        // What is in the buffers reaches the medium.
        for at in (0..16 * 4096).step_by(4096) {
            let marked = copier.buffers.table.translate(GuestAddr(at), 4096, &mut 0);
            marked.expect("inside").write_from(&[7; 4096]);
        }
        // A few copies only: later ones wear the mark away.
        copier.rate(core, 4096, 16, 0.0).expect("core 0 is there");
        assert!(
            (0..copier.medium.len_bytes).step_by(4096).any(|at| touched(&copier.medium, at) == 7)
        );
    }
}
