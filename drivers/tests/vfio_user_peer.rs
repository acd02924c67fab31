//! The vfio-user client against a server that others wrote: that of the `vfio_user` crate.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringmill_core::mem::{DmaError, Mapping, MemTable, RegionSpec};
use ringmill_core::units::GuestAddr;
use ringmill_drivers::pci::{DeviceNews, PciBacking, Registers};
use ringmill_drivers::vfio_user::VfioUserBacking;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tempfile::TempDir;
use vfio_bindings::bindings::vfio::{vfio_region_info, vfio_region_sparse_mmap_area};
use vfio_user::{
    DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea,
};

const BAR_BYTES: u64 = 0x4000;
const MSIX: u32 = 2;
/// A write here interrupts by this vector.
const INTERRUPT: u64 = 0x20;
/// A write here has the device write "moin" to this IOVA's lower half.
const WRITE: u64 = 0x24;

/// A device with some registers.
struct Toy {
    registers: Vec<u8>,
    config: Vec<u8>,
    maps: Vec<(u64, u64, u64, File)>,
    vectors: Vec<Option<File>>,
    others: Vec<(u32, Vec<File>)>,
    resets: u32,
}

impl ServerBackend for Toy {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let from = if region == 7 { &self.config } else { &self.registers };
        let at = usize::try_from(offset).unwrap();
        let piece = from.get(at..at + data.len()).ok_or(io::ErrorKind::InvalidInput)?;
        data.copy_from_slice(piece);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let value = u32::from_le_bytes(data.try_into().unwrap_or_default());
        match (region, offset) {
            (0, INTERRUPT) => {
                let vector = self.vectors[value as usize].as_mut();
                vector.ok_or(io::ErrorKind::NotConnected)?.write_all(&1u64.to_ne_bytes())?;
            }
            (0, WRITE) => {
                let iova = u64::from(value) | 1 << 32;
                let (at, offset, _, file) = self
                    .maps
                    .iter()
                    .find(|(at, _, size, _)| (*at..at + size).contains(&iova))
                    .ok_or(io::ErrorKind::NotFound)?;
                file.write_all_at(b"moin", offset + (iova - at))?;
            }
            _ => {
                let into = if region == 7 { &mut self.config } else { &mut self.registers };
                let at = usize::try_from(offset).unwrap();
                into[at..at + data.len()].copy_from_slice(data);
            }
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        assert_eq!(flags, DmaMapFlags::READ_WRITE);
        self.maps.push((address, offset, size, fd.ok_or(io::ErrorKind::InvalidInput)?));
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let before = self.maps.len();
        self.maps.retain(|(at, _, len, _)| (*at, *len) != (address, size));
        if self.maps.len() < before { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    fn reset(&mut self) -> io::Result<()> {
        self.resets += 1;
        self.registers.fill(0);
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        if index != MSIX {
            self.others.push((index, fds));
            return Ok(());
        }
        let mut fds = fds.into_iter();
        // No data and no vectors: all of them.
        let count = if flags & 1 != 0 { 4 } else { count };
        for vector in start..start + count {
            self.vectors[vector as usize] = fds.next();
        }
        Ok(())
    }
}

fn toy() -> Toy {
    let mut config = vec![0; 4096];
    // An NVMe controller; an MSI-X capability.
    config[9..12].copy_from_slice(&[2, 8, 1]);
    config[6] = 0x10;
    config[0x34] = 0x40;
    config[0x40..0x44].copy_from_slice(&[0x11, 0, 3, 0]);
    Toy {
        registers: vec![0; 4096],
        config,
        maps: Vec::new(),
        vectors: (0..4).map(|_| None).collect(),
        others: Vec::new(),
        resets: 0,
    }
}

fn serve(path: &Path, bar: &OwnedFd) -> Server {
    let region = |index: u32| {
        let size = [(0, BAR_BYTES), (7, 4096)].iter().find(|r| r.0 == index).map_or(0, |r| r.1);
        let is_bar = index == 0;
        let flags = if is_bar { 7 } else { 3 };
        let info = vfio_region_info { argsz: 32, flags, index, size, ..Default::default() };
        let area = vfio_region_sparse_mmap_area { offset: 0x1000, size: 0x1000 };
        ServerRegion {
            region_info: info,
            sparse_areas: if is_bar { vec![SparseArea { area }] } else { Vec::new() },
            mmap_fd: is_bar.then(|| bar.as_raw_fd()),
        }
    };
    let irq = |index| {
        let count = match index {
            MSIX => 4,
            3 | 4 => 1,
            _ => 0,
        };
        IrqInfo { index, flags: 1, count }
    };
    Server::new(path, true, (0..5).map(irq).collect(), (0..9).map(region).collect()).unwrap()
}

/// The toy behind its server, on a thread of its own, and what is needed to look at it.
struct Served {
    dir: TempDir,
    bar: File,
    thread: JoinHandle<Toy>,
}

impl Served {
    /// At a socket of this name in a directory of its own.
    fn at(name: &str) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let bar = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&bar, BAR_BYTES).unwrap();
        let server = serve(&dir.path().join(name), &bar);
        let thread = std::thread::spawn(move || {
            let mut toy = toy();
            server.run(&mut toy).unwrap();
            toy
        });
        Served { dir, bar: File::from(bar), thread }
    }

