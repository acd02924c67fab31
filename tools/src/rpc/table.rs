//! All methods of the RPC: names, help, parameters, and the function behind each.

use super::{
    bdev,
    engine::{CacheMode, PinMode},
    framework, iostat, latency,
    methods::Method,
    nvme,
    params::{Kind, Param},
    vhost,
};

const ANY: u64 = u64::MAX;
const U32: u64 = 0xffff_ffff;
/// Longest wait for a bdev: a day in ms.
const WAIT_MS_MAX: u64 = 86_400_000;
/// Most queues a front-end can use per disk.
const QUEUES_MAX: u64 = ringmill_core::limits::CONTROLLER_QUEUES_MAX as u64;

const NAME: Param = Param::must("name", Kind::Text, "name of the bdev");
const CTRLR: Param = Param::must("ctrlr", Kind::Text, "name of the controller");
const UUID: Param = Param::may("uuid", Kind::Text, "made up", "UUID of the bdev");
const NUM_BLOCKS: Param = Param::must("num_blocks", Kind::Number(ANY), "size in blocks");
const FILENAME: Param =
    Param::must("filename", Kind::Text, "path of the image or block device, on the daemon's host");
/// Most device queues that mean anything.
const DEVICE_QUEUES_MAX: u64 = ringmill_core::limits::CORES_MAX as u64;
const DEVICE_QUEUES: Param = Param::may(
    "queues",
    Kind::Number(DEVICE_QUEUES_MAX),
    "0, one per reactor",
    "device queues: with fewer than reactors, requests cross to the reactors that own them",
);
const CACHE: Param = Param::may(
    "cache",
    Kind::Word(&CacheMode::NAMES),
    "none",
    "use of the host's page cache: none is O_DIRECT",
);
const FORMAT: Param = Param::may(
    "format",
    Kind::Word(&["raw"]),
    "",
    "say raw to use a file that looks like qcow2 or VMDK as it is",
);
const TRANSFERS: Param = Param::may(
    "transfers",
    Kind::Word(&["auto", "ring"]),
    "auto",
    "auto: tmpfs and zram, which are memory, are read and written by the reactor itself; ring: through io_uring's workers",
);
const IOPOLL: Param = Param::may(
    "iopoll",
    Kind::Flag,
    "false",
    "poll a block device that has queues for it, instead of waiting for interrupts",
);
const IMAGE_READONLY: Param =
    Param::may("readonly", Kind::Flag, "false", "open the image read-only");
const IMAGE_BLOCK_SIZE: Param = Param::may(
    "block_size",
    Kind::Number(U32),
    "what the device wants",
    "bytes per block: 512 or 4096",
);
const NVME_NAME: Param = Param::must("name", Kind::Text, "name of the NVMe controller");
const NVME_ACTION: Param = Param::may(
    "action_on_timeout",
    Kind::Word(&nvme::ACTIONS),
    "abort, or as bdev_nvme_set_options says",
    "what happens to a command without an answer: none waits on, abort aborts it and then resets, reset resets at once",
);
const NVME_TIMEOUT: Param = Param::may(
    "timeout_us",
    Kind::Number(nvme::TIMEOUT_US_MAX),
    "30 s, or as bdev_nvme_set_options says",
    "how long a read, write or flush may take, in µs; 0: for ever",
);
const NVME_TIMEOUT_ADMIN: Param = Param::may(
    "timeout_admin_us",
    Kind::Number(nvme::TIMEOUT_US_MAX),
    "10 s, or as bdev_nvme_set_options says",
    "how long an admin command may take, in µs; 0: as timeout_us",
);
const NVME_REQUESTS: Param = Param::may(
    "io_queue_requests",
    Kind::Number(nvme::REQUESTS_MAX),
    "255, or as bdev_nvme_set_options says",
    "commands in flight per queue, as far as the controller allows; 0: the default",
);
const LEVEL: Param = Param::must("level", Kind::Text, "ERROR, WARNING, NOTICE, INFO or DEBUG");
const LATENCY_CTRLR: Param = Param::may("ctrlr", Kind::Text, "all", "only this controller");
const LATENCY_BDEV: Param = Param::may("bdev", Kind::Text, "all", "only this bdev");
const RESET_WORDS: Kind = Kind::Word(&["none", "all", "maxmin"]);

