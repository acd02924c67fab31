//! Discards and write-zeroes: the ladder of ways, from the cheapest that this disk knows to writing zeroes.
//!
//! Flow: request → first way not struck off → kernel or discard_thread → refused? struck off, next way. Owner: one reactor.
//! **Invariant:** write-zeroes always succeeds in some way; a discard that nobody can do is `Unsupported`.

use std::sync::{Arc, OnceLock};

use ringmill_core::io::{IoFlags, IoOp, Tag};
use ringmill_core::mem::{MemTable, Segment};
use ringmill_core::reactor::IoCx;
use ringmill_core::units::{GuestAddr, bytes_u64, len_u32, usize_of};

use super::ability::Way;
use super::channel::UringChannel;
use super::discard_thread::{self, Job};
use super::work::Stage;
use crate::flight::{Direction, Plain};

/// Zeroes written at a time.
const ZEROES_BYTES: usize = 1 << 20;

static ZEROES: OnceLock<MemTable> = OnceLock::new();

/// Maps the zeroes once per process; its pages stay the kernel's shared zero page. For control threads.
pub(super) fn prepare_zeroes() -> Result<(), Box<dyn std::error::Error>> {
    if ZEROES.get().is_none() {
        let _ = ZEROES.set(MemTable::anonymous(GuestAddr(0), ZEROES_BYTES)?);
    }
    Ok(())
}

fn zeroes(len_bytes: u64) -> Option<Segment> {
    ZEROES.get()?.translate(GuestAddr(0), len_u32(usize_of(len_bytes)), &mut 0)
}

impl UringChannel {
    /// Starts or goes on with a discard or write-zeroes; false when it must be tried again later.
    #[cold]
    #[inline(never)]
    pub(super) fn launch_range(&mut self, io: &mut IoCx, flight: Tag) -> bool {
        let Some(work) = self.flights.state(flight) else { return true };
        let may_unmap = work.flags.contains(IoFlags::MAY_UNMAP);
        let abilities = &self.shared.abilities;
        let way = match (work.op, work.stage) {
            (_, Stage::ZeroWrite) => None,
            (IoOp::Discard, _) => abilities.discard_way(),
            _ => abilities.zero_way(may_unmap),
        };
        let (offset_bytes, len_bytes) = (work.at_bytes(), work.left_bytes());
        let mode = match way {
            Some(Way::Punch) => libc::FALLOC_FL_PUNCH_HOLE,
            Some(Way::ZeroRange) => libc::FALLOC_FL_ZERO_RANGE,
            Some(Way::RingDiscard) => 0,
            Some(Way::HelperDiscard) => {
                return self.ask_helper(flight, offset_bytes, len_bytes);
            }
            None if work.op == IoOp::Discard => {
                self.answer(flight, -libc::EOPNOTSUPP);
                return true;
            }
            None => return self.write_zeroes(io, flight, offset_bytes, len_bytes),
        };
        let (Some(way), Some(ring)) = (way, &mut io.ring) else { return false };
        work.stage = Stage::Range(way);
        let plain = match way {
            Way::RingDiscard => Plain::BlockDiscard { offset_bytes, len_bytes },
            _ => {
                let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
                Plain::Fallocate { mode, offset_bytes, len_bytes }
            }
        };
        self.flights.start(ring, flight, plain)
    }

