//! How bdevs, controllers, reactors and threads look in results. Field names are SPDK's; ringmill's own come after.

use serde_json::{Map, Value, json};

use super::{
    cpumask,
    engine::{BdevInfo, ControllerInfo, PollerInfo, QueueInfo, ReactorInfo, SessionInfo},
    nvme,
};

/// Operations that clients look for and ringmill's bdevs do not have.
const NEVER: [&str; 14] = [
    "nvme_admin",
    "nvme_io",
    "nvme_io_md",
    "zcopy",
    "get_zone_info",
    "zone_management",
    "zone_append",
    "compare",
    "compare_and_write",
    "abort",
    "seek_hole",
    "seek_data",
    "copy",
    "nvme_iov_md",
];

pub(super) fn bdev(info: &BdevInfo) -> Value {
    let io = info.io_types;
    let mut io_types = Map::new();
    for (name, supported) in [
        ("read", io.read),
        ("write", io.write),
        ("unmap", io.unmap),
        ("flush", io.flush),
        ("reset", io.reset),
        ("write_zeroes", io.write_zeroes),
    ] {
        io_types.insert(name.to_owned(), supported.into());
    }
    for name in NEVER {
        io_types.insert(name.to_owned(), false.into());
    }
    let mut driver_specific = match (&info.image, &info.nvme) {
        (None, None) => json!({}),
        (_, Some(nvme)) => nvme::show::driver_specific(nvme),
        (Some(image), None) => json!({ "uring": {
            "filename": image.path.to_string_lossy(),
            "cache": image.cache.name(),
            "lock": image.lock,
            "readonly": image.readonly,
            "align_bytes": image.align_bytes,
        }}),
    };
    if let Some(fields) = driver_specific.as_object_mut().filter(|_| !info.facts.is_empty()) {
        let facts = info.facts.iter().map(|(name, value)| ((*name).to_owned(), fact(value)));
        fields.insert("facts".to_owned(), facts.collect());
    }
    json!({
        "name": info.name,
        "aliases": [info.uuid.to_string()],
        "product_name": info.kind.product_name(),
        "block_size": info.block_size,
        "num_blocks": info.blocks_count,
        "uuid": info.uuid.to_string(),
        "assigned_rate_limits": {
            "rw_ios_per_sec": 0,
            "rw_mbytes_per_sec": 0,
            "r_mbytes_per_sec": 0,
            "w_mbytes_per_sec": 0,
        },
        "claimed": info.is_claimed,
        "zoned": false,
        "supported_io_types": io_types,
        "driver_specific": driver_specific,
    })
}

/// Numbers as numbers.
fn fact(value: &str) -> Value {
    value.parse::<u64>().map_or_else(|_| value.into(), Value::from)
}

pub(super) fn controller(info: &ControllerInfo) -> Value {
    json!({
        "ctrlr": info.name,
        "cpumask": cpumask::format(&info.cores),
        "delay_base_us": info.delay_base_us,
        "iops_threshold": info.iops_threshold,
        "socket": info.socket.to_string_lossy(),
        "sessions": info.sessions.iter().map(|s| session(info, s)).collect::<Value>(),
        "backend_specific": {
            "block": {
                "readonly": info.readonly,
                "bdev": info.bdev,
                "transport": "vhost_user_blk",
                "serial": info.serial,
            },
        },
        "state": info.state,
        "pin": info.pin_state,
    })
}

fn session(controller: &ControllerInfo, info: &SessionInfo) -> Value {
    json!({
        "vid": info.id,
        "id": info.id,
        "name": format!("{}s{}", controller.name, info.id),
        "started": info.is_started,
        "max_queues": info.queues_max,
        "inflight_task_cnt": info.queues.iter().map(|queue| u64::from(queue.inflight_count)).sum::<u64>(),
        "features": info.features,
        "queues": info.queues.iter().map(queue).collect::<Value>(),
    })
}

fn queue(info: &QueueInfo) -> Value {
    json!({
        "index": info.index,
        "size": info.size,
        "lcore": info.core,
        "device_lcore": info.device_core,
        "avail_index": info.avail_index,
        "used_index": info.used_index,
        "inflight": info.inflight_count,
        "oldest_ns": info.oldest_ns,
        "stuck": info.stuck_count,
    })
}

pub(super) fn reactor(info: &ReactorInfo) -> Value {
    let thread = &info.thread;
    json!({
        "lcore": info.core,
        "tid": info.tid,
        "busy": info.busy_ticks,
        "idle": info.idle_ticks,
        "in_interrupt": info.is_sleeping,
        "bounces": info.bounces_count,
        "irq": info.irq,
        "sys": info.sys,
        "usr": info.usr,
        "lw_threads": [{
            "name": thread.name,
            "id": thread.id,
            "cpumask": cpumask::format(&thread.cores),
            "elapsed": thread.elapsed_ticks,
        }],
    })
}

pub(super) fn thread(info: &ReactorInfo) -> Value {
    let thread = &info.thread;
    let timed_count = thread.pollers.iter().filter(|poller| poller.period_ticks.is_some()).count();
    let paused_count = thread.pollers.iter().filter(|poller| is_paused(poller)).count();
    json!({
        "name": thread.name,
        "id": thread.id,
        "cpumask": cpumask::format(&thread.cores),
        "busy": info.busy_ticks,
        "idle": info.idle_ticks,
        "active_pollers_count": thread.pollers.len() - timed_count - paused_count,
        "timed_pollers_count": timed_count,
        "paused_pollers_count": paused_count,
    })
}

pub(super) fn pollers(info: &ReactorInfo) -> Value {
    let thread = &info.thread;
    let (timed, untimed): (Vec<&PollerInfo>, Vec<&PollerInfo>) =
        thread.pollers.iter().partition(|poller| poller.period_ticks.is_some());
    let (paused, active): (Vec<&PollerInfo>, Vec<&PollerInfo>) =
        untimed.into_iter().partition(|poller| is_paused(poller));
    json!({
        "name": thread.name,
        "id": thread.id,
        "active_pollers": active.into_iter().map(poller).collect::<Value>(),
        "timed_pollers": timed.into_iter().map(poller).collect::<Value>(),
        "paused_pollers": paused.into_iter().map(poller).collect::<Value>(),
    })
}

/// Parked: its queue is idle, and a kick brings it back.
fn is_paused(poller: &PollerInfo) -> bool {
    poller.state == "paused"
}

fn poller(info: &PollerInfo) -> Value {
    let mut shown = json!({
        "name": info.name,
        "id": info.id,
        "state": info.state,
        "run_count": info.run_count,
        "busy_count": info.busy_count,
    });
    if let (Some(period), Value::Object(fields)) = (info.period_ticks, &mut shown) {
        fields.insert("period_ticks".to_owned(), period.into());
    }
    shown
}
