//! `save-config` and `load-config`: the same file as `ringmilld -c` takes.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{Context, CtlError, items_of, text_of};
use crate::{config, rpc::RpcError};

/// Collects the configuration of all subsystems, in loading order.
pub(super) fn save(context: &mut Context<'_>, file: Option<&Path>) -> Result<(), CtlError> {
    let subsystems = context.call("framework_get_subsystems", Value::Null)?;
    let mut saved = Vec::new();
    for subsystem in items_of(&subsystems) {
        let name = text_of(subsystem, "subsystem");
        let calls = context.call("framework_get_config", json!({ "name": name }))?;
        saved.push(json!({ "subsystem": name, "config": calls }));
    }
    let text = format!("{:#}\n", json!({ "subsystems": saved }));
    let Some(file) = file else { return Ok(write!(context.out, "{text}")?) };
    // A daemon that starts meanwhile reads the old file or the new one, never half of one.
    let mut partial = file.as_os_str().to_owned();
    partial.push(".new");
    fs::write(&partial, text)
        .and_then(|()| fs::rename(&partial, file))
        .map_err(|error| CtlError::Io(format!("cannot write {}: {error}", file.display())))?;
    context.say(&json!({ "file": file }), &format!("the configuration is in {}", file.display()))
}

/// Calls what the file says, in order, until the first failure.
pub(super) fn load(context: &mut Context<'_>, file: &Path) -> Result<(), CtlError> {
    let config = config::load(file).map_err(|error| CtlError::Usage(error.to_string()))?;
    let daemon = &config.daemon;
    if *daemon != config::DaemonSettings::default() {
        let message = format!(
            "{}: cores and sockets of [daemon] are set when it starts: use `ringmilld -c`, or leave them out",
            file.display()
        );
        return Err(CtlError::Usage(message));
    }
    let calls_count = config.calls.len();
    for call in config.calls {
        context.call(&call.method, Value::Object(call.params)).map_err(|error| match error {
            CtlError::Rpc(error) => {
                let message = format!("{} ({}): {}", call.place, call.method, error.message);
                CtlError::Rpc(RpcError::new(error.code, message))
            }
            other => other,
        })?;
    }
    context.say(
        &json!({ "calls": calls_count }),
        &format!("{calls_count} calls of {} are done", file.display()),
    )
}
