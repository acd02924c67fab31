//! `ringmillctl disk`: a bdev and the controller that shows it to a guest, as one thing.

use std::{
    fs::{self, canonicalize},
    path::PathBuf,
};

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::{Context, CtlError, items_of, number_of, plain_table, text_of};
use crate::{config::size, rpc::RpcError};

const MIB: u64 = 1 << 20;

#[derive(Debug, Subcommand)]
pub(super) enum DiskCommand {
    /// Make a disk and a socket for its guest
    #[command(after_help = "Examples:
  ringmillctl disk add vm1 --file /images/vm1.raw --serial VM1
  ringmillctl disk add vm2 --file /dev/vg0/vm2 --cores 0x3
  ringmillctl disk add scratch --ram 1GiB
  ringmillctl disk add vm3 --bdev Nvme0n1              (after `ringmillctl nvme attach`)
  ringmillctl disk add bench --null 100G --no-controller")]
    Add(Box<AddArgs>),
    /// All disks
    List,
    /// Take a disk away from its guest and close it; the image file stays
    #[command(visible_alias = "rm")]
    Remove {
        /// Name of the disk
        name: String,
    },
    /// Let other cores serve a disk; its guest goes on meanwhile
    #[command(after_help = "Examples:
  ringmillctl disk move vm1 0x6                      its queues, over cores 1 and 2
  ringmillctl disk move vm1 [3] --queue 0            only queue 0, to core 3")]
    Move {
        /// Name of the disk
        name: String,
        /// Cores of the daemon, as 0x3 or [0,1]
        cores: String,
        /// Only this queue [default: all]
        #[arg(long)]
        queue: Option<u16>,
    },
    /// Tell a disk and its guest about a new size
    #[command(after_help = "Examples:
  truncate -s 20G /images/vm1.raw && ringmillctl disk resize vm1
  ringmillctl disk resize bench 200G                 (a null disk)")]
    Resize {
        /// Name of the disk
        name: String,
        /// New size of a null disk; a file's size is taken from the file
        size: Option<String>,
    },
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("backend").required(true).args(["file", "ram", "null", "bdev"]))]
pub(super) struct AddArgs {
    /// Name of the disk, and of its socket
    name: String,
    /// A file or block device
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
    /// A RAM disk of this size
    #[arg(long, value_name = "SIZE")]
    ram: Option<String>,
    /// A disk of this size that never touches data, for benchmarks
    #[arg(long, value_name = "SIZE")]
    null: Option<String>,
    /// A bdev that is there already: a namespace of an NVMe controller
    #[arg(long, value_name = "BDEV", conflicts_with_all = ["block_size", "device_queues", "no_controller"])]
    bdev: Option<String>,
    /// Serial number the guest sees [default: the name]
    #[arg(long)]
    serial: Option<String>,
    /// The guest may not write
    #[arg(long)]
    readonly: bool,
    /// Cores that may serve it, as 0x3 or [0,1] [default: all of the daemon's]
    #[arg(long)]
    cores: Option<String>,
    /// Use of the host's page cache: none, writeback or writethrough [default: none]
    #[arg(long, requires = "file")]
    cache: Option<String>,
    /// Bytes per block: 512 or 4096 [default: what the device wants; 512]
    #[arg(long, value_name = "BYTES")]
    block_size: Option<String>,
    /// Most queues offered to the guest
    #[arg(long)]
    queues: Option<u16>,
    /// Queues of the device: with fewer than reactors, each belongs to one reactor and the others' requests cross to it
    /// [default: one per reactor]
    #[arg(long, value_name = "N")]
    device_queues: Option<u16>,
    /// Poll the block device instead of waiting for its interrupts (it needs queues for that)
    #[arg(long, requires = "file")]
    iopoll: bool,
    /// How files that are memory (tmpfs, zram) are read and written: auto, by the reactor itself; ring, through io_uring
    #[arg(long, requires = "file", value_name = "HOW")]
    transfers: Option<String>,
    /// Pin the guest's memory: auto, on or off (read docs/operations.md first) [default: auto]
    #[arg(long)]
    pin: Option<String>,
    /// Use the file as it is, though it looks like qcow2, VMDK, VHDX or VDI
    #[arg(long, requires = "file")]
    raw: bool,
    /// Do not make a socket
    #[arg(long, conflicts_with_all = ["serial", "cores", "queues", "pin"])]
    no_controller: bool,
}

