//! Methods about the daemon itself: version, method list, configuration, reactors, threads, signals, log.

use serde_json::{Value, json};

use super::{
    engine::{IdlePolicy, LogLevel},
    error::RpcError,
    methods::{Call, METHODS},
    nearest::hint,
    record::{Change, Entry, SUBSYSTEMS},
    server::Reply,
    show,
};

/// Signals by name; numbers are Linux's.
const SIGNALS: [(&str, i32); 7] = [
    ("SIGTERM", libc::SIGTERM),
    ("SIGINT", libc::SIGINT),
    ("SIGHUP", libc::SIGHUP),
    ("SIGQUIT", libc::SIGQUIT),
    ("SIGKILL", libc::SIGKILL),
    ("SIGUSR1", libc::SIGUSR1),
    ("SIGUSR2", libc::SIGUSR2),
];

pub(super) fn yes(_: Call<'_>) -> Result<Reply, RpcError> {
    Ok(Reply::Now(Value::Bool(true)))
}

pub(super) fn version(_: Call<'_>) -> Result<Reply, RpcError> {
    let part = |text: &str| text.parse::<u32>().unwrap_or(0);
    Ok(Reply::Now(json!({
        "version": concat!("ringmill v", env!("CARGO_PKG_VERSION")),
        "fields": {
            "major": part(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": part(env!("CARGO_PKG_VERSION_MINOR")),
            "patch": part(env!("CARGO_PKG_VERSION_PATCH")),
            "suffix": env!("CARGO_PKG_VERSION_PRE"),
        },
    })))
}

pub(super) fn methods(_: Call<'_>) -> Result<Reply, RpcError> {
    Ok(Reply::Now(METHODS.iter().map(|method| method.name).collect()))
}

pub(super) fn subsystems(_: Call<'_>) -> Result<Reply, RpcError> {
    let list =
        SUBSYSTEMS.iter().map(|(name, after)| json!({ "subsystem": name, "depends_on": after }));
    Ok(Reply::Now(list.collect()))
}

pub(super) fn config(call: Call<'_>) -> Result<Reply, RpcError> {
    let name = call.params.text_required("name");
    let names = SUBSYSTEMS.map(|(name, _)| name);
    if !names.contains(&name) {
        return Err(RpcError::params(format!(
            "no subsystem \"{name}\"{}; there are {}",
            hint(name, names),
            names.join(", ")
        )));
    }
    Ok(Reply::Now(call.state.record.subsystem(name)))
}

pub(super) fn reactors(call: Call<'_>) -> Result<Reply, RpcError> {
    let reactors: Value = call.engine.reactors().iter().map(show::reactor).collect();
    let (policy, spin_us) = call.engine.idle();
    Ok(Reply::Now(json!({
        "tick_rate": call.engine.tick_rate(),
        "pid": std::process::id(),
        "idle_policy": policy_name(policy),
        "spin_us": spin_us,
        "reactors": reactors,
    })))
}

pub(super) fn threads(call: Call<'_>) -> Result<Reply, RpcError> {
    let threads: Value = call.engine.reactors().iter().map(show::thread).collect();
    Ok(Reply::Now(json!({ "tick_rate": call.engine.tick_rate(), "threads": threads })))
}

pub(super) fn pollers(call: Call<'_>) -> Result<Reply, RpcError> {
    let threads: Value = call.engine.reactors().iter().map(show::pollers).collect();
    Ok(Reply::Now(json!({ "tick_rate": call.engine.tick_rate(), "threads": threads })))
}

pub(super) fn scheduler(call: Call<'_>) -> Result<Reply, RpcError> {
    let cores: Vec<u32> = call.engine.reactors().iter().map(|reactor| reactor.core).collect();
    Ok(Reply::Now(json!({
        "scheduler_name": "static",
        "scheduler_period": 0,
        "isolated_core_mask": "0x0",
        "scheduling_core": cores.first().copied().unwrap_or(0),
    })))
}

pub(super) fn kill(call: Call<'_>) -> Result<Reply, RpcError> {
    let asked = call.params.text_required("sig_name");
    let folded = asked.to_ascii_uppercase();
    let found = SIGNALS.iter().find(|(name, number)| {
        folded == *name || name.strip_prefix("SIG") == Some(&folded) || folded == number.to_string()
    });
    let Some((_, number)) = found else {
        let names = SIGNALS.map(|(name, _)| name);
        return Err(RpcError::params(format!(
            "no signal \"{asked}\"{}; there are {}",
            hint(asked, names),
            names.join(", ")
        )));
    };
    let killed = call.engine.kill(*number);
    call.conclude_now(killed, Vec::new())
}

pub(super) fn set_log_level(call: Call<'_>) -> Result<Reply, RpcError> {
    let asked = call.params.text_required("level");
    let Some(level) = LogLevel::from_name(asked) else {
        return Err(RpcError::params(format!(
            "no log level \"{asked}\"{}; there are {}",
            hint(asked, LogLevel::NAMES),
            LogLevel::NAMES.join(", ")
        )));
    };
    let set = call.engine.set_log_level(level);
    call.conclude_now(set, Vec::new())
}

pub(super) fn log_level(call: Call<'_>) -> Result<Reply, RpcError> {
    Ok(Reply::Now(call.engine.log_level().name().into()))
}

pub(super) fn set_idle(call: Call<'_>) -> Result<Reply, RpcError> {
    let policy = match call.params.text_required("policy") {
        "poll" => IdlePolicy::Poll,
        _ => IdlePolicy::Adaptive,
    };
    let set = call.engine.set_idle(policy, call.params.number_as("spin_us"));
    let entry = Entry {
        subsystem: "reactor",
        object: "idle".to_owned(),
        method: "reactor_set_idle",
        params: call.params.clone().into_map(),
    };
    call.conclude_now(set, vec![Change::Put(entry)])
}

fn policy_name(policy: IdlePolicy) -> &'static str {
    match policy {
        IdlePolicy::Poll => "poll",
        IdlePolicy::Adaptive => "adaptive",
    }
}
