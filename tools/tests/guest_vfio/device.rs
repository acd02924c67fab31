//! What runs on a device that vfio-pci has: in a guest of the lab, or on a real machine with a disk to spare.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ringmill_core::bdev::Bdev;
use ringmill_core::bdev::conformance::Suite;
use ringmill_core::cross::CrossBdev;
use ringmill_core::mem::{DmaError, DmaMap, Mapping, SharedSlice, install_sigbus_handler};
use ringmill_core::reactor::{IdlePolicy, ReactorConfig, ReactorHandle, spawn};
use ringmill_core::spec::nvme::{
    CQE_BYTES, IDENTIFY_BYTES, SQE_BYTES, Sqe, admin, cap, cc, csts, id_ctrl, reg,
};
use ringmill_core::units::{HostAddr, bytes_u64};
use ringmill_drivers::nvme::{self, NvmeControl, NvmeOptions};
use ringmill_drivers::pci::{PciBacking, PciError, Registers};
use ringmill_drivers::vfio::{VfioDevice, VfioRegisters};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Many times what emulation needs.
const WAIT_MAX: Duration = Duration::from_secs(20);

/// Entries of the queues here.
const ENTRIES: usize = 8;

fn address() -> String {
    std::env::var("RINGMILL_VFIO_DEVICE")
        .expect("RINGMILL_VFIO_DEVICE names a device that vfio-pci has")
}