pub(super) fn run(context: &mut Context<'_>, command: DiskCommand) -> Result<(), CtlError> {
    match command {
        DiskCommand::Add(args) => add(context, &args),
        DiskCommand::List => list(context),
        DiskCommand::Remove { name } => remove(context, &name),
        DiskCommand::Move { name, cores, queue } => move_to(context, &name, &cores, queue),
        DiskCommand::Resize { name, size } => resize(context, &name, size.as_deref()),
    }
}

fn add(context: &mut Context<'_>, args: &AddArgs) -> Result<(), CtlError> {
    let bdev = args.bdev.as_ref().unwrap_or(&args.name);
    let made = match &args.bdev {
        Some(_) => None,
        None => {
            let (method, params) = bdev_call(args)?;
            context.call(method, params)?;
            Some(method)
        }
    };
    if args.no_controller {
        let line = format!("disk {} is there, without a socket", args.name);
        return context.say(&json!({ "bdev": args.name, "ctrlr": null, "socket": null }), &line);
    }
    let mut params = Map::new();
    params.insert("ctrlr".to_owned(), args.name.clone().into());
    params.insert("dev_name".to_owned(), bdev.clone().into());
    if args.readonly {
        params.insert("readonly".to_owned(), true.into());
    }
    let serial = args.serial.as_ref().or_else(|| args.bdev.as_ref().map(|_| &args.name));
    for (key, value) in
        [("serial", serial), ("cpumask", args.cores.as_ref()), ("pin", args.pin.as_ref())]
    {
        if let Some(value) = value {
            params.insert(key.to_owned(), value.clone().into());
        }
    }
    if let Some(queues) = args.queues {
        params.insert("num_queues".to_owned(), queues.into());
    }
    if let Err(error) = context.call("vhost_create_blk_controller", Value::Object(params)) {
        let Some(method) = made else { return Err(error) };
        // A disk without its socket is not what was asked for: undo the first half.
        let undone =
            context.call(&method.replace("_create", "_delete"), json!({ "name": args.name }));
        return Err(match (error, undone) {
            (error, Ok(_)) => error,
            (CtlError::Rpc(error), Err(undo)) => RpcError::new(
                error.code,
                format!(
                    "{error}; and the half-made disk \"{}\" could not be removed: {undo}",
                    args.name
                ),
            )
            .into(),
            (error, Err(_)) => error,
        });
    }
    let controllers = context.call("vhost_get_controllers", json!({ "name": args.name }))?;
    let socket = items_of(&controllers)
        .first()
        .map_or("-", |controller| text_of(controller, "socket"))
        .to_owned();
    let line = format!("disk {} is there; its guest connects to {socket}", args.name);
    context.say(&json!({ "bdev": bdev, "ctrlr": args.name, "socket": socket }), &line)
}

