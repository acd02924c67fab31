//! Methods that list, make, remove and resize bdevs.

use std::{path::PathBuf, time::Duration};

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{
    engine::{BackendSpec, BdevKind, BdevSpec, CacheMode, EngineError, Resize},
    error::RpcError,
    methods::Call,
    record::{Change, Entry},
    server::Reply,
    show,
};

/// Longest name: it must also fit file names and log lines.
const NAME_BYTES_MAX: usize = 255;
/// Largest disk: byte offsets stay positive `i64` (off_t).
const DISK_BYTES_MAX: u64 = 1 << 62;
const MIB: u64 = 1 << 20;

pub(super) fn list(call: Call<'_>) -> Result<Reply, RpcError> {
    let bdevs = call.engine.bdevs();
    let Some(name) = call.params.text("name") else {
        return Ok(Reply::Now(bdevs.iter().map(show::bdev).collect()));
    };
    if let Some(bdev) = bdevs.iter().find(|bdev| bdev.name == name || bdev.uuid.to_string() == name)
    {
        return Ok(Reply::Now(Value::Array(vec![show::bdev(bdev)])));
    }
    match call.params.number("timeout") {
        None | Some(0) => Err(EngineError::NoBdev(name.to_owned()).into()),
        Some(timeout_ms) => {
            call.state.wait_for_bdev(call.token, name, Duration::from_millis(timeout_ms));
            Ok(Reply::Deferred)
        }
    }
}

pub(super) fn create_null(call: Call<'_>) -> Result<Reply, RpcError> {
    let (block_size, blocks_count) = geometry(&call)?;
    create(call, "bdev_null_create", BackendSpec::Null { block_size, blocks_count })
}

pub(super) fn create_malloc(call: Call<'_>) -> Result<Reply, RpcError> {
    let (block_size, blocks_count) = geometry(&call)?;
    create(call, "bdev_malloc_create", BackendSpec::Malloc { block_size, blocks_count })
}

pub(super) fn create_uring(call: Call<'_>) -> Result<Reply, RpcError> {
    create_image(call, "bdev_uring_create")
}

pub(super) fn create_aio(call: Call<'_>) -> Result<Reply, RpcError> {
    create_image(call, "bdev_aio_create")
}

fn create_image(call: Call<'_>, method: &'static str) -> Result<Reply, RpcError> {
    let block_size = match call.params.number("block_size") {
        // SPDK's aio client sends 0 for "what the device wants".
        None | Some(0) => None,
        Some(_) => Some(block_size(&call)?),
    };
    let backend = BackendSpec::Uring {
        path: PathBuf::from(call.params.text_required("filename")),
        block_size,
        readonly: call.params.flag("readonly"),
        cache: call.params.text("cache").and_then(CacheMode::from_name).unwrap_or_default(),
        iopoll: call.params.flag("iopoll"),
        ring_only: call.params.text("transfers") == Some("ring"),
        raw_is_explicit: call.params.text("format").is_some(),
    };
    create(call, method, backend)
}

pub(super) fn delete_null(call: Call<'_>) -> Result<Reply, RpcError> {
    delete(call, BdevKind::Null)
}

pub(super) fn delete_malloc(call: Call<'_>) -> Result<Reply, RpcError> {
    delete(call, BdevKind::Malloc)
}

pub(super) fn delete_uring(call: Call<'_>) -> Result<Reply, RpcError> {
    delete(call, BdevKind::Uring)
}

pub(super) fn resize_null(call: Call<'_>) -> Result<Reply, RpcError> {
    let name = call.params.text_required("name").to_owned();
    let block_size = of_kind(&call, &name, BdevKind::Null)?;
    let new_size_mib = call.params.number("new_size").unwrap_or(0);
    let size_bytes =
        new_size_mib.checked_mul(MIB).filter(|size| (1..=DISK_BYTES_MAX).contains(size));
    let Some(size_bytes) = size_bytes else {
        return Err(RpcError::params(format!(
            "\"new_size\" = {new_size_mib} MiB; a disk has at least 1 and at most {} MiB",
            DISK_BYTES_MAX / MIB
        )));
    };
    let started = call.engine.resize_bdev(&name, Resize::ToBytes(size_bytes), call.token);
    let change = Change::Set {
        subsystem: "bdev",
        object: name,
        name: "num_blocks",
        value: (size_bytes / u64::from(block_size.max(1))).into(),
    };
    call.conclude(started, Value::Bool(true), vec![change])
}

pub(super) fn rescan_uring(call: Call<'_>) -> Result<Reply, RpcError> {
    let name = call.params.text_required("name").to_owned();
    of_kind(&call, &name, BdevKind::Uring)?;
    let started = call.engine.resize_bdev(&name, Resize::Rescan, call.token);
    call.conclude(started, Value::Bool(true), Vec::new())
}

