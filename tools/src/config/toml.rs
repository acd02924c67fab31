//! The TOML form of a configuration: `[daemon]`, `[[nvme]]` and `[[disk]]` tables.
//!
//! Walks the parsed tables by hand, because every mistake is to be reported with its line and column, the nearest
//! known key and what is allowed. A disk becomes two calls: one makes the bdev, one shows it to guests. Controllers of
//! `[[nvme]]` come before all disks, whatever their order in the file.

use std::{
    collections::BTreeSet,
    ops::Range,
    path::{Path, PathBuf},
};

use ringmill_drivers::pci::PciAddress;
use serde_json::{Map, Value, json};
use toml::de::{DeTable, DeValue};

use super::{Config, ConfigCall, ConfigError, DaemonSettings, size};
use crate::rpc::{
    cpumask,
    engine::{CacheMode, LogLevel, PinMode},
    nearest::hint,
    nvme,
};

type Spanned<T> = toml::Spanned<T>;

const TOP_KEYS: &[&str] = &["daemon", "disk", "nvme"];
const NVME_KEYS: &[&str] = &[
    "action_on_timeout",
    "address",
    "name",
    "queue_depth",
    "queues",
    "socket",
    "timeout_admin_ms",
    "timeout_ms",
];
/// What a disk over a bdev that is there already has not of its own.
const OWN_KEYS: [&str; 11] = [
    "backend",
    "block_size",
    "cache",
    "device_queues",
    "format",
    "iopoll",
    "kind",
    "path",
    "size",
    "transfers",
    "uuid",
];
const DAEMON_KEYS: &[&str] = &[
    "cores",
    "idle",
    "log_level",
    "rpc_socket",
    "socket_dir",
    "socket_group",
    "socket_mode",
    "spin_us",
];
const DISK_KEYS: &[&str] = &[
    "backend",
    "bdev",
    "block_size",
    "cache",
    "controller",
    "cpumask",
    "device_queues",
    "format",
    "iopoll",
    "kind",
    "name",
    "num_queues",
    "path",
    "pin",
    "queues",
    "readonly",
    "serial",
    "size",
    "transfers",
    "uuid",
];
const BACKENDS: [&str; 3] = ["null", "malloc", "uring"];
const IDLE: [&str; 2] = ["poll", "adaptive"];

/// Parses a TOML configuration; `file` is its name in messages.
pub fn parse(file: &str, text: &str) -> Result<Config, ConfigError> {
    let source = Source { file, text };
    let root = DeTable::parse(text).map_err(|error| {
        let span = error.span().unwrap_or(0..0);
        source.mistake(span, error.message().replace('\n', "; "))
    })?;
    let top = Section { source: &source, title: "the file", table: root.get_ref(), span: 0..0 };
    top.check_keys(TOP_KEYS)?;
    let mut config = Config::default();
    if let Some((value, span)) = top.get("daemon") {
        let DeValue::Table(table) = value else {
            return Err(
                source.mistake(span, "\"daemon\" is a table; write [daemon] on a line of its own")
            );
        };
        let section = Section { source: &source, title: "[daemon]", table, span };
        daemon(&section, &mut config)?;
    }
    let mut taken = BTreeSet::new();
    for section in tables(&top, "nvme", "[[nvme]]")? {
        nvme(&section, &mut config, &mut taken)?;
    }
    for section in tables(&top, "disk", "[[disk]]")? {
        disk(&section, &mut config, &mut taken)?;
    }
    Ok(config)
}

/// The tables of an array of tables.
fn tables<'a>(
    top: &Section<'a>,
    key: &str,
    title: &'static str,
) -> Result<Vec<Section<'a>>, ConfigError> {
    let source = top.source;
    let not_tables = |span| {
        source.mistake(
            span,
            format!("{key}s are written as {title}, with two brackets, once per {key}"),
        )
    };
    let Some((value, span)) = top.get(key) else { return Ok(Vec::new()) };
    let DeValue::Array(entries) = value else { return Err(not_tables(span)) };
    let section = |entry: &'a Spanned<DeValue<'a>>| match entry.get_ref() {
        DeValue::Table(table) => Ok(Section { source, title, table, span: entry.span() }),
        _ => Err(not_tables(entry.span())),
    };
    entries.iter().map(section).collect()
}