fn open() -> VfioDevice {
    install_sigbus_handler().expect("a handler");
    VfioDevice::open(&address()).unwrap_or_else(|error| panic!("{error}"))
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + WAIT_MAX;
    while !done() {
        assert!(Instant::now() < end, "waited for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

/// Whether it was signalled within that time; it is not any more afterwards.
fn came(fd: &OwnedFd, within: Duration) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    let nanoseconds = i64::from(within.subsec_nanos());
    let seconds = i64::try_from(within.as_secs()).expect("short");
    let limit = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    poll(&mut fds, Some(&limit)).expect("poll");
    rustix::io::read(fd, &mut [0_u8; 8]).is_ok()
}

/// An admin queue without a driver: one page each for submissions, completions and data.
struct ByHand {
    registers: Arc<VfioRegisters>,
    memory: Arc<Mapping>,
    map: DmaMap,
    iova: u64,
    tail: u32,
    head: usize,
    phase: bool,
    doorbell_bytes: usize,
}

impl ByHand {
    fn new(device: &VfioDevice) -> ByHand {
        let registers = device.registers(0, reg::DOORBELLS + 8).expect("BAR 0");
        let memory = Arc::new(Mapping::pool(3 * 4096).expect("memory"));
        let dma = device.dma();
        let map = DmaMap::new(&dma, &memory).expect("mapped");
        let iova = dma.offset().iova(HostAddr(memory.base().as_ptr() as usize)).0;
        let stride = registers.read_u64(reg::CAP) >> cap::DSTRD_SHIFT & 0xf;
        let doorbell_bytes = 4 << stride;
        ByHand { registers, memory, map, iova, tail: 0, head: 0, phase: true, doorbell_bytes }
    }

    fn page(&self, number: usize) -> SharedSlice {
        SharedSlice::new(&self.memory, number * 4096, 4096, 4096).expect("a page")
    }

    fn enable(&mut self) {
        (self.tail, self.head, self.phase) = (0, 0, true);
        let entries_z = u32::try_from(ENTRIES - 1).expect("few");
        self.registers.write_u32(reg::AQA, entries_z << 16 | entries_z);
        self.registers.write_u64(reg::ASQ, self.iova);
        self.registers.write_u64(reg::ACQ, self.iova + 4096);
        let sizes = 6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT;
        self.registers.write_u32(reg::CC, cc::EN | sizes);
        let registers = Arc::clone(&self.registers);
        wait("CSTS.RDY", || registers.read_u32(reg::CSTS) & csts::RDY != 0);
    }

    /// Sends an Identify Controller whose data goes to the third page.
    fn send_identify(&mut self) {
        let mut entry = Sqe::new(admin::IDENTIFY, 7, 0);
        entry.set_prps(self.iova + 2 * 4096, 0);
        entry.0[10] = 1;
        let queue = self.page(0);
        let at = usize::try_from(self.tail).expect("few") * SQE_BYTES;
        for (index, word) in entry.0.iter().enumerate() {
            queue.store_u32(at + index * 4, *word, Ordering::Relaxed);
        }
        self.tail = (self.tail + 1) % u32::try_from(ENTRIES).expect("few");
        self.registers.write_u32(reg::DOORBELLS, self.tail);
    }

    fn is_answered(&self) -> bool {
        let status = self.page(1).load_u16(self.head * CQE_BYTES + 14, Ordering::Acquire);
        (status & 1 == 1) == self.phase
    }

    /// Takes the answer: its status without the phase.
    fn take(&mut self) -> u16 {
        let status = self.page(1).load_u16(self.head * CQE_BYTES + 14, Ordering::Acquire);
        self.head = (self.head + 1) % ENTRIES;
        self.phase ^= self.head == 0;
        let head = u32::try_from(self.head).expect("few");
        self.registers.write_u32(reg::DOORBELLS + self.doorbell_bytes, head);
        status >> 1
    }

    fn data(&self) -> Vec<u8> {
        let page = self.page(2);
        (0..IDENTIFY_BYTES)
            .step_by(4)
            .flat_map(|at| page.load_u32(at, Ordering::Relaxed).to_le_bytes())
            .collect()
    }

    /// The reset must have emptied nothing but the device: a new page of zeroes where the answers come.
    fn forget(&self) {
        let page = self.page(1);
        for at in (0..4096).step_by(8) {
            page.store_u64(at, 0, Ordering::Relaxed);
        }
    }
}

#[test]
#[ignore = "needs a device that vfio-pci has"]
fn by_hand() {
    let device = open();
    assert_eq!(device.name(), address());
    let mut command = [0; 2];
    device.config_read(4, &mut command).expect("configuration");
    assert_eq!(command[0] & 4, 0, "a bus master before its driver wants it");
    assert!(device.config_read(1 << 20, &mut command).is_err());
    let error = VfioDevice::open(&address()).expect_err("open already");
    assert!(error.to_string().contains("another process has it"), "{error}");
    let fds = device.with_descriptors(|fds| {
        fds.map(|fd| {
            rustix::io::fcntl_getfd(fd).expect("open").contains(rustix::io::FdFlags::CLOEXEC)
        })
    });
    assert_eq!(fds, Some([true; 3]));

    let mut hand = ByHand::new(&device);
    let registers = Arc::clone(&hand.registers);
    assert_eq!(registers.mapped_bytes(), registers.len_bytes(), "registers by system calls");
    let version = registers.read_u32(reg::VS);
    assert!((1..=2).contains(&(version >> 16)), "{version:#x}");
    assert_eq!(registers.read_u32(registers.len_bytes()), u32::MAX);
    assert!(device.registers(0, 1 << 40).is_err() && device.registers(6, 4).is_err());
    println!(
        "CAP {:#x} VS {version:#x}, {} vectors, IOVA {:#x}",
        registers.read_u64(reg::CAP),
        device.vectors_count(),
        hand.iova
    );

    hand.enable();
    // Not yet a bus master: the device cannot fetch the command.
    let vector = signal();
    device.bind_vector(0, Some(vector.as_fd())).expect("vector 0");
    assert!(device.bind_vector(device.vectors_count(), None).is_err());
    device.set_bus_master(true).expect("bus master");
    hand.send_identify();
    wait("the answer", || hand.is_answered());
    assert!(came(&vector, WAIT_MAX), "no interrupt");
    assert_eq!(hand.take(), 0);
    device.unmask(0).expect("unmasked");
    let data = hand.data();
    println!("model {}", String::from_utf8_lossy(&data[id_ctrl::MN..id_ctrl::MN + 40]).trim_end());
    assert!(data[id_ctrl::MN..id_ctrl::MN + 40].iter().all(|byte| (0x20..0x7f).contains(byte)));

    // Nobody is signalled while polling.
    device.bind_vector(0, None).expect("unbound");
    hand.send_identify();
    wait("the second answer", || hand.is_answered());
    assert_eq!(hand.take(), 0);
    assert!(!came(&vector, Duration::from_millis(50)), "an interrupt for nobody");

    // After a reset it is disabled, has its configuration, and works again.
    device.reset().unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(registers.read_u32(reg::CC) & cc::EN, 0);
    device.config_read(4, &mut command).expect("configuration");
    assert_eq!(command[0] & 6, 6);
    hand.forget();
    hand.enable();
    device.bind_vector(0, Some(vector.as_fd())).expect("vector 0");
    hand.send_identify();
    assert!(came(&vector, WAIT_MAX), "no interrupt after the reset");
    assert!(hand.is_answered() && hand.take() == 0 && hand.data() == data);

    no_bus_master_no_memory(&device, &mut hand);
    assert!(device.news().is_none());

    device.close();
    device.close();
    assert!(device.with_descriptors(|_| ()).is_none());
    assert_eq!((registers.read_u32(reg::VS), registers.read_u64(reg::CAP)), (u32::MAX, u64::MAX));
    registers.write_u32(reg::CC, 0);
    assert!(matches!(device.reset(), Err(PciError::Gone { .. })));
    assert!(matches!(device.config_read(0, &mut command), Err(PciError::Gone { .. })));
    assert!(matches!(device.bind_vector(0, None), Err(PciError::Gone { .. })));
    let memory = Arc::new(Mapping::pool(4096).expect("memory"));
    assert!(matches!(DmaMap::new(&device.dma(), &memory), Err(DmaError::Gone { .. })));
    drop(hand.map);
    drop(device);

    // It can be had again at once, while the old registers are still held.
    let again = open();
    let version_again = again.registers(0, 4096).expect("BAR 0").read_u32(reg::VS);
    assert_eq!(version_again, version);
    assert_eq!(registers.read_u32(reg::VS), u32::MAX);
    drop(again);
}

/// Says why the device cannot be opened.
#[test]
#[ignore = "needs a device that cannot be had"]
fn refused() {
    let error = VfioDevice::open(&address()).expect_err("a device that cannot be had");
    assert!(matches!(error, PciError::Refused { .. }), "{error:?}");
    println!("refused: {error}");
}

/// Under a limit of 8 MiB, and without the right to ignore it.
#[test]
#[ignore = "needs a device that vfio-pci has, and ulimit -l 8192"]
fn memlock() {
    let device = open();
    let dma = device.dma();
    let pool = |mib: usize| Arc::new(Mapping::pool(mib << 20).expect("memory"));
    let small = DmaMap::new(&dma, &pool(6)).expect("6 of 8 MiB");
    let error = DmaMap::new(&dma, &pool(4)).expect_err("10 of 8 MiB");
    assert!(matches!(error, DmaError::Memlock { need_bytes: 0xa0_0000, .. }), "{error:?}");
    println!("refused: {error}");
    // What is unmapped counts no more, and a refusal leaves nothing behind.
    drop(small);
    let others = [pool(4), pool(4)].map(|memory| DmaMap::new(&dma, &memory).expect("8 of 8 MiB"));
    drop(others);
    assert!(DmaMap::new(&dma, &Arc::new(Mapping::anonymous(8 << 20).expect("memory"))).is_ok());
}

/// With bus mastering off a command is not even fetched; on again, it is.
fn no_bus_master_no_memory(device: &VfioDevice, hand: &mut ByHand) {
    device.set_bus_master(false).expect("off");
    hand.send_identify();
    std::thread::sleep(Duration::from_millis(100));
    assert!(!hand.is_answered(), "an answer without bus mastering");
    device.set_bus_master(true).expect("on");
    assert_eq!(bytes_u64(hand.memory.len_bytes()), 3 * 4096);
}

/// Holds the device as a bus master until it is killed.
#[test]
#[ignore = "needs a device that vfio-pci has, and is killed"]
fn hold() {
    let device = open();
    let mut hand = ByHand::new(&device);
    device.set_bus_master(true).expect("on");
    hand.enable();
    println!("held");
    std::thread::sleep(Duration::from_secs(600));
}

fn attached(reactors: &[ReactorHandle]) -> Arc<dyn NvmeControl> {
    let options = NvmeOptions { name: "n".to_owned(), ..NvmeOptions::default() };
    let control = nvme::attach(open(), options, reactors, Arc::new(|event| println!("{event:?}")))
        .unwrap_or_else(|error| panic!("{error}"));
    println!("{:?}", control.info());
    control
}

/// Under software emulation a request takes a tenth of a millisecond.
fn passes(bdev: Arc<dyn Bdev>) {
    let started = Instant::now();
    Suite { requests_count: 100, ..Suite::new(bdev) }.run();
    println!("passed in {:?}", started.elapsed());
}

/// All namespaces pass the suite of all drivers.
#[test]
#[ignore = "needs a device that vfio-pci has; its data is lost"]
fn conformance() {
    let control = attached(&[]);
    let namespaces = control.namespaces();
    assert!(!namespaces.is_empty());
    for namespace in namespaces {
        println!("{:?}", namespace.info);
        passes(namespace.bdev.expect("a bdev"));
    }
    control.detach();
}

/// The controller grants one queue pair: one reactor has it, and whoever else wants the disk crosses over to that one.
#[test]
#[ignore = "needs a device with one queue pair that vfio-pci has; its data is lost"]
fn conformance_across() {
    let idle = IdlePolicy::Adaptive { spin_ns: 20_000 };
    let config = ReactorConfig { core: None, idle, io_wq_cpus: Vec::new() };
    let reactors = [0, 1].map(|_| spawn(&config).expect("a reactor"));
    let control = attached(&reactors);
    assert_eq!(control.info().queue_pairs, 1);
    let owners = control.owners().expect("fewer pairs than reactors have owners");
    let inner = control.namespaces().swap_remove(0).bdev.expect("a bdev");
    let refused = inner.open_channel(Some(&reactors[1])).err().expect("no pair there").to_string();
    assert!(refused.contains("no queue pair"), "{refused}");
    passes(Arc::new(CrossBdev::new(inner, owners).expect("owners")));
    control.detach();
    let slept: u64 = reactors.iter().map(|reactor| reactor.stats().sleeps_count).sum();
    assert!(slept > 0, "no reactor slept");
    reactors.iter().for_each(ReactorHandle::stop);
}