fn create(call: Call<'_>, method: &'static str, backend: BackendSpec) -> Result<Reply, RpcError> {
    let name = match call.params.text("name") {
        Some(name) => name.to_owned(),
        None => free_name(&call, "Malloc"),
    };
    check_name("name", &name)?;
    let uuid = match call.params.text("uuid") {
        None => Uuid::new_v4(),
        Some(text) => Uuid::parse_str(text).map_err(|_| {
            RpcError::params(format!(
                "\"uuid\" = \"{text}\" is not a UUID; write it as 6f1f3e7c-1b0a-4f0e-9c51-2a7d7c4b9e10, or leave it out"
            ))
        })?,
    };
    // The record names what was made up here, so that loading it makes the very same disk.
    let mut params: Map<String, Value> = call.params.clone().into_map();
    params.insert("name".to_owned(), name.clone().into());
    params.insert("uuid".to_owned(), uuid.to_string().into());
    let entry = Entry { subsystem: "bdev", object: name.clone(), method, params };
    let device_queues = call.params.number("queues").unwrap_or(0);
    let device_queues = u16::try_from(device_queues).unwrap_or(u16::MAX);
    let spec = BdevSpec { name: name.clone(), uuid, backend, device_queues };
    let started = call.engine.create_bdev(spec, call.token);
    call.conclude(started, Value::String(name), vec![Change::Put(entry)])
}

fn delete(call: Call<'_>, kind: BdevKind) -> Result<Reply, RpcError> {
    let name = call.params.text_required("name").to_owned();
    of_kind(&call, &name, kind)?;
    let started = call.engine.delete_bdev(&name, call.token);
    call.conclude(
        started,
        Value::Bool(true),
        vec![Change::Remove { subsystem: "bdev", object: name }],
    )
}

/// The block size of a bdev, provided that it is of this kind.
fn of_kind(call: &Call<'_>, name: &str, kind: BdevKind) -> Result<u32, RpcError> {
    let Some(bdev) = call.engine.bdevs().into_iter().find(|bdev| bdev.name == name) else {
        return Err(EngineError::NoBdev(name.to_owned()).into());
    };
    if bdev.kind == BdevKind::Nvme {
        return Err(RpcError::errno(
            libc::ENODEV,
            format!(
                "bdev \"{name}\" is a namespace and goes with its controller: bdev_nvme_detach_controller removes all of the controller's"
            ),
        ));
    }
    if bdev.kind != kind {
        return Err(RpcError::errno(
            libc::ENODEV,
            format!(
                "bdev \"{name}\" is a \"{}\", not a \"{}\"; {} deletes it",
                bdev.kind.product_name(),
                kind.product_name(),
                bdev.kind.delete_method()
            ),
        ));
    }
    Ok(bdev.block_size)
}

fn geometry(call: &Call<'_>) -> Result<(u32, u64), RpcError> {
    let block_size = block_size(call)?;
    let blocks_count = call.params.number("num_blocks").unwrap_or(0);
    let size_bytes = blocks_count.checked_mul(u64::from(block_size));
    if size_bytes.is_none_or(|size| size == 0 || size > DISK_BYTES_MAX) {
        return Err(RpcError::params(format!(
            "\"num_blocks\" = {blocks_count} of {block_size} bytes; a disk has at least 1 and at most {} blocks",
            DISK_BYTES_MAX / u64::from(block_size)
        )));
    }
    Ok((block_size, blocks_count))
}

fn block_size(call: &Call<'_>) -> Result<u32, RpcError> {
    match call.params.number("block_size").unwrap_or(512) {
        512 => Ok(512),
        4096 => Ok(4096),
        other => Err(RpcError::params(format!(
            "\"block_size\" = {other}; a block has 512 or 4096 bytes"
        ))),
    }
}

/// Names appear in sockets, logs and tables.
pub(super) fn check_name(what: &str, name: &str) -> Result<(), RpcError> {
    let is_fine =
        !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.chars().any(char::is_control);
    if is_fine {
        return Ok(());
    }
    Err(RpcError::params(format!(
        "\"{what}\" = {}; a name has 1 to {NAME_BYTES_MAX} bytes and no control characters",
        json!(name.chars().take(64).collect::<String>())
    )))
}

fn free_name(call: &Call<'_>, stem: &str) -> String {
    let bdevs = call.engine.bdevs();
    let mut number = 0_usize;
    loop {
        let name = format!("{stem}{number}");
        if bdevs.iter().all(|bdev| bdev.name != name) {
            return name;
        }
        number += 1;
    }
}
