//! The session against somebody else's front-end: the `vhost` crate's, which Firecracker and Cloud Hypervisor use.
//!
//! The front-end blocks in a thread of its own; the session is polled here, like on a control thread. What is checked
//! is what the front-end gets and what the backend is asked.
#![expect(unsafe_code)]
// UNSAFETY: the `vhost` crate takes eventfds as a type that can only be made from a raw descriptor.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ringmill_vmm_glue::vhost_user::{
    Backend, Completion, GuestAddr, Peer, Progress, Refusal, RegionDesc, RingStart, Session,
    SharedFd, StopProgress, UserAddr,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandlerMut,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

const USER: u64 = 0x7000_0000_0000;
const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What the front-end's thread and the serving thread both look at.
#[derive(Default)]
struct Shared {
    calls: Mutex<Vec<String>>,
    drained: AtomicBool,
    config_changes: Mutex<u32>,
}

impl Shared {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

/// A device that notes what it is asked and takes its time to stop.
struct Device {
    shared: Arc<Shared>,
    config: [u8; 256],
    config_changed: bool,
    stopping: bool,
}

impl Device {
    fn note(&self, call: impl Into<String>) -> Progress {
        self.shared.calls.lock().unwrap().push(call.into());
        Progress::Done
    }
}

impl Backend for Device {
    fn device_features(&self) -> u64 {
        1 << 32 | 1 << 28
    }

    fn queues_max(&self) -> u16 {
        2
    }

    fn mem_slots_max(&self) -> u64 {
        509
    }

    fn set_features(&mut self, acked: u64) -> Result<Progress, Refusal> {
        Ok(self.note(format!("set_features {acked:x}")))
    }

    fn get_config(&mut self, offset: u32, out: &mut [u8]) -> Result<(), Refusal> {
        let start = usize::try_from(offset)?;
        out.copy_from_slice(&self.config[start..start + out.len()]);
        Ok(())
    }

    fn set_config(&mut self, offset: u32, data: &[u8], migration: bool) -> Result<(), Refusal> {
        let start = usize::try_from(offset)?;
        self.config[start..start + data.len()].copy_from_slice(data);
        self.config_changed = true;
        let _ = self.note(format!("set_config {offset} {data:?} {migration}"));
        Ok(())
    }

    fn set_mem_table(&mut self, regions: Vec<RegionDesc>) -> Result<Progress, Refusal> {
        let sizes: Vec<_> = regions
            .iter()
            .map(|region| rustix::fs::fstat(&region.fd).map(|stat| stat.st_size))
            .collect::<Result<_, _>>()?;
        Ok(self.note(format!("set_mem_table of {sizes:?} bytes")))
    }

    fn add_mem_region(&mut self, region: RegionDesc) -> Result<Progress, Refusal> {
        Ok(self.note(format!("add_mem_region {:x}+{:x}", region.guest_addr, region.len_bytes)))
    }

    fn remove_mem_region(
        &mut self,
        guest_addr: GuestAddr,
        _user_addr: UserAddr,
        len_bytes: u64,
    ) -> Result<Progress, Refusal> {
        Ok(self.note(format!("remove_mem_region {guest_addr:x}+{len_bytes:x}")))
    }

    fn start_ring(&mut self, index: u16, ring: RingStart) -> Result<(), Refusal> {
        let (size, base, enabled) = (ring.size, ring.base, ring.enabled);
        let _ = self.note(format!("start_ring {index} size={size} base={base} enabled={enabled}"));
        // The descriptors must be the front-end's own.
        rustix::io::write(ring.kick.ok_or("no kick")?, &7u64.to_ne_bytes())?;
        rustix::io::write(ring.call.ok_or("no call")?, &8u64.to_ne_bytes())?;
        Ok(())
    }

    fn set_ring_kick(&mut self, index: u16, _kick: Option<SharedFd>) -> Result<(), Refusal> {
        let _ = self.note(format!("set_ring_kick {index}"));
        Ok(())
    }