fn bdev_call(args: &AddArgs) -> Result<(&'static str, Value), CtlError> {
    let usage = |option: &str, message: String| CtlError::Usage(format!("{option}: {message}"));
    let block_size = match &args.block_size {
        None => None,
        Some(text) => Some(size::parse(text).map_err(|message| usage("--block-size", message))?),
    };
    if let Some(file) = &args.file {
        // The daemon has another working directory.
        let path = canonicalize(file)
            .or_else(|_| std::path::absolute(file))
            .unwrap_or_else(|_| file.clone());
        let Some(path) = path.to_str() else {
            return Err(usage(
                "--file",
                format!("{} is not UTF-8, which the RPC cannot carry", path.display()),
            ));
        };
        let mut params = Map::new();
        params.insert("name".to_owned(), args.name.clone().into());
        params.insert("filename".to_owned(), path.into());
        if let Some(cache) = &args.cache {
            params.insert("cache".to_owned(), cache.clone().into());
        }
        if let Some(block_size) = block_size {
            params.insert("block_size".to_owned(), block_size.into());
        }
        if args.readonly {
            params.insert("readonly".to_owned(), true.into());
        }
        if args.iopoll {
            params.insert("iopoll".to_owned(), true.into());
        }
        if let Some(transfers) = &args.transfers {
            params.insert("transfers".to_owned(), transfers.clone().into());
        }
        if args.raw {
            params.insert("format".to_owned(), "raw".into());
        }
        if let Some(queues) = args.device_queues {
            params.insert("queues".to_owned(), queues.into());
        }
        return Ok(("bdev_uring_create", Value::Object(params)));
    }
    let (option, method, text) = match (&args.ram, &args.null) {
        (Some(text), _) => ("--ram", "bdev_malloc_create", text),
        (None, Some(text)) => ("--null", "bdev_null_create", text),
        (None, None) => {
            return Err(CtlError::Usage("give --file, --ram, --null or --bdev".to_owned()));
        }
    };
    let bytes = size::parse(text).map_err(|message| usage(option, message))?;
    let block_size = block_size.unwrap_or(512);
    if block_size == 0 || bytes == 0 || bytes % block_size != 0 {
        return Err(usage(
            option,
            format!("{bytes} bytes are not a positive multiple of the block size, {block_size}"),
        ));
    }
    let mut params =
        json!({ "name": args.name, "num_blocks": bytes / block_size, "block_size": block_size });
    if let (Some(queues), Some(params)) = (args.device_queues, params.as_object_mut()) {
        params.insert("queues".to_owned(), queues.into());
    }
    Ok((method, params))
}

fn list(context: &mut Context<'_>) -> Result<(), CtlError> {
    let bdevs = context.call("bdev_get_bdevs", Value::Null)?;
    let controllers = context.call("vhost_get_controllers", Value::Null)?;
    if context.json {
        let value = json!({ "bdevs": bdevs, "controllers": controllers });
        return Ok(writeln!(context.out, "{value:#}")?);
    }
    Ok(write!(context.out, "{}", table(&bdevs, &controllers))?)
}

/// The disks and who uses them.
pub(super) fn table(bdevs: &Value, controllers: &Value) -> String {
    if items_of(bdevs).is_empty() {
        return "no disks; add one with `ringmillctl disk add NAME --file PATH`\n".to_owned();
    }
    let rows = items_of(bdevs).iter().map(|bdev| row(bdev, controllers)).collect();
    plain_table(&["disk", "kind", "size", "block", "image", "guest", "socket"], rows)
}

fn row(bdev: &Value, controllers: &Value) -> Vec<String> {
    let name = text_of(bdev, "name");
    let specific = &bdev["driver_specific"];
    let image = match text_of(&specific["uring"], "filename") {
        "-" => text_of(&specific["nvme"][0]["trid"], "traddr"),
        path => path,
    };
    let kind = match text_of(bdev, "product_name") {
        "Null disk" => "null",
        "Malloc disk" => "ram",
        "URING bdev" => "file",
        "NVMe disk" => "nvme",
        other => other,
    };
    let block_size = number_of(bdev, "block_size");
    let controller = controllers_of(controllers, name).next();
    let guest = controller.map_or("-".to_owned(), |controller| {
        let readonly = controller["backend_specific"]["block"]["readonly"] == true;
        format!("{}{}", text_of(controller, "state"), if readonly { " (read-only)" } else { "" })
    });
    vec![
        name.to_owned(),
        kind.to_owned(),
        size::format(number_of(bdev, "num_blocks").saturating_mul(block_size)),
        block_size.to_string(),
        image.to_owned(),
        guest,
        controller.map_or("-", |controller| text_of(controller, "socket")).to_owned(),
    ]
}

fn controllers_of<'a>(controllers: &'a Value, bdev: &'a str) -> impl Iterator<Item = &'a Value> {
    items_of(controllers).iter().filter(move |c| c["backend_specific"]["block"]["bdev"] == bdev)
}