    fn write_zeroes(
        &mut self,
        io: &mut IoCx,
        flight: Tag,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> bool {
        let Some(work) = self.flights.state(flight) else { return true };
        work.stage = Stage::ZeroWrite;
        if io.fair.credit_bytes() == 0 {
            return false;
        }
        let piece_bytes = len_bytes.min(bytes_u64(ZEROES_BYTES)).min(io.fair.piece_bytes());
        let Some(segment) = zeroes(piece_bytes) else {
            self.answer(flight, -libc::ENOMEM);
            return true;
        };
        let (Some(list), Some(ring)) =
            (io.lists.keep(&[segment], &mut self.lists_held), &mut io.ring)
        else {
            return false;
        };
        let old = self.flights.exchange(flight, list);
        io.lists.give_back(old, &mut self.lists_held);
        let write = Direction::Write(0);
        let sent = self.flights.transfer(ring, flight, write, offset_bytes, piece_bytes).is_some();
        io.fair.spend(if sent { piece_bytes } else { 0 });
        sent
    }

    fn ask_helper(&mut self, flight: Tag, offset_bytes: u64, len_bytes: u64) -> bool {
        if let Some(work) = self.flights.state(flight) {
            work.stage = Stage::Range(Way::HelperDiscard);
        }
        let (shared, answers) = (Arc::clone(&self.shared), Arc::clone(&self.answers));
        let job = Job { shared, offset_bytes, len_bytes, flight, answers };
        let sent = discard_thread::send(job).is_ok();
        if sent {
            self.flights.depart(flight);
            self.off_ring_count += 1;
        }
        sent
    }

    /// Ends a request without the kernel.
    fn answer(&mut self, flight: Tag, result: i32) {
        if let Some(work) = self.flights.state(flight) {
            work.stage = Stage::Sync;
        }
        self.flights.depart(flight);
        self.off_ring_count += 1;
        // Has room for every request of this channel.
        let _ = self.answers.push((flight, result));
    }

    /// The next result that did not come through the ring.
    #[cold]
    pub(super) fn off_ring_result(&mut self) -> Option<(Tag, i32)> {
        while let Some((flight, result)) = self.answers.pop() {
            self.off_ring_count -= 1;
            if self.flights.arrive(flight) {
                return Some((flight, result));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::Command;

    use ringmill_core::IoStatus;
    use ringmill_core::bdev::Bdev;
    use ringmill_core::bdev::conformance::{Suite, TestBed};

    use super::super::{UringBdev, UringOptions};
    use super::*;

    struct Loop(PathBuf);

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
        }
    }

    fn loop_device(backing: &std::path::Path) -> Option<Loop> {
        let output =
            Command::new("losetup").args(["--find", "--show"]).arg(backing).output().ok()?;
        let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then(|| Loop(path.into()))
    }

    /// As on a kernel before 6.12.
    #[test]
    fn discards_go_to_the_helper_where_the_ring_cannot_do_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16 << 20).unwrap();
        let Some(device) = loop_device(file.path()) else {
            eprintln!(
                "SKIPPED discards_go_to_the_helper_where_the_ring_cannot_do_them: no loop device"
            );
            return;
        };
        let options = UringOptions { filename: device.0.clone(), ..UringOptions::default() };
        let bdev = Arc::new(UringBdev::open("disk", &options).unwrap());
        bdev.shared.abilities.strike(Way::RingDiscard);
        let mut bed = TestBed::new(&*bdev);
        assert_eq!(bed.write(0, &vec![1; 4 << 20]), IoStatus::Ok);
        assert_eq!(bed.run(IoOp::Discard, IoFlags::NONE, 4096, 3 << 20, &[]), IoStatus::Ok);
        let disk = bed.read(0, 4 << 20).unwrap();
        assert!(
            disk[..4096].iter().all(|&b| b == 1)
                && disk[4096 + (3 << 20)..].iter().all(|&b| b == 1)
        );
        assert!(disk[4096..4096 + (3 << 20)].iter().all(|&b| b == 0));
        bed.finish();
        Suite::new(Arc::clone(&bdev) as Arc<dyn Bdev>).run();
        // Without any way left: an honest refusal, and zeroes are written by hand.
        for way in [Way::HelperDiscard, Way::Punch, Way::ZeroRange] {
            bdev.shared.abilities.strike(way);
        }
        let mut bed = TestBed::new(&*bdev);
        assert_eq!(bed.run(IoOp::Discard, IoFlags::NONE, 0, 4096, &[]), IoStatus::Unsupported);
        assert_eq!(bed.write(0, &vec![1; 4 << 20]), IoStatus::Ok);
        assert_eq!(bed.run(IoOp::WriteZeroes, IoFlags::FUA, 512, 3 << 20, &[]), IoStatus::Ok);
        let disk = bed.read(0, 4 << 20).unwrap();
        let zeroes = disk.iter().filter(|&&b| b == 0).count();
        assert_eq!((zeroes, disk[511], disk[512 + (3 << 20)]), (3 << 20, 1, 1));
        bed.finish();
    }
}