    fn set_ring_call(&mut self, index: u16, _call: Option<SharedFd>) -> Result<(), Refusal> {
        let _ = self.note(format!("set_ring_call {index}"));
        Ok(())
    }

    fn set_ring_err(&mut self, index: u16, _err: Option<SharedFd>) -> Result<(), Refusal> {
        let _ = self.note(format!("set_ring_err {index}"));
        Ok(())
    }

    fn enable_ring(&mut self, index: u16, enabled: bool) -> Result<Progress, Refusal> {
        Ok(self.note(format!("enable_ring {index} {enabled}")))
    }

    fn stop_ring(&mut self, index: u16) -> Result<StopProgress, Refusal> {
        let _ = self.note(format!("stop_ring {index}"));
        self.stopping = true;
        Ok(StopProgress::Pending)
    }

    fn reset_device(&mut self) -> Result<Progress, Refusal> {
        Ok(self.note("reset_device"))
    }
}

/// Serves one front-end until it hangs up. Returns the error that ended the session, if one did.
fn serve(socket: UnixStream, shared: &Arc<Shared>) -> Option<String> {
    let mut device = Device {
        shared: Arc::clone(shared),
        config: std::array::from_fn(|index| u8::try_from(index).unwrap()),
        config_changed: false,
        stopping: false,
    };
    let mut session = Session::new(socket, &device);
    loop {
        if std::mem::take(&mut device.stopping) {
            // Requests in flight end a little later; nothing may be answered before.
            thread::sleep(Duration::from_millis(50));
            shared.drained.store(true, Ordering::SeqCst);
            session.complete(&mut device, Ok(Completion::Stopped { base: 1234 })).unwrap();
        }
        if std::mem::take(&mut device.config_changed) {
            session.config_changed();
        }
        let interest = session.interest();
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, interest.readable);
        flags.set(PollFlags::OUT, interest.writable);
        let mut fds = [PollFd::from_borrowed_fd(session.as_fd(), flags)];
        let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_ne!(poll(&mut fds, Some(&timeout)).unwrap(), 0, "the front-end fell silent");
        let ready = fds[0].revents();
        if ready.contains(PollFlags::OUT) {
            session.on_writable().unwrap();
        }
        if ready.intersects(PollFlags::IN | PollFlags::HUP) {
            match session.on_readable(&mut device) {
                Ok(Peer::Connected) => {}
                Ok(Peer::Closed) => return None,
                Err(error) => return Some(error.to_string()),
            }
        }
    }
}

/// Runs `front_end` in a thread against a served session, and returns the error that ended that.
fn run(shared: &Arc<Shared>, front_end: impl FnOnce(Frontend) + Send + 'static) -> Option<String> {
    let (theirs, ours) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || front_end(Frontend::from_stream(theirs, 2)));
    let error = serve(ours, shared);
    thread.join().unwrap();
    error
}

/// An eventfd as the `vhost` crate wants it, and a duplicate to look at.
fn event<T: FromRawFd>() -> (T, OwnedFd) {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let duplicate = fd.try_clone().unwrap();
    // SAFETY: the descriptor was opened above and its only owner gives it up here.
    (unsafe { T::from_raw_fd(fd.into_raw_fd()) }, duplicate)
}

fn counter(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).unwrap();
    u64::from_ne_bytes(bytes)
}

fn memory(len_bytes: u64) -> OwnedFd {
    let fd = memfd_create(c"guest", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len_bytes).unwrap();
    fd
}

fn region(guest_addr: u64, len_bytes: u64, fd: &OwnedFd) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: guest_addr,
        memory_size: len_bytes,
        userspace_addr: USER + guest_addr,
        mmap_offset: 0,
        mmap_handle: fd.as_raw_fd(),
    }
}

