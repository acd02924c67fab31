//! `ringmillctl pci`: which functions a daemon could drive, and giving them to vfio-pci and back.
//!
//! Works on sysfs of this machine, without a daemon. In: addresses of people. Out: tables, JSON, changed drivers.
//! **Invariant:** nothing is changed before everything that was named has been checked.

mod bind;
mod claim;
mod loops;
mod names;
mod nodes;
mod processes;
mod tables;
#[cfg(test)]
mod tests;
mod tree;
mod usage;

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use ringmill_drivers::pci::PciAddress;
use ringmill_drivers::vfio::is_vfio;
use serde_json::{Value, json};

use self::bind::{Binder, Change, PROBE_MAX, Sysfs};
use self::tables::Tables;
use self::tree::{Function, Tree};
use self::usage::Use;
use super::{CtlError, plain_table};
use crate::config::size;

/// The driver that hands devices to processes.
const VFIO: &str = "vfio-pci";

#[derive(Debug, Args)]
pub(super) struct PciArgs {
    /// Where sysfs, procfs and /dev are; for tests
    #[arg(long, hide = true, global = true, default_value = "/", value_name = "DIR")]
    tree: PathBuf,

    #[command(subcommand)]
    command: PciCommand,
}

#[derive(Debug, Subcommand)]
enum PciCommand {
    /// NVMe and AHCI controllers: driver, IOMMU group, NUMA node, and who uses them
    #[command(after_help = "Examples:
  ringmillctl pci list
  ringmillctl pci list --all --json")]
    List {
        /// Every PCI function
        #[arg(long)]
        all: bool,
    },
    /// Take NVMe controllers from the kernel and give them to vfio-pci, for ringmilld to drive
    #[command(after_help = "Example: ringmillctl pci bind 0000:01:00.0

Refused while anything uses a disk of the controller (a mount, swap, LVM, RAID, ZFS, a loop device, an export, a process),
and where that cannot be seen, as in a container. AHCI controllers stay with the kernel: ringmill has no driver for them
yet. The kernel forgets a binding at the next boot; bind again then, before ringmilld starts.")]
    Bind {
        /// Addresses, as 0000:01:00.0 or 01:00.0
        #[arg(required = true, value_name = "ADDRESS")]
        addresses: Vec<String>,
    },
    /// Give controllers back to the kernel's own driver
    #[command(after_help = "Example: ringmillctl pci unbind 0000:01:00.0")]
    Unbind {
        /// Addresses, as 0000:01:00.0 or 01:00.0
        #[arg(required = true, value_name = "ADDRESS")]
        addresses: Vec<String>,
    },
}

pub(super) fn run(args: &PciArgs, out: &mut dyn Write, json: bool) -> Result<(), CtlError> {
    let tree = Tree::new(&args.tree);
    let binder = Binder { tree: &tree, kernel: &Sysfs, patience: PROBE_MAX };
    match &args.command {
        PciCommand::List { all } => list(&tree, *all, out, json),
        PciCommand::Bind { addresses } => {
            change(&binder, &parse(addresses)?, Direction::Bind, out, json)
        }
        PciCommand::Unbind { addresses } => {
            change(&binder, &parse(addresses)?, Direction::Unbind, out, json)
        }
    }
}

