//! The engine's objects as the RPC's plain data.

use std::time::Instant;

use ringmill_core::io::IoOp;
use ringmill_core::reactor::{ReactorHandle, ns_to_ticks, tick_rate};
use ringmill_core::spec::{virtio_blk as blk, virtio_ring as ring};
use ringmill_drivers::uring::{self, UringOptions};
use ringmill_vmm_glue::blk::{Controller, ControllerState, PinView};

use super::engine::Disk;
use crate::rpc::cpumask;
use crate::rpc::engine::{
    BackendSpec, BdevInfo, BdevSpec, CacheMode, ControllerInfo, EngineError, IoTypes, PollerInfo,
    QueueInfo, ReactorInfo, SessionInfo, ThreadInfo,
};
use crate::rpc::nvme::NvmeBdevInfo;

const FEATURE_NAMES: [(u64, &str); 15] = [
    (blk::F_SIZE_MAX, "VIRTIO_BLK_F_SIZE_MAX"),
    (blk::F_SEG_MAX, "VIRTIO_BLK_F_SEG_MAX"),
    (blk::F_RO, "VIRTIO_BLK_F_RO"),
    (blk::F_BLK_SIZE, "VIRTIO_BLK_F_BLK_SIZE"),
    (blk::F_FLUSH, "VIRTIO_BLK_F_FLUSH"),
    (blk::F_TOPOLOGY, "VIRTIO_BLK_F_TOPOLOGY"),
    (blk::F_CONFIG_WCE, "VIRTIO_BLK_F_CONFIG_WCE"),
    (blk::F_MQ, "VIRTIO_BLK_F_MQ"),
    (blk::F_DISCARD, "VIRTIO_BLK_F_DISCARD"),
    (blk::F_WRITE_ZEROES, "VIRTIO_BLK_F_WRITE_ZEROES"),
    (ring::F_INDIRECT_DESC, "VIRTIO_RING_F_INDIRECT_DESC"),
    (ring::F_EVENT_IDX, "VIRTIO_RING_F_EVENT_IDX"),
    (ring::F_VERSION_1, "VIRTIO_F_VERSION_1"),
    (ring::F_RING_PACKED, "VIRTIO_F_RING_PACKED"),
    (1 << 26, "VHOST_F_LOG_ALL"),
];

/// The driver's word for a cache mode, in the RPC's.
pub(super) fn cache_mode(mode: uring::CacheMode) -> CacheMode {
    match mode {
        uring::CacheMode::None => CacheMode::None,
        uring::CacheMode::WriteBack => CacheMode::Writeback,
        uring::CacheMode::WriteThrough => CacheMode::Writethrough,
    }
}

/// An operation by the name that clients use.
pub(super) fn io_op(text: &str) -> Option<IoOp> {
    match text {
        "unmap" => Some(IoOp::Discard),
        _ => IoOp::ALL.into_iter().find(|op| op.name() == text),
    }
}

/// A bdev.
pub(super) fn bdev_info(disk: &Disk, is_claimed: bool, nvme: Option<NvmeBdevInfo>) -> BdevInfo {
    let info = disk.bdev.info();
    let geometry = info.geometry();
    let writes = !geometry.read_only;
    BdevInfo {
        name: disk.name.clone(),
        kind: disk.kind,
        uuid: info.uuid(),
        block_size: geometry.block_bytes,
        blocks_count: info.blocks_count(),
        is_claimed,
        io_types: IoTypes {
            read: true,
            write: writes,
            unmap: writes && geometry.discard,
            flush: true,
            write_zeroes: writes && geometry.write_zeroes,
            reset: false,
        },
        image: disk.image.clone(),
        nvme,
        facts: disk.bdev.driver_facts(),
    }
}

/// The reactors of a cpumask.
pub(super) fn choose_reactors(
    all: &[ReactorHandle],
    cores: Option<&[u32]>,
) -> Result<Vec<ReactorHandle>, EngineError> {
    let Some(cores) = cores else { return Ok(all.to_vec()) };
    let has = |core: u32| all.iter().find(|r| r.core().is_some_and(|c| c.0 == core));
    let own: Vec<u32> = all.iter().filter_map(|r| r.core().map(|c| c.0)).collect();
    cores
        .iter()
        .map(|&core| {
            has(core).cloned().ok_or_else(|| {
                EngineError::Refused(format!(
                    "cpumask {}: core {core} is not one of the daemon's cores {}",
                    cpumask::format(cores),
                    cpumask::format(&own)
                ))
            })
        })
        .collect()
}

/// The controller's pinning in a word: what is worst over its front-ends.
fn pin_state<'a>(wanted: bool, sessions: impl Iterator<Item = &'a PinView>) -> String {
    if !wanted {
        return "off".to_owned();
    }
    let sessions: Vec<&PinView> = sessions.collect();
    let refusal = sessions.iter().find_map(|pin| match pin {
        PinView::Refused(reason) => Some(format!("refused: {reason}")),
        _ => None,
    });
    // Without a front-end there is nothing to pin yet.
    let on = sessions.contains(&&PinView::On) && !sessions.contains(&&PinView::Pinning);
    refusal.unwrap_or_else(|| if on { "on" } else { "pinning" }.to_owned())
}

