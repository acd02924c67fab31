//! Methods about a bdev's counters and its histogram in SPDK's form.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

use super::{
    engine::{IoStats, OpStats, ResetMode},
    error::RpcError,
    methods::Call,
    server::Reply,
};

/// Buckets per power of two, as a power of two.
const GRANULARITY: u32 = 7;
/// Powers of two above the first `1 << GRANULARITY` values.
const RANGE_LAST: u32 = u64::BITS - GRANULARITY;
/// Histograms hold nanoseconds, so this is the rate of their "ticks".
const NS_PER_SECOND: u64 = 1_000_000_000;
const NS_PER_US: u64 = 1_000;

pub(super) fn iostat(call: Call<'_>) -> Result<Reply, RpcError> {
    let mut names = call.params.texts("names");
    if let Some(name) = call.params.text("name") {
        if !names.is_empty() {
            return Err(RpcError::errno(
                libc::EINVAL,
                "give either \"name\" or \"names\", not both",
            ));
        }
        names.push(name.to_owned());
    }
    let per_channel = call.params.flag("per_channel");
    if per_channel && names.len() != 1 {
        return Err(RpcError::errno(
            libc::EINVAL,
            "\"per_channel\" needs exactly one bdev in \"names\"",
        ));
    }
    let reset = reset_mode(call.params.text("reset_mode"), ResetMode::None);
    let stats = call.engine.io_stats(&names, per_channel, reset)?;
    let mut result = Map::new();
    result.insert("tick_rate".to_owned(), call.engine.tick_rate().into());
    result.insert("ticks".to_owned(), call.engine.ticks_now().into());
    let shown: Value = stats.iter().map(show).collect();
    if per_channel {
        result.insert("name".to_owned(), names.remove(0).into());
        result.insert("channels".to_owned(), shown);
    } else {
        result.insert("bdevs".to_owned(), shown);
    }
    Ok(Reply::Now(Value::Object(result)))
}

pub(super) fn reset(call: Call<'_>) -> Result<Reply, RpcError> {
    let names: Vec<String> = call.params.text("name").map(str::to_owned).into_iter().collect();
    let mode = reset_mode(call.params.text("mode"), ResetMode::All);
    let done = call.engine.io_stats(&names, false, mode).map(|_| ());
    call.conclude_now(done, Vec::new())
}

pub(super) fn enable_histogram(call: Call<'_>) -> Result<Reply, RpcError> {
    let name = call.params.text_required("name");
    let done =
        call.engine.enable_histogram(name, call.params.flag("enable"), call.params.text("opc"));
    call.conclude_now(done, Vec::new())
}

pub(super) fn histogram(call: Call<'_>) -> Result<Reply, RpcError> {
    let histogram = call.engine.histogram(call.params.text_required("name"))?;
    let buckets = spdk_buckets(&histogram);
    let bytes: Vec<u8> = buckets.iter().flat_map(|count| count.to_le_bytes()).collect();
    Ok(Reply::Now(json!({
        "histogram": STANDARD.encode(bytes),
        "granularity": GRANULARITY,
        "min_range": 0,
        "max_range": RANGE_LAST,
        "tsc_rate": NS_PER_SECOND,
    })))
}

pub(super) fn histogram_borders(call: Call<'_>) -> Result<Reply, RpcError> {
    let borders = call.params.numbers("borders");
    if borders.is_empty() || !borders.is_sorted() {
        return Err(RpcError::params(
            "\"borders\" must be at least one number of µs, in ascending order",
        ));
    }
    let histogram = call.engine.histogram(call.params.text_required("name"))?;
    let mut counts: Vec<u64> = borders
        .iter()
        .map(|border| histogram.count_between(0, border.saturating_mul(NS_PER_US)))
        .collect();
    counts.push(histogram.len());
    Ok(Reply::Now(json!({ "borders_count": counts })))
}

fn reset_mode(text: Option<&str>, default: ResetMode) -> ResetMode {
    match text {
        Some("all") => ResetMode::All,
        Some("maxmin") => ResetMode::MaxMin,
        Some(_) => ResetMode::None,
        None => default,
    }
}

fn show(stats: &IoStats) -> Value {
    let mut shown = Map::new();
    match stats.thread_id {
        Some(id) => shown.insert("thread_id".to_owned(), id.into()),
        None => shown.insert("name".to_owned(), stats.bdev.clone().into()),
    };
    let mut put = |name: &str, stats: &OpStats, bytes: &str, ops: &str| {
        if !bytes.is_empty() {
            shown.insert(bytes.to_owned(), stats.bytes.into());
        }
        shown.insert(ops.to_owned(), stats.ops_count.into());
        shown.insert(format!("{name}_latency_ticks"), stats.latency_ticks.into());
        shown.insert(format!("max_{name}_latency_ticks"), stats.latency_max_ticks.into());
        shown.insert(format!("min_{name}_latency_ticks"), stats.latency_min_ticks.into());
    };
    put("read", &stats.read, "bytes_read", "num_read_ops");
    put("write", &stats.write, "bytes_written", "num_write_ops");
    put("unmap", &stats.unmap, "bytes_unmapped", "num_unmap_ops");
    put("flush", &stats.flush, "", "num_flush_ops");
    put("write_zeroes", &stats.write_zeroes, "bytes_write_zeroed", "num_write_zeroes_ops");
    // There are no copies; clients add these up without asking.
    put("copy", &OpStats::default(), "bytes_copied", "num_copy_ops");
    Value::Object(shown)
}

/// Re-sorts a histogram into SPDK's buckets: `1 << GRANULARITY` per power of two.
fn spdk_buckets(histogram: &Histogram<u64>) -> Vec<u64> {
    let buckets_count = usize::try_from((RANGE_LAST + 1) << GRANULARITY).unwrap_or(0);
    let mut buckets = vec![0_u64; buckets_count];
    for entry in histogram.iter_recorded() {
        if let Some(bucket) = buckets.get_mut(spdk_bucket(entry.value_iterated_to())) {
            *bucket += entry.count_since_last_iteration();
        }
    }
    buckets
}

fn spdk_bucket(value: u64) -> usize {
    let range = RANGE_LAST.saturating_sub(value.leading_zeros());
    let index = (value >> range.saturating_sub(1)) & ((1 << GRANULARITY) - 1);
    usize::try_from(range << GRANULARITY).unwrap_or(0) + usize::try_from(index).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spdk_buckets_hold_the_values_that_spdk_puts_there() {
        // Ranges 0 and 1 have one value per bucket, each further range twice as many (its histogram_data.h).
        assert_eq!(spdk_bucket(0), 0);
        assert_eq!(spdk_bucket(127), 127);
        assert_eq!(spdk_bucket(128), 128);
        assert_eq!(spdk_bucket(255), 255);
        assert_eq!(spdk_bucket(256), 256);
        assert_eq!(spdk_bucket(258), 257);
        assert_eq!(spdk_bucket(1024), 4 * 128);
        assert_eq!(spdk_bucket(u64::MAX), 57 * 128 + 127);
    }
}
