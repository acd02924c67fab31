//! Every bound of the system, with its unit in its name and its reason above it.
//!
//! **Invariant:** relations between bounds are asserted here at compile time, so that no code has to hope for them.

/// virtio counts disk offsets in sectors of this size whatever the block size is (virtio 1.2 §5.2.6).
pub const SECTOR_BYTES: u32 = 512;

/// Requests in one batch between a worker and its channel: enough to amortise the call, small enough for L1.
pub const BATCH_REQUESTS_MAX: usize = 64;

/// Ring entries a virtqueue may have (virtio 1.2 §2.7: the largest power of two in 16 bits).
pub const QUEUE_SIZE_MAX: u16 = 32768;

/// Descriptors in one chain. Windows' viostor sends chains longer than the queue, so the bound is the largest queue.
pub const CHAIN_DESCRIPTORS_MAX: usize = 32768;

/// Descriptors of a packed ring that a pass looks at beyond those it knows: more than a batch takes, so that waiting
/// entries are counted soon, and few enough for a pass to stay short.
pub const PACKED_LOOK_DESCRIPTORS_MAX: u16 = 512;

/// Segments that one batch can hold; one chain of the largest size always fits into an empty batch.
pub const BATCH_SEGMENTS_MAX: usize = CHAIN_DESCRIPTORS_MAX;

/// Requests of one virtqueue that may be in flight. A queue of more entries simply waits longer on its ring.
pub const QUEUE_INFLIGHT_MAX: usize = 1024;

/// Bytes that one queue may start per pass of the reactor (one request always may): keeps a pass short for neighbours.
pub const PASS_BYTES_MAX: u64 = 2 << 20;

/// The same beside a queue that waits for little: parsing so many bytes' descriptors takes a microsecond or two.
pub const FAIR_PASS_BYTES: u64 = 256 << 10;

/// Bytes that one queue moves per pass on the reactor's core, beside a queue that waits for little: a page, some 2 µs of
/// copying memory that is in no cache, about as long as a 4 KiB request takes when it is alone.
pub const FAIR_QUANTUM_BYTES: u64 = 4 << 10;

/// The longest piece that a kernel copies in one go then; the queue pauses for the quanta that it was ahead.
pub const FAIR_PIECE_BYTES: u64 = 64 << 10;

/// Bytes that one queue moves per pass otherwise, and the longest piece of one request: some 100 to 200 µs.
pub const FAIR_ALONE_BYTES: u64 = 1 << 20;

/// A queue that had no more than this in flight and got all that it asked for waits for little: 4 KiB at a depth of 4.
pub const FAIR_LIGHT_BYTES: u64 = 16 << 10;

/// How long that counts: who sends more than ten requests a second never meets a long pass.
pub const FAIR_HOLD_NS: u64 = 100_000_000;

/// Bytes in flight over all queues of a reactor, beside a queue that waits for little; one queue has at most half of it.
/// A device of 3 GB/s is through with that half in 0.7 ms.
pub const FAIR_INFLIGHT_BYTES: u64 = 4 << 20;

/// The same otherwise: more than any device needs to be busy, and what a queue that wakes up may have to wait behind.
pub const FAIR_INFLIGHT_ALONE_BYTES: u64 = 64 << 20;

/// Virtqueues of one controller: one per vCPU of a large guest.
pub const CONTROLLER_QUEUES_MAX: u16 = 64;

/// Memory regions per session: what QEMU itself supports with memory hot-plug.
pub const MEMORY_REGIONS_MAX: usize = 509;

/// Mappings of foreign memory that the SIGBUS handler knows: a thousand sessions of up to eight regions and some more.
pub const FOREIGN_MAPPINGS_MAX: usize = 65536;

/// Address space for all mappings: what the machines with most memory have, and an eighth of what a process has.
pub const ARENA_BYTES_WANTED: usize = 16 << 40;

/// With less (RLIMIT_AS) there is no room for guests.
pub const ARENA_BYTES_MIN: usize = 1 << 30;

/// Segments that a taken request keeps without pool memory: what a guest's page-sized and readahead I/O needs.
pub const SEGMENTS_INLINE: usize = 4;

/// Segments of a medium list: a guest's `seg_max` of 126 and Windows' 129.
pub const SEGMENTS_MEDIUM: usize = 160;

/// Medium lists per reactor.
pub const SEGMENT_LISTS_MEDIUM: usize = 256;

/// Lists of the longest possible chain per reactor.
pub const SEGMENT_LISTS_LARGE: usize = 4;

/// One bounce buffer. Larger requests go piece by piece.
pub const BOUNCE_BYTES: usize = 128 << 10;