/// A controller with its sessions.
pub(super) fn controller_info(controller: &Controller) -> ControllerInfo {
    let spec = controller.spec();
    let views = controller.sessions();
    let pin_state = pin_state(spec.pin, views.iter().map(|session| &session.pin));
    let sessions: Vec<SessionInfo> = views
        .into_iter()
        .map(|session| SessionInfo {
            id: session.vid,
            is_started: session.active && !session.queues.is_empty(),
            queues_max: spec.queues_max,
            features: FEATURE_NAMES
                .iter()
                .filter(|(bit, _)| session.features & bit != 0)
                .map(|(_, name)| *name)
                .collect(),
            queues: session
                .queues
                .iter()
                .map(|queue| {
                    let (avail, used) = queue.status.indices();
                    let inflight_count = queue.status.inflight_count();
                    QueueInfo {
                        index: queue.index,
                        size: queue.size,
                        core: queue.core,
                        device_core: queue.device_core,
                        avail_index: u16::try_from(avail & 0xffff).unwrap_or(0),
                        used_index: u16::try_from(used & 0xffff).unwrap_or(0),
                        inflight_count,
                        oldest_ns: queue.oldest_age_ns.filter(|_| inflight_count > 0),
                        stuck_count: u32::try_from(queue.stuck_count).unwrap_or(u32::MAX),
                    }
                })
                .collect(),
        })
        .collect();
    let state = match controller.state() {
        ControllerState::Draining | ControllerState::Deleted => "draining",
        ControllerState::Active if sessions.iter().any(|s| s.is_started) => "running",
        ControllerState::Active if !sessions.is_empty() => "connected",
        ControllerState::Active => "listening",
    };
    let (delay_base_us, iops_threshold) = controller.device().coalesce().get();
    ControllerInfo {
        name: spec.name.clone(),
        bdev: controller.bdev().map(|b| b.info().name().to_owned()),
        cores: controller.cores(),
        socket: spec.socket.clone(),
        readonly: controller.device().read_only(),
        serial: spec.serial.clone().unwrap_or_else(|| spec.bdev.clone()),
        delay_base_us,
        iops_threshold,
        state,
        pin_state,
        sessions,
    }
}

/// A reactor with its thread and pollers.
pub(super) fn reactor_info(number: u64, reactor: &ReactorHandle, started: Instant) -> ReactorInfo {
    let core = reactor.core().map_or(0, |c| c.0);
    let stats = reactor.stats();
    let (usr, sys, irq) = cpu_times(core);
    let poller = |p: ringmill_core::reactor::PollerInfo| PollerInfo {
        id: p.id.number(),
        state: if p.counters.is_parked() { "paused" } else { "waiting" },
        run_count: p.counters.runs(),
        busy_count: p.counters.busy_runs(),
        period_ticks: (p.period_ns > 0).then(|| ns_to_ticks(p.period_ns)),
        name: p.name,
    };
    let elapsed = started.elapsed().as_secs_f64() * 1e6;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "microseconds since start fit"
    )]
    let elapsed_ticks = (elapsed as u64).saturating_mul(tick_rate() / 1_000_000);
    ReactorInfo {
        core,
        tid: reactor.tid(),
        busy_ticks: stats.busy_ticks,
        idle_ticks: stats.idle_ticks,
        is_sleeping: reactor.is_sleeping(),
        bounces_count: stats.bounces_count,
        usr,
        sys,
        irq,
        thread: ThreadInfo {
            name: format!("reactor_{core}"),
            id: number,
            cores: vec![core],
            elapsed_ticks,
            pollers: reactor.pollers().into_iter().map(poller).collect(),
        },
    }
}

/// User, system and interrupt time of a core in clock ticks, from /proc/stat; zeroes where it cannot be read.
fn cpu_times(core: u32) -> (u64, u64, u64) {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let name = format!("cpu{core}");
    let line =
        text.lines().find(|line| line.split_whitespace().next() == Some(&name)).unwrap_or_default();
    let fields: Vec<u64> =
        line.split_whitespace().skip(1).map(|f| f.parse().unwrap_or(0)).collect();
    let field = |at: usize| fields.get(at).copied().unwrap_or(0);
    (field(0) + field(1), field(2), field(5) + field(6))
}

/// How a file or block device is opened; `None` for other kinds.
pub(super) fn image_options(spec: &BdevSpec) -> Option<UringOptions> {
    let BackendSpec::Uring {
        path,
        block_size,
        readonly,
        cache,
        iopoll,
        ring_only,
        raw_is_explicit,
    } = &spec.backend
    else {
        return None;
    };
    Some(UringOptions {
        filename: path.clone(),
        block_bytes: *block_size,
        cache: match cache {
            CacheMode::None => uring::CacheMode::None,
            CacheMode::Writeback => uring::CacheMode::WriteBack,
            CacheMode::Writethrough => uring::CacheMode::WriteThrough,
        },
        read_only: *readonly,
        format_raw: *raw_is_explicit,
        iopoll: *iopoll,
        ring_only: *ring_only,
        uuid: Some(spec.uuid),
    })
}