    /// The toy, once its client has left.
    fn end(self) -> Toy {
        self.thread.join().unwrap()
    }
}

fn is_readable(fd: &impl AsFd) -> bool {
    let wait = Timespec::try_from(Duration::from_secs(5)).unwrap();
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&wait)).unwrap() == 1
}

#[test]
fn a_server_by_others_is_driven_from_the_first_message_to_the_last() {
    let served = Served::at("cntrl");
    let backing = VfioUserBacking::connect(served.dir.path()).unwrap();
    assert_eq!(backing.vectors_count(), 4);
    backing.set_bus_master(true).unwrap();
    let mut command = [0; 2];
    backing.config_read(4, &mut command).unwrap();
    assert_eq!(command, [6, 0]);

    let registers = backing.registers(0, 0x1100).unwrap();
    registers.write_u32(0x14, 0xabcd);
    assert_eq!(registers.read_u32(0x14), 0xabcd);
    registers.write_u64(0x28, 0x1122_3344_5566_7788);
    assert_eq!(registers.read_u64(0x28), 0x1122_3344_5566_7788);
    registers.write_u32(0x1008, 77);
    let mut doorbell = [0; 4];
    served.bar.read_exact_at(&mut doorbell, 0x1008).unwrap();
    assert_eq!(doorbell, [77, 0, 0, 0]);

    let interrupt = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    backing.bind_vector(2, Some(interrupt.as_fd())).unwrap();
    registers.write_u32(usize::try_from(INTERRUPT).unwrap(), 2);
    assert!(is_readable(&interrupt));
    backing.bind_vector(2, None).unwrap();

    let memory = Arc::new(Mapping::pool(8192).unwrap());
    let domain = backing.dma();
    domain.map(&memory).unwrap();
    let mut table = MemTable::new();
    let spec = RegionSpec { guest_addr: GuestAddr(0), len_bytes: 8192, user_addr: 0 };
    table.add(spec, Arc::clone(&memory)).unwrap();
    let place = table.translate(GuestAddr(5000), 4, &mut 0).unwrap();
    let iova = domain.offset().iova(place.host()).0;
    assert_eq!(iova >> 32, 1);
    registers
        .write_u32(usize::try_from(WRITE).unwrap(), u32::try_from(iova & 0xffff_ffff).unwrap());
    let mut word = [0; 4];
    place.read_into(&mut word);
    assert_eq!(&word, b"moin");
    domain.unmap(&memory);
    domain.unmap(&Arc::new(Mapping::pool(4096).unwrap()));
    // It had no such memory, said so, and is not trusted any more.
    assert_eq!(backing.news(), Some(DeviceNews::Gone));
    assert!(matches!(domain.map(&memory), Err(DmaError::Gone { .. })));
    assert_eq!(registers.read_u32(0x14), u32::MAX);
    let toy = served.end();
    assert!(toy.maps.is_empty() && toy.vectors.iter().all(Option::is_none));
    assert_eq!(toy.config[0x42..0x44], [3, 0x80], "MSI-X is enabled");
    let others: Vec<_> = toy.others.iter().map(|(index, fds)| (*index, fds.len())).collect();
    assert_eq!(others, [(4, 1), (3, 1)]);
}

#[test]
fn closing_resets_a_server_by_others_and_gives_everything_back() {
    let served = Served::at("nvme.sock");
    let backing = VfioUserBacking::connect(&served.dir.path().join("nvme.sock")).unwrap();
    backing.set_bus_master(true).unwrap();
    let interrupt = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    backing.bind_vector(0, Some(interrupt.as_fd())).unwrap();
    let memory = Arc::new(Mapping::pool(8192).unwrap());
    backing.dma().map(&memory).unwrap();
    let start = Instant::now();
    backing.close();
    assert!(start.elapsed() < Duration::from_secs(2));
    let toy = served.end();
    assert_eq!((toy.resets, toy.maps.len(), toy.config[4]), (1, 0, 0));
    assert!(toy.vectors.iter().all(Option::is_none));
}