/// A controller that ringmill drives itself.
fn nvme(
    section: &Section<'_>,
    config: &mut Config,
    taken: &mut BTreeSet<String>,
) -> Result<(), ConfigError> {
    section.check_keys(NVME_KEYS)?;
    let Some((name, name_span)) = section.text("name")? else {
        return Err(section.mistake("an [[nvme]] needs a \"name\""));
    };
    if !taken.insert(format!("nvme {name}")) {
        let message = format!("there are two NVMe controllers named \"{name}\"; rename one");
        return Err(section.source.mistake(name_span, message));
    }
    let (trtype, traddr) = match (section.text("address")?, section.text("socket")?) {
        (Some((address, span)), None) => match address.parse::<PciAddress>() {
            Ok(address) => ("PCIe", address.to_string()),
            Err(_) => {
                let message = format!(
                    "\"address\" = {} is not a PCI address; write it as \"0000:01:00.0\" (`ringmillctl pci list` shows them)",
                    json!(address)
                );
                return Err(section.source.mistake(span, message));
            }
        },
        (None, Some((socket, span))) => {
            if !Path::new(socket).is_absolute() {
                let message = format!(
                    "\"socket\" = {} must be an absolute path: of a vfio-user socket, or of the directory where it is called cntrl",
                    json!(socket)
                );
                return Err(section.source.mistake(span, message));
            }
            ("vfiouser", socket.to_owned())
        }
        _ => {
            return Err(section.mistake(format!(
                "NVMe controller \"{name}\" needs either the \"address\" of a PCI function or the \"socket\" of a vfio-user server"
            )));
        }
    };
    if !taken.insert(format!("at {traddr}")) {
        return Err(section.mistake(format!("two NVMe controllers are at {traddr}; remove one")));
    }
    let mut params = Map::new();
    params.insert("name".to_owned(), name.into());
    params.insert("trtype".to_owned(), trtype.into());
    params.insert("traddr".to_owned(), traddr.into());
    for (key, param) in [("queues", "num_io_queues"), ("queue_depth", "io_queue_requests")] {
        if let Some((number, _)) = section.number(key)? {
            params.insert(param.to_owned(), number.into());
        }
    }
    if let Some(action) = section.word("action_on_timeout", &nvme::ACTIONS)? {
        params.insert("action_on_timeout".to_owned(), action.into());
    }
    for (key, param) in [("timeout_ms", "timeout_us"), ("timeout_admin_ms", "timeout_admin_us")] {
        if let Some((millis, span)) = section.number(key)? {
            let micros = millis.checked_mul(1000).filter(|us| *us <= nvme::TIMEOUT_US_MAX);
            let Some(micros) = micros.filter(|us| *us == 0 || *us >= nvme::TIMEOUT_US_MIN) else {
                let message = format!(
                    "\"{key}\" = {millis} must be 0 or from {} to {}",
                    nvme::TIMEOUT_US_MIN / 1000,
                    nvme::TIMEOUT_US_MAX / 1000
                );
                return Err(section.source.mistake(span, message));
            };
            params.insert(param.to_owned(), micros.into());
        }
    }
    section.call(config, "bdev_nvme_attach_controller", params);
    Ok(())
}

fn daemon(section: &Section<'_>, config: &mut Config) -> Result<(), ConfigError> {
    section.check_keys(DAEMON_KEYS)?;
    config.daemon = DaemonSettings {
        cores: cores(section, "cores")?,
        socket_dir: section.text("socket_dir")?.map(|(text, _)| PathBuf::from(text)),
        rpc_socket: section.text("rpc_socket")?.map(|(text, _)| PathBuf::from(text)),
        socket_mode: socket_mode(section)?,
        socket_group: section.text("socket_group")?.map(|(text, _)| text.to_owned()),
    };
    let idle = section.word("idle", &IDLE)?;
    let spin_us = section.number("spin_us")?;
    if idle.is_some() || spin_us.is_some() {
        let mut params = Map::new();
        params.insert("policy".to_owned(), idle.unwrap_or("adaptive").into());
        if let Some((spin_us, _)) = spin_us {
            params.insert("spin_us".to_owned(), spin_us.into());
        }
        section.call(config, "reactor_set_idle", params);
    }
    if let Some((level, span)) = section.text("log_level")? {
        let Some(level) = LogLevel::from_name(level) else {
            let names = LogLevel::NAMES;
            let message = format!(
                "\"log_level\" = \"{level}\" is not a level{}; there are {}",
                hint(level, names),
                names.join(", ")
            );
            return Err(section.source.mistake(span, message));
        };
        let mut params = Map::new();
        params.insert("level".to_owned(), level.name().into());
        section.call(config, "log_set_level", params);
    }
    Ok(())
}

