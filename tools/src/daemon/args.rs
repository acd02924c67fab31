//! The command line of `ringmilld`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Serves virtual disks to virtual machines over vhost-user-blk.
#[derive(Debug, Parser)]
#[command(
    name = "ringmilld",
    version,
    about = "Serves virtual disks to virtual machines over vhost-user-blk.",
    long_about = "Serves virtual disks to virtual machines over vhost-user-blk.\n\n\
        Each core given with --cores runs a reactor that polls the guests' virtqueues and passes their requests to files, \
        block devices or memory. Disks come from a configuration file (--config) or, while the daemon runs, from \
        ringmillctl. No root, hugepages or kernel module is needed for disks on files.",
    after_help = "Examples:\n  \
        ringmilld demo                                  see it work, with numbers, in 15 seconds\n  \
        ringmilld -m 0x2 -S /run/ringmill               serve from core 1; then: ringmillctl disk add vm1 --file vm1.img\n  \
        ringmilld -c /etc/ringmill.toml                 serve the disks of a configuration"
)]
pub struct Cli {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to serve.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// Other things to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Shows the whole path at work: serves two disks, runs a verified load over vhost-user, prints the figures.
    Demo(DemoArgs),
}

/// How to show it.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Boot a real guest in QEMU and let it do the same.
    #[arg(long)]
    pub guest: bool,
    /// Length of each measured load, seconds.
    #[arg(long, value_name = "S", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=60))]
    pub seconds: u32,
}

/// How to serve.
#[derive(Debug, Default, Args)]
pub struct ServeArgs {
    /// Cores for reactors: a mask (0x6) or a list ([1,2] or 1-3). Default: the first core this process may use.
    #[arg(short = 'm', long, value_name = "MASK|LIST")]
    pub cores: Option<String>,
    /// Directory of the disks' sockets. Default: /run/ringmill, or $XDG_RUNTIME_DIR/ringmill without root.
    #[arg(short = 'S', long, value_name = "DIR")]
    pub socket_dir: Option<PathBuf>,
    /// Socket of the RPC. Default: rpc.sock in the socket directory.
    #[arg(short = 'r', long, value_name = "PATH")]
    pub rpc_socket: Option<PathBuf>,
    /// Configuration to load: .toml, or .json as saved by save_config.
    #[arg(short = 'c', long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Permissions of the sockets, octal. Default: 0600.
    #[arg(long, value_name = "MODE", value_parser = octal)]
    pub socket_mode: Option<u32>,
    /// Group of the sockets, name or number (for QEMU's own user, with --socket-mode 0660).
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// What a reactor without work does.
    #[arg(long, value_enum)]
    pub idle: Option<Idle>,
    /// Microseconds that an adaptive reactor polls on before it sleeps. Default: 200.
    #[arg(long, value_name = "US")]
    pub spin_us: Option<u32>,
    /// What the log contains. Default: notice.
    #[arg(long, value_name = "LEVEL", value_parser = ["error", "warning", "notice", "info", "debug"])]
    pub log_level: Option<String>,
}

/// What a reactor without work does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Idle {
    /// Polls on: the lowest latency, a whole core.
    Poll,
    /// Sleeps until the next request or kick.
    Adaptive,
}

fn octal(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text.trim_start_matches("0o"), 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| format!("{text:?} is not a mode; write it in octal, for example 0660"))
}