macro_rules! method {
    ($name:literal, $help:literal, $run:path, [$($param:expr),* $(,)?]) => {
        Method { name: $name, help: $help, params: &[$($param),*], run: $run }
    };
}

/// The table. Parameters that ringmill cannot honour are listed where SPDK's clients send them as `false` or 0.
pub const METHODS: &[Method] = &[
    method!("spdk_get_version", "Version of the daemon", framework::version, []),
    method!(
        "rpc_get_methods",
        "Names of all methods",
        framework::methods,
        [
            Param::may(
                "current",
                Kind::Flag,
                "false",
                "only those that can be called now (all can)"
            ),
            Param::may("include_aliases", Kind::Flag, "false", "also aliases (there are none)"),
        ]
    ),
    method!("framework_wait_init", "Returns when the daemon is ready", framework::yes, []),
    method!(
        "framework_start_init",
        "Does nothing: the daemon is ready when it answers",
        framework::yes,
        []
    ),
    method!(
        "framework_get_subsystems",
        "Parts of the configuration, in loading order",
        framework::subsystems,
        []
    ),
    method!(
        "framework_get_config",
        "Calls that make the present configuration of a subsystem",
        framework::config,
        [Param::must("name", Kind::Text, "name of the subsystem: reactor, bdev or vhost_blk"),]
    ),
    method!("framework_get_reactors", "Reactors with busy and idle time", framework::reactors, []),
    method!(
        "framework_get_scheduler",
        "The scheduler: queues stay on the core they were given",
        framework::scheduler,
        []
    ),
    method!("thread_get_stats", "Threads with busy and idle time", framework::threads, []),
    method!(
        "thread_get_pollers",
        "Pollers with their run counts; paused: idle queues that wait for a kick",
        framework::pollers,
        []
    ),
    method!(
        "spdk_kill_instance",
        "Acts as if the daemon got a signal; SIGTERM drains and ends it",
        framework::kill,
        [Param::must(
            "sig_name",
            Kind::Text,
            "SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGKILL, SIGUSR1 or SIGUSR2"
        ),]
    ),
    method!("log_set_level", "Sets the level of the log", framework::set_log_level, [LEVEL]),
    method!("log_get_level", "Level of the log", framework::log_level, []),
    method!(
        "log_set_print_level",
        "Sets the level of the log (there is one level)",
        framework::set_log_level,
        [LEVEL]
    ),
    method!("log_get_print_level", "Level of the log", framework::log_level, []),
    method!(
        "reactor_set_idle",
        "When a reactor stops polling and sleeps",
        framework::set_idle,
        [
            Param::must(
                "policy",
                Kind::Word(&["poll", "adaptive"]),
                "poll never sleeps; adaptive sleeps without work"
            ),
            Param::may(
                "spin_us",
                Kind::Number(60_000_000),
                "unchanged",
                "how long a reactor polls in vain before it sleeps"
            ),
        ]
    ),
    method!(
        "bdev_get_bdevs",
        "Block devices",
        bdev::list,
        [
            Param::may("name", Kind::Text, "all", "only this one (name or UUID)"),
            Param::may(
                "timeout",
                Kind::Number(WAIT_MS_MAX),
                "0",
                "wait this many ms for it to appear"
            ),
        ]
    ),
    method!(
        "bdev_wait_for_examine",
        "Does nothing: bdevs are ready when they are listed",
        framework::yes,
        []
    ),
    method!(
        "bdev_null_create",
        "Makes a disk that never touches data, for benchmarks",
        bdev::create_null,
        [
            NAME,
            NUM_BLOCKS,
            Param::must("block_size", Kind::Number(U32), "bytes per block: 512 or 4096"),
            UUID,
            DEVICE_QUEUES,
            Param::unsupported("physical_block_size"),
            Param::unsupported("md_size"),
            Param::unsupported("md_interleave"),
            Param::unsupported("dif_type"),
            Param::unsupported("dif_is_head_of_md"),
            Param::unsupported("dif_pi_format"),
            Param::unsupported("preferred_write_alignment"),
            Param::unsupported("preferred_write_granularity"),
            Param::unsupported("optimal_write_size"),
            Param::unsupported("preferred_unmap_alignment"),
            Param::unsupported("preferred_unmap_granularity"),
        ]
    ),
    method!("bdev_null_delete", "Deletes a null disk", bdev::delete_null, [NAME]),
    method!(
        "bdev_null_resize",
        "Changes the size of a null disk, up to the guest",
        bdev::resize_null,
        [NAME, Param::must("new_size", Kind::Number(ANY), "new size in MiB"),]
    ),
    method!(
        "bdev_malloc_create",
        "Makes a RAM disk",
        bdev::create_malloc,
        [
            Param::may("name", Kind::Text, "Malloc0, Malloc1 …", "name of the bdev"),
            NUM_BLOCKS,
            Param::must("block_size", Kind::Number(U32), "bytes per block: 512 or 4096"),
            UUID,
            DEVICE_QUEUES,
            Param::unsupported("physical_block_size"),
            Param::unsupported("optimal_io_boundary"),
            Param::unsupported("md_size"),
            Param::unsupported("md_interleave"),
            Param::unsupported("dif_type"),
            Param::unsupported("dif_is_head_of_md"),
            Param::unsupported("dif_pi_format"),
            Param::unsupported("enable_numa"),
        ]
    ),
    method!(
        "bdev_malloc_delete",
        "Deletes a RAM disk and what is on it",
        bdev::delete_malloc,
        [NAME]
    ),
    method!(
        "bdev_uring_create",
        "Opens a file or block device through io_uring",
        bdev::create_uring,
        [
            NAME,
            FILENAME,
            IMAGE_BLOCK_SIZE,
            UUID,
            IMAGE_READONLY,
            CACHE,
            FORMAT,
            DEVICE_QUEUES,
            IOPOLL,
            TRANSFERS,
        ]
    ),
    method!("bdev_uring_delete", "Closes a file or block device", bdev::delete_uring, [NAME]),
    method!(
        "bdev_uring_rescan",
        "Looks at the size of the image again, up to the guest",
        bdev::rescan_uring,
        [NAME]
    ),
    method!(
        "bdev_aio_create",
        "The same as bdev_uring_create (ringmill has one driver)",
        bdev::create_aio,
        [
            NAME,
            FILENAME,
            IMAGE_BLOCK_SIZE,
            IMAGE_READONLY,
            Param::may("fallocate", Kind::Flag, "true", "discards reach the file (they always do)"),
            UUID,
            Param::unsupported("nowait"),
            CACHE,
            FORMAT,
            DEVICE_QUEUES,
            IOPOLL,
            TRANSFERS,
        ]
    ),
    method!("bdev_aio_delete", "The same as bdev_uring_delete", bdev::delete_uring, [NAME]),
    method!("bdev_aio_rescan", "The same as bdev_uring_rescan", bdev::rescan_uring, [NAME]),
    method!(
        "bdev_nvme_attach_controller",
        "Drives an NVMe controller from user space; its namespaces become bdevs <name>n<number>",
        nvme::attach,
        [
            Param::must("name", Kind::Text, "what to call the controller"),
            Param::must("trtype", Kind::Text, "PCIe (through VFIO) or vfiouser"),
            Param::must(
                "traddr",
                Kind::Text,
                "PCI address, as 0000:01:00.0; or path of the vfio-user socket, or of the directory where it is called cntrl"
            ),
            Param::may(
                "num_io_queues",
                Kind::Number(U32),
                "0, one per reactor",
                "I/O queues; with fewer than reactors, requests cross to the reactors that have one"
            ),
            NVME_ACTION,
            NVME_TIMEOUT,
            NVME_TIMEOUT_ADMIN,
            NVME_REQUESTS,
            Param::may(
                "multipath",
                Kind::Word(&["disable"]),
                "disable",
                "there is one path to a controller"
            ),
            Param::fixed("max_bdevs", &["128", "0"]),
            Param::unsupported("multipath_opts"),
            Param::unsupported("adrfam"),
            Param::unsupported("trsvcid"),
            Param::unsupported("priority"),
            Param::unsupported("subnqn"),
            Param::unsupported("hostnqn"),
            Param::unsupported("hostaddr"),
            Param::unsupported("hostsvcid"),
            Param::unsupported("prchk_reftag"),
            Param::unsupported("prchk_guard"),
            Param::unsupported("hdgst"),
            Param::unsupported("ddgst"),
            Param::unsupported("fabrics_connect_timeout_us"),
            Param::unsupported("ctrlr_loss_timeout_sec"),
            Param::unsupported("reconnect_delay_sec"),
            Param::unsupported("fast_io_fail_timeout_sec"),
            Param::unsupported("psk"),
            Param::unsupported("dhchap_key"),
            Param::unsupported("dhchap_ctrlr_key"),
            Param::unsupported("allow_unrecognized_csi"),
        ]
    ),
    method!(
        "bdev_nvme_get_controllers",
        "NVMe controllers: state, identity, queues, namespaces, what went wrong",
        nvme::list,
        [Param::may("name", Kind::Text, "all", "only this one")]
    ),
    method!(
        "bdev_nvme_detach_controller",
        "Removes a controller's bdevs and lets go of it; guests that use them get I/O errors. Cancels an attach that is under way",
        nvme::detach,
        [
            NVME_NAME,
            Param::may("trtype", Kind::Text, "the controller's", "must be the controller's"),
            Param::may("traddr", Kind::Text, "the controller's", "must be the controller's"),
            Param::unsupported("adrfam"),
            Param::unsupported("trsvcid"),
            Param::unsupported("subnqn"),
            Param::unsupported("hostaddr"),
            Param::unsupported("hostsvcid"),
        ]
    ),
    method!(
        "bdev_nvme_reset_controller",
        "Resets a controller; requests in flight are done again",
        nvme::reset,
        [
            NVME_NAME,
            Param::may(
                "cntlid",
                Kind::Number(0xffff),
                "the controller's",
                "must be the controller's"
            ),
        ]
    ),
    method!(
        "bdev_nvme_get_controller_health_info",
        "What a controller says about its health (SMART)",
        nvme::health,
        [NVME_NAME]
    ),
    method!(
        "bdev_nvme_set_options",
        "Defaults of NVMe controllers; only before the first is attached",
        nvme::set_options,
        [
            NVME_ACTION,
            NVME_TIMEOUT,
            NVME_TIMEOUT_ADMIN,
            NVME_REQUESTS,
            Param::may(
                "enable_flush",
                Kind::Flag,
                "true",
                "accepted and ignored: flushes always reach a controller with a volatile write cache"
            ),
            Param::may(
                "generate_uuids",
                Kind::Flag,
                "true",
                "accepted and ignored: a namespace without a UUID gets one that stays the same"
            ),
            Param::fixed("delay_cmd_submit", &["true"]),
            Param::fixed("keep_alive_timeout_ms", &["10000", "0"]),
            Param::fixed("nvme_adminq_poll_period_us", &["10000", "0"]),
            Param::fixed("retry_count", &["4"]),
            Param::fixed("transport_retry_count", &["4"]),
            Param::fixed("bdev_retry_count", &["3"]),
            Param::unsupported("nvme_ioq_poll_period_us"),
            Param::unsupported("arbitration_burst"),
            Param::unsupported("low_priority_weight"),
            Param::unsupported("medium_priority_weight"),
            Param::unsupported("high_priority_weight"),
            Param::unsupported("transport_ack_timeout"),
            Param::unsupported("ctrlr_loss_timeout_sec"),
            Param::unsupported("reconnect_delay_sec"),
            Param::unsupported("fast_io_fail_timeout_sec"),
            Param::unsupported("disable_auto_failback"),
            Param::unsupported("transport_tos"),
            Param::unsupported("nvme_error_stat"),
            Param::unsupported("rdma_srq_size"),
            Param::unsupported("io_path_stat"),
            Param::unsupported("allow_accel_sequence"),
            Param::unsupported("rdma_max_cq_size"),
            Param::unsupported("rdma_cm_event_timeout_ms"),
            Param::unsupported("dhchap_digests"),
            Param::unsupported("dhchap_dhgroups"),
            Param::unsupported("rdma_umr_per_io"),
            Param::unsupported("tcp_connect_timeout_ms"),
            Param::unsupported("multipath_opts"),
        ]
    ),
    method!(
        "bdev_get_iostat",
        "I/O counters per bdev",
        iostat::iostat,
        [
            Param::may("names", Kind::Texts, "all", "only these bdevs"),
            Param::may("name", Kind::Text, "all", "only this bdev"),
            Param::may("per_channel", Kind::Flag, "false", "per reactor; needs exactly one bdev"),
            Param::may("reset_mode", RESET_WORDS, "none", "what to reset after reading"),
        ]
    ),
    method!(
        "bdev_reset_iostat",
        "Resets I/O counters",
        iostat::reset,
        [
            Param::may("name", Kind::Text, "all", "only this bdev"),
            Param::may("mode", RESET_WORDS, "all", "what to reset"),
        ]
    ),
    method!(
        "bdev_enable_histogram",
        "Starts or stops the latency histogram of a bdev",
        iostat::enable_histogram,
        [
            NAME,
            Param::must("enable", Kind::Flag, "true starts it afresh, false stops it"),
            Param::may(
                "opc",
                Kind::Word(&["read", "write", "unmap", "flush", "write_zeroes"]),
                "all",
                "only this operation",
            ),
            Param::unsupported("granularity"),
            Param::unsupported("min_nsec"),
            Param::unsupported("max_nsec"),
        ]
    ),
    method!(
        "bdev_get_histogram",
        "Latency histogram of a bdev, in SPDK's form",
        iostat::histogram,
        [NAME]
    ),
    method!(
        "bdev_get_histogram_borders",
        "How many requests took up to so many µs",
        iostat::histogram_borders,
        [NAME, Param::must("borders", Kind::Numbers, "ascending, in µs"),]
    ),
    method!(
        "vhost_create_blk_controller",
        "Shows a bdev to guests, on a socket of its own",
        vhost::create,
        [
            CTRLR,
            Param::must("dev_name", Kind::Text, "name of the bdev"),
            Param::may(
                "cpumask",
                Kind::Text,
                "all of the daemon's",
                "cores that may serve it, as 0x3 or [0,1]"
            ),
            Param::may("readonly", Kind::Flag, "false", "the guest may not write"),
            Param::may(
                "packed_ring",
                Kind::Flag,
                "false",
                "accepted and ignored: every disk offers packed rings, the guest chooses"
            ),
            Param::may("transport", Kind::Text, "vhost_user_blk", "the only one there is"),
            Param::may(
                "serial",
                Kind::Text,
                "the bdev's name",
                "serial number the guest sees, up to 20 characters"
            ),
            Param::may(
                "num_queues",
                Kind::Number(QUEUES_MAX),
                "the daemon's default",
                "most queues offered to the guest"
            ),
            Param::may("pin", Kind::Word(&PinMode::NAMES), "auto", "pin guest memory"),
        ]
    ),
    method!(
        "vhost_delete_controller",
        "Takes a disk away from its guest, draining it first",
        vhost::delete,
        [CTRLR]
    ),
    method!(
        "vhost_controller_set_cpumask",
        "Moves a disk's queues, or one of them, to other cores while its guest goes on",
        vhost::set_cpumask,
        [
            CTRLR,
            Param::must("cpumask", Kind::Text, "cores that may serve it, as 0x3 or [0,1]"),
            Param::may("queue", Kind::Number(QUEUES_MAX - 1), "all of them", "only this queue"),
        ]
    ),
    method!(
        "vhost_controller_set_coalescing",
        "Holds back interrupts at high rates",
        vhost::set_coalescing,
        [
            CTRLR,
            Param::must(
                "delay_base_us",
                Kind::Number(U32),
                "delay at twice the threshold, two of it at three times, and so on up to 10 ms; 0: off"
            ),
            Param::must(
                "iops_threshold",
                Kind::Number(U32),
                "requests per second of one queue from which interrupts are held back"
            ),
        ]
    ),
    method!(
        "vhost_get_controllers",
        "Controllers, their guests and queues",
        vhost::list,
        [Param::may("name", Kind::Text, "all", "only this one"),]
    ),
    method!(
        "latency_get_histograms",
        "Latencies per controller, queue, operation and stage",
        latency::get,
        [LATENCY_CTRLR, LATENCY_BDEV,]
    ),
    method!(
        "latency_reset_histograms",
        "Starts latencies afresh",
        latency::reset,
        [LATENCY_CTRLR, LATENCY_BDEV]
    ),
    method!(
        "latency_set_recording",
        "Records counters and latencies of requests, or leaves them out",
        latency::set_recording,
        [
            Param::must("enable", Kind::Flag, "false: counters and latencies stand still"),
            LATENCY_CTRLR,
            LATENCY_BDEV
        ]
    ),
];