fn disk(
    section: &Section<'_>,
    config: &mut Config,
    taken: &mut BTreeSet<String>,
) -> Result<(), ConfigError> {
    section.check_keys(DISK_KEYS)?;
    let Some((name, name_span)) = section.text("name")? else {
        return Err(section.mistake("a [[disk]] needs a \"name\""));
    };
    if !taken.insert(format!("disk {name}")) {
        return Err(section
            .source
            .mistake(name_span, format!("there are two disks named \"{name}\"; rename one")));
    }
    if let Some((bdev, _)) = section.text("bdev")? {
        return shown_bdev(section, config, taken, name, bdev);
    }
    let backend = match section.either_word("backend", "kind", &BACKENDS)? {
        Some(backend) => backend,
        None if section.get("path").is_some() => "uring",
        None => {
            return Err(section.mistake(format!(
                "disk \"{name}\" needs a \"path\" (a file or block device), a \"bdev\" (a namespace of an [[nvme]]), or a \"backend\" that is null or malloc and a \"size\""
            )));
        }
    };
    let readonly = section.flag("readonly")?.unwrap_or(false);
    let mut bdev = Map::new();
    bdev.insert("name".to_owned(), name.into());
    if let Some((uuid, _)) = section.text("uuid")? {
        bdev.insert("uuid".to_owned(), uuid.into());
    }
    if let Some((queues, _)) = section.number("device_queues")? {
        bdev.insert("queues".to_owned(), queues.into());
    }
    let method = if backend == "uring" {
        image(section, name, &mut bdev)?;
        if readonly {
            bdev.insert("readonly".to_owned(), true.into());
        }
        "bdev_uring_create"
    } else {
        memory(section, name, backend, &mut bdev)?;
        if backend == "null" { "bdev_null_create" } else { "bdev_malloc_create" }
    };
    section.call(config, method, bdev);
    controller(section, config, taken, (name, name), readonly)
}

/// A disk over a bdev that something else makes: a namespace of an NVMe controller.
fn shown_bdev(
    section: &Section<'_>,
    config: &mut Config,
    taken: &mut BTreeSet<String>,
    name: &str,
    bdev: &str,
) -> Result<(), ConfigError> {
    let own = OWN_KEYS.iter().find_map(|key| Some((key, section.get(key)?.1)));
    if let Some((key, span)) = own {
        let message = format!(
            "disk \"{name}\" shows the bdev {bdev}, which comes with its controller; leave \"{key}\" out"
        );
        return Err(section.source.mistake(span, message));
    }
    if let Some((DeValue::Boolean(false), span)) = section.get("controller") {
        let message = format!(
            "disk \"{name}\" only shows the bdev {bdev}; without a controller it is nothing"
        );
        return Err(section.source.mistake(span, message));
    }
    let readonly = section.flag("readonly")?.unwrap_or(false);
    controller(section, config, taken, (name, bdev), readonly)
}

/// A file or block device.
fn image(
    section: &Section<'_>,
    name: &str,
    bdev: &mut Map<String, Value>,
) -> Result<(), ConfigError> {
    let Some((path, _)) = section.text("path")? else {
        return Err(section
            .mistake(format!("disk \"{name}\" needs the \"path\" of a file or block device")));
    };
    if let Some((_, span)) = section.get("size") {
        let message = format!(
            "disk \"{name}\" has the size of {path}; leave \"size\" out, and make or resize the file with truncate -s"
        );
        return Err(section.source.mistake(span, message));
    }
    bdev.insert("filename".to_owned(), path.into());
    if let Some((bytes, _)) = section.size("block_size")? {
        bdev.insert("block_size".to_owned(), bytes.into());
    }
    if let Some(cache) = section.word("cache", &CacheMode::NAMES)? {
        bdev.insert("cache".to_owned(), cache.into());
    }
    if let Some(format) = section.word("format", &["raw"])? {
        bdev.insert("format".to_owned(), format.into());
    }
    if let Some(transfers) = section.word("transfers", &["auto", "ring"])? {
        bdev.insert("transfers".to_owned(), transfers.into());
    }
    if section.flag("iopoll")?.unwrap_or(false) {
        bdev.insert("iopoll".to_owned(), true.into());
    }
    Ok(())
}

