//! `nvme-model`: the NVMe controller in software as a vfio-user server, for trying ringmilld by hand and for benchmarks.
//!
//! Owner: a developer's shell. It serves one driver after the other until it is killed.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::{Parser, ValueEnum};
use ringmill_drivers::model::{
    Medium, ModelNamespace, ModelOptions, Sgls, Vectors, VfioUserServer, start,
};
use ringmill_tools::config::size;

/// Serves an NVMe controller with one namespace over vfio-user.
///
/// Attach it with `ringmillctl nvme attach NAME --vfio-user SOCKET`.
#[derive(Parser)]
struct Options {
    /// Where to listen; a directory gets a socket `cntrl`
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Bytes of the namespace: 512m, 1g
    #[arg(long, value_name = "SIZE", default_value = "1g", value_parser = size::parse)]
    size: u64,

    /// Bytes of a block
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = block_shift)]
    block: u8,

    /// What is behind the namespace
    #[arg(long, value_name = "KIND", default_value = "null")]
    medium: Kind,

    /// I/O queue pairs that are granted
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    queues: u16,

    /// Take SGLs as well as PRPs
    #[arg(long)]
    sgl: bool,

    /// Microseconds that every command takes at least
    #[arg(long, value_name = "TIME", default_value_t = 0)]
    latency_us: u64,

    /// The processor for the controller's thread
    #[arg(long, value_name = "CORE")]
    core: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// Answers without moving data: the driver's own speed
    Null,
    /// Memory; its data is lost at the end
    Ram,
}

fn block_shift(text: &str) -> Result<u8, String> {
    match size::parse(text)? {
        512 => Ok(9),
        4096 => Ok(12),
        other => Err(format!("{other} is neither 512 nor 4096")),
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let block_shift = options.block;
    let blocks_count = options.size >> block_shift;
    anyhow::ensure!(blocks_count > 0, "--size {} is less than a block", options.size);
    let medium = match options.medium {
        Kind::Null => Medium::null(),
        Kind::Ram => {
            Medium::ram(blocks_count << block_shift).map_err(|error| anyhow!("--size: {error}"))?
        }
    };
    let model = ModelOptions {
        name: "nvme-model".to_owned(),
        io_queues_max: options.queues,
        vectors: Vectors::MsiX(options.queues + 1),
        sgls: if options.sgl { Sgls::Bytes } else { Sgls::None },
        latency: Duration::from_micros(options.latency_us),
        core: options.core,
        ..ModelOptions::default()
    };
    let mut path = options.socket;
    if path.is_dir() {
        path.push("cntrl");
    }
    // One that was killed leaves its socket behind.
    if path.exists() && UnixStream::connect(&path).is_err() {
        std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    ringmill_core::mem::install_sigbus_handler()?;
    let namespace = ModelNamespace::new(1, block_shift, blocks_count, Arc::clone(&medium));
    let (backing, _control) = start(model, vec![namespace]).map_err(|error| anyhow!("{error}"))?;
    let _server = VfioUserServer::start(&path, backing)
        .with_context(|| format!("cannot listen at {}", path.display()))?;
    eprintln!(
        "nvme-model: {blocks_count} blocks of {} bytes at {}",
        1 << block_shift,
        path.display()
    );
    loop {
        std::thread::park();
    }
}
