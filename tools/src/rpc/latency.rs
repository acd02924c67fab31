//! Methods about stage latencies, with the whole histogram as HdrHistogram's V2-compressed payload.

use serde_json::json;

use super::{engine::LatencyFilter, error::RpcError, methods::Call, server::Reply};
use crate::hist::payload;

pub(super) fn get(call: Call<'_>) -> Result<Reply, RpcError> {
    let filter =
        LatencyFilter { controller: call.params.text("ctrlr"), bdev: call.params.text("bdev") };
    let mut rows = Vec::new();
    for row in call.engine.latencies(filter)? {
        let h = &row.histogram;
        let encoded = payload::encode(h).map_err(|error| {
            RpcError::errno(libc::EIO, format!("cannot encode a latency histogram: {error}"))
        })?;
        rows.push(json!({
            "ctrlr": row.controller,
            "bdev": row.bdev,
            "queue": row.queue,
            "op": row.op,
            "stage": row.stage,
            "count": h.len(),
            "min": h.min(),
            "mean": h.mean(),
            "p50": h.value_at_quantile(0.5),
            "p90": h.value_at_quantile(0.9),
            "p99": h.value_at_quantile(0.99),
            "p99_9": h.value_at_quantile(0.999),
            "p99_99": h.value_at_quantile(0.9999),
            "max": h.max(),
            "hdr": encoded,
        }));
    }
    Ok(Reply::Now(json!({ "unit": "ns", "histograms": rows })))
}

pub(super) fn set_recording(call: Call<'_>) -> Result<Reply, RpcError> {
    let filter =
        LatencyFilter { controller: call.params.text("ctrlr"), bdev: call.params.text("bdev") };
    let done = call.engine.set_recording(filter, call.params.flag("enable"));
    call.conclude_now(done, Vec::new())
}

pub(super) fn reset(call: Call<'_>) -> Result<Reply, RpcError> {
    let filter =
        LatencyFilter { controller: call.params.text("ctrlr"), bdev: call.params.text("bdev") };
    let done = call.engine.reset_latencies(filter);
    call.conclude_now(done, Vec::new())
}