fn ring(page: u64) -> VringConfigData {
    VringConfigData {
        queue_max_size: 256,
        queue_size: 256,
        flags: 0,
        desc_table_addr: USER + page,
        used_ring_addr: USER + page + 0x2000,
        avail_ring_addr: USER + page + 0x1000,
        log_addr: None,
    }
}

fn offered() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::RESET_DEVICE
}

/// Negotiates everything, with an acknowledgement for each message from then on.
fn negotiate(front: &mut Frontend) {
    front.set_owner().unwrap();
    assert_eq!(front.get_features().unwrap(), 1 << 32 | 1 << 28 | PROTOCOL);
    assert_eq!(front.get_protocol_features().unwrap(), offered());
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front.set_protocol_features(offered()).unwrap();
    front.set_features(1 << 32 | PROTOCOL).unwrap();
}

#[test]
fn a_disk_is_set_up_used_and_stopped() {
    let shared = Arc::new(Shared::default());
    let seen = Arc::clone(&shared);
    let error = run(&shared, move |mut front| {
        negotiate(&mut front);
        assert_eq!(front.get_queue_num().unwrap(), 2);
        assert_eq!(front.get_max_mem_slots().unwrap(), 509);
        let (low, high) = (memory(1 << 20), memory(2 << 20));
        front.set_mem_table(&[region(0, 1 << 20, &low), region(1 << 32, 2 << 20, &high)]).unwrap();
        front.add_mem_region(&region(8 << 20, 1 << 20, &low)).unwrap();
        front.remove_mem_region(&region(8 << 20, 1 << 20, &low)).unwrap();
        for index in 0..2 {
            let ((call, call_seen), (kick, kick_seen)) = (event(), event());
            front.set_vring_call(index, &call).unwrap();
            front.set_vring_err(index, &event().0).unwrap();
            front.set_vring_num(index, 256).unwrap();
            front.set_vring_base(index, 5).unwrap();
            front.set_vring_addr(index, &ring(0x4000)).unwrap();
            front.set_vring_kick(index, &kick).unwrap();
            assert_eq!((counter(&kick_seen), counter(&call_seen)), (7, 8));
            front.set_vring_enable(index, true).unwrap();
        }
        front.set_vring_call(1, &event().0).unwrap();
        assert!(!seen.drained.load(Ordering::SeqCst));
        assert_eq!(front.get_vring_base(0).unwrap(), 1234);
        assert!(seen.drained.load(Ordering::SeqCst), "answered before the ring was drained");
        assert_eq!(front.get_vring_base(0).unwrap(), 1234);
        front.reset_device().unwrap();
        front.reset_owner().unwrap();
    });
    assert_eq!(error, None);
    assert_eq!(
        shared.take(),
        [
            "set_features 100000000",
            "set_mem_table of [1048576, 2097152] bytes",
            "add_mem_region 800000+100000",
            "remove_mem_region 800000+100000",
            "start_ring 0 size=256 base=5 enabled=false",
            "enable_ring 0 true",
            "start_ring 1 size=256 base=5 enabled=false",
            "enable_ring 1 true",
            "set_ring_call 1",
            "stop_ring 0",
            "reset_device",
        ]
    );
}