/// A disk without a file.
fn memory(
    section: &Section<'_>,
    name: &str,
    backend: &str,
    bdev: &mut Map<String, Value>,
) -> Result<(), ConfigError> {
    for key in ["path", "cache", "format", "iopoll", "transfers"] {
        if let Some((_, span)) = section.get(key) {
            let message = format!(
                "disk \"{name}\" is of backend {backend} and has no \"{key}\"; leave it out"
            );
            return Err(section.source.mistake(span, message));
        }
    }
    let Some((size_bytes, span)) = section.size("size")? else {
        return Err(
            section.mistake(format!("disk \"{name}\" needs a \"size\", as in size = \"1GiB\""))
        );
    };
    let block_size = section.size("block_size")?.map_or(512, |(bytes, _)| bytes);
    if block_size == 0 || size_bytes == 0 || size_bytes % block_size != 0 {
        let message = format!(
            "disk \"{name}\": a size of {size_bytes} bytes is not a positive multiple of its block_size, {block_size}"
        );
        return Err(section.source.mistake(span, message));
    }
    bdev.insert("num_blocks".to_owned(), (size_bytes / block_size).into());
    bdev.insert("block_size".to_owned(), block_size.into());
    Ok(())
}

fn controller(
    section: &Section<'_>,
    config: &mut Config,
    taken: &mut BTreeSet<String>,
    (disk, bdev): (&str, &str),
    readonly: bool,
) -> Result<(), ConfigError> {
    let (controller, span) = match section.get("controller") {
        None => (disk, section.span.clone()),
        Some((DeValue::Boolean(false), _)) => return Ok(()),
        Some((DeValue::String(text), span)) if !text.is_empty() => (text.as_ref(), span),
        Some((other, span)) => {
            let message = format!(
                "\"controller\" must be the socket's name, or false for none, not {}",
                kind_of(other)
            );
            return Err(section.source.mistake(span, message));
        }
    };
    if !taken.insert(format!("controller {controller}")) {
        let message =
            format!("there are two controllers named \"{controller}\"; set \"controller\" of one");
        return Err(section.source.mistake(span, message));
    }
    let mut params = Map::new();
    params.insert("ctrlr".to_owned(), controller.into());
    params.insert("dev_name".to_owned(), bdev.into());
    if readonly {
        params.insert("readonly".to_owned(), true.into());
    }
    if let Some((serial, _)) = section.text("serial")? {
        params.insert("serial".to_owned(), serial.into());
    }
    for key in ["queues", "num_queues"] {
        if let Some((queues, _)) = section.number(key)? {
            params.insert("num_queues".to_owned(), queues.into());
        }
    }
    if let Some(cores) = cores(section, "cpumask")? {
        params.insert("cpumask".to_owned(), cpumask::format(&cores).into());
    }
    if let Some((DeValue::Boolean(on), _)) = section.get("pin") {
        params.insert("pin".to_owned(), if *on { "on" } else { "off" }.into());
    } else if let Some(pin) = section.word("pin", &PinMode::NAMES)? {
        params.insert("pin".to_owned(), pin.into());
    }
    section.call(config, "vhost_create_blk_controller", params);
    Ok(())
}

