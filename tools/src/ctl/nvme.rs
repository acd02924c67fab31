//! `ringmillctl nvme`: controllers that the daemon drives itself.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use ringmill_drivers::pci::PciAddress;
use serde_json::{Map, Value, json};

use super::{Context, CtlError, items_of, number_of, plain_table, text_of};
use crate::config::size;
use crate::rpc::nvme::ACTIONS;

/// Bytes of a "data unit" in a controller's health log (NVM Express Base 2.0 §5.16.1.3).
const DATA_UNIT_BYTES: u64 = 512_000;

#[derive(Debug, Subcommand)]
pub(super) enum NvmeCommand {
    /// Drive a controller from the daemon; its namespaces become disks that `disk add --bdev` shows to guests
    #[command(after_help = "Examples:
  ringmillctl pci bind 0000:01:00.0 && ringmillctl nvme attach Nvme0 --pci 0000:01:00.0
  ringmillctl nvme attach Nvme1 --vfio-user /run/vfu/cntrl
  ringmillctl disk add vm1 --bdev Nvme0n1")]
    Attach(AttachArgs),
    /// All controllers
    List,
    /// Let go of a controller; guests on its namespaces get I/O errors
    Detach {
        /// Name of the controller
        name: String,
    },
    /// Reset a controller; requests in flight are done again
    Reset {
        /// Name of the controller
        name: String,
    },
    /// What a controller says about its health (SMART)
    Health {
        /// Name of the controller
        name: String,
    },
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("place").required(true).args(["pci", "vfio_user"]))]
pub(super) struct AttachArgs {
    /// Name of the controller; its disks are called NAMEn1, NAMEn2 …
    name: String,
    /// A PCI function that vfio-pci has, as 0000:01:00.0
    #[arg(long, value_name = "ADDRESS")]
    pci: Option<String>,
    /// The socket of a vfio-user controller, or the directory where it is called cntrl
    #[arg(long, value_name = "PATH")]
    vfio_user: Option<PathBuf>,
    /// I/O queues [default: one per reactor]
    #[arg(long, value_name = "N")]
    queues: Option<u32>,
    /// Commands in flight per queue [default: 255, or what the daemon was told]
    #[arg(long, value_name = "N")]
    queue_depth: Option<u16>,
    /// How long a read, write or flush may take; 0: for ever [default: 30000, or what the daemon was told]
    #[arg(long, value_name = "MS")]
    timeout_ms: Option<u32>,
    /// How long any other command to the controller may take [default: 10000, or what the daemon was told]
    #[arg(long, value_name = "MS")]
    timeout_admin_ms: Option<u32>,
    /// What happens to a late read, write or flush: none, abort or reset [default: abort, or what the daemon was told]
    #[arg(long, value_name = "ACTION", value_parser = clap::builder::PossibleValuesParser::new(ACTIONS))]
    action_on_timeout: Option<String>,
}

pub(super) fn run(context: &mut Context<'_>, command: NvmeCommand) -> Result<(), CtlError> {
    match command {
        NvmeCommand::Attach(args) => attach(context, &args),
        NvmeCommand::List => list(context),
        NvmeCommand::Detach { name } => {
            context.call("bdev_nvme_detach_controller", json!({ "name": name }))?;
            context.say(&json!({ "detached": name }), &format!("controller {name} is detached"))
        }
        NvmeCommand::Reset { name } => {
            context.call("bdev_nvme_reset_controller", json!({ "name": name }))?;
            context
                .say(&json!({ "reset": name }), &format!("controller {name} was reset and serves"))
        }
        NvmeCommand::Health { name } => health(context, &name),
    }
}

fn attach(context: &mut Context<'_>, args: &AttachArgs) -> Result<(), CtlError> {
    let mut params = Map::new();
    params.insert("name".to_owned(), args.name.clone().into());
    let (trtype, traddr) = place(args)?;
    params.insert("trtype".to_owned(), trtype.into());
    params.insert("traddr".to_owned(), traddr.into());
    if let Some(queues) = args.queues {
        params.insert("num_io_queues".to_owned(), queues.into());
    }
    if let Some(depth) = args.queue_depth {
        params.insert("io_queue_requests".to_owned(), depth.into());
    }
    for (param, timeout_ms) in
        [("timeout_us", args.timeout_ms), ("timeout_admin_us", args.timeout_admin_ms)]
    {
        if let Some(timeout_ms) = timeout_ms {
            params.insert(param.to_owned(), (u64::from(timeout_ms) * 1000).into());
        }
    }
    if let Some(action) = &args.action_on_timeout {
        params.insert("action_on_timeout".to_owned(), action.clone().into());
    }
    let bdevs = context.call("bdev_nvme_attach_controller", Value::Object(params))?;
    let names: Vec<&str> = items_of(&bdevs).iter().filter_map(Value::as_str).collect();
    let line = match names.first() {
        Some(first) => format!(
            "controller {} is there with {}; `ringmillctl disk add NAME --bdev {first}` shows a guest its disk",
            args.name,
            names.join(", ")
        ),
        None => format!(
            "controller {} is there, without a disk that can be used; `ringmillctl nvme list --json` says why",
            args.name
        ),
    };
    context.say(&json!({ "controller": args.name, "bdevs": names }), &line)
}

