//! How NVMe controllers look in results. Field names are SPDK's; ringmill's own come after.

use ringmill_drivers::nvme::{ControllerInfo, ControllerState, NamespaceInfo};
use serde_json::{Value, json};

use super::types::{NvmeBdevInfo, NvmeHealth, NvmeTransport, NvmeView};

/// Kelvin of 0 °C, as integers have it.
const FREEZING_KELVIN: i64 = 273;

fn trid(transport: NvmeTransport, address: &str) -> Value {
    json!({ "trtype": transport.name(), "traddr": address })
}

/// `1.4` for `1.4.0`: clients know versions without a third part of zero.
fn version(text: &str) -> &str {
    match text.matches('.').count() {
        2 => text.strip_suffix(".0").unwrap_or(text),
        _ => text,
    }
}

fn state(view: &NvmeView) -> &'static str {
    match &view.info {
        _ if view.is_detaching => "deleting",
        None => "attaching",
        Some(info) => match info.state {
            ControllerState::Enabled => "enabled",
            ControllerState::Resetting => "resetting",
            ControllerState::Failed => "failed",
            ControllerState::Removed | ControllerState::Detached => "deleting",
        },
    }
}

/// One entry of `bdev_nvme_get_controllers`.
pub(super) fn controller(view: &NvmeView) -> Value {
    let info = view.info.as_ref();
    let mut shown = json!({
        "state": state(view),
        "trid": trid(view.transport, &view.address),
        "cntlid": info.map_or(0, |info| info.cntlid),
        // NVMe-oF's; a controller on a bus has no host by name.
        "host": { "nqn": "", "addr": "", "svcid": "" },
    });
    if let (Some(info), Some(fields)) = (info, shown.as_object_mut()) {
        fields.extend(details(info));
        let spaces = view.namespaces.iter().map(namespace);
        fields.insert("namespaces".to_owned(), spaces.collect());
    }
    json!({ "name": view.name, "ctrlrs": [shown] })
}

fn details(info: &ControllerInfo) -> serde_json::Map<String, Value> {
    let counters = &info.counters;
    let shown = json!({
        "model_number": info.model,
        "serial_number": info.serial,
        "firmware_revision": info.firmware,
        "vendor_id": format!("{:#06x}", info.vendor),
        "device_id": format!("{:#06x}", info.device),
        "nvme_version": version(&info.version),
        "io_queues": info.queue_pairs,
        "io_queues_granted": info.queue_pairs_granted,
        "io_queue_size": info.queue_entries,
        "io_queue_size_max": info.queue_entries_max,
        "interrupt_vectors": info.vectors,
        "transfer_bytes_max": info.transfer_bytes_max,
        "sgl": info.sgl,
        "volatile_write_cache": info.write_cache,
        "shadow_doorbells": info.shadow_doorbells,
        "quirks": info.quirks,
        "counters": {
            "timeouts": counters.timeouts,
            "late_answers": counters.late_answers,
            "aborts": counters.aborts,
            "aborts_done": counters.aborts_done,
            "resets": counters.resets,
            "resets_failed": counters.resets_failed,
            "stale_completions": counters.stale,
            "retries": counters.retries,
            "events": counters.events,
        },
        "last_error": info.last_error,
    });
    shown.as_object().cloned().unwrap_or_default()
}

fn namespace(info: &NamespaceInfo) -> Value {
    json!({
        "nsid": info.nsid,
        "bdev": if info.refused.is_none() { Some(&info.bdev_name) } else { None },
        "num_blocks": info.blocks_count,
        "block_size": info.block_bytes,
        "uuid": info.uuid.to_string(),
        "nguid": info.nguid,
        "eui64": info.eui64,
        "readonly": info.read_only,
        "refused": info.refused,
    })
}

/// `driver_specific` of a namespace's bdev.
pub(in crate::rpc) fn driver_specific(info: &NvmeBdevInfo) -> Value {
    let controller = &info.controller;
    let mut shown = json!({
        "trid": trid(info.transport, &info.address),
        "ctrlr_data": {
            "cntlid": controller.cntlid,
            "vendor_id": format!("{:#06x}", controller.vendor),
            "model_number": controller.model,
            "serial_number": controller.serial,
            "firmware_revision": controller.firmware,
        },
        "vs": { "nvme_version": version(&controller.version) },
        "ns_data": { "id": info.nsid },
    });
    if let (NvmeTransport::Pcie, Some(fields)) = (info.transport, shown.as_object_mut()) {
        fields.insert("pci_address".to_owned(), info.address.clone().into());
    }
    json!({ "nvme": [shown], "mp_policy": "active_passive" })
}

/// Health as clients know it. Counters of 128 bits end at the largest number that JSON readers take.
pub(in crate::rpc) fn health(shown: &NvmeHealth) -> Value {
    let (health, info) = (&shown.health, &shown.controller);
    let big = |number: u128| u64::try_from(number).unwrap_or(u64::MAX);
    json!({
        "model_number": info.model,
        "serial_number": info.serial,
        "firmware_revision": info.firmware,
        "traddr": shown.address,
        "critical_warning": health.critical_warning,
        "temperature_celsius": i64::from(health.temperature_kelvin) - FREEZING_KELVIN,
        "available_spare_percentage": health.available_spare,
        "available_spare_threshold_percentage": health.available_spare_threshold,
        "percentage_used": health.percentage_used,
        "data_units_read": big(health.data_units_read),
        "data_units_written": big(health.data_units_written),
        "host_read_commands": big(health.host_read_commands),
        "host_write_commands": big(health.host_write_commands),
        "controller_busy_time": big(health.busy_minutes),
        "power_cycles": big(health.power_cycles),
        "power_on_hours": big(health.power_on_hours),
        "unsafe_shutdowns": big(health.unsafe_shutdowns),
        "media_errors": big(health.media_errors),
        "num_err_log_entries": big(health.error_log_entries),
        "warning_temperature_time_minutes": health.warning_temperature_minutes,
        "critical_composite_temperature_time_minutes": health.critical_temperature_minutes,
        "age_seconds": health.age.as_secs(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_written_as_clients_know_them() {
        assert_eq!(
            ["1.4.0", "1.4.2", "2.0", "1.0", ""].map(version),
            ["1.4", "1.4.2", "2.0", "1.0", ""]
        );
    }
}