fn cores(section: &Section<'_>, key: &str) -> Result<Option<Vec<u32>>, ConfigError> {
    let (text, span) = match section.get(key) {
        None => return Ok(None),
        Some((DeValue::String(text), span)) => (text.to_string(), span),
        Some((DeValue::Array(items), span)) => {
            let items: Vec<String> = items.iter().map(|item| value_text(item.get_ref())).collect();
            (format!("[{}]", items.join(",")), span)
        }
        Some((other, span)) => {
            let message = format!(
                "\"{key}\" must be cores as \"0x5\", \"0,2-3\" or [0, 2, 3], not {}",
                kind_of(other)
            );
            return Err(section.source.mistake(span, message));
        }
    };
    let cores = cpumask::parse(&text)
        .map_err(|reason| section.source.mistake(span, format!("\"{key}\": {reason}")))?;
    Ok(Some(cores))
}

fn socket_mode(section: &Section<'_>) -> Result<Option<u32>, ConfigError> {
    let (mode, span) = match section.get("socket_mode") {
        None => return Ok(None),
        Some((DeValue::String(text), span)) => {
            (u32::from_str_radix(text.trim_start_matches("0o"), 8).ok(), span)
        }
        // A decimal 660 would not be what it looks like.
        Some((DeValue::Integer(number), span)) if number.radix() == 8 => {
            (u32::from_str_radix(number.as_str(), 8).ok(), span)
        }
        Some((_, span)) => (None, span),
    };
    match mode.filter(|mode| *mode <= 0o777) {
        Some(mode) => Ok(Some(mode)),
        None => Err(section
            .source
            .mistake(span, "\"socket_mode\" is written as \"0660\" or 0o660, up to 0777")),
    }
}

struct Source<'a> {
    file: &'a str,
    text: &'a str,
}

impl Source<'_> {
    fn place(&self, at: usize) -> String {
        let before = self.text.get(..at).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |rest| rest.chars().count()) + 1;
        format!("{}:{line}:{column}", self.file)
    }

    fn mistake(&self, span: Range<usize>, message: impl Into<String>) -> ConfigError {
        ConfigError::Mistake { place: self.place(span.start), message: message.into() }
    }
}

/// One table, with readers that report mistakes at their place.
struct Section<'a> {
    source: &'a Source<'a>,
    title: &'static str,
    table: &'a DeTable<'a>,
    span: Range<usize>,
}

impl<'a> Section<'a> {
    fn mistake(&self, message: impl Into<String>) -> ConfigError {
        self.source.mistake(self.span.clone(), message)
    }

    fn call(&self, config: &mut Config, method: &str, params: Map<String, Value>) {
        let place = self.source.place(self.span.start);
        config.calls.push(ConfigCall { method: method.to_owned(), params, place });
    }

    fn check_keys(&self, allowed: &[&str]) -> Result<(), ConfigError> {
        let mut unknown: Vec<&Spanned<_>> =
            self.table.keys().filter(|key| !allowed.contains(&key.get_ref().as_ref())).collect();
        unknown.sort_by_key(|key| key.span().start);
        let Some(key) = unknown.first() else { return Ok(()) };
        let name = key.get_ref().as_ref();
        let message = format!(
            "{} has no key {}{}; it has {}",
            self.title,
            json!(name),
            hint(name, allowed.iter().copied()),
            allowed.join(", ")
        );
        Err(self.source.mistake(key.span(), message))
    }

    fn get(&self, key: &str) -> Option<(&'a DeValue<'a>, Range<usize>)> {
        let (_, value) = self.table.iter().find(|(known, _)| known.get_ref().as_ref() == key)?;
        Some((value.get_ref(), value.span()))
    }

    fn wrong(&self, key: &str, wanted: &str, got: &DeValue<'_>, span: Range<usize>) -> ConfigError {
        self.source.mistake(span, format!("\"{key}\" must be {wanted}, not {}", kind_of(got)))
    }