#[test]
fn what_is_refused_is_refused_by_acknowledgement_and_the_session_goes_on() {
    let shared = Arc::new(Shared::default());
    let error = run(&shared, |mut front| {
        negotiate(&mut front);
        let fd = memory(1 << 20);
        let overlapping = [region(0, 4097, &fd), region(4096, 4096, &fd)];
        front.set_mem_table(&overlapping).unwrap_err();
        front.set_mem_table(&[region(u64::MAX - USER, 4096, &fd)]).unwrap_err();
        front.remove_mem_region(&region(0, 4096, &fd)).unwrap_err();
        front.set_vring_num(0, 255).unwrap_err();
        front.set_vring_addr(0, &ring(8)).unwrap_err();
        front.set_features(1 << 63).unwrap_err();
        front.set_config(300, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
        front.set_config(600, VhostUserConfigFlags::WRITABLE, &[0]).unwrap_err();
        front.get_features().unwrap();
        front.set_vring_num(0, 256).unwrap();
    });
    assert_eq!(error, None);
}

#[test]
fn the_configuration_space_is_read_and_written_and_its_change_announced() {
    struct Listener(Arc<Shared>);

    impl VhostUserFrontendReqHandlerMut for Listener {
        fn handle_config_change(&mut self) -> HandlerResult<u64> {
            *self.0.config_changes.lock().unwrap() += 1;
            Ok(0)
        }
    }

    let shared = Arc::new(Shared::default());
    let seen = Arc::clone(&shared);
    let error = run(&shared, move |mut front| {
        negotiate(&mut front);
        let listener = Arc::new(Mutex::new(Listener(Arc::clone(&seen))));
        let mut requests = FrontendReqHandler::new(listener).unwrap();
        let socket = requests.get_tx_raw_fd();
        front.set_backend_request_fd(&socket).unwrap();
        let (config, data) =
            front.get_config(8, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap();
        assert_eq!(({ config.offset }, { config.size }), (8, 60));
        assert_eq!(data, (8..68).collect::<Vec<u8>>());
        front.set_config(32, VhostUserConfigFlags::empty(), &[0]).unwrap();
        requests.handle_request().unwrap();
        assert_eq!(*seen.config_changes.lock().unwrap(), 1);
        let (_, data) = front.get_config(32, 1, VhostUserConfigFlags::empty(), &[9]).unwrap();
        assert_eq!(data, [0]);
    });
    assert_eq!(error, None);
    assert_eq!(shared.take()[1], "set_config 32 [0] false");
}

#[test]
fn a_front_end_that_negotiates_only_config_works() {
    let shared = Arc::new(Shared::default());
    let error = run(&shared, |mut front| {
        front.set_owner().unwrap();
        front.get_features().unwrap();
        front.get_protocol_features().unwrap();
        front.set_protocol_features(VhostUserProtocolFeatures::CONFIG).unwrap();
        front.set_features(1 << 32 | PROTOCOL).unwrap();
        front.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap();
        set_up_one_ring(&front);
        front.set_vring_enable(0, true).unwrap();
        front.get_vring_base(0).unwrap();
    });
    assert_eq!(error, None);
    assert_eq!(
        shared.take()[2..],
        ["start_ring 0 size=256 base=0 enabled=false", "enable_ring 0 true", "stop_ring 0"]
    );
}

#[test]
fn a_front_end_that_negotiates_nothing_works_and_its_rings_start_enabled() {
    let shared = Arc::new(Shared::default());
    let error = run(&shared, |front| {
        front.get_features().unwrap();
        front.set_features(1 << 32).unwrap();
        set_up_one_ring(&front);
        // Late, as QEMU does it.
        front.set_owner().unwrap();
        front.get_vring_base(0).unwrap();
    });
    assert_eq!(error, None);
    assert_eq!(shared.take()[2..], ["start_ring 0 size=256 base=0 enabled=true", "stop_ring 0"]);
}

#[test]
fn a_mistake_without_acknowledgements_ends_the_session_with_its_name() {
    let shared = Arc::new(Shared::default());
    let error = run(&shared, |front| {
        front.get_features().unwrap();
        front.set_vring_num(1, 3).unwrap();
        front.get_features().unwrap_err();
    });
    let error = error.unwrap();
    assert!(error.contains("ring 1 cannot have 3 entries"), "{error}");
}

fn set_up_one_ring(front: &Frontend) {
    let fd = memory(1 << 20);
    front.set_mem_table(&[region(0, 1 << 20, &fd)]).unwrap();
    front.set_vring_call(0, &event().0).unwrap();
    front.set_vring_num(0, 256).unwrap();
    front.set_vring_addr(0, &ring(0)).unwrap();
    front.set_vring_base(0, 0).unwrap();
    front.set_vring_kick(0, &event().0).unwrap();
}
