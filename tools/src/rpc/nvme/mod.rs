//! Methods about NVMe controllers: attach, list, reset, health, detach, and the defaults of all.
//!
//! In: SPDK's parameters. Out: calls of [`NvmeEngine`]. What SPDK's client sends for transports that ringmill does not have
//! is accepted as nothing only. Owner: the control thread.

pub(super) mod show;
mod types;

use std::path::Path;
use std::time::Duration;

use ringmill_drivers::nvme::ActionOnTimeout;
use ringmill_drivers::pci::PciAddress;
use serde_json::{Map, Value};

pub use self::types::{
    NvmeBdevInfo, NvmeDefaults, NvmeEngine, NvmeHealth, NvmeSpec, NvmeTransport, NvmeView,
};
use super::{
    bdev::check_name,
    engine::{EngineError, Started},
    error::RpcError,
    methods::Call,
    nearest::hint,
    params::Params,
    record::{Change, Entry},
    server::{Reply, Token},
};

const SUBSYSTEM: &str = "bdev";
/// Longest time-out: a week is the same as never.
pub(crate) const TIMEOUT_US_MAX: u64 = 7 * 24 * 3600 * 1_000_000;
/// Shortest time-out but 0, which is none.
pub(crate) const TIMEOUT_US_MIN: u64 = 10_000;
/// Most commands in flight per queue: a ring of the driver's largest size has one entry more.
pub(super) const REQUESTS_MAX: u64 = ringmill_core::limits::NVME_QUEUE_ENTRIES_MAX as u64 - 1;
/// Words for [`ActionOnTimeout`].
pub(crate) const ACTIONS: [&str; 3] = ["none", "abort", "reset"];

fn action(text: &str) -> Option<ActionOnTimeout> {
    Some(match text {
        "none" => ActionOnTimeout::None,
        "abort" => ActionOnTimeout::Abort,
        "reset" => ActionOnTimeout::Reset,
        _ => return None,
    })
}

fn action_name(action: ActionOnTimeout) -> &'static str {
    match action {
        ActionOnTimeout::None => ACTIONS[0],
        ActionOnTimeout::Abort => ACTIONS[1],
        ActionOnTimeout::Reset => ACTIONS[2],
    }
}

/// What a controller's calls are recorded under; no bdev can have this name.
fn object(name: &str) -> String {
    format!("NVMe controller {name}")
}

/// What is to be forgotten of a controller that went away by itself, and of its bdevs.
pub(super) fn forget(name: &str, bdevs: impl IntoIterator<Item = String>) -> Vec<Change> {
    let objects = bdevs.into_iter().chain([object(name)]);
    objects.map(|object| Change::Remove { subsystem: SUBSYSTEM, object }).collect()
}

fn micros(params: &Params, name: &str) -> Option<Duration> {
    params.number(name).map(Duration::from_micros)
}

/// An admin command always has a time: 0 is that of I/O commands, and the usual one where these have none.
fn admin_timeout(asked: Duration, io: Duration) -> Duration {
    [asked, io, NvmeDefaults::default().timeout_admin]
        .into_iter()
        .find(|timeout| !timeout.is_zero())
        .unwrap_or_default()
}

fn queue_size(params: &Params) -> Option<u16> {
    let requests: u16 = params.number_as("io_queue_requests").filter(|count| *count > 0)?;
    Some(requests.saturating_add(1))
}

pub(super) fn set_options(call: Call<'_>) -> Result<Reply, RpcError> {
    let mut defaults = call.engine.nvme_defaults();
    let params = &call.params;
    if let Some(action) = params.text("action_on_timeout").and_then(action) {
        defaults.action_on_timeout = action;
    }
    if let Some(timeout) = micros(params, "timeout_us") {
        defaults.timeout = timeout;
    }
    if let Some(timeout) = micros(params, "timeout_admin_us") {
        defaults.timeout_admin = admin_timeout(timeout, defaults.timeout);
    }
    if let Some(size) = queue_size(params) {
        defaults.io_queue_size = size;
    }
    let spec = NvmeSpec { name: "Nvme0".to_owned(), ..spec_of(params) };
    // With the driver's own words for what is out of range.
    spec.options(&defaults).check().map_err(|error| RpcError::params(error.to_string()))?;
    let set = call.engine.set_nvme_defaults(defaults.clone());
    // All of them: a second call changes only what it names.
    let mut recorded = Map::new();
    let mut put = |name: &str, value: Value| recorded.insert(name.to_owned(), value);
    put("action_on_timeout", action_name(defaults.action_on_timeout).into());
    put("timeout_us", whole_micros(defaults.timeout).into());
    put("timeout_admin_us", whole_micros(defaults.timeout_admin).into());
    put("io_queue_requests", defaults.io_queue_size.saturating_sub(1).into());
    let entry = Entry {
        subsystem: SUBSYSTEM,
        object: "NVMe options".to_owned(),
        method: "bdev_nvme_set_options",
        params: recorded,
    };
    call.conclude_now(set, vec![Change::PutFirst(entry)])
}

fn whole_micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// What a call says about a controller's own options; name and place are to be filled in.
fn spec_of(params: &Params) -> NvmeSpec {
    let timeout = micros(params, "timeout_us");
    NvmeSpec {
        name: String::new(),
        transport: NvmeTransport::Pcie,
        address: String::new(),
        queues: params.number_as("num_io_queues").unwrap_or(0),
        action_on_timeout: params.text("action_on_timeout").and_then(action),
        timeout,
        timeout_admin: micros(params, "timeout_admin_us")
            .map(|admin| admin_timeout(admin, timeout.unwrap_or_default())),
        io_queue_size: queue_size(params),
    }
}