/// Transport and address.
fn place(args: &AttachArgs) -> Result<(&'static str, String), CtlError> {
    if let Some(text) = &args.pci {
        let address: PciAddress =
            text.parse().map_err(|error| CtlError::Usage(format!("--pci: {error}")))?;
        return Ok(("PCIe", address.to_string()));
    }
    let Some(socket) = &args.vfio_user else {
        return Err(CtlError::Usage("give --pci or --vfio-user".to_owned()));
    };
    // The daemon has another working directory.
    let path = std::path::absolute(socket).unwrap_or_else(|_| socket.clone());
    match path.to_str() {
        Some(path) => Ok(("vfiouser", path.to_owned())),
        None => Err(CtlError::Usage(format!(
            "--vfio-user: {} is not UTF-8, which the RPC cannot carry",
            path.display()
        ))),
    }
}

fn list(context: &mut Context<'_>) -> Result<(), CtlError> {
    let controllers = context.call("bdev_nvme_get_controllers", Value::Null)?;
    if context.json {
        return Ok(writeln!(context.out, "{controllers:#}")?);
    }
    if items_of(&controllers).is_empty() {
        let line = "no NVMe controllers; add one with `ringmillctl nvme attach NAME --pci ADDRESS`";
        return Ok(writeln!(context.out, "{line}")?);
    }
    let rows = items_of(&controllers).iter().map(row).collect();
    let header = ["controller", "state", "address", "model", "queues", "disks", "trouble"];
    Ok(write!(context.out, "{}", plain_table(&header, rows))?)
}

fn row(entry: &Value) -> Vec<String> {
    let controller = &entry["ctrlrs"][0];
    let disks: Vec<String> = items_of(&controller["namespaces"]).iter().map(namespace).collect();
    let queues = match controller.get("io_queues") {
        None => "-".to_owned(),
        Some(_) => format!(
            "{} of {}",
            number_of(controller, "io_queues"),
            number_of(controller, "io_queues_granted")
        ),
    };
    vec![
        text_of(entry, "name").to_owned(),
        text_of(controller, "state").to_owned(),
        text_of(&controller["trid"], "traddr").to_owned(),
        text_of(controller, "model_number").to_owned(),
        queues,
        if disks.is_empty() { "-".to_owned() } else { disks.join(", ") },
        trouble(controller),
    ]
}

fn namespace(namespace: &Value) -> String {
    let bytes =
        number_of(namespace, "num_blocks").saturating_mul(number_of(namespace, "block_size"));
    match namespace["bdev"].as_str() {
        Some(bdev) => format!("{bdev} {}", size::format(bytes)),
        None => format!("(number {} refused)", number_of(namespace, "nsid")),
    }
}

/// What went wrong since it was attached, if anything did.
fn trouble(controller: &Value) -> String {
    let counters = &controller["counters"];
    let mut words: Vec<String> = [
        ("timeouts", "time-outs"),
        ("aborts", "aborts"),
        ("resets", "resets"),
        ("resets_failed", "resets failed"),
        ("stale_completions", "stale completions"),
    ]
    .into_iter()
    .filter(|(key, _)| number_of(counters, key) > 0)
    .map(|(key, name)| format!("{} {name}", number_of(counters, key)))
    .collect();
    words.extend(controller["last_error"].as_str().map(str::to_owned));
    if words.is_empty() { "-".to_owned() } else { words.join(", ") }
}

/// The bits of the critical warning (NVM Express Base 2.0 §5.16.1.3).
const WARNINGS: [&str; 6] = [
    "spare space is low",
    "temperature is out of range",
    "the medium is no longer reliable",
    "the medium is read-only",
    "the backup of volatile memory failed",
    "the persistent memory region is read-only or unreliable",
];

fn health(context: &mut Context<'_>, name: &str) -> Result<(), CtlError> {
    let health = context.call("bdev_nvme_get_controller_health_info", json!({ "name": name }))?;
    if context.json {
        return Ok(writeln!(context.out, "{health:#}")?);
    }
    let warning = number_of(&health, "critical_warning");
    let warnings: Vec<&str> =
        (0..).zip(WARNINGS).filter(|(bit, _)| warning >> bit & 1 == 1).map(|(_, w)| w).collect();
    let celsius = health["temperature_celsius"].as_i64().unwrap_or(0);
    let units = |key| size::format(number_of(&health, key).saturating_mul(DATA_UNIT_BYTES));
    let count = |key| number_of(&health, key).to_string();
    let rows = [
        ("model", text_of(&health, "model_number").to_owned()),
        ("serial number", text_of(&health, "serial_number").to_owned()),
        ("firmware", text_of(&health, "firmware_revision").to_owned()),
        ("address", text_of(&health, "traddr").to_owned()),
        ("warnings", if warnings.is_empty() { "none".to_owned() } else { warnings.join("; ") }),
        ("temperature", format!("{celsius} °C")),
        (
            "spare space",
            format!(
                "{} % (low below {} %)",
                number_of(&health, "available_spare_percentage"),
                number_of(&health, "available_spare_threshold_percentage")
            ),
        ),
        ("used up", format!("{} %", number_of(&health, "percentage_used"))),
        ("read", units("data_units_read")),
        ("written", units("data_units_written")),
        ("power-on hours", count("power_on_hours")),
        ("power cycles", count("power_cycles")),
        ("unsafe shutdowns", count("unsafe_shutdowns")),
        ("media errors", count("media_errors")),
        ("error log entries", count("num_err_log_entries")),
    ];
    for (title, text) in rows {
        writeln!(context.out, "{title:18}{text}")?;
    }
    Ok(())
}
