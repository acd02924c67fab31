//! Methods about vhost-user-blk controllers.

use serde_json::Value;

use super::{
    bdev::check_name,
    cpumask,
    engine::{ControllerSpec, EngineError, PinMode},
    error::RpcError,
    methods::Call,
    record::{Change, Entry},
    server::Reply,
    show,
};

/// What a guest can read of a serial number (virtio 1.2 §5.2.6: VIRTIO_BLK_T_GET_ID).
const SERIAL_BYTES_MAX: usize = 20;
const SUBSYSTEM: &str = "vhost_blk";

pub(super) fn create(call: Call<'_>) -> Result<Reply, RpcError> {
    let params = &call.params;
    let name = params.text_required("ctrlr").to_owned();
    check_name("ctrlr", &name)?;
    if name.contains('/') || name == "." || name == ".." {
        return Err(RpcError::params(format!(
            "\"ctrlr\" = \"{name}\" also names the socket in the socket directory, so it cannot be a path"
        )));
    }
    let bdev = params.text_required("dev_name").to_owned();
    let cores = match params.text("cpumask") {
        None => None,
        Some(mask) => Some(
            cpumask::parse(mask)
                .map_err(|reason| RpcError::params(format!("\"cpumask\": {reason}")))?,
        ),
    };
    if let Some(transport) =
        params.text("transport").filter(|t| !t.eq_ignore_ascii_case("vhost_user_blk"))
    {
        return Err(RpcError::params(format!(
            "\"transport\" = \"{transport}\"; ringmill has vhost_user_blk only: leave it out"
        )));
    }
    let serial = params.text("serial").map(str::to_owned);
    if let Some(serial) = serial.as_ref().filter(|s| s.len() > SERIAL_BYTES_MAX || !s.is_ascii()) {
        return Err(RpcError::params(format!(
            "\"serial\" = \"{serial}\"; a guest sees at most {SERIAL_BYTES_MAX} ASCII characters"
        )));
    }
    if params.number("num_queues") == Some(0) {
        return Err(RpcError::params("\"num_queues\" = 0; a disk has at least one queue"));
    }
    let spec = ControllerSpec {
        name: name.clone(),
        bdev,
        cores,
        readonly: params.flag("readonly"),
        serial,
        queues_max: params.number_as("num_queues"),
        pin: params.text("pin").and_then(PinMode::from_name).unwrap_or_default(),
    };
    let entry = Entry {
        subsystem: SUBSYSTEM,
        object: name,
        method: "vhost_create_blk_controller",
        params: params.clone().into_map(),
    };
    let started = call.engine.create_controller(spec, call.token).map_err(|error| match error {
        // Clients know -19 here as "the controller", not as "the disk it asks for".
        EngineError::NoBdev(_) => EngineError::Refused(error.to_string()),
        other => other,
    });
    call.conclude(started, Value::Bool(true), vec![Change::Put(entry)])
}

pub(super) fn delete(call: Call<'_>) -> Result<Reply, RpcError> {
    let name = call.params.text_required("ctrlr").to_owned();
    let started = call.engine.delete_controller(&name, call.token);
    call.conclude(
        started,
        Value::Bool(true),
        vec![Change::Remove { subsystem: SUBSYSTEM, object: name }],
    )
}

pub(super) fn set_cpumask(call: Call<'_>) -> Result<Reply, RpcError> {
    let name = call.params.text_required("ctrlr").to_owned();
    let cores = cpumask::parse(call.params.text_required("cpumask"))
        .map_err(|reason| RpcError::params(format!("\"cpumask\": {reason}")))?;
    let queue = call.params.number_as("queue");
    let started = call.engine.place_controller(&name, &cores, queue, call.token);
    let method = "vhost_controller_set_cpumask";
    let entry = Entry {
        subsystem: SUBSYSTEM,
        object: name.clone(),
        method,
        params: call.params.clone().into_map(),
    };
    let mut changes = Vec::new();
    if queue.is_none() {
        changes.push(Change::Forget { subsystem: SUBSYSTEM, object: name, method });
    }
    changes.push(Change::Put(entry));
    call.conclude(started, Value::Bool(true), changes)
}

pub(super) fn set_coalescing(call: Call<'_>) -> Result<Reply, RpcError> {
    let name = call.params.text_required("ctrlr").to_owned();
    let delay_base_us = call.params.number_as("delay_base_us").unwrap_or(0);
    let iops_threshold = call.params.number_as("iops_threshold").unwrap_or(0);
    let set = call.engine.set_coalescing(&name, delay_base_us, iops_threshold);
    let entry = Entry {
        subsystem: SUBSYSTEM,
        object: name,
        method: "vhost_controller_set_coalescing",
        params: call.params.clone().into_map(),
    };
    call.conclude_now(set, vec![Change::Put(entry)])
}

pub(super) fn list(call: Call<'_>) -> Result<Reply, RpcError> {
    let controllers = call.engine.controllers();
    let Some(name) = call.params.text("name") else {
        return Ok(Reply::Now(controllers.iter().map(show::controller).collect()));
    };
    match controllers.iter().find(|controller| controller.name == name) {
        Some(controller) => Ok(Reply::Now(Value::Array(vec![show::controller(controller)]))),
        None => Err(EngineError::NoController(name.to_owned()).into()),
    }
}