/// Bounce buffers per reactor (4 MiB of address space, touched on first use).
pub const BOUNCE_BUFFERS: usize = 32;

/// The largest block size of a backend: a sub-block write must fit into one bounce buffer with both its edges.
pub const BLOCK_BYTES_MAX: u32 = 64 << 10;

/// Submission entries of a reactor's io_uring.
pub const RING_SQ_ENTRIES: u32 = 1024;

/// Completion entries of a reactor's io_uring; also the bound on its operations in flight.
pub const RING_CQ_ENTRIES: u32 = 8192;

/// Operations of one channel for which others leave room.
pub const RING_ENTRIES_GUARANTEED: u32 = 2;

/// The part of a ring that is kept for that: 2,048 channels get theirs whatever the others do.
pub const RING_ENTRIES_RESERVED: u32 = RING_CQ_ENTRIES / 2;

/// Users of one reactor's ring: channels and pollers with a kick fd.
pub const RING_CLIENTS_MAX: usize = 32768;

/// Files registered with one reactor's ring.
pub const RING_FILES_MAX: u32 = 16384;

/// Payload of a vfio-user message: data of the largest transfer that is offered (the protocol's own default, 1 MiB), and what
/// describes it.
pub const VFIO_USER_PAYLOAD_BYTES_MAX: usize = (1 << 20) + 64;

/// Descriptors with one vfio-user message: one per command is needed; the rest is room for servers that send more.
pub const VFIO_USER_FDS_MAX: usize = 8;

/// vfio-user commands whose answer is missing: one per thread that may ask, and one per vector that was given up, for which
/// nobody waits.
pub const VFIO_USER_CALLS_MAX: usize = 4096;

/// Mappable areas of one vfio-user region: a BAR with doorbells has one.
pub const VFIO_USER_AREAS_MAX: usize = 16;

/// A vfio-user server that answers a command later than this is as good as gone: they poll their socket.
pub const VFIO_USER_ANSWER_MS: u64 = 5_000;

/// The same for memory that a server is given or gives back: a guest's region is one command, for which it may have to pin
/// every page (seconds per GiB of ordinary ones), or to let its own requests end. Other commands wait behind it.
pub const VFIO_USER_MEMORY_MS: u64 = 60_000;

/// What attaching a controller behind a vfio-user server may take in all. It asks some hundred questions, which a sound
/// server answers in microseconds each, gives it some megabytes of memory, and waits for a controller that is ready within
/// seconds; a server that answers each of them just in time would keep the attempt going for many minutes.
pub const VFIO_USER_ATTACH_MS: u64 = 120_000;
const _: () = assert!(VFIO_USER_ATTACH_MS > VFIO_USER_MEMORY_MS + 4 * VFIO_USER_ANSWER_MS);

/// How long a reactor that goes to sleep waits until a vfio-user server knows its eventfd: many round trips, and a delay
/// that a guest hardly sees. Without an answer the reactor stays awake.
pub const VFIO_USER_BIND_MS: u64 = 5;

/// What closing a vfio-user device may take.
pub const VFIO_USER_CLOSE_MS: u64 = 2_000;

/// Slots of a reactor's table of registered buffers: what io_uring allows (IORING_MAX_REG_BUFFERS).
pub const RING_BUFFERS_MAX: u32 = 16384;

/// One registered buffer is at most this long, as a power of two: io_uring allows 1 GiB. This crate's own tests cut finer,
/// so that they meet the borders without gigabytes.
pub const PIN_PIECE_SHIFT: u32 = if cfg!(test) { 20 } else { 30 };

/// Messages waiting in a reactor's mailbox.
pub const MAILBOX_MESSAGES_MAX: usize = 4096;

/// Messages that a reactor handles per pass, so that a flood of control messages does not starve guests.
pub const MAILBOX_MESSAGES_PER_PASS: usize = 16;

/// A poller that has found nothing for this long is parked: many times the pause between a busy guest's requests, and
/// short enough that a thousand idle disks are polled for a moment only.
pub const PARK_PATIENCE_LEAST_NS: u64 = 2_000_000;

/// The longest patience of a poller that is always woken soon after it was parked.
pub const PARK_PATIENCE_MOST_NS: u64 = 256_000_000;

/// A poller that stayed parked for this long starts again with the least patience.
pub const PARK_REST_LONG_NS: u64 = 1_000_000_000;

/// Reactors of one daemon; also the width of every core mask.
pub const CORES_MAX: usize = 1024;

/// Bytes of a bdev or controller name.
pub const NAME_BYTES_MAX: usize = 128;

/// Bytes of the GET_ID answer (virtio 1.2 §5.2.6).
pub const SERIAL_BYTES: usize = 20;

