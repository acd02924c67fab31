//! `nvme-model`: the NVMe controller in software as a vfio-user server, for trying ringmilld by hand and for benchmarks.
//!
//! Owner: a developer's shell. It serves one driver after the other until it is killed.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ringmill_drivers::model::{
    Medium, ModelNamespace, ModelOptions, Sgls, Vectors, VfioUserServer, start,
};

const USAGE: &str = "\
Usage: nvme-model --socket PATH [--size 1g] [--block 512] [--medium null|ram] [--queues 64] [--sgl off|on]
                  [--latency-us 0] [--core N]

Serves an NVMe controller with one namespace over vfio-user. Attach it with
`ringmillctl rpc bdev_nvme_attach_controller` and trtype `vfiouser`, traddr PATH.

  --socket PATH      where to listen; a directory gets a socket `cntrl`
  --size BYTES       of the namespace, with k, m, g or t; data of `ram` is lost at the end
  --block BYTES      512 or 4096
  --medium KIND      null answers without moving data: the driver's own speed
  --queues COUNT     I/O queue pairs that are granted
  --sgl off|on       whether SGLs are taken
  --latency-us TIME  what every command takes at least
  --core N           the processor for the controller's thread";

/// `4k` means 4096.
fn bytes(text: &str) -> Option<u64> {
    let shift = match text.chars().last()?.to_ascii_lowercase() {
        'k' => 10,
        'm' => 20,
        'g' => 30,
        't' => 40,
        _ => return text.parse().ok(),
    };
    let number: u64 = text[..text.len() - 1].parse().ok()?;
    number.checked_mul(1 << shift)
}

/// The options as pairs, or the one that makes no sense.
fn pairs(mut arguments: impl Iterator<Item = String>) -> Result<HashMap<String, String>, String> {
    const KNOWN: [&str; 8] =
        ["socket", "size", "block", "medium", "queues", "sgl", "latency-us", "core"];
    let mut pairs = HashMap::new();
    while let Some(argument) = arguments.next() {
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (argument.clone(), arguments.next()),
        };
        let known = name.strip_prefix("--").filter(|name| KNOWN.contains(name));
        let Some((name, value)) = known.zip(value) else {
            return Err(format!("{argument}: no such option, or its value is missing"));
        };
        pairs.insert(name.to_owned(), value);
    }
    Ok(pairs)
}

fn run(options: &HashMap<String, String>) -> Result<(), Box<dyn std::error::Error>> {
    let text = |name: &str, default: &str| {
        options.get(name).cloned().unwrap_or_else(|| default.to_owned())
    };
    let wrong = |name: &str| format!("--{name} {}: not possible", text(name, ""));
    let path = options.get("socket").ok_or("--socket is missing")?;
    let size = bytes(&text("size", "1g")).ok_or_else(|| wrong("size"))?;
    let block_shift = match text("block", "512").as_str() {
        "512" => 9,
        "4096" | "4k" => 12,
        _ => return Err(wrong("block").into()),
    };
    let blocks_count = size >> block_shift;
    if blocks_count == 0 {
        return Err(wrong("size").into());
    }
    let medium = match text("medium", "null").as_str() {
        "null" => Medium::null(),
        "ram" => Medium::ram(blocks_count << block_shift)?,
        _ => return Err(wrong("medium").into()),
    };
    let sgls = match text("sgl", "off").as_str() {
        "off" => Sgls::None,
        "on" => Sgls::Bytes,
        _ => return Err(wrong("sgl").into()),
    };
    let queues: u16 = text("queues", "64").parse().map_err(|_| wrong("queues"))?;
    let latency: u64 = text("latency-us", "0").parse().map_err(|_| wrong("latency-us"))?;
    let core = options.get("core").map(|core| core.parse()).transpose();
    let model = ModelOptions {
        name: "nvme-model".to_owned(),
        io_queues_max: queues.clamp(1, 1024),
        vectors: Vectors::MsiX(queues.clamp(1, 1024) + 1),
        sgls,
        latency: Duration::from_micros(latency),
        core: core.map_err(|_| wrong("core"))?,
        ..ModelOptions::default()
    };
    let mut path = Path::new(path).to_owned();
    if path.is_dir() {
        path.push("cntrl");
    }
    // One that was killed leaves its socket behind.
    if path.exists() && UnixStream::connect(&path).is_err() {
        std::fs::remove_file(&path)?;
    }
    ringmill_core::mem::install_sigbus_handler()?;
    let namespace = ModelNamespace::new(1, block_shift, blocks_count, Arc::clone(&medium));
    let (backing, _control) = start(model, vec![namespace])?;
    let _server = VfioUserServer::start(&path, backing)
        .map_err(|error| format!("cannot listen at {}: {error}", path.display()))?;
    eprintln!(
        "nvme-model: {} blocks of {} bytes at {}",
        blocks_count,
        1 << block_shift,
        path.display()
    );
    loop {
        std::thread::park();
    }
}

fn main() -> ExitCode {
    let result = pairs(std::env::args().skip(1)).map_err(Into::into).and_then(|pairs| run(&pairs));
    if let Err(error) = result {
        eprintln!("nvme-model: {error}\n\n{USAGE}");
    }
    ExitCode::FAILURE
}