    fn text(&self, key: &str) -> Result<Option<(&'a str, Range<usize>)>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some((DeValue::String(text), span)) if !text.is_empty() => {
                Ok(Some((text.as_ref(), span)))
            }
            Some((other, span)) => Err(self.wrong(key, "a string in quotes", other, span)),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some((DeValue::Boolean(flag), _)) => Ok(Some(*flag)),
            Some((other, span)) => Err(self.wrong(key, "true or false", other, span)),
        }
    }

    fn number(&self, key: &str) -> Result<Option<(u64, Range<usize>)>, ConfigError> {
        let Some((value, span)) = self.get(key) else { return Ok(None) };
        let number = match value {
            DeValue::Integer(number) => u64::from_str_radix(number.as_str(), number.radix()).ok(),
            _ => None,
        };
        match number {
            Some(number) => Ok(Some((number, span))),
            None => Err(self.wrong(key, "a whole number, 0 or more", value, span)),
        }
    }

    fn size(&self, key: &str) -> Result<Option<(u64, Range<usize>)>, ConfigError> {
        match self.get(key) {
            Some((DeValue::String(text), span)) => match size::parse(text) {
                Ok(bytes) => Ok(Some((bytes, span))),
                Err(message) => Err(self.source.mistake(span, format!("\"{key}\": {message}"))),
            },
            Some((DeValue::Integer(_), _)) | None => self.number(key),
            Some((other, span)) => Err(self.wrong(key, "a size, as in \"1GiB\"", other, span)),
        }
    }

    fn word(&self, key: &str, words: &[&'static str]) -> Result<Option<&'static str>, ConfigError> {
        let Some((text, span)) = self.text(key)? else { return Ok(None) };
        match words.iter().find(|word| **word == text) {
            Some(word) => Ok(Some(word)),
            None => {
                let message = format!(
                    "\"{key}\" = {} is not known{}; it is one of {}",
                    json!(text),
                    hint(text, words.iter().copied()),
                    words.join(", ")
                );
                Err(self.source.mistake(span, message))
            }
        }
    }

    fn either_word(
        &self,
        key: &str,
        other: &str,
        words: &[&'static str],
    ) -> Result<Option<&'static str>, ConfigError> {
        match (self.word(key, words)?, self.word(other, words)?) {
            (Some(a), Some(b)) if a != b => Err(self.mistake(format!(
                "\"{key}\" = \"{a}\" and \"{other}\" = \"{b}\" contradict; keep one"
            ))),
            (first, second) => Ok(first.or(second)),
        }
    }
}

fn kind_of(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) if text.is_empty() => "an empty string".to_owned(),
        DeValue::String(_) => format!("the string {}", value_text(value)),
        DeValue::Integer(_) | DeValue::Float(_) => format!("the number {}", value_text(value)),
        DeValue::Boolean(_) => value_text(value),
        DeValue::Datetime(_) => "a date".to_owned(),
        DeValue::Array(_) => "an array".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

fn value_text(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => json!(text.chars().take(40).collect::<String>()).to_string(),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(flag) => flag.to_string(),
        _ => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_and_settings_become_calls_in_order() {
        let config = parse(
            "a.toml",
            r#"
[daemon]
cores = "1-2"
socket_dir = "/run/x"
socket_mode = "0660"
socket_group = "kvm"
idle = "poll"
log_level = "debug"

[[disk]]
name = "vm1"
path = "/images/vm1.raw"
cache = "writeback"
queues = 4
cpumask = [1]
serial = "S1"
pin = true

[[disk]]
name = "scratch"
backend = "malloc"
size = "1GiB"
block_size = "4k"
readonly = true
controller = "sc"

[[disk]]
name = "bare"
kind = "null"
size = 1024
controller = false
"#,
        )
        .unwrap();
        assert_eq!(config.daemon.cores, Some(vec![1, 2]));
        assert_eq!(config.daemon.socket_mode, Some(0o660));
        let calls: Vec<Value> =
            config.calls.iter().map(|call| json!([call.place, call.method, call.params])).collect();
        let lines: Vec<String> = calls.iter().map(Value::to_string).collect();
        insta::assert_snapshot!(lines.join("\n"));
        super::super::check_calls(&config.calls).unwrap();
    }

    #[test]
    fn nvme_controllers_come_before_the_disks_that_show_them() {
        let config = parse(
            "a.toml",
            r#"
[[disk]]
name = "vm1"
bdev = "Nvme0n1"
serial = "S1"
queues = 4

[[disk]]
name = "vm2"
bdev = "Nvme1n2"
controller = "two"
readonly = true

[[nvme]]
name = "Nvme0"
address = "01:00.0"

[[nvme]]
name = "Nvme1"
socket = "/run/vfu/1"
queues = 1
queue_depth = 64
timeout_ms = 5000
timeout_admin_ms = 0
action_on_timeout = "reset"
"#,
        )
        .unwrap();
        let calls: Vec<String> = config
            .calls
            .iter()
            .map(|call| json!([call.place, call.method, call.params]).to_string())
            .collect();
        insta::assert_snapshot!(calls.join("\n"));
        super::super::check_calls(&config.calls).unwrap();
    }

    #[test]
    fn mistakes_about_nvme_are_as_plain() {
        let socket = "[[nvme]]\nname = \"a\"\nsocket = \"/x\"\n";
        let mistakes = [
            "[nvme]\nname = \"a\"\n".to_owned(),
            "[[nvme]]\naddress = \"01:00.0\"\n".to_owned(),
            "[[nvme]]\nname = \"a\"\n".to_owned(),
            "[[nvme]]\nname = \"a\"\naddress = \"nvme0\"\n".to_owned(),
            "[[nvme]]\nname = \"a\"\nsocket = \"x\"\n".to_owned(),
            "[[nvme]]\nname = \"a\"\nadress = \"01:00.0\"\n".to_owned(),
            format!("{socket}address = \"01:00.0\"\n"),
            format!("{socket}timeout_ms = 9\n"),
            format!("{socket}timeout_ms = 18446744073709551615\n"),
            format!("{socket}queues = \"all\"\n"),
            format!("{socket}action_on_timeout = \"abrt\"\n"),
            format!("{socket}{socket}"),
            format!("{socket}[[nvme]]\nname = \"b\"\nsocket = \"/x\"\n"),
            format!("{socket}[[disk]]\nname = \"a\"\nbdev = \"an1\"\npath = \"/y\"\n"),
            format!("{socket}[[disk]]\nname = \"a\"\nbdev = \"an1\"\ncontroller = false\n"),
        ];
        let messages: Vec<String> =
            mistakes.iter().map(|text| parse("vm.toml", text).unwrap_err().to_string()).collect();
        assert!(messages.iter().all(|message| !message.contains('\n')));
        insta::assert_snapshot!(messages.join("\n"));
    }

    #[test]
    fn every_mistake_is_one_line_with_its_place_and_what_is_allowed() {
        let mistakes = [
            "[daemon]\ncoers = 1\n",
            "[deamon]\ncores = 1\n",
            "[disk]\nname = \"a\"\n",
            "disk = 5\n",
            "[[disk]]\nname = \"a\"\npth = \"/x\"\n",
            "[[disk]]\npath = \"/x\"\n",
            "[[disk]]\nname = \"a\"\n",
            "[[disk]]\nname = 5\npath = \"/x\"\n",
            "[[disk]]\nname = \"a\"\npath = \"/x\"\nsize = \"1G\"\n",
            "[[disk]]\nname = \"a\"\npath = \"/x\"\ncache = \"writeback \"\n",
            "[[disk]]\nname = \"a\"\nbackend = \"maloc\"\n",
            "[[disk]]\nname = \"a\"\nbackend = \"malloc\"\nsize = \"1x\"\n",
            "[[disk]]\nname = \"a\"\nbackend = \"malloc\"\nsize = 1000\n",
            "[[disk]]\nname = \"a\"\nbackend = \"null\"\nsize = \"1G\"\npath = \"/x\"\n",
            "[[disk]]\nname = \"a\"\npath = \"/x\"\n[[disk]]\nname = \"a\"\npath = \"/y\"\n",
            "[[disk]]\nname = \"a\"\npath = \"/x\"\nreadonly = \"yes\"\n",
            "[[disk]]\nname = \"a\"\npath = \"/x\"\nqueues = -1\n",
            "[[disk]]\nname = \"a\"\npath = \"/x\"\ncpumask = \"zz\"\n",
            "[[disk]]\nname = \"ä\", path = 1\n",
            "[daemon]\nsocket_mode = 660\n",
            "[daemon]\nidle = \"adaptiv\"\n",
            "[daemon]\nlog_level = \"loud\"\n",
            "[[disk]\n",
        ];
        let messages: Vec<String> =
            mistakes.iter().map(|text| parse("vm.toml", text).unwrap_err().to_string()).collect();
        assert!(messages.iter().all(|message| !message.contains('\n')));
        insta::assert_snapshot!(messages.join("\n"));
    }
}