pub(super) fn attach(call: Call<'_>) -> Result<Reply, RpcError> {
    let params = &call.params;
    let name = params.text_required("name").to_owned();
    check_name("name", &name)?;
    let (transport, address) = place(params)?;
    let spec = NvmeSpec { name: name.clone(), transport, address, ..spec_of(params) };
    let options = spec.options(&call.engine.nvme_defaults());
    options.check().map_err(|error| RpcError::params(error.to_string()))?;
    let entry = Entry {
        subsystem: SUBSYSTEM,
        object: object(&name),
        method: "bdev_nvme_attach_controller",
        params: params.clone().into_map(),
    };
    let started = call.engine.attach_nvme(spec, call.token);
    call.conclude(started, Value::Array(Vec::new()), vec![Change::Put(entry)])
}

/// Transport and address, checked and in their usual form.
fn place(params: &Params) -> Result<(NvmeTransport, String), RpcError> {
    let asked = params.text_required("trtype");
    let Some(transport) = NvmeTransport::from_name(asked) else {
        return Err(RpcError::params(format!(
            "\"trtype\" = \"{}\"{}; ringmill has PCIe (VFIO) and vfiouser",
            asked.chars().take(32).collect::<String>(),
            hint(asked, NvmeTransport::NAMES)
        )));
    };
    let address = params.text_required("traddr");
    match transport {
        NvmeTransport::Pcie => match address.parse::<PciAddress>() {
            Ok(address) => Ok((transport, address.to_string())),
            Err(error) => Err(RpcError::params(format!("\"traddr\" = {error}"))),
        },
        NvmeTransport::VfioUser if Path::new(address).is_absolute() => {
            Ok((transport, address.to_owned()))
        }
        NvmeTransport::VfioUser => Err(RpcError::params(format!(
            "\"traddr\" = {} is not the absolute path of a vfio-user socket, or of the directory that has it as cntrl",
            Value::from(address.chars().take(64).collect::<String>())
        ))),
    }
}

pub(super) fn list(call: Call<'_>) -> Result<Reply, RpcError> {
    let views = call.engine.nvme_controllers();
    let Some(name) = call.params.text("name") else {
        return Ok(Reply::Now(views.iter().map(show::controller).collect()));
    };
    match views.iter().find(|view| view.name == name) {
        Some(view) => Ok(Reply::Now(Value::Array(vec![show::controller(view)]))),
        None => Err(missing(name).into()),
    }
}

/// No such controller.
pub fn missing(name: &str) -> EngineError {
    EngineError::Failed {
        errno: libc::ENODEV,
        message: format!(
            "no NVMe controller \"{name}\"; bdev_nvme_get_controllers lists those there are"
        ),
    }
}

fn named(call: &Call<'_>) -> Result<NvmeView, RpcError> {
    let name = call.params.text_required("name");
    let found = call.engine.nvme_controllers().into_iter().find(|view| view.name == name);
    found.ok_or_else(|| missing(name).into())
}

pub(super) fn detach(call: Call<'_>) -> Result<Reply, RpcError> {
    let view = named(&call)?;
    let params = &call.params;
    // A path of several; a controller of ringmill has one.
    let other_transport =
        params.text("trtype").is_some_and(|t| NvmeTransport::from_name(t) != Some(view.transport));
    let other_address = params.text("traddr").is_some_and(|text| {
        let is_written_so = |address: PciAddress| address.to_string() == view.address;
        text != view.address && !text.parse().is_ok_and(is_written_so)
    });
    if other_transport || other_address {
        return Err(RpcError::errno(
            libc::ENODEV,
            format!(
                "NVMe controller \"{}\" is {} {}; leave \"trtype\" and \"traddr\" out",
                view.name,
                view.transport.name(),
                view.address
            ),
        ));
    }
    let bdevs = view.namespaces.into_iter().map(|namespace| namespace.bdev_name);
    let changes = forget(&view.name, bdevs);
    let started = call.engine.detach_nvme(&view.name, call.token);
    call.conclude(started, Value::Bool(true), changes)
}

pub(super) fn reset(call: Call<'_>) -> Result<Reply, RpcError> {
    let view = named(&call)?;
    let cntlid = view.info.as_ref().map(|info| u64::from(info.cntlid));
    if let Some(asked) = call.params.number("cntlid").filter(|asked| Some(*asked) != cntlid) {
        return Err(RpcError::params(format!(
            "NVMe controller \"{}\" has no \"cntlid\" {asked}; leave it out",
            view.name
        )));
    }
    ask(call, |engine, name, token| engine.reset_nvme(name, token))
}

pub(super) fn health(call: Call<'_>) -> Result<Reply, RpcError> {
    named(&call)?;
    ask(call, |engine, name, token| engine.nvme_health(name, token))
}

fn ask(
    call: Call<'_>,
    what: impl Fn(&mut dyn super::Engine, &str, Token) -> Started,
) -> Result<Reply, RpcError> {
    let name = call.params.text_required("name").to_owned();
    let started = what(call.engine, &name, call.token);
    call.conclude(started, Value::Bool(true), Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_admin_command_always_has_a_time() {
        let second = Duration::from_secs(1);
        let usual = NvmeDefaults::default().timeout_admin;
        assert_eq!(admin_timeout(second, usual * 2), second);
        assert_eq!(admin_timeout(Duration::ZERO, second), second);
        assert_eq!(admin_timeout(Duration::ZERO, Duration::ZERO), usual);
        assert!(!usual.is_zero());
    }
}