fn remove(context: &mut Context<'_>, name: &str) -> Result<(), CtlError> {
    let bdev = find(context, name)?;
    let controllers = context.call("vhost_get_controllers", Value::Null)?;
    for controller in controllers_of(&controllers, name) {
        context
            .call("vhost_delete_controller", json!({ "ctrlr": text_of(controller, "ctrlr") }))?;
    }
    let method = match text_of(&bdev, "product_name") {
        "Null disk" => "bdev_null_delete",
        "Malloc disk" => "bdev_malloc_delete",
        "URING bdev" => "bdev_uring_delete",
        "NVMe disk" => {
            let line = format!(
                "disk {name} is shown to no guest; it goes with its controller (`ringmillctl nvme detach`)"
            );
            return context.say(&json!({ "removed": null, "bdev": name }), &line);
        }
        other => {
            return Err(CtlError::Usage(format!(
                "disk \"{name}\" is a {other}; remove it with `ringmillctl call`"
            )));
        }
    };
    context.call(method, json!({ "name": name }))?;
    context.say(&json!({ "removed": name }), &format!("disk {name} is removed"))
}

fn move_to(
    context: &mut Context<'_>,
    name: &str,
    cores: &str,
    queue: Option<u16>,
) -> Result<(), CtlError> {
    find(context, name)?;
    let controllers = context.call("vhost_get_controllers", Value::Null)?;
    let names: Vec<&str> =
        controllers_of(&controllers, name).map(|c| text_of(c, "ctrlr")).collect();
    if names.is_empty() {
        return Err(CtlError::Usage(format!(
            "disk \"{name}\" has no socket, so no queues to move"
        )));
    }
    for ctrlr in names {
        let mut params = json!({ "ctrlr": ctrlr, "cpumask": cores });
        if let Some(queue) = queue {
            params["queue"] = queue.into();
        }
        context.call("vhost_controller_set_cpumask", params)?;
    }
    let what = queue.map_or_else(|| "is".to_owned(), |queue| format!("has its queue {queue}"));
    let line = format!("disk {name} {what} on cores {cores} now");
    context.say(&json!({ "bdev": name, "cores": cores, "queue": queue }), &line)
}

fn resize(context: &mut Context<'_>, name: &str, size_text: Option<&str>) -> Result<(), CtlError> {
    let bdev = find(context, name)?;
    match (text_of(&bdev, "product_name"), size_text) {
        ("Null disk", Some(text)) => {
            let bytes = size::parse(text).map_err(CtlError::Usage)?;
            if bytes == 0 || bytes % MIB != 0 {
                return Err(CtlError::Usage(format!(
                    "{bytes} bytes are not a positive multiple of 1 MiB"
                )));
            }
            context.call("bdev_null_resize", json!({ "name": name, "new_size": bytes / MIB }))?;
        }
        ("Null disk", None) => {
            return Err(CtlError::Usage(format!(
                "a null disk needs a size: ringmillctl disk resize {name} 20G"
            )));
        }
        ("URING bdev", None) => {
            context.call("bdev_uring_rescan", json!({ "name": name }))?;
        }
        ("URING bdev", Some(text)) => {
            let image = text_of(&bdev["driver_specific"]["uring"], "filename");
            let is_file = fs::metadata(image).is_ok_and(|meta| meta.is_file());
            let how = if is_file {
                format!("truncate -s {text} {image}")
            } else {
                "resize the device".to_owned()
            };
            return Err(CtlError::Usage(format!(
                "the size of disk \"{name}\" is that of {image}: {how}, then `ringmillctl disk resize {name}`"
            )));
        }
        (kind, _) => return Err(CtlError::Usage(format!("a {kind} cannot change its size"))),
    }
    let bdev = find(context, name)?;
    let bytes = number_of(&bdev, "num_blocks").saturating_mul(number_of(&bdev, "block_size"));
    let line = format!("disk {name} has {} now", size::format(bytes));
    context.say(&json!({ "bdev": name, "size": bytes }), &line)
}

fn find(context: &mut Context<'_>, name: &str) -> Result<Value, CtlError> {
    let found = context.call("bdev_get_bdevs", json!({ "name": name }))?;
    Ok(items_of(&found).first().cloned().unwrap_or_default())
}
