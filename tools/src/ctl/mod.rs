//! `ringmillctl`: the command line, and what each command does.
//!
//! Every command is one or a few RPC calls and a rendering of their results: tables for people, `--json` for
//! scripts. Exit status: 0 done, 1 the daemon refused, 2 wrong usage, 3 no daemon there.

pub mod args;
pub mod client;

mod config;
mod disk;
mod help;
mod hist;
mod nvme;
mod pci;
mod status;

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{CommandFactory, Parser, Subcommand};
use serde_json::{Value, json};

use self::client::Client;
use crate::rpc::RpcError;

const EXAMPLES: &str = "\
Examples:
  ringmillctl disk add vm1 --file /images/vm1.raw      a disk, and a socket for its guest
  ringmillctl disk add scratch --ram 1GiB              a RAM disk
  ringmillctl status                                   reactors, disks, guests
  ringmillctl hist show vm1                            latencies per stage
  ringmillctl pci list                                 NVMe and AHCI controllers of this machine
  ringmillctl call bdev_get_iostat names='[\"vm1\"]'     any method of the RPC
  ringmillctl help bdev_uring_create                   what a method takes

Exit status: 0 done, 1 the daemon refused, 2 wrong usage, 3 no daemon there.";

/// Talks to a running ringmilld.
#[derive(Debug, Parser)]
#[command(name = "ringmillctl", version, about = "Talks to a running ringmilld", after_help = EXAMPLES)]
#[command(disable_help_subcommand = true)]
pub struct Cli {
    /// The daemon's RPC socket [default: $RINGMILL_RPC, /run/ringmill/rpc.sock, $XDG_RUNTIME_DIR/ringmill/rpc.sock]
    #[arg(short, long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// Print JSON instead of tables; errors too, on standard error
    #[arg(long, global = true)]
    json: bool,

    /// How long to wait for an answer
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 60)]
    timeout: u32,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Add, list, resize and remove disks
    #[command(subcommand)]
    Disk(disk::DiskCommand),

    /// Reactors, disks and guests at a glance
    Status,

    /// Latencies per stage: queue, device, complete, total
    #[command(subcommand)]
    Hist(hist::HistCommand),

    /// Attach, list, reset and detach NVMe controllers that the daemon drives itself
    #[command(subcommand)]
    Nvme(nvme::NvmeCommand),

    /// PCI controllers of this machine: list them, give them to vfio-pci and back (without a daemon)
    Pci(pci::PciArgs),

    /// Call any method of the RPC
    #[command(after_help = "Examples:
  ringmillctl call bdev_get_bdevs
  ringmillctl call bdev_null_create name=n0 num_blocks=2048 block_size=512
  ringmillctl call bdev_get_iostat '{\"names\": [\"n0\"]}'

`ringmillctl help` lists the methods, `ringmillctl help METHOD` their parameters.")]
    Call {
        /// Name of the method
        method: String,
        /// Parameters: one JSON object, or key=value …
        #[arg(value_name = "JSON | KEY=VALUE")]
        params: Vec<String>,
    },

    /// Write the present configuration, to be loaded with load-config or `ringmilld -c`
    #[command(after_help = "Example: ringmillctl save-config /etc/ringmill/disks.json")]
    SaveConfig {
        /// File to write (standard output if left out)
        file: Option<PathBuf>,
    },

    /// Make the disks that a configuration file (.toml or .json) describes
    #[command(after_help = "Example: ringmillctl load-config /etc/ringmill/disks.toml")]
    LoadConfig {
        /// File to read
        file: PathBuf,
    },

    /// Explain a command, or a method of the RPC; without a topic, list the methods
    Help {
        /// Command or method
        topic: Option<String>,
    },

    /// Print a completion script for a shell
    #[command(
        after_help = "Example: ringmillctl completions bash > /etc/bash_completion.d/ringmillctl"
    )]
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
}

