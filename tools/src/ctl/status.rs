//! `ringmillctl status`: reactors and how busy they are, disks and their guests.

use std::{thread, time::Duration};

use serde_json::{Value, json};

use super::{Context, CtlError, disk, items_of, number_of, plain_table, text_of};
use crate::hist::as_f64;

/// Busy shares are measured over this time: shares since the start would say little.
const SAMPLE: Duration = Duration::from_millis(200);

pub(super) fn run(context: &mut Context<'_>) -> Result<(), CtlError> {
    let version = context.call("spdk_get_version", Value::Null)?;
    let before = context.call("framework_get_reactors", Value::Null)?;
    thread::sleep(SAMPLE);
    let reactors = context.call("framework_get_reactors", Value::Null)?;
    let bdevs = context.call("bdev_get_bdevs", Value::Null)?;
    let controllers = context.call("vhost_get_controllers", Value::Null)?;
    if context.json {
        let value = json!({
            "version": version,
            "reactors": reactors,
            "reactors_before": before,
            "bdevs": bdevs,
            "controllers": controllers,
        });
        return Ok(writeln!(context.out, "{value:#}")?);
    }
    writeln!(
        context.out,
        "{}, process {}, idle policy {}\n",
        text_of(&version, "version"),
        number_of(&reactors, "pid"),
        text_of(&reactors, "idle_policy"),
    )?;
    let rows = items_of(&reactors["reactors"])
        .iter()
        .map(|reactor| {
            let earlier = items_of(&before["reactors"])
                .iter()
                .find(|earlier| earlier["lcore"] == reactor["lcore"]);
            let grown = |key| {
                number_of(reactor, key)
                    .saturating_sub(earlier.map_or(0, |earlier| number_of(earlier, key)))
            };
            let queues = items_of(&controllers)
                .iter()
                .flat_map(|controller| items_of(&controller["sessions"]))
                .flat_map(|session| items_of(&session["queues"]))
                .filter(|queue| queue["lcore"] == reactor["lcore"])
                .count();
            vec![
                number_of(reactor, "lcore").to_string(),
                share_text(grown("busy"), grown("idle")),
                if reactor["in_interrupt"] == true { "asleep" } else { "polling" }.to_owned(),
                queues.to_string(),
            ]
        })
        .collect();
    writeln!(context.out, "{}", plain_table(&["core", "busy", "state", "queues"], rows))?;
    write!(context.out, "{}", disk::table(&bdevs, &controllers))?;
    let stuck: u64 = items_of(&controllers)
        .iter()
        .flat_map(|controller| items_of(&controller["sessions"]))
        .flat_map(|session| items_of(&session["queues"]))
        .map(|queue| number_of(queue, "stuck"))
        .sum();
    if stuck > 0 {
        writeln!(
            context.out,
            "\n{stuck} requests are stuck in their device; `ringmillctl call vhost_get_controllers` shows where"
        )?;
    }
    Ok(())
}

fn share_text(busy: u64, idle: u64) -> String {
    match busy + idle {
        0 => "-".to_owned(),
        all => format!("{:.0} %", 100.0 * as_f64(busy) / as_f64(all)),
    }
}