/// Block-lock buckets per bdev (see `bdev::align`).
pub const BLOCK_LOCK_BUCKETS: usize = 256;

/// The span of a disk that shares one block lock.
pub const BLOCK_LOCK_SPAN_BYTES: u64 = 1 << 20;

/// Requests that one channel may have out at an owner on another reactor, and slots of each of its two rings: as many as
/// a uring channel has.
pub const CROSS_SLOTS: u32 = 256;

/// Crossed channels of one device queue: the queues of two controllers, as the old ones may linger.
pub const CROSS_LINKS_MAX: usize = 2 * CONTROLLER_QUEUES_MAX as usize;

/// Requests in the owner's channel that each requester is guaranteed, where the channel is large enough: a guest with
/// little to do is not to wait behind one that fills every device.
pub const CROSS_ROOM_MIN: usize = 16;

/// Entries of an NVMe ring: an empty place and a command.
pub const NVME_QUEUE_ENTRIES_MIN: u16 = 2;

/// The most: a slot of a command is 10 bits of its CID, and more commands at a time make no device faster.
pub const NVME_QUEUE_ENTRIES_MAX: u16 = 1024;

/// Namespaces of one NVMe controller that become disks.
pub const NVME_NAMESPACES_MAX: usize = 256;

/// Data of one NVMe command: what a page of PRP entries names wherever the data starts.
pub const NVME_TRANSFER_BYTES_MAX: u32 = 2 << 20;

/// Commands of one NVMe pair that each channel on it is guaranteed, where the rings are large enough.
pub const NVME_ROOM_MIN: usize = 16;

/// Times that one NVMe command is sent again, after errors that pass and after resets together.
pub const NVME_RETRIES_MAX: u8 = 4;

/// The pause before the first of these, nanoseconds; each further one is four times as long: 10 ms to 0.64 s.
pub const NVME_RETRY_PAUSE_NS: u64 = 10_000_000;

/// Looks at a pair's commands per deadline: a command is reported when it is late by at most an eighth.
pub const NVME_LOOKS_PER_DEADLINE: u64 = 8;

/// Commands of a pair that one pass looks at for that: about a microsecond.
pub const NVME_LOOK_COMMANDS: usize = 64;

/// Completions that may wait to be acknowledged by a doorbell, if they are also no more than a quarter of the ring.
pub const NVME_CQ_LAZY_ENTRIES: u16 = 32;

const _: () = assert!(CROSS_SLOTS.is_power_of_two() && CROSS_SLOTS as usize >= BATCH_REQUESTS_MAX);
const _: () = assert!(CROSS_SLOTS as usize <= QUEUE_INFLIGHT_MAX);
const _: () = assert!(BATCH_SEGMENTS_MAX >= CHAIN_DESCRIPTORS_MAX);
const _: () = assert!(CHAIN_DESCRIPTORS_MAX >= QUEUE_SIZE_MAX as usize);
const _: () = assert!(SEGMENTS_MEDIUM < CHAIN_DESCRIPTORS_MAX);
const _: () = assert!(BLOCK_BYTES_MAX as usize * 2 <= BOUNCE_BYTES);
const _: () = assert!(BATCH_REQUESTS_MAX <= QUEUE_INFLIGHT_MAX);
const _: () =
    assert!(FAIR_QUANTUM_BYTES <= FAIR_LIGHT_BYTES && FAIR_LIGHT_BYTES <= FAIR_ALONE_BYTES);
const _: () = assert!(FAIR_INFLIGHT_BYTES <= FAIR_INFLIGHT_ALONE_BYTES);
const _: () = assert!(FAIR_PIECE_BYTES.is_multiple_of(BLOCK_BYTES_MAX as u64));
const _: () = assert!(FAIR_ALONE_BYTES.is_multiple_of(BLOCK_BYTES_MAX as u64));
const _: () = assert!(FAIR_ALONE_BYTES <= PASS_BYTES_MAX && FAIR_PASS_BYTES <= PASS_BYTES_MAX);
const _: () = assert!(PARK_PATIENCE_MOST_NS < PARK_REST_LONG_NS);
const _: () = assert!(RING_CQ_ENTRIES >= 2 * RING_SQ_ENTRIES);
const _: () = assert!(RING_CLIENTS_MAX <= u16::MAX as usize);
// A slot is 16 bits in a ring entry, and numbers above it are left for regions without slots.
const _: () = assert!(RING_BUFFERS_MAX <= 1 << 16 && RING_BUFFERS_MAX.is_multiple_of(64));
const _: () = assert!(MEMORY_REGIONS_MAX * 2 <= RING_BUFFERS_MAX as usize);