/// Why a command failed; decides the exit status.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// The daemon refused (1).
    #[error(transparent)]
    Rpc(#[from] RpcError),
    /// The command makes no sense (2).
    #[error("{0}")]
    Usage(String),
    /// No daemon there (3).
    #[error("{0}")]
    Unreachable(String),
    /// A file or the output failed (1).
    #[error("{0}")]
    Io(String),
    /// What was asked for is not possible, or not safe, on this machine (1).
    #[error("{0}")]
    Refused(String),
    /// Nobody reads the output any more, as in `| head` (0).
    #[error("output closed")]
    OutputClosed,
}

impl From<io::Error> for CtlError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::Io(format!("cannot write: {error}")),
        }
    }
}

impl CtlError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Rpc(_) | Self::Io(_) | Self::Refused(_) => 1,
            Self::Usage(_) => 2,
            Self::Unreachable(_) => 3,
            Self::OutputClosed => 0,
        }
    }
}

/// What every command needs: the daemon, where to write, how.
struct Context<'a> {
    client: Client,
    out: &'a mut dyn Write,
    json: bool,
}

impl Context<'_> {
    fn call(&mut self, method: &str, params: Value) -> Result<Value, CtlError> {
        self.client.call(method, params)
    }

    /// A JSON value as it is, in JSON mode; else a line for people.
    fn say(&mut self, value: &Value, line: &str) -> Result<(), CtlError> {
        if self.json {
            writeln!(self.out, "{value:#}")?;
        } else {
            writeln!(self.out, "{line}")?;
        }
        Ok(())
    }
}

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    // clap exits with 2 on wrong usage and 0 on --help.
    let cli = Cli::parse();
    let json = cli.json;
    let mut out = io::stdout().lock();
    let result = run(cli, &mut out).and_then(|()| out.flush().map_err(CtlError::from));
    let Err(error) = result else { return ExitCode::SUCCESS };
    if !matches!(error, CtlError::OutputClosed) {
        let mut stderr = io::stderr().lock();
        // If standard error is gone too, there is nobody left to tell.
        let _ = if json {
            let code = match &error {
                CtlError::Rpc(error) => error.code,
                _ => 0,
            };
            writeln!(
                stderr,
                "{}",
                json!({ "error": { "code": code, "message": error.to_string() } })
            )
        } else {
            writeln!(stderr, "ringmillctl: {error}")
        };
    }
    ExitCode::from(error.exit_status())
}

fn run(cli: Cli, out: &mut dyn Write) -> Result<(), CtlError> {
    match &cli.command {
        Command::Help { topic } => return help::help(topic.as_deref(), out),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "ringmillctl", &mut script);
            return Ok(out.write_all(&script)?);
        }
        Command::Pci(args) => return pci::run(args, out, cli.json),
        _ => {}
    }
    if let Command::Call { method, params } = &cli.command {
        // Mistakes in the parameters are found before the daemon is asked.
        args::params(method, params)?;
    }
    let socket = cli.socket.unwrap_or_else(client::default_socket);
    let client = Client::connect(&socket, Duration::from_secs(u64::from(cli.timeout)))?;
    let mut context = Context { client, out, json: cli.json };
    match cli.command {
        Command::Disk(command) => disk::run(&mut context, command),
        Command::Nvme(command) => nvme::run(&mut context, command),
        Command::Status => status::run(&mut context),
        Command::Hist(command) => hist::run(&mut context, command),
        Command::Call { method, params } => {
            let params = args::params(&method, &params)?;
            let result = context.call(&method, params)?;
            Ok(writeln!(context.out, "{result:#}")?)
        }
        Command::SaveConfig { file } => config::save(&mut context, file.as_deref()),
        Command::LoadConfig { file } => config::load(&mut context, &file),
        Command::Pci(_) | Command::Help { .. } | Command::Completions { .. } => Ok(()),
    }
}

/// A table for people: a header line, no frames, columns two blanks apart.
fn plain_table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_content_arrangement(comfy_table::ContentArrangement::Disabled);
    table.set_header(header.to_vec());
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

/// Whether a person looks at the output.
fn is_interactive() -> bool {
    io::stdout().is_terminal()
}

/// A string field of a result, or "-".
fn text_of<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("-")
}

/// A number field of a result, or 0.
fn number_of(value: &Value, key: &str) -> u64 {
    value.get(key).and_then(Value::as_u64).unwrap_or(0)
}

/// The items of an array field or value.
fn items_of(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}