fn parse(words: &[String]) -> Result<Vec<PciAddress>, CtlError> {
    let mut addresses = Vec::new();
    for word in words {
        let address: PciAddress =
            word.parse().map_err(|error| CtlError::Usage(format!("{error}")))?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

fn list(tree: &Tree, all: bool, out: &mut dyn Write, json: bool) -> Result<(), CtlError> {
    let functions = tree
        .functions()
        .map_err(|error| CtlError::Io(format!("cannot list PCI functions: {error}")))?;
    let tables = Tables::read(tree);
    let shown: Vec<(Function, Vec<Use>)> = functions
        .into_iter()
        .filter(|function| all || function.is_storage())
        .map(|function| {
            let mut uses = tables.uses(tree, &function);
            if uses.is_empty() && function.is_storage() {
                uses.extend(claim::zfs_use(tree, &function));
            }
            (function, uses)
        })
        .collect();
    if json {
        let rows: Value = shown.iter().map(|(f, uses)| to_json(tree, f, uses)).collect();
        return Ok(writeln!(out, "{rows:#}")?);
    }
    if shown.is_empty() {
        let hint = if all {
            "no PCI here"
        } else {
            "no NVMe or AHCI controllers; --all shows every PCI function"
        };
        return Ok(writeln!(out, "{hint}")?);
    }
    let rows = shown.iter().map(|(function, uses)| row(tree, function, uses)).collect();
    let header = ["address", "id", "device", "disks", "driver", "group", "node", "used by"];
    Ok(write!(out, "{}", plain_table(&header, rows))?)
}

/// What a function is, in words: its class, who makes it, and its model if the kernel knows it.
fn title(function: &Function) -> String {
    let class = names::class_name(function.class);
    match (&function.model, names::vendor_name(function.vendor)) {
        (Some(model), _) => format!("{class}, {model}"),
        (None, Some(vendor)) => format!("{class}, {vendor}"),
        (None, None) => class.to_owned(),
    }
}

fn row(tree: &Tree, function: &Function, uses: &[Use]) -> Vec<String> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let disks: Vec<String> = tree
        .disks(function.address)
        .into_iter()
        .map(|disk| format!("{disk} {}", size::format(tree.size_bytes(&disk))))
        .collect();
    let group = function.group.map(|group| match function.group_others.len() {
        0 => group.to_string(),
        others => format!("{group} (+{others})"),
    });
    let used = uses.first().map(|first| match uses.len() {
        1 => first.short(),
        count => format!("{} (+{})", first.short(), count - 1),
    });
    vec![
        function.address.to_string(),
        format!("{:04x}:{:04x}", function.vendor, function.device),
        title(function),
        if disks.is_empty() { "-".to_owned() } else { disks.join(", ") },
        or_dash(function.driver.clone()),
        or_dash(group),
        or_dash(function.numa_node.map(|node| node.to_string())),
        or_dash(used),
    ]
}

fn to_json(tree: &Tree, function: &Function, uses: &[Use]) -> Value {
    let disks = tree.disks(function.address).into_iter();
    json!({
        "address": function.address.to_string(),
        "vendor_id": format!("{:04x}", function.vendor),
        "device_id": format!("{:04x}", function.device),
        "class": format!("{:06x}", function.class),
        "class_name": names::class_name(function.class),
        "vendor": names::vendor_name(function.vendor),
        "model": function.model,
        "driver": function.driver,
        "iommu_group": function.group,
        "iommu_group_others": function.group_others.iter().map(PciAddress::to_string).collect::<Value>(),
        "numa_node": function.numa_node,
        "disks": disks
            .map(|disk| json!({ "size_bytes": tree.size_bytes(&disk), "name": disk }))
            .collect::<Value>(),
        "uses": uses
            .iter()
            .map(|one| json!({ "use": one.short(), "advice": one.sentence() }))
            .collect::<Value>(),
    })
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Bind,
    Unbind,
}

fn change(
    binder: &Binder<'_>,
    addresses: &[PciAddress],
    direction: Direction,
    out: &mut dyn Write,
    json: bool,
) -> Result<(), CtlError> {
    let tree = binder.tree;
    if tree.is_real() && !rustix::process::geteuid().is_root() {
        return Err(CtlError::Refused(
            "changing the driver of a device needs root; use sudo".to_owned(),
        ));
    }
    let tables = Tables::read(tree);
    let mut functions = Vec::new();
    for &address in addresses {
        let checked = match direction {
            Direction::Bind => binder.check_bind(address, &tables),
            Direction::Unbind => binder.check_unbind(address, &tables),
        };
        functions.push(checked.map_err(CtlError::Refused)?);
    }
    let mut done = Vec::new();
    for function in &functions {
        let changed = match direction {
            Direction::Bind => binder.bind(function),
            Direction::Unbind => binder.unbind(function),
        };
        match changed {
            Ok(change) => done.push(change),
            Err(reason) => {
                // What was done is said before what was not.
                report(tree, &done, direction, out, json)?;
                return Err(CtlError::Refused(reason));
            }
        }
    }
    report(tree, &done, direction, out, json)
}

fn report(
    tree: &Tree,
    done: &[Change],
    direction: Direction,
    out: &mut dyn Write,
    json: bool,
) -> Result<(), CtlError> {
    let notes: Vec<Option<String>> = done
        .iter()
        .map(|change| {
            (direction == Direction::Bind).then(|| group_note(tree, change.address)).flatten()
        })
        .collect();
    if json {
        let rows: Value = done
            .iter()
            .zip(&notes)
            .map(|(change, note)| {
                json!({
                    "address": change.address.to_string(),
                    "from": change.from,
                    "to": change.to,
                    "note": note,
                    "driven_by": change.driven_by,
                })
            })
            .collect();
        return Ok(writeln!(out, "{rows:#}")?);
    }
    for (change, note) in done.iter().zip(notes) {
        let before = change.from.as_deref().map_or("no driver".to_owned(), |from| from.to_owned());
        if change.is_none() {
            let by = change.driven_by.join(", ");
            let by = if by.is_empty() { by } else { format!(", and driven by {by}") };
            writeln!(out, "{} is with {} already{by}", change.address, change.to)?;
        } else {
            writeln!(out, "{}: {before} -> {}", change.address, change.to)?;
        }
        if let Some(note) = note {
            writeln!(out, "{note}")?;
        }
    }
    Ok(())
}

/// VFIO opens a group only if the kernel drives none of its functions.
fn group_note(tree: &Tree, address: PciAddress) -> Option<String> {
    let function = tree.function(address)?;
    let others: Vec<String> = function
        .group_others
        .iter()
        .filter_map(|other| tree.function(*other))
        .filter_map(|other| Some((other.address, other.class, other.driver?)))
        // Bridges with the port driver are no obstacle.
        .filter(|(_, class, driver)| {
            class >> 8 != 0x0604 && !is_vfio(driver) && driver != "pci-stub" && driver != "pcieport"
        })
        .map(|(address, class, driver)| {
            format!("{address} ({}, driver {driver})", names::class_name(class))
        })
        .collect();
    if others.is_empty() {
        return None;
    }
    Some(format!(
        "note: IOMMU group {} also has {}; VFIO refuses the group until no driver of the kernel has these either",
        function.group.unwrap_or_default(),
        others.join(", ")
    ))
}
